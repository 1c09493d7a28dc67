"""The same network, or what is left of it, with weights drawn anew: the control that starts from nothing."""

from __future__ import annotations

import random
from contextlib import contextmanager

import keras

from keras_prune.channels import Channels
from keras_prune.internals import is_graph, layers_of
from keras_prune.rules import Ids
from keras_prune.surgery.cutting import Cut


def drawn_anew(
    channels: Channels, removed: Ids = (), seed: int | None = None
) -> tuple[keras.Model, dict[int, keras.Variable]]:
    """A cut copy whose layers drew their weights again, and id(old variable) -> the new one.

    Drawn by each layer's own initializers, at the widths that are left (they look at them), whatever seed those were
    given: weights that are trained, and the running statistics of BatchNormalization. All else is copied: frozen
    layers, what a Normalization layer has adapted to.

    Args:
        channels: labels of the model.
        removed: ids of the units that leave.
        seed: the same seed, the same weights.

    Raises:
        ValueError: a layer's initializer is an array, so that it cannot draw another.
    """
    work = _Redrawn(channels, channels.alive(removed))
    with _draws_of(seed):
        return work.model(), work.variables


class _Redrawn(Cut):
    """One drawing in progress."""

    def __init__(self, channels: Channels, alive):
        super().__init__(channels, alive)
        norms = [x for x in layers_of(channels.model) if isinstance(x, keras.layers.BatchNormalization) and x.trainable]
        self.drawn = {id(v) for v in channels.model.trainable_variables}
        self.drawn |= {id(v) for norm in norms for v in norm.non_trainable_variables}

    def made(self, old, config, **arguments):
        return super().made(old, _unseeded(config), **arguments)

    def copy_weights(self, old, new):
        if not isinstance(old, keras.layers.Layer) or is_graph(old):
            return
        list(self.sublayers(old, new))  # builds them
        fresh = [keras.ops.convert_to_numpy(v) for v in new.variables]
        super().copy_weights(old, new)
        for before, after, value in zip(old.variables, new.variables, fresh):
            if id(before) in self.drawn:
                if _starts_from_an_array(old.get_config()):
                    raise ValueError(
                        f"Layer {old.name!r} starts from an array of numbers, which no seed draws anew; freeze it "
                        "(trainable=False), or give it an initializer that draws."
                    )
                after.assign(value)


def _unseeded(config):
    """A config whose initializers draw as they please. A number as a seed would not do: the layers inside an
    attention copy one initializer and would all draw the same."""
    if not isinstance(config, dict):
        return config
    found = {}
    for key, value in config.items():
        value = found[key] = _unseeded(value)
        if key.endswith("initializer") and isinstance(value, dict) and "seed" in (value.get("config") or {}):
            found[key] = {**value, "config": {**value["config"], "seed": None}}
    return found


def _starts_from_an_array(config: dict) -> bool:
    values = [v.get("config") for k, v in config.items() if k.endswith("_initializer") and isinstance(v, dict)]
    values = [inner.get("value") for inner in values if isinstance(inner, dict)]
    return any(isinstance(v, (dict, list)) or getattr(v, "ndim", 0) > 0 for v in values)


@contextmanager
def _draws_of(seed: int | None):
    """Keras gives an initializer without a seed one of Python's random numbers. The same number as a seed must not
    give what keras.utils.set_random_seed gave the first time: those would be the old weights."""
    state = random.getstate()
    try:
        if seed is not None:
            random.seed(f"drawn anew: {seed}")
        yield
    finally:
        if seed is not None:
            random.setstate(state)
