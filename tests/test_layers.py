"""PSP layers against numbers worked out on paper, finite differences, and their Keras parents."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import patterns

from keras_prune import Channels, FilterPruning, cut, dead_units, relative_difference
from keras_prune.layers import (
    PLAIN,
    STRUCTURES,
    PSPConv1D,
    PSPConv2D,
    PSPConv2DTranspose,
    PSPConv3D,
    PSPDense,
    PSPDepthwiseConv2D,
    PSPSeparableConv2D,
    decay,
)
from keras_prune.surgery import zeroed

TUPLES = (("layer", "channel"), ("column", "filter"), ("shape", "channel", "filter"))

LAYERS = {
    PSPDense: SimpleNamespace(
        arguments={"units": 6},
        shape=(4,),
        alphas={"column": (4, 1), "channel": (4, 1), "shape": (1, 1), "layer": (1, 1), "filter": (1, 6)},
    ),
    PSPConv1D: SimpleNamespace(
        arguments={"filters": 6, "kernel_size": 3},
        shape=(6, 4),
        alphas={"column": (3, 4, 1), "channel": (1, 4, 1), "shape": (3, 1, 1), "layer": (1, 1, 1), "filter": (1, 1, 6)},
    ),
    PSPConv2D: SimpleNamespace(
        arguments={"filters": 6, "kernel_size": (3, 2)},
        shape=(5, 4, 4),
        alphas={
            "column": (3, 2, 4, 1),
            "channel": (1, 1, 4, 1),
            "shape": (3, 2, 1, 1),
            "layer": (1, 1, 1, 1),
            "filter": (1, 1, 1, 6),
        },
    ),
    PSPConv3D: SimpleNamespace(
        arguments={"filters": 6, "kernel_size": (2, 1, 2)},
        shape=(3, 2, 3, 4),
        alphas={
            "column": (2, 1, 2, 4, 1),
            "channel": (1, 1, 1, 4, 1),
            "shape": (2, 1, 2, 1, 1),
            "layer": (1, 1, 1, 1, 1),
            "filter": (1, 1, 1, 1, 6),
        },
    ),
    PSPConv2DTranspose: SimpleNamespace(
        arguments={"filters": 6, "kernel_size": (3, 2), "strides": 2},
        shape=(3, 3, 4),
        alphas={
            "column": (3, 2, 1, 4),
            "channel": (1, 1, 1, 4),
            "shape": (3, 2, 1, 1),
            "layer": (1, 1, 1, 1),
            "filter": (1, 1, 6, 1),
        },
    ),
    PSPDepthwiseConv2D: SimpleNamespace(
        arguments={"kernel_size": (3, 2), "depth_multiplier": 2},
        shape=(5, 4, 4),
        alphas={
            "column": (3, 2, 4, 1),
            "channel": (1, 1, 4, 1),
            "shape": (3, 2, 1, 1),
            "layer": (1, 1, 1, 1),
            "filter": (1, 1, 4, 2),
        },
    ),
    PSPSeparableConv2D: SimpleNamespace(
        arguments={"kernel_size": (3, 2), "depth_multiplier": 2, "filters": 6},
        shape=(5, 4, 4),
        alphas={
            "column": (3, 2, 4, 1),
            "channel": (1, 1, 4, 1),
            "shape": (3, 2, 1, 1),
            "layer": (1, 1, 1, 1),
            "filter": (1, 1, 1, 6),
        },
    ),
}
CLASSES = pytest.mark.parametrize("cls", LAYERS, ids=lambda c: c.__name__)


NO_FLOAT64 = "this backend computes float64 in float32 (JAX without JAX_ENABLE_X64)"


def has_float64():
    return numbers(ops.ones((), "float64")).dtype == "float64"


def kernels(cls):
    return ["depthwise_kernel", "pointwise_kernel"] if cls is PSPSeparableConv2D else ["kernel"]


def numbers(variable):
    return keras.ops.convert_to_numpy(variable)


def made(cls, structure="channel", seed=0, shape=None, **arguments):
    """A built layer; weights, biases and alphas of both signs on both sides of the thresholds are random."""
    arguments = {**LAYERS[cls].arguments, **arguments} if shape is None else arguments
    layer = cls(structure=structure, **arguments)
    layer.build((None, *(shape or LAYERS[cls].shape)))
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    for name, alpha in layer.alphas.items():
        value = rng.choice([-1, 1], alpha.shape) * rng.uniform(0.2, 1.5, alpha.shape)
        flat = value.ravel()
        if flat.size > 1:
            flat[rng.permutation(flat.size)[: max(1, flat.size // 3)]] *= 0.05  # below 0.1
        alpha.assign(flat.reshape(alpha.shape))
        assert (np.abs(numbers(alpha)) < numbers(layer.thresholds[name])).any() == (flat.size > 1)
    return layer


def nus(layer):
    """structure -> alpha with zeros below the threshold, in numpy."""
    return {
        s: np.where(np.abs(numbers(a)) >= numbers(layer.thresholds[s]), numbers(a), 0) for s, a in layer.alphas.items()
    }


def multiplied(layer, factors=None):
    """kernel -> w * nu in numpy; filters of a separable layer belong to its pointwise kernel, all else does not."""
    factors = nus(layer) if factors is None else factors
    names = kernels(type(layer))
    result = {name: numbers(layer.raw_kernel(name)) for name in names}
    for structure in layer.structures:
        name = names[-1 if structure == "filter" else 0]
        w, nu = result[name], factors[structure]
        result[name] = w.astype(np.result_type(w, nu)) * nu
    return result


def parent(layer, shape):
    """The built plain layer with the same bias, and a function that gives it kernels."""
    plain = PLAIN[type(layer)].from_config(layer.plain_config())
    plain.build((None, *shape))
    if layer.use_bias:
        plain.bias.assign(layer.bias)

    def filled(values):
        for name, value in values.items():
            getattr(plain, name).assign(value)
        return plain

    return filled


def batch(shape, samples=2, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(samples, *shape)).astype("float32").astype(dtype)


def gradients(model, x, y, loss):
    """id of a variable -> its gradient, from one step of plain descent at rate 1; the weights are put back."""
    model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    before = [numbers(v) for v in model.variables]
    model.train_on_batch(x, y)
    found = {id(v): b - numbers(v) for v, b in zip(model.variables, before)}
    for variable, value in zip(model.variables, before):
        variable.assign(value)
    return found


def dot(slope, q):
    """A loss whose gradient with respect to the output is `slope`, the target."""
    return ops.sum(slope * q)


# -- acceptance checks of the method ---------------------------------------------------------------------------------

W, SLOPE = np.array([[0.4, -0.2, 0.3]]), np.array([[0.5, 1.0, -0.2]])


def three_weights(alpha, gradient="chain", **arguments):
    """One structure with three weights, whose output is q."""
    model = keras.Sequential(
        [
            keras.Input((1,)),
            PSPDense(
                3,
                use_bias=False,
                threshold=0.2,
                gradient=gradient,
                alpha_initializer=keras.initializers.Constant(alpha),
                **{"dtype": "float64", **arguments},
            ),
        ]
    )
    [layer] = model.layers
    layer.raw_kernel("kernel").assign(W)
    return model, layer


@pytest.mark.filterwarnings("ignore:.*starts pruned")
@pytest.mark.parametrize("gradient, expected", [("chain", -0.06), ("paper_eq5", 1.3)])
@pytest.mark.parametrize(
    "alpha, q, dw",
    [(0.5, (0.2, -0.1, 0.15), (0.25, 0.5, -0.1)), (0.15, (0, 0, 0), (0, 0, 0)), (-0.5, (-0.2, 0.1, -0.15), None)],
)
def test_values_and_gradients_of_three_weights_are_those_worked_out_on_paper(alpha, q, dw, gradient, expected):
    model, layer = three_weights(alpha, gradient, alpha_regularizer=None)
    one = np.ones((1, 1))
    np.testing.assert_allclose(numbers(model(one)), [q], atol=1e-15)
    found = gradients(model, one, SLOPE, dot)
    np.testing.assert_allclose(found[id(layer.alphas["channel"])], [[expected]], atol=1e-7)
    np.testing.assert_allclose(found[id(layer.raw_kernel("kernel"))], [dw or -0.5 * SLOPE[0]], atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*starts pruned")
def test_momentum_and_coupled_decay_move_alpha_as_equation_6_says():
    model, layer = three_weights(0.15, dtype="float32")
    layer.raw_kernel("kernel").trainable = False  # so that dE/dalpha stays -0.06
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), dot)
    seen = []
    for _ in range(4):
        model.train_on_batch(np.ones((1, 1)), SLOPE)
        seen.append(float(numbers(layer.alphas["channel"])[0, 0]))
    np.testing.assert_allclose(seen[:3], [0.1559985, 0.16739559, 0.18365130], atol=1e-7)
    assert seen == sorted(seen) and seen[2] < 0.2 <= seen[3] and layer.alive()["channel"].all()


@pytest.mark.filterwarnings("ignore:.*starts pruned")
@pytest.mark.parametrize(
    "regularizer, derivative",
    [(decay(1e-2), lambda a: 1e-2 * a), (keras.regularizers.L1(1e-2), lambda a: 1e-2 * np.sign(a)), (None, 0)],
    ids=["decay", "l1", "none"],
)
def test_alpha_follows_the_recursion_of_equations_6_and_7(regularizer, derivative):
    model, layer = three_weights(-0.15, dtype="float32", alpha_regularizer=regularizer)
    layer.raw_kernel("kernel").trainable = False
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), dot)
    alpha, v = -0.15, 0.0
    for _ in range(5):
        model.train_on_batch(np.ones((1, 1)), SLOPE)
        v = 0.9 * v - 0.1 * (-0.06 + (derivative(alpha) if callable(derivative) else derivative))
        alpha += v
        assert float(numbers(layer.alphas["channel"])[0, 0]) == pytest.approx(alpha, abs=1e-7)


@pytest.mark.parametrize("threshold, kept, energy", [(0.1, 0.3173, 0.008013), (0.2, 0.0455, 0.002615)])
def test_how_many_structures_the_papers_initializer_starts_with(threshold, kept, energy):
    layer = PSPDense(1, threshold=threshold, alpha_initializer=keras.initializers.RandomNormal(stddev=0.1, seed=1))
    layer.build((None, 100_000))
    nu = numbers(layer.multiplier("channel"))
    assert layer.alive()["channel"].mean() == pytest.approx(kept, abs=0.005)
    assert (nu != 0).mean() == layer.alive()["channel"].mean()
    assert (nu**2).mean() == pytest.approx(energy, rel=0.05)


def test_alphas_of_a_3x3_convolution_from_16_to_32_have_the_sizes_of_the_paper():
    layer = PSPConv2D(32, 3, structure=tuple(STRUCTURES))
    layer.build((None, 8, 8, 16))
    assert {s: tuple(a.shape) for s, a in layer.alphas.items()} == {
        "column": (3, 3, 16, 1),
        "channel": (1, 1, 16, 1),
        "shape": (3, 3, 1, 1),
        "layer": (1, 1, 1, 1),
        "filter": (1, 1, 1, 32),
    }
    assert layer.count_params() == 3 * 3 * 16 * 32 + 32 + (144 + 16 + 9 + 1 + 32) + 5


@CLASSES
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_alpha_has_the_kernels_rank_and_length_1_where_it_does_not_differ(cls, structure):
    layer = made(cls, structure)
    assert tuple(layer.alphas[structure].shape) == layer.alpha_shape(structure) == LAYERS[cls].alphas[structure]
    assert layer.thresholds[structure].shape == () and not layer.thresholds[structure].trainable
    kernel = layer.raw_kernel(kernels(cls)[-1 if structure == "filter" else 0])
    assert np.broadcast_shapes(layer.alpha_shape(structure), kernel.shape) == tuple(kernel.shape)
    assert len({id(v) for v in layer.weights}) == len(layer.weights) == len(kernels(cls)) + 3


# -- gradients -------------------------------------------------------------------------------------------------------


def differences(function, value, entries, step=1e-4):
    """Central differences of function(array) at some flat positions of an array."""
    found = []
    for entry in entries:
        ends = []
        for sign in (1, -1):
            moved = value.copy()
            moved.flat[entry] += sign * step
            ends.append(function(moved))
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


@CLASSES
@pytest.mark.parametrize(
    "structure, gradient",
    [*((s, "chain") for s in (*STRUCTURES, *TUPLES)), *((s, "paper_eq5") for s in TUPLES)],
    ids=str,
)
def test_gradients_are_finite_differences_of_a_loss_of_the_plain_layer_with_kernel_w_nu(cls, structure, gradient):
    """With respect to nu, also where it is pruned (straight-through), or to all of q in a structure; and to w."""
    if not has_float64():
        pytest.skip(NO_FLOAT64)
    shape = LAYERS[cls].shape
    layer = made(cls, structure, gradient=gradient, dtype="float64", activation="tanh", alpha_regularizer=None)
    model, x = keras.Sequential([keras.Input(shape, dtype="float64"), layer]), batch(shape, dtype="float64")
    y = batch(model.output_shape[1:], seed=1, dtype="float64")
    found = gradients(model, x, y, keras.losses.MeanSquaredError(dtype="float64"))
    filled, raw = parent(layer, shape), {name: numbers(layer.raw_kernel(name)) for name in kernels(cls)}
    rng = np.random.default_rng(2)

    def loss(values):
        return float(np.mean((numbers(filled(values)(x)) - y) ** 2))

    for s, alpha in layer.alphas.items():
        name, nu = kernels(cls)[-1 if s == "filter" else 0], nus(layer)
        dead = np.flatnonzero(~layer.alive()[s])
        entries = [*rng.permutation(np.flatnonzero(layer.alive()[s]))[:2], *dead[:1]]
        by_chain = differences(lambda v, s=s, nu=nu: loss(multiplied(layer, {**nu, s: v})), nu[s], entries)
        q = multiplied(layer)
        by_sum = differences(lambda v, q=q, name=name: loss({**q, name: q[name] + v}), np.zeros(alpha.shape), entries)
        expected, other = (by_chain, by_sum) if gradient == "chain" else (by_sum, by_chain)
        got = found[id(alpha)].flat[entries]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
        assert np.abs(got - other).max() > 1e-3 * np.abs(other).max()  # the two readings can be told apart
        if len(dead) and len(layer.structures) == 1:
            assert (got[-1] != 0) and (numbers(alpha).flat[dead] != 0).all()
    for name, w in raw.items():
        entries = rng.permutation(w.size)[:4]
        factor = multiplied(layer, nus(layer))[name].flat[entries] / w.flat[entries]
        expected = differences(lambda v, name=name: loss(multiplied_with(layer, name, v)), w, entries)
        got = found[id(layer.raw_kernel(name))].flat[entries]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
        assert (got[factor == 0] == 0).all()


def multiplied_with(layer, name, w):
    """`multiplied` with another w in the place of one kernel."""
    ones = multiplied(layer)
    own = [s for s in layer.structures if kernels(type(layer))[-1 if s == "filter" else 0] == name]
    value = w
    for s in own:
        value = value * nus(layer)[s]
    return {**ones, name: value}


class HardDense(PSPDense):
    """What straight-through avoids: the true derivative of the threshold, 0 for a pruned structure."""

    def multiplier(self, structure):
        alpha = ops.convert_to_tensor(self.alphas[structure])
        return ops.where(ops.abs(alpha) < self.thresholds[structure], ops.zeros_like(alpha), alpha)


@pytest.mark.parametrize(
    "cls, needed, gradient, back",
    [
        (PSPDense, True, "chain", True),
        (PSPDense, True, "paper_eq5", True),
        (PSPDense, False, "chain", False),
        (HardDense, True, "chain", False),
    ],
)
def test_a_pruned_structure_comes_back_if_the_target_needs_it_and_only_then(cls, needed, gradient, back):
    layer = cls(1, use_bias=False, threshold=0.1, gradient=gradient)
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.raw_kernel("kernel").assign(np.full((4, 1), 0.5))
    layer.alphas["channel"].assign(np.array([[1], [1], [0.05], [1]]))
    x = np.linalg.qr(batch((4,), 64))[0] * 8  # orthogonal columns: what the others do says nothing about the third
    y = x @ np.array([[0.5], [-0.4], [0.6 if needed else 0.0], [0.3]])
    model.compile(keras.optimizers.SGD(0.02), "mse")
    before = model.evaluate(x, y, verbose=0)
    for _ in range(60):
        model.train_on_batch(x, y)
    assert layer.alive()["channel"].ravel().tolist() == [True, True, back, True]
    assert model.evaluate(x, y, verbose=0) < before / 2
    if not back and cls is PSPDense:
        assert abs(numbers(layer.alphas["channel"])[2, 0]) < 0.05  # it decays
    assert (numbers(layer.raw_kernel("kernel"))[2, 0] == 0.5) == (not back)  # the weights of the pruned rest


# -- the threshold ---------------------------------------------------------------------------------------------------


def test_threshold_0_prunes_nothing_and_a_larger_one_what_is_below_it():
    layer = PSPDense(2, threshold=0)
    layer.build((None, 5))
    layer.alphas["channel"].assign(np.array([[0.0], [1e-30], [-1e-3], [0.5], [-2.0]]))
    assert layer.alive()["channel"].all()
    assert np.array_equal(numbers(layer.multiplier("channel")), numbers(layer.alphas["channel"]))
    layer.thresholds["channel"].assign(0.1)
    assert layer.alive()["channel"].ravel().tolist() == [False, False, False, True, True]
    assert numbers(layer.multiplier("channel")).ravel().tolist() == [0, 0, 0, 0.5, -2.0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16", "float16"])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.7])
def test_an_alpha_at_the_threshold_stays_and_the_next_smaller_number_goes(threshold, dtype):
    layer = PSPDense(2, threshold=threshold, dtype=dtype, alpha_initializer=keras.initializers.Constant(threshold))
    layer.build((None, 3))
    alpha = numbers(layer.alphas["channel"]).copy()
    alpha[1], alpha[2] = -alpha[1], np.nextafter(alpha[2], 0)
    layer.alphas["channel"].assign(alpha)
    assert layer.alive()["channel"].ravel().tolist() == [True, True, False]
    assert (numbers(layer.multiplier("channel")) != 0).ravel().tolist() == [True, True, False]


@CLASSES
def test_a_negative_alpha_flips_the_sign(cls):
    layer = made(cls, "layer", use_bias=False)
    x, outputs = batch(LAYERS[cls].shape), []
    for alpha in (0.7, -0.7):
        layer.alphas["layer"].assign(np.full(layer.alpha_shape("layer"), alpha))
        outputs.append(numbers(layer(x)))
    assert np.array_equal(outputs[0], -outputs[1]) and np.abs(outputs[0]).max() > 0


def test_a_shared_threshold_moves_all_layers_also_inside_compiled_functions():
    shared = keras.Variable(0.0, trainable=False, name="epsilon")
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            PSPConv2D(4, 3, threshold=shared, structure=("channel", "filter")),
            PSPDense(2, threshold=shared),
        ]
    )
    for layer in model.layers:
        for structure in layer.structures:
            layer.alphas[structure].assign(np.full(layer.alpha_shape(structure), 0.5))
        assert all(t is shared for t in layer.thresholds.values())
    assert sum(v is shared for v in model.variables) == 1 and all(v is not shared for v in model.trainable_variables)
    x, y = batch((6, 6, 3), 4), batch((4, 4, 2), 4)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    before, loss = model.predict(x, verbose=0), model.train_on_batch(x, y)
    shared.assign(0.6)
    assert np.abs(before).max() > 0 and not model.predict(x, verbose=0).any()
    assert model.train_on_batch(x, y) != pytest.approx(loss, rel=1e-3)
    shared.assign(0.5)
    assert np.array_equal(model.predict(x, verbose=0), before)


def test_a_callback_moves_a_shared_threshold_during_fit():
    shared = keras.Variable(0.0, trainable=False)
    model = keras.Sequential([keras.Input((3,)), PSPDense(2, threshold=shared), PSPDense(1, threshold=shared)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    move = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: shared.assign(2.0 * (epoch == 1)))
    x = batch((3,), 4)
    losses = model.fit(x, x[:, :1] + 1, epochs=3, verbose=0, callbacks=[move]).history["loss"]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6) and losses[1] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_a_shared_threshold_may_be_of_any_dtype_and_is_not_rounded_to_the_compute_dtype(policy, dtype):
    shared = keras.Variable(1, trainable=False, dtype=dtype)
    layer = PSPDense(1, threshold=shared, use_bias=False, dtype=policy)
    layer.build((None, 2))
    layer.raw_kernel("kernel").assign(np.ones((2, 1)))
    layer.alphas["channel"].assign(np.array([[1.0], [0.99999]]))  # the second is 1 in half precision
    assert float(numbers(ops.cast(layer(np.ones((1, 2), "float32")), "float32"))[0, 0]) == 1
    if dtype != "int32":
        shared.assign(0.9999)  # 1 in half precision, which would prune both
        layer.alphas["channel"].assign(np.array([[0.99995], [0.9998]]))
        assert layer.alive()["channel"].ravel().tolist() == [True, False]
        output = numbers(ops.cast(layer(np.ones((1, 2), "float32")), "float32"))
        assert float(output[0, 0]) == pytest.approx(1, abs=1e-4)


# -- the parent ------------------------------------------------------------------------------------------------------

VARIANTS = [
    (PSPDense, {"units": 5, "activation": "gelu"}, (3, 4)),
    (PSPDense, {"units": 1, "use_bias": False}, (1,)),
    (PSPConv1D, {"filters": 6, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}, (7, 4)),
    (PSPConv1D, {"filters": 6, "kernel_size": 4, "strides": 3, "padding": "same"}, (7, 4)),
    (PSPConv1D, {"filters": 6, "kernel_size": 3, "data_format": "channels_first"}, (4, 7)),
    (PSPConv1D, {"filters": 6, "kernel_size": 3, "groups": 2}, (7, 4)),
    (PSPConv2D, {"filters": 6, "kernel_size": 3, "strides": (2, 1), "padding": "same", "use_bias": False}, (6, 5, 4)),
    (PSPConv2D, {"filters": 6, "kernel_size": 2, "dilation_rate": (1, 2), "activation": "relu"}, (6, 5, 4)),
    (PSPConv2D, {"filters": 6, "kernel_size": 3, "groups": 2, "padding": "same"}, (6, 5, 4)),
    (PSPConv2D, {"filters": 8, "kernel_size": 3, "groups": 4}, (6, 5, 4)),
    (PSPConv2D, {"filters": 6, "kernel_size": 3, "data_format": "channels_first"}, (4, 6, 5)),
    (PSPConv2D, {"filters": 1, "kernel_size": 1}, (6, 5, 1)),
    (PSPConv3D, {"filters": 5, "kernel_size": 2, "strides": (1, 2, 1), "padding": "same"}, (3, 4, 3, 4)),
    (PSPConv3D, {"filters": 5, "kernel_size": 2, "data_format": "channels_first"}, (4, 3, 4, 3)),
    (PSPConv2DTranspose, {"filters": 5, "kernel_size": 3, "strides": 2, "output_padding": 1}, (3, 4, 4)),
    (PSPConv2DTranspose, {"filters": 5, "kernel_size": 3, "padding": "same", "activation": "elu"}, (3, 4, 4)),
    (PSPConv2DTranspose, {"filters": 5, "kernel_size": 3, "data_format": "channels_first"}, (4, 3, 4)),
    (PSPConv2DTranspose, {"filters": 5, "kernel_size": 2, "dilation_rate": 2, "use_bias": False}, (3, 4, 4)),
    (PSPDepthwiseConv2D, {"kernel_size": 3, "strides": 2, "padding": "same"}, (5, 6, 4)),
    (PSPDepthwiseConv2D, {"kernel_size": 2, "dilation_rate": 2, "depth_multiplier": 3, "use_bias": False}, (5, 6, 4)),
    (PSPDepthwiseConv2D, {"kernel_size": 3, "data_format": "channels_first", "activation": "tanh"}, (4, 5, 6)),
    (PSPSeparableConv2D, {"filters": 5, "kernel_size": 3, "strides": 2, "padding": "same"}, (5, 6, 4)),
    (PSPSeparableConv2D, {"filters": 5, "kernel_size": 2, "dilation_rate": 2, "depth_multiplier": 3}, (5, 6, 4)),
    (PSPSeparableConv2D, {"filters": 5, "kernel_size": 3, "data_format": "channels_first"}, (4, 5, 6)),
]


@pytest.mark.parametrize("cls, arguments, shape", VARIANTS, ids=str)
def test_a_layer_is_bit_for_bit_its_parent_with_kernel_w_nu_whatever_the_parents_arguments(cls, arguments, shape):
    x = batch(shape)
    for structure in TUPLES:
        layer = made(cls, structure, shape=shape, **arguments)
        filled, raw = parent(layer, shape), {name: numbers(layer.raw_kernel(name)) for name in kernels(cls)}
        got, without = numbers(layer(x)), numbers(filled(raw)(x))
        assert np.array_equal(got, numbers(filled(multiplied(layer))(x)))
        assert not np.array_equal(got, without)
        assert tuple(layer.compute_output_shape(x.shape)) == got.shape
        for alpha in layer.alphas.values():
            alpha.assign(np.ones(alpha.shape))
        assert np.array_equal(numbers(layer(x)), without)


@CLASSES
def test_every_argument_of_the_parent_is_taken_over(cls):
    """All of them but LoRA's, at values that are not the defaults."""
    special = {
        "strides": 2,
        "padding": "same",
        "data_format": "channels_first",
        "output_padding": 1,
        "groups": 2,
        "activation": "relu",
        "use_bias": False,
        "name": "mine",
        "trainable": False,
        "dtype": "float64",
        "units": 6,
        "filters": 6,
        "kernel_size": 3,
        "depth_multiplier": 2,
    }
    names = set(inspect.signature(PLAIN[cls]).parameters) - {"kwargs", "dilation_rate"}
    names = {n for n in names if not n.startswith("lora") and n != "quantization_config"} | {"name", "dtype"}
    arguments = {}
    for name in names:
        kinds = {"initializer": "ones", "regularizer": "l1", "constraint": "non_neg"}
        arguments[name] = special[name] if name in special else kinds[name.split("_")[-1]]
    ours, plain = cls(**arguments), PLAIN[cls](**arguments)
    assert ours.plain_config() == plain.get_config()
    assert cls.from_config(plain.get_config()).plain_config() == plain.get_config()
    if cls in (PSPConv2DTranspose, PSPDepthwiseConv2D, PSPSeparableConv2D, PSPDense):
        for layer in (ours, plain):
            layer.build((None, 4, 6, 6))
        for name in kernels(cls):
            assert np.array_equal(numbers(ours.raw_kernel(name)), np.ones(getattr(plain, name).shape))
            assert ours.raw_kernel(name).constraint is not None and ours.raw_kernel(name).regularizer is not None


