"""Joins what the proxy's logs say with what the journals say: in the order of time, each line once.

What is read but not judged yet is kept in the outbox, in the transaction that moves the log's position on: so the relay
may end at any time, and no line is lost or taken twice.
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

#: How long a line may be ahead of its journal, in ns.
KEEP_UNMATCHED_NS = 5_000_000_000
#: Lines that are held at a time; more of them are another host's, or a cache's.
MOST_UNMATCHED = 10_000

#: How rows of the outbox are named: the positions in a log, the highest number of a writer, a line that is held.
_POSITIONS, _WRITER, _LINE = "places ", "writer ", "line "


class LoggedLine(NamedTuple):
    """A line of the log, on the time axis of this boot."""

    at_ns: int
    line: ProxyLine
    #: From when on it may be held.
    since_ns: int


class ProxyJoin:
    """Joins the lines of the logs at *paths* with the responses of *playback*; *rows* are what :meth:`changed` gave.

    Call in turn :meth:`read`, :meth:`judge` for what is :meth:`due`, :meth:`retry_unmatched`, :meth:`changed`, and :meth:`committed`
    once the outbox has it. Times are *now_ns* on the axis of CLOCK_MONOTONIC and *now_ms* since the epoch.
    """

    #: Whether these logs are of the past: of what came after their last line nothing is known here.
    _is_past = False

    def __init__(
        self, paths: Sequence[str], playback: Playback, rows: Mapping[str, str], now_ns: int, now_ms: int
    ) -> None:
        self._playback = playback
        self._logs = {
            path: ProxyLog(Path(path), _positions(rows.get(_POSITIONS + path, "[]"))) for path in paths
        }
        #: What was read of a log and is not taken yet.
        self._readings: dict[str, LogReading] = {}
        #: Its lines that are not due yet, in their order.
        self._not_due: dict[str, list[LoggedLine]] = {}
        #: Logs that retry_unmatched more than was read.
        self._backlogs: set[str] = set()
        #: When the last line was, of a log of what comes after which nothing is known here.
        self._end_ns: dict[str, int] = {}
        # Time goes on from what is known already, or yesterday's log would make all viewings read forgotten.
        self._until_ns = min(playback.latest_ns, now_ns)
        #: Due, and of no response that is open: by play.
        self._unmatched = {line.play: _on_clock(line, now_ns, now_ms) for line in _lines(rows)}
        self._stored = set(self._unmatched)
        #: When the latest line ended, in ms since the epoch; 0 for never.
        self.last_line_ms = 0
        #: Named events since the caller last took them.
        self.counts: Counter[str] = Counter()
        playback.issued_ids.restore(_writers(rows))

    @property
    def all_read(self) -> bool:
        """Whether the logs were read to their end, and all of it was judged."""
        return not self._readings and not self._backlogs

    def problems(self) -> dict[str, str | None]:
        """Log -> what keeps it from being read, as of the last read."""
        return {path: log.problem for path, log in self._logs.items()}

    def read(self, now_ns: int, now_ms: int) -> None:
        """Read on in each log of which all that was read is judged."""
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
        if reading.more or (self._is_past and lines):
            self._end_ns[path] = lines[-1].at_ns if lines else self._until_ns

    def until(self, time_ns: int) -> int:
        """Up to when all logs are read: of a backlog's rest nothing is known yet. It never goes back."""
        if self._end_ns:
            time_ns = min(time_ns, max(min(self._end_ns.values()), self._until_ns))
        self._until_ns = max(self._until_ns, time_ns)
        return time_ns

    @property
    def has_more(self) -> bool:
        """Whether a backlog is left that can be read at once."""
        return not self._backlogs <= self._readings.keys()

    def due(self, until_ns: int) -> list[LoggedLine]:
        """The lines up to *until_ns*, which leave."""
        due: list[LoggedLine] = []
        for path, lines in self._not_due.items():
            count = bisect_right(lines, until_ns, key=_at)
            due += lines[:count]
            self._not_due[path] = lines[count:]
        return sorted(due, key=_at)

    def judge(self, logged: LoggedLine) -> list[Report]:
        """A line whose turn it is; one of no open response is held for a while."""
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
            # It was open, for that is written down before the proxy hears of it, and has ended.
            if not _is_not_played(line):
                self.counts["proxy_cached"] += 1
        elif known.knows(line.writer_and_number[0]):
            self._unmatched[line.play] = logged
        else:
            # No longer than its own time tells: a backlog may be another host's.
            self._unmatched[line.play] = logged._replace(since_ns=logged.at_ns)
        return []

    def retry_unmatched(self, until_ns: int) -> list[Report]:
        """Try again what is held, and let go what was held long enough."""
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
        """The rows of the outbox that change with what was judged, ``None`` for one that goes."""
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
        """Log -> the positions that the next relay may go on from."""
        for path, reading in self._readings.items():
            if not self._not_due[path]:
                yield path, reading.positions
            elif reading.first_positions is not None:
                yield path, reading.first_positions

    def _judged(self) -> dict[str, LogReading]:
        """What was read of which each line was judged: only its whole has a position."""
        return {path: reading for path, reading in self._readings.items() if not self._not_due[path]}

    def take_counts(self) -> Counter[str]:
        """What was counted since the last call; the lines that are none, once their positions move on."""
        counts, self.counts = self.counts, Counter()
        for reading in self._judged().values():
            counts += reading.counts
        return counts

    def committed(self) -> None:
        """The outbox has what :meth:`changed` told."""
        self._stored = set(self._unmatched)
        for path, reading in self._judged().items():
            self._logs[path].committed(reading)
            del self._readings[path], self._not_due[path]


def _at(logged: LoggedLine) -> int:
    return logged.at_ns


def _on_clock(line: ProxyLine, now_ns: int, now_ms: int) -> LoggedLine:
    """A time that has not come yet is another clock's: it would retry_unmatched up all others until it comes."""
    return LoggedLine(now_ns - max(now_ms - line.ended_ms, 0) * 1_000_000, line, now_ns)


def _is_not_played(line: ProxyLine) -> bool:
    """Whether nobody played it: such a response leaves the journals without waiting for its line."""
    return not line.is_ok or line.body <= PROBE or (line.part.size or line.body) <= PROBE


def _positions_text(positions: Sequence[LogPosition]) -> str:
    return json.dumps([position.to_text() for position in positions])


def _positions(text: str) -> list[LogPosition]:
    """Of a row that can't be read, the log is read from its start: its plays are known, and none is reported twice."""
    try:
        return [LogPosition.from_text(position) for position in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []


def all_positions(rows: Mapping[str, str]) -> list[LogPosition]:
    """The positions in all logs that *rows* know of."""
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
