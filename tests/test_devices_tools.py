"""Vela, LiteRT for Microcontrollers and the Edge TPU's rules: is what they say passed on rightly?"""

import csv
import glob
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

from test_devices import file
from test_export_zoo import randomised

import tflite_export as te
from tflite_export import devices, flatbuffer
from tflite_export.devices import micro
from tflite_export.devices.graph import external_buffers, steps


def converted(model, recipe="int8"):
    random = np.random.default_rng(0)
    data = [random.normal(size=(16, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return te.to_tflite(randomised(model), recipe, data)


def one_convolution(channels):
    image = keras.Input((28, 28, channels))
    return converted(keras.Model(image, layers.Conv2D(channels, 3, padding="same", name="y")(image)))


@pytest.fixture
def vela():
    return pytest.importorskip("ethosu.vela.vela")


def test_vela_gives_the_numbers_of_its_own_command(vela, tmp_path):
    (tmp_path / "net.tflite").write_bytes(file("int8 wide"))
    command = "import sys; from ethosu.vela.vela import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["net.tflite", "--accelerator-config", "ethos-u65-256", "--output-dir", "out"]
    subprocess.run([sys.executable, "-c", command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    with open(glob.glob(f"{tmp_path}/out/*summary*.csv")[0], newline="") as table:
        expected = next(csv.DictReader(table))
    fit = devices.get("ethos-u65-256").examine(file("int8 wide"))
    assert fit.latency_ms == pytest.approx(1000 * float(expected["inference_time"]))
    assert fit.sram_bytes == 1024 * float(expected["sram_memory_used"])
    assert f"{round(1024 * float(expected['dram_memory_used']))} bytes of DRAM" in fit.notes[0]
    assert fit.flash_bytes == os.path.getsize(tmp_path / "out" / "net_vela.tflite")
    assert devices.get("ethos-u65-256").compile(file("int8 wide")) == (tmp_path / "out/net_vela.tflite").read_bytes()
    assert expected["system_config"] in fit.latency_by and expected["memory_mode"] in fit.latency_by


def test_vela_estimate_is_near_what_the_multipliers_need(vela):
    """128 products per cycle at 500 MHz, and never more: 48 and 64 fill the array, 65 do not."""
    times = {}
    for channels in (16, 32, 64, 65):
        products = 28 * 28 * 9 * channels**2
        [times[channels]] = devices.get("ethos-u55-128").milliseconds([one_convolution(channels)])
        assert 1 <= times[channels] / (products / 128 / 500e3) < 2.5
    assert times[16] < times[32] < times[64] < times[65] and times[65] > 1.5 * times[64]
    [faster] = devices.get("ethos-u55-256").milliseconds([one_convolution(64)])
    assert faster < 0.7 * times[64]


def test_vela_takes_a_configuration_file_of_ones_own(vela, tmp_path):
    from ethosu.vela.architecture_features import CONFIG_FILES_PATH

    with open(os.path.join(CONFIG_FILES_PATH, "Arm", "vela.ini")) as original:
        text = original.read()
    clock, name = "core_clock=500e6", "Ethos_U55_High_End_Embedded"
    head, rest = text.split(f"[System_Config.{name}]")
    (tmp_path / "slow.ini").write_text(f"{head}[System_Config.{name}]{rest.replace(clock, 'core_clock=250e6', 1)}")
    slow = devices.Ethos("ethos-u55-128", config=tmp_path / "slow.ini")
    fast = devices.get("ethos-u55-128").examine(file("int8 wide"))
    fit = slow.examine(file("int8 wide"))
    assert 1.5 < fit.latency_ms / fast.latency_ms < 2.1 and "250 MHz" in fit.latency_by
    assert slow.identity() != devices.get("ethos-u55-128").identity()
    with pytest.raises(FileNotFoundError, match="none.ini"):
        devices.Ethos(config=tmp_path / "none.ini").examine(file("int8"))
    with pytest.raises(ValueError, match="system_config='A' is not in .*Ethos_U55_Deep_Embedded"):
        devices.Ethos(system_config="A").examine(file("int8"))
    with pytest.raises(ValueError, match="ethos-u85-2048"):
        devices.Ethos("ethos-u55")


@pytest.mark.parametrize("name", ["float32", "float16", "dynamic_int8 wide"])
def test_vela_returns_success_for_a_float_file_and_we_do_not(vela, name):
    """For such a file Vela ends with code 0 and an estimate of 0 ms."""
    target = devices.get("ethos-u55-128")
    fit = target.examine(file(name))
    assert not fit.runs and fit.latency_ms is None and fit.sram_bytes is None
    count = sum(fallback.count for fallback in fit.fallbacks)
    assert count == sum(te.Runner(file(name)).operators.values())
    assert f"All {count} operators run on the CPU because the file computes in float32" in fit.problems[0]
    for act in (target.compile, lambda content: target.milliseconds([file("int8"), content])):
        with pytest.raises(ValueError, match="computes in float32.*recipe='int8'"):
            act(file(name))


@pytest.mark.parametrize("name", ["ethos-u55-128", "ethos-u85-256"])
def test_vela_names_the_operators_it_leaves_to_the_cpu_and_why(vela, name):
    fit = devices.get(name).examine(file("sin"))
    found = {fallback.operator: fallback for fallback in fit.fallbacks}
    assert fit.runs and set(found) == {"DEQUANTIZE", "SIN", "QUANTIZE"} and found["SIN"].count == 1
    assert found["SIN"].reason == "Unsupported opType" and "DataType Float32" in found["QUANTIZE"].reason
    assert "without the 3 operators on the CPU" in fit.latency_by and "SIN" in str(fit)
    batch = devices.get("ethos-u55-128").examine(file("int8 batch 2"))
    assert [(each.operator, "Batch must be 1" in each.reason) for each in batch.fallbacks] == [("MEAN", True)]
    assert devices.get(name).examine(file("int8")).fallbacks == ()


def test_vela_does_not_compile_twice(vela):
    target = devices.get("ethos-u55-128")
    compiled = target.compile(file("int8"))
    fit = target.examine(compiled)
    assert not fit.runs and "already compiled" in fit.problems[0]
    with pytest.raises(ValueError, match="already compiled"):
        target.compile(compiled)


def test_vela_leaves_the_process_as_it_was(vela, monkeypatch, capfd):
    monkeypatch.chdir("/")
    limit, arguments = sys.getrecursionlimit(), list(sys.argv)
    sys.setrecursionlimit(limit + 7)
    try:
        devices.get("ethos-u55-128").examine(file("sin"))
        assert sys.getrecursionlimit() == limit + 7 and sys.argv == arguments
    finally:
        sys.setrecursionlimit(limit)
    capfd.readouterr()
    print("still here")
    os.write(2, b"and here")
    assert capfd.readouterr() == ("still here\n", "and here")


def test_vela_failures_are_problems_not_tracebacks(vela, monkeypatch):
    def fail(_):
        raise AssertionError("inside the compiler\nsecond line")

    monkeypatch.setattr(vela, "main", fail)
    fit = devices.get("ethos-u55-128").examine(file("int8"))
    assert not fit.runs and "did not compile the file: inside the compiler" in fit.problems[0]
    monkeypatch.setattr(vela, "main", lambda _: 1)
    assert not devices.get("ethos-u55-128").examine(file("int8")).runs
    monkeypatch.setattr(vela, "main", lambda _: sys.exit(2))
    assert "refused" in devices.get("ethos-u55-128").examine(file("int8")).problems[0]


@pytest.fixture
def tflm():
    return pytest.importorskip("tflite_micro")


def runs_in(content, arena, folder):
    """Whether LiteRT for Microcontrollers runs a file in an arena of this many bytes, tried in a fresh process."""
    (folder / "a.tflite").write_bytes(content)
    code = (
        "import sys, numpy; from tflite_micro import runtime; "
        "run = runtime.Interpreter.from_file('a.tflite', arena_size=int(sys.argv[1])); info = run.get_input_details(0);"
        "run.set_input(numpy.zeros(info['shape'], info['dtype']), 0); run.invoke()"
    )
    return subprocess.run([sys.executable, "-c", code, str(arena)], cwd=folder, capture_output=True).returncode == 0


def test_micro_arena_is_what_the_file_needs(tflm, tmp_path):
    small, wide = (devices.get("micro").examine(file(name)) for name in ("int8", "int8 wide"))
    assert small.runs and wide.sram_bytes > 2 * small.sram_bytes and small.flash_bytes == len(file("int8"))
    for fit, name in ((small, "int8"), (wide, "int8 wide")):
        assert runs_in(file(name), int(1.05 * fit.sram_bytes) + 512, tmp_path)
        assert not runs_in(file(name), int(0.9 * fit.sram_bytes), tmp_path)


def test_micro_holds_its_limits(tflm):
    need = devices.get("micro").examine(file("int8"))
    assert devices.Micro(arena_bytes=need.sram_bytes, flash_bytes=need.flash_bytes).examine(file("int8")).runs
    fit = devices.Micro(arena_bytes=need.sram_bytes - 1, flash_bytes=need.flash_bytes - 2).examine(file("int8"))
    assert not fit.runs and len(fit.problems) == 2 and fit.sram_bytes == need.sram_bytes
    assert f"{need.sram_bytes} bytes, 1 more than arena_bytes" in fit.problems[0] and "2 more" in fit.problems[1]
    for bad in ({"arena_bytes": 0}, {"flash_bytes": 1.5}, {"arena_bytes": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            devices.Micro(**bad)


@pytest.mark.parametrize(
    "name, word", [("gelu", "no kernel for the operator GELU"), ("dynamic_int8 wide", "int8 weights and float")]
)
def test_micro_names_what_it_cannot_run(tflm, name, word):
    fit = devices.get("micro").examine(file(name))
    assert not fit.runs and word in fit.problems[0] and fit.sram_bytes is None


@pytest.mark.parametrize("name", ["int8", "int16x8", "float32", "int8 float io"])
def test_micro_agrees_with_litert_and_says_by_how_much(tflm, name, monkeypatch):
    fit = devices.get("micro").examine(file(name))
    assert fit.runs and "agrees with LiteRT" in fit.notes[0]
    if name in ("int8", "int16x8"):
        assert int(re.search(r"by (\d+) steps", fit.notes[0])[1]) <= 3

    def wrong(runner):
        right = original(runner)
        return micro._Run(right.arena, tuple(np.roll(output, 1) for output in right.outputs), right.log)

    original = micro._run
    monkeypatch.setattr(micro, "_run", wrong)
    fit = devices.get("micro").examine(file(name))
    assert not fit.runs and "differs from LiteRT's" in fit.problems[0]


def test_micro_survives_a_crash(tflm, monkeypatch, tmp_path):
    for signal, words in (("SEGV", "signal 11"), ("ABRT", "signal 6, a failed check")):
        (tmp_path / "crash").write_text(f"#!/bin/sh\nkill -{signal} $$\n")
        (tmp_path / "crash").chmod(0o755)
        monkeypatch.setattr(micro.sys, "executable", str(tmp_path / "crash"))
        assert words in devices.get("micro").examine(file("int8")).problems[0]
        monkeypatch.undo()
    monkeypatch.setattr(micro, "_ARENA", 2000)
    fit = devices.get("micro").examine(file("int8"))
    assert not fit.runs and "CONV_2D failed to prepare" in fit.problems[0]


def with_external_buffers(content):
    """The same file, its weights behind the flatbuffer, as ai-edge-quantizer writes it."""
    model = flatbuffer.unpacked(content)
    data = {}
    for at, buffer in enumerate(model.buffers):
        if buffer.data is not None and len(buffer.data) >= 16:
            data[at], buffer.data, buffer.offset, buffer.size = bytes(buffer.data), None, 2, len(buffer.data)
    start = -(-len(flatbuffer.packed(model)) // 64) * 64
    tail = bytearray()
    for at, numbers in data.items():
        model.buffers[at].offset = start + len(tail)
        tail += numbers + bytes(-len(numbers) % 64)
    head = flatbuffer.packed(model)
    return head + bytes(start - len(head)) + bytes(tail)


def test_micro_refuses_external_buffers_that_it_would_silently_not_read(tflm):
    outside = with_external_buffers(file("int8"))
    inside, runner = te.Runner(file("int8")), te.Runner(outside)
    batch = inside.random_inputs()
    assert np.array_equal(inside.run(batch)[0], runner.run(batch)[0])  # it is the same network
    assert external_buffers(outside) > 3 and external_buffers(file("int8")) == 0
    fit = devices.get("micro").examine(outside)
    assert not fit.runs and "external buffers" in fit.problems[0] and "inline" in fit.problems[0]
    run = micro._run(te.Runner(outside))  # what would come without the check
    assert run.arena is None or np.abs(run.outputs[0].astype(int) - micro._run(inside).outputs[0]).max() > 3


@pytest.mark.parametrize(
    "name, word", [("float32", "FLOAT32"), ("int16x8", "INT16"), ("int8 batch 2", "2 samples"), ("float16", "FLOAT")]
)
def test_edgetpu_refuses_the_file(name, word):
    fit = devices.get("edgetpu").examine(file(name))
    assert not fit.runs and word in fit.problems[0] and len(fit.problems) == 1


def test_edgetpu_takes_an_int8_network_as_a_whole():
    fit = devices.get("edgetpu").examine(file("int8"))
    assert fit.runs and fit.fallbacks == () and "no Edge TPU compiler" in fit.notes[0] and fit.versions == {}


def test_edgetpu_leaves_all_that_follows_to_the_cpu():
    fit = devices.get("edgetpu").examine(file("gelu"))
    assert fit.runs and [each.operator for each in fit.fallbacks] == ["GELU", "CONV_2D"]
    assert "not among" in fit.fallbacks[0].reason and "comes after GELU" in fit.fallbacks[1].reason
    fit = devices.get("edgetpu").examine(file("sin"))
    assert [each.operator for each in fit.fallbacks] == ["DEQUANTIZE", "SIN", "QUANTIZE", "CONV_2D"]
    fit = devices.get("edgetpu").examine(file("int8 float io"))
    assert [each.operator for each in fit.fallbacks] == ["QUANTIZE", "DEQUANTIZE"] and fit.runs
    assert {each.reason for each in fit.fallbacks} == {"the file takes or gives floats"}


def network(*parts):
    image = keras.Input((12, 12, 8))
    x = layers.Conv2D(8, 3, name="first")(image)
    for part in parts:
        x = part(x)
    return keras.Model(image, x)


ZEROS = np.zeros((1, 10, 10, 4), "float32")
ONES = np.ones((1, 10, 10, 4), "float32")


def joined(*values):
    return lambda x: keras.ops.concatenate([x, *values], axis=-1)


@pytest.mark.parametrize(
    "parts, operator, reason",
    [
        ([layers.Dense(3)], "FULLY_CONNECTED", "100 rows"),
        ([layers.Flatten(), layers.Dense(3)], None, None),
        ([lambda x: keras.ops.mean(x, axis=-1)], "MEAN", "other axes"),
        ([layers.GlobalAveragePooling2D()], None, None),
        ([lambda x: keras.ops.pad(x, [(0, 0), (0, 0), (0, 0), (1, 2)])], "PAD", "other axes"),
        ([layers.ZeroPadding2D(1), layers.MaxPooling2D(2)], None, None),
        ([layers.AveragePooling2D(2), layers.ReLU()], "AVERAGE_POOL_2D", "fused activation"),
        ([layers.MaxPooling2D(2), layers.Conv2D(4, 1)], None, None),
        ([joined(ONES)], "CONCATENATION", "must be zeros"),
        ([lambda x: keras.ops.concatenate([x, 2.0 * x])], "CONCATENATION", "its tensor of shape"),
        ([lambda x: keras.ops.concatenate([x, 2.0 * x], axis=-1)], None, None),
        ([layers.UpSampling2D(interpolation="bilinear")], None, None),
        ([layers.Softmax()], None, None),
        ([layers.Reshape((10, 10, 2, 4)), lambda x: keras.ops.tanh(x)], "RESHAPE", "innermost"),
    ],
)
def test_edgetpu_knows_the_limits_of_its_operators(parts, operator, reason):
    content = converted(network(*parts))
    fit = devices.get("edgetpu").examine(content)
    if operator is None:
        assert fit.fallbacks == () and fit.runs
    else:
        first = next(each for each in fit.fallbacks if "comes after" not in each.reason)
        assert operator == first.operator and reason in first.reason


def test_steps_are_the_files_operators_in_order():
    work = steps(file("int8"))
    counted = {}
    for step in work:
        counted[step.operator] = counted.get(step.operator, 0) + 1
    assert counted == te.Runner(file("int8")).operators and work[-1].operator == "FULLY_CONNECTED"
    weights = work[0].inputs[1]
    assert weights.constant and weights.values.shape == weights.shape == (8, 3, 3, 3) and weights.quantised
    assert not work[0].inputs[0].constant and work[0].inputs[0].dtype == "INT8" and work[0].option("strideW") == 1


@pytest.mark.parametrize(
    "got, scale, integers, far",
    [
        ([3, 10], 1.0, True, False),  # rounding: 3 steps are nothing, though they are 30 % of the peak
        ([6, 10], 1.0, True, True),  # 6 - 3 steps, more than a quarter of the peak
        ([0, 10.005], None, False, False),
        ([0, 10.05], None, False, True),
        ([0, 10.05], None, True, False),  # floats outside, integers inside
        ([0, float("nan")], None, False, True),
        ([[0, 10]], None, False, True),  # another shape
    ],
)
def test_micro_tells_rounding_from_nonsense(got, scale, integers, far):
    port = te.Port("y", (1, 2), "int8" if scale else "float32", scale, 0 if scale else None)
    expected = np.array([0, 10], port.dtype)
    assert micro._difference(port, expected, np.array(got, port.dtype), integers)[1] is far
