"""Behind a proxy whose log counts: what the app's side says to the proxy and to the relay."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.transfer import APP, OFFLOADED, PROXY, Part, play_id

from .servers import Answer, ask, media, request

LOG = "/var/log/nginx/t23.log"
OFFLOADS = [
    "X-Accel-Redirect",
    "x-accel-redirect",
    "X-Sendfile",
    "X-Lighttpd-Send-File",
    "X-LiteSpeed-Location",
    "X-Reproxy-URL",
]


def ids(answer: Answer) -> list[str]:
    return [value for name, value in answer.headers if name.lower() == "x-t23-play"]


def offloading(header: str = "X-Accel-Redirect", status: str = "200 OK", kind: str = "text/html") -> Any:
    """An app that leaves the file to the proxy."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response(status, [("Content-Type", kind), (header, "/protected/film.mp4")])
        return [b""]

    return app


def test_response_carries_journal_id(wrap, journals):
    """A counted response carries the id of its journal line in a header for the proxy."""
    site = wrap(media(b"film"), proxy_log=LOG)
    answers = [ask(site) for _ in range(2)]
    (writer,) = journals.writers()
    assert [ids(answer) for answer in answers] == [[play_id(writer.name, 1)], [play_id(writer.name, 2)]]
    assert [opening.counted_by for opening in journals.opened()] == [PROXY, PROXY]
    assert [(transfer.opening.counted_by, transfer.sent) for transfer in journals.closed()] == [
        (PROXY, 4)
    ] * 2


@pytest.mark.parametrize(
    ("path", "asked", "named"),
    [
        ("/film.mp4", "bytes=0-9,20-29", True),
        ("/film", "bytes=0-9,20-29", True),
        ("/leaflet.pdf", "bytes=0-9,20-29", False),
        ("/leaflet.pdf", "bytes=0-9", True),  # the log will say its type
        ("/film.m3u8", "bytes=0-9,20-29", False),
        ("/film.mpd", None, False),
    ],
)
def test_several_ranges_left_to_it(wrap, journals, path, asked, named):
    """The log of several ranges names no type, so the path decides before it."""
    more = {} if asked is None else {"HTTP_RANGE": asked}
    answer = ask(wrap(offloading(), proxy_log=LOG), request(path, **more))
    assert len(ids(answer)) == len(journals.opened()) == int(named)


