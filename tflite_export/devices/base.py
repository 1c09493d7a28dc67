"""Floor 3. What every device answers about a .tflite file, and how the answer looks."""

import abc
import os
from collections.abc import Sequence
from dataclasses import dataclass

from tflite_export.records import Record, aligned, size_text


@dataclass(frozen=True)
class Fallback(Record):
    """Operators of a file that the accelerator leaves to the CPU beside it.

    Attributes:
        operator: its name in the file.
        count: how many of them.
        reason: the compiler's, or the rule's.
    """

    operator: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} x {self.operator}: {self.reason}"


@dataclass(frozen=True)
class Fit(Record):
    """Whether a file fits a device, and at what cost. Prints itself; `to_json()` gives all fields.

    Attributes:
        device: its name.
        runs: the device can run the file, maybe partly on its CPU. False exactly if there are problems.
        problems: why not, one sentence each.
        fallbacks: operators that the accelerator leaves to the CPU, and why.
        latency_ms: of one invocation; None where nothing measures or estimates it.
        latency_by: "measured: ..." or "estimated by ...", with what makes it comparable; "" without a latency.
        sram_bytes: working memory: the tensor arena, or the SRAM that the compiler plans to use; None if unknown.
        flash_bytes: of the file that has to be stored on the device.
        notes: what the user should know, one sentence each.
        versions: package -> version, of what gave the answer.
    """

    device: str
    runs: bool
    problems: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]
    latency_ms: float | None
    latency_by: str
    sram_bytes: int | None
    flash_bytes: int | None
    notes: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        rows = [("device", self.device), ("runs", "yes" if self.runs else "NO")]
        rows += [("problem", problem) for problem in self.problems]
        if self.latency_ms is not None:
            rows.append(("latency", f"{self.latency_ms:.4g} ms, {self.latency_by}"))
        if self.sram_bytes is not None:
            rows.append(("sram", size_text(self.sram_bytes)))
        if self.flash_bytes is not None:
            rows.append(("flash", size_text(self.flash_bytes)))
        rows += [("on the CPU", str(fallback)) for fallback in self.fallbacks]
        rows += [("note", note) for note in self.notes]
        if self.versions:
            rows.append(("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())))
        return aligned(rows)


class Device(abc.ABC):
    """A target that a .tflite file is meant for.

    A device of your own needs `name`, `identity` and `examine`; with a latency also `milliseconds`, with a compiler
    `compile`. It is passed wherever the name of a device is, or added with `DEVICES["mine"] = Mine`.

    Attributes:
        name: the word users write.
        summary: one line: what answers, and with what certainty.
        is_measured: whether its latencies are measured, and so disturbed by whatever else runs, or estimated.
    """

    name: str = ""
    summary: str = ""
    is_measured: bool = False

    @abc.abstractmethod
    def identity(self) -> str:
        """What makes two of its timings comparable: device, runtime or compiler with version, threads, CPU, clock."""

    @abc.abstractmethod
    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        """Whether a file fits the device, and at what cost.

        Args:
            model: path of a .tflite file, or its bytes.

        Raises:
            ValueError: not a whole .tflite file.
            FileNotFoundError: no file at that path.
            ImportError: the tool that answers for this device is not installed.
        """

    def milliseconds(self, files: Sequence[bytes]) -> list[float]:
        """ms of one invocation of each file, quickly: meant for hundreds of small files.

        Raises:
            ValueError: the device has no latency, or a file does not run on it.
        """
        raise ValueError(f"The device {self.name!r} knows no latency: nothing here measures or estimates it.")

    def compile(self, content: bytes) -> bytes:
        """The bytes of the file that the device loads.

        Raises:
            ValueError: the device has no compiler, or the compiler has nothing to do.
        """
        raise ValueError(f"There is no compiler for the device {self.name!r} here.")


def plural(count: int, word: str) -> str:
    """ "1 operator", "2 operators"."""
    return f"{count} {word}{'s' * (count != 1)}"
