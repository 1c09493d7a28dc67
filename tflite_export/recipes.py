"""Floor 1. Named recipes: which numbers a .tflite file stores and computes with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How the converter stores weights and computes, as data.

    A recipe of your own is passed wherever a name is, or added with `RECIPES["mine"] = Recipe(name="mine", ...)`.

    Args:
        name: the word users write.
        summary: one line: what it does and when to take it.
        tolerance: the parity that a file of this recipe should keep on inputs like the calibration data: the largest
            absolute difference between the file's outputs and Keras's, divided by the largest absolute Keras output.
            It is meant as an alarm for broken files (swapped outputs, wrong calibration data, an unsupported
            operator computing nonsense), not as a promise of accuracy: measure that on your validation set.
        optimize: whether the converter may quantise at all.
        weight_type: dtype name given to `target_spec.supported_types`, or "" for the converter's own choice.
        op_set: name of the `tf.lite.OpsSet` the file may use.
        io_dtype: dtype of the file's quantised inputs and outputs; "float32" if they stay floats.
        needs_data: whether activations are calibrated on representative data.
        quantizer: "tensorflow", its converter; "ai-edge", Google's ai-edge-quantizer (an extra), which starts from the
            float32 file and looks at `activations` and needs_data alone; or "ai-edge or tensorflow": where the extra
            is not installed, the converter.
        activations: what a quantised operator computes with, for ai-edge-quantizer: "int8" or "int16" (calibrated, with
            needs_data=True), "dynamic" (int8, their range taken at each run), or "float32" (only weights are int8). A
            recipe of the "tensorflow" quantizer names it so that `keep_float` knows; "" if it has no int8 weights.

    Example:
        >>> get("int8").needs_data
        True
    """

    name: str
    summary: str
    tolerance: float
    optimize: bool = True
    weight_type: str = ""
    op_set: str = "TFLITE_BUILTINS"
    io_dtype: str = "float32"
    needs_data: bool = False
    quantizer: str = "tensorflow"
    activations: str = ""


RECIPES: dict[str, Recipe] = {
    "float32": Recipe(
        name="float32",
        summary="The model's own weights and arithmetic. The reference for all others.",
        tolerance=1e-4,
        optimize=False,
    ),
    "float16": Recipe(
        name="float16",
        summary="Weights stored in half the bytes, computed in float32 on a CPU and in float16 on most GPUs.",
        tolerance=2e-2,
        weight_type="float16",
    ),
    "dynamic_int8": Recipe(
        name="dynamic_int8",
        summary=(
            "int8 weights, activations quantised while it runs. Needs no data. Weights under 1024 numbers stay float."
        ),
        tolerance=0.15,
        activations="dynamic",
    ),
    "int8": Recipe(
        name="int8",
        summary="int8 weights, activations, inputs and outputs: for CPUs, microcontrollers and NPUs. Needs data.",
        tolerance=0.25,
        op_set="TFLITE_BUILTINS_INT8",
        io_dtype="int8",
        needs_data=True,
        activations="int8",
    ),
    "int16x8": Recipe(
        name="int16x8",
        summary="int8 weights, int16 activations: closer to float, but slow on a CPU (no XNNPACK). Needs data.",
        tolerance=0.15,
        op_set="EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8",
        io_dtype="int16",
        needs_data=True,
        quantizer="ai-edge or tensorflow",
        activations="int16",
    ),
    "weight_only_int8": Recipe(
        name="weight_only_int8",
        summary="int8 weights, float32 arithmetic: a quarter of the bytes, no data, small errors. Needs [quantizer].",
        tolerance=0.1,
        quantizer="ai-edge",
        activations="float32",
    ),
}


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a Recipe is returned as it is.

    Raises:
        ValueError: the name is not known.
        TypeError: neither a name nor a Recipe was passed.

    Example:
        >>> get("float16").weight_type
        'float16'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe={recipe!r} was passed; expected a name or a tflite_export.Recipe.")
    if recipe not in RECIPES:
        raise ValueError(
            f"recipe={recipe!r} is not known. Known: {', '.join(RECIPES)}. Or pass a tflite_export.Recipe."
        )
    return RECIPES[recipe]
