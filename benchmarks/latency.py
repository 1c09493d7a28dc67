"""Milliseconds asked, milliseconds got: pruned networks as .tflite files, timed on this CPU and estimated for an NPU.

    python benchmarks/latency.py [--data-dir DIR]     # an hour on two idle cores; rows that are there are kept
    python benchmarks/latency.py --tiny               # seconds: the same steps on a small network, nothing is written
    python benchmarks/latency.py --table              # only writes the docs anew

Half of the multiply-accumulates is asked for, with widths as they come and in multiples of 8; then half of the latency,
from a `LatencyTable`. No weights are trained and no accuracy is looked at: time depends on widths alone. Every pruned
network is really cut, converted, and timed in turns with the unpruned one; the ratio is the median over the rounds.
Networks of keras.applications have random weights; ResNet-56 is the trained one if `--data-dir` has it. Beside them,
80 % of single weights set to zero by tfmot.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import tflite_export
from keras_prune import Channels, metrics, plan
from keras_prune.recalibration import recalibrate_batchnorm
from tflite_export import LatencyTable, devices

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import cifar_resnet  # noqa: E402

RESULTS = HERE / "results" / "latency.json"
DOCS = HERE.parent / "docs" / "latency.md"
README = HERE.parent / "README.md"
MARKERS = ("<!-- benchmarks/latency.py -->", "<!-- end of latency -->")
FRACTION = 0.5

WAYS = {
    "half the MACs, any width": lambda channels, table: plan(channels, FRACTION, round_to=1),
    "half the MACs, multiples of 8": lambda channels, table: plan(channels, FRACTION),
    "half the ms, multiples of 8": lambda channels, table: plan(channels, FRACTION, measure=table),
    "half the ms, greedy": lambda channels, table: plan(channels, FRACTION, measure=table, budget="greedy"),
}
UNSEEN = list(WAYS)[:2]
SPARSE = {"tfmot, 80 % zeros": "dense", "tfmot, 80 % zeros, sparsity encoding": "encoded"}


def resnet56(data_dir) -> keras.Model:
    path = Path(data_dir or "") / "cifar10_resnet" / "resnet56.keras"
    return keras.models.load_model(path, compile=False) if data_dir and path.exists() else cifar_resnet(56)


def untrained(name: str) -> keras.Model:
    """A network of keras.applications with random weights and the statistics of BatchNormalization taken on noise: as
    they are set at first, activations shrink to nothing, and the scales of an int8 file with them."""
    model = getattr(keras.applications, name)((224, 224, 3), weights=None)
    recalibrate_batchnorm(model, np.random.default_rng(0).normal(size=(8, 224, 224, 3)).astype("float32"))
    return model


NETWORKS = {
    **{
        name: lambda data_dir, name=name: untrained(name)
        for name in ("MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "ResNet50")
    },
    "ResNet-56 (CIFAR)": resnet56,
}


class Rival:
    """A network, its file, and whatever is compared with it on one device.

    Args:
        model: unpruned.
        recipe: of all its files.
        device: name; "cpu" is timed, an NPU is estimated.
        rounds: of the timing in turns.
    """

    def __init__(self, model: keras.Model, recipe: str, device: str, rounds: int):
        self.model, self.recipe, self.device, self.rounds = model, recipe, devices.get(device), rounds
        random = np.random.default_rng(0)
        self.x = random.normal(size=(8, *model.input_shape[1:])).astype("float32")
        self.channels = Channels(model)
        self.whole = self.file(model)
        self.table = LatencyTable(self.device, model, recipe, self.x, progress=sys.stderr.isatty())
        start = time.perf_counter()
        self.table(self.channels)
        self.seconds = time.perf_counter() - start

    def file(self, model: keras.Model) -> bytes:
        return tflite_export.to_tflite(model, self.recipe, self.x if self.recipe == "int8" else None)

    def times(self, content: bytes) -> dict:
        """ms before and after, and their ratio with its spread over the rounds."""
        if self.device.is_measured:
            both = tflite_export.benchmark(self.whole, content, runs=self.rounds, max_seconds=60)
            return {
                "before_ms": both.a.median,
                "ms": both.b.median,
                "ratio": both.ratio,
                "ratio_p10": both.ratio_p10,
                "ratio_p90": both.ratio_p90,
            }
        before, after = self.device.milliseconds([self.whole, content])
        return {"before_ms": before, "ms": after, "ratio": after / before, "ratio_p10": None, "ratio_p90": None}

    def row(self, way: str) -> dict:
        start = time.perf_counter()
        made = WAYS[way](self.channels, self.table)
        seconds = time.perf_counter() - start
        content = self.file(made.cut())
        before, after = (metrics.macs(self.channels, removed) for removed in ((), made.removed))
        params = [metrics.params(self.channels, removed) for removed in ((), made.removed)]
        return {
            "macs": after / before,
            "params": params[1] / params[0],
            "bytes": len(content) / len(self.whole),
            "predicted": self.table(self.channels, made.removed) / self.table(self.channels),
            "predicted_ms": self.table(self.channels, made.removed),
            "plan_seconds": seconds,
            **self.times(content),
        }

    def sparse_row(self, way: str) -> dict:
        """80 % of every kernel set to zero by tfmot, of the same network."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.keras"
            self.model.save(source)
            done = subprocess.run([sys.executable, __file__, "--tfmot", folder], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"tfmot failed: {done.stderr[-2000:]}")
            content = (Path(folder) / f"{SPARSE[way]}.tflite").read_bytes()
        zeros = json.loads(done.stdout.splitlines()[-1])["zeros"]
        size = len(content) / len(self.whole)
        return {"macs": 1.0, "params": 1.0, "zeros": zeros, "bytes": size, **self.times(content)}


