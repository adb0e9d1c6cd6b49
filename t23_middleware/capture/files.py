"""Counts files that a server sends itself (``wsgi.file_wrapper``), so that it can still use sendfile.

The app gets the server's own wrapper. After the app has returned it, the wrapper stays the body, and the file inside it
is replaced by one that tracks its position.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..transfer import Opening
from .body import size_of
from .connection import UwsgiServer, uwsgi_server

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: Bytes of a block if this module decides how a file is read: frameworks and servers read 4 to 8 KiB.
BLOCK = 1 << 16
#: Attributes with the block size: of gunicorn's and wsgiref's wrapper, and of werkzeug's.
_BLOCK_SIZES = ("blksize", "buffer_size")
#: Types of bodies that never contain a file that a server sends itself.
_NO_FILES = (list, tuple, GeneratorType)
#: Modules of the wrappers with one of these attributes.
_WRAPPERS = ("gunicorn.http.wsgi", "wsgiref.util", "werkzeug.wsgi")


class FileListener(Protocol):
    """Receives the counts of a file. Its methods never raise."""

    @property
    def progress_at(self) -> int:
        """The count, in bytes, at which :meth:`progress` is called first."""

    @property
    def has_link(self) -> bool:
        """Whether the kernel has counters of the connection."""

    def progress(self, counted: int, unsent: int = 0) -> int:
        """As :meth:`.body.BodyListener.progress`."""

    def end_file(self, counted: int, offered: int) -> None:
        """The file has ended: the server has sent at least *counted* bytes and was given *offered*."""

    def end_before_sent(self, offered: int) -> None:
        """The server releases the file now and sends up to *offered* bytes afterwards."""

    def end_declared(self, length: int) -> None:
        """*length* bytes are assumed to be sent."""


class FileOptions(NamedTuple):
    """The operator's settings for files."""

    #: ``T23_FAST_FILES``.
    fast: bool = True
    #: ``T23_COUNT=declared``.
    declared: bool = False


def counted_file(
    body: Any, environ: WSGIEnvironment, opening: Opening, listener: FileListener, options: FileOptions
) -> tuple[Any, bool]:
    """The counted form of *body*, and whether it reports its own end; if not, the caller wraps it as an iterable."""
    if type(body) in _NO_FILES:
        return body, False
    wrapper: Any = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and _is_in_python(wrapper):
        ranged = _wrapper_in_range(body, opening) if options.fast and opening.status == 206 else None
        if isinstance(ranged, wrapper):
            if _count_inside(ranged, opening, listener, options, in_range=True):
                return ranged, True
            _make_range_seekable(body, ranged)
        elif isinstance(body, wrapper) and _count_inside(body, opening, listener, options):
            return body, True
    elif wrapper is not None:
        if (server := uwsgi_server()) is not None and hasattr(body, "read"):
            return _counted_by_uwsgi(body, server, opening, listener, options)
        if isinstance(wrapper, type) and isinstance(body, wrapper):
            return _counted_in_c(body, opening, listener, options)
    _read_larger_blocks(body, opening, options)
    return body, False


# Servers whose wrapper is a class in Python: gunicorn, waitress, wsgiref.


