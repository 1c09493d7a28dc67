"""As small as possible within a drop of accuracy that the user names, without training."""

from __future__ import annotations

import hashlib
import json
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np

from keras_prune import criteria, metrics
from keras_prune.channels import Channels
from keras_prune.files import check_writable, replacing
from keras_prune.planning import check_round_to, name_of, protected
from keras_prune.plans import Plan, described
from keras_prune.scoring import scores_of
from keras_prune.surgery import check_finite, copied, dead_units, write_zeros, zero_masks
from keras_prune.widths import Choice

Evaluate = Callable[[keras.Model], float]
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of each group alone, in the sensitivity scan."""


@dataclass(frozen=True)
class SearchReport:
    """What `search` found.

    Attributes:
        plan: the Plan; `plan.cut()` is the small model.
        accuracy: (before, after), as `evaluate` gave it, in [0, 1].
        max_drop: points that were allowed.
        curves: {group: [(fraction of its units removed, accuracy), ...]}, each group pruned alone.
        evaluations: how many were made; those found in the cache are not counted.
    """

    plan: Plan
    accuracy: tuple[float, float]
    max_drop: float
    curves: dict[str, list[tuple[float, float]]] = field(repr=False)
    evaluations: int

    def __str__(self) -> str:
        before, after = self.accuracy
        gone = f"{100 * (after - before):+.2f} points"
        return (
            f"{self.plan}\n  {'accuracy':<18} {before:14.2%} -> {after:14.2%}   {gone}, "
            f"at most -{self.max_drop:g} were allowed; {self.evaluations} evaluations"
        )

    def to_json(self) -> str:
        content = {k: v for k, v in vars(self).items() if k != "plan"}
        return json.dumps({**content, "plan": json.loads(self.plan.to_json())}, indent=1)

    def plot(self, path: str | Path) -> None:
        """The curves as a picture, .png or .svg."""
        from matplotlib.figure import Figure  # an import of 0.2 s that only pictures need

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name, points in self.curves.items():
            axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], marker="o", markersize=3, label=name)
        axes.axhline(100 * self.accuracy[0] - self.max_drop, color="#777777", linestyle=":")
        axes.set_xlabel("units of one group removed (%)")
        axes.set_ylabel("accuracy (%)")
        axes.grid(alpha=0.3)
        if len(self.curves) <= 20:
            figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        figure.savefig(path, dpi=150)


def search(
    model: keras.Model,
    evaluate: Evaluate,
    max_drop: float = 0.5,
    *,
    measure: str | metrics.Measure = "macs",
    criterion: str | criteria.Criterion = "l2",
    sparsities: Sequence[float] = SPARSITIES,
    round_to: int = 8,
    protect: Sequence = (),
    data=None,
    seed: int | None = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> SearchReport:
    """Remove as much as costs no more than `max_drop` points of accuracy, without training between.

    A scan prunes each group alone and evaluates. One price, in accuracy per amount of the measure, then decides for
    all groups how far along its curve each goes, and is raised as long as the network with all of that removed keeps
    the drop. At last, group by group, one step more is tried while the drop allows one. That is the best of all widths
    where drops and savings add up over the groups; where they do not, it is what can be reached so.

    Args:
        model: a built Functional or Sequential model; it is not changed.
        evaluate: (model) -> accuracy in [0, 1], higher is better, on data that is not used to report the result: what
            is chosen by an accuracy is too good on the data it was chosen by. It is given one copy of the model again
            and again, of the old size with zeros in it.
        max_drop: points of accuracy (hundredths) that may be lost.
        measure, criterion, round_to, protect, data, seed: as for `keras_prune.plan`.
        sparsities: of each group alone, in the scan.
        cache: a .json file that keeps every evaluation: a search that is killed goes on where it was, another max_drop
            or measure takes the same scan. It belongs to one network, criterion and `evaluate`; the last cannot be
            checked, so another evaluate needs another file.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: an argument out of range, a cache of another network, accuracies that are no fractions.

    Example:
        >>> found = search(model, lambda m: m.evaluate(x, y, return_dict=True)["accuracy"])     # doctest: +SKIP
        >>> small = found.plan.cut()                                                          # doctest: +SKIP
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, numbers.Real) or not 0 <= max_drop < 100:
        raise ValueError(f"max_drop={max_drop!r} was passed to search; expected points of accuracy, in [0, 100).")
    sparsities = sorted(sparsities)
    if not sparsities or not all(isinstance(s, numbers.Real) and 0 < s < 1 for s in sparsities):
        raise ValueError(f"sparsities={sparsities!r} was passed to search; expected fractions above 0 and below 1.")
    check_round_to(round_to, "search")
    if cache is not None:
        check_writable(str(cache))
    from rich.progress import MofNCompleteColumn, Progress  # an import that only this needs

    channels = Channels(model)
    choice, scores, reasons = _choice(channels, measure, criterion, round_to, protect, data, seed)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not progress) as bar:
        trials = _Trials(choice, evaluate, cache, f"{name_of(criterion)}, seed {seed}", bar)
        before = trials.accuracy(choice.whole)
        levels = [_levels(choice, k, sparsities) for k in range(len(choice.groups))]
        trials.expect(sum(map(len, levels)), "scan")
        alone = [[trials.accuracy(_with(choice.whole, k, n)) for n in ns] for k, ns in enumerate(levels)]
        allowed = before - max_drop / 100 - 1e-9
        counts = _settle(trials, levels, alone, before, allowed)
    reached, largest = choice.sparsity(counts), choice.largest()
    found = described(
        channels,
        choice.removed(counts),
        sentence=f"remove {name_of(measure)} for at most {max_drop:g} points of accuracy, by {name_of(criterion)}, "
        f"widths in multiples of {round_to}",
        asked=reached,
        reached=reached,
        largest=largest,
        scores=scores,
        reasons=reasons,
        notes=[f"chosen by {trials.evaluations} evaluations: measure the result on other data"],
        measures={name_of(measure): choice.measure},
    )
    curves = {
        f"{n}: {g.name}": [(0.0, before), *((1 - kept / len(g), a) for kept, a in zip(levels[n], alone[n]))]
        for n, g in enumerate(choice.groups)
    }
    return SearchReport(found, (before, trials.accuracy(counts)), float(max_drop), curves, trials.evaluations)


