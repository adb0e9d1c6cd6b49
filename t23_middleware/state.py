"""The state folder: what lies where in it, who may use it, and the locks that say who is alive.

Locks are POSIX record locks (``fcntl(2)``): they go with the process that took them, whatever it forked. With
``flock`` a helper that the holder forked would keep the lock after the holder's death.
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

#: Seconds for which it matters that a worker ended: far more than one waits.
MAX_LEAVING_AGE = 600.0


class LockHolder(NamedTuple):
    """What a relay says of itself in the file of its lock."""

    pid: int
    version: str
    #: :meth:`~t23_middleware.settings.Settings.relay_digest` of its settings.
    digest: str
    #: Started by a worker, so that it leaves when nothing is to be done.
    automatic: bool
    #: Whether it left because nothing was left that it could do.
    left: bool = False
    #: Inode of the PID namespace in which it has that process id; 0 where that is not known.
    pid_namespace: int = 0

    @property
    def is_elsewhere(self) -> bool:
        """Whether its process id means nothing here: it runs in another container, or we do."""
        return 0 not in (self.pid_namespace, pid_namespace()) and self.pid_namespace != pid_namespace()


class StateFolder:
    """The folder that app and relay share; mode 0700, on a local disk, owned by the user of both.

    Where *path* is root's and this user may write in it (a Kubernetes volume), it is a folder of this user's own there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = owned.resolve_mount(path)
        #: One journal file per writer and rotation, and one lock file per writer.
        self.journals = path / owned.JOURNALS
        self.relay_lock = path / "relay.lock"
        #: Touched by a worker that starts a relay, so that its siblings don't start one each.
        self.relay_start = path / "relay.start"
        self.relay_log = path / "relay.log"
        self.outbox = path / "outbox.db"
        #: Its time: all that was written down before then is delivered (kept with ``T23_EPHEMERAL``).
        self.delivered = path / "delivered"
        #: Workers that wait for that at their end: a line with process id and time in ns for each.
        self.leaving = path / "leaving"
        #: Exists while the outbox may hold something to deliver: a look that needs no SQL.
        self.unfinished = path / "unfinished"
        #: The journals that are another version's: a line with format and name for each.
        self.foreign = path / "foreign"
        #: Room that is given up when the disk is full, so that what was sent can be ticked off.
        self.reserve = path / "reserve"
        #: Exists once there was a reserve: where that is missing then, it was given up.
        self.reserved = path / "reserved"

    def create(self) -> None:
        """Make the folder where it is missing.

        Raises :class:`~t23_middleware.errors.StateError` where it can't be made, is another user's, or a link.
        """
        try:
            owned.make_folder(self.path)
            owned.make_folder(self.journals)
        except OSError as error:
            raise StateError(self._remedy(error.strerror or str(error))) from error
        if not os.access(self.journals, os.W_OK | os.X_OK):
            raise StateError(self._remedy("it can't be written"))

    def check_ownership(self) -> None:
        """Raise :class:`~t23_middleware.errors.StateError` where the folder is there and not ours; makes nothing."""
        try:
            with owned.open_folder(self.path):
                pass
        except owned.NotOwned as error:
            raise StateError(self._remedy(error.strerror or str(error))) from error
        except OSError:
            pass  # missing, or closed to us: whoever uses it says so

    def relay_holder(self) -> LockHolder | None:
        """What the relay that holds the lock, or the last that did, says of itself."""
        try:
            return LockHolder(**json.loads(owned.read(self.relay_lock)))
        except (OSError, ValueError, TypeError):
            return None

    def record_leaving(self) -> None:
        """This worker ends, and waits for its reports. Raises :class:`OSError`."""
        descriptor = owned.open_file(self.leaving, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{os.getpid()} {time.time_ns()}\n".encode())
        finally:
            os.close(descriptor)

    def leaving_workers(self) -> dict[str, int]:
        """Process id -> time in ns since the epoch at which that worker said that it ends."""
        try:
            lines = [line.split() for line in owned.read(self.leaving).decode(errors="replace").splitlines()]
        except OSError:
            return {}
        return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}

    def remove_old_leaving(self) -> None:
        """Remove what workers said that are gone for long."""
        try:
            if time.time() - owned.lstat(self.leaving).st_mtime > MAX_LEAVING_AGE:
                owned.remove(self.leaving)
        except OSError:
            pass  # there is none

    def _remedy(self, why: str) -> str:
        user, group = os.geteuid(), os.getegid()
        return (
            f"the state folder {self.path} can't be used ({why}); set T23_STATE_DIR to a folder on a local disk"
            f" that user {user} may write, or make this one with: install -d -m 0700 -o {user} -g {group} {self.path}"
        )

    def has_work(self) -> bool:
        """Whether something waits here for a relay of this version."""
        try:
            return owned.check_file(self.unfinished) or any(self.readable_journals())
        except OSError:
            return False

    def readable_journals(self) -> Iterator[Path]:
        """The journals, but for those of which a relay has found that only another version can read them."""
        names = owned.names(self.journals, ".journal")
        foreign = self.foreign_journals() if names else {}
        ours = (None, str(FORMAT))
        yield from (self.journals / name for name in names if foreign.get(name) in ours)

    def foreign_journals(self) -> dict[str, str]:
        """Name -> format of the journals that a relay could not read."""
        try:
            lines = [
                line.partition(" ") for line in owned.read(self.foreign).decode(errors="replace").splitlines()
            ]
        except OSError:
            return {}
        return {name: number for number, _, name in lines}

    def write_foreign_journals(self, formats: Mapping[str, str]) -> None:
        """Write down what :meth:`foreign_journals` tells. Raises :class:`OSError`."""
        text = "".join(f"{number} {name}\n" for name, number in formats.items())
        owned.replace(self.foreign, text.encode("utf-8", "surrogateescape"))


def hold_lock(path: Path) -> int | None:
    """Take the lock on *path* for as long as this process lives, or ``None`` where another process has it.

    The descriptor returned holds it. Nothing else in this process may open and close *path* while it does, since
    closing any descriptor of a file drops the process's locks on it (``fcntl(2)``). Raises :class:`OSError`.
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
        # Its former owner removed the file between our open and our lock: what we hold is no longer there.
        os.close(descriptor)


def lock_is_held(path: Path) -> bool:
    """Whether another process holds the lock on *path*; looks without taking it (``F_GETLK``)."""
    return lock_owner(path) is not None


def lock_owner(path: Path) -> int | None:
    """Process id of who holds the lock on *path*, 0 for one that this process can't see: in another container.

    ``None`` where no other process does. The kernel says so (``F_GETLK``), not the file.
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
    """The kernel's name for this boot: CLOCK_MONOTONIC compares only within one.

    ``""`` on macOS, where a restart is then not told from a clock that went on.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def network_namespace() -> int:
    """Inode of the network namespace that this process is in; 0 where there is none (macOS)."""
    return _namespace("net")


def pid_namespace() -> int:
    """The same of its PID namespace."""
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


# struct flock: Linux begins with type and whence, the BSDs (macOS) with start and length.
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
