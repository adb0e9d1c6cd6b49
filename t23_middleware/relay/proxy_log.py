"""Follows the log in which nginx (or Apache) writes what it sent of each play: whole lines, each once.

A position consists of a file's device and inode, its first bytes, and an offset. The caller stores the positions in the
same transaction as the lines. So a log may be renamed, copied and truncated, or removed, and the relay may end at any
time.
"""

from __future__ import annotations

import grp
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .proxy_files import KeptFiles, Siblings, user
from .proxy_line import LONGEST_LINE, ProxyLine, parse_line, whole

#: Bytes that are read from the log per poll: a backlog is read in pieces, each in its own transaction.
PIECE = 1 << 20
#: First bytes by which a file is recognised. Enough to include a line's play, time and size, since a proxy that answers
#: from its cache may begin the next log with the same play.
HEAD = 128
#: Positions that are kept, since a file is not found in the middle of a rename.
POSITIONS_KEPT = 16
#: Seconds that the log may be missing, between its rename and the proxy's creation of the next one.
ROTATION_GRACE = 5.0
#: After this many lines without one of ours, the log counts as having another format.
ODD_LINES = 1000


class LogPosition(NamedTuple):
    """The position up to which one file is stored."""

    device: int
    inode: int
    #: Its first bytes up to the offset, at most :data:`HEAD`.
    head: bytes
    #: In bytes.
    offset: int

    def to_text(self) -> str:
        """The position as JSON, for a store."""
        return json.dumps([self.device, self.inode, self.head.hex(), self.offset])

    @classmethod
    def from_text(cls, text: str) -> LogPosition:
        """The position that :meth:`to_text` wrote; raises :class:`ValueError` for anything else."""
        try:
            device, inode, head, offset = json.loads(text)
            return cls(whole(device), whole(inode), bytes.fromhex(head), whole(offset))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"not a position: {text!r}") from error


class LogReading(NamedTuple):
    """The result of one read."""

    lines: list[ProxyLine]
    #: All positions, which replace the stored ones.
    positions: list[LogPosition]
    #: ``proxy_bad``: broken lines with our mark; ``proxy_foreign``: lines without it.
    counts: Counter[str]
    #: Whether a backlog is left that can be read at once.
    more: bool
    #: Whether :attr:`positions` changed; without a change there are no lines and counts.
    changed: bool
    #: If no position of these files is known yet: positions to store until :attr:`positions` can be stored. The next
    #: relay then continues there, however often the log is rotated before.
    first_positions: list[LogPosition] | None = None


#: Device, inode, size and time of the last change: while they stay, there is nothing to read.
_Signature = tuple[int, int, int, int]


class _File(NamedTuple):
    """A file that is open for one read."""

    descriptor: int
    signature: _Signature
    head: bytes

    @property
    def size(self) -> int:
        return self.signature[2]


class _LogPiece(NamedTuple):
    """Lines of one file, where they end, and whether *more* are there to be read at once."""

    lines: list[str]
    end: int
    more: bool


