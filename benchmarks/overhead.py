"""What the middleware costs an app, beside the bare app and a wrapper that does nothing, in one run.

Each figure is printed beside its budget. The exit code is 1 if a budget is missed, 2 if it can't be measured. The
variants take turns in short rounds, so that other work on the machine affects all of them. *added* is the median of the
differences within each round, *least* the difference of the fastest rounds.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from wsgiref.util import FileWrapper

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from t23_middleware import Settings, T23Middleware  # noqa: E402
from t23_middleware.capture.recorder import Recorder  # noqa: E402
from t23_middleware.transfer import Part, Play  # noqa: E402

App = Callable[..., Iterable[bytes]]
Call = Callable[[], object]

#: Budgets, as added to the bare app: µs, ns, MB, s; the paced one in writes of the same bytes.
UNTRACKED_US = 3.0
TRACKED_US = 31.0
PACED_WRITES = 8.0
#: With progress lines; 35 without.
CHUNK_NS = 40.0
MEMORY_MB = 6.0
#: "No growth": the allocator's own memory may still differ by a few pages.
GROWTH_MB = 0.5
EXIT_S = 0.1

#: A chunk of 64 KiB, as file servers make them.
CHUNK = bytes(1 << 16)
#: A block as werkzeug and gunicorn read them.
BLOCK = bytes(1 << 13)
SESSION = "session_id=3f1f9d0c-5bd2-4b8e-9d8a-0d8f3b0f7a11&photo_id=4711"


class Cannot(Exception):
    """A figure that can't be measured here; the argument is the reason and the remedy."""


class Size(NamedTuple):
    """How much is measured."""

    #: Rounds of requests, requests in each.
    rounds: int
    requests: int
    #: Requests of each variant with a pause before each.
    paced: int
    #: Bodies of CHUNKS chunks.
    bodies: int
    #: Fresh processes of each variant.
    processes: int
    #: Requests over which memory must not grow.
    growth: int
    #: Servers of each variant that are stopped.
    exits: int


FULL = Size(rounds=400, requests=100, paced=500, bodies=300, processes=7, growth=20_000, exits=7)
QUICK = Size(rounds=100, requests=50, paced=120, bodies=60, processes=3, growth=4_000, exits=2)
CHUNKS = 10_000


class Figure(NamedTuple):
    """One line: medians of the variants, what is added, and its budget, all in *unit*."""

    name: str
    unit: str
    bare: float
    noop: float | None
    t23: float
    added: float
    least: float
    #: ``None`` for a figure that is shown only for comparison.
    budget: float | None
    #: How the budget was computed, where it depends on this run.
    note: str = ""

    @property
    def met(self) -> bool:
        return self.budget is None or self.added <= self.budget


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 0 where all budgets are met, 1 where one is missed, 2 where one can't be measured."""
    options = _options(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="t23-overhead-", dir=options.dir) as folder:
            figures = run(options, Path(folder))
    except (Cannot, OSError, subprocess.SubprocessError) as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 2
    return 0 if all(figure.met for figure in figures) else 1


def run(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Measure what *options* ask for, and print it."""
    facts = machine(folder)
    if not options.json:
        print("  ".join(f"{name}: {value}" for name, value in facts.items()) + f"\n{HEADING}", flush=True)
    size = QUICK if options.quick else FULL
    figures = list(shown(measured(options.only or list(PARTS), size, folder), quiet=options.json))
    if options.json:
        print(json.dumps({"machine": facts, "figures": [{**f._asdict(), "met": f.met} for f in figures]}))
    return figures


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: half a minute, and more noise")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--only", metavar="PART", action="append", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--dir", default="/var/tmp", help="where the journals go; a real disk (%(default)s)")
    return parser.parse_args(arguments)


def machine(folder: Path) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "journals on": filesystem(folder),
    }


def filesystem(folder: Path) -> str:
    """Type of the file system of *folder*, ``?`` if it is not known."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "?"
    over = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place)]
    return max(over)[1] if over else "?"


