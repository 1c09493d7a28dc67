"""Small models by name, one for every kind of layer and wiring that the rules must understand.

Every entry states the widths of its prunable groups (in units) and how many fences it has, worked out on paper:
a rule that fences by accident cannot pass. All weights and statistics are random, all outputs are logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

import keras_prune
from keras_prune import layers as psp


@dataclass(frozen=True)
class Facts:
    """What is expected of a model: sorted widths of its groups, number of fences, tolerance of cut = zeroed."""

    groups: tuple[int, ...]
    fences: int = 0
    tolerance: float = 1e-5


BUILDERS: dict[str, Callable[[], keras.Model]] = {}
FACTS: dict[str, Facts] = {}


def entry(*groups: int, fences: int = 0, tolerance: float = 1e-5):
    def register(function):
        name = function.__name__.strip("_")
        add(name, function, *groups, fences=fences, tolerance=tolerance)
        return function

    return register


def add(name, builder, *groups, **facts):
    assert name not in BUILDERS, name
    BUILDERS[name] = builder
    FACTS[name] = Facts(tuple(sorted(groups)), **facts)


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Random biases, scales and statistics: fresh ones hide mistakes."""
    rng = np.random.default_rng(seed)
    for v in model.weights:
        kind, shape = v.path.split("/")[-1], v.shape
        if "float" not in v.dtype:
            continue
        if "variance" in kind or kind in ("gamma", "scale"):
            v.assign(rng.uniform(0.5, 1.5, shape))
        elif "threshold" not in kind and "kernel" not in kind and "embeddings" not in kind:  # biases, means, ...
            v.assign(rng.normal(0, 0.4, shape))
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    return model


def example(model: keras.Model, samples: int = 3, length: int = 10):
    rng = np.random.default_rng(1)

    def make(t):
        shape = (t.shape[0] or samples, *(length if d is None else d for d in t.shape[1:]))
        if "int" in t.dtype:
            return rng.integers(0, 7, shape).astype(t.dtype)
        return rng.normal(size=shape).astype("float32")

    struct = model._functional._inputs_struct if isinstance(model, keras.Sequential) else model._inputs_struct
    return keras.tree.map_structure(make, struct)


def build(name: str):
    keras.utils.set_random_seed(0)
    model = randomize(BUILDERS[name]())
    return model, example(model)


def image(*shape):
    return keras.Input(shape or (8, 8, 3))


def conv(n, k=3, **kwargs):
    return layers.Conv2D(n, k, padding="same", **kwargs)


def head(x, n=3):
    """Logits of whatever comes."""
    if len(x.shape) > 2:
        x = layers.Flatten()(x) if None not in x.shape[1:] else layers.GlobalAveragePooling2D()(x)
    return layers.Dense(n)(x)


def through(name, op, *groups, rank=2, fences=0, last=None, tolerance=1e-5):
    """conv(8) -> op -> conv(6) -> logits: groups (8, 6) if the op lets channels through, (6,) if it fences."""

    def builder():
        inputs = keras.Input((8,) * rank + (3,))
        conv_n = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1]
        x = conv_n(8, 3, padding="same")(inputs)
        x = op()(x) if isinstance(op, type) else op(x)
        if last is None:
            x = conv_n(6, 3, padding="same", activation="elu")(x)
        return keras.Model(inputs, head(x))

    add(name, builder, *(groups or (8, 6)), fences=fences, tolerance=tolerance)


# -- activations -------------------------------------------------------------------------------------------------

ELEMENTWISE = (
    "relu",
    "relu6",
    "sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "silu",
    "gelu",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "hard_sigmoid",
    "hard_tanh",
    "hard_shrink",
    "soft_shrink",
    "tanh_shrink",
    "log_sigmoid",
    "exponential",
    "squareplus",
    "sparse_plus",
    "linear",
)
through("activations_as_layers", lambda x: layers.Add()([layers.Activation(n)(x) for n in (*ELEMENTWISE, "mish")]))
through("activations_as_functions", lambda x: layers.Add()([getattr(keras.activations, n)(x) for n in ELEMENTWISE]))
through("activation_softmax", lambda x: layers.Activation("softmax")(x), 6, fences=1)
through("activation_layer_in_conv", lambda x: conv(5, activation=layers.LeakyReLU(0.3))(x), 8, 5, 6)
through("conv_activation_softmax", lambda x: conv(5, activation="softmax")(x), 8, 6, fences=1)
through("activation_own_mixing", lambda x: layers.Activation(own_mixing)(x), 6, fences=1)
through("softmax_layer_channels", layers.Softmax, 6, fences=1)
through("softmax_layer_space", lambda x: layers.Softmax(axis=1)(x))
through("softmax_layer_space_2", lambda x: layers.Softmax(axis=(1, 2))(x))
through("softmax_op_channels", lambda x: ops.softmax(x), 6, fences=1)
through("softmax_op_space", lambda x: ops.softmax(x, axis=2))
through("log_softmax_space", lambda x: ops.log_softmax(x, axis=2))
through("glu", lambda x: ops.glu(x), 6, fences=1)
through("relu_layer", lambda x: layers.ReLU(max_value=2.0, negative_slope=0.1, threshold=0.5)(x))
through("leaky_relu_layer", layers.LeakyReLU)
through("elu_layer", layers.ELU)
through("prelu", layers.PReLU)
through("prelu_shared_space", lambda x: layers.PReLU(shared_axes=(1, 2))(x))
through("prelu_shared_all", lambda x: layers.PReLU(shared_axes=(1, 2, 3))(x))
through("unit_normalization", layers.UnitNormalization, 6, fences=1)
through("unit_normalization_space", lambda x: layers.UnitNormalization(axis=1)(x))
through("clip", lambda x: ops.clip(x, -0.5, 0.7))
through("clip_away_from_zero", lambda x: ops.clip(x, 0.1, 0.7))
through("square_abs_neg", lambda x: -abs(ops.square(x)))
through("sqrt", lambda x: ops.sqrt(ops.relu(x) + 1.0), 6, fences=1)
through("exp_sin_erf", lambda x: ops.erf(ops.sin(ops.exp(x))))
through("cast", lambda x: ops.cast(x, "float32"))


@keras.saving.register_keras_serializable("zoo")
def own_mixing(x):
    return x - ops.mean(x, axis=-1, keepdims=True)


