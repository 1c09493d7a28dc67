"""Pruning of single weights: zeros anywhere in a kernel, by magnitude, by what they do on data, or at random.

[Qian & Klabjan: A Probabilistic Approach to Neural Network Pruning, ICML 2021, arXiv:2105.10065] Single zeros make a
file smaller (`keras_prune.save_compact`), not a network faster; units that happen to be all zero leave with `strip`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_prune import schedules
from keras_prune.channels import Channels
from keras_prune.entries import KINDS, Entries, count_of
from keras_prune.entry_scores import MEASURED, PER_NEURON
from keras_prune.lipschitz import OutputBound, gains, output_bound, outputs_on
from keras_prune.pruners import Pruner
from keras_prune.surgery import check_finite, checked_inputs, copied, write_zeros
from keras_prune.theory.perturbation import largest_fraction

BUDGETS = ("uniform", "global", "erk", "share", "lipschitz")
BOUNDED = ("share", "lipschitz")
"""Budgets that say by themselves how much goes; once per training."""

PROVABLE = ("magnitude", "random")
"""Kinds that go with budget="lipschitz"."""

SPARSITY = 0.5
SHARE = 0.05
WEIGHTS = ("measured", "uniform", "gaussian")


class WeightPruning(Pruner):
    """Sets single entries of kernels to zero while the model trains, and holds them there.

    Kernels only: no biases, normalisations or embeddings. Kernels of layers that have no rule are left out, with a
    warning that names them.

    Args:
        sparsity: the fraction of the kernels' entries to set to zero: a number in [0, 1), `{step: sparsity}`, or a
            schedule (`keras_prune.schedules`). Not with budget="share" or "lipschitz".
        kind: which entries leave first: one of those below.
        budget: "uniform", floor(sparsity * n) of the n entries of every kernel; "global", as many of all entries
            together; "erk", as many together, kernels with many entries more of them [`entries.erk`: Evci et al. 2020,
            arXiv:1911.11134]; "share", of each neuron as many as have no more than `share` together (kind="links" or
            "sipp"); "lipschitz", as many of each kernel as `error` allows (kind="magnitude" or "random").
        data: what is measured: (x, y) or batches of it for "snip", where the first 16 batches (of 32) are taken;
            unlabelled inputs for "sipp", "links" and budget="lipschitz", where a few hundred are enough.
        share: for budget="share": in (0, 1). The network is pruned once, when `fit` begins: train it first.
        error, input_norm, weights: for budget="lipschitz", see `prunable_fractions`. The network as it is when
            `fit` begins is what the error is measured against, so train it first; it is pruned once.
        protect: layers, names, or name patterns ("head_*") whose kernels stay whole.
        every, unit: prune each `every` steps; a step is an "epoch" or a "batch".
        seed: for "random": the same seed, the same entries.

    Kinds, and what stays longest:
        "magnitude": the largest |w|.
        "random": by chance; the control.
        "lamp": the largest w^2 / (sum of the squares of all weights of its kernel that are at least as large)
            [Lee et al., ICLR 2021, arXiv:2010.07611]. For budget="global": within a kernel it is the magnitude.
        "snip": the largest |gradient of the loss x weight|, signed average over the batches first, so that it needs a
            compiled model and labels [Lee et al., ICLR 2019, arXiv:1810.02340]. Meant for a network that is not yet
            trained and budget="global". Of kernels only, where the authors' code ranks biases, too; batches run as in
            training. Kernels that are not trained stay whole.
        "sipp": the largest share of the sum of its neuron, split by the signs of weights and inputs; the mean over the
            positions of a sample, the largest over the samples [Baykal et al., SiPP, arXiv:1910.05422; the scores of
            the deterministic form, without its budgets per neuron].
        "links": the largest share of |w| mean |input| in its neuron; each neuron keeps its largest link [a
            reconstruction of Riera et al., (Pen-)Ultimate DNN Pruning, arXiv:1906.02535].

    "snip", "sipp" and "links" measure again whenever more is to leave, on the weights as they are then. Kernels that
    "sipp" and "links" cannot see as matrices (recurrent and depthwise-of-separable ones) stay whole, with a warning
    that names them; the sparsity is that of the others.

    Attributes:
        fractions: {layer: fraction of its kernel that is held at zero}, once something was pruned.
        bound: budget="lipschitz": the certificate (`lipschitz.OutputBound`) of what was pruned; else None.

    Logs:
        `weight_sparsity`: the fraction of zeros among the entries of the kernels that are pruned.

    What is zero stays zero: a schedule only adds entries, and a run that is killed and restored goes on with its
    zeros. A kernel that is all zero when training begins counts as not yet trained, not as pruned.

    Example:
        >>> model.fit(x, y, epochs=10, callbacks=[WeightPruning(0.9)])     # doctest: +SKIP
        >>> print(save_compact(model, "small.keras"))                      # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float | Mapping[int, float] | schedules.Schedule = SPARSITY,
        *,
        kind: str = "magnitude",
        budget: str = "uniform",
        data=None,
        share: float = SHARE,
        error: float | None = None,
        input_norm: float | None = None,
        weights: str = "measured",
        protect: Sequence = (),
        every: int = 1,
        unit: str = "epoch",
        seed: int | None = None,
    ):
        super().__init__(every=every, unit=unit)
        _check(kind, budget, sparsity, data, share, error, weights)
        self.schedule = schedules.get(sparsity)
        self.kind, self.budget, self.protect, self.seed = kind, budget, protect, seed
        self.data, self.share = data, share
        self.asked = dict(error=error, data=data, input_norm=input_norm, weights=weights)
        self.fractions: dict[str, float] = {}
        self.bound = None
        self.entries: Entries | None = None

    def begin(self) -> None:
        self.entries = Entries(self.channels, self.kind, self.protect, self.seed, self.data)
        self.bound, self._is_done = None, False
        if self.budget not in BOUNDED:
            schedules.warn_if_too_short(self, self.schedule, self.unit)

    def ends_at(self) -> int | None:
        return getattr(self.schedule, "stop", None)

    def masks(self, step: int):
        check_finite(self.model)
        entries = self.entries
        if self.budget not in BOUNDED:
            entries.remove(schedules.check_sparsity(self.schedule(step), "WeightPruning by its schedule"), self.budget)
        elif not self._is_done and not (step and entries.some_gone()):  # a restored run keeps what it has
            if self.budget == "share":
                entries.remove_share(self.share)
            else:
                self.bound = _remove_within(entries, self.channels, **self.asked)[0]
        self._is_done = True
        self.fractions = entries.fractions()
        return entries.masks()

    def figures(self) -> dict[str, float]:
        if keras.backend.backend() == "jax":  # training keeps its own copy of the weights between callbacks
            self.model.jax_state_sync()
        values = [keras.ops.convert_to_numpy(v) for v in self.entries.kernels.values()]
        nonzero, total = sum(map(np.count_nonzero, values)), sum(value.size for value in values)
        return {"weight_sparsity": float(1 - nonzero / total)}


