"""Reads what the writers wrote: whole lines, in the order of all writers together, each once."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .. import owned
from ..state import StateFolder, boot_id, hold_lock, lock_is_held
from ..transfer import (
    FORMAT,
    LONGEST_LINE,
    Acknowledged,
    Counts,
    ForeignLine,
    Line,
    TornLine,
    Transfer,
    Writer,
    decode,
)
from .axis import Event, rebased_by_wall_clock, time_of, without_connection
from .crash import crash_point

log = logging.getLogger(__name__)

#: Bytes that are taken from one journal at a look: a backlog is taken in pieces, each its own transaction.
PIECE = 256 << 10
#: Bytes that are read of a new journal, to see when it begins.
FIRST_READ = 16 << 10
#: Seconds between two looks at who lives; a writer's death is no hurry.
CHECK_WRITERS_EVERY = 0.5


#: Of a line that says nothing of its time: it never has to wait for its turn.
ANY_TIME = -(1 << 63)

#: How the name of a relay's own writer begins.
RELAY_PREFIX = "relay-"
_NAME = re.compile(r"([^.]+)\.(\d+)\.journal")
#: What a line must hold to be one that can't be stored: a long number, or the escape of half a surrogate pair.
_SUSPECT = re.compile(rb"[\[,:] ?-?\d{19}|\\u[dD]")


class Fact(NamedTuple):
    """What a response did, on the time axis of this boot."""

    at_ns: int
    writer: str
    event: Event


@dataclass
class Reading:
    """What one look brought: all that happened until *until_ns*, where not more of it is left."""

    until_ns: int
    facts: list[Fact] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    #: Whether a backlog is left that can be read at once.
    more: bool = False


@dataclass
class _FollowedJournal:
    """One file that is being followed."""

    path: Path
    writer: str
    sequence: int
    offset: int
    header: Writer | None = None
    #: When the line that comes next happened, in ns; ``None`` before the first look.
    next_ns: int | None = None
    #: Whether all of it was taken at the last look.
    at_end: bool = False
    #: Whether the last try to read it failed.
    unreadable: bool = False

    def has_grown(self) -> bool:
        """Whether there is something behind the offset."""
        try:
            return not self.is_unusable() and owned.look_at(self.path).st_size > self.offset
        except FileNotFoundError:
            return False

    def is_foreign(self) -> bool:
        """Whether another version of the package wrote it, in a form that this one does not read."""
        return self.header is not None and self.header.format != FORMAT

    def is_unusable(self) -> bool:
        """Whether this relay can do nothing with it."""
        return self.unreadable or self.is_foreign()


class _ReadLine(NamedTuple):
    """A line that was read: where it ends, when it happened, and what it says or the counter of what is wrong."""

    end: int
    at_ns: int
    what: Line | str


class _JournalPiece(NamedTuple):
    """Lines of one journal; whether *more* follow, and whether there is a *rest* that is not a line yet."""

    journal: _FollowedJournal
    lines: list[_ReadLine]
    more: bool
    rest: bool

    def reaches(self, until_ns: int) -> int:
        """Up to when it tells all. Not its last line but its latest: lines are taken as they stand in the file,
        and one that no piece ever reached would stop them for good."""
        return min(until_ns, max(line.at_ns for line in self.lines)) if self.more else until_ns


class Journals:
    """The folder of journals; *offsets* says up to where each was taken in already.

    *own_writer* gives the name of this process's own writer, ``""`` where it has none. *network* is the inode of the network
    namespace whose connections the kernel can be asked about; what is told of others is left out.
    """

    def __init__(
        self,
        folder: StateFolder,
        offsets: dict[str, int],
        *,
        own_writer: Callable[[], str] = str,
        network: int | None = None,
    ) -> None:
        self._folder = folder
        self._own_writer = own_writer
        self._network = network
        self._offsets = offsets
        self._followed: dict[str, _FollowedJournal] = {}
        self._newest: dict[str, int] = {}
        self._boot = boot_id()
        # Taken once: two clocks that are asked one after the other are never as far apart twice.
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self._live: set[str] = set()
        self._checked_at = 0.0

    def read(self, until_ns: int, size: int = PIECE) -> Reading:
        """Whole lines that are not younger than *until_ns* (CLOCK_MONOTONIC), merged in their order.

        A backlog comes in pieces of *size* bytes, at least LONGEST_LINE; then no further than the shortest piece reaches, or one writer's past would be
        judged after another's present.
        """
        self._find()
        # Now, and not when one more is found: what was read before its end was known to be one is not at its end.
        # Files are found in the order of their names, so a writer's last one counts.
        self._newest = {journal.writer: journal.sequence for journal in self._followed.values()}
        self._check_writers()
        pieces, horizon = self._pieces(until_ns, size)
        reading = Reading(horizon)
        for piece in pieces:
            self._add_lines(piece, reading)
        reading.facts.sort(key=lambda fact: fact.at_ns)
        return reading

    def committed(self, reading: Reading) -> None:
        """The outbox has *reading*: go on behind it."""
        for name, offset in reading.offsets.items():
            self._followed[name].offset = offset

    def live_writers(self) -> list[Writer]:
        """Headers of the writers that live, the newest-started last; relays' own are none."""
        living = self._live_workers()
        headers = {j.writer: j.header for j in self._followed.values() if j.header and j.writer in living}
        return sorted(headers.values(), key=lambda header: header.started_ms)

    def forget_removed(self) -> None:
        """Follow no longer what somebody else removed; for those who only look on."""
        self._followed = {
            name: journal for name, journal in self._followed.items() if _is_there(journal.path)
        }

    def has_live_writer(self) -> bool:
        """Whether any writer lives, whatever it wrote; relays' own are none."""
        return bool(self._live_workers())

    def _live_workers(self) -> set[str]:
        return {name for name in self._live if not name.startswith(RELAY_PREFIX)}

    def dead_writers(self, among: Iterable[str]) -> set[str]:
        """Those of *among* that died and of whom everything is read."""
        self._find()  # a last file, begun between the look for files and the one at who lives
        unread = {
            journal.writer
            for journal in self._followed.values()
            if not journal.at_end or journal.is_unusable()
        }
        return {writer for writer in among if writer not in self._live and writer not in unread}

    def remove_finished(self) -> list[str]:
        """Unlink the journals that nobody writes any more and that are read to the end; names without a file.

        First the file, then (by the caller) its place: after a kill in between, a place without a file is harmless
        and named by the next relay, while a file without its place would be read a second time.
        """
        finished = [name for name, journal in self._followed.items() if self._is_finished(journal)]
        for name in finished:
            owned.remove(self._followed[name].path)  # or it fails, and is followed on
            del self._followed[name]
            crash_point("after_unlink")
        self._remove_locks()
        forgotten, self._offsets = list(self._offsets), {}
        return finished + forgotten

    def remove_committed(self, writer: str) -> list[str]:
        """Unlink the journals of *writer*, which has ended, and its lock where all that it wrote was taken."""
        self._find()
        files = {name: journal for name, journal in self._followed.items() if journal.writer == writer}
        if any(journal.has_grown() for journal in files.values()):
            return []
        for name, journal in files.items():
            owned.remove(journal.path)
            del self._followed[name]
        owned.remove(self._lock_of(writer))
        return list(files)

    def foreign(self) -> dict[str, str]:
        """Name -> format of the journals that only another version's relay can read."""
        return {
            name: str(journal.header.format)
            for name, journal in self._followed.items()
            if journal.header and journal.is_foreign()
        }

    def remove_foreign(self, names: Iterable[str]) -> list[str]:
        """Unlink those of *names*, all from :meth:`foreign`, that nobody writes."""
        gone = []
        for name in names:
            journal = self._followed[name]
            if journal.writer not in self._live:
                owned.remove(journal.path)
                del self._followed[name]
                gone.append(name)
        return gone

    def all_read(self) -> bool:
        """Whether no journal holds a line that was not taken."""
        return all(journal.at_end for journal in self._followed.values())

    def has_news(self, *, of_writers: bool = True) -> bool:
        """Whether anything was written that :meth:`committed` does not know of or, with *of_writers*, a writer lives."""
        self._check_writers()
        self._find()
        return (of_writers and self.has_live_writer()) or any(
            journal.has_grown() for journal in self._followed.values()
        )

    def _check_writers(self) -> None:
        """Who lives is asked before reading: then a dead writer's end of file is its last word.

        That one lives may be remembered for a while. That one is dead may not: it may only now have begun.
        """
        if time.monotonic() - self._checked_at >= CHECK_WRITERS_EVERY:
            self._checked_at = time.monotonic()
            self._live.clear()
        # Our own lock must not be looked at: that would give it up (see hold_lock).
        self._live = self._live_workers() | {name for name in (self._own_writer(),) if name}
        names = {name.removesuffix(".lock") for name in owned.names(self._folder.journals, ".lock")}
        self._live |= {name for name in names - self._live if lock_is_held(self._lock_of(name))}

    def _lock_of(self, writer: str) -> Path:
        return self._folder.journals / f"{writer}.lock"

    def _find(self) -> None:
        for name in owned.names(self._folder.journals, ".journal"):
            if name not in self._followed and (parts := _NAME.fullmatch(name)):
                offset = max(self._offsets.pop(name, 0), 0)  # one flipped bit makes it negative
                path = self._folder.journals / name
                self._followed[name] = _FollowedJournal(path, parts[1], int(parts[2]), offset)

    def _pieces(self, until_ns: int, size: int) -> tuple[list[_JournalPiece], int]:
        """The next lines of all, and up to when they tell all; what begins later than that is not even read."""
        for journal in self._followed.values():
            if journal.next_ns is None:
                journal.next_ns = self._first_time_ns(journal, until_ns)
        pieces, horizon = [], until_ns
        for journal in sorted(self._followed.values(), key=_next_ns):
            if _next_ns(journal) <= horizon:
                pieces.append(self._piece(journal, until_ns, size))
                horizon = pieces[-1].reaches(horizon)
        return pieces, horizon

    def _first_time_ns(self, journal: _FollowedJournal, until_ns: int) -> int:
        lines = self._piece(journal, until_ns, FIRST_READ).lines
        return next((line.at_ns for line in lines if line.at_ns != ANY_TIME), ANY_TIME)

    def _piece(self, journal: _FollowedJournal, until_ns: int, size: int) -> _JournalPiece:
        """The next lines of one journal, without taking them."""
        data = self._read_bytes(journal, size)
        lines: list[_ReadLine] = []
        start, at_ns = 0, ANY_TIME
        while (end := data.find(b"\n", start)) >= 0:
            what = _read_line(data[start:end])
            if isinstance(what, Event):
                what, at_ns = self._on_our_clock(journal, what, until_ns)
            start = end + 1
            lines.append(_ReadLine(journal.offset + start, at_ns, what))
        more, rest = len(data) == size, start < len(data)
        if rest and self._is_torn(journal, len(data) - start, more):
            rest = False
            lines.append(_ReadLine(journal.offset + len(data), at_ns, "journal_torn"))
        return _JournalPiece(journal, lines, more, rest)

    def _is_torn(self, journal: _FollowedJournal, length: int, more: bool) -> bool:
        """Whether what has no end will never be a line: no line of ours is so long, or nobody will end it."""
        return length > LONGEST_LINE or not (more or self._is_being_written(journal))

    def _add_lines(self, piece: _JournalPiece, reading: Reading) -> None:
        """Move the lines of *piece* into *reading*, up to the time that it tells of."""
        taken = 0
        for line in piece.lines:
            if line.at_ns > reading.until_ns:
                break
            taken += 1
            reading.offsets[piece.journal.path.name] = line.end
            self._add_line(line, piece.journal, reading)
        all_taken = taken == len(piece.lines)
        piece.journal.next_ns = ANY_TIME if all_taken else piece.lines[taken].at_ns
        piece.journal.at_end = all_taken and not piece.more and not piece.rest
        reading.more = reading.more or (all_taken and piece.more)

    def _add_line(self, line: _ReadLine, journal: _FollowedJournal, reading: Reading) -> None:
        if isinstance(line.what, str):
            reading.counts[line.what] += line.what != "blank"
        elif isinstance(line.what, Counts):
            reading.counts.update(line.what.counts)
        elif isinstance(line.what, Event):
            self._add_event(line.at_ns, line.what, journal, reading)

    def _add_event(self, at_ns: int, what: Event, journal: _FollowedJournal, reading: Reading) -> None:
        """Of another network namespace nothing can be asked, and of another boot nothing any more."""
        header = journal.header
        known = header is not None and self._network is not None and header.network == self._network
        if known and header is not None and header.boot == self._boot:
            reading.facts.append(Fact(at_ns, journal.writer, what))
        elif not isinstance(what, Acknowledged):
            if known and isinstance(what, Transfer) and what.position is not None:
                reading.counts["unknown_end"] += 1
            reading.facts.append(Fact(at_ns, journal.writer, without_connection(what)))

    def _read_bytes(self, journal: _FollowedJournal, size: int) -> bytes:
        unreadable, journal.unreadable = journal.unreadable, False
        try:
            with os.fdopen(owned.open_file(journal.path, os.O_RDONLY), "rb") as file:
                return self._read_from(file, journal, size)
        except FileNotFoundError:
            return b""
        except OSError as error:
            journal.unreadable = True
            if not unreadable:
                log.error(
                    "%s can't be read (%s); it waits until it can: look after the disk, and whose file it is",
                    journal.path,
                    error.strerror,
                    extra={
                        "t23_event": "journal_unreadable",
                        "t23_reason": error.strerror,
                        "t23_path": str(journal.path),
                    },
                )
            return b""

    def _read_from(self, file: BinaryIO, journal: _FollowedJournal, size: int) -> bytes:
        length = os.fstat(file.fileno()).st_size
        if journal.offset > length:
            journal.offset = length  # a power cut took what had been taken in already
        if journal.header is None:
            self._read_header(journal, file.readline(LONGEST_LINE))
        if journal.is_foreign():
            return b""
        file.seek(journal.offset)
        return file.read(size)

    def _read_header(self, journal: _FollowedJournal, line: bytes) -> None:
        header = _read_line(line.rstrip(b"\n"))
        if isinstance(header, Writer):
            journal.header = header

    def _on_our_clock(self, journal: _FollowedJournal, what: Event, until_ns: int) -> tuple[Event, int]:
        """Lines of another boot are placed by their wall clock: the monotonic one began anew."""
        header, now_ns = journal.header, time.monotonic_ns()
        if header is not None and header.boot != self._boot:
            what = rebased_by_wall_clock(what, self._ahead_ns)
        at_ns = time_of(what)
        # A time that has not come yet is another clock's: it would hold up the journal until it comes.
        return what, at_ns if at_ns <= now_ns else until_ns

    def _is_being_written(self, journal: _FollowedJournal) -> bool:
        """Whether its writer lives and is less than two rotations on.

        One rotation is not enough: a thread may hold the file before the last for a line that it is about to write.
        """
        return journal.writer in self._live and self._newest[journal.writer] < journal.sequence + 2

    def _is_finished(self, journal: _FollowedJournal) -> bool:
        """Read to the end, and nobody writes it any more."""
        return journal.at_end and not journal.is_unusable() and not self._is_being_written(journal)

    def _remove_locks(self) -> None:
        """Locks of dead writers without a journal. Taken before they go: a writer may be about to begin with one."""
        writing = {journal.writer for journal in self._followed.values()} | self._live
        for name in owned.names(self._folder.journals, ".lock"):
            if name.removesuffix(".lock") in writing:
                continue
            lock = self._folder.journals / name
            descriptor = hold_lock(lock)
            if descriptor is not None:
                owned.remove(lock)
                os.close(descriptor)


def _is_there(path: Path) -> bool:
    try:
        owned.look_at(path)
    except FileNotFoundError:
        return False
    return True


def _next_ns(journal: _FollowedJournal) -> int:
    return ANY_TIME if journal.next_ns is None else journal.next_ns


def _read_line(line: bytes) -> Line | str:
    """The line, or the counter of what is wrong with it."""
    if not line:
        return "blank"  # the newline that keeps a torn line apart
    try:
        what = decode(line)
    except TornLine:
        return "journal_torn"
    except ForeignLine:
        return "journal_foreign"
    if _SUSPECT.search(line) and not _can_be_stored(what):
        return "journal_foreign"
    return what


def _can_be_stored(value: object) -> bool:
    """Whether SQLite takes it. Our writers write nothing else, but one such line would stop all that follow."""
    if isinstance(value, int):
        return -(1 << 62) < value < 1 << 62
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return all(map(_can_be_stored, (*value, *value.values())))
    return not isinstance(value, tuple) or all(map(_can_be_stored, value))
