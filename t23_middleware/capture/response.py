"""One response between the app and the server: decides whether it is counted, and starts its count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from ..media import BYTERANGES, SEGMENT_ENDINGS, MediaTypes
from ..settings import Settings
from ..transfer import APP, OFFLOADED, PLAY_HEADER, PROXY
from .body import CountedIterable, counted_iterable, is_iterable
from .connection import has_own_connection, link_of
from .counter import BodyCounter, LateListener, log_not_recorded
from .files import FileOptions
from .held import BufferedListener, ServerBuffer, hides_disconnect, server_buffer_of
from .identity import Identifier, NotCounted
from .ranges import asked_first, asked_part, asks_several, part_of
from .recorder import Recorder
from .span import Span

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

#: Environ key while the app is called: a call of the app to itself is part of its response, and not counted again.
CALLING = "t23.calling"
#: Headers by which an app lets the proxy send a file: of nginx, Apache (and Flask's ``USE_X_SENDFILE``), lighttpd,
#: LiteSpeed and Perlbal.
OFFLOADING = frozenset(
    ("x-accel-redirect", "x-sendfile", "x-lighttpd-send-file", "x-litespeed-location", "x-reproxy-url")
)


class Capture:
    """The objects that all responses of one middleware share."""

    def __init__(self, settings: Settings, version: str) -> None:
        self.identifier = Identifier(settings)
        self.recorder = Recorder(settings, version)
        self.file_options = FileOptions(fast=settings.fast_files, declared=settings.count == "declared")
        self.counts_type = MediaTypes(settings.media_types).counts
        #: Whether a proxy's log has the bytes sent, so that the proxy needs the play id.
        self.has_proxy_log = bool(settings.proxy_log)
        self.counted_by = PROXY if settings.proxy_log else APP
        #: Whether the kernel's counters are read; a proxy's log is more exact.
        self.asks_kernel = settings.acked and not settings.proxy_log

    def count(self, name: str) -> None:
        """Count an event that is not a transfer."""
        self.recorder.this_process().journal.count(name)

    def wake(self) -> None:
        """A request arrived: start a relay if reports of an ended process wait. Never raises."""
        try:
            self.recorder.wake()
        except Exception:
            log.exception(
                "the state folder could not be checked; the app's response is not changed",
                extra={"t23_event": "look_failed"},
            )


class Response:
    """One response to a GET. Never raises on its own; exceptions of the app and the server pass through."""

    __slots__ = (
        "_capture",
        "_counted_by",
        "_counter",
        "_environ",
        "_fields",
        "_headers",
        "_buffer",
        "_is_decided",
        "_is_late",
        "_path",
        "_start",
        "_status",
    )

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse, capture: Capture) -> None:
        self._environ = environ
        path = environ.get("PATH_INFO")
        self._path = path if isinstance(path, str) else ""
        self._start = start_response
        self._capture = capture
        self._status: str | None = None
        self._headers: Iterable[Any] = ()
        #: Header values by name in lower case; empty if the request has no play.
        self._fields: Mapping[str, str] = {}
        #: What counts it; ``None`` if it is not counted.
        self._counted_by: str | None = None
        self._is_decided = False
        #: Whether the app calls ``start_response`` only with its first chunk (PEP 3333).
        self._is_late = False
        self._counter: BodyCounter | None = None
        #: The server's buffer, if the body needs it before the app calls ``start_response``.
        self._buffer: ServerBuffer | None = None

    # While the app runs.

    def start(
        self, status: str, headers: Any, exc_info: OptExcInfo | None = None
    ) -> Callable[[bytes], object]:
        """The ``start_response`` for the app (PEP 3333)."""
        if self._is_late:
            self._environ.pop(CALLING, None)
        if type(headers) is list:
            readable: Iterable[Any] = headers
        else:
            headers, readable = _read_twice(headers)
        try:
            if self._capture.has_proxy_log:
                write = self._start_with_play_id(status, headers, readable, exc_info)
            else:
                write = (
                    self._start(status, headers)
                    if exc_info is None
                    else self._start(status, headers, exc_info)
                )
                self._status = status if type(status) is str else _text_status(status)
                self._headers = readable
                self._counted_by = self._decide_counter()
        finally:
            exc_info = headers = None  # the traceback of an error in them may refer to this frame
        if self._counted_by is None:
            # The app replaces a media response by an error page.
            if self._counter is not None:
                self._counter.void()
            return write
        if self._is_late:
            self._begin()
        # Some servers have no write() (bjoern, granian, hypercorn); the app gets the same.
        return write if write is None else self._counting(write)

    def _start_with_play_id(
        self, status: str, headers: Any, readable: Iterable[Any], exc_info: OptExcInfo | None
    ) -> Callable[[bytes], object]:
        """As :meth:`start`, with the play id for the proxy: opens the count before the server gets the headers."""
        former = self._status, self._headers, self._counted_by
        self._status, self._headers = _text_status(status), readable
        self._counted_by = self._decide_counter()
        fails = type(headers) is GeneratorType  # from _failing(); the server may raise another error first
        counter = None if fails or self._counted_by is None else self._begin()
        if counter is not None and counter.play_id is not None:
            headers = [*headers, (PLAY_HEADER, counter.play_id)]
        try:
            return (
                self._start(status, headers) if exc_info is None else self._start(status, headers, exc_info)
            )
        except BaseException:
            self._status, self._headers, self._counted_by = former
            raise
        finally:
            exc_info = headers = None  # as above

    def abandon(self) -> None:
        """The app raised an exception: only what ``write()`` sent before is counted."""
        if self._counter is not None:
            self._counter.abandon()

    def _counting(self, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def counted_write(data: bytes) -> object:
            counter = self._begin()
            return write(data) if counter is None else counter.write(write, data)

        return counted_write

    # The body.

    def body(self, body: Any) -> Any:
        """The body for the server: counted if this is a play, else the object that the app returned."""
        try:
            return self._counted(body)
        except Exception:  # an attribute of the body raises; the server decides what to do with it
            log_not_recorded()
            if self._counter is not None:
                self._counter.end(0, 0)
            return body

    def _counted(self, body: Any) -> Any:
        if self._status is None:
            self._is_late = self._missing() is None and is_iterable(body)
            return self._counted_late(body) if self._is_late else body
        if self._counted_by is None:
            return body
        counter = self._begin()
        if counter is None:
            return body
        if self._counted_by == OFFLOADED:
            counter.end(0, 0)  # the proxy sends and counts the file
            return body
        return counter.body(body, self._environ, self._capture.file_options)

    def _counted_late(self, body: Iterable[bytes]) -> CountedIterable:
        self._environ[CALLING] = True
        listener = LateListener(lambda: self._counter, self._ended_without_start)
        self._buffer = server_buffer_of(self._environ)
        return counted_iterable(
            body, listener if self._buffer is None else BufferedListener(listener, self._buffer)
        )

    def _ended_without_start(self) -> None:
        """The body ended before ``start_response``: if ``close()`` calls that later, nothing is left to count."""
        self._environ.pop(CALLING, None)
        self._is_decided = True

    # The decision whether it is counted.

    def _begin(self) -> BodyCounter | None:
        """Write the open line, once and only if this is a play; returns the response's counter."""
        if not self._is_decided and self._status is not None:
            self._is_decided = True
            try:
                self._counter = self._record(self._status)
            except Exception:
                log_not_recorded()
        return self._counter

    def _missing(self) -> str | None:
        try:
            return self._capture.identifier.missing(self._environ, self._path)
        except Exception:  # the app or an outer middleware put something other than text into the environ
            return "no_session"

    def _record(self, status_line: str) -> BodyCounter | None:
        environ, capture, counted_by = self._environ, self._capture, self._counted_by
        if counted_by is None or environ.get("t23.ignore"):
            return None
        missing = None if self._fields else self._missing()
        if missing is not None:
            capture.count(missing)
            return None
        try:
            play = capture.identifier.identify(environ, self._path)
        except NotCounted as reason:
            capture.count(str(reason))
            return None
        process = capture.recorder.this_process()
        asked = environ.get("HTTP_RANGE")
        if counted_by == OFFLOADED:
            if not capture.has_proxy_log:
                process.count_now("offloaded")
                return None
            part, status = asked_part(asked)
            return BodyCounter(process.begin(play, part, status, None, OFFLOADED))
        if "HTTP_X_FORWARDED_FOR" in environ or "HTTP_VIA" in environ:
            process.count_once("behind_proxy")
        if hides_disconnect(self._start):
            process.count_once("leaving_unseen")
        status = int(status_line[:3])
        fields = self._fields or _fields(self._headers)
        length = _whole_number(fields.get("content-length"))
        content_range = fields.get("content-range")
        part = part_of(status, length, content_range, asked)
        wanted = asked_first(status, length, asked)
        buffer = self._buffer or server_buffer_of(environ)
        span = self._span(status_line, fields, length, buffer) if capture.asks_kernel else None
        connection = None if span is None else span.connection
        recording = process.begin(play, part, status, length, counted_by, wanted, connection)
        return BodyCounter(recording, span, buffer)

    def _span(
        self, status: str, fields: Mapping[str, str], length: int | None, buffer: ServerBuffer | None
    ) -> Span | None:
        """The response's span of its connection; ``None`` if the kernel has no counters of it."""
        if not has_own_connection(self._environ):
            return None
        link = link_of(self._environ, self._start) if buffer is None else buffer.link
        info = None if link is None else link.read_info()
        if link is None or info is None:
            return None
        # A server that runs ahead may have sent the head before.
        head = 0 if link.runs_ahead else _head_size(status, fields)
        connection = link.connection_at(info.position + head)
        if connection is None:
            return None
        return Span(link, info.position, connection, is_framed=length is None)

    def _decide_counter(self) -> str | None:
        """What counts this response; ``None`` if it is not media."""
        if self._missing() is None:
            self._fields = _fields(self._headers)
            if not OFFLOADING.isdisjoint(self._fields):
                return OFFLOADED if self._is_media_offloaded() else None
        status = self._status
        if not isinstance(status, str) or status[:3] not in ("200", "206"):
            return None
        fields = self._fields
        content_type = (
            fields.get("content-type") if fields else _header(self._headers, "content-type")
        ) or ""
        return self._capture.counted_by if self._capture.counts_type(content_type, self._path) else None

    def _is_media_offloaded(self) -> bool:
        """Whether the file that the proxy sends for the app may be media; only the proxy knows its type."""
        if asks_several(self._environ.get("HTTP_RANGE")):
            return self._capture.counts_type(BYTERANGES, self._path)
        return not self._path.endswith(SEGMENT_ENDINGS)


