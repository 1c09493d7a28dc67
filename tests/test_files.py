"""Files of Keras 2 are made here from files of Keras 3 by rewriting them as Keras 2 wrote; no old Keras is needed."""

import json
import os
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from keras_prune import files, keras2


def mobile(slash="-"):
    inputs = keras.Input((12, 12, 3), name="in")
    x = layers.Conv2D(4, 3, use_bias=False, name=f"block{slash}conv")(inputs)
    x = layers.BatchNormalization(name=f"block{slash}bn")(x)
    y = layers.DepthwiseConv2D(3, padding="same", name="dw")(layers.ReLU(6.0)(x))
    x = layers.Add()([x, layers.SeparableConv2D(4, 3, padding="same")(y)])
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)), name="mobile")


def recurrent():
    inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(inputs)
    x = layers.TimeDistributed(layers.Dense(4))(layers.GRU(5, return_sequences=True)(x))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 3)(x, x))


def nested():
    """One inner model called twice; reading call 1 as call 2 gives other numbers without an error."""
    inner_in = keras.Input((5,))
    inner = keras.Model(inner_in, layers.Dense(5, "tanh", name="in-dense")(inner_in), name="in-ner")
    a, b = keras.Input((5,)), keras.Input((5,))
    u, v = inner(a), inner(b)
    return keras.Model([a, b], [layers.Dense(3)(u), v])


def sequential():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.BatchNormalization()], name="in-ner")
    return keras.Sequential([keras.Input((4,)), layers.Dense(6, name="a-b"), inner, layers.Dense(2)])


MODELS = {f.__name__: f for f in (mobile, recurrent, nested, sequential)}
NEW_ARGUMENTS = {
    "DepthwiseConv2D": {"groups": 1},
    "SeparableConv2D": {"groups": 1, "kernel_initializer": {"class_name": "Zeros", "config": {}}},
    "LSTM": {"time_major": False},
    "GRU": {"time_major": False},
    "MultiHeadAttention": {"query_shape": [None, 6, 4], "key_shape": [None, 6, 4], "value_shape": [None, 6, 4]},
    "BatchNormalization": {"axis": [-1]},
}


def randomised(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        low, high = (0.5, 2) if "variance" in weight.path else (-0.7, 0.7)
        weight.assign(rng.uniform(low, high, weight.shape))
    return model


def old_reference(tensor, nested_names):
    name, call, output = tensor["config"]["keras_history"]
    return [name, call + (name in nested_names), output]


def old_node(node, nested_names):
    """A call as Keras 2 wrote it: [[layer, call, output, keywords], ...]."""

    def is_tensor(thing):
        return isinstance(thing, dict) and thing.get("class_name") == "__keras_tensor__"

    first, *others = node["args"]
    keywords = {k: v for k, v in node["kwargs"].items() if v is not None}
    if others:  # the second argument of MultiHeadAttention
        keywords["value"] = others[0]
    keywords = {k: old_reference(v, nested_names) if is_tensor(v) else v for k, v in keywords.items()}
    inputs = [first] if is_tensor(first) else first
    return [[*old_reference(tensor, nested_names), keywords if i == 0 else {}] for i, tensor in enumerate(inputs)]


def old_config(thing, changes):
    """A description in the words of Keras 2, as far as `changes` says; '-' in names becomes '/'."""
    if isinstance(thing, list):
        return [old_config(item, changes) for item in thing]
    if isinstance(thing, str) and "slashes" in changes:
        return thing.replace("-", "/")
    if not isinstance(thing, dict):
        return thing
    if "layers" in thing.get("config", {}) and thing["class_name"] != "Sequential" and "nodes" in changes:
        config = thing["config"]
        nested_names = [layer["name"] for layer in config["layers"] if "layers" in layer["config"]]
        layers_ = [
            {**layer, "inbound_nodes": [old_node(node, nested_names) for node in layer["inbound_nodes"]]}
            for layer in config["layers"]
        ]
        single = {key: config[key] for key in ("input_layers", "output_layers") if isinstance(config[key][0], str)}
        thing = {**thing, "config": {**config, "layers": layers_, **{key: [value] for key, value in single.items()}}}
    if "arguments" in changes and thing.get("class_name") in NEW_ARGUMENTS:
        thing = {**thing, "config": {**thing["config"], **NEW_ARGUMENTS[thing["class_name"]]}}
    return {key: old_config(value, changes) for key, value in thing.items()}


def as_keras_2(path, changes):
    """Rewrite an .h5 file of Keras 3 in place: its description, and the names under which weights lie."""
    with h5py.File(path, "r+") as file:
        config = old_config(json.loads(file.attrs["model_config"]), changes)
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.13.1"
        if "slashes" not in changes:
            return
        group = file["model_weights"]
        contents = {
            name: {w: group[name][w][()] for w in group[name].attrs["weight_names"]}
            for name in group.attrs["layer_names"]
        }
        del file["model_weights"]
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.replace("-", "/") for name in contents]
        for name, weights in contents.items():
            inner = group.require_group(name.replace("-", "/"))
            inner.attrs["weight_names"] = [w.replace("-", "/") + ":0" for w in weights]
            for weight, value in weights.items():
                inner[weight.replace("-", "/") + ":0"] = value