def measured(parts: list[str], size: Size, folder: Path) -> Iterator[Figure]:
    """The figures of *parts*, each part in a folder of its own."""
    for part in parts:
        own = folder / part
        own.mkdir()
        yield from PARTS[part](size, own)


HEADING = f"{'':50}{'bare':>9}{'no-op':>9}{'t23':>9}{'added':>9}{'least':>9}{'ratio':>7}  budget"


def shown(figures: Iterable[Figure], quiet: bool) -> Iterator[Figure]:
    """Print each figure as it comes."""
    for figure in figures:
        if not quiet:
            print(row(figure), flush=True)
        yield figure


def row(figure: Figure) -> str:
    def number(value: float | None) -> str:
        return f"{'-' if value is None else format(value, '.2f'):>9}"

    values = "".join(map(number, (figure.bare, figure.noop, figure.t23, figure.added, figure.least)))
    ratio = f"{figure.t23 / figure.bare:.2f}" if figure.bare > 0.005 else "-"
    if figure.budget is None:
        return f"{f'{figure.name} [{figure.unit}]':50}{values}{ratio:>7}  (no budget of its own)"
    budget = f"<= {figure.budget:.4g} {figure.unit}{figure.note}"
    return (
        f"{f'{figure.name} [{figure.unit}]':50}{values}{ratio:>7}  {budget}  {'ok' if figure.met else 'OVER'}"
    )


# Apps and wrappers.


class NoOp:
    """A middleware that does nothing: what any wrapper costs."""

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return self._app(environ, start_response)


class NoOpBody:
    """A body in a wrapper that does nothing with its chunks."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:  # noqa: UP028 - the counted body looks at each chunk, and so does this
            yield chunk


class NoOpBodies(NoOp):
    """A middleware that wraps the body, as one that looks at each chunk must."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return NoOpBody(self._app(environ, start_response))


def answering(content_type: str, make_body: Callable[[dict[str, Any]], Iterable[bytes]], length: int) -> App:
    headers = [("Content-Type", content_type), ("Content-Length", str(length)), ("Cache-Control", "no-cache")]

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", list(headers))
        return make_body(environ)

    return app


def one_chunk(environ: dict[str, Any]) -> Iterable[bytes]:
    return [CHUNK]


def generated(environ: dict[str, Any]) -> Iterator[bytes]:
    yield CHUNK


def many_chunks(chunk: bytes) -> Callable[[dict[str, Any]], Iterator[bytes]]:
    """Makes a body that yields *chunk* many times."""

    def body(environ: dict[str, Any]) -> Iterator[bytes]:
        for _ in range(CHUNKS):
            yield chunk

    return body


def wrapped_file(environ: dict[str, Any]) -> Iterable[bytes]:
    body: Iterable[bytes] = environ["wsgi.file_wrapper"](BytesIO(CHUNK), len(CHUNK))
    return body


@cache
def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection, the server's first: the kernel is asked about it as it is under gunicorn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return listener.accept()[0], client


def request_environ(query: str, cookie: str) -> dict[str, Any]:
    """The environ of a browser's request as gunicorn makes it."""
    headers = {"HTTP_COOKIE": cookie} if cookie else {}
    return {
        "wsgi.errors": sys.stderr,
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
        "wsgi.input": BytesIO(),
        "wsgi.input_terminated": True,
        "wsgi.url_scheme": "https",
        "gunicorn.socket": connected()[0],
        "SERVER_SOFTWARE": "gunicorn/23.0.0",
        "REQUEST_METHOD": "GET",
        "QUERY_STRING": query,
        "RAW_URI": f"/64968583/4711/a1b2c3/video_hd/a-video.mp4?{query}",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "REMOTE_ADDR": "127.0.0.1",
        "REMOTE_PORT": "52044",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/64968583/4711/a1b2c3/video_hd/a-video.mp4",
        "HTTP_HOST": "video.example.com",
        "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "HTTP_ACCEPT": "video/webm,video/ogg,video/*;q=0.9,*/*;q=0.5",
        "HTTP_ACCEPT_LANGUAGE": "en-US,en;q=0.5",
        "HTTP_REFERER": "https://video.example.com/a-video",
        "HTTP_CONNECTION": "keep-alive",
        **headers,
    }


