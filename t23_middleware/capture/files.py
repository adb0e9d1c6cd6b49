"""Files that a server wraps itself (``wsgi.file_wrapper``): counted without taking them out of its hands.

A server sends what its own wrapper made in its own way, mostly by sendfile(2). So the wrapper stays the server's,
and the file inside it is ours: its position, or the kernel's account, tells what was sent.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from .body import Ending

#: Bytes of a block where we read a file for a server that can't be left to it.
BLOCK = 1 << 16


class Witness(Enum):
    """What tells how much of a wrapped file a server sent."""

    #: The file's position: the server reads or seeks it in Python (gunicorn, waitress, wsgiref).
    POSITION = "position"
    #: The thread's account: the server sends the descriptor from C, in the request's own thread (uWSGI).
    ACCOUNT = "account"
    #: Nothing: the server sends the descriptor from C and leaves no trace (bjoern, mod_wsgi), so we hand out blocks.
    BLOCKS = "blocks"
    #: Nothing, and the server shall have its way: what was to be sent is believed (``T23_COUNT=declared``).
    LENGTH = "length"


class PositionedFile:
    """A file that keeps its own position, for a server that wraps it.

    The descriptor's own position is no witness: gunicorn sets it back after sendfile (gunicorn/http/wsgi.py,
    ``sendfile``). Before that ``socket.sendfile`` seeks the file to what it sent, also when it fails.
    """

    def __init__(self, file: Any, *, in_blocks: bool) -> None:
        self._file = file
        self._in_blocks = in_blocks
        self._position = 0
        self._armed_at = 0
        self._end: int | None = None
        self._ending: Ending | None = None
        self._meter: ReadMeter | None = None
        self._declared: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        # uWSGI's wrapper is the file itself, and werkzeug's Range would then take it line by line.
        return self if self._in_blocks else iter(self._file)

    def __next__(self) -> bytes:
        data = self.read(BLOCK)
        if not data:
            raise StopIteration
        return data  # type: ignore[no-any-return]

    def read(self, *size: int) -> Any:
        if self._end is not None:
            size = (self._left(*size),)
        data = self._file.read(*size)
        self._position += len(data)
        return data

    def seek(self, *place: int) -> Any:
        answer = self._file.seek(*place)
        self._position = self._file.tell()
        return answer

    def cut_to(self, start: int, stop: int) -> bool:
        """Stand at *start* and end at *stop*, so that the server's own way sends just that; whether it could be done.

        Only a plain file on disk of which nothing was read: a GzipFile's descriptor is the compressed file's, and
        after a read the descriptor and ``tell()`` differ. *stop* is what a server that reads to the end of the file
        (gunicorn with ``--no-sendfile`` or TLS) must meet.
        """
        if not _is_plain(self._file) or self._file.tell() != 0 or self._raw_position() != 0:
            return False
        self.seek(start)
        if self._raw_position() != start:
            self.seek(0)
            return False
        self._end = stop
        return True

    def arm(self, ending: Ending, meter: ReadMeter | None, declared: int | None) -> None:
        """Count from here, where the app is done with the file and the server begins."""
        self._ending = ending
        self._armed_at = self._position = self._place()
        self._meter = meter
        self._declared = declared

    def close(self) -> None:
        """End the count; waitress closes twice when a client leaves, and the file sees both."""
        ending, self._ending = self._ending, None
        sent = 0 if ending is None else self._sent()
        try:
            close = getattr(self._file, "close", None)
            if close is not None:
                close()
        finally:
            if ending is not None:
                ending.end(sent, declared=int(self._declared is not None))

    def _sent(self) -> int:
        if self._declared is not None:
            return self._declared
        moved = self._position - self._armed_at
        if moved == 0 and self._meter is not None:
            return self._meter.read_since()
        return max(moved, 0)

    def _left(self, size: int | None = -1) -> int:
        left = max((self._end or 0) - self._position, 0)
        return left if size is None or size < 0 else min(size, left)

    def _place(self) -> int:
        """Where the file stands; what cannot tell (a pipe) is counted from 0."""
        try:
            return int(self._file.tell())
        except (AttributeError, OSError, ValueError):
            return 0

    def left_on_disk(self) -> int | None:
        """Bytes between the file's position and its end; ``None`` for what is no file."""
        try:
            return int(os.fstat(self._file.fileno()).st_size - self._file.tell())
        except (AttributeError, OSError, ValueError):
            return None

    def _raw_position(self) -> int:
        return os.lseek(self._file.fileno(), 0, os.SEEK_CUR)


