import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, plain_net, residual_net

from keras_prune import (
    Channels,
    FilterPruning,
    GroupLasso,
    NetworkSlimming,
    WeightPruning,
    dead_units,
    distiller,
    plan,
    release,
    strip,
)
from keras_prune.penalties import shrunk
from keras_prune.pruners import KeepZeros
from keras_prune.surgery import zero_masks

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 3)).astype("float32"), RNG.normal(size=(32, 2)).astype("float32")
NORMS = (layers.BatchNormalization,)


def nothing(y, answers):
    """A loss without a gradient: what moves then is moved by the penalty alone."""
    return 0.0 * keras.ops.sum(answers, axis=-1)


def linear_net(units=6, **arguments):
    """Two matrices, so that gradients can be written by hand."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    x = layers.Dense(units, use_bias=False, name="hidden", **arguments)(inputs)
    return keras.Model(inputs, layers.Dense(2, use_bias=False, name="head")(x))


def fit(model, *callbacks, epochs=5, x=X, y=Y, **arguments):
    """One step an epoch."""
    arguments = {"batch_size": len(x), "shuffle": False, "verbose": 0, **arguments}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def values(layer, name="kernel"):
    return np.array(getattr(layer, name))


def all_zero(model, removed):
    """Whether all that belongs to these units is zero."""
    return all(not np.array(w.variable)[mask == 0].any() for w, mask in zero_masks(Channels(model), removed))


def by_filter(kernel):
    return np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)


def learning_net(optimizer):
    model = plain_net()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


# -- group lasso ----------------------------------------------------------------------------------------------------


def test_the_proximal_step_of_3_4_is_2_4_3_2_and_beyond_its_norm_zero():
    w = np.array([[3.0, 4.0]] * 4, "float32")
    amounts = np.array([1.0, 6.0, 5.0, 0.0], "float32")
    found = np.array(shrunk(keras.ops.convert_to_tensor(w), 0, np.arange(4), keras.ops.convert_to_tensor(amounts)))
    assert found == pytest.approx(np.array([[2.4, 3.2], [0, 0], [0, 0], [3, 4]]), abs=1e-6)
    assert (found[1] == 0).all()


def test_zero_and_tiny_groups_give_no_nan():
    w = np.array([[0.0, 0.0], [0.0, 0.0], [1e-30, 0.0], [1e-3, 0.0]], "float32")
    amounts = np.array([0.0, 0.1, 0.1, 1e-4], "float32")
    found = np.array(shrunk(keras.ops.convert_to_tensor(w), 0, np.arange(4), keras.ops.convert_to_tensor(amounts)))
    assert np.isfinite(found).all() and (found[:3] == 0).all() and found[3, 0] == pytest.approx(9e-4)


def by_hand(w, v, rates, strength, x=X, y=Y):
    """Gradient steps on the mean squared error of (x w) v; w is shrunk after each one."""
    for rate in rates:
        gradient = 2 * (x @ w @ v - y) / y.size
        w, v = w - rate * x.T @ gradient @ v.T, v - rate * (x @ w).T @ gradient
        norms = np.linalg.norm(w, axis=0)
        w = w * np.maximum(0, 1 - rate * strength * np.sqrt(len(w)) / np.maximum(norms, 1e-12))
    return w, v


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.2 / (1 + keras.ops.cast(step, "float32"))

    def get_config(self):
        return {}


OPTIMIZERS = {
    "constant": (lambda: keras.optimizers.SGD(0.1), [0.1] * 6),
    "schedule": (lambda: keras.optimizers.SGD(Decay()), [0.2 / (1 + n) for n in range(6)]),
    "scaled": (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0), [0.1] * 6),
    "accumulating": (lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), [0.1] * 3),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_several_steps_are_those_written_by_hand(name):
    make, rates = OPTIMIZERS[name]
    model, strength = linear_net(), 0.6
    w, v = (values(layer).astype("float64") for layer in model.layers[1:])
    model.compile(make(), "mse")
    kept = []  # before the readers of what is zero are zeroed, at the end
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(model.get_weights()))
    history = fit(model, GroupLasso(strength, stop=99), look, epochs=6)
    right, plain = by_hand(w, v, rates, strength), by_hand(w, v, rates, 0.0)
    assert all(np.abs(a - b).max() < 1e-6 for a, b in zip(kept[-1], right))
    assert np.abs(kept[-1][0] - plain[0]).max() > 1e-2  # the control: without the step it would be elsewhere
    zeros = int((by_filter(right[0]) == 0).sum())
    if name != "accumulating":
        assert 0 < zeros < 6
    assert history["zero_filters"][-1] == pytest.approx(zeros / 6)


def test_all_prunable_filters_shrink_by_rate_times_strength_times_root_of_their_size_and_no_others():
    model = residual_net()
    model.get_layer("inner1").trainable = False
    model.compile(keras.optimizers.SGD(0.5), nothing)
    before = {layer.name: [np.array(w) for w in layer.weights] for layer in model.layers}
    x, y = patterns(8)
    fit(model, GroupLasso(0.001, stop=9, protect=["inner0"]), epochs=4, x=x, y=y)
    for name in ("down0", "outer0", "down1", "outer1"):
        kernel = values(model.get_layer(name))
        shrinkage = by_filter(before[name][0]) - by_filter(kernel)
        assert shrinkage == pytest.approx(4 * 0.5 * 0.001 * np.sqrt(kernel[..., 0].size), rel=1e-3), name
    for name in ("inner0", "inner1", "head"):
        assert np.array_equal(values(model.get_layer(name)), before[name][0]), name


def test_of_units_with_several_slices_the_slices_are_one_group():
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(5, name="lstm")(inputs)))
    model.compile(keras.optimizers.SGD(1.0), nothing)
    cell = model.get_layer("lstm").cell
    before = values(cell).reshape(3, 4, 5)
    fit(model, GroupLasso(0.01, stop=9), epochs=1, x=RNG.normal(size=(4, 4, 3)), y=np.zeros((4, 2)))
    norms = np.sqrt(np.square(before).sum(axis=(0, 1)))
    right = before * (1 - 0.01 * np.sqrt(12) / norms)
    assert values(cell).reshape(3, 4, 5) == pytest.approx(right, abs=1e-6)


def test_a_constraint_of_the_user_has_the_last_word_and_masks_of_pruners_count():
    model = linear_net(kernel_constraint=keras.constraints.UnitNorm(axis=0))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model, GroupLasso(0.1, stop=9), epochs=2)
    assert by_filter(values(model.layers[1])) == pytest.approx(1, abs=1e-5)
    model = linear_net()
    model.compile(keras.optimizers.SGD(1.0), "mse")
    pruning, lasso = WeightPruning(0.5, protect=["head"]), GroupLasso(0.01, stop=9)
    seen = [values(model.layers[1])]
    fit(model, pruning, lasso, epochs=1)
    mask = np.array(model.layers[1].kernel.constraint.mask)
    w, v = seen[0] * mask, values(linear_net().layers[2])
    w = (w - X.T @ (2 * (X @ w @ v - Y) / Y.size) @ v.T) * mask
    w = w * np.maximum(0, 1 - 0.01 * np.sqrt(3) / np.linalg.norm(w, axis=0))
    assert values(model.layers[1]) == pytest.approx(w, abs=1e-6) and (mask == 0).sum() == 9


def test_what_another_pruner_holds_stays_when_the_units_that_were_given_up_are_held():
    model = linear_net()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    lasso, seen = GroupLasso(1.6, stop=3), []
    look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, logs: seen.append(values(model.layers[2]) == 0))
    fit(model, WeightPruning({0: 0.5}, every=99, unit="batch"), lasso, look, epochs=6)
    assert 0 < len(lasso.removed) < 6 and 0 < seen[1].sum() < seen[-1].sum()
    assert not values(model.layers[2])[seen[1] | seen[-1]].any()


@pytest.mark.parametrize("of, strength", [("kernels", 0.06), ("scales", 0.3)])
def test_units_that_were_given_up_leave_with_strip_and_the_rest_recovers(of, strength):
    x, y = patterns()
    model = learning_net(keras.optimizers.SGD(0.05, momentum=0.9))
    fit(model, epochs=1, x=x, y=y, batch_size=64)  # momenta are there, and a step function is cached
    model.get_layer("norm").gamma.assign(np.linspace(0.05, 1, 32))
    lasso = GroupLasso(strength, of=of, stop=6)
    history = fit(model, lasso, epochs=12, x=x, y=y, batch_size=64)
    assert 4 <= len(lasso.removed) < 40 and history["zero_filters"][5] > 0.1
    assert all_zero(model, lasso.removed)
    assert history["loss"][-1] < history["loss"][5]  # free of the penalty, of which it is not told
    fit(model, epochs=2, x=x, y=y, batch_size=64)  # without the callback
    assert all_zero(model, lasso.removed)
    small, report = strip(model, report=True)
    assert report.difference < 1e-5 and small.count_params() < 0.8 * model.count_params()


def test_without_it_nothing_is_zero():
    """The control of the test above."""
    x, y = patterns()
    model = learning_net(keras.optimizers.SGD(0.05, momentum=0.9))
    fit(model, epochs=12, x=x, y=y, batch_size=64)
    assert strip(model).count_params() == model.count_params()


def test_of_two_with_layers_of_their_own_each_ends_at_its_own_stop():
    model, seen = learning_net(keras.optimizers.SGD(0.1)), []
    kernel, gamma = (model.get_layer(name).trainable_variables[0] for name in ("second", "norm"))
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda e, logs: seen.append([v.constraint.shrink is not None for v in (kernel, gamma)])
    )
    both = GroupLasso(1e-3, stop=1, protect=["first"]), GroupLasso(1e-3, of="scales", stop=2, protect=["second"])
    x, y = patterns(32)
    fit(model, *both, look, epochs=3, x=x, y=y)
    assert seen == [[True, True], [False, True], [False, False]]


def test_a_layer_that_gives_up_everything_is_named():
    model = linear_net()
    model.compile(keras.optimizers.SGD(0.1), nothing)
    with pytest.warns(UserWarning, match="nothing is left of hidden"):
        fit(model, GroupLasso(50.0), epochs=2)


def test_the_penalty_ends_at_stop_by_default_after_sixty_percent():
    model = linear_net()
    model.compile(keras.optimizers.SGD(0.1), nothing)
    norms = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: norms.append(by_filter(values(model.layers[1])))
    )
    fit(model, GroupLasso(0.1), look, epochs=10)
    assert (norms[5] < norms[4]).all() and all(np.array_equal(norms[6], n) for n in norms[7:])
    assert np.array_equal(norms[5], norms[6])
    assert model.layers[1].kernel.constraint.shrink is None


def test_a_filter_that_is_zero_comes_back_while_the_penalty_acts():
    model = linear_net()
    kernel = values(model.layers[1])
    kernel[:, 0] = 0
    model.layers[1].kernel.assign(kernel)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model, GroupLasso(1e-4, stop=9), epochs=3)
    assert by_filter(values(model.layers[1]))[0] > 1e-4


class Stop(Exception):
    pass


def killed_after(epoch):
    def end(now, logs=None):
        if now == epoch:
            raise Stop

    return keras.callbacks.LambdaCallback(on_epoch_begin=end)


@pytest.mark.parametrize("epoch", [2, 5])
def test_a_killed_run_goes_on(tmp_path, epoch):
    def run(kill):
        model = linear_net()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        lasso, backup = GroupLasso(0.7, stop=4), keras.callbacks.BackupAndRestore(tmp_path / "backup")
        fit(model, lasso, backup, *[killed_after(epoch)] * kill, epochs=7)
        return model, lasso

    with pytest.raises(Stop):
        run(1)
    resumed, lasso = run(0)
    whole, other = run(0)
    assert list(lasso.removed) == list(other.removed) and 0 < len(lasso.removed) < 6
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(resumed.get_weights(), whole.get_weights()))


def test_a_saved_model_knows_nothing_of_either_and_release_takes_both_off(tmp_path):
    x, y = patterns(64)
    model = compiled(keras.optimizers.SGD(0.05))
    config = model.to_json()
    with pytest.raises(Stop):
        fit(model, GroupLasso(0.01), NetworkSlimming(0.01), killed_after(1), x=x, y=y)
    path = tmp_path / "model.keras"
    model.save(path)  # both are still on it
    assert model.to_json() == config
    loaded = keras.saving.load_model(path)
    rides = [v for v in loaded.variables if v.constraint is not None or v.regularizer is not None]
    assert rides == [] and np.array_equal(loaded.get_weights()[0], model.get_weights()[0])
    assert any(v.constraint is not None for v in model.variables) and any(v.regularizer for v in model.variables)
    release(model)
    assert all(v.constraint is None and v.regularizer is None for v in model.variables)


def test_mixed_precision_and_jit_and_grouped_steps_are_no_obstacle():
    x, y = patterns()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = learning_net(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, 0.9), initial_scale=64.0))
    finally:
        keras.config.set_dtype_policy("float32")
    lasso = GroupLasso(0.2, stop=2)
    fit(model, lasso, epochs=3, x=x, y=y, batch_size=64)
    assert len(lasso.removed) > 0 and all_zero(model, lasso.removed)
    for arguments in (dict(jit_compile=True), dict(steps_per_execution=2), dict(run_eagerly=True)):
        model = linear_net()
        w, v = (values(layer).astype("float64") for layer in model.layers[1:])
        model.compile(keras.optimizers.SGD(0.1), "mse", **arguments)
        fit(model, GroupLasso(0.6, stop=99), epochs=1, x=np.tile(X, (2, 1)), y=np.tile(Y, (2, 1)), batch_size=32)
        assert values(model.layers[1]) == pytest.approx(by_hand(w, v, [0.1] * 2, 0.6)[0], abs=1e-6), arguments


# -- network slimming -----------------------------------------------------------------------------------------------


def gammas(model):
    return [values(layer, "gamma") for layer in model.layers if isinstance(layer, NORMS)]


def conv_net():
    """One norm of units that can be pruned, one of units that cannot: they are the output."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="free")(x))
    x = layers.BatchNormalization(name="fixed")(layers.Conv2D(2, 3, use_bias=False)(x))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


