import math
from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns, residual_net

from keras_prune import Channels, release, schedules, strip
from keras_prune.entries import Entries, count_of, kernels_of
from keras_prune.lipschitz import gains, output_bound
from keras_prune.pruners import KeepZeros
from keras_prune.surgery import relative_difference
from keras_prune.weights import WeightPruning, prunable_fractions, prune_weights

X, Y = patterns()
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
}


def fit(model, *callbacks, epochs=2):
    x = X if len(model.inputs[0].shape) == 4 else X[:, 0, :7].reshape(len(X), -1)[:, :20]
    return model.fit(x, Y, epochs=epochs, batch_size=64, verbose=0, callbacks=list(callbacks)).history


def array(variable):
    return keras.ops.convert_to_numpy(variable)


def kernels(model):
    return {name: array(variable) for name, variable in kernels_of(Channels(model)).items()}


def zeros(model):
    return {name: value == 0 for name, value in kernels(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def perceptron(widths=(16, 12, 3), inputs=20, seed=0, **dense):
    keras.utils.set_random_seed(seed)
    stack = [
        layers.Dense(n, None if n == widths[-1] else "relu", name=f"dense{k}", **dense) for k, n in enumerate(widths)
    ]
    return keras.Sequential([keras.Input((inputs,)), *stack])


def trainable(optimizer="sgd", **arguments):
    """The perceptron, compiled: three kernels, and its step is traced in no time."""
    model = perceptron((16, 12, 4), **arguments)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


# -- how many, and which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 10, 100, 999, 235200])
def test_counts_are_those_of_decimal_numbers(n):
    asked = [f"0.{k:02d}" for k in range(100)] + ["0.999"]
    assert [count_of(float(a), n) for a in asked] == [math.floor(Fraction(a) * n) for a in asked]
    assert count_of(0.0, n) == 0 and count_of(0.999, n) < n  # something always stays


def test_a_plain_floor_would_miscount():
    """The control of the test above."""
    wrong = [n for n in (10, 100, 1000) for k in range(100) if math.floor(k / 100 * n) != k * n // 100]
    assert wrong


@pytest.mark.parametrize("kind", ["random", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_uniform_takes_exactly_the_asked_count_of_every_kernel(kind, sparsity):
    model = residual_net()
    small = prune_weights(model, sparsity, kind=kind, seed=1)
    found = zeros(small)
    assert len(found) == 7 and all(z.sum() == count_of(sparsity, z.size) for z in found.values())
    before, after = kernels(model), kernels(small)
    assert all(np.array_equal(after[k][~found[k]], before[k][~found[k]]) for k in found)  # the others are untouched
    assert not any(z.any() for z in zeros(model).values())
    others = [(a, b) for a, b in zip(model.weights, small.weights) if "kernel" not in a.name]
    assert len(others) > 8 and all(np.array_equal(array(a), array(b)) for a, b in others)


def test_magnitude_takes_the_smallest_by_rank_also_among_equals():
    model = perceptron()
    model.get_layer("dense1").kernel.assign(np.where(np.arange(192).reshape(16, 12) % 3, 0.5, -0.5))  # all the same
    before, found = kernels(model), zeros(prune_weights(model, 0.4))
    for name, value in before.items():
        order = np.argsort(np.abs(value.ravel()), kind="stable")
        assert np.array_equal(np.flatnonzero(found[name]), np.sort(order[: count_of(0.4, value.size)]))
    # The control: a threshold at the same rank takes all of the equal ones, or none.
    level = np.sort(np.abs(before["dense1"].ravel()))[76]
    assert (np.abs(before["dense1"]) <= level).all() and not (np.abs(before["dense1"]) < level).any()


def test_global_takes_the_smallest_of_all_kernels_together():
    model = perceptron()
    model.get_layer("dense0").kernel.assign(0.1 * array(model.get_layer("dense0").kernel))
    before, found = kernels(model), zeros(prune_weights(model, 0.5, budget="global"))
    together = np.concatenate([v.ravel() for v in before.values()])
    smallest = np.zeros(together.size, bool)
    smallest[np.argsort(np.abs(together), kind="stable")[: together.size // 2]] = True
    assert np.array_equal(np.concatenate([z.ravel() for z in found.values()]), smallest)
    assert found["dense0"].mean() > 0.7 > 0.3 > found["dense1"].mean()  # uniform would not
    drawn = zeros(prune_weights(model, 0.5, budget="global", kind="random", seed=0))
    assert sum(z.sum() for z in drawn.values()) == together.size // 2
    assert abs(drawn["dense0"].mean() - 0.5) < 0.1 and drawn["dense0"].sum() != 160  # by chance, not by layer


def test_global_says_when_nothing_is_left_of_a_layer():
    model = perceptron()
    model.get_layer("dense1").kernel.assign(1e-6 * array(model.get_layer("dense1").kernel))
    with pytest.warns(UserWarning, match="nothing of the kernel of dense1"):
        prune_weights(model, 0.5, budget="global")


def chi_square(counts, draws, share):
    """Of how often each position was drawn; about as large as there are positions if all are drawn alike."""
    return float(((counts - draws * share) ** 2 / (draws * share * (1 - share))).sum())


def test_random_positions_are_reproducible_and_uniform():
    channels, draws = Channels(perceptron((10,), 20)), 300

    def drawn(seed):
        entries = Entries(channels, "random", seed=seed)
        entries.remove(0.3)
        return entries.gone["dense0"]

    found = [drawn(seed) for seed in range(draws)]
    assert np.array_equal(found[7], drawn(7)) and not np.array_equal(found[7], found[8])
    again = zeros(prune_weights(channels.model, 0.3, kind="random", seed=7))["dense0"]
    assert np.array_equal(found[7], again.ravel())
    limit = 200 + 5 * math.sqrt(2 * 200)  # five standard deviations of chi-square with 200 degrees of freedom
    assert chi_square(np.sum(found, 0), draws, 0.3) < limit
    rng = np.random.default_rng(0)  # the control: the first half is drawn a fifth more often
    odds = np.where(np.arange(200) < 100, 1.1, 0.9) / 200
    biased = np.zeros(200)
    for _ in range(draws):
        biased[rng.choice(200, 60, replace=False, p=odds / odds.sum())] += 1
    assert chi_square(biased, draws, 0.3) > limit


def test_the_smallest_entries_change_a_layer_less_than_random_ones():
    model = residual_net()
    x = np.random.default_rng(0).normal(size=(16, 12, 12, 3)).astype("float32")
    for sparsity in (0.1, 0.5, 0.8):
        by = {k: prune_weights(model, sparsity, kind=k, seed=0) for k in ("magnitude", "random")}
        errors = {
            k: [np.linalg.norm(a - b) for a, b in zip(kernels(m).values(), kernels(model).values())]
            for k, m in by.items()
        }
        assert all(a < b for a, b in zip(errors["magnitude"], errors["random"]))
        assert relative_difference(model, by["magnitude"], x) < relative_difference(model, by["random"], x)


# -- what is a kernel ------------------------------------------------------------------------------------------------


def test_kernels_only_also_depthwise_nested_and_recurrent_ones():
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3, name="deep")], name="inner")
    tokens, image = keras.Input((6,), dtype="int32"), keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(inner(layers.Conv2D(4, 1, name="conv")(image)))
    x = layers.SeparableConv2D(5, 3, name="separable")(x)
    y = layers.GRU(6, name="gru")(layers.Embedding(11, 4, name="embedding")(tokens))
    y = layers.MultiHeadAttention(2, 3, name="heads")(z := layers.Reshape((2, 3))(y), z)
    out = layers.Dense(3, name="head")(layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(y)]))
    model = keras.Model([image, tokens], out)
    found = kernels_of(Channels(model))
    expected = {"conv", "deep", "separable.depthwise_kernel", "separable.pointwise_kernel", "head"}
    assert expected <= set(found) and "embedding" not in str(list(found))
    assert sum("gru" in name for name in found) == 2 and sum("heads" in name for name in found) == 4
    small = prune_weights(model, 0.5)
    touched = {
        v.path for v in small.weights if "float" in v.dtype and (array(v) == 0).mean() >= 0.4 and "kernel" in v.name
    }
    assert len(touched) == len(found) == 11
    assert (array(small.get_layer("embedding").embeddings) != 0).all()
    kept = prune_weights(model, 0.5, protect=["inner", "h*d", model.get_layer("gru")])
    left = {n for n, z in zeros(kept).items() if z.any()}
    assert not any(w in n for w in ("deep", "gru") for n in left) and "head" not in left and "conv" in left


def test_layers_without_a_rule_are_left_out_and_named():
    class Own(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

        def call(self, x):
            return x @ self.kernel

    model = keras.Sequential([keras.Input((5,)), Own(name="mine"), layers.Dense(3, name="theirs")])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="mine/kernel"):
        model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0, callbacks=[WeightPruning(0.5)])
    assert (array(model.get_layer("mine").kernel) != 0).all() and (
        array(model.get_layer("theirs").kernel) == 0
    ).sum() == 6


# -- while it trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_zeros_survive_the_optimizer_and_a_second_fit_and_others_learn(optimizer, kind):
    model = trainable(OPTIMIZERS[optimizer]())
    fit(model, epochs=1)  # momenta are non-zero and a step function is cached before pruning begins
    pruning = WeightPruning(0.6, kind=kind, seed=0)
    history = fit(model, pruning)
    held, before = zeros(model), kernels(model)
    assert all(z.sum() == count_of(0.6, z.size) for z in held.values())
    total = sum(z.size for z in held.values())
    assert history["weight_sparsity"][-1] == pytest.approx(sum(z.sum() for z in held.values()) / total)
    assert pruning.fractions == {name: pytest.approx(z.mean()) for name, z in held.items()} and pruning.bound is None
    fit(model, epochs=1)  # without the callback
    assert same(zeros(model), held) and not same(kernels(model), before)
    release(model)  # the control: without the masks all are gone after a step, but those of units that never fire
    fit(model, epochs=1)
    assert sum(z.sum() for z in zeros(model).values()) < 0.2 * 0.6 * total


def test_a_schedule_only_adds_and_a_second_fit_goes_on():
    model, seen = trainable(OPTIMIZERS["momentum"]()), []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(zeros(model)))
    history = fit(model, WeightPruning(schedules.linear(0.0, 0.8, begin=0, stop=2), every=3), look, epochs=4)
    fit(model, WeightPruning({0: 0.3, 1: 0.9}), look)
    counts = [0, 0, 0.8, 0.8, 0.8, 0.9]
    for sparsity, found in zip(counts, seen):
        assert all(z.sum() == count_of(sparsity, z.size) for z in found.values())
    assert all((a[k] <= b[k]).all() for a, b in zip(seen, seen[1:]) for k in a)
    assert history["weight_sparsity"] == pytest.approx([0, 0, 0.8, 0.8], abs=3e-3)


