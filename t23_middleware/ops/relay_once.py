"""``t23-middleware relay --once``: deliver what waits now, and say honestly how that went."""

from __future__ import annotations

import os
import sys
import time

from ..relay.once import RelayOnce, RunProgress, RunResult
from ..relay.process import stopped_by_signals
from ..settings import Settings
from ..state import StateFolder
from . import text
from .bar import Bar
from .handover import hand_back, take_over

#: Seconds in which all of it is over.
LIMIT = 30.0


def run_once(settings: Settings) -> int:
    """Take over from a relay that a worker started, deliver, hand back; 0 where nothing is left, else 1.

    Raises :class:`~t23_middleware.errors.UsageError` where a relay runs that is not ours to stop.
    """
    os.umask(0o077)
    deadline = time.monotonic() + LIMIT
    folder = StateFolder(settings.state_path())
    if not folder.path.exists():
        print(f"Nothing is left: there is no state folder {folder.path} yet.")
        return 0
    bar = Bar()

    def make() -> RelayOnce:
        return RelayOnce(settings, folder, deadline=deadline, show=lambda progress: _show(bar, progress))

    relay, took_over = take_over(folder, make)
    try:
        with stopped_by_signals(relay.stop):
            ending = relay.run_once()
    finally:
        bar.end()
        if took_over:
            hand_back(settings, folder)
    return _say(ending)


def _say(ending: RunResult) -> int:
    progress = ending.progress
    print(f"Sent {text.reports(progress.sent)}.")
    if progress.refused:
        print(f"The API refused {text.reports(progress.refused)} for good; see 't23-middleware dead list'.")
    if progress.lost:
        print(f"{text.reports(progress.lost).capitalize()} lost; see 't23-middleware status'.")
    if not ending.why:
        print("Nothing is left.")
        return 0
    left = text.reports(progress.waiting) if progress.waiting else "something in the journals"
    print(f"t23-middleware: {left} left: {ending.why}", file=sys.stderr)
    return 1


def _show(bar: Bar, progress: RunProgress) -> None:
    done = progress.sent + progress.refused + progress.lost
    total = done + progress.waiting
    figures = f"{done:,} of {total:,}" + (f", {progress.refused:,} refused" if progress.refused else "")
    bar.show(done, total, figures)
