"""The stand-in, asked over sockets as a client of TwentyThree's API would."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
import requests
from werkzeug.test import Client

import t23_middleware
from t23_middleware.errors import UsageError
from t23_middleware.ops.standin import StandIn, StandInServer
from t23_middleware.ops.standin_faults import FAULT_KINDS

PLAY = "/api/analytics/report/play"
DOWNLOAD = "/api/analytics/report/download"
WAIT = 20
GONE = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


class Clock:
    """Epoch seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.5

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(clock: Clock) -> Iterator[StandInServer]:
    with StandInServer(unknown_photos=["404"], clock=clock) as server:
        yield server


def report(**changes: Any) -> dict[str, str]:
    fields = {
        "photo_id": "7190971",
        "session_id": "5f0c7d2e",
        "seesion_id": "5f0c7d2e",
        "bytes_total": "1048576",
        "skip": "0",
        "format": "json",
        "raw": "1",
        "time": "1790000000500",
    }
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not None}


def post(api: StandInServer, path: str = PLAY, *, cookies: Any = None, **changes: Any) -> requests.Response:
    with session() as client:
        return client.post(
            api.url + path, report(**changes), cookies=cookies, timeout=WAIT, allow_redirects=False
        )


def get(api: StandInServer, path: str = PLAY, **changes: Any) -> requests.Response:
    with session() as client:
        return client.get(api.url + path, params=report(**changes), timeout=WAIT)


def session() -> requests.Session:
    client = requests.Session()
    client.trust_env = False
    return client


def control(method: str, url: str, **options: Any) -> requests.Response:
    with session() as client:
        return client.request(method, url, timeout=WAIT, **options)


def later(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Runs `call` in a thread; its value, or its exception, is put into the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


# The documented manners


@pytest.mark.parametrize("path", [PLAY, DOWNLOAD])
def test_posted_report_is_recorded(api, clock, path):
    """A posted report is answered and recorded, under either name of the API method."""
    answer = post(
        api, path, user_player_type="html5", user_player_version="2.1", user_player_resolution="1920x1080"
    )
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    host = f"127.0.0.1:{api.port}"
    assert answer.json() == {
        "status": "ok",
        "message": "The download was reported",
        "permission_level": "anonymous",
        "cached": "0",
        "report": {},
        "p": "1",
        "size": "1",
        "site": {"domain": host, "secure_domain": host},
        "endpoint": path,
    }
    facts = {"received": clock.now, "method": "POST", "path": path, "host": host, "cookies": {}}
    players = {
        "user_player_type": "html5",
        "user_player_version": "2.1",
        "user_player_resolution": "1920x1080",
    }
    assert api.recorded() == [report() | players | facts]


def test_get_report_is_recorded(api):
    """A report by GET counts like one by POST."""
    assert get(api).json()["status"] == "ok"
    assert [row["method"] for row in api.recorded()] == ["GET"]


def test_the_default_answer_is_the_documented_xml(api):
    answer = post(api, format=None, raw=None)
    assert answer.headers["Content-Type"] == "text/xml; charset=utf-8"
    assert answer.text == (
        '<response status="ok" permission_level="anonymous" message="The download was reported" cached="0"/>'
    )


def test_json_without_raw_sets_variable(api):
    """JSON without ``raw`` is JavaScript that sets a variable."""
    text = post(api, raw=None).text
    assert text.startswith("var visual = {") and text.endswith("};")
    assert json.loads(text[len("var visual = ") : -1])["status"] == "ok"
    assert post(api, raw=None, time="2", varname="mine").text.startswith("var mine = {")


def test_json_with_callback_calls_it(api):
    """JSON with a callback is JavaScript that calls it."""
    text = post(api, raw=None, callback="jQuery.cb_1").text
    assert text.startswith("jQuery.cb_1({") and text.endswith("});")


def test_invalid_javascript_name_ignored(api):
    """A callback or variable name that is not a valid name never gets into the JavaScript."""
    text = post(api, raw=None, callback="alert(1);x", varname="a b").text
    assert text.startswith("var visual = {") and "alert" not in text


def test_the_query_is_ignored_on_post(api):
    with session() as client:
        answer = client.post(
            api.url + PLAY, params=report(), data={"format": "json", "raw": "1"}, timeout=WAIT
        )
    assert answer.json()["code"] == "invalid_input"
    assert api.recorded() == []


def test_a_json_body_is_not_a_form(api):
    with session() as client:
        answer = client.post(api.url + PLAY, json=report(), timeout=WAIT)
    assert ElementTree.fromstring(answer.text).get("code") == "invalid_input"
    assert api.recorded() == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"photo_id": None}, "photo_id"),
        ({"photo_id": ""}, "photo_id"),
        ({"photo_id": "71x"}, "photo_id"),
        ({"photo_id": "٧"}, "photo_id"),
        ({"photo_id": "7" * 5000}, "photo_id"),
        ({"bytes_total": None}, "bytes_total"),
        ({"bytes_total": "-1"}, "bytes_total"),
        ({"bytes_total": "1.5"}, "bytes_total"),
        ({"session_id": None, "seesion_id": None}, "session_id"),
        ({"session_id": "", "seesion_id": ""}, "session_id"),
        ({"skip": "2"}, "skip"),
        ({"skip": ""}, "skip"),
        ({"format": "yaml"}, "format"),
    ],
)
def test_invalid_parameter_is_refused(api, changes, name):
    """A missing or malformed parameter is refused by its name, with HTTP 200."""
    answer = post(api, **changes)
    assert answer.status_code == 200
    if changes.get("format"):
        said = ElementTree.fromstring(answer.text).attrib
    else:
        said = answer.json()
        assert said["endpoint"] == PLAY
    assert (said["status"], said["code"], said["permission_level"]) == ("error", "invalid_input", "anonymous")
    assert f"parameter {name} " in said["message"]
    assert api.recorded() == []


