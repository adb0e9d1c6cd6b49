"""Reads rotated logs of the proxy once. Lines that the relay has read already are skipped."""

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

#: The name under which the outbox stores the positions in them; for a followed log that is its path.
ROTATED = "rotated"


class RotatedResult(NamedTuple):
    """The result of a run."""

    #: Number of new reports.
    reports: int
    #: Number of all reports that wait for delivery.
    waiting: int
    #: Lines without a report, and other events, by the counter's name.
    counts: Counter[str]
    #: Why it did not reach the end, in one sentence; empty if it did.
    why: str


class RotatedJoin(ProxyJoin):
    """Joins one rotated log. Time stops at its last line, since nothing is known of later lines."""

    _is_complete = True

    def __init__(
        self, path: Path, playback: Playback, rows: Mapping[str, str], now_ns: int, now_ms: int
    ) -> None:
        super().__init__((), playback, rows, now_ns, now_ms)
        self._log = ProxyLog(path, all_positions(rows))
        self._logs = {ROTATED: self._log}

    def offset(self) -> int:
        """The offset up to which the log is read, in bytes."""
        return self._log.offset()


class RotatedIntake(Intake):
    """Reads one rotated log after the other, each with its own :meth:`begin`, together with the journals."""

    #: The log; set before :meth:`begin`.
    path: Path

    def offset(self) -> int:
        """The offset up to which the log is read, in bytes."""
        return self._rotated_join.offset()

    def has_unread(self) -> bool:
        """Whether the log has more lines. Without one, no time passes: later lines are in other logs."""
        self._rotated_join.read(time.monotonic_ns(), time.time_ns() // MS)
        return not self._rotated_join.all_read

    def _make_join(self, rows: Mapping[str, str]) -> RotatedJoin:
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // MS
        self._rotated_join = RotatedJoin(self.path, self._playback, rows, now_ns, now_ms)
        return self._rotated_join

    def _log_proxy_problems(self) -> None:
        """Nothing: the caller checked the log before it began."""


class RotatedRelay(Relay):
    """Reads the logs *paths*, the oldest first, and the journals up to the same time. Delivers nothing.

    *show* is called after each piece with the bytes that are read. Raises
    :class:`~t23_middleware.relay.process.AnotherRelay` if another relay works on *folder*.
    """

    def __init__(
        self, settings: Settings, folder: StateFolder, paths: Sequence[Path], show: Callable[[int], None]
    ) -> None:
        super().__init__(settings, folder, automatic=False)
        self._paths = paths
        self._show = show
        self._why = ""

    def run_once(self) -> RotatedResult:
        """Read until nothing is left, or until :meth:`stop`."""
        self.run()
        return self._result

    def _work_while_needed(self) -> None:
        self._rotated_intake.path = self._paths[0]
        self._begin()
        before, counted = self._outbox.stats(), Counter(self._outbox.counters())
        read = 0
        for path in self._paths:
            self._rotated_intake.path = path
            self._rotated_intake.begin()
            self._read_log(read)
            read += self._rotated_intake.offset()
        self._delivery.stop(0)
        stats, counts = self._outbox.stats(), Counter(self._outbox.counters())
        self._result = RotatedResult(
            stats.captured - before.captured, stats.waiting, counts - counted, self._why
        )
        self._end()

    def _make_intake(self) -> Intake:
        self._rotated_intake = RotatedIntake(self._settings, self._folder, self._outbox, self._limits)
        return self._rotated_intake

    def _read_log(self, before: int) -> None:
        while self._rotated_intake.has_unread() and not self._why:
            pause = self._ingest()
            self._show(before + self._rotated_intake.offset())
            if pause == STORE_RETRY:
                self._why = f"the outbox {self._folder.outbox} can't be written; see 't23-middleware check'"
            elif self._ending:
                self._why = "it was stopped; run it again to continue from there"
