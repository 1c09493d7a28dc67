import doctest
import math
import zlib

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns

from keras_prune import Channels, DropPruning, Pruner, criteria, dead_units, dropping, metrics, release, strip
from keras_prune.dropping import drawn, probabilities
from keras_prune.entries import count_of, kernels_of
from keras_prune.pruners import KeepZeros, slots_of

X, Y = patterns()
FLAT = X[:, 0, :7].reshape(len(X), -1)[:, :20]
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "averaging": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=2),
}


def perceptron(optimizer="adam", seed=0):
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((20,))
    for number, width in enumerate((16, 12)):
        x = layers.Dense(width, name=f"dense{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization(name=f"norm{number}")(x))
    model = keras.Model(inputs, layers.Dense(4, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)  # quicker to build
    return model


def fit(model, *callbacks, epochs=5, **arguments):
    x = X if len(model.inputs[0].shape) == 4 else FLAT
    arguments = dict(batch_size=64, verbose=0, shuffle=False) | arguments
    return model.fit(x, Y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def array(variable):
    return keras.ops.convert_to_numpy(variable)


def kernels(model):
    return {name: array(variable).copy() for name, variable in kernels_of(Channels(model)).items()}


def zeros(model):
    return {name: value == 0 for name, value in kernels(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


class Look(keras.callbacks.Callback):
    """The kernels right after pruning, and at the end of each epoch. Put it behind the pruner."""

    def __init__(self):
        super().__init__()
        self.pruned, self.trained = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.pruned.append(kernels(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.trained.append(kernels(self.model))


# -- the chain -------------------------------------------------------------------------------------------------------


def simulated(n, steps, unimportant, drop_out, drop_in, seed=0):
    """The fraction that is gone after each step, when who matters is anybody's guess each time."""
    rng, gone, found = np.random.default_rng(seed), np.zeros(n, bool), []
    for _ in range(steps):
        dropped, revived = drawn(rng.random(n), gone, unimportant, drop_out, drop_in, rng)
        gone = (gone | dropped) & ~revived
        found.append(gone.mean())
    return found


def test_the_chain_flows_to_its_fixed_point_along_the_mean():
    n, found = 10_000, simulated(10_000, 40, 0.3, 0.8, 0.1)
    assert found[:4] == pytest.approx([0.24, 0.398, 0.503, 0.572], abs=0.015)
    three_sigma = 3 * math.sqrt(0.7059 * 0.2941 / n)
    assert abs(np.mean(found[30:]) - 0.7059) < three_sigma
    assert abs(simulated(n, 60, 0.5, 0.9, 0.05)[-1] - 0.9) < 3 * math.sqrt(0.09 / n)
    assert abs(simulated(n, 40, 0.3, 0.8, 0.15)[-1] - 0.7059) > three_sigma  # the control: another probability
    assert simulated(n, 40, 0.3, 0.8, 0.0)[-1] > 0.999  # nothing returns


@pytest.mark.parametrize("sparsity, drop_in", [(0.9, 0.02667), (0.93, 0.01806)])
def test_probabilities_are_those_worked_out_by_hand(sparsity, drop_in):
    assert probabilities(sparsity, 0.3, 0.8) == pytest.approx((0.8, drop_in), abs=5e-6)


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.24, 0.5, 0.99])
@pytest.mark.parametrize("unimportant", [0.05, 0.3, 0.9])
def test_the_fixed_point_of_the_derived_probabilities_is_the_sparsity_and_nothing_overshoots(sparsity, unimportant):
    drop_out, drop_in = probabilities(sparsity, unimportant)
    assert 0 < drop_out <= 0.8 and 0 <= drop_in <= 1
    assert unimportant * drop_out / (unimportant * drop_out + drop_in) == pytest.approx(sparsity)
    assert unimportant * drop_out + drop_in <= 1 + 1e-12
    found = simulated(8000, 10 + int(8 / (unimportant * drop_out + drop_in)), unimportant, drop_out, drop_in)
    assert abs(found[-1] - sparsity) < 4 * math.sqrt(sparsity * (1 - sparsity) / 8000) + 2e-3  # whole numbers of units


def test_as_many_are_dropped_and_revived_as_expected_and_only_those_that_may():
    rng, n, counts = np.random.default_rng(0), 1000, []
    scores, gone = rng.random(n), rng.random(n) < 0.4
    there = np.flatnonzero(~gone)
    weak = there[np.argsort(scores[there])][: math.floor(0.3 * there.size)]
    for _ in range(400):
        dropped, revived = drawn(scores, gone, 0.3, 0.8, 0.1, rng)
        assert set(np.flatnonzero(dropped)) <= set(weak) and not (revived & ~gone).any()
        counts.append((dropped.sum(), revived.sum()))
    for count, size, p in zip(np.mean(counts, axis=0), (weak.size, gone.sum()), (0.8, 0.1)):
        off = abs(count - p * size) / math.sqrt(size * p * (1 - p) / 400)
        assert off < 4 and abs(count - 1.1 * p * size) > 4 * math.sqrt(size * p * (1 - p) / 400)  # could be seen
    assert {n for n in np.flatnonzero(drawn(scores, gone, 0.3, 1, 0, rng)[0])} == set(weak)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(dropping, extraglobs={"np": np})
    assert result.attempted >= 5 and result.failed == 0


# -- weights, while it trains ----------------------------------------------------------------------------------------


class IterativeMagnitude(Pruner):
    """Written down naively: each epoch the floor(0.3 |A|) smallest of the A weights left of a kernel go."""

    def masks(self, step):
        for variable in kernels_of(self.channels).values():
            flat = array(variable).ravel()
            left = sorted((abs(w), place) for place, w in enumerate(flat) if w != 0)
            mask = flat != 0
            for _, place in left[: math.floor(0.3 * len(left) * (1 + 1e-12))]:
                mask[place] = False
            yield variable, mask.reshape(variable.shape)


def run_without_end(**arguments):
    model = perceptron()
    with pytest.warns(UserWarning, match="will not be reached"):
        fit(model, DropPruning(0.5, stop=4, unimportant=0.3, seed=0, **arguments), epochs=4)
    return kernels(model)


def test_certain_drops_without_returns_are_iterative_magnitude_pruning_bit_for_bit():
    model = perceptron()
    fit(model, IterativeMagnitude(), epochs=4)
    assert 0.7 < zeros(model)["dense0"].mean() < 0.8  # 1 - 0.7^4 = 0.76
    assert same(run_without_end(drop_out=1.0, drop_in=0.0), kernels(model))
    assert not same(run_without_end(drop_out=0.9, drop_in=0.0), kernels(model))
    assert not same(run_without_end(drop_out=1.0, drop_in=0.05), kernels(model))


def test_no_drops_and_no_returns_change_nothing():
    model = perceptron()
    fit(model, epochs=4)
    assert same(run_without_end(drop_out=0.0, drop_in=0.0), kernels(model))
    assert not same(run_without_end(drop_out=0.1, drop_in=0.0), kernels(model))


@pytest.mark.parametrize("revive", ["value", "zero"])
def test_what_returns_was_gone_and_has_its_value_or_zero_and_the_rest_is_untouched(revive):
    model, look = perceptron("sgd"), Look()
    history = fit(model, DropPruning(0.5, stop=7, revive=revive, seed=1), look, epochs=9)
    before = [kernels(perceptron("sgd")), *look.trained]
    last, returned, dropped = {}, 0, 0
    for old, pruned, trained in zip(before, look.pruned, look.trained):
        for name in old:
            gone, now = old[name] == 0, last.get(name, old[name])
            returns = gone & (trained[name] != 0)
            expected = np.where(returns, now if revive == "value" else 0, np.where(pruned[name] == 0, 0, old[name]))
            assert np.array_equal(pruned[name], expected)
            # What leaves is remembered as it was, until it leaves again.
            last[name] = np.where(~gone & (pruned[name] == 0), old[name], now)
            returned, dropped = returned + returns.sum(), dropped + (~gone & (pruned[name] == 0)).sum()
    assert returned > 100 and abs(returned - sum(history["revived"])) <= 5  # some have no gradient
    assert abs(dropped - sum(history["dropped"])) <= (5 if revive == "zero" else 0)
    assert history["weight_sparsity"][-1] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(budget="global"),
        dict(unimportant=0.9, drop_out=1.0, drop_in=0.0),  # far too much is gone: the surplus returns
        dict(unimportant=0.9, drop_out=1.0, drop_in=0.0, budget="global"),
        dict(criterion="random"),
        dict(criterion=lambda rows: -np.abs(rows[:, 0])),
        dict(criterion="taylor", data=(FLAT[:64], Y[:64])),
        dict(drop_out=0.0, drop_in=0.0),
    ],
    ids=["uniform", "global", "too_much", "too_much_global", "random", "function", "taylor", "no_chain"],
)
def test_at_the_end_exactly_so_much_is_zero_and_nothing_changes_any_more(arguments):
    model, look = perceptron("adam"), Look()
    history = fit(model, DropPruning(0.6, stop=3, seed=0, **arguments), look, epochs=5)
    held, total = [{k: v == 0 for k, v in found.items()} for found in look.pruned], 320 + 192 + 48
    if arguments.get("budget") == "global":
        assert sum(z.sum() for z in held[3].values()) == count_of(0.6, total)
    else:
        assert all(z.sum() == count_of(0.6, z.size) for z in held[3].values())
    assert same(held[3], held[4]) and same(held[4], zeros(model)) and not same(held[2], held[3])
    assert history["dropped"][4] == history["revived"][4] == 0
    if "unimportant" in arguments:
        assert history["weight_sparsity"][2] > 0.95 and history["dropped"][3] == 0 < history["revived"][3]


def test_of_too_much_that_is_gone_the_largest_return():
    model, look = perceptron("sgd"), Look()
    fit(model, DropPruning(0.6, stop=1, unimportant=0.9, drop_out=1.0, drop_in=0.0), look, epochs=2)
    start = kernels(perceptron("sgd"))
    for name, pruned in look.pruned[1].items():
        gone, returned = look.pruned[0][name] == 0, (look.pruned[0][name] == 0) & (pruned != 0)
        assert returned.sum() == count_of(0.9, gone.size) - count_of(0.6, gone.size)
        assert np.abs(start[name][returned]).min() >= np.abs(start[name][gone & ~returned]).max()
        assert np.array_equal(pruned[returned], start[name][returned])


JAX_CANNOT = pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="Keras 3.15 on JAX fails by itself: after the "
    "averages are written over the weights, a second fit donates the same buffer twice",
)


@pytest.mark.parametrize(
    "optimizer, kind",
    [
        pytest.param(name, kind, marks=JAX_CANNOT if name == "averaging" else ())
        for kind, names in (("weights", sorted(OPTIMIZERS)), ("filters", ["adamw", "averaging"]))
        for name in names
    ],
)
def test_zeros_are_zeros_at_any_time_and_survive_any_optimizer_and_a_second_fit(optimizer, kind):
    model, look = perceptron(OPTIMIZERS[optimizer]()), Look()
    fit(model, epochs=1)  # momenta are non-zero and a step function is cached before pruning begins
    pruning = DropPruning(0.5, kind=kind, round_to=8 if kind == "weights" else 1, stop=3, seed=0)
    history = fit(model, pruning, look)
    for pruned, trained in zip(look.pruned, look.trained):
        assert sum((v == 0).sum() for v in pruned.values()) > 20
        assert all((trained[name][v == 0] == 0).all() for name, v in pruned.items())
    held = zeros(model)
    assert sum(history["revived"]) > 5 and sum(z.sum() for z in held.values()) > 100
    for variable in kernels_of(Channels(model)).values():
        assert isinstance(variable.constraint, KeepZeros)
        assert np.array_equal(array(variable.constraint.mask) == 0, array(variable) == 0)
    fit(model, epochs=2)  # without the callback; averages of single weights that have gradients are not zero then
    assert (optimizer, kind) == ("averaging", "weights") or all(
        (zeros(model)[name] >= z).all() for name, z in held.items()
    )
    if kind == "weights":  # the control: without the masks they come back; units without a gradient would not
        release(model)
        fit(model, epochs=1)
        assert sum(z.sum() for z in zeros(model).values()) < 0.7 * sum(z.sum() for z in held.values())


def test_what_returns_starts_without_momentum():
    model, seen = perceptron(keras.optimizers.SGD(0.05, momentum=0.9)), []
    pruning = DropPruning(0.5, stop=4, seed=0)
    kernel = model.get_layer("dense0").kernel

    class LookAtSlots(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.before = array(kernel) == 0

        def on_epoch_begin(self, epoch, logs=None):
            if epoch in (1, 2, 3):
                [momentum] = slots_of(model.optimizer, kernel)
                returned = self.before & (array(kernel) != 0)
                seen.append((returned.sum(), np.abs(array(momentum)[returned]).max(initial=0)))

    fit(model, pruning, LookAtSlots(), epochs=5)
    assert sum(n for n, _ in seen) > 20 and all(largest == 0 for _, largest in seen)


def test_zeros_hold_in_mixed_precision_with_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = perceptron(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, DropPruning(0.5, seed=0))
    assert model.get_layer("dense0").compute_dtype == "float16"
    assert all(z.sum() == count_of(0.5, z.size) for z in zeros(model).values())


@pytest.mark.parametrize("kind", ["weights", "filters"])
def test_the_same_seed_makes_the_same_draws(kind):
    found = []
    for seed in (3, 3, 4):
        model = perceptron()
        fit(model, DropPruning(0.5, kind=kind, round_to=8 if kind == "weights" else 1, stop=3, seed=seed), epochs=2)
        found.append(zeros(model))
    assert same(found[0], found[1]) and not same(found[0], found[2])


# -- whole units -----------------------------------------------------------------------------------------------------


def units_of(model):
    return set(dead_units(Channels(model), strict=True).tolist())


@pytest.mark.parametrize("revive", ["value", "zero"])
def test_filters_leave_on_the_producing_side_return_and_end_as_what_strip_cuts(tmp_path, revive):
    model, seen = compiled("adam"), []
    pruning = DropPruning(0.5, kind="filters", revive=revive, stop=4, round_to=1, seed=0)

    def look(epoch, logs):
        channels = Channels(model)
        gone = {
            g.index: dropping._silent(channels, g) for g in channels.groups
        }  # made by zeros alone, whatever reads them
        seen.append((np.concatenate(list(gone.values())), units_of(model), set(pruning.removed.tolist())))

    history = fit(model, pruning, keras.callbacks.LambdaCallback(on_epoch_end=look), epochs=6)
    for silent, strict, removed in seen[:4]:
        assert strict == set() and silent.sum() == len(removed) > 5  # what reads them is whole
    silents = [silent for silent, _, _ in seen]
    returned = [(a & ~b).sum() for a, b in zip(silents, silents[1:4])]
    assert all(returned) and sum(returned) == sum(history["revived"][1:4])
    assert all(np.array_equal(silents[4], s) for s in silents[4:])
    assert units_of(model) == set(pruning.removed.tolist()) == seen[4][2]
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.02)
    small, report = strip(model, X[:16], report=True)
    assert report.difference < 1e-5
    if revive == "value":  # of those that return as zero some stay silent, and strip takes them as well
        assert history["macs"][-1] == metrics.macs(Channels(small))
    model.save(tmp_path / "m.keras")
    assert units_of(keras.saving.load_model(tmp_path / "m.keras")) == units_of(model)
    fit(model, epochs=1)
    assert units_of(model) == set(pruning.removed.tolist())


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_a_unit_that_returned_as_zero_learns_again_if_it_is_shifted_above_zero(shift):
    model, look = perceptron(keras.optimizers.SGD(0.05)), Look()
    norm = model.get_layer("norm0")
    norm.beta.assign(np.full(16, shift))
    pruning = DropPruning(0.5, kind="filters", revive="zero", drop_out=1.0, drop_in=1.0, stop=9, protect="dense1")
    with pytest.warns(UserWarning, match="will not be reached"):
        fit(model, pruning, look, epochs=2)
    first, second = (np.abs(found["dense0"]).sum(0) for found in look.pruned)
    returned = (first == 0) & ~np.isin(Channels(model).groups[0].units, pruning.removed)
    assert returned.sum() == 4 and (second[returned] == 0).all()
    assert ((np.abs(array(model.get_layer("dense0").kernel)).sum(0) > 0)[returned] == (shift > 0)).all()


@pytest.mark.parametrize("criterion", sorted(criteria.CRITERIA))
def test_every_criterion_drops_filters(criterion):
    model = perceptron()
    labelled = criterion in criteria.LABELLED
    pruning = DropPruning(
        0.4,
        kind="filters",
        criterion=criterion,
        data=(FLAT[:64], Y[:64]) if labelled else FLAT[:64],
        measure="units",
        round_to=1,
        stop=2,
        seed=0,
    )
    history = fit(model, pruning, epochs=3)
    assert history["dropped"][0] > 0 and units_of(model) == set(pruning.removed.tolist())
    assert history["sparsity"][-1] == pytest.approx(0.4, abs=0.05)


def test_the_least_important_are_dropped_by_the_criterion_and_protected_layers_are_not():
    model = perceptron("sgd")
    kernel = model.get_layer("dense0").kernel
    kernel.assign(array(kernel) * np.where(np.arange(16) < 4, 1e-3, 1))
    pruning = DropPruning(0.3, kind="filters", drop_out=1.0, drop_in=0.0, protect="dense1", round_to=1, stop=5)
    with pytest.warns(UserWarning, match="will not be reached"):
        fit(model, pruning, epochs=1)
    assert np.array_equal((array(kernel) == 0).all(0), np.arange(16) < 4)  # floor(0.3 * 16)
    assert (array(model.get_layer("dense1").kernel) != 0).any(0).all()


def test_units_that_an_earlier_training_removed_do_not_return():
    model = perceptron()
    fit(model, first := DropPruning(0.3, kind="filters", round_to=1, seed=0), epochs=3)
    before = set(first.removed.tolist())
    fit(model, second := DropPruning(0.6, kind="filters", round_to=1, drop_in=0.9, stop=3, seed=1), epochs=4)
    assert before and before < set(second.removed.tolist()) == units_of(model)


def test_a_training_that_stops_early_keeps_what_is_gone_then():
    model = perceptron()
    pruning = DropPruning(0.5, kind="filters", round_to=1, stop=6, seed=0)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 2))
    fit(model, pruning, stop, epochs=9)
    assert len(pruning.removed) > 3 and units_of(model) == set(pruning.removed.tolist())


