"""The bridge between Keras 3 and tf_keras, and what tensorflow-model-optimization made on the other side of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

if keras.backend.backend() != "tensorflow":
    pytest.skip("tf_keras runs on TensorFlow only", allow_module_level=True)
# Not importorskip: importing tfmot would change this whole process.
if any(importlib.util.find_spec(name) is None for name in ("tf_keras", "tensorflow_model_optimization")):
    pytest.skip("needs the extra [tfmot]", allow_module_level=True)

from test_export_zoo import ZOO, randomised

import tflite_export
from tflite_export.keras2 import Unbridged

ROOT = Path(__file__).parent.parent


def cifar_resnet():
    """A residual network as in He et al. 2015: its option-A shortcut is a slice and a padding, not layers."""
    x = image = keras.Input((16, 16, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    y = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x)
    y = layers.BatchNormalization()(y)
    x = ops.pad(x[:, ::2, ::2, :], [[0, 0], [0, 0], [0, 0], [4, 4]])
    x = ops.relu(x + y)
    return randomised(keras.Model(image, layers.Dense(5)(layers.GlobalAveragePooling2D()(x))))


def arithmetic():
    """Operations with constants, a nested model called twice, and a layer that is shared."""
    x = image = keras.Input((8, 8, 4), name="image")
    inner = keras.Sequential([keras.Input((8, 8, 4)), layers.Conv2D(4, 3, padding="same"), layers.LeakyReLU(0.1)])
    x = inner(inner(x) * 0.5 + 1.0)
    gate = layers.Activation("hard_silu")(layers.BatchNormalization()(x))
    x = ops.concatenate([ops.maximum(x, gate), 3.0 - x, ops.transpose(x, (0, 2, 1, 3))], axis=-1)
    x = ops.reshape(x, (-1, 64, 12))
    return randomised(keras.Model(image, layers.Dense(3)(ops.mean(x, axis=1))))


def mobilenet():
    made = keras.applications.MobileNetV2((32, 32, 3), weights=None, classes=5, alpha=0.35, classifier_activation=None)
    random = np.random.default_rng(0)
    for layer in made.layers:  # kernels of a trained scale, and statistics that are not those of a fresh layer
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.0, weight.shape) for weight in layer.get_weights()])
    return made


NETWORKS = {make.__name__: make for make in (cifar_resnet, arithmetic, mobilenet)}
NETWORKS |= {name: make for name, make in ZOO.items() if name != "mixed_precision"}


def answers(model, seed=7):
    """Outputs on generated inputs, flat, of a model of either package."""
    random = np.random.default_rng(seed)
    inputs = []
    for tensor in model.inputs:
        shape, dtype = (6, *tensor.shape[1:]), getattr(tensor.dtype, "name", tensor.dtype)
        values = random.normal(size=shape) if "float" in dtype else random.integers(0, 8, shape)
        inputs.append(values.astype(dtype))
    structure = getattr(model, "_inputs_struct", None)
    packed = inputs[0] if len(inputs) == 1 else inputs
    if structure is not None:
        packed = keras.tree.pack_sequence_as(structure, inputs)
    made = model(packed, training=False)
    return [np.asarray(each) for each in keras.tree.flatten(made)]


def distance(a, b):
    """Largest difference of two models' outputs, divided by the largest output."""
    pairs = list(zip(answers(a), answers(b), strict=True))
    return max(float(np.abs(x - y).max()) for x, y in pairs) / max(float(np.abs(x).max()) for x, _ in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_on_both_sides_of_the_bridge(name):
    import tf_keras

    model = NETWORKS[name]()
    old = tflite_export.to_tf_keras(model)
    assert isinstance(old, tf_keras.Model) and not isinstance(old, keras.Model)
    assert distance(model, old) < 1e-5
    back = tflite_export.from_tf_keras(old)
    assert isinstance(back, keras.Model)
    assert distance(model, back) < 1e-5
    if model.weights:
        spoiled = max(old.weights, key=lambda weight: weight.shape.num_elements())
        spoiled.assign(spoiled + 0.1)
        assert distance(model, old) > 1e-3  # the test can fail
        assert distance(model, back) < 1e-5  # the weights are copies


def test_the_bridge_leaves_the_process_as_it_was():
    import tensorflow as tf

    before = dict(os.environ)
    tflite_export.to_tf_keras(cifar_resnet())
    assert dict(os.environ) == before and "TF_USE_LEGACY_KERAS" not in os.environ
    assert tf.keras.Model is keras.Model
    assert "tensorflow_model_optimization" not in sys.modules


def test_what_keras_2_computes_otherwise_is_refused():
    inputs = keras.Input((4,))
    model = randomised(keras.Model(inputs, layers.Dense(3, activation="hard_sigmoid")(inputs)))
    with pytest.raises(Unbridged, match="came out otherwise in tf_keras"):
        tflite_export.to_tf_keras(model)


@keras.saving.register_keras_serializable("test_tfmot")
class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "layer, said",
    [
        (Doubled(name="mine"), "'mine' .*Doubled.* no equal in tf_keras"),
        (layers.Lambda(lambda x: x + 1, name="code"), "'code' .*Lambda.* no equal"),
        (layers.Dense(3, activation="celu", name="odd"), "'odd' .*Dense.* cannot be made in tf_keras"),
    ],
)
def test_a_layer_without_an_equal_is_named(layer, said):
    inputs = keras.Input((4,))
    with pytest.raises(Unbridged, match=said):
        tflite_export.to_tf_keras(keras.Model(inputs, layer(inputs)))