# -- convolutions ------------------------------------------------------------------------------------------------


def _convs(rank):
    conv_n = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1]
    transposed = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)[rank - 1]

    def groups(n, filters, **kwargs):
        return lambda x: conv_n(filters, 3, groups=n, padding="same", **kwargs)(x)

    through(f"conv{rank}d_strided", lambda x: conv_n(5, 3, strides=2, use_bias=False)(x), 8, 5, 6, rank=rank)
    through(f"conv{rank}d_dilated", lambda x: conv_n(5, 2, dilation_rate=2)(x), 8, 5, 6, rank=rank)
    through(f"conv{rank}d_large_groups", groups(2, 12), 4, 6, 6, rank=rank)  # pairs in, pairs out
    through(f"conv{rank}d_small_groups", groups(4, 8), 4, 6, rank=rank)  # a unit is one of 4 groups
    through(f"conv{rank}d_as_depthwise", groups(8, 8), 8, 6, rank=rank)
    through(f"conv{rank}d_as_depthwise_multiplied", groups(8, 24, activation="tanh"), 8, 6, rank=rank)
    through(f"conv{rank}d_transpose", lambda x: transposed(5, 3, strides=2, padding="same")(x), 8, 5, 6, rank=rank)
    if rank < 3:
        depthwise = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[rank - 1]
        separable = (layers.SeparableConv1D, layers.SeparableConv2D)[rank - 1]
        through(f"depthwise{rank}d", lambda x: depthwise(3, strides=2)(x), rank=rank)
        through(
            f"depthwise{rank}d_multiplied",
            lambda x: depthwise(3, depth_multiplier=2, activation="sigmoid")(x),
            rank=rank,
        )
        through(f"separable{rank}d", lambda x: separable(5, 3, depth_multiplier=2)(x), 8, 5, 6, rank=rank)


for _rank in (1, 2, 3):
    _convs(_rank)


@entry(4, 6)
def grouped_on_the_input():
    """RGB cannot leave, so the units of a conv with 3 groups are the j-th filters of all groups."""
    inputs = image()
    return keras.Model(inputs, head(conv(6, activation="relu")(conv(12, groups=3)(inputs))))


@entry(4, 6)
def depthwise_on_the_input():
    inputs = image()
    x = layers.DepthwiseConv2D(3, depth_multiplier=4, activation="relu")(inputs)
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(5, 6)
def one_output_channel_is_not_depthwise():
    inputs = image()
    x = conv(1)(conv(5)(inputs))
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


# -- normalisations ----------------------------------------------------------------------------------------------

through("batch_norm", layers.BatchNormalization)
through("batch_norm_bare", lambda x: layers.BatchNormalization(scale=False, center=False)(x))
through("batch_norm_no_scale", lambda x: layers.BatchNormalization(scale=False)(x))
through("layer_norm", layers.LayerNormalization, 6, fences=1)
through("layer_norm_space", lambda x: layers.LayerNormalization(axis=1)(x))
through("rms_norm", layers.RMSNormalization, 6, fences=1)
through("group_norm", lambda x: layers.GroupNormalization(groups=4)(x), 4, 6)
through("group_norm_instance", lambda x: layers.GroupNormalization(groups=-1)(x))
through("group_norm_one_group", lambda x: layers.GroupNormalization(groups=1)(x), 6, fences=1)
through("normalization_inside", layers.Normalization)
through("normalization_given", lambda x: layers.Normalization(mean=np.arange(8.0), variance=np.arange(1.0, 9.0))(x))
through("normalization_scalar", lambda x: layers.Normalization(axis=None, mean=0.3, variance=2.0)(x))
through("normalization_inverted", lambda x: layers.Normalization(invert=True)(x))
through("rescaling", lambda x: layers.Rescaling(0.5, offset=0.2)(x))
through("rescaling_per_channel", lambda x: layers.Rescaling(np.arange(1, 9) / 8, offset=0.1)(x))


@entry(8)
def normalization_first():
    inputs = image()
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(0).normal(2, 3, (4, 8, 8, 3)))
    return keras.Model(inputs, head(conv(8, activation="relu")(norm(inputs))))


@entry(8, 6)
def layer_scale():
    from keras.src.applications.convnext import LayerScale

    inputs = image()
    x = LayerScale(1e-6, 8)(conv(8)(inputs))
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(8, 8, 6)
def inception_scale():
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    inputs = image()
    x = conv(8, activation="relu")(inputs)
    x = CustomScaleLayer(0.17)([x, conv(8)(layers.ReLU()(conv(8)(x)))])
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


# -- pooling, resampling, dropout, augmentation ------------------------------------------------------------------

for _rank in (1, 2, 3):
    for _kind in ("Max", "Average"):
        through(
            f"{_kind.lower()}_pooling{_rank}d",
            lambda x, k=_kind, r=_rank: getattr(layers, f"{k}Pooling{r}D")(2)(x),
            rank=_rank,
        )
        _global = getattr(layers, f"Global{_kind}Pooling{_rank}D")
        through(f"global_{_kind.lower()}{_rank}d", _global, 8, rank=_rank, last="none")
        through(f"global_{_kind.lower()}{_rank}d_keepdims", lambda x, g=_global: g(keepdims=True)(x), rank=_rank)
    through(f"upsampling{_rank}d", getattr(layers, f"UpSampling{_rank}D"), rank=_rank)
    through(f"zero_padding{_rank}d", getattr(layers, f"ZeroPadding{_rank}D"), rank=_rank)
    through(f"cropping{_rank}d", getattr(layers, f"Cropping{_rank}D"), rank=_rank)
    through(f"spatial_dropout{_rank}d", lambda x, r=_rank: getattr(layers, f"SpatialDropout{r}D")(0.3)(x), rank=_rank)
    through(
        f"adaptive_pooling{_rank}d", lambda x, r=_rank: getattr(layers, f"AdaptiveAveragePooling{r}D")(2)(x), rank=_rank
    )
