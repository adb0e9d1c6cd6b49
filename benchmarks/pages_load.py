"""The operator's pages under load: how fast they answer with a full outbox, and what they cost viewers of video.

One run, one server command (gunicorn, gthread), two apps: the example app bare, and the same app in the middleware with
many rows in the outbox and its pages open. A script requests pages at a steady rate, alternately on and off, while a
client plays at a steady rate. The bare app's own front page is requested at the same rate: how much that slows a play is
the machine's noise. The exit code is 1 if a budget is missed, 2 if it can't be measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from t23_middleware.relay.outbox import Ingest, SQLiteOutbox  # noqa: E402
from t23_middleware.relay.report import Report  # noqa: E402
from t23_middleware.state import StateFolder  # noqa: E402

TOKEN = "the-token-of-the-benchmark"
PAGES = ("/_t23/", "/_t23/status.json", "/_t23/metrics")
MEDIA = "/4959050/7190971/e6c1b0a94f1d4c3b8f7a2d5e90b7c318/video_medium/a-clip-to-play-video.mp4"
#: Seconds that a page may take with a million reports.
BUDGET = 0.2
#: How much more the pages may slow a play than the bare app's own front page does, as a ratio of medians.
NOISE = 1.1
#: Seconds between two plays, and of each turn with or without pages.
PLAY_EVERY, TURN = 0.02, 4.0
BATCH = 20_000


def fill(folder: StateFolder, rows: int) -> None:
    """Put *rows* reports of the last day into the outbox, as if the API were down."""
    folder.create()
    outbox = SQLiteOutbox(folder.outbox)
    now_ms = time.time_ns() // 1_000_000
    try:
        for start in range(0, rows, BATCH):
            reports = [
                Report(
                    now_ms - 86_400_000 * (rows - n) // rows,
                    "",
                    f"viewer-{n}",
                    str(7190971 + n % 700),
                    100_000,
                    n % 3,
                )
                for n in range(start, min(start + BATCH, rows))
            ]
            outbox.ingest(Ingest(reports, [], {}, {}))
    finally:
        outbox.close()


@contextmanager
def serving(state: Path, port: int, workers: int, *, bare: bool) -> Iterator[None]:
    """The example app under gunicorn, from the moment at which it answers."""
    app = "examples.flask_app:app" if bare else "t23_middleware.wsgi:application"
    environ = os.environ | {
        "T23_APP": "examples.flask_app:app",
        "T23_API_URL": "http://127.0.0.1:9",
        "T23_STATE_DIR": str(state),
        "T23_STATUS_TOKEN": TOKEN,
        "T23_RELAY": "off",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [
        "-m",
        "gunicorn",
        "-w",
        str(workers),
        "-k",
        "gthread",
        "--threads",
        "8",
        "-b",
        f"127.0.0.1:{port}",
        app,
    ]
    server = subprocess.Popen([sys.executable, *command], env=environ, stderr=subprocess.DEVNULL, cwd="/")
    try:
        deadline = time.monotonic() + 30
        while not answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("gunicorn does not start; install what '.[demo,metrics]' names")
            time.sleep(0.05)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def took(port: int, path: str, **headers: str) -> float:
    """Seconds of a GET on a connection of its own, to its last byte."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status not in (200, 206):
        raise SystemExit(f"{path} answers {answer.status}; is prometheus_client installed?")
    return time.perf_counter() - begun


def page(port: int, path: str) -> float:
    return took(port, path, Authorization=f"Bearer {TOKEN}")


class Asking(threading.Thread):
    """Requests the pages at a steady rate while it is on; :attr:`took` has the seconds of each."""

    def __init__(self, port: int, paths: tuple[str, ...], rate: float) -> None:
        super().__init__(daemon=True)
        self.on, self.over = threading.Event(), threading.Event()
        self.took: list[float] = []
        self._port, self._paths, self._rate = port, cycle(paths), rate

    def run(self) -> None:
        due = time.monotonic()
        while not self.over.is_set():
            if not self.on.wait(0.05):
                due = time.monotonic()
                continue
            self.took.append(page(self._port, next(self._paths)))
            due += 1 / self._rate
            time.sleep(max(due - time.monotonic(), 0))


def plays(port: int, seconds: float) -> list[float]:
    """Seconds of each play of 100 kB, requested at a steady rate by one client."""
    found, due = [], time.monotonic()
    end = due + seconds
    while time.monotonic() < end:
        path = f"{MEDIA}?session_id=bench-{time.monotonic_ns()}&photo_id=7"
        found.append(took(port, path, Range="bytes=0-99999"))
        due += PLAY_EVERY
        time.sleep(max(due - time.monotonic(), 0))
    return found


