"""What is converted, what is refused and how, and that the model stays as it was."""

import logging

import keras
import numpy as np
import pytest
from keras import layers
from test_export_zoo import attention, convnet, embedding, images, recurrent, two_in_two_out

import tflite_export as te
from tflite_export.convert import in_float32
from tflite_export.silence import quiet


def message(error, call, *arguments, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_model_is_not_changed():
    model = convnet()
    model.compile("adam", "mse")
    model.fit(images(8), np.zeros((8, 5)), verbose=0)
    model.layers[1].trainable = False
    before = [weight.value.numpy().copy() for weight in model.weights + model.optimizer.variables]
    flags, config = [layer.trainable for layer in model.layers], model.to_json()
    te.to_tflite(model, "int8", images(8))
    after = [weight.value.numpy().copy() for weight in model.weights + model.optimizer.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [layer.trainable for layer in model.layers] == flags and model.to_json() == config


def test_nothing_is_printed_and_the_streams_are_put_back(capfd):
    te.to_tflite(convnet(), "int8", images(4))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    print("back")
    assert capfd.readouterr().out == "back\n"


def test_a_logger_that_was_set_up_in_silence_speaks_afterwards(capsys):
    logger = logging.getLogger("made in silence")
    with quiet():
        logger.addHandler(logging.StreamHandler())
        logger.warning("not heard")
    logger.warning("heard")
    assert capsys.readouterr().err == "heard\n"


def test_mixed_precision_is_compared_and_computed_in_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = convnet()
    finally:
        keras.config.set_dtype_policy("float32")
    report = te.export(model, tmp_path / "a.tflite", runs=0)
    assert report.parity.relative_error < 1e-5 and "float32" in report.notes[0]
    assert model.layers[1].compute_dtype == "bfloat16"  # the user's model still is what it was
    coarse = np.asarray(model(images(4)).numpy(), "float32")
    fine = in_float32(model)(images(4)).numpy()
    assert 1e-4 < np.abs(coarse - fine).max() / np.abs(fine).max() < 0.1


def test_a_float32_model_is_not_copied():
    model = convnet()
    assert in_float32(model) is model


def test_signature_has_the_names_of_the_model():
    interpreter = te.Runner(te.to_tflite(two_in_two_out())).interpreter
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner("serving_default")
    zeta, alpha = np.full((1, 4), 5, "float32"), np.full((1, 4), 2, "float32")
    outputs = run(zeta=zeta, alpha=alpha)
    assert np.array_equal(outputs["y"], zeta - alpha) and np.array_equal(outputs["x"], 3 * alpha)


@pytest.mark.parametrize("float_io, dtype", [(False, "int8"), (True, "float32")])
def test_int8_inputs_and_outputs_are_integers_unless_float_io(float_io, dtype):
    runner = te.Runner(te.to_tflite(convnet(), "int8", images(16), float_io=float_io))
    assert {port.dtype for port in runner.inputs + runner.outputs} == {dtype}
    assert ("QUANTIZE" in runner.operators) == float_io


def test_batch_size_is_fixed_in_the_file():
    runner = te.Runner(te.to_tflite(convnet(), batch_size=4))
    assert runner.batch_size == 4 and runner.inputs[0].shape == (4, 12, 12, 3)
    assert te.compare(convnet(), runner, images(6)).relative_error < 1e-5  # 6 samples: the second batch is not full


def test_int8_without_data_is_refused():
    text = message(ValueError, te.to_tflite, convnet(), "int8")
    assert "needs data" in text and "'image'" in text and "dynamic_int8" in text


def test_unknown_recipe_lists_the_known_ones():
    text = message(ValueError, te.to_tflite, convnet(), "int4")
    assert all(name in text for name in te.RECIPES)
    assert "expected a name" in message(TypeError, te.to_tflite, convnet(), 8)


def test_a_recipe_of_ones_own_is_accepted():
    recipe = te.Recipe(name="half", summary="", tolerance=0.02, weight_type="float16")
    runner = te.Runner(te.to_tflite(convnet(), recipe))
    assert runner.operators == te.Runner(te.to_tflite(convnet(), "float16")).operators
    assert runner.operators != te.Runner(te.to_tflite(convnet(), "float32")).operators


def test_open_size_is_named_and_can_be_given():
    x = inputs = keras.Input((None, None, 3), name="photo")
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(x)))
    text = message(ValueError, te.to_tflite, model)
    assert "'photo'" in text and "input_shape=" in text
    for shape in ((9, 8, 3), [(9, 8, 3)], {"photo": (9, 8, 3)}):
        assert te.Runner(te.to_tflite(model, input_shape=shape)).inputs[0].shape == (1, 9, 8, 3)
    assert "photo" in message(ValueError, te.to_tflite, model, input_shape=(9, 8, 4))
    assert "photo" in message(ValueError, te.to_tflite, model, input_shape={"image": (9, 8, 3)})


