"""One small trainable network and data with a pattern to learn, for the tests of training."""

import keras
import numpy as np
from keras import layers


def residual_net(widths=(16, 32), seed=0):
    """Two residual blocks, logits of four classes."""
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((12, 12, 3))
    for number, width in enumerate(widths):
        x = layers.Conv2D(width, 3, 2, padding="same", use_bias=False, name=f"down{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        y = layers.Conv2D(width, 3, padding="same", name=f"inner{number}")(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(
            layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"outer{number}")(y)
        )
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="residual_net")


def plain_net(seed=0):
    """Two convolutions in a row: quick to trace. Logits of four classes."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(32, 3, 2, padding="same", use_bias=False, name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.ReLU()(layers.Conv2D(16, 3, padding="same", name="second")(x))
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x)), name="plain_net")


def patterns(samples=256, seed=0):
    """Noise with a bright quarter; the class says which."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 1, (samples, 12, 12, 3)).astype("float32"), rng.integers(0, 4, samples)
    for image, label in zip(x, y):
        row, column = 6 * (label // 2), 6 * (label % 2)
        image[row : row + 6, column : column + 6] += 0.7
    return x, y


def compiled(optimizer="sgd", widths=(16, 32), seed=0, **arguments):
    model = residual_net(widths, seed)
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], **arguments
    )
    return model