def _read_twice(headers: Any) -> tuple[Any, Iterable[Any]]:
    """*headers* for the server, and a copy for us: servers accept any iterable, which may be readable only once."""
    if type(headers) is tuple:
        return headers, headers
    items: list[Any] = []
    failed: Exception | None = None
    try:
        iterator = iter(headers)
    except Exception:
        return headers, ()  # the server decides what to do with them
    try:
        items += iterator
    except Exception as error:
        failed = error
    try:
        if iterator is not headers:
            return headers, items
        return (iter(items) if failed is None else _failing(items, failed)), items
    finally:
        failed = None  # its traceback refers to this frame


def _failing(items: list[Any], error: Exception) -> Iterator[Any]:
    yield from items
    try:
        raise error
    finally:
        del error


def _fields(headers: Iterable[Any]) -> dict[str, str]:
    """The first value of each header by its name in lower case; servers accept more types than PEP 3333 allows."""
    if type(headers) is list:
        try:
            fields: dict[str, str] = {name.lower(): value for name, value in reversed(headers)}
            "".join(fields.values())  # raises if one is not text
            return fields
        except Exception:
            pass
    return dict(reversed(list(_odd_pairs(headers))))


def _odd_pairs(headers: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for item in headers:
        try:
            name, value = item
            yield _text(name).lower(), _text(value)
        except Exception:  # the server has accepted them
            continue


def _header(headers: Iterable[Any], wanted: str) -> str | None:
    try:
        for name, value in headers:
            if name.lower() == wanted:
                return value if type(value) is str else _text(value)
    except Exception:
        return _fields(headers).get(wanted)
    return None


def _head_size(status: str, fields: Mapping[str, str]) -> int:
    """Bytes of the status line and the headers, without those that the server adds."""
    text = "".join((status, *fields, *fields.values()))
    return len("HTTP/1.1 \r\n\r\n") + len(text) + len(": \r\n") * len(fields)


def _text_status(status: Any) -> Any:
    """The status as text; werkzeug's server also accepts bytes."""
    return _text(status) if isinstance(status, bytes) else status


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return bytes(value).decode("latin-1") if isinstance(value, (bytes, bytearray)) else str(value)


def _whole_number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
