"""What clients of nginx took, and what is reported: cut, complete, in part, and not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

from ..harness import until
from ..servers.client import Client
from .clients import BUFFER, Http2, curl_all, read_and_leave, take_all, take_and_leave
from .stage import FILM_BYTES, MODIFIED, SHORT, SHORT_BYTES, Stage, new_session, target

MB = 1_000_000
TAKEN = 8 * MB
#: Cases that run side by side.
AT_ONCE = 4

SERVERS = ("gunicorn", "uwsgi")
WAYS = ("generator", "file", "accel")
PROTOCOLS = ("plain", "http2", "tls", "tls_http2")


class Case(NamedTuple):
    """A client that takes a film: from which server, in which way, by which of nginx's ports."""

    server: str
    way: str
    port: str
    leaves: bool

    def __str__(self) -> str:
        return f"{self.server} {self.way} {self.port} {'cut' if self.leaves else 'complete'}"

    def play(self, stage: Stage) -> str:
        """Take it; the session that did."""
        session = new_session()
        where = stage.nginx.ports[self.port], target(self.way, session, server=self.server)
        tls = "tls" in self.port
        if "http2" in self.port and self.leaves:
            read_and_leave(*where, TAKEN, tls=tls)
        elif "http2" in self.port:
            assert curl_all(*where, tls=tls) == FILM_BYTES
        elif self.leaves:
            take_and_leave(*where, TAKEN, tls=tls)
        else:
            assert take_all(*where, tls=tls) == FILM_BYTES
        return session


CUT = [Case(*case, leaves=True) for case in itertools.product(SERVERS, WAYS, PROTOCOLS)]
CUT_SMALL = [Case(*case, "small", leaves=True) for case in itertools.product(SERVERS, WAYS)]
COMPLETE = [Case(*case, leaves=False) for case in itertools.product(SERVERS, (*WAYS, "chunked"), PROTOCOLS)]