def test_recommendations_are_not_required(api):
    """A report that ignores what the API's page only recommends or makes optional is not refused."""
    assert post(api, skip=None, user_player_type="vlc", bytes_total="0").json()["status"] == "ok"
    assert api.recorded()[0]["user_player_type"] == "vlc"


@pytest.mark.parametrize("spelling", ["session_id", "seesion_id"])
def test_either_spelling_of_the_session_is_enough(api, spelling):
    other = {"session_id": "seesion_id", "seesion_id": "session_id"}[spelling]
    assert post(api, **{other: None}).json()["status"] == "ok"
    assert other not in api.recorded()[0]


def test_session_from_chosen_cookie():
    """The session may come in the cookie of the configured name, but not in another cookie."""
    with StandInServer(cookie="ad_session_id") as api:
        none = {"session_id": None, "seesion_id": None}
        assert post(api, **none, cookies={"session_id": "s1"}).json()["code"] == "invalid_input"
        assert post(api, **none, cookies={"ad_session_id": "s1"}).json()["status"] == "ok"
        assert [row["cookies"] for row in api.recorded()] == [{"ad_session_id": "s1"}]


def test_an_unknown_video_is_no_such_photo(api):
    assert post(api, photo_id="404").json()["code"] == "no_such_photo"
    assert api.recorded() == []


def test_server_not_whitelisted_is_denied():
    """A server that is not whitelisted is denied, whatever it sends."""
    with StandInServer(whitelisted=False) as api:
        assert post(api).json()["code"] == "permission_denied"
        assert post(api, photo_id=None).json()["code"] == "permission_denied"
        assert api.recorded() == []


def test_xml_error_has_code_attribute(api):
    """An error in XML has its code as an attribute."""
    said = ElementTree.fromstring(post(api, format="xml", skip="x").text)
    assert said.tag == "response"
    assert (said.get("status"), said.get("code")) == ("error", "invalid_input")


def test_unknown_api_method_and_path(api):
    """Another API method is an API error with HTTP 200. Any other path is an HTML page with 404."""
    answer = get(api, "/api/photo/list")
    assert (answer.status_code, answer.json()["code"]) == (200, "invalid_method")
    page = get(api, "/video/1")
    assert (page.status_code, page.headers["Content-Type"]) == (404, "text/html; charset=utf-8")


def test_another_http_method_records_nothing(api):
    answer = control("PUT", api.url + PLAY, params=report())
    assert answer.json()["code"] == "invalid_method"
    assert control("HEAD", api.url + PLAY, params=report()).content == b""
    assert api.recorded() == []


