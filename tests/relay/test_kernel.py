"""Responses that the server is done with and the client is not: real connections, and a relay as a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import PATIENCE, ROOT, until
from .readers import rows, seen, stats
from .tcp_worker import TCPWorker, serving
from .test_process import RelayProcess, digest, environ

#: A body that the server's send buffer takes at once.
BODY = 200_000
Run = Callable[..., RelayProcess]


def listens(pid: int) -> bool:
    """Whether that process hears of destroyed sockets: netlink's SOCK_DIAG (4), groups 1 and 3."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/net/netlink").read_text().splitlines()[1:]]
    except OSError:
        return False
    return any(words[1:3] == ["4", str(pid)] and int(words[3], 16) & 5 == 5 for words in lines)


@pytest.fixture
def run(api: StandInServer, folder: StateFolder, tmp_path: Path) -> Iterator[Run]:
    """Starts relays that listen; all are ended with the test."""
    started: list[RelayProcess] = []

    def begin(automatic: bool = False, before: Sequence[str] = (), **more: str) -> RelayProcess:
        log = tmp_path / "relay.log"
        relay = RelayProcess(environ(api, folder, **more), log, automatic=automatic, before=before)
        started.append(relay)
        if more.get("T23_ACKED") != "0":
            process = relay.process  # one with a crash point may be gone already
            assert until(lambda: listens(process.pid) or process.poll() is not None), relay.log()
        return relay

    yield begin
    for relay in started:
        relay.end()
        assert "Traceback" not in relay.log()


@pytest.fixture
def worker(api: StandInServer, folder: StateFolder) -> Iterator[TCPWorker]:
    with serving(folder, digest(api, folder)) as worker:
        yield worker


def reported(api: StandInServer) -> dict[str, tuple[int, int]]:
    """Session -> skip and bytes; none is reported twice."""
    found = {each["session_id"]: (int(each["skip"]), int(each["bytes_total"])) for each in api.recorded()}
    assert len(found) == len(api.recorded())
    return found


def drains(folder: StateFolder, number: int) -> bool:
    """Whether so many responses drain, as the relay says it."""
    return until(lambda: seen(folder).notes.get("draining") == str(number))


def test_viewer_who_leaves_early(api, folder, run, worker):
    """Closed by its client with unread bytes, or reset, on a connection that the server closed or keeps."""
    run()
    expected = {}
    kinds = {"close": {}, "reset": {"reset": True}}
    for kind, how in kinds.items():
        for closes in (True, False):
            client = worker.connect()
            base = worker.respond(client, f"{kind} {closes}", BODY, close=closes)["base"]
            client.read(base + 30_000)
            took = client.leave(**how)
            if not closes:
                worker.close(client)
            expected[f"{kind} {closes}"] = (0, took - base)
    api.wait_for(4, PATIENCE)
    assert reported(api) == expected
    assert all(sent < BODY for _, sent in expected.values())
    assert stats(folder).captured == 4
    assert "unknown_end" not in seen(folder).counters


def test_client_that_reads_all(api, folder, run, worker):
    """Its report comes when its kernel has the last byte, and not before; then it is exact."""
    run()
    closed, kept = worker.connect(), worker.connect()
    for client, session in ((closed, "closed"), (kept, "kept")):
        base = worker.respond(client, session, BODY, close=client is closed)["base"]
    assert drains(folder, 2)
    assert api.recorded() == []
    for client in (closed, kept):
        client.read(base + BODY)
    api.wait_for(2, PATIENCE)
    assert reported(api) == {"closed": (0, BODY), "kept": (0, BODY)}
    assert drains(folder, 0)


def test_acknowledged_response_told_at_once(api, run, worker):
    run()
    client = worker.connect(receive=None)
    worker.respond(client, "fast", 20_000)
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"fast": (0, 20_000)}


