"""Streamed normal equations, ridge refits, and the optimal brain surgeon that removes whole blocks of columns.

Numpy only. Rows X are what a kernel multiplies, targets Y what it should make of them; both come per block (see
`keras_prune.linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

EXACT = 1024
"""Products of up to so many columns are taken in float64; wider ones in float32, summed in float64."""


class Normal:
    """Sums over rows, from which every least-squares fit follows.

    Args:
        blocks, columns, outputs: sizes.

    Attributes:
        count: rows seen.
        gram: XᵀX, shape (blocks, columns, columns).
        cross: XᵀY, shape (blocks, columns, outputs).
        sum_x, sum_y: sums over the rows.
        square: sum of Y², shape (blocks, outputs).
    """

    def __init__(self, blocks: int, columns: int, outputs: int):
        self.count = 0
        self.gram = np.zeros((blocks, columns, columns))
        self.cross = np.zeros((blocks, columns, outputs))
        self.sum_x = np.zeros((blocks, columns))
        self.sum_y = np.zeros((blocks, outputs))
        self.square = np.zeros((blocks, outputs))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Rows (blocks, rows, columns) and their targets (blocks, rows, outputs)."""
        kind = np.float64 if x.shape[2] <= EXACT else np.float32
        x, y = x.astype(kind), y.astype(kind)
        turned = x.transpose(0, 2, 1)
        self.gram += turned @ x
        self.cross += turned @ y
        self.sum_x += x.sum(1, dtype=np.float64)
        self.sum_y += y.sum(1, dtype=np.float64)
        self.square += np.square(y).sum(1, dtype=np.float64)
        self.count += x.shape[1]

    def centred(self) -> Normal:
        """The same about the means: what a fit with a free intercept sees."""
        new, n = Normal(0, 0, 0), max(self.count, 1)
        new.count, new.sum_x, new.sum_y = self.count, self.sum_x, self.sum_y
        new.gram = self.gram - self.sum_x[:, :, None] * self.sum_x[:, None] / n
        new.cross = self.cross - self.sum_x[:, :, None] * self.sum_y[:, None] / n
        new.square = self.square - np.square(self.sum_y) / n
        return new

    def error(self, weights: np.ndarray) -> np.ndarray:
        """|Y - X W|², shape (blocks, outputs)."""
        fitted = (weights * (self.gram @ weights)).sum(1)
        return np.maximum(self.square - 2 * (weights * self.cross).sum(1) + fitted, 0.0)

    def ridge(self, strength: float | None = None) -> np.ndarray:
        """λ of each block, shape (blocks, 1, 1): `strength` times the mean diagonal of XᵀX.

        Default: columns ÷ rows, and at least 1e-3. The fewer rows there are for each unknown, the more the original
        weights are to be believed.
        """
        columns = max(1, self.gram.shape[1])
        if strength is None:
            strength = max(1e-3, columns / max(1, self.count))
        mean = np.trace(self.gram, axis1=1, axis2=2) / columns
        return (strength * np.where(mean > 0, mean, 1.0))[:, None, None]


def refit(normal: Normal, prior: np.ndarray, strength: float | None = None) -> np.ndarray:
    """argmin |Y - X W|² + λ |W - prior|², shape as `prior`; λ as `Normal.ridge` has it."""
    size = normal.ridge(strength)
    return np.linalg.solve(normal.gram + size * np.eye(normal.gram.shape[1]), normal.cross + size * prior)


