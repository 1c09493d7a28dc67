"""Data in every accepted form is the same data, and bad data is refused before anything is converted."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_export_zoo import convnet, dict_in_dict_out, embedding, images, two_in_two_out

import tflite_export as te
from tflite_export.inputs import collect, generate, model_inputs

X, Y = images(10), np.arange(10)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, at):
        return X[4 * at : 4 * at + 4], Y[4 * at : 4 * at + 4]


FORMS = {
    "array": lambda: X,
    "doubles": lambda: X.astype("float64"),
    "tensor": lambda: tf.constant(X),
    "list of one array": lambda: [X],
    "dict": lambda: {"image": X, "label": Y},
    "x and y": lambda: (X, Y),
    "list of batches": lambda: [X[:4], X[4:]],
    "nested lists": lambda: X.tolist(),
    "generator": lambda: (X[at : at + 3] for at in range(0, 10, 3)),
    "generator of x and y": lambda: ((X[at : at + 3], Y[at : at + 3]) for at in range(0, 10, 3)),
    "batched dataset": lambda: tf.data.Dataset.from_tensor_slices(X).batch(4),
    "dataset with labels": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),
    "dataset of dicts": lambda: tf.data.Dataset.from_tensor_slices({"image": X}).batch(4),
    "dataset without batches": lambda: tf.data.Dataset.from_tensor_slices((X, Y)),
    "PyDataset": Batches,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_samples(form):
    [collected] = collect(FORMS[form](), model_inputs(convnet()), 100)
    assert collected.dtype == np.float32 and np.array_equal(collected, X)
    [few] = collect(FORMS[form](), model_inputs(convnet()), 5)
    assert np.array_equal(few, X[:5])


def test_samples_of_several_inputs_come_in_the_order_of_the_model():
    a, b = np.zeros((6, 4), "float32"), np.ones((6, 4), "float32")
    inputs = model_inputs(two_in_two_out())
    pairs = [[a, b], (a, b), {"alpha": b, "zeta": a}, ((a, b), Y[:6]), [(a[:2], b[:2]), (a[2:], b[2:])]]
    for data in pairs:
        zeta, alpha = collect(data, inputs, 100)
        assert np.array_equal(zeta, a) and np.array_equal(alpha, b)
    sets = tf.data.Dataset.from_tensor_slices((({"right": a[:, :3], "left": b[:, :3]}), Y[:6])).batch(4)
    by_name = dict(zip(["left", "right"], collect(sets, model_inputs(dict_in_dict_out()), 100), strict=True))
    assert by_name["left"].all() and not by_name["right"].any()


BAD = {
    "nothing": ([], "empty"),
    "no sample": (X[:0], "empty"),
    "empty dataset": (tf.data.Dataset.from_tensor_slices(X).take(0), "empty"),
    "other shape": (X[:, :6], "(10, 6, 12, 3)"),
    "channels first": (np.moveaxis(X, -1, 1), "(10, 3, 12, 12)"),
    "NaN": (np.where(X > 1, np.nan, X), "NaN"),
    "infinity": (np.where(X > 1, np.inf, X), "infinite"),
    "text": (np.array(["a", "b"]), "numbers"),
    "wrong name": ({"photo": X}, "'image'"),
    "a number": (3, "array"),
    "a path": ("calibration.npz", "array"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_refused_before_conversion(kind, monkeypatch, tmp_path):
    data, word = BAD[kind]
    monkeypatch.setattr("tflite_export.convert._trace", lambda *_: pytest.fail("was traced"))
    with pytest.raises((ValueError, TypeError), match=word.replace("(", r"\(").replace(")", r"\)")):
        te.export(convnet(), tmp_path / "a.tflite", "int8", data)
    assert not list(tmp_path.iterdir())


def test_fractions_for_an_integer_input_are_refused():
    with pytest.raises(ValueError, match="whole numbers"):
        collect(np.full((4, 6), 0.5), model_inputs(embedding()), 4)
    [words] = collect(np.full((4, 6), 3.0), model_inputs(embedding()), 4)
    assert words.dtype == np.int32


@pytest.mark.parametrize("samples", [0, -1, 2.5])
def test_samples_is_a_whole_number_from_one(samples):
    with pytest.raises(ValueError, match="samples="):
        te.to_tflite(convnet(), "int8", X, samples=samples)


def test_generated_indices_stay_below_the_vocabulary():
    [words] = generate(model_inputs(embedding()), 200)
    assert words.dtype == np.int32 and set(np.unique(words)) == set(range(11))


def test_unequal_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        collect([np.ones((3, 4)), np.ones((2, 4))], model_inputs(two_in_two_out()), 9)


def test_an_endless_generator_is_read_no_further_than_needed():
    taken = []

    def endless():
        while len(taken) < 100:  # so that a mistake fails instead of hanging
            taken.append(1)
            yield X

    [collected] = collect(endless(), model_inputs(convnet()), 25)
    assert len(collected) == 25 and len(taken) == 3
