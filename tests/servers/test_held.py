"""waitress takes up to 16 MB more than it has sent; what it throws away when the client leaves was not sent."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from t23_middleware.relay.drains import interrupted_count
from t23_middleware.transfer import Progress

from ..harness import lacking, until
from .conftest import started
from .process import FILM_BYTES, Site, play
from .test_servers import CLOSE, SMALL_BUFFER, TASTE, stall

WAYS = ["generator", "late-generator", "write-all", "wrapper"]


@pytest.fixture(autouse=True)
def _small_kernel() -> None:
    """A kernel that takes the whole film into its own buffers hides what waitress holds."""
    largest = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    if largest + 4 * SMALL_BUFFER > FILM_BYTES:
        lacking(f"this kernel buffers {largest} bytes (net.ipv4.tcp_wmem), as much as the test's film has")


@pytest.mark.parametrize("way", WAYS)
def test_waitress_unsent_bytes_not_counted(way: str, waitress: Site) -> None:
    """What waitress has not sent when the client disconnects is not counted."""
    session = waitress.session()
    with waitress.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(f"/{way}/film.mp4", session))
        taken = client.read_some(1000)
        stall(client)
    (sent,) = waitress.sent(session)
    assert taken <= sent < FILM_BYTES


@pytest.mark.parametrize("way", WAYS)
def test_waitress_buffered_bytes_counted_later(way: str, waitress: Site) -> None:
    """What waitress buffers for a client that stalls and goes on is counted once it has been sent."""
    session = waitress.session()
    with waitress.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(f"/{way}/film.mp4", session))
        taken = client.read_some(1000)
        stall(client)
        assert waitress.closed(session) == [], "the rest is still in the server"
        taken += client.drain()
        assert (taken, waitress.sent(session)) == (FILM_BYTES, [FILM_BYTES])
        again = waitress.session()
        answer = client.ask("GET", play("/one-chunk", again))
    assert waitress.sent(again) == [len(answer.body)]


@pytest.mark.parametrize("way", ["generator", "late-generator", "write-all"])
def test_killed_waitress_counts_received_bytes(way: str, served: Path) -> None:
    """Its last progress line and the kernel give what the client got; waitress's own buffer is lost with it."""
    with started("waitress", served) as site, site.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(f"/{way}/long.mp4", site.session()))
        read = client.read_some(TASTE)
        stall(client)
        os.kill(site.process.pid, signal.SIGKILL)
        read += client.drain_what_comes_in_part()
        progress = [line for line in site._decoded() if isinstance(line, Progress)][-1]
        connection = progress.opening.connection
        assert connection is not None
        assert until(lambda: connection.cookie in site._ends)
    counted = interrupted_count(progress, site._ends[connection.cookie])
    assert abs(counted - read) <= CLOSE, f"counted {counted}, taken {read}"
