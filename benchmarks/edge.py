"""Real networks on the way to a small device: accuracy, bytes, ms, arena, stage by stage.

    python benchmarks/edge.py --data-dir DIR           # half an hour on two cores; rows that are there are kept
    python benchmarks/edge.py --data-dir DIR --times   # only the CPU latencies again, of the files in --work
    python benchmarks/edge.py --data-dir DIR --choose  # learning rates on held-out training samples; no rows
    python benchmarks/edge.py --table                  # only docs/edge.md from the JSON
    python benchmarks/edge.py --tiny                   # seconds, random numbers, writes nothing

DIR (or the environment variable KERAS_PRUNE_DATA) is the folder that benchmarks/no_training.py describes. Pruning is
`compress`, fine-tuning `distill`: both without labels. `qat` takes labels. 10,000 of the CIFAR-10 training images are
used. Every accuracy is that of the .tflite file, by LiteRT.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from no_training import TITLES, loaded

import tflite_export
from keras_prune import Channels, compress, datasets, distill, metrics
from tflite_export import LatencyTable, devices

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import cifar_resnet  # noqa: E402

RESULTS = HERE / "results" / "edge.json"
DOCS = HERE.parent / "docs" / "edge.md"
MARKERS = ("<!-- benchmarks/edge.py -->", "<!-- end of edge -->")
WORK = Path.home() / ".cache" / "keras_prune" / "edge"
NPU = "ethos-u55-128"


def half_the_macs(model) -> dict:
    return {"macs": 0.5}


def half_the_npu_ms(model) -> dict:
    table = LatencyTable(NPU, model, "int8")
    return {table: 0.5 * table(Channels(model))}


GOALS = {"half the MACs": half_the_macs, "half the Ethos-U55-128 ms": half_the_npu_ms}
CASES = (
    ("resnet8", "half the MACs"),
    ("resnet8", "half the Ethos-U55-128 ms"),
    ("dscnn", "half the MACs"),
    ("dscnn", "half the Ethos-U55-128 ms"),
    ("resnet20", "half the MACs"),
    ("resnet56", "half the MACs"),
)
# Stage -> (network, recipe of its file). "qat" trains further, on fake quantization.
STAGES = {
    "unpruned, float32": ("unpruned", "float32"),
    "unpruned, int8": ("unpruned", "int8"),
    "pruned, float32": ("pruned", "float32"),
    "fine-tuned, float32": ("fine-tuned", "float32"),
    "fine-tuned, int8": ("fine-tuned", "int8"),
    "fine-tuned, trained in int8 (QAT)": ("fine-tuned", "qat"),
}
QAT = list(STAGES)[-1]
TRAINED_IN_INT8 = ("resnet8", "dscnn")
IMAGES, HELD_OUT = 10_000, 5_000
FITTED, CALIBRATED = 1024, 200  # samples that `compress` sees, that int8 is calibrated on
EPOCHS = {"resnet8": 2, "dscnn": 40, "resnet20": 2, "resnet56": 1, "tiny": 1}
QAT_EPOCHS = {"resnet8": 2, "dscnn": 20}
# Chosen with --choose.
RATES = {"resnet8": 3e-3, "dscnn": 1e-3, "resnet20": 1e-3, "resnet56": 3e-4, "tiny": 1e-3}
QAT_RATES = {"resnet8": 1e-5, "dscnn": 1e-5}
CANDIDATES = {"fine-tune": (3e-4, 1e-3, 3e-3), "qat": (1e-5, 1e-4)}


def random_network():
    """(model, x_train, y_train, x_test, y_test, preprocessing), as `loaded` gives them."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(128, 32, 32, 3)).astype("float32"), random.integers(0, 10, 128)
    return cifar_resnet(8), x[:96], y[:96], x[96:], y[96:], np.asarray


