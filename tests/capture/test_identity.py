"""Who plays what: as it comes out at the journal's end."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from flask import Flask, Response, session
from flask import request as flask_request
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from itsdangerous import Signer

from t23_middleware import Settings, sign_session
from t23_middleware.capture.identity import Identifier, NotCounted
from t23_middleware.transfer import Play

from .servers import ask, media, request

LONG = "x" * 257


def identifier(**arguments: Any) -> Identifier:
    return Identifier(Settings(environ={}, **{"api_url": "https://video.example.com", **arguments}))


def play(query: str = "", cookie: str = "", path: str = "/film.mp4", /, **arguments: Any) -> Play:
    """The play of a request; ``environ`` holds more of its environ."""
    more = arguments.pop("environ", {})
    environ = request(path, query, HTTP_COOKIE=cookie, **more)
    reader = identifier(**arguments)
    assert reader.missing(environ, path) is None, "what names a play must pass the first look"
    return reader.identify(environ, path)


def reason(query: str = "", cookie: str = "", path: str = "/film.mp4", /, **arguments: Any) -> str:
    """Why a request is not counted."""
    more = arguments.pop("environ", {})
    with pytest.raises(NotCounted) as caught:
        identifier(**arguments).identify(request(path, query, HTTP_COOKIE=cookie, **more), path)
    return str(caught.value)


# Where session and photo stand.


def test_session_and_photo_from_query() -> None:
    """Session and photo are read from the query."""
    assert play("session_id=abc&photo_id=12") == Play("abc", "12")


def test_session_and_photo_are_read_from_cookies() -> None:
    assert play("", "session_id=abc; photo_id=12") == Play("abc", "12")


def test_the_query_wins_over_the_cookie() -> None:
    assert play("session_id=q&photo_id=1", "session_id=c; photo_id=2")[:2] == ("q", "1")


def test_empty_parameter_uses_cookie() -> None:
    """If a parameter is empty, the cookie counts."""
    assert play("session_id=&photo_id=", "session_id=c; photo_id=2")[:2] == ("c", "2")


def test_names_are_tried_in_their_order() -> None:
    names = {"session_param": "first,second", "session_cookie": "one,two"}
    assert play("second=2&first=1&photo_id=7", **names).session_id == "1"
    assert play("second=2&photo_id=7", **names).session_id == "2"
    assert play("photo_id=7", "two=b; one=a", **names).session_id == "a"
    assert play("photo_id=7", "two=b", **names).session_id == "b"
    assert play("second=2&photo_id=7", "one=a", **names).session_id == "2"


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("session_id=a&photo_id=1&photo_id=2", "bad_photo"),
        ("photo_id=1&session_id=a&photo%5fid=2", "bad_photo"),
        ("session_id=a&photo_id=1&photo_id=1&photo_id=2", "bad_photo"),
        ("session_id=a&photo_id=&photo_id=2", "bad_photo"),
        ("session_id=a&photo_id=7&photo_id=07", "bad_photo"),
        ("session_id=a&session_id=b&photo_id=1", "bad_session"),
        ("session_id=a&session_id=&photo_id=1", "bad_session"),
        ("session_id=a&session%5Fid=a+&photo_id=1", "bad_session"),
    ],
)
def test_two_values_name_no_play(query: str, why: str) -> None:
    """Frameworks differ in which of two values they serve, so neither can be believed."""
    assert reason(query, "session_id=c; photo_id=3") == why


def test_two_equal_values_are_one() -> None:
    """What is said twice is no contradiction, however it is encoded."""
    query = "session_id=a+b&photo_id=1&photo%5fid=%31&session_id=a%20b"
    assert play(query)[:2] == ("a b", "1")


def test_two_names_are_no_contradiction() -> None:
    """Only a name that is read counts: of several names the first, and none where the app has said it."""
    names = {"session_param": "first,second"}
    assert play("second=2&first=1&second=3&photo_id=7", **names).session_id == "1"
    assert reason("second=2&second=3&photo_id=7", **names) == "bad_session"
    said = {"t23.session_id": "app", "t23.photo_id": "9"}
    assert play("session_id=a&session_id=b&photo_id=1&photo_id=2", environ=said)[:2] == ("app", "9")


def test_what_names_no_play_may_contradict() -> None:
    """The first value of other parameters is taken."""
    assert play("session_id=a&photo_id=7&skip=1&skip=0&x=1&x=2").skip == 1


def test_names_and_values_may_be_percent_encoded() -> None:
    assert play("session%5fid=a%2Bb+c&photo%5Fid=12")[:2] == ("a+b c", "12")


def test_photo_source_order() -> None:
    """The photo is read from the query, else from the path, else from the cookie."""
    pattern = {"photo_pattern": r"^/films/(?P<photo_id>\d+)"}
    assert play("session_id=a&photo_id=1", "photo_id=3", "/films/2", **pattern).photo_id == "1"
    assert play("session_id=a", "photo_id=3", "/films/2", **pattern).photo_id == "2"
    assert play("session_id=a", "photo_id=3", "/other", **pattern).photo_id == "3"
    assert reason("session_id=a", "", "/other", **pattern) == "no_photo"


def test_pattern_without_group_match() -> None:
    """A pattern that matches without its group names no photo."""
    assert (
        reason("session_id=a", "", "/live", photo_pattern=r"^/(?:films/(?P<photo_id>\d+)|live)") == "no_photo"
    )


@pytest.mark.parametrize(
    ("path", "photo"),
    [
        (
            "/49543331/54202478/dfc90ad8eaf93453562ed3961e565a5f/video_medium/nyheder-1000-28-07-2019-video.mp4",
            "54202478",
        ),
        ("/9826383/10357633/a5865685bedff3d06215fdf40b4c41e6/video_medium/mr-skanning-video.mp4", "10357633"),
        ("/889267/921928/ebb723ef1026f39f5d12dea18973916f/video_medium/vejret-video.mp4", "921928"),
        ("/889267/960015/adef4ccb213fcc14bc678589e6ff5855/video_medium/download-video.mp4", "960015"),
        (
            "/16107561/18266890/64073bd582b4e2a5187b3846f498aed6/video_medium/alpha-trailer-video.mp4",
            "18266890",
        ),
        ("/64968558/68466727/66ccc7bb55115becf719e373b887792b/video_medium/a-video.mp4", "68466727"),
        (
            "/64968558/71884487/f01f75dc68c0080b0fc5a5322bc69a21/video_1080p/the-design-history-of-noita-10-video.mp4",
            "71884487",
        ),
        ("/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime/video_hd/download-video.mp4", "60433"),
        ("/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime/audio/song-audio.mp3", "60433"),
        ("/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime/video_hd", "60433"),
        ("/7340/60433/12345678901234567890123456789012/video_hd/a-video.mp4", "60433"),
        ("/attachment/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime/video_hd/download-video.mp4", "60433"),
    ],
)
def test_the_twentythree_pattern_knows_real_media_urls(path: str, photo: str) -> None:
    assert play("session_id=a", "", path, photo_pattern="twentythree").photo_id == photo


@pytest.mark.parametrize(
    "path",
    [
        "/video/54202478",
        "/photo/54202478/nyheder",
        "/secret/54202478/dfc90ad8eaf93453562ed3961e565a5f",
        "/v.ihtml/player.html",
        "/9826383.ihtml/player.html",
        "/live/60433",
        "/2026/11/24/a.mp4",
        "/2026/11/24/video/a.mp4",
        "/films/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime/video_hd/a-video.mp4",
        "/attachment/video/60433",
        "/7340/60433/zoyZt0ugycplufdd4eiiaaJhwxgkpime",
        "/7340/sixty/zoyZt0ugycplufdd4eiiaaJhwxgkpime/video_hd/a-video.mp4",
    ],
)
def test_the_twentythree_pattern_takes_nothing_else(path: str) -> None:
    assert reason("session_id=a", "", path, photo_pattern="twentythree") == "no_photo"


# What can't be believed.


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("photo_id=7", "no_session"),
        ("session_id=&photo_id=7", "no_session"),
        (f"session_id={LONG}&photo_id=7", "bad_session"),
        ("session_id=a%0D%0Ab&photo_id=7", "bad_session"),
        ("session_id=a%00&photo_id=7", "bad_session"),
        ("session_id=a%E2%80%A8b&photo_id=7", "bad_session"),
        ("session_id=%FF%FE&photo_id=7", "bad_session"),
        ("session_id=%ED%A0%80&photo_id=7", "bad_session"),
        ("session_id=a", "no_photo"),
        ("session_id=a&photo_id=", "no_photo"),
        ("session_id=a&photo_id=seven", "bad_photo"),
        ("session_id=a&photo_id=-7", "bad_photo"),
        ("session_id=a&photo_id=7%0A", "bad_photo"),
        ("session_id=a&photo_id=%D9%A7", "bad_photo"),  # a digit, but an Arabic one
        ("session_id=a&photo_id=7.5", "bad_photo"),
        ("session_id=a&photo_id=" + "7" * 21, "bad_photo"),
    ],
)
def test_invalid_identity_counted_by_reason(query: str, why: str) -> None:
    """A request with an invalid session or photo is not counted as a play, and its reason has a name."""
    assert reason(query) == why


def test_longest_session_has_256_characters() -> None:
    """The longest session that is accepted has 256 characters."""
    assert play(f"session_id={LONG[1:]}&photo_id=7").session_id == LONG[1:]


def test_foreign_cookie_with_invalid_utf8() -> None:
    """A foreign cookie that is not UTF-8 affects neither the query nor other cookies."""
    assert play("session_id=a&photo_id=7", "tracker=\xff\xfe").session_id == "a"
    assert play("photo_id=7", "tracker=\xff; session_id=b").session_id == "b"
    assert reason("photo_id=7", "session_id=\xff\xfe") == "bad_session"


@given(
    st.text(st.characters(max_codepoint=255), max_size=60),
    st.text(st.characters(max_codepoint=255), max_size=60),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_is_play_or_not(query: str, cookie: str) -> None:
    """With any content of query and cookie, a request is a valid play or not counted; nothing else is raised."""
    reader = identifier(session_secret="", photo_pattern="twentythree")
    for asked in (query, f"session_id={query}&photo_id={cookie}"):
        environ = request(query=asked, HTTP_COOKIE=f"session_id={cookie}; {cookie}")
        reader.missing(environ, "/")
        try:
            found = reader.identify(environ, "/")
        except NotCounted:
            continue
        assert 0 < len(found.session_id) <= 256
        assert found.session_id.isprintable()
        assert found.photo_id.isdecimal()


# What is not ASCII.


def as_wsgi(text: str | bytes) -> str:
    """*text* as a server hands it on: its bytes as Latin-1."""
    return (text if isinstance(text, bytes) else text.encode()).decode("latin-1")


def test_raw_utf8_names_what_it_says() -> None:
    """Values and names alike, wherever they stand."""
    assert play(as_wsgi("session_id=zoë&photo_id=7")).session_id == "zoë"
    assert play(as_wsgi("sitzung_ä=zoë&photo_id=7"), session_param="sitzung_ä").session_id == "zoë"
    assert play("sitzung_%C3%A4=%7Ao&photo_id=7", session_param="sitzung_ä").session_id == "zo"
    assert play(as_wsgi("session_id=a&größe=7"), photo_param="größe").photo_id == "7"
    assert play(as_wsgi("session_id=a&photo_id=7&user_player_version=β2")).player_version == "β2"
    pattern = {"photo_pattern": r"^/größe/(?P<photo_id>\d+)"}
    assert play("session_id=a", "", as_wsgi("/größe/7"), **pattern).photo_id == "7"


QUERIES = {
    "raw UTF-8": b"session_id=zo\xc3\xab&photo_id=7",
    "percent": b"session_id=zo%C3%AB&photo_id=7",
    "both": b"x=\xc3\xab&session_id=zo%C3%AB&photo_id=7",
    "raw Latin-1": b"session_id=zo\xeb&photo_id=7",
    "mixed": b"x=\xeb&session_id=zo\xc3\xab&photo_id=7",
    "two values": b"session_id=zo&session_id=zo\xc3\xab&photo_id=7",
    "bad percent": b"session_id=zo%EB&photo_id=7",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("framework", ["flask", "django"])
def test_frameworks_read_the_same(wrap: Any, journals: Any, framework: str, query: bytes) -> None:
    """What an app reads is what is reported, through a socket; bytes that two frameworks read apart are no play."""
    app = {"flask": flask_that_says, "django": django_that_says}[framework]()
    head, _, body = served(wrap(app), b"GET /film.mp4?" + query + b" HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    if b" 200 " not in head.splitlines()[0] or query in (QUERIES["two values"], QUERIES["bad percent"]):
        assert journals.closed() == []
    else:
        (transfer,) = journals.closed()
        assert transfer.opening.play == Play(body.decode(), "7")
    assert framework == "flask" or b" 200 " in head.splitlines()[0]


def flask_that_says() -> Any:
    app = Flask(__name__)
    app.config["PROPAGATE_EXCEPTIONS"] = False

    @app.get("/film.mp4")
    def film() -> Response:
        return Response(flask_request.args["session_id"], mimetype="video/mp4")

    return app.wsgi_app


def django_that_says() -> Any:
    import django
    from django.conf import settings as django_settings
    from django.core.handlers.wsgi import WSGIRequest
    from django.http import HttpResponse

    if not django_settings.configured:
        django_settings.configure()
        django.setup()

    def app(environ: Any, start_response: Any) -> Any:
        said = HttpResponse(WSGIRequest(environ).GET["session_id"], content_type="video/mp4")
        start_response("200 OK", list(said.items()))
        return [said.content]

    return app


def served(app: Any, message: bytes) -> bytes:
    """The answer of wsgiref's server to *message*: it lets bytes through that gunicorn and waitress refuse."""
    with (
        make_server("127.0.0.1", 0, app, handler_class=Quiet) as server,
        socket.create_connection(server.server_address) as client,
    ):
        client.sendall(message)
        server.handle_request()
        return b"".join(iter(lambda: client.recv(65536), b""))


