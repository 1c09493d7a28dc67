"""Layers with a matrix in them: Dense, EinsumDense, Embedding, attention."""

from __future__ import annotations

import math

from keras_prune.rules.activations import activate
from keras_prune.rules.language import Labels, rule, varying


@rule("Dense")
def dense(layer, call, x):
    out = call.fresh(layer.units)
    activate(call, out, layer.activation)
    return Labels(call.spread(out, -1), {"kernel": (call.along(x, -1), out), "bias": (out,)}, {"units": out})


@rule("Embedding")
def embedding(layer, call, x):
    out = call.fresh(layer.output_dim)
    return Labels(call.spread(out, -1), {"embeddings": (None, out)}, {"output_dim": out})


@rule("EinsumDense")
def einsum_dense(layer, call, x):
    """Units come in on one letter. They pass where that letter is kept; else the first new letter makes new ones."""
    source, kernel, target = _terms(layer.equation, x.ndim, len(call.outputs[0]))
    size = dict(zip(source[1:], call.lengths(x)))
    positions = math.prod(n for c, n in size.items() if c not in kernel)
    size.update(zip(kernel, layer.kernel.shape))
    letter = next((source[a] for a in varying(x)), None)
    if letter is None:
        call.freeze(x)
    elif letter not in kernel + target:
        call.fence(x, f"equation {layer.equation!r} sums over its units")
        letter = None
    ids = {letter: x.ravel()} if letter else {}
    if letter is None or letter not in target:
        letter = next((c for c in target if c not in source and size[c] > 1), None)
        if letter is None:
            return Labels(call.frozen(), {"kernel": tuple(ids.get(c) for c in kernel)}, positions=positions)
        ids[letter] = call.fresh(size[letter])
    out = ids[letter]
    activate(call, out, layer.activation)
    axis = target.index(letter)
    weights = {"kernel": tuple(ids.get(c) for c in kernel)}
    if layer.bias is not None:
        tail = target[-len(layer.bias.shape) :]
        weights["bias"] = tuple(out if c == letter and n > 1 else None for c, n in zip(tail, layer.bias.shape))
        if all(ids is None for ids in weights["bias"]):  # what is added along other letters makes a zero a number
            call.loud(out)
    shape = [layer.partial_output_shape] if isinstance(layer.partial_output_shape, int) else layer.partial_output_shape
    place = axis - (len(target) - len(shape)) if layer.equation.strip().startswith("...") else axis - 1

    def output_shape(survivors):
        return [survivors(out) if i == place and n is not None else n for i, n in enumerate(shape)]

    return Labels(call.spread(out, axis), weights, {"output_shape": output_shape}, positions=positions)


def _terms(equation: str, rank: int, out_rank: int) -> tuple[str, str, str]:
    """('0xy', 'yz', '0xz') with letters that stand in no kernel for the ellipsis."""
    source, kernel, target = equation.replace(" ", "").replace("...", "0").replace("->", ",").split(",")
    return _named_ellipsis(source, rank), kernel, _named_ellipsis(target, out_rank)


def _named_ellipsis(term: str, rank: int) -> str:
    return term.replace("0", "αβγδεζηθ"[: rank - len(term) + 1])


@rule("MultiHeadAttention")
def attention(layer, call, *_):
    """A unit is a head: it leaves from the query, key, value and output kernels together."""
    given = {**dict(zip(("query", "value", "key"), call.args)), **call.kwargs}
    query, value = given["query"], given["value"]
    key = given["key"] if given.get("key") is not None else value
    for other in call.inputs:
        if not any(other is x for x in (query, key, value)):
            call.fence(other, "is a mask of the attention layer")
    heads = call.fresh(layer.num_heads)
    weights, positions = {}, {}
    for name, x in (("query", query), ("key", key), ("value", value), ("gate", query)):
        weights[f"_{name}_dense.kernel"] = (call.along(x, -1), heads, None)
        weights[f"_{name}_dense.bias"] = (heads, None)
        positions[f"_{name}_dense.kernel"] = math.prod(call.lengths(x)[:-1])
    config, out = {"num_heads": heads}, call.frozen()
    out = out if isinstance(out, list) else [out]
    shape = layer.output_dense.kernel.shape[2:]
    if len(shape) == 1:
        made = call.fresh(shape[0])
        config["output_shape"] = made
        out[0] = call.spread(made, -1)
        weights["_output_dense.bias"] = (made,)
    weights["_output_dense.kernel"] = (heads, None, *([made] if len(shape) == 1 else [None] * len(shape)))
    positions["_output_dense.kernel"] = positions["_query_dense.kernel"]
    if len(out) > 1:  # the scores: one picture per head, uniform where a head is zero
        out[1] = call.spread(heads, -1 - 2 * len(layer.attention_axes), 1)
        call.loud(heads)
    attended = math.prod(call.lengths(value)[a - 1] for a in layer.attention_axes)
    factor = positions["_query_dense.kernel"] * attended * (layer.key_dim + layer.value_dim)
    out = out if len(out) > 1 else out[0]
    products = (([heads], factor),)
    return Labels(out, weights, config, positions=positions, products=products, reads=("_output_dense.kernel",))