def test_random_schedules_are_nested_and_the_same_for_the_same_seed():
    found = []
    for schedule in ({0: 0.2, 1: 0.7}, {0: 0.7}):
        model = trainable()
        fit(model, WeightPruning(schedule, kind="random", seed=3))
        found.append(zeros(model))
    assert same(*found)
    model = trainable()
    fit(model, WeightPruning(0.7, kind="random", seed=4))
    assert not same(zeros(model), found[0])


def test_zeros_hold_in_mixed_precision_with_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = trainable(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, WeightPruning(0.5))
    assert model.get_layer("dense0").compute_dtype == "float16"
    assert all(z.sum() == count_of(0.5, z.size) for z in zeros(model).values())


def test_float16_weights_are_pruned_by_the_same_ranks():
    model = perceptron(dtype="float16")
    found = zeros(prune_weights(model, 0.5))
    assert [z.sum() for z in found.values()] == [160, 96, 18]


def test_a_kernel_that_starts_as_zeros_may_learn():
    model = perceptron(kernel_initializer="ones")
    model.get_layer("dense2").kernel.assign(np.zeros((12, 3)))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    x, y = np.random.default_rng(0).normal(size=(64, 20)), np.ones((64, 3))
    with pytest.warns(UserWarning, match="will not be reached"):
        model.fit(x, y, verbose=0, callbacks=[WeightPruning({1: 0.5})], epochs=1)
    assert (array(model.get_layer("dense2").kernel) != 0).all()
    model.fit(x, y, verbose=0, callbacks=[WeightPruning(0.5)], epochs=1)
    assert (array(model.get_layer("dense2").kernel) == 0).sum() == 18


