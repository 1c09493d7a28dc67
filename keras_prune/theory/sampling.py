"""Formulas of sampled pruning: how many samples, how many draws, and what they promise.

[Liebenwein, Baykal, Lang, Feldman, Rus: Provable Filter Pruning for Efficient Neural Networks, ICLR 2020,
arXiv:1911.07412] removes channels by their *sensitivity* s_j, the largest share that channel j has in any sum it takes
part in (`sensitivity.sensitivities`). Its randomised form draws m channels with replacement, channel j with the
probability p_j = s_j / S, S = sum of s_j, and multiplies what was drawn c_j times by c_j / (m p_j).

The constants C = 3 and K = 3 and the form of `sample_size` are those of the authors' code (lucaslie/torchprune); the
bounds follow from Bernstein's inequality, and are derived here. They hold for shares of whole channels, which is what
`sensitivities(kernel_reduction="sum")` gives, and for sums of one sign: of weights and inputs split by their signs.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import numpy as np

MODES = ("deterministic", "random", "mixed")


@dataclass(frozen=True)
class Draw:
    """Channels that were drawn, and what the weights that read them are multiplied by.

    Attributes:
        probabilities: with which each channel was drawn, shape (channels,); 0 for those that were kept without.
        sure: shape (channels,), True for those that were kept without drawing, with the multiplier 1.
        draws: how many draws there were, m.
        multipliers: shape (channels,): 0 = not drawn, it leaves; on average 1.
    """

    probabilities: np.ndarray
    sure: np.ndarray
    draws: int
    multipliers: np.ndarray


def sample_size(neurons: int, largest: int, delta: float = 1e-16, *, c: float = 3.0) -> int:
    """How many samples the sensitivities should be measured on: ceil(C ln(8 eta* eta / delta)).

    Why: if a sample reaches 1/K of the largest share that a channel can have with a probability of at least
    1 - exp(-1/C), n samples all miss it with exp(-n/C) at most; summed over all neurons that is below delta.

    Args:
        neurons: eta, outputs of all layers that are pruned: height x width x channels of a convolution.
        largest: eta*, those of the largest layer.
        delta: accepted probability of missing one.
        c: C of the assumption.

    Source:
        the authors' code; the reason, as derived from that assumption.

    LeNet-300-100, and ResNet-20 on CIFAR-10:

    >>> sample_size(300 + 100 + 10, 300, 1e-12), sample_size(188_426, 16_384, 1e-16)
    (125, 183)
    """
    _whole("sample_size", neurons=neurons, largest=largest)
    _probability("sample_size", delta)
    _positive("sample_size", c=c)
    if largest > neurons:
        raise ValueError(
            f"largest={largest} was passed to sample_size with neurons={neurons}; expected the outputs of the largest "
            "layer, then those of all layers together: sample_size(neurons, largest)."
        )
    return math.ceil(c * (math.log(8) + math.log(largest) + math.log(neurons) - math.log(delta)))


def expected_distinct(probabilities: np.ndarray, draws: int) -> float:
    """How many different channels m draws with replacement give on average: sum of 1 - (1 - p_j)^m.

    Args:
        probabilities: p, shape (channels,), sum 1.
        draws: m.

    Source:
        linearity of the expectation; the authors' allocator keeps so many channels.

    >>> p = np.array([4 / 7, 4 / 13, 3 / 10, 3 / 5]); p /= p.sum()
    >>> [round(expected_distinct(p, m), 6) for m in (1, 2, 3, 4, 8, 16)]
    [1.0, 1.724761, 2.255741, 2.649117, 3.470545, 3.896567]
    """
    p = _distribution("expected_distinct", probabilities)
    _whole("expected_distinct", least=0, draws=draws)
    return _distinct(p, draws)


def draws_for(probabilities: np.ndarray, distinct: float) -> int:
    """The smallest number of draws that gives so many different channels on average: `expected_distinct` backwards.

    Args:
        probabilities: p, shape (channels,), sum 1.
        distinct: how many different channels are wanted, below the number of those that can be drawn at all.

    Raises:
        ValueError: so many are never expected: to keep all channels, keep them without drawing.

    For equal probabilities it is ln(n / (n - t)) / ln(n / (n - 1)), rounded up:

    >>> draws_for(np.full(16, 1 / 16), 8), math.ceil(math.log(16 / 8) / math.log(16 / 15))
    (11, 11)
    >>> p = np.array([4 / 7, 4 / 13, 3 / 10, 3 / 5]); p /= p.sum()
    >>> draws_for(p, 2), draws_for(p, 3.47)
    (3, 8)
    """
    p = _distribution("draws_for", probabilities)
    there = int(np.count_nonzero(p))
    if not 0 <= distinct < there and not distinct == there == 1:
        raise ValueError(
            f"distinct={distinct!r} was passed to draws_for, but {there} channels have a probability above 0; expected "
            f"a number from 0 to below {there}. All of them are never certain to be drawn: to keep all, do not draw."
        )
    wanted = distinct * (1 - 1e-12)  # one draw gives one channel, whatever the rounding of the sum
    low, high = -1, 0  # low is too few, high is enough
    while _distinct(p, high) < wanted:
        low, high = high, max(1, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _distinct(p, middle) < wanted else (low, middle)
    return high


def multipliers(probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What the weights of each channel are multiplied by after it was drawn so often: c_j / (m p_j), 1 on average.

    Args:
        probabilities: p, shape (channels,), sum 1.
        counts: how often each was drawn, shape (channels,); m is their sum.

    Source:
        the authors' code; unbiased because E[c_j] = m p_j.

    >>> p = np.array([4 / 7, 4 / 13, 3 / 10, 3 / 5]); p /= p.sum()
    >>> multipliers(p, np.array([2, 1, 0, 1])).round(6).tolist()
    [1.556731, 1.445536, 0.0, 0.7413]
    """
    p, c = _distribution("multipliers", probabilities), np.asarray(counts, np.float64)
    if c.shape != p.shape or not c.sum() > 0 or (c < 0).any() or (c[p == 0] > 0).any():
        raise ValueError(
            f"counts={counts!r} was passed to multipliers; expected {len(p)} numbers from 0 up, one per channel, at "
            "least one above 0, and 0 where the probability is 0."
        )
    return np.divide(c, c.sum() * p, out=np.zeros_like(p), where=p > 0)


