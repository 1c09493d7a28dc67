"""What lets training go on after a cut: the same loss and metrics, and an optimizer with its slots sliced along."""

from __future__ import annotations

import copy
import warnings

import keras

from keras_prune.internals import compile_arguments_of, config_without_rates, decays, rates_of, variables_of


def compile_like(old: keras.Model, new: keras.Model, variables: dict, sliced) -> None:
    """Compile `new` as `old` was compiled.

    Args:
        old, new: the models.
        variables: id(old variable) -> new variable.
        sliced: function (old variable, array shaped like it) -> what is left of the array.
    """
    if not getattr(old, "compiled", False):
        return
    arguments = compile_arguments_of(old)
    for key in ("metrics", "weighted_metrics"):
        arguments[key] = keras.tree.map_structure(fresh_metric, arguments.get(key))
    arguments["optimizer"] = sliced_optimizer(old.optimizer, variables, sliced, new.trainable_variables)
    try:
        new.compile(**arguments)
    except TypeError as error:  # a subclass with a compile() of its own
        warnings.warn(f"The cut model is not compiled: {error}. Call its compile() yourself.", stacklevel=5)


def fresh_metric(metric):
    """Metrics hold state, so the new model gets its own."""
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        return type(metric).from_config(metric.get_config())
    except Exception:  # a user's metric without a full config
        return copy.deepcopy(metric)


def sliced_optimizer(old, variables: dict, sliced, trainable=()):
    """The same optimizer for the smaller model: step count, learning rate, momenta.

    Of the smaller model's `trainable` variables those that stand for none of the old ones get slots that start afresh.
    """
    new = optimizer_like(old)
    if not old.built:
        return new
    reference = {id(v): v for v in variables_of(slot_holder(old))}
    if not all(i in variables for i in reference):  # it also trains what is not in the graph: start afresh
        return new
    new_of = [variables[i] for i in reference]
    old_of = {id(variables[i]): v for i, v in reference.items()}
    known, before = set(map(id, variables.values())), None
    for variable in trainable:  # a new bias comes behind its kernel, as in the model
        if id(variable) not in known:
            new_of.insert(next((k + 1 for k, v in enumerate(new_of) if v is before), 0), variable)
        before = variable
    slot_of: dict[int, keras.Variable] = {}  # id(new slot) -> the old variable it belongs to
    added: set[int] = set()  # ids of the slots of variables that are new
    holder = slot_holder(new)
    original = holder.add_variable_from_reference

    def recording(reference_variable, *args, **kwargs):
        slot = original(reference_variable, *args, **kwargs)
        if slot is not None and id(reference_variable) in old_of:
            slot_of[id(slot)] = old_of[id(reference_variable)]
        elif slot is not None:
            added.add(id(slot))
        return slot

    spared = [variables[i] for i, v in reference.items() if not decays(slot_holder(old), v)]
    if spared:
        holder.exclude_from_weight_decay(var_list=spared)
    holder.add_variable_from_reference = recording
    try:
        new.build(new_of)
    finally:
        del holder.add_variable_from_reference
    for before, after in zip(old.variables, [v for v in new.variables if id(v) not in added]):
        if id(after) in slot_of and tuple(before.shape) == tuple(slot_of[id(after)].shape):
            after.assign(sliced(slot_of[id(after)], before))
        elif tuple(before.shape) == tuple(after.shape):
            after.assign(before)
        # Factored slots (Adafactor) of a cut weight have no slice; they start afresh.
    return new


def optimizer_like(old: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A new optimizer of the same kind, not built. A schedule of learning rates is the same object: a user's own may
    not be registered, so that it would not come out of a config again."""
    holder = slot_holder(old)
    rates = rates_of(holder)
    config = old.get_config() if rates is None else config_without_rates(old, holder)
    new = type(old).from_config(config)
    if rates is not None:
        slot_holder(new).learning_rate = rates
    return new


def slot_holder(optimizer):
    """The optimizer that owns the slots: a loss-scaling one only wraps it."""
    return getattr(optimizer, "inner_optimizer", optimizer)
