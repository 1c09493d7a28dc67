"""Label-free distillation: the original network teaches the small one on unlabelled data, for a number of minutes.

The model that holds both networks and its losses are Keras's own (`keras.distillation`). What is here keeps time,
augments, and never gives back a student that follows its teacher less well than it came.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import keras
import numpy as np
from keras import layers

from keras_prune.answers import Exam, Output
from keras_prune.internals import check_model, inputs_of, layers_of, outputs_of
from keras_prune.surgery import checked_inputs

HELD_BACK_AT_MOST = 2000  # samples: agreement is then known to about 1 %, and the rest is of more use in training
WARM_UP = 10  # steps: Adam's first ones go by the sign of the gradient alone
CHECK_EVERY = (10, 500)  # steps, at least and at most: else once an epoch


@dataclass(frozen=True)
class DistillReport:
    """What distillation did, measured on samples that were held back from it; prints itself.

    Attributes:
        seconds: wall-clock of the whole call.
        steps, epochs: of training; the last epoch may be a part of one.
        kl_before, kl_after: mean Kullback-Leibler divergence of the student from the teacher in nats, summed over the
            outputs; an output that is no distribution adds its mean squared error ÷ the variance of the teacher's.
        agreement_before, agreement_after: fraction of decisions (class, or yes / no) that are the teacher's, averaged
            over the outputs that decide something; None if none does.
        notes: what the outputs were taken for, and what else a reader should know.
    """

    seconds: float
    steps: int
    epochs: float
    kl_before: float
    kl_after: float
    agreement_before: float | None
    agreement_after: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = (
            f"distilled {self.steps:,} steps ({self.epochs:.1f} epochs) in {self.seconds:.0f} s; "
            f"KL from the teacher {self.kl_before:.4g} -> {self.kl_after:.4g}"
        )
        if self.agreement_before is not None:
            line += f", agreement {self.agreement_before:.1%} -> {self.agreement_after:.1%}"
        return "\n".join([line, *self.notes])


@keras.saving.register_keras_serializable("keras_prune")
class OutputLoss(keras.distillation.DistillationLoss):
    """The sum over the outputs of Keras's distillation loss that suits each."""

    def __init__(self, outputs: Sequence[Output], temperature: float):
        self.outputs, self.temperature = list(outputs), temperature
        # A KLDivergence object: from the name "kl_divergence" Keras 3.15 makes a function, and hands it bare logits.
        soft = keras.distillation.LogitsDistillation(temperature, loss=keras.losses.KLDivergence())
        plain = keras.distillation.FeatureDistillation(loss=keras.losses.MeanSquaredError())
        self.losses = [plain if output.kind == "values" else soft for output in outputs]

    def validate_outputs(self, teacher_outputs, student_outputs):
        """Their shapes were compared before; a list in one and a dict in the other is no harm."""

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        total = 0.0
        answers = keras.tree.flatten(teacher_outputs), keras.tree.flatten(student_outputs)
        for output, loss, teacher, student in zip(self.outputs, self.losses, *answers):
            total += loss.compute_loss(
                output.logits(teacher, output.teacher_probabilities),
                output.logits(student, output.student_probabilities),
            )
        return total

    def get_config(self):
        return {"outputs": [asdict(output) for output in self.outputs], "temperature": self.temperature}

    @classmethod
    def from_config(cls, config):
        return cls([Output(**output) for output in config["outputs"]], config["temperature"])


