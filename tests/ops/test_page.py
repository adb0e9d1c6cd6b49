"""The operator's pages: who may see them, that they tell the truth, and that they do nothing else."""

from __future__ import annotations

import base64
import hashlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops import page
from t23_middleware.ops.page_guard import BURST, DELAY, MAX_ADDRESSES, REFILL, Guard, address_of
from t23_middleware.relay.outbox import Ingest, OutboxView, SQLiteOutbox
from t23_middleware.relay.report import Report
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder, lock_is_held

from ..harness import until
from ..relay.writers import end, living, start, transfer
from .commands import Site
from .pages import TOKEN, Elements, PagesSite, basic, serving
from .past import MARKUP, SESSION, fill

FIGURES = ("captured", "waiting", "sent", "dead", "lost")
ALL = ("/_t23/", "/_t23/status.json", "/_t23/metrics")
#: Addresses that lead to the pages, and where to.
MOVED = {"/_t23": "_t23/", "/_t23.json": "_t23/status.json"}


@pytest.fixture
def pages(state: Path) -> Iterator[PagesSite]:
    """The pages of a state folder that does not exist yet."""
    with serving(state) as site:
        yield site


@pytest.fixture
def past(state: Path, pages: PagesSite) -> PagesSite:
    """The pages of a site with a past."""
    fill(StateFolder(state), time.time_ns() // 1_000_000)
    return pages


# Who may see them.


def test_pages_off_without_token(state: Path):
    """Without a token in the settings, the app answers the addresses of the pages."""
    with serving(state, status_token=None) as site:
        for path in (*ALL, *MOVED):
            assert site.ask(path, Authorization="Bearer ").body == f"the app at {path}"


def test_pages_take_only_their_addresses(pages: PagesSite):
    """With a token in the settings, the app still answers each address that is not exactly a page's."""
    for path in (
        "/",
        "/_t23x",
        "/_t23/x",
        "/_t23.json/",
        "/_t23//",
        "/_t23/status",
        "/_t2",
        "/x/_t23",
        "/_t23/metrics/",
    ):
        assert pages.ask(path).body == f"the app at {path}"


@pytest.mark.parametrize("path", ALL)
def test_token_as_password_or_bearer(pages: PagesSite, path: str):
    """The token opens each page, as the password of any user or as Bearer."""
    for header in (basic("", TOKEN), basic("anyone", TOKEN), f"bearer {TOKEN}", f"Bearer  {TOKEN}"):
        assert pages.ask(path, Authorization=header).status == 200, header


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        TOKEN,
        f"Digest {TOKEN}",
        "Bearer \xff\xfe",
        basic(TOKEN, ""),
        basic("any", TOKEN.upper()),
        f"Basic {TOKEN}",
        "Basic !!!",
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
    ],
)
def test_missing_token_gets_401(past: PagesSite, path: str, header: str | None):
    """A request without the right token gets a 401 that asks for the token and shows nothing else."""
    headers = {} if header is None else {"Authorization": header}
    answer = past.ask(path, token=None, **headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith('Basic realm="')
    assert (
        answer.body
        == "This page needs the token (T23_STATUS_TOKEN): as the password of any user, or as Bearer.\n"
    )


@pytest.mark.parametrize("token", [None, TOKEN, "wrong"])
@pytest.mark.parametrize("path", MOVED)
def test_former_address_redirects_unasked(past: PagesSite, path: str, token: str | None):
    """A challenge there would make browsers send the token to every page of the site (RFC 7617, 2.2)."""
    answer = past.ask(f"{path}?x=1", token=token)
    assert (answer.status, answer.headers["Location"]) == (301, MOVED[path])
    assert "WWW-Authenticate" not in answer.headers
    assert past.ask(f"{path}?refresh").headers["Location"] == f"{MOVED[path]}?refresh"


@pytest.mark.parametrize("path", ["/", "/films/1", "/_t23x", "/_t23/x", "/_t23/status.json/"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_app_never_sees_the_token(state: Path, path: str, method: str):
    """Other credentials are the app's own, and it gets them as they came."""
    seen: list[object] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ.get("HTTP_AUTHORIZATION"))
        start_response("200 OK", [])
        return []

    own = ("Bearer of-the-app", basic("ops", "of-the-app"), basic(TOKEN, "x"), f"Digest {TOKEN}", "Basic !")
    with serving(state, app=app) as site:
        for header in (basic("ops", TOKEN), basic("", TOKEN), f"Bearer {TOKEN}", f"bEARER   {TOKEN} ", *own):
            site.ask(path, method, Authorization=header)
    assert seen == [None] * 4 + list(own)


def test_wrong_tokens_logged_with_address(past: PagesSite, caplog: pytest.LogCaptureFixture):
    """One line a minute, however many come; a request without a token is what each browser begins with."""
    with caplog.at_level(logging.WARNING, "t23_middleware"):
        past.ask("/_t23/", token=None)
        assert caplog.records == []
        for number in range(5):
            past.ask("/_t23/metrics", token=f"{TOKEN}-{number}", X_Forwarded_For="10.9.9.9, 203.0.113.5")
    (record,) = caplog.records
    assert "203.0.113.5" in record.getMessage()
    assert TOKEN not in caplog.text


def test_many_wrong_tokens_slow_down(past: PagesSite):
    """The right token still opens the pages, also from the same address a moment later, and from others at once."""
    answers = [past.ask("/_t23/", token=f"wrong-{number}") for number in range(2 * BURST)]
    assert {answer.status for answer in answers[:BURST]} == {401}
    refused = answers[-1]
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert past.ask("/films").status == 200
    assert past.ask("/_t23/", X_Forwarded_For="203.0.113.7").status == 200
    assert until(lambda: past.ask("/_t23/").status == 200)


def test_guard_delays_one_at_once():
    """So that a flood of wrong tokens never holds more than one thread of a worker."""
    slept: list[float] = []
    guard = Guard(clock=lambda: 100.0, sleep=lambda seconds: (slept.append(seconds), guard.wrong("b")))
    guard.wrong("a")
    assert slept == [DELAY]


def test_guard_forgives_with_time():
    now = [1000.0]
    guard = Guard(clock=lambda: now[0], sleep=lambda seconds: None)
    for _ in range(BURST):
        assert not guard.is_closed_to("a")
        guard.wrong("a")
    assert guard.is_closed_to("a") and not guard.is_closed_to("b")
    now[0] += REFILL
    assert not guard.is_closed_to("a")
    guard.wrong("a")
    assert guard.is_closed_to("a")


def test_guard_remembers_few_addresses():
    guard = Guard(clock=lambda: 0.0, sleep=lambda seconds: None)
    for number in range(3 * MAX_ADDRESSES):
        guard.wrong(str(number))
    assert len(guard._forgiven) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("remote", "forwarded", "address"),
    [
        ("9.9.9.9", "198.51.100.1", "9.9.9.9"),
        ("127.0.0.1", "198.51.100.1, 2001:db8::7", "2001:db8::7"),
        ("", "198.51.100.1", "198.51.100.1"),
        ("", "<b>%0a", "an unknown address"),
        ("10.0.0.1", "fe80::1%forged line", "fe80::1"),
        ("/run/app.sock", "", "an unknown address"),
    ],
)
def test_address_is_the_nearest_believable(remote: str, forwarded: str, address: str):
    assert address_of({"REMOTE_ADDR": remote, "HTTP_X_FORWARDED_FOR": forwarded}) == address


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_get_and_head_is_answered(past: PagesSite, method: str):
    for path in ALL:
        answer = past.ask(path, method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ALL)
def test_head_is_get_without_a_body(past: PagesSite, path: str):
    asked, seen = past.ask(path, "HEAD"), past.ask(path)
    assert (asked.status, asked.body) == (200, "")
    assert asked.headers["Content-Type"] == seen.headers["Content-Type"]
    assert int(asked.headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("path", "method", "token"),
    [
        *((path, "GET", TOKEN) for path in ALL),
        ("/_t23/", "GET", "wrong"),
        ("/_t23/", "POST", TOKEN),
        ("/_t23", "GET", TOKEN),
    ],
)
def test_every_answer_keeps_itself_to_itself(past: PagesSite, path: str, method: str, token: str):
    headers = past.ask(path, method, token=token).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    assert "noindex" in headers["X-Robots-Tag"]
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "script-src" not in policy


def test_the_pages_may_be_elsewhere(state: Path):
    with serving(state, status_path="/ops/t23/") as site:
        assert site.ask("/ops/t23").headers["Location"] == "t23/"
        assert 'href="/ops/t23/status.json"' in site.ask("/ops/t23/").body
        assert site.ask("/_t23").body == "the app at /_t23"


def test_switched_off_there_are_no_pages(state: Path):
    with serving(state, enabled=False) as site:
        assert site.ask("/_t23").body == "the app at /_t23"


# What they tell.


def test_page_zero_before_first_play(state: Path, pages: PagesSite):
    """Before the first play all figures are zero, and the pages make no state folder."""
    told = pages.json()
    assert [told[name] for name in FIGURES] == [0, 0, 0, 0, 0]
    assert "no state folder yet" in pages.ask("/_t23/").body
    assert pages.ask("/_t23/metrics").status == 200
    assert not state.exists()


def test_figures_agree_in_all_formats(site: Site):
    """Each figure is the same on the page, in its charts, in the JSON, in ``status`` and in the metrics."""
    site.play(5)
    site.deliver()  # a site that has accepted none yet pauses where it refuses one
    site.play(2, photo="404")
    site.deliver()
    site.api.fault("deny")
    site.play(3)
    site.deliver()
    with serving(site.folder.path, api_url=site.api.url) as pages:
        told, html = pages.json(), Elements(pages.ask("/_t23/").body)
        metrics = pages.ask("/_t23/metrics").body.splitlines()
    assert [told[name] for name in FIGURES] == [10, 3, 5, 2, 0]
    assert all(type(told[name]) is int for name in FIGURES)
    status = site.status()
    assert {
        name: told[name] for name in status if name not in ("time", "text", "oldest_waiting_seconds")
    } == {name: status[name] for name in status if name not in ("time", "text", "oldest_waiting_seconds")}
    assert [int(html.figure(name.capitalize())) for name in FIGURES] == [10, 3, 5, 2, 0]
    assert {"t23_reports_captured_total 10.0", "t23_reports_sent_total 5.0"} <= set(metrics)
    assert {"t23_reports_waiting 3.0", "t23_reports_dead 2.0", "t23_plays_total 10.0"} <= set(metrics)
    for span in ("hour", "day"):
        sums = {
            name: sum(told[span].get(name, [0])) for name in ("captured", "sent", "dead", "plays", "bytes")
        }
        assert sums == {"captured": 10, "sent": 5, "dead": 2, "plays": 10, "bytes": 1_000_000}
    assert [number for number in told["hour"]["waiting"] if number is not None] != [], "a relay ran"
    assert told["api_answers"]["accepted"] == 5
    assert told["api_answers"]["refused"] == 2
    assert told["api_answers"]["denied"] >= 1
    assert told["videos_by_plays"][0] == {"host": "", "photo_id": "1", "plays": 8, "bytes": 800_000}


def test_page_shows_problem_first(site: Site):
    """The page shows what is wrong first, in words, and in its title."""
    site.api.fault("deny")
    site.play()
    site.deliver()
    with serving(site.folder.path, api_url=site.api.url) as pages:
        body = pages.ask("/_t23/").body
        words = " ".join(Elements(body).words.split())
    assert "Paused" in body.partition("<title>")[2].partition("</title>")[0]
    assert "state bad" in body
    assert words.index("whitelist") < words.index("Streams open")


def test_page_counts_open_response(site: Site):
    """A response that has not ended counts as an open stream."""
    with living(site.folder, digest=site.digest()) as writer, site.relay():
        writer.write(transfer(7, 0).opening._replace(started_ns=0))
        with serving(site.folder.path, api_url=site.api.url) as pages:
            assert until(lambda: pages.json()["open_responses"] == 1)
            assert Elements(pages.ask("/_t23/").body).figure("Streams open") == "1"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/html"),
        ("*/*", "text/html"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("text/html, application/json;q=0.5", "text/html"),
        ("image/png", "text/html"),
        ("application/json;q=oh", "text/html"),
    ],
)
def test_accept_decides_between_page_and_json(past: PagesSite, accept: str, kind: str):
    answer = past.ask("/_t23/", Accept=accept)
    assert answer.headers["Content-Type"].partition(";")[0] == kind
    assert "Accept" in answer.headers["Vary"]


