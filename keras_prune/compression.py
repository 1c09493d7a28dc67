"""A smaller network in minutes: no labels, no training.

`compress` = measure what each unit's removal costs (`surgeon`), take where it costs least for what it saves
(`allocation`), cut, refit what is left to the original network's values (`reconstruction`), and check the result on
samples that were held back.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import keras
import numpy as np

from keras_prune import metrics, schedules
from keras_prune.allocation import Search
from keras_prune.answers import Exam
from keras_prune.channels import Channels
from keras_prune.distillation import DistillReport, distill
from keras_prune.internals import inputs_of
from keras_prune.planning import REFINED, name_of, protected
from keras_prune.plans import TITLES, Plan, described
from keras_prune.probes import unlabelled
from keras_prune.program import Program, batches_of
from keras_prune.reconstruction import reconstruct
from keras_prune.reports import before_after
from keras_prune.surgeon import LOOKS, Curve, curves
from keras_prune.surgery import check_finite, dead_units, settle

AT_MOST = 4096
"""Samples at most that are used."""
HELD_BACK = 0.2
"""Fraction of the samples that nothing is fitted to: the result is measured on them."""
EXAMINED = 256
"""Samples at most on which the network's own output is looked at while widths are chosen."""
EXAM_MACS = 1.5e12
"""Multiply-accumulates at most that these looks take altogether: a few minutes on two cores."""


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did, measured on samples that were held back; prints itself.

    Attributes:
        plan: widths, totals, fences.
        samples, held_back: numbers of samples fitted to, and measured on.
        divergence: of the small network's answers from the original's, mean per held-back sample: Kullback-Leibler in
            nats; for outputs that are no distribution the squared error ÷ the variance.
        agreement: fraction of decisions (class, or yes / no) that are the original's; None if it decides nothing.
        accuracy: (original, small) on the held-back samples, if labels were given.
        seconds: wall-clock of the whole call.
        distilled: report of the distillation, if it was asked for.
        notes: what else a reader should know.
    """

    plan: Plan = field(repr=False)
    samples: int
    held_back: int
    divergence: float
    agreement: float | None
    accuracy: tuple[float, float] | None
    seconds: float
    distilled: DistillReport | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [(TITLES.get(k, k), before, after, "count") for k, (before, after) in self.plan.totals.items()]
        if self.agreement is not None:
            rows.insert(0, ("agreement with the original", 1.0, self.agreement, "percent"))
        if self.accuracy is not None:
            rows.insert(0, ("accuracy", *self.accuracy, "percent"))
        lines = [str(self.plan), "", before_after(rows), ""]
        lines.append(
            f"{self.seconds:.0f} s; fitted to {self.samples:,} unlabelled samples, measured on {self.held_back:,} "
            f"others (divergence {self.divergence:.3g})"
        )
        if self.distilled:
            lines.append(str(self.distilled))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """All of it as JSON."""
        content = {k: v for k, v in vars(self).items() if k not in ("plan", "distilled")}
        content["distilled"] = asdict(self.distilled) if self.distilled else None
        return json.dumps({**content, "plan": json.loads(self.plan.to_json())}, indent=1, default=float)


def compress(
    model: keras.Model,
    data,
    *,
    sparsity: float | None = None,
    target: dict[str | metrics.Measure, float] | None = None,
    measure: str | metrics.Measure = "macs",
    round_to: int = 8,
    protect: Sequence[str | keras.layers.Layer] = (),
    labels=None,
    search_minutes: float = 0.0,
    distill_minutes: float = 0.0,
    memory: int = 2**31,
    seed: int = 0,
    progress: bool = False,
    report: bool = False,
):
    """Make a trained network smaller with a few hundred unlabelled samples.

    Args:
        model: a built, trained Functional or Sequential model; PSP layers are settled first. It is not changed.
        data: inputs as the model takes them (preprocessed, if it does not do that itself): arrays of shape
            (samples, ...), or an iterable of batches; of (x, y) the labels are not used. 128 samples do something, 512
            to 4,096 are better; `keras_prune.samples.read` reads folders of images and data sets.
        sparsity: fraction of `measure` to remove, in [0, 1).
        target: instead of it, what may be left: `{"macs": 0.5}` (a fraction) or `{"macs": 50e6, "params": 250_000}`
            (numbers from 1 up); several at once are all met. The limit of a function, `{latency: 0.8}`, is a number as
            it stands.
        measure: "macs", "params", "memory", or a function (channels, removed) -> number, for `sparsity`.
        round_to: widths are multiples of this, or stay whole; 1 for no rounding.
        protect: layers, names, or name patterns that keep their width.
        labels: integers, shape (samples,), only to print the accuracy as well; with arrays as data.
        search_minutes: then look for better widths near the chosen ones for so long.
        distill_minutes: then let the original teach the small network for so long, without labels.
        memory: bytes for sums and kept values.
        seed: of all random choices.
        progress: show progress bars.
        report: also return a `CompressReport`.

    Returns:
        The small model, or (small model, report).

    Raises:
        TypeError, ValueError: a model that cannot be walked, an argument out of range, data that does not fit.

    Example:
        >>> small, report = compress(model, x, target={"macs": 0.5}, report=True)     # doctest: +SKIP
    """
    began = time.perf_counter()
    check_finite(model)
    model = settle(model)
    channels = Channels(model)
    limits = _limits(channels, sparsity, target, measure)
    inputs = unlabelled(model, data, AT_MOST)
    labels = _checked_labels(labels, data, inputs)
    fitted, held = _split(len(keras.tree.flatten(inputs)[0]), seed)
    inside, outside = (_part(model, inputs, part) for part in (fitted, held))
    looks = len(LOOKS) * max(1, len(channels.groups) * metrics.macs(channels, ()))
    some = _part(model, inside, slice(0, int(min(EXAMINED, max(32, EXAM_MACS / looks)))))
    reasons = protected(channels, protect)
    already = dead_units(channels, strict=True)
    found = _curves(channels, inside, some, reasons, already, memory, seed, progress)
    search = _allocated(channels, found, limits, round_to, already)
    notes = [_search(channels, search, inside, search_minutes, seed)] if search_minutes > 0 else []
    plan = _as_plan(channels, search, found, limits, round_to, reasons, notes)
    small = reconstruct(channels, plan.removed, inside, memory=memory, seed=seed, progress=progress)
    distilled = None
    if distill_minutes > 0:
        small, distilled = distill(small, model, inside, minutes=distill_minutes, seed=seed, progress=progress)
    if not report:
        return small
    exam = Exam(small, model, keras.tree.flatten(outside), 64)
    divergence, agreement = exam.first
    accuracy = None if labels is None else _accuracies(exam, labels[held])
    result = CompressReport(
        plan=plan,
        samples=len(fitted),
        held_back=len(held),
        divergence=divergence,
        agreement=agreement,
        accuracy=accuracy,
        seconds=time.perf_counter() - began,
        distilled=distilled,
        notes=() if labels is None or accuracy else ("no accuracy: the first output is no choice of one class",),
    )
    return small, result


def _limits(channels, sparsity, target, measure) -> metrics.Limits:
    if (sparsity is None) == (target is None):
        raise ValueError("compress needs either sparsity= (fraction to remove) or target= (what may be left).")
    if target is None:
        function = metrics.get(measure)
        kept = 1 - schedules.check_sparsity(sparsity, "compress")
        return metrics.Limits({name_of(measure): (function, kept * function(channels, ()))})
    return metrics.limits(channels, target)


def _checked_labels(labels, data, inputs):
    if labels is None and isinstance(data, tuple) and len(data) == 2 and np.ndim(data[1]) == 1:
        if np.issubdtype(np.asarray(data[1]).dtype, np.integer):  # other numbers are no classes
            labels = data[1]
    if labels is None:
        return None
    labels, samples = np.asarray(labels), len(keras.tree.flatten(inputs)[0])
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or len(labels) < samples or (len(labels) > samples and samples < AT_MOST):
        raise ValueError(f"labels of shape {labels.shape} for {samples} samples; expected one integer for each.")
    return labels[:samples]


def _split(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(places to fit to, places to measure on)."""
    if samples < 8:
        raise ValueError(f"data holds {samples} samples; expected 8 or more, better 512.")
    order = np.random.default_rng(seed).permutation(samples)
    held = min(max(2, round(HELD_BACK * samples)), 1000)
    return order[held:], order[:held]


