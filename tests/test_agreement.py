"""What page, JSON, metrics and ``status`` say is what a client and the API counted by themselves, whatever failed meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from t23_middleware.ops.standin import StandIn, StandInServer

from .chaos.load import workers_of
from .harness import CLIP_BYTES, MEDIA, PATIENCE, ROOT, Server, running, until
from .ops.pages import TOKEN, Elements

#: All requests for media that are made, but for the few long ones.
REQUESTS = 1000
CLIENTS = 8
MIB = 1 << 20
BIG = 64 * MIB
#: A Range that starts further in never starts a viewing (docs/counting.md).
START = 256 * 1024
REFUSED_PHOTO = "404"

#: The example app with two long films: one leaves as a file, one as a player's pace lets it; answers name their worker.
APP = f"""
import time
from flask import Response, request, send_file
from tests.chaos.app import app

@app.get("/file.mp4")
def file():
    return send_file({{big!r}}, conditional=True)

@app.get("/paced.mp4")
def paced():
    def film():
        for _ in range({BIG} // 262144):
            time.sleep(0.01)
            yield bytes(262144)
    return Response(film(), content_type="video/mp4")
"""


class CountingAPI(StandIn):
    """The stand-in, with a count of its answers, and the sessions of the reports that it refused for good."""

    def __init__(self) -> None:
        super().__init__(unknown_photos={REFUSED_PHOTO})
        self.answers: Counter[str] = Counter()
        self.refused: set[str] = set()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        form = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(form)
        statuses: list[str] = []

        def started(status: str, headers: Any, *error: Any) -> Any:
            statuses.append(status)
            return start_response(status, headers, *error)

        body = b""
        for piece in super().__call__(environ, started):
            body += piece
            yield piece
        self._count(statuses[0], body, form)

    def _count(self, status: str, body: bytes, form: bytes) -> None:
        if b"no_such_photo" in body:
            self.answers["refused"] += 1
            self.refused.add(re.search(rb"session_id=([^&]+)", form)[1].decode())  # type: ignore[index]
        elif b"permission_denied" in body:
            self.answers["denied"] += 1
        else:
            self.answers["busy" if status.startswith("503") else "accepted"] += 1


class Kind(NamedTuple):
    """A request, and what is to become of it."""

    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    photo: str = "7190971"
    path: str = MEDIA
    status: int = 200
    #: Whether it is a play; else the name under which it is counted aside, if it is.
    play: bool = False
    aside: str = ""
    named: bool = True
    #: First byte that is asked for.
    first: int = 0


def ranged(asked: str, first: int, **more: Any) -> Kind:
    return Kind(headers=(("Range", f"bytes={asked}"),), first=first, status=206, **more)


#: Twenty, so that a thousand requests hold fifty of each.
KINDS = [
    *[Kind(play=True)] * 3,
    *[ranged("1000-200000", 1000, play=True)] * 2,
    *[ranged(f"{START}-{START + 99}", START, play=True)],
    *[ranged("700000-", 700_000, play=True)] * 2,
    *[ranged("-5000", CLIP_BYTES - 5000, play=True, photo="42")],
    *[ranged("0-2", 0, play=True, photo="42")],
    Kind(play=True, photo=REFUSED_PHOTO),
    ranged("0-1", 0, aside="ignored_probe"),
    ranged("5-5", 5, aside="ignored_probe"),
    Kind(headers=(("Range", f"bytes={CLIP_BYTES}-"),), status=416),
    *[Kind(method="HEAD")] * 2,
    Kind(headers=(("If-None-Match", "*"),), status=304),
    Kind(named=False, aside="no_session"),
    Kind(photo="film", aside="bad_photo"),
    Kind(path=MEDIA.replace("-video", "-film"), status=404),
]
assert len(KINDS) == 20


@dataclass
class Outside:
    """What the client asked for and received, and what the API recorded; nothing here was told by the product."""

    api: CountingAPI
    server: Server
    #: Session -> its photo, and the body bytes that came; of a stream that was cut off, what the API was told.
    plays: dict[str, tuple[str, int]] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    aside: Counter[str] = field(default_factory=Counter)
    purged: int = 0
    _numbers: Iterator[int] = field(default_factory=count)
    _lasts: Iterator[int] = field(default_factory=count)

    def request(self, number: int) -> None:
        kind = KINDS[number * 7 % 20]  # 7 and 20 have no common divisor: all in turn, well mixed
        session = f"viewer-{number}"
        query = f"?session_id={session}&photo_id={kind.photo}" if kind.named else ""
        answer = raw(self.server.port, kind.method, kind.path + query, dict(kind.headers))
        assert answer.status == kind.status, self.server.log()
        if kind.play:
            self.played(session, kind.photo, len(answer.body), kind.first)
        elif kind.aside:
            self.aside[kind.aside] += 1

    def played(self, session: str, photo: str, received: int, first: int = 0) -> None:
        self.plays[session] = photo, received
        self.starts[photo] += first <= START

    def ask(self, pool: ThreadPoolExecutor, requests: int) -> None:
        list(pool.map(self.request, islice(self._numbers, requests)))

    def let_workers_tell(self) -> None:
        """A worker's last figures of what it counted aside ride with its next play (docs/counting.md): one for each."""
        told: set[int] = set()
        while set(workers_of(self.server.process.pid)) - told:
            session = f"last-{next(self._lasts)}"
            answer = raw(self.server.port, "GET", f"{MEDIA}?session_id={session}", {"Range": "bytes=0-2"})
            self.played(session, "7190971", len(answer.body))
            told.add(answer.worker)

    def figures(self) -> dict[str, int]:
        sent = len(self.api.recorded())
        dead = len(self.api.refused) - self.purged
        captured = len(self.plays)
        waiting = captured - sent - dead - self.purged
        return {"captured": captured, "waiting": waiting, "sent": sent, "dead": dead, "lost": self.purged}

    def bytes_of(self, photo: str | None = None) -> int:
        return sum(sent for each, sent in self.plays.values() if photo in (None, each))


class Answer(NamedTuple):
    worker: int
    status: int
    body: bytes

    @classmethod
    def of(cls, raw: bytearray) -> Answer:
        head, _, body = bytes(raw).partition(b"\r\n\r\n")
        worker = re.search(rb"(?i)^worker: (\d+)", head, re.MULTILINE)
        return cls(int(worker[1]) if worker else 0, int(head.split()[1]), body)


def raw(port: int, method: str, path: str, headers: dict[str, str]) -> Answer:
    """The answer on a connection of its own, to the server's hanging up: it is then done with the response."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        while data := client.recv(1 << 16):
            answer += data
    return Answer.of(answer)


class Stream:
    """A long response of which the client has read so much, and reads no more."""

    def __init__(self, port: int, path: str, session: str, enough: int) -> None:
        self._client = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        asked = f"GET {path}?session_id={session}&photo_id=7 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        self._client.sendall(asked.encode())
        answer = bytearray()
        while len(answer) < enough:
            answer += self._client.recv(1 << 16)
        self.worker, _, body = Answer.of(answer)
        self.received = len(body)

    def close(self) -> None:
        self._client.close()


# What the product says, on each of its surfaces.


def page_json(server: Server) -> dict[str, Any]:
    status, body = server.get("/_t23/status.json", Authorization=f"Bearer {TOKEN}")
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def by_page(server: Server) -> tuple[Elements, str]:
    status, body = server.get("/_t23/", Authorization=f"Bearer {TOKEN}")
    assert status == 200, body
    return Elements(body.decode()), body.decode()


def by_metrics(server: Server) -> dict[str, float]:
    """Each sample by its name with its labels."""
    status, body = server.get("/_t23/metrics", Authorization=f"Bearer {TOKEN}")
    assert status == 200, body
    rows = (line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def by_command(server: Server, api_url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {"T23_API_URL": api_url, "T23_STATE_DIR": str(server.state.path), "COLUMNS": "80"}
    command = [sys.executable, "-m", "t23_middleware", *words]
    return subprocess.run(
        command, env=os.environ | environ, cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENCE
    )


def agree(outside: Outside, api_url: str, state: str) -> None:
    """Wait until the relay has taken in what is on disk; then each number on each surface is the outside's."""
    server = outside.server
    outside.let_workers_tell()

    def settled() -> bool:
        said = page_json(server)
        return (
            said["state"] == state and {name: said[name] for name in outside.figures()} == outside.figures()
        )

    assert until(settled), f"{outside.figures()} from outside, {page_json(server)} on the page"
    time.sleep(1.1)  # the page keeps its history, not its figures, for a second
    figures = outside.figures()
    page_agrees(outside, figures, *by_page(server))
    json_agrees(outside, figures, page_json(server))
    metrics_agree(outside, figures, by_metrics(server))
    screen_agrees(outside, figures, by_command(server, api_url, "status").stdout)
    told = json.loads(by_command(server, api_url, "status", "--json").stdout)
    assert {name: told[name] for name in figures} == figures
    assert {name: told["counters"][name] for name in outside.aside} == dict(outside.aside)


def page_agrees(outside: Outside, figures: dict[str, int], page: Elements, html: str) -> None:
    for name, number in figures.items():
        assert page.figure(name.capitalize()) == f"{number:,}", name
    for name in ("captured", "sent"):
        assert f"</span>{name} <b>{figures[name]:,}</b>" in html, f"the chart's legend says another {name}"
    for name, number in outside.aside.items():
        row = rf'<th scope="row">{name.replace("_", " ")}</th><td class="right">{number:,}</td>'
        assert row in html, name
    for photo in {photo for photo, _ in outside.plays.values()}:
        size = (
            rf"{outside.bytes_of(photo) / MIB:.1f} MiB" if outside.bytes_of(photo) >= MIB else r"[\d.]+ KiB"
        )
        row = rf'>{photo}</th><td class="right">{outside.starts[photo]:,}</td><td class="right">{size}<'
        assert re.search(row, html), (photo, row)


def json_agrees(outside: Outside, figures: dict[str, int], said: dict[str, Any]) -> None:
    assert {name: said[name] for name in figures} == figures
    assert {name: said["counters"][name] for name in outside.aside} == dict(outside.aside)
    assert said["lost_by_reason"] == ({"purged": outside.purged} if outside.purged else {})
    assert said["journal_bytes"] == 0
    for series in (said["hour"], said["day"]):
        assert sum(series["captured"]) == figures["captured"]
        assert sum(series.get("sent", [])) == figures["sent"]
        assert sum(series["plays"]) == outside.starts.total()
        assert sum(series["bytes"]) == outside.bytes_of()
    videos = {video["photo_id"]: (video["plays"], video["bytes"]) for video in said["videos_by_bytes"]}
    photos = {photo for photo, _ in outside.plays.values()}
    assert videos == {photo: (outside.starts[photo], outside.bytes_of(photo)) for photo in photos}


def metrics_agree(outside: Outside, figures: dict[str, int], said: dict[str, float]) -> None:
    assert said["t23_reports_captured_total"] == figures["captured"]
    assert said["t23_reports_sent_total"] == figures["sent"]
    assert said["t23_reports_waiting"] == figures["waiting"]
    assert said["t23_reports_dead"] == figures["dead"]
    assert said.get('t23_reports_lost_total{reason="purged"}', 0) == figures["lost"]
    assert said["t23_report_delivery_seconds_count"] == figures["sent"]
    assert said["t23_plays_total"] == outside.starts.total()
    assert said["t23_streamed_bytes_total"] == outside.bytes_of()
    for name, number in outside.aside.items():
        assert said[f't23_events_total{{event="{name}"}}'] == number, name
    assert (said["t23_report_oldest_seconds"] > 0) == (figures["waiting"] > 0)


def screen_agrees(outside: Outside, figures: dict[str, int], screen: str) -> None:
    rows = {words[0]: words[1] for line in screen.splitlines() if len(words := line.split()) > 1}
    for name, number in {**figures, **outside.aside}.items():
        assert rows[name] == f"{number:,}", screen


# The story.


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[tuple[Outside, StandInServer]]:
    (tmp_path / "film.mp4").touch()
    os.truncate(tmp_path / "film.mp4", BIG)
    (tmp_path / "agreement_app.py").write_text(APP.format(big=str(tmp_path / "film.mp4")))
    command = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT agreement_app:app"
    settings = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "T23_STATUS_TOKEN": TOKEN}
    api = CountingAPI()
    with StandInServer(app=api) as at, running(command, tmp_path / "state", at.url, **settings) as server:
        yield Outside(api, server), at


