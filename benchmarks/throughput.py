"""Throughput and CPU of real servers with the middleware, beside the bare app and a no-op wrapper, in one run.

Per server: a whole file by ``wsgi.file_wrapper``, a generator, a Range by Flask's ``send_file``, and a jump to the
middle of a 1 GB file. The variants take turns in each round, and a ratio is the median over the rounds of the ratio
within a round. Each is printed beside its target. The exit code is 1 if a target is missed, 2 if it can't be measured.
CPU is user and system time of the server's processes. Linux only; strace, if it is installed, counts sendfile in a round
of its own. The client is a socket read into one buffer of 1 MiB, so that the server is the limit. CPU figures are valid
on a machine that does other work too; speed is not: if the no-op wrapper is slower than its target, repeat the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import cycle, islice, permutations
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from throughput_app import FILE, LONG_FILE

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from t23_middleware.transfer import NotALine, Transfer, decode  # noqa: E402

KINDS = ("bare", "no-op", "t23")
PLAY = "session_id=3f1f9d0c-benchmark&photo_id=4711"
BUFFER = 1 << 20
GB = 1e9
LONG_FILE_BYTES = 1_000_000_000
#: The Range whose CPU is measured: it starts a megabyte in, as for a player that has read the head.
RANGE_START = 1_000_000
JUMP = (500_000_000, 500_999_999)

#: Targets, as ratios to the bare app.
FILE_CPU = 1.3
#: A whole file is as fast as behind the no-op wrapper, within that wrapper's spread; the target is never stricter.
FILE_SPEED = 0.97
GENERATOR_SPEED = 0.97
#: Bytes that a jump may read beyond what it sends: a buffered file's own blocks, and a block's rest.
JUMP_SLACK = 128 << 10


class Cannot(Exception):
    """A figure that can't be measured here; the argument is the reason and the remedy."""


class Server(NamedTuple):
    """How a server is started, and its target for the CPU of a Range."""

    module: str
    command: Callable[[int], list[str]]
    range_cpu: float


def _gunicorn(worker: str, *options: str) -> Callable[[int], list[str]]:
    common = ("-k", worker, "-w", "1", "--log-level", "error", *options)
    return lambda port: [
        *(sys.executable, "-m", "gunicorn", *common),
        *("-b", f"127.0.0.1:{port}", "throughput_app:application"),
    ]


def _uwsgi(port: int) -> list[str]:
    program = str(Path(sys.executable).parent / "uwsgi")
    options = ("--master", "--processes", "1", "--need-app", "--die-on-term", "--disable-logging", "--logto2")
    place = ("--home", sys.prefix, "--module", "throughput_app:application")
    return [program, "--http-socket", f"127.0.0.1:{port}", *options, os.devnull, *place]


def _own(name: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, str(HERE / "throughput_app.py"), name, str(port)]


SERVERS = {
    "gunicorn-sync": Server("gunicorn", _gunicorn("sync"), 0.5),
    "gunicorn-gthread": Server("gunicorn", _gunicorn("gthread", "--threads", "4"), 0.5),
    "gunicorn-gevent": Server("gevent", _gunicorn("gevent"), 0.9),
    "waitress": Server("waitress", _own("waitress"), 0.5),
    "cheroot": Server("cheroot", _own("cheroot"), 0.65),
    "pywsgi": Server("gevent", _own("pywsgi"), 0.65),
    "uwsgi": Server("uwsgi", _uwsgi, 1.05),
    "werkzeug": Server("werkzeug", _own("werkzeug"), 1.05),
}


class Size(NamedTuple):
    """How much is measured."""

    file_rounds: int
    generator_rounds: int
    range_rounds: int
    jumps: int
    file_bytes: int


FULL = Size(file_rounds=25, generator_rounds=25, range_rounds=15, jumps=5, file_bytes=256 << 20)
QUICK = Size(file_rounds=3, generator_rounds=3, range_rounds=3, jumps=2, file_bytes=64 << 20)


