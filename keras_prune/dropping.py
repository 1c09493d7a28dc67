"""Drop pruning: what matters little is dropped by chance, and what was dropped comes back by chance.

[Jia et al.: Stochastic Model Pruning via Weight Dropping Away and Back, arXiv:1812.02035] What matters is judged anew
at every step, so a unit that was dropped too early can return. The paper's probabilities, and the value of what
returns, were not at hand: the chain here is a reconstruction.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from keras_prune import budgets, criteria, metrics
from keras_prune.channels import Channels, Group
from keras_prune.entries import Entries, count_of, lowest
from keras_prune.files import check_writable, replacing
from keras_prune.planning import plan, protected
from keras_prune.probes import gradient_times_weight
from keras_prune.pruners import GradualPruning, slots_of
from keras_prune.rules import Ids
from keras_prune.scoring import scores_of
from keras_prune.surgery import check_finite, zero_masks

WHOLE = ("weights", "filters")
REVIVED = ("value", "zero")
OF_ENTRIES = ("l1", "l2", "linf", "random", "taylor", "taylor_weight")
"""Criteria that say something about a single weight; of one number l1, l2 and linf are all its magnitude, and taylor
and taylor_weight the same."""
FAINT = 1e-6
"""What is gone is ranked by what it was, times this: below whatever is still there."""


def probabilities(sparsity: float, unimportant: float = 0.3, drop_out: float = 0.8) -> tuple[float, float]:
    """(drop_out, drop_in) of the chain whose fixed point is a sparsity.

    The pruned fraction s becomes s (1 - drop_in) + (1 - s) u drop_out, u = `unimportant`. It stays where it is at
    s = u drop_out / (u drop_out + drop_in), so drop_in = u drop_out (1 - s) / s. A gap to it shrinks by the factor
    1 - u drop_out / s each step; where that would be negative (the chain would overshoot), drop_out is s / u instead.

    [own derivation; the paper's values are not known here]

    >>> [round(p, 5) for p in probabilities(0.9, 0.3, 0.8)]
    [0.8, 0.02667]
    >>> [round(p, 5) for p in probabilities(0.2, 0.5, 0.8)]
    [0.4, 0.8]
    """
    drop_out = min(drop_out, sparsity / unimportant)
    return drop_out, unimportant * drop_out * (1 - sparsity) / sparsity if sparsity else 0.0


def drawn(
    scores: np.ndarray, gone: np.ndarray, unimportant: float, drop_out: float, drop_in: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the chain: (dropped, revived), boolean, shape (units,).

    Of the units that are there, the floor(unimportant * their number) of the lowest scores are dropped, each with
    probability `drop_out`; of those that are gone each comes back with probability `drop_in`.

    Args:
        scores: higher = keep, shape (units,); of units that are gone they do not count.
        gone: which units are pruned, shape (units,).

    >>> scores, gone = np.array([3.0, 1.0, 2.0, 0.0]), np.array([False, False, False, True])
    >>> drop, back = drawn(scores, gone, 0.7, 1.0, 0.0, np.random.default_rng(0))
    >>> np.flatnonzero(drop).tolist(), np.flatnonzero(back).tolist()
    ([1, 2], [])
    """
    there = np.flatnonzero(~gone)
    weak = there[np.argsort(scores[there], kind="stable")[: count_of(unimportant, there.size)]]
    dropped, revived = np.zeros(gone.size, bool), gone & (rng.random(gone.size) < drop_in)
    dropped[weak[rng.random(weak.size) < drop_out]] = True
    return dropped, revived


class DropPruning(GradualPruning):
    """Drops what matters little by chance and brings back by chance what was dropped, until exactly so much is zero.

    At every step before `stop`, of each kernel (or group of units) the `unimportant` fraction of the lowest scores
    is dropped, each entry or unit with probability `drop_out`; each that is pruned returns with probability
    `drop_in`. At `stop` the sparsity is met exactly, without chance: what is gone already leaves first, and if that is
    too much, what was largest returns. From then on nothing changes.

    Args:
        sparsity: in [0, 1): of the entries of the kernels (kind="weights"), or of `measure` (kind="filters").
        kind: "weights", single entries of kernels; "filters", whole units.
        unimportant: the fraction of what is still there that may be dropped in a step, above 0 and below 1.
        drop_out, drop_in: probabilities. Without drop_in both are those of `probabilities`, so that the chain flows to
            the sparsity (of units: to the fraction of them that it takes).
        revive: what returns has the "value" it had when it was dropped, or "zero": its kernel's entries are zero then.
            (All else of a unit comes back as it was: behind a ReLU nothing else would let it learn.)
        criterion: for filters as for `keras_prune.plan`; for weights "l1", "l2", "linf" (all of them the magnitude),
            "taylor", "taylor_weight", "random", or a function (entries, 1) -> (entries,).
        budget: how the last step spreads the sparsity: "uniform" over kernels or groups, as the chain does, or
            "global"; for filters any of `plan`.
        measure, round_to: for filters, as for `keras_prune.plan`.
        begin: first step of the chain.
        stop: step at which the sparsity is met; default: after 60 % of the training, the rest is recovery.
        every, unit: act each `every` steps; a step is an "epoch" or a "batch". What returned has that long to grow.
        protect, data: as for `keras_prune.plan`.
        seed: the same seed, the same draws.
        path: an .npz file for the values of what is gone. A run that is killed and restored
            (keras.callbacks.BackupAndRestore) goes on with its zeros and, with the same seed, its draws; with this file
            what returns has its value then too, and is zero otherwise.

    Attributes:
        probabilities: (drop_out, drop_in) in use, once training began.

    Logs:
        `dropped` and `revived` in the last step; of weights `weight_sparsity`, the fraction that is gone; of filters as
        FilterPruning: `sparsity`, `params`, `macs` without the units that are gone.

    Until `stop` only what makes a unit is zero, not what reads it: `strip` afterwards, not in between.

    [Jia et al., arXiv:1812.02035; probabilities, revived values, the last step and filters are a reconstruction]

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[DropPruning(0.9)])                     # doctest: +SKIP
        >>> model.fit(x, y, epochs=20, callbacks=[DropPruning(0.5, kind="filters")])     # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        kind: str = "weights",
        unimportant: float = 0.3,
        drop_out: float = 0.8,
        drop_in: float | None = None,
        revive: str = "value",
        criterion: str | criteria.Criterion = "l2",
        budget: str | budgets.Budget = "uniform",
        measure: str | metrics.Measure = "macs",
        round_to: int = 8,
        begin: int = 0,
        stop: int | None = None,
        every: int = 1,
        unit: str = "epoch",
        protect: Sequence = (),
        data=None,
        seed: int | None = None,
        path: str | Path | None = None,
    ):
        super().__init__(
            sparsity,
            begin=begin,
            stop=stop,
            every=every,
            unit=unit,
            criterion=criterion,
            budget=budget,
            measure=measure,
            round_to=round_to,
            protect=protect,
            data=data,
            seed=seed,
        )
        _check(kind, revive, unimportant, drop_out, drop_in)
        if kind == "weights":
            _check_for_weights(criterion, budget, measure, round_to)
        if path is not None:
            check_writable(str(path))
        self.kind, self.unimportant, self.revive, self.path = kind, unimportant, revive, path
        self.asked = drop_out, drop_in
        self.probabilities: tuple[float, float] | None = None
        self._is_settled = False
        self._seed = np.random.SeedSequence().entropy if seed is None else seed

    def begin(self) -> None:
        super().begin()
        made = _Single if self.kind == "weights" else _Units
        self._pool = made(self.channels, self.arguments, self.removed)
        self._is_settled, self._is_first = False, True
        self._memory = _Memory(self.channels, self.trainer.optimizer, self.revive)
        self._memory.hold(self._pool.masks(is_settled=False))
        drop_out, drop_in = self.asked
        if drop_in is None:
            fraction = self._pool.fraction(self.ramp["end"])
            drop_out, drop_in = probabilities(fraction, self.unimportant, drop_out)
        self.probabilities = drop_out, drop_in

    def masks(self, step: int):
        check_finite(self.model)
        if self._is_first and step > 0 and self.path is not None:
            self._memory.read(self.path)
        self._is_first = False
        self._moved = {"dropped": 0, "revived": 0}
        if not self._is_settled and step >= self.schedule.stop:
            self._is_settled = True
            self._settle()
        elif not self._is_settled and step >= self.schedule.begin:
            self._draw(step)
        self.removed = self._pool.removed()
        pairs = self._memory.hold(self._pool.masks(self._is_settled))
        if self.path is not None:
            self._memory.write(self.path)
        return pairs

    def figures(self) -> dict[str, float]:
        found = dict(self._moved)
        return {**found, **(super().figures() if self.kind == "filters" else self._pool.figures())}

    def on_train_end(self, logs=None):
        if not self._is_settled and self._last_step is not None:
            self._is_settled = True  # stopped early: what is gone now is gone for good
            self.prune(self._last_step)
        super().on_train_end(logs)

    def _draw(self, step: int) -> None:
        rng = np.random.default_rng([self._seed, step])  # of its own for each step: nothing to save for a resumed run
        scores = self._pool.scores([self._seed, step, 1])
        moved = np.zeros(2, int)
        for name, gone in self._pool.gone.items():
            if name in scores:
                dropped, revived = drawn(scores[name], gone, self.unimportant, *self.probabilities, rng)
                gone ^= dropped | revived
                moved += int(dropped.sum()), int(revived.sum())
        self._moved = dict(zip(("dropped", "revived"), moved.tolist()))

    def _settle(self) -> None:
        before = [gone.copy() for gone in self._pool.gone.values()]
        self._memory.faintly()
        self._pool.settle(self.ramp["end"], [self._seed, self.schedule.stop, 1], self.planned)
        now = self._pool.gone.values()
        self._moved = {
            "dropped": sum(int((b & ~a).sum()) for a, b in zip(before, now)),
            "revived": sum(int((a & ~b).sum()) for a, b in zip(before, now)),
        }


def _check(kind, revive, unimportant, drop_out, drop_in) -> None:
    for name, value, known in (("kind", kind, WHOLE), ("revive", revive, REVIVED)):
        if value not in known:
            raise ValueError(f"{name}={value!r} was passed to DropPruning; known: {', '.join(map(repr, known))}.")
    if isinstance(unimportant, bool) or not isinstance(unimportant, numbers.Real) or not 0 < unimportant < 1:
        raise ValueError(
            f"unimportant={unimportant!r} was passed to DropPruning; expected a fraction above 0 and below 1 of what "
            "is still there."
        )
    for name, value in (("drop_out", drop_out), ("drop_in", 0 if drop_in is None else drop_in)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} was passed to DropPruning; expected a probability from 0 to 1.")


def _check_for_weights(criterion, budget, measure, round_to) -> None:
    if not callable(criterion) and criterion not in OF_ENTRIES:
        raise ValueError(
            f"criterion={criterion!r} scores whole units, and kind='weights' drops single ones. Known for them: "
            f"{', '.join(OF_ENTRIES)}, or a function (entries, 1) -> (entries,). Or use kind='filters'."
        )
    if budget not in ("uniform", "global"):
        raise ValueError(f"budget={budget!r} is for kind='filters'; for weights: 'uniform', 'global'.")
    if measure != "macs" or round_to != 8:
        raise ValueError("measure and round_to are for kind='filters': the sparsity of weights is their number.")


class _Memory:
    """Which zeros are held, and what was there before."""

    def __init__(self, channels: Channels, optimizer, revive: str):
        self.optimizer, self.revive = optimizer, revive
        self.weights = channels.weights
        self.held: dict[int, np.ndarray] = {}  # id of a variable -> its mask, of those that had zeros
        self.values: dict[int, np.ndarray] = {}  # id of a variable -> what its zeros were

    def of(self, variable: keras.Variable) -> np.ndarray:
        """What was there, of the variable's shape; only where it is gone it means something."""
        return self.values.get(id(variable), np.zeros(tuple(variable.shape), "float32"))

    def hold(self, masks) -> list[tuple[keras.Variable, np.ndarray]]:
        """(variable, mask) of all that has zeros or had; what leaves is remembered, what returns is written."""
        found = {id(variable): mask for variable, mask in masks}
        pairs = []
        for weight in self.weights:
            variable, key = weight.variable, id(weight.variable)
            if key not in found and key not in self.held:
                continue
            whole = np.ones(tuple(variable.shape), bool)
            before, mask = self.held.get(key, whole), np.array(found.get(key, whole), bool)
            value = keras.ops.convert_to_numpy(variable)
            memory = np.where(before & ~mask, value, self.of(variable)).astype(value.dtype)
            returns = mask & ~before
            if returns.any():
                back = np.zeros_like(memory) if self.revive == "zero" and weight.is_kernel else memory
                variable.assign(np.where(returns, back, value))
                for slot in slots_of(self.optimizer, variable):  # momenta grew while it was held; averages (use_ema)
                    new = back if slot.name.endswith("average") else 0  # take the weights' place at the end
                    slot.assign(np.where(returns, new, keras.ops.convert_to_numpy(slot)))
            self.held[key], self.values[key] = mask, memory
            pairs.append((variable, mask))
        return pairs

    def faintly(self) -> None:
        """Write what is gone into the weights, so small that it ranks below what is there."""
        for weight in self.weights:
            mask = self.held.get(id(weight.variable))
            if mask is not None and not weight.is_statistic:
                value = keras.ops.convert_to_numpy(weight.variable)
                faint = (FAINT * self.of(weight.variable)).astype(value.dtype)
                weight.variable.assign(np.where(mask, value, faint))

    def write(self, path) -> None:
        places = {
            str(n): self.values[id(w.variable)] for n, w in enumerate(self.weights) if id(w.variable) in self.values
        }
        with replacing(path) as file:
            np.savez(file, **places)

    def read(self, path) -> None:
        """The values of the run that was killed."""
        if not os.path.isfile(path):
            return
        with np.load(path) as stored:
            for place, value in stored.items():
                n = int(place)
                if n >= len(self.weights) or tuple(self.weights[n].variable.shape) != value.shape:
                    raise ValueError(f"{path} belongs to another model. Give another path, or delete it.")
                self.values[id(self.weights[n].variable)] = value


class _Single:
    """Single entries as what is dropped: `gone` by kernel."""

    def __init__(self, channels: Channels, arguments: dict, removed: Ids):
        self.entries = Entries(channels, protect=arguments["protect"])
        self.gone, self.channels, self.arguments = self.entries.gone, channels, arguments
        self._removed = removed

    def removed(self) -> Ids:
        return self._removed

    def fraction(self, sparsity: float) -> float:
        return sparsity

    def scores(self, seed) -> dict[str, np.ndarray]:
        """Scores of all entries by kernel; by gradients frozen layers, which have none, have no scores."""
        criterion, found = self.arguments["criterion"], {}
        function = criteria.get(criterion, seed)
        shadows, of_batch = [{id(k): keras.ops.convert_to_numpy(k) for k in self.entries.kernels.values()}], np.ravel
        if isinstance(criterion, str) and criterion in criteria.LABELLED:
            shadows = gradient_times_weight(self.channels, self.arguments["data"])
            of_batch = criteria.LABELLED[criterion]
        for name, kernel in self.entries.kernels.items():
            if id(kernel) in shadows[0]:
                entries = [s[id(kernel)].reshape(-1, 1).astype("float32") for s in shadows]
                rows = np.stack([of_batch(e) for e in entries], axis=1)
                found[name] = np.asarray(function(rows), "float64")
        return found

    def settle(self, sparsity: float, seed, planned) -> None:
        scores = self.scores(seed)
        for name, found in scores.items():  # what is gone leaves first
            found[self.gone[name]] -= np.ptp(found) + 1
        self.gone.update(lowest(scores, sparsity, together=self.arguments["budget"] == "global"))

    def masks(self, is_settled: bool) -> list[tuple[keras.Variable, np.ndarray]]:
        return self.entries.masks()

    def figures(self) -> dict[str, float]:
        return {"weight_sparsity": float(np.concatenate(list(self.gone.values())).mean())}


class _Units:
    """Whole units as what is dropped: `gone` by group."""

    def __init__(self, channels: Channels, arguments: dict, removed: Ids):
        self.channels, self.arguments, self.for_good = channels, arguments, removed
        self.reasons = protected(channels, arguments["protect"])
        alive = channels.alive(removed)
        self.groups = [g for g in channels.groups if g.index not in self.reasons and alive[g.units].any()]
        self.there = {g.index: alive[g.units] for g in self.groups}  # units that did not leave for good before
        self.gone = {g.index: _silent(channels, g)[self.there[g.index]] for g in self.groups}

    def removed(self) -> Ids:
        gone = [g.units[self.there[g.index]][self.gone[g.index]] for g in self.groups]
        return np.union1d(np.concatenate([*gone, np.zeros(0, int)]), self.for_good).astype(int)

    def fraction(self, sparsity: float) -> float:
        """The fraction of the units that go with this sparsity of the measure, whatever the weights are."""
        about = dict(measure=self.arguments["measure"], protect=self.arguments["protect"])
        made = plan(
            self.channels, sparsity, budget="uniform", criterion="l2", round_to=1, already=self.for_good, **about
        )
        total = sum(int(there.sum()) for there in self.there.values())
        return (len(made.removed) - len(self.for_good)) / total if total else 0.0

    def scores(self, seed) -> dict[int, np.ndarray]:
        criterion, data = self.arguments["criterion"], self.arguments["data"]
        alive, reasons = self.channels.alive(self.removed()), dict(self.reasons)
        found, _ = scores_of(self.channels, criterion, data, reasons, alive, seed=seed)
        return {k: found[k][there] for k, there in self.there.items() if k in found}

    def settle(self, sparsity: float, seed, planned) -> None:
        leaves = ~self.channels.alive(planned(sparsity, self.for_good).removed)
        for group in self.groups:
            self.gone[group.index] = leaves[group.units][self.there[group.index]]

    def masks(self, is_settled: bool) -> list[tuple[keras.Variable, np.ndarray]]:
        """Before it is settled what reads a unit keeps its weights, or nothing could return."""
        found = {}
        for removed, producers_only in ((self.removed(), not is_settled), (self.for_good, False)):
            for weight, mask in zero_masks(self.channels, removed, producers_only):
                _, other = found.get(id(weight.variable), (None, True))
                found[id(weight.variable)] = weight.variable, mask & other
        return list(found.values())


def _silent(channels: Channels, group: Group) -> np.ndarray:
    """Which units of a group are made by zeros alone, shape (units,)."""
    makers = [m for m in group.members if not m.reads and not m.weight.is_statistic]
    blocks = channels.blocks(group, members=makers) if makers else [np.ones((len(group), 1))]
    return np.all([~block.any(axis=1) for block in blocks], axis=0)
