"""Random apps, bare and wrapped, on real servers: what the client and the app itself see must not differ.

    python -m tests.random_apps.compare --apps 10000 --seed 1

prints each app with which it does, and the choices that are needed for it. ``--only 4711`` tries one again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from t23_middleware.transfer import Opening, Transfer

from ..servers.process import Site, running
from ..servers.setups import Setup
from .files import make_files
from .plan import odd_choices, plan

APP = "tests.random_apps.serve:application"
SERVE = f"{sys.executable} -m tests.random_apps.serve"
SETUPS = {
    "gunicorn sync": Setup(f"gunicorn -w 1 -b 127.0.0.1:PORT {APP}", "gunicorn"),
    "gunicorn gthread": Setup(f"gunicorn -w 1 -k gthread --threads 1 -b 127.0.0.1:PORT {APP}", "gunicorn"),
    "waitress": Setup(f"waitress-serve --threads=1 --listen=127.0.0.1:PORT {APP}", "waitress"),
    "wsgiref": Setup(f"{SERVE} wsgiref PORT", "wsgiref"),
    "werkzeug": Setup(f"{SERVE} werkzeug PORT", "werkzeug"),
    "pywsgi": Setup(f"{SERVE} pywsgi PORT", "gevent"),
}
#: The servers of the long run: two with a wrapper of their own, wsgiref's, and one without.
USUAL = ["gunicorn gthread", "waitress", "wsgiref", "pywsgi"]
#: Apps that one server process gets.
PIECE = 200
#: Seconds without a byte after which an answer is called hung: servers keep a connection whose length was wrong. Each
#: further try waits twice as long, as the server may be slow.
SILENCE = 0.2
#: How often an app is tried before a difference is believed: resets lose bytes, threads log late.
TRIES = 4
#: Bytes that a client takes which leaves early.
TASTE = 20_000
#: Bytes by which the count of an answer that was cut off may differ from what the client got.
CLOSE = 2048

#: Lines of a server's log that say nothing of what happened: places in the code, requests, and what only we say.
_IDLE = re.compile(
    r"^(\s|Traceback|During handling|The above exc|-{5}|$)|\" [0-9]{3} -?[0-9]*|HTTP/1\.[01] [0-9]{3}"
    r"|T23Middleware wraps the app twice|Task queue depth|^\S+ - - \[|failed with \w+$"
)
_ANOTHERS = re.compile(r"EVENT r[0-9]+ dropped")
_VARIES = [
    (re.compile(r"0x[0-9a-f]+"), "0x"),
    (re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9:,.]+( \+0000)?"), "TIME"),
    (re.compile(r"\[[0-9]+\]"), "[PID]"),
    (re.compile(r"\('127.0.0.1', [0-9]+\)"), "CLIENT"),
    (re.compile(r"[\w.<>]*start(_response)?\(\) "), "start() "),
    (re.compile(r"_?[Ww]rite\(\)"), "write()"),
    (re.compile(r"counted_write\(\)|Response._counting.<locals>."), ""),
    (re.compile(r"<[^<>]* at 0x>"), "<object>"),
    (re.compile(r"fd=[0-9]+|[0-9.]+ port [0-9]+|raddr=\S+|laddr=\S+"), ""),
]


class Outcome(NamedTuple):
    """What a client got, how its connection ended, and what the app noted and the server logged meanwhile."""

    raw: bytes
    ended: str
    log: tuple[tuple[str, int], ...]


class Fault(NamedTuple):
    server: str
    seed: int
    choices: str
    what: str

    def __str__(self) -> str:
        return f"{self.server}, app {self.seed} ({self.choices}):\n{self.what}"


class Result(NamedTuple):
    """Of some apps on one server: what went wrong, and how many answers were counted."""

    server: str
    apps: int
    faults: list[Fault]
    answers: int
    wrong: int


class Runner:
    """One server, and the apps that are tried on it."""

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self._site = site
        self._log = (site.folder / "log").open("rb")
        #: Request -> the body bytes that its client got, and whether they are all.
        self.expected: dict[str, tuple[int, int, bool]] = {}
        self._numbers = iter(range(100_000, 100_000_000))

    def close(self) -> None:
        self._log.close()

    def difference(self, seed: int, plain: frozenset[str] = frozenset()) -> str | None:
        """What is different with us, if it is so again and again."""
        chosen = plan(seed, plain)
        seen: dict[str, set[Outcome]] = {"bare": set(), "wrapped": set()}
        for number in range(TRIES):
            for way in seen:
                seen[way].add(self._outcome(seed, plain, chosen, way, number))
            if seen["bare"] & seen["wrapped"]:
                return None
        return _shown(seen["bare"].pop(), seen["wrapped"].pop())

    def minimal(self, seed: int) -> Fault | None:
        """The fault of an app with as few odd choices as it needs."""
        what = self.difference(seed)
        if what is None:
            return None
        plain: frozenset[str] = frozenset()
        for kind in odd_choices(plan(seed)):
            simpler = self.difference(seed, plain | {kind})
            if simpler is not None:
                plain, what = plain | {kind}, simpler
        return Fault(self.name, seed, _choices(seed, plain), what)

    def _outcome(
        self, seed: int, plain: frozenset[str], chosen: dict[str, str], way: str, number: int
    ) -> Outcome:
        request = f"r{next(self._numbers)}"
        self._log.seek(0, 2)
        raw, ended = self._exchange(
            f"/{seed}/{','.join(plain)}/{request}", request, chosen, way, SILENCE * 2**number
        )
        if number:
            self._site.bare("GET", "/collect")
        time.sleep(0.1 * number * number)
        log = self._log.read().decode(errors="replace")
        if way == "wrapped" and may_count(chosen) and b"X-T23-Play" not in raw:
            self._expect(request, raw, ended, seed)
        lines = Counter(_plain(line, request) for line in log.splitlines() if not _IDLE.search(line))
        # When the garbage collector comes is chance: another app's objects say nothing of this one.
        lines = Counter({line: times for line, times in lines.items() if not _ANOTHERS.match(line)})
        raw = re.sub(rb"(?mi)^(Date|X-T23-Play): [^\r\n]*\r\n", b"", raw).replace(
            request.encode(), b"REQUEST"
        )
        if "hostile" in chosen["body"] or (chosen["body"], chosen["file"]) == ("file", "most hostile"):
            return Outcome(raw, ended, ())  # all servers fail on it; that we did not count it is logged
        if _is_garbled(raw):
            return Outcome(raw.partition(b"\r\n\r\n")[0], ended, tuple(sorted(lines.items())))
        if chosen["client"] == "leaves" or (self.name, chosen["chunks"]) == ("waitress", "wide view"):
            # How far a server comes until it knows is chance. waitress fails on a memoryview of wide items as soon as it
            # has sent a part of it (buffers.py, ``skip``), and then sends as much again as its threads happen to find.
            return Outcome(raw[:200], ended, ())
        return Outcome(raw, ended, tuple(sorted(lines.items())))

    def _exchange(
        self, path: str, request: str, chosen: dict[str, str], way: str, silence: float
    ) -> tuple[bytes, str]:
        with socket.create_connection(("127.0.0.1", self._site.port), 10) as client:
            client.settimeout(silence)
            client.sendall(_request(path, request, chosen, way))
            raw, ended = _read(client, TASTE if chosen["client"] == "leaves" else 1 << 40, chosen)
            if ended != "whole":
                return raw, ended
            client.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            more, ended = _read(client, 1 << 40, {"client": "close"})
            return raw + more, ended

    def _expect(self, request: str, raw: bytes, ended: str, seed: int) -> None:
        head, _, body = raw.partition(b"\r\n\r\n")
        if not re.search(rb"(?mi)^content-type: (video|audio)/(?!mp2t)", head):
            return
        if not re.match(rb"HTTP/1.[01] 20[06]\b", head):
            return
        got, is_whole = _body(head, body)
        if ended in ("closed", "whole") and not _is_garbled(raw):
            self.expected[request] = seed, got, is_whole

    def miscounted(self) -> list[Fault]:
        """The answers whose line in the journal says something else than the client."""
        deadline = time.monotonic() + 5
        while (faults := self._miscounted()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return faults

    def _miscounted(self) -> list[Fault]:
        sent: dict[str, list[int]] = {}
        drains: set[str] = set()
        opened: Counter[str] = Counter()
        for line in self._site._decoded():
            if isinstance(line, Transfer):
                sent.setdefault(line.opening.play.session_id, []).append(line.sent)
                if line.position is not None:
                    drains.add(line.opening.play.session_id)
            elif isinstance(line, Opening):
                opened[line.play.session_id] += 1
        faults = []
        for request, (seed, got, is_whole) in self.expected.items():
            counts = sent.get(request, [])
            if plan(seed)["outer"] == "retry" and len(counts) == 2 and 0 in counts:
                counts.remove(0)  # of the first try nothing was sent
            if not is_whole and len(counts) == 1 and (request in drains or abs(counts[0] - got) <= CLOSE):
                continue  # of what drains, the relay asks the kernel
            if counts != [got]:
                said = f"client got {got} {'(all)' if is_whole else '(cut)'}, counted {counts}, opened {opened[request]}"
                faults.append(Fault(self.name, seed, _choices(seed, frozenset()), said))
        return faults


def may_count(chosen: dict[str, str]) -> bool:
    """Whether a media answer of this app must be counted."""
    return (
        (chosen["method"], chosen["session"]) in (("GET", "yes"), ("GET", "cookie"))
        and chosen["client"] != "leaves"
        and chosen["environ"] in ("kept", "odd input", "null protocol", "hostile socket", "wrapper taken", "wrapper odd")
        and chosen["outer"] not in ("drop", "break", "broken query")
        # Lengths that lie, of which each server makes something else, and a file of which gunicorn skips a part.
        and chosen["chunks"] not in ("short subclass", "wide view")
        and chosen["body"] != "length lies"
        and chosen["length"] != "-1"
        and chosen["position"] != "after a read"
        # No app writes while it is closed, and to wait for it would leave a body open that a server never closes.
        and chosen["write"] != "after close"
        and (chosen["write"] == "none" or chosen["outer"] != "retry")
        # waitress sends such a file without the chunked framing that it has begun, and wsgiref takes what was written
        # for the whole of a body with one chunk.
        and (chosen["write"] == "none" or not chosen["body"].startswith(("wrapper", "sized")))
        and chosen["start"] != "in close"
        and "hostile" not in chosen["body"]
    )  # fmt: skip


def _request(path: str, request: str, chosen: dict[str, str], way: str) -> bytes:
    session = chosen["session"]
    query = {"yes": f"session_id={request}&photo_id=7", "no photo": f"session_id={request}"}.get(
        session, "photo_id=7"
    )
    version = "1.0" if chosen["client"] == "1.0" else "1.1"
    lines = [f"{chosen['method']} {path}?{query} HTTP/{version}", "Host: x"]
    if chosen["client"] != "kept":
        lines.append("Connection: close")
    if session == "cookie":
        lines.append(f"Cookie: session_id={request}")
    if chosen["range"] != "none":
        lines.append(f"Range: {chosen['range']}")
    if chosen["method"] == "POST":
        lines.append("Content-Length: 3")
    if way == "bare":
        lines.append("X-Bare: 1")
    return "\r\n".join([*lines, "", "abc" if chosen["method"] == "POST" else ""]).encode()


def _read(client: socket.socket, most: int, chosen: dict[str, str]) -> tuple[bytes, str]:
    """What comes, and how it ended; an answer on a kept connection ends where it says so itself."""
    raw = bytearray()
    try:
        while len(raw) < most:
            if chosen["client"] == "kept" and _is_whole(raw, chosen["method"]):
                return bytes(raw), "whole"
            data = client.recv(1 << 18)
            if not data:
                return bytes(raw), "closed"
            raw += data
    except TimeoutError:
        return bytes(raw), "silent"
    except OSError:
        return bytes(raw), "closed"  # a server that does not read the whole request resets the connection
    return bytes(raw), "left"


def _is_whole(raw: bytearray, method: str) -> bool:
    head, found, body = bytes(raw).partition(b"\r\n\r\n")
    if not found:
        return False
    if method == "HEAD" or re.match(rb"HTTP/1.[01] (204|304)", head):
        return True
    if not re.search(rb"(?mi)^(content-length|transfer-encoding):", head):
        return False
    return _body(head, body)[1]


def _is_garbled(raw: bytes) -> bool:
    """Whether the head says two lengths, as pywsgi's does if the headers can be read only once: RFC 9112 forbids it."""
    head = raw.partition(b"\r\n\r\n")[0].lower()
    return b"\ncontent-length:" in head and b"\ntransfer-encoding:" in head


