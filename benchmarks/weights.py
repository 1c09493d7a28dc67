"""What zeros in single weights bring on disk, and how many of them can be proved harmless.

    python benchmarks/weights.py                # minutes; writes benchmarks/results/weights.json and docs/weights.md
    python benchmarks/weights.py --data-dir D   # or KERAS_PRUNE_DATA: also CIFAR-10 and cifar10_resnet/resnet20.keras

LeNet-300-100, trained for a few epochs on the Fashion-MNIST images inside the package. Files: its smallest weights are
set to zero and the file is written in several ways, all of which plain Keras reads. Proofs: an error of the output is
asked, and `prunable_fractions` says how many entries of each kernel may go; the error on the test images is measured.
"""

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import layers

from keras_prune import datasets
from keras_prune.compact import save_compact
from keras_prune.weights import prunable_fractions, prune_weights

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "weights.json"
DOCS = HERE.parent / "docs" / "weights.md"
MARKERS = ("<!-- benchmarks/weights.py: {} -->", "<!-- end of {} -->")
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
ERRORS = (0.1, 0.5)
FILTERS = {
    "HDF5 gzip": dict(compression="gzip", compression_opts=6),
    "HDF5 gzip + shuffle": dict(compression="gzip", compression_opts=6, shuffle=True),
}


