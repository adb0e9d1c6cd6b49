"""Clients of a proxy that leave, or stay: HTTP/1.1 by a bare socket; HTTP/2 by curl, or by h2 where it has to pace."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from typing import Any

from ..harness import PATIENCE, need
from ..servers.client import Client

#: Bytes per second of a client that watches.
PACE = 8_000_000
#: Bytes of its receive buffer, and of its window where it speaks HTTP/2: as a browser's.
BUFFER, WINDOW = 256 << 10, 6 << 20


def take_and_leave(port: int, target: str, size: int, *, tls: bool = False, pace: float = PACE) -> None:
    """Read *size* bytes of the body and hang up."""
    with Client(port, tls=tls, buffer=BUFFER) as client:
        client.request("GET", target)
        assert client.read_some(size, pace) == size


def take_all(port: int, target: str, *, tls: bool = False, **headers: str) -> int:
    """Bytes of the body, of which nothing is kept."""
    with Client(port, tls=tls) as client:
        client.request("GET", target, headers)
        client.read_some(0)
        return client.drain()


def read_and_leave(port: int, target: str, size: int, *, tls: bool) -> None:
    """The same over HTTP/2."""
    with Http2(port, tls=tls) as connection:
        stream = connection.get(target)
        assert connection.read(stream, size) >= size


def curl_all(port: int, target: str, *, tls: bool) -> int:
    """Bytes of the body over HTTP/2."""
    way = ["--insecure", "--http2"] if tls else ["--http2-prior-knowledge"]
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}{target}"
    said = subprocess.check_output(
        [need("curl"), "--silent", *way, "-o", "/dev/null", "-w", "%{http_version} %{size_download}", url],
        text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    version, _, size = said.partition(" ")
    assert version == "2"
    return int(size)


class Http2:
    """One HTTP/2 connection, on which streams can be cancelled, as players do when they seek."""

    def __init__(self, port: int, *, tls: bool = False) -> None:
        import h2.connection
        import h2.settings

        plain = socket.socket()
        plain.settimeout(PATIENCE)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        plain.connect(("127.0.0.1", port))
        self._socket = _context().wrap_socket(plain) if tls else plain
        self._http = h2.connection.H2Connection()
        self._http.initiate_connection()
        self._http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
        self._http.increment_flow_control_window(WINDOW)
        self._send()

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def get(self, target: str, **headers: str) -> int:
        """Ask; the number of the stream."""
        stream: int = self._http.get_next_available_stream_id()
        fixed = [(":method", "GET"), (":scheme", "http"), (":authority", "films"), (":path", target)]
        self._http.send_headers(stream, [*fixed, *headers.items()], end_stream=True)
        self._send()
        return stream

    def read(self, stream: int, size: int) -> int:
        """Bytes of the body of *stream*, read at :data:`PACE`: at least *size*, or all."""
        import h2.events

        taken, over = 0, False
        while taken < size and not over:
            for event in self._events():
                if isinstance(event, h2.events.DataReceived):
                    self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    taken += len(event.data) if event.stream_id == stream else 0
                over = over or (isinstance(event, h2.events.StreamEnded) and event.stream_id == stream)
            self._send()
        return taken

    def cancel(self, stream: int) -> None:
        import h2.errors

        self._http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._send()

    def _events(self) -> list[Any]:
        data = self._socket.recv(1 << 14)
        assert data, "nginx hung up"
        time.sleep(len(data) / PACE)
        return list(self._http.receive_data(data))

    def _send(self) -> None:
        self._socket.sendall(self._http.data_to_send())


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
