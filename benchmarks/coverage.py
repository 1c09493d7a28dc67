"""All models of keras.applications: half of the MACs are cut, and the outputs stay those of the zeroed model.

    python benchmarks/coverage.py                     # all 40, writes results/coverage.json and docs/coverage.md
    python benchmarks/coverage.py ResNet50 VGG16      # some

Weights are random, BatchNorm statistics are those of random images in the zeroed network, disturbed at random: sane
activations, and a wrongly cut gamma or mean shows. Control: as many *other* units cut must change the outputs.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import time
from pathlib import Path

import keras
import numpy as np

from keras_prune import Channels, plan
from keras_prune.surgery import cut, relative_difference, zero

HERE = Path(__file__).parent


def names() -> list[str]:
    """Every model constructor of keras.applications."""
    return sorted(n for n, f in vars(keras.applications).items() if inspect.isfunction(f))


def disturb(model: keras.Model, images: np.ndarray, seed: int = 0) -> None:
    """Random scales and shifts, and statistics near those of the images: activations neither die nor explode.

    Scales around 0.5, as in trained networks: with scales around 1 a random EfficientNet of 100 layers is chaotic, and
    float32 noise is amplified to percents in any two orders of summation.
    """
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if type(layer).__name__ == "LayerScale":  # starts at 1e-6: the whole branch would be invisible
            layer.gamma.assign(rng.uniform(0.3, 0.7, layer.gamma.shape))
    for variable in model.weights:
        kind = variable.path.split("/")[-1]
        if kind == "gamma":
            variable.assign(rng.uniform(0.3, 0.7, variable.shape))
        elif kind in ("beta", "bias"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        model(images, training=True)
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
        variance = np.array(layer.moving_variance)
        variance[variance < 1e-4] = 1.0  # zeroed channels: the control must not divide by them
        layer.moving_mean.assign_add(rng.normal(0, 0.1, variance.shape) * np.sqrt(variance))
        layer.moving_variance.assign(variance * rng.uniform(0.8, 1.25, variance.shape))


def others(channels: Channels, removed) -> np.ndarray:
    """As many units of every group as were removed, but the best instead of the worst where there is a choice."""
    parts = []
    for group in channels.groups:
        gone = np.isin(group.units, removed)
        kept_first = np.concatenate([group.units[~gone], group.units[gone]])
        parts.append(kept_first[: int(gone.sum())])
    return np.sort(np.concatenate(parts))


def measure(name: str) -> dict:
    keras.utils.set_random_seed(0)
    start = time.perf_counter()
    model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    built = time.perf_counter() - start
    size = [d or 224 for d in model.input_shape[1:3]]
    images = np.random.default_rng(1).uniform(0, 255, (2, *size, 3)).astype("float32")
    if not any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers):
        images = images / 127.5 - 1
    start = time.perf_counter()
    channels = Channels(model)
    walk = time.perf_counter() - start
    decision = plan(channels, 0.5, measure="macs", criterion="l2", budget="global", round_to=8)
    kernels = [(w.variable, np.array(w.variable)) for w in channels.weights if w.is_kernel]
    zero(channels, decision.removed)
    disturb(model, images)  # of the zeroed network: the whole one's would not fit half a network
    for variable, array in kernels:
        variable.assign(array)
    start = time.perf_counter()
    small = decision.cut()
    cutting = time.perf_counter() - start
    predicted = decision.totals["params"][1]
    zeroed = decision.zero()
    difference = relative_difference(zeroed, small, images)
    wrong = cut(channels, others(channels, decision.removed))
    control = relative_difference(zeroed, wrong, images)
    return {
        "model": name,
        "input": size,
        "groups": len(channels.groups),
        "fences": len(channels.fences),
        "macs": decision.totals["macs"],
        "params": decision.totals["params"],
        "removed": decision.reached,
        "params_predicted_exactly": predicted == small.count_params(),
        "difference": difference,
        "control": control,
        "build_s": built,
        "walk_s": walk,
        "cut_s": cutting,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| model | input | groups | fences | MACs before | after | removed | params after | difference | control |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | | | | | | **{r['error']}** | | | |")
            continue
        lines.append(
            f"| {r['model']} | {r['input'][0]}² | {r['groups']} | {r['fences']} | {r['macs'][0] / 1e6:,.0f} M | "
            f"{r['macs'][1] / 1e6:,.0f} M | {r['removed']:.1%} | {r['params'][1] / 1e6:.2f} M | "
            f"{r['difference']:.1e} | "
            f"{r['control']:.1e} |"
        )
    return "\n".join(lines)


def passed(row: dict) -> bool:
    return (
        "error" not in row
        and abs(row["removed"] - 0.5) <= 0.02
        and row["difference"] <= 1e-5
        and row["control"] > 1e-2
        and row["params_predicted_exactly"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; default: all")
    parser.add_argument("--output", default=str(HERE / "results" / "coverage.json"))
    parser.add_argument("--docs", default=str(HERE.parent / "docs" / "coverage.md"))
    given = parser.parse_args()
    rows = []
    for name in given.models or names():
        try:
            row = measure(name)
        except Exception as error:  # the table must show every failure
            row = {"model": name, "error": f"{type(error).__name__}: {error}"}
        rows.append(row)
        print("ok  " if passed(row) else "FAIL", json.dumps(row), flush=True)
        keras.backend.clear_session()
        gc.collect()
    good = sum(passed(r) for r in rows)
    print(f"{good}/{len(rows)} models")
    if not given.models:
        facts = {
            "passed": good,
            "of": len(rows),
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "models": rows,
        }
        Path(given.output).write_text(json.dumps(facts, indent=1) + "\n")
        Path(given.docs).write_text(
            f"# Coverage: {good} of {len(rows)} models of keras.applications\n\nEach model at its default input size, "
            "random weights, random BatchNorm statistics; half of the MACs cut (criterion l2, global budget, widths in "
            "multiples of 8). *difference*: max |zeroed − cut| / max |zeroed| of the logits on two random images; "
            "*control*: the same when as many other units are cut instead.\n\n"
            "Written by `python benchmarks/coverage.py` "
            f"(Keras {facts['keras']}, {facts['backend']}, {facts['machine']}).\n\n{table(rows)}\n"
        )
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
