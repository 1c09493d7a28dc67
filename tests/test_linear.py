"""Views: rows times matrix is what the layer itself computes, for every type and geometry it can run."""

from __future__ import annotations

import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers

from keras_prune.linear import VIEWS, view_of

CASES = {}
"""Name of a layer type -> function that yields (layer, shape of an input with its batch)."""


def cases(*names):
    def register(function):
        for name in names:
            CASES[name] = lambda n=name: function(getattr(layers, n), n)
        return function

    return register


@cases("Dense")
def dense(cls, name):
    for shape in ((4, 3), (2, 5, 3), (2, 3, 4, 5)):
        yield cls(6), shape
    yield cls(6, use_bias=False), (4, 3)


def image_shape(rank, n, channels):
    """Sides of different lengths, one even, one odd."""
    return (2, *{1: (n,), 2: (n, n - 1), 3: (3, n - 1, 4)}[rank], channels)


def dilation_or_stride():
    return ((s, d) for s, d in itertools.product((1, 2, 3), (1, 2)) if s == 1 or d == 1)


@cases("Conv1D", "Conv2D", "Conv3D")
def conv(cls, name):
    rank = int(name[4])
    kernels = {1: (1, 2, 3, 4), 2: ((1, 2), (3, 3), (4, 3)), 3: ((2, 3, 1),)}[rank]
    paddings = ("valid", "same", "causal") if rank == 1 else ("valid", "same")
    for kernel, padding, (s, d), n in itertools.product(kernels, paddings, dilation_or_stride(), (8, 9)):
        yield cls(5, kernel, strides=s, dilation_rate=d, padding=padding), image_shape(rank, n, 3)
    for groups, padding, (s, d) in itertools.product((2, 4), paddings, ((1, 1), (2, 1), (1, 2))):  # slow: through XLA
        yield cls(8, kernels[-1], groups=groups, strides=s, dilation_rate=d, padding=padding), image_shape(rank, 8, 4)
    if rank == 2:
        yield cls(5, (2, 3), strides=(3, 1), padding="same"), (2, 8, 7, 3)
        yield cls(5, (2, 3), dilation_rate=(1, 2)), (2, 8, 7, 3)
    yield cls(5, kernels[-1], use_bias=False), image_shape(rank, 8, 3)


@cases("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
def depthwise(cls, name):
    rank = int(name[-2])
    kernels, filters = {1: (1, 2, 3, 4), 2: ((1, 2), (3, 3), (4, 3))}[rank], (5,) * ("Separable" in name)
    geometry = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2))
    for kernel, padding, (s, d), times in itertools.product(kernels, ("valid", "same"), geometry, (1, 2)):
        layer = cls(*filters, kernel, strides=s, dilation_rate=d, padding=padding, depth_multiplier=times)
        yield layer, image_shape(rank, 8 + times % 2, 3)


