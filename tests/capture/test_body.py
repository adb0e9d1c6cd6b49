"""Counted bodies: the client gets the bare app's answer to the byte, and one close line says how much it got."""

from __future__ import annotations

import io
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, send_file
from flask import request as flask_request
from gunicorn.http.wsgi import FileWrapper
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from t23_middleware.capture import files
from t23_middleware.capture.body import counted_iterable

from .servers import OldFileWrapper, as_gunicorn, as_waitress, ask, media, request

FILM = bytes(range(256)) * 1000
HEADERS = [("Content-Type", "video/mp4")]

often = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
chunk_lists = st.lists(st.binary(max_size=5), max_size=8)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    return path


# Every kind of body that PEP 3333 allows.


class Chunks:
    """An iterator of the app's own, with a close() that knows how often it was called."""

    def __init__(self, chunks: list[bytes], fails: bool = False) -> None:
        self._chunks = iter(chunks)
        self._fails = fails
        self.closed = 0

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks, None)
        if chunk is None:
            if self._fails:
                raise OSError("the app's disk failed")
            raise StopIteration
        return chunk

    def close(self) -> None:
        self.closed += 1


def in_list(chunks: list[bytes], start: Any) -> Any:
    start("200 OK", HEADERS)
    return chunks


def in_tuple(chunks: list[bytes], start: Any) -> Any:
    start("200 OK", HEADERS)
    return tuple(chunks)


def in_generator(chunks: list[bytes], start: Any) -> Any:
    start("200 OK", HEADERS)
    return (chunk for chunk in chunks)


def in_iterator(chunks: list[bytes], start: Any) -> Any:
    start("200 OK", HEADERS)
    return Chunks(chunks)


def in_failing_iterator(chunks: list[bytes], start: Any) -> Any:
    start("200 OK", HEADERS)
    return Chunks(chunks, fails=True)


def late(chunks: list[bytes], start: Any) -> Iterator[bytes]:
    start("200 OK", HEADERS)
    yield from chunks


def by_write(chunks: list[bytes], start: Any) -> Any:
    write = start("200 OK", HEADERS)
    for chunk in chunks:
        write(chunk)
    return []


def by_write_and_list(chunks: list[bytes], start: Any) -> Any:
    write = start("200 OK", HEADERS)
    for chunk in chunks[:2]:
        write(chunk)
    return chunks[2:]


def by_write_then_fails(chunks: list[bytes], start: Any) -> Any:
    by_write(chunks, start)
    raise OSError("the app's disk failed")


KINDS = [
    in_list,
    in_tuple,
    in_generator,
    in_iterator,
    in_failing_iterator,
    late,
    by_write,
    by_write_and_list,
    by_write_then_fails,
]


@pytest.mark.parametrize("kind", KINDS)
@often
@given(chunks=chunk_lists, stop_after=st.none() | st.integers(0, 8), closes=st.integers(1, 3))
def test_bare_answer_and_one_close_line(
    wrap: Any, journals: Any, kind: Any, chunks: list[bytes], stop_after: int | None, closes: int
) -> None:
    """The client gets the same answer as without the middleware, and one close line has its bytes."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        return kind(chunks, start_response)

    before = len(journals.closed())
    bare = ask(app, stop_after=stop_after, closes=closes)
    answer = ask(wrap(app), stop_after=stop_after, closes=closes)
    assert (answer.status, answer.headers, answer.body) == (bare.status, bare.headers, bare.body)
    assert (type(answer.error), str(answer.error)) == (type(bare.error), str(bare.error))
    if kind in (late, by_write_then_fails) and not chunks:
        assert journals.sent()[before:] in ([], [0])  # nothing began
    else:
        assert journals.sent()[before:] == [len(answer.body)]


def test_chunk_counted_at_next_request(wrap: Any, journals: Any) -> None:
    """A chunk is counted when the server asks for the next one."""
    body = wrap(media(b"abc", b"de"))(request(), lambda *head: None)
    chunks = iter(body)
    assert next(chunks) == b"abc"
    assert next(chunks) == b"de"  # sending this one fails
    body.close()
    assert journals.sent() == [3]


def test_unstarted_body_counts_nothing(wrap: Any, journals: Any) -> None:
    """A body whose iteration never started is closed and counts nothing."""
    own = Chunks([b"abc"])

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return own

    body = wrap(app)(request(), lambda *head: None)
    body.close()
    assert own.closed == 1
    assert journals.sent() == [0]


def test_close_from_many_threads(wrap: Any, journals: Any) -> None:
    """Closing a body from many threads at once ends the count once."""
    app = wrap(media(b"abc"))
    for _ in range(50):
        body = app(request(), lambda *head: None)
        assert b"".join(body) == b"abc"
        threads = [threading.Thread(target=body.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert journals.sent() == [3] * 50


def test_failing_close_is_counted(wrap: Any, journals: Any) -> None:
    """A ``close()`` of the app that raises does so as without the middleware, and the response is counted."""

    class Broken(Chunks):
        def close(self) -> None:
            raise OSError("the app's close failed")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return Broken([b"abc"])

    answer = ask(wrap(app))
    assert str(answer.error) == "the app's close failed"
    assert journals.sent() == [3]


@pytest.mark.parametrize("made", [list, tuple], ids=["list", "tuple"])
def test_list_keeps_its_length(wrap: Any, made: Any) -> None:
    """A list or tuple keeps its length, so that servers see that it is one chunk."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return made([b"abc"])

    body = wrap(app)(request(), lambda *head: None)
    assert len(body) == 1
    body.close()


