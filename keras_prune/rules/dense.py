"""Layers with a matrix in them: Dense, EinsumDense, Embedding, attention."""

from __future__ import annotations

import math

import numpy as np

from keras_prune.rules.activations import activate
from keras_prune.rules.language import Labels, rule


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
    """One letter read and one letter written carry the units; the kernel's other letters stay whole."""
    terms = layer.equation.replace(" ", "").replace("...", "0").replace("->", ",").split(",")
    source, kernel, target = terms
    if "0" in layer.equation.replace("...", "0"):
        source, target = (_named_ellipsis(t, n) for t, n in ((source, x.ndim), (target, len(call.outputs[0]))))
    new = [c for c in kernel if c in target and c not in source]
    read = [c for c in kernel if c in source and c not in target]
    both = [c for c in kernel if c in source and c in target]
    if len(new) != 1 or len(read) != 1 or both:
        call.fence(x, f"equation {layer.equation!r} has other than one letter read and one written")
        return Labels(call.frozen())
    out = call.fresh(layer.kernel.shape[kernel.index(new[0])])
    activate(call, out, layer.activation)
    x_ids = call.along(x, source.index(read[0]))
    axes = tuple(out if c == new[0] else x_ids if c == read[0] else None for c in kernel)
    weights = {"kernel": axes}
    if layer.bias is not None:
        tail = target[-len(layer.bias.shape):]
        weights["bias"] = tuple(out if c == new[0] and n > 1 else None for c, n in zip(tail, layer.bias.shape))
    axis = target.index(new[0])
    shape = list(layer.get_config()["output_shape"] if not isinstance(layer.get_config()["output_shape"], int)
                 else [layer.get_config()["output_shape"]])
    place = axis - (len(call.outputs[0]) - len(shape))

    def output_shape(survivors):
        return [survivors(out) if i == place else n for i, n in enumerate(shape)]

    return Labels(call.spread(out, axis), weights, {"output_shape": output_shape})


def _named_ellipsis(term: str, rank: int) -> str:
    """'0xyz' for rank 5 becomes 'ABxyz': letters that stand in no kernel."""
    return term.replace("0", "ABCDEFGH"[: rank - len(term) + 1]) if "0" in term else term


@rule("MultiHeadAttention")
def attention(layer, call, *_):
    """A unit is a head: it leaves from the query, key, value and output kernels together."""
    given = {**dict(zip(("query", "value", "key"), call.args)), **call.kwargs}
    query, value = given["query"], given["value"]
    key = given["key"] if given.get("key") is not None else value
    for other in call.inputs:
        if not any(other is x for x in (query, key, value)):
            call.fence(other, "is a mask of the attention layer")
    if len(layer._output_dense.kernel.shape) != 3:
        call.fence(np.concatenate([i.ravel() for i in (query, key, value)]), "has more than one output dimension")
        return Labels(call.frozen())
    heads = call.fresh(layer._num_heads)
    out = call.fresh(layer._output_dense.kernel.shape[-1])
    weights = {
        "_query_dense.kernel": (call.along(query, -1), heads, None), "_query_dense.bias": (heads, None),
        "_key_dense.kernel": (call.along(key, -1), heads, None), "_key_dense.bias": (heads, None),
        "_value_dense.kernel": (call.along(value, -1), heads, None), "_value_dense.bias": (heads, None),
        "_output_dense.kernel": (heads, None, out), "_output_dense.bias": (out,),
    }
    t, s = (math.prod(call.lengths(ids)[:-1]) for ids in (query, value))
    depth = layer._key_dim + (layer._value_dim or layer._key_dim)
    ids = call.spread(out, -1)
    return Labels(
        ids if len(call.outputs) == 1 else [ids, *call.frozen()[1:]], weights,
        {"num_heads": heads, "output_shape": out}, positions=t, products=(([heads], t * s * depth),),
    )
