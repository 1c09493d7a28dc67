"""PSP (layers that learn their own shape) on CIFAR-10, against the same network of plain layers, trained side by side.

    python benchmarks/psp.py --data-dir DIR                                # ResNet-20, all structures, 300 epochs: days
    python benchmarks/psp.py --data-dir DIR --epochs 10 --images 10000 --alpha-init ones --structures column channel
    python benchmarks/psp.py --time                                        # only what a training step costs
    python benchmarks/psp.py --table                                       # only docs/psp.md from the JSON
    python benchmarks/psp.py --data-dir DIR --tiny                         # does it run? writes to a temporary folder

Rows that are there are kept, unless `--again`. With `--keep DIR` the trained models are saved, and `--strip-again`
strips those of rows that are there once more, without training.

The paper's recipe [Schindler, Roth, Pernkopf, Froening: Parameterized Structured Pruning for Deep Neural Networks,
section 4] is the default: SGD 0.1 with momentum 0.9, a tenth of it after 50 % and 75 % of the steps, batches of 64,
decay 1e-4 of weights and alpha through the momentum, He initialisation, alpha drawn with deviation 0.1, 300 epochs. The
first, last, shortcut and transition layers are plain. Images are padded by 4, cropped, mirrored; the mean image of the
training images is subtracted. Errors are those of the last epoch; nothing is chosen on the test images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import keras
import numpy as np
from cases import Batches, machine

import keras_prune
from keras_prune import Channels, datasets, metrics, schedules
from keras_prune.layers import PSPConv2D
from keras_prune.surgery import psp_layers, structures_left

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import cifar_resnet, densenet, parameters  # noqa: E402

RESULTS = HERE / "results" / "psp.json"
DOCS = HERE.parent / "docs" / "psp.md"
MARKERS = ("<!-- benchmarks/psp.py -->", "<!-- end -->")
NETWORKS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "densenet40": "DenseNet-40"}
TINY = {"resnet8": "ResNet-8", "densenet10": "DenseNet-10"}
STRUCTURES = ("column", "channel", "shape", "layer", "layer+channel")  # the paper's
DECAY = 1e-4  # of the weights, in every run
THRESHOLDS = {"l2": {"resnet": 0.2, "densenet": 0.1}, "l1": {"resnet": 1e-3, "densenet": 1e-3}}
PAPER = """\
### The paper's figures, 300 epochs on all 50,000 images

network | structures | params | MACs | layers | error CIFAR-10
---|---|---:|---:|---:|---:
ResNet-56 | plain | 0.85 M | 0.13 G | 56 | 6.35%
ResNet-56 | column | 0.21 M | 0.03 G | – | 6.55%
DenseNet-40 (k = 12) | plain | 1.02 M | 0.53 G | 40 | 5.80%
DenseNet-40 | column | 0.22 M | 0.10 G | – | 5.76%
DenseNet-40 | channel | 0.35 M | 0.18 G | – | 5.61%
DenseNet-40 | shape | 0.92 M | 0.47 G | – | 5.40%
DenseNet-40 | layer | 0.55 M | 0.28 G | 28 | 6.46%
DenseNet-40 | layer and channel | 0.48 M | 0.24 G | 33 | 6.39%

