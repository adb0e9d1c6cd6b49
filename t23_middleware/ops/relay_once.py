"""``t23-middleware relay --once``: deliver what waits now, and say honestly how that went."""

from __future__ import annotations

import os
import signal
import sys
import time

from ..capture.launch import start_relay
from ..errors import StateError, UsageError
from ..relay.once import Ending, Progress, RelayOnce
from ..relay.process import AnotherRelay, stopped_by_signals
from ..settings import Settings
from ..state import Holder, StateFolder, lock_is_held, lock_owner
from . import text

#: Seconds in which all of it is over.
LIMIT = 30.0
#: Of these, for another relay to finish what it has in flight.
HANDOVER = 15.0
_BAR = 30


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
    bar = _Bar()
    relay, took_over = _take_over(settings, folder, deadline, bar)
    try:
        with stopped_by_signals(relay.stop):
            ending = relay.run_once()
    finally:
        bar.end()
        if took_over:
            _hand_back(settings, folder)
    return _say(ending)


def _take_over(settings: Settings, folder: StateFolder, deadline: float, bar: _Bar) -> tuple[RelayOnce, bool]:
    """A relay that holds the lock, and whether an automatic one had to leave for it."""
    told: set[int] = set()
    until = time.monotonic() + HANDOVER
    while True:
        try:
            return RelayOnce(settings, folder, deadline=deadline, tell=bar.show), bool(told)
        except AnotherRelay:
            _ask_to_leave(folder, told)
        if time.monotonic() > until:
            raise StateError(
                f"the relay of the workers (process {max(told, default=0)}) does not end; look at {folder.relay_log}"
            )
        time.sleep(0.01)


def _ask_to_leave(folder: StateFolder, told: set[int]) -> None:
    """SIGTERM to the relay that holds the lock, once each: a worker may start another in between."""
    pid, holder = lock_owner(folder.relay_lock), folder.relay_holder()
    if pid is None or pid in told:
        return
    if holder is None or (pid and pid != holder.pid):
        return  # it has only now taken the lock, and will say who it is
    _refuse_what_is_not_ours(folder, holder, pid)
    told.add(pid)
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it was leaving
    except PermissionError:
        raise UsageError(
            f"process {pid} is another user's relay; run this as that user, or as root"
        ) from None


def _refuse_what_is_not_ours(folder: StateFolder, holder: Holder, pid: int) -> None:
    if not holder.automatic:
        raise UsageError(
            f"a relay that runs as a service (process {holder.pid}) delivers from {folder.path};"
            " stop that service first, or leave it to it"
        )
    if not pid:
        raise UsageError(f"a relay in another container delivers from {folder.path}; run this in that one")


def _hand_back(settings: Settings, folder: StateFolder) -> None:
    """Workers that saw our lock rely on a relay: start them theirs again."""
    if not any(map(lock_is_held, folder.journals.glob("*.lock"))):
        return
    try:
        start_relay(settings, folder)
    except OSError as error:
        print(f"t23-middleware: the workers' relay can't be started again ({error})", file=sys.stderr)


def _say(ending: Ending) -> int:
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


class _Bar:
    """The progress on a terminal; elsewhere nothing, since the end says it all."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, progress: Progress) -> None:
        if not sys.stdout.isatty():
            return
        self._shown = True
        done = progress.sent + progress.refused + progress.lost
        total = done + progress.waiting
        filled = _BAR * done // total if total else _BAR
        figures = f"{done:,} of {total:,}" + (f", {progress.refused:,} refused" if progress.refused else "")
        print(f"\r[{'#' * filled}{'.' * (_BAR - filled)}] {figures}\x1b[K", end="", flush=True)

    def end(self) -> None:
        if self._shown:
            print()
