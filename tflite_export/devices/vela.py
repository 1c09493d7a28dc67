"""Floor 3. Arm's Ethos-U NPUs, through the Vela compiler in this process. Latencies are the compiler's estimates."""

import configparser
import contextlib
import csv
import glob
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from tflite_export import flatbuffer
from tflite_export.devices.base import Device, Fallback, Fit, plural
from tflite_export.devices.graph import steps
from tflite_export.runner import Runner, first_line
from tflite_export.silence import quiet

ETHOS = (
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
)
_ON_NPU = "CUSTOM:ethos-u"
_UNSAID = "Vela gives no reason"
# What Vela itself takes when nothing is said, but with warnings.
_DEFAULTS = {
    "ethos-u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ("Ethos_U65_Client_Server", "Dedicated_Sram_384KB"),
    "ethos-u85": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}


@dataclass(frozen=True)
class _Compiled:
    content: bytes
    summary: dict[str, str]  # the columns of Vela's summary file
    log: str


class Ethos(Device):
    """An Ethos-U NPU beside a Cortex-M or Cortex-A. Needs the package ethos-u-vela: pip install 'keras_prune[vela]'.

    Args:
        name: "ethos-u55-128" and so on: the family, and its MACs per cycle.
        system_config: clock and memories, a section [System_Config.NAME] of the configuration file.
        memory_mode: what lies in which memory, a section [Memory_Mode.NAME].
        config: the configuration file; None is Arm's vela.ini, which comes with Vela. Ask the maker of your board for
            the right one: a latency is estimated for these memories and this clock.

    Example:
        >>> print(Ethos("ethos-u55-128", memory_mode="Sram_Only").examine("small.tflite"))     # doctest: +SKIP
    """

    def __init__(
        self,
        name: str = "ethos-u55-128",
        system_config: str | None = None,
        memory_mode: str | None = None,
        *,
        config: str | os.PathLike | None = None,
    ):
        if name not in ETHOS:
            raise ValueError(f"name={name!r} is not known. Known: {', '.join(ETHOS)}.")
        self.name = name
        self.summary = f"Arm {name.replace('ethos-u', 'Ethos-U')} through the Vela compiler; latency estimated by it."
        system, memory = _DEFAULTS[name.rpartition("-")[0]]
        self.system_config, self.memory_mode = system_config or system, memory_mode or memory
        self.config = os.path.join("Arm", "vela.ini") if config is None else os.path.abspath(os.fspath(config))

    def identity(self) -> str:
        return f"{self.name}, ethos-u-vela {_version()}, {self.system_config}, {self.memory_mode}, {self.config}"

    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        runner = Runner(model)
        self._check_settings()
        try:
            compiled = self._compiled(runner)
        except ValueError as error:
            return self._fit(problems=(str(error),))
        fallbacks = _fallbacks(compiled)
        problems = _problems(runner, compiled, fallbacks)
        if problems:
            return self._fit(problems=tuple(problems), fallbacks=fallbacks)
        summary, left, notes = compiled.summary, sum(fallback.count for fallback in fallbacks), []
        for column, memory in (("dram_memory_used", "DRAM"), ("on_chip_flash_memory_used", "on-chip flash")):
            used = round(1024 * float(summary[column]))
            notes += [f"Vela plans {used} bytes of {memory}."] * bool(used)
        notes.append("Interpreter and drivers need memory of their own beside the SRAM and the flash stated here.")
        clock = f"{float(summary['core_clock']) / 1e6:g} MHz"
        by = f"estimated by ethos-u-vela {_version()}: {self.system_config}, {self.memory_mode}, {clock}"
        return self._fit(
            fallbacks=fallbacks,
            latency_ms=1000 * float(summary["inference_time"]),
            latency_by=by + (f", without the {plural(left, 'operator')} on the CPU" if left else ""),
            sram_bytes=round(1024 * float(summary["sram_memory_used"])),
            flash_bytes=len(compiled.content),
            notes=tuple(notes),
        )

    def _fit(self, **fields) -> Fit:
        """A Fit of this device in which what is not known is empty."""
        empty = {"problems": (), "fallbacks": (), "latency_ms": None, "latency_by": "", "sram_bytes": None}
        empty |= {"flash_bytes": None, "notes": (), "versions": {"ethos-u-vela": _version()}}
        return Fit(device=self.name, runs="problems" not in fields, **(empty | fields))

    def milliseconds(self, files: Sequence[bytes]) -> list[float]:
        """Vela's estimate of each file. A file that Vela leaves to the CPU as a whole is an error, not 0 ms.

        Of a file that is partly left to the CPU the estimate counts the NPU's part alone; `examine` tells them apart.
        """
        self._check_settings()
        times = []
        for at, content in enumerate(files):
            runner = Runner(content)
            compiled = self._compiled(runner)
            if _ON_NPU not in flatbuffer.operators(compiled.content):
                raise ValueError(f"File {at}: {_problems(runner, compiled, _fallbacks(compiled))[0]}")
            times.append(1000 * float(compiled.summary["inference_time"]))
        return times

    def compile(self, content: bytes) -> bytes:
        runner = Runner(content)
        self._check_settings()
        compiled = self._compiled(runner)
        problems = _problems(runner, compiled, _fallbacks(compiled))
        if problems:
            raise ValueError(f"{self.name}: {problems[0]}")
        return compiled.content

    def _check_settings(self) -> None:
        """Raises ValueError for a system configuration or a memory mode that the configuration file lacks."""
        _main()
        from ethosu.vela.architecture_features import CONFIG_FILES_PATH

        path, parser = os.path.join(CONFIG_FILES_PATH, self.config), configparser.ConfigParser()
        try:
            found = parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise ValueError(f"config={self.config!r} is no configuration file of Vela: {first_line(error)}") from error
        if not found:
            raise FileNotFoundError(f"There is no file config={self.config!r}.")
        for kind, name in (("System_Config", self.system_config), ("Memory_Mode", self.memory_mode)):
            if f"{kind}.{name}" not in parser:
                known = [each.partition(".")[2] for each in parser.sections() if each.startswith(f"{kind}.")]
                raise ValueError(
                    f"{kind.lower()}={name!r} is not in {self.config}. Known there: {', '.join(known) or 'none'}."
                )

    def _compiled(self, runner: Runner) -> _Compiled:
        if _ON_NPU in runner.operators:
            raise ValueError("The file is already compiled for an Ethos-U; pass the one it was made from.")
        main = _main()
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "model.tflite")
            with open(source, "wb") as file:
                file.write(runner.content)
            arguments = [source, "--output-dir", folder, "--accelerator-config", self.name, "--config", self.config]
            arguments += ["--system-config", self.system_config, "--memory-mode", self.memory_mode]
            error, log = _run(main, arguments)
            tables = glob.glob(os.path.join(folder, "*_summary_*.csv"))
            result = os.path.join(folder, "model_vela.tflite")
            if error is not None or not tables or not os.path.isfile(result):
                reason = error or first_line(ValueError(log))
                raise ValueError(f"ethos-u-vela {_version()} did not compile the file: {reason}")
            with open(tables[0], encoding="utf-8", newline="") as file:
                summary = next(csv.DictReader(file))
            with open(result, "rb") as file:
                return _Compiled(file.read(), summary, log)