def test_xml_error_message_is_escaped(api):
    """The message of an error is escaped in XML."""
    path = "/api/a%22%3Cb%26%27"
    said = ElementTree.fromstring(control("GET", api.url + path).text)
    assert said.get("message") == "There is no method /api/a\"<b&'"


def test_report_not_in_utf8(api):
    """A percent-encoded value that is not UTF-8 is recorded escaped; bare bytes that are not UTF-8 are refused."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    escaped, bare = (
        b"photo_id=1&bytes_total=1&session_id=%ff%fe",
        b"photo_id=1&bytes_total=1&session_id=\xff\xfe",
    )
    with session() as client:
        answers = [
            client.post(api.url + PLAY, data, headers=kind, timeout=WAIT).text for data in (escaped, bare)
        ]
    assert 'status="ok"' in answers[0]
    assert 'code="invalid_input"' in answers[1]
    assert [row["session_id"] for row in api.recorded()] == ["%FF%FE"]


# The cache


def test_cache_answers_within_30_minutes(api, clock):
    """The same request within 30 minutes is answered from the cache and not recorded."""
    first = post(api).json()
    clock.now += 1799
    again = post(api).json()
    assert again == first | {"cached": "1", "cache_time": "1790000000"}
    assert len(api.recorded()) == 1


def test_cache_expires_after_30_minutes(api, clock):
    """The same request after 30 minutes is recorded again."""
    post(api)
    clock.now += 1800
    assert post(api).json()["cached"] == "0"
    assert post(api).json()["cached"] == "1"
    assert len(api.recorded()) == 2


@pytest.mark.parametrize(
    "change",
    [{"time": "2"}, {"path": DOWNLOAD}, {"session_id": "other"}, {"bytes_total": "2"}, {"format": "xml"}],
)
def test_cache_misses_different_request(api, change):
    """A request that differs in any parameter, or in the path, is recorded."""
    post(api)
    assert "1" not in re.findall(r'cached"?[=:] ?"(.)"', post(api, **change).text)
    assert len(api.recorded()) == 2


def test_cache_misses_other_method_or_cookie(api):
    """A request by the other HTTP method, or with another cookie, is recorded."""
    none = {"session_id": None, "seesion_id": None}
    post(api, **none, cookies={"session_id": "s1"})
    post(api, **none, cookies={"session_id": "s2"})
    post(api)
    get(api)
    assert len(api.recorded()) == 4


def test_an_error_is_never_cached(api):
    api.fault("deny", count=1, record=False)
    assert post(api).json()["code"] == "permission_denied"
    assert post(api).json()["cached"] == "0"
    assert len(api.recorded()) == 1


def test_cached_xml_has_cache_time(api):
    """A cached answer in XML has the time since when it is cached."""
    post(api, format="xml")
    said = ElementTree.fromstring(post(api, format="xml").text)
    assert (said.get("status"), said.get("cached"), said.get("cache_time")) == ("ok", "1", "1790000000")


# What was recorded


def test_recorded_reports_shown_and_deleted(api):
    """The recorded reports are shown as JSON and deleted on request, with the cache."""
    post(api)
    post(api, time="2", cookies={"session_id": "c"})
    shown = control("GET", api.url + "/_recorded")
    assert shown.json() == api.recorded()
    assert [row["time"] for row in shown.json()] == ["1790000000500", "2"]
    assert shown.json()[1]["cookies"] == {"session_id": "c"}
    assert control("DELETE", api.url + "/_recorded").status_code == 204
    assert api.recorded() == []
    assert post(api).json()["cached"] == "0"
    assert control("POST", api.url + "/_clear").status_code == 204
    assert control("GET", api.url + "/_recorded").json() == []


def test_parameter_cannot_forge_facts(api, clock):
    """A parameter can't replace what the stand-in itself records of the request: time, method, path, host, cookies."""
    with session() as client:
        posed = report(host="evil", path="/", received="0", method="GET")
        posed["cookies"] = "{}"
        client.post(api.url + PLAY, posed, cookies={"a": "b"}, timeout=WAIT)
    row = api.recorded()[0]
    assert (row["method"], row["path"], row["cookies"]) == ("POST", PLAY, {"a": "b"})
    assert row["received"] == clock.now
    assert row["host"] == f"127.0.0.1:{api.port}"


