"""Reads rotated logs of the proxy once: what the relay missed of them, and nothing that it has."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..settings import Settings
from ..state import StateFolder
from .intake import MS, Intake
from .playback import Playback
from .process import STORE_RETRY, Relay
from .proxy_join import ProxyJoin, all_positions
from .proxy_log import ProxyLog

#: The name under which the outbox keeps the positions in them; a log that is followed has its path for that.
ROTATED = "rotated"


class RotatedResult(NamedTuple):
    """What a run took in."""

    #: Reports that were made.
    reports: int
    #: How many of all reports wait to be delivered.
    waiting: int
    #: Lines that made none, and other events, by name.
    counts: Counter[str]
    #: Why it did not come to the end, in one sentence; empty where it did.
    why: str


class RotatedJoin(ProxyJoin):
    """Joins one rotated log. Of what came after its last line nothing is known here, so time goes no further."""

    _is_past = True

    def __init__(
        self, path: Path, playback: Playback, rows: Mapping[str, str], now_ns: int, now_ms: int
    ) -> None:
        super().__init__((), playback, rows, now_ns, now_ms)
        self._log = ProxyLog(path, all_positions(rows))
        self._logs = {ROTATED: self._log}

    def offset(self) -> int:
        """Up to where the log is taken, in bytes."""
        return self._log.offset()


class RotatedIntake(Intake):
    """Takes in one rotated log after the other, each from a :meth:`begin` of its own, and the journals beside it."""

    #: The log; set before :meth:`begin`.
    path: Path

    def offset(self) -> int:
        """Up to where the log is taken, in bytes."""
        return self._rotated.offset()

    def has_unread(self) -> bool:
        """Whether the log has more lines. Without one no time passes: others know of what comes then."""
        self._rotated.read(time.monotonic_ns(), time.time_ns() // MS)
        return not self._rotated.all_read

    def _make_join(self, rows: Mapping[str, str]) -> RotatedJoin:
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // MS
        self._rotated = RotatedJoin(self.path, self._playback, rows, now_ns, now_ms)
        return self._rotated

    def _log_proxy_problems(self) -> None:
        """The caller looked, before it began."""


class RotatedRelay(Relay):
    """Takes in the logs *paths*, the oldest first, and what the journals show of their time; delivers nothing.

    *show* gets the bytes that are read, after each piece. Raises
    :class:`~t23_middleware.relay.process.AnotherRelay` where another relay works on *folder*.
    """

    def __init__(
        self, settings: Settings, folder: StateFolder, paths: Sequence[Path], show: Callable[[int], None]
    ) -> None:
        super().__init__(settings, folder, automatic=False)
        self._paths = paths
        self._show = show
        self._why = ""

    def run_once(self) -> RotatedResult:
        """Read until nothing is left, or until told to stop."""
        self.run()
        return self._result

    def _work_while_needed(self) -> None:
        self._rotated.path = self._paths[0]
        self._begin()
        before, counted = self._outbox.stats(), Counter(self._outbox.counters())
        read = 0
        for path in self._paths:
            self._rotated.path = path
            self._rotated.begin()
            self._read_sources(read)
            read += self._rotated.offset()
        self._delivery.stop(0)
        stats, counts = self._outbox.stats(), Counter(self._outbox.counters())
        self._result = RotatedResult(
            stats.captured - before.captured, stats.waiting, counts - counted, self._why
        )
        self._end()

    def _make_intake(self) -> Intake:
        self._rotated = RotatedIntake(self._settings, self._folder, self._outbox, self._limits)
        return self._rotated

    def _read_sources(self, before: int) -> None:
        while self._rotated.has_unread() and not self._why:
            pause = self._ingest()
            self._show(before + self._rotated.offset())
            if pause == STORE_RETRY:
                self._why = f"the outbox {self._folder.outbox} can't be written; see 't23-middleware check'"
            elif self._ending:
                self._why = "it was told to stop; run it again, and it goes on where it was"
