"""Rows to scores: how much a unit matters. Higher = keep.

A criterion is a function `(units, features) -> (units,)`. A group has several producers (all convolutions that meet
in a sum, say): each is scored for itself, divided by its mean over the units, and the results are averaged, so that
every producer has the same say and a score of 1 means "an average unit of its group" in every group.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import numpy as np

Rows = np.ndarray
"""Shape (units, features): all numbers that belong to each unit of a group."""

Scores = np.ndarray
"""Shape (units,), higher = keep."""

Criterion = Callable[[Rows], Scores]


def l1(rows: Rows) -> Scores:
    """Sum of absolute weights [Li et al. 2017, arXiv:1608.08710].

    >>> l1(np.array([[3, -1], [0, 2]])).tolist()
    [4, 2]
    """
    return np.abs(rows).sum(axis=1)


def l2(rows: Rows) -> Scores:
    """Euclidean norm [He et al. 2018, arXiv:1808.06866].

    >>> l2(np.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [5.0, 2.0]
    """
    return np.sqrt(np.square(rows).sum(axis=1))


def linf(rows: Rows) -> Scores:
    """Largest absolute weight.

    >>> linf(np.array([[3, -4], [0, 2]])).tolist()
    [4, 2]
    """
    return np.abs(rows).max(axis=1)


def fpgm(rows: Rows) -> Scores:
    """Sum of distances to the other units: the one nearest the geometric median is the most replaceable.

    [He et al. 2019, arXiv:1811.00250, eq. 4, with the units themselves as candidates]
    """
    # |a - b|² = |a|² + |b|² - 2ab: matrix products instead of (units, units, features) numbers, in float64 because
    # of the difference, in blocks of features because VGG's first Dense layer has 25,088 of them.
    gram = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], 4096):
        block = rows[:, start : start + 4096].astype(np.float64)
        gram += block @ block.T
    squares = np.diag(gram)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * gram, 0))
    np.fill_diagonal(distances, 0)
    return distances.sum(axis=1)


def fpgm_mix(rows: Rows, by_norm: float = 0.1) -> Scores:
    """First the units of the smallest norm, then those nearest the geometric median of the others.

    The floor(by_norm * units) units of the smallest Euclidean norm have the lowest scores. All others have the sum of
    their distances among themselves; those before them the lowest such sum, times their norm as a share of the
    smallest norm that is left to distance. So scores are distances, and a unit by norm scores low where its norm does.

    [He et al. 2019, arXiv:1811.00250; their "mix 40 %" is 10 % by norm, then 30 % by distance, both of all units]

    Args:
        rows: (units, features).
        by_norm: fraction of the units that leave by their norm, in [0, 1); at least one unit is left to distance.

    Raises:
        ValueError: by_norm is no such fraction.

    >>> np.argsort(fpgm_mix(np.array([[3.0, 0], [0, 1], [2, 2], [2.2, 1.8], [-0.3, 0.2]]), by_norm=0.4)).tolist()
    [4, 1, 3, 2, 0]
    """
    if isinstance(by_norm, bool) or not isinstance(by_norm, numbers.Real) or not 0 <= by_norm < 1:
        raise ValueError(f"by_norm={by_norm!r} was passed to fpgm_mix; expected a fraction in [0, 1), such as 0.1.")
    norms = l2(rows).astype(np.float64)
    order = np.argsort(norms, kind="stable")
    count = min(int(by_norm * len(rows) + 1e-9), len(rows) - 1)
    first, others = order[:count], np.sort(order[count:])
    scores = np.empty(len(rows))
    distances = fpgm(rows[others])
    scores[others] = distances + 1e-9 * (distances.max() or 1.0)  # above 0, also where all of them are alike
    shares = norms[first] / max(norms[order[count]], np.finfo(float).tiny)
    shares *= 1 - 1e-9 * np.arange(count, 0, -1)  # equal norms leave in this order, and before the others
    scores[first] = scores[others].min() * shares
    return scores


def bn_scale(rows: Rows) -> Scores:
    """|gamma| of the BatchNormalization behind the unit [Liu et al. 2017, arXiv:1708.06519]. Rows are gammas."""
    return np.abs(rows).mean(axis=1)


def taylor(rows: Rows) -> Scores:
    """(gradient at a gate of 1 behind the unit)², averaged over batches [Molchanov et al. 2019, arXiv:1906.10771].

    Rows are such gradients, one feature per batch: sums of gradient x weight over gamma and beta of the normalisation
    behind the unit, or over kernel and bias where there is none.
    """
    return np.square(rows).mean(axis=1)


def taylor_weight(rows: Rows) -> Scores:
    """Sum of (gradient x weight)², averaged over batches [Molchanov et al. 2019, arXiv:1906.10771].

    Rows are such sums, one feature per batch: every weight counts for itself, so that a unit whose weights pull the
    loss in opposite ways is not taken for one that does nothing.
    """
    return np.asarray(rows).mean(axis=1)


CRITERIA: dict[str, Criterion | None] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "l1_folded": l1,  # of kernels times what normalisations behind them multiply by: see `FOLDED`
    "l2_folded": l2,
    "fpgm": fpgm,
    "fpgm_mix": fpgm_mix,
    "bn_scale": bn_scale,
    "taylor": taylor,  # of gates behind the normalisations, see `GATES`
    "taylor_weight": taylor_weight,
    "obs": None,  # looks at what reads the units, not at rows of their own: see `surgeon`
    "thinet": None,  # the same, and nobody takes over
    "pfp": None,  # the same: see `sensitivity`
    "pfp_max": None,  # the same, of single taps
    "hrank": None,  # looks at what the units answer: see `responses`
    "apoz": None,
    "random": None,  # needs a generator: see `get`
}

SCALES = frozenset({"bn_scale"})
"""Criteria whose rows are the scales of norms instead of kernels."""

FOLDED = frozenset({"l1_folded", "l2_folded"})
"""Criteria whose rows are kernels times gamma / sqrt(variance + epsilon) of the BatchNormalization right behind."""

GATES = frozenset({"taylor"})
"""Criteria whose rows are gradients at a gate: of gamma and beta of the norm behind a kernel, else kernel and bias."""


def _total(block: np.ndarray) -> np.ndarray:
    return block.sum(axis=1)


def _total_of_squares(block: np.ndarray) -> np.ndarray:
    return np.square(block).sum(axis=1)


LABELLED: dict[str, Callable[[Rows], np.ndarray]] = {"taylor": _total, "taylor_weight": _total_of_squares}
"""Criteria that need labelled data: their rows are gradients x weights, (units, weights) of one batch, of which this
makes the one feature of that batch, (units,)."""


def get(criterion: str | Criterion, seed: int | None = None) -> Criterion:
    """A criterion by name, or the function itself.

    Args:
        criterion: a name from `CRITERIA` or a function.
        seed: for "random".

    Raises:
        ValueError: an unknown name.
    """
    if callable(criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(
            f"criterion={criterion!r} is not known. Known: {', '.join(sorted(CRITERIA))}. "
            "Or pass a function (units, features) -> (units,)."
        )
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return lambda rows: rng.uniform(0.0, 1.0, len(rows))
    return CRITERIA[criterion]
