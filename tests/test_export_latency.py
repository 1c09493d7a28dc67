"""Times are plausible and ordered; nothing here depends on how fast or busy the machine is."""

import json

import keras
import pytest
from keras import layers
from test_export_zoo import convnet, images

import tflite_export as te


def wide(width):
    x = inputs = keras.Input((24, 24, 8))
    for _ in range(2):
        x = layers.Conv2D(width, 3, padding="same")(x)
    return te.to_tflite(keras.Model(inputs, x))


def test_a_four_times_wider_net_takes_longer():
    result = te.benchmark(wide(16), wide(64), runs=20)
    assert result.ratio > 1.5 and result.ratio_p10 <= result.ratio <= result.ratio_p90
    assert result.a.median < result.b.median and result.rounds == 20
    assert te.benchmark(wide(64), wide(16), runs=20).ratio < 1 / 1.5  # b / a, not a / b


def test_latency_is_ordered_and_says_where_it_was_measured():
    result = te.measure_latency(te.to_tflite(convnet(), batch_size=2), threads=2, runs=7)
    assert 0 < result.p10 <= result.median <= result.p90
    assert (result.runs, result.threads, result.batch_size) == (7, 2, 2)
    assert result.cpu and "litert" in result.runtime and "XNNPACK" in result.delegate
    assert str(result.runs) in str(result) and json.loads(result.to_json())["median"] == result.median


def test_int16_is_not_delegated():
    content = te.to_tflite(convnet(), "int16x8", images(4))
    assert te.measure_latency(content, runs=1).delegate == "none"


def test_the_time_limit_ends_a_measurement_early():
    content = wide(16)
    assert te.measure_latency(content, runs=100000, max_seconds=0.0).runs == 3
    assert te.benchmark(content, content, runs=100000, max_seconds=0.0).rounds == 3


@pytest.mark.parametrize("runs", [0, -3, 1.5, True])
def test_runs_is_a_whole_number_from_one(runs):
    content = te.to_tflite(convnet())
    with pytest.raises(ValueError, match="runs="):
        te.measure_latency(content, runs=runs)
    with pytest.raises(ValueError, match="runs="):
        te.benchmark(content, content, runs=runs)