def distill(
    student: keras.Model,
    teacher: keras.Model,
    x,
    *,
    minutes: float = 10.0,
    epochs: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    temperature: float = 2.0,
    augment: str | Callable | None = "auto",
    held_back: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> tuple[keras.Model, DistillReport]:
    """Train the student, in place, to answer as the teacher does; no labels are used.

    Adam with a learning rate that falls along a cosine to 0 at the end of the budget. The student keeps the state that
    was nearest to the teacher on samples that are held back and not augmented: if none was nearer than the first, it
    returns as it came. Its optimizer, loss, metrics and trainable flags are not touched (frozen layers stay frozen).

    Args:
        student: the small network; Functional or built Sequential.
        teacher: the original, with the same inputs and outputs. It runs in inference mode and is not changed.
        x: unlabelled inputs, as for `student.predict`: an array (samples, ...), or a structure of arrays.
        minutes: wall-clock of training, counted from the end of the first step: compilation is not part of it.
        epochs: train for so many epochs instead, whatever the time: for runs that can be repeated.
        batch_size: samples per step; lowered if there are fewer.
        learning_rate: the highest; a student far from its teacher learns faster with 3e-3, a near one is thrown back.
        temperature: of the softmax in the loss; above 1 the teacher's second thoughts count for more.
        augment: "auto" (images are moved by up to an eighth of their size and, if they have colours, mirrored;
            everything else stays), None, or a layer or function batch -> batch (in the structure of the inputs).
        held_back: fraction of the samples to measure on, in (0, 1); 2,000 samples at most.
        seed: of the order, the held-back samples and the automatic augmentation.
        progress: show a progress bar.

    Returns:
        (student, report).

    Raises:
        TypeError: no Keras models.
        ValueError: student and teacher do not fit each other or `x`, or share weights; a number is out of its range;
            fewer than two samples; the teacher's answers are not finite; there is nothing to train.
    """
    began = time.perf_counter()
    check_models(student, teacher)
    _check_numbers(minutes, epochs, batch_size, learning_rate, held_back)
    arrays = [np.asarray(a) for a in keras.tree.flatten(checked_inputs(student, x))]
    if len({len(a) for a in arrays}) > 1 or len(arrays[0]) < 2:
        raise ValueError(f"x has {[len(a) for a in arrays]} samples; expected the same number of each, two or more.")
    order = np.random.default_rng(seed).permutation(len(arrays[0]))
    apart = min(max(1, round(held_back * len(order))), len(order) - 1, HELD_BACK_AT_MOST)
    exam = Exam(student, teacher, [a[order[:apart]] for a in arrays], batch_size)
    transform, how = _augmentation(augment, arrays, seed)
    size = min(batch_size, len(order) - apart)
    per_epoch = (len(order) - apart) // size
    batches = (
        transform(keras.tree.pack_sequence_as(inputs_of(student), [a[some] for a in arrays]))
        for some in _indices(order[apart:], size, seed)
    )
    with as_found(teacher), _quick_statistics(student):
        distiller = _distiller(student, teacher, exam.outputs, temperature)
        try:
            steps = _train(distiller, batches, exam, learning_rate, per_epoch, minutes, epochs, progress)
        finally:  # also when the user loses patience
            student.set_weights(exam.weights)
    (kl, agreement), (best_kl, best_agreement) = exam.first, exam.best
    notes = [
        f"measured on {apart:,} held-back of {len(order):,} unlabelled samples; {how}",
        *(f"output {number}: {output}" for number, output in enumerate(exam.outputs)),
    ]
    if exam.best == exam.first:
        notes.append("nothing came nearer to the teacher: the student's weights are as they came")
    seconds = time.perf_counter() - began
    report = DistillReport(seconds, steps, steps / per_epoch, kl, best_kl, agreement, best_agreement, tuple(notes))
    return student, report


def _train(distiller, batches, exam, rate, per_epoch, minutes, epochs, progress) -> int:
    """Number of steps. A loop, not `fit`: on JAX a rate that a callback sets between two steps of `fit` is lost."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    every = min(max(per_epoch, CHECK_EVERY[0]), CHECK_EVERY[1])
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task, steps, used = bar.add_task(f"distill: {exam}", total=1.0), 0, 0.0
        while used < 1:
            warm = min(1.0, (steps + 1) / WARM_UP)
            distiller.optimizer.learning_rate = rate * warm * (1 + math.cos(math.pi * used)) / 2
            distiller.train_on_batch(next(batches))
            steps += 1
            if steps == 1:  # tracing and compilation belong to nobody's budget
                start = time.perf_counter()
            used = steps / (epochs * per_epoch) if epochs else (time.perf_counter() - start) / (60 * minutes)
            if steps % every == 0 or used >= 1:
                exam.take()
            bar.update(task, completed=min(used, 1.0), description=f"distill: {exam}")
    return steps


def _indices(samples: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Full batches for ever, each epoch in another order: one shape, so that one step is compiled."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(samples)
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


def _augmentation(augment, arrays: Sequence[np.ndarray], seed: int) -> tuple[Callable, str]:
    """(batch -> batch, what it does in words)."""
    if augment is None:
        return (lambda batch: batch), "no augmentation"
    if augment != "auto":
        if not callable(augment):
            raise ValueError(f"augment={augment!r}; expected 'auto', None, or a layer or function batch -> batch.")
        if isinstance(augment, layers.Layer):
            return (lambda batch: augment(batch, training=True)), f"augmented by {augment.name}"
        return augment, f"augmented by {getattr(augment, '__name__', type(augment).__name__)}"
    if len(arrays) != 1 or arrays[0].ndim != 4:
        return (lambda batch: batch), "no augmentation: the input is no image"
    # Whole pixels: between them it would blur. The teacher sees the same picture, so that no label can go wrong.
    steps = [layers.RandomTranslation(1 / 8, 1 / 8, "reflect", "nearest", seed=seed, dtype="float32")]
    if arrays[0].shape[-1 if keras.config.image_data_format() == "channels_last" else 1] == 3:
        # one channel is a written digit or a spectrogram, of which the mirror image does not occur
        steps.append(layers.RandomFlip("horizontal", seed=seed, dtype="float32"))

    def transform(batch):
        flat = keras.tree.flatten(batch)[0]
        for step in steps:
            flat = step(flat, training=True)
        return keras.tree.pack_sequence_as(batch, [flat])

    return transform, "images moved" + (" and mirrored" if len(steps) > 1 else "")


def _distiller(student, teacher, outputs, temperature) -> keras.distillation.Distiller:
    # BatchNormalization trains as ever, on the statistics of the batch: with them frozen, a ResNet-20 cut to half its
    # MACs came to 80.1 % agreement instead of 83.7 % in the same 112 steps on 1,024 CIFAR-10 images, and with SGD it
    # came to nothing; Adam bears both.
    distiller = keras.distillation.Distiller(
        teacher, student, OutputLoss(outputs, temperature), student_loss_weight=0.0, dtype="float32"
    )
    optimizer = scaling_its_loss(keras.optimizers.Adam(), student)
    distiller.compile(optimizer, loss="mse")  # has to be named; its weight is 0 and there are no labels
    return distiller


def scaling_its_loss(optimizer, student):
    """An optimizer that bears float16: not automatic, as the distiller itself is float32."""
    optimizer = keras.optimizers.get(optimizer)
    is_half = any(layer.compute_dtype == "float16" for layer in layers_of(student))
    if is_half and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


@contextmanager
def as_found(teacher):
    """Give the teacher its trainable flags back: Keras's Distiller freezes it for good."""
    flags = [(item, item.trainable) for item in [*layers_of(teacher), *teacher.variables]]
    try:
        yield
    finally:
        for item, flag in flags:  # from the model down: a layer's flag overwrites those inside it
            item.trainable = flag


@contextmanager
def _quick_statistics(student):
    """Statistics that keep up with a short training: of 0.99, a third of the old would be left after 100 steps."""
    norms = [layer for layer in layers_of(student) if isinstance(layer, layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    try:
        for layer in norms:
            layer.momentum = min(layer.momentum, 0.9)
        yield
    finally:
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum


def check_models(student, teacher) -> None:
    """Raise unless the one can learn from the other."""
    for model in (student, teacher):
        check_model(model)
    for what, read in (("inputs", inputs_of), ("outputs", outputs_of)):
        a, b = ([tuple(t.shape) for t in keras.tree.flatten(read(model))] for model in (student, teacher))
        fits = [
            len(s) == len(t) and all(None in pair or pair[0] == pair[1] for pair in zip(s, t)) for s, t in zip(a, b)
        ]
        if len(a) != len(b) or not all(fits):
            raise ValueError(f"The student's {what} have shapes {a}, the teacher's {b}; expected the same.")
    if {id(v) for v in student.variables} & {id(v) for v in teacher.variables}:
        raise ValueError(
            "student and teacher share weights; expected two networks: keras.models.clone_model, or prune."
        )
    if not student.trainable_variables:
        raise ValueError(f"Nothing in {student.name!r} is trainable: set student.trainable = True.")


def _check_numbers(minutes, epochs, batch_size, learning_rate, held_back) -> None:
    for name, value, fine, expected in (
        ("minutes", minutes, minutes > 0, "a number above 0"),
        ("epochs", epochs, epochs is None or (isinstance(epochs, numbers.Integral) and epochs > 0), "a number from 1"),
        ("batch_size", batch_size, isinstance(batch_size, numbers.Integral) and batch_size > 0, "a number from 1"),
        ("learning_rate", learning_rate, learning_rate >= 0, "a number from 0"),
        ("held_back", held_back, 0 < held_back < 1, "a fraction between 0 and 1"),
    ):
        if not fine:
            raise ValueError(f"{name}={value!r} was passed to distill; expected {expected}.")
