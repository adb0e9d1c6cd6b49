"""``t23-middleware relay --once``: deliver the reports that wait now, and print the result."""

from __future__ import annotations

import os
import sys
import time

from ..relay.once import RelayOnce, RunProgress, RunResult
from ..relay.process import stopped_by_signals
from ..settings import Settings
from ..state import StateFolder
from . import text
from .bar import ProgressBar
from .handover import hand_back, take_over

#: Seconds that the command may take.
LIMIT_SECONDS = 30.0


def run_once(settings: Settings) -> int:
    """Stop a relay that a worker started, deliver, start it again. Returns 0 if nothing is left, else 1.

    Raises :class:`~t23_middleware.errors.UsageError` if a relay runs that this command may not stop.
    """
    os.umask(0o077)
    deadline = time.monotonic() + LIMIT_SECONDS
    folder = StateFolder(settings.state_path())
    if not folder.path.exists():
        print(f"Nothing is left: there is no state folder {folder.path} yet.")
        return 0
    bar = ProgressBar()

    def make() -> RelayOnce:
        return RelayOnce(
            settings, folder, deadline=deadline, show=lambda progress: _show_progress(bar, progress)
        )

    relay, took_over = take_over(folder, make)
    try:
        with stopped_by_signals(relay.stop):
            ending = relay.run_once()
    finally:
        bar.end()
        if took_over:
            hand_back(settings, folder)
    return _print_result(ending)


def _print_result(ending: RunResult) -> int:
    progress = ending.progress
    print(f"Sent {text.reports(progress.sent)}.")
    if progress.refused:
        print(
            f"The API refused {text.reports(progress.refused)} permanently; run 't23-middleware dead list'."
        )
    if progress.lost:
        print(f"{text.reports(progress.lost).capitalize()} lost; run 't23-middleware status'.")
    if not ending.why:
        print("Nothing is left.")
        return 0
    left = text.reports(progress.waiting) if progress.waiting else "unread journal lines"
    print(f"t23-middleware: {left} left: {ending.why}", file=sys.stderr)
    return 1


def _show_progress(bar: ProgressBar, progress: RunProgress) -> None:
    done = progress.sent + progress.refused + progress.lost
    total = done + progress.waiting
    figures = f"{done:,} of {total:,}" + (f", {progress.refused:,} refused" if progress.refused else "")
    bar.show(done, total, figures)