class Figure(NamedTuple):
    """One line: medians of the variants in *unit*, the ratios to bare, and the target of the last one."""

    server: str
    name: str
    unit: str
    values: tuple[float, float, float]
    noop_ratio: float | None
    ratio: float | None
    target: str
    met: bool


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 0 where all targets are met, 1 where one is missed, 2 where one can't be measured."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that nothing is left running
    size = _size(options)
    folder = Path(tempfile.mkdtemp(prefix="t23-throughput-", dir=options.dir))
    figures: list[Figure] = []
    try:
        names = options.server or list(installed(SERVERS))
        _make_files(folder, size)
        if not options.json:
            print(f"{machine()}\n{HEADING}")
        for name in names:
            for figure in figures_of(name, size, folder):
                figures.append(figure)
                if not options.json:
                    print(row(figure), flush=True)
    except (Cannot, OSError, subprocess.SubprocessError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps({"machine": machine(), "figures": [figure._asdict() for figure in figures]}))
    return 0 if all(figure.met for figure in figures) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", metavar="NAME", action="append", choices=SERVERS, help=", ".join(SERVERS))
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each figure")
    parser.add_argument("--quick", action="store_true", help="under a minute, and more noise")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--dir", help="where the files and journals go (the system's temporary folder)")
    return parser.parse_args(arguments)


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else FULL
    if options.rounds is None:
        return size
    rounds = max(options.rounds, 1)
    return size._replace(file_rounds=rounds, generator_rounds=rounds, range_rounds=rounds)


def installed(servers: Iterable[str]) -> Iterator[str]:
    """Those of *servers* that can be started here; the others are named on stderr."""
    for name in servers:
        # uWSGI's module exists only inside the server.
        module = SERVERS[name].module
        here = _uwsgi(0)[0] if module == "uwsgi" else None
        if Path(here).exists() if here else importlib.util.find_spec(module):
            yield name
        else:
            print(f"throughput: {name} is not installed and left out; pip install {module}", file=sys.stderr)


def machine() -> str:
    load = " ".join(f"{each:.2f}" for each in os.getloadavg())
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python}, {platform.system()} {platform.release()}, {os.cpu_count()} cores, load {load}"


def _make_files(folder: Path, size: Size) -> None:
    """Files of zeros that take no room on disk."""
    for name, length in ((FILE, size.file_bytes), (LONG_FILE, LONG_FILE_BYTES)):
        with (folder / name).open("wb") as file:
            file.truncate(length)


# The table.

HEADING = f"{'server':18}{'figure':30}{'bare':>10}{'no-op':>10}{'t23':>10}  {'no-op/bare':>10}{'t23/bare':>9}  target"


def row(figure: Figure) -> str:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    values = "".join(f"{value:>10.4g}" if value < 1e5 else f"{value:>10.0f}" for value in figure.values)
    name = f"{figure.name} [{figure.unit}]"
    verdict = "ok" if figure.met else "OVER"
    return (
        f"{figure.server:18}{name:30}{values}  {ratio(figure.noop_ratio):>10}{ratio(figure.ratio):>9}"
        f"  {figure.target}  {verdict}"
    )


# The figures of one server.


class Sample(NamedTuple):
    """One request: bytes received, time and CPU."""

    received: int
    seconds: float
    cpu: float

    @property
    def speed(self) -> float:
        """GB a second."""
        return self.received / self.seconds / GB

    @property
    def cpu_per_gb(self) -> float:
        """Seconds of CPU for each GB."""
        return self.cpu / self.received * GB


def figures_of(name: str, size: Size, folder: Path) -> Iterator[Figure]:
    """All figures of server *name*."""
    with Running(name, folder) as server:
        server.wait()
        yield from file_figures(server, size)
        samples = interleaved(server, "generator", size.generator_rounds)
        yield speed_figure(name, "generator", samples, GENERATOR_SPEED)
        path, asked = f"send_file/{FILE}", f"bytes={RANGE_START}-"
        samples = interleaved(server, path, size.range_rounds, asked)
        yield cpu_figure(name, "range CPU", samples, SERVERS[name].range_cpu)
        yield jump_figure(server, size.jumps)
        yield counted_figure(server)


