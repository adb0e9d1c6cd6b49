"""The client against real sockets: what it sends, and what it makes of every way in which an answer can fail."""

from __future__ import annotations

import base64
import gc
import gzip
import hashlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from t23_middleware.errors import (
    Busy,
    DeliveryError,
    NoAnswer,
    NotAccepted,
    Refused,
    RetryLater,
    Unexplained,
    Unreachable,
)
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay import client as client_module
from t23_middleware.relay.answer import LONGEST_ANSWER, Accepted, judge
from t23_middleware.relay.client import AnalyticsClient
from t23_middleware.relay.report import Report
from t23_middleware.settings import Settings

SESSION = "s3cr3t-Session/42"
REPORT = Report(1_764_000_000_123, "", SESSION, "7190971", 1234, 0, "html5")
URL = "https://video.example.com/api/analytics/report/play"
OK = b'{"status": "ok", "message": "The download was reported", "cached": "0"}'

PROXY_VARIABLES = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
]


def answer(body: bytes = OK, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class RawServer:
    """A server on a socket that does to each request what `manner(connection, number of the request)` says.

    A manner that gives something true keeps the connection; else it is closed.
    """

    def __init__(self, manner: Callable[[socket.socket, int], object], tls: ssl.SSLContext | None = None):
        self.manner = manner
        self.tls = tls
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.closed = threading.Semaphore(0)
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._run(self._accept)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.stopping.set()
        with self._lock:
            sockets = [self._listener, *self._open]
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            self._run(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self.tls.wrap_socket(connection, server_side=True) if self.tls else connection as plain:
                while self._request(plain):
                    pass
        except OSError:
            pass  # the client went away, or would not have our certificate
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)
            self.closed.release()

    def _request(self, connection: socket.socket) -> object:
        with connection.makefile("rb") as stream:
            line = stream.readline().decode("latin-1").strip()
            if not line:
                return False
            headers = {}
            while field := stream.readline().decode("latin-1").strip():
                name, _, value = field.partition(":")
                headers[name.lower()] = value.strip()
            body = stream.read(int(headers.get("content-length", "0")))
        with self._lock:
            self.requests.append((line, headers, body))
            number = len(self.requests)
        return self.manner(connection, number)


def always(data: bytes) -> Callable[[socket.socket, int], object]:
    def manner(connection: socket.socket, number: int) -> object:
        connection.sendall(data)
        return True

    return manner


def once(data: bytes) -> Callable[[socket.socket, int], object]:
    return lambda connection, number: connection.sendall(data)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def drip(connection: socket.socket, data: bytes) -> None:
    for position in range(len(data)):
        connection.sendall(data[position : position + 1])
        time.sleep(0.03)


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    servers: list[RawServer] = []

    def start(manner: Callable[[socket.socket, int], object], **options: Any) -> RawServer:
        servers.append(RawServer(manner, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def client_for() -> Iterator[Callable[..., AnalyticsClient]]:
    clients: list[AnalyticsClient] = []

    def make(api_url: str, timeout: float = 10, **options: Any) -> AnalyticsClient:
        clients.append(AnalyticsClient(Settings(environ={}, api_url=api_url, timeout=timeout, **options)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def error_of(client: AnalyticsClient, report: Report = REPORT) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        client.send(report)
    told = str(caught.value)
    assert SESSION not in told
    assert told.isprintable()
    assert len(told) <= 250
    return caught.value


# What is sent.


def test_report_is_one_form_post(serve: Any, client_for: Any) -> None:
    """A report is one POST of a form with its fields."""
    server = serve(always(answer()))
    got = client_for(server.url).send(REPORT)
    assert got == Accepted(False, "The download was reported", got.seconds)
    assert 0 < got.seconds < 10
    [(line, headers, body)] = server.requests
    assert line == "POST /api/analytics/report/play HTTP/1.1"
    assert headers["content-type"] == "application/x-www-form-urlencoded"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers
    assert "transfer-encoding" not in headers
    assert parse_qs(body.decode(), strict_parsing=True) == {
        "photo_id": ["7190971"],
        "session_id": [SESSION],
        "seesion_id": [SESSION],
        "bytes_total": ["1234"],
        "skip": ["0"],
        "user_player_type": ["html5"],
        "format": ["json"],
        "raw": ["1"],
        "time": ["1764000000123"],
    }


def test_report_uses_configured_path_and_host(serve: Any, client_for: Any) -> None:
    """The report goes to the path and the host that the settings name."""
    server = serve(always(answer()))
    client = client_for(
        f"http://{{host}}:{server.port}", hosts="127.0.0.1", report_path="/api/analytics/report/download"
    )
    client.send(REPORT._replace(host="127.0.0.1"))
    [(line, headers, _)] = server.requests
    assert line.startswith("POST /api/analytics/report/download ")
    assert headers["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("session", "sent"),
    [
        ("plain-1", "plain-1"),
        ("12%2c34%2cabc", "12%2c34%2cabc"),
        ("a=b&c:d", "a=b&c:d"),
        ('a;b,c "d"\\é', "a%3Bb%2Cc%20%22d%22%5C%C3%A9"),
        ("a\r\nX-Evil: 1", "a%0D%0AX-Evil:%201"),
        ("\ud800", "?"),
    ],
)
def test_cookie_escapes_only_invalid_characters(serve: Any, client_for: Any, session: str, sent: str) -> None:
    """The cookie's value is sent raw, except for characters that a cookie may not contain."""
    server = serve(always(answer()))
    client_for(server.url, report_cookie="ad_session_id").send(REPORT._replace(session_id=session))
    [(_, headers, _)] = server.requests
    assert headers["cookie"] == f"ad_session_id={sent}"
    assert "x-evil" not in headers


def test_api_cookies_are_not_returned(serve: Any, client_for: Any) -> None:
    """Cookies that the API sets are not sent back."""
    server = serve(always(answer(OK, "200 OK", "Set-Cookie: uuid=someone; Path=/", "Set-Cookie: ;;==;\x01")))
    client = client_for(server.url)
    client.send(REPORT)
    client.send(REPORT)
    assert ["cookie" in headers for _, headers, _ in server.requests] == [False, False]


def test_each_thread_has_its_connection(serve: Any, client_for: Any) -> None:
    """A thread keeps its connection: eight threads use no more than eight."""
    server = serve(always(answer()))
    client = client_for(server.url)
    with ThreadPoolExecutor(8) as pool:
        assert len([*pool.map(client.send, [REPORT] * 64)]) == 64
    assert len(server.requests) == 64
    assert server.connections <= 8


def test_a_refusal_keeps_the_connection(serve: Any, client_for: Any) -> None:
    """The API judged the report, so what follows is the next answer."""
    server = serve(always(answer(said(status="error", code="no_such_photo"))))
    client = client_for(server.url)
    for _ in range(3):
        assert isinstance(error_of(client), Refused)
    assert server.connections == 1


def test_closed_connection_not_reused(serve: Any, client_for: Any) -> None:
    """A connection that the server has closed in the meantime is not used again."""
    server = serve(once(answer()))
    client = client_for(server.url)
    for _ in range(5):
        client.send(REPORT)
        assert server.closed.acquire(timeout=10)
    assert server.connections == 5


def test_idle_connection_not_reused(serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was idle for too long is not used again."""
    monkeypatch.setattr(client_module, "IDLE_SECONDS", -1.0)
    server = serve(always(answer()))
    client = client_for(server.url)
    client.send(REPORT)
    client.send(REPORT)
    assert server.connections == 2


def test_close_ends_all_connections(serve: Any, client_for: Any) -> None:
    """``close()`` ends the connections of all threads. Later reports open new ones."""
    server = serve(always(answer()))
    client = client_for(server.url)
    sent, done = threading.Event(), threading.Event()

    def other() -> None:
        client.send(REPORT)
        sent.set()
        done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    client.send(REPORT)
    assert sent.wait(10)
    client.close()
    assert server.closed.acquire(timeout=10)
    assert server.closed.acquire(timeout=10)
    done.set()
    thread.join()
    client.send(REPORT)
    assert server.connections == 3


# Not sent.


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), OSError(24, "Too many open files")]
)
def test_what_ran_out_before_sending_is_unreachable(
    error: Exception, serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the report has left, so it must not count as one that may have arrived."""
    server = serve(always(answer()))

    def fails(*arguments: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", fails)
        assert isinstance(error_of(client_for(server.url)), Unreachable)
    assert server.requests == []


def test_a_refused_connection_is_unreachable(client_for: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = error_of(client_for(f"http://127.0.0.1:{port}"))
    assert isinstance(error, Unreachable)
    assert f"http://127.0.0.1:{port}/api/analytics/report/play can't be reached" in str(error)
    assert "refused" in str(error)


def test_a_name_without_address_is_unreachable(client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = error_of(client_for("http://video.invalid"))
    assert isinstance(error, Unreachable)
    assert "Name or service not known" in str(error)


def test_server_without_accept_is_unreachable(client_for: Any) -> None:
    """A server that does not accept the connection is unreachable."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:  # they fill the queue, so that the next connection gets no answer
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        error = error_of(client_for(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3))
        for sock in waiting:
            sock.close()
    assert isinstance(error, Unreachable)
    assert "timed out" in str(error)


def test_slow_connect_is_unreachable(serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report whose time was over before it was sent fails as unreachable."""
    server = serve(always(answer()))
    connect = socket.socket.connect

    def slow(sock: socket.socket, address: Any) -> None:
        time.sleep(0.4)
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", slow)
    assert isinstance(error_of(client_for(server.url, timeout=0.3)), Unreachable)
    assert server.requests == [] or server.requests[0][2] == b""


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "[::1", "a b", ""])
def test_a_host_that_is_none_is_unreachable(client_for: Any, host: str) -> None:
    client = client_for("http://{host}", hosts="video.example.com")
    assert isinstance(error_of(client, REPORT._replace(host=host)), Unreachable)


# Sent, and no answer.


def test_an_api_that_hangs_gives_no_answer(serve: Any, client_for: Any) -> None:
    server = serve(lambda connection, number: server.stopping.wait(30))
    error = error_of(client_for(server.url, timeout=0.3))
    assert isinstance(error, NoAnswer)
    assert "timed out" in str(error)
    assert len(server.requests) == 1


def test_reset_gives_no_answer(serve: Any, client_for: Any) -> None:
    """A reset of the connection after the report gives no answer."""
    server = serve(lambda connection, number: reset(connection))
    assert isinstance(error_of(client_for(server.url)), NoAnswer)
    assert len(server.requests) == 1


def test_closed_connection_gives_no_answer(serve: Any, client_for: Any) -> None:
    """A connection that the server closes without an answer gives no answer, and nothing is sent again."""
    server = serve(lambda connection, number: None)
    error = error_of(client_for(server.url))
    assert isinstance(error, NoAnswer)
    assert "closed" in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "cut",
    [
        answer()[:5],
        answer()[:30],
        answer()[:36],
        answer()[: -len(OK) - 2],
        answer()[:-1],
        answer()[: -len(OK)],
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(OK), OK),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b" % (len(OK), OK[:9]),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_cut_answer_gives_no_answer(serve: Any, client_for: Any, cut: bytes) -> None:
    """An answer that is cut off gives no answer, wherever the cut is."""
    server = serve(once(cut))
    assert isinstance(error_of(client_for(server.url)), NoAnswer)
    assert len(server.requests) == 1


@pytest.mark.parametrize("cut", [answer()[:-1], b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + OK])
def test_cut_ok_gives_no_answer(serve: Any, client_for: Any, cut: bytes) -> None:
    """Even an ``ok`` gives no answer if the rest of the body is missing, and the error names the cut."""
    error = error_of(client_for(serve(once(cut)).url))
    assert isinstance(error, NoAnswer)
    assert "cut off" in str(error)


@pytest.mark.parametrize("garbage", [b"\x00\xff\r\n\r\n", b"HTTP/1.1 banana\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_gives_no_answer(serve: Any, client_for: Any, garbage: bytes) -> None:
    assert isinstance(error_of(client_for(serve(once(garbage)).url)), NoAnswer)


@pytest.mark.parametrize("header", ["X: " + "y" * 70_000, "\r\n".join(["X: y"] * 300)])
def test_oversized_headers_give_no_answer(serve: Any, client_for: Any, header: str) -> None:
    """Headers that no server sends, too long or too many, give no answer."""
    server = serve(once(f"HTTP/1.1 200 OK\r\n{header}\r\n\r\n".encode() + OK))
    assert isinstance(error_of(client_for(server.url)), NoAnswer)


def test_an_answer_of_two_lengths_is_none(serve: Any, client_for: Any) -> None:
    server = serve(once(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n" + OK))
    assert isinstance(error_of(client_for(server.url)), NoAnswer)
    with warnings.catch_warnings():  # urllib3 leaves this one's socket to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"HTTP/1.1 200 OK\r\n"]
)
def test_slow_answer_ends_at_deadline(serve: Any, client_for: Any, start: bytes) -> None:
    """An answer that comes byte by byte ends at the deadline."""

    def manner(connection: socket.socket, number: int) -> None:
        connection.sendall(start)
        drip(connection, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 480)  # 15 s, each byte within the timeout

    began = time.monotonic()
    error = error_of(client_for(serve(manner).url, timeout=0.3))
    assert isinstance(error, NoAnswer)
    assert time.monotonic() - began < 10


def test_endless_answer_closes_connection(serve: Any, client_for: Any) -> None:
    """An endless answer is not read to its end, and its connection is closed."""

    def manner(connection: socket.socket, number: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
        for _ in range(10_000):
            connection.sendall(b" " * 100_000)

    server = serve(manner)
    assert isinstance(error_of(client_for(server.url)), NoAnswer)
    assert server.closed.acquire(timeout=10)


def test_longest_answer_is_read(serve: Any, client_for: Any) -> None:
    """An answer of the maximum length is read; one that is a byte longer is not."""
    room = LONGEST_ANSWER - len(OK)
    assert client_for(serve(always(answer(OK + b" " * room))).url).send(REPORT).message
    assert isinstance(error_of(client_for(serve(always(answer(OK + b" " * (room + 1)))).url)), NoAnswer)


def test_chunked_and_unframed_answers_read(serve: Any, client_for: Any) -> None:
    """A chunked answer and one that ends with its connection are read."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server = serve(always(chunked + b"4\r\n" + OK[:4] + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(OK) - 4, OK[4:])))
    client = client_for(server.url)
    assert client.send(REPORT).message == client.send(REPORT).message == "The download was reported"
    assert server.connections == 1
    assert client_for(serve(once(b"HTTP/1.0 200 OK\r\n\r\n" + OK)).url).send(REPORT).message


# Redirects.


def test_redirect_names_remedy(serve: Any, client_for: Any) -> None:
    """A redirect is not followed. The error names its target and the remedy, without password and session."""
    other = serve(always(answer()))
    target = f"http://user:pw@127.0.0.1:{other.port}/api/analytics/report/play?session_id={SESSION}#x"
    server = serve(always(answer(b"moved", "307 Temporary Redirect", f"Location: {target}")))
    error = error_of(client_for(server.url))
    assert isinstance(error, NotAccepted)
    assert other.requests == []
    assert f"set T23_API_URL to http://127.0.0.1:{other.port}" in str(error)
    assert "pw" not in str(error)
    assert "session_id=" not in str(error)


def test_endless_redirect_body(serve: Any, client_for: Any) -> None:
    """The body of a redirect is not read without end, and its connection is closed."""

    def manner(connection: socket.socket, number: int) -> None:
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 10000000000\r\n\r\n")
        for _ in range(10_000):
            connection.sendall(b" " * 100_000)

    server = serve(manner)
    assert isinstance(error_of(client_for(server.url)), NotAccepted)
    assert server.closed.acquire(timeout=10)


@pytest.mark.parametrize("location", ["http://[::1", "//", "\x01", "http://\xff/", "http://a:b:c/"])
def test_invalid_redirect_target(serve: Any, client_for: Any, location: str) -> None:
    """A redirect to an invalid target is reported as not accepted, without another error."""
    server = serve(always(answer(b"", "301 Moved", f"Location: {location}")))
    assert isinstance(error_of(client_for(server.url)), NotAccepted)


# Proxies.


def test_a_proxy_of_the_environment_is_used(
    serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(always(answer()))
    monkeypatch.setenv("http_proxy", f"http://user:pw@127.0.0.1:{proxy.port}")
    client = client_for("http://video.invalid")
    client.send(REPORT)
    client.send(REPORT)
    assert proxy.connections == 1
    line, headers, _ = proxy.requests[0]
    assert line == "POST http://video.invalid/api/analytics/report/play HTTP/1.1"
    assert headers["proxy-authorization"].startswith("Basic ")


@pytest.mark.parametrize("excepted", ["127.0.0.1", "127.0.0.0/8", "*"])
def test_no_proxy_keeps_the_proxy_out(
    serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    server, proxy = serve(always(answer())), serve(always(answer()))
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", excepted)
    client_for(server.url).send(REPORT)
    assert len(server.requests) == 1
    assert proxy.requests == []


def test_refusing_proxy_sends_nothing(serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that refuses the tunnel is an error that means that nothing was sent, and shows no password."""
    proxy = serve(once(b"HTTP/1.1 403 Forbidden\r\n\r\n"))
    monkeypatch.setenv("https_proxy", f"http://user:pw@127.0.0.1:{proxy.port}")
    error = error_of(client_for("https://video.invalid"))
    assert isinstance(error, Unreachable)
    assert "proxy" in str(error)
    assert "403" in str(error)
    assert "pw" not in str(error)
    assert proxy.requests[0][0].startswith("CONNECT video.invalid:443 ")


def test_slow_proxy_sends_nothing(serve: Any, client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that answers CONNECT byte by byte is an error that means that nothing was sent, at the deadline."""
    proxy = serve(lambda connection, number: drip(connection, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 480))
    monkeypatch.setenv("https_proxy", proxy.url)
    began = time.monotonic()
    assert isinstance(error_of(client_for("https://video.invalid", timeout=0.3)), Unreachable)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("proxy", ["http://user:pw@", "http://user:pw@[::1", "http://u:pw@127.0.0.1:1"])
def test_failing_proxy_hides_password(client_for: Any, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """A proxy that fails is reported without its password."""
    monkeypatch.setenv("http_proxy", proxy)
    error = error_of(client_for("http://video.invalid"))
    assert isinstance(error, Unreachable)
    assert "pw" not in "".join(traceback.format_exception(error))
    assert "proxy" in str(error)


def test_failing_socks_proxy_sends_nothing(client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy that fails, or whose library is missing, is an error that means that nothing was sent."""
    monkeypatch.setenv("all_proxy", "socks5://user:pw@127.0.0.1:1")
    error = error_of(client_for("http://video.invalid"))
    assert isinstance(error, Unreachable)
    assert "pw" not in str(error)


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one file."""
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    path = folder / "both.pem"
    path.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_an_untrusted_certificate_is_not_sent_anything(
    serve: Any, client_for: Any, tls: ssl.SSLContext
) -> None:
    server = serve(always(answer()), tls=tls)
    error = error_of(client_for(server.url))
    assert isinstance(error, Unreachable)
    assert "certificate is not trusted" in str(error)
    assert "REQUESTS_CA_BUNDLE" in str(error)
    assert server.requests == []


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_environment_ca_file_is_trusted(
    serve: Any,
    client_for: Any,
    tls: ssl.SSLContext,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    """A certificate authority that the environment names is trusted."""
    monkeypatch.setenv(variable, str(certificate.with_name("cert.pem")))
    server = serve(always(answer()), tls=tls)
    client = client_for(server.url)
    assert client.send(REPORT).message == client.send(REPORT).message == "The download was reported"
    assert server.connections == 1


def test_certificate_for_another_host(
    serve: Any,
    client_for: Any,
    tls: ssl.SSLContext,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A certificate for another host is not trusted, also if its authority is trusted."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.with_name("cert.pem")))
    server = serve(always(answer()), tls=tls)
    error = error_of(client_for(f"https://localhost:{server.port}"))
    assert isinstance(error, Unreachable)
    assert "certificate is not trusted" in str(error)
    assert "REQUESTS_CA_BUNDLE" not in str(error)


def test_slow_tls_answer_ends_at_deadline(
    serve: Any,
    client_for: Any,
    tls: ssl.SSLContext,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that comes byte by byte over TLS ends at the deadline."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.with_name("cert.pem")))
    server = serve(lambda connection, number: drip(connection, b"HTTP/1.1 200 OK\r\n" + b"y" * 480), tls=tls)
    began = time.monotonic()
    assert isinstance(error_of(client_for(server.url, timeout=0.5)), RetryLater)
    assert time.monotonic() - began < 10


def test_missing_ca_file_is_named(client_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of certificate authorities that does not exist is named in the error."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/authorities.pem")
    error = error_of(client_for("https://127.0.0.1:1"))
    assert isinstance(error, Unreachable)
    assert "/nowhere/authorities.pem" in str(error)


def test_hanging_tls_handshake_sends_nothing(client_for: Any) -> None:
    """A TLS handshake that hangs is an error that means that nothing was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        error = error_of(client_for(f"https://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3))
    assert isinstance(error, Unreachable)
    assert "timed out" in str(error)


def test_a_site_without_tls_is_told_so(client_for: Any) -> None:
    def plain() -> None:
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError):
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=plain, daemon=True)
        thread.start()
        error = error_of(client_for(f"https://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join(10)
    assert isinstance(error, Unreachable)
    assert "no TLS" in str(error)


# With the stand-in, which answers as the documentation says.


def test_stand_in_detects_repeated_report(api: StandInServer, client_for: Any) -> None:
    """The stand-in API records a report and detects that it is sent again."""
    client = client_for(api.url)
    assert client.send(REPORT).cached is False
    assert client.send(REPORT).cached is True
    assert client.send(REPORT._replace(time_ms=REPORT.time_ms + 1)).cached is False
    assert [row["bytes_total"] for row in api.recorded()] == ["1234", "1234"]


@pytest.mark.parametrize(
    ("kind", "options", "kind_of_error"),
    [
        ("refuse", {}, NoAnswer),
        ("hang", {}, NoAnswer),
        ("cut", {}, NoAnswer),
        ("slow", {"seconds": 0.1}, NoAnswer),
        ("huge", {"size": 100_000}, NoAnswer),
        ("html", {}, NoAnswer),
        ("status", {"status": 503}, Busy),
        ("status", {"status": 302, "location": "/elsewhere"}, NotAccepted),
        ("status", {"status": 404}, NotAccepted),
        ("status", {"status": 413}, Refused),
        ("deny", {}, NotAccepted),
        ("error", {"code": "no_such_photo", "message": "gone"}, Refused),
        ("error", {"code": "on_strike", "message": "why not"}, Unexplained),
    ],
)
def test_stand_in_faults_give_errors(
    api: StandInServer,
    client_for: Any,
    kind: str,
    options: dict[str, Any],
    kind_of_error: type[DeliveryError],
) -> None:
    """Each fault of the stand-in API gives its kind of error, and after the fault reports are accepted."""
    client = client_for(api.url, timeout=0.5)
    api.fault(kind, **options)
    assert type(error_of(client)) is kind_of_error
    api.heal()
    assert AnalyticsClient.send(client_for(api.url), REPORT).message


def test_stand_in_retry_after(api: StandInServer, client_for: Any) -> None:
    """The Retry-After of the stand-in API is passed on with the error."""
    api.fault("status", status=503, retry_after="7")
    error = error_of(client_for(api.url))
    assert isinstance(error, Busy)
    assert error.retry_after == 7.0


# What an answer means.


def said(**values: object) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("body", "cached"),
    [
        (
            b'<response status="ok" permission_level="anonymous" message="The download was reported" cached="0"/>',
            False,
        ),
        (
            b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\n<response status="ok" cached="1"></response>',
            True,
        ),
        (b'<response status="ok"><report/><site a="b">text</site></response>\n', False),
        (OK, False),
        (b"\xef\xbb\xbf \r\n" + OK + b"\n", False),
        (b'var visual = {"status": "ok", "cached": 1};', True),
        (b'jQuery123_4.cb({"status":"ok","cached":true});', True),
        (b'/* */ f({"status": "ok", "cached": "true"})', True),
        (said(status="ok", cached=0), False),
        (said(status="ok", cached=False), False),
        (said(status="ok", cached=None, report={}, site={"a": {"b": "}"}}), False),
        (said(status="ok", code="invalid_input"), False),
        (b'<response xmlns="http://www.23video.com/ns" status="ok" cached="1"/>', True),
        (b'<v:response xmlns:v="urn:v" v:status="ok" v:cached="1"></v:response>', True),
        ("\ufeff" + '{"status": "ok", "cached": "1"}', True),
        (b"<br />\n<b>Notice</b>: no {index} in <b>/a.php</b> on line <b>3</b><br />\n" + OK, False),
        (b")]}',\n" + OK + b"\n<!-- page served in 0.02 s by {cache} -->", False),
        (b'{"notice": "slow"}\n{"status": "ok", "cached": 1}', True),
        (b"<!-- cached copy -->" + OK, False),
    ],
)
@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_answers_are_understood_in_every_form(body: bytes | str, cached: bool, charset: str) -> None:
    """Namespaces, byte order marks and text around the JSON change nothing, in any of Unicode's encodings."""
    text = body if isinstance(body, str) else body.decode("utf-8")
    assert judge(200, {}, text.encode(charset)).cached is cached


def deflated(data: bytes, window: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, window)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(OK, mtime=0)),
        ("X-GZip", gzip.compress(OK, mtime=0)),
        ("", gzip.compress(OK, mtime=0)),
        ("gzip", OK),
        ("deflate", deflated(OK, zlib.MAX_WBITS)),
        ("deflate", deflated(OK, -zlib.MAX_WBITS)),
        ("deflate", OK),
        ("deflate, gzip", gzip.compress(deflated(OK, zlib.MAX_WBITS), mtime=0)),
        ("gzip, gzip", gzip.compress(gzip.compress(OK), mtime=0)),
        ("gzip", gzip.compress(OK[:20], mtime=0) + gzip.compress(OK[20:], mtime=0)),
        ("gzip", gzip.compress(OK.decode().encode("utf-16"), mtime=0)),
        ("gzip", gzip.compress(OK, mtime=0) + b"\r\n"),
        ("gzip", gzip.compress(OK, mtime=0) + bytes(512)),
        ("deflate", deflated(OK, zlib.MAX_WBITS) + b"\n"),
    ],
)
def test_packed_answers_are_understood(encoding: str, body: bytes, serve: Any, client_for: Any) -> None:
    """Some caches compress though identity is asked for, some say so wrongly."""
    headers = [f"Content-Encoding: {encoding}"] if encoding else []
    server = serve(always(answer(body, "200 OK", *headers)))
    client = client_for(server.url)
    assert [client.send(REPORT).message for _ in range(2)] == ["The download was reported"] * 2
    assert server.connections == 1


@pytest.mark.parametrize(
    "pack", [gzip.compress, zlib.compress, lambda data: gzip.compress(gzip.compress(data), mtime=0)]
)
def test_packed_answers_stay_bounded(pack: Callable[[bytes], bytes]) -> None:
    """What unpacks to more than an answer may have is none, and is not unpacked to its end."""
    body = pack(b" " * (60 << 20) + OK)
    tracemalloc.start()
    try:
        with pytest.raises(NoAnswer) as caught:
            judge(200, {"Content-Encoding": "deflate, gzip"}, body[:LONGEST_ANSWER], URL)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.answered


@pytest.mark.parametrize("part", [b"<!--", b"<!-- -", b"-->", b"<!--{", b"<!-->"])
def test_comments_cost_no_time(part: bytes) -> None:
    """An answer that is full of comments, closed or not, is judged in the time of one look at it."""
    body = part * (LONGEST_ANSWER // len(part))
    began = time.process_time()
    with pytest.raises(NoAnswer):
        judge(200, {}, body, URL)
    assert time.process_time() - began < 1  # CPU time: a regular expression took 7 s


@pytest.mark.parametrize(
    ("text", "understood"),
    [
        (b"<!-- a --> %b <!-- b -->", True),
        (b"<!-- a <!-- b --> %b", True),
        (b"--> %b", True),
        (b"%b <!-- open", False),
        (b"<!-- %b -->", False),
    ],
)
def test_comments_are_left_out(text: bytes, understood: bool) -> None:
    """Only an answer outside of comments counts; a comment that never ends is a page."""
    if understood:
        assert judge(200, {}, text % OK, URL).message
    else:
        with pytest.raises(NoAnswer):
            judge(200, {}, text % OK, URL)


def test_unknown_packing_is_named() -> None:
    """An operator can only correct what he reads about."""
    with pytest.raises(NoAnswer, match="Content-Encoding"):
        judge(200, {"Content-Encoding": "br"}, b"\x0b\x02\x80x\x03", URL)


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 199 X\r\n\r\n",
    ],
)
@pytest.mark.parametrize("pause", [0, 0.1])
def test_each_report_gets_its_answer(first: bytes, pause: float, serve: Any, client_for: Any) -> None:
    """Interim answers of any number come before the answer, at once or some time before it."""

    def manner(connection: socket.socket, number: int) -> bool:
        connection.sendall(first)
        time.sleep(pause)
        connection.sendall(answer(OK if number % 2 else said(status="error", code="no_such_photo")))
        return True

    server = serve(manner)
    client = client_for(server.url)
    for _ in range(2):
        assert client.send(REPORT).message
        assert isinstance(error_of(client), Refused)
    assert server.connections == 1


def test_endless_interim_answers_time_out(serve: Any, client_for: Any) -> None:
    """The time that an answer may take has them in it."""

    def manner(connection: socket.socket, number: int) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    started = time.monotonic()
    assert isinstance(error_of(client_for(serve(manner).url, timeout=0.5)), NoAnswer)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "strange",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        answer(b""),
        answer(b"<html>please log in</html>"),
        answer(b"busy", "503 Service Unavailable"),
        answer(b"", "302 Found", "Location: /login"),
        answer(OK) + answer(OK)[:40],
    ],
)
def test_strange_answers_end_the_connection(strange: bytes, serve: Any, client_for: Any) -> None:
    """What follows them on the same connection must not be taken for the next report's answer."""

    def manner(connection: socket.socket, number: int) -> bool:
        connection.sendall(strange if number == 1 else answer(said(status="error", code="no_such_photo")))
        return True

    server = serve(manner)
    client = client_for(server.url)
    with suppress(DeliveryError):
        client.send(REPORT)
    assert isinstance(error_of(client), Refused)
    assert server.connections == 2


@pytest.mark.parametrize(
    ("body", "cached"),
    [
        (OK, False),
        (said(status="ok", cached=1), True),
    ],
)
@pytest.mark.parametrize("status", [200, 404, 500, 503, 302])
def test_ok_accepted_with_any_status(body: bytes, cached: bool, status: int) -> None:
    """``ok`` is success in every form and with every HTTP status."""
    assert judge(status, {}, body).cached is cached


def xml(code: str, message: str = "Words") -> bytes:
    return f'<response status="error" code="{code}" message="{message}"><a/></response>'.encode()


@pytest.mark.parametrize("code", ["permission_denied", "invalid_signature", "invalid_method"])
@pytest.mark.parametrize("status", [200, 400, 404, 500])
def test_permission_errors_are_not_accepted(code: str, status: int) -> None:
    """An error that every report would get is ``NotAccepted``, and names its code, the URL and the remedy."""
    for body in (said(status="error", code=code, message="Words"), xml(code)):
        with pytest.raises(NotAccepted) as caught:
            judge(status, {}, body, URL)
        assert code in str(caught.value)
        assert "Words" in str(caught.value)
        assert URL in str(caught.value)
        assert "whitelist" in str(caught.value) or "T23_REPORT_PATH" in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        *[
            "no_such_photo",
            "no_such_album",
            "no_such_tag",
            "no_such_user",
            "no_file",
            "invalid_input",
            "invalid_album",
        ],
        *["invalid_album_token", "invalid_photo_token", "token_required", "couldnt_create_album"],
        *["couldnt_create_user", "couldnt_update_album", "error_processing_upload", "user_already_exists"],
        *["invalid_type", "no_such_object"],
    ],
)
@pytest.mark.parametrize("status", [200, 302, 401, 404, 500])
def test_documented_code_refuses_report(code: str, status: int) -> None:
    """A documented error code refuses the report, whatever the HTTP status."""
    for body in (said(status="error", code=code, message="Words"), xml(code)):
        with pytest.raises(Refused) as caught:
            judge(status, {}, body, URL)
        assert type(caught.value) is Refused
        assert caught.value.code == code
        assert str(caught.value) == f"{code}: Words"


@pytest.mark.parametrize("status", [429, 503])
def test_not_now_beats_every_code_but_ok(status: int) -> None:
    for code in ("no_such_photo", "permission_denied", "on_strike"):
        with pytest.raises(Busy) as caught:
            judge(status, {"Retry-After": "12"}, said(status="error", code=code))
        assert caught.value.retry_after == 12.0


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, said(status="error", code="on_strike", message="m"), "on_strike"),
        (200, xml("on_strike"), "on_strike"),
        (200, said(status="error"), "http_200"),
        (406, said(status="error", code="too_many_speakers"), "too_many_speakers"),
        (418, b"teapot", "http_418"),
        (422, b"", "http_422"),
    ],
)
def test_what_nobody_documents_is_unexplained(status: int, body: bytes, code: str) -> None:
    with pytest.raises(Unexplained) as caught:
        judge(status, {}, body, URL)
    assert caught.value.code == code


BY_STATUS: list[tuple[int, type[DeliveryError]]] = [
    *[(status, NotAccepted) for status in (300, 301, 302, 303, 304, 307, 308, 401, 403, 404, 405, 407, 410)],
    *[(status, Refused) for status in (400, 413)],
    *[(status, NoAnswer) for status in (200, 201, 204)],
    *[(status, Busy) for status in (408, 425, 429, 500, 502, 503, 504, 599)],
]
NOT_THE_API = [b"", b"<html><body>Hello</body></html>"]
UNKNOWN_CODE = said(status="error", code="on_strike")


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [(status, kind, body) for status, kind in BY_STATUS for body in NOT_THE_API]
    + [(status, kind, UNKNOWN_CODE) for status, kind in BY_STATUS if status >= 300],
)
def test_status_decides_without_api_answer(status: int, kind: type[DeliveryError], body: bytes) -> None:
    """The HTTP status decides if the body is not an answer of the API or has an unknown code."""
    with pytest.raises(DeliveryError) as caught:
        judge(status, {"Location": "/login"}, body, URL)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n",
        b"\x00\xff\xfe",
        b"<!doctype html><html><head></head></html>",
        b"<html status='ok'></html>",
        b"<response status='ok'",
        b"<response status='ok'/><response/>",
        b'<!DOCTYPE r [<!ENTITY a "ok">]><response status="&a;"/>',
        b'<?xml version="1.0"?><!DOCTYPE r SYSTEM "file:///etc/passwd"><response status="ok"/>',
        b'<response status="&a;"/>',
        b"<a>" * 20_000,
        b"[" * 60_000,
        b'{"a":' * 12_000 + b"1" + b"}" * 12_000,
        b'{"status": "ok"',
        b'["ok"]',
        b'"ok"',
        b"null",
        b'{"status": 1' + b"0" * 60_000 + b"}",
        said(status=["ok"]),
        said(status={"ok": "ok"}),
        said(status="UP"),
        said(result="ok"),
        b'<a href="x">{"status": "ok"}',
        b'<!-- {"status": "ok"} --> nothing',
        b'<!-- {"status": "ok"}',
        b'<script>var config = {"status": "ok"}</script>',
        b'{"status": "ok"} {"status": "error", "code": "invalid_input"}',
        b'{"result": {"status": "ok"}}',
        b'Notice: {"log": [{"status": "ok"}, ',
        b"\x1f\x8b" + OK,
        gzip.compress(OK, mtime=0)[:-9],
        b'{"status": "ok"} <script>',
        b" " * LONGEST_ANSWER + OK,
        b"/* */" + b" " * 65_000 + b"x",
        b"a" * 65_000 + b"(",
    ],
)
def test_invalid_body_gives_no_answer(body: bytes) -> None:
    """A body that the API would not send with status 200 gives no answer."""
    with pytest.raises(NoAnswer) as caught:
        judge(200, {}, body, URL)
    assert URL in str(caught.value)


