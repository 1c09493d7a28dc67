"""The walk: groups, rows and costs against figures worked out by hand or printed in papers."""

from __future__ import annotations

import time

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import conv, head, image

from keras_prune import Channels, cut, metrics


def vgg16(widths=(64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)):
    """VGG16-BN for CIFAR-10: 13 convs, one dense."""
    x = inputs = keras.Input((32, 32, 3))
    for k, n in enumerate(widths):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(n, 3, padding="same", use_bias=False)(x)))
        if k in (1, 3, 6, 9, 12):
            x = layers.MaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def resnet(depth):
    """CIFAR-10 ResNet with option-A shortcuts: stride by slicing, channels padded with zeros."""

    def convs(x, n, stride):
        return layers.BatchNormalization()(layers.Conv2D(n, 3, strides=stride, padding="same", use_bias=False)(x))

    inputs = keras.Input((32, 32, 3))
    x, width = layers.ReLU()(convs(inputs, 16, 1)), 16
    for n in (16, 32, 64):
        for block in range((depth - 2) // 6):
            stride = 2 if n > 16 and block == 0 else 1
            y = convs(layers.ReLU()(convs(x, n, stride)), n, 1)
            if stride == 2:
                x = ops.pad(x[:, ::2, ::2], [[0, 0]] * 3 + [[(n - width) // 2] * 2])
            x, width = layers.ReLU()(layers.Add()([x, y])), n
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize(
    "build, dense_macs, conv_macs",
    [(vgg16, 5_120, 313_196_544), (lambda: resnet(20), 640, 40_550_400), (lambda: resnet(56), 640, 125_485_056)],
)
def test_macs_are_those_of_the_literature(build, dense_macs, conv_macs):
    assert metrics.macs(Channels(build())) == conv_macs + dense_macs


def test_vgg16_a_of_li_et_al_has_the_printed_macs():
    """Predicted from the labels of VGG16: first width 32, all of 512 halved: 206,143,488 conv MACs, 34.2 % less."""
    channels = Channels(vgg16())
    keep = [32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256]
    assert [len(g) for g in channels.groups] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    removed = np.concatenate([g.units[n:] for g, n in zip(channels.groups, keep)])
    assert metrics.macs(channels, removed) == 206_143_488 + 10 * 256
    assert 1 - 206_143_488 / 313_196_544 == pytest.approx(0.342, abs=5e-4)


def test_macs_by_hand():
    """One of each: the sums are written out."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same")(inputs)  # 8*8 * 9*3*4
    x = layers.Conv2D(8, 3, strides=2, groups=2, padding="same")(x)  # 4*4 * 9*2*8
    x = layers.DepthwiseConv2D(3, depth_multiplier=2)(x)  # 2*2 * 9*16
    x = layers.SeparableConv2D(5, 2, padding="same")(x)  # 2*2 * (4*16 + 16*5)
    x = layers.Conv2DTranspose(6, 2, strides=2)(x)  # 2*2 * 4*5*6
    x = layers.EinsumDense("abcd,def->abcef", (4, 4, 2, 3))(x)  # 4*4 * 6*2*3
    x = layers.Reshape((16, 6))(x)
    x = layers.MultiHeadAttention(2, 5, value_dim=4)(x, x[:, :8])  # q 16*6*10, k 8*6*10, v 8*6*8,
    x = layers.LSTM(3)(x)  # o 16*8*6, scores 2*16*8*(5+4); 16*4*(6+3)*3
    model = keras.Model(inputs, layers.Dense(7)(x))  # 3*7
    attention = 16 * 6 * 10 + 8 * 6 * 10 + 8 * 6 * 8 + 16 * 8 * 6 + 2 * 16 * 8 * 9
    expected = 64 * 108 + 16 * 144 + 4 * 144 + 4 * 144 + 4 * 120 + 16 * 36 + attention + 16 * 4 * 9 * 3 + 21
    assert metrics.macs(Channels(model)) == expected


def test_a_conv_called_twice_costs_twice():
    inputs = image(8, 8, 4)
    shared = conv(4)
    assert metrics.macs(Channels(keras.Model(inputs, shared(shared(inputs))))) == 2 * 64 * 9 * 16


@pytest.mark.parametrize("build", [vgg16, lambda: resnet(20)])
def test_costs_are_predicted_exactly(build):
    """Oracle: a walk of the cut model."""
    channels = Channels(build())
    rng = np.random.default_rng(0)
    removed = np.concatenate([rng.permutation(g.units)[: len(g) // 3] for g in channels.groups])
    small = Channels(cut(channels, removed))
    for measure in (metrics.macs, metrics.params, metrics.memory):
        assert measure(channels, removed) == measure(small)
    assert metrics.params(small) == small.model.count_params()


def test_rows_hold_all_numbers_of_a_unit():
    """Oracle: the kernel's slices, for a unit that two convs make and Flatten spreads over 4 rows."""
    inputs = image(2, 2, 3)
    a, b = layers.Conv2D(5, 1, name="a"), layers.Conv2D(5, 1, name="b")
    dense = layers.Dense(2)
    channels = Channels(keras.Model(inputs, dense(layers.Flatten()(a(inputs) + b(inputs)))))
    (group,) = channels.groups
    expected = np.concatenate([np.array(layer.kernel).reshape(3, 5).T for layer in (a, b)], axis=1)
    assert np.array_equal(channels.rows(group), expected)
    readers = [m for m in group.members if m.reads]
    assert [m.slices for m in readers] == [4]
    assert np.array_equal(
        channels.rows(group, members=readers), np.array(dense.kernel).reshape(4, 5, 2).transpose(1, 0, 2).reshape(5, 8)
    )


def test_the_user_hears_what_to_do_with_a_model_that_cannot_be_walked():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="subclassed Subclassed.*Functional or Sequential"):
        Channels(Subclassed())
    with pytest.raises(ValueError, match="is not built.*Call model.build"):
        Channels(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(TypeError, match="Expected a keras.Model, got str"):
        Channels("model.keras")
    channels = Channels(keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2)]))
    with pytest.raises(ValueError, match="0 is the frozen unit"):
        channels.alive([0])


def test_a_subclassed_model_inside_is_a_fence():
    class Inside(keras.Model):
        def call(self, x):
            return 2 * x

        def compute_output_shape(self, shape):
            return shape

    inputs = image()
    channels = Channels(keras.Model(inputs, head(conv(6)(Inside(name="inside")(conv(8)(inputs))))))
    assert [len(g) for g in channels.groups] == [6]
    assert [f.layer for f in channels.fences] == ["inside"] and "subclassed" in channels.fences[0].reason


def test_time_grows_linearly_with_the_number_of_operations():
    """4 times as many blocks may take at most 8 times as long."""

    def seconds(blocks):
        x = inputs = image()
        for _ in range(blocks):
            x = layers.Add()([x, layers.BatchNormalization()(conv(3)(layers.ReLU()(x)))])
        model = keras.Model(inputs, x)
        times = []
        for _ in range(5):  # the quickest of them: other work on the machine comes and goes
            start = time.perf_counter()
            Channels(model)
            times.append(time.perf_counter() - start)
        return min(times)

    seconds(5)
    assert seconds(80) < 8 * max(seconds(20), 0.01)
