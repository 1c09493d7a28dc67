"""How much of what its readers compute comes from a unit: the empirical sensitivities of Provable Filter Pruning.

[Liebenwein, Baykal, Lang, Feldman, Rus, ICLR 2020, arXiv:1911.07412] A kernel's sums are split by the signs of weights
and inputs, so that each of the four parts is a sum of numbers from 0 up, in which every unit has a share between 0 and
1. The sensitivity of a unit is its largest share: over the samples, the parts, the outputs, the positions, and
everything that reads it. Biases take no part.

What this promises: whichever units stay, none of these sums on the measured samples loses a larger share than the
sensitivities of those that left add up to. So those with the lowest leave first.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_prune import theory
from keras_prune.channels import Channels
from keras_prune.groups import Group
from keras_prune.program import Program, batches_of, samples_in
from keras_prune.reconstruction import inputs_of_layer, watched
from keras_prune.sites import Site, applications, neurons, sites_of, unmeasured
from keras_prune.surgery import checked_inputs

EPSILON = float(np.finfo(np.float32).eps)
"""Of a sum that is no larger nobody has a share: it may be rounding noise."""

SATURATED = 0.999
"""A sensitivity above it counts as 1."""

REDUCTIONS = ("sum", "max")

BLOCK = 2**17
"""So many shares are computed at once: they stay in the processor's cache until their largest is found."""


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive the readers of a group are to each of its units.

    Attributes:
        group: the group.
        scores: largest share of each unit, shape (units,), in [0, 1].
        mean: its mean share of all sums that are not 0, shape (units,); of its whole share, whatever the reduction.
        samples: how many samples it was measured on. Scores grow with them: compare only what saw the same.
    """

    group: Group
    scores: np.ndarray
    mean: np.ndarray
    samples: int

    @property
    def saturated(self) -> float:
        """Fraction of the units whose score is as good as 1: the score does not tell these apart."""
        return float((self.scores > SATURATED).mean())

    def ranking(self) -> np.ndarray:
        """The scores, but saturated units by their mean share, all of them above all others. Higher = keep."""
        return np.where(self.scores > SATURATED, SATURATED + (1 - SATURATED) * self.mean, self.scores)


@dataclass(frozen=True)
class Sensitivities:
    """What `sensitivities` measured.

    Attributes:
        groups: by group index.
        notes: by group index, why there is none.
        samples: how many samples were looked at.
        kernel_reduction: what a share is, "sum" or "max".
    """

    groups: dict[int, Sensitivity]
    notes: dict[int, str]
    samples: int
    kernel_reduction: str


def sensitivities(
    channels: Channels | keras.Model,
    data,
    *,
    groups: Sequence[Group] | None = None,
    kernel_reduction: str = "sum",
    batch_size: int = 64,
    memory: int = 2**27,
    progress: bool = False,
) -> Sensitivities:
    """The empirical sensitivity of every unit.

    Args:
        channels: labels of the model, or the model, which is not changed.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...); a few hundred are
            enough, see `theory.sample_size`.
        groups: which groups; default: all.
        kernel_reduction: what a unit's share of a sum is: "sum", all that its taps, or its places behind Flatten,
            contribute together, or "max", its largest single contribution, as in the authors' code. Only "sum" bounds
            what the removal of units does.
        batch_size: samples that run at once.
        memory: bytes for what is computed beside the network's own values of one batch and a copy of one kernel; not
            less than a megabyte. It decides how many positions and outputs are looked at together, not what comes out.
        progress: show a progress bar.

    Raises:
        ValueError: data that does not fit the model or is not finite, or an argument out of range.

    Warns:
        Groups of which more than half the units are saturated: each is once all there is in some sum. Which of them
        leave is then decided by the mean share.
    """
    if kernel_reduction not in REDUCTIONS:
        raise ValueError(
            f"kernel_reduction={kernel_reduction!r} was passed to sensitivities; expected 'sum', a unit's whole share "
            "of a sum, or 'max', the share of its largest tap."
        )
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}={value!r} was passed to sensitivities; expected a whole number from 1 up.")
    channels = channels if isinstance(channels, Channels) else Channels(channels)
    program = Program(channels.model)
    sites, notes, tallies = sites_of(channels, program), {}, []
    for group in channels.groups if groups is None else groups:
        reason = unmeasured(channels, group, sites) or _recurrence(group)
        if reason:
            notes[group.index] = reason
        else:
            tallies.append(_Tally(group))
    readers = [
        _Reader(site, kernel_reduction, [(tally, site.columns(tally.group)) for tally in there])
        for site in sites
        for there in [[tally for tally in tallies if site.reads(tally.group)]]
        if there
    ]
    samples = _show(readers, program, data, batch_size, memory, "sensitivities", progress)
    found = {tally.group.index: tally.result(samples) for tally in tallies}
    _warn(list(found.values()))
    return Sensitivities(found, notes, samples, kernel_reduction)


def deviations(
    channels: Channels,
    multipliers: np.ndarray,
    data,
    *,
    batch_size: int = 64,
    memory: int = 2**27,
    progress: bool = False,
) -> dict[str, float]:
    """What the removal or reweighing of units really does to the sums that sensitivities speak of.

    Args:
        channels: labels of the model.
        multipliers: of every unit, shape (unit_count,): 0 removes it, 1 leaves it as it is.
        data, batch_size, memory, progress: as for `sensitivities`.

    Returns:
        weight (`Weight` as in `channels.weights`) by id -> the largest change of any of its kernel's sums on these
        samples, as a share of the sum, on the inputs of the unchanged network. Kernels for which nothing changes, and
        those without a view as a matrix, are left out.
    """
    program = Program(channels.model)
    readers = []
    for site in sites_of(channels, program):
        axes = [a for a in site.weight.takes if site.weight.reads[a]]
        if len(axes) == 1 and (multipliers[site.weight.axes[axes[0]]] != 1).any():
            readers.append(_Deviation(site, multipliers[site.ids(axes[0])[:, :, 0]].astype(np.float32) - 1))
    _show(readers, program, data, batch_size, memory, "deviations", progress)
    return {id(reader.site.weight): float(reader.largest) for reader in readers}


def sample_size(model: keras.Model | Channels, delta: float = 1e-16) -> int:
    """On how many samples the sensitivities of a model should be measured.

    Args:
        model: a built model, or its `Channels`.
        delta: accepted probability that some neuron's largest shares are missed.

    Source:
        `theory.sample_size`, the formula of the authors' code, for the numbers that the model's kernels make of one
        sample. It grows with the logarithm of both: 125 for LeNet-300-100 (1e-12), 183 for ResNet-20 (1e-16).
    """
    channels = model if isinstance(model, Channels) else Channels(model)
    return theory.sample_size(*neurons(channels, sites_of(channels, Program(channels.model))), delta)


def logarithms(channels: Channels, groups: Sequence[Group], delta: float) -> list[float]:
    """ln(8 (positions + 1) taps / delta) per group, the largest of its readers': what `budgets.error_bound` takes.

    Positions: how often the reader's kernel is applied; taps: how many of its columns belong to one unit.
    """
    times, sites, found = applications(channels), sites_of(channels, Program(channels.model)), []
    for group in groups:
        columns = [(site, site.columns(group)) for site in sites if site.reads(group)]
        events = [(times[id(s.kernel)] + 1) * c[0].shape[1] for s, c in columns if c is not None]
        found.append(math.log(8) + math.log(max(events, default=2)) - math.log(delta))
    return found


def _recurrence(group: Group) -> str:
    """Why a group whose units read each other from one step to the next cannot be measured; "" for all others."""
    twice = Counter(id(m.weight) for m in group.members if m.weight.is_kernel and not m.reads)
    names = [m.weight.layer.name for m in group.members if twice[id(m.weight)] > 1]
    return f"read by {names[0]} itself, from one step to the next" if names else ""


def _show(readers: Sequence, program: Program, data, batch_size: int, memory: int, what: str, progress: bool) -> int:
    """Run the data through the network and show every reader what it is given; the number of samples."""
    sites = [reader.site for reader in readers]
    for number, x in shown(sites, program, data, batch_size, what, progress):
        for block, _, _, rows, weights in pieces(sites[number], x, memory):
            readers[number].take(block, rows, weights)
    return samples_in(data)


def shown(
    sites: Sequence[Site], program: Program, data, batch_size: int, title: str = "", progress: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the site, what its layer is given), of all calls of all sites, batch by batch.

    Args:
        sites: in the order in which they are first used, as `sites_of` gives them.
    """
    data = checked_inputs(program.model, data)
    for batch in watched(list(batches_of(program.model, data, batch_size)), title, progress):
        values, at = program.start(batch), 0
        for number, site in enumerate(sites):
            first, last = site.steps[0], site.steps[-1]
            values, at = program.run(values, at, first), first
            for x in inputs_of_layer(program, values, site.layer, first, last):
                yield number, x


