"""The layers that quantising hurts are found, and none where none stands out."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from test_export_convert import message
from test_export_zoo import attention, images, nested, randomised, recurrent
from test_quantizer import spoiled

pytest.importorskip("ai_edge_quantizer")

import tflite_export as te
from tflite_export.cli import main


def even():
    """Eight layers that all are alike: orthogonal kernels keep the size of what passes."""
    x = inputs = keras.Input((16,))
    for at in range(8):
        x = layers.Dense(16, kernel_initializer=keras.initializers.Orthogonal(seed=at), name=f"layer_{at}")(x)
    return keras.Model(inputs, x)


def twice_spoiled():
    """As `spoiled`, and "third" as well, through another channel that is always 0."""
    model = spoiled()
    bias, kernel = model.get_layer("spoiled").bias.numpy(), model.get_layer("third").kernel.numpy()
    bias[3], kernel[:, :, 3] = -1e5, 500.0
    model.get_layer("spoiled").bias.assign(bias)
    model.get_layer("third").kernel.assign(kernel)
    return model


def normal(count, shape):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


@pytest.mark.parametrize("recipe", ["int8", "int16x8", "dynamic_int8", "weight_only_int8"])
def test_the_layer_that_was_spoiled_is_found(recipe):
    found = te.search_float(spoiled(), images(50), recipe)
    assert found.layers == tuple(found) == ("spoiled",)
    first, second, *_ = found.sensitivity.layers
    assert first.layer == "spoiled" and first.error > 5 * second.error and first.operators == ("CONV_2D",)
    assert found.errors[1] < 0.1 * found.errors[0] and "falls from" in found.reason


def test_two_spoiled_layers_do_not_hide_behind_each_other():
    found = te.search_float(twice_spoiled(), images(50))
    assert set(found) == {"spoiled", "third"}
    assert found.errors[1] > 0.3 and found.errors[2] < 0.05  # keeping one alone helps little


def test_where_no_layer_stands_out_none_is_kept():
    found = te.search_float(even(), normal(50, (16,)))
    assert found.layers == () and "No layer stands out" in found.reason and len(found.sensitivity.layers) == 8
    errors = [each.error for each in found.sensitivity.layers]
    assert max(errors) < 3 * min(errors)


def test_found_layers_are_what_export_takes(tmp_path):
    found = te.search_float(spoiled(), images(50))
    report = te.export(spoiled(), tmp_path / "a.tflite", "int8", images(50), keep_float=found, runs=0)
    assert report.parity.relative_error < 0.05 and "Kept in float32: spoiled." in report.notes


def test_the_tolerance_decides_how_many_are_kept():
    model, data = even(), normal(50, (16,))
    errors = te.search_float(model, data, at_most=8).errors
    assert len(errors) == 9 and errors[8] == 0 < errors[4] < errors[0]
    found = te.search_float(model, data, at_most=8, tolerance=errors[4] * 1.001)
    assert len(found.layers) <= 4 and found.errors[-1] <= errors[4] * 1.001 < found.errors[0]
    assert te.search_float(model, data, tolerance=2 * errors[0]).layers == ()
    missed = te.search_float(model, data, at_most=1, tolerance=errors[0] / 100)
    assert "not reached" in missed.reason and len(missed.layers) <= 1


def test_the_search_gives_the_same_answer_twice():
    model = spoiled()
    one, two = (te.sensitive_layers(model, images(40), measured=8) for _ in range(2))
    assert one == two and one.samples == 8


def test_fused_layers_are_one_row_and_nested_models_their_layers():
    model = attention()
    rows = te.sensitive_layers(model, normal(30, (5, 8))).layers
    names = [each.layer for each in rows]
    assert len(set(names)) == len(names) and any(name.endswith("/attention_output") for name in names)
    assert not any(name == model.layers[2].name for name in names)  # the attention as a whole
    inner = nested()
    [row] = te.sensitive_layers(inner, normal(30, (6,))).layers
    assert row.layer.startswith("inner/dense") and row.operators.count("FULLY_CONNECTED") == 2
    assert te.search_float(inner, normal(30, (6,))).layers == ()  # all of the network is no few layers of it


def test_normalisation_and_activation_are_named_with_their_convolution():
    x = inputs = keras.Input((8, 8, 3))
    for name in ("a", "b"):
        x = layers.Conv2D(4, 3, use_bias=False, name=name)(x)
        x = layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_norm")(x))
    rows = te.sensitive_layers(randomised(keras.Model(inputs, x)), normal(20, (8, 8, 3))).layers
    assert {each.layer: each.fused for each in rows} == {"a": ("a_norm", "a_relu"), "b": ("b_norm", "b_relu")}


def test_results_print_themselves_as_a_table():
    found = te.search_float(spoiled(), images(30))
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "quantised", "alone", "error", "share", "operators"]
    assert lines[1].startswith("spoiled") and "CONV_2D" in lines[1] and "keep_float: spoiled" in lines
    assert json.loads(found.to_json())["layers"] == ["spoiled"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"recipe": "int8", "data": None}, ["needs data"]),
        ({"recipe": "float16"}, ["float16", "int8"]),
        ({"at_most": 0}, ["at_most=0"]),
        ({"tolerance": -1.0}, ["tolerance=-1.0"]),
        ({"recipe": "int4"}, ["int4", "Known"]),
    ],
)
def test_bad_arguments_are_named(options, words):
    text = message(ValueError, te.search_float, spoiled(), **{"data": images(8), **options})
    assert all(word in text for word in words)


def test_loops_and_a_missing_extra_are_refused(monkeypatch):
    assert "unroll=True" in message(ValueError, te.sensitive_layers, recurrent(), normal(8, (5, 3)))
    monkeypatch.setattr("tflite_export.quantizer.installed", lambda: False)
    assert "keras_prune[quantizer]" in message(ImportError, te.sensitive_layers, spoiled(), images(8))


def test_command_line_keeps_layers_that_are_named_or_found(tmp_path, capsys):
    spoiled().save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", images(40))
    start = ["convert", str(tmp_path / "m.keras"), str(tmp_path / "a.tflite"), "--runs", "0", "--json"]
    start += ["--recipe", "int8", "--data", str(tmp_path / "x.npy")]
    assert main(start) == 1  # outside the tolerance
    assert main([*start, "--keep-float", "third", "first"]) == 1
    capsys.readouterr()
    assert main([*start, "--keep-float", "spoil*"]) == 0
    assert "Kept in float32: spoiled." in json.loads(capsys.readouterr().out)["notes"]
    assert main([*start, "--search-float", "2"]) == 0
    captured = capsys.readouterr()
    assert "falls from" in captured.err and "Kept in float32: spoiled." in json.loads(captured.out)["notes"]
    assert main([*start, "--keep-float", "nobody"]) == 2
    assert "'nobody' names no layer" in capsys.readouterr().err
    assert main([*start, "--keep-float", "third", "--search-float", "2"]) == 2
