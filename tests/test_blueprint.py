"""A file cut at some widths is what the converter makes of the model cut at these widths, or an error says why not."""

import keras
import numpy as np
import pytest
import zoo
from keras import layers, ops
from test_export_zoo import ZOO as EXPORTED
from test_export_zoo import randomised

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

from keras_prune import Channels
from keras_prune.surgery import cut
from tflite_export import RECIPES, flatbuffer, to_tflite
from tflite_export.blueprint import Blueprint
from tflite_export.inputs import generate, model_inputs
from tflite_export.runner import Runner


class Case:
    """A model converted whole, and units to remove."""

    def __init__(self, model, recipe="float32", seed=0):
        self.model, self.recipe, self.channels = model, recipe, Channels(model)
        self.data = generate(model_inputs(model), 16)
        self.whole = to_tflite(model, recipe, self.data)
        self.blueprint = Blueprint(self.whole, self.channels)
        random = np.random.default_rng(seed)
        groups = self.channels.groups
        parts = [random.choice(g.units, random.integers(1, len(g)), replace=False) for g in groups]
        self.removed = np.concatenate(parts)
        self.alive = self.channels.alive(self.removed)

    def converted(self) -> bytes:
        return to_tflite(cut(self.channels, self.removed), self.recipe, self.data)

    def outputs(self, content: bytes) -> dict[str, np.ndarray]:
        """By name; a cut file has the order of the whole one, and no names."""
        whole, runner = Runner(self.whole), Runner(content)
        signed = whole if not flatbuffer.signature(content)[0] else runner
        names = [each.name for each in model_inputs(self.model)]
        data = [self.data[names.index(port.name)] for port in signed.inputs] if len(names) > 1 else self.data
        found = runner.run(data)
        return {port.name: values for port, values in zip(signed.outputs, found)}

    def error(self, content: bytes, other: bytes) -> float:
        a, b = self.outputs(content), self.outputs(other)
        if len(a) == len(b) == 1:
            a, b = {"": next(iter(a.values()))}, {"": next(iter(b.values()))}
        assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
        return max(float(np.abs(a[name] - b[name]).max() / (np.abs(b[name]).max() + 1e-9)) for name in a)


def described(content: bytes) -> list[tuple]:
    """Operators with shapes and types of their tensors; without constants that are unpacked when the file is loaded."""
    model = flatbuffer.unpacked(content)
    graph, names = model.subgraphs[0], flatbuffer.operator_names(model.operatorCodes)

    def tensor(index):
        found = graph.tensors[index]
        return tuple(() if found.shape is None else found.shape.tolist()), found.type

    return sorted(
        (
            names[operator.opcodeIndex] + str(getattr(operator.builtinOptions, "depthMultiplier", "")),
            *(tensor(t) for t in [*operator.inputs, *operator.outputs] if t >= 0),
        )
        for operator in graph.operators
        if names[operator.opcodeIndex] != "DEQUANTIZE" or operator.inputs[0] in graph.inputs
    )


def sizes(operator: tuple) -> tuple:
    return operator[0], [shape for shape, _ in operator[1:]]


FOLLOWED = {}
UNFOLLOWED = {}


def followed(build):
    FOLLOWED[build.__name__] = build
    return build


def unfollowed(build):
    UNFOLLOWED[build.__name__] = build
    return build


def image(*shape):
    return keras.Input(shape or (8, 8, 3))


def conv(width, size=3, **arguments):
    return layers.Conv2D(width, size, padding="same", **{"activation": "relu", **arguments})


def network(inputs, x):
    if len(x.shape) == 4:
        x = layers.GlobalAveragePooling2D()(conv(5)(x))
    return randomised(keras.Model(inputs, layers.Dense(3)(x if len(x.shape) == 2 else layers.Flatten()(x))))


def biased(model):
    """Random biases, kernels as they are."""
    random = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(random.normal(size=weight.shape))
    return model


@followed
def as_many_rows_as_channels_reversed():
    inputs = image()
    return network(inputs, conv(8)(inputs)[..., ::-1])


