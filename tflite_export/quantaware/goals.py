"""What the network is trained for, and how that crosses into the process that trains: names and plain numbers."""

import json

import numpy as np

from tflite_export.inputs import output_names
from tflite_export.parity import reference

_PROBABILITIES = {"sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
                  "categorical_crossentropy": "CategoricalCrossentropy",
                  "binary_crossentropy": "BinaryCrossentropy"}  # fmt: skip


class Task:
    """What the network is trained for: the loss, and the figure that is reported.

    Attributes:
        losses: Keras 3 losses, one for each output.
        measure: "accuracy" or "loss".
        text: for the report.
    """

    def __init__(self, model, loss, x: list[np.ndarray], labels: list[np.ndarray]):
        import keras

        names = output_names(model)
        outputs = reference(model, x)
        given = loss if loss is not None else getattr(model, "loss", None)
        if isinstance(given, dict):
            given = [given[name] for name in names]
        given = list(given) if isinstance(given, (list, tuple)) else [given] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(given)} losses were passed for the {len(names)} outputs {names}.")
        self.losses = [_loss(*each) for each in zip(given, names, outputs, labels, strict=True)]
        self.classes = all(_is_classes(values, y) for values, y in zip(outputs, labels, strict=True))
        self.measure = "accuracy" if self.classes else "loss"
        self.text = " + ".join(dict.fromkeys(each if isinstance(each, str) else each.name for each in self.losses))
        self._keras = keras

    def described(self):
        """The losses as the child builds them again."""
        found = [
            each if isinstance(each, str) else {"class_name": type(each).__name__, "config": _plain(each.get_config())}
            for each in self.losses
        ]
        return found[0] if len(found) == 1 else found

    def score(self, outputs: list[np.ndarray], labels: list[np.ndarray]) -> float:
        """The reported figure, the mean over all outputs."""
        if self.classes:
            return float(np.mean([_right(values, y) for values, y in zip(outputs, labels, strict=True)]))
        losses = [self._keras.losses.get(each) for each in self.losses]
        return float(
            np.sum([np.mean(each(y, values)) for each, values, y in zip(losses, outputs, labels, strict=True)])
        )


def _loss(loss, name: str, values: np.ndarray, labels: np.ndarray):
    """The loss for one output, checked against what this output really gives."""
    import keras

    outside = values.size and (values.min() < -1e-6 or values.max() > 1 + 1e-6)
    if loss is None:
        if not _is_classes(values, labels) or values.ndim != 2:
            raise ValueError(
                f"No loss was passed, and the labels of the output {name!r} are not classes; pass loss=, for example "
                "loss='mse'."
            )
        if values.shape[1] == 1:
            return keras.losses.BinaryCrossentropy(from_logits=bool(outside))
        kind = "Categorical" if labels.shape == values.shape else "SparseCategorical"
        return getattr(keras.losses, f"{kind}Crossentropy")(from_logits=bool(outside))
    if isinstance(loss, str):
        if loss in _PROBABILITIES and outside:
            raise ValueError(
                f"loss={loss!r} reads probabilities, but the output {name!r} goes from {values.min():.3g} to "
                f"{values.max():.3g}: pass keras.losses.{_PROBABILITIES[loss]}(from_logits=True)."
            )
        keras.losses.get(loss)  # an unknown name fails here, not in the child
        return loss
    if type(loss).__module__.split(".")[0] == "keras" and isinstance(loss, keras.losses.Loss):
        if getattr(loss, "_fn_kwargs", {}).get("from_logits") is False and outside:
            raise ValueError(
                f"The loss {loss.name!r} reads probabilities, but the output {name!r} goes from {values.min():.3g} to "
                f"{values.max():.3g}: pass it with from_logits=True."
            )
        return loss
    raise TypeError(
        f"loss={loss!r} was passed; expected a name or a loss of keras.losses: code of your own cannot cross into the "
        "process that trains."
    )


def _is_classes(values: np.ndarray, labels: np.ndarray) -> bool:
    if values.ndim != 2:
        return False
    if labels.shape == values.shape and values.shape[1] > 1:
        return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(-1) == 1).all())
    whole = labels.dtype.kind in "iub" or bool((labels == np.round(labels)).all())
    one = labels.size == len(labels)
    return one and whole and bool(labels.min() >= 0 and labels.max() < max(values.shape[1], 2))


def _right(values: np.ndarray, labels: np.ndarray) -> float:
    if values.shape[1] == 1:
        limit = 0.5 if values.min() >= 0 and values.max() <= 1 else 0.0
        return float(np.mean((values[:, 0] > limit) == (labels.reshape(-1) > 0.5)))
    expected = labels.argmax(-1) if labels.shape == values.shape else labels.reshape(-1)
    return float(np.mean(values.argmax(-1) == expected))


def described_optimizer(optimizer, learning_rate: float | None) -> dict:
    import keras

    if learning_rate is not None and not (isinstance(learning_rate, (int, float)) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate!r} was passed; expected a number above 0, for example 1e-4.")
    if isinstance(optimizer, str):
        optimizer = keras.optimizers.get(optimizer)
        learning_rate = 1e-5 if learning_rate is None else learning_rate
    if not isinstance(optimizer, keras.optimizers.Optimizer) or type(optimizer).__module__.split(".")[0] != "keras":
        raise TypeError(
            f"optimizer={optimizer!r} was passed; expected a name or one of keras.optimizers: code of your own cannot "
            "cross into the process that trains."
        )
    config = _plain(optimizer.get_config())
    if learning_rate is not None:
        config["learning_rate"] = float(learning_rate)
    return {"class_name": type(optimizer).__name__, "config": config}


def _plain(config: dict) -> dict:
    """Numbers of numpy as those of Python."""
    return json.loads(json.dumps(config, default=lambda value: getattr(value, "item", lambda: None)()))
