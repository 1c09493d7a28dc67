"""Pruning inside `model.fit`: callbacks that zero units between epochs (or batches) and keep them zero.

The mask rides on the optimizer's own variable constraint, so a training step costs no Python work. The zeros are in
the weights themselves: an ordinary checkpoint carries them, and `strip` reads them.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from keras_prune import budgets, criteria, metrics, schedules
from keras_prune.channels import Channels
from keras_prune.planning import Plan, check_round_to, name_of, plan
from keras_prune.rules import Ids
from keras_prune.scoring import READERS
from keras_prune.surgery import dead_units, write_zeros, zero_masks


class KeepZeros(keras.constraints.Constraint):
    """Multiplies a variable by a 0/1 mask after every update, after whatever constraint the user had.

    It sits on the variable, not in the layer's config: saved models know nothing of it.

    Attributes:
        inner: the user's constraint, or None.
        mask: the 0/1 mask.
        shrink: None, or a function value -> value that is part of the update: it sees the masked value, and the
            user's constraint has the last word.
    """

    def __init__(self, variable: keras.Variable):
        self.inner = variable.constraint
        self.mask = keras.Variable(np.ones(variable.shape), dtype=variable.dtype, trainable=False, name="mask")
        self.shrink: Callable | None = None

    def __call__(self, value):
        if self.shrink is not None:
            value = self.shrink(value * self.mask)
        if self.inner is not None:
            value = self.inner(value)
        return value * self.mask  # one operation per step; the zeros may carry a sign until training ends


class ScalePenalty(keras.regularizers.Regularizer):
    """L1 on some of the scales of a norm, besides whatever regularizer the user had; it sits on the variable as well.

    Args:
        variable: the scales.
        strength: of the penalty, above 0.
        which: 1 where it counts, shape of the variable.
    """

    def __init__(self, variable: keras.Variable, strength: float, which: np.ndarray):
        self.inner = variable.regularizer
        self.factors = (strength * which).astype("float32")

    def __call__(self, value):
        scales = keras.ops.cast(value, "float32")
        # |scales|, whose gradient is the sign on every backend: of abs JAX takes another one at 0
        penalty = keras.ops.sum(scales * keras.ops.stop_gradient(keras.ops.sign(scales)) * self.factors)
        return penalty if self.inner is None else penalty + keras.ops.cast(self.inner(value), "float32")


class TrainingCallback(keras.callbacks.Callback):
    """A callback that knows the network in `fit`, also where a `keras.distillation.Distiller` is fitted.

    Attributes:
        trainer: what `fit` was called on: it has the optimizer and the training step.
        model: the network: the same, or the student of the Distiller.
    """

    @property
    def trainer(self) -> keras.Model:
        return super().model  # on JAX this also brings the weights up to date

    @property
    def model(self) -> keras.Model:
        trainer = super().model
        return trainer.student if isinstance(trainer, keras.distillation.Distiller) else trainer


class Pruner(TrainingCallback):
    """Base of all pruning callbacks: it asks `masks(step)` when a step is due, writes the zeros, and holds them.

    A subclass writes `masks`; it may override `begin` (called once the weights are those training starts from, that
    is after a restored backup) and `figures` (what goes into the logs).

    Args:
        every: steps between two prunings.
        unit: what a step is: "epoch" or "batch".

    Attributes:
        channels: labels of the model, from the beginning of training on.
    """

    def __init__(self, *, every: int = 1, unit: str = "epoch"):
        super().__init__()
        name = type(self).__name__
        if isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"every={every!r} was passed to {name}; expected a whole number of steps, from 1 up.")
        if unit not in ("epoch", "batch"):
            raise ValueError(f"unit={unit!r} was passed to {name}; known: 'batch', 'epoch'.")
        self.every, self.unit = every, unit
        self.channels: Channels | None = None
        self._began = False
        self._last_step: int | None = None

    # -- what a subclass writes ----------------------------------------------------------------------------------

    def masks(self, step: int) -> Sequence[tuple[keras.Variable, np.ndarray]]:
        """(variable, 0/1 mask of its shape) for all weights that hold zeros after this step."""
        raise TypeError(f"{type(self).__name__} has no masks(step); a Pruner writes at least that method.")

    def begin(self) -> None:
        """Training begins: weights are in place."""

    def ends_at(self) -> int | None:
        """The step at which the last value is due, if it is known: it is applied whatever `every` says."""
        return None

    def holds(self, step: int) -> bool:
        """Whether zeros are held from this step on (hard), or may grow back (soft)."""
        return True

    def figures(self) -> dict[str, float]:
        """Numbers for the logs."""
        return {}

    # -- Keras calls these ---------------------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        if self.channels is None or self.channels.model is not self.model:
            self.channels = Channels(self.model)
        self._began = False
        self._last_step = None
        self._base = int(self.trainer.optimizer.iterations)
        prepare_to_hold(self.model, [weight.variable for weight in self.channels.weights], self.trainer)

    def on_epoch_begin(self, epoch, logs=None):
        steps = self.params.get("steps")
        if self.unit == "batch":
            self._first = epoch * steps if steps else int(self.trainer.optimizer.iterations) - self._base
        if not self._began:  # only now has BackupAndRestore restored, wherever it stands in the list of callbacks
            self._began = True
            self.begin()
        if self.unit == "epoch":
            self._prune_if_due(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        if self.unit == "batch":
            self._prune_if_due(self._first + batch)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self.figures())

    def on_train_end(self, logs=None):
        """Averaged or restored weights may have brought values back: the held zeros are written once more."""
        back = False
        for weight in self.channels.weights:
            if isinstance(weight.variable.constraint, KeepZeros):
                mask = keras.ops.convert_to_numpy(weight.variable.constraint.mask)
                back |= bool(np.any(keras.ops.convert_to_numpy(weight.variable)[mask == 0]))
                write_zeros(weight.variable, mask)
        if back:
            warnings.warn(
                f"{type(self).__name__}: pruned weights were no longer zero when training ended (restored or averaged "
                "weights); they are zero again. With EarlyStopping(restore_best_weights=True) set start_from_epoch to "
                "the end of the schedule, so that the best epoch is one of the pruned network.",
                stacklevel=2,
            )

    # -- the work ------------------------------------------------------------------------------------------------

    def _prune_if_due(self, step: int) -> None:
        """Due: the first step, each multiple of `every` that was reached or passed, and the last value's step."""
        last = self._last_step
        due = schedules.is_due(step, last, self.every, self.ends_at())
        if due or (self.holds(step) and not self.holds(last)):
            self._last_step = step
            self.prune(step)

    def prune(self, step: int) -> None:
        """Write the zeros of this step, and hold them if pruning is hard."""
        backend = keras.backend.backend()
        if backend == "jax":  # training keeps its own copy of the weights between callbacks
            self.trainer.jax_state_sync()
        pairs = list(self.masks(step))
        changed = False
        for variable, mask in pairs:
            write_zeros(variable, mask)
            if self.holds(step) and isinstance(variable.constraint, KeepZeros):
                hold_zeros(self.trainer.optimizer, variable, mask)
                changed = True
        if changed and backend == "jax":  # a mask is a constant of JAX's compiled step
            compile_anew(self.trainer, self.model)


