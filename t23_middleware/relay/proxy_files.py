"""Finds the files of a rotated proxy log: siblings by their names, and moved files by an open descriptor."""

from __future__ import annotations

import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

#: Number of rotated siblings that are followed, and of renamed files that are kept open.
NEWEST = 2
#: Most rotated files that are read after a long absence: four days of hourly ones.
FURTHEST = 100
#: Seconds without a change after which a removed file is closed, so that its disk space becomes free.
REMOVED_FOR = 60.0


class _HasInode(Protocol):
    @property
    def inode(self) -> int: ...


class _KeptFile(NamedTuple):
    descriptor: int
    device: int
    inode: int


class KeptFiles:
    """Keeps the file at a path and its predecessors open, so that they can be read under any name, in any folder.

    *clock* returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        #: The newest first.
        self._files: list[_KeptFile] = []
        #: Descriptor -> size, and when the size changed last.
        self._grown: dict[int, tuple[int, float]] = {}

    def __del__(self) -> None:
        for file in self._files:
            os.close(file.descriptor)

    def refresh(self, path: Path) -> dict[Path, os.stat_result]:
        """Keep the file at *path* open. Returns the former files, newest first, by a path for :meth:`open`."""
        now = self._keep(path)
        former = {}
        for file in [each for each in self._files if each != now]:
            there = os.fstat(file.descriptor)
            if self._is_over(file, there):
                self._let_go(file)
            else:
                former[_path_of(file)] = there
        return former

    def open(self, path: Path) -> int | None:
        """A new descriptor of the kept file that :meth:`refresh` returned as *path*; ``None`` for another path."""
        found = [file.descriptor for file in self._files if _path_of(file) == path]
        return os.dup(found[0]) if found else None

    def _keep(self, path: Path) -> _KeptFile | None:
        """The kept file that is at *path* now; a new one is opened."""
        try:
            there = path.stat()
            if not stat.S_ISREG(there.st_mode):
                return None
            for file in self._files:
                if (file.device, file.inode) == (there.st_dev, there.st_ino):
                    return file
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return None  # the reader of the log reports the problem
        there = os.fstat(descriptor)
        self._files.insert(0, file := _KeptFile(descriptor, there.st_dev, there.st_ino))
        for old in self._files[1 + NEWEST :]:
            self._let_go(old)
        return file

    def _is_over(self, file: _KeptFile, there: os.stat_result) -> bool:
        """Whether *file* was removed and is no longer written."""
        size, since = self._grown.get(file.descriptor, (-1, 0.0))
        if size != there.st_size:
            since = self._clock()
            self._grown[file.descriptor] = there.st_size, since
        return there.st_nlink == 0 and self._clock() - since > REMOVED_FOR

    def _let_go(self, file: _KeptFile) -> None:
        self._files.remove(file)
        self._grown.pop(file.descriptor, None)
        os.close(file.descriptor)


def _path_of(file: _KeptFile) -> Path:
    return Path(f"/proc/self/fd/{file.descriptor}")


class Siblings:
    """The uncompressed rotated files of a log, by the names that logrotate and rotatelogs use.

    logrotate's names: ``.1``, ``-20261124``, another ``dateformat``, with ``extension`` before the log's own suffix,
    and in an ``olddir`` in the log's folder.
    """

    def __init__(self, log: Path) -> None:
        # If *log* is a link, its target is rotated, in the target's folder.
        real = Path(os.path.realpath(log))
        self._log = log
        self._folder = real.parent
        self._stem = real.stem
        self._first = real.with_name(f"{real.name}.1")
        name, stem, ending = re.escape(real.name), re.escape(real.stem), re.escape(real.suffix)
        number, date = r"\.(\d{1,4})", r"[._-]?(\d[\d._:T-]{5,30})"
        self._number = re.compile(f"{name}{number}|{stem}{number}{ending}")
        self._date = re.compile(f"{name}{date}|{stem}{date}{ending}")
        self._listed: int | None = None
        self._newest: list[Path] = []
        #: Inode of the newest file (the log or a sibling) with a known position: reading continues there.
        self.last: int | None = None
        #: Why the siblings can't be listed.
        self.problem: str | None = None

    def newest(self, positions: Sequence[_HasInode]) -> list[Path]:
        """The siblings, newest first. The folder is listed only if its entries changed, or to catch up."""
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed != self._listed or len(self._newest) > NEWEST:
                # Two changes within one tick of the kernel's clock have the same time.
                self._listed = changed if time.time_ns() - changed > 1_000_000_000 else None
                self._newest, self.last, self.problem = *self._choose(positions), None
        except PermissionError:
            self._newest, self.last, self.problem = [self._first], None, closed_folder(self._folder)
        except OSError:
            self._newest, self.last, self.problem = [], None, None
        return self._newest

    def similar_files(self) -> list[Path]:
        """Files with similar names that are not recognised as rotated, in the log's folder or a folder in it.

        The latest changed first; none if the folder can't be listed.
        """
        found = []
        try:
            for folder in (self._folder, *_folders_in(self._folder)):
                for name in _names_in(folder):
                    if name.startswith(self._stem) and not self._is_named(name):
                        found.append(folder / name)
        except OSError:
            return []
        return sorted(found, key=_changed, reverse=True)

    def _is_named(self, name: str) -> bool:
        return name == self._log.name or any(way.fullmatch(name) for way in (self._number, self._date))

    def all(self) -> list[Path]:
        """The log, then its rotated files in its folder or a folder in it; none if that can't be listed."""
        try:
            return [self._log, *self._sorted([self._folder, *_folders_in(self._folder)])]
        except OSError:
            return []

    def forget(self) -> None:
        """List the folder again at the next call, even if its time is unchanged."""
        self._listed = None

    def _choose(self, positions: Sequence[_HasInode]) -> tuple[list[Path], int | None]:
        """The files to read, and the inode of the newest known one.

        These are the newest two or, if neither they nor the log are known, all files since the newest known one.
        """
        paths = self._sorted([self._folder])
        known = {position.inode for position in positions}
        if not known:
            return paths[:NEWEST], None
        if last := self._last_known(paths, known):
            return last
        elsewhere = self._sorted([self._folder, *_folders_in(self._folder)])
        return self._last_known(elsewhere, known) or (paths[:NEWEST], None)

    def _last_known(self, paths: list[Path], known: set[int]) -> tuple[list[Path], int] | None:
        for number, path in enumerate([self._log, *paths[:FURTHEST]]):
            if (inode := _inode(path)) in known and inode is not None:
                return paths[: max(NEWEST, number)], inode
        return None

    def _sorted(self, folders: Iterable[Path]) -> list[Path]:
        """Sorted by name, since ``sed -i`` changes times; if the naming scheme was changed, the newer scheme first."""
        numbers, dates = [], []
        for folder in folders:
            for name in _names_in(folder):
                if (found := self._number.fullmatch(name)) is not None:
                    numbers.append((-int(found[1] or found[2]), folder / name))
                elif (found := self._date.fullmatch(name)) is not None:
                    dates.append((found[1] or found[2], folder / name))
        if not all(_YEAR_FIRST.match(date) for date, _ in dates):
            dates = [(f"{_changed(path):020}", path) for _, path in dates]
        ways = [[path for _, path in sorted(way, reverse=True)] for way in (numbers, dates)]
        ways.sort(key=lambda paths: _changed(paths[0]) if paths else 0, reverse=True)
        return ways[0] + ways[1]


#: A date whose text sorts like its time, or seconds since the epoch.
_YEAR_FIRST = re.compile(r"(?:19|20)\d\d|1\d{9}(?!\d)")


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder)  # noqa: PTH208  (names are all that is needed)


def _folders_in(folder: Path) -> list[Path]:
    """The folders in *folder* that can be listed."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [path for path in paths if os.access(path, os.R_OK | os.X_OK)]


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def closed_folder(folder: Path) -> str:
    return (
        f"{folder} can't be listed by {user()}, so plays are missed when the log in it is rotated: allow it "
        f"(`setfacl -m u:{user()}:rx {folder}`), or let the proxy write the log to another folder"
    )


def user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"