def test_a_kernel_is_not_there_before_the_layer_is_built():
    with pytest.raises(AttributeError):
        _ = PSPConv2D(4, 3).kernel
    with pytest.raises(AttributeError):
        _ = PSPSeparableConv2D(4, 3).depthwise_kernel


# -- precision -------------------------------------------------------------------------------------------------------


@CLASSES
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64", "float32"])
def test_kernels_are_multiplied_as_stored_and_then_cast(cls, policy):
    if policy == "float64" and not has_float64():
        pytest.skip(NO_FLOAT64)
    shape = LAYERS[cls].shape
    layer = made(cls, ("column", "filter"), dtype=policy, gradient="paper_eq5")
    half = policy == "float16"
    q = multiplied(layer)
    assert {str(a.dtype) for a in layer.alphas.values()} == {"float64" if policy == "float64" else "float32"}
    assert {v.dtype for v in q.values()} == {np.dtype("float64" if policy == "float64" else "float32")}
    for name in kernels(cls):
        got = getattr(layer, name)
        assert np.array_equal(numbers(got), numbers(ops.cast(q[name], layer.compute_dtype)))
        assert keras.backend.standardize_dtype(got.dtype) == layer.compute_dtype
    # Inside the call, where Keras casts variables on its own account:
    x = batch(shape)
    plain = parent(layer, shape)(q)
    got = numbers(ops.cast(layer(x), "float64"))
    assert np.array_equal(got, numbers(ops.cast(plain(x), "float64"))) and np.isfinite(got).all()
    if "16" in policy and not half and len(kernels(cls)) == 1:  # cast first and then multiplied is something else
        product = ops.cast(layer.raw_kernel("kernel"), layer.compute_dtype)
        for nu in nus(layer).values():
            product = product * ops.cast(nu, layer.compute_dtype)
        assert not np.array_equal(numbers(product), numbers(layer.kernel))


