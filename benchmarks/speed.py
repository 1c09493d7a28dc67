"""What pruning costs: walk + plan + cut against clone_model, growth with the network, a step with and without masks.

    python benchmarks/speed.py            # writes results/speed.json and docs/speed.md

Only ratios within one run count: the machines are noisy. Each pair runs in turns (A B A B ...), medians are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median

import keras
import numpy as np

from keras_prune import Channels, FilterPruning, plan
from keras_prune.demo import small_resnet

HERE = Path(__file__).parent


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def against_clone(name: str, rounds: int) -> dict:
    """Walk + plan + cut of a keras.applications model, divided by clone_model of the same."""
    model = getattr(keras.applications, name)(weights=None)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: plan(model, 0.5).cut()))
        theirs.append(seconds(keras.models.clone_model, model))
    return {
        "model": name,
        "operations": len(model.operations),
        "plan_and_cut_s": median(ours),
        "clone_s": median(theirs),
        "ratio": median(a / b for a, b in zip(ours, theirs)),
        "rounds": rounds,
    }


def growth(name: str) -> dict:
    """Seconds per operation of walk, plan and cut."""
    model = getattr(keras.applications, name)(weights=None)
    walk = seconds(Channels, model)
    start = time.perf_counter()
    decision = plan(model, 0.5)
    planning = time.perf_counter() - start
    cutting = seconds(decision.cut)
    count = len(model.operations)
    return {
        "model": name,
        "operations": count,
        "walk_s": walk,
        "walk_and_plan_s": planning,
        "cut_s": cutting,
        "total_s": planning + cutting,
        "ms_per_operation": 1000 * (planning + cutting) / count,
    }


class Timer(keras.callbacks.Callback):
    """Seconds of every training step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self.start)


def step_time(kind: str, build, batch: int, rounds: int, steps: int = 12, **compile_arguments) -> dict:
    """A training step with the callback's masks, divided by one without; two copies trained in turns."""
    model = build()
    x = np.random.default_rng(0).normal(size=(batch * steps, *model.input_shape[1:])).astype("float32")
    y = np.random.default_rng(1).integers(0, 10, len(x))
    times = {}
    models = {}
    for key in ("plain", "masked"):
        models[key] = build()
        models[key].compile(
            keras.optimizers.SGD(0.01, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **compile_arguments,
        )
        times[key] = []
    pruning = FilterPruning(0.5)
    for number in range(rounds + 1):
        for key in ("plain", "masked"):
            timer = Timer()
            callbacks = [timer, pruning] if key == "masked" else [timer]
            models[key].fit(x, y, batch_size=batch, verbose=0, callbacks=callbacks)
            if number:  # the first round traces
                times[key].append(median(timer.steps[1:]))
    ratios = [m / p for m, p in zip(times["masked"], times["plain"])]
    return {
        "network": kind,
        "batch": batch,
        "plain_ms": 1000 * median(times["plain"]),
        "masked_ms": 1000 * median(times["masked"]),
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "rounds": rounds,
        **compile_arguments,
    }


def resnet20() -> keras.Model:
    return small_resnet((32, 32, 3), 10, (16, 32, 64, 64))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default=str(HERE / "results" / "speed.json"))
    parser.add_argument("--docs", default=str(HERE.parent / "docs" / "speed.md"))
    given = parser.parse_args()
    facts = {
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    facts["steps"] = [
        step_time("small_resnet 28x28x1, batch 128", lambda: small_resnet((28, 28, 1), 10), 128, given.rounds),
        step_time("small_resnet 32x32x3 (16, 32, 64, 64), batch 64", resnet20, 64, given.rounds),
        step_time("the same, jit_compile", resnet20, 64, given.rounds, jit_compile=True),
    ]
    for row in facts["steps"]:
        print(json.dumps(row), flush=True)
    facts["clone"] = [against_clone(name, 5) for name in ("ResNet50", "MobileNetV2", "EfficientNetB0")]
    for row in facts["clone"]:
        print(json.dumps(row), flush=True)
    facts["growth"] = [growth(n) for n in ("MobileNetV2", "ResNet50", "ResNet152", "EfficientNetV2L", "NASNetLarge")]
    for row in facts["growth"]:
        print(json.dumps(row), flush=True)
    Path(given.output).write_text(json.dumps(facts, indent=1) + "\n")
    Path(given.docs).write_text(page(facts))
    return 0


def page(facts: dict) -> str:
    lines = [
        "# Speed",
        "",
        f"Written by `python benchmarks/speed.py` (Keras {facts['keras']}, {facts['backend']}, "
        f"{facts['machine']}). Ratios are medians over rounds in turns.",
        "",
        "| step with masks ÷ without | ratio | lowest | highest | ms without | rounds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['network']} | **{r['ratio']:.3f}** | {r['lowest']:.3f} | {r['highest']:.3f} | {r['plain_ms']:.1f} | "
        f"{r['rounds']} |"
        for r in facts["steps"]
    ]
    lines += ["", "| walk + plan + cut ÷ clone_model | ratio | s | clone_model s |", "|---|---|---|---|"]
    lines += [
        f"| {r['model']} | **{r['ratio']:.2f}** | {r['plan_and_cut_s']:.2f} | {r['clone_s']:.2f} |"
        for r in facts["clone"]
    ]
    lines += [
        "",
        "| growth | operations | walk s | walk + plan s | cut s | ms per operation |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['operations']} | {r['walk_s']:.2f} | {r['walk_and_plan_s']:.2f} | {r['cut_s']:.2f} | "
        f"{r['ms_per_operation']:.1f} |"
        for r in facts["growth"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
