"""Provable Filter Pruning: widths by one bound, units that are drawn, and rounds of pruning and retraining in fit."""

import functools
import itertools
import json
import math
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import Channels, ProvablePruning, budgets, cut, dead_units, metrics, plan, planning, strip, theory
from keras_prune import provable as module
from keras_prune.sensitivity import sensitivities
from keras_prune.surgery import reader_factors, relative_difference

pytestmark = pytest.mark.filterwarnings("ignore:In .* groups more than half:UserWarning")

LAYERS = ("first", "second", "hidden")


@functools.cache
def chain():
    """A plain line of three groups, and inputs."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(12, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="second")(x)
    x = layers.Dense(24, "relu", name="hidden")(layers.Flatten()(x))
    model = randomize(keras.Model(inputs, layers.Dense(5, name="out")(x)))
    return model, np.random.default_rng(0).normal(size=(60, 10, 10, 3)).astype("float32"), Channels(model)


def width_of(result, layer):
    return next(g.after for g in result.groups if layer in g.layers)


def widths(result):
    return [width_of(result, name) for name in LAYERS]


def scores_by_layer(channels, x):
    found = sensitivities(channels, x).groups.values()
    return {s.group.name: s.ranking() for s in found}


# -- budget="error_bound" ------------------------------------------------------------------------------------------

EVENTS = {"first": (9 + 1) * 9, "second": (1 + 1) * 9, "hidden": (1 + 1) * 1}
"""(positions + 1) x taps of what reads each layer: 3 x 3 positions of the strided convolution; 9 places behind
Flatten, all at once; Dense."""


def allocated(scores, scale, delta=1e-16):
    """Distinct channels that are expected of m = ceil(c S L) draws, L = ln(8 (P + 1) taps / delta)."""
    found = []
    for name in LAYERS:
        s = scores[name]
        m = math.ceil(scale * s.sum() * math.log(8 * EVENTS[name] / delta))
        found.append(max(1, math.ceil(sum(1 - (1 - p) ** m for p in s / s.sum()) - 1e-9)))
    return found


def params_of(first, second, hidden):
    return 28 * first + (9 * first + 1) * second + (9 * second + 1) * hidden + (hidden + 1) * 5


@pytest.mark.parametrize("delta", (1e-16, 0.5))
@pytest.mark.parametrize("sparsity", (0.1, 0.35, 0.6, 0.85, 0.95))
def test_widths_are_those_of_the_allocation_written_down(sparsity, delta):
    """The largest scale c whose network is not too large, and the smallest whose is: the widths lie between."""
    model, x, channels = chain()
    scores = scores_by_layer(channels, x[:30])
    result = plan(
        channels,
        sparsity,
        measure="params",
        criterion="pfp",
        data=x[:30],
        budget="error_bound",
        round_to=1,
        delta=delta,
    )
    assert model.count_params() == params_of(12, 16, 24) and "30 samples" in result.sentence
    allowed = (1 - sparsity) * params_of(12, 16, 24)
    low, high = math.log(1e-12), math.log(1e12)
    for _ in range(200):
        middle = (low + high) / 2
        fits = params_of(*allocated(scores, math.exp(middle), delta)) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    below, above = (allocated(scores, math.exp(c), delta) for c in (low, high))
    assert all(b <= w <= a for b, w, a in zip(below, widths(result), above))
    assert sum(a - b for a, b in zip(above, below)) <= 3  # the scale is met exactly
    uniform = plan(channels, sparsity, measure="params", criterion="pfp", data=x[:30], budget="uniform", round_to=1)
    if 0.3 < sparsity < 0.9:
        assert not all(b <= w <= a for b, w, a in zip(below, widths(uniform), above))  # it is not what others give


def dearest_channel(channels, measure, removed):
    """What the largest layer's next single channel is worth, as a share of all."""
    now, worth = measure(channels, removed), []
    for group in channels.groups:
        stays, leaves = np.setdiff1d(group.units, removed), np.intersect1d(group.units, removed)
        if len(stays) > 1:
            worth.append(now - measure(channels, np.append(removed, stays[0])))
        if len(leaves):
            worth.append(measure(channels, np.setdiff1d(removed, leaves[:1])) - now)
    return max(worth) / measure(channels, ())


@pytest.mark.parametrize("measure", ("params", "macs"))
@pytest.mark.parametrize("criterion", ("pfp", "l2"))
def test_widths_never_grow_with_the_sparsity_and_the_size_is_met(criterion, measure):
    model, x, channels = chain()
    residual = residual_net((12, 16))
    for network, data in ((channels, x[:20]), (Channels(residual), patterns(20)[0])):
        before = [len(g) for g in network.groups]
        for sparsity in np.linspace(0, 0.95, 20):
            result = plan(
                network, sparsity, measure=measure, criterion=criterion, data=data, budget="error_bound", round_to=1
            )
            now = [g.after for g in result.groups]
            assert all(1 <= n <= b for n, b in zip(now, before)), (sparsity, before, now)
            before = now
            gap = abs(result.reached - min(sparsity, result.largest))
            half = dearest_channel(network, metrics.get(measure), result.removed) / 2
            assert gap <= max(0.005, half + 1e-9), sparsity  # one scale for all: what moves is one channel of any layer
    small = result.cut()
    if measure == "params":
        assert small.count_params() == pytest.approx((1 - result.reached) * residual.count_params())
    else:
        assert metrics.macs(Channels(small)) == pytest.approx((1 - result.reached) * metrics.macs(network))


