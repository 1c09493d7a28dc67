import os
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns

from keras_prune import SparsityTarget, reports, schedules
from keras_prune.internals import layers_of
from keras_prune.layers import PSPConv2D, PSPDense, PSPLayer, PSPSeparableConv2D

pytestmark = pytest.mark.filterwarnings("ignore:SparsityTarget", "ignore:.*starts pruned", "ignore:.*ran out of data")

X, Y = patterns(128)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
POSITIONS = {"a": 36, "b": 36, "c": 36, "h": 1}
MEASURES, BUDGETS = ("params", "macs", "structures"), ("global", "uniform")
TARGET = 0.6


def random_alphas(seed):
    return keras.initializers.RandomNormal(stddev=0.3, seed=seed)


def network(initializer=random_alphas, threshold=0.1, seed=0, b="channel", **arguments):
    """Kernels of several shapes, one structure or two, used 36 times or once."""
    keras.utils.set_random_seed(seed)
    start = initializer if callable(initializer) else lambda number: initializer
    psp = [dict(threshold=threshold, alpha_initializer=start(number)) for number in range(4)]
    inputs = keras.Input((12, 12, 3))
    x = PSPConv2D(8, 3, 2, name="a", structure="column", padding="same", **psp[0])(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.ReLU()(PSPConv2D(6, 3, padding="same", name="b", structure=b, **psp[1])(x))
    y = PSPConv2D(8, 3, padding="same", name="c", structure=("column", "filter"), **psp[2])(y)
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    model = keras.Model(inputs, PSPDense(4, name="h", **psp[3])(x), name="net")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS, metrics=["accuracy"], **arguments)
    return model


def fit(model, *callbacks, epochs=3, **arguments):
    return model.fit(X, Y, epochs=epochs, batch_size=32, verbose=0, callbacks=list(callbacks), **arguments).history


def applied(model, callback, epochs=1):
    """What fit does with a callback, where training changes nothing; returns the logs."""
    logs = {}
    callback.set_model(model)
    callback.set_params({"epochs": epochs, "steps": 1})
    callback.on_train_begin()
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, logs)
    callback.on_train_end()
    return logs


def psp_layers(model):
    return {layer.name: layer for layer in layers_of(model) if isinstance(layer, PSPLayer)}


def pruned_and_all(layer, measure):
    """Counted on the kernel that is at work, entry by entry."""
    if measure == "structures":
        alive = [a.ravel().tolist() for a in layer.alive().values()]
        return sum(a.count(False) for a in alive), sum(map(len, alive))
    kernel = keras.ops.convert_to_numpy(layer.effective_kernel()).ravel().tolist()
    return kernel.count(0.0), len(kernel)


def sparsity_of(model, measure="params", only=None):
    pruned = total = 0
    for name, layer in psp_layers(model).items():
        if only in (None, name):
            times = POSITIONS[name] if measure == "macs" else 1
            zeros, size = pruned_and_all(layer, measure)
            pruned, total = pruned + times * zeros, total + times * size
    return pruned / total


def set_thresholds(chosen, value):
    for layer in chosen:
        for variable in layer.thresholds.values():
            variable.assign(value)


def best_by_trying(model, measure, target, only=None):
    """The largest sparsity up to the target of all that one threshold can give: try every one."""
    chosen = [layer for name, layer in psp_layers(model).items() if only in (None, name)]
    sizes = np.concatenate([np.abs(np.array(a)).ravel() for layer in chosen for a in layer.alphas.values()])
    found = []
    for threshold in [0.0, *np.nextafter(np.unique(sizes), np.float32(9))]:
        set_thresholds(chosen, threshold)
        found.append(sparsity_of(model, measure, only))
    return max(s for s in found if s <= target + 1e-9)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("target", [0.29, 0.85])