Schindler et al., tables 2 and 3. Table 2 counts a multiply-accumulate twice (table 3 has 0.27 G for the same plain
DenseNet-40). Its table 5 compares ResNet-56 at 3.86 times fewer parameters (+0.20 points of error) with SFP 2.11
(+0.24), DCP 1.97 (+0.31), LCP 2.00 (+0.77), ThiNet 1.97 (+0.82) and CP 2.00 (+1.00). None of this was measured here.
"""


# -- networks and images ---------------------------------------------------------------------------------------------


def network(name: str, width: int, conv=keras.layers.Conv2D) -> keras.Model:
    if name.startswith("resnet"):
        return cifar_resnet(int(name.removeprefix("resnet")), width=width, conv=conv, weight_decay=DECAY)
    growth = max(1, 12 * width // 16)
    return densenet(int(name.removeprefix("densenet")), growth, width=width, conv=conv, weight_decay=DECAY)


def build(config: dict) -> keras.Model:
    """The network of a row, compiled with the recipe; its steps are those of the whole training."""
    keras.utils.set_random_seed(config["seed"])
    conv = keras.layers.Conv2D
    if config["structure"] != "dense":
        rate = config["rate"]
        conv = partial(
            PSPConv2D,
            structure=config["structure"].split("+"),
            threshold=config["threshold"],
            # a config, not an object: an object would draw the same numbers in every layer
            alpha_initializer={"class_name": "RandomNormal", "config": {"stddev": 0.1}}
            if config["alpha_init"] == "paper"
            else "ones",
            alpha_regularizer=keras_prune.layers.decay(rate)
            if config["regularizer"] == "l2"
            else keras.regularizers.L1(rate),
        )
    with warnings.catch_warnings():  # the row says how many layers start dead
        warnings.filterwarnings("ignore", ".* starts pruned ")
        model = network(config["network"], config["width"], conv)
    steps = config["epochs"] * (config["images"] // config["batch_size"])
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([steps // 2, 3 * steps // 4], [0.1, 0.01, 0.001])
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, clipnorm=config["clipnorm"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def images_of(config: dict, folder: str) -> tuple[np.ndarray, ...]:
    """x_train, y_train, x_test, y_test: the mean image of the training images that are used is subtracted."""
    whole = datasets.load("cifar10", folder)
    chosen = np.random.default_rng(config["seed"]).permutation(len(whole.x_train))[: config["images"]]
    x, x_test = (a.astype("float32") / 255 for a in (whole.x_train[chosen], whole.x_test[: config["test_images"]]))
    mean = x.mean(axis=0)
    return x - mean, whole.y_train[chosen], x_test - mean, whole.y_test[: config["test_images"]]


# -- what is left ----------------------------------------------------------------------------------------------------


def structures(model) -> dict[str, dict[str, list[int]]]:
    """Layer -> structure -> [left, total]."""
    return {
        layer: {name: [left, total] for name, (total, left) in counts.items()}
        for layer, counts in structures_left(model).items()
    }


def share_left(model) -> float:
    counts = np.array([count for layer in structures(model).values() for count in layer.values()])
    return float(counts[:, 0].sum() / counts[:, 1].sum()) if counts.size else 1.0


def largest_alpha(model) -> float:
    return max(float(np.abs(keras.ops.convert_to_numpy(a)).max()) for x in psp_layers(model) for a in x.alphas.values())


def dead_layers(model) -> int:
    return sum(any(left == 0 for left, _ in layer.values()) for layer in structures(model).values())


def counted(model) -> dict:
    """As the paper counts: the weights of the structures that are left, whether or not a network can be cut so.

    Returns:
        params (without alphas and running statistics), MACs, and kernel layers of which something is left.
    """
    own = {id(a) for layer in psp_layers(model) for a in layer.alphas.values()}
    result = {
        "params": sum(math.prod(v.shape) for v in model.trainable_variables if id(v) not in own),
        "macs": metrics.macs(Channels(model)),
        "layers": kernel_layers(model),
    }
    for layer in psp_layers(model):
        left = np.ones(layer.raw_kernel("kernel").shape, bool)
        for alive in layer.alive().values():
            left = left & alive
        gone = left.size - int(left.sum())
        result["params"] -= gone
        result["macs"] -= gone * math.prod(layer.output.shape[1:3])
        result["layers"] -= not left.any()
    return result


def kernel_layers(model) -> int:
    return sum(any(len(v.shape) > 1 for v in layer.trainable_variables) for layer in model.layers)


def predictions(model, x) -> np.ndarray:
    return np.argmax(model.predict(x, batch_size=500, verbose=0), axis=-1)


def stripped(model, x_test, y_test) -> dict:
    """What `keras_prune.strip` makes of a trained model, or why it did not."""
    before = predictions(model, x_test)
    try:
        start = time.perf_counter()
        small, report = keras_prune.strip(model, x_test[:16], report=True)
        seconds = time.perf_counter() - start
        after = predictions(small, x_test)
        always = Channels(keras_prune.strip(model, x_test[:16], rewire=True))
        return {
            "params": parameters(small),
            "macs": metrics.macs(Channels(small)),
            "layers": kernel_layers(small),
            "test_error": float(np.mean(after != y_test)),
            "images_classified_differently": int((before != after).sum()),
            "seconds": seconds,
            "always": {"macs": metrics.macs(always)},
            "report": str(report),
        }
    except Exception as error:  # a row of a long training is worth more than its last column
        return {"error": f"{type(error).__name__}: {error}"}


# -- one row ---------------------------------------------------------------------------------------------------------


class Watch(keras.callbacks.Callback):
    """Seconds of every epoch, and the share of the structures left at its end."""

    def on_train_begin(self, logs=None):
        self.seconds, self.left = [], [share_left(self.model)]
        self.dead = dead_layers(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        if keras.backend.backend() == "jax":  # training keeps its own copy of the weights between callbacks
            self.model.jax_state_sync()
        self.left.append(share_left(self.model))
        said = " ".join(f"{key} {value:.3f}" for key, value in (logs or {}).items())
        print(f"  {epoch + 1}: {self.seconds[-1]:.0f} s, {said}, left {self.left[-1]:.1%}", flush=True)


def train(config: dict, folder: str, keep: str | None) -> dict:
    x, y, x_test, y_test = images_of(config, folder)
    row = {**config, "machine": machine()}
    if config["structure"] != "dense":
        plain = build({**config, "structure": "dense"})
        row["step_ratio"] = step_times({"plain": plain, "psp": build(config)}, config["batch_size"], 5, 5)["psp"]
        keras.backend.clear_session()
    model, watch = build(config), Watch()
    batches = Batches(x, y, config["batch_size"], config["seed"])
    history = model.fit(
        batches, epochs=config["epochs"], shuffle=False, verbose=0, callbacks=[*callbacks(config), watch]
    ).history
    row["seconds_per_epoch"] = median(watch.seconds)
    row["train_error"] = [round(1 - value, 4) for value in history["accuracy"]]
    row["loss"] = [round(value, 4) for value in history["loss"]]
    row["test_error"] = float(np.mean(predictions(model, x_test) != y_test))
    row["counted"] = counted(model)
    if psp_layers(model):
        row["left"] = share_left(model)
        row["largest_alpha"] = largest_alpha(model)
        row["dead_layers_at_start"], row["dead_layers"] = watch.dead, dead_layers(model)
        row["left_after_epoch"] = [round(value, 4) for value in watch.left]
        row["structures"] = structures(model)
        row["strip"] = stripped(model, x_test, y_test)
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            model.save(kept_file(keep, config))
    return row


def callbacks(config: dict) -> list:
    if config["sparsity"] is None:
        return []
    given = {key: config[key] for key in ("measure", "budget") if config[key] is not None}
    target, stop = config["sparsity"], config["epochs"] // 2  # there where the learning rate falls
    return [
        keras_prune.SparsityTarget(
            schedules.polynomial(0.0, target, begin=0, stop=stop) if stop else target, hold=True, **given
        )
    ]


def strip_again(row: dict, folder: str, keep: str) -> dict | None:
    """The strip of a model that was kept."""
    file = kept_file(keep, row)
    if row["structure"] == "dense" or not file.is_file():
        return None
    _, _, x_test, y_test = images_of(row, folder)
    model = keras.saving.load_model(file)
    return {"largest_alpha": largest_alpha(model), "strip": stripped(model, x_test, y_test)}


def kept_file(folder: str, config: dict) -> Path:
    name = "_".join(str(config[key]) for key in KEYS if config.get(key) is not None)
    return Path(folder) / f"psp_{name}.keras"


def step_times(models: dict, batch: int, rounds: int, steps: int) -> dict:
    """Seconds of a training step of "plain", and of the others divided by it: the models take turns, round by round.

    The first round traces and does not count.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, *next(iter(models.values())).input_shape[1:])).astype("float32")
    y = random.integers(0, 10, batch)
    times = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            each = []
            for _ in range(steps):
                start = time.perf_counter()
                model.train_on_batch(x, y)
                each.append(time.perf_counter() - start)
            if number:
                times[name].append(median(each))
    ratios = {name: [a / b for a, b in zip(found, times["plain"])] for name, found in times.items()}
    return {
        name: median(times[name])
        if name == "plain"
        else {"ratio": median(found), "lowest": min(found), "highest": max(found), "rounds": rounds}
        for name, found in ratios.items()
    }