def refit_wide(x: np.ndarray, y: np.ndarray, prior: np.ndarray, strength: float | None = None) -> np.ndarray:
    """The same for more columns than rows, by a system as large as the rows: W = prior + Xᵀ(XXᵀ + λI)⁻¹(Y - X prior).

    Args:
        x: (rows, columns).
        y: (rows, outputs).
        prior: (columns, outputs).
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    strength = max(1e-3, x.shape[1] / max(1, len(x))) if strength is None else strength
    size = strength * max(np.square(x).sum() / x.shape[1], 1e-30)
    return prior + x.T @ np.linalg.solve(x @ x.T + size * np.eye(len(x)), y - x @ prior)


@dataclass
class Reader:
    """One consumer's share in the decision which units leave.

    Attributes:
        inverse: (XᵀX + λI)⁻¹, shape (columns, columns). It is used up.
        weights: shape (columns, outputs). They are brought up to date.
        columns: the columns of each unit, shape (units, width).
        importance: what a squared error of 1 counts.
        ridge: the λ in `inverse`.
    """

    inverse: np.ndarray
    weights: np.ndarray
    columns: np.ndarray
    importance: float = 1.0
    ridge: float = 0.0

    def __post_init__(self):
        self.original = self.weights.copy()

    def costs(self, units: np.ndarray) -> np.ndarray:
        """What the removal of each of these units costs, shape (units,): tr(W_Jᵀ [H_JJ]⁻¹ W_J)."""
        at = self.columns[units]
        own, w = self.inverse[at[:, :, None], at[:, None]], self.weights[at]
        if at.shape[1] == 1:
            return self.importance * np.square(w[:, 0]).sum(1) / own[:, 0, 0]
        return self.importance * np.einsum("uwo,uwo->u", w, np.linalg.solve(own, w))

    def remove(self, unit: int) -> None:
        """W ← W - H_:J [H_JJ]⁻¹ W_J and H ← H - H_:J [H_JJ]⁻¹ H_J: : the other columns take over."""
        j = self.columns[unit]
        factor = np.linalg.solve(self.inverse[np.ix_(j, j)], self.inverse[j])
        self.weights -= factor.T @ self.weights[j]
        self.inverse -= self.inverse[:, j] @ factor
        self.weights[j] = self.inverse[j] = self.inverse[:, j] = 0  # not almost: nothing grows from there

    def pull(self) -> float:
        """λ |W - original|²: what is in the costs until now, but is no error of what the kernel makes."""
        return self.importance * self.ridge * float(np.square(self.weights - self.original).sum())


@dataclass
class Elimination:
    """The order in which units leave, and what it costs.

    Attributes:
        order: places of the units, the cheapest first; the last one of all stays and is not in it.
        costs: what each removal costs at its time, the others having taken over what they can; λ |W - original|²
            is in it.
        errors: the squared errors alone after 1, 2, ... removals. With fewer rows than columns λ is large, and the
            costs are many times as large as this.
        weights: number of removed units -> the readers' weights then.
    """

    order: np.ndarray
    costs: np.ndarray
    errors: np.ndarray
    weights: dict[int, list[np.ndarray]] = field(default_factory=dict)


def eliminate(
    readers: Sequence[Reader], fixed: np.ndarray | None = None, looks: Sequence[int] = (), at_once: int = 128
) -> Elimination:
    """Optimal brain surgeon for blocks of weights: remove the cheapest unit, let the others take over, repeat.

    [Hassibi & Stork 1992, eq. 5, for the columns of a whole unit instead of one weight]

    Args:
        readers: everything that reads the units; their costs add up.
        fixed: costs from elsewhere, shape (units,), which do not change.
        looks: numbers of removed units at which the weights are wanted.
        at_once: of more than this many units, more than one leaves before the costs are computed anew. A unit that
            became dearer meanwhile than those behind it waits: the other half of a pair of equals.
    """
    units = len(fixed) if fixed is not None else len(readers[0].columns)
    alive, order, costs, pulls, found = np.arange(units), [], [], [], {}
    while len(alive) > 1:
        cost = np.zeros(len(alive)) if fixed is None else fixed[alive]
        cost = cost + sum(reader.costs(alive) for reader in readers)
        ranked = np.argsort(cost, kind="stable")
        several = min(len(alive) - 1, max(1, len(alive) // at_once))
        left = []
        for number, place in enumerate(ranked[:several]):
            unit = alive[[place]]
            now = cost[place]
            if number:
                now = sum(float(r.costs(unit)[0]) for r in readers) + (0.0 if fixed is None else fixed[unit[0]])
                if now > cost[ranked[several]]:
                    continue
            for reader in readers:
                reader.remove(int(unit[0]))
            left.append(place)
            order.append(int(unit[0]))
            costs.append(max(float(now), 0.0))
            pulls.append(sum(reader.pull() for reader in readers))
            if len(order) in looks:
                found[len(order)] = [reader.weights.copy() for reader in readers]
        alive = np.delete(alive, left)
    errors = np.maximum.accumulate(np.maximum(np.cumsum(costs) - pulls, 0.0))
    return Elimination(np.array(order, int), np.array(costs), errors, found)