def test_no_threshold_comes_closer_from_below(measure, budget, target):
    model = network()
    before = {v.path: np.array(v) for v in model.weights if "threshold" not in v.path}
    best = {only: best_by_trying(model, measure, target, only) for only in [None, *"abch"]}
    set_thresholds(psp_layers(model).values(), 0.1)
    callback = SparsityTarget(target, measure=measure, budget=budget, allow_dead_layers=True)
    logs = applied(model, callback)
    if budget == "global":
        assert sparsity_of(model, measure) == pytest.approx(best[None])
        assert target - 0.06 < best[None] <= target + 1e-9
        assert len({float(t) for layer in psp_layers(model).values() for t in layer.thresholds.values()}) == 1
    for name in "abch":
        own = sparsity_of(model, measure, name)
        assert callback.per_layer[-1][name] == pytest.approx(own)
        if budget == "uniform":
            assert own == pytest.approx(best[name])
    assert logs["sparsity"] == pytest.approx(sparsity_of(model, measure))
    assert all(np.array_equal(before[v.path], np.array(v)) for v in model.weights if v.path in before)


@pytest.fixture(scope="module")
def trained():
    return network()


def test_without_the_callback_the_sparsity_is_another(trained):
    fit(trained, epochs=1)
    assert all(abs(sparsity_of(trained, measure) - TARGET) > 0.1 for measure in MEASURES)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("measure", MEASURES)
def test_after_fit_the_asked_sparsity_is_met(trained, measure, budget):
    before = np.array(trained.get_layer("a").alphas["column"])
    ramp = schedules.linear(0.0, TARGET, begin=0, stop=1)
    history = fit(trained, SparsityTarget(ramp, measure=measure, budget=budget), epochs=2)
    reached = sparsity_of(trained, measure)
    assert TARGET - 0.06 < reached <= TARGET
    assert history["sparsity"] == [pytest.approx(0, abs=1e-9), pytest.approx(reached)]
    assert not np.array_equal(np.array(trained.get_layer("a").alphas["column"]), before)


def test_what_floating_point_makes_of_a_percentage_costs_no_structure():
    inputs = keras.Input((100,))
    model = keras.Model(inputs, PSPDense(2, name="h", alpha_initializer=random_alphas(0))(inputs))
    for percent in range(100):
        applied(model, SparsityTarget(percent / 100, measure="structures"))  # 0.29 * 100 < 29
        assert pruned_and_all(model.get_layer("h"), "structures") == (percent, 100)


def test_uniform_prunes_each_layer_equally_and_global_does_not():
    each = [SparsityTarget(0.5, measure="structures", budget=budget) for budget in BUDGETS]
    for callback in each:
        applied(network(), callback)
    everywhere, equal = (list(callback.per_layer[-1].values()) for callback in each)
    assert all(0.5 - 1 / 8 < value <= 0.5 for value in equal) and equal[1] == equal[3] == 0.5  # 8 structures each
    assert max(everywhere) - min(everywhere) > 0.1


def test_ties_are_kept_rather_than_prune_more_than_asked():
    model = network("ones", threshold=2.0)
    with pytest.warns(UserWarning, match="ties with others"):
        logs = applied(model, SparsityTarget(0.5))
    assert logs["sparsity"] == sparsity_of(model) == 0
    alphas = psp_layers(model)["a"].alphas["column"]
    alphas.assign(np.where(np.arange(27).reshape(3, 3, 3, 1) < 20, 0.5, 1.0))
    for target, pruned in ((0.7, 0), (0.75, 20 / 27)):  # twenty of 27 leave together or not at all
        applied(model, SparsityTarget(target, budget="uniform"))
        assert sparsity_of(model, only="a") == pytest.approx(pruned)


def test_equal_alphas_prune_nothing_in_the_first_epoch_and_the_asked_part_at_its_end():
    model, seen = network("ones"), []
    look = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(sparsity_now(model)))
    fit(model, SparsityTarget(0.5), look, epochs=2)
    assert seen[:4] == [0] * 4 and 0.4 < seen[4] <= 0.5  # 4 batches an epoch
    assert 0.45 < sparsity_of(model) <= 0.5


def sparsity_now(model):
    getattr(model, "jax_state_sync", int)()  # JAX keeps the weights elsewhere during an epoch
    return sparsity_of(model)


