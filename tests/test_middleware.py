"""The middleware as an app's owner meets it: what passes through, what is counted, what it never does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper as WsgirefWrapper
from wsgiref.validate import validator

import pytest
from flask import Flask, Response, send_file
from werkzeug.middleware.lint import LintMiddleware

from t23_middleware import ConfigurationError, Settings, T23Middleware

from .capture.servers import as_gunicorn, as_waitress, ask, media, request

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its WebOb imports cgi
    from webtest import TestApp

FILM = b"film " * 1000
PLAY = "/film.mp4?session_id=s1&photo_id=7"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    return path


# What is counted, through webtest, which lints both sides.


def test_play_has_bytes_and_part(wrap: Any, journals: Any) -> None:
    """A play is counted with its bytes and with the part of the file that was sent."""
    answer = TestApp(wrap(media(b"film", b"film"))).get(PLAY)
    assert answer.body == b"filmfilm"
    (transfer,) = journals.closed()
    assert transfer.sent == 8
    assert transfer.opening.play[:2] == ("s1", "7")
    assert (transfer.opening.status, transfer.opening.length) == (200, 8)
    assert transfer.opening.part == (0, 7, 8)
    assert transfer.opening == journals.opened()[0]
    assert transfer.opening.started_ns <= transfer.ended_ns
    assert transfer.opening.started_ms <= transfer.ended_ms


def test_responses_of_a_writer_are_numbered(wrap: Any, journals: Any) -> None:
    site = TestApp(wrap(media(b"film")))
    for _ in range(3):
        site.get(PLAY)
    assert [opening.number for opening in journals.opened()] == [1, 2, 3]
    assert len(journals.writers()) == 1


@pytest.mark.parametrize("kind", ["video/mp4", "Video/MP4; codecs=avc1", "audio/mpeg", "video/webm"])
def test_media_of_any_kind_is_counted(wrap: Any, journals: Any, kind: str) -> None:
    TestApp(wrap(media(b"film", kind=kind))).get(PLAY)
    assert journals.sent() == [4]


def test_media_types_setting_is_used(wrap: Any, journals: Any) -> None:
    """Other media types are counted if the setting names them, and then only those."""
    site = wrap(media(b"film", kind="application/x-film"), media_types="application/x-film")
    TestApp(site).get(PLAY)
    TestApp(wrap(media(b"film"), media_types="application/x-film")).get(PLAY)
    assert journals.sent() == [4]


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "video/mp4", "application/mxf", "text/html; charset=utf-8"]
)
@pytest.mark.parametrize("types", ["*/*", "*", " video/*, */* "])
def test_all_types_may_be_counted(wrap: Any, journals: Any, kind: str, types: str) -> None:
    """``*/*`` counts whatever names a play."""
    TestApp(wrap(media(b"film", kind=kind), media_types=types)).get(PLAY)
    assert journals.sent() == [4]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("video/mp2t", "/film/7"),
        ("video/iso.segment", "/film/7"),
        ("application/vnd.apple.mpegurl", "/film/7"),
        ("Application/Dash+XML; charset=utf-8", "/film/7"),
        ("application/octet-stream", "/film/7.ts"),
        ("application/octet-stream", "/film/7.m4s"),
        ("text/plain", "/film.m3u8"),
        ("text/xml", "/film.mpd"),
        ("multipart/byteranges; boundary=x", "/film/7.ts"),
    ],
)
def test_all_types_but_segments(wrap: Any, journals: Any, kind: str, path: str) -> None:
    """Segments and playlists of HLS and DASH are left out, whatever is wanted."""
    ask(wrap(media(b"part", kind=kind), media_types="*/*"), request(path))
    assert journals.files() == []


@pytest.mark.parametrize(
    ("path", "types", "counted"),
    [
        ("/film.mp4", None, True),
        ("/FILM.MP4", None, True),
        ("/song.mp3", None, True),
        ("/song.mp3", "video/*", False),
        ("/film", None, True),  # nothing says another type
        ("/", None, True),
        ("/leaflet.pdf", None, False),
        ("/leaflet.pdf", "*/*", True),
        ("/leaflet.pdf", "multipart/byteranges", True),
        ("/poster.jpg", None, False),
    ],
)
def test_several_ranges_of_a_film(
    wrap: Any, journals: Any, path: str, types: str | None, counted: bool
) -> None:
    """Their type stands in the body; the path's ending decides, where it names one."""
    status, kind = "206 Partial Content", "multipart/byteranges; boundary=abc"
    wanted = {} if types is None else {"media_types": types}
    answer = ask(wrap(media(b"--abc", kind=kind, status=status), **wanted), request(path))
    assert answer.body == b"--abc"
    assert journals.sent() == ([5] if counted else [])


