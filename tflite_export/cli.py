"""Floor 6. The command `tflite-export`: convert, check, bench, compile. Each flag is an argument of the same name."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

from tflite_export import __version__
from tflite_export.recipes import RECIPES

_FORMATTER = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0 if all is well, 1 if a check failed, 2 for bad input.

    Example:
        >>> main(["check", "small.tflite"])                        # doctest: +SKIP
        0
    """
    options = _parser().parse_args(arguments)
    try:
        result, good = options.command(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"tflite-export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        print(result.to_json() if options.json else result)
        sys.stdout.flush()
    except BrokenPipeError:  # `tflite-export ... | head`: what is left unprinted must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tflite-export",
        description="Keras models to .tflite files, checked against Keras and timed.",
        epilog="Exit codes: 0 all is well, 1 the check failed or parity is outside the tolerance, 2 bad input.\n\n"
        "Example:\n  tflite-export convert model.keras small.tflite --recipe int8 --data calibration.npz",
        formatter_class=_FORMATTER,
    )
    parser.add_argument("--version", action="version", version=f"tflite-export {__version__}")
    commands = parser.add_subparsers(required=True, metavar="convert | check | bench | compile")
    _add_convert(commands)
    _add_check(commands)
    _add_bench(commands)
    _add_compile(commands)
    return parser


def _add_convert(commands) -> None:
    recipes = "\n".join(f"  {recipe.name:<13} {recipe.summary}" for recipe in RECIPES.values())
    parser = commands.add_parser(
        "convert",
        help="write a .keras or .h5 model as a .tflite file and measure it",
        description="Writes a .keras or .h5 model as a .tflite file, compares it with Keras and times it.",
        epilog=f"Recipes:\n{recipes}\n\nExample:\n"
        "  tflite-export convert model.keras small.tflite --recipe int8 --data calibration.npz",
        formatter_class=_FORMATTER,
    )
    parser.add_argument("model", help="the .keras or .h5 file")
    parser.add_argument("path", help="the .tflite file to write")
    parser.add_argument("--recipe", default="float32", choices=RECIPES, help="default: float32")
    _add_data(parser)
    parser.add_argument("--input-shape", help="shape of one sample where the model leaves sizes open: 224,224,3")
    parser.add_argument("--batch-size", type=int, default=1, help="samples per invocation (default: 1)")
    parser.add_argument("--float-io", action="store_true", help="keep float32 inputs and outputs with int8 and int16x8")
    parser.add_argument("--allow-flex", action="store_true", help="allow TensorFlow operators the format lacks")
    parser.add_argument("--samples", type=int, default=200, help="samples of --data used at most (default: 200)")
    parser.add_argument(
        "--keep-float", nargs="+", default=[], metavar="NAME", help="layers that stay in float32: names, or 'block_*'"
    )
    parser.add_argument(
        "--search-float", type=int, metavar="N", help="find up to N layers that should stay in float32, and keep them"
    )
    parser.add_argument("--sparse", action="store_true", help="store zeros in the sparsity encoding if that is smaller")
    _add_device(parser)
    _add_common(parser, runs=True)
    parser.add_argument("--unsafe", action="store_true", help="load models with Lambda layers: runs code from the file")
    parser.set_defaults(command=_convert)


def _add_check(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="does a .tflite file load, what is in it, does it compute what Keras computes",
        description=(
            "Loads and runs a .tflite file, lists its operators, inputs and outputs, and compares it with a Keras "
            "model."
        ),
        epilog="Example:\n  tflite-export check small.tflite --model model.keras --data test.npz",
        formatter_class=_FORMATTER,
    )
    parser.add_argument("path", help="the .tflite file")
    parser.add_argument("--model", help="the .keras or .h5 file to compare with")
    _add_data(parser)
    parser.add_argument("--tolerance", type=float, help="largest error / largest output (default: the recipe's)")
    parser.add_argument("--allow-flex", action="store_true", help="Flex operators are no problem")
    parser.add_argument("--samples", type=int, default=64, help="samples compared at most (default: 64)")
    _add_device(parser)
    _add_common(parser, runs=False)
    parser.add_argument("--unsafe", action="store_true", help="load models with Lambda layers: runs code from the file")
    parser.set_defaults(command=_check)


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time one .tflite file, or two in turns",
        description="One file: its latency. Two files: timed in turns (A B A B ...), and the ratio of their times.",
        epilog="Example:\n  tflite-export bench before.tflite after.tflite --threads 2",
        formatter_class=_FORMATTER,
    )
    parser.add_argument("a", help="a .tflite file")
    parser.add_argument("b", nargs="?", help="another one, to compare")
    _add_common(parser, runs=True)
    parser.set_defaults(command=_bench)


def _add_compile(commands) -> None:
    parser = commands.add_parser(
        "compile",
        help="write the file that a device loads: Arm's Ethos-U NPUs, NPUs with their vendor's compiler",
        description="Compiles a .tflite file for a device and says how it fits: what falls back, latency, bytes.",
        epilog="Example:\n  tflite-export compile small.tflite --device ethos-u55-128 --out small_vela.tflite",
        formatter_class=_FORMATTER,
    )
    parser.add_argument("path", help="the .tflite file")
    parser.add_argument("--out", help="the file to write (default: beside the other one, with the device's name)")
    _add_device(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command=_compile)


