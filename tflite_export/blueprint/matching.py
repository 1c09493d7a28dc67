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
        operator: in whose order of axes it is, DEPTHWISE_CONV_2D's or TRANSPOSE_CONV's; "": that of all others.
    """

    values: np.ndarray
    order: tuple[int, ...]
    split: int
    made: Ids
    read: Ids
    operator: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        rows = math.prod(self.values.shape[a] for a in self.order[: self.split])
        return rows, self.values.size // rows

    @property
    def ids(self) -> Ids:
        return np.append(self.made, self.read)

    def matrix(self) -> np.ndarray:
        return self.values.transpose(self.order).reshape(self.shape)

    def accepts(self, came: Ids | None) -> bool:
        """Whether what comes in is what it reads, as far as that is known."""
        read = self.made if self.operator == "DEPTHWISE_CONV_2D" else self.read
        if came is None or len(came) != len(read):
            return True
        return bool(((came == read) | (came == 0) & came.any()).all())


class Weights:
    """The model's kernels, to be recognised in a file."""

    def __init__(self, channels):
        found = [w for w in channels.weights if ("kernel" in w.name or "embeddings" in w.name) and len(w.axes) > 1]
        self.layouts = [layout for weight in found for layout in _layouts(weight)]
        biases = [w for w in channels.weights if "bias" in w.name and len(w.axes) == 1]
        self.biases = [np.asarray(weight.variable, np.float32) for weight in biases]

    def find(self, numbers: np.ndarray, name: str, came: Ids | None) -> tuple[Ids, Ids] | None:
        """(ids made, ids read) of the weight with these numbers; None if there is none, or if equals disagree.

        Args:
            numbers: the kernel in the file.
            name: of the operator.
            came: ids that the operator's input carries; None where they are not known.
        """
        filters = np.moveaxis(numbers, -1, 0) if name in ("DEPTHWISE_CONV_2D", "CONV_3D", "GATHER") else numbers
        filters = filters.reshape(len(filters), -1)
        width = None if name in ("DEPTHWISE_CONV_2D", "GATHER") else numbers.shape[3 if name == "CONV_3D" else -1]
        own = name if name in ("DEPTHWISE_CONV_2D", "TRANSPOSE_CONV") else ""
        found: list[tuple[tuple, Layout]] = []
        for layout in self.layouts:
            if layout.shape == filters.shape and layout.operator == own and width in (None, len(layout.read)):
                score = _cosine(layout.matrix(), filters)
                if score >= MATCH:
                    found.append(((round(score, 3), layout.accepts(came)), layout))
        best = [layout for key, layout in found if key == max(key for key, _ in found)]
        if not best or any(not np.array_equal(best[0].ids, other.ids) for other in best):
            return None
        return best[0].made, best[0].read

    def has_bias(self, numbers: np.ndarray) -> bool:
        """Whether these are the model's numbers, and not what the converter made of them and of others."""
        near = 0.01 * float(np.abs(numbers).max(initial=0.0))
        known = [bias for bias in self.biases if bias.shape == numbers.shape]
        return near == 0 or any(np.abs(bias - numbers).max() <= near for bias in known)


def _layouts(weight) -> Iterator[Layout]:
    values = np.asarray(weight.variable, np.float32)
    shape, axes, last = values.shape, weight.axes, values.ndim - 1
    front = tuple(range(last - 1))

    def flat(part) -> Ids | None:
        return _flat([axes[a] for a in part], [shape[a] for a in part])

    ways = [((last,), (*front, last - 1), flat([last]), flat([last - 1]), "")]
    if last > 1:
        ways.append(((last - 1,), (*front, last), flat([last - 1]), flat([last]), "TRANSPOSE_CONV"))
        ways.append(((last - 1, last), front, flat([last - 1, last]), np.zeros(0, int), "DEPTHWISE_CONV_2D"))
    for split in range(1, last + 1):  # attention: several axes come in or go out at once
        outs, ins = tuple(range(split, last + 1)), tuple(range(split))
        ways.append((outs, ins, flat(outs), flat(ins), ""))
    for outs, ins, made, read, operator in ways:
        if made is not None and read is not None:
            yield Layout(values, (*outs, *ins), len(outs), made, read, operator)


def _flat(axes, shape) -> Ids | None:
    """The ids on several axes laid out one after the other; None where more than one of them has ids."""
    labelled = [a for a, ids in enumerate(axes) if ids is not None]
    if len(labelled) > 1:
        return None
    view = np.zeros(1, int) if not labelled else np.asarray(axes[labelled[0]])
    return np.broadcast_to(view.reshape([-1 if [a] == labelled else 1 for a in range(len(shape))]), shape).ravel()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of the rows of two matrices, of those that are not zero: a norm that was folded in scales rows."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    there = lengths > 1e-30
    if not there.any():
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.mean(np.abs((a[there] * b[there]).sum(1)) / lengths[there]))


def fits(name: str, came: Ids, made: Ids, read: Ids) -> bool:
    """Whether a kernel that makes and reads these units computes on what comes in."""
    if name == "DEPTHWISE_CONV_2D":
        by_channel = made.reshape(len(came), -1)
        is_free = not came.any() and bool((np.sort(by_channel, 1) == np.sort(by_channel[0])).all())
        return is_free or bool((by_channel == came[:, None]).all())
    if len(came) == len(read):
        return np.array_equal(came, read)
    if not came.any() and not read.any() and not made.any():
        return True
    if len(came) % len(read) or len(made) % (len(came) // len(read)):
        return False
    ins, outs = (ids.reshape(len(came) // len(read), -1) for ids in (came, made))  # one row for each group
    if (ins == read).all():  # the same channels of every group leave
        return bool((np.sort(outs, 1) == np.sort(outs[0])).all())
    return not read.any() and bool((ins == outs[:, :1]).all() and (outs == outs[:, :1]).all())  # whole groups leave
