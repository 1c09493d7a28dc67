"""Accuracy on labelled data, of models and of files, and the table over the stages."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from test_export_convert import message
from test_export_zoo import convnet, dict_in_dict_out, images, two_in_two_out

import tflite_export as te


def right_by_hand(model, x):
    return np.argmax(np.asarray(model(x)), -1)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    model, x = convnet(), images(60)
    y = right_by_hand(model, x)
    y[:15] = (y[:15] + 1) % 5  # so that 45 of 60 are right
    path = tmp_path_factory.mktemp("files") / "a.tflite"
    path.write_bytes(te.to_tflite(model))
    return model, x, y, path


def test_accuracy_counts_what_is_right(case):
    model, x, y, path = case
    assert te.accuracy(model, x, y) == te.accuracy(path, x, y) == te.accuracy(path.read_bytes(), x, y) == 0.75
    assert te.accuracy(model, x[:15], y[:15]) == 0.0


@pytest.mark.parametrize("recipe", ["int8", "int16x8"])
@pytest.mark.parametrize("float_io", [False, True])
def test_quantised_inputs_and_outputs_are_converted(case, recipe, float_io):
    model, x, y, _ = case
    content = te.to_tflite(model, recipe, x, float_io=float_io)
    assert abs(te.accuracy(content, x, y) - 0.75) <= 3 / 60
    # the control: real numbers put into the integers as they are, what a user without `Runner` easily does
    port = te.Runner(content).inputs[0]
    if not float_io:
        assert te.accuracy(content, x * port.scale, y) < 0.7


def test_labels_come_in_three_shapes(case):
    model, x, y, _ = case
    assert te.accuracy(model, x, y[:, None]) == te.accuracy(model, x, np.eye(5)[y]) == te.accuracy(model, x, list(y))
    assert te.accuracy(model, x, y.astype("float32")) == 0.75


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.zeros(59), ["(59,)", "60 samples", "5 classes"]),
        (np.zeros((60, 4)), ["(60, 4)", "(60, 5)"]),
        (np.zeros((60, 5)), ["one-hot"]),
        (np.full(60, 5), ["5 classes", "0 to 4"]),
        (np.full(60, -1), ["-1", "0 to 4"]),
        (np.full(60, 0.5), ["whole numbers"]),
        (np.array(["a"] * 60), ["whole numbers"]),
    ],
)
def test_labels_that_do_not_fit_are_named(case, labels, words):
    model, x, _, path = case
    for each in (model, path):
        text = message(ValueError, te.accuracy, each, x, labels)
        assert all(word in text for word in words)


def test_models_without_classes_are_refused():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(1)(inputs))
    assert "(4, 1)" in message(ValueError, te.accuracy, model, np.ones((4, 3)), np.zeros(4))
    assert "keras.Model" in message(TypeError, te.accuracy, 3, np.ones((4, 3)), np.zeros(4))


def test_several_inputs_go_by_name_and_an_output_is_chosen():
    model = dict_in_dict_out()
    random = np.random.default_rng(0)
    x = {"left": random.normal(size=(40, 3)).astype("float32"), "right": random.normal(size=(40, 3)).astype("float32")}
    y = np.argmax(np.asarray(model(x)["gate"]), -1)
    content = te.to_tflite(model)
    assert te.accuracy(model, x, y, output="gate") == te.accuracy(content, x, y, output="gate") == 1.0
    assert te.accuracy(model, x, y, output="sum") == te.accuracy(content, x, y, output="sum") < 0.9
    swapped = {"left": x["right"], "right": x["left"]}
    assert te.accuracy(content, swapped, y, output="gate") < 0.9
    for each in (model, content):
        assert "['gate', 'sum']" in message(ValueError, te.accuracy, each, x, y).replace(
            "'sum', 'gate'", "'gate', 'sum'"
        )
    text = message(ValueError, te.accuracy, te.to_tflite(two_in_two_out()), np.ones((2, 4)), np.zeros(2), output="x")
    assert "'zeta'" in text and "dict" in text


def test_models_of_a_fixed_batch_and_of_open_sizes_are_measured():
    fixed = keras.Input(batch_shape=(4, 3))
    model = keras.Model(fixed, layers.Dense(3)(fixed))
    x = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
    y = np.argmax(x @ model.layers[-1].kernel.numpy(), -1)
    assert te.accuracy(model, x, y) == 1.0
    open_size = keras.Input((None, None, 3))
    model = keras.Model(open_size, layers.Dense(3)(layers.GlobalAveragePooling2D()(open_size)))
    y = right_by_hand(model, images(8))
    assert te.accuracy(model, images(8), y) == 1.0


def test_stages_print_an_aligned_table(case):
    model, x, y, path = case
    small = convnet()
    kernel = small.get_layer("scores").kernel
    kernel.assign(np.zeros(kernel.shape))
    table = te.stages({"float": model, "pruned": small, "int8": te.to_tflite(model, "int8", x), "file": path}, x, y)
    first, pruned, int8, file = table.stages
    assert (first.accuracy, first.change, first.zeros) == (0.75, 0.0, 0.0) and pruned.accuracy < 0.5
    assert pruned.change == pruned.accuracy - 0.75 and pruned.params == first.params == model.count_params()
    assert pruned.zeros == 80 / model.count_params() and (int8.params, int8.zeros) == (None, None)
    assert first.bytes == 4 * model.count_params() and file.bytes == path.stat().st_size and int8.bytes < file.bytes
    assert table.samples == 60 and table.error == pytest.approx((0.75 * 0.25 / 60) ** 0.5)
    *lines, last = str(table).splitlines()
    assert lines[0].split() == ["stage", "accuracy", "change", "KiB", "params", "zeros"]
    ends = {line.index("%") for line in lines[1:]}
    assert len(ends) == 1 and "75.00 %" in lines[1] and last == "60 samples, standard error 5.59 points"
    assert json.loads(table.to_json())["stages"][0]["name"] == "float"


def test_a_stage_that_fails_is_named(case):
    model, x, y, _ = case
    assert "Stage 'int8': " in message(ValueError, te.stages, {"float": model, "int8": b"no file"}, x, y)
    assert "dict" in message(TypeError, te.stages, [model], x, y)
    with pytest.raises(FileNotFoundError):
        te.stages({"int8": "missing.tflite"}, x, y)