def saved(tmp_path, name, changes):
    model = randomised(MODELS[name]())
    path = str(tmp_path / "old.h5")
    model.save(path)
    as_keras_2(path, changes)
    return model, path


def outputs(model):
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    result = model(x if len(x) > 1 else x[0], training=False)
    return [np.asarray(y) for y in keras.tree.flatten(result)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:.*HDF5.*", "ignore:Do not pass an `input_shape`")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes", [("arguments",), ("nodes",), ("slashes", "nodes"), ("arguments", "slashes", "nodes")], ids=str
)
def test_a_keras_2_file_gives_the_same_outputs(tmp_path, name, changes):
    model, path = saved(tmp_path, name, changes)
    said = []
    assert equal(outputs(files.load_model(path, say=said.append)), outputs(model))
    if len(changes) == 3:
        assert len(said) == 1 and "Keras 2" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mobile", ("arguments",)),
        ("mobile", ("slashes", "nodes")),
        ("recurrent", ("arguments",)),
        ("sequential", ("slashes",)),
    ],
)
def test_keras_itself_refuses_these_files(tmp_path, name, changes):
    _, path = saved(tmp_path, name, changes)
    with pytest.raises((ValueError, TypeError)):
        keras.saving.load_model(path, compile=False)


def test_keras_itself_reads_another_network_from_a_model_called_twice(tmp_path):
    model, path = saved(tmp_path, "nested", ("nodes",))
    assert not equal(outputs(keras.saving.load_model(path, compile=False)), outputs(model))
    assert equal(outputs(files.load_model(path)), outputs(model))


def test_a_file_that_needs_no_mending_stays_compiled_and_nothing_is_said(tmp_path):
    model = mobile()
    model.compile("adam", keras.losses.MeanSquaredError())
    model.save(tmp_path / "new.h5")
    said = []
    assert files.load_model(str(tmp_path / "new.h5"), say=said.append).compiled and said == []


def test_a_missing_or_misshapen_weight_is_named_and_no_model_returned(tmp_path):
    _, path = saved(tmp_path, "mobile", ("arguments",))
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]["dw"]
        name = group.attrs["weight_names"][0]
        value = group[name][()]
        del group[name]
        group[name] = value[:2]
    with pytest.raises(ValueError, match=r"'dw' expects dw/kernel of shape \(3, 3, 4, 1\).*\(2, 3, 4, 1\)"):
        files.load_model(path)
    with h5py.File(path, "r+") as file:
        file["model_weights"]["dw"].attrs["weight_names"] = []
    with pytest.raises(ValueError, match="no values for dw/"):
        files.load_model(path)


def test_weights_in_another_order_are_seen_by_their_names(tmp_path):
    _, path = saved(tmp_path, "mobile", ("arguments",))
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]["block-bn"]
        names = list(group.attrs["weight_names"])
        group.attrs["weight_names"] = [names[1], names[0], *names[2:]]  # equal shapes
    with pytest.raises(ValueError, match="expects block-bn/gamma .* holds block-bn/beta"):
        files.load_model(path)


