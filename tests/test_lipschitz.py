"""Bounds on outputs: operators written out as matrices, the zoo, and what has no bound."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import BUILDERS, example, randomize

from keras_prune import theory
from keras_prune.lipschitz import gains, output_bound
from keras_prune.operators import lipschitz_constants
from keras_prune.program import Program


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(x)).astype(np.float64)


def observed(before, after, x):
    """Largest ||after(x) - before(x)|| of a sample, over all outputs together."""
    made = [[array(y) for y in keras.tree.flatten(model(x, training=False))] for model in (before, after)]
    squares = [((a - b) ** 2).reshape(len(a), -1).sum(1) for a, b in zip(*made)]
    return float(np.sqrt(sum(squares)).max())


def same(build, seed=0):
    """The same network with the same weights twice."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(seed)
        models.append(randomize(build()))
    return models


def disturb(model, rng, size=0.1):
    """Zeros in some outputs of kernels, small changes of others, of biases and of normalisations."""
    for v in model.weights:
        name, w = v.path.split("/")[-1], array(v)
        if "kernel" in name and rng.random() < 0.6:
            v.assign(w * (rng.random(w.shape[-1]) < 0.7) if rng.random() < 0.5 else w + size * rng.normal(size=w.shape))
        elif name in ("bias", "beta", "gamma", "moving_mean") and rng.random() < 0.3:
            v.assign(w + size * rng.normal(size=w.shape))
        elif name == "moving_variance" and rng.random() < 0.3:
            v.assign(w * (1 + size))
    return model


def sphere(rng, samples, *shape):
    x = rng.normal(size=(samples, *shape))
    return (x / np.linalg.norm(x.reshape(samples, -1), axis=1).reshape(-1, *[1] * len(shape))).astype("float32")


# -- a network of three matrices ---------------------------------------------------------------------------------


def mlp(activation="relu", use_bias=False):
    widths = [(64, activation), (64, activation), (5, None)]
    return keras.Sequential([keras.Input((20,)), *(layers.Dense(n, a, use_bias=use_bias) for n, a in widths)])


def without_smallest(model, fraction):
    for layer in model.layers:
        w = array(layer.kernel)
        layer.kernel.assign(np.where(np.abs(w) <= np.quantile(np.abs(w), fraction), 0, w))


def test_the_bound_of_three_matrices_is_the_product_of_norms_and_holds_for_ten_thousand_inputs():
    before, after = same(mlp)
    without_smallest(after, 0.5)
    bound = output_bound(before, after, input_norm=1)
    w, v = ([array(layer.kernel) for layer in model.layers] for model in (before, after))
    norm = theory.spectral_norm
    expected = (
        norm(v[2]) * norm(v[1]) * norm(v[0] - w[0])
        + norm(v[2]) * norm(v[1] - w[1]) * norm(w[0])
        + norm(v[2] - w[2]) * norm(w[1]) * norm(w[0])
    )
    assert bound.total == pytest.approx(expected, rel=1e-6)
    x = sphere(np.random.default_rng(0), 10_000, 20)
    seen = observed(before, after, x)
    assert seen <= bound.total < 100 * seen  # about 20 times looser than what is seen
    measured = output_bound(before, after, x)
    assert seen <= measured.total < bound.total and measured.samples == 10_000 and bound.samples is None
    assert [layer.layer for layer in bound.layers] == [layer.name for layer in before.layers]
    assert bound.total == sum(layer.error for layer in bound.layers) and bound.unbounded == ()


