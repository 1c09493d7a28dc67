"""Floor 1. Which weight of the model a kernel in the file is: recognised by its values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Ids = np.ndarray

MATCH = 0.9
"""Mean cosine of a kernel's filters and the weight's from which they are the same; int8 rounding leaves 0.999."""


@dataclass(frozen=True)
class Layout:
    """One way in which a weight may stand in a file: as a matrix (filters, numbers).

    Attributes:
        values: the weight.
        order: its axes, those of the filters first.
        split: how many they are.
        made, read: ids of the filters, and of the last of the others.
        by_channel: a depthwise convolution's.
    """

    values: np.ndarray
    order: tuple[int, ...]
    split: int
    made: Ids
    read: Ids
    by_channel: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows = math.prod(self.values.shape[a] for a in self.order[: self.split])
        return rows, self.values.size // rows

    def matrix(self) -> np.ndarray:
        return self.values.transpose(self.order).reshape(self.shape)


class Weights:
    """The model's kernels, to be recognised in a file."""

    def __init__(self, channels):
        found = [w for w in channels.weights if ("kernel" in w.name or "embeddings" in w.name) and len(w.axes) > 1]
        self.layouts = [layout for weight in found for layout in _layouts(weight)]
        self.used: set[int] = set()

    def find(self, numbers: np.ndarray, name: str) -> tuple[Ids, Ids] | None:
        """(ids made, ids read) of the weight with these numbers; among equals the first that was not found before."""
        by_channel = name == "DEPTHWISE_CONV_2D"
        filters = np.moveaxis(numbers, -1, 0) if by_channel or name in ("CONV_3D", "GATHER") else numbers
        filters = filters.reshape(len(filters), -1)
        best = None
        for place, layout in enumerate(self.layouts):
            if layout.shape == filters.shape and layout.by_channel == by_channel:
                score = _cosine(layout.matrix(), filters)
                key = (round(score, 3), id(layout.values) not in self.used, -place)
                if score >= MATCH and (best is None or key > best[0]):
                    best = key, layout
        if best is None:
            return None
        self.used.add(id(best[1].values))
        return best[1].made, best[1].read


def _layouts(weight) -> Iterator[Layout]:
    values = np.asarray(weight.variable, np.float32)
    shape, axes, last = values.shape, weight.axes, values.ndim - 1
    front = tuple(range(last - 1))

    yield Layout(values, (last, *front, last - 1), 1, *(_flat([axes[a]], [shape[a]]) for a in (last, last - 1)))
    if last < 2:
        return
    yield Layout(values, (last - 1, *front, last), 1, *(_flat([axes[a]], [shape[a]]) for a in (last - 1, last)))
    made = _flat(axes[-2:], shape[-2:])
    yield Layout(values, (last - 1, last, *front), 2, made, made[:0], True)
    for split in range(1, last + 1):  # attention: several axes come in or go out at once
        outs, ins = tuple(range(split, last + 1)), tuple(range(split))
        made, read = (_flat([axes[a] for a in part], [shape[a] for a in part]) for part in (outs, ins))
        yield Layout(values, (*outs, *ins), len(outs), made, read)


def _flat(axes, shape) -> Ids:
    """The ids on several axes laid out one after the other; 0 where there are none, or on more than one axis."""
    labelled = [a for a, ids in enumerate(axes) if ids is not None]
    if len(labelled) != 1:
        return np.zeros(math.prod(shape), int)
    view = np.asarray(axes[labelled[0]]).reshape([-1 if a == labelled[0] else 1 for a in range(len(shape))])
    return np.broadcast_to(view, shape).ravel()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of the rows of two matrices, of those that are not zero: a norm that was folded in scales rows."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    there = lengths > 1e-30
    if not there.any():
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.mean(np.abs((a[there] * b[there]).sum(1)) / lengths[there]))
