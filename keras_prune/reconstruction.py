"""Reconstruction: after a cut, let every kernel that is left make what the original network made, without labels.

The original and the small network run side by side over the same inputs, once. At every kernel, in the order of the
network, its weights are fitted by least squares: to the *original* network's values, from the *small* network's inputs,
so that errors made earlier are repaired later.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.least_squares import Normal, refit, refit_wide
from keras_prune.program import Program, Values, batches_of, listening, size_of
from keras_prune.rules import Ids
from keras_prune.sites import Site, Tail, intercept_of, site_of, sites_of, tail_of
from keras_prune.surgery import check_finite, checked_inputs, cut_with_twins

WIDE = 8192
"""Above so many columns (a Dense layer behind Flatten) the fit is solved in the space of the rows."""


def reconstruct(
    model: keras.Model | Channels,
    removed: Ids,
    data,
    *,
    rows: int = 32768,
    passes: int = 2,
    strength: float | None = None,
    batch_size: int = 64,
    memory: int = 2**31,
    seed: int = 0,
    progress: bool = False,
) -> keras.Model:
    """Cut units and refit what is left to the original network's values.

    Args:
        model: the original network, or its `Channels`. It is not changed.
        removed: ids of the units that leave.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...), as the model takes them.
        rows: how many output positions, spread evenly over the samples, a kernel is fitted to at most; but at least
            four and not more than 256 for each of its columns.
        passes: rounds in which targets that a ReLU cuts off anyway are relaxed: below zero any value will do
            [as Zhang et al. 2016, arXiv:1505.06798, section 3.2, in spirit].
        strength: of the pull towards the original weights; default: the stronger, the fewer rows per column.
        batch_size: samples that run at once.
        memory: bytes that the kept values of both networks may take together; with less, they are computed again.
        seed: of the choice of the positions.
        progress: show a progress bar.

    Returns:
        The small network.

    Raises:
        ValueError: data that does not fit the model, is empty or not finite, or units that cannot leave.
    """
    channels = model if isinstance(model, Channels) else Channels(model)
    check_finite(channels.model)
    data = checked_inputs(channels.model, data)
    for array in keras.tree.flatten(data):
        if "float" in str(array.dtype) and not np.isfinite(_array(array)).all():
            raise ValueError("data holds NaN or infinite numbers; expected what the model is meant to be given.")
    run = _Run(channels, removed, data, rows, passes, strength, batch_size, memory, seed)
    for pair in watched(run.pairs, "reconstruct", progress):
        run.refit(pair)
    return run.small


def watched(items: Sequence, title: str, progress: bool) -> Iterator:
    """The items, behind a progress bar if asked for."""
    from rich.progress import track

    return track(items, title, disable=not progress)


class _Run:
    """Two networks side by side, and how far they have come."""

    def __init__(self, channels, removed, data, rows, passes, strength, batch_size, memory, seed):
        alive = channels.alive(removed)
        self.small, twins = cut_with_twins(channels, removed)
        self.old, self.new = Program(channels.model), Program(self.small)
        self.pairs = [_Pair(site, twins, channels, alive, self.old) for site in sites_of(channels, self.old)]
        self.rows, self.passes, self.strength = rows, passes, strength
        self.memory, self.seed = memory, seed
        self.samples = len(keras.tree.flatten(data)[0])
        self.at = 0  # the step before which the values of all batches are kept
        batches = batches_of(channels.model, data, batch_size)
        self.values = [(self.old.start(x), self.new.start(x)) for x in batches]

    def refit(self, pair: _Pair) -> None:
        """Fit one kernel of the small network, and keep the values before it."""
        rng, fit = np.random.default_rng(self.seed), _Fit(pair, self.passes)
        first, last = pair.site.steps[0], pair.site.steps[-1]
        kept: list | None = []
        for old, new in self.values:
            old, new = self.old.run(old, self.at, first), self.new.run(new, self.at, first)
            if kept is not None:
                kept.append((old, new))
                if len(self.values) * sum(map(size_of, kept[0])) > self.memory:
                    kept = None
            there = inputs_of_layer(self.old, old, pair.site.layer, first, last)
            here = inputs_of_layer(self.new, new, pair.twin.layer, first, last)
            for x, z in zip(map(pair.aligned, there), here):
                at = choose(rng, pair.site, x.shape, self.samples, self.rows, self.memory)
                fit.add(*pair.rows_and_targets(x, z, old, new, at))
        fit.solve(self.strength)
        if kept is not None and first == last:  # a layer that is called again is not done with before its last call
            self.values, self.at = kept, first


def inputs_of_layer(program: Program, values: Values, layer, first: int, last: int) -> list[np.ndarray]:
    """What a layer is given at each of its calls between two steps."""
    heard: list[np.ndarray] = []
    with listening(layer, lambda x, y: heard.append(_array(x))):
        program.run(values, first, last + 1)
    return heard


def choose(rng, site: Site, shape: Sequence[int], samples: int, rows: int, memory: int) -> np.ndarray:
    """Output positions of one batch, out of all that an input of this shape has: its share of the rows wanted."""
    blocks, columns, _ = site.shape
    wanted = rows if columns > WIDE else max(min(rows, 256 * columns), 4 * columns)
    wanted = min(wanted, max(1024, memory // (16 * blocks * columns)))
    count = site.view.count(tuple(shape))
    n = math.ceil(wanted * shape[0] / (samples * len(site.steps)))
    return np.arange(count) if n >= count else rng.choice(count, n, replace=False)


def _array(tensor) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


class _Pair:
    """A kernel of the original network and its twin in the small one, and what comes after them.

    Attributes:
        prior: the twin's matrices as they were cut, (blocks, columns, outputs).
        intercept: the small network's variable that takes a shift of what the kernel makes, and the sign; or None.
        scale, shift: the next activation sees `scale * rows @ matrix + shift`, and what is added to it.
    """

    def __init__(self, site: Site, twins: dict, channels: Channels, alive: np.ndarray, program: Program):
        layer = twins[id(site.weight.layer)]
        self.site, self.matrix = site, site.matrix()
        self.twin = site_of(replace(site.weight, variable=attrgetter(site.weight.name)(layer), layer=layer), site.steps)
        self.prior = self.twin.matrix().astype(np.float64)
        keep = site.kept(alive)
        self.blocks = keep.any((1, 2))
        self.outputs = keep[self.blocks].any(1)
        self.rows_left = _rows_left(channels, alive, site, program)
        self.tail = Tail() if self.rows_left else tail_of(program, site)
        norm = self.tail.norm and twins[id(self.tail.norm)]
        self.intercept = intercept_of(self.twin.bias, norm)
        self.scale, self.shift = np.ones((1, 1, 1)), np.zeros((1, 1, 1))
        if self.twin.bias is not None:
            self.shift = _array(self.twin.bias).reshape(len(self.prior), 1, -1)
        if norm is not None:
            self.scale, offset = self._affine(norm, len(program.steps[site.steps[0]].node.outputs[0].shape))
            self.shift = self.scale * self.shift + offset
        self.scale, self.shift = (v.astype(np.float32) for v in (self.scale, self.shift))  # they meet many rows

    def _affine(self, norm, rank: int) -> tuple[np.ndarray, np.ndarray]:
        scale = 1 / np.sqrt(_array(norm.moving_variance) + norm.epsilon) * (_array(norm.gamma) if norm.scale else 1)
        offset = (_array(norm.beta) if norm.center else 0) - scale * _array(norm.moving_mean)
        shape = [-1 if axis == norm.axis % rank else 1 for axis in range(rank)]
        one = np.zeros(1, int)
        return tuple(self.twin.view.outputs(v.reshape(shape), one) for v in (scale, offset))

    def aligned(self, x: np.ndarray) -> np.ndarray:
        """An input of the original network with the rows that the small one has."""
        for axis, keep in self.rows_left.items():
            x = x.compress(keep, axis)
        return x

    def rows_and_targets(self, x, z, old: Values, new: Values, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows of the small network, what the original made there, and what is added to it afterwards.

        Where it goes into a sum whose other terms are there already, the sum is what counts: the target is moved by
        the error that is in them, so that this kernel repairs it.
        """
        target = self._kept(self.site.view.rows(x, at) @ self.matrix)
        added = np.zeros((1, 1, 1), np.float32)
        if all(slot in old and slot in new for slot in self.tail.summands):
            for slot in self.tail.summands:
                there = self._kept(self.site.view.outputs(_array(old[slot]), at))
                here = self.twin.view.outputs(_array(new[slot]), at)
                target, added = target + (there - here) / self.divisor, added + here
        return self.twin.view.rows(z, at), target, added

    @property
    def divisor(self) -> np.ndarray:
        """`scale`, infinite where it is next to nothing and cannot be divided by."""
        size = np.abs(self.scale)
        return np.where(size > 1e-3 * size.max(), self.scale, np.inf).astype(np.float32)

    def _kept(self, values: np.ndarray) -> np.ndarray:
        """(blocks, rows, outputs) of the original network -> those that are left."""
        return np.stack([block[:, keep] for block, keep in zip(values[self.blocks], self.outputs)])

    def write(self, matrix: np.ndarray, intercept: np.ndarray | None) -> None:
        """Into the small network; the intercept (blocks, outputs) into the variable that takes it."""
        self.twin.write(matrix)
        if intercept is None:
            return
        target, sign = self.intercept
        target.assign(_array(target) + sign * intercept.reshape(target.shape).astype("float32"))