def test_xml_entities_never_expanded() -> None:
    """The XML entities of a "billion laughs" document are never expanded."""
    entities = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    body = f'<!DOCTYPE r [<!ENTITY l0 "lol">{entities}]><response status="ok" message="&l9;"/>'
    with pytest.raises(NoAnswer):
        judge(200, {}, body.encode())


NOW = "Tue, 24 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("999999", 3600.0),
        ("9" * 300, 3600.0),
        ("9" * 5000, None),
        ("Tue, 24 Nov 2026 12:00:30 GMT", 30.0),
        ("Tue, 24 Nov 2026 11:00:00 GMT", 0.0),
        ("Tue, 24 Nov 2099 12:00:30 GMT", 3600.0),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("١٢", None),
        ("soon", None),
        ("Tue, 24 Nov 99999999999999999999 12:00:30 GMT", None),
        ("Tue, 24 Nov 2026 12:00:30 +99999999999999999999", None),
    ],
)
def test_retry_after_seconds_or_date(text: str, seconds: float | None) -> None:
    """Retry-After is a number of seconds, or a date that is compared with the server's own clock."""
    with pytest.raises(Busy) as caught:
        judge(503, {"Retry-After": text, "Date": NOW}, b"")
    assert caught.value.retry_after == seconds


def test_retry_after_without_date_header() -> None:
    """Retry-After as a date also works if the answer has no ``Date`` header."""
    with pytest.raises(Busy) as caught:
        judge(429, {"Retry-After": "Tue, 24 Nov 2099 12:00:30 GMT"}, b"")
    assert caught.value.retry_after == 3600.0


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (
            "https://video.example.net/api/analytics/report/play",
            "set T23_API_URL to https://video.example.net.",
        ),
        ("/v2/report", "set T23_API_URL to https://video.example.com and T23_REPORT_PATH to /v2/report."),
        ("//u:p@other.example:8443/x?token=1#y", "Redirected to https://other.example:8443/x;"),
        ("", "redirects nowhere"),
        ("http://[", "redirects nowhere"),
    ],
)
def test_a_redirect_says_what_to_set(location: str, told: str) -> None:
    with pytest.raises(NotAccepted) as caught:
        judge(308, {"Location": location}, b"", URL)
    assert told in str(caught.value)


