"""The demo's site, which gunicorn runs: the example app with a limited rate, and the demo's page on the same address.

The demo's own process serves the page and its data, because it reads the journals, which nothing in the app's process
may do. This module forwards these requests, so that one address serves both.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..capture import counter as counted
from .loopback import request_refusal

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Bytes per second for the player, and bytes that are sent at once, so that it starts soon. The rate is higher than the
#: film needs (18 KB/s), and so low that the player has not loaded the whole film for more than a minute.
RATE, BURST = 40_000, 96 << 10
#: Path of the page's files and data.
PAGES = "/demo/"
#: Headers that the demo's process needs to decide whether it accepts a request.
_FORWARDED_HEADERS = {"HTTP_HOST": "Host", "HTTP_ORIGIN": "Origin", "HTTP_SEC_FETCH_SITE": "Sec-Fetch-Site"}
#: Longest request body that is forwarded, in bytes.
_MAX_BODY = 1024
#: Seconds that the demo's process may take to answer.
_TIMEOUT_SECONDS = 5.0
_RATE = re.compile(r"(?:^|&)rate=([1-9]\d{0,8})(?:&|$)")
_NO_ANSWER = b"The demo's own process does not answer.\n"

#: The demo's film: a second video beside the example's clip, with a media URL of the same form.
FILM = {
    "tree_id": "4959051",
    "photo": "7190972",
    "token": "0f6d2c7be4a94d19a1c85e3b72f40d66",
    "format": "video_medium",
    "slug": "a-film-to-scrub-in",
}


def example_module() -> str:
    """Name of the example's module: installed, or in a checkout beside the package, which is then added to the path."""
    if importlib.util.find_spec("t23_middleware.examples") is not None:
        return "t23_middleware.examples.flask_app"
    checkout = str(Path(__file__).parents[2])
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    return "examples.flask_app"


def media_path(video: dict[str, str]) -> str:
    """Path of *video*'s media URL on the example site."""
    path: str = importlib.import_module(example_module()).PATH
    return re.sub(r"<(\w+)>", lambda part: video[part[1]], path)


class ThrottledBody:
    """A body that is sent at *rate* bytes per second, after a *burst* of bytes at once."""

    def __init__(self, body: Any, rate: int, burst: int = BURST) -> None:
        self._body = body
        self._rate = rate
        self._burst = burst

    def __iter__(self) -> Iterator[bytes]:
        began, sent = time.monotonic(), 0
        for chunk in self._body:
            yield chunk
            sent += len(chunk)
            time.sleep(max(0.0, began + (sent - self._burst) / self._rate - time.monotonic()))

    def close(self) -> None:
        if hasattr(self._body, "close"):
            self._body.close()


def site(port: int) -> WSGIApplication:
    """The app. It forwards requests for the page to the demo's process on *port* of 127.0.0.1."""
    # Progress lines let the page show a growing response; with the defaults a film of a few MB has none.
    counted.PROGRESS_EVERY, counted.PROGRESS_PAUSE = 8 << 10, 0.25
    example = importlib.import_module(example_module())
    _add_film(example)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/" or path.startswith(PAGES):
            return _forward(port, environ, start_response)
        if refused := request_refusal(environ, any_short_name=True):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [f"{refused}\n".encode()]
        answer: Iterable[bytes] = example.app(environ, start_response)
        asked = _RATE.search(environ.get("QUERY_STRING", ""))
        return answer if asked is None else ThrottledBody(answer, int(asked[1]))

    return app


def _add_film(example: Any) -> None:
    from flask import Response, send_file

    def film() -> Response:
        return send_file(example.HERE / "film.mp4", conditional=True)

    example.app.add_url_rule(media_path(FILM), "film", film)


def _forward(port: int, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_SECONDS)
    headers = {"Content-Type": environ.get("CONTENT_TYPE", "")}
    headers |= {name: environ[key] for key, name in _FORWARDED_HEADERS.items() if key in environ}
    path = quote(environ["PATH_INFO"], encoding="latin-1")
    length = environ.get("CONTENT_LENGTH") or "0"
    sent = environ["wsgi.input"].read(min(int(length), _MAX_BODY)) if length.isdecimal() else b""
    try:
        connection.request(environ["REQUEST_METHOD"], path, sent, headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        start_response("502 Bad Gateway", [("Content-Type", "text/plain"), ("Cache-Control", "no-store")])
        return [_NO_ANSWER]
    finally:
        connection.close()
    kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in ("date", "server")]
    start_response(f"{answer.status} {answer.reason}", kept)
    return [content]