@pytest.fixture(scope="module")
def played(stage: Stage) -> Iterator[dict[Case, Future[str]]]:
    """The session of each case; some are played side by side."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(case.play, stage) for case in (*CUT, *CUT_SMALL, *COMPLETE)}


@pytest.mark.parametrize("case", CUT, ids=str)
def test_disconnect_reports_bytes_sent(case: Case, stage: Stage, played: dict[Case, Future[str]]):
    """When a client disconnects, the bytes that nginx sent are reported."""
    (size,) = stage.sizes(played[case].result())
    assert TAKEN <= size <= 13 * MB


@pytest.mark.parametrize("case", CUT_SMALL, ids=str)
def test_disconnect_with_small_send_buffer(case: Case, stage: Stage, played: dict[Case, Future[str]]):
    """With a small send buffer, the reported bytes are what the client took and little more."""
    (size,) = stage.sizes(played[case].result())
    assert TAKEN <= size <= 9 * MB


@pytest.mark.parametrize("case", COMPLETE, ids=str)
def test_complete_play_reported_exactly(case: Case, stage: Stage, played: dict[Case, Future[str]]):
    """A complete play is reported to the byte."""
    assert stage.sizes(played[case].result()) == [FILM_BYTES]


@pytest.mark.parametrize("way", ["file", "accel"])
@pytest.mark.parametrize("server", SERVERS)
def test_range_starts_no_viewing(way: str, server: str, stage: Stage):
    """A Range is reported with its own bytes and starts no viewing."""
    session = new_session()
    taken = take_all(
        stage.nginx.ports["plain"], target(way, session, server=server), Range="bytes=1000000-5999999"
    )
    assert taken == 5 * MB
    (report,) = stage.wait(session)
    assert (report["bytes_total"], report["skip"]) == ("5000000", "1")


#: What is asked -> method, headers, and the status that nginx answers.
NOTHING: dict[str, tuple[str, dict[str, str], int]] = {
    "two bytes": ("GET", {"Range": "bytes=0-1"}, 206),
    "HEAD": ("HEAD", {}, 200),
    "not modified": ("GET", {"If-Modified-Since": MODIFIED}, 304),
    "no such range": ("GET", {"Range": "bytes=900000000-"}, 416),
}


@pytest.mark.parametrize("asked", NOTHING)
@pytest.mark.parametrize("way", ["file", "accel"])
@pytest.mark.parametrize("server", SERVERS)
def test_what_is_no_play_is_not_reported(asked: str, way: str, server: str, stage: Stage):
    method, headers, status = NOTHING[asked]
    session = new_session()
    with stage_client(stage) as client:
        assert client.ask(method, target(way, session, SHORT, server), headers).status == status
        assert_only_the_next_is_reported(client, session, server, stage)


@pytest.mark.parametrize("server", SERVERS)
def test_missing_file_not_reported(server: str, stage: Stage):
    """A file that nginx does not find is not reported."""
    session = new_session()
    with stage_client(stage) as client:
        assert client.ask("GET", target("accel", session, "none.mp4", server)).status == 404
        assert_only_the_next_is_reported(client, session, server, stage)


def assert_only_the_next_is_reported(client: Client, session: str, server: str, stage: Stage) -> None:
    """All lines before that of a play are read when the play is reported."""
    later = new_session()
    assert len(client.ask("GET", target("accel", later, SHORT, server)).body) == SHORT_BYTES
    assert stage.sizes(later) == [SHORT_BYTES]
    assert stage.reports(session) == []


@pytest.mark.parametrize("way", ["file", "accel"])
@pytest.mark.parametrize("server", SERVERS)
def test_five_on_one_connection_are_five(way: str, server: str, stage: Stage):
    sessions = [new_session() for _ in range(5)]
    with stage_client(stage) as client:
        for session in sessions:
            assert len(client.ask("GET", target(way, session, SHORT, server)).body) == SHORT_BYTES
    assert [stage.sizes(session) for session in sessions] == [[SHORT_BYTES]] * 5


@pytest.mark.parametrize("way", ["file", "accel"])
def test_cancelled_stream_is_reported(way: str, stage: Stage):
    """A cancelled HTTP/2 stream is reported while its connection goes on.

    A player that seeks cancels its request and asks for another range on the same connection.
    """
    first, second = new_session(), new_session()
    with Http2(stage.nginx.ports["http2"]) as connection:
        stream = connection.get(target(way, first))
        taken = connection.read(stream, TAKEN)
        connection.cancel(stream)
        stream = connection.get(target(way, second), range="bytes=1000000-5999999")
        assert connection.read(stream, FILM_BYTES) == 5 * MB
        (cut,) = stage.sizes(first)
        assert stage.sizes(second) == [5 * MB]
    assert taken <= cut <= 13 * MB


def stall(stage: Stage, server: str, way: str) -> list[int]:
    """Take a part of a film and then nothing more; the bytes of the reports that come while the client is there."""
    session = new_session()
    with Client(stage.nginx.ports["impatient"], buffer=BUFFER) as client:
        client.request("GET", target(way, session, server=server))
        client.read_some(MB)
        return stage.sizes(session)


@pytest.fixture(scope="module")
def stalled(stage: Stage) -> Iterator[dict[tuple[str, str], Future[list[int]]]]:
    """All side by side."""
    cases = list(itertools.product(SERVERS, WAYS))
    with ThreadPoolExecutor(len(cases)) as pool:
        yield {case: pool.submit(stall, stage, *case) for case in cases}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("server", SERVERS)
def test_stalled_client_is_reported(way: str, server: str, stalled: dict[tuple[str, str], Future[list[int]]]):
    """A client that stalls is reported while it is still connected."""
    (size,) = stalled[server, way].result()
    assert MB <= size <= 6 * MB


def test_nothing_waits_or_repeats(stage: Stage):
    """After all tests of this file nothing waits, and no report came twice.

    This test has to be the last of the file.
    """
    for server in SERVERS:
        assert until(lambda server=server: stage.status(server)["waiting"] == 0)
        status = stage.status(server)
        assert (status["waiting_for_proxy"], status["lost"]) == (0, 0), status
        assert "repeated" not in status["counters"]
    sessions = [report["session_id"] for report in stage.api.recorded()]
    assert len(sessions) == len(set(sessions))


def stage_client(stage: Stage, port: str = "plain") -> Client:
    return Client(stage.nginx.ports[port])
