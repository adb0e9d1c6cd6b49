"""The apps that ``overhead.py`` runs in processes of their own: under gunicorn, and here to measure their memory.

It imports no more than Flask does, so that what the middleware imports is part of the memory that it adds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask

QUERY = "session_id=3f1f9d0c-benchmark&photo_id=4711"
CHUNK = bytes(16384)


def create(kind: str) -> flask.Flask:
    """A Flask app that streams one video: ``bare``, or ``t23`` with the middleware that the environment sets."""
    app = flask.Flask("overhead_apps")
    app.add_url_rule("/video.mp4", "video", video)
    if kind == "t23":
        from t23_middleware import T23Middleware

        app.wsgi_app = T23Middleware(app.wsgi_app)  # type: ignore[method-assign]
    return app


def bare() -> flask.Flask:
    """The app without the middleware, for servers that take no arguments of a factory."""
    return create("bare")


def t23() -> flask.Flask:
    """The app with it."""
    return create("t23")


def video() -> flask.Response:
    def chunks() -> Iterator[bytes]:
        for _ in range(4):
            yield CHUNK

    return flask.Response(chunks(), mimetype="video/mp4", headers={"Content-Length": str(4 * len(CHUNK))})


def environ() -> dict[str, Any]:
    """The environ of one request of the video."""
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/video.mp4",
        "QUERY_STRING": QUERY,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "127.0.0.1:8000",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": sys.stdin.buffer,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }


def serve(app: flask.Flask, requests: int) -> None:
    """Answer *requests* as a server would, without a socket."""
    for _ in range(requests):
        body = app(environ(), lambda status, headers, exc_info=None: lambda data: None)
        for _chunk in body:
            pass
        body.close()  # type: ignore[attr-defined]


def resident_mb() -> float:
    """Resident memory of this process in MB; exact, where ``statm`` may lag behind (proc(5))."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/smaps_rollup has no line 'Rss:'")


def main(kind: str, *milestones: str) -> None:
    """Print the memory after making the app and after each number of requests, in MB, as a JSON array."""
    app = create(kind)
    read = [resident_mb()]
    for requests in milestones:
        serve(app, int(requests))
        read.append(resident_mb())
    print(json.dumps(read))


if __name__ == "__main__":
    main(*sys.argv[1:])