def test_the_last_of_each_layer_stays_unless_dead_layers_are_allowed():
    for allowed in (False, True):
        model = network()
        layer = model.get_layer("b")
        layer.alphas["channel"].assign(np.array(layer.alphas["channel"]) / 1000)  # first to go
        applied(model, SparsityTarget(0.7, allow_dead_layers=allowed))
        assert layer.alive()["channel"].sum() == (0 if allowed else 1)
        assert 0.64 < sparsity_of(model) <= 0.7  # the others make up for it
        thresholds = {float(t) for x in psp_layers(model).values() for t in x.thresholds.values()}
        assert len(thresholds) == (1 if allowed else 2)


def test_structures_that_multiply_leave_at_least_one_weight_between_them():
    model = network()
    with pytest.warns(UserWarning, match="the last of its layer"):
        applied(model, SparsityTarget(0.999, measure="structures"))
    for layer in psp_layers(model).values():
        assert np.count_nonzero(np.array(layer.kernel)) > 0
        assert all(alive.any() for alive in layer.alive().values())


def test_a_branch_may_leave_as_a_layer():
    model = network(b="layer")
    model.get_layer("b").alphas["layer"].assign([[[[0.001]]]])
    applied(model, SparsityTarget(0.6))
    assert not model.get_layer("b").alive()["layer"].any() and 0.54 < sparsity_of(model) <= 0.6


def test_the_target_follows_its_schedule_and_validation_sees_it():
    model, seen = network(), []
    watch = keras.callbacks.LambdaCallback(on_test_end=lambda logs: seen.append(sparsity_of(model)))
    target = SparsityTarget({1: 0.3, 3: 0.6}, log_layers=True)
    history = fit(model, watch, target, epochs=4, validation_data=(X[:32], Y[:32]))
    assert history["sparsity"] == pytest.approx(seen)
    assert seen == pytest.approx([0, 0.3, 0.3, 0.6], abs=0.05)
    assert {f"sparsity/{name}" for name in "abch"} == {key for key in history if key.startswith("sparsity/")}
    assert [entry["c"] for entry in target.per_layer] == history["sparsity/c"]


def test_steps_may_be_batches_and_the_last_value_is_reached_between_the_multiples():
    model, targets = network(), []
    callback = SparsityTarget(schedules.linear(0, 0.6, begin=0, stop=5), unit="batch", every=3)
    look = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: targets.append(callback._target))
    seen = []
    look.on_train_batch_end = lambda batch, logs=None: seen.append(sparsity_now(model))
    history = fit(model, callback, look, epochs=2)
    assert targets == pytest.approx([0, 0, 0, 0.36, 0.36, 0.6, 0.6, 0.6])
    assert history["sparsity"] == pytest.approx([0.36, 0.6], abs=0.05)
    assert 0.2 < seen[3] <= 0.36 and 0.54 < seen[7] <= 0.6  # at the end of an epoch it is exact


def thresholds_of(model):
    return [float(t) for layer in psp_layers(model).values() for t in layer.thresholds.values()]


def watched(model, event):
    """(callback, list): the thresholds at every such event."""
    seen = []
    return keras.callbacks.LambdaCallback(**{event: lambda *_: seen.append(thresholds_of(model))}), seen


def test_callbacks_that_come_before_it_find_the_end_of_the_epoch_settled():
    model = network()
    begin, at_begin = watched(model, "on_epoch_begin")
    before, early = watched(model, "on_epoch_end")
    after, late = watched(model, "on_epoch_end")
    fit(model, before, SparsityTarget(0.5), begin, after, epochs=2)
    assert early == late and all(a != b for a, b in zip(at_begin, late))