through("resizing", lambda x: layers.Resizing(5, 6)(x))
through("image_resize", lambda x: ops.image.resize(x, (5, 6)))
through(
    "dropouts",
    lambda x: layers.GaussianNoise(0.1)(layers.GaussianDropout(0.2)(layers.AlphaDropout(0.1)(layers.Dropout(0.5)(x)))),
)
through("activity_regularization", lambda x: layers.ActivityRegularization(0.1)(x))
through("identity", layers.Identity)
through("augmented_inside", lambda x: layers.RandomTranslation(0.1, 0.1)(layers.RandomFlip()(x)))
through("max_pool_op", lambda x: ops.max_pool(ops.average_pool(x, 2), 2))


@entry(8)
def augmentation_first():
    x = inputs = image()
    for layer in (
        layers.Rescaling(1 / 2),
        layers.RandomFlip(),
        layers.RandomRotation(0.1),
        layers.RandomZoom(0.1),
        layers.RandomContrast(0.1),
        layers.RandomBrightness(0.1),
        layers.CenterCrop(6, 6),
    ):
        x = layer(x)
    return keras.Model(inputs, head(conv(8, activation="relu")(x)))


# -- several tensors ---------------------------------------------------------------------------------------------


def two(name, join, *groups, fences=0, tolerance=1e-5, widths=(8, 8)):
    """Two convs of the input, joined, then conv(6): (8, 6) when they are tied."""

    def builder():
        inputs = image()
        a, b = (conv(n)(inputs) for n in widths)
        return keras.Model(inputs, head(conv(6, activation="relu")(join(a, b))))

    add(name, builder, *(groups or (8, 6)), fences=fences, tolerance=tolerance)


for _name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"):
    two(f"layer_{_name.lower()}", lambda a, b, n=_name: getattr(layers, n)()([a, b]))
    if _name != "Average":
        two(f"op_{_name.lower()}", lambda a, b, n=_name: getattr(ops, n.lower())(a, b))
two("plus_times_minus", lambda a, b: (a + b) * a - b)
two("where", lambda a, b: ops.where(a > 0, a, b))
two("where_constant", lambda a, b: ops.where(a > 0, a + b, 0.3))
two("logical", lambda a, b: ops.cast(ops.logical_and(a > 0, b < 0.1), "float32"))
two("divide_by_tensor", lambda a, b: a / (abs(b) + 1), 6, fences=1)
two("matmul_of_activations", lambda a, b: ops.matmul(a, ops.transpose(b, (0, 1, 3, 2))), 6, fences=1)
two("tensor_reused", lambda a, b: a + a + b)
through("plus_scalar", lambda x: 3.0 + x + 0.5)
through("times_vector", lambda x: x * np.linspace(0.3, 2, 8).astype("float32"))
through("vector_minus", lambda x: ops.subtract(np.linspace(-1, 2, 8).astype("float32"), x))
through("times_vector_other_axis", lambda x: x * np.linspace(0.3, 2, 8).astype("float32")[:, None, None])
through("times_full_constant", lambda x: x * np.random.default_rng(0).normal(size=(8, 8, 8)).astype("float32"))
through("maximum_vector", lambda x: ops.maximum(np.linspace(-1, 1, 8).astype("float32"), x))
through("divide_by_vector", lambda x: x / np.linspace(0.5, 2, 8).astype("float32"))
through("divided_constant", lambda x: 1.0 / (2 + ops.sigmoid(x)), 6, fences=1)
through("power", lambda x: x**2)
through("power_root", lambda x: ops.abs(x) ** 0.5, 6, fences=1)
through("reverse_power", lambda x: 2.0**x, 6, fences=1)
through("constant_tensor", lambda x: x + ops.ones((8, 8, 8)) * 0.5)
through(
    "matmul_by_constant",
    lambda x: ops.matmul(x, np.random.default_rng(0).normal(size=(8, 5)).astype("float32")),
    6,
    fences=1,
)


@entry(8, 4, 6)
def squeeze_and_excite():
    inputs = image()
    x = conv(8, activation="relu")(inputs)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = conv(8, 1, activation="sigmoid")(conv(4, 1, activation="relu")(gate))
    return keras.Model(inputs, head(conv(6, activation="relu")(layers.Multiply()([x, gate]))))


@entry(8, 4, 6)
def squeeze_and_excite_dense():
    """The gate has lower rank: Multiply puts the missing axes after the batch."""
    inputs = image()
    x = conv(8, activation="relu")(inputs)
    gate = layers.Dense(4, activation="relu")(layers.GlobalMaxPooling2D()(x))
    gate = layers.Dense(8, activation="hard_sigmoid")(gate)
    return keras.Model(inputs, head(conv(6, activation="relu")(layers.Multiply()([x, gate]))))


@entry(8, 6)
def spatial_attention():
    inputs = image()
    x = conv(8)(inputs)
    gate = conv(1, activation="sigmoid")(x)
    return keras.Model(inputs, head(conv(6, activation="relu")(x * gate)))


@entry(6, fences=2)
def spatial_attention_over_channels():
    """CBAM: mean and maximum over the channels."""
    inputs = image()
    x = conv(8)(inputs)
    seen = layers.Concatenate()([ops.mean(x, -1, keepdims=True), ops.max(x, -1, keepdims=True)])
    return keras.Model(inputs, head(conv(6, activation="relu")(x * conv(1, activation="sigmoid")(seen))))


@entry(8, 5)
def add_with_frozen_input():
    """What is added to the model's input stays whole."""
    inputs = image()
    x = conv(3)(conv(8, activation="relu")(inputs))
    return keras.Model(inputs, head(conv(5, activation="relu")(layers.Add()([x, inputs]))))


two("concat", lambda a, b: layers.Concatenate()([a, b]), 8, 5, 6, widths=(8, 5))
two("concat_op", lambda a, b: ops.concatenate([b, a], axis=3), 8, 5, 6, widths=(8, 5))
two("concat_then_add", lambda a, b: conv(13)(a) + layers.Concatenate()([a, b]), 8, 5, 6, widths=(8, 5))
two("concat_space", lambda a, b: layers.Concatenate(axis=1)([a, b]))
two("concat_space_op", lambda a, b: ops.concatenate([a, b], axis=-2))
two("concat_single_channels", lambda a, b: layers.Concatenate()([conv(1)(a), b, conv(1)(b)]), 8, 5, 6, widths=(8, 5))
two("concat_twice_the_same", lambda a, b: layers.Concatenate()([a, b, a]), 8, 5, 6, widths=(8, 5))
two("stack_space", lambda a, b: ops.sum(ops.stack([a, b], axis=1), axis=1))
two("stack_last", lambda a, b: ops.max(ops.stack([a, b], axis=-1), axis=-1))
two(
    "dot",
    lambda a, b: layers.Dot((2, 2))([layers.Reshape((64, 8))(a), layers.Reshape((64, 8))(b)])[..., None],
    6,
    fences=1,
)
two("einsum_of_activations", lambda a, b: ops.einsum("bhwc,bhwd->bhcd", a, b), 6, fences=1)


