"""The operator's pages, a WSGI app: figures from the outbox as HTML, JSON and metrics.

The pages need ``T23_STATUS_TOKEN``, and they change nothing. A request opens the outbox read-only, in one short
transaction. It opens no journal and no writer's lock: closing one would release the app's own lock (``fcntl(2)``).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from markupsafe import Markup
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from ..access import is_allowed
from ..errors import StateError, UsageError
from ..relay.history import ANSWER, ANSWERS, History, nothing
from ..relay.outbox import NoOutbox, OutboxView
from ..settings import Settings
from ..state import StateFolder
from .metrics import NotInstalled, exposition
from .page_guard import Guard, address_of
from .page_html import Links, charts_html, error_page, html, recent_errors, status_sentences
from .page_style import STYLE_HASH
from .status import Status, as_json, read_status

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

#: Seconds for which the history is cached. It has one value per minute, so reading it for each of many requests would
#: only take time from the app.
HISTORY_SECONDS = 1.0

#: Path after ``T23_STATUS_PATH`` -> path of the page that it redirects to.
_REDIRECTS = {"": "/", ".json": "/status.json"}
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
#: Headers of every response: no caching, type guessing, referrer, framing or indexing.
SAFE_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("X-Robots-Tag", "noindex, nofollow"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
_HEADERS = [
    *SAFE_HEADERS,
    (
        "Content-Security-Policy",
        f"default-src 'none'; style-src '{STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'",
    ),
    ("Vary", "Accept, Authorization"),
]


class _PageResponse(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes
    #: Headers in addition to those of every response.
    headers: tuple[tuple[str, str], ...] = ()


class _CachedHistory:
    """The history as read at one time, with its charts."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.read_at = time.monotonic()

    @cached_property
    def charts(self) -> Markup:
        return charts_html(self.history)