# -- resumed, and refused --------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def run(folder, kind, kill=None, remember=True):
    """Checksums of the kernels after each epoch, of a process that begins with nothing but the backup."""
    model, found = perceptron(), []

    def end(epoch, logs):
        found.append([zlib.crc32(value.tobytes()) for value in kernels(model).values()])

    def begin(epoch, logs):
        if epoch == kill:
            raise Killed

    pruning = DropPruning(
        0.5,
        kind=kind,
        round_to=8 if kind == "weights" else 1,
        stop=6,
        seed=0,
        path=folder / "values.npz" if remember else None,
    )
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    try:  # killed after it has pruned in that epoch, which the backup knows nothing of
        fit(model, backup, pruning, keras.callbacks.LambdaCallback(begin, end), epochs=8)
    except Killed:
        assert kill is not None
    return found


@pytest.mark.parametrize("kind", ["weights", "filters"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kind):
    folders = [tmp_path / name for name in ("whole", "killed", "late", "forgot")]
    for folder in folders:
        folder.mkdir()
    whole = run(folders[0], kind)
    assert run(folders[1], kind, kill=3) == whole[:3] and len(whole) == 8
    assert run(folders[1], kind) == whole[3:]
    assert run(folders[2], kind, kill=7) == whole[:7]  # after the last step
    assert run(folders[2], kind) == whole[7:]
    run(folders[3], kind, kill=3, remember=False)
    assert run(folders[3], kind, remember=False) != whole[3:]  # the control: what returns is zero


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "values.npz"
    fit(perceptron(), DropPruning(0.5, stop=2, path=path, seed=0), epochs=3)
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(compiled(), DropPruning(0.5, stop=4, path=path), epochs=5, initial_epoch=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "To keep 20 % write sparsity=0.8"),
        (dict(kind="channels"), "'weights', 'filters'"),
        (dict(revive="old"), "'value', 'zero'"),
        (dict(unimportant=0), "unimportant=0"),
        (dict(unimportant=1.0), "unimportant=1.0"),
        (dict(drop_out=1.2), "drop_out=1.2"),
        (dict(drop_in=-0.1), "drop_in=-0.1"),
        (dict(criterion="fpgm"), "scores whole units"),
        (dict(criterion="l3"), "Known: .*bn_scale"),
        (dict(budget="error_bound"), "for weights: 'uniform', 'global'"),
        (dict(measure="params"), "for kind='filters'"),
        (dict(every=0), "every=0"),
        (dict(path="/nowhere/at/all.npz"), "does not exist"),
    ],
)
def test_bad_arguments_fail_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        DropPruning(**arguments)


def test_batches_of_unknown_number_ask_for_stop():
    def endless():
        while True:
            yield FLAT[:32], Y[:32]

    with pytest.raises(ValueError, match="DropPruning counts batches"):
        perceptron().fit(endless(), epochs=1, verbose=0, callbacks=[DropPruning(unit="batch")])


def test_steps_may_be_batches():
    model = perceptron()
    history = fit(model, DropPruning(0.6, unit="batch", every=2, stop=9, seed=0), epochs=3)  # 4 batches an epoch
    assert 0 < history["weight_sparsity"][0] < 0.6 and sum(history["revived"][:2]) > 0
    assert all(z.sum() == count_of(0.6, z.size) for z in zeros(model).values())
