"""The state folder: its files, its ownership, and the locks that show which processes are alive.

Locks are POSIX record locks (``fcntl(2)``): the kernel releases them when the process that took them ends. A ``flock``
lock would live on in a child that this process forked.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from . import owned
from .errors import StateError
from .transfer import FORMAT

#: Seconds after which the file of ending workers is removed: far longer than a worker waits.
MAX_LEAVING_AGE = 600.0


class LockHolder(NamedTuple):
    """What a relay writes about itself to its lock file."""

    pid: int
    version: str
    #: :meth:`~t23_middleware.settings.Settings.relay_digest` of its settings.
    digest: str
    #: Started by a worker: it exits when it has nothing to do.
    automatic: bool
    #: Whether it exited because it had nothing more to do.
    left: bool = False
    #: Inode of the PID namespace of *pid*; 0 if unknown.
    pid_namespace: int = 0

    @property
    def is_elsewhere(self) -> bool:
        """Whether it runs in another PID namespace (container), so that its process id has no meaning here."""
        return 0 not in (self.pid_namespace, pid_namespace()) and self.pid_namespace != pid_namespace()

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped by a signal (SIGSTOP) or a debugger: it keeps the lock and does nothing. Linux only."""
        try:
            found = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return False
        return not self.is_elsewhere and found.rpartition(") ")[2][:1] in ("T", "t")


