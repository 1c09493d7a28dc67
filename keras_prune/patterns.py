"""Patterns inside kernels: so many taps of every slice, whole slices, so many of m neighbours; fixed after an era.

[Gamboa, Kudrolli, Dhoot, Pedram: Campfire: Compressible, Regularization-Free, Structured Sparse Training for Hardware
Accelerators, arXiv:2001.03253] Full text and code were not at hand: the definitions here are a reconstruction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import keras
import numpy as np

from keras_prune import criteria
from keras_prune.entries import Entries, owner_of
from keras_prune.pruners import GradualPruning
from keras_prune.surgery import check_finite

PATTERNS = ("window", "ck", "combined")
SCOPES = ("layer", "filter", "channel")


def window(sizes: np.ndarray, keep: int) -> np.ndarray:
    """Which taps stay: the `keep` largest of every slice; of equal ones the first.

    Args:
        sizes: |w|, shape (taps, channels, filters).

    >>> kernel = np.array([0.9, 0.1, 0.05, 0.4, 0.8, 0.3, 0.02, 0.6, 0.2]).reshape(9, 1, 1)
    >>> window(kernel, 3).astype(int).reshape(3, 3).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    """
    return _largest(sizes.reshape(len(sizes), -1).T, keep).T.reshape(sizes.shape)


def ck(
    sizes: np.ndarray, density: float, criterion: str | criteria.Criterion = "linf", scope: str = "layer"
) -> np.ndarray:
    """Which slices (one channel of one filter) stay: ceil(density * their number) of the highest scores.

    Args:
        sizes: |w|, shape (taps, channels, filters); -1 for what is gone.
        density: the fraction of slices that stay, above 0.
        criterion: scores of slices, (slices, taps) -> (slices,).
        scope: of the whole "layer", or as many of each "filter" or of each "channel".

    >>> largest = np.array([[1.73, 1.43], [2.07, 1.65], [1.54, 2.35], [1.94, 2.06]])[None]
    >>> ck(largest, 0.5).astype(int)[0].tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    taps, channels, filters = sizes.shape
    is_gone = (sizes < 0).all(axis=0)
    scores = criteria.get(criterion)(np.maximum(sizes, 0).reshape(taps, -1).T).reshape(channels, filters)
    scores = np.where(is_gone, -np.inf, scores)
    rows = {"layer": scores.reshape(1, -1), "filter": scores.T, "channel": scores}[scope]
    kept = _largest(rows, math.ceil(density * rows.shape[1] - 1e-9))
    kept = {"layer": kept.reshape(channels, filters), "filter": kept.T, "channel": kept}[scope]
    return np.broadcast_to(kept, sizes.shape)


