"""A bar that fills while a command works."""

from __future__ import annotations

import sys

_WIDTH = 30


class ProgressBar:
    """The progress on a terminal; elsewhere nothing, since the end says it all."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, done: int, total: int, figures: str) -> None:
        """*done* of *total*, with the *figures* behind the bar."""
        if not sys.stdout.isatty():
            return
        self._shown = True
        filled = _WIDTH * min(done, total) // total if total else _WIDTH
        print(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {figures}\x1b[K", end="", flush=True)

    def end(self) -> None:
        """What follows stands on a line of its own."""
        if self._shown:
            print()
