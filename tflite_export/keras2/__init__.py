"""Floor 1. The bridge between Keras 3 and `tf_keras` (Keras 2), which tensorflow-model-optimization needs.

| file | what happens there |
|---|---|
| `bridge.py` | the graph is walked call by call, and both networks are compared |
| `forge.py` | a layer made anew from the class of the same name in the other package |
| `operations.py` | `x + y`, `ops.pad`, `tf.nn.relu`: operations without a layer |
"""

from tflite_export.keras2.bridge import from_tf_keras, rewritten, to_tf_keras
from tflite_export.keras2.forge import Forge, Unbridged

__all__ = ["Forge", "Unbridged", "from_tf_keras", "rewritten", "to_tf_keras"]
