import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SAYS = {
    "prune_while_training.py": "outputs equal to",
    "prune_a_backbone.py": "top-1",
    "custom_layer.py": "is now",
    "networks.py": "ResNet-20",
    "psp_resnet.py": "ms, .tflite",
    "provable_lenet.py": "sums change by at most",
    "compress_without_training.py": "compress         test accuracy",
    "kws_microcontroller.py": "kws_tflite.h is the C array",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_example_runs_and_comes_to_its_point(path, tmp_path):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(path.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(path), "--tiny"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[path.name] in done.stdout


def test_every_example_is_run_here():
    assert {p.name for p in EXAMPLES} == set(SAYS)