@entry(8, 6)
def concat_with_the_input():
    inputs = image()
    x = layers.Concatenate()([inputs, conv(8)(inputs)])
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(8)
def merge_of_lower_rank():
    """Add puts (batch, 8) under every step of (batch, 5, 8)."""
    a, b = keras.Input((5, 4), name="a"), keras.Input((4,), name="b")
    x = layers.Add()([layers.Dense(8)(a), layers.Dense(8)(b)])
    return keras.Model([a, b], head(layers.ReLU()(x)))


@entry(8)
def op_of_lower_rank():
    """x + y puts missing axes in front."""
    a, b = keras.Input((5, 4), name="a"), keras.Input((4,), name="b")
    x = layers.Dense(8)(a) + ops.expand_dims(layers.Dense(8)(b), 1)
    return keras.Model([a, b], head(ops.relu(x)))


# -- shapes ------------------------------------------------------------------------------------------------------

through("flatten", layers.Flatten, 8, last="none")
through("flatten_1d", layers.Flatten, 8, rank=1, last="none")
through("flatten_channels_first", lambda x: layers.Flatten(data_format="channels_first")(x), 8, last="none")
through("reshape_flat", lambda x: layers.Reshape((-1,))(x), 8, last="none")
through("reshape_op_flat", lambda x: ops.reshape(x, (-1, 512)), 8, last="none")
through("reshape_tokens", lambda x: layers.Reshape((64, 8))(x), 8, last="none")
through("reshape_tokens_free", lambda x: ops.reshape(x, (-1, 64, 8)), 8, last="none")
through("reshape_rows", lambda x: layers.Reshape((8, -1, 8))(x))
through("reshape_split_channels", lambda x: layers.Reshape((8, 16, 4))(x), 4, 6)
through("reshape_merge_columns", lambda x: layers.Reshape((8, 4, 16))(x))
through("reshape_op_minus_one_channels", lambda x: ops.reshape(x, (-1, 8, 4, 16)))
through("reshape_into_batch", lambda x: ops.reshape(ops.reshape(x, (-1, 8, 8)), (-1, 8, 8, 8)))
through("reshape_mixing_batch", lambda x: ops.reshape(ops.reshape(x, (-1, 4)), (-1, 8, 8, 8)), 6, fences=1)
through(
    "space_to_batch_and_back",
    lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 8)), (0, 1, 3, 2, 4, 5)), (-1, 4, 4, 8)),
    8,
    6,
    last=None,
)
through(
    "channel_shuffle",
    lambda x: layers.Reshape((8, 8, 8))(layers.Permute((1, 2, 4, 3))(layers.Reshape((8, 8, 2, 4))(x))),
    4,
    6,
)
through(
    "channel_shuffle_ops",
    lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 8, 8, 4, 2)), (0, 1, 2, 4, 3)), (-1, 8, 8, 8)),
    4,
    6,
)
through("permute_and_back", lambda x: layers.Permute((2, 3, 1))(layers.Permute((3, 1, 2))(x)))
through("permute_wrong_axis", lambda x: layers.Permute((1, 3, 2))(x), 6, fences=1)
through("transpose", lambda x: ops.transpose(ops.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1)))
through("swapaxes", lambda x: ops.swapaxes(ops.swapaxes(x, 1, 3), 3, 1))
through("moveaxis", lambda x: ops.moveaxis(ops.moveaxis(x, -1, 1), 1, -1))
through("time_major_and_back", lambda x: ops.transpose(ops.relu(ops.transpose(x, (1, 0, 2, 3))), (1, 0, 2, 3)))
through("expand_squeeze", lambda x: ops.squeeze(ops.expand_dims(x, 2), 2))
through("squeeze_all", lambda x: ops.squeeze(layers.GlobalAveragePooling2D(keepdims=True)(x)[:, :, 0]), 8, last="none")
through("slice_channels", lambda x: x[..., :5], 3, 5, 6)  # the last three are read by nobody, but made
through("slice_two", lambda x: x[..., :5] + x[..., 3:], 2, 6)  # i = i + 3: {0 3 6} {1 4 7} {2 5}
through("slice_halves_added", lambda x: x[..., :4] + x[..., 4:], 4, 6)
through("slice_space", lambda x: x[:, ::2, 1:-1])
through("slice_negative", lambda x: x[:, -4:, ..., -6:], 2, 6, 6)
through("slice_step_on_channels", lambda x: x[..., ::2], 6, fences=1)
through("slice_number_space", lambda x: x[:, 3], 8, last="none")
through("slice_none", lambda x: ops.squeeze(x[:, None], 1))
through("slice_one_channel", lambda x: x[..., 3:4] * x, 7, 6)
through("take_one_channel", lambda x: x[..., 3][..., None] + x, 7, 6)
through("take_row", lambda x: ops.take(x, 2, axis=1), 8, last="none")
through("take_channels", lambda x: ops.take(x, [0, 2, 5], axis=-1), 3, 5, 6)
through("split_layerlike", lambda x: ops.add(*ops.split(x, 2, axis=-1)), 4, 6)
through(
    "split_uneven",
    lambda x: (lambda p: ops.concatenate([p[2], ops.relu(p[0]), p[1]], -1))(ops.split(x, [2, 5], axis=-1)),
    2,
    3,
    3,
    6,
)
through("split_space", lambda x: ops.add(*ops.split(x, 2, axis=1)))
through("unstack_space", lambda x: sum(ops.unstack(x, axis=1)), 8, last="none")
through("repeat_space", lambda x: ops.repeat(x, 2, axis=1))
through("repeat_channels", lambda x: ops.repeat(x, 2, axis=-1))
through("tile_channels", lambda x: ops.tile(x, (1, 1, 1, 2)))
through("tile_space", lambda x: ops.tile(x, (1, 2, 1, 1)))
through("roll_space", lambda x: ops.roll(x, 2, axis=1))
through("roll_channels", lambda x: ops.roll(x, 2, axis=-1), 6, fences=1)
through("flip_space", lambda x: ops.flip(x, axis=1))
through("cumsum_channels", lambda x: ops.cumsum(x, axis=-1), 6, fences=1)
through("cumsum_space", lambda x: ops.cumsum(x, axis=1))
through("mean_space", lambda x: ops.mean(x, axis=(1, 2)), 8, last="none")
through("mean_channels", lambda x: ops.mean(x, axis=-1, keepdims=True), 6, fences=1)
through("average_space", lambda x: ops.average(x, axis=1), 8, last="none")
through("average_channels", lambda x: ops.average(x, axis=-1)[..., None], 6, fences=1)
through(
    "sum_max_min_space",
    lambda x: ops.sum(x, 1) + ops.max(x, axis=1) + ops.min(x, axis=-2) + ops.var(x, 1),
    8,
    last="none",
)
through("argmax_channels", lambda x: ops.cast(ops.argmax(x, axis=-1), "float32")[..., None] * 0.1, 6, fences=1)
through("pad_channels", lambda x: ops.pad(x, [[0, 0], [0, 0], [0, 0], [3, 2]]), 5, 8, 6)
through("pad_channels_nonzero", lambda x: ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, 2]], constant_values=0.7), 2, 8, 6)
through("pad_space", lambda x: ops.pad(x, [[0, 0], [1, 0], [0, 2], [0, 0]], mode="reflect"))
through("pad_channels_reflect", lambda x: ops.pad(x, [[0, 0], [0, 0], [0, 0], [1, 1]], mode="reflect"), 6, fences=1)
through(
    "zero_padding_of_channels",
    lambda x: layers.ZeroPadding2D(((0, 0), (3, 2)), data_format="channels_first")(x),
    5,
    8,
    6,
)
through("cropping_of_channels", lambda x: layers.Cropping2D(((0, 0), (1, 2)), data_format="channels_first")(x), 3, 5, 6)
through("repeat_vector", lambda x: layers.RepeatVector(5)(layers.GlobalAveragePooling2D()(x)), 8, last="none")
through("one_by_one_reshape", lambda x: layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x)))
through(
    "depth_to_space",
    lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 8, 8, 2, 2, 2)), (0, 1, 3, 2, 4, 5)), (-1, 16, 16, 2)),
    2,
    6,
)
through("depth_to_space_op", lambda x: ops.depth_to_space(x, 2), 2, 6)
through("space_to_depth_op", lambda x: ops.space_to_depth(x, 2))
through("captured_variable", lambda x: x * keras.Variable(np.linspace(0.5, 2, 8)))
through("broadcast_constant_in_front", lambda x: ops.mean(x[:, None] + np.ones((4, 1, 1, 1), "float32"), 1))


