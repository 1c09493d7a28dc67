"""The child process: `python -m tflite_export.quantaware.worker FOLDER`.

It reads `job.json`, `model.keras` and the data from the folder, and leaves there `result.json`, `model.tflite` and the
outputs of the trained network, or `error.json`. tensorflow-model-optimization sets TF_USE_LEGACY_KERAS for its whole
process, which is this one.
"""

import json
import os
import sys
import time
import traceback

import numpy as np

from tflite_export.quantaware.batches import Stored, from_json, rounds
from tflite_export.silence import quiet


def main(folder: str) -> int:
    try:
        with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
            job = json.load(file)
        result = _work(folder, job)
        name = "result.json"
    except Exception as error:  # whatever it is, the other process has to hear of it
        kind = "input" if isinstance(error, (ValueError, ModuleNotFoundError)) else "unknown"
        kind = "missing" if isinstance(error, ModuleNotFoundError) else kind
        result = {"kind": kind, "message": str(error) or type(error).__name__, "trace": traceback.format_exc()}
        name = "error.json"
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(result, file)
    return 0 if name == "result.json" else 1


def _work(folder: str, job: dict) -> dict:
    start = time.perf_counter()
    home, engine, quantised, notes, versions = (_in_keras if job["through"] == "keras" else _in_tfmot)(folder, job)
    train = from_json(job["train"])
    x, y, weights = train.open(folder)
    random = np.random.default_rng(job["seed"])
    with quiet():
        chosen = rounds(train.samples, job["batch_size"], random)[: job["calibration_batches"]]
        engine.calibrate(quantised, [[np.asarray(each[rows]) for each in x] for rows in chosen])
    ready = time.perf_counter()
    _say(f"{quantised.count_params()} weights, {train.samples} samples, ranges measured on {len(chosen)} batches")
    history = _fit(quantised, home, job, train.samples, x, y, weights, random)
    trained = time.perf_counter()
    with quiet():
        engine.settle_weights(quantised, [np.asarray(each[chosen[0]]) for each in x])
        for name, stored in (("sample", from_json(job["sample"])), ("validation", from_json(job["validation"]))):
            if stored is not None:
                _predict(quantised, stored, folder, name)
        content = _converted(quantised, job)
    with open(os.path.join(folder, "model.tflite"), "wb") as file:
        file.write(content)
    seconds = {"prepare": ready - start, "train": trained - ready, "convert": time.perf_counter() - trained}
    return {"history": history, "notes": notes, "seconds": seconds, "versions": versions}


def _in_tfmot(folder: str, job: dict) -> tuple:
    """Where losses and optimizers come from, what measures ranges, the fake-quantised model, notes, versions."""
    tf_keras, tfmot = _packages()
    from tflite_export.keras2 import to_tf_keras
    from tflite_export.quantaware import ranges, scheme
    from tflite_export.quantaware.lowering import Lowering

    tf_keras.utils.set_random_seed(job["seed"])
    with quiet():
        model = _loaded(folder)
        lowering = Lowering(model, job["train_batchnorm"])
        quantised = scheme.quantised(to_tf_keras(model, replace=lowering))
    versions = {"tf_keras": tf_keras.__version__, "tensorflow-model-optimization": tfmot.__version__}
    return tf_keras, ranges, quantised, lowering.sentences(), versions


def _in_keras(folder: str, job: dict) -> tuple:
    """The same without tf_keras."""
    import keras

    from tflite_export.keras2 import rewritten
    from tflite_export.quantaware import native
    from tflite_export.quantaware.lowering import Lowering

    keras.utils.set_random_seed(job["seed"])
    with quiet():
        model = _loaded(folder)
        lowering = Lowering(model, job["train_batchnorm"], native.INSIDE)
        quantised = native.quantised(rewritten(model, lowering))
    return keras, native, quantised, lowering.sentences(), {}


def _loaded(folder: str):
    """The model that was passed, laid flat."""
    import keras

    from tflite_export.keras2 import rewritten

    model = keras.saving.load_model(os.path.join(folder, "model.keras"), compile=False)
    nested = any(isinstance(layer, keras.Model) for layer in model.layers)
    return rewritten(model, lambda operation, args, forge: None) if nested else model


def _say(line: str) -> None:
    print(line, flush=True)


def _packages():
    """tf_keras and tfmot, in the order in which neither changes what the other one is."""
    try:
        with quiet():
            import tensorflow as tf

            tf.keras.Model  # noqa: B018  tf.keras is looked up once, before tfmot flips the switch
            import tensorflow_model_optimization as tfmot
            import tf_keras
    except ImportError as error:
        raise ModuleNotFoundError(
            f"qat needs tensorflow-model-optimization and tf-keras ({error}): pip install 'keras_prune[tfmot]'; from "
            "Python 3.12 on also setuptools."
        ) from error
    return tf_keras, tfmot


