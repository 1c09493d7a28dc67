"""Structured pruning for Keras 3: really smaller models, the same outputs.

    small = keras_prune.prune(model, sparsity=0.5, measure="macs")

Importing has no side effects; Keras is imported with the first name that needs it.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Channels": "channels",
    "Group": "channels",
    "Plan": "plans",
    "plan": "planning",
    "prune": "planning",
    "cut": "surgery",
    "zero": "surgery",
    "strip": "surgery",
    "dead_units": "surgery",
    "StripReport": "surgery",
    "relative_difference": "surgery",
    "rule": "rules",
    "Labels": "rules",
    "FilterPruning": "pruners",
    "GradualPruning": "pruners",
    "Pruner": "pruners",
    "ProvablePruning": "provable",
    "certify": "certificates",
    "sample_size": "sensitivity",
    "Certificate": "certificates",
    "release": "pruners",
    "SparsityTarget": "sparsity",
    "WeightPruning": "weights",
    "DropPruning": "dropping",
    "PatternPruning": "patterns",
    "prune_weights": "weights",
    "prunable_fractions": "weights",
    "save_compact": "compact",
    "CompactReport": "compact",
    "recalibrate_batchnorm": "recalibration",
    "compress": "compression",
    "CompressReport": "compression",
    "reconstruct": "reconstruction",
    "distill": "distillation",
    "DistillReport": "distillation",
    "finetune": "finetuning",
    "distiller": "finetuning",
    "GroupLasso": "penalties",
    "NetworkSlimming": "penalties",
    "psp_model": "conversion",
    "IterativePruning": "iterative",
    "scratch_epochs": "iterative",
    "redrawn": "iterative",
    "kept_masks": "iterative",
    "kernel_values": "iterative",
    "mask_similarity": "similarity",
    "search": "searching",
    "SearchReport": "searching",
    "structure_report": "similarity",
    "weight_stability": "similarity",
}
_MODULES = (
    "budgets",
    "certificates",
    "channels",
    "compression",
    "conversion",
    "criteria",
    "distillation",
    "dropping",
    "files",
    "finetuning",
    "iterative",
    "layers",
    "lipschitz",
    "metrics",
    "patterns",
    "penalties",
    "planning",
    "probes",
    "provable",
    "pruners",
    "recalibration",
    "responses",
    "rules",
    "schedules",
    "searching",
    "similarity",
    "sparsity",
    "surgery",
    "sensitivity",
    "theory",
    "reports",
    "datasets",
    "samples",
)

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"keras_prune.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"keras_prune.{name}")
    raise AttributeError(f"module 'keras_prune' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES, *_MODULES])
