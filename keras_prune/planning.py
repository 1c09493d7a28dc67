"""The user's sentence: remove this much of that measure, by this criterion, with this budget.

`plan()` decides and changes nothing; the `Plan` prints itself, cuts, zeroes, and saves itself. `prune` = plan + cut.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune import budgets, criteria, metrics, schedules, theory
from keras_prune.channels import Channels, Group
from keras_prune.internals import layers_of
from keras_prune.probes import unlabelled
from keras_prune.reconstruction import reconstruct as reconstructed
from keras_prune.rules import Fence, Ids
from keras_prune.scoring import DELTA, READERS, scores_of
from keras_prune.sensitivity import logarithms
from keras_prune.surgery import check_finite, cut, dead_units, reweighed, zeroed
from keras_prune.widths import Choice


@dataclass(frozen=True)
class GroupPlan:
    """One line of the plan: units that live and die together.

    Attributes:
        layers: names of the layers that make the units.
        before, after: width in channels of the layer that makes them.
        lowest_kept, highest_removed: scores, None where nothing was scored or removed.
        note: why it was left alone, if it was.
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


REFINED = 6
"""How often widths are chosen at most, where a measure was an estimate and is corrected at the widths chosen."""
TITLES = {"params": "params", "macs": "MACs", "memory": "activation bytes", "latency_ms": "latency, ms"}


def _few(names: Sequence[str]) -> str:
    text = ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")
    return text if len(text) <= 60 else text[:57] + "..."