def lenet(images: datasets.Images, epochs: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    stack = [layers.Flatten(), layers.Dense(300, "relu", name="hidden1"), layers.Dense(100, "relu", name="hidden2")]
    model = keras.Sequential([keras.Input(images.x_train.shape[1:]), *stack, layers.Dense(10, name="logits")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(scaled(images.x_train), images.y_train, batch_size=128, epochs=epochs, verbose=0)
    return model


def scaled(x: np.ndarray) -> np.ndarray:
    return x.astype("float32") / 255


def files(model: keras.Model) -> list[dict]:
    """Bytes of the model's file, written in each way, at each sparsity."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.keras")
        for sparsity in SPARSITIES:
            pruned, row = prune_weights(model, sparsity), {"sparsity": sparsity}
            for level in (1, 6, 9):
                start = time.perf_counter()
                report = save_compact(pruned, path, level=level)
                row[f"deflate {level}"] = report.compact
                row[f"seconds {level}"] = time.perf_counter() - start
                read_back(path, pruned)
            for name, options in FILTERS.items():
                filtered(path, options)
                row[name] = os.path.getsize(path)
                read_back(path, pruned)
            row |= {"plain": report.dense, "information": report.information, "nonzero": report.nonzero}
            rows.append(row)
            print(row, flush=True)
    return rows


def read_back(path: Path, model: keras.Model) -> None:
    back = keras.saving.load_model(path)
    for old, new in zip(model.weights, back.weights):
        old, new = (keras.ops.convert_to_numpy(v) for v in (old, new))
        if old.tobytes() != new.tobytes():
            raise RuntimeError(f"{path} gives other weights back.")


def filtered(path: Path, options: dict) -> None:
    """Rewrite a .keras file: its members as they are, the numbers packed by HDF5's own filters."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def copy(old, new):
        for name, item in old.items():
            if isinstance(item, h5py.Group):
                copy(item, new.create_group(name))
            else:
                new.create_dataset(name, data=item[()], **(options if item.size > 64 else {}))
        new.attrs.update(old.attrs)

    made = io.BytesIO()
    with h5py.File(io.BytesIO(members["model.weights.h5"]), "r") as old, h5py.File(made, "w") as new:
        copy(old, new)
    members["model.weights.h5"] = made.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def proofs(name: str, model: keras.Model, data: np.ndarray, x: np.ndarray, y: np.ndarray, errors, ways) -> list[dict]:
    """Per asked error and way: what may go by the proof, what that does to the outputs of the data and of x."""
    rows, whole = [], {"data": outputs(model, data), "test": outputs(model, x)}
    largest = np.linalg.norm(whole["data"], axis=1).max()
    for kind, weights in ways:
        for error in errors:
            start = time.perf_counter()
            found = prunable_fractions(model, error, data=data, kind=kind, weights=weights, seed=0)
            seconds = time.perf_counter() - start
            after = {key: outputs(found.model, images) for key, images in (("data", data), ("test", x))}
            differences = {k: np.linalg.norm(after[k] - whole[k], axis=1).max() / largest for k in after}
            row = {
                "model": name,
                "kind": kind,
                "weights": weights,
                "error": error,
                "fractions": found.fractions,
                "pruned": found.fraction,
                "bound": found.bound.total / found.largest,
                "observed": float(differences["data"]),
                "observed_test": float(differences["test"]),
                "accuracy_before": float((whole["test"].argmax(1) == y).mean()),
                "accuracy": float((after["test"].argmax(1) == y).mean()),
                "seconds": seconds,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def outputs(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return model.predict(x, batch_size=256, verbose=0).reshape(len(x), -1).astype(np.float64)


def one_shot(model: keras.Model, x: np.ndarray, y: np.ndarray) -> list[dict]:
    """The accuracy after pruning without any proof and without training, to compare with."""
    rows = []
    for kind in ("magnitude", "random"):
        for sparsity in SPARSITIES[1:]:
            found = outputs(prune_weights(model, sparsity, kind=kind, seed=0), x)
            rows.append({"kind": kind, "sparsity": sparsity, "accuracy": float((found.argmax(1) == y).mean())})
            print(rows[-1], flush=True)
    return rows


def tables(found: dict) -> dict[str, str]:
    ways = ["plain", "deflate 1", "deflate 6", "deflate 9", *FILTERS, "information"]
    lines = ["zeros | " + " | ".join(ways) + " | **deflate 6**", "---|" + "---:|" * (len(ways) + 1)]
    for row in found["files"]:
        kilobytes = " | ".join(f"{row[w] / 1000:,.0f}" for w in ways)
        lines.append(f"{row['sparsity']:.0%} | {kilobytes} | **x {row['deflate 6'] / row['plain']:.2f}**")
    half = next(row for row in found["files"] if row["sparsity"] == 0.5)
    lines.append(
        f"\nThousands of bytes of LeNet-300-100 ({found['numbers']:,} numbers). With half of them zero it takes "
        f"{half['seconds 1']:.2f}, {half['seconds 6']:.2f}, {half['seconds 9']:.2f} s at level 1, 6, 9. Written by "
        "`python benchmarks/weights.py`."
    )
    header = ["network | kind | fractions by | error asked | bound | observed | on test images | zeros | accuracy"]
    header.append("---|---|---|---:|---:|---:|---:|---:|---:")
    for row in found["proofs"]:
        share = f"**{row['pruned']:.2%}**" if row["pruned"] >= 1e-4 else f"**{row['pruned']:.0e}**"
        header.append(
            f"{row['model']} | {row['kind']} | {row['weights']} | {row['error']} | {row['bound']:.3g} | "
            f"{row['observed']:.2g} | {row['observed_test']:.2g} | {share} | {row['accuracy']:.2%}"
        )
    lenet = [row for row in found["proofs"] if row["model"] == "LeNet-300-100"]
    shots = "; ".join(
        f"{kind} "
        + ", ".join(f"{r['sparsity']:.0%}: {r['accuracy']:.2%}" for r in found["one_shot"] if r["kind"] == kind)
        for kind in ("magnitude", "random")
    )
    header.append(
        f"\nErrors, bounds and observed differences are relative to the largest ||F(x)|| over the data, the observed "
        f"ones the largest over all samples. LeNet-300-100 unpruned: {lenet[0]['accuracy_before']:.2%}. Without any "
        f"proof and without training it has: {shots}. Written by `python benchmarks/weights.py`."
    )
    return {"files": "\n".join(lines), "proofs": "\n".join(header)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1000, help="images that the bound is about")
    parser.add_argument("--data-dir", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    images = datasets.load()
    model, x = lenet(images, given.epochs, given.seed), scaled(images.x_test)
    data = scaled(images.x_train[: given.samples])
    ways = [(kind, "measured") for kind in ("magnitude", "random")]
    ways += [("magnitude", "uniform"), ("magnitude", "gaussian"), ("random", "uniform")]
    found = {
        "numbers": model.count_params(),
        "files": files(model),
        "one_shot": one_shot(model, x, images.y_test),
        "proofs": proofs("LeNet-300-100", model, data, x, images.y_test, ERRORS, ways),
    }
    resnet = Path(given.data_dir or "", "cifar10_resnet", "resnet20.keras")
    if given.data_dir and resnet.is_file():
        cifar = datasets.load("cifar10", str(Path(given.data_dir, "cifar10")))
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # what it was trained on
        part, x, y = cifar.x_train[:100], cifar.x_test[:2000], cifar.y_test[:2000]
        part, x = (((scaled(v) - mean) / deviation).astype("float32") for v in (part, x))
        deep = keras.saving.load_model(resnet)
        found["proofs"] += proofs("ResNet-20", deep, part, x, y, (0.5,), [("magnitude", "measured")])
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    text = DOCS.read_text()
    for name, table in tables(found).items():
        begin, end = (marker.format(name) for marker in MARKERS)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    DOCS.write_text(text)


if __name__ == "__main__":
    main()