def quiet_and_loaded(ports: dict[str, int], turns: int, rate: float) -> dict[str, object]:
    """For each app: plays without and with requests for pages; the turns of both apps alternate."""
    askers = {"bare": Asking(ports["bare"], ("/",), rate), "t23": Asking(ports["t23"], PAGES, rate)}
    found: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "loaded": []} for name in askers}
    for asker in askers.values():
        asker.start()
    for _ in range(turns):
        for name, asker in askers.items():
            found[name]["quiet"] += plays(ports[name], TURN)
            asker.on.set()
            found[name]["loaded"] += plays(ports[name], TURN)
            asker.on.clear()
            time.sleep(0.3)
    for asker in askers.values():
        asker.over.set()
        asker.join()
    return {"plays": found, "asked": {name: asker.took for name, asker in askers.items()}}


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 95 % within, the longest."""
    return {
        "p50": median(seconds) * 1e3,
        "p95": quantiles(seconds, n=20)[-1] * 1e3,
        "max": max(seconds) * 1e3,
    }


def line(name: str, figures: dict[str, float]) -> str:
    return f"  {name:34} {figures['p50']:8.2f} {figures['p95']:8.2f} {figures['max']:8.2f}"


def measured(rows: int, workers: int, turns: int, rate: float, folder: Path) -> dict[str, object]:
    state = StateFolder(folder / "state")
    begun = time.monotonic()
    fill(state, rows)
    print(
        f"{rows:,} reports in {time.monotonic() - begun:.0f} s, {state.outbox.stat().st_size >> 20} MiB",
        file=sys.stderr,
    )
    ports = {name: free_port() for name in ("bare", "t23")}
    with ExitStack() as stack:
        for name, port in ports.items():
            stack.enter_context(serving(state.path, port, workers, bare=name == "bare"))
        first = {path: page(ports["t23"], path) for path in PAGES}
        alone = {path: [first[path], *(page(ports["t23"], path) for _ in range(20))] for path in PAGES}
        loaded = quiet_and_loaded(ports, turns, rate)
    return {"rows": rows, "rate": rate, "workers": workers, "alone": alone, **loaded}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def told(found: dict[str, object]) -> bool:
    """Print the figures; whether the budgets are met."""
    alone, plays_of, asked = found["alone"], found["plays"], found["asked"]
    assert isinstance(alone, dict) and isinstance(plays_of, dict) and isinstance(asked, dict)
    print(f"{'ms':36} {'p50':>8} {'p95':>8} {'max':>8}")
    print(f"A page, nothing else going on, {found['rows']:,} reports waiting:")
    for path, seconds in alone.items():
        print(line(path, summary(seconds)))
    print(f"A play of 100 kB, {1 / PLAY_EVERY:.0f}/s, and {found['rate']:g} pages/s beside it by turns:")
    ratios: dict[str, dict[str, float]] = {}
    for name, each in plays_of.items():
        quiet, loaded = summary(each["quiet"]), summary(each["loaded"])
        ratios[name] = {key: loaded[key] / quiet[key] for key in ("p50", "p95")}
        print(line(f"{name}, no pages", quiet))
        print(line(f"{name}, with {'pages' if name == 't23' else 'its front page'}", loaded))
    print(line("those pages themselves", summary(asked["t23"])))
    slowest = max(max(seconds) for seconds in (*alone.values(), asked["t23"]))
    beside = {key: ratios["t23"][key] / ratios["bare"][key] for key in ("p50", "p95")}
    print(f"slowed by: bare x {ratios['bare']['p50']:.2f} (p95 x {ratios['bare']['p95']:.2f}),", end=" ")
    print(f"t23 x {ratios['t23']['p50']:.2f} (p95 x {ratios['t23']['p95']:.2f});", end=" ")
    print(f"beside each other x {beside['p50']:.2f}, budget x {NOISE}: {verdict(beside['p50'] <= NOISE)}")
    print(f"slowest page {slowest * 1e3:.0f} ms, budget {BUDGET * 1e3:.0f} ms: {verdict(slowest <= BUDGET)}")
    return slowest <= BUDGET and beside["p50"] <= NOISE


def verdict(met: bool) -> str:
    return "ok" if met else "OVER"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="reports that wait (default: 1000000)")
    parser.add_argument("--rate", type=float, default=20, help="pages a second (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="of gunicorn (default: 2)")
    parser.add_argument("--turns", type=int, default=5, help="turns of 16 s (default: 5)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to FILE, too")
    parser.add_argument(
        "--dir", default="/var/tmp", help="where the outbox is made and removed (default: /var/tmp)"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="t23-pages-", dir=arguments.dir))
    try:
        found = measured(arguments.rows, arguments.workers, arguments.turns, arguments.rate, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return 0 if told(found) else 1


if __name__ == "__main__":
    sys.exit(main())
