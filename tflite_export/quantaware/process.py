"""Starts the process that trains, shows what it says, and tells how it ended."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run(folder: str, verbose: bool) -> dict:
    """Runs the child to its end. Returns what it reports; raises what it raised, as one sentence."""
    root = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *(os.path.abspath(part) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part)]
    )
    environment |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "tflite_export.quantaware.worker", folder]
    errors = os.path.join(folder, "stderr.txt")
    with open(errors, "wb") as stderr:
        # Its working directory is the folder: a keras.py beside the user's script is none of its business.
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            for line in child.stdout:
                if verbose:
                    print(f"qat: {line}", end="", flush=True)
            child.wait()
        except BaseException:  # also Ctrl-C: the child goes as well
            child.kill()
            child.wait()
            raise
        finally:
            child.stdout.close()
    if child.returncode == 0:
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    raise _failure(folder, errors, child.returncode)


def _failure(folder: str, errors: str, code: int) -> Exception:
    told = Path(folder, "error.json")
    if told.exists():
        error = json.loads(told.read_text(encoding="utf-8"))
        if error["kind"] == "input":
            return ValueError(error["message"])
        if error["kind"] == "missing":
            return ModuleNotFoundError(error["message"])
        last = [line.strip() for line in error["trace"].splitlines() if line.strip().startswith("File")][-1:]
        return RuntimeError(f"The process that trains failed: {error['message'][:400]} ({', '.join(last)})")
    if code < 0:
        hint = " Most often the memory was not enough: pass a smaller batch_size=." if code == -9 else ""
        return RuntimeError(f"The process that trains was ended by signal {-code}.{hint}")
    lines = Path(errors).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return RuntimeError(f"The process that trains ended with code {code}: {(lines or ['it said nothing'])[-1][:400]}")