@pytest.mark.parametrize("policy, gradient", [("mixed_float16", "chain"), ("float32", "paper_eq5")])
def test_compiled_by_xla_a_model_gives_the_same_outputs_and_trains(policy, gradient):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            PSPConv2D(8, 3, strides=2, structure=("channel", "filter"), gradient=gradient, dtype=policy),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            PSPDense(4, dtype="float32"),
        ]
    )
    model.layers[0].alphas["filter"].assign(np.linspace(-0.9, 1.0, 8).reshape(1, 1, 1, 8))
    x, y = patterns(64)
    expected = numbers(model(x))
    rate = 0.05 if gradient == "chain" else 0.005
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, jit_compile=True)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5 if policy == "float32" else 2e-2)
    before = [numbers(a) for layer in (model.layers[0], model.layers[3]) for a in layer.alphas.values()]
    losses = model.fit(x, y, batch_size=32, epochs=8, verbose=0).history["loss"]
    after = [numbers(a) for layer in (model.layers[0], model.layers[3]) for a in layer.alphas.values()]
    assert losses[-1] < losses[0] and all((a != b).any() for a, b in zip(before, after))


# -- saving ----------------------------------------------------------------------------------------------------------


def all_classes():
    """A model with a layer of each class: random weights, alphas of both kinds, thresholds that were moved."""
    keras.utils.set_random_seed(0)
    inputs, outputs = [], []
    for number, cls in enumerate(LAYERS):
        layer = made(cls, TUPLES[number % 3], seed=number, gradient=("chain", "paper_eq5")[number % 2])
        for step, threshold in enumerate(layer.thresholds.values()):
            threshold.assign(0.15 + 0.1 * step)
        inputs.append(keras.Input(LAYERS[cls].shape))
        outputs.append(layer(inputs[-1]))
    return keras.Model(inputs, outputs), [batch(s.shape) for s in LAYERS.values()]