def time_steps(given) -> dict:
    """A training step of the network with PSP layers of each structure, divided by one of the plain network."""
    models = {}
    for structure in ("dense", *given.structures):
        models["plain" if structure == "dense" else structure] = build(configured(given, structure, "l2"))
    ratios = step_times(models, given.batch_size, given.rounds, given.steps)
    return {
        "network": given.network,
        "width": given.width,
        "batch": given.batch_size,
        "steps": given.steps,
        "machine": machine(),
        "plain_ms": 1000 * ratios.pop("plain"),
        "ratios": ratios,
    }


# -- results ---------------------------------------------------------------------------------------------------------


KEYS = (
    *("network", "structure", "regularizer", "rate", "threshold", "alpha_init", "sparsity", "measure", "budget"),
    "clipnorm",
    *("epochs", "images", "test_images", "batch_size", "width", "seed"),
)


COMMON = ("network", "width", "epochs", "images")
"""What rows of one table share."""


def configured(given, structure: str, regularizer: str) -> dict:
    """What a row is found by. Of a plain network it says nothing about alphas."""
    common = {key: getattr(given, key) for key in KEYS if hasattr(given, key)}
    if structure == "dense":
        alone = dict.fromkeys(("regularizer", "rate", "threshold", "alpha_init", "sparsity", "measure", "budget"))
        return {**common, **alone, "structure": "dense"}
    return {
        **common,
        "structure": structure,
        "regularizer": regularizer,
        "rate": given.rate if regularizer == "l2" else given.l1_rate,
        "threshold": THRESHOLDS[regularizer][given.network.rstrip("0123456789")]
        if given.threshold is None
        else given.threshold,
    }