@pytest.mark.parametrize(
    ("asked", "first"),
    [("bytes=2-", 2), ("bytes=0-", 0), ("bytes=-1", 3), ("bytes=1-1,3-", 1), ("bytes=x", None), (None, None)],
)
def test_a_range_answered_whole(wrap: Any, journals: Any, asked: str | None, first: int | None) -> None:
    """The journal says what was asked for, and the part that was sent."""
    more = {} if asked is None else {"HTTP_RANGE": asked, "HTTP_IF_RANGE": '"other"'}
    ask(wrap(media(b"film")), request(**more))
    (transfer,) = journals.closed()
    assert transfer.opening.asked_first == first
    assert (transfer.opening.part, transfer.sent) == ((0, 3, 4), 4)


# What passes through.


def untouched(wrap: Any, app: Callable[..., Any], environ: dict[str, Any]) -> bool:
    """Whether the very object that the app returned comes out."""
    made: list[Any] = []

    def inner(environ: dict[str, Any], start_response: Any) -> Any:
        made.append(app(environ, start_response))
        return made[0]

    body = wrap(inner)(environ, lambda *head: lambda data: None)
    return body is made[0]


@pytest.mark.parametrize(
    ("app", "environ"),
    [
        (media(b"page", kind="text/html"), request()),
        (media(b"page", kind="text/html"), request(query="")),
        (media(b"segment", kind="video/mp2t"), request()),
        (media(b"segment", kind="video/iso.segment"), request()),
        (media(b"segment"), request("/film/7.ts")),
        (media(b"segment"), request("/film/7.m4s")),
        (media(b"list", kind="application/vnd.apple.mpegurl"), request("/film.m3u8")),
        (media(b"film"), request(query="photo_id=7")),
        (media(b"film"), request(query="session_id=s1")),
        (media(b"film"), request(query="session_id=s1&photo_id=x")),
        (media(b"film"), request(method="HEAD")),
        (media(b"film"), request(method="POST")),
        (media(b"film"), request(**{"t23.ignore": True})),
        (media(b"gone", status="404 Not Found"), request()),
        (media(b"", status="304 Not Modified"), request()),
        (media(b"", status="416 Range Not Satisfiable"), request()),
        (media(b"made", status="201 Created"), request()),
    ],
)
def test_uncounted_body_passes_unchanged(wrap: Any, journals: Any, app: Any, environ: dict[str, Any]) -> None:
    """A response that is not counted passes through as the very object that the app returned."""
    assert untouched(wrap, app, environ)
    assert journals.files() == []


def test_switched_off_everything_passes_through(wrap: Any, journals: Any) -> None:
    assert untouched(lambda app: wrap(app, enabled=False), media(b"film"), request())
    assert journals.files() == []


@pytest.mark.parametrize("query", ["", "session_id=s1&photo_id=7"])
def test_environ_keys_and_objects_unchanged(wrap: Any, query: str) -> None:
    """The app sees the server's own environ, with the same keys and objects but for ours."""
    environ = request(query=query, **{"wsgi.file_wrapper": WsgirefWrapper})
    before = dict(environ)
    seen: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        seen.append((environ, {key: environ[key] for key in environ if not key.startswith("t23.")}))
        return media(b"film")(environ, start_response)

    ask(wrap(app), environ)
    assert seen[0][0] is environ
    assert seen[0][1] == before
    assert all(seen[0][1][key] is before[key] for key in before)


def test_second_call_with_same_environ(wrap: Any, journals: Any) -> None:
    """An outer middleware may call the app twice with one environ; each answer is counted."""
    app, environ = wrap(media(b"film")), request()
    for _ in range(2):
        body = app(environ, lambda *head: None)
        assert b"".join(body) == b"film"
        body.close()
    assert journals.sent() == [4, 4]


def test_app_that_calls_itself_counts_once(wrap: Any, journals: Any) -> None:
    """An app that forwards to itself within one request streams once."""
    calls: list[int] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return whole(environ, start_response)
        return media(b"film")(environ, start_response)

    whole = wrap(app)
    body = whole(request(), lambda *head: None)
    assert b"".join(body) == b"film"
    body.close()
    assert journals.sent() == [4]


# What apps do wrong stays theirs.


class AppFailed(Exception):
    """The app's own."""


def fails_before(environ: dict[str, Any], start_response: Any) -> Any:
    raise AppFailed


def fails_after(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4")])
    raise AppFailed


def fails_after_write(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4")])(b"film")
    raise AppFailed


def fails_in_body(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "video/mp4")])
    yield b"film"
    raise AppFailed


class _FailsInClose:
    def __iter__(self) -> Iterator[bytes]:
        return iter([b"film"])

    def close(self) -> None:
        raise AppFailed


