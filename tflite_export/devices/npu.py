"""Floor 3. NPUs of phones and laptops, through LiteRT's ahead-of-time compiler where the vendor's SDK is installed."""

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from tflite_export import flatbuffer
from tflite_export.devices.base import Device, Fallback, Fit, plural
from tflite_export.runner import Runner, first_line
from tflite_export.silence import quiet


@dataclass(frozen=True)
class _Vendor:
    sdk: str  # the vendor's package on PyPI; its module has underscores instead of hyphens
    folder: str  # in ai_edge_litert.aot.vendors
    chip: str  # taken if none is passed
    libraries: Callable = lambda sdk, chip: sdk.path_to_sdk_libs()  # the SDK's folder; None in an empty package


VENDORS = {
    "qualcomm": _Vendor("ai-edge-litert-sdk-qualcomm", "qualcomm", "SM8750"),
    "mediatek": _Vendor(
        "ai-edge-litert-sdk-mediatek",
        "mediatek",
        "MT6991",
        lambda sdk, chip: sdk.path_to_sdk_libs("v9" if chip == "MT6993" else "v8"),
    ),
    "google-tensor": _Vendor("ai-edge-litert-sdk-google-tensor", "google_tensor", "Tensor_G5"),
    "intel": _Vendor("ai-edge-litert-sdk-intel", "intel_openvino", "LNL"),
}


class Npu(Device):
    """An NPU of a phone or laptop: its vendor's compiler says what it takes. There is no latency without the chip.

    The vendor's package fetches its compiler from the vendor's server while pip builds it. Without a connection pip
    reports success and installs an empty package, which is found out here.

    Args:
        vendor: "qualcomm", "mediatek", "google-tensor" or "intel".
        chip: as the vendor calls it: "SM8750", "MT6991", "Tensor_G5", "LNL", ...

    Example:
        >>> print(Npu("qualcomm", chip="SM8650").examine("small.tflite"))           # doctest: +SKIP
    """

    def __init__(self, vendor: str, chip: str | None = None):
        if vendor not in VENDORS:
            raise ValueError(f"vendor={vendor!r} is not known. Known: {', '.join(VENDORS)}.")
        self.name, self._vendor = f"npu-{vendor}", VENDORS[vendor]
        self.chip = chip or self._vendor.chip
        self.summary = f"{self._vendor.sdk} through LiteRT's ahead-of-time compiler, if installed; no latency."

    def identity(self) -> str:
        return f"{self.name}, {self.chip}, {', '.join(' '.join(item) for item in self._versions().items())}"

    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        runner = Runner(model)
        problems, fallbacks, size = [], (), None
        try:
            content = self._compiled(runner)
        except ValueError as error:
            problems.append(str(error))
        else:
            fallbacks, size = _fallbacks(content), len(content)
        return Fit(
            device=self.name,
            runs=not problems,
            problems=tuple(problems),
            fallbacks=fallbacks,
            latency_ms=None,
            latency_by="",
            sram_bytes=None,
            flash_bytes=size,
            notes=(f"Compiled for the chip {self.chip}; other chips of the vendor need a file of their own.",),
            versions=self._versions(),
        )

    def compile(self, content: bytes) -> bytes:
        return self._compiled(Runner(content))

    def _compiled(self, runner: Runner) -> bytes:
        self._check_sdk()
        with tempfile.TemporaryDirectory() as folder:
            try:
                with quiet():
                    result = self._ahead_of_time(runner.content, folder)
            except Exception as error:  # ValueError of the compiler, OSError of its libraries, ImportError inside
                raise ValueError(f"The compiler of {self._vendor.sdk} failed: {_reason(error)}") from error
        taken = [name for name in flatbuffer.operators(result) if name.startswith("CUSTOM:")]
        if not set(taken) - set(runner.operators):
            count = sum(runner.operators.values())
            raise ValueError(f"All {plural(count, 'operator')} stay on the CPU: the NPU takes none. Try recipe='int8'.")
        return result

    def _ahead_of_time(self, content: bytes, folder: str) -> bytes:
        from ai_edge_litert.aot import aot_compile
        from ai_edge_litert.aot.core import aot_types

        importlib.import_module(f"ai_edge_litert.aot.vendors.{self._vendor.folder}")
        targets = importlib.import_module(f"ai_edge_litert.aot.vendors.{self._vendor.folder}.target")
        known = [chip.value for chip in targets.SocModel if chip.value != "ALL"]
        if self.chip not in known:
            raise ValueError(f"the chip {self.chip!r} is not known; known: {', '.join(known)}")
        source = os.path.join(folder, "model.tflite")
        with open(source, "wb") as file:
            file.write(content)
        compile = getattr(aot_compile, "aot_compile", aot_compile)  # a module, or the function it exports
        target = targets.Target(targets.SocModel(self.chip))
        model = compile(source, output_dir=folder, target=target, keep_going=False).models[0]
        if isinstance(model, aot_types.Model) and not model.in_memory:
            model.load()
        return model.model_bytes

    def _check_sdk(self) -> None:
        """Raises ImportError where the vendor's package is missing or empty."""
        vendor, libraries = self._vendor, None
        try:
            with quiet():
                sdk = importlib.import_module(vendor.sdk.replace("-", "_"))
                libraries = vendor.libraries(sdk, self.chip)
        except ImportError as error:
            raise ImportError(
                f"The device {self.name!r} needs the vendor's compiler: pip install {vendor.sdk} (on a machine that "
                "reaches the vendor's server)."
            ) from error
        except Exception:  # an empty package may miss the function, or the folder it looks into
            libraries = None
        if libraries is None or not os.path.isdir(libraries):
            raise ImportError(
                f"{vendor.sdk} is installed but empty: pip could not fetch the compiler from the vendor's server, and "
                f"did not say so. Install it again where that server is reached: pip install -v --no-cache-dir "
                f"--force-reinstall {vendor.sdk}"
            )

    def _versions(self) -> dict[str, str]:
        versions = {}
        for package in ("ai-edge-litert", self._vendor.sdk):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return versions


def _fallbacks(content: bytes) -> tuple[Fallback, ...]:
    rest = {name: count for name, count in flatbuffer.operators(content).items() if not name.startswith("CUSTOM:")}
    return tuple(Fallback(name, count, "the vendor's compiler gives no reason") for name, count in rest.items())


def _reason(error: Exception) -> str:
    """The compiler's own words: it leaves them in a file in the temporary folder, which is read and removed."""
    log = re.search(r"See (\S+\.error)", str(error))
    if log and os.path.isfile(log[1]):
        with open(log[1], encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        os.remove(log[1])
        said = [line for line in lines if line.startswith("ERROR") or "Could not load" in line]
        return (said or lines[-1:] or ["it gives no reason"])[0][:300]
    return first_line(error)
