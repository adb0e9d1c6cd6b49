"""The time that has passed for sure: nothing is given up, and nothing tried again, because somebody set a clock.

The wall clock may be wrong for a while, above all at boot. So ages and retries are measured by a clock of our own,
which goes on while this machine runs (CLOCK_MONOTONIC) and is kept in the outbox. It stands still while the machine
is off or suspended: nothing there says how long that was but the wall clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

#: Name of the note that keeps it.
ELAPSED = "elapsed"


class Elapsed:
    """Milliseconds in which a machine ran, counted on from *notes* (:meth:`~.outbox.SQLiteOutbox.notes`).

    *boot* is the kernel's name for this boot, within which *monotonic*, a clock in seconds, goes on.
    """

    def __init__(self, notes: Mapping[str, str], boot: str, monotonic: Callable[[], float]) -> None:
        self._boot = boot
        self._monotonic = monotonic
        self._began = monotonic()
        self._before_ms = _passed_ms(notes.get(ELAPSED, ""), boot, self._began)

    def now_ms(self) -> int:
        """The time now; never less than before."""
        return self._before_ms + int((self._monotonic() - self._began) * 1000)

    def note(self) -> dict[str, str]:
        """What the next relay needs to count on."""
        return {ELAPSED: json.dumps([self.now_ms(), self._boot, self._monotonic()])}


def _passed_ms(note: str, boot: str, now: float) -> int:
    try:
        passed_ms, noted_boot, noted = json.loads(note)
        since = now - noted if noted_boot == boot else 0.0
        return int(passed_ms) + int(max(since, 0.0) * 1000)
    except (ValueError, TypeError, OverflowError):
        return 0
