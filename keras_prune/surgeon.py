"""Which units leave, by what their removal does to everything that reads them.

For every group the readers' inputs are measured once on the original network. Then units leave one by one, the
cheapest first; what that costs is the group's curve. The others take over what they can (`curves`, the structured
optimal brain surgeon), or stay as they are (`plain_curves`, ThiNet).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.damage import Damage
from keras_prune.groups import Group
from keras_prune.least_squares import Normal, Reader, eliminate
from keras_prune.program import Program, batches_of
from keras_prune.reconstruction import WIDE, choose, inputs_of_layer, watched
from keras_prune.sites import Site, intercept_of, sites_of, tail_of, unmeasured
from keras_prune.surgery import checked_inputs
from keras_prune.thinet import greedy, products_of, sampled_products

LOOKS = (0.25, 0.6)
"""Fractions of a group at whose removal the network's own output is looked at."""


@dataclass(frozen=True)
class Curve:
    """What the removal of a group's units costs.

    Attributes:
        group: the group.
        order: places of its units in the order in which they leave; the last one of all stays.
        error: squared error at its readers ÷ the variance of what they make, summed over them, after 1, 2, ... units,
            shape (units - 1,): all other weights of the readers take over what they can. Of `plain_curves` as it says.
        damage: the same in terms of the network's own output, where that was measured (see `damage.Damage`).
    """

    group: Group
    order: np.ndarray
    error: np.ndarray
    damage: np.ndarray | None = None

    def scores(self) -> np.ndarray:
        """One per unit, higher = keep: by how much its removal raises the curve, and more than of those before it."""
        steps = np.diff(self.error if self.damage is None else self.damage, prepend=0.0)
        raised = np.maximum.accumulate(np.append(steps, steps[-1] if len(steps) else 1.0))
        raised += 1e-9 * raised[-1] * np.arange(len(raised))  # equals leave in this order: later ones took over
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
        rows: how many output positions are looked at per kernel, as for `reconstruct`.
        batch_size: samples that run at once.
        memory: bytes for the sums; if they do not fit, the data run through the network several times.
        seed: of the choice of positions.
        progress: show a progress bar.

    Returns:
        (curves by group index, reasons by group index why there is none).

    Raises:
        ValueError: data that does not fit the model, or is not finite.
    """
    survey = _Survey(channels, groups)
    data = checked_inputs(channels.model, data)
    exam = None if exam_data is None else Damage(channels, exam_data, batch_size, memory)
    if exam:
        survey.ready.sort(key=exam.start)
    measured = survey.sums(data, rows, batch_size, memory, seed, progress)
    found = {g.index: _curve(g, survey.sites, sums, exam, survey.program) for g, sums in measured}
    return found, survey.reasons


def plain_curves(
    channels: Channels,
    data,
    *,
    groups: Sequence[Group] | None = None,
    rows: int = 16384,
    batch_size: int = 64,
    memory: int = 2**31,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[int, Curve], dict[int, str]]:
    """The same where nobody takes over: ThiNet's greedy order [Luo et al. 2017, arXiv:1707.06342].

    Their error is that of one sampled output value per position; here it is that of all of them, which takes no more
    than the products of the readers' inputs. A reader with more than `reconstruction.WIDE` columns is looked at as in
    the paper, by sampled values. [several readers of a group, each with an equal say, are a reconstruction]

    Args:
        channels, data, groups, rows, batch_size, memory, seed, progress: as for `curves`.

    Returns:
        (curves by group index, reasons by group index why there is none). The errors are squared errors at the
        readers ÷ the sum of the squares of what they make without their biases, summed over the readers: means count,
        as nothing makes up for them.

    Raises:
        ValueError: data that does not fit the model, or is not finite.
    """
    survey = _Survey(channels, groups)
    data, found = checked_inputs(channels.model, data), {}
    for group, sums in survey.sums(data, rows, batch_size, memory, seed, progress):
        products = np.zeros((len(group), len(group)))
        for site in _readers([group], survey.sites):
            products += _products(sums[id(site.kernel)], site.matrix(), site.columns(group), seed)
        found[group.index] = Curve(group, *greedy(products))
    return found, survey.reasons


class _Survey:
    """The groups whose readers can be measured, and why the others cannot."""

    def __init__(self, channels: Channels, groups: Sequence[Group] | None):
        self.program = Program(channels.model)
        self.sites = sites_of(channels, self.program)
        every = channels.groups if groups is None else groups
        reasons = {group.index: unmeasured(channels, group, self.sites) for group in every}
        self.reasons = {index: reason for index, reason in reasons.items() if reason}
        self.ready = [group for group in every if group.index not in self.reasons]

    def sums(self, data, rows, batch_size, memory, seed, progress) -> Iterator[tuple[Group, dict[int, Normal | list]]]:
        """Each group, and by id(kernel) what was measured at everything that reads it."""
        batches = list(batches_of(self.program.model, data, batch_size))
        samples = len(keras.tree.flatten(data)[0])
        for some in watched(list(_portions(self.ready, self.sites, memory)), "measure", progress):
            readers = _readers(some, self.sites)
            measured = _measured(self.program, readers, batches, samples, rows, memory, seed)
            yield from ((group, measured) for group in some)


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
    blocks, columns, _ = site.shape
    return 8 * blocks * columns * (columns if columns <= WIDE else 1)


def _measured(program, sites, batches, samples, rows, memory, seed) -> dict[int, Normal | list]:
    """id(kernel) -> sums over its rows and what it makes of them, on the original network."""
    matrices = {id(site.kernel): site.matrix() for site in sites}
    # Too wide for the products of all columns: only the rows are kept.
    sums: dict[int, Normal | list] = {
        key: Normal(*m.shape) if m.shape[1] <= WIDE else [] for key, m in matrices.items()
    }
    rngs = {key: np.random.default_rng(seed) for key in matrices}  # a site's rows do not depend on its company
    for batch in batches:
        values, at = program.start(batch), 0
        for site in sites:
            key, first, last = id(site.kernel), site.steps[0], site.steps[-1]
            values, at = program.run(values, at, first), first
            for x in inputs_of_layer(program, values, site.layer, first, last):
                chosen = choose(rngs[key], site, x.shape, samples, rows, memory)
                seen, held = site.view.rows(x, chosen), sums[key]
                if not np.isfinite(seen).all():
                    raise ValueError(
                        f"Layer {site.layer.name!r} is given NaN or infinite numbers on this data: is the data, and is "
                        "the model, what it should be?"
                    )
                held.append(seen) if isinstance(held, list) else held.add(seen, seen @ matrices[key])
    return sums


def _curve(group: Group, sites: list[Site], measured: dict, exam: Damage | None, program: Program) -> Curve:
    readers, places, means, fixed = [], [], [], np.zeros(len(group))
    for site in _readers([group], sites):
        sums, columns = measured[id(site.kernel)], site.columns(group)
        matrix = site.matrix().astype(np.float64)
        has_intercept = intercept_of(site.bias, tail_of(program, site).norm) is not None
        if isinstance(sums, list):
            fixed += _alone(np.concatenate(sums, axis=1), matrix, columns, has_intercept)
            continue
        spread = sums.centred()
        normal = spread if has_intercept else sums
        ridge = normal.ridge()
        inverses = np.linalg.inv(normal.gram + ridge * np.eye(normal.gram.shape[1]))
        energy = _energy(spread.square, sums.square)
        for block, weights in enumerate(matrix):
            readers.append(Reader(inverses[block], weights, columns[block], 1 / energy, float(ridge[block, 0, 0])))
            places.append((site, block))
            means.append(normal.sum_x[block] / max(normal.count, 1))
    looks = sorted({max(1, round(f * len(group))) for f in LOOKS} - {len(group)}) if exam else []
    done = eliminate(readers, fixed if fixed.any() or not readers else None, looks)
    damage = exam.along(group, done, places, means, done.errors) if exam else None
    return Curve(group, done.order, done.errors, damage)


def _energy(spread: np.ndarray, square: np.ndarray) -> float:
    """What a kernel's errors are divided by: the variance of what it makes, unless that is rounding noise."""
    return max(float(spread.sum()), 1e-6 * float(square.sum()), 1e-30)


