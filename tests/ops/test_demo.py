"""The demo, as a newcomer starts it: from any folder, also from a clone of this project; and what its page is told."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.flask_app import HERE
from t23_middleware.ops.demo_site import BURST, FILM, ThrottledBody, media_path
from t23_middleware.ops.demo_strips import MAX_RANGES, MAX_VIEWINGS, ViewingRows
from t23_middleware.state import StateFolder
from t23_middleware.transfer import Part, Progress

from ..harness import CLIP_BYTES, MEDIA, until
from ..relay.writers import MS, alive, journal, opening, transfer
from .demos import Demo, demo

FILM_URL = media_path(FILM)
FILM_BYTES = (HERE / "film.mp4").stat().st_size


def test_demo_runs_from_a_clone(tmp_path: Path):
    """The demo runs from a clone, shows a report and leaves no file behind.

    gunicorn searches its start folder first, where a clone has the package, but not its example.
    """
    clone = tmp_path / "clone"
    (clone / "t23_middleware").mkdir(parents=True)
    (clone / "t23_middleware" / "__init__.py").write_text("raise ImportError('this is the clone')\n")
    with demo(tmp_path / "demo", cwd=clone) as running:
        _, body = running.ask(f"{MEDIA}?session_id=newcomer&photo_id=7")
        assert len(body) == CLIP_BYTES
        assert until(lambda: f"{CLIP_BYTES:,} bytes, skip 0" in running.output), running.output
    assert running.process.returncode == 0, running.output
    assert list(running.temporary.iterdir()) == []


def test_demo_ctrl_c_while_streaming(tmp_path: Path):
    """Ctrl-C ends all of the demo soon, also while a player loads the film and the API is down."""
    with demo(tmp_path / "demo") as running:
        assert running.turn("down") == 200
        running.ask(f"{MEDIA}?session_id=waits&photo_id=7")
        assert until(lambda: running.state()["figures"]["waiting"] == 1)
        with socket.create_connection(("127.0.0.1", running.port)) as player:
            player.sendall(f"GET {FILM_URL}?session_id=plays&rate=20000 HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert player.recv(1000)
            assert running.end() == 0, running.output
    assert "Traceback" not in running.output
    assert list(running.temporary.iterdir()) == []


def test_demo_port_in_use(tmp_path: Path):
    """A port that is in use ends the demo with exit code 2 and one sentence."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = Demo(tmp_path / "demo", "--port", str(port))
        assert running.process.wait(30) == 2
    assert running.output.startswith(f"t23-middleware: port {port} can't be used")
    assert "choose another with --port" in running.output
    assert running.output.count("\n") == 1


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One demo for what leaves it as it was."""
    with demo(tmp_path_factory.mktemp("demo") / "demo") as running:
        yield running


def test_demo_shows_stream_and_report(running: Demo):
    """The page's state shows how a stream grows and how its report arrives.

    The test streams for a second, at a speed at which the whole film would take minutes.
    """
    with socket.create_connection(("127.0.0.1", running.port)) as player:
        player.sendall(
            f"GET {FILM_URL}?session_id=growing-up&rate=30000 HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        )
        assert until(lambda: _bars(running, "grow…")), running.state()
        first = _bars(running, "grow…")[0]
        assert first["open"] and first["size"] == FILM_BYTES
        assert until(lambda: BURST < _bars(running, "grow…")[0]["sent"] < FILM_BYTES)
    assert until(lambda: _rows(running, "grow…", "sent")), running.state()
    [bar], [row] = _bars(running, "grow…"), _rows(running, "grow…", "sent")
    assert not bar["open"]
    assert (bar["sent"], bar["skip"]) == (row["bytes"], row["skip"])
    assert row["skip"] == 0 and row["took"] >= 0


@pytest.mark.parametrize("condition", ["deny", "hang", "down"])
def test_demo_delivers_after_outage(running: Demo, condition: str):
    """A report that waits for an API that is off is delivered when the API is back."""
    assert running.turn(condition) == 200
    assert running.state()["api"]["is"] == condition
    session = f"{condition}-session"
    running.ask(f"{MEDIA}?session_id={session}&photo_id=7")
    masked = f"{session[:4]}…"
    assert until(lambda: _rows(running, masked, "waiting", "asking")), running.state()
    assert not _rows(running, masked, "sent")
    assert running.state()["figures"]["waiting"] == 1
    assert running.turn("well") == 200
    assert until(lambda: _rows(running, masked, "sent")), running.state()
    assert until(lambda: running.state()["figures"]["waiting"] == 0)


def test_demo_delivers_after_quick_switches(running: Demo):
    """A report is delivered also to an API that is switched off and on several times at once."""
    running.turn("deny")
    running.ask(f"{MEDIA}?session_id=flickering&photo_id=7")
    assert until(lambda: "Paused" in running.state()["state"][0]), running.state()
    for condition in ("well", "deny", "well", "down", "well"):
        assert running.turn(condition) == 200
    assert until(lambda: _rows(running, "flic…", "sent")), running.state()


def test_demo_counts_open_streams_not_drawn(running: Demo):
    """All open streams are counted, also those that the page does not draw."""
    players = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(MAX_VIEWINGS + 2)]
    try:
        for number, player in enumerate(players):
            request = f"GET {FILM_URL}?session_id=crowd-{number}&rate=20000 HTTP/1.1\r\nHost: a\r\n\r\n"
            player.sendall(request.encode())
        assert until(lambda: running.state()["figures"]["open"] == MAX_VIEWINGS + 2), running.state()
        assert len(running.state()["viewings"]) == MAX_VIEWINGS
    finally:
        for player in players:
            player.close()
    assert until(lambda: running.state()["figures"]["open"] == 0), running.state()


def test_demo_api_switch_needs_json(running: Demo):
    """Only a well-formed JSON request, as the page's own script sends it, switches the API."""
    before = running.state()["api"]["is"]
    for body, kind, status in (
        ("is=down", "application/x-www-form-urlencoded", 415),
        ('{"is": "down"}', "text/plain", 415),
        ('{"is": "gone"}', "application/json", 400),
        ('["down"]', "application/json", 400),
        ("{", "application/json", 400),
        ("", "application/json", 400),
    ):
        assert running.ask("/demo/api", body, Content_Type=kind)[0].status == status, body
    assert running.state()["api"]["is"] == before
    assert running.ask("/demo/api")[0].status == 404
    assert running.ask("/", "x")[0].status == 405