def test_nothing_removed_is_a_bound_of_zero():
    before, after = same(mlp)
    without_smallest(after, 0)
    after.set_weights(before.get_weights())
    bound = output_bound(before, after, input_norm=1)
    assert bound.total == 0 and bound.layers == () and bound.unbounded == ()


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "tanh"])
def test_bounds_without_data_count_what_is_made_of_zeros(activation):
    before, after = same(lambda: mlp(activation, use_bias=True))
    without_smallest(after, 0.3)
    after.layers[1].bias.assign(array(after.layers[1].bias) + 0.2)
    x = 3 * sphere(np.random.default_rng(0), 500, 20)
    free, measured = output_bound(before, after, input_norm=3), output_bound(before, after, x)
    assert observed(before, after, x) <= measured.total <= free.total < math.inf
    assert free.layers[1].shift == pytest.approx(0.2 * math.sqrt(64), rel=1e-5) and free.input_norm == 3
    hidden = keras.Model(before.inputs[0], before.layers[0].output)(x)
    assert measured.layers[1].reads == pytest.approx(np.linalg.norm(array(hidden), axis=1).max(), rel=1e-5)


# -- layers as matrices ------------------------------------------------------------------------------------------


def matrix_of(function, shape, x=None, h=1.0):
    """The Jacobian of a function of one sample, column by column; exact for what is linear."""
    x = np.zeros(shape) if x is None else x
    moved = x[None] + h * np.eye(x.size).reshape(-1, *shape)
    made = array(function(np.concatenate([x[None], moved]).astype("float32")))
    return ((made[1:] - made[:1]) / h).reshape(x.size, -1).T


def kernels():
    for padding, stride, taps in itertools.product(("valid", "same"), (1, 2, 3), (1, 2, 3)):
        yield layers.Conv2D(3, taps, stride, padding), (6, 5, 2)
        yield layers.DepthwiseConv2D(taps, stride, padding, depth_multiplier=2), (6, 5, 3)
        yield layers.Conv2DTranspose(3, taps, stride, padding), (3, 4, 2)
        yield layers.Conv1D(4, taps, stride, padding, groups=2), (8, 4)
        yield layers.SeparableConv2D(4, taps, stride, padding, depth_multiplier=2), (6, 5, 2)
    yield layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (9, 2)
    yield layers.Conv2D(3, 3, dilation_rate=(1, 2), padding="same"), (6, 5, 2)
    yield layers.Conv3D(2, 2, strides=(1, 2, 1), padding="same"), (3, 4, 2, 2)
    yield layers.Conv3DTranspose(2, 2, strides=2), (2, 2, 2, 2)
    yield layers.Conv1DTranspose(2, 3, strides=2, output_padding=1), (4, 3)
    yield layers.DepthwiseConv1D(3, padding="same"), (7, 3)
    yield layers.SeparableConv1D(5, 3), (7, 3)
    yield layers.Dense(4), (3, 5)
    yield layers.EinsumDense("abc,cde->abde", (5, 3, 2)), (5, 4)
    yield layers.EinsumDense("abc,bcd->abd", (5, 3)), (5, 4)
    yield layers.EinsumDense("...x,xy->...y", 6), (5, 4)
    yield layers.TimeDistributed(layers.Conv1D(3, 2)), (3, 5, 2)


def test_norms_of_kernels_are_no_smaller_than_those_of_the_layers_as_matrices():
    ratios, plain = [], 0
    for seed, (layer, shape) in enumerate(kernels()):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input(shape)
        model = keras.Model(inputs, layer(inputs))
        exact = np.linalg.norm(matrix_of(model, shape), 2)
        for found in gains(model, input_norm=1):  # each kernel of a separable convolution gives the same operator
            kernel = array(found.kernel)
            norm = found.change(kernel)
            assert norm >= exact * (1 - 1e-5), (layer, seed)
            assert found.gain == 1 and found.reads == 1
            ratios.append(norm / exact)
            plain += "Conv" in type(layer).__name__ and np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2) < exact
    assert np.median(ratios) < 1.1 and max(ratios) < 2
    assert plain > 5  # the kernel as a matrix is no bound


