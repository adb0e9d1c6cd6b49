"""The same behind Apache, which proxies, or sends the file by mod_xsendfile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..servers.client import Client
from .clients import take_all, take_and_leave
from .stage import FILM_BYTES, SHORT, SHORT_BYTES, Stage, behind_apache, new_session, target

MB = 1_000_000
TAKEN = 8 * MB
#: Apache's count includes the response's head where a transfer is cut.
HEAD = 1000
WAYS = ("generator", "file", "sendfile")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with behind_apache() as stage:
        yield stage


@pytest.mark.parametrize("way", WAYS)
def test_disconnect_reports_bytes_sent(way: str, stage: Stage):
    """When a client disconnects, the bytes that Apache sent are reported."""
    session = new_session()
    take_and_leave(stage.proxy.port, target(way, session), TAKEN)
    (size,) = stage.sizes(session)
    assert TAKEN <= size <= 13 * MB + HEAD


@pytest.mark.parametrize("way", WAYS)
def test_complete_play_reported_exactly(way: str, stage: Stage):
    """A complete play is reported to the byte."""
    session = new_session()
    assert take_all(stage.proxy.port, target(way, session)) == FILM_BYTES
    assert stage.sizes(session) == [FILM_BYTES]


@pytest.mark.parametrize("way", ["file", "sendfile"])
def test_range_reports_own_bytes(way: str, stage: Stage):
    """A Range is reported with its own bytes, as skip 1."""
    session = new_session()
    assert take_all(stage.proxy.port, target(way, session), Range="bytes=1000000-5999999") == 5 * MB
    (report,) = stage.wait(session)
    assert (report["bytes_total"], report["skip"]) == ("5000000", "1")


@pytest.mark.parametrize("way", ["file", "sendfile"])
def test_other_requests_not_reported(way: str, stage: Stage):
    """A request that is not a play is not reported, and clients get none of our headers."""
    session, later = new_session(), new_session()
    with Client(stage.proxy.port) as client:
        client.ask("HEAD", target(way, session, SHORT))
        client.ask("GET", target(way, session, SHORT), {"Range": "bytes=0-1"})
        client.ask("GET", target("sendfile", session, "none.mp4"))
        answer = client.ask("GET", target(way, later, SHORT))
    assert answer.header("X-T23-Play") is None
    assert stage.sizes(later) == [SHORT_BYTES]
    assert stage.reports(session) == []