@entry(8, 6)
def unknown_image_size():
    inputs = keras.Input((None, None, 3))
    x = layers.MaxPooling2D()(conv(8, activation="relu")(inputs))
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(4, 6)  # channels of the 4 x 2 box leave by rows: pairs
def unknown_length_reshaped():
    """(batch, length, 8) -> (batch, length, 2, 4) -> back: the unknown axis is not touched."""
    inputs = keras.Input((None, 4))
    x = layers.Reshape((-1, 4, 2))(layers.Dense(8)(inputs))
    x = layers.Reshape((-1, 8))(ops.relu(x))
    x = layers.Dense(6, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@entry(8, 6)
def fixed_batch():
    inputs = keras.Input(batch_shape=(3, 8, 8, 3))
    x = ops.reshape(conv(8, activation="relu")(inputs), (3, 64, 8))
    x = ops.transpose(ops.transpose(x, (0, 2, 1)), (0, 2, 1))
    return keras.Model(inputs, head(layers.Conv1D(6, 3, activation="relu")(x)))


# -- matrices ----------------------------------------------------------------------------------------------------


# Lengths of 9 where the bias is not on the last axis: keras.ops.add on TensorFlow adds a bias of shape (n, 1) to an
# (n, n) tensor along the wrong axis, so a width must not become equal to the length.
def einsum(name, *stages, groups, fences=0, shape=(5, 4), **kwargs):
    def builder():
        x = inputs = keras.Input(shape)
        for equation, out, bias in stages:
            x = layers.EinsumDense(equation, out, bias_axes=bias, activation="tanh")(x)
        return keras.Model(inputs, head(x))

    add(name, builder, *groups, fences=fences, **kwargs)


einsum("einsum_as_dense", ("abc,cd->abd", (5, 8), "d"), ("abd,de->abe", (5, 6), "e"), groups=(8, 6))
einsum("einsum_no_bias", ("abc,cd->abd", (5, 8), None), ("abd,de->abe", (5, 6), None), groups=(8, 6))
einsum("einsum_ellipsis", ("...x,xy->...y", 8, "y"), ("...x,xy->...y", (6,), "y"), groups=(8, 6))
einsum("einsum_right_ellipsis", ("ab...,bc->ac...", 8, "c"), ("ab...,bc->ac...", 6, "c"), groups=(8, 6), shape=(5, 9))
einsum("einsum_token_mixing", ("abc,bd->adc", (8, 9), "d"), ("adc,de->aec", (6, 9), "e"), groups=(8, 6), shape=(5, 9))
einsum("einsum_bias_two_axes", ("abc,cd->abd", (5, 8), "bd"), ("abd,de->abe", (5, 6), "be"), groups=(8, 6))
einsum("einsum_heads", ("abc,cde->abde", (5, 6, 3), "de"), ("abde,dec->abc", (5, 7), "c"), groups=(6, 7))
einsum("einsum_per_head", ("abc,cde->abde", (5, 6, 3), "de"), ("abde,def->abdf", (5, 6, 2), "df"), groups=(6,))
einsum("einsum_batch_letter_passes", ("abc,cde->abde", (5, 6, 3), None), ("abde,ef->abdf", (5, 6, 2), "f"), groups=(6,))
einsum("einsum_sums_a_letter", ("abc,cde->abde", (5, 6, 3), None), ("abde,ef->abf", (5, 4), "f"), groups=(4,), fences=1)


@entry(16, 8)
def dense_net():
    inputs = keras.Input((10,))
    x = layers.Dense(16, activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dense(8, use_bias=False, activation="sigmoid")(layers.Dropout(0.2)(x))
    return keras.Model(inputs, head(x))


@entry(16, 8)
def sequential_dense():
    return keras.Sequential(
        [keras.Input((10,)), layers.Dense(16, activation="relu"), layers.Dense(8, "tanh"), layers.Dense(3)]
    )


@entry(4, 8, 8)
def attention_self():
    """Heads leave; the residual stream (8) passes through no norm, so it may shrink too."""
    inputs = keras.Input((5, 6))
    x = layers.Dense(8)(inputs)
    x = x + layers.MultiHeadAttention(4, 3)(x, x)
    return keras.Model(inputs, head(layers.Dense(8, "relu")(x)))


@entry(4, 5, 7, 8, 9)
def attention_cross():
    a, b = keras.Input((5, 6), name="a"), keras.Input((4, 6), name="b")
    query, value, key = layers.Dense(7)(a), layers.Dense(8)(b), layers.Dense(9)(b)
    x = layers.MultiHeadAttention(4, 3, value_dim=2, output_shape=5, use_bias=False)(value=value, query=query, key=key)
    return keras.Model([a, b], head(x))


@entry(4, 6, 8)
def attention_masked():
    """The mask comes from Embedding(mask_zero=True), as further tensors in the call."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    x = layers.MultiHeadAttention(4, 3, output_shape=6)(x, x, use_causal_mask=True)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@entry(8, fences=0)
def attention_scores_shown():
    """The scores are an output of the model: so no head can leave."""
    inputs = keras.Input((5, 6))
    x, scores = layers.MultiHeadAttention(4, 3, output_shape=8)(inputs, inputs, return_attention_scores=True)
    return keras.Model(inputs, [head(ops.relu(x)), scores])


@entry(4, 8)
def attention_gated():
    inputs = keras.Input((5, 6))
    x = layers.MultiHeadAttention(4, 3, output_shape=8, use_gate=True)(inputs, inputs)
    return keras.Model(inputs, head(ops.relu(x)))


@entry(4, 12, fences=3)
def vit():
    """LayerNorm freezes the stream of 8; heads and the hidden layer of the MLP may leave."""
    inputs = image()
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 2, strides=2)(inputs))
    x = x + layers.Embedding(16, 8)(ops.arange(16))
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 2)(y, y)])
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.Dense(8)(layers.Dense(12, activation="gelu")(y))])
    return keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization()(x)[:, 0]))


@entry(4, 8)
def attention_by_hand():
    """reshape, transpose, matmul, softmax as operations: a unit is a head."""
    inputs = keras.Input((5, 6))
    q, k, v = (ops.transpose(ops.reshape(layers.Dense(12)(inputs), (-1, 5, 4, 3)), (0, 2, 1, 3)) for _ in range(3))
    x = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / 1.7), v)
    x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, 5, 12))
    return keras.Model(inputs, head(layers.Dense(8, "relu")(x)))


@entry(8, 4, 8, 5)
def attention_over_one_axis():
    inputs = keras.Input((3, 4, 6))
    x = layers.Dense(8)(inputs)
    x = layers.MultiHeadAttention(4, 3, attention_axes=(2,))(x, x)
    return keras.Model(inputs, head(layers.Dense(5, "relu")(x)))


@entry(8, 4, 5)
def attention_with_two_output_axes():
    """A tensor may carry units on one axis only, so its outputs stay."""
    inputs = keras.Input((4, 6))
    x = layers.Dense(8)(inputs)
    x = layers.MultiHeadAttention(4, 3, output_shape=(2, 3))(x, x)
    return keras.Model(inputs, head(layers.Dense(5, "relu")(x)))


@entry(8, 5)
def attention_pooling():
    inputs = keras.Input((6, 8))
    x = layers.Dense(8)(inputs)
    return keras.Model(inputs, head(layers.Dense(5)(x * layers.Softmax(axis=1)(layers.Dense(1)(x)))))


@entry(5, fences=1)
def softmax_masked():
    """The mask is an input of the model with as many channels, so they all stay."""
    inputs, mask = keras.Input((6, 8)), keras.Input((6, 8), dtype="float32")
    x = layers.Softmax(axis=1)(layers.Dense(8)(inputs), mask=mask > -0.5)
    return keras.Model([inputs, mask], head(layers.Dense(5)(x)))


# -- recurrence --------------------------------------------------------------------------------------------------


def recurrent(name, cell, *groups, fences=0, **kwargs):
    def builder():
        inputs = keras.Input((5, 4))
        x = cell(8, return_sequences=True)(layers.Dense(6)(inputs))
        return keras.Model(inputs, head(cell(5, **kwargs)(x)))

    add(name, builder, 6, 8, 5, fences=fences)


recurrent("lstm", layers.LSTM)
recurrent("lstm_bare", layers.LSTM, use_bias=False, activation="sigmoid", go_backwards=True)
recurrent("gru", layers.GRU)
recurrent("gru_classic", layers.GRU, reset_after=False, recurrent_activation="hard_sigmoid")
recurrent("simple_rnn", layers.SimpleRNN, dropout=0.1, recurrent_dropout=0.1)


@entry(8, 6)
def lstm_masked():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    return keras.Model(inputs, head(layers.LSTM(6)(x)))


@entry(8, 4)
def encoder_decoder():
    """return_state -> initial_state: the cells of both are one unit."""
    a, b = keras.Input((5, 4), name="a"), keras.Input((6, 4), name="b")
    _, h, c = layers.LSTM(8, return_state=True)(a)
    x = layers.LSTM(8)(b, initial_state=[h, c])
    _, s = layers.GRU(4, return_state=True)(a)
    y = layers.GRU(4)(b, initial_state=s)
    return keras.Model([a, b], head(layers.Concatenate()([x, y])))


@entry(6, fences=0)
def recurrent_state_from_input():
    """An initial state that is an input of the model keeps all cells."""
    a, b = keras.Input((5, 4), name="a"), keras.Input((8,), name="b")
    x = layers.GRU(8, return_sequences=True)(a, initial_state=b)
    return keras.Model([a, b], head(layers.Dense(6, "relu")(x)))


@entry(7, fences=1)
def recurrent_stateful():
    inputs = keras.Input(batch_shape=(3, 5, 4))
    x = layers.LSTM(8, stateful=True, return_sequences=True)(layers.Dense(7)(inputs))
    return keras.Model(inputs, head(x))


@entry(6, 8, 5)
def bidirectional():
    inputs = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(8, return_sequences=True))(layers.Dense(6)(inputs))
    x = layers.Bidirectional(layers.GRU(5), merge_mode="sum")(x)
    return keras.Model(inputs, head(x))


@entry(6, 8, 5)
def time_distributed():
    inputs = keras.Input((4, 8, 8, 3))
    x = layers.TimeDistributed(conv(6, activation="relu"))(inputs)
    x = layers.TimeDistributed(layers.BatchNormalization())(x)
    x = layers.TimeDistributed(layers.GlobalAveragePooling2D())(x)
    x = layers.TimeDistributed(layers.Dense(8, activation="relu"))(x)
    return keras.Model(inputs, head(layers.LSTM(5)(x)))


@entry(6, fences=1)
def time_distributed_model():
    """A wrapped model is not looked into."""
    inputs = keras.Input((4, 8, 8, 3))
    inner = keras.Sequential([keras.Input((8, 8, 3)), conv(4), layers.Flatten()])
    return keras.Model(inputs, head(layers.Dense(6)(layers.TimeDistributed(inner)(inputs))))


@entry(6, fences=1)
def bidirectional_with_states():
    inputs = keras.Input((4, 5))
    x = layers.Bidirectional(layers.LSTM(4, return_state=True))(inputs)[0]
    return keras.Model(inputs, head(layers.Dense(6)(x)))


# -- wiring ------------------------------------------------------------------------------------------------------


@entry(8, 6)
def conv_called_twice():
    """The second call ties the conv's outputs to its inputs."""
    inputs = image()
    shared = conv(8, activation="relu")
    x = shared(shared(conv(8)(inputs)))
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(8, 5, 6)
def shared_branch():
    a, b = image(), image()
    shared, norm = conv(8), layers.BatchNormalization()
    x, y = norm(shared(a)), norm(shared(b))
    x = layers.Concatenate()([x, conv(5)(y)])
    return keras.Model([a, b], head(conv(6, activation="relu")(x)))


@entry(4, 5, 6, 8)
def nested_model_twice():
    inputs = image()
    i = keras.Input((8, 8, 4))
    o = conv(4)(ops.reshape(conv(6, activation="relu")(i), (-1, 8, 8, 6)))
    inner = keras.Model(i, o, name="inner")
    x = conv(8)(inputs)
    a, b = inner(conv(4)(x)), inner(inner(conv(4)(x)))
    return keras.Model(inputs, head(conv(5, activation="relu")(a + b)))


@entry(8, 6, 5, 4)
def nested_three_deep():
    core = keras.Sequential([keras.Input((8, 8, 8)), conv(6, activation="relu"), layers.BatchNormalization()])
    i = keras.Input((8, 8, 8))
    middle = keras.Model(i, conv(5)(core(i)))
    return keras.Sequential(
        [keras.Input((8, 8, 3)), conv(8), middle, conv(4, activation="relu"), layers.Flatten(), layers.Dense(3)]
    )


@entry(8, 6, 5)
def two_in_two_out_by_name():
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((4,), name="right")
    x, y = conv(8, activation="relu")(left), layers.Dense(6, activation="relu")(right)
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), y])
    return keras.Model(
        {"right": right, "left": left},
        {"scores": layers.Dense(3, name="scores")(layers.Dense(5, "relu")(x)), "gate": layers.Dense(2, name="gate")(y)},
    )