def _rows_left(channels: Channels, alive: np.ndarray, site: Site, program: Program) -> dict[int, np.ndarray]:
    """Axis of the input -> what stays of it, for units that the kernel lets pass: each of them is a row."""
    step = program.steps[site.steps[0]]
    if site.layer is not step.operation:  # inside an attention, where units are columns
        return {}
    ids = channels.ids_of(step.node.input_tensors[0])
    own = [axis for axis in site.weight.axes if axis is not None]
    if max(ids.shape) < ids.size or alive[ids].all() or (own and np.isin(ids[ids > 0], np.concatenate(own)).any()):
        return {}
    return {int(np.argmax(ids.shape)): alive[ids.ravel()]}


class _Fit:
    """The fit of one kernel: sums over all rows, and the rows themselves where targets are to be relaxed."""

    def __init__(self, pair: _Pair, passes: int):
        self.pair = pair
        self.low, self.high = pair.tail.clip
        self.wide = pair.prior.shape[1] > WIDE
        self.passes = passes if np.isfinite(self.low) and not self.wide else 0
        self.has_intercept = pair.intercept is not None
        self.normal = None if self.wide else Normal(*pair.prior.shape)
        self.chunks: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: np.ndarray, target: np.ndarray, added: np.ndarray) -> None:
        if self.normal is not None:
            self.normal.add(rows, target)
        if self.passes or self.wide:
            self.chunks.append((rows, target, added))

    def solve(self, strength: float | None) -> None:
        if self.wide:
            return self._solve_wide(strength)
        matrix, intercept = self._solved(self.normal, strength)
        for _ in range(self.passes):
            matrix, intercept = self._solved(self._relaxed(matrix, intercept), strength)
        self.pair.write(matrix, intercept)

    def _solved(self, normal: Normal, strength) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.has_intercept:
            return refit(normal, self.pair.prior, strength), None
        matrix = refit(normal.centred(), self.pair.prior, strength)
        fitted = np.einsum("bc,bco->bo", normal.sum_x, matrix)
        return matrix, (normal.sum_y - fitted) / normal.count

    def _relaxed(self, matrix: np.ndarray, intercept: np.ndarray | None) -> Normal:
        """The sums with targets that the activation would cut off replaced by what the fit gives, if that is cut off
        too, else by the edge."""
        pair, new = self.pair, copy.copy(self.normal)
        new.cross, new.sum_y = np.zeros_like(new.cross), np.zeros_like(new.sum_y)
        matrix = matrix.astype(np.float32)
        constant = 0.0 if intercept is None else intercept[:, None].astype(np.float32)
        for rows, target, added in self.chunks:
            fitted = rows @ matrix + constant
            wanted, got = (pair.scale * y + pair.shift + added for y in (target, fitted))
            wanted = np.where(wanted <= self.low, np.minimum(got, self.low), wanted)
            wanted = np.where(wanted >= self.high, np.maximum(got, self.high), wanted)
            target = np.where(np.isfinite(pair.divisor), fitted + (wanted - got) / pair.divisor, target)
            new.cross += rows.transpose(0, 2, 1) @ target.astype(np.float32)
            new.sum_y += target.sum(1, dtype=np.float64)
        return new

    def _solve_wide(self, strength) -> None:
        rows, target = (np.concatenate([c[k] for c in self.chunks], axis=1) for k in (0, 1))
        means = (rows.mean(1, keepdims=True), target.mean(1, keepdims=True)) if self.has_intercept else (0.0, 0.0)
        x, y = rows - means[0], target - means[1]
        matrix = np.stack([refit_wide(*block, strength) for block in zip(x, y, self.pair.prior)])
        self.pair.write(matrix, (means[1] - means[0] @ matrix)[:, 0] if self.has_intercept else None)
