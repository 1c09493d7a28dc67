"""Reconstruction: kernels refitted to what the original network makes, against numpy and against the plain cut."""

from __future__ import annotations

import json
import math

import keras
import numpy as np
import pytest
from keras import layers
from zoo import ZOO, conv, example, head, image, randomize

from keras_prune import Channels, cut, reconstruction
from keras_prune.least_squares import refit_wide
from keras_prune.program import Program
from keras_prune.reconstruction import reconstruct
from keras_prune.sites import Tail, sites_of
from keras_prune.surgery import relative_difference, zeroed

# One of each kind of reader and wiring. All other deterministic models of the zoo pass too, in some minutes.
MODELS = (
    *("conv1d_strided", "conv1d_transpose", "conv2d_dilated", "conv2d_large_groups", "conv3d_strided"),
    *("depthwise2d_multiplied", "separable1d", "vit", "inverted_residual", "resnet_option_a_ops"),
    *("nested_model_twice", "attention_cross", "attention_masked", "einsum_per_head", "einsum_batch_letter_passes"),
    *("lstm_masked", "time_distributed", "half_precision", "two_in_two_out_by_name", "flatten_channels_first"),
)


def third(channels):
    return np.concatenate([np.zeros(0, int), *(g.units[: len(g) // 3] for g in channels.groups)])


def answers(model, x):
    return [np.asarray(keras.ops.cast(a, "float32")) for a in keras.tree.flatten(model(x, training=False))]


def error(model, small, x):
    """Squared error of the outputs ÷ their variance, the mean of all outputs."""
    pairs = zip(answers(model, x), answers(small, x))
    return float(np.mean([np.square(a - b).mean() / max(a.var(), 1e-12) for a, b in pairs]))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def spoiled(cut_with_twins, channels, removed):
    """A cut that loses some of every kernel that can be refitted."""
    small, twins = cut_with_twins(channels, removed)
    for site in sites_of(Channels(small), Program(small)):
        site.kernel.assign(0.9 * np.asarray(site.kernel) + 0.1 * numbers(*site.kernel.shape))
    return small, twins


@pytest.mark.parametrize("name", [name for name in MODELS if name in ZOO])
def test_what_is_left_is_refitted_towards_the_original(name, monkeypatch):
    model, _ = ZOO[name]()
    channels, x = Channels(model), example(model, 32)
    tolerance = 2e-2 if name == "half_precision" else 1e-4
    assert relative_difference(model, reconstruct(channels, [], x), x) < tolerance  # nothing gone, nothing to do
    removed = third(channels)
    plain, small = cut(channels, removed), reconstruct(channels, removed, x)
    assert small.count_params() == plain.count_params()
    assert error(model, small, x) < 0.7 * error(model, plain, x)
    cutting = reconstruction.cut_with_twins
    monkeypatch.setattr(reconstruction, "cut_with_twins", lambda *a: spoiled(cutting, *a))
    spoilt, mended = spoiled(cutting, channels, [])[0], reconstruct(channels, [], x, strength=1e-6)
    assert error(model, mended, x) < 0.5 * error(model, spoilt, x)  # every view and target is the right one


# -- against numpy -------------------------------------------------------------------------------------------------


def ridge(rows, target, prior, strength):
    """argmin |target - rows w - c|² + λ |w - prior|² as one stacked least-squares problem in float64."""
    rows, target, prior = (a.astype(np.float64) for a in (rows, target, prior))
    means = rows.mean(0), target.mean(0)
    size = math.sqrt(strength * np.square(rows - means[0]).sum() / rows.shape[1])
    stacked = np.concatenate([rows - means[0], size * np.eye(rows.shape[1])])
    w = np.linalg.lstsq(stacked, np.concatenate([target - means[1], size * prior]), rcond=None)[0]
    return w, means[1] - means[0] @ w


def two_dense(use_bias=True, activation=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(12, activation, name="first")(inputs)
    return randomize(keras.Model(inputs, layers.Dense(4, use_bias=use_bias, name="second")(x)))


@pytest.mark.parametrize("strength", [None, 0.1])
@pytest.mark.parametrize("columns_at_most", [8192, 4])
def test_a_dense_consumer_is_the_ridge_fit_of_numpy(strength, columns_at_most, monkeypatch):
    monkeypatch.setattr(reconstruction, "WIDE", columns_at_most)
    wide, called = columns_at_most < 8, []
    monkeypatch.setattr(reconstruction, "refit_wide", lambda *a: called.append(1) or refit_wide(*a))
    model, x = two_dense(activation="tanh"), numbers(200, 6)
    small = reconstruct(model, Channels(model).groups[0].units[:4], x, strength=strength)
    (k1, b1), (k2, b2) = (model.get_layer(n).get_weights() for n in ("first", "second"))
    kept = np.setdiff1d(np.arange(12), np.arange(4))
    seen = np.tanh(x @ np.array(small.get_layer("first").kernel) + np.array(small.get_layer("first").bias))
    prior = k2[kept]
    w, c = ridge(seen, np.tanh(x @ k1 + b1) @ k2, prior, max(1e-3, 8 / 200) if strength is None else strength)
    assert np.allclose(small.get_layer("second").kernel, w, atol=1e-4)
    assert np.allclose(small.get_layer("second").bias, b2 + c, atol=1e-4)
    assert not np.allclose(prior, w, atol=1e-2)  # the cut alone is something else
    assert len(called) == (2 if wide else 0)


def test_without_a_bias_there_is_no_intercept():
    model, x = two_dense(use_bias=False), numbers(200, 6) + 1
    small = reconstruct(model, Channels(model).groups[0].units[:8], x, strength=0.0)
    seen = x @ np.array(small.get_layer("first").kernel) + np.array(small.get_layer("first").bias)
    w = np.linalg.lstsq(seen.astype(np.float64), answers(model, x)[0], rcond=None)[0]
    assert np.allclose(small.get_layer("second").kernel, w, atol=1e-3)


def conv_net(use_bias=False):
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, use_bias=use_bias, name="first")(inputs)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.Conv2D(5, 3, use_bias=use_bias, name="second")(layers.ReLU()(x))
    return randomize(keras.Model(inputs, layers.BatchNormalization(name="norm2")(x)))


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_convolution_is_fitted_to_its_patches_and_the_intercept_goes_to_bias_or_moving_mean(use_bias):
    model, x = conv_net(use_bias), numbers(40, 6, 6, 2)
    small = reconstruct(model, Channels(model).groups[0].units[:3], x, strength=0.01)
    before, here = (keras.Model(m.input, m.get_layer("second").input)(x) for m in (model, small))
    rows, there = (
        np.stack([np.asarray(h)[:, i : i + 3, j : j + 3].reshape(40, -1) for i in (0, 1) for j in (0, 1)], 1)
        for h in (here, before)
    )
    kernel, *_ = model.get_layer("second").get_weights()
    prior = kernel[:, :, 3:].reshape(-1, 5)
    w, c = ridge(rows.reshape(160, -1), (there @ kernel.reshape(-1, 5)).reshape(160, 5), prior, 0.01)
    assert np.allclose(np.reshape(small.get_layer("second").kernel, (-1, 5)), w, atol=1e-3)
    old, new = (m.get_layer("norm2").moving_mean for m in (model, small))
    if use_bias:
        moved = np.array(small.get_layer("second").bias) - np.array(model.get_layer("second").bias)
        assert np.array_equal(old, new)
    else:
        moved = np.array(old) - np.array(new)
    assert np.allclose(moved, c, atol=1e-3) and np.abs(c).max() > 0.01


def residual():
    """A stream that no kernel can repair before the sum: an error in it is left to the block."""
    inputs = image()
    x = conv(8, 1, activation="relu", name="stem")(inputs)
    x = layers.MaxPooling2D(2)(x)
    y = conv(16, activation="relu", name="inner")(x)
    y = layers.BatchNormalization()(conv(8, name="outer")(y))
    return randomize(keras.Model(inputs, layers.ReLU()(layers.Add(name="sum")([x, y]))))


def test_a_sum_is_repaired_by_what_is_added_last(monkeypatch):
    model, x = residual(), numbers(64, 8, 8, 3)
    cutting = reconstruction.cut_with_twins

    def with_an_error_upstream(channels, removed):
        small, twins = cutting(channels, removed)
        stem = small.get_layer("stem")
        stem.kernel.assign(0.7 * np.asarray(stem.kernel))
        return small, twins

    sites = reconstruction.sites_of  # the stem is left as it is
    monkeypatch.setattr(reconstruction, "cut_with_twins", with_an_error_upstream)
    monkeypatch.setattr(reconstruction, "sites_of", lambda *a: [s for s in sites(*a) if s.layer.name != "stem"])
    repaired = error(model, reconstruct(model, [], x, passes=0), x)
    relaxed = error(model, reconstruct(model, [], x, passes=3), x)
    monkeypatch.setattr(reconstruction, "tail_of", lambda *a: Tail())
    alone = error(model, reconstruct(model, [], x), x)
    assert relaxed < repaired < 0.6 * alone


def test_targets_that_a_relu_cuts_off_leave_room_for_the_others():
    inputs = keras.Input((6,))
    x = layers.Dense(24, "relu", name="first")(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(8, "relu", name="second")(x)))
    x, removed = numbers(400, 6), Channels(model).groups[0].units[:16]
    strict, relaxed = (error(model, reconstruct(model, removed, x, passes=n), x) for n in (0, 10))
    assert relaxed < 0.95 * strict


def test_errors_made_upstream_are_repaired_downstream(monkeypatch):
    """Rows from the small network; with rows from the original, as for the layer alone, it is worse."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((10,))
    x = layers.Dense(20, "relu")(layers.Dense(20, "relu")(inputs))
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Dense(20, "relu")(x))))
    x, channels = numbers(600, 10), Channels(model)
    removed = np.concatenate([g.units[:10] for g in channels.groups])
    with_it = error(model, reconstruct(channels, removed, x), x)
    heard, inputs_of_layer = {}, reconstruction.inputs_of_layer

    def the_original_cut(program, values, layer, first, last):
        there = inputs_of_layer(program, values, layer, first, last)
        if program.model is model:
            heard["there"] = there
            return there
        kept = np.flatnonzero(channels.alive(removed)[channels.ids_of(program_node(model, layer.name)).ravel()])
        return [a[:, kept] if a.shape[-1] == 20 else a for a in heard["there"]]

    monkeypatch.setattr(reconstruction, "inputs_of_layer", the_original_cut)
    assert with_it < 0.9 * error(model, reconstruct(channels, removed, x), x)


def program_node(model, name):
    """What the layer is called on."""
    return model.get_layer(name).input


# -- means, not ends -----------------------------------------------------------------------------------------------


def test_memory_and_batches_change_nothing(monkeypatch):
    model, x = residual(), numbers(12, 8, 8, 3)
    channels = Channels(model)
    removed, runs = third(channels), []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, v, a, b: runs.append(b - a) or run(self, v, a, b))
    counts, results = [], []
    for options in ({}, {"memory": 1}, {"batch_size": 7}, {"batch_size": 500}):
        runs.clear()
        results.append(reconstruct(channels, removed, x, rows=10**9, **options).get_weights())
        counts.append(sum(runs))
    for other in results[1:]:
        assert all(np.allclose(a, b, atol=2e-4) for a, b in zip(results[0], other))
    assert counts[1] > counts[0]  # computed again


def test_the_seed_chooses_the_positions():
    model, x = residual(), numbers(20, 8, 8, 3)
    removed = third(Channels(model))
    a, b, c = (reconstruct(model, removed, x, rows=64, seed=s).get_weights() for s in (0, 0, 1))
    assert all(np.array_equal(p, q) for p, q in zip(a, b)) and not all(np.allclose(p, q) for p, q in zip(a, c))


def test_the_original_is_as_before_and_the_small_network_is_plain_keras(tmp_path):
    model, x = conv_net(), numbers(32, 6, 6, 2)
    model.compile("adam", "mse")
    model.fit(x, answers(model, x)[0], verbose=0)
    weights, config, slots = model.get_weights(), json.dumps(model.get_config()), [*model.optimizer.variables]
    state = [np.array(v) for v in slots]
    small = reconstruct(model, third(Channels(model)), x)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights()))
    assert json.dumps(model.get_config()) == config and all(map(np.array_equal, state, slots))
    assert all("call" not in vars(layer) for m in (model, small) for layer in m.layers)  # nobody listens any more
    assert (
        type(small).__module__.startswith("keras.")
        and small.loss == "mse"
        and isinstance(small.optimizer, keras.optimizers.Adam)
    )
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    assert np.allclose(answers(loaded, x)[0], answers(small, x)[0], atol=1e-6)
    loaded.fit(x, answers(model, x)[0], verbose=0)


@pytest.mark.parametrize("data, message", [
    (numbers(8, 5, 6, 2), "has shape"), (numbers(0, 6, 6, 2), "at least one sample"), (None, "has shape"),
    ([numbers(8, 6, 6, 2)] * 2, "2 arrays"), (np.full((8, 6, 6, 2), np.nan, "float32"), "finite"),
])  # fmt: skip
def test_data_that_does_not_fit_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(conv_net(), [], data)


def test_units_that_cannot_leave_are_refused():
    with pytest.raises(ValueError, match="unit ids"):
        reconstruct(conv_net(), [999], numbers(8, 6, 6, 2))


# -- wirings that were wrong once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_an_intercept_is_not_written_into_statistics_of_others(shared):
    """A BatchNormalization called twice, or over another axis of the same length."""
    inputs = keras.Input((8, 8, 3))
    x = conv(8, activation="relu")(inputs)
    norm = layers.BatchNormalization(axis=-1 if shared else 1, name="norm")
    a, b = (layers.ReLU()(norm(conv(8, use_bias=False)(x))) for _ in range(2))
    model = randomize(keras.Model(inputs, head(layers.Concatenate()([a, b] if shared else [a, a]))))
    channels, x = Channels(model), example(model, 32)
    small = reconstruct(channels, channels.groups[0].units[:3], x)
    assert np.array_equal(small.get_layer("norm").moving_mean, model.get_layer("norm").moving_mean)
    assert error(model, small, x) < 0.7 * error(model, cut(channels, channels.groups[0].units[:3]), x)


def test_units_that_pass_a_kernel_are_its_rows():
    """Units of the first EinsumDense are rows of the second: those that are gone are no rows of the original either."""
    model, _ = ZOO["einsum_batch_letter_passes"]()
    channels, x = Channels(model), example(model, 32)
    site = sites_of(channels, Program(model))[1]
    small = reconstruct(channels, channels.groups[0].units[::2], x)
    same = [v for v in small.weights if tuple(v.shape) == tuple(site.kernel.shape)]
    assert any(np.allclose(v, site.kernel, atol=1e-5) for v in same)  # its own input did not change


def named(order):
    """A nested model with the inputs [later, earlier], called by their names."""
    a, b = keras.Input((4,), name="later"), keras.Input((6,), name="earlier")
    inner = keras.Model([a, b], layers.Concatenate()([layers.Dense(3)(a), layers.Dense(5)(b)]), name="inner")
    inputs = keras.Input((5,))
    given = {"later": layers.Dense(4, name="four")(inputs), "earlier": layers.Dense(6, name="six")(inputs)}
    given = {key: given[key] for key in order}
    return randomize(keras.Model(inputs, layers.Dense(2)(inner(given))))


@pytest.mark.parametrize("order", [("later", "earlier"), ("earlier", "later")])
def test_a_nested_model_that_is_called_by_names_gets_its_inputs_by_names(order):
    model, x = named(order), numbers(40, 5)
    channels = Channels(model)
    assert sorted(len(g) for g in channels.groups) == [3, 4, 5, 6]
    for group in channels.groups:
        removed = group.units[:2]
        assert relative_difference(zeroed(channels, removed), cut(channels, removed), x) < 1e-5
        readers = {m.weight.layer.units for m in group.members if m.reads}
        assert readers == {4: {3}, 6: {5}}.get(len(group), {2})
    removed = third(channels)
    assert error(model, reconstruct(channels, removed, x), x) < error(model, cut(channels, removed), x)
    assert relative_difference(model, reconstruct(channels, [], x), x) < 1e-4
