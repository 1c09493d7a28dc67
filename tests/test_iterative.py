import json
import os

import keras
import numpy as np
import pytest
from keras import layers

import keras_prune
from keras_prune import Channels, IterativePruning, kept_masks, metrics, redrawn, scratch_epochs, strip
from keras_prune.iterative import kernel_values
from keras_prune.reports import plot_curve
from keras_prune.rounds import measured
from keras_prune.similarity import mask_similarity, structure_report, weight_stability

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, :3] @ np.array([1.0, -2, 1]) + X[:, 3] * X[:, 4] > 0).astype("int32")
STEPS = 2  # batches of an epoch


def network(optimizer=None, seed=0, eager=True, dropout=0.1, **arguments):
    """A small one that starts quickly, with everything that has to be set back."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Dense(16, name="one")(inputs)))
    x = layers.Dropout(dropout, seed=1)(x)
    x = layers.Dense(12, "relu", name="two")(x)
    model = keras.Model(inputs, layers.Dense(2, name="logits")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    model.compile(optimizer, loss, metrics=["accuracy"], run_eagerly=eager, **arguments)
    return model


def fit(model, *callbacks, epochs, **arguments):
    given = dict(batch_size=32, shuffle=False, verbose=0)
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **{**given, **arguments}).history


def array(variable):
    return np.array(keras.ops.convert_to_numpy(variable))


def values(model):
    return [array(v) for v in model.weights]


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def slots(optimizer):
    """The largest number in any momentum."""
    inner = getattr(optimizer, "inner_optimizer", None) or optimizer
    found = [v for v in inner.variables if v.name not in ("iteration", "learning_rate")]
    return max([float(np.abs(array(v)).max()) for v in found], default=0.0)


class Watch(keras.callbacks.Callback):
    """What there was after each batch, and at the beginning of each epoch (after the pruning)."""

    def on_train_begin(self, logs=None):
        self.after, self.at, self.momenta, self.steps, self.rates = [values(self.model)], {}, {}, {}, {}

    def on_epoch_begin(self, epoch, logs=None):
        optimizer = self.model.optimizer
        self.at[epoch], self.momenta[epoch] = values(self.model), slots(optimizer)
        self.steps[epoch] = int(optimizer.iterations)
        self.rates[epoch] = float(array(optimizer.learning_rate))

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(values(self.model))


def run(weights, units=False, rounds=2, epochs=None, optimizer=None, model=None, first=2, **arguments):
    model = model or network(optimizer)
    arguments = {"round_to": 1, **arguments} if units else arguments
    pruning = IterativePruning(rounds, 0.3, weights=weights, units=units, first=first, retrain=2, **arguments)
    watch = Watch()
    history = fit(model, pruning, watch, epochs=epochs or first + 2 * rounds)
    return model, pruning, watch, history


# -- what weights are set back to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("units", (False, True), ids=("weights", "units"))
@pytest.mark.parametrize("weights, k", (("rewind_init", None), ("rewind_step_k", 3), ("rewind_step_k", 4)))
def test_kept_weights_are_those_of_that_step_bit_for_bit(weights, k, units):
    model, pruning, watch, _ = run(weights, units, k=k)
    origin = watch.after[k or 0]
    assert pruning.rewound_to == (k or 0)
    for epoch in (2, 4):
        zeros, pruned = 0, watch.at[epoch]
        for before, now in zip(origin, pruned):
            kept = now != 0
            assert np.array_equal(now[kept], before[kept])
            zeros += int((~kept & (before != 0)).sum())
        assert zeros > 20
        assert watch.momenta[epoch] == 0 and watch.steps[epoch] == 0
    assert not equal(watch.after[2], watch.after[3])  # there was something to set back
    names = [v.name for v in model.weights]
    for name, fresh in (("moving_mean", 0.0), ("moving_variance", 1.0)):
        found, moved = watch.at[2][names.index(name)], watch.after[4][names.index(name)]
        assert not np.allclose(moved, fresh)
        if weights == "rewind_init":
            assert set(np.unique(found)) <= {0.0, fresh}  # zero where a unit is gone
    zero_at = [now == 0 for now in watch.at[4]]
    assert all((end[was] == 0).all() for end, was in zip(values(model), zero_at) if was.ndim == 2)


@pytest.mark.parametrize("units", (False, True), ids=("weights", "units"))
def test_fine_tuning_goes_on_with_what_is_there(units):
    """The control of the test above."""
    _, pruning, watch, _ = run("finetune", units)
    for epoch in (2, 4):
        before, now = watch.after[STEPS * epoch], watch.at[epoch]
        kept = [n != 0 for n in now]
        assert all(np.array_equal(n[k], b[k]) for n, b, k in zip(now, before, kept))
        assert not all(np.array_equal(n[k], b[k]) for n, b, k in zip(now, watch.after[0], kept))
        assert watch.momenta[epoch] > 0 and watch.steps[epoch] == STEPS * epoch
    assert pruning.rewound_to is None
    _, _, watch, _ = run("finetune", units, restart=True)
    assert watch.momenta[2] == watch.momenta[4] == watch.steps[2] == watch.steps[4] == 0
    assert not equal(watch.at[2], watch.after[0])


@pytest.mark.parametrize("units", (False, True), ids=("weights", "units"))
def test_reinit_draws_other_weights_and_keeps_the_mask(units):
    runs = [run("reinit", units, seed=seed) for seed in (3, 3, 4)]
    model, pruning, watch, _ = runs[0]
    for n, name in enumerate(v.path for v in model.weights):
        if not name.endswith("/kernel"):
            continue
        one, two, start = watch.at[2][n], watch.at[4][n], watch.after[0][n]
        kept = two != 0
        assert kept.sum() > 5 and (one[kept] != 0).all()  # what is gone stays gone
        assert abs(np.corrcoef(one[kept], start[kept])[0, 1]) < 0.6 and not np.isin(one[kept], start).any()
        assert not np.isin(two[kept], one).any()  # another draw in each round
        assert not np.isin(runs[2][2].at[2][n][kept], one[kept]).any() or not one[kept].all()
    assert equal(watch.at[2], runs[1][2].at[2])  # until training differs, the same seed gives the same
    assert watch.momenta[2] == watch.momenta[4] == watch.steps[4] == 0
    names = [v.path.rsplit("/", 1)[-1] for v in model.weights]
    for name, fresh in (("moving_mean", 0.0), ("moving_variance", 1.0), ("gamma", 1.0), ("beta", 0.0), ("bias", 0.0)):
        assert set(np.unique(watch.at[2][names.index(name)])) <= {0.0, fresh}, name


def test_units_are_drawn_at_the_widths_that_are_left():
    """He's initializer looks at how many inputs there are: a narrow network starts with larger weights."""
    keras.utils.set_random_seed(0)
    wide = [layers.Dense(400, "relu", kernel_initializer="he_normal", name=f"wide{n}") for n in range(2)]
    model = keras.Sequential([keras.Input((6,)), *wide, layers.Dense(2, name="logits")])
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruning = IterativePruning(
        1, 0.75, weights="reinit", units=True, measure="units", budget="uniform", round_to=1, seed=0
    )
    fit(model, pruning, epochs=2)
    kernel = array(model.get_layer("wide1").kernel)
    assert (kernel != 0).sum() == 100 * 100
    assert kernel[kernel != 0].std() == pytest.approx(np.sqrt(2 / 100), rel=0.05)
    pruning = IterativePruning(1, 0.75, weights="reinit", seed=0)  # single weights: as the whole kernel was drawn
    keras_prune.release(model)
    model.set_weights([np.ones_like(v) for v in values(model)])
    fit(model, pruning, epochs=2)
    kernel = array(model.get_layer("wide1").kernel)
    assert kernel[kernel != 0].std() == pytest.approx(np.sqrt(2 / 400), rel=0.05)


