"""Counted iterables: a chunk counts as the server asks for the one after it, for one that failed was not sent.

Files that a server sends itself (``wsgi.file_wrapper``) are counted in :mod:`.files`, so that sendfile stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from types import WrapperDescriptorType
from typing import Any, Protocol

_NEVER = object()


class BodyListener(Protocol):
    """What a counted body reports of itself. Nothing of it raises."""

    @property
    def progress_at(self) -> int:
        """The count at which :meth:`progress` is called first."""

    def progress(self, counted: int, unsent: int = 0) -> int:
        """The server has taken *counted* bytes, of which it holds *unsent*; returns the count of the next call."""

    def end(self, counted: int, offered: int) -> None:
        """The body is over: the server has written at least *counted* bytes of it, and was given *offered*."""

    def drop(self, counted: int, offered: int) -> None:
        """The same of a body that was neither closed nor read to its end."""


class CountedIterable:
    """Round an app's iterable: hands on the same chunks, and reports at its end how many bytes were taken.

    A body ends by ``close()``, by ``close()`` of its iterator (``yield from`` in an outer middleware), by its last
    chunk, or by being dropped. The app's own ``close()`` runs as often as it would without this object.
    """

    def __init__(self, body: Iterable[bytes], listener: BodyListener, size_of: Callable[[Any], int]) -> None:
        self._body = body
        self._size_of = size_of
        self._listener: BodyListener | None = listener
        self._chunks: Callable[[], object] | None = None
        self._sizes: Callable[[], tuple[int, int]] = _no_sizes

    def __iter__(self) -> Iterator[bytes]:
        iterator = iter(self._body)
        if self._chunks is not None and self._chunks() is not None:
            # gevent adds up a list's lengths in a second pass within the first, before it sends the first chunk
            # (pywsgi.py, ``finalize_headers``).
            return iterator
        chunks = _Chunks(self._count(iterator))
        chunks.closes = lambda: self._close(iterator)
        self._chunks = weakref.ref(chunks)
        return chunks

    def _count(self, iterator: Iterator[bytes]) -> Iterator[bytes]:
        # Variables that a closure sees cost less per chunk than attributes.
        # An outer middleware may have had a look at the first chunks.
        _, taken = self._sizes()
        chunk: Any = b""
        listener, progress_at, size_of = (
            self._listener,
            0 if self._listener is None else self._listener.progress_at,
            self._size_of,
        )
        self._sizes = lambda: (taken, taken + size_of(chunk))
        try:
            for chunk in _loop_over(iterator):
                yield chunk
                taken += len(chunk) if type(chunk) is bytes else size_of(chunk)
                if taken >= progress_at and listener is not None:
                    progress_at = listener.progress(taken)
        except GeneratorExit:
            raise
        except BaseException:
            # The app failed after the last one was sent. Its exception holds this frame, and nothing in it shall live on.
            chunk = b""
            self._end()
            del self, iterator, listener
            raise
        chunk = b""
        self._end()

    def close(self) -> None:
        """End the count, and close the app's body as the server would have."""
        self._close(self._body)

    def _close(self, own: Any) -> None:
        try:
            close = getattr(own, "close", None)
            if close is not None:
                close()
        finally:
            self._end()

    def __del__(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.drop(*self._sizes())

    def _end(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.end(*self._sizes())


class _Chunks(chain[bytes]):
    """The iterator of a counted body, which can be closed. A ``__next__`` in Python would cost three times as much."""

    closes: Callable[[], None]

    def close(self) -> None:
        self.closes()


class CountedSequence(CountedIterable):
    """Round a list: servers that see one chunk in it give the answer a Content-Length (PEP 3333)."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def is_iterable(body: Any) -> bool:
    """Whether a server can go through *body*."""
    return hasattr(type(body), "__iter__") or hasattr(type(body), "__getitem__")


def size_of(chunk: Any) -> int:
    """Bytes of what an app gives as a chunk, whatever its type; 0 where it can't be told."""
    try:
        return chunk.nbytes if type(chunk) is memoryview else memoryview(chunk).nbytes
    except TypeError:
        pass
    try:
        return len(chunk)
    except Exception:
        return 0


def size_of_bytes(chunk: Any) -> int:
    """The same where a server sends nothing but bytes, and drops other chunks without a word."""
    return len(chunk) if isinstance(chunk, bytes) else 0


def counted_iterable(
    body: Iterable[bytes], listener: BodyListener, size_of: Callable[[Any], int] = size_of
) -> CountedIterable:
    """The counted form of *body*; *size_of* says how many bytes the server sends of a chunk."""
    return (CountedSequence if hasattr(body, "__len__") else CountedIterable)(body, listener, size_of)


def _no_sizes() -> tuple[int, int]:
    return 0, 0


def _loop_over(iterator: Iterator[Any]) -> Iterator[Any]:
    """For a loop, *iterator* whose ``__iter__`` was called: a class in Python may have none, or one that does something."""
    kind = type(iterator)
    if type(getattr(kind, "__iter__", None)) is WrapperDescriptorType:
        return iterator  # made in C: it gives itself
    return iter(partial(kind.__next__, iterator), _NEVER)
