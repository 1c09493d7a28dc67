"""Small Keras models by name, and what every one of them and every recipe must keep when exported."""

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

import tflite_export as te
from tflite_export.inputs import generate, model_inputs

RANDOM = np.random.default_rng(0)


def randomised(model, seed=0):
    """The model with every float weight random, BatchNorm statistics too: fresh ones hide mistakes."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        if "float" in weight.dtype:
            low = 0.5 if "variance" in weight.path or "gamma" in weight.path else -0.5
            weight.assign(random.uniform(low, 1.0 if low > 0 else 0.5, weight.shape))
    return model


def convnet(seed=0, width=8):
    image = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(image)
    x = layers.ReLU(max_value=6.0)(layers.BatchNormalization()(x))
    x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)])
    x = layers.Conv2D(2 * width, 3, strides=2, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return randomised(keras.Model(image, layers.Dense(5, name="scores")(x)), seed)


def images(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 12, 12, 3)).astype("float32")


def two_in_two_out():
    """Four tensors of one shape: only names and numbers tell them apart. The names sort against their order."""
    zeta, alpha = keras.Input((4,), name="zeta"), keras.Input((4,), name="alpha")
    difference = layers.Subtract(name="y")([zeta, alpha])
    return keras.Model([zeta, alpha], [difference, layers.Rescaling(3.0, name="x")(alpha)])


def dict_in_dict_out():
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    outputs = {"sum": layers.Dense(2)(left + right), "gate": layers.Dense(2, activation="sigmoid")(left)}
    return randomised(keras.Model({"right": right, "left": left}, outputs))


def embedding():
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(11, 4)(words))
    return randomised(keras.Model(words, layers.Dense(3, activation="softmax")(x)))


def attention():
    x = inputs = keras.Input((5, 8))
    x = x + layers.MultiHeadAttention(2, 4)(layers.LayerNormalization()(x), x)
    return randomised(keras.Model(inputs, layers.Dense(3, activation="gelu")(x)))


def recurrent(unroll=False):
    model = keras.Sequential(
        [keras.Input((5, 3)), layers.Bidirectional(layers.LSTM(4, unroll=unroll)), layers.Dense(2)]
    )
    return randomised(model)


def nested():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, activation="tanh"), layers.Dropout(0.5)], name="inner")
    x = inputs = keras.Input((6,))
    return randomised(keras.Model(inputs, [inner(inner(x)), x]))  # a layer called twice, an output that is an input


def mixed_precision():
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_float16")
        return convnet()
    finally:
        keras.config.set_dtype_policy(policy)


def many_layers():
    stack = [
        keras.Input((8, 8, 4), dtype="uint8"),
        layers.RandomFlip(),
        layers.Rescaling(1 / 255),
        layers.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 3.0, 4.0]),
        layers.ZeroPadding2D(1),
        layers.SeparableConv2D(6, 3, activation="swish"),
        layers.Conv2DTranspose(4, 3, strides=2),
        layers.AveragePooling2D(2),
        layers.UpSampling2D(),
        layers.PReLU(),
        layers.Flatten(),
        layers.Dense(3),
    ]
    return randomised(keras.Sequential(stack))


ZOO = {
    make.__name__: make
    for make in (
        convnet,
        two_in_two_out,
        dict_in_dict_out,
        embedding,
        attention,
        recurrent,
        nested,
        mixed_precision,
        many_layers,
    )
}


@pytest.mark.parametrize("name", ZOO)
def test_exported_file_computes_what_keras_computes(name, tmp_path):
    model = ZOO[name]()
    report = te.export(model, tmp_path / "a.tflite", runs=0)
    assert report.parity.relative_error <= 1e-5
    assert len(report.parity.outputs) == len(model.outputs)
    assert min(output.peak for output in report.parity.outputs) > 1e-2  # zeros would agree with anything
    assert not any(name.startswith("CUSTOM") for name in report.operators)
    assert all(port.shape[0] == 1 for port in report.inputs)


def installed(name):
    """Skips a test of a recipe that needs an extra which is not there."""
    if te.RECIPES[name].quantizer == "ai-edge":
        pytest.importorskip("ai_edge_quantizer")
    return te.RECIPES[name]


REFUSED = {("recurrent", "int8"): "unroll=True", ("recurrent", "int16x8"): "unroll=True"}


@pytest.mark.parametrize("recipe", te.RECIPES)
@pytest.mark.parametrize("name", ZOO)
def test_every_recipe_is_within_its_tolerance_or_refused_in_a_sentence(name, recipe):
    installed(recipe)
    if recipe == "int16x8":
        pytest.importorskip("ai_edge_quantizer")
    model = ZOO[name]()
    data = generate(model_inputs(model), 100)
    if (name, recipe) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, recipe]):
            te.to_tflite(model, recipe, data)
        return
    parity = te.compare(model, te.to_tflite(model, recipe, data), data)
    assert parity.relative_error <= te.RECIPES[recipe].tolerance
    assert min(output.peak for output in parity.outputs) > 1e-2


@pytest.mark.parametrize("name", te.RECIPES)
def test_every_recipe_keeps_its_tolerance(name, tmp_path):
    recipe, data = installed(name), images(100)
    report = te.export(convnet(), tmp_path / "a.tflite", name, data if recipe.needs_data else None, runs=1)
    assert report.within_tolerance and recipe.name == report.recipe == name
    assert {port.dtype for port in report.inputs + report.outputs} == {recipe.io_dtype}
    other = te.compare(convnet(seed=1), tmp_path / "a.tflite", images(16))
    assert other.relative_error > 2 * recipe.tolerance  # the test can fail
    checked = te.check(tmp_path / "a.tflite", convnet(), images(16))
    assert checked.ok and checked.tolerance == recipe.tolerance


def test_recipes_that_quantise_make_smaller_files():
    pytest.importorskip("ai_edge_quantizer")
    model, data = convnet(width=32), images(8)
    size = {name: len(te.to_tflite(model, name, data)) for name in te.RECIPES}
    weights = 4 * model.count_params()
    assert size["float32"] > weights
    assert size["float16"] < 0.75 * size["float32"]
    assert size["dynamic_int8"] < 0.75 * size["float32"]
    assert size["int8"] < 0.75 * size["float32"]
    assert size["weight_only_int8"] < 0.75 * size["float32"]