def _run(main, arguments: list[str]) -> tuple[str | None, str]:
    """Runs Vela. Returns what went wrong, if anything, and what its C++ part printed: the reasons of the fallbacks."""
    limit, error = sys.getrecursionlimit(), None
    with tempfile.TemporaryFile() as log:
        with quiet():
            # `quiet` puts these two descriptors back when it ends.
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            try:
                if main(arguments):
                    error = "it failed without an exception"
            except SystemExit:
                error = f"it refused its arguments {' '.join(arguments[3:])}"
            except Exception as raised:  # errors of its own, RuntimeError from C++, AssertionError
                error = first_line(raised)
            finally:
                sys.setrecursionlimit(limit)  # which Vela sets for the whole process
        log.seek(0)
        return error, log.read().decode(errors="replace")


def _fallbacks(compiled: _Compiled) -> tuple[Fallback, ...]:
    """The operators that are still ordinary ones in the compiled file, with Vela's reason."""
    reasons = _reasons(compiled.log)
    count = Counter(
        (step.operator, next((reasons[each.name] for each in step.outputs if each.name in reasons), _UNSAID))
        for step in steps(compiled.content)
        if step.operator != _ON_NPU
    )
    return tuple(Fallback(name, many, reason) for (name, reason), many in count.items())


def _reasons(log: str) -> dict[str, str]:
    """Name of an operator's output -> why Vela does not take the operator, from the warnings it prints."""
    found = re.findall(r"operator: \w+, ofm: '(.*)'\nReason: (.*)\n((?:.+\n)*)", log)
    # "... Float32 (tensor)": the tensor's name is long and says nothing that the operator's does not.
    return {
        output: ". ".join([re.sub(r" \([^()]*\)$", "", reason), *more.split("\n")]).strip(". ")
        for output, reason, more in found
    }


def _problems(runner: Runner, compiled: _Compiled, fallbacks: tuple[Fallback, ...]) -> list[str]:
    if _ON_NPU in flatbuffer.operators(compiled.content):
        return []
    count = sum(fallback.count for fallback in fallbacks)
    text = f"All {plural(count, 'operator')} run on the CPU"
    # A float16 file unpacks its weights with DEQUANTIZE, which is refused for another reason.
    work = [fallback for fallback in fallbacks if fallback.operator != "DEQUANTIZE"]
    if work and all("Float32" in fallback.reason for fallback in work):
        return [f"{text} because the file computes in float32; the NPU computes in integers: export it with "
                "recipe='int8'."]  # fmt: skip
    reasons = sorted({f"{fallback.operator}: {fallback.reason}" for fallback in fallbacks})
    return [f"{text}: {'; '.join(reasons)}."]


def _main():
    with contextlib.suppress(ImportError), quiet():
        from ethosu.vela.vela import main

        return main
    raise ImportError("The Ethos-U devices need ethos-u-vela: pip install 'keras_prune[vela]'.")


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("ethos-u-vela")
    raise ImportError("The Ethos-U devices need ethos-u-vela: pip install 'keras_prune[vela]'.")
