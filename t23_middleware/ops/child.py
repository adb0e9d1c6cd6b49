"""Servers that a command starts for itself, and ends with it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: Seconds that one has to end by itself, before it is killed.
STOP_SECONDS = 15.0


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process of *command*, out of reach of the terminal's Ctrl-C; ended at the end, with *options* as Popen's."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
