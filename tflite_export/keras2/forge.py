"""Layers of one package made anew in the other."""

import inspect
from types import ModuleType

import numpy as np

# Settings with another name: (class, Keras 3, Keras 2).
_RENAMED = (("LeakyReLU", "negative_slope", "alpha"), ("ELU", "alpha", "alpha"))
_DROPPED = ("initializer", "regularizer", "constraint", "dtype", "batch_input_shape", "build_config", "synchronized")


class Unbridged(ValueError):
    """A layer or an operation without an equal in the other package; the message names it and how to mend it."""


class Forge:
    """Makes layers of the other package: one for each original, however often that is called."""

    def __init__(self, target: ModuleType, *, to_keras3: bool):
        self.target, self.to_keras3 = target, to_keras3
        self.same = target.__name__ == "keras" and not to_keras3  # Keras 3 on both sides: layers replaced, no bridge
        self.pairs: dict[int, tuple] = {}
        self._names: set[str] = set()

    def name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it if a layer has that name."""
        name, again = plain_name(wanted), 0
        while name in self._names:
            again += 1
            name = f"{plain_name(wanted)}_{again}"
        self._names.add(name)
        return name

    def make(self, class_name: str, **settings):
        """A new layer of the target package."""
        name = self.name(settings.pop("name", class_name.lower()))
        return getattr(self.target.layers, class_name)(name=name, **settings)

    def like(self, layer):
        """The layer's equal in the target package; its weights are copied once the whole network stands."""
        if id(layer) not in self.pairs:
            self.pairs[id(layer)] = (layer, self._rebuilt(layer))
        return self.pairs[id(layer)][1]

    def _rebuilt(self, layer):
        kind, config = type(layer).__name__, layer.get_config()
        known = getattr(self.target.layers, kind, None)
        ours = type(layer).__module__.split(".")[0] in ("keras", "tf_keras")
        if known is None or not ours or kind in ("Lambda", "TFSMLayer"):
            raise Unbridged(
                f"The layer {layer.name!r} ({kind}) has no equal in {self.target.__name__}. Build the model with "
                "layers that both have, or split the model before it."
            )
        if kind in ("TimeDistributed", "Bidirectional"):
            inner = layer.layer if kind == "TimeDistributed" else layer.forward_layer
            config = {"merge_mode": config["merge_mode"]} if kind == "Bidirectional" else {}
            return known(self._rebuilt(inner), name=self.name(layer.name), **config)
        if kind == "Normalization" and layer.mean is not None:
            config |= {"mean": np.asarray(layer.mean).ravel(), "variance": np.asarray(layer.variance).ravel()}
        for owner, new, old in _RENAMED:
            was, becomes = (old, new) if self.to_keras3 else (new, old)
            if kind == owner and was in config and not self.same:
                config[becomes] = config.pop(was)
        accepted = inspect.signature(known.__init__).parameters
        kept = {
            key: _setting(value)
            for key, value in config.items()
            if key in accepted and key not in ("name", "kwargs") and not key.endswith(_DROPPED)
        }
        if kind == "BatchNormalization":
            kept["axis"] = int(np.ravel(kept["axis"])[0])  # Keras 2 keeps a list of one
        try:
            made = known(name=self.name(layer.name), **kept)
        except (ValueError, TypeError) as error:
            raise Unbridged(
                f"The layer {layer.name!r} ({kind}) cannot be made in {self.target.__name__}: {str(error)[:200]}"
            ) from error
        made.trainable = layer.trainable
        return made

    def copy_weights(self) -> None:
        for old, new in self.pairs.values():
            values = _weights(old)
            # An adapted Normalization holds its numbers as settings by now.
            if not values or type(old).__name__ == "Normalization":
                continue
            shapes = [tuple(value.shape) for value in values]
            if shapes != [tuple(weight.shape) for weight in new.weights]:
                raise Unbridged(
                    f"The layer {old.name!r} ({type(old).__name__}) has weights of the shapes {shapes}; in "
                    f"{self.target.__name__} they are {[tuple(weight.shape) for weight in new.weights]}."
                )
            new.set_weights(values)


def _weights(layer) -> list[np.ndarray]:
    return [np.asarray(value) for value in layer.get_weights()]


def _setting(value):
    """Names of functions as they are; the name alone of what a config wraps in a dict."""
    if isinstance(value, dict) and set(value) >= {"class_name", "config"}:
        inner = value["config"]
        return inner if isinstance(inner, str) else inner.get("name", value["class_name"].lower())
    return value


def plain_name(name: str) -> str:
    return name.replace("/", "_").replace(":", "_")
