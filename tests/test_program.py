"""A model as a line of calls: it computes what the model computes, whole or in pieces, and forgets what it can."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from zoo import ZOO, conv, head, image, randomize

from keras_prune import Channels
from keras_prune.internals import graph_of, inputs_of, nodes_of
from keras_prune.program import Entrance, Program, batches_of, listening, size_of
from keras_prune.surgery.cutting import copied

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")

CHANGING = ("recurrent_stateful",)  # the second call of the model itself gives something else


@functools.cache
def studied(name):
    """(model, inputs, its outputs as arrays, program) of the zoo."""
    model, x = ZOO[name]()
    return model, x, outputs_of(model, x), Program(model)


def arrays(values):
    return [np.array(ops.cast(v, "float32")) for v in keras.tree.flatten(values)]


def outputs_of(model, x):
    return arrays(model(x, training=False))


def difference(wanted, values, program):
    """The largest of all outputs; nothing else may be left."""
    assert set(values) == set(program.outputs)
    found = arrays([values[slot] for slot in program.outputs])
    return max(np.abs(a - b).max() for a, b in zip(wanted, found))


def run(model, x):
    program = Program(model)
    return difference(outputs_of(model, x), program.run(program.start(x), 0, len(program.steps)), program)


def wiring(program):
    """All of a program but the objects."""
    takes = [([s for _, s in step.takes], step.gives, type(step.operation)) for step in program.steps]
    return takes, program.inputs, program.outputs, program.last_use


def rng():
    return np.random.default_rng(0)


def floats(*shape):
    return rng().normal(size=shape).astype("float32")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in CHANGING])
def test_the_line_computes_what_the_model_computes_whole_and_in_pieces(name):
    model, x, wanted, program = studied(name)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, outputs_of(model, x)))  # the model is deterministic
    end = len(program.steps)
    assert difference(wanted, program.run(program.start(x), 0, end), program) < 1e-6
    values = program.start(x)
    for start in range(0, end, 3):
        before, values = values, program.run(values, start, min(start + 3, end))
        needed = {slot for step in program.steps[start + 3 :] for _, slot in step.takes} | set(program.outputs)
        made = {*program.inputs, *(slot for step in program.steps[: start + 3] for slot in step.gives)}
        assert set(values) == needed & made  # all that is needed, and nothing else
        again = program.run(before, start, min(start + 3, end))
        assert set(again) == set(values)  # a run leaves what it was given as it was
    assert difference(wanted, values, program) < 1e-6


def test_a_model_with_a_state_gives_the_same_from_the_same_state():
    model, x, *_ = studied(*CHANGING)
    [lstm] = [layer for layer in model.layers if isinstance(layer, layers.LSTM)]
    program = Program(model)
    lstm.reset_state()
    wanted = outputs_of(model, x)
    lstm.reset_state()
    assert difference(wanted, program.run(program.start(x), 0, len(program.steps)), program) < 1e-6
    assert difference(wanted, program.run(program.start(x), 0, len(program.steps)), program) > 1e-2


@pytest.mark.parametrize("name", ZOO)
def test_a_copy_has_the_same_slots(name):
    model, *_, program = studied(name)
    copy, _ = copied(Channels(model))
    other = Program(copy)
    assert wiring(other) == wiring(program)
    assert [s.operation.name for s in other.steps if isinstance(s.operation, layers.Layer)] == [
        s.operation.name for s in program.steps if isinstance(s.operation, layers.Layer)
    ]
    if name != "lambda_layer":  # Keras does not clone a lambda
        assert wiring(Program(keras.models.clone_model(model))) == wiring(program)


def test_other_wiring_has_other_slots():
    assert wiring(studied("conv_called_twice")[3]) != wiring(studied("shared_branch")[3])


# -- nested models and layers called twice -----------------------------------------------------------------------


def leaves(graph):
    """How many calls of layers and operations there are at any depth."""
    nested = (n.operation for n in nodes_of(graph))
    return sum(leaves(graph_of(o)) if isinstance(o, keras.Model) else 1 for o in nested)


@pytest.mark.parametrize(
    "name, steps", [("nested_model_twice", 16), ("nested_three_deep", 7), ("nested_model_by_name", 8)]
)
def test_nested_models_are_laid_open(name, steps):
    model, _, _, program = studied(name)
    assert len(program.steps) == leaves(graph_of(model)) == steps
    assert not any(isinstance(step.operation, (keras.Model, Entrance)) for step in program.steps)


def test_a_model_called_three_times_is_there_three_times():
    model, x, _, program = studied("nested_model_twice")
    [inner] = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    for layer in inner.layers[1:]:
        numbers = [n for n, step in enumerate(program.steps) if step.operation is layer]
        assert len(numbers) == 3
        assert len({program.steps[n].gives for n in numbers}) == 3
        assert len({tuple(s for _, s in program.steps[n].takes) for n in numbers}) == 3


def test_a_layer_called_twice_is_two_steps():
    model, _, _, program = studied("conv_called_twice")
    first, second = (n for n, s in enumerate(program.steps) if s.operation is model.layers[2])
    assert [slot for _, slot in program.steps[second].takes] == list(program.steps[first].gives)


def test_a_nested_model_is_given_its_inputs_by_name_whatever_their_order():
    a, b = keras.Input((4,), name="later"), keras.Input((4,), name="earlier")
    inner = keras.Model([a, b], a * 2 + b * 3)
    p, q = keras.Input((4,)), keras.Input((4,))
    assert run(keras.Model([p, q], inner({"later": p, "earlier": q})), list(floats(2, 3, 4))) < 1e-6


@pytest.mark.parametrize(
    "dtype, between",
    [("float32", lambda x: layers.Dense(6, dtype="mixed_float16")(x)), ("int32", lambda x: x), ("bool", lambda x: x)],
)
def test_a_nested_model_computes_in_the_dtype_of_its_own_input(dtype, between):
    i = keras.Input((6,))
    inner = keras.Model(i, ops.divide(i, 3) * 1000.1)
    j = keras.Input((6,))
    middle = keras.Model(j, inner(j))
    inputs = keras.Input((6,), dtype=dtype)
    model = keras.Model(inputs, middle(between(inputs)))
    x = (floats(3, 6) * 3).astype(dtype)
    assert run(model, x) < 1e-6
    program = Program(model)
    [cast] = [step for step in program.steps if isinstance(step.operation, Entrance)]
    values = program.run(program.start(x), 0, program.steps.index(cast) + 1)
    assert keras.backend.standardize_dtype(values[cast.gives[0]].dtype) == "float32"


def test_a_missing_last_axis_of_length_one_is_added_as_the_model_does():
    i = keras.Input((5, 1))
    inner = keras.Model(i, layers.Dense(2)(i))
    inputs = keras.Input((5,))
    assert run(keras.Model(inputs, inner(inputs)), floats(3, 5)) < 1e-6
    one = keras.Input((1,))
    assert run(keras.Model(one, layers.Dense(2)(one)), floats(3)) < 1e-6


# -- inference and masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [layers.RandomFlip(), layers.RandomRotation(0.5), lambda x: layers.Dropout(0.5)(x, training=True)],
    ids=("flip", "rotation", "dropout in training"),
)
def test_layers_that_would_train_unless_told_otherwise_are_told(layer):
    inputs = image()
    assert run(keras.Model(inputs, layer(inputs)), floats(4, 8, 8, 3)) == 0.0


def embedding(masked, **kwargs):
    inputs = keras.Input((6,), dtype="int32")
    return inputs, layers.Embedding(4, 8, mask_zero=masked, **kwargs)(inputs)


def summary():
    """A nested model in which masks matter."""
    i = keras.Input((6, 8))
    return keras.Model(i, layers.LSTM(4)(layers.Dropout(0.1)(i)))


def masked_by_masking(masked):
    inputs = keras.Input((6, 8))
    return keras.Model(inputs, layers.LSTM(4)(layers.Masking(0.0 if masked else 77.0)(inputs)))


def masked_into_a_nested_model(masked):
    inputs, x = embedding(masked)
    return keras.Model(inputs, summary()(x))


def masked_into_a_nested_model_of_another_dtype(masked):
    inputs, x = embedding(masked, dtype="mixed_float16")
    return keras.Model(inputs, summary()(x))


def masked_by_a_nested_model(masked):
    inputs, nested = keras.Input((6,), dtype="int32"), keras.Model(*embedding(masked))
    return keras.Model(inputs, layers.LSTM(4)(layers.Dense(5)(nested(inputs))))


def masked_attention(masked):
    inputs, x = embedding(masked)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 4)(x, x)))


MASKED = (
    masked_by_masking,
    masked_into_a_nested_model,
    masked_into_a_nested_model_of_another_dtype,
    masked_by_a_nested_model,
    masked_attention,
)


@pytest.mark.parametrize("builder", MASKED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", (1, 100))
def test_masks_go_along(builder, size):
    model, other = (randomize(builder(masked)) for masked in (True, False))
    other.set_weights(model.get_weights())
    keep = np.arange(6) < np.array([6, 4, 1, 3])[:, None]
    numbers = len(model.inputs[0].shape) == 3
    x = floats(4, 6, 8) * keep[..., None] if numbers else (rng().integers(1, 4, (4, 6)) * keep).astype("int32")
    wanted, program = outputs_of(model, x), Program(model)
    end, values = len(program.steps), program.start(x)
    for start in range(0, end, size):
        values = program.run(values, start, min(start + size, end))
    assert difference(wanted, values, program) < 1e-6
    assert np.abs(wanted[0] - outputs_of(other, x)[0]).max() > 1e-3  # masks matter here


def test_a_mask_given_to_a_nested_model_is_given():
    inputs, mask = keras.Input((6, 8)), keras.Input((6,), dtype="bool")
    model = keras.Model([inputs, mask], summary()(inputs, mask=mask))
    x, m = floats(4, 6, 8), floats(4, 6) > -0.5
    assert run(model, [x, m]) < 1e-6
    assert np.abs(outputs_of(model, [x, m])[0] - outputs_of(model, [x, ~m])[0]).max() > 1e-3


# -- listening ---------------------------------------------------------------------------------------------------


def test_listening_hears_every_call_and_leaves_no_trace():
    model, x, wanted, program = studied("conv_called_twice")
    layer, heard = model.layers[2], []
    numbers = [n for n, step in enumerate(program.steps) if step.operation is layer]
    weights, state = model.get_weights(), {**vars(layer)}
    with listening(layer, lambda *pair: heard.append(pair)):
        program.run(program.start(x), 0, len(program.steps))
        assert len(heard) == 2
        assert np.array_equal(outputs_of(model, x)[0], wanted[0])
    assert len(heard) == 4  # in the model itself, too
    for number, (given, made) in zip(numbers, heard):
        values = program.run(program.start(x), 0, number)
        [(_, slot)], [out] = program.steps[number].takes, program.steps[number].gives
        assert np.array_equal(given, values[slot])
        assert np.array_equal(made, program.run(values, number, number + 1)[out])
    assert "call" not in vars(layer) and vars(layer).keys() == state.keys()
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights()))
    outputs_of(model, x)
    assert len(heard) == 4


def test_listening_hears_layers_inside_layers_and_arguments_by_name():
    inputs = keras.Input((6, 8))
    attention = layers.MultiHeadAttention(2, 4)
    model = keras.Model(inputs, attention(query=inputs, value=inputs))
    x, heard = floats(3, 6, 8), []
    with listening(attention._query_dense, lambda *pair: heard.append(pair)):
        with listening(attention, lambda *pair: heard.append(pair)):
            program = Program(model)
            values = program.run(program.start(x), 0, len(program.steps))
    (inner_x, inner_y), (outer_x, outer_y) = heard
    assert np.array_equal(inner_x, x) and inner_y.shape == (3, 6, 2, 4)
    assert np.array_equal(outer_x, x) and np.array_equal(outer_y, values[program.outputs[0]])


def test_listening_leaves_no_trace_after_an_exception():
    layer = layers.Dense(3)
    layer.build((None, 4))

    def hear(x, y):
        raise KeyError("hear")

    with pytest.raises(KeyError), listening(layer, hear):
        layer(floats(2, 4))
    assert "call" not in vars(layer)
    with pytest.raises(ValueError), listening(layer, lambda x, y: None):
        layer(floats(2, 5))
    assert "call" not in vars(layer)
    assert layer(floats(2, 4)).shape == (2, 3)


def test_two_can_listen_to_one_layer():
    layer, first, second = layers.Dense(3), [], []
    with listening(layer, lambda x, y: first.append(y)):
        with listening(layer, lambda x, y: second.append(y)):
            layer(floats(2, 4))
        layer(floats(2, 4))
    assert len(first) == 2 and len(second) == 1 and "call" not in vars(layer)


# -- small things ------------------------------------------------------------------------------------------------


def test_users_are_the_steps_that_take_a_slot_and_the_output():
    inputs = image()
    x = conv(4)(inputs)
    y = layers.Add()([layers.ReLU()(x), x])
    program = Program(keras.Model(inputs, [x, head(y), x]))
    kinds = [type(step.operation).__name__ for step in program.steps]
    end, at = len(kinds), kinds.index
    assert kinds[0] == "Conv2D" and end == 5
    assert program.users(program.inputs[0]) == [0]
    assert program.users(program.steps[0].gives[0]) == [at("ReLU"), at("Add"), end, end]
    assert program.users(program.steps[at("ReLU")].gives[0]) == [at("Add")]
    assert program.users(program.outputs[1]) == [end]
    assert program.users(77) == []


def test_an_input_that_nobody_takes_is_forgotten():
    a, b = keras.Input((4,)), keras.Input((4,))
    program = Program(keras.Model([a, b], layers.Dense(3)(layers.ReLU()(a))))
    values = program.start([floats(2, 4), floats(2, 4)])
    assert set(program.run(values, 0, 1)) == set(program.steps[0].gives)


def test_an_optional_input_may_be_left_out():
    class Sum(layers.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

    given = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b", optional=True)}
    model = keras.Model(given, layers.Dense(3)(Sum()(given["a"], given["b"])))
    assert run(model, {"a": floats(2, 4), "b": None}) < 1e-6
    assert run(model, {"a": floats(2, 4), "b": floats(2, 4)}) < 1e-6
    assert size_of(Program(model).start({"a": floats(2, 4), "b": None})) == 32
    [first, last] = batches_of(model, {"a": floats(5, 4), "b": None}, 4)
    assert first["a"].shape == (4, 4) and last["a"].shape == (1, 4) and first["b"] is last["b"] is None


def test_sizes_are_bytes():
    values = {
        0: ops.zeros((2, 3), "float32"),
        1: ops.zeros((5,), "float16"),
        2: ops.zeros((5,), "bfloat16"),
        3: ops.zeros((7,), "bool"),
        4: ops.zeros((2, 2), "int32"),
        5: ops.zeros((), "uint8"),
    }
    assert size_of(values) == 24 + 10 + 10 + 7 + 16 + 1
    assert size_of({}) == 0


@pytest.mark.parametrize("name", ("two_in_two_out_by_name", "shared_branch", "sequential_dense", "lstm_masked"))
def test_batches_are_the_data_in_order_and_what_the_model_takes(name):
    model, x, *_ = studied(name)
    data = keras.tree.map_structure(lambda a: np.concatenate([a, a[:2]]), x)  # five
    batches = list(batches_of(model, data, 2))
    assert [len(keras.tree.flatten(b)[0]) for b in batches] == [2, 2, 1]
    for batch in batches:
        keras.tree.assert_same_structure(batch, inputs_of(model))
        assert all(np.isfinite(y).all() for y in outputs_of(model, batch))
    whole = zip(*(keras.tree.flatten(b) for b in batches))
    assert all(np.array_equal(np.concatenate(a), b) for a, b in zip(whole, keras.tree.flatten(data)))
    program = Program(model)
    values = [program.run(program.start(b), 0, len(program.steps)) for b in batches]
    for slot, y in zip(program.outputs, outputs_of(model, data)):
        assert np.abs(np.concatenate([v[slot] for v in values]) - y).max() < 1e-5
