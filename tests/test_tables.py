"""Latency tables against a device whose times can be worked out from the file."""

import json
import math

import keras
import numpy as np
import pytest
from keras import layers
from test_export_zoo import ZOO, convnet, randomised

if keras.backend.backend() != "tensorflow":
    pytest.skip("tflite_export converts on Keras's TensorFlow backend only", allow_module_level=True)

from keras_prune import Channels, plan
from keras_prune.surgery import cut
from tflite_export import flatbuffer, tables, to_tflite
from tflite_export.devices import Device
from tflite_export.tables import LatencyTable


class Staircase(Device):
    """Computes whole blocks of channels, and a little for each operator; a whole file takes a bit more or less."""

    name = "staircase"

    def __init__(self, stair=8, per_file=0.002, unable=(), number=1):
        self.stair, self.per_file, self.unable, self.number = stair, per_file, unable, number
        self.files = []

    def identity(self):
        return f"staircase {self.stair}, number {self.number}"

    def examine(self, model):
        raise AssertionError("a table asks for milliseconds")

    def milliseconds(self, files):
        self.files += files
        return [self.time(content) for content in files]

    def time(self, content):
        model = flatbuffer.unpacked(content)
        names, graph = flatbuffer.operator_names(model.operatorCodes), model.subgraphs[0]
        total = self.per_file
        for operator in graph.operators:
            name = names[operator.opcodeIndex]
            if name in self.unable:
                raise ValueError(f"no {name} here")
            shapes = [[int(n) for n in graph.tensors[t].shape] for t in [*operator.inputs, *operator.outputs] if t >= 0]
            out = shapes[-1]
            blocks = math.prod(out[:-1]) * self._up(out[-1])
            if name in ("CONV_2D", "FULLY_CONNECTED"):
                blocks *= self._up(shapes[1][-1]) * math.prod(shapes[1][1:-1])
            total += 0.01 + 2e-6 * blocks
        return total

    def _up(self, channels):
        return math.ceil(channels / self.stair) * self.stair


def network(*widths, size=12):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((size, size, 3))
    for width in widths:
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def table_of(model, device=None, **options):
    table = LatencyTable(device or Staircase(), model, **{"cache": False, **options})
    return table, Channels(model)


def random_units(channels, seed):
    random = np.random.default_rng(seed)
    return np.concatenate([random.choice(g.units, random.integers(0, len(g)), replace=False) for g in channels.groups])


@pytest.mark.parametrize(("stair", "widths"), [(8, (64, 48, 96)), (16, (32, 32, 32))])
def test_predictions_are_those_of_converted_cut_models_within_three_per_cent(stair, widths):
    model = network(*widths)
    table, channels = table_of(model, device := Staircase(stair))
    table(channels)
    for seed in range(5):
        removed = random_units(channels, seed)
        true = device.time(to_tflite(cut(channels, removed)))
        assert table(channels, removed) == pytest.approx(true, rel=0.03)
    assert table.error < 0.03


def test_residual_and_depthwise_networks_are_predicted_too():
    model = convnet(width=32)
    table, channels = table_of(model, device := Staircase())
    removed = random_units(channels, 0)
    true = device.time(to_tflite(cut(channels, removed)))
    assert table(channels, removed) == pytest.approx(true, rel=0.03)
    assert table(channels, removed) < 0.97 * table(channels)


def test_widths_of_one_stair_cost_the_same():
    table, channels = table_of(network(64, 32))
    units = channels.groups[0].units
    times = {kept: table(channels, units[kept:]) for kept in (56, 57, 61, 64)}
    assert times[57] == times[61] == times[64] > times[56]


def test_more_points_than_are_timed_are_read_off_between():
    model = network(256, 8, size=4)
    table, channels = table_of(model, device := Staircase())
    removed = channels.groups[0].units[8 * 13 :]
    assert table(channels, removed) == pytest.approx(device.time(to_tflite(cut(channels, removed))), rel=0.03)
    assert max(curve.times.size for curve in table._curves) <= tables.WIDTHS * tables.INPUTS


def test_the_factors_of_the_fit_are_found_and_none_is_negative():
    random = np.random.default_rng(0)
    sums = random.uniform(1, 3, (40, 3))
    factors, offset = tables._factors(sums, sums @ [0.5, 1.0, 2.0] + 0.3)
    assert [*factors, offset] == pytest.approx([0.5, 1.0, 2.0, 0.3], rel=0.25)
    factors, offset = tables._factors(sums, sums @ [1.0, 1.0, -0.3])
    assert (factors >= 0).all() and offset >= 0