IMAGES = RNG.normal(size=(8, 6, 6, 3)).astype("float32")
LABELS = RNG.normal(size=(8, 2)).astype("float32")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scales_follow_the_subgradient_and_those_that_cannot_leave_stay(momentum):
    model = conv_net()
    model.compile(keras.optimizers.SGD(0.1, momentum=momentum), nothing)
    start = RNG.normal(size=8).astype("float32")
    start[0] = 0
    model.get_layer("free").gamma.assign(start)
    fit(model, NetworkSlimming(0.3), x=IMAGES, y=LABELS, epochs=4)
    right, speed = start.astype("float64"), 0.0
    for _ in range(4):
        speed = momentum * speed - 0.1 * 0.3 * np.sign(right)
        right = right + speed
    assert values(model.get_layer("free"), "gamma") == pytest.approx(right, abs=1e-6)
    assert values(model.get_layer("fixed"), "gamma").tolist() == [1, 1]


def test_with_a_real_loss_a_step_differs_from_one_without_by_the_subgradient():
    after = []
    for callbacks in ([], [NetworkSlimming(0.01)]):
        model = conv_net()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        fit(model, *callbacks, x=IMAGES, y=LABELS, epochs=1)
        after.append(values(model.get_layer("free"), "gamma"))
    assert after[0] - after[1] == pytest.approx(0.1 * 0.01, abs=1e-6) and np.ptp(after[0]) > 1e-4


