"""Which scores a criterion gives to the units of every group: from their own weights, or from what reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
import numpy as np

from keras_prune import criteria
from keras_prune.channels import Channels, Group
from keras_prune.probes import gradient_times_weight, unlabelled
from keras_prune.sensitivity import sample_size, sensitivities
from keras_prune.surgeon import curves

DELTA = 1e-16
"""Accepted probability of failure of "pfp", where none is asked for."""


def scores_of(
    channels, criterion, data, reasons: dict, alive, *, inputs=None, delta: float = DELTA, seed=None
) -> tuple[dict[int, np.ndarray], int | None]:
    """Scores per group index, -inf for units that are gone, and how many samples they took, if they took inputs.

    Args:
        data: as the criterion takes it; labelled for "taylor", inputs for those of `READERS`.
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
    shadows = gradient_times_weight(channels, data) if name == "taylor" else None
    scores = {}
    for group in channels.groups:
        if group.index in reasons:
            continue
        blocks = _blocks(channels, group, name, shadows)
        if not blocks:
            reasons[group.index] = f"has nothing for {name} to score"
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
            "criterion='bn_scale' needs BatchNormalization behind the layers; this model has none there. "
            "Use criterion='l2'."
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


def _by_surgeon(channels, inputs, groups, delta):
    found, unknown = curves(channels, inputs, groups=groups)
    return {k: curve.scores() for k, curve in found.items()}, unknown, len(keras.tree.flatten(inputs)[0])


def _by_sensitivity(channels, inputs, groups, delta, kernel_reduction="sum"):
    arrays = keras.tree.flatten(inputs)
    count, wanted = len(arrays[0]), sample_size(channels, delta)
    if wanted < count:  # more would only raise the scores; by chance, as data may be sorted by class
        chosen = np.sort(np.random.default_rng(0).permutation(count)[:wanted])
        inputs = keras.tree.map_structure(lambda a: a[chosen], inputs)
    found = sensitivities(channels, inputs, groups=groups, kernel_reduction=kernel_reduction)
    return {k: sensitivity.ranking() for k, sensitivity in found.groups.items()}, found.notes, found.samples


READERS = {
    "obs": _by_surgeon,
    "pfp": _by_sensitivity,
    "pfp_max": functools.partial(_by_sensitivity, kernel_reduction="max"),
}
"""Criteria that look at what reads the units: (channels, inputs, groups, delta) -> scores and reasons by group index,
and how many samples that took."""


def _blocks(channels: Channels, group: Group, name, shadows) -> list[np.ndarray]:
    """The rows a criterion looks at, one block per producer."""
    if name in criteria.SCALES and isinstance(name, str):
        scales = [m for m in group.members if m.weight.name == "gamma"]
        return channels.blocks(group, members=scales) if scales else []
    if shadows is None:
        return channels.blocks(group)
    known = [m for m in group.producers if id(m.weight.variable) in shadows[0]]
    per_batch = [channels.blocks(group, shadow, known) for shadow in shadows] if known else []
    return [np.stack([b[k].sum(axis=1) for b in per_batch], axis=1) for k in range(len(known))]


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
