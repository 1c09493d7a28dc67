"""Prune, retrain, prune again: Provable Filter Pruning as a callback, and the fractions it keeps in each round."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from keras_prune import budgets, metrics, schedules
from keras_prune.channels import Channels
from keras_prune.files import check_writable
from keras_prune.planning import check_mode
from keras_prune.plans import Plan
from keras_prune.pruners import FilterPruning, slots_of
from keras_prune.rounds import measured, plain, read_curve, restart, write_curve
from keras_prune.surgery import copied, reader_factors, zero_masks


def harmonic(least: float = 0.05) -> tuple[float, ...]:
    """1/2, 1/3, 1/4, ... down to `least`.

    >>> [round(k, 2) for k in harmonic(0.2)]
    [0.5, 0.33, 0.25, 0.2]
    """
    _check_keep("harmonic", least)
    return tuple(1 / n for n in range(2, math.floor(1 / least + 1e-9) + 1)) or (least,)


def geometric(first: float, last: float, rounds: int) -> tuple[float, ...]:
    """From `first` to `last`, each round keeping the same fraction of the one before.

    >>> [round(k, 3) for k in geometric(0.8, 0.1, 4)]
    [0.8, 0.4, 0.2, 0.1]
    """
    _check_keep("geometric", first, last, rounds=rounds)
    return tuple(first * (last / first) ** (n / max(rounds - 1, 1)) for n in range(rounds))


def linear(first: float, last: float, rounds: int) -> tuple[float, ...]:
    """From `first` to `last` in equal steps.

    >>> [round(k, 3) for k in linear(0.9, 0.6, 4)]
    [0.9, 0.8, 0.7, 0.6]
    """
    _check_keep("linear", first, last, rounds=rounds)
    return tuple(first + (last - first) * n / max(rounds - 1, 1) for n in range(rounds))


def _check_keep(function: str, *kept: float, rounds: int = 1) -> None:
    falls = all(a >= b for a, b in zip(kept, kept[1:]))
    if not all(isinstance(k, numbers.Real) and 0 < k <= 1 for k in kept) or not falls:
        raise ValueError(
            f"{', '.join(map(str, kept))} was passed to {function}; expected fractions that are kept, above 0 and at "
            "most 1, none larger than the one before it."
        )
    if isinstance(rounds, bool) or not isinstance(rounds, numbers.Integral) or rounds < 1:
        raise ValueError(f"rounds={rounds!r} was passed to {function}; expected a whole number from 1 up.")


class ProvablePruning(FilterPruning):
    """Provable Filter Pruning in rounds: prune by sensitivity, retrain, prune what is left, retrain, ...

    [Liebenwein, Baykal, Lang, Feldman, Rus: Provable Filter Pruning for Efficient Neural Networks, ICLR 2020,
    arXiv:1911.07412] Each round starts from the retrained weights of the one before. The number of epochs of `fit` is
    rounds x `retrain`; `strip(model)` afterwards gives the small network.

    Args:
        keep: the fraction of `measure` kept in each round, falling, such as (0.8, 0.6, 0.5) or
            `provable.geometric(0.85, 0.15, rounds=10)`; a number is one round.
        data: unlabelled inputs, shape (samples, ...), of which as many are used as `sample_size` says.
        retrain: epochs of each round.
        criterion: "pfp", or "pfp_max", which no bound speaks of.
        measure, budget, round_to, protect, mode, delta, seed: as for `keras_prune.plan`.
        restart: begin each round with a fresh optimizer: no momenta, and step 0 of a schedule of learning rates that
            the optimizer has (`keras.optimizers.schedules`). For a rate by epoch give fit
            `keras.callbacks.LearningRateScheduler(lambda epoch: rate(epoch % retrain))`.
        validation_data: (x, y) or a data set to measure the network on right after each pruning.
        path: a .json file that the curve is written to after every epoch. A run that is killed and restored
            (keras.callbacks.BackupAndRestore) goes on with it.

    Attributes:
        curve: one entry per round, a dictionary: `round`, `epoch`, `keep` (asked), `sparsity` (reached), `params`,
            `macs`, `pruned` (loss and metrics right after pruning) and `retrained` (the logs of its last epoch).
            `reports.plot_curve` draws it.
        plan: the Plan of the last round, about a copy of the model as it was before; None before the first.

    Logs:
        As FilterPruning: `sparsity`, `params`, `macs`.

    Example:
        >>> pruner = ProvablePruning((0.7, 0.5), data=x, retrain=5)         # doctest: +SKIP
        >>> model.fit(x, y, epochs=10, callbacks=[pruner])                 # doctest: +SKIP
        >>> print(certify(pruner.plan, x))                                 # doctest: +SKIP
    """

    def __init__(
        self,
        keep: float | Sequence[float] = 0.5,
        *,
        data,
        retrain: int = 1,
        criterion: str = "pfp",
        measure: str | metrics.Measure = "params",
        budget: str | budgets.Budget = "error_bound",
        round_to: int = 8,
        mode: str = "deterministic",
        delta: float = 1e-16,
        restart: bool = False,
        protect: Sequence = (),
        validation_data=None,
        path: str | Path | None = None,
        seed: int | None = None,
    ):
        keeps = (keep,) if isinstance(keep, numbers.Real) else tuple(keep)
        _check_keep(type(self).__name__, *keeps, rounds=len(keeps))
        if isinstance(retrain, bool) or not isinstance(retrain, numbers.Integral) or retrain < 1:
            raise ValueError(
                f"retrain={retrain!r} was passed to ProvablePruning; expected epochs per round, from 1 up."
            )
        check_mode(mode, delta, criterion, where=type(self).__name__)
        if path is not None:
            check_writable(str(path))
        super().__init__(
            schedules.steps({n * int(retrain): 1 - float(k) for n, k in enumerate(keeps)}),
            measure=measure,
            criterion=criterion,
            budget=budget,
            round_to=round_to,
            every=int(retrain),
            protect=protect,
            data=data,
            seed=seed,
        )
        self.arguments.update(mode=mode, delta=delta)
        self.retrain, self.restart = int(retrain), restart
        self.validation_data, self.path = validation_data, path
        self.plan: Plan | None = None
        self.curve: list[dict] = []

    def begin(self) -> None:
        super().begin()
        self.curve, self.plan = [], None

    def masks(self, step: int):
        if self._starts_round(step):
            made = self.planned(self.schedule(step), self.removed)
            self.plan = dataclasses.replace(made, channels=Channels(copied(self.channels)[0]))
            self.removed = made.removed
            if made.drawn:
                self._reweigh(made.multipliers())
        return [(weight.variable, mask) for weight, mask in zero_masks(self.channels, self.removed)]

    def prune(self, step: int) -> None:
        super().prune(step)
        if not self.curve and step > 0:
            self.curve = read_curve(self.path, step)
        if not self._starts_round(step):  # a restored run may begin within one
            return
        if self.restart:
            restart(self.trainer.optimizer)
        self.curve.append(
            {
                "round": step // self.retrain,
                "epoch": step,
                "keep": 1 - self.schedule(step),
                **self.figures(),
                "pruned": measured(self.trainer, self.validation_data),
                "retrained": {},
            }
        )

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.curve:
            self.curve[-1]["retrained"] = plain(logs or {})
            write_curve(self.path, self.curve)

    def _reweigh(self, multipliers: np.ndarray) -> None:
        """Multiply what reads the drawn units, and its averages, which take its place at the end (use_ema)."""
        for weight, factor in reader_factors(self.channels, multipliers):
            averages = [v for v in slots_of(self.trainer.optimizer, weight.variable) if v.name.endswith("average")]
            for variable in (weight.variable, *averages):
                variable.assign(keras.ops.convert_to_numpy(variable) * factor)

    def _starts_round(self, step: int) -> bool:
        return step % self.retrain == 0 and step <= self.ends_at()
