"""Provable Filter Pruning against the usual criteria: the same MACs for all, accuracy before and after training.

    python benchmarks/provable.py --data-dir DIR                            # everything; what is there is kept: hours
    python benchmarks/provable.py --data-dir DIR --networks resnet20 --budgets uniform --kept 0.5 --recipe none
    python benchmarks/provable.py --data-dir DIR --networks resnet56 --recipe paper --kept 0.5    # for an accelerator
    python benchmarks/provable.py --data-dir DIR --speed                    # only what the sensitivities cost
    python benchmarks/provable.py --table                                   # only docs/provable.md from the JSON
    python benchmarks/provable.py --data-dir DIR --tiny                     # does it run? writes to a temporary folder

[Liebenwein, Baykal, Lang, Feldman, Rus: Provable Filter Pruning for Efficient Neural Networks, ICLR 2020]
DIR (or the environment variable KERAS_PRUNE_DATA) holds `cifar10`, `mnist` (see `keras_prune.datasets`) and
`cifar10_resnet/resnet20.keras`, `resnet56.keras` (akamaster's). The LeNets are trained here on MNIST, one for each
seed, by the paper's recipe (SGD 0.01, momentum 0.9, decay 1e-4, batches of 64; `--epochs`, the paper has 40), and kept
in `--work`. LeNet-5 is Caffe's (20, 50, 500) with a ReLU behind each convolution.

A row is a network, a criterion, a budget, a share of the MACs and a seed. "uniform" takes the same fraction of every
group, so that only the choice of the units differs; "error_bound" takes the widths of all layers from one bound, which
each criterion's own scores go into, so that the widths differ, too: at the same MACs, not the same parameters. Of "pfp"
the highest sensitivities stay; "random" draws units and reweighs, "mixed" does so after the surest; both again, up to
20 times, until the MACs are within a point. Widths are not rounded. Each row is measured three times on the whole test
set: *cut*; *recalibrated*, BatchNormalization's statistics taken anew from 1,024 unlabelled training images; *trained*,
from there on, by `--recipe`.

The samples to choose by are unlabelled training images, as many as `sample_size` asks for (delta 1e-16, of the
LeNets 1e-12 and 1e-9, as in the paper's experiments); "taylor" sees the same ones with labels. The seed draws them, the
LeNets' weights, the units of "random", and the images to recalibrate and train on: the same for all criteria.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import keras
import numpy as np
from cases import (
    DELTAS,
    Case,
    Recipe,
    accuracy,
    case,
    copied,
    fit,
    found,
    has_norms,
    load,
    machine,
    on,
    put,
    sizes,
    write,
)
from no_training import PeakMemory

from keras_prune import Channels, datasets, metrics, plan, recalibrate_batchnorm, sensitivity

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "provable.json"
DOCS = HERE.parent / "docs" / "provable.md"
MARKERS = ("<!-- benchmarks/provable.py -->", "<!-- end -->")
NETWORKS = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5", "resnet20": "ResNet-20", "resnet56": "ResNet-56"}
CRITERIA = ("pfp", "pfp_max", "pfp:random", "pfp:mixed", "l1", "l2", "fpgm", "taylor", "bn_scale", "random")
BUDGETS = ("uniform", "error_bound")
STAGES = ("cut", "recalibrated", "trained")
RECALIBRATION = 1024
TRIES = 20
"""So often units are drawn until the MACs are met within a point; else the nearest counts."""

RECIPES = {
    "quick": {
        "lenet": Recipe(0.01, epochs=1, batch=64, images=10_000),
        "resnet": Recipe(0.01, epochs=1, batch=64, images=10_000, augmented=True),
    },
    "paper": {
        "lenet": Recipe(0.01, epochs=40, batch=64, drops=(25, 35)),
        "resnet": Recipe(0.1, epochs=182, batch=128, drops=(91, 136), warm_up=5, augmented=True),
    },
}

PAPER = """\
### Figures from papers

Not comparable with the tables above: there each network was trained again with the whole recipe (40 epochs of MNIST,
182 of CIFAR-10 and more), and the ratio was chosen so that the accuracy stays; here the ratio is given, and the
training is short. PR is the share of the parameters that was removed, FR that of the FLOPs, both in per cent.

**Verified**: one pruning step and full training, re-run by the same group in its later paper (ALDS), drop ≤ 0.5 points:

