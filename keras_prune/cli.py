"""The command line: each flag is an argument of the same name."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the network could not be proved equal, 2 bad input."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not hasattr(given, "run"):
        parser.print_help()
        return 2
    try:
        _start_backend()
        return given.run(given)
    except (ValueError, TypeError, OSError) as error:
        print(f"keras-prune: {error}", file=sys.stderr)
        return 2


def _start_backend() -> None:
    """Load Keras with its backend's greetings (CPU features, missing GPUs) kept off the terminal.

    A program may do that; the library never touches the environment or the streams.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            import keras

            keras.ops.zeros(())  # the search for devices is what complains
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-prune", description="Make Keras models smaller: the same network with fewer channels."
    )
    commands = parser.add_subparsers(title="commands", metavar="")

    def command(name, run, text, example):
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    demo = command(
        "demo",
        _demo,
        "train, prune, strip, export and compare on real images; no network needed",
        "keras-prune demo --sparsity 0.6",
    )
    demo.add_argument("--output", default="demo_output", help="folder for all files")
    demo.add_argument(
        "--dataset",
        default="fashion_mnist_subset",
        help="the set inside the package, NAME.npz in --data-dir, or a tensorflow_datasets name such as cifar10",
    )
    demo.add_argument("--data-dir", help="folder with data; else the environment variable KERAS_PRUNE_DATA")
    demo.add_argument("--epochs", type=int, default=8, help="of the unpruned and of the pruned network alike")
    demo.add_argument("--tune-epochs", type=int, default=3, help="how many of them come after the strip")
    demo.add_argument("--fraction", type=float, default=1.0, help="of the images")
    demo.add_argument("--seed", type=int, default=0, help="of initial weights and order of images")
    _sentence(demo, measure=False)
    demo.set_defaults(budget="uniform")

    inspect = command(
        "inspect", _inspect, "groups of channels, cost, and fences of a model", "keras-prune inspect model.keras"
    )
    plan = command(
        "plan",
        _plan,
        "print what a pruning would remove, without doing it",
        "keras-prune plan model.keras --sparsity 0.5 --criterion fpgm",
    )
    prune = command(
        "prune",
        _prune,
        "plan and cut: write the smaller model",
        "keras-prune prune model.keras small.keras --sparsity 0.5",
    )
    strip = command(
        "strip",
        _strip,
        "cut what is zero already and prove the outputs equal",
        "keras-prune strip pruned.keras small.keras",
    )
    compare = command(
        "compare",
        _compare,
        "params, MACs, memory and widths of two models",
        "keras-prune compare model.keras small.keras",
    )
    for sub in (inspect, plan, prune, strip, compare):
        sub.add_argument("model", help="a .keras or .h5 file")
        sub.add_argument("--unsafe", action="store_true", help="run code stored in the file (Lambda layers)")
    for sub in (prune, strip):
        sub.add_argument("output", help="the .keras file to write")
    compare.add_argument("other", help="the second .keras or .h5 file")
    for sub in (plan, prune):
        _sentence(sub)
        sub.add_argument(
            "--protect", nargs="*", default=[], help="layers, or patterns such as 'head_*', that keep their width"
        )
        sub.add_argument("--seed", type=int, help="for --criterion random")
    for sub in (demo, inspect, plan, prune, strip, compare):
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _sentence(parser, measure: bool = True) -> None:
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction to remove, in [0, 1)")
    if measure:
        parser.add_argument("--measure", default="macs", help="macs, params, memory, units")
    parser.add_argument("--criterion", default="l2", help="l1, l2, linf, fpgm, bn_scale, random")
    parser.add_argument("--budget", default="global", help="global, uniform")
    parser.add_argument("--round-to", type=int, default=8, help="widths are multiples of this; 1 for none")


def load_model(path: str, unsafe: bool = False):
    """A model from a .keras or .h5 file; code inside the file is run only if `unsafe`."""
    import keras

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    if Path(path).suffix not in (".keras", ".h5", ".hdf5"):
        raise ValueError(f"{path}: expected a .keras or .h5 file.")
    try:
        try:
            return keras.saving.load_model(path, safe_mode=not unsafe)
        except (TypeError, ValueError):  # a loss or metric of the user's own: the network itself may well load
            model = keras.saving.load_model(path, safe_mode=not unsafe, compile=False)
            print(f"keras-prune: {path} was loaded without its loss and optimizer (custom ones?)", file=sys.stderr)
            return model
    except Exception as error:  # whatever a broken or foreign file raises
        text = str(error)
        first = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
        if "safe_mode" in text or "unsafe" in text.lower() or "lambda" in text.lower():
            raise ValueError(
                f"{path} holds code (a Lambda layer), which is not run: it could do anything. If you trust "
                "the file, add --unsafe."
            ) from error
        custom = re.search(r"(?:could not locate (?:class|function)|unknown \w+:) '?(\w+)", text, re.IGNORECASE)
        if custom:
            raise ValueError(
                f"{path} needs the custom object {custom[1]!r}, which this program does not have. Load it in a "
                "Python script with keras.saving.load_model(..., custom_objects=...) and call "
                "keras_prune.prune there."
            ) from error
        if "deserializ" in text:
            raise ValueError(
                f"{path} is not understood by this version of Keras: {first} Rebuild the network in Keras 3, "
                "load the weights with model.load_weights, and save it as .keras."
            ) from error
        raise ValueError(
            f"{path} could not be read, it is cut off or no Keras file: {type(error).__name__}: {first}"
        ) from error


