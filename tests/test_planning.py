import json
import math

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net

from keras_prune import Channels, metrics, plan, planning, prune
from keras_prune.surgery import model_inputs, relative_difference


def plain_net(*widths, seed=0):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((16, 16, 3))
    for n, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{n}")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.GlobalMaxPooling2D()(x)))


@pytest.mark.parametrize("measure", ["macs", "params", "units"])
@pytest.mark.parametrize("budget", ["global", "uniform"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_the_asked_sparsity_is_met_within_one_rounding_step(measure, budget, sparsity):
    decision = plan(plain_net(48, 64, 96), sparsity, measure=measure, budget=budget, round_to=8)
    count = metrics.get(measure)
    reached = 1 - count(decision.channels, decision.removed) / count(decision.channels, ())
    assert reached == pytest.approx(decision.reached)
    one_step = 8 / 48 if measure != "units" else 8 / 208  # of the narrowest layer: the most a step can be worth
    assert abs(reached - sparsity) <= one_step


def test_without_rounding_half_the_macs_is_met_to_two_points():
    assert plan(plain_net(48, 64, 96), 0.5, round_to=1).reached == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("round_to", [1, 4, 8, 16])
def test_widths_stay_on_the_grid_and_predicted_costs_are_those_of_the_cut_model(round_to):
    decision = plan(plain_net(48, 64, 96), 0.6, round_to=round_to)
    small = decision.cut()
    widths = [small.get_layer(f"conv{n}").filters for n in range(3)]
    assert all(w % round_to == 0 for w in widths) and widths != [48, 64, 96]
    assert decision.totals["params"][1] == small.count_params()
    by_hand = 256 * 9 * (3 * widths[0] + widths[0] * widths[1] + widths[1] * widths[2]) + widths[2] * 10
    assert decision.totals["macs"][1] == by_hand


def test_a_width_off_the_grid_stays_whole_or_goes_down_to_the_grid():
    groups = plan(plain_net(20, 20, 20, 20), 0.3, round_to=8).groups
    assert {g.after for g in groups} <= {8, 16, 20} and any(g.after < 20 for g in groups)


def test_a_group_narrower_than_the_grid_is_never_emptied():
    decision = plan(plain_net(4, 64), 0.9, round_to=8)
    assert [g.after for g in decision.groups][0] == 4
    assert decision.asked > decision.largest and "largest possible" in " ".join(decision.notes)


def test_protected_layers_keep_their_width_by_name_pattern_and_object():
    model = plain_net(32, 64, 64)
    for protect in ("conv1", ["conv[1]"], (model.get_layer("conv1"),)):
        small = prune(model, 0.4, protect=protect)
        assert small.get_layer("conv1").filters == 64
        assert small.get_layer("conv0").filters < 32 or small.get_layer("conv2").filters < 64


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "fpgm", "bn_scale", "random", "taylor"])
def test_every_criterion_plans_and_the_cut_model_equals_the_zeroed_one(criterion):
    model = compiled()
    decision = plan(model, 0.5, criterion=criterion, data=patterns(64), seed=0)
    small = decision.cut()
    x = model_inputs(model)
    assert decision.reached == pytest.approx(0.5, abs=0.1)
    assert relative_difference(decision.zero(), small, x) < 1e-5
    assert relative_difference(model, small, x) > 1e-3  # it did remove something


def test_a_planted_useless_filter_is_the_first_to_leave_by_every_magnitude():
    model = plain_net(16, 16)
    kernel, bias = model.get_layer("conv0").get_weights()
    kernel[..., 5] *= 1e-3
    model.get_layer("conv0").set_weights([kernel, bias])
    for criterion in ("l1", "l2", "linf"):
        decision = plan(model, 0.03, criterion=criterion, round_to=1, measure="units")
        group = decision.channels.groups[0]
        assert decision.removed.tolist() == [group.units[5]]


def test_taylor_finds_the_filter_that_nothing_reads():
    model = compiled()
    model.get_layer("outer1").set_weights(
        [np.where(np.arange(32)[None, None, :, None] == 7, 0, model.get_layer("outer1").get_weights()[0])]
    )
    decision = plan(
        model,
        0.012,
        criterion="taylor",
        data=patterns(64),
        round_to=1,
        measure="units",
        budget="uniform",
        protect=["down*", "outer*", "inner0"],
    )
    group = next(g for g in decision.channels.groups if g.name == "inner1")
    assert decision.removed.tolist() == [group.units[7]]  # its only reader is zero: no gradient reaches it


def test_taylor_without_labels_or_loss_says_what_is_missing():
    with pytest.raises(ValueError, match="needs labelled data"):
        plan(compiled(), 0.5, criterion="taylor")
    with pytest.raises(ValueError, match="compile"):
        plan(residual_net(), 0.5, criterion="taylor", data=patterns(8))