class Quiet(WSGIRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


# Signed sessions.


def test_signed_session_without_signature() -> None:
    """A signed session is reported without its signature."""
    for session_id in ("abc", "a.b.c", "é"):
        signed = sign_session(session_id, "key")
        assert play(f"session_id={signed}&photo_id=7", session_secret="key").session_id == session_id


def test_a_signed_session_may_come_by_cookie() -> None:
    cookie = f"session_id={sign_session('abc', 'key')}"
    assert play("photo_id=7", cookie, session_secret="key").session_id == "abc"


def test_session_key_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rotation of keys, the newest key signs, and signatures of older keys are still accepted."""
    keys = {"session_secret": "new,old"}
    assert play(f"session_id={sign_session('a', 'old')}&photo_id=7", **keys).session_id == "a"
    monkeypatch.setenv("T23_SESSION_SECRET", "new,old")
    assert sign_session("a") == sign_session("a", "new") != sign_session("a", "old")
    assert play(f"session_id={sign_session('a')}&photo_id=7", session_secret="new").session_id == "a"


@pytest.mark.parametrize(
    "forged",
    [
        "abc",
        "abc.",
        ".abc",
        sign_session("abc", "other"),
        sign_session("abc", "key")[:-1],
        "abd" + sign_session("abc", "key")[3:],
        Signer("key").sign("abc").decode(),  # signed with our key, for another purpose
    ],
)
def test_a_forged_session_is_not_counted(forged: str) -> None:
    assert reason(f"session_id={forged}&photo_id=7", session_secret="key") == "bad_signature"


def test_signed_session_empty_or_too_long() -> None:
    """A signed session that is empty or too long is not counted either."""
    assert reason(f"session_id={sign_session('', 'key')}&photo_id=7", session_secret="key") == "no_session"
    assert reason(f"session_id={sign_session(LONG, 'key')}&photo_id=7", session_secret="key") == "bad_session"


def test_session_key_not_utf8() -> None:
    """A key that is not UTF-8 signs and verifies."""
    key = b"\xff\xfekey".decode("utf-8", "surrogateescape")  # as os.environ hands it out
    assert play(f"session_id={sign_session('abc', key)}&photo_id=7", session_secret=key).session_id == "abc"


@pytest.mark.parametrize("session_id", ["s-9", "a.b", "7.s", "é", "9.7.s"])
def test_signature_binds_the_photo(session_id: str) -> None:
    named = {"session_secret": "key", "photo_pattern": r"^/films/(?P<photo_id>[0-9]+)"}
    signed = sign_session(session_id, "key", photo_id=7)
    assert play(f"session_id={signed}&photo_id=7", **named)[:2] == (session_id, "7")
    assert play(f"session_id={signed}", "", "/films/7", **named)[:2] == (session_id, "7")
    assert play(f"session_id={signed}", "photo_id=7", **named)[:2] == (session_id, "7")
    for query, cookie, path in (
        (f"session_id={signed}&photo_id=8", "", "/film"),
        (f"session_id={signed}&photo_id=8", "photo_id=7", "/films/7"),
        (f"session_id={signed}", "", "/films/70"),
        (f"session_id={signed}&photo_id=07", "", "/film"),
    ):
        assert reason(query, cookie, path, **named) == "bad_signature"


def test_photo_can_not_move_into_session() -> None:
    """The two signatures differ, so neither stands for the other, and no dot moves from one part to the other."""
    seal = sign_session("s", "key", photo_id="7").rpartition(".")[2]
    for forged in (f"7.s.{seal}", f"s.{seal}x", sign_session("7.s", "key").removeprefix("7.")):
        assert reason(f"session_id={forged}&photo_id=7", session_secret="key") == "bad_signature"
    assert reason(f"session_id={sign_session('s', 'key', photo_id='7')}", session_secret="key") == "no_photo"


def test_older_key_binds_photo_too() -> None:
    signed = sign_session("s", "old", photo_id=7)
    assert play(f"session_id={signed}&photo_id=7", session_secret="new,old").session_id == "s"
    assert reason(f"session_id={signed}&photo_id=7", session_secret="new") == "bad_signature"


@pytest.mark.parametrize("photo", ["", "seven", "7.1", "-7", "7" * 21, "٧"])
def test_signing_refuses_what_is_no_photo(photo: str) -> None:
    with pytest.raises(ValueError, match="photo_id .* is not a photo"):
        sign_session("s", "key", photo_id=photo)


# What the URL has no say in.


def test_none_takes_places_from_the_search() -> None:
    assert reason("session_id=a&photo_id=7", session_param="none") == "no_session"
    assert play("session_id=a&photo_id=7", "session_id=c", session_param="none").session_id == "c"
    assert reason("photo_id=7", "session_id=c", session_cookie="None") == "no_session"
    assert reason("session_id=a&photo_id=7", "photo_id=8", photo_param="none") == "no_photo"
    path = {"photo_param": "none", "photo_pattern": r"^/(?P<photo_id>[0-9]+)"}
    assert play("session_id=a&photo_id=7", "photo_id=8", "/9", **path).photo_id == "9"
    inside = {"session_param": "none", "session_cookie": "none", "flask_secret_key": "key"}
    cookie = flask_cookie("key", session_id="abc")
    assert play("session_id=a&photo_id=7", f"session_id=c; {cookie}", **inside).session_id == "abc"
    assert reason("session_id=a&photo_id=7", "session_id=c", **inside) == "no_session"
    named = {"environ": {"t23.session_id": "app", "t23.photo_id": 9}}
    nowhere = {"session_param": "none", "session_cookie": "none", "photo_param": "none"}
    assert play("session_id=a&photo_id=7", **nowhere, **named)[:2] == ("app", "9")


def test_first_look_knows_none_too() -> None:
    reader = identifier(session_param="none", session_cookie="none", photo_param="none")
    assert reader.missing(request(query="session_id=a&photo_id=7"), "/film") == "no_session"
    environ = request(query="photo_id=7", HTTP_COOKIE="photo_id=7", **{"t23.session_id": "a"})
    assert reader.missing(environ, "/film") == "no_photo"


def test_distrusted_url_says_neither_skip_nor_player() -> None:
    query = (
        "session_id=a&photo_id=7&skip=1&user_player_type=x&user_player_version=1&user_player_resolution=1x1"
    )
    assert play(query, trust_url=False) == Play("a", "7")
    assert play(query, trust_url="0", player_type="html5") == Play("a", "7", player_type="html5")
    assert play(query, trust_url="0", environ={"t23.skip": 0}).skip == 0
    assert play(query).skip == 1


def test_signing_without_key() -> None:
    """Signing without a key raises an error that names the setting to set."""
    from t23_middleware import ConfigurationError

    with pytest.raises(ConfigurationError, match="T23_SESSION_SECRET is not set"):
        sign_session("abc")


# Flask's own session cookie.


def flask_cookie(secret: str | bytes, **values: Any) -> str:
    """The session cookie that a real Flask app sets."""
    app = Flask(__name__)
    app.secret_key = secret

    @app.get("/")
    def login() -> str:
        session.update(values)
        return "welcome"

    header = app.test_client().get("/").headers["Set-Cookie"]
    return header.partition(";")[0]


@pytest.mark.parametrize("secret", ["key", b"\xff\xfe key"], ids=["text", "bytes"])
def test_session_from_flask_cookie(secret: str | bytes) -> None:
    """The session is read from inside Flask's own session cookie."""
    cookie = flask_cookie(secret, session_id="abc", other={"a": [1]})
    assert play("photo_id=7", cookie, flask_secret_key=secret).session_id == "abc"


def test_flask_cookie_and_key_names() -> None:
    """The names of Flask's session cookie and of the key inside it can be set."""
    cookie = flask_cookie("key", user="u1", filler="long enough to be compressed " * 50)
    renamed = "site" + cookie.removeprefix("session")
    named = {"flask_secret_key": "key", "flask_session_cookie": "site", "flask_session_key": "user"}
    assert play("photo_id=7", renamed, **named).session_id == "u1"


def test_unsigned_never_beats_flasks_session() -> None:
    """What a viewer writes into the URL or a cookie of its own counts only where Flask's cookie holds no session."""
    cookie, named = flask_cookie("key", session_id="flask"), {"flask_secret_key": "key"}
    assert play("session_id=query&photo_id=7", cookie, **named).session_id == "flask"
    assert play("photo_id=7", f"session_id=own; {cookie}", **named).session_id == "flask"
    assert play("session_id=query&photo_id=7", flask_cookie("key", other=1), **named).session_id == "query"
    assert play("session_id=query&photo_id=7", "", **named).session_id == "query"
    unusable = flask_cookie("key", session_id="a\nb")
    assert reason("session_id=query&photo_id=7", unusable, **named) == "bad_session"


def test_unsigned_never_beats_signed_session() -> None:
    """In whatever order they stand, and wherever."""
    signed, named = sign_session("s-9", "key"), {"session_secret": "key", "session_param": "first,second"}
    assert play("first=forged&photo_id=7", f"session_id={signed}", **named).session_id == "s-9"
    assert play(f"first=forged.x&second={signed}&photo_id=7", **named).session_id == "s-9"
    two = {**named, "session_cookie": "one,two"}
    assert play("photo_id=7", f"one=forged; two={signed}", **two).session_id == "s-9"
    assert reason("first=forged&photo_id=7", "session_id=forged", **named) == "bad_signature"


def test_flasks_session_counts_beside_signed_ones() -> None:
    keys, cookie = (
        {"session_secret": "key", "flask_secret_key": "flask"},
        flask_cookie("flask", session_id="inside"),
    )
    assert play(f"session_id={sign_session('s-9', 'key')}&photo_id=7", cookie, **keys).session_id == "s-9"
    assert play("session_id=forged&photo_id=7", cookie, **keys).session_id == "inside"
    assert reason("session_id=forged&photo_id=7", "session=forged", **keys) == "bad_signature"
    assert reason("photo_id=7", "session=forged", **keys) == "bad_signature"
    assert reason("session_id=forged&photo_id=7", "", **keys) == "bad_signature"


def test_number_in_flask_session() -> None:
    """A number inside Flask's session is accepted as a session."""
    assert play("photo_id=7", flask_cookie("key", session_id=42), flask_secret_key="key").session_id == "42"


@pytest.mark.parametrize(
    ("cookie", "why"),
    [
        ("", "no_session"),
        ("session=", "no_session"),
        ("session=garbage", "bad_signature"),
        ("session=..", "bad_signature"),
        ("session=.eJw.x.y", "bad_signature"),
        ("session=\xff\xff", "bad_signature"),
        (flask_cookie("other", session_id="abc"), "bad_signature"),
        (flask_cookie("key", session_id="abc")[:-1], "bad_signature"),
        (flask_cookie("key", user="abc"), "no_session"),
        (flask_cookie("key", session_id=["abc"]), "no_session"),
        (flask_cookie("key", session_id=""), "no_session"),
        (flask_cookie("key", session_id="a\nb"), "bad_session"),
    ],
    ids=range(12),
)
def test_invalid_flask_cookie_not_counted(cookie: str, why: str) -> None:
    """A Flask cookie without a valid session is not counted, and the reason is named."""
    assert reason("photo_id=7", cookie, flask_secret_key="key") == why


# skip, the player, the host.


@pytest.mark.parametrize(
    ("query", "environ", "skip"),
    [
        ("", {}, None),
        ("&skip=0", {}, 0),
        ("&skip=1", {}, 1),
        ("&skip=2", {}, None),
        ("&skip=", {}, None),
        ("&skip=%31", {}, 1),
        ("&skip=1", {"t23.skip": 0}, 0),
        ("&skip=0", {"t23.skip": "1"}, 1),
        ("&skip=0", {"t23.skip": True}, 1),
        ("&skip=1", {"t23.skip": None}, 1),
        ("", {"t23.skip": "perhaps"}, None),
    ],
)
def test_skip_from_app_then_url(query: str, environ: dict[str, Any], skip: int | None) -> None:
    """``skip`` comes from the app, else from the URL."""
    assert play("session_id=a&photo_id=7" + query, environ=environ).skip == skip


def test_the_player_is_read_from_the_query() -> None:
    found = play(
        "session_id=a&photo_id=7&user_player_type=html5&user_player_version=1.2&user_player_resolution=640x360"
    )
    assert (found.player_type, found.player_version, found.player_resolution) == ("html5", "1.2", "640x360")


def test_default_player_type() -> None:
    """The player type of the settings is used only if the request names no player type."""
    assert play("session_id=a&photo_id=7", player_type="app").player_type == "app"
    assert play("session_id=a&photo_id=7&user_player_type=html5", player_type="app").player_type == "html5"


@pytest.mark.parametrize(
    ("dest", "query", "setting", "player_type"),
    [
        ("video", "", None, "html5"),
        ("audio", "", None, "html5"),
        ("video", "&user_player_type=flash", None, "flash"),
        ("video", "", "app", "app"),
        ("video", "&user_player_type=", None, "html5"),
        ("video", "&user_player_type=" + "x" * 101, None, "html5"),
        ("document", "", None, None),
        ("empty", "", None, None),  # what a page's script fetches
        ("", "", None, None),
    ],
)
def test_a_media_element_is_html5(
    dest: str, query: str, setting: str | None, player_type: str | None
) -> None:
    """Browsers say so in Sec-Fetch-Dest; the URL and the operator know better."""
    more = {} if setting is None else {"player_type": setting}
    found = play("session_id=a&photo_id=7" + query, environ={"HTTP_SEC_FETCH_DEST": dest}, **more)
    assert found.player_type == player_type


@pytest.mark.parametrize("said", ["", "x" * 101, "a%0D%0Ab", "a%00b"])
def test_invalid_player_left_out(said: str) -> None:
    """An invalid value of the player is left out of the report."""
    assert play(f"session_id=a&photo_id=7&user_player_version={said}").player_version is None


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("video.example.com", "video.example.com"),
        ("video.example.com:8080", "video.example.com"),
        ("Video.Example.COM", "video.example.com"),
        ("video.example.com.", "video.example.com"),
        ("video.example.com.:80", "video.example.com"),
    ],
)
def test_allowed_host_names_site(host: str, site: str) -> None:
    """The host of the request names the site if the settings allow that host."""
    found = play(
        "session_id=a&photo_id=7",
        environ={"HTTP_HOST": host},
        api_url="https://{host}",
        hosts="video.example.com",
    )
    assert found.host == site


