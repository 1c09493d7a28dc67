"""What every device answers, whatever it is: one contract, run over the registry. The CPU. `export` and the command."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

from test_export_zoo import convnet, images, randomised

import tflite_export as te
from tflite_export import devices
from tflite_export.cli import main


@functools.cache
def file(name):
    """The bytes of a small .tflite file."""
    if name == "cut":
        return file("int8")[:3000]
    if name == "noise":
        return file("int8")[:8] + bytes(np.random.default_rng(0).integers(0, 256, 4000, "uint8"))
    if name == "other":
        return b"PK" + bytes(500)
    if name in ("gelu", "sin"):
        return te.to_tflite(stack(getattr(keras.ops, name)), "int8", images(16))
    recipe, _, more = name.partition(" ")
    options = {"": {}, "wide": {}, "batch 2": {"batch_size": 2}, "float io": {"float_io": True}}[more]
    return te.to_tflite(convnet(width=32 if more == "wide" else 8), recipe, images(16), **options)


def stack(function):
    """Convolutions with a function of one's own between them."""
    image = keras.Input((12, 12, 3), name="image")
    x = function(layers.Conv2D(8, 3)(image))
    return randomised(keras.Model(image, layers.Conv2D(4, 3, strides=2, name="scores")(x)))


def device(name):
    """A device whose tool is installed; else the test is skipped, after a look at what a user would read."""
    try:
        devices.get(name).examine(file("int8"))
    except ImportError as error:
        assert "pip install" in str(error) and len(str(error).splitlines()) == 1
        pytest.skip(str(error))
    return devices.get(name)


