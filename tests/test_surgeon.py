"""Curves of what the removal of units costs, against brute force and on every kind of reader."""

import functools

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import Channels, cut, plan, surgeon, zero
from keras_prune.damage import Damage
from keras_prune.program import Program
from keras_prune.reconstruction import reconstruct
from keras_prune.sites import sites_of, tail_of
from keras_prune.surgeon import curves
from keras_prune.surgery import relative_difference

KINDS = (
    "sequential_dense",
    "dense_net",
    "conv1d_dilated",
    "conv2d_strided",
    "conv2d_large_groups",
    "conv2d_small_groups",
    "conv2d_as_depthwise",
    "depthwise1d_multiplied",
    "separable2d",
    "conv1d_transpose",
    "flatten_1d",
    "squeeze_and_excite_dense",
    "concat_twice_the_same",
    "resnet_option_a_layers",
    "inverted_residual",
    "split_uneven",
    "attention_self",
    "attention_cross",
    "attention_gated",
    "vit",
    "einsum_heads",
    "einsum_token_mixing",
    "nested_model_twice",
    "nested_three_deep",
    "shared_branch",
    "conv_called_twice",
    "time_distributed",
    "two_in_two_out_by_name",
    "encoder_decoder",
    "half_precision",
)


@functools.cache
def studied(name):
    """(model, inputs, channels, curves, reasons); nothing may change the model, so all tests share it."""
    model, _ = ZOO[name]()
    x, channels = example(model, 12), Channels(model)
    before = [np.array(v) for v in model.weights]
    found, reasons = curves(channels, x, exam_data=x)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights))
    return model, x, channels, found, reasons


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def group_of(channels, layer):
    """The group of units that a layer makes."""
    return next(g for g in channels.groups if any(m.weight.layer is layer for m in g.producers))


def inputs_at(model, layer, x):
    return np.array(keras.Model(model.input, layer.input)(x))


def patches(x, size):
    """Rows of a convolution with padding 'same' and stride 1, position by position."""
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    return np.array(
        [padded[b, i : i + size, j : j + size].ravel() for b in range(n) for i in range(height) for j in range(width)],
        np.float64,
    )


def brute_force(x, w, columns, has_intercept=True):
    """(cost, error) of each unit alone: fits without its columns, with a pull to the weights, as a share of the
    variance. The pull is written as further rows of numpy's least squares, the intercept as the means."""
    if has_intercept:
        x = x - x.mean(0)
    root = np.sqrt(max(1e-3, x.shape[1] / len(x)) * np.mean(np.square(x).sum(0)))
    rows = np.vstack([x, root * np.eye(x.shape[1])])
    made, found = x @ w, []
    for gone in columns:
        kept = np.setdiff1d(np.arange(len(w)), gone)
        new = np.zeros_like(w)
        new[kept] = np.linalg.lstsq(rows[:, kept], rows @ w, rcond=None)[0]
        found.append((np.square(rows @ (w - new)).sum(), np.square(x @ (w - new)).sum()))
    return np.array(found).T / np.square(made - made.mean(0)).sum()


# -- all kinds of readers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if name in ZOO])  # some backends cannot run all
def test_every_group_has_a_curve_or_a_reason(name):
    _, _, channels, found, reasons = studied(name)
    assert sorted([*found, *reasons]) == [g.index for g in channels.groups] and found
    for index, curve in found.items():
        units = len(channels.groups[index])
        assert curve.group is channels.groups[index]
        assert curve.error.shape == curve.damage.shape == curve.order.shape == (units - 1,)
        assert len(set(curve.order)) == units - 1 and set(curve.order) <= set(range(units))
        for line in (curve.error, curve.damage):
            assert np.isfinite(line).all() and (line >= 0).all() and (np.diff(line) >= 0).all()
        assert 0 < curve.error[-1] < 2 * sum(bool(s.reads(curve.group)) for s in sites(channels))
        scores = curve.scores()
        assert np.isfinite(scores).all() and scores[curve.order[0]] == scores.min()
        assert (np.diff(scores[curve.order]) > 0).all()
        assert scores[list(set(range(units)) - set(curve.order))] == scores.max()


def sites(channels):
    return sites_of(channels, Program(channels.model))


def test_what_reads_through_something_that_cannot_be_refitted_is_named():
    assert {r.split(" (")[1] for r in studied("time_distributed")[4].values()} == {"LSTM), which cannot be refitted"}
    assert "read by" in studied("time_distributed")[4][1]
    model, _ = ZOO["gru"]()
    found, reasons = curves(Channels(model), example(model, 8))
    assert sorted(found) == [2] and all("(GRU)" in reasons[k] for k in (0, 1))