def test_a_factor_of_all_logarithms_changes_nothing_and_of_one_it_does(monkeypatch):
    rng = np.random.default_rng(0)
    scores, logs = [rng.uniform(0, 1, n) for n in (9, 16, 30)], [30.0, 41.5, 44.0]

    def kept(scale, logarithms):
        removed = budgets.error_bound(scores, 1 / (1 + math.sqrt(scale)), logarithms)
        return [int((~r).sum()) for r in removed]

    grid = np.exp(rng.uniform(-9, 0, 200))
    assert all(kept(c, logs) == kept(c / 7, [7 * v for v in logs]) for c in grid)
    assert any(kept(c, logs) != kept(c, [90.0, *logs[1:]]) for c in grid)
    model, x, channels = chain()
    asked = dict(measure="params", criterion="l2", budget="error_bound", round_to=1)
    plans, own = [], planning.logarithms
    for change in (lambda v: v, lambda v: [1000 * a for a in v], lambda v: [30 * v[0], *v[1:]]):
        monkeypatch.setattr(planning, "logarithms", lambda *given, c=change: c(own(*given)))
        plans.append([widths(plan(channels, s, **asked)) for s in (0.3, 0.6, 0.9)])
    assert plans[0] == plans[1] != plans[2]


def test_delta_changes_widths_where_readers_differ_and_only_there():
    asked = dict(measure="params", criterion="l2", budget="error_bound", round_to=1)
    _, _, channels = chain()
    found = [[widths(plan(channels, s, delta=d, **asked)) for s in (0.2, 0.4, 0.6, 0.8)] for d in (1e-300, 1 - 1e-9)]
    assert found[0] != found[1]
    assert any(a[0] < b[0] for a, b in zip(*found))  # the first layer's reader has most positions and taps
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((7,))
    for n in (12, 20, 16):
        x = layers.Dense(n, "relu")(x)
    channels = Channels(keras.Model(inputs, layers.Dense(3)(x)))
    for sparsity in (0.2, 0.4, 0.6, 0.8):
        tiny, large = (plan(channels, sparsity, delta=d, **asked) for d in (1e-300, 1 - 1e-9))
        assert np.array_equal(tiny.removed, large.removed)


@pytest.mark.parametrize(
    "criterion",
    ("l1", "l2", "linf", "fpgm", "bn_scale", "taylor", "random", "obs", "pfp", "pfp_max", "hrank", "thinet"),
)
def test_every_criterion_will_do(criterion):
    model, (x, y) = compiled(widths=(8, 12)), patterns(16)
    data = {"taylor": (x, y), **dict.fromkeys(("obs", "pfp", "pfp_max", "hrank", "thinet"), x)}.get(criterion)
    result = plan(
        randomize(model),
        0.4,
        measure="params",
        criterion=criterion,
        data=data,
        budget="error_bound",
        round_to=1,
        seed=0,
    )
    assert abs(result.reached - 0.4) < 0.03 and "error_bound budget" in result.sentence
    for line in result.groups:
        assert line.after >= 1 and (line.highest_removed is None or line.highest_removed <= line.lowest_kept)


def test_scores_below_zero_are_refused():
    _, _, channels = chain()
    asked = dict(budget="error_bound", round_to=1)
    with pytest.raises(ValueError, match="error_bound.* scores from -.*expected numbers from 0 up.*budget='global'"):
        plan(channels, 0.4, criterion=lambda rows: rows.sum(1), **asked)
    gone = channels.groups[0].units[:2]
    with pytest.raises(ValueError, match=r"scores from -\d"):  # not from -inf, which is what units that are gone have
        plan(channels, 0.4, criterion=lambda rows: rows.sum(1), already=gone, **asked)
    assert plan(channels, 0.4, criterion=lambda rows: np.abs(rows.sum(1)), already=gone, **asked).reached > 0.3


def test_nothing_asked_keeps_all_and_equal_scores_are_shared_out():
    model, x, channels = chain()
    for mode in theory.MODES:
        result = plan(channels, 0.0, criterion="pfp", data=x[:9], budget="error_bound", round_to=1, mode=mode)
        assert widths(result) == [12, 16, 24] and not len(result.removed) and not result.drawn
        assert relative_difference(model, result.cut(), x[:4]) < 1e-6
    equal = budgets.error_bound([np.full(8, 3.0), np.full(8, 3.0)], 0.6)
    assert equal[0].sum() == equal[1].sum() > 0
    result = plan(
        channels, 0.5, measure="units", criterion=lambda rows: np.ones(len(rows)), budget="error_bound", round_to=1
    )
    assert result.reached == pytest.approx(0.5, abs=0.5 / 52 + 1e-9)
    alive = [budgets.error_bound([np.full(30, 0.1)], a)[0].sum() for a in np.linspace(0, 1, 400)]
    assert alive == sorted(alive) and set(range(26)) <= set(alive)  # nearly every width can be had


def test_units_that_say_nothing_leave_first():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    one, two = layers.Dense(12, "relu", name="one"), layers.Dense(10, "relu", name="two")
    model = keras.Model(inputs, layers.Dense(3)(two(one(inputs))))
    one.bias.assign(np.where(np.arange(12) % 3 == 0, -1e3, 0.5))
    two.bias.assign(np.where(np.arange(10) % 5 == 1, -1e3, 0.5))
    channels, x = Channels(model), np.random.default_rng(0).normal(size=(30, 6)).astype("float32")
    dead = {*channels.groups[0].units[::3].tolist(), *channels.groups[1].units[1::5].tolist()}
    asked = dict(measure="units", criterion="pfp", data=x, budget="error_bound", round_to=1)
    for many in (1, 3, 6, 9):
        for mode in theory.MODES:
            result = plan(channels, many / 22, mode=mode, seed=0, **asked)
            gone = set(result.removed.tolist())
            if mode == "deterministic":
                assert len(gone) == many and (gone <= dead if many <= 6 else gone > dead)
            elif many > 6:
                assert gone >= dead  # what has no share cannot be drawn
            assert relative_difference(result.zero(), result.cut(), x) < 1e-6
    assert relative_difference(model, plan(channels, 6 / 22, **asked).cut(), x) < 1e-6


# -- units that are drawn ------------------------------------------------------------------------------------------