network | top-1 | change | PR | FR | L1 filters ("FT"): PR | FR
---|---:|---:|---:|---:|---:|---:
ResNet-20, CIFAR-10 | 91.39 | −0.28 | 40.28 | 30.06 | 39.69 | 39.57
VGG-16, CIFAR-10 | 92.78 | −0.47 | 94.87 | 84.76 | 79.13 | 78.44
DenseNet-22, CIFAR-10 | 89.88 | −0.44 | 40.24 | 43.37 | 28.33 | 29.50
WRN-16-8, CIFAR-10 | – | −0.44 | 85.33 | 80.68 | 82.33 | 75.97
ResNet-18, ImageNet | 69.62 | −0.39 | 26.35 | 17.96 | 9.86 | 11.17

**Recalled, not checked**: the paper's tables 1 and 2 (many rounds of pruning and training). Change of the error in
points, PR, and in table 2 FR:

recalled: network | its error | PFP | FT (L1 filters) | SoftNet | ThiNet
---|---:|---|---|---|---
LeNet-300-100, MNIST | 1.59 | +0.41, 84.32 | +0.35, 81.68 | +0.41, 81.69 | +10.58, 75.01
LeNet-5, MNIST | 0.72 | +0.35, 92.37 | +0.47, 85.04 | +0.40, 80.57 | +0.12, 58.17
ResNet-20, CIFAR-10 | 8.60 | +0.49, 62.67, 45.46 | +0.43, 42.65, 44.59 | +0.50, 46.42, 49.40 | +2.10, 32.90, 32.73
ResNet-56, CIFAR-10 | 7.05 | +0.28, 88.98, 84.42 | +0.48, 81.46, 82.73 | +0.36, 81.46, 82.73 | +1.28, 50.08, 50.06

**Recalled, not checked**: PFP in its table 8, by how much the error may grow (change, PR, FR):

