"""Apps that do what servers tolerate: answer, close() and errors as without us, and one close line that is true."""

from __future__ import annotations

import io
import sys
import weakref
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper as WsgirefWrapper

import pytest
from gunicorn.http.wsgi import FileWrapper

from t23_middleware.capture.connection import SocketLink, link_of
from t23_middleware.tcp_info import SIZE, read_tcp_info

from .servers import as_gunicorn, ask, media, request

HEADERS = [("Content-Type", "video/mp4")]
FILM = bytes(range(200)) * 50


class Body:
    """An iterator of the app's own that knows what was done to it."""

    start: Any = None

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = iter(chunks)
        self.begun = self.closed = 0

    def __iter__(self) -> Body:
        self.begun += 1
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)

    def close(self) -> None:
        self.closed += 1


def returning(body: Any, headers: Any = None) -> Any:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS if headers is None else headers)
        return body() if callable(body) else body

    return app


# Ways to end.


def test_iterator_closed_after_its_end(wrap: Any, journals: Any) -> None:
    """An outer middleware may close the iterator behind the last chunk: the app's close() runs then."""
    own = Body(b"abc", b"de")
    chunks: Any = iter(wrap(returning(own))(request(), lambda *head: None))
    assert list(chunks) == [b"abc", b"de"]
    chunks.close()
    assert (own.begun, own.closed, journals.sent()) == (1, 1, [5])


def test_iterator_without_iter_of_its_own(wrap: Any, journals: Any) -> None:
    """A for loop asks no more than ``__next__`` of what ``iter()`` gives."""

    class Next:
        def __init__(self) -> None:
            self.chunks = iter([b"abc", b"de"])

        def __next__(self) -> bytes:
            return next(self.chunks)

    class Again:
        def __iter__(self) -> Any:
            return Next()

    assert ask(wrap(returning(Again))).body == b"abcde"
    assert journals.sent() == [5]


def test_peeked_chunk_counts_with_the_rest(wrap: Any, journals: Any) -> None:
    """A middleware that looks at the first chunk may begin the iteration a second time."""
    inner = wrap(returning(lambda: (chunk for chunk in (b"abc", b"de", b"f"))))

    def outer(environ: dict[str, Any], start_response: Any) -> Any:
        body = inner(environ, start_response)
        first = next(iter(body))
        return chain([first], body)

    assert ask(outer).body == b"abcdef"
    assert journals.sent() == [6]


@pytest.mark.parametrize("wrapper", [FileWrapper, WsgirefWrapper], ids=["gunicorn", "wsgiref"])
def test_dropped_file_ends_its_count(wrap: Any, journals: Any, wrapper: Any) -> None:
    app = wrap(lambda environ, start: returning(wrapper(io.BytesIO(FILM), 1000))(environ, start))
    body = app(request(**{"wsgi.file_wrapper": wrapper}), lambda *head: None)
    chunks = iter(body)
    next(chunks), next(chunks)
    del body, chunks
    (sent,) = journals.sent()
    assert 1000 <= sent <= 2000


@pytest.mark.parametrize("wrapper", [FileWrapper, WsgirefWrapper], ids=["gunicorn", "wsgiref"])
def test_own_close_of_a_wrapper(wrap: Any, journals: Any, wrapper: Any) -> None:
    """What an app sets as its wrapper's close() is what the server calls."""
    closed: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        body = environ["wsgi.file_wrapper"](io.BytesIO(FILM), 1000)
        body.close = lambda: closed.append("app")
        return body

    answer = ask(wrap(app), request(**{"wsgi.file_wrapper": wrapper}))
    assert (answer.body, closed, journals.sent()) == (FILM, ["app"], [len(FILM)])


def test_failed_start_keeps_nothing_alive(wrap: Any) -> None:
    """An error that start_response raises again must not hold the app's objects until the next collection."""
    held: list[weakref.ref[Body]] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        own = Body(b"abc")
        held.append(weakref.ref(own))
        start_response("200 OK", HEADERS)
        yield b"abc"
        try:
            raise OSError("the disk failed")
        except OSError:
            start_response("500 Oh", [], sys.exc_info())

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        try:
            if exc_info:
                raise exc_info[1]
        finally:
            exc_info = None  # as servers do

    raised = None
    try:
        list(wrap(app)(request(), start_response))
    except OSError as error:
        raised = str(error)
    gone = held[0]() is None
    assert (raised, gone) == ("the disk failed", True)


