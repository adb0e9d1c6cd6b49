"""What a server's clients get from a wrapped app is what the bare app would have sent them, counted to the byte."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from t23_middleware.relay.sock_diag import dump

from ..harness import until
from .app import ODD_BODIES, ODD_HEADERS
from .client import Client
from .process import FILM_BYTES, LONG_BYTES, PATIENCE, SHORT_BYTES, Site, play

#: Small enough that a client which does not read is felt by the server at once, in bytes.
SMALL_BUFFER = 1 << 16
#: What a client takes before it leaves or stalls, in bytes.
TASTE = 100_000

COMPLETE = {
    "a file by file_wrapper": ("/wrapper/film.mp4", {}),
    "a file by file_wrapper without a length": ("/wrapper-without-length/film.mp4", {}),
    "a file that the app has positioned": ("/positioned/film.mp4", {}),
    "a generator": ("/generator/film.mp4", {}),
    "a generator that starts late": ("/late-generator/film.mp4", {}),
    "a generator without a length": ("/generator-without-length/film.mp4", {}),
    "one chunk": ("/one-chunk", {}),
    "several chunks": ("/several-chunks", {}),
    "Flask's send_file": ("/flask/film.mp4", {}),
    "a Range of send_file": ("/flask/film.mp4", {"Range": "bytes=1000000-3000000"}),
    "a Range from the start": ("/flask/film.mp4", {"Range": "bytes=0-"}),
    "a Range in the middle, to the end": ("/flask/film.mp4", {"Range": "bytes=5000000-"}),
    "a player's probe": ("/flask/film.mp4", {"Range": "bytes=0-1"}),
    "a Range of a file that has changed": (
        "/flask/film.mp4",
        {"Range": "bytes=0-99", "If-Range": '"another"'},
    ),
    "a suffix Range": ("/flask/film.mp4", {"Range": "bytes=-5000"}),
    "Django's FileResponse": ("/django/film.mp4", {}),
    "a body zipped by an inner middleware": ("/gzip/film.mp4", {}),
}


@pytest.mark.parametrize("case", COMPLETE)
def test_complete_answer_unchanged_and_counted(case: str, site: Site) -> None:
    """A complete answer is the same as the bare app's, and counted to the byte."""
    path, headers = COMPLETE[case]
    session = site.session()
    answer = site.ask("GET", path, session, **headers)
    if case not in site.setup.garbles:
        assert answer == site.bare("GET", path, **headers)
    assert answer.status in (200, 206) and not answer.cut
    assert site.sent(session) == [len(answer.body)]


ODD = [f"/odd-body/{name}" for name in ODD_BODIES] + [f"/odd-headers/{name}" for name in ODD_HEADERS]

#: Bodies whose chunks are numbers, in Python's eyes.
OF_NUMBERS = ("/odd-body/bytes", "/odd-body/bytes-subclass", "/odd-body/bytearray")


@pytest.mark.parametrize("path", ODD)
def test_odd_answer_stays_the_same(path: str, site: Site) -> None:
    """What this server makes of types that PEP 3333 does not allow; a complete answer is counted."""
    if path in site.setup.hangs:
        assert both_hang(site, path)
        return
    session = site.session()
    answer = site.ask("GET", path, session)
    assert answer == site.bare("GET", path)
    if site.setup.expands_numbers and path in OF_NUMBERS:
        return
    if answer.status == 200 and not answer.cut and answer.header("Content-Type") == "video/mp4":
        assert site.sent(session) == [len(answer.body)]


def both_hang(site: Site, path: str) -> bool:
    """Whether no whole answer comes within some seconds, neither of the bare app nor of ours."""
    cut = []
    for headers in ({"X-Bare": "1"}, {}):
        with site.client(silence=3.0) as client:
            cut.append(client.ask("GET", play(path, site.session()), headers).cut)
    return cut == [True, True]


def test_empty_body_counts_zero(site: Site) -> None:
    """An empty body is the same as the bare app's, and counted as 0 bytes."""
    session = site.session()
    answer = site.ask("GET", "/empty", session)
    assert answer == site.bare("GET", "/empty")
    assert answer.status == (500 if site.setup.fails_on_empty else 200)
    assert site.sent(session) == [0]


def test_write_bytes_are_counted(site: Site) -> None:
    """What ``write()`` sent is counted together with the body that the app returned."""
    session = site.session()
    answer = site.ask("GET", "/write/film.mp4", session)
    assert answer == site.bare("GET", "/write/film.mp4")
    if site.setup.has_write:
        assert site.sent(session) == [len(answer.body)] == [FILM_BYTES]
    else:
        assert answer.status in (0, 500), "the app calls None"