recalled: network | within 0.5 points | the original error | lowest error
---|---|---|---
ResNet-20 | +0.49, 62.67, 45.46 | +0.04, 43.16, 32.10 | –
ResNet-56 | +0.28, 88.98, 84.42 | −0.03, 86.00, 80.76 | −0.69, 72.10, 67.41
"""


# -- one row ---------------------------------------------------------------------------------------------------------


def pruned(this: Case, row: dict) -> tuple[keras.Model, dict]:
    """The small network, before anything is done to it, and what is to be said of it."""
    images, y = this.drawn(row["seed"], this.samples)
    x, (name, _, mode) = this.change(images), row["criterion"].partition(":")
    given = {
        "criterion": name,
        "budget": row["budget"],
        "delta": DELTAS.get(this.network, 1e-16),
        "mode": mode or "deterministic",
    }
    given["data"] = (x, y) if name == "taylor" else x
    plans = []
    with warnings.catch_warnings():  # the page says how many units are saturated
        warnings.filterwarnings("ignore", ".* saturated")
        for attempt in range(TRIES if mode else 1):  # what is drawn has the widths that come
            start = time.perf_counter()
            plans.append(plan(this.channels, 1 - row["kept"], round_to=1, seed=row["seed"] + 1000 * attempt, **given))
            seconds = time.perf_counter() - start
            if abs(plans[-1].reached - plans[-1].asked) <= 0.01:
                break
    small = min(plans, key=lambda p: abs(p.reached - p.asked)).cut()
    facts = {"seconds": seconds, "draws": len(plans), "samples": this.samples}
    return small, facts | sizes(small, this.model)


def measured(this: Case, row: dict, recipe: Recipe | None, again: bool) -> dict:
    """The row with its accuracies.

    Args:
        row: what it is found by, and what was measured of it before.
        recipe: also train it by this one.
        again: whether to measure what is there.
    """
    small, facts = pruned(this, row)
    row = {**row, **facts}
    if again or "cut" not in row:
        row["cut"] = accuracy(small, this.images, this.change)
    if has_norms(small):
        recalibrate_batchnorm(small, this.change(this.drawn(row["seed"], RECALIBRATION)[0]))
        if again or "recalibrated" not in row:
            row["recalibrated"] = accuracy(small, this.images, this.change)
    if recipe is not None:
        row["trained"] = [*others(row, recipe), trained(this, small, recipe, row["seed"])]
    return row


def trained(this: Case, model, recipe: Recipe, seed: int) -> dict:
    keras.utils.set_random_seed(seed)
    seconds = fit(model, *this.drawn(seed, recipe.images), this.change, recipe, seed)
    return {**vars(recipe), "seconds": seconds, "accuracy": accuracy(model, this.images, this.change)}


def others(row: dict, recipe: Recipe) -> list[dict]:
    return [t for t in row.get("trained", []) if not by(t, recipe)]


def by(training: dict, recipe: Recipe) -> bool:
    return json.dumps({key: training[key] for key in vars(recipe)}) == json.dumps(vars(recipe))


def recipe_of(given, network: str) -> Recipe | None:
    if given.recipe == "none":
        return None
    recipe = RECIPES[given.recipe][network.rstrip("0123456789")]
    changed = {"epochs": given.finetune_epochs, "images": given.finetune_images}
    return replace(recipe, **{key: value for key, value in changed.items() if value is not None})


def done(row: dict, recipe: Recipe | None) -> bool:
    return "cut" in row and (recipe is None or len(others(row, recipe)) < len(row.get("trained", [])))


# -- results ---------------------------------------------------------------------------------------------------------

KEYS = ("network", "criterion", "budget", "kept", "seed")


def measure(given) -> None:
    for network in given.networks:
        recipe = recipe_of(given, network)
        for seed in given.seeds:
            dense(given, network, seed, recipe)
            for kept in given.kept:
                for budget in given.budgets:
                    for criterion in given.criteria:
                        one(given, dict(zip(KEYS, (network, criterion, budget, kept, seed))), recipe)


def the_case(given, network: str, seed: int) -> Case:
    return case(network, given.data_dir, given.work, given.epochs, seed if network.startswith("lenet") else 0)


def dense(given, network: str, seed: int, recipe: Recipe | None) -> None:
    """The network as it is, and trained on as the small ones are."""
    row = found(load(given.output), "dense", {"network": network, "seed": seed})
    if done(row, recipe) and not given.again:
        return
    this = the_case(given, network, seed)
    counts = {f.__name__: f(this.channels, ()) for f in (metrics.macs, metrics.params)}
    row = {**row, **counts, "samples": this.samples, "cut": accuracy(this.model, this.images, this.change)}
    if this.family == "lenet":
        row["epochs"] = given.epochs
    if recipe is not None:
        row["trained"] = [*others(row, recipe), trained(this, copied(this.model), recipe, seed)]
    put(given.output, "dense", row, ("network", "seed"))
    print(said(row), flush=True)


def one(given, wanted: dict, recipe: Recipe | None) -> None:
    row = found(load(given.output), "rows", wanted)
    if done(row, recipe) and not given.again:
        return
    this = the_case(given, wanted["network"], wanted["seed"])
    if wanted["criterion"] == "bn_scale" and not has_norms(this.model):
        return
    row = measured(this, row, recipe, given.again)
    put(given.output, "rows", row, KEYS)
    print(said(row), flush=True)
    keras.backend.clear_session()
    gc.collect()


def said(row: dict) -> str:
    now = {**row, "trained": [round(t["accuracy"], 4) for t in row.get("trained", [])]}
    return " ".join(f"{key}={round(v, 4) if isinstance(v, float) else v}" for key, v in now.items())


def speed(given) -> None:
    """Seconds and memory of the sensitivities, beside a forward pass over the same images."""
    if "resnet56" in given.speed:
        this = the_case(given, "resnet56", 0)
        x = this.change(this.drawn(0, this.samples)[0])
        put(given.output, "speed", timed("ResNet-56", this.channels, x, "CIFAR-10 images"), ("network",))
    if "resnet50" in given.speed:
        keras.utils.set_random_seed(0)
        channels = Channels(keras.applications.ResNet50(weights=None))
        x = np.random.default_rng(0).normal(size=(64, 224, 224, 3)).astype("float32")
        row = timed("ResNet-50, untrained", channels, x, "images of noise, 224x224")
        put(given.output, "speed", row, ("network",))


def timed(title: str, channels: Channels, x: np.ndarray, what: str) -> dict:
    model = channels.model
    model.predict(x, batch_size=64, verbose=0)  # traces
    start = time.perf_counter()
    model.predict(x, batch_size=64, verbose=0)
    forward = time.perf_counter() - start
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* saturated")
        start = time.perf_counter()
        result = sensitivity.sensitivities(channels, x)
        seconds = time.perf_counter() - start
    scores = np.concatenate([s.scores for s in result.groups.values()])
    row = {"network": title, "what": what, "samples": len(x), "seconds": seconds, "forward_seconds": forward}
    row |= {"before_mib": before, "peak_mib": memory.peak, "units": len(scores), "machine": machine()}
    row |= {"saturated": float((scores > sensitivity.SATURATED).mean())}
    print(row, flush=True)
    return row


# -- the page --------------------------------------------------------------------------------------------------------


def values(rows: list[dict], stage: str, recipe: Recipe | None) -> list[float]:
    """Accuracies of a stage, per cent, one per seed."""
    if stage != "trained":
        return [100 * r[stage] for r in rows if stage in r]
    return [100 * t["accuracy"] for r in rows for t in r.get("trained", []) if recipe and by(t, recipe)]


def cell(numbers: list[float]) -> str:
    """Mean, with the range over the seeds where there are several."""
    if not numbers:
        return "–"
    return f"{mean(numbers):.1f}" + (f" ({min(numbers):.1f}–{max(numbers):.1f})" if len(numbers) > 1 else "")


def select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def recipes_in(rows: list[dict]) -> list[Recipe]:
    """The trainings that were done, the shortest first."""
    there = {json.dumps({k: t[k] for k in vars(Recipe(0, 0, 0))}) for r in rows for t in r.get("trained", [])}
    known = [json.loads(text) for text in there]
    every = [Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in known]
    return sorted(every, key=lambda r: (r.epochs, r.images or 10**9))


def in_words(recipe: Recipe) -> str:
    count = "all images" if recipe.images is None else f"{recipe.images:,} images"
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    fall = "a cosine" if recipe.drops is None else f"a tenth after {', '.join(map(str, recipe.drops))}"
    more = ", shifted and mirrored" if recipe.augmented else ""
    return f"{epochs} on {count}{more}, SGD {recipe.rate:g} ({fall}), batches of {recipe.batch}"


@dataclass(frozen=True)
class Column:
    """One column of a table: a share of the MACs and what was done after the cut."""

    kept: float
    stage: str
    recipe: Recipe | None = None

    def of(self, rows: list[dict], **wanted) -> list[float]:
        return values(select(rows, kept=self.kept, **wanted), self.stage, self.recipe)


def columns_of(mine: list[dict]) -> list[Column]:
    kepts = sorted({r["kept"] for r in mine}, reverse=True)
    stages = [Column(0, s) for s in STAGES[:2] if any(s in r for r in mine)]
    stages += [Column(0, "trained", recipe) for recipe in recipes_in(mine)]
    columns = [replace(c, kept=kept) for kept in kepts for c in stages]
    return [column for column in columns if column.of(mine)]


def named(criterion: str) -> str:
    name, _, mode = criterion.partition(":")
    return f"{name} ({mode})" if mode else name


def table(results: dict) -> str:
    """What stands between the markers of docs/provable.md."""
    text = [f"Written by `python benchmarks/provable.py` ({on(results['machine'])}).", "", wins(results), ""]
    for network, title in NETWORKS.items():
        mine, whole = select(results["rows"], network=network), select(results["dense"], network=network)
        if not mine:
            continue
        text += [*_table_of(mine, whole, title), f"\n![{title}]({DOCS.stem}_{network}.png)\n"]
    return "\n".join([*text, *_speed_lines(results["speed"]), PAPER])


def _table_of(mine: list[dict], whole: list[dict], title: str) -> list[str]:
    columns, recipes, kepts = columns_of(mine), recipes_in(mine), sorted({r["kept"] for r in mine}, reverse=True)
    names = {r: f"trained {k + 1}" if len(recipes) > 1 else "trained" for k, r in enumerate(recipes)}
    head = [f"{c.kept:.0%}: {names.get(c.recipe, c.stage)}" for c in columns]
    lines = [f"### {title}: {cell(values(whole, 'cut', None))}% whole\n"]
    lines += [f"budget | criterion | params | {' | '.join(head)}", "---|---|---:" + "|---:" * len(columns)]
    for budget in budgets_of(mine):
        best = {c: best_of(means(mine, c, budget)) for c in columns}
        for criterion in CRITERIA:
            rows = select(mine, criterion=criterion, budget=budget)
            cells = [f"**{cell(c.of(rows))}**" if criterion in best[c] else cell(c.of(rows)) for c in columns]
            left = [f"{mean(r['params'] for r in some):.0%}" for k in kepts if (some := select(rows, kept=k))]
            if rows:
                lines.append(f"{budget} | {named(criterion)} | {', '.join(left)} | {' | '.join(cells)}")
    seeds, off = len({r["seed"] for r in mine}), [r for r in mine if abs(r["macs"] - r["kept"]) > 0.01]
    notes = [
        f"Accuracy in per cent, bold the best of its budget and column; "
        f"{'one seed' if seeds == 1 else f'means and ranges of up to {seeds} seeds'}. The whole network has "
        f"{whole[0]['params']:,} parameters and {whole[0]['macs'] / 1e6:.1f} M MACs; {whole[0]['samples']} samples "
        f"choose. *Params* left at {', '.join(f'{k:.0%}' for k in kepts)} of the MACs, where it was run. MACs are "
        f"met within a point{' but for ' if off else ''}"
        + ", ".join(f"{named(r['criterion'])}, {r['budget']}, at {r['kept']:.0%}: {r['macs']:.1%}" for r in off)
        + "; – was not run."
    ]
    for recipe, name in names.items():
        alone = cell(values(whole, "trained", recipe))
        notes.append(f"*{name.capitalize()}*: {in_words(recipe)}; the whole network, trained on like this: {alone}.")
    return [*lines, "", " ".join(notes)]


def budgets_of(rows: list[dict]) -> list[str]:
    there = {row["budget"] for row in rows}
    return [b for b in (*BUDGETS, "global") if b in there]


def means(mine: list[dict], column: Column, budget: str) -> dict[str, float]:
    """Criterion -> mean accuracy, over the seeds that all of them have."""
    some = select(mine, budget=budget, kept=column.kept)
    there = {c: {r["seed"] for r in select(some, criterion=c) if column.of([r])} for c in CRITERIA}
    common = set.intersection(*[seeds for seeds in there.values() if seeds] or [set()])
    found = {c: column.of([r for r in select(some, criterion=c) if r["seed"] in common]) for c in CRITERIA}
    return {c: mean(numbers) for c, numbers in found.items() if numbers}


def best_of(found: dict[str, float]) -> list[str]:
    """Whoever is best, to the digit that is shown; nobody where there is nobody else."""
    top = max(found.values(), default=0)
    return [c for c, value in found.items() if f"{value:.1f}" == f"{top:.1f}"] if len(found) > 1 else []


def wins(results: dict) -> str:
    """Who is best how often, in words; only where "pfp" and the criteria that need no samples were run."""
    lines = []
    for stage in STAGES:
        best, ahead, count = Counter(), Counter(), Counter()
        for network in NETWORKS:
            mine = select(results["rows"], network=network)
            for column in (c for c in columns_of(mine) if c.stage == stage):
                for these in (means(mine, column, budget) for budget in budgets_of(mine)):
                    if {"pfp", "l1", "l2", "fpgm"} <= set(these):
                        best.update(best_of(these))
                        count.update(list(these))
                        ahead.update(c for c, value in these.items() if these["pfp"] > value)
        if count:
            told = ", ".join(f"{named(c)} {n}" for c, n in best.most_common())
            beaten = ", ".join(f"{named(c)} in {ahead[c]} of {count[c]}" for c in CRITERIA if c != "pfp" and count[c])
            lines.append(
                f"* *{stage.capitalize()}*, {count['pfp']} comparisons: best, ties counted for each, {told}. "
                f"pfp is ahead of {beaten}."
            )
    if not lines:
        return ""
    return "\n".join(["Counted over networks, budgets and shares of the MACs:\n", *lines])


def _speed_lines(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    lines = ["### What the sensitivities cost\n"]
    lines += ["network | samples | s | images/s | ÷ forward pass | peak MiB | before | units | saturated"]
    lines += ["---|---" + "|---:" * 7]
    for r in rows:
        lines.append(
            f"{r['network']} | {r['samples']} {r['what']} | {r['seconds']:.1f} | {r['samples'] / r['seconds']:.1f} | "
            f"{r['seconds'] / r['forward_seconds']:.1f} | {r['peak_mib']:,.0f} | {r['before_mib']:,.0f} | "
            f"{r['units']:,} | {r['saturated']:.0%}"
        )
    lines.append(
        f"\n{on(rows[0]['machine'])}. Taken beside other work on the machine, so upper bounds. The forward pass is "
        "`predict` over the same images in the same run. Memory is that of the whole process, TensorFlow included; "
        "*before* is what it held when the measurement began. *Saturated* units are once all there is in some sum.\n"
    )
    return lines


COLORS = {
    "pfp": "#c0392b",
    "pfp_max": "#e88fa0",
    "pfp:random": "#e67e22",
    "pfp:mixed": "#b7950b",
    "l1": "#2f6db5",
    "l2": "#17a2b8",
    "fpgm": "#27864a",
    "taylor": "#8e44ad",
    "bn_scale": "#34495e",
    "random": "#95a5a6",
}


def pictures(results: dict, folder: Path) -> None:
    """PNGs: accuracy against the share of the MACs that is gone, a line for each criterion."""
    from matplotlib.figure import Figure

    for network, title in NETWORKS.items():
        mine, whole = select(results["rows"], network=network), select(results["dense"], network=network)
        if not mine:
            continue
        budgets = budgets_of(mine)
        panels = list(dict.fromkeys((c.stage, c.recipe) for c in columns_of(mine)))
        figure = Figure(figsize=(1 + 4 * len(panels), 1 + 3.2 * len(budgets)), layout="constrained")
        grid = figure.subplots(len(budgets), len(panels), squeeze=False)
        for row, budget in zip(grid, budgets):
            for axes, (stage, recipe) in zip(row, panels):
                start = values(whole, "trained" if stage == "trained" else "cut", recipe)
                draw(axes, select(mine, budget=budget), stage, recipe, start)
                axes.set_title(f"{stage}, {budget} widths", fontsize=10)
            row[0].set_ylabel("test accuracy, %", fontsize=9)
        lines = {line.get_label(): line for axes in grid.ravel() for line in axes.get_lines()}
        order = [named(c) for c in CRITERIA if named(c) in lines]
        figure.legend([lines[n] for n in order], order, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        figure.suptitle(f"{title}: accuracy at equal MACs", fontsize=12)
        figure.savefig(folder / f"{DOCS.stem}_{network}.png", dpi=85)


def draw(axes, rows: list[dict], stage: str, recipe: Recipe | None, start: list[float]) -> None:
    """One panel; every line starts at the whole network. Those that draw may leave it at the bottom."""
    seen = list(start)
    kepts = sorted({r["kept"] for r in rows}, reverse=True)
    for criterion in CRITERIA:
        found = [(100 * (1 - k), Column(k, stage, recipe).of(rows, criterion=criterion)) for k in kepts]
        points = [(at, mean(numbers)) for at, numbers in [(0.0, start), *found] if numbers]
        style = "--" if criterion == "random" else ":" if ":" in criterion else "-"
        size, front = (2.6, 3) if criterion == "pfp" else (1.4, 2)
        if ":" not in criterion:
            seen += [value for _, value in points]
        if len(points) > 1:
            axes.plot(
                *zip(*points), style, marker="o", markersize=2 * size, linewidth=size,
                color=COLORS[criterion], zorder=front, label=named(criterion),
            )  # fmt: skip
    if not axes.get_lines():
        axes.set_visible(False)
        return
    room = 0.06 * (max(seen) - min(seen))
    axes.set_ylim(min(seen) - room, max(seen) + room)
    axes.set_xlabel("MACs removed, %", fontsize=9)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="also global")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.7, 0.5, 0.3], help="fraction of the MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="quick", choices=["none", *RECIPES], help="to train the small networks by")
    parser.add_argument("--finetune-epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--finetune-images", type=int, help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, default=15, help="to train the LeNets from scratch; the paper: 40")
    parser.add_argument("--work", default=str(Path.home() / ".cache/keras_prune/provable"), help="keeps trained LeNets")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument(
        "--speed", nargs="*", choices=["resnet56", "resnet50"], help="only what the sensitivities cost; default: both"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--tiny", action="store_true", help="try it: a LeNet, little of everything, temporary files")
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--docs", default=str(DOCS))
    given = parser.parse_args()
    if given.tiny:
        folder = Path(tempfile.mkdtemp())
        given.networks, given.kept, given.seeds, given.epochs, given.finetune_images = ["lenet300"], [0.5], [0], 1, 1000
        given.work, given.output, given.docs = str(folder), str(folder / "provable.json"), str(folder / "provable.md")
        Path(given.docs).write_text(f"{MARKERS[0]}\n{MARKERS[1]}\n")
    if given.speed == []:
        given.speed = ["resnet56", "resnet50"]
    if not given.table and not given.data_dir:
        parser.error(f"--data-dir (or the environment variable {datasets.VARIABLE}) is needed")
    return given


def main() -> None:
    given = arguments()
    if given.speed:
        speed(given)
    elif not given.table:
        measure(given)
    results = load(given.output)
    write(given.docs, MARKERS, table(results))
    pictures(results, Path(given.docs).parent)
    if given.tiny:
        print(Path(given.docs).read_text())
    print(f"wrote {given.output} and {given.docs}", file=sys.stderr)


if __name__ == "__main__":
    main()