def settings(folder: Path) -> Settings:
    """Settings that start no relay, whatever is in the environment."""
    return Settings(environ={}, api_url="http://127.0.0.1:9", state_dir=str(folder), relay="off")


def requester(app: App, environ: dict[str, Any]) -> Call:
    """One request, as a server makes it: a fresh environ, the body to its end, ``close()``."""

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return write

    def write(data: bytes) -> None:
        """PEP 3333's ``write()``; not called here."""

    def request() -> None:
        body = app(dict(environ), start_response)
        for _ in body:
            pass
        close = getattr(body, "close", None)
        if close is not None:
            close()

    return request


def variants(app: App, environ: dict[str, Any], folder: Path, noop: type[NoOp] = NoOp) -> list[Call]:
    """The same request to the app bare, in the no-op wrapper and in the middleware."""
    wrapped = T23Middleware(app, settings(folder))
    return [requester(each, environ) for each in (app, noop(app), wrapped)]


# Timing.


def timed(call: Call) -> int:
    """Nanoseconds of one call."""
    begin = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - begin


def in_rounds(calls: list[Call], rounds: int, repeat: int) -> list[list[float]]:
    """The median of *repeat* calls in each round, in ns, for each of *calls*; another one starts each round."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(repeat):
            call()  # caches, and the files that the first counted response opens
    for turn in range(rounds):
        for number in range(len(calls)):
            which = (number + turn) % len(calls)
            times[which].append(median([timed(calls[which]) for _ in range(repeat)]))
    return times


def figure(name: str, unit: str, times: list[list[float]], per: float, budget: float | None) -> Figure:
    """The figure of bare, no-op and t23 *times*, of which *per* ns are one *unit*."""
    bare, noop, t23 = ([value / per for value in each] for each in times)
    added = median([ours - theirs for ours, theirs in zip(t23, bare, strict=True)])
    middle = (median(bare), median(noop), median(t23))
    return Figure(name, unit, *middle, added=added, least=min(t23) - min(bare), budget=budget)


# The parts.


def untracked(size: Size, folder: Path) -> Iterator[Figure]:
    """Requests that are not plays."""
    page = answering("text/html; charset=utf-8", lambda environ: [b"<!doctype html>"], 15)
    video = answering("video/mp4", one_chunk, len(CHUNK))
    cookie = "_ga=GA1.2.1234.5678; csrftoken=e2f6a01c5e1; session_id=3f1f9d0c-5bd2-4b8e"
    for name, app, query, sent in (
        ("untracked: page, no cookie", page, "", ""),
        ("untracked: page, cookie and query", page, "q=holiday&page=2&order=newest", cookie),
        ("untracked: media, no session", video, "v=3", "_ga=GA1.2.1234.5678"),
    ):
        calls = variants(app, request_environ(query, sent), folder)
        yield figure(name, "µs", in_rounds(calls, size.rounds, size.requests), 1e3, UNTRACKED_US)
    if lines_in(folder):
        raise Cannot("untracked requests were written to a journal, so they are none; mend request_environ()")
    yield after_a_play(size, folder)


def after_a_play(size: Size, folder: Path) -> Figure:
    """A page in a process that has recorded a play, and so may check for a relay at each request."""

    def site(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return (video if environ["QUERY_STRING"] else page)(environ, start_response)

    video = answering("video/mp4", one_chunk, len(CHUNK))
    page = answering("text/html; charset=utf-8", lambda environ: [b"<!doctype html>"], 15)
    wrapped = T23Middleware(site, settings(folder))
    requester(wrapped, request_environ(SESSION, ""))()
    _expect_lines(folder, 2)
    calls = [requester(each, request_environ("", "")) for each in (site, NoOp(site), wrapped)]
    times = in_rounds(calls, size.rounds, size.requests)
    return figure("untracked: page, after a play", "µs", times, 1e3, UNTRACKED_US)


def tracked(size: Size, folder: Path) -> Iterator[Figure]:
    """Plays, both journal lines, back to back."""
    for name, make_body in (("list", one_chunk), ("generator", generated), ("file_wrapper", wrapped_file)):
        own = folder / name
        app = answering("video/mp4", make_body, len(CHUNK))
        calls = variants(app, request_environ(SESSION, "_ga=GA1.2.1234.5678"), own)
        yield figure(f"tracked: {name}", "µs", in_rounds(calls, size.rounds, size.requests), 1e3, TRACKED_US)
        _expect_lines(own, 2 * (size.rounds + 1) * size.requests)


def paced(size: Size, folder: Path) -> Iterator[Figure]:
    """Plays with a pause before each, as in a real worker: writing both lines, beside one write of the same bytes.

    The budget is for both journal lines with their encoding and clocks. What else a tracked request
    costs with cold caches (mostly Python finding its own code again) is shown beside it.
    """
    app = answering("video/mp4", one_chunk, len(CHUNK))
    calls = variants(app, request_environ(SESSION, "_ga=GA1.2.1234.5678"), folder)
    calls[-1]()
    data = b"".join(line + b"\n" for line in lines_in(folder)[-2:])
    hand_over = handing_over(folder)
    with (folder / "prepared").open("ab", buffering=0) as file:
        write = file.fileno()
        every = paused([*calls, lambda: None, hand_over, lambda: os.write(write, data)], size.paced)
    _expect_lines(folder, 2 * (2 * size.paced + 1))
    prepared = median(every[-1]) / 1e3
    note = f" ({PACED_WRITES:g} x {prepared:.2f}, one write of {len(data)} bytes)"
    nothing = every[3]
    lines = figure("both lines, paced", "µs", [nothing, nothing, every[4]], 1e3, PACED_WRITES * prepared)
    whole = figure("tracked request, paced", "µs", every[:3], 1e3, None)
    for found in (lines._replace(note=note), whole):
        # Single calls have no pairs, so the budget applies to p50.
        yield found._replace(added=found.t23 - found.bare)


def handing_over(folder: Path) -> Call:
    """A play's open line and close line, written as a response writes them."""
    process = Recorder(settings(folder), "0").this_process()
    play = Play("3f1f9d0c-5bd2-4b8e-9d8a-0d8f3b0f7a11", "4711")
    part = Part(0, len(CHUNK) - 1, len(CHUNK))
    return lambda: process.begin(play, part, 200, len(CHUNK)).end(len(CHUNK), 0, None)