class Given:
    """A generator whose draws are known."""

    def __init__(self, counts):
        self.counts = np.asarray(counts)

    def multinomial(self, m, q):
        return self.counts


@pytest.mark.parametrize("mode", ("random", "mixed"))
@pytest.mark.parametrize(
    "p, distinct",
    [((0.6, 0.2, 0.1, 0.1), 2), ((0.4, 0.3, 0.2, 0.1), 3), ((0.55, 0.3, 0.05, 0.05, 0.05), 2), ((0.5, 0.5), 1)],
)
def test_over_all_draws_multipliers_are_one_on_average(p, distinct, mode):
    p = np.array(p)
    first = theory.draw(p, distinct, mode, np.random.default_rng(0))
    mean, unweighted, total = np.zeros(len(p)), np.zeros(len(p)), 0.0
    for places in itertools.product(range(len(p)), repeat=first.draws):
        chance = float(np.prod(first.probabilities[list(places)]))
        if not chance:
            continue
        found = theory.draw(p, distinct, mode, Given(np.bincount(places, minlength=len(p))))
        assert np.array_equal(found.sure, first.sure) and found.draws == first.draws
        assert (found.multipliers[found.sure] == 1).all() and (found.multipliers >= 0).all()
        mean += chance * found.multipliers
        unweighted += chance * (found.multipliers > 0)
        total += chance
    assert total == pytest.approx(1) and np.abs(mean - 1).max() < 1e-9
    assert np.abs(unweighted - 1).max() > 0.1  # the control: units that stay as they are do not make up for the others
    assert unweighted.sum() >= distinct - 1e-9  # so many are expected
    if mode == "mixed" and p[0] >= 0.5 and distinct > 1:
        assert first.sure[0] and first.draws < theory.draw(p, distinct, "random").draws