class Pages:
    """The pages of one middleware, at ``T23_STATUS_PATH``. Our own errors become responses and are never raised."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._token = (settings.status_token or "").encode()
        self._guard = Guard()
        self._cached: _CachedHistory | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self._respond(environ)
        length = ("Content-Length", str(len(answer.body)))
        headers = [("Content-Type", answer.content_type), length, *_HEADERS, *answer.headers]
        start_response(f"{answer.status.value} {answer.status.phrase}", headers)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]

    def _respond(self, environ: WSGIEnvironment) -> _PageResponse:
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _text_response(
                HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are allowed here.", ("Allow", "GET, HEAD")
            )
        page = environ.get("PATH_INFO", "").removeprefix(self._settings.status_path)
        if page in _REDIRECTS:
            return self._redirect(environ, _REDIRECTS[page])
        return self._refusal(environ) or self._serve(environ, page)

    def _redirect(self, environ: WSGIEnvironment, to: str) -> _PageResponse:
        """A redirect to *to* below ``<path>/``, where a browser sends the token to these pages only.

        The location is relative: it is correct behind any prefix, and no request can point it to another site.
        """
        where = self._settings.status_path.rpartition("/")[2] + to
        if _wants_refresh(environ):
            where += "?refresh"
        return _text_response(HTTPStatus.MOVED_PERMANENTLY, f"See {where}\n", ("Location", where))

    def _refusal(self, environ: WSGIEnvironment) -> _PageResponse | None:
        """The response to a request without the right token; ``None`` for a request that has it."""
        authorization, address = environ.get("HTTP_AUTHORIZATION", ""), address_of(environ)
        if authorization and self._guard.is_closed_to(address):
            self._guard.log(address)
            words = "Too many wrong tokens came from this address; try again in a moment.\n"
            return _text_response(HTTPStatus.TOO_MANY_REQUESTS, words, ("Retry-After", "1"))
        if is_allowed(authorization, self._token):
            return None
        if authorization:
            self._guard.wrong(address)
        challenge = ("WWW-Authenticate", 'Basic realm="t23_middleware", charset="UTF-8"')
        words = "This page needs the token (T23_STATUS_TOKEN): as the password of any user, or as Bearer.\n"
        return _text_response(HTTPStatus.UNAUTHORIZED, words, challenge)

    def _serve(self, environ: WSGIEnvironment, page: str) -> _PageResponse:
        as_data = page == "/status.json" or (
            page != "/metrics" and _prefers_json(environ.get("HTTP_ACCEPT", ""))
        )
        try:
            status = read_status(self._settings)
            history = (cached := self._history(status.now_ms)).history
            if page == "/metrics":
                return _metrics(status, history, environ.get("HTTP_ACCEPT", ""))
            if as_data:
                return _PageResponse(
                    HTTPStatus.OK, JSON, json.dumps(figures_json(status, history), indent=2).encode()
                )
            page_text = html(
                status, history, cached.charts, self._links(environ), refreshing=_wants_refresh(environ)
            )
            return _PageResponse(HTTPStatus.OK, HTML, page_text.encode("utf-8", "replace"))
        except (StateError, UsageError, OSError) as error:
            return _unavailable(str(error), as_data, page)
        except Exception:
            log.exception(
                "the operator's page failed; the app is not affected",
                extra={"t23_event": "page_failed"},
            )
            return _unavailable("This page failed; the app's log has the reason.", as_data, page)

    def _history(self, now_ms: int) -> _CachedHistory:
        cached = self._cached
        if cached is not None and time.monotonic() - cached.read_at < HISTORY_SECONDS:
            return cached
        try:
            with OutboxView(StateFolder(self._settings.state_path()).outbox) as view:
                self._cached = cached = _CachedHistory(view.history(now_ms))
        except NoOutbox:
            return _CachedHistory(nothing(now_ms))
        return cached

    def _links(self, environ: WSGIEnvironment) -> Links:
        root = quote(environ.get("SCRIPT_NAME", "").encode("latin-1", "replace"))
        path = root + self._settings.status_path
        return Links(f"{path}/", f"{path}/status.json", f"{path}/metrics")


def _wants_refresh(environ: WSGIEnvironment) -> bool:
    return "refresh" in environ.get("QUERY_STRING", "").split("&")


def _prefers_json(accept: str) -> bool:
    kinds = parse_accept_header(accept, MIMEAccept)
    return kinds.best_match(["text/html", "application/json"], default="text/html") == "application/json"


def figures_json(status: Status, history: History) -> dict[str, object]:
    """The figures and the history for programs. Times are seconds since the epoch, or minutes if the name says so."""
    return {
        **as_json(status),
        "text": " ".join(status_sentences(status)),
        "api_answers": {name: history.totals.get(ANSWER + name, 0) for name in ANSWERS},
        "hour": _series(history, "hour"),
        "day": _series(history, "day"),
        "videos_by_bytes": [video._asdict() for video in history.by_bytes],
        "videos_by_plays": [video._asdict() for video in history.by_plays],
        "errors": [{"time": each.at_ms / 1000, "what": each.what} for each in recent_errors(status, history)],
    }


def _series(history: History, name: str) -> dict[str, object]:
    series = history.hour if name == "hour" else history.day
    return {"first_minute": series.first, "step_minutes": series.step, **series.values}


def _metrics(status: Status, history: History, accept: str) -> _PageResponse:
    try:
        content_type, body = exposition(status, history, accept)
    except NotInstalled as error:
        return _text_response(HTTPStatus.NOT_IMPLEMENTED, f"{error}\n")
    return _PageResponse(HTTPStatus.OK, content_type, body)


def _text_response(status: HTTPStatus, words: str, *headers: tuple[str, str]) -> _PageResponse:
    return _PageResponse(status, TEXT, words.encode(), headers)


def _unavailable(words: str, as_data: bool, page: str) -> _PageResponse:
    """503: the figures can't be read now. With another status a monitor could take this for figures of zero."""
    if as_data:
        return _PageResponse(HTTPStatus.SERVICE_UNAVAILABLE, JSON, json.dumps({"error": words}).encode())
    if page == "/metrics":
        return _text_response(HTTPStatus.SERVICE_UNAVAILABLE, f"{words}\n")
    return _PageResponse(HTTPStatus.SERVICE_UNAVAILABLE, HTML, error_page(words).encode("utf-8", "replace"))
