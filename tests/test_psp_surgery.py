"""From learned structure to a smaller network: settle, fold, take out, shrink; always with the same outputs."""

import itertools
import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import randomize

from keras_prune import Channels, cut, dead_units, metrics, plan, strip
from keras_prune import layers as psp
from keras_prune.layers import PLAIN, PSPConv2D, PSPDense
from keras_prune.surgery import relative_difference, settle, smaller_kernels
from keras_prune.surgery.rewiring import candidates

STRUCTURES = ["column", "channel", "shape", "layer", "filter", ("layer", "channel"), ("filter", "shape")]


def learned(model, seed=0, threshold=0.1):
    """Random weights, and alphas of which some structures of every layer are pruned, some are negative."""
    randomize(model, seed)
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if type(layer) not in PLAIN:
            continue
        for structure, alpha in layer.alphas.items():
            layer.thresholds[structure].assign(threshold)
            value = rng.choice([-1, 1], alpha.shape) * rng.uniform(0.5, 1.5, alpha.shape)
            value[rng.random(alpha.shape) < 0.5] *= 0.01
            alpha.assign(value)
    return model


def some_input(model, samples=3, seed=5):
    return np.random.default_rng(seed).normal(size=(samples, *model.input_shape[1:])).astype("float32")


def network(structure, padding="same", strides=1, dilation=1, norm=True, bias=False):
    """A plain part, a residual block and a concatenation, every convolution but the first one and the last PSP."""

    def conv(x, filters, padding="same", **more):
        x = PSPConv2D(filters, 3, padding=padding, structure=structure, use_bias=bias, **more)(x)
        return layers.BatchNormalization()(x) if norm else x

    inputs = keras.Input((13, 13, 3))
    x = layers.ReLU()(layers.Conv2D(6, 3, padding="same")(inputs))
    x = layers.ReLU()(conv(x, 8, padding, strides=strides, dilation_rate=dilation))
    y = layers.ReLU()(conv(x, 8))
    x = layers.ReLU()(layers.Add()([x, conv(y, 8)]))
    x = layers.Concatenate()([x, conv(x, 4)])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(6, 3, padding=padding)(x)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


GEOMETRIES = [(p, s, d) for p in ("valid", "same") for s, d in ((1, 1), (2, 1), (1, 2))]


@pytest.mark.parametrize("norm, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_strip_computes_what_the_psp_layers_computed(structure, norm, bias):
    padding, strides, dilation = GEOMETRIES[(STRUCTURES.index(structure) + 3 * bias) % len(GEOMETRIES)]
    model = learned(network(structure, padding, strides, dilation, norm, bias))
    x = some_input(model)
    settled = settle(model)
    assert relative_difference(model, settled, x) < 1e-6
    small, report = strip(model, rewire=True, report=True)
    assert not any(type(layer) in PLAIN for layer in small.layers)
    assert relative_difference(settled, small, x) < 1e-5
    assert report.macs_after < report.macs_before
    assert small.count_params() < settled.count_params()
    other = learned(network(structure, padding, strides, dilation, norm, bias), seed=100)
    assert relative_difference(model, other, x) > 1e-2


def chain(structure, padding, strides, dilation, norm, bias):
    """Plain, PSP, plain; what the PSP layer computes also goes another way, so that its readers differ."""
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 1, activation="relu")(inputs)
    options = {"padding": padding, "strides": strides, "dilation_rate": dilation, "use_bias": bias}
    x = PSPConv2D(4, 3, structure=structure, **options)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x) if norm else x)
    x = layers.Concatenate()([layers.Conv2D(3, 3, padding="same")(x), layers.Conv2D(2, 1)(x)])
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.ReLU()(x)))