def file_figures(server: Running, size: Size) -> Iterator[Figure]:
    """A whole file by file_wrapper."""
    samples = interleaved(server, "file", size.file_rounds)
    noop = ratios(samples[0], samples[1], "speed")
    allowed = min(FILE_SPEED, quantiles(noop, n=4)[0] if len(noop) > 1 else noop[0])
    yield speed_figure(server.name, "file", samples, allowed)
    yield cpu_figure(server.name, "file CPU", samples, FILE_CPU)
    calls = [server.sendfile_calls(kind, "file") for kind in KINDS]
    if None not in calls:
        values = _three(float(count or 0) for count in calls)
        kept = values[0] == 0 or values[2] > 0
        yield Figure(
            server.name, "file sendfile", "calls", values, None, None, "kept where bare has it", kept
        )


def interleaved(server: Running, path: str, rounds: int, asked: str | None = None) -> list[list[Sample]]:
    """*rounds* samples of each variant, which take turns; each round uses another order."""
    samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        server.request(kind, path, asked)  # caches and imports
    # In a fixed order each would always follow the same one, and find its caches.
    for order in islice(cycle(permutations(KINDS)), rounds):
        for kind in order:
            samples[kind].append(server.sample(kind, path, asked))
    return list(samples.values())


def ratios(bare: list[Sample], other: list[Sample], measure: str) -> list[float]:
    """The ratio of *other* to *bare* in each round."""
    pairs = zip(bare, other, strict=True)
    return [getattr(ours, measure) / (getattr(theirs, measure) or 1e-9) for theirs, ours in pairs]


def speed_figure(name: str, case: str, samples: list[list[Sample]], target: float) -> Figure:
    noop, t23 = (median(ratios(samples[0], each, "speed")) for each in samples[1:])
    values = _three(median(sample.speed for sample in each) for each in samples)
    return Figure(name, case, "GB/s", values, noop, t23, f">= {target:.2f}", t23 >= target)


def cpu_figure(name: str, case: str, samples: list[list[Sample]], target: float) -> Figure:
    noop, t23 = (median(ratios(samples[0], each, "cpu_per_gb")) for each in samples[1:])
    values = _three(median(sample.cpu_per_gb for sample in each) for each in samples)
    return Figure(name, case, "s/GB", values, noop, t23, f"<= {target:.2f}", t23 <= target)


def jump_figure(server: Running, jumps: int) -> Figure:
    """Bytes that a jump to the middle of a long file reads beyond what it sends."""
    first, last = JUMP
    path, asked = f"send_file/{LONG_FILE}", f"bytes={first}-{last}"
    beyond = []
    for kind in KINDS:
        server.request(kind, path, asked)
        before = server.bytes_read()
        received = sum(server.request(kind, path, asked)[0] for _ in range(jumps))
        if received != jumps * (last - first + 1):
            raise Cannot(f"{server.name}: {received} bytes came for {jumps} times {asked}; the app is broken")
        beyond.append((server.bytes_read() - before - received) / jumps)
    met = beyond[-1] <= JUMP_SLACK
    target = f"t23 <= {JUMP_SLACK}"
    return Figure(server.name, "jump, read beyond", "bytes", _three(beyond), None, None, target, met)


def counted_figure(server: Running) -> Figure:
    """Whether all plays were counted to the byte; otherwise the other figures are wrong."""
    off = float(server.counted() - server.received["t23"])
    return Figure(server.name, "counted - received", "bytes", (0.0, 0.0, off), None, None, "= 0", off == 0)


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    bare, noop, t23 = values
    return bare, noop, t23


# One server.


