"""Surgery on every model of the zoo: what is cut, what is found again, and what has to stay as it was."""

from __future__ import annotations

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from zoo import FACTS, ZOO, build, conv, head, image, randomize

import keras_prune
from keras_prune import Channels, cut, metrics, strip, zero
from keras_prune.rules import RULES
from keras_prune.surgery import dead_units, relative_difference, settle, zeroed

WIRINGS = (
    "squeeze_and_excite_dense",
    "concat_then_add",
    "channel_shuffle",
    "split_uneven",
    "slice_two",
    "pad_channels",
    "resnet_option_a_ops",
    "resnet_option_a_layers",
    "densely_connected",
    "nested_model_twice",
    "encoder_decoder",
    "attention_cross",
    "vit",
    "bidirectional",
    "time_distributed",
    "conv2d_small_groups",
    "conv2d_large_groups",
    "two_in_two_out_by_name",
    "separable2d",
    "einsum_heads",
    "normalization_given",
    "half_precision",
    "lstm_masked",
    "attention_masked",
    "inverted_residual",
    "prelu",
    "flatten_channels_first",
    "group_norm",
)


@functools.cache
def studied(name):
    """(model, inputs, channels) of the zoo. Nothing may change the model, so all tests share it."""
    model, x = ZOO[name]()
    return model, x, Channels(model)


def some(channels, fraction=0.5, other=False, seed=0):
    """Ids of that fraction of each group; or, as a control, of as many others."""
    rng, parts = np.random.default_rng(seed), [np.zeros(0, int)]
    for group in channels.groups:
        order, n = rng.permutation(group.units), int(len(group) * fraction)
        parts.append(order[n : 2 * n] if other else order[:n])
    return np.concatenate(parts)


def snapshot(model):
    return [np.array(v) for v in model.weights]


def same(before, model):
    return all(np.array_equal(a, b) for a, b in zip(before, snapshot(model)))


@pytest.mark.parametrize("name", ZOO)
def test_cut_model_equals_zeroed_model(name):
    model, x, channels = studied(name)
    before, removed = snapshot(model), some(channels)
    expected, small = zeroed(channels, removed), cut(channels, removed)
    assert relative_difference(expected, small, x) <= FACTS[name].tolerance
    assert metrics.params(channels, removed) == small.count_params()
    assert same(before, model)
    if len(removed):
        wrong = cut(channels, some(channels, other=True))
        assert relative_difference(expected, wrong, x) > 1e-2  # the test can fail


@pytest.mark.parametrize("name", ZOO)
def test_widths_and_fences_are_those_worked_out_on_paper(name):
    _, _, channels = studied(name)
    assert tuple(sorted(len(g) for g in channels.groups)) == FACTS[name].groups
    assert len(channels.fences) == FACTS[name].fences, channels.fences
    assert all(g.producers or "constant" in g.name for g in channels.groups)


@pytest.mark.parametrize("name", ZOO)
def test_strip_finds_exactly_the_zeroed_units_at_least_width(name):
    """One unit is left in every group: an axis of length 1 must not start to broadcast or vanish."""
    _, x, channels = studied(name)
    removed = np.concatenate([np.zeros(0, int), *(g.units[1:] for g in channels.groups)])
    emptied = zeroed(channels, removed)
    small, report = strip(emptied, x, report=True)
    found = Channels(emptied)
    assert np.array_equal(dead_units(found), np.sort(removed))
    assert report.units == len(removed) and report.difference <= FACTS[name].tolerance
    assert small.count_params() == metrics.params(Channels(settle(emptied)), removed)


@pytest.mark.parametrize("name", WIRINGS)
def test_any_subset_of_units_can_leave(name):
    _, x, channels = studied(name)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        removed = np.concatenate([rng.permutation(g.units)[: rng.integers(0, len(g))] for g in channels.groups])
        difference = relative_difference(zeroed(channels, removed), cut(channels, removed), x)
        assert difference <= FACTS[name].tolerance


@pytest.mark.parametrize("name", WIRINGS)
def test_layers_keep_names_dtypes_and_order(name):
    model, _, channels = studied(name)
    small = cut(channels, some(channels))

    def facts(m):
        return [
            (type(v), v.name, v.trainable, str(v.dtype_policy))
            for v in m._flatten_layers()
            if v.weights or isinstance(v, layers.InputLayer)
        ]

    assert facts(small) == facts(model)
    assert small.output_names == model.output_names