def test_a_generator_gets_no_length(wrap: Any) -> None:
    body = wrap(lambda environ, start: in_generator([b"abc"], start))(request(), lambda *head: None)
    assert not hasattr(body, "__len__")
    body.close()


def test_error_page_counts_no_bytes(wrap: Any, journals: Any) -> None:
    """An error page that replaces the media counts no bytes."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        yield b""  # nothing was sent yet, so the head may still be exchanged
        try:
            raise OSError("the app's disk failed")
        except OSError:
            start_response("500 Oh", [("Content-Type", "text/plain")], sys.exc_info())
        yield b"sorry"

    sent: list[bytes] = []
    heads: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        heads.append(status)
        return sent.append

    body = wrap(app)(request(), start_response)
    assert b"".join(body) == b"sorry"
    body.close()  # type: ignore[attr-defined]
    assert heads == ["200 OK", "500 Oh"]
    assert journals.sent() in ([], [0])


def test_server_without_write_callable(wrap: Any) -> None:
    """A server without ``write`` returns None from start_response, and the app gets that None."""
    seen: list[object] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(start_response("200 OK", HEADERS))
        return []

    wrap(app)(request(), lambda *head: None)
    assert seen == [None]


def test_exc_info_as_keyword(wrap: Any) -> None:
    """An app may pass ``exc_info`` by keyword, as servers allow it."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            raise OSError
        except OSError:
            start_response("500 Oh", [("Content-Type", "text/plain")], exc_info=sys.exc_info())
        return [b"sorry"]

    answer = ask(wrap(app))
    assert (answer.status, answer.body, answer.error) == ("500 Oh", b"sorry", None)


def test_the_count_is_bounded_by_content_length(wrap: Any, journals: Any) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [*HEADERS, ("Content-Length", "3")])
        return [b"abcdef"]

    ask(wrap(app))
    assert journals.sent() == [3]


@pytest.mark.parametrize("length", ["many", "-3", "٣", "3" * 5000, ""])
def test_invalid_content_length_ignored(wrap: Any, journals: Any, length: str) -> None:
    """An invalid Content-Length does not limit the count."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [*HEADERS, ("Content-Length", length)])
        return [b"abcdef"]

    assert ask(wrap(app)).body == b"abcdef"
    assert journals.sent() == [6]


# Files.


def wrapped_file(path: Path, *, seek: int = 0, length: int | None = None, name: str | None = None) -> Any:
    """An app that sends a file by the server's wrapper, from *seek* on."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        file = path.open("rb")
        file.seek(seek)
        start_response("200 OK", HEADERS if length is None else [*HEADERS, ("Content-Length", str(length))])
        wrapper = environ["wsgi.file_wrapper"]
        return wrapper(file, 4096) if name is None else wrapper(file, **{name: 4096})

    return app


gunicorns = pytest.mark.parametrize(
    "wrapper", [FileWrapper, OldFileWrapper], ids=["gunicorn", "old gunicorn"]
)