def test_messages_are_short_and_private() -> None:
    """Messages contain neither the session nor line breaks, and have at most about 200 characters."""
    words = f"No {SESSION} here,\r\n\x1b[31m nor {SESSION.upper()} nor s3cr3t-Session%2F42 " + "x" * 500
    for body in (
        said(status="ok", message=words),
        said(status="error", code="invalid_input", message=words),
        said(status="error", code="permission_denied", message=words),
        said(status="error", code=f"invalid_{SESSION}", message=words),
    ):
        try:
            told = judge(200, {}, body, URL, SESSION).message
        except DeliveryError as error:
            told = str(error)
        assert "s3cr3t" not in told.lower()
        assert told.isprintable()
        assert len(told) <= 220


def test_session_across_message_cut() -> None:
    """A session that crosses the cut of a long message leaves no part of itself."""
    with pytest.raises(Refused) as caught:
        judge(200, {}, said(status="error", code="invalid_input", message="x" * 190 + SESSION), URL, SESSION)
    assert "s3cr" not in str(caught.value)


def test_session_in_redirect_is_hidden() -> None:
    """A session in the target of a redirect is not shown."""
    with pytest.raises(NotAccepted) as caught:
        judge(302, {"Location": f"/s/{SESSION}/x"}, b"", URL, SESSION)
    assert "s3cr" not in str(caught.value)