def refused(outside: Outside, at: StandInServer, pool: ThreadPoolExecutor) -> None:
    """The API denies this server for a while, which an operator ends by hand."""
    at.fault("deny")
    outside.ask(pool, 160)
    agree(outside, at.url, "paused")
    at.heal()
    done = by_command(outside.server, at.url, "relay", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    agree(outside, at.url, "idle")


def busy(outside: Outside, at: StandInServer, pool: ThreadPoolExecutor) -> None:
    at.fault("status", status=503)
    outside.ask(pool, 160)
    agree(outside, at.url, "failing")
    at.heal()
    agree(outside, at.url, "idle")


def away(outside: Outside, at: StandInServer, pool: ThreadPoolExecutor) -> None:
    at.stop()
    outside.ask(pool, 160)
    agree(outside, at.url, "failing")
    at.start()
    agree(outside, at.url, "idle")


def answers_lost(outside: Outside, at: StandInServer, pool: ThreadPoolExecutor) -> None:
    """Recorded, and nobody is told: they are sent again, and the API knows them by their ``time``."""
    at.fault("cut", count=4)
    outside.ask(pool, 100)
    agree(outside, at.url, "idle")


def killed(outside: Outside, at: StandInServer) -> None:
    """A worker dies by SIGKILL with two streams under way: the kernel knows how far each was, sent as a file or not."""
    port = outside.server.port
    file, paced = Stream(port, "/file.mp4", "file", 1 << 16), Stream(port, "/paced.mp4", "paced", 24 * MIB)
    assert until(lambda: page_json(outside.server)["open_responses"] == 2)
    assert by_page(outside.server)[0].figure("Streams open") == "2"
    assert by_metrics(outside.server)["t23_streams_open"] == 2
    for worker in {file.worker, paced.worker}:
        os.kill(worker, signal.SIGKILL)
    file.close(), paced.close()
    for session, stream in (("file", file), ("paced", paced)):
        report = told_of(outside, session)
        assert 0 < report <= stream.received + 8 * MIB
        outside.played(session, "7", report)
    outside.aside.update(interrupted=2)
    agree(outside, at.url, "idle")


def told_of(outside: Outside, session: str) -> int:
    """The bytes that the API was told of a stream whose end nobody outside saw."""
    assert until(lambda: any(report["session_id"] == session for report in outside.api.recorded()))
    (report,) = [each for each in outside.api.recorded() if each["session_id"] == session]
    return int(report["bytes_total"])


def left(outside: Outside) -> None:
    """Viewers who leave: what was on its way is known to the API alone, within the buffers."""
    for number in range(3):
        stream = Stream(outside.server.port, "/file.mp4", f"left-{number}", 1 << 18)
        stream.close()
        told = told_of(outside, f"left-{number}")
        assert stream.received <= told < BIG
        outside.played(f"left-{number}", "7", told)


def purged(outside: Outside, at: StandInServer) -> None:
    """An operator sends some of the refused again, in vain, and throws others away."""
    listed = json.loads(by_command(outside.server, at.url, "dead", "list", "--json").stdout)
    assert len(listed) == outside.figures()["dead"]
    again, away = ([str(each["id"]) for each in part] for part in (listed[:5], listed[5:12]))
    asked = outside.api.answers["refused"]
    by_command(outside.server, at.url, "dead", "retry", *again)
    assert until(lambda: outside.api.answers["refused"] == asked + 5)
    assert by_command(outside.server, at.url, "dead", "purge", *away).returncode == 0
    outside.purged += 7
    agree(outside, at.url, "idle")


def test_numbers_agree_with_outside_count(outside: tuple[Outside, StandInServer]):
    """Every number that the product shows agrees with a count made from outside."""
    counted, at = outside
    with ThreadPoolExecutor(CLIENTS) as pool:
        counted.ask(pool, 200)
        left(counted)
        agree(counted, at.url, "idle")
        refused(counted, at, pool)
        busy(counted, at, pool)
        away(counted, at, pool)
        answers_lost(counted, at, pool)
        killed(counted, at)
        purged(counted, at)
        counted.ask(pool, 220)
        agree(counted, at.url, "idle")
    every_report_is_right(counted)
    answers_agree(counted)


def every_report_is_right(outside: Outside) -> None:
    """Session by session, and no request was left out of the thousand."""
    assert next(outside._numbers) == REQUESTS
    told = {report["session_id"]: int(report["bytes_total"]) for report in outside.api.recorded()}
    assert len(told) == len(outside.api.recorded()), "a report was recorded twice"
    taken = {
        session: sent for session, (_, sent) in outside.plays.items() if session not in outside.api.refused
    }
    assert told == taken
    starts = sum(report["skip"] == "0" for report in outside.api.recorded())
    assert starts == outside.starts.total() - outside.starts[REFUSED_PHOTO]


def answers_agree(outside: Outside) -> None:
    """The tries, by what came of them; of an API that is away nobody but the relay can tell how often it tried."""
    said = page_json(outside.server)["api_answers"]
    for name in ("accepted", "refused", "denied", "busy"):
        assert said[name] == outside.api.answers[name], (name, said, outside.api.answers)
    assert said["no_answer"] == 4
    assert said["unreachable"] > 0
    metrics = by_metrics(outside.server)
    assert {name: metrics[f't23_api_answers_total{{answer="{name}"}}'] for name in said} == said