def _fit(model, home, job: dict, samples: int, x, y, weights, random) -> list[dict]:
    size = job["batch_size"]
    batches_of = getattr(home.utils, "PyDataset", None) or home.utils.Sequence

    class Batches(batches_of):
        def __init__(self):
            super().__init__()
            self.rows = rounds(samples, size, random)

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, at):
            parts = [[np.asarray(each[self.rows[at]]) for each in side] for side in (x, y)]
            batch = [side[0] if len(side) == 1 else side for side in parts]
            return (*batch, *([] if weights is None else [np.asarray(weights[self.rows[at]])]))

        def on_epoch_end(self):
            self.rows = rounds(samples, size, random)

    lines = _Lines(home, job["epochs"], -(-samples // size))
    loss = _losses(job["loss"], home)
    metrics = ["accuracy"] if job["classes"] else None
    model.compile(_optimizer(job["optimizer"], home), loss=loss, metrics=metrics)
    history = []
    if job["epochs"]:
        history = model.fit(Batches(), epochs=job["epochs"], verbose=0, shuffle=False, callbacks=[lines.callback])
        keys = list(history.history)
        history = [
            {key: float(history.history[key][epoch]) for key in keys} for epoch in range(len(history.history["loss"]))
        ]
        if not all(np.isfinite(entry["loss"]) for entry in history):
            raise ValueError("The loss became NaN or infinite in training; pass a smaller learning_rate=.")
    return history


class _Lines:
    """A line on the screen about every two seconds, and one at the end of each epoch."""

    def __init__(self, home, epochs: int, steps: int):
        state = {"epoch": 0, "time": time.perf_counter()}

        def text(logs: dict) -> str:
            return "  ".join(f"{key} {value:.4f}" for key, value in logs.items())

        def begin(epoch, logs=None):
            state["epoch"] = epoch

        def step(batch, logs=None):
            if time.perf_counter() - state["time"] > 2:
                state["time"] = time.perf_counter()
                _say(f"epoch {state['epoch'] + 1}/{epochs}  step {batch + 1}/{steps}  {text(logs or {})}")

        def end(epoch, logs=None):
            _say(f"epoch {epoch + 1}/{epochs}  done  {text(logs or {})}")

        kinds = {"on_epoch_begin": begin, "on_epoch_end": end, "on_train_batch_end": step}
        self.callback = home.callbacks.LambdaCallback(**kinds)


def _losses(described, home):
    if isinstance(described, list):
        return [_losses(each, home) for each in described]
    return described if isinstance(described, str) else _made(described, home.losses)


def _optimizer(described: dict, home):
    config = dict(described["config"])
    rate = config.get("learning_rate")
    if isinstance(rate, dict):
        config["learning_rate"] = _made(rate, home.optimizers.schedules)
    return _made({"class_name": described["class_name"], "config": config}, home.optimizers)


def _made(described: dict, home):
    """The object of the same class in `home`, with those of its settings that this class has."""
    import inspect

    kind = getattr(home, described["class_name"], None)
    if kind is None:
        raise ValueError(f"{home.__name__} has no {described['class_name']}; expected one of Keras's own.")
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in described["config"].items() if key in known and value is not None})


def _predict(model, stored: Stored, folder: str, name: str) -> None:
    """The outputs of the fake-quantised network, one file for each."""
    x, _, _ = stored.open(folder)
    found = []
    for start in range(0, stored.samples, 64):
        batch = [np.asarray(each[start : start + 64]) for each in x]
        made = model(batch if len(batch) > 1 else batch[0], training=False)
        found.append([np.asarray(each) for each in (made if isinstance(made, (list, tuple)) else [made])])
    for at, parts in enumerate(zip(*found, strict=True)):
        np.save(os.path.join(folder, f"{name}-output{at}.npy"), np.concatenate(parts))


def _converted(model, job: dict) -> bytes:
    import tensorflow as tf

    specs = [
        tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype, name=f"input_{at}")
        for at, tensor in enumerate(model.inputs)
    ]

    def call(*tensors):
        made = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return [tf.identity(each) for each in tf.nest.flatten(made)]

    function = tf.function(call, autograph=False).get_concrete_function(*specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if not job["float_io"]:
        converter.inference_input_type = converter.inference_output_type = tf.int8
    try:
        return bytes(converter.convert())
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(
            f"TensorFlow's converter failed on the trained network: {(lines or ['?'])[0][:300]}"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