@gunicorns
def test_gunicorn_gets_own_file_wrapper(wrap: Any, journals: Any, film: Path, wrapper: Any) -> None:
    """gunicorn gets its own file wrapper back, and the count is exact."""
    environ = request()
    app = wrap(wrapped_file(film, length=len(FILM)))
    seen: list[Any] = []

    def server_side(environ: dict[str, Any], start_response: Any) -> Any:
        seen.append(app(environ, start_response))
        return seen[0]

    answer = as_gunicorn(server_side, environ, wrapper=wrapper)
    assert answer.body == FILM
    assert type(seen[0]) is wrapper
    assert environ["wsgi.file_wrapper"] is wrapper
    assert journals.sent() == [len(FILM)]


@gunicorns
def test_gunicorn_disconnect_counts_kernel_bytes(
    wrap: Any, journals: Any, tmp_path: Path, wrapper: Any
) -> None:
    """If gunicorn's client disconnects, the count is what the kernel accepted."""
    large = tmp_path / "large.mp4"
    large.write_bytes(FILM * 40)
    answer = as_gunicorn(wrap(wrapped_file(large)), request(), read=100_000, wrapper=wrapper)
    assert isinstance(answer.error, OSError)
    (sent,) = journals.sent()
    assert len(answer.body) <= sent < large.stat().st_size


@gunicorns
def test_file_from_middle_counts_sent(wrap: Any, journals: Any, film: Path, wrapper: Any) -> None:
    """A file that is sent from its middle counts only the bytes that are sent."""
    answer = as_gunicorn(wrap(wrapped_file(film, seek=200_000)), request(), wrapper=wrapper)
    assert answer.body == FILM[200_000:]
    assert journals.sent() == [len(FILM) - 200_000]


@often
@given(
    seek=st.integers(0, len(FILM) - 1),
    sends=st.none() | st.lists(st.integers(0, 1000), max_size=5),
    told=st.booleans(),
)
def test_waitress_seeks_count_sent_bytes(
    wrap: Any, journals: Any, film: Path, seek: int, sends: list[int] | None, told: bool
) -> None:
    """waitress reads, seeks back and skips in the file, and the count is what it sent."""
    before = len(journals.closed())
    app = wrap(wrapped_file(film, seek=seek, length=len(FILM) - seek if told else None))
    answer = as_waitress(app, request(), sends=sends)
    expected = FILM[seek:] if sends is None else answer.body
    assert answer.body == expected
    assert journals.sent()[before:] == [len(expected)]


@pytest.mark.parametrize(
    ("serve", "name"), [(as_gunicorn, "blksize"), (as_waitress, "block_size")], ids=["gunicorn", "waitress"]
)
def test_block_size_as_keyword(wrap: Any, journals: Any, film: Path, serve: Any, name: str) -> None:
    """An app may pass the block size by the keyword of the server's own wrapper."""
    assert serve(wrap(wrapped_file(film, name=name)), request()).body == FILM
    assert journals.sent() == [len(FILM)]


def test_file_like_object_counts_reads(wrap: Any, journals: Any) -> None:
    """A file-like object without a descriptor is counted by the bytes that were read from it."""

    class Pipe:
        """Can be read, and nothing else."""

        def __init__(self) -> None:
            self.read = io.BytesIO(FILM).read

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return environ["wsgi.file_wrapper"](Pipe())

    environ = request(**{"wsgi.file_wrapper": FileWrapper})
    body = wrap(app)(environ, lambda *head: None)
    assert type(body) is FileWrapper
    assert b"".join(body) == FILM  # as gunicorn does where there is no fileno()
    body.close()
    assert journals.sent() == [len(FILM)]


def test_wrapper_inside_other_body(wrap: Any, journals: Any, film: Path) -> None:
    """A file wrapper inside another body counts only what that body yields."""
    inner = wrapped_file(film)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        wrapper = inner(environ, start_response)

        def half() -> Iterator[bytes]:
            yield next(iter(wrapper))
            wrapper.close()
            wrapper.close()

        return half()

    answer = as_gunicorn(wrap(app), request())
    assert answer.body == FILM[:4096]
    assert journals.sent() == [4096]


