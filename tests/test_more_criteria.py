"""Folded norms, the mix of norm and distance, gates and weights by gradient, and ThiNet's greedy reconstruction."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import (
    Channels,
    DropPruning,
    FilterPruning,
    GradualPruning,
    cli,
    criteria,
    cut,
    plan,
    scoring,
    surgeon,
    thinet,
)
from keras_prune.least_squares import Normal, refit
from keras_prune.probes import folded, gates_of, gradient_times_weight
from keras_prune.scoring import scores_of
from keras_prune.surgeon import plain_curves
from keras_prune.surgery import relative_difference

FILTERS = np.array([(3, 0), (0, 1), (2, 2), (2.2, 1.8), (-0.3, 0.2)])
NEW = ("fpgm_mix", "l1_folded", "l2_folded", "taylor_weight", "thinet")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def scores(channels, criterion, data=None):
    return scores_of(channels, criterion, data, {}, channels.alive(()))[0]


def made_by(channels, name):
    return next(g for g in channels.groups if any(m.weight.layer.name == name for m in g.producers))


# -- norm, then distance -----------------------------------------------------------------------------------------


def test_the_mix_takes_the_smallest_norms_first_and_then_the_distances_among_the_others():
    """L2 order is 4, 1, 2, 3, 0 and that of the distances 3, 2, 1, 4, 0."""
    found = criteria.fpgm_mix(FILTERS, by_norm=0.4)
    assert np.argsort(found).tolist() == [4, 1, 3, 2, 0]
    assert np.allclose(found[[0, 2, 3]], (4.2059, 2.5189, 2.2526), atol=1e-4)  # among these three alone
    assert np.allclose(found[[4, 1]], 2.2526 * np.array((0.3606, 1)) / 2.8284, atol=1e-4)
    assert np.allclose(criteria.fpgm_mix(FILTERS, by_norm=0.0), criteria.fpgm(FILTERS), rtol=1e-6)
    assert np.argsort(criteria.fpgm_mix(FILTERS, by_norm=0.99)).tolist() == [4, 1, 2, 3, 0]  # one is left to distance
    assert np.argsort(criteria.fpgm_mix(np.repeat(FILTERS, 2, axis=0)))[0] in (8, 9)  # floor(0.1 * 10) by norm


@pytest.mark.parametrize(
    "rows",
    (np.zeros((10, 3)), np.ones((10, 3)), np.vstack([np.zeros((4, 3)), np.ones((6, 3))]), np.eye(10), np.ones((2, 1))),
    ids=("zero", "alike", "two_kinds", "equal_norms", "two_units"),
)
def test_the_mix_orders_equals_without_nan_or_ties_between_norm_and_distance(rows):
    found = criteria.fpgm_mix(rows, by_norm=0.3)
    count = int(0.3 * len(rows))
    first = np.argsort(np.linalg.norm(rows, axis=1), kind="stable")[:count]
    assert np.isfinite(found).all() and (found >= 0).all()
    assert set(np.argsort(found, kind="stable")[:count]) == set(first)
    assert not count or found[first].max() < np.delete(found, first).min()


def test_the_mix_follows_a_permutation_and_needs_a_fraction():
    rows, order = normal(30, 5), np.random.default_rng(2).permutation(30)
    assert np.allclose(criteria.fpgm_mix(rows[order]), criteria.fpgm_mix(rows)[order])
    assert not np.allclose(criteria.fpgm_mix(rows), criteria.fpgm(rows), rtol=1e-2)
    for wrong in (1.0, -0.1, True, "some", None):
        with pytest.raises(ValueError, match="by_norm=.* expected a fraction"):
            criteria.fpgm_mix(rows, by_norm=wrong)


# -- folded norms ------------------------------------------------------------------------------------------------


def rescaled(model, into):
    """The same function: filters times random numbers, some of them negative, and their norms set to undo it."""
    rng = np.random.default_rng(3)
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    convs = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    for conv, norm in zip(convs, norms, strict=True):
        factor = (rng.uniform(0.7, 5, conv.filters) * rng.choice((-1, 1), conv.filters)).astype("float32")
        for variable in (conv.kernel, conv.bias, norm.moving_mean):
            if variable is not None:
                variable.assign(np.array(variable) * factor)
        if into == "gamma":
            norm.gamma.assign(np.array(norm.gamma) / factor)
        else:
            norm.moving_variance.assign((np.array(norm.moving_variance) + norm.epsilon) * factor**2 - norm.epsilon)
            norm.gamma.assign(np.array(norm.gamma) * np.sign(factor))
    return model


@pytest.mark.parametrize("into", ("gamma", "variance"))
def test_folded_norms_do_not_see_how_a_scale_is_shared_with_the_normalisation_and_plain_norms_do(into):
    before, after = randomize(residual_net((12, 16))), rescaled(randomize(residual_net((12, 16))), into)
    x = patterns(8)[0]
    assert relative_difference(before, after, x) < 1e-4
    one, two = Channels(before), Channels(after)
    for name, is_blind in (("l1_folded", True), ("l2_folded", True), ("l1", False), ("l2", False), ("bn_scale", None)):
        first, second = scores(one, name), scores(two, name)
        assert first.keys() == second.keys() == {g.index for g in one.groups}
        for k in first:
            if is_blind is not None:
                assert np.allclose(first[k], second[k], rtol=1e-4) == is_blind
        if is_blind:
            chosen = [plan(c, 0.4, criterion=name, round_to=1).removed for c in (one, two)]
            assert np.array_equal(*chosen)


def image():
    return keras.Input((6, 6, 4))


FOLDS = {
    "conv": (image, lambda: layers.Conv2D(5, 3), lambda: layers.BatchNormalization()),
    "grouped": (image, lambda: layers.Conv2D(6, 3, groups=2), lambda: layers.BatchNormalization(epsilon=0.1)),
    "depthwise": (image, lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), lambda: layers.BatchNormalization()),
    "separable": (image, lambda: layers.SeparableConv2D(5, 3), lambda: layers.BatchNormalization()),
    "transposed": (image, lambda: layers.Conv2DTranspose(5, 3, 2), lambda: layers.BatchNormalization()),
    "dense": (lambda: keras.Input((7,)), lambda: layers.Dense(5), lambda: layers.BatchNormalization()),
    "einsum": (
        lambda: keras.Input((4, 7)),
        lambda: layers.EinsumDense("abc,cd->abd", (4, 5), bias_axes="d"),
        lambda: layers.BatchNormalization(),
    ),
    "without_gamma": (image, lambda: layers.Conv2D(5, 3), lambda: layers.BatchNormalization(scale=False)),
}


@pytest.mark.parametrize("kind", FOLDS)
def test_a_folded_kernel_makes_what_kernel_and_normalisation_make_but_a_constant(kind):
    make_input, make_layer, make_norm = FOLDS[kind]
    inputs, layer, norm = make_input(), make_layer(), make_norm()
    part = keras.Model(inputs, norm(layer(inputs)))
    outputs = part.output if len(part.output.shape) == 2 else layers.Flatten()(part.output)
    model = randomize(keras.Model(inputs, layers.Dense(2)(outputs)))
    if norm.scale:
        norm.gamma.assign(np.array(norm.gamma) * np.where(np.arange(norm.gamma.shape[0]) % 2, 1, -1))
    x, folds = normal(3, *inputs.shape[1:]), folded(Channels(model))
    variable = layer.pointwise_kernel if kind == "separable" else layer.kernel
    wanted = np.array(part(x)) - np.array(part(0 * x))
    plain = np.array(layer(x)) - np.array(layer(0 * x))
    variable.assign(folds[id(variable)])
    assert np.allclose(np.array(layer(x)) - np.array(layer(0 * x)), wanted, atol=1e-5)
    assert not np.allclose(plain, wanted, atol=1e-2)


def test_producers_without_a_normalisation_right_behind_are_scored_plainly():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    one, two, three = (layers.Conv2D(6, 3, padding="same", name=name) for name in ("relued", "shared", "alone"))
    x = layers.BatchNormalization()(layers.ReLU()(one(inputs)))
    shared = two(x)
    x = layers.Add()([layers.BatchNormalization()(shared), layers.ReLU()(shared)])
    x = layers.ReLU()(three(x))
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    channels = Channels(model)
    plain, found = scores(channels, "l2"), scores(channels, "l2_folded")
    assert len(plain) == 3 and all(np.array_equal(plain[k], found[k]) for k in plain)
    weights = folded(channels)
    assert all(np.array_equal(weights[id(w.variable)], np.array(w.variable)) for w in channels.weights)


# -- gradients ---------------------------------------------------------------------------------------------------


def test_a_gates_square_and_the_sum_of_squares_have_their_worked_values():
    products = np.array([[1, -2, 0.5]]) * np.array([[0.3, 0.1, -2]])
    of_batch = {name: criteria.LABELLED[name](products)[:, None] for name in criteria.LABELLED}
    found = {name: float(criteria.get(name)(rows)[0]) for name, rows in of_batch.items()}
    assert found == {"taylor": pytest.approx(0.81), "taylor_weight": pytest.approx(1.13)}
    assert np.allclose(criteria.taylor_weight(np.array([[1.0, 3.0], [0.5, 0.0]])), (2.0, 0.25))


@keras.saving.register_keras_serializable("more_criteria")
class Gate(layers.Layer):
    """One factor of 1 for each channel."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.factor