@pytest.mark.filterwarnings("ignore:.*outputs are the same for every input")  # where the only layer dies
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_strip_is_exact_for_every_padding_stride_dilation_norm_and_bias(structure):
    for number, (geometry, norm, bias) in enumerate(itertools.product(GEOMETRIES, (True, False), (True, False))):
        model = learned(chain(structure, *geometry, norm, bias), seed=number)
        settled = settle(model)
        small = strip(model, rewire=True, check=False)
        x = some_input(model)
        assert relative_difference(model, settled, x) < 1e-6, (geometry, norm, bias)
        assert relative_difference(settled, small, x) < 1e-5, (geometry, norm, bias)


def test_settled_kernels_are_bit_for_bit_what_the_layer_multiplies_with():
    model = learned(network(("column", "filter")))
    settled = settle(model)
    for old, new in zip(model.layers, settled.layers):
        if type(old) in PLAIN:
            assert type(new) is PLAIN[type(old)] and new.name == old.name
            np.testing.assert_array_equal(ops.convert_to_numpy(old.kernel), ops.convert_to_numpy(new.kernel))
    assert settle(settled) is settled


def test_settled_model_has_no_alpha_in_its_count():
    model = keras.Sequential([keras.Input((5,)), PSPDense(4, structure=("channel", "filter"))])
    assert model.count_params() == 5 * 4 + 4 + (5 + 4) + 2
    assert settle(model).count_params() == 5 * 4 + 4


# -- taps ------------------------------------------------------------------------------------------------------------


def one_layer(layer, shape):
    inputs = keras.Input(shape)
    return randomize(keras.Model(inputs, layer(inputs)), 3)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (3, 1), (1, 2), ((2, 1), 1)])
@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 3)])
def test_every_border_that_is_zero_for_all_channels_makes_the_kernel_smaller(padding, strides, dilation, size):
    spans = [[(a, b) for a in range(k) for b in range(a + 1, k + 1)] for k in size]
    for number, (rows, columns) in enumerate(itertools.product(*spans)):
        if number % 3 and (rows, columns) != ((1, 2), (1, 2)):
            continue
        for length in (11, 12):
            model = one_layer(layers.Conv2D(4, size, strides, padding, dilation_rate=dilation), (length, length, 2))
            kernel = np.zeros(model.layers[1].kernel.shape, "float32")
            inner = (slice(*rows), slice(*columns))
            kernel[inner] = np.random.default_rng(0).normal(size=kernel[inner].shape)
            model.layers[1].kernel.assign(kernel)
            small, _ = smaller_kernels(model, rewire=True)
            found = next(layer for layer in small.layers if isinstance(layer, layers.Conv2D))
            assert found.kernel_size == (rows[1] - rows[0], columns[1] - columns[0])
            assert relative_difference(model, small, some_input(model)) < 1e-6


def test_a_centre_tap_becomes_a_pointwise_convolution_of_any_size_of_image_and_nothing_in_front():
    model = one_layer(layers.Conv2D(4, 3, padding="same"), (None, None, 2))
    kernel = np.zeros((3, 3, 2, 4), "float32")
    kernel[1, 1] = 1 + np.arange(8).reshape(2, 4)
    model.layers[1].kernel.assign(kernel)
    small, notes = smaller_kernels(model, rewire=False)
    assert small.layers[1].kernel_size == (1, 1) and len(small.layers) == 2 and "lost taps" in notes[0]
    for shape in ((2, 9, 12, 2), (1, 5, 4, 2)):
        assert relative_difference(model, small, np.random.default_rng(0).normal(size=shape).astype("float32")) < 1e-6


def test_with_strides_and_unknown_lengths_the_padding_depends_on_the_length_and_the_kernel_stays():
    model = one_layer(layers.Conv2D(4, 3, 2, padding="same"), (None, None, 2))
    kernel = np.zeros((3, 3, 2, 4), "float32")
    kernel[1, 1] = 1
    model.layers[1].kernel.assign(kernel)
    small, _ = smaller_kernels(model, rewire=True)
    assert small.layers[1].kernel_size == (3, 3)