def test_frozen_layers_and_adapted_statistics_are_not_drawn():
    keras.utils.set_random_seed(0)
    adapted, frozen = layers.Normalization(name="adapted"), layers.Dense(12, "relu", name="frozen", trainable=False)
    adapted.adapt(3 * X + 5)
    model = keras.Sequential([keras.Input((6,)), adapted, frozen, layers.Dense(8, name="free"), layers.Dense(2)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = {v.path: array(v) for v in model.weights}
    fit(model, IterativePruning(1, 0.3, weights="reinit", seed=0), epochs=2)
    for variable in model.weights:
        now, was = array(variable), before[variable.path]
        if "adapted" in variable.path or "frozen" in variable.path:
            assert np.array_equal(now[now != 0], was[now != 0])
    free = model.get_layer("free").kernel
    assert not np.isin(array(free)[array(free) != 0], before[free.path]).any()  # the others are


@pytest.mark.parametrize("optimizer", (keras.optimizers.Adam, lambda r: keras.optimizers.SGD(r, momentum=0.9)))
def test_a_schedule_inside_the_optimizer_is_rewound_too(optimizer):
    def schedule():
        return keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.5)

    _, _, watch, _ = run("rewind_init", optimizer=optimizer(schedule()))
    assert [watch.rates[e] for e in (0, 2, 4)] == pytest.approx([0.01] * 3) and watch.rates[1] < 0.003
    _, _, watch, _ = run("rewind_step_k", k=3, optimizer=optimizer(schedule()))
    assert [watch.steps[e] for e in (2, 4)] == [3, 3] and watch.momenta[4] == 0
    assert [watch.rates[e] for e in (2, 4)] == pytest.approx([0.01 / 8] * 2)
    _, _, watch, _ = run("finetune", optimizer=optimizer(schedule()))
    assert watch.rates[4] == pytest.approx(0.01 / 256)


def test_a_callback_sets_the_rate_by_the_epoch_of_the_round():
    pruning = IterativePruning(2, 0.3, weights="rewind_init", first=3, retrain=2)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 * 0.1 ** pruning.epoch_of_round(epoch))
    history = fit(network(), rate, pruning, epochs=8)
    assert history["learning_rate"] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-2, 1e-3, 1e-2, 1e-3, 1e-4])
    assert [pruning.round_of(e) for e in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_step_k_is_the_first_boundary_that_a_longer_execution_shows():
    model = network(eager=False, steps_per_execution=2)
    _, pruning, _, _ = run("rewind_step_k", k=3, model=model)
    assert pruning.rewound_to == 4


# -- how much goes -------------------------------------------------------------------------------------------------


def test_a_fraction_of_what_is_left_goes_in_each_round(tmp_path):
    model = network()
    pruning = IterativePruning(5, 0.2, budget="global", validation_data=(X, Y), path=tmp_path / "curve.json")
    history = fit(model, pruning, epochs=6)
    total = 6 * 16 + 16 * 12 + 12 * 2
    left = [1 - s for s in history["weight_sparsity"]]
    assert left == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096, 0.32768], abs=1 / total)
    assert [e["keep"] for e in pruning.curve] == pytest.approx([0.8**n for n in range(6)])
    assert [(e["round"], e["epoch"]) for e in pruning.curve] == [(n, n) for n in range(6)]
    assert [1 - e["sparsity"] for e in pruning.curve] == pytest.approx(left)
    assert pruning.curve[0]["pruned"] == {} and pruning.curve[3]["pruned"].keys() == {"loss", "accuracy"}
    assert pruning.curve[5]["retrained"]["loss"] == history["loss"][-1]
    assert pruning.curve == json.loads((tmp_path / "curve.json").read_text())
    assert sum(m.sum() for m in kept_masks(model).values()) == round(left[-1] * total)
    plot_curve(pruning.curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("weights", ("finetune", "rewind_init", "reinit"))
def test_units_that_leave_are_cut_by_strip_and_none_comes_back(weights):
    model, pruning, watch, history = run(weights, units=True, measure="params", rounds=3)
    assert [1 - e["sparsity"] for e in pruning.curve] == pytest.approx([1, 0.7, 0.49, 0.343], abs=0.04)
    small = strip(model)
    assert small.count_params() == history["params"][-1] == pruning.curve[-1]["params"] < history["params"][0]
    fit(model, epochs=1)
    assert strip(model).count_params() == small.count_params()


def test_what_was_measured_is_the_network_right_after_pruning_not_after_rewinding():
    model, seen = network(), []
    pruning = IterativePruning(1, 0.5, weights="rewind_init", first=4, validation_data=(X, Y))
    own = pruning._set_back
    pruning._set_back = lambda number: (seen.append(measured(model, (X, Y))), own(number))
    fit(model, pruning, epochs=5)
    assert pruning.curve[1]["pruned"] == seen[0]
    rewound = network()
    rewound.set_weights([np.where(m == 0, 0, v) if v.ndim == 2 else v for v, m in zip(values(rewound), values(model))])
    assert measured(rewound, (X, Y))["loss"] != pytest.approx(seen[0]["loss"], rel=1e-2)


# -- from nothing --------------------------------------------------------------------------------------------------


def test_epochs_of_the_same_compute():
    assert scratch_epochs(160, 313.2e6, 206.1e6) == 243
    assert scratch_epochs(160, 100, 100) == 160 and scratch_epochs(1, 3, 2) == 1
    with pytest.raises(ValueError, match="after at most before"):
        scratch_epochs(160, 1, 2)
    with pytest.raises(ValueError, match="above 0"):
        scratch_epochs(160, 1, 0)


@pytest.mark.parametrize("units", (False, True), ids=("weights", "units"))
def test_scratch_draws_after_the_last_round_and_trains_as_long_as_promised(units):
    model, pruning, watch, history = run("scratch_e", units, first=3, epochs=50, seed=0)
    assert len(history["loss"]) == 3 + 2 + 3  # dense, one round, and as long as the dense one
    assert int(model.optimizer.iterations) == 3 * STEPS
    n = [v.path for v in model.weights].index("two/kernel")
    kept = watch.at[5][n] != 0
    assert np.array_equal(watch.at[3][n][kept], watch.after[3 * STEPS][n][kept])  # the first round goes on
    assert (
        not np.isin(watch.at[5][n][kept], watch.after[5 * STEPS][n]).any() and watch.momenta[5] == 0 < watch.momenta[3]
    )
    model, pruning, _, history = run("scratch_b", units, first=3, epochs=50, seed=0)
    if units:
        ratio = metrics.macs(Channels(network())) / metrics.macs(Channels(strip(model)))
    else:
        ratio = (6 * 16 + 16 * 12 + 12 * 2) / sum(m.sum() for m in kept_masks(model).values())
    assert pruning.last_round() == int(3 * ratio) > 3 and len(history["loss"]) == 5 + int(3 * ratio)


def test_a_fit_that_is_too_short_for_scratch_says_so():
    with pytest.warns(UserWarning, match="scratch_b needs 4 epochs in all, but fit ends after 3"):
        run("scratch_b", first=2, rounds=1, epochs=3)


def test_redrawn_shares_shapes_and_no_weight():
    model = network()
    fit(model, epochs=2)
    new, twin, other = redrawn(model, seed=0), redrawn(model, seed=0), redrawn(model, seed=1)
    assert [v.shape for v in new.weights] == [v.shape for v in model.weights]
    assert equal(values(new), values(twin)) and not equal(values(new), values(other))
    for name, kernel in kernel_values(new).items():
        was = kernel_values(model)[name]
        assert not np.isin(kernel, was).any()
        if kernel.size > 90:
            assert abs(np.dot(kernel.ravel(), was.ravel())) < 0.3 * np.linalg.norm(kernel) * np.linalg.norm(was)
    assert slots(model.optimizer) > 0 == slots(new.optimizer) and int(new.optimizer.iterations) == 0
    assert set(np.unique(array(new.get_layer("norm").moving_variance))) == {1.0}
    fit(new, epochs=1)


def test_redrawn_has_its_way_with_seeds_and_attention():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, kernel_initializer=keras.initializers.GlorotUniform(seed=7), name="mha")
    x = attention(inputs, inputs)
    x = layers.Bidirectional(layers.LSTM(4, kernel_initializer=keras.initializers.HeNormal(seed=7)))(x)
    model = keras.Model(inputs, layers.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed=7))(x))
    new = redrawn(model, seed=0)
    kernels = {v.path: array(v) for v in new.weights if "kernel" in v.name}
    assert len(kernels) == 9
    for before, (path, value) in zip([v for v in model.weights if "kernel" in v.name], kernels.items()):
        assert not np.allclose(array(before), value), path
    for one in kernels:
        for two in kernels:
            assert one == two or not np.array_equal(kernels[one].ravel()[:8], kernels[two].ravel()[:8]), (one, two)