# An app that calls itself.


def calling_itself(how: str, film: Path) -> Any:
    """An app that answers /film.mp4 by a second call of the whole site."""
    site: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if "again" not in environ:
            environ = {**environ, "again": 1} if how == "copied" else environ
            environ["again"] = 1
            return late(environ, start_response) if how == "late" else site[0](environ, start_response)
        start_response("200 OK", HEADERS)
        return environ["wsgi.file_wrapper"](film.open("rb"), 4096)

    def late(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        with closing(site[0](environ, start_response)) as body:
            yield from body

    return app, site


@pytest.mark.parametrize("how", ["same environ", "copied", "late"])
def test_app_that_calls_itself(wrap: Any, journals: Any, tmp_path: Path, how: str) -> None:
    """The call within is part of the answer: counted once, and a file stays the server's to send."""
    (tmp_path / "film.mp4").write_bytes(FILM)
    app, site = calling_itself(how, tmp_path / "film.mp4")
    site.append(wrap(app))
    assert as_gunicorn(site[0], request()).body == FILM
    assert journals.sent() == [len(FILM)]


def test_head_answered_by_get_of_itself(wrap: Any, journals: Any) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "HEAD":
            body = site({**environ, "REQUEST_METHOD": "GET"}, start_response)
            return [] if list(body) else body
        return media(b"film")(environ, start_response)

    site = wrap(app)
    assert ask(site, request(method="HEAD")).body == b""
    assert journals.files() == []


@pytest.mark.parametrize("chunks", [[], [b""]], ids=["no chunk", "an empty one"])
@pytest.mark.parametrize("settings", [{}, {"proxy_log": "/var/log/t23.log"}], ids=["plain", "proxy log"])
def test_start_in_close_opens_nothing(
    wrap: Any, journals: Any, settings: dict[str, str], chunks: list[bytes]
) -> None:
    """What would be opened after the body's end would never be closed."""

    class Late(Body):
        def close(self) -> None:
            self.start("200 OK", HEADERS)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        body = Late(*chunks)
        body.start = start_response
        return body

    answer = ask(wrap(app, **settings))
    assert (answer.status, answer.headers, answer.body) == ("200 OK", HEADERS, b"")
    assert len(journals.opened()) == len(journals.closed())


# Headers.


def failing_headers() -> Iterator[tuple[str, str]]:
    yield HEADERS[0]
    raise ValueError("the headers ran out")


@pytest.mark.parametrize("settings", [{}, {"proxy_log": "/var/log/t23.log"}], ids=["plain", "proxy log"])
def test_header_iterator_that_fails(wrap: Any, settings: dict[str, str]) -> None:
    answer = ask(wrap(lambda environ, start: returning([], failing_headers())(environ, start), **settings))
    assert str(answer.error) == "the headers ran out"


class FailingHeaders:
    """The same as a class, of which no frame is a generator's."""

    def __iter__(self) -> FailingHeaders:
        return self

    def __next__(self) -> tuple[str, str]:
        raise ValueError("the headers ran out")


@pytest.mark.parametrize("settings", [{}, {"proxy_log": "/var/log/t23.log"}], ids=["plain", "proxy log"])
def test_server_refuses_headers_before_they_fail(wrap: Any, settings: dict[str, str]) -> None:
    """The first fault that the server meets is the one that it reports."""

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        for name, _ in headers:
            raise TypeError(f"{name} is refused")

    with pytest.raises(TypeError, match="Content-Type is refused"):
        app = wrap(lambda environ, start: returning([], failing_headers())(environ, start), **settings)
        app(request(), start_response)


@pytest.mark.parametrize("settings", [{}, {"proxy_log": "/var/log/t23.log"}], ids=["plain", "proxy log"])
@pytest.mark.parametrize("failing", [failing_headers, FailingHeaders])
def test_refused_headers_keep_nothing_alive(wrap: Any, settings: dict[str, str], failing: Any) -> None:
    """wsgiref refuses what is no list and never reads it: the app's objects go at once all the same."""
    held: list[weakref.ref[Body]] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        own = Body(b"abc")
        held.append(weakref.ref(own))
        start_response("200 OK", failing())
        return own

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        raise TypeError("Headers should be a list")

    with pytest.raises(
        (TypeError, ValueError)
    ) as raised:  # the latter where the proxy's header is added to them
        wrap(app, **settings)(request(), start_response)
    del raised
    assert held[0]() is None


def test_headers_that_can_be_read_again(wrap: Any, journals: Any) -> None:
    """They go to the server as the object that they are: wsgiref takes nothing but a list."""
    seen: list[Any] = []
    headers = dict(HEADERS).items()
    body = wrap(returning([b"abc"], headers))(request(), lambda status, headers: seen.append(headers))
    body.close()
    assert seen[0] is headers
    assert len(journals.opened()) == 1


def test_header_iterator_read_late(wrap: Any, journals: Any) -> None:
    """werkzeug's server reads the headers with the first chunk, long after start_response."""
    kept: list[Any] = []
    body = wrap(lambda environ, start: returning([b"abc"], iter(HEADERS))(environ, start))(
        request(), lambda status, headers: kept.append(headers)
    )
    assert list(body) == [b"abc"]
    assert (list(kept[0]), journals.sent()) == (HEADERS, [3])


# What is in the environ.


class Hostile:
    """Everything that is asked of it fails, and not as a missing attribute does."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


@pytest.mark.parametrize("key", ["QUERY_STRING", "PATH_INFO", "HTTP_COOKIE", "SERVER_PROTOCOL"])
@pytest.mark.parametrize("value", [None, b"bytes", 7])
@pytest.mark.parametrize("when", ["before", "in the app"])
def test_environ_that_is_no_text(wrap: Any, key: str, value: Any, when: str) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        environ.update({key: value})
        return media(b"film")(environ, start_response)

    inner = wrap(app if when == "in the app" else media(b"film"))
    answer = ask(inner, request(**({} if when == "in the app" else {key: value})))
    assert (answer.body, answer.error) == (b"film", None)


def test_cleared_environ_stays_empty(wrap: Any) -> None:
    environ = request()
    assert (
        ask(wrap(lambda given, start: given.clear() or media(b"film")(given, start)), environ).body == b"film"
    )
    assert environ == {}


@pytest.mark.parametrize("key", ["wsgi.input", "gunicorn.socket", "waitress.client_disconnected"])
def test_objects_that_answer_nothing(wrap: Any, journals: Any, key: str) -> None:
    answer = ask(wrap(media(b"film")), request(**{key: Hostile()}))
    assert (answer.body, answer.error) == (b"film", None)
    assert journals.sent() == [4]


def test_body_that_answers_nothing(wrap: Any) -> None:
    body = Hostile()
    given: Any = wrap(returning([body]))(request(), lambda *head: None)
    assert list(given)[0] is body
    assert (
        wrap(lambda environ, start: returning([])(environ, start) or body)(request(), lambda *head: None)
        is body
    )


# The kernel's word.


@pytest.mark.parametrize("length", [0, 1, 104, 119, SIZE - 1])
def test_short_answer_says_nothing(length: int) -> None:
    assert read_tcp_info(bytes(length)) is None


@pytest.mark.parametrize("length", [SIZE, SIZE + 40])
def test_long_answer_is_read(length: int) -> None:
    assert read_tcp_info(bytes(length)) == (0, 0, 0)


@pytest.mark.parametrize("thing", [int, Hostile, io.BytesIO])
def test_no_socket_at_all(thing: Any) -> None:
    link = link_of({"gunicorn.socket": thing()}, None)
    assert link is None or (link.read_info(), link.connection_at(0)) == (None, None)


def test_socket_that_is_closed() -> None:
    import socket

    with socket.socket() as closed:
        pass
    link = SocketLink(closed)
    assert (link.read_info(), link.connection_at(0)) == (None, None)
