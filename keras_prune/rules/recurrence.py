"""Recurrent layers, and the wrappers that run a layer along time."""

from __future__ import annotations

import keras
import numpy as np

from keras_prune.rules.activations import activate, elementwise
from keras_prune.rules.language import Labels, find_rule, rule


@rule("SimpleRNN", "GRU", "LSTM")
def recurrent(layer, call, x, *others):
    """A unit is a cell: its gates' columns, its recurrent row, its state."""
    out = call.fresh(layer.units)
    given = call.kwargs.get("initial_state", call.args[1] if len(call.args) > 1 else None)
    states = [s for s in keras.tree.flatten(given) if s is not None]
    for ids in others:
        if any(ids is s for s in states):
            call.tie(call.along(ids, -1), out)
        else:
            call.fence(ids, "is the mask of a recurrent layer")
    if layer.stateful:
        call.fence(out, "keeps its state between batches")
    activate(call, out, layer.activation)
    gate = getattr(layer, "recurrent_activation", None)
    if gate is not None and not elementwise(gate)[0]:  # what a gate makes of 0 is harmless: the state is 0
        call.fence(out, "its recurrent activation mixes units")
    gates = np.tile(out, layer.cell.kernel.shape[-1] // layer.units)
    weights = {"cell.kernel": (call.along(x, -1), gates), "cell.recurrent_kernel": (out, gates)}
    bias = getattr(layer.cell, "bias", None)
    if bias is not None:
        weights["cell.bias"] = (gates,) if len(bias.shape) == 1 else (None, gates)
    outputs = [call.spread(out, -1, i) for i in range(len(call.outputs))]
    return Labels(outputs[0] if len(outputs) == 1 else outputs, weights, {"units": out}, positions=call.lengths(x)[0])


@rule("Bidirectional")
def bidirectional(layer, call, x, *others):
    """Two recurrent layers of one width: Keras's own shape rule counts on that, so their cells leave in pairs."""
    parts = {"forward_layer": layer.forward_layer, "backward_layer": layer.backward_layer}
    if (
        any(find_rule(part) is not recurrent for part in parts.values())
        or layer.return_state
        or (call.kwargs.get("initial_state") is not None)
    ):
        return None
    labels = {name: recurrent(part, call, x, *others) for name, part in parts.items()}
    weights = {f"{name}.{path}": axes for name in parts for path, axes in labels[name].weights.items()}
    forward, backward = (label.config["units"] for label in labels.values())
    config = {"layer.config.units": forward, "backward_layer.config.units": backward}
    call.tie(forward, backward)
    if layer.merge_mode == "concat":
        out = call.spread(np.concatenate([forward, backward]), -1)
    elif layer.merge_mode is None:
        out = [call.spread(forward, -1, 0), call.spread(backward, -1, 1)]
    else:
        out = call.spread(forward, -1)
    return Labels(out, weights, config, positions=call.lengths(x)[0])


@rule("TimeDistributed")
def time_distributed(layer, call, x, *mask):
    """The inner layer's own rule, for a tensor without the time axis."""
    inner_rule = find_rule(layer.layer)
    if inner_rule is None or x.shape[1] > 1:
        return None
    inner = call.inner(layer.layer, axis=1)
    labels, steps = inner_rule(layer.layer, inner, *inner.inputs), call.lengths(x)[0]
    weights = {f"layer.{path}": axes for path, axes in labels.weights.items()}
    config = {f"layer.config.{key}": value for key, value in labels.config.items()}
    positions = None if labels.positions is None else labels.positions * steps
    return Labels(np.expand_dims(labels.out, 1), weights, config, positions=positions)
