"""Plans and networks as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import keras

from keras_prune import metrics
from keras_prune.channels import Channels

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
