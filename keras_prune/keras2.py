"""A network's description as Keras 2 wrote it into .h5 files, rewritten so that Keras 3 builds the same network.

Plain dictionaries in, plain dictionaries out; nothing is built or run here.
"""

from __future__ import annotations

MODELS = ("Functional", "Model", "Sequential")
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
_RECURRENT = ("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
_ANY = None


class Unfit(ValueError):
    """Something in a file without an equal in Keras 3; the message says what."""


# Arguments that Keras 2 wrote and Keras 3 refuses, with the values at which they change nothing.
_IDLE = (
    ((*_DEPTHWISE, *_TRANSPOSED), "groups", (1,)),
    (_DEPTHWISE, "kernel_initializer", _ANY),
    (_DEPTHWISE, "kernel_regularizer", _ANY),
    (_DEPTHWISE, "kernel_constraint", _ANY),
    (_RECURRENT, "time_major", (False,)),
    (("MultiHeadAttention",), "query_shape", _ANY),
    (("MultiHeadAttention",), "key_shape", _ANY),
    (("MultiHeadAttention",), "value_shape", _ANY),
    (("BatchNormalization",), "fused", _ANY),
    (("BatchNormalization",), "virtual_batch_size", (None,)),
)
_CLASSES = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",  # how statistics are gathered, not what they do
}
_FUNCTIONS = {"hard_swish": "hard_silu", "swish": "silu", "relu6": "relu6"}  # users' own, known by these names
_POLICIES = ("Policy", "PolicyV1", "PolicyV2")
_ACTIVATIONS = {
    "nn.relu": "relu",
    "nn.relu6": "relu6",
    "nn.silu": "silu",
    "nn.elu": "elu",
    "nn.selu": "selu",
    "nn.softplus": "softplus",
    "math.sigmoid": "sigmoid",
    "nn.sigmoid": "sigmoid",
    "math.tanh": "tanh",
    "nn.tanh": "tanh",
}
_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE = (
    ("__operators__.add", "math.add"),
    ("math.subtract",),
    ("math.multiply",),
    ("math.truediv", "math.divide"),
)


def mended(config: dict) -> tuple[dict, tuple[str, ...]]:
    """The same network in Keras 3's words, and what was changed. `config` itself stays as it is.

    Args:
        config: {"class_name": ..., "config": ...}, the content of the file's attribute `model_config`.

    Returns:
        config, notes: without notes nothing had to be mended and Keras reads the file alone.

    Raises:
        Unfit: something without an equal in Keras 3, by layer name.
    """
    notes: dict[str, None] = {}  # an ordered set
    return _mended(config, notes), tuple(notes)


def renamed(config: dict) -> dict[str, str]:
    """{name in the file: name in Keras 3} of the layers of one model; nested models have their own."""
    taken: set[str] = set()
    names = [_name(layer) for layer in _layers(config)]
    new = {name: name for name in names if "/" not in name}
    taken.update(new)
    for name in names:
        if name in new:
            continue
        candidate, number = name.replace("/", "_"), 1
        while candidate in taken:
            candidate, number = f"{name.replace('/', '_')}_{number}", number + 1
        new[name] = candidate
        taken.add(candidate)
    return new


def changed_meaning(config) -> list[str]:
    """Names of layers with an activation that Keras 3 knows by the same name and computes otherwise.

    hard_sigmoid was clip(0.2 x + 0.5, 0, 1) and is clip(x / 6 + 0.5, 0, 1).
    """
    if isinstance(config, list):
        return [name for item in config for name in changed_meaning(item)]
    if not isinstance(config, dict):
        return []
    found = [name for item in config.values() for name in changed_meaning(item)]
    values = [config.get(key) for key in ("activation", "recurrent_activation")]
    if any((v.get("config") if isinstance(v, dict) else v) == "hard_sigmoid" for v in values):
        found.append(str(config.get("name")))
    return found


def _layers(config: dict) -> list[dict]:
    inner = config["config"]
    return inner if isinstance(inner, list) else inner.get("layers", [])  # a list: Sequential before Keras 2.2


def _name(layer: dict) -> str:
    return layer.get("name") or layer["config"].get("name") or layer["class_name"].lower()


