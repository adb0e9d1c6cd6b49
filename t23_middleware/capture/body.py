"""Counted iterables: a chunk is counted when the server requests the next one, because only then it was sent.

Files that a server sends itself (``wsgi.file_wrapper``) are counted in :mod:`.files`, so that sendfile still works.
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
    """Receives the counts of a body. Its methods never raise."""

    @property
    def progress_at(self) -> int:
        """The count, in bytes, at which :meth:`progress` is called first."""

    def progress(self, counted: int, unsent: int = 0) -> int:
        """The server has accepted *counted* bytes and not sent *unsent* of them; returns the next call's count."""

    def end(self, counted: int, offered: int) -> None:
        """The body has ended: the server has written at least *counted* bytes of it and was given *offered*."""

    def drop(self, counted: int, offered: int) -> None:
        """As :meth:`end`, for a body that was neither closed nor read to its end."""


class CountedIterable:
    """Wraps an app's iterable: yields the same chunks, and reports the bytes to *listener*.

    *size_of* returns the bytes of a chunk. A body ends by ``close()``, by ``close()`` of its iterator (``yield from``
    in an outer middleware), by its last chunk, or by garbage collection. The app's own ``close()`` runs as often as it
    would without this object.
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
            # gevent reads a list's lengths in a second pass during the first, before it sends the first chunk
            # (pywsgi.py, ``finalize_headers``).
            return iterator
        chunks = _Chunks(self._count(iterator))
        chunks.closes = lambda: self._close(iterator)
        self._chunks = weakref.ref(chunks)
        return chunks

    def _count(self, iterator: Iterator[bytes]) -> Iterator[bytes]:
        # Variables that a closure sees cost less per chunk than attributes.
        # An outer middleware may have iterated over the first chunks before.
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
            # The app failed after the last chunk was sent. Its exception refers to this frame: keep nothing in it.
            chunk = b""
            self._end()
            del self, iterator, listener
            raise
        chunk = b""
        self._end()

    def close(self) -> None:
        """Close the app's body as the server would, and end the count."""
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
    """The iterator of a counted body, with a ``close()``. A ``__next__`` in Python would take three times as long."""

    closes: Callable[[], None]

    def close(self) -> None:
        self.closes()


class CountedSequence(CountedIterable):
    """Wraps a list: servers add a Content-Length if it has one chunk (PEP 3333)."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


def is_iterable(body: Any) -> bool:
    """Whether a server can iterate over *body*."""
    return hasattr(type(body), "__iter__") or hasattr(type(body), "__getitem__")


def size_of(chunk: Any) -> int:
    """Bytes of a chunk of any type; 0 if unknown."""
    try:
        return chunk.nbytes if type(chunk) is memoryview else memoryview(chunk).nbytes
    except TypeError:
        pass
    try:
        return len(chunk)
    except Exception:
        return 0


def size_of_bytes(chunk: Any) -> int:
    """Bytes of a chunk for servers that send only ``bytes`` and silently drop chunks of other types."""
    return len(chunk) if isinstance(chunk, bytes) else 0


def counted_iterable(
    body: Iterable[bytes], listener: BodyListener, size_of: Callable[[Any], int] = size_of
) -> CountedIterable:
    """The counted form of *body*; *size_of* returns how many bytes of a chunk the server sends."""
    return (CountedSequence if hasattr(body, "__len__") else CountedIterable)(body, listener, size_of)


def _no_sizes() -> tuple[int, int]:
    return 0, 0


def _loop_over(iterator: Iterator[Any]) -> Iterator[Any]:
    """*iterator* for a loop, without a second call of its ``__iter__``: the app's may be missing or have effects."""
    kind = type(iterator)
    if type(getattr(kind, "__iter__", None)) is WrapperDescriptorType:
        return iterator  # its __iter__ is written in C and returns itself
    return iter(partial(kind.__next__, iterator), _NEVER)
