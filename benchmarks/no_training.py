"""Accuracy of pretrained networks made smaller without training: `compress` against the usual criteria.

    python benchmarks/no_training.py --data-dir DIR                       # everything; rows that are there are kept
    python benchmarks/no_training.py --data-dir DIR --networks resnet20 --methods compress --samples 1024 --seeds 0
    python benchmarks/no_training.py --table                              # only docs/no_training.md from the JSON

DIR (or the environment variable KERAS_PRUNE_DATA) holds `cifar10/cifar10_webp.npz` (or cifar10.npz),
`cifar10_resnet/resnet20.keras` and `resnet56.keras` (akamaster's CIFAR-10 ResNets), and from MLPerf Tiny
`mlperf_tiny/ic_resnet8.keras`, `kws_dscnn.keras`, `kws01_perf1000.npz`.

Unlabelled samples are drawn by the seed from the 50,000 training images (keyword spotting has evaluation clips only:
500 of the 1,000 are drawn to fit to, the other 500 measure). Labels are used by "taylor", by the fine-tuning, and to
measure. Accuracy is that of the whole test set (10,000 images). Widths are not rounded (round_to=1). Criteria other
than "compress" take the same fraction of every group.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from functools import cache
from pathlib import Path
from statistics import mean

import keras
import numpy as np
from cases import imagenet

from keras_prune import Channels, compress, cut, datasets, distill, metrics, plan, recalibrate_batchnorm, reconstruct

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "no_training.json"
DOCS = HERE.parent / "docs" / "no_training.md"
NETWORKS = {
    "resnet20": "cifar10_resnet/resnet20.keras",
    "resnet56": "cifar10_resnet/resnet56.keras",
    "resnet8": "mlperf_tiny/ic_resnet8.keras",
    "dscnn": "mlperf_tiny/kws_dscnn.keras",
}
TITLES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "resnet8": "MLPerf Tiny ResNet-8", "dscnn": "KWS DS-CNN"}
CRITERIA = ("l1", "l2", "fpgm", "taylor", "random", "obs")
SEARCH_MINUTES = 2
CLIPS = 500  # of the 1,000 for keyword spotting, to fit to
MARKERS = ("<!-- benchmarks/no_training.py -->", "<!-- end -->")
AFTER = ("cut", "recalibrated", "reconstructed")


def plain(x):
    return x.astype("float32")


@cache
def loaded(network: str, folder: str):
    """(model, x_train, y_train, x_test, y_test, preprocessing): the network's logits or probabilities."""
    model = keras.saving.load_model(Path(folder) / NETWORKS[network], compile=False)
    from_logits = "resnet20" in network or "resnet56" in network
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits), metrics=["accuracy"])
    if network == "dscnn":
        with np.load(Path(folder) / "mlperf_tiny" / "kws01_perf1000.npz") as file:
            x, y = clips(file)
        order = np.random.default_rng(1).permutation(len(x))
        fit, test = order[:CLIPS], order[CLIPS:]
        return model, x[fit], y[fit], x[test], y[test], plain
    images = datasets.load("cifar10", folder)
    change = imagenet if from_logits else plain
    return model, images.x_train, images.y_train, images.x_test, images.y_test, change


def clips(file) -> tuple[np.ndarray, np.ndarray]:
    """Keyword clips as the float network takes them: int8 with a scale and a zero point."""
    x = (file["mfcc_int8"].astype("float32") - file["zero_point"]) * file["scale"]
    return x, file["y"]


def samples_of(network: str, folder: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    _, x, y, _, _, change = loaded(network, folder)
    chosen = np.random.default_rng(seed).permutation(len(x))[:count]
    return change(x[chosen]), y[chosen]


def accuracy(network: str, folder: str, model) -> float:
    _, _, _, x, y, change = loaded(network, folder)
    hits = 0
    for start in range(0, len(x), 1000):
        answers = model.predict(change(x[start : start + 1000]), batch_size=250, verbose=0)
        hits += int((answers.argmax(-1) == y[start : start + 1000]).sum())
    return hits / len(x)


class PeakMemory:
    """Largest resident memory of the process while it is open, in MiB (Linux)."""

    def __enter__(self):
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.05):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def one(network: str, folder: str, method: str, after: str, kept: float, count: int, seed: int) -> dict:
    """One row: make the network smaller, measure it on the test set."""
    model = loaded(network, folder)[0]
    x, y = samples_of(network, folder, count, seed)
    with PeakMemory() as memory:
        start = time.perf_counter()
        if method == "compress":
            minutes = SEARCH_MINUTES if after == "searched" else 0
            small = compress(model, x, sparsity=1 - kept, round_to=1, search_minutes=minutes, seed=seed)
            if after == "recalibrated":
                recalibrate_batchnorm(small, x)
        else:
            channels = Channels(model)
            data = {"taylor": (x, y), "obs": x}.get(method)
            decision = plan(channels, 1 - kept, criterion=method, budget="uniform", round_to=1, data=data, seed=seed)
            if after == "reconstructed":
                small = reconstruct(channels, decision.removed, x, seed=seed)
            else:
                small = cut(channels, decision.removed)
            if after == "recalibrated":
                recalibrate_batchnorm(small, x)
        row = {"seconds": time.perf_counter() - start}
        if after == "distilled":
            small, report = distill(small, model, x, minutes=row["seconds"] / 60, seed=seed, progress=False)
            row["distill_seconds"] = report.seconds
        elif after == "fine-tuned":
            row["tune_seconds"] = tuned(network, folder, small, seed)
    whole, left = (metrics.macs(Channels(m), ()) for m in (model, small))
    return {**row, "peak_mib": memory.peak, "macs": left / whole, "accuracy": accuracy(network, folder, small)}