def draw(
    probabilities: np.ndarray, distinct: int, mode: str = "random", rng: np.random.Generator | None = None
) -> Draw:
    """Draw channels with replacement, so that about `distinct` different ones stay, 1 <= distinct < channels.

    Args:
        probabilities: p, shape (channels,), sum 1.
        distinct: how many different ones are wanted; so many are expected, more or fewer may come.
        mode: "random", all are drawn; "mixed", those that m draws would give at least once on average (m p_j >= 1)
            stay in any case, at most all but one of what is wanted, and only the others are drawn.
        rng: where the draws come from.

    Source:
        the authors' code: classes PFPNetRand and PFPNetTop. Both leave every sum unbiased.

    >>> p, rng = np.array([0.7, 0.1, 0.1, 0.1]), np.random.default_rng(0)
    >>> mixed = draw(p, 2, "mixed", rng)
    >>> mixed.sure.tolist(), mixed.draws, sorted(mixed.multipliers.round(6).tolist())
    ([True, False, False, False], 1, [0.0, 0.0, 1.0, 3.0])
    """
    if mode not in MODES[1:]:
        raise ValueError(f"mode={mode!r} was passed to draw; known: {', '.join(MODES[1:])}.")
    p = _distribution("draw", probabilities)
    _whole("draw", distinct=distinct)
    rng = rng or np.random.default_rng()
    sure = np.zeros(len(p), bool)
    if mode == "mixed":
        likely = np.argsort(-p, kind="stable")[: distinct - 1]
        sure[likely[p[likely] * draws_for(p, distinct) >= 1]] = True
    q = np.where(sure, 0.0, p)
    q /= q.sum()
    m = draws_for(q, distinct - int(sure.sum()))
    return Draw(q, sure, m, np.where(sure, 1.0, multipliers(q, rng.multinomial(m, q))))


