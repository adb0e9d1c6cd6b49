"""The client of the matrix: HTTP/1.1 on a bare socket, so that it can read as badly as real clients do."""

from __future__ import annotations

import fcntl
import http.client
import socket
import ssl
import struct
import termios
import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

#: Seconds without a byte before a test calls the server hung.
SILENCE = 30.0


class Body(bytes):
    """Bytes that a failing test does not print; their number and checksum say enough."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, crc32 {zlib.crc32(self):08x}>"


class Answer(NamedTuple):
    """What a client got; status 0 where the server hung up without a head."""

    status: int
    #: Without Date, whose value is the time's.
    headers: list[tuple[str, str]]
    body: Body
    #: The body ended before its Content-Length or its last chunk.
    cut: bool = False

    def header(self, wanted: str) -> str | None:
        return next((value for name, value in self.headers if name.lower() == wanted.lower()), None)


class Client:
    """One connection; *buffer* is the size of its receive buffer in bytes, where it shall be small.

    After *silence* seconds without a byte it takes the server for hung.
    """

    def __init__(
        self, port: int, *, tls: bool = False, buffer: int | None = None, silence: float = SILENCE
    ) -> None:
        self.port = port
        self._method = ""
        #: What had come on this connection before the last request.
        self._before = 0
        self._response: http.client.HTTPResponse | None = None
        self._connection = _Connection("127.0.0.1", port, silence, tls, buffer)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def ask(self, method: str, target: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and read its whole answer, on the connection that is open where the server keeps it.

        One that it closed without a word (uWSGI) is made anew, as RFC 9110, section 9.2.2 has it.
        """
        used_before = self._connection.sock is not None
        try:
            self.request(method, target, headers)
            return self.read_answer()
        except (http.client.HTTPException, OSError):
            self._connection.close()
            return self.ask(method, target, headers) if used_before else Answer(0, [], Body(), cut=True)

    def request(self, method: str, target: str, headers: Mapping[str, str] | None = None) -> None:
        named = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        self._method = method
        kept = self._connection.sock
        self._before = self.kernel_bytes() if kept is not None else 0
        self._connection.request(method, target, headers=named)

    def read_answer(self) -> Answer:
        """The answer, as far as it comes."""
        response = self._connection.getresponse()
        headers = sorted((name, value) for name, value in response.getheaders() if name.lower() != "date")
        body, cut = bytearray(), False
        try:
            while block := response.read1(1 << 16):
                body += block
        except (http.client.HTTPException, OSError):
            cut = True
        response.close()
        length = response.getheader("Content-Length")
        if length is not None and length.isdigit() and _has_body(self._method, response.status):
            cut = cut or len(body) < int(length)
        return Answer(response.status, headers, Body(body), cut)

    def read_some(self, size: int, per_second: float | None = None) -> int:
        """Read the head and the first *size* bytes of the body, no faster than told; how many came."""
        self._response = response = self._connection.getresponse()
        taken = 0
        while taken < size and (block := response.read1(min(1 << 14, size - taken))):
            taken += len(block)
            if per_second is not None:
                time.sleep(len(block) / per_second)  # what a pause took too long is not made up for
        return taken

    def read_rest(self) -> bytes:
        """What is left of the body after :meth:`read_some`."""
        assert self._response is not None
        return self._response.read()

    def drain(self) -> int:
        """Take what is left of the body after :meth:`read_some` and forget it; how many bytes it was."""
        assert self._response is not None
        taken = 0
        while block := self._response.read1(1 << 18):
            taken += len(block)
        self._response.close()
        return taken

    def drain_what_comes(self) -> int:
        """The same of a body that may be cut."""
        try:
            return self.drain()
        except (http.client.HTTPException, OSError):
            return 0

    def pipeline(self, targets: Sequence[str], size: int) -> list[int]:
        """Send requests for all *targets* at once; read the first answer, whose body has *size* bytes, and the second's head.

        Returns the lengths of the heads; only the first where the server closes the connection behind it.
        """
        self._connection.connect()
        sock = self._connection.sock
        lines = "".join(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n" for target in targets)
        sock.sendall(lines.encode())
        answers = sock.makefile("rb")
        heads = [_head_length(answers)]
        answers.read(size)
        if second := _head_length(answers):
            heads.append(second)
        return heads

    def drain_what_comes_in_part(self) -> int:
        """As :meth:`drain` of a body that is cut: how many bytes came all the same."""
        assert self._response is not None
        taken = 0
        try:
            while block := self._response.read1(1 << 18):
                taken += len(block)
        except (http.client.HTTPException, OSError):
            pass
        return taken

    def head_bytes(self) -> int:
        """Length of the head that :meth:`read_some` met, as servers write it."""
        response = self._response
        assert response is not None
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.getheaders()]
        return sum(len(line) + 2 for line in lines) + 2

    def body_bytes(self, read: int) -> int:
        """Bytes of the body that came to this client's kernel; its program has *read* so many of them.

        With TLS or chunks the kernel counts more than the body: then what it has unread is scaled.
        """
        response, sock = self._response, self._connection.kernels
        assert response is not None and sock is not None
        if not isinstance(sock, ssl.SSLSocket) and not response.chunked:
            return self.kernel_bytes() - self._before - self.head_bytes()
        buffered = len(response.fp.peek()) if response.fp is not None else 0  # it may read from the socket
        unread = array("i", [0])
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, unread)
        share = 16384 / 16406 if isinstance(sock, ssl.SSLSocket) else 65536 / 65545
        pending = sock.pending() if isinstance(sock, ssl.SSLSocket) else 0
        return read + buffered + pending + round(unread[0] * share)

    def kernel_bytes(self) -> int:
        """All bytes that came to this client's kernel on the connection (``tcpi_bytes_received``, Linux)."""
        assert self._connection.kernels is not None
        info = self._connection.kernels.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        return int(struct.unpack_from("=Q", info, 128)[0])

    def leave(self) -> None:
        """Hang up; what lies unread makes the kernel reset the connection."""
        self._connection.close()
        if self._response is not None:
            self._response.close()


def _head_length(answers: BinaryIO) -> int:
    length = 0
    try:
        while line := answers.readline():
            length += len(line)
            if line == b"\r\n":
                return length
    except OSError:
        pass  # reset by a server that closed with the second request unread
    return 0


def _has_body(method: str, status: int) -> bool:
    return method != "HEAD" and status not in (204, 304)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int, timeout: float, tls: bool, buffer: int | None) -> None:
        super().__init__(host, port, timeout=timeout)
        self._tls = tls
        self._receive_buffer = buffer
        #: Stays when ``http.client`` lets go of a connection that is to be closed.
        self.kernels: socket.socket | None = None

    def connect(self) -> None:
        plain = socket.socket()
        plain.settimeout(self.timeout)
        if self._receive_buffer is not None:
            # Before the connection is made: the kernel then lets the window grow no further.
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        try:
            plain.connect((self.host, self.port))
        except OSError:
            plain.close()
            raise
        self.sock = self.kernels = _unverified().wrap_socket(plain) if self._tls else plain


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
