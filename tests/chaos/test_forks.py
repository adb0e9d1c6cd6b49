"""Fork in every way that servers and apps do: each process writes down its own, and all arrives once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ..harness import CLIP_BYTES, need, running, until
from .api import plain_api
from .load import Verdict, all_arrived, play

pytestmark = pytest.mark.chaos

UWSGI = "uwsgi --http-socket 127.0.0.1:PORT --master --processes 3 --die-on-term --module tests.chaos.app:app"
COMMANDS = {
    "gunicorn": "gunicorn -w 3 -b 127.0.0.1:PORT tests.chaos.app:app",
    "gunicorn preload": "gunicorn --preload -w 3 -k gthread --threads 4 -b 127.0.0.1:PORT tests.chaos.app:app",
    "uwsgi": UWSGI,
    "uwsgi lazy-apps": f"{UWSGI} --lazy-apps",
    "uwsgi threads": f"{UWSGI} --threads 4",
}
#: Seconds in which all has to arrive on a busy machine.
ARRIVAL = 60.0


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Verdict]]]:
    """All servers side by side."""
    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        yield {
            name: pool.submit(fork_everywhere, COMMANDS[name], tmp_path_factory.mktemp("forks") / "state")
            for name in COMMANDS
        }


@pytest.mark.parametrize("name", COMMANDS)
def test_forked_processes_report_once(name: str, verdicts: dict[str, Future[Verdict]]) -> None:
    """What parents and children serve arrives once each."""
    need(COMMANDS[name].split()[0])
    verdict = verdicts[name].result()
    assert verdict.held == 60 + 12 + 20
    assert verdict.nothing_is_lost()
    assert verdict.doubled == 0


def fork_everywhere(command: str, state: Path) -> Verdict:
    expected: dict[str, int] = {}
    with plain_api() as api, running(command, state, api.url) as server:

        def play_as(session: str) -> None:
            response = play(server.port, session)
            assert response is not None, server.log()
            expected[session] = response.sent

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(play_as, [f"before{number}" for number in range(60)]))
            api.wait_for(60, ARRIVAL)  # the relay runs, and every worker has its journal by now
            for number in range(6):
                for way in ("fork", "multiprocessing"):
                    session = f"{way}{number}"
                    assert server.get(f"/{way}?session_id={session}")[0] == 200, server.log()
                    expected[session] = CLIP_BYTES
            list(clients.map(play_as, [f"after{number}" for number in range(20)]))
        assert until(lambda: all_arrived(expected, api.recorded()), ARRIVAL), server.log()
        server.stop()
        return Verdict.of(expected, api.recorded())
