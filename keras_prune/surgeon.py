"""Which units leave, by what their removal does to everything that reads them: structured optimal brain surgeon.

For every group the readers' inputs are measured once on the original network. Then units leave one by one, the
cheapest first, the others taking over what they can; what that costs is the group's curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_prune.answers import Exam
from keras_prune.channels import Channels
from keras_prune.groups import Group
from keras_prune.least_squares import Elimination, Normal, Reader, eliminate
from keras_prune.program import Program, batches_of
from keras_prune.reconstruction import WIDE, choose, inputs_of_layer, watched
from keras_prune.rules import Ids
from keras_prune.sites import Site, sites_of, unmeasured
from keras_prune.surgery import checked_inputs, copied, write_zeros, zero_masks

LOOKS = (0.15, 0.4, 0.7)
"""Fractions of a group at whose removal the network's own output is looked at."""


@dataclass(frozen=True)
class Curve:
    """What the removal of a group's units costs.

    Attributes:
        group: the group.
        order: places of its units in the order in which they leave; the last one of all stays.
        error: squared error at its readers ÷ the variance of what they make, summed over them, after 1, 2, ... units,
            shape (units - 1,): all other weights of the readers take over what they can.
        damage: the same in terms of the network's own output, where that was measured (`measured_damage`).
    """

    group: Group
    order: np.ndarray
    error: np.ndarray
    damage: np.ndarray | None = None

    def scores(self) -> np.ndarray:
        """One per unit, higher = keep: by how much its removal raises the curve, never less than those before it."""
        steps = np.diff(self.error if self.damage is None else self.damage, prepend=0.0)
        raised = np.maximum.accumulate(np.append(steps, steps[-1] if len(steps) else 1.0))
        scores = np.empty(len(self.group))
        last = np.setdiff1d(np.arange(len(self.group)), self.order)
        scores[np.concatenate([self.order, last])] = raised
        return scores


def curves(
    channels: Channels,
    data,
    *,
    groups: Sequence[Group] | None = None,
    exam_data=None,
    rows: int = 16384,
    batch_size: int = 64,
    memory: int = 2**31,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[int, Curve], dict[int, str]]:
    """The curve of every group.

    Args:
        channels: labels of the model, which is not changed.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...).
        groups: which groups; default: all.
        exam_data: inputs on which the damage to the network's own output is measured too; None: it is not.
        rows: how many output positions are looked at per kernel, and at least four per column.
        batch_size: samples that run at once.
        memory: bytes for the sums; if they do not fit, the data run through the network several times.
        seed: of the choice of positions.
        progress: show a progress bar.

    Returns:
        (curves by group index, reasons by group index why there is none).

    Raises:
        ValueError: data that does not fit the model.
    """
    data = checked_inputs(channels.model, data)
    program = Program(channels.model)
    sites = sites_of(channels, program)
    found, reasons, ready = {}, {}, []
    for group in channels.groups if groups is None else groups:
        reason = unmeasured(channels, group, sites)
        if reason:
            reasons[group.index] = reason
        else:
            ready.append(group)
    exam = None if exam_data is None else _Damage(channels, exam_data, batch_size)
    batches = list(batches_of(channels.model, data, batch_size))
    samples = len(keras.tree.flatten(data)[0])
    for some in watched(list(_portions(ready, sites, memory)), "measure", progress):
        measured = _measured(program, _readers(some, sites), batches, samples, rows, memory, seed)
        for group in some:
            found[group.index] = _curve(group, sites, measured, exam)
    return found, reasons


def _readers(groups: Sequence[Group], sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if any(site.reads(group) for group in groups)]


def _portions(groups: list[Group], sites: list[Site], memory: int) -> Iterator[list[Group]]:
    """Groups whose readers' sums fit into the memory together."""
    some: list[Group] = []
    for group in groups:
        if some and sum(map(_bytes, _readers([*some, group], sites))) > memory // 4:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _bytes(site: Site) -> int:
    blocks, columns, _ = site.matrix().shape
    return 8 * blocks * columns * (columns if columns <= WIDE else 1)


