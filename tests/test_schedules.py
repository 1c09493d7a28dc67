import doctest
import warnings

import keras
import numpy as np
import pytest

import keras_prune
from keras_prune import schedules

CURVES = {
    "polynomial": schedules.polynomial(0.0, 0.8, begin=2, stop=12),
    "linear": schedules.linear(0.0, 0.8, begin=2, stop=12),
    "exponential": schedules.exponential(0.0, 0.8, begin=2, stop=12),
    "cosine": schedules.cosine(0.0, 0.8, begin=2, stop=12),
    "constant": schedules.constant(0.8, begin=2),
    "one_shot": schedules.one_shot(0.8, at=2),
    "steps": schedules.steps({2: 0.3, 7: 0.8}),
}


def test_every_schedule_of_the_registry_is_tried_here():
    assert set(CURVES) == set(schedules.SCHEDULES)


@pytest.mark.parametrize("name", sorted(CURVES))
def test_schedule_is_nothing_before_begin_rises_and_ends_at_its_last_value(name):
    curve = CURVES[name]
    values = [curve(t) for t in range(100)]
    assert values[:2] == [0.0, 0.0]
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:]))
    assert all(v == pytest.approx(0.8) for v in values[curve.stop :])
    assert curve.stop == 2 or values[curve.stop - 1] < 0.8 - 1e-6


def test_polynomial_has_the_values_of_zhu_and_gupta():
    curve = schedules.polynomial(0.0, 0.9, begin=0, stop=10)
    expected = (0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9)
    assert [curve(t) for t in range(11)] == pytest.approx(expected)


def test_numbers_mappings_and_functions_become_schedules():
    assert schedules.get(0.5)(0) == 0.5
    assert schedules.get({3: 0.2})(3) == 0.2
    assert schedules.get(lambda step: 0.1 * step)(2) == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [1.0, -0.1, 20, True])
def test_a_sparsity_outside_its_range_says_what_to_write(bad):
    with pytest.raises((ValueError, TypeError), match="expected a number in"):
        schedules.get(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.polynomial(0, 1.0, begin=0, stop=2),
        lambda: schedules.linear(0, 0.5, begin=5, stop=2),
        lambda: schedules.steps({}),
        lambda: schedules.constant(0.5, begin=-1),
    ],
)
def test_impossible_schedules_are_refused_where_they_are_made(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(schedules)
    assert result.attempted >= 8 and result.failed == 0


class PolynomialDecay:
    """A schedule as tensorflow-model-optimization has them: the same call, the same attributes, another author."""

    def __init__(self, begin_step, end_step, frequency=100, final=0.8, power=3):
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self.final, self.power = final, power

    def __call__(self, step):
        part = min(1.0, max(0.0, (step - self.begin_step) / max(self.end_step - self.begin_step, 1)))
        turn = (step - self.begin_step) % self.frequency == 0
        inside = step >= self.begin_step and (step <= self.end_step or self.end_step < 0)
        sparsity = self.final * (1 - (1 - part) ** self.power)
        return np.asarray(turn and inside), np.float32(sparsity)


def test_a_schedule_of_tfmot_has_its_values_at_its_own_turns():
    theirs = PolynomialDecay(begin_step=20, end_step=120, frequency=25)
    curve = schedules.get(theirs)
    kept = 0.0
    for step in range(200):
        should, sparsity = theirs(step)
        kept = float(sparsity) if should else kept  # what a weight masked by tfmot has lost after this step
        assert curve(step) == pytest.approx(kept, abs=1e-6), step
    assert (curve.begin, curve.stop, curve.every, curve.unit) == (20, 120, 25, "batch")
    assert curve(200) == pytest.approx(0.8) and curve(19) == 0.0 and 0 < curve(45) < 0.8


def test_a_schedule_of_tfmot_reaches_its_end_also_between_two_turns():
    curve = schedules.get(PolynomialDecay(begin_step=0, end_step=110, frequency=50, power=1))
    assert curve(109) == pytest.approx(0.8 * 100 / 110)
    assert curve(110) == curve(1000) == pytest.approx(0.8)


def test_a_schedule_of_tfmot_without_an_end_holds_its_value():
    theirs = PolynomialDecay(begin_step=7, end_step=-1)
    theirs.__class__ = type("ConstantSparsity", (PolynomialDecay,), {"__call__": lambda self, step: (True, 0.5)})
    curve = schedules.get(theirs)
    assert [curve(step) for step in (0, 6, 7, 8, 10_000)] == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert curve.name == "ConstantSparsity"


class Counting:
    """As much of a pruner as the check of its schedule reads."""

    def __init__(self, every):
        self.every, self.params = every, {"epochs": 1, "steps": 500}


def test_a_schedule_in_batches_is_refused_where_epochs_are_counted():
    curve = schedules.get(PolynomialDecay(begin_step=0, end_step=100, frequency=10))
    with pytest.raises(ValueError, match=r'unit="batch", every=10'):
        schedules.warn_if_too_short(Counting(1), curve, "epoch")
    with pytest.warns(UserWarning, match="every=10"):
        schedules.warn_if_too_short(Counting(1), curve, "batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules.warn_if_too_short(Counting(10), curve, "batch")


def test_filter_pruning_follows_a_schedule_of_tfmot_batch_by_batch():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(3, name="scores")]
    )
    model.compile("sgd", "mse")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)).astype("float32"), random.normal(size=(80, 3)).astype("float32")
    theirs = PolynomialDecay(begin_step=4, end_step=12, frequency=4, final=0.5)
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(np.mean(~model.layers[0].kernel.numpy().any(0))))
    )
    pruner = keras_prune.FilterPruning(theirs, measure="units", round_to=1, unit="batch", every=4)
    model.fit(x, y, batch_size=5, epochs=1, verbose=0, shuffle=False, callbacks=[pruner, watch])
    expected = [float(schedules.get(theirs)(step)) for step in range(16)]
    assert seen == pytest.approx(expected, abs=1 / 32 + 1e-6)
    assert seen[3] == 0.0 and seen[-1] == pytest.approx(0.5, abs=1 / 32)