def test_page_refreshes_on_request(past: PagesSite):
    """The page refreshes itself every 30 seconds, but only where its address asks for that."""
    assert 'http-equiv="refresh"' not in past.ask("/_t23/").body
    assert '<meta http-equiv="refresh" content="30">' in past.ask("/_t23/?refresh").body


def test_behind_a_prefix_the_links_carry_it(state: Path):
    pages = page.Pages(
        Settings(
            environ={
                "T23_API_URL": "http://x.example",
                "T23_STATUS_TOKEN": TOKEN,
                "T23_STATE_DIR": str(state),
            }
        )
    )
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/_t23/",
        "SCRIPT_NAME": "/vid\xc3\xa9o",
        "HTTP_AUTHORIZATION": f"Bearer {TOKEN}",
    }
    body = b"".join(pages(environ, lambda status, headers: None)).decode()
    assert 'href="/vid%C3%A9o/_t23/status.json"' in body


# What they must not do.


def test_page_without_scripts_and_resources(past: PagesSite):
    """The page runs no script and loads nothing. Its policy allows only the style that is in the page."""
    answer = past.ask("/_t23/")
    elements = Elements(answer.body)
    assert {tag for tag, _ in elements.all} & {
        "script",
        "img",
        "iframe",
        "object",
        "form",
        "base",
        "foreignobject",
    } == set()
    attributes = [(name, value or "") for _, held in elements.all for name, value in held.items()]
    assert [
        name for name, _ in attributes if name.startswith("on") or name in ("style", "src", "srcset")
    ] == []
    links = [value for name, value in attributes if name in ("href", "action", "xlink:href")]
    assert all(link == "data:," or link.startswith("/_t23") for link in links), links
    hashed = base64.b64encode(hashlib.sha256(elements.style.encode()).digest()).decode()
    assert f"style-src 'sha256-{hashed}'" in answer.headers["Content-Security-Policy"]
    assert "url(" not in elements.style and "@import" not in elements.style


