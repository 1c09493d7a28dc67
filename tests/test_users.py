"""What users really do, and what went wrong when they did."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net

from keras_prune import Channels, FilterPruning, cut, plan, prune, recalibrate_batchnorm, release, strip, zero


def test_pretrained_embeddings_in_the_initializer_are_cut():
    table = np.random.default_rng(0).normal(size=(50, 16)).astype("float32")
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(50, 16, embeddings_initializer=keras.initializers.Constant(table))(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    decision = plan(model, 0.5, measure="params", round_to=1)
    small = decision.cut()
    assert small.layers[1].output_dim < 16 and small.count_params() == decision.totals["params"][1]


def test_a_released_model_trains_without_pruning():
    model, (x, y) = compiled("adam"), patterns(128)
    dense = model.get_weights()
    model.fit(x, y, verbose=0, callbacks=[FilterPruning(0.5)])
    model.set_weights(dense)
    release(model)
    model.fit(x, y, verbose=0)
    assert not np.any(np.array(model.get_layer("inner0").kernel) == 0)


def test_protecting_a_model_inside_protects_all_its_layers_and_strangers_are_named():
    inner = residual_net(widths=(16, 32))
    inputs = keras.Input((12, 12, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(64, name="after")(inner(inputs))))
    for protect in ([inner], ["residual_net"]):
        small = prune(model, 0.01, measure="params", protect=protect)
        widths = {w.layer.name: w.variable.shape[-1] for w in Channels(small).weights if w.is_kernel}
        assert widths["inner0"] == 16 and widths["inner1"] == 32 and widths["after"] < 64
    for stranger in (layers.Dense(3), model.layers[0]):
        with pytest.raises(ValueError, match="fits no layer with weights"):
            plan(model, 0.3, protect=[stranger])


def test_variables_without_weight_decay_stay_without_after_the_cut():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model, (x, y) = compiled(optimizer), patterns(64)
    model.fit(x, y, verbose=0)
    small = prune(model, 0.4)
    decays = {v.path.split("/")[-1]: small.optimizer._use_weight_decay(v) for v in small.trainable_variables}
    assert decays == {"kernel": True, "bias": False, "gamma": False, "beta": False}


def test_a_compile_of_ones_own_does_not_stop_strip():
    class Distiller(keras.Model):
        def compile(self, optimizer, loss_fn, temperature):
            super().compile(optimizer=optimizer)

    inner = residual_net()
    model = Distiller(inner.inputs, inner.outputs)
    model.compile("adam", None, temperature=3)
    with pytest.warns(UserWarning, match="not compiled"):
        small = prune(model, 0.4)
    assert isinstance(small, Distiller) and small.count_params() < model.count_params()


def test_strip_leaves_the_states_of_random_layers_alone():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dropout(0.5)(layers.Dense(32, activation="relu")(inputs))))
    channels = Channels(model)
    zero(channels, channels.groups[0].units[:8])
    before = [np.array(v) for v in model.variables]
    strip(model)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables))


def test_recalibration_takes_x_of_a_pair_of_arrays():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.BatchNormalization(name="norm")(inputs))
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    recalibrate_batchnorm(model, (x, x + 100))
    assert np.abs(np.array(model.get_layer("norm").moving_mean)).max() < 1


def test_plans_with_numpy_measures_and_units_that_are_gone_are_json():
    model = residual_net(widths=(32, 32))

    def width(channels, removed):
        return np.float32(sum(len(g) for g in channels.groups) - len(removed))

    first = plan(model, 0.3, measure=width)
    second = plan(model, 0.6, measure=width, already=first.removed)
    content = json.loads(second.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert content["totals"]["width"]["after"] < content["totals"]["width"]["before"]
    assert plan(model, 0.5, already=first.channels.groups[0].units[1:]).reached > 0


@pytest.mark.parametrize("criterion", ["l2", "fpgm", "bn_scale", "random"])
def test_what_is_zero_in_the_model_counts_as_removed(criterion):
    model = residual_net(widths=(32, 64))
    channels = Channels(model)
    dead = np.concatenate([g.units[:8] for g in channels.groups])
    zero(channels, dead)
    assert np.isin(dead, plan(model, 0.6, criterion=criterion, seed=0).removed).all()


def test_dropout_of_whole_channels_with_a_fixed_number_is_a_fence():
    inputs = keras.Input((8, 8, 3))
    x = layers.Dropout(0.2, noise_shape=(None, 1, 1, 16))(layers.Conv2D(16, 3)(inputs))
    x = layers.Conv2D(32, 3, name="free")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    decision = plan(model, 0.3)
    assert "noise_shape" in str(decision.fences[0]) and decision.cut().get_layer("free").filters < 32


@pytest.mark.parametrize("bad", [None, ["a"], [1.7], [-1], [0], [10**6], np.ones(5, bool)])
def test_ids_that_are_none_are_refused(bad):
    channels = Channels(residual_net())
    for function in (cut, zero):
        with pytest.raises(ValueError, match="expected unit ids"):
            function(channels, bad)


def test_a_group_is_never_cut_whole():
    channels = Channels(residual_net())
    with pytest.raises(ValueError, match="at least one has to stay"):
        cut(channels, channels.groups[0].units)


@pytest.mark.parametrize("arguments", [dict(measure=["macs"]), dict(criterion={"l2": 1}), dict(budget=[])])
def test_lists_in_the_place_of_names_are_named(arguments):
    with pytest.raises(ValueError, match="is not known"):
        plan(residual_net(), 0.5, **arguments)


def test_batches_are_counted_anew_for_every_model_also_when_their_number_is_unknown():
    seen = []

    def schedule(step):
        seen.append(step)
        return 0.0

    pruning = FilterPruning(schedule, unit="batch")
    x, y = patterns(48)
    for _ in range(2):
        seen.clear()
        compiled().fit(
            ((x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)), epochs=1, verbose=0, callbacks=[pruning]
        )
        assert seen[:6] == [0, 1, 2, 3, 4, 5] and len(seen) <= 7  # Keras announces a batch before it finds none left
