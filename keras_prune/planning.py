"""The user's sentence: remove this much of that measure, by this criterion, with this budget.

`plan()` decides and changes nothing; the `Plan` prints itself, cuts, zeroes, and saves itself. `prune` = plan + cut.
"""

from __future__ import annotations

import fnmatch
import functools
import numbers
from collections.abc import Sequence

import keras

from keras_prune import budgets, criteria, metrics, schedules, theory
from keras_prune.channels import Channels
from keras_prune.internals import layers_of
from keras_prune.plans import Plan, described
from keras_prune.probes import unlabelled
from keras_prune.program import samples_in
from keras_prune.responses import spectra
from keras_prune.rules import Ids
from keras_prune.scoring import DELTA, READERS, scores_of
from keras_prune.sensitivity import logarithms
from keras_prune.surgery import check_finite, dead_units
from keras_prune.widths import Choice

REFINED = 6
"""How often widths are chosen at most, where a measure was an estimate and is corrected at the widths chosen."""


def plan(
    model: keras.Model | Channels,
    sparsity: float | None = None,
    *,
    target: dict[str | metrics.Measure, float] | None = None,
    measure: str | metrics.Measure = "macs",
    criterion: str | criteria.Criterion = "l2",
    budget: str | budgets.Budget | None = None,
    explained: float | None = None,
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
        criterion: "l1", "l2", "linf", "l1_folded", "l2_folded", "fpgm", "fpgm_mix", "bn_scale", "random"; "taylor",
            "taylor_weight", "obs", "thinet", "pfp", "pfp_max", "hrank", "apoz" (these need `data`); or
            a function (units, features) -> (units,).
        budget: "global" (the default), "uniform", "error_bound" (every layer gets the same error bound:
            `budgets.error_bound`), "greedy" (the default with `target`: where a step costs least of the scores for what
            it saves of the measure, so that a group stops at the edge of a stair), "pca" (every group's width explains
            the same fraction of the variance of its responses: `responses.spectra`; needs `data`), or a function
            (scores, amount) -> removed.
        explained: with budget="pca" and instead of a sparsity, that fraction, above 0 and up to 1: all widths in one
            shot, each as many units as principal components it takes, rounded up to `round_to`. 0.95 to 0.999.
        round_to: widths are multiples of this, or stay whole; 1 for no rounding. Off the hardware's grid a smaller
            layer is often slower.
        protect: layers, names, or name patterns ("head_*") whose output channels all stay.
        data: labelled data for "taylor...": (x, y) arrays or an iterable of such batches; inputs alone for the
            others that need data, for budget="pca", and for `reconstruct`, as the model takes them.
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
        A Plan. The sparsity is met within one rounding step of one group, or a note says why not; with `explained` no
        sparsity is asked for, and `asked` is what was reached.

    Raises:
        TypeError, ValueError: a model that cannot be walked, weights that are not finite, or an argument out of range.

    Example:
        >>> print(plan(model, 0.5, measure="macs", criterion="fpgm"))     # doctest: +SKIP
        >>> small = plan(model, 0.5, measure="macs", criterion="fpgm").cut()     # doctest: +SKIP
    """
    if target is not None and sparsity is not None:
        raise ValueError(f"plan was given sparsity={sparsity} and target={target!r}; expected one of them.")
    _check_explained(explained, budget, sparsity, target, data)
    if explained is not None:
        sparsity = 0.0
    elif target is None:
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
    inputs = unlabelled(channels.model, data) if reconstruct or by_readers or budget == "pca" else None
    reasons = protected(channels, protect)
    already = dead_units(channels, strict=True) if already is None else already
    alive = channels.alive(already)
    scores, samples = scores_of(channels, criterion, data, reasons, alive, inputs=inputs, delta=delta, seed=seed)
    free = [g for g in channels.groups if g.index not in reasons]
    found = {}
    if budget == "pca":
        found, unknown = spectra(channels, inputs, groups=free, alive=alive)
        reasons.update(unknown)
        free = [g for g in free if g.index in found]
    if not free:
        raise ValueError(
            f"Nothing is left to prune with protect={list(protect)!r}: {'; '.join(dict.fromkeys(reasons.values()))}."
        )
    free_scores = [scores[g.index] for g in free]
    if budget == "error_bound":
        budget_function = functools.partial(budgets.error_bound, logarithms=logarithms(channels, free, delta))
    elif budget == "pca":
        known = [found[g.index] for g in free]
        budget_function = functools.partial(budgets.pca, spectra=known, explained=explained)
    measure_function, limits = _goal(channels, sparsity, target, measure_function)
    asked = sparsity if target is None else max(0.0, 1 - 1 / limits(channels))
    choice = Choice(channels, free, free_scores, budget_function, measure_function, int(round_to), already)
    if explained is None:
        counts, is_settled, over = _searched(choice, limits, asked, target is not None, budget == "greedy")
    else:
        counts = choice.counts(1.0, up=True)
    largest = choice.largest()
    drawn = {} if mode == "deterministic" else choice.drawn(counts, mode, seed)
    reached = choice.sparsity(counts, drawn)
    by, how = name_of(criterion), f"{name_of(budget)} budget"
    by += f" on {samples:,} samples" if by_readers else ""
    how += f" on {samples_in(inputs):,} samples" if budget == "pca" else ""
    goal = f"remove {sparsity:.0%} of the {name_of(measure)}" if target is None else f"keep {limits}"
    if explained is not None:
        goal = f"explain {explained:.6g} of the variance of the responses"
    refitted = f", refitted on {samples_in(inputs):,} samples" if reconstruct else ""
    if explained is not None:
        asked, notes = reached, []
    elif drawn:
        notes = _notes_of_draws(asked, reached)
    else:
        notes = choice.explain(asked, reached, largest, is_settled, over)
    widths = {g.index: _explains(found[g.index], n, explained) for g, n in zip(free, counts) if g.index in found}
    return described(
        channels,
        choice.removed(counts, drawn),
        sentence=f"{goal}, by {by}, {how}, widths in multiples of {round_to}"
        + (f", units drawn ({mode}): widths as they came" if drawn else "")
        + refitted,
        asked=float(asked),
        reached=reached,
        largest=largest,
        scores=scores,
        reasons={**reasons, **widths},
        notes=notes,
        measures={label: function for label, (function, _) in limits.limits.items()},
        data=inputs if reconstruct else None,
        drawn=drawn,
    )


def _searched(choice: Choice, limits, asked: float, is_target: bool, is_greedy: bool) -> tuple[list[int], bool, bool]:
    """(counts, whether the measure is no longer corrected, whether a limit is exceeded)."""
    channels, tried = choice.channels, []
    for _ in range(REFINED):
        if is_greedy:
            counts = choice.greedy(functools.partial(limits.excess, channels))
        else:
            counts, _ = choice.search(asked, at_least=is_target)
        off = limits.refine(channels, choice.removed(counts))
        over = (is_target or is_greedy) and limits.excess(channels, choice.removed(counts)) > 0
        tried.append((over, abs(asked - choice.sparsity(counts)), counts))
        is_settled = off is None or off <= metrics.REFINE and not over
        if is_settled:
            break
    over, _, counts = min(tried)
    return counts, is_settled, over


def _explains(found: list[budgets.Spectrum], units: int, explained: float | None) -> str:
    """What a group's width has to do with the components of what makes it, in words."""
    if explained is None:
        return f"explains {100 * min(each.share(units) for each in found):.6g}% of the variance"
    most = max(found, key=lambda each: each.units(explained))
    count = budgets.components(most.eigenvalues, explained)
    which = f" of {most.name}" if len(found) > 1 else ""
    return f"{count} of {len(most.eigenvalues)} components{which} explain {explained:.6g}"


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


def _check_explained(explained, budget, sparsity, target, data) -> None:
    if budget == "pca" and data is None:
        raise ValueError(
            "budget='pca' looks at what the units answer: pass data=, unlabelled inputs of shape (samples, ...) as the "
            "model takes them, plan(model, budget='pca', data=x, explained=0.99)."
        )
    if explained is None:
        return
    if budget != "pca":
        raise ValueError(
            f"explained={explained!r} was passed to plan with budget={budget!r}: it belongs to budget='pca', which "
            "takes the widths from the variance of the responses."
        )
    if isinstance(explained, bool) or not isinstance(explained, numbers.Real) or not 0 < explained <= 1:
        raise ValueError(
            f"explained={explained!r} was passed to plan; expected a fraction of the variance above 0 and up to 1, "
            "such as 0.99."
        )
    if sparsity is not None or target is not None:
        what = f"sparsity={sparsity!r}" if target is None else f"target={target!r}"
        raise ValueError(
            f"plan was given explained={explained!r} and {what}; expected one of them: either decides all widths."
        )


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


def prune(model: keras.Model, sparsity: float = 0.5, **arguments) -> keras.Model:
    """The small model: `plan(model, sparsity, ...)` and its cut. Arguments as for `plan`."""
    return plan(model, sparsity, **arguments).cut()


def name_of(choice) -> str:
    """What a name or a function is called."""
    choice = choice.func if isinstance(choice, functools.partial) else choice
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)


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