def test_markup_from_anywhere_is_text(past: PagesSite):
    body = past.ask("/_t23/").body
    assert MARKUP not in body
    assert Elements(body).words.count(MARKUP) >= 3, "the state, a trouble and the refusals"


def test_no_session_is_ever_shown(past: PagesSite):
    for path in ALL:
        assert SESSION not in past.ask(path).body


def test_page_unreadable_outbox_is_503(state: Path, pages: PagesSite):
    """An outbox that can't be read is a 503 in each format, and never shown as zero."""
    folder = StateFolder(state)
    folder.create()
    folder.outbox.write_bytes(b"this is no database, and long enough to be one" * 100)
    for path in ALL:
        answer = pages.ask(path)
        assert answer.status == 503
        assert "outbox is corrupt" in answer.body
    assert "error" in pages.ask("/_t23/status.json").body
    assert folder.outbox.read_bytes().startswith(b"this is no database")


def test_page_bug_is_503_and_logged(
    past: PagesSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An exception in the page's own code is answered with a 503 without its text, and logged."""

    def broken(settings: Settings) -> None:
        raise RuntimeError("our own fault")

    monkeypatch.setattr(page, "read_status", broken)
    with caplog.at_level(logging.ERROR):
        answer = past.ask("/_t23/")
    assert answer.status == 503
    assert "our own fault" not in answer.body
    assert "our own fault" in caplog.text


def rows_read(path: Path, now_ms: int) -> int:
    """What SQLite does for one page, in steps of its virtual machine."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    with OutboxView(path) as view:
        view._db.set_progress_handler(count, 10)
        view.snapshot()
        view.history(now_ms)
    return steps * 10


def test_page_cost_independent_of_backlog(state: Path):
    """A page costs SQLite the same number of steps, however many reports wait or are dead."""
    folder, now_ms = StateFolder(state), time.time_ns() // 1_000_000
    fill(folder, now_ms)
    before = rows_read(folder.outbox, now_ms)
    outbox = SQLiteOutbox(folder.outbox)
    outbox.ingest(Ingest([Report(now_ms, "", f"s{n}", "7190971", 1, 0) for n in range(20_000)], [], {}, {}))
    outbox.close()
    with sqlite3.connect(folder.outbox) as db:
        db.execute(
            "INSERT INTO dead SELECT id + 1000000, time_ms, host, session_id, photo_id, sent, skip, NULL, NULL, NULL,"
            " 'code', 'answer', time_ms, NULL FROM reports"
        )
    db.close()
    # The refusals of the list of recent errors: 200 at most.
    assert rows_read(folder.outbox, now_ms) < before + 200 * 30


LOOKING_WRITER = """
import sys
from pathlib import Path
from t23_middleware.journal import JournalWriter
from t23_middleware.ops.page import Pages
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder
state, token = sys.argv[1:]
writer = JournalWriter(StateFolder(Path(state)), "0.1.0", "digest")
assert writer.write(b"rubbish\\n")
pages = Pages(Settings(environ={"T23_API_URL": "http://x.example", "T23_STATE_DIR": state, "T23_STATUS_TOKEN": token}))
for path in ("/_t23/", "/_t23/status.json", "/_t23/metrics"):
    said = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_AUTHORIZATION": "Bearer " + token}
    pages(environ, lambda status, headers: said.append(status))
    assert said == ["200 OK"], said
print(writer.name, flush=True)
sys.stdin.read()
"""


def test_page_keeps_worker_lock(state: Path):
    """A worker that has served its pages still has its journal's lock, and so counts as alive."""
    folder = StateFolder(state)
    fill(folder, time.time_ns() // 1_000_000, minutes=2)
    process = start(LOOKING_WRITER, str(state), TOKEN)
    try:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert lock_is_held(folder.journals / f"{name}.lock")
    finally:
        end(process)


LAZY = """
import sys
from t23_middleware import T23Middleware
token = sys.argv[2]
app = T23Middleware(
    lambda environ, start: start("200 OK", []) and [] or [], api_url="http://x.example", state_dir=sys.argv[1],
    status_token=token, relay="off",
)
def ask(path):
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_AUTHORIZATION": "Bearer " + token}
    list(app(environ, lambda status, headers, exc_info=None: None))
    return sorted({"sqlite3", "requests", "t23_middleware.ops.page"} & set(sys.modules))
print(ask("/film"), ask("/_t23/"))
"""


def test_page_imports_are_lazy(site: Site):
    """The app imports the pages and SQLite only when a page is requested, and never the HTTP client."""
    done = site.python(
        LAZY.replace("sys.argv[1]", repr(str(site.folder.path))).replace("sys.argv[2]", repr(TOKEN))
    )
    assert done.stdout.strip() == "[] ['sqlite3', 't23_middleware.ops.page']", done.stderr


def test_delivery_during_page_requests(site: Site):
    """The relay delivers all reports while the pages are requested all the time, and their figures add up."""
    with site.relay(), serving(site.folder.path, api_url=site.api.url) as pages:
        for _ in range(5):
            site.play(20)
            for _ in range(10):
                told = pages.json()
                assert told["captured"] == sum(told[name] for name in FIGURES[1:])
        assert until(lambda: pages.json()["sent"] == 100)
