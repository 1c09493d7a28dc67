"""Parity: worked out by hand, against other exporters' files, and large where it must be."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_export_zoo import convnet, images, two_in_two_out

import tflite_export as te
from tflite_export.parity import difference


def test_differences_are_as_worked_out_by_hand():
    expected = np.array([[1.0, 2.0, -4.0], [0.0, 1.0, 2.0]])
    got = np.array([[1.0, 2.5, -4.0], [3.0, 1.0, 2.0]])
    found = difference("a", expected, got, te.Port("a", (1, 3), "int8", 0.5, 0))
    assert (found.max_error, found.mean_error, found.peak) == (3.0, 3.5 / 6, 4.0)
    assert (found.max_steps, found.mean_steps, found.top1_agreement) == (6.0, 7 / 6, 0.5)
    assert found.relative_error == (3.0 - 0.25) / 4  # half a step is taken off
    assert difference("a", expected, got, te.Port("a", (1, 3), "float32")).relative_error == 3.0 / 4


def test_a_file_that_computes_nan_is_infinitely_wrong():
    expected, port = np.ones((2, 3)), te.Port("a", (1, 3), "float32")
    found = difference("a", expected, np.full((2, 3), np.nan), port)
    assert found.relative_error == float("inf") and '"max_error": null' in found.to_json()
    assert difference("a", np.zeros((2, 3)), np.zeros((2, 3)), port).relative_error == 0.0


def test_another_model_is_far_away():
    content = te.to_tflite(convnet(seed=0))
    assert te.compare(convnet(seed=0), content).relative_error < 1e-5
    assert te.compare(convnet(seed=1), content).relative_error > 0.1


def test_keras_own_export_is_matched_though_it_reorders(tmp_path):
    model = two_in_two_out()
    path = str(tmp_path / "keras.tflite")
    model.export(path, format="litert", verbose=False)
    assert [port.name for port in te.Runner(path).outputs] == ["output_1", "output_0"]  # the trap is still there
    assert te.compare(model, path).relative_error < 1e-6
    assert te.check(path, model).ok


def test_a_file_without_signature_is_matched_by_shape():
    inputs = keras.Input((4,), name="a")
    model = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(3)(inputs)])

    def swapped(x):
        return tuple(reversed(model(x, training=False)))

    function = tf.function(swapped).get_concrete_function(tf.TensorSpec((1, 4), name="other"))
    content = tf.lite.TFLiteConverter.from_concrete_functions([function]).convert()
    parity = te.compare(model, content)
    assert parity.relative_error < 1e-6 and parity.matched_by == "shape"


def test_a_file_with_open_sizes_is_compared_at_the_size_given(tmp_path):
    x = inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(x)))
    path = str(tmp_path / "open.tflite")
    model.export(path, format="litert", verbose=False)
    assert te.compare(model, path, input_shape=(9, 8, 3)).relative_error < 1e-5
    assert "open" in te.check(path).problems[0]
    with pytest.raises(ValueError, match="open"):
        te.measure_latency(path)


def test_int8_calibrated_on_wrong_data_is_worse():
    model, data = convnet(), images(64)
    right = te.compare(model, te.to_tflite(model, "int8", data), data)
    wide = te.compare(model, te.to_tflite(model, "int8", 100 * data), data)
    narrow = te.compare(model, te.to_tflite(model, "int8", 0.01 * data), data)
    assert right.relative_error < te.RECIPES["int8"].tolerance
    assert wide.outputs[0].mean_error > 5 * right.outputs[0].mean_error
    assert narrow.outputs[0].mean_error > 5 * right.outputs[0].mean_error


def test_int16x8_is_nearer_than_int8():
    model, data = convnet(), images(32)
    error = {name: te.compare(model, te.to_tflite(model, name, data), data) for name in ("int8", "int16x8")}
    assert error["int16x8"].outputs[0].mean_error < error["int8"].outputs[0].mean_error


def test_a_model_with_other_inputs_or_outputs_is_refused():
    content = te.to_tflite(convnet())
    with pytest.raises(ValueError, match="not the same model"):
        te.compare(two_in_two_out(), content)
    inputs = keras.Input((12, 12, 3), name="image")
    with pytest.raises(ValueError, match="not the same model"):
        te.compare(keras.Model(inputs, layers.GlobalAveragePooling2D(name="scores")(inputs)), content)
