"""Floor 0. Keeps what TensorFlow's C++ code prints during a conversion off the user's terminal."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends stdout and stderr of this process to nowhere, Python's and C++'s, until the block ends.

    Log levels, handlers and environment variables stay as they are: the converter and the interpreter write
    straight to the file descriptors 1 and 2, so these two are pointed elsewhere and put back, also after an error.
    """
    kept = {}
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        stack.callback(_give_back, sink)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a notebook's or pythonw's stream may be None or closed
                stream.flush()
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # a daemon may have closed it
                kept[descriptor] = os.dup(descriptor)
                os.dup2(sink.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for descriptor, copy in kept.items():
                os.dup2(copy, descriptor)
                os.close(copy)


def _give_back(sink) -> None:
    """Log handlers that were made in the block write to stderr: TensorFlow makes its own at its first warning."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for handler in (handler for logger in [logging.root, *loggers] for handler in logger.handlers):
        if getattr(handler, "stream", None) is sink:
            handler.setStream(sys.stderr)
