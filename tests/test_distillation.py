import time

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net

from keras_prune import prune
from keras_prune.answers import Exam
from keras_prune.distillation import CHECK_EVERY, OutputLoss, _augmentation, _indices, distill

QUICK = dict(epochs=5, batch_size=32, progress=False)


@pytest.fixture(scope="module")
def trained():
    """A network that has learned its task, and unlabelled samples."""
    model = compiled(keras.optimizers.Adam(0.01), widths=(8,))
    x, y = patterns(384)
    model.fit(x, y, epochs=6, verbose=0)
    return model, x


def third_cut(model):
    return prune(model, 1 / 3, round_to=1)


def dense_net(activation=None, seed=0, units=5, features=6):
    """Two layers without images or statistics: quick."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((features,))
    x = layers.Dense(16, "tanh", kernel_initializer="he_normal", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(units, activation, kernel_initializer="he_normal", name="head")(x))


def numbers_of(samples=128, features=6, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, features)).astype("float32")


def weights_equal(model, weights):
    return all(np.array_equal(a, b) for a, b in zip(model.get_weights(), weights, strict=True))


def test_a_pruned_network_comes_nearer_to_its_teacher_also_on_samples_that_distill_never_saw(trained):
    teacher, x = trained
    student, fresh = third_cut(teacher), patterns(256, seed=9)[0]

    def kl(model):  # written out: the oracle of the report's figures
        p, q = (np.array(keras.ops.log_softmax(m.predict(fresh, verbose=0))) for m in (teacher, model))
        return np.mean(np.sum(np.exp(p) * (p - q), -1))

    before = kl(student)
    returned, report = distill(student, teacher, x, learning_rate=0.01, **{**QUICK, "epochs": 10})
    assert returned is student and kl(student) < 0.5 * before
    assert report.kl_after < 0.5 * report.kl_before and report.agreement_after >= report.agreement_before
    assert report.steps == 10 * (346 // 32) and report.epochs == 10 and "38 held-back of 384" in str(report)


def test_the_report_agrees_with_numpy_on_the_held_back_samples(trained):
    teacher, x = trained
    other = residual_net((8,), seed=5)
    p, q = (np.array(keras.ops.log_softmax(m.predict(x, verbose=0))) for m in (teacher, other))
    kl, agreement = Exam(other, teacher, [x], 64).first
    assert kl == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=1e-4)
    assert agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
    assert agreement < 0.8  # a network that learned nothing does not agree


def test_a_learning_rate_of_zero_changes_no_weight_that_learns_and_the_student_returns_as_it_came(trained):
    teacher, x = trained
    student = third_cut(teacher)
    weights = student.get_weights()
    trainable = [np.array(v) for v in student.trainable_variables]
    _, report = distill(student, teacher, x, learning_rate=0.0, **{**QUICK, "epochs": 1})
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(trainable, student.trainable_variables))
    assert report.kl_after <= report.kl_before
    if report.kl_after == report.kl_before:  # BatchNormalization's statistics alone may have helped
        assert weights_equal(student, weights) and "as they came" in str(report)


def test_a_student_is_never_returned_worse_than_it_came():
    teacher = dense_net()
    student = keras.models.clone_model(teacher)
    student.set_weights(teacher.get_weights())  # nothing can be nearer
    weights = student.get_weights()
    _, report = distill(student, teacher, numbers_of(), learning_rate=3.0, **QUICK)
    assert weights_equal(student, weights) and report.kl_after == report.kl_before
    assert "as they came" in str(report)


def test_teacher_and_student_are_as_before_but_for_the_students_weights(trained):
    teacher, x = trained
    student = third_cut(teacher)
    teacher.layers[3].trainable = False
    flags, weights = [la.trainable for la in teacher.layers], teacher.get_weights()
    slots = [v.trainable for v in teacher.variables]
    frozen = student.get_layer("down0")
    frozen.trainable = False
    kernel = np.array(frozen.kernel)
    kind, optimizer, iterations = type(student), student.optimizer, int(student.optimizer.iterations)
    momenta = [la.momentum for la in student.layers if isinstance(la, layers.BatchNormalization)]
    try:
        distill(student, teacher, x, **{**QUICK, "epochs": 1})
        assert weights_equal(teacher, weights)
        assert [la.trainable for la in teacher.layers] == flags and [v.trainable for v in teacher.variables] == slots
    finally:
        teacher.layers[3].trainable = True
    assert student.optimizer is optimizer and int(optimizer.iterations) == iterations
    assert type(student) is kind and not frozen.trainable and np.array_equal(kernel, np.array(frozen.kernel))
    assert [la.momentum for la in student.layers if isinstance(la, layers.BatchNormalization)] == momenta
    student.fit(x[:32], np.zeros(32), verbose=0)  # and goes on training with its own loss


def with_activation(model, activation):
    """The same network whose logits pass an activation, in a nested model."""
    inputs = keras.Input(model.input_shape[1:])
    tail = keras.Sequential([keras.Input(model.output_shape[1:]), layers.Activation(activation)])
    return keras.Model(inputs, layers.Dropout(0.5)(tail(model(inputs))))


@pytest.mark.parametrize("activation, loss", [("softmax", None), ("sigmoid", "binary_crossentropy")])
def test_probabilities_and_logits_give_the_same_loss(activation, loss):
    teacher, student, x = dense_net(), dense_net(seed=1), numbers_of()
    if loss:  # tells what the bare numbers are
        teacher.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    wrapped = [with_activation(m, activation) for m in (teacher, student)]
    plain, nested = Exam(student, teacher, [x], 64), Exam(wrapped[1], wrapped[0], [x], 64)
    mixed = Exam(student, wrapped[0], [x], 64)
    assert plain.outputs[0].kind == nested.outputs[0].kind == ("switches" if loss else "classes")
    assert nested.outputs[0].teacher_probabilities and not plain.outputs[0].teacher_probabilities
    assert nested.first == pytest.approx(plain.first, rel=1e-4)
    losses = [
        float(OutputLoss(exam.outputs, 2.0).compute_loss(keras.ops.array(t.predict(x)), keras.ops.array(s.predict(x))))
        for exam, t, s in ((plain, teacher, student), (nested, *wrapped), (mixed, wrapped[0], student))
    ]
    assert losses[0] > 0.1 and losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_the_loss_is_temperature_squared_times_the_kl_of_the_softened_predictions():
    a, b = np.random.default_rng(0).normal(size=(2, 7, 5)).astype("float32")
    exam = Exam(dense_net(seed=1), dense_net(), [numbers_of()], 64)
    p, q = (np.array(keras.ops.log_softmax(v / 3)) for v in (a, b))
    want = 9 * np.mean(np.sum(np.exp(p) * (p - q), -1))
    loss = OutputLoss(exam.outputs, 3.0).compute_loss(keras.ops.array(a), keras.ops.array(b))
    assert float(loss) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("activation, loss, units, kind", [
    (None, None, 5, "classes"), (None, None, 1, "values"), (None, "mse", 5, "values"), ("relu", None, 5, "values"),
    ("softmax", None, 5, "classes"), ("sigmoid", None, 1, "switches"), (None, "categorical_crossentropy", 5, "classes"),
])  # fmt: skip
def test_what_an_output_says_is_read_from_its_activation_and_loss(activation, loss, units, kind):
    teacher, student = dense_net(activation, units=units), dense_net(activation, seed=1, units=units)
    if loss:
        teacher.compile(loss=loss)
    exam = Exam(student, teacher, [numbers_of()], 64)
    assert [output.kind for output in exam.outputs] == [kind]
    assert (exam.first[1] is None) == (kind == "values")


def test_values_are_compared_in_units_of_the_teachers_deviation():
    teacher, student, x = dense_net(), dense_net(seed=1), numbers_of()
    teacher.compile(loss="mse")
    a, b = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    assert Exam(student, teacher, [x], 64).first[0] == pytest.approx(np.mean((a - b) ** 2) / a.var(), rel=1e-4)


def two_doors(seed):
    keras.utils.set_random_seed(seed)
    a, b = keras.Input((6,), name="a"), keras.Input((3,), name="b")
    x = layers.Dense(16, "relu")(layers.Concatenate()([a, b]))
    outputs = {"much": layers.Dense(1, name="much")(x), "which": layers.Dense(4, "softmax", name="which")(x)}
    return keras.Model({"a": a, "b": b}, outputs)


def test_several_inputs_and_outputs_are_added_up():
    teacher, student = two_doors(0), two_doors(1)
    x = {"a": numbers_of(), "b": numbers_of(features=3, seed=1)}
    _, report = distill(student, teacher, x, learning_rate=0.01, augment="auto", **QUICK)
    assert report.kl_after < 0.8 * report.kl_before and "values" in str(report) and "classes" in str(report)


def test_half_precision_is_taught_too():
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        teacher, student = dense_net("softmax"), dense_net("softmax", seed=1)
        _, report = distill(student, teacher, numbers_of(), **{**QUICK, "epochs": 12}, learning_rate=0.02)
    finally:
        keras.mixed_precision.set_dtype_policy(policy)
    assert report.kl_after < 0.8 * report.kl_before


def test_the_same_seed_and_epochs_give_the_same_student():
    runs = [distill(dense_net(seed=1), dense_net(), numbers_of(), seed=3, **QUICK)[0] for _ in range(2)]
    other = distill(dense_net(seed=1), dense_net(), numbers_of(), seed=4, **QUICK)[0]
    a, b, c = (model.get_layer("head").get_weights()[0] for model in (*runs, other))
    assert np.allclose(a, b, atol=1e-6) and not np.allclose(a, c, atol=1e-4)


def test_the_minutes_are_those_of_the_training():
    start = time.perf_counter()
    _, report = distill(dense_net(seed=1), dense_net(), numbers_of(), minutes=1.5 / 60, progress=False)
    assert 1.5 < report.seconds <= time.perf_counter() - start < 15  # with tracing, on a busy machine
    assert report.steps > CHECK_EVERY[0]


def test_every_epoch_shows_full_batches_of_distinct_samples_in_another_order():
    batches = _indices(np.arange(10, 17), 3, seed=0)
    first, second = (np.concatenate([next(batches), next(batches)]) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 6 and not np.array_equal(first, second)
    assert {*first, *second} <= set(range(10, 17))


def test_augmentation_moves_whole_pixels_and_mirrors_only_colours():
    image = np.arange(16 * 16 * 3, dtype="float32").reshape(1, 16, 16, 3)
    colours, how = _augmentation("auto", [image], 0)
    moved = np.array(colours(np.repeat(image, 16, 0)))
    assert moved.shape == (16, 16, 16, 3) and "mirrored" in how
    assert len(np.unique(moved.reshape(16, -1), axis=0)) > 4 and set(moved.ravel()) <= set(image.ravel())
    rising = [bool(np.all(np.diff(row[5:11, 0]) > 0)) for row in moved[:, 8]]
    assert any(rising) and not all(rising)
    grey, how = _augmentation("auto", [image[..., :1]], 0)
    columns = np.array(grey(np.repeat(image[..., :1], 16, 0)))[:, 8, 5:11, 0]
    assert "mirrored" not in how and (np.diff(columns) > 0).all()
    x = numbers_of()
    assert _augmentation("auto", [x], 0)[0](x) is x and _augmentation(None, [image], 0)[0](image) is image


def test_an_augmentation_of_ones_own_is_used():
    seen = []

    def double(batch):
        seen.append(len(batch))
        return 2 * batch

    distill(dense_net(seed=1), dense_net(), numbers_of(), augment=double, **{**QUICK, "epochs": 1})
    assert seen == [32, 32, 32]


def test_an_interrupted_lesson_leaves_the_best_student_and_an_unfrozen_teacher():
    calls = []

    def impatient(batch):
        calls.append(1)
        if len(calls) > 5:  # before the first check
            raise KeyboardInterrupt
        return batch

    teacher, student = dense_net(), dense_net(seed=1)
    weights = student.get_weights()
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, numbers_of(), augment=impatient, **QUICK)
    assert weights_equal(student, weights) and teacher.trainable and teacher.layers[1].trainable


@pytest.mark.parametrize("change, message", [
    (dict(student=dense_net(units=4)), r"outputs have shapes \[\(None, 4\)\], the teacher's \[\(None, 5\)\]"),
    (dict(student=dense_net(features=7)), "inputs have shapes"),
    (dict(student=dense_net("relu")), "gives classes .* the student's gives values"),
    (dict(x=np.zeros((8, 7), "float32")), "has shape"),
    (dict(x=np.zeros((1, 6), "float32")), "two or more"),
    (dict(x=np.full((8, 6), np.nan, "float32")), "not finite"),
    (dict(minutes=0), "minutes=0"), (dict(epochs=0), "epochs=0"), (dict(held_back=1.0), "held_back=1.0"),
    (dict(temperature=0.0), "temperature"), (dict(augment="flip"), "augment='flip'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_reason(change, message):
    arguments = {**dict(student=dense_net(seed=1), teacher=dense_net(), x=numbers_of(), **QUICK), **change}
    with pytest.raises(ValueError, match=message):
        distill(**arguments)


def test_a_network_cannot_teach_itself_and_a_frozen_one_cannot_learn():
    teacher, student = dense_net(), dense_net(seed=1)
    with pytest.raises(ValueError, match="share weights"):
        distill(teacher, teacher, numbers_of())
    student.trainable = False
    with pytest.raises(ValueError, match="trainable"):
        distill(student, teacher, numbers_of())
