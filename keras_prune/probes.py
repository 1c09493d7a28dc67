"""Run data through the model once and leave shadows: arrays shaped like the weights. Also those that need no data.

Backend-neutral: the gradients are taken by Keras's own training step, with an optimizer that only writes them down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np

from keras_prune.channels import Channels, Group
from keras_prune.groups import Member
from keras_prune.internals import compile_arguments_of, inputs_of
from keras_prune.program import Program
from keras_prune.recalibration import are_arrays, input_batches, is_all
from keras_prune.rules.activations import UNARY
from keras_prune.sites import sites_of, tail_of
from keras_prune.surgery import checked_inputs, copied

PER_CHANNEL = {
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", *UNARY),
    *("Dropout", "GaussianNoise", "Identity", "Flatten", "Reshape", "Permute", "Concatenate"),
    *(f"SpatialDropout{rank}D" for rank in (1, 2, 3)),
    *(f"{how}{rank}D" for how in ("ZeroPadding", "Cropping", "UpSampling", "DepthwiseConv") for rank in (1, 2, 3)),
    *(f"{where}{how}Pooling{rank}D" for where in ("", "Global") for how in ("Average", "Max") for rank in (1, 2, 3)),
}
"""Layers and operations that do not mix channels: what is multiplied before them is so, more or less, behind them."""


class _Recorder(keras.optimizers.Optimizer):
    """Keeps the last gradient of every variable and changes nothing."""

    def __init__(self):
        super().__init__(learning_rate=0.0, name="recorder")

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.gradients = self.add_optimizer_variables(variables, "gradient")

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.gradients[self._get_variable_index(variable)], gradient)

    def get_config(self):
        return {}


def batches(data, batch_size: int = 32) -> Iterator[tuple]:
    """(x, y) or (x, y, sample weights) batches: of such arrays, or of lists or dictionaries of them where a model has
    several inputs or outputs, or from an iterable of such batches.

    Raises:
        ValueError: no labels, or nothing in it.
    """
    if isinstance(data, tuple) and len(data) in (2, 3) and is_all(*data[:2]):
        data = tuple(part if are_arrays(part) else np.asarray(part) for part in data)
        counts = [{len(a) for a in keras.tree.flatten(part) if a is not None} for part in data]
        if len(set.union(*counts)) != 1 or 0 in counts[0]:
            samples, labels = (" and ".join(map(str, sorted(count))) for count in counts[:2])
            raise ValueError(
                f"data=(x, y) has {samples} samples and {labels} labels; expected the same number, above 0."
            )
        for start in range(0, *counts[0], batch_size):
            yield keras.tree.map_structure(lambda a, s=start: None if a is None else a[s : s + batch_size], data)
        return
    if not isinstance(data, Iterable) or hasattr(data, "shape"):
        raise ValueError("This criterion needs labelled data: data=(x, y), or an iterable of (x, y) batches.")
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError("This criterion needs labels, but data holds batches without: pass (x, y) batches.")
        yield tuple(batch)


def unlabelled(model: keras.Model, data, at_most: int = 4096):
    """Inputs alone, as arrays in the structure of the model's inputs, shape (samples, ...).

    Args:
        data: such arrays, (x, y), or an iterable of batches with or without labels.
        at_most: how many samples are taken.

    Raises:
        ValueError: there is nothing in it, or it does not fit the model.
    """
    if data is None:
        raise ValueError("This needs data: unlabelled inputs, shape (samples, ...), as the model takes them.")
    parts, seen = [], 0
    for batch in input_batches(data, at_most):  # of arrays the first is all
        flat = keras.tree.flatten(_in_order(model, batch))
        arrays = [None if a is None else keras.ops.convert_to_numpy(a) for a in flat]  # an optional input may be None
        parts.append(arrays)
        seen += next((len(a) for a in arrays if a is not None), 0)
        if seen >= at_most:
            break
    if not seen:
        raise ValueError("data holds no samples; expected inputs of shape (samples, ...).")
    tensors = keras.tree.flatten(inputs_of(model))
    joined = [
        None if column[0] is None else (np.concatenate(column) if len(column) > 1 else column[0])[:at_most]
        for column in zip(*parts)
    ]
    if len(joined) != len(tensors):
        raise ValueError(f"data holds {len(joined)} arrays, but the model has {len(tensors)} inputs.")
    return checked_inputs(model, keras.tree.pack_sequence_as(inputs_of(model), joined))


def _in_order(model: keras.Model, batch):
    """A batch by the names of the inputs, in their order, which is not the order of the names."""
    names = [t.name for t in keras.tree.flatten(inputs_of(model))]
    if isinstance(batch, dict) and not isinstance(inputs_of(model), dict) and set(batch) == set(names):
        return [batch[name] for name in names]
    return batch


def folded(channels: Channels) -> dict[int, np.ndarray]:
    """A shadow without data: `{id(variable): weight}`, kernels times what the BatchNormalization right behind does.

    Each output of such a kernel is multiplied by gamma / sqrt(moving variance + epsilon), so that it no longer
    matters how a filter's scale is shared between kernel and normalisation. All other weights are as they are.
    """
    program = Program(channels.model)
    found = {id(w.variable): keras.ops.convert_to_numpy(w.variable) for w in channels.weights}
    for site in sites_of(channels, program):
        norm = tail_of(program, site).norm
        if norm is None:
            continue
        rank = len(program.steps[site.steps[0]].node.outputs[0].shape)
        scale = 1 / np.sqrt(keras.ops.convert_to_numpy(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            scale = scale * keras.ops.convert_to_numpy(norm.gamma)
        lined = scale.reshape([-1 if axis == norm.axis % rank else 1 for axis in range(rank)])
        found[id(site.kernel)] = site.view.kernel(site.matrix() * site.view.outputs(lined, np.zeros(1, int)))
    return found


def gates_of(channels: Channels) -> Callable[[Group], list[list[Member]]]:
    """Of a group, one list of members for each layer that makes its units: those whose gradients x weights add up to
    the gradient at a gate of 1 that multiplies a unit there.

    These are gamma and beta of the BatchNormalization behind a kernel, else kernel and bias. Behind means with nothing
    in between that mixes channels, and of several the last: before a norm a gate has no say, as the norm divides it
    away, also through a ReLU, a pooling or a depthwise convolution. A frozen normalisation is a constant factor, and
    the gate may as well stand before it. A normalisation that is trained and has no gamma leaves nothing that tells
    it: no list.

    Source:
        z = g (gamma x + beta): dL/dg = sum of z dL/dz at g = 1 = gamma dL/dgamma + beta dL/dbeta.
    """
    program, known = Program(channels.model), {}
    norms = {
        id(site.kernel): _norms_behind(program, [s for step in site.steps for s in program.steps[step].gives], known)
        for site in sites_of(channels, program)
        if not site.path
    }

    def gates(group: Group) -> list[list[Member]]:
        makers = [m for m in group.members if not m.reads and not m.weight.is_statistic]
        layers = {id(m.weight.layer) for m in group.members}
        found: dict[tuple, dict[int, Member]] = {}
        for member in group.producers:
            behind = [norm for norm in norms.get(id(member.weight.variable), ()) if id(norm) in layers]
            if not behind:
                place = layer, path, _ = _place(member)
                parts = [m for m in makers if _place(m) == (layer, path, "bias")] + [member]
                key = place[:2]
            else:
                key = tuple(map(id, behind))
                parts = [m for m in makers if m.weight.layer in behind] if all(n.scale for n in behind) else []
            found.setdefault(key, {}).update((id(m.weight.variable), m) for m in parts)
        return [list(parts.values()) for parts in found.values() if parts]

    return gates


def _norms_behind(program: Program, slots, known: dict[int, tuple]) -> tuple[keras.layers.BatchNormalization, ...]:
    """The trained normalisations that everything in these slots ends in, unmixed; none if something does not."""
    found: dict[int, keras.layers.BatchNormalization] = {}
    for slot in slots:
        if slot not in known:
            known[slot] = _norms_of_slot(program, slot, known)
        if not known[slot]:
            return ()
        found.update((id(norm), norm) for norm in known[slot])
    return tuple(found.values())


def _norms_of_slot(program: Program, slot: int, known: dict[int, tuple]) -> tuple:
    found: dict[int, keras.layers.BatchNormalization] = {}
    for user in program.users(slot):
        if user == len(program.steps):
            return ()
        step = program.steps[user]
        is_norm = isinstance(step.operation, keras.layers.BatchNormalization)
        if not is_norm and type(step.operation).__name__ not in PER_CHANNEL:
            return ()
        behind = _norms_behind(program, step.gives, known)
        if not behind and is_norm and step.operation.trainable:
            behind = (step.operation,)
        if not behind:
            return ()
        found.update((id(norm), norm) for norm in behind)
    return tuple(found.values())


def _place(member: Member) -> tuple[int, str, str]:
    """(id of the layer, path to what holds the weight, the weight's name there)."""
    path, _, name = member.weight.name.rpartition(".")
    return id(member.weight.layer), path, name


def gradient_times_weight(channels: Channels, data, max_batches: int = 16) -> list[dict[int, np.ndarray]]:
    """One shadow per batch: `{id(variable): gradient of the loss x weight}`.

    Args:
        channels: labels of a compiled model; its loss is used, without penalties on weights; its weights and statistics
            stay as they are.
        data: (x, y) arrays or batches.
        max_batches: how many batches at most.

    Raises:
        ValueError: the model has no loss, or data is empty or unlabelled.
    """
    model = channels.model
    loss = getattr(model, "loss", None) if model.compiled else None
    if loss is None:
        raise ValueError(
            f"This criterion needs a loss, but model {model.name!r} is not compiled: call "
            "model.compile(loss=...) first."
        )
    copy, twin = copied(channels)
    for variable in copy.variables:
        variable.regularizer = None  # a penalty pulls on a weight whatever the network makes of it
    recorder = _Recorder()
    copy.compile(optimizer=recorder, loss=loss, loss_weights=compile_arguments_of(model).get("loss_weights"))
    trainable = {id(v) for v in copy.trainable_variables}
    shadows = []
    for number, batch in enumerate(batches(data)):
        if number >= max_batches:
            break
        copy.train_on_batch(*batch)
        shadows.append(
            {
                id(w.variable): keras.ops.convert_to_numpy(w.variable)
                * keras.ops.convert_to_numpy(recorder.gradients[recorder._get_variable_index(twin[id(w.variable)])])
                for w in channels.weights
                if id(twin[id(w.variable)]) in trainable
            }
        )
    if not shadows:
        raise ValueError(
            "data holds no batch; expected (x, y), or an iterable of (x, y) batches. A generator can be read only "
            "once: pass arrays, or a data set that can be read again."
        )
    return shadows
