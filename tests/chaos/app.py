"""The example app, telling which worker answered, and forking in the ways that apps do."""

from __future__ import annotations

import multiprocessing
import os
import sys
from io import BytesIO
from typing import Any

from flask import Response, request

from examples.flask_app import app
from tests.harness import MEDIA


@app.after_request
def name_worker(response: Response) -> Response:
    response.headers["Worker"] = str(os.getpid())
    return response


@app.get("/fork")
def fork() -> Response:
    """A child that serves one counted response and ends without a word."""
    child = os.fork()
    if not child:
        try:
            serve(request.args["session_id"])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return Response("forked")


@app.get("/multiprocessing")
def multiply() -> Response:
    child = multiprocessing.get_context("fork").Process(target=serve, args=(request.args["session_id"],))
    child.start()
    child.join()
    return Response("multiplied")


def serve(session: str) -> None:
    """One counted response, by the app as the server has it: wrapped."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": MEDIA, "QUERY_STRING": f"session_id={session}",
        "SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http", "wsgi.input": BytesIO(), "wsgi.errors": sys.stderr,
        "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": False,
    }  # fmt: skip
    body = app(environ, lambda status, headers, error=None: lambda data: None)
    for _ in body:
        pass
    body.close()