@functools.cache
def wide():
    """40 units, two readers of two outputs each; scores are taken once."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    x = layers.Dense(40, "softplus", name="units")(inputs)
    model = keras.Model(inputs, [layers.Dense(2, name="left")(x), layers.Dense(2, name="right")(x)])
    data = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    channels = Channels(model)
    return channels, data, sensitivities(channels, data).groups[0]


def plans(monkeypatch, seeds, sparsity, mode):
    channels, data, found = wide()
    known = {found.group.index: found.ranking()}
    monkeypatch.setitem(planning.READERS, "pfp", lambda *given: (known, {}, len(data)))
    for seed in range(seeds):
        yield plan(channels, sparsity, measure="units", criterion="pfp", data=data, mode=mode, seed=seed, round_to=1)


def units_of_sums():
    """What each unit of `wide` adds to all sums, by signs: (sums, 40), and the sums."""
    channels, data, found = wide()
    model = channels.model
    seen = np.array(model.get_layer("units")(data), np.float64)
    kernels = [np.array(model.get_layer(name).kernel, np.float64) for name in ("left", "right")]
    parts = [np.maximum(sign * k, 0) for k in kernels for sign in (1, -1)]
    terms = np.concatenate([(seen[:, :, None] * part[None]).transpose(0, 2, 1).reshape(-1, 40) for part in parts])
    return terms[terms.sum(1) > 1e-6], found.scores


@pytest.mark.parametrize("mode", ("random", "mixed"))
def test_over_many_plans_all_sums_stay_what_they_are_on_average(mode, monkeypatch):
    terms, _ = units_of_sums()
    factors = np.array([p.multipliers()[1:] for p in plans(monkeypatch, 600, 0.5, mode)])
    kept = (factors > 0).astype(float)

    def worst(values):
        made = values @ (terms / terms.sum(1, keepdims=True)).T
        return (np.abs(made.mean(0) - 1) / (made.std(0) / math.sqrt(len(made)) + 1e-12)).max()

    assert worst(factors) < 4.5 < 15 < worst(kept)
    assert kept.sum(1).mean() == pytest.approx(20, abs=0.5) and kept.sum(1).std() > 0.5
    if mode == "mixed":
        assert (kept.mean(0) == 1).any()


@pytest.mark.parametrize("mode", ("random", "mixed"))
def test_of_twenty_thousand_draws_the_mean_is_one(mode, monkeypatch):
    [result] = plans(monkeypatch, 1, 0.6, mode)
    [draw] = result.drawn.values()
    scores = wide()[2].ranking()
    counts = np.random.default_rng(3).multinomial(draw.draws, draw.probabilities, 20_000)
    factors = np.array([theory.multipliers(draw.probabilities, c) for c in counts]) + draw.sure
    again = theory.draw(scores / scores.sum(), 16, mode, Given(counts[0]))  # which is what a plan's draws are
    assert np.allclose(again.multipliers, factors[0]) and np.array_equal(again.sure, draw.sure)
    free = ~draw.sure
    error = factors[:, free].std(0) / math.sqrt(len(factors))
    assert (np.abs(factors[:, free].mean(0) - 1) < 4.5 * error).all()
    assert (np.abs((factors[:, free] > 0).mean(0) - 1) > 20 * error).any()
    assert (factors[:, draw.sure] == 1).all()
    assert draw.draws == theory.draws_for(draw.probabilities, 16 - draw.sure.sum())


def test_sums_of_drawn_plans_are_wrong_more_rarely_than_promised(monkeypatch):
    terms, scores = units_of_sums()
    shares = terms / terms.sum(1, keepdims=True)
    made, draws = [], set()
    for result in plans(monkeypatch, 500, 0.05, "random"):
        made.append(np.abs(shares @ result.multipliers()[1:] - 1).max())
        draws.add(next(iter(result.drawn.values())).draws)
    [m] = draws
    for delta in (0.9, 0.5, 0.1):
        epsilon = theory.bernstein_certificate(m, float(scores.sum()), delta, events=len(shares), k=1)
        assert epsilon < 1.5 and (np.array(made) > epsilon).mean() <= delta
    assert (np.array(made) > epsilon / 4).mean() > 0.5  # the draws do differ


# What reads what: name -> model, and by name of the layer that reads: (attribute, axis, which unit each index is).


def two_heads():
    inputs = keras.Input((6,))
    x = layers.Dense(8, "relu")(inputs)
    model = keras.Model(inputs, [layers.Dense(3, name="r0")(x), layers.Dense(2, name="r1")(x)])
    return model, {"r0": ("kernel", 0, np.arange(8)), "r1": ("kernel", 0, np.arange(8))}, ()


def concatenated():
    inputs = keras.Input((6,))
    x = layers.Dense(8, "relu", name="units")(inputs)
    x = layers.Concatenate()([inputs, x])
    return keras.Model(inputs, layers.Dense(3, name="r0")(x)), {"r0": ("kernel", 0, np.arange(14) - 6)}, ()


def residual_sum():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="r0")(x)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Add()([x, y])))
    model = keras.Model(inputs, layers.Dense(3, name="r1")(layers.GlobalAveragePooling2D()(x)))
    return model, {"r0": ("kernel", 2, np.arange(8)), "r1": ("kernel", 0, np.arange(8))}, ()


def depthwise_between():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3)(inputs)
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2, name="deep")(x))
    model = keras.Model(inputs, layers.Conv2D(3, 1, name="r0")(x))
    return model, {"r0": ("kernel", 2, np.repeat(np.arange(8), 2))}, (("deep", "kernel", 2),)


def separable():
    inputs = keras.Input((6, 6, 3))
    x = layers.SeparableConv2D(3, 3, depth_multiplier=2, name="r0")(layers.Conv2D(8, 3)(inputs))
    where = {"r0": ("pointwise_kernel", 2, np.repeat(np.arange(8), 2))}
    return keras.Model(inputs, x), where, (("r0", "depthwise_kernel", 2),)


def separable_over_time():
    inputs = keras.Input((2, 6, 6, 3))
    x = layers.TimeDistributed(layers.Conv2D(8, 3))(inputs)
    x = layers.TimeDistributed(layers.SeparableConv2D(3, 3), name="r0")(x)
    where = {"r0": ("layer.pointwise_kernel", 2, np.arange(8))}
    return keras.Model(inputs, x), where, (("r0", "layer.depthwise_kernel", 2),)


def flattened():
    inputs = keras.Input((6, 6, 3))
    x = layers.Flatten()(layers.Conv2D(8, 3, activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="r0")(x)), {"r0": ("kernel", 0, np.arange(128) % 8)}, ()


def grouped():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(16, 3, activation="relu")(inputs)
    model = keras.Model(inputs, layers.Conv2D(6, 2, groups=2, name="r0")(x))
    return model, {"r0": ("kernel", 2, np.arange(8))}, ()


def transposed():
    inputs = keras.Input((5, 5, 3))
    x = layers.Conv2D(8, 3, activation="relu")(inputs)
    return keras.Model(inputs, layers.Conv2DTranspose(3, 2, 2, name="r0")(x)), {"r0": ("kernel", 3, np.arange(8))}, ()


def shared_twice():
    inputs = keras.Input((6,))
    reader, x = layers.Dense(3, name="r0"), layers.Dense(8, "relu")(inputs)
    return keras.Model(inputs, [reader(x), reader(x * 2.0)]), {"r0": ("kernel", 0, np.arange(8))}, ()


WIRINGS = (
    two_heads,
    concatenated,
    residual_sum,
    depthwise_between,
    separable,
    separable_over_time,
    flattened,
    grouped,
    transposed,
    shared_twice,
)


def attribute(layer, path):
    for name in path.split("."):
        layer = getattr(layer, name)
    return np.array(layer)


@pytest.mark.parametrize("mode", ("random", "mixed"))
@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda w: w.__name__)
def test_everything_that_reads_a_drawn_unit_is_multiplied_once(wiring, mode):
    keras.utils.set_random_seed(0)
    model, readers, beside = wiring()
    randomize(model)
    channels, x = Channels(model), example(model, 12)
    group = max(channels.groups, key=len)
    assert len(group) == 8
    result = plan(
        channels, 0.5, measure="units", criterion="pfp", data=x, mode=mode, seed=2, round_to=1, budget="uniform"
    )
    factors = result.multipliers()[group.units]
    assert group.index in result.drawn and (factors == 0).any() and ((factors != 0) & (factors != 1)).any()
    zeroed = result.zero()
    for name, (path, axis, units) in readers.items():
        kernel, made = (attribute(m.get_layer(name), path) for m in (model, zeroed))
        line = np.where(units < 0, 1.0, factors[units]).reshape([-1 if a == axis else 1 for a in range(kernel.ndim)])
        if (wiring, name) == (residual_sum, "r0"):  # it makes the units, too
            line = line * (factors > 0)
        assert np.allclose(made, kernel * line, rtol=1e-6, atol=1e-7), name
    for name, path, axis in beside:  # these lose what left, and are not multiplied
        kernel, made = (np.moveaxis(attribute(m.get_layer(name), path), axis, 0) for m in (model, zeroed))
        assert np.array_equal(made[factors != 0], kernel[factors != 0]) and not made[factors == 0].any()
    assert relative_difference(zeroed, result.cut(), x) < 1e-5
    assert all(np.array_equal(a, b) for a, b in zip(wiring_weights(model), wiring_weights(channels.model)))
    again, other = (
        plan(channels, 0.5, measure="units", criterion="pfp", data=x, mode=mode, seed=s, round_to=1, budget="uniform")
        for s in (2, 3)
    )
    assert np.array_equal(again.multipliers(), result.multipliers())
    assert not np.array_equal(other.multipliers(), result.multipliers())


def wiring_weights(model):
    return model.get_weights()


ZOO_KINDS = (
    "resnet_option_a_ops",
    "densely_connected",
    "inverted_residual",
    "squeeze_and_excite_dense",
    "conv2d_small_groups",
    "vit",
    "attention_cross",
    "nested_model_twice",
    "two_in_two_out_by_name",
    "sequential_dense",
    "split_uneven",
)


@pytest.mark.parametrize("name", [name for name in ZOO_KINDS if name in ZOO])
def test_drawn_and_cut_equals_drawn_and_zeroed(name):
    model, _ = ZOO[name]()
    x = example(model, 8)
    result = plan(model, 0.4, measure="units", criterion="pfp", data=x, mode="random", seed=0, round_to=1)
    assert len(result.removed) and result.drawn and "units drawn (random)" in result.sentence
    assert relative_difference(result.zero(), result.cut(), x) < 1e-5
    bare = cut(result.channels, result.removed)
    assert relative_difference(result.zero(), bare, x) > 1e-3  # the control: not reweighed


def test_cells_that_read_each_other_are_not_drawn():
    """A recurrent kernel reads its own cells, and nothing says what shares they have in it, nor multiplies it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 3))
    x = layers.Dense(12, "softplus", name="units")(layers.LSTM(8, name="memory")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(x))
    x = np.random.default_rng(0).normal(size=(10, 5, 3)).astype("float32")
    result = plan(
        model, 0.4, measure="units", criterion="pfp", data=x, mode="random", seed=0, round_to=1, budget="uniform"
    )
    names = [result.channels.groups[index].name for index in result.drawn]
    kernels = [np.array(m.get_layer("memory").cell.recurrent_kernel) for m in (model, result.zero())]
    assert "units" in names
    assert "memory" not in names or not np.array_equal(kernels[0][kernels[1] != 0], kernels[1][kernels[1] != 0])