def test_stripped_models_load_without_keras_prune(tmp_path):
    """Saved, loaded and stripped; then loaded in a Python that cannot import keras_prune: the same outputs."""
    for name in WIRINGS:
        _, x, channels = studied(name)
        zeroed(channels, some(channels)).save(tmp_path / "zeroed.keras")
        small, report = strip(keras.saving.load_model(tmp_path / "zeroed.keras"), x, report=True)
        assert report.units == len(some(channels))
        small.save(tmp_path / f"{name}.keras")
        np.savez(
            tmp_path / f"{name}.npz",
            *keras.tree.flatten(x),
            *[keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(small(x, training=False))],
        )
    (tmp_path / "zeroed.keras").unlink()
    (tmp_path / "check.py").write_text(
        "import sys, pathlib; sys.modules['keras_prune'] = None\n"
        "import keras, numpy as np\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.keras')):\n"
        "    model = keras.saving.load_model(path)\n"
        "    arrays = list(np.load(path.with_suffix('.npz')).values())\n"
        "    struct = getattr(model, '_functional', model)._inputs_struct\n"
        "    n = len(keras.tree.flatten(struct))\n"
        "    y = keras.tree.flatten(model(keras.tree.pack_sequence_as(struct, arrays[:n]), training=False))\n"
        "    for a, b in zip(y, arrays[n:]):\n"
        "        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 1e-6, path\n"
        "    print('same', path.stem)\n"
    )
    command = [sys.executable, "-I", str(tmp_path / "check.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(WIRINGS)


# -- channels_first: TensorFlow runs it on a CPU only when XLA compiles it ----------------------------------------


def channels_first_and_last(data_format):
    keras.utils.set_random_seed(0)
    axis = 1 if data_format == "channels_first" else -1
    inputs = keras.Input((3, 6, 8) if axis == 1 else (6, 8, 3))

    def conv2d(n, **kwargs):
        return layers.Conv2D(n, 3, padding="same", data_format=data_format, **kwargs)

    x = layers.BatchNormalization(axis=axis)(conv2d(8)(inputs))
    x = layers.MaxPooling2D(data_format=data_format)(layers.ReLU()(x))
    x = layers.Concatenate(axis=axis)(
        [conv2d(4, groups=2)(x), layers.DepthwiseConv2D(3, padding="same", data_format=data_format)(x)]
    )
    x = layers.PReLU(shared_axes=(2, 3) if axis == 1 else (1, 2))(x)
    x = layers.Conv2DTranspose(5, 2, strides=2, data_format=data_format)(x)
    gate = layers.GlobalAveragePooling2D(data_format=data_format, keepdims=True)(x)
    x = x * conv2d(5, activation="sigmoid")(gate)
    x = layers.GroupNormalization(groups=5, axis=axis)(x)
    x = layers.Flatten(data_format=data_format)(x)
    return randomize(keras.Model(inputs, layers.Dense(3)(x)))


def test_channels_first_is_cut_like_channels_last():
    """Oracle: the same network with channels last. Both have the same weights, so both must lose the same slices."""
    first, last = (Channels(channels_first_and_last(f)) for f in ("channels_first", "channels_last"))
    assert [list(g.units) for g in first.groups] == [list(g.units) for g in last.groups]
    removed = some(first)
    small = cut(first, removed)
    for a, b in zip(small.weights, cut(last, removed).weights):
        assert np.array_equal(np.squeeze(a), np.squeeze(b))
    assert small.output_shape == (None, 3)


# -- what has to stay as it was -----------------------------------------------------------------------------------


def trained(optimizer, policy=None, **arguments):
    """A small net with BatchNorm, a residual and a regularizer after two steps of training, its data, its channels."""
    keras.utils.set_random_seed(1)
    inputs = image()
    x = conv(8, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-3), dtype=policy)(inputs)
    # No bias before BatchNorm: its gradient is rounding noise, which Adam blows up to whole steps.
    x = layers.Add()([x, layers.BatchNormalization(dtype=policy)(conv(8, use_bias=False, dtype=policy)(x))])
    x = conv(6, activation="relu", dtype=policy)(x)
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], **arguments
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16, 8, 8, 3)).astype("float32"), rng.integers(0, 3, 16)
    model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model, data, Channels(model)


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01),
    "ema": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True),
    "accumulating": lambda: keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2),
    "loss_scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_zeros_were_held(name):
    """Oracle: the zeroed model with its slots zeroed, trained further under a constraint that holds the zeros."""
    model, data, channels = trained(OPTIMIZERS[name]())
    removed = some(channels)
    small = cut(channels, removed)
    assert type(small.optimizer) is type(model.optimizer)
    assert int(small.optimizer.iterations) == int(model.optimizer.iterations)
    # Slot by slot: cut by hand along the labels of the variable whose name the slot's path carries.
    labels, alive = {w.variable.path.replace("/", "_"): w for w in channels.weights}, channels.alive(removed)
    checked = 0
    for old, new in zip(model.optimizer.variables, small.optimizer.variables):
        expected = np.array(old)
        weight = next((w for path, w in labels.items() if path in old.path and expected.ndim), None)
        for axis, ids in enumerate(weight.axes if weight else ()):
            if ids is not None:
                expected, checked = np.compress(alive[ids], expected, axis), checked + 1
        assert np.array_equal(expected, new), old.path
    assert checked > 8
    zero(channels, removed)
    masks = [np.array(v) != 0 for v in model.trainable_variables]
    assert relative_difference(model, small, data[0]) < 1e-5
    for _ in range(2):
        for m in (model, small):
            m.fit(*data, batch_size=16, verbose=0)  # one step
        for v, mask in zip(model.trainable_variables, masks):
            v.assign(np.where(mask, v, 0))
    assert relative_difference(model, small, data[0]) < 1e-4


