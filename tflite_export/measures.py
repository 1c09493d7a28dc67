"""Floor 4. What a network costs as a .tflite file, as functions of what remains of it: bytes, and the arena.

`keras_prune` finds `tflite_bytes` and `arena_bytes` by name (entry points "keras_prune.measures" of this package): the
two packages do not import each other.
"""

import weakref
from collections.abc import Callable, Iterable

import numpy as np

from tflite_export.blueprint import Blueprint
from tflite_export.convert import to_tflite
from tflite_export.devices import get as device_named
from tflite_export.inputs import check_model, generate, model_inputs
from tflite_export.recipes import Recipe
from tflite_export.recipes import get as recipe_named

ALIGNMENT = 16
"""Bytes: a tensor of LiteRT for Microcontrollers begins at a multiple of them."""
MULTIPLIERS = 8
"""Bytes that it keeps for each channel of a quantised convolution: a multiplier and a shift."""


class FileMeasure:
    """A cost of the file that a model would become: `plan(model, ..., measure=this)`.

    The model is converted once, when this is first called.

    Args:
        model: the Keras model that is going to be pruned.
        recipe: how it will be exported: a name or a Recipe.
        data: samples to calibrate the recipe with. None takes random numbers: neither sizes nor times depend on values.
        input_shape: of one sample, where the model leaves sizes open.

    Attributes:
        blueprint: the file and its widths; None before the first call.

    Raises:
        ValueError, TypeError: an unknown recipe, or a model that cannot be exported.
    """

    def __init__(self, model, recipe: str | Recipe = "float32", data=None, *, input_shape=None):
        check_model(model)
        self.model, self.recipe, self.data, self.input_shape = model, recipe_named(recipe), data, input_shape
        self.blueprint: Blueprint | None = None

    def __call__(self, channels, removed: Iterable[int] = ()) -> float:
        """The cost of the file of the cut model.

        Args:
            channels: `keras_prune.Channels` of the model, or anything with its `model`, `weights`, `groups`,
                `unit_count` and `alive(removed)`.
            removed: ids of the units that leave.

        Raises:
            ValueError: the channels are those of another model, or the network cannot be exported.
        """
        if channels.model is not self.model:
            raise ValueError(
                f"This {type(self).__name__} was made for the model {self.model.name!r} and called with another, "
                f"{channels.model.name!r}. Make one for each model."
            )
        if self.blueprint is None:
            content = self._converted()
            blueprint = Blueprint(content, channels)
            self._prepare(blueprint, content, channels)
            self.blueprint = blueprint
        return self._cost(channels.alive(removed))

    def _converted(self) -> bytes:
        data = self.data
        if data is None and self.recipe.needs_data:
            data = generate(model_inputs(self.model, self.input_shape), 8)
        return to_tflite(self.model, self.recipe, data, input_shape=self.input_shape)

    def _prepare(self, blueprint: Blueprint, content: bytes, channels) -> None:
        """What can be worked out once."""

    def _cost(self, alive: np.ndarray) -> float:
        raise NotImplementedError


class FileBytes(FileMeasure):
    """Bytes of the file: what a phone downloads, or the flash of a microcontroller holds.

    Example:
        >>> plan(model, target={FileBytes(model, "int8"): 100_000})        # doctest: +SKIP
    """

    __name__ = "tflite_bytes"

    def _prepare(self, blueprint, content, channels) -> None:
        self._constants = list(blueprint.constants())
        everything = np.ones(channels.unit_count, bool)
        self._rest = len(content) - sum(part.bytes(everything) for part in self._constants)

    def _cost(self, alive: np.ndarray) -> float:
        return self._rest + sum(part.bytes(alive) for part in self._constants)


class ArenaBytes(FileMeasure):
    """Bytes of the arena in which LiteRT for Microcontrollers keeps the tensors of the network: of the SRAM.

    The tensors are laid out as its greedy planner does it: the largest first, each at the lowest place that is free
    while it is needed. What the runtime keeps beside them is measured once, on the unpruned file, if the package
    tflite-micro is installed; without it only the tensors are counted.

    Attributes:
        beside: bytes beside the tensors, of the unpruned file; 0 if they could not be measured.

    Example:
        >>> plan(model, target={ArenaBytes(model, "int8"): 64_000})        # doctest: +SKIP
    """

    __name__ = "arena_bytes"
    beside: int = 0

    def _prepare(self, blueprint, content, channels) -> None:
        self._tensors = list(blueprint.activations())
        self._per_channel = [axes for axes in blueprint.scales()]
        everything = np.ones(channels.unit_count, bool)
        planned = self._planned(everything)
        try:
            measured = device_named("micro").examine(content).sram_bytes
        except ImportError:
            measured = None
        self.beside = 0 if measured is None else measured - planned

    def _planned(self, alive: np.ndarray) -> int:
        return _arena([(tensor.bytes(alive), tensor.made, tensor.last_used) for tensor in self._tensors])

    def _cost(self, alive: np.ndarray) -> float:
        gone = sum(int((~alive[ids]).sum()) for ids in self._per_channel) if self.beside else 0
        return self._planned(alive) + self.beside - MULTIPLIERS * gone


def _arena(tensors: list[tuple[int, int, int]]) -> int:
    """Bytes that the greedy planner of LiteRT for Microcontrollers needs for tensors (bytes, made, last used).

    >>> _arena([(100, 0, 1), (64, 1, 2), (96, 2, 3)])
    176
    """
    rounded = [(-(-size // ALIGNMENT) * ALIGNMENT, made, used) for size, made, used in tensors]
    placed: list[tuple[int, int, int, int]] = []  # (begin, end, made, last used)
    for size, made, used in sorted(rounded[::-1], key=lambda each: -each[0]):  # of equal ones it takes the last first
        begin = 0
        for other in sorted(each for each in placed if each[2] <= used and each[3] >= made):
            if begin + size <= other[0]:
                break
            begin = max(begin, other[1])
        placed.append((begin, begin + size, made, used))
    return max((end for _, end, _, _ in placed), default=0)


_made: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # channels -> {class: measure}


def for_channels(channels, make: Callable):
    """The measure that this class makes for a model, made once for each `Channels`."""
    found = _made.setdefault(channels, {})
    if make not in found:
        found[make] = make(channels.model)
    return found[make]


def tflite_bytes(channels, removed: Iterable[int] = ()) -> float:
    """Bytes of the float32 file; `FileBytes` has other recipes."""
    return for_channels(channels, FileBytes)(channels, removed)


def arena_bytes(channels, removed: Iterable[int] = ()) -> float:
    """Bytes of the arena of the int8 file; `ArenaBytes` has other recipes."""
    return for_channels(channels, _int8_arena)(channels, removed)


def _int8_arena(model) -> ArenaBytes:
    return ArenaBytes(model, "int8")