OTHERS = {
    "Conv1D": (layers.Conv1D(4, 5), (11, 3)),
    "Conv1D causal": (layers.Conv1D(4, 5, padding="causal", dilation_rate=2), (11, 3)),
    "Conv3D": (layers.Conv3D(4, 3, padding="same"), (6, 5, 7, 2)),
    "grouped": (layers.Conv2D(4, 3, padding="same", groups=2), (7, 7, 4)),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3, padding="same"), (9, 3)),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2), (9, 9, 3)),
    "DepthwiseConv2D strided": (layers.DepthwiseConv2D(3, 2, padding="same"), (9, 9, 3)),
    "SeparableConv2D": (layers.SeparableConv2D(4, 3, padding="same"), (9, 9, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("side", ["first", "last", "both"])
def test_other_convolutions_lose_border_taps_too(name, side):
    layer, shape = OTHERS[name]
    layer = type(layer).from_config(layer.get_config())
    model = one_layer(layer, shape)
    kernel = layer.depthwise_kernel if "Separable" in name else layer.kernel
    value = np.array(ops.convert_to_numpy(kernel))
    for axis in range(len(layer.kernel_size)):
        lines = np.moveaxis(value, axis, 0)
        if side != "last":
            lines[0] = 0
        if side != "first":
            lines[-1] = 0
    kernel.assign(value)
    small, _ = smaller_kernels(model, rewire=True)
    found = next(new for new in small.layers if type(new) is type(layer))
    assert all(k == old - (2 if side == "both" else 1) for k, old in zip(found.kernel_size, layer.kernel_size))
    assert relative_difference(model, small, some_input(model)) < 1e-6


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("taps, strides", [(3, 1), (3, 2), (4, 2), (5, 2), (6, 3)])
def test_a_transposed_kernel_shrinks_only_where_a_padding_argument_says_the_same(padding, taps, strides):
    shrunk = 0
    for start, stop in itertools.combinations(range(taps + 1), 2):
        model = one_layer(layers.Conv2DTranspose(3, taps, strides, padding), (5, 6, 2))
        kernel = np.zeros(model.layers[1].kernel.shape, "float32")
        kernel[start:stop, start:stop] = 1 + np.arange(3 * 2).reshape(3, 2)
        model.layers[1].kernel.assign(kernel)
        small, _ = smaller_kernels(model, rewire=True)
        shrunk += small.layers[1].kernel_size != (taps, taps)
        assert relative_difference(model, small, some_input(model)) < 1e-6
    assert shrunk > 0 or padding == "valid"


SILENT = {
    "Dense": layers.Dense(2, activation="tanh"),
    "same": layers.Conv2D(2, 3, padding="same", activation="relu"),
    "valid": layers.Conv2D(2, (3, 2)),
    "strided": layers.Conv2D(2, 3, 2, padding="same", use_bias=False),
    "strided, valid": layers.Conv2D(2, 3, (2, 3)),
    "dilated": layers.Conv2D(2, 3, dilation_rate=2, activation="softmax"),
    "wider than its input": layers.Conv2D(5, 3, padding="same"),
    "DepthwiseConv2D": layers.DepthwiseConv2D(3),
    "SeparableConv2D": layers.SeparableConv2D(4, 3, strides=2),
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("size", [(8, 9), (None, None)], ids=str)
def test_a_kernel_of_zeros_becomes_numbers_of_the_same_shape(name, size):
    layer = type(SILENT[name]).from_config(SILENT[name].get_config())
    inputs = keras.Input((*size, 3))
    x = layers.ReLU()(layers.BatchNormalization()(inputs))
    x = layer(x)
    model = randomize(keras.Model(inputs, x * x))
    kernel = layer.pointwise_kernel if "Separable" in name else layer.kernel
    kernel.assign(np.zeros(kernel.shape))
    small, notes = smaller_kernels(model, rewire=False)
    kinds = {type(new) for new in small.layers}
    assert layers.Rescaling in kinds and type(layer) not in kinds and layers.ReLU not in kinds
    assert small.count_params() == 0 and "became numbers" in notes[0]
    for shape in ((2, 8, 9, 3), (1, 11, 7, 3)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        if size[0] is None or shape[1:3] == size:
            assert small(x).shape == model(x).shape
            assert relative_difference(model, small, x) < 1e-6


def test_a_head_of_zeros_is_left_as_it_is_still_to_be_trained():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4), layers.Dense(2, kernel_initializer="zeros")])
    small, notes = smaller_kernels(model)
    assert small is model and not notes


# -- gathers ---------------------------------------------------------------------------------------------------------


def ragged(shape=(9, 9, 4), **arguments):
    model = one_layer(layers.Conv2D(5, 3, padding="same", activation="relu", **arguments), shape)
    keep = np.random.default_rng(0).random((3, 3, 4, 1)) < 0.3
    model.layers[1].kernel.assign(model.layers[1].kernel * keep.astype("float32"))
    return model, int(keep.sum())


@pytest.mark.parametrize("arguments", [{}, {"strides": 2}, {"dilation_rate": 2}, {"use_bias": False}], ids=str)
def test_ragged_columns_cost_exactly_their_columns_and_compute_the_same(arguments):
    model, columns = ragged(**arguments)
    small, notes = smaller_kernels(model, rewire=True)
    positions = np.prod(model.output_shape[1:3])
    assert metrics.macs(Channels(small)) == columns * 5 * positions
    assert metrics.macs(Channels(model)) == 36 * 5 * positions
    assert relative_difference(model, small, some_input(model)) < 1e-6
    assert "gather" in notes[0]


def test_a_gather_is_used_only_where_it_is_faster_and_what_stays_dense_is_said():
    model, _ = ragged()
    asked = []

    def as_macs(candidate):
        asked.append(candidate)
        return metrics.macs(Channels(candidate))

    fast, _ = smaller_kernels(model, latency=as_macs)
    assert len(asked) >= 2 and metrics.macs(Channels(fast)) < metrics.macs(Channels(model))
    slow, notes = smaller_kernels(model, latency=lambda candidate: len(candidate.layers))
    assert slow is model and "not measured faster: conv2d" in notes[0]
    assert smaller_kernels(model, rewire=False) == (model, [])


def test_the_default_measures_on_this_machine():
    kernel = np.zeros((1, 1, 512, 64), "float32")
    kernel[:, :, :8] = 1
    model = one_layer(layers.Conv2D(64, 1), (16, 16, 512))
    model.layers[1].kernel.assign(kernel)
    small, _ = smaller_kernels(model)  # 64 times fewer multiplications: no noise hides that
    assert small.layers[-1].kernel.shape[2] == 8
    assert relative_difference(model, small, some_input(model)) < 1e-6


@pytest.mark.parametrize(
    "layer", [layers.SeparableConv2D(4, 3), layers.DepthwiseConv2D(3, 2, padding="same")], ids=lambda v: v.name
)
def test_explicit_padding_and_cropping_are_measured_for_other_layers_too(layer):
    model = one_layer(type(layer).from_config(layer.get_config()), (12, 12, 3))
    kernel = model.layers[1].depthwise_kernel if "Separable" in type(layer).__name__ else model.layers[1].kernel
    value = np.array(kernel)
    value[0] = 0
    kernel.assign(value)
    small, notes = smaller_kernels(model)
    assert notes and relative_difference(model, small, some_input(model)) < 1e-6


def test_inputs_that_others_need_are_gathered_in_front_of_the_kernel():
    inputs = keras.Input((8, 8, 6))
    x = layers.Conv2D(8, 3, padding="same", name="shared")(inputs)
    a = layers.Conv2D(4, 3, padding="same", name="a")(x)
    b = layers.Conv2D(4, 3, padding="same", name="b")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Concatenate()([a, b])))))
    for name, gone in (("a", [0, 1, 5]), ("b", [1, 2])):
        kernel = np.array(model.get_layer(name).kernel)
        kernel[:, :, gone] = 0
        model.get_layer(name).kernel.assign(kernel)
    small = strip(model, rewire=True)
    assert small.get_layer("shared").filters == 7  # channel 1 has no reader left
    assert [small.get_layer(name).kernel.shape[2] for name in "ab"] == [5, 6]
    again = plan(small, 0.3, round_to=1)  # and the gathered network can be pruned on
    x = some_input(model)
    assert again.reached > 0.2 and relative_difference(again.zero(), again.cut(), x) < 1e-5