class Running:
    """A server with all variants; at the end it and its children are stopped."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        #: Bytes of the bodies received, of each variant.
        self.received = dict.fromkeys(KINDS, 0)
        self._folder = folder
        self._state = folder / f"state-{name}"
        self._log = folder / f"{name}.log"
        self._port = free_port()

    def __enter__(self) -> Running:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                SERVERS[self.name].command(self._port),
                cwd=HERE,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server_cores, client_cores = cores()
        os.sched_setaffinity(self._process.pid, server_cores)
        os.sched_setaffinity(0, client_cores)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait(10)

    def wait(self) -> None:
        """Wait until it answers. Raises :class:`Cannot` if it does not start."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.request("bare", f"send_file/{LONG_FILE}", "bytes=0-99999")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    words = self._log.read_text(errors="replace").strip()[-500:]
                    raise Cannot(f"{self.name} did not start: {words or 'it said nothing'}") from None
                time.sleep(0.05)

    def request(self, kind: str, path: str, asked: str | None = None) -> tuple[int, float]:
        """One request on a connection of its own: bytes of the body, seconds until the connection ended."""
        received, seconds = get(self._port, f"/{kind}/{path}?{PLAY}", asked)
        self.received[kind] += received
        return received, seconds

    def sample(self, kind: str, path: str, asked: str | None) -> Sample:
        before = self._cpu()
        received, seconds = self.request(kind, path, asked)
        return Sample(received, seconds, self._cpu() - before)

    def bytes_read(self) -> int:
        """Bytes that read(2) and sendfile(2) of the processes have read, by Linux's count (``rchar``, proc(5))."""
        accounts = (Path(f"/proc/{pid}/io").read_text() for pid in self._pids())
        return sum(int(account.split()[1]) for account in accounts)

    def sendfile_calls(self, kind: str, path: str) -> int | None:
        """Calls of sendfile(2) for one request; ``None`` if strace is missing or not allowed."""
        if shutil.which("strace") is None:
            return None
        trace = self._folder / "trace"
        who = [word for pid in self._pids() for word in ("-p", str(pid))]
        command = ["strace", "-f", "-e", "trace=sendfile", "-o", str(trace), *who]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            assert strace.stderr is not None
            if b"attached" not in strace.stderr.readline():
                return None
            time.sleep(0.3)  # it says so of the first thread only
            self.request(kind, path)
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=20)
        return trace.read_text().count(" sendfile(")

    def counted(self) -> int:
        """Bytes that the middleware recorded; the last line may be written shortly after the client's last byte."""
        deadline = time.monotonic() + 10
        while True:
            found = sum(sent_in(self._state))
            if found == self.received["t23"] or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def _cpu(self) -> float:
        """Seconds of CPU: utime and stime of /proc/<pid>/stat, without its steps of 10 ms (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._pids())

    def _pids(self) -> list[int]:
        return list(family(self._process.pid))

    def _environ(self) -> dict[str, str]:
        ours = {
            "THROUGHPUT_FOLDER": str(self._folder),
            "T23_API_URL": "http://127.0.0.1:9",
            "T23_STATE_DIR": str(self._state),
            "T23_RELAY": "off",
            "T23_FAST_FILES": "1",
            "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
        }
        return {name: text for name, text in os.environ.items() if not name.startswith("T23_")} | ours


@cache
def cores() -> tuple[set[int], set[int]]:
    """The cores of the server and of the client: different ones where there are two, so that they don't compete."""
    usable = os.sched_getaffinity(0)
    client = {max(usable)}
    return (usable - client or usable), client


def family(pid: int) -> Iterator[int]:
    """*pid* and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue  # a thread that has just ended
        for child in children:
            yield from family(int(child))


def sent_in(state: Path) -> Iterator[int]:
    """The bytes of each finished response in the journals under *state*."""
    for path in state.rglob("*.journal"):
        for text in path.read_bytes().splitlines():
            try:
                line = decode(text)
            except NotALine:
                continue  # half written
            if isinstance(line, Transfer):
                yield line.sent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


_buffer = memoryview(bytearray(BUFFER))


def get(port: int, target: str, asked: str | None) -> tuple[int, float]:
    """Bytes of the body of one answer, and the seconds until its connection ended."""
    extra = "" if asked is None else f"Range: {asked}\r\n"
    request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{extra}Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        begin = time.perf_counter()
        client.sendall(request.encode())
        taken, head = _head(client)
        total = taken
        while size := client.recv_into(_buffer):
            total += size
        seconds = time.perf_counter() - begin
    status = head.split(b" ", 2)[1]
    if status != (b"200" if asked is None else b"206"):
        raise Cannot(f"{target} was answered with {status.decode()}; the app is broken")
    return total - len(head), seconds


def _head(client: socket.socket) -> tuple[int, bytes]:
    """Bytes read so far, and the answer's head including its empty line."""
    taken = 0
    while True:
        size = client.recv_into(_buffer[taken:])
        taken += size
        text = bytes(_buffer[: min(taken, 1 << 16)])
        end = text.find(b"\r\n\r\n")
        if end >= 0:
            return taken, text[: end + 4]
        if size == 0:
            raise ConnectionError("the server closed the connection without an answer")


if __name__ == "__main__":
    sys.exit(main())