def operations():
    image, rng = (4, 6, 2), np.random.default_rng(0)
    for pool, stride, padding in itertools.product((1, 2, 3), (1, 2, 3), ("valid", "same")):
        yield layers.MaxPooling2D(pool, stride, padding), image
        yield layers.AveragePooling2D(pool, stride, padding), image
    yield lambda x: ops.max_pool(x, (2, 3)), image
    yield lambda x: ops.average_pool(x, 3, 1, "same"), image
    yield layers.AdaptiveAveragePooling2D((3, 4)), image
    yield layers.AdaptiveMaxPooling2D((3, 4)), image
    for layer in (layers.GlobalAveragePooling2D(), layers.GlobalMaxPooling2D(), layers.UpSampling2D((2, 3))):
        yield layer, image
    for layer in (layers.ZeroPadding2D(1), layers.Cropping2D(1), layers.Flatten(), layers.Permute((3, 1, 2))):
        yield layer, image
    yield layers.RepeatVector(3), (4,)
    for function in (ops.mean, ops.sum, ops.max, ops.min):
        yield lambda x, f=function: f(x, axis=(1, 3)), image
    yield lambda x: x[:, ::2, None, 1:], image
    yield lambda x: ops.take(x, [0, 0, 1, 0], axis=-1), image
    yield lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 0], [0, 0]], mode="reflect"), image
    yield lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 0], [0, 0]], constant_values=0.7), image
    yield lambda x: ops.repeat(ops.tile(x, (1, 2, 1, 1)), 2, axis=2), image
    yield lambda x: layers.Concatenate()([x, x, x]), image
    yield lambda x: ops.stack([x, x], axis=2), image
    yield lambda x: layers.Add()([x, x]), image
    yield lambda x: layers.Average()([x, x]), image
    yield lambda x: x - rng.normal(size=(3, 1, 2)).astype("float32"), (1, 4, 2)
    yield lambda x: x * np.linspace(-2, 1, 2).astype("float32"), image
    yield lambda x: x / np.linspace(0.5, 1, 6).astype("float32")[:, None], image
    yield layers.Rescaling([0.5, -3.0], offset=1.0), image
    yield layers.Normalization(mean=[0.3, 1.0], variance=[0.04, 2.0]), image
    yield layers.Normalization(mean=0.3, variance=2.0, invert=True, axis=None), image
    yield layers.BatchNormalization(), image
    yield layers.PReLU(alpha_initializer=keras.initializers.Constant(-1.5)), image
    yield layers.LeakyReLU(2.0), image
    yield layers.ReLU(max_value=3.0, negative_slope=0.1), image
    yield layers.ELU(1.5), image
    yield layers.Dropout(0.5), image
    yield layers.TimeDistributed(layers.MaxPooling1D(2, 1)), image


def stretch_of(model):
    """The product of the constants of a model's calls, which are in one line."""
    program = Program(model)
    shapes = {slot: tuple(t.shape[1:]) for slot, t in zip(program.inputs, model.inputs)}
    total = 1.0
    for step in program.steps:
        shapes.update((slot, tuple(t.shape[1:])) for slot, t in zip(step.gives, step.node.outputs))
        if isinstance(step.operation, layers.BatchNormalization):
            total *= float(gains(model_behind_a_matrix(step.operation, shapes[step.takes[0][1]]), input_norm=1)[0].gain)
        else:
            total *= lipschitz_constants(step, shapes, 2)[step.takes[0][1]]
    return total


