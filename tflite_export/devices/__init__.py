"""Floor 3. Named targets for .tflite files: does the file run there, what falls back, how long, how many bytes.

>>> from tflite_export import devices
>>> print(devices.get("ethos-u55-128").examine("small.tflite"))                # doctest: +SKIP
"""

import functools
from collections.abc import Callable

from tflite_export.devices.base import Device, Fallback, Fit
from tflite_export.devices.cpu import Cpu
from tflite_export.devices.edgetpu import EdgeTpu
from tflite_export.devices.micro import Micro
from tflite_export.devices.npu import VENDORS, Npu
from tflite_export.devices.vela import ETHOS, Ethos

__all__ = ["DEVICES", "Cpu", "Device", "EdgeTpu", "Ethos", "Fallback", "Fit", "Micro", "Npu", "get"]

# Name -> what makes the device with its default settings.
DEVICES: dict[str, Callable[[], Device]] = {
    "cpu": Cpu,
    "micro": Micro,
    "edgetpu": EdgeTpu,
    **{name: functools.partial(Ethos, name) for name in ETHOS},
    **{f"npu-{vendor}": functools.partial(Npu, vendor) for vendor in VENDORS},
}


def get(device: str | Device) -> Device:
    """The device of that name with its default settings; a Device is returned as it is.

    Raises:
        ValueError: the name is not known.
        TypeError: neither a name nor a Device was passed.

    Example:
        >>> get("ethos-u55-128").name
        'ethos-u55-128'
    """
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device={device!r} was passed; expected a name or a tflite_export.Device.")
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not known. Known: {', '.join(DEVICES)}. Or pass a Device.")
    return DEVICES[device]()