@pytest.mark.parametrize("policy", ("mixed_float16", "bfloat16"))
def test_units_are_drawn_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = residual_net((8, 12))
    finally:
        keras.config.set_dtype_policy("float32")
    x = patterns(12)[0]
    result = plan(model, 0.4, criterion="pfp", data=x, mode="random", seed=0, round_to=1, budget="uniform")
    assert relative_difference(result.zero(), result.cut(), x) < 2e-2
    kernel, made = (m.get_layer("outer0").kernel for m in (model, result.zero()))
    assert made.dtype == kernel.dtype
    group = next(g for g in result.channels.groups if g.name == "inner0")
    makers = next(g for g in result.channels.groups if "outer0" in g.name)
    line = result.multipliers()[group.units][:, None] * (result.multipliers()[makers.units] > 0)
    assert group.index in result.drawn
    assert np.allclose(np.array(made, "float64"), np.array(kernel, "float64") * line, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "stochastic"}, "mode='stochastic' .*known: deterministic, random, mixed"),
        ({"mode": None}, "mode=None"),
        ({"criterion": "l2"}, "criterion='l2'.*criterion='pfp' gives them"),
        ({"criterion": "random"}, "criterion='random'"),
        ({"criterion": lambda rows: rows.sum(1)}, "mode='random' was passed to plan with criterion="),
        ({"reconstruct": True}, "reconstruct=True.*set by the draw"),
        ({"delta": 0}, "delta=0 "),
        ({"delta": 1}, "delta=1 "),
        ({"delta": "small"}, "delta='small'"),
        ({"delta": math.nan}, "delta=nan"),
        ({"delta": True}, "delta=True"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    _, x, channels = chain()
    with pytest.raises(ValueError, match=message):
        plan(channels, 0.4, **{"criterion": "pfp", "data": x[:4], "mode": "random", **arguments})


def test_notes_of_drawn_plans_do_not_blame_the_grid(monkeypatch):
    """That another number of units came than was expected is no matter of round_to, which is 1."""
    for result in plans(monkeypatch, 20, 0.5, "random"):
        assert not any("round_to" in note for note in result.notes)


def test_drawing_leaves_what_is_protected_and_what_is_gone():
    _, x, channels = chain()
    gone = channels.groups[1].units[:3]
    result = plan(
        channels,
        0.4,
        measure="units",
        criterion="pfp",
        data=x[:20],
        mode="random",
        seed=0,
        round_to=1,
        protect="first",
        already=gone,
    )
    factors = result.multipliers()
    assert (factors[channels.groups[0].units] == 1).all() and channels.groups[0].index not in result.drawn
    assert not factors[gone].any() and np.isin(gone, result.removed).all()
    assert relative_difference(result.zero(), result.cut(), x) < 1e-5
    touched = {w.layer.name for w, _ in reader_factors(channels, factors)}
    assert touched <= {"hidden", "out"} and touched


# -- rounds in fit -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 6)).astype("float32")
Y = (X[:, :3] @ np.array([1.0, -2, 1]) + X[:, 3] * X[:, 4] > 0).astype("int32")
TEST = (X[64:], Y[64:])


def network(optimizer="adam", seed=0, eager=True, **arguments):
    """A small one, that starts quickly."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Dense(16, name="one")(inputs)))
    x = layers.Dropout(0.1, seed=1)(x)
    x = layers.Dense(12, "relu", name="two")(x)
    model = keras.Model(inputs, layers.Dense(2, name="logits")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **{"metrics": ["accuracy"], "run_eagerly": eager, **arguments})
    return model


def fit(model, *callbacks, epochs, **arguments):
    given = dict(batch_size=32, shuffle=False, verbose=0)
    return model.fit(X[:64], Y[:64], epochs=epochs, callbacks=list(callbacks), **{**given, **arguments}).history


def look(function):
    """A callback that notes something at the end of every epoch."""
    seen = []
    return seen, keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(function()))


def pruner(keep=(0.7, 0.5, 0.3), **arguments):
    return ProvablePruning(keep, **{"data": X, "round_to": 1, **arguments})


@pytest.mark.parametrize("mode", theory.MODES)
def test_rounds_are_pruned_retrained_and_kept(mode):
    model, pruning = network(), pruner(retrain=2, mode=mode, seed=0)
    seen, watch = look(lambda: set(pruning.removed.tolist()))
    epochs, note = look(lambda: pruning.plan)
    history = fit(model, pruning, watch, note, epochs=6)
    assert [set(s) for s in seen[::2]] == [set(s) for s in seen[1::2]] and seen[0] < seen[2] < seen[4]
    assert [e["round"] for e in pruning.curve] == [0, 1, 2] and [e["epoch"] for e in pruning.curve] == [0, 2, 4]
    assert [e["keep"] for e in pruning.curve] == pytest.approx([0.7, 0.5, 0.3])
    assert all(e["pruned"] == {} for e in pruning.curve)
    if mode == "deterministic":
        assert [1 - e["sparsity"] for e in pruning.curve] == pytest.approx([0.7, 0.5, 0.3], abs=0.04)
        assert not pruning.plan.drawn
    else:
        assert f"units drawn ({mode})" in pruning.plan.sentence
    for entry, at in zip(pruning.curve, (1, 3, 5)):
        assert entry["retrained"] == {name: pytest.approx(values[at]) for name, values in history.items()}
        assert entry["params"] == history["params"][at] and entry["macs"] == history["macs"][at]
        assert entry["sparsity"] == history["sparsity"][at]
    small = strip(model)
    assert small.count_params() == pruning.curve[-1]["params"]
    assert metrics.macs(Channels(small)) == pruning.curve[-1]["macs"]
    assert relative_difference(model, small, X) < 1e-5
    assert set(dead_units(Channels(model), strict=True).tolist()) == seen[-1]
    assert pruning.plan is epochs[-1] and set(pruning.plan.removed.tolist()) == seen[-1]
    fit(model, epochs=1)
    assert set(dead_units(Channels(model), strict=True).tolist()) == seen[-1]  # a second fit, without it
    longer = fit(model, pruning, epochs=2)  # and with it: nothing comes back, whatever is asked
    assert set(pruning.removed.tolist()) == seen[-1] and longer["params"] == [history["params"][-1]] * 2


def drawn_once(monkeypatch, optimizer, seed):
    """(the kernel that reads layer "one", what it should be) after a fit in which nothing was learned."""
    model, factors, own = network(optimizer), [], module.reader_factors
    fit(model, epochs=1)
    before = np.array(model.get_layer("two").kernel)
    monkeypatch.setattr(module, "reader_factors", lambda channels, m: factors.append(m) or own(channels, m))
    pruning = pruner(0.5, mode="random", seed=seed, retrain=3)
    fit(model, pruning, epochs=3)
    [factors] = factors
    one, two = (next(g for g in pruning.channels.groups if g.name == name) for name in ("one", "two"))
    assert (factors[one.units] > 1.2).any() and (factors[one.units] == 0).any()
    expected = before * factors[one.units][:, None] * (factors[two.units] > 0)
    return np.array(model.get_layer("two").kernel), expected


def test_drawing_multiplies_what_reads_the_units_once_in_a_round(monkeypatch):
    made, expected = drawn_once(monkeypatch, keras.optimizers.SGD(0.0), seed=0)
    assert np.allclose(made, expected, rtol=1e-6)


def test_the_plan_of_the_last_round_says_what_is_there_now():
    """Once the weights are multiplied, its multipliers are in them: to cut it is to strip."""
    model = network()
    model.get_layer("norm").trainable = False  # its statistics stay
    model.compile(keras.optimizers.SGD(0.0), model.loss, run_eagerly=True)
    pruning = pruner(0.5, mode="random", seed=0)
    fit(model, pruning, epochs=1)
    assert relative_difference(model, pruning.plan.cut(), X) < 1e-5


@pytest.mark.parametrize("overwrite", (None, 2))
def test_use_ema_does_not_undo_a_draw(overwrite, monkeypatch):
    """The averages are of the weights before they were multiplied."""
    optimizer = keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=0.99, ema_overwrite_frequency=overwrite)
    made, expected = drawn_once(monkeypatch, optimizer, seed=0)
    assert np.allclose(made, expected, rtol=1e-5)


def copied(model):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


@pytest.mark.parametrize("given", ("arrays", "weighted", "dataset"))
def test_the_curve_says_what_the_network_was_worth_right_after_pruning(given):
    import tensorflow as tf

    weight = np.linspace(0.5, 2, 32).astype("float32")
    validation = {
        "arrays": TEST,
        "weighted": (*TEST, weight),
        "dataset": tf.data.Dataset.from_tensor_slices(TEST).batch(8),
    }[given]
    model, pruning, copies = network(), pruner((0.6, 0.4), validation_data=validation), []

    class Copy(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            copies.append(copied(self.model))

    fit(model, pruning, Copy(), epochs=2)
    for entry, copy in zip(pruning.curve, copies, strict=True):
        logits = np.array(copy(TEST[0], training=False), np.float64)
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(32), TEST[1]]
        right = logits.argmax(1) == TEST[1]
        scale = weight if given == "weighted" else np.ones(32)
        assert entry["pruned"].keys() == {"loss", "accuracy"}
        wanted = (losses * scale).mean() if given == "weighted" else losses.mean()
        assert entry["pruned"]["loss"] == pytest.approx(wanted, rel=1e-3)
        assert entry["pruned"]["accuracy"] == pytest.approx(right.mean())
        assert entry["retrained"]["loss"] != pytest.approx(entry["pruned"]["loss"], rel=1e-3)
    json.dumps(pruning.curve)


def test_measuring_after_pruning_changes_nothing_of_the_training(monkeypatch):
    histories = [
        fit(network(), pruner((0.6, 0.4), validation_data=validation), epochs=3, validation_data=TEST)
        for validation in (None, TEST)
    ]
    assert histories[0] == histories[1] and "val_loss" in histories[0]

    # The control: an evaluation whose metrics are not reset.
    monkeypatch.setattr(module, "measured", lambda model, data: model.evaluate(*TEST, verbose=0) and {})
    polluted = fit(network(), pruner((0.6, 0.4)), epochs=3, validation_data=TEST)
    assert polluted["accuracy"] != histories[0]["accuracy"] or polluted["loss"] != histories[0]["loss"]


class Stop(keras.callbacks.Callback):
    """Kills the run after a batch of an epoch, or at the "end" of it."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        self.on_train_batch_end("end")


@pytest.mark.parametrize(
    "at, mode", (((2, 1), "random"), ((2, "end"), "deterministic"), ((3, 0), "random"), ((5, 1), "deterministic"))
)
def test_a_run_that_was_killed_goes_on_with_its_curve(at, mode, tmp_path):
    """In the first epoch of a round, after it but before its backup, in the second one, and in the last."""
    asked = dict(retrain=2, mode=mode, seed=0, validation_data=TEST)
    whole = pruner(**asked, path=tmp_path / "whole.json")
    history = fit(network(), whole, epochs=6)

    def run(*callbacks):
        pruning = pruner(**asked, path=tmp_path / "curve.json")
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        return pruning, fit(network(), pruning, *callbacks, backup, epochs=6)

    with pytest.raises(KeyboardInterrupt):
        run(Stop(*at))
    written = json.loads((tmp_path / "curve.json").read_text())
    assert len(written) == at[0] // 2 + (at[0] % 2 == 1 or at[1] == "end")
    again, rest = run()
    assert len(rest["loss"]) == 6 - at[0]
    assert again.curve == json.loads((tmp_path / "curve.json").read_text())
    assert [e["round"] for e in again.curve] == [e["round"] for e in whole.curve] == [0, 1, 2]
    for mine, other in zip(again.curve, whole.curve):
        for name in ("epoch", "keep", "sparsity", "params", "macs"):
            assert mine[name] == pytest.approx(other[name]), name
        assert mine["pruned"] == pytest.approx(other["pruned"], rel=1e-3)
    assert rest["params"] == history["params"][at[0] :]
    assert whole.curve == json.loads((tmp_path / "whole.json").read_text())
    assert not list(tmp_path.glob("*.part"))


def state_of(optimizer):
    """(iterations, largest number in any slot) of an optimizer, or the one inside."""
    inner = getattr(optimizer, "inner_optimizer", None) or optimizer
    slots = [v for v in inner.variables if v.name not in ("iteration", "learning_rate")]
    return int(inner.iterations), max([float(np.abs(np.array(v)).max()) for v in slots], default=0.0)


OPTIMIZERS = {
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "averaging": lambda rate: keras.optimizers.Adam(rate, use_ema=True, ema_overwrite_frequency=3),
    "scaled": lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate), dynamic_growth_steps=1),
    "accumulating": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, gradient_accumulation_steps=3),
}