def equal(model, other, x):
    return all(np.array_equal(numbers(a), numbers(b)) for a, b in zip(model(x), other(x)))


def test_a_saved_model_loads_bit_for_bit_without_custom_objects_where_the_layers_were_imported(tmp_path):
    model, x = all_classes()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert equal(model, loaded, x)
    assert [layer.get_config() for layer in loaded.layers] == [layer.get_config() for layer in model.layers]
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights()))
    code = (
        "import keras, sys\n"
        f"path = {str(tmp_path / 'model.keras')!r}\n"
        "try: keras.saving.load_model(path)\n"
        "except Exception: pass\n"
        "else: sys.exit('it loaded without the layers')\n"
        "import keras_prune.layers\n"
        "assert len(keras.saving.load_model(path).layers) == 14"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_weights_alone_go_from_one_model_into_another(tmp_path):
    model, x = all_classes()
    model.save_weights(tmp_path / "only.weights.h5")
    other = keras.models.clone_model(model)
    assert not equal(model, other, x)
    other.load_weights(tmp_path / "only.weights.h5")
    assert equal(model, other, x)


def test_a_clone_has_the_thresholds_of_the_moment_and_alphas_of_its_own():
    model, _ = all_classes()
    clone = keras.models.clone_model(model)
    for old, new in zip(model.layers, clone.layers):
        if isinstance(old, tuple(LAYERS)):
            assert new.get_config() == old.get_config() and new.gradient == old.gradient
            for s in old.structures:
                assert np.array_equal(numbers(old.thresholds[s]), numbers(new.thresholds[s]))
                assert (numbers(new.alphas[s]) == 1).all() and new.alphas[s] is not old.alphas[s]


@CLASSES
def test_a_config_gives_the_same_layer_built_or_not(cls):
    regularizer, initializer = keras.regularizers.L1(0.3), keras.initializers.RandomUniform(0.5, 1, seed=3)
    for threshold in (0.25, {"layer": 0.0, "channel": 0.25}):
        layer = cls(
            **LAYERS[cls].arguments,
            structure=["layer", "channel"],
            threshold=threshold,
            alpha_regularizer=regularizer,
            alpha_initializer=initializer,
            gradient="paper_eq5",
        )
        again = cls.from_config(layer.get_config())
        assert again.get_config() == layer.get_config() and layer.get_config()["threshold"] == threshold
        for x in (layer, again):
            x.build((None, *LAYERS[cls].shape))
        assert again.get_config() == layer.get_config() and layer.get_config()["threshold"] == threshold
        assert all(np.array_equal(numbers(a), numbers(again.alphas[s])) for s, a in layer.alphas.items())
        assert float(again.alpha_regularizer.l1) == pytest.approx(0.3) and again.structures == ("layer", "channel")


@pytest.mark.parametrize("structure", [("column", "channel"), ("channel", "column", "filter")], ids=str)
@pytest.mark.parametrize("shared", [("channel",), ("column", "channel")], ids=str)
def test_variables_given_as_thresholds_come_back_in_their_places_as_the_variables_of_the_loaded_layer(
    tmp_path, structure, shared
):
    variable = keras.Variable(0.3, trainable=False)
    thresholds = {s: variable if s in shared else 0.1 for s in structure}
    model = keras.Sequential([keras.Input((5, 5, 3)), PSPConv2D(4, 3, structure=structure, threshold=thresholds)])
    variable.assign(0.7)
    model.save(tmp_path / "model.keras")
    for new in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras.models.clone_model(model),
        cut(Channels(model), ()),
    ):
        [layer] = new.layers
        for s, threshold in layer.thresholds.items():
            assert float(numbers(threshold)) == pytest.approx(0.7 if s in shared else 0.1) and threshold is not variable
        assert len({id(layer.thresholds[s]) for s in shared}) == 1  # what moved together still does


