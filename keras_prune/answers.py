"""What the outputs of networks say, and how far apart the answers of two networks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

from keras_prune.internals import compile_arguments_of, graph_of, is_graph, nodes_of, outputs_of


@dataclass(frozen=True)
class Output:
    """What one output says: "classes" (a choice along the last axis), "switches" (yes or no each), or "values"."""

    kind: str
    teacher_probabilities: bool  # or logits
    student_probabilities: bool
    deviation: float  # of the teacher's values

    def __str__(self) -> str:
        if self.kind == "values":
            return "values, by their mean squared error"
        return f"{self.kind}, given as {'probabilities' if self.teacher_probabilities else 'logits'}"

    def logits(self, tensor, probabilities: bool):
        """Logits whose softmax along the last axis is the prediction; values in units of the teacher's deviation."""
        half = keras.backend.standardize_dtype(tensor.dtype) == "float16"
        tensor = ops.cast(tensor, "float32")
        if self.kind == "values":
            return tensor / self.deviation
        if self.kind == "classes":  # logarithms of probabilities are logits up to a constant
            return ops.log(ops.maximum(tensor, 1e-7 if half else 1e-30)) if probabilities else tensor
        if probabilities:
            tensor = ops.clip(tensor, 1e-7, 1 - 1e-7)
            tensor = ops.log(tensor) - ops.log1p(-tensor)
        return ops.stack([tensor, ops.zeros_like(tensor)], axis=-1)  # a switch is a choice of two classes


class Exam:
    """The held-back samples: what the outputs mean, how near the student is to the teacher, its best weights.

    Args:
        losses: of each output, where they are not those that teacher or student are compiled with.
    """

    def __init__(self, student, teacher, inputs: list[np.ndarray], batch_size: int, losses: Sequence = ()):
        self.student, self.inputs, self.batch_size = student, inputs, batch_size
        self.view = _view(student)  # predicts without a trace in the student itself
        self.wanted = self.answers(_view(teacher))
        if not all(np.isfinite(a).all() for a in self.wanted):
            raise ValueError("The teacher's answers to x are not finite: are its weights, and x, what they should be?")
        got = self.answers(self.view)
        losses = [_name(loss) for loss in losses] or [
            _loss_name(teacher, n) or _loss_name(student, n) for n in range(len(got))
        ]
        self.outputs = [
            _output(_activation(teacher, n), _activation(student, n), self.wanted[n], got[n], loss)
            for n, loss in enumerate(losses)
        ]
        self.first = self.last = self.best = self.distance(got)
        self.weights = student.get_weights()

    def __str__(self) -> str:
        kl, agreement = self.last
        return f"KL {kl:.3g}" + ("" if agreement is None else f", agreement {agreement:.1%}")

    def take(self) -> None:
        """Measure, and keep the weights if they are the best so far and agree no less than the first."""
        self.last = self.distance(self.answers(self.view))
        if self.last[0] < self.best[0] and (self.last[1] is None or self.last[1] >= self.first[1]):
            self.best, self.weights = self.last, self.student.get_weights()

    def answers(self, view) -> list[np.ndarray]:
        inputs = self.inputs if len(self.inputs) > 1 else self.inputs[0]
        return [np.asarray(a) for a in keras.tree.flatten(view.predict(inputs, self.batch_size, verbose=0))]

    def distance(self, got: Sequence[np.ndarray]) -> tuple[float, float | None]:
        """(KL from the teacher, agreement with it), as DistillReport has them; what is not finite is infinitely far."""
        kl, agreements = 0.0, []
        for output, teacher, student in zip(self.outputs, self.wanted, got):
            a = output.logits(ops.convert_to_tensor(teacher), output.teacher_probabilities)
            b = output.logits(ops.convert_to_tensor(student), output.student_probabilities)
            if output.kind == "values":
                kl += float(ops.mean(ops.square(a - b)))
                continue
            log_a, log_b = ops.log_softmax(a, axis=-1), ops.log_softmax(b, axis=-1)
            kl += float(ops.mean(ops.sum(ops.exp(log_a) * (log_a - log_b), axis=-1)))
            same = ops.equal(ops.argmax(a, axis=-1), ops.argmax(b, axis=-1))
            agreements.append(float(ops.mean(ops.cast(same, "float32"))))
        return kl if math.isfinite(kl) else math.inf, float(np.mean(agreements)) if agreements else None


def _view(model) -> keras.Model:
    return keras.Model(graph_of(model).inputs, keras.tree.flatten(outputs_of(model)))


def _output(teacher_activation, student_activation, wanted, got, loss) -> Output:
    """What an output says, from the last activations, the answers themselves and the loss it was trained with."""
    (kind, teacher), (other, student) = (_kind(teacher_activation, wanted, loss), _kind(student_activation, got, loss))
    if teacher and student_activation == "linear":  # its bare numbers are the logits of the teacher's probabilities
        other = kind
    elif student and teacher_activation == "linear":
        kind = other
    if kind != other:
        raise ValueError(
            f"An output of the teacher gives {kind} (it ends in {teacher_activation}), the student's gives {other} "
            f"({student_activation}); expected the same."
        )
    return Output(kind, teacher, student, float(wanted.astype("float32").std()) or 1.0)


def _kind(activation: str, answers: np.ndarray, loss: str) -> tuple[str, bool]:
    """(kind of output, whether it is given as probabilities)."""
    several = answers.ndim > 1 and answers.shape[-1] > 1
    sums_to_one = several and answers.min() >= 0 and np.allclose(answers.sum(-1, dtype="float32"), 1, atol=1e-2)
    if sums_to_one:  # a softmax, wherever in the network it was
        return "classes", True
    if activation == "sigmoid":
        return "switches", True
    if activation == "linear" and "entropy" in loss:
        return ("switches" if "binary" in loss else "classes"), False
    # Without a loss a vector is taken for logits; maps of numbers are followed number by number, which logits bear.
    logits = activation == "linear" and not loss and several and answers.ndim == 2
    return ("classes" if logits else "values"), False


def _loss_name(model, number: int) -> str:
    """The name of the loss of one output, "" if there is none or it cannot be told."""
    loss = compile_arguments_of(model).get("loss") if model.compiled else None
    if isinstance(loss, dict):
        loss = loss.get(graph_of(model).output_names[number])
    elif isinstance(loss, (list, tuple)):
        loss = loss[number] if number < len(loss) else None
    return _name(loss)


def _name(loss) -> str:
    return "" if loss is None else str(getattr(loss, "name", getattr(loss, "__name__", loss)))


def _activation(model, number: int) -> str:
    """Name of the last activation before an output; "linear" if there is none. Nested models are followed."""
    tensor = keras.tree.flatten(outputs_of(model))[number]
    while True:
        made = [(node, n) for node in nodes_of(graph_of(model)) for n, t in enumerate(node.outputs) if t is tensor]
        if not made:
            return "linear"
        node, place = made[0]
        operation = node.operation
        if is_graph(operation):
            return _activation(operation, place)
        while isinstance(operation, layers.Wrapper):
            operation = operation.layer
        name = type(operation).__name__.lower()  # layers and operations alike: Softmax, Sigmoid, ReLU
        if not hasattr(keras.activations, name):
            function = getattr(operation, "activation", None)
            name = getattr(function, "__name__", type(function).__name__) if function is not None else "linear"
        if name != "linear" or not isinstance(operation, (layers.Activation, layers.Dropout, layers.Identity)):
            return name
        tensor = node.input_tensors[0]