def test_rows_of_a_dense_kernel_that_are_zero_are_not_read():
    model = keras.Sequential([keras.Input((10,)), layers.Dense(8, activation="relu"), layers.Dense(3)])
    randomize(model)
    kernel = np.array(model.layers[0].kernel)
    kernel[[0, 3, 4, 9]] = 0
    model.layers[0].kernel.assign(kernel)
    small = strip(model, rewire=True)
    assert metrics.macs(Channels(small)) == 6 * 8 + 8 * 3
    assert relative_difference(model, small, some_input(model)) < 1e-6


def test_gathers_survive_saving(tmp_path):
    model, _ = ragged()
    small, _ = smaller_kernels(model, rewire=True)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert relative_difference(small, again, some_input(model)) == 0


def test_candidates_count_their_multiply_accumulates_truthfully():
    model, columns = ragged()
    layer = model.layers[1]
    for option in candidates(layer, [layer.input]):
        inputs = keras.Input(model.input_shape[1:])
        new = type(layer).from_config(option.config(layer.get_config()))
        whole = metrics.macs(Channels(model))
        made = metrics.macs(Channels(keras.Model(inputs, new(option.before(inputs, {})))))
        assert made == pytest.approx(option.macs * whole)


# -- constants -------------------------------------------------------------------------------------------------------