def test_unreturned_file_wrapper_counts_nothing(wrap: Any, journals: Any, film: Path) -> None:
    """A file that the app wrapped but did not return counts nothing."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        environ["wsgi.file_wrapper"](film.open("rb")).close()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"no film today"]

    assert as_gunicorn(wrap(app), request()).body == b"no film today"
    assert journals.files() == []


# uWSGI: its wrapper hands back the file, and sends the descriptor from C in the request's own thread.


@pytest.fixture
def in_uwsgi(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def running(**options: bytes) -> None:
        from types import SimpleNamespace

        opt = {name.replace("_", "-"): value for name, value in options.items()}
        monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(opt=opt, connection_fd=lambda: -1))

    yield running


def uwsgi_wrapper(file: Any, size: int = 0) -> Any:
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="the thread's account is Linux's")
def test_uwsgi_sendfile_uses_thread_account(
    wrap: Any, journals: Any, film: Path, tmp_path: Path, in_uwsgi: Any
) -> None:
    """uWSGI's sendfile is counted by the kernel's I/O account of the thread."""
    import os

    in_uwsgi()
    environ = request(**{"wsgi.file_wrapper": uwsgi_wrapper})
    body = wrap(wrapped_file(film))(environ, lambda *head: None)
    with (tmp_path / "client").open("wb") as client:
        assert os.sendfile(client.fileno(), body.fileno(), 0, 100_000) == 100_000
    body.close()
    assert journals.sent() == [100_000]


@pytest.mark.skipif(sys.platform != "linux", reason="the thread's account is Linux's")
def test_uwsgi_close_in_other_thread(wrap: Any, journals: Any, film: Path, in_uwsgi: Any) -> None:
    """If uWSGI closes the file in another thread, nothing is counted rather than a wrong number."""
    in_uwsgi()
    body = wrap(wrapped_file(film))(request(**{"wsgi.file_wrapper": uwsgi_wrapper}), lambda *head: None)
    closer = threading.Thread(target=body.close)
    closer.start()
    closer.join()
    assert journals.sent() == [0]


# Flask's send_file, on each server.


@pytest.fixture
def site(film: Path) -> Flask:
    site = Flask(__name__)

    @site.get("/film.mp4")
    def send() -> Response:
        return send_file(film, conditional="etag" not in flask_request.args)

    return site


RANGES = {
    "whole": (None, "200 OK", 0, FILM),
    "from the start": ("bytes=0-", "206 PARTIAL CONTENT", 0, FILM),
    "from the middle": ("bytes=100000-", "206 PARTIAL CONTENT", 100_000, FILM[100_000:]),
    "a piece": ("bytes=1000-200999", "206 PARTIAL CONTENT", 1000, FILM[1000:201_000]),
    "the end": ("bytes=-500", "206 PARTIAL CONTENT", len(FILM) - 500, FILM[-500:]),
}


# werkzeug leaves files to the garbage collector where the wrapper is an old gunicorn's, with us as without.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asked", RANGES)
@pytest.mark.parametrize(
    "serve",
    [as_gunicorn, lambda app, environ: as_gunicorn(app, environ, wrapper=OldFileWrapper), as_waitress, ask],
    ids=["gunicorn", "old gunicorn", "waitress", "no wrapper"],
)
def test_flask_send_file_counted_exactly(
    wrap: Any, journals: Any, site: Flask, serve: Any, asked: str
) -> None:
    """Flask's ``send_file`` gives the same answer as without the middleware, and the count is exact."""
    header, status, first, content = RANGES[asked]
    more = {} if header is None else {"HTTP_RANGE": header}
    bare = serve(site.wsgi_app, request(**more))
    answer = serve(wrap(site.wsgi_app), request(**more))
    assert (answer.status, answer.body) == (status, content)
    without_date = [pair for pair in answer.headers if pair[0] != "Date"]
    assert without_date == [pair for pair in bare.headers if pair[0] != "Date"]
    assert journals.sent() == [len(content)]
    (opening,) = journals.opened()
    assert opening.part == (first, first + len(content) - 1, len(FILM))


def test_unsatisfiable_range_not_counted(wrap: Any, journals: Any, site: Flask) -> None:
    """A range that can't be satisfied (status 416) is not counted."""
    assert ask(wrap(site.wsgi_app), request(HTTP_RANGE="bytes=999999999-")).status == (
        "416 REQUESTED RANGE NOT SATISFIABLE"
    )
    assert journals.files() == []


def test_not_modified_film_not_counted(wrap: Any, journals: Any, site: Flask) -> None:
    """A film that the client already has (status 304) is not counted."""
    app = wrap(site.wsgi_app)
    etag = dict(ask(site.wsgi_app).headers)["ETag"]
    answer = ask(app, request(HTTP_IF_NONE_MATCH=etag))
    assert (answer.status, answer.body) == ("304 NOT MODIFIED", b"")
    assert journals.files() == []