def _body(head: bytes, body: bytes) -> tuple[int, bool]:
    """The bytes of a body without its framing, and whether they are all."""
    if re.search(rb"(?mi)^transfer-encoding: *chunked", head):
        return _unchunked(body)
    length = re.search(rb"(?mi)^content-length: *([0-9]+)\r?$", head)
    if length is None:
        return len(body), False
    return min(len(body), int(length[1])), len(body) >= int(length[1])


def _unchunked(body: bytes) -> tuple[int, bool]:
    got, at = 0, 0
    while True:
        size, found, _ = body[at : at + 20].partition(b"\r\n")
        if not found:
            return got, False
        try:
            number = int(size, 16)
        except ValueError:
            return got, False  # the server wrote a body that it had not announced
        if number == 0:
            return got, True
        at += len(size) + 2
        got += max(min(number, len(body) - at), 0)
        at += number + 2


def _plain(line: str, request: str) -> str:
    line = line.replace(request, "REQUEST")
    for pattern, instead in _VARIES:
        line = pattern.sub(instead, line)
    return line


def _choices(seed: int, plain: frozenset[str]) -> str:
    chosen = plan(seed, plain)
    return ", ".join(f"{kind}: {chosen[kind]}" for kind in odd_choices(chosen))


def _shown(bare: Outcome, wrapped: Outcome) -> str:
    said = []
    for name in ("raw", "ended", "log"):
        one, other = getattr(bare, name), getattr(wrapped, name)
        if name == "log":
            one, other = sorted(set(one) - set(other)), sorted(set(other) - set(one))
        if one != other:
            said.append(f"  {name}: bare {_short(one)}\n  {name}: ours {_short(other)}")
    return "\n".join(said)


