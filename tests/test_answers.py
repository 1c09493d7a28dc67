"""Exam: how far apart two networks' answers are, against numpy."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_prune.answers import Exam


def net(activation=None, units=5, seed=0, loss=None):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.Dense(16, "tanh")(inputs)
    model = keras.Model(inputs, layers.Dense(units, activation, kernel_initializer="he_normal", name="out")(x))
    if loss:
        model.compile(loss=loss)
    return model


X = np.random.default_rng(0).normal(size=(96, 6)).astype("float32")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bernoulli(p, q):
    return np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_classes_as_logits_or_probabilities(activation):
    teacher, student = net(activation), net(activation, seed=1)
    p, q = (m.predict(X, verbose=0).astype(np.float64) for m in (teacher, student))
    if activation is None:
        p, q = softmax(p), softmax(q)
    kl, agreement = Exam(student, teacher, [X], 32).first
    assert kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), -1)), rel=1e-3) and kl > 0.1
    assert agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1))) and agreement < 0.9


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_switches_as_logits_or_probabilities(activation, units):
    loss = None if activation else keras.losses.BinaryCrossentropy(from_logits=True)
    teacher, student = net(activation, units, loss=loss), net(activation, units, seed=1, loss=loss)
    p, q = (m.predict(X, verbose=0).astype(np.float64) for m in (teacher, student))
    if activation is None:
        p, q = 1 / (1 + np.exp(-p)), 1 / (1 + np.exp(-q))
    kl, agreement = Exam(student, teacher, [X], 32).first
    assert kl == pytest.approx(bernoulli(p, q), rel=1e-3) and kl > 0.01
    assert agreement == pytest.approx(np.mean((p > 0.5) == (q > 0.5))) and agreement < 1


def test_numbers_by_their_squared_error_over_the_variance_and_without_decisions():
    teacher, student = net(units=3, loss="mse"), net(units=3, seed=1)
    p, q = (m.predict(X, verbose=0) for m in (teacher, student))
    kl, agreement = Exam(student, teacher, [X], 32).first
    assert kl == pytest.approx(np.mean((p - q) ** 2) / p.var(), rel=1e-4) and agreement is None


def two_outputs(seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.Dense(16, "tanh")(inputs)
    outputs = {"b": layers.Dense(4, name="b")(x), "a": layers.Dense(2, name="a")(x)}
    model = keras.Model(inputs, outputs)
    model.compile(loss={"b": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "a": "mse"})
    return model


def test_several_outputs_are_known_by_their_names_and_added_up():
    teacher, student = two_outputs(0), two_outputs(1)
    exam = Exam(student, teacher, [X], 32)
    assert [o.kind for o in exam.outputs] == ["values", "classes"]  # a, b
    p, q = (m.predict(X, verbose=0) for m in (teacher, student))
    logs = [np.log(softmax(v["b"].astype(np.float64))) for v in (p, q)]
    want = np.mean((p["a"] - q["a"]) ** 2) / p["a"].var() + np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), -1))
    assert exam.first[0] == pytest.approx(want, rel=1e-3)
    assert exam.first[1] == pytest.approx(np.mean(logs[0].argmax(-1) == logs[1].argmax(-1)))


def test_a_copy_is_at_distance_zero_and_a_broken_network_infinitely_far():
    teacher, student = net(), net(seed=1)
    student.set_weights(teacher.get_weights())
    exam = Exam(student, teacher, [X], 32)
    assert exam.first == (pytest.approx(0, abs=1e-6), 1.0)
    assert exam.distance([np.full((96, 5), np.nan, "float32")])[0] == np.inf


def test_only_nearer_weights_are_kept():
    teacher, student = net(), net(seed=1)
    exam = Exam(student, teacher, [X], 32)
    first = exam.first
    student.set_weights([0 * w for w in student.get_weights()])
    student.get_layer("out").bias.assign([9.0, 0, 0, 0, 0])  # always the same answer
    exam.take()
    assert exam.best == first and exam.last[0] > first[0]
    student.set_weights(teacher.get_weights())
    exam.take()
    assert exam.best[1] == 1.0 and all(map(np.array_equal, exam.weights, teacher.get_weights()))


def test_samples_need_not_fill_a_batch_and_maps_may_have_any_size():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Conv2D(4, 3, padding="same", activation="softmax")(inputs))
    x = np.random.default_rng(0).normal(size=(5, 7, 6, 3)).astype("float32")
    copy = keras.models.clone_model(model)
    exam = Exam(copy, model, [x], 64)
    p, q = (m.predict(x, verbose=0) for m in (model, copy))
    assert exam.outputs[0].kind == "classes" and exam.first[1] == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
