"""What random zeros in odd networks brought to light: strip is exact on other inputs and sizes, and loses nothing."""

import keras
import numpy as np
import pytest
import zoo
from keras import layers, ops
from zoo import randomize

from keras_prune import strip
from keras_prune.surgery import relative_difference

pytestmark = pytest.mark.filterwarnings("ignore:.*same for every input")


def conv(filters, size=3, **arguments):
    return layers.Conv2D(filters, size, **{"padding": "same", **arguments})


def pooled(x):
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(x))


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_zeros(model, name, where=...):
    for variable in model.get_layer(name).weights:
        if "kernel" in variable.path.split("/")[-1]:
            kernel = np.array(variable)
            kernel[where] = 0
            variable.assign(kernel)
    return model


def stripped(model, *inputs, data=None, rewire=True):
    """The stripped model, compared on inputs that strip did not see."""
    small = strip(model, data, check=False, rewire=rewire)
    for x in inputs:
        assert relative_difference(model, small, x) < 2e-5
    return small


@pytest.mark.parametrize("how", ["read_again", "shown"])
def test_a_constant_that_others_need_too_is_not_added_twice(how):
    inputs = keras.Input((8, 8, 3))
    x = conv(6)(inputs)
    dead = conv(6, name="dead")(x)
    y = layers.Add()([x, dead])
    outputs = pooled(y + layers.Multiply()([x, dead])) if how == "read_again" else [pooled(y), dead]
    stripped(with_zeros(randomize(keras.Model(inputs, outputs)), "dead"), image(3, 8, 8, 3))


def test_where_strides_decide_on_the_border_no_constant_goes_into_a_bias_of_images_of_unknown_size():
    inputs = keras.Input((None, None, 3))
    x = conv(6, name="first", activation="relu")(inputs)
    model = randomize(keras.Model(inputs, pooled(conv(5, 2, strides=2, activation="elu")(x))))
    model.get_layer("first").bias.assign(np.ones(6))
    with_zeros(model, "first", (..., slice(3)))
    stripped(model, image(3, 8, 8, 3), image(2, 9, 9, 3), image(2, 7, 12, 3))


def test_what_is_added_up_over_an_unknown_number_of_positions_is_no_constant():
    inputs = keras.Input((None, None, 3))
    x = conv(6, name="first")(inputs)
    total = ops.sum(conv(6, name="dead")(x), axis=(1, 2))
    y = layers.Add()([layers.GlobalAveragePooling2D()(x), total])
    model = randomize(keras.Model(inputs, [layers.Dense(3)(y), layers.Dense(2)(ops.sum(x, axis=(1, 2)))]))
    with_zeros(with_zeros(model, "dead"), "first", (..., slice(3)))
    stripped(model, image(3, 8, 8, 3), image(2, 9, 5, 3))


def test_a_branch_of_unknown_size_that_differs_at_the_border_of_larger_images_only_stays():
    inputs = x = keras.Input((None, None, 3))
    for _ in range(5):  # 32 pixels, the size of the probe, become one, and that one is border
        x = conv(6, strides=2, activation="relu")(x)
    y = conv(6, activation="relu")(conv(6, name="dead")(x))
    model = with_zeros(randomize(keras.Model(inputs, pooled(layers.Add(name="sum")([x, y])))), "dead")
    small = stripped(model, image(2, 32, 32, 3), image(1, 128, 97, 3))
    assert type(small.get_layer("sum")) is layers.Add


def test_a_gate_that_happens_to_be_open_does_not_make_a_unit_constant():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(conv(6, name="first")(inputs))
    gate = conv(1, name="gate", activation="hard_sigmoid")(inputs)
    model = randomize(keras.Model(inputs, pooled(conv(4, padding="valid")(layers.Multiply()([x, gate])))))
    model.get_layer("gate").bias.assign([50.0])
    model.get_layer("first").bias.assign(np.ones(6))
    with_zeros(model, "first", (..., slice(3)))
    stripped(model, image(3, 8, 8, 3), 1e3 * image(3, 8, 8, 3))


@pytest.mark.parametrize("join", [lambda a, b: layers.Add()([a, b]), ops.add], ids=["layer", "operation"])
def test_a_branch_that_ends_a_mask_stays(join):
    inputs = keras.Input((7,), dtype="int32")
    masked, plain = layers.Embedding(9, 8, mask_zero=True)(inputs), layers.Embedding(9, 8)(inputs)
    y = layers.LSTM(4)(join(masked, layers.Dense(8, name="dead")(plain)))
    tokens = np.array([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 0, 0]], "int32")
    stripped(with_zeros(randomize(keras.Model(inputs, layers.Dense(3)(y))), "dead"), tokens)


def test_a_convolution_of_zeros_ends_a_mask_as_it_did():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    y = [layers.LSTM(4)(layers.Conv1D(8, 3, padding="same", name="dead")(x)), layers.LSTM(4)(x)]
    tokens = np.array([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 0, 0]], "int32")
    stripped(with_zeros(randomize(keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(y)))), "dead"), tokens)


def test_not_all_parts_of_a_concatenation_leave_together():
    inputs = keras.Input((8, 8, 3))
    x = layers.Concatenate()([conv(8)(inputs), conv(5)(inputs)])
    model = randomize(keras.Model(inputs, pooled(conv(6, name="dead")(x))))
    stripped(with_zeros(model, "dead"), image(3, 8, 8, 3), rewire=False)