def test_frozen_layers_keep_their_zeros_and_masks_do_not_pile_up():
    model = trainable()
    model.get_layer("dense1").trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, WeightPruning(0.5), epochs=1)
    fit(model, WeightPruning(0.5), epochs=1)
    assert all(z.sum() == count_of(0.5, z.size) for z in zeros(model).values())
    assert not isinstance(model.get_layer("dense0").kernel.constraint.inner, KeepZeros)


@pytest.mark.parametrize("faint", [0, 4])
def test_strip_still_proves_equality_and_takes_units_that_happen_to_be_zero(faint):
    model = trainable(OPTIMIZERS["adam"]())
    first = model.get_layer("dense0").kernel
    first.assign(array(first) * np.where(np.arange(16) < faint, 1e-6, 1))
    fit(model, WeightPruning(0.5))
    assert (array(first) == 0).all(0).sum() == faint
    small, report = strip(model, rewire=False, report=True)
    assert report.difference < 1e-5 and small.get_layer("dense0").units == 16 - faint


def test_no_zero_carries_a_sign():
    """They would cost a bit each in a compressed file."""
    model = trainable(OPTIMIZERS["momentum"]())
    fit(model, WeightPruning(0.5))
    assert not any(np.signbit(v[v == 0]).any() for v in kernels(model).values())