def prepare_to_hold(
    model: keras.Model, variables: Sequence[keras.Variable], trainer: keras.Model | None = None
) -> None:
    """Give those of the variables that are trained a mask, all ones as yet, if they have none.

    Args:
        trainer: what trains them, where that is not the model itself.
    """
    trainable = {id(v) for v in model.trainable_variables}
    new = [v for v in variables if id(v) in trainable and not isinstance(v.constraint, KeepZeros)]
    for variable in new:
        variable.constraint = KeepZeros(variable)
    if new:  # a step function from an earlier fit would not see the constraint
        compile_anew(model, *([] if trainer is None else [trainer]))


def compile_anew(*models: keras.Model) -> None:
    """Make the training steps anew: what rides on variables is seen only when a step is traced."""
    for model in {id(m): m for m in models}.values():
        if model.compiled:
            model.make_train_function(force=True)


def hold_zeros(optimizer, variable: keras.Variable, mask: np.ndarray) -> None:
    """A prepared variable keeps these zeros; on JAX with the next step function that is compiled."""
    variable.constraint.mask.assign(mask)
    for slot in slots_of(optimizer, variable):  # a momentum would move the weight each step, and averaged weights
        write_zeros(slot, mask)  # (use_ema) are taken before the constraint


def release(model: keras.Model) -> None:
    """Stop holding zeros: take masks and penalties off a model's variables, to train it on without pruning.

    The zeros themselves stay until something is learned in their place, or other weights are loaded.
    """
    for variable in model.variables:
        if isinstance(variable.constraint, KeepZeros):
            variable.constraint = variable.constraint.inner
        if isinstance(variable.regularizer, ScalePenalty):
            variable.regularizer = variable.regularizer.inner
    compile_anew(model)


