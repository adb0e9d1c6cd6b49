"""A clock for ages and retries that does not jump: setting the wall clock drops no report and causes no early retry.

The wall clock may be wrong for a while, above all at boot. This clock counts while the machine runs (CLOCK_MONOTONIC)
and is stored in the outbox. It stops while the machine is off or suspended, since only the wall clock could measure
that time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

#: Name of the note in the outbox.
ELAPSED = "elapsed"


class Elapsed:
    """Milliseconds in which the machine ran, continued from *notes* (:meth:`~.outbox.SQLiteOutbox.notes`).

    *boot* is the kernel's id of this boot; *monotonic* is a clock in seconds, which continues within a boot.
    """

    def __init__(self, notes: Mapping[str, str], boot: str, monotonic: Callable[[], float]) -> None:
        self._boot = boot
        self._monotonic = monotonic
        self._began = monotonic()
        self._before_ms = _passed_ms(notes.get(ELAPSED, ""), boot, self._began)

    def now_ms(self) -> int:
        """The current time in ms; it never decreases."""
        return self._before_ms + int((self._monotonic() - self._began) * 1000)

    def note(self) -> dict[str, str]:
        """The note from which the next relay continues."""
        return {ELAPSED: json.dumps([self.now_ms(), self._boot, self._monotonic()])}


def _passed_ms(note: str, boot: str, now: float) -> int:
    try:
        passed_ms, noted_boot, noted = json.loads(note)
        since = now - noted if noted_boot == boot else 0.0
        return int(passed_ms) + int(max(since, 0.0) * 1000)
    except (ValueError, TypeError, OverflowError):
        return 0