def test_a_constant_unit_goes_into_the_next_bias_by_the_number_worked_out_by_hand():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, activation="relu"), layers.Dense(1)])
    first, second = model.layers
    first.set_weights([np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([0.0, 3.0])])  # unit 1 is relu(3) for every input
    second.set_weights([np.array([[1.0], [5.0]]), np.array([0.5])])
    small, report = strip(model, report=True)
    assert small.layers[0].units == 1
    assert ops.convert_to_numpy(small.layers[1].bias) == pytest.approx([0.5 + 3 * 5])
    assert "1 constant units folded" in report.notes[0]


def conv_bn_conv(padding, bias=True, norm_behind=False):
    inputs = keras.Input((9, 9, 2))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="made")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(5, 3, padding=padding, use_bias=bias, name="reader")(x)
    x = layers.BatchNormalization(name="behind")(x) if norm_behind else x
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(layers.ReLU()(x)))))
    kernel = np.array(model.get_layer("made").kernel)
    kernel[..., [1, 3, 4]] = 0
    model.get_layer("made").kernel.assign(kernel)
    model.get_layer("norm").beta.assign(np.arange(1, 7))
    return model


@pytest.mark.parametrize("bias, norm_behind", [(True, False), (False, True), (False, False)])
def test_constants_leave_in_front_of_a_convolution_without_padding(bias, norm_behind):
    model = conv_bn_conv("valid", bias, norm_behind)
    small = strip(model)
    assert small.get_layer("made").filters == 3
    assert small.get_layer("reader").use_bias is (not norm_behind)
    assert relative_difference(model, small, some_input(model)) < 1e-5


def test_constants_in_front_of_padding_merge_into_one():
    model = conv_bn_conv("same")
    small, report = strip(model, report=True)
    assert small.get_layer("made").filters == 4
    assert relative_difference(model, small, some_input(model)) < 1e-5
    assert any("2 constant units merged into 1" in note for note in report.notes)


def test_a_constant_of_zero_leaves_whatever_the_padding():
    model = conv_bn_conv("same")
    norm = model.get_layer("norm")
    shift = norm.gamma * norm.moving_mean / ops.sqrt(norm.moving_variance + norm.epsilon)
    norm.beta.assign(shift - 0.5)  # relu makes zeros of it
    small = strip(model)
    assert small.get_layer("made").filters == 3