def _warn(found: list[Sensitivity]) -> None:
    lost = [s for s in found if s.saturated > 0.5]
    if lost:
        names = "; ".join(f"{s.group.name} ({s.saturated:.0%})" for s in lost[:3])
        warnings.warn(
            f"In {len(lost)} of {len(found)} groups more than half of the units are saturated: {names}"
            f"{'; ...' if len(lost) > 3 else ''}. Each of them is once all there is in some sum, so that its "
            "sensitivity says no more than that; these are ordered by their mean share.",
            stacklevel=3,
        )


class _Tally:
    """The largest and the mean share of a group's units so far."""

    def __init__(self, group: Group):
        self.group = group
        self.largest = np.zeros(len(group), np.float32)
        self.total = np.zeros(len(group))
        self.sums = 0  # how many the total is of

    def add(self, largest: np.ndarray, total: np.ndarray, sums: int) -> None:
        np.maximum(self.largest, largest, out=self.largest)
        self.total += total
        self.sums += sums

    def result(self, samples: int) -> Sensitivity:
        largest = np.minimum(self.largest.astype(np.float64), 1.0)  # rounding may lift a share of everything
        return Sensitivity(self.group, largest, np.minimum(self.total / max(self.sums, 1), 1.0), samples)


@dataclass(frozen=True)
class _Reader:
    """A kernel, and of each group that it reads the columns."""

    site: Site
    reduction: str
    groups: list[tuple[_Tally, list[np.ndarray]]]

    def take(self, block: int, rows: np.ndarray, weights: np.ndarray) -> None:
        """Take in the shares in `rows @ weights`, both without negative numbers: (rows, columns), (columns, sums)."""
        inverse = inverse_of(self.site, rows, weights)
        sums = int(np.count_nonzero(inverse))
        if not sums:
            return
        across = np.ascontiguousarray(rows.T)
        # Of all shares of a column together no single one is needed: the weight stands outside the sum over the rows.
        totals = np.einsum("cs,cs->c", across @ inverse, weights, dtype=np.float64)
        for tally, columns in self.groups:
            places = columns[block]
            if self.reduction == "max" or places.shape[1] == 1:
                largest = _of_columns(rows, weights, inverse, places)
            else:
                largest = _of_units(across, weights, inverse, places)
            tally.add(largest, totals[places].sum(1), sums)


