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


class Ending(Protocol):
    """What a counted body reports of itself. Nothing of it raises."""

    @property
    def mark(self) -> int:
        """The count at which :meth:`progress` is called first."""

    def progress(self, counted: int, held: int = 0) -> int:
        """The server has taken *counted* bytes, of which it holds *held*; returns the count of the next call."""

    def end(self, counted: int, offered: int) -> None:
        """The body is over: the server has written at least *counted* bytes of it, and was given *offered*."""

    def drop(self, counted: int, offered: int) -> None:
        """The same of a body that was neither closed nor read to its end."""


class CountedIterable:
    """Round an app's iterable: hands on the same chunks, and reports at its end how many bytes were taken.

    A body ends by ``close()``, by ``close()`` of its iterator (``yield from`` in an outer middleware), by its last
    chunk, or by being dropped. The app's own ``close()`` runs as often as it would without this object.
    """

    def __init__(self, body: Iterable[bytes], ending: Ending, size_of: Callable[[Any], int]) -> None:
        self._body = body
        self._size_of = size_of
        self._ending: Ending | None = ending
        self._chunks: Callable[[], object] | None = None
        self._sizes: Callable[[], tuple[int, int]] = _nothing

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
        ending, mark, size_of = self._ending, 0 if self._ending is None else self._ending.mark, self._size_of
        self._sizes = lambda: (taken, taken + size_of(chunk))
        try:
            for chunk in _once(iterator):
                yield chunk
                taken += len(chunk) if type(chunk) is bytes else size_of(chunk)
                if taken >= mark and ending is not None:
                    mark = ending.progress(taken)
        except GeneratorExit:
            raise
        except BaseException:
            # The app failed after the last one was sent. Its exception holds this frame, and nothing in it shall live on.
            chunk = b""
            self._finish()
            del self, iterator, ending
            raise
        chunk = b""
        self._finish()

    def close(self) -> None:
        """End the count, and close the app's body as the server would have."""
        self._close(self._body)

    def _close(self, own: Any) -> None:
        try:
            close = getattr(own, "close", None)
            if close is not None:
                close()
        finally:
            self._finish()

    def __del__(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.drop(*self._sizes())

    def _finish(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.end(*self._sizes())


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
    body: Iterable[bytes], ending: Ending, size_of: Callable[[Any], int] = size_of
) -> CountedIterable:
    """The counted form of *body*; *size_of* says how many bytes the server sends of a chunk."""
    return (CountedSequence if hasattr(body, "__len__") else CountedIterable)(body, ending, size_of)


def _nothing() -> tuple[int, int]:
    return 0, 0


def _once(iterator: Iterator[Any]) -> Iterator[Any]:
    """For a loop, *iterator* whose ``__iter__`` was called: a class in Python may have none, or one that does something."""
    kind = type(iterator)
    if type(getattr(kind, "__iter__", None)) is WrapperDescriptorType:
        return iterator  # made in C: it gives itself
    return iter(partial(kind.__next__, iterator), _NEVER)