def _check(kind, budget, sparsity, data, share, error, weights) -> None:
    for name, value, known in (("kind", kind, KINDS), ("budget", budget, BUDGETS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} was passed; known: {', '.join(map(repr, known))}.")
    for name, kinds in (("share", PER_NEURON), ("lipschitz", PROVABLE)):
        if budget == name and kind not in kinds:
            raise ValueError(f"budget={name!r} goes with kind={' or '.join(map(repr, kinds))}, not with kind={kind!r}.")
    if budget != "lipschitz" and error is not None:
        raise ValueError(f"error= goes with budget='lipschitz', not with budget={budget!r}.")
    if budget == "lipschitz" and (error is None or data is None):
        raise ValueError("budget='lipschitz' asks for error= and data= instead of a sparsity; pass both.")
    if budget in BOUNDED and sparsity != SPARSITY:
        asked = "error=" if budget == "lipschitz" else "share="
        raise ValueError(f"budget={budget!r} takes what {asked} allows; leave out the sparsity.")
    if kind in MEASURED and data is None:
        what = "data=(x, y), or batches of it" if kind == "snip" else "data=, unlabelled inputs of the model"
        raise ValueError(f"kind={kind!r} measures on data: pass {what}.")
    if kind not in MEASURED and budget != "lipschitz" and data is not None:
        raise ValueError(
            f"kind={kind!r} with budget={budget!r} looks at no data: leave out data=, or use one of the kinds that "
            f"measure ({', '.join(map(repr, MEASURED))}) or budget='lipschitz'."
        )
    if budget != "share" and share != SHARE:
        raise ValueError(f"share= goes with budget='share', not with budget={budget!r}, which asks for a sparsity.")
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share < 1:
        raise ValueError(
            f"share={share!r} was passed; expected a number above 0 and below 1: what the entries that leave a neuron "
            "may have together."
        )
    if error is not None and (isinstance(error, bool) or not isinstance(error, numbers.Real) or not 0 <= error < 1):
        raise ValueError(
            f"error={error!r} was passed; expected a number in [0, 1), a fraction of the largest output: a network "
            "that always answers 0 has an error of 1."
        )


@dataclass(frozen=True)
class Prunable:
    """How many entries of each kernel can be pruned, and the proof.

    Attributes:
        error: what was asked, relative.
        largest: the largest ||F(x)|| over the data, what errors are relative to.
        fractions: {layer: fraction of its kernel that can be zero}.
        fraction: of the entries of all these kernels.
        bound: the certificate, a `lipschitz.OutputBound` with `total` <= error * largest.
        unproved: layers of which nothing may go, as what follows them (or they themselves) may multiply a change by
            any number: recurrence, attention, LayerNormalization, layers without a known norm.
        model: a copy of the model with these entries set to zero.
    """

    error: float
    largest: float
    fractions: dict[str, float]
    fraction: float
    bound: OutputBound
    unproved: tuple[str, ...]
    model: keras.Model = field(repr=False)

    def __str__(self) -> str:
        who = f"{self.bound.samples} samples" if self.bound.samples else f"all inputs of norm {self.bound.input_norm:g}"
        wide = max(map(len, self.fractions))
        lines = [f"{name:<{wide}}  {fraction:8.3%}" for name, fraction in self.fractions.items()]
        lines.append(
            f"{self.fraction:.3%} of the weights; ||F(x) - f(x)|| <= {self.bound.total / self.largest:.3g} of the "
            f"largest ||F(x)||, asked {self.error:g}; proved for {who}"
        )
        if self.unproved:
            lines.append(f"nothing can be proved behind or in {', '.join(self.unproved)}")
        return "\n".join(lines)


def prunable_fractions(
    model: keras.Model,
    error: float,
    *,
    data,
    kind: str = "magnitude",
    weights: str = "measured",
    input_norm: float | None = None,
    protect: Sequence = (),
    seed: int | None = None,
) -> Prunable:
    """How much of each kernel may be set to zero while the output provably moves by no more than an error.

    Each kernel is granted the same share of the error and gives up, in the order of `kind`, as many entries as keep
    the norm of what they did within it; then all shares are scaled until `lipschitz.output_bound` of the pruned
    network just meets the error. The bound is a product of worst cases: deep trained networks can prove next to
    nothing.

    Args:
        model: a built Functional or Sequential model; it is not changed.
        error: bound on ||F(x) - f(x)|| ÷ the largest ||F(x)|| over `data`; F is the model, f the pruned one, ||.|| the
            L2 norm of all outputs of a sample together. In [0, 1): a network that always answers 0 has an error of 1.
        data: unlabelled inputs in the structure of the model's inputs, shape (samples, ...). The error is proved for
            these samples.
        kind: "magnitude" or "random".
        weights: how a share becomes a number of entries: "measured", by the norm of what they do; "uniform" and
            "gaussian", by `theory.largest_fraction`, as if the weights were drawn independently. Trained ones are not:
            a guess, which the scaling then corrects for all layers alike.
        input_norm: prove it for every input of this L2 norm or less, instead of for the data alone.
        protect, seed: as for `WeightPruning`.

    Raises:
        TypeError, ValueError: a model that cannot be walked, weights or data that are not finite or do not fit, or an
            argument out of range.

    Source: shares as in [Qian & Klabjan, ICML 2021, arXiv:2105.10065], whose constants were not at hand; derived here.
    """
    _check(kind, "lipschitz", SPARSITY, data, SHARE, error, weights)
    check_finite(model)
    channels = Channels(model)
    entries = Entries(channels, kind, protect, seed)
    bound, largest, unproved, copy = _remove_within(entries, channels, error, data, input_norm, weights)
    sizes = {name: gone.size for name, gone in entries.gone.items()}
    fractions = entries.fractions()
    whole = sum(fractions[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return Prunable(error, largest, fractions, whole, bound, unproved, copy)


def _remove_within(entries: Entries, channels: Channels, error, data, input_norm, weights) -> tuple:
    """Let as many entries be gone as the error allows: (bound, largest ||F(x)||, unproved layers, pruned copy)."""
    data = checked_inputs(channels.model, data)
    largest = _largest_output(channels.model, data)
    about = {"data": data} if input_norm is None else {"input_norm": input_norm}
    per_kernel: dict[int, list] = {}
    for gain in gains(channels.model, **about):
        per_kernel.setdefault(id(gain.kernel), []).append(gain)
    costs = {
        name: _Cost(per_kernel.get(id(kernel), ()), kernel, entries.order(name))
        for name, kernel in entries.kernels.items()
    }
    proved = {name: cost for name, cost in costs.items() if math.isfinite(cost.of_all)}
    first = {name: int(gone.sum()) for name, gone in entries.gone.items()}
    copy, twins = copied(channels)

    def tried(scale: float) -> tuple[dict[str, int], OutputBound]:
        """What goes with shares of this scale, and the bound of that."""
        counts = dict(first)
        for name, cost in proved.items():
            count = cost.count_within(scale * error * largest / len(proved), weights, entries.kind)
            counts[name] = max(counts[name], count)
        for name, count in counts.items():
            value = costs[name].values.copy()
            value[costs[name].order[:count]] = 0
            twin = twins[id(entries.kernels[name])]
            twin.assign(value.reshape(tuple(twin.shape)))
        return counts, output_bound(channels.model, copy, **about)

    scale = _largest_scale(lambda s: tried(s)[1].total <= error * largest, most=64.0 * len(proved))
    counts, bound = tried(scale)
    for name, count in counts.items():
        entries.gone[name][costs[name].order[:count]] = True
    return bound, largest, tuple(name for name in costs if name not in proved), copy


class _Cost:
    """What it may cost at the output when the first entries of a kernel leave.

    Attributes:
        of_all: when all leave; inf where it is unknown.
    """

    def __init__(self, calls, kernel: keras.Variable, order: np.ndarray):
        self.calls, self.order = calls, order
        self.values = keras.ops.convert_to_numpy(kernel).ravel()
        self.shape = tuple(kernel.shape)
        self._known: dict[int, float] = {0: 0.0}
        self.of_all = self.of(order.size) if calls else math.inf

    def of(self, count: int) -> float:
        """The bound ||change|| * reads * gain, summed over the calls, when `count` entries leave."""
        if count not in self._known:
            delta = np.zeros(self.values.size)
            delta[self.order[:count]] = self.values[self.order[:count]]
            delta = delta.reshape(self.shape)
            factors = [(call, call.reads * call.gain) for call in self.calls if call.reads and call.gain]
            self._known[count] = sum(f * call.change(delta) if math.isfinite(f) else math.inf for call, f in factors)
        return self._known[count]

    def count_within(self, share: float, weights: str, kind: str) -> int:
        """How many may leave; of two neighbouring counts of the search, always the lower one."""
        if share >= self.of_all:
            return self.order.size
        if weights != "measured":
            return count_of(largest_fraction(share / self.of_all, kind, weights), self.order.size)
        low, high = 0, self.order.size
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            low, high = (middle, high) if self.of(middle) <= share else (low, middle)
        return low


def _largest_scale(fits: Callable[[float], bool], most: float, steps: int = 5) -> float:
    """About the largest number up to `most` that fits; 0, which takes nothing, if none does."""
    low, high = 0.0, 1.0
    while high <= most and fits(high):
        low, high = high, 2 * high
    if high > most:
        return low
    while not low and high > 1e-6:
        low, high = (high / 2, high) if fits(high / 2) else (0.0, high / 2)
    for _ in range(steps if low else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_output(model: keras.Model, data) -> float:
    """The largest norm of all outputs of a sample together."""
    largest = max(float(np.linalg.norm(made, axis=1).max()) for made in outputs_on(model, data))
    if not 0 < largest < math.inf:
        raise ValueError(
            f"The largest norm of the outputs on this data is {largest}: an error relative to it means nothing. Is the "
            "data, and is the model, what it should be?"
        )
    return largest


def prune_weights(
    model: keras.Model,
    sparsity: float = SPARSITY,
    *,
    kind: str = "magnitude",
    budget: str = "uniform",
    data=None,
    share: float = SHARE,
    error: float | None = None,
    input_norm: float | None = None,
    weights: str = "measured",
    protect: Sequence = (),
    seed: int | None = None,
) -> keras.Model:
    """A copy of a model with single entries of its kernels set to zero, without training.

    Args:
        model: a built Functional or Sequential model; it is not changed.
        sparsity: the fraction of zeros, a number in [0, 1).
        kind, budget, data, share, error, input_norm, weights, protect, seed: as for `WeightPruning`.

    Raises:
        TypeError, ValueError: a model that cannot be walked, weights that are not finite, or an argument out of range.
    """
    _check(kind, budget, sparsity, data, share, error, weights)
    schedules.check_sparsity(sparsity, "prune_weights")
    channels = Channels(model)
    check_finite(model)
    if budget == "lipschitz":
        asked = dict(data=data, input_norm=input_norm, weights=weights)
        return prunable_fractions(model, error, kind=kind, protect=protect, seed=seed, **asked).model
    entries = Entries(channels, kind, protect, seed, data)
    if budget == "share":
        entries.remove_share(share)
    else:
        entries.remove(sparsity, budget)
    copy, twins = copied(channels)
    for variable, mask in entries.masks():
        write_zeros(twins[id(variable)], mask)
    return copy
