"""A site behind a proxy: each way in which an app hands out a film, or has the proxy do it.

The first segment of a path is the server's, for the proxy to tell it by; the last names a file in ``FILMS``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flask import Flask, Response, send_file

FILMS = Path(os.environ.get("FILMS", "."))
BLOCK = 1 << 16

app = Flask(__name__)


@app.get("/<server>/generator/<name>")
def generator(server: str, name: str) -> Response:
    size = (FILMS / name).stat().st_size
    return Response(blocks(size), mimetype="video/mp4", headers={"Content-Length": str(size)})


@app.get("/<server>/chunked/<name>")
def chunked(server: str, name: str) -> Response:
    """No length: the server frames it, or hangs up, and nginx frames it."""
    return Response(blocks((FILMS / name).stat().st_size), mimetype="video/mp4")


@app.get("/<server>/file/<name>")
def file(server: str, name: str) -> Response:
    """By the server's file wrapper; knows Range, HEAD and 304."""
    return send_file(FILMS / name, mimetype="video/mp4", conditional=True)


@app.get("/<server>/accel/<name>")
def accel(server: str, name: str) -> Response:
    """nginx sends the file, and says of what type it is."""
    response = Response(headers={"X-Accel-Redirect": f"/protected/{name}"})
    del response.headers["Content-Type"]
    return response


@app.get("/<server>/sendfile/<name>")
def sendfile(server: str, name: str) -> Response:
    """Apache's mod_xsendfile, or lighttpd, sends the file."""
    return Response(headers={"X-Sendfile": str(FILMS / name)}, mimetype="video/mp4")


def blocks(size: int) -> Iterator[bytes]:
    block = bytes(BLOCK)
    for at in range(0, size, BLOCK):
        yield block[: min(BLOCK, size - at)]
