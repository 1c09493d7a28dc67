"""What every member of a family must keep: found by registry, so that a newcomer is tested before he writes a test."""

import doctest
import importlib
import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import compiled, patterns
from zoo import ZOO

from keras_prune import Channels, Pruner, dead_units, pruners
from keras_prune.internals import graph_of, is_graph, nodes_of
from keras_prune.rules import RULES
from keras_prune.rules.activations import UNARY
from keras_prune.surgery import cut, relative_difference, zero


def operations(graph):
    for node in nodes_of(graph):
        yield node.operation
        if is_graph(node.operation):
            yield from operations(graph_of(node.operation))


def test_every_rule_is_met_by_some_model_of_the_zoo_so_that_its_cut_is_compared_with_its_zeros():
    met = set()
    for build in ZOO.values():
        model, _ = build()
        for operation in operations(graph_of(model)):
            cls = type(operation)
            met.update({cls, f"ops.{cls.__name__}" if cls.__module__.startswith("keras.src.ops.") else cls.__name__})
    assert set(RULES) - {f"ops.{name}" for name in UNARY} - met == set()


ARGUMENTS = {"Clip": (-1.0, 1.0), "Cast": ("float16",), "SaturateCast": ("int8",), "Threshold": (0.5, 0.0)}


@pytest.mark.parametrize("name", UNARY)
def test_what_is_ruled_as_elementwise_is_and_stays_finite_at_zero(name):
    words = {
        "Relu6": "relu6",
        "SparseSigmoid": "sparse_sigmoid",
        "LogSigmoid": "log_sigmoid",
        "NanToNum": "nan_to_num",
        "Exp2": "exp2",
        "Log1p": "log1p",
        "Expm1": "expm1",
        "TanhShrink": "tanh_shrink",
    }
    function = getattr(ops, words.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))
    inputs = keras.Input((5, 5, 3))
    x = layers.Conv2D(8, 3, name="first", activation="relu" if name == "Log1p" else None)(inputs)
    x = ops.cast(function(x, *ARGUMENTS.get(name, ())), "float32")
    model = keras.Model(inputs, layers.Conv2D(4, 3)(x))
    channels = Channels(model)
    [group] = channels.groups
    assert np.isfinite(np.array(ops.cast(function(ops.zeros((1,)), *ARGUMENTS.get(name, ())), "float32"))).all()
    small = cut(channels, group.units[:3])
    data = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype("float32")
    zero(channels, group.units[:3])
    assert small.get_layer("first").filters == 5 and relative_difference(model, small, data) < 1e-5


def subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


@pytest.mark.parametrize(
    "cls", [c for c in subclasses(Pruner) if c.__module__ == pruners.__name__], ids=lambda c: c.__name__
)
def test_zeros_of_every_pruner_survive_a_second_fit_and_are_readable_from_the_weights(cls):
    model, (x, y) = compiled("adam"), patterns(128)
    pruner = cls(0.5)
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=[pruner]).history
    zeros = set(dead_units(Channels(model), strict=True).tolist())
    model.fit(x, y, epochs=1, verbose=0)
    assert len(zeros) >= 8 and set(dead_units(Channels(model), strict=True).tolist()) == zeros
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("module", ["criteria", "budgets", "schedules", "theory.sampling", "theory.perturbation"])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"keras_prune.{module}"), extraglobs={"np": np})
    assert result.attempted >= 2 and result.failed == 0