def tfmot_child(folder: str) -> None:
    """In a process of its own, since tfmot switches tf.keras: prune by magnitude, strip, convert, count the zeros."""
    import tensorflow as tf

    tf.keras.Model  # noqa: B018  stays Keras 3 from here on
    import tensorflow_model_optimization as tfmot

    model = tflite_export.to_tf_keras(keras.models.load_model(f"{folder}/model.keras", compile=False))
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.8, begin_step=0, frequency=1)
    pruned = tfmot.sparsity.keras.prune_low_magnitude(model, schedule)
    pruned.compile("sgd", "mse")
    x = np.zeros((2, *model.input_shape[1:]), "float32")
    y = np.zeros((2, *model.output_shape[1:]), "float32")
    pruned.fit(x, y, epochs=2, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    stripped = tfmot.sparsity.keras.strip_pruning(pruned)
    kernels = [w.numpy() for w in stripped.weights if "kernel" in w.name and w.shape.rank > 1]
    converter = tf.lite.TFLiteConverter.from_keras_model(stripped)
    (Path(folder) / "dense.tflite").write_bytes(converter.convert())
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    (Path(folder) / "encoded.tflite").write_bytes(converter.convert())
    print(json.dumps({"zeros": sum((k == 0).sum() for k in kernels) / sum(k.size for k in kernels)}, default=float))


def tiny_network(data_dir) -> keras.Model:
    x = inputs = keras.Input((16, 16, 3))
    for width in (32, 48):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)), name="tiny")


def cases(tiny: bool):
    """(network, recipe, device)"""
    if tiny:
        return [("tiny", "float32", "cpu"), ("tiny", "int8", "ethos-u55-128")]
    on_cpu = [(name, recipe, "cpu") for recipe in ("float32", "int8") for name in NETWORKS]
    return on_cpu + [(name, "int8", "ethos-u55-128") for name in NETWORKS]


def measure(given, rows: dict) -> dict:
    networks = {"tiny": tiny_network} if given.tiny else NETWORKS
    for network, recipe, device in cases(given.tiny):
        ways = [*WAYS] + (
            [*SPARSE] if recipe == "float32" and network in ("MobileNetV2", "ResNet-56 (CIFAR)", "tiny") else []
        )
        missing = [way for way in ways if f"{network}, {recipe}, {device}, {way}" not in rows]
        if not missing or (given.only and given.only not in (network, device)):
            continue
        keras.utils.set_random_seed(0)
        rival = Rival(networks[network](given.data_dir), recipe, device, 5 if given.tiny else given.rounds)
        for way in missing:
            row = rival.sparse_row(way) if way in SPARSE else rival.row(way)
            about = {"network": network, "recipe": recipe, "device": rival.device.identity(), "way": way}
            about |= {"table_error": rival.table.error, "table_seconds": rival.seconds}
            about |= {"keras": keras.__version__, "python": platform.python_version()}
            rows[f"{network}, {recipe}, {device}, {way}"] = {**about, **row}
            print(json.dumps(rows[f"{network}, {recipe}, {device}, {way}"]), flush=True)
            if not given.tiny:
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def ordered(rows: dict) -> dict:
    """As they stand in `cases` and `WAYS`, however they came about."""
    places = {case: place for place, case in enumerate(cases(False))}
    ways = [*WAYS, *SPARSE]

    def place(row: dict) -> tuple:
        case = row["network"], row["recipe"], row["device"].partition(",")[0]
        return places.get(case, len(places)), ways.index(row["way"])

    return dict(sorted(rows.items(), key=lambda item: place(item[1])))