def test_adafactor_does_not_crash():
    """Its factored slots have no slice per unit; they start afresh."""
    model, data, channels = trained(keras.optimizers.Adafactor(0.01))
    small = cut(channels, some(channels))
    assert np.isfinite(small.fit(*data, verbose=0).history["loss"][0])


def test_compile_arguments_are_kept():
    model, data, channels = trained(
        keras.optimizers.SGD(0.1),
        run_eagerly=False,
        jit_compile=False,
        steps_per_execution=2,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    small = cut(channels, some(channels))
    assert small.loss is model.loss and small.steps_per_execution == 2 and small.jit_compile is False
    small.fit(*data, batch_size=8, verbose=0)
    assert [m.name for m in small.metrics] == [m.name for m in model.metrics]
    assert small.layers[1].kernel_regularizer.l2 == pytest.approx(1e-3)


def test_mixed_precision_is_not_wrapped_twice():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, data, channels = trained(keras.optimizers.Adam(0.01))
        small = cut(channels, some(channels))
        assert isinstance(small.optimizer, keras.optimizers.LossScaleOptimizer)
        assert isinstance(small.optimizer.inner_optimizer, keras.optimizers.Adam)
        assert np.isfinite(small.fit(*data, verbose=0).history["loss"][0])
    finally:
        keras.config.set_dtype_policy("float32")


def test_losses_by_output_name_are_kept():
    model, x = build("two_in_two_out_by_name")
    model.compile("adam", {"scores": "mse", "gate": "mae"}, loss_weights={"scores": 1.0, "gate": 0.5})
    y = {k: np.zeros(v.shape, "float32") for k, v in model(x).items()}
    model.fit(x, y, verbose=0)
    small = cut(Channels(model), some(Channels(model)))
    assert np.isfinite(small.fit(x, y, verbose=0).history["loss"][0])


@keras.saving.register_keras_serializable("test")
class Distilled(keras.Model):
    """A Functional subclass with a train_step of its own."""

    def train_step(self, data):
        self.steps = getattr(self, "steps", 0) + 1
        return super().train_step(data)


def test_class_of_the_model_is_kept():
    inputs = image()
    model = Distilled(inputs, head(conv(8, activation="relu")(inputs)))
    channels = Channels(model)
    small = cut(channels, some(channels))
    assert type(small) is Distilled


def test_trainable_flags_are_kept_at_every_depth():
    model, _ = build("nested_three_deep")
    model.layers[1].layers[1].trainable = False
    model.layers[1].layers[2].trainable = True
    model.layers[0].trainable = False
    flags = [v.trainable for v in model._flatten_layers()]
    channels = Channels(model)
    assert not all(flags)
    assert [v.trainable for v in cut(channels, some(channels))._flatten_layers()] == flags
    model.trainable = False
    assert not any(v.trainable for v in cut(channels, some(channels))._flatten_layers())


def test_plan_prune_and_strip_leave_the_users_model_alone():
    model, data, _ = trained(keras.optimizers.Adam(0.01))
    before, slots = snapshot(model), [np.array(v) for v in model.optimizer.variables]
    keras_prune.plan(model, 0.3, round_to=1)
    keras_prune.prune(model, 0.3, round_to=1)
    strip(model)
    assert same(before, model)
    assert all(np.array_equal(a, b) for a, b in zip(slots, model.optimizer.variables))


def test_words_survive():
    """A vocabulary is no weight; it must reach the small model all the same."""
    inputs = keras.Input((1,), dtype="string")
    words = layers.TextVectorization(output_sequence_length=4)
    words.adapt(["one two three", "two three four"])
    x = layers.GlobalAveragePooling1D()(layers.Embedding(10, 8)(words(inputs)))
    model = randomize(keras.Model(inputs, head(layers.Dense(6, activation="relu")(x))))
    channels = Channels(model)
    assert sorted(len(g) for g in channels.groups) == [6, 8]
    text = keras.ops.convert_to_tensor([["two four one"], ["three what"]])
    removed = some(channels)
    assert relative_difference(zeroed(channels, removed), cut(channels, removed), text) < 1e-5


def test_bins_survive():
    inputs = keras.Input((3,))
    bins = layers.Discretization(num_bins=5, output_mode="int")
    bins.adapt(np.random.default_rng(0).normal(size=(100, 3)))
    x = layers.Flatten()(layers.Embedding(6, 8)(bins(inputs)))
    model = randomize(keras.Model(inputs, head(layers.Dense(6, activation="relu")(x))))
    channels = Channels(model)
    removed, x = some(channels), np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    assert relative_difference(zeroed(channels, removed), cut(channels, removed), x) < 1e-5


# -- the proof, and errors ----------------------------------------------------------------------------------------


def test_strip_notices_a_wrong_rule(monkeypatch):
    """Softmax over channels taken for a pass-through: the zeroed units still take their share of the sum."""
    inputs = image()
    x = conv(8)(inputs)
    model = randomize(keras.Model(inputs, head(layers.Softmax()(x))))
    monkeypatch.setitem(RULES, "Softmax", lambda layer, call, x: keras_prune.Labels(x))
    channels = Channels(model)
    zero(channels, channels.groups[0].units[:4])
    with pytest.raises(ValueError, match="differ by .* relative"):
        strip(model)
    strip(model, check=False)  # the proof is what stops it


def test_strip_of_a_model_without_zeros_is_an_equal_copy():
    model, x, _ = studied("dense_net")
    small, report = strip(model, report=True)
    assert report.units == 0 and report.difference == 0.0
    assert small is not model and small.count_params() == model.count_params()


def test_strip_keeps_the_last_unit_of_a_group_of_zeros():
    model, x = build("dense_net")
    channels = Channels(model)
    zero(channels, channels.groups[0].units)
    assert len(dead_units(channels)) == len(channels.groups[0]) - 1
    assert strip(model, x).layers[1].output.shape[-1] == 1


def test_sigmoid_of_zero_is_no_zero():
    """Producers alone are zero: behind a ReLU the unit is dead; behind a sigmoid 0.5 goes into a bias."""
    for activation, shift in (("relu", 0.0), ("sigmoid", 0.5)):
        inputs = keras.Input((5,))
        model = randomize(keras.Model(inputs, head(layers.Dense(8, activation=activation)(inputs))))
        channels = Channels(model)
        zero(channels, channels.groups[0].units[:4], producers_only=True)
        assert len(dead_units(channels)) == (0 if shift else 4)
        small = strip(model)
        moved = np.array(small.layers[-1].bias) - np.array(model.layers[-1].bias)
        assert small.layers[1].units == 4
        np.testing.assert_allclose(moved, shift * np.array(model.layers[-1].kernel)[:4].sum(0), atol=1e-6)


def test_errors_say_what_to_do():
    model, x, _ = studied("dense_net")
    with pytest.raises(ValueError, match=r"data for input .* has shape \(2, 9\); expected \(samples, 10\)"):
        strip(model, np.zeros((2, 9), "float32"))
    with pytest.raises(ValueError, match="at least one sample"):
        strip(model, np.zeros((0, 10), "float32"))
    with pytest.raises(ValueError, match="holds 2 arrays, but the model has 1 inputs"):
        strip(model, [x, x])
    broken, _ = build("dense_net")
    broken.layers[1].kernel.assign(np.full(broken.layers[1].kernel.shape, np.nan))
    with pytest.raises(ValueError, match="holds NaN or infinite numbers"):
        strip(broken)
    channels = Channels(model)
    for removed in ([0], [channels.unit_count]):
        with pytest.raises(ValueError, match="expected unit ids, whole numbers from 1 to"):
            cut(channels, removed)


class Forgetful(layers.Layer):
    """Its get_config() names an argument that its __init__ does not take."""

    def __init__(self, n, **kwargs):
        super().__init__(**kwargs)
        self.n = n

    def get_config(self):
        return super().get_config() | {"n": None, "m": 1}

    def call(self, x):
        return x * self.n


def test_own_activations_and_initializers_need_no_registration():
    def own_activation(x):
        return keras.ops.tanh(x) * 0.5

    class OwnInitializer(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            return keras.random.normal(shape, seed=1, dtype=dtype)

    inputs = keras.Input((4,))
    x = layers.Dense(16, activation=own_activation, kernel_initializer=OwnInitializer())(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Activation(own_activation)(x)))
    small = keras_prune.prune(model, 0.5)
    assert small.layers[1].units == 8 and small.layers[2].activation is own_activation


def test_a_layer_that_cannot_be_rebuilt_is_named():
    inputs = image()
    model = keras.Model(inputs, head(conv(4)(Forgetful(2, name="forgetful")(conv(4)(inputs)))))
    with pytest.raises(ValueError, match=r"(?s)'forgetful' \(Forgetful\) cannot be rebuilt .*get_config"):
        cut(Channels(model), [])