@entry(3, 4, 8, 6)
def nested_model_by_name():
    given = {"p": keras.Input((8, 8, 3), name="p"), "q": keras.Input((8, 8, 4), name="q")}
    inner = keras.Model(given, {"sum": conv(8)(given["p"]) + conv(8)(given["q"])})
    inputs = image()
    x = inner({"q": conv(4)(inputs), "p": conv(3)(inputs)})["sum"]
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


@entry(8, 6)
def optional_input():
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b", optional=True)
    return keras.Model({"a": a, "b": b}, head(conv(6, activation="relu")(conv(8)(a) + conv(8)(b))))


@entry(8, 6)
def output_in_the_middle():
    """A layer whose output is an output of the model stays whole."""
    inputs = image()
    x = conv(5, name="seen")(conv(8, activation="relu")(inputs))
    return keras.Model(inputs, [x, head(conv(6, activation="relu")(x))])


@entry(8, 6, tolerance=5e-3)
def half_precision():
    inputs = image()
    x = conv(8, activation="relu", dtype="mixed_float16")(inputs)
    x = conv(6, activation="relu", dtype="mixed_float16")(layers.BatchNormalization(dtype="mixed_float16")(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


@entry(8, 6, 7)
def psp_convolutions():
    inputs = image()
    x = psp.PSPConv2D(8, 3, structure=("column", "filter"), threshold=0)(inputs)
    x = psp.PSPConv2DTranspose(6, 3, strides=2, structure="channel", threshold=0, activation="relu")(x)
    x = psp.PSPDepthwiseConv2D(3, structure="filter", threshold=0, activation="relu")(x)
    x = psp.PSPSeparableConv2D(7, 3, structure=("shape", "layer", "filter"), threshold=0, activation="relu")(x)
    return keras.Model(inputs, psp.PSPDense(3, structure="column", threshold=0)(layers.GlobalAveragePooling2D()(x)))


@entry(8, 6)
def psp_in_one_dimension():
    inputs = image(12, 3)
    x = psp.PSPConv1D(8, 3, structure="channel", threshold=0, activation="relu")(inputs)
    return keras.Model(inputs, head(psp.PSPConv1D(6, 3, structure="column", threshold=0, activation="relu")(x)))


@entry(4, 5)
def psp_in_three_dimensions():
    inputs = image(6, 6, 6, 2)
    x = psp.PSPConv3D(4, 3, structure="filter", threshold=0, activation="relu")(inputs)
    return keras.Model(inputs, head(psp.PSPConv3D(5, 3, structure="channel", threshold=0, activation="relu")(x)))


@keras.saving.register_keras_serializable("zoo")
class Unknown(layers.Layer):
    """A layer without a rule, with a weight and a product over channels in it."""

    def build(self, shape):
        self.mix = self.add_weight(shape=(shape[-1], shape[-1]), name="mix_kernel")

    def call(self, x):
        return ops.matmul(x, self.mix)

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("zoo")
class ChannelScale(layers.Layer):
    """A layer with a user's own rule."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return x * self.scale

    def compute_output_shape(self, shape):
        return shape


@keras_prune.rule(ChannelScale)
def channel_scale(layer, call, x):
    return keras_prune.Labels(x, {"scale": (call.along(x, -1),)})


@keras.saving.register_keras_serializable("zoo")
class Standardised(layers.Conv2D):
    """A subclass of Conv2D computes something else, so the rule of Conv2D does not hold."""

    def call(self, x):
        return super().call(x - ops.mean(x, axis=-1, keepdims=True))


@keras.saving.register_keras_serializable("zoo")
class Gate(layers.Layer):
    """Takes an argument that is None, and has no weights."""

    def call(self, x, other=None):
        return x if other is None else x * other


through("unknown_layer", Unknown, 6, fences=1)
through("user_rule", ChannelScale)
through("subclass_of_conv", lambda x: Standardised(5, 3)(x), 6, fences=1)
through("none_argument", lambda x: Gate()(x, other=None), 6, fences=1)
through("where_with_none", lambda x: ops.max(ops.mean(x, axis=1, keepdims=True), axis=1, initial=None), 8, last="none")
through("lambda_layer", lambda x: layers.Lambda(lambda t: t * 2)(x), 6, fences=1)


@entry(8, 6, fences=1)
def unknown_layer_first():
    inputs = image()
    return keras.Model(inputs, head(conv(6, activation="relu")(conv(8)(Unknown()(inputs)))))


def resnet(shortcut):
    """Option A: stride by slicing, channels padded with zeros. The stages' widths are tied with shifts."""

    def builder():
        def block(x, n, stride):
            y = layers.ReLU()(
                layers.BatchNormalization()(layers.Conv2D(n, 3, strides=stride, padding="same", use_bias=False)(x))
            )
            y = layers.BatchNormalization()(conv(n, use_bias=False)(y))
            if stride == 2 and shortcut == "ops":
                x = ops.pad(x[:, ::2, ::2, :], [[0, 0], [0, 0], [0, 0], [2, 2]])
            elif stride == 2:
                x = layers.AveragePooling2D(1, 2)(x)
                x = layers.ZeroPadding2D(((0, 0), (2, 2)), data_format="channels_first")(x)
            return layers.ReLU()(layers.Add()([y, x]))

        inputs = image()
        x = layers.ReLU()(layers.BatchNormalization()(conv(4, use_bias=False)(inputs)))
        x = block(block(x, 4, 1), 8, 2)
        return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))

    return builder