def test_pipelined_responses_counted_apart(api, folder, run, worker):
    """Three on one connection; the client reads one and a half of them and leaves."""
    run()
    client = worker.connect()
    bases = [worker.respond(client, name, 60_000)["base"] for name in ("one", "two", "three")]
    assert drains(folder, 3)
    client.read(bases[1] + 20_000)
    assert drains(folder, 2), "the first is all there, and the connection lives"
    took = client.leave()
    worker.close(client)
    assert took < bases[2]
    assert until(lambda: seen(folder).counters.get("ignored_empty") == 1), "the third: nothing of it arrived"
    api.wait_for(2, PATIENCE)
    assert reported(api) == {"one": (0, 60_000), "two": (0, took - bases[1])}


def test_client_of_dual_stack_listener(api, folder, run):
    """An IPv4 client of it is an IPv6 socket to the kernel."""
    run()
    with serving(folder, digest(api, folder), host="::") as worker:
        client = worker.connect()
        base = worker.respond(client, "viewer", BODY, close=True)["base"]
        assert drains(folder, 1)
        client.read(base + 50_000)
        took = client.leave()
        api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}


@pytest.mark.parametrize("progress", [False, True], ids=["sendfile", "after a progress line"])
def test_worker_killed_in_a_response(progress, api, folder, run, worker):
    """The connection outlives its worker; the client goes on reading, and leaves."""
    run()
    client = worker.connect()
    base = worker.respond(client, "viewer", 10_000_000, at_once=40_000, progress=progress)["base"]
    client.read(base + 20_000)
    time.sleep(0.3)
    worker.kill()
    assert drains(folder, 1)
    client.read(30_000)
    took = client.leave()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}
    assert {name: seen(folder).counters.get(name) for name in ("interrupted", "interrupted_unknown")} == {
        "interrupted": 1,
        "interrupted_unknown": None,
    }


def test_client_gone_before_its_worker(api, folder, run, worker):
    """The connection ends together with the worker: its end is told before the relay knows that the worker died."""
    run()
    client = worker.connect()
    base = worker.respond(client, "viewer", 10_000_000, at_once=40_000)["base"]
    client.read(base + 20_000)
    took = client.leave(reset=True)
    worker.kill()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}


def test_killed_worker_nobody_listened(api, folder, run, worker):
    """Of a sendfile nothing is known then; of a response with a progress line, what that says."""
    for session, progress in (("sendfile", False), ("generator", True)):
        client = worker.connect()
        worker.respond(client, session, 10_000_000, at_once=40_000, progress=progress)
        client.leave(reset=True)
    worker.kill()
    time.sleep(0.2)
    run()
    api.wait_for(1, PATIENCE)
    assert until(lambda: seen(folder).counters.get("interrupted_unknown") == 1)
    assert reported(api) == {"generator": (0, 40_000)}


def test_end_that_nobody_heard(api, folder, run, worker):
    """The client left before a relay came: the server's count has to do, and is counted as such."""
    client = worker.connect()
    worker.respond(client, "viewer", BODY, close=True)
    client.leave()
    run()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, BODY)}
    assert until(lambda: seen(folder).counters.get("unknown_end") == 1)


def test_relay_that_comes_in_between(api, folder, run, worker):
    """What drains already when it comes is heard to its end."""
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY, close=True)["base"]
    run()
    assert drains(folder, 1)
    client.read(base + 60_000)
    took = client.leave()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}


def test_stopped_server_with_dead_connection(api, folder, run, worker):
    """Its client is gone, the server does not close the socket: that is no end, and the count comes with the end."""
    run()
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY)["base"]
    assert drains(folder, 1)
    os.kill(worker.process.pid, signal.SIGSTOP)
    client.read(base + 60_000)
    took = client.leave(reset=True)
    time.sleep(1.5)
    assert api.recorded() == []
    worker.kill()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}


