"""Follows the log in which nginx (or Apache) says what it sent of each play: whole lines, each once.

A position in a file is where it lies, its first bytes, and an offset; the caller keeps the positions in the transaction
that takes the lines. So a log may be renamed, copied and truncated, or removed, and the relay may end at any time.
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

#: Bytes that are taken from the log at a look: a backlog is taken in pieces, each its own transaction.
PIECE = 1 << 20
#: First bytes that a file is known by: so many that a line's play, time and size are among them, for a proxy that
#: answers from its cache begins the next log with the same play.
HEAD = 128
#: Places that are kept: a file in the middle of its renaming is nowhere to be found.
POSITIONS_KEPT = 16
#: Seconds that the log may be away between its renaming and the proxy's opening of the next one.
ROTATION_GRACE = 5.0
#: Lines without one of ours after which the log is called another format.
ODD_LINES = 1000


class LogPosition(NamedTuple):
    """Up to where one file is taken in."""

    device: int
    inode: int
    #: Its first bytes, as far as they are taken in; at most :data:`HEAD`.
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
    """What one look brought."""

    lines: list[ProxyLine]
    #: All positions, to be kept in the position of those that were kept before.
    positions: list[LogPosition]
    #: ``proxy_bad``: lines that have our mark and are broken; ``proxy_foreign``: lines without it.
    counts: Counter[str]
    #: Whether a backlog is left that can be read at once.
    more: bool
    #: Whether :attr:`positions` are others than before; lines and counts come only with that.
    changed: bool
    #: Where nothing of these files is known yet, positions to keep until :attr:`positions` can be: who only knows then that
    #: it began goes on there, however often the log is rotated before.
    first_positions: list[LogPosition] | None = None


#: Device, inode, size and time of the last change: while they stay, there is nothing to read.
_Signature = tuple[int, int, int, int]


class _File(NamedTuple):
    """A file that is open for one look."""

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
    """Follows the log at *path* and its newest rotated siblings; *positions* are those of the last reading taken.

    Never raises for what is wrong with the file: :attr:`problem` tells it. *clock* gives seconds.
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
        #: What lies there was read to its end.
        self._finished: set[_Signature] = set()
        self._reading: tuple[LogReading, set[_Signature]] | None = None
        self._found: Counter[str] = Counter()

    @property
    def problem(self) -> str | None:
        """What keeps plays from being read, as of the last :meth:`read`: a sentence with its remedy."""
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
        """The next whole lines, the oldest file's first; about *limit_bytes* of the log at most.

        Without :meth:`committed` in between, the same again.
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
        """The caller's store has *reading*: go on behind it."""
        self._positions = reading.positions
        if self._reading is not None and self._reading[0] is reading:
            self._finished = self._reading[1]

    def offset(self) -> int:
        """Up to where the file at the path itself is taken, in bytes."""
        with self._opened([self._path]) as files:
            return _known_offset(files[0], self._positions) if files else 0

    def _find_files(self) -> dict[Path, _Signature]:
        """The regular files there are, newest first."""
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
        """*found* with the files that have a name there no more, newest first: they came before it, after others."""
        named = {signature[:2] for signature in found.values()}
        nameless = {
            path: _signature(there) for path, there in kept.items() if _signature(there)[:2] not in named
        }
        log = {path: found[path] for path in (self._path,) if path in found}
        return {**log, **nameless, **found}

    def _check_presence(self, found: dict[Path, _Signature]) -> None:
        """Whether the log itself is there, and its folder can be seen."""
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
        """Whether the file that is to be read on has another name than it had when names were looked for: it would be
        passed over now, and for good. The next look finds it."""
        last = self._siblings.last
        return last is not None and not self._problems and all(file.signature[1] != last for file in files)

    @contextmanager
    def _opened(self, paths: Iterable[Path]) -> Iterator[list[_File]]:
        """The files, oldest first.

        They are opened newest first: a rotation in between then shows one file twice, which is read once, while the
        other way round it would hide one behind its successor.
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
        """The file at *path*, if it is one; never waits for a FIFO's writer that took its position."""
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
            cut = known > file.size and heads[file.head] == 1  # else a copy that is still being made
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
    """Up to where *file*, or the one that it is a copy of, is taken in."""
    return next((position.offset for position in positions if _is_of(position, file)), 0)


def _is_of(position: LogPosition, file: _File) -> bool:
    """Whether *position* is in *file*. Enough first bytes say so alone: a copy has another inode, a disk may get another
    number at a boot; an inode alone says nothing, for the next file made may have it."""
    if len(position.head) == HEAD:
        return position.head == file.head
    return (position.device, position.inode) == file.signature[:2] and file.head.startswith(position.head)


def _with_position(positions: list[LogPosition], file: _File, offset: int) -> list[LogPosition]:
    """*positions* with that of *file* at *offset*; those of files that are not to be found stay for a while."""
    device, inode = file.signature[:2]
    others = [position for position in positions if not _is_of(position, file)]
    return [*others, LogPosition(device, inode, file.head[:offset], offset)][-POSITIONS_KEPT:]


def _next_piece(file: _File, start: int, limit: int) -> _LogPiece:
    """Whole lines of *file* from *start*; what has no newline yet waits, unless no line of ours is so long."""
    size = min(file.size - start, limit)
    if size <= 0:
        return _LogPiece([], start, more=False)
    before = 1 if start else 0
    data = os.pread(file.descriptor, size + before, start - before)
    # Behind no newline lies the rest of a line that was too long, or lost its beginning.
    first = data.find(b"\n") + 1 or len(data) if before and data[:1] != b"\n" else before
    end = max(data.rfind(b"\n") + 1, first)
    if len(data) - end > LONGEST_LINE:
        end = len(data)
    lines = data[first:end].decode("utf-8", "replace").removesuffix("\n").split("\n")
    return _LogPiece(lines, start - before + end, more=0 < len(data) - before < file.size - start)


def _signature(there: os.stat_result) -> _Signature:
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns


def _refused(path: Path, error: OSError) -> str:
    """What to do about a file that can't be read."""
    if not isinstance(error, PermissionError):
        return f"{path} can't be read ({error.strerror}): correct T23_PROXY_LOG, or mend the file"
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
        else "let logrotate make it with `create 0640` and a group that both belong to, and change this one likewise"
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