def test_failing_close_is_counted(site: Site) -> None:
    """A body whose ``close()`` fails is counted as it was sent."""
    session = site.session()
    answer = site.ask("GET", "/close-fails", session)
    assert (answer.status, answer.body) == (200, bytes(2 << 16))
    assert answer.headers == site.bare("GET", "/close-fails").headers
    assert site.sent(session) == [2 << 16]


def test_app_raises_midway(site: Site) -> None:
    """An app that raises in the middle of its body is counted up to there."""
    session = site.session()
    answer = site.ask("GET", "/raises-midway", session)
    (sent,) = site.sent(session)
    assert len(answer.body) <= sent <= 3 << 16
    if not site.setup.resets:
        assert answer == site.bare("GET", "/raises-midway")
        assert sent == len(answer.body)


NOT_COUNTED = {
    "an app that raises before it answers": ("GET", "/raises-before", {}),
    "HEAD of a file": ("HEAD", "/flask/film.mp4", {}),
    "HEAD of a generator": ("HEAD", "/generator/film.mp4", {}),
    "a Range beyond the end": ("GET", "/flask/film.mp4", {"Range": f"bytes={FILM_BYTES}-"}),
    "two Ranges": ("GET", "/flask/film.mp4", {"Range": "bytes=0-99,200-299"}),
    "a page that is not there": ("GET", "/nothing", {}),
}


@pytest.mark.parametrize("case", NOT_COUNTED)
def test_other_answers_not_counted(case: str, site: Site) -> None:
    """An answer that is not a play is the same as the bare app's, and not counted."""
    method, path, headers = NOT_COUNTED[case]
    session = site.session()
    assert site.ask(method, path, session, **headers) == site.bare(method, path, **headers)
    assert_not_opened(site, session)


def test_304_is_not_counted(site: Site) -> None:
    """A 304 is the same as the bare app's, and not counted."""
    etag = site.bare("GET", "/flask/film.mp4").header("ETag")
    assert etag is not None
    session = site.session()
    answer = site.ask("GET", "/flask/film.mp4", session, If_None_Match=etag)
    assert answer.status == (500 if site.setup.fails_on_empty else 304)
    assert answer == site.bare("GET", "/flask/film.mp4", If_None_Match=etag)
    assert_not_opened(site, session)


def assert_not_opened(site: Site, session: str) -> None:
    """An open line is written before the head is sent, so that one of ours would be there by now."""
    assert not site.opened(session)


def test_kept_alive_requests_counted_apart(site: Site) -> None:
    """Two requests on one connection are counted separately."""
    first, second = site.session(), site.session()
    with site.client() as client:
        one = client.ask("GET", play("/flask/film.mp4", first), {"Range": "bytes=0-99999"})
        two = client.ask("GET", play("/wrapper/film.mp4", second))
    assert (len(one.body), len(two.body)) == (100_000, FILM_BYTES)
    assert (site.sent(first), site.sent(second)) == ([100_000], [FILM_BYTES])


def test_parallel_transfers_counted_apart(site: Site) -> None:
    """Transfers at the same time are counted separately.

    uWSGI's threads share a process, whose count of bytes read must not be taken for a thread's.
    """
    sessions = {site.session(): way for way in ("wrapper", "generator", "flask", "wrapper", "flask")}

    def fetch(session: str) -> int:
        return len(site.ask("GET", f"/{sessions[session]}/film.mp4", session).body)

    with ThreadPoolExecutor(len(sessions)) as pool:
        assert list(pool.map(fetch, sessions)) == [FILM_BYTES] * len(sessions)
    assert {session: site.sent(session) for session in sessions} == dict.fromkeys(sessions, [FILM_BYTES])


BIG = {
    "file_wrapper": "/wrapper/long.mp4",
    "a generator": "/generator/long.mp4",
    "send_file": "/flask/long.mp4",
}


def test_server_without_disconnects_noticed(site: Site) -> None:
    """A server that does not report disconnects to the app is noticed and counted."""
    session = site.session()
    site.ask("GET", "/generator/film.mp4", session)
    assert site.sent(session)
    hides = site.setup.module == "hypercorn"
    assert until(lambda: ("leaving_unseen" in site.counted_aside()) == hides)


@pytest.mark.parametrize("way", BIG)
def test_disconnect_counts_received_bytes(way: str, site: Site) -> None:
    """A client that disconnects early is counted with no fewer bytes than it got."""
    session = site.session()
    with site.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(BIG[way], session))
        taken = client.read_some(TASTE)
        stall(client)  # until the server's kernel knows what this one took
    (sent,) = site.sent(session)
    assert taken <= sent <= LONG_BYTES
    if site.setup.notices_leaving:
        assert sent < LONG_BYTES


