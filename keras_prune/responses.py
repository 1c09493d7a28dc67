"""What units answer on unlabelled data: their variance, the ranks of their maps, and how often they are silent.

The data run through the network once, and only sums are kept: a network's answers to a few thousand samples would not
fit into memory.

* `spectra`: how many directions the answers of a group vary in [PCA as in Riera, Arnau, Gonzalez, arXiv:1906.02535,
  and Garg et al., arXiv:1812.06224; a reconstruction: neither paper's code was at hand].
* `map_ranks`: rank of a unit's feature map [HRank: Lin et al. 2020, arXiv:2002.10179].
* `nonzero`: how often a unit is not zero [APoZ: Hu et al. 2016, arXiv:1607.03250].
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune.budgets import Spectrum
from keras_prune.channels import Channels
from keras_prune.groups import Group, Member
from keras_prune.program import Program, batches_of, samples_in
from keras_prune.reconstruction import inputs_of_layer, watched
from keras_prune.sites import Site, sites_of
from keras_prune.surgery import checked_inputs

PER_CHANNEL = 10
"""At least so many positions are looked at for each channel, where there are so many."""

UNDONE = {
    *("Flatten", "Reshape", "Squeeze", "Dropout", "Identity"),
    *(f"Global{how}Pooling{rank}D" for how in ("Average", "Max") for rank in (1, 2, 3)),
}
"""Layers and operations that make a vector of maps, or pass values on: the maps before them are looked at."""


def spectra(
    channels: Channels | keras.Model,
    data,
    *,
    groups: Sequence[Group] | None = None,
    alive: np.ndarray | None = None,
    rows: int = 16384,
    batch_size: int = 64,
    memory: int = 2**28,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[int, list[Spectrum]], dict[int, str]]:
    """The principal components of what the producers of each group make.

    Responses are what a kernel makes of its inputs, before BatchNormalization and activation; centred, not
    standardised. The bias is a constant and takes no part.

    Args:
        channels: labels of the model, or the model, which is not changed.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...). A convolution gives a row
            at each position; a Dense layer on vectors one per sample, so it needs ten samples for each of its units.
        groups: which groups; default: all.
        alive: units that are looked at, shape (unit_count,); default: all.
        rows: how many output positions are looked at per kernel, the same number of each sample; more where that is
            less than ten for each channel. All of them, where there are no more.
        batch_size: samples that run at once. It does not change which positions are looked at.
        memory: bytes for what a kernel multiplies at some positions at once.
        seed: of the choice of positions.
        progress: show a progress bar.

    Returns:
        (by group index one Spectrum per producer, by group index why there is none).

    Raises:
        ValueError: data that does not fit the model or is not finite, or an argument out of range.

    Warns:
        Producers of which there are less than ten rows for each channel: of n rows there are never more than n - 1
        components, whatever the layer can do.

    Example:
        >>> found, reasons = spectra(model, x)                                      # doctest: +SKIP
        >>> [budgets.components(s.eigenvalues, 0.99) for s in found[0]]             # doctest: +SKIP
    """
    for name, value in (("rows", rows), ("batch_size", batch_size), ("memory", memory)):
        _check_count(name, value, "spectra")
    channels = channels if isinstance(channels, Channels) else Channels(channels)
    data = checked_inputs(channels.model, data)
    alive = np.ones(channels.unit_count, bool) if alive is None else alive
    program = Program(channels.model)
    sites = sites_of(channels, program)
    makers, reasons = _makers(channels.groups if groups is None else groups, sites, alive)
    used = [site for site in sites if any(maker.site is site for found in makers.values() for maker in found)]
    samples, seen = samples_in(data), 0
    for batch in watched(list(batches_of(channels.model, data, batch_size)), "responses", progress):
        values, at, size = program.start(batch), 0, samples_in(batch)
        for site in used:
            first, last = site.steps[0], site.steps[-1]
            values, at = program.run(values, at, first), first
            there = [maker for found in makers.values() for maker in found if maker.site is site]
            for call, x in enumerate(inputs_of_layer(program, values, site.layer, first, last)):
                wanted = math.ceil(max(rows, *(m.needed for m in there)) / (samples * len(site.steps)))
                chosen = _positions(site.view.count(x.shape), range(seen, seen + size), wanted, (seed, call))
                for made in _made(site, x, chosen, memory):
                    for maker in there:
                        maker.moments.add(made[:, maker.places])
        seen += size
    _warn_of_few(makers)
    return {index: [maker.spectrum() for maker in found] for index, found in makers.items()}, reasons


def map_ranks(
    channels: Channels | keras.Model, data, *, groups: Sequence[Group] | None = None, batch_size: int = 64
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """The average rank of each unit's feature map, as a fraction of the largest possible one, by group index.

    [Lin et al. 2020, arXiv:2002.10179, eq. 4; within a layer the order is the paper's, the fraction makes layers whose
    maps are of different sizes comparable]

    Args:
        channels: labels of the model, or the model, which is not changed.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...); the paper takes 640.
        groups: which groups; default: all.
        batch_size: samples that run at once.

    Returns:
        (scores, shape (units,), by group index, by group index why there are none).

    What is looked at are the tensors that layers with kernels are given, that is behind normalisation, activation and
    pooling; of a layer that is given a vector made of maps (by Flatten or global pooling) those maps. Where a group is
    read in several places, the mean over them counts; where a unit has several channels, that over the channels.

    A map is the last two axes besides that of the channels; a vector has rank 0 or 1. Singular values count from the
    largest x max(height, width) x 1.2e-7 up, as `numpy.linalg.matrix_rank` has it.

    Warns:
        Groups in which all units have the same score.
    """
    return _fractions(channels, data, _rank, groups, batch_size, "map_ranks")


def nonzero(
    channels: Channels | keras.Model, data, *, groups: Sequence[Group] | None = None, batch_size: int = 64
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """How often each unit is not zero, a fraction, by group index: 1 - APoZ [Hu et al. 2016, arXiv:1607.03250, eq. 1].

    Arguments, results, and what is looked at: as for `map_ranks`. It says something behind a ReLU; activations that
    are never zero score 1.
    """
    return _fractions(channels, data, _is_not_zero, groups, batch_size, "nonzero")


# -- components --------------------------------------------------------------------------------------------------


class Moments:
    """Mean and scatter of rows, merged piece by piece about the means, so that large means cost no digits.

    Args:
        width: columns of the rows.

    Attributes:
        count, mean, scatter: rows seen, their mean, the sum of products of deviations from it, (width, width).

    [Chan, Golub, LeVeque 1983, eq. 2.1]
    """

    def __init__(self, width: int):
        self.count, self.mean, self.scatter = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        mean, total = rows.mean(0), self.count + len(rows)
        rows -= mean
        step = mean - self.mean
        self.scatter += rows.T @ rows + np.outer(step, step) * (self.count * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.count = total


@dataclass(frozen=True)
class _Maker:
    """A kernel that makes a group's units, and which of its outputs they are, flat over blocks and outputs."""

    site: Site
    places: np.ndarray
    slices: int
    moments: Moments = field(repr=False)

    @property
    def needed(self) -> int:
        """Rows that the components can be counted from."""
        blocks, columns, _ = self.site.shape
        return PER_CHANNEL * min(len(self.places), blocks * columns)

    def spectrum(self) -> Spectrum:
        values = np.linalg.eigvalsh(self.moments.scatter / max(self.moments.count, 1))[::-1]
        return Spectrum(self.site.weight.layer.name, np.maximum(values, 0), self.slices)