def escapes(session: str) -> dict[str, str]:
    """Forms in which an API may repeat a session."""
    raw = session.encode()
    percent = "".join(f"%{byte:02X}" for byte in raw)
    return {
        "plain": session,
        "upper": session.upper(),
        "cut": session[:-3],
        "cut in front": session[5:],
        "spaced": " ".join(session),
        "quoted": quote(session, ""),
        "percent": percent,
        "twice": quote(percent),
        "thrice": quote(quote(percent)),
        "backslashes": "".join(f"\\u{ord(char):04x}" for char in session),
        "octal": "".join(f"\\{byte:03o}" for byte in raw),
        "entities": "".join(f"&#{byte};" for byte in raw),
        "hex": raw.hex(),
        "hex upper": raw.hex().upper(),
        "base64": base64.b64encode(raw).decode(),
        "base64 cut": base64.b64encode(raw).decode()[3:-5],
        "base64 url": base64.urlsafe_b64encode(b"=" + raw).decode().rstrip("="),
        "base64 twice": base64.b64encode(base64.b64encode(raw)).decode(),
        "base32": base64.b32encode(raw).decode(),
        "punycode": f"xn--{session.encode('punycode').decode()}",
        "wide": "".join(chr(ord(char) + 0xFEE0) for char in session),
        "hashed": hashlib.sha256(raw).hexdigest(),
    }


