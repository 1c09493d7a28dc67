"""Step to sparsity. A schedule is a function of the step (batches or epochs: whatever the pruner counts).

The schedules made here know their last step (`stop`), so that a pruner always applies the last value, also when the
end is no multiple of its frequency.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Curve:
    """A schedule with a name, a begin and a last step.

    Attributes:
        value: function (step) -> sparsity.
        begin: before this step nothing is pruned.
        stop: from this step on the value no longer changes.
        every: steps between two changes, where the schedule itself says so; else None.
        unit: what its steps are, "batch" or "epoch", where the schedule itself says so; else "".
    """

    name: str
    value: Callable[[int], float]
    begin: int
    stop: int
    every: int | None = None
    unit: str = ""

    def __call__(self, step: int) -> float:
        return 0.0 if step < self.begin else float(self.value(min(step, self.stop)))


def _check(begin: int, stop: int, **sparsities: float) -> None:
    for name, s in sparsities.items():
        if not 0 <= s < 1:
            raise ValueError(
                f"{name}={s} was passed to a schedule; expected a sparsity in [0, 1). To keep 20 % write 0.8."
            )
    if not 0 <= begin <= stop:
        raise ValueError(f"begin={begin}, stop={stop}: expected 0 <= begin <= stop.")


def constant(sparsity: float, *, begin: int = 0) -> Curve:
    """`sparsity` from step `begin` on.

    >>> constant(0.5, begin=2)(1), constant(0.5, begin=2)(2)
    (0.0, 0.5)
    """
    _check(begin, begin, sparsity=sparsity)
    return Curve("constant", lambda step: sparsity, begin, begin)


def one_shot(sparsity: float, *, at: int) -> Curve:
    """Everything at step `at`, nothing before.

    >>> one_shot(0.5, at=3)(2), one_shot(0.5, at=3)(3)
    (0.0, 0.5)
    """
    _check(at, at, sparsity=sparsity)
    return Curve("one_shot", lambda step: sparsity, at, at)


def polynomial(start: float, end: float, *, begin: int, stop: int, power: float = 3) -> Curve:
    """Rises from `start` to `end` between steps `begin` and `stop`, fast first, then slowly.

    At step t: end + (start - end) * (1 - (t - begin) / (stop - begin)) ** power
    [Zhu & Gupta 2017, arXiv:1710.01878, eq. 1].

    Args:
        start, end: sparsity in [0, 1).
        begin, stop: steps.
        power: 1 is a straight line, 3 the paper's cubic.

    Example:
        >>> schedule = polynomial(0.0, 0.8, begin=0, stop=10)
        >>> [round(schedule(t), 2) for t in (0, 5, 10, 99)]
        [0.0, 0.7, 0.8, 0.8]
    """
    _check(begin, stop, start=start, end=end)
    return Curve("polynomial", lambda t: end + (start - end) * (1 - _part(t, begin, stop)) ** power, begin, stop)


def linear(start: float, end: float, *, begin: int, stop: int) -> Curve:
    """A straight line from `start` to `end`.

    >>> linear(0.0, 0.8, begin=0, stop=4)(1)
    0.2
    """
    _check(begin, stop, start=start, end=end)
    return Curve("linear", lambda t: start + (end - start) * _part(t, begin, stop), begin, stop)


def exponential(start: float, end: float, *, begin: int, stop: int) -> Curve:
    """The kept fraction falls by the same factor every step: keep(t) = (1-start) ((1-end)/(1-start))^part.

    >>> round(exponential(0.0, 0.75, begin=0, stop=2)(1), 6)
    0.5
    """
    _check(begin, stop, start=start, end=end)
    return Curve(
        "exponential", lambda t: 1 - (1 - start) * ((1 - end) / (1 - start)) ** _part(t, begin, stop), begin, stop
    )


def cosine(start: float, end: float, *, begin: int, stop: int) -> Curve:
    """Half a cosine wave: slow, fast, slow.

    >>> round(cosine(0.0, 0.8, begin=0, stop=4)(2), 6)
    0.4
    """
    _check(begin, stop, start=start, end=end)
    return Curve(
        "cosine", lambda t: end + (start - end) * (1 + math.cos(math.pi * _part(t, begin, stop))) / 2, begin, stop
    )


def steps(values: Mapping[int, float]) -> Curve:
    """A list of steps: `{step: sparsity}`, each holding until the next.

    >>> [steps({2: 0.3, 5: 0.5})(t) for t in (1, 2, 4, 5)]
    [0.0, 0.3, 0.3, 0.5]
    """
    if not values:
        raise ValueError("steps={} is empty; expected {step: sparsity}, for example {2: 0.3, 5: 0.5}.")
    known = sorted(values)
    _check(known[0], known[-1], **{f"steps[{k}]": values[k] for k in known})
    return Curve("steps", lambda t: values[max(k for k in known if k <= t)], known[0], known[-1])


def _part(t: int, begin: int, stop: int) -> float:
    return 1.0 if stop == begin else (t - begin) / (stop - begin)


SCHEDULES = {
    "constant": constant,
    "one_shot": one_shot,
    "polynomial": polynomial,
    "linear": linear,
    "exponential": exponential,
    "cosine": cosine,
    "steps": steps,
}


def from_tfmot(schedule) -> Curve:
    """A schedule of tensorflow-model-optimization (PolynomialDecay, ConstantSparsity or a class like these).

    Those objects count batches and give a pair of tensors: whether to prune in this step, and the sparsity. They change
    it each `frequency` batches from `begin_step` to `end_step`, so the pruner takes `unit="batch"` and
    `every=frequency`. One difference: here the last value is also applied if `end_step` is no such batch.

    Args:
        schedule: called with a step; has the attributes begin_step, end_step (-1: never ends) and frequency.

    Raises:
        ValueError: its sparsities are not in [0, 1).
    """
    begin, frequency = int(schedule.begin_step), int(schedule.frequency)

    def value(step: int) -> float:
        turn = step if step == stop else begin + (step - begin) // frequency * frequency
        return round(float(schedule(turn)[1]), 6)  # the tensor is a float32

    stop = int(schedule.end_step) if schedule.end_step >= 0 else begin
    _check(begin, stop, first=value(begin), last=value(stop))
    return Curve(type(schedule).__name__, value, begin, stop, every=frequency, unit="batch")


def _is_from_tfmot(schedule) -> bool:
    return all(hasattr(schedule, name) for name in ("begin_step", "end_step", "frequency"))


def get(sparsity: float | Mapping[int, float] | Schedule) -> Schedule:
    """A number becomes `constant`, a mapping `steps`; a function stays itself.

    A schedule of tensorflow-model-optimization becomes a Curve: see `from_tfmot`.

    Raises:
        ValueError, TypeError: anything else.
    """
    if callable(sparsity) and _is_from_tfmot(sparsity):
        return from_tfmot(sparsity)
    if callable(sparsity):
        return sparsity
    if isinstance(sparsity, Mapping):
        return steps(sparsity)
    if isinstance(sparsity, numbers.Real) and not isinstance(sparsity, bool):
        return constant(check_sparsity(sparsity))
    raise TypeError(
        f"sparsity={sparsity!r} is a {type(sparsity).__name__}; expected a number in [0, 1), "
        "{step: sparsity}, or a schedule such as keras_prune.schedules.polynomial(...)."
    )


def check_sparsity(sparsity: float, where: str = "") -> float:
    """The number itself if it lies in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity!r} was passed{' to ' + where if where else ''}; expected a number in [0, 1): "
            "the fraction removed. To keep 20 % write sparsity=0.8."
        )
    return float(sparsity)