@followed
def channels_and_rows_swapped_and_back():
    inputs = image()
    x = ops.relu(ops.transpose(conv(8)(inputs), (0, 3, 1, 2)))
    return network(inputs, ops.transpose(x, (0, 2, 3, 1)))


@followed
def rows_and_columns_swapped():
    inputs = image()
    return network(inputs, ops.transpose(conv(8)(inputs), (0, 2, 1, 3)))


@followed
def tokens_as_wide_as_long():
    inputs = keras.Input((8, 8))
    x = layers.Dense(8, activation="relu")(inputs)
    x = layers.Permute((2, 1))(layers.Dense(8, activation="relu")(layers.Permute((2, 1))(x)))
    return network(inputs, layers.Dense(8, activation="relu")(x))


@followed
def equal_kernels_in_line():
    x = inputs = image(8, 8, 8)
    for _ in range(3):
        x = conv(8, kernel_initializer="ones")(x)
    return biased(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))


@followed
def zero_scales():
    inputs = image()
    x = conv(8, activation=None)(inputs)
    y = layers.BatchNormalization(gamma_initializer="zeros")(conv(8)(x))
    return biased(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(conv(5)(x + y)))))


@followed
def scale_before_convolution():
    inputs = image()
    x = layers.ReLU()(layers.BatchNormalization()(conv(8)(inputs)))
    return network(inputs, layers.ReLU()(layers.BatchNormalization()(conv(8, activation=None)(x))))


@followed
def layers_called_twice_in_two_branches():
    zeta, alpha = keras.Input((8, 8, 3), name="zeta"), keras.Input((8, 8, 3), name="alpha")
    one, two, flat = conv(8), conv(6), layers.Flatten()
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()([two(one(zeta)), one(alpha)]))
    outputs = [layers.Dense(3, name="y")(x), layers.Dense(2, name="x")(flat(two(one(alpha))))]
    return randomised(keras.Model([zeta, alpha], outputs))


@followed
def dense_called_twice():
    inputs = keras.Input((8,))
    twice = layers.Dense(8, activation="relu")
    x = twice(layers.Dense(8, activation="relu")(inputs))
    return network(inputs, layers.Concatenate()([x, twice(x)]))


@followed
def encoder_and_decoder():
    inputs = image()
    a = conv(8)(inputs)
    b = layers.Conv2DTranspose(8, 2, strides=2)(conv(12)(layers.MaxPooling2D()(a)))
    return network(inputs, conv(6)(layers.Concatenate()([b, a])))


@followed
def transposed_of_equal_widths():
    x = inputs = image()
    for _ in range(2):
        x = layers.Conv2DTranspose(8, 3, strides=2, padding="same", activation="relu")(x)
    return network(inputs, x)


@followed
def embeddings_as_many_as_wide():
    inputs = keras.Input((8,), dtype="int32")
    x = layers.Embedding(8, 8)(inputs) + layers.Embedding(8, 8)(inputs)
    return network(inputs, layers.Dense(8, activation="relu")(x))


@followed
def groups_small_and_large():
    inputs = image()
    return network(inputs, conv(16, groups=8)(conv(16, groups=2)(conv(8)(inputs))))


@followed
def depth_multipliers():
    inputs = image()
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, padding="same", activation="relu")(conv(4)(x))
    return network(inputs, layers.Flatten()(layers.SeparableConv2D(8, 3, depth_multiplier=2)(x)))


@followed
def squeeze_and_excite_by_dense():
    inputs = image()
    x = conv(16)(inputs)
    s = layers.Dense(4, activation="relu")(layers.GlobalAveragePooling2D()(x))
    s = layers.Reshape((1, 1, 16))(layers.Dense(16, activation="sigmoid")(s))
    return network(inputs, layers.Flatten()(x * s))


@followed
def slopes_of_every_place():
    inputs = image()
    x = layers.PReLU()(conv(8, activation=None)(inputs))
    return network(inputs, layers.Flatten()(layers.PReLU(shared_axes=[1, 2])(conv(6, activation=None)(x))))