@pytest.mark.parametrize(
    "host",
    [
        "evil.example.com",
        "video.example.com.evil.org",
        "[::1]",
        "[::1]:80",
        "me@video.example.com",
        "video.example.com:port",
        "video.example.com/..",
        "video.example.com\r\nX: y",
        ":80",
        " ",
    ],
)
def test_other_hosts_are_not_counted(host: str) -> None:
    query = "session_id=a&photo_id=7"
    named = {"api_url": "https://{host}", "hosts": "video.example.com", "environ": {"HTTP_HOST": host}}
    assert reason(query, **named) == "foreign_host"


def test_missing_host_uses_server_name() -> None:
    """Without a Host header, the server's own name counts."""
    environ = {"HTTP_HOST": "", "SERVER_NAME": "video.example.com"}
    named = {"api_url": "https://{host}", "hosts": "video.example.com", "environ": environ}
    assert play("session_id=a&photo_id=7", **named).host == "video.example.com"


def test_host_left_out_for_one_site() -> None:
    """The host is not reported if all reports go to one site."""
    assert play("session_id=a&photo_id=7", environ={"HTTP_HOST": "evil.example.com"}).host == ""


# Overruled by the app, or by what stands before us.


def overruling(**said: Any) -> Callable[..., Any]:
    """An app that overrules us during its call."""
    inner = media(b"film")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        environ.update({f"t23.{name}": value for name, value in said.items()})
        return inner(environ, start_response)

    return app