def gated(gate):
    """A residual sum whose ends have norms, one of them behind a ReLU; a norm without beta behind a depthwise
    convolution; a kernel that is read in two places, both of which have norms; and Dense layers without norms."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.ReLU()(gate("stem")(layers.BatchNormalization()(x)))
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(7, 1, use_bias=False, name="inner")(x)))
    y = layers.BatchNormalization(center=False)(layers.DepthwiseConv2D(3, padding="same", name="deep")(y))
    y = layers.Conv2D(4, 1, name="both")(layers.Activation("tanh")(gate("deep")(y)))
    both = gate("both")
    y = [layers.BatchNormalization()(y), layers.BatchNormalization()(layers.MaxPooling2D(2, 1, "same")(y))]
    y = layers.Concatenate()([layers.Activation("tanh")(both(each)) for each in y])
    y = layers.BatchNormalization()(layers.Conv2D(5, 1, name="outer")(y))
    x = layers.Flatten()(layers.ReLU()(layers.Add()([x, gate("outer")(y)])))
    x = layers.Activation("tanh")(gate("hidden")(layers.Dense(6, name="hidden")(x)))
    x = layers.ReLU()(gate("last")(layers.Dense(4, use_bias=False, name="last")(x)))
    return randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def at_the_gates(twin, x, y):
    """{layer: g dL/dg of the gate behind it}, by automatic differentiation."""
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the oracle is TensorFlow's tape")
    gates = {}
    model = gated(lambda name: gates.setdefault(name, Gate(name=f"gate_{name}")))
    variables = [gate.factor for gate in gates.values()]
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    factors = {id(v) for v in variables}
    for own, value in zip((w for w in model.weights if id(w) not in factors), twin.weights, strict=True):
        own.assign(value)
    with tf.GradientTape() as tape:
        tape.watch([v.value for v in variables])
        loss = LOSS(y, model(x, training=True))
    return {name: np.array(g) for name, g in zip(gates, tape.gradient(loss, [v.value for v in variables]))}


def test_gates_have_the_gradient_of_gates_that_are_really_there():
    model = gated(lambda name: lambda x: x)
    model.compile("sgd", LOSS)
    x, y = normal(48, 6, 6, 3), np.random.default_rng(1).integers(0, 3, 48)
    wanted = [at_the_gates(model, x[part], y[part]) for part in (slice(0, 32), slice(32, 48))]
    channels = Channels(model)
    blocks = scoring._of_gradients(channels, "taylor", (x, y))
    shadows = gradient_times_weight(channels, (x, y))
    producers = (("stem", "outer"), ("deep",), ("both",), ("hidden",), ("last",))  # "inner" is normalised by "deep"
    found = scores(channels, "taylor", (x, y))
    for names in producers:
        group = made_by(channels, names[0])
        squares = []
        for name, block in zip(names, blocks(group), strict=True):
            (producer,) = [m for m in group.producers if m.weight.layer.name == name]
            kernel = np.stack([channels.blocks(group, s, [producer])[0].sum(1) for s in shadows], axis=1)
            true = np.stack([batch[name] for batch in wanted], axis=1)
            assert np.allclose(block, true, rtol=1e-3, atol=1e-4 * np.abs(true).max())
            if name == "last":  # no norm, no bias: the kernel alone tells it
                assert np.allclose(block, kernel)
            else:
                assert not np.allclose(kernel, true, rtol=0.1)
            if name not in ("hidden", "last"):  # the scale of a kernel before a norm that is training does little
                assert np.abs(kernel).max() < 0.1 * np.abs(true).max()
            squares.append(np.square(true).mean(1))
        expected = np.mean([s / s.mean() for s in squares], axis=0)
        assert np.allclose(found[group.index], expected, rtol=2e-3)


def test_weights_by_gradient_have_their_values_in_a_linear_model():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False)(layers.Dense(4, use_bias=False)(inputs)))
    model.compile("sgd", "mse")
    x, y = normal(40, 3), normal(40, 1, seed=1)
    a, b = (np.array(v, np.float64) for v in model.weights)
    squares = []
    for part in (slice(0, 32), slice(32, 40)):
        error = 2 * (x[part] @ a @ b - y[part]) / len(x[part])
        squares.append(np.square(a * (x[part].T @ error @ b.T)).sum(0))
    wanted = np.mean(squares, axis=0)
    found = scores(Channels(model), "taylor_weight", (x, y))[0]
    assert np.allclose(found, wanted / wanted.mean(), rtol=1e-4)
    assert not np.allclose(scores(Channels(model), "taylor", (x, y))[0], found, rtol=1e-2)


def two_in_two_out(rate=0.0, loss_weights=None):
    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,), name="z"), keras.Input((4,), name="a")
    penalty = keras.regularizers.L2(rate) if rate else None
    x = layers.Dense(6, "relu", kernel_regularizer=penalty, name="first")(layers.Subtract()([a, b]))
    model = keras.Model([a, b], [layers.Dense(2, name="one")(x), layers.Dense(1, name="two")(x)])
    model.compile("sgd", ["mse", "mae"], loss_weights=loss_weights)
    return model


INPUTS, LABELS = [normal(40, 4), normal(40, 4, seed=1)], [normal(40, 2, seed=2), normal(40, 1, seed=3)]


def test_several_inputs_and_outputs_are_taken_as_fit_takes_them():
    channels = Channels(two_in_two_out())
    parts = [tuple([a[part] for a in arrays] for arrays in (INPUTS, LABELS)) for part in (slice(0, 32), slice(32, 40))]
    wanted = scores(channels, "taylor", parts)[0]
    named = dict(zip("za", INPUTS))
    weighted = (INPUTS, LABELS, np.ones(40))
    for data in ((INPUTS, LABELS), (tuple(INPUTS), LABELS), (named, LABELS), weighted):
        assert np.allclose(scores(channels, "taylor", data)[0], wanted, rtol=1e-5)
    assert not np.allclose(scores(channels, "taylor", (INPUTS[::-1], LABELS))[0], wanted, rtol=1e-2)
    with pytest.raises(ValueError, match="40 samples and 3 and 40 labels"):
        scores(channels, "taylor", (INPUTS, [LABELS[0], LABELS[1][:3]]))
    wanted = scores(channels, "apoz", INPUTS)[0]
    for data in ((INPUTS, LABELS), (named, LABELS), (tuple(INPUTS), LABELS[0]), parts):
        assert np.array_equal(scores(channels, "apoz", data)[0], wanted)


def test_weights_of_losses_count_and_penalties_on_weights_do_not():
    """A gate behind a unit does not change the size of its weights."""
    found = []
    for model in (two_in_two_out(), two_in_two_out(loss_weights=[0.5, 0.0]), two_in_two_out(rate=10.0)):
        shadow = gradient_times_weight(Channels(model), (INPUTS, LABELS))[0]
        found.append([shadow[id(model.get_layer(name).kernel)] for name in ("first", "one", "two")])
    plain, weighted, penalised = found
    assert all(np.allclose(*pair) for pair in zip(plain, penalised))
    first, one, two = zip(plain, weighted)
    assert np.allclose(0.5 * one[0], one[1]) and np.any(two[0]) and not np.any(two[1])
    assert np.any(first[1]) and not np.allclose(0.5 * first[0], first[1], rtol=0.1)


@pytest.mark.parametrize("name", ("lstm_masked", "attention_self", "vit", "inverted_residual", "time_distributed"))
def test_every_group_has_gates_of_weights_that_make_it_each_once(name):
    channels = Channels(ZOO[name]()[0])
    gates = gates_of(channels)
    assert channels.groups
    for group in channels.groups:
        found = gates(group)
        variables = [id(m.weight.variable) for members in found for m in members]
        assert found and len(variables) == len(set(variables))
        assert all(any(m is own for own in group.members) for members in found for m in members)
        assert not any(m.weight.is_statistic for members in found for m in members)


def test_a_gate_of_a_recurrent_layer_is_of_its_kernels_and_bias_together():
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(5)(inputs)))
    channels = Channels(model)
    ((*members,),) = gates_of(channels)(channels.groups[0])
    assert {(m.weight.name, m.axis) for m in members} == {
        ("cell.kernel", 1),
        ("cell.recurrent_kernel", 1),
        ("cell.bias", 0),
    }


def test_a_normalisation_without_gamma_has_no_gate_and_says_so_and_a_frozen_one_needs_none():
    for kwargs in ({"scale": False}, {"trainable": False}):
        inputs = keras.Input((5,))
        x = layers.ReLU()(layers.BatchNormalization(**kwargs)(layers.Dense(6, name="normed")(inputs)))
        model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "relu", name="plain")(x)))
        model.compile("sgd", LOSS)
        reasons: dict = {}
        channels = Channels(model)
        found, _ = scores_of(channels, "taylor", (normal(16, 5), np.zeros(16, int)), reasons, channels.alive(()))
        normed, plain = made_by(channels, "normed").index, made_by(channels, "plain").index
        if "scale" in kwargs:
            assert list(reasons) == [normed] and "taylor_weight" in reasons[normed] and list(found) == [plain]
        else:
            (parts,) = gates_of(channels)(channels.groups[normed])
            assert not reasons and set(found) == {normed, plain}
            assert {m.weight.name for m in parts} == {"kernel", "bias"}


# -- greedy reconstruction ---------------------------------------------------------------------------------------

X = np.array([[1, 2, 0.1, -2], [0.5, 1, -0.1, -1], [2, -1, 0.2, 1.5], [1, 0.5, 0, -0.4]])


def by_brute_force(contributions):
    """(order, errors) from the contributions of each unit, (values, units): every set is summed anew."""
    there, gone, errors = list(range(contributions.shape[1])), [], []
    while len(there) > 1:
        costs = [np.square(contributions[:, [*gone, unit]].sum(1)).sum() for unit in there]
        errors.append(min(costs))
        gone.append(there.pop(int(np.argmin(costs))))
    return gone, errors


def test_the_greedy_order_and_the_least_squares_step_have_their_worked_values():
    order, errors = thinet.greedy(X.T @ X)
    assert order.tolist()[:2] == [2, 1] and np.allclose(errors[:2], (0.06, 6.11))
    made, kept = X.sum(1, keepdims=True), X[:, [0, 3]]
    normal = Normal(1, 2, 1)
    normal.add(kept[None], made[None])
    scales = refit(normal, np.ones((1, 2, 1)), strength=0.0)
    assert np.allclose(scales.ravel(), (1.246088, 0.119486), atol=1e-6)
    assert np.allclose(normal.error(np.ones((1, 2, 1))), 6.11) and np.allclose(normal.error(scales), 0.02983, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_brute_force_and_lets_units_that_cancel_go_together(seed):
    contributions = normal(12, 9, seed=seed).astype(np.float64)
    contributions[:, 4] = -contributions[:, 7] * 0.999
    contributions[:, [4, 7]] *= 3
    order, errors = thinet.greedy(contributions.T @ contributions)
    wanted, costs = by_brute_force(contributions)
    assert order.tolist() == wanted and np.allclose(errors, costs, rtol=1e-9)
    second = max(wanted.index(k) if k in wanted else 8 for k in (4, 7))
    assert second == 8 or errors[second] < errors[second - 1]  # and cheaply
    scored = surgeon.Curve(range(9), order, errors).scores()
    assert np.argsort(scored)[:8].tolist() == wanted and (scored >= 0).all()


def behind_flatten(x):
    return layers.Dense(7, name="reader")(layers.Flatten()(x))


def through_depthwise(x):
    x = layers.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2)(x)
    return layers.Conv2D(5, 1, name="reader")(x)


READERS = {
    "dense": ((6,), lambda x: layers.Dense(8, name="reader")(x)),
    "flatten": ((6, 6, 2), behind_flatten),
    "strided": ((7, 7, 2), lambda x: layers.Conv2D(4, 3, 2, padding="same", use_bias=False, name="reader")(x)),
    "depthwise": ((6, 6, 2), through_depthwise),
    "separable": ((6, 6, 2), lambda x: layers.SeparableConv2D(4, 3, padding="same", name="reader")(x)),
    "grouped": ((6, 6, 2), lambda x: layers.Conv2D(6, 3, groups=2, name="reader")(x)),
}


def read(kind, width=8):
    """(model, maker of units, reader, inputs)."""
    keras.utils.set_random_seed(2)
    shape, add_reader = READERS[kind]
    inputs = keras.Input(shape)
    made = (layers.Dense if len(shape) == 1 else layers.Conv2D)(
        width, **({} if len(shape) == 1 else dict(kernel_size=2)), activation="softplus", name="made"
    )
    x = add_reader(made(inputs))
    x = layers.Dense(2)(x if len(x.shape) == 2 else layers.Flatten()(layers.ReLU()(x)))
    model = randomize(keras.Model(inputs, x))
    return model, made, model.get_layer("reader"), normal(10, *shape)


def contributions_of(model, reader, x, columns):
    """(values, units) in float64: the reader itself, given one unit at a time, without its bias."""
    exact = type(reader).from_config({**reader.get_config(), "dtype": "float64"})
    seen = np.array(keras.Model(model.input, reader.input)(x), np.float64)
    exact.build(seen.shape)
    exact.set_weights(reader.get_weights())
    nothing = np.array(exact(0 * seen))
    return np.stack(
        [(np.array(exact(np.where(np.isin(columns, unit), seen, 0))) - nothing).ravel() for unit in np.unique(columns)],
        axis=1,
    )


UNITS = {"flatten": np.arange(5 * 5 * 8) % 8, "depthwise": np.arange(16) // 2, "grouped": np.arange(8) % 4}
"""Unit of each place on the last axis of what the reader is given; of a grouped convolution one channel per group."""


@pytest.mark.parametrize("kind", READERS)
def test_the_order_and_the_errors_of_every_reader_are_those_of_brute_force(kind):
    model, made, reader, x = read(kind)
    channels = Channels(model)
    group = made_by(channels, "made")
    parts = contributions_of(model, reader, x, UNITS.get(kind, np.arange(8)))
    order, errors = by_brute_force(parts)
    curve = plain_curves(channels, x, groups=[group], batch_size=4)[0][group.index]
    assert curve.order.tolist() == order
    assert np.allclose(curve.error, np.array(errors) / np.square(parts.sum(1)).sum(), rtol=1e-6)
    alone = np.cumsum(np.sort(np.square(parts).sum(0)))[:-1] / np.square(parts.sum(1)).sum()
    assert not np.allclose(curve.error, alone, rtol=0.1)  # what two units do to the same value is no detail


def test_readers_have_an_equal_say_whatever_they_are_scaled_by():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((5,))
    made, one, two = layers.Dense(7, "softplus", name="made"), layers.Dense(3), layers.Dense(4)
    x = made(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([one(x), two(x)]))))
    x, channels = normal(50, 5), Channels(model)
    group, products = made_by(channels, "made"), 0
    for reader in (one, two):
        parts = contributions_of(model, reader, x, np.arange(7))
        products = products + parts.T @ parts / np.square(parts.sum(1)).sum()
    order, errors = thinet.greedy(products)
    for factor in (1, 100):
        two.kernel.assign(np.array(two.kernel) * factor)
        curve = plain_curves(channels, x, groups=[group])[0][group.index]
        assert np.array_equal(curve.order, order) and np.allclose(curve.error, errors, rtol=1e-5)


def test_what_is_too_wide_is_looked_at_value_by_value(monkeypatch):
    """Few outputs: all of them, so nothing changes. Many: drawn ones, so it changes a little."""
    model, made, reader, _ = read("flatten")
    channels, x = Channels(model), normal(2000, 6, 6, 2)
    group = made_by(channels, "made")
    whole = plain_curves(channels, x, groups=[group])[0][group.index]
    monkeypatch.setattr(surgeon, "WIDE", 10)
    wide = plain_curves(channels, x, groups=[group])[0][group.index]
    assert np.array_equal(wide.order, whole.order) and np.allclose(wide.error, whole.error, rtol=1e-4)
    monkeypatch.setattr(thinet, "SAMPLED", 3)
    drawn = plain_curves(channels, x, groups=[group])[0][group.index]
    assert np.allclose(drawn.error, whole.error, rtol=0.1) and not np.allclose(drawn.error, whole.error, rtol=1e-5)
    again = plain_curves(channels, x, groups=[group])[0][group.index]
    assert np.array_equal(drawn.error, again.error)


def test_what_a_wide_reader_makes_of_other_groups_counts_in_what_errors_are_shares_of(monkeypatch):
    inputs = keras.Input((5,))
    both = layers.Concatenate()([layers.Dense(6, "softplus", name="one")(inputs), layers.Dense(9, name="two")(inputs)])
    channels, x = Channels(randomize(keras.Model(inputs, layers.Dense(3)(both)))), normal(40, 5)
    whole = plain_curves(channels, x)[0]
    monkeypatch.setattr(surgeon, "WIDE", 4)
    wide = plain_curves(channels, x)[0]
    assert len(whole) == 2 and all(np.allclose(wide[k].error, whole[k].error, rtol=1e-4) for k in whole)


@pytest.mark.parametrize("name", ("dense_net", "conv2d_large_groups", "inverted_residual", "vit", "nested_three_deep"))
def test_every_group_has_a_plain_curve_or_the_reason_that_the_surgeon_has(name):
    model, _ = ZOO[name]()
    x, channels = example(model, 8), Channels(model)
    found, reasons = plain_curves(channels, x)
    assert reasons == surgeon.curves(channels, x)[1] and sorted([*found, *reasons]) == list(range(len(channels.groups)))
    for curve in found.values():
        assert curve.error.shape == curve.order.shape == (len(curve.group) - 1,) and np.isfinite(curve.error).all()
        kept = np.argsort(curve.scores(), kind="stable")
        assert np.array_equal(kept[:-1], curve.order) and curve.scores().min() >= 0


def test_the_least_squares_step_does_not_increase_the_error_on_the_samples():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    made = layers.Dense(16, "softplus", name="made")
    model = randomize(keras.Model(inputs, layers.Dense(5, name="reader")(made(inputs))))
    x = normal(200, 6)
    result = plan(model, 0.5, measure="units", criterion="thinet", data=x, reconstruct=True, round_to=1)
    wanted, bare, small = np.array(model(x)), cut(result.channels, result.removed), result.cut()
    errors = [np.square(np.array(m(x)) - wanted).sum() for m in (bare, small)]
    assert len(result.removed) == 8 and 0 < errors[1] < 0.2 * errors[0]
    curve = plain_curves(result.channels, x)[0][0]
    assert set(result.removed) == set(curve.group.units[curve.order[:8]])
    energy = np.square(wanted - np.array(model.get_layer("reader").bias)).sum()
    assert np.isclose(errors[0] / energy, curve.error[7], rtol=1e-4)  # the curve is what the cut does


# -- by name, everywhere -----------------------------------------------------------------------------------------


def data_for(name, x, y):
    return (x, y) if name in criteria.LABELLED else x if name in scoring.READERS else None


@pytest.mark.parametrize("name", NEW)
def test_every_new_name_plans_and_prunes_in_fit(name):
    x, y = patterns(32)
    model = compiled(widths=(16, 24))
    result = plan(model, 0.4, criterion=name, data=data_for(name, x, y), round_to=1)
    assert abs(result.reached - 0.4) < 0.05 and f"by {name}" in result.sentence
    assert relative_difference(result.zero(), result.cut(), x) < 1e-4
    pruning = FilterPruning(0.4, criterion=name, data=data_for(name, x, y), round_to=1)
    history = model.fit(x, y, verbose=0, callbacks=[pruning]).history
    assert history["sparsity"][0] == pytest.approx(0.4, abs=0.05)
    assert np.array_equal(np.sort(pruning.removed), np.sort(result.removed))


@pytest.mark.parametrize("name", NEW)
def test_without_the_data_that_it_needs_a_name_says_what_is_missing(name):
    x, _ = patterns(16)
    if name in criteria.LABELLED:
        with pytest.raises(ValueError, match="needs labelled data"):
            plan(compiled(), 0.4, criterion=name)
        with pytest.raises(ValueError, match="needs labelled data"):
            plan(compiled(), 0.4, criterion=name, data=x)
        with pytest.raises(ValueError, match="needs a loss.*compile"):
            plan(residual_net(), 0.4, criterion=name, data=patterns(16))
    elif name in scoring.READERS:
        with pytest.raises(ValueError, match="needs data: unlabelled inputs"):
            plan(compiled(), 0.4, criterion=name)
    else:
        assert plan(compiled(), 0.4, criterion=name).reached > 0.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(criterion="taylor"), r"criterion='taylor' .* GradualPruning .* \(x, y\)"),
        (dict(criterion="apoz"), "criterion='apoz' .* unlabelled inputs"),
        (dict(budget="pca"), "budget='pca' .* unlabelled inputs"),
    ],
)
def test_a_callback_without_the_data_that_it_needs_says_so_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(0.4, begin=3, **arguments)


def test_a_mix_of_another_share_is_called_what_it_is():
    mix = functools.partial(criteria.fpgm_mix, by_norm=0.2)
    assert "by fpgm_mix," in plan(residual_net((16,)), 0.3, criterion=mix).sentence


def test_single_weights_know_the_square_of_gradient_times_weight_by_two_names():
    x, y = patterns(32)
    kernels = {}
    for name in ("taylor", "taylor_weight"):
        model = compiled(widths=(8,))
        arguments = dict(drop_out=1.0, drop_in=0.0, begin=0, stop=0, seed=0)
        model.fit(x, y, verbose=0, callbacks=[DropPruning(0.5, criterion=name, data=(x, y), **arguments)])
        kernels[name] = [np.array(v) for v in model.weights]
    assert all(np.array_equal(*pair) for pair in zip(*kernels.values()))


def test_the_shell_plans_by_names_that_need_no_data_and_says_what_the_others_need(tmp_path, capsys):
    residual_net((16,)).save(tmp_path / "model.keras")
    for name in NEW:
        code = cli.main(["plan", str(tmp_path / "model.keras"), "--criterion", name, "--round-to", "1", "--json"])
        out, err = capsys.readouterr()
        if name in criteria.LABELLED or name in scoring.READERS:
            assert code != 0 and f"criterion {name} needs" in err and f"criterion='{name}'" in err
        else:
            assert code == 0 and f"by {name}" in json.loads(out)["sentence"]