# -- as much as an error allows --------------------------------------------------------------------------------------


def difference(before, after, x):
    """The largest L2 norm of the difference of the outputs of any sample."""
    a, b = (array(m(x, training=False)).astype(np.float64).reshape(len(x), -1) for m in (before, after))
    return float(np.linalg.norm(a - b, axis=1).max())


def largest(model, x):
    return float(np.linalg.norm(array(model(x, training=False)).reshape(len(x), -1), axis=1).max())


def small_convolutional():
    """Convolutions with and without BatchNormalization of real statistics, a sum of two branches, a softmax."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((8, 8, 2))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, use_bias=False, name="first")(x)))
    y = layers.Conv2D(6, 3, padding="same", activation="relu", name="second")(x)
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, layers.DepthwiseConv2D(3, padding="same", name="deep")(y)]))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="head")(x))
    norm, rng = model.get_layer("norm"), np.random.default_rng(0)
    norm.gamma.assign(rng.uniform(0.5, 2, 6)), norm.moving_variance.assign(rng.uniform(0.2, 3, 6))
    norm.moving_mean.assign(rng.normal(0, 0.3, 6))
    return model


NETWORKS = {"perceptron": (perceptron, (200, 20)), "convolutional": (small_convolutional, (40, 8, 8, 2))}


@pytest.mark.parametrize("kind, error", [("magnitude", 0.5), ("random", 0.9)])
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_certificate_meets_the_error_and_the_outputs_meet_the_certificate(network, kind, error):
    build, shape = NETWORKS[network]
    model, x = build(), np.random.default_rng(0).normal(size=shape).astype("float32")
    found, size = prunable_fractions(model, error, data=x, kind=kind, seed=0), largest(model, x)
    assert found.largest == pytest.approx(size, rel=1e-5)
    assert 0 < difference(model, found.model, x) <= found.bound.total <= error * size * (1 + 1e-9)
    assert found.bound.total > 0.25 * error * size  # and it is used, as far as whole entries allow
    assert found.bound.total == output_bound(model, found.model, x).total
    assert found.fractions == {name: pytest.approx(z.mean()) for name, z in zeros(found.model).items()}
    assert found.fraction > 0 and not any(z.any() for z in zeros(model).values())
    more = prune_weights(model, 0.9, kind=kind, seed=0)  # the control: not everything is within the error
    assert output_bound(model, more, x).total > error * size
    assert kind == "random" or difference(model, more, x) > found.bound.total


def test_an_input_norm_holds_for_inputs_that_were_never_seen():
    model, rng = perceptron(), np.random.default_rng(0)
    x = rng.normal(size=(50, 20)).astype("float32")
    found = prunable_fractions(model, 0.5, data=x, input_norm=3.0)
    inputs = rng.normal(size=(10_000, 20))
    inputs = (3 * inputs / np.linalg.norm(inputs, axis=1, keepdims=True)).astype("float32")
    assert 0 < difference(model, found.model, inputs) <= found.bound.total <= 0.5 * largest(model, x) * (1 + 1e-9)
    assert found.bound.input_norm == 3.0 and "all inputs of norm 3" in str(found)
    assert prunable_fractions(model, 0.5, data=x, input_norm=30.0).fraction < found.fraction


@pytest.mark.parametrize("kind, weights", [("magnitude", "measured"), ("magnitude", "gaussian"), ("random", "uniform")])
def test_a_larger_error_prunes_more(kind, weights):
    model, x = perceptron((64, 48, 3)), np.random.default_rng(0).normal(size=(50, 20)).astype("float32")
    errors = (0.0, 0.03, 0.1, 0.3, 0.9) if kind == "magnitude" else (0.0, 0.3, 0.6)
    found = [prunable_fractions(model, e, data=x, kind=kind, weights=weights, seed=0) for e in errors]
    pruned = [f.fraction for f in found]
    assert pruned[0] == 0 and all(a < b for a, b in zip(pruned, pruned[1:]))
    assert all(f.bound.total <= e * f.largest * (1 + 1e-9) for f, e in zip(found, errors))


def test_the_smallest_entries_go_further_than_random_ones():
    model, x = perceptron((64, 48, 3)), np.random.default_rng(0).normal(size=(50, 20)).astype("float32")
    found = [prunable_fractions(model, 0.9, data=x, kind=k, seed=0).fraction for k in ("magnitude", "random")]
    assert found[0] > 3 * found[1] > 0


def test_the_formulas_are_those_of_theory_scaled_by_one_number():
    model, x = perceptron((64, 48, 3)), np.random.default_rng(0).normal(size=(50, 20)).astype("float32")
    found = prunable_fractions(model, 0.3, data=x, weights="uniform").fractions
    cost = {g.layer: g.reads * g.gain * g.change(array(g.kernel)) for g in gains(model, x)}
    scale = {name: fraction**1.5 * cost[name] for name, fraction in found.items()}  # back through e^(2/3)
    assert max(scale.values()) < 1.2 * min(scale.values())  # whole entries only


def test_what_cannot_be_bounded_is_left_whole_and_named():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 3))
    x = layers.GRU(6, return_sequences=True, name="gru")(layers.Dense(4, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="after")(layers.Flatten()(x)))
    data = np.random.default_rng(0).normal(size=(20, 5, 3)).astype("float32")
    found = prunable_fractions(model, 0.5, data=data)
    whole = {name for name, fraction in found.fractions.items() if not fraction}
    assert whole == set(found.unproved) and "before" in whole and any("gru" in n for n in whole)
    assert found.fractions["after"] > 0 and "before" in str(found).splitlines()[-1]
    assert difference(model, found.model, data) <= found.bound.total <= 0.5 * found.largest * (1 + 1e-9)


def test_protected_kernels_leave_their_share_to_the_others():
    model, x = perceptron(), np.random.default_rng(0).normal(size=(50, 20)).astype("float32")
    found = prunable_fractions(model, 0.3, data=x, protect="dense0")
    assert set(found.fractions) == {"dense1", "dense2"}
    assert found.fractions["dense1"] > prunable_fractions(model, 0.3, data=x).fractions["dense1"]


def test_it_prunes_once_when_fit_begins_and_holds():
    model = trainable(OPTIMIZERS["adam"]())
    fit(model)
    x = X[:, 0, :7].reshape(len(X), -1)[:, :20]
    expected = prunable_fractions(model, 0.5, data=x)
    pruning = WeightPruning(budget="lipschitz", error=0.5, data=x)
    history = fit(model, pruning, epochs=3)
    assert pruning.fractions == expected.fractions and pruning.bound.total == pytest.approx(expected.bound.total)
    held = zeros(model)
    assert same(held, zeros(expected.model)) and history["weight_sparsity"] == [pytest.approx(expected.fraction)] * 3
    again = WeightPruning(budget="lipschitz", error=0.5, data=x)
    x_, y_ = X[:, 0, :7].reshape(len(X), -1)[:, :20], Y
    model.fit(x_, y_, initial_epoch=3, epochs=4, verbose=0, callbacks=[again])  # as a restored run does
    assert same(zeros(model), held) and again.bound is None
    fit(model, again, epochs=1)  # a new fit: the same error once more
    assert again.bound.total > 0 and sum(z.sum() for z in zeros(model).values()) > sum(z.sum() for z in held.values())


def test_data_that_says_nothing_is_refused():
    model = perceptron(use_bias=False)
    with pytest.raises(ValueError, match="means nothing"):
        prunable_fractions(model, 0.1, data=np.zeros((4, 20), "float32"))
    with pytest.raises(ValueError, match="shape"):
        prunable_fractions(model, 0.1, data=np.ones((4, 21), "float32"))


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [WeightPruning, lambda *a, **k: prune_weights(perceptron(), *a, **k)])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "To keep 20 % write sparsity=0.8"),
        (dict(kind="smallest"), "'magnitude', 'random'"),
        (dict(budget="layer"), "'uniform', 'global', 'erk', 'share', 'lipschitz'"),
        (dict(budget="lipschitz"), "error= and data="),
        (dict(error=0.1), "goes with budget='lipschitz'"),
        (dict(budget="lipschitz", error=0.1, data=X, sparsity=0.3), "leave out the sparsity"),
        (dict(budget="lipschitz", error=-0.1, data=X), "error=-0.1"),
        (dict(budget="lipschitz", error=1, data=X), "always answers 0 has an error of 1"),
        (dict(budget="lipschitz", error=0.1, data=X, weights="normal"), "'measured', 'uniform', 'gaussian'"),
    ],
)
def test_bad_arguments_fail_at_once_and_say_how_to_mend_it(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_protect_that_fits_nothing_and_weights_that_are_not_finite():
    model = perceptron()
    with pytest.raises(ValueError, match="protect='conv\\*' fits no layer"):
        prune_weights(model, protect="conv*")
    with pytest.raises(TypeError, match="protect holds 3"):
        prune_weights(model, protect=[3])
    with pytest.raises(ValueError, match="no kernel to prune"):
        prune_weights(model, protect=["*"])
    model.get_layer("dense1").kernel.assign(np.full((16, 12), np.nan))
    with pytest.raises(ValueError, match="diverged"):
        prune_weights(model)
