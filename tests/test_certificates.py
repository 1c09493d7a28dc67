"""Certificates of plans: worked numbers, bounds that hold on many networks, and what is said where there is none."""

import dataclasses
import functools
import itertools
import json
import math

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import Channels, certify, plan, theory
from keras_prune.sensitivity import deviations, sensitivities
from keras_prune.surgery import zeroed

pytestmark = pytest.mark.filterwarnings("ignore:In .* groups more than half:UserWarning")

A = np.array([[1, 0.5], [2, -1], [0.5, 1]])
DATA = np.array([[1, 1, 2], [3, 0, 1]], "float32")


def worked(bias=(5.0, -7.0)):
    """Three inputs, a reader with the weights A; its channels."""
    inputs = keras.Input((3,))
    maker, reader = layers.Dense(3, use_bias=False, name="maker"), layers.Dense(2, name="reader")
    model = keras.Model(inputs, reader(maker(inputs)), name="worked")
    maker.kernel.assign(np.eye(3))
    reader.kernel.assign(A)
    reader.bias.assign(bias)
    return Channels(model)


def removing(channels, units, **changed):
    """The plan that removes these units."""
    base = plan(channels, 0.0, criterion="l2", round_to=1)
    return dataclasses.replace(base, removed=np.asarray(units, int), **changed)


def drawing(channels, multipliers, draws=10):
    """The plan that multiplies the units of the first group."""
    [group] = channels.groups
    factors = np.asarray(multipliers, float)
    draw = theory.Draw(np.full(len(group), 1 / len(group)), np.zeros(len(group), bool), draws, factors)
    return removing(channels, group.units[factors == 0], drawn={group.index: draw})


def strict(certificate):
    """Its JSON, which has to be that: neither NaN nor Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(certificate.to_json(), parse_constant=refuse)


# -- worked numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gone, bound, changed, off",
    [
        ((0,), 6 / 7, 6 / 7, (3, 1.5)),
        ((1,), 1, 1, (2, 1)),
        ((2,), 0.8, 0.8, (1, 2)),
        ((0, 2), 6 / 7 + 0.8, 1, (3.5, 2.5)),
        ((1, 2), 1.8, 1, (3, 1)),
    ],
)
def test_the_worked_example_loses_what_was_worked_out(gone, bound, changed, off):
    channels = worked()
    found = certify(removing(channels, channels.groups[0].units[list(gone)]), DATA)
    [layer] = found.layers
    assert (layer.layer, layer.before, layer.after) == ("reader", 3, 3 - len(gone))
    assert layer.bound == pytest.approx(bound, abs=1e-6) and layer.changed == pytest.approx(changed, abs=1e-6)
    assert layer.draws is None and layer.epsilon is None and found.samples == 2 and found.notes == ()
    rest = np.setdiff1d(range(3), gone)
    outputs, small = DATA @ A + (5, -7), DATA[:, rest] @ A[rest] + (5, -7)
    assert found.difference == pytest.approx(np.linalg.norm(outputs - small, axis=1).max(), rel=1e-5)
    assert found.difference == pytest.approx(np.hypot(*off), rel=1e-5) if gone != (1, 2) else found.difference > 0
    assert found.output == pytest.approx(np.linalg.norm(outputs, axis=1).max(), rel=1e-5)
    matrix = np.linalg.norm(A[list(gone)], 2) * np.linalg.norm(DATA, axis=1).max()
    assert found.difference <= found.network.total * (1 + 1e-5) and found.network.total <= matrix * (1 + 1e-3)
    assert found.is_vacuous == (found.network.total >= found.output)


def test_of_reweighed_units_the_distance_to_one_counts():
    channels = worked()
    s = np.array([6 / 7, 1, 0.8])
    for factors in ((1.5, 1, 1), (0, 1, 1.25), (0.5, 2, 0), (3, 0, 0)):
        [layer] = certify(drawing(channels, factors), DATA).layers
        change = np.array(factors) - 1
        assert layer.bound == pytest.approx((np.abs(change) * s).sum(), abs=1e-6)
        sums = [(np.maximum(sign * A, 0)) for sign in (1, -1)]
        lost = max(
            np.abs((x * change) @ w)[o] / (x @ w)[o] for x in DATA for w in sums for o in (0, 1) if (x @ w)[o] > 0
        )
        assert layer.changed == pytest.approx(lost, abs=1e-6) and layer.changed <= layer.bound + 1e-6
        assert layer.after == np.count_nonzero(factors) and layer.draws == 10


def test_epsilon_is_that_of_bernstein():
    channels = worked()
    s = np.array([6 / 7, 1, 0.8])
    for delta, k, draws in ((1e-2, 3.0, 10), (0.3, 1.0, 500)):
        [layer] = certify(drawing(channels, (2, 1, 0), draws), DATA, delta=delta, k=k).layers
        wanted = theory.bernstein_certificate(draws, s.max() * 3, delta, events=4 * 2, k=k)  # drawn evenly
        assert layer.epsilon == pytest.approx(wanted, rel=1e-6)
    a = 1.0 * 3 * math.log(2 * 8 / 0.3) / (3 * 500)
    assert layer.epsilon == pytest.approx(a + math.sqrt(a * a + 6 * a), rel=1e-6)


@functools.cache
def smooth():
    """Two groups of which no unit is ever alone, 3 x 3 taps and Flatten; both are read by one layer, too."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    one = layers.Conv2D(10, 3, activation="softplus", name="one")(inputs)
    two = layers.Conv2D(12, 3, activation="softplus", name="two")(one)
    joined = layers.Concatenate()([layers.Flatten()(one), layers.Flatten()(two)])
    model = keras.Model(inputs, layers.Dense(3, name="out")(joined))
    for name in ("two", "out"):
        kernel = model.get_layer(name).kernel
        kernel.assign(np.abs(kernel) + 0.02)
    return Channels(model), np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype("float32")