@pytest.mark.parametrize(
    "marks",
    [
        {"Host": "rebound.evil.example:PORT", "Origin": "http://rebound.evil.example:PORT"},
        {"Host": "evil"},
        {"Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
    ids=str,
)
def test_web_sites_page_turns_nothing(running: Demo, marks: dict[str, str]):
    """Nor does it get the page, what is shown there, or a play."""
    before = running.state()["api"]["is"]
    headers = {name: value.replace("PORT", str(running.port)) for name, value in marks.items()}
    asked = running.ask("/demo/api", '{"is": "down"}', Content_Type="application/json", **headers)
    assert asked[0].status == 403
    for path in ("/", "/demo/state.json"):
        assert running.ask(path, **headers)[0].status == 403
    if marks != {"Host": "evil"}:
        assert running.ask(f"{MEDIA}?session_id=foreign&photo_id=7", **headers)[0].status == 403
    assert running.state()["api"]["is"] == before


def test_demo_page_files_and_headers(running: Demo):
    """The page and its files have security headers and load nothing from other sites."""
    for path, kind in (
        ("/", "text/html"),
        ("/demo/page.css", "text/css"),
        ("/demo/page.js", "text/javascript"),
        ("/demo/poster.svg", "image/svg+xml"),
    ):
        answer, body = running.ask(path)
        assert answer.status == 200
        assert answer.headers.get_content_type() == kind
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body
    assert running.ask("/demo/demo_page.py")[0].status == 404
    assert running.ask("/demo/%20%22")[0].status == 404


def test_demo_session_per_page_load(running: Demo):
    """Each load of the page is a viewing with its own session. No state and no output shows a whole session."""
    pages = [running.ask("/")[1].decode() for _ in range(2)]
    sessions = [page.partition("session_id=")[2].partition("&")[0] for page in pages]
    assert len(sessions[0]) >= 20 and sessions[0] != sessions[1]
    running.ask(f"{MEDIA}?session_id={sessions[0]}&photo_id=7")
    assert until(lambda: _rows(running, f"{sessions[0][:4]}…", "sent"))
    assert sessions[0] not in json.dumps(running.state())
    assert sessions[0] not in running.output


def test_demo_row_per_simultaneous_report(running: Demo):
    """Each report that one viewing makes at the same time has its own row."""
    call = f"/api/analytics/report/play?session_id=one-moment&photo_id=7&time={time.time_ns() // MS}"
    for said in ("bytes_total=5&skip=0", "bytes_total=5&skip=1", "bytes_total=6&skip=1"):
        assert running.ask(f"{call}&{said}", port=running.api_port)[0].status == 200
    assert until(lambda: len(_rows(running, "one-…", "sent")) == 3)
    assert len({row["id"] for row in _rows(running, "one-…", "sent")}) == 3


def test_what_is_told_is_bounded(running: Demo):
    for number in range(40):
        running.ask(f"{MEDIA}?session_id=many-{number}&photo_id=7", Range="bytes=0-999")
    assert until(lambda: running.state()["figures"]["sent"] >= 40)
    state = running.state()
    assert len(state["viewings"]) == MAX_VIEWINGS
    assert len(state["reports"]) == 30


def test_demo_film_whole_and_by_range(running: Demo):
    """Without a rate, the film is sent at full speed, whole or by Range."""
    assert len(running.ask(f"{FILM_URL}?session_id=a&photo_id=7")[1]) == FILM_BYTES
    answer, body = running.ask(FILM_URL, Range="bytes=1000-1999")
    assert (answer.status, len(body)) == (206, 1000)
    assert FILM_BYTES <= 3_000_000
    assert running.ask("/cookie")[0].status == 200, "the example's own pages are there too"


def test_throttled_body_keeps_its_rate(monkeypatch: pytest.MonkeyPatch):
    """A throttled body sends its first burst at once, then keeps its rate."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    chunks = [b"." * 1024] * (BURST // 1024 + 100)
    assert list(ThrottledBody(chunks, 1024)) == chunks
    assert now[0] == pytest.approx(100)


def _bars(running: Demo, session: str) -> list[dict[str, object]]:
    return [bar for each in running.state()["viewings"] if each["session"] == session for bar in each["bars"]]


def _rows(running: Demo, session: str, *states: str) -> list[dict[str, object]]:
    rows = running.state()["reports"]
    return [row for row in rows if row["session"] == session and row["is"] in states]


# Strips, from journals.

MIB = 1 << 20
SECOND = 1000 * MS


def _asked(number: int, at_ns: int, first: int, session: str = "s"):
    """A Range to the end of a file of 4 MiB."""
    part = Part(first, 4 * MIB - 1, 4 * MIB)
    return opening(number, at_ns, session)._replace(part=part, status=206, length=4 * MIB - first)


def _over(number: int, at_ns: int, first: int, sent: int, seconds: int = 3, session: str = "s"):
    started = _asked(number, at_ns - seconds * SECOND, first, session)
    return started, transfer(number, at_ns)._replace(opening=started, sent=sent)


def _drawn(rows: ViewingRows) -> list[list[tuple[int, int, int, bool, bool]]]:
    """For each viewing its ranges: first, sent, skip, jump, open."""
    return [
        [(each.first, each.sent, each.skip, each.jump, each.ended_ms is None) for each in row.ranges]
        for row in rows
    ]


def test_strips_mark_scrubs(state: Path):
    """A range is marked as a scrub only where the player jumped to it from elsewhere in the file."""
    folder, now = StateFolder(state), time.monotonic_ns() - 60 * SECOND
    journal(
        folder,
        "writer",
        *_over(1, now, 0, MIB),
        *_over(2, now + 5 * SECOND, 3 * MIB, MIB // 2),
        *_over(3, now + 10 * SECOND, MIB, MIB // 2),
        *_over(4, now + 20 * SECOND, 0, MIB),
    )
    rows = ViewingRows(folder)
    rows.follow()
    assert _drawn(rows) == [
        [
            (0, MIB, 0, False, False),
            (3 * MIB, MIB // 2, 1, True, False),
            (MIB, MIB // 2, 1, False, False),
        ],
        [(0, MIB, 0, False, False)],
    ], "what goes on where the first one ended is no scrub, and from byte 0 on it is another viewing"


def test_strips_end_with_worker(state: Path):
    """An open response grows with its progress, and ends when its worker has ended."""
    folder, now = StateFolder(state), time.monotonic_ns() - 10 * SECOND
    started = _asked(1, now, 0)
    lines = started, Progress(started, now + SECOND, started.started_ms + 1000, MIB)
    rows = ViewingRows(folder)
    folder.create()
    with alive(folder, "writer"):
        journal(folder, "writer", *lines)
        rows.follow()
        assert _drawn(rows) == [[(0, MIB, 0, False, True)]]

    def ended() -> bool:
        rows.follow()
        return _drawn(rows) == [[(0, MIB, 0, False, False)]]

    assert until(ended), _drawn(rows)


def test_what_was_not_played_is_not_drawn(state: Path):
    folder, now = StateFolder(state), time.monotonic_ns() - 10 * SECOND
    probe = opening(1, now)._replace(part=Part(0, 1, 4 * MIB), status=206, length=2)
    journal(folder, "writer", probe, transfer(1, now)._replace(opening=probe, sent=2), *_over(2, now, 0, 0))
    rows = ViewingRows(folder)
    rows.follow()
    assert _drawn(rows) == []


def test_viewings_and_ranges_are_bounded(state: Path):
    folder, now = StateFolder(state), time.monotonic_ns() - 60 * SECOND
    lines = []
    for number in range(2 * MAX_RANGES):
        lines += _over(number, now + number * MS, 0 if number == 0 else MIB + number, 10_000, session="same")
    for number in range(2 * MAX_VIEWINGS):
        lines += _over(9000 + number, now + SECOND, 0, MIB, session=f"other-{number}")
    path = journal(folder, "writer", *lines[: 4 * MAX_RANGES])
    rows = ViewingRows(folder)
    rows.follow()
    assert [len(ranges) for ranges in _drawn(rows)] == [MAX_RANGES]
    path.unlink()
    journal(folder, "writer", *lines[4 * MAX_RANGES :], sequence=1)
    rows.follow()
    assert len(_drawn(rows)) == MAX_VIEWINGS
    assert [path.name for path in folder.journals.glob("*.journal")] == ["writer.000001.journal"]
