"""Counted iterables: a chunk counts as the server asks for the one after it, for one that failed was not sent.

Files that a server wraps itself (``wsgi.file_wrapper``) are counted in :mod:`.files`, so that sendfile stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Protocol

#: Bytes of an iterated body after which its progress is written down, for the case that the worker is killed.
PROGRESS_EVERY = 8 << 20
#: Seconds between two such lines at least: at a fast client's speed they would cost 6 % of its throughput.
PROGRESS_PAUSE = 0.5


class Ending(Protocol):
    """What a counted body tells of itself."""

    def progress(self, counted: int) -> None: ...

    def end(self, counted: int, *, declared: int = 0) -> None: ...


class CountedIterable:
    """Round an app's iterable: hands on the same chunks, and tells at close how many bytes were taken.

    A class with its own ``close()``, since a generator that was never started never closes; its ``__iter__`` hands
    out a generator, which costs a third of a ``__next__``.
    """

    def __init__(self, body: Iterable[bytes], ending: Ending) -> None:
        self._body = body
        self._counts: list[Callable[[], int]] = []
        self._ending: Ending | None = ending

    def __iter__(self) -> Iterator[bytes]:
        # A variable that close() sees through a closure costs less per chunk than an attribute.
        taken, told, quiet_until = 0, PROGRESS_EVERY, monotonic() + PROGRESS_PAUSE
        self._counts.append(lambda: taken)
        for chunk in self._body:
            yield chunk
            taken += len(chunk)
            if taken >= told:
                told = taken + PROGRESS_EVERY
                if monotonic() >= quiet_until:
                    quiet_until = monotonic() + PROGRESS_PAUSE
                    self._tell_progress()

    def _tell_progress(self) -> None:
        if self._ending is not None:
            self._ending.progress(self._taken())

    def _taken(self) -> int:
        return sum(count() for count in self._counts)

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
            self._finish(ending)

    def _finish(self, ending: Ending) -> None:
        ending.end(self._taken())


class CountedSequence(CountedIterable):
    """Round a list: servers that see one chunk in it give the answer a Content-Length (PEP 3333)."""

    def __iter__(self) -> Iterator[bytes]:
        if not self._counts:
            return super().__iter__()
        # gevent goes through it again to add up the lengths, before it sends the first chunk (gevent/pywsgi.py:835).
        return iter(self._body)

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class BegunLater:
    """Round a counted body whose app has not called ``start_response`` yet: *begin* is called at its first chunk."""

    def __init__(self, body: CountedIterable, begin: Callable[[], object]) -> None:
        self._body = body
        self._begin = begin
        self.close = body.close

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self._body)
        for chunk in chunks:
            self._begin()
            yield chunk
            yield from chunks