def plan(
    model: keras.Model | Channels,
    sparsity: float | None = None,
    *,
    target: dict[str | metrics.Measure, float] | None = None,
    measure: str | metrics.Measure = "macs",
    criterion: str | criteria.Criterion = "l2",
    budget: str | budgets.Budget | None = None,
    round_to: int = 8,
    protect: Sequence[str | keras.layers.Layer] = (),
    data=None,
    reconstruct: bool = False,
    mode: str = "deterministic",
    delta: float = DELTA,
    seed: int | None = None,
    already: Ids | None = None,
) -> Plan:
    """Decide which units leave. Changes nothing.

    Args:
        model: a built Functional or Sequential model, or its `Channels`.
        sparsity: fraction of the measure to remove, in [0, 1). Default: 0.5, or what `target` needs.
        target: instead of it, what may be left: `{"macs": 50e6, "params": 250_000}` (numbers from 1 up),
            `{"macs": 0.5}` (a fraction), `{"latency_ms": 5.0}` where tflite_export is installed, `{table: 5.0}` with a
            function. All of them are met.
        measure: "macs", "params", "memory", "units", or a function (channels, removed) -> number, such as
            `tflite_export.LatencyTable`. For `sparsity`.
        criterion: "l1", "l2", "linf", "fpgm", "bn_scale", "random", "taylor", "obs", "pfp" and "pfp_max" (these four
            need `data`), or a function (units, features) -> (units,).
        budget: "global" (the default), "uniform", "error_bound" (every layer gets the same error bound:
            `budgets.error_bound`), "greedy" (the default with `target`: where a step costs least of the scores for what
            it saves of the measure, so that a group stops at the edge of a stair), or a function
            (scores, amount) -> removed.
        round_to: widths are multiples of this, or stay whole; 1 for no rounding. Off the hardware's grid a smaller
            layer is often slower.
        protect: layers, names, or name patterns ("head_*") whose output channels all stay.
        data: labelled data for "taylor": (x, y) arrays or an iterable of such batches; inputs alone for "obs", "pfp",
            and `reconstruct`, as the model takes them.
        reconstruct: let `cut()` refit the remaining weights to the original network's values on `data`, after
            whichever criterion: no labels, no training.
        mode: "deterministic", the units with the highest scores stay; "random" and "mixed", for "pfp": units are drawn
            with probabilities in proportion to their scores, and what reads a drawn unit is multiplied so that all
            sums stay what they were on average (`theory.draw`). Widths are then as many as happened to be drawn.
        delta: accepted probability of failure: of "pfp", which takes as many of the samples as `sample_size` says, and
            of "error_bound".
        seed: for "random", as a criterion and as a mode.
        already: ids of units that are removed in any case (pruning goes on where it stopped); they count as removed.
            Default: those whose weights are all zero in the model.

    Returns:
        A Plan. The sparsity is met within one rounding step of one group, or a note says why not.

    Raises:
        TypeError, ValueError: a model that cannot be walked, weights that are not finite, or an argument out of range.

    Example:
        >>> print(plan(model, 0.5, measure="macs", criterion="fpgm"))     # doctest: +SKIP
        >>> small = plan(model, 0.5, measure="macs", criterion="fpgm").cut()     # doctest: +SKIP
    """
    if target is not None and sparsity is not None:
        raise ValueError(f"plan was given sparsity={sparsity} and target={target!r}; expected one of them.")
    if target is None:
        sparsity = schedules.check_sparsity(0.5 if sparsity is None else sparsity, "plan")
    if budget is None:
        budget = "global" if target is None else "greedy"
    check_round_to(round_to, "plan")
    measure_function, budget_function = metrics.get(measure), budgets.get(budget)
    criteria.get(criterion, seed)
    channels = model if isinstance(model, Channels) else Channels(model)
    check_finite(channels.model)
    if not channels.groups:
        raise ValueError(
            "This model has nothing to prune: "
            + ("; ".join(str(f) for f in channels.fences[:5]) or "its only layers are its inputs and outputs.")
        )
    check_mode(mode, delta, criterion, reconstruct)
    by_readers = isinstance(criterion, str) and criterion in READERS
    inputs = unlabelled(channels.model, data) if reconstruct or by_readers else None
    reasons = protected(channels, protect)
    already = dead_units(channels, strict=True) if already is None else already
    alive = channels.alive(already)
    scores, samples = scores_of(channels, criterion, data, reasons, alive, inputs=inputs, delta=delta, seed=seed)
    free = [g for g in channels.groups if g.index not in reasons]
    if not free:
        raise ValueError(
            f"Nothing is left to prune with protect={list(protect)!r}: {'; '.join(dict.fromkeys(reasons.values()))}."
        )
    free_scores = [scores[g.index] for g in free]
    if budget == "error_bound":
        budget_function = functools.partial(budgets.error_bound, logarithms=logarithms(channels, free, delta))
    measure_function, limits = _goal(channels, sparsity, target, measure_function)
    asked = sparsity if target is None else max(0.0, 1 - 1 / limits(channels))
    choice = Choice(channels, free, free_scores, budget_function, measure_function, int(round_to), already)
    tried = []
    for _ in range(REFINED):
        if budget == "greedy":
            counts, largest = choice.greedy(functools.partial(limits.excess, channels)), choice.largest()
        else:
            counts, largest = choice.search(asked, at_least=target is not None)
        off = limits.refine(channels, choice.removed(counts))
        over = (target is not None or budget == "greedy") and limits.excess(channels, choice.removed(counts)) > 0
        tried.append((over, abs(asked - choice.sparsity(counts)), counts))
        is_settled = off is None or off <= metrics.REFINE and not over
        if is_settled:
            break
    over, _, counts = min(tried)
    drawn = {} if mode == "deterministic" else choice.drawn(counts, mode, seed)
    reached = choice.sparsity(counts, drawn)
    by, how = name_of(criterion), name_of(budget)
    by += f" on {samples:,} samples" if by_readers else ""
    goal = f"remove {sparsity:.0%} of the {name_of(measure)}" if target is None else f"keep {limits}"
    refitted = f", refitted on {len(keras.tree.flatten(inputs)[0]):,} samples" if reconstruct else ""
    return described(
        channels,
        choice.removed(counts, drawn),
        sentence=f"{goal}, by {by}, {how} budget, widths in multiples of {round_to}"
        + (f", units drawn ({mode}): widths as they came" if drawn else "")
        + refitted,
        asked=float(asked),
        reached=reached,
        largest=largest,
        scores=scores,
        reasons=reasons,
        notes=_notes_of_draws(asked, reached) if drawn else choice.explain(asked, reached, largest, is_settled, over),
        measures={label: function for label, (function, _) in limits.limits.items()},
        data=inputs if reconstruct else None,
        drawn=drawn,
    )


def _goal(channels, sparsity, target, measure) -> tuple[metrics.Measure, metrics.Limits]:
    """(measure whose sparsity is asked for, the same as limits): of a target that is what is exceeded most."""
    if target is not None:
        limits = metrics.limits(channels, target)
        return limits, limits
    left = (1 - sparsity) * measure(channels, ())
    return measure, metrics.Limits({name_of(measure): (measure, left)})


