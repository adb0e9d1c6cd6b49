"""Tells where a relay hangs: the stacks of all its threads, on stderr, when its loop has not come round for a minute.

A relay that hangs keeps its lock and says nothing, so that nobody takes its place. The stacks are written by a thread
of the interpreter's own (``faulthandler``), which needs neither the GIL nor a lock of ours. After ten minutes the
kernel ends it (``alarm(2)``), and the next play brings another: a relay that is killed loses nothing.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

#: Seconds without a round of the loop after which it hangs: longer than a busy disk takes.
HANGS_AFTER = 60.0
#: Seconds without a round after which it is ended: no disk that comes back was away for so long.
ENDS_AFTER = 600.0
#: Rounds within this share of that time are not worth a system call each.
SHARE = 1 / 6


class Watchdog:
    """Looks after one loop of this process, whose end may take *ending* seconds; does nothing until :meth:`watching`."""

    def __init__(self, ending: float) -> None:
        self._patience = HANGS_AFTER + ending
        self._round: float | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile a loop that hangs is told, and at last ended; ``SIGUSR1`` tells at any time where it is."""
        if sys.stderr is None:  # a service manager may start us without one
            yield
            return
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        # With its default action: a process that is deaf to Python's handlers ends too.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        self._begin(time.monotonic())
        try:
            yield
        finally:
            self._round = None
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR1)

    def came_round(self) -> None:
        """The loop is well."""
        if self._round is None:
            return
        now = time.monotonic()
        took = now - self._round
        if took > self._patience:
            log.error(
                "the relay stood still for %.0f s; the stacks above say where",
                took,
                extra={"t23_event": "relay_stood_still", "t23_seconds": round(took)},
            )
        if took > self._patience * SHARE:
            self._begin(now)

    def _begin(self, now: float) -> None:
        self._round = now
        # A thread of its own: without it the relay works all the same, and is ended where it hangs.
        with suppress(RuntimeError):
            faulthandler.dump_traceback_later(self._patience, file=sys.stderr)
        signal.alarm(round(ENDS_AFTER))