@followed
def joined_rows():
    inputs = image(8, 8, 8)
    a = conv(8)(inputs)
    return network(inputs, layers.Concatenate(axis=1)([a, a + conv(8)(inputs)]))


@followed
def joined_columns_with_the_input():
    inputs = image(8, 8, 8)
    return network(inputs, layers.Concatenate(axis=2)([conv(8)(inputs), inputs]))


@followed
def uneven_parts_joined_in_another_order():
    inputs = image()
    a, b, c = ops.split(conv(12)(inputs), [2, 7], axis=-1)
    return network(inputs, layers.Concatenate()([c, a, ops.tanh(b)]))


@followed
def channels_padded_on_both_sides():
    inputs = image()
    y = conv(12, strides=2, activation=None)(x := conv(8)(inputs))
    return network(inputs, ops.relu(y + ops.pad(layers.AveragePooling2D(2)(x), [[0, 0], [0, 0], [0, 0], [1, 3]])))


@followed
def sum_of_padded():
    inputs = image()
    a, b = (conv(4, activation=None)(inputs) for _ in range(2))
    return network(inputs, ops.pad(a, [[0, 0]] * 3 + [[0, 4]]) + ops.pad(b, [[0, 0]] * 3 + [[4, 0]]))


@followed
def width_of_the_kernel_length():
    inputs = keras.Input((8, 8))
    x = layers.Conv1D(8, 8, padding="same", activation="relu")(inputs)
    return network(inputs, layers.Conv1D(8, 1, padding="same", activation="relu")(x))


@followed
def three_dimensions():
    inputs = keras.Input((4, 4, 4, 2))
    x = layers.Conv3D(8, 3, padding="same", activation="relu")(inputs)
    return network(inputs, layers.Conv3D(6, 2, activation="relu")(x))


@followed
def channels_become_places():
    inputs = keras.Input((1, 1, 8))
    x = layers.Reshape((8, 1, 1))(layers.Conv2D(8, 1, activation="relu")(inputs))
    return network(inputs, layers.Flatten()(layers.Conv2D(4, 1, activation="relu")(x)))


@followed
def summand_for_every_place():
    inputs = image()
    random = np.random.default_rng(0)
    x = conv(8)(inputs) + random.normal(size=(8, 8, 8)).astype("float32")
    return network(inputs, layers.Flatten()(conv(8)(x) * random.normal(size=(8, 1)).astype("float32")))


@followed
def equal_biases_and_thresholds_stored_once():
    x = inputs = image()
    for _ in range(3):
        x = layers.ReLU(max_value=6.0, negative_slope=0.1, threshold=0.5)(conv(8, bias_initializer="ones")(x))
    return keras.Model(inputs, layers.Dense(8)(layers.GlobalMaxPooling2D()(x)))


@followed
def enlarged():
    inputs = image()
    return network(inputs, layers.UpSampling2D(2, interpolation="bilinear")(conv(8)(inputs)))


def twins(first, second):
    """Two convolutions that nothing but their places in the network tells apart, with other biases."""
    inputs = image()
    x = layers.Concatenate()([layer(inputs) for layer in (second, first)])
    return biased(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(conv(6)(x)))))


@unfollowed
def equal_kernels_side_by_side():
    return twins(*(conv(8, kernel_initializer="ones") for _ in range(2)))


@unfollowed
def kernels_of_zeros_side_by_side():
    return twins(*(conv(8, kernel_initializer="zeros") for _ in range(2)))


@unfollowed
def kernels_of_one_number_each():
    inputs = keras.Input((8, 8, 1))
    x = layers.Concatenate()([conv(8, 1)(inputs), conv(8, 1)(inputs)])
    return biased(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(conv(6)(x)))))


@unfollowed
def one_of_eight_channels():
    inputs = image()
    return network(inputs, conv(8)(inputs)[..., 0])


