"""Floor 5. Latency as a function of the widths: what a network takes on a device when these units are removed.

The network is converted once. Each operator of the file is then timed alone on the device at a few widths, and the
whole file at a few: the sum over the operators is fitted to the whole. Between widths, times are read off the stairs.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tflite_export import flatbuffer
from tflite_export.blueprint import Blueprint, Operator
from tflite_export.devices import Device
from tflite_export.devices import get as device_named
from tflite_export.measures import FileMeasure, for_channels
from tflite_export.recipes import Recipe
from tflite_export.records import aligned

STEP = 8
"""Channels per stair: kernels compute whole blocks of channels, so a width costs what the next multiple costs."""
WIDTHS = 12
"""Numbers of output channels at most at which an operator is timed."""
INPUTS = 4
"""Numbers of input channels at most at which it is timed, for each of these."""
FRACTIONS = (0.75, 0.5, 0.25, 0.9)
"""Of all units: around these, at random widths, are the whole files that the sum over the operators is fitted to."""
FITTED = 11
"""How many of them, beside the unpruned one."""
NOISY = 0.1
"""Error of the fit from which everything is timed once more."""
NEAR = 0.1
"""How far apart, as a fraction, predictions may be whose errors are held to be alike."""
RIDGE = 0.01
"""How strongly the factors of the fit are held together."""
AT_ONCE, BYTES_AT_ONCE = 64, 2**28
"""Files that are timed in turns, and bytes of them, before what was found is written down."""
CHECKS = 4
"""Other such files, which the fit is then checked on."""


MakeFile = Callable[[], bytes]


@dataclass(frozen=True)
class _Curve:
    """ms of one operator over its widths: bilinear between the stairs.

    Attributes:
        operator: where it stands in the file, and its units.
        channels: channels that each unit of `makes` counts for, and of `reads`.
        widths: units out, ascending; inputs: units in, ascending.
        times: ms, shape (inputs, widths).
    """

    operator: Operator
    channels: tuple[float, float]
    widths: np.ndarray
    inputs: np.ndarray
    times: np.ndarray
    asked: dict[tuple, float] = field(default_factory=dict)

    def at(self, makes: float, reads: float) -> float:
        if (makes, reads) not in self.asked:
            column = _stair(makes, self.widths, self.channels[0])
            row = _stair(reads, self.inputs, self.channels[1])
            by_input = [np.interp(column, self.widths, times) for times in self.times]
            self.asked[makes, reads] = float(np.interp(row, self.inputs, by_input))
        return self.asked[makes, reads]


def _stair(units: float, known: np.ndarray, channels: float) -> float:
    """The number of units at the next edge of a stair, where the cost of this one is known."""
    if len(known) < 2:
        return units
    step = max(1.0, STEP / channels)
    return min(math.ceil(units / step - 1e-9) * step, float(known[-1]))


class LatencyTable(FileMeasure):
    """Milliseconds of a network on a device, as a function of what is removed: `keras_prune.plan(..., measure=table)`.

    Nothing is measured before it is first called. Timings are kept on disk by device, runtime and version: the second
    table for the same network takes seconds.

    Args:
        device: a name ("cpu", "ethos-u55-128", ...) or a Device; one that has a latency.
        model, recipe, data, input_shape: as in `FileMeasure`.
        cache: folder for the timings. None: `tflite_export` in the user's cache folder; False: none are kept.
        progress: show a progress bar.

    Attributes:
        blueprint: the file and its widths; None before the first call.
        types, factors, offset: whole file = offset ms + over the types of operators, factor x (ms of those alone).
        error: median relative error of the prediction on whole files of random widths, none of which it was fitted to;
            NaN where the file cannot be had at other widths.
        untimed: operators that the device has no latency for; they count as nothing.

    Raises:
        ValueError, TypeError: unknown names, or a model that cannot be exported.

    Example:
        >>> table = LatencyTable("cpu", model, "int8")                     # doctest: +SKIP
        >>> small = keras_prune.prune(model, 0.5, measure=table)           # doctest: +SKIP
        >>> print(table)                                                   # doctest: +SKIP
    """

    __name__ = "latency_ms"

    def __init__(
        self,
        device: str | Device,
        model,
        recipe: str | Recipe = "float32",
        data=None,
        *,
        input_shape=None,
        cache: str | os.PathLike | bool | None = None,
        progress: bool = False,
    ):
        super().__init__(model, recipe, data, input_shape=input_shape)
        self.device, self.progress = device_named(device), progress
        self._times = _Timings(self.device, cache)
        self.types: list[str] = []
        self.factors, self.offset, self.error = np.zeros(0), 0.0, math.nan
        self._corrections: dict[float, float] = {}  # prediction by the factors -> what was measured there ÷ it
        self.untimed: tuple[str, ...] = ()
        self._curves: list[_Curve] = []

    def _cost(self, alive: np.ndarray) -> float:
        plain = float(self._sums(alive) @ self.factors + self.offset)
        return plain * self._correction(plain)

    def _correction(self, plain: float) -> float:
        """What was measured ÷ predicted here; else the largest found near by, so that a choice that is made again and
        again comes down to what was asked for; else between those further off."""
        known = self._corrections
        if plain in known:
            return known[plain]
        near = [factor for at, factor in known.items() if abs(at / plain - 1) < NEAR]
        places = sorted(known)
        return max(near) if near else float(np.interp(plain, places, [known[place] for place in places]))

    def _sums(self, alive: np.ndarray) -> np.ndarray:
        """ms of the operators timed alone, summed by type."""
        counts = np.bincount(self._owners, alive[self._units], 2 * len(self._curves))
        times = [curve.at(counts[2 * k], counts[2 * k + 1]) for k, curve in enumerate(self._curves)]
        return np.bincount(self._types, times, len(self.types))

    # -- timing ----------------------------------------------------------------------------------------------------

    def _prepare(self, blueprint: Blueprint, content: bytes, channels) -> None:
        grids = [_grid(blueprint, operator, channels.unit_count) for operator in _running(blueprint)]
        wholes = list(_whole_files(blueprint, content, channels))
        files = [make for grid in grids for make in grid.files] + [make for _, make in wholes]
        self._read(grids, wholes, self._times.of(files, self.progress))
        if self.error > NOISY and self.device.is_measured:  # something else ran: it can only have made things slower
            self._read(grids, wholes, self._times.of(files, self.progress, anew=True))
        self._whole = content

    def _read(self, grids: list, wholes: list, times: list[float]) -> None:
        self._curves, untimed, start = [], [], 0
        for grid in grids:
            found = np.array(times[start : start + len(grid.files)])
            start += len(grid.files)
            if np.isnan(found).any():
                untimed.append(grid.operator.name)
            else:
                self._curves.append(grid.curve(found))
        self.untimed = tuple(dict.fromkeys(untimed))
        units = [ids for curve in self._curves for ids in (curve.operator.makes, curve.operator.reads)]
        self._units = np.concatenate([*units, np.zeros(0, int)]).astype(int)
        self._owners = np.repeat(np.arange(len(units)), [len(ids) for ids in units])
        names = [curve.operator.name for curve in self._curves]
        self.types = sorted(set(names))
        self._types = np.array([self.types.index(name) for name in names], int)
        self._fit([alive for alive, _ in wholes], np.array(times[start:]))

    def _fit(self, alive: list[np.ndarray], whole: np.ndarray) -> None:
        """A factor per type of operator and an offset, by least squares of relative errors; checked on other files."""
        sums = np.array([self._sums(each) for each in alive])
        if not sums.any() or np.isnan(whole).any():
            raise ValueError(
                f"The device {self.device.name!r} has no latency for this network as {self.recipe.name}: "
                f"{', '.join(self.untimed) or 'nothing in it takes time'}."
            )
        fitted = slice(0, max(1, len(whole) - CHECKS))
        self.factors, self.offset = _factors(sums[fitted], whole[fitted])
        guess = sums @ self.factors + self.offset
        self.error = float(np.median(np.abs(guess / whole - 1)[fitted.stop :])) if len(whole) > 1 else math.nan
        self._corrections = {float(guess[0]): float(whole[0] / guess[0])}

    def refine(self, channels, removed: Iterable[int] = ()) -> float:
        """Time the whole file at these widths and correct the prediction there.

        Widths that were chosen by a prediction are widths where it errs in its own favour; `keras_prune.plan` therefore
        calls this for what it chose, and chooses again.

        Returns:
            measured ÷ predicted ms; 1.0 where the file cannot be had at these widths.
        """
        predicted, alive = self(channels, removed), channels.alive(removed)
        measured = math.nan if self.blueprint.fixed else self._times.beside(self._whole, self.blueprint.cut(alive))
        if math.isnan(measured):
            return 1.0
        plain = float(self._sums(alive) @ self.factors + self.offset)
        self._corrections[plain] = measured / plain
        return measured / predicted

    # -- what it says ------------------------------------------------------------------------------------------------

    def operators(self, channels, removed: Iterable[int] = ()) -> list[tuple[str, str, float]]:
        """(operator, name of its output, ms) of each, the slowest first: where the time goes."""
        self(channels, removed)
        alive = channels.alive(removed)
        tensors = self.blueprint.graph.tensors
        rows = []
        for curve in self._curves:
            one = curve.at(int(alive[curve.operator.makes].sum()), int(alive[curve.operator.reads].sum()))
            name = tensors[curve.operator.outputs[0]].name.decode().split(";")[-1]
            rows.append((curve.operator.name, name, self.factors[self.types.index(curve.operator.name)] * one))
        return sorted(rows, key=lambda row: -row[2])

    def __str__(self) -> str:
        rows = [("latency table", f"{self.model.name}, {self.recipe.name}"), ("device", self.device.identity())]
        if self.blueprint is None:
            return aligned([*rows, ("timed", "not yet: at its first call")])
        shapes = sum(curve.times.size for curve in self._curves)
        rows.append(("timed", f"{len(self._curves)} operators at {shapes} widths"))
        factors = " + ".join(f"{factor:.2f} {name}" for name, factor in zip(self.types, self.factors))
        rows.append(("whole file", f"{factors} + {self.offset:.3f} ms"))
        if not math.isnan(self.error):
            rows.append(("error", f"{self.error:.1%}, median on {CHECKS} networks of random widths"))
        fixed = [operator.name for operator in self.blueprint.fixed]
        if fixed:
            rows.append(("fixed", f"counted at full width: {', '.join(sorted(set(fixed)))}"))
        if self.untimed:
            rows.append(("not timed", ", ".join(self.untimed)))
        return aligned(rows)


@dataclass(frozen=True)
class _Grid:
    """The files in which one operator is timed, made when they are needed."""

    operator: Operator
    channels: tuple[float, float]
    widths: np.ndarray
    inputs: np.ndarray
    files: list[MakeFile]

    def curve(self, times: np.ndarray) -> _Curve:
        shape = len(self.inputs), len(self.widths)
        return _Curve(self.operator, self.channels, self.widths, self.inputs, times.reshape(shape))


def _running(blueprint: Blueprint) -> list[Operator]:
    """Operators that run: constants are unpacked once, before the first invocation."""
    return [o for o in blueprint.operators if not all(blueprint.is_constant(t) for t in o.outputs)]


def _grid(blueprint: Blueprint, operator: Operator, unit_count: int) -> _Grid:
    made = _channels(operator, operator.axes[len(operator.inputs) :], operator.makes)
    read = _channels(operator, operator.axes[: len(operator.inputs)], operator.reads)
    widths = _points(len(operator.makes), made, WIDTHS)
    inputs = _points(len(operator.reads), read, INPUTS)
    files = []
    for reads, makes in itertools.product(inputs, widths):
        alive = np.ones(unit_count, bool)
        alive[operator.makes[makes:]] = alive[operator.reads[reads:]] = False
        files.append(functools.partial(blueprint.cut, alive, [operator.index]))
    return _Grid(operator, (made, read), widths, inputs, files)


def _channels(operator: Operator, axes: list[dict], units: np.ndarray) -> float:
    """Channels per unit, on the axis of these tensors that has most of them."""
    most = max((int(np.isin(ids, units).sum()) for each in axes for ids in each.values()), default=0)
    return max(1.0, most / len(units)) if len(units) else 1.0


def _points(units: int, channels: float, at_most: int) -> np.ndarray:
    """Numbers of units at edges of stairs, ascending, the last all of them; evenly spread if there are too many."""
    step = max(1, round(STEP / channels))
    edges = np.append(np.arange(step, units, step), units) if units else np.zeros(1, int)
    if len(edges) <= at_most:
        return edges
    return edges[np.unique(np.linspace(0, len(edges) - 1, at_most).round().astype(int))]


def _whole_files(blueprint: Blueprint, content: bytes, channels) -> Iterator[tuple[np.ndarray, MakeFile]]:
    """(units alive, how to make the file): whole, then at random widths around different fractions of all units."""
    everything = np.ones(channels.unit_count, bool)
    yield everything, lambda: content
    random = np.random.default_rng(0)
    for fraction in [] if blueprint.fixed else np.resize(FRACTIONS, FITTED + CHECKS):
        alive = everything.copy()
        for group in channels.groups:
            kept = np.clip(fraction + random.uniform(-0.25, 0.25), 0, 1) * len(group.units)
            alive[group.units[max(1, round(kept)) :]] = False
        yield alive, functools.partial(blueprint.cut, alive)


def _factors(sums: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, float]:
    """(factor per type, offset), none of them negative, that make whole = sums @ factors + offset.

    Args:
        sums: shape (files, types); whole: ms, shape (files,).
    """
    common = float(np.mean(whole / sums.sum(1)))
    columns = np.append(sums, np.ones((len(whole), 1)), 1) / whole[:, None]
    # Ridge towards one factor for all: a type that hardly takes time says nothing about its own.
    weights = np.sqrt(RIDGE) / np.append(np.full(sums.shape[1], common), whole.min())
    start = np.append(np.full(sums.shape[1], common), 0.0)
    matrix = np.concatenate([columns, np.diag(weights)])
    wanted = np.concatenate([np.ones(len(whole)), weights * start])
    free = np.ones(len(start), bool)
    while True:
        found = np.zeros(len(start))
        found[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        if (found >= 0).all():
            return found[:-1], float(found[-1])
        free &= found > 0


class _Timings:
    """ms of files on a device, kept on disk by what they compute: equal operators of equal sizes are timed once."""

    def __init__(self, device: Device, cache):
        self.device = device
        self.path = None if cache is False else _cache_file(device.identity(), cache)
        self.known: dict[str, float] = _loaded(self.path)

    def of(self, files: list[MakeFile], progress: bool = False, anew: bool = False) -> list[float]:
        """ms of each; NaN where the device has none. `anew`: also of what is known, and the shorter time counts."""
        from rich.progress import Progress

        keys, waiting, found = [], {}, {} if anew else self.known
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task(f"timing on {self.device.name}", total=len(files))
            for make in files:
                content = make()
                keys.append(flatbuffer.fingerprint(content))
                if keys[-1] not in found:
                    waiting[keys[-1]] = content
                if len(waiting) >= AT_ONCE or sum(map(len, waiting.values())) > BYTES_AT_ONCE:
                    self._measure(waiting, found)
                bar.advance(task)
            self._measure(waiting, found)
        return [self.known[key] for key in keys]

    def beside(self, whole: bytes, content: bytes) -> float:
        """ms of a file, timed in turns with another whose time is known, if timings are disturbed by what else runs."""
        key = flatbuffer.fingerprint(content)
        if key not in self.known and self.device.is_measured:
            before, after = self.device.milliseconds([whole, content])
            self.known[key] = self.of([lambda: whole])[0] * after / before
            self._save()
        return self.of([lambda: content])[0]

    def _measure(self, waiting: dict[str, bytes], found: dict[str, float]) -> None:
        """Time what is waiting, and write it down."""
        if waiting:
            found.update(zip(waiting, self._milliseconds(list(waiting.values()))))
            self.known.update({key: min(found[key], self.known.get(key, math.inf)) for key in waiting})
            waiting.clear()
            self._save()

    def _milliseconds(self, files: list[bytes]) -> list[float]:
        try:
            return self.device.milliseconds(files)
        except ValueError:
            if len(files) == 1:
                return [math.nan]
            return [time for content in files for time in self._milliseconds([content])]

    def _save(self) -> None:
        """Together with what another process has written meanwhile; whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {key: None if math.isnan(ms) else ms for key, ms in {**_loaded(self.path), **self.known}.items()}
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
            json.dump({"device": self.device.identity(), "milliseconds": content}, file)
        os.replace(file.name, self.path)


def _cache_file(identity: str, cache) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "tflite_export" if cache is None or cache is True else Path(cache)
    name = re.sub(r"[^a-z0-9]+", "-", identity.lower())[:60].strip("-")
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def _loaded(path: Path | None) -> dict[str, float]:
    if path is None or not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())["milliseconds"]
        return {key: math.nan if ms is None else float(ms) for key, ms in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # damaged: what it held is timed again


def latency_ms(channels, removed: Iterable[int] = ()) -> float:
    """ms of the float32 file on this machine's CPU, one thread; `LatencyTable` has other devices and recipes."""
    return for_channels(channels, _on_this_cpu)(channels, removed)


def _on_this_cpu(model) -> LatencyTable:
    return LatencyTable("cpu", model)
