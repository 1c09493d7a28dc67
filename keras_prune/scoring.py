"""Which scores a criterion gives to the units of every group: from their own weights, or from what reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
import numpy as np

from keras_prune import criteria
from keras_prune.channels import Channels, Group
from keras_prune.probes import folded, gates_of, gradient_times_weight, unlabelled
from keras_prune.program import samples_in
from keras_prune.responses import map_ranks, nonzero
from keras_prune.sensitivity import sample_size, sensitivities
from keras_prune.surgeon import curves, plain_curves

WITHOUT_GATE = ": frozen, or before a normalisation without gamma, for which there is criterion='taylor_weight'"
DELTA = 1e-16
"""Accepted probability of failure of "pfp", where none is asked for."""


def scores_of(
    channels, criterion, data, reasons: dict, alive, *, inputs=None, delta: float = DELTA, seed=None
) -> tuple[dict[int, np.ndarray], int | None]:
    """Scores per group index, -inf for units that are gone, and how many samples they took, if they took inputs.

    Args:
        data: as the criterion takes it; labelled for those of `criteria.LABELLED`, inputs for those of `READERS`.
        reasons: by group index, why it is left alone; groups that cannot be scored are added.
        alive: units that are there, shape (unit_count,).
        inputs: `unlabelled(data)`, where the caller has it already.
        delta: of "pfp".
        seed: of "random".
    """
    if isinstance(criterion, str) and criterion in READERS:
        inputs = unlabelled(channels.model, data) if inputs is None else inputs
        return scores_of_readers(channels, criterion, inputs, delta, reasons, alive)
    return scores_of_rows(channels, criterion, criteria.get(criterion, seed), data, reasons, alive), None


def scores_of_rows(channels, name, function: Callable, data, reasons: dict, alive) -> dict[int, np.ndarray]:
    """Scores per group index, -inf for units that are gone. Groups that cannot be scored are added to `reasons`."""
    blocks_of, scores = _rows_of(channels, name if isinstance(name, str) else "", data), {}
    for group in channels.groups:
        if group.index in reasons:
            continue
        blocks = blocks_of(group)
        if not blocks:
            reasons[group.index] = f"has nothing for {name} to score" + (WITHOUT_GATE if name in criteria.GATES else "")
            continue
        here = alive[group.units]
        if not here.any():
            reasons[group.index] = "is gone already"
            continue
        scores[group.index] = np.full(len(group), -np.inf)
        scores[group.index][here] = np.mean(
            [_normalised(function(rows[here]), group, int(here.sum())) for rows in blocks], axis=0
        )
    if not scores and len(reasons) == len(channels.groups) and name in criteria.SCALES:
        raise ValueError(
            "criterion='bn_scale' needs BatchNormalization with scale=True behind the layers; this model has none "
            "there. Use criterion='l2'."
        )
    return scores


def scores_of_readers(channels, name, inputs, delta, reasons: dict, alive) -> tuple[dict[int, np.ndarray], int]:
    """The same for criteria whose scores come from what reads the units, and the number of samples it took."""
    groups = [g for g in channels.groups if g.index not in reasons and alive[g.units].any()]
    found, unknown, samples = READERS[name](channels, inputs, groups, delta)
    reasons.update({g.index: "is gone already" for g in channels.groups if not alive[g.units].any()})
    reasons.update(unknown)
    scores = {k: np.where(alive[channels.groups[k].units], scores, -np.inf) for k, scores in found.items()}
    return scores, samples


def _by_curves(channels, inputs, groups, delta, curves_of=curves):
    found, unknown = curves_of(channels, inputs, groups=groups)
    return {k: curve.scores() for k, curve in found.items()}, unknown, samples_in(inputs)


def _by_sensitivity(channels, inputs, groups, delta, kernel_reduction="sum"):
    inputs = _some(inputs, sample_size(channels, delta))  # more would only raise the scores
    found = sensitivities(channels, inputs, groups=groups, kernel_reduction=kernel_reduction)
    return {k: sensitivity.ranking() for k, sensitivity in found.groups.items()}, found.notes, found.samples


def _by_responses(channels, inputs, groups, delta, measured, at_most=None):
    inputs = inputs if at_most is None else _some(inputs, at_most)
    found, unknown = measured(channels, inputs, groups=groups)
    return found, unknown, samples_in(inputs)


def _some(inputs, wanted: int):
    """So many samples, by chance, as data may be sorted by class."""
    count = samples_in(inputs)
    if wanted >= count:
        return inputs
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:wanted])
    return keras.tree.map_structure(lambda a: None if a is None else a[chosen], inputs)


READERS = {
    "obs": _by_curves,
    "thinet": functools.partial(_by_curves, curves_of=plain_curves),
    "pfp": _by_sensitivity,
    "pfp_max": functools.partial(_by_sensitivity, kernel_reduction="max"),
    "hrank": functools.partial(_by_responses, measured=map_ranks, at_most=640),  # so many as in the paper
    "apoz": functools.partial(_by_responses, measured=nonzero),
}
"""Criteria that look at what reads the units: (channels, inputs, groups, delta) -> scores and reasons by group index,
and how many samples that took."""


def _rows_of(channels: Channels, name: str, data) -> Callable[[Group], list[np.ndarray]]:
    """What gives a criterion its rows: of each group one block per producer."""
    if name in criteria.LABELLED:
        return _of_gradients(channels, name, data)
    if name in criteria.FOLDED:
        weights = folded(channels)
        return lambda group: channels.blocks(group, weights)
    if name in criteria.SCALES:
        return lambda group: _blocks(channels, group, [m for m in group.members if m.weight.name == "gamma"])
    return channels.blocks


def _of_gradients(channels: Channels, name: str, data) -> Callable[[Group], list[np.ndarray]]:
    """One feature per batch; without producers whose gradient is not known, as they are frozen."""
    shadows, of_batch = gradient_times_weight(channels, data), criteria.LABELLED[name]
    parts = gates_of(channels) if name in criteria.GATES else lambda group: [[m] for m in group.producers]

    def blocks(group):
        known = [some for some in parts(group) if all(id(m.weight.variable) in shadows[0] for m in some)]
        each = [[np.concatenate(_blocks(channels, group, some, s), axis=1) for s in shadows] for some in known]
        return [np.stack([of_batch(rows) for rows in batches], axis=1) for batches in each]

    return blocks


def _blocks(channels: Channels, group: Group, members, values=None) -> list[np.ndarray]:
    return channels.blocks(group, values, members) if members else []


def _normalised(scores, group: Group, n: int) -> np.ndarray:
    """Scores divided by their mean, so that groups and producers of different scale can be compared."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != (n,):
        raise ValueError(
            f"The criterion returned shape {scores.shape} for group {group.name}; expected ({n},): one score per unit."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"The criterion returned NaN or infinite scores for group {group.name}.")
    mean = np.abs(scores).mean()
    return scores / mean if mean > 0 else scores