def _choice(channels, measure, criterion, round_to, protect, data, seed) -> tuple[Choice, dict, dict]:
    """The groups that may lose units and the order in which these leave; scores and reasons by group index."""
    check_finite(channels.model)
    reasons, already = protected(channels, protect), dead_units(channels, strict=True)
    alive = channels.alive(already)
    scores, _ = scores_of(channels, criterion, data, reasons, alive, seed=seed)
    free = [g for g in channels.groups if g.index not in reasons]
    if not free:
        raise ValueError(f"Nothing can be pruned: {'; '.join(dict.fromkeys(reasons.values())) or 'no groups'}.")
    choice = Choice(channels, free, [scores[g.index] for g in free], None, metrics.get(measure), round_to, already)
    return choice, scores, reasons


def _levels(choice: Choice, k: int, sparsities: Sequence[float]) -> list[int]:
    """Units kept of a group at these sparsities, on the grid, falling."""
    whole, step, least = choice.whole[k], choice.grid(choice.groups[k]), choice.least(choice.groups[k])
    kept = {max(least, int((1 - s) * whole / step + 0.5) * step) for s in sparsities}
    return sorted((n for n in kept if n < whole), reverse=True)


def _with(counts: list[int], k: int, kept: int) -> list[int]:
    return [kept if n == k else c for n, c in enumerate(counts)]