def test_only_id_header_is_added(wrap):
    """Except for that header, the answer is the same as without the middleware."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "video/mp4"), ("X-Own", "1"), ("Content-Length", "4")])
        return [b"film"]

    bare, named = ask(app), ask(wrap(app, proxy_log=LOG))
    assert named.headers[:-1] == bare.headers
    assert (named.status, named.body) == (bare.status, bare.body)


def test_without_a_log_nothing_is_added(wrap, journals):
    given: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        given.append([("Content-Type", "video/mp4")])
        start_response("200 OK", given[-1])
        return [b"film"]

    got: list[Any] = []
    body = wrap(app)(request(), lambda status, headers, exc_info=None: got.append(headers))
    body.close()
    assert got[0] is given[0]
    assert [opening.counted_by for opening in journals.opened()] == [APP]


@pytest.mark.parametrize(
    "app, query",
    [
        (media(b"film"), "photo_id=7"),
        (media(b"film"), "session_id=s1"),
        (media(b"film"), "session_id=s1&photo_id=none"),
        (media(b"image", kind="image/jpeg"), "session_id=s1&photo_id=7"),
        (media(b"lost", status="404 Not Found"), "session_id=s1&photo_id=7"),
        (offloading(), "photo_id=7"),
        (offloading(), "session_id=s1"),
    ],
)
def test_what_is_not_counted_is_not_named(wrap, journals, app, query):
    answer = ask(wrap(app, proxy_log=LOG), request(query=query))
    assert ids(answer) == []
    assert journals.opened() == []


@pytest.mark.parametrize("header", OFFLOADS)
def test_offloaded_file_counted_by_proxy(wrap, journals, header):
    """A file that the app leaves to the proxy carries an id, and only the proxy counts it."""
    answer = ask(wrap(offloading(header), proxy_log=LOG))
    (transfer,) = journals.closed()
    assert ids(answer) == [play_id(journals.writers()[0].name, 1)]
    assert (transfer.opening.counted_by, transfer.sent) == (OFFLOADED, 0)
    assert (transfer.opening.status, transfer.opening.part) == (200, Part(0, None, None))


@pytest.mark.parametrize(
    "asked, status, part",
    [
        ("bytes=1000-", 206, Part(1000, None, None)),
        ("bytes=1000-1999", 206, Part(1000, 1999, None)),
        ("bytes=-500", 206, Part(None, None, None)),
        ("bytes=99999999999999999999-", 206, Part(None, None, None)),
        ("furlongs=1-2", 206, Part(None, None, None)),
    ],
)
def test_offloaded_file_records_asked_range(wrap, journals, asked, status, part):
    """Of a file that is left to the proxy, only the range that was asked for is known."""
    ask(wrap(offloading(status="204 No Content"), proxy_log=LOG), request(HTTP_RANGE=asked))
    (opening,) = journals.opened()
    assert (opening.status, opening.part, opening.length) == (status, part, None)


def test_offloaded_body_passes_unchanged(wrap):
    """The body of an offloaded response is the very object that the app returned."""
    own = [b"nothing"]

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "video/mp4"), ("X-Accel-Redirect", "/protected/film.mp4")])
        return own

    assert wrap(app, proxy_log=LOG)(request(), lambda *given: None) is own


@pytest.mark.parametrize("header", OFFLOADS)
def test_offloaded_without_log_counted(wrap, journals, header):
    """Without a proxy log, an offloaded play is counted as ``offloaded`` at once."""
    answer = ask(wrap(offloading(header, kind="video/mp4")))
    assert ids(answer) == []
    assert journals.counts() == {"offloaded": 1}, "no line may ever follow that this could ride with"
    assert journals.opened() == []


@pytest.mark.parametrize("query", ["photo_id=7", "session_id=s1", "session_id=s1&photo_id=none", ""])
def test_offload_without_play_not_counted(wrap, journals, query):
    """An offloaded response that names no play is not counted as ``offloaded``."""
    site = wrap(offloading())
    ask(site, request(query=query))
    ask(wrap(media(b"film")))
    assert journals.counts()["offloaded"] == 0


def test_offload_of_segment_or_ignored(wrap, journals):
    """A segment, or a response that the app wants ignored, is not counted as ``offloaded``."""
    site = wrap(offloading())
    ask(site, request(path="/part.ts"))
    ask(site, request(**{"t23.ignore": True}))
    assert journals.lines() == []


def test_app_overrules_offloaded_file(wrap, journals):
    """The values with which the app overrules the play count for an offloaded file too."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ.update({"t23.session_id": "own", "t23.photo_id": "9"})
        return offloading()(environ, start_response)  # type: ignore[no-any-return]

    ask(wrap(app, proxy_log=LOG), request(query=""))
    assert journals.opened()[0].play[:2] == ("own", "9")


# What goes out in its place.


def test_error_page_has_no_id(wrap, journals):
    """An error page in place of media has no id, and the relay need not wait for the proxy's line."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "video/mp4")])
        try:
            raise OSError("the disk")
        except OSError:
            start_response("500 Oh", [("Content-Type", "text/html")], sys.exc_info())
        return [b"sorry"]

    answer = ask(wrap(app, proxy_log=LOG))
    assert (answer.status, ids(answer)) == ("500 Oh", [])
    (transfer,) = journals.closed()
    assert (transfer.opening.counted_by, transfer.sent) == (APP, 0)


def test_media_after_error_has_id(wrap, journals):
    """Media in place of an error page has an id and is counted."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("500 Oh", [("Content-Type", "text/html")])
        try:
            raise OSError("the disk")
        except OSError:
            start_response("200 OK", [("Content-Type", "video/mp4")], sys.exc_info())
        return [b"film"]

    answer = ask(wrap(app, proxy_log=LOG))
    assert ids(answer) == [play_id(journals.writers()[0].name, 1)]
    assert journals.sent() == [4]


