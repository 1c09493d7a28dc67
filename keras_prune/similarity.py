"""How alike two sets of pruned weights are, what structure they make by themselves, and what weights turned into.

[Paganini & Forde: On Iterative Neural Network Pruning, Reinitialization, and the Similarity of Masks, arXiv:2001.05050]
Numpy alone; `keras_prune.kept_masks(model)` and `kernel_values(model)` give what these functions take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

Masks = Mapping[str, np.ndarray]

SAME_DENSITY = 0.001
"""Densities that are nearer than this count as equal: kernels are rounded to whole entries."""


@dataclass(frozen=True)
class MaskSimilarity:
    """How far two masks agree. All numbers lie in [0, 1].

    Attributes:
        kept: Jaccard similarity of what is kept, |A and B| / |A or B|.
        distance: 1 - kept.
        chance: what `kept` is expected to be of two masks drawn independently with these densities, layer by layer; of
            one layer of density p on both sides p / (2 - p).
        pruned: Jaccard similarity of what is pruned.
        hamming: fraction of the entries on which the masks differ.
        density: fraction kept, of both together.
        layers: the same for each layer.
    """

    kept: float
    distance: float
    chance: float
    pruned: float
    hamming: float
    density: float
    layers: dict[str, MaskSimilarity] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        rows = [*self.layers.items(), ("all", self)]
        wide = max(len(name) for name, _ in rows)
        lines = [f"{'':<{wide}}  kept in both  by chance  density"]
        lines += [f"{name:<{wide}}  {s.kept:12.4f}  {s.chance:9.4f}  {s.density:7.2%}" for name, s in rows]
        return "\n".join(lines)


def mask_similarity(a: Masks | np.ndarray, b: Masks | np.ndarray) -> MaskSimilarity:
    """Compare two masks of one network at equal density.

    Masks of networks that began with different weights cannot be compared: their units are in another order.

    Args:
        a, b: {layer: True = kept, of the kernel's shape}, or one array; `keras_prune.kept_masks(model)`.

    Raises:
        ValueError: other layers or shapes, nothing kept, or other densities: then the sets could not be equal, and the
            similarity would say more about their sizes than about their choice.

    >>> found = mask_similarity(np.array([1, 1, 0, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0, 1, 0]))
    >>> found.kept, round(found.chance, 4), found.hamming
    (0.6, 0.3333, 0.25)
    """
    a, b = _named(a), _named(b)
    if a.keys() != b.keys():
        raise ValueError(
            f"The masks are of other layers: {', '.join(sorted(set(a) ^ set(b))[:5])} in one of them only."
        )
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"The masks of {name} have shapes {a[name].shape} and {b[name].shape}; expected the same.")
    total = sum(mask.size for mask in a.values())
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in (a, b)]
    if not all(kept):
        raise ValueError("A mask keeps nothing: there is nothing to compare.")
    if abs(kept[0] - kept[1]) > SAME_DENSITY * total:
        raise ValueError(
            f"The masks keep {kept[0] / total:.2%} and {kept[1] / total:.2%} of {total:,} entries; they can only be "
            "compared at equal density. Take the same round of both, or prune both to the same sparsity."
        )
    layers = {name: _compared([a[name]], [b[name]]) for name in a} if len(a) > 1 else {}
    whole = _compared(list(a.values()), list(b.values()))
    return MaskSimilarity(**{**vars(whole), "layers": layers})


def _named(masks: Masks | np.ndarray) -> dict[str, np.ndarray]:
    named = masks if isinstance(masks, Mapping) else {"mask": masks}
    return {name: np.asarray(mask) != 0 for name, mask in named.items()}


def _compared(a: list[np.ndarray], b: list[np.ndarray]) -> MaskSimilarity:
    both = sum(int((x & y).sum()) for x, y in zip(a, b))
    either = sum(int((x | y).sum()) for x, y in zip(a, b))
    total = sum(x.size for x in a)
    by_chance = sum(x.mean() * y.mean() * x.size for x, y in zip(a, b))  # expected in both, layer by layer
    each = sum(int(x.sum()) + int(y.sum()) for x, y in zip(a, b))
    kept = both / either if either else 1.0  # nothing of this layer, in both of them
    return MaskSimilarity(
        kept=kept,
        distance=1 - kept,
        chance=float(by_chance / (each - by_chance)) if each else 1.0,
        pruned=(total - either) / (total - both) if both < total else 1.0,
        hamming=(either - both) / total,
        density=each / (2 * total),
    )


@dataclass(frozen=True)
class LayerStructure:
    """Whole units of which a mask of single weights leaves nothing.

    Attributes:
        outputs, inputs: how many units the kernel makes and reads.
        zero_outputs, zero_inputs: of how many of them nothing is kept.
        chance_outputs, chance_inputs: how many that would be on average if as many entries were kept at random.
        density: fraction kept.
    """

    outputs: int
    inputs: int
    zero_outputs: int
    zero_inputs: int
    chance_outputs: float
    chance_inputs: float
    density: float


@dataclass(frozen=True)
class StructureReport:
    """`LayerStructure` of each layer; prints itself."""

    layers: dict[str, LayerStructure]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        wide = max(map(len, self.layers), default=0)
        lines = [f"{'':<{wide}}  density   outputs zero (by chance)    inputs zero (by chance)"]
        for name, s in self.layers.items():
            made = f"{s.zero_outputs} of {s.outputs} ({s.chance_outputs:.2f})"
            read = f"{s.zero_inputs} of {s.inputs} ({s.chance_inputs:.2f})"
            lines.append(f"{name:<{wide}}  {s.density:7.2%}  {made:>25}  {read:>25}")
        return "\n".join(lines)


def structure_report(masks: Masks) -> StructureReport:
    """How many whole units a mask of single weights has removed, and how many chance would have.

    Args:
        masks: {layer: True = kept, of the kernel's shape, inputs on the last axis but one and outputs on the last}: the
            layout of Dense and convolution kernels. Of a depthwise kernel the two axes together are the channels.

    Raises:
        ValueError: a mask with less than two axes.

    >>> print(structure_report({"dense": np.array([[1, 0, 1], [1, 0, 0]])}).layers["dense"].zero_outputs)
    1
    """
    found = {}
    for name, mask in _named(masks).items():
        if mask.ndim < 2:
            raise ValueError(f"The mask of {name} has shape {mask.shape}; expected that of a kernel: (..., in, out).")
        kept, size = int(mask.sum()), mask.size
        lines = {"outputs": mask.any(axis=tuple(range(mask.ndim - 1)))}
        lines["inputs"] = mask.any(axis=(*range(mask.ndim - 2), mask.ndim - 1))
        counts = {key: line.size for key, line in lines.items()}
        counts |= {f"zero_{key}": int((~line).sum()) for key, line in lines.items()}
        counts |= {f"chance_{k}": v.size * _chance_of_none(size, size // v.size, kept) for k, v in lines.items()}
        found[name] = LayerStructure(**counts, density=kept / size)
    return StructureReport(found)


def _chance_of_none(size: int, part: int, kept: int) -> float:
    """That none of `kept` entries out of `size`, drawn without replacement, lies in a given `part`."""
    if kept > size - part:
        return 0.0
    ways = [math.lgamma(n + 1) for n in (size - part, size - kept, size - part - kept, size)]
    return math.exp(ways[0] + ways[1] - ways[2] - ways[3])


@dataclass(frozen=True)
class Stability:
    """What became of the kept weights of a layer.

    Attributes:
        cosine: between what they were and what they are, in [-1, 1]; nan where either is all zero.
        same_sign: fraction that have the sign they had; half of them would by chance.
        growth: their norm ÷ what it was.
    """

    cosine: float
    same_sign: float
    growth: float


def weight_stability(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, Stability]:
    """{layer: Stability} of the weights that are not zero in `after`, and of "all" of them together.

    Args:
        before, after: {layer: kernel}, of one network at two times: `keras_prune.kernel_values(model)`.

    Raises:
        ValueError: other layers or shapes.
    """
    if {k: np.shape(v) for k, v in before.items()} != {k: np.shape(v) for k, v in after.items()}:
        raise ValueError("before and after hold other layers, or kernels of other shapes; expected one network twice.")
    pairs = {}
    for name, value in after.items():
        kept = np.asarray(value).ravel() != 0
        pairs[name] = [np.asarray(v, np.float64).ravel()[kept] for v in (before[name], value)]
    pairs["all"] = [np.concatenate([pair[n] for pair in pairs.values()]) for n in (0, 1)]
    return {name: _stability(*pair) for name, pair in pairs.items()}


def _stability(was: np.ndarray, now: np.ndarray) -> Stability:
    norms = float(np.linalg.norm(was)), float(np.linalg.norm(now))
    return Stability(
        cosine=float(was @ now) / (norms[0] * norms[1]) if all(norms) else math.nan,
        same_sign=float((np.sign(was) == np.sign(now)).mean()) if was.size else math.nan,
        growth=norms[1] / norms[0] if norms[0] else math.nan,
    )
