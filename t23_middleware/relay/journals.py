"""Reads the journals of all writers: whole lines, merged in the order of their time, each once."""

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
    JournalLine,
    TornLine,
    Transfer,
    Writer,
    decode,
)
from .axis import Event, rebased_by_wall_clock, time_of, without_connection
from .crash import crash_point

log = logging.getLogger(__name__)

#: Bytes that are read from one journal per poll: a backlog is read in pieces, each in its own transaction.
PIECE = 256 << 10
#: Bytes that are read of a new journal to find its first time.
FIRST_READ = 16 << 10
#: Seconds after a rotation for which the previous journal counts as written to.
FORMER_FOR = 60.0
#: Seconds between two checks which writers live; a writer's death is not urgent.
CHECK_WRITERS_EVERY = 0.5


#: The time of a line without one: such a line never waits for others.
ANY_TIME = -(1 << 63)

#: Prefix of the name of a relay's own writer.
RELAY_PREFIX = "relay-"
_NAME = re.compile(r"([^.]+)\.(\d+)\.journal")
#: Only a line that matches this may be impossible to store: a long number, or the escape of half a surrogate pair.
_SUSPECT = re.compile(rb"[\[,:] ?-?\d{19}|\\u[dD]")


class Fact(NamedTuple):
    """An event of a response or a connection, at a time of this boot's CLOCK_MONOTONIC."""

    at_ns: int
    writer: str
    event: Event


@dataclass
class Reading:
    """The result of one poll: all events up to *until_ns*, unless :attr:`more` are left."""

    until_ns: int
    facts: list[Fact] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    #: Whether a backlog is left that can be read at once.
    more: bool = False


@dataclass
class _FollowedJournal:
    """One file that is followed."""

    path: Path
    writer: str
    sequence: int
    offset: int
    header: Writer | None = None
    #: Time of the next line, in ns; ``None`` before the first read.
    next_ns: int | None = None
    #: Whether the latest poll read it to its end.
    at_end: bool = False
    #: Whether the latest read failed.
    unreadable: bool = False

    def has_grown(self) -> bool:
        """Whether there are bytes after the offset."""
        try:
            return not self.is_unusable() and owned.lstat(self.path).st_size > self.offset
        except FileNotFoundError:
            return False

    def is_foreign(self) -> bool:
        """Whether another version of the package wrote it, in a format that this version does not read."""
        return self.header is not None and self.header.format != FORMAT

    def is_unusable(self) -> bool:
        """Whether this relay can't read it."""
        return self.unreadable or self.is_foreign()


class _ReadLine(NamedTuple):
    """A line: the offset of its end, its time, and its content or the name of the counter for its fault."""

    end: int
    at_ns: int
    what: JournalLine | str


class _JournalPiece(NamedTuple):
    """Lines of one journal; whether *more* follow, and whether there is a *rest* without a newline."""

    journal: _FollowedJournal
    lines: list[_ReadLine]
    more: bool
    rest: bool

    def reaches(self, until_ns: int) -> int:
        """The time up to which it is complete: the latest time of its lines, not the time of the last line.

        Lines are used in the order of the file, so a line later than every piece's end would block them for ever.
        """
        return min(until_ns, max(line.at_ns for line in self.lines)) if self.more else until_ns