def _is_plain(file: Any) -> bool:
    """Whether *file* is what ``open(path, "rb")`` gives, on a regular file."""
    raw = file.raw if type(file) is io.BufferedReader else file
    return type(raw) is io.FileIO and stat.S_ISREG(os.fstat(raw.fileno()).st_mode)


class ReadMeter:
    """What this thread read since now, by Linux's own account: sendfile(2) is in it.

    uWSGI sends the bare descriptor from C and leaves its position alone, so that this is the only witness.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        text = _thread_io()
        # The kernel adds our own reading of this account to it.
        self._start = _rchar(text) + len(text)

    def read_since(self) -> int:
        """Bytes read by this thread since; 0 where the thread is another or the account can't be read."""
        if threading.get_ident() != self._thread:
            return 0
        try:
            return max(_rchar(_thread_io()) - self._start, 0)
        except OSError:
            return 0


def _thread_io() -> bytes:
    with Path("/proc/thread-self/io").open("rb", buffering=0) as account:
        return account.read(512)


def _rchar(text: bytes) -> int:
    return int(text.split(None, 2)[1])


class Blocks:
    """An iterable in Python over a file, for servers whose own wrapper hides what it sent.

    Not a file in disguise: without ``fileno()`` uWSGI would loop over ``read()`` and never look at a failed write
    (wsgi_subhandler.c:95-127).
    """

    def __init__(self, file: Any, size: int = BLOCK, *, may_seek: bool = True) -> None:
        self.file = file
        self.is_read = False
        # What can't be sought may be a live pipe, of which a large block would wait for more than the app does.
        self._size = max(size, BLOCK) if hasattr(file, "seekable") and file.seekable() else size
        if may_seek:
            for name in ("seekable", "seek", "tell"):
                if hasattr(file, name):
                    setattr(self, name, getattr(file, name))

    def __iter__(self) -> Blocks:
        return self

    def __next__(self) -> bytes:
        self.is_read = True
        data = self.file.read(self._size)
        if not data:
            raise StopIteration
        return data  # type: ignore[no-any-return]

    def close(self) -> None:
        close = getattr(self.file, "close", None)
        if callable(close):  # Falcon takes files whose close is no function
            close()


class FileWay(NamedTuple):
    """How wrapped files leave, as the operator chose."""

    #: ``T23_FAST_FILES``.
    fast: bool = True
    #: ``T23_COUNT=declared``.
    declared: bool = False


class LentWrapper:
    """Stands in for the server's ``wsgi.file_wrapper`` during one request and remembers what it wrapped.

    Servers recognise their own wrapper (by ``isinstance`` or identity), so what this makes is the server's, round a
    :class:`PositionedFile`. *original* is ``None`` where the server has none.
    """

    def __init__(self, original: Any, way: FileWay) -> None:
        self.original = original
        self._way = way
        self._witness = Witness.BLOCKS
        self._made: list[tuple[Any, PositionedFile]] = []
        self._blocks: list[tuple[Blocks, Callable[[Any], Any]]] = []

    def __call__(self, file: Any, *block_size: int, **named: int) -> Any:
        if self.original is not None:
            self._witness = witness_of(self.original, self._way)
        if self._witness is Witness.BLOCKS:
            # What stands in for werkzeug's own wrapper seeks as that does.
            may_seek = self.original is None or _stands_at_0(file)
            blocks = Blocks(file, *block_size, *named.values(), may_seek=may_seek)
            if self.original is not None:
                self._blocks.append((blocks, lambda given: self.original(given, *block_size, **named)))
            return blocks
        positioned = PositionedFile(file, in_blocks=self._way.fast)
        body = self.original(positioned, *block_size, **named)
        self._made.append((body, positioned))
        if self._way.fast and self._witness is Witness.POSITION:
            _make_seekable(body, file, positioned)
        return body

    def __instancecheck__(self, body: object) -> bool:
        return isinstance(body, Blocks) or any(body is made for made, _ in self._made)

    def as_the_server_has_it(self, body: Any) -> Any:
        """The server's own wrapper in place of our blocks, where nobody counts them; else *body*."""
        make = self._wrapper_for(body)
        return body if make is None else make(body.file)

    def as_declared(self, body: Any, ending: Ending) -> Any:
        """The same for a body without a Content-Length, and what the file has left is believed to be sent; else ``None``.

        mod_wsgi says the file's length where the app does not, but only of its own wrapper (wsgi_adapter.c:1236).
        """
        positioned, make = self._file_in(body), self._wrapper_for(body)
        if make is not None:
            positioned = PositionedFile(body.file, in_blocks=False)
            body = make(positioned)
        left = None if positioned is None else positioned.left_on_disk()
        if positioned is None or left is None:
            return None
        positioned.arm(ending, None, left)
        return body

    def _wrapper_for(self, body: object) -> Callable[[Any], Any] | None:
        return next((make for made, make in self._blocks if made is body and not made.is_read), None)

    def shorten(self, body: Any, start: int | None, length: int | None) -> Any:
        """The server's own wrapper in place of werkzeug's Range round it, where that sends the same; else *body*.

        Players always send a Range, and werkzeug then reads 8 KiB blocks in Python, whatever the server could do.
        """
        if not self._way.fast or self._witness is not Witness.POSITION or start is None or length is None:
            return body
        inner = _unread_range(body, start, length)
        file = None if inner is None else self._file_in(inner)
        return inner if file is not None and file.cut_to(start, start + length) else body

    def arm(self, body: object, ending: Ending, length: int | None) -> bool:
        """Count the file inside *body*, if *body* is what the server's wrapper made here; whether it was.

        By identity: an inner middleware or werkzeug's Range may have wrapped it, and then its iterator counts.
        *length* is the response's Content-Length in bytes.
        """
        file = self._file_in(body)
        if file is None:
            return False
        meter = _meter() if self._witness is Witness.ACCOUNT else None
        declared = length if self._witness is Witness.LENGTH else None
        if (meter or declared) is None and self._witness is not Witness.POSITION:
            return False
        file.arm(ending, meter, declared)
        return True

    def _file_in(self, body: object) -> PositionedFile | None:
        return next((file for made, file in self._made if made is body), None)


