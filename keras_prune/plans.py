"""What a plan says: every group's width before and after, totals, fences, notes; and what can be done with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune import metrics, theory
from keras_prune.channels import Channels, Group
from keras_prune.reconstruction import reconstruct as reconstructed
from keras_prune.rules import Fence, Ids
from keras_prune.surgery import cut, reweighed, zeroed

TITLES = {"params": "params", "macs": "MACs", "memory": "activation bytes", "latency_ms": "latency, ms"}


@dataclass(frozen=True)
class GroupPlan:
    """One line of the plan: units that live and die together.

    Attributes:
        layers: names of the layers that make the units.
        before, after: width in channels of the layer that makes them.
        lowest_kept, highest_removed: scores, None where nothing was scored or removed.
        note: why it was left alone, if it was; with budget="pca" what its width explains.
    """

    layers: tuple[str, ...]
    before: int
    after: int
    lowest_kept: float | None
    highest_removed: float | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What stays and why. Made by `plan()`; nothing has been changed yet.

    Attributes:
        removed: ids of the units that leave.
        sentence: the arguments in words.
        asked, reached, largest: sparsity of the measure: asked, reached, and the largest possible here.
        groups: one entry per group.
        totals: measure -> (before, after); params, MACs, bytes of activations.
        fences: layers across which nothing is removed, and why.
        notes: whatever else a reader should know.
        drawn: of groups whose units were drawn, by group index: what reads them is multiplied.
    """

    sentence: str
    asked: float
    reached: float
    largest: float
    groups: tuple[GroupPlan, ...]
    totals: dict[str, tuple[float, float]]
    fences: tuple[Fence, ...]
    notes: tuple[str, ...]
    removed: Ids = field(repr=False)
    channels: Channels = field(repr=False)
    data: object = field(default=None, repr=False)  # inputs to reconstruct with, if that was asked for
    drawn: dict[int, theory.Draw] = field(default_factory=dict, repr=False)

    def multipliers(self) -> np.ndarray:
        """By what the kernels that read a unit are multiplied, shape (unit_count,): 0 = it leaves."""
        found = self.channels.alive(self.removed).astype(float)
        for k, draw in self.drawn.items():
            found[self.channels.groups[k].units] = draw.multipliers
        return found

    def cut(self) -> keras.Model:
        """The small model; its weights refitted to the original's values if the plan says so."""
        if self.data is not None:
            return reconstructed(self.channels, self.removed, self.data)
        return cut(self._weighed(), self.removed)

    def zero(self) -> keras.Model:
        """A zeroed copy of the model, of the old size: what the small one has to equal."""
        return zeroed(self._weighed(), self.removed)

    def _weighed(self) -> Channels:
        return Channels(reweighed(self.channels, self.multipliers())) if self.drawn else self.channels

    def to_json(self) -> str:
        """All of it but the ids, as JSON."""
        content = {
            "model": self.channels.model.name,
            "sentence": self.sentence,
            "asked": self.asked,
            "reached": self.reached,
            "largest": self.largest,
            "totals": {k: {"before": b, "after": a} for k, (b, a) in self.totals.items()},
            "groups": [vars(g) for g in self.groups],
            "fences": [vars(f) for f in self.fences],
            "notes": self.notes,
        }
        return json.dumps(content, indent=1, default=float)  # numpy numbers of a user's own measure

    def __str__(self) -> str:
        lines = [f"Plan for {self.channels.model.name}: {self.sentence}", ""]
        names = [_few(g.layers) for g in self.groups]
        wide = max([len(n) for n in names], default=0)
        lines.append(f"  {'layers':<{wide}}  width           scores")
        for name, g in zip(names, self.groups):
            width = f"{g.before} -> {g.after}" if g.after != g.before else f"{g.before}"
            score = (
                ""
                if g.highest_removed is None
                else f"removed up to {g.highest_removed:.3g}, kept from {g.lowest_kept:.3g}"
            )
            lines.append(f"  {name:<{wide}}  {width:<14}  {g.note or score}".rstrip())
        lines.append("")
        for key, (before, after) in self.totals.items():
            gone = 1 - after / before if before else 0.0
            was, now = metrics.amount(before), metrics.amount(after)
            lines.append(f"  {TITLES.get(key, key):<18} {was:>14} -> {now:>14}   {gone:6.1%} removed")
        lines.append(f"  asked {self.asked:.1%}, reached {self.reached:.1%}, largest possible {self.largest:.1%}")
        for fence in self.fences[:20]:
            lines.append(f"  fence: {fence}")
        if len(self.fences) > 20:
            lines.append(f"  ... and {len(self.fences) - 20} more fences")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _few(names: Sequence[str]) -> str:
    text = ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")
    return text if len(text) <= 60 else text[:57] + "..."


def described(
    channels: Channels, removed: Ids, *, scores, reasons, notes, measures, data=None, drawn=None, **said
) -> Plan:
    """The Plan that removes these units, with its tables.

    Args:
        scores, reasons: by group index.
        notes: what there is to say besides.
        measures: name -> function; their totals stand beside those of params, MACs and memory.
        data: inputs to reconstruct with, or None.
        drawn: as in Plan.
        said: `sentence`, `asked`, `reached`, `largest`.
    """
    notes = list(notes)
    if channels.uncounted:
        notes.append(f"MACs of {', '.join(channels.uncounted[:5])} are not counted: no rule for their types")
    if channels.has_unknown_lengths:
        notes.append(
            f"input axes without a fixed length were counted as {channels.assumed_length}; "
            "Channels(model, assumed_length=...) sets another"
        )
    return Plan(
        **said,
        groups=tuple(_group_plan(g, removed, scores.get(g.index), reasons.get(g.index, "")) for g in channels.groups),
        totals={name: (m(channels, ()), m(channels, removed)) for name, m in _totals(measures).items()},
        fences=tuple(channels.fences),
        notes=tuple(notes),
        removed=removed,
        channels=channels,
        data=data,
        drawn=drawn or {},
    )


def _totals(measures: dict[str, metrics.Measure]) -> dict[str, metrics.Measure]:
    return {"params": metrics.params, "macs": metrics.macs, "memory": metrics.memory, **measures}


def _group_plan(group: Group, removed: Ids, scores, note: str) -> GroupPlan:
    leaves = np.isin(group.units, removed)
    layers = tuple(dict.fromkeys(m.weight.layer.name for m in group.producers)) or ("(constant channels)",)
    kept = gone = None
    if scores is not None and (leaves & np.isfinite(scores)).any():  # not those that were gone before
        kept, gone = float(scores[~leaves].min()), float(scores[leaves].max())
    return GroupPlan(layers, len(group) * group.slices, int((~leaves).sum()) * group.slices, kept, gone, note)
