"""keras-prune compress: from files to files."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

import tflite_export
from keras_prune import Channels, cli, metrics


def run(capsys, *arguments):
    return run_any(capsys, "compress", *arguments)


def run_any(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, images in a folder for each class, and the same as arrays."""
    folder = tmp_path_factory.mktemp("compress")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, activation="relu", name="first")(layers.Rescaling(1 / 255)(inputs))
    x = layers.Conv2D(16, 3, activation="relu", name="second")(x)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(layers.GlobalAveragePooling2D()(x)))
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, activation="relu")(inputs)
    keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))).save(folder / "bare.keras")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3)).astype("uint8"), np.repeat([0, 1], 12)
    for number, (image, label) in enumerate(zip(images, labels)):
        where = folder / "photos" / ("cat", "dog")[label]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{number}.png")
    np.savez(folder / "data.npz", x=images, y=labels, other=images)
    np.savez(folder / "few.npz", x=images[:5])
    (folder / "broken.npz").write_bytes(b"PK nothing")
    return folder


def test_a_folder_of_images_with_labels_and_an_int8_file(folder, tmp_path, capsys):
    small, lite = tmp_path / "small.keras", tmp_path / "small.tflite"
    arguments = ["--target", "macs=0.5", "params=2000", "--labels", "folders", "--tflite", lite, "--recipe", "int8"]
    code, out, err = run(capsys, folder / "model.keras", small, "--images", folder / "photos", *arguments)
    assert code == 0, err
    model, made = (keras.saving.load_model(p) for p in (folder / "model.keras", small))
    before, after = (metrics.macs(Channels(m)) for m in (model, made))
    assert after <= 0.5 * before and made.count_params() <= 2000 and "24 samples" in out and "accuracy" in out
    content = json.loads((tmp_path / "small.json").read_text())
    assert content["plan"]["totals"]["macs"] == {"before": before, "after": after}
    assert content["output"] == str(small) and content["tflite"]["recipe"] == "int8" and content["accuracy"]
    assert all(name in out for name in ("small.keras", "small.json", "small.tflite"))
    assert tflite_export.check(lite, made, np.zeros((2, 8, 8, 3), "float32")).problems == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.json", "small.keras", "small.tflite"]


def test_arrays_and_json_on_the_terminal(folder, tmp_path, capsys):
    small, report = tmp_path / "small.keras", tmp_path / "figures.json"
    code, out, _ = run(
        capsys,
        *(folder / "model.h5", small, "--images", folder / "data.npz", "--key", "other", "--count", 16, "--json"),
        *("--target", "macs=0.6", "--report", report, "--protect", "second", "--search", "1s", "--preprocess", "none"),
    )
    content = json.loads(out)
    assert code == 0 and content == json.loads(report.read_text()) and content["samples"] + content["held_back"] == 16
    assert keras.saving.load_model(small).get_layer("second").filters == 16 and "search" in str(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "small.keras"]


def test_plan_and_prune_look_at_images_where_criterion_or_budget_do(folder, tmp_path, capsys):
    model, small = folder / "model.keras", tmp_path / "small.keras"
    images = ["--images", folder / "photos", "--round-to", "1", "--json"]
    code, out, err = run_any(capsys, "plan", model, "--budget", "pca", "--explained", "0.9", *images)
    content = json.loads(out)
    assert code == 0 and "24 samples" in err and content["sentence"].startswith("explain 0.9 of the variance")
    assert all("components explain 0.9" in group["note"] for group in content["groups"])
    code, out, _ = run_any(
        capsys, "prune", model, small, "--criterion", "apoz", "--sparsity", "0.3", *images, "--count", 16
    )
    assert code == 0 and "by apoz" in json.loads(out)["sentence"] and "on 16 samples" in json.loads(out)["sentence"]
    assert keras.saving.load_model(small).count_params() < keras.saving.load_model(model).count_params()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "pca"], "budget pca needs data: add --images"),
        (["--budget", "pca", "--explained", "0.9"], "budget pca needs data: add --images"),
        (["--criterion", "thinet"], "criterion thinet needs data: add --images"),
        (["--explained", "0.9"], "belongs to budget='pca'"),
        (["--images", "{folder}/photos"], "criterion l2 looks at no data"),
        (["--images", "{folder}/photos", "--budget", "pca", "--explained", "2"], "expected a fraction of the variance"),
        (["--images", "nowhere", "--budget", "pca"], "no such file or folder"),
    ],
)
def test_what_plan_cannot_do_with_images_or_without_is_said(folder, capsys, arguments, message):
    words = [a.format(folder=folder) for a in arguments]
    code, out, err = run_any(capsys, "plan", folder / "model.keras", *words)
    assert code == 2 and message in err and not out


