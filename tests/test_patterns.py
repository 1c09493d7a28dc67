import doctest
import math
import zlib

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns as pictures

from keras_prune import Channels, PatternPruning, WeightPruning, patterns, release, schedules
from keras_prune.entries import kernels_of
from keras_prune.patterns import ck, neighbours, window
from keras_prune.pruners import KeepZeros

X, Y = pictures(128)
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
}


def convolutional(optimizer="adam", seed=0):
    """Five kinds of convolution kernels and a classifier."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((12, 12, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, 2, name="first")(inputs)))
    x = layers.Conv2D(12, 3, activation="relu", name="second")(x)
    x = layers.Conv2D(8, 1, activation="relu", name="point")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="deep")(x)
    x = layers.Conv2DTranspose(8, 3, activation="relu", name="up")(x)
    model = keras.Model(inputs, layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)  # quicker to build
    return model


def fit(model, *callbacks, epochs=4):
    return model.fit(X, Y, epochs=epochs, batch_size=32, verbose=0, shuffle=False, callbacks=list(callbacks)).history


def array(variable):
    return keras.ops.convert_to_numpy(variable)


def stays(model):
    """{kernel: where it is not zero, shape (taps, channels, filters)}."""
    found = {}
    for name, variable in kernels_of(Channels(model)).items():
        value = array(variable) != 0
        value = value.reshape(-1, *value.shape[-2:])
        found[name] = value.swapaxes(1, 2) if name == "up" else value
    return found


class Masks(keras.callbacks.Callback):
    """A checksum of all zeros, and their fraction by kernel, at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.sums, self.zeros, self.weights = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        found = stays(self.model)
        self.zeros.append({name: ~kept for name, kept in found.items()})
        self.sums.append(zlib.crc32(b"".join(np.packbits(kept).tobytes() for kept in found.values())))
        self.weights.append(zlib.crc32(array(self.model.get_layer("second").kernel).tobytes()))


# -- the patterns ----------------------------------------------------------------------------------------------------

SLICE = np.array([[0.9, -0.1, 0.05], [0.4, -0.8, 0.3], [0.02, 0.6, -0.2]])


@pytest.mark.parametrize(
    "keep, expected",
    [(3, [[1, 0, 0], [0, 1, 0], [0, 1, 0]]), (5, [[1, 0, 0], [1, 1, 1], [0, 1, 0]]), (9, np.ones((3, 3)))],
)
def test_a_window_keeps_the_largest_taps_of_a_slice_worked_out_by_hand(keep, expected):
    assert np.array_equal(window(np.abs(SLICE).reshape(9, 1, 1), keep).reshape(3, 3), expected)
    assert not np.array_equal(window(SLICE.reshape(9, 1, 1), keep).reshape(3, 3), expected) or keep == 9  # the signs


def test_whole_slices_worked_out_by_hand():
    largest = np.array([[1.73, 1.43], [2.07, 1.65], [1.54, 2.35], [1.94, 2.06]])
    sizes = np.stack([largest, 0.9 * largest[::-1, ::-1].clip(max=1.4)])  # a smaller second tap changes nothing
    kept = ck(sizes, 0.5)
    assert {(int(c), int(k)) for c, k in np.argwhere(kept[0])} == {(1, 0), (2, 1), (3, 0), (3, 1)}
    assert np.array_equal(kept[0], kept[1])
    per_filter, per_channel = ck(sizes, 0.5, scope="filter")[0], ck(sizes, 0.5, scope="channel")[0]
    assert np.array_equal(per_filter, [[0, 0], [1, 0], [0, 1], [1, 1]])
    assert np.array_equal(per_channel, [[1, 0], [1, 0], [0, 1], [0, 1]])
    assert ck(sizes, 0.51).sum() == 2 * 5  # the ceiling


