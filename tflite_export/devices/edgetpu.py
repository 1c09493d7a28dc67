"""Floor 3. The device "edgetpu": the rules of Google's Coral Edge TPU, checked from the file without its compiler."""

import os
from collections import Counter
from collections.abc import Callable

import numpy as np

from tflite_export.devices.base import Device, Fallback, Fit, plural
from tflite_export.devices.graph import Step, steps
from tflite_export.runner import Runner

_EIGHT_BITS = ("INT8", "UINT8")


def _fused(step: Step) -> str:
    return "it has a fused activation" if step.option("fusedActivationFunction") else ""


def _concatenation(step: Step) -> str:
    constants = [tensor for tensor in step.inputs if tensor.constant]
    zeros = all(tensor.values is not None and np.all(tensor.values == tensor.zero_point) for tensor in constants)
    if constants and (len(step.inputs) != 2 or not zeros):
        return "a constant input must be zeros, and one of two inputs"
    return _fused(step)


def _fully_connected(step: Step) -> str:
    if step.option("weightsFormat"):
        return "its weights are not in the default format"
    rows = int(np.prod(step.outputs[0].shape[:-1], dtype=int))
    return f"its output has {rows} rows; only one is supported" if rows > 1 else ""


def _mean(step: Step) -> str:
    axes, rank = step.inputs[1].values, len(step.inputs[0].shape)
    if axes is None or rank != 4 or not {int(axis) % rank for axis in np.ravel(axes)} <= {1, 2}:
        return "it averages over other axes than height and width"
    return ""


def _pad(step: Step) -> str:
    widths = step.inputs[1].values
    if widths is None or len(widths) != 4 or np.any(widths[[0, 3]]):
        return "it pads other axes than height and width"
    return ""


def _resize(step: Step) -> str:
    return "" if len(step.inputs[0].shape) == 4 else "its input has no height, width and channels"


def _any(_: Step) -> str:
    return ""


# Operator -> why the Edge TPU does not take it, or "". Operators and limits after the table in Coral's documentation,
# coral.ai/docs/edgetpu/models-intro; its oldest edition, which every compiler since satisfies.
RULES: dict[str, Callable[[Step], str]] = {
    "ADD": _any,
    "AVERAGE_POOL_2D": _fused,
    "CONCATENATION": _concatenation,
    "CONV_2D": _any,
    "DEPTHWISE_CONV_2D": _any,
    "FULLY_CONNECTED": _fully_connected,
    "L2_NORMALIZATION": _any,
    "LOGISTIC": _any,
    "MAXIMUM": _any,
    "MAX_POOL_2D": _fused,
    "MEAN": _mean,
    "MINIMUM": _any,
    "MUL": _any,
    "PAD": _pad,
    "RELU": _any,
    "RELU6": _any,
    "RELU_N1_TO_1": _any,
    "RESHAPE": _any,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SOFTMAX": _any,
    "SUB": _any,
    "TANH": _any,
}


class EdgeTpu(Device):
    """Google's Coral Edge TPU. Its rules are checked from the file; its compiler is not to be had for Python.

    An operator that breaks a rule, and all that come after it, are left to the CPU: the compiler makes one part for the
    Edge TPU, from the start of the file to the first such operator.

    Example:
        >>> print(EdgeTpu().examine("small.tflite"))                 # doctest: +SKIP
    """

    name = "edgetpu"
    summary = "Google's Coral Edge TPU: operators and quantisation checked by rules, not by its compiler; no latency."

    def identity(self) -> str:
        return "edgetpu, rules of coral.ai/docs/edgetpu/models-intro"

    def examine(self, model: str | os.PathLike | bytes) -> Fit:
        runner = Runner(model)
        work = steps(runner.content)
        problems = _file_problems(runner, work)
        fallbacks = () if problems else _fallbacks(work)
        left = sum(fallback.count for fallback in fallbacks)
        if not problems and left == len(work):
            problems.append(f"All {plural(left, 'operator')} run on the CPU; the first is {fallbacks[0]}.")
        return Fit(
            device=self.name,
            runs=not problems,
            problems=tuple(problems),
            fallbacks=fallbacks,
            latency_ms=None,
            latency_by="",
            sram_bytes=None,
            flash_bytes=len(runner.content),
            notes=(
                "Only rules were checked: no Edge TPU compiler has seen the file. Compile it with edgetpu_compiler on "
                "a Debian machine; newer compilers take more operators than the rules here.",
                "The flash is that of the file before compilation.",
            ),
            versions={},
        )

    def compile(self, content: bytes) -> bytes:
        raise ValueError(
            "There is no compiler for the device 'edgetpu' here: run Google's edgetpu_compiler (for Debian, x86-64) on "
            "the .tflite file."
        )


def _file_problems(runner: Runner, work: list[Step]) -> list[str]:
    """What keeps the whole file off the Edge TPU, one sentence each."""
    tensors = [tensor for step in work for tensor in step.inputs + step.outputs]
    if not any(tensor.dtype in _EIGHT_BITS and not tensor.constant for tensor in tensors):
        kinds = sorted({tensor.dtype for tensor in tensors if not tensor.constant})
        return [f"The file computes in {' and '.join(kinds)}, the Edge TPU in 8-bit integers: export it with "
                "recipe='int8'."]  # fmt: skip
    problems = []
    if any(tensor.open for tensor in tensors):
        problems.append("The file leaves a size open; the Edge TPU needs fixed sizes: export it with a fixed batch.")
    if runner.batch_size > 1:
        problems.append(
            f"The file computes {runner.batch_size} samples at a time; only the three innermost sizes of a tensor may "
            "exceed 1 on the Edge TPU: export it with batch_size=1."
        )
    if len({step.subgraph for step in work}) > 1:
        problems.append("The file has several subgraphs (a loop or a branch), which the Edge TPU does not run.")
    return problems


def _fallbacks(work: list[Step]) -> tuple[Fallback, ...]:
    made = {id(tensor) for step in work for tensor in step.outputs}
    read = {id(tensor) for step in work for tensor in step.inputs}
    count: Counter = Counter()
    broken = ""
    for step in work:
        first = step.operator == "QUANTIZE" and "FLOAT" in step.inputs[0].dtype and id(step.inputs[0]) not in made
        last = step.operator == "DEQUANTIZE" and id(step.outputs[0]) not in read
        if first or last:  # floats outside, integers inside: the part for the Edge TPU lies between them
            count[step.operator, "the file takes or gives floats"] += 1
            continue
        reason = f"comes after {broken}" if broken else _why_not(step)
        if reason:
            broken = broken or f"{step.operator}, which the Edge TPU leaves to the CPU"
            count[step.operator, reason] += 1
    return tuple(Fallback(operator, many, reason) for (operator, reason), many in count.items())


def _why_not(step: Step) -> str:
    if step.operator not in RULES:
        return "not among the operators of the Edge TPU"
    for tensor in step.inputs + step.outputs:
        if not tensor.constant and not (tensor.dtype in _EIGHT_BITS and tensor.quantised):
            return f"it works on {tensor.dtype} numbers"
        if any(size > 1 for size in tensor.shape[:-3]) and not tensor.constant:
            return f"its tensor of shape {tensor.shape} exceeds 1 beyond the three innermost sizes"
    return RULES[step.operator](step)