def _mended(thing, notes: dict):
    """From the outside in: a model names its layers before they are mended themselves."""
    if isinstance(thing, list):
        return [_mended(item, notes) for item in thing]
    if not isinstance(thing, dict):
        return thing
    if thing.get("class_name") == "__tuple__" and "items" in thing:
        return [_mended(item, notes) for item in thing["items"]]
    if "class_name" in thing and "config" in thing:
        thing = _mended_object(thing, notes)
        if not isinstance(thing, dict):
            return thing
    return {key: _mended(value, notes) for key, value in thing.items()}


def _mended_object(thing: dict, notes: dict):
    kind, config = thing["class_name"], thing["config"]
    if kind == "function" and thing.get("module") in (None, "builtins") and config in _FUNCTIONS:
        if config != "relu6":  # which Keras finds without help
            notes[f"{config} read as Keras's {_FUNCTIONS[config]}"] = None
        return _FUNCTIONS[config]
    if kind in _POLICIES:
        notes[f"dtype policy {config['name']} passed by name"] = None
        return config["name"]
    if kind in _CLASSES:
        notes[f"{kind} read as {_CLASSES[kind]}"] = None
        thing = {**thing, "class_name": _CLASSES[kind]}
    if str(thing.get("module")).startswith(("tensorflow.", "tf_keras.", "tf.")):
        notes["module names of TensorFlow dropped"] = None
        thing = {key: value for key, value in thing.items() if key not in ("module", "registered_name")}
    if kind in MODELS:
        return _mended_model(thing, notes)
    return _mended_layer(thing, notes) if isinstance(config, dict) else thing


def _mended_layer(thing: dict, notes: dict) -> dict:
    kind, config = thing["class_name"], dict(thing["config"])
    for kinds, argument, harmless in _IDLE:
        if kind in kinds and argument in config:
            value = config.pop(argument)
            if harmless is not _ANY and value not in harmless:
                raise Unfit(
                    f"layer {config.get('name')!r} ({kind}) was saved with {argument}={value!r}, which Keras 3 has no "
                    "argument for."
                )
            notes[f"arguments of old dropped from {kind}"] = None
    if kind == "ThresholdedReLU":
        notes["ThresholdedReLU read as ReLU(threshold=...)"] = None
        kind, config["threshold"] = "ReLU", float(config.pop("theta", 1.0))
    if kind == "BatchNormalization" and isinstance(config.get("axis"), list) and len(config["axis"]) == 1:
        config["axis"] = int(config["axis"][0])  # Keras does this too, but not inside wrappers
    elif "axis" in config and (config["axis"] is None or isinstance(config["axis"], list) and len(config["axis"]) != 1):
        # Keras drops such an axis from layers that carry no module name and takes the default instead.
        notes[f"axis={config['axis']} of {kind} kept"] = None
        thing = {**thing, "module": "keras.layers"}
    if kind in ("Attention", "AdditiveAttention") and "score_mode" in config and "module" not in thing:
        notes[f"score_mode of {kind} kept"] = None  # Keras would take "dot" for its function of that name
        thing = {**thing, "module": "keras.layers"}
    for key in ("layer", "backward_layer", "cell", "cells"):
        if key in config:
            config[key] = _with_module(config[key], f"the {key} inside {kind} given the module", notes)
    if kind != "InputLayer" and "batch_input_shape" in config:
        del config["batch_input_shape"]  # an InputLayer says it
        if "module" in thing:  # from other layers Keras takes it itself
            notes["argument batch_input_shape dropped"] = None
    if "/" in str(config.get("name")):  # inside wrappers; a model has named its own layers already
        config["name"] = config["name"].replace("/", "_")
    return {**thing, "class_name": kind, "config": config}


def _with_module(inner, note: str, notes: dict):
    """Layers inside wrappers are only found by Keras with the module they are in today."""
    if isinstance(inner, list):
        return [_with_module(item, note, notes) for item in inner]
    is_model = isinstance(inner, dict) and inner.get("class_name") in MODELS
    if not isinstance(inner, dict) or "class_name" not in inner or ("module" in inner and not is_model):
        return inner
    notes[note] = None
    home = {"module": "keras.models" if is_model else "keras.layers", "registered_name": None}
    return {**inner, **home, "class_name": "Model" if inner["class_name"] == "Functional" else inner["class_name"]}


