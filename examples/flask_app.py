"""A plain Flask site with one video, whose media URLs look like TwentyThree's.

Run it with any WSGI server, from any folder, e.g. `flask --app examples.flask_app run`.
"""

import secrets
from pathlib import Path
from typing import Any

from flask import Flask, Response, abort, make_response, render_template, request, send_file, url_for

HERE = Path(__file__).resolve().parent
CLIP = HERE / "clip.mp4"

VIDEO = {
    "tree_id": "4959050",
    "photo": "7190971",
    "token": "e6c1b0a94f1d4c3b8f7a2d5e90b7c318",
    "format": "video_medium",
    "slug": "a-clip-to-play",
}
# The second segment is the video's photo_id; here it is called photo, as the query may carry photo_id too.
PATH = "/<tree_id>/<photo>/<token>/<format>/<slug>-video.mp4"

app = Flask(__name__, template_folder=str(HERE))


@app.get("/")
def index() -> Response:
    """The page with session and video in its media URLs."""
    return page(session_id=secrets.token_urlsafe(), photo_id=VIDEO["photo"])


@app.get("/cookie")
def cookie() -> Response:
    """The same page with the session in a cookie and media URLs without a query."""
    response = page()
    if "session_id" not in request.cookies:
        response.set_cookie("session_id", secrets.token_urlsafe(), httponly=True, samesite="Lax")
    return response


def page(**query: str) -> Response:
    """The player and the download link, with `query` in both URLs."""
    values: dict[str, Any] = {**VIDEO, **query}
    media_url, download_url = url_for("media", **values), url_for("attachment", **values)
    response = make_response(render_template("page.html", media_url=media_url, download_url=download_url))
    response.cache_control.no_store = True  # each load is its own session
    return response


@app.get(PATH)
def media(**video: str) -> Response:
    """The clip, for a player: whole or by Range."""
    if video != VIDEO:
        abort(404)
    return send_file(CLIP, conditional=True)


@app.get("/attachment" + PATH)
def attachment(**video: str) -> Response:
    """The clip as a download."""
    if video != VIDEO:
        abort(404)
    return send_file(CLIP, conditional=True, as_attachment=True, download_name=f"{VIDEO['slug']}.mp4")


@app.get("/favicon.ico")
def favicon() -> tuple[str, int]:
    """No icon; the answer keeps browsers from logging an error."""
    return "", 204