def test_a_frozen_layer_is_saved_whole(tmp_path):
    model = keras.Sequential([keras.Input((5, 5, 3)), made(PSPConv2D, shape=(5, 5, 3), filters=4, kernel_size=3)])
    model.layers[0].trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.trainable_weights and len(loaded.weights) == 4
    assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights()))


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kernel", "", (), [], ("channel", "channel"), ("channel", "rows"), 3, None])
def test_structures_that_are_none_are_refused_by_naming_the_known(structure):
    with pytest.raises(ValueError, match="column, channel, shape, layer, filter"):
        PSPConv2D(4, 3, structure=structure)


@pytest.mark.parametrize(
    "threshold",
    [-0.1, math.nan, math.inf, True, False, "0.1", None, [0.1], 1j, {}, {"layer": 0.1}, {"channel": -1}]
    + [{"channel": 0.1, "layer": 0.1}, {"channel": "channel"}, {"channel": "layer"}],
    ids=str,
)
def test_thresholds_that_are_none_are_refused_by_saying_what_is_expected(threshold):
    with pytest.raises(ValueError, match="threshold=.* was passed.*expected"):
        PSPConv2D(4, 3, structure="channel", threshold=threshold)


def test_a_threshold_variable_has_to_be_a_scalar_that_is_not_trained():
    for variable in (keras.Variable(0.1), keras.Variable(np.full(3, 0.1), trainable=False)):
        with pytest.raises(ValueError, match="scalar keras.Variable.*trainable=False"):
            PSPConv2D(4, 3, threshold=variable)
    PSPConv2D(4, 3, threshold=keras.Variable(0.1, trainable=False))