def load(path: str) -> dict:
    empty = {"runs": [], "step_time": []}
    return {**empty, **json.loads(Path(path).read_text())} if Path(path).is_file() else empty


def same(row: dict, other: dict, keys=KEYS) -> bool:
    return all(row.get(key) == other.get(key) for key in keys)


def put(path: str, kind: str, row: dict, keys=KEYS) -> None:
    """A row into the file as it is now, in place of one of the same configuration."""
    results = load(path)
    results[kind] = [r for r in results[kind] if not same(r, row, keys)] + [row]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


def measure(given) -> None:
    wanted = [configured(given, "dense", "l2")]
    wanted += [configured(given, s, r) for r in given.regularizers for s in given.structures]
    for config in wanted:
        found = next((row for row in load(given.output)["runs"] if same(row, config)), None)
        if found and not given.again:
            again = strip_again(found, given.data_dir, given.keep) if given.strip_again else None
            if again:
                put(given.output, "runs", {**found, **again})
                print(config["structure"], again, flush=True)
            continue
        print({key: value for key, value in config.items() if value is not None}, flush=True)
        row = train(config, given.data_dir, given.keep)
        put(given.output, "runs", row)
        shown = (
            "step_ratio",
            "seconds_per_epoch",
            "test_error",
            "left",
            "dead_layers_at_start",
            "dead_layers",
            "counted",
        )
        shown += ("strip",)
        print({key: row[key] for key in shown if key in row}, flush=True)
        keras.backend.clear_session()