@unfollowed
def half_of_the_channels():
    inputs = image()
    return network(inputs, conv(8)(inputs)[..., 4:])


@unfollowed
def three_even_parts():
    inputs = image()
    a, b, c = ops.split(conv(12)(inputs), 3, axis=-1)
    return network(inputs, layers.Concatenate()([c, a, ops.tanh(b)]))


@unfollowed
def attention():
    inputs = keras.Input((8, 16))
    x = layers.Dense(16)(inputs)
    return network(inputs, x + layers.MultiHeadAttention(4, 8)(x, x))


@unfollowed
def unrolled_recurrence():
    inputs = keras.Input((4, 3))
    return network(inputs, layers.GRU(8, unroll=True)(inputs))


@unfollowed
def tiled_channels():
    inputs = image()
    return network(inputs, ops.tile(conv(8)(inputs), (1, 1, 1, 2)))


IN_THE_ZOO = """
    activations_as_layers softmax_op_channels glu prelu_shared_all unit_normalization clip conv1d_transpose
    conv1d_as_depthwise_multiplied separable1d conv2d_dilated conv2d_small_groups conv2d_as_depthwise_multiplied
    conv3d_strided
    grouped_on_the_input depthwise_on_the_input one_output_channel_is_not_depthwise batch_norm_bare layer_norm
    normalization_given rescaling_per_channel layer_scale global_average1d global_max2d_keepdims upsampling3d resizing
    plus_times_minus where divide_by_tensor matmul_of_activations times_full_constant power_root matmul_by_constant
    squeeze_and_excite spatial_attention_over_channels concat_then_add concat_single_channels concat_twice_the_same dot
    merge_of_lower_rank reshape_op_flat reshape_rows reshape_merge_columns reshape_mixing_batch time_major_and_back
    expand_squeeze slice_space split_uneven pad_channels_nonzero zero_padding_of_channels cumsum_channels
    einsum_heads attention_scores_shown time_distributed_model conv_called_twice nested_model_twice nested_model_by_name
    output_in_the_middle half_precision unknown_layer subclass_of_conv resnet_option_a_layers densely_connected
""".split()
UNFOLLOWED_IN_THE_ZOO = """
    softmax_layer_space group_norm adaptive_pooling2d stack_last flatten_channels_first reshape_split_channels
    channel_shuffle slice_two take_channels unstack_space repeat_channels flip_space depth_to_space einsum_per_head vit
    attention_cross psp_convolutions
""".split()


def check_followed(model):
    case = Case(model)
    assert not case.blueprint.fixed and not case.blueprint.folded
    small, expected = case.blueprint.cut(case.alive), case.converted()
    assert case.error(small, expected) < 1e-5
    assert described(small) == described(expected)
    assert case.error(case.blueprint.cut(np.ones_like(case.alive)), case.whole) < 1e-6


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_cut_file_computes_what_the_converted_cut_model_computes(name):
    check_followed(FOLLOWED[name]())


@pytest.mark.parametrize("name", [n for n in IN_THE_ZOO if n in zoo.BUILDERS])
def test_the_cut_file_computes_the_same_for_models_of_the_zoo(name):
    check_followed(zoo.build(name)[0])


def check_unfollowed(model):
    case = Case(model)
    assert case.blueprint.fixed
    with pytest.raises(ValueError, match="not known at other widths"):
        case.blueprint.cut(case.alive)
    running = [o for o in case.blueprint.operators if not case.blueprint.is_constant(o.outputs[0])]
    for operator in running:  # those that are known can still be had alone
        Runner(case.blueprint.cut(case.alive, [operator.index])).interpreter.allocate_tensors()


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_cannot_be_followed_is_said_and_not_cut(name):
    check_unfollowed(UNFOLLOWED[name]())


@pytest.mark.parametrize("name", UNFOLLOWED_IN_THE_ZOO)
def test_what_cannot_be_followed_in_the_zoo_is_said_and_not_cut(name):
    check_unfollowed(zoo.build(name)[0])


