"""The example site, asked over a real socket as a browser would, and its clip."""

import html
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
from werkzeug.serving import make_server

from examples.flask_app import CLIP, VIDEO, app

ROOT = Path(__file__).resolve().parents[2]
SIZE = CLIP.stat().st_size
PATH = "/{tree_id}/{photo}/{token}/{format}/{slug}-video.mp4".format(**VIDEO)


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    body: bytes


class Site(NamedTuple):
    port: int

    def ask(self, target: str, method: str = "GET", **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def page_urls(self, target: str) -> tuple[str, str]:
        """The media URL and the download URL that the page at `target` issues."""
        page = self.ask(target).body.decode()
        video = re.search(r'<video[^>]* src="([^"]+)"', page)
        download = re.search(r'<a href="([^"]+)" download>', page)
        assert video and download, page
        return html.unescape(video[1]), html.unescape(download[1])


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Site(server.port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_page_issues_fresh_sessions(site: Site) -> None:
    """Each load of the page issues media URLs with a new session."""
    queries = []
    for _ in range(2):
        for url in site.page_urls("/"):
            assert urlsplit(url).path in (PATH, "/attachment" + PATH)
            queries.append(parse_qs(urlsplit(url).query, strict_parsing=True))
    assert [q["photo_id"] for q in queries] == [[VIDEO["photo"]]] * 4
    sessions = [q["session_id"][0] for q in queries]
    assert sessions[0] == sessions[1] and sessions[2] == sessions[3]
    assert sessions[0] != sessions[2] and all(len(s) >= 22 for s in sessions)


def test_page_uncached_and_without_cookie(site: Site) -> None:
    """The page may not be stored and sets no cookie."""
    page = site.ask("/")
    assert page.status == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["Set-Cookie"] is None


def test_page_language_title_and_player(site: Site) -> None:
    """The page names its language, its title and its player."""
    page = site.ask("/").body.decode()
    assert '<html lang="en">' in page and re.search(r"<title>.+</title>", page)
    assert re.search(r'<video controls[^>]* aria-label="[^"]+"', page)


def test_the_issued_urls_give_the_whole_clip(site: Site) -> None:
    player, download = (site.ask(url) for url in site.page_urls("/"))
    for answer in (player, download):
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "video/mp4"
        assert answer.headers["Content-Length"] == str(SIZE)
        assert answer.body == CLIP.read_bytes()
    assert "attachment" not in player.headers.get("Content-Disposition", "")
    assert download.headers["Content-Disposition"] == f"attachment; filename={VIDEO['slug']}.mp4"


@pytest.mark.parametrize("prefix", ["", "/attachment"])
@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-", 0, SIZE - 1),
        ("bytes=1000-1999", 1000, 1999),
        (f"bytes={SIZE - 5}-{SIZE + 99}", SIZE - 5, SIZE - 1),
        ("bytes=-700", SIZE - 700, SIZE - 1),
    ],
)
def test_range_answered_with_206(site: Site, prefix: str, asked: str, first: int, last: int) -> None:
    """A Range is answered with 206 and exactly those bytes."""
    answer = site.ask(prefix + PATH, Range=asked)
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["Content-Length"] == str(last - first + 1)
    assert answer.body == CLIP.read_bytes()[first : last + 1]


def test_a_range_beyond_the_end_is_416(site: Site) -> None:
    answer = site.ask(PATH, Range=f"bytes={SIZE}-")
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


def test_head_has_length_without_body(site: Site) -> None:
    """HEAD is answered with the length and no body."""
    answer = site.ask(PATH, "HEAD")
    assert (answer.status, answer.headers["Content-Length"], answer.body) == (200, str(SIZE), b"")


def test_a_known_etag_is_answered_with_304(site: Site) -> None:
    etag = site.ask(PATH, "HEAD").headers["ETag"]
    answer = site.ask(PATH, If_None_Match=etag)
    assert (answer.status, answer.body) == (304, b"")


@pytest.mark.parametrize("prefix", ["", "/attachment"])
@pytest.mark.parametrize("part", sorted(VIDEO))
def test_url_with_wrong_part(site: Site, prefix: str, part: str) -> None:
    """A URL in which any part is wrong is a 404."""
    wrong = PATH.replace(VIDEO[part], VIDEO[part][:-1] + "x")
    assert wrong != PATH
    assert site.ask(prefix + wrong).status == 404


def test_cookie_page_sets_session(site: Site) -> None:
    """The cookie page sets a session in a cookie and issues URLs without one."""
    page = site.ask("/cookie")
    cookie = page.headers["Set-Cookie"]
    assert re.match(r"session_id=[\w-]{22,};", cookie)
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Path=/" in cookie
    assert site.page_urls("/cookie") == (PATH, "/attachment" + PATH)


def test_cookie_page_keeps_session(site: Site) -> None:
    """The cookie page keeps a session that the browser has already."""
    page = site.ask("/cookie", Cookie="session_id=abc")
    assert page.status == 200 and page.headers["Set-Cookie"] is None


def test_the_favicon_is_an_empty_answer(site: Site) -> None:
    answer = site.ask("/favicon.ico")
    assert (answer.status, answer.body) == (204, b"")


def test_site_works_without_t23_middleware(tmp_path: Path) -> None:
    """The site works from any folder and does not import t23_middleware."""
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from examples.flask_app import PATH, VIDEO, app
        client = app.test_client()
        for target in ("/", "/cookie"):
            assert client.get(target).status_code == 200, target
        url = "/{tree_id}/{photo}/{token}/{format}/{slug}-video.mp4".format(**VIDEO)
        with client.get(url) as answer:
            assert answer.status_code == 200
        assert not [name for name in sys.modules if name.startswith("t23_middleware")]
    """
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def boxes(data: bytes) -> dict[str, int]:
    """Top-level MP4 boxes, name to offset (ISO/IEC 14496-12, 4.2; no 64-bit sizes in so small a file)."""
    found, offset = {}, 0
    while offset < len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        assert size >= 8, f"box {name!r} at {offset} has size {size}"
        found[name.decode("ascii")] = offset
        offset += size
    assert offset == len(data)
    return found


def test_clip_size_and_index() -> None:
    """The clip is small, and its index comes before its media data."""
    assert SIZE <= 1_500_000
    found = boxes(CLIP.read_bytes())
    assert found["ftyp"] == 0
    assert found["moov"] < found["mdat"]


def test_the_clip_lasts_30_to_60_seconds() -> None:
    data = CLIP.read_bytes()
    mvhd = data.index(b"mvhd") + 4  # version 0: flags, created, modified, then timescale and duration
    assert data[mvhd] == 0
    timescale, duration = struct.unpack_from(">II", data, mvhd + 12)
    assert 30 <= duration / timescale <= 60