@pytest.mark.parametrize("restart", (True, False))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_round_begins_with_a_fresh_optimizer_if_asked_to(kind, restart):
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.5)
    model = network(OPTIMIZERS[kind](rate), eager=kind != "momentum")
    states, rates = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            optimizer = self.model.optimizer
            inner = getattr(optimizer, "inner_optimizer", None) or optimizer
            states.append(state_of(optimizer))
            rates.append(float(np.array(inner.learning_rate)))
            if kind == "scaled":  # its scale is there from the first step on
                states[-1] += (float(np.array(getattr(optimizer, "dynamic_scale", optimizer.initial_scale))),)

    fit(model, pruner((0.7, 0.5), retrain=2, restart=restart), Watch(), epochs=4)
    fresh = [state == states[0] for state in states]
    assert states[0][:2] == (0, 0.0) and rates[0] == pytest.approx(0.01)
    assert fresh == ([True, False] * 2 if restart else [True, False, False, False])
    assert rates[2] == (pytest.approx(0.01) if restart else pytest.approx(rates[1] ** 2 / 0.01))


def test_a_fresh_optimizer_trains_as_a_new_one_does():
    """The rounds of a run are those of a run whose optimizer was made anew."""
    made = lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.7))  # noqa: E731
    model, pruning = network(made()), pruner((0.7, 0.7), retrain=2, restart=True)
    history = fit(model, pruning, epochs=4)
    twin, other = network(made()), pruner((0.7, 0.7), retrain=2)
    first = fit(twin, other, epochs=2)
    twin.compile(made(), twin.loss, metrics=["accuracy"], run_eagerly=True)
    rest = fit(twin, pruner((0.7, 0.7), retrain=2), epochs=2)
    assert first["loss"] + rest["loss"] == pytest.approx(history["loss"], rel=1e-5)
    kept = fit(network(made()), pruner((0.7, 0.7), retrain=2), epochs=4)
    assert kept["loss"][:2] == pytest.approx(history["loss"][:2]) and kept["loss"][2:] != pytest.approx(
        history["loss"][2:], rel=1e-3
    )