def test_batches_that_fit_cannot_count_are_counted_and_validated_as_asked():
    model = network()

    def batches():
        yield X[:32], Y[:32]
        yield X[32:64], Y[32:64]

    for callback in (SparsityTarget({1: 0.4}, unit="batch"), SparsityTarget(0.4)):
        begin, at_begin = watched(model, "on_epoch_begin")
        watch, seen = watched(model, "on_test_end")
        end, late = watched(model, "on_epoch_end")
        callbacks = [callback, begin, watch, end]
        model.fit(batches(), epochs=1, verbose=0, callbacks=callbacks, validation_data=(X[:32], Y[:32]))
        assert 0.34 < sparsity_of(model) <= 0.4 and callback._batches == 2
        assert seen == late != at_begin
    alphas = model.get_layer("a").alphas["column"]
    alphas.assign(np.array(alphas) / 2)
    model.evaluate(X[:32], Y[:32], verbose=0, callbacks=[callback])
    assert thresholds_of(model) == late[0]  # it moves nothing outside of training


def test_a_second_fit_begins_anew_and_revives_what_was_pruned():
    model = network()
    callback = SparsityTarget(0.7)
    fit(model, callback, epochs=1)
    alive = model.get_layer("a").alive()["column"].sum()
    assert 0.64 < sparsity_of(model) <= 0.7
    callback.schedule = schedules.constant(0.3)
    history = fit(model, callback, epochs=1)
    assert 0.24 < sparsity_of(model) <= 0.3 and model.get_layer("a").alive()["column"].sum() > alive
    assert len(callback.per_layer) == len(history["sparsity"]) == 1


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has neither on PyTorch without further tools")
@pytest.mark.parametrize(
    "arguments", [dict(jit_compile=True), dict(steps_per_execution=3)], ids=lambda a: next(iter(a))
)
def test_however_the_step_is_run(arguments):
    model = network(**arguments)
    history = fit(model, SparsityTarget(0.5), epochs=2)
    assert 0.44 < sparsity_of(model) <= 0.5
    assert history["sparsity"][-1] == pytest.approx(sparsity_of(model))


def test_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, SparsityTarget(0.5), epochs=2)
    assert model.get_layer("a").compute_dtype == "float16" and 0.44 < sparsity_of(model) <= 0.5


def test_averaged_weights_have_the_asked_sparsity_too():
    model = network()
    model.compile(keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.5), LOSS)
    fit(model, SparsityTarget(0.5), epochs=1)
    assert 0.44 < sparsity_of(model) <= 0.5