def _measured(program, sites, batches, samples, rows, memory, seed) -> dict[int, Normal | list]:
    """id(kernel) -> sums over its rows and what it makes of them, on the original network."""
    shapes = {id(site.kernel): site.matrix().shape for site in sites}
    # Too wide for the products of all columns: only the rows are kept, see `_alone`.
    sums: dict[int, Normal | list] = {key: Normal(*s) if s[1] <= WIDE else [] for key, s in shapes.items()}
    rng = np.random.default_rng(seed)
    for batch in batches:
        values, at = program.start(batch), 0
        for site in sites:
            first, last = site.steps[0], site.steps[-1]
            values, at = program.run(values, at, first), first
            for x in inputs_of_layer(program, values, site.layer, first, last):
                chosen = choose(rng, site, x.shape, samples, rows, memory)
                seen, held = site.view.rows(x, chosen), sums[id(site.kernel)]
                held.append(seen[0]) if isinstance(held, list) else held.add(seen, seen @ site.matrix())
    return sums


def _curve(group: Group, sites: list[Site], measured: dict, exam: _Damage | None) -> Curve:
    readers, places, fixed = [], [], np.zeros(len(group))
    for site in _readers([group], sites):
        sums, columns = measured[id(site.kernel)], site.columns(group)
        matrix = site.matrix().astype(np.float64)
        if isinstance(sums, list):
            fixed += _alone(np.concatenate(sums), matrix[0], columns[0])
            continue
        normal = sums.centred()
        inverses = np.linalg.inv(normal.gram + normal.ridge() * np.eye(normal.gram.shape[1]))
        energy = float(normal.square.sum())
        for block, weights in enumerate(matrix):
            readers.append(Reader(inverses[block], weights, columns[block], 1 / energy if energy > 0 else 0.0))
            places.append((site, block))
    looks = sorted({max(1, round(f * len(group))) for f in LOOKS} - {len(group)}) if exam else []
    done = eliminate(readers, fixed if fixed.any() else None, looks)
    error = np.cumsum(done.costs)
    damage = exam.along(group, done, places, error) if exam else None
    return Curve(group, done.order, error, damage)


def _alone(rows: np.ndarray, matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cost of each unit if nobody takes over: the energy of what it contributes."""
    made = rows @ matrix
    energy = float(np.square(made - made.mean(0)).sum())
    parts = (rows[:, at] @ matrix[at] for at in columns)
    return np.array([float(np.square(p - p.mean(0)).sum()) for p in parts]) / max(energy, 1e-30)


class _Damage:
    """What the removal of some units of one group does to the network's output."""

    def __init__(self, channels: Channels, data, batch_size: int):
        self.channels = channels
        self.copy, self.twins = copied(channels)
        self.exam = Exam(self.copy, channels.model, [np.asarray(a) for a in keras.tree.flatten(data)], batch_size)

    def along(self, group: Group, done: Elimination, places, error: np.ndarray) -> np.ndarray:
        """The curve in terms of the output: measured at a few points, shaped by the error between them."""
        if not done.weights:
            return error
        at = np.array(sorted(done.weights))
        ratio = [
            max(self.at(group, done.order[:n], places, done.weights[n]), 1e-7) / max(error[n - 1], 1e-12) for n in at
        ]
        between = np.exp(np.interp(np.arange(1, len(error) + 1), at, np.log(ratio)))
        return np.maximum.accumulate(error * between)

    def at(self, group: Group, places: np.ndarray, sites, weights) -> float:
        """Divergence of the output with these units gone and their readers refitted."""
        removed: Ids = group.units[places]
        touched = {}
        for weight, mask in zero_masks(self.channels, removed):
            twin = self.twins[id(weight.variable)]
            touched[id(twin)] = (twin, keras.ops.convert_to_numpy(twin))
            write_zeros(twin, mask)
        matrices: dict[int, tuple[Site, np.ndarray]] = {}
        for (site, block), matrix in zip(sites, weights):
            if id(site.kernel) not in matrices:
                matrices[id(site.kernel)] = (site, site.matrix().copy())
            matrices[id(site.kernel)][1][block] = matrix
        for site, whole in matrices.values():
            twin = self.twins[id(site.kernel)]
            touched.setdefault(id(twin), (twin, keras.ops.convert_to_numpy(twin)))
            twin.assign(site.view.kernel(whole).astype("float32"))
        distance = self.exam.distance(self.exam.answers(self.exam.view))[0]
        for twin, value in touched.values():
            twin.assign(value)
        return distance if np.isfinite(distance) else 1e6
