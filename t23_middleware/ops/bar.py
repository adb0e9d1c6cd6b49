"""A progress bar for commands."""

from __future__ import annotations

import sys

_WIDTH = 30


class ProgressBar:
    """Shows progress if stdout is a terminal. Otherwise it prints nothing: the command's last line has the result."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, done: int, total: int, figures: str) -> None:
        """Show *done* of *total*, and the *figures* after the bar."""
        if not sys.stdout.isatty():
            return
        self._shown = True
        filled = _WIDTH * min(done, total) // total if total else _WIDTH
        print(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {figures}\x1b[K", end="", flush=True)

    def end(self) -> None:
        """End the bar's line, so that the next output starts on a new line."""
        if self._shown:
            print()