def is_due(step: int, last: int | None, every: int, stop: int | None) -> bool:
    """Whether a callback has to act: at the first step, at each multiple of `every` that was reached or passed since
    it acted `last`, and at the step of the last value, `stop`."""
    return last is None or step // every > last // every or (stop is not None and last < stop <= step)


def total_steps(unit: str, params: dict) -> int | None:
    """Epochs or batches of a whole training, from what fit tells its callbacks; None where it does not know."""
    epochs, steps = params.get("epochs"), params.get("steps")
    if unit == "epoch" or epochs is None:
        return epochs
    return epochs * steps if steps else None


def warn_if_too_short(callback, schedule: Schedule, unit: str) -> None:
    """Warn if the training ends before the schedule reaches its last value.

    Raises:
        ValueError: the schedule counts batches and the callback epochs.
    """
    name, every = type(callback).__name__, getattr(schedule, "every", None)
    if getattr(schedule, "unit", "") not in ("", unit):
        raise ValueError(
            f"{name} counts {unit}s, but {schedule.name} counts {schedule.unit}s: write "
            f'{name}(..., unit="{schedule.unit}", every={every}).'
        )
    if every is not None and getattr(callback, "every", every) != every:
        warnings.warn(
            f"{name} prunes each {callback.every} {unit}s, but {schedule.name} changes each {every}: write "
            f"{name}(..., every={every}).",
            stacklevel=3,
        )
    end, total = getattr(schedule, "stop", None), total_steps(unit, callback.params)
    if end is not None and total is not None and end >= total:
        warnings.warn(
            f"{name}: the schedule reaches its last value at {unit} {end}, but training ends "
            f"after {total} {unit}s: the asked sparsity will not be reached. Lower the schedule's stop.",
            stacklevel=3,
        )
