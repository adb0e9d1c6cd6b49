"""A worker with real connections: a process that serves bodies, and writes its journal as the app's process does.

It is spoken to in lines of JSON. What it tells of a connection is the kernel's own account at that moment.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t23_middleware.journal import JournalWriter
from t23_middleware.state import StateFolder
from t23_middleware.tcp_info import SIZE, TCP_INFO, TCPInfo, read_tcp_info
from t23_middleware.transfer import Connection, Opening, Part, Play, Progress, Transfer, encode

ROOT = Path(__file__).parent.parent.parent
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: %d\r\n\r\n"
#: Of a client that does not read: its kernel takes a few KB, whatever is sent.
SMALL = 8192


class TCPWorker:
    """The process, and what it can be told."""

    def __init__(self, folder: StateFolder, digest: str, host: str = "127.0.0.1") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.relay.tcp_worker", str(folder.path), digest, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.port = int(self._answer())
        self._clients: list[Client] = []

    def connect(self, receive: int | None = SMALL) -> Client:
        """A new connection."""
        client = Client(self.port, receive)
        self._clients.append(client)
        client.number = int(self.tell("accept"))
        return client

    def respond(self, client: Client, session: str, size: int, **more: Any) -> dict[str, Any]:
        """Serve *size* bytes to *session*, as *first* and *total* place them in their file.

        With *at_once* so many bytes are sent at first, and the rest by a thread that the journal does not know of.
        """
        answer: dict[str, Any] = self.tell(
            "respond", number=client.number, session=session, size=size, **more
        )
        return answer

    def close(self, client: Client) -> None:
        """The server closes the connection."""
        self.tell("close", number=client.number)

    def tell(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def kill(self) -> None:
        self.process.kill()
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.communicate()

    def end(self) -> None:
        """Nothing of it is left."""
        self.kill()
        for client in self._clients:
            client.socket.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


class Client:
    """A viewer's end."""

    number = 0

    def __init__(self, port: int, receive: int | None) -> None:
        self.socket = socket.socket()
        if receive is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.read_so_far = 0

    def read(self, size: int) -> None:
        """Read exactly so many bytes."""
        left = size
        while left:
            data = self.socket.recv(min(left, 1 << 16))
            assert data, f"the connection ended, {left} bytes before it was to"
            left -= len(data)
        self.read_so_far += size

    def took(self) -> int:
        """What this end's kernel took, read or not (``tcpi_bytes_received``)."""
        answer = self.socket.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
        return int(struct.unpack_from("=Q", answer, 128)[0])

    def leave(self, *, reset: bool = False) -> int:
        """Close; what its kernel had taken."""
        time.sleep(0.3)  # what is on its way
        took = self.took()
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        return took


@contextmanager
def serving(folder: StateFolder, digest: str, **more: str) -> Iterator[TCPWorker]:
    """A worker, killed at the end."""
    worker = TCPWorker(folder, digest, **more)
    try:
        yield worker
    finally:
        worker.end()


# In the process itself.


class _Server:
    def __init__(self, folder: StateFolder, digest: str, host: str) -> None:
        self._writer = JournalWriter(folder, "0.1.0", digest)
        self._folder = folder
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        dual = family == socket.AF_INET6
        self._listening = socket.create_server((host, 0), family=family, dualstack_ipv6=dual)
        self.port: int = self._listening.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._responses = 0

    def accept(self) -> int:
        connection, _ = self._listening.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._connections.append(connection)
        return len(self._connections) - 1

    def record_leaving(self) -> None:
        self._folder.record_leaving()

    def close(self, number: int) -> None:
        self._connections[number].close()

    def respond(
        self,
        number: int,
        session: str,
        size: int,
        at_once: int | None = None,
        first: int = 0,
        total: int | None = None,
        progress: bool = False,
        close: bool = False,
    ) -> dict[str, Any]:
        connection = self._connections[number]
        head = HEAD % size
        self._responses += 1
        (cookie,) = struct.unpack("=q", connection.getsockopt(socket.SOL_SOCKET, 57, 8))
        base = _info(connection).position + len(head)
        where = Connection(cookie, self.port, connection.family, base)
        started_ns, started_ms = time.monotonic_ns(), time.time_ns() // 10**6
        part = Part(first, first + size - 1, total or size)
        play = Play(session, "7")
        opening = Opening(self._responses, started_ns, started_ms, play, part, 200, size, connection=where)
        self._writer.write(encode(opening))
        connection.sendall(head)
        if at_once is None:
            connection.sendall(bytes(size))
            self._end(connection, opening, size)
        else:
            connection.sendall(bytes(at_once))
            if progress:
                now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 10**6
                told = Progress(opening, now_ns, now_ms, at_once, base + at_once)
                self._writer.write(encode(told))
            # As a sendfile: the rest goes out without a word to the journal.
            threading.Thread(target=_rest, args=(connection, size - at_once), daemon=True).start()
        if close:
            connection.close()
        return {"base": base, "cookie": cookie}

    def _end(self, connection: socket.socket, opening: Opening, size: int) -> None:
        info = _info(connection)
        assert opening.connection is not None
        after = opening.connection.position + size
        position = None if info.acked >= after else after
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 10**6
        self._writer.write(encode(Transfer(opening, now_ns, now_ms, size, position=position)))


def _rest(connection: socket.socket, size: int) -> None:
    try:
        connection.sendall(bytes(size))
    except OSError:
        time.sleep(3600)  # it hangs in the server, until it is killed


def _info(connection: socket.socket) -> TCPInfo:
    info = read_tcp_info(connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, SIZE))
    assert info is not None
    return info


def main() -> None:
    path, digest, host = sys.argv[1:]
    server = _Server(StateFolder(Path(path)), digest, host)
    print(server.port, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(getattr(server, told.pop("do"))(**told)), flush=True)


if __name__ == "__main__":
    main()
