"""What the removal of some units of one group does to the network's own output."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from keras_prune.answers import Exam
from keras_prune.channels import Channels
from keras_prune.groups import Group
from keras_prune.least_squares import Elimination
from keras_prune.program import Program, batches_of, size_of
from keras_prune.sites import Site, intercept_of, tail_of
from keras_prune.surgery import copied, write_zeros, zero_masks


class Damage:
    """Runs a copy of the network with a few units gone, from where they are made on.

    Args:
        channels: labels of the model, which is not changed.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...).
        batch_size: samples that run at once.
        memory: bytes for the values kept between groups; with less, they are computed again.
    """

    def __init__(self, channels: Channels, data, batch_size: int, memory: int):
        self.channels, self.memory = channels, memory
        copy, self.twins = copied(channels)
        self.exam = Exam(copy, channels.model, [np.asarray(a) for a in keras.tree.flatten(data)], batch_size)
        self.program = Program(copy)
        self.steps: dict[int, int] = {}  # id of a layer of the original -> its first call
        self.original = Program(channels.model)
        for number, step in enumerate(self.original.steps):
            self.steps.setdefault(id(step.operation), number)
        self.at = 0
        self.values = [self.program.start(batch) for batch in batches_of(copy, data, batch_size)]

    def start(self, group: Group) -> int:
        """The first step that the removal of the group's units changes."""
        return min(self.steps[id(m.weight.layer)] for m in group.members)

    def along(self, group: Group, done: Elimination, places: Sequence[tuple[Site, int]], means, error) -> np.ndarray:
        """The curve in terms of the output: measured at a few points, in between as a power of the error.

        Args:
            done: the order, and the readers' weights at those points.
            places: (site, block) of each reader.
            means: the mean row of each reader, which the weights' change shifts the output by.
            error: the curve at the readers, (units - 1,).
        """
        if not done.weights:
            return error
        self._move(self.start(group))
        points = sorted(done.weights)
        found = [self._distance(group.units[done.order[:n]], places, means, done.weights[n]) for n in points]
        return _between(error, np.array([error[n - 1] for n in points]), np.maximum.accumulate(found))

    def _move(self, step: int) -> None:
        """Keep the values before a step, if they fit; groups come in the order of the network."""
        if step <= self.at:
            if step < self.at:
                raise ValueError("Damage.along() expects groups in the order of their first step.")
            return
        moved = []
        for values in self.values:
            moved.append(self.program.run(values, self.at, step))
            if size_of(moved[0]) * len(self.values) > self.memory:
                return
        self.values, self.at = moved, step

    def _distance(self, removed, places, means, weights) -> float:
        """Divergence of the output with these units gone and their readers refitted."""
        before = {}

        def remembered(variable):
            """The copy's variable; what it holds now comes back in the end."""
            twin = self.twins[id(variable)]
            before.setdefault(id(twin), (twin, keras.ops.convert_to_numpy(twin)))
            return twin

        def change(variable, value):
            twin = remembered(variable)
            twin.assign(np.asarray(value).astype(keras.backend.standardize_dtype(twin.dtype)))

        try:
            for weight, mask in zero_masks(self.channels, removed):
                write_zeros(remembered(weight.variable), mask)
            for site in {id(site.kernel): site for site, _ in places}.values():
                matrix = site.matrix().astype(np.float64)
                shift = np.zeros((len(matrix), matrix.shape[2]))
                for (other, block), mean, new in zip(places, means, weights):
                    if other.kernel is site.kernel:
                        shift[block] = mean @ (matrix[block] - new)
                        matrix[block] = new
                change(site.kernel, site.view.kernel(matrix))
                place = intercept_of(site.bias, tail_of(self.original, site).norm)
                if place is not None:
                    variable, sign = place
                    twin = keras.ops.convert_to_numpy(self.twins[id(variable)])
                    change(variable, twin + sign * shift.reshape(twin.shape))
            distance = self.exam.distance(self._answers())[0]
        finally:
            for twin, value in before.values():
                twin.assign(value)
        return distance if np.isfinite(distance) else 1e6

    def _answers(self) -> list[np.ndarray]:
        outputs = [self.program.run(values, self.at, len(self.program.steps)) for values in self.values]
        return [
            np.concatenate([keras.ops.convert_to_numpy(values[slot]) for values in outputs])
            for slot in self.program.outputs
        ]


def _between(error: np.ndarray, known: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """A curve through the points (known error, damage), a power of the error between them.

    The first errors do less than their share: the divergence starts flat, and downstream much of them is forgotten.
    So the first power goes on below the first point, within reason; beyond the last one damage grows as the error.
    """
    error, known, damage = np.maximum(error, 1e-12), np.maximum(known, 1e-12), np.maximum(damage, 1e-9)
    rise = np.log(known[-1] / known[0]) if len(known) > 1 else 0.0
    power = np.clip(np.log(damage[-1] / damage[0]) / rise, 1.0, 3.0) if rise > 1e-6 else 1.0
    inside = np.exp(np.interp(np.log(error), np.log(known), np.log(damage)))
    below, beyond = damage[0] * (error / known[0]) ** power, damage[-1] * error / known[-1]
    return np.maximum.accumulate(np.where(error < known[0], below, np.where(error > known[-1], beyond, inside)))
