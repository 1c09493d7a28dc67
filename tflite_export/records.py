"""Floor 0. What all results share: they are frozen, print themselves and turn into JSON."""

import contextlib
import dataclasses
import json
import math
import platform
from importlib import metadata


def _plain(value):
    """`value` with what JSON does not know (tuples, infinity, NaN) replaced by what it knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of the results of this package (Report, Check, Parity, Latency, Benchmark)."""

    def to_json(self, indent: int | None = 2) -> str:
        """All fields as JSON text. An infinite error (the file computed NaN) becomes null."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=indent)


def aligned(rows: list[tuple[str, str]]) -> str:
    """Rows (label, text) as lines with the texts in one column."""
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def size_text(count: int) -> str:
    """Bytes as text: KiB = 1024 bytes.

    Example:
        >>> size_text(2048)
        '2048 bytes (2.0 KiB)'
    """
    return f"{count} bytes ({count / 1024:.1f} KiB)"


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python, and of those of the packages that are installed."""
    from tflite_export import __version__

    found = {"tflite_export": __version__, "python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