def test_an_initializer_that_is_an_array_is_refused():
    given = keras.initializers.Constant(RNG.normal(size=(6, 4)).astype("float32"))
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, kernel_initializer=given, name="given"), layers.Dense(2)]
    )
    with pytest.raises(ValueError, match="'given' starts from an array.*freeze it"):
        redrawn(model)
    model.get_layer("given").trainable = False
    assert np.array_equal(array(redrawn(model).get_layer("given").kernel), array(model.get_layer("given").kernel))


# -- runs that are killed ------------------------------------------------------------------------------------------


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "weights, k, units, at",
    (
        ("finetune", None, False, (3, 0)),
        ("finetune", None, True, (5, 0)),
        ("rewind_init", None, False, (2, 1)),
        ("rewind_init", None, True, (3, 0)),
        ("rewind_step_k", 3, False, (1, 1)),
        ("reinit", None, True, (4, 0)),
        ("scratch_b", None, False, (5, 0)),
    ),
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(weights, k, units, at, tmp_path):
    """Before the first pruning, in an epoch that begins with one, within a round, and in the last round."""

    def one(name, *callbacks, seed=0):
        asked = dict(weights=weights, k=k, units=units, first=2, retrain=2, seed=5, path=tmp_path / f"{name}.json")
        pruning = IterativePruning(2, 0.3, **asked, **({"round_to": 1} if units else {}))
        model = network(seed=seed, dropout=0)  # its state is not in what BackupAndRestore keeps
        backup = [keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))] if name == "killed" else []
        fit(model, pruning, *callbacks, *backup, epochs=8)
        return model, pruning

    whole, curve = one("whole")
    with pytest.raises(KeyboardInterrupt):
        one("killed", Stop(*at))
    again, resumed = one("killed", seed=99)  # another process begins with other weights
    assert equal(values(whole), values(again))
    for mine, other in zip(resumed.curve, curve.curve, strict=True):
        assert mine == {**other, "retrained": pytest.approx(other["retrained"]), "pruned": other["pruned"]}
    assert not list(tmp_path.glob("*.part")) and os.path.exists(tmp_path / "killed.npz") == weights.startswith("rewind")