#: Body of a response that is cut off, and the client's receive buffer.
CUT_OFF = {
    "file_wrapper": ("/wrapper/long.mp4", {}, None),
    "file_wrapper without a length": ("/wrapper-without-length/long.mp4", {}, SMALL_BUFFER),
    "generator": ("/generator/long.mp4", {}, None),
    "generator without a length": ("/generator-without-length/long.mp4", {}, SMALL_BUFFER),
    "late generator": ("/late-generator/long.mp4", {}, SMALL_BUFFER),
    "one large chunk": ("/large-chunk", {}, None),
    "write()": ("/write-all/long.mp4", {}, None),
    "send_file": ("/flask/long.mp4", {}, SMALL_BUFFER),
    "Range of send_file": ("/flask/long.mp4", {"Range": "bytes=1000000-"}, None),
    "short film by a generator": ("/generator/short.mp4", {}, SMALL_BUFFER),
    "short film by send_file": ("/flask/short.mp4", {"Range": "bytes=0-"}, SMALL_BUFFER),
}
#: Bytes by which the count of a response that was cut off may differ from what the client's kernel took.
CLOSE = 2048


@pytest.mark.parametrize("kept_alive", [False, True], ids=["first", "second on its connection"])
@pytest.mark.parametrize("case", CUT_OFF)
def test_cut_off_counts_kernel_bytes(case: str, kept_alive: bool, site: Site) -> None:
    """A client that leaves is counted with what its kernel took, also behind an earlier answer."""
    if not site.setup.asks_kernel or (case == "write()" and not site.setup.has_write):
        pytest.skip("the kernel can't be asked there, or there is no write()")
    path, headers, buffer = CUT_OFF[case]
    session = site.session()
    with site.client(buffer=buffer) as client:
        if kept_alive:
            client.ask("GET", play("/one-chunk", site.session()))
        client.request("GET", play(path, session), headers)
        read = client.read_some(TASTE if buffer else 5_000_000)
        stall(client)
        took = client.body_bytes(read)
    (sent,) = site.sent(session)
    assert abs(sent - took) <= CLOSE, f"counted {sent}, taken {took}"


def test_pipelined_responses_counted_apart(site: Site) -> None:
    """The second answer begins behind the first, of which the send buffer still holds a part."""
    if not site.setup.asks_kernel or site.setup.tls:
        pytest.skip("the kernel can't be asked there, or its bytes are TLS records")
    first, second = site.session(), site.session()
    paths = play("/generator/short.mp4", first), play("/wrapper/long.mp4", second)
    with Client(site.port, buffer=SMALL_BUFFER) as client:
        heads = client.pipeline(paths, SHORT_BYTES)
        if len(heads) < 2:
            pytest.skip("the server answers one request per connection")
        stall(client)
        took = client.kernel_bytes() - sum(heads) - SHORT_BYTES
    assert site.sent(first) == [SHORT_BYTES]
    (sent,) = site.sent(second)
    assert abs(sent - took) <= CLOSE, f"counted {sent}, taken {took}"


@pytest.mark.parametrize("way", BIG)
def test_client_that_never_reads(way: str, site: Site) -> None:
    """A client that never reads is not counted like one that has read."""
    session = site.session()
    with site.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(BIG[way], session))
        wait_until_opened(site, session)
    (sent,) = site.sent(session)
    assert 0 <= sent <= LONG_BYTES
    if site.setup.notices_leaving:
        assert sent < LONG_BYTES


def wait_until_opened(site: Site, session: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not site.opened(session):
        assert time.monotonic() < deadline, site.log()
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["wrapper", "generator", "flask"])
def test_stalled_client_is_counted(way: str, site: Site) -> None:
    """A client that stalls and goes on is counted to the byte."""
    session = site.session()
    with site.client(buffer=SMALL_BUFFER) as client:
        client.request("GET", play(f"/{way}/film.mp4", session))
        taken = client.read_some(TASTE)
        stall(client)
        taken += len(client.read_rest())
    assert taken == FILM_BYTES
    assert site.sent(session) == [FILM_BYTES]


def stall(client: Client) -> None:
    """Read nothing until nothing more comes: the server has filled what lies between, and waits."""
    before, now = -1, client.kernel_bytes()
    while now != before:
        time.sleep(0.1)
        before, now = now, client.kernel_bytes()
    # On a busy machine the last acknowledgement may be late, and the reset of a client that leaves would replace it.
    until(
        lambda: any(
            row.info is not None and 0 <= row.info.acked - now <= 1 for row in dump([client.port]).values()
        ),
        5,
    )


def test_one_close_line_per_response(site: Site) -> None:
    """After all tests of this file, no response has two close lines."""
    assert {session: often for session, often in Counter(site.closes()).items() if often != 1} == {}
