"""ai-edge-quantizer's files: the right numbers, whole, with names, and the layers that were named left in float32."""

import keras
import numpy as np
import pytest
from keras import layers
from test_export_convert import message
from test_export_zoo import attention, convnet, embedding, images, nested, randomised

pytest.importorskip("ai_edge_quantizer")

import tflite_export as te
from tflite_export import convert, flatbuffer, quantizer
from tflite_export.inputs import model_inputs


def spoiled(seed=0):
    """The layer "spoiled" reads a channel that is always 0 with weights of 500: int8 rounds its others to nothing."""
    image = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(8, 3, activation="relu", name="first")(image)
    x = layers.Conv2D(8, 3, activation="relu", name="spoiled")(x)
    x = layers.Conv2D(8, 3, activation="relu", name="third")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = randomised(keras.Model(image, layers.Dense(5, name="scores")(x)), seed)
    bias, kernel = np.zeros(8, "float32"), model.get_layer("spoiled").kernel.numpy()
    bias[0], kernel[:, :, 0] = -1000.0, 500.0
    model.get_layer("first").bias.assign(bias)
    model.get_layer("spoiled").kernel.assign(kernel)
    return model


def large():
    """More than 256 KiB of int8 weights: from there ai-edge-quantizer puts them behind the flatbuffer."""
    x = inputs = keras.Input((512,), name="x")
    x = layers.Dense(600, activation="relu", name="wide")(x)
    return randomised(keras.Model(inputs, layers.Dense(4, name="scores")(x)))


def float_file(model):
    return convert.float_file(model, model_inputs(model), 1, "recipe=float32", te.RECIPES["float32"])


def types(content):
    """(operator, type of what it writes) in the file's order."""
    return [(each.name, each.types[-1]) for each in quantizer.operators(content)]


def not_inlined(model, data, monkeypatch):
    file = float_file(model)
    ranges = quantizer.calibrate(file.content, convert.batches([data], 1))
    with monkeypatch.context() as patch:
        patch.setattr(quantizer, "inline", lambda content: content)
        return quantizer.quantize(file.content, "int8", ranges)


def offsets(content):
    model = flatbuffer.root(content)
    return [model.Buffers(at).Offset() for at in range(model.BuffersLength())]


def test_inlined_file_has_all_weights_inside_and_computes_the_same(monkeypatch):
    data = np.random.default_rng(0).normal(size=(20, 512)).astype("float32")
    outside = not_inlined(large(), data, monkeypatch)
    assert max(offsets(outside)) > 1  # else this test would prove nothing
    inside = quantizer.inline(outside)
    assert max(offsets(inside)) == 0 and flatbuffer.missing_bytes(inside) == 0
    assert flatbuffer.signature(inside) == flatbuffer.signature(outside)
    assert flatbuffer.description(inside) == flatbuffer.description(outside)
    assert np.array_equal(te.Runner(inside).run([data])[0], te.Runner(outside).run([data])[0])


@pytest.mark.parametrize("make, data", [(convnet, images(20)), (large, np.ones((4, 512), "float32"))])
def test_every_buffer_starts_at_a_multiple_of_16_bytes(make, data):
    content = te.to_tflite(make(), "weight_only_int8", data)
    model = flatbuffer.root(content)
    found = [model.Buffers(at).DataAsNumpy() for at in range(model.BuffersLength())]
    start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    places = [data.__array_interface__["data"][0] - start for data in found if isinstance(data, np.ndarray)]
    assert len(places) > 4 and all(0 < place < len(content) and place % 16 == 0 for place in places)


@pytest.mark.parametrize("make, shape", [(spoiled, (12, 12, 3)), (large, (512,))])
def test_microcontroller_runtime_computes_what_litert_computes(make, shape, monkeypatch):
    runtime = pytest.importorskip("tflite_micro").runtime
    data = np.random.default_rng(0).normal(size=(20, *shape)).astype("float32")

    def on_both(content):
        runner = te.Runner(content)
        port = runner.inputs[0]
        micro = runtime.Interpreter.from_bytes(content, arena_size=1 << 20)
        found = []
        for sample in data[:8]:
            micro.set_input(port.store(sample[None]), 0)
            micro.invoke()
            found.append(runner.outputs[0].real(micro.get_output(0))[0])
        return np.array(found), runner.run([data[:8]])[0], runner.outputs[0].scale

    micro, litert, step = on_both(te.to_tflite(make(), "int16x8", data))
    assert np.abs(micro - litert).max() <= 4 * step < 0.01 * np.abs(litert).max()
    if make is large:  # the control: without inlining it computes nonsense, and does not say so
        micro, litert, _ = on_both(not_inlined(make(), data, monkeypatch))
        assert np.abs(micro - litert).max() > 0.1 * np.abs(litert).max()


