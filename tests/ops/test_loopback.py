"""Pages of web sites that the developer has open get nothing from the stand-in, and change nothing there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from t23_middleware.ops.loopback import request_refusal
from t23_middleware.ops.standin import StandInServer

from .test_standin import PLAY, control, post, report

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
#: What marks a request as one that another site's page made; ``PORT`` is the stand-in's.
CROSS_SITE = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:PORT"},
    {"Origin": "http://127.0.0.1:PORT.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Host": "rebound.evil.example:PORT"},
    {"Host": "127.0.0.1.evil.example:PORT"},
    {"Host": "localhost.evil.example", "Origin": "http://localhost.evil.example"},
    {"Host": "0.0.0.0:PORT"},
    {"Host": "127.0.0.1:PORT@evil.example"},
    {"Host": "[2001:db8::1]:PORT"},
]


@pytest.fixture
def api() -> Iterator[StandInServer]:
    with StandInServer() as server:
        yield server


@pytest.mark.parametrize("marks", CROSS_SITE, ids=str)
def test_web_sites_page_gets_nothing(api: StandInServer, marks: dict[str, str]):
    """No report is shown or removed, and no fault is turned on or off."""
    post(api, session_id="of-the-developer")
    api.fault("latency", seconds=0)
    headers = {name: value.replace("PORT", str(api.port)) for name, value in marks.items()}
    for method, path, form in (
        ("GET", "/_recorded", None),
        ("HEAD", "/_faults", None),
        ("POST", "/_faults", {"kind": "deny"}),
        ("POST", "/_clear", {}),
        ("DELETE", "/_recorded", None),
        ("DELETE", "/_faults", None),
    ):
        answer = control(method, api.url + path, data=form, headers=headers)
        assert answer.status_code == 403, (method, path)
        assert "of-the-developer" not in answer.text
    assert [row["session_id"] for row in api.recorded()] == ["of-the-developer"]
    fault = api.app.faults.fault
    assert fault is not None and fault.kind == "latency"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:PORT", "Origin": "http://localhost:PORT", "Sec-Fetch-Site": "same-origin"},
        {"Host": "[::1]:PORT"},
        {"Host": "127.0.0.2"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
def test_developer_turns_what_he_likes(api: StandInServer, headers: dict[str, str]):
    sent = {name: value.replace("PORT", str(api.port)) for name, value in headers.items()}
    assert control("POST", f"{api.url}/_faults", data={"kind": "deny"}, headers=sent).status_code == 200
    assert control("GET", f"{api.url}/_recorded", headers=sent).json() == []


def test_short_names_reach_the_api_only():
    """Nobody can own a name without a dot on the internet; whole sessions are shown to this machine only."""
    assert request_refusal({"HTTP_HOST": "standin:8023"}, any_short_name=True) == ""
    assert request_refusal({"HTTP_HOST": "standin:8023"}) != ""
    assert request_refusal({}) != ""


@pytest.mark.parametrize("host", ["rebound.evil.example", "127.0.0.1.evil.example:8023", "192.168.0.7"])
def test_reports_need_a_near_host(api: StandInServer, host: str):
    answer = control("POST", api.url + PLAY, data=report(), headers={"Host": host})
    assert answer.status_code == 403
    assert api.recorded() == []


@pytest.mark.parametrize("size", [64 * 1024 * 1024 + 1, 1 << 40, 0, -1])
def test_huge_answers_have_a_bound(api: StandInServer, size: int):
    answer = control("POST", f"{api.url}/_faults", data={"kind": "huge", "size": size})
    assert answer.status_code == 400
    assert "67108864" in answer.text


@pytest.mark.parametrize("form", ["xml", "json"])
def test_huge_answer_is_sent_in_pieces(api: StandInServer, form: str):
    """Its size is what was asked for, and this process never holds it."""
    import tracemalloc

    tracemalloc.start()
    try:
        api.fault("huge", size=64 * 1024 * 1024)
        answer = control("POST", api.url + PLAY, data=report(format=form), stream=True)
        length = sum(len(piece) for piece in answer.iter_content(65536))
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert length == int(answer.headers["Content-Length"])
    assert 64 * 1024 * 1024 < length < 64 * 1024 * 1024 + 1000
