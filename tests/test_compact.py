import io
import os
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from keras_prune import compact
from keras_prune.compact import CompactReport, save_compact

PERCENT = (0, 50, 90)


def lenet(sparsity=0.0, seed=0):
    """Dense 20-64-32-5 of which the smallest weights of each kernel are zero; a Dropout, an integer weight, halves."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((20, 8)),
            layers.Normalization(),
            layers.Flatten(),
            layers.Dense(64, "relu", name="first"),
            layers.Dropout(0.2),
            layers.Dense(64, "relu", dtype="mixed_float16"),
            layers.Dense(5, dtype="bfloat16"),
        ]
    )
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            value = keras.ops.convert_to_numpy(layer.kernel).copy()
            smallest = np.argsort(np.abs(value.ravel()), kind="stable")[: round(sparsity * value.size)]
            value.reshape(-1)[smallest] = 0
            layer.kernel.assign(value)
    return model


def bits(model):
    """Every weight as bytes, by place."""
    return [np.ascontiguousarray(keras.ops.convert_to_numpy(v)).tobytes() for v in model.weights]


def inside(path):
    """{name of a dataset: its bytes} of the weights in a .keras file."""
    found = {}
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
        file.visititems(
            lambda name, item: found.__setitem__(name, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
        )
    return found


@pytest.mark.parametrize("percent", PERCENT)
def test_plain_keras_reads_every_bit_back(tmp_path, percent):
    model = lenet(percent / 100)
    minus = keras.ops.convert_to_numpy(model.get_layer("first").kernel).copy()
    minus[0, :] = -0.0  # a sign that equality does not see
    model.get_layer("first").kernel.assign(minus)
    save_compact(model, tmp_path / "a.keras")
    back = keras.saving.load_model(tmp_path / "a.keras")
    assert bits(back) == bits(model)
    x = np.random.default_rng(0).normal(size=(4, 20, 8)).astype("float32")
    assert np.array_equal(*(keras.ops.convert_to_numpy(m(x, training=False)).astype("float32") for m in (model, back)))
    value = keras.ops.convert_to_numpy(back.get_layer("first").kernel).copy()
    value.reshape(-1)[7] = np.nextafter(value.reshape(-1)[7], np.float32(9))
    back.get_layer("first").kernel.assign(value)
    assert bits(back) != bits(model)  # the control: one bit is seen


def test_it_is_the_same_file_with_its_members_deflated(tmp_path):
    model = lenet(0.9)
    model.save(tmp_path / "plain.keras")
    report = save_compact(model, tmp_path / "a.keras")
    assert inside(tmp_path / "plain.keras") == inside(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "plain.keras") as plain, zipfile.ZipFile(tmp_path / "a.keras") as small:
        assert plain.namelist() == small.namelist() and small.testzip() is None
        assert {m.compress_type for m in small.infolist()} == {zipfile.ZIP_DEFLATED}
        assert {m.compress_type for m in plain.infolist()} == {zipfile.ZIP_STORED}  # or nothing would be gained
    assert report.compact == os.path.getsize(tmp_path / "a.keras")
    assert report.dense == pytest.approx(os.path.getsize(tmp_path / "plain.keras"), abs=64)


def test_zeros_cost_next_to_nothing_and_the_report_counts_them(tmp_path):
    reports = {p: save_compact(lenet(p / 100), tmp_path / "a.keras") for p in (*PERCENT, 99)}
    sizes = [reports[p].compact for p in sorted(reports)]
    assert sizes == sorted(sizes, reverse=True) and reports[0].ratio > 0.6
    assert reports[90].ratio < 0.35 and reports[99].ratio < reports[90].ratio
    model, report = lenet(0.9), reports[90]
    counts = [
        (w.size, np.count_nonzero(w), 8 * w.dtype.itemsize) for w in map(keras.ops.convert_to_numpy, model.weights)
    ]
    n, kept = sum(c[0] for c in counts), sum(c[1] for c in counts)
    assert report.numbers == n and report.nonzero == pytest.approx(kept / n)
    needed = 0.0
    for size, k, width in counts:  # log2 of the number of ways to choose the places, and the numbers themselves
        d = k / size
        needed += k * width + (size * (-d * np.log2(d) - (1 - d) * np.log2(1 - d)) if 0 < d < 1 else 0)
    assert report.information == pytest.approx(needed / 8)
    assert f"{report.compact:,}" in str(report) and f"{report.dense:,}" in str(report) and "%" in str(report)
    with pytest.raises(AttributeError):
        report.compact = 0


def test_the_optimizer_stays_out_unless_asked_for(tmp_path):
    model = keras.Sequential([keras.Input((20,)), layers.Dense(64, "relu"), layers.Dense(64), layers.Dense(3)])
    model.compile("adam", "mse")
    model.fit(np.ones((64, 20)), np.ones((64, 3)), verbose=0)
    without = save_compact(model, tmp_path / "a.keras")
    back = keras.saving.load_model(tmp_path / "a.keras")
    assert not back.compiled and bits(back) == bits(model)
    model.save(tmp_path / "plain.keras")
    whole = save_compact(model, tmp_path / "b.keras", optimizer=True)
    assert whole.dense == os.path.getsize(tmp_path / "plain.keras") > 2 * without.dense
    assert inside(tmp_path / "plain.keras") == inside(tmp_path / "b.keras")
    back = keras.saving.load_model(tmp_path / "b.keras")
    slots = [[keras.ops.convert_to_numpy(v) for v in m.optimizer.variables] for m in (model, back)]
    assert len(slots[0]) == 14 and all(np.array_equal(a, b) for a, b in zip(*slots))
    assert model.compiled and int(model.optimizer.iterations) == 2  # the model itself is as it was


@pytest.mark.parametrize("broken", ["_copy", "_content", "_check_loadable", "_drop_optimizer"])
def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, broken):
    target = tmp_path / "a.keras"
    save_compact(lenet(0.5), target)
    before = target.read_bytes()

    def fails(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(compact, broken, fails)
    model = lenet(0.9)
    model.compile("adam", "mse")
    with pytest.raises(OSError, match="no space"):
        save_compact(model, target)
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.keras"]
    monkeypatch.undo()
    assert save_compact(lenet(0.9), target).compact < len(before)  # the control: it is replaced where nothing fails
    assert os.listdir(tmp_path) == ["a.keras"]


def test_paths_that_cannot_be_written_and_levels_that_do_not_exist(tmp_path):
    model = lenet()
    with pytest.raises(ValueError, match="does not exist"):
        save_compact(model, tmp_path / "nowhere" / "a.keras")
    with pytest.raises(ValueError, match="ends so"):
        save_compact(model, tmp_path / "a.h5")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        save_compact(model, tmp_path / "folder.keras")
    for level in (0, 10, True, "9"):
        with pytest.raises(ValueError, match="level="):
            save_compact(model, tmp_path / "a.keras", level=level)
    assert os.listdir(tmp_path) == ["folder.keras"]


def test_a_file_that_keras_would_refuse_is_not_written(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((300,)), layers.Dense(300, kernel_initializer="zeros")])
    save_compact(model, tmp_path / "a.keras")
    monkeypatch.setattr(compact, "FLOOR", 2**18)  # 256 MiB otherwise
    with pytest.raises(ValueError, match="refuses to read"):
        save_compact(model, tmp_path / "b.keras")
    assert os.listdir(tmp_path) == ["a.keras"]


def test_kerass_own_limits_are_those_that_are_checked():
    from keras.src.saving import saving_lib

    assert (compact.FLOOR, compact.EXPANSION) == (
        saving_lib._ZIP_EXTRACT_BOMB_FLOOR_BYTES,
        saving_lib._ZIP_MEMBER_MAX_EXPANSION,
    )


def test_a_report_of_nothing_but_text():
    report = CompactReport("a.keras", 1000, 250, 200, 0.1, 200.0)
    assert report.ratio == 0.25 and report.over_information == 1.25
