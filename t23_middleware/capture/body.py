"""Counted bodies: one way for each way in which a server takes a body.

- an iterable: counted as the server asks for the chunk after it, for the one that failed was not sent;
- the server's own wrapper of a file (``wsgi.file_wrapper``): returned untouched, so that sendfile stays, round a
  file whose position tells what was sent;
- ``write()``: counted when it returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

#: Bytes of a block where we read a file for a server that can't be left to it.
BLOCK = 1 << 16


class Ending(Protocol):
    """What a counted body tells when it is over."""

    def end(self, counted: int) -> None: ...


class CountedIterable:
    """Round an app's iterable: hands on the same chunks, and tells at close how many bytes were taken.

    A class with its own ``close()``, since a generator that was never started never closes; its ``__iter__`` hands
    out a generator, which costs a third of a ``__next__``.
    """

    def __init__(self, body: Iterable[bytes], ending: Ending) -> None:
        self._body = body
        self._taken = 0
        self._ending: Ending | None = ending

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            yield chunk
            self._taken += len(chunk)

    def close(self) -> None:
        """End the count, and close the app's body as the server would have."""
        ending, self._ending = self._ending, None
        if ending is None:
            return
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            ending.end(self._taken)


class CountedSequence(CountedIterable):
    """Round a list: servers that see one chunk in it give the answer a Content-Length (PEP 3333)."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class CountedLater(CountedIterable):
    """Round the body of an app that has not called ``start_response`` yet: *begin* is called at its first chunk."""

    def __init__(self, body: Iterable[bytes], ending: Ending, begin: Callable[[], object]) -> None:
        super().__init__(body, ending)
        self._begin = begin

    def __iter__(self) -> Iterator[bytes]:
        chunks = super().__iter__()
        for chunk in chunks:
            self._begin()
            yield chunk
            yield from chunks


class PositionedFile:
    """A file that keeps its own position, for a server that wraps it.

    The descriptor's own position is no witness: gunicorn sets it back after sendfile (gunicorn/http/wsgi.py,
    ``sendfile``). Before that ``socket.sendfile`` seeks the file to what it sent, also when it fails.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._position = 0
        self._armed_at = 0
        self._ending: Ending | None = None
        self._meter: ReadMeter | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def read(self, *size: int) -> Any:
        data = self._file.read(*size)
        self._position += len(data)
        return data

    def seek(self, *place: int) -> Any:
        answer = self._file.seek(*place)
        self._position = self._file.tell()
        return answer

    def arm(self, ending: Ending, meter: ReadMeter | None) -> None:
        """Count from here, where the app is done with the file and the server begins."""
        self._ending = ending
        self._armed_at = self._position = self._place()
        self._meter = meter

    def _place(self) -> int:
        """Where the file stands; what cannot tell (a pipe) is counted from 0."""
        try:
            return int(self._file.tell())
        except (AttributeError, OSError, ValueError):
            return 0

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
                ending.end(sent)

    def _sent(self) -> int:
        moved = self._position - self._armed_at
        if moved == 0 and self._meter is not None:
            return self._meter.read_since()
        return max(moved, 0)


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

    def __init__(self, file: Any, size: int = BLOCK) -> None:
        self._file = file
        self._size = max(size, BLOCK)
        for name in ("seekable", "seek", "tell"):
            if hasattr(file, name):
                setattr(self, name, getattr(file, name))

    def __iter__(self) -> Blocks:
        return self

    def __next__(self) -> bytes:
        data = self._file.read(self._size)
        if not data:
            raise StopIteration
        return data  # type: ignore[no-any-return]

    def close(self) -> None:
        close = getattr(self._file, "close", None)
        if close is not None:
            close()


class Witness(Enum):
    """What tells how much of a wrapped file a server sent."""

    #: The file's position: the server reads or seeks it in Python (gunicorn, waitress, wsgiref).
    POSITION = "position"
    #: The thread's account: the server sends the descriptor from C, in the request's own thread (uWSGI).
    ACCOUNT = "account"
    #: Nothing: the server sends the descriptor from C and leaves no trace (bjoern, mod_wsgi), so we hand out blocks.
    BLOCKS = "blocks"


class LentWrapper:
    """Stands in for the server's ``wsgi.file_wrapper`` during one request and remembers what it wrapped.

    Servers recognise their own wrapper (by ``isinstance`` or identity), so what this makes is the server's, round a
    :class:`PositionedFile`.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self._witness = witness_of(original)
        self._made: list[tuple[Any, PositionedFile]] = []

    def __call__(self, file: Any, *block_size: int, **named: int) -> Any:
        if self._witness is Witness.BLOCKS:
            return Blocks(file, *block_size, *named.values())
        positioned = PositionedFile(file)
        body = self.original(positioned, *block_size, **named)
        self._made.append((body, positioned))
        return body

    def __instancecheck__(self, body: object) -> bool:
        return isinstance(body, Blocks) or any(body is made for made, _ in self._made)

    def arm(self, body: object, ending: Ending) -> bool:
        """Count the file inside *body*, if *body* is what the server's wrapper made here; whether it was.

        By identity: an inner middleware or werkzeug's Range may have wrapped it, and then its iterator counts.
        """
        file = next((file for made, file in self._made if made is body), None)
        if file is None:
            return False
        meter = _meter() if self._witness is Witness.ACCOUNT else None
        if meter is None and self._witness is Witness.ACCOUNT:
            return False
        file.arm(ending, meter)
        return True


def witness_of(wrapper: Any) -> Witness:
    """What tells how much *wrapper* sent."""
    if isinstance(wrapper, type):
        # gunicorn's wrapper has no __next__ before version 24, only the __getitem__ of old sequences.
        reads = getattr(wrapper, "__next__", None) or getattr(wrapper, "__getitem__", None)
        return Witness.POSITION if isinstance(reads, FunctionType) else Witness.BLOCKS
    return Witness.ACCOUNT if _uwsgi_accounts() else Witness.BLOCKS


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