# blocks' inner convs: 4 and 8; the stream: 4 channels of the first stage, and 4 that the second stage adds
add("resnet_option_a_ops", resnet("ops"), 4, 8, 4, 4)
add("resnet_option_a_layers", resnet("layers"), 4, 8, 4, 4)


@entry(6, 5, 8)
def densely_connected():
    x = inputs = image()
    for n in (6, 5):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Concatenate()([x, conv(n)(y)])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, head(conv(8, activation="relu")(x)))


@entry(4, 8, 6)
def inverted_residual():
    """MobileNetV2: a linear bottleneck of 4, expanded to 8."""
    inputs = image()
    x = conv(4)(inputs)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(conv(8, 1)(x)))
    y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(y)))
    x = layers.Add()([x, layers.BatchNormalization()(conv(4, 1)(y))])
    return keras.Model(inputs, head(conv(6, activation="relu")(x)))


# -- one of each that is left: the contract test wants every registered rule to be met ---------------------------


for dimension, size in ((1, 4), (2, (4, 4)), (3, (4, 4, 4))):
    through(f"adaptive_max_{dimension}d", getattr(layers, f"AdaptiveMaxPooling{dimension}D")(size), rank=dimension)
through("masking_layer", layers.Masking(), rank=1)
for reduction in ("amax", "amin", "median"):
    through(f"{reduction}_over_space", lambda x, r=reduction: getattr(ops, r)(x, axis=(1, 2), keepdims=True))
