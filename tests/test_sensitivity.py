"""Sensitivities: worked numbers, properties, data and memory, saturation, and plans."""

import functools
import itertools
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import Channels, FilterPruning, cli, criteria, plan, sensitivity, strip, theory
from keras_prune.sensitivity import Sensitivity, sensitivities

pytestmark = pytest.mark.filterwarnings("ignore:In .* groups more than half:UserWarning")

A = np.array([[1, 0.5], [2, -1], [0.5, 1]])
A_DATA = np.array([[1, 1, 2], [3, 0, 1]])
B = np.array([[1, 2], [2, 1], [3, 1], [4, 6]])
B_DATA = np.array([[1, 1, 1, 1], [2, 1, 0.5, 0.25]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def group_of(channels, layer):
    return next(g for g in channels.groups if any(m.weight.layer is layer for m in g.producers))


def measured(model, maker, x, **arguments):
    """The sensitivity of the units that a layer makes."""
    channels = Channels(model)
    group = group_of(channels, maker)
    return sensitivities(channels, x, groups=[group], **arguments).groups[group.index]


def of_matrix(x, matrix, bias=0.0, **arguments):
    """The sensitivity of the inputs of a Dense layer with these weights."""
    inputs = keras.Input((len(matrix),))
    maker, reader = layers.Dense(len(matrix), use_bias=False), layers.Dense(matrix.shape[1])
    model = keras.Model(inputs, reader(maker(inputs)))
    maker.kernel.assign(np.eye(len(matrix)))
    reader.kernel.assign(matrix)
    reader.bias.assign(reader.bias + bias)
    return measured(model, maker, np.asarray(x, np.float32), **arguments)


# -- worked numbers ----------------------------------------------------------------------------------------------


def test_a_worked_example_with_both_signs():
    s = of_matrix(A_DATA, A).scores
    assert np.allclose(s, (6 / 7, 1, 0.8), atol=1e-6) and s.sum() == pytest.approx(2.657143, abs=1e-6)
    assert np.allclose(s / s.sum(), (0.322581, 0.376344, 0.301075), atol=1e-6)
    assert np.allclose(of_matrix(A_DATA, np.maximum(A, 0)).scores, (6 / 7, 0.5, 0.8), atol=1e-6)


def test_a_worked_example_of_draws():
    s = of_matrix(B_DATA, B).scores
    assert np.allclose(s, (0.571429, 0.307692, 0.3, 0.6), atol=1e-6) and s.sum() == pytest.approx(1.779121, abs=1e-6)
    p = s / s.sum()
    assert np.allclose(p, (0.321186, 0.172946, 0.168623, 0.337245), atol=1e-6)
    assert theory.expected_distinct(p, 4) == pytest.approx(2.649117, abs=1e-6)
    factors = theory.multipliers(p, (2, 1, 0, 1))
    assert np.allclose(B_DATA[0] @ (factors[:, None] * B), (7.413004, 9.006799), atol=1e-5)
    assert np.allclose(B_DATA[0] @ B, (10, 10))
    mean = np.zeros(B.shape)
    for pair in itertools.product(range(4), repeat=2):
        mean += np.prod(p[list(pair)]) * theory.multipliers(p, np.bincount(pair, minlength=4))[:, None] * B
    assert np.abs(mean - B).max() < 4e-15


def test_the_mean_share_is_that_of_all_sums_that_are_not_zero():
    found = of_matrix(A_DATA, A)
    plus = np.array([[1 / 4, 2 / 4, 1 / 4], [0.5 / 2.5, 0, 2 / 2.5], [3 / 3.5, 0, 0.5 / 3.5], [1.5 / 2.5, 0, 1 / 2.5]])
    minus = np.array([[0, 1, 0]])  # of the other three negative sums nobody has a share
    assert np.allclose(found.mean, np.concatenate([plus, minus]).mean(0), atol=1e-6)
    assert found.samples == 2 and found.saturated == pytest.approx(1 / 3)


# -- properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_changes_nothing_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    n, outs, samples = rng.integers((9, 2, 2), (20, 4, 4))
    matrix, x = rng.normal(size=(n, outs)), rng.normal(size=(samples, n)) * (rng.random((samples, n)) < 0.8)
    found = of_matrix(x, matrix)
    assert found.saturated < 0.5 and 1 <= found.scores.sum() + 1e-6 and found.mean.sum() == pytest.approx(1, abs=1e-5)
    scaled = matrix * np.where(np.arange(outs) == 0, 37.0, 1)
    order = rng.permutation(samples)
    for other in (
        of_matrix(x, scaled),
        of_matrix(0.02 * x, matrix),
        of_matrix(x, matrix, bias=5),
        of_matrix(x[order], matrix),
        of_matrix(-x, matrix),
        of_matrix(x, -matrix),
    ):
        assert np.allclose(other.scores, found.scores, atol=1e-6) and np.allclose(other.mean, found.mean, atol=1e-6)
    more = of_matrix(np.concatenate([x, rng.normal(size=(20, n))]), matrix).scores
    assert (more >= found.scores - 1e-6).all() and more.sum() > found.scores.sum()
    shuffled = rng.permutation(n)
    assert np.allclose(of_matrix(x[:, shuffled], matrix[shuffled]).scores, found.scores[shuffled], atol=1e-6)


def test_of_sums_that_are_next_to_nothing_nobody_has_a_share():
    tiny = np.array([[1e-8, 0], [5e-8, 0], [0, 1]])
    found = of_matrix([[1, 1, 1]], tiny)
    assert found.scores.tolist() == [0, 0, 1] and found.mean.tolist() == [0, 0, 1]
    assert of_matrix([[10, 10, 10]], tiny).scores == pytest.approx([1 / 6, 5 / 6, 1])
    silent = of_matrix(np.zeros((3, 3)), tiny)
    assert not silent.scores.any() and not silent.mean.any() and silent.saturated == 0


# -- data, chunks, precision -------------------------------------------------------------------------------------


@functools.cache
def trained():
    model = randomize(residual_net((12, 16)))
    return model, patterns(24)[0], Channels(model)


@pytest.mark.parametrize("reduction", sensitivity.REDUCTIONS)
@pytest.mark.parametrize(
    "arguments, block, shape",
    [
        ({"batch_size": 7}, 2**17, (252, 32)),
        ({}, 300, (864, 32)),
        ({"memory": 2**16}, 300, (96, 14)),
        ({"memory": 1, "data": patterns(1)[0]}, 300, (1, 2)),
        ({"data": patterns(24)[0][::-1]}, 2**17, (864, 32)),
    ],
)
def test_neither_batches_nor_memory_nor_the_order_matter(arguments, block, shape, reduction, monkeypatch):
    """Shape: rows and sums that are looked at together at most, sums being outputs by sign."""
    model, x, channels = trained()
    if arguments.get("memory") == 1:  # which takes long
        x, arguments = arguments["data"], {"memory": 1}
    arguments = {"data": x, "kernel_reduction": reduction, **arguments}
    whole = sensitivities(channels, x, kernel_reduction=reduction)
    seen, take = [], sensitivity._Reader.take
    monkeypatch.setattr(
        sensitivity._Reader, "take", lambda self, b, r, w: seen.append((len(r), w.shape[1])) or take(self, b, r, w)
    )
    monkeypatch.setattr(sensitivity, "BLOCK", block)
    other = sensitivities(channels, **arguments)
    assert np.all(np.max(seen, axis=0) <= shape)
    for k, s in whole.groups.items():
        assert np.abs(s.scores - other.groups[k].scores).max() < 1e-6
        assert np.abs(s.mean - other.groups[k].mean).max() < 1e-6


def test_memory_is_bounded():
    inputs = keras.Input((16, 16, 32))
    maker, reader = layers.Conv2D(32, 1), layers.Conv2D(64, 3, padding="same")
    model = keras.Model(inputs, reader(maker(inputs)))
    x, peaks = normal(8, 16, 16, 32), {}
    for memory in (2**20, 2**27):
        tracemalloc.start()
        measured(model, maker, x, memory=memory)
        peaks[memory] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    beside = 6 * x.nbytes + 4 * 9 * 32 * 64 * 4  # values of the batch, padded ones, the kernel
    assert peaks[2**20] < 2**20 + beside < peaks[2**27] < 2**27 + beside


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"kernel_reduction": "mean"}, "expected 'sum'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"memory": 1.5}, "memory=1.5"),
        ({"memory": True}, "memory=True"),
        ({"data": normal(3, 9)}, "expected"),
        ({"data": np.full((3, 12, 12, 3), np.nan, "float32")}, "NaN or infinite"),
        ({"data": np.full((3, 12, 12, 3), -np.inf, "float32")}, "NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, what):
    model, x, channels = trained()
    with pytest.raises(ValueError, match=what):
        sensitivities(channels, **{"data": x[:3], **arguments})


def test_a_model_will_do_and_a_progress_bar_may_be_shown(capsys):
    model, x, channels = trained()
    found, same = sensitivities(model, x[:4], progress=True), sensitivities(channels, x[:4])
    assert "sensitivities" in capsys.readouterr().out
    assert (found.samples, found.kernel_reduction, found.notes) == (4, "sum", {})
    assert all(np.array_equal(found.groups[k].scores, same.groups[k].scores) for k in same.groups)


# -- saturation --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_warning_says_where_more_than_half_of_the_units_are_saturated():
    with pytest.warns(UserWarning, match=r"In 1 of 1 groups more than half .* dense\w* \(100%\)"):
        found = of_matrix(np.eye(4), normal(4, 3))  # each unit is once alone
    assert found.saturated == 1
    assert of_matrix(np.concatenate([np.eye(4)[:2], np.ones((1, 4))]), np.ones((4, 3))).saturated == 0.5


def test_saturated_units_are_told_apart_by_their_mean_share():
    group = Channels(residual_net((16,))).groups[0]
    s = np.array([0.2, 1, 0.9995, 0.999, 0.9991, 0])
    mean = np.array([0.9, 0.1, 0.3, 0.5, 0.2, 0])
    ranking = Sensitivity(group, s, mean, 1).ranking()
    assert ranking.argsort().tolist() == [5, 0, 3, 1, 4, 2]
    assert np.array_equal(ranking[[0, 3, 5]], s[[0, 3, 5]]) and (ranking <= 1).all()


# -- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure, budget",
    [("macs", "uniform"), ("macs", "global"), ("params", "global"), ("memory", "uniform"), ("units", "global")],
)
def test_a_plan_by_pfp_removes_the_least_sensitive_units(budget, measure):
    model, x, channels = trained()
    found = sensitivities(channels, x)
    result = plan(channels, 0.35, measure=measure, criterion="pfp", data=x, budget=budget, round_to=1)
    assert abs(result.reached - 0.35) < 0.05 and "by pfp" in result.sentence
    for group, line in zip(channels.groups, result.groups):
        leaves, ranking = np.isin(group.units, result.removed), found.groups[group.index].ranking()
        if leaves.any():
            assert ranking[leaves].max() <= ranking[~leaves].min()
            assert line.highest_removed == pytest.approx(ranking[leaves].max())
    assert result.cut().count_params() < model.count_params()


def test_plans_are_decided_by_the_mean_share_where_units_are_saturated():
    """Each of 8 units is once alone; those that are seldom there leave."""
    often = np.repeat(np.eye(8, dtype="float32"), [1, 5, 2, 6, 3, 7, 4, 8], axis=0)
    inputs = keras.Input((8,))
    maker, reader = layers.Dense(8, use_bias=False), layers.Dense(3)
    model = keras.Model(inputs, reader(maker(inputs)))
    maker.kernel.assign(np.eye(8))
    channels = Channels(model)
    result = plan(channels, 0.5, criterion="pfp", data=often, measure="units", round_to=1)
    group = group_of(channels, maker)
    assert np.flatnonzero(np.isin(group.units, result.removed)).tolist() == [0, 2, 4, 6]


def test_pfp_leaves_out_what_is_protected_or_gone_and_needs_data():
    model, x, channels = trained()
    result = plan(channels, 0.2, criterion="pfp", data=x, protect="inner*", round_to=1)
    assert all(line.after == line.before for line in result.groups if "inner0" in line.layers)
    gone = channels.groups[0].units[:3]
    again = plan(channels, 0.3, criterion="pfp", data=(x, np.zeros(len(x))), already=gone, round_to=1)
    assert np.isin(gone, again.removed).all()
    with pytest.raises(ValueError, match="needs data"):
        plan(channels, 0.2, criterion="pfp")
    with pytest.raises(ValueError, match="Known: .*obs, pfp, pfp_max, random"):
        criteria.get("pfd")
    model, _ = ZOO["gru"]()
    with pytest.raises(ValueError, match=r"Nothing is left .*\(GRU\).*\(GRU\).*itself, from one step to the next"):
        plan(model, 0.2, criterion="pfp", data=example(model, 5), round_to=1)


def test_a_plan_by_pfp_can_be_reconstructed():
    model, x, channels = trained()
    bare, fitted = (plan(channels, 0.3, criterion="pfp", data=x, reconstruct=r) for r in (False, True))
    assert np.array_equal(bare.removed, fitted.removed)
    wanted = np.array(model(x))
    errors = [np.square(np.array(p.cut()(x)) - wanted).mean() for p in (bare, fitted)]
    assert errors[1] < 0.5 * errors[0]


def test_filters_are_pruned_by_pfp_while_the_model_trains():
    model, (x, y) = compiled("adam"), patterns(64)
    pruner = FilterPruning({0: 0.2, 2: 0.5}, criterion="pfp", data=x[:16])
    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[pruner]).history
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.1)
    assert strip(model).count_params() < 0.8 * model.count_params()


@pytest.mark.parametrize("command", ("plan", "prune"))
def test_the_command_says_that_pfp_needs_data(command, tmp_path, capsys):
    residual_net((8,)).save(tmp_path / "model.keras")
    rest = [str(tmp_path / "small.keras")] if command == "prune" else []
    code = cli.main([command, str(tmp_path / "model.keras"), *rest, "--criterion", "pfp"])
    error = capsys.readouterr().err
    assert code == 2 and "criterion='pfp', data=x" in error and "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


def test_no_warning_where_the_units_can_be_told_apart():
    model, x, channels = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = sensitivities(channels, x, groups=channels.groups[:1])
    assert found.groups[0].saturated <= 0.5
