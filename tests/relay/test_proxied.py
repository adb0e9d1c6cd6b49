"""Plays that nginx counts: journals and a log as files, the relay as a whole, and what arrives at the API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay.outbox import SQLiteOutbox, Stats
from t23_middleware.relay.process import Relay
from t23_middleware.state import StateFolder
from t23_middleware.transfer import (
    OFFLOADED,
    PROXY,
    PROXY_FORMAT,
    Line,
    Opening,
    Part,
    Play,
    Transfer,
    encode,
)

from ..harness import PATIENCE, until
from .test_process import made, relaying, stats
from .writers import MS, alive, header

WRITER = "1-0123456789abcdef"
FILM = 10_000_000
WHOLE = Part(0, FILM - 1, FILM)


def now() -> int:
    return time.monotonic_ns()


def now_ms() -> int:
    return time.time_ns() // MS


@pytest.fixture
def api() -> Iterator[StandInServer]:
    with StandInServer() as server:
        yield server


@pytest.fixture
def folder(state: Path) -> StateFolder:
    folder = StateFolder(state)
    folder.create()
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "t23.log"


def opening(number: int, session: str = "", ago: float = 1.0, by: str = PROXY, part: Part = WHOLE) -> Opening:
    """A response that started so many seconds *ago*."""
    at_ns, at_ms = now() - int(ago * 1e9), now_ms() - int(ago * 1000)
    status = 200 if part.first == 0 else 206
    play = Play(session or f"s{number}", "7")
    length = part.size if by == PROXY else None
    return Opening(number, at_ns, at_ms, play, part, status, length, by)


def offloaded(number: int, **more: Any) -> Opening:
    return opening(number, by=OFFLOADED, part=Part(0, None, None), **more)


def closed(opening: Opening, sent: int = FILM, after: float = 0.01) -> Transfer:
    """The app was done with it so many seconds later."""
    return Transfer(
        opening, opening.started_ns + int(after * 1e9), opening.started_ms + int(after * 1000), sent
    )


def journal(folder: StateFolder, *lines: Line, name: str = WRITER) -> Path:
    path = folder.journals / f"{name}.000000.journal"
    path.write_bytes(b"".join(map(encode, (header(name, format=PROXY_FORMAT), *lines))))
    return path


def says(number: int, body: int, ago: float = 0.3, writer: str = WRITER, **more: Any) -> str:
    """nginx's line of a response that ended so many seconds *ago*."""
    fields = {
        "t23": 1,
        "play": f"{writer}.{number}",
        "end": round(now_ms() - ago * 1000) / 1000,
        "seconds": 0.5,
        "status": 200,
        "body": body,
        "complete": "OK",
        "type": "video/mp4",
        "range": "",
        "length": str(FILM),
        "cache": "",
        **more,
    }
    return json.dumps(fields, separators=(",", ":")) + "\n"


def append(log: Path, *lines: str) -> None:
    with log.open("a") as file:
        file.write("".join(lines))


def told(api: StandInServer) -> dict[str, list[int]]:
    """Session -> bytes of each of its reports."""
    found: dict[str, list[int]] = {}
    for report in api.recorded():
        found.setdefault(report["session_id"], []).append(int(report["bytes_total"]))
    return found


def counters(folder: StateFolder) -> dict[str, int]:
    outbox = SQLiteOutbox(folder.outbox)
    try:
        return outbox.counters()
    finally:
        outbox.close()


def relay(api: StandInServer, folder: StateFolder, log: Path, **more: str) -> Relay:
    return made(api, folder, T23_PROXY_LOG=str(log), **more)


def test_a_play_has_the_bytes_of_the_log_and_not_more_than_the_app_sent(api, folder, log):
    cut, whole, chunked = opening(1), opening(2), opening(3)
    journal(folder, *(line for each in (cut, whole, chunked) for line in (each, closed(each))))
    log.write_text(says(1, 3_000_000) + says(2, FILM) + says(3, FILM + 10_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [FILM], "s3": [FILM]}
    assert stats(folder) == Stats(3, 0, 3, 0, 0)


def test_of_a_play_that_the_app_offloads_the_log_knows_all(api, folder, log):
    plays = [offloaded(number, ago=3 - number / 10) for number in range(1, 6)]
    journal(folder, *(line for each in plays for line in (each, closed(each, 0))))
    log.write_text(
        says(1, 3_000_000)
        + says(2, 5_000_000, status=206, range=f"bytes 5000000-9999999/{FILM}", length="5000000")
        + says(3, 3_000_000, type="image/jpeg")
        + says(4, 153, status=404, type="text/html")
        + says(5, 2, status=206, range=f"bytes 0-1/{FILM}", length="2")
    )
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [5_000_000]}
    assert [(report["session_id"], report["skip"]) for report in api.recorded()] == [("s1", "0"), ("s2", "1")]
    assert counters(folder)["proxy_not_played"] == 2
    assert stats(folder) == Stats(2, 0, 2, 0, 0)


def test_a_play_stays_open_until_its_line_comes(api, folder, log):
    log.touch()
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        play = opening(1, ago=0.2)
        journal(folder, play, closed(play))
        assert until(lambda: not any(path.stat().st_size == 0 for path in folder.journals.glob("*.journal")))
        time.sleep(1)
        assert told(api) == {}
        append(log, says(1, 4_000_000, ago=0))
        api.wait_for(1, PATIENCE)
    assert told(api) == {"s1": [4_000_000]}
