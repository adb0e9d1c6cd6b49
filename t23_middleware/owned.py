"""Opens files in the state folder, and only if this user owns the folder.

Another local user may have created the folder first, with links, FIFOs and folders in it. So each function here checks
the folder's type and owner, opens files relative to that folder, follows no link, does not block (``O_NONBLOCK``), and
accepts only regular files. A path is the folder itself, its ``journals``, or a file in one of the two. All functions
raise :class:`OSError`, and :class:`NotOwned` if something is not ours.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The folder of journals in a state folder.
JOURNALS = "journals"
#: Our subfolder in a mount that belongs to root.
MOUNT_SUBFOLDER = "t23-middleware"
#: Seconds for which the parents of a folder count as checked; the folder itself is checked each time.
PARENTS_CHECKED_FOR = 1.0

#: Folder and user -> until when the folder's parents count as checked.
_checked_parents: dict[tuple[Path, int], float] = {}


class NotOwned(OSError):
    """A file or folder belongs to another user, is a link, or has the wrong type."""


def make_folder(path: Path) -> None:
    """As ``mkdir -p`` with mode 0700, regardless of the umask; checks each folder's parents before it is created."""
    for folder in reversed((path, *path.parents)):
        if not os.path.lexists(folder):
            _refuse_foreign_parents(folder)
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                pass  # another process created it first: it is checked with the next folder
    _checked_parents.clear()
    with open_folder(path) as descriptor:
        if os.fstat(descriptor).st_mode & 0o077:
            os.fchmod(descriptor, 0o700)


def resolve_mount(path: Path) -> Path:
    """*path*, or our subfolder in it if *path* belongs to root: the mount of a volume in which our group may write.

    Root gets the same subfolder once it exists.
    """
    inner = path / MOUNT_SUBFOLDER
    try:
        if path.stat().st_uid == 0 and (inner.is_dir() if os.geteuid() == 0 else _can_make(inner)):
            return inner
    except OSError:
        pass  # missing or not readable: the code that creates or opens it reports that
    return path


def _can_make(inner: Path) -> bool:
    return inner.is_dir() or os.access(inner.parent, os.W_OK | os.X_OK)


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Descriptor of the folder *path*, after the checks."""
    top = path.parent if path.name == JOURNALS else path
    now = time.monotonic()
    if _checked_parents.get((top, os.geteuid()), 0.0) <= now:
        _refuse_foreign_parents(top)
        _checked_parents[top, os.geteuid()] = now + PARENTS_CHECKED_FOR
    descriptor = _open_own_folder(str(top), None)
    if top is not path:
        try:
            inner = _open_own_folder(path.name, descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """As :func:`os.open`, for a regular file that this user or root owns."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open_folder(path.parent) as folder:
        try:
            descriptor = os.open(path.name, flags, mode, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _not_our_file(path) from None
            raise
    if not _is_our_file(os.fstat(descriptor)):
        os.close(descriptor)
        raise _not_our_file(path)
    return descriptor


def check_file(path: Path) -> bool:
    """Whether the file *path* exists; for code that opens it by path. Raises :class:`NotOwned` if it is not ours."""
    try:
        found = lstat(path)
    except FileNotFoundError:
        return False
    if not _is_our_file(found):
        raise _not_our_file(path)
    return True


def lstat(path: Path) -> os.stat_result:
    """As :func:`os.lstat`, for a file in a folder of ours."""
    with open_folder(path.parent) as folder:
        return os.stat(path.name, dir_fd=folder, follow_symlinks=False)


def names(path: Path, suffix: str) -> list[str]:
    """Sorted names in the folder *path* that end with *suffix*; empty if the folder is missing."""
    try:
        with open_folder(path) as folder:
            return sorted(name for name in os.listdir(folder) if name.endswith(suffix))  # noqa: PTH208  # a descriptor
    except FileNotFoundError:
        return []


def read(path: Path) -> bytes:
    """The content of a file."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def replace(path: Path, data: bytes) -> None:
    """Replace a file's content in one step; on an error the former content stays."""
    new = path.with_name(f"{path.name}.new")
    with os.fdopen(open_file(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(data)
    rename(new, path)


def rename(path: Path, new: Path) -> None:
    """As :meth:`pathlib.Path.replace` within one folder."""
    with open_folder(path.parent) as folder:
        os.replace(path.name, new.name, src_dir_fd=folder, dst_dir_fd=folder)


def touch(path: Path, at_ns: int | None = None) -> None:
    """Create a file if it is missing, and set its times to *at_ns*, in ns since the epoch; ``None`` is now."""
    descriptor = open_file(path, os.O_WRONLY | os.O_CREAT)
    try:
        now_ns = time.time_ns() if at_ns is None else at_ns
        os.utime(descriptor, ns=(now_ns, now_ns))
    finally:
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Unlink a file; returns whether it existed."""
    try:
        with open_folder(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _refuse_foreign_parents(path: Path) -> None:
    """Raise if a parent of *path* in a world-writable folder (``/var/tmp``) is a link or belongs to another user."""
    open_to_all = (folder for folder in path.parents if folder.parent.stat().st_mode & stat.S_IWOTH)
    for folder in open_to_all:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            raise _not_our_folder(path)


def _open_own_folder(name: str, parent: int | None) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _not_our_folder(Path(name)) from None
        raise
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise _not_our_folder(Path(name))
    return descriptor


def _is_our_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid())


def _not_our_folder(path: Path) -> NotOwned:
    why = "it is a file, a link or another user's folder, or is in such a folder"
    return NotOwned(errno.EPERM, why, str(path))


def _not_our_file(path: Path) -> NotOwned:
    return NotOwned(errno.EPERM, "it is not a regular file of this user", str(path))
