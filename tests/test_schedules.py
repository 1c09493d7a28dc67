import doctest

import pytest

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
