"""Strip: read the zeros, cut them, and prove that the outputs are the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import keras
import numpy as np

from keras_prune.channels import Channels
from keras_prune.internals import inputs_of, layers_of, seeds_of
from keras_prune.surgery.cutting import cut
from keras_prune.surgery.zeros import dead_units

TOLERANCE = 1e-4
"""Largest accepted difference of outputs in float32, relative to the largest output."""


@dataclass(frozen=True)
class StripReport:
    """What `strip` did.

    Attributes:
        units: number of units cut.
        params_before, params_after: numbers of weights.
        difference: max |zeroed - cut| / max |zeroed| over all outputs on the proof batch; None without proof.
        samples: size of the proof batch.
        generated: whether the batch was made up rather than given.
        notes: what was left, and why.
    """

    units: int
    params_before: int
    params_after: int
    difference: float | None
    samples: int
    generated: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        proof = (
            "not proved"
            if self.difference is None
            else (
                f"outputs equal to {self.difference:.1e} relative on {self.samples} "
                f"{'generated' if self.generated else 'given'} samples"
            )
        )
        lines = [f"{self.units} units cut, params {self.params_before:,} -> {self.params_after:,}; {proof}"]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def strip(model: keras.Model, data=None, *, check: bool = True, report: bool = False):
    """Cut what is zero.

    Args:
        model: any built Functional or Sequential model, freshly trained or loaded from disk. It is not changed.
        data: inputs for the proof, as the model takes them, shape (samples, ...); default: two generated samples.
        check: run both models on `data` and compare.
        report: also return a `StripReport`.

    Returns:
        The small model, or (small model, report). A model without zeros comes back as an equal copy.

    Raises:
        ValueError: weights that are not finite, data that does not fit, or outputs that differ by more than
            1e-4 relative (the model is then not cut).
    """
    channels = Channels(model)
    check_finite(model)
    batch = model_inputs(model) if data is None else checked_inputs(model, data)
    removed = dead_units(channels)
    small = cut(channels, removed)
    notes = tuple(f"fence: {fence}" for fence in channels.fences)
    if not removed.size:
        notes = ("nothing is zero, so nothing was cut", *notes)
    difference = None
    if check:
        difference = relative_difference(model, small, batch)
        limit = allowed_difference(model)
        if not difference <= limit:
            raise ValueError(
                f"The stripped model's outputs differ by {difference:.1e} relative (allowed: {limit:.0e}), so it is "
                "not returned. Either a layer is random or keeps a state, or data is not finite, or a rule labels some "
                "layer wrongly: then please report the model."
            )
    result = StripReport(
        len(removed),
        model.count_params(),
        small.count_params(),
        difference,
        len(keras.tree.flatten(batch)[0]),
        data is None,
        notes,
    )
    return (small, result) if report else small


def allowed_difference(model) -> float:
    """How much two networks that compute the same may differ, relative: float16 and bfloat16 layers round at 1e-3 and
    1e-2, and the proof has to allow that."""
    exact = all(
        keras.backend.standardize_dtype(layer.compute_dtype) in ("float32", "float64") for layer in layers_of(model)
    )
    return TOLERANCE if exact else 3e-2


def check_finite(model) -> None:
    """Raise on NaN or infinite weights, naming the first."""
    for variable in model.weights:
        if "float" in str(variable.dtype) and not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
            raise ValueError(
                f"Weight {variable.path} holds NaN or infinite numbers; training has diverged. Load an "
                "earlier checkpoint before pruning."
            )


def model_inputs(model, samples: int = 2, seed: int = 0, length: int = 32):
    """A made-up batch in the structure of the model's inputs: normal numbers, small integers for integer inputs."""
    rng = np.random.default_rng(seed)

    def make(tensor):
        batch = tensor.shape[0] or samples
        shape = (batch, *(length if d is None else d for d in tensor.shape[1:]))
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "int" in dtype or dtype == "bool":
            return rng.integers(0, 2, shape).astype(dtype)
        if dtype == "string":
            raise ValueError(f"Input {tensor.name!r} takes strings, which cannot be made up: pass data=.")
        return rng.normal(size=shape).astype("float32" if dtype == "bfloat16" else dtype)

    return keras.tree.map_structure(make, inputs_of(model))


def checked_inputs(model, data):
    """`data` if it fits the model's inputs, else a ValueError that says how."""
    tensors, arrays = keras.tree.flatten(inputs_of(model)), keras.tree.flatten(data)
    if len(tensors) != len(arrays):
        raise ValueError(
            f"data holds {len(arrays)} arrays, but the model has {len(tensors)} inputs: {[t.name for t in tensors]}."
        )
    for tensor, array in zip(tensors, arrays):
        shape = tuple(getattr(array, "shape", ()))
        fits = len(shape) == len(tensor.shape) and all(
            want is None or got == want for got, want in zip(shape[1:], tensor.shape[1:])
        )
        if not fits or shape[0] == 0:
            raise ValueError(
                f"data for input {tensor.name!r} has shape {shape}; expected (samples, "
                f"{', '.join(str(d) for d in tensor.shape[1:])}) with at least one sample."
            )
    return data


def relative_difference(a, b, inputs) -> float:
    """max |a(x) - b(x)| / max |a(x)|, the worst of all outputs; infinite if a number is not finite. Inference mode."""
    worst = 0.0
    kept = [(v, v.numpy()) for m in (a, b) for v in m.non_trainable_variables + seeds_of(m)]
    outputs = [
        keras.tree.flatten(
            model(keras.tree.pack_sequence_as(inputs_of(model), keras.tree.flatten(inputs)), training=False)
        )
        for model in (a, b)
    ]
    for variable, value in kept:  # states of recurrent layers and of random numbers are left as they were
        variable.assign(value)
    for x, y in zip(*outputs):
        x, y = (keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in (x, y))
        if x.shape != y.shape:
            raise ValueError(f"The models' outputs have shapes {x.shape} and {y.shape}.")
        difference = float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-12))
        worst = max(worst, difference if np.isfinite(difference) else np.inf)  # max() would swallow a NaN
    return worst