def paused(calls: list[Call], repeat: int) -> list[list[float]]:
    """Nanoseconds of each call, each after 2.5 to 7.5 ms of sleep.

    In a new order each time, because a call finds the code that it shares with the call before it in the cache.
    """
    chance = random.Random(23)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for which in chance.sample(range(len(calls)), len(calls)):
            time.sleep(chance.uniform(0.0025, 0.0075))
            times[which].append(timed(calls[which]))
    return times


def chunks(size: Size, folder: Path) -> Iterator[Figure]:
    """A long body; the cost of its request and its progress lines (one each 8 MiB) is spread over its chunks.

    The budget is for chunks of 8 KiB, as werkzeug and gunicorn make them; larger ones have a larger share of a
    progress line.
    """
    for chunk, name, budget in ((BLOCK, "8 KiB", CHUNK_NS), (CHUNK, "64 KiB", None)):
        own = folder / name
        app = answering("video/mp4", many_chunks(chunk), CHUNKS * len(chunk))
        calls = variants(app, request_environ(SESSION, ""), own, NoOpBodies)
        times = in_rounds(calls, size.bodies, 1)
        yield figure(f"chunk of an iterated body, {CHUNKS:,} of {name}", "ns", times, CHUNKS, budget)
        _expect_lines(own, 2 * (size.bodies + 1))


