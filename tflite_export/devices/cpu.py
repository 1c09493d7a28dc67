"""Floor 3. The device "cpu": LiteRT with XNNPACK on this machine, measured."""

import math
import os
import statistics
import time
from collections.abc import Sequence
from importlib import metadata

from tflite_export.devices.base import Device, Fit, plural
from tflite_export.latency import cpu_name, measure_latency
from tflite_export.runner import Runner, check_threads, first_line

_AT_ONCE = 256 * 2**20  # bytes of files that are loaded at the same time


class Cpu(Device):
    """LiteRT with its XNNPACK delegate on the CPU of this machine. Latencies are measured.

    Args:
        threads: CPU threads of the interpreter.
        runs: timed invocations in `examine`.
        rounds: in `milliseconds`: every file gets one block of invocations in each round.
        block_ms: how long such a block takes about; a file that is slower than that is run twice.

    Example:
        >>> print(Cpu(threads=2).examine("small.tflite"))            # doctest: +SKIP
    """

    name = "cpu"
    is_measured = True
    summary = "LiteRT with XNNPACK on this machine; latency measured."

    def __init__(self, threads: int = 1, *, runs: int = 50, rounds: int = 7, block_ms: float = 3.0):
        check_threads(threads)
        if min(runs, rounds) < 1 or not block_ms > 0:
            raise ValueError(f"runs={runs}, rounds={rounds}, block_ms={block_ms} were passed; expected positive ones.")
        self.threads, self.runs, self.rounds, self.block_ms = threads, runs, rounds, block_ms

    def identity(self) -> str:
        return f"cpu, {cpu_name()}, {plural(self.threads, 'thread')}, ai-edge-litert {_version()}"

    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        runner = Runner(model, self.threads)
        problems, latency, by, notes = [], None, "", []
        try:
            measured = measure_latency(runner, runs=self.runs)
        except (ValueError, RuntimeError) as error:
            problems.append(first_line(error))
        else:
            latency = measured.median
            by = (
                f"measured: median of {plural(measured.runs, 'run')}, {plural(self.threads, 'thread')}, "
                f"{measured.cpu}, {measured.runtime}, delegate {measured.delegate}"
            )
            notes.append("The latency is that of this machine, not of a phone.")
        return Fit(
            device=self.name,
            runs=not problems,
            problems=tuple(problems),
            fallbacks=(),
            latency_ms=latency,
            latency_by=by,
            sram_bytes=None,
            flash_bytes=len(runner.content),
            notes=tuple(notes),
            versions={"ai-edge-litert": _version()},
        )

    def milliseconds(self, files: Sequence[bytes]) -> list[float]:
        """ms of each file: the median over rounds of the fastest invocation in a block.

        The files take turns, so that a machine that gets slower or faster meanwhile does so for all of them; the
        fastest of a block is what the code takes when nothing disturbs it.
        """
        times: list[float] = []
        for group in _groups(files):
            runners = [self._ready(content) for content in group]
            repeats = [_repeats(runner, self.block_ms) for runner in runners]
            blocks = [[_fastest(runner, many) for runner, many in zip(runners, repeats)] for _ in range(self.rounds)]
            times += [statistics.median(series) for series in zip(*blocks)]
        return times

    def compile(self, content: bytes) -> bytes:
        raise ValueError("The device 'cpu' needs no compiler: the .tflite file itself is what runs.")

    def _ready(self, content: bytes) -> Runner:
        runner = Runner(content, self.threads)
        runner.set(runner.random_inputs())
        return runner


def _groups(files: Sequence[bytes]) -> list[list[bytes]]:
    """The files in their order, cut where the memory limit is reached."""
    groups, size = [[]], 0
    for content in files:
        if groups[-1] and size + len(content) > _AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(content)
        size += len(content)
    return groups if files else []


def _repeats(runner: Runner, block_ms: float) -> int:
    return max(2, min(1000, math.ceil(block_ms / max(_fastest(runner, 3), 1e-3))))


def _fastest(runner: Runner, many: int) -> float:
    invoke, best = runner.interpreter.invoke, math.inf
    for _ in range(many):
        start = time.perf_counter()
        invoke()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def _version() -> str:
    try:
        return metadata.version("ai-edge-litert")
    except metadata.PackageNotFoundError:
        return "not installed"
