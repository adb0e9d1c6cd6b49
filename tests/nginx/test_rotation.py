"""nginx's log is renamed and nginx is reloaded while a client takes a film: it is reported once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from ..chaos.api import relay
from ..harness import PATIENCE, until
from ..servers.client import Client
from .stage import FILM_BYTES, SHORT, SHORT_BYTES, Stage, behind_nginx, new_session, target

WAYS = ("file", "accel")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """No relay but those that the tests start."""
    with behind_nginx("gunicorn", T23_RELAY="external") as stage:
        yield stage


def during_a_play(way: str, stage: Stage, happens: Callable[[], object]) -> str:
    """Something happens while a client takes a film, all of which it gets; its session."""
    session = new_session()
    with Client(stage.nginx.ports["plain"]) as client:
        client.request("GET", target(way, session))
        taken = client.read_some(1_000_000)
        happens()
        assert taken + client.drain() == FILM_BYTES
    return session


def relaying(stage: Stage) -> AbstractContextManager[subprocess.Popen[bytes]]:
    app = stage.apps["gunicorn"]
    return relay(app.state.path, stage.api.url, T23_PROXY_LOG=str(stage.nginx.log))


def assert_reported_once(stage: Stage, session: str) -> None:
    """And a play after it as well, at whose report the log is read to its end."""
    assert stage.sizes(session) == [FILM_BYTES]
    later = new_session()
    with Client(stage.nginx.ports["plain"]) as client:
        client.ask("GET", target("accel", later, SHORT))
    assert stage.sizes(later) == [SHORT_BYTES]
    assert len(stage.reports(session)) == 1
    assert stage.status()["waiting"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_rotation_in_mid_transfer(way: str, stage: Stage):
    """A rotation of the log in the middle of a transfer loses and doubles no report."""
    with relaying(stage):
        assert_reported_once(stage, during_a_play(way, stage, stage.nginx.rotate))


@pytest.mark.parametrize("way", WAYS)
def test_rotation_without_relay(way: str, stage: Stage):
    """Rotations of the log while no relay runs lose and double no report."""

    def rotate_twice() -> None:
        stage.nginx.rotate()
        stage.nginx.rotate()

    session = during_a_play(way, stage, rotate_twice)
    stage.nginx.rotate()
    with relaying(stage):
        assert_reported_once(stage, session)


@pytest.mark.parametrize("way", WAYS)
def test_rotation_line_in_renamed_log(way: str, stage: Stage):
    """A line that nginx writes to the renamed log is read there.

    nginx does so between the rename and USR1, or always where it gets no USR1.
    """
    with relaying(stage):
        session = during_a_play(way, stage, stage.nginx.rename)
        assert stage.sizes(session) == [FILM_BYTES]
        stage.nginx.reopen()
        assert_reported_once(stage, session)


@pytest.mark.parametrize("way", WAYS)
def test_reload_in_mid_transfer(way: str, stage: Stage):
    """A reload of nginx in the middle of a transfer loses and doubles no report."""
    with relaying(stage):
        assert_reported_once(stage, during_a_play(way, stage, stage.nginx.reload))


def test_killed_relay_resumes_the_log(stage: Stage):
    """A relay that is killed and started again continues the log where it was: each play is reported once."""
    sessions = []
    for _ in range(3):
        with relaying(stage) as process:
            sessions.append(during_a_play("accel", stage, stage.nginx.rotate))
            assert stage.sizes(sessions[-1]) == [FILM_BYTES]
            assert until(lambda: stage.status()["waiting"] == 0)
            process.kill()
            process.wait(PATIENCE)
    with relaying(stage):
        assert_reported_once(stage, sessions[-1])
    assert [len(stage.reports(session)) for session in sessions] == [1, 1, 1]
