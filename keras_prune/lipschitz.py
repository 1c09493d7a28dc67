"""A bound on how far a pruned network's outputs are from the original's, from the norms of its layers.

Written f for the original, F for the pruned network: exchange the layers of f for those of F one after the other, the
last one first. Each exchange changes one layer's output, of the *original* network's values x_l, by dW_l x_l, and what
follows it, in the *pruned* network, multiplies that change by no more than a product of norms:

    ||F(x) - f(x)||  <=  sum over l of  ( ||dW_l|| * ||x_l|| + ||db_l|| ) * gain_l

||.|| is the L2 norm over all axes but the batch, and over all outputs together. With branches the gain is the sum over
all ways to an output. On given data the bracket is replaced by how far the exchange really moves the layer's output,
measured, where that is less; only the gains are then worst cases. The bound holds whatever the weights are. It is a
product of such cases, and grows with every layer: of a deep network it tells layers apart, and promises nothing. It
says nothing of rounding: the networks compute in float32.

Source: as in [Qian, Klabjan, ICML 2021, arXiv:2105.10065]; derived here, with biases, branches, normalisation and
convolutions, as the paper's own theorems were not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np

from keras_prune.internals import check_model
from keras_prune.operators import as_numbers, is_same_call, times
from keras_prune.program import Program, batches_of
from keras_prune.propagation import Network, run


@dataclass(frozen=True)
class LayerGain:
    """What a change of one kernel, in one call of its layer, can do to the outputs: change(delta) * reads * gain.

    Attributes:
        layer: its name.
        kernel: the variable; one that is used in several calls has an entry for each, and they add up.
        reads: the largest norm of what the layer is given.
        gain: the most by which the norm of a change of the layer's output is multiplied on its way to the outputs.
        change: a change of the kernel, array of its shape -> norm of what it does, a BatchNormalization right behind
            the layer included.
        scale: what that normalisation multiplies each output by, shape (outputs,); None where there is none.
    """

    layer: str
    kernel: keras.Variable
    reads: float
    gain: float
    change: Callable[[np.ndarray], float]
    scale: np.ndarray | None


@dataclass(frozen=True)
class LayerBound:
    """What a layer that changed adds to the bound.

    Attributes:
        layer: its name.
        change: ||dW||, the spectral norm of the change of what it multiplies by, with the scale of a
            BatchNormalization right behind it.
        reads: ||x||, the largest norm of what the layer is given in the original network.
        shift: ||db||, norm of the change of what it adds, over all positions.
        gain: the most by which the pruned network multiplies the norm of a change of the layer's sums, before its
            activation.
        moves: the largest norm by which what comes out of the layer really moves on the data, given the original
            network's values; None without data.
        error: (change * reads + shift) * gain, or what follows from `moves` if that is less.
    """

    layer: str
    change: float
    reads: float
    shift: float
    gain: float
    moves: float | None
    error: float


@dataclass(frozen=True)
class OutputBound:
    """A bound on ||F(x) - f(x)||.

    Attributes:
        layers: the layers that changed, one entry for each call, in the order of the network.
        total: the bound, sum of their errors; inf where there is none.
        unbounded: why there is none: name and type of the layers that may multiply a change by any number, or that
            changed while the norm of what they are given, or of the change, has no bound.
        samples: the bound holds for these many samples; None if for all inputs of the norm `input_norm`.
        input_norm: that norm, or None.
    """

    layers: tuple[LayerBound, ...]
    total: float
    unbounded: tuple[str, ...]
    samples: int | None
    input_norm: float | None


def output_bound(
    before: keras.Model, after: keras.Model, data=None, *, input_norm: float | None = None, batch_size: int = 64
) -> OutputBound:
    """Bound how far the outputs of `after` are from those of `before`, in inference.

    Args:
        before: the original.
        after: the same network with other weights: kernels with zeros, biases, BatchNormalization. Zero its units
            rather than cut them (`surgery.zero`); what is cut afterwards computes the same.
        data: inputs in the structure of the model's inputs, shape (samples, ...). The bound then holds for them, with
            norms, and what each change moves, measured on them.
        input_norm: instead of data, the largest norm of a sample, of each input; the bound holds for all such samples,
            with bounds on the norms of what layers are given, which are larger.
        batch_size: samples that run at once.

    Returns:
        an `OutputBound`. Products of two tensors, attention, recurrence, LayerNormalization, and layers and activations
        that are not known here may multiply a change by any number: behind a layer that changed they make it infinite.
        So does a change of such a layer itself, unless there is data to measure it on.

    Raises:
        TypeError: no Keras model.
        ValueError: two architectures, data that does not fit, or not exactly one of data and input_norm.
    """
    programs = [_program(model) for model in (before, after)]
    _check_alike(*programs)
    shown = run(programs[0], data, input_norm, batch_size, "output_bound")
    old, new = (Network(program, shown) for program in programs)
    found = {number: _change(old, new, number) for number in range(len(new.program.steps))}
    found = {number: pair for number, pair in found.items() if any(pair)}
    norms, moved = old.norms(input_norm), _moved(old, new, set(found))
    gain, unbounded = new.gains(found)
    layers = []
    for number, (change, shift) in found.items():
        step = new.program.steps[number]
        reads, through = norms.get(step.takes[0][1], 0.0), new.gain_of(number, gain)
        error, moves = times(times(change, reads) + shift, through), moved.get(number)
        if moves is not None:
            error = min(error, times(moves, sum(gain[slot] for slot in step.gives)))
        if math.isinf(error) and not math.isinf(through):
            unbounded.add(number)
        name = old.program.steps[number].operation.name
        layers.append(LayerBound(name, change, reads, shift, through, moves, error))
    total = math.fsum(layer.error for layer in layers)
    names = dict.fromkeys(_named(old.program.steps[number].operation) for number in sorted(unbounded))
    return OutputBound(tuple(layers), total, tuple(names), shown.samples, input_norm)


def gains(model: keras.Model, data=None, *, input_norm: float | None = None, batch_size: int = 64) -> list[LayerGain]:
    """For each kernel, what a change of it can do to the outputs of the network as it is.

    Made for sharing an error out to layers before anything is pruned. Pruning a layer changes the gains of those in
    front of it: what came out in the end, `output_bound` says.

    Args:
        model: a built Functional or Sequential model.
        data, input_norm, batch_size: as for `output_bound`.

    Returns:
        one `LayerGain` for each kernel and call, in the order of the network. Of a SeparableConv both kernels; the
        `change` of one leaves the other as it is.

    Raises:
        TypeError, ValueError: as for `output_bound`.
    """
    program = _program(model)
    shown = run(program, data, input_norm, batch_size, "gains")
    network = Network(program, shown)
    kernels = {number: kernel for number, kernel in sorted(network.kernels.items()) if kernel.variables}
    norms, (gain, _) = network.norms(input_norm), network.gains(kernels)
    return [
        LayerGain(
            program.steps[number].operation.name,
            variable,
            norms[program.steps[number].takes[0][1]],
            network.gain_of(number, gain),
            partial(kernel.change, place),
            kernel.scale,
        )
        for number, kernel in kernels.items()
        for place, variable in enumerate(kernel.variables)
    ]


def outputs_on(model: keras.Model, data, batch_size: int = 64) -> Iterator[np.ndarray]:
    """What a network computes in inference, batch by batch: all outputs side by side, shape (samples, numbers)."""
    for batch in batches_of(model, data, batch_size):
        made = [as_numbers(a) for a in keras.tree.flatten(model(batch, training=False))]
        yield np.concatenate([a.reshape(len(a), -1) for a in made], axis=1)


# -- two networks ------------------------------------------------------------------------------------------------


def _change(old: Network, new: Network, number: int) -> tuple[float, float]:
    """(norm of the change of what a call multiplies by, of what it adds); inf where that is unknown."""
    if number in new.folded:
        return 0.0, 0.0  # counted with the kernel in front
    layers = [network.program.steps[number].operation for network in (old, new)]
    behind = next((user for user, first in new.folded.items() if first == number), None)
    norms = [] if behind is None else [network.program.steps[behind].operation for network in (old, new)]
    if _same(*layers) and (not norms or _same(*norms)):
        return 0.0, 0.0
    if number not in new.kernels:
        return math.inf, 0.0
    was, kernel = old.kernels[number], new.kernels[number]
    delta = kernel.effective() - was.effective()
    change = kernel.norm(delta) if delta.any() else 0.0
    if behind is None and kernel.variables:
        if kernel.bias is None:
            return change, 0.0
        moved = as_numbers(kernel.bias) - as_numbers(was.bias)
        positions = math.prod(new.run.shapes[new.program.steps[number].gives[0]]) / moved.size
        return change, math.sqrt(positions) * float(np.linalg.norm(moved))
    ends = [network.of_zeros(number if behind is None else behind)[0] for network in (old, new)]
    moved = (ends[1] - ends[0]).reshape(len(ends[0]), -1)
    return change, float(np.linalg.norm(moved, axis=1).max())


def _moved(old: Network, new: Network, numbers: set[int]) -> dict[int, float]:
    """Number of a call -> the largest norm by which its output, with the normalisation right behind it, moves on the
    original network's values."""
    if old.run.samples is None:
        return {}
    behind = {first: user for user, first in new.folded.items()}
    found = {number: 0.0 for number in numbers if not new.mixed & set(new.program.steps[number].gives)}
    for batch in old.run.batches:
        values = old.program.start(batch)
        for number, step in enumerate(old.program.steps):
            if number in found:
                ends = []
                for network in (old, new):
                    there = {slot: values[slot] for _, slot in step.takes}
                    for n in (number, behind[number]) if number in behind else (number,):
                        network.program.steps[n].run(there)
                    last = old.program.steps[behind.get(number, number)]
                    ends.append([as_numbers(there[slot]) for slot in last.gives])
                apart = [(a - b).reshape(len(a), -1) for a, b in zip(*ends)]
                found[number] = max(found[number], float(np.linalg.norm(np.concatenate(apart, axis=1), axis=1).max()))
            values = old.program.run(values, number, number + 1)
    return found


def _same(old, new) -> bool:
    """Whether two layers have the same weights."""
    pairs = zip(getattr(old, "weights", ()), getattr(new, "weights", ()))
    return all(np.array_equal(as_numbers(a), as_numbers(b)) for a, b in pairs)


def _program(model) -> Program:
    check_model(model)
    return Program(model)


def _check_alike(old: Program, new: Program) -> None:
    """Raise a ValueError unless two networks are the same but for the values of their weights."""
    hint = (
        "output_bound expects the same network twice, with different weights. Was the second one cut? Then compare "
        "zeros: surgery.zero(channels, removed) leaves the architecture as it is."
    )
    if len(old.steps) != len(new.steps) or old.outputs != new.outputs:
        raise ValueError(f"Networks of {len(old.steps)} and of {len(new.steps)} calls were passed; {hint}")
    for a, b in zip(old.steps, new.steps):
        if not is_same_call(a, b):
            raise ValueError(
                f"{_named(a.operation)} and {_named(b.operation)} differ in more than weights' values; {hint}"
            )


def _named(operation) -> str:
    return f"{operation.name} ({type(operation).__name__})"
