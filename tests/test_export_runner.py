"""Files in, numbers out: signatures, quantised numbers, damaged files."""

import sys

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from test_export_zoo import convnet, images, two_in_two_out

import tflite_export as te
from tflite_export import flatbuffer


def test_inputs_and_outputs_carry_the_names_of_the_model():
    runner = te.Runner(te.to_tflite(two_in_two_out()))
    arrays = {"zeta": np.full((3, 4), 5.0), "alpha": np.full((3, 4), 2.0)}
    outputs = runner.run([arrays[port.name] for port in runner.inputs])
    named = {port.name: values for port, values in zip(runner.outputs, outputs, strict=True)}
    assert (named["y"] == 3).all() and (named["x"] == 6).all() and named["x"].shape == (3, 4)


def test_quantised_numbers_are_stored_and_read_back_within_half_a_step():
    port = te.Port("a", (1, 4), "int8", 0.5, 3)
    values = np.array([-70.0, 0.0, 1.2, 62.0, 99.0])
    assert port.store(values).tolist() == [-128, 3, 5, 127, 127]  # worked out by hand; the ends are clipped
    assert port.real(port.store(values)).tolist() == [-65.5, 0.0, 1.0, 62.0, 62.0]
    plain = te.Port("a", (1, 4), "float32")
    assert np.array_equal(plain.real(plain.store(values)), values.astype("float32"))


def test_operators_are_those_of_the_runtime_itself():
    runner = te.Runner(te.to_tflite(convnet(), "int8", images(8)))
    runner.set(runner.random_inputs())
    names = [item["op_name"] for item in runner.interpreter._get_ops_details() if item["op_name"] != "DELEGATE"]
    assert runner.operators == {name: names.count(name) for name in set(names)}


def test_signing_moves_no_weight_against_another():
    signed = te.to_tflite(convnet())
    inner = signed[signed.index(flatbuffer.IDENTIFIER, 8) - 4 :]  # the converter's own file, still whole inside
    assert not flatbuffer.signature(inner)[0] and flatbuffer.signature(signed)[0].keys() == {"image"}
    places = []
    for content in (inner, signed):
        model = schema.Model.GetRootAs(content, 0)
        tables = [model.Buffers(at)._tab for at in range(model.BuffersLength())]
        places.append(np.array([table.Vector(table.Offset(4)) for table in tables if table.Offset(4)]))
    assert len(places[0]) > 5 and set(places[1] - places[0]) == {len(signed) - len(inner)}
    assert (len(signed) - len(inner)) % 64 == 0
    lengths = {len(flatbuffer.sign(inner, ["image"], ["scores"], "x" * count)) % 64 for count in range(0, 64, 4)}
    assert lengths == {len(inner) % 64}
    x = [images(3)]
    assert np.array_equal(te.Runner(inner).run(x)[0], te.Runner(signed).run(x)[0])


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_file_cut_off_anywhere_is_refused(kept, tmp_path):
    content = te.to_tflite(convnet(), "float16")
    (tmp_path / "cut.tflite").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut.tflite"):
        te.Runner(tmp_path / "cut.tflite")
    assert not te.check(tmp_path / "cut.tflite").ok
    te.Runner(content)  # the whole one loads


@pytest.mark.parametrize("content", [b"", b"TFL3", b"hello", b"\x1c\0\0\0TFL3" + b"\xff" * 200, b"\0" * 100])
def test_other_files_are_refused(content):
    with pytest.raises(ValueError, match=r"\.tflite file"):
        te.Runner(content)


def test_weights_outside_the_flatbuffer_that_are_cut_off_are_noticed(monkeypatch):
    content = te.to_tflite(convnet())
    assert flatbuffer.missing_bytes(content) == 0
    monkeypatch.setattr(schema.Buffer, "Offset", lambda self: len(content) - 10)
    monkeypatch.setattr(schema.Buffer, "Size", lambda self: 30)
    assert flatbuffer.missing_bytes(content) == 20
    with pytest.raises(ValueError, match="20 bytes of weights"):
        te.Runner(content)


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        te.Runner(tmp_path / "none.tflite")
    with pytest.raises(TypeError, match="path"):
        te.Runner(3)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_is_a_whole_number_from_one(threads):
    with pytest.raises(ValueError, match="threads="):
        te.Runner(te.to_tflite(two_in_two_out()), threads)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ([np.ones((2, 4))], "2 inputs"),
        ([np.ones((2, 4)), np.ones((3, 4))], "same number of samples"),
        ([np.ones((2, 5)), np.ones((2, 4))], r"expected \(samples, 4\)"),
        ([np.ones((0, 4)), np.ones((0, 4))], "at least one"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, words):
    with pytest.raises(ValueError, match=words):
        te.Runner(te.to_tflite(two_in_two_out())).run(arrays)


def test_without_litert_tensorflows_interpreter_is_used_with_one_notice(monkeypatch):
    content, x = te.to_tflite(convnet()), [images(3)]
    expected = te.Runner(content).run(x)[0]
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="pip install ai-edge-litert") as notices:
        runner = te.Runner(content)
    assert len(notices) == 1 and runner.runtime == f"tensorflow {tf.__version__}"
    assert np.allclose(runner.run(x)[0], expected, rtol=1e-5) and runner.operators["CONV_2D"] == 2