def _part(model, inputs, places):
    return keras.tree.pack_sequence_as(inputs_of(model), [a[places] for a in keras.tree.flatten(inputs)])


def _curves(channels, inside, some, reasons: dict, already, memory, seed, progress) -> list[Curve]:
    """The curve of every group that may shrink; why the others may not is added to `reasons`."""
    alive = channels.alive(already)
    groups = [g for g in channels.groups if g.index not in reasons and alive[g.units].any()]
    found, unknown = curves(
        channels, inside, groups=groups, exam_data=some, memory=memory, seed=seed, progress=progress
    )
    reasons.update(unknown)
    if not found:
        raise ValueError(f"Nothing can be cut here: {'; '.join(dict.fromkeys(reasons.values())) or 'no groups'}.")
    return list(found.values())


def _allocated(channels, found: list[Curve], limits, round_to, already) -> Search:
    excess = functools.partial(limits.excess, channels)
    groups, orders, costs = [c.group for c in found], [c.order for c in found], [c.damage for c in found]
    for _ in range(REFINED):
        search = Search(groups, orders, costs, excess, round_to, already)
        search.settle()
        off = limits.refine(channels, search.leaving(search.counts))
        if off is None or off <= metrics.REFINE and search.excess(search.counts) <= 0:
            break
    return search