def test_units_that_only_a_depthwise_convolution_reads_have_no_curve():
    """Of 8 channels behind the depthwise convolution 5 are used; the other 3 are cut away."""
    inputs = keras.Input((6, 6, 3))
    x = layers.DepthwiseConv2D(3, padding="same")(layers.Conv2D(8, 3)(inputs))
    x = layers.Conv2D(4, 3, activation="relu")(x[..., :5])
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    channels = Channels(model)
    found, reasons = curves(channels, normal(8, 6, 6, 3))
    assert {len(channels.groups[k]): r for k, r in reasons.items()} == {
        3: "nothing with a kernel that mixes channels reads it"
    }
    assert sorted(len(c.group) for c in found.values()) == [4, 5]


@pytest.mark.parametrize("use_bias", (True, False))
def test_the_first_unit_to_leave_a_dense_reader_is_that_of_brute_force(use_bias):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = layers.Dense(9, activation="softplus")
    reader = layers.Dense(4, activation="relu", use_bias=use_bias)
    model = randomize(keras.Model(inputs, layers.Dense(2)(reader(hidden(inputs)))))
    x, channels = normal(300, 5), Channels(model)
    seen = inputs_at(model, reader, x).astype(np.float64)
    group = group_of(channels, hidden)
    columns, w = np.arange(9)[:, None], np.array(reader.kernel, np.float64)
    cost, error = brute_force(seen, w, columns, use_bias)
    curve = curves(channels, x, groups=[group])[0][group.index]
    assert curve.order[0] == cost.argmin()
    assert np.isclose(curve.error[0], error[cost.argmin()], rtol=1e-3)
    other = brute_force(seen, w, columns, not use_bias)[1]
    assert not np.isclose(curve.error[0], other[curve.order[0]], rtol=0.1)  # what an intercept can do is no detail
    plain = cut(channels, group.units[curve.order[:1]])
    assert plain.count_params() < model.count_params()