def test_recorded_reports_are_limited():
    """Beyond the limit the oldest report is dropped. A header has their number, and one line is printed."""
    lines: list[str] = []
    with StandInServer(limit=2, print_line=lines.append) as api:
        for number in range(4):
            post(api, time=str(number))
        assert [row["time"] for row in api.recorded()] == ["2", "3"]
        assert control("GET", api.url + "/_recorded").headers["T23-Dropped"] == "2"
    assert [line for line in lines if "oldest are dropped" in line] == [
        "More than 2 reports: the oldest are dropped from now on."
    ]


def test_one_can_wait_for_reports(api):
    thread, outcome = later(lambda: api.wait_for(1, WAIT))
    post(api)
    thread.join(WAIT)
    assert outcome == [api.recorded()]
    with pytest.raises(TimeoutError, match="1 of 2 reports"):
        api.wait_for(2, 0.01)


# Faults


def test_fault_set_shown_and_healed(api):
    """A fault is set by form or JSON, shown, and removed."""
    faults = api.url + "/_faults"
    assert control("GET", faults).json() == []
    shown = [{"kind": "status", "record": False, "count": 3, "status": 429, "retry_after": "7"}]
    form = {"kind": "status", "count": "3", "status": "429", "retry_after": "7"}
    assert control("POST", faults, data=form).json() == shown
    assert post(api).status_code == 429
    assert control("GET", faults).json() == [shown[0] | {"count": 2}]
    assert control("POST", faults, json={"kind": "deny", "record": True}).json() == [
        {"kind": "deny", "record": True}
    ]
    assert control("DELETE", faults).json() == []
    assert post(api).json()["status"] == "ok"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "No fault of kind ''"),
        ({"kind": "flood"}, "No fault of kind 'flood'; kinds are refuse, hang"),
        (
            {"kind": "deny", "status": "503"},
            "The fault deny takes no 'status', only count, record, photo_id.",
        ),
        (
            {"kind": "deny", "count": "0"},
            "The fault's count can't be '0'; it is a number of requests from 1.",
        ),
        ({"kind": "deny", "record": "maybe"}, "it is true or false"),
        ({"kind": "status", "status": "99"}, "it is an HTTP status from 200 to 599"),
        ({"kind": "latency", "seconds": "nan"}, "it is a number of seconds"),
        ({"kind": "status", "location": "x\r\nSet-Cookie: y"}, "it is printable ASCII"),
    ],
)
def test_invalid_fault_keeps_former_one(api, asked, said):
    """A fault that does not exist, or has a wrong value, is refused with the reason. The former fault stays."""
    api.fault("html")
    answer = control("POST", api.url + "/_faults", data=asked)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert api.app.faults.fault is not None and api.app.faults.fault.kind == "html"


@pytest.mark.parametrize("body", [b"[]", b"{", b'"deny"', b"\xff"])
def test_fault_not_a_json_object(api, body):
    """A fault in JSON that is not a JSON object is refused."""
    answer = control("POST", api.url + "/_faults", data=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "error" in answer.json()) == (400, True)


def test_fault_in_code_is_checked(api):
    """A fault that is set in code is checked like one that is set over HTTP."""
    with pytest.raises(UsageError, match="takes no 'secondz'"):
        api.fault("slow", secondz=1)


@pytest.mark.parametrize("kind", list(FAULT_KINDS))
def test_faults_spare_control_paths(api, kind):
    """No fault changes the answers of the control paths or pages."""
    api.fault(kind)
    assert control("GET", api.url + "/_recorded").json() == []
    assert control("GET", api.url + "/_faults").json()[0]["kind"] == kind
    assert control("GET", api.url + "/").status_code == 404
    assert control("DELETE", api.url + "/_faults").json() == []
    assert post(api).json()["status"] == "ok"


def test_fault_with_a_count(api):
    """A fault with a count affects only that number of reports."""
    api.fault("status", count=2)
    assert [post(api).status_code for _ in range(4)] == [503, 503, 200, 200]
    assert len(api.recorded()) == 1


def test_fault_of_one_video(api):
    """A fault of one video does not affect the reports of other videos."""
    api.fault("error", photo_id=13, code="odd_code", count=1)
    assert post(api).json()["status"] == "ok"
    assert post(api, photo_id="13").json()["code"] == "odd_code"
    assert post(api, photo_id="13").json()["status"] == "ok"


