import json
import os
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net

from keras_prune import Channels, FilterPruning, GradualPruning, Pruner, dead_units, metrics, schedules, strip
from keras_prune.pruners import KeepZeros
from keras_prune.surgery import relative_difference

X, Y = patterns()
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "averaging": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=2),
}


def fit(model, *callbacks, epochs=3, **arguments):
    return model.fit(X, Y, epochs=epochs, batch_size=64, verbose=0, callbacks=list(callbacks), **arguments).history


def units_of(model):
    return set(dead_units(Channels(model), strict=True).tolist())


JAX_CANNOT = pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="Keras 3.15 on JAX fails by itself: after the "
    "averages are written over the weights, a second fit donates the same buffer twice",
)


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=JAX_CANNOT if name == "averaging" else ()) for name in sorted(OPTIMIZERS)]
)
def test_pruned_weights_stay_exactly_zero_through_any_optimizer_and_a_second_fit(optimizer):
    model = compiled(OPTIMIZERS[optimizer]())
    fit(model, epochs=1)  # momenta are non-zero and a step function is cached before pruning begins
    pruning = FilterPruning(0.5)
    fit(model, pruning)
    removed = set(pruning.removed.tolist())
    assert len(removed) >= 8 and units_of(model) == removed
    fit(model, epochs=2)  # without the callback
    assert units_of(model) == removed


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has neither on PyTorch without further tools")
@pytest.mark.parametrize(
    "arguments",
    [dict(jit_compile=True), dict(steps_per_execution=2), dict(run_eagerly=True)],
    ids=lambda a: next(iter(a)),
)
def test_zeros_hold_however_the_step_is_run(arguments):
    model = compiled(OPTIMIZERS["momentum"](), **arguments)
    pruning = GradualPruning(0.5)
    fit(model, pruning, epochs=4)
    assert len(pruning.removed) >= 8 and units_of(model) == set(pruning.removed.tolist())


def test_zeros_hold_in_mixed_precision_with_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    finally:
        keras.config.set_dtype_policy("float32")
    pruning = FilterPruning(0.5)
    fit(model, pruning)
    assert len(pruning.removed) >= 8 and units_of(model) == set(pruning.removed.tolist())
    small, report = strip(model, report=True)
    assert report.difference < 3e-2 and small.get_layer("inner0").compute_dtype == "float16"


def test_without_the_mask_momentum_brings_zeroed_weights_back():
    """The control of the tests above: zeroing once is not enough."""
    model = compiled(OPTIMIZERS["momentum"]())
    pruning = FilterPruning(0.5)
    fit(model, pruning, epochs=1)
    for variable in model.trainable_variables:
        variable.constraint = None
    model.make_train_function(force=True)
    model.get_layer("inner0").trainable = True
    bias = model.get_layer("inner0").bias
    bias.assign(np.full(bias.shape, 0.5))
    fit(model, epochs=1)
    assert len(units_of(model)) < len(pruning.removed)


def test_a_constraint_the_user_had_goes_on_working_and_zeros_hold_too():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(32, 3, name="conv", kernel_constraint=keras.constraints.MaxNorm(0.3, axis=(0, 1, 2)))(inputs)
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, FilterPruning(0.5))
    norms = np.linalg.norm(np.array(model.get_layer("conv").kernel).reshape(-1, 32), axis=0)
    assert norms.max() <= 0.3 + 1e-5 and 8 <= (norms == 0).sum() < 32
    assert isinstance(model.get_layer("conv").kernel.constraint, KeepZeros)
    fit(model, FilterPruning(0.5))
    assert not isinstance(model.get_layer("conv").kernel.constraint.inner, KeepZeros)  # they do not pile up


def test_hard_pruning_only_adds_units_and_follows_the_schedule():
    model, seen = compiled(OPTIMIZERS["momentum"](), widths=(32, 64)), []
    pruning = FilterPruning(schedules.linear(0.0, 0.6, begin=0, stop=3), measure="params")
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(set(pruning.removed.tolist())))
    history = fit(model, pruning, look, epochs=5)
    assert all(a <= b for a, b in zip(seen, seen[1:])) and len(seen[0]) == 0 < len(seen[1]) < len(seen[3])
    assert seen[3] == seen[4]
    assert history["sparsity"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.6], abs=0.08)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_the_last_value_is_reached_though_the_end_is_no_multiple_of_the_frequency(every):
    pruning = FilterPruning(schedules.linear(0.0, 0.6, begin=0, stop=4), every=every)
    history = fit(compiled(), pruning, epochs=6)
    assert history["sparsity"][4] == history["sparsity"][5] == pytest.approx(0.6, abs=0.08)
    assert history["sparsity"][1] == history["sparsity"][0]  # epoch 1 is no multiple of anything here


