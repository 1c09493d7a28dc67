"""Quantization-aware training in a process of its own. Each run of the child takes seconds: few, on tiny networks."""

import importlib.util
import os
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)
# Not importorskip: importing tfmot would change this whole process.
if any(importlib.util.find_spec(name) is None for name in ("tf_keras", "tensorflow_model_optimization")):
    pytest.skip("needs the extra [tfmot]", allow_module_level=True)

import tensorflow as tf
from test_export_zoo import convnet, images, nested, randomised

import tflite_export
from tflite_export.inputs import model_inputs
from tflite_export.keras2 import rewritten, to_tf_keras
from tflite_export.quantaware import batches
from tflite_export.quantaware.lowering import Lowering


def stripes(count, seed=0):
    """Images with stripes along one axis or the other, or none: three classes that no untrained network tells apart."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    wave = 2.0 * np.sign(np.sin(np.pi * np.arange(8) / 2 + 0.1))
    pictures = random.normal(size=(count, 8, 8, 1))
    pictures += (labels == 1)[:, None, None, None] * wave[None, :, None, None]
    pictures += (labels == 2)[:, None, None, None] * wave[None, None, :, None]
    return (50 * pictures + 100).astype("float32"), labels


def untrained():
    """Rescaling, a residual by an operation and BatchNormalization of its own: all of it refused by tfmot alone."""
    keras.utils.set_random_seed(3)
    x = image = keras.Input((8, 8, 1), name="image")
    x = layers.Rescaling(1 / 50, -2.0)(x)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    y = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.BatchNormalization(name="before")(x))
    x = layers.MaxPooling2D()(x + y)
    return keras.Model(image, layers.Dense(3, name="scores")(layers.Flatten()(x)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("qat")
    model, (x, y), held_out = untrained(), stripes(600), stripes(200, seed=1)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(20)
    before = [weight.copy() for weight in model.get_weights()], dict(os.environ), set(sys.modules)
    lines = []

    class Screen:
        def write(self, text):
            lines.append(text)

        def flush(self):
            pass

    kept, sys.stdout = sys.stdout, Screen()
    try:
        report = tflite_export.qat(
            model, dataset, folder / "a.tflite", epochs=4, learning_rate=0.01, validation=held_out, runs=1
        )
    finally:
        sys.stdout = kept
    after = [weight.copy() for weight in model.get_weights()], dict(os.environ), set(sys.modules)
    return {
        "after": after,
        "model": model,
        "report": report,
        "before": before,
        "folder": folder,
        "said": "".join(lines),
        "data": held_out,
    }


def test_training_on_fake_quantization_learns_and_the_file_keeps_what_was_learned(trained):
    report, (x, y) = trained["report"], trained["data"]
    assert report.measure == "accuracy" and report.validation_samples == 200
    assert report.float_before < 0.7  # the network that was passed had learned nothing
    assert report.fake_quantised > 0.9 and report.int8_file > 0.9
    [scores] = tflite_export.Runner(trained["folder"] / "a.tflite").run([x])
    assert report.int8_file == pytest.approx(float(np.mean(scores.argmax(-1) == y)))
    losses = [epoch["loss"] for epoch in report.epochs]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    assert report.samples == 600 and report.latency.runs == 1
    assert "sparse_categorical_crossentropy" in report.loss


def test_the_file_holds_integers_only_and_knows_its_names(trained):
    path = trained["folder"] / "a.tflite"
    runner = tflite_export.Runner(path)
    assert {port.dtype for port in runner.inputs + runner.outputs} == {"int8"}
    kinds = {np.dtype(each["dtype"]).name for each in runner.interpreter.get_tensor_details()}
    assert kinds <= {"int8", "int32"}, kinds
    assert not any("QUANTIZE" in name for name in runner.operators)
    assert [port.name for port in runner.inputs + runner.outputs] == ["image", "scores"]
    checked = tflite_export.check(path)
    assert checked.ok and checked.recipe == "int8"
    assert trained["report"].parity[0].relative_error < 0.05 < 1.0
    assert os.listdir(trained["folder"]) == ["a.tflite"]


def test_this_process_knows_nothing_of_keras_2(trained):
    weights, environment, modules = trained["before"]
    weights_after, environment_after, modules_after = trained["after"]
    assert environment_after == environment and "TF_USE_LEGACY_KERAS" not in environment
    new = {name.split(".")[0] for name in modules_after - modules}
    assert not new & {"tf_keras", "tensorflow_model_optimization"}
    assert "tensorflow_model_optimization" not in sys.modules
    assert tf.keras.Model is keras.Model
    for old, now in zip(weights, weights_after, strict=True):
        np.testing.assert_array_equal(old, now)


def test_the_report_and_the_progress_can_be_read(trained):
    text = str(trained["report"])
    for word in ("600 samples", "int8 file", "fake-quantised", "tensorflow-model-optimization 0", "latency", "scores"):
        assert word in text
    assert "rescaling" in text and "before" in text  # what was written otherwise is said
    assert '"int8_file"' in trained["report"].to_json()
    assert "qat: epoch 1/4  done  loss" in trained["said"] and "qat: epoch 4/4  done" in trained["said"]


def test_without_an_epoch_the_file_computes_what_keras_computes(tmp_path):
    model, x = convnet(), images(96)
    labels = np.asarray(model(x)).argmax(-1)
    stream = ((x[at : at + 32], labels[at : at + 32]) for at in range(0, 96, 32))
    report = tflite_export.qat(
        model, stream, tmp_path / "a.tflite", epochs=0, train_batchnorm=False, float_io=True, verbose=False
    )
    assert report.float_before is None and "not measured" in str(report)
    assert {port.dtype for port in tflite_export.Runner(tmp_path / "a.tflite").inputs} == {"float32"}
    assert tflite_export.compare(model, tmp_path / "a.tflite", x).relative_error < 0.15
    other = tflite_export.compare(convnet(seed=1), tmp_path / "a.tflite", x)
    assert other.relative_error > 0.3  # the test can fail
    channels = [len(set(each["quantization_parameters"]["scales"].tolist())) for each in kernels(tmp_path / "a.tflite")]
    assert channels == [8, 8, 16]  # one scale per channel, of the depthwise kernel too


def test_keras_3_alone_trains_on_fake_quantization_too(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no extra package is asked for
    report = tflite_export.qat(
        untrained(),
        stripes(600),
        tmp_path / "a.tflite",
        epochs=4,
        learning_rate=0.01,
        batch_size=20,
        validation=stripes(200, seed=1),
        through="keras",
        verbose=False,
    )
    assert report.float_before < 0.7 and report.int8_file > 0.9
    assert report.parity[0].relative_error < 0.05
    details = tflite_export.Runner(tmp_path / "a.tflite").interpreter.get_tensor_details()
    assert {np.dtype(each["dtype"]).name for each in details} <= {"int8", "int32"}
    assert "tf_keras" not in report.versions


def test_keras_3_alone_rounds_like_the_file(tmp_path):
    model, x = convnet(), images(96)
    labels = np.asarray(model(x)).argmax(-1)
    tflite_export.qat(
        model, (x, labels), tmp_path / "a.tflite", epochs=0, train_batchnorm=False, through="keras", verbose=False
    )
    assert tflite_export.compare(model, tmp_path / "a.tflite", x).relative_error < 0.15
    assert tflite_export.compare(convnet(seed=1), tmp_path / "a.tflite", x).relative_error > 0.3  # the test can fail
    channels = [len(set(each["quantization_parameters"]["scales"].tolist())) for each in kernels(tmp_path / "a.tflite")]
    assert channels == [8, 8, 16]


def kernels(path):
    """The int8 tensors of a file with four axes and more than one scale."""
    details = tflite_export.Runner(path).interpreter.get_tensor_details()
    return [each for each in details if len(each["shape"]) == 4 and len(each["quantization_parameters"]["scales"]) > 1]


def test_a_layer_that_cannot_be_trained_is_named_and_an_older_file_stays(tmp_path):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(2)(layers.LayerNormalization(name="the_norm")(inputs)))
    (tmp_path / "a.tflite").write_bytes(b"older")
    data = (images(8).reshape(8, -1)[:, :6], np.zeros(8, int))
    with pytest.raises(ValueError, match="the layer 'the_norm' .LayerNormalization.*export"):
        tflite_export.qat(model, data, tmp_path / "a.tflite", verbose=False)
    assert (tmp_path / "a.tflite").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.tflite"]


@pytest.mark.parametrize(
    "program, said",
    [
        ("#!/bin/sh\necho 'no such thing' >&2\nexit 3\n", "ended with code 3: no such thing"),
        ("#!/bin/sh\nkill -9 $$\n", "ended by signal 9.*batch_size"),
    ],
)
def test_a_child_that_dies_is_one_sentence_and_leaves_nothing(program, said, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(program)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match=said):
        tflite_export.qat(convnet(), (images(8), np.zeros(8, int)), out / "a.tflite")
    assert os.listdir(out) == []


def test_an_interrupted_training_ends_its_child(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho begun\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tflite_export.qat(convnet(), (images(8), np.zeros(8, int)), tmp_path / "a.tflite")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "a.tflite").exists()


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'keras_prune\[tfmot\]'"):
        tflite_export.qat(convnet(), (images(8), np.zeros(8, int)), tmp_path / "a.tflite")


# -- what is refused before any process starts ------------------------------------------------------------------------


@keras.saving.register_keras_serializable("test_qat")
class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


def with_own_layer():
    inputs = keras.Input((12, 12, 3))
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(Doubled(name="mine")(inputs))))


def with_integers():
    inputs = keras.Input((12, 12, 3), dtype="uint8")
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(layers.Rescaling(1 / 255)(inputs))))


GOOD = (images(8), np.zeros(8, int))


@pytest.mark.parametrize(
    "make, data, options, said",
    [
        (with_own_layer, GOOD, {}, "'mine' .*Doubled.* not one of Keras's own"),
        (with_integers, GOOD, {}, "is uint8; .*dtype='float32'"),
        (convnet, GOOD, {"epochs": -1}, "epochs=-1 was passed"),
        (convnet, GOOD, {"learning_rate": 0}, "learning_rate=0 was passed"),
        (convnet, GOOD, {"through": "torch"}, "through='torch' was passed; known: 'keras', 'tfmot'"),
        (convnet, GOOD, {"batch_size": 0}, "batch_size=0 was passed"),
        (convnet, GOOD, {"loss": "sparse_categorical_crossentropy"}, r"reads probabilities.*from_logits=True"),
        (convnet, GOOD, {"loss": keras.losses.SparseCategoricalCrossentropy()}, "reads probabilities"),
        (convnet, (images(8), np.zeros((8, 2))), {}, "pass loss="),
        (convnet, (images(8), np.zeros(7, int)), {}, r"shape \(7,\)"),
        (convnet, [images(8)], {}, "needs labels"),
        (convnet, [], {}, "empty"),
        (convnet, (images(8)[..., :2], np.zeros(8, int)), {}, "shape"),
        (convnet, tf.data.Dataset.from_tensor_slices(GOOD).batch(4).repeat(), {}, "endless"),
        (convnet, GOOD, {"max_bytes": 1000}, "more than .* GiB on the disk"),
        (convnet, GOOD, {"optimizer": "none_such"}, "none_such"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make, data, options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a child would be an OSError
    with pytest.raises(ValueError, match=said):
        tflite_export.qat(make(), data, tmp_path / "a.tflite", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"loss": lambda y, p: p}, {"optimizer": object()}])
def test_code_that_cannot_cross_is_refused(options, tmp_path):
    with pytest.raises(TypeError, match="cannot cross"):
        tflite_export.qat(convnet(), GOOD, tmp_path / "a.tflite", **options)


# -- data on the way --------------------------------------------------------------------------------------------------


def two_inputs():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    return keras.Model({"a": a, "b": b}, layers.Dense(2, name="out")(layers.Concatenate()([a, b])))


def rows(count, seed=0):
    random = np.random.default_rng(seed)
    x = {"a": random.normal(size=(count, 3)).astype("float32"), "b": random.normal(size=(count, 2)).astype("float32")}
    return x, random.integers(0, 2, count), random.random(count).astype("float32")


def forms(x, y, weights):
    """The same samples in the forms in which users hold them."""
    slices = tf.data.Dataset.from_tensor_slices((x, y, weights))
    cut = [({key: v[at : at + 4] for key, v in x.items()}, y[at : at + 4], weights[at : at + 4]) for at in (0, 4, 8)]

    class Py(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, at):
            return cut[at]

    return {
        "arrays": (x, y, weights),
        "list of arrays": ([x["a"], x["b"]], y, weights),
        "tf.data": slices.batch(4),
        "tf.data, not batched": slices,
        "PyDataset": Py(),
        "generator": (each for each in cut),
        "labels by name": (x, {"out": y}, weights),
    }


@pytest.mark.parametrize("form", forms(*rows(10)))
def test_samples_arrive_as_they_were_in_every_form(form, tmp_path):
    x, y, weights = rows(10)
    model = two_inputs()
    stored = batches.store(forms(x, y, weights)[form], tmp_path, "t", model_inputs(model), ["out"])
    stored = batches.from_json(batches.to_json(stored))
    arrays, [labels], found = stored.open(tmp_path)
    assert stored.samples == 10
    for name, array in zip([tensor.name for tensor in model.inputs], arrays, strict=True):
        np.testing.assert_array_equal(array, x[name])
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_array_equal(found, weights)
    assert isinstance(arrays[0], np.memmap)  # read from the disk, not held


def test_a_long_stream_takes_no_more_memory_than_a_batch(tmp_path):
    import tracemalloc

    def stream():
        for _ in range(100):
            yield np.zeros((50, 12, 12, 3), "float32"), np.zeros(50, int)

    batch = 50 * 12 * 12 * 3 * 4
    tracemalloc.start()
    stored = batches.store(stream(), tmp_path, "t", model_inputs(convnet()), ["scores"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored.samples == 5000 and (tmp_path / "t-x0").stat().st_size == 100 * batch
    assert peak < 10 * batch


def test_an_epoch_takes_every_sample_once_in_another_order():
    random = np.random.default_rng(0)
    first, second = (batches.rounds(103, 10, random) for _ in range(2))
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(103))
    assert [len(each) for each in first] == 10 * [10] + [3]
    assert set(first[0]) != set(second[0])


# -- what tfmot refuses, in other words -------------------------------------------------------------------------------


def preactivation():
    x = image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same")(layers.Normalization(mean=[1.0, 2, 3], variance=[1.0, 4, 9])(x))
    y = layers.Conv2D(6, 3, padding="same", activation="silu")(layers.ReLU()(layers.BatchNormalization()(x)))
    x = ops.relu(layers.BatchNormalization()(x + y)) * 0.5 + 1.0
    gate = layers.Dense(6, activation="hard_sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Activation("hard_silu")(layers.Multiply()([x, gate]))
    return randomised(keras.Model(image, layers.Dense(3)(layers.Flatten()(layers.GaussianNoise(0.1)(3.0 - x)))))


def folding():
    x = image = keras.Input((8, 8, 3), name="image")
    for layer in (
        layers.Conv2D(6, 3, use_bias=False),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.SeparableConv2D(8, 3),
        layers.Dense(4),
    ):
        x = layers.Activation("relu6")(layers.BatchNormalization()(layer(x)))
    both = layers.Conv2D(4, 1)(x)  # read twice: its BatchNormalization is not folded
    return randomised(keras.Model(image, [layers.BatchNormalization()(both), both]))


@pytest.mark.parametrize("make", [preactivation, folding, nested, untrained])
@pytest.mark.parametrize("train_batchnorm", [True, False])
def test_what_tfmot_refuses_is_said_in_layers_that_it_takes(make, train_batchnorm):
    model = make()
    if any(isinstance(layer, keras.Model) for layer in model.layers):
        model = tflite_export.from_tf_keras(to_tf_keras(model))
    old = to_tf_keras(model, replace=Lowering(model, train_batchnorm))  # compares outputs itself
    new = rewritten(model, Lowering(model, train_batchnorm))
    assert sorted(type(layer).__name__ for layer in new.layers) == sorted(type(layer).__name__ for layer in old.layers)
    x = np.random.default_rng(2).normal(size=(5, *model.inputs[0].shape[1:])).astype("float32")
    for a, b in zip(keras.tree.flatten(model(x)), keras.tree.flatten(old(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(a).max()))
    kinds = [type(layer).__name__ for layer in old.layers]
    assert not {"Rescaling", "Normalization", "GaussianNoise", "TFOpLambda", "SlicingOpLambda"} & set(kinds)
    before = {type(layer._inbound_nodes[0].inbound_layers).__name__ for layer in old.layers
              if type(layer).__name__ == "BatchNormalization"}  # fmt: skip
    assert before <= {"Conv2D", "DepthwiseConv2D", "SeparableConv2D"}
    if make is folding:
        assert before == ({"Conv2D", "DepthwiseConv2D", "SeparableConv2D"} if train_batchnorm else set())
