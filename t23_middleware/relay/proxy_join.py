"""Joins the lines of the proxy's logs with the journals' responses: in the order of time, each line once.

Lines that are read but not matched yet are stored in the outbox, in the transaction that stores the log's position. So
the relay may end at any time, and no line is lost or used twice.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .playback import Playback
from .proxy_line import ProxyLine
from .proxy_log import LogPosition, LogReading, ProxyLog
from .report import Report
from .viewing import PROBE

#: How long a line may come before its journal's line, in ns.
KEEP_UNMATCHED_NS = 5_000_000_000
#: Most unmatched lines in memory; more of them come from another host or a cache.
MOST_UNMATCHED = 10_000

#: Prefixes of the names of rows in the outbox: positions in a log, highest number of a writer, unmatched line.
_POSITIONS, _WRITER, _LINE = "places ", "writer ", "line "


class LoggedLine(NamedTuple):
    """A line of the log, at a time of this boot's CLOCK_MONOTONIC."""

    at_ns: int
    line: ProxyLine
    #: From this time on it may wait for its response.
    since_ns: int


class ProxyJoin:
    """Joins the lines of the logs at *paths* with the responses of *playback*; *rows* are those of :meth:`changed`.

    Call in turn :meth:`read`, :meth:`judge` for each line of :meth:`due`, :meth:`retry_unmatched`, :meth:`changed`, and
    :meth:`committed` once the outbox has stored the rows. *now_ns* is in ns of CLOCK_MONOTONIC, *now_ms* in ms since
    the epoch.
    """

    #: Whether these logs are complete: nothing is known of the time after their last line.
    _is_complete = False

    def __init__(
        self, paths: Sequence[str], playback: Playback, rows: Mapping[str, str], now_ns: int, now_ms: int
    ) -> None:
        self._playback = playback
        self._logs = {
            path: ProxyLog(Path(path), _positions(rows.get(_POSITIONS + path, "[]"))) for path in paths
        }
        #: Log -> reading that the outbox has not stored yet.
        self._readings: dict[str, LogReading] = {}
        #: Log -> its lines that are not due yet, in the order of their time.
        self._not_due: dict[str, list[LoggedLine]] = {}
        #: Logs with more lines than were read.
        self._backlogs: set[str] = set()
        #: Log -> time of its last read line, for logs of which later lines are unknown.
        self._end_ns: dict[str, int] = {}
        # Time continues from the latest fact, or yesterday's log would make all viewings look idle.
        self._until_ns = min(playback.latest_ns, now_ns)
        #: Play id -> due line for which no response is open.
        self._unmatched = {line.play: _on_clock(line, now_ns, now_ms) for line in _lines(rows)}
        self._stored = set(self._unmatched)
        #: Time of the latest line, in ms since the epoch; 0 for none.
        self.last_line_ms = 0
        #: Events since the last :meth:`take_counts`, by name.
        self.counts: Counter[str] = Counter()
        playback.issued_ids.restore(_writers(rows))

    @property
    def all_read(self) -> bool:
        """Whether the logs were read to their end and all lines were judged."""
        return not self._readings and not self._backlogs

    def problems(self) -> dict[str, str | None]:
        """Log -> why it can't be read, as of the latest read; ``None`` if it can."""
        return {path: log.problem for path, log in self._logs.items()}

    def read(self, now_ns: int, now_ms: int) -> None:
        """Read the next lines of each log whose previous lines are stored."""
        for path, log in self._logs.items():
            if path not in self._readings:
                reading = log.read()
                self._backlogs.discard(path)
                self._end_ns.pop(path, None)
                if reading.changed:
                    self._begin_reading(path, reading, now_ns, now_ms)

    def _begin_reading(self, path: str, reading: LogReading, now_ns: int, now_ms: int) -> None:
        lines = sorted((_on_clock(line, now_ns, now_ms) for line in reading.lines), key=_at)
        self._readings[path], self._not_due[path] = reading, lines
        if reading.more:
            self._backlogs.add(path)
        if reading.more or (self._is_complete and lines):
            self._end_ns[path] = lines[-1].at_ns if lines else self._until_ns

    def until(self, time_ns: int) -> int:
        """The time up to which all logs are read, at most *time_ns*: a backlog's rest is unknown. Never decreases."""
        if self._end_ns:
            time_ns = min(time_ns, max(min(self._end_ns.values()), self._until_ns))
        self._until_ns = max(self._until_ns, time_ns)
        return time_ns

    @property
    def has_more(self) -> bool:
        """Whether a backlog is left that can be read at once."""
        return not self._backlogs <= self._readings.keys()

    def due(self, until_ns: int) -> list[LoggedLine]:
        """Remove and return the lines up to *until_ns*."""
        due: list[LoggedLine] = []
        for path, lines in self._not_due.items():
            count = bisect_right(lines, until_ns, key=_at)
            due += lines[:count]
            self._not_due[path] = lines[count:]
        return sorted(due, key=_at)

    def judge(self, logged: LoggedLine) -> list[Report]:
        """Process the next line. One without an open response is kept for up to :data:`KEEP_UNMATCHED_NS`."""
        line = logged.line
        self.last_line_ms = max(self.last_line_ms, line.ended_ms)
        if line.is_cached:
            if not _is_not_played(line):
                self.counts["proxy_cached"] += 1
            return []
        reports = self._playback.logged(line, logged.at_ns)
        if reports is not None:
            return reports
        known = self._playback.issued_ids
        if line.play in self._unmatched:
            self.counts["proxy_cached"] += 1
        elif known.has(*line.writer_and_number):
            # Its response has ended: its open line is written before the proxy learns the id.
            if not _is_not_played(line):
                self.counts["proxy_cached"] += 1
        elif known.knows(line.writer_and_number[0]):
            self._unmatched[line.play] = logged
        else:
            # Counted from the line's own time, since a backlog may come from another host.
            self._unmatched[line.play] = logged._replace(since_ns=logged.at_ns)
        return []

    def retry_unmatched(self, until_ns: int) -> list[Report]:
        """Try to match the unmatched lines again, and drop those that waited too long."""
        reports: list[Report] = []
        too_many = len(self._unmatched) - MOST_UNMATCHED
        for number, logged in enumerate(list(self._unmatched.values())):
            found = self._playback.logged(logged.line, logged.at_ns)
            if found is None and number >= too_many and until_ns - logged.since_ns < KEEP_UNMATCHED_NS:
                continue
            del self._unmatched[logged.line.play]
            reports += found or []
            if found is None:
                self.counts["proxy_foreign"] += 1
        return reports

    def changed(self) -> list[tuple[str, str | None]]:
        """The outbox's rows that change, ``None`` for one that is deleted."""
        rows: list[tuple[str, str | None]] = [
            (_WRITER + writer, None if number is None else str(number))
            for writer, number in self._playback.issued_ids.changed()
        ]
        rows += [(_LINE + play, None) for play in self._stored - self._unmatched.keys()]
        rows += [
            (_POSITIONS + path, _positions_text(positions)) for path, positions in self._kept_positions()
        ]
        new = [logged for play, logged in self._unmatched.items() if play not in self._stored]
        return rows + [(_LINE + logged.line.play, logged.line.to_text()) for logged in new]

    def _kept_positions(self) -> Iterator[tuple[str, list[LogPosition]]]:
        """Log -> the positions from which the next relay may continue."""
        for path, reading in self._readings.items():
            if not self._not_due[path]:
                yield path, reading.positions
            elif reading.first_positions is not None:
                yield path, reading.first_positions

    def _judged(self) -> dict[str, LogReading]:
        """The readings of which all lines were judged; only a whole reading has a position."""
        return {path: reading for path, reading in self._readings.items() if not self._not_due[path]}

    def take_counts(self) -> Counter[str]:
        """Counts since the last call. Bad lines are counted when their reading is judged."""
        counts, self.counts = self.counts, Counter()
        for reading in self._judged().values():
            counts += reading.counts
        return counts

    def committed(self) -> None:
        """The outbox has stored what :meth:`changed` returned."""
        self._stored = set(self._unmatched)
        for path, reading in self._judged().items():
            self._logs[path].committed(reading)
            del self._readings[path], self._not_due[path]


