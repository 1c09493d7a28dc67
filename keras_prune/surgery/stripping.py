"""Strip: read the zeros, cut them, and prove that the outputs are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import keras
import numpy as np

from keras_prune import metrics
from keras_prune.channels import Channels
from keras_prune.internals import inputs_of, layers_of, seeds_of
from keras_prune.surgery.branches import can_vanish, drop_constant_branches
from keras_prune.surgery.constants import Constants, fold_constants
from keras_prune.surgery.cutting import cut
from keras_prune.surgery.kernels import smaller_kernels
from keras_prune.surgery.settling import settle, structures_left
from keras_prune.surgery.zeros import dead_units

TOLERANCE = 1e-4
"""Largest accepted difference of outputs in float32, relative to the largest output."""


@dataclass(frozen=True)
class StripReport:
    """What `strip` did.

    Attributes:
        units: number of units cut.
        params_before, params_after: numbers of weights, without the alphas of PSP layers.
        macs_before, macs_after: multiply-accumulates per sample of the kernels as they stand, zeros in them included.
        layers_before, layers_after: numbers of layers with a kernel.
        difference: max |zeroed - cut| / max |zeroed| over all outputs on the proof batch; None without proof.
        samples: size of the proof batch.
        generated: whether the batch was made up rather than given.
        notes: what was done besides cutting units, what was left, and why.
        structures: PSP layer -> structure -> (how many it has, how many are left).
    """

    units: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    layers_before: int
    layers_after: int
    difference: float | None
    samples: int
    generated: bool
    notes: tuple[str, ...] = ()
    structures: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

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
        if (self.macs_before, self.layers_before) != (self.macs_after, self.layers_after):
            lines.append(
                f"MACs {self.macs_before:,} -> {self.macs_after:,}; layers with a kernel {self.layers_before} -> "
                f"{self.layers_after}"
            )
        wide = max(map(len, self.structures), default=0)
        for layer, counts in self.structures.items():
            left = ", ".join(f"{left} of {total} {name}s" for name, (total, left) in counts.items())
            lines.append(f"  {layer:<{wide}}  {left} left")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def strip(
    model: keras.Model,
    data=None,
    *,
    check: bool = True,
    report: bool = False,
    rewire: str | bool = "faster",
    latency: Callable[[keras.Model], float] | None = None,
):
    """Cut what is zero.

    PSP layers are settled first (kernel <- w * nu). Then leave: summands of residual sums that are the same for every
    input, units that are zero, constant or read by nobody (what they contributed goes into the next bias), branches
    of concatenations without a unit left, and taps of kernels that are zero for all channels.

    Args:
        model: any built Functional or Sequential model, freshly trained or loaded from disk. It is not changed.
        data: inputs for the proof, as the model takes them, shape (samples, ...); default: two generated samples.
        check: run both models on `data` and compare.
        report: also return a `StripReport`.
        rewire: kernels may become smaller still with something in front of them: explicit padding, a gather of the
            channels or of the columns they read. `"faster"` does so where that is measured faster than the kernel with
            its zeros (where times are close, another run may decide otherwise), True wherever it saves
            multiply-accumulates, False nowhere.
        latency: (model) -> milliseconds, to measure `"faster"` on the device in question; default: Keras on this
            machine, batches of up to 32, both in turns.

    Returns:
        The small model, or (small model, report). A model without zeros comes back as an equal copy.

    Raises:
        ValueError: weights that are not finite, data that does not fit, or outputs that differ by more than
            1e-4 relative (the model is then not cut).
    """
    if rewire not in ("faster", True, False):
        raise ValueError(f"rewire={rewire!r} was passed; expected 'faster', True or False.")
    channels = Channels(model)
    check_finite(model)
    batch = model_inputs(model) if data is None else checked_inputs(model, data)
    settled = settle(model)
    plain = channels if settled is model else Channels(settled)
    small, removed, notes = _reduced(plain, _two_of(model, batch), rewire, latency)
    after = Channels(small)
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
        units=removed,
        params_before=settled.count_params(),
        params_after=small.count_params(),
        macs_before=metrics.macs(plain),
        macs_after=metrics.macs(after),
        layers_before=_kernel_layers(plain),
        layers_after=_kernel_layers(after),
        difference=difference,
        samples=len(keras.tree.flatten(batch)[0]),
        generated=data is None,
        notes=(*notes, *(f"fence: {fence}" for fence in channels.fences)),
        structures=structures_left(model),
    )
    return (small, result) if report else small


def _reduced(channels: Channels, probe, rewire, latency) -> tuple[keras.Model, int, list[str]]:
    """(the small model, number of units cut, notes) of a plain model; `probe` is two samples."""
    constants = Constants(channels)
    simpler, notes = drop_constant_branches(constants, probe)
    if simpler is not channels.model:
        channels = Channels(simpler)
        constants = Constants(channels)
    simpler, done = fold_constants(constants, probe)
    notes += done
    if simpler is not channels.model:
        channels = Channels(simpler)
    removed = dead_units(channels, may_vanish=lambda units: can_vanish(channels, units))
    small, done = smaller_kernels(cut(channels, removed), rewire, latency)
    notes += done
    return small, len(removed), notes if removed.size or notes else ["nothing is zero, so nothing was cut"]


def _two_of(model, batch):
    """Two samples of a batch, in the structure of the model's inputs; all where their number is fixed."""
    arrays = zip(keras.tree.flatten(inputs_of(model)), keras.tree.flatten(batch))
    return keras.tree.pack_sequence_as(inputs_of(model), [a if a is None or t.shape[0] else a[:2] for t, a in arrays])


def _kernel_layers(channels: Channels) -> int:
    return len({id(weight.layer) for weight in channels.weights if weight.is_kernel})


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
