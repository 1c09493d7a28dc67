"""Bytes of the file and of the arena, against the file that the cut model is converted to."""

import gc
import itertools
import weakref

import keras
import numpy as np
import pytest
from keras import layers
from test_export_zoo import ZOO, convnet

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

from keras_prune import Channels, metrics, plan
from keras_prune.surgery import cut
from tflite_export import to_tflite
from tflite_export.inputs import generate, model_inputs
from tflite_export.measures import ArenaBytes, FileBytes, _arena, arena_bytes, tflite_bytes


def network(*widths):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 16, 3))
    for width in widths:
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(x)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def removed_from(channels, seed):
    random = np.random.default_rng(seed)
    return np.concatenate([random.choice(g.units, random.integers(1, len(g)), replace=False) for g in channels.groups])


@pytest.mark.parametrize("recipe", ["float32", "float16", "int8"])
def test_bytes_are_those_of_the_converted_cut_model(recipe):
    model = network(48, 64, 64)
    measure, channels = FileBytes(model, recipe), Channels(model)
    data = generate(model_inputs(model), 8)
    assert measure(channels) == len(to_tflite(model, recipe, data))
    for seed in range(3):
        removed = removed_from(channels, seed)
        true = len(to_tflite(cut(channels, removed), recipe, data))
        assert measure(channels, removed) == pytest.approx(true, rel=0.01 if recipe == "float32" else 0.03)
        assert measure(channels, removed) < 0.95 * measure(channels)


def test_bytes_that_are_dequantised_in_the_file_are_counted_as_they_are_stored():
    model = network(64, 64)
    channels = Channels(model)
    half, whole = (FileBytes(model, recipe)(channels) for recipe in ("float16", "float32"))
    assert half < 0.6 * whole


def peak(tensors, order):
    """What placing in this order needs: each at the lowest place that is free while it is needed."""
    placed = []
    for k in order:
        size, made, used = tensors[k]
        taken = [(b, e) for b, e, m, u in placed if not (used < m or u < made)]
        begin = next(b for b in sorted([0, *(e for _, e in taken)]) if all(b + size <= x or b >= e for x, e in taken))
        placed.append((begin, begin + size, made, used))
    return max(end for _, end, _, _ in placed)


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ([], 0),
        ([(1, 0, 0)], 16),
        ([(16, 0, 1), (16, 1, 2)], 32),  # both while operator 1 runs
        ([(16, 0, 1), (16, 2, 3)], 16),
        ([(32, 0, 3), (64, 0, 1), (48, 2, 3)], 96),  # the later one takes the place of the earlier
        ([(64, 0, 9), (32, 0, 1), (32, 2, 3), (16, 1, 2)], 112),
    ],
)
def test_arenas_worked_out_by_hand(tensors, size):
    assert _arena(tensors) == size


def test_the_arena_is_that_of_placing_the_largest_first_and_never_below_the_peak():
    random, worse = np.random.default_rng(0), 0
    for _ in range(60):
        made = random.integers(0, 6, 5)
        found = [
            (int(16 * s), int(m), int(m + d))
            for s, m, d in zip(random.integers(1, 9, 5), made, random.integers(0, 4, 5))
        ]
        size = _arena(found)
        best = min(peak(found, order) for order in itertools.permutations(range(5)))
        assert size >= best >= max(sum(s for s, m, u in found if m <= t <= u) for t in range(10))
        assert size == peak(found, sorted(range(5), key=lambda k: (-found[k][0], -k)))  # of equal ones the last first
        worse += size > best
    assert worse < 30


def test_without_the_runtime_the_tensors_alone_are_counted(monkeypatch):
    from tflite_export.devices import Micro

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(Micro, "examine", missing)
    model = network(16, 32)
    measure, channels = ArenaBytes(model, "int8"), Channels(model)
    assert measure(channels) == 16 * 16 * (16 + 32) and measure.beside == 0
    assert measure(channels, channels.groups[1].units[8:]) == 16 * 16 * (16 + 8)


