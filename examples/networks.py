"""The CIFAR networks of the pruning papers, of plain Keras layers. Import the builders; run, it says what they cost.

python examples/networks.py [--tiny]

Each takes `conv`, what is called for the convolutions within its blocks with the arguments of `keras.layers.Conv2D`;
the first convolution, the shortcuts, the transitions and the last layer are plain in any case:

    conv = functools.partial(keras_prune.layers.PSPConv2D, structure="channel", threshold=0.1)
    model = cifar_resnet(20, conv=conv)
"""

import argparse
import math
from collections.abc import Callable

import keras
from keras import layers, ops


def cifar_resnet(
    depth: int = 20,
    classes: int = 10,
    shortcut: str = "A",
    width: int = 16,
    conv: Callable = layers.Conv2D,
    weight_decay: float = 0.0,
    shape: tuple[int, int, int] = (32, 32, 3),
) -> keras.Model:
    """ResNet for small images: three stages of (depth - 2) / 6 blocks, ReLU after the sum. Logits.
    [He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, section 4.2]

    Args:
        depth: 20, 32, 44, 56, 110: 6 n + 2.
        shortcut: where the size changes: "A", every second pixel and zeros for the new channels (no weights), or "B",
            a 1x1 convolution.
        width: channels of the first stage; the others have twice and four times as many.
        weight_decay: rate of the L2 decay of all kernels, through the momentum: its gradient is `rate * w`.

    Raises:
        ValueError: a depth or a shortcut that does not exist.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} was passed; expected 6 n + 2: 20, 32, 44, 56, 110.")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut={shortcut!r} was passed; expected 'A' (no weights) or 'B' (1x1 convolution).")
    common = _common(weight_decay)
    inputs = keras.Input(shape, name="image")
    x = layers.Conv2D(width, 3, name="stem", **common)(inputs)
    x = layers.ReLU(name="stem_relu")(_norm(x, "stem_norm"))
    for stage in (1, 2, 3):
        filters = width * 2 ** (stage - 1)
        for number in range(1, (depth - 2) // 6 + 1):
            block, strides = f"stage{stage}_block{number}", 2 if stage > 1 and number == 1 else 1
            y = conv(filters, 3, strides=strides, name=f"{block}_conv1", **common)(x)
            y = layers.ReLU(name=f"{block}_relu1")(_norm(y, f"{block}_norm1"))
            y = conv(filters, 3, name=f"{block}_conv2", **common)(y)
            y = _norm(y, f"{block}_norm2")
            if strides == 2 and shortcut == "A":
                new = filters - x.shape[-1]
                x = ops.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [new // 2, new - new // 2]])
            elif strides == 2:
                x = layers.Conv2D(filters, 1, strides=2, name=f"{block}_shortcut", **common)(x)
                x = _norm(x, f"{block}_shortcut_norm")
            x = layers.ReLU(name=f"{block}_relu2")(layers.Add(name=f"{block}_add")([x, y]))
    return keras.Model(inputs, _head(x, classes, common), name=f"resnet{depth}")


def densenet(
    depth: int = 40,
    growth: int = 12,
    classes: int = 10,
    width: int = 16,
    conv: Callable = layers.Conv2D,
    weight_decay: float = 0.0,
    shape: tuple[int, int, int] = (32, 32, 3),
) -> keras.Model:
    """The basic DenseNet: three blocks of (depth - 4) / 3 convolutions, each seeing all before it. Logits.
    [Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, section 3]

    Args:
        depth: 3 n + 4, such as 40 or 100.
        growth: channels that every convolution adds.
        width: channels of the first convolution.
        weight_decay: as in `cifar_resnet`.

    Raises:
        ValueError: a depth that does not exist.
    """
    if depth < 7 or (depth - 4) % 3:
        raise ValueError(f"depth={depth} was passed; expected 3 n + 4: 22, 40, 100.")
    common = _common(weight_decay)
    inputs = keras.Input(shape, name="image")
    x = layers.Conv2D(width, 3, name="stem", **common)(inputs)
    for stage in (1, 2, 3):
        for number in range(1, (depth - 4) // 3 + 1):
            step = f"stage{stage}_layer{number}"
            y = layers.ReLU(name=f"{step}_relu")(_norm(x, f"{step}_norm"))
            y = conv(growth, 3, name=f"{step}_conv", **common)(y)
            x = layers.Concatenate(name=f"{step}_concat")([x, y])
        if stage < 3:
            step = f"transition{stage}"
            x = layers.ReLU(name=f"{step}_relu")(_norm(x, f"{step}_norm"))
            x = layers.Conv2D(x.shape[-1], 1, name=step, **common)(x)
            x = layers.AveragePooling2D(2, name=f"{step}_pool")(x)
    x = layers.ReLU(name="last_relu")(_norm(x, "last_norm"))
    return keras.Model(inputs, _head(x, classes, common), name=f"densenet{depth}")


def parameters(model: keras.Model) -> int:
    """As the papers count them: everything trained; not the running statistics of the norms."""
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def _common(weight_decay: float) -> dict:
    regularizer = keras.regularizers.L2(weight_decay / 2) if weight_decay else None
    return dict(padding="same", use_bias=False, kernel_initializer="he_normal", kernel_regularizer=regularizer)


def _norm(x, name: str):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)


def _head(x, classes: int, common: dict):
    kernel = {key: value for key, value in common.items() if key.startswith("kernel")}
    return layers.Dense(classes, name="logits", **kernel)(layers.GlobalAveragePooling2D(name="pool")(x))


def main() -> None:
    from keras_prune import Channels, metrics

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="only the smallest network of each kind")
    given = parser.parse_args()
    networks = {f"ResNet-{depth}": (cifar_resnet, depth) for depth in ((20,) if given.tiny else (20, 56, 110))}
    networks |= {f"DenseNet-{depth}": (densenet, depth) for depth in ((22,) if given.tiny else (40,))}
    for title, (build, depth) in networks.items():
        model = build(depth)
        channels = Channels(model)
        print(
            f"{title:<12} {parameters(model):>9,} parameters {metrics.macs(channels):>11,} MACs "
            f"{metrics.units(channels):>5,} prunable channels"
        )


if __name__ == "__main__":
    main()
