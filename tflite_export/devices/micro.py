"""Floor 3. The device "micro": LiteRT for Microcontrollers, run here. It gives bytes and outputs, and no latency."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np

from tflite_export.devices.base import Device, Fit
from tflite_export.devices.graph import external_buffers
from tflite_export.runner import Port, Runner, first_line

_ARENA = 2**29  # bytes; memory that is not used is not taken
_SECONDS = 300
_FREE_STEPS = 3  # rounding differs between kernels by this many steps of an output's scale
_TOLERANCE = {True: 0.25, False: 1e-3}  # files of integers, of floats: largest difference / largest output
# What a process ends with where a check inside the runtime fails.
_SIGNALS = {6: ", a failed check; files of networks that were never trained, with scales near 0, did that"}


@dataclass(frozen=True)
class _Run:
    arena: int | None  # bytes; None if the run failed
    outputs: tuple[np.ndarray, ...]
    log: str


class Micro(Device):
    """A microcontroller with LiteRT for Microcontrollers. Needs the package tflite-micro: pip install
    'keras_prune[micro]'.

    The file is really run, by the reference kernels of that runtime on this machine, and its outputs are compared with
    those of LiteRT. Its latency on a microcontroller is not known here.

    Args:
        arena_bytes: RAM for the tensor arena; a file that needs more does not run. None: no limit.
        flash_bytes: room for the file; a file that is larger does not run. None: no limit.

    Example:
        >>> print(Micro(arena_bytes=64 * 1024).examine("small.tflite"))             # doctest: +SKIP
    """

    name = "micro"
    summary = "LiteRT for Microcontrollers, run here: arena and flash bytes, outputs checked; no latency."

    def __init__(self, arena_bytes: int | None = None, flash_bytes: int | None = None):
        for name, limit in (("arena_bytes", arena_bytes), ("flash_bytes", flash_bytes)):
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise ValueError(f"{name}={limit!r} was passed; expected a number of bytes from 1, or None.")
        self.arena_bytes, self.flash_bytes = arena_bytes, flash_bytes

    def identity(self) -> str:
        return f"{self.name}, tflite-micro {_version()}"

    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        runner = Runner(model)
        version, size = _version(), len(runner.content)
        problems, notes, arena = [], [], None
        outside = external_buffers(runner.content)
        if outside:
            problems.append(
                f"The numbers of {outside} tensors lie in external buffers, which LiteRT for Microcontrollers does not "
                "read: it would compute nonsense without an error. tflite_export.quantizer.inline(content) puts them "
                "back; files written by tflite_export have none."
            )
        else:
            arena = self._tried(runner, problems, notes)
        problems += _beyond(arena, self.arena_bytes, "arena", "arena_bytes")
        problems += _beyond(size, self.flash_bytes, "file", "flash_bytes")
        return Fit(
            device=self.name,
            runs=not problems,
            problems=tuple(problems),
            fallbacks=(),
            latency_ms=None,
            latency_by="",
            sram_bytes=arena,
            flash_bytes=size,
            notes=tuple(notes),
            versions={"tflite-micro": version},
        )

    def _tried(self, runner: Runner, problems: list[str], notes: list[str]) -> int | None:
        """The arena in bytes, if the file runs; what is to be said goes into `problems` and `notes`."""
        try:
            run = _run(runner)
        except ValueError as error:  # a size is left open
            problems.append(first_line(error))
            return None
        if run.arena is None:
            problems.append(_explained(run.log))
            return None
        problems += _differences(runner, run, notes)
        notes.append(
            "The arena was measured with reference kernels on a machine with 64-bit pointers; optimised kernels may "
            "need more, 32-bit pointers need less. Code and stack come on top."
        )
        return run.arena

    def compile(self, content: bytes) -> bytes:
        raise ValueError(
            "The device 'micro' needs no compiler: the .tflite file itself is linked into the program, as a C array."
        )


def _run(runner: Runner) -> _Run:
    """One invocation on generated inputs, in a process of its own."""
    inputs = runner.random_inputs()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "model.tflite").write_bytes(runner.content)
        counts = {"arena": _ARENA, "inputs": len(inputs), "outputs": len(runner.outputs)}
        (place / "job.json").write_text(json.dumps(counts), encoding="utf-8")
        for at, (port, array) in enumerate(zip(runner.inputs, inputs, strict=True)):
            np.save(place / f"input_{at}.npy", port.store(array))
        program = Path(__file__).with_name("micro_process.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", program]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return _Run(None, (), f"it did not end within {_SECONDS} s")
        log = done.stderr.decode(errors="replace")
        if done.returncode < 0:
            log = f"its process ended with signal {-done.returncode}{_SIGNALS.get(-done.returncode, '')}"
        total = re.search(r"Arena allocation total (\d+) bytes", log)
        if done.returncode or not total:
            return _Run(None, (), log)
        outputs = tuple(np.load(place / f"output_{at}.npy") for at in range(len(runner.outputs)))
        return _Run(int(total[1]), outputs, log)


def _explained(log: str) -> str:
    """What LiteRT for Microcontrollers says to a file that it does not run, as one sentence."""
    missing = re.search(r"Didn't find op for builtin opcode '(\w+)'", log)
    if missing:
        return f"LiteRT for Microcontrollers has no kernel for the operator {missing[1]}."
    if "Hybrid models are not supported" in log:
        return (
            "The file has int8 weights and float activations, which LiteRT for Microcontrollers does not compute: "
            "export it with recipe='int8'."
        )
    failed = re.search(r"Node (\w+) \(number \d+\) failed to (\w+)", log)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if failed:
        reason = next((line for line in lines if "Node" not in line), "it gives no reason")[:200].rstrip(".")
        return f"The operator {failed[1]} failed to {failed[2]} in LiteRT for Microcontrollers: {reason}."
    return f"LiteRT for Microcontrollers does not run the file: {lines[-1][:200] if lines else 'it gives no reason'}."


def _differences(runner: Runner, run: _Run, notes: list[str]) -> list[str]:
    """Compares the outputs with LiteRT's. Adds what was found to `notes`; returns the problems."""
    runner.set(runner.random_inputs())
    runner.interpreter.invoke()
    problems = []
    integers = any("QUANTIZE" in name for name in runner.operators) or any(port.scale for port in runner.outputs)
    for detail, port, got in zip(runner.interpreter.get_output_details(), runner.outputs, run.outputs, strict=True):
        text, far = _difference(port, runner.interpreter.get_tensor(detail["index"]), got, integers)
        if far:
            problems.append(f"Its output {port.name!r} differs from LiteRT's on one generated input {text}.")
        else:
            notes.append(f"The output {port.name!r} agrees with LiteRT's on one generated input; they differ {text}.")
    return problems