def test_app_overrules_identity_during_call(wrap: Any, journals: Any) -> None:
    """The app can overrule session, photo and skip during its call."""
    ask(
        wrap(overruling(session_id="app", photo_id=99, skip=1)),
        request(query="session_id=a&photo_id=7&skip=0"),
    )
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play("app", "99", skip=1)


def test_app_names_play_itself(wrap: Any, journals: Any) -> None:
    """The app may name a play that the request does not name."""
    session_id = uuid.uuid4()
    ask(wrap(overruling(session_id=session_id, photo_id="99")), request(query=""))
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play(str(session_id), "99")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"session_id": ""}, "no_session"),
        ({"session_id": "a\r\nb"}, "bad_session"),
        ({"photo_id": ""}, "no_photo"),
        ({"photo_id": "seven"}, "bad_photo"),
    ],
    ids=str,
)
def test_app_overrules_with_invalid_values(wrap: Any, journals: Any, said: dict[str, str], why: str) -> None:
    """If the app overrules with an invalid value, there is no report, and the reason is counted."""
    app = wrap(
        lambda environ, start_response: (overruling(**said) if bad else media(b"film"))(
            environ, start_response
        )
    )
    bad = True
    assert ask(app).body == b"film"
    bad = False
    ask(app)  # the counter rides with the next line
    assert journals.sent() == [4]
    assert journals.counts() == {why: 1}