def memory(size: Size, folder: Path) -> Iterator[Figure]:
    """A Flask process with and without the middleware, which there also starts its relay."""
    _need("flask")
    names = ("memory: Flask process, app made", "memory: after 300 tracked requests")
    read: dict[str, list[list[float]]] = {"bare": [], "t23": []}
    # The first process compiles, and is not measured.
    memory_of("t23", environment(folder / "first", "http://127.0.0.1:9") | {"T23_RELAY": "off"}, 1)
    with Hanging() as api:
        for number in range(size.processes):
            for kind, found in read.items():
                state = folder / f"{kind}-{number}"
                found.append(memory_of(kind, environment(state, api.url), 300))
                if kind == "t23":
                    end_relay(state)
    for number, name in enumerate(names):
        bare, t23 = ([each[number] for each in read[kind]] for kind in ("bare", "t23"))
        yield plain(name, "MB", bare, t23, MEMORY_MB)
    yield growth(size, folder)


def growth(size: Size, folder: Path) -> Figure:
    """How much a process grows after it has warmed up."""
    grown: dict[str, list[float]] = {"bare": [], "t23": []}
    for number in range(max(size.processes // 3, 1)):
        for kind, found in grown.items():
            variables = environment(folder / f"growth-{number}", "http://127.0.0.1:9") | {"T23_RELAY": "off"}
            _, warm, after = memory_of(kind, variables, 2000, size.growth)
            found.append(after - warm)
    _expect_lines(folder / "growth-0", 2 * (2000 + size.growth))
    return plain(
        f"memory: growth over {size.growth:,} requests", "MB", grown["bare"], grown["t23"], GROWTH_MB
    )


def plain(name: str, unit: str, bare: list[float], t23: list[float], budget: float) -> Figure:
    """A figure of processes, without a no-op wrapper beside it."""
    added = median(t23) - median(bare)
    return Figure(name, unit, median(bare), None, median(t23), added, min(t23) - min(bare), budget)


def memory_of(kind: str, variables: dict[str, str], *requests: int) -> list[float]:
    """MB of a fresh Flask process: the app made, then after each number of requests."""
    command = [sys.executable, str(HERE / "overhead_apps.py"), kind, *map(str, requests)]
    answer = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, timeout=600)
    read: list[float] = json.loads(answer.stdout)
    return read


def worker_exit(size: Size, folder: Path) -> Iterator[Figure]:
    """A server of one process, from the signal for a clean end, right after a play, to its end; the API hangs."""
    for name, server in SERVERS.items():
        _need("flask")
        _need(server.module)
        took: dict[str, list[float]] = {"bare": [], "t23": []}
        with Hanging() as api:
            for number in range(size.exits):
                for kind, found in took.items():
                    found.append(exit_seconds(server, kind, folder / f"{server.module}-{kind}-{number}", api))
        yield plain(f"worker exit, {name}", "s", took["bare"], took["t23"], EXIT_S)


class Server(NamedTuple):
    """How a server is started and stopped; DOOR stands for its socket, KIND for the app."""

    module: str
    arguments: str
    end: signal.Signals


SERVERS = {
    "gunicorn gthread": Server(
        "gunicorn",
        "-k gthread -w 1 --threads 4 -b unix:DOOR --log-level error overhead_apps:KIND()",
        signal.SIGTERM,
    ),
    # waitress does not handle SIGTERM: it would be killed by it, and no exit handler would run.
    "waitress": Server("waitress", "--unix-socket=DOOR --call overhead_apps:KIND", signal.SIGINT),
}


def exit_seconds(kind_of: Server, kind: str, state: Path, api: Hanging) -> float:
    """Seconds from its signal to the end of a server that has just answered."""
    state.mkdir()
    door = state / "socket"
    words = kind_of.arguments.replace("DOOR", str(door)).replace("KIND", kind).split()
    command = [sys.executable, "-m", kind_of.module, *words]
    server = subprocess.Popen(command, cwd=HERE, env=environment(state, api.url))
    try:
        play(door, patience=30)
        if kind == "t23":
            api.wait(30)  # the relay now hangs in the API, and the next report will wait behind it
        play(door, patience=1)
        begin = time.monotonic()
        server.send_signal(kind_of.end)
        server.wait(60)
        return time.monotonic() - begin
    finally:
        if server.poll() is None:
            server.kill()
            server.wait(10)
        if kind == "t23":
            end_relay(state)


def play(door: Path, patience: float) -> None:
    """One play, read to its end, from a server that may still be starting for *patience* seconds."""
    deadline = time.monotonic() + patience
    request = f"GET /video.mp4?{SESSION} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(door))
                client.sendall(request.encode())
                answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise Cannot("the server did not start; its own words stand above") from None
            time.sleep(0.05)
        else:
            if not answer.startswith(b"HTTP/1.1 200"):
                raise Cannot(f"the app answered {answer[:40]!r}; see its own words above")
            return


class Hanging:
    """An API that takes each connection and never answers."""

    def __enter__(self) -> Hanging:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._taken: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        return self

    def wait(self, seconds: float) -> None:
        """Accept the next connection. Raises :class:`Cannot` if none comes."""
        if not select.select([self._listener], [], [], seconds)[0]:
            raise Cannot("the relay did not come to the API; see what 't23-middleware relay' says")
        self._taken.append(self._listener.accept()[0])

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._taken):
            each.close()


