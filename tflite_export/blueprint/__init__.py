"""Floor 1. A .tflite file whose widths can change.

A pruning library labels the axes of the Keras model's weights with ids of units. The file's kernels are the same
weights, transposed, folded and perhaps rounded: they are recognised by their values (`matching.py`), and from there
the ids follow the data through the file's own operators (`reading.py`). So the file can be had at any widths within
milliseconds (`cutting.py`), exact about fusion, padding and quantization, which the converter did once.
"""

from tflite_export.blueprint.reading import Blueprint, Operator, Part

__all__ = ["Blueprint", "Operator", "Part"]