def test_a_loop_is_an_error_that_says_how_to_mend_it():
    model = EXPORTED["recurrent"]()
    with pytest.raises(ValueError, match="unroll=True"):
        Blueprint(to_tflite(model), Channels(model))


@pytest.mark.parametrize("name", ["convnet", "many_layers"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "float32"])
def test_every_recipe_gives_the_operators_shapes_and_types_of_the_converted_model(name, recipe):
    if RECIPES[recipe].quantizer != "tensorflow":
        pytest.importorskip("ai_edge_quantizer")
    case = Case(EXPORTED[name](), recipe)
    assert not case.blueprint.fixed
    small, expected = case.blueprint.cut(case.alive), case.converted()
    if (
        recipe == "dynamic_int8"
    ):  # kernels of fewer than 1024 numbers stay float: another number of them in the cut model
        assert [sizes(each) for each in described(small)] == [sizes(each) for each in described(expected)]
        return
    assert described(small) == described(expected)
    assert len(small) == pytest.approx(len(expected), rel=0.15)
    if recipe == "float16":
        assert case.error(small, expected) < 1e-5
    elif not case.blueprint.folded:  # scales are those of the whole model
        assert case.error(small, expected) < 0.35


def test_other_units_of_the_same_number_compute_something_else():
    case = Case(EXPORTED["convnet"]())
    units = case.channels.groups[0].units
    one, other = (case.blueprint.cut(case.channels.alive(units[taken])) for taken in (slice(0, 3), slice(3, 6)))
    assert described(one) == described(other)
    assert case.error(one, other) > 1e-2


@pytest.mark.parametrize(
    "between",
    [
        layers.Dense(8),
        layers.BatchNormalization(),
        layers.Rescaling(2.0, offset=1.0),
        lambda x: x + np.arange(8.0, dtype="float32"),
    ],
)
def test_constants_that_the_converter_added_into_the_next_bias_are_reported(between):
    """Of units that are gone they stay in that bias: sizes are right, numbers are not."""
    inputs = keras.Input((8,))
    case = Case(network(inputs, between(layers.Dense(8, activation="relu")(inputs))))
    small, expected = case.blueprint.cut(case.alive), case.converted()
    assert described(small) == described(expected)
    assert case.error(small, expected) > 1e-3 and case.blueprint.folded


def test_one_operator_alone_runs_at_every_width():
    case = Case(EXPORTED["convnet"]())
    whole = {name for name, *_ in described(case.whole)}
    for operator in case.blueprint.operators:
        content = case.blueprint.cut(case.alive, [operator.index])
        runner = Runner(content)
        assert len(described(content)) == 1 and described(content)[0][0] in whole
        runner.run([np.ones(port.shape, "float32") for port in runner.inputs])


def test_the_fingerprint_is_of_sizes_and_operators_not_of_weights():
    keras.utils.set_random_seed(0)
    one, other, wide = (to_tflite(EXPORTED["convnet"](seed=s, width=w)) for s, w in ((0, 8), (1, 8), (0, 16)))
    assert flatbuffer.fingerprint(one) == flatbuffer.fingerprint(other) != flatbuffer.fingerprint(wide)
    strided = keras.Sequential([image(), layers.Conv2D(4, 3, strides=2, padding="same")])
    plain = keras.Sequential(
        [image(), layers.Conv2D(4, 3, strides=2, padding="same", dilation_rate=1, activation="relu")]
    )
    assert flatbuffer.fingerprint(to_tflite(strided)) != flatbuffer.fingerprint(to_tflite(plain))


def test_a_file_survives_being_unpacked_and_packed():
    content = to_tflite(EXPORTED["convnet"]())
    again = flatbuffer.packed(flatbuffer.unpacked(content))
    assert described(again) == described(content)
    inputs = [np.random.default_rng(0).normal(size=(1, 12, 12, 3)).astype("float32")]
    assert np.array_equal(Runner(again).run(inputs)[0], Runner(content).run(inputs)[0])