def test_automatic_relay_stays_for_drains(api, folder, run, worker):
    relay = run(automatic=True)
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY, close=True)["base"]
    assert drains(folder, 1)
    worker.kill()
    time.sleep(2.5)
    assert relay.process.poll() is None
    client.read(base + BODY)
    assert relay.wait() == 0
    assert reported(api) == {"viewer": (0, BODY)}
    assert not folder.has_work()
    assert list(folder.journals.iterdir()) == []


def test_drain_wait_is_bounded(api, folder, run, worker):
    """Of a viewer that never reads, and of an orphan, what is known last is reported."""
    run(T23_DRAIN_WAIT="1")
    stalled, orphan = worker.connect(), worker.connect()
    base = worker.respond(stalled, "stalled", BODY, close=True)["base"]
    orphans = worker.respond(orphan, "orphan", 10_000_000, at_once=40_000)["base"]
    time.sleep(0.3)
    took = stalled.took(), orphan.took()
    worker.kill()
    api.wait_for(2, PATIENCE)
    assert reported(api) == {"stalled": (0, took[0] - base), "orphan": (0, took[1] - orphans)}
    assert until(lambda: seen(folder).counters.get("drain_wait_over") == 2)


@pytest.mark.parametrize("per", ["response", "stream"])
def test_sigterm_tells_last_known_count(per, api, folder, run, worker):
    relay = run(T23_REPORT_PER=per, T23_MIN_BYTES="1000")
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY, close=True)["base"]
    assert drains(folder, 1)
    client.read(base + 50_000)
    time.sleep(0.3)
    took = client.took()
    assert relay.end(signal.SIGTERM) == 0
    assert reported(api) == {"viewer": (0, took - base)}
    assert seen(folder).notes["draining"] == "0"
    assert stats(folder).sent == 1


@pytest.mark.parametrize("number", [1, 5])
def test_stopped_relay_sends_drains_behind_others(number, api, folder, run, worker):
    """A relay that has sent reports before sends those of its drains at SIGTERM too, before it ends."""
    relay = run()
    worker.respond(worker.connect(receive=None), "before", 20_000)
    api.wait_for(1, PATIENCE)
    assert until(lambda: stats(folder).sent == 1)
    clients = [worker.connect() for _ in range(number)]
    bases = [
        worker.respond(client, f"viewer {each}", BODY, close=True)["base"]
        for each, client in enumerate(clients)
    ]
    assert drains(folder, number)
    expected = {
        f"viewer {each}": (0, client.took() - base)
        for each, (client, base) in enumerate(zip(clients, bases, strict=True))
    }
    expected["before"] = (0, 20_000)
    assert relay.end(signal.SIGTERM) == 0
    assert reported(api) == expected
    assert stats(folder).sent == number + 1


def test_stream_told_with_final_bytes(api, folder, run, worker):
    """Two responses of one viewing, one of which drains: one report with what arrived of both, when that is known."""
    run(T23_REPORT_PER="stream", T23_STREAM_IDLE="0.5", T23_MIN_BYTES="1000")
    first, second = worker.connect(receive=None), worker.connect()
    worker.respond(first, "viewer", 20_000, total=5_000_000)
    base = worker.respond(second, "viewer", BODY, first=20_000, total=5_000_000)["base"]
    assert drains(folder, 1)
    time.sleep(1.5)
    assert api.recorded() == [], "what drains is open to T23_STREAM_IDLE"
    second.read(base + 50_000)
    took = second.leave()
    worker.close(second)
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, 20_000 + took - base)}


def test_kills_of_the_relay_lose_nothing(api, folder, run, worker):
    """Killed at any time while responses drain; the next one hears the end of those that live so long."""
    clients = []
    for number in range(10):
        relay = run()
        client = worker.connect()
        base = worker.respond(client, f"s{number}", BODY, close=True)["base"]
        clients.append((client, base))
        until(lambda: seen(folder).notes.get("draining", "0") != "0", 0.2 * (number % 5))
        relay.end()
    run()
    assert drains(folder, 10)
    expected = {}
    for number, (client, base) in enumerate(clients):
        client.read(base + 5000 * number)
        expected[f"s{number}"] = (0, client.leave() - base)
    api.wait_for(10, PATIENCE)
    assert reported(api) == expected
    assert stats(folder).captured == 10


