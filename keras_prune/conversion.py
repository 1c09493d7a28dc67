"""Conversion: an existing network becomes its PSP twin, layer by layer, with the same outputs.

    twin = keras_prune.psp_model(model, structure="channel", threshold=0.1)
    twin.fit(...)
    small = keras_prune.strip(twin)

Which layers are left plain is read from the network's graph and printed with the reasons.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras

from keras_prune.internals import check_model, layers_of
from keras_prune.layers import PLAIN, PSPDense, PSPLayer
from keras_prune.program import Program
from keras_prune.surgery.rebuilding import Rebuild

TWINS: dict[type, type] = {plain: twin for twin, plain in PLAIN.items()}
"""Keras layer -> the PSP layer it becomes."""

ARGUMENTS = ("threshold", "alpha_initializer", "alpha_regularizer", "gradient")
SUMS = ("Add", "Subtract", "Average", "Maximum", "Minimum")
POOLINGS = (*(f"{kind}Pooling{n}D" for kind in ("Average", "Max") for n in (1, 2, 3)), "AveragePool", "MaxPool")
DROPOUTS = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "Identity")
NO_KERNELS = (
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
    keras.layers.RMSNormalization,
    keras.layers.STFTSpectrogram,
)
"""Layers that have matrices and yet are neither an input nor an output layer."""

OBJECTS = ("activation", "_initializer", "_regularizer", "_constraint")


@dataclass(frozen=True)
class PSPReport:
    """What `psp_model` did.

    Attributes:
        model: the model's name.
        structures: names of the structures.
        converted: for each layer that became a PSP layer, its name and the number of alphas of each structure.
        skipped: for each layer with a kernel that did not, its name and why.
    """

    model: str
    structures: tuple[str, ...]
    converted: tuple[tuple[str, tuple[int, ...]], ...]
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        wide = max(len(name) for name, _ in (*self.converted, *self.skipped))
        lines = [f"PSP in {self.model}: {len(self.converted)} layers, {len(self.skipped)} left plain"]
        for name, counts in self.converted:
            numbers = "  ".join(f"{structure} {n}" for structure, n in zip(self.structures, counts))
            lines.append(f"  {name:<{wide}}  {numbers}")
        return "\n".join(lines + [f"  {name:<{wide}}  plain: {why}" for name, why in self.skipped])


def psp_model(
    model: keras.Model,
    structure: str | Sequence[str] = "channel",
    *,
    skip="paper",
    report: bool = False,
    say: Callable[[str], object] | None = print,
    **arguments,
):
    """The PSP twin of a model: each of its layers that has one becomes its PSP layer, with the same weights.

    With the default alpha_initializer, "ones", the twin's outputs are the model's, bit for bit. `settle` leads back.

    Args:
        model: a built Functional or Sequential model. It is not changed.
        structure: as for `keras_prune.layers.PSPConv2D`: "column", "channel", "shape", "layer", "filter", or several.
        skip: which layers stay plain:
            "paper": as in the paper, input layers (no other kernel comes before them), output layers (no other kernel
            comes after them), shortcuts (the only kernel on one branch of a sum, another branch of which has more of
            them in a row) and transitions (a 1x1 convolution that only a pooling layer with strides reads);
            "none": no layer because of where it is;
            or, instead of the paper's choice: layers, names, and name patterns ("stem*"), of which a model stands for
            all its layers; or a function layer -> bool.
        report: also return a `PSPReport`.
        say: what is called with the report as text; None for silence.
        arguments: `threshold`, `alpha_initializer`, `alpha_regularizer`, `gradient`: as for `PSPConv2D`. Every layer
            draws alphas of its own, unless the initializer has a seed.

    Plain in any case are subclasses of Keras's layers, layers with LoRA, quantized ones, layers inside of wrappers, and
    those that one alpha could switch off whole (structure "layer", or "shape" of a 1x1 kernel) with nothing leading
    around them: without it, an output would no longer depend on any input.

    Returns:
        A new model, or (new model, report), compiled like the original with a fresh optimizer.

    Raises:
        TypeError, ValueError: a model without a graph of layers, an unknown argument, a name that fits no layer, or
            no layer that could be converted.

    Example:
        >>> twin = psp_model(model, "column", skip=["stem", "head_*"], threshold=0.2)     # doctest: +SKIP
    """
    check_model(model)
    unknown = set(arguments) - set(ARGUMENTS)
    if unknown:
        raise TypeError(f"psp_model was passed {', '.join(sorted(unknown))}; it knows {', '.join(ARGUMENTS)}.")
    arguments = {"structure": structure, **arguments}
    structures = PSPDense(1, **arguments).structures  # the layers check what they are given
    flow = _Flow(model)
    position = _positions(flow, skip)
    reasons, counts = {}, {}
    for layer in flow.kernels:
        why = _unfit(layer) or position(layer)
        if not why:
            counts[id(layer)] = _counts(layer, arguments)
            single = [name for name, n in zip(structures, counts[id(layer)]) if n == 1]
            if single and not flow.leads_around(layer):
                why = f"its only {single[0]} alpha would switch it off, and nothing leads around it"
        if why:
            reasons[id(layer)] = why
    chosen = [layer for layer in flow.kernels if id(layer) not in reasons]
    if not chosen:
        found = "; ".join(f"{layer.name}: {reasons[id(layer)]}" for layer in flow.kernels[:20])
        raise ValueError(f"No layer of {model.name!r} can become a PSP layer. {found or 'It has no kernels.'}")
    twin = _Convert(model, {id(layer) for layer in chosen}, arguments).model()
    result = PSPReport(
        model.name,
        structures,
        tuple((layer.name, counts[id(layer)]) for layer in chosen),
        tuple((layer.name, reasons[id(layer)]) for layer in flow.kernels if id(layer) in reasons),
    )
    if say is not None:
        say(str(result))
    return (twin, result) if report else twin


class _Convert(Rebuild):
    def __init__(self, model, chosen: set[int], arguments: dict):
        super().__init__(model)
        self.chosen, self.arguments = chosen, arguments

    def made(self, old, config):
        plain = super().made(old, config)
        return _twin(plain, self.arguments) if id(old) in self.chosen else plain

    def copy_weights(self, old, new):
        """Kernel and bias stay out of `self.variables`: the optimizer has to know alphas, so it starts afresh."""
        if id(old) not in self.chosen:
            return super().copy_weights(old, new)
        for name in new._kernels:
            new.raw_kernel(name).assign(getattr(old, name))
        if old.use_bias:
            new.bias.assign(old.bias)
        for before, after in self.sublayers(old, new):  # a layer given as activation
            super().copy_weights(before, after)


def _twin(plain, arguments: dict) -> PSPLayer:
    """The PSP layer for a plain one, whose activation and other objects it takes, as they may be a user's own.

    It is made by its constructor: `from_config` is for layers whose alphas are about to be loaded, and never warns.
    """
    config = plain.get_config()
    own = {key: getattr(plain, key) for key in config if key.endswith(OBJECTS)}
    drawn = arguments.get("alpha_initializer")
    if isinstance(drawn, keras.initializers.Initializer):  # one of them would draw the same numbers for every layer
        own["alpha_initializer"] = drawn.clone()
    return TWINS[type(plain)](**{**config, **arguments, **own})


def _counts(layer, arguments: dict) -> tuple[int, ...]:
    """The number of alphas of each structure that the twin of a layer will have."""
    twin = _twin(layer, arguments)
    for name in twin._kernels:
        setattr(twin, name, getattr(layer, name))
    return tuple(math.prod(twin.alpha_shape(structure)) for structure in twin.structures)


# -- what stays plain ------------------------------------------------------------------------------------------------


def _unfit(layer) -> str | None:
    """Why a layer has no twin, wherever it is."""
    kind = type(layer)
    if kind in PLAIN:
        return f"is a {kind.__name__} already"
    if kind not in TWINS:
        parents = [parent.__name__ for parent in TWINS if isinstance(layer, parent)]
        return f"{kind.__name__} is a subclass of {parents[0]}" if parents else f"there is no PSP {kind.__name__}"
    if getattr(layer, "quantization_mode", None):
        return f"is quantized ({layer.quantization_mode})"
    return "has LoRA weights" if getattr(layer, "lora_enabled", False) else None


def _positions(flow: _Flow, skip) -> Callable:
    """Function layer -> why it is skipped for where or what it is, or None."""
    if isinstance(skip, str) and skip == "paper":
        return flow.position
    if skip is None or isinstance(skip, str) and skip == "none":
        return lambda layer: None
    if callable(skip) and not isinstance(skip, keras.layers.Layer):
        return lambda layer: "skip says so" if skip(layer) else None
    fitting = [layer for layer in flow.kernels if not _unfit(layer)]
    chosen: dict[int, str] = {}
    for item in (skip,) if isinstance(skip, (str, keras.layers.Layer)) else skip:
        if not isinstance(item, (str, keras.layers.Layer)):
            raise TypeError(f"skip holds {item!r}; expected layers, layer names or patterns such as 'head_*'.")
        every = layers_of(flow.program.model)[1:]
        found = [x for x in every if (fnmatch.fnmatch(x.name, item) if isinstance(item, str) else x is item)]
        inside = {id(layer) for outer in found for layer in layers_of(outer)}
        what = repr(item) if isinstance(item, str) else f"the layer {item.name!r}"
        if not any(id(layer) in inside for layer in fitting):
            names = [layer.name for layer in fitting]
            raise ValueError(
                f"skip={what} fits no layer that could become a PSP layer, nor is it 'paper' or 'none'. Layers: "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            )
        chosen.update(dict.fromkeys(inside, f"skip holds {what}"))
    return lambda layer: chosen.get(id(layer))


def _has_kernel(operation) -> bool:
    """Whether it mixes its inputs with weights: a matrix among them, and it is no activation or norm."""
    if not isinstance(operation, keras.layers.Layer) or isinstance(operation, NO_KERNELS):
        return False
    return any(len(v.shape) >= 2 for v in operation.variables)


class _Flow:
    """What comes before, after and around each layer, in the flat line of calls.

    Attributes:
        kernels: the layers with a kernel, each once, in the order of their first call.
    """

    def __init__(self, model: keras.Model):
        self.program = Program(model)
        steps = self.steps = self.program.steps
        makers = {slot: number for number, step in enumerate(steps) for slot in step.gives}
        self.before = [[makers.get(slot, -1) for _, slot in step.takes] for step in steps]  # -1: the model's inputs
        known: dict[int, bool] = {}
        for step in steps:
            known.setdefault(id(step.operation), _has_kernel(step.operation))
        self.calls: dict[int, list[int]] = {}
        self.kernels = []
        for number, step in enumerate(steps):
            if known[id(step.operation)]:
                if id(step.operation) not in self.calls:
                    self.kernels.append(step.operation)
                self.calls.setdefault(id(step.operation), []).append(number)
        self.reached = self._reached()
        self.earlier, self.later = self._neighbours()
        self.shortcuts = self._shortcuts()

    def position(self, layer) -> str | None:
        """Why the paper would leave a layer plain. One call at such a place is enough."""
        own, calls = {id(layer)}, self.calls[id(layer)]
        if any(not self.earlier[n] - own for n in calls):
            return "input layer"
        if any(not self.later[n] - own for n in calls):
            return "output layer"
        if id(layer) in self.shortcuts:
            return "shortcut"
        pointwise = set(getattr(layer, "kernel_size", (0,))) == {1}
        return "transition" if pointwise and any(map(self._is_pooled, calls)) else None

    def leads_around(self, layer) -> bool:
        """Whether every output that depends on an input still does without a layer."""
        return self._reached(layer) == self.reached

    def _reached(self, without=None) -> set[int]:
        """The outputs to which a way leads from an input."""
        slots = set(self.program.inputs)
        for step in self.steps:
            if step.operation is not without and any(slot in slots for _, slot in step.takes):
                slots.update(step.gives)
        return slots & set(self.program.outputs)

    def _kernel(self, number: int) -> set[int]:
        operation = id(self.steps[number].operation) if number >= 0 else None
        return {operation} if operation in self.calls else set()

    def _neighbours(self) -> tuple[list[set], list[set]]:
        """For each step, the kernel layers somewhere before and somewhere after it."""
        earlier: list[set] = [set() for _ in self.steps]
        later: list[set] = [set() for _ in self.steps]
        for number, makers in enumerate(self.before):
            for n in makers:
                earlier[number] |= (earlier[n] if n >= 0 else set()) | self._kernel(n)
        for number, makers in reversed(list(enumerate(self.before))):
            for n in makers:
                if n >= 0:
                    later[n] |= later[number] | self._kernel(number)
        return earlier, later

    def _partings(self) -> list[int]:
        """For each step the last one that everything it depends on has passed: where its branches part."""
        found: list[int] = []
        for makers in self.before:
            here = makers[0] if makers else -1
            for there in makers[1:]:
                while here != there:
                    if here > there:
                        here = found[here]
                    else:
                        there = found[there]
            found.append(here)
        return found

    def _shortcuts(self) -> set[int]:
        """Layers that are the only kernel on one branch of a sum, another branch of which is deeper."""
        found: set[int] = set()
        for number, parting in enumerate(self._partings()):
            makers = self.before[number]
            if type(self.steps[number].operation).__name__ not in SUMS or len(makers) < 2:
                continue
            branches = [self._branch(n, parting) for n in makers]
            for k, (kernels, _) in enumerate(branches):
                others = branches[:k] + branches[k + 1 :]
                alone = len(kernels) == 1 and not any(kernels & more for more, _ in others)
                if alone and any(depth > 1 for _, depth in others):
                    found |= kernels
        return found

    def _branch(self, end: int, start: int) -> tuple[set[int], int]:
        """The kernel layers between two steps, and how many come one after the other at most."""
        region, waiting = set(), [end]
        while waiting:
            number = waiting.pop()
            if number > start and number not in region:
                region.add(number)
                waiting += self.before[number]
        depth: dict[int, int] = {}
        for number in sorted(region):
            deepest = max((depth.get(n, 0) for n in self.before[number]), default=0)
            depth[number] = deepest + len(self._kernel(number))
        return set().union(*map(self._kernel, region)), max(depth.values(), default=0)

    def _is_pooled(self, number: int) -> bool:
        """Whether only pooling with strides reads what a call returns; dropout may come between."""
        users = [n for slot in self.steps[number].gives for n in self.program.users(slot)]
        return bool(users) and all(n < len(self.steps) and self._pools(n) for n in users)

    def _pools(self, number: int) -> bool:
        operation = self.steps[number].operation
        name = type(operation).__name__
        if name in DROPOUTS:
            return self._is_pooled(number)
        strides = name in POOLINGS and (operation.strides or operation.pool_size)
        return max(keras.tree.flatten(strides)) > 1 if strides else False
