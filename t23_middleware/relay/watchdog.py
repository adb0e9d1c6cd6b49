"""Tells where a relay hangs: the stacks of all its threads, on stderr, when its loop has not come round for a minute.

A relay that hangs keeps its lock and says nothing, so that nobody takes its place. After ten minutes it is ended, and
the next play brings another: a relay that is killed loses nothing. A thread of its own counts the time that the relay
stood still, in short steps, so that time in which the whole process was frozen (docker pause, a suspended machine) is
not counted. Where even that thread can't run, the kernel ends the process by the CPU time that it takes.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

#: Seconds without a round of the loop after which it hangs: longer than a busy disk takes.
HANGS_AFTER = 60.0
#: Seconds without a round after which it is ended: no disk that comes back was away for so long.
ENDS_AFTER = 600.0
#: Part of the shorter of these times that is one step of the count.
SHARE = 1 / 30


class Watchdog:
    """Looks after one loop of this process, whose end may take *ending* seconds; does nothing until :meth:`watching`."""

    def __init__(self, ending: float) -> None:
        self._patience = HANGS_AFTER + ending
        self._step = min(self._patience, ENDS_AFTER) * SHARE
        self._rounds = 0
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile a loop that hangs is reported, and at last ended; ``SIGUSR1`` tells at any time where it is."""
        if sys.stderr is None:  # a service manager may start us without one
            yield
            return
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        # With its default action: a process that is deaf to Python's handlers ends too.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF,))
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # A thread of its own: where none can be had, the relay works all the same.
        with suppress(RuntimeError):
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            if thread.is_alive():
                thread.join()
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.unregister(signal.SIGUSR1)

    def loop_ran(self) -> None:
        """The loop is well."""
        self._rounds += 1

    def _run(self) -> None:
        stood, rounds, reported = 0.0, self._rounds, False
        before = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, ENDS_AFTER)
        while not self._over.wait(self._step):
            now = time.monotonic()
            # A step that took much longer is one in which the whole process did not run.
            stood, before = stood + min(now - before, 2 * self._step), now
            signal.setitimer(signal.ITIMER_PROF, ENDS_AFTER)
            if self._rounds != rounds:
                if reported:
                    _log_stood_still(stood)
                stood, rounds, reported = 0.0, self._rounds, False
            elif stood > ENDS_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            elif stood > self._patience and not reported:
                reported = True
                # Not by the log, whose lock the loop may hold.
                os.write(sys.stderr.fileno(), f"The relay stands still for {stood:.0f} s:\n".encode())
                faulthandler.dump_traceback(sys.stderr)


def _log_stood_still(seconds: float) -> None:
    log.error(
        "the relay stood still for %.0f s; the stacks above say where",
        seconds,
        extra={"t23_event": "relay_stood_still", "t23_seconds": round(seconds)},
    )