def test_app_ignores_response(wrap: Any, journals: Any) -> None:
    """If the app sets ``t23.ignore``, there is no report and no counter."""
    ask(wrap(overruling(ignore=True)))
    assert journals.files() == []


def test_what_stands_before_us_overrules_too(wrap: Any, journals: Any) -> None:
    environ = request(query="", **{"t23.session_id": "outer", "t23.photo_id": "5"})
    ask(wrap(media(b"film")), environ)
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play("outer", "5")


def test_a_client_can_not_overrule_by_header(wrap: Any, journals: Any) -> None:
    ask(wrap(media(b"film")), request(HTTP_T23_SESSION_ID="evil", HTTP_T23_IGNORE="1"))
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play("s1", "7")


def test_injected_values_change_nothing(wrap: Any, journals: Any) -> None:
    """``bytes_total`` in the URL and line breaks in values change nothing in the report."""
    query = "session_id=s1&photo_id=7&bytes_total=1&time=1&user_player_type=a%0D%0AX-Evil:1&raw=%0A"
    ask(
        wrap(media(b"film")),
        request(query=query, HTTP_USER_AGENT="a\r\nX-Evil: 1", HTTP_RANGE="bytes=0-\r\n1"),
    )
    (transfer,) = journals.closed()
    assert transfer.sent == 4
    assert transfer.opening.play == Play("s1", "7")
    assert b"Evil" not in b"".join(file.read_bytes() for file in journals.files())


def test_path_before_app_changes_it(wrap: Any, journals: Any) -> None:
    """The path counts as the server received it, although the app shortens it."""
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    mounted = DispatcherMiddleware(media(b"none", kind="text/plain"), {"/films": media(b"film")})
    app = wrap(mounted, photo_pattern=r"^/films/(?P<photo_id>[0-9]+)")
    ask(app, request("/films/12", "session_id=a"))
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play("a", "12")


def test_flask_app_reports_its_session(wrap: Any, journals: Any) -> None:
    """A Flask app reports the session inside its own cookie."""
    site = Flask(__name__)
    site.secret_key = "key"

    @site.get("/login")
    def login() -> str:
        session["session_id"] = "flask-1"
        return "welcome"

    @site.get("/film")
    def film() -> Response:
        return Response(b"film", mimetype="video/mp4")

    site.wsgi_app = wrap(site.wsgi_app, flask_secret_key="key")  # type: ignore[method-assign]
    client = site.test_client()
    client.get("/login")
    with client.get("/film?photo_id=7") as answer:
        assert answer.data == b"film"
    (transfer,) = journals.closed()
    assert transfer.opening.play == Play("flask-1", "7")