def test_an_unknown_gradient_is_refused_by_naming_the_known():
    with pytest.raises(ValueError, match="'straight'.*'chain', 'paper_eq5'"):
        PSPDense(4, gradient="straight")


def test_lora_and_quantization_are_refused_by_pointing_to_strip():
    layer = made(PSPDense)
    for call in (
        lambda: layer.enable_lora(2),
        lambda: layer.quantize("int8"),
        lambda: made(PSPConv2D).enable_lora(2),
        lambda: PSPDense(4, lora_rank=2),
        lambda: PSPConv2D(4, 3, lora_rank=2),
        lambda: PSPDense(4, dtype="int8_from_float32"),
    ):
        with pytest.raises(NotImplementedError, match="keras_prune.strip"):
            call()
    model = keras.Sequential([keras.Input((4,)), layer])
    with pytest.warns(UserWarning, match="keras_prune.strip"):  # Keras goes on where a layer refuses
        model.quantize("int8")
    assert layer.quantization_mode is None and np.isfinite(numbers(model(batch((4,))))).all()


def test_a_layer_that_starts_dead_warns_but_not_when_it_is_loaded_or_copied(tmp_path):
    def dead(**arguments):
        layer = PSPConv2D(4, 3, alpha_initializer=keras.initializers.Constant(0.15), **arguments)
        return keras.Sequential([keras.Input((5, 5, 3)), layer])

    with pytest.warns(UserWarning, match="every layer starts pruned.*alpha_initializer='ones'"):
        model = dead(structure=("layer", "channel"), threshold={"layer": 0.2, "channel": 0.15})
    with pytest.warns(UserWarning, match="every layer and every channel starts pruned"):
        dead(structure=("layer", "channel"), threshold=keras.Variable(0.2, trainable=False))
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dead(threshold=0.15)
        made(PSPConv2D)
        keras.saving.load_model(tmp_path / "model.keras")
        keras.models.clone_model(model)
        cut(Channels(model), ())


