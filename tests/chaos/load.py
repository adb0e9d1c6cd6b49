"""Clients that play without pause, and the oracle that holds each response which completed."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..harness import MEDIA, PATIENCE

#: Reports that a relay may have with the API at once; so many may arrive twice for each kill of relay or API.
IN_FLIGHT = 256
#: Bytes of each play.
PLAYED = 100_000
#: Seconds between two plays of one client.
PAUSE = 0.02


class Response(NamedTuple):
    """A response of which all came, to the server's own hanging up."""

    worker: int
    sent: int


def play(port: int, session: str) -> Response | None:
    """The response, or ``None`` where it did not complete.

    A client that counts its bytes knows only that it has them all. One that waits for the server to hang up knows
    that the server is done with the response too.
    """
    asked = (
        f"GET {MEDIA}?session_id={session} HTTP/1.1\r\nHost: x\r\n"
        f"Range: bytes=0-{PLAYED - 1}\r\nConnection: close\r\n\r\n"
    )
    answer = bytearray()
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            client.sendall(asked.encode())
            while data := client.recv(1 << 16):
                answer += data
    except OSError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 206") or len(body) != PLAYED:
        return None
    return Response(_worker(head), len(body))


def _worker(head: bytes) -> int:
    names = (line.partition(b": ") for line in head.split(b"\r\n"))
    return next((int(value) for name, _, value in names if name.lower() == b"worker"), 0)


class Oracle:
    """Which sessions must be reported, and with how many bytes."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Response, float]] = {}
        self._killed: dict[int, float] = {}

    def completed(self, session: str, response: Response) -> None:
        self._held[session] = response, time.monotonic()

    def kill(self, worker: int) -> None:
        """SIGKILL. Who hung up on a response that ended later, the worker or the kernel, nobody can tell."""
        self._killed.setdefault(worker, time.monotonic())
        os.kill(worker, signal.SIGKILL)

    def held(self) -> dict[str, int]:
        """Session -> bytes."""
        return {
            session: response.sent
            for session, (response, at) in self._held.copy().items()
            if at < self._killed.get(response.worker, at + 1)
        }


class Verdict(NamedTuple):
    """What the API recorded of what the oracle held."""

    held: int
    lost: list[str]
    wrong: dict[str, tuple[int, set[str]]]
    doubled: int

    @classmethod
    def of(cls, held: dict[str, int], recorded: list[dict[str, Any]]) -> Verdict:
        times = Counter(report["session_id"] for report in recorded)
        told: dict[str, set[str]] = {}
        for report in recorded:
            told.setdefault(report["session_id"], set()).add(report["bytes_total"])
        lost = sorted(held.keys() - told.keys())
        wrong = {
            session: (sent, told[session])
            for session, sent in held.items()
            if session in told and told[session] != {str(sent)}
        }
        return cls(len(held), lost, wrong, times.total() - len(times))

    def nothing_is_lost(self) -> bool:
        return not self.lost and not self.wrong


def all_arrived(held: dict[str, int], recorded: list[dict[str, Any]]) -> bool:
    return held.keys() <= {report["session_id"] for report in recorded}


@contextmanager
def load(port: int, oracle: Oracle, clients: int) -> Iterator[None]:
    """So many clients play meanwhile, each with a new session each time."""
    over, numbers = threading.Event(), itertools.count()

    def go_on_playing() -> None:
        while not over.wait(PAUSE):
            session = f"s{next(numbers)}"
            response = play(port, session)
            if response is not None:
                oracle.completed(session, response)

    threads = [threading.Thread(target=go_on_playing) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def workers_of(master: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(master)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]