def save_model(model, path: str) -> None:
    """Write a .keras file: to a temporary file beside it first, so that nothing half-written is left."""
    target = Path(path)
    if target.suffix != ".keras":
        raise ValueError(f"{path}: the output is a .keras file; give a name that ends so.")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.keras")
    try:
        model.save(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str) -> None:
    """Raise before the work, not after it."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise ValueError(f"{path} cannot be written.")


def _demo(given) -> int:
    from keras_prune import demo

    say = (lambda text: print(text, file=sys.stderr)) if given.json else print
    figures = demo.run(
        given.output,
        dataset=given.dataset,
        data_dir=given.data_dir,
        sparsity=given.sparsity,
        criterion=given.criterion,
        budget=given.budget,
        round_to=given.round_to,
        epochs=given.epochs,
        tune_epochs=given.tune_epochs,
        seed=given.seed,
        fraction=given.fraction,
        say=say,
    )
    if given.json:
        print(json.dumps(figures, indent=1))
    else:
        print(
            f"{figures['seconds']:.0f} s; files in {given.output}: dense.keras, small.keras, four .tflite files, "
            "demo.json, widths.png"
        )
    return 0


def _inspect(given) -> int:
    from keras_prune import Channels, metrics

    channels = Channels(load_model(given.model, given.unsafe))
    totals = {name: measure(channels, ()) for name, measure in metrics.MEASURES.items()}
    groups = [{"layers": g.name, "units": len(g), "channels": len(g) * g.slices} for g in channels.groups]
    if given.json:
        print(
            json.dumps(
                {
                    "model": channels.model.name,
                    "totals": totals,
                    "groups": groups,
                    "fences": [vars(f) for f in channels.fences],
                    "uncounted": channels.uncounted,
                },
                indent=1,
            )
        )
        return 0
    print(f"{channels.model.name}: " + ", ".join(f"{n:,} {name}" for name, n in totals.items()))
    for group in groups:
        print(f"  {group['channels']:>6} channels in {group['units']:>5} units   {group['layers']}")
    for fence in channels.fences:
        print(f"  fence: {fence}")
    return 0


def _planned(given):
    from keras_prune import plan

    if given.criterion == "taylor":
        raise ValueError("criterion taylor needs labelled data: call keras_prune.plan(model, data=(x, y)) in Python.")
    return plan(
        load_model(given.model, given.unsafe),
        given.sparsity,
        measure=given.measure,
        criterion=given.criterion,
        budget=given.budget,
        round_to=given.round_to,
        protect=given.protect,
        seed=given.seed,
    )


def _plan(given) -> int:
    plan = _planned(given)
    print(plan.to_json() if given.json else plan)
    return 0


def _prune(given) -> int:
    from keras_prune.surgery import model_inputs, relative_difference

    check_writable(given.output)
    plan = _planned(given)
    small = plan.cut()
    difference = relative_difference(plan.zero(), small, model_inputs(small))
    if not difference <= 1e-4:
        print(
            f"keras-prune: outputs of the cut and the zeroed model differ by {difference:.1e} relative; nothing was "
            "written.",
            file=sys.stderr,
        )
        return 1
    save_model(small, given.output)
    if given.json:
        print(json.dumps({**json.loads(plan.to_json()), "difference": difference, "output": given.output}, indent=1))
    else:
        print(f"{plan}\n\nwrote {given.output}; outputs equal to the zeroed model to {difference:.1e} relative")
    return 0


def _strip(given) -> int:
    from keras_prune.surgery import strip

    check_writable(given.output)
    small, report = strip(load_model(given.model, given.unsafe), report=True)
    save_model(small, given.output)
    print(report.to_json() if given.json else f"{report}\nwrote {given.output}")
    return 0


def _compare(given) -> int:
    from keras_prune import Channels, metrics, reports

    before, after = (load_model(path, given.unsafe) for path in (given.model, given.other))
    if given.json:
        totals = {
            path: {name: measure(Channels(model), ()) for name, measure in metrics.MEASURES.items()}
            for path, model in ((given.model, before), (given.other, after))
        }
        print(json.dumps(totals, indent=1))
    else:
        print(reports.compare(before, after))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