def test_what_to_rewind_to_has_to_be_there(tmp_path):
    pruning = IterativePruning(1, 0.3, weights="rewind_init", first=2)
    with pytest.raises(ValueError, match="goes on at epoch 1, but the weights to rewind to are in no file: give path="):
        fit(network(), pruning, epochs=3, initial_epoch=1)
    with pytest.raises(ValueError, match="not in .*curve.npz"):
        fit(
            network(),
            IterativePruning(1, 0.3, weights="rewind_init", first=2, path=tmp_path / "curve.json"),
            epochs=3,
            initial_epoch=1,
        )
    fit(network(), IterativePruning(1, 0.3, weights="rewind_init", path=tmp_path / "curve.json"), epochs=2)
    other = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(2)])
    other.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="weights of another network"):
        fit(
            other,
            IterativePruning(1, 0.3, weights="rewind_init", path=tmp_path / "curve.json"),
            epochs=3,
            initial_epoch=1,
        )
    with pytest.raises(ValueError, match="k=5.*after 2 batches"):
        fit(network(), IterativePruning(1, 0.3, weights="rewind_step_k", k=5), epochs=2)


@pytest.mark.parametrize("weights", ("finetune", "reinit"))
def test_a_trained_network_may_be_pruned_at_once(weights):
    model = network()
    fit(model, epochs=2)
    trained = values(model)
    _, pruning, watch, history = run(weights, first=0, model=model, seed=0)
    assert [e["epoch"] for e in pruning.curve] == [0, 2] and len(history["loss"]) == 4
    kept = watch.at[0][0] != 0
    assert kept.mean() == pytest.approx(0.7, abs=0.02)
    assert np.array_equal(watch.at[0][0][kept], trained[0][kept]) == (weights == "finetune")