def fails_in_close(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4")])
    return _FailsInClose()


def fails_in_iter(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4")])

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            raise AppFailed

    return Body()


@pytest.mark.parametrize(
    ("app", "sent"),
    [
        (fails_before, []),
        (fails_after, []),
        (fails_after_write, [4]),
        (fails_in_body, [4]),
        (fails_in_close, [4]),
        (fails_in_iter, [0]),
    ],
)
def test_app_exception_passes_through(wrap: Any, journals: Any, app: Any, sent: list[int]) -> None:
    """An exception of the app passes through, and the bytes that were sent before it are counted."""
    answer = ask(wrap(app))
    assert type(answer.error) is AppFailed
    assert answer.body == ask(app).body
    assert journals.sent() == sent


@pytest.mark.parametrize(
    "headers", [[("Content-Type",)], [None], [(b"Content-Type", b"video/mp4")], [(1, 2)]], ids=str
)
def test_invalid_headers_reach_server(wrap: Any, headers: Any) -> None:
    """Invalid headers are passed on: the server decides about them."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", headers)
        return [b"film"]

    assert ask(wrap(app)).body == b"film"


# Every kind of app, between two linters on each side.


def lists(environ: dict[str, Any], start_response: Any) -> Any:
    return media(FILM)(environ, start_response)


def tuples(environ: dict[str, Any], start_response: Any) -> Any:
    return tuple(lists(environ, start_response))


def generates(environ: dict[str, Any], start_response: Any) -> Any:
    return iter(lists(environ, start_response))


class _Closable:
    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = iter(chunks)

    def __iter__(self) -> _Closable:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks = iter(())


def closes(environ: dict[str, Any], start_response: Any) -> Any:
    return _Closable(lists(environ, start_response))


def starts_late(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    yield from lists(environ, start_response)


def writes(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4")])(FILM)
    return []


def wraps_a_file(environ: dict[str, Any], start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", str(len(FILM)))])
    return environ["wsgi.file_wrapper"](Path(environ["film"]).open("rb"))


def flask_sends(environ: dict[str, Any], start_response: Any) -> Any:
    site = Flask("film")

    @site.get("/film.mp4")
    def send() -> Response:
        return send_file(environ["film"])

    return site(environ, start_response)


KINDS = [lists, tuples, generates, closes, starts_late, writes, wraps_a_file, flask_sends]


# Not wsgiref's inside werkzeug's: it finds fault with the wsgi.input that the other hands on.
@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        (validator, validator),
        (validator, LintMiddleware),
        (validator, None),
        (LintMiddleware, LintMiddleware),
        (LintMiddleware, None),
        (None, validator),
        (None, LintMiddleware),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_linters_on_both_sides_find_nothing(
    wrap: Any, journals: Any, film: Path, kind: Any, inside: Any, outside: Any
) -> None:
    app = wrap(inside(kind) if inside else kind)
    app = outside(app) if outside else app
    environ = request(film=str(film), **{"wsgi.file_wrapper": WsgirefWrapper})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = ask(app, environ)
    assert answer.error is None
    assert answer.body == FILM
    assert journals.sent() == [len(FILM)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("serve", [as_gunicorn, as_waitress], ids=["gunicorn", "waitress"])
def test_app_kinds_on_wrapper_servers(wrap: Any, journals: Any, film: Path, kind: Any, serve: Any) -> None:
    """Every kind of app is answered and counted in full on servers that have a file wrapper."""
    answer = serve(wrap(kind), request(film=str(film)))
    assert answer.error is None
    assert answer.body == FILM
    assert journals.sent() == [len(FILM)]


# Wrapped twice.


def test_wrapped_twice_counts_once(wrap: Any, journals: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An app that is wrapped twice is counted once per response, and one warning is logged."""
    site = wrap(wrap(media(b"film")))
    for _ in range(3):
        assert ask(site).body == b"film"
    assert journals.sent() == [4, 4, 4]
    assert [record.message for record in caplog.records] == [
        "T23Middleware wraps the app twice; only the outer one counts. Remove the inner one"
    ]


# Bad settings.


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_bad_settings_log_one_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With bad settings, the app runs unwrapped and one error names all problems."""
    app = T23Middleware(media(b"film"), timeout="soon", relay="perhaps", nonsense=1)
    for _ in range(3):
        assert ask(app).body == b"film"
    (told,) = errors(caplog)
    for name in ("T23_API_URL", "T23_TIMEOUT", "T23_RELAY", "nonsense"):
        assert name in told


def test_with_bad_settings_nothing_is_touched() -> None:
    assert untouched(T23Middleware, media(b"film"), request())


def test_settings_and_arguments_together_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    given = Settings(environ={}, api_url="https://video.example.com")
    assert ask(T23Middleware(media(b"film"), given, timeout=3)).body == b"film"
    assert len(errors(caplog)) == 1


def test_settings_are_taken_as_they_are(journals: Any, state: Path) -> None:
    given = Settings(environ={}, api_url="https://video.example.com", state_dir=str(state), relay="off")
    ask(T23Middleware(media(b"film"), given))
    assert journals.sent() == [4]


def test_environment_is_read_without_arguments(
    monkeypatch: pytest.MonkeyPatch, journals: Any, state: Path
) -> None:
    """Without settings and arguments, the settings are read from the environment."""
    for name, value in {
        "API_URL": "https://video.example.com",
        "STATE_DIR": str(state),
        "RELAY": "off",
    }.items():
        monkeypatch.setenv(f"T23_{name}", value)
    ask(T23Middleware(media(b"film")))
    assert journals.sent() == [4]


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_switched_off_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A middleware that is switched off logs nothing about other wrong settings."""
    if how == "environment":
        monkeypatch.setenv("T23_ENABLED", "0")
    app = T23Middleware(media(b"film"), **({"enabled": False} if how == "argument" else {}))
    assert ask(app).body == b"film"
    assert caplog.records == []


def test_an_unknown_variable_is_warned_of_once(
    wrap: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("T23_STATE_DIRR", "/tmp")
    app = wrap(media(b"film"))
    ask(app)
    ask(app)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "did you mean T23_STATE_DIR?" in record.message


@pytest.mark.parametrize(
    "secret",
    [
        {"session_secret": b"\xff".decode("utf-8", "surrogateescape")},
        {"flask_secret_key": b"\xff"},
        {"session_secret": ","},
    ],
    ids=["session key", "flask key", "no key"],
)
def test_no_secret_makes_the_constructor_raise(wrap: Any, secret: dict[str, Any]) -> None:
    assert ask(wrap(media(b"film"), **secret)).body == b"film"


# What of ours fails is never the app's.


@pytest.mark.parametrize(
    "broken", ["Identifier.identify", "_Process.begin", "Recorder.this_process", "part_of"]
)
def test_own_fault_only_logged(
    wrap: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """A fault of the middleware itself is logged, and the answer stays the app's."""

    def fault(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    places = {
        "Identifier.identify": "t23_middleware.capture.identity.Identifier.identify",
        "_Process.begin": "t23_middleware.capture.recorder._Process.begin",
        "Recorder.this_process": "t23_middleware.capture.recorder.Recorder.this_process",
        "part_of": "t23_middleware.capture.response.part_of",
    }
    monkeypatch.setattr(places[broken], fault)
    answer = ask(wrap(media(b"film")))
    assert (answer.body, answer.error) == (b"film", None)
    assert any("the app's response is not changed" in told for told in errors(caplog))


def test_own_fault_at_uncounted_request(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the middleware at a request that names no play does not reach the app either."""

    def fault(self: object, name: str) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("t23_middleware.journal.JournalWriter.count", fault)
    assert ask(wrap(media(b"film")), request(query="photo_id=7")).body == b"film"


def test_own_fault_at_response_end(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the middleware at the end of a response does not reach the app either."""

    def fault(self: object, counted: int) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("t23_middleware.capture.recorder.Recording.end", fault)
    answer = ask(wrap(media(b"film")))
    assert (answer.body, answer.error) == (b"film", None)


def test_counters_written_with_next_line(wrap: Any, journals: Any) -> None:
    """Requests that are not counted are added up, and the counters are written with the next journal line."""

    def by_many_writes(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [("Content-Type", "video/mp4")])
        for _ in range(5):
            write(b"film")
        return []

    site = wrap(by_many_writes)
    for query in ("photo_id=7", "photo_id=7", "session_id=s1", "session_id=s1&photo_id=x"):
        ask(site, request(query=query))
    assert journals.files() == []
    ask(site)
    assert journals.counts() == {"no_session": 2, "no_photo": 1, "bad_photo": 1}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_first_request_starts_relay_for_work(
    wrap: Any, state: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The first request of a process, of any kind, starts a relay if work waits."""
    started: list[Path] = []
    monkeypatch.setattr(
        "t23_middleware.capture.launch.start_relay", lambda settings, folder: started.append(folder.path)
    )
    (state / "journals").mkdir(parents=True, mode=0o700)
    (state / "journals" / "1-a.000000.journal").touch()
    app = wrap(media(b"page", kind="text/html"), relay="auto")
    ask(app, request(method=method))
    ask(app, request(method=method))
    assert started == [state]


def test_first_request_without_work_starts_nothing(
    wrap: Any, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request of a process starts no relay if no work waits."""

    def fault(*args: object) -> None:
        raise AssertionError("a relay was started")

    monkeypatch.setattr("t23_middleware.capture.launch.start_relay", fault)
    ask(wrap(media(b"page", kind="text/html"), relay="auto"))
    assert not state.exists()


def test_the_configuration_error_holds_each_problem() -> None:
    error = ConfigurationError(["one", "two"])
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"
