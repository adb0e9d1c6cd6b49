"""Finds processes that read the outbox: a long read transaction makes the write-ahead log grow until it ends."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

#: Bytes of ``…-shm`` that SQLite locks for reading, one per read position in the log
#: (sqlite.org/walformat.html, "WAL locks").
_FIRST, _LAST = 123, 127
#: A log of more bytes than this has a reader that blocks checkpoints.
LONG_LOG = 4 << 20
_LOCK = re.compile(
    r"POSIX\s+ADVISORY\s+READ\s+(\d+)\s+([0-9a-f]+):([0-9a-f]+):(\d+)\s+(\d+)\s", re.IGNORECASE
)


def log_size(path: Path) -> int:
    """Bytes of the write-ahead log of the outbox at *path*."""
    try:
        return path.with_name(f"{path.name}-wal").stat().st_size
    except OSError:
        return 0


def readers(path: Path) -> list[str]:
    """The other processes that read the outbox at *path* now, as ``process 123 (sqlite3)``.

    Linux only (``/proc/locks``). Processes of another PID namespace are not found.
    """
    try:
        shared = path.with_name(f"{path.name}-shm").stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return []
    device = os.major(shared.st_dev), os.minor(shared.st_dev)
    found = set()
    for pid, major, minor, inode, first in _LOCK.findall(locks):
        is_ours = (int(major, 16), int(minor, 16)) == device and int(inode) == shared.st_ino
        if is_ours and _FIRST <= int(first) <= _LAST and int(pid) not in (0, os.getpid()):
            found.add(int(pid))
    return [f"process {pid}{_command(pid)}" for pid in sorted(found)]


def _command(pid: int) -> str:
    """The process's name, without its arguments, which may be secret."""
    with suppress(OSError):
        program = Path(f"/proc/{pid}/comm").read_text().strip()
        return f" ({program})"
    return ""