@pytest.mark.parametrize("samples", (12, 2))
def test_the_first_unit_to_leave_a_convolution_is_that_of_brute_force(samples):
    """With 2 samples there are fewer positions than columns."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5, 5, 3))
    made, norm = layers.Conv2D(7, 3, padding="same", activation="relu"), layers.BatchNormalization()
    reader = layers.Conv2D(4, 3, padding="same", use_bias=False)
    x = layers.ReLU()(norm(reader(made(inputs))))
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    x, channels = normal(samples, 5, 5, 3), Channels(model)
    rows = patches(inputs_at(model, reader, x), 3)
    columns = np.arange(63).reshape(9, 7).T
    cost, error = brute_force(rows, np.array(reader.kernel, np.float64).reshape(63, 4), columns)
    group = group_of(channels, made)
    curve = curves(channels, x, groups=[group], batch_size=16)[0][group.index]
    assert curve.order[0] == cost.argmin()
    assert np.isclose(curve.error[0], error[cost.argmin()], rtol=1e-3)
    wrong = brute_force(rows, np.array(reader.kernel, np.float64).reshape(63, 4), np.arange(63).reshape(7, 9))
    assert not np.isclose(curve.error[0], wrong[1][curve.order[0]], rtol=0.05)


def test_errors_of_several_readers_add_up():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((5,))
    made, one, two = layers.Dense(6, "tanh"), layers.Dense(3), layers.Dense(4)
    x = made(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([one(x), two(x)]))))
    x, channels = normal(200, 5), Channels(model)
    seen, columns = inputs_at(model, one, x).astype(np.float64), np.arange(6)[:, None]
    each = [brute_force(seen, np.array(r.kernel, np.float64), columns) for r in (one, two)]
    group = group_of(channels, made)
    curve = curves(channels, x, groups=[group])[0][group.index]
    first = (each[0][0] + each[1][0]).argmin()
    assert curve.order[0] == first and np.isclose(curve.error[0], each[0][1][first] + each[1][1][first], rtol=1e-3)


# -- what is left out without a trace ----------------------------------------------------------------------------


def combined(model, made, mixture):
    """Let one filter of a layer be a mixture of others."""
    for weight in (made.kernel, made.bias):
        value = np.array(weight)
        value[..., 3] = sum(factor * value[..., k] for k, factor in mixture.items())
        weight.assign(value)
    return model


def linear_convolution():
    inputs = keras.Input((6, 6, 3))
    made = layers.Conv2D(6, 3, padding="same")
    x = layers.Conv2D(5, 3, padding="same", activation="relu")(made(inputs))
    return randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))), made, {0: 2.0, 5: -1.0}


def rectified_twins():
    inputs = keras.Input((6, 6, 3))
    made = layers.Conv2D(6, 3, activation="relu")
    x = layers.MaxPooling2D(2)(made(inputs))
    return randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))), made, {1: 1.0}


def rectified_multiple_between_dense_layers():
    inputs = keras.Input((7,))
    made = layers.Dense(6, activation="relu")
    x = layers.Dense(8, activation="relu")(made(inputs))
    return randomize(keras.Model(inputs, layers.Dense(3)(x))), made, {4: 0.5}


@pytest.mark.parametrize(
    "builder", (linear_convolution, rectified_twins, rectified_multiple_between_dense_layers), ids=lambda f: f.__name__
)
def test_a_unit_that_others_make_up_for_leaves_first_and_without_a_trace(builder):
    keras.utils.set_random_seed(0)
    model, made, mixture = builder()
    combined(model, made, mixture)
    x, channels = normal(400, *model.input_shape[1:]), Channels(model)
    group = group_of(channels, made)
    curve = curves(channels, x, exam_data=x[:50])[0][group.index]
    assert curve.order[0] in (3, *mixture)
    assert curve.error[0] < 2e-2 * curve.error[1] and curve.damage[0] < 5e-2 * curve.damage[1]
    removed = group.units[curve.order[:1]]
    small = reconstruct(channels, removed, x, strength=1e-9)
    assert small.count_params() < model.count_params()
    test = normal(50, *model.input_shape[1:], seed=1)
    assert relative_difference(model, small, test) < 1e-4
    assert relative_difference(model, cut(channels, removed), test) > 1e-2  # the refit did it
    other = group.units[[next(k for k in curve.order if k not in (3, *mixture))]]
    assert relative_difference(model, reconstruct(channels, other, x, strength=1e-9), test) > 1e-2


def test_units_that_are_zero_leave_first_for_nothing():
    model = residual_net((16,))
    x, channels = patterns(32)[0], Channels(model)
    zero(channels, np.concatenate([g.units[2:9] for g in channels.groups]))
    found, _ = curves(channels, x, exam_data=x)
    for curve in found.values():
        assert set(curve.order[:7]) == set(range(2, 9))
        assert curve.error[6] < 1e-9 < curve.error[7]


# -- data and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", (16384, 40))
def test_little_memory_means_several_runs_and_the_same_curves(rows, monkeypatch):
    model, x, channels, *_ = studied("nested_three_deep")
    runs = []
    measured = surgeon._measured
    monkeypatch.setattr(surgeon, "_measured", lambda *a: runs.append(len(a[1])) or measured(*a))
    whole, _ = curves(channels, x, rows=rows)
    assert runs == [4]
    parts, _ = curves(channels, x, rows=rows, memory=2**17)
    assert len(runs) > 2 and sorted(whole) == sorted(parts)
    for k in whole:
        assert np.array_equal(whole[k].order, parts[k].order)
        assert np.allclose(whole[k].error, parts[k].error, rtol=1e-6)


def test_batches_do_not_matter_and_groups_can_be_chosen():
    model, x, channels, found, _ = studied("inverted_residual")
    some, reasons = curves(channels, x, groups=channels.groups[1:2], batch_size=5)
    assert list(some) == [channels.groups[1].index] and not reasons
    assert np.allclose(some[1].error, found[1].error, rtol=1e-4)
    fewer, _ = curves(channels, x[:6], groups=channels.groups[1:2])
    assert not np.allclose(fewer[1].error, found[1].error, rtol=1e-3)


def test_data_that_does_not_fit_or_is_not_finite_is_refused():
    model, x, channels, *_ = studied("sequential_dense")
    with pytest.raises(ValueError, match="expected"):
        curves(channels, normal(8, 11))
    for wrong in (np.nan, np.inf):
        bad = x.copy()
        bad[2, 3] = wrong
        with pytest.raises(ValueError, match="NaN or infinite numbers"):
            curves(channels, bad)


# -- readers at the edge -----------------------------------------------------------------------------------------


def test_what_is_too_wide_is_measured_unit_by_unit(monkeypatch):
    model, x, channels, found, _ = studied("flatten_1d")
    monkeypatch.setattr(surgeon, "WIDE", 10)
    curve = curves(channels, x)[0][0]
    dense = model.layers[-1]
    seen, w = inputs_at(model, dense, x).astype(np.float64), np.array(dense.kernel, np.float64)
    energy = np.square(seen @ w - (seen @ w).mean(0)).sum()
    alone = []
    for unit in range(8):
        part = seen[:, unit::8] @ w[unit::8]
        alone.append(np.square(part - part.mean(0)).sum() / energy)
    assert np.array_equal(curve.order, np.argsort(alone)[:-1])
    assert np.allclose(curve.error, np.cumsum(np.sort(alone))[:-1], rtol=1e-4)
    assert curve.error[0] > 2 * found[0].error[0]  # nobody takes over


def test_all_blocks_of_what_is_too_wide_count(monkeypatch):
    """The second half of a grouped convolution is made ten times as strong."""
    model, _ = ZOO["conv2d_large_groups"]()
    reader = next(layer for layer in model.layers if getattr(layer, "groups", 1) == 2)
    x, channels = example(model, 6), Channels(model)
    kernel = np.array(reader.kernel)
    kernel[..., 6:] *= 10
    reader.kernel.assign(kernel)
    monkeypatch.setattr(surgeon, "WIDE", 10)
    group = channels.groups[0]
    curve = curves(channels, x, groups=[group])[0][0]
    seen, costs = inputs_at(model, reader, x), np.zeros((2, 4))
    for block in range(2):
        rows = patches(seen[..., 4 * block : 4 * block + 4], 3)
        w = kernel[..., 6 * block : 6 * block + 6].reshape(36, 6)
        for unit in range(4):
            costs[block, unit] = np.square(
                (rows[:, unit::4] @ w[unit::4]) - (rows[:, unit::4] @ w[unit::4]).mean(0)
            ).sum()
    order = costs.sum(0).argsort()
    assert np.array_equal(curve.order, order[:-1]) and not np.array_equal(curve.order, costs[0].argsort()[:-1])


def test_too_wide_and_silent_readers_do_not_fail(monkeypatch):
    """A reader whose weights are all zero tells nothing: every unit may leave for nothing."""
    model, x, *_ = studied("flatten_1d")
    silent = keras.models.clone_model(model)
    silent.layers[-1].kernel.assign(silent.layers[-1].kernel * 0)
    for wide in (surgeon.WIDE, 10):
        monkeypatch.setattr(surgeon, "WIDE", wide)
        curve = curves(Channels(silent), x, exam_data=x)[0][0]
        assert not curve.error.any() and np.isfinite(curve.damage).all() and np.isfinite(curve.scores()).all()


def test_a_reader_of_constants_costs_nothing_where_its_bias_makes_up_for_them():
    """Units that are saturated: their values hardly differ, but are far from 0."""
    keras.utils.set_random_seed(0)
    errors = {}
    for use_bias in (True, False):
        inputs = keras.Input((5,))
        made, reader = layers.Dense(6, "sigmoid"), layers.Dense(4, use_bias=use_bias)
        model = keras.Model(inputs, layers.Dense(2)(layers.Activation("relu")(reader(made(inputs)))))
        made.bias.assign(np.array([20.0, 20, 0, 0, 0, 0]))
        channels = Channels(model)
        group = group_of(channels, made)
        errors[use_bias] = curves(channels, normal(200, 5), groups=[group])[0][group.index].error
    assert errors[True][1] < 1e-6 and errors[False][1] > 1e-3


def test_a_pair_of_units_has_a_curve_of_one():
    model, x, channels, found, _ = studied("split_uneven")
    curve = next(c for c in found.values() if len(c.group) == 2)
    assert curve.error.shape == (1,) and curve.error[0] > 0 and curve.damage[0] > 0
    assert curve.scores().shape == (2,)


# -- damage to the output ----------------------------------------------------------------------------------------


class Spy(Damage):
    """Remembers what it is asked."""

    calls: list = []

    def along(self, *arguments):
        result = super().along(*arguments)
        self.calls.append((self, arguments, result))
        return result


@pytest.mark.parametrize("name", ("dense_net", "inverted_residual", "attention_self"))
def test_damage_is_measured_on_a_copy_that_is_as_before_afterwards(name, monkeypatch):
    model, x, channels, *_ = studied(name)
    monkeypatch.setattr(surgeon, "Damage", Spy)
    monkeypatch.setattr(Spy, "calls", [])
    curves(channels, x, exam_data=x)
    spy, arguments, result = Spy.calls[-1]
    assert all(np.array_equal(a, b) for a, b in zip(spy.exam.student.get_weights(), model.get_weights()))
    assert np.array_equal(spy.along(*arguments), result)
    assert result[0] > 0


def test_means_go_into_bias_or_normalisation_and_make_the_damage_smaller(monkeypatch):
    monkeypatch.setattr(surgeon, "Damage", Spy)
    model = randomize(residual_net((16,)))
    x, channels = patterns(32)[0], Channels(model)
    behind_norm = [g for g in channels.groups if any(m.weight.layer.name == "inner0" for m in g.producers)]
    in_front_of_bias = [g for g in channels.groups if any(m.weight.layer.name == "outer0" for m in g.producers)]
    for groups in (behind_norm, in_front_of_bias):
        monkeypatch.setattr(Spy, "calls", [])
        curves(channels, x, groups=groups, exam_data=x)
        spy, (group, done, places, means, error), result = Spy.calls[0]
        without = spy.along(group, done, places, [0 * mean for mean in means], error)
        assert result[-1] < 0.8 * without[-1]


@pytest.mark.parametrize("axis, own", ((-1, True), (1, False)))
def test_only_a_normalisation_of_the_kernels_outputs_can_take_an_intercept(axis, own):
    """Both have 6 means: one for each channel, or one for each row."""
    inputs = keras.Input((6, 6, 3))
    made, reader, norm = (layers.Conv2D(6, 3, padding="same", use_bias=False) for _ in "123")
    norm = layers.BatchNormalization(axis=axis)
    x = layers.ReLU()(norm(reader(made(inputs))))
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    program = Program(model)
    site = next(s for s in sites_of(Channels(model), program) if s.layer is reader)
    assert tail_of(program, site).norm is (norm if own else None)
    data = normal(20, 6, 6, 3)
    found, _ = curves(Channels(model), data, exam_data=data)
    assert len(found) >= 1


def test_a_normalisation_that_is_called_twice_takes_no_intercept():
    inputs = keras.Input((5,))
    norm, one, two = layers.BatchNormalization(), layers.Dense(6, use_bias=False), layers.Dense(6, use_bias=False)
    model = keras.Model(inputs, layers.Dense(2)(norm(one(inputs)) + layers.Activation("relu")(norm(two(inputs)))))
    program = Program(model)
    assert all(tail_of(program, site).norm is None for site in sites_of(Channels(model), program))


# -- plans -------------------------------------------------------------------------------------------------------


@functools.cache
def trained():
    model = randomize(residual_net((12, 16)))
    return model, patterns(32)[0], Channels(model)


@pytest.mark.parametrize("budget", ("uniform", "global"))
def test_a_plan_by_obs_removes_the_units_that_cost_least(budget):
    model, x, channels = trained()
    found, _ = curves(channels, x)
    result = plan(channels, 0.5, criterion="obs", data=x, budget=budget)
    assert 0.4 < result.reached <= result.largest
    for group, line in zip(channels.groups, result.groups):
        order, leaves = found[group.index].order, np.flatnonzero(np.isin(group.units, result.removed))
        assert set(leaves) == set(order[: len(leaves)])
        assert line.highest_removed is None or line.highest_removed <= line.lowest_kept
    assert len({line.after for line in result.groups}) > 1
    assert result.cut().count_params() < model.count_params()


def test_scores_keep_the_order_where_later_units_cost_less():
    """The second unit costs little once the first is gone: it must not leave before it."""
    _, _, channels, found, _ = studied("sequential_dense")
    curve = surgeon.Curve(channels.groups[1], np.array([5, 2, 7, 0, 1, 6, 3]), np.array([3.0, 3.1, 3.2, 9, 9, 9, 20]))
    assert list(curve.scores().argsort(kind="stable")) == [5, 2, 7, 0, 1, 6, 3, 4]
    assert np.allclose(curve.scores()[[5, 2, 7, 0, 1, 6, 3, 4]], [3, 3, 3, 5.8, 5.8, 5.8, 11, 11], rtol=1e-6)


def test_obs_leaves_out_what_is_protected_and_needs_data():
    model, x, channels = trained()
    result = plan(channels, 0.2, criterion="obs", data=x, protect="inner*")
    assert all(line.after == line.before for line in result.groups if "inner0" in line.layers)
    with pytest.raises(ValueError, match="data"):
        plan(channels, 0.2, criterion="obs")


@pytest.mark.parametrize("criterion", ("l2", "obs"))
@pytest.mark.parametrize("budget", ("uniform", "global"))
def test_a_plan_with_reconstruction_is_nearer_than_the_cut_alone(criterion, budget):
    model, x, channels = trained()
    result = plan(channels, 0.4, criterion=criterion, budget=budget, data=x, reconstruct=True)
    bare = cut(channels, result.removed)
    small = result.cut()
    assert small.count_params() == bare.count_params()
    test = patterns(32, seed=1)[0]
    wanted = np.array(model(test))
    assert np.square(np.array(small(test)) - wanted).mean() < 0.5 * np.square(np.array(bare(test)) - wanted).mean()