def _alone(rows: np.ndarray, matrix: np.ndarray, columns: list[np.ndarray], has_intercept: bool) -> np.ndarray:
    """Cost of each unit if nobody takes over: the energy of what it contributes, beyond what an intercept can give.

    Args:
        rows: (blocks, rows, columns).
        matrix: (blocks, columns, outputs).
        columns: of each unit, (units, width) per block.
    """

    def squares(made):
        return np.square(made - made.mean(0)).sum(), np.square(made).sum()

    whole, costs = np.zeros(2), np.zeros(len(columns[0]))
    for x, weights, places in zip(rows, matrix, columns):
        whole += squares(x @ weights)
        costs += [squares(x[:, at] @ weights[at])[0 if has_intercept else 1] for at in places]
    return costs / _energy(*whole)


def _products(sums: Normal | list, matrix: np.ndarray, columns: list[np.ndarray], seed: int) -> np.ndarray:
    """ThiNet's products of a reader, all its blocks together, as shares of the squares of what it makes."""
    if isinstance(sums, list):
        rows, rng = np.concatenate(sums, axis=1), np.random.default_rng(seed)
        parts = [sampled_products(*block, rng) for block in zip(rows, matrix, columns)]
        found, squares = sum(p[0] for p in parts), sum(p[1] for p in parts)
    else:
        found = sum(products_of(*block) for block in zip(sums.gram, matrix.astype(np.float64), columns))
        squares = float(sums.square.sum())
    return found / max(squares, 1e-30)