class ProxyLog:
    """Follows the log at *path* and its newest rotated siblings; *positions* are those of the last stored reading.

    Never raises for a fault of the file: :attr:`problem` describes it. *clock* returns seconds.
    """

    def __init__(
        self, path: Path, positions: Sequence[LogPosition], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._siblings = Siblings(self._path)
        self._kept_files = KeptFiles(clock)
        self._positions = list(positions)
        self._clock = clock
        self._seen_at = float("-inf")
        self._problems: list[str] = []
        #: Signatures of the files that were read to their end.
        self._finished: set[_Signature] = set()
        self._reading: tuple[LogReading, set[_Signature]] | None = None
        self._found: Counter[str] = Counter()

    @property
    def problem(self) -> str | None:
        """Why the log can't be read, as of the latest :meth:`read`: a sentence with the remedy; ``None`` if it can."""
        if self._problems:
            return self._problems[0]
        odd = self._found["proxy_foreign"] + self._found["proxy_bad"]
        if self._found["lines"] or not odd or not (self._found["at_end"] or odd >= ODD_LINES):
            return None
        what = "in the format t23" if self._found["proxy_foreign"] else "that can be understood"
        return (
            f"{self._path} has {odd} lines, but none {what}: let the proxy write it with the lines in docs/nginx.md, "
            "word for word, into a file of its own"
        )

    def read(self, limit_bytes: int = PIECE) -> LogReading:
        """The next whole lines, about *limit_bytes* at most; those of the oldest file come first.

        Without :meth:`committed` in between, it returns the same lines again.
        """
        self._problems = []
        nothing = LogReading([], self._positions, Counter(), more=False, changed=False)
        found = self._find_files()
        if self._finished.issuperset(found.values()):
            return nothing
        with self._opened(found) as files:
            if self._was_rotated_meanwhile(files):
                self._siblings.forget()
                return nothing
            return self._read(files, limit_bytes)

    def committed(self, reading: LogReading) -> None:
        """The caller has stored *reading*: continue after it."""
        self._positions = reading.positions
        if self._reading is not None and self._reading[0] is reading:
            self._finished = self._reading[1]

    def offset(self) -> int:
        """The offset up to which the file at the path itself is stored, in bytes."""
        with self._opened([self._path]) as files:
            return _known_offset(files[0], self._positions) if files else 0

    def _find_files(self) -> dict[Path, _Signature]:
        """The log and its siblings that are regular files, newest first."""
        found = {}
        kept = self._kept_files.refresh(self._path)
        siblings = self._siblings.newest(self._positions)
        for path in (self._path, *siblings):
            try:
                there = path.stat()
            except FileNotFoundError:
                continue
            except OSError as error:
                self._problems.append(_refused(path, error))
                continue
            if stat.S_ISREG(there.st_mode):
                found[path] = _signature(there)
            elif path == self._path:
                self._problems.append(_no_file(path, there.st_mode))
        self._check_presence(found)
        return self._with_kept_files(found, kept)

    def _with_kept_files(
        self, found: dict[Path, _Signature], kept: dict[Path, os.stat_result]
    ) -> dict[Path, _Signature]:
        """*found* with the kept files whose name is gone: they are older than the log and newer than other files."""
        named = {signature[:2] for signature in found.values()}
        nameless = {
            path: _signature(there) for path, there in kept.items() if _signature(there)[:2] not in named
        }
        log = {path: found[path] for path in (self._path,) if path in found}
        return {**log, **nameless, **found}

    def _check_presence(self, found: dict[Path, _Signature]) -> None:
        """Note a problem if the log itself is missing, or its folder can't be listed."""
        if self._path in found:
            self._seen_at = self._clock()
        elif not self._problems and self._clock() - self._seen_at > ROTATION_GRACE:
            self._problems.append(
                f"{self._path} does not exist: add the lines in docs/nginx.md to the proxy's configuration and "
                "reload it, or correct T23_PROXY_LOG"
            )
        if self._siblings.problem:
            self._problems.append(self._siblings.problem)

    def _was_rotated_meanwhile(self, files: list[_File]) -> bool:
        """Whether the file to continue with was renamed since names were listed.

        It would be missed now, and for good; the next read finds it.
        """
        last = self._siblings.last
        return last is not None and not self._problems and all(file.signature[1] != last for file in files)

    @contextmanager
    def _opened(self, paths: Iterable[Path]) -> Iterator[list[_File]]:
        """The open files, oldest first.

        They are opened newest first: if a rotation happens in between, one file is then opened twice, and read once. In
        the other order, one file would be missed.
        """
        files: list[_File] = []
        try:
            for path in paths:
                file = self._open(path)
                if file is not None:
                    files.append(file)
            yield files[::-1]
        finally:
            for file in files:
                os.close(file.descriptor)

    def _open(self, path: Path) -> _File | None:
        """The regular file at *path*, if any. It never waits, even if a FIFO has replaced the file."""
        try:
            descriptor = self._kept_files.open(path)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._problems.append(_refused(path, error))
            return None
        try:
            there = os.fstat(descriptor)
            if stat.S_ISREG(there.st_mode):
                return _File(descriptor, _signature(there), os.pread(descriptor, HEAD, 0))
        except OSError as error:
            self._problems.append(_refused(path, error))
        os.close(descriptor)
        return None

    def _read(self, files: list[_File], limit: int) -> LogReading:
        lines: list[str] = []
        positions, finished, more = self._positions, set(), False
        heads = Counter(file.head for file in files)
        for file in files:
            known = _known_offset(file, positions)
            cut = known > file.size and heads[file.head] == 1  # else it may be an unfinished copy
            try:
                piece = _next_piece(file, file.size if cut else known, max(limit, LONGEST_LINE + 2))
            except OSError as error:
                self._problems.append(_refused(self._path, error))
                continue
            lines += piece.lines
            limit -= max(piece.end - known, 0)
            if piece.end != known:
                positions = _with_position(positions, file, piece.end)
            if more := piece.more:
                break
            finished.add(file.signature)
        reading = self._parsed(lines, positions, more)
        if reading.changed and not any(
            _is_of(position, file) for position in self._positions for file in files
        ):
            reading = reading._replace(first_positions=_with_position(self._positions, files[0], 0))
        self._reading = reading, finished
        if not reading.changed:
            self._finished = finished
        return reading

    def _parsed(self, texts: list[str], positions: list[LogPosition], more: bool) -> LogReading:
        lines: list[ProxyLine] = []
        counts: Counter[str] = Counter()
        for text in texts:
            line = parse_line(text)
            if isinstance(line, ProxyLine):
                lines.append(line)
            elif line:
                counts[line] += 1
        self._found.update(counts)
        self._found["lines"] += len(lines)
        self._found["at_end"] = not more
        return LogReading(lines, positions, counts, more, changed=positions is not self._positions)


def _known_offset(file: _File, positions: Sequence[LogPosition]) -> int:
    """The offset up to which *file*, or the file that it is a copy of, is stored."""
    return next((position.offset for position in positions if _is_of(position, file)), 0)


def _is_of(position: LogPosition, file: _File) -> bool:
    """Whether *position* is in *file*. Enough first bytes decide alone.

    A copy has another inode, and a disk may have another number after a boot. An inode alone proves nothing, since a
    new file may get it again.
    """
    if len(position.head) == HEAD:
        return position.head == file.head
    return (position.device, position.inode) == file.signature[:2] and file.head.startswith(position.head)


def _with_position(positions: list[LogPosition], file: _File, offset: int) -> list[LogPosition]:
    """*positions* with *file* at *offset*; positions of files that were not found are kept for a while."""
    device, inode = file.signature[:2]
    others = [position for position in positions if not _is_of(position, file)]
    return [*others, LogPosition(device, inode, file.head[:offset], offset)][-POSITIONS_KEPT:]


def _next_piece(file: _File, start: int, limit: int) -> _LogPiece:
    """Whole lines of *file* from *start*. A line without a newline waits, unless it is too long to be one of ours."""
    size = min(file.size - start, limit)
    if size <= 0:
        return _LogPiece([], start, more=False)
    before = 1 if start else 0
    data = os.pread(file.descriptor, size + before, start - before)
    # If no newline is before *start*, it begins with the rest of a line that was too long or lost its beginning.
    first = data.find(b"\n") + 1 or len(data) if before and data[:1] != b"\n" else before
    end = max(data.rfind(b"\n") + 1, first)
    if len(data) - end > LONGEST_LINE:
        end = len(data)
    lines = data[first:end].decode("utf-8", "replace").removesuffix("\n").split("\n")
    return _LogPiece(lines, start - before + end, more=0 < len(data) - before < file.size - start)


def _signature(there: os.stat_result) -> _Signature:
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns


def _refused(path: Path, error: OSError) -> str:
    """The message for a file that can't be read, with the remedy."""
    if not isinstance(error, PermissionError):
        return f"{path} can't be read ({error.strerror}): correct T23_PROXY_LOG, or fix the file"
    name = user()
    try:
        there = path.stat()
    except OSError:
        return (
            f"{path} can't be reached by {name}: allow that user to enter the folders on the way, or let the proxy "
            "write the log to another folder"
        )
    group = _group(there.st_gid)
    remedy = (
        f"add that user to the group that may (`usermod -aG {group} {name}`) and restart the app and the relay"
        if there.st_mode & stat.S_IRGRP and there.st_gid != 0
        else "let logrotate make it with `create 0640` and a group that both belong to, and change this file in the same way"
    )
    return f"{path} can't be read by {name}: {remedy}"


def _no_file(path: Path, mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return (
        f"{path} is a {kind}, which can't be followed: let the proxy's access_log name a file (in a container, on a "
        "volume that both see) and T23_PROXY_LOG the same one"
    )


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