def test_a_restart_needs_no_schedule_that_is_registered_or_has_a_config():
    class Mine(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.01 / (1 + keras.ops.cast(step, "float32"))

    for rate in (Mine(), lambda: 0.01):
        model = network(keras.optimizers.Adam(rate))
        fit(model, pruner((0.7, 0.5), restart=True), epochs=2)
        assert int(model.optimizer.iterations) == 2


def test_callbacks_set_the_learning_rate_by_epoch():
    model = network(keras.optimizers.Adam(0.5))
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 * 0.1 ** (epoch % 2))
    history = fit(model, pruner((0.7, 0.5), retrain=2, restart=True), rate, epochs=4)
    assert history["learning_rate"] == pytest.approx([0.01, 0.001, 0.01, 0.001])
    model = network(keras.optimizers.Adam(0.01))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=100, factor=0.5)
    history = fit(model, pruner((0.7, 0.5), retrain=2, restart=True), plateau, epochs=4)
    assert history["learning_rate"][-1] < 0.01  # the rate stays what it is


def test_training_may_last_longer_than_the_rounds_and_begin_later():
    model, pruning = network(), pruner((0.7, 0.5))
    history = fit(model, pruning, epochs=5)
    assert len(pruning.curve) == 2 and history["params"][1:] == [history["params"][1]] * 4
    assert pruning.curve[1]["retrained"]["loss"] == history["loss"][-1]
    pruning = pruner((0.7, 0.5, 0.3))
    history = fit(network(), pruning, epochs=4, initial_epoch=1)
    assert [e["round"] for e in pruning.curve] == [1, 2] and len(history["loss"]) == 3
    assert [1 - e["sparsity"] for e in pruning.curve] == pytest.approx([0.5, 0.3], abs=0.04)


