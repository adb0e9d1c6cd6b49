"""Counts the body of one response, sent by ``write()``, an iterable or a wrapped file, and writes its close line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .body import BodyListener, counted_iterable, is_iterable, size_of, size_of_bytes
from .connection import uwsgi_server
from .files import FileOptions, counted_file
from .held import BufferedListener, ServerBuffer
from .recorder import ProxiedRecording, Recording
from .span import SentCount, Span

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

#: Bytes of a body after which a progress line is written, for the case that the worker is killed.
PROGRESS_EVERY = 8 << 20
#: Bytes of a body from which its span is measured; for a smaller one the measure at its end is enough.
MEASURE_FROM = (64 << 10) + 1
#: Least seconds between two progress lines: without it they would cost 6 % of a fast client's throughput.
PROGRESS_PAUSE = 0.5


class BodyCounter:
    """Counts one response that is a play. Never raises, except what the server's ``write()`` raises.

    *span* is its span of the connection, ``None`` if the kernel has no counters; *buffer* is the server's buffer,
    ``None`` if the server does not run ahead of the client.
    """

    __slots__ = (
        "_buffer",
        "_given",
        "_is_void",
        "_no_progress_before",
        "_recording",
        "_span",
        "_written",
        "progress_at",
    )

    def __init__(
        self, recording: Recording, span: Span | None = None, buffer: ServerBuffer | None = None
    ) -> None:
        self._recording = recording
        self._span = span
        self._buffer = buffer
        self._is_void = False
        #: Bytes passed to ``write()``, and those that it sent.
        self._given = 0
        self._written = 0
        self._no_progress_before = 0.0
        #: The count, in bytes, at which :meth:`progress` is called next.
        self.progress_at = PROGRESS_EVERY if span is None else MEASURE_FROM

    @property
    def play_id(self) -> str | None:
        """The play id for the proxy, ``None`` if no proxy counts it."""
        return self._recording.play_id if isinstance(self._recording, ProxiedRecording) else None

    @property
    def has_link(self) -> bool:
        """Whether the kernel has counters of the connection."""
        return self._span is not None

    def body(self, body: Any, environ: WSGIEnvironment, options: FileOptions) -> Any:
        """The counted form of *body*, which the app returned."""
        server = uwsgi_server()
        if isinstance(body, bytes) and (server is not None or "bjoern" in sys.modules):
            self.end_before_sent(len(body))  # these two send it directly and close nothing
            return body
        if type(body) is list and environ.get("SERVER_SOFTWARE") == "Granian":
            # Granian joins a list, sends it from Rust, and never closes it (granian/wsgi.py:59).
            size = sum(map(size_of, body))
            self.end(size, size)
            return body
        body, ends_itself = counted_file(body, environ, self._recording.opening, self, options)
        if ends_itself:
            return body
        if not is_iterable(body):
            self.end(0, 0)  # the server decides what to do with it
            return body
        listener: BodyListener = self if self._buffer is None else BufferedListener(self, self._buffer)
        sends_all = server is None or server.takes_buffers
        return counted_iterable(body, listener, size_of if sends_all else size_of_bytes)

    def write(self, write: Callable[[bytes], object], data: bytes) -> object:
        """Pass *data* to the server's *write*, and count it."""
        can_arrive = self._buffer is None or self._buffer.can_reach_client()
        size = size_of(data) if can_arrive else 0
        self._given += size
        answer = write(data)
        self._written += size
        if self._written >= self.progress_at:
            self.progress(0)
        return answer

    def void(self) -> None:
        """Another response is sent in place of this one: end it now with 0 bytes."""
        self._is_void = True
        if isinstance(self._recording, ProxiedRecording):
            self._recording.void()
        self.end(0, 0)

    def abandon(self) -> None:
        """The app raised an exception: only what ``write()`` sent before is counted."""
        if not self._given:
            self.void()
        if self._buffer is not None:
            self._buffer.end_when_sent(0, self)
        else:
            self.end(0, 0)

    # Called by bodies, see :class:`.body.BodyListener` and :class:`.files.FileListener`.

    def progress(self, counted: int, unsent: int = 0) -> int:
        """The server has accepted *counted* bytes and not sent *unsent* of them; returns the next call's count."""
        counted += self._written
        position = None if self._span is None else self._span.measure(counted)
        if counted >= PROGRESS_EVERY:
            # The connection's position does not include what the server has not sent, as the count does not.
            self._record_progress(counted - unsent, None if position is None else position - unsent)
            self.progress_at = counted + PROGRESS_EVERY
        else:
            # The first two measurements give the size of the head and of the framing.
            self.progress_at = counted + 1 if self.progress_at == MEASURE_FROM else PROGRESS_EVERY
        return self.progress_at - self._written

    def end(self, counted: int, offered: int) -> None:
        """The body has ended: the server has written at least *counted* bytes of it and was given *offered*."""
        counted, offered = max(self._written + counted, 0), max(self._given + offered, 0)
        if self._span is None or self._is_void:
            self._record_end(SentCount(counted))
        else:
            self._record_end(self._span.end(counted, offered))

    def drop(self, counted: int, offered: int) -> None:
        """The body was garbage-collected: bridges drop it once they have sent the Content-Length (asgiref/wsgi.py)."""
        self.end(offered if self._span is None else counted, offered)

    def end_file(self, counted: int, offered: int) -> None:
        """As :meth:`end`, for a file that the server sends itself."""
        if self._buffer is not None:
            self._buffer.file_ended()
        self.end(counted, offered)

    def end_before_sent(self, offered: int) -> None:
        """The server releases the body now and sends up to *offered* bytes afterwards."""
        offered += self._written
        self._record_end(SentCount(offered) if self._span is None else self._span.end_before_sent(offered))

    def end_declared(self, length: int) -> None:
        """*length* bytes are assumed to be sent (``T23_COUNT=declared``)."""
        self._record_end(SentCount(self._written + length), declared=1)

    def _record_progress(self, counted: int, position: int | None) -> None:
        now = time.monotonic()
        if self._is_void or now < self._no_progress_before:
            return
        self._no_progress_before = now + PROGRESS_PAUSE
        try:
            self._recording.progress(counted, position)
        except Exception:
            log_not_recorded()

    def _record_end(self, count: SentCount, declared: int = 0) -> None:
        try:
            self._recording.end(0 if self._is_void else count.sent, declared, count.position)
        except Exception:
            log_not_recorded()


class LateListener:
    """The listener of a body whose app has not called ``start_response`` yet.

    *counter* returns the real listener, ``None`` before that call. *over* is called if the body ends without the call.
    """

    progress_at = 1

    def __init__(self, counter: Callable[[], BodyCounter | None], over: Callable[[], object]) -> None:
        self._counter = counter
        self._over = over

    def progress(self, counted: int, unsent: int = 0) -> int:
        counter = self._counter()
        return counted + PROGRESS_EVERY if counter is None else counter.progress(counted, unsent)

    def end(self, counted: int, offered: int) -> None:
        if (counter := self._counter()) is not None:
            counter.end(counted, offered)
        else:
            self._over()

    def drop(self, counted: int, offered: int) -> None:
        if (counter := self._counter()) is not None:
            counter.drop(counted, offered)
        else:
            self._over()


def log_not_recorded() -> None:
    """Log the exception that is being handled, with its traceback."""
    log.exception(
        "a response could not be recorded; the app's response is not changed",
        extra={"t23_event": "not_recorded"},
    )
