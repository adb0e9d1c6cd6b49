"""The standard streams of a command, which may be closed, full or broken; that must not cause a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback


def open_missing_streams() -> None:
    """Open /dev/null for each closed standard stream: otherwise the next opened file would get its descriptor."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False, errors="replace"))  # noqa: SIM115


def flush_output(code: int) -> int:
    """Flush the output. Returns *code*, or 1 if *code* is 0 and the output can't be written."""
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
    """Discard buffered output: Python would try to write it again at exit, and print an error."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)


def error_location(error: Exception) -> str:
    """Type and source line of *error*, without its message, which may contain a session."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "t23_middleware" in frame.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "?"  # noqa: PTH119
    return f"{type(error).__name__} at {place}"
