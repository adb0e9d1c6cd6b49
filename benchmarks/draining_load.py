"""What draining connections cost the relay: real sockets whose clients do not read, and the relay's share of a core.

The script is the server of that many connections. It writes to them, closes half of them, and writes journal lines by
which they drain. A real relay watches them. Its CPU time is what the kernel counts for its process; a relay with nothing
to watch is measured in the same way. Loopback only; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t23_middleware.journal import JournalWriter  # noqa: E402
from t23_middleware.relay.outbox import NoOutbox, OutboxView  # noqa: E402
from t23_middleware.relay.sock_diag import dump  # noqa: E402
from t23_middleware.state import StateFolder  # noqa: E402
from t23_middleware.transfer import Connection, Opening, Part, Play, Transfer, encode  # noqa: E402

BODY = 60_000
SO_COOKIE = 57
#: Percent of a core, for 1,000 connections.
BUDGET = 10.0
#: Nothing listens there, so nothing is reported while everything drains.
API = "http://127.0.0.1:9"


def main() -> int:
    """Print the figures, one line of JSON per number of connections; 0 where the budget is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[0, 100, 1000, 4000])
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    is_cheap = True
    for connections in options.connections:
        figures = measure(connections, options.seconds)
        print(json.dumps(figures), flush=True)
        is_cheap = is_cheap and (connections > 1000 or figures["relay_percent_of_a_core"] <= BUDGET)
    return 0 if is_cheap else 1


def measure(connections: int, seconds: float) -> dict[str, float]:
    """The figures for that number of *connections*."""
    with tempfile.TemporaryDirectory() as state, closing(socket.create_server(("127.0.0.1", 0))) as listening:
        folder = StateFolder(Path(state) / "t23")
        writer = JournalWriter(folder, "0", "0")
        ends = [drain(listening, writer, number) for number in range(connections)]
        environ = {**os.environ, "T23_API_URL": API, "T23_STATE_DIR": str(folder.path)}
        relay = subprocess.Popen(
            [sys.executable, "-m", "t23_middleware", "relay"],
            env=environ,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(folder, connections)
            began, spent = time.monotonic(), cpu_seconds(relay.pid)
            time.sleep(seconds)
            share = (cpu_seconds(relay.pid) - spent) / (time.monotonic() - began)
            drained = draining(folder)
        finally:
            relay.kill()
            relay.wait()
        began = time.perf_counter()
        rows = dump([listening.getsockname()[1]])
        took = time.perf_counter() - began
        for end in [each for pair in ends for each in pair]:
            end.close()
        writer.close()
    return {
        "connections": connections,
        "draining": drained,
        "relay_percent_of_a_core": round(100 * share, 1),
        "rows_in_a_dump": len(rows),
        "ms_per_dump": round(1000 * took, 1),
    }


def drain(
    listening: socket.socket, writer: JournalWriter, number: int
) -> tuple[socket.socket, socket.socket]:
    """A connection with an unread body, and its lines; every second one is closed by the server."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(listening.getsockname())
    server, _ = listening.accept()
    (cookie,) = struct.unpack("=q", server.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    server.sendall(bytes(BODY))
    now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
    where = Connection(cookie, listening.getsockname()[1], socket.AF_INET, 0)
    play, part = Play(f"{number:032x}", "7190971"), Part(0, BODY - 1, BODY)
    opening = Opening(number, now_ns, now_ms, play, part, 200, BODY, connection=where)
    writer.write(encode(opening))
    writer.write(encode(Transfer(opening, now_ns + 1, now_ms, BODY, position=BODY)))
    if number % 2:
        server.close()
    return client, server


def draining(folder: StateFolder) -> int:
    """How many responses drain, as the relay notes it."""
    try:
        with OutboxView(folder.outbox) as view:
            return int(view.snapshot().notes.get("draining", "0"))
    except NoOutbox:
        return -1


def wait_for(folder: StateFolder, connections: int) -> None:
    """Wait until that many responses drain in the relay. Raises RuntimeError if it takes too long."""
    deadline = time.monotonic() + 60
    while draining(folder) != connections:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the relay looks after {draining(folder)} of {connections} connections")
        time.sleep(0.2)
    time.sleep(2)


def cpu_seconds(pid: int) -> float:
    """CPU time of the process and its threads so far, user's and kernel's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