@pytest.mark.parametrize("scope", ["layer", "filter", "channel"])
@pytest.mark.parametrize("criterion", ["linf", "l1", "l2"])
def test_slices_are_those_of_a_slow_loop(scope, criterion):
    sizes = np.abs(np.random.default_rng(0).normal(size=(9, 6, 10)))
    norm = {"linf": np.max, "l1": np.sum, "l2": np.linalg.norm}[criterion]
    scores = {(c, k): norm(sizes[:, c, k]) for c in range(6) for k in range(10)}
    expected = np.zeros((6, 10), bool)
    for part in {"layer": [slice(None)], "filter": range(10), "channel": range(6)}[scope]:
        place = {"layer": None, "filter": 1, "channel": 0}[scope]
        among = [ck_ for ck_ in scores if place is None or ck_[place] == part]
        for c, k in sorted(among, key=scores.get)[-math.ceil(0.35 * len(among)) :]:
            expected[c, k] = True
    assert np.array_equal(ck(sizes, 0.35, criterion, scope)[4], expected)
    other = ck(sizes, 0.35, criterion, "filter" if scope != "filter" else "layer")[4]
    assert not np.array_equal(other, expected)


def test_equal_weights_leave_by_their_place_and_the_first_stay():
    assert np.array_equal(window(np.ones((9, 2, 3)), 4), np.broadcast_to(np.arange(9)[:, None, None] < 4, (9, 2, 3)))
    assert neighbours(np.ones((1, 8, 1)), 1, 4).ravel().tolist() == [True, False, False, False] * 2


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(patterns, extraglobs={"np": np})
    assert result.attempted >= 4 and result.failed == 0


