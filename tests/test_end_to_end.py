"""From a server's own command to the reports at the API: real servers, real files, real kills."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import lock_is_held

from .harness import (
    CLIP_BYTES,
    COMMANDS,
    MEDIA,
    PATIENCE,
    ROOT,
    answers,
    end_relay,
    need,
    need_root,
    running,
    until,
)
from .ports import free_port


def play(session: str) -> str:
    return f"{MEDIA}?session_id={session}&photo_id=123"


def mixed_requests(count: int) -> list[tuple[str, str, dict[str, str]]]:
    """(kind, path, headers) of *count* requests, each with a session of its own."""
    kinds = {
        "whole": {},
        "range": {"Range": "bytes=1000-200000"},
        "open range": {"Range": "bytes=700000-"},
        "suffix": {"Range": "bytes=-5000"},
        "probe": {"Range": "bytes=0-1"},
        "beyond": {"Range": f"bytes={CLIP_BYTES}-"},
        "no session": {},
        "wrong path": {},
    }
    chosen = [list(kinds)[number % len(kinds)] for number in range(count)]
    random.Random(1).shuffle(chosen)
    made = []
    for number, kind in enumerate(chosen):
        path = play(f"s{number}")
        if kind == "no session":
            path = MEDIA
        elif kind == "wrong path":
            path = path.replace("-video", "-film")
        made.append((kind, path, kinds[kind]))
    return made


def session_of(path: str) -> str:
    return path.partition("session_id=")[2].partition("&")[0]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_one_report_per_play(command, api, tmp_path):
    """Each play becomes one report, with the number of bytes that the client received."""
    expected = {}
    with running(command, tmp_path / "state", api.url) as server:

        def request(job):
            kind, path, headers = job
            return kind, path, *server.get(path, **headers)

        with ThreadPoolExecutor(8) as pool:
            for kind, path, status, body in pool.map(request, mixed_requests(200)):
                if kind in ("whole", "range", "open range", "suffix"):
                    assert status in (200, 206), server.log()
                    expected[session_of(path)] = str(len(body))
        head = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        head.request("HEAD", play("head"))
        assert head.getresponse().status == 200
        head.close()
        api.wait_for(len(expected), PATIENCE)
    told = api.recorded()
    assert {report["session_id"]: report["bytes_total"] for report in told} == expected
    assert len(told) == len(expected)
    assert {report["photo_id"] for report in told} == {"123"}


def test_early_disconnect_reports_less(api, tmp_path, big_app):
    """A client that disconnects early is reported with fewer bytes than the file has."""
    with running(COMMANDS_FOR_BIG, tmp_path / "state", api.url, PYTHONPATH=str(big_app)) as server:
        client = socket.create_connection(("127.0.0.1", server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(b"GET /big.mp4?session_id=cut&photo_id=7 HTTP/1.1\r\nHost: x\r\n\r\n")
        _, _, taken = client.recv(65536, socket.MSG_WAITALL).partition(b"\r\n\r\n")
        client.close()
        (report,) = api.wait_for(1, PATIENCE)
    assert 0 < len(taken) <= int(report["bytes_total"]) < 64 << 20


COMMANDS_FOR_BIG = "gunicorn -w 1 -k gthread --threads 4 -b 127.0.0.1:PORT big:app"


@pytest.fixture
def big_app(tmp_path) -> Path:
    """A folder with an app that sends a 64 MiB file, more than all buffers between."""
    (tmp_path / "big.mp4").touch()
    os.truncate(tmp_path / "big.mp4", 64 << 20)
    (tmp_path / "big.py").write_text(
        "from pathlib import Path\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'video/mp4'), ('Content-Length', str(64 << 20))])\n"
        "    return environ['wsgi.file_wrapper'](Path(__file__).with_name('big.mp4').open('rb'))\n"
    )
    return tmp_path


@pytest.mark.parametrize("victim", ["worker", "group"])
def test_report_survives_killed_server(victim, api, tmp_path):
    """A report arrives although its server is killed right after the response."""
    with running(COMMANDS["gunicorn gthread"], tmp_path / "state", api.url) as server:
        get_until_the_server_hangs_up(server.port, play("killed"))
        if victim == "group":
            server.signal_group(signal.SIGKILL)
            server.process.wait()
        else:
            for worker in workers_of(server.process.pid):
                os.kill(worker, signal.SIGKILL)
        reports = api.wait_for(1, PATIENCE)
    assert [report["session_id"] for report in reports] == ["killed"]
    assert reports[0]["bytes_total"] == str(CLIP_BYTES)


def get_until_the_server_hangs_up(port: int, path: str) -> None:
    """Unlike a client that counts its bytes, this one knows that the server is done with the response."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        while client.recv(1 << 16):
            pass