@dataclass
class _Deviation:
    """A kernel, and by which share of itself what each column contributes changes, (blocks, columns)."""

    site: Site
    change: np.ndarray
    largest: float = 0.0

    def take(self, block: int, rows: np.ndarray, weights: np.ndarray) -> None:
        """Take in the change of the sums in `rows @ weights`; arguments as for `_Reader`."""
        changed = np.abs(rows @ (weights * self.change[block][:, None])) * inverse_of(self.site, rows, weights)
        self.largest = max(self.largest, float(changed.max(initial=0)))


def pieces(site: Site, x: np.ndarray, memory: int) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """All that a kernel multiplies of a batch's input, some positions, outputs and one sign of the inputs at a time:
    (block, sign of the inputs, first output, rows, weights).

    The sign is 0 for the positive part and 1 for the negative one, which is left out where there is none; the weights
    of both signs are side by side, (columns, sums). Rows and weights hold no negative numbers.
    """
    matrix, view = site.matrix(), site.view
    outputs, (rows, columns) = matrix.shape[-1], _portions(matrix.shape, memory)
    count = view.count(x.shape)
    for start in range(0, count, rows):
        seen = view.rows(x, np.arange(start, min(start + rows, count)))
        for block, part in enumerate(seen):
            for sign, signed in enumerate(_signs(part)):
                for first in range(0, outputs, columns):
                    weights = matrix[block, :, first : first + columns].astype(np.float32)
                    yield block, sign, first, signed, np.concatenate(list(_signs(weights, both=True)), axis=1)


