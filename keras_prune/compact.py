"""The same `.keras` file, written so that zeros cost next to nothing.

A `.keras` file is a zip archive whose members Keras stores as they are. Deflated, the archive is still an ordinary
`.keras` file: `keras.saving.load_model` reads it, and every bit of the weights comes back. Zeros in single weights
make a file smaller; no device computes the network faster for them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from keras_prune import files

WEIGHTS = "model.weights.h5"
CONFIG = "config.json"

# Keras refuses to unpack larger members that have shrunk further, as an attack on the memory.
FLOOR, EXPANSION = 2**28, 100


@dataclass(frozen=True)
class CompactReport:
    """What `save_compact` wrote.

    Attributes:
        path: the file.
        dense: bytes of the plain `.keras` file of the same content.
        compact: bytes of the file that was written.
        numbers: how many numbers it holds.
        nonzero: the fraction of them that is not zero.
        information: bytes of a code that keeps each number that is not zero as it is, and of the zeros only where
            they are, as short as their share in each weight allows: for n numbers of b bits, of which a fraction d is
            not zero, n (d b + H(d)) bits, H the binary entropy. Exponents of weights are alike, so that a file can be
            a little smaller still.
    """

    path: str
    dense: int
    compact: int
    numbers: int
    nonzero: float
    information: float

    @property
    def ratio(self) -> float:
        """Bytes written ÷ bytes of the plain file."""
        return self.compact / self.dense

    @property
    def over_information(self) -> float:
        """Bytes written ÷ `information`."""
        return self.compact / self.information

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.compact:,} bytes, x {self.ratio:.3f} of the plain file's {self.dense:,}; "
            f"{self.nonzero:.2%} of {self.numbers:,} numbers are not zero, which takes {self.information:,.0f} bytes "
            f"(x {self.over_information:.2f})"
        )


def save_compact(model, path: str | Path, *, optimizer: bool = False, level: int = 6) -> CompactReport:
    """Write a model as a `.keras` file that is small where weights are zero, and say how small.

    The file appears only when it is complete: a failure leaves an older one as it was.

    Args:
        model: any Keras model. It is not changed.
        path: a name that ends in .keras.
        optimizer: also store how the model was compiled and the optimizer's state, as `model.save` does. The momenta
            of weights that are held at zero are not zero: with Adam they are two thirds of the file.
        level: of zlib, 1 (fast) to 9 (small).

    Raises:
        ValueError: another ending, a folder that does not exist or cannot be written, a level that does not exist, or
            a model so large and so nearly all zero that Keras would refuse to read the file.
    """
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 9:
        raise ValueError(f"level={level!r} was passed to save_compact; expected a whole number from 1 to 9.")
    target = Path(path)
    if target.suffix != ".keras":
        raise ValueError(f"{path}: the output is a .keras file; give a name that ends so.")
    files.check_writable(str(target))
    plain, packed = (target.with_name(f".{target.stem}.{os.getpid()}.{k}{target.suffix}") for k in ("plain", "packed"))
    try:
        files.save_model(model, str(plain))
        if not optimizer and model.compiled:
            _drop_optimizer(plain, packed)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as archive:
            for member in source.infolist():
                _copy(source, member, archive, level)
            _check_loadable(target, archive)
        dense, compact = plain.stat().st_size, packed.stat().st_size
        numbers, nonzero, bits = _content(plain)
        os.replace(packed, target)
    finally:
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
    return CompactReport(str(target), dense, compact, numbers, nonzero / max(numbers, 1), float(bits) / 8)


def _copy(source: zipfile.ZipFile, member: zipfile.ZipInfo, archive: zipfile.ZipFile, level: int | None) -> None:
    """A member of one archive into another, deflated at that level, or as it is."""
    new = zipfile.ZipInfo(member.filename, member.date_time)
    new.compress_type = zipfile.ZIP_STORED if level is None else zipfile.ZIP_DEFLATED
    new.file_size = member.file_size  # or a member beyond 2 GiB is not given the room for its length
    if level is not None:
        new._compresslevel = level
    with source.open(member) as old, archive.open(new, "w") as to:
        shutil.copyfileobj(old, to, 2**20)


def _check_loadable(target: Path, archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        if member.file_size > FLOOR and member.file_size > EXPANSION * member.compress_size:
            raise ValueError(
                f"{target}: {member.filename} would shrink from {member.file_size:,} to {member.compress_size:,} "
                f"bytes, and Keras refuses to read what shrinks more than {EXPANSION} times. Nearly all weights are "
                "zero; use model.save, or strip the model first."
            )


def _drop_optimizer(path: Path, scratch: Path) -> None:
    """Rewrite a `.keras` file as that of a model that was never compiled."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(scratch, "w") as archive:
        for member in source.infolist():
            if member.filename == CONFIG:
                archive.writestr(member, json.dumps({**json.loads(source.read(member)), "compile_config": None}))
            elif member.filename == WEIGHTS:
                archive.writestr(member, _without_optimizer(source.read(member)))
            else:
                _copy(source, member, archive, None)
    os.replace(scratch, path)


def _without_optimizer(content: bytes) -> bytes:
    """An HDF5 file without the group of the optimizer; deleting it would leave its bytes in the file."""
    made = io.BytesIO()
    with h5py.File(io.BytesIO(content), "r") as old, h5py.File(made, "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            if name != "optimizer":
                old.copy(name, new)
    return made.getvalue()


def _content(path: Path) -> tuple[int, int, float]:
    """(numbers, numbers that are not zero, bits they need) of the weights in a `.keras` file."""
    numbers, nonzero, bits = 0, 0, 0.0
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read(WEIGHTS)), "r") as file:
        for values in _datasets(file):
            n, kept = values.size, np.count_nonzero(values)
            numbers, nonzero = numbers + n, nonzero + int(kept)
            bits += kept * 8 * values.dtype.itemsize + n * _entropy(kept / max(n, 1))
    return numbers, nonzero, bits


def _datasets(group: h5py.Group) -> Iterator[np.ndarray]:
    for item in group.values():
        if isinstance(item, h5py.Group):
            yield from _datasets(item)
        elif item.dtype.kind in "biuf":
            yield item[()]
        elif item.dtype.kind == "V" and item.dtype.itemsize in (1, 2):  # bfloat16 and float8 are opaque to HDF5
            yield item[()].view(f"u{item.dtype.itemsize}")


def _entropy(share: float) -> float:
    """Bits per number that say which of them are zero."""
    return float(-sum(p * np.log2(p) for p in (share, 1 - share) if p > 0))
