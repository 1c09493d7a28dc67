"""The command line, as a user types it."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from test_export_zoo import convnet, images, two_in_two_out

import tflite_export as te
from tflite_export.cli import main

ROOT = os.path.dirname(os.path.dirname(te.__file__))
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT}  # a fresh process elsewhere finds the package, installed or not


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with models, data and a .tflite file."""
    folder = tmp_path_factory.mktemp("files")
    convnet().save(folder / "model.keras")
    convnet().save(folder / "model.h5")
    convnet(seed=1).save(folder / "other.keras")
    two_in_two_out().save(folder / "two.keras")
    np.savez(folder / "data.npz", image=images(8))
    np.save(folder / "data.npy", images(8))
    np.savez(folder / "two.npz", alpha=np.ones((4, 4)), zeta=np.eye(4))
    (folder / "a.tflite").write_bytes(te.to_tflite(convnet()))
    (folder / "cut.keras").write_bytes((folder / "model.keras").read_bytes()[:3000])
    (folder / "cut.h5").write_bytes((folder / "model.h5").read_bytes()[:3000])
    (folder / "cut.npz").write_bytes((folder / "data.npz").read_bytes()[:300])
    (folder / "cut.tflite").write_bytes((folder / "a.tflite").read_bytes()[:3000])
    return folder


@pytest.fixture
def run(files, capsys, monkeypatch):
    """Runs a command line inside the folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(files)

    def command(line):
        try:
            code = main(line.split())
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return command


@pytest.mark.parametrize("model", ["model.keras", "model.h5"])
@pytest.mark.parametrize("data", ["data.npz", "data.npy"])
def test_convert_writes_an_int8_file(run, files, model, data):
    code, out, err = run(f"convert {model} small.tflite --recipe int8 --data {data} --runs 2")
    assert code == 0 and "int8" in out and err == ""
    assert te.check(files / "small.tflite", convnet(), images(8)).ok


def test_flags_are_arguments_of_the_same_name(run, files):
    line = "convert model.keras b.tflite --recipe int8 --data data.npz --float-io --batch-size 2 --samples 4 --runs 3 "
    code, out, _ = run(line + "--threads 2 --json")
    report = json.loads(out)
    assert code == 0 and report["inputs"][0]["dtype"] == "float32" and report["inputs"][0]["shape"][0] == 2
    assert report["parity"]["samples"] == 4 and report["latency"]["runs"] == 3 and report["latency"]["threads"] == 2


def test_data_of_several_inputs_goes_by_name(run):
    code, out, _ = run("convert two.keras two.tflite --data two.npz --json --runs 0")
    assert code == 0 and json.loads(out)["parity"]["samples"] == 4


def test_convert_says_with_its_exit_code_that_parity_is_lost(run, files):
    np.save(files / "wrong.npy", 1e-3 * images(8))
    te.RECIPES["strict"] = te.Recipe(
        "strict", "", 1e-9, op_set="TFLITE_BUILTINS_INT8", io_dtype="int8", needs_data=True
    )
    try:
        code, out, _ = run("convert model.keras c.tflite --recipe strict --data data.npz --runs 0")
    finally:
        del te.RECIPES["strict"]
    assert code == 1 and "OUTSIDE" in out


def test_check_succeeds_and_fails(run):
    code, out, err = run("check a.tflite")
    assert code == 0 and "CONV_2D" in out and out.endswith("ok\n") and err == ""
    assert run("check a.tflite --model model.keras --data data.npz")[0] == 0
    code, out, _ = run("check a.tflite --model other.keras --json")
    assert code == 1 and "exceeds" in json.loads(out)["problems"][0]
    assert run("check a.tflite --model other.keras --tolerance 100")[0] == 0
    code, out, _ = run("check a.tflite --model two.keras")
    assert code == 1 and "not the same model" in out
    code, out, _ = run("check cut.tflite")
    assert code == 1 and "cut off" in out


def test_bench_times_one_file_or_two(run):
    code, out, _ = run("bench a.tflite --runs 4 --json")
    assert code == 0 and json.loads(out)["runs"] == 4
    code, out, _ = run("bench a.tflite a.tflite --runs 4 --json")
    assert code == 0 and json.loads(out)["rounds"] == 4
    assert "ratio b / a" in run("bench a.tflite a.tflite --runs 4")[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("convert none.keras x.tflite", "no file"),
        ("convert a.tflite x.tflite", ".keras or .h5"),
        ("convert cut.keras x.tflite", "cut off"),
        ("convert cut.h5 x.tflite", "cut off"),
        ("convert model.keras x.tflite --recipe int8", "needs data"),
        ("convert model.keras x.tflite --recipe int4", "int16x8"),
        ("convert model.keras x.tflite --data cut.npz", "cut.npz"),
        ("convert model.keras x.tflite --data none.npz", "none.npz"),
        ("convert model.keras x.tflite --data two.npz", "'image'"),
        ("convert model.keras missing/x.tflite", "does not exist"),
        ("convert model.keras x.tflite --input-shape 12,a", "12,a"),
        ("convert model.keras x.tflite --input-shape 13,12,3", "13"),
        ("check none.tflite", "none.tflite"),
        ("check a.tflite --data data.npz", "--model"),
        ("bench cut.tflite", "cut off"),
        ("bench a.tflite --runs 0", "runs=0"),
        ("bench", "required"),
        ("", "required"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(run, files, line, words):
    code, out, err = run(line)
    assert code == 2 and words in err and out == ""
    assert len([each for each in err.splitlines() if "usage" not in each and not each.startswith(" ")]) == 1
    assert not (files / "x.tflite").exists()


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_code_in_a_file_is_not_run_unless_unsafe(run, files, ending):
    inputs = keras.Input((3,))
    keras.Model(inputs, layers.Lambda(lambda x: x * 2.0)(inputs)).save(files / f"lambda{ending}")
    code, _, err = run(f"convert lambda{ending} x.tflite")
    assert code == 2 and "--unsafe" in err and not (files / "x.tflite").exists()
    assert run(f"convert lambda{ending} doubled.tflite --unsafe --runs 0")[0] == 0
    assert te.Runner(files / "doubled.tflite").run([np.array([[1.0, 2.0, 3.0]])])[0].tolist() == [[2.0, 4.0, 6.0]]


def test_a_layer_the_command_does_not_know_is_named(run, files):
    @keras.saving.register_keras_serializable("test_export_cli")
    class Mine(layers.Layer):
        def call(self, x):
            return x

    inputs = keras.Input((3,))
    keras.Model(inputs, Mine()(inputs)).save(files / "mine.keras")
    keras.saving.get_custom_objects().pop("test_export_cli>Mine")
    code, _, err = run("convert mine.keras x.tflite")
    assert code == 2 and "Mine" in err and "tflite_export.export" in err


@pytest.mark.parametrize("command", ["", "convert", "check", "bench"])
def test_help_has_an_example(run, command):
    code, out, _ = run(f"{command} --help")
    assert code == 0 and f"Example:\n  tflite-export {command}" in out


def test_a_fresh_process_keeps_stderr_clean_and_does_without_tensorflow(files):
    code = (
        "import sys; from tflite_export.cli import main; code = main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    for line in (["check", "a.tflite"], ["bench", "a.tflite", "--runs", "2"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *line], cwd=files, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == ""
    line = ["-m", "tflite_export.cli", "convert", "model.keras", "fresh.tflite", "--json", "--runs", "1"]
    done = subprocess.run([sys.executable, *line], cwd=files, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["recipe"] == "float32" and done.stderr == ""