class Case:
    """One network and one goal. What is made is kept in the work folder, and made once.

    Args:
        network: a key of TITLES, or "tiny".
        goal: a key of GOALS.
        data_dir: with the real networks.
        work: folder for models and files.
        held_out: train on less and hold out the rest, for --choose.
    """

    def __init__(self, network: str, goal: str, data_dir: str | None, work: Path, held_out: bool = False):
        self.network, self.goal = network, goal
        self._unpruned, x, y, x_test, y_test, change = (
            random_network() if network == "tiny" else loaded(network, data_dir)
        )
        order = np.random.default_rng(0).permutation(len(x))
        # Of many images those held out are never trained on, so the models are the same in both cases.
        self.work = work / "held_out" if held_out and len(x) <= IMAGES else work
        self.work.mkdir(parents=True, exist_ok=True)
        apart = min(HELD_OUT, len(x) // 5)
        count = IMAGES if len(x) > IMAGES else len(x) - apart if held_out else len(x)
        train, last = order[:count], order[count : count + apart]
        self.x, self.y = change(x[train]), y[train]
        self.x_test, self.y_test = (change(x[last]), y[last]) if held_out else (change(x_test), y_test)

    def path(self, stage: str, end: str) -> Path:
        goal = "" if stage.startswith("unpruned") else f"_{self.goal}"
        return self.work / f"{self.network}{goal}_{stage}{end}".replace(" ", "_").replace(",", "")

    def model(self, name: str) -> keras.Model:
        path = self.path(name, ".keras")
        if not path.exists():
            {"unpruned": lambda: self._unpruned, "pruned": self.pruned, "fine-tuned": self.tuned}[name]().save(path)
        return keras.saving.load_model(path, compile=False)

    def pruned(self) -> keras.Model:
        whole = self.model("unpruned")
        return compress(whole, self.x[:FITTED], target=GOALS[self.goal](whole))

    def tuned(self, rate: float | None = None) -> keras.Model:
        """The original teaches the small network. Clips for keyword spotting are not moved; images are."""
        small, report = distill(
            self.model("pruned"),
            self.model("unpruned"),
            self.x,
            epochs=EPOCHS[self.network],
            learning_rate=rate or RATES[self.network],
            augment=None if self.network == "dscnn" else "auto",
            progress=False,
        )
        print(self.network, self.goal, report, flush=True)
        return small

    def file(self, stage: str, rate: float | None = None) -> Path:
        """The .tflite file of a stage."""
        name, recipe = STAGES[stage]
        path = self.path(stage, f"_{rate:g}.tflite" if rate else ".tflite")
        if path.exists():
            return path
        if recipe == "qat":
            tflite_export.qat(
                self.model(name),
                (self.x, self.y),
                path,
                epochs=QAT_EPOCHS[self.network],
                learning_rate=rate or QAT_RATES[self.network],
                verbose=False,
            )
        else:
            data = self.x[:CALIBRATED] if recipe == "int8" else None
            tflite_export.export(self.model(name), path, recipe, data, runs=0)
        return path

    def row(self, stage: str) -> dict:
        name, recipe = STAGES[stage]
        path, channels = self.file(stage), Channels(self.model(name))
        arena = devices.get("micro").examine(path)
        row = {
            "network": self.network,
            "title": TITLES.get(self.network, self.network),
            "goal": "" if name == "unpruned" else self.goal,
            "stage": stage,
            "accuracy": tflite_export.accuracy(path, self.x_test, self.y_test),
            "samples": len(self.y_test),
            "trained_on": len(self.y),
            "bytes": path.stat().st_size,
            "macs": metrics.macs(channels, ()),
            "params": metrics.params(channels, ()),
            "arena_bytes": arena.sram_bytes,
            "arena_problems": arena.problems,
        }
        if recipe != "float32":
            fit = devices.get(NPU).examine(path)
            row |= {"npu_ms": fit.latency_ms, "npu_by": fit.latency_by, "npu_sram": fit.sram_bytes}
            row |= {"fallbacks": sum(each.count for each in fit.fallbacks), "npu_flash": fit.flash_bytes}
            row |= {"versions": {**fit.versions, **arena.versions}}
        about = {"keras": keras.__version__, "python": platform.python_version(), "machine": platform.machine()}
        return {**row, **about}

    def times(self, stage: str, rounds: int) -> dict:
        """ms on this CPU, in turns with the unpruned file of the same type."""
        recipe = "float32" if STAGES[stage][1] == "float32" else "int8"
        whole, file = self.file(f"unpruned, {recipe}"), self.file(stage)
        both = tflite_export.benchmark(whole, file, runs=rounds, max_seconds=30)
        spread = {"ratio": both.ratio, "ratio_p10": both.ratio_p10, "ratio_p90": both.ratio_p90}
        return {"cpu_ms": both.b.median, "unpruned_ms": both.a.median, **spread} | {
            "cpu": both.b.cpu,
            "runtime": both.b.runtime,
        }


def stages_of(network: str) -> list[str]:
    return [stage for stage in STAGES if stage != QAT or network in TRAINED_IN_INT8]


def key(network: str, goal: str, stage: str) -> str:
    return f"{network}, {stage}" if stage.startswith("unpruned") else f"{network}, {goal}, {stage}"


def measure(given, work: Path, rows: dict) -> dict:
    for network, goal in (("tiny", "half the MACs"),) if given.tiny else CASES:
        if given.only and given.only != network:
            continue
        wanted = {stage: key(network, goal, stage) for stage in stages_of(network)}
        missing = [stage for stage, name in wanted.items() if given.times or name not in rows]
        case = Case(network, goal, given.data_dir, work) if missing else None
        for stage in missing:
            if given.times and not (wanted[stage] in rows and case.path(stage, ".tflite").exists()):
                raise SystemExit(f"--times: {case.path(stage, '.tflite')} or its row is missing; run without it first.")
            row = rows.get(wanted[stage]) or case.row(stage)
            rows[wanted[stage]] = {**row, **case.times(stage, given.rounds)}
            print(json.dumps(rows[wanted[stage]]), flush=True)
            if not given.tiny:
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def choose(given, work: Path) -> None:
    """Accuracy on training samples that were held out, by learning rate."""
    for network, goal in CASES:
        if given.only and given.only != network:
            continue
        case = Case(network, goal, given.data_dir, work, held_out=True)
        right = {"unpruned": case.model("unpruned"), "pruned": case.model("pruned")}
        right |= {f"fine-tuned, {rate:g}": case.tuned(rate) for rate in CANDIDATES["fine-tune"]}
        if network in TRAINED_IN_INT8:
            right["fine-tuned, int8"] = case.file("fine-tuned, int8")
            right |= {f"QAT, {rate:g}": case.file(QAT, rate) for rate in CANDIDATES["qat"]}
        print(f"{network}, {goal}: held-out samples")
        print(tflite_export.stages(right, case.x_test, case.y_test), flush=True)


# -- the page --------------------------------------------------------------------------------------------------------


COLUMNS = (
    "stage | accuracy | KiB | CPU ms | Ethos-U55-128 ms | its SRAM, KiB | on its CPU | micro arena, KiB | MACs | params"
)


def kib(number) -> str:
    return "–" if number is None else f"{number / 1024:.1f}"


def cells(row: dict, whole_npu_ms: float) -> str:
    is_whole, npu = row["stage"].startswith("unpruned"), ["–"] * 3
    ratio = "" if is_whole else f" (x {row['ratio']:.2f})"
    if "npu_ms" in row:
        estimate = f"{row['npu_ms']:.3f}" + ("" if is_whole else f" (x {row['npu_ms'] / whole_npu_ms:.2f})")
        npu = [estimate, kib(row["npu_sram"]), str(row["fallbacks"])]
    return " | ".join(
        [
            row["stage"],
            f"**{100 * row['accuracy']:.1f}**",
            kib(row["bytes"]),
            f"{row['cpu_ms']:.3f}{ratio}",
            *npu,
            kib(row["arena_bytes"]),
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['params']:,.0f}",
        ]
    )