def table(results: dict) -> str:
    """What stands between the markers of docs/psp.md."""
    text = []
    groups: dict[tuple, list] = {}
    for row in results["runs"]:
        groups.setdefault(tuple(row[key] for key in COMMON), []).append(row)
    for common, rows in sorted(groups.items(), key=str):
        known = dict(zip(COMMON, common))
        order = {key: number for number, key in enumerate(("dense", *STRUCTURES))}
        rows.sort(key=lambda r: (order.get(r["structure"], 9), str(r["regularizer"]), str(r["sparsity"])))
        title = (NETWORKS | TINY)[known["network"]] + ("" if known["width"] == 16 else f" of width {known['width']}")
        text += [
            f"### {title}: {known['epochs']} epochs on {known['images']:,} images\n",
            "structures | decay | ε | largest α | left | params | MACs | layers | error | "
            "**stripped:** params | MACs | layers | error | always rewired: MACs",
            "---|---|---" + "|---:" * 11,
            *(_line(row) for row in rows),
            "",
            _notes(rows),
            "",
        ]
    text += [PAPER]
    for row in results["step_time"]:
        text += [
            f"### A training step: {(NETWORKS | TINY)[row['network']]}, batches of {row['batch']}\n",
            f"One of the plain network takes {row['plain_ms']:.0f} ms ({_on(row['machine'])}). Medians over rounds of "
            f"{row['steps']} steps in turns.\n",
            "structures | step ÷ plain | lowest | highest | rounds\n---|---:|---:|---:|---:",
            *(
                f"{name} | **{r['ratio']:.3f}** | {r['lowest']:.3f} | {r['highest']:.3f} | {r['rounds']}"
                for name, r in row["ratios"].items()
            ),
            "",
        ]
    return "\n".join(text)


def _line(row: dict) -> str:
    dense, now = row["structure"] == "dense", row["counted"]
    counts = [f"{now['params']:,}", f"{now['macs'] / 1e6:.1f} M", now["layers"], f"{row['test_error']:.1%}"]
    if dense:
        cells = ["plain", _clipped(row).strip(", ") or "–", *["–"] * 3, *counts, *["–"] * 5]
    else:
        decay = f"{row['regularizer']} {row['rate']:g}"
        if row["sparsity"] is not None:
            decay += f", target {row['sparsity']:g}" + (f" of {row['measure']}" if row["measure"] else "")
        decay += _clipped(row)
        name = row["structure"].replace("+", " and ")
        size = f"{row['largest_alpha']:,.3g}" if "largest_alpha" in row else "–"
        cells = [name, decay, f"{row['threshold']:g}", size, f"{row['left']:.0%}", *counts]
        cells += _cut_cells(row.get("strip", {}))
    return " | ".join(str(cell) for cell in cells)


def _clipped(row: dict) -> str:
    return f", clipnorm {row['clipnorm']:g}" if row.get("clipnorm") else ""


def _cut_cells(cut: dict) -> list[str]:
    if not cut or "error" in cut:
        return ["–"] * 5
    return [
        *(f"{cut['params']:,}", f"{cut['macs'] / 1e6:.1f} M", f"{cut['layers']}", f"{cut['test_error']:.1%}"),
        f"{cut['always']['macs'] / 1e6:.1f} M" if "always" in cut else "–",
    ]