def _as_plan(channels, search: Search, found: list[Curve], limits, round_to, reasons, notes) -> Plan:
    removed, least = search.leaving(search.counts), search.leaving([s[-1] if s else 0 for s in search.steps])
    (name, (function, limit)), *_ = limits.limits.items()
    whole = function(channels, ())
    asked, reached, largest = (1 - x / whole for x in (limit, function(channels, removed), function(channels, least)))
    notes = list(notes)
    if search.excess(search.counts) > 0:
        notes.append(
            f"the target is out of reach: with every group at its least width (multiples of {round_to}) {largest:.1%} "
            f"of the {name} leave. Lower round_to or protect less"
        )
    return described(
        channels,
        removed,
        sentence=f"keep {limits}, by measured damage to the output, widths in multiples of {round_to}",
        asked=asked,
        reached=reached,
        largest=largest,
        scores={c.group.index: c.scores() for c in found},
        reasons=reasons,
        notes=notes,
        measures={label: function for label, (function, _) in limits.limits.items()},
    )


def _search(channels, search: Search, inside, minutes: float, seed: int) -> str:
    """Move one group at a time, let the others make up for it, reconstruct roughly, and keep what comes nearer.

    Half of the samples are for the rough fits, the other half to look at; 512 of each at most.
    """
    rng, end = np.random.default_rng(seed), time.perf_counter() + 60 * minutes
    half = min(len(keras.tree.flatten(inside)[0]) // 2, 2 * EXAMINED)
    fit, look = (_part(channels.model, inside, s) for s in (slice(0, half), slice(half, 2 * half)))
    exam = Exam(channels.model, channels.model, keras.tree.flatten(look), 64)  # the answers to compare with

    def distance() -> float:
        small = Program(reconstruct(channels, search.leaving(search.counts), fit, rows=8192, passes=1, seed=seed))
        last = len(small.steps)
        made = [small.run(small.start(x), 0, last) for x in batches_of(channels.model, look, 64)]
        got = (np.concatenate([keras.ops.convert_to_numpy(v[slot]) for v in made]) for slot in small.outputs)
        return exam.distance(list(got))[0]

    movable = [k for k, steps in enumerate(search.steps) if steps]
    if search.now > 0 or not movable:
        return "search: nothing to look for, the target is out of reach"
    first = best = distance()
    tried = kept = 0
    while time.perf_counter() < end:
        before, k = list(search.counts), int(rng.choice(movable))
        choices = [0, *search.steps[k]]
        place = choices.index(before[k]) + int(rng.choice([-2, -1, 1, 2]))
        if not 0 <= place < len(choices):
            continue
        search.counts[k] = choices[place]
        search.settle(fixed=k)
        tried += 1
        if search.now <= 0 and (now := distance()) < best:
            best, kept = now, kept + 1
        else:
            search.counts = before
    return f"search: {kept} of {tried} moves kept, divergence of rough fits {first:.3g} -> {best:.3g}"


def _accuracies(exam: Exam, labels: np.ndarray) -> tuple[float, float] | None:
    """Of the original and the small network, by their first output; None if it does not choose one class per sample."""
    output, wanted, got = exam.outputs[0], exam.wanted[0], exam.answers(exam.view)[0]
    if output.kind == "classes":
        decided = [answers.argmax(-1) for answers in (wanted, got)]
    else:
        probabilities = output.teacher_probabilities, output.student_probabilities
        decided = [(a > (0.5 if p else 0.0)).astype(int) for a, p in zip((wanted, got), probabilities)]
    if output.kind == "values" or decided[0].size != len(labels):
        return None
    return tuple(float((d.reshape(-1) == labels).mean()) for d in decided)