def test_a_schedule_that_outlasts_the_training_warns():
    with pytest.warns(UserWarning, match="asked sparsity will not be reached"):
        fit(compiled(), FilterPruning(schedules.linear(0, 0.5, begin=0, stop=9)), epochs=2)


def test_a_sparsity_that_cannot_be_reached_is_warned_of_once():
    x, y = patterns(64)
    with pytest.warns(UserWarning, match="99.9% of the macs were asked for") as caught:
        compiled().fit(x, y, epochs=3, verbose=0, callbacks=[FilterPruning(0.999)])
    assert sum("were asked for" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were asked for")
        compiled().fit(x, y, epochs=3, verbose=0, callbacks=[FilterPruning(0.5, round_to=1)])


def test_steps_may_be_batches():
    model = compiled()
    pruning = FilterPruning(schedules.polynomial(0, 0.6, begin=0, stop=7), unit="batch", every=2)
    history = fit(model, pruning, epochs=3)  # 4 batches an epoch
    assert 0 < history["sparsity"][0] < history["sparsity"][1] == pytest.approx(0.6, abs=0.08)
    assert units_of(model) == set(pruning.removed.tolist())


def test_gradual_pruning_reaches_its_end_at_sixty_percent_of_the_training():
    history = fit(compiled(widths=(32, 64)), GradualPruning(0.5), epochs=10)
    assert history["sparsity"][0] == 0 and history["sparsity"][3] < history["sparsity"][6]
    assert history["sparsity"][6:] == pytest.approx([0.5] * 4, abs=0.05)


def test_soft_pruning_lets_filters_grow_back_until_the_last_epoch():
    model, zeros_after_a_batch, chosen = compiled(keras.optimizers.SGD(0.1, momentum=0.9)), [], []
    pruning = FilterPruning(0.5, soft=True)

    def look(batch, logs):
        getattr(model, "jax_state_sync", int)()  # JAX keeps the weights elsewhere during an epoch
        zeros_after_a_batch.append(len(units_of(model)))
        chosen.append(frozenset(pruning.removed.tolist()))

    fit(model, pruning, keras.callbacks.LambdaCallback(on_train_batch_end=look), epochs=4)
    assert set(zeros_after_a_batch[:12]) == {0}  # revived by the first step of each soft epoch
    assert set(zeros_after_a_batch[12:]) == {len(pruning.removed)} and len(pruning.removed) >= 8
    assert units_of(model) == set(pruning.removed.tolist())


def test_soft_pruning_that_is_stopped_early_still_ends_with_zeros():
    model = compiled()
    pruning = FilterPruning(0.5, soft=True)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1))
    fit(model, pruning, stop, epochs=9)
    assert len(pruning.removed) >= 8 and units_of(model) == set(pruning.removed.tolist())


def test_early_stopping_that_restores_an_unpruned_epoch_is_warned_of_and_the_zeros_come_back():
    model = compiled(OPTIMIZERS["momentum"]())
    stopping = keras.callbacks.EarlyStopping("sparsity", mode="min", patience=2, restore_best_weights=True)
    pruning = FilterPruning({1: 0.5})
    report = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(pruning.figures()))
    with pytest.warns(UserWarning, match="start_from_epoch"):
        history = fit(model, report, stopping, pruning, epochs=9)
    assert len(history["loss"]) == 3  # epoch 0 was the best: nothing was pruned in it
    assert len(pruning.removed) >= 8 and units_of(model) == set(pruning.removed.tolist())


def test_logs_reach_history_csv_and_checkpoint_names(tmp_path):
    model = compiled()
    pruning = FilterPruning(0.5)
    history = fit(
        model,
        pruning,
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}-{sparsity:.2f}.keras")),
        validation_data=(X[:32], Y[:32]),
    )
    channels = Channels(model)
    small = strip(model)
    assert history["params"][-1] == small.count_params()
    assert history["macs"][-1] == metrics.macs(Channels(small))
    assert history["sparsity"][-1] == pytest.approx(1 - history["macs"][-1] / metrics.macs(channels))
    assert "val_accuracy" in history and "sparsity" in (tmp_path / "log.csv").read_text().splitlines()[0]
    saved = keras.saving.load_model(tmp_path / f"3-{history['sparsity'][-1]:.2f}.keras")
    assert relative_difference(strip(saved), small, X[:8]) < 1e-5