def nested():
    """Two nested models in which a layer has the same name; a separable one; one over time."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((4, 8, 8, 3))
    spread = PSPConv2D(4, 3, alpha_initializer=random_alphas(1), structure="column")
    x = layers.TimeDistributed(spread, name="frames")(x)
    x = layers.Reshape((12, 12, 4))(x)
    for number in range(2):
        into = keras.Input((12, 12, 4))
        one = PSPSeparableConv2D(
            4, 3, padding="same", structure=("channel", "filter"), alpha_initializer=random_alphas(5), name="same"
        )(into)
        two = PSPConv2D(4, 1, alpha_initializer=random_alphas(number), name=f"other{number}")(one)
        x = keras.Model(into, two, name=f"block{number}")(x)
    model = keras.Model(inputs, PSPDense(2)(layers.GlobalAveragePooling2D()(x)))
    model.compile("sgd", LOSS)
    return model


def test_layers_at_any_depth_are_found_and_counted_as_often_as_they_work():
    model = nested()
    callback = SparsityTarget(0.5, measure="macs")
    applied(model, callback)
    costs = {(kernel.name, kernel.structures): kernel.cost for kernel in callback.kernels}
    assert list(callback.per_layer[0])[1:5] == ["same#1", "other0", "same#2", "other1"]
    assert costs == {
        (callback.kernels[0].name, ("column",)): 3 * 3 * 3 * 4 * 6 * 6 * 4,
        **{(f"same#{n}", ("channel",)): 3 * 3 * 4 * 144 for n in (1, 2)},
        **{(f"same#{n}", ("filter",)): 4 * 4 * 144 for n in (1, 2)},
        **{(f"other{n}", ("channel",)): 4 * 4 * 144 for n in (0, 1)},
        (callback.kernels[-1].name, ("channel",)): 4 * 2,
    }
    alike = [layer for layer in layers_of(model) if layer.name == "same"]
    assert len(alike) == 2 and all(float(t) > 0 for layer in alike for t in layer.thresholds.values())


def test_a_threshold_that_layers_share_is_one_for_all_and_has_no_uniform_budget():
    shared = keras.Variable(0.1, trainable=False)
    model = network(threshold=shared)
    applied(model, SparsityTarget(0.85))
    assert 0.7 < sparsity_of(model) <= 0.85 and float(shared) > 0.1
    assert all(alive.any() for layer in psp_layers(model).values() for alive in layer.alive().values())
    with pytest.raises(ValueError, match="a and b share one"):
        applied(model, SparsityTarget(0.5, budget="uniform"))


@pytest.mark.parametrize("place", [0, 1])
def test_the_best_epoch_keeps_its_thresholds_wherever_early_stopping_stands(place):
    model, saved = network(), []
    callbacks = [SparsityTarget(0.5)]
    callbacks.insert(place, keras.callbacks.EarlyStopping("loss", mode="max", patience=2, restore_best_weights=True))
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: saved.append(model.get_weights()))
    history = fit(model, *callbacks, save, epochs=6)
    assert len(history["loss"]) == 3  # the first epoch was the best
    assert all(np.array_equal(a, b) for a, b in zip(saved[0], model.get_weights()))
    assert not all(np.array_equal(a, b) for a, b in zip(saved[2], model.get_weights()))
    assert 0.44 < sparsity_of(model) <= 0.5


def test_a_best_epoch_of_another_sparsity_is_warned_of():
    model = network()
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(epoch=epoch))
    stopping = keras.callbacks.EarlyStopping("epoch", mode="min", patience=2, restore_best_weights=True)
    with pytest.warns(UserWarning, match="start_from_epoch"):
        fit(model, count, stopping, SparsityTarget({1: 0.5}), epochs=6)
    assert 0.44 < sparsity_of(model) <= 0.5


@pytest.mark.parametrize("swapped", [False, True])
def test_a_killed_run_goes_on_at_its_place_in_the_schedule(tmp_path, swapped):
    class Killer(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            begun.append((epoch, thresholds_of(model)))
            if len(begun) == 4:
                raise InterruptedError

    begun, last = [], []
    for stop in (pytest.raises(InterruptedError), nullcontext()):
        model = network()
        target = SparsityTarget(schedules.linear(0.0, 0.6, begin=0, stop=4))
        callbacks = [keras.callbacks.BackupAndRestore(tmp_path / "backup"), target, Killer()]
        if swapped:
            callbacks[:2] = callbacks[1::-1]
        with stop:
            fit(model, *callbacks, epochs=6)
        last.append([sum(entry.values()) > 0 for entry in target.per_layer])
    assert [epoch for epoch, _ in begun] == [0, 1, 2, 3, 3, 4, 5]
    assert begun[3][1] == begun[4][1]  # the same alphas and the same place: the same thresholds
    assert last == [[False, True, True], [True] * 3]
    assert 0.54 < sparsity_of(model) <= 0.6


def test_the_picture_is_drawn_every_epoch_and_replaced_in_one_go(tmp_path, monkeypatch):
    model, seen, target = network(), [], tmp_path / "alphas.png"
    monkeypatch.setattr(os, "replace", lambda a, b, own=os.replace: seen.append(str(b)) or own(a, b))
    applied(model, SparsityTarget(0.5, plot=target), epochs=2)
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and seen == [str(target)] * 3  # two epochs, the end
    assert [p.name for p in tmp_path.iterdir()] == ["alphas.png"]
    before = target.read_bytes()
    set_thresholds(psp_layers(model).values(), 0.9)
    reports.plot_alphas(model, target)
    assert target.read_bytes() != before
    with pytest.raises(ValueError, match="no PSP layers"):
        reports.plot_alphas(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), target)


def test_tensorboard_draws_the_alphas_by_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    fit(network(), SparsityTarget(0.5, log_layers=True), board, epochs=1)
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"a/column_alpha/histogram", "c/filter_alpha/histogram", "epoch_sparsity", "epoch_sparsity/a"} <= tags


def test_logs_reach_the_csv_file(tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(network(), SparsityTarget(0.5, log_layers=True), logger, epochs=1)
    head, line = (tmp_path / "log.csv").read_text().splitlines()
    row = dict(zip(head.split(","), line.split(",")))
    assert float(row["sparsity"]) == pytest.approx(history["sparsity"][0]) and "sparsity/h" in row


def test_a_schedule_that_outlasts_the_training_warns():
    with pytest.warns(UserWarning, match="asked sparsity will not be reached"):
        applied(network(), SparsityTarget(schedules.linear(0, 0.5, begin=0, stop=9)), epochs=2)


def test_a_model_without_psp_layers_is_told_what_to_do():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="PSPConv2D"):
        applied(model, SparsityTarget(0.5))


def test_diverged_alphas_are_named():
    model = network()
    model.get_layer("b").alphas["channel"].assign(np.full((1, 1, 8, 1), np.nan))
    with pytest.raises(ValueError, match="b: its channel alphas .* diverged"):
        applied(model, SparsityTarget(0.5))


def test_a_layer_nobody_can_count_is_named():
    class Own(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = PSPDense(3, name="inner", alpha_initializer=random_alphas(0))

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return self.inner(x)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(Own()(inputs)))
    with pytest.raises(ValueError, match="inner works inside a layer without a rule"):
        applied(model, SparsityTarget(0.5, measure="macs"))
    assert applied(model, SparsityTarget(0.5, measure="params"))["sparsity"] == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "To keep 20 % write sparsity=0.8"),
        (dict(sparsity=0.5, every=0), "every=0"),
        (dict(sparsity=0.5, unit="step"), "'batch', 'epoch'"),
        (dict(sparsity=0.5, measure="memory"), "'macs', 'params', 'structures'"),
        (dict(sparsity=0.5, budget="x"), "'global', 'uniform'"),
        (dict(sparsity=0.5, plot="a.pdf"), "ends in .png"),
        (dict(sparsity=0.5, plot="/no/such/folder/a.png"), "does not exist"),
    ],
)
def test_bad_arguments_fail_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityTarget(**arguments)


def test_a_schedule_that_leaves_its_bounds_is_named():
    with pytest.raises(ValueError, match="SparsityTarget by its schedule"):
        applied(network(), SparsityTarget(lambda step: 1.5))
    with pytest.raises(TypeError, match="expected a number"):
        SparsityTarget("half")


def revived_by_batchnorm(hold):
    """Sparsity in the middle of the last epoch, of "layer" structures in front of BatchNormalization."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, padding="same")(x)
    for number in range(4):
        y = PSPConv2D(6, 3, padding="same", structure="layer", use_bias=False, name=f"branch{number}")(x)
        x = keras.layers.ReLU()(keras.layers.Add()([x, keras.layers.BatchNormalization()(y)]))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng, seen = np.random.default_rng(0), []

    def look(batch, logs):
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        seen.append(np.mean([layer.alive()["layer"].mean() < 1 for layer in model.layers if "branch" in layer.name]))

    target = SparsityTarget({0: 0.0, 2: 0.5}, measure="structures", hold=hold)
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(
        rng.normal(size=(160, 8, 8, 3)),
        rng.integers(0, 4, 160),
        batch_size=16,
        epochs=5,
        verbose=0,
        callbacks=[watch, target],
    )
    return model, seen[-5]


def test_what_is_held_stays_pruned_between_two_settings_where_batchnorm_would_revive_it():
    model, between = revived_by_batchnorm(hold=True)
    assert between == 0.5
    dead = [layer for layer in model.layers if "branch" in layer.name and not layer.alive()["layer"].any()]
    assert len(dead) == 2 and all(not np.any(np.array(layer.alphas["layer"])) for layer in dead)
    assert revived_by_batchnorm(hold=False)[1] < 0.5  # the control: the callback alone does not keep them down
