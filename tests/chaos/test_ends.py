"""Every server ended by every signal, right after it has hung up on a response."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ..harness import need, running, until
from .api import plain_api
from .load import Verdict, all_arrived, play

pytestmark = pytest.mark.chaos

COMMANDS = {
    "gunicorn": "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT tests.chaos.app:app",
    "waitress": "waitress-serve --listen=127.0.0.1:PORT tests.chaos.app:app",
    "uwsgi": "uwsgi --http-socket 127.0.0.1:PORT --master --processes 2 --die-on-term --module tests.chaos.app:app",
    "flask": "flask --app tests.chaos.app:app run -p PORT",
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL]
CASES = [(name, number) for name in COMMANDS for number in SIGNALS]
#: Servers at a time.
SIDE_BY_SIDE = 6
#: Seconds in which all has to arrive on a busy machine.
ARRIVAL = 60.0


@pytest.fixture(scope="module")
def verdicts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[str, int], Future[Verdict]]]:
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {
            (name, number): pool.submit(
                end_after_a_response, COMMANDS[name], number, tmp_path_factory.mktemp("end") / "state"
            )
            for name, number in CASES
        }


@pytest.mark.parametrize(("name", "number"), CASES)
def test_response_before_server_end_reported(
    name: str, number: int, verdicts: dict[tuple[str, int], Future[Verdict]]
) -> None:
    """A response is reported although a signal ends its server right after it."""
    need(COMMANDS[name].split()[0])
    verdict = verdicts[name, number].result()
    assert verdict.held == 3
    assert verdict.nothing_is_lost()
    assert verdict.doubled == 0


def end_after_a_response(command: str, number: int, state: Path) -> Verdict:
    expected = {}
    with plain_api() as api, running(command, state, api.url) as server:
        for session in ("first", "second", "last"):
            response = play(server.port, session)
            assert response is not None, server.log()
            expected[session] = response.sent
        server.process.send_signal(number)
        assert until(lambda: all_arrived(expected, api.recorded()), ARRIVAL), server.log()
        server.stop()
        return Verdict.of(expected, api.recorded())