def test_a_user_function_is_criterion_budget_and_measure():
    seen = []

    def last_first(rows):
        seen.append(rows.shape)
        return -np.arange(len(rows), dtype=float)

    def width_of_conv1(channels, removed):
        return sum(len(g) - np.isin(g.units, removed).sum() for g in channels.groups if g.name == "conv1")

    def half(scores, amount):
        return [np.argsort(np.argsort(s)) < int(amount * (len(s) - 1)) for s in scores]

    decision = plan(plain_net(16, 32), 0.5, criterion=last_first, budget=half, measure=width_of_conv1, round_to=1)
    assert seen == [(16, 28), (32, 145)] or seen == [(16, 27), (32, 144)]
    group = next(g for g in decision.channels.groups if g.name == "conv1")
    assert sorted(np.intersect1d(group.units, decision.removed)) == sorted(group.units[16:])
    assert decision.totals["width_of_conv1"] == (32, 16)


def test_numpy_numbers_are_numbers():
    model = plain_net(32, 32)
    decision = plan(model, np.float32(0.5), round_to=np.int64(8))
    assert np.array_equal(decision.removed, plan(model, 0.5).removed) and json.loads(decision.to_json())["asked"] == 0.5


def test_scores_do_not_depend_on_the_scale_of_a_layer():
    model = plain_net(32, 32)
    first = plan(model, 0.3, round_to=1).removed
    for n in range(2):
        layer = model.get_layer(f"conv{n}")
        layer.set_weights([w * 10.0 ** (3 * n) for w in layer.get_weights()])
    assert np.array_equal(plan(model, 0.3, round_to=1).removed, first)


def test_what_is_gone_already_stays_gone_and_counts():
    model = plain_net(32, 64)
    first = plan(model, 0.3)
    second = plan(model, 0.6, already=first.removed)
    assert np.isin(first.removed, second.removed).all() and len(second.removed) > len(first.removed)
    third = plan(model, 0.1, already=first.removed)
    assert np.array_equal(third.removed, first.removed)


def test_pruning_by_zero_changes_nothing_and_by_the_same_twice_gives_the_same():
    model = plain_net(32, 64)
    assert plan(model, 0.0).removed.size == 0
    x = model_inputs(model)
    assert relative_difference(model, prune(model, 0.0), x) == 0.0
    assert np.array_equal(plan(model, 0.5).removed, plan(model, 0.5).removed)


def test_planning_and_cutting_leave_the_users_model_bit_for_bit_alone():
    model = compiled("adam")
    model.fit(*patterns(64), verbose=0)
    before = [np.array(v) for v in model.variables + model.optimizer.variables]
    for criterion in ("l2", "taylor"):
        decision = plan(model, 0.5, criterion=criterion, data=patterns(64))
        decision.cut(), decision.zero(), str(decision), decision.to_json()
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables + model.optimizer.variables))


def test_the_plan_prints_widths_totals_fences_and_saves_itself_as_json():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(32, 3, name="first")(inputs)
    x = layers.Conv2D(32, 3, name="second")(layers.LayerNormalization(name="mixes")(x))
    decision = plan(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))), 0.4)
    text, content = str(decision), json.loads(decision.to_json())
    assert "second" in text and "32 ->" in text and "mixes (LayerNormalization)" in text and "MACs" in text
    assert content["totals"]["macs"]["after"] < content["totals"]["macs"]["before"]
    assert content["fences"][0]["layer"] == "mixes" and content["reached"] == decision.reached


def test_unknown_spatial_size_is_counted_as_assumed_and_said():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 1)(layers.Conv2D(16, 3, padding="same")(x)))
    assert metrics.macs(Channels(model, assumed_length=10)) == 100 * (27 * 16 + 9 * 256 + 64)
    assert "224" in " ".join(plan(model, 0.5).notes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.0), "expected a number in"),
        (dict(sparsity="half"), "expected a number in"),
        (dict(measure="flops"), "macs, memory, params"),
        (dict(criterion="l3"), "Known: .*bn_scale"),
        (dict(budget="fair"), "Known: error_bound, global"),
        (dict(round_to=0), "whole number from 1"),
        (dict(protect=["nothing*"]), "fits no layer"),
        (dict(protect=["conv*", "head"]), "Nothing is left to prune"),
        (dict(criterion=lambda rows: rows), "one score per unit"),
        (dict(criterion=lambda rows: np.full(len(rows), np.nan)), "NaN or infinite scores"),
    ],
)
def test_bad_arguments_say_what_came_and_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(plain_net(16, 16), **arguments)


def test_bn_scale_without_batchnorm_says_what_to_use():
    with pytest.raises(ValueError, match="l2"):
        plan(plain_net(16, 16), criterion="bn_scale")


def test_a_model_with_nothing_to_prune_is_refused():
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="nothing to prune"):
        plan(keras.Model(inputs, layers.Dense(3)(inputs)))


def test_weights_that_are_not_finite_are_named():
    model = plain_net(16, 16)
    kernel, bias = model.get_layer("conv1").get_weights()
    kernel[0, 0, 0, 0] = math.nan
    model.get_layer("conv1").set_weights([kernel, bias])
    with pytest.raises(ValueError, match="conv1/kernel"):
        planning.plan(model)
