"""The report, the check and the file on disk."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from test_export_zoo import convnet, images

import tflite_export as te


def test_report_states_what_is_in_the_file(tmp_path):
    path = tmp_path / "a.tflite"
    report = te.export(convnet(), path, "int8", images(20), runs=5)
    assert report.path == str(path) and report.bytes == path.stat().st_size
    assert report.operators == te.Runner(path).operators and report.inputs == te.Runner(path).inputs
    assert (report.parity.samples, report.parity.inputs) == (20, "given")
    assert report.parity.outputs[0].max_steps == report.parity.outputs[0].max_error / report.outputs[0].scale
    assert report.latency.runs == 5 and "20 samples" in report.notes[0]
    text, fields = str(report), json.loads(report.to_json())
    assert all(
        word in text for word in ("CONV_2D 2", "int8[1 x 12 x 12 x 3]", "top-1", "median", "KiB", str(report.bytes))
    )
    assert set(fields) == {field.name for field in dataclasses.fields(report)}
    assert fields["parity"]["outputs"][0]["name"] == "scores" and fields["versions"]["keras"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.bytes = 0


def test_generated_inputs_are_called_generated(tmp_path):
    report = te.export(convnet(), tmp_path / "a.tflite", runs=0)
    assert (report.parity.samples, report.parity.inputs, report.latency) == (64, "generated", None)


@pytest.mark.parametrize(
    "path, error, word",
    [
        ("missing/a.tflite", FileNotFoundError, "does not exist"),
        ("a.keras", ValueError, ".tflite"),
        ("folder.tflite", IsADirectoryError, "is a folder"),
        ("file/a.tflite", FileNotFoundError, "does not exist"),
        ("x" * 300 + ".tflite", OSError, "written"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_conversion(path, error, word, tmp_path, monkeypatch):
    (tmp_path / "folder.tflite").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tflite_export.exporter.converted", lambda *_, **__: pytest.fail("was converted"))
    with pytest.raises(error, match=word):
        te.export(convnet(), tmp_path / path)


@pytest.mark.parametrize("stage", ["converted", "compare", "measure_latency"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(stage, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error("stop")

    path = tmp_path / "a.tflite"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(f"tflite_export.exporter.{stage}", fail)
    with pytest.raises(error):
        te.export(convnet(), path)
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "a.tflite"
    path.write_bytes(b"the old one")
    te.export(convnet(), path, runs=0)
    assert te.check(path, convnet()).ok and list(tmp_path.iterdir()) == [path]


def test_check_finds_a_file_of_another_model(tmp_path):
    path = tmp_path / "a.tflite"
    te.export(convnet(), path, runs=0)
    result = te.check(path, convnet(seed=1))
    assert not result.ok and "exceeds" in result.problems[0] and "problem:" in str(result)
    assert te.check(path, convnet(seed=1), tolerance=100.0).ok
    good = te.check(path, convnet())
    assert good.ok and (good.recipe, good.quantised, good.flex, good.custom) == ("float32", "none", (), ())
    assert str(good).endswith("ok") and json.loads(good.to_json())["parity"]["samples"] == 64


def test_check_tells_quantised_inputs_from_outputs(tmp_path):
    te.export(convnet(), tmp_path / "a.tflite", "int8", images(8), runs=0)
    assert te.check(tmp_path / "a.tflite").quantised == "inputs and outputs"
    te.export(convnet(), tmp_path / "a.tflite", "int8", images(8), runs=0, float_io=True)
    assert te.check(tmp_path / "a.tflite").quantised == "none"


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_tolerance_is_a_number_from_zero(tolerance, tmp_path):
    with pytest.raises(ValueError, match="tolerance="):
        te.check(tmp_path / "a.tflite", tolerance=tolerance)


def test_importing_loads_neither_tensorflow_nor_keras_and_changes_no_environment():
    code = """if True:
        import os, sys, logging
        environment, handlers = dict(os.environ), list(logging.root.handlers)
        import tflite_export
        tflite_export.RECIPES, tflite_export.Runner, tflite_export.benchmark, tflite_export.export, tflite_export.check
        from tflite_export import cli
        heavy = {"tensorflow", "keras", "jax", "torch", "ai_edge_litert"} & set(sys.modules)
        assert not heavy, heavy
        assert dict(os.environ) == environment and logging.root.handlers == handlers
    """
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(te.__file__))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0


def test_public_names_exist_and_unknown_ones_are_named():
    assert all(getattr(te, name) for name in te.__all__) and set(te.__all__) <= set(dir(te))
    with pytest.raises(AttributeError, match="exprot.*export"):
        te.exprot  # noqa: B018


def with_zeros(fraction):
    model = convnet(width=64)
    for weight in model.weights:
        if len(weight.shape) > 1:
            values = weight.numpy()
            weight.assign(np.where(np.abs(values) <= np.quantile(np.abs(values), fraction), 0, values))
    return model


@pytest.mark.parametrize("recipe", ["float32", "float16"])
def test_zeros_are_stored_encoded_where_that_is_smaller(recipe, tmp_path):
    model = with_zeros(0.9)
    dense = te.export(model, tmp_path / "a.tflite", recipe, runs=0)
    report = te.export(model, tmp_path / "a.tflite", recipe, sparse=True, runs=3)
    assert report.bytes < 0.4 * dense.bytes and "DENSIFY" in report.operators and report.within_tolerance
    assert f"{report.bytes} bytes, {dense.bytes} without it" in report.notes[0]
    assert re.search(r"the time is \d\.\d\d of the dense file's \d", report.notes[0])
    again = te.export(model, tmp_path / "a.tflite", recipe, sparse=True, runs=0)
    assert "no gain in speed" in again.notes[0] and again.bytes == report.bytes
    assert (tmp_path / "a.tflite").read_bytes() == te.to_tflite(model, recipe, sparse=True)


def test_a_network_without_zeros_stays_dense(tmp_path):
    report = te.export(with_zeros(0), tmp_path / "a.tflite", sparse=True, runs=0)
    assert "stored dense" in report.notes[0] and "DENSIFY" not in report.operators


@pytest.mark.parametrize("recipe", ["int8", "weight_only_int8"])
def test_encoded_int8_weights_are_refused_since_they_do_not_run(recipe, tmp_path):
    if recipe == "weight_only_int8":
        pytest.importorskip("ai_edge_quantizer")
    with pytest.raises(ValueError, match=f"sparse=True was passed with recipe='{recipe}'.*float32"):
        te.export(with_zeros(0.9), tmp_path / "a.tflite", recipe, images(8), sparse=True)
    assert not list(tmp_path.iterdir())
