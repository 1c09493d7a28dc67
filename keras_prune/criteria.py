"""Rows to scores: how much a unit matters. Higher = keep.

A criterion is a function `(units, features) -> (units,)`. A group has several producers (all convolutions that meet
in a sum, say): each is scored for itself, divided by its mean over the units, and the results are averaged, so that
every producer has the same say and a score of 1 means "an average unit of its group" in every group.
"""

from __future__ import annotations

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


def bn_scale(rows: Rows) -> Scores:
    """|gamma| of the BatchNormalization behind the unit [Liu et al. 2017, arXiv:1708.06519]. Rows are gammas."""
    return np.abs(rows).mean(axis=1)


def taylor(rows: Rows) -> Scores:
    """(sum of gradient x weight)², averaged over batches [Molchanov et al. 2019, arXiv:1906.10771, eq. 8].

    Rows are such sums, one feature per batch.
    """
    return np.square(rows).mean(axis=1)


CRITERIA: dict[str, Criterion | None] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "fpgm": fpgm,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "obs": None,  # looks at what reads the units, not at rows of their own: see `surgeon`
    "pfp": None,  # the same: see `sensitivity`
    "pfp_max": None,  # the same, of single taps
    "random": None,  # needs a generator: see `get`
}

SCALES = frozenset({"bn_scale"})
"""Criteria whose rows are the scales of norms instead of kernels."""


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
