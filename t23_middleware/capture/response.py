"""One response on its way from the app to the server: what was said of it, and whether it is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..media import BYTERANGES, SEGMENT_ENDINGS, MediaTypes
from ..settings import Settings
from ..transfer import APP, OFFLOADED, PLAY_HEADER, PROXY, Opening
from .body import PROGRESS_EVERY, BegunLater, CountedIterable, CountedSequence
from .files import FileWay, LentWrapper
from .held import CountedHeld, CountedHeldSequence, Holder, hides_leaving, holder_of
from .identity import Identifier, NotCounted
from .ranges import asked_first, asked_part, asks_several, part_of
from .recorder import NamedRecording, Recorder, Recording

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

FILE_WRAPPER = "wsgi.file_wrapper"
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
        "_headers",
        "_holder",
        "_lent",
        "_named",
        "_path",
        "_recording",
        "_start",
        "_status",
        "_void",
        "_written",
    )

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse, capture: Capture) -> None:
        self._environ = environ
        self._path: str = environ.get("PATH_INFO", "")
        self._start = start_response
        self._capture = capture
        self._status: str | None = None
        self._headers: list[tuple[str, str]] = []
        #: Who counts it; ``None`` for what is not counted.
        self._counted_by: str | None = None
        self._decided = False
        self._written = 0
        self._lent: LentWrapper | None = None
        self._recording: Recording | None = None
        self._void = False
        self._holder: Holder | None = None

    # What happens while the app runs.

    def lend_wrapper(self) -> None:
        """Exchange the server's file wrapper for one that remembers what it wrapped, if the request may name a play."""
        original = self._environ.get(FILE_WRAPPER)
        way = self._capture.file_way
        #: Whether the request, as it came, may name a play.
        self._named = self._missing() is None
        if self._named and (original is not None or way.fast):
            self._lent = self._environ[FILE_WRAPPER] = LentWrapper(original, way)

    def take_wrapper_back(self) -> None:
        """Put the server's own wrapper back: gunicorn compares bodies with it after the app returned (sync.py)."""
        there: object = self._environ.get(FILE_WRAPPER)
        if self._lent is None or there is not self._lent:
            return
        if self._lent.original is None:
            del self._environ[FILE_WRAPPER]
        else:
            self._environ[FILE_WRAPPER] = self._lent.original

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None
    ) -> Callable[[bytes], object]:
        """``start_response`` as the app sees it (PEP 3333)."""
        if self._capture.has_proxy_log:
            write = self._start_named(status, headers, exc_info)
        else:
            write = (
                self._start(status, headers) if exc_info is None else self._start(status, headers, exc_info)
            )
            self._status, self._headers = status, headers
            self._counted_by = self._who_counts()
        if self._counted_by is None:
            # An error page in place of media that was under way: what goes out now is not the video.
            if self._recording is not None:
                self._set_void(self._recording)
            return write
        # Some servers have no write() (bjoern, granian, hypercorn); then the app shall see that too.
        return write if write is None else self._counting(write)

    def _start_named(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None
    ) -> Callable[[bytes], object]:
        """The same with the play's name for the proxy: so it is decided before the server has the headers."""
        former = self._status, self._headers, self._counted_by
        self._status, self._headers = status, headers
        self._counted_by = self._who_counts()
        if self._counted_by is not None and self._begin() and isinstance(self._recording, NamedRecording):
            headers = [*headers, (PLAY_HEADER, self._recording.play_id)]
        try:
            return (
                self._start(status, headers) if exc_info is None else self._start(status, headers, exc_info)
            )
        except BaseException:
            self._status, self._headers, self._counted_by = former
            raise

    def _set_void(self, recording: Recording) -> None:
        """What was opened is not what goes out, so that nobody need wait for its end."""
        self._void = True
        if isinstance(recording, NamedRecording):
            recording.void()
        self.end(0)

    def abandon(self) -> None:
        """The app raised: what ``write()`` sent before is all there was."""
        if self._recording is not None and not self._written:
            self._set_void(self._recording)
        if self._holder is not None:
            self._holder.finish(0, self)
        else:
            self.end(0)

    # What happens to its body.

    def body(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """The body for the server: counted where this is a play, else the very object that the app returned."""
        if self._status is None:
            # The app may call start_response as late as its first chunk (PEP 3333, "The start_response() Callable").
            return BegunLater(self._iterated(body), self._begin) if self._missing() is None else body
        if self._counted_by is None or not self._begin() or self._recording is None:
            return self._untouched(body)
        if self._counted_by == OFFLOADED:
            self.end(0)  # the file is the proxy's to send, and to count
            return self._untouched(body)
        if self._lent is not None:
            opening = self._recording.opening
            if opening.length is None and "mod_wsgi.version" in self._environ:
                own = self._lent.as_declared(body, self)
                if own is not None:
                    return own  # type: ignore[no-any-return]
            body = _by_the_servers_way(self._lent, body, opening)
            if self._lent.arm(body, self, opening.length):
                return body
        if type(body) is list and self._environ.get("SERVER_SOFTWARE") == "Granian":
            # It joins a list, sends it from Rust, and never closes it (granian/wsgi.py:59).
            self.end(sum(map(len, body)))
            return body
        return self._iterated(body)

    def _untouched(self, body: Iterable[bytes]) -> Iterable[bytes]:
        return body if self._lent is None else self._lent.as_the_server_has_it(body)

    def _iterated(self, body: Iterable[bytes]) -> CountedIterable:
        has_length = hasattr(body, "__len__")
        self._holder = self._holder or holder_of(self._environ)
        if self._holder is not None:
            return (CountedHeldSequence if has_length else CountedHeld)(body, self, self._holder)
        return (CountedSequence if has_length else CountedIterable)(body, self)

    def progress(self, counted: int) -> None:
        """So far *counted* bytes of the body went out beside what ``write()`` sent."""
        if self._recording is not None and not self._void:
            try:
                self._recording.progress(self._written + counted)
            except Exception:
                _say_not_recorded()

    def end(self, counted: int, *, declared: int = 0) -> None:
        """The body is over, and *counted* bytes of it went out beside what ``write()`` sent."""
        if self._recording is None:
            return
        try:
            self._recording.end(0 if self._void else max(self._written + counted, 0), declared)
        except Exception:
            _say_not_recorded()

    def _counting(self, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def counted_write(data: bytes) -> object:
            if self._begin() and self._holder is None:
                self._holder = holder_of(self._environ)
            may_arrive = self._holder is None or self._holder.sends()
            answer = write(data)
            if may_arrive:
                self._wrote(len(data))
            return answer

        return counted_write

    def _wrote(self, size: int) -> None:
        before, self._written = self._written, self._written + size
        if self._holder is not None:
            self._holder.took()
        if before // PROGRESS_EVERY != self._written // PROGRESS_EVERY:
            self.progress(0 if self._holder is None else -self._holder.held())

    def _begin(self) -> bool:
        """Decide, once, whether this response is counted, and open its record; whether it is."""
        if not self._decided and self._status is not None:
            self._decided = True
            try:
                self._recording = self._record(self._status)
            except Exception:
                _say_not_recorded()
        return self._recording is not None

    def _missing(self) -> str | None:
        return self._capture.identifier.missing(self._environ, self._path)

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
        asked = self._environ.get("HTTP_RANGE")
        if self._counted_by == OFFLOADED:
            if not self._capture.has_proxy_log:
                process.tell("offloaded")
                return None
            return process.begin(play, *asked_part(asked), None, OFFLOADED)
        if "HTTP_X_FORWARDED_FOR" in self._environ or "HTTP_VIA" in self._environ:
            process.see("behind_proxy")
        if hides_leaving(self._start):
            process.see("leaving_unseen")
        status = int(said[:3])
        length = _whole_number(self._header("content-length"))
        part = part_of(status, length, self._header("content-range"), asked)
        wanted = asked_first(status, length, asked)
        return process.begin(play, part, status, length, self._counted_by, wanted)

    def _who_counts(self) -> str | None:
        """Who counts this response; ``None`` where nobody does, since it is no media."""
        if (self._named or (self._capture.has_proxy_log and self._missing() is None)) and self._offloads():
            return OFFLOADED
        if self._status is None or self._status[:3] not in ("200", "206"):
            return None
        try:
            content_type = self._header("content-type") or ""
        except (AttributeError, TypeError, ValueError):
            return None  # no list of pairs of strings: for the server to judge, and it took them
        return self._capture.counted_by if self._capture.counts_type(content_type, self._path) else None

    def _offloads(self) -> bool:
        """Whether the app leaves the file of a play to the proxy, which alone then knows what it is."""
        try:
            for name, _ in self._headers:
                if name.lower() in OFFLOADING:
                    if asks_several(self._environ.get("HTTP_RANGE")):
                        return self._capture.counts_type(BYTERANGES, self._path)
                    return not self._path.endswith(SEGMENT_ENDINGS)
        except (AttributeError, TypeError, ValueError):
            pass  # no list of pairs of strings
        return False

    def _header(self, wanted: str) -> str | None:
        for name, value in self._headers:
            if name.lower() == wanted:
                return value
        return None


def _by_the_servers_way(lent: LentWrapper, body: Iterable[bytes], opening: Opening) -> Iterable[bytes]:
    if opening.status != 206 or opening.length is None or opening.part.size != opening.length:
        return body
    try:
        shortened: Iterable[bytes] = lent.shorten(body, opening.part.first, opening.length)
    except (OSError, ValueError, AttributeError):  # a file that is closed, or no file after all
        return body
    return shortened


def _whole_number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _say_not_recorded() -> None:
    """With the traceback of the error of ours that is being handled."""
    log.exception(
        "a response could not be recorded; the app's answer is not touched",
        extra={"t23_event": "not_recorded"},
    )
