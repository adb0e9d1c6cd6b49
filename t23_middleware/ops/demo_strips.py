"""Who was streamed what of a file, live: the journals as the relay reads them, judged by the relay's own rule.

A strip is one viewing, a bar on it the part of the file that one response handed over. All of it is bounded: the
latest viewings, and of each the latest responses.
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

#: Viewings that are kept, and responses of each.
MOST_STRIPS = 12
MOST_BARS = 100


@dataclass(eq=False)
class Bar:
    """What one response handed over. Offsets and sizes are bytes, times are ms since the epoch."""

    writer: str
    number: int
    first: int
    #: Bytes that it has if nobody cuts it off.
    size: int | None
    started_ms: int
    #: As it is told, or would be if it ended now.
    skip: int
    #: Whether the player went there from elsewhere.
    jump: bool
    sent: int = 0
    ended_ms: int | None = None

    @property
    def end(self) -> int:
        """Offset behind its last byte."""
        return self.first + self.sent


@dataclass(eq=False)
class Strip:
    """One viewing."""

    viewing: Viewing
    play: Play
    started_ms: int
    #: The file's size.
    total: int | None
    bars: deque[Bar] = field(default_factory=lambda: deque(maxlen=MOST_BARS))

    def has_end_near(self, offset: int) -> bool:
        """Whether what was handed over so far ends at *offset*, so that what starts there goes on from it."""
        return any(abs(bar.end - offset) <= self.viewing.reach for bar in self.bars)


class Strips:
    """Those of the state folder *folder*, the latest last; each :meth:`follow` takes in what was written since."""

    def __init__(self, folder: StateFolder) -> None:
        self._journals = Journals(folder, {})
        self._playback = Playback()
        self._strips: deque[Strip] = deque(maxlen=MOST_STRIPS)

    def __iter__(self) -> Iterator[Strip]:
        return iter(self._strips)

    @property
    def open_responses(self) -> int:
        """How many are under way, also on strips that are no longer kept."""
        return sum(1 for _ in self._playback.open_responses())

    def follow(self) -> None:
        """Take in what the workers wrote."""
        more = True
        while more:
            reading = self._journals.read(time.monotonic_ns() - LATE_NS)
            for fact in reading.facts:
                self._take(fact)
            self._journals.committed(reading)
            more = reading.more
        self._journals.forget_removed()
        self._end_what_the_dead_left(reading.until_ns)
        self._playback.advance(reading.until_ns, _wall_ms())
        for _ in self._playback.changed():
            pass  # nothing of it is kept

    def _take(self, fact: Fact) -> None:
        if isinstance(fact.event, Acknowledged):
            return
        what = _as_the_app_counts(fact.event)
        if isinstance(what, Opening):
            self._playback.opened(fact.writer, what)
            self._begin(fact.writer, what)
        elif isinstance(what, Progress):
            self._playback.progressed(fact.writer, what)
            for _, bar in self._find(fact.writer, what.opening.number):
                bar.sent = what.sent
        else:
            reports = self._playback.closed(fact.writer, what)
            self._end(fact.writer, what, reports)

    def _begin(self, writer: str, opening: Opening) -> None:
        found = self._playback.find_open(writer, opening.number)
        if found is None:
            return  # it asks whether ranges work, and plays nothing
        viewing, response = found
        strip = self._strip_of(viewing, opening)
        first = response.first or 0
        said, follows = opening.play.skip, not viewing.is_first_response(response)
        strip.total = response.total or strip.total
        strip.bars.append(
            Bar(
                writer,
                opening.number,
                first,
                response.expected,
                opening.started_ms,
                skip=int(follows) if said is None else said,
                jump=follows and not strip.has_end_near(first),
            )
        )

    def _strip_of(self, viewing: Viewing, opening: Opening) -> Strip:
        for strip in self._strips:
            if strip.viewing is viewing:
                return strip
        strip = Strip(viewing, opening.play, opening.started_ms, opening.part.total)
        self._strips.append(strip)
        return strip

    def _end(self, writer: str, transfer: Transfer, reports: list[Report]) -> None:
        for strip, bar in self._find(writer, transfer.opening.number):
            bar.sent, bar.ended_ms = transfer.sent, transfer.ended_ms
            if reports:
                bar.skip = reports[-1].skip
            else:
                strip.bars.remove(bar)
                if not strip.bars:
                    self._strips.remove(strip)

    def _end_what_the_dead_left(self, at_ns: int) -> None:
        """As the relay does it: a worker that was killed leaves its responses open."""
        open_now = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_now}) if open_now else set()
        for writer, number in open_now:
            if writer in dead:
                self._playback.writer_died(writer, number, at_ns, _wall_ms())
                for _, bar in self._find(writer, number):
                    bar.ended_ms = _wall_ms()

    def _find(self, writer: str, number: int) -> list[tuple[Strip, Bar]]:
        """The open bar of that name, with its strip, where it is still kept."""
        return [
            (strip, bar)
            for strip in self._strips
            for bar in strip.bars
            if bar.number == number and bar.writer == writer and bar.ended_ms is None
        ]


def _as_the_app_counts(what: ResponseEvent) -> ResponseEvent:
    """Behind nginx too: its log is not followed here, and without it a response would never end."""
    if isinstance(what, Opening):
        return what._replace(counted_by=APP)
    return what._replace(opening=what.opening._replace(counted_by=APP))


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