def page(rows: dict) -> str:
    """The tables of docs/latency.md."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows.values()):
        here = [row for row in rows.values() if row["device"] == device]
        verb = "timed" if device.startswith("cpu") else "estimated"
        lines += [f"\n**{device}**, {verb}; time and MACs as a fraction of the unpruned network's:\n"]
        lines += ["network | recipe | ms | " + " | ".join(WAYS), "---|---|---:|" + "---:|" * len(WAYS)]
        for network, recipe in dict.fromkeys((row["network"], row["recipe"]) for row in here):
            found = {r["way"]: r for r in here if (r["network"], r["recipe"]) == (network, recipe)}
            cells = [
                f"**{found[way]['ratio']:.2f}** (MACs {found[way]['macs']:.2f})" if way in found else "–"
                for way in WAYS
            ]
            one = next(iter(found.values()))
            lines.append(f"{network} | {recipe} | {one['before_ms']:.2f} | " + " | ".join(cells))
        # Where the table was asked, `plan` has measured and corrected it: those rows say nothing about its prediction.
        errors = [abs(r["predicted_ms"] / r["ms"] - 1) for r in here if r["way"] in UNSEEN]
        lines.append(
            f"\nms predicted by the table against ms {verb}, of the {len(errors)} cut and converted networks that "
            f"the table did not choose: {np.median(errors):.1%} median error, {max(errors):.1%} at most."
        )
        seconds = {(r["network"], r["recipe"]): r["table_seconds"] for r in here}
        lines.append(
            f"A table took {min(seconds.values()):.0f} to {max(seconds.values()):.0f} s, a plan with it "
            f"{max(r['plan_seconds'] for r in here if 'plan_seconds' in r):.0f} s at most."
        )
    sparse = [row for row in rows.values() if row["way"] in SPARSE]
    if sparse:
        lines += [
            "\n**Single weights set to zero** by tfmot 0.8 (`prune_low_magnitude`, `strip_pruning`), same networks:\n"
        ]
        lines += ["network | stored | zeros | bytes | time", "---|---|---:|---:|---:"]
        for row in sparse:
            spread = f"{row['ratio_p10']:.2f} to {row['ratio_p90']:.2f}"
            start = f"{row['network']} | {SPARSE[row['way']]} | {row['zeros']:.0%} | {row['bytes']:.2f}"
            lines.append(f"{start} | **{row['ratio']:.2f}** ({spread})")
    return "\n".join(lines)


def short(rows: dict) -> str:
    """The README's table: what half of the MACs and half of the ms are worth, as .tflite files on the CPU."""
    asked = {"half the MACs": list(WAYS)[1], "half the ms": list(WAYS)[3]}
    here = [row for row in rows.values() if row["device"].startswith("cpu")]
    lines = ["network | recipe | ms | " + " | ".join(f"asked for {goal}" for goal in asked), "---|---|---:|---:|---:"]
    for network, recipe in dict.fromkeys((row["network"], row["recipe"]) for row in here):
        found = {r["way"]: r for r in here if (r["network"], r["recipe"]) == (network, recipe)}
        if set(asked.values()) <= set(found):
            cells = [f"{found[way]['ms']:.2f} ms, x {found[way]['ratio']:.2f}" for way in asked.values()]
            lines.append(f"{network} | {recipe} | {found[asked['half the ms']]['before_ms']:.2f} | {' | '.join(cells)}")
    one = here[0]["device"].removeprefix("cpu, ")
    return "\n".join([*lines, f"\n{one}; medians of rounds in turns, by `python benchmarks/latency.py`."])


def write_page(rows: dict) -> None:
    for path, text in ((DOCS, page(rows)), (README, short(rows))):
        before, rest = path.read_text().split(MARKERS[0])
        path.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("KERAS_PRUNE_DATA"))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", help="one network, or one device")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tfmot", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tfmot:
        return tfmot_child(given.tfmot)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() and not given.tiny else {}
    if not given.table:
        rows = measure(given, rows)
    rows = ordered(rows)
    if given.tiny:
        print(page(rows))
    else:
        write_page(rows)


if __name__ == "__main__":
    main()
