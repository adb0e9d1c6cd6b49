"""Finds the TCP connection of a response, and reads the kernel's counters of it.

Each server has its socket in a different place: :data:`_ENVIRON`, :data:`_START_RESPONSE`, :data:`_INPUT` and
:func:`link_of` are the only list of these places. Servers without a reachable socket: bjoern, granian, mod_wsgi,
hypercorn.
"""

from __future__ import annotations

import socket
import struct
import sys
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..tcp_info import SIZE, TCP_INFO, TCPInfo, read_tcp_info
from ..transfer import Connection

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: Linux, asm-generic/socket.h; Python has no name for it.
_SO_COOKIE = 57
# As plain numbers: an access to an enum's member takes as long as the system call.
_TCP, _SOCKET = int(socket.IPPROTO_TCP), int(socket.SOL_SOCKET)
_unpack_cookie = struct.Struct("=q").unpack
_IS_LINUX = sys.platform == "linux"
#: By the number of items in an address.
_FAMILIES = {2: int(socket.AF_INET), 4: int(socket.AF_INET6)}

#: Keys of the environ that hold the socket: gunicorn (http/wsgi.py), werkzeug (serving.py).
_ENVIRON = ("gunicorn.socket", "werkzeug.socket")
#: Attributes from the object of ``start_response`` to the socket: gevent's pywsgi, cheroot, wsgiref.
_START_RESPONSE: tuple[tuple[str, ...], ...] = (("socket",), ("req", "conn", "socket"), ("stdout", "_sock"))
#: Attributes from ``wsgi.input`` to the socket, for the case that another middleware replaced the server's
#: ``start_response``: wsgiref; gevent's pywsgi and cheroot; Django's runserver.
_INPUT = (
    ("raw", "_sock"),
    ("rfile", "raw", "_sock"),
    ("rfile", "rfile", "raw", "_sock"),
    ("_read", "__self__", "raw", "_sock"),
)


class Link(Protocol):
    """Reads the kernel's counters of a response's connection. Its methods never raise."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the server accepts bytes before it writes them to the socket, so that the position is too low."""

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS adds bytes to those of the body."""

    def read_info(self) -> TCPInfo | None:
        """The counters of now; ``None`` if the kernel has none."""

    def connection_at(self, position: int) -> Connection | None:
        """The connection's identifiers for the journal, with *position*; ``None`` if it is not a TCP connection."""


class SocketLink:
    """The link of a server that writes each chunk to its socket before it requests the next one.

    *is_encrypted*: the server does TLS apart from *sock*.
    """

    runs_ahead = False

    def __init__(self, sock: Any, *, is_encrypted: bool = False) -> None:
        self._socket = sock
        # Of all sockets, only those with TLS have this: of ssl, gevent and pyOpenSSL (cheroot).
        self.is_encrypted = is_encrypted or hasattr(sock, "pending")

    def read_info(self) -> TCPInfo | None:
        try:
            return read_tcp_info(self._socket.getsockopt(_TCP, TCP_INFO, SIZE))
        except Exception:  # a closed descriptor, not a TCP socket, or not a socket
            return None

    def connection_at(self, position: int) -> Connection | None:
        try:
            address = self._socket.getsockname()
            (cookie,) = _unpack_cookie(self._socket.getsockopt(_SOCKET, _SO_COOKIE, 8))
            # Two or four items; a UNIX socket's is a text. `socket.family` creates an enum at each access.
            return Connection(cookie, address[1], _FAMILIES[len(address)], position)
        except Exception:
            return None


class _Descriptor:
    """uWSGI's connection: a descriptor that uWSGI closes and may reuse for the next client."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._cookie = self._with_socket(_cookie)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        def read(sock: socket.socket) -> bytes:
            if _cookie(sock) != self._cookie:
                raise OSError("the descriptor belongs to another connection")
            return sock.getsockopt(level, option, size)

        answer: bytes = self._with_socket(read)
        return answer

    def getsockname(self) -> Any:
        return self._with_socket(lambda sock: sock.getsockname())

    def _with_socket(self, use: Any) -> Any:
        sock = socket.socket(fileno=self._descriptor)
        try:
            return use(sock)
        finally:
            sock.detach()


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


class UwsgiServer(NamedTuple):
    """The options of the uWSGI server of this process."""

    module: Any
    #: Its ``sendfile`` runs in the request's thread, before it closes the file.
    sends_in_this_thread: bool
    #: It sends chunks of other types than ``bytes``; without this option it silently drops them.
    takes_buffers: bool
    #: A worker does TLS itself, for requests with ``HTTPS=on``; its routers have other options.
    has_tls: bool


def uwsgi_server() -> UwsgiServer | None:
    """uWSGI, if this process is one of its workers (only there the module ``uwsgi`` exists), else ``None``."""
    module = sys.modules.get("uwsgi")
    if module is None or not hasattr(module, "connection_fd"):
        return None
    elsewhere = ("offload-threads", "async", "gevent", "ugreen", "asyncio")
    buffers = ("wsgi-accept-buffer", "wsgi-accept-buffers")
    return UwsgiServer(
        module,
        sends_in_this_thread=not any(name in module.opt for name in elsewhere),
        takes_buffers=any(name in module.opt for name in buffers),
        has_tls="https-socket" in module.opt,
    )


def has_own_connection(environ: WSGIEnvironment) -> bool:
    """Whether the connection belongs to one response at a time, on a system whose kernel has counters of it.

    With HTTP/2 several responses share it (gunicorn sets ``gunicorn.socket`` also then).
    """
    return _IS_LINUX and str(environ.get("SERVER_PROTOCOL", "HTTP/1"))[:6] == "HTTP/1"


def link_of(environ: WSGIEnvironment, start_response: object) -> SocketLink | None:
    """The link of this request's connection; ``None`` if its socket can't be found. Never raises.

    *start_response* is the server's own.
    """
    try:
        server = uwsgi_server()
        found = _socket_of(environ, start_response, server)
        encrypts = server is not None and server.has_tls and environ.get("HTTPS") == "on"
        return None if found is None else SocketLink(found, is_encrypted=encrypts)
    except Exception:  # an attribute of a server's or app's object may raise
        return None


def _socket_of(environ: WSGIEnvironment, start_response: object, server: UwsgiServer | None) -> Any:
    for key in _ENVIRON:
        if key in environ:
            return environ[key]
    if server is not None:
        return _Descriptor(server.module.connection_fd())
    if isinstance(start_response, MethodType):
        for path in _START_RESPONSE:
            if (found := _follow(start_response.__self__, path)) is not None:
                return found
    for path in _INPUT:
        if (found := _follow(environ.get("wsgi.input"), path)) is not None:
            return found
    return None


def _follow(start: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        start = getattr(start, name, None)
    return start if hasattr(start, "getsockopt") else None