def test_ranges_are_the_smallest_and_largest_numbers_of_all_samples():
    data = images(30)
    data[17, 3, 4, 1] = 40.0  # one rare pixel: a moving average would forget it
    ranges = quantizer.calibrate(float_file(convnet()).content, convert.batches([data], 1))
    assert (ranges["input_0"]["min"].item(), ranges["input_0"]["max"].item()) == (data.min(), 40.0)


MINE = te.Recipe("mine", "", 0.25, needs_data=True, io_dtype="int8", quantizer="ai-edge", activations="int8")


@pytest.mark.parametrize("recipe", [MINE, "int8", "int16x8", "weight_only_int8", "dynamic_int8"])
def test_weights_have_a_scale_per_channel(recipe):
    content = te.to_tflite(convnet(width=32), recipe, images(20))
    graph = flatbuffer.root(content).Subgraphs(0)
    scales = {}
    for at in range(graph.TensorsLength()):
        tensor = graph.Tensors(at)
        if tensor.ShapeLength() > 1 and tensor.Type() == 9 and tensor.Quantization().ScaleLength() > 1:
            scales[tuple(tensor.ShapeAsNumpy())] = tensor.Quantization().ScaleLength()
    wanted = {(32, 3, 3, 3): 32, (1, 3, 3, 32): 32, (64, 3, 3, 32): 64, (5, 64): 5}
    if recipe == "dynamic_int8":  # the converter leaves weights of less than 1024 numbers as floats
        wanted = {(64, 3, 3, 32): 64}
    assert scales == wanted


@pytest.mark.parametrize("recipe", ["int8", "int16x8", "dynamic_int8", "weight_only_int8"])
@pytest.mark.parametrize("float_io", [False, True])
@pytest.mark.parametrize("keep", [(), ("conv2d*",), ("scores",)])
def test_names_description_and_ends_are_those_of_the_recipe(recipe, float_io, keep):
    runner = te.Runner(te.to_tflite(convnet(), recipe, images(20), float_io=float_io, keep_float=keep))
    wanted = "float32" if float_io else te.RECIPES[recipe].io_dtype
    assert [(port.name, port.dtype) for port in runner.inputs + runner.outputs] == [
        ("image", wanted),
        ("scores", wanted),
    ]
    assert runner.description == f"recipe={recipe} float_io={float_io} by tflite_export"
    assert te.compare(convnet(), runner, images(20)).relative_error < te.RECIPES[recipe].tolerance
    run = runner.interpreter.get_signature_runner("serving_default")
    assert list(run.get_input_details()) == ["image"] and list(run.get_output_details()) == ["scores"]


def test_nothing_is_printed(capfd):
    te.to_tflite(convnet(), "int16x8", images(30))
    te.to_tflite(convnet(), "weight_only_int8")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("make", [attention, embedding])
def test_int16x8_does_what_the_converter_refuses(make, tmp_path):
    model = make()
    random = np.random.default_rng(0)
    shape, dtype = (100, *model.inputs[0].shape[1:]), model.inputs[0].dtype
    data = random.integers(0, 11, shape) if dtype == "int32" else random.normal(size=shape)
    report = te.export(model, tmp_path / "a.tflite", "int16x8", data.astype(dtype), runs=0)
    assert report.within_tolerance and report.parity.relative_error < 0.02
    assert report.outputs[0].dtype == "int16"
    floats = [note for note in report.notes if "computed in float32" in note]
    assert bool(floats) == (make is attention) and all("NEG 1" in note for note in floats)


def test_int16x8_of_a_layer_called_twice_is_right(monkeypatch):
    data = np.random.default_rng(0).normal(size=(100, 6)).astype("float32")
    assert te.compare(nested(), te.to_tflite(nested(), "int16x8", data), data).relative_error < 0.02
    # The control, and the reason for using the extra where it is there: the converter quantises the layer's bias once,
    # for the inputs of its first call. When this fails, the converter was mended.
    monkeypatch.setattr("tflite_export.quantizer.installed", lambda: False)
    assert te.compare(nested(), te.to_tflite(nested(), "int16x8", data), data).relative_error > 0.3


def test_operators_are_found_by_the_layers_they_compute():
    model = convnet()
    file = float_file(model)
    names = [each.name for each in quantizer.operators(file.content)]
    found = {
        type(layer).__name__: [names[place] for place in file.layers[layer.name]]
        for layer in model.layers
        if layer.name in file.layers
    }
    assert found["ReLU"] == found["BatchNormalization"] == found["Conv2D"] == ["CONV_2D"]
    assert found["DepthwiseConv2D"] == ["DEPTHWISE_CONV_2D"] and found["Add"] == ["ADD"]
    assert found["Dense"] == ["FULLY_CONNECTED"]  # also the last, whose name the file does not hold