def test_scales_start_at_a_half_and_afterwards_the_penalty_is_gone():
    model = conv_net()
    own = model.get_layer("free").gamma
    own.regularizer = keras.regularizers.L2(0.5)  # as gamma_regularizer= makes it
    model.compile(keras.optimizers.SGD(0.1), nothing)
    history = fit(model, NetworkSlimming(0.3, start=0.5), x=IMAGES, y=LABELS, epochs=1)
    assert np.array(own) == pytest.approx(0.5 - 0.1 * (0.3 + 2 * 0.5 * 0.5), abs=1e-6)
    assert values(model.get_layer("fixed"), "gamma").tolist() == [1, 1]
    assert history["scales"] == pytest.approx([0.42])
    assert isinstance(own.regularizer, keras.regularizers.L2)
    own.regularizer = None
    before = np.array(own)
    release(model)
    fit(model, x=IMAGES, y=LABELS, epochs=2)
    assert np.array_equal(before, np.array(own))


def test_a_run_that_goes_on_keeps_its_scales():
    model = conv_net()
    model.compile(keras.optimizers.SGD(0.1), nothing)
    fit(model, NetworkSlimming(0.3, start=0.5), x=IMAGES, y=LABELS, epochs=5, initial_epoch=3)
    assert values(model.get_layer("free"), "gamma") == pytest.approx(1 - 2 * 0.03, abs=1e-6)


