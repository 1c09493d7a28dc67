"""What no longer depends on the input: units whose kernels are zero but that a bias or BatchNormalization keeps alive.

Such a unit is the constant trap of pruning: its filter is zero, its value is not. Where its readers can take the
constant into their own bias it leaves with the same outputs. Behind zero padding they cannot (the border sees zeros
instead of the constant); there all constants are merged into one unit, which is exact for every padding and stride.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.linear import VIEWS, pads_nothing
from keras_prune.program import Program
from keras_prune.rules import Ids
from keras_prune.sites import Site, intercept_of, sites_of, tail_of
from keras_prune.surgery.rebuilding import Rebuild
from keras_prune.surgery.zeros import any_along, dead_units

ROUNDING = 1e-6
"""Numbers that differ by less, relative to the largest, are one constant."""

SAME_FOR_ALL_SIZES = frozenset(
    """Abs Activation ActivityRegularization Add AlphaDropout Average AveragePooling1D AveragePooling2D AveragePooling3D
    BatchNormalization Cast Clip Cropping1D Cropping2D Cropping3D Dense Divide Dropout ELU Elu Exp GaussianDropout
    GaussianNoise Gelu GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D HardSigmoid HardSilu Identity LayerNormalization LeakyReLU LeakyRelu Max
    MaxPooling1D MaxPooling2D MaxPooling3D Maximum Mean Min Minimum Multiply Negative PReLU ReLU Relu Relu6 Rescaling
    Selu Sigmoid Silu Softplus SpatialDropout1D SpatialDropout2D SpatialDropout3D Sqrt Square Subtract Tanh TrueDivide
    UpSampling1D UpSampling2D UpSampling3D""".split()
)
"""What makes one number out of a number that is the same at every position, however many positions there are."""


class Constants:
    """Which tensors, and which units of which tensors, are the same for every input: read from zero kernels.

    Attributes:
        whole: slot of the program -> whether the tensor as a whole is constant.
        units: slot -> shape (unit_count,), True for units that are constant there.
    """

    def __init__(self, channels: Channels):
        self.channels, self.program = channels, Program(channels.model)
        self._read_kernels()
        inputs = self.program.inputs
        self.whole = dict.fromkeys(inputs, False)
        self.units = {slot: np.zeros(channels.unit_count, bool) for slot in inputs}
        self._ids: dict[int, Ids] = {slot: np.zeros(1, int) for slot in inputs}
        for step in self.program.steps:
            self._visit(step)

    def _read_kernels(self) -> None:
        """Per layer: whether its kernels are zero altogether, on which units, and which units it mixes from others."""
        count = self.channels.unit_count
        self._silent: set[int] = set()
        self._loud: dict[int, np.ndarray] = {}  # id(layer) -> units made by a kernel that is not zero there
        self._made: dict[int, np.ndarray] = {}  # id(layer) -> units made by a kernel
        self._mixed: dict[int, np.ndarray] = {}  # id(layer) -> units that depend on other units of the input
        for weight in self.channels.weights:
            layer = id(weight.layer)
            for table in (self._loud, self._made, self._mixed):
                table.setdefault(layer, np.zeros(count, bool))
            makes = [a for a in weight.labelled if not weight.reads[a]]
            mixes = any(weight.reads) or len(weight.labelled) > 1
            nonzero = keras.ops.convert_to_numpy(weight.variable) != 0 if weight.is_kernel else None
            if nonzero is not None and not nonzero.any() and type(weight.layer).__name__ in VIEWS:
                self._silent.add(layer)
            for axis in makes:
                ids = weight.axes[axis]
                if mixes:
                    self._mixed[layer][ids] = True
                if nonzero is not None:
                    self._made[layer][ids] = True
                    self._loud[layer][ids[any_along(nonzero, axis)]] = True

    def _visit(self, step) -> None:
        layer, taken = id(step.operation), [slot for _, slot in step.takes]
        whole = layer in self._silent or (bool(taken) and all(self.whole[slot] for slot in taken))
        count = self.channels.unit_count
        none = np.zeros(count, bool)
        silent = self._made.get(layer, none) & ~self._loud.get(layer, none)
        passing, constant = np.zeros(count, bool), np.ones(count, bool)
        joins = type(step.operation).__name__ == "Concatenate"
        for slot in taken:
            present = np.zeros(count, bool)
            present[np.unique(self._ids[slot])] = True
            passing |= present
            # What else comes in, a gate of one channel for all, acts on every unit; only a concatenation keeps apart.
            constant &= self.units[slot] | self.whole[slot] | (~present if joins else False)
        kept = passing & constant & ~self._mixed.get(layer, none)
        if self._depends_on_size(step):
            whole, kept = layer in self._silent, none
        tensors = step.node.outputs if step.node is not None else [None]
        for slot, tensor in zip(step.gives, tensors):
            ids = self._ids[taken[0]] if tensor is None else self.channels.ids_of(tensor)
            present = np.zeros(count, bool)
            present[np.unique(ids)] = True
            self._ids[slot] = ids
            self.whole[slot] = whole
            self.units[slot] = present & (silent | kept | whole)
            self.units[slot][0] = False

    def _depends_on_size(self, step) -> bool:
        """Whether a call could make other numbers of the same constant where its input has another length."""
        if not self.channels.has_unknown_lengths or step.node is None or not _has_unknown_lengths(step):
            return False
        operation = step.operation
        if type(operation).__name__ == "Concatenate":
            return operation.axis % len(step.node.outputs[0].shape) != len(step.node.outputs[0].shape) - 1
        return type(operation).__name__ not in SAME_FOR_ALL_SIZES and not pads_nothing(operation)

    def mask(self, slot: int, shape: tuple) -> np.ndarray:
        """Which numbers of one sample of a tensor are constant: booleans of `shape`, (1, ...)."""
        if self.whole[slot]:
            return np.ones(shape, bool)
        ids = self._ids[slot]
        ids = ids.reshape((1,) * (len(shape) - ids.ndim) + ids.shape) if ids.ndim < len(shape) else ids
        return np.broadcast_to(self.units[slot][ids], shape)

    def unit_ids(self, slot: int, shape: tuple) -> np.ndarray:
        """The unit of each number of one sample."""
        return np.broadcast_to(self._ids[slot], shape)


def _has_unknown_lengths(step) -> bool:
    return any(None in tensor.shape[1:] for tensor in step.node.input_tensors)


def values_of(program: Program, batch, slots) -> dict[int, np.ndarray]:
    """The values of some slots for a batch, as float32 arrays."""
    values, wanted, found = program.start(batch), set(slots), {}
    for number in range(len(program.steps) + 1):
        for slot in wanted & set(values):
            found[slot] = keras.ops.convert_to_numpy(keras.ops.cast(values[slot], "float32"))
            wanted.discard(slot)
        if number < len(program.steps) and wanted:
            values = program.run(values, number, number + 1)
    return found


@dataclass
class Reader:
    """A kernel that reads units which are constant.

    Attributes:
        site: the kernel.
        steady: units there -> their value at every position; those whose value depends on the position are missing.
        field: the constants alone, as one sample of the kernel's input, (1, ...).
        takes_all: whether the kernel makes the same of the constants at every position of its output.
    """

    site: Site
    ids: np.ndarray
    field: np.ndarray
    constant: np.ndarray
    takes_all: bool = False
    steady: dict[int, float] = field(default_factory=dict)

    def effect(self, units: Ids) -> np.ndarray | None:
        """What the kernel makes of these constant units, shape (blocks, outputs); None if that depends on position."""
        x = np.where(np.isin(self.ids, units), self.field, 0).astype(np.float32)
        at = np.arange(self.site.view.count(x.shape))
        made = self.site.view.rows(x, at).astype(np.float64) @ self.site.matrix().astype(np.float64)
        return made[:, 0] if _steady(made, axis=1) else None

    def columns(self, unit: int) -> list[np.ndarray]:
        """Per block, the columns of a unit in the order of the taps."""
        axis = next(a for a, ids in enumerate(self.site.weight.axes) if ids is not None and self.site.weight.reads[a])
        return [np.flatnonzero(ids == unit) for ids in self.site.ids(axis)[:, :, 0]]


def fold_constants(constants: Constants, batch) -> tuple[keras.Model, list[str]]:
    """A model with the same outputs in which nothing reads constant units any more, as far as that is exact.

    Args:
        constants: those of a model.
        batch: two different samples, in the structure of the model's inputs.

    Returns:
        (model, notes). The model itself where nothing is constant; otherwise a copy: the units' columns in their
        readers are zero, the readers' biases (or the running means behind them) hold what they contributed. Of
        several units whose readers pad with zeros one stays and stands for all.
    """
    channels, program = constants.channels, constants.program
    if all(constants.whole[slot] for slot in program.outputs):
        warnings.warn(
            f"{channels.model.name}: its outputs are the same for every input, as zeros cut every way through "
            "it. Prune less, or let layers with a way around them (structure='layer') alone be pruned as a whole.",
            stacklevel=4,
        )
    readers = _readers(constants, batch)
    dead = set(dead_units(channels).tolist())  # those leave without our help
    read_by = {u: keys for u, keys in _read_by(channels, readers).items() if u not in dead}
    leaving = _leaving(readers, read_by)
    stand_ins = _stand_ins(readers, {u: r for u, r in read_by.items() if u not in set(leaving)})
    if not leaving and not stand_ins:
        return channels.model, _left(read_by)
    gone = {key: np.array([u for u in leaving if key in read_by[u]], int) for key in readers}
    needs_bias = {
        id(reader.site.weight.layer)
        for key, reader in readers.items()
        if _intercept(program, reader.site) is None and np.any(reader.effect(gone[key]))
    }
    copy = _WithBias(channels.model, needs_bias)
    model = copy.model()
    for key, reader in readers.items():
        _take_over(program, reader, copy, gone[key], {u: r for u, r in stand_ins.items() if key in read_by[u]})
    merged = len(stand_ins)
    notes = []
    if leaving:
        notes.append(f"{len(leaving)} constant units folded into the biases of what reads them")
    if merged:
        notes.append(
            f"{merged} constant units merged into {len(set(stand_ins.values()))} others: their readers pad with zeros, "
            "so a bias cannot hold them"
        )
    done = {*leaving, *stand_ins, *stand_ins.values()}
    return model, notes + _left({u: r for u, r in read_by.items() if u not in done})


def _readers(constants: Constants, batch) -> dict[int, Reader]:
    """Kernels, by number of their call, that read constant units, with the constants they read."""
    channels, program, sites = constants.channels, constants.program, {}
    for site in sites_of(channels, program):
        slot = program.steps[site.steps[0]].takes[0][1] if program.steps[site.steps[0]].takes else None
        if len(site.steps) == 1 and not site.path and slot is not None and any(site.weight.reads):
            if constants.units[slot].any() and site.layer is site.weight.layer:
                sites[site.steps[0]] = (site, slot)
    values = values_of(program, batch, {slot for _, slot in sites.values()})
    readers = {}
    for number, (site, slot) in sites.items():
        x = values[slot]
        shape = (1, *x.shape[1:])
        constant = constants.mask(slot, shape) & (constants.unit_ids(slot, shape) > 0)
        if not _same(np.where(constant, x[:1], 0), np.where(constant, x[1:2], 0)):
            continue  # a random layer, or a rule that is wrong: believe the numbers
        reader = Reader(site, constants.unit_ids(slot, shape), np.where(constant, x[:1], 0), constant)
        scale = np.abs(reader.field).max(initial=0)
        for unit in np.unique(reader.ids[constant]):
            found = reader.field[reader.ids == unit]
            if found.max() - found.min() <= ROUNDING * scale:
                reader.steady[int(unit)] = float(found.mean())
        units = np.unique(reader.ids[constant])
        # Of an unknown length, what a border makes is not to be seen in one example: strides decide where it falls.
        sized = not (channels.has_unknown_lengths and _has_unknown_lengths(program.steps[number])) or (
            len(reader.steady) == len(units) and (type(site.layer).__name__ == "Dense" or pads_nothing(site.layer))
        )
        can_hold = _intercept(program, site) is not None or getattr(site.layer, "use_bias", True) is False
        reader.takes_all = can_hold and sized and reader.effect(units) is not None
        readers[number] = reader
    return readers


def _read_by(channels: Channels, readers: dict[int, Reader]) -> dict[int, list[int]]:
    """Unit -> the readers of it; only units that are constant at all of their readers."""
    places: dict[int, list[int]] = {}
    barred = np.zeros(channels.unit_count, bool)
    of_weight = {id(reader.site.weight): key for key, reader in readers.items()}
    of_layer = {id(reader.site.weight.layer) for reader in readers.values()}
    prunable = channels.prunable()
    for weight in channels.weights:
        for axis in weight.takes:
            ids = weight.axes[axis]
            key = of_weight.get(id(weight))
            if weight.name == "depthwise_kernel" and id(weight.layer) in of_layer:
                continue  # its pointwise kernel answers for both
            if key is None or len(weight.takes) > 1:
                if not weight.is_statistic:
                    nonzero = keras.ops.convert_to_numpy(weight.variable) != 0
                    barred[ids[any_along(nonzero, axis)]] = True
                continue
            reader = readers[key]
            fixed = set(np.unique(reader.ids[reader.constant]).tolist())
            for unit in np.unique(ids).tolist():
                if unit in fixed:
                    places.setdefault(unit, []).append(key)
                else:
                    barred[unit] = True
    return {u: keys for u, keys in places.items() if prunable[u] and not barred[u]}


def _can_take(reader: Reader, unit: int) -> bool:
    return reader.takes_all or abs(reader.steady.get(unit, 1.0)) == 0.0


def _leaving(readers: dict[int, Reader], read_by: dict[int, list[int]]) -> list[int]:
    """Units whose readers can all hold what they contribute."""
    leaving = [u for u, known in read_by.items() if all(_can_take(readers[r], u) for r in known)]
    for key, reader in readers.items():  # what was steady only together with units that stay, stays, too
        here = [u for u in leaving if key in read_by[u] and reader.steady.get(u) != 0.0]
        if reader.effect(np.array(here, int)) is None:
            return _leaving(readers, {u: known for u, known in read_by.items() if u not in here})
    return leaving


def _stand_ins(readers, read_by) -> dict[int, int]:
    """Unit -> the constant unit that is to stand for it: one that all of its readers see, too, as no smaller number."""
    steady = {u: keys for u, keys in read_by.items() if all(u in readers[k].steady for k in keys)}

    def strength(unit):
        return min((abs(readers[k].steady[unit]) for k in steady[unit]), default=0.0)

    order = sorted(steady, key=lambda u: (-len(steady[u]), -strength(u)))
    kept: list[int] = []
    found: dict[int, int] = {}
    for unit in order:
        host = next(
            (h for h in kept if all(_can_host(readers[k], h, unit, k in steady[h]) for k in steady[unit])), None
        )
        if host is None:
            kept.append(unit)
        else:
            found[unit] = host
    return found


def _can_host(reader: Reader, host: int, unit: int, is_read: bool) -> bool:
    value, other = abs(reader.steady.get(unit, 0.0)), abs(reader.steady.get(host, 0.0))
    alike = [len(a) == len(b) for a, b in zip(reader.columns(host), reader.columns(unit))]
    return is_read and all(alike) and (value == 0 or other >= 1e-3 * value)


def _take_over(program, reader: Reader, copy: _WithBias, gone: Ids, stand_ins: dict[int, int]) -> None:
    """Write into the copy's kernel and intercept what the original's kernel gets from constants."""
    kernel = copy.variables[id(reader.site.kernel)]
    matrix = reader.site.matrix().astype(np.float64)
    effect = reader.effect(gone)
    if np.any(effect):
        target = _intercept(program, reader.site)
        variable, sign = target if target is not None else (copy.biases[id(reader.site.weight.layer)], 1)
        variable = copy.variables.get(id(variable), variable)
        now = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
        variable.assign((now + sign * effect.reshape(now.shape)).astype(now.dtype))
    for unit, host in stand_ins.items():
        value = reader.steady[unit]
        ratio = value / reader.steady[host] if value else 0.0
        for block, into, out in zip(matrix, reader.columns(host), reader.columns(unit)):
            block[into] += ratio * block[out]
    for unit in [*gone, *stand_ins]:
        for block, out in zip(matrix, reader.columns(unit)):
            block[out] = 0
    kernel.assign(reader.site.view.kernel(matrix).astype(keras.backend.standardize_dtype(kernel.dtype)))


def _intercept(program, site: Site):
    """(variable, sign) that takes a shift of a kernel's output: its bias, or the running mean right behind it."""
    return intercept_of(site.bias, tail_of(program, site).norm)


def _left(read_by: dict) -> list[str]:
    left = len(read_by)
    return [f"{left} constant units stay: what reads them pads with zeros, so a bias cannot hold them"] if left else []


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max(initial=0) <= ROUNDING * max(np.abs(a).max(initial=0), 1e-30))


def _steady(x: np.ndarray, axis: int) -> bool:
    return bool(np.ptp(x, axis=axis).max(initial=0) <= ROUNDING * max(np.abs(x).max(initial=0), 1e-30))


class _WithBias(Rebuild):
    """A copy in which some layers have a bias, of zeros."""

    def __init__(self, model, layers: set[int]):
        super().__init__(model)
        self._layers = layers
        self.biases: dict[int, keras.Variable] = {}  # id(old layer) -> the new bias

    def made(self, old, config):
        if id(old) in self._layers:
            config = {**config, "use_bias": True, "bias_initializer": "zeros"}
        return super().made(old, config)

    def copy_weights(self, old, new):
        if id(old) not in self._layers:
            return super().copy_weights(old, new)
        for before, after in zip(old.variables, new.variables):
            after.assign(before)
            self.variables[id(before)] = after
        self.biases[id(old)] = new.bias