def _at(logged: LoggedLine) -> int:
    return logged.at_ns


def _on_clock(line: ProxyLine, now_ns: int, now_ms: int) -> LoggedLine:
    """*line* with its monotonic time. A time in the future comes from another clock, and counts as now."""
    return LoggedLine(now_ns - max(now_ms - line.ended_ms, 0) * 1_000_000, line, now_ns)


def _is_not_played(line: ProxyLine) -> bool:
    """Whether it played nothing: such a response ends without waiting for its line."""
    return not line.is_ok or line.body <= PROBE or (line.part.size or line.body) <= PROBE


def _positions_text(positions: Sequence[LogPosition]) -> str:
    return json.dumps([position.to_text() for position in positions])


def _positions(text: str) -> list[LogPosition]:
    """The positions in *text*. If it can't be read, the log is read from its start; no play counts twice."""
    try:
        return [LogPosition.from_text(position) for position in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []


def all_positions(rows: Mapping[str, str]) -> list[LogPosition]:
    """The positions of all logs in *rows*."""
    return [
        position
        for name, text in rows.items()
        if name.startswith(_POSITIONS)
        for position in _positions(text)
    ]


def _lines(rows: Mapping[str, str]) -> Iterator[ProxyLine]:
    for name, text in rows.items():
        if name.startswith(_LINE):
            with suppress(ValueError):
                yield ProxyLine.from_text(text)


def _writers(rows: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    for name, text in rows.items():
        if name.startswith(_WRITER) and text.isascii() and text.isdigit():
            yield name.removeprefix(_WRITER), int(text)
