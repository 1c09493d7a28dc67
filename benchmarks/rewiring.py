"""What padding and gathers in front of smaller kernels bring: MACs and milliseconds of stripped PSP networks.

    python benchmarks/rewiring.py        # two minutes; writes benchmarks/results/rewiring.json and docs/psp.md

A CIFAR ResNet-20 of which the asked share of structures is pruned at random (no training: time does not depend on what
the weights are), stripped with each `rewire=`. The .tflite file of each is timed in turns with the plain one.
"""

import argparse
import json
import platform
import sys
from functools import partial
from pathlib import Path

import keras
import numpy as np

import tflite_export
from keras_prune import Channels, metrics, strip
from keras_prune.layers import PSPConv2D, PSPLayer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import cifar_resnet  # noqa: E402

RESULTS = HERE / "results" / "rewiring.json"
DOCS = HERE.parent / "docs" / "psp.md"
MARKERS = ("<!-- benchmarks/rewiring.py -->", "<!-- end of rewiring -->")
CASES = (("column", 0.5), ("column", 0.8), ("channel", 0.5), ("shape", 0.5))


def litert(model: keras.Model) -> float:
    """Milliseconds of a model as a .tflite file on this machine."""
    return tflite_export.measure_latency(tflite_export.to_tflite(model), runs=100, max_seconds=3).median


WAYS = {
    "never": {"rewire": False},
    "faster, in Keras": {"rewire": "faster"},
    "faster, in LiteRT": {"rewire": "faster", "latency": litert},
    "always": {"rewire": True},
}


def pruned(structure: str, share: float, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = cifar_resnet(20, conv=partial(PSPConv2D, structure=structure))
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, PSPLayer):
            (alpha,) = layer.alphas.values()
            value = np.ones(np.prod(alpha.shape))
            value[rng.permutation(value.size)[: round(share * value.size)]] = 0
            alpha.assign(value.reshape(alpha.shape))
    return model


def measure(rounds: int, seed: int) -> list[dict]:
    keras.utils.set_random_seed(seed)
    plain = cifar_resnet(20)
    whole = tflite_export.to_tflite(plain)
    rows = []
    for structure, share in CASES:
        model = pruned(structure, share, seed)
        for way, arguments in WAYS.items():
            small, report = strip(model, report=True, **arguments)
            times = tflite_export.benchmark(whole, tflite_export.to_tflite(small), runs=rounds)
            rows.append(
                {
                    "structure": structure,
                    "pruned": share,
                    "rewire": way,
                    "macs": metrics.macs(Channels(small)) / metrics.macs(Channels(plain)),
                    "params": small.count_params() / plain.count_params(),
                    "ms": times.b.median,
                    "plain_ms": times.a.median,
                    "ratio": times.ratio,
                    "difference": report.difference,
                    "cpu": times.a.cpu,
                    "runtime": times.a.runtime,
                    "versions": {"keras": keras.__version__, "python": platform.python_version()},
                }
            )
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["pruned | `rewire` | MACs | params | ms | **time**", "---|---|---:|---:|---:|---:"]
    for row in rows:
        lines.append(
            f"{row['pruned']:.0%} of the {row['structure']}s | {row['rewire']} | x {row['macs']:.2f} | "
            f"x {row['params']:.2f} | {row['ms']:.3f} | **x {row['ratio']:.2f}**"
        )
    one = rows[0]
    lines.append(
        f"\nAgainst the unpruned ResNet-20 ({one['plain_ms']:.3f} ms), medians of rounds in turns, batch 1, 1 thread, "
        f"{one['runtime']}, {one['cpu']}. Written by `python benchmarks/rewiring.py`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = measure(given.rounds, given.seed)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    before, rest = DOCS.read_text().split(MARKERS[0])
    DOCS.write_text(f"{before}{MARKERS[0]}\n{table(rows)}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


if __name__ == "__main__":
    main()
