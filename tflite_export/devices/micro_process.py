"""Floor 3. The program that `micro.py` runs in a process of its own, in a folder with a file and its inputs.

LiteRT for Microcontrollers ends a process that asks for too much, and it writes what it has to say to stderr. This
program therefore imports nothing of this package: its text is given to a fresh Python.
"""

import json
import os

import numpy as np
from tflite_micro import runtime


def main() -> None:
    """Runs the file once; what it says of its arena goes to stderr, its outputs into files."""
    with open("model.tflite", "rb") as model:
        content = model.read()
    with open("job.json", encoding="utf-8") as job:
        counts = json.load(job)
    interpreter = runtime.Interpreter.from_bytes(content, arena_size=counts["arena"])
    for at in range(counts["inputs"]):
        interpreter.set_input(np.load(f"input_{at}.npy"), at)
    interpreter.invoke()
    interpreter.print_allocations()
    for at in range(counts["outputs"]):
        np.save(f"output_{at}.npy", interpreter.get_output(at))
    os._exit(0)  # freeing an interpreter is none of our business, and takes time


if __name__ == "__main__":
    main()