@pytest.mark.parametrize("mode", ("random", "mixed"))
def test_of_drawn_plans_bounds_and_epsilons_are_those_by_hand(mode):
    channels, x = smooth()
    result = plan(
        channels, 0.4, measure="units", criterion="pfp", data=x, mode=mode, seed=0, round_to=1, budget="uniform"
    )
    found = certify(result, x, delta=0.05, k=2.0)
    s = {k: v.scores for k, v in sensitivities(channels, x).groups.items()}
    factors = result.multipliers()
    assert len(result.drawn) == 2 and [layer.layer for layer in found.layers] == ["two", "out"]
    events = 4 * (2 * 2 * 12 + 3)  # quadrants x (positions x filters of `two`, outputs of `out`)
    reads = {"two": ["one"], "out": ["one", "two"]}
    groups = {g.name: g for g in channels.groups}
    for layer in found.layers:
        mine = [groups[name] for name in reads[layer.layer]]
        bound = sum((np.abs(factors[g.units] - 1) * s[g.index]).sum() for g in mine)
        assert layer.bound == pytest.approx(bound, rel=1e-5) and layer.changed <= bound + 1e-6
        each = []
        for g in mine:
            draw = result.drawn[g.index]
            total = s[g.index][~draw.sure].sum()  # drawn in proportion: what is not kept in any case
            each.append(theory.bernstein_certificate(draw.draws, max(total, 1), 0.05, events=events, k=2.0))
        assert layer.epsilon == pytest.approx(max(each), rel=1e-4)
        assert layer.draws == min(result.drawn[g.index].draws for g in mine)
        assert layer.before == sum(map(len, mine))
        assert layer.after == sum(np.count_nonzero(factors[g.units]) for g in mine)
    text = str(found)
    assert "1 ± eps" in text and "with probability 1 - 0.05" in text and "at most 2 times" in text


