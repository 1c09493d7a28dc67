"""Labelling rules, one short function per layer type, one file per family."""

from keras_prune.rules import activations, conv, dense, merging, norms, pooling, recurrence, shapes  # noqa: F401 (they register)
from keras_prune.rules.language import FROZEN, RULES, Call, Fence, Ids, Labels, Ledger, find_rule, rule

__all__ = ["FROZEN", "RULES", "Call", "Fence", "Ids", "Labels", "Ledger", "find_rule", "rule"]