class Journals:
    """The folder of journals. *offsets* are those up to which each journal is stored already, in bytes.

    *own_writer* returns the name of this process's own writer, or ``""``. *network* is the inode of the network
    namespace whose connections the kernel can be asked about; events about other connections are dropped.
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
        #: Writer -> sequence of its newest journal, and when that was seen first.
        self._newest: dict[str, int] = {}
        self._newest_since: dict[str, float] = {}
        self._boot = boot_id()
        # Taken once: two clocks that are asked one after the other are never as far apart twice.
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self._live: set[str] = set()
        self._checked_at = 0.0

    def read(self, until_ns: int, size: int = PIECE) -> Reading:
        """Whole lines up to *until_ns* (CLOCK_MONOTONIC), merged in the order of their time.

        A backlog is read in pieces of *size* bytes, at least ``LONGEST_LINE``. The reading then ends where the shortest
        piece ends, or one writer's past would be judged after another's present.
        """
        self._find()
        # Only now, before reading: a file that is found later may have been begun after this one was read.
        # Files are found in the order of their names, so a writer's last one counts.
        former, now = self._newest, time.monotonic()
        self._newest = {journal.writer: journal.sequence for journal in self._followed.values()}
        self._newest_since = {
            writer: self._newest_since[writer] if former.get(writer) == newest else now
            for writer, newest in self._newest.items()
        }
        self._check_writers()
        pieces, horizon = self._pieces(until_ns, size)
        reading = Reading(horizon)
        for piece in pieces:
            self._add_lines(piece, reading)
        reading.facts.sort(key=lambda fact: fact.at_ns)
        return reading

    def committed(self, reading: Reading) -> None:
        """The outbox has stored *reading*: continue after it."""
        for name, offset in reading.offsets.items():
            self._followed[name].offset = offset

    def live_writers(self) -> list[Writer]:
        """Headers of the live writers, the one that started last at the end; without relays' own writers."""
        live = self._live_workers()
        headers = {j.writer: j.header for j in self._followed.values() if j.header and j.writer in live}
        return sorted(headers.values(), key=lambda header: header.started_ms)

    def forget_removed(self) -> None:
        """Stop following files that another process removed; for readers that remove none themselves."""
        self._followed = {
            name: journal for name, journal in self._followed.items() if _is_there(journal.path)
        }

    def has_live_writer(self) -> bool:
        """Whether there is a live writer that is not a relay's own."""
        return bool(self._live_workers())

    def _live_workers(self) -> set[str]:
        return {name for name in self._live if not name.startswith(RELAY_PREFIX)}

    def dead_writers(self, among: Iterable[str]) -> set[str]:
        """The writers in *among* that died and whose journals are read to the end."""
        self._find()  # a last file may have been begun between the search for files and the check of writers
        unread = {
            journal.writer
            for journal in self._followed.values()
            if not journal.at_end or journal.is_unusable()
        }
        return {writer for writer in among if writer not in self._live and writer not in unread}

    def remove_finished(self) -> list[str]:
        """Unlink the journals that are complete and read to the end. Returns the names whose file is gone.

        First the file is removed, then (by the caller) its offset. If the relay is killed in between, an offset without
        a file is harmless and removed by the next relay; a file without its offset would be read twice.
        """
        finished = [name for name, journal in self._followed.items() if self._is_finished(journal)]
        for name in finished:
            owned.remove(self._followed[name].path)  # if this raises, the file is still followed
            del self._followed[name]
            crash_point("after_unlink")
        self._remove_locks()
        forgotten, self._offsets = list(self._offsets), {}
        return finished + forgotten

    def remove_committed(self, writer: str) -> list[str]:
        """Unlink the journals and the lock of *writer*, which has ended, unless it has unread lines."""
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
        """Name -> format of the journals that another version wrote."""
        return {
            name: str(journal.header.format)
            for name, journal in self._followed.items()
            if journal.header and journal.is_foreign()
        }

    def remove_foreign(self, names: Iterable[str]) -> list[str]:
        """Unlink those of *names*, all from :meth:`foreign`, whose writer is dead. Returns their names."""
        gone = []
        for name in names:
            journal = self._followed[name]
            if journal.writer not in self._live:
                owned.remove(journal.path)
                del self._followed[name]
                gone.append(name)
        return gone

    def all_read(self) -> bool:
        """Whether all journals were read to their end."""
        return all(journal.at_end for journal in self._followed.values())

    def has_news(self, *, of_writers: bool = True) -> bool:
        """Whether there are lines that are not :meth:`committed` or, with *of_writers*, a live writer."""
        self._check_writers()
        self._find()
        return (of_writers and self.has_live_writer()) or any(
            journal.has_grown() for journal in self._followed.values()
        )

    def _check_writers(self) -> None:
        """Find the live writers. This happens before reading, so that a dead writer's end of file is final.

        That a writer lives is remembered for a while. That it is dead is not: it may be starting just now.
        """
        if time.monotonic() - self._checked_at >= CHECK_WRITERS_EVERY:
            self._checked_at = time.monotonic()
            self._live.clear()
        # Our own lock must not be checked: that would release it (see hold_lock).
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
        """The next lines of all journals, and the time up to which they are complete. Later journals are not read."""
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
        """The next lines of one journal; its offset does not change."""
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
        """Whether *length* bytes without a newline can't become a line: too long, or the writer is gone."""
        return length > LONGEST_LINE or not (more or self._is_being_written(journal))

    def _add_lines(self, piece: _JournalPiece, reading: Reading) -> None:
        """Add the lines of *piece* to *reading*, up to its time."""
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
        """Add *what*, without its connection if that is of another network namespace or boot and can't be asked about."""
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
                    "%s can't be read (%s) and is retried: check the disk and the file's owner",
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
            journal.offset = length  # a power cut removed lines that were stored already
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
        """*what* and its time on this boot's CLOCK_MONOTONIC. Times of another boot are converted by the wall clock."""
        header, now_ns = journal.header, time.monotonic_ns()
        if header is not None and header.boot != self._boot:
            what = rebased_by_wall_clock(what, self._ahead_ns)
        at_ns = time_of(what)
        # A time in the future comes from another clock, and would block the journal until then.
        return what, at_ns if at_ns <= now_ns else until_ns

    def _is_being_written(self, journal: _FollowedJournal) -> bool:
        """Whether its writer lives and may still write to it.

        A rotation keeps the descriptor's number, so only a write that is already under way lands in the previous file.
        A slow disk may delay that: the previous file counts as written for FORMER_FOR, unless the writer rotated again.
        """
        if journal.writer not in self._live:
            return False
        behind = self._newest[journal.writer] - journal.sequence
        return behind <= 0 or (
            behind == 1 and time.monotonic() - self._newest_since[journal.writer] < FORMER_FOR
        )

    def _is_finished(self, journal: _FollowedJournal) -> bool:
        """Whether it is read to the end and no longer written."""
        return journal.at_end and not journal.is_unusable() and not self._is_being_written(journal)

    def _remove_locks(self) -> None:
        """Remove locks of dead writers without a journal. Each is locked first, since a new writer may just take it."""
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
        owned.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _next_ns(journal: _FollowedJournal) -> int:
    return ANY_TIME if journal.next_ns is None else journal.next_ns


def _read_line(line: bytes) -> JournalLine | str:
    """The decoded line, or the name of the counter for its fault."""
    if not line:
        return "blank"  # the newline that separates a torn line from the next
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
    """Whether SQLite can store it. Our writers write no such line, but one would block all that follow."""
    if isinstance(value, int):
        return -(1 << 62) < value < 1 << 62
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return all(map(_can_be_stored, (*value, *value.values())))
    return not isinstance(value, tuple) or all(map(_can_be_stored, value))
