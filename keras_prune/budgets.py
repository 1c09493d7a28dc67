"""Scores and one number to the units that leave.

A budget is a function `(scores, amount) -> removed`: a list of score arrays, one per group, and an amount in 0..1;
the answer is a list of boolean arrays, True = leaves. More amount never brings a unit back, and no group is emptied.
`plan` turns the amount until the asked sparsity of the measure is met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keras_prune.theory import expected_distinct

SPARED = 0.1
"""Fraction of each group that the global budget takes only when nothing else is left: an emptied layer cuts the
network in two, whatever its scores say."""

DECADES = 12
"""What `pca` leaves unexplained runs over so many powers of ten: tails of spectra are that long."""

Budget = Callable[[list[np.ndarray], float], list[np.ndarray]]


def uniform(scores: list[np.ndarray], amount: float) -> list[np.ndarray]:
    """The same fraction of every group, its lowest scores.

    >>> [r.tolist() for r in uniform([np.array([3.0, 1.0, 2.0, 4.0])], 0.5)]
    [[False, True, True, False]]
    """
    return [_lowest(s, int(amount * len(s) + 1e-9)) for s in scores]


def global_(scores: list[np.ndarray], amount: float) -> list[np.ndarray]:
    """The lowest scores of all groups together: a group of weak units loses more.

    A tenth of every group is spared while others can still give; equal scores leave by their rank in the group.

    >>> [r.tolist() for r in global_([np.array([1.0, 2.0]), np.array([3.0, 4.0])], 0.25)]
    [[True, False], [False, False]]
    """
    if not scores:
        return []
    sizes = [len(s) for s in scores]
    ranks = [np.argsort(np.argsort(s, kind="stable"), kind="stable") / len(s) for s in scores]
    rank, score = np.concatenate(ranks), np.concatenate(scores)
    spared = np.concatenate([r >= 1 - max(SPARED, 1 / n) for r, n in zip(ranks, sizes)])
    leaves = np.zeros(len(score), bool)
    leaves[np.lexsort((rank, score, spared))[: int(amount * len(score) + 1e-9)]] = True
    leaves &= np.concatenate([r < 1 - 1 / n for r, n in zip(ranks, sizes)])  # the last one stays
    return np.split(leaves, np.cumsum(sizes)[:-1])


def error_bound(scores: list[np.ndarray], amount: float, logarithms: Sequence[float] | None = None) -> list[np.ndarray]:
    """Widths that give every layer the same error bound: as many units as its sampled form would be expected to draw.

    To keep all sums of layer l within the same relative error, m_l = c S_l log_l draws are needed, S_l the sum of its
    scores, with one scalar c for all layers; so many draws with the probabilities scores / S_l give some number of
    different units on average, and that many stay, those of the highest scores. Of equal sums, a layer whose scores
    are concentrated on few units keeps fewer.

    [Liebenwein et al. 2020, arXiv:1911.07412, allocation as in the authors' code; their constants only scale c]

    Args:
        scores: per group, from 0 up; -inf for units that are gone.
        amount: 0 keeps all (c is infinite), 1 keeps one unit of each group (c = 0).
        logarithms: log_l per group, ln(8 (positions + 1) taps / delta); default: all equal.

    Raises:
        ValueError: negative scores, which are no probabilities.

    >>> even, uneven = np.full(8, 0.5), np.array([3.86, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02])
    >>> [int((~r).sum()) for r in error_bound([even, uneven], 0.4)]
    [6, 2]
    """
    c = math.inf if amount <= 0 else (1 / amount - 1) ** 2
    return [_lowest(s, len(s) - _expected(s, c * log)) for s, log in zip(scores, logarithms or [1.0] * len(scores))]


def _expected(scores: np.ndarray, scale: float) -> int:
    """How many different units `scale` x (sum of the scores) draws give on average, at least one."""
    least = scores[np.isfinite(scores)].min(initial=0.0)
    if least < 0:
        raise ValueError(
            f"budget='error_bound' was given scores from {least:.3g} on; expected numbers from 0 up, which "
            "become probabilities when they are divided by their sum. Use budget='global' for this criterion."
        )
    if math.isinf(scale):
        return len(scores)
    there = np.where(np.isfinite(scores), scores, 0.0)
    total = float(there.sum())
    if total == 0:
        return 1
    return max(1, math.ceil(expected_distinct(there / total, math.ceil(scale * total)) - 1e-9))


def components(eigenvalues: np.ndarray, explained: float) -> int:
    """How many principal components explain this fraction of the variance, at least.

    Args:
        eigenvalues: variance along each component, in any order. What rounding made negative counts as 0.
        explained: in [0, 1]; sums that miss it by 1e-12 of the whole meet it.

    Returns:
        The smallest number; 0 where there is no variance at all.

    >>> [components(np.array([6, 2, 1, 0.5, 0.3, 0.2]), tau) for tau in (0.8, 0.9, 0.95, 0.99)]
    [2, 3, 4, 6]
    """
    ordered = np.sort(np.maximum(np.asarray(eigenvalues, float), 0))[::-1]
    sums = np.cumsum(ordered)
    if not len(sums) or not sums[-1] > 0:
        return 0
    enough = sums / sums[-1] >= explained - 1e-12
    return int(np.argmax(enough)) + 1


@dataclass(frozen=True)
class Spectrum:
    """The principal components of what one producer of a group makes: see `responses.spectra`.

    Attributes:
        name: of the layer.
        eigenvalues: variance along each component, descending, shape (channels,).
        slices: channels per unit.
    """

    name: str
    eigenvalues: np.ndarray
    slices: int = 1

    def units(self, explained: float) -> int:
        """Units that have as many channels as it takes components to explain this fraction of the variance."""
        return math.ceil(components(self.eigenvalues, explained) / self.slices)

    def share(self, units: int) -> float:
        """The fraction of the variance that as many components as these units have channels explain at most."""
        total = float(self.eigenvalues.sum())
        return float(self.eigenvalues[: units * self.slices].sum()) / total if total > 0 else 1.0


def pca(
    scores: list[np.ndarray],
    amount: float,
    spectra: Sequence[Sequence[Spectrum]] | None = None,
    explained: float | None = None,
) -> list[np.ndarray]:
    """Of each group as many units as it takes principal components to explain the same fraction of the variance.

    The fraction is 1 - 10^(-12 (1 - amount)): the long tails of spectra, where it is next to 1, get their share of the
    amounts. An amount of 0 keeps all. Of several producers of a group the one that needs most decides.

    [Riera et al. 2019, arXiv:1906.02535; Garg et al. 2018, arXiv:1812.06224; a reconstruction]

    Args:
        scores: per group; the lowest leave.
        amount: in [0, 1].
        spectra: per group, of each producer; default: as many equal components as units.
        explained: the fraction itself, whatever the amount.

    >>> steep = [Spectrum("conv", np.array([1, 1e-3, 1e-6, 1e-9]))]
    >>> [int((~pca([np.arange(4.0)], amount, [steep])[0]).sum()) for amount in (0, 0.4, 0.6, 0.8)]
    [4, 3, 2, 1]
    """
    if spectra is None:
        spectra = [[Spectrum("", np.ones(len(s)))] for s in scores]
    if explained is None and amount <= 0:
        return [np.zeros(len(s), bool) for s in scores]
    explained = 1 - 10 ** (-DECADES * (1 - amount)) if explained is None else explained
    return [
        _lowest(s, max(0, len(s) - max(each.units(explained) for each in found))) for s, found in zip(scores, spectra)
    ]


def greedy(scores: list[np.ndarray], amount: float) -> list[np.ndarray]:
    """The units that cost least: by the logarithm of the share of their group's scores that would be left.

    What passes through layers one after the other passes through the product of their shares, and a group that has
    little left gives up the rest dearly. `plan` divides this cost by what a step saves of the measure, so that with a
    table of latencies a group stops at the edge of a stair; here every unit saves the same.

    >>> [r.tolist() for r in greedy([np.array([1.0, 1.0, 2.0]), np.array([0.1, 9.0])], 0.4)]
    [[True, False, False], [True, False]]
    """
    orders = [np.argsort(s, kind="stable") for s in scores]
    prices = [np.diff(log_losses(s[o]), prepend=0.0) for s, o in zip(scores, orders)]
    group = np.concatenate([np.full(len(p), k) for k, p in enumerate(prices)] or [np.zeros(0, int)])
    cheapest = np.argsort(np.concatenate(prices or [np.zeros(0)]), kind="stable")
    taken = np.bincount(group[cheapest[: int(amount * sum(map(len, scores)) + 1e-9)]], minlength=len(scores))
    return [_lowest(s, int(n)) for s, n in zip(scores, taken)]


def log_losses(scores: np.ndarray) -> np.ndarray:
    """ln(sum of all scores / sum of those that stay) when the first 1, 2, ... of them have left, shape (units - 1,).

    Args:
        scores: ascending; those of units that are gone are -inf and cost nothing.
    """
    there = np.where(np.isfinite(scores), scores, 0.0)
    there = there - min(0.0, there.min(initial=0.0))  # a function of the user's own may go below 0
    left, least = there.sum() - np.cumsum(there)[:-1], np.finfo(float).tiny
    return np.log(max(there.sum(), least)) - np.log(np.maximum(left, least))


def _lowest(scores: np.ndarray, n: int) -> np.ndarray:
    leaves = np.zeros(len(scores), bool)
    # By rank, never by a threshold: with ties exactly n leave.
    leaves[np.argsort(scores, kind="stable")[: min(n, len(scores) - 1)]] = True
    return leaves


BUDGETS: dict[str, Budget] = {
    "uniform": uniform,
    "global": global_,
    "error_bound": error_bound,
    "greedy": greedy,
    "pca": pca,
}


def get(budget: str | Budget) -> Budget:
    """A budget by name, or the function itself.

    Raises:
        ValueError: an unknown name.
    """
    if callable(budget):
        return budget
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise ValueError(
            f"budget={budget!r} is not known. Known: {', '.join(sorted(BUDGETS))}. "
            "Or pass a function (scores, amount) -> removed."
        )
    return BUDGETS[budget]