def bernstein_draws(epsilon: float, sensitivity: float, delta: float = 1e-2, *, events: int = 1, k: float = 3.0) -> int:
    """How many draws keep every sum within (1 ± epsilon): ceil((6 + 2 eps) K S ln(2N / delta) / (3 eps^2)).

    Why: one reweighed draw, divided by the sum, lies in [0, K S], has the mean 1 and a second moment of at most K S.
    Bernstein: Pr(|mean of m of them - 1| >= eps) <= 2 exp(-3 m eps^2 / (K S (6 + 2 eps))); times N for all N sums.

    Args:
        epsilon: accepted relative error of each sum. Of sums split into four by the signs of weights and inputs it is
            the error as a share of the four together.
        sensitivity: S, the sum of the sensitivities of all channels.
        delta: accepted probability that any of them is worse.
        events: N, outputs x positions x quadrants.
        k: K: an unseen input's shares are at most K times the measured ones. 1 for the measured samples themselves.

    Source:
        derived from Bernstein's inequality; K = 3 as in the authors' code.

    >>> bernstein_draws(0.5, 2, 1e-2, k=1), bernstein_draws(0.1, 2, 1e-2, k=1)
    (99, 2190)
    """
    _positive("bernstein_draws", epsilon=epsilon)
    scale = _scale("bernstein_draws", sensitivity, delta, events, k)
    return math.ceil((6 + 2 * epsilon) * scale / (3 * epsilon**2))


def bernstein_certificate(
    draws: int, sensitivity: float, delta: float = 1e-2, *, events: int = 1, k: float = 3.0
) -> float:
    """The relative error that m draws promise: a + sqrt(a^2 + 6a), a = K S ln(2N / delta) / (3m).

    `bernstein_draws` backwards. Above 1 it promises nothing; at the number of draws that pruning takes it usually is.

    Args:
        draws: m.
        sensitivity, delta, events, k: as for `bernstein_draws`.

    Source:
        the root of that bound.

    >>> [round(bernstein_certificate(m, 2, 1e-2, k=1), 4) for m in (16, 99, 2190)]
    [1.3926, 0.4997, 0.1]
    """
    _whole("bernstein_certificate", draws=draws)
    a = _scale("bernstein_certificate", sensitivity, delta, events, k) / (3 * draws)
    return a + math.sqrt(a * a + 6 * a)


def _distinct(p: np.ndarray, draws: int) -> float:
    if draws == 0:
        return 0.0
    with np.errstate(divide="ignore"):  # of p = 1 the logarithm is -inf, and 1 comes out
        return float(-np.expm1(float(draws) * np.log1p(-p)).sum())


def _scale(function: str, sensitivity: float, delta: float, events: int, k: float) -> float:
    """K S ln(2N / delta)."""
    _positive(function, sensitivity=sensitivity, k=k)
    _probability(function, delta)
    _whole(function, events=events)
    return k * sensitivity * (math.log(2) + math.log(events) - math.log(delta))


def _distribution(function: str, probabilities) -> np.ndarray:
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or not len(p) or not (p >= 0).all() or not math.isclose(p.sum(), 1, rel_tol=1e-5):
        raise ValueError(
            f"probabilities of shape {p.shape} and sum {p.sum():.6g} were passed to {function}; expected shape "
            "(channels,), numbers from 0 up, and sum 1: sensitivities divided by their sum."
        )
    return np.minimum(p / p.sum(), 1.0)


def _whole(function: str, least: int = 1, **given) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name}={value!r} was passed to {function}; expected a whole number from {least} up.")


def _positive(function: str, **given) -> None:
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} was passed to {function}; expected a number above 0.")


def _probability(function: str, delta) -> None:
    if not isinstance(delta, numbers.Real) or not 0 < delta < 1:
        raise ValueError(
            f"delta={delta!r} was passed to {function}; expected a probability between 0 and 1, such as 1e-2."
        )
