"""Serves the app by servers that are libraries: ``python -m tests.servers.serve wsgiref PORT``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

HOST = "127.0.0.1"


class Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def wsgiref(app: Any, port: int) -> None:
    make_server(HOST, port, app, server_class=Threads, handler_class=Quiet).serve_forever()


def werkzeug(app: Any, port: int) -> None:
    from werkzeug.serving import run_simple

    run_simple(HOST, port, app, threaded=True)


def bjoern(app: Any, port: int) -> None:
    import bjoern as server

    server.run(app, HOST, port)


def pywsgi(app: Any, port: int) -> None:
    from gevent.pywsgi import WSGIServer as Server

    Server((HOST, port), app).serve_forever()


SERVERS: dict[str, Callable[[Any, int], None]] = {
    "wsgiref": wsgiref,
    "werkzeug": werkzeug,
    "bjoern": bjoern,
    "pywsgi": pywsgi,
}

if __name__ == "__main__":
    if sys.argv[1] == "pywsgi":
        from gevent import monkey

        monkey.patch_all()
    from tests.servers.app import application

    SERVERS[sys.argv[1]](application, int(sys.argv[2]))
