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


def compare(before: keras.Model, after: keras.Model) -> str:
    """Params, MACs, activation bytes, and the widths that differ."""
    a, b = Channels(before), Channels(after)
    rows = [
        (name, measure(a, ()), measure(b, ()), "count")
        for name, measure in (("params", metrics.params), ("MACs", metrics.macs), ("activation bytes", metrics.memory))
    ]
    old, new = layer_widths(before), layer_widths(after)
    changed = [(name, old[name], new[name], "count") for name in old if name in new and old[name] != new[name]]
    return before_after(rows + changed)


def plot_widths(before: keras.Model, after: keras.Model, path: str | Path) -> None:
    """A PNG with one bar per layer: its width before, and how much of it is left."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    old, new = layer_widths(before), layer_widths(after)
    names = [name for name in old if name in new]
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(names))
    axes.barh(places, [old[n] for n in names], color="#d5dae2", label="before")
    axes.barh(places, [new[n] for n in names], color="#2f6db5", label="after")
    for place, name in zip(places, names):
        axes.text(old[name], place, f" {old[name]} → {new[name]}", va="center", fontsize=8)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("output channels")
    axes.set_xlim(0, 1.15 * max((old[n] for n in names), default=1))
    axes.set_title(f"{before.name}: width of each layer")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
