"""The flags of the commands: each is an argument of the same name."""

from __future__ import annotations

import argparse
import re


def demo_arguments(demo) -> None:
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
    sentence(demo, measure=False)
    demo.set_defaults(budget="uniform")


def compress_arguments(sub) -> None:
    sub.add_argument("output", help="the .keras file to write")
    images(sub, required=True)
    sub.add_argument(
        "--target",
        nargs="+",
        default=["macs=0.5"],
        metavar="MEASURE=LIMIT",
        help="what may be left of macs, params, memory, latency_ms, tflite_bytes, arena_bytes: a fraction below 1 or a "
        "number; several are all met",
    )
    sub.add_argument("--labels", help="'folders', or a file of labels (.csv, .npy): only to print the accuracy")
    sub.add_argument("--round-to", type=int, default=8, help="widths are multiples of this; 1 for none")
    sub.add_argument("--search", type=_minutes, default=0.0, metavar="TIME", help="look for better widths, e.g. 2m")
    sub.add_argument("--distill", type=_minutes, default=0.0, metavar="TIME", help="then learn from the original, 10m")
    sub.add_argument("--tflite", metavar="FILE", help="also write a .tflite file")
    files(sub)
    sub.add_argument("--report", metavar="FILE", help="write the figures as JSON; default: beside the output")
    sub.add_argument("--seed", type=int, default=0, help="of the choice of images and positions")
    protect(sub)


def images(sub, required: bool = False) -> None:
    """Unlabelled inputs, and how they are read."""
    sub.add_argument(
        "--images",
        required=required,
        metavar="SOURCE",
        help="a folder of images, an .npz or .npy file, or tfds:NAME; unlabelled, a few hundred are enough"
        + ("" if required else "; for criteria that look at data and for --budget pca"),
    )
    sub.add_argument("--preprocess", help="none, unit, signed, imagenet or caffe, if the model does not do it itself")
    sub.add_argument("--key", help="name of the array in an .npz file")
    sub.add_argument("--count", type=int, default=512, help="how many images are used, chosen at random")
    sub.add_argument("--data-dir", help="folder with data for tfds:NAME")


def _minutes(text: str) -> float:
    """'90s', '10m', '1h' or plain minutes."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time such as 90s, 10m or 1h")
    return float(match[1]) * {"s": 1 / 60, "m": 1, "": 1, "h": 60}[match[2]]


def protect(sub) -> None:
    sub.add_argument(
        "--protect", nargs="*", default=[], help="layers, or patterns such as 'head_*', that keep their width"
    )


def goal(sub) -> None:
    """What is asked for: a sparsity, or limits."""
    sub.set_defaults(sparsity=None, budget=None)
    sub.add_argument(
        "--target",
        nargs="+",
        metavar="MEASURE=LIMIT",
        help="instead of --sparsity, what may be left of macs, params, memory, latency_ms, tflite_bytes, arena_bytes: "
        "a number, or a fraction below 1; several are all met",
    )
    sub.add_argument(
        "--explained", type=float, metavar="FRACTION", help="instead of --sparsity, with --budget pca: such as 0.99"
    )
    files(sub)


def files(sub) -> None:
    """How latency_ms, tflite_bytes and arena_bytes are to be understood."""
    sub.add_argument("--device", default="cpu", help="whose latency_ms: cpu, ethos-u55-128, ...")
    sub.add_argument("--recipe", default="float32", help="of the .tflite file: float32, float16, dynamic_int8, int8")
    sub.add_argument("--input-shape", metavar="224,224,3", help="of one sample, where the model leaves sizes open")


def sentence(parser, measure: bool = True) -> None:
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="fraction to remove, in [0, 1); 0.5 if nothing else is asked for"
    )
    if measure:
        parser.add_argument("--measure", default="macs", help="macs, params, memory, units, latency_ms")
    more = ", with --images: {}" if measure else ""
    parser.add_argument(
        "--criterion",
        default="l2",
        help="l1, l2, linf, l1_folded, l2_folded, fpgm, fpgm_mix, bn_scale, random"
        + more.format("obs, thinet, pfp, pfp_max, hrank, apoz"),
    )
    parser.add_argument("--budget", default="global", help="global, uniform, greedy" + more.format("pca"))
    parser.add_argument("--round-to", type=int, default=8, help="widths are multiples of this; 1 for none")