OTHER_SESSIONS = [
    "s3cr3t-Session/42",
    "4711081542",
    "abcdefghijklmnop",
    "550e8400-e29b-41d4-a716-446655440000",
]


@pytest.mark.parametrize("session", OTHER_SESSIONS)
@pytest.mark.parametrize("form", escapes("x" * 20))
@pytest.mark.parametrize("place", ["message", "code", "both", "location"])
def test_no_form_of_a_session_is_told(session: str, form: str, place: str) -> None:
    """Of a code, a message and a redirect the words stay, but no form of a session of eight characters and more."""
    repeated = escapes(session)[form]
    headers, values = {}, {"status": "error", "code": "strange_code", "message": "The session is unknown"}
    if place == "location":
        headers["Location"] = f"/login/{repeated}"
    else:
        for name in ("message", "code") if place == "both" else (place,):
            values[name] = f"no_such_{repeated}" if name == "code" else f"The session {repeated} is unknown."
    with pytest.raises(DeliveryError) as caught:
        judge(302 if headers else 200, headers, b"" if headers else said(**values), URL, session)
    told = f"{caught.value} {getattr(caught.value, 'code', '')}".casefold()
    assert repeated.casefold() not in told
    long_runs = (repeated[at : at + 8].casefold() for at in range(len(repeated) - 7))
    assert not [run for run in long_runs if run in told and run not in "no_such_ the session is unknown"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The download was reported", "The download was reported"),
        ("There is no video with this photo_id", "There is no video with this photo_id"),
        ("Method /api/analytics/report/play doesn't exist (HTTP 404), see v1.2", None),
        ("Database error: timed out after 30 s.", None),
        ("Unknown session dGhpcyBpcyBpdA== here", "Unknown session … here"),
    ],
)
def test_plain_words_of_the_api_stay(text: str, told: str | None) -> None:
    """Operators read what the API says, as far as it is in words."""
    assert judge(200, {}, said(status="ok", message=text), URL, "4711081542").message == (told or text)


