"""How fast one relay delivers, and what a backlog costs the request thread.

Each figure is printed beside its target. The exit code is 1 if a target is missed, 2 if it can't be measured. The API
is a process of its own that does nothing but answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from overhead import (
    CHUNK,
    HERE,
    SESSION,
    Cannot,
    answering,
    environment,
    machine,
    one_chunk,
    paused,
    request_environ,
    requester,
    settings,
)

from t23_middleware import T23Middleware
from t23_middleware.relay.outbox import Ingest, SQLiteOutbox
from t23_middleware.relay.report import Report
from t23_middleware.state import StateFolder, boot_id, lock_is_held, network_namespace
from t23_middleware.transfer import FORMAT, Opening, Part, Play, Transfer, Writer, encode

#: Reports per second of one relay, for each time in seconds in which the API answers.
TARGETS = {0.0: 1500, 0.02: 300}
#: Reports that are delivered for one figure.
REPORTS = {0.0: 30_000, 0.02: 6_000}
#: Reports that wait, and how much slower they may make a tracked request's median.
WAITING = 100_000
SLOWER = 1.15
#: Requests of a turn, and turns of each kind.
PACED, TURNS = 300, 5


class Figure(NamedTuple):
    """One line."""

    name: str
    value: float
    unit: str
    target: str
    met: bool


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 0 where all targets are met, 1 where one is missed, 2 where one can't be measured."""
    options = _options(arguments)
    if options.api is not None:
        return asyncio.run(answer(options.api))
    try:
        with tempfile.TemporaryDirectory(prefix="t23-delivery-", dir=options.dir) as folder:
            return report(options, Path(folder))
    except (Cannot, OSError, subprocess.SubprocessError) as error:
        print(f"delivery: {error}", file=sys.stderr)
        return 2


