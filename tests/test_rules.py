"""Rules: what they may say, what they must not say, and what a fence tells."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import ChannelScale, Unknown, conv, head, image, randomize

import keras_prune
from keras_prune import Channels, Labels, cut
from keras_prune.rules import RULES, find_rule
from keras_prune.rules.activations import elementwise
from keras_prune.rules.language import collapse


def ends(op):
    """conv(8) -> op -> logits."""
    inputs = image()
    return randomize(keras.Model(inputs, head(op(conv(8)(inputs)))))


@pytest.mark.parametrize(
    "function, expected",
    [
        ("relu", (True, True)),
        ("tanh", (True, True)),
        ("sigmoid", (True, False)),
        ("softplus", (True, False)),
        ("softmax", (False, False)),
        ("log_softmax", (False, False)),
        ("glu", (False, False)),
        ("sparsemax", (False, False)),
        (lambda x: x - ops.max(x, axis=-1, keepdims=True), (False, False)),
        (ops.log, (False, False)),
        (lambda x: x * np.arange(6.0).astype("float32"), (False, False)),
        (lambda x: ops.minimum(x, 1.0), (True, True)),
    ],
)
def test_elementwise_is_found_out_by_calling(function, expected):
    """(works on each number alone, maps 0 to 0)."""
    assert elementwise(keras.activations.get(function)) == expected


def test_labels_of_wrong_length_name_the_layer(monkeypatch):
    monkeypatch.setitem(RULES, ChannelScale, lambda layer, call, x: Labels(x, {"scale": (np.arange(3),)}))
    with pytest.raises(ValueError, match=r"labels my_scale.scale with ids of lengths \(3,\).* shape \(8,\)"):
        Channels(ends(ChannelScale(name="my_scale")))


def test_labels_of_wrong_rank_name_the_layer(monkeypatch):
    monkeypatch.setitem(RULES, ChannelScale, lambda layer, call, x: Labels(x, {"scale": (None, None)}))
    with pytest.raises(ValueError, match="my_scale.scale .*one entry per axis"):
        Channels(ends(ChannelScale(name="my_scale")))


def test_a_rule_that_forgets_the_config_is_named(monkeypatch):
    """Labels without `config`: the weight shrinks, the layer is rebuilt at the old width."""
    good = RULES["Dense"]

    def forgets(layer, call, x):
        labels = good(layer, call, x)
        return Labels(labels.out, labels.weights)

    monkeypatch.setitem(RULES, "Dense", forgets)
    inputs = keras.Input((5,))
    channels = Channels(keras.Model(inputs, layers.Dense(2)(layers.Dense(8, name="wide")(inputs))))
    with pytest.raises(ValueError, match="Weight wide/kernel is .* rule for Dense does not rewrite its config"):
        cut(channels, channels.groups[0].units[:4])


def test_rule_takes_classes_and_names_only():
    with pytest.raises(TypeError, match="expected layer classes or names"):
        keras_prune.rule(3)


def test_a_subclass_needs_a_rule_of_its_own():
    class Mine(layers.Conv2D):
        pass

    assert find_rule(layers.Conv2D(2, 3)) is RULES["Conv2D"]
    assert find_rule(Mine(2, 3)) is None


def test_layer_and_operation_of_one_name_are_told_apart():
    inputs = image()
    layer, operation = layers.Add()([inputs, inputs]), inputs + inputs
    assert find_rule(layer._keras_history.operation) is RULES["Add"]
    assert find_rule(operation._keras_history.operation) is RULES["ops.Add"]


@pytest.mark.parametrize(
    "op, word",
    [
        (layers.LayerNormalization(), "mean and variance mix all channels"),
        (layers.Softmax(), "mixes its channels"),
        (Unknown(), "no rule for this type"),
        (lambda x: ops.mean(x, axis=-1), "reduces over its channels"),
        (lambda x: x[..., ::2], "sliced with a step"),
        (lambda x: ops.sqrt(ops.relu(x)), "no rule for this type"),
        (layers.Permute((1, 3, 2)), ""),
    ],
)
def test_a_fence_says_why_once(op, word):
    channels = Channels(ends(op))
    if not word:  # no loss: Flatten follows
        assert channels.fences == [] and len(channels.groups) == 1
        return
    assert len(channels.fences) == 1 and word in channels.fences[0].reason
    assert channels.groups == []


def test_what_costs_nothing_is_no_fence():
    """A softmax over the model's outputs, a norm of the model's inputs, a pooling of a frozen tensor."""
    inputs = image()
    x = layers.LayerNormalization()(inputs)
    x = layers.Softmax()(head(conv(8, activation="relu")(x)))
    model = keras.Model(inputs, [x, layers.UnitNormalization()(layers.GlobalAveragePooling2D()(inputs))])
    channels = Channels(model)
    assert channels.fences == [] and [len(g) for g in channels.groups] == [8]


@pytest.mark.parametrize("called_before", [False, True])
def test_a_layer_with_weights_given_as_activation_is_a_fence_and_is_left_alone(called_before):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, activation=layers.PReLU(), name="first")])
    model.add(layers.Dense(32))
    model.add(layers.Dense(2))
    x = np.ones((2, 8), "float32")
    if called_before:
        model(x)
    small = keras_prune.prune(model, 0.4)
    assert small.get_layer("first").units == 16 and small.layers[1].units < 32
    assert small(x).shape == model(x).shape == (2, 2)  # its PReLU was not built for other shapes


def test_lora_is_a_fence():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, name="low")(layers.Dense(5)(inputs))))
    model.get_layer("low").enable_lora(2)
    channels = Channels(model)
    assert channels.groups == [] and {f.layer for f in channels.fences} == {"low"}


def test_heads_are_made_by_queries_and_read_by_the_output():
    """So that a criterion has rows to score, and soft pruning leaves the reader alone."""
    inputs = keras.Input((5, 6))
    x = layers.MultiHeadAttention(4, 3)(inputs, inputs)
    group = Channels(keras.Model(inputs, head(x))).groups[0]
    assert len(group) == 4
    assert {m.weight.name for m in group.producers} == {f"_{n}_dense.kernel" for n in ("query", "key", "value")}


def test_collapse_keeps_only_axes_that_vary():
    ids = np.broadcast_to(np.arange(4)[None, :, None], (3, 4, 5))
    assert collapse(ids).shape == (1, 4, 1)


def test_a_piece_of_a_split_never_becomes_empty():
    """Three pieces of 8 channels: removing all but one unit of each group leaves one channel in each."""
    inputs = image()
    a, b, c = ops.split(conv(8)(inputs), [2, 5], axis=-1)
    x = ops.concatenate([layers.MaxPooling2D(3, 1, "same")(a), ops.relu(b), c], -1)
    channels = Channels(keras.Model(inputs, head(x)))
    small = cut(channels, np.concatenate([g.units[1:] for g in channels.groups]))
    assert small.layers[1].filters == 3


def test_squeeze_does_not_take_a_width_of_one_along():
    inputs = image()
    x = ops.squeeze(layers.GlobalAveragePooling2D(keepdims=True)(conv(8)(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Reshape((8,))(x)) if len(x.shape) != 2 else layers.Dense(3)(x))
    channels = Channels(model)
    small = cut(channels, channels.groups[0].units[1:])
    assert small(np.zeros((2, 8, 8, 3), "float32")).shape == (2, 3)