class StateFolder:
    """The folder that app and relay share: mode 0700, on a local disk, owned by the user of both.

    If *path* belongs to root and this user may write in it (a Kubernetes volume), the state is in a subfolder that this
    user owns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = owned.resolve_mount(path)
        #: One journal file per writer and rotation, and one lock file per writer.
        self.journals = path / owned.JOURNALS
        self.relay_lock = path / "relay.lock"
        #: Written by a worker that starts a relay, so that the other workers don't start one each.
        self.relay_start = path / "relay.start"
        self.relay_log = path / "relay.log"
        self.outbox = path / "outbox.db"
        #: Its modification time: all that was written before it is delivered (with ``T23_EPHEMERAL``).
        self.delivered = path / "delivered"
        #: Ending workers that wait for their delivery: a line with process id and time in ns for each.
        self.leaving = path / "leaving"
        #: Exists while the outbox may have reports to deliver, so that a worker needs no SQL to check.
        self.unfinished = path / "unfinished"
        #: The journals that another version wrote: a line with format and name for each.
        self.foreign = path / "foreign"
        #: Disk space that is freed when the disk is full, so that the outbox can record what was sent.
        self.reserve = path / "reserve"
        #: Exists from the first reserve on: if the reserve is missing then, its space was freed.
        self.reserved = path / "reserved"

    def create(self) -> None:
        """Create the folder if it is missing.

        Raises :class:`~t23_middleware.errors.StateError` if it can't be created, belongs to another user, or is a link.
        """
        try:
            owned.make_folder(self.path)
            owned.make_folder(self.journals)
        except OSError as error:
            raise StateError(self._remedy(error.strerror or str(error))) from error
        if not os.access(self.journals, os.W_OK | os.X_OK):
            raise StateError(self._remedy("it can't be written"))

    def check_ownership(self) -> None:
        """Raise :class:`~t23_middleware.errors.StateError` if the folder exists and is not ours; creates nothing."""
        try:
            with owned.open_folder(self.path):
                pass
        except owned.NotOwned as error:
            raise StateError(self._remedy(error.strerror or str(error))) from error
        except OSError:
            pass  # missing or not readable: the code that uses it reports that

    def relay_holder(self) -> LockHolder | None:
        """The relay that has the lock, or the last one that had it; ``None`` if unknown."""
        try:
            return LockHolder(**json.loads(owned.read(self.relay_lock)))
        except (OSError, ValueError, TypeError):
            return None

    def record_leaving(self) -> None:
        """Record that this worker ends and waits for its reports. Raises :class:`OSError`."""
        descriptor = owned.open_file(self.leaving, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{os.getpid()} {time.time_ns()}\n".encode())
        finally:
            os.close(descriptor)

    def leaving_workers(self) -> dict[str, int]:
        """Process id of each ending worker -> time in ns since the epoch at which it started to end."""
        try:
            lines = [line.split() for line in owned.read(self.leaving).decode(errors="replace").splitlines()]
        except OSError:
            return {}
        return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}

    def remove_old_leaving(self) -> None:
        """Remove the file of ending workers when it is old."""
        try:
            if time.time() - owned.lstat(self.leaving).st_mtime > MAX_LEAVING_AGE:
                owned.remove(self.leaving)
        except OSError:
            pass  # no such file

    def _remedy(self, why: str) -> str:
        user, group = os.geteuid(), os.getegid()
        return (
            f"the state folder {self.path} can't be used ({why}); set T23_STATE_DIR to a folder on a local disk"
            f" that user {user} may write, or make this one with: install -d -m 0700 -o {user} -g {group} {self.path}"
        )

    def has_work(self) -> bool:
        """Whether something in the folder waits for a relay of this version."""
        try:
            return owned.check_file(self.unfinished) or any(self.readable_journals())
        except OSError:
            return False

    def readable_journals(self) -> Iterator[Path]:
        """The journals, without those that a relay listed in :meth:`foreign_journals`."""
        names = owned.names(self.journals, ".journal")
        foreign = self.foreign_journals() if names else {}
        ours = (None, str(FORMAT))
        yield from (self.journals / name for name in names if foreign.get(name) in ours)

    def foreign_journals(self) -> dict[str, str]:
        """Name -> format of the journals that only a relay of another version can read."""
        try:
            lines = [
                line.partition(" ") for line in owned.read(self.foreign).decode(errors="replace").splitlines()
            ]
        except OSError:
            return {}
        return {name: number for number, _, name in lines}

    def write_foreign_journals(self, formats: Mapping[str, str]) -> None:
        """Write the list that :meth:`foreign_journals` reads. Raises :class:`OSError`."""
        text = "".join(f"{number} {name}\n" for name, number in formats.items())
        owned.replace(self.foreign, text.encode("utf-8", "surrogateescape"))


def hold_lock(path: Path) -> int | None:
    """Take the lock on *path* for as long as this process lives; ``None`` if another process has it.

    Returns the descriptor of the locked file. Nothing else in this process may open and close *path* meanwhile, because
    closing any descriptor of a file releases the process's locks on it (``fcntl(2)``). Raises :class:`OSError`.
    """
    while True:
        descriptor = owned.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        if _is_still(path, descriptor):
            return descriptor
        # Its former owner removed the file between our open and our lock: we locked a removed file.
        os.close(descriptor)


def lock_is_held(path: Path) -> bool:
    """Whether another process has the lock on *path*; checks without taking it (``F_GETLK``)."""
    return lock_owner(path) is not None


def lock_owner(path: Path) -> int | None:
    """Process id of the process that has the lock on *path*; 0 if that process is in another container.

    ``None`` if no other process has it. The answer comes from the kernel (``F_GETLK``), not from the file.
    """
    try:
        descriptor = owned.open_file(path, os.O_RDWR)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _WHOLE_FILE)
    finally:
        os.close(descriptor)
    return None if _lock_type(answer) == fcntl.F_UNLCK else max(_lock_pid(answer), 0)


def boot_id() -> str:
    """The kernel's id of this boot: CLOCK_MONOTONIC can be compared only within one.

    ``""`` on macOS, where a restart can't be detected.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def network_namespace() -> int:
    """Inode of this process's network namespace; 0 on systems without namespaces (macOS)."""
    return _namespace("net")


def pid_namespace() -> int:
    """Inode of this process's PID namespace; 0 on systems without namespaces (macOS)."""
    return _namespace("pid")


def _namespace(kind: str) -> int:
    try:
        return Path("/proc/self/ns", kind).stat().st_ino
    except OSError:
        return 0


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there = owned.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


# struct flock: on Linux it starts with type and whence, on the BSDs (macOS) with start and length.
if sys.platform == "linux":
    _WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

    def _lock_type(answer: bytes) -> int:
        return int(struct.unpack_from("h", answer)[0])

    def _lock_pid(answer: bytes) -> int:
        return int(struct.unpack_from("i", answer, 24)[0])
else:
    _WHOLE_FILE = struct.pack("qqihh", 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)

    def _lock_type(answer: bytes) -> int:
        return int(struct.unpack_from("h", answer, 20)[0])

    def _lock_pid(answer: bytes) -> int:
        return int(struct.unpack_from("i", answer, 16)[0])