@cases("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed(cls, name):
    rank = int(name[4])
    kernels = {1: (1, 2, 3, 4, 5), 2: ((1, 2), (3, 3), (2, 5)), 3: ((2, 3, 1),)}[rank]
    for kernel, padding, (s, d) in itertools.product(kernels, ("valid", "same"), dilation_or_stride()):
        for extra, n in itertools.product((None, *range(s)), (4, 5)):
            if not refused(kernel, padding, d, extra):
                layer = cls(4, kernel, strides=s, dilation_rate=d, padding=padding, output_padding=extra)
                yield layer, image_shape(rank, n, 3)
    if rank == 2:
        yield cls(4, (2, 3), strides=(3, 1), padding="same"), (2, 4, 3, 3)


def refused(kernel, padding, dilation, extra):
    """Of an even reach, 'same' and no output_padding, TensorFlow refuses to make the (n - 1) * stride values."""
    reaches = ((k - 1) * dilation + 1 for k in (kernel if isinstance(kernel, tuple) else (kernel,)))
    return padding == "same" and extra == 0 and any(reach % 2 == 0 for reach in reaches)


@cases("EinsumDense")
def einsum_dense(cls, name):
    for equation, out, bias, shape in (
        ("ab,bc->ac", 5, "c", (4, 3)),
        ("abc,cd->abd", (None, 5), "d", (2, 4, 3)),
        ("...x,xy->...y", 5, "y", (4, 3)),
        ("...x,xy->...y", 5, "y", (2, 4, 6, 3)),
        ("abc,cde->abde", (None, 2, 3), "de", (2, 4, 5)),
        ("abc,dce->abde", (None, 2, 3), "de", (2, 4, 5)),
        ("abcd,cde->abe", (None, 6), "e", (2, 4, 3, 5)),
        ("abc,bcd->abd", (3, 6), "bd", (2, 3, 5)),  # b is shared: a block for each
        ("...bc,bcd->...bd", (3, 6), "bd", (2, 4, 3, 5)),
        ("abc,bd->adc", (6, 4), None, (2, 3, 4)),  # over the axis in the middle
        ("abcd,ed->abce", (None, None, 6), None, (2, 3, 4, 5)),
    ):
        yield cls(equation, out, bias_axes=bias), shape


@cases("TimeDistributed")
def time_distributed(cls, name):
    yield cls(layers.Dense(6)), (2, 4, 5)
    yield cls(layers.Dense(6)), (2, 4, 3, 5)
    yield cls(layers.Conv2D(6, (2, 3), strides=2, padding="same")), (2, 3, 5, 6, 3)
    yield cls(layers.DepthwiseConv1D(3, depth_multiplier=2)), (2, 3, 5, 4)
    yield cls(cls(layers.Dense(6))), (2, 3, 4, 5)


def holder(layer):
    return holder(layer.layer) if isinstance(layer, layers.TimeDistributed) else layer


def kernel_of(layer):
    owner = holder(layer)
    return owner.pointwise_kernel if "Separable" in type(owner).__name__ else owner.kernel


def randomized(layer, shape, seed=0):
    """An input, and the layer with random weights of a size that keeps the output's numbers near 1."""
    rng = np.random.default_rng(seed)
    layer.build(shape)
    for weight in layer.weights:
        fan_in = max(1, math.prod(weight.shape) / weight.shape[-1])
        weight.assign(rng.normal(size=weight.shape) / fan_in**0.5)
    return rng.normal(size=shape).astype("float32")


def product(layer, view, x, at, kernel=None):
    """What the view says that the layer computes at those positions, shape (blocks, rows, outputs)."""
    matrix = view.matrices(np.array(kernel_of(layer)) if kernel is None else kernel)
    bias = np.array(holder(layer).bias).reshape(len(matrix), 1, -1) if view.has_bias else 0.0
    return view.rows(x, at) @ matrix + bias


def geometry(layer):
    config = holder(layer).get_config()
    return {k: v for k, v in config.items() if "initializer" not in k and "constraint" not in k}


def test_every_view_has_cases():
    assert set(CASES) == set(VIEWS)


@pytest.mark.parametrize("name", VIEWS)
def test_rows_times_matrix_is_what_the_layer_computes(name):
    rng, count = np.random.default_rng(1), 0
    for layer, shape in CASES[name]():
        x = randomized(layer, shape)
        y, view, count = np.array(layer(x)), view_of(layer), count + 1
        blocks, columns, outs = view.matrices(np.array(kernel_of(layer))).shape
        assert view.count(shape) == y.size // (blocks * outs), geometry(layer)
        at = np.arange(view.count(shape))
        rows, wanted = view.rows(x, at), view.outputs(y, at)
        assert rows.shape == (blocks, len(at), columns) and wanted.shape == (blocks, len(at), outs)
        assert np.array_equal(np.sort(wanted, None), np.sort(y, None))  # each number of the output once
        assert np.abs(product(layer, view, x, at) - wanted).max() < 1e-5, geometry(layer)
        some = rng.permutation(len(at))[: max(1, len(at) // 3)]
        assert np.abs(view.rows(x, some) - rows[:, some]).max() < 1e-6
        assert np.array_equal(view.outputs(y, some), wanted[:, some])
    assert count >= 4 and type(layer).__name__ == name


@pytest.mark.parametrize("name", VIEWS)
def test_a_kernel_comes_back_from_its_matrices_exactly(name):
    for layer, shape in CASES[name]():
        layer.build(shape)
        view, size = view_of(layer), tuple(kernel_of(layer).shape)
        numbers = np.arange(math.prod(size)).reshape(size)
        for kernel in (numbers, numbers.astype("float32"), numbers % 3 == 0):
            back = view.kernel(view.matrices(kernel))
            assert np.array_equal(back, kernel) and back.dtype == kernel.dtype, geometry(layer)


@pytest.mark.parametrize("name", [name for name in VIEWS if "Conv" in name and "Separable" not in name])
def test_swapped_taps_a_shifted_input_and_a_missing_bias_are_seen(name):
    """The comparison above can fail."""
    rank = int(name.replace("Transpose", "")[-2])
    sizes = {} if "Depthwise" in name else {"filters": 5}
    for padding in ("valid", "same"):
        layer = getattr(layers, name)(**sizes, kernel_size=3, padding=padding)
        x = randomized(layer, image_shape(rank, 8, 3))
        y, view = np.array(layer(x)), view_of(layer)
        at = np.arange(view.count(x.shape))
        right, wanted = product(layer, view, x, at), view.outputs(y, at)
        swapped = np.flip(np.array(layer.kernel), range(rank))
        for wrong in (
            product(layer, view, x, at, kernel=swapped),
            product(layer, view, np.roll(x, 1, axis=1), at),
            right - np.array(layer.bias).reshape(len(right), 1, -1),
        ):
            assert np.abs(right - wanted).max() < 1e-5 and np.abs(wrong - wanted).max() > 1e-2


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_only_those_transposed_convolutions_are_left_out_which_the_layer_itself_cannot_run(rank):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow refuses them")
    cls = getattr(layers, f"Conv{rank}DTranspose")
    for kernel, extra in itertools.product((2, 3), (None, 0, 1)):
        layer = cls(4, kernel, strides=2, padding="same", output_padding=extra)
        x = np.zeros(image_shape(rank, 4, 3), "float32")
        if refused(kernel, "same", 1, extra):
            with pytest.raises(Exception, match="Exception encountered when calling"):
                layer(x)
        else:
            layer(x)


@pytest.mark.parametrize("name", [name for name in VIEWS if "Conv" in name])
def test_channels_first_is_the_twin_of_channels_last(name):
    """By the views alone: TensorFlow's CPU kernels do not run channels_first."""
    rank = int(name.replace("Transpose", "")[-2])
    sizes = {} if "Depthwise" in name else {"filters": 6}
    for padding, s in itertools.product(("valid", "same"), (1, 2)):
        facts = {**sizes, "kernel_size": 3, "padding": padding, "strides": s}
        if name in ("Conv1D", "Conv2D", "Conv3D"):
            facts["groups"] = 3
        last = getattr(layers, name)(**facts, data_format="channels_last")
        first = getattr(layers, name)(**facts, data_format="channels_first")
        x = randomized(last, image_shape(rank, 6, 3))
        y, x_first = np.array(last(x)), np.moveaxis(x, -1, 1)
        first.build(x_first.shape)
        first.set_weights(last.get_weights())
        a, b = view_of(last), view_of(first)
        assert b.count(x_first.shape) == a.count(x.shape)
        at = np.random.default_rng(0).permutation(a.count(x.shape))
        assert np.array_equal(b.rows(x_first, at), a.rows(x, at))
        assert np.array_equal(b.outputs(np.moveaxis(y, -1, 1), at), a.outputs(y, at))
        assert np.abs(product(first, b, x_first, at) - a.outputs(y, at)).max() < 1e-5
        assert not np.array_equal(b.outputs(y.reshape(np.moveaxis(y, -1, 1).shape), at), a.outputs(y, at))


@pytest.mark.parametrize(
    "equation, out, shape",
    [
        ("ab...,bc->ac...", (5,), (3, 4, 6)),  # the ellipsis is no batch
        ("abc,cd->ad", (5,), (2, 3, 4)),  # b is summed without the kernel
        ("abc,bc->abc", (3, 4), (2, 3, 4)),  # nothing is summed
    ],
)
def test_an_equation_that_is_no_product_of_rows_and_a_matrix_has_no_view(equation, out, shape):
    layer = layers.EinsumDense(equation, out)
    layer(np.zeros(shape, "float32"))
    assert view_of(layer) is None and view_of(layers.TimeDistributed(layer)) is None


@pytest.mark.parametrize(
    "equation, out, bias",
    [("abc,cd->abd", (3, 5), "b"), ("abc,bcd->abd", (3, 5), "d"), ("abc,cde->abed", (3, 6, 5), "ed")],
)
def test_a_bias_that_is_not_one_number_per_output_is_not_called_one(equation, out, bias):
    """The rest is the layer's output still."""
    layer = layers.EinsumDense(equation, out, bias_axes=bias)
    x = randomized(layer, (2, 3, 4))
    view, y = view_of(layer), np.array(layer(x)) - np.array(layer.bias)
    at = np.arange(view.count(x.shape))
    assert not view.has_bias
    assert np.abs(product(layer, view, x, at) - view.outputs(y, at)).max() < 1e-5


class Conv2D(layers.Conv2D):
    """A user's own, which may compute anything."""


def test_what_is_not_known_has_no_view():
    for layer in (layers.BatchNormalization(), layers.Embedding(3, 4), layers.LSTM(3), Conv2D(3, 3)):
        assert view_of(layer) is None and view_of(layers.TimeDistributed(layer)) is None
    assert view_of(layers.SeparableConv2D(3, 3), "depthwise_kernel") is None
    assert view_of(layers.SeparableConv2D(3, 3), "pointwise_kernel") is not None