@pytest.fixture
def nothing_is_left(tmp_path, monkeypatch):
    """The temporary folder is empty after the test as it was before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", devices.DEVICES)
def test_a_fit_says_everything_or_why_not(name, nothing_is_left, capfd):
    target, contents = device(name), [file("int8"), file("float32"), file("gelu")]
    capfd.readouterr()  # what TensorFlow said when it made the files
    for content in contents:
        fit = target.examine(content)
        assert fit.device == target.name == name and fit.runs == (not fit.problems)
        assert (fit.latency_ms is None) == (fit.latency_by == "")
        assert fit.latency_ms is None or (fit.latency_ms > 0 and fit.latency_by.startswith(("measured: ", "estimated")))
        assert all(each.count > 0 and each.operator and each.reason for each in fit.fallbacks)
        assert all(text.endswith(".") for text in fit.problems + fit.notes)
        fields = json.loads(fit.to_json())
        assert set(fields) == {field.name for field in dataclasses.fields(devices.Fit)}
        assert str(fit).splitlines()[0].split() == ["device", name]
        assert all(text in str(fit) for text in fit.problems)
    assert target.examine(file("int8")).runs and target.summary and name.split("-")[0] in target.identity()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", devices.DEVICES)
@pytest.mark.parametrize("broken, word", [("cut", "damaged or cut off"), ("noise", "damaged"), ("other", "TFL3")])
def test_a_broken_file_is_a_clear_error_before_any_tool_sees_it(name, broken, word, nothing_is_left):
    for act in ("examine", "compile"):
        if act == "compile" and not name.startswith(("ethos", "npu")):
            continue
        with pytest.raises(ValueError, match=word):
            getattr(devices.get(name), act)(file(broken))
    with pytest.raises(FileNotFoundError):
        devices.get(name).examine("no such file.tflite")


def with_open_sizes():
    """An int8 file whose image sizes are left open, as other exporters write it."""
    import tensorflow as tf

    model = randomised(keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3, name="y")]))
    spec = tf.TensorSpec((1, None, None, 3), "float32")
    function = tf.function(lambda x: model(x, training=False)).get_concrete_function(spec)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images(4))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def test_sizes_left_open_are_a_problem_or_leave_the_operator_to_the_cpu():
    content = with_open_sizes()
    for name in ("cpu", "micro", "edgetpu"):
        fit = device(name).examine(content)
        assert not fit.runs and "open" in fit.problems[0]
    fit = device("ethos-u55-128").examine(content)
    assert not fit.runs or any("dynamic" in each.reason for each in fit.fallbacks)


@pytest.mark.parametrize("name", devices.DEVICES)
def test_a_device_times_files_and_compiles_them_or_says_that_it_does_not(name, nothing_is_left):
    target = device(name)
    small, wide = file("int8"), file("int8 wide")
    if target.examine(small).latency_ms is None:
        with pytest.raises(ValueError, match="knows no latency"):
            target.milliseconds([small])
    else:
        times = target.milliseconds([small, wide, small])
        assert 1.5 * times[0] < times[1] and times[2] == pytest.approx(times[0], rel=0.4)
        assert target.milliseconds([]) == []
    try:
        compiled = target.compile(small)
    except ValueError as error:
        assert "compiler" in str(error) and name in str(error)
    else:
        assert te.Runner(compiled).operators != te.Runner(small).operators


def test_devices_are_found_by_name_and_passed_through():
    mine = devices.Micro(arena_bytes=10_000)
    assert devices.get(mine) is mine and devices.get("cpu").name == "cpu"
    with pytest.raises(ValueError, match=r"'phone' is not known. Known: cpu, .*ethos-u85-2048.*npu-intel"):
        devices.get("phone")
    with pytest.raises(TypeError, match="expected a name"):
        devices.get(3)
    assert te.DEVICES is devices.DEVICES and te.Fit is devices.Fit


def test_a_device_of_ones_own_needs_two_methods(tmp_path):
    class Board(devices.Device):
        name, summary = "board", "32 KiB of flash."

        def identity(self):
            return "board"

        def examine(self, model):
            problems = () if len(model) < 7000 else ("The file is too large.",)
            return devices.Fit("board", not problems, problems, (), None, "", None, len(model), (), {})

    assert te.export(convnet(), tmp_path / "a.tflite", "int8", images(8), runs=0, device=Board()).device.runs
    with pytest.raises(ValueError, match="board cannot run it. The file is too large."):
        te.export(convnet(), tmp_path / "b.tflite", runs=0, device=Board())
    with pytest.raises(ValueError, match="'board' knows no latency"):
        Board().milliseconds([b""])
    with pytest.raises(ValueError, match="no compiler for the device 'board'"):
        Board().compile(b"")
    with pytest.raises(TypeError, match="abstract"):
        devices.Device()


def test_the_identity_tells_timings_apart():
    pytest.importorskip("ethosu.vela")
    targets = [
        devices.Cpu(),
        devices.Cpu(threads=2),
        devices.Ethos("ethos-u55-128"),
        devices.Ethos("ethos-u55-256"),
        devices.Ethos("ethos-u55-128", memory_mode="Sram_Only"),
        devices.Ethos("ethos-u55-128", system_config="Ethos_U55_Deep_Embedded"),
    ]
    assert len({target.identity() for target in targets}) == len(targets)
    assert devices.Cpu().identity() == devices.Cpu().identity() and "ai-edge-litert 2" in devices.Cpu().identity()


def test_cpu_measures_as_latency_does():
    fit = devices.Cpu(runs=30).examine(file("int8 wide"))
    assert fit.latency_ms == pytest.approx(te.measure_latency(file("int8 wide"), runs=200).median, rel=0.7)
    assert "30 runs, 1 thread" in fit.latency_by and fit.flash_bytes == len(file("int8 wide"))
    [quick] = devices.Cpu().milliseconds([file("int8 wide")])
    assert 0.2 * fit.latency_ms < quick < 1.5 * fit.latency_ms


def test_cpu_shares_the_rounds_among_groups_of_files(monkeypatch):
    files = [file("int8"), file("int8 wide"), file("float32")]
    together = devices.Cpu(rounds=3, block_ms=1).milliseconds(files)
    monkeypatch.setattr("tflite_export.devices.cpu._AT_ONCE", 1)  # each file alone
    alone = devices.Cpu(rounds=3, block_ms=1).milliseconds(files)
    assert alone == pytest.approx(together, rel=0.5)


def test_cpu_does_not_run_flex_operators():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.ops.fft((inputs, inputs))[0])
    fit = devices.Cpu().examine(te.to_tflite(model, allow_flex=True))
    assert not fit.runs and "Flex" in fit.problems[0] and fit.latency_ms is None


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"runs": 0}, {"rounds": 0}, {"block_ms": 0}])
def test_cpu_checks_its_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        devices.Cpu(**arguments)


@pytest.mark.parametrize("sdk", [None, "/no/such/folder", RuntimeError("no folder")])
def test_an_empty_vendor_package_is_found_out(sdk, monkeypatch):
    class Stub:
        def path_to_sdk_libs(self, *_):
            if isinstance(sdk, Exception):
                raise sdk
            return sdk

    for name, vendor in (("npu-qualcomm", "qualcomm"), ("npu-mediatek", "mediatek")):
        monkeypatch.setitem(sys.modules, f"ai_edge_litert_sdk_{vendor}", Stub())
        with pytest.raises(ImportError, match="installed but empty"):
            devices.get(name).examine(file("int8"))


def test_a_vendor_compiler_that_fails_is_quoted_and_leaves_nothing(nothing_is_left, monkeypatch, tmp_path_factory):
    class Stub:
        def path_to_sdk_libs(self):
            return tmp_path_factory.mktemp("sdk")  # a folder without the compiler's libraries

    monkeypatch.setitem(sys.modules, "ai_edge_litert_sdk_qualcomm", Stub())
    fit = devices.Npu("qualcomm").examine(file("int8"))
    assert not fit.runs and "libQnnHtp.so" in fit.problems[0]
    assert "SM8650" in devices.Npu("qualcomm", chip="SM1").examine(file("int8")).problems[0]


def test_export_reports_the_device_and_writes_no_file_that_it_cannot_run(tmp_path):
    path = tmp_path / "a.tflite"
    report = te.export(convnet(), path, "int8", images(16), runs=0, device="edgetpu")
    assert report.device.runs and "edgetpu" in str(report) and json.loads(report.to_json())["device"]["runs"] is True
    assert te.export(convnet(), path, runs=0).device is None
    before = path.read_bytes()
    with pytest.raises(ValueError, match="was not written: edgetpu cannot run it. The file computes in FLOAT32.*int8"):
        te.export(convnet(), path, runs=0, device="edgetpu")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="'phone' is not known"):
        te.export(convnet(), tmp_path / "b.tflite", device="phone")


def test_export_takes_a_device_object(tmp_path):
    pytest.importorskip("tflite_micro")
    with pytest.raises(ValueError, match="arena_bytes=1000"):
        te.export(convnet(), tmp_path / "a.tflite", "int8", images(16), device=devices.Micro(arena_bytes=1000))
    assert list(tmp_path.iterdir()) == []


def test_check_takes_what_the_device_lacks_as_a_problem(tmp_path):
    path = tmp_path / "a.tflite"
    path.write_bytes(file("float32"))
    result = te.check(path, device="edgetpu")
    assert not result.ok and result.problems[0].startswith("edgetpu: ") and not result.device.runs
    assert te.check(path).ok and te.check(path).device is None
    assert te.check(path, device="cpu").ok


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a command line in a folder with a few files; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("int8", "float32", "cut"):
        (tmp_path / f"{name}.tflite").write_bytes(file(name))

    def command(line):
        try:
            code = main(line.split())
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_compile_writes_the_compiled_file_and_prints_the_fit(run, tmp_path):
    pytest.importorskip("ethosu.vela")
    code, out, err = run("compile int8.tflite --device ethos-u55-128 --out small_vela.tflite")
    assert (code, err) == (0, "") and "estimated by ethos-u-vela" in out and "small_vela.tflite" in out
    assert te.Runner(tmp_path / "small_vela.tflite").operators == {"CUSTOM:ethos-u": 1}
    code, out, _ = run("compile int8.tflite --device ethos-u55-128 --memory-mode Sram_Only --json")
    assert code == 0 and "Sram_Only" in json.loads(out)["latency_by"]
    assert (tmp_path / "int8_ethos-u55-128.tflite").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("compile float32.tflite --device ethos-u55-128", "recipe='int8'"),
        ("compile cut.tflite --device ethos-u55-128", "cut.tflite is damaged"),
        ("compile none.tflite --device ethos-u55-128", "none.tflite"),
        ("compile int8.tflite --device ethos-u55-128 --out x.bin", ".tflite"),
        ("compile int8.tflite --device ethos-u55-128 --out no/x.tflite", "does not exist"),
        ("compile int8.tflite --device ethos-u55-128 --memory-mode Nope", "Shared_Sram"),
        ("compile int8.tflite --device ethos-u55-128 --arena-bytes 9", "--arena-bytes"),
        ("compile int8.tflite --device micro", "needs no compiler"),
        ("compile int8.tflite --device cpu", "needs no compiler"),
        ("compile int8.tflite --device edgetpu", "edgetpu_compiler"),
        ("compile int8.tflite --device phone", "ethos-u85-2048"),
        ("compile int8.tflite", "required"),
        ("check int8.tflite --memory-mode Sram_Only", "--memory-mode"),
        ("check int8.tflite --device cpu --system-config A", "--system-config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(run, tmp_path, line, words):
    if "ethos" in line:
        pytest.importorskip("ethosu.vela")
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(line)
    assert code == 2 and words in err and out == "" and sorted(os.listdir(tmp_path)) == before
    assert len([each for each in err.splitlines() if "usage" not in each and not each.startswith(" ")]) == 1


def test_a_failed_compile_keeps_the_older_file(run, tmp_path):
    pytest.importorskip("ethosu.vela")
    (tmp_path / "out.tflite").write_bytes(b"the old one")
    assert run("compile float32.tflite --device ethos-u55-128 --out out.tflite")[0] == 2
    assert (tmp_path / "out.tflite").read_bytes() == b"the old one"


def test_check_and_convert_take_a_device(run, tmp_path):
    assert run("check int8.tflite --device edgetpu")[0] == 0
    code, out, _ = run("check float32.tflite --device edgetpu --json")
    assert code == 1 and "edgetpu" in json.loads(out)["problems"][0]
    convnet().save(tmp_path / "model.keras")
    np.save(tmp_path / "data.npy", images(8))
    line = "convert model.keras new.tflite --recipe int8 --data data.npy --runs 0 --json --device "
    code, out, _ = run(line + "edgetpu")
    assert code == 0 and json.loads(out)["device"]["device"] == "edgetpu"
    code, _, err = run("convert model.keras float.tflite --runs 0 --device edgetpu")
    assert code == 2 and "cannot run it" in err and not (tmp_path / "float.tflite").exists()


def test_compile_help_has_an_example(run):
    code, out, _ = run("compile --help")
    assert code == 0 and "Example:\n  tflite-export compile" in out


def test_a_tool_that_is_not_installed_is_one_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ethosu", None)
    monkeypatch.setitem(sys.modules, "ethosu.vela", None)
    monkeypatch.setitem(sys.modules, "ethosu.vela.vela", None)
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    for name, extra in (("ethos-u55-128", "vela"), ("micro", "micro")):
        code, out, err = run(f"check int8.tflite --device {name}")
        assert code == 2 and out == "" and f"keras_prune[{extra}]" in err


def test_devices_load_neither_tensorflow_nor_the_tools_until_they_are_asked():
    code = (
        "import sys; from tflite_export import devices; [make() for make in devices.DEVICES.values()]; "
        "sys.exit(bool({'tensorflow', 'keras', 'ethosu', 'tflite_micro', 'ai_edge_litert'} & set(sys.modules)))"
    )
    root = os.path.dirname(os.path.dirname(te.__file__))
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
