"""What was streamed of each file, live: read from the journals in the relay's way and judged by the relay's rules.

A row is one viewing; a served range is the part of the file that one response sent. Both are bounded: only the latest
viewings are kept, and of each only the latest responses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..relay.axis import ResponseEvent
from ..relay.intake import LATE_NS
from ..relay.journals import Fact, Journals
from ..relay.playback import Playback
from ..relay.report import Report
from ..relay.viewing import Viewing
from ..state import StateFolder
from ..transfer import APP, Acknowledged, Opening, Play, Progress, Transfer

#: Viewings that are kept, and responses of each, at most.
MAX_VIEWINGS = 12
MAX_RANGES = 100


@dataclass(eq=False)
class ServedRange:
    """The bytes that one response sent. Offsets and sizes are bytes, times are ms since the epoch."""

    writer: str
    number: int
    first: int
    #: Bytes of the response if it is not cut off.
    size: int | None
    started_ms: int
    #: ``skip`` of its report, or of the report if the response ended now.
    skip: int
    #: Whether the player jumped to this offset.
    jump: bool
    sent: int = 0
    ended_ms: int | None = None

    @property
    def end(self) -> int:
        """Offset after its last byte."""
        return self.first + self.sent


@dataclass(eq=False)
class ViewingRow:
    """One viewing."""

    viewing: Viewing
    play: Play
    started_ms: int
    #: The file's size.
    total: int | None
    ranges: deque[ServedRange] = field(default_factory=lambda: deque(maxlen=MAX_RANGES))

    def ends_near(self, offset: int) -> bool:
        """Whether a served range ends near *offset*, so that a response from there continues it."""
        return any(abs(served.end - offset) <= self.viewing.reach for served in self.ranges)


class ViewingRows:
    """The viewings of the state folder *folder*, the latest last. :meth:`follow` reads the new journal lines."""

    def __init__(self, folder: StateFolder) -> None:
        self._journals = Journals(folder, {})
        self._playback = Playback()
        self._rows: deque[ViewingRow] = deque(maxlen=MAX_VIEWINGS)

    def __iter__(self) -> Iterator[ViewingRow]:
        return iter(self._rows)

    @property
    def open_responses(self) -> int:
        """Number of responses in progress, also of viewings that are no longer kept."""
        return sum(1 for _ in self._playback.open_responses())

    def follow(self) -> None:
        """Read the new journal lines."""
        more = True
        while more:
            reading = self._journals.read(time.monotonic_ns() - LATE_NS)
            for fact in reading.facts:
                self._apply(fact)
            self._journals.committed(reading)
            more = reading.more
        self._journals.forget_removed()
        self._end_responses_of_dead_workers(reading.until_ns)
        self._playback.advance(reading.until_ns, _now_ms())
        for _ in self._playback.changed():
            pass  # the demo stores no state

    def _apply(self, fact: Fact) -> None:
        if isinstance(fact.event, Acknowledged):
            return
        what = _counted_by_app(fact.event)
        if isinstance(what, Opening):
            self._playback.opened(fact.writer, what)
            self._begin(fact.writer, what)
        elif isinstance(what, Progress):
            self._playback.progressed(fact.writer, what)
            for _, served in self._find(fact.writer, what.opening.number):
                served.sent = what.sent
        else:
            reports = self._playback.closed(fact.writer, what)
            self._end(fact.writer, what, reports)

    def _begin(self, writer: str, opening: Opening) -> None:
        found = self._playback.find_open(writer, opening.number)
        if found is None:
            return  # a probe for range support, which plays nothing
        viewing, response = found
        row = self._row_of(viewing, opening)
        first = response.first or 0
        said, follows = opening.play.skip, not viewing.is_first_response(response)
        row.total = response.total or row.total
        row.ranges.append(
            ServedRange(
                writer,
                opening.number,
                first,
                response.expected,
                opening.started_ms,
                skip=int(follows) if said is None else said,
                jump=follows and not row.ends_near(first),
            )
        )

    def _row_of(self, viewing: Viewing, opening: Opening) -> ViewingRow:
        for row in self._rows:
            if row.viewing is viewing:
                return row
        row = ViewingRow(viewing, opening.play, opening.started_ms, opening.part.total)
        self._rows.append(row)
        return row

    def _end(self, writer: str, transfer: Transfer, reports: list[Report]) -> None:
        for row, served in self._find(writer, transfer.opening.number):
            served.sent, served.ended_ms = transfer.sent, transfer.ended_ms
            if reports:
                served.skip = reports[-1].skip
            else:
                row.ranges.remove(served)
                if not row.ranges:
                    self._rows.remove(row)

    def _end_responses_of_dead_workers(self, at_ns: int) -> None:
        """End open responses of workers that were killed, like the relay."""
        open_now = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_now}) if open_now else set()
        for writer, number in open_now:
            if writer in dead:
                self._playback.writer_died(writer, number, at_ns, _now_ms())
                for _, served in self._find(writer, number):
                    served.ended_ms = _now_ms()

    def _find(self, writer: str, number: int) -> list[tuple[ViewingRow, ServedRange]]:
        """The open range of this response, with its row, if it is still kept."""
        return [
            (row, served)
            for row in self._rows
            for served in row.ranges
            if served.number == number and served.writer == writer and served.ended_ms is None
        ]


def _counted_by_app(what: ResponseEvent) -> ResponseEvent:
    """Count by the app, also behind nginx: its log is not read here, and without its line no response would end."""
    if isinstance(what, Opening):
        return what._replace(counted_by=APP)
    return what._replace(opening=what.opening._replace(counted_by=APP))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
