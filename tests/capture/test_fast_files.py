"""T23_FAST_FILES: a file answer leaves by the server's own way, and the client sees no difference."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, send_file
from gunicorn.http.wsgi import FileWrapper
from werkzeug.wsgi import _RangeWrapper, wrap_file

from .servers import Answer, as_gunicorn, as_waitress, request

FILM = os.urandom(1000) * 300
START, STOP = 100_000, 250_000
RANGE = f"bytes={START}-{STOP - 1}"
HEADERS = [
    ("Content-Type", "video/mp4"),
    ("Content-Length", str(STOP - START)),
    ("Content-Range", f"bytes {START}-{STOP - 1}/{len(FILM)}"),
]


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    return path


@pytest.fixture
def site(film: Path) -> Flask:
    app = Flask(__name__)
    app.add_url_rule("/film.mp4", "film", lambda: send_file(film, conditional=True))

    @app.after_request
    def at_one_time(answer: Response) -> Response:
        """Two answers to be compared may fall into two seconds."""
        answer.headers["Date"] = "Wed, 25 Nov 2026 07:16:24 GMT"
        return answer

    return app


def ranged(open_file: Callable[[], Any], start: int = START) -> Any:
    """An app that answers a Range as werkzeug does, over whatever *open_file* gives."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("206 PARTIAL CONTENT", HEADERS)
        return _RangeWrapper(wrap_file(environ, open_file()), start, STOP - START)

    return app