def of_blocks(kept, of):
    taps, channels, filters = kept.shape
    return kept.reshape(taps, channels // of, of, filters).sum(axis=2)


@pytest.mark.parametrize("pattern", ["window", "ck", "combined", "2:4"])
def test_trained_kernels_have_exactly_the_pattern(pattern):
    model = convolutional()
    pruning = PatternPruning(None if pattern == "2:4" else 0.7, pattern=pattern, scope="filter")
    fit(model, pruning, epochs=5)
    found = stays(model)
    whole = {name for name, kept in found.items() if kept.all()}
    for name in found.keys() - whole:
        kept = found[name]
        taps, channels, filters = kept.shape
        slices = kept.any(axis=0)
        if pattern == "window":
            assert (kept.sum(axis=0) == 3).all()  # the nearest to 2.7
        if pattern == "ck":
            assert np.array_equal(kept.all(axis=0), slices) and (slices.sum(0) == math.ceil(0.3 * channels)).all()
        if pattern == "combined":
            of_taps = math.ceil(math.sqrt(0.3) * taps)
            assert (kept.sum(axis=0)[slices] == of_taps).all()
            assert (slices.sum(0) == math.ceil(0.3 * taps / of_taps * channels - 1e-9)).all()
        if pattern == "2:4":
            assert (of_blocks(kept, 4) == 2).all()
    expected = {"window": {"point", "head"}, "2:4": {"first"}}.get(pattern, {"head"})
    assert whole == set(pruning.whole) == expected
    assert pruning.fractions == {name: pytest.approx(1 - found[name].mean()) for name in found.keys() - whole}


def test_weights_pruned_by_magnitude_have_none_of_the_patterns():
    """The control of the test above."""
    model = convolutional()
    fit(model, WeightPruning(0.5), epochs=1)
    kept = stays(model)["second"]
    assert len(np.unique(kept.sum(axis=0))) > 3 and len(np.unique(of_blocks(kept, 4))) == 5
    assert not np.array_equal(kept.all(axis=0), kept.any(axis=0))


# -- the era ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["window", "ck", "combined", "2:4"])
def test_sparsity_only_rises_within_the_era_and_the_masks_are_frozen_afterwards(pattern):
    model, seen = convolutional(), Masks()
    history = fit(
        model, PatternPruning(None if ":" in pattern else 0.7, pattern=pattern, begin=1, stop=5), seen, epochs=8
    )
    assert not any(z.any() for z in seen.zeros[0].values())
    assert all((a[name] <= b[name]).all() for a, b in zip(seen.zeros, seen.zeros[1:]) for name in a)
    assert len(set(seen.sums[5:])) == 1 and len(set(seen.sums[:5])) >= 3  # frozen, and not before
    assert len(set(seen.weights)) == 8  # what is left goes on learning
    ramp = schedules.polynomial(0.0, 0.5 if ":" in pattern else 0.7, begin=1, stop=5)
    for epoch, zeros in enumerate(seen.zeros):
        taps, channels, filters = zeros["second"].shape
        step = {"window": 0.5 / taps, "ck": 1 / (channels * filters), "combined": 0.56 / taps, "2:4": 0.125}[pattern]
        assert abs(zeros["second"].mean() - ramp(epoch)) <= step + 1e-9
    pruned = [zeros for name, zeros in seen.zeros[-1].items() if zeros.any()]
    total = sum(z.size for z in pruned)
    assert history["weight_sparsity"][-1] == pytest.approx(sum(z.sum() for z in pruned) / total)


@pytest.mark.parametrize("pattern", ["window", "2:4"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_zeros_survive_any_optimizer_and_a_second_fit(optimizer, pattern):
    model, seen = convolutional(OPTIMIZERS[optimizer]()), Masks()
    fit(model, epochs=1)  # momenta are non-zero and a step function is cached before pruning begins
    fit(model, PatternPruning(pattern=pattern), seen, epochs=3)
    kernel = model.get_layer("second").kernel
    assert isinstance(kernel.constraint, KeepZeros)
    assert np.array_equal(array(kernel.constraint.mask) == 0, array(kernel) == 0)
    fit(model, seen, epochs=1)  # without the pruner
    assert seen.sums[-1] == seen.sums[-2] and seen.weights[-1] != seen.weights[-2]
    release(model)  # the control: without the masks they come back
    fit(model, seen, epochs=1)
    assert seen.zeros[-1]["second"].mean() < 0.5 * seen.zeros[-2]["second"].mean()


def test_zeros_hold_in_mixed_precision_and_a_saved_model_has_them(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = convolutional(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, PatternPruning(0.7), epochs=3)
    assert (stays(model)["second"].sum(axis=0) == 3).all()
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert all(np.array_equal(kept, stays(loaded)[name]) for name, kept in stays(model).items())


@pytest.mark.parametrize("kill", [2, 5])
def test_a_restored_run_goes_on_with_the_same_masks(tmp_path, kill):
    class Killed(Exception):
        pass

    def run(folder, kill=None):
        def begin(epoch, logs):
            if epoch == kill:
                raise Killed

        model, seen = convolutional(), Masks()
        backup = keras.callbacks.BackupAndRestore(folder)
        try:
            pruning = PatternPruning(0.7, pattern="combined", stop=4)
            fit(model, backup, pruning, seen, keras.callbacks.LambdaCallback(begin), epochs=6)
        except Killed:
            assert kill is not None
        return seen.sums

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "killed", kill) + run(tmp_path / "killed") == whole and len(set(whole)) > 3


# -- what can have a pattern -----------------------------------------------------------------------------------------


def test_protected_layers_and_kernels_that_are_no_convolutions_stay_whole():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 4))
    x = layers.Conv1D(4, 3, name="conv")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="heads")(x, x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.GRU(4, name="gru")(layers.Conv1D(4, 3)(x))))
    model.compile("sgd", "mse")
    pruning = PatternPruning(0.6, protect="conv")
    model.fit(np.ones((4, 8, 4)), np.ones((4, 2)), verbose=0, epochs=2, callbacks=[pruning])
    assert len(pruning.fractions) == 1 and "conv" not in pruning.fractions
    assert sum("gru" in n for n in pruning.whole) == 2 and sum("heads" in n for n in pruning.whole) == 4
    assert (array(model.get_layer("conv").kernel) != 0).all()


def test_a_model_without_such_kernels_says_so():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, name="only")])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="No kernel .* 'window': only"):
        model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0, callbacks=[PatternPruning(0.5)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity=1.5), "To keep 20 % write sparsity=0.8"),
        (dict(pattern="rows"), "'window', 'ck', 'combined', and 'n:m'"),
        (dict(pattern="4:4"), "n below m"),
        (dict(sparsity=0.5, pattern="2:4"), "leave out sparsity=0.5"),
        (dict(scope="group"), "'layer', 'filter', 'channel'"),
        (dict(criterion="fpgm"), "'l1', 'l2', 'linf'"),
        (dict(every=0), "every=0"),
    ],
)
def test_bad_arguments_fail_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatternPruning(**arguments)
