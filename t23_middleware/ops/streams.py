"""What a command prints to: streams that may be closed, full or read by nobody, without a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback


def open_missing_streams() -> None:
    """Put /dev/null where a standard stream was closed: else the next file that is opened would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False, errors="replace"))  # noqa: SIM115


def flush_output(code: int) -> int:
    """Write what is still buffered; *code*, or 1 where the output could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream.fileno())
        except OSError as error:
            _discard(stream.fileno())
            code = code or 1
            if stream is sys.stdout:
                with contextlib.suppress(OSError):
                    print(f"t23-middleware: the output can't be written ({error.strerror})", file=sys.stderr)
    return code


def _discard(number: int) -> None:
    """Let what is still buffered go nowhere: Python tries it once more at its end, and complains."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)


def error_location(error: Exception) -> str:
    """The kind of *error* and the place that it comes from; not its words, in which a session may be."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "t23_middleware" in frame.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "?"  # noqa: PTH119
    return f"{type(error).__name__} at {place}"
