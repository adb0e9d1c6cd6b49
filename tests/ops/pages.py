"""The operator's pages over a socket, beside an app that answers everything else."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from werkzeug.serving import WSGIRequestHandler, make_server

from t23_middleware import T23Middleware

from ..harness import PATIENCE

TOKEN = "the-token-of-the-operator"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        pass


class PagesSite:
    """A site of its own with the pages on it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, method: str = "GET", *, token: str | None = TOKEN, **headers: str) -> Answer:
        """An answer; with *token* as Bearer, if any."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent.setdefault("Authorization", f"Bearer {token}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, headers=sent)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers.items()), answer.read().decode())
        finally:
            connection.close()

    def json(self) -> dict[str, Any]:
        answer = self.ask("/_t23/status.json")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = json.loads(answer.body)
        return found


def plain_app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"the app at " + environ["PATH_INFO"].encode("latin-1")]


@contextmanager
def serving(state: Path, app: Any = plain_app, **settings: Any) -> Iterator[PagesSite]:
    """The app and its pages on a free port."""
    given = {
        "api_url": "https://video.example.com",
        "state_dir": str(state),
        "relay": "off",
        "status_token": TOKEN,
    }
    wrapped = T23Middleware(app, **(given | settings))
    server = make_server("127.0.0.1", 0, wrapped, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield PagesSite(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text without the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self.words = ""
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False
        self.words += " "

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.words += data

    def figure(self, name: str) -> str:
        """What the page shows as the figure *name*."""
        return " ".join(self.words.split()).split(f" {name} ", 1)[1].split(" ", 1)[0]
