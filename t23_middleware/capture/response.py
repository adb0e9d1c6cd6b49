"""One response on its way from the app to the server: what was said of it, and whether it is counted."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..media import SEGMENT_ENDINGS, MediaTypes
from ..settings import Settings
from ..transfer import APP, OFFLOADED, PLAY_HEADER, PROXY, Opening
from .body import CountedIterable, counted_iterable, size_of, size_of_bytes
from .connection import has_own_connection, link_of, uwsgi_server
from .files import FileWay, counted_file
from .held import HeldEnding, Holder, hides_leaving, holder_of
from .identity import Identifier, NotCounted
from .ranges import asked_part, part_of
from .recorder import NamedRecording, Recorder, Recording
from .span import Count, Span

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

#: In the environ while the app is asked: a call that it makes to itself is part of its answer, and is not counted again.
CALLING = "t23.calling"
#: Bytes of a body after which its progress is written down, for the case that the worker is killed.
PROGRESS_EVERY = 8 << 20
#: Seconds between two such lines at least: at a fast client's speed they would cost 6 % of its throughput.
PROGRESS_PAUSE = 0.5
#: Headers by which an app leaves a file to the proxy: nginx's, Apache's (and Flask's ``USE_X_SENDFILE``), lighttpd's,
#: LiteSpeed's and Perlbal's.
OFFLOADING = frozenset(
    ("x-accel-redirect", "x-sendfile", "x-lighttpd-send-file", "x-litespeed-location", "x-reproxy-url")
)


class Capture:
    """What all responses of one middleware share: whom to count, and where to write it."""

    def __init__(self, settings: Settings, version: str) -> None:
        self.identifier = Identifier(settings)
        self.recorder = Recorder(settings, version)
        self.file_way = FileWay(fast=settings.fast_files, declared=settings.count == "declared")
        self.counts_type = MediaTypes(settings.media_types).counts
        #: Whether a proxy's log says what was sent, so that it must be told the play's name.
        self.has_proxy_log = bool(settings.proxy_log)
        self.counted_by = PROXY if settings.proxy_log else APP
        #: Whether the kernel is asked what the client took; a proxy's log knows better.
        self.asks_kernel = settings.acked and not settings.proxy_log

    def count(self, name: str) -> None:
        """Count an event that is no transfer."""
        self.recorder.this_process().journal.count(name)

    def wake(self) -> None:
        """A request came: reports that a dead process left may wait for a relay. Never raises."""
        try:
            self.recorder.this_process().launcher.wake()
        except Exception:
            log.exception(
                "the state folder could not be looked at; the app's answer is not touched",
                extra={"t23_event": "look_failed"},
            )


class Response:
    """One response to a GET. Nothing in it raises but what the app or the server raised."""

    __slots__ = (
        "_capture",
        "_counted_by",
        "_decided",
        "_environ",
        "_given",
        "_headers",
        "_holder",
        "_is_late",
        "_mark",
        "_path",
        "_quiet_until",
        "_recording",
        "_span",
        "_start",
        "_status",
        "_void",
        "_written",
    )

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse, capture: Capture) -> None:
        self._environ = environ
        path = environ.get("PATH_INFO")
        self._path = path if isinstance(path, str) else ""
        self._start = start_response
        self._capture = capture
        self._status: str | None = None
        self._headers: Iterable[Any] = ()
        #: Who counts it; ``None`` for what is not counted.
        self._counted_by: str | None = None
        self._decided = False
        #: The app calls ``start_response`` as late as its first chunk (PEP 3333).
        self._is_late = False
        #: Bytes that ``write()`` was given, and those that it sent.
        self._given = 0
        self._written = 0
        self._mark = 1
        self._quiet_until = 0.0
        self._recording: Recording | None = None
        self._span: Span | None = None
        self._void = False
        self._holder: Holder | None = None

    # What happens while the app runs.

    def start(
        self, status: str, headers: Any, exc_info: OptExcInfo | None = None
    ) -> Callable[[bytes], object]:
        """``start_response`` as the app sees it (PEP 3333)."""
        if self._is_late:
            self._environ.pop(CALLING, None)
        said = _text(status) if isinstance(status, bytes) else status  # werkzeug's server takes bytes
        headers, self_headers = _twice(headers)
        former = self._status, self._headers, self._counted_by
        if self._capture.has_proxy_log:
            # The proxy reads the play's name from the headers, so it is decided before the server has them.
            self._status, self._headers = said, self_headers
            self._counted_by = self._who_counts()
            headers = self._named(headers)
        try:
            write = (
                self._start(status, headers) if exc_info is None else self._start(status, headers, exc_info)
            )
        except BaseException:
            self._status, self._headers, self._counted_by = former
            raise
        finally:
            exc_info = None  # its traceback may hold this frame: a circle that would keep the app's objects
        if not self._capture.has_proxy_log:
            self._status, self._headers = said, self_headers
            self._counted_by = self._who_counts()
        if self._counted_by is None:
            # An error page in place of media that was under way: what goes out now is not the video.
            if self._recording is not None:
                self._set_void(self._recording)
            return write
        if self._is_late:
            self._begin()
        # Some servers have no write() (bjoern, granian, hypercorn); then the app shall see that too.
        return write if write is None else self._counting(write)

    def _named(self, headers: Any) -> Any:
        """*headers* with the play's name for the proxy."""
        if self._counted_by is None or not self._begin() or not isinstance(self._recording, NamedRecording):
            return headers
        return [*headers, (PLAY_HEADER, self._recording.play_id)]

    def _set_void(self, recording: Recording) -> None:
        """What was opened is not what goes out, so that nobody need wait for its end."""
        self._void = True
        if isinstance(recording, NamedRecording):
            recording.void()
        self.end(0, 0)

    def abandon(self) -> None:
        """The app raised: what ``write()`` sent before is all there was."""
        if self._recording is not None and not self._given:
            self._set_void(self._recording)
        if self._holder is not None:
            self._holder.finish(0, self)
        else:
            self.end(0, 0)

    # What happens to its body.

    def body(self, body: Any) -> Any:
        """The body for the server: counted where this is a play, else the very object that the app returned."""
        try:
            return self._counted(body)
        except Exception:  # a body that fails where it is asked for an attribute; for the server to judge
            _say_not_recorded()
            self.end(0, 0)
            return body

    def _counted(self, body: Any) -> Any:
        if self._status is None:
            self._is_late = True
            if self._missing() is not None or not _is_iterable(body):
                return body
            self._environ[CALLING] = True
            return self._iterated(body)
        if self._counted_by is None or not self._begin() or self._recording is None:
            return body
        if self._counted_by == OFFLOADED:
            self.end(0, 0)  # the file is the proxy's to send, and to count
            return body
        if isinstance(body, bytes) and (uwsgi_server() is not None or "bjoern" in sys.modules):
            self.end_unseen(len(body))  # these two send it as it is, and have nothing to close
            return body
        if type(body) is list and self._environ.get("SERVER_SOFTWARE") == "Granian":
            # It joins a list, sends it from Rust, and never closes it (granian/wsgi.py:59).
            size = sum(map(size_of, body))
            self.end(size, size)
            return body
        body, ends_itself = counted_file(
            body, self._environ, self._recording.opening, self, self._capture.file_way
        )
        if not ends_itself and not _is_iterable(body):
            self.end(0, 0)  # for the server to judge
            return body
        return body if ends_itself else self._iterated(body)

    def _iterated(self, body: Iterable[bytes]) -> CountedIterable:
        self._holder = self._holder or holder_of(self._environ)
        ending = self if self._holder is None else HeldEnding(self, self._holder)
        server = uwsgi_server()
        sends_all = server is None or server.takes_buffers
        return counted_iterable(body, ending, size_of if sends_all else size_of_bytes)

    def progress(self, counted: int, held: int = 0) -> int:
        """The server has taken *counted* bytes of the body and holds *held* of them; returns the next mark."""
        counted += self._written
        position = None if self._span is None else self._span.measure(counted)
        if counted < PROGRESS_EVERY:
            # The first two chunks measure the head and the framing; a small body needs no more.
            self._mark = PROGRESS_EVERY if self._mark > 1 else counted + 1
        else:
            self._mark = counted + PROGRESS_EVERY
            now = time.monotonic()
            if self._recording is not None and not self._void and now >= self._quiet_until:
                self._quiet_until = now + PROGRESS_PAUSE
                try:
                    self._recording.progress(counted - held, position)
                except Exception:
                    _say_not_recorded()
        return self._mark - self._written

    def end(self, counted: int, offered: int) -> None:
        """The body is over: the server has written at least *counted* bytes of it, and was given *offered*."""
        counted, offered = max(self._written + counted, 0), max(self._given + offered, 0)
        if self._span is None or self._void:
            self._record_end(Count(counted))
        else:
            self._record_end(self._span.end(counted, offered))

    def drop(self, counted: int, offered: int) -> None:
        """The body was dropped: bridges do so as soon as they have sent a whole Content-Length (asgiref/wsgi.py)."""
        self.end(offered if self._span is None else counted, offered)

    # What a file reports, see :class:`.files.FileEnding`.

    @property
    def has_link(self) -> bool:
        """Whether the kernel can be asked how far the connection is."""
        return self._span is not None

    def end_file(self, counted: int, offered: int) -> None:
        """As :meth:`end`, of a file that the server sends itself."""
        if self._holder is not None:
            self._holder.is_at_end()
        self.end(counted, offered)

    def end_unseen(self, offered: int) -> None:
        """The server drops the body now and sends up to *offered* bytes afterwards."""
        offered += self._written
        self._record_end(Count(offered) if self._span is None else self._span.end_unseen(offered))

    def end_declared(self, length: int) -> None:
        """*length* bytes are believed to be sent."""
        self._record_end(Count(self._written + length), declared=1)

    def _record_end(self, count: Count, declared: int = 0) -> None:
        if self._status is None:
            self._environ.pop(CALLING, None)
        if self._recording is None:
            return
        try:
            self._recording.end(0 if self._void else count.sent, declared, count.position)
        except Exception:
            _say_not_recorded()

    def _counting(self, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def counted_write(data: bytes) -> object:
            self._begin()
            may_arrive = self._holder is None or self._holder.sends()
            size = size_of(data) if may_arrive else 0
            self._given += size
            answer = write(data)
            if size:
                self._written += size
                if self._written >= self._mark:
                    self.progress(0)
            return answer

        return counted_write

    # Whether it is counted.

    def _begin(self) -> bool:
        """Write the open line, once and if this is a play; whether it is one."""
        if not self._decided and self._status is not None:
            self._decided = True
            try:
                self._recording = self._record(self._status)
            except Exception:
                _say_not_recorded()
        return self._recording is not None

    def _missing(self) -> str | None:
        try:
            return self._capture.identifier.missing(self._environ, self._path)
        except Exception:  # an app or an outer middleware has put something else than text there
            return "no_session"

    def _record(self, said: str) -> Recording | None:
        if self._counted_by is None or self._environ.get("t23.ignore"):
            return None
        missing = self._missing()
        if missing is not None:
            self._capture.count(missing)
            return None
        try:
            play = self._capture.identifier.identify(self._environ, self._path)
        except NotCounted as reason:
            self._capture.count(str(reason))
            return None
        process = self._capture.recorder.this_process()
        if self._counted_by == OFFLOADED:
            if not self._capture.has_proxy_log:
                process.tell("offloaded")
                return None
            part, status = asked_part(self._environ.get("HTTP_RANGE"))
            return process.begin(Opening(0, 0, 0, play, part, status, None, OFFLOADED))
        if "HTTP_X_FORWARDED_FOR" in self._environ or "HTTP_VIA" in self._environ:
            process.see("behind_proxy")
        if hides_leaving(self._start):
            process.see("leaving_unseen")
        status = int(said[:3])
        length = _whole_number(_header(self._headers, "content-length"))
        content_range = _header(self._headers, "content-range")
        part = part_of(status, length, content_range, self._environ.get("HTTP_RANGE"))
        opening = Opening(0, 0, 0, play, part, status, length, self._counted_by)
        return process.begin(self._on_connection(opening, said))

    def _on_connection(self, opening: Opening, status: str) -> Opening:
        """*opening* with its connection, where the kernel can be asked about it."""
        self._holder = holder_of(self._environ)
        if not self._capture.asks_kernel or not has_own_connection(self._environ):
            return opening
        link = link_of(self._environ, self._start) if self._holder is None else self._holder.link
        info = None if link is None else link.ask()
        if link is None or info is None:
            return opening
        # A server that runs ahead may have sent the head already.
        head = 0 if link.runs_ahead else _head_size(status, self._headers)
        connection = link.name(info.position + head)
        if connection is None:
            return opening
        self._span = Span(link, info.position, head, is_framed=opening.length is None)
        return opening._replace(connection=connection)

    def _who_counts(self) -> str | None:
        """Who counts this response; ``None`` where nothing does, since it is no media."""
        if self._missing() is None and self._offloads():
            return OFFLOADED
        if not isinstance(self._status, str) or self._status[:3] not in ("200", "206"):
            return None
        content_type = _header(self._headers, "content-type")
        if content_type is None or not self._capture.counts_type(content_type):
            return None
        return None if self._path.endswith(SEGMENT_ENDINGS) else self._capture.counted_by

    def _offloads(self) -> bool:
        """Whether the app leaves the file of a play to the proxy, which alone then knows what it is."""
        return any(name in OFFLOADING for name, _ in _pairs(self._headers)) and not self._path.endswith(
            SEGMENT_ENDINGS
        )


def _twice(headers: Any) -> tuple[Any, Iterable[Any]]:
    """*headers* for the server, and once more for us: servers take any iterable, which may be read only once."""
    if type(headers) is list or type(headers) is tuple:
        return headers, headers
    items: list[Any] = []
    failed: Exception | None = None
    try:
        iterator = iter(headers)
    except Exception:
        return headers, ()  # for the server to judge
    try:
        items += iterator
    except Exception as error:
        failed = error
    try:
        if iterator is not headers:
            return headers, items
        return (iter(items) if failed is None else _failing(items, failed)), items
    finally:
        failed = None  # its traceback holds this frame


def _failing(items: list[Any], error: Exception) -> Iterator[Any]:
    yield from items
    try:
        raise error
    finally:
        del error


def _pairs(headers: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Names in lower case and values; servers take more types than PEP 3333 allows."""
    for item in headers:
        try:
            name, value = item
            yield _text(name).lower(), _text(value)
        except Exception:  # for the server to judge, and it took them
            continue


def _header(headers: Iterable[Any], wanted: str) -> str | None:
    for name, value in _pairs(headers):
        if name == wanted:
            return value
    return None


def _head_size(status: str, headers: Iterable[Any]) -> int:
    """Bytes of the status line and the headers, without what the server adds."""
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in _pairs(headers))
    return len("HTTP/1.1 \r\n\r\n") + len(status) + lines


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return bytes(value).decode("latin-1") if isinstance(value, (bytes, bytearray)) else str(value)


def _is_iterable(body: Any) -> bool:
    return hasattr(type(body), "__iter__") or hasattr(type(body), "__getitem__")


def _whole_number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _say_not_recorded() -> None:
    """With the traceback of the error of ours that is being handled."""
    log.exception(
        "a response could not be recorded; the app's answer is not touched",
        extra={"t23_event": "not_recorded"},
    )