@pytest.mark.parametrize("kind", ["status", "html", "deny", "error", "refuse", "cached"])
@pytest.mark.parametrize("record", [False, True])
def test_fault_may_record_the_report(api, kind, record):
    """A report that is answered with a fault is recorded if the fault has ``record``; its retry is then cached."""
    api.fault(kind, count=1, record=record)
    try:
        post(api)
    except requests.ConnectionError:
        assert kind == "refuse"
    assert len(api.recorded()) == record
    # the retry of a report that had arrived after all is told so
    assert post(api).json()["cached"] == str(int(record))
    assert len(api.recorded()) == 1


def test_fault_records_no_malformed_report(api):
    """A malformed report is not recorded, also while a fault is set."""
    api.fault("latency", seconds=0)
    assert post(api, bytes_total="x").json()["code"] == "invalid_input"
    assert api.recorded() == []


def test_refuse_resets_the_connection(api):
    api.fault("refuse")
    with socket.create_connection(("127.0.0.1", api.port), WAIT) as connection:
        connection.sendall(b"GET " + PLAY.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(requests.ConnectionError):
        post(api)
    assert api.recorded() == []


def test_stop_and_start_keep_reports(api):
    """A stopped stand-in refuses connections. Started again, it has the same port and reports."""
    post(api)
    url = api.url
    api.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", api.port), WAIT)
    api.start()
    assert api.url == url
    assert post(api).json()["cached"] == "1"
    assert len(api.recorded()) == 1


def test_hang_disconnects_when_healed(api):
    """``hang`` gives no answer until the fault is removed, and then closes the connection."""
    api.fault("hang")
    with session() as client, pytest.raises(requests.ReadTimeout):
        client.post(api.url + PLAY, report(), timeout=(WAIT, 0.2))
    thread, outcome = later(lambda: post(api))
    api.fault("hang")
    thread.join(0.2)
    api.heal()
    thread.join(WAIT)
    assert isinstance(outcome[0], requests.ConnectionError)
    assert api.recorded() == []
    assert post(api).json()["cached"] == "0"


def test_hang_answers_recorded_report(api):
    """``hang`` answers a report that was recorded when the fault is removed."""
    api.fault("hang", record=True)
    thread, outcome = later(lambda: post(api).json())
    api.wait_for(1, WAIT)
    assert outcome == []
    control("DELETE", api.url + "/_faults")
    thread.join(WAIT)
    assert outcome[0]["status"] == "ok"


def test_stop_ends_hanging_requests(clock):
    """Stopping ends the requests that hang and leaves no thread."""
    before = set(threading.enumerate())
    with StandInServer(clock=clock) as api:
        api.fault("hang", record=True)
        thread, outcome = later(lambda: post(api))
        api.wait_for(1, WAIT)
    thread.join(WAIT)
    assert isinstance(outcome[0], GONE)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("status", [301, 404, 413, 429, 500, 503])
def test_status_fault_answers_with_status(api, status):
    """``status`` answers with that status, its headers and an HTML page."""
    api.fault("status", status=status, retry_after="120", location="https://elsewhere.example/")
    answer = post(api)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert answer.headers["Retry-After"] == "120"
    assert answer.headers["Location"] == "https://elsewhere.example/"


def test_status_204_without_body(api):
    """The status 204 has no body and keeps the connection open."""
    api.fault("status", status=204, count=1)
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=WAIT)
    try:
        for status in (204, 200):
            connection.request("GET", PLAY)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
    finally:
        connection.close()


def test_error_fault_code_and_message(api):
    """``error`` answers with the code and message that were set."""
    api.fault("error", code="token_required", message="A <token> is required")
    said = post(api).json()
    assert (said["status"], said["code"], said["message"]) == (
        "error",
        "token_required",
        "A <token> is required",
    )
    assert ElementTree.fromstring(post(api, format="xml").text).get("message") == "A <token> is required"


def test_html_is_a_page_with_http_200(api):
    api.fault("html")
    answer = post(api)
    assert (answer.status_code, answer.text.startswith("<!doctype html>")) == (200, True)


@pytest.mark.parametrize("record", [True, False])
def test_cut_disconnects_in_mid_answer(api, record):
    """``cut`` closes the connection in the middle of the answer."""
    api.fault("cut", record=record, count=1)
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=WAIT)
    try:
        query = "?" + "&".join(f"{name}={value}" for name, value in report().items())
        connection.request("GET", PLAY + query)
        answer = connection.getresponse()
        with pytest.raises(http.client.IncompleteRead) as cut:
            answer.read()
    finally:
        connection.close()
    assert answer.status == 200
    assert cut.value.partial.startswith(b'{"status": "ok"')
    assert len(api.recorded()) == record


