"""A layer of your own: without a rule it is a fence, with four lines it is cut along.

python examples/custom_layer.py [--tiny]
"""

import argparse

import keras
from keras import layers

import keras_prune
from keras_prune import Labels, plan


@keras.saving.register_keras_serializable("example")
class ChannelScale(layers.Layer):
    """Multiplies every channel by a number it learns."""

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


def network():
    inputs = keras.Input((32, 32, 3))
    x = ChannelScale(name="mine")(layers.Conv2D(32, 3, activation="relu")(inputs))
    x = layers.Conv2D(64, 3, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


argparse.ArgumentParser(description=__doc__).parse_known_args()
print(plan(network(), 0.3))  # "fence: mine (ChannelScale): no rule for this type"


@keras_prune.rule(ChannelScale)
def channel_scale(layer, call, x):
    return Labels(x, {"scale": (call.along(x, -1),)})


model = network()
decision = plan(model, 0.5)
print(decision)
small = decision.cut()
print("the layer is now", small.get_layer("mine").scale.shape, "wide; before", model.get_layer("mine").scale.shape)