def test_attention_keeps_its_last_head():
    inputs = keras.Input((6, 8))
    attention = layers.MultiHeadAttention(4, 3)
    y = layers.Add()([inputs, attention(inputs, inputs)])
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(y))))
    attention._output_dense.kernel.assign(np.zeros((4, 3, 8)))
    small = stripped(model, image(3, 6, 8))
    assert all(x.num_heads >= 1 for x in small.layers if isinstance(x, layers.MultiHeadAttention))


def test_a_sum_called_twice_loses_both_branches():
    inputs = keras.Input((8, 8, 3))
    x, add = conv(6)(inputs), layers.Add()
    x = add([x, conv(6, name="one")(x)])
    x = add([x, conv(6, name="two")(x)])
    model = randomize(keras.Model(inputs, pooled(x)))
    small = stripped(with_zeros(with_zeros(model, "one"), "two"), image(3, 8, 8, 3))
    assert not {"one", "two"} & {layer.name for layer in small.layers}


def test_names_that_the_model_already_has_are_not_taken():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(name="padded_pad")(conv(8)(inputs))
    y = conv(8, name="padded")(x)
    y = layers.Add(name="add")([y, conv(8, name="dead")(x), x])
    z = conv(5, name="gathered")(y)
    model = randomize(keras.Model(inputs, pooled(layers.Concatenate()([z, y[..., 0:8:2], ops.take(y, [1, 3], -1)]))))
    with_zeros(with_zeros(model, "dead"), "padded", (slice(-1, None),))
    with_zeros(model, "gathered", (slice(None), slice(None), [1, 3, 4]))
    keras.backend.clear_session()  # as in a new process, where Keras counts names from the start
    stripped(model, image(3, 8, 8, 3))


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_output_that_was_a_sum_keeps_its_name_and_dtype(use_bias):
    inputs = keras.Input((8,))
    x = layers.Dense(4, name="other", dtype="float16")(inputs)
    dead = layers.Dense(4, name="dead", use_bias=use_bias, dtype="float16")(x)
    model = randomize(keras.Model(inputs, [layers.Add(name="sum", dtype="float32")([x, dead]), x]))
    with_zeros(model, "dead")
    model.compile("sgd", {"sum": "mse", "other": "mse"})
    small = strip(model)
    assert [t.dtype for t in small.outputs] == ["float32", "float16"]
    small.fit(image(4, 8), [image(4, 4), image(4, 4)], verbose=0)


def test_adam_takes_a_bias_that_a_layer_did_not_have_and_keeps_its_momenta():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(conv(6, name="first")(inputs))
    x = layers.Conv2D(5, 3, use_bias=False, activation="elu", name="reader")(x)
    model = randomize(keras.Model(inputs, pooled(x)))
    model.compile("adam", "mse")
    model.fit(image(4, 8, 8, 3), image(4, 3), verbose=0)
    model.get_layer("first").bias.assign(np.ones(6))
    small = stripped(with_zeros(model, "first", (..., slice(3))), image(3, 8, 8, 3))

    def slots(network):
        found = {v.path.split("/", 1)[1]: np.array(v) for v in network.optimizer.variables if v.ndim}
        return {k: v for k, v in found.items() if "dense" in k}

    before, after = slots(model), slots(small)
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    assert sum("reader_bias" in v.path for v in small.optimizer.variables) == 2
    small.fit(image(4, 8, 8, 3), image(4, 3), verbose=0)


def test_a_bias_on_another_axis_than_the_units_makes_their_zeros_a_number():
    inputs = keras.Input((5, 4))
    x = layers.EinsumDense("abc,cde->abde", (5, 6, 3), name="first")(inputs)
    x = layers.EinsumDense("abde,ef->abdf", (5, 6, 2), bias_axes="f", activation="tanh")(x)
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    stripped(with_zeros(model, "first", (slice(None), slice(3))), image(3, 5, 4))


def test_layers_called_by_keyword_are_rewired():
    inputs = keras.Input((8, 8, 3))
    x = conv(8)(inputs=inputs)
    y = layers.Multiply()([conv(6, name="gathered")(inputs=x), conv(6, name="dead")(inputs=x)])
    model = randomize(keras.Model(inputs, pooled(layers.Concatenate()([x, y]))))
    with_zeros(with_zeros(model, "dead"), "gathered", (slice(None), slice(None), [1, 3, 4]))
    small = stripped(model, image(3, 8, 8, 3))
    assert small.get_layer("gathered").kernel.shape[2] == 5 and type(small.get_layer("dead")) is layers.Rescaling


NETWORKS = (
    "where_constant concat_then_add squeeze_and_excite conv1d_strided separable2d unknown_image_size "
    "conv_called_twice nested_model_twice two_in_two_out_by_name lstm_masked densely_connected inverted_residual"
).split()


@pytest.mark.parametrize("name", NETWORKS)
def test_random_zeros_never_change_what_a_network_computes(name):
    for seed in range(3):
        model, batch = zoo.build(name)
        rng = np.random.default_rng([seed, len(name)])
        for variable in model.weights:
            if "kernel" not in variable.path.split("/")[-1] or len(variable.shape) < 2:
                continue
            kernel, kind = np.array(variable), rng.integers(8)
            if kind == 0:
                kernel[:] = 0
            elif kind == 1:
                kernel[..., rng.random(kernel.shape[-1]) < 0.5] = 0
            elif kind == 2:
                kernel[..., rng.random(kernel.shape[-2]) < 0.5, :] = 0
            elif kind == 3:
                kernel[: len(kernel) // 2] = 0
            variable.assign(kernel)
        stripped(model, batch, data=keras.tree.map_structure(lambda a: a[:2] * 0 + 1, batch), rewire=bool(seed % 2))
