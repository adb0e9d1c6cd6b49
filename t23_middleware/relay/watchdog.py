"""Shows where a relay hangs: if its loop makes no progress for a minute, the stacks of all threads go to stderr.

A relay that hangs keeps its lock, so that no other relay replaces it. After ten minutes it is killed, and the next play
starts a new one: a killed relay loses nothing. A separate thread measures the time without progress in short steps, so
that time in which the whole process was frozen (docker pause, a suspended machine) does not count. If even that thread
can't run, the kernel kills the process by its CPU time.
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

#: Seconds without a pass of the loop after which it counts as hanging: longer than a busy disk needs.
HANGS_AFTER = 60.0
#: Seconds without a pass after which it is killed: a disk that recovers needs less.
ENDS_AFTER = 600.0
#: One step of the measurement, as a share of the shorter of these times.
SHARE = 1 / 30


class Watchdog:
    """Watches one loop of this process, whose end may take *ending* seconds. Inactive until :meth:`watching`."""

    def __init__(self, ending: float) -> None:
        self._patience = HANGS_AFTER + ending
        self._step = min(self._patience, ENDS_AFTER) * SHARE
        self._rounds = 0
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context a hanging loop is reported, then killed. ``SIGUSR1`` writes the stacks at any time."""
        if sys.stderr is None:  # a service manager may start us without one
            yield
            return
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        # The default action also ends a process that no longer runs Python's handlers.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF,))
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # If no thread can be started, the relay works without a watchdog.
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
        """The loop made a pass."""
        self._rounds += 1

    def _run(self) -> None:
        stood, rounds, reported = 0.0, self._rounds, False
        before = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, ENDS_AFTER)
        while not self._over.wait(self._step):
            now = time.monotonic()
            # In a step that took much longer, the whole process did not run.
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
                # Not through logging: the loop may hold its lock.
                os.write(sys.stderr.fileno(), f"The relay stands still for {stood:.0f} s:\n".encode())
                faulthandler.dump_traceback(sys.stderr)


def _log_stood_still(seconds: float) -> None:
    log.error(
        "the relay stood still for %.0f s; the stacks above show where",
        seconds,
        extra={"t23_event": "relay_stood_still", "t23_seconds": round(seconds)},
    )
