"""Keras models to .tflite files: export, parity with Keras, measured latency.

    >>> import tflite_export
    >>> report = tflite_export.export(model, "small.tflite", recipe="int8", data=images)     # doctest: +SKIP
    >>> print(report)                                                                       # doctest: +SKIP

Importing this package imports neither TensorFlow nor Keras: each name below is loaded when it is first used.
"""

import importlib

__version__ = "0.1.0"

# Public name -> the file it lives in.
_HOMES = {
    "export": "exporter",
    "check": "exporter",
    "Report": "exporter",
    "Check": "exporter",
    "to_tflite": "convert",
    "sensitive_layers": "mixed",
    "search_float": "mixed",
    "Sensitivity": "mixed",
    "LayerError": "mixed",
    "FloatSearch": "mixed",
    "accuracy": "labelled",
    "stages": "labelled",
    "Stages": "labelled",
    "Stage": "labelled",
    "compare": "parity",
    "Parity": "parity",
    "OutputParity": "parity",
    "measure_latency": "latency",
    "benchmark": "latency",
    "Latency": "latency",
    "Benchmark": "latency",
    "Recipe": "recipes",
    "RECIPES": "recipes",
    "Runner": "runner",
    "Port": "runner",
    "qat": "quantaware",
    "QatReport": "quantaware",
    "to_tf_keras": "keras2",
    "from_tf_keras": "keras2",
    "DEVICES": "devices",
    "Device": "devices",
    "Fit": "devices",
    "Fallback": "devices",
    "LatencyTable": "tables",
    "latency_ms": "tables",
    "FileBytes": "measures",
    "ArenaBytes": "measures",
    "tflite_bytes": "measures",
    "arena_bytes": "measures",
    "Blueprint": "blueprint",
    "compile_file": "devices.compiling",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tflite_export' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"tflite_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