def test_a_schedule_that_outlasts_the_training_warns():
    with pytest.warns(UserWarning, match="asked sparsity will not be reached"):
        fit(network(), pruner((0.7, 0.5, 0.3), retrain=2), epochs=3)


def test_layers_that_are_frozen_are_pruned_too():
    model = network()
    model.get_layer("one").trainable = False
    model.compile("sgd", model.loss, run_eagerly=True)
    pruning = pruner((0.7, 0.4))
    before = np.array(model.get_layer("one").kernel)
    fit(model, pruning, epochs=2)
    after = np.array(model.get_layer("one").kernel)
    gone = (after == 0).all(0)
    assert gone.any() and np.array_equal(after[:, ~gone], before[:, ~gone])
    assert set(dead_units(Channels(model), strict=True).tolist()) == set(pruning.removed.tolist())
    assert strip(model).count_params() == pruning.curve[-1]["params"]


def test_metrics_of_many_numbers_and_measures_of_ones_own_are_written_down(tmp_path):
    targets = np.eye(2)[Y]

    def mine(channels, removed):
        return np.float32(metrics.params(channels, removed))

    model = network()
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), metrics=[keras.metrics.F1Score()])
    path = tmp_path / "curve.json"
    pruning = pruner((0.7, 0.5), measure=mine, path=path, validation_data=(X, targets))
    model.fit(X, targets, epochs=2, verbose=0, callbacks=[pruning])
    written = json.loads(path.read_text())
    assert len(written[1]["pruned"]["f1_score"]) == len(written[1]["retrained"]["f1_score"]) == 2
    assert written[1]["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_grids_of_what_is_kept():
    assert module.harmonic(0.05)[-1] == pytest.approx(0.05) and len(module.harmonic(0.05)) == 19
    assert module.harmonic(0.6) == (0.6,) and module.harmonic(1) == (1,)
    assert module.harmonic(1 / 3) == pytest.approx((1 / 2, 1 / 3)) and module.harmonic(0.3) == module.harmonic(1 / 3)
    grid = np.array(module.geometric(0.85, 0.15, 10))
    assert grid[[0, -1]] == pytest.approx([0.85, 0.15]) and np.ptp(grid[1:] / grid[:-1]) < 1e-12 and len(grid) == 10
    grid = np.array(module.linear(0.9, 0.3, 7))
    assert grid[[0, -1]] == pytest.approx([0.9, 0.3]) and np.ptp(np.diff(grid)) < 1e-12 and len(grid) == 7
    assert module.geometric(0.5, 0.1, 1) == module.linear(0.5, 0.1, 1) == (0.5,)
    assert module.geometric(0.5, 0.5, 3) == pytest.approx((0.5,) * 3)
    for grid in (module.harmonic(0.07), module.geometric(1, 0.01, 25), module.linear(1, 0.01, 25)):
        assert (
            all(a >= b for a, b in zip(grid, grid[1:])) and ProvablePruning(grid, data=X).schedule.stop == len(grid) - 1
        )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: module.harmonic(0), "0 was passed to harmonic"),
        (lambda: module.harmonic(1.5), "1.5 was passed to harmonic"),
        (lambda: module.geometric(0.2, 0.5, 3), "0.2, 0.5 was passed to geometric.*none larger"),
        (lambda: module.geometric(0.5, 0, 3), "0.5, 0 was passed to geometric"),
        (lambda: module.geometric(0.5, 0.2, 0), "rounds=0 was passed to geometric"),
        (lambda: module.linear(0.5, 0.2, 2.5), "rounds=2.5 was passed to linear"),
        (lambda: module.linear(0.5, math.nan, 2), "nan was passed to linear"),
        (lambda: ProvablePruning((), data=X), "rounds=0 was passed to ProvablePruning"),
        (lambda: ProvablePruning((0.5, 0.6), data=X), "0.5, 0.6 was passed to ProvablePruning"),
        (lambda: ProvablePruning(0, data=X), "0 was passed to ProvablePruning"),
        (lambda: ProvablePruning("0.5", data=X), "expected fractions that are kept"),
        (lambda: ProvablePruning(0.5, data=X, retrain=0), "retrain=0"),
        (lambda: ProvablePruning(0.5, data=X, retrain=True), "retrain=True"),
        (lambda: ProvablePruning(0.5, data=X, measure="flops"), "Known: .*macs"),
        (lambda: ProvablePruning(0.5, data=X, budget="x"), "Known: error_bound, global"),
        (lambda: ProvablePruning(0.5, data=X, mode="stochastic"), "mode='stochastic'"),
        (lambda: ProvablePruning(0.5, data=X, delta=2), "delta=2"),
        (lambda: ProvablePruning(0.5, data=X, round_to=0), "round_to=0"),
        (lambda: ProvablePruning(0.5, data=X, path="/no/such/folder/curve.json"), "folder"),
    ],
)
def test_bad_arguments_fail_before_training(call, message):
    with pytest.raises((ValueError, OSError), match=message):
        call()


def test_one_number_is_one_round_and_all_may_be_kept():
    pruning = pruner(1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*asked sparsity will not be reached")
        fit(network(), pruning, epochs=1)
    assert len(pruning.curve) == 1 and pruning.curve[0]["sparsity"] == 0 and not len(pruning.removed)