class Body:
    """Remembers what the middleware handed to the server."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.handed: Any = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.handed = self._app(environ, start_response)
        return self.handed


SERVERS: dict[str, Callable[[Any, dict[str, Any]], Answer]] = {
    "gunicorn": as_gunicorn,
    "waitress": as_waitress,
}


@pytest.mark.parametrize("serve", SERVERS.values(), ids=SERVERS)
def test_range_uses_servers_file_wrapper(serve: Any, wrap: Any, journals: Any, site: Flask) -> None:
    """A range that ``send_file`` answers is passed to the server as its own file wrapper."""
    body = Body(wrap(site))
    answer = serve(body, request(HTTP_RANGE=RANGE))
    bare = serve(site, request(HTTP_RANGE=RANGE))
    assert (answer.status, answer.headers, answer.body) == (bare.status, bare.headers, FILM[START:STOP])
    assert "werkzeug" not in type(body.handed).__module__
    assert journals.sent() == [STOP - START]


@pytest.mark.parametrize("serve", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize(
    "wanted", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=299999-", "bytes=5-5", "bytes=-300000"]
)
def test_any_range_has_the_bare_apps_answer(
    serve: Any, wanted: str, wrap: Any, journals: Any, site: Flask
) -> None:
    answer = serve(wrap(site), request(HTTP_RANGE=wanted))
    bare = serve(site, request(HTTP_RANGE=wanted))
    assert answer == bare
    assert journals.sent() == [len(bare.body)]


def test_switched_off_keeps_apps_way(wrap: Any, journals: Any, site: Flask) -> None:
    """With T23_FAST_FILES off, the app sends the file as it does without the middleware."""
    body = Body(wrap(site, fast_files=False))
    assert as_gunicorn(body, request(HTTP_RANGE=RANGE)).body == FILM[START:STOP]
    assert not isinstance(body.handed, FileWrapper)
    assert journals.sent() == [STOP - START]


def test_iterated_file_ends_at_range(wrap: Any, journals: Any, film: Path) -> None:
    """A server that reads to the end of the file gets no more than the range.

    gunicorn iterates with ``--no-sendfile`` and on TLS (gunicorn/http/wsgi.py, ``write_file``).
    """
    taken: list[int] = []

    def open_film() -> Any:
        file = film.open("rb")
        taken.append(file.fileno())
        return file

    environ = request(HTTP_RANGE=RANGE, **{"wsgi.file_wrapper": FileWrapper})
    body = wrap(ranged(open_film))(environ, lambda status, headers, exc_info=None: None)
    assert isinstance(body, FileWrapper)
    assert b"".join(body) == FILM[START:STOP]
    assert (
        os.lseek(taken[0], 0, os.SEEK_CUR) < STOP + io.DEFAULT_BUFFER_SIZE
    )  # no more than Python's own buffer
    body.close()
    assert journals.sent() == [STOP - START]


def positioned(film: Path) -> Any:
    file = film.open("rb")
    file.seek(7)
    return file


def unbuffered(film: Path) -> Any:
    return film.open("rb", buffering=0)


def read_from(film: Path) -> Any:
    file = film.open("rb")
    file.read(10)
    file.seek(0)  # tell() says 0, the descriptor stands where the buffer ended
    return file


def compressed(film: Path) -> Any:
    path = film.with_suffix(".gz")
    path.write_bytes(gzip.compress(FILM, 1))
    return gzip.open(path)


def in_memory(film: Path) -> Any:
    return io.BytesIO(FILM)


def a_subclass(film: Path) -> Any:
    class Own(io.FileIO):
        pass

    return Own(film)


OPENERS = [positioned, unbuffered, read_from, compressed, in_memory, a_subclass]


@pytest.mark.parametrize("serve", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("opener", OPENERS)
def test_file_kinds_get_bare_answer(opener: Any, serve: Any, wrap: Any, journals: Any, film: Path) -> None:
    """Every kind of file object gives the same answer as without the middleware."""
    bare = serve(ranged(lambda: opener(film)), request(HTTP_RANGE=RANGE))
    answer = serve(wrap(ranged(lambda: opener(film))), request(HTTP_RANGE=RANGE))
    # Also where werkzeug itself counts from where the file stood (gunicorn, positioned).
    assert answer == bare
    assert journals.sent() == [STOP - START]


def test_only_plain_file_is_shortened(wrap: Any, film: Path) -> None:
    """Only a plain file whose descriptor is at the start is shortened to the range."""
    shortened = set()
    for opener in OPENERS:
        body = Body(wrap(ranged(lambda opener=opener: opener(film))))
        as_gunicorn(body, request(HTTP_RANGE=RANGE))
        if isinstance(body.handed, FileWrapper):
            shortened.add(opener.__name__)
    assert shortened == {"unbuffered"}


def test_contradicting_content_length_keeps_apps_way(wrap: Any, film: Path) -> None:
    """If Content-Length contradicts the range, the file is sent in the app's own way."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response(
            "206 PARTIAL CONTENT", [("Content-Type", "video/mp4"), ("Content-Length", "10"), HEADERS[2]]
        )
        return _RangeWrapper(wrap_file(environ, film.open("rb")), START, 20)

    body = Body(wrap(app))
    as_gunicorn(body, request(HTTP_RANGE=RANGE))
    assert not isinstance(body.handed, FileWrapper)


def test_started_range_goes_on(wrap: Any, journals: Any, film: Path) -> None:
    """A range from which the app already read a chunk goes on from there, in the app's own way."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("206 PARTIAL CONTENT", HEADERS)
        body = _RangeWrapper(wrap_file(environ, film.open("rb")), START, STOP - START)
        first.append(next(body))
        return body

    first: list[bytes] = []
    answer = as_gunicorn(wrap(app), request(HTTP_RANGE=RANGE))
    assert first[0] + answer.body == FILM[START:STOP]
    assert journals.sent() == [len(answer.body)]


def test_shrunken_file_ends_early(wrap: Any, journals: Any, film: Path) -> None:
    """If a file shrank after its length was sent, the body ends at the file's new end."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("206 PARTIAL CONTENT", HEADERS)
        body = _RangeWrapper(wrap_file(environ, film.open("rb")), START, STOP - START)
        os.truncate(film, START + 10)
        return body

    answer = as_waitress(wrap(app), request(HTTP_RANGE=RANGE))
    assert answer.body == FILM[START : START + 10]
    assert journals.sent() == [10]


