"""What a network costs, as functions of what remains: params, MACs, activation memory, units.

Every measure is a function `(channels, removed) -> number`, so that a table of latencies fits in the same place.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

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


REFINE = 0.01
"""An estimate that is nearer to the truth than this is good enough."""
PLUGINS = "keras_prune.measures"
"""Entry points of this group are measures that other installed packages offer: tflite_export's latency_ms, say."""


def get(measure: str | Measure) -> Measure:
    """A measure by name, or the function itself.

    Raises:
        ValueError: an unknown name.
    """
    if callable(measure):
        return measure
    if isinstance(measure, str) and measure in MEASURES:
        return MEASURES[measure]
    installed = {point.name: point for point in entry_points(group=PLUGINS)}
    if not isinstance(measure, str) or measure not in installed:
        raise ValueError(
            f"measure={measure!r} is not known. Known: {', '.join(sorted({*MEASURES, *installed}))}. "
            "Or pass a function (channels, removed) -> number."
        )
    return installed[measure].load()


@dataclass(frozen=True)
class Limits:
    """What may be left: at most so much of each measure. It is itself a measure: of the one that is exceeded most.

    Attributes:
        limits: name -> (measure, what may be left of it).
    """

    limits: dict[str, tuple[Measure, float]]

    def __call__(self, channels: Channels, removed: Ids = ()) -> float:
        """The largest of measure / limit: 1 and less is within all of them."""
        return max(function(channels, removed) / limit for function, limit in self.limits.values())

    def excess(self, channels: Channels, removed: Ids = ()) -> float:
        """How far above the limits, summed over the measures, as fractions of them; 0 where all are met."""
        return sum(max(0.0, function(channels, removed) / limit - 1) for function, limit in self.limits.values())

    def refine(self, channels: Channels, removed: Ids) -> float | None:
        """Let measures that are estimates look closer at these widths: those with a method `refine(channels, removed)`
        that returns true ÷ estimated. By what fraction the worst of them was off; None where there is none."""
        measures = [function for function, _ in self.limits.values() if hasattr(function, "refine")]
        return max((abs(each.refine(channels, removed) - 1) for each in measures), default=None)

    def __str__(self) -> str:
        return " and ".join(f"at most {amount(limit)} {name}" for name, (_, limit) in self.limits.items())


def limits(channels: Channels, target: dict[str | Measure, float]) -> Limits:
    """What `target` allows.

    Args:
        channels: of the whole model.
        target: measure, by name or as a function, -> a fraction below 1 to keep, or a number from 1 up. The limit of a
            function, and of what is counted in ms, is a number as it stands.

    Raises:
        ValueError: not such a dict, an unknown measure, a limit that is not above 0.

    >>> str(Limits({"macs": (macs, 5e6), "params": (params, 100)}))
    'at most 5,000,000 macs and at most 100 params'
    """
    if not isinstance(target, dict) or not target:
        raise ValueError(f"target={target!r}; expected for example {{'macs': 0.5}} or {{'params': 250_000}}.")
    found = {}
    for name, value in target.items():
        function, label = get(name), name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0:
            raise ValueError(f"target {label}={value!r}; expected a fraction below 1 to keep, or a number from 1 up.")
        is_fraction = isinstance(name, str) and value < 1 and not name.endswith("_ms")
        while label in found:  # tables of two devices, say
            label += "'"
        found[label] = (function, value * function(channels, ()) if is_fraction else float(value))
    return Limits(found)


def amount(number: float) -> str:
    """A number of whatever unit for people: whole numbers with commas, others with four digits."""
    return f"{number:,.0f}" if float(number).is_integer() or abs(number) >= 1e4 else f"{number:,.4g}"
