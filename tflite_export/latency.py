"""Floor 2. How long a .tflite file takes on this machine, alone or against another file."""

import math
import os
import platform
import time
from dataclasses import dataclass

import numpy as np

from tflite_export.records import Record, aligned
from tflite_export.runner import Runner

_WARM_UP = 3
_BLOCK_MS = 1.0  # in `benchmark` a file that takes less than this is run several times per round


@dataclass(frozen=True)
class Latency(Record):
    """Time per invocation of one file, in ms, one batch each.

    Attributes:
        median, p10, p90: ms over all runs.
        runs: how many were timed; fewer than asked for if the time limit came first.
        threads: of the interpreter.
        batch_size: samples per invocation.
        cpu: name of the CPU.
        runtime: name and version of the interpreter.
        delegate: what took operators over from the built-in kernels; "none" if nothing did.
    """

    median: float
    p10: float
    p90: float
    runs: int
    threads: int
    batch_size: int
    cpu: str
    runtime: str
    delegate: str

    def __str__(self) -> str:
        times = f"median {self.median:.3f} ms (p10 {self.p10:.3f}, p90 {self.p90:.3f}) of {self.runs} runs"
        return aligned([("latency", times), ("", f"{self.threads} thread(s), batch {self.batch_size}, {self.cpu}"),
                        ("", f"{self.runtime}, delegate: {self.delegate}")])  # fmt: skip


@dataclass(frozen=True)
class Benchmark(Record):
    """Two files timed in turns.

    Attributes:
        ratio, ratio_p10, ratio_p90: time of b / time of a, within one round each; median over the rounds. Below 1, b
            is faster.
        a, b: Latency of each file over the same rounds.
        path_a, path_b: the files.
        rounds: how many.
    """

    ratio: float
    ratio_p10: float
    ratio_p90: float
    a: Latency
    b: Latency
    path_a: str
    path_b: str
    rounds: int

    def __str__(self) -> str:
        rows = [
            (
                "ratio b / a",
                f"median {self.ratio:.3f} (p10 {self.ratio_p10:.3f}, p90 {self.ratio_p90:.3f}) of {self.rounds} rounds",
            ),
            (
                "a",
                f"{self.a.median:.3f} ms (p10 {self.a.p10:.3f}, p90 {self.a.p90:.3f})  {self.path_a}, delegate: "
                f"{self.a.delegate}",
            ),
            (
                "b",
                f"{self.b.median:.3f} ms (p10 {self.b.p10:.3f}, p90 {self.b.p90:.3f})  {self.path_b}, delegate: "
                f"{self.b.delegate}",
            ),
            ("machine", f"{self.a.cpu}, {self.a.threads} thread(s), {self.a.runtime}"),
        ]
        return aligned(rows)


def measure_latency(
    model: str | os.PathLike | bytes | Runner, *, threads: int = 1, runs: int = 50, max_seconds: float = 10.0
) -> Latency:
    """Times a file's invocations on generated inputs, after a few unmeasured ones.

    Args:
        model: path, bytes or Runner of a .tflite file.
        threads: CPU threads; a Runner keeps its own.
        runs: invocations to time, from 1.
        max_seconds: the measurement ends early after this time, but never before 3 runs (or `runs`, if that is less).

    Raises:
        ValueError: bad arguments or a file that is not whole.

    Example:
        >>> print(measure_latency("small.tflite", threads=2))       # doctest: +SKIP
    """
    _check_runs(runs)
    runner = model if isinstance(model, Runner) else Runner(model, threads)
    _warm(runner)
    times, end = [], time.perf_counter() + max_seconds
    while len(times) < runs and (len(times) < 3 or time.perf_counter() < end):
        times.append(_block(runner, 1))
    return _latency(runner, times)


def benchmark(
    a: str | os.PathLike | bytes,
    b: str | os.PathLike | bytes,
    *,
    threads: int = 1,
    runs: int = 50,
    max_seconds: float = 30.0,
) -> Benchmark:
    """Times two files in turns (A B A B ...) and compares them round by round.

    Machines get slower and faster by themselves, within seconds. Both files of one round meet the same machine, so
    their ratio is steadier than the ratio of two latencies measured one after the other.

    Args:
        a, b: path or bytes of a .tflite file.
        threads: CPU threads for each.
        runs: rounds, from 1. A file that takes under 1 ms runs several times in each.
        max_seconds: the measurement ends early after this time, but never before 3 rounds (or `runs`, if that is less).

    Raises:
        ValueError: bad arguments or a file that is not whole.

    Example:
        >>> print(benchmark("before.tflite", "after.tflite").ratio)  # doctest: +SKIP
        0.52
    """
    _check_runs(runs)
    runners = [Runner(a, threads), Runner(b, threads)]
    repeats = [min(1000, math.ceil(_BLOCK_MS / max(_warm(runner), 1e-3))) for runner in runners]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + max_seconds
    while len(times[0]) < runs and (len(times[0]) < 3 or time.perf_counter() < end):
        for series, runner, repeat in zip(times, runners, repeats, strict=True):
            series.append(_block(runner, repeat))
    low, median, high = np.percentile(np.array(times[1]) / np.array(times[0]), [10, 50, 90])
    first, second = (_latency(runner, series) for runner, series in zip(runners, times, strict=True))
    return Benchmark(
        float(median), float(low), float(high), first, second, runners[0].source, runners[1].source, len(times[0])
    )


def cpu_name() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.lower().startswith(("model name", "hardware"))
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown CPU"


def _check_runs(runs: int) -> None:
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise ValueError(f"runs={runs!r} was passed; expected a whole number from 1.")


def _warm(runner: Runner) -> float:
    """Runs a file a few times, so that caches and the delegate are ready. Returns the last time in ms."""
    runner.set(runner.random_inputs())
    return [_block(runner, 1) for _ in range(_WARM_UP)][-1]


def _block(runner: Runner, repeat: int) -> float:
    """ms per invocation, over `repeat` invocations in a row."""
    invoke = runner.interpreter.invoke
    start = time.perf_counter()
    for _ in range(repeat):
        invoke()
    return 1000 * (time.perf_counter() - start) / repeat


def _latency(runner: Runner, times: list[float]) -> Latency:
    low, median, high = (float(value) for value in np.percentile(times, [10, 50, 90]))
    return Latency(
        median, low, high, len(times), runner.threads, runner.batch_size, cpu_name(), runner.runtime, runner.delegate
    )
