import builtins
import socket
import sys
import types

import numpy as np
import pytest

from keras_prune import datasets


def arrays(n=4):
    rng = np.random.default_rng(0)
    return dict(
        x_train=rng.integers(0, 255, (n, 5, 5, 3), dtype=np.uint8),
        y_train=np.arange(n) % 2,
        x_test=rng.integers(0, 255, (2, 5, 5, 3), dtype=np.uint8),
        y_test=np.arange(2),
    )


def test_the_embedded_set_is_balanced_real_images_with_their_licence():
    images = datasets.load()
    assert images.x_train.shape == (12000, 28, 28, 1) and images.x_test.shape == (2000, 28, 28, 1)
    assert np.bincount(images.y_train).tolist() == [1200] * 10 and np.bincount(images.y_test).tolist() == [200] * 10
    assert images.x_train.dtype == np.uint8 and images.x_train.std() > 50  # pictures, not blanks
    licence = datasets.importlib.resources.files("keras_prune").joinpath("data", "LICENSE.fashion_mnist").read_text()
    assert "MIT License" in licence and "Zalando" in licence


def test_a_file_in_the_folder_or_the_environment_variable_is_taken(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", **arrays())
    images = datasets.load("mine", str(tmp_path))
    assert np.array_equal(images.x_train, arrays()["x_train"]) and str(tmp_path) in images.source
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    assert np.array_equal(datasets.load("mine").y_test, arrays()["y_test"])


def test_lossless_strips_are_unpacked(tmp_path):
    from io import BytesIO

    from PIL import Image

    given, packed = arrays(), {}
    for split in ("train", "test"):
        file = BytesIO()
        Image.fromarray(given[f"x_{split}"].reshape(-1, 5, 3)).save(file, "PNG")
        packed |= {f"{split}_0": np.frombuffer(file.getvalue(), np.uint8), f"y_{split}": given[f"y_{split}"]}
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine" / "mine_webp.npz", **packed)
    assert np.array_equal(datasets.load("mine", str(tmp_path)).x_train, given["x_train"])


def test_a_file_that_lacks_arrays_or_fits_no_labels_says_so(tmp_path):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in arrays().items() if k != "y_test"})
    with pytest.raises(ValueError, match="lacks y_test"):
        datasets.load("a", str(tmp_path))
    np.savez(tmp_path / "b.npz", **{**arrays(), "y_train": np.arange(3)})
    with pytest.raises(ValueError, match="one label each"):
        datasets.load("b", str(tmp_path))


def test_without_the_extra_the_message_names_it_and_the_folder(monkeypatch):
    real = builtins.__import__

    def no_tfds(name, *rest, **more):
        if name == "tensorflow_datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_tfds)
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"keras_prune\[data\].*--data-dir"):
        datasets.load("cifar10")


def fake_tfds(monkeypatch, prepared: bool):
    """tensorflow_datasets as far as it is used: which calls were made, with or without download."""
    calls = []

    def load(name, split, download, **arguments):
        calls.append(download)
        if not download and not prepared:
            raise AssertionError("could not find data")
        a = arrays()
        return (a["x_train"], a["y_train"]), (a["x_test"], a["y_test"])

    info = types.SimpleNamespace(info=types.SimpleNamespace(download_size="162 MiB"))
    module = types.SimpleNamespace(load=load, list_builders=lambda: ["cifar10"], builder=lambda *a, **k: info)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    return calls


def test_local_data_is_asked_for_first_and_nothing_is_downloaded_if_it_is_there(monkeypatch):
    calls, said = fake_tfds(monkeypatch, prepared=True), []
    assert len(datasets.load("cifar10", say=said.append).x_train) == 4
    assert calls == [False] and said == []


def test_offline_it_fails_at_once_after_saying_what_it_would_download(monkeypatch):
    calls, said = fake_tfds(monkeypatch, prepared=False), []

    def offline(address, timeout):
        assert timeout <= 5
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", offline)
    with pytest.raises(ValueError, match="no network.*--data-dir"):
        datasets.load("cifar10", say=said.append)
    assert calls == [False] and "162 MiB" in said[0] and "--data-dir" in said[0]


def test_online_it_downloads_after_saying_so(monkeypatch):
    calls, said = fake_tfds(monkeypatch, prepared=False), []
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: types.SimpleNamespace(close=lambda: None))
    assert datasets.load("cifar10", say=said.append).source == "tensorflow_datasets cifar10"
    assert calls == [False, True] and len(said) == 1
