"""Floor 3. `compile_file`: a .tflite file and a device in, the file that the device loads on disk."""

import dataclasses
import os

from tflite_export.devices import get
from tflite_export.devices.base import Device, Fit
from tflite_export.runner import Runner
from tflite_export.writing import replacing


def compile_file(path: str | os.PathLike, device: str | Device, out: str | os.PathLike | None = None) -> Fit:
    """Compiles a .tflite file for a device and writes what the device loads.

    The compiled file takes its name only when it is whole: a failure leaves an older file of that name as it was.

    Args:
        path: of the .tflite file.
        device: a name in `tflite_export.DEVICES`, or a Device.
        out: path of the compiled file; None: beside `path`, with the device's name: "small_ethos-u55-128.tflite".

    Raises:
        ValueError: a damaged file, a device without a compiler, or a file that the device does not run; the message
            says why. Nothing was written.
        FileNotFoundError, OSError: a path cannot be read or written.
        ImportError: the compiler is not installed.

    Example:
        >>> compile_file("small.tflite", "ethos-u55-128").latency_ms                   # doctest: +SKIP
        1.27
    """
    device, path = get(device), os.fspath(path)
    out = f"{os.path.splitext(path)[0]}_{device.name}.tflite" if out is None else os.fspath(out)
    content = Runner(path).content  # a damaged file is named by its path
    with replacing(out) as file:
        compiled = device.compile(content)
        fit = device.examine(content)
        file.write(compiled)
    return dataclasses.replace(fit, notes=(f"Written to {out}.", *fit.notes))
