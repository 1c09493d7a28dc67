"""Penalties that make units small, or zero, while the network trains: network slimming and the group lasso.

Both ride on the variables, as the pruners' masks do: nothing of them is in the layers' configs or in a saved model.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_prune.channels import Channels, Group
from keras_prune.finetuning import FineTuner
from keras_prune.groups import Member
from keras_prune.internals import updates_now
from keras_prune.planning import protected
from keras_prune.pruners import KeepZeros, Pruner, ScalePenalty, TrainingCallback, compile_anew
from keras_prune.surgery import slot_holder, zero_masks

OF = ("kernels", "scales")


class NetworkSlimming(TrainingCallback):
    """Network slimming: an L1 penalty on the scales of BatchNormalization, so that what matters little has a small one.

    While `fit` runs, strength * sum |gamma| is added to the loss, of the scales (gamma) that belong to units which can
    be pruned; its subgradient is strength * sign(gamma), 0 at 0. When training ends the penalty is gone again, and
    units are pruned by their scales: `plan(model, criterion="bn_scale")` or `FilterPruning(criterion="bn_scale")`,
    with budget="global", one threshold for the whole network, as in the paper.

    Args:
        strength: of the penalty. The paper has 1e-4 (VGG) and 1e-5 (ResNet-164, DenseNet-40).
        start: what these scales are set to before epoch 0; the paper trains from 0.5. None leaves them, as one
            does with a network that is trained already.
        protect: layers, names, or name patterns as for `keras_prune.plan`: no penalty on their units.

    Logs:
        `scales`: the mean of |gamma| of the penalised scales.

    A training that an exception ends leaves the penalty on: `keras_prune.release(model)` takes it off. Keras's own
    Distiller drops the penalties of layers: use `keras_prune.finetune` or `keras_prune.distiller`. Of two in one `fit`
    the last one counts.

    Raises:
        ValueError: an argument out of its range; in `fit` a model that has no such scales, or Keras's own Distiller.

    [Liu et al.: Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv:1708.06519, eq. 1]

    Example:
        >>> model.fit(x, y, epochs=160, callbacks=[NetworkSlimming(1e-4, start=0.5)])         # doctest: +SKIP
        >>> small = plan(model, 0.5, criterion="bn_scale", budget="global").cut()             # doctest: +SKIP
    """

    def __init__(self, strength: float = 1e-4, *, start: float | None = None, protect: Sequence = ()):
        super().__init__()
        self.strength, self.start = _above_zero("strength", strength, "NetworkSlimming"), start
        if start is not None:
            self.start = _above_zero("start", start, "NetworkSlimming")
        self.protect = protect
        self._scales: list[tuple[keras.Variable, np.ndarray]] = []

    def on_train_begin(self, logs=None):
        if isinstance(self.trainer, keras.distillation.Distiller) and not isinstance(self.trainer, FineTuner):
            raise ValueError(
                "Keras's Distiller drops penalties of layers, so NetworkSlimming would do nothing: make it with "
                "keras_prune.distiller(student, teacher, x), or call keras_prune.finetune."
            )
        self._take_off()
        channels = Channels(self.model)
        self._scales = _penalised(channels, self.protect)
        for variable, which in self._scales:
            variable.regularizer = ScalePenalty(variable, self.strength, which)
        compile_anew(self.trainer, self.model)
        self._is_first = True

    def on_epoch_begin(self, epoch, logs=None):
        if self._is_first and epoch == 0 and self.start is not None:  # not where a killed run goes on
            for variable, which in self._scales:
                value = keras.ops.convert_to_numpy(variable)
                variable.assign(np.where(which, self.start, value).astype(value.dtype))
        self._is_first = False

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            values = [np.abs(ops.convert_to_numpy(variable))[which] for variable, which in self._scales]
            logs["scales"] = float(np.concatenate(values).mean())

    def on_train_end(self, logs=None):
        self._take_off()
        compile_anew(self.trainer, self.model)

    def _take_off(self) -> None:
        for variable in self.model.variables:
            if isinstance(variable.regularizer, ScalePenalty):
                variable.regularizer = variable.regularizer.inner


def _penalised(channels: Channels, protect: Sequence) -> list[tuple[keras.Variable, np.ndarray]]:
    """(gamma, which of its entries belong to units that can be pruned) of all that are trained."""
    reasons = protected(channels, protect)
    free = np.zeros(channels.unit_count, bool)
    for group in channels.groups:
        free[group.units] = group.index not in reasons
    trained = {id(v) for v in channels.model.trainable_variables}
    found = [
        (weight.variable, free[weight.axes[0]])
        for weight in channels.weights
        if _is_scale(weight) and weight.labelled and id(weight.variable) in trained
    ]
    found = [(variable, which) for variable, which in found if which.any()]
    if not found:
        raise ValueError(
            f"NetworkSlimming finds no scale to penalise in {channels.model.name!r}: it needs BatchNormalization with "
            "scale=True, trainable, behind layers that can be pruned and are not protected. Without such norms use "
            "keras_prune.GroupLasso."
        )
    return found


def _is_scale(weight) -> bool:
    return weight.name == "gamma" and isinstance(weight.layer, keras.layers.BatchNormalization)


class GroupLasso(Pruner):
    """Group lasso: every update also shrinks each filter as a whole, so that those which matter little become zero.

    After each update of the optimizer, in the compiled step, every filter w_g of every kernel that makes prunable units
    is shrunk: w_g <- max(0, 1 - t / ||w_g||) w_g with t = learning rate * strength * sqrt(|g|), |g| the number of its
    weights. This is the proximal step of the penalty strength * sum over g of sqrt(|g|) ||w_g||. Zeros are exact, and
    a filter can come back as long as the penalty acts.

    At `stop` the penalty ends. Units that all of the kernels (or scales) which make them have given up are then held at
    zero, with all that belongs to them (biases, norms, what reads them), and the rest recovers without a penalty.
    `strip(model)` afterwards removes these units.

    BatchNormalization right behind a kernel undoes what this does to it: a filter of half the size gives the same
    output, so a penalty on its size says little about whether it is needed, and mostly raises the effective learning
    rate. With `of="scales"` the norm's scales are shrunk instead, each being a group of one.

    Args:
        strength: of the penalty; no value fits all networks. Start where `zero_filters` in the logs is a few per cent
            after a few epochs, for example at 1e-4.
        of: "kernels", or "scales": the gammas of BatchNormalization, in groups of units that have at least as many of
            them as kernels that make them.
        stop: the epoch at which the penalty ends; default: after 60 % of the training. If training ends before, what
            is zero then is held.
        protect: layers, names, or name patterns as for `keras_prune.plan`: their units are not shrunk.

    Attributes:
        removed: ids of the units that are held at zero, from `stop` on.

    Logs:
        `zero_filters`: the fraction of these filters (or scales) that are zero.

    The learning rate is the optimizer's own at each step, also of a schedule; with gradient accumulation only real
    updates shrink. Momenta and the scaling of Adam do not change t. A constraint that a kernel has is applied after
    the shrinking and should leave zeros zero, as all of Keras's do. With `use_ema` a filter that is zero need not be
    zero in the average: it is judged by what is in the model.

    A training that an exception ends leaves the penalty on: `keras_prune.release(model)` takes it off.

    Raises:
        ValueError: an argument out of its range; in `fit` a model with nothing to shrink.

    [Yuan & Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x; on filters: Wen et al.: Learning Structured Sparsity in Deep
    Neural Networks, NIPS 2016, arXiv:1608.03665. There the penalty is part of the loss, which makes no exact zeros; the
    proximal step, and the end of the penalty, are from elsewhere: Parikh & Boyd 2014 (Proximal Algorithms), and own]

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[GroupLasso(1e-3)])     # doctest: +SKIP
        >>> small = strip(model)                                         # doctest: +SKIP
    """

    def __init__(self, strength: float, *, of: str = "kernels", stop: int | None = None, protect: Sequence = ()):
        super().__init__()
        self.strength = _above_zero("strength", strength, "GroupLasso")
        if of not in OF:
            raise ValueError(f"of={of!r} was passed to GroupLasso; known: {', '.join(map(repr, OF))}.")
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, numbers.Integral) or stop < 1):
            raise ValueError(f"stop={stop!r} was passed to GroupLasso; expected an epoch from 1 up.")
        self.of, self.protect, self._stop = of, protect, stop
        self.removed = np.zeros(0, int)
        self._places: list[tuple[Group, list[Member]]] = []
        self._shrinkings: dict[int, Shrinking] = {}  # by id of the variable

    def begin(self) -> None:
        epochs = self.params.get("epochs") or 1
        self.stop = self._stop or max(1, int(0.6 * epochs))
        self.removed, self._is_settled = np.zeros(0, int), False
        self._places = _shrunk(self.channels, self.of, self.protect)
        self._shrinkings = per_variable = {}
        for group, members in self._places:
            for member in members:
                variable = member.weight.variable
                if isinstance(variable.constraint, KeepZeros):
                    new = Shrinking(self.strength, slot_holder(self.trainer.optimizer))
                    per_variable.setdefault(id(variable), new).add(member, group)
                    variable.constraint.shrink = per_variable[id(variable)]
        if not per_variable:
            raise ValueError(
                f"GroupLasso finds no {self.of} to shrink in {self.model.name!r}: none are trained, belong to units "
                "that can be pruned, and are not protected."
                + (" Without BatchNormalization (scale=True) use of='kernels'." if self.of == "scales" else "")
            )
        compile_anew(self.trainer, self.model)

    def ends_at(self) -> int | None:
        return self.stop

    def holds(self, step: int) -> bool:
        return self._is_settled or step >= self.stop

    def masks(self, step: int):
        if not self.holds(step):
            return ()
        if not self._is_settled:
            self._settle()
        pairs = []
        for weight, mask in zero_masks(self.channels, self.removed):
            held = weight.variable.constraint
            if isinstance(held, KeepZeros):  # also what other pruners hold
                mask = mask & (ops.convert_to_numpy(held.mask) != 0)
            pairs.append((weight.variable, mask))
        return pairs

    def figures(self) -> dict[str, float]:
        zeros = [~block.any(axis=1) for group, members in self._places for block in self._blocks(group, members)]
        return {"zero_filters": float(np.concatenate(zeros).mean())}

    def on_train_end(self, logs=None):
        if not self._is_settled and self._last_step is not None:  # it ended before the penalty did
            self._settle()
            self.prune(self._last_step)
        super().on_train_end(logs)

    def _settle(self) -> None:
        """The penalty ends; what all have given up is known."""
        self._is_settled = True
        gone = [
            group.units[~np.concatenate(self._blocks(group, members), axis=1).any(axis=1)]
            for group, members in self._places
        ]
        self.removed = np.unique(np.concatenate([self.removed, *gone])).astype(int)
        empty = [group.name for (group, _), units in zip(self._places, gone) if len(units) == len(group)]
        if empty:
            warnings.warn(
                f"GroupLasso: nothing is left of {'; '.join(empty[:5])}: what they make no longer depends on the "
                "input, which only branches of a sum survive. Lower strength, or protect them.",
                stacklevel=2,
            )
        for weight in self.channels.weights:
            held = weight.variable.constraint
            if isinstance(held, KeepZeros) and held.shrink is self._shrinkings.get(id(weight.variable)):
                held.shrink = None  # not that of another GroupLasso
        compile_anew(self.trainer, self.model)

    def _blocks(self, group: Group, members: list[Member]) -> list[np.ndarray]:
        return self.channels.blocks(group, members=members)


class Shrinking:
    """The proximal step of the group lasso on one variable; groups are the slices of units along its axes.

    Args:
        strength: of the penalty.
        optimizer: whose learning rate and steps count.
    """

    def __init__(self, strength: float, optimizer: keras.optimizers.Optimizer):
        self.strength, self.optimizer = strength, optimizer
        self.axes: dict[int, np.ndarray] = {}  # axis -> which group each position belongs to; 0 is none
        self.roots: dict[int, list[float]] = {}  # axis -> sqrt(number of weights) of each group; 0 of none

    def add(self, member: Member, group: Group) -> None:
        """Let the units of a group be slices along the axis on which the member has them."""
        variable, ids = member.weight.variable, member.weight.axes[member.axis]
        groups = self.axes.setdefault(member.axis, np.zeros(len(ids), int))
        roots = self.roots.setdefault(member.axis, [0.0])
        for unit in group.units:
            here = ids == unit
            groups[here] = len(roots)
            roots.append(math.sqrt(here.sum() * math.prod(variable.shape) / len(ids)))

    def __call__(self, value):
        amount = self.strength * ops.cast(self.optimizer.learning_rate, "float32")
        amount = amount * ops.cast(updates_now(self.optimizer), "float32")
        for axis, groups in self.axes.items():
            value = shrunk(value, axis, groups, amount * ops.convert_to_tensor(self.roots[axis], "float32"))
        return value


def shrunk(value, axis: int, groups: np.ndarray, amounts):
    """max(0, 1 - t / ||w_g||) w_g for the groups of positions along an axis.

    Args:
        value: a tensor.
        axis: along which its groups lie.
        groups: the group of each position, shape (length of the axis,), from 0 up.
        amounts: t of each group, shape (groups,).

    >>> w = np.array([[3.0, 4.0], [3.0, 4.0]], "float32")
    >>> np.round(np.array(shrunk(w, 0, np.arange(2), np.array([1.0, 6.0], "float32"))), 4).tolist()
    [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    whole = ops.cast(value, "float32")
    squares = ops.sum(ops.square(whole), axis=[a for a in range(len(whole.shape)) if a != axis])
    norms = ops.sqrt(ops.segment_sum(squares, groups, num_segments=amounts.shape[0]))
    factors = ops.where(norms > amounts, 1 - amounts / ops.maximum(norms, 1e-37), ops.zeros_like(norms))
    lined = ops.reshape(ops.take(factors, groups), [-1 if a == axis else 1 for a in range(len(whole.shape))])
    return ops.cast(whole * lined, value.dtype)


def _shrunk(channels: Channels, of: str, protect: Sequence) -> list[tuple[Group, list[Member]]]:
    """Groups of units, each with the members that are shrunk."""
    reasons = protected(channels, protect)
    trained = {id(v) for v in channels.model.trainable_variables}
    found = []
    for group in channels.groups:
        members = group.producers
        if of == "scales":
            scales = [m for m in group.members if _is_scale(m.weight)]
            members = scales if len(scales) >= len(members) else []
        if group.index not in reasons and members and all(id(m.weight.variable) in trained for m in members):
            found.append((group, members))
    return found


def _above_zero(name: str, value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} was passed to {where}; expected a number above 0.")
    return float(value)