def test_a_second_table_times_nothing_and_another_device_times_all(tmp_path):
    model = network(16, 16)
    first, second, other = Staircase(), Staircase(), Staircase(number=2)
    channels = Channels(model)
    found = [LatencyTable(d, model, cache=tmp_path)(channels) for d in (first, second, other)]
    assert len(first.files) == len(other.files) > 10 and not second.files
    assert found[0] == found[1]
    assert len(list(tmp_path.glob("*.json"))) == 2 == len(list(tmp_path.iterdir()))


def test_equal_operators_are_timed_once():
    table, channels = table_of(network(16, 16, 16, 16), device := Staircase())
    table(channels)
    prints = [flatbuffer.fingerprint(content) for content in device.files]
    assert len(prints) == len(set(prints))


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"milliseconds": 3}', '{"milliseconds": {"a": "b"}}', "\x00\xff"])
def test_a_damaged_cache_is_timed_again(tmp_path, damage):
    model, device = network(16), Staircase()
    expected = LatencyTable(device, model, cache=tmp_path)(Channels(model))
    [path] = tmp_path.iterdir()
    path.write_text(damage)
    assert LatencyTable(device, model, cache=tmp_path)(Channels(model)) == expected
    assert json.loads(path.read_text())["device"] == device.identity()


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    model, device = network(16), Staircase()
    table = LatencyTable(device, model, cache=tmp_path)
    path = tables._cache_file(device.identity(), tmp_path)
    path.write_text(json.dumps({"device": "", "milliseconds": {"theirs": 1.5, "none": None}}))
    table(Channels(model))
    stored = json.loads(path.read_text())["milliseconds"]
    assert stored["theirs"] == 1.5 and stored["none"] is None and len(stored) > 5


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = network(16)
    LatencyTable(Staircase(), model, cache=False)(Channels(model))
    assert not list(tmp_path.iterdir())
    LatencyTable(Staircase(), model)(Channels(model))
    assert len(list((tmp_path / "tflite_export").iterdir())) == 1


def test_operators_without_a_latency_count_as_nothing_and_are_named():
    class Partly(Staircase):
        def milliseconds(self, files):
            alone = [len(flatbuffer.unpacked(content).subgraphs[0].operators) == 1 for content in files]
            if any(a and "MEAN" in flatbuffer.operators(c) for a, c in zip(alone, files)):
                raise ValueError("a mean alone does not run here")
            return super().milliseconds(files)

    table, channels = table_of(network(32, 32), device := Partly())
    removed = channels.groups[0].units[8:]
    assert table(channels, removed) == pytest.approx(device.time(to_tflite(cut(channels, removed))), rel=0.05)
    assert table.untimed == ("MEAN",) and "not timed" in str(table)


def test_a_device_that_cannot_run_the_network_is_an_error_that_names_it():
    table, channels = table_of(network(16), Staircase(unable=("MEAN",)))
    with pytest.raises(ValueError, match="'staircase' has no latency for this network as float32: MEAN"):
        table(channels)


@pytest.mark.parametrize("device", ["micro", "edgetpu"])
def test_devices_without_a_latency_are_an_error(device):
    model = network(16)
    with pytest.raises(ValueError, match=f"{device}.*no latency"):
        LatencyTable(device, model, cache=False)(Channels(model))


class Noisy(Staircase):
    """The first time that it is asked for a file, something else runs."""

    is_measured = True

    def milliseconds(self, files):
        random, before = np.random.default_rng(len(self.files)), {flatbuffer.fingerprint(c) for c in self.files}
        times = zip(files, super().milliseconds(files))
        return [t if flatbuffer.fingerprint(c) in before else t * random.uniform(1, 4) for c, t in times]


def test_disturbed_timings_are_repeated_once():
    quiet, noisy = Staircase(), Noisy()
    model = network(32, 32, 32, 32)
    table_of(model, quiet)[0](Channels(model))
    table, channels = table_of(model, noisy)
    table(channels)
    assert len(noisy.files) >= 2 * len(quiet.files)
    assert len(noisy.files) <= 2 * len(quiet.files) + 60  # equal files are timed again
    again = len(noisy.files)
    table(channels, channels.groups[0].units[:8])
    assert len(noisy.files) == again
    assert table(channels) == pytest.approx(quiet.time(to_tflite(model)), rel=0.05)