DATA = ["--images", "{folder}/data.npz"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{folder}/none.keras", "small.keras", *DATA], "no such file"),
        (["{folder}/model.keras", "small.txt", *DATA], "ends so"),
        (["{folder}/model.keras", "nowhere/small.keras", *DATA], "does not exist"),
        (["{folder}/model.keras", "small.keras", "--images", "nowhere"], "no such file or folder"),
        (["{folder}/model.keras", "small.keras", "--images", "{folder}/broken.npz"], "could not be read"),
        (["{folder}/model.keras", "small.keras", "--images", "{folder}/few.npz"], "5 samples"),
        (["{folder}/model.keras", "small.keras", *DATA, "--key", "z"], "'z'"),
        (["{folder}/model.keras", "small.keras", *DATA, "--count", "0"], "count=0"),
        (["{folder}/model.keras", "small.keras", *DATA, "--labels", "{folder}/none.npy"], "none.npy"),
        (["{folder}/model.keras", "small.keras", *DATA, "--target", "macs"], "expected MEASURE=LIMIT"),
        (["{folder}/model.keras", "small.keras", *DATA, "--target", "macs=half"], "expected MEASURE=LIMIT"),
        (["{folder}/model.keras", "small.keras", *DATA, "--target", "macs=-1"], "expected a fraction"),
        (["{folder}/model.keras", "small.keras", *DATA, "--target", "speed=0.5"], "not known"),
        (["{folder}/model.keras", "small.keras", *DATA, "--protect", "nobody"], "fits no layer"),
        (["{folder}/bare.keras", "small.keras", *DATA], "--preprocess"),
        (["{folder}/bare.keras", "small.keras", *DATA, "--preprocess", "best"], "not known"),
        (["{folder}/model.keras", "small.keras", *DATA, "--tflite", "small.lite"], "ends so"),
        (["{folder}/model.keras", "small.keras", *DATA, "--tflite", "a.tflite", "--recipe", "int3"], "int3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *(a.format(folder=folder) for a in arguments))
    assert code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_time_that_is_none_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compress", "model.keras", "small.keras", "--images", "x", "--search", "soon"])
    assert stop.value.code == 2 and "90s, 10m or 1h" in capsys.readouterr().err


def test_an_export_that_fails_does_not_lose_the_network(folder, tmp_path, capsys, monkeypatch):
    """What took minutes is kept, and the message says what was written and what was not."""

    def fails(*arguments, **options):
        raise RuntimeError("the converter gave up\nat length")

    monkeypatch.setattr(tflite_export, "export", fails, raising=False)
    small, lite = tmp_path / "small.keras", tmp_path / "small.tflite"
    lite.write_text("old")
    code, out, err = run(
        capsys, folder / "model.keras", small, "--images", folder / "data.npz", "--tflite", lite, "--json"
    )
    assert code == 2 and out == "" and "were written" in err and "the converter gave up" in err
    assert "at length" not in err and lite.read_text() == "old"
    assert "tflite" not in json.loads((tmp_path / "small.json").read_text())
    keras.saving.load_model(small)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compress", "--help"])
    assert stop.value.code == 0 and "example: keras-prune compress" in capsys.readouterr().out


def test_prune_by_obs_points_to_compress(folder, tmp_path, capsys):
    code = cli.main(["prune", str(folder / "model.keras"), str(tmp_path / "small.keras"), "--criterion", "obs"])
    assert code == 2 and "keras-prune compress" in capsys.readouterr().err and not list(tmp_path.iterdir())
