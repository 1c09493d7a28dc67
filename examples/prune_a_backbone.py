"""A MobileNetV2 backbone inside a model of your own: look at the plan, cut, recalibrate, write the .tflite file.

python examples/prune_a_backbone.py [--tiny]
"""

import argparse

import keras
import numpy as np
from keras import layers

import tflite_export
from keras_prune import plan, recalibrate_batchnorm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a small picture and a thin backbone")
given = parser.parse_args()

size = 64 if given.tiny else 160
backbone = keras.applications.MobileNetV2(
    (size, size, 3), alpha=0.35 if given.tiny else 1.0, include_top=False, weights=None
)  # weights="imagenet" where there is a network
inputs = keras.Input((size, size, 3), name="image")
x = backbone(layers.Rescaling(1 / 127.5, offset=-1.0)(inputs))
x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
model = keras.Model(inputs, layers.Dense(5, name="classes")(x), name="flowers")

decision = plan(model, 0.5, measure="macs", criterion="fpgm", round_to=8)
print(decision)  # nothing has been changed yet

small = decision.cut()
images = np.random.default_rng(0).uniform(0, 255, (32, size, size, 3)).astype("float32")  # your own, unlabelled
recalibrate_batchnorm(small, images)
print(tflite_export.export(small, "small.tflite", recipe="int8", data=images))
