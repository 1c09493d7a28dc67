"""What a network costs, as functions of what remains: params, MACs, activation memory, units.

Every measure is a function `(channels, removed) -> number`, so that a table of latencies fits in the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from keras_prune.channels import Channels
from keras_prune.rules import Ids

Measure = Callable[[Channels, Ids], float]


def params(channels: Channels, removed: Ids = ()) -> int:
    """Number of weights, running statistics included, as `model.count_params()` of the cut model gives it."""
    alive = channels.alive(removed)
    labelled = {id(w.variable) for w in channels.weights}
    rest = sum(math.prod(v.shape) for v in channels.model.weights if id(v) not in labelled)
    return rest + sum(_size(w.axes, w.variable.shape, alive) for w in channels.weights)


def macs(channels: Channels, removed: Ids = ()) -> int:
    """Multiply-accumulates per sample of all kernels and attention products. Not counted: biases, norms, pooling,
    activations, and layers without a rule (`channels.uncounted` names them)."""
    alive = channels.alive(removed)
    return sum(term.factor * _size(term.axes, term.sizes, alive) for term in channels.terms)


def memory(channels: Channels, removed: Ids = ()) -> int:
    """Bytes of the activations that are alive at once at the peak: batch 1, float32, no operation fused.

    An upper bound for a runtime that fuses activations and reuses buffers; good for comparing.
    """
    alive = channels.alive(removed)
    if not channels.tensors:
        return 0
    change = np.zeros(max(t.last_used for t in channels.tensors) + 2, np.int64)
    for tensor in channels.tensors:
        size = math.prod(tensor.shape)
        if tensor.ids.size > 1:
            size = size // tensor.ids.size * int(alive[tensor.ids].sum())
        change[tensor.made] += size
        change[tensor.last_used + 1] -= size
    return int(np.cumsum(change).max()) * 4


def units(channels: Channels, removed: Ids = ()) -> int:
    """Number of prunable units left."""
    return sum(len(g) for g in channels.groups) - len(np.unique(np.asarray(removed, int)))


def _size(axes, shape, alive) -> int:
    return math.prod(n if ids is None else int(alive[ids].sum()) for ids, n in zip(axes, shape))


MEASURES: dict[str, Measure] = {"params": params, "macs": macs, "memory": memory, "units": units}


def get(measure: str | Measure) -> Measure:
    """A measure by name, or the function itself.

    Raises:
        ValueError: an unknown name.
    """
    if callable(measure):
        return measure
    if not isinstance(measure, str) or measure not in MEASURES:
        raise ValueError(
            f"measure={measure!r} is not known. Known: {', '.join(sorted(MEASURES))}. "
            "Or pass a function (channels, removed) -> number."
        )
    return MEASURES[measure]
