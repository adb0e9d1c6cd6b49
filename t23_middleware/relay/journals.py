"""Reads what the writers wrote: whole lines, in the order of all writers together, each once."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..state import StateFolder, hold_lock, lock_is_held
from ..transfer import (
    FORMAT,
    LONGEST_LINE,
    Counts,
    ForeignLine,
    Line,
    Opening,
    TornLine,
    Transfer,
    Writer,
    decode,
)

log = logging.getLogger(__name__)

#: Bytes that are taken from one journal at a look: a backlog is taken in pieces, each its own transaction.
PIECE = 1 << 20
#: Seconds between two looks at who lives; a writer's death is no hurry.
LOOK_AT_WRITERS_EVERY = 0.5


class Fact(NamedTuple):
    """A response that started or ended, on the time axis of this boot."""

    at_ns: int
    writer: str
    what: Opening | Transfer


class Reading(NamedTuple):
    """What one look brought."""

    facts: list[Fact]
    places: dict[str, int]
    counts: Counter[str]
    #: Whether a backlog is left that can be read at once.
    more: bool


@dataclass
class _Journal:
    """One file that is being followed."""

    path: Path
    offset: int
    header: Writer | None = None
    #: Whether all of it was taken at the last look.
    at_end: bool = False

    @property
    def writer(self) -> str:
        return self.path.name.split(".")[0]

    @property
    def sequence(self) -> int:
        return int(self.path.name.split(".")[1])

    def has_grown(self) -> bool:
        """Whether there is something behind the offset."""
        try:
            return not self.is_foreign() and self.path.stat().st_size > self.offset
        except FileNotFoundError:
            return False

    def is_foreign(self) -> bool:
        """Whether another version of the package wrote it, in a form that this one does not read."""
        return self.header is not None and self.header.format != FORMAT


class _Line(NamedTuple):
    """A line that was read: where it ends, when it happened, and what it says or the counter of what is wrong."""

    end: int
    at_ns: int
    what: Line | str


class _Piece(NamedTuple):
    """Lines of one journal; whether *more* follow, and whether there is a *rest* that is not a line yet."""

    journal: _Journal
    lines: list[_Line]
    more: bool
    rest: bool


class Journals:
    """The folder of journals; *places* says up to where each was taken in already."""

    def __init__(self, folder: StateFolder, places: dict[str, int]) -> None:
        self._folder = folder
        self._places = places
        self._followed: dict[str, _Journal] = {}
        self._boot = _boot_id()
        self._living: set[str] = set()
        self._looked = 0.0

    def read(self, until_ns: int) -> Reading:
        """Whole lines that are not younger than *until_ns* (CLOCK_MONOTONIC), merged in their order.

        A backlog comes in pieces; then no further than the shortest piece reaches, or one writer's past would be
        judged after another's present.
        """
        self._find()
        self._look_at_writers()
        pieces = [self._piece(journal, until_ns) for journal in self._followed.values()]
        horizon = min([until_ns, *(piece.lines[-1].at_ns for piece in pieces if piece.more and piece.lines)])
        reading = Reading([], {}, Counter(), any(piece.more for piece in pieces))
        for piece in pieces:
            self._take(piece, horizon, reading)
        reading.facts.sort(key=lambda fact: fact.at_ns)
        return reading

    def taken(self, reading: Reading) -> None:
        """The outbox has *reading*: go on behind it."""
        for name, offset in reading.places.items():
            self._followed[name].offset = offset

    def live_writers(self) -> list[Writer]:
        """Headers of the writers that live, the newest-started last."""
        headers = {
            j.writer: j.header for j in self._followed.values() if j.header and j.writer in self._living
        }
        return sorted(headers.values(), key=lambda header: header.started_ms)

    def has_live_writer(self) -> bool:
        """Whether any writer lives, whatever it wrote."""
        return bool(self._living)

    def dead_writers(self, among: Iterable[str]) -> set[str]:
        """Those of *among* that died and of whom everything is read."""
        unread = {journal.writer for journal in self._followed.values() if not journal.at_end}
        return {writer for writer in among if writer not in self._living and writer not in unread}

    def remove_finished(self) -> list[str]:
        """Unlink the journals that nobody writes any more and that are read to the end; their names.

        First the file, then (by the caller) its place: after a kill in between, a place without a file is harmless,
        while a file without its place would be read a second time.
        """
        finished = [name for name, journal in self._followed.items() if self._is_finished(journal)]
        for name in finished:
            self._followed.pop(name).path.unlink(missing_ok=True)
        self._remove_locks()
        return finished

    def all_read(self) -> bool:
        """Whether no journal holds a line that was not taken."""
        return all(journal.at_end for journal in self._followed.values())

    def has_news(self) -> bool:
        """Whether a writer lives, or anything was written that :meth:`taken` does not know of."""
        self._look_at_writers()
        self._find()
        return self.has_live_writer() or any(journal.has_grown() for journal in self._followed.values())

    def _look_at_writers(self) -> None:
        """Who lives is asked before reading: then a dead writer's end of file is its last word.

        That one lives may be remembered for a while. That one is dead may not: it may only now have begun.
        """
        if time.monotonic() - self._looked >= LOOK_AT_WRITERS_EVERY:
            self._looked = time.monotonic()
            self._living.clear()
        names = {lock.name.removesuffix(".lock") for lock in self._folder.journals.glob("*.lock")}
        self._living |= {name for name in names - self._living if lock_is_held(self._lock_of(name))}

    def _lock_of(self, writer: str) -> Path:
        return self._folder.journals / f"{writer}.lock"

    def _find(self) -> None:
        for path in sorted(self._folder.journals.glob("*.journal")):
            if path.name not in self._followed and path.name.count(".") == 2:
                self._followed[path.name] = _Journal(path, self._places.pop(path.name, 0))

    def _piece(self, journal: _Journal, until_ns: int) -> _Piece:
        """The next lines of one journal, without taking them."""
        data = self._read_bytes(journal)
        lines: list[_Line] = []
        start, at_ns = 0, 0
        while (end := data.find(b"\n", start)) >= 0:
            what = _read_line(data[start:end])
            if isinstance(what, (Opening, Transfer)):
                what, at_ns = self._on_our_axis(journal, what)
                if journal.writer not in self._living:
                    at_ns = min(at_ns, until_ns)  # nothing is to be waited for
            start = end + 1
            lines.append(_Line(journal.offset + start, at_ns, what))
        if start == 0 and len(data) > LONGEST_LINE:  # rubbish without an end: no line of ours is so long
            start = len(data)
            lines.append(_Line(journal.offset + start, at_ns, "journal_torn"))
        # A half line may still become whole while its writer lives; a dead writer's is torn for good.
        rest = start < len(data) and journal.writer in self._living
        return _Piece(journal, lines, more=len(data) == PIECE, rest=rest)

    def _take(self, piece: _Piece, horizon: int, reading: Reading) -> None:
        """Move the lines of *piece* up to *horizon* into *reading*."""
        taken = 0
        for line in piece.lines:
            if line.at_ns > horizon:
                break
            taken += 1
            reading.places[piece.journal.path.name] = line.end
            if line.what == "blank":
                continue
            if isinstance(line.what, str):
                reading.counts[line.what] += 1
            elif isinstance(line.what, Counts):
                reading.counts.update(line.what.counts)
            elif isinstance(line.what, (Opening, Transfer)):
                reading.facts.append(Fact(line.at_ns, piece.journal.writer, line.what))
        piece.journal.at_end = taken == len(piece.lines) and not piece.more and not piece.rest

    def _read_bytes(self, journal: _Journal) -> bytes:
        try:
            with journal.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if journal.offset > size:
                    journal.offset = size  # a power cut took what had been taken in already
                if journal.header is None:
                    self._read_header(journal, file.readline(LONGEST_LINE))
                if journal.is_foreign():
                    return b""
                file.seek(journal.offset)
                return file.read(PIECE)
        except FileNotFoundError:
            return b""

    def _read_header(self, journal: _Journal, line: bytes) -> None:
        header = _read_line(line.rstrip(b"\n"))
        if isinstance(header, Writer):
            journal.header = header

    def _on_our_axis(self, journal: _Journal, what: Opening | Transfer) -> tuple[Opening | Transfer, int]:
        """Lines of another boot are placed by their wall clock: the monotonic one began anew."""
        header = journal.header
        if header is not None and header.boot != self._boot:
            what = _placed_by_wall_clock(what, time.monotonic_ns() - time.time_ns())
        return what, what.started_ns if isinstance(what, Opening) else what.ended_ns

    def _is_finished(self, journal: _Journal) -> bool:
        """Read to the end, and either its writer is dead or two rotations on.

        One rotation is not enough: a thread may hold the file before the last for a line that it is about to write.
        """
        if not journal.at_end or journal.is_foreign():
            return False
        if journal.writer not in self._living:
            return True
        return any(
            other.writer == journal.writer and other.sequence >= journal.sequence + 2
            for other in self._followed.values()
        )

    def _remove_locks(self) -> None:
        """Locks of dead writers without a journal. Taken before they go: a writer may be about to begin with one."""
        writing = {journal.writer for journal in self._followed.values()} | self._living
        for lock in self._folder.journals.glob("*.lock"):
            if lock.name.removesuffix(".lock") in writing:
                continue
            descriptor = hold_lock(lock)
            if descriptor is not None:
                lock.unlink(missing_ok=True)
                os.close(descriptor)


def _read_line(line: bytes) -> Line | str:
    """The line, or the counter of what is wrong with it."""
    if not line:
        return "blank"  # the newline that keeps a torn line apart
    try:
        return decode(line)
    except TornLine:
        return "journal_torn"
    except ForeignLine:
        return "journal_foreign"


def _placed_by_wall_clock(what: Opening | Transfer, shift_ns: int) -> Opening | Transfer:
    if isinstance(what, Opening):
        return what._replace(started_ns=what.started_ms * 1_000_000 + shift_ns)
    opening = what.opening._replace(started_ns=what.opening.started_ms * 1_000_000 + shift_ns)
    return what._replace(opening=opening, ended_ns=what.ended_ms * 1_000_000 + shift_ns)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