def test_epsilon_covers_units_that_left_without_being_drawn():
    """Beside 60 drawn units of one group, six of another left for good: they are in the same sums."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    parts = [layers.Dense(n, "softplus", name=name)(inputs) for n, name in ((60, "drawn"), (8, "gone"))]
    model = keras.Model(inputs, layers.Dense(2, name="out")(layers.Concatenate()(parts)))
    kernel = np.abs(np.random.default_rng(0).normal(size=(68, 2))) + 0.5
    kernel[60:] *= 20
    model.get_layer("out").kernel.assign(kernel)
    x = np.random.default_rng(1).normal(size=(10, 4)).astype("float32")
    channels = Channels(model)
    groups = {g.name: g for g in channels.groups}
    already = groups["gone"].units[:6]
    result = plan(
        channels, 8 / 68, measure="units", criterion="pfp", data=x, mode="random", seed=0, round_to=1, already=already
    )
    assert list(result.drawn) == [groups["drawn"].index]
    [layer] = certify(result, x, delta=0.5, k=1.0).layers
    assert layer.changed > 0.4 and layer.changed <= layer.bound
    assert layer.epsilon is None or layer.epsilon >= layer.changed - 0.1  # what left for good is not made up for


def test_units_that_could_not_be_drawn_may_have_shares_on_other_samples():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    maker = layers.Dense(8, "relu", use_bias=False)
    model = keras.Model(inputs, layers.Dense(3)(maker(inputs)))
    maker.kernel.assign(np.eye(8))
    x = np.abs(np.random.default_rng(0).normal(size=(30, 8))).astype("float32")
    silent = np.where(np.arange(8) == 7, 0, x)
    result = plan(model, 0.4, measure="units", criterion="pfp", data=silent, mode="random", seed=0, round_to=1)
    found = certify(result, x)
    assert found.layers[0].epsilon is None or found.layers[0].epsilon == math.inf or found.layers[0].epsilon > 1
    assert found.layers[0].changed <= found.layers[0].bound + 1e-6
    strict(found)
    assert certify(result, silent).layers[0].epsilon > 0


def test_units_that_were_gone_before_the_others_were_drawn_are_certified():
    channels = Channels(residual_net((12, 16)))
    x = patterns(12)[0]
    gone = channels.groups[1].units[:3]
    asked = dict(measure="units", criterion="pfp", data=x, mode="random", seed=0, round_to=1, budget="uniform")
    result = plan(channels, 0.5, already=gone, **asked)
    assert 1 in result.drawn
    found = certify(result, x)
    assert all(layer.changed <= layer.bound + 1e-6 for layer in found.layers)
    strict(found)


# -- many networks -------------------------------------------------------------------------------------------------

ZOO_KINDS = (
    "relu",
    "conv2d_small_groups",
    "squeeze_and_excite_dense",
    "concat_twice_the_same",
    "inverted_residual",
    "densely_connected",
    "resnet_option_a_ops",
    "split_uneven",
    "attention_cross",
    "attention_with_two_output_axes",
    "nested_three_deep",
    "two_in_two_out_by_name",
    "einsum_token_mixing",
    "half_precision",
    "slice_two",
    "encoder_decoder",
    "bidirectional",
    "time_distributed",
    "gru",
)


def rows(outputs):
    arrays = [np.array(keras.ops.cast(a, "float64")) for a in keras.tree.flatten(outputs)]
    return np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)


@pytest.mark.parametrize("name", [name for name in ZOO_KINDS if name in ZOO])
def test_bounds_hold_whichever_units_leave(name):
    model, _ = ZOO[name]()
    x, channels, rng = example(model, 5), Channels(model), np.random.default_rng(0)
    names = {g.name for g in channels.groups}
    for _ in range(2):
        picked = [rng.permutation(g.units)[: rng.integers(0, len(g))] for g in channels.groups]
        picked = np.concatenate(picked).astype(int)
        found = certify(removing(channels, picked), x)
        strict(found)
        assert found.samples == 5 and found.model == model.name
        assert found.layers or not len(picked) or found.notes
        for layer in found.layers:
            assert layer.layer in str(found) and layer.after < layer.before
            if layer.bound is None:
                assert found.notes
            else:
                assert -1e-9 <= layer.changed <= layer.bound + 1e-6
        outputs, small = rows(model(x, training=False)), rows(zeroed(channels, picked)(x, training=False))
        apart = np.linalg.norm(outputs - small, axis=1).max()
        tolerance = 1e-2 if name == "half_precision" else 1e-4
        assert found.difference == pytest.approx(apart, rel=tolerance, abs=tolerance)
        assert found.output == pytest.approx(np.linalg.norm(outputs, axis=1).max(), rel=tolerance)
        assert found.network.total >= apart * (1 - tolerance)
        assert found.is_vacuous == (not found.network.total < found.output)
        assert all(note.split(": ")[0] in names or "not known" in note for note in found.notes)


def test_where_a_reader_has_no_matrix_the_bound_is_not_known_and_a_note_says_why():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 3))
    x = layers.Dense(8, "relu", name="units")(inputs)
    known = layers.Dense(2, name="known")(x)
    model = keras.Model(inputs, layers.LSTM(4, name="memory")(layers.Concatenate()([x, known])))
    channels, data = Channels(model), example(model, 4)
    group = next(g for g in channels.groups if g.name == "units")
    found = certify(removing(channels, group.units[:3]), data)
    by_name = {layer.layer: layer for layer in found.layers}
    assert by_name["known"].bound is None and 0 < by_name["known"].changed <= 1 + 1e-6
    assert any(note.startswith("units: read by memory (LSTM)") for note in found.notes)
    assert any(note.startswith("memory (LSTM): how much it can multiply") for note in found.notes)
    assert math.isinf(found.network.total) and found.is_vacuous
    text, content = str(found), strict(found)
    assert "not known" in text and "no bound (vacuous)" in text and all(f"note: {n}" in text for n in found.notes)
    assert content["network"]["total"] is None and content["is_vacuous"] is True
    assert next(c for c in content["layers"] if c["layer"] == "known")["bound"] is None


# -- what is said --------------------------------------------------------------------------------------------------


def test_what_promises_nothing_is_called_vacuous_and_what_does_is_not():
    channels = worked()
    little = certify(drawing(channels, (1.01, 1, 1), draws=10**7), DATA)
    assert not little.is_vacuous and little.layers[0].epsilon < 0.05
    assert "vacuous" not in str(little)
    much = certify(drawing(worked(bias=(0, 0)), (0, 0, 3), draws=1), DATA)
    assert much.is_vacuous and str(much).count("(vacuous)") == 3  # the bound, epsilon, and the outputs'
    assert much.layers[0].bound > 1 and "outputs off by: at most" in str(much)
    assert strict(much)["is_vacuous"] is True and strict(little)["is_vacuous"] is False


def test_everything_is_in_the_text_and_in_json():
    channels, x = smooth()
    result = plan(channels, 0.3, measure="units", criterion="l1", round_to=1, budget="uniform")
    found = certify(result, x, delta=0.03)
    text, content = str(found), strict(found)
    assert f"Certificate for {channels.model.name}, on 8 samples" in text and "eps" not in text
    for layer in found.layers:
        [line] = [line for line in text.splitlines() if line.split()[:1] == [layer.layer]]
        assert f"{layer.before} -> {layer.after}" in line and f"{layer.bound:.0%}" in line
    assert f"measured {found.difference:.3g}" in text and f"{found.output:.3g} long" in text
    assert content["layers"] == [dataclasses.asdict(layer) for layer in found.layers]
    assert content["difference"] == found.difference and content["delta"] == 0.03 and content["samples"] == 8
    assert content["network"]["total"] == pytest.approx(found.network.total)
    assert [entry["layer"] for entry in content["network"]["layers"]] == [b.layer for b in found.network.layers]


def test_nothing_removed_is_nothing_lost():
    channels, x = smooth()
    found = certify(removing(channels, ()), x)
    assert found.layers == () and found.difference == 0 == found.network.total and not found.is_vacuous
    assert "at most 0; measured 0" in str(found) and strict(found)["layers"] == []


def test_what_cannot_be_certified_is_refused():
    channels, x = smooth()
    refitted = plan(channels, 0.3, criterion="l2", reconstruct=True, data=x, round_to=1)
    with pytest.raises(ValueError, match="reconstruct=True.*Certify the same plan without"):
        certify(refitted, x)
    bare = plan(channels, 0.3, criterion="l2", round_to=1)
    with pytest.raises(ValueError, match="shape"):
        certify(bare, x[..., :1])
    assert certify(bare, (x, np.zeros(8))).samples == 8  # labels are left out


@pytest.mark.parametrize("mode", ("deterministic", "random"))
@pytest.mark.parametrize("arguments", ({"delta": 0}, {"delta": 1.5}, {"k": 0}, {"k": -3.0}, {"batch_size": 0}))
def test_what_is_out_of_range_is_named(arguments, mode):
    channels, x = smooth()
    result = plan(channels, 0.3, measure="units", criterion="pfp", data=x, mode=mode, seed=0, round_to=1)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        certify(result, x, **arguments)


def test_batches_do_not_matter_and_nothing_is_changed():
    channels, x = smooth()
    before = channels.model.get_weights()
    result = plan(
        channels, 0.4, measure="units", criterion="pfp", data=x, mode="random", seed=0, round_to=1, budget="uniform"
    )
    one, other = certify(result, x), certify(result, x, batch_size=3)
    for a, b in zip(one.layers, other.layers):
        assert (a.bound, a.changed, a.epsilon) == pytest.approx((b.bound, b.changed, b.epsilon), rel=1e-5)
    assert one.network.total == pytest.approx(other.network.total, rel=1e-5)
    assert one.difference == pytest.approx(other.difference, rel=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(before, channels.model.get_weights()))


def test_with_the_largest_tap_instead_of_all_of_them_the_bound_would_be_wrong():
    """The control of `bound`: sensitivities by "max" are violated by what really changes, those by "sum" never."""
    channels, x = smooth()
    group = next(g for g in channels.groups if g.name == "one")
    s = {r: sensitivities(channels, x, kernel_reduction=r).groups[group.index].scores for r in ("sum", "max")}
    violated = 0
    for gone in itertools.combinations(range(10), 4):
        multipliers = channels.alive(group.units[list(gone)]).astype(float)
        worst = max(deviations(channels, multipliers, x[:2]).values()) if violated < 3 else 0
        assert worst <= s["sum"][list(gone)].sum() + 1e-6
        violated += worst > s["max"][list(gone)].sum() + 1e-3
    assert violated
    found = certify(removing(channels, group.units[:4]), x)
    first = next(layer for layer in found.layers if layer.layer == "two")
    assert first.bound == pytest.approx(s["sum"][:4].sum(), rel=1e-5) and first.changed > s["max"][:4].sum()


def test_a_half_precision_network_is_certified():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = residual_net((8,))
    finally:
        keras.config.set_dtype_policy("float32")
    x = patterns(6)[0]
    result = plan(randomize(model), 0.4, criterion="pfp", data=x, mode="random", seed=0, round_to=1)
    found = certify(result, x)
    assert all(layer.changed <= layer.bound + 1e-6 for layer in found.layers)
    assert found.network.total >= found.difference * (1 - 1e-2)
