"""What is proved about a plan: how much of its sums each layer can lose, and how far the outputs can be off.

Most bounds promise nothing at the sparsities that pruning is used at; a certificate says so where that is the case.
"""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import asdict, dataclass

import keras
import numpy as np

from keras_prune import theory
from keras_prune.lipschitz import OutputBound, output_bound, outputs_on
from keras_prune.plans import Plan
from keras_prune.probes import unlabelled
from keras_prune.program import Program
from keras_prune.sensitivity import deviations, sensitivities
from keras_prune.sites import Site, applications, sites_of
from keras_prune.surgery import reweighed


@dataclass(frozen=True)
class LayerCertificate:
    """What one kernel's sums lose: each taken by itself, on the inputs it has in the whole network.

    A sum is that of one output at one position, without the bias, of weights and inputs of given signs.

    Attributes:
        layer: its name.
        before, after: units that it reads.
        bound: no sum on the samples changes by a larger share of itself: the sensitivities of the units that left,
            times |multiplier - 1| where units were drawn, added up. 1 = all of it. None where it is not known.
        changed: the largest share by which a sum on the samples really changes.
        draws: how many draws the units it reads came from (the fewest of its groups); None if none was drawn.
        epsilon: with probability 1 - delta over the draws no sum of an input changes by a larger share, see
            `Certificate`; inf where units that could not be drawn have a share. None if none was drawn.
    """

    layer: str
    before: int
    after: int
    bound: float | None
    changed: float
    draws: int | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class Certificate:
    """What is proved about a plan, and what was measured beside it. Prints itself.

    Attributes:
        model: its name.
        samples: how many the statements are about.
        delta, k: the epsilons hold together with probability 1 - delta over the draws, for any one input whose shares
            are at most k times the largest on the samples (k = 1: the samples themselves, each for itself).
        layers: one entry per kernel that reads units which left.
        network: how far the outputs can be off on the samples, in the Euclidean norm over all outputs.
        difference: how far they are off at most on the samples, measured.
        output: the largest norm of the network's own outputs on the samples.
        notes: what could not be bounded, and why.
    """

    model: str
    samples: int
    delta: float
    k: float
    layers: tuple[LayerCertificate, ...]
    network: OutputBound
    difference: float
    output: float
    notes: tuple[str, ...]

    @property
    def is_vacuous(self) -> bool:
        """Whether the bound of the outputs promises no more than an answer of zeros would keep."""
        return not self.network.total < self.output

    def to_json(self) -> str:
        """All of it, as JSON; numbers that are infinite as null."""
        content = {**asdict(self), "is_vacuous": self.is_vacuous}
        return json.dumps(_finite(content), indent=1)

    def __str__(self) -> str:
        wide = max([len(c.layer) for c in self.layers], default=0)
        drawn = any(c.draws for c in self.layers)
        lines = [f"Certificate for {self.model}, on {self.samples:,} samples", ""]
        title = f"  {'layer':<{wide}}  {'reads':<14}  {'sums change by at most':<24}  {'by':<7}"
        lines.append((title + (f"  {'draws':<7}  1 ± eps" if drawn else "")).rstrip())
        for c in self.layers:
            cells = (f"{f'{c.before} -> {c.after}':<14}", f"{_share(c.bound):<24}", f"{_percent(c.changed):<7}")
            cells += (f"{c.draws:<7}", _share(c.epsilon)) if c.draws else ()
            lines.append("  ".join(("", f"{c.layer:<{wide}}", *cells)).rstrip())
        total = "no bound" if math.isinf(self.network.total) else f"at most {self.network.total:.3g}"
        lines += [
            "",
            f"  outputs off by: {total}{' (vacuous)' if self.is_vacuous else ''}; measured {self.difference:.3g}; "
            f"the outputs themselves are up to {self.output:.3g} long",
        ]
        if drawn:
            lines.append(
                f"  eps: with probability 1 - {self.delta:g} over the draws, all together, for an input whose shares "
                f"are at most {self.k:g} times the largest on the samples"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def certify(plan: Plan, data, *, delta: float = 1e-2, k: float = 3.0, batch_size: int = 64) -> Certificate:
    """What can be proved about a plan, however its units were chosen.

    Three statements, from the strongest to the weakest condition:

    * *On the samples*, for certain: a layer's sums change by at most the sensitivities of what left added up
      [Liebenwein et al. 2020, arXiv:1911.07412, in the form without sampling].
    * *Of units that were drawn* (`plan(..., mode="random")`): every sum stays within 1 ± epsilon with probability
      1 - delta, by Bernstein's inequality (`theory.bernstein_certificate`).
    * *Of the outputs*: the change of every kernel, times the largest input it has on the samples, times how much what
      follows can multiply a change: products of spectral norms (`lipschitz.output_bound`).

    Args:
        plan: what leaves; from any criterion, not one that refits weights.
        data: unlabelled inputs, shape (samples, ...): those that the statements are about.
        delta: accepted probability of failure of the second.
        k: how many times larger than on the samples the shares of other inputs may be; an assumption (3 as in the
            authors' code). 1 = the samples.
        batch_size: samples that run at once.

    Raises:
        ValueError: a plan with `reconstruct=True`, whose weights are not those that these bounds are about; data that
            does not fit.
    """
    for name, value, most in (("delta", delta, 1.0), ("k", k, math.inf)):
        if not isinstance(value, numbers.Real) or not 0 < value < most:
            raise ValueError(f"{name}={value!r} was passed to certify; expected a number above 0 and below {most:g}.")
    if plan.data is not None:
        raise ValueError(
            "The plan was made with reconstruct=True: its weights are refitted, and no bound on what left speaks of "
            "them. Certify the same plan without reconstruct."
        )
    channels = plan.channels
    data = unlabelled(channels.model, data)
    multipliers = plan.multipliers()
    touched = [g for g in channels.groups if (multipliers[g.units] != 1).any()]
    measured = sensitivities(channels, data, groups=touched, batch_size=batch_size)
    scores = np.full(channels.unit_count, np.nan)
    for found in measured.groups.values():
        scores[found.group.units] = found.scores
    changed = deviations(channels, multipliers, data, batch_size=batch_size)
    sites = [site for site in sites_of(channels, Program(channels.model)) if id(site.weight) in changed]
    times = applications(channels)
    events = {id(s.weight): 4 * times[id(s.kernel)] * s.shape[0] * s.shape[2] for s in sites}
    every = sum(events[id(s.weight)] for s in sites if _drawn_groups(plan, s))
    layers = tuple(_of_layer(plan, s, scores, multipliers, changed[id(s.weight)], delta, k, every) for s in sites)
    twin = reweighed(channels, multipliers)
    difference, output = _distances(channels.model, twin, data, batch_size)
    network = output_bound(channels.model, twin, data, batch_size=batch_size)
    notes = [f"{channels.groups[index].name}: {reason}" for index, reason in measured.notes.items()]
    notes += [f"{name}: how much it can multiply a change is not known" for name in network.unbounded]
    return Certificate(
        model=channels.model.name,
        samples=measured.samples,
        delta=float(delta),
        k=float(k),
        layers=layers,
        network=network,
        difference=difference,
        output=output,
        notes=tuple(notes),
    )


def _drawn_groups(plan: Plan, site: Site) -> list[int]:
    return [index for index in plan.drawn if site.reads(plan.channels.groups[index])]


def _of_layer(plan: Plan, site: Site, scores, multipliers, changed: float, delta, k, events: int) -> LayerCertificate:
    [axis] = [a for a in site.weight.labelled if site.weight.reads[a]]
    units = np.unique(site.weight.axes[axis])
    change = np.abs(multipliers[units] - 1)
    bound = float((change * np.where(change > 0, scores[units], 0)).sum())
    drawn = _drawn_groups(plan, site)
    fixed = ~np.isin(units, np.concatenate([plan.channels.groups[i].units for i in drawn])) if drawn else change > 0
    for_sure = k * float((change * scores[units])[fixed & (change > 0)].sum())  # what left without being drawn
    epsilons = []
    for i in drawn:
        scale = _scale(plan.drawn[i], scores[plan.channels.groups[i].units])
        draws = plan.drawn[i].draws
        is_known = math.isfinite(scale)
        epsilons.append(theory.bernstein_certificate(draws, scale, delta, events=events, k=k) if is_known else math.inf)
    return LayerCertificate(
        layer=site.weight.layer.name,
        before=len(units),
        after=int((multipliers[units] > 0).sum()),
        bound=None if math.isnan(bound) else bound,
        changed=changed,
        draws=min((plan.drawn[i].draws for i in drawn), default=None),
        epsilon=max(epsilons) + for_sure if drawn else None,
    )


def _scale(draw: theory.Draw, scores: np.ndarray) -> float:
    """The largest that one reweighed draw can be, as a share of a sum: their sum where the probabilities are in
    proportion to the scores."""
    open_ = ~draw.sure & (scores > 0)
    with np.errstate(divide="ignore"):
        return float((scores[open_] / draw.probabilities[open_]).max(initial=1.0))


def _distances(model: keras.Model, twin: keras.Model, data, batch_size: int) -> tuple[float, float]:
    """(largest distance of two models' outputs, largest norm of the first one's) over the samples."""
    apart, long = 0.0, 0.0
    for first, second in zip(*(outputs_on(m, data, batch_size) for m in (model, twin))):
        apart = max(apart, float(np.linalg.norm(first - second, axis=1).max()))
        long = max(long, float(np.linalg.norm(first, axis=1).max()))
    return apart, long


def _share(value: float | None) -> str:
    if value is None:
        return "not known"
    return _percent(value) + (" (vacuous)" if value >= 1 else "")


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.2%}"


def _finite(value):
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
