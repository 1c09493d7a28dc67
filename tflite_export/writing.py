"""Floor 0. Files that appear whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    if not path.endswith(".tflite"):
        raise ValueError(f"path={path!r} was passed; expected a name that ends in .tflite.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"path={path!r} is a folder; expected the name of a file.")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder {folder!r} of path={path!r} does not exist; create it first.")
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.part")
    try:
        file = open(temporary, "xb")
    except OSError as error:
        raise type(error)(
            f"No file can be written in the folder {folder!r} of path={path!r}: {error.strerror}."
        ) from error
    try:
        with file:
            yield file
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