def test_the_stripped_model_goes_on_training_and_learns():
    model = compiled(OPTIMIZERS["adam"]())
    fit(model, GradualPruning(0.5), epochs=8)
    small, report = strip(model, X[:16], report=True)
    assert report.difference < 1e-5 and small.count_params() < 0.75 * model.count_params()
    assert int(small.optimizer.iterations) == int(model.optimizer.iterations)
    before = small.evaluate(X, Y, verbose=0)[0]
    small.fit(X, Y, epochs=3, verbose=0)
    assert small.evaluate(X, Y, verbose=0)[0] < before


KILLED = """
import sys, keras, numpy as np
sys.path.insert(0, {tests!r})
from small import compiled, patterns
from keras_prune import GradualPruning, Channels, dead_units
x, y = patterns()
model = compiled("adam")
pruning = GradualPruning(0.5, stop=2)
class Killer(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print("removed", epoch, sorted(pruning.removed.tolist()), flush=True)
        if {kill} and epoch == 3:
            import os; os._exit(9)
callbacks = [pruning, keras.callbacks.BackupAndRestore({folder!r}), Killer()]
if {swapped}:
    callbacks[:2] = callbacks[1::-1]
model.fit(x, y, epochs=6, verbose=0, callbacks=callbacks)
print("dead", sorted(dead_units(Channels(model), strict=True).tolist()))
"""


@pytest.mark.parametrize("swapped", [False, True])
def test_a_killed_run_resumes_with_the_same_zeros_wherever_the_backup_stands(tmp_path, swapped):
    def run(kill):
        code = KILLED.format(
            tests=os.path.dirname(__file__), folder=str(tmp_path / "backup"), kill=kill, swapped=swapped
        )
        return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)

    first = run(kill=True)
    assert first.returncode == 9, first.stderr[-2000:]
    second = run(kill=False)
    assert second.returncode == 0, second.stderr[-2000:]
    before = [line for line in first.stdout.splitlines() if line.startswith("removed 2")][0].split(" ", 2)[2]
    lines = [line for line in second.stdout.splitlines() if line.startswith("removed")]
    assert len(json.loads(before)) >= 8
    assert {line.split(" ", 2)[2] for line in lines} == {before}
    assert int(lines[0].split()[1]) >= 3  # it did not start over
    assert second.stdout.splitlines()[-1] == f"dead {before}"


def test_a_pruner_of_ones_own_writes_one_method():
    class EveryThirdWeight(Pruner):
        def masks(self, step):
            kernel = self.model.get_layer("inner0").kernel
            return [
                (
                    kernel,
                    (
                        np.arange(
                            kernel.shape.num_elements()
                            if hasattr(kernel.shape, "num_elements")
                            else np.prod(kernel.shape)
                        )
                        % 3
                        > 0
                    ).reshape(kernel.shape),
                )
            ]

    model = compiled(OPTIMIZERS["adam"]())
    fit(model, EveryThirdWeight())
    flat = np.array(model.get_layer("inner0").kernel).ravel()
    assert (flat[::3] == 0).all() and (flat[1::3] != 0).all()


def test_a_pruner_without_masks_says_so():
    with pytest.raises(TypeError, match="masks"):
        fit(compiled(), Pruner(), epochs=1)


def test_diverged_training_is_named_instead_of_pruned():
    model = compiled()
    model.get_layer("inner0").kernel.assign(np.full(model.get_layer("inner0").kernel.shape, np.nan))
    with pytest.raises(ValueError, match="diverged"):
        fit(model, FilterPruning(0.5), epochs=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "To keep 20 % write sparsity=0.8"),
        (dict(every=0), "every=0"),
        (dict(unit="step"), "'batch', 'epoch'"),
        (dict(criterion="l3"), "Known: .*bn_scale"),
        (dict(measure="flops"), "Known: .*macs"),
        (dict(budget="x"), "Known: error_bound, global"),
    ],
)
def test_bad_arguments_fail_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        FilterPruning(**arguments)


def test_batches_of_unknown_number_ask_for_stop():
    model = compiled()

    def endless():
        while True:
            yield X[:32], Y[:32]

    with pytest.raises(ValueError, match="stop="):
        model.fit(endless(), epochs=1, steps_per_epoch=None, verbose=0, callbacks=[GradualPruning(unit="batch")])


def test_layers_that_are_frozen_keep_their_zeros_too():
    model = residual_net()
    model.get_layer("outer1").trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruning = FilterPruning(0.5)
    fit(model, pruning)
    assert units_of(model) == set(pruning.removed.tolist()) and len(pruning.removed) >= 8