def test_pruned_units_stay_zero_and_slim_scales_leave_first():
    x, y = patterns()
    model = compiled(keras.optimizers.SGD(0.05, momentum=0.9))
    pruning = FilterPruning({2: 0.4}, criterion="bn_scale")
    fit(model, NetworkSlimming(0.01, start=0.5), pruning, epochs=5, x=x, y=y, batch_size=64)
    assert len(pruning.removed) >= 8
    assert set(dead_units(Channels(model), strict=True)) == set(pruning.removed.tolist())
    model = compiled(keras.optimizers.SGD(0.05))
    slim = fit(model, NetworkSlimming(0.05, start=0.5), epochs=4, x=x, y=y, batch_size=64)["scales"]
    scales = values(model.layers[2], "gamma")
    made = plan(model, 0.3, criterion="bn_scale", budget="global")
    assert slim[-1] < 0.5 and 0 < len(made.removed) and made.cut().count_params() < model.count_params()
    group = next(g for g in made.channels.groups if g.producers[0].weight.layer.name == "inner1")
    norm = next(m.weight for m in group.members if m.weight.name == "gamma")
    scales = np.abs(np.array(norm.variable))
    leaves = np.isin(group.units, made.removed)
    assert leaves.any() and scales[leaves].max() <= scales[~leaves].min()