def test_layers_whose_names_differ_by_a_number_are_told_apart():
    x = inputs = keras.Input((4,))
    for name in ("dense_1", "dense", "dense_1_1", "dense_2"):
        x = layers.Dense(4, activation="tanh", name=name)(x)
    file = float_file(randomised(keras.Model(inputs, x)))
    assert file.layers == {"dense_1": (0, 1), "dense": (2, 3), "dense_1_1": (4, 5), "dense_2": (6, 7)}


def test_convolutions_are_found_where_the_converter_lost_their_names():
    x = inputs = keras.Input((8, 8, 4))
    x = layers.LayerNormalization(name="norm")(layers.Conv2D(4, 3, groups=4, padding="same", name="depthwise")(x))
    x = layers.Conv2D(4, 3, use_bias=False, name="last")(
        layers.Conv2D(8, 3, groups=2, use_bias=False, name="grouped")(x)
    )
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="last_norm")(x))
    file = float_file(randomised(keras.Model(inputs, x)))
    names = [each.name for each in quantizer.operators(file.content)]
    [one], [two], [three] = (file.layers[name] for name in ("depthwise", "grouped", "last"))
    assert names[one] == names[two] == names[three] == "CONV_2D" and one < two < three == len(names) - 1
    assert file.layers["last_norm"] == file.layers["relu"] == (three,)


def test_layers_of_a_nested_model_go_by_their_path_and_by_every_call():
    model = nested()
    file = float_file(model)
    inner = model.get_layer("inner").layers[0].name
    assert file.layers == {"inner": (0, 1, 2, 3), f"inner/{inner}": (0, 1, 2, 3)}
    assert file.places(["inner"]) == file.places([inner]) == file.places([f"inner/{inner}"]) == (0, 1, 2, 3)


def test_kept_layer_is_float_and_the_others_are_not():
    plain = types(te.to_tflite(spoiled(), "int8", images(20), float_io=False))
    assert {kind for _, kind in plain} == {"INT8"}
    content = te.to_tflite(spoiled(), "int8", images(20), keep_float=["spoiled"])
    assert types(content) == [
        ("CONV_2D", "INT8"), ("DEQUANTIZE", "FLOAT32"), ("CONV_2D", "FLOAT32"), ("QUANTIZE", "INT8"),
        ("CONV_2D", "INT8"), ("MEAN", "INT8"), ("FULLY_CONNECTED", "INT8"),
    ]  # fmt: skip
    kept = [each for each in quantizer.operators(content) if each.name == "CONV_2D"][1]
    assert set(kept.types) == {"FLOAT32"} and "spoiled" in kept.outputs[0]


def test_keeping_the_spoiled_layer_helps_and_keeping_another_does_not(tmp_path):
    def error(**options):
        return te.export(spoiled(), tmp_path / "a.tflite", "int8", images(50), runs=0, **options).parity.relative_error

    assert error() > 0.3 and error(keep_float="third") > 0.3 and error(keep_float=["first", "scores"]) > 0.3
    assert error(keep_float="spoiled") < 0.05


@pytest.mark.parametrize("recipe", ["int8", "int16x8", "dynamic_int8", "weight_only_int8"])
def test_layers_are_kept_in_every_recipe_with_int8_weights(recipe, tmp_path):
    report = te.export(spoiled(), tmp_path / "a.tflite", recipe, images(50), keep_float=["sp*"], runs=0)
    assert report.parity.relative_error < 0.05 and "Kept in float32: spoiled." in report.notes


def test_patterns_select_by_name():
    content = te.to_tflite(spoiled(), "int8", images(20), keep_float=["*ir*"])
    assert [kind for name, kind in types(content) if name == "CONV_2D"] == ["FLOAT32", "INT8", "FLOAT32"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"recipe": "int8", "keep_float": ["sploied"]}, ["sploied", "first", "spoiled", "third", "scores"]),
        ({"recipe": "float16", "keep_float": ["spoiled"]}, ["float16", "int8"]),
        ({"recipe": "int8", "keep_float": ["spoiled"], "allow_flex": True}, ["allow_flex"]),
        ({"recipe": te.Recipe("mine", "", 0.1, quantizer="ai-edge")}, ["'mine'", "activations="]),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(options, words, tmp_path):
    text = message(ValueError, te.export, spoiled(), tmp_path / "a.tflite", data=images(8), **options)
    assert all(word in text for word in words) and not list(tmp_path.iterdir())
    assert "names of layers" in message(TypeError, te.to_tflite, spoiled(), "int8", images(8), keep_float=[1])


def test_a_layer_that_left_no_operator_is_named():
    model = nested()
    text = message(ValueError, te.to_tflite, model, "dynamic_int8", keep_float="dropout*")
    assert "without an operator" in text and "inner/dropout" in text
