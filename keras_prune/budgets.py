"""Scores and one number to the units that leave.

A budget is a function `(scores, amount) -> removed`: a list of score arrays, one per group, and an amount in 0..1;
the answer is a list of boolean arrays, True = leaves. More amount never brings a unit back, and no group is emptied.
`plan` turns the amount until the asked sparsity of the measure is met.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SPARED = 0.1
"""Fraction of each group that the global budget takes only when nothing else is left: an emptied layer cuts the
network in two, whatever its scores say."""

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


def _lowest(scores: np.ndarray, n: int) -> np.ndarray:
    leaves = np.zeros(len(scores), bool)
    # By rank, never by a threshold: with ties exactly n leave.
    leaves[np.argsort(scores, kind="stable")[: min(n, len(scores) - 1)]] = True
    return leaves


BUDGETS: dict[str, Budget] = {"uniform": uniform, "global": global_}


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