@pytest.mark.parametrize("point", ["after_acknowledged", "after_ingest_commit", "after_unlink"])
def test_relay_killed_with_what_it_heard(point, api, folder, run, worker):
    """An end that was heard is in its journal at once; from there it is reported once, wherever relays die."""
    first = run()
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY, close=True)["base"]
    assert drains(folder, 1)
    first.end()
    second = run(_T23_CRASH_AT=point)
    client.read(base + 60_000)
    took = client.leave()
    assert until(
        lambda: [path for path in folder.journals.glob("relay-*") if b'["acked"' in path.read_bytes()]
    )
    until(lambda: second.process.poll() is not None, 1.0)
    second.end()
    third = run(_T23_CRASH_AT=point)
    until(lambda: third.process.poll() is not None, 1.0)
    third.end()
    run()
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, took - base)}
    assert until(lambda: list(folder.journals.glob("relay-*.journal")) == [])
    assert stats(folder).captured == 1


def test_acked_off_counts_handed_over(api, folder, run, worker):
    run(T23_ACKED="0")
    client = worker.connect()
    worker.respond(client, "viewer", BODY, close=True)
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, BODY)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_other_network_namespace_not_asked(api, folder, run, worker):
    """The kernel tells a relay nothing of its connections: the server's count is told at once, and `check` says so."""
    run(before=("unshare", "--net"))
    client = worker.connect()
    worker.respond(client, "viewer", BODY, close=True)
    assert until(lambda: rows(folder, "SELECT sent FROM reports") == [(BODY,)])
    notes = seen(folder).notes
    assert (notes["writers_elsewhere"], notes["draining"], notes["kernel_problem"]) == ("1", "0", "")
    assert "unknown_end" not in seen(folder).counters


def test_once_tells_last_known_count(api, folder, worker):
    """By hand, while the worker lives and the viewer stalls."""
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY)["base"]
    client.read(base + 40_000)
    time.sleep(0.3)
    took = client.took()
    done = subprocess.run(
        [sys.executable, "-m", "t23_middleware", "relay", "--once"],
        env={**os.environ, **environ(api, folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "Sent 1 report.\nNothing is left.\n", done.stderr
    assert reported(api) == {"viewer": (0, took - base)}


def test_leaving_worker_gets_its_count_told(api, folder, run, worker):
    """With T23_EPHEMERAL a worker waits for its reports at its end: its own drains wait no longer, others' do."""
    run(T23_EPHEMERAL="1")
    with serving(folder, digest(api, folder, T23_EPHEMERAL="1")) as other:
        theirs = other.connect()
        other_base = other.respond(theirs, "other", BODY)["base"]
        client = worker.connect()
        base = worker.respond(client, "viewer", BODY)["base"]
        assert drains(folder, 2)
        took = client.took()
        before_ns = time.time_ns()
        worker.tell("record_leaving")
        api.wait_for(1, PATIENCE)
        assert reported(api) == {"viewer": (0, took - base)}
        assert until(lambda: folder.delivered.stat().st_mtime_ns > before_ns)
        theirs.read(other_base + BODY)
        api.wait_for(2, PATIENCE)
    assert reported(api)["other"] == (0, BODY)


def test_leaving_at_once_after_a_play(api, folder, run, worker):
    """Its last close line is not read yet as it says that it leaves."""
    run(T23_EPHEMERAL="1")
    client = worker.connect()
    base = worker.respond(client, "viewer", BODY)["base"]
    worker.tell("record_leaving")
    api.wait_for(1, PATIENCE)
    assert reported(api) == {"viewer": (0, client.took() - base)}