def neighbours(sizes: np.ndarray, keep: int, of: int) -> np.ndarray:
    """Which weights stay: the `keep` largest of every `of` successive channels, at each tap of each filter.

    Args:
        sizes: |w|, shape (taps, channels, filters); channels a multiple of `of`.

    >>> sizes = np.array([3.0, 1.0, 2.0, 0.0, 5.0, 6.0, 7.0, 8.0]).reshape(1, 8, 1)
    >>> neighbours(sizes, 2, 4).astype(int).ravel().tolist()
    [1, 0, 1, 0, 0, 0, 1, 1]
    """
    taps, channels, filters = sizes.shape
    blocks = np.moveaxis(sizes.reshape(taps, channels // of, of, filters), 2, -1)
    kept = _largest(blocks.reshape(-1, of), keep).reshape(blocks.shape)
    return np.moveaxis(kept, -1, 2).reshape(sizes.shape)


def _largest(rows: np.ndarray, keep: int) -> np.ndarray:
    """Where the `keep` largest of each row are, boolean; of equal ones the first."""
    kept = np.zeros(rows.shape, bool)
    np.put_along_axis(kept, np.argsort(-rows, axis=1, kind="stable")[:, :keep], True, axis=1)
    return kept


class PatternPruning(GradualPruning):
    """Sets entries of kernels to zero in a regular pattern, more and more within an era of epochs; then it is fixed.

    Sparsity rises from 0 at `begin` to its end at `stop` along the cubic ramp of Zhu & Gupta 2017; at each step the
    pattern is chosen anew among the weights that are left. What is zero stays zero, and from `stop` on the masks do not
    change.

    Args:
        sparsity: the final sparsity of every kernel that is pruned, in [0, 1). Leave it out with a pattern like "2:4".
        pattern: "window": the same number of taps of every slice (one channel of one filter of a convolution), the
            largest |w|: the nearest whole number, 1 at least, so a 3 x 3 kernel offers ninths only. "ck": whole slices
            out of the channels x filters plane, the ceiling of their number. "combined": both; their densities
            multiply. "n:m", such as "2:4": n of every m successive input channels.
        scope: of "ck" and "combined": slices compete within the "layer", each "filter", or each "channel" (the same
            number everywhere).
        criterion: scores of slices: "linf" (the largest |w|), "l1", "l2", or a function (slices, taps) -> (slices,).
        begin, stop: the era; default: the first 60 % of the training.
        power: 3 is the cubic ramp, 1 a straight line.
        every, unit: choose anew each `every` steps; a step is an "epoch" or a "batch".
        protect: layers, names, or name patterns whose kernels stay whole; often the first convolution.

    Attributes:
        fractions: {layer: fraction of its kernel that is held at zero}, of the kernels that have the pattern.
        whole: names of kernels that cannot have it: not a convolution (for "n:m" nor a Dense layer), a single tap for
            "window", channels that are no multiple of m.

    Logs:
        `weight_sparsity`: the fraction that is zero of the kernels that have the pattern.

    Such zeros make a file smaller (`keras_prune.save_compact`), not a network faster, unless the hardware knows the
    pattern. Biases and normalisations stay whole.

    [Gamboa et al., arXiv:2001.03253, reconstructed: patterns, ramp and rounding are not checked against the paper]

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[PatternPruning(0.7, pattern="window")])     # doctest: +SKIP
        >>> model.fit(x, y, epochs=20, callbacks=[PatternPruning(pattern="2:4")])             # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        pattern: str = "window",
        scope: str = "layer",
        criterion: str | criteria.Criterion = "linf",
        begin: int = 0,
        stop: int | None = None,
        power: float = 3,
        every: int = 1,
        unit: str = "epoch",
        protect: Sequence = (),
    ):
        self.block = _block(pattern)
        if self.block and sparsity is not None:
            raise ValueError(f"pattern={pattern!r} has its sparsity in itself; leave out sparsity={sparsity}.")
        sparsity = 1 - self.block[0] / self.block[1] if self.block else 0.7 if sparsity is None else sparsity
        super().__init__(
            sparsity, begin=begin, stop=stop, power=power, every=every, unit=unit, criterion=criterion, protect=protect
        )
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} was passed to PatternPruning; known: {', '.join(map(repr, SCOPES))}.")
        if not callable(criterion) and criterion not in ("linf", "l1", "l2"):
            raise ValueError(f"criterion={criterion!r} was passed to PatternPruning; known: 'l1', 'l2', 'linf'.")
        self.pattern, self.scope, self.criterion = pattern, scope, criterion
        self.fractions: dict[str, float] = {}
        self.whole: tuple[str, ...] = ()

    def begin(self) -> None:
        super().begin()
        entries = Entries(self.channels, protect=self.arguments["protect"])
        weights = {id(w.variable): w for w in self.channels.weights}
        layers = {name: owner_of(weights[id(kernel)]) for name, kernel in entries.kernels.items()}
        self.whole = tuple(name for name, kernel in entries.kernels.items() if not self._fits(layers[name], kernel))
        for name in self.whole:
            del entries.kernels[name], entries.gone[name]
        if not entries.kernels:
            raise ValueError(
                f"No kernel of {self.model.name} can have the pattern {self.pattern!r}: {', '.join(self.whole[:5])}."
            )
        self._entries, self._layers = entries, layers

    def _fits(self, layer, kernel: keras.Variable) -> bool:
        """Whether the kernel's last axes are channels and filters, and there is something to choose from."""
        if not isinstance(layer, (*CONVOLUTIONS, keras.layers.Dense) if self.block else CONVOLUTIONS):
            return False
        taps, channels, _ = _plane(np.empty(tuple(kernel.shape)), layer).shape
        return channels % self.block[1] == 0 if self.block else self.pattern != "window" or taps > 1

    def masks(self, step: int):
        check_finite(self.model)
        density = 1 - self.schedule(step)
        for name in self._entries.kernels:
            sizes = self._entries.scores(name).reshape(tuple(self._entries.kernels[name].shape))
            plane = _plane(sizes, self._layers[name])
            leaves = ~self._kept(plane, density)
            self._entries.gone[name] |= _plane(leaves, self._layers[name], sizes.shape).ravel()
        self.fractions = self._entries.fractions()
        return self._entries.masks()

    def _kept(self, sizes: np.ndarray, density: float) -> np.ndarray:
        """Which entries stay, shape (taps, channels, filters)."""
        if self.block:
            return neighbours(sizes, max(self.block[0], _nearest(density * self.block[1])), self.block[1])
        taps, of_slices = len(sizes), 1.0
        if self.pattern == "ck":
            return ck(sizes, density, self.criterion, self.scope)
        if self.pattern == "combined":
            of_slices = _share_of_slices(density, 1 - self.ramp["end"], taps)
        kept = window(sizes, max(1, _nearest(density / of_slices * taps)))
        return kept & ck(sizes, of_slices, self.criterion, self.scope) if self.pattern == "combined" else kept

    def figures(self) -> dict[str, float]:
        return {"weight_sparsity": float(np.concatenate(list(self._entries.gone.values())).mean())}


CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
TRANSPOSED = CONVOLUTIONS[3:6]
"""Their kernels have filters before channels."""


def _block(pattern) -> tuple[int, int] | None:
    """(n, m) of "n:m"; None for the other patterns."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found and 0 < int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    if found or pattern not in PATTERNS:
        raise ValueError(
            f"pattern={pattern!r} was passed to PatternPruning; known: {', '.join(map(repr, PATTERNS))}, and 'n:m', "
            "n below m, such as '2:4'."
        )
    return None


def _plane(array: np.ndarray, layer, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A kernel as (taps, channels, filters), or with `shape`, back to that of the kernel."""
    is_swapped = isinstance(layer, TRANSPOSED)
    if shape is not None:
        return (array.swapaxes(1, 2) if is_swapped else array).reshape(shape)
    plane = array.reshape(-1, *array.shape[-2:])
    return plane.swapaxes(1, 2) if is_swapped else plane


def _nearest(number: float) -> int:
    return math.floor(number + 0.5 + 1e-9)


def _share_of_slices(density: float, end: float, taps: int) -> float:
    """The density of whole slices in "combined": about the root; taps are whole numbers, and slices make up for that.

    At the end the window keeps ceil(sqrt(end) * taps) taps. On the way there both fall as powers of the density, so
    that neither of them ever rises.
    """
    of_taps = math.ceil(math.sqrt(end) * taps - 1e-9) / taps
    if density >= 1 or end >= 1:
        return 1.0
    return density ** (math.log(end / of_taps) / math.log(end))