def test_huge_fault_answer_size(api):
    """``huge`` sends a correct answer of many megabytes, or of the size that was set."""
    api.fault("huge")
    answer = post(api)
    assert len(answer.content) > 8 * 1024 * 1024
    assert answer.json()["status"] == "ok"
    api.fault("huge", size=100_000)
    assert 100_000 < len(post(api).content) < 101_000
    assert len(api.recorded()) == 1


def test_slow_sends_byte_by_byte(api):
    """``slow`` sends the correct answer byte by byte."""
    api.fault("slow", seconds=0.001)
    with socket.create_connection(("127.0.0.1", api.port), WAIT) as connection:
        query = "&".join(f"{name}={value}" for name, value in report(format="xml").items())
        connection.sendall(f"GET {PLAY}?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        parts = list(iter(lambda: connection.recv(65536), b""))
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    assert ElementTree.fromstring(body).get("status") == "ok"
    assert f"Content-Length: {len(body)}".encode() in head
    assert len(parts) > 5


def test_slow_is_quick_again_once_healed(api):
    api.fault("slow", seconds=3600)
    thread, outcome = later(lambda: post(api).json())
    api.wait_for(1, WAIT)
    api.heal()
    thread.join(WAIT)
    assert outcome[0]["status"] == "ok"


def test_latency_answers_truly_but_late(api):
    api.fault("latency", seconds=0.2)
    started = time.monotonic()
    assert post(api).json()["cached"] == "0"
    assert time.monotonic() - started >= 0.2
    api.fault("latency", seconds=3600)
    thread, outcome = later(lambda: post(api, time="2").json())
    api.wait_for(2, WAIT)
    api.heal()
    thread.join(WAIT)
    assert outcome[0]["status"] == "ok"


def test_cached_claims_the_cache_without_having_recorded(api):
    api.fault("cached", count=1)
    said = post(api).json()
    assert (said["status"], said["cached"], said["cache_time"]) == ("ok", "1", "1790000000")
    assert api.recorded() == []
    assert post(api).json()["cached"] == "0"


# Connections


def test_a_connection_is_kept_for_many_reports(api):
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=WAIT)
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    try:
        connection.connect()
        ours = connection.sock.getsockname()
        for number in range(20):
            connection.request("POST", PLAY, f"photo_id=1&session_id=s&bytes_total={number}", kind)
            assert b'status="ok"' in connection.getresponse().read()
            assert connection.sock.getsockname() == ours
    finally:
        connection.close()
    assert [row["bytes_total"] for row in api.recorded()] == [str(number) for number in range(20)]


def test_many_clients_at_once_lose_nothing(api):
    def send(client_number: int) -> None:
        with session() as client:
            for number in range(25):
                fields = report(session_id=f"s{client_number}", bytes_total=str(number))
                assert client.post(api.url + PLAY, fields, timeout=WAIT).json()["cached"] == "0"

    threads = [later(lambda number=number: send(number)) for number in range(8)]
    for thread, _ in threads:
        thread.join(60)
    assert [outcome for _, outcome in threads] == [[None]] * 8
    rows = api.recorded()
    assert len({(row["session_id"], row["bytes_total"]) for row in rows}) == len(rows) == 200