def test_werkzeug_range_wrapper_unchanged() -> None:
    """werkzeug's private range wrapper still has the attributes that the fast way reads.

    If a werkzeug changes them, that costs speed and nothing else; this test reports the change.
    """
    body = _RangeWrapper(iter([b"x"]), 3, 5)
    state = (body.start_byte, body.byte_range, body.read_length, body.end_reached)
    assert state == (3, 5, 0, False)
    assert hasattr(body, "iterable")


def test_range_of_seekable_file_seeks(wrap: Any, journals: Any) -> None:
    """Without ``seekable`` on gunicorn's wrapper, werkzeug reads and drops all that lies before the range."""
    read: list[int] = []

    class Film(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    as_gunicorn(wrap(ranged(lambda: Film(FILM))), request(HTTP_RANGE=RANGE))
    assert sum(read) < STOP - START + 2 * 65536
    read.clear()
    as_gunicorn(wrap(ranged(lambda: Film(FILM)), fast_files=False), request(HTTP_RANGE=RANGE))
    assert sum(read) >= STOP


@pytest.mark.parametrize("error", [io.UnsupportedOperation, NotImplementedError, TypeError])
def test_range_of_wrongly_seekable_file(wrap: Any, journals: Any, error: type[Exception]) -> None:
    """What says that it is seekable and fails in seek() is read from its start, as without us."""

    class Film(io.BytesIO):
        def seek(self, *place: int) -> int:
            raise error("no seek today")

    answer = as_gunicorn(wrap(ranged(lambda: Film(FILM))), request(HTTP_RANGE=RANGE))
    assert (answer.body, answer.error) == (FILM[START:STOP], None)
    assert journals.sent() == [STOP - START]


def test_large_blocks_without_server_wrapper(wrap: Any, journals: Any, film: Path) -> None:
    """For a server without a file wrapper, the middleware provides one that reads large blocks."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", str(len(FILM)))])
        return wrap_file(environ, film.open("rb"))

    environ = request()
    sizes: list[int] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    body = wrap(app)(environ, start_response)
    received = b""
    for chunk in body:
        sizes.append(len(chunk))
        received += chunk
    body.close()
    assert received == FILM
    assert sizes[0] == 65536
    assert "wsgi.file_wrapper" not in environ
    assert journals.sent() == [len(FILM)]


class FromC:
    """A server's wrapper that sends the bare descriptor and tells nobody what it sent, as bjoern's and mod_wsgi's."""

    __next__ = io.FileIO.__next__  # a slot written in C, no Python function

    def __init__(self, file: Any, size: int = 8192) -> None:
        self.file = file

    def __iter__(self) -> Any:
        return iter(self.file)

    def close(self) -> None:
        self.file.close()


def test_declared_length_is_reported(wrap: Any, journals: Any, film: Path) -> None:
    """With ``T23_COUNT=declared``, the server sends in its own way, and the declared length is reported."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", str(len(FILM)))])
        return environ["wsgi.file_wrapper"](film.open("rb"))

    environ = request(**{"wsgi.file_wrapper": FromC})
    body = wrap(app, count="declared")(environ, lambda status, headers, exc_info=None: None)
    assert type(body) is FromC
    assert os.pread(body.file.fileno(), 5, 0) == FILM[:5]
    body.close()
    (transfer,) = journals.closed()
    assert (transfer.sent, transfer.declared) == (len(FILM), 1)


def test_declared_counts_exactly_where_exactness_costs_nothing(wrap: Any, journals: Any, site: Flask) -> None:
    as_gunicorn(wrap(site, count="declared"), request(), read=1000)
    as_waitress(wrap(site, count="declared"), request(), sends=[600])
    first, second = journals.closed()
    assert (first.declared, second.declared, second.sent) == (0, 0, 600)
