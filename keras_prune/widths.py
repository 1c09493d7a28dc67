"""The search for the widths that meet a sparsity, on the hardware's grid."""

from __future__ import annotations

import math

import numpy as np

from keras_prune import theory
from keras_prune.allocation import Search
from keras_prune.budgets import log_losses
from keras_prune.groups import Group
from keras_prune.rules import Ids


class Choice:
    """The search for the widths: how many units of each group stay, on the grid, to meet the sparsity."""

    def __init__(self, channels, groups, scores, budget, measure, round_to, already):
        self.channels, self.groups, self.scores = channels, groups, scores
        self.budget, self.measure, self.round_to = budget, measure, round_to
        self.already = np.asarray(already, int)  # also units of protected groups
        self.total = float(measure(channels, ()))
        if not self.total > 0:
            raise ValueError(f"The measure of the whole model is {self.total}; expected a number above 0.")
        self.orders: list[np.ndarray] = [np.argsort(s, kind="stable") for s in scores]
        self.whole = [int(np.isfinite(s).sum()) for s in scores]  # units that are still there

    def grid(self, group: Group) -> int:
        """Units per rounding step: a unit of a grouped convolution is several channels."""
        return self.round_to // math.gcd(self.round_to, group.slices)

    def least(self, group: Group) -> int:
        return min(self.grid(group), len(group))

    def counts(self, amount: float, up: bool = False) -> list[int]:
        """Units kept per group at this amount, rounded to the grid, or up to it; the order in which they leave is kept
        too."""
        leaves = self.budget(self.scores, amount)
        kept = []
        for k, (group, gone) in enumerate(zip(self.groups, leaves)):
            # What the budget removes goes first, then the lowest scores: rounding may take or give back a few.
            self.orders[k] = np.lexsort((self.scores[k], ~gone))
            n, step = len(group) - int(gone.sum()), self.grid(group)
            rounded = math.ceil(n / step) * step if up else int(n / step + 0.5) * step
            kept.append(min(self.whole[k], len(group) if rounded >= len(group) else max(rounded, self.least(group))))
        return kept

    def removed(self, counts: list[int], drawn: dict[int, theory.Draw] | None = None) -> Ids:
        """Those of the lowest scores, and where units were drawn, those that were not."""
        parts = [
            g.units[drawn[g.index].multipliers == 0] if drawn and g.index in drawn else g.units[o[: len(g) - n]]
            for g, o, n in zip(self.groups, self.orders, counts)
        ]
        return np.union1d(np.concatenate(parts), self.already).astype(int)

    def drawn(self, counts: list[int], mode: str, seed: int | None) -> dict[int, theory.Draw]:
        """By group index, draws that give so many units on average, of all groups that have to lose some."""
        rng, found = np.random.default_rng(seed), {}
        for group, scores, whole, count in zip(self.groups, self.scores, self.whole, counts):
            weights = np.where(np.isfinite(scores), scores, 0.0)
            if count < whole and count < np.count_nonzero(weights):  # else the units that say nothing leave
                found[group.index] = theory.draw(weights / weights.sum(), count, mode, rng)
        return found

    def sparsity(self, counts: list[int], drawn: dict[int, theory.Draw] | None = None) -> float:
        return 1 - float(self.measure(self.channels, self.removed(counts, drawn))) / self.total

    def narrowest(self) -> list[int]:
        """Counts with every group at its least width."""
        return [min(n, self.least(g)) for g, n in zip(self.groups, self.whole)]

    def largest(self) -> float:
        """The largest possible sparsity."""
        return self.sparsity(self.narrowest())

    def greedy(self, excess) -> list[int]:
        """Counts that meet limits at the least loss of scores: taken where a step costs least for what it saves.

        Args:
            excess: removed units -> how far above the limits the model is, 0 where they are met.
        """
        self.orders = [np.argsort(s, kind="stable") for s in self.scores]
        costs = [log_losses(s[o]) for s, o in zip(self.scores, self.orders)]
        search = Search(self.groups, [o[:-1] for o in self.orders], costs, excess, self.round_to, self.already)
        search.settle()
        return [min(n, len(g) - count) for g, n, count in zip(self.groups, self.whole, search.counts)]

    def search(self, target: float, at_least: bool = False) -> tuple[list[int], float]:
        """(counts, largest possible sparsity): bisect the amount, then go over group by group.

        Args:
            target: sparsity to come as near to as the grid allows.
            at_least: rather above it than below.
        """
        whole, least, largest = list(self.whole), self.narrowest(), self.largest()
        if target <= self.sparsity(whole):
            return whole, largest
        if target >= largest:
            return least, largest
        low, high, below, above = 0.0, 1.0, whole, least
        for _ in range(40):
            middle = (low + high) / 2
            counts = self.counts(middle)
            if self.sparsity(counts) < target:
                low, below = middle, counts
            else:
                high, above = middle, counts
            if high - low < 1e-6:
                break
        self.counts(high)  # the order in which units leave, as at the upper end
        return self._between(below, above, target, at_least), largest

    def _between(self, below: list[int], above: list[int], target: float, at_least: bool) -> list[int]:
        """Widths that jump together at one amount are moved one rounding step at a time, until the target is met."""

        def rated(counts) -> tuple[bool, float, list[int]]:
            reached = self.sparsity(counts)
            return at_least and reached < target, abs(reached - target), list(counts)

        counts, best = list(below), min(rated(below), rated(above))
        moves = [k for k in range(len(counts)) for _ in range(self._steps(k, below[k], above[k]))]
        moves.sort(key=lambda k: len(self.groups[k]))
        for k in reversed(moves):
            group, step = self.groups[k], self.grid(self.groups[k])
            counts[k] = max(above[k], (counts[k] - 1) // step * step)
            if counts[k] < self.least(group):
                counts[k] = self.least(group)
            best = min(best, rated(counts))
            if self.sparsity(counts) >= target:
                break
        return best[2]

    def _steps(self, k: int, below: int, above: int) -> int:
        step = self.grid(self.groups[k])
        return max(0, math.ceil((below - above) / step))

    def explain(self, asked: float, reached: float, largest: float, is_settled=True, is_over=False) -> list[str]:
        """Why the sparsity reached is another than that asked for, if it is by 2 points, or beyond a limit."""
        if abs(asked - reached) <= 0.02 and not is_over:
            return []
        if asked > largest:
            small = [g.name for g in self.groups if len(g) <= self.grid(g)]
            why = f"every group is at its least width (multiples of {self.round_to}, never empty)"
            if small:
                why += f"; {len(small)} groups are no wider than one step and stay whole: {', '.join(small[:3])}"
            return [
                f"asked {asked:.1%}, but the largest possible is {largest:.1%}: {why}. Lower round_to or protect less"
            ]
        if not is_settled:
            return [
                "the measure is an estimate; it was corrected at the widths chosen, and still moves by more than this"
            ]
        return [
            f"one rounding step of {self.round_to} channels is worth more than 2 points here; lower round_to to come "
            "closer"
        ]