def test_the_border_is_why_a_constant_cannot_just_be_added_behind_padding():
    model = conv_bn_conv("same")
    channels = Channels(model)
    ids = channels.weights[0].axes[-1]
    small = cut(channels, ids[[1, 3, 4]])  # the control: cut as if the constants were zero
    assert relative_difference(model, small, some_input(model)) > 1e-2


def test_a_unit_that_varies_is_never_taken_for_a_constant():
    """A dead ReLU on the probe batch is no proof: only kernels of zeros are."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, activation="relu"), layers.Dense(2)])
    randomize(model)
    model.layers[0].bias.assign(np.full(6, -50.0))
    small = strip(model)
    assert small.layers[0].units == 6
    x = 100 * some_input(model)
    assert relative_difference(model, small, x) < 1e-6


# -- branches --------------------------------------------------------------------------------------------------------


def residual(dead, beta=0.4, last=True):
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.Conv2D(6, 3, padding="same", name="stem")(inputs))
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same", name="inner")(x)))
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, padding="same", name="outer", use_bias=False)(y))
    x = layers.ReLU()(layers.Add(name="sum")([x, y]))
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))
    model.get_layer("norm").beta.assign(np.full(6, beta))
    model.get_layer(dead).kernel.assign(np.zeros(model.get_layer(dead).kernel.shape))
    return model


def test_a_dead_branch_leaves_with_its_batchnorm_and_its_constant_is_added():
    model = residual("outer")
    small, report = strip(model, report=True)
    names = [layer.name for layer in small.layers]
    assert "inner" not in names and "outer" not in names and "norm" not in names and "sum_offset" in names
    assert (report.layers_before, report.layers_after) == (4, 2)
    assert relative_difference(model, small, some_input(model)) < 1e-6


def test_a_dead_branch_that_adds_nothing_leaves_nothing_behind():
    model = residual("outer")
    norm = model.get_layer("norm")
    norm.moving_mean.assign(np.zeros(6))
    norm.beta.assign(np.zeros(6))
    small = strip(model)
    assert [type(layer).__name__ for layer in small.layers] == [
        "InputLayer",
        "Conv2D",
        "ReLU",
        "ReLU",
        "GlobalAveragePooling2D",
        "Dense",
    ]
    assert relative_difference(model, small, some_input(model)) < 1e-6


def test_a_branch_that_differs_at_the_border_stays_with_one_channel():
    model = residual("inner")
    small, report = strip(model, report=True)
    assert type(small.get_layer("inner")) is layers.Rescaling and small.get_layer("outer").kernel.shape[2] == 1
    assert (report.layers_before, report.layers_after) == (4, 3)
    assert any("differs between positions" in note for note in report.notes)
    assert relative_difference(model, small, some_input(model)) < 1e-5


def test_a_dead_branch_of_a_nested_model_leaves():
    inner = residual("outer")
    inputs = keras.Input((8, 8, 3))
    model = randomize(keras.Model(inputs, layers.Dense(2)(inner(layers.Conv2D(3, 1)(inputs)))), 7)
    inner.get_layer("outer").kernel.assign(np.zeros(inner.get_layer("outer").kernel.shape))
    small = strip(model)
    names = [layer.name for layer in small._flatten_layers()]
    assert "outer" not in names and "stem" in names
    assert relative_difference(model, small, some_input(model)) < 1e-5


def dense_block(padding, dead):
    """Three layers that read all that came before, as in a DenseNet."""
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for number in range(3):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = PSPConv2D(4, 3 if padding == "same" else 1, padding=padding, structure="layer", name=f"d{number}")(y)
        x = layers.Concatenate()([x, y])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(5, 1, name="transition")(x)
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))
    for number in dead:
        model.get_layer(f"d{number}").alphas["layer"].assign([[[[0.01]]]])
    return model


def test_a_dead_part_of_a_concatenation_leaves_altogether():
    model = dense_block("valid", [0, 1])
    small, report = strip(model, report=True)
    names = [layer.name for layer in small.layers]
    assert "d0" not in names and "d1" not in names and "d2" in names
    assert report.layers_before - report.layers_after == 2
    assert relative_difference(model, small, some_input(model)) < 1e-5


def test_dead_layers_in_front_of_padding_share_one_channel_of_all():
    model = dense_block("same", [0, 1])
    small, report = strip(model, report=True, rewire=True)
    names = [layer.name for layer in small.layers]
    assert type(small.get_layer("d0")) is layers.Rescaling and "d1" not in names
    assert small.get_layer("d0").output.shape[-1] == 1
    assert report.layers_before - report.layers_after == 2
    assert relative_difference(model, small, some_input(model)) < 1e-5


def test_a_network_that_no_longer_looks_at_its_input_is_pointed_out():
    model = keras.Sequential([keras.Input((5,)), PSPDense(4, structure="layer", activation="relu"), layers.Dense(2)])
    model.layers[0].alphas["layer"].assign([[0.01]])
    with pytest.warns(UserWarning, match="outputs are the same for every input"):
        small = strip(model)
    assert relative_difference(model, small, some_input(model)) < 1e-6


# -- units nobody reads ----------------------------------------------------------------------------------------------


def test_units_that_nobody_reads_leave_and_so_does_what_only_they_read():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, activation="relu"), layers.Dense(7, activation="relu"), layers.Dense(2)]
    )
    randomize(model)
    first, second, third = (layer.kernel for layer in model.layers)
    third.assign(np.array(third) * (np.arange(7) < 4)[:, None])  # units 4, 5, 6 of the second layer are not read
    value = np.array(second)
    value[2, :4] = 0  # and unit 2 of the first only by those
    second.assign(value)
    small = strip(model)
    assert [layer.units for layer in small.layers] == [5, 4, 2]
    assert relative_difference(model, small, some_input(model)) < 1e-6


def test_a_recurrent_unit_that_the_next_layer_ignores_is_still_read_by_its_siblings():
    model = keras.Sequential([keras.Input((6, 3)), layers.LSTM(5), layers.Dense(2)])
    randomize(model)
    model.layers[1].kernel.assign(np.array(model.layers[1].kernel) * (np.arange(5) > 1)[:, None])
    assert not len(dead_units(Channels(model)))
    assert relative_difference(model, strip(model), some_input(model)) < 1e-6


def test_of_a_separable_convolution_either_kernel_can_stop_reading_an_input():
    for kernel, axis in (("depthwise_kernel", 2), ("pointwise_kernel", 2)):
        inputs = keras.Input((7, 7, 3))
        x = layers.SeparableConv2D(4, 3, name="reader")(layers.Conv2D(6, 1, name="made")(inputs))
        model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
        variable = getattr(model.get_layer("reader"), kernel)
        value = np.array(variable)
        value.swapaxes(0, axis)[[1, 4]] = 0
        variable.assign(value)
        small = strip(model)
        assert small.get_layer("made").filters == 4
        assert relative_difference(model, small, some_input(model)) < 1e-5


# -- the way out -----------------------------------------------------------------------------------------------------


def test_the_report_counts_structures_layers_parameters_and_macs():
    model = learned(network("channel"))
    small, report = strip(model, report=True, rewire=True)
    for layer in model.layers:
        if type(layer) in PLAIN:
            alive = np.abs(layer.alphas["channel"]) >= 0.1
            assert report.structures[layer.name] == {"channel": (alive.size, int(alive.sum()))}
    assert report.params_after == small.count_params()
    assert report.macs_after == metrics.macs(Channels(small))
    assert json.loads(report.to_json())["structures"] == {
        k: {s: list(c) for s, c in v.items()} for k, v in report.structures.items()
    }
    assert "channels left" in str(report)


def test_training_goes_on_after_strip():
    model = learned(network("filter"))
    model.compile("adam", "mse", metrics=["mae"])
    x, y = some_input(model, 8), np.zeros((8, 4), "float32")
    model.fit(x, y, verbose=0)
    small = strip(model, rewire=True)
    assert small.compiled
    before = small.evaluate(x, y, verbose=0)[0]
    small.fit(x, y, epochs=3, verbose=0)
    assert small.evaluate(x, y, verbose=0)[0] < before


def test_momenta_go_along_with_kernels_that_lose_taps():
    model = one_layer(layers.Conv2D(4, 3, padding="same"), (8, 8, 2))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    x = some_input(model)
    model.fit(x, np.zeros((3, 8, 8, 4), "float32"), verbose=0)
    value = np.array(model.layers[1].kernel)
    value[[0, 2]] = 0
    model.layers[1].kernel.assign(value)
    small = strip(model)
    old, new = (next(np.array(v) for v in m.optimizer.variables if "kernel" in v.name) for m in (model, small))
    np.testing.assert_array_equal(new, old[1:2])


def test_mixed_precision_settles_and_strips():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = learned(network(("column", "filter")))
    finally:
        keras.config.set_dtype_policy(before)
    small = strip(model, rewire=True)
    assert relative_difference(model, small, some_input(model)) < 2e-2


def test_a_psp_network_saved_and_loaded_strips_to_the_same(tmp_path):
    model = learned(network("filter"))
    model.save(tmp_path / "psp.keras")
    again = keras.saving.load_model(tmp_path / "psp.keras")
    assert relative_difference(strip(model), strip(again), some_input(model)) == 0


def test_every_psp_layer_is_tried_here():
    """Every type settles to its parent with the same outputs."""
    made = {
        PSPDense: (psp.PSPDense(5), (4,)),
        psp.PSPConv1D: (psp.PSPConv1D(5, 3), (8, 3)),
        psp.PSPConv2D: (psp.PSPConv2D(5, 3), (8, 8, 3)),
        psp.PSPConv3D: (psp.PSPConv3D(5, 3), (5, 5, 5, 3)),
        psp.PSPConv2DTranspose: (psp.PSPConv2DTranspose(5, 3, 2), (6, 6, 3)),
        psp.PSPDepthwiseConv2D: (psp.PSPDepthwiseConv2D(3), (8, 8, 3)),
        psp.PSPSeparableConv2D: (psp.PSPSeparableConv2D(5, 3), (8, 8, 3)),
    }
    assert set(made) == set(PLAIN)
    for layer, shape in made.values():
        for structure in psp.STRUCTURES:
            config = {**layer.get_config(), "structure": structure}
            inputs = keras.Input(shape)
            x = type(layer).from_config(config)(inputs)
            x = layers.Dense(3)(layers.Flatten()(layers.ReLU()(x)))
            model = learned(keras.Model(inputs, x), 4)
            assert relative_difference(model, strip(model, rewire=True), some_input(model)) < 1e-5


def test_a_bad_rewire_is_refused():
    with pytest.raises(ValueError, match="rewire='always' was passed"):
        strip(learned(network("layer")), rewire="always")


def test_constants_that_cancel_only_together_are_not_folded_apart():
    """Units 0 and 1 are the same constant, read with opposite weights behind padding; 1 has another reader, too."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 1, activation="relu", name="made")(inputs)
    a = layers.Conv2D(3, 3, padding="same", name="a")(x)
    b = layers.Conv2D(3, 1, name="b")(
        layers.Multiply()([x, layers.Conv2D(4, 1, activation="sigmoid", name="gate")(inputs)])
    )
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Concatenate()([a, b])))))
    made, reads, gate = (model.get_layer(name).kernel for name in ("made", "a", "gate"))
    made.assign(made * np.array([0, 0, 1, 1], "float32"))
    gate.assign(gate * np.array([0, 1, 1, 1], "float32"))  # unit 0 is a constant behind its gate, unit 1 is not
    model.get_layer("made").bias.assign([2.0, 2.0, 0.1, 0.1])
    value = np.array(reads)
    value[:, :, 1] = -value[:, :, 0]
    reads.assign(value)
    assert relative_difference(model, strip(model, rewire=True), some_input(model)) < 1e-5
