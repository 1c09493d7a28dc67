"""The only file that touches Keras's own insides: graphs, nodes, structures, sublayers."""

from __future__ import annotations

import keras


def check_model(model) -> None:
    """Raise unless `model` is a built graph of layers."""
    if not isinstance(model, keras.Model):
        hint = " (a tf_keras model? Rebuild it in Keras 3.)" if "keras" in type(model).__module__ else ""
        raise TypeError(f"Expected a keras.Model, got {type(model).__name__}{hint}.")
    if is_graph(model):
        return
    if isinstance(model, keras.Sequential):
        raise ValueError(
            f"Sequential model {model.name!r} is not built: its shapes are unknown. Call "
            "model.build((None, height, width, channels)) or put a keras.Input first."
        )
    raise ValueError(
        f"Model {model.name!r} is a subclassed {type(model).__name__}: it has no graph of layers to follow. Build the "
        "network as a Functional or Sequential model; a subclass keras.Model(inputs, outputs) of your own is fine."
    )


def is_graph(operation) -> bool:
    """Whether an operation is a model whose graph can be walked."""
    if isinstance(operation, keras.Sequential):
        return getattr(operation, "_functional", None) is not None
    return isinstance(operation, keras.Model) and hasattr(operation, "_nodes_by_depth")


def graph_of(model):
    """The Functional graph of a Functional or built Sequential model."""
    return model._functional if isinstance(model, keras.Sequential) else model


def nodes_of(graph):
    """Calls of the graph in an order in which inputs come before outputs."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.operation is not None and not node.is_input:
                yield node


def inputs_of(model):
    """The symbolic inputs in the structure in which the model takes them."""
    return graph_of(model)._inputs_struct


def outputs_of(model):
    """The symbolic outputs in the structure in which the model returns them."""
    return graph_of(model)._outputs_struct


def entering(node) -> list:
    """The tensors a nested model is called on, in the order of its inputs."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    given = args[0] if args else kwargs["inputs"]
    if isinstance(given, dict) and not isinstance(inputs_of(node.operation), dict):
        given = [given[t.name] for t in graph_of(node.operation).inputs]  # Keras matches the names
    return keras.tree.flatten(given)


def input_layer_of(tensor):
    """The InputLayer that made a symbolic input."""
    return tensor._keras_history.operation


def origin_of(tensor) -> tuple:
    """(operation, tensors it was called on) of the call that made a symbolic tensor."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def sublayers_of(layer) -> list:
    """The layers directly inside a layer."""
    return layer._layers


def operations_of(model) -> list:
    """Everything in a model's graph that has a name, inputs and what is in nested models included."""
    found = []
    for operation in graph_of(model).operations:
        found += [operation, *(operations_of(operation) if is_graph(operation) else [])]
    return found


def mask_of(tensor):
    """The symbolic mask that goes along with a symbolic tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def layers_of(model) -> list:
    """All layers at any depth, the model itself first."""
    return list(model._flatten_layers())


def compile_arguments_of(model) -> dict:
    """The arguments of the model's compile(), as the objects that were given."""
    return dict(model._compile_config.config)


def variables_of(optimizer) -> list:
    """The variables a built optimizer has slots for."""
    return optimizer._trainable_variables


def rates_of(optimizer):
    """An optimizer's schedule (or function) of learning rates; None where it has a variable."""
    rate = optimizer._learning_rate
    return None if isinstance(rate, keras.Variable) else rate


def config_without_rates(optimizer, holder) -> dict:
    """An optimizer's config without its schedule of learning rates, which may be a user's own that has none.

    Args:
        holder: the optimizer that has the rate: the same, or the one inside.
    """
    rates, holder._learning_rate = holder._learning_rate, 0.0
    try:
        return optimizer.get_config()
    finally:
        holder._learning_rate = rates


def decays(optimizer, variable) -> bool:
    """Whether the optimizer's weight decay acts on a variable."""
    return optimizer._use_weight_decay(variable)


def seeds_of(model) -> list:
    """The states of all random number generators inside a model."""
    return [v for layer in layers_of(model) for v in layer.variables if v.name == "seed_generator_state"]


def never_cast(variable) -> None:
    """From now on a variable is read as it is stored, also in a layer that computes in half precision."""
    variable._autocast = False


def updates_now(optimizer):
    """Whether the step that is being taken changes the weights (1 or True), or only accumulates gradients."""
    steps = optimizer.gradient_accumulation_steps
    return (optimizer._iterations + 1) % steps == 0 if steps else 1.0
