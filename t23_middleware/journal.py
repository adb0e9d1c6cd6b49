"""Writes this process's journal, one ``os.write`` per line.

This module starts no thread, needs no flush at exit, and takes no thread lock to write a line. What ``write(2)`` has
accepted survives the death of the process.
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

#: Size in bytes at which a journal is rotated, so that the relay can remove the files that it has read.
ROTATE_AT = 1 << 20
#: Smallest size in bytes at which a journal is rotated because the process may not write larger files.
MIN_ROTATED = 1 << 16
#: Lines buffered in memory while the disk refuses writes.
MAX_BUFFERED = 1000
#: Seconds between two tries to open the first journal, while the folder can't be used.
RETRY_BEGIN = 1.0
#: Seconds between two checks whether the journals are still full.
RETRY_FULL = 1.0
#: If a write fails with so many bytes free on the disk, a quota is full; more than a relay needs for its reserve.
MIN_FREE_BYTES = 65 << 20
#: Most bytes of all journals together, if no relay reads them.
MAX_JOURNALS_BYTES = 256 << 20
#: Seconds between two checks whether a quota's last space is reserved for the relay; little is written meanwhile.
CHECK_ROOM_EVERY = 0.1
#: Seconds between two checks whether the journal is still at its path.
CHECK_EVERY = 1.0
#: Seconds between two lines of event counts, if no play's line is written.
COUNTS_EVERY = 1.0
#: A response of at most so many bytes is not a play, so a lost line of it does not count.
PROBE_BYTES = 2

#: Errors of a full disk or a full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)

_ROOM_IS_RESERVED = (
    "the quota of the state folder is full, its last space is reserved for the relay; raise it or free space"
)

#: Start of a close line, after its checksum.
_CLOSE = b'["close"'
_CLOSE_WITHIN = len("01234567 ") + len(_CLOSE)


class _OpenJournal(NamedTuple):
    """The journal file that is open now."""

    descriptor: int
    sequence: int
    #: Device and inode: the app may have closed our descriptor and reused its number.
    file: tuple[int, int]
    #: Its status flags (``F_GETFL``): other files of the app have different ones, and reading them costs a third of
    #: ``fstat``.
    flags: int


class JournalWriter:
    """Writes the lines of one process; a forked child creates its own writer.

    Its lock file is locked before the first line and stays locked while the process lives, so that the relay knows that
    the writer is alive. *version* and *digest* go to the journal's first line, see
    :class:`~t23_middleware.transfer.Writer`; *max_bytes* is the most bytes of all journals in *folder* together;
    *prefix* is the start of the writer's name. Never raises: lines that the disk refuses are buffered
    and retried; beyond ``MAX_BUFFERED`` the oldest are dropped and counted.

    All journals of a writer use the same descriptor number, one after the other. A thread may be suspended between
    reading that number and ``write(2)``; if the number were closed meanwhile, it could be the app's own file or socket.
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
        # As text, because they are checked often.
        self._reserve, self._reserved = str(folder.reserve), str(folder.reserved)
        self._max_bytes = max_bytes
        self._pid = os.getpid()
        self._prefix = prefix
        self.name = self._new_name()
        started_ms = time.time_ns() // 1_000_000
        self._header = Writer(self.name, FORMAT, version, boot_id(), started_ms, digest, network_namespace())
        self._journal: _OpenJournal | None = None
        self._lock_file: int | None = None
        #: The journal that was abandoned; the next one takes over its descriptor number.
        self._abandoned: _OpenJournal | None = None
        self._check_place_at = 0.0
        self._size = 0
        self._check_full_at = 0.0
        #: Whether lines are buffered until a relay has freed space.
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
        """Write the buffered lines now instead of before the next line."""
        if not self._buffered:
            return
        try:
            self._write_buffered()
        except (OSError, StateError):
            return
        if self._is_failing:
            self._log_writable()

    def close(self) -> None:
        """Close the journal and release the lock. Workers never call this: the relay waits for their death."""
        journals = (self._journal, self._abandoned)
        lock_file, self._lock_file, self._journal, self._abandoned = self._lock_file, None, None, None
        for journal in journals:
            if journal is not None and _is_open(journal):
                os.close(journal.descriptor)
        if lock_file is not None:
            os.close(lock_file)

    def count(self, name: str) -> None:
        """Count an event that is not a transfer.

        The counts are written after the next line, or once a second without one, so that they are visible also if no
        more plays come. Before the first play there is no journal.
        """
        with self._counting:
            self._counts[name] += 1
        if self._journal is not None and time.monotonic() >= self._counts_due:
            self.write_counts()

    def write(self, line: bytes) -> bool:
        """Append the encoded *line*; returns whether it is written.

        Writes nothing in a forked child: a response that started before the fork belongs to the parent.
        """
        return os.getpid() == self._pid and self.append(line)

    def append(self, line: bytes) -> bool:
        """As :meth:`write`, for callers that know that this is the writer's process."""
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
        """Raise :class:`StateError` while the journals are full; checks again every ``RETRY_FULL`` seconds."""
        if time.monotonic() < self._check_full_at or self._journals_are_full():
            raise StateError(self._full_reason)
        self._full_reason = ""

    def _handle_write_error(self, error: OSError | StateError) -> None:
        """After a failed write: rotate a file that may not grow, or leave a quota's last space to a relay."""
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EFBIG and self._size > MIN_ROTATED:
            self._size = ROTATE_AT + 1
            self._rotate()
        elif code in FULL:
            with suppress(OSError):  # a relay removed the reserve
                if self._disk_has_room():
                    self._folder.reserve.unlink()
                    self._check_room_at = 0.0

    def _check_room(self) -> None:
        """Check whether a quota is full: its last space must stay free for the relay, which then frees more.

        Without that space the relay can't even keep its database open. On a disk that itself has little space there is
        no reserve.
        """
        is_reserve_freed = not os.access(self._reserve, os.F_OK) and os.access(self._reserved, os.F_OK)
        self.relay_must_free_room = is_reserve_freed and self._disk_has_room()

    def _disk_has_room(self) -> bool:
        """Whether the disk has space, so that a quota is full; on a full disk a relay uses space in its own file."""
        disk = os.statvfs(self._folder.path)
        return disk.f_bavail * disk.f_frsize >= MIN_FREE_BYTES

    def _journals_are_full(self) -> bool:
        total = 0
        for path in self._folder.journals.glob("*.journal"):
            with suppress(FileNotFoundError):  # a relay has read and removed it
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
        """One ``write(2)``. A short one leaves an incomplete line, which a newline before the next line ends."""
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
            raise OSError(errno.ENOSPC, "the disk accepted only a part of the line")

    def _write_buffered(self) -> None:
        """Write the buffered lines; each is removed first, so that two threads never write the same one."""
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
        """Write the event counts now; returns whether they are written."""
        if os.getpid() != self._pid:
            return False
        with self._counting:
            self._counts_due = time.monotonic() + COUNTS_EVERY
            counts, self._counts = self._counts, Counter()
        if not counts:
            return True  # another thread wrote them
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
        """Take the writer's lock; without it the relay would treat the writer as dead and remove its journals.

        Retries, because a relay that removes old lock files locks each for a moment.
        """
        for _ in range(1000):
            descriptor = hold_lock(self._folder.journals / f"{self.name}.lock")
            if descriptor is not None:
                return descriptor
        raise StateError(f"another process has the lock of {self.name}")

    def _check_place(self) -> None:
        """Start a new journal if the current file was removed or moved: the relay would not read it."""
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
        """Drop the journal and rename the writer: under the old name a relay would continue at its old offset."""
        if _is_open(journal):
            path = self._path(journal.sequence)
            log.error(
                "%s was removed or moved while the app runs: plays that no relay had read are lost, and a new journal"
                " starts. Don't change the state folder while the app or a relay runs",
                path,
                extra={"t23_event": "journal_removed", "t23_path": str(path)},
            )
            if self._lock_file is not None:
                os.close(self._lock_file)
        # Or the app closed all descriptors, as daemons do at start: the lock's number may be the app's own file now.
        self._abandoned, self._journal, self._lock_file = journal, None, None
        self.name = self._new_name()
        self._header = self._header._replace(name=self.name)

    def _path(self, sequence: int) -> Path:
        return self._folder.journals / f"{self.name}.{sequence:06d}.journal"

    def _rotate(self) -> None:
        """Open the next journal; does nothing while another thread does so."""
        if not self._changing.acquire(blocking=False):
            return
        try:
            journal = self._journal
            if journal is not None and self._size > ROTATE_AT:
                self._journal = self._open_journal(journal.sequence + 1, journal)
                self._journals_are_full()
        except OSError as error:
            log.warning(
                "the journal can't be rotated and keeps growing until that is fixed: %s",
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
                raise OSError(errno.ENOSPC, "the disk accepted only a part of the journal's first line")
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
        """Log that nothing can be written; once per outage."""
        if not self._is_failing:
            self._is_failing = True
            log.error(
                "t23_middleware can't write plays to its journal; they are buffered in memory (at most %d lines): %s",
                MAX_BUFFERED,
                error,
                extra={"t23_event": "journal_unwritable", "t23_reason": str(error)},
            )

    def _count_lost(self, line: bytes) -> None:
        """Count a dropped close line as a lost play. A dropped open line is no loss: the close line repeats it."""
        if _CLOSE not in line[:_CLOSE_WITHIN]:
            return
        transfer = decode(line.rstrip(b"\n"))
        if isinstance(transfer, Transfer) and transfer.sent > PROBE_BYTES:
            with self._counting:
                self._counts.update({"capture_lost": 1, "capture_lost_bytes": transfer.sent})

    def _log_writable(self) -> None:
        self._is_failing = False
        log.warning("plays can be written to the journal again", extra={"t23_event": "journal_writable"})

    def _new_name(self) -> str:
        return f"{self._prefix}{os.getpid()}-{os.urandom(8).hex()}"


def _has_flags(journal: _OpenJournal) -> bool:
    """Cheap check before each line whether the descriptor may still be the journal's.

    It detects each socket, and each file that was not opened with exactly these flags. :func:`_is_open` is exact, and is
    called every ``CHECK_EVERY`` seconds.
    """
    try:
        return fcntl.fcntl(journal.descriptor, fcntl.F_GETFL) == journal.flags
    except OSError:
        return False


def _is_open(journal: _OpenJournal) -> bool:
    """Whether the descriptor is still the journal's: the app may have closed it and reused its number."""
    try:
        found = os.fstat(journal.descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == journal.file