def _notes(rows: list[dict]) -> str:
    starts = {row["alpha_init"] for row in rows} - {None}
    start = {"paper": "drawn from N(0, 0.1²)", "ones": "1"}
    tests = sorted({row["test_images"] for row in rows})
    seconds = sorted(row["seconds_per_epoch"] for row in rows)
    begun = f" α starts as {' or '.join(start[s] for s in sorted(starts))}." if starts else ""
    return (
        f"Written by `python benchmarks/psp.py`; one run each,"
        f" {', '.join(f'{n:,}' for n in tests)} test images.{begun} "
        "*Left* is the share of structures that are. Params, MACs and layers in front are counted as in the paper, by "
        "the structures that are left, whether or not a network can be cut so; *stripped* is what `strip` returns, "
        "rewired where that is faster in Keras, or always. "
        f"{seconds[0]:.0f}–{seconds[-1]:.0f} s an epoch beside other work; "
        f"{'; '.join(sorted({_on(row['machine']) for row in rows}))}."
    )


def _on(found: dict) -> str:
    versions = found["versions"]
    backend = f"{found['backend']} {versions.get(found['backend'], '')}".strip()
    return f"Keras {versions['keras']}, {backend}, {found['cpu']}, {found['cores']} cores"


def into_docs(path: str, text: str) -> None:
    """Between the two markers."""
    before, rest = Path(path).read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1], 1)[1]
    Path(path).write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--network", default="resnet20", choices=list(NETWORKS))
    parser.add_argument(
        "--structures", nargs="+", default=list(STRUCTURES), help="also filter; those joined by + multiply"
    )
    parser.add_argument("--regularizers", nargs="+", default=["l2"], choices=["l2", "l1"])
    parser.add_argument("--rate", type=float, default=1e-4, help="of alpha's weight decay, gradient rate * alpha")
    parser.add_argument("--l1-rate", type=float, default=1e-4, help="of its l1 decay, gradient rate * sign(alpha)")
    parser.add_argument("--threshold", type=float, help="default: the paper's: 0.2 ResNets, 0.1 DenseNet, 0.001 l1")
    parser.add_argument("--alpha-init", default="paper", choices=["paper", "ones"])
    parser.add_argument("--clipnorm", type=float, help="largest norm of each variable's gradient; not in the paper")
    parser.add_argument(
        "--sparsity", type=float, help="with keras_prune.SparsityTarget: a ramp up to half of the epochs"
    )
    parser.add_argument("--measure", help="of SparsityTarget")
    parser.add_argument("--budget", help="of SparsityTarget")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--keep", metavar="DIR", help="save the trained models there")
    parser.add_argument("--strip-again", action="store_true", help="strip the kept models of rows that are there")
    parser.add_argument("--time", action="store_true", help="only the time of a training step")
    parser.add_argument("--rounds", type=int, default=9, help="of --time")
    parser.add_argument("--steps", type=int, default=10, help="of --time, in a round")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--tiny", action="store_true", help="try it: little of everything, results in a temporary file")
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--docs", default=str(DOCS))
    given = parser.parse_args()
    if given.tiny:
        given.network = "resnet8" if given.network.startswith("resnet") else "densenet10"
        given.width, given.epochs, given.images, given.test_images, given.batch_size = 4, 1, 128, 100, 32
        given.rounds, given.steps = 1, 2
        if given.structures == list(STRUCTURES):
            given.structures = ["column", "layer+channel"]
        if given.output == str(RESULTS):
            given.output = str(Path(tempfile.mkdtemp()) / "psp.json")
    if given.strip_again and not given.keep:
        parser.error("--strip-again needs --keep DIR, where the models are")
    if not given.time and not given.table and not given.data_dir:
        parser.error(f"--data-dir (or the environment variable {datasets.VARIABLE}) is needed")
    return given


def main() -> None:
    given = arguments()
    if given.time:
        put(given.output, "step_time", time_steps(given), ("network", "width", "batch"))
    elif not given.table:
        measure(given)
    text = table(load(given.output))
    if given.tiny:
        print(text)
    else:
        into_docs(given.docs, text)
    print(f"wrote {given.output}" + ("" if given.tiny else f" and {given.docs}"))


if __name__ == "__main__":
    main()