def test_estimates_are_never_repeated():
    class Wild(Staircase):
        def time(self, content):
            return super().time(content) * (1 + int(flatbuffer.fingerprint(content)[:2], 16) / 100)

    table, channels = table_of(network(32, 32), device := Wild())
    table(channels)
    prints = [flatbuffer.fingerprint(content) for content in device.files]
    assert table.error > tables.NOISY and len(prints) == len(set(prints))


class Better(Staircase):
    """Whole files of few blocks take twice as long as their operators say: caches, say."""

    def time(self, content):
        time = super().time(content)
        return time if len(flatbuffer.unpacked(content).subgraphs[0].operators) < 3 or time > 0.5 else 2 * time


def test_refine_corrects_the_prediction_at_these_widths():
    model = network(64, 64)
    table, channels = table_of(model, device := Better())
    removed = np.concatenate([g.units[16:] for g in channels.groups])
    true = device.time(to_tflite(cut(channels, removed)))
    before, whole = table(channels, removed), table(channels)
    ratio = table.refine(channels, removed)
    assert abs(before / true - 1) > 0.01 and ratio == pytest.approx(true / before)
    assert table(channels, removed) == pytest.approx(true) and table(channels) == pytest.approx(whole)
    assert table.refine(channels, removed) == pytest.approx(1)


def test_widths_that_the_device_cannot_run_leave_the_prediction_as_it_is():
    class Picky(Staircase):
        is_picky = False

        def milliseconds(self, files):
            if self.is_picky:
                raise ValueError("not this one")
            return super().milliseconds(files)

    table, channels = table_of(network(32), device := Picky())
    removed = channels.groups[0].units[11:]
    before = table(channels, removed)
    device.is_picky = True
    assert table.refine(channels, removed) == 1.0 and table(channels, removed) == before


def test_a_table_is_of_one_model():
    table, _ = table_of(network(16))
    with pytest.raises(ValueError, match="Make one for each model"):
        table(Channels(network(16)))


def test_a_loop_has_no_latency_table():
    table, channels = table_of(ZOO["recurrent"]())
    with pytest.raises(ValueError, match="unroll=True"):
        table(channels)


def test_where_the_widths_cannot_be_followed_the_rest_is_counted_and_said():
    inputs = keras.Input((8, 16))
    x = layers.Dense(64, activation="relu")(inputs)
    x = layers.Dense(16)(x) + layers.MultiHeadAttention(4, 8)(inputs, inputs)
    model = randomised(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    table, channels = table_of(model)
    [group] = [g for g in channels.groups if len(g) == 64]
    assert table(channels, group.units[8:]) < table(channels)
    assert math.isnan(table.error) and "counted at full width" in str(table)
    assert table.refine(channels, group.units[8:]) == 1.0


def test_the_slowest_operator_comes_first_and_the_table_prints_itself():
    table, channels = table_of(network(8, 64, 8))
    assert "not yet" in str(table)
    rows = table.operators(channels)
    assert [ms for *_, ms in rows] == sorted((ms for *_, ms in rows), reverse=True)
    assert rows[0][0] == "CONV_2D" and sum(ms for *_, ms in rows) <= table(channels) * 1.001
    assert "staircase 8" in str(table) and "%" in str(table)


def test_on_this_cpu_a_small_network_is_timed_and_planned():
    model = network(16, 16, size=6)
    from tflite_export.devices import Cpu

    table = LatencyTable(Cpu(rounds=1, block_ms=0.1), model, cache=False)
    decision = plan(model, 0.2, measure=table)
    assert decision.totals["latency_ms"][0] > 0 and len(decision.removed)


def test_vela_is_predicted_within_ten_per_cent():
    pytest.importorskip("ethosu.vela")
    model = network(48, 64, 64, size=16)
    data = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
    table, channels = table_of(model, "ethos-u55-128", recipe="int8", data=data)
    ratios = []
    for seed in range(3):
        removed = random_units(channels, seed)
        true = table.device.milliseconds([to_tflite(cut(channels, removed), "int8", data)])[0]
        ratios.append(abs(table(channels, removed) / true - 1))
    assert np.median(ratios) < 0.1 and table.error < 0.1