def test_an_operation_without_an_equal_is_named():
    inputs = keras.Input((4,))
    with pytest.raises(Unbridged, match="operation .*Cumsum.* has no equal"):
        tflite_export.to_tf_keras(keras.Model(inputs, ops.cumsum(inputs, axis=1)))


def test_mixed_precision_is_named():
    with pytest.raises(Unbridged, match="computes in float16"):
        tflite_export.to_tf_keras(ZOO["mixed_precision"]())


def test_a_keras_3_model_needs_no_bridge_to_keras_3():
    with pytest.raises(TypeError, match="expected a tf_keras model"):
        tflite_export.from_tf_keras(cifar_resnet())


# -- tensorflow-model-optimization itself, in a process of its own ----------------------------------------------------

SCRIPT = """
import json, os, sys, warnings
import numpy as np
import tensorflow as tf
tf.keras.Model                                  # first, so that tf.keras stays Keras 3
import tensorflow_model_optimization as tfmot
import tf_keras
import keras, keras_prune, tflite_export
from tf_keras import layers

folder, found = sys.argv[1], {}
random = np.random.default_rng(0)
x, y = random.normal(size=(64, 8, 8, 3)).astype("float32"), random.integers(0, 4, 64)

def network(operations=False):
    tf_keras.utils.set_random_seed(1)
    image = tf_keras.Input((8, 8, 3))
    a = layers.Conv2D(16, 3, padding="same", use_bias=False, name="first")(image)
    a = layers.ReLU(6.0)(layers.BatchNormalization(name="norm")(a))
    b = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(a)
    b = tf.nn.relu(a + b) if operations else layers.ReLU()(layers.Add()([a, b]))  # tfmot prunes layers only
    b = layers.Conv2D(8, 3, activation="relu", name="second")(b)
    return tf_keras.Model(image, layers.Dense(4, name="scores")(layers.Flatten()(b)))

def difference(old, new):
    a, b = np.asarray(old(x, training=False)), np.asarray(new(x, training=False))
    return float(np.abs(a - b).max() / np.abs(a).max())

# 1. Pruned by tfmot for a few steps, stripped of its wrappers, brought over.
plan = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=6, frequency=1)
pruned = tfmot.sparsity.keras.prune_low_magnitude(network(), pruning_schedule=plan)
try:
    tflite_export.from_tf_keras(pruned)
except ValueError as error:
    found["wrapped"] = str(error)
pruned.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
pruned.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
old = tfmot.sparsity.keras.strip_pruning(pruned)
new = tflite_export.from_tf_keras(old)
found["zeros"] = float(np.mean(new.get_layer("second").get_weights()[0] == 0))
found["pruned"] = difference(old, new)
found["is_keras_3"] = isinstance(new, keras.Model)
for name in ("old.h5", "old.keras"):
    old.save(os.path.join(folder, name))
    found[name] = difference(old, tflite_export.from_tf_keras(os.path.join(folder, name)))
found["strip"] = difference(old, keras_prune.strip(new))

# 2. Whole filters zeroed over there become a smaller network here.
old = network(operations=True)
old.get_layer("norm").set_weights([random.uniform(0.5, 1, w.shape) for w in old.get_layer("norm").get_weights()])
kernel, = old.get_layer("first").get_weights()
kernel[..., :6] = 0
old.get_layer("first").set_weights([kernel])
gamma, beta, mean, variance = old.get_layer("norm").get_weights()
beta[:6] = mean[:6] = 0
old.get_layer("norm").set_weights([gamma, beta, mean, variance])
depthwise, bias = old.get_layer("depthwise").get_weights()
depthwise[:, :, :6], bias[:6] = 0, 0
old.get_layer("depthwise").set_weights([depthwise, bias])
new = tflite_export.from_tf_keras(old)
small = keras_prune.strip(new)
found["params"] = [old.count_params(), new.count_params(), small.count_params()]
found["filters"] = small.get_layer("first").filters
found["small"] = difference(old, small)
old.get_layer("scores").set_weights([w + 0.1 for w in old.get_layer("scores").get_weights()])
found["control"] = difference(old, small)

# 3. tfmot's schedules in a pruner of this library.
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(3)])
model.compile("sgd", "mse")
for kind in (
    tfmot.sparsity.keras.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=8, frequency=2),
    tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=2, frequency=2),
):
    pruner = keras_prune.FilterPruning(kind, measure="units", round_to=1, unit="batch", every=2)
    fitted = keras.models.clone_model(model)
    fitted.compile("sgd", "mse")
    log = fitted.fit(x[:, 0, 0, :2].repeat(3, 1), x[:, 0, 0], batch_size=4, verbose=0, callbacks=[pruner])
    found[type(kind).__name__] = log.history["sparsity"][-1]
json.dump(found, open(os.path.join(folder, "found.json"), "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfmot")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_a_model_pruned_by_tfmot_comes_over_with_its_zeros(found):
    assert found["is_keras_3"]
    assert found["zeros"] == pytest.approx(0.75, abs=0.02)
    assert found["pruned"] < 1e-5 and found["old.h5"] < 1e-5 and found["old.keras"] < 1e-5
    assert found["strip"] < 1e-5


def test_wrappers_of_tfmot_have_to_be_taken_off_before(found):
    assert "strip_pruning" in found["wrapped"]


def test_filters_zeroed_in_tf_keras_are_stripped_in_keras_3(found):
    old, new, small = found["params"]
    assert old == new
    # 3x3x3 kernels, norm, 3x3 depthwise with bias, 3x3 kernels with bias, scores of 6x6x8 numbers: with 10 filters each
    assert small == 27 * 10 + 4 * 10 + 9 * 10 + 10 + 90 * 8 + 8 + 288 * 4 + 4
    assert found["filters"] == 10
    assert found["small"] < 1e-5
    assert found["control"] > 1e-2


@pytest.mark.parametrize("schedule", ["PolynomialDecay", "ConstantSparsity"])
def test_schedules_of_tfmot_drive_a_pruner(found, schedule):
    assert found[schedule] == pytest.approx(0.5, abs=0.02)