def workers_of(parent: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in listing.stdout.split()]


def test_an_outage_loses_nothing_and_doubles_nothing(api, tmp_path):
    with running(COMMANDS["gunicorn gthread"], tmp_path / "state", api.url) as server:
        api.stop()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: server.get(play(f"o{number}"), Range="bytes=0-99999"), range(200)))
        api.start()
        assert until(lambda: len(api.recorded()) >= 200, 90)
    assert Counter(report["session_id"] for report in api.recorded()) == {f"o{n}": 1 for n in range(200)}


def test_next_process_delivers_waiting_report(api, tmp_path):
    """The next process delivers a waiting report at its first request of any kind."""
    with running(COMMANDS["gunicorn gthread"], tmp_path / "state", api.url, T23_RELAY="off") as server:
        get_until_the_server_hangs_up(server.port, play("before"))
        server.signal_group(signal.SIGKILL)
        server.process.wait()
    with running(COMMANDS["gunicorn gthread"], tmp_path / "state", api.url) as server:
        server.get("/favicon.ico")
        assert [report["session_id"] for report in api.wait_for(1, PATIENCE)] == ["before"]


def test_relay_ends_cleanly_after_server(api, tmp_path):
    """The relay leaves no zombie, keeps no pipe of the server open, and ends after the server has ended."""
    need("gunicorn")
    port = free_port()
    state = tmp_path / "state"
    environ = os.environ | {
        "T23_API_URL": api.url,
        "T23_STATE_DIR": str(state),
        "T23_PHOTO_PATTERN": "twentythree",
    }
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = f"run gunicorn -w 1 -k gthread -b 127.0.0.1:{port} examples.flask_app:app".split()
    server = subprocess.Popen(
        [sys.executable, "-m", "t23_middleware", *command],
        env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert until(lambda: answers(port))
        assert fetch(port, play("pipe")) == 200
        api.wait_for(1, PATIENCE)
        tree = subprocess.run(
            ["ps", "-eo", "ppid=,stat=,pid="], capture_output=True, text=True, check=True
        ).stdout
        family = {str(server.pid), *map(str, workers_of(server.pid))}
        zombies = [line for line in tree.splitlines() if line.split()[0] in family and "Z" in line.split()[1]]
        assert zombies == []
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=PATIENCE)  # would hang if the relay had inherited the pipe
    assert b"Traceback" not in output
    lock = state / "relay.lock"
    assert until(lambda: not lock_is_held(lock))
    assert list((state / "journals").iterdir()) == []


def fetch(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_other_settings_get_own_relay(api, tmp_path):
    """Workers with other settings get a relay with their own settings."""
    state = tmp_path / "state"
    with StandInServer() as second:
        with running(COMMANDS["gunicorn gthread"], state, api.url) as old:
            old.get(play("old"))
            api.wait_for(1, PATIENCE)
            with running(COMMANDS["gunicorn gthread"], state, second.url) as new:
                new.get(play("new"))
                # The old relay has to leave first; any request of the new server then starts its successor.
                assert until(lambda: new.get("/favicon.ico") and second.recorded())
        end_relay(new.state)
        assert [report["session_id"] for report in second.recorded()] == ["new"]
    assert [report["session_id"] for report in api.recorded()] == ["old"]


def test_container_waits_for_last_reports(api, tmp_path):
    """A container without a volume can wait for its last reports.

    The server is PID 1 of a PID namespace: when it ends, the kernel kills the relay.
    """
    if os.geteuid() != 0:
        need_root()
    container = (need("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc")
    command, state = COMMANDS["gunicorn gthread"], tmp_path / "state"
    api.fault("latency", seconds=2)  # longer than gunicorn takes to end by itself
    with running(command, state, api.url, container, T23_EPHEMERAL="1", T23_EXIT_SECONDS="20") as server:
        get_until_the_server_hangs_up(server.port, play("last"))
        (first,) = workers_of(server.process.pid)
        os.kill(first, signal.SIGTERM)
        server.process.wait(PATIENCE)
    assert [report["session_id"] for report in api.recorded()] == ["last"]