def tuned(network: str, folder: str, small, seed: int) -> float:
    """One epoch on the labelled training images, as a user would: SGD, cosine from 0.01, shift and mirror."""
    _, x, y, _, _, change = loaded(network, folder)
    steps, start = len(x) // 128, time.perf_counter()
    rate = keras.optimizers.schedules.CosineDecay(0.01, steps)
    small.compile(keras.optimizers.SGD(rate, 0.9, nesterov=True, weight_decay=1e-4), loss=small.loss)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    for step in range(steps):
        some = order[128 * step : 128 * step + 128]
        batch = np.pad(x[some], ((0, 0), (4, 4), (4, 4), (0, 0)))
        top, left = rng.integers(0, 9, 2)
        batch = batch[:, top : top + 32, left : left + 32]
        small.train_on_batch(change(batch[:, :, ::-1] if rng.random() < 0.5 else batch), y[some])
    return time.perf_counter() - start


def timed(name: str, images: int = 512) -> dict:
    """Seconds and peak memory of `compress` for an untrained network of keras.applications and random images."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None)
    x = np.random.default_rng(0).normal(0, 0.5, (images, *model.input_shape[1:])).astype("float32")
    with PeakMemory() as memory:
        start = time.perf_counter()
        compress(model, x, sparsity=0.5)
        seconds = time.perf_counter() - start
    return {"images": images, "side": model.input_shape[1], "seconds": seconds, "peak_mib": memory.peak}


def rows_wanted(given) -> list[tuple]:
    """(network, method, after, kept, samples, seed), the most telling first."""
    wanted = []
    for network in given.networks:
        for kept in given.kept:
            for count in dict.fromkeys(min(n, CLIPS) if network == "dscnn" else n for n in given.samples):
                for method in given.methods:
                    seeds = given.seeds if method in ("compress", "random") else given.seeds[:1]
                    stages = [a for a in given.after if a in AFTER]
                    if method == "compress":  # it reconstructs; whatever else was asked for comes on top
                        stages = (
                            ["reconstructed"] if given.after == list(AFTER) else [a for a in given.after if a != "cut"]
                        )
                    wanted += [(network, method, a, kept, count, s) for a in stages for s in seeds]
    return wanted


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"dense": {}, "rows": []}


def save(results: dict) -> None:
    results["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


KEYS = ("network", "method", "after", "kept", "samples", "seed")


def measure(given, folder: str) -> None:
    results = load()
    for wanted in rows_wanted(given):
        network = wanted[0]
        if network not in results["dense"]:
            results["dense"][network] = accuracy(network, folder, loaded(network, folder)[0])
            print(f"{network}: {results['dense'][network]:.2%}", flush=True)
        if any(all(row[k] == v for k, v in zip(KEYS, wanted)) for row in results["rows"]):
            continue
        row = {**dict(zip(KEYS, wanted)), **one(network, folder, *wanted[1:])}
        results = load() | {"dense": results["dense"]}
        results["rows"].append(row)
        save(results)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def cell(rows: list[dict]) -> str:
    """Mean accuracy in per cent, with the range over the seeds where there are several."""
    if not rows:
        return "–"
    found = [100 * row["accuracy"] for row in rows]
    spread = f" ({min(found):.1f}–{max(found):.1f})" if len(found) > 1 else ""
    return f"{mean(found):.1f}{spread}"


def select(rows, **wanted) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def table(results: dict) -> str:
    """docs/no_training.md."""
    rows, text = results["rows"], []
    for network, dense in results["dense"].items():
        mine = select(rows, network=network)
        counts = sorted({row["samples"] for row in mine})
        main = 1024 if 1024 in counts else max(counts)
        kepts = sorted({row["kept"] for row in mine}, reverse=True)
        text += [f"\n## {TITLES[network]}: {dense:.2%} whole\n"]
        head = [f"{kept:.0%} of the MACs" for kept in kepts]
        text += [f"{main:,} samples | " + " | ".join(head), "---|" + "---|" * len(kepts)]
        for method in ("compress", *CRITERIA):
            for after in ("reconstructed", "searched", "recalibrated", "cut", "distilled", "fine-tuned"):
                cells = [cell(select(mine, method=method, after=after, kept=k, samples=main)) for k in kepts]
                if any(c != "–" for c in cells):
                    name = "**compress**" if (method, after) == ("compress", "reconstructed") else method
                    what = "" if (method, after) == ("compress", "reconstructed") else f", {after}"
                    text.append(f"{name}{what} | " + " | ".join(cells))
        if len(counts) > 1:
            text += ["\ncompress with | " + " | ".join([*head, "s", "peak MiB"]), "---|" + "---|" * (len(kepts) + 2)]
            for count in counts:
                some = select(mine, method="compress", after="reconstructed", samples=count)
                if some:
                    cells = [cell(select(some, kept=k)) for k in kepts]
                    seconds, peak = (mean(row[key] for row in some) for key in ("seconds", "peak_mib"))
                    text.append(f"{count:,} samples | " + " | ".join(cells) + f" | {seconds:.0f} | {peak:,.0f}")
    for name, row in results.get("times", {}).items():
        text.append(
            f"\ncompress of {name} (untrained, {row['images']} random {row['side']}-pixel images, half of the MACs):"
            f" {row['seconds']:.0f} s, {row['peak_mib']:,.0f} MiB at the peak."
        )
    machine = results["machine"]
    return (
        "# Without training\n\nWritten by `python benchmarks/no_training.py` "
        f"(Keras {machine['keras']}, {machine['backend']}, {machine['cores']} cores, Python {machine['python']}). "
        f"{_said()}\n" + "\n".join(text) + "\n"
    )


def readme(results: dict, samples: int = 1024) -> str:
    """The README's table: compress beside the best of the usual criteria, whichever that is, without reconstruction."""
    rows = [
        row
        for row in results["rows"]
        if row["samples"] == min(samples, CLIPS if row["network"] == "dscnn" else samples)
    ]
    columns = "network|whole|MACs left|**compress**|best of l1, l2, fpgm, taylor|that one, reconstructed|random|s"
    lines = [columns.replace("|", " | "), "---|" * 8]
    for network, dense in results["dense"].items():
        for kept in (0.7, 0.5):
            mine = select(rows, network=network, kept=kept)
            ours = select(mine, method="compress", after="reconstructed")
            others = [
                r for r in mine if r["method"] in ("l1", "l2", "fpgm", "taylor") and r["after"] != "reconstructed"
            ]
            chance = [r for r in mine if r["method"] == "random" and r["after"] != "reconstructed"]
            if not ours:
                continue
            best = max(others, key=lambda r: r["accuracy"], default=None)
            lines.append(
                f"{TITLES[network]} | {dense:.1%} | {kept:.0%} | **{mean(r['accuracy'] for r in ours):.1%}** | "
                + (f"{best['accuracy']:.1%} ({best['method']}, {best['after']})" if best else "–")
                + f" | {_percent(select(mine, method=best['method'], after='reconstructed')) if best else '–'}"
                + f" | {_percent(chance)} | {mean(r['seconds'] for r in ours):.0f}"
            )
    return "\n".join(lines)


