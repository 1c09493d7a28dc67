"""Which units leave, by what everything that reads them makes without them: ThiNet's greedy reconstruction.

[Luo, Wu, Lin 2017, arXiv:1707.06342] Numpy only. What unit j adds to an output value n of its reader is
x_nj; without the units T the value is off by the sum of their x_nj. So T grows by the unit that adds least to the sum
over n of that sum's square, which needs only the products K_jk = sum over n of x_nj x_nk.
"""

from __future__ import annotations

import numpy as np

SAMPLED = 16
"""Of a reader that is too wide for all products, and makes more than so many numbers, so many are drawn per row."""

CHUNK = 256
"""Rows of such a reader that are looked at together."""


def greedy(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places of the units in the order in which they leave, the error after each), shapes (units - 1,).

    The last one of all stays and is in neither. Errors may fall: a unit that makes up for another one follows it.

    Args:
        products: K, of what each two units contribute, shape (units, units).

    >>> x = np.array([[1, 2, 0.1, -2], [0.5, 1, -0.1, -1], [2, -1, 0.2, 1.5], [1, 0.5, 0, -0.4]])
    >>> order, errors = greedy(x.T @ x)
    >>> order.tolist()[:2], errors.round(6).tolist()[:2]
    ([2, 1], [0.06, 6.11])
    """
    products = np.asarray(products, np.float64)
    costs = np.diag(products).copy()  # of one more unit, beyond the error so far: K_jj + 2 (sum of K_jk over k in T)
    order, errors, error = [], [], 0.0
    for _ in range(len(products) - 1):
        unit = int(costs.argmin())
        error += costs[unit]
        order.append(unit)
        errors.append(max(error, 0.0))
        costs += 2 * products[unit]
        costs[unit] = np.inf
    return np.array(order, int), np.array(errors)


def products_of(gram: np.ndarray, weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """K over all rows and all outputs of a kernel, shape (units, units): of the sums XᵀX alone, no row is needed.

    Args:
        gram: XᵀX of the rows X that the kernel multiplies, shape (columns, columns).
        weights: shape (columns, outputs).
        columns: of each unit, shape (units, width).
    """
    found = np.zeros((len(columns), len(columns)))
    for places in columns.T:  # one column of each unit at a time, against all columns of all units
        shared = gram[places] * (weights[places] @ weights.T)
        for others in columns.T:
            found += shared[:, others]
    return found


def sampled_products(
    rows: np.ndarray, weights: np.ndarray, columns: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """(K, sum of the squares of what the kernel makes), where there are too many columns for the products of all.

    As in the paper, of each row only some of the outputs are looked at: `SAMPLED` of them, drawn with replacement.
    All of them, without chance, if there are no more.

    Args:
        rows: shape (rows, columns).
        weights, columns: as for `products_of`.
        rng: draws the outputs.
    """
    outputs, order = weights.shape[1], columns.ravel()
    rest = np.setdiff1d(np.arange(len(weights)), order)  # columns of other groups
    found, energy = np.zeros((len(columns), len(columns))), 0.0
    across = np.ascontiguousarray(weights.T)  # a drawn output's weights side by side
    for number in range(min(outputs, SAMPLED)):
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            drawn = np.full(len(some), number) if outputs <= SAMPLED else rng.integers(outputs, size=len(some))
            each = some * across[drawn]
            shares = each[:, order].reshape(len(some), *columns.shape).sum(2, dtype=np.float64)
            energy += float(np.square(shares.sum(1) + each[:, rest].sum(1, dtype=np.float64)).sum())
            found += shares.T @ shares
    return found, energy
