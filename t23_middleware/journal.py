"""The hand-over: this process's own journal, written with one ``os.write`` a line.

Nothing here starts a thread or has anything to flush at exit, and no lock is held while a line is written. What
the kernel has taken survives the death of the process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from . import owned
from .errors import StateError
from .state import StateFolder, boot_id, hold_lock, network_namespace
from .transfer import FORMAT, Counts, Transfer, Writer, decode, encode

log = logging.getLogger(__name__)

#: A journal is followed by the next one past this size, in bytes, so that the relay can remove what it has read.
ROTATE_AT = 1 << 20
#: The same where the process may write no larger file, if its journal has so many bytes.
MIN_ROTATED = 1 << 16
#: Lines that are kept for a better time when the disk takes none; what falls out is counted.
MAX_BUFFERED = 1000
#: Seconds between two tries to begin, while the folder can't be used.
RETRY_BEGIN = 1.0
#: Seconds between two looks whether the journals are still full.
RETRY_FULL = 1.0
#: Bytes that a disk says are free, where a write that failed met a quota: more than a relay needs for a reserve.
MIN_FREE_BYTES = 65 << 20
#: Bytes that all journals may take, where no relay reads them.
MAX_JOURNALS_BYTES = 256 << 20
#: Seconds between two looks whether a quota's last room is the relay's: what is written meanwhile is little of it.
CHECK_ROOM_EVERY = 0.1
#: Seconds between two looks whether the journal is still where it was made.
CHECK_EVERY = 1.0
#: Seconds between two lines of what was counted aside, where no play's line takes the figures along.
COUNTS_EVERY = 1.0
#: Bytes up to which a response is no play, so that its line is no loss.
PROBE_BYTES = 2

#: What a full disk says, or a full quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)

_ROOM_IS_RESERVED = (
    "the quota of the state folder is full, and its last room is left to the relay; raise it, or make room"
)

#: How a close line begins, after its checksum.
_CLOSE = b'["close"'
_CLOSE_WITHIN = len("01234567 ") + len(_CLOSE)


class _OpenJournal(NamedTuple):
    """The journal that is written now."""

    descriptor: int
    sequence: int
    #: The file itself: the app may have closed our descriptor, and have something else behind its number.
    file: tuple[int, int]
    #: Its status flags, as ``F_GETFL`` gives them: what else the app opens has others, and asking costs a third of ``fstat``.
    flags: int


class JournalWriter:
    """Writes the lines of one process; after a fork the child makes its own.

    Its lock file is locked before the first line and never closed while the process lives: that is how the relay
    knows that the writer does. *prefix* begins its name. Never raises: what the disk refuses is kept aside, tried
    again, and at last counted.

    All journals of a writer have one descriptor number, one after the other. A thread may be put to sleep between
    reading that number and ``write(2)``, and a number that was closed meanwhile may be the app's own file or socket.
    """

    def __init__(
        self,
        folder: StateFolder,
        version: str,
        digest: str,
        max_bytes: int = MAX_JOURNALS_BYTES,
        *,
        prefix: str = "",
    ) -> None:
        self._folder = folder
        self._reserve, self._reserved = str(folder.reserve), str(folder.reserved)  # looked at for each line
        self._max_bytes = max_bytes
        self._pid = os.getpid()
        self._prefix = prefix
        self.name = self._new_name()
        started_ms = time.time_ns() // 1_000_000
        self._header = Writer(self.name, FORMAT, version, boot_id(), started_ms, digest, network_namespace())
        self._journal: _OpenJournal | None = None
        self._lock_file: int | None = None
        #: The journal that was abandoned, whose number the next one takes.
        self._abandoned: _OpenJournal | None = None
        self._check_place_at = 0.0
        self._size = 0
        self._check_full_at = 0.0
        #: Whether lines are kept aside until a relay has made room.
        self.relay_must_free_room = False
        self._check_room_at = 0.0
        self._full_reason = ""
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._retry_begin_at = 0.0
        self._begin_error = ""
        self._buffered: deque[bytes] = deque()
        self._is_torn = False
        self._is_failing = False
        self._counts: Counter[str] = Counter()
        self._counts_due = 0.0

    def flush(self) -> None:
        """Write what is kept aside, where no line follows that would take it along."""
        if not self._buffered:
            return
        try:
            self._write_buffered()
        except (OSError, StateError):
            return
        if self._is_failing:
            self._log_writable()

    def close(self) -> None:
        """Give up the lock: nothing more is written. A worker never does; its death is what the relay waits for."""
        journals = (self._journal, self._abandoned)
        lock_file, self._lock_file, self._journal, self._abandoned = self._lock_file, None, None, None
        for journal in journals:
            if journal is not None and _is_open(journal):
                os.close(journal.descriptor)
        if lock_file is not None:
            os.close(lock_file)

    def count(self, name: str) -> None:
        """Count an event that is no transfer.

        The figure rides with the next line that is written. Once a second it is one by itself, so that a worker which
        has no more plays tells why; before the first play there is no journal.
        """
        with self._counting:
            self._counts[name] += 1
        if self._journal is not None and time.monotonic() >= self._counts_due:
            self.write_counts()

    def write(self, line: bytes) -> bool:
        """Append the encoded *line*; whether the disk has it.

        A response that a forked child ends is still its parent's, and is not written here.
        """
        return os.getpid() == self._pid and self.append(line)

    def append(self, line: bytes) -> bool:
        """The same for those who know that this is the writer's process."""
        try:
            if self._full_reason:
                self._raise_while_full()
            if self._buffered:
                self._write_buffered()
            self._write(line)
        except (OSError, StateError) as error:
            self._handle_write_error(error)
            self._buffer(line, error)
            return False
        if self._is_failing:
            self._log_writable()
        if self._size > ROTATE_AT:
            self._rotate()
        if self._counts:
            self.write_counts()
        return True

    def _raise_while_full(self) -> None:
        """Raise :class:`StateError` for a while after the journals were found full."""
        if time.monotonic() < self._check_full_at or self._journals_are_full():
            raise StateError(self._full_reason)
        self._full_reason = ""

    def _handle_write_error(self, error: OSError | StateError) -> None:
        """After a failed write: a file of its greatest size ends, and a quota's last room is left to the relay."""
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EFBIG and self._size > MIN_ROTATED:
            self._size = ROTATE_AT + 1
            self._rotate()
        elif code in _FULL:
            with suppress(OSError):  # a relay gave it up
                if self._disk_has_room():
                    self._folder.reserve.unlink()
                    self._check_room_at = 0.0

    def _check_room(self) -> None:
        """Look whether a quota is full, so that what room there is must stay for acknowledgements: they make more.

        A relay without it can't even keep its database open. No reserve was made where the disk itself has little.
        """
        given_up = not os.access(self._reserve, os.F_OK) and os.access(self._reserved, os.F_OK)
        self.relay_must_free_room = given_up and self._disk_has_room()

    def _disk_has_room(self) -> bool:
        """Whether the disk itself says so; where it is full, a relay finds room within its own file."""
        disk = os.statvfs(self._folder.path)
        return disk.f_bavail * disk.f_frsize >= MIN_FREE_BYTES

    def _journals_are_full(self) -> bool:
        total = 0
        for path in self._folder.journals.glob("*.journal"):
            with suppress(FileNotFoundError):  # a relay took it in
                total += path.stat().st_size
        if total <= self._max_bytes:
            return False
        self._full_reason = (
            f"the journals take {total >> 20} MiB, and no relay reads them; start one:"
            " 't23-middleware relay', or T23_RELAY=auto"
        )
        self._check_full_at = time.monotonic() + RETRY_FULL
        return True

    def _write(self, line: bytes) -> None:
        """One ``write(2)``; a short one leaves a torn line, which a newline before the next keeps apart."""
        now = time.monotonic()
        if now >= self._check_room_at:
            self._check_room_at = now + CHECK_ROOM_EVERY
            self._check_room()
        if now >= self._check_place_at:
            self._check_place()
        if self.relay_must_free_room:
            raise StateError(_ROOM_IS_RESERVED)
        journal = self._journal or self._begin()
        if not _has_flags(journal):
            self._check_place()
            journal = self._journal or self._begin()
        if self._is_torn:
            line = b"\n" + line
        written = os.write(journal.descriptor, line)
        self._size += written
        self._is_torn = written < len(line)
        if self._is_torn:
            raise OSError(errno.ENOSPC, "the disk took only a part of the line")

    def _write_buffered(self) -> None:
        """Write what is kept aside; each line is taken out first, so that two threads never write the same."""
        while True:
            try:
                line = self._buffered.popleft()
            except IndexError:
                return
            try:
                self._write(line)
            except BaseException:
                self._buffered.appendleft(line)
                raise

    def write_counts(self) -> bool:
        """Write what was counted now, not only with the next line; whether the disk has it."""
        if os.getpid() != self._pid:
            return False
        with self._counting:
            self._counts_due = time.monotonic() + COUNTS_EVERY
            counts, self._counts = self._counts, Counter()
        if not counts:
            return True  # another thread took them
        try:
            self._write(encode(Counts(dict(counts))))
        except (OSError, StateError):
            with self._counting:
                self._counts.update(counts)
            return False
        return True

    def _begin(self) -> _OpenJournal:
        """Take the writer's lock and open its first journal."""
        with self._changing:
            if self._journal is None:
                if self._begin_error and time.monotonic() < self._retry_begin_at:
                    raise StateError(self._begin_error)
                try:
                    self._folder.create()
                    if self._lock_file is None:
                        self._lock_file = self._take_lock()
                    self._journal = self._open_journal(0, self._abandoned)
                    self._abandoned = None
                except (OSError, StateError) as error:
                    self._begin_error = str(error)
                    self._retry_begin_at = time.monotonic() + RETRY_BEGIN
                    raise
            return self._journal

    def _take_lock(self) -> int:
        """The writer's lock, without which it would count as dead and lose what it writes.

        A relay that tidies up may have the file for the moment in which it removes it.
        """
        for _ in range(1000):
            descriptor = hold_lock(self._folder.journals / f"{self.name}.lock")
            if descriptor is not None:
                return descriptor
        raise StateError(f"the lock of {self.name} is held by another process")

    def _check_place(self) -> None:
        """Begin anew where somebody removed or moved what is being written: nobody would ever read it."""
        if not self._changing.acquire(blocking=False):
            return
        try:
            self._check_place_at = time.monotonic() + CHECK_EVERY
            if self._journal is not None and not self._is_in_place(self._journal):
                self._abandon(self._journal)
        finally:
            self._changing.release()

    def _is_in_place(self, journal: _OpenJournal) -> bool:
        if not _is_open(journal):
            return False
        try:
            there = owned.lstat(self._path(journal.sequence))
        except FileNotFoundError:
            return False
        except OSError:
            return os.fstat(journal.descriptor).st_nlink > 0  # its path can't be followed now
        return (there.st_dev, there.st_ino) == journal.file

    def _abandon(self, journal: _OpenJournal) -> None:
        """Under a new name, or a relay would go on behind what it read of the old one."""
        if _is_open(journal):
            path = self._path(journal.sequence)
            log.error(
                "%s was removed or moved while the app runs: plays that no relay had read are lost; a new one begins."
                " Leave the state folder alone while app or relay run",
                path,
                extra={"t23_event": "journal_removed", "t23_path": str(path)},
            )
            if self._lock_file is not None:
                os.close(self._lock_file)
        # Or the app closed all descriptors, as those do that become daemons: the lock's number may be the app's own now.
        self._abandoned, self._journal, self._lock_file = journal, None, None
        self.name = self._new_name()
        self._header = self._header._replace(name=self.name)

    def _path(self, sequence: int) -> Path:
        return self._folder.journals / f"{self.name}.{sequence:06d}.journal"

    def _rotate(self) -> None:
        """Go on in a new file; whoever finds another thread at it just goes on in the old one."""
        if not self._changing.acquire(blocking=False):
            return
        try:
            journal = self._journal
            if journal is not None and self._size > ROTATE_AT:
                self._journal = self._open_journal(journal.sequence + 1, journal)
                self._journals_are_full()
        except OSError as error:
            log.warning(
                "the journal can't be rotated and grows on, until that is mended: %s",
                error,
                extra={"t23_event": "journal_not_rotated", "t23_reason": str(error)},
            )
            self._size = 0
        finally:
            self._changing.release()

    def _open_journal(self, sequence: int, former: _OpenJournal | None) -> _OpenJournal:
        """A new journal, with its header, under the descriptor number of *former*."""
        path = self._path(sequence)
        descriptor = owned.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        header = encode(self._header)
        try:
            size = os.write(descriptor, header)
            if size < len(header):
                raise OSError(errno.ENOSPC, "the disk took only a part of the journal's first line")
        except OSError:
            os.close(descriptor)
            owned.remove(path)
            raise
        found = os.fstat(descriptor)
        if former is not None and _is_open(former):
            os.dup2(descriptor, former.descriptor, inheritable=False)
            os.close(descriptor)
            descriptor = former.descriptor
        self._size, self._is_torn = size, False
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        return _OpenJournal(descriptor, sequence, (found.st_dev, found.st_ino), flags)

    def _buffer(self, line: bytes, error: Exception) -> None:
        self._buffered.append(line)
        while len(self._buffered) > MAX_BUFFERED:
            self._count_lost(self._buffered.popleft())
        self.log_unwritable(error)

    def log_unwritable(self, error: Exception) -> None:
        """Log that nothing can be written, once until it can."""
        if not self._is_failing:
            self._is_failing = True
            log.error(
                "t23_middleware can't write plays down; they are kept in memory (at most %d): %s",
                MAX_BUFFERED,
                error,
                extra={"t23_event": "journal_unwritable", "t23_reason": str(error)},
            )

    def _count_lost(self, line: bytes) -> None:
        """Count the play. An open line that falls out is no loss: the close line has all that it said."""
        if _CLOSE not in line[:_CLOSE_WITHIN]:
            return
        transfer = decode(line.rstrip(b"\n"))
        if isinstance(transfer, Transfer) and transfer.sent > PROBE_BYTES:
            with self._counting:
                self._counts.update({"capture_lost": 1, "capture_lost_bytes": transfer.sent})

    def _log_writable(self) -> None:
        self._is_failing = False
        log.warning("plays can be written down again", extra={"t23_event": "journal_writable"})

    def _new_name(self) -> str:
        return f"{self._prefix}{os.getpid()}-{os.urandom(8).hex()}"


def _has_flags(journal: _OpenJournal) -> bool:
    """Whether the number may still be the journal's, asked before each line; :func:`_is_open` is sure of it."""
    try:
        return fcntl.fcntl(journal.descriptor, fcntl.F_GETFL) == journal.flags
    except OSError:
        return False


def _is_open(journal: _OpenJournal) -> bool:
    """Whether the number is still the journal's, and not closed by the app, or the app's own by now."""
    try:
        found = os.fstat(journal.descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == journal.file