def _short(value: Any) -> str:
    text = repr(value)
    more = f" … {len(value)}" if len(text) > 700 else ""
    return text[:700] + more


@contextmanager
def runner(name: str, **environ: str) -> Iterator[Runner]:
    """The server of that name, started in folders of its own."""
    folder = Path(tempfile.mkdtemp(prefix="random-apps-"))
    try:
        make_files(folder)
        with running(SETUPS[name], folder, folder, **environ) as site:
            on = Runner(name, site)
            yield on
            on.close()
    finally:
        shutil.rmtree(folder)


def compare(name: str, seeds: list[int], **environ: str) -> Result:
    """The faults of the apps *seeds* on one server of their own."""
    faults = []
    with runner(name, **environ) as on:
        for seed in seeds:
            try:
                fault = on.minimal(seed)
            except OSError as error:
                faults.append(Fault(name, seed, _choices(seed, frozenset()), f"the server is gone: {error}"))
                break
            if fault is not None:
                faults.append(fault)
        wrong = on.miscounted()
        return Result(name, len(seeds), faults + wrong, len(on.expected), len(wrong))


def _compare(work: tuple[str, list[int], dict[str, str]]) -> Result:
    name, seeds, environ = work
    return compare(name, seeds, **environ)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_all(name: str, results: list[Result]) -> None:
    apps, answers, wrong = (
        sum(result[place] for result in results if result.server == name) for place in (1, 3, 4)
    )
    faults = sum(len(result.faults) for result in results if result.server == name) - wrong
    _say(f"{name}: {apps} apps, {faults} differences; {answers} media answers counted, {wrong} of them wrong")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--apps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="number of the first app")
    parser.add_argument("--only", type=int, help="try this app alone")
    parser.add_argument(
        "--server", action="append", choices=list(SETUPS), help=f"may be given more than once; else {USUAL}"
    )
    parser.add_argument("--jobs", type=int, default=8, help="servers at a time")
    parser.add_argument("--proxy-log", action="store_true", help="with T23_PROXY_LOG; then a proxy counts")
    asked = parser.parse_args()
    first = random.randrange(1 << 30) if asked.seed is None else asked.seed
    seeds = [asked.only] if asked.only is not None else list(range(first, first + asked.apps))
    names = asked.server or USUAL
    _say(f"apps {seeds[0]} to {seeds[-1]} on {', '.join(names)}")
    environ = {"T23_PROXY_LOG": "/nowhere/t23.log"} if asked.proxy_log else {}
    begun = time.monotonic()
    # Most of the time is spent waiting for what does not come, so that there are more servers than processors.
    work = [(name, seeds[at : at + PIECE], environ) for at in range(0, len(seeds), PIECE) for name in names]
    results = []
    with multiprocessing.Pool(asked.jobs) as pool:
        for result in pool.imap_unordered(_compare, work):
            results.append(result)
            for fault in result.faults:
                _say(str(fault))
    for name in names:
        _say_all(name, results)
    faults = sum(len(result.faults) for result in results)
    _say(f"{faults} faults, first app {seeds[0]}, {time.monotonic() - begun:.0f} seconds")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