def _difference(port: Port, expected: np.ndarray, got: np.ndarray, integers: bool) -> tuple[str, bool]:
    """The largest difference in words, and whether it is more than kernels that round differently explain.

    `integers`: whether the file computes in integers, as a file with float outputs may do inside.
    """
    if expected.shape != got.shape:
        return f"in its shape, {got.shape} instead of {expected.shape}", True
    with np.errstate(invalid="ignore"):
        errors = np.abs(port.real(expected).astype("float64") - port.real(got).astype("float64"))
    largest, step = float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0)), port.scale or 0.0
    peak = float(np.abs(port.real(expected)).max(initial=0.0))
    text = f"by {largest / step:.0f} steps of its scale at most" if step else f"by {largest:.3g} at most, of {peak:.3g}"
    return text, bool(max(0.0, largest - _FREE_STEPS * step) > _TOLERANCE[integers] * peak)


def _beyond(needed: int | None, limit: int | None, what: str, name: str) -> list[str]:
    if needed is None or limit is None or needed <= limit:
        return []
    return [f"The {what} needs {needed} bytes, {needed - limit} more than {name}={limit}."]


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        if util.find_spec("tflite_micro"):
            return metadata.version("tflite-micro")
    raise ImportError("The device 'micro' needs tflite-micro: pip install 'keras_prune[micro]'.")