def inverse_of(site: Site, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 / (rows @ weights), 0 where that is no larger than rounding noise."""
    made = rows @ weights
    refuse_infinite(site, made)
    return np.divide(1, made, out=np.zeros_like(made), where=made > EPSILON)


def refuse_infinite(site: Site, values: np.ndarray) -> None:
    """A ValueError if what was measured at a site is not finite."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"Layer {site.layer.name!r} is given NaN or infinite numbers on this data, or makes them: is the "
            "data, and is the model, what it should be?"
        )


def _signs(array: np.ndarray, both: bool = False) -> Iterator[np.ndarray]:
    """The positive part, and the negative part if there is one, or in any case."""
    yield np.maximum(array, 0)
    if both or (array < 0).any():
        yield np.maximum(-array, 0)


def _portions(shape: tuple[int, int, int], memory: int) -> tuple[int, int]:
    """(rows, outputs) that are looked at together, so that what they need fits into the memory."""
    blocks, columns, outputs = shape
    numbers_held = memory // 4
    # Of an output, twice for its signs: the weights, once more while they are split, and as each unit's own.
    few = max(1, min(outputs, numbers_held // 4 // (8 * columns)))
    # Of a position: the rows of all blocks, twice, where they come from (three indices of 8 bytes), one block's by
    # sign, twice; and the sums, their inverses, and which of them count.
    each = 2 * blocks * columns + 6 * columns + 4 * columns + 5 * 2 * few
    return max(1, numbers_held // 2 // each), few


def _of_units(across: np.ndarray, weights: np.ndarray, inverse: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Largest share of each unit's columns together, shape (units,).

    Args:
        across: what the weights multiply, transposed, (columns, rows).
        weights: (columns, sums).
        inverse: 1 / what all columns make together, 0 where that does not count, (rows, sums).
        places: columns of each unit, (units, width).
    """
    count, sums = inverse.shape
    rows = min(count, max(64, BLOCK // (len(places) * sums)))
    units = max(1, BLOCK // (rows * sums))
    found = np.zeros(len(places), np.float32)
    for start in range(0, len(places), units):
        some = places[start : start + units]
        own, best = weights[some], found[start : start + units]
        for first in range(0, count, rows):
            shares = across[:, first : first + rows][some].transpose(0, 2, 1) @ own  # (units, rows, sums)
            shares *= inverse[first : first + rows]
            np.maximum(best, shares.reshape(len(some), -1).max(1), out=best)
    return found


def _of_columns(rows: np.ndarray, weights: np.ndarray, inverse: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Largest share of a single column of each unit, shape (units,). Arguments as for `_of_units`, rows upright.

    A weight is the same for all rows: the largest over the rows comes first, the weight afterwards.
    """
    count, sums = inverse.shape
    step = max(64, BLOCK // sums)
    found = np.zeros(places.size, np.float32)
    for k, column in enumerate(places.ravel()):
        best = np.zeros(sums, np.float32)
        for first in range(0, count, step):
            ratios = inverse[first : first + step] * rows[first : first + step, column, None]
            np.maximum(best, ratios.max(0), out=best)
        found[k] = (best * weights[column]).max()
    return found.reshape(places.shape).max(1)
