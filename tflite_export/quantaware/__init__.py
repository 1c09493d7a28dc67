"""Floor 4. Quantization-aware training: the model learns with int8 rounding in place and comes back as a .tflite file.

| file | what happens there |
|---|---|
| `training.py` | this process, `qat`: check, write the data to files, start the child, measure what came back |
| `goals.py` · `report.py` | loss, optimizer and the figure that is reported · what `qat` returns |
| `process.py` | starts the child and tells how it ended |
| `batches.py` | data that crosses to the other process, in files, batch by batch |
| `worker.py` | the child process: tf_keras, tensorflow-model-optimization, fit, convert |
| `lowering.py` | what tensorflow-model-optimization refuses, written in layers that it takes |
| `scheme.py` | the child: what is rounded, and how |
| `native.py` | the child: all of it in Keras 3, without these packages |
| `ranges.py` | the child: ranges of activations measured before training starts |
"""

from tflite_export.quantaware.report import QatReport
from tflite_export.quantaware.training import qat

__all__ = ["QatReport", "qat"]