def report(options: argparse.Namespace, folder: Path) -> int:
    print("  ".join(f"{name}: {value}" for name, value in machine(folder).items()), flush=True)
    all_met = True
    for part in options.only or list(PARTS):
        for figure in PARTS[part](folder / part):
            verdict = "ok" if figure.met else "MISSED"
            print(f"{figure.name:52}{figure.value:>10,.1f} {figure.unit:10} {figure.target:>16}  {verdict}")
            all_met = all_met and figure.met
    return 0 if all_met else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="PART", action="append", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--dir", default="/var/tmp", help="where the outbox goes; a real disk (%(default)s)")
    parser.add_argument("--api", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# The API.

SAID = '{"status":"ok","permission_level":"anonymous","message":"The play was reported","cached":"0"}'


class Answering(asyncio.Protocol):
    """Answers each request after a fixed number of seconds; a GET returns how many there were, and when."""

    seconds = 0.0
    count, first, last = 0, 0.0, 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            size = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self._data) < end + 4 + size:
                return
            self._data = self._data[end + 4 + size :]
            self._asked(head.startswith(b"post"))

    def _asked(self, reported: bool) -> None:
        kind = Answering
        if not reported:
            self._say(json.dumps([kind.count, kind.first, kind.last]))
            return
        kind.count, kind.last = kind.count + 1, time.monotonic()
        kind.first = kind.first or kind.last
        loop = asyncio.get_running_loop()
        loop.call_later(kind.seconds, self._say, SAID)

    def _say(self, text: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self._transport.write((head + text).encode())


async def answer(seconds: float) -> int:
    """Be the API until ended; says its port."""
    Answering.seconds = seconds
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
    return 0


@contextmanager
def api(seconds: float) -> Iterator[str]:
    """The URL of an API that answers in *seconds*."""
    command = [sys.executable, str(HERE / "delivery.py"), "--api", str(seconds)]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def relay(folder: StateFolder, url: str) -> Iterator[None]:
    """One relay, from the moment at which it works."""
    command = [sys.executable, "-m", "t23_middleware", "relay"]
    words = folder.path / "words"
    with words.open("wb") as log:
        process = subprocess.Popen(command, env=environment(folder.path, url), stderr=log)
    with ended(process):
        wait_for(lambda: lock_is_held(folder.relay_lock) or process.poll() is not None, "no relay starts")
        if process.poll() is not None:
            raise Cannot(f"the relay ended: {words.read_text(errors='replace').strip()}")
        yield


def wait_for(true: Callable[[], bool], why: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise Cannot(why)
        time.sleep(0.05)


# The parts.


def speed(folder: Path) -> Iterator[Figure]:
    """The journals of dead writers, from the first report at the API to the last, reading them included."""
    for seconds, target in TARGETS.items():
        state, count = StateFolder(folder / str(seconds)), REPORTS[seconds]
        leave(state, count)
        with api(seconds) as url, relay(state, url):

            def told(url: str = url) -> Any:
                return json.load(urllib.request.urlopen(url))

            wait_for(lambda count=count: told()[0] >= count, "not all reports arrived in time")  # type: ignore[misc]
            _, first, last = told()
        name = f"one relay, an API that answers {'at once' if not seconds else f'in {seconds * 1000:.0f} ms'}"
        rate = count / (last - first)
        yield Figure(name, rate, "reports/s", f">= {target:,}", rate >= target)


def leave(state: StateFolder, count: int) -> None:
    """The journal of a worker that died after *count* plays."""
    state.create()
    now_ns, now_ms = time.monotonic_ns() - 10**10, time.time_ns() // 10**6 - 10_000
    header = Writer("1-bench", FORMAT, "0.1.0", boot_id(), now_ms, "digest", network_namespace())
    with (state.journals / "1-bench.000000.journal").open("wb") as file:
        file.write(encode(header))
        for number in range(count):
            play = Play(f"session-{number:08d}", str(7_190_971 + number % 50))
            opened = Opening(number, now_ns + number, now_ms, play, Part(0, 99_999, 100_000), 200, 100_000)
            file.write(encode(opened))
            file.write(encode(Transfer(opened, now_ns + number + 1000, now_ms + 1, 100_000)))


def backlog(folder: Path) -> Iterator[Figure]:
    """A tracked request, paced as in a worker, beside a relay whose API is down: without and with a backlog."""
    down = "http://127.0.0.1:9"
    medians: dict[int, list[float]] = {0: [], WAITING: []}
    for turn in range(TURNS):
        for waiting, found in medians.items():
            state = StateFolder(folder / f"{turn}-{waiting}")
            state.create()
            fill(state, waiting)
            with relay(state, down):
                found.append(median(paused([tracked(state)], PACED)[0]) / 1000)
    empty, full = (median(found) for found in medians.values())
    yield Figure("tracked request, p50, nothing waits", empty, "µs", "", True)
    target = f"<= {SLOWER:.2f} x {empty:.1f}"
    name = f"tracked request, p50, {WAITING:,} reports wait"
    yield Figure(name, full, "µs", target, full <= SLOWER * empty)


def tracked(state: StateFolder) -> Callable[[], object]:
    """A play, both journal lines."""
    app = T23Middleware(answering("video/mp4", one_chunk, len(CHUNK)), settings(state.path))
    return requester(app, request_environ(SESSION, "_ga=GA1.2.1234.5678"))


def fill(state: StateFolder, waiting: int) -> None:
    outbox = SQLiteOutbox(state.outbox)
    now_ms = time.time_ns() // 10**6
    for start in range(0, waiting, 10_000):
        reports = [
            Report(now_ms + n, "", f"session-{n}", "7", 100_000, 0) for n in range(start, start + 10_000)
        ]
        outbox.ingest(Ingest(reports, [], {}, {}))
    outbox.close()


PARTS: dict[str, Callable[[Path], Iterator[Figure]]] = {"speed": speed, "backlog": backlog}

if __name__ == "__main__":
    sys.exit(main())
