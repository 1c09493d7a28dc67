"""How many units of each group leave, so that limits are met at the least cost."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from keras_prune.rules import Ids

AHEAD = (1, 2, 4, 8)
"""Steps of the grid that are looked at in one go: a curve may be flat first and then steep, or the other way round."""


class Search:
    """An allocation in progress: take from the group where a step costs least for what it saves.

    Args:
        groups: groups that may shrink.
        orders: per group the places of its units in the order in which they leave, (units - 1,).
        costs: per group what 1, 2, ... units cost together, (units - 1,).
        limit: removed units -> how far above the limits the model is, 0 where they are met.
        round_to: widths in channels are multiples of this, or stay whole.
        already: units that are gone in any case.

    Attributes:
        counts: number of units that leave, per group; 0 at first.
        steps: what these numbers may be besides 0, per group, ascending.
        now: how far above the limits it is after `settle`; above 0 they are out of reach.
    """

    def __init__(self, groups, orders, costs, limit: Callable[[Ids], float], round_to: int = 8, already: Ids = ()):
        self.groups, self.orders, self.already = groups, orders, already
        self.costs = [np.concatenate([[0.0], c]) for c in costs]
        self.counts = [0] * len(groups)
        self.steps = [_grid(len(g), round_to // math.gcd(round_to, g.slices)) for g in groups]
        self.limit = limit
        self.now = self.excess(self.counts)

    def leaving(self, counts: Sequence[int]) -> Ids:
        """The ids of the units that leave at these counts."""
        parts = [g.units[o[:n]] for g, o, n in zip(self.groups, self.orders, counts)]
        return np.unique(np.concatenate([np.asarray(self.already, int), *parts]))

    def excess(self, counts: Sequence[int]) -> float:
        return self.limit(self.leaving(counts))

    def settle(self, fixed: int | None = None) -> None:
        """From whatever the counts are: take until the limits are met, then give back what they allow.

        Args:
            fixed: a group that keeps its count.
        """
        self.now = self.excess(self.counts)
        self._take(fixed)
        self._give_back(fixed)

    def _take(self, fixed) -> None:
        """A heap of offers. What others give up makes a step worth less, so that an old offer is only too good; one
        that was worth nothing is asked again, for a limit on a peak rewards a group only while it makes the peak."""
        free = [k for k in range(len(self.groups)) if k != fixed]
        offers: list[tuple] = []
        waiting, clock = set(free), 0
        while self.now > 0:
            for k in waiting:
                heapq.heappush(offers, (-math.inf, k, None))
            waiting = set()
            taken = None
            while offers:
                _, k, made = heapq.heappop(offers)
                if made is not None and made[0] == clock:
                    taken = k, made[1]
                    break
                offer = self._offer(k)
                if offer is None or offer[0] == math.inf:
                    waiting.add(k)
                else:
                    heapq.heappush(offers, (offer[0], k, (clock, offer[1])))
            taken = taken or self._cheapest(free)
            if taken is None:
                return
            k, self.counts[k] = taken
            self.now = self.excess(self.counts)
            waiting.add(k)
            clock += 1

    def _cheapest(self, free: Sequence[int]) -> tuple[int, int] | None:
        """(group, number) of the cheapest next step: where none saves anything alone, two may together."""
        further = [(k, n) for k in free for n in self.steps[k] if n > self.counts[k]]
        nearest = {k: n for k, n in reversed(further)}
        steps = [(self.costs[k][n] - self.costs[k][self.counts[k]], k, n) for k, n in nearest.items()]
        return min(steps)[1:] if steps else None

    def _offer(self, k: int) -> tuple[float, int] | None:
        """(cost per excess saved, number of units gone then) of the best next step of a group."""
        further = [n for n in self.steps[k] if n > self.counts[k]]
        best = None
        for n in {further[a - 1] for a in AHEAD if a <= len(further)}:
            saved = self.now - self.excess([*self.counts[:k], n, *self.counts[k + 1 :]])
            price = (self.costs[k][n] - self.costs[k][self.counts[k]]) / saved if saved > 0 else math.inf
            if best is None or (price, n) < best:
                best = (price, n)
        return best

    def _give_back(self, fixed) -> None:
        """Steps may have been too long, or for nothing: return what the limits allow, the most costly first."""
        again = True
        while again:
            again = False
            gains = []
            for k, count in enumerate(self.counts):
                lower = max((n for n in [0, *self.steps[k]] if n < count), default=None)
                if lower is not None and k != fixed:
                    gains.append((self.costs[k][count] - self.costs[k][lower], k, lower))
            for gain, k, lower in sorted(gains, reverse=True):
                if gain > 0 and self.excess([*self.counts[:k], lower, *self.counts[k + 1 :]]) <= self.now:
                    self.counts[k] = lower
                    again = True
                    break


def _grid(units: int, step: int) -> list[int]:
    """Numbers of units that may leave, ascending: what stays is a multiple of the step, and not nothing."""
    return [units - kept for kept in range((units - 1) // step * step, 0, -step)]