def test_strange_headers_are_not_logged(
    serve: Any, client_for: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """urllib3 quotes headers that it can't read, in which the session may be repeated."""
    server = serve(always(answer(OK, "200 OK", "Fine: yes", f"bad header {SESSION}", "After: this")))
    with suppress(DeliveryError):
        client_for(server.url).send(REPORT)
    assert "s3cr3t" not in caplog.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
words = st.text() | st.just(SESSION) | st.text().map(lambda text: f"{text}{SESSION}{text}")
answers = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["ok", "error", "OK"]) | json_values,
        "code": st.sampled_from(["invalid_input", "permission_denied", "x"]) | words | json_values,
        "message": words | json_values,
        "cached": st.sampled_from(["0", "1", 0, 1, True, False]) | json_values,
    },
)
bodies = st.one_of(
    st.binary(),
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    answers.map(lambda values: json.dumps(values).encode()),
    answers.map(lambda values: f"var visual = {json.dumps(values)};".encode()),
    st.tuples(st.sampled_from(["ok", "error"]), st.text()).map(
        lambda pair: f'<response status="{pair[0]}" message="{pair[1]}"/>'.encode("utf-8", "surrogatepass")
    ),
)
header_values = (
    st.text() | st.integers().map(str) | st.dates().map(lambda day: f"{day:%a, %d %b %Y} 00:00:00 GMT")
)
headers_of = st.dictionaries(st.sampled_from(["Retry-After", "Location", "Date"]), header_values)


@given(status=st.integers(100, 999), headers=headers_of, body=bodies)
@hypothesis_settings(deadline=None, max_examples=500)
def test_any_answer_is_judged(status: int, headers: dict[str, str], body: bytes) -> None:
    """Any status, headers and body give an accepted report or a ``DeliveryError``."""
    try:
        told = judge(status, headers, body, URL, SESSION).message
    except DeliveryError as error:
        told = str(error)
        if isinstance(error, RetryLater) and error.retry_after is not None:
            assert 0 <= error.retry_after <= 3600
        if isinstance(error, Refused):
            assert error.code
            assert error.code.isprintable()
    assert told.isprintable()
    assert len(told) <= 270
    assert "s3cr3t" not in told


@given(session=st.text(st.characters(codec="utf-8"), min_size=4), text=st.text())
@hypothesis_settings(deadline=None)
def test_no_session_survives_in_a_message(session: str, text: str) -> None:
    if session.strip() in "…":
        return
    message = judge(200, {}, said(status="ok", message=text + session + text), URL, session).message
    assert session not in message