def _notes_of_draws(asked: float, reached: float) -> list[str]:
    if abs(asked - reached) <= 0.02:
        return []
    return [f"asked {asked:.1%}, reached {reached:.1%}: units were drawn, and another seed gives other widths"]


def check_round_to(round_to, where: str) -> None:
    """Raise a ValueError unless widths can be multiples of it."""
    if isinstance(round_to, bool) or not isinstance(round_to, numbers.Integral) or round_to < 1:
        raise ValueError(
            f"round_to={round_to!r} was passed to {where}; expected a whole number from 1 up, for example 8."
        )


def check_mode(mode, delta, criterion, reconstruct: bool = False, where: str = "plan") -> None:
    """Raise a ValueError unless units can be chosen in this way."""
    if mode not in theory.MODES:
        raise ValueError(f"mode={mode!r} was passed to {where}; known: {', '.join(theory.MODES)}.")
    if not isinstance(delta, numbers.Real) or not 0 < delta < 1:
        raise ValueError(
            f"delta={delta!r} was passed to {where}; expected a probability above 0 and below 1, such as 1e-16."
        )
    is_drawable = criterion in ("pfp", "pfp_max")
    if mode != "deterministic" and (reconstruct or not is_drawable):
        what = f"criterion={name_of(criterion)!r}" if not is_drawable else "reconstruct=True"
        raise ValueError(
            f"mode={mode!r} was passed to {where} with {what}: units are drawn with the probabilities that "
            "criterion='pfp' gives them, and the weights that read them are set by the draw. Use mode='deterministic'."
        )


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


def prune(model: keras.Model, sparsity: float = 0.5, **arguments) -> keras.Model:
    """The small model: `plan(model, sparsity, ...)` and its cut. Arguments as for `plan`."""
    return plan(model, sparsity, **arguments).cut()


def name_of(choice) -> str:
    """What a name or a function is called."""
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)


def _totals(measures: dict[str, metrics.Measure]) -> dict[str, metrics.Measure]:
    return {"params": metrics.params, "macs": metrics.macs, "memory": metrics.memory, **measures}


def _group_plan(group: Group, removed: Ids, scores, note: str) -> GroupPlan:
    leaves = np.isin(group.units, removed)
    layers = tuple(dict.fromkeys(m.weight.layer.name for m in group.producers)) or ("(constant channels)",)
    kept = gone = None
    if scores is not None and (leaves & np.isfinite(scores)).any():  # not those that were gone before
        kept, gone = float(scores[~leaves].min()), float(scores[leaves].max())
    return GroupPlan(layers, len(group) * group.slices, int((~leaves).sum()) * group.slices, kept, gone, note)


def named_layers(channels: Channels, protect) -> set[int]:
    """id of all layers that `protect` names, and of those inside them.

    Args:
        protect: layers, names, or name patterns; one of them or several.

    Raises:
        TypeError, ValueError: it holds something else, or fits no layer with weights.
    """
    if protect is None or isinstance(protect, (str, keras.layers.Layer)):
        protect = () if protect is None else (protect,)
    layers = layers_of(channels.model)[1:]
    chosen: set[int] = set()
    for item in protect:
        if not isinstance(item, (str, keras.layers.Layer)):
            raise TypeError(f"protect holds {item!r}; expected layers, layer names or patterns such as 'head_*'.")
        if isinstance(item, str):
            found = [layer for layer in layers if fnmatch.fnmatch(layer.name, item)]
        else:
            found = [layer for layer in layers if layer is item]
        inside = {id(layer) for outer in found for layer in layers_of(outer)}
        if not any(id(w.layer) in inside for w in channels.weights):
            names = list(dict.fromkeys(w.layer.name for w in channels.weights))
            what = repr(item) if isinstance(item, str) else f"the layer {item.name!r}"
            raise ValueError(
                f"protect={what} fits no layer with weights in this model. Layers: {', '.join(names[:20])}"
                f"{', ...' if len(names) > 20 else ''}"
            )
        chosen |= inside
    return chosen


def protected(channels: Channels, protect) -> dict[int, str]:
    """Group index -> why it stays. A protected model or wrapper protects every layer inside it."""
    chosen = named_layers(channels, protect)
    return {
        group.index: "protected"
        for group in channels.groups
        if any(not m.reads and id(m.weight.layer) in chosen for m in group.members)
    }
