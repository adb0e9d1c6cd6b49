"""What each server's clients received beside what was counted, from real runs: the table of ``docs/servers.md``.

Completed transfers: counted minus received, in bytes, and the calls of sendfile(2), with the middleware and without.
Transfers that are cut off: the client takes a part, stops reading until nothing more arrives, and hangs up. The number
is counted minus what had reached its kernel, and in brackets minus what its program had read. A stall is the worst case:
all buffers are full. The last column is how a cut-off response is counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.servers.client import Client  # noqa: E402
from tests.servers.process import Site, make_files, play, running  # noqa: E402
from tests.servers.setups import SETUPS, missing  # noqa: E402

PAGE = ROOT / "docs" / "servers.md"
BEGIN, END = "<!-- table: benchmarks/server_table.py --write -->", "<!-- /table -->"
FILM = "long.mp4"
#: Bytes that the client of a cut-off transfer reads before it stops.
TASTE = 10 << 20

COMPLETED = {
    "file_wrapper": ("wrapper", ""),
    "generator": ("generator", ""),
    "write()": ("write-all", ""),
    "send_file": ("flask", ""),
    "Range of send_file": ("flask", "bytes=50000000-149999999"),
}
CUT_OFF = {
    "file_wrapper": "wrapper",
    "generator": "generator",
    "write()": "write-all",
    "send_file": "flask",
}
PACKAGES = (
    "gunicorn gevent waitress uwsgi mod_wsgi bjoern cheroot granian uvicorn a2wsgi hypercorn werkzeug flask"
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, row by row; 1 where a server that should run can't, 2 for an unknown one."""
    options = _options(arguments)
    unknown = [name for name in options.server or [] if name not in SETUPS]
    if unknown:
        print(f"server_table: there is no {unknown[0]!r}; known are: {', '.join(SETUPS)}", file=sys.stderr)
        return 2
    print(*header(), sep="\n", flush=True)
    rows: dict[str, str] = {}
    with films(options.size << 20) as served:
        for name in options.server or SETUPS:
            reason = missing(SETUPS[name])
            if reason is None:
                rows[name] = row(name, served, options.size << 20)
                print(rows[name], flush=True)
            else:
                print(f"server_table: no {name}: {reason}", file=sys.stderr)
    if options.write:
        PAGE.write_text(with_rows(PAGE.read_text(), rows))
    return 0 if len(rows) == len(options.server or SETUPS) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--size", type=int, default=200, metavar="MIB", help="of the file (at least 150)")
    parser.add_argument("--write", action="store_true", help=f"put the rows into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.size < 150:
        parser.error("--size must be at least 150: the Range ends at 150 MB")
    return options


@contextmanager
def films(size: int) -> Iterator[Path]:
    with folder() as served:
        make_files(served)
        os.truncate(served / FILM, size)
        yield served


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that any user may enter; tempfile's own has mode 0700."""
    made = Path(tempfile.mkdtemp(prefix="server-table-"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def row(name: str, served: Path, size: int) -> str:
    """The table's row of one server."""
    setup = SETUPS[name]
    with folder() as own:
        calls = Calls(own / "sendfile.log")
        with running(setup, own, served, *calls.command()) as site:
            cells = [completed(site, calls, *case) for case in COMPLETED.values() if _has(site, case[0])]
            cells += [cut_off(site, way, size) for way in CUT_OFF.values() if _has(site, way)]
    if not setup.has_write:
        cells.insert(2, "no write()")
        cells.insert(len(COMPLETED) + 2, "")
    cells.append("client's kernel" if setup.asks_kernel else "server")
    return f"| {name} | {' | '.join(cells)} |"


def _has(site: Site, way: str) -> bool:
    return site.setup.has_write or way != "write-all"


class Calls:
    """Counts a server's calls of sendfile(2) by strace; without strace the table has no such figure."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._strace = shutil.which("strace")

    def command(self) -> list[str]:
        if self._strace is None:
            return []
        return [self._strace, "-f", "-qq", "--seccomp-bpf", "-e", "trace=sendfile", "-o", str(self._log)]

    def so_far(self) -> int | None:
        return len(re.findall(r"\bsendfile\(", self._log.read_text())) if self._strace else None


class Complete(NamedTuple):
    """One completed transfer."""

    received: int
    calls: int | None


def completed(site: Site, calls: Calls, way: str, asked: str) -> str:
    """Counted minus received, and the calls of sendfile with us / without us."""
    session = site.session()
    ours = _fetch(site, calls, way, asked, session)
    sent = site.sent(session)
    bare = _fetch(site, calls, way, asked, site.session(), X_Bare="1")
    off = f"{sent[0] - ours.received:+d}".replace("+0", "0") if sent else "no count"
    if not ours.calls and not bare.calls:
        return off
    return f"{off}, sf {ours.calls}/{bare.calls}"


def _fetch(site: Site, calls: Calls, way: str, asked: str, session: str, **headers: str) -> Complete:
    before = calls.so_far()
    with site.client() as client:
        client.request("GET", play(f"/{way}/{FILM}", session), headers | ({"Range": asked} if asked else {}))
        received = client.read_some(1) + client.drain()
    after = calls.so_far()
    return Complete(received, None if after is None or before is None else after - before)


def cut_off(site: Site, way: str, size: int) -> str:
    """Counted minus what reached the client's kernel, and its program."""
    session = site.session()
    with site.client() as client:
        client.request("GET", play(f"/{way}/{FILM}", session))
        read = client.read_some(min(TASTE, size))
        _wait_until_nothing_comes(client)
        kernel = client.body_bytes(read)
    sent = site.sent(session)
    if not sent:
        return "no count"
    return f"{_in_words(sent[0] - kernel)} ({_in_words(sent[0] - read)})"


def _in_words(difference: int) -> str:
    if abs(difference) < 100_000:
        return f"{difference:+,d}".replace("+0", "0")
    return f"{difference / 1e6:+.1f} MB"


def _wait_until_nothing_comes(client: Client) -> None:
    before, now = -1, client.kernel_bytes()
    while now != before:
        time.sleep(0.3)
        before, now = now, client.kernel_bytes()


def header() -> list[str]:
    names = ["server", *COMPLETED, *(f"cut: {name}" for name in CUT_OFF), "cut: counted by"]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def with_rows(page: str, rows: dict[str, str]) -> str:
    """*page* with *rows* in its table; rows of servers that were not run stay as they are."""
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    there = {line.split("|")[1].strip(): line for line in page[start:stop].splitlines() if line[:2] == "| "}
    merged = [line for name in SETUPS if (line := (there | rows).get(name))]
    return page[:start] + "\n\n" + "\n".join([measured(), "", *header(), *merged]) + "\n\n" + page[stop:]


def measured() -> str:
    """The versions and the machine of the measurement."""
    wanted = PACKAGES.split()
    versions = ", ".join(f"{name} {version}" for name in wanted if (version := _version(name)))
    largest = Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]
    return (
        f"Measured {time.strftime('%Y-%m-%d', time.gmtime())} on loopback, Linux {platform.release().split('-')[0]}"
        f" (`tcp_wmem` at most {int(largest) / 1e6:.1f} MB), Python {platform.python_version()}: {versions}."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