def _mended_model(thing: dict, notes: dict) -> dict:
    names, layers = renamed(thing), [dict(layer) for layer in _layers(thing)]
    config = dict(thing["config"]) if isinstance(thing["config"], dict) else {"name": "sequential"}
    old_name = str(config.get("name") or "model")
    config["name"] = old_name.replace("/", "_")
    if any("/" in name for name in (old_name, *names)):
        notes["'/' in names replaced by '_'"] = None
    if thing["class_name"] == "Sequential":
        config["layers"] = _with_input(layers, notes)
    else:
        nested = {_name(layer): layer["class_name"] for layer in layers if layer["class_name"] in MODELS}
        config["layers"] = [_mended_calls(_without_operation(layer, notes), names, nested, notes) for layer in layers]
        for key in ("input_layers", "output_layers"):
            tensors = _outer(config[key], names, nested, notes)
            # Keras 2 wrote a list of one for a single tensor; Keras 3 would take and return lists.
            config[key] = tensors[0] if len(tensors) == 1 and isinstance(tensors, list) else tensors
    for layer in config["layers"]:
        name = names.get(_name(layer), _name(layer))
        inner = layer["config"]
        layer["config"] = {**inner, "name": name} if isinstance(inner, dict) else {"name": name, "layers": inner}
        if "name" in layer:
            layer["name"] = name
    return {**thing, "config": config}


def _with_input(layers: list[dict], notes: dict) -> list[dict]:
    """A Sequential that begins with an InputLayer: the oldest files wrote the shape into the first layer."""
    first = layers[0] if layers else {}
    inner = first.get("config")
    if first.get("class_name") in ("InputLayer", *MODELS) or not isinstance(inner, dict):
        return layers
    if "batch_input_shape" not in inner:
        return layers
    notes["InputLayer written out"] = None
    kind = "int32" if first["class_name"] == "Embedding" else "float32"
    shape = {
        "batch_shape": inner["batch_input_shape"],
        "dtype": kind,
        "name": f"{_name(first).replace('/', '_')}_input",
    }
    return [{"class_name": "InputLayer", "config": shape}, *layers]


def _is_tensor(thing) -> bool:
    """Whether a value is [layer, call, output], as Keras 2 wrote a tensor, perhaps with the call's arguments."""
    return isinstance(thing, list) and len(thing) in (3, 4) and isinstance(thing[0], str) and isinstance(thing[1], int)


def _listed(node: list) -> list:
    """A call's tensors as a list: Keras 2 wrote a single one for a TensorFlow operation without brackets."""
    return [node] if _is_tensor(node) else node


def _outer(tensors, names: dict, nested: dict, notes: dict):
    """Inputs or outputs of a model. For a nested Functional, Keras itself counts from 1 here, for a Sequential not."""
    if isinstance(tensors, dict):
        return {key: _outer(value, names, nested, notes) for key, value in tensors.items()}
    if not _is_tensor(tensors):
        return [_outer(value, names, nested, notes) for value in tensors]
    name, call, output = tensors[:3]
    if nested.get(name) == "Sequential" and call:
        notes["calls of nested models counted from 0"] = None
        call -= 1
    return [names.get(name, name), call, output]


def _tensor(reference: list, names: dict, nested: dict, notes: dict) -> dict:
    """A reference in Keras 3's form. Keras looks only at the history; shape and dtype are place-holders.

    Keras 2 counted the calls of a nested model from 1, as its own building was call 0.
    """
    name, call, output = reference[:3]
    if name == "_CONSTANT_VALUE" or name not in names:
        raise Unfit(f"a layer takes the constant {str(output)[:60]}, which Keras 3 cannot store in an .h5 file.")
    if name in nested and call:
        notes["calls of nested models counted from 0"] = None
        call -= 1
    history = {"shape": [None], "dtype": "float32", "keras_history": [names[name], call, output]}
    return {"class_name": "__keras_tensor__", "config": history}


