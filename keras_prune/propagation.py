"""How the norm of a change grows on its way through a network: what each call of a program can do to it, backwards from
the outputs, and how large the values are that each call is given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune.internals import graph_of
from keras_prune.operators import (
    Kernel,
    as_numbers,
    is_normalization,
    kernel_of,
    lipschitz_constants,
    moves,
    outputs_of_call,
    times,
)
from keras_prune.program import Program, Step, batches_of
from keras_prune.surgery import checked_inputs


@dataclass(frozen=True)
class Run:
    """What a run of a network has shown.

    Attributes:
        batch: how many samples operations can be tried on: 2, or what the model was built for.
        shapes: of each slot, without the batch.
        norms: largest norm of a sample of each slot; None where only the shapes are of interest.
        mixed: slots whose first axis is not as long as the batch.
        samples: how many it was; None if none.
        batches: the data it was run on, batch by batch.
    """

    batch: int
    shapes: dict[int, tuple[int, ...]]
    norms: dict[int, float] | None
    mixed: set[int]
    samples: int | None
    batches: list = field(repr=False)


def run(program: Program, data, input_norm, batch_size: int, function: str) -> Run:
    """Run a network on the data, or on zeros."""
    if (data is None) == (input_norm is None):
        raise ValueError(
            f"{'Neither' if data is None else 'Both'} of data and input_norm were passed to {function}; expected one: "
            "data, for a bound on these samples, or input_norm, for all samples whose norm is no larger."
        )
    for name, value, least in (("batch_size", batch_size, 1), ("input_norm", 0 if data is not None else input_norm, 0)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not least <= value < math.inf:
            raise ValueError(f"{name}={value!r} was passed to {function}; expected a number from {least} up.")
    tensors = graph_of(program.model).inputs
    fixed = next((t.shape[0] for t in tensors if t.shape[0] is not None), None)
    if data is None:
        if any(None in t.shape[1:] for t in tensors):
            raise ValueError(
                f"input_norm was passed to {function}, but an input of the model has no fixed size: "
                f"{[tuple(t.shape) for t in tensors]}. Pass data of the sizes that are meant."
            )
        batches = [[np.zeros((fixed or 2, *t.shape[1:]), np.float32) for t in tensors]]
    else:
        batches = list(batches_of(program.model, checked_inputs(program.model, data), fixed or int(batch_size)))
    shapes, norms, mixed, samples = {}, {}, set(), 0
    for batch in batches:
        size = next(len(a) for a in keras.tree.flatten(batch) if a is not None)
        values, samples = program.start(batch), samples + size
        made = program.inputs
        for number in range(-1, len(program.steps)):
            if number >= 0:
                values, made = program.run(values, number, number + 1), program.steps[number].gives
            for slot in made:
                if values.get(slot) is None:
                    continue
                shape = tuple(values[slot].shape)
                shapes[slot] = shape[1:]
                if shape[:1] != (size,):
                    mixed.add(slot)
                elif data is not None:
                    found = float(np.linalg.norm(as_numbers(values[slot]).reshape(size, -1), axis=1).max())
                    if not math.isfinite(found):
                        maker = "the data" if number < 0 else program.steps[number].operation.name
                        raise ValueError(
                            f"NaN or infinite numbers come out of {maker!r}: is the data, and is the "
                            "model, what it should be?"
                        )
                    norms[slot] = max(norms.get(slot, 0.0), found)
    is_measured = data is not None
    return Run(fixed or 2, shapes, norms if is_measured else None, mixed, samples if is_measured else None, batches)


class Network:
    """What each call of a network can do to the norm of what it is given.

    Attributes:
        kernels: number of a call -> the kernel in it, or the BatchNormalization that is none's own.
        folded: number of a normalisation's call -> number of the kernel's in front, which holds its scale.
    """

    def __init__(self, program: Program, run: Run):
        self.program, self.run = program, run
        self.kernels: dict[int, Kernel] = {}
        self.folded: dict[int, int] = {}
        for number, step in enumerate(program.steps):
            slot = step.takes[0][1] if step.takes else None
            if slot in run.shapes and isinstance(step.operation, keras.layers.Layer):
                kernel = kernel_of(step.operation, run.shapes[slot])
                if kernel is not None:
                    self.kernels[number] = kernel
        for number, kernel in list(self.kernels.items()):
            users = program.users(program.steps[number].gives[0])
            if len(users) == 1 and users[0] in self.kernels and kernel.is_linear and kernel.axis:
                norm, rank = program.steps[users[0]].operation, len(run.shapes[program.steps[number].gives[0]]) + 1
                if is_normalization(norm) and norm.axis % rank == kernel.axis % rank:
                    kernel.scale = self.kernels.pop(users[0]).compose()
                    self.folded[users[0]] = number
        self.mixed = set(run.mixed)  # slots whose first axis is not that of the samples
        self._known: dict[int, dict[int, float]] = {}
        for number, step in enumerate(program.steps):
            if self.mixed & {slot for _, slot in step.takes} or (
                moves(step.operation) and math.inf in self.lipschitz(number).values()
            ):
                self.mixed.update(step.gives)

    def lipschitz(self, number: int) -> dict[int, float]:
        """Slot of each input of a call -> the most by which the norm of a change of it is multiplied."""
        if number not in self._known:
            self._known[number] = self._lipschitz(number, self.program.steps[number])
        return self._known[number]

    def _lipschitz(self, number: int, step: Step) -> dict[int, float]:
        found = {slot: math.inf for _, slot in step.takes}
        if self.mixed & found.keys():
            return found
        if number not in self.folded and number not in self.kernels:
            return lipschitz_constants(step, self.run.shapes, self.run.batch)
        found[step.takes[0][1]] = 1.0 if number in self.folded else self.kernels[number].lipschitz()
        return found  # what else it takes are masks

    def gains(self, starts: Iterable[int]) -> tuple[dict[int, float], set[int]]:
        """Slot -> the most by which the norm of a change there is multiplied on its way to the outputs.

        Only of slots that depend on the calls in `starts`; and the calls that make it infinite.
        """
        steps, starts, moved = self.program.steps, set(starts), set()
        for number, step in enumerate(steps):
            if number in starts or any(slot in moved for _, slot in step.takes):
                moved.update(step.gives)
        gain, unbounded = dict.fromkeys(moved, 0.0), set()
        for slot in self.program.outputs:
            gain[slot] = gain.get(slot, 0.0) + (math.inf if slot in self.mixed else 1)
        for number in reversed(range(len(steps))):
            out = sum(gain.get(slot, 0.0) for slot in steps[number].gives)
            if not out or not any(slot in moved for _, slot in steps[number].takes):
                continue
            for slot, constant in self.lipschitz(number).items():
                if slot in moved:
                    gain[slot] += times(constant, out)
                    if math.isinf(constant):
                        unbounded.add(number)
        return gain, unbounded

    def gain_of(self, number: int, gain: dict[int, float]) -> float:
        """Of what a call computes before its activation."""
        slope = self.kernels[number].slope if number in self.kernels else 1.0
        return times(slope, sum(gain.get(slot, 0.0) for slot in self.program.steps[number].gives))

    def norms(self, input_norm: float | None) -> dict[int, float]:
        """Slot -> the largest norm of a sample there: measured, or bounded through the norms of the inputs."""
        if self.run.norms is not None:
            return {**self.run.norms, **dict.fromkeys(self.mixed, math.inf)}
        found = dict.fromkeys(self.program.inputs, float(input_norm))
        for number, step in enumerate(self.program.steps):
            total = sum(times(constant, found[slot]) for slot, constant in self.lipschitz(number).items())
            if total < math.inf and (number not in self.kernels or self.kernels[number].scale is None):
                zeros = [made.reshape(len(made), -1) for made in self.of_zeros(number)]
                found.update((s, total + float(np.linalg.norm(z, axis=1).max())) for s, z in zip(step.gives, zeros))
            else:  # what a kernel makes of zeros is counted behind its normalisation
                found.update(dict.fromkeys(step.gives, total))
        return found

    def of_zeros(self, number: int) -> list[np.ndarray]:
        """What a call makes of zeros, and what the normalisation makes of that."""
        first = self.folded.get(number, number)
        step = self.program.steps[first]
        sizes = {slot: (self.run.batch, *self.run.shapes[slot]) for _, slot in step.takes if slot in self.run.shapes}
        made = outputs_of_call(step, {slot: np.zeros(size, np.float32) for slot, size in sizes.items()})
        if first != number:
            made = outputs_of_call(self.program.steps[number], {step.gives[0]: made[0].astype(np.float32)})
        return made