def test_protected_layers_and_models_without_such_norms():
    x, y = patterns(8)
    model = residual_net()
    model.compile(keras.optimizers.SGD(0.1), nothing)
    fit(model, NetworkSlimming(0.3, protect=["inner0"]), x=x, y=y, epochs=1)
    found = [float(g.mean()) for g in gammas(model)]
    assert found[1] == 1 and [round(g, 3) for g in found] == [0.97, 1, 0.97, 0.97, 0.97, 0.97]
    model = linear_net()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="GroupLasso"):
        fit(model, NetworkSlimming())
    with pytest.raises(ValueError, match="no scales to shrink.*use of='kernels'"):
        fit(model, GroupLasso(0.1, of="scales"))
    with pytest.raises(ValueError, match="no kernels to shrink"):
        fit(model, GroupLasso(0.1, protect=["hidden"]))


def test_in_distillation_the_penalty_counts_and_keras_own_distiller_which_drops_it_is_refused():
    teacher, student = conv_net(), conv_net()
    both = distiller(student, teacher, IMAGES, alpha=0.0)
    both.compile(keras.optimizers.SGD(0.1), nothing)
    fit(both, NetworkSlimming(0.3), x=IMAGES, y=LABELS, epochs=2)
    assert values(student.get_layer("free"), "gamma") == pytest.approx(1 - 2 * 0.03, abs=1e-6)
    assert all(v.regularizer is None for v in student.variables)
    plain = keras.distillation.Distiller(teacher, student, keras.distillation.FeatureDistillation())
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="keras_prune.distiller"):
        fit(plain, NetworkSlimming(0.3), x=IMAGES, y=LABELS)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GroupLasso(0), "strength=0 .* above 0"),
        (lambda: GroupLasso(float("nan")), "strength=nan"),
        (lambda: GroupLasso(0.1, of="biases"), "'kernels', 'scales'"),
        (lambda: GroupLasso(0.1, stop=0), "stop=0"),
        (lambda: NetworkSlimming(-1e-4), "strength=-0.0001"),
        (lambda: NetworkSlimming(start=0), "start=0"),
    ],
)
def test_bad_arguments_fail_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_shrinking_is_on_the_variable_that_the_pruners_use():
    model = linear_net()
    model.compile("sgd", "mse")
    fit(model, GroupLasso(0.01), epochs=1)
    assert isinstance(model.layers[1].kernel.constraint, KeepZeros)
    assert not isinstance(model.layers[1].kernel.constraint.inner, KeepZeros)
