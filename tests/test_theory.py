"""The formulas of sampled pruning: their worked numbers, brute force, and draws by the thousand."""

import itertools
import math

import numpy as np
import pytest

from keras_prune import theory

P = np.array([4 / 7, 4 / 13, 3 / 10, 3 / 5]) / 1.7791208791208792
"""Probabilities of the worked example, see test_sensitivity."""


@pytest.mark.parametrize(
    "neurons, largest, delta, samples",
    [(410, 300, 1e-12, 125), (188_426, 16_384, 1e-16, 183), (188_426, 16_384, 1e-300, 2145)],
)
def test_sample_sizes_have_their_worked_values(neurons, largest, delta, samples):
    assert theory.sample_size(neurons, largest, delta) == samples
    assert samples - 1 < 3 * (math.log(8.0 * neurons * largest) - math.log(delta)) <= samples
    assert theory.sample_size(neurons, largest, delta, c=6.0) in (2 * samples, 2 * samples - 1)


def test_the_largest_layer_is_not_larger_than_all_together():
    with pytest.raises(ValueError, match=r"sample_size\(neurons, largest\)"):
        theory.sample_size(300, 410)


def test_expected_distinct_channels_have_their_worked_values_and_those_of_brute_force():
    found = [theory.expected_distinct(P, m) for m in (0, 1, 2, 3, 4, 8, 16)]
    assert np.allclose(found, (0, 1, 1.724761, 2.255741, 2.649117, 3.470545, 3.896567), atol=1e-6)
    for m in (1, 2, 3, 4):
        draws = list(itertools.product(range(4), repeat=m))
        brute = sum(np.prod(P[list(d)]) * len(set(d)) for d in draws)
        assert theory.expected_distinct(P, m) == pytest.approx(brute, rel=1e-12)


def test_expected_distinct_channels_where_channels_cannot_or_must_be_drawn():
    assert theory.expected_distinct([1.0], 1) == theory.expected_distinct([0.0, 1.0, 0.0], 7) == 1
    assert theory.expected_distinct([0.5, 0.5, 0.0], 1000) == 2
    assert theory.expected_distinct([1 - 1e-12, 1e-12], 1) == pytest.approx(1, rel=1e-12)  # small p are not lost


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_the_fewest_that_give_the_expected_number(seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(12, 0.3))
    for distinct in (0.5, 1, 2, 5.5, 10, 11.9):
        m = theory.draws_for(p, distinct)
        assert theory.expected_distinct(p, m) >= distinct * (1 - 1e-12)
        assert theory.expected_distinct(p, m - 1) < distinct
    assert theory.draws_for(p, 0) == 0


def test_draws_of_equal_channels_have_a_closed_form():
    for n, t in itertools.product((2, 7, 64), (1, 0.5, 1.9)):
        assert theory.draws_for(np.full(n, 1 / n), t) == math.ceil(math.log(n / (n - t)) / math.log(n / (n - 1)) - 1e-9)


@pytest.mark.parametrize("p, distinct", [([0.5, 0.5], 2), ([0.5, 0.5, 0], 2), ([1.0], 1.1), ([0.5, 0.5], -1)])
def test_all_channels_are_never_certain_to_be_drawn(p, distinct):
    with pytest.raises(ValueError, match="to keep all, do not draw"):
        theory.draws_for(p, distinct)
    assert theory.draws_for([1.0], 1) == theory.draws_for([0, 1.0], 1) == 1


def test_multipliers_are_one_on_average():
    """Over all 16 ordered pairs of draws."""
    assert np.allclose(theory.multipliers(P, (2, 1, 0, 1)), (1.556731, 1.445536, 0, 0.741300), atol=1e-6)
    mean = np.zeros(4)
    for pair in itertools.product(range(4), repeat=2):
        mean += np.prod(P[list(pair)]) * theory.multipliers(P, np.bincount(pair, minlength=4))
    assert np.abs(mean - 1).max() < 4e-16
    assert theory.multipliers([0.0, 1.0], [0, 3]).tolist() == [0, 1]


def test_numbers_of_draws_have_their_worked_values_and_certificates_are_the_way_back():
    assert [theory.bernstein_draws(e, 2, 1e-2, k=1) for e in (0.5, 0.1)] == [99, 2190]
    for epsilon, s, delta, events, k in itertools.product((0.05, 0.5, 3), (1, 20.5), (0.1, 1e-16), (1, 10**7), (1, 3)):
        m = theory.bernstein_draws(epsilon, s, delta, events=events, k=k)
        assert theory.bernstein_certificate(m, s, delta, events=events, k=k) <= epsilon * (1 + 1e-9)
        if m > 1:
            assert theory.bernstein_certificate(m - 1, s, delta, events=events, k=k) > epsilon * (1 - 1e-9)
    assert theory.bernstein_draws(0.5, 2, 1e-2) == math.ceil(3 * 7 * 2 * math.log(200) / 0.75)  # K is 3


@pytest.mark.parametrize("epsilon, draws", ((0.3, 96), (0.2, 256)))
def test_sums_of_drawn_channels_are_wrong_more_rarely_than_promised(epsilon, draws):
    """20,000 times: shares of one sum, sensitivities as large as they or larger, reweighed draws."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(16))
    s = np.minimum(1, shares * rng.uniform(1, 3, 16))
    p = s / s.sum()
    counts = rng.multinomial(draws, p, 20_000)
    made = (counts / (draws * p)) @ shares
    assert np.allclose(made[:5], [theory.multipliers(p, c) @ shares for c in counts[:5]])
    assert abs(made.mean() - 1) < 3e-3
    failed = float((np.abs(made - 1) >= epsilon).mean())
    low, high = 1e-12, 1 - 1e-12  # the smallest delta for which this epsilon is promised
    for _ in range(60):
        middle = (low + high) / 2
        good = theory.bernstein_certificate(draws, s.sum(), middle, k=1) <= epsilon
        low, high = (low, middle) if good else (middle, high)
    assert failed <= high
    assert (np.abs(made - 1) >= epsilon / 10).mean() > 0.1  # the draws do differ


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda: theory.sample_size(0, 1), "neurons=0"),
        (lambda: theory.sample_size(10, 2.5), "largest=2.5"),
        (lambda: theory.sample_size(10, 2, 1.0), "delta=1.0"),
        (lambda: theory.sample_size(10, 2, c=0), "c=0"),
        (lambda: theory.expected_distinct([0.5, 0.4], 3), "sum 0.9"),
        (lambda: theory.expected_distinct([1.5, -0.5], 3), "numbers from 0 up"),
        (lambda: theory.expected_distinct([[1.0]], 3), r"shape \(1, 1\)"),
        (lambda: theory.expected_distinct([1.0], -1), "draws=-1"),
        (lambda: theory.multipliers([0.5, 0.5], [0, 0]), "at least one above 0"),
        (lambda: theory.multipliers([0.5, 0.5], [1, 1, 1]), "expected 2 numbers"),
        (lambda: theory.multipliers([0.0, 1.0], [1, 1]), "0 where the probability is 0"),
        (lambda: theory.bernstein_draws(0, 2), "epsilon=0"),
        (lambda: theory.bernstein_draws(0.1, math.nan), "sensitivity=nan"),
        (lambda: theory.bernstein_certificate(0, 2), "draws=0"),
        (lambda: theory.bernstein_certificate(5, 2, events=True), "events=True"),
    ],
)
def test_what_is_out_of_range_is_named(call, what):
    with pytest.raises(ValueError, match=what):
        call()