def test_a_second_fit_starts_its_own_rounds_and_keeps_the_zeros():
    model, pruning, watch, _ = run("rewind_init")
    gone = [v == 0 for v in values(model)]
    start = values(model)
    again = Watch()
    fit(model, pruning, again, epochs=6)
    assert all((now[was] == 0).all() for now, was in zip(again.at[4], gone))
    kept = again.at[4][0] != 0
    assert np.array_equal(again.at[4][0][kept], start[0][kept])  # to where this fit began


# -- with the reports ----------------------------------------------------------------------------------------------


def test_masks_of_two_runs_can_be_compared():
    models = {name: run(name, budget="global", seed=0)[0] for name in ("finetune", "rewind_init", "reinit")}
    masks = {name: kept_masks(model) for name, model in models.items()}
    assert mask_similarity(masks["finetune"], masks["finetune"]).kept == 1
    found = mask_similarity(masks["finetune"], masks["rewind_init"])
    drawn = mask_similarity(masks["rewind_init"], masks["reinit"])
    assert found.kept > found.chance + 0.05 and found.layers.keys() == {"one", "two", "logits"}
    assert found.kept > drawn.kept  # weights drawn anew are another network
    assert structure_report(masks["finetune"]).layers["two"].outputs == 12
    start = kernel_values(network())
    tuned = weight_stability(start, kernel_values(models["finetune"]))
    other = weight_stability(start, kernel_values(models["reinit"]))
    assert tuned["all"].cosine > 0.8 and tuned["all"].same_sign > 0.9 > 0.7 > other["all"].same_sign


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rounds=0), "rounds=0"),
        (dict(rounds=2.5), "rounds=2.5"),
        (dict(fraction=1), "fraction=1 was passed.*above 0 and below 1"),
        (dict(fraction=0), "fraction=0"),
        (dict(weights="rewind"), "weights='rewind'.*known: 'finetune', 'rewind_init'"),
        (dict(weights="rewind_step_k"), "k= "),
        (dict(k=3), "k= "),
        (dict(weights="rewind_step_k", k=0), "k=0"),
        (dict(retrain=0), "retrain=0"),
        (dict(first=-1), "first=-1"),
        (dict(first=0, weights="rewind_init"), "first=0 with weights='rewind_init'"),
        (dict(first=0, weights="scratch_b"), "first=0"),
        (dict(weights="reinit", restart=False), "momenta"),
        (dict(every=2), "every= does not go"),
        (dict(budget="lipschitz", error=0.1, data=X), "error= does not go"),
        (dict(budget="lipschitz"), "decides by itself"),
        (dict(units=True, criterion="l3"), "Known"),
        (dict(kind="smallest"), "kind='smallest'"),
        (dict(path="/no/such/folder/curve.json"), "folder"),
        (dict(path="curve.npz"), "npz"),
    ],
)
def test_bad_arguments_fail_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        IterativePruning(**arguments)