def model_behind_a_matrix(layer, shape):
    """A relu between, so that the normalisation stands for itself."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(layers.Dense(shape[-1], "relu")(inputs)))


def test_no_operation_multiplies_changes_by_more_than_its_constant_and_some_come_near():
    rng, ratios = np.random.default_rng(0), []
    for build, shape in operations():
        inputs = keras.Input(shape)
        model = keras.Model(inputs, build(inputs))
        bound = stretch_of(model)
        peak = np.zeros(shape)
        peak[tuple(n // 2 for n in shape)] = 64
        mixed = [rng.permutation(math.prod(shape)).reshape(shape) - math.prod(shape) / 2 for _ in range(4)]
        points = [*mixed, mixed[0] + peak, mixed[1] - peak]  # no two numbers alike: no kinks
        worst = max(np.linalg.norm(matrix_of(model, shape, x, h), 2) for x in points for h in (0.125, -0.125))
        assert worst <= bound * (1 + 1e-4), (build, worst, bound)
        ratios.append(bound / worst)
    assert np.median(ratios) < 1.001 and max(ratios) < 1.6, ratios


@pytest.mark.parametrize(
    "build",
    [
        lambda x: ops.transpose(x, (1, 0, 2, 3)),
        lambda x: ops.reshape(x, (-1, 6, 2)),
        lambda x: ops.square(x),
        lambda x: 1 / x,
        lambda x: ops.mean(x, axis=0, keepdims=True),
        lambda x: layers.ReLU(threshold=1.0)(x),
        lambda x: layers.Multiply()([x, x]),
        lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x),
    ],
)
def test_what_mixes_samples_or_is_not_known_has_no_constant(build):
    inputs = keras.Input((4, 6, 2))
    assert stretch_of(keras.Model(inputs, build(inputs))) == math.inf


# -- normalisation, sharing, branches ----------------------------------------------------------------------------


def normalised(folds=True):
    def build():
        x = inputs = keras.Input((6, 6, 3))
        for n in (8, 8):
            x = layers.Conv2D(n, 3, padding="same")(x)
            x = layers.ReLU()(layers.BatchNormalization()(x if folds else layers.Activation("linear")(x)))
        return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))

    return build


def test_a_normalisation_right_behind_a_kernel_is_folded_in_and_that_is_tighter():
    bounds = []
    for folds in (True, False):
        before, after = same(normalised(folds))
        for conv, norm in zip(
            *([m for m in after.layers if isinstance(m, t)] for t in (layers.Conv2D, layers.BatchNormalization))
        ):
            w = array(conv.kernel)
            w[..., :3] = 0
            conv.kernel.assign(w)
            norm.gamma.assign(array(norm.gamma) * np.linspace(0.8, 1.2, 8))
            norm.beta.assign(array(norm.beta) + 0.1)
        x = example(before, 32)
        bound = output_bound(before, after, x)
        assert observed(before, after, x) <= bound.total
        assert len(bound.layers) == 3 - 1 if folds else 5 - 1
        bounds.append(bound.total)
    assert bounds[0] < 0.8 * bounds[1]
    [first, *_] = gains(before, x), gains(same(normalised())[0], x)
    assert first[0].scale is None and gains(same(normalised())[0], x)[0].scale.shape == (8,)


@pytest.mark.parametrize("what", ["moving_mean", "moving_variance", "beta", "gamma"])
def test_changes_of_a_normalisation_alone_are_bounded(what):
    for folds in (True, False):
        before, after = same(normalised(folds))
        variable = getattr(next(m for m in after.layers if isinstance(m, layers.BatchNormalization)), what)
        variable.assign(array(variable) * 1.5 + 0.1)
        x = example(before, 32)
        bound = output_bound(before, after, x)
        assert 0 < observed(before, after, x) <= bound.total and len(bound.layers) == 1


def test_a_layer_that_is_called_twice_counts_twice():
    def build():
        inputs = keras.Input((6,))
        shared = layers.Dense(6, "relu")
        return keras.Model(inputs, shared(shared(inputs)))

    before, after = same(build)
    layer = after.layers[-1]
    w = array(layer.kernel)
    layer.kernel.assign(np.where(np.abs(w) < 0.3, 0, w))
    x = sphere(np.random.default_rng(0), 2000, 6)
    bound = output_bound(before, after, x)
    assert len(bound.layers) == 2 and bound.layers[0].change == bound.layers[1].change
    new = theory.spectral_norm(array(layer.kernel))
    assert [found.gain for found in bound.layers] == pytest.approx([new, 1])
    assert observed(before, after, x) <= bound.total


@pytest.mark.parametrize(
    "name", ["resnet_ops", "nested_model_twice", "separable2d", "shared_branch", "two_in_two_out_by_name"]
)
def test_gains_foretell_the_bound_of_a_change_of_one_kernel(name):
    name = name if name in BUILDERS else next(n for n in BUILDERS if n.startswith("resnet"))
    before, after = same(BUILDERS[name])
    x, rng = example(before, 4), np.random.default_rng(0)
    found = gains(before, x)
    pairs = dict(zip((id(v) for v in before.weights), after.weights))
    for one in {id(f.kernel): f for f in found}.values():
        variable, was = pairs[id(one.kernel)], array(one.kernel)
        delta = np.float32(0.01 * rng.normal(size=was.shape))
        variable.assign(was.astype("float32") + delta)
        delta = array(variable) - was
        foretold = sum(f.change(delta) * f.reads * f.gain for f in found if f.kernel is one.kernel)
        bound = output_bound(before, after, x)
        calls = sum(f.kernel is one.kernel for f in found)
        worst = sum((layer.change * layer.reads + layer.shift) * layer.gain for layer in bound.layers)
        assert worst == pytest.approx(foretold, rel=1e-4 if calls == 1 else 0.2) and bound.total <= worst * (1 + 1e-6)
        assert observed(before, after, x) <= bound.total * (1 + 1e-4) + 1e-6
        variable.assign(was)


def test_changes_of_the_wrong_shape_are_refused():
    [first, *_] = gains(mlp(), input_norm=1)
    assert first.change(np.zeros((20, 64))) == 0
    with pytest.raises(ValueError, match=r"shape \(64, 20\).*expected its shape, \(20, 64\)"):
        first.change(np.zeros((64, 20)))


# -- the zoo -----------------------------------------------------------------------------------------------------


def test_no_bound_of_the_zoo_is_exceeded():
    rng, finite, ratios = np.random.default_rng(0), 0, []
    for name in list(BUILDERS)[::5]:  # of all of them 220 have a bound
        before, after = same(BUILDERS[name])
        x = example(before)
        bound = output_bound(before, disturb(after, rng), x)
        if bound.total == math.inf:
            assert bound.unbounded, name
            continue
        assert bound.unbounded == ()
        finite += 1
        seen, tolerance = observed(before, after, x), 1e-2 if name == "half_precision" else 1e-4
        assert seen <= bound.total * (1 + tolerance) + 1e-5, name
        ratios.append(bound.total / max(seen, 1e-9))
    assert finite > 40 and np.median(ratios) < 1e4


@pytest.mark.parametrize(
    "name, kind", [("layer_norm", "LayerNorm"), ("lstm", "LSTM"), ("squeeze_and_excite", "Multiply")]
)
def test_what_multiplies_a_change_by_any_number_is_named_if_a_change_reaches_it(name, kind):
    before, after = same(BUILDERS[name])
    x = example(before)
    last = after.layers[-1]
    last.kernel.assign(array(last.kernel) * 0.9)
    behind = output_bound(before, after, x)
    assert observed(before, after, x) <= behind.total < math.inf and behind.unbounded == ()
    first = next(layer for layer in after.layers if hasattr(layer, "kernel"))
    first.kernel.assign(array(first.kernel) * 0.9)
    before_it = output_bound(before, after, x)
    assert before_it.total == math.inf and any(kind in text for text in before_it.unbounded)
    without = output_bound(before, before, input_norm=1)
    assert without.total == 0


def test_changes_inside_of_what_has_no_norm_are_bounded_by_what_they_do_on_the_data():
    before, after = same(BUILDERS["lstm"])
    lstm = [layer for layer in after.layers if isinstance(layer, layers.LSTM)][-1]
    lstm.cell.kernel.assign(array(lstm.cell.kernel) * 0.5)
    x = example(before)
    bound, known = output_bound(before, after, input_norm=10.0), output_bound(before, after, x)
    name = [layer for layer in before.layers if isinstance(layer, layers.LSTM)][-1].name
    assert bound.total == math.inf and bound.unbounded == (f"{name} (LSTM)",)
    assert bound.layers[0].change == math.inf and bound.layers[0].gain < math.inf
    assert not known.unbounded and 0 < observed(before, after, x) <= known.total * (1 + 1e-4) < math.inf


def test_on_data_a_change_counts_by_what_it_does_and_not_by_its_norm():
    before, after = same(mlp)
    x = np.zeros((5, 20), np.float32)
    x[:, :10] = np.random.default_rng(0).normal(size=(5, 10))
    kernel = next(v for v in after.weights if v.shape == (20, 64))
    changed = array(kernel)
    changed[10:] += 1  # which nobody sees on these samples
    kernel.assign(changed)
    [layer] = output_bound(before, after, x).layers
    assert layer.moves == layer.error == 0 < layer.change * layer.reads * layer.gain
    x[:, 10:] = 0.1
    bound = output_bound(before, after, x)
    [layer] = bound.layers
    first = [layer for layer in before.layers if layer.weights][0]
    sums = x @ (changed - array(first.kernel))
    assert layer.moves <= np.linalg.norm(sums, axis=1).max() * (1 + 1e-5)
    assert 0 < observed(before, after, x) <= bound.total * (1 + 1e-4)
    assert layer.error < layer.change * layer.reads * layer.gain
    assert output_bound(before, after, input_norm=1).layers[0].moves is None


def test_without_data_what_is_read_behind_an_unknown_layer_has_no_bound_either():
    before, after = same(BUILDERS["layer_norm"])
    last = after.layers[-1]
    last.kernel.assign(array(last.kernel) * 0.9)
    assert output_bound(before, after, example(before)).total < math.inf
    bound = output_bound(before, after, input_norm=1)
    assert bound.total == math.inf and bound.unbounded == (f"{before.layers[-1].name} (Dense)",)


@pytest.mark.parametrize("name", ["reshape_into_batch", "time_major_and_back", "reshape_mixing_batch"])
def test_where_samples_are_mixed_there_is_no_bound(name):
    before, after = same(BUILDERS[name])
    for v in after.weights:
        v.assign(array(v) * 0.9)
    bound = output_bound(before, after, example(before, 8))
    assert bound.total == math.inf and bound.unbounded


# -- arguments ---------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    before, after = same(mlp)
    x = np.zeros((3, 20), np.float32)
    with pytest.raises(ValueError, match="Neither of data and input_norm"):
        output_bound(before, after)
    with pytest.raises(ValueError, match="Both of data and input_norm"):
        gains(before, x, input_norm=1)
    for options in ({"input_norm": -1}, {"input_norm": math.nan}, {"data": x, "batch_size": 0}):
        with pytest.raises(ValueError, match="expected a number from"):
            gains(before, **options)
    with pytest.raises(ValueError, match="expected \\(samples, 20\\)"):
        output_bound(before, after, x[:, :5])
    with pytest.raises(ValueError, match="NaN or infinite numbers come out of 'the data'"):
        output_bound(before, after, x * np.nan)
    with pytest.raises(TypeError, match="Expected a keras.Model"):
        gains(7, x)
    with pytest.raises(ValueError, match="no fixed size"):
        gains(BUILDERS["unknown_image_size"](), input_norm=1)


def test_two_architectures_are_not_compared():
    x = np.zeros((3, 20), np.float32)
    with pytest.raises(ValueError, match="Was the second one cut"):
        output_bound(mlp(), keras.Sequential([keras.Input((20,)), layers.Dense(5)]), x)
    with pytest.raises(ValueError, match="differ in more than weights' values"):
        narrow = [layers.Dense(n, "relu", use_bias=False) for n in (32, 64)]
        output_bound(mlp(), keras.Sequential([keras.Input((20,)), *narrow, layers.Dense(5, use_bias=False)]), x)
    with pytest.raises(ValueError, match="differ in more than weights' values"):
        output_bound(mlp(), mlp("tanh"), x)
    inputs = keras.Input((4, 2))
    with pytest.raises(ValueError, match="differ in more than weights' values"):
        output_bound(*(keras.Model(inputs, layers.Conv1D(2, 3, padding=p)(inputs)) for p in ("same", "causal")), x)
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="differ in more than weights' values"):
        output_bound(keras.Model(inputs, inputs * 2.0), keras.Model(inputs, inputs * 3.0), x[:, :4])