def _settle(trials: _Trials, levels, alone, before: float, allowed: float) -> list[int]:
    """Units kept per group: by one price for all of them, then step by step."""
    choice = trials.choice
    saved = [
        [choice.sparsity(_with(choice.whole, k, n)) - choice.sparsity(choice.whole) for n in [choice.whole[k], *ns]]
        for k, ns in enumerate(levels)
    ]
    drops = [[0.0, *(before - a for a in accuracies)] for accuracies in alone]
    prices = {
        (d[j] - d[i]) / (s[j] - s[i])
        for s, d in zip(saved, drops)
        for j in range(len(s))
        for i in range(j)
        if s[j] > s[i]
    }
    prices = sorted({0.0, *(price for price in prices if price > 0)})

    def widths(price: float) -> list[int]:
        best = [int(np.argmax(np.array(s) * (price + 1e-9) - np.array(d))) for s, d in zip(saved, drops)]
        return [[choice.whole[k], *levels[k]][place] for k, place in enumerate(best)]

    trials.expect(len(prices).bit_length(), "all groups together")
    low, high, counts = 0, len(prices), list(choice.whole)
    while low < high:
        middle = (low + high) // 2
        if trials.accuracy(widths(prices[middle])) >= allowed:
            low, counts = middle + 1, widths(prices[middle])
        else:
            high = middle
    trials.expect(len(counts), "step by step")
    open_groups = set(range(len(counts)))
    while open_groups:
        steps = {}
        for k in open_groups:
            grid, least = choice.grid(choice.groups[k]), choice.least(choice.groups[k])
            steps[k] = _with(counts, k, max(least, (counts[k] - 1) // grid * grid))
        k = max(steps, key=lambda k: (choice.sparsity(steps[k]), -k))
        if steps[k] != counts and trials.accuracy(steps[k]) >= allowed:
            counts = steps[k]
        else:
            open_groups.remove(k)
    return counts


class _Trials:
    """Evaluations of pruned networks, each made once and kept in the cache.

    Attributes:
        evaluations: how many were made here.
    """

    def __init__(self, choice: Choice, evaluate: Evaluate, cache: str | Path | None, words: str, bar):
        self.choice, self.evaluate, self.cache, self.bar = choice, evaluate, cache, bar
        self.evaluations, self.task = 0, bar.add_task("dense", total=1)
        self.copy, self.twins = copied(choice.channels)
        self.full = [keras.ops.convert_to_numpy(v).copy() for v in self.copy.weights]
        digest = hashlib.sha256(words.encode())
        for array in (*self.full, *choice.orders):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.of = digest.hexdigest()
        self.known: dict[str, float] = self._read()

    def expect(self, more: int, what: str) -> None:
        self.bar.update(self.task, total=self.bar.tasks[0].completed + more, description=what)

    def accuracy(self, counts: Sequence[int]) -> float:
        """Of the network with so many units left in each group."""
        key = ",".join(map(str, counts))
        if key not in self.known:
            for weight, mask in zero_masks(self.choice.channels, self.choice.removed(list(counts))):
                write_zeros(self.twins[id(weight.variable)], mask)
            try:
                found = float(self.evaluate(self.copy))
            finally:
                for variable, value in zip(self.copy.weights, self.full):
                    variable.assign(value)
            if not 0 <= found <= 1:
                raise ValueError(
                    f"evaluate returned {found}; expected an accuracy in [0, 1]. Of percent return p / 100."
                )
            self.known[key] = found
            self.evaluations += 1
            self._write()
        self.bar.advance(self.task)
        return self.known[key]

    def _read(self) -> dict[str, float]:
        if self.cache is None or not os.path.isfile(self.cache):
            return {}
        stored = json.loads(Path(self.cache).read_text())
        if stored.get("of") != self.of:
            raise ValueError(
                f"{self.cache} holds evaluations of another network, or of another criterion; give another cache=."
            )
        return stored["accuracies"]

    def _write(self) -> None:
        if self.cache is not None:
            with replacing(self.cache) as file:
                file.write(json.dumps({"of": self.of, "accuracies": self.known}, indent=1).encode())
