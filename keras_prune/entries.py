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
from keras_prune.entry_scores import MEASURED, PER_NEURON, lamp, links_of_neurons, measurable, measured, taken
from keras_prune.planning import named_layers

KINDS = ("magnitude", "random", "lamp", *MEASURED)
"""In which order entries leave."""


class Entries:
    """The entries of a model's kernels: in what order they leave, and which have left.

    Args:
        channels: labels of the model.
        kind: one of `KINDS`.
        protect: layers, names or name patterns whose kernels stay whole.
        seed: for "random".
        data: for the kinds that measure, see `entry_scores`.

    Attributes:
        kernels: {name: variable}, in the order of the network.
        gone: {name: which entries have left, flat}.

    Warns:
        Kernels that the kind cannot measure; they stay whole.
    """

    def __init__(
        self, channels: Channels, kind: str = "magnitude", protect: Sequence = (), seed: int | None = None, data=None
    ):
        self.kind, self._channels = kind, channels
        rng = np.random.default_rng(seed)
        self.kernels = kernels_of(channels, protect)
        self._given: dict[str, np.ndarray] = {}  # scores that are not those of the weights as they are now
        if kind in MEASURED:
            self._data = taken(kind, channels, data)
            self.kernels = _measurable(kind, channels, self.kernels)
        places = links_of_neurons(channels) if kind in PER_NEURON else {}
        self._neurons = {name: places.get(id(variable)) for name, variable in self.kernels.items()}
        self.gone = {}
        for name, variable in self.kernels.items():
            zero = keras.ops.convert_to_numpy(variable).ravel() == 0
            self.gone[name] = zero & ~zero.all()
            if kind == "random":
                self._given[name] = rng.random(zero.size)

    def scores(self, name: str) -> np.ndarray:
        """Who leaves last, flat: higher = later; -1 for what is gone, inf for what never leaves."""
        scores, gone = self._given.get(name), self.gone[name]
        if scores is None:
            values = keras.ops.convert_to_numpy(self.kernels[name]).ravel().astype(np.float32)
            scores = lamp(values) if self.kind == "lamp" else np.abs(values)
        scores = np.where(gone, -1.0, scores)
        if self.kind == "links":
            places = self._neurons[name]
            largest = places[np.arange(len(places)), scores[places].argmax(axis=1)]
            scores[largest[~gone[largest]]] = np.inf
        return scores

    def order(self, name: str) -> np.ndarray:
        """Entries in the order in which they leave; those that are gone first."""
        return np.argsort(self.scores(name), kind="stable")

    def remove(self, sparsity: float, budget: str = "uniform") -> None:
        """Let floor(sparsity * n) entries be gone: "uniform", of every kernel; "global" and "erk", of all together.

        Warns:
            kind="links": so many cannot leave, as the largest link of every neuron stays.
        """
        if self.kind in MEASURED:
            if self._are_gone(sparsity, budget):
                return
            self._measure()
        scores = {name: self.scores(name) for name in self.kernels}
        if budget == "erk":
            kept = erk([tuple(v.shape) for v in self.kernels.values()], 1 - sparsity)
            scores = {name: _ranks(s, (1 - share) * s.size) for (name, s), share in zip(scores.items(), kept)}
        for name, leaves in lowest(scores, sparsity, together=budget != "uniform").items():
            self.gone[name] |= leaves
        if self.kind == "links" and not self._are_gone(sparsity, budget):
            warnings.warn(
                f"kind='links' keeps the largest link of every neuron, so that a sparsity of {sparsity:.4g} is not "
                f"reached in {', '.join(name for name, gone in self.gone.items() if gone.mean() < sparsity)}. Ask for "
                "less, or use budget='global'.",
                stacklevel=3,
            )

    def remove_share(self, share: float) -> None:
        """Let the entries of the lowest scores of each neuron be gone, as many as have no more than `share` together.

        The largest of each neuron stays.
        """
        self._measure()
        for name, places in self._neurons.items():
            scores = np.where(self.gone[name], -1.0, self._given[name])[places]
            order = np.argsort(scores, axis=1, kind="stable")
            removed = np.cumsum(np.take_along_axis(np.maximum(scores, 0), order, axis=1), axis=1)
            leaves = removed <= share * (1 + 1e-12)
            leaves[:, -1] = False
            self.gone[name][np.take_along_axis(places, order, axis=1)[leaves]] = True

    def masks(self) -> list[tuple[keras.Variable, np.ndarray]]:
        return [(v, ~self.gone[name].reshape(tuple(v.shape))) for name, v in self.kernels.items()]

    def fractions(self) -> dict[str, float]:
        return {name: float(gone.mean()) for name, gone in self.gone.items()}

    def some_gone(self) -> bool:
        return any(gone.any() for gone in self.gone.values())

    def _measure(self) -> None:
        """Score all entries on the data, with the weights as they are now."""
        found = measured(self.kind, self._channels, self._data)
        self._given = {name: found[id(variable)].ravel() for name, variable in self.kernels.items()}

    def _are_gone(self, sparsity: float, budget: str) -> bool:
        """Whether as many are gone as asked: nothing has to be measured for that."""
        gone = list(self.gone.values())
        if budget != "uniform":
            gone = [np.concatenate(gone)]
        return all(g.sum() >= count_of(sparsity, g.size) for g in gone)