def _add_device(parser: argparse.ArgumentParser, required: bool = False) -> None:
    names = "cpu, micro, edgetpu, ethos-u55-128, npu-qualcomm, ...; an unknown name lists all"
    parser.add_argument("--device", required=required, help=f"what the file is meant for: {names}")
    parser.add_argument("--system-config", help="of an Ethos-U: clock and memories, a section of Vela's configuration")
    parser.add_argument("--memory-mode", help="of an Ethos-U: what lies in which memory, a section of the same file")
    parser.add_argument("--arena-bytes", type=int, help="of micro: RAM for the tensor arena")
    parser.add_argument("--flash-bytes", type=int, help="of micro: room for the file")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help=".npy or .npz file of samples; in an .npz one array per input, by the input's name"
    )


def _add_common(parser: argparse.ArgumentParser, runs: bool) -> None:
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    if runs:
        parser.add_argument("--runs", type=int, default=50, help="timed runs (default: 50)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _convert(options):
    from tflite_export.exporter import export

    model = _load_model(options.model, options.unsafe)
    data = _load_data(options.data, model)
    report = export(
        model,
        options.path,
        options.recipe,
        data,
        input_shape=shape(options.input_shape),
        batch_size=options.batch_size,
        float_io=options.float_io,
        allow_flex=options.allow_flex,
        samples=options.samples,
        keep_float=_kept(options, model, data),
        sparse=options.sparse,
        threads=options.threads,
        runs=options.runs,
        device=_device(options),
    )
    return report, report.within_tolerance or report.parity is None


def _kept(options, model, data):
    """The layers that stay in float32: those named, or those found."""
    if options.search_float is None:
        return options.keep_float
    if options.keep_float:
        raise ValueError("--keep-float and --search-float were passed; expected one of them.")
    from tflite_export.mixed import search_float

    found = search_float(
        model,
        data,
        options.recipe,
        at_most=options.search_float,
        input_shape=shape(options.input_shape),
        batch_size=options.batch_size,
        samples=options.samples,
    )
    print(found.reason, file=sys.stderr)
    return found


def _check(options):
    from tflite_export.exporter import check

    if options.data and not options.model:
        raise ValueError("--data was passed without --model; the samples are for the comparison with that model.")
    model = _load_model(options.model, options.unsafe) if options.model else None
    result = check(
        options.path,
        model,
        _load_data(options.data, model),
        tolerance=options.tolerance,
        allow_flex=options.allow_flex,
        samples=options.samples,
        threads=options.threads,
        device=_device(options),
    )
    return result, result.ok


def _bench(options):
    from tflite_export.latency import benchmark, measure_latency

    if options.b is None:
        return measure_latency(options.a, threads=options.threads, runs=options.runs), True
    return benchmark(options.a, options.b, threads=options.threads, runs=options.runs), True


def _compile(options):
    from tflite_export.devices.compiling import compile_file

    return compile_file(options.path, _device(options), options.out), True


def _device(options):
    """The device that was named, with the settings that were given for it; None without a name."""
    names = ("system_config", "memory_mode", "arena_bytes", "flash_bytes")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.device is None and not settings:
        return None
    from tflite_export.devices import Ethos, Micro, get

    takes = {}
    if options.device is not None:
        device = get(options.device)
        takes = {Ethos: names[:2], Micro: names[2:]}.get(type(device), ())
    unknown = [name for name in settings if name not in takes]
    if unknown:
        flag = "--" + unknown[0].replace("_", "-")
        raise ValueError(f"{flag} was passed; the device {options.device!r} has no such setting.")
    if not settings:
        return device
    return Ethos(device.name, **settings) if isinstance(device, Ethos) else Micro(**settings)


def shape(text: str | None):
    """ "224,224,3" -> (224, 224, 3); JSON such as '{"image": [224, 224, 3]}' for several inputs."""
    if text is None:
        return None
    try:
        if text.lstrip().startswith(("{", "[")):
            return json.loads(text)
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"--input-shape {text!r} was passed; expected sizes such as 224,224,3.") from error


def _load_model(path: str, unsafe: bool):
    """The model in a .keras or .h5 file. Code in the file (Lambda layers) is only run if `unsafe`."""
    if not path.endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(f"{path!r} was passed as model; expected a .keras or .h5 file.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    from tflite_export.silence import quiet

    with quiet():
        import keras

        try:
            return keras.saving.load_model(path, compile=False, safe_mode=not unsafe)
        except Exception as error:  # zipfile, h5py, JSON and Keras raise many kinds for a damaged file
            reason = " ".join(str(error).split())
            if "safe_mode" in reason or "enable_unsafe" in reason:
                mend = "it holds code (a Lambda layer), which is not run unless you trust the file and pass --unsafe."
            elif "Could not locate" in reason or "Unknown layer" in reason:
                found = re.search(r"(?:Could not locate|Unknown layer:?) ([^.]*)", reason)
                mend = (
                    f"it holds layers or functions of your own, which this command does not know: {found[1][:80]}. "
                    "Load it in Python, where they are imported, and call tflite_export.export."
                )
            else:
                mend = f"it is damaged, cut off or not a Keras model. {type(error).__name__}: {reason[:200]}"
            raise ValueError(f"{path!r} was not loaded: {mend}") from error


def _load_data(path: str | None, model):
    """The array of an .npy file, or the arrays of an .npz file by name."""
    if path is None:
        return None
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise ValueError(f"--data {path!r} is not a whole .npy or .npz file of numbers: {error}") from error
    if isinstance(arrays, dict) and len(arrays) == 1 and len(model.inputs) == 1:
        return next(iter(arrays.values()))
    if isinstance(arrays, dict) and len(model.inputs) == 1 and "x" in arrays:
        return arrays["x"]
    return arrays


if __name__ == "__main__":
    sys.exit(main())
