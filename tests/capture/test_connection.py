"""Where servers keep a response's socket, and what comes of asking the kernel about it."""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from t23_middleware.capture.connection import has_own_connection, link_of
from t23_middleware.tcp_info import SIZE, read_tcp_info

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is read on Linux only")


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, the server's first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
    with server, client:
        yield server, client


class Gateway:
    """What stands behind a server's ``start_response``."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def start_response(self, *_: Any) -> None: ...


def plain(*_: Any) -> None: ...


def ways(server: socket.socket) -> dict[str, tuple[dict[str, Any], Any]]:
    """Environ and ``start_response`` of each server whose socket is found."""
    raw = SimpleNamespace(_sock=server)
    connection = SimpleNamespace(conn=SimpleNamespace(socket=server))
    return {
        "gunicorn": ({"gunicorn.socket": server}, plain),
        "werkzeug": ({"werkzeug.socket": server}, plain),
        "pywsgi": ({}, Gateway(socket=server).start_response),
        "cheroot": ({}, Gateway(req=connection).start_response),
        "wsgiref": ({}, Gateway(stdout=raw).start_response),
        "wsgiref behind a middleware": ({"wsgi.input": server.makefile("rb")}, plain),
        "cheroot behind a middleware": ({"wsgi.input": SimpleNamespace(rfile=server.makefile("rb"))}, plain),
    }


NAMES = [
    "gunicorn",
    "werkzeug",
    "pywsgi",
    "cheroot",
    "wsgiref",
    "wsgiref behind a middleware",
    "cheroot behind a middleware",
]


@pytest.mark.parametrize("name", NAMES)
def test_socket_of_each_server(name: str, connected: Any) -> None:
    """The connection that is found is the client's own."""
    server, client = connected
    environ, start_response = ways(server)[name]
    link = link_of(environ, start_response)
    assert link is not None
    server.sendall(b"x" * 1000)
    assert client.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
    info = link.read_info()
    assert info is not None and info.position == 1000
    named = link.connection_at(17)
    assert named is not None
    assert (named.port, named.family, named.position) == (server.getsockname()[1], socket.AF_INET, 17)


class Raises:
    """An object each attribute of which fails."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("the owner is gone")


BROKEN = {
    "closed": socket.socket,
    "UNIX": lambda: socket.socket(socket.AF_UNIX),
    "UDP": lambda: socket.socket(type=socket.SOCK_DGRAM),
    "no socket": object,
    "raising": Raises,
    "None": lambda: None,
    "odd answer": lambda: SimpleNamespace(getsockopt=lambda *_: None, getsockname=lambda: ("", 1)),
    "short answer": lambda: SimpleNamespace(getsockopt=lambda *_: b"\1", getsockname=lambda: ("", 1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_can_not_be_asked(name: str) -> None:
    """No socket, a closed one or one of another kind gives no account, and raises nothing."""
    found: Any = BROKEN[name]()
    if name == "closed":
        found.close()
    link = link_of({"gunicorn.socket": found, "wsgi.input": found}, plain)
    assert link is None or link.read_info() is None
    if name in ("UNIX", "UDP"):
        found.close()


def test_raising_environ_objects() -> None:
    """Objects of the app that fail when they are looked at are passed over."""
    assert link_of({"wsgi.input": Raises()}, Gateway(socket=Raises()).start_response) is None


@pytest.mark.parametrize("size", [0, 1, 104, 192, SIZE - 1])
def test_structure_of_older_kernels(size: int) -> None:
    """A shorter struct tcp_info says nothing."""
    assert read_tcp_info(bytes(size)) is None


@pytest.mark.parametrize(
    ("protocol", "own"), [("HTTP/1.1", True), ("HTTP/1.0", True), ("HTTP/2.0", False), ("HTTP/3", False)]
)
def test_shared_connections(protocol: str, own: bool) -> None:
    """Several answers share a connection of HTTP/2."""
    assert has_own_connection({"SERVER_PROTOCOL": protocol}) is own


@pytest.mark.parametrize("kind", ["ssl", "pyOpenSSL", "plain"])
def test_socket_with_tls_recognised(kind: str, connected: Any) -> None:
    """TLS adds to the bytes of a body, whichever library does it."""
    server, _ = connected
    sockets = {
        "ssl": lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(
            server, server_side=True, do_handshake_on_connect=False
        ),
        "pyOpenSSL": lambda: SimpleNamespace(getsockopt=server.getsockopt, pending=lambda: 0),
        "plain": lambda: server,
    }
    found = sockets[kind]()
    link = link_of({"gunicorn.socket": found}, plain)
    assert link is not None and link.is_encrypted is (kind != "plain")
    if kind == "ssl":
        found.close()


@pytest.mark.parametrize(
    ("options", "environ", "encrypted"),
    [
        ({"https-socket": b":443"}, {"HTTPS": "on"}, True),
        ({"https-socket": b":443", "http-socket": b":80"}, {}, False),
        # nginx sets HTTPS for a plain connection to uWSGI.
        ({"socket": b":3031"}, {"HTTPS": "on"}, False),
    ],
)
def test_uwsgi_with_tls_recognised(
    options: Any, environ: Any, encrypted: bool, connected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uWSGI encrypts in C: the descriptor does not show it, its options and the request do."""
    module = SimpleNamespace(opt=options, connection_fd=connected[0].fileno)
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    link = link_of(environ, plain)
    assert link is not None and link.is_encrypted is encrypted


def test_reused_descriptor_of_uwsgi(connected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """uWSGI closes its descriptor, and another client's connection may get the same number."""
    server, _ = connected
    descriptor = os.dup(server.fileno())
    module = SimpleNamespace(opt={}, connection_fd=lambda: descriptor)
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    link = link_of({}, plain)
    assert link is not None and link.read_info() is not None
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as other,
    ):
        os.dup2(other.fileno(), descriptor)
        assert link.read_info() is None
    os.close(descriptor)
    assert link.read_info() is None