def test_the_arena_is_the_one_that_the_runtime_measures():
    pytest.importorskip("tflite_micro")
    from tflite_export.devices import get

    model = network(32, 48, 32)
    measure, channels = ArenaBytes(model, "int8"), Channels(model)
    data = generate(model_inputs(model), 8)
    micro = get("micro")
    assert measure(channels) == micro.examine(to_tflite(model, "int8", data)).sram_bytes
    for seed in range(2):
        removed = removed_from(channels, seed)
        true = micro.examine(to_tflite(cut(channels, removed), "int8", data)).sram_bytes
        assert measure(channels, removed) == pytest.approx(true, rel=0.05)


def test_measures_are_found_by_name_and_unknown_names_list_them():
    model = network(16)
    channels = Channels(model)
    assert metrics.get("tflite_bytes")(channels, ()) == FileBytes(model)(channels) == tflite_bytes(channels)
    assert metrics.get("arena_bytes")(channels, ()) == arena_bytes(channels) > 0
    assert metrics.get("latency_ms").__name__ == "latency_ms"
    with pytest.raises(ValueError, match="arena_bytes, latency_ms, macs, memory, params, tflite_bytes, units"):
        metrics.get("bytes")


def test_a_network_within_a_flash_size_and_an_arena():
    model = network(48, 64)
    calibration = generate(model_inputs(model), 8)
    for first in ("tflite_bytes", FileBytes(model, "int8")):  # either of the two may be the one that binds
        other = FileBytes(model, "int8") if first == "tflite_bytes" else "tflite_bytes"
        decision = plan(model, target={first: 60_000 if first == "tflite_bytes" else 15_000, other: 1e6})
        size = len(to_tflite(decision.cut(), *(() if first == "tflite_bytes" else ("int8", calibration))))
        assert size <= (60_000 if first == "tflite_bytes" else 15_400)


def test_a_named_measure_is_worked_out_once_for_each_model_and_forgotten_with_it(monkeypatch):
    from tflite_export import measures

    calls = []
    monkeypatch.setattr(measures, "to_tflite", lambda *a, **k: calls.append(1) or to_tflite(*a, **k))
    channels = Channels(network(16))
    tflite_bytes(channels)
    tflite_bytes(channels, channels.groups[0].units[8:])
    assert calls == [1]
    gone = weakref.ref(channels)
    del channels
    gc.collect()
    assert gone() is None


def test_calibration_data_and_open_sizes_are_passed_on():
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu")(inputs))
    model = keras.Model(inputs, layers.Dense(4)(x))
    channels = Channels(model)
    with pytest.raises(ValueError, match="input_shape"):
        FileBytes(model)(channels)
    small, large = (ArenaBytes(model, "int8", input_shape=(n, n, 3))(channels) for n in (8, 16))
    assert large > 2 * small
    assert FileBytes(model, "int8", np.zeros((4, 8, 8, 3), "float32"), input_shape=(8, 8, 3))(channels) > 1000


@pytest.mark.parametrize("name", ["attention", "embedding", "many_layers", "mixed_precision"])
def test_measures_work_for_networks_of_other_layers(name):
    model = ZOO[name]()
    channels = Channels(model)
    if not channels.groups:
        assert FileBytes(model)(channels) == len(to_tflite(model))
        return
    measure, removed = FileBytes(model), removed_from(channels, 0)
    true = len(to_tflite(cut(channels, removed)))
    found = measure(channels, removed)
    if measure.blueprint.fixed:  # these are counted at full width
        assert true < found < measure(channels)
    else:
        assert found == pytest.approx(true, rel=0.02)


def test_another_model_is_an_error():
    with pytest.raises(ValueError, match="FileBytes was made for the model"):
        FileBytes(convnet())(Channels(network(16)))
