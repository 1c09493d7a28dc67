"""What the walk finds: labelled weights, and groups of units with the same members."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_prune.rules import Ids


@dataclass(frozen=True)
class Weight:
    """One labelled weight.

    Attributes:
        variable: the Keras variable.
        layer: the layer it belongs to; `name` its attribute path there.
        axes: per axis the 1-D ids, or None.
        reads: per axis whether the layer reads these units (its input) rather than making them.
    """

    variable: keras.Variable
    layer: keras.layers.Layer
    name: str
    axes: tuple[Ids | None, ...]
    reads: tuple[bool, ...]

    @property
    def labelled(self) -> list[int]:
        """Axes that carry units."""
        return [a for a, ids in enumerate(self.axes) if ids is not None]

    @property
    def takes(self) -> list[int]:
        """Axes on which units come in: those it reads; of a recurrent kernel, which makes and reads the same, both."""
        return [a for a in self.labelled if self.reads[a]] or (self.labelled if len(self.labelled) > 1 else [])

    @property
    def is_kernel(self) -> bool:
        return "kernel" in self.name and len(self.axes) >= 2

    @property
    def is_statistic(self) -> bool:
        """Running statistics follow the data; they carry no message."""
        return self.name.split(".")[-1].startswith(("moving_", "adapt_"))


@dataclass(frozen=True)
class Member:
    """An axis of a weight on which a group's units appear, `slices` times each."""

    weight: Weight
    axis: int
    slices: int

    @property
    def reads(self) -> bool:
        return self.weight.reads[self.axis]


@dataclass(frozen=True)
class Group:
    """Units with the same members: they compete with each other.

    Attributes:
        index: its place in `Channels.groups`.
        units: ids, shape (units,).
        members: where they appear.
    """

    index: int
    units: Ids
    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.units)

    @property
    def producers(self) -> list[Member]:
        """Kernel axes that make the units; where there is none, all members that make them."""
        makers = [m for m in self.members if not m.reads and not m.weight.is_statistic]
        kernels = [m for m in makers if m.weight.is_kernel]
        return kernels or makers

    @property
    def slices(self) -> int:
        """Channels per unit where they are made: what a width grid has to be divided by."""
        return min((m.slices for m in self.producers), default=1)

    @property
    def name(self) -> str:
        """The layers that make the units, at most three of them in words."""
        names = list(dict.fromkeys(m.weight.layer.name for m in self.producers)) or ["(constant channels)"]
        return ", ".join(names[:3]) + (f" +{len(names) - 3}" if len(names) > 3 else "")


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of one call: `factor` x the product of what survives on each axis.

    Attributes:
        axes, sizes: ids and length of each axis of the kernel, or of each factor of a product without one.
        factor: how often each entry is used per sample.
        kernel: the variable; None for a product of two activations.
    """

    axes: tuple[Ids | None, ...]
    sizes: tuple[int, ...]
    factor: int
    kernel: keras.Variable | None = None


@dataclass(frozen=True)
class Tensor:
    """One output of one call: ids, known shape without the batch, and when it is made and last used."""

    ids: Ids
    shape: tuple[int, ...]
    made: int
    last_used: int