# -- regularization --------------------------------------------------------------------------------------------------


@CLASSES
def test_the_default_decay_is_half_its_rate_times_the_squares_of_all_alphas(cls):
    layer = made(cls, ("column", "filter"))
    model = keras.Sequential([keras.Input(LAYERS[cls].shape), layer])
    squares = sum(float((numbers(a).astype(float) ** 2).sum()) for a in layer.alphas.values())
    assert sum(float(numbers(loss)) for loss in model.losses) == pytest.approx(0.5e-4 * squares, rel=1e-5)
    assert len(model.losses) == 2 and decay().l2 == pytest.approx(0.5e-4) and decay(0.02).l2 == pytest.approx(0.01)
    free = made(cls, ("column", "filter"), alpha_regularizer=None)
    assert keras.Sequential([keras.Input(LAYERS[cls].shape), free]).losses == []


# -- pruning units of networks with these layers -----------------------------------------------------------------------


def chain(cls, structures=(*STRUCTURES, TUPLES[-1]), seed=0, width=4, data_format="channels_last", **extra):
    """plain layer, PSP layer, plain layer, PSP layer, ... one for each structure."""
    keras.utils.set_random_seed(seed)
    rank = len(LAYERS[cls].shape) - 1
    plain = (None, layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank] if rank else None
    first = data_format == "channels_first"
    spatial = (8, 7, 6)[:rank]
    inputs = x = keras.Input((3, *spatial) if first else (*spatial, 3))
    formatted = {"data_format": data_format} if rank else {}
    strided = {"strides": 1} if "strides" in LAYERS[cls].arguments else {}
    same = {"padding": "same"} if rank else {}
    for structure in structures:
        x = plain(width, 1, activation="relu", **formatted)(x) if rank else layers.Dense(width, activation="relu")(x)
        layer = cls(structure=structure, **{**LAYERS[cls].arguments, **strided, **formatted, **same, **extra})
        x = layers.ReLU()(layer(x))
    x = layers.Dense(3)(layers.Flatten()(x) if rank else x)
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, cls):
            layer.bias.assign(rng.normal(0.2, 0.3, layer.bias.shape))
            for alpha in layer.alphas.values():
                value = rng.choice([-1, 1], alpha.shape) * rng.uniform(0.5, 1.5, alpha.shape)
                if value.size > 5:
                    value.flat[0] = 0.01  # pruned by itself
                alpha.assign(value)
    return model, batch(inputs.shape[1:], 3)