class PositionedFile:
    """A file inside a server's wrapper that tracks its own position.

    The descriptor's position can't be used: gunicorn resets it after sendfile (gunicorn/http/wsgi.py, ``sendfile``).
    Before that, ``socket.sendfile`` seeks the file to the end of what it sent, also when it fails. *offered* is how
    many bytes the server was given, ``None`` if unknown; *stop* is the offset at which the file ends for the server,
    ``None`` for its real end.
    """

    def __init__(
        self, file: Any, listener: FileListener, offered: int | None, stop: int | None, *, seeks_back: bool
    ) -> None:
        self._file = file
        self._listener: FileListener | None = listener
        self._offered = offered
        self._stop = stop
        #: waitress reads a block, seeks back, and reads again as much as it sent.
        self._seeks_back = seeks_back
        self._start = self._position = _position_of(file)
        #: Whether waitress has read it; before that it seeks to the end, for the size, and may fail there.
        self._was_read = not seeks_back
        #: The position at the server's last read: all before it has been sent.
        self._taken: int | None = None
        self._progress_at = listener.progress_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def read(self, *size: int) -> Any:
        if not self._seeks_back:
            self._taken = self._position
            if self._listener is not None and self._position - self._start >= self._progress_at:
                self._progress_at = self._listener.progress(self._position - self._start)
        self._was_read = True
        data = self._file.read(*size) if self._stop is None else self._read_in_range(*size)
        # These servers reject text.
        self._position += 0 if isinstance(data, str) else size_of(data)
        return data

    def _read_in_range(self, size: int | None = -1) -> Any:
        """Stop at the range's end: gunicorn with ``--no-sendfile`` or TLS reads up to the end of the file."""
        left = max((self._stop or 0) - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._file.read(wanted)
        if wanted and not data and self._seeks_back:
            # waitress would read the missing rest in an endless loop (waitress/channel.py, ``_flush_some``).
            raise OSError("the file became shorter while it was sent")
        return data

    def seek(self, *place: int) -> Any:
        # ``socket.sendfile`` calls this with what it sent, also if the file is not seekable.
        if len(place) == 1 and type(place[0]) is int:
            self._position = place[0]
        answer = self._file.seek(*place) if hasattr(self._file, "seek") else self._position
        if len(place) > 1:
            self._position = _position_of(self._file)
        return answer

    def close(self) -> None:
        """Close the file and end the count. waitress calls this twice when a client disconnects."""
        try:
            close = getattr(self._file, "close", None)
            if close is not None:
                close()
        finally:
            self.finish()

    def __del__(self) -> None:
        if getattr(self, "_listener", None) is not None:
            self._offered = None  # released without a close(): only what was read was sent
            self.finish()

    def finish(self) -> None:
        """End the count; only the first call does."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        moved = max(self._position - self._start, 0) if self._was_read else 0
        if self._taken is not None and listener.has_link:
            # Only the kernel knows how much of the last block was sent.
            listener.end_file(self._taken - self._start, moved)
        elif self._taken is not None:
            listener.end_file(moved, moved)
        else:
            listener.end_file(moved, max(self._offered or moved, moved))


@lru_cache(maxsize=16)
def _is_in_python(wrapper: type) -> bool:
    """Whether the wrapper is written in Python; before version 24 gunicorn's has ``__getitem__``, not ``__next__``."""
    reads = getattr(wrapper, "__next__", None) or getattr(wrapper, "__getitem__", None)
    return isinstance(reads, FunctionType)


def _count_inside(
    body: Any, opening: Opening, listener: FileListener, options: FileOptions, *, in_range: bool = False
) -> bool:
    """Replace the file inside the server's wrapper *body*; returns whether that worked."""
    stop = None
    try:
        name = "filelike" if hasattr(body, "filelike") else "file"
        file = getattr(body, name, None)
        if file is None or type(file) is PositionedFile:
            return False  # a PositionedFile is already counted by another of our middlewares
        seeks_back = hasattr(body, "prepare")
        if seeks_back and not hasattr(file, "seek"):
            return False  # waitress reads it like any iterable
        if in_range:
            first, length = opening.part.first or 0, opening.length or 0
            stop = first + length
            if not _seek_to(file, first):
                return False
        offered = _bytes_left(file) if opening.length is None else opening.length
        own = vars(body).get("close")
        has_close = hasattr(body, "close")
        counted = PositionedFile(file, listener, offered, stop, seeks_back=seeks_back)
        setattr(body, name, counted)
        # gunicorn's and wsgiref's wrapper copy the file's close when they are created, and may have none.
        if own is not None and own != getattr(file, "close", None):
            _after_close(body, counted.finish)  # the app has replaced it
        elif own is not None or not has_close:
            body.close = counted.close
    except Exception:  # the app's own file may raise where the server would not have called it
        return False
    _read_larger_blocks(body, opening, options)
    return True


def _wrapper_in_range(body: Any, opening: Opening) -> Any:
    """The wrapper inside werkzeug's Range *body*, if unread and sending exactly the bytes of *opening*; else ``None``.

    Players always send a Range, and werkzeug then reads 8 KiB blocks in Python, also if the server has sendfile. Its
    class is private (werkzeug/wsgi.py, ``_RangeWrapper``): if its attributes change, the body is sent as the app does.
    """
    kind = getattr(sys.modules.get("werkzeug.wsgi"), "_RangeWrapper", None)
    if kind is None or type(body) is not kind:
        return None
    state = [getattr(body, name, None) for name in ("start_byte", "byte_range", "read_length", "end_reached")]
    if opening.part.size != opening.length or state != [opening.part.first, opening.length, 0, False]:
        return None
    inner = getattr(body, "iterable", None)
    if type(inner) is _SEQUENCE_ITERATOR:  # gunicorn's wrapper before version 24
        inner = inner.__reduce__()[1][0]
    return inner


class _Sequence:
    def __getitem__(self, index: int) -> int:
        raise IndexError


_SEQUENCE_ITERATOR = type(iter(_Sequence()))


def _seek_to(file: Any, start: int) -> bool:
    """Seek *file* to *start*; returns whether that worked.

    Accepts only an unread plain file on disk: a GzipFile's descriptor is that of the compressed file, and after a read
    the descriptor's position and ``tell()`` differ.
    """
    raw = file.raw if type(file) is io.BufferedReader else file
    if type(raw) is not io.FileIO or not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return False
    if file.tell() != 0 or os.lseek(raw.fileno(), 0, os.SEEK_CUR) != 0:
        return False
    file.seek(start)
    if os.lseek(raw.fileno(), 0, os.SEEK_CUR) != start:
        file.seek(0)
        return False
    return True


def _make_range_seekable(body: Any, inner: Any) -> None:
    """Make the server's wrapper seekable, or werkzeug's Range reads and discards all bytes before its start.

    It seeks from the file's start but discards from the current position, so this is done only for a file at 0.
    """
    file: Any = getattr(inner, "filelike", None)
    try:
        if body.iterable is inner and file.seekable() and file.tell() == 0:
            file.seek(0)  # some files are not seekable, though seekable() is true
            inner.seek, inner.tell = file.seek, file.tell
            body.seekable = True
    except Exception:  # the app's own file may raise where the server would not have called it
        return


def _read_larger_blocks(body: Any, opening: Opening, options: FileOptions) -> None:
    """Increase the block size of a wrapper of gunicorn, wsgiref or werkzeug, also inside werkzeug's Range.

    Not for files that are not seekable: reading a larger block of a live pipe would wait longer.
    """
    if not options.fast or opening.length is None:
        return
    try:
        for wrapper in (body, getattr(body, "iterable", None)):
            if type(wrapper).__module__ not in _WRAPPERS:
                continue
            file: Any = getattr(wrapper, "filelike", None) or getattr(wrapper, "file", None)
            for name in _BLOCK_SIZES:
                size = getattr(wrapper, name, None)
                if type(size) is int and size < BLOCK and file.seekable():
                    setattr(wrapper, name, BLOCK)
    except Exception:  # the app's own file may raise where the server would not have called it
        return


def _position_of(file: Any) -> int:
    """The file's position; 0 if it has none (a pipe)."""
    try:
        return int(file.tell())
    except Exception:
        pass
    try:
        return os.lseek(file.fileno(), 0, os.SEEK_CUR)  # gunicorn sends from this position
    except Exception:
        return 0


def _bytes_left(file: Any) -> int | None:
    """Bytes between the file's position and its end; ``None`` if it is not a file on disk."""
    try:
        return max(int(os.fstat(file.fileno()).st_size - file.tell()), 0)
    except Exception:
        return None


# uWSGI: its wrapper is a function in C that returns the same file; uWSGI sends it from position 0
# (plugins/python/wsgi_subhandler.c).


def _counted_by_uwsgi(
    file: Any, server: UwsgiServer, opening: Opening, listener: FileListener, options: FileOptions
) -> tuple[Any, bool]:
    offered = _size_on_disk(file) if opening.length is None else opening.length
    if not server.sends_in_this_thread:
        if listener.has_link and offered is not None:
            listener.end_before_sent(offered)
            return file, True
        return _counted_in_c(file, opening, listener, options)
    meter = None if listener.has_link else _meter()
    if meter is None and not listener.has_link:
        return _counted_in_c(file, opening, listener, options)

    def end() -> None:
        taken = 0 if meter is None else meter.read_since()
        listener.end_file(taken, taken if meter is not None else max(offered or 0, taken))

    return file, _after_close(file, end)


def _after_close(file: Any, then: Callable[[], object]) -> bool:
    """Call *then* after each ``close()`` of *file*; returns whether its ``close`` can be replaced."""
    try:
        close = file.close

        def closed() -> None:
            try:
                close()
            finally:
                then()

        file.close = closed
    except (AttributeError, TypeError):
        return False
    return True


class ReadMeter:
    """Counts the bytes that this thread reads from now on, from Linux's own counter, which includes sendfile(2).

    The only measure of uWSGI's sendfile if the kernel has no counters of the connection, as on a UNIX socket.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        text = _thread_io()
        # The kernel also counts our own reads of this file.
        self._start = _rchar(text) + len(text)

    def read_since(self) -> int:
        """Bytes read by this thread since then; 0 in another thread, or if the counter can't be read."""
        if threading.get_ident() != self._thread:
            return 0
        try:
            return max(_rchar(_thread_io()) - self._start, 0)
        except OSError:
            return 0


def _meter() -> ReadMeter | None:
    """``None`` after a change of user: the counter then belongs to root (proc(5), PTRACE_MODE_READ)."""
    try:
        return ReadMeter()
    except (OSError, ValueError, IndexError):
        return None


def _thread_io() -> bytes:
    with Path("/proc/thread-self/io").open("rb", buffering=0) as counters:
        return counters.read(512)


def _rchar(text: bytes) -> int:
    return int(text.split(None, 2)[1])


def _size_on_disk(file: Any) -> int | None:
    try:
        return int(os.fstat(file.fileno()).st_size)
    except Exception:
        return None


# Servers that send a file from C without a count: bjoern, mod_wsgi, uWSGI if it sends in another thread.


def _counted_in_c(
    body: Any, opening: Opening, listener: FileListener, options: FileOptions
) -> tuple[Any, bool]:
    """Sent by the server with the declared length (``T23_COUNT=declared``), or as an iterable of blocks.

    Without a Content-Length the server sends the file itself: mod_wsgi adds the file's length, but only for its own
    wrapper (wsgi_adapter.c:1236); bjoern truncates such a file.
    """
    file = _file_in_c(body)
    if opening.length is not None and not options.declared:
        return (body if file is None else Blocks(file, body)), False
    length = _bytes_left(file) if opening.length is None else opening.length
    if length is None:
        return body, False
    if not _after_close(file, lambda: listener.end_declared(length)):
        listener.end_declared(length)
    return body, True


def _file_in_c(body: Any) -> Any:
    """The file in a wrapper: mod_wsgi has it as an attribute, bjoern as the iterator, uWSGI as the body itself."""
    try:
        file = getattr(body, "filelike", None) or (body if hasattr(body, "read") else iter(body))
    except Exception:
        return None
    return file if hasattr(file, "read") else None


class Blocks:
    """An iterable in Python over a file, for servers whose own wrapper does not show what it sent.

    It has no ``read()``: without ``fileno()`` uWSGI would loop over ``read()`` and ignore a failed write
    (wsgi_subhandler.c:95-127).
    """

    def __init__(self, file: Any, body: Any) -> None:
        self._file = file
        if hasattr(body, "close"):
            self.close = body.close

    def __iter__(self) -> Blocks:
        return self

    def __next__(self) -> bytes:
        data = self._file.read(BLOCK)
        if not data:
            raise StopIteration
        return data  # type: ignore[no-any-return]
