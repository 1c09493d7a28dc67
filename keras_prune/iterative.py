"""Train, prune, train, prune: iterative pruning, and what becomes of the weights between the rounds."""

from __future__ import annotations

import math
import numbers
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_prune import metrics, schedules
from keras_prune.channels import Channels
from keras_prune.entries import kernels_of
from keras_prune.files import check_writable, replacing
from keras_prune.internals import rates_of
from keras_prune.pruners import FilterPruning, Pruner
from keras_prune.rounds import measured, plain, read_curve, restart, write_curve
from keras_prune.surgery import drawn_anew, slot_holder, zero_masks
from keras_prune.weights import BOUNDED, WeightPruning

BETWEEN = ("finetune", "rewind_init", "rewind_step_k", "reinit", "scratch_e", "scratch_b")


class IterativePruning(Pruner):
    """Prunes a fraction of what is left, trains, prunes again; between, weights are kept, rewound, or drawn anew.

    `weights` says what training starts from after each pruning; the zeros always stay:

    * "finetune": from the weights as they are.
    * "rewind_init": from those at the beginning of `fit` [Frankle & Carbin, ICLR 2019, arXiv:1803.03635].
    * "rewind_step_k": from those after the first `k` batches of `fit`.
    * "reinit": from weights drawn anew in each round: the control of the rewinds.
    * "scratch_e", "scratch_b": rounds as "finetune"; after the last one all weights are drawn anew and trained for as
      many epochs as the dense network was (E), or for as many as make the same number of MACs (B:
      `scratch_epochs`) [Liu et al., Rethinking the Value of Network Pruning, ICLR 2019, arXiv:1810.05270].

    The epochs of `fit` are `first + rounds * retrain`. With "scratch_*" the last round is as long as said above and
    training stops by itself: give `fit` enough epochs.

    Args:
        rounds: how often to prune.
        fraction: of what is left, removed in each round: after n rounds (1 - fraction)^n is left.
        weights: as above.
        units: remove whole units (as `FilterPruning` does) instead of single weights (as `WeightPruning`).
        retrain: epochs after each pruning.
        first: epochs before the first one; default: `retrain`. 0 for a network that is trained already.
        k: batches, for "rewind_step_k". With steps_per_execution the first multiple of it from k on.
        restart: begin each round with a fresh optimizer: no momenta, and step 0 of a schedule of learning rates that
            the optimizer has. Where weights are set back this is always so; default: only there.
        validation_data: (x, y) or a data set to measure the network on right after each pruning.
        path: a .json file that the curve is written to after every epoch; the weights to rewind to lie next to it
            (.npz). With it a run that is killed and restored (keras.callbacks.BackupAndRestore) goes on as before.
        seed: for what is drawn anew, and for random pruning: the same seed, the same weights.
        arguments: as for `WeightPruning` (kind, budget, data, protect) or `FilterPruning` (measure, criterion, budget,
            round_to, protect, data).

    Attributes:
        curve: one entry per round, 0 being the time before the first pruning: `round`, `epoch`, `keep` (asked),
            `sparsity` (reached), `pruned` (loss and metrics right after pruning, before weights are set back),
            `retrained` (the logs of its last epoch). `reports.plot_curve` draws it.
        rewound_to: the number of batches after which the weights that it rewinds to were noted; None before.

    What is set back with the kernels: biases, BatchNormalization's parameters and running statistics, everything that
    the model holds; "reinit" and "scratch_*" leave frozen layers, and what a Normalization layer has adapted to, as
    they are. With "rewind_step_k" a schedule inside the optimizer goes on from step k. Not set back: the states of
    random number generators (dropout, the order of the data), and a learning rate that callbacks change. For a rate by
    epoch give fit `keras.callbacks.LearningRateScheduler(lambda epoch: rate(pruning.epoch_of_round(epoch)))`.

    Example:
        >>> pruning = IterativePruning(5, 0.2, weights="rewind_init", retrain=10)     # doctest: +SKIP
        >>> model.fit(x, y, epochs=60, callbacks=[pruning])                           # doctest: +SKIP
    """

    def __init__(
        self,
        rounds: int = 5,
        fraction: float = 0.2,
        *,
        weights: str = "finetune",
        units: bool = False,
        retrain: int = 1,
        first: int | None = None,
        k: int | None = None,
        restart: bool | None = None,
        validation_data=None,
        path: str | Path | None = None,
        seed: int | None = None,
        **arguments,
    ):
        super().__init__()
        first = retrain if first is None else first
        for name, value, least in (("rounds", rounds, 1), ("retrain", retrain, 1), ("first", first, 0)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(
                    f"{name}={value!r} was passed to IterativePruning; expected a whole number from {least} up."
                )
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
            raise ValueError(
                f"fraction={fraction!r} was passed to IterativePruning; expected the part of what is left that each "
                "round removes, above 0 and below 1."
            )
        _check_weights(weights, first, k, restart)
        for name in ("every", "unit", "soft", "error"):
            if name in arguments:
                raise ValueError(f"{name}= does not go with IterativePruning: its rounds are epochs, its zeros stay.")
        if arguments.get("budget") in BOUNDED:
            raise ValueError(
                f"budget={arguments['budget']!r} decides by itself how much goes; IterativePruning asks for a fraction."
            )
        if path is not None:
            check_writable(str(path))
            if Path(path).suffix == ".npz":
                raise ValueError(
                    f"path={str(path)!r}: the curve is a .json file; the .npz beside it holds the weights."
                )
        left = {int(first) + n * int(retrain): 1 - (1 - fraction) ** (n + 1) for n in range(rounds)}
        self.schedule = schedules.steps(left)
        self.inner = (FilterPruning if units else WeightPruning)(self.schedule, seed=seed, **arguments)
        self.rounds, self.fraction, self.weights, self.k = int(rounds), float(fraction), weights, k
        self.retrain, self.first, self.seed = int(retrain), int(first), seed
        self.restart = bool(restart)
        self.validation_data, self.path = validation_data, path
        self.curve: list[dict] = []
        self.rewound_to: int | None = None

    # -- rounds ----------------------------------------------------------------------------------------------------

    def round_of(self, epoch: int) -> int:
        """0 before the first pruning, then 1, 2, ..., `rounds`, however long training lasts."""
        return 0 if epoch < self.first else min((epoch - self.first) // self.retrain + 1, self.rounds)

    def epoch_of_round(self, epoch: int) -> int:
        """How many epochs of its round have passed before this epoch of `fit`: what a schedule by epoch should see."""
        number = self.round_of(epoch)
        return epoch - (self.first + (number - 1) * self.retrain if number else 0)

    def last_round(self) -> int | None:
        """Epochs of the last round of "scratch_e" and "scratch_b", as of what is pruned by now; None of the others."""
        if self.weights == "scratch_b":
            return scratch_epochs(self.first, metrics.macs(self.channels), self._macs_left())
        return self.first if self.weights == "scratch_e" else None

    def begin(self) -> None:
        self.inner.set_model(self.trainer)
        self.inner.set_params(self.params)
        self.inner.channels = self.channels
        self.inner.begin()
        self.curve, self.rewound_to, self._noted, self._pairs = [], None, [], []
        self._has_begun = False

    def masks(self, step: int):
        if step in self._prunings():
            self._pairs = list(self.inner.masks(step))
        elif self.round_of(step) and not self._pairs:  # restored within a round
            self._pairs = list(self._held())
        else:
            return ()  # on JAX each change of a mask compiles the step anew
        return self._pairs

    def prune(self, step: int) -> None:
        super().prune(step)
        if not self._has_begun:
            self._has_begun = True
            self._take_up(step)
        number = self.round_of(step)
        if step in self._prunings():
            reached = self.figures()
            entry = {"keep": 1 - self.schedule(step), "sparsity": reached.get("weight_sparsity"), **reached}
            entry["pruned"] = measured(self.trainer, self.validation_data)
            self._set_back(number)
        elif step == 0:
            entry = {"keep": 1.0, "sparsity": 0.0, "pruned": {}}
        else:
            return
        self.curve.append({"round": number, "epoch": step, **entry, "retrained": {}})

    def figures(self) -> dict[str, float]:
        return self.inner.figures()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        if self.weights == "rewind_step_k" and self.rewound_to is None:
            steps = self.params.get("steps")
            self._batches = self._epoch * steps + batch + 1 if steps else self._batches + 1
            if self._batches >= self.k:
                self._note(self._batches)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.curve:  # not where fit was told to begin later
            self.curve[-1]["retrained"] = plain(logs or {})
            write_curve(self.path, self.curve)
        if self.last_round() and self.round_of(epoch) == self.rounds:
            self.trainer.stop_training |= self.epoch_of_round(epoch) + 1 >= self.last_round()

    # -- the work --------------------------------------------------------------------------------------------------

    def _prunings(self) -> range:
        """The epochs that begin with one."""
        return range(self.first, self.first + self.rounds * self.retrain, self.retrain)

    def _held(self):
        """The masks of what is pruned by now."""
        if isinstance(self.inner, WeightPruning):
            return self.inner.entries.masks()
        return [(weight.variable, mask) for weight, mask in zero_masks(self.channels, self.inner.removed)]

    def _macs_left(self) -> float:
        """Those of a network without the units, or without the single weights that are zero."""
        if not isinstance(self.inner, WeightPruning):
            return metrics.macs(self.channels, self.inner.removed)
        left = {id(variable): float(mask.mean()) for variable, mask in self.inner.entries.masks()}
        return sum(t.factor * math.prod(t.sizes) * left.get(id(t.kernel), 1.0) for t in self.channels.terms)

    def _take_up(self, step: int) -> None:
        """The first epoch of this fit: note what to rewind to, or read back what a killed run had noted."""
        steps, file = self.params.get("steps"), self._file()
        self._batches = 0
        if step > 0:
            self.curve = read_curve(self.path, step)
        if not self.weights.startswith("rewind"):
            return
        if self.k and steps and self.k > self.first * steps:
            raise ValueError(
                f"k={self.k} was passed to IterativePruning, but the first pruning comes after {self.first * steps} "
                "batches; expected at most as many."
            )
        if step == 0:
            if file is not None:
                file.unlink(missing_ok=True)  # of another run
            if self.weights == "rewind_init":
                self._note(0)
        elif file is not None and file.is_file():
            with np.load(file) as stored:
                self.rewound_to = int(stored["batches"])
                self._noted = [stored[f"weight{n}"] for n in range(len(stored.files) - 1)]
            shapes = [tuple(v.shape) for v in self.model.weights]
            if [array.shape for array in self._noted] != shapes:
                raise ValueError(f"{file} holds the weights of another network; it was to be rewound to them.")
        elif self.weights == "rewind_init" or not steps or self.k <= step * steps:
            raise ValueError(
                f"IterativePruning(weights={self.weights!r}) goes on at epoch {step}, but the weights to rewind to are "
                f"{'in no file' if file is None else f'not in {file}'}: give path= to the first run and to this one."
            )

    def _file(self) -> Path | None:
        return None if self.path is None else Path(self.path).with_suffix(".npz")

    def _note(self, batches: int) -> None:
        """Keep the present weights, and that they are those after so many batches."""
        if keras.backend.backend() == "jax":  # training keeps its own copy of the weights between callbacks
            self.trainer.jax_state_sync()
        self.rewound_to, self._noted = batches, [_plain_array(v) for v in self.model.weights]
        file = self._file()
        if file is not None:
            with replacing(file) as opened:
                np.savez(opened, batches=batches, **{f"weight{n}": a for n, a in enumerate(self._noted)})

    def _set_back(self, number: int) -> None:
        """The weights and the optimizer that this round starts from."""
        is_new = self.weights == "reinit" or (self.weights.startswith("scratch") and number == self.rounds)
        is_rewound = self.weights.startswith("rewind")
        if is_rewound and not self._noted:
            raise ValueError(
                f"k={self.k}: the first pruning comes before so many batches; train longer first (first=)."
            )
        if is_new or is_rewound:
            masks = {id(variable): mask for variable, mask in self._pairs}
            for variable, value in zip(self.model.weights, self._drawn(number) if is_new else self._noted):
                mask = masks.get(id(variable))
                variable.assign(value if mask is None else np.where(mask, value, 0).astype(value.dtype))
        if is_new or is_rewound or self.restart:
            restart(self.trainer.optimizer)
        if self.weights == "rewind_step_k" and rates_of(slot_holder(self.trainer.optimizer)) is not None:
            for variable in self.trainer.optimizer.variables:
                if variable.name == "iteration":
                    variable.assign(self.rewound_to)
        epochs = self.params.get("epochs")
        if is_new and self.last_round() and epochs is not None and epochs < self._prunings()[-1] + self.last_round():
            warnings.warn(
                f"IterativePruning: {self.weights} needs {self._prunings()[-1] + self.last_round()} epochs in all, but "
                f"fit ends after {epochs}.",
                stacklevel=2,
            )

    def _drawn(self, number: int) -> list[np.ndarray]:
        """Weights drawn anew at the widths that are left, in the places where those units are."""
        removed = () if isinstance(self.inner, WeightPruning) else self.inner.removed
        seed = None if self.seed is None else 1000 * self.seed + number
        twins = drawn_anew(self.channels, removed, seed)[1]
        alive = self.channels.alive(removed)
        axes = {id(w.variable): w.axes for w in self.channels.weights}
        values = []
        for variable in self.model.weights:
            value = np.zeros(tuple(variable.shape), _plain_array(variable).dtype)
            ids = axes.get(id(variable)) or (None,) * value.ndim
            there = [np.arange(n) if i is None else np.flatnonzero(alive[i]) for i, n in zip(ids, value.shape)]
            value[np.ix_(*there)] = _plain_array(twins[id(variable)])
            values.append(value)
        return values


def scratch_epochs(epochs: int, before: float, after: float) -> int:
    """As many epochs of the pruned network as cost what `epochs` of the dense one did: Scratch-B of Liu et al.

    int(epochs * before / after); before, after: MACs. As in the authors' code for CIFAR.

    >>> scratch_epochs(160, 313.2e6, 206.1e6)
    243
    """
    if not 0 < after <= before:
        raise ValueError(f"before={before}, after={after}: expected MACs above 0, after at most before.")
    return int(epochs * before / after)


def redrawn(model: keras.Model, seed: int | None = None) -> keras.Model:
    """A copy of a model with its weights drawn anew, compiled alike: the same architecture, trained from nothing.

    The control without which a pruned network says nothing about its weights: train `redrawn(small)` as long as the
    original was. Frozen layers, and what a Normalization layer has adapted to, are copied.

    Args:
        model: a built Functional or Sequential model; it is not changed.
        seed: the same seed, the same weights.
    """
    new = drawn_anew(Channels(model), (), seed)[0]
    if new.compiled and new.optimizer.built:
        restart(new.optimizer)
    return new


def kept_masks(model: keras.Model) -> dict[str, np.ndarray]:
    """{layer: True where an entry of its kernel is not zero}: what `mask_similarity` and `structure_report` compare."""
    return {name: keras.ops.convert_to_numpy(v) != 0 for name, v in kernels_of(Channels(model)).items()}


def kernel_values(model: keras.Model) -> dict[str, np.ndarray]:
    """{layer: its kernel}, for `weight_stability`; float32."""
    return {name: _plain_array(v).astype(np.float32) for name, v in kernels_of(Channels(model)).items()}


def _plain_array(variable: keras.Variable) -> np.ndarray:
    """A copy of its values in a type that numpy has itself: bfloat16 becomes float32."""
    value = np.array(keras.ops.convert_to_numpy(variable))
    return value.astype(np.float32) if value.dtype.kind == "V" or value.dtype.name == "bfloat16" else value


def _check_weights(weights, first, k, restart) -> None:
    if weights not in BETWEEN:
        raise ValueError(f"weights={weights!r} was passed to IterativePruning; known: {', '.join(map(repr, BETWEEN))}.")
    if (weights == "rewind_step_k") != (k is not None):
        raise ValueError("k= (batches) goes with weights='rewind_step_k', and with nothing else.")
    if k is not None and (isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1):
        raise ValueError(f"k={k!r} was passed to IterativePruning; expected a whole number of batches, from 1 up.")
    if first == 0 and weights.startswith(("rewind", "scratch")):
        raise ValueError(
            f"first=0 with weights={weights!r}: before the first pruning the network has to be trained here, from the "
            "weights to rewind to, or for as many epochs as scratch training shall take. Give first=."
        )
    if restart is False and weights in ("rewind_init", "rewind_step_k", "reinit"):
        raise ValueError(
            f"restart=False with weights={weights!r}: momenta belong to the weights that were there before."
        )