def _percent(rows: list[dict]) -> str:
    """The best of some rows."""
    return f"{max(row['accuracy'] for row in rows):.1%}" if rows else "–"


def into_readme(text: str) -> None:
    """Between the two markers of README.md."""
    path = HERE.parent / "README.md"
    before, rest = path.read_text().split(MARKERS[0])
    path.write_text(before + MARKERS[0] + "\n" + text + "\n" + MARKERS[1] + rest.split(MARKERS[1])[1])


def _said() -> str:
    """The last paragraph of this file's docstring: what was measured on what."""
    said = __doc__.strip().split("\n\n")[-1].replace("\n", " ")
    return (
        said + " Where a range is given it is over seeds, which draw the samples; the others are one run. 10,000 test "
        "images: one standard error is 0.3 points; 500 clips: 1.5 points. The ResNets' checkpoints were picked on the "
        "test set by their authors. Seconds and peak memory (of the whole process, TensorFlow included) were taken "
        "while other work ran on the machine, and are upper bounds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=["compress", *CRITERIA])
    parser.add_argument(
        "--after", nargs="+", default=list(AFTER), help="also searched, distilled, fine-tuned: compress"
    )
    parser.add_argument("--kept", nargs="+", type=float, default=[0.7, 0.5, 0.3], help="fraction of the MACs")
    parser.add_argument("--samples", nargs="+", type=int, default=[1024])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--time", nargs="+", default=[], metavar="NAME", help="only time keras.applications networks")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    given = parser.parse_args()
    for name in given.time:
        results = load()
        results.setdefault("times", {})[name] = timed(name)
        save(results)
    if not given.table and not given.time:
        if not given.data_dir:
            parser.error("--data-dir is needed")
        measure(given, given.data_dir)
    DOCS.write_text(table(load()))
    into_readme(readme(load()))
    print(f"wrote {RESULTS} and {DOCS}")


if __name__ == "__main__":
    main()