def environment(state: Path, api_url: str) -> dict[str, str]:
    """The environment of a process under test, with these settings only."""
    ours = {
        "T23_API_URL": api_url,
        "T23_STATE_DIR": str(state),
        "T23_EXIT_SECONDS": "0.1",
        # Memory must not depend on the order of hashes.
        "PYTHONHASHSEED": "0",
        # As installed, with bytecode: compiling at each start would use memory.
        "PYTHONPYCACHEPREFIX": str(state.parent / "bytecode"),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
    }
    theirs = {name: text for name, text in os.environ.items() if not name.startswith("T23_")}
    theirs.pop("PYTHONDONTWRITEBYTECODE", None)
    return theirs | ours


def end_relay(state: Path) -> None:
    """End the relay that a worker started on *state*; it is found by the lock that it holds."""
    pid = _soon(lambda: lock_holder(state / "relay.lock"), 20)
    if pid is None:
        raise Cannot(f"no relay came up; {_last_words(state / 'relay.log')}")
    os.kill(pid, signal.SIGTERM)
    if _soon(lambda: lock_holder(state / "relay.lock") != pid, 15) is None:
        os.kill(pid, signal.SIGKILL)


def _soon(find: Callable[[], Any], seconds: float) -> Any:
    """The result of *find* within *seconds*, else ``None``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = find()
        if found:
            return found
        time.sleep(0.02)
    return None


def lock_holder(path: Path) -> int | None:
    """The process that holds the record lock on *path* (``F_GETLK``, with Linux's ``struct flock``)."""
    layout = "hhqqi4x"
    question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("r+b") as file:
            kind, *_, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, question))
    except FileNotFoundError:
        return None
    return None if kind == fcntl.F_UNLCK else int(pid)


def _last_words(log: Path) -> str:
    try:
        return log.read_text(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
    except OSError:
        return "nothing started it"


def lines_in(folder: Path) -> list[bytes]:
    """All journal lines under *folder*."""
    return [line for path in sorted(folder.rglob("*.journal")) for line in path.read_bytes().splitlines()]


def _expect_lines(folder: Path, least: int) -> None:
    """Raise :class:`Cannot` unless the plays were recorded: the figure would be wrong."""
    found = len(lines_in(folder))
    if found < least:
        raise Cannot(f"{found} journal lines instead of {least}: not every play was recorded")


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Cannot(
            f"{module} is not installed; pip install 't23_middleware[demo]', or leave it out by --only"
        )


PARTS: dict[str, Callable[[Size, Path], Iterator[Figure]]] = {
    "untracked": untracked,
    "tracked": tracked,
    "paced": paced,
    "chunks": chunks,
    "memory": memory,
    "exit": worker_exit,
}

if __name__ == "__main__":
    sys.exit(main())
