"""Fine-tuning with labels and a teacher: the network before pruning goes on teaching the pruned one.

The loss and the model that holds both networks are Keras's own (`keras.distillation`). What is here finds out what the
outputs mean, and adds what Keras's Distiller leaves out of a network's own training.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence

import keras

from keras_prune.answers import Exam
from keras_prune.distillation import OutputLoss, as_found, check_models, scaling_its_loss
from keras_prune.internals import compile_arguments_of, graph_of, outputs_of
from keras_prune.probes import unlabelled
from keras_prune.surgery import fresh_metric

LOOKED_AT = 256  # samples, to see what the outputs mean


def finetune(
    student: keras.Model,
    teacher: keras.Model,
    x,
    y=None,
    *,
    epochs: int = 1,
    alpha: float = 0.9,
    temperature: float = 4.0,
    loss=None,
    loss_weights=None,
    metrics=None,
    optimizer=None,
    learning_rate=None,
    batch_size: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | keras.callbacks.Callback | None = (),
    validation_data=None,
    **fit_arguments,
) -> keras.callbacks.History:
    """Train the student, in place, on labels and on the answers of its teacher.

    The loss of a batch is (1 - alpha) * CE(y, z_s) + alpha * T² * KL(softmax(z_t / T) || softmax(z_s / T)): CE is the
    student's own loss, whatever it is, z are logits, T the temperature. Where an output gives probabilities, their
    logarithms are the logits; outputs that decide nothing follow the teacher's values (squared error ÷ variance).
    Of several outputs both parts are summed. Penalties of the student's layers are added in full.

    The student's weights change, and nothing else: its own optimizer, loss and metrics are as before, and the teacher,
    which runs in inference mode, is as it was.

    Args:
        student: the pruned network, or one that `callbacks` prune; Functional or built Sequential.
        teacher: the network before pruning, with the same inputs and outputs.
        x, y: as for `fit`: arrays, or a data set of (x, y) batches that can be read more than once. Sample weights are
            not taken: Keras's distillation has none.
        epochs, batch_size, validation_data, fit_arguments: as for `fit`.
        alpha: the teacher's share of the loss, in [0, 1].
        temperature: above 0.
        loss, loss_weights, metrics: as for `compile`; default: those that the student, or else the teacher, was
            compiled with.
        optimizer: a Keras optimizer or its name; default: Adam.
        learning_rate: of the default optimizer: a number (default 0.001) or a schedule.
        callbacks: of `fit`. Pruning callbacks prune the student; the others see a `keras.distillation.Distiller`, with
            the network in `.student`: let EarlyStopping and the like watch its logs.

    Returns:
        What `fit` returns. Besides the metrics it has `student_loss` and `distillation_loss`.

    Raises:
        TypeError, ValueError: student and teacher do not fit each other or `x`, or share weights; there is no loss; an
            argument is out of its range.

    [Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2]

    Example:
        >>> small = prune(model, 0.5)                                                       # doctest: +SKIP
        >>> finetune(small, model, x, y, epochs=10, validation_data=(x_val, y_val))         # doctest: +SKIP
    """
    check_models(student, teacher)
    compiled = next((m for m in (student, teacher) if m.compiled), None)
    if compiled is not None and loss is None:
        given = compile_arguments_of(compiled)
        loss = given.get("loss")
        loss_weights = given.get("loss_weights") if loss_weights is None else loss_weights
        metrics = keras.tree.map_structure(fresh_metric, given.get("metrics")) if metrics is None else metrics
    if loss is None:
        raise ValueError("finetune has no loss: neither student nor teacher is compiled with one. Pass loss=.")
    if optimizer is not None and learning_rate is not None:
        raise ValueError("finetune was given optimizer= and learning_rate=; set the learning rate of the optimizer.")
    if y is None and (hasattr(x, "shape") or isinstance(x, (list, dict))):
        raise ValueError("finetune was given x without y; for unlabelled data there is keras_prune.distill.")
    rate = 1e-3 if learning_rate is None else learning_rate
    with as_found(teacher):
        both = _distiller(student, teacher, x, alpha, temperature, loss)
        both.compile(optimizer or keras.optimizers.Adam(rate), loss, metrics, loss_weights=loss_weights)
        return both.fit(
            x,
            y,
            epochs=epochs,
            batch_size=batch_size,
            callbacks=[] if callbacks is None else keras.tree.flatten(callbacks),
            validation_data=validation_data,
            **fit_arguments,
        )


def distiller(
    student: keras.Model, teacher: keras.Model, x, *, alpha: float = 0.9, temperature: float = 4.0
) -> keras.distillation.Distiller:
    """Student and teacher in one model, ready for your own `compile` and `fit`; the loss is that of `finetune`.

    Args:
        student, teacher: as for `finetune`. The teacher stays frozen (`trainable = False`), as Keras leaves it.
        x: some inputs, as for `student.predict`: what the outputs mean is seen from the answers, from the last
            activations, and from the losses that teacher or student are compiled with, if they are.
        alpha: the teacher's share of the loss, in [0, 1].
        temperature: above 0.

    Returns:
        A `keras.distillation.Distiller`; `compile` takes `loss`, `metrics` and `loss_weights` as that of the student.

    Raises:
        TypeError, ValueError: as for `finetune`.

    Example:
        >>> both = distiller(small, model, x)                                               # doctest: +SKIP
        >>> both.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])   # doctest: +SKIP
        >>> both.fit(x, y, epochs=10, callbacks=[GradualPruning(0.5)])                      # doctest: +SKIP
    """
    check_models(student, teacher)
    return _distiller(student, teacher, x, alpha, temperature, None)


def _distiller(student, teacher, x, alpha, temperature, loss) -> FineTuner:
    for name, value, fine, expected in (
        ("alpha", alpha, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        ("temperature", temperature, lambda v: v > 0, "a number above 0"),
    ):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fine(value):
            raise ValueError(f"{name}={value!r} was passed for distillation; expected {expected}.")
    if isinstance(x, Iterator):
        raise ValueError("x can be read only once; expected arrays, or a data set that can be read again.")
    x = list(x) if isinstance(x, tuple) else x  # several inputs; not (x, y)
    inputs = keras.tree.flatten(unlabelled(student, x, LOOKED_AT))
    losses = () if loss is None else per_output(student, loss)
    outputs = Exam(student, teacher, inputs, 64, losses).outputs
    return FineTuner(
        teacher, student, OutputLoss(outputs, float(temperature)), student_loss_weight=1 - float(alpha), dtype="float32"
    )


@keras.saving.register_keras_serializable("keras_prune")
class FineTuner(keras.distillation.Distiller):
    """Keras's Distiller with what it lacks of a network's own training: penalties of layers, weights of losses, and
    labels, losses and metrics in whatever structure the network's own `fit` takes them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.built = True  # both networks are; BackupAndRestore asks

    def compile(self, optimizer="adam", loss=None, metrics=None, *, loss_weights=None, **arguments):
        """As `keras.Model.compile`."""
        if loss is not None:
            losses, weights = per_output(self.student, loss), per_output(self.student, loss_weights)
            loss = tuple(_weighted(each, weight) for each, weight in zip(losses, weights))
        if metrics is not None:
            metrics = list(per_output(self.student, metrics))
            if len(metrics) == 1:
                metrics = metrics[0] if isinstance(metrics[0], (list, tuple)) else metrics
        super().compile(scaling_its_loss(optimizer, self.student), loss, metrics, **arguments)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """As of Keras, and the penalties of the student's layers."""
        if sample_weight is not None:
            raise ValueError(
                "Distillation takes no sample weights: keras.distillation.Distiller leaves them out. Pass (x, y) "
                "without them, and no class_weight; or train without a teacher."
            )
        if y_pred is None:
            y_pred = self(x, training=training)
        penalties = list(self.losses)  # before the teacher runs
        y = None if y is None else self._labels(y)
        total = super().compute_loss(x, y, tuple(keras.tree.flatten(y_pred)), None, training)
        return sum((keras.ops.cast(penalty, "float32") for penalty in penalties), total)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """As of Keras; labels by the name of the output find it also where the outputs have none."""
        y = None if y is None else keras.tree.pack_sequence_as(y_pred, self._labels(y))
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _labels(self, y) -> tuple:
        number = len(graph_of(self.student).outputs)
        if number > 1 and not isinstance(y, (list, tuple, dict)):
            raise ValueError(f"{self.student.name!r} has {number} outputs; expected labels for each of them.")
        return per_output(self.student, y)


def per_output(model: keras.Model, given) -> tuple:
    """One entry per output, in the order of the network, of what `compile` and `fit` take for one or for each output.

    Raises:
        ValueError: it has entries for other outputs.
    """
    structure, names = outputs_of(model), graph_of(model).output_names
    number = len(names)
    if isinstance(given, dict):
        keys = sorted(structure) if isinstance(structure, dict) else names
        unknown = set(given) - set(keys)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no outputs of {model.name!r}; expected some of {list(keys)}.")
        return tuple(given.get(key) for key in keys)
    if number > 1 and isinstance(given, (list, tuple)):
        if len(given) != number:
            raise ValueError(f"{len(given)} entries were given for the {number} outputs of {model.name!r}.")
        return tuple(given)
    if number == 1 and isinstance(given, (list, tuple)) and len(given) == 1:
        return tuple(given)
    return (given,) * number


def _weighted(loss, weight) -> Callable:
    """A loss times its weight; of an output without a loss nothing."""
    if loss is None:
        return lambda y, answers: keras.ops.zeros(())
    loss, weight = keras.losses.get(loss), 1.0 if weight is None else weight
    return lambda y, answers: weight * keras.ops.mean(loss(y, answers))  # of a name Keras has one loss per sample
