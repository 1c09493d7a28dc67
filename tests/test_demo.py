import json

import keras
import pytest
from PIL import Image

from keras_prune import demo, reports


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    said = []
    figures = demo.run(str(folder), epochs=4, tune_epochs=1, fraction=0.05, say=lambda text: said.append(str(text)))
    return folder, figures, "\n".join(said)


def test_the_demo_halves_the_macs_and_writes_everything_it_names(finished):
    folder, figures, said = finished
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "dense.keras",
        "small.keras",
        "dense_float32.tflite",
        "dense_int8.tflite",
        "small_float32.tflite",
        "small_int8.tflite",
        "demo.json",
        "widths.png",
    }
    assert json.loads((folder / "demo.json").read_text()) == figures
    dense, small = figures["networks"]["dense"], figures["networks"]["small"]
    assert small["macs"] / dense["macs"] == pytest.approx(0.5, abs=0.03)
    assert figures["strip"]["difference"] < 1e-5


def test_the_figures_are_those_of_the_files(finished):
    folder, figures, said = finished
    small = keras.saving.load_model(folder / "small.keras")
    assert small.count_params() == figures["networks"]["small"]["params"]
    for key in ("dense_float32", "small_int8"):
        assert figures["files"][key]["bytes"] == (folder / f"{key}.tflite").stat().st_size
    assert figures["files"]["small_float32"]["bytes"] < 0.8 * figures["files"]["dense_float32"]["bytes"]
    assert abs(figures["files"]["small_float32"]["accuracy"] - figures["networks"]["small"]["accuracy"]) < 0.02
    assert "accuracy, int8 .tflite" in said and "ms, float32 .tflite" in said


def test_the_picture_shows_every_layer_with_its_two_widths(finished, monkeypatch):
    from matplotlib.axes import Axes

    folder, figures, said = finished
    written = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: written.append(s) or original(self, x, y, s, **k))
    dense, small = (keras.saving.load_model(folder / f"{name}.keras") for name in ("dense", "small"))
    reports.plot_widths(dense, small, folder / "again.png")
    assert len(written) == 10 and sum("→" in text for text in written) == 9  # all but the logits
    with Image.open(folder / "again.png") as picture:
        assert picture.size[0] > 500
    (folder / "again.png").unlink()


def test_layers_with_automatic_names_are_paired_by_place():
    def net(width):
        inputs = keras.Input((4,))
        return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(width)(inputs)))

    assert [(old, new) for _, old, new in reports.paired_widths(net(8), net(4))] == [(8, 4), (2, 2)]


def test_widths_of_layers_are_their_output_channels():
    model = demo.small_resnet((28, 28, 1), 10, (8, 16))
    assert sorted(reports.layer_widths(model).values()) == [8, 8, 8, 10, 16, 16, 16]


def test_before_and_after_give_points_for_percentages_and_ratios_for_the_rest():
    text = reports.before_after([("accuracy", 0.9, 0.89, "percent"), ("params", 2000, 500, "count")])
    assert "-1.00 points" in text and "x 0.25" in text and "2,000" in text
