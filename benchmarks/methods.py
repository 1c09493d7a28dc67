"""Every pruning method on the same trained network, at equal MACs (or equal density), with the same training after it.

    python benchmarks/methods.py --data-dir DIR --network resnet20                      # what is there is kept: hours
    python benchmarks/methods.py --data-dir DIR --methods l2 taylor --kept 0.5 --seeds 0 1 2
    python benchmarks/methods.py --data-dir DIR --family weights --kept 0.5 0.2 0.1
    python benchmarks/methods.py --data-dir DIR --search                                # only keras_prune.search
    python benchmarks/methods.py --table                                                # only the docs from the JSON
    python benchmarks/methods.py --data-dir DIR --tiny                                  # does it run? temporary files

DIR (or the environment variable KERAS_PRUNE_DATA) holds `cifar10`, `mnist` (see `keras_prune.datasets`) and
`cifar10_resnet/resnet20.keras`, `resnet56.keras` (akamaster's). Other networks are trained here first, one for each
seed, for `--pretrain-epochs`, and kept in `--work`.

A row is a network, a method, what is kept, and a seed. Units: the share of the MACs that is left, within a point.
Weights: the share of the kernels' entries that is left, which a pattern meets to a whole tap only. Everybody has the
same training, `--epochs` on `--images`: methods that prune first are trained on for all of it, methods that prune while
they train have it for both, and all take the same images in the same order. The learning rate falls along a cosine.
Widths are not rounded. Each row is evaluated once on the whole test set; what prunes first also right after the cut,
BatchNormalization's statistics taken anew from 1,024 unlabelled training images.

Controls, without which no row says anything: "random" takes as many units (weights) of every group (kernel) by chance;
"scratch" trains the network that "l2" ("magnitude") has cut from weights drawn anew, as long as all the others.

The seed draws the training images and their order, the samples to choose by, and what a method draws itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import keras
import numpy as np
from cases import Case, Recipe, accuracy, case, copied, fit, found, has_norms, load, on, put, sizes, write

import keras_prune as kp
from keras_prune import datasets, plan, recalibrate_batchnorm, schedules, strip

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
DOCS = HERE.parent / "docs"
END = "<!-- end -->"
NETWORKS = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "lenet5": "LeNet-5",
    "vgg16": "VGG-16",
    "densenet40": "DenseNet-40",
}
SAMPLES = 256
"""To choose by, where a method does not say itself how many it takes."""
RECALIBRATION = 1024
KEYS = ("network", "family", "method", "kept", "seed", "epochs", "images")


# -- one trial -------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One row in the making.

    Attributes:
        kept: share of the MACs, or of the weights, that is to be left.
        noted: what is said of it besides.
    """

    case: Case
    kept: float
    seed: int
    recipe: Recipe
    noted: dict

    @property
    def sparsity(self) -> float:
        return 1 - self.kept

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return min(self.recipe.images or 10**9, len(self.case.images.x_train)) // self.recipe.batch

    def labelled(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.case.drawn(self.seed, count)
        return self.case.change(x), y

    def inputs(self, count: int) -> np.ndarray:
        return self.labelled(count)[0]

    def train(self, model, *callbacks, epochs: int | None = None, teacher=None) -> None:
        """By the recipe, or so many epochs of it; with a teacher it learns from his answers, too."""
        keras.utils.set_random_seed(self.seed)
        recipe = replace(self.recipe, epochs=epochs or self.recipe.epochs)
        x, y = self.case.drawn(self.seed, recipe.images)
        model = model if teacher is None else kp.distiller(model, teacher, self.inputs(64))
        fit(model, x, y, self.case.change, recipe, self.seed, callbacks)

    def note_cut(self, model) -> None:
        """The accuracy before anything is trained."""
        if has_norms(model):
            recalibrate_batchnorm(model, self.inputs(RECALIBRATION))
        self.noted["cut"] = accuracy(model, self.case.images, self.case.change)


def cut_first(trial: Trial, teacher: bool = False, **arguments) -> keras.Model:
    """plan, cut, train."""
    start = time.perf_counter()
    small = plan(trial.case.channels, trial.sparsity, round_to=1, seed=trial.seed, **given_to(trial, arguments)).cut()
    trial.noted["seconds_choosing"] = time.perf_counter() - start
    trial.note_cut(small)
    trial.train(small, teacher=copied(trial.case.model) if teacher else None)
    return small


def given_to(trial: Trial, arguments: dict) -> dict:
    """The arguments with the data that they need."""
    criterion, budget = arguments.get("criterion", "l2"), arguments.setdefault("budget", "uniform")
    if criterion.startswith("taylor"):
        return {**arguments, "data": trial.labelled(SAMPLES)}
    if criterion in READING or budget == "pca" or arguments.get("reconstruct"):
        return {**arguments, "data": trial.inputs(max(SAMPLES, trial.case.samples))}
    return arguments


READING = ("obs", "pfp", "pfp_max", "thinet", "hrank", "apoz")
"""Criteria that take unlabelled samples."""


def compressed(trial: Trial) -> keras.Model:
    """`keras_prune.compress`: no training; then the same training as all."""
    start = time.perf_counter()
    small = kp.compress(
        trial.case.model, trial.inputs(RECALIBRATION), sparsity=trial.sparsity, round_to=1, seed=trial.seed
    )
    trial.noted["seconds_choosing"] = time.perf_counter() - start
    trial.note_cut(small)
    trial.train(small)
    return small


def while_training(trial: Trial, callback: Callable[[Trial], keras.callbacks.Callback]) -> keras.Model:
    """Train with a callback, then strip."""
    model = copied(trial.case.model)
    trial.train(model, callback(trial))
    return strip(model)


def with_penalty(trial: Trial, callback: keras.callbacks.Callback, **arguments) -> keras.Model:
    """Half of the training with a penalty, then plan and cut; the other half without."""
    model, first = copied(trial.case.model), trial.recipe.epochs // 2
    trial.train(model, callback, epochs=first)
    small = plan(model, trial.sparsity, round_to=1, **arguments).cut()
    trial.note_cut(small)
    trial.train(small, epochs=trial.recipe.epochs - first)
    return small


def slimmed(trial: Trial) -> keras.Model:
    return with_penalty(trial, kp.NetworkSlimming(SLIMMING), criterion="bn_scale", budget="global")


def lassoed(trial: Trial) -> keras.Model:
    return with_penalty(trial, kp.GroupLasso(LASSO), budget="uniform")


SLIMMING, LASSO = 1e-2, 0.05
"""Strengths of the penalties, chosen so that a training of a hundred steps moves scales and filters at all: the papers
train for hundreds of epochs with 1e-4 and less."""


def from_scratch(trial: Trial) -> keras.Model:
    """The architecture that "l2" finds, with new weights."""
    small = kp.redrawn(plan(trial.case.channels, trial.sparsity, budget="uniform", round_to=1).cut(), trial.seed)
    trial.train(small)
    return small


def in_batches(trial: Trial) -> dict:
    """A ramp that acts every tenth batch, until 60 % of the training."""
    return {"unit": "batch", "every": 10, "stop": int(0.6 * trial.steps * trial.recipe.epochs)}


def soft(trial: Trial, criterion: str):
    """Four times an epoch; hard in the last."""
    every = max(1, trial.steps // 4)
    return kp.FilterPruning(trial.sparsity, soft=True, criterion=criterion, unit="batch", every=every, **UNIFORM)


UNIFORM = {"budget": "uniform", "round_to": 1}
UNITS: dict[str, Callable[[Trial], keras.Model]] = {
    **{
        name: partial(cut_first, criterion=name)
        for name in (
            "random", "l1", "l2", "l1_folded", "l2_folded", "linf", "fpgm", "fpgm_mix", "bn_scale", "taylor",
            "taylor_weight", "hrank", "apoz", "thinet", "obs", "pfp",
        )
    },
    "l2 (global)": partial(cut_first, criterion="l2", budget="global"),
    "l2_folded (global)": partial(cut_first, criterion="l2_folded", budget="global"),
    "taylor (global)": partial(cut_first, criterion="taylor", budget="global"),
    "pfp (error_bound)": partial(cut_first, criterion="pfp", budget="error_bound"),
    "l2 (pca)": partial(cut_first, criterion="l2", budget="pca"),
    "l2, reconstructed": partial(cut_first, criterion="l2", reconstruct=True),
    "l2 (pca), reconstructed": partial(cut_first, criterion="l2", budget="pca", reconstruct=True),
    "thinet, reconstructed": partial(cut_first, criterion="thinet", reconstruct=True),
    "l2, distilled": partial(cut_first, criterion="l2", teacher=True),
    "compress": compressed,
    "gradual": partial(
        while_training, callback=lambda t: kp.GradualPruning(t.sparsity, **UNIFORM, **in_batches(t))
    ),
    "soft (SFP)": partial(while_training, callback=lambda t: soft(t, "l2")),
    "soft, fpgm": partial(while_training, callback=lambda t: soft(t, "fpgm")),
    "drop": partial(
        while_training,
        callback=lambda t: kp.DropPruning(t.sparsity, kind="filters", seed=t.seed, **UNIFORM, **in_batches(t)),
    ),
    "iterative": partial(
        while_training,
        callback=lambda t: kp.IterativePruning(
            t.recipe.epochs, 1 - t.kept ** (1 / t.recipe.epochs), units=True, first=0, **UNIFORM
        ),
    ),
    "slimming": slimmed,
    "group lasso": lassoed,
    "scratch": from_scratch,
}  # fmt: skip


def weights(trial: Trial, **arguments) -> keras.Model:
    """Single weights leave when training begins, and are held at zero."""
    if arguments.get("kind") == "snip":
        arguments["data"] = trial.labelled(SAMPLES)
    elif arguments.get("kind") in ("sipp", "links"):
        arguments["data"] = trial.inputs(SAMPLES)
    return held(trial, kp.WeightPruning(trial.sparsity, seed=trial.seed, **arguments))


def held(trial: Trial, callback: keras.callbacks.Callback, model=None) -> keras.Model:
    model = copied(trial.case.model) if model is None else model
    trial.train(model, callback)
    return model


def masked_scratch(trial: Trial) -> keras.Model:
    """The mask that "magnitude" finds, on new weights."""
    pruned = kp.prune_weights(trial.case.model, trial.sparsity)
    model = kp.redrawn(pruned, trial.seed)
    for mine, mask in zip(model.weights, pruned.weights):
        if len(mine.shape) > 1:
            mine.assign(np.array(mine) * (np.array(mask) != 0))
    return held(trial, kp.WeightPruning(trial.sparsity), model)


def pattern(name: str) -> Callable[[Trial], keras.Model]:
    return lambda t: held(t, kp.PatternPruning(t.sparsity, pattern=name, **in_batches(t)))


WEIGHTS: dict[str, Callable[[Trial], keras.Model]] = {
    "random": partial(weights, kind="random"),
    "magnitude": weights,
    "magnitude (global)": partial(weights, budget="global"),
    "magnitude (ERK)": partial(weights, budget="erk"),
    "LAMP": partial(weights, kind="lamp", budget="global"),
    "SNIP": partial(weights, kind="snip", budget="global"),
    "SiPP": partial(weights, kind="sipp"),
    "links": partial(weights, kind="links"),
    "gradual": lambda t: held(
        t,
        kp.WeightPruning(
            schedules.polynomial(0.0, t.sparsity, begin=0, stop=in_batches(t)["stop"]), unit="batch", every=10
        ),
    ),
    "drop": lambda t: held(t, kp.DropPruning(t.sparsity, seed=t.seed, **in_batches(t))),
    "iterative": lambda t: held(
        t, kp.IterativePruning(t.recipe.epochs, 1 - t.kept ** (1 / t.recipe.epochs), first=0, budget="global")
    ),
    "window": pattern("window"),
    "ck": pattern("ck"),
    "combined": pattern("combined"),
    "2:4": lambda t: held(t, kp.PatternPruning(pattern="2:4", **in_batches(t))),
    "scratch": masked_scratch,
}
FAMILIES = {"units": UNITS, "weights": WEIGHTS}
KEPT = {"units": (0.7, 0.5, 0.3), "weights": (0.5, 0.2, 0.1)}
NEED_NORMS = ("bn_scale", "l1_folded", "l2_folded", "l2_folded (global)", "slimming")


def runs(family: str, method: str, kept: float, network: str) -> bool:
    """Whether there is such a row."""
    if method == "2:4":
        return kept == 0.5
    return not (family == "units" and method in NEED_NORMS and network.startswith("lenet"))


def measured(this: Case, row: dict, recipe: Recipe) -> dict:
    trial, start = Trial(this, row["kept"], row["seed"], recipe, {}), time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* saturated")
        small = FAMILIES[row["family"]][row["method"]](trial)
    row = {**row, **trial.noted, "seconds": time.perf_counter() - start}
    row |= sizes(small, this.model) if row["family"] == "units" else {"density": density(small)}
    return {**row, "accuracy": accuracy(small, this.images, this.change)}


def density(model: keras.Model) -> float:
    """Share of the kernels' entries that is not zero."""
    masks = [mask.ravel() for mask in kp.kept_masks(model).values()]
    return float(np.concatenate(masks).mean())


# -- all rows --------------------------------------------------------------------------------------------------------


def measure(given) -> None:
    recipe = recipe_of(given)
    for seed in given.seeds:
        dense(given, seed, recipe)
        for family in given.family:
            for kept in given.kept or KEPT[family]:
                for method in FAMILIES[family]:
                    if (given.methods is None or method in given.methods) and runs(family, method, kept, given.network):
                        values = (given.network, family, method, kept, seed, recipe.epochs, recipe.images)
                        one(given, dict(zip(KEYS, values)), recipe)


def recipe_of(given) -> Recipe:
    return Recipe(0.01, given.epochs, 64, images=given.images, augmented=not given.network.startswith("lenet"))


def the_case(given, seed: int) -> Case:
    pretrained = given.network.startswith("resnet")
    count = 2000 if given.tiny else None
    return case(given.network, given.data_dir, given.work, given.pretrain_epochs, 0 if pretrained else seed, count)


def dense(given, seed: int, recipe: Recipe) -> None:
    """The network as it is, and trained on as all the others are."""
    keys = ("network", "seed", "epochs", "images")
    row = found(load(given.output), "dense", dict(zip(keys, (given.network, seed, recipe.epochs, recipe.images))))
    if "accuracy" in row and not given.again:
        return
    this = the_case(given, seed)
    trial = Trial(this, 1.0, seed, recipe, {})
    row |= {"as_it_is": accuracy(this.model, this.images, this.change)}
    row |= {f.__name__: f(this.channels, ()) for f in (kp.metrics.macs, kp.metrics.params)}
    model = copied(this.model)
    trial.train(model)
    put(given.output, "dense", row | {"accuracy": accuracy(model, this.images, this.change)}, keys)


def one(given, wanted: dict, recipe: Recipe) -> None:
    row = found(load(given.output), "rows", wanted)
    if "accuracy" in row and not given.again:
        return
    try:
        row = measured(the_case(given, row["seed"]), row, recipe)
    except Exception as error:
        if not given.go_on:
            raise
        print(f"FAILED {wanted}: {type(error).__name__}: {error}", flush=True)
        return
    put(given.output, "rows", row, KEYS)
    print(" ".join(f"{k}={round(v, 4) if isinstance(v, float) else v}" for k, v in row.items()), flush=True)
    keras.backend.clear_session()
    gc.collect()


def search(given) -> None:
    """`keras_prune.search` for several drops; chosen on training images, reported on the test set."""
    for seed in given.seeds:
        this = the_case(given, seed)
        x, y = this.drawn(seed, given.images)
        x, start = this.change(x), time.perf_counter()

        def evaluate(model, x=x, y=y):
            return float((model.predict(x, batch_size=250, verbose=0).argmax(-1) == y).mean())

        cache = Path(given.work) / f"search_{given.network}_{seed}_{given.images}.json"
        cache.parent.mkdir(parents=True, exist_ok=True)
        for drop in (0.5, 1.0, 2.0, 5.0):
            report = kp.search(this.model, evaluate, drop, cache=cache, progress=False)
            small = report.plan.cut()
            row = {"network": given.network, "seed": seed, "drop": drop, "images": given.images}
            row |= {"before": report.accuracy[0], "after": report.accuracy[1], "evaluations": report.evaluations}
            row |= {"seconds": time.perf_counter() - start, **sizes(small, this.model)}
            row |= {"whole": accuracy(this.model, this.images, this.change)}
            row |= {"accuracy": accuracy(small, this.images, this.change)}
            put(given.output, "search", row, ("network", "seed", "drop", "images"))
            print(row, flush=True)


# -- the pages -------------------------------------------------------------------------------------------------------

CONTROLS = ("random", "scratch")
HEADS = {"units": "of the MACs", "weights": "of the weights"}


def select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of per cents; of one seed the number alone."""
    if not values:
        return "–"
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def accuracies(rows: list[dict], key: str = "accuracy") -> list[float]:
    return [row[key] for row in rows if key in row]


def table(rows: list[dict], family: str, methods=None) -> list[str]:
    """A row for each method, the best first; a column for each share."""
    mine = select(rows, family=family)
    kepts = sorted({row["kept"] for row in mine}, reverse=True)
    main = max(kepts, key=lambda k: len(select(mine, kept=k)))
    there = [m for m in FAMILIES[family] if select(mine, method=m) and (methods is None or m in methods)]
    there.sort(key=lambda m: (m in CONTROLS, -mean(accuracies(select(mine, method=m, kept=main)) or [0])))
    best = {k: best_of({m: accuracies(select(mine, method=m, kept=k)) for m in there}) for k in kepts}
    cuts = any("cut" in row for row in select(mine, kept=main))
    head = "method | " + (f"{main:.0%}, before training | " if cuts else "")
    lines = [head + " | ".join(f"{k:.0%} {HEADS[family]}" for k in kepts), "---" + "|---:" * (len(kepts) + cuts)]
    for method in there:
        name = f"*{method}* (control)" if method in CONTROLS else method
        cells = [spread(accuracies(select(mine, method=method, kept=main), "cut"))] if cuts else []
        for kept in kepts:
            some = select(mine, method=method, kept=kept)
            cell = spread(accuracies(some)) + strayed(some, family)
            cells.append(f"**{cell}**" if method in best[kept] and methods is None else cell)
        lines.append(f"{name} | {' | '.join(cells)}")
    return lines


def strayed(rows: list[dict], family: str) -> str:
    """What is really left, where it is more than a point off."""
    key = "macs" if family == "units" else "density"
    off = [row[key] for row in rows if abs(row[key] - row["kept"]) > 0.01]
    return f" (at {mean(off):.0%})" if off else ""


def best_of(values: dict[str, list[float]]) -> list[str]:
    """The best mean and all within one standard deviation of it, of those with the most seeds."""
    most = max((len(v) for v in values.values()), default=0)
    known = {m: v for m, v in values.items() if v and len(v) == most}
    if len(known) < 2:
        return []
    top = max(known, key=lambda m: mean(known[m]))
    room = stdev(known[top]) if len(known[top]) > 1 else 0.0
    return [m for m, v in known.items() if mean(v) >= mean(known[top]) - room]


def page(results: dict, network: str) -> str:
    rows, whole = select(results["rows"], network=network), select(results["dense"], network=network)
    recipe = max({(r["epochs"], r["images"]) for r in rows}, key=lambda r: sum(by(r, row) for row in rows))
    rows, whole = [r for r in rows if by(recipe, r)], [r for r in whole if by(recipe, r)]
    epochs, images = recipe
    lines = [
        f"### {NETWORKS[network]}: {spread(accuracies(whole[:1], 'as_it_is'))}% as it is, "
        f"{spread(accuracies(whole))}% trained on like all rows\n",
        f"{whole[0]['params']:,} parameters, {whole[0]['macs'] / 1e6:.1f} M MACs. Training: {epochs} epochs on "
        f"{images:,} images, batches of 64, SGD 0.01 with momentum 0.9, a cosine to 0. Test accuracy in per cent, mean "
        f"± standard deviation over the seeds of a cell ({seeds_of(rows)}); a cell without ± is one seed. Bold: of the "
        "rows with the most seeds the best mean, and whatever is within one of its standard deviations. – was not "
        "run.\n",
    ]
    for family in FAMILIES:
        if select(rows, family=family):
            lines += [f"**{family.capitalize()}**\n", *table(rows, family), ""]
            lines += [verdict(rows, family), ""]
    return "\n".join([*lines, f"![{NETWORKS[network]}](methods_{network}.png)\n"])


def seeds_of(rows: list[dict]) -> str:
    cells = {(r["family"], r["method"], r["kept"]) for r in rows}
    counts = [sum((r["family"], r["method"], r["kept"]) == cell for r in rows) for cell in cells]
    return f"{min(counts)} to {max(counts)} seeds" if min(counts) != max(counts) else f"{max(counts)} seeds"


def by(recipe: tuple[int, int], row: dict) -> bool:
    return (row["epochs"], row["images"]) == recipe


def verdict(rows: list[dict], family: str) -> str:
    """Which methods are not above the random control by more than the noise of both."""
    lines = []
    for kept in sorted({r["kept"] for r in rows if r["family"] == family}, reverse=True):
        control = accuracies(select(rows, family=family, method="random", kept=kept))
        found = {m: accuracies(select(rows, family=family, method=m, kept=kept)) for m in FAMILIES[family]}
        if len(control) > 1:
            level = [m for m, values in found.items() if values and m not in CONTROLS and not is_above(values, control)]
            lines.append(f"at {kept:.0%} {', '.join(level) or 'none'}")
    if not lines:
        return ""
    return (
        f"Not above the random control by more than two standard errors of the difference: {'; '.join(lines)}. (A "
        "method with one seed is taken to vary as much as the control does.)"
    )


def is_above(values: list[float], control: list[float]) -> bool:
    spread = stdev(values) if len(values) > 1 else stdev(control)
    noise = (spread**2 / len(values) + stdev(control) ** 2 / len(control)) ** 0.5
    return mean(values) - mean(control) > 2 * noise


def search_lines(rows: list[dict]) -> str:
    lines = [
        "network | points asked | points lost on the images it chose by | on the test set | MACs | params | evaluations"
    ]
    lines += ["---" + "|---:" * 6]
    for r in sorted(rows, key=lambda r: (r["network"], r["seed"], r["drop"])):
        lines.append(
            f"{NETWORKS[r['network']]} | {r['drop']:g} | {100 * (r['before'] - r['after']):.2f} | "
            f"{100 * (r['whole'] - r['accuracy']):.2f} | {r['macs']:.0%} | {r['params']:.0%} | {r['evaluations']}"
        )
    note = (
        f"\nChosen by {rows[0]['images']:,} training images (on which a trained network is nearly always right), by "
        "`l2`, widths in multiples of 8, no training after it; evaluations that were in the cache are not counted."
    )
    return "\n".join([*lines, note])


PAGES = {
    "drop": {"units": ("drop", "gradual", "l2"), "weights": ("drop", "gradual", "magnitude")},
    "patterns": {"weights": ("window", "ck", "combined", "2:4", "magnitude")},
    "pca": {
        "units": ("l2 (pca)", "l2 (pca), reconstructed", "l2", "l2, reconstructed"),
        "weights": ("links", "magnitude"),
    },
    "iterative": {"units": ("iterative", "l2"), "weights": ("iterative", "magnitude (global)")},
    "slimming": {"units": ("slimming", "bn_scale", "l2")},
    "group_lasso": {"units": ("group lasso", "l2")},
    "distillation": {"units": ("l2, distilled", "l2")},
    "weights": {"weights": tuple(WEIGHTS)[1:8]},
    "criteria": {"units": tuple(UNITS)[1:16]},
}
"""Which rows the page of a method shows, beside the controls."""


def pages(results: dict, folder: Path) -> None:
    """docs/methods.md, and on the page of each method its rows."""
    networks = [n for n in NETWORKS if select(results["rows"], network=n)]
    text = [f"Written by `python benchmarks/methods.py` ({on(results['machine'])}).\n"]
    write(
        folder / "methods.md",
        ("<!-- benchmarks/methods.py -->", END),
        "\n".join(text + [page(results, n) for n in networks]),
    )
    for name, families in PAGES.items():
        if (folder / f"{name}.md").is_file():
            write(folder / f"{name}.md", (f"<!-- benchmarks/methods.py: {name} -->", END), excerpt(results, families))
    if results.get("search") and (folder / "search.md").is_file():
        write(folder / "search.md", ("<!-- benchmarks/methods.py: search -->", END), search_lines(results["search"]))


def excerpt(results: dict, families: dict) -> str:
    lines = []
    for network in NETWORKS:
        rows = select(results["rows"], network=network)
        if not rows:
            continue
        recipe = max({(r["epochs"], r["images"]) for r in rows}, key=lambda r: sum(by(r, row) for row in rows))
        rows = [r for r in rows if by(recipe, r)]
        for family, methods in families.items():
            if any(r["method"] in methods for r in select(rows, family=family)):
                lines += [f"{NETWORKS[network]}, test accuracy in per cent after the same short training:\n"]
                lines += [*table(rows, family, (*methods, *CONTROLS)), ""]
    lines.append("How they were measured, and all other methods: [methods.md](methods.md).")
    return "\n".join(lines)


def pictures(results: dict, folder: Path) -> None:
    """PNGs: accuracy against what is left; of one share alone, the methods in their order."""
    from matplotlib.figure import Figure

    for network, title in NETWORKS.items():
        rows = select(results["rows"], network=network)
        families = [f for f in FAMILIES if select(rows, family=f)]
        if not families:
            continue
        figure = Figure(figsize=(7 * len(families), 7), layout="constrained")
        for axes, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families):
            mine = select(rows, family=family)
            (draw_lines if len({r["kept"] for r in mine}) > 1 else draw_order)(axes, mine, family)
            axes.tick_params(labelsize=8)
            axes.grid(color="#e3e6ea", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{title}: all methods, the same training", fontsize=12)
        figure.savefig(folder / f"methods_{network}.png", dpi=85)


def draw_lines(axes, rows: list[dict], family: str) -> None:
    """Every method a line; those that nobody beats somewhere, and the controls, in colour; then the Pareto front."""
    key, kepts, lines = ("macs" if family == "units" else "density"), sorted({r["kept"] for r in rows}), {}
    for method in FAMILIES[family]:
        cells = [some for some in (select(rows, method=method, kept=k) for k in kepts) if some]
        if cells:
            lines[method] = [(100 * mean(r[key] for r in c), 100 * mean(accuracies(c))) for c in cells]
    ranked = sorted(lines, key=lambda m: -lines[m][0][1] if len(lines[m]) > 1 else 0)[:7]
    for method, line in lines.items():
        style = {"color": "#b8c4d4", "linewidth": 1, "zorder": 2}
        if method in CONTROLS:
            style = {"color": "#555555", "linewidth": 2, "label": f"{method} (control)", "linestyle": "--", "zorder": 3}
        elif method in ranked:
            style = {"color": f"C{ranked.index(method)}", "linewidth": 2, "label": method, "zorder": 3}
        axes.plot(*zip(*line), marker="o", markersize=4, **style)
    points = sorted(point for line in lines.values() for point in line)
    front = [p for p in points if not any(q != p and q[0] <= p[0] + 0.5 and q[1] >= p[1] for q in points)]
    axes.plot(*zip(*front), color="black", linewidth=0.8, zorder=4, label="nobody is better with less")
    lowest = [y for method, line in lines.items() if method != "scratch" for _, y in line]
    axes.set_ylim(min(lowest) - 2, max(lowest) + 2)
    axes.set_xlabel(f"% {HEADS[family]} left", fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def draw_order(axes, rows: list[dict], family: str) -> None:
    """The methods below each other, the best on top; a bar is the standard deviation over the seeds."""
    found = {m: accuracies(select(rows, method=m)) for m in FAMILIES[family] if select(rows, method=m)}
    order = sorted(found, key=lambda m: mean(found[m]))
    for place, method in enumerate(order):
        values = [100 * v for v in found[method]]
        error = stdev(values) if len(values) > 1 else 0
        color = "#555555" if method in CONTROLS else "#2f6db5"
        axes.errorbar(mean(values), place, xerr=error, fmt="o", markersize=5, color=color, capsize=2)
    axes.set_yticks(range(len(order)), [f"{m} (control)" if m in CONTROLS else m for m in order])
    axes.set_xlabel(f"test accuracy, %, at {rows[0]['kept']:.0%} {HEADS[family]}", fontsize=9)


# -- the command -----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", "--data", default=os.environ.get(datasets.VARIABLE))
    parser.add_argument("--network", choices=list(NETWORKS), help="default: resnet20")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--kept", nargs="+", type=float, help="share of the MACs or weights; default: 3 of each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of training, for every row")
    parser.add_argument("--images", type=int, default=5000, help="to train on, for every row")
    parser.add_argument("--pretrain-epochs", type=int, default=15, help="of networks that are not in DIR")
    parser.add_argument(
        "--work", default=str(Path.home() / ".cache/keras_prune/methods"), help="keeps trained networks"
    )
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--go-on", action="store_true", help="report a row that fails, and take the next")
    parser.add_argument("--search", action="store_true", help="only keras_prune.search")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the pages")
    parser.add_argument(
        "--tiny", action="store_true", help="try it: little of everything, LeNet-5 unless --network, temporary"
    )
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--docs", default=str(DOCS), help="folder of the pages")
    given = parser.parse_args()
    if given.tiny:
        folder = tempfile.mkdtemp()
        given.network = given.network or "lenet5"
        given.seeds, given.pretrain_epochs, given.images = [0], 1, 512
        given.kept, given.work, given.output, given.docs = given.kept or [0.5], folder, f"{folder}/methods.json", folder
        (Path(folder) / "methods.md").write_text(f"<!-- benchmarks/methods.py -->\n{END}\n")
    given.network = given.network or "resnet20"
    if not given.table and not given.data_dir:
        parser.error(f"--data-dir (or the environment variable {datasets.VARIABLE}) is needed")
    for name in given.methods or ():
        if not any(name in FAMILIES[family] for family in given.family):
            parser.error(f"--methods {name}: known are {', '.join(dict.fromkeys([*UNITS, *WEIGHTS]))}")
    return given


def main() -> None:
    given = arguments()
    if given.search:
        search(given)
    elif not given.table:
        measure(given)
    results = load(given.output)
    pages(results, Path(given.docs))
    pictures(results, Path(given.docs))
    if given.tiny:
        print((Path(given.docs) / "methods.md").read_text())
    print(f"wrote {given.output} and the pages in {given.docs}", file=sys.stderr)


if __name__ == "__main__":
    main()