@pytest.mark.parametrize("option", ["offload_threads", "gevent", "async", "asyncio", "ugreen"])
def test_uwsgi_sending_elsewhere_gets_blocks(
    wrap: Any, journals: Any, film: Path, in_uwsgi: Any, option: str
) -> None:
    """Without a connection that the kernel can be asked about, a file that leaves in another thread is iterated."""
    in_uwsgi(**{option: b"1"})
    app = wrap(wrapped_file(film, length=len(FILM)))
    assert ask(app, request(**{"wsgi.file_wrapper": uwsgi_wrapper})).body == FILM
    assert journals.sent() == [len(FILM)]


def test_uwsgi_with_unreadable_account(
    wrap: Any, journals: Any, film: Path, in_uwsgi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that changed its user can't read its own account; the file is then iterated."""

    def refused() -> bytes:
        raise PermissionError

    in_uwsgi()
    monkeypatch.setattr(files, "_thread_io", refused)
    app = wrap(wrapped_file(film, length=len(FILM)))
    assert ask(app, request(**{"wsgi.file_wrapper": uwsgi_wrapper})).body == FILM
    assert journals.sent() == [len(FILM)]


# Ways in which a body ends.


class Ends:
    """Remembers what a counted body reports."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []

    progress_at = 1

    def progress(self, counted: int, unsent: int = 0) -> int:
        return counted + 1

    def end(self, counted: int, offered: int) -> None:
        self.ended.append((counted, offered))

    def drop(self, counted: int, offered: int) -> None:
        self.end(counted, offered)


def handed_on(body: Any) -> Iterator[bytes]:
    """What an outer middleware does that is written as a generator (werkzeug's debugger)."""
    yield from body


@pytest.mark.parametrize("made", [Chunks, list, iter], ids=["iterator", "list", "list iterator"])
def test_closed_outer_generator_ends_count(made: Any) -> None:
    """The app's close() runs as often as without us, and the count ends."""
    bare, own, ends = made([b"ab", b"c"]), made([b"ab", b"c"]), Ends()
    for body in (bare, counted_iterable(own, ends)):
        outer = handed_on(body)
        next(outer)
        outer.close()  # type: ignore[attr-defined]
    assert getattr(own, "closed", 0) == getattr(bare, "closed", 0)
    assert ends.ended == [(0, 2)]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_dropped_body_ends_count(taken: int) -> None:
    """A server or bridge that never closes: the count ends, and nothing of the app is closed that would not be."""
    own, ends = Chunks([b"ab", b"c", b"d"]), Ends()
    body = counted_iterable(own, ends)
    chunks = iter(body)
    for _ in range(taken):
        next(chunks)
    del chunks, body
    assert own.closed == 0
    assert ends.ended == [[(0, 0), (0, 2), (2, 3)][taken]]


def test_last_chunk_ends_count() -> None:
    """A body that was read to its end has ended, though something still holds it."""
    ends = Ends()
    body = counted_iterable(Chunks([b"ab", b"c"]), ends)
    assert list(body) == [b"ab", b"c"]
    assert ends.ended == [(3, 3)]


def test_each_close_reaches_app() -> None:
    """A server that closes twice closes the app's body twice, as without us; the count ends once."""
    own, ends = Chunks([b"ab"]), Ends()
    body = counted_iterable(own, ends)
    body.close()
    body.close()
    assert own.closed == 2
    assert ends.ended == [(0, 0)]


def test_failing_iter_fails_at_once() -> None:
    """A body whose iter() fails does so when the server asks for its iterator, as without us."""

    class Fails:
        def __iter__(self) -> Iterator[bytes]:
            raise LookupError("no body today")

    ends = Ends()
    with pytest.raises(LookupError):
        iter(counted_iterable(Fails(), ends))


ODD_CHUNKS = [
    (bytearray(b"ab"), 2),
    (memoryview(b"cde"), 3),
    (memoryview(array("I", [1, 2, 3])), 12),
    (array("H", [1, 2]), 4),
    ("text", 4),
    (None, 0),
    (7, 0),
]


@pytest.mark.parametrize(("chunk", "size"), ODD_CHUNKS, ids=lambda value: type(value).__name__)
def test_odd_chunks_pass_unchanged(chunk: Any, size: int) -> None:
    """Chunks of any type are handed on as they are, and bytes-like ones count in bytes."""
    ends = Ends()
    body = counted_iterable([b"", chunk], ends)
    assert list(body)[1] is chunk
    assert ends.ended == [(size, size)]