def _stands_at_0(file: Any) -> bool:
    try:
        return bool(file.tell() == 0)
    except (AttributeError, OSError, ValueError):
        return False


def _make_seekable(body: Any, file: Any, positioned: PositionedFile) -> None:
    """Without ``seekable`` on the wrapper, werkzeug's Range reads and throws away all that lies before its start.

    It seeks ``iter(body)``, which is *body* only where that is an iterator (not in gunicorn before version 24), and
    it seeks from the file's start, while what it throws away begins where the file stands.
    """
    if hasattr(body, "seekable") or not hasattr(body, "__next__"):
        return
    if not hasattr(file, "seekable") or not file.seekable() or not _stands_at_0(file):
        return
    body.seekable, body.seek, body.tell = file.seekable, positioned.seek, positioned.tell


def _unread_range(body: Any, start: int, length: int) -> Any:
    """What werkzeug's Range wraps, if *body* is one that nobody has read and that sends just these bytes.

    Its class is private (werkzeug/wsgi.py, ``_RangeWrapper``): one that has changed simply goes the app's own way.
    """
    kind = getattr(sys.modules.get("werkzeug.wsgi"), "_RangeWrapper", None)
    if kind is None or type(body) is not kind:
        return None
    state = [getattr(body, name, None) for name in ("start_byte", "byte_range", "read_length", "end_reached")]
    return getattr(body, "iterable", None) if state == [start, length, 0, False] else None


def witness_of(wrapper: Any, way: FileWay) -> Witness:
    """What tells how much *wrapper* sent."""
    if isinstance(wrapper, type):
        # gunicorn's wrapper has no __next__ before version 24, only the __getitem__ of old sequences.
        reads = getattr(wrapper, "__next__", None) or getattr(wrapper, "__getitem__", None)
        if isinstance(reads, FunctionType):
            return Witness.POSITION
    elif _uwsgi_accounts():
        return Witness.ACCOUNT
    return Witness.LENGTH if way.declared else Witness.BLOCKS


@cache
def _uwsgi_accounts() -> bool:
    """Found out once: mod_wsgi makes a new wrapper for each request, which no memory of wrappers would outlive."""
    return _uwsgi_sends_in_this_thread() and _meter() is not None


def _meter() -> ReadMeter | None:
    """``None`` after a change of user: the account is then root's (proc(5), PTRACE_MODE_READ)."""
    try:
        return ReadMeter()
    except (OSError, ValueError, IndexError):
        return None


def _uwsgi_sends_in_this_thread() -> bool:
    try:
        import uwsgi  # type: ignore[import-not-found,import-untyped,unused-ignore]  # exists only inside the server
    except ImportError:
        return False
    return not any(name in uwsgi.opt for name in ("offload-threads", "async", "gevent", "ugreen", "asyncio"))