def test_operators_outside_the_format_need_allow_flex(tmp_path):
    inputs = keras.Input((3, 3))
    square = keras.ops.matmul(inputs, keras.ops.transpose(inputs, (0, 2, 1)))
    model = keras.Model(inputs, keras.ops.cholesky(square + keras.ops.eye(3)))
    text = message(ValueError, te.export, model, tmp_path / "a.tflite")
    assert "Cholesky" in text and "allow_flex=True" in text and not list(tmp_path.iterdir())
    report = te.export(model, tmp_path / "a.tflite", allow_flex=True)
    assert report.operators["CUSTOM:FlexCholesky"] == 1 and report.parity is None and "Flex" in report.notes[0]
    assert "FlexCholesky" in te.check(tmp_path / "a.tflite").problems[0]
    assert te.check(tmp_path / "a.tflite", allow_flex=True).ok
    assert "cannot run" in message(ValueError, te.measure_latency, tmp_path / "a.tflite")


def test_recurrent_layers_are_quantised_unrolled_only():
    # TensorFlow's calibrator would end this process with a segmentation fault.
    data = np.random.default_rng(0).normal(size=(8, 5, 3))
    text = message(ValueError, te.to_tflite, recurrent(), "int8", data)
    assert "unroll=True" in text and "lstm" in text
    assert te.compare(recurrent(), te.to_tflite(recurrent(unroll=True), "int8", data), data).relative_error < 0.25
    assert te.compare(recurrent(), te.to_tflite(recurrent(), "dynamic_int8")).relative_error < 0.15


@pytest.mark.parametrize("make, words", [(attention, ["NEG", "LayerNormalization"]), (embedding, ["integer inputs"])])
def test_without_the_extra_a_recipe_that_lacks_a_kernel_says_so_in_one_sentence(make, words, monkeypatch):
    monkeypatch.setattr("tflite_export.quantizer.installed", lambda: False)
    model = make()
    data = np.zeros((4, *model.inputs[0].shape[1:]), model.inputs[0].dtype) + 1
    text = message(ValueError, te.to_tflite, model, "int16x8", data)
    assert all(word in text for word in [*words, "int8", "keras_prune[quantizer]"])


@pytest.mark.parametrize(
    "options", [{"recipe": "weight_only_int8"}, {"recipe": "dynamic_int8", "keep_float": "scores"}]
)
def test_without_the_extra_what_needs_it_is_refused_and_nothing_written(options, tmp_path, monkeypatch):
    monkeypatch.setattr("tflite_export.quantizer.installed", lambda: False)
    text = message(ImportError, te.export, convnet(), tmp_path / "a.tflite", **options)
    assert "ai-edge-quantizer" in text and "keras_prune[quantizer]" in text and not list(tmp_path.iterdir())


def test_int16x8_without_the_extra_goes_through_the_converter(monkeypatch):
    monkeypatch.setattr("tflite_export.quantizer.installed", lambda: False)
    content = te.to_tflite(convnet(), "int16x8", images(50))
    assert te.compare(convnet(), content, images(50)).relative_error < 0.05


def test_indices_as_floats_are_not_quantised():
    words = keras.Input((6,), name="words")
    model = keras.Model(words, layers.Embedding(300, 2)(words))
    assert "int32" in message(ValueError, te.to_tflite, model, "int8", np.ones((4, 6)))
    assert te.compare(model, te.to_tflite(model)).relative_error == 0


def test_models_that_cannot_be_traced_are_refused():
    class Mine(keras.Model):
        def call(self, x):
            return x + 1.0

    mine = Mine()
    mine(np.zeros((1, 3)))
    assert "keras.Model(inputs, model(inputs))" in message(ValueError, te.to_tflite, mine)
    inputs = keras.Input((3,))
    wrapped = keras.Model(inputs, mine(inputs))  # what the message advises
    assert te.compare(wrapped, te.to_tflite(wrapped)).relative_error == 0
    assert "model.build" in message(ValueError, te.to_tflite, keras.Sequential([layers.Dense(2)]))
    assert "keras.saving.load_model" in message(TypeError, te.to_tflite, "model.keras")
    stateful = keras.Input(batch_shape=(1, 5, 3))
    model = keras.Model(stateful, layers.LSTM(2, stateful=True, name="memory")(stateful))
    assert "'memory'" in message(ValueError, te.to_tflite, model)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    text = message(ValueError, te.to_tflite, convnet())
    assert "jax" in text and "KERAS_BACKEND=tensorflow" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    model = convnet()
    kernel = model.get_layer("scores").kernel
    kernel.assign(np.where(np.arange(kernel.shape[1]) == 2, value, kernel))
    text = message(ValueError, te.to_tflite, model)
    assert "'scores'" in text and "'kernel'" in text


def test_batch_size_that_does_not_fit_is_refused():
    assert "batch_size=0" in message(ValueError, te.to_tflite, convnet(), batch_size=0)
    inputs = keras.Input(batch_shape=(2, 3))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    assert "batch_size=2" in message(ValueError, te.to_tflite, model)
    assert te.compare(model, te.to_tflite(model, batch_size=2)).relative_error < 1e-6


def test_an_output_without_batch_axis_is_refused(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Lambda(keras.ops.sum, name="total")(inputs))
    assert "'total'" in message(ValueError, te.export, model, tmp_path / "a.tflite")
    assert not list(tmp_path.iterdir())
