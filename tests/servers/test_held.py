"""waitress takes up to 16 MB more than it has sent; what it throws away when the client leaves was not sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..harness import lacking
from .process import FILM_BYTES, Site, play
from .test_servers import SMALL_BUFFER, stall

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