for reduction in ("any", "all", "prod", "std"):  # not smooth at the zero of a removed channel
    through(
        f"{reduction}_over_space",
        lambda x, r=reduction: ops.cast(getattr(ops, r)(x, axis=(1, 2), keepdims=True), "float32"),
        6,
        fences=1,
    )
for mixing in ("sort", "argsort", "cumprod"):
    through(
        f"{mixing}_over_channels", lambda x, m=mixing: ops.cast(getattr(ops, m)(x, axis=-1), "float32"), 6, fences=1
    )
    through(f"{mixing}_over_rows", lambda x, m=mixing: ops.cast(getattr(ops, m)(x, axis=1), "float32"))
through("normalize_over_channels", lambda x: ops.normalize(x, axis=-1), 6, fences=1)
through("divide_by_a_number", lambda x: ops.divide(x, 2.0))
through("divide_by_an_array", lambda x: ops.divide(x, np.arange(1.0, 9.0, dtype="float32")))
for comparison in ("equal", "greater_equal", "less_equal"):
    through(f"{comparison}_to_a_number", lambda x, c=comparison: ops.cast(getattr(ops, c)(x, 0.1), "float32"))
for logical in ("logical_or", "logical_xor"):
    through(f"{logical}_of_two", lambda x, f=logical: ops.cast(getattr(ops, f)(x > 0.5, x < -0.5), "float32"))


# What Keras 3.15 itself cannot run on another backend, pruned or not.
UNABLE = {"torch": ("pad_channels_reflect", "layer_norm_space"), "jax": ("max_pool_op", "attention_cross")}
for unable in UNABLE.get(keras.backend.backend(), ()):
    del BUILDERS[unable], FACTS[unable]

ZOO: dict[str, Callable[[], tuple]] = {name: (lambda n=name: build(n)) for name in BUILDERS}
