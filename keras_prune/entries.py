"""Single entries of kernels: which kernels there are, in what order their entries leave, and which have left."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

import keras
import numpy as np

from keras_prune.channels import Channels, Weight
from keras_prune.planning import named_layers

KINDS = ("magnitude", "random")


class Entries:
    """The entries of a model's kernels: in what order they leave, and which have left.

    Attributes:
        kernels: {name: variable}, in the order of the network.
        gone: {name: which entries have left, flat}.
    """

    def __init__(self, channels: Channels, kind: str = "magnitude", protect: Sequence = (), seed: int | None = None):
        self.kind = kind
        rng = np.random.default_rng(seed)
        self.kernels = kernels_of(channels, protect)
        self.gone = {}
        self._draws = {}
        for name, variable in self.kernels.items():
            zero = keras.ops.convert_to_numpy(variable).ravel() == 0
            self.gone[name] = zero & ~zero.all()
            if kind == "random":
                self._draws[name] = rng.random(zero.size)

    def scores(self, name: str) -> np.ndarray:
        """Who leaves last, flat: |w| or random numbers; -1 for what is gone."""
        scores = self._draws.get(name)
        if scores is None:
            scores = np.abs(keras.ops.convert_to_numpy(self.kernels[name]).ravel().astype(np.float32))
        return np.where(self.gone[name], -1.0, scores)

    def order(self, name: str) -> np.ndarray:
        """Entries in the order in which they leave; those that are gone first."""
        return np.argsort(self.scores(name), kind="stable")

    def remove(self, sparsity: float, together: bool) -> None:
        """Let floor(sparsity * n) entries be gone, of every kernel or of all of them together."""
        for name, leaves in lowest({name: self.scores(name) for name in self.kernels}, sparsity, together).items():
            self.gone[name] |= leaves

    def masks(self) -> list[tuple[keras.Variable, np.ndarray]]:
        return [(v, ~self.gone[name].reshape(tuple(v.shape))) for name, v in self.kernels.items()]

    def fractions(self) -> dict[str, float]:
        return {name: float(gone.mean()) for name, gone in self.gone.items()}

    def some_gone(self) -> bool:
        return any(gone.any() for gone in self.gone.values())


def lowest(scores: dict[str, np.ndarray], sparsity: float, together: bool) -> dict[str, np.ndarray]:
    """{kernel: which entries leave}: the floor(sparsity * n) of the lowest scores, of each kernel or of all."""
    if not together:
        return {name: leaves for name, s in scores.items() for leaves in lowest_of([s], sparsity)}
    found = dict(zip(scores, lowest_of(list(scores.values()), sparsity)))
    empty = [name for name, leaves in found.items() if leaves.all()]
    if empty:
        warnings.warn(
            f"budget='global' leaves nothing of the kernel of {', '.join(empty[:5])}: what it makes no longer "
            "depends on the input. Ask for less, protect these layers, or use budget='uniform'.",
            stacklevel=3,
        )
    return found


def lowest_of(scores: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """The same, boolean, shaped like the scores; of equal scores the first ones leave."""
    leaves = np.zeros(sum(s.size for s in scores), bool)
    leaves[np.argsort(np.concatenate(scores), kind="stable")[: count_of(sparsity, leaves.size)]] = True
    return np.split(leaves, np.cumsum([s.size for s in scores])[:-1])


def count_of(fraction: float, n: int) -> int:
    """floor(fraction * n) of decimal numbers: 0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996."""
    return math.floor(fraction * n * (1 + 1e-12))


def kernels_of(channels: Channels, protect: Sequence = ()) -> dict[str, keras.Variable]:
    """{name: kernel} of all kernels that can be pruned, in the order of the network.

    The name is the layer's, with the kernel's own behind it where a layer has several.

    Raises:
        TypeError, ValueError: `protect` fits no layer, or leaves nothing to prune.

    Warns:
        Layers with kernels but without a rule.
    """
    safe = named_layers(channels, protect)
    found = [w for w in channels.weights if w.is_kernel]
    known = {id(w.variable) for w in found}
    unknown = [v.path for v in channels.model.trainable_variables if "kernel" in v.name and id(v) not in known]
    if unknown:
        warnings.warn(f"Left out, their layers have no rule: {', '.join(unknown[:5])}.", stacklevel=4)
    free = [w for w in found if not {id(w.layer), id(owner_of(w))} & safe]
    if not free:
        raise ValueError(f"{channels.model.name} has no kernel to prune with protect={protect!r}.")
    per_layer = Counter(w.layer.name for w in free)
    kernels = {}
    for weight in free:
        name = weight.layer.name if per_layer[weight.layer.name] == 1 else f"{weight.layer.name}.{weight.name}"
        kernels[weight.variable.path if name in kernels else name] = weight.variable
    return kernels


def owner_of(weight: Weight) -> keras.layers.Layer:
    """The layer that holds the variable: the one inside a wrapper, or inside an attention."""
    path = weight.name.rpartition(".")[0]
    return attrgetter(path)(weight.layer) if path else weight.layer
