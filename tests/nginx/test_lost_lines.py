"""The log has no line of a play, a broken one, one of nobody's, or two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from ..harness import until
from ..servers.client import Client
from .clients import BUFFER
from .stage import FILM_BYTES, SHORT, SHORT_BYTES, Stage, behind_nginx, new_session, target

MB = 1_000_000


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A relay that does not wait long."""
    with behind_nginx("gunicorn", T23_PROXY_WAIT="2") as stage:
        yield stage


def play_short(stage: Stage, way: str = "accel", port: str = "plain") -> str:
    session = new_session()
    with Client(stage.nginx.ports[port]) as client:
        assert len(client.ask("GET", target(way, session, SHORT)).body) == SHORT_BYTES
    return session


def counted(stage: Stage, name: str) -> int:
    return int(stage.status()["counters"].get(name, 0))


def test_worker_kill_reports_unconfirmed(stage: Stage):
    """When a worker of nginx is killed, the app's count is reported, and counted as unconfirmed."""
    before = counted(stage, "unconfirmed")
    session = cut_by_a_kill(stage, "generator")
    (size,) = stage.sizes(session)
    assert MB <= size <= FILM_BYTES
    assert until(lambda: counted(stage, "unconfirmed") == before + 1)
    assert len(stage.reports(session)) == 1


def test_worker_kill_loses_offloaded_play(stage: Stage):
    """When a worker of nginx is killed that sent a file for the app, the play is lost."""
    before = stage.status()["lost"]
    session = cut_by_a_kill(stage, "accel")
    assert until(lambda: stage.status()["lost"] == before + 1), stage.status()
    assert stage.status()["lost_by_reason"] == {"no_proxy_line": before + 1}
    assert stage.sizes(play_short(stage)) == [SHORT_BYTES]
    assert stage.reports(session) == []


def cut_by_a_kill(stage: Stage, way: str) -> str:
    session = new_session()
    with Client(stage.nginx.ports["plain"], buffer=BUFFER) as client:
        client.request("GET", target(way, session))
        client.read_some(MB)
        stage.nginx.kill_workers()
        client.drain_what_comes()
    return session


def foreign(line: str) -> str:
    """*line*, of a play that nobody was given."""
    fields = json.loads(line)
    fields["play"] = "1-0123456789abcdef.1"
    return json.dumps(fields) + "\n"


#: What stands in the log -> what makes it of a line of ours, and what it is counted as.
ODD: dict[str, tuple[Callable[[str], str], str]] = {
    "half a line": (lambda line: line[: len(line) // 2] + "\n", "proxy_bad"),
    "half a line and one that follows it": (lambda line: line[: len(line) // 2] + line + "\n", "proxy_bad"),
    "binary rubbish": (lambda line: "\x00\x01\ufffd\n", "proxy_foreign"),
    "of another format": (lambda line: '127.0.0.1 - - "GET / HTTP/1.1" 200 5\n', "proxy_foreign"),
    "of nobody's play": (foreign, "proxy_foreign"),
    "a line again": (lambda line: line + "\n", "proxy_cached"),
}


def test_odd_lines_are_counted(stage: Stage):
    """Odd lines of the log are counted by kind, and the line after them is read."""
    session = play_short(stage)
    assert stage.sizes(session) == [SHORT_BYTES]
    expected = Counter(counter for _, counter in ODD.values())
    before = {name: counted(stage, name) for name in expected}
    with stage.nginx.log.open("a") as log:
        log.writelines([make(stage.nginx.lines()[-1]) for make, _ in ODD.values()])
    assert stage.sizes(play_short(stage)) == [SHORT_BYTES]
    assert until(lambda: all(counted(stage, name) == before[name] + expected[name] for name in expected))
    assert len(stage.reports(session)) == 1


def test_cache_hit_not_reported(stage: Stage):
    """What nginx answers from its cache is not reported again, but counted."""
    before = counted(stage, "proxy_cached")
    first = play_short(stage, "generator", "cached")
    second = play_short(stage, "generator", "cached")
    assert '"cache":"HIT"' in stage.nginx.lines()[-1]
    assert until(lambda: counted(stage, "proxy_cached") == before + 1), stage.status()
    assert stage.sizes(first) == [SHORT_BYTES]
    assert stage.reports(second) == []
