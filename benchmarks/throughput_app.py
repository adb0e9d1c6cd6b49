"""The app that the servers of ``throughput.py`` serve, and those servers that have no command of their own.

Bare as ``/bare/…``, in a wrapper that does nothing as ``/no-op/…``, in the middleware as ``/t23/…``.
``THROUGHPUT_FOLDER`` names the folder of the files.
``python throughput_app.py SERVER PORT`` serves it on 127.0.0.1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

App = Callable[..., Iterable[bytes]]

BLOCK = 1 << 16
FILE = "video.mp4"
#: Longer than any requested Range, so that it shows if a server reads more than it sends.
LONG_FILE = "film.mp4"


def streaming(folder: Path) -> App:
    """A WSGI app: ``/file`` by file_wrapper, ``/generator`` in 64 KiB chunks, the rest by Flask's ``send_file``."""
    by_flask = flask_app(folder)
    path = folder / FILE
    length = path.stat().st_size

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        wanted = environ["PATH_INFO"]
        if wanted not in ("/file", "/generator"):
            return by_flask(environ, start_response)
        start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", str(length))])
        if wanted == "/generator":
            return generated(length)
        wrapper = environ.get("wsgi.file_wrapper", blocks)
        body: Iterable[bytes] = wrapper(path.open("rb"), BLOCK)
        return body

    return app


def flask_app(folder: Path) -> App:
    import flask

    app = flask.Flask("throughput_app")

    @app.get("/send_file/<name>")
    def sent(name: str) -> flask.Response:
        return flask.send_file(folder / name, mimetype="video/mp4", conditional=True)

    return app


def generated(length: int) -> Iterator[bytes]:
    chunk = bytes(BLOCK)
    for _ in range(length // BLOCK):
        yield chunk
    yield chunk[: length % BLOCK]


def blocks(file: Any, size: int) -> Iterator[bytes]:
    """For a server that has no ``wsgi.file_wrapper``."""
    with file:
        while data := file.read(size):
            yield data


class NoOp:
    """A middleware that does nothing."""

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return self._app(environ, start_response)


def create() -> App:
    """All variants in one process: the first part of the path names the variant.

    Two processes that run the same code differ by more than what is measured here.
    """
    from t23_middleware import T23Middleware

    app = streaming(Path(os.environ["THROUGHPUT_FOLDER"]))
    variants: dict[str, App] = {"bare": app, "no-op": NoOp(app), "t23": T23Middleware(app)}

    def chosen(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        _, kind, rest = environ["PATH_INFO"].split("/", 2)
        environ["PATH_INFO"] = f"/{rest}"
        return variants[kind](environ, start_response)

    return chosen


def serve_waitress(port: int) -> None:
    import waitress

    waitress.serve(create(), host="127.0.0.1", port=port, threads=4)


def serve_cheroot(port: int) -> None:
    from cheroot import wsgi

    wsgi.Server(("127.0.0.1", port), create(), numthreads=4).start()


def serve_pywsgi(port: int) -> None:
    from gevent import monkey

    monkey.patch_all()
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", port), create(), log=None).serve_forever()


def serve_werkzeug(port: int) -> None:
    import logging

    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", port, create(), threaded=True)


SERVERS = {
    "waitress": serve_waitress,
    "cheroot": serve_cheroot,
    "pywsgi": serve_pywsgi,
    "werkzeug": serve_werkzeug,
}

if __name__ == "__main__":
    SERVERS[sys.argv[1]](int(sys.argv[2]))
elif "THROUGHPUT_FOLDER" in os.environ:
    # For servers that want a module's attribute.
    application = create()