def test_raise_before_output(wrap, journals):
    """If the app raises before anything was sent, the relay need not wait for the proxy's line."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "video/mp4")])
        raise ValueError("the app's own")

    with pytest.raises(ValueError, match="the app's own"):
        wrap(app, proxy_log=LOG)(request(), lambda *given: None)
    (transfer,) = journals.closed()
    assert (transfer.opening.counted_by, transfer.sent) == (APP, 0)


def test_raise_after_write_counted_by_proxy(wrap, journals):
    """If the app raises after it wrote, the proxy counts the response."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [("Content-Type", "video/mp4")])
        write(b"film")
        raise ValueError("the app's own")

    with pytest.raises(ValueError, match="the app's own"):
        wrap(app, proxy_log=LOG)(request(), lambda *given: lambda data: None)
    (transfer,) = journals.closed()
    assert (transfer.opening.counted_by, transfer.sent) == (PROXY, 4)


def test_refused_headers_reach_app(wrap, journals):
    """If the server refuses the headers, the app gets that exception."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            start_response("200 OK", [("Content-Type", "video/mp4"), ("Bad", "\n")])
        except ValueError:
            start_response("500 Oh", [("Content-Type", "text/plain")])
        return [b"sorry"]

    told: list[tuple[str, list[str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        if any("\n" in value for _, value in headers):
            raise ValueError("a header that is none")
        told.append((status, [name for name, _ in headers]))

    body = wrap(app, proxy_log=LOG)(request(), start_response)
    assert list(body) == [b"sorry"]
    assert told == [("500 Oh", ["Content-Type"])]


def test_a_generator_that_starts_late_is_named(wrap, journals):
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "video/mp4")])
        yield b"fi"
        yield b"lm"

    answer = ask(wrap(app, proxy_log=LOG))
    assert answer.body == b"film"
    assert ids(answer) == [play_id(journals.writers()[0].name, 1)]
    assert [(each.opening.counted_by, each.sent) for each in journals.closed()] == [(PROXY, 4)]


def test_journal_removed_during_response(wrap: Callable[..., Any], journals, monkeypatch):
    """A response whose journal was removed meanwhile is left to its open line; it has no close line."""
    monkeypatch.setattr("t23_middleware.journal.CHECK_EVERY", 0.0)
    site = wrap(media(b"film"), proxy_log=LOG)
    body = site(request(), lambda *given: None)
    (former,) = journals.files()
    former.unlink()
    ask(site)  # begins anew, under another name
    assert list(body) == [b"film"]
    body.close()
    assert [transfer.opening.number for transfer in journals.closed()] == [2]


# The proxy that is seen.


@pytest.mark.parametrize("header", ["HTTP_X_FORWARDED_FOR", "HTTP_VIA"])
def test_proxy_counted_once_per_process(wrap, journals, header):
    """A process counts only once that its requests come through a proxy (``behind_proxy``)."""
    site = wrap(media(b"film"))
    ask(site)
    assert journals.counts() == {}
    for _ in range(3):
        ask(site, request(**{header: "192.0.2.1"}))
    assert journals.counts() == {"behind_proxy": 1}


def test_no_header_stops_proxy_buffering(wrap, tmp_path: Path):
    """No header asks the proxy to stop buffering."""
    for app in (media(b"film"), offloading()):
        answer = ask(wrap(app, proxy_log=LOG))
        assert "x-accel-buffering" not in [name.lower() for name, _ in answer.headers]
