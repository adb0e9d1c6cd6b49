"""The stand-in's HTTP/1.1 server, which keeps connections alive and can cut or reset them.

It extends http.server, because the servers of wsgiref and werkzeug close the connection after each answer. That hides
how a client uses a connection again, and makes the stand-in slower.
"""

from __future__ import annotations

import io
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

_MAX_BODY = 256 * 1024


class Hangup(Exception):
    """Ends the connection without another byte: with a reset (RST) if `reset`, else with a normal close (FIN)."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__("reset" if reset else "closed")
        self.reset = reset


class HTTPServer(ThreadingMixIn, TCPServer):
    """Serves one WSGI app, with a thread per connection; OSError or OverflowError if it can't listen."""

    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, host: str, port: int, app: WSGIApplication) -> None:
        self.app = app
        self._open: dict[threading.Thread, socket.socket] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        self._open[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[threading.current_thread()]

    def close_connections(self) -> list[threading.Thread]:
        """Close every connection. Returns their threads, which then end."""
        open_now = dict(self._open)
        for connection in open_now.values():
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client has already closed it
        return list(open_now)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection: http.server reads the requests, the app answers them, until one side closes it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # header and body are sent in one write
    timeout = 300
    server: HTTPServer

    def do_GET(self) -> None:
        refused = self._body_error_status()
        if refused:
            self.close_connection = True  # the unread body can't be distinguished from the next request
            return self.send_error(refused)
        try:
            self._send(self._environ(self._body()))
        except Hangup as hangup:
            self.close_connection = True
            if hangup.reset:
                self._reset()

    do_POST = do_HEAD = do_DELETE = do_PUT = do_PATCH = do_OPTIONS = do_GET

    def _body_error_status(self) -> int:
        """The HTTP status of a body that can't be read, or 0."""
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding"):
            return 411
        if not (length.isascii() and length.isdigit()):
            return 400
        return 413 if len(length) > 9 or int(length) > _MAX_BODY else 0

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if len(body) < length:
            raise Hangup
        return body

    def _environ(self, body: bytes) -> WSGIEnvironment:
        path, _, query = self.path.partition("?")
        host, port = self.server.server_address[:2]
        environ: WSGIEnvironment = {
            f"HTTP_{name.upper().replace('-', '_')}": value for name, value in self.headers.items()
        }
        return environ | {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote(path, "latin-1"),
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "SERVER_NAME": str(host),
            "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": self.request_version,
            "REMOTE_ADDR": self.client_address[0],
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def _send(self, environ: WSGIEnvironment) -> None:
        def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Any:
            lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
            self.wfile.write("\r\n".join(lines).encode("latin-1"))

        chunks: Any = self.server.app(environ, start_response)
        try:
            for chunk in chunks:
                self.wfile.write(chunk)
                self.wfile.flush()
        finally:
            if hasattr(chunks, "close"):
                chunks.close()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        pass