def some(channels, fraction=0.5, seed=0):
    """Half of each group, and as many others."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(g.units) for g in channels.groups]
    halves = [(o[: len(o) // 2], o[len(o) // 2 : 2 * (len(o) // 2)]) for o in orders]
    return (np.concatenate(part) for part in zip(*halves))


def check_cut(model, x, groups):
    channels = Channels(model)
    assert channels.fences == [] and sorted(len(g) for g in channels.groups) == sorted(groups)
    removed, others = some(channels)
    expected, small = zeroed(channels, removed), cut(channels, removed)
    assert relative_difference(expected, small, x) < 1e-5
    assert relative_difference(expected, cut(channels, others), x) > 1e-3  # the test can fail
    assert set(removed) <= set(dead_units(Channels(expected), strict=True).tolist())
    return small


@CLASSES
def test_cutting_half_of_all_units_equals_zeroing_them_for_every_structure(cls):
    model, x = chain(cls)
    free = cls is PSPDepthwiseConv2D  # its outputs are its inputs
    small = check_cut(model, x, [4] * 6 if free else [4] * 6 + [6] * 6)
    for layer in small.layers:
        if isinstance(layer, cls):
            whole = model.get_layer(layer.name)
            for s, alpha in layer.alphas.items():
                axes = {"column": "i", "channel": "i", "filter": "o"}.get(s, "")
                before, after = math.prod(whole.alphas[s].shape), math.prod(alpha.shape)
                assert after == (before // 2 if axes else before)
                assert float(numbers(layer.thresholds[s])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "cls, extra, groups",
    [
        (PSPConv2D, {"filters": 8, "groups": 4}, [4] * 2),  # small groups leave whole
        (PSPConv2D, {"filters": 6, "groups": 2, "width": 8}, [4] * 2 + [3] * 2),  # of large ones the j-th channels
        (PSPConv2D, {"data_format": "channels_first"}, [4] * 2 + [6] * 2),
        (PSPSeparableConv2D, {"data_format": "channels_first"}, [4] * 2 + [6] * 2),
        (PSPDepthwiseConv2D, {"depth_multiplier": 3}, [4] * 2),
    ],
    ids=str,
)
def test_cutting_equals_zeroing_for_grouped_convolutions_and_other_formats(cls, extra, groups):
    model, x = chain(cls, ("channel", ("column", "filter")), **extra)
    check_cut(model, x, groups)


def test_outputs_of_a_depthwise_layer_on_the_input_are_cut_with_their_alphas():
    inputs = keras.Input((6, 6, 3))
    layer = PSPDepthwiseConv2D(3, depth_multiplier=4, structure=("channel", "filter"))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.ReLU()(layer(inputs)))))
    layer.alphas["filter"].assign(np.random.default_rng(0).uniform(0.5, 1.5, (1, 1, 3, 4)))
    small = check_cut(model, batch((6, 6, 3)), [4])
    alphas = small.get_layer(layer.name).alphas
    assert alphas["filter"].shape == (1, 1, 3, 2) and alphas["channel"].shape == (1, 1, 3, 1)


def test_a_pruner_keeps_its_zeros_on_kernels_and_alphas():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            PSPConv2D(16, 3, strides=2, structure=("channel", "filter")),
            layers.BatchNormalization(),
            layers.ReLU(),
            PSPSeparableConv2D(16, 3, structure=("channel", "filter")),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    x, y = patterns(64)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[FilterPruning(0.5, round_to=4)])
    channels = Channels(model)
    dead = dead_units(channels, strict=True)
    assert len(dead) >= 8
    model.fit(x, y, epochs=1, verbose=0)
    assert np.array_equal(dead_units(Channels(model), strict=True), dead)
    first, second = model.layers[0], model.layers[3]
    gone = numbers(first.alphas["filter"]).ravel() == 0
    assert gone.any() and np.array_equal(numbers(second.alphas["channel"]).ravel() == 0, gone)
    assert not numbers(first.raw_kernel("kernel"))[..., gone].any()
    small = cut(channels, dead)
    assert relative_difference(model, small, x[:8]) < 1e-5 and small.count_params() < model.count_params()