def lowest(scores: dict[str, np.ndarray], sparsity: float, together: bool) -> dict[str, np.ndarray]:
    """{kernel: which entries leave}: the floor(sparsity * n) of the lowest scores, of each kernel or of all."""
    if not together:
        return {name: leaves for name, s in scores.items() for leaves in lowest_of([s], sparsity)}
    found = dict(zip(scores, lowest_of(list(scores.values()), sparsity)))
    empty = [name for name, leaves in found.items() if leaves.all()]
    if empty:
        warnings.warn(
            f"A sparsity of {sparsity:.4g} of all kernels together leaves nothing of the kernel of "
            f"{', '.join(empty[:5])}: what it makes no longer depends on the input. Ask for less, protect these "
            "layers, or use budget='uniform'.",
            stacklevel=3,
        )
    return found


def lowest_of(scores: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """The same, boolean, shaped like the scores; of equal scores the first ones leave, infinite ones never."""
    together = np.concatenate(scores)
    leaves = np.zeros(together.size, bool)
    leaves[np.argsort(together, kind="stable")[: count_of(sparsity, leaves.size)]] = True
    leaves &= together < np.inf
    return np.split(leaves, np.cumsum([s.size for s in scores])[:-1])


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Which fraction of each kernel stays: in proportion to (sum of its lengths) / (product of its lengths).

    For a convolution (cin + cout + kh + kw) / (cin cout kh kw): kernels with many entries give up most. Kernels that
    would keep more than all stay whole, and the others give up the more.

    Args:
        shapes: of the kernels.
        density: of all their entries together, in (0, 1].

    Source:
        Erdos-Renyi-Kernel [Evci et al., RigL, ICML 2020, arXiv:1911.11134], after the Erdos-Renyi densities of
        [Mocanu et al., SET, Nature Communications 2018, arXiv:1707.04780] for matrices. Kernels of other ranks, such as
        those of attention, go by the same formula; that is ours.

    >>> [round(d, 4) for d in erk([(3, 3, 3, 64), (3, 3, 64, 128), (3, 3, 128, 256), (1, 1, 256, 10)], 0.1)]
    [1.0, 0.1507, 0.0742, 1.0]
    """
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    raw = np.array([sum(shape) for shape in shapes]) / sizes
    whole = np.zeros(len(sizes), bool)
    while not whole.all():
        scale = (density * sizes.sum() - sizes[whole].sum()) / (raw * sizes)[~whole].sum()
        too_much = ~whole & (scale * raw > 1)
        if not too_much.any():
            return np.where(whole, 1.0, scale * raw).tolist()
        whole |= too_much
    return [1.0] * len(sizes)


def _ranks(scores: np.ndarray, leaving: float) -> np.ndarray:
    """Scores of which the lowest of all kernels together are about the `leaving` lowest of this one: rank - leaving."""
    ranks = np.empty(scores.size)
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, scores.size + 1)
    return np.select([scores < 0, scores == np.inf], [-np.inf, np.inf], ranks - leaving)  # gone, never leaves


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


def _measurable(kind: str, channels: Channels, kernels: dict[str, keras.Variable]) -> dict[str, keras.Variable]:
    known = measurable(kind, channels)
    unknown = [name for name, variable in kernels.items() if id(variable) not in known]
    why = "they are not trained" if kind == "snip" else "their layers are not seen as matrices"
    if len(unknown) == len(kernels):
        raise ValueError(f"kind={kind!r} cannot score any kernel of {channels.model.name}: {why}. Use another kind.")
    if unknown:
        warnings.warn(f"kind={kind!r} leaves whole, as {why}: {', '.join(unknown[:5])}.", stacklevel=4)
    return {name: variable for name, variable in kernels.items() if id(variable) in known}


def owner_of(weight: Weight) -> keras.layers.Layer:
    """The layer that holds the variable: the one inside a wrapper, or inside an attention."""
    path = weight.name.rpartition(".")[0]
    return attrgetter(path)(weight.layer) if path else weight.layer
