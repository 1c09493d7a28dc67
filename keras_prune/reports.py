"""Plans and networks as tables and pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_prune import metrics
from keras_prune.channels import Channels
from keras_prune.internals import layers_of
from keras_prune.layers import PSPLayer

_FORMATS = {"percent": "{:.2%}", "count": "{:,.0f}", "size": "{:,.1f}", "time": "{:.3f}"}


def before_after(rows: Iterable[tuple[str, float, float, str]]) -> str:
    """A table of (what, before, after, kind); kind is "percent", "count", "size" or "time".

    Percentages get their difference in points, everything else the ratio after ÷ before.
    """
    lines = [("", "before", "after", "")]
    for what, before, after, kind in rows:
        change = (
            f"{100 * (after - before):+.2f} points"
            if kind == "percent"
            else (f"x {after / before:.2f}" if before else "")
        )
        lines.append((what, _FORMATS[kind].format(before), _FORMATS[kind].format(after), change))
    wide = [max(len(line[k]) for line in lines) for k in range(4)]
    return "\n".join(f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}".rstrip() for a, b, c, d in lines)


def layer_widths(model: keras.Model) -> dict[str, int]:
    """Layer name -> number of output channels, for layers with a kernel."""
    widths: dict[str, int] = {}
    for weight in Channels(model).weights:
        if weight.is_kernel:
            axes = [a for a, reads in enumerate(weight.reads) if not reads and weight.axes[a] is not None]
            widths[weight.layer.name] = int(weight.variable.shape[axes[-1] if axes else -1])
    return widths


def paired_widths(before: keras.Model, after: keras.Model) -> list[tuple[str, int, int]]:
    """(layer, width before, width after): by name, or by place where names were given automatically and differ."""
    old, new = layer_widths(before), layer_widths(after)
    if set(old) != set(new) and len(old) == len(new):
        return [(name, width, other) for (name, width), other in zip(old.items(), new.values())]
    return [(name, old[name], new[name]) for name in old if name in new]


def compare(before: keras.Model, after: keras.Model) -> str:
    """Params, MACs, activation bytes, and the widths that differ."""
    a, b = Channels(before), Channels(after)
    measures = (("params", metrics.params), ("MACs", metrics.macs), ("activation bytes", metrics.memory))
    rows = [(name, measure(a, ()), measure(b, ()), "count") for name, measure in measures]
    changed = [(name, old, new, "count") for name, old, new in paired_widths(before, after) if old != new]
    return before_after(rows + changed)


def plot_widths(before: keras.Model, after: keras.Model, path: str | Path) -> None:
    """A PNG with one bar per layer: its width before, and how much of it is left."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    pairs = paired_widths(before, after)
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(pairs))
    axes.barh(places, [old for _, old, _ in pairs], color="#d5dae2", label="before")
    axes.barh(places, [new for _, _, new in pairs], color="#2f6db5", label="after")
    for place, (_, old, new) in zip(places, pairs):
        axes.text(old, place, f" {old} → {new}" if new != old else f" {old}", va="center", fontsize=8)
    axes.set_yticks(list(places), [name for name, _, _ in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("output channels")
    axes.set_xlim(0, 1.15 * max((old for _, old, _ in pairs), default=1))
    axes.set_title(f"{before.name}: width of each layer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def plot_curve(curve: Sequence[dict], path: str | Path, metric: str = "accuracy") -> None:
    """Draw the rounds of `ProvablePruning`: a metric against how much was removed, right after pruning and retrained.

    Args:
        curve: `ProvablePruning.curve`.
        path: of the picture, .png or .svg.
        metric: a name in the logs; the one of the validation data is taken if there is one.

    Raises:
        ValueError: no round has that metric.
    """
    from matplotlib.figure import Figure  # an import of 0.2 s that only pictures need

    kinds = {"right after pruning": [], "retrained": []}
    for entry in curve:
        for label, found in (("right after pruning", entry["pruned"]), ("retrained", entry["retrained"])):
            value = found.get(f"val_{metric}", found.get(metric))
            if value is not None:
                kinds[label].append((100 * entry["sparsity"], value))
    if not any(kinds.values()):
        known = sorted({name for entry in curve for name in (*entry["pruned"], *entry["retrained"])})
        raise ValueError(f"metric={metric!r} is in no round of this curve. Known: {', '.join(known) or 'none'}.")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, points in kinds.items():
        if points:
            axes.plot(*zip(*points), marker="o", markersize=4, label=label)
    axes.set_xlabel("removed (%)")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_alphas(model: keras.Model, path: str | Path) -> None:
    """A PNG with a histogram of the alphas of each PSP layer: what is pruned, what stays, and the threshold between.

    [Schindler, Roth, Pernkopf, Froening: Parameterized Structured Pruning for Deep Neural Networks, Figure 2.]
    `keras.callbacks.TensorBoard(histogram_freq=1)` logs the same histograms, without thresholds, on its own.

    Args:
        model: any model with PSP layers, at any depth.
        path: the file; it is replaced in one go, so that it can be looked at while training writes it.

    Raises:
        ValueError: there are no PSP layers.
    """
    from matplotlib.figure import Figure

    place = {id(v): k for k, v in enumerate(model.weights)}
    alphas = [
        (place[id(alpha)], f"{layer.name} · {structure}", *_numbers(alpha, layer.thresholds[structure]))
        for layer in layers_of(model)
        if isinstance(layer, PSPLayer)
        for structure, alpha in layer.alphas.items()
    ]
    if not alphas:
        raise ValueError(f"{model.name} has no PSP layers, so there are no alphas to draw.")
    columns = min(4, len(alphas))
    rows = math.ceil(len(alphas) / columns)
    width, height = 3 * columns, 1.7 * rows + 0.6
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.4 / width, 0.3 / height, 1 - 0.15 / width, 1 - 0.75 / height, 0.25, 0.65)
    for number, (_, name, values, threshold) in enumerate(sorted(alphas)):
        axes = figure.add_subplot(rows, columns, number + 1)
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        marks = [side for side, seen in ((-threshold, low < 0), (threshold, high > 0)) if seen]
        low, high = min(low, *marks, 0.0), max(high, *marks, 0.0)
        room = 0.05 * (high - low) or 1.0
        pruned = np.abs(values) < threshold
        bins = np.linspace(low - room, high + room, 41)
        for part, color in ((values, "#c9ced6"), (values[~pruned], "#2f6db5")):
            axes.stairs(np.histogram(part, bins)[0], bins, fill=True, color=color)
        for side in marks:
            axes.axvline(side, color="#c0392b", linewidth=1)
        axes.set_title(f"{name}  {pruned.sum()} of {values.size} pruned", fontsize=7)
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{model.name}: alphas (pruned grey, kept blue) and thresholds (red)", fontsize=9)
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _numbers(alpha, threshold) -> tuple[np.ndarray, float]:
    values = keras.ops.convert_to_numpy(alpha).ravel().astype(np.float64)
    return values, float(keras.ops.convert_to_numpy(threshold))