def slots_of(optimizer, variable: keras.Variable) -> list[keras.Variable]:
    """Momenta and averages of a variable: Keras names them after it."""
    prefix = variable.path.replace("/", "_") + "_"
    return [v for v in optimizer.variables if v.name.startswith(prefix) and tuple(v.shape) == tuple(variable.shape)]


class FilterPruning(Pruner):
    """Removes whole units (filters, neurons, heads) while the model trains.

    At every due step the asked sparsity is planned anew on the present weights and the units that leave are zeroed
    with everything that reads them, so that the zeroed network already computes what the small one will.
    `strip(model)` afterwards gives the small one.

    Args:
        sparsity: a number in [0, 1), `{step: sparsity}`, or a schedule (`keras_prune.schedules`): the fraction of
            `measure` to remove.
        measure, criterion, budget, round_to, protect, data, seed: as for `keras_prune.plan`.
        every, unit: prune each `every` steps; a step is an "epoch" or a "batch".
        soft: let zeroed units grow back until the last epoch [He et al. 2018, arXiv:1808.06866]; then they are
            zeroed for good. Hard pruning (default) only ever adds units.

    Logs:
        `sparsity` (of the measure), `params`, `macs` of the network that `strip` would give.

    Put it before CSVLogger and TensorBoard in the list of callbacks: they write the logs as they find them. A run
    that is killed and restored (keras.callbacks.BackupAndRestore) goes on with the same zeros.

    Example:
        >>> model.fit(x, y, epochs=10, callbacks=[FilterPruning(0.5)])     # doctest: +SKIP
        >>> small = strip(model)                                           # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float | Mapping[int, float] | schedules.Schedule = 0.5,
        *,
        measure: str | metrics.Measure = "macs",
        criterion: str | criteria.Criterion = "l2",
        budget: str | budgets.Budget = "global",
        round_to: int = 8,
        every: int = 1,
        unit: str = "epoch",
        soft: bool = False,
        protect: Sequence = (),
        data=None,
        seed: int | None = None,
    ):
        super().__init__(every=every, unit=unit)
        self.schedule = schedules.get(sparsity)
        self.soft = soft
        check_round_to(round_to, type(self).__name__)
        metrics.get(measure), budgets.get(budget), criteria.get(criterion)  # unknown names fail now, not in fit
        _check_data(criterion, budget, data, type(self).__name__)
        self.arguments = dict(
            measure=measure,
            criterion=criterion,
            budget=budget,
            round_to=round_to,
            protect=protect,
            data=data,
            seed=seed,
        )
        self.removed: Ids = np.zeros(0, int)

    def begin(self) -> None:
        self.removed = dead_units(self.channels, strict=True)
        self._is_short = False
        schedules.warn_if_too_short(self, self.schedule, self.unit)

    def ends_at(self) -> int | None:
        return getattr(self.schedule, "stop", None)

    def holds(self, step: int) -> bool:
        if not self.soft:
            return True
        total = schedules.total_steps(self.unit, self.params)
        last_epoch = 1 if self.unit == "epoch" else (self.params.get("steps") or 1)
        return total is not None and step >= total - last_epoch

    def masks(self, step: int):
        target = schedules.check_sparsity(self.schedule(step), "FilterPruning by its schedule")
        hard = self.holds(step)
        if target > 0:
            already = self.removed if not self.soft else ()  # soft: every unit may come back
            self.removed = self.planned(target, already).removed
        return [
            (weight.variable, mask) for weight, mask in zero_masks(self.channels, self.removed, producers_only=not hard)
        ]

    def planned(self, target: float, already: Ids) -> Plan:
        """The plan of a step; a warning, once, if it cannot reach the target."""
        made = plan(self.channels, target, already=already, **self.arguments)
        if made.reached < target - 0.02 and not self._is_short:
            self._is_short = True
            warnings.warn(
                f"{type(self).__name__}: {target:.1%} of the {name_of(self.arguments['measure'])} were asked for, "
                f"{made.reached:.1%} are removed: {'; '.join(made.notes)}.",
                stacklevel=2,
            )
        return made

    def on_train_end(self, logs=None):
        if self.soft and self._last_step is not None and not self.holds(self._last_step):
            self.soft = False  # stopped early: what is zero now is zero for good
            self.prune(self._last_step)
            self.soft = True
        super().on_train_end(logs)

    def figures(self) -> dict[str, float]:
        measure = metrics.get(self.arguments["measure"])
        return {
            "sparsity": float(1 - measure(self.channels, self.removed) / measure(self.channels, ())),
            "params": float(metrics.params(self.channels, self.removed)),
            "macs": float(metrics.macs(self.channels, self.removed)),
        }


def _check_data(criterion, budget, data, where: str) -> None:
    """Raise a ValueError if a criterion or budget looks at data and there are none."""
    for kind, name in (("criterion", criterion), ("budget", budget)):
        if data is None and isinstance(name, str) and (name in criteria.LABELLED or name in READERS or name == "pca"):
            expected = "(x, y), or (x, y) batches" if name in criteria.LABELLED else "unlabelled inputs of the model"
            raise ValueError(f"{kind}={name!r} was passed to {where} without data; expected data=, {expected}.")


class GradualPruning(FilterPruning):
    """FilterPruning that starts gently: from nothing to `sparsity` along the cubic ramp of Zhu & Gupta 2017.

    Args:
        sparsity: the final sparsity, in [0, 1).
        begin: first step.
        stop: step at which the final sparsity is reached; default: after 60 % of the training, the rest is recovery.
        power: 3 is the paper's cubic, 1 a straight line.
        arguments: as for FilterPruning.
    """

    def __init__(
        self, sparsity: float = 0.5, *, begin: int = 0, stop: int | None = None, power: float = 3, **arguments
    ):
        self.ramp = dict(end=schedules.check_sparsity(sparsity, "GradualPruning"), begin=begin, stop=stop, power=power)
        super().__init__(self._schedule(stop if stop is not None else begin), **arguments)

    def _schedule(self, stop: int) -> schedules.Curve:
        ramp = self.ramp
        return schedules.polynomial(0.0, ramp["end"], begin=ramp["begin"], stop=stop, power=ramp["power"])

    def begin(self) -> None:
        if self.ramp["stop"] is None:
            total = schedules.total_steps(self.unit, self.params)
            if total is None:
                raise ValueError(
                    f"{type(self).__name__} counts batches, but fit does not know how many an epoch has; pass "
                    "stop=, or steps_per_epoch= to fit."
                )
            self.schedule = self._schedule(max(self.ramp["begin"], int(0.6 * total)))
        super().begin()
