"""The command line: each flag is an argument of the same name."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from keras_prune.cli import arguments


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the network could not be proved equal, 2 bad input."""
    parser = _parser()
    given = parser.parse_args(words)
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

    def command(run, text, example):
        name = run.__name__.strip("_")
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: keras-prune {name} {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        if run is not _demo:
            sub.add_argument("model", help="a .keras or .h5 file, also an .h5 file of Keras 2")
            sub.add_argument("--unsafe", action="store_true", help="run code stored in the file (Lambda layers)")
        return sub

    arguments.demo_arguments(
        command(_demo, "train, prune, strip, export and compare on real images; no network needed", "--sparsity 0.6")
    )
    arguments.compress_arguments(
        command(
            _compress,
            "a smaller network in minutes: no labels, no training",
            "model.keras small.keras --images photos/ --target macs=0.5",
        )
    )
    command(_inspect, "groups of channels, cost, and fences of a model", "model.keras")
    plan = command(
        _plan, "print what a pruning would remove, without doing it", "model.keras --sparsity 0.5 --criterion fpgm"
    )
    prune = command(_prune, "plan and cut: write the smaller model", "model.keras small.keras --sparsity 0.5")
    strip = command(_strip, "cut what is zero already and prove the outputs equal", "pruned.keras small.keras")
    compare = command(_compare, "params, MACs, memory and widths of two models", "model.keras small.keras")
    for sub in (prune, strip):
        sub.add_argument("output", help="the .keras file to write")
    strip.add_argument(
        "--rewire",
        choices=list(_REWIRE),
        default="faster",
        help="padding and gathers in front of smaller kernels: where measured faster, wherever they save MACs, nowhere",
    )
    strip.add_argument(
        "--latency", choices=["keras", "litert"], default="keras", help="what --rewire faster is timed in"
    )
    compare.add_argument("other", help="the second .keras or .h5 file")
    for sub in (plan, prune):
        arguments.sentence(sub)
        arguments.goal(sub)
        arguments.images(sub)
        arguments.protect(sub)
        sub.add_argument("--seed", type=int, help="for --criterion random, and of the choice of images")
    return parser


def _loaded(path: str, unsafe: bool):
    from keras_prune import files

    return files.load_model(path, unsafe, say=lambda text: print(f"keras-prune: {text}", file=sys.stderr))


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


def _compress(given) -> int:
    from keras_prune import compression, files

    report_path = given.report or str(Path(given.output).with_suffix(".json"))
    for path in (given.output, given.tflite, report_path):
        if path:
            files.check_writable(path)
    _check_suffix(given.output, ".keras")
    target = _numbers(given.target)
    if given.tflite:
        import tflite_export
        from tflite_export import recipes

        _check_suffix(given.tflite, ".tflite")
        recipes.get(given.recipe)
    model = _loaded(given.model, given.unsafe)
    say = (lambda text: print(text, file=sys.stderr)) if given.json else print
    read = _read(given, model, say, given.labels)
    small, report = compression.compress(
        model,
        read.x,
        target=_measures(given, model, target),
        labels=read.y,
        round_to=given.round_to,
        protect=given.protect,
        search_minutes=given.search,
        distill_minutes=given.distill,
        seed=given.seed,
        progress=sys.stderr.isatty() and not given.json,
        report=True,
    )
    files.save_model(small, given.output)
    content = {**json.loads(report.to_json()), "output": given.output}
    written = [given.output, report_path]
    Path(report_path).write_text(json.dumps(content, indent=1) + "\n")
    if given.tflite:
        try:
            exported = tflite_export.export(small, given.tflite, given.recipe, data=read.x)
        except Exception as error:  # the work of minutes is kept
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{given.output} and {report_path} were written, {given.tflite} not: {reason}") from error
        content["tflite"] = json.loads(exported.to_json())
        Path(report_path).write_text(json.dumps(content, indent=1) + "\n")
        written.append(given.tflite)
    if given.json:
        print(json.dumps(content, indent=1))
    else:
        print(report)
        if given.tflite:
            print(f"\n{exported}")
        print(f"\nwrote {', '.join(written)}")
    return 0


def _read(given, model, say, labels=None):
    """The samples of --images."""
    from keras_prune import samples

    read = samples.read(
        given.images,
        model,
        count=given.count,
        preprocess=given.preprocess,
        labels=labels,
        seed=given.seed or 0,
        data_dir=given.data_dir,
        key=given.key,
        say=say,
    )
    say(f"{len(read):,} samples from {read.source}" + "".join(f"; {note}" for note in read.notes))
    return read


def _check_suffix(path: str, suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ValueError(f"{path}: expected a {suffix} file; give a name that ends so.")


def _numbers(texts: Sequence[str]) -> dict[str, float]:
    targets = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            raise ValueError(f"--target {text}: expected MEASURE=LIMIT, for example macs=0.5.") from None
    return targets


_OF_A_FILE = ("latency_ms", "tflite_bytes", "arena_bytes")


def _measures(given, model, target: dict[str, float]) -> dict:
    """The same limits; those of a .tflite file with the measure for this device and recipe in place of the name."""
    found = {}
    for name, limit in target.items():
        measure = _measure(given, model, name)
        if measure is not name and limit < 1 and name != "latency_ms":
            raise ValueError(f"--target {name}={limit:g}: expected bytes, a number from 1 up.")
        found[measure] = limit
    return found


def _measure(given, model, name: str):
    if name not in _OF_A_FILE:
        return name
    import tflite_export
    from tflite_export.cli import shape

    options = {"recipe": given.recipe, "input_shape": shape(given.input_shape)}
    if name == "tflite_bytes":
        return tflite_export.FileBytes(model, **options)
    if name == "arena_bytes":
        return tflite_export.ArenaBytes(model, **options)
    return tflite_export.LatencyTable(given.device, model, **options, progress=sys.stderr.isatty() and not given.json)


def _inspect(given) -> int:
    from keras_prune import Channels, metrics

    channels = Channels(_loaded(given.model, given.unsafe))
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
    from keras_prune.criteria import LABELLED
    from keras_prune.scoring import READERS

    name = given.criterion
    if name in LABELLED:
        raise ValueError(
            f"criterion {name} needs labelled data: call keras_prune.plan(model, criterion={name!r}, data=(x, y)) in "
            "Python."
        )
    if not given.images and (name in READERS or given.budget == "pca"):
        kind, what = ("criterion", name) if name in READERS else ("budget", "pca")
        raise ValueError(
            f"{kind} {what} needs data: add --images with a folder of images or an .npz file, or call "
            f"keras_prune.plan(model, {kind}={what!r}, data=x) in Python."
            + (" keras-prune compress also refits what is left." if what == "obs" else "")
        )
    if given.images and name not in READERS and given.budget != "pca":
        raise ValueError(
            f"--images: criterion {name} looks at no data; leave it out, or choose a criterion of "
            f"{', '.join(READERS)} or --budget pca."
        )
    model = _loaded(given.model, given.unsafe)
    return plan(
        model,
        given.sparsity,
        explained=given.explained,
        data=_read(given, model, lambda text: print(text, file=sys.stderr)).x if given.images else None,
        target=_measures(given, model, _numbers(given.target)) if given.target else None,
        measure=_measure(given, model, given.measure),
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
    from keras_prune import files
    from keras_prune.surgery import allowed_difference, model_inputs, relative_difference

    files.check_writable(given.output)
    plan = _planned(given)
    small = plan.cut()
    difference = relative_difference(plan.zero(), small, model_inputs(small))
    if not difference <= allowed_difference(small):
        print(
            f"keras-prune: outputs of the cut and the zeroed model differ by {difference:.1e} relative; nothing was "
            "written.",
            file=sys.stderr,
        )
        return 1
    files.save_model(small, given.output)
    if given.json:
        print(json.dumps({**json.loads(plan.to_json()), "difference": difference, "output": given.output}, indent=1))
    else:
        print(f"{plan}\n\nwrote {given.output}; outputs equal to the zeroed model to {difference:.1e} relative")
    return 0


_REWIRE = {"faster": "faster", "always": True, "never": False}


def _strip(given) -> int:
    from keras_prune import files
    from keras_prune.surgery import strip

    files.check_writable(given.output)
    latency = _litert if given.latency == "litert" else None
    model = _loaded(given.model, given.unsafe)
    small, report = strip(model, rewire=_REWIRE[given.rewire], latency=latency, report=True)
    files.save_model(small, given.output)
    print(report.to_json() if given.json else f"{report}\nwrote {given.output}")
    return 0


def _litert(model) -> float:
    """Milliseconds of a model as a float32 .tflite file on this machine."""
    import tflite_export

    return tflite_export.measure_latency(tflite_export.to_tflite(model), runs=100, max_seconds=3).median


def _compare(given) -> int:
    from keras_prune import Channels, metrics, reports

    before, after = (_loaded(path, given.unsafe) for path in (given.model, given.other))
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
