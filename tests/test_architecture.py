"""The floors of the house, read from the imports."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "keras_prune": {
        "__init__": 0,
        "data": 0,
        "rules": 1,
        "internals": 1,
        "criteria": 1,
        "schedules": 1,
        "datasets": 1,
        "keras2": 1,
        "pictures": 1,
        "files": 3,
        "layers": 2,
        "samples": 2,
        "groups": 2,
        "budgets": 2,
        "least_squares": 1,
        "linear": 1,
        "theory": 1,
        "thinet": 1,
        "program": 2,
        "answers": 2,
        "channels": 3,
        "allocation": 3,
        "surgery": 5,
        "metrics": 4,
        "recalibration": 4,
        "sites": 4,
        "operators": 3,
        "propagation": 6,
        "lipschitz": 7,
        "conversion": 6,
        "distillation": 6,
        "finetuning": 7,
        "probes": 6,
        "reports": 6,
        "widths": 6,
        "reconstruction": 6,
        "damage": 6,
        "rounds": 6,
        "surgeon": 7,
        "sensitivity": 7,
        "responses": 7,
        "scoring": 8,
        "entry_scores": 8,
        "plans": 8,
        "planning": 9,
        "pruners": 10,
        "certificates": 10,
        "provable": 11,
        "sparsity": 11,
        "penalties": 11,
        "weights": 11,
        "dropping": 11,
        "patterns": 11,
        "compact": 4,
        "entries": 10,
        "compression": 10,
        "iterative": 12,
        "searching": 10,
        "similarity": 1,
        "demo": 13,
        "cli": 14,
    },
    "tflite_export": {
        "__init__": 0,
        "flatbuffer": 0,
        "silence": 0,
        "records": 0,
        "writing": 0,
        "recipes": 1,
        "runner": 1,
        "inputs": 1,
        "blueprint": 1,
        "quantizer": 1,
        "keras2": 1,
        "convert": 2,
        "latency": 2,
        "parity": 3,
        "devices": 3,
        "labelled": 3,
        "quantaware": 4,
        "exporter": 4,
        "measures": 4,
        "mixed": 5,
        "tables": 5,
        "cli": 6,
    },
}
FILES = sorted(p for package in FLOORS for p in (ROOT / package).rglob("*.py"))


def room(path):
    """(package, top-level module) of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0], parts[1]


def imported(path):
    """Dotted names of all modules a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors(path):
    package, name = room(path)
    assert name in FLOORS[package], f"give {path.name} a floor"
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] in FLOORS[package] and parts[1] != name:
            same_or_lower = (
                FLOORS[package][parts[1]] <= FLOORS[package][name]
                if name == "cli"
                else (FLOORS[package][parts[1]] < FLOORS[package][name])
            )
            assert same_or_lower, f"{name} (floor {FLOORS[package][name]}) imports {parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_packages_stay_apart_and_pruning_needs_no_tensorflow(path):
    package, name = room(path)
    roots = {module.split(".")[0] for module in imported(path)}
    if package == "tflite_export":
        assert "keras_prune" not in roots
    else:
        assert "tensorflow" not in roots and "jax" not in roots and "torch" not in roots
        assert "tflite_export" not in roots or name in ("demo", "cli")  # the scripts where they meet


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_of_human_size_and_hold_no_assert(path):
    text = path.read_text()
    assert text.count("\n") <= 420
    assert path.name not in ("utils.py", "common.py", "helpers.py", "manager.py")
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))


def test_importing_has_no_side_effects_and_loads_no_framework():
    code = (
        "import os, sys, logging, warnings; before = (dict(os.environ), list(logging.root.handlers), "
        "logging.root.level, list(warnings.filters)); import keras_prune, tflite_export; "
        "after = (dict(os.environ), list(logging.root.handlers), logging.root.level, list(warnings.filters)); "
        "sys.exit(before != after or 'keras' in sys.modules or 'tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_loading_every_public_name_changes_no_environment():
    code = (
        "import os, keras, tensorflow; before = dict(os.environ); import keras_prune, tflite_export; "
        "names = [getattr(p, n) for p in (keras_prune, tflite_export) for n in p.__all__]; "
        "assert len(names) > 20 and dict(os.environ) == before"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        ).returncode
        == 0
    )


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_help_answers_without_loading_a_framework(package):
    code = (
        f"import sys; from {package}.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('keras' in sys.modules or 'tensorflow' in sys.modules or 'numpy' in sys.modules)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout
    assert time.perf_counter() - start < 10  # it takes 0.1 s; 10 s would be a framework on a busy machine


def test_every_public_name_has_a_docstring():
    import keras_prune
    import tflite_export

    missing = [
        f"{p.__name__}.{n}"
        for p in (keras_prune, tflite_export)
        for n in p.__all__
        if n.isidentifier() and not n.startswith("__") and n != "RECIPES" and not getattr(p, n).__doc__
    ]
    assert missing == []
