"""Ask for a sparsity where PSP layers learn one: a callback that moves the layers' thresholds, and nothing else.

How much a PSP layer prunes follows from its threshold and the decay of its alphas, which nobody knows before. But with
the alphas of the moment the sparsity is a step function of the threshold, so the threshold of an asked sparsity is
looked up in the sorted |alpha|, not searched by feedback.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import keras
import numpy as np

from keras_prune import schedules
from keras_prune.channels import Channels
from keras_prune.files import check_writable
from keras_prune.internals import layers_of
from keras_prune.layers import PSPLayer
from keras_prune.pruners import KeepZeros, hold_zeros, prepare_to_hold
from keras_prune.reports import plot_alphas
from keras_prune.surgery import write_zeros

MEASURES = ("macs", "params", "structures")
BUDGETS = ("global", "uniform")
UNITS = ("batch", "epoch")


class SparsityTarget(keras.callbacks.Callback):
    """Brings a model with PSP layers to an asked sparsity while it trains, by moving the thresholds of its layers.

    At every due step, and at the end of every epoch before validation, the thresholds are set to where the present
    alphas give the largest sparsity that is not above the asked one. Between two settings the alphas move on and the
    sparsity drifts with them. Without `hold` weights and alphas are not touched: what is pruned can come back. What
    fit's callbacks save, validate or restore has its own thresholds, as these are weights of the layers.

    Alphas of the same size are pruned together or not at all, so that a tie never prunes more than asked. With
    `alpha_initializer="ones"` they all tie in the first epoch: a plain number then prunes nothing until its end, and
    all of it there. A ramp is gentler: `schedules.polynomial(0.0, 0.7, begin=0, stop=6)`.

    Args:
        sparsity: a number in [0, 1), `{step: sparsity}`, or a schedule (`keras_prune.schedules`): the fraction of
            `measure` to prune.
        measure: of the kernels that have alphas, `"params"`: their weights; `"macs"`: these, each as often as it is
            used per sample; or `"structures"`: the alphas. A weight is pruned if any of its structures is. `strip`
            may remove less (columns leave a ragged rest, which stays as zeros) or more (a filter whose readers are
            gone, the bias and norm of what left).
        budget: `"global"`, one threshold for all layers; or `"uniform"`, the paper's "fixed sparsity": the smallest
            |alpha| of every layer, equally in each (there without decay: `alpha_regularizer=None`). A layer of few
            structures is rounded down.
        every, unit: move on along the schedule each `every` steps; a step is an "epoch" or a "batch".
        hold: from the end of the schedule on (with a plain number: from the first setting on) what is pruned stays so:
            its alphas become zero and are kept there, as FilterPruning does it. Without it pruned structures go on
            coming and going between two settings, so that the network at the end is not the one that was trained:
            useless where BatchNormalization behind whole layers or filters revives them with the next step.
        allow_dead_layers: let a layer lose all it has. Otherwise the last weights of a kernel stay, with a threshold
            of their own if need be; `"layer"` structures may leave in any case.
        log_layers: also log `sparsity/<layer>`.
        plot: path of a PNG, drawn anew at the end of every epoch (some 0.1 s for each alpha): see
            `keras_prune.reports.plot_alphas`.

    Attributes:
        per_layer: `{layer: sparsity}` of every epoch of the last fit.

    Logs:
        `sparsity` (of the measure) as it is at the end of the epoch; with `log_layers` that of each layer.
        `keras.callbacks.TensorBoard(histogram_freq=1)` draws the distribution of each alpha on its own.

    Put it before CSVLogger and TensorBoard in the list of callbacks: they write the logs as they find them. A run
    that is killed and restored (keras.callbacks.BackupAndRestore) goes on at its place in the schedule. After training
    the last asked sparsity is set once more, also on weights that were restored or averaged by then: with
    EarlyStopping(restore_best_weights=True) set start_from_epoch to the end of the schedule, so that the best epoch
    has that sparsity already and keeps the thresholds it was validated with. A second fit begins its schedule anew.

    Raises:
        ValueError, TypeError: arguments that mean nothing, at once; at the start of fit a model without PSP layers,
            a threshold variable that layers share with `budget="uniform"`, or `measure="macs"` where nobody knows
            them; in training alphas that are no longer numbers.

    [Schindler, Roth, Pernkopf, Froening: Parameterized Structured Pruning for Deep Neural Networks, the comparison
    with "fixed sparsity" in the ablation; one threshold for all layers is the method itself, its size asked for.]

    Example:
        >>> ramp = schedules.polynomial(0.0, 0.7, begin=0, stop=6)                 # doctest: +SKIP
        >>> model.fit(x, y, epochs=10, callbacks=[SparsityTarget(ramp, hold=True)])   # doctest: +SKIP
        >>> small = strip(model)                                                   # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float | Mapping[int, float] | schedules.Schedule,
        *,
        measure: str = "params",
        budget: str = "global",
        every: int = 1,
        unit: str = "epoch",
        hold: bool = False,
        allow_dead_layers: bool = False,
        log_layers: bool = False,
        plot: str | Path | None = None,
    ):
        super().__init__()
        for what, value, known in (("measure", measure, MEASURES), ("budget", budget, BUDGETS), ("unit", unit, UNITS)):
            if value not in known:
                raise ValueError(
                    f"{what}={value!r} was passed to SparsityTarget; known: {', '.join(map(repr, known))}."
                )
        if isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"every={every!r} was passed to SparsityTarget; expected a whole number from 1 up.")
        if plot is not None:
            if Path(plot).suffix != ".png":
                raise ValueError(f"plot={str(plot)!r} was passed to SparsityTarget; give a name that ends in .png.")
            check_writable(str(plot))
        self.schedule = schedules.get(sparsity)
        self.measure, self.budget, self.every, self.unit = measure, budget, every, unit
        self.hold, self.allow_dead_layers, self.log_layers, self.plot = hold, allow_dead_layers, log_layers, plot
        self.per_layer: list[dict[str, float]] = []
        self._is_training = False

    # -- Keras calls these ---------------------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self.kernels = _kernels(self.model, self.measure)
        if self.budget == "uniform":
            _check_unshared(self.kernels)
        if self.hold:
            prepare_to_hold(self.model, [a for kernel in self.kernels for a in kernel.layer.alphas.values()])
        self.per_layer = []
        self._target: float | None = None
        self._last_step: int | None = None
        self._batches = 0
        self._is_training = False  # not yet: BackupAndRestore may restore after this

    def on_epoch_begin(self, epoch, logs=None):
        steps = self.params.get("steps")
        self._first = epoch * steps if steps else self._batches
        if not self._is_training:
            self._is_training = True
            schedules.warn_if_too_short(self, self.schedule, self.unit)
        if self.unit == "epoch":
            self._move_if_due(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        if self.unit == "batch":
            self._move_if_due(self._first + batch)

    def on_train_batch_end(self, batch, logs=None):
        self._batches = self._first + batch + 1
        if batch + 1 >= (self.params.get("steps") or np.inf):  # callbacks that come before this one save the epoch, too
            self._settle()

    def on_test_begin(self, logs=None):
        if self._is_training:  # where fit does not know the number of batches
            self._settle()

    def on_epoch_end(self, epoch, logs=None):
        self._settle()
        readings = [kernel.read() for kernel in self.kernels]
        self.per_layer.append({name: self._sparsity(own) for name, own in _by_layer(readings).items()})
        if logs is not None:
            logs["sparsity"] = self._sparsity(readings)
            if self.log_layers:
                logs.update({f"sparsity/{name}": value for name, value in self.per_layer[-1].items()})
        if self.plot is not None:
            plot_alphas(self.model, self.plot)

    def on_train_end(self, logs=None):
        self._is_training = False
        if self._target is None:  # not one epoch was left to train
            return
        readings = [kernel.read() for kernel in self.kernels]
        before, foreign = self._sparsity(readings), _thresholds_in(readings) != self._written
        self._settle()
        after = self._sparsity([kernel.read() for kernel in self.kernels])
        if foreign and abs(after - before) > 1e-6:
            warnings.warn(
                f"SparsityTarget: weights of another epoch were restored, with a sparsity of {before:.1%}; the "
                f"thresholds were moved to {after:.1%}, for which they were not trained. With EarlyStopping("
                "restore_best_weights=True) set start_from_epoch to the end of the schedule.",
                stacklevel=2,
            )
        if self._target - after > 0.05:
            warnings.warn(
                f"SparsityTarget: {after:.1%} of the {self.measure} are pruned, {self._target:.1%} were asked for. "
                "What comes next is too large a piece, or ties with others (alphas that do not train?), or is the last "
                "of its layer (allow_dead_layers=True lets that leave).",
                stacklevel=2,
            )
        if self.plot is not None:
            plot_alphas(self.model, self.plot)

    # -- the work ------------------------------------------------------------------------------------------------

    def _move_if_due(self, step: int) -> None:
        """Due: the first step, each multiple of `every` that was reached or passed, and the last value's step."""
        if schedules.is_due(step, self._last_step, self.every, getattr(self.schedule, "stop", None)):
            self._last_step = step
            self._target = schedules.check_sparsity(self.schedule(step), "SparsityTarget by its schedule")
            self._settle()

    def _settle(self) -> None:
        """Set the thresholds for the present alphas."""
        if self._target is None:  # an epoch without a batch
            return
        if keras.backend.backend() == "jax":  # training keeps its own copy of the weights between callbacks
            self.model.jax_state_sync()
        readings = [kernel.read() for kernel in self.kernels]
        scopes = [readings] if self.budget == "global" else _by_layer(readings).values()
        for scope in scopes:
            for variable, value in _solve(scope, self.measure, self._target, self.allow_dead_layers):
                variable.assign(value)
        self._written = _thresholds_in(readings)
        if self.hold and self._last_step >= (getattr(self.schedule, "stop", None) or 0):
            self._hold()

    def _hold(self) -> None:
        """What is pruned now stays so."""
        changed = False
        for kernel in self.kernels:
            for structure, alive in kernel.layer.alive().items():
                alpha = kernel.layer.alphas[structure]
                if not alive.all() and isinstance(alpha.constraint, KeepZeros):
                    changed |= bool(np.any(alive != keras.ops.convert_to_numpy(alpha.constraint.mask)))
                    write_zeros(alpha, alive)
                    hold_zeros(self.model.optimizer, alpha, alive)
        if changed and keras.backend.backend() == "jax":  # a mask is a constant of JAX's compiled step
            self.model.make_train_function(force=True)

    def _sparsity(self, readings: Sequence[Reading]) -> float:
        pruned = total = 0
        for reading in readings:
            alive = [a.size >= float(keras.ops.convert_to_numpy(a.threshold)) for a in reading.alphas]
            for left, cost in reading.pieces(alive, self.measure):
                pruned += cost * int(left.size - np.count_nonzero(left))
                total += cost * left.size
        return pruned / total


# -- kernels and their alphas ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alpha:
    """|alpha| of one structure at one moment, as float64, and its threshold."""

    structure: str
    size: np.ndarray
    threshold: keras.Variable


@dataclass(frozen=True)
class Reading:
    """The alphas of one kernel at one moment; `cost` is what the whole kernel costs."""

    layer: str
    cost: int
    alphas: tuple[Alpha, ...]

    def pieces(self, values: Sequence[np.ndarray], measure: str) -> Iterable[tuple[np.ndarray, int]]:
        """(array, cost of each entry), from one array per alpha: the smallest value decides about a weight."""
        if measure == "structures":
            return [(value, 1) for value in values]
        least = reduce(np.minimum, values)
        return [(least, self.cost // least.size)]


@dataclass(frozen=True)
class Kernel:
    """A kernel that has alphas, the name of its layer, and what the whole kernel costs."""

    layer: PSPLayer
    name: str
    structures: tuple[str, ...]
    cost: int

    def read(self) -> Reading:
        alphas, thresholds = self.layer.alphas, self.layer.thresholds
        sizes = {s: np.abs(keras.ops.convert_to_numpy(alphas[s])).astype(np.float64) for s in self.structures}
        for structure, size in sizes.items():
            if not np.isfinite(size).all():
                raise ValueError(
                    f"{self.name}: its {structure} alphas are no longer finite numbers; the training has diverged. "
                    "Lower the learning rate, or clip the gradients (clipnorm=1.0)."
                )
        return Reading(self.name, self.cost, tuple(Alpha(s, v, thresholds[s]) for s, v in sizes.items()))


def _kernels(model: keras.Model, measure: str) -> list[Kernel]:
    """The kernels of all PSP layers at any depth, in the order of the network."""
    place = {id(v): k for k, v in enumerate(model.weights)}
    layers = [layer for layer in layers_of(model) if isinstance(layer, PSPLayer)]
    if not layers:
        raise ValueError(
            f"{model.name} has no PSP layers, so no thresholds that SparsityTarget could move. Build it with "
            "keras_prune.layers.PSPConv2D and its siblings, or turn it into such a model with keras_prune.psp_model; "
            "plain layers are pruned by keras_prune.FilterPruning."
        )
    layers.sort(key=lambda layer: min(place[id(alpha)] for alpha in layer.alphas.values()))
    names = _names(layers)
    positions = _uses(model) if measure == "macs" else {}
    found = []
    for layer, name in zip(layers, names):
        for kernel in layer._kernels:
            structures = tuple(s for s in layer.structures if layer.kernel_of(s) == kernel)
            variable = layer.raw_kernel(kernel)
            if measure == "macs" and id(variable) not in positions:
                raise ValueError(
                    f"measure='macs': {name} works inside a layer without a rule, so nobody knows how often its "
                    "weights are used. Use measure='params', or add a rule with @keras_prune.rule."
                )
            if structures:
                cost = int(np.prod(variable.shape)) * positions.get(id(variable), 1)
                found.append(Kernel(layer, name, structures, cost))
    return found


def _names(layers: Sequence[keras.layers.Layer]) -> list[str]:
    """The layers' names; where nested models use one twice, with a number behind."""
    names = [layer.name for layer in layers]
    return [name if names.count(name) == 1 else f"{name}#{names[: k + 1].count(name)}" for k, name in enumerate(names)]


def _uses(model: keras.Model) -> dict[int, int]:
    """id(kernel variable) -> how often per sample each of its entries is used."""
    uses: dict[int, int] = {}
    for term in Channels(model).terms:
        if term.kernel is not None:
            uses[id(term.kernel)] = uses.get(id(term.kernel), 0) + term.factor
    return uses


def _check_unshared(kernels: Sequence[Kernel]) -> None:
    owners: dict[int, str] = {}
    for kernel in kernels:
        for variable in kernel.layer.thresholds.values():
            other = owners.setdefault(id(variable), kernel.name)
            if other != kernel.name:
                raise ValueError(
                    f"budget='uniform' needs a threshold for each layer, but {other} and {kernel.name} share one. Give "
                    "them numbers as thresholds, or use budget='global'."
                )


def _by_layer(readings: Iterable[Reading]) -> dict[str, list[Reading]]:
    found: dict[str, list[Reading]] = {}
    for reading in readings:
        found.setdefault(reading.layer, []).append(reading)
    return found


def _thresholds_in(readings: Iterable[Reading]) -> list[float]:
    return [float(keras.ops.convert_to_numpy(a.threshold)) for r in readings for a in r.alphas]


# -- the threshold of a sparsity ---------------------------------------------------------------------------------


def _solve(readings: Sequence[Reading], measure: str, target: float, may_die: bool) -> list:
    """(threshold variable, value): one value for all of them, and less where it would take the last of a kernel."""
    caps: dict[int, float] = {}
    for reading in readings:
        guarded = [a for a in reading.alphas if a.structure != "layer" and not may_die]
        cap = reduce(np.minimum, [a.size for a in guarded]).max() if guarded else np.inf
        for alpha in reading.alphas:
            caps.setdefault(id(alpha.threshold), np.inf)
        for alpha in guarded:
            caps[id(alpha.threshold)] = min(caps[id(alpha.threshold)], cap)
    falls = [[np.where(a.size < caps[id(a.threshold)], a.size, np.inf) for a in r.alphas] for r in readings]
    levels = np.unique(np.concatenate([fall.ravel() for own in falls for fall in own]))
    spent = np.zeros(len(levels))  # by what falls at each level
    for reading, own in zip(readings, falls):
        for rank, cost in reading.pieces([np.searchsorted(levels, fall) for fall in own], measure):
            spent += cost * np.bincount(rank.ravel(), minlength=len(levels))
    last = _last_to_fall(levels, np.cumsum(spent), target)
    common = _just_above(last, np.concatenate([a.size.ravel() for r in readings for a in r.alphas]))
    variables = {id(a.threshold): a.threshold for r in readings for a in r.alphas}
    found = []
    for key, variable in variables.items():
        value = common
        if common > caps[key]:
            own = np.concatenate([a.size.ravel() for r in readings for a in r.alphas if id(a.threshold) == key])
            below = own[own < caps[key]]
            value = _just_above(below.max() if below.size else None, own)
        found.append((variable, value))
    return found


def _last_to_fall(levels: np.ndarray, spent: np.ndarray, target: float) -> float | None:
    """The level up to which `spent` is no more than `target` of everything; what stands at infinity never falls."""
    fits = (spent <= target * spent[-1] * (1 + 1e-9)) & np.isfinite(levels)  # 0.29 * 100 is 28.999999999999996
    if not fits.any():
        return None
    reached = spent[np.count_nonzero(fits) - 1]
    return float(levels[np.searchsorted(spent, reached)])  # not beyond, where all that falls was pruned already


def _just_above(last: float | None, sizes: np.ndarray) -> float:
    """A threshold that prunes what is up to `last`, nothing else: half way to the next, so that little drifts over."""
    if last is None:
        return 0.0
    above = sizes[sizes > last]
    if not above.size:
        return float(np.nextafter(np.float32(last), np.float32(np.inf)))
    half = float(np.float32((last + above.min()) / 2))
    return half if last < half <= above.min() else float(above.min())
