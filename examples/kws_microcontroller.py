"""Keyword spotting for a microcontroller: a DS-CNN cut to a budget of RAM and flash, as int8, as a C array.

python examples/kws_microcontroller.py [--tiny] [--data-dir DIR]

DIR (or KERAS_PRUNE_DATA) holds MLPerf Tiny's `mlperf_tiny/kws_dscnn.keras` and `kws01_perf1000.npz`: a trained network
and 1,000 real clips. Without them the keywords are synthetic, and the same network is trained on these first.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import keras
import numpy as np
from keras import layers

import tflite_export
from keras_prune import plan
from tflite_export import ArenaBytes, FileBytes, devices

ARENA, FLASH = 20 * 1024, 40 * 1024  # bytes that the board has for the tensors, and for the file
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute")
parser.add_argument("--data-dir", default=os.environ.get("KERAS_PRUNE_DATA"))
given = parser.parse_args()
keras.utils.set_random_seed(0)


def ds_cnn(classes):
    """MLPerf Tiny's keyword spotting network: 10 MFCCs of 49 frames, four depthwise-separable blocks."""
    x = inputs = keras.Input((49, 10, 1), name="mfcc")
    x = layers.Conv2D(64, (10, 4), strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    for _ in range(4):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.Conv2D(64, 1, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes, activation="softmax", name="keyword")(x), name="ds_cnn")


def synthetic(classes, count):
    """Each keyword is a smooth pattern that begins up to 6 frames late, in loud noise."""
    random = np.random.default_rng(0)
    patterns = np.cumsum(random.normal(size=(classes, 49, 10, 1)), 1) / 3
    y = random.integers(0, classes, count)
    x = np.stack([np.roll(patterns[each], random.integers(0, 7), axis=0) for each in y])
    return (x + 6 * random.normal(size=x.shape)).astype("float32"), y


def train(model, epochs, rate):
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)


folder = Path(given.data_dir or "") / "mlperf_tiny"
if given.data_dir and (folder / "kws01_perf1000.npz").is_file():
    clips, model = np.load(folder / "kws01_perf1000.npz"), keras.saving.load_model(folder / "kws_dscnn.keras")
    x, y = (clips["mfcc_int8"].astype("float32") - clips["zero_point"]) * clips["scale"], clips["y"]
    print("1,000 real clips: half to fine-tune and calibrate, half to test.")
else:
    x, y = synthetic(classes=8, count=600 if given.tiny else 2000)
    model = ds_cnn(8)
    print("Synthetic keywords: patterns in noise, no speech. Real clips: --data-dir.")
order, half = np.random.default_rng(1).permutation(len(x)), len(x) // 2
x_test, y_test, x, y = x[order[half:]], y[order[half:]], x[order[:half]], y[order[:half]]
if not model.name.startswith("kws"):
    train(model, epochs=8 if given.tiny else 20, rate=3e-3)

# As wide as both limits allow, a fifth of the RAM left free: kernels of a real board may need some more than the
# reference kernels here. What stays is refitted to what the original computes, without labels.
budget = {ArenaBytes(model, "int8"): 0.8 * ARENA, FileBytes(model, "int8"): FLASH}
decision = plan(model, target=budget, criterion="obs", data=x, reconstruct=True)
print(decision)
pruned, small = decision.cut(), decision.cut()
train(small, epochs=3 if given.tiny else 20, rate=3e-4)

# A file that needs more than the board has is not written: export says so instead.
board = devices.Micro(arena_bytes=ARENA, flash_bytes=FLASH) if importlib.util.find_spec("tflite_micro") else None
if board is None:
    print("tflite-micro is not installed, so the file is not run on it: pip install 'keras_prune[micro]'.")
print(tflite_export.export(small, "kws.tflite", "int8", data=x[:200], device=board))
stages = {"float": model, "pruned": pruned, "fine-tuned": small, "int8": "kws.tflite"}
print(tflite_export.stages(stages, x_test, y_test))

# The same as `xxd -i`, but aligned and constant: it stays in flash.
content = Path("kws.tflite").read_bytes()
lines = [", ".join(map(str, content[at : at + 24])) for at in range(0, len(content), 24)]
array = "alignas(16) const unsigned char kws_tflite[] = {\n  " + ",\n  ".join(lines) + "\n};\n"
Path("kws_tflite.h").write_text(f"{array}const unsigned int kws_tflite_len = {len(content)};\n")
print("kws_tflite.h is the C array; docs/devices.md has the C++ around it and the commands for an Ethos-U.")