def _makers(groups: Sequence[Group], sites: Sequence[Site], alive) -> tuple[dict[int, list[_Maker]], dict[int, str]]:
    """By group index what makes its units, or why that cannot be measured."""
    known = {id(site.weight): site for site in sites}
    makers, reasons = {}, {}
    for group in groups:
        unknown = [m.weight.layer for m in group.producers if not m.weight.is_kernel or id(m.weight) not in known]
        if not group.producers:
            reasons[group.index] = "nothing makes its units: they are constants"
        elif unknown:
            reasons[group.index] = (
                f"made by {unknown[0].name} ({type(unknown[0]).__name__}), whose responses are no product with a kernel"
            )
        else:
            makers[group.index] = [_maker(known[id(m.weight)], m, group, alive) for m in group.producers]
    return makers, reasons


def _maker(site: Site, member: Member, group: Group, alive: np.ndarray) -> _Maker:
    made = site.ids(member.axis)[:, 0].ravel()
    units = group.units[alive[group.units]]
    places = np.flatnonzero(np.isin(made, units))
    return _Maker(site, places, max(1, len(places) // max(1, len(units))), Moments(len(places)))


def _warn_of_few(makers: dict[int, list[_Maker]]) -> None:
    few = {
        maker.site.weight.layer.name: f"{maker.moments.count:,} rows for {len(maker.places):,} channels"
        for found in makers.values()
        for maker in found
        if maker.moments.count < maker.needed
    }
    if few:
        shown = "; ".join(f"{name}: {text}" for name, text in list(few.items())[:3])
        warnings.warn(
            f"Components were counted from less than ten rows for each channel in {shown}"
            f"{'; ...' if len(few) > 3 else ''}. The counts are too low there: pass more data.",
            stacklevel=3,
        )


def _positions(count: int, samples: range, wanted: int, seed: tuple[int, ...]) -> np.ndarray:
    """Output positions of one batch: so many of each sample, drawn for it alone, whatever the batch is."""
    each, rest = divmod(count, len(samples))
    if wanted >= each or rest:  # rest: the model mixes samples, and no position belongs to one
        return np.arange(count)
    drawn = [np.random.default_rng([*seed, s]).choice(each, wanted, replace=False) for s in samples]
    return np.concatenate([k * each + np.sort(d) for k, d in enumerate(drawn)])


def _made(site: Site, x: np.ndarray, chosen: np.ndarray, memory: int) -> Iterator[np.ndarray]:
    """What the kernel makes at these positions, some at a time, (rows, blocks * outputs)."""
    matrix = site.matrix()
    blocks, columns, _ = matrix.shape
    step = max(1, memory // (16 * blocks * columns))
    for start in range(0, len(chosen), step):
        made = site.view.rows(x, chosen[start : start + step]) @ matrix
        if not np.isfinite(made).all():
            raise ValueError(
                f"Layer {site.layer.name!r} makes NaN or infinite numbers on this data: is the data, and is the model, "
                "what it should be?"
            )
        yield made.transpose(1, 0, 2).reshape(made.shape[1], -1)


# -- maps --------------------------------------------------------------------------------------------------------


@dataclass
class _Look:
    """A tensor that carries a group's units, and what was found of each of them so far.

    Attributes:
        group: whose units.
        slot: of the tensor in the program.
        axis, places: where the units are: the axis, and the places of each on it, (units, width).
    """

    group: Group
    slot: int
    axis: int
    places: np.ndarray
    total: np.ndarray
    samples: int = 0

    def take(self, array: np.ndarray, rate: Callable) -> None:
        """Add up what `rate` finds in the maps, (samples, units, width, ..., height, width) -> fractions."""
        x = np.moveaxis(array, self.axis, 1)
        found = rate(x[:, self.places])
        self.total += found.reshape(len(found), len(self.group), -1).mean(2, dtype=np.float64).sum(0)
        self.samples += len(found)


def _fractions(channels, data, rate: Callable, groups, batch_size: int, what: str):
    _check_count("batch_size", batch_size, what)
    channels = channels if isinstance(channels, Channels) else Channels(channels)
    data = checked_inputs(channels.model, data)
    program, looks, reasons = Program(channels.model), [], {}
    made = {slot: number for number, step in enumerate(program.steps) for slot in step.gives}
    for group in channels.groups if groups is None else groups:
        there = _looks(channels, program, made, group)
        looks += there
        if not there:
            reasons[group.index] = "no layer with a kernel is given its units as they are"
    for batch in batches_of(channels.model, data, batch_size):
        values, at = program.start(batch), 0
        for slot in sorted({look.slot for look in looks}, key=made.get):
            values, at = program.run(values, at, made[slot] + 1), made[slot] + 1
            array = keras.ops.convert_to_numpy(keras.ops.cast(values[slot], "float32"))
            if not np.isfinite(array).all():
                raise ValueError("The model makes NaN or infinite numbers on this data: is the data what it should be?")
            for look in looks:
                if look.slot == slot:
                    look.take(array, rate)
    found: dict[int, list[np.ndarray]] = {}
    for look in looks:
        found.setdefault(look.group.index, []).append(look.total / look.samples)
    scores = {index: np.mean(each, axis=0) for index, each in found.items()}
    _warn_of_equals(channels, scores, what)
    return scores, reasons


def _looks(channels: Channels, program: Program, made: dict[int, int], group: Group) -> list[_Look]:
    """The tensors with this group's units that layers with kernels are given; each once."""
    readers = {id(m.weight.layer) for m in group.members if m.reads and m.weight.is_kernel}
    found: dict[int, _Look] = {}
    for step in program.steps:
        if id(step.operation) not in readers:
            continue
        for tensor, (_, slot) in zip(step.node.input_tensors, step.takes):
            look, before = None, _look(channels, group, tensor, slot)
            while before is not None:
                look, before, maker = before, None, program.steps[made[before.slot]]
                if type(maker.operation).__name__ in UNDONE:
                    before = _look(channels, group, maker.node.input_tensors[0], maker.takes[0][1])
            if look is not None:
                found.setdefault(look.slot, look)
    return list(found.values())


def _look(channels: Channels, group: Group, tensor, slot: int) -> _Look | None:
    """Where a tensor carries the units; None where it does not carry all of them, or not all alike."""
    ids = channels.ids_of(tensor)
    if not np.isin(group.units, ids).all() or max(ids.shape) < ids.size:
        return None
    places = [np.flatnonzero(ids.ravel() == unit) for unit in group.units]
    if len({len(p) for p in places}) != 1:
        return None
    return _Look(group, slot, int(np.argmax(ids.shape)), np.stack(places), np.zeros(len(group)))


def _rank(maps: np.ndarray) -> np.ndarray:
    """Rank of each map ÷ the largest possible one."""
    if maps.ndim < 5:  # (samples, units, width) or one axis more: vectors
        return (maps.reshape(*maps.shape[:3], -1) != 0).any(3)
    return np.linalg.matrix_rank(maps) / min(maps.shape[-2:])


def _is_not_zero(maps: np.ndarray) -> np.ndarray:
    return maps != 0


def _warn_of_equals(channels: Channels, scores: dict[int, np.ndarray], what: str) -> None:
    alike = [channels.groups[index].name for index, found in scores.items() if np.ptp(found) == 0]
    if alike:
        warnings.warn(
            f"{what}: in {len(alike)} of {len(scores)} groups all units have the same score, which says nothing: "
            f"{'; '.join(alike[:3])}{'; ...' if len(alike) > 3 else ''}. Units there leave in the order they have.",
            stacklevel=4,
        )


def _check_count(name: str, value, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} was passed to {where}; expected a whole number from 1 up.")