def page(rows: dict) -> str:
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows.values()):
        mine = [row for row in rows.values() if row["network"] == network]
        lines += [f"\n**{mine[0]['title']}**, {mine[0]['samples']:,} test samples:\n", COLUMNS]
        lines.append("---|" + "---:|" * COLUMNS.count("|"))
        estimated = next(row["npu_ms"] for row in mine if row["stage"] == "unpruned, int8")
        for goal in dict.fromkeys(row["goal"] for row in mine):
            lines += [f"*{goal}*" + " |" * COLUMNS.count("|")] * bool(goal)
            lines += [cells(row, estimated) for row in mine if row["goal"] == goal]
    one = next(row for row in rows.values() if "npu_by" in row)
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    lines.append(
        f"\nCPU: {one['cpu']}, {one['runtime']}, 1 thread, batch 1. Ethos-U55-128: {one['npu_by']}. In brackets the "
        "ratio to the unpruned file of the same type, on the CPU the median over rounds in turns. "
        f"{versions}, Keras {one['keras']}, Python {one['python']}. Written by `python benchmarks/edge.py`."
    )
    return "\n".join(lines)


def write_page(rows: dict) -> None:
    before, rest = DOCS.read_text().split(MARKERS[0])
    DOCS.write_text(f"{before}{MARKERS[0]}\n{page(rows)}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models and files")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", help="one network", choices=list(TITLES))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        given.rounds = 5
        with tempfile.TemporaryDirectory() as folder:
            print(page(measure(given, Path(folder), {})))
        return
    if not given.table and not given.data_dir:
        parser.error("--data-dir is needed")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.choose:
        return choose(given, given.work)
    if not given.table:
        rows = measure(given, given.work, rows)
    write_page(rows)


if __name__ == "__main__":
    main()