def test_weights_that_lie_in_another_file_are_refused(tmp_path):
    _, path = saved(tmp_path, "mobile", ("arguments",))
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        group = file["model_weights"]["dw"]
        name = group.attrs["weight_names"][0]
        other["secret"] = group[name][()]
        del group[name]
        group[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
    with pytest.raises(ValueError, match="lies in another file"):
        files.load_model(path)


def test_names_that_would_collide_stay_apart():
    config = {"class_name": "Sequential", "config": {"layers": [{"name": n} for n in ("a/b", "a_b", "a_b_1", "c")]}}
    assert keras2.renamed(config) == {"a_b": "a_b", "a_b_1": "a_b_1", "c": "c", "a/b": "a_b_2"}


def test_mending_leaves_its_input_alone_and_has_nothing_to_say_of_a_new_file():
    config = {"class_name": "Functional", "config": json.loads(mobile().to_json())["config"]}
    before = json.dumps(config)
    assert keras2.mended(config)[1] == () and json.dumps(config) == before
    old = old_config(config, ("arguments", "slashes"))
    before = json.dumps(old)
    assert keras2.mended(old)[1] != () and json.dumps(old) == before


def operation_file(tmp_path, function, keywords):
    """relu(x) replaced by a stored TensorFlow operation."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(layers.ReLU(name="op")(layers.Dense(5)(inputs))))
    randomised(model).save(tmp_path / "op.h5")
    as_keras_2(tmp_path / "op.h5", ("nodes",))
    with h5py.File(tmp_path / "op.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layer = config["config"]["layers"][2]
        layer["class_name"], layer["config"] = "TFOpLambda", {"name": "op", "dtype": "float32", "function": function}
        ((tensor,),) = layer["inbound_nodes"]
        layer["inbound_nodes"] = [[*tensor[:3], keywords]]
        file.attrs["model_config"] = json.dumps(config)
    return model, str(tmp_path / "op.h5")


@pytest.mark.parametrize(
    "function, keywords, oracle",
    [
        ("nn.relu6", {"name": None}, lambda x: np.clip(x, 0, 6)),
        ("__operators__.add", {"y": 3.0, "name": None}, lambda x: x + 3),
        ("math.subtract", {"y": 0.5}, lambda x: x - 0.5),
        ("math.multiply", {"y": 1 / 6}, lambda x: x / 6),
        ("math.truediv", {"y": 127.5}, lambda x: x / 127.5),
    ],
)
def test_tensorflow_operations_become_layers(tmp_path, function, keywords, oracle):
    model, path = operation_file(tmp_path, function, keywords)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32") * 5
    first, last = model.layers[1], model.layers[3]
    expected = np.asarray(last(oracle(np.asarray(first(x)))))
    assert np.abs(np.asarray(files.load_model(path)(x)) - expected).max() < 1e-5


def test_an_operation_without_a_layer_is_named(tmp_path):
    _, path = operation_file(tmp_path, "math.top_k", {"k": 2})
    with pytest.raises(ValueError, match=r"'op' \(TFOpLambda\).*math.top_k"):
        files.load_model(path)


def test_what_changed_its_meaning_is_refused_not_read_silently(tmp_path):
    inputs = keras.Input((6,))
    keras.Model(inputs, layers.Dense(3, "hard_sigmoid", name="gate")(inputs)).save(tmp_path / "gate.h5")
    assert files.load_model(str(tmp_path / "gate.h5")) is not None  # written by Keras 3 it is what it says
    as_keras_2(tmp_path / "gate.h5", ())
    with pytest.raises(ValueError, match="gate.*hard_sigmoid"):
        files.load_model(str(tmp_path / "gate.h5"))


def test_an_argument_that_does_something_is_refused(tmp_path):
    _, path = saved(tmp_path, "mobile", ("arguments",))
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"groups": 1', '"groups": 2')
    with pytest.raises(ValueError, match="groups=2"):
        files.load_model(path)


def test_code_in_an_old_file_is_not_run_unless_asked(tmp_path):
    inputs = keras.Input((8,))
    x = layers.Lambda(lambda t: t + 1, name="my-code")(inputs)
    keras.Model(inputs, layers.Dense(2)(x)).save(tmp_path / "code.h5")
    as_keras_2(tmp_path / "code.h5", ("slashes", "nodes"))
    with pytest.raises(ValueError, match="--unsafe"):
        files.load_model(str(tmp_path / "code.h5"))
    assert files.load_model(str(tmp_path / "code.h5"), unsafe=True) is not None


def test_weights_alone_and_rubbish_are_told_apart(tmp_path):
    mobile().save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "b.h5").write_bytes(b"no HDF5" * 100)
    with pytest.raises(ValueError, match="weights only"):
        files.load_model(str(tmp_path / "a.weights.h5"))
    with pytest.raises(ValueError, match="cut off or no Keras file"):
        files.load_model(str(tmp_path / "b.h5"))


def test_a_published_file_of_keras_2_equals_its_keras_3_version():
    """The streaming wake-word network of MLPerf Tiny, where KERAS_PRUNE_DATA has it in both formats."""
    folder = Path(os.environ.get("KERAS_PRUNE_DATA", "")) / "mlperf_tiny"
    old, new = folder / "legacy_h5" / "str_ww_ref_model.h5", folder / "streaming_wakeword.keras"
    if not old.is_file() or not new.is_file():
        pytest.skip("no mlperf_tiny in KERAS_PRUNE_DATA")
    with pytest.raises(TypeError):
        keras.saving.load_model(old, compile=False)
    a, b = (files.load_model(str(path), say=lambda text: None) for path in (old, new))
    assert equal(a.get_weights(), b.get_weights()) and equal(outputs(a), outputs(b))