def _mended_calls(layer: dict, names: dict, nested: dict, notes: dict) -> dict:
    """A layer of a Functional model with each call as arguments and keywords."""

    def tensors(thing):
        if _is_tensor(thing):
            return _tensor(thing, names, nested, notes)
        if isinstance(thing, list):
            return [tensors(item) for item in thing]
        return {key: tensors(value) for key, value in thing.items()} if isinstance(thing, dict) else thing

    def call(node):
        if not isinstance(node, list):
            return node  # Keras 3 wrote it
        node = _listed(node)
        keywords = node[0][3] if _is_tensor(node[0]) and len(node[0]) == 4 else {}
        inputs = [tensors(item) for item in node]
        known = {key: tensors(value) for key, value in keywords.items() if value is not None}
        if any(known[key] != keywords[key] for key in known):
            notes["tensors among the keywords of a call linked"] = None
        if len(inputs) > 1 and layer["class_name"] in (*_RECURRENT, "Bidirectional"):
            notes["initial states passed by keyword"] = None
            inputs, known["initial_state"] = inputs[:1], inputs[1:]
        return {"args": [inputs[0] if len(inputs) == 1 else inputs], "kwargs": known}

    return {**layer, "inbound_nodes": [call(node) for node in layer.get("inbound_nodes", [])]}


def _without_operation(layer: dict, notes: dict) -> dict:
    """TensorFlow operations that were stored as layers become the Keras layer that computes the same.

    Raises:
        Unfit: no such layer is known here.
    """
    if layer["class_name"] not in ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer"):
        return layer
    function, nodes = str(layer["config"].get("function")), [_listed(n) for n in layer.get("inbound_nodes", [])]
    found = None
    if layer["class_name"] == "TFOpLambda" and len(nodes) == 1 and all(_is_tensor(item) for item in nodes[0]):
        found = _as_layer(function, nodes[0])
    if found is None:
        raise Unfit(
            f"layer {_name(layer)!r} ({layer['class_name']}) is a bare TensorFlow operation, {function}, which Keras 3 "
            "cannot run. Rebuild the network with a Keras layer or keras.ops in its place and load the weights with "
            "model.load_weights."
        )
    kind, config, node = found
    notes[f"tf.{function.replace('__operators__.', '')} read as {kind}"] = None
    dtype = layer["config"].get("dtype", "float32")
    return {
        **layer,
        "class_name": kind,
        "config": {**config, "name": _name(layer), "dtype": dtype},
        "inbound_nodes": [node],
    }


def _as_layer(function: str, node: list) -> tuple[str, dict, list] | None:
    """(class, arguments, node) of the layer that computes a TensorFlow function, if there is one."""
    keywords = {k: v for k, v in (node[0][3] if len(node[0]) == 4 else {}).items() if k != "name" and v is not None}
    inputs = [item[:3] for item in node]
    if function == "concat" and set(keywords) == {"axis"}:
        return "Concatenate", keywords, inputs
    if len(inputs) != 1:
        return None
    if function in _ACTIVATIONS and not keywords:
        return "Activation", {"activation": _ACTIVATIONS[function]}, inputs
    if set(keywords) != {"y"} or function not in (*_ADD, *_SUBTRACT, *_MULTIPLY, *_DIVIDE):
        return None
    (first,), y = inputs, keywords["y"]
    if first[0] == "_CONSTANT_VALUE":
        return _of_constant_and_tensor(function, first[2], y)
    if _is_tensor(y):
        kind = {_ADD: "Add", _SUBTRACT: "Subtract", _MULTIPLY: "Multiply"}
        known = [name for functions, name in kind.items() if function in functions]
        return (known[0], {}, [first, y]) if known else None
    if not isinstance(y, (int, float)):
        return None
    scale, offset = {_ADD: (1.0, y), _SUBTRACT: (1.0, -y), _MULTIPLY: (y, 0.0)}.get(
        next((f for f in (_ADD, _SUBTRACT, _MULTIPLY) if function in f), ()), (1.0 / y if y else None, 0.0)
    )
    return None if scale is None else ("Rescaling", {"scale": scale, "offset": offset}, inputs)


def _of_constant_and_tensor(function: str, constant, tensor) -> tuple[str, dict, list] | None:
    if not isinstance(constant, (int, float)) or not _is_tensor(tensor) or function in _DIVIDE:
        return None
    scale, offset = (constant, 0.0) if function in _MULTIPLY else (-1.0 if function in _SUBTRACT else 1.0, constant)
    return "Rescaling", {"scale": scale, "offset": offset}, [tensor]
