"""A file that gets shorter while it is served, and a worker that is told to go in the middle of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..chaos.load import workers_of
from .client import Client
from .conftest import started
from .process import LONG_BYTES, Site, play
from .test_servers import CLOSE, SMALL_BUFFER, TASTE, stall

#: What is left of the file.
LEFT = 24 << 20
SHORTER = {
    "gunicorn sync": [("/wrapper", {}), ("/flask", {"Range": "bytes=1000-"})],
    "gunicorn no-sendfile": [("/wrapper", {}), ("/flask", {"Range": "bytes=1000-"})],
    # A whole file keeps waitress waiting for the rest for ever, also without us.
    "waitress": [("/flask", {"Range": "bytes=1000-"}), ("/flask", {"Range": "bytes=0-"})],
    "wsgiref": [("/wrapper", {}), ("/flask", {"Range": "bytes=1000-"})],
}


@pytest.fixture(scope="module", params=SHORTER)
def server(request: pytest.FixtureRequest, served: Path) -> Iterator[tuple[str, Site]]:
    with started(request.param, served) as site:
        yield request.param, site


def cut_short(site: Site, target: str, headers: dict[str, str], film: Path) -> int:
    """The bytes that a client gets of a film that is cut off under it; it must not wait for the rest for ever."""
    film.touch()
    os.truncate(film, LONG_BYTES)
    with Client(site.port, buffer=SMALL_BUFFER) as client:
        client.request("GET", target, headers)
        read = client.read_some(TASTE)
        stall(client)
        os.truncate(film, LEFT)
        return read + client.drain_what_comes_in_part()


def test_film_that_gets_shorter(server: tuple[str, Site], served: Path) -> None:
    """Each server ends as without us, and the count is what the client got."""
    name, site = server
    film = served / "shorter.mp4"
    for route, headers in SHORTER[name]:
        session = site.session()
        path = f"{route}/shorter.mp4"
        bare = cut_short(site, play(path, site.session()), {**headers, "X-Bare": "1"}, film)
        got = cut_short(site, play(path, session), headers, film)
        assert abs(got - bare) <= 1 << 18, f"{route} {headers}: {bare} bare, {got} with us"
        (sent,) = site.sent(session)
        assert abs(sent - got) <= CLOSE, f"{route} {headers}: counted {sent}, taken {got}"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGABRT, signal.SIGQUIT])
@pytest.mark.parametrize("path", ["/wrapper/long.mp4", "/generator/long.mp4"])
def test_worker_interrupted_in_a_response(end: signal.Signals, path: str, served: Path) -> None:
    """gunicorn's sync worker leaves by SystemExit, in the middle of sendfile or of the app's own chunk."""
    with started("gunicorn sync", served) as site:
        session = site.session()
        with site.client(buffer=SMALL_BUFFER) as client:
            client.request("GET", play(path, session))
            read = client.read_some(TASTE)
            stall(client)
            (worker,) = workers_of(site.process.pid)
            os.kill(worker, end)
            read += client.drain_what_comes_in_part()
        (sent,) = site.sent(session)
    assert abs(sent - read) <= CLOSE, f"counted {sent}, taken {read}"