def test_the_date_is_that_of_its_clock(api):
    assert post(api).headers["Date"] == "Mon, 21 Sep 2026 14:13:20 GMT"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 99999999999999999999", b"413"),
        (b"Content-Length: 262145", b"413"),
        (b"Content-Length: -5", b"400"),
        (b"Transfer-Encoding: chunked", b"411"),
    ],
)
def test_unreadable_body_closes_connection(api, head, status):
    """A body that the stand-in can't read is refused, and the connection is closed."""
    with socket.create_connection(("127.0.0.1", api.port), WAIT) as connection:
        connection.sendall(b"POST " + PLAY.encode() + b" HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] == status
    assert post(api).json()["status"] == "ok"


def test_form_with_too_many_parts(api):
    """A form of too many parts is refused and not recorded."""
    parts = [(f"part{number}", (None, "x")) for number in range(2000)]
    with session() as client:
        assert client.post(api.url + PLAY, files=parts, timeout=WAIT).status_code == 413
    assert api.recorded() == []


def test_a_multipart_form_is_a_form(api):
    parts = [(name, (None, value)) for name, value in report().items()]
    with session() as client:
        assert client.post(api.url + PLAY, files=parts, timeout=WAIT).json()["status"] == "ok"


def test_request_cut_in_mid_body(api):
    """A request that ends in the middle of its body is not recorded."""
    with socket.create_connection(("127.0.0.1", api.port), WAIT) as connection:
        head = b"POST " + PLAY.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n"
        connection.sendall(
            head + b"Content-Type: application/x-www-form-urlencoded\r\n\r\nphoto_id=1&session_id=s"
        )
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert api.recorded() == []


def test_the_app_keeps_to_wsgi():
    client = Client(validator(StandIn()))
    with client.post(PLAY, data=report()) as answer:
        assert answer.get_json()["status"] == "ok"
    with client.get("/_recorded") as answer:
        assert len(answer.get_json()) == 1


# The command


RUN = "import sys; from t23_middleware.ops.standin import run_standin; sys.exit(run_standin(port=int(sys.argv[1])))"


def run(port: int = 0, **environ: str) -> subprocess.Popen[str]:
    path = str(Path(t23_middleware.__path__[0]).parent)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, str(port)],
        env=os.environ | {"PYTHONPATH": path} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    thread, outcome = later(process.stdout.readline)
    thread.join(60)
    assert outcome, "no line within a minute"
    return str(outcome[0])


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]]
)
def test_command_prints_reports_until_signal(signals):
    """The command prints its address, then each report, and ends with 0 at a signal."""
    process = run()
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", line_of(process)).group()
        with session() as client:
            for time_ in ("1", "1", "2"):
                client.post(address + PLAY, report(time=time_, session_id="5f0c7d2e-secret"), timeout=WAIT)
        lines = [line_of(process), line_of(process)]
        for number in signals:
            process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    finally:
        end(process)
    assert (process.returncode, rest, errors) == (0, "", "")
    for line in lines:
        assert re.fullmatch(r"\d\d:\d\d:\d\d video 7190971, session 5f0c…, 1,048,576 bytes, skip 0\n", line)


def test_command_on_ascii_terminal():
    """The command prints reports also on a terminal that supports only ASCII."""
    process = run(PYTHONIOENCODING="ascii")
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", line_of(process)).group()
        with session() as client:
            assert client.post(address + PLAY, report(), timeout=WAIT).json()["status"] == "ok"
        assert "session 5f0c?, " in line_of(process)
    finally:
        end(process)


def test_command_ends_without_reader():
    """The command ends when its output has no reader any more."""
    process = run()
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", line_of(process)).group()
        process.stdout.close()
        # It ends over this very report, as at any end without waiting for answers that are under way.
        with session() as client, suppress(requests.ConnectionError):
            client.post(address + PLAY, report(), timeout=WAIT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("secret", ["ab", "abcd", "\x1b[31mred-alert"])
def test_printed_lines_mask_sessions(secret):
    """No line shows a whole session, or control characters of a terminal."""
    lines: list[str] = []
    with StandInServer(print_line=lines.append) as api:
        post(api, session_id=secret)
        assert api.recorded()[0]["session_id"] == secret
    assert secret not in lines[0] and "\x1b" not in lines[0]


def test_port_in_use(api):
    """A port in use is an error of one sentence, with its remedy."""
    with pytest.raises(UsageError) as told:
        StandInServer("127.0.0.1", api.port).start()
    assert str(told.value) == (
        f"Port {api.port} of 127.0.0.1 is already in use; choose another with --port, or 0 for a free one."
    )


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.7", 0)])
def test_address_not_available(host, port):
    """An address that can't be used is an error that names it."""
    with pytest.raises(UsageError, match=f"can't listen on port {port} of {host} .*; choose another"):
        StandInServer(host, port).start()


def test_served_by_hand_it_answers_until_stopped():
    server = StandInServer().start()
    try:
        assert post(server).json()["status"] == "ok"
    finally:
        server.stop()
    server.stop()
    with pytest.raises(requests.ConnectionError):
        post(server)
