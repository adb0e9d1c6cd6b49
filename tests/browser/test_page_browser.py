"""The operator's page in a browser: light, dark and on a phone, by keyboard and for screen readers."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import MEDIA, Server, end_relay, running, until
from ..ops.pages import TOKEN, basic
from ..ops.past import MARKUP, SESSION, fill
from ..players.chromium import Chromium
from .look import FAINT, LOOKS, PALE, Look

_COMMAND = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT examples.flask_app:app"
#: What the API says to what is played here. No session is kept in its words, so it is none.
REFUSAL = "<svg onload=\"document.title='run'\"> no such video"
SHOWN_REFUSAL = "… no such video"


class OperatorsPage(Look):
    """The page of whoever knows the token."""

    def open(
        self, path: str = "/_t23/", *, look: str = "light", header: str | None = basic("ops", TOKEN)
    ) -> OperatorsPage:
        self.show(path, look, {"Authorization": header} if header else None)
        return self

    def fetched(self, authorization: str) -> list[Any]:
        """Status and body of the operator's page, asked for by a script of the page that is open."""
        script = (
            "const [authorization, done] = arguments;"
            "fetch('/_t23/', {headers: {authorization}, credentials: 'omit'}).then(async a => done([a.status, await a.text()]))"
        )
        answer: list[Any] = self.driver.execute_async_script(script, authorization)
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, StandInServer]]:
    """The example app with its pages, and an hour behind it; the API is down."""
    state = tmp_path_factory.mktemp("site") / "state"
    fill(StateFolder(state), time.time_ns() // 1_000_000)
    with StandInServer() as api:
        api.fault("error", code="no_such_photo", message=REFUSAL)
        with running(_COMMAND, state, api.url, T23_STATUS_TOKEN=TOKEN) as server:
            yield server, api
            end_relay(server.state)  # by itself it would stay for what the API refuses


@pytest.fixture
def page(chromium: Chromium, server: tuple[Server, StandInServer], artefacts: Path) -> OperatorsPage:
    return OperatorsPage(chromium, f"http://127.0.0.1:{server[0].port}", artefacts)


@pytest.mark.parametrize("look", LOOKS)
def test_page_fits_and_is_legible(page: OperatorsPage, look: str):
    """The page is whole and legible in each color scheme and width."""
    page.open(look=look)
    assert "Streams open" in page.text
    assert page.complaints() == []
    assert page.run("return document.documentElement.scrollWidth") <= LOOKS[look][0]
    assert page.run(PALE) == []
    assert page.run(FAINT) == []
    assert page.picture(look).stat().st_size > 10_000


def test_a_small_phone_need_not_scroll_sideways(page: OperatorsPage):
    page.open(look="phone")
    page.resize(320, 700)
    assert page.run("return document.documentElement.scrollWidth") <= 320


def test_the_console_is_heard(page: OperatorsPage):
    page.open()
    page.run("console.error('of the test')")
    assert any("of the test" in line for line in page.complaints())


def test_wrong_and_right_token(page: OperatorsPage):
    """The wrong token shows nothing, and the right one everything."""
    for header in (None, f"Bearer {TOKEN[:-1]}x", basic(TOKEN, "")):
        assert "Captured" not in page.open(header=header).text
    page.open("/", header=None)
    assert page.fetched("Bearer wrong") == [
        401,
        "This page needs the token (T23_STATUS_TOKEN): as the password of any user, or as Bearer.\n",
    ]
    status, body = page.fetched(f"Bearer {TOKEN}")
    assert status == 200
    assert "Captured" in body


def test_any_name_with_the_token(page: OperatorsPage):
    """A person gets in with any user name and the token as password."""
    page.open("/", header=None)
    address = urllib.parse.urlsplit(page.driver.current_url)
    page.driver.get(f"http://somebody:{TOKEN}@{address.netloc}/_t23/")
    assert "Captured" in page.text


def test_markup_is_shown_as_text(page: OperatorsPage, server: tuple[Server, StandInServer]):
    """Markup in the session, the photo, the path, the user agent or the API's answer is shown as text."""
    site, _ = server
    quoted = urllib.parse.quote(MARKUP)
    for path in (
        f"{MEDIA}?session_id={quoted}",
        f"{MEDIA}?session_id={quoted}&photo_id={quoted}",
        f"{MEDIA}?session_id=somebody&photo_id=7{quoted}&user_player_type={quoted}",
        f"/{quoted}.mp4?session_id={quoted}&photo_id=1",
    ):
        site.get(path, User_Agent=MARKUP, Referer=MARKUP)
    assert until(lambda: SHOWN_REFUSAL in page.open().text), page.text
    assert MARKUP in page.text
    assert "t23_middleware" in page.driver.title
    assert page.run("return document.querySelectorAll('script, main img, main b:not(li b)').length") == 0
    assert page.complaints() == []
    assert SESSION not in page.run("return document.documentElement.outerHTML")
    page.picture("markup")


def test_keyboard_reaches_and_opens_everything(page: OperatorsPage):
    """Everything on the page can be reached and opened by keyboard."""
    from selenium.webdriver.common.keys import Keys

    page.open()
    reached = []
    for _ in range(12):
        page.press(Keys.TAB)
        reached.append(page.focused())
        if reached[-1].startswith("Not reported"):
            break
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached
    assert reached[:4] == ["Refresh now", "Refresh every 30 s", "JSON", "Metrics"]
    assert reached[-1].startswith("Not reported")
    page.press(Keys.ENTER)
    assert "bad signature" in page.text


def test_screen_reader_names_everything(page: OperatorsPage):
    """A screen reader gets a name for everything."""
    found = page.open().named()
    images = found.get("image", []) + found.get("img", []) + found.get("SvgRoot", [])
    charts = [name for name in images if name.startswith("Chart: ")]
    assert len(charts) == len(set(charts)) == 14
    assert all(name for name in images), "each image has a name"
    assert len(found["heading"]) >= 11
    assert {"main", "navigation", "contentinfo", "status"} <= set(found)
    assert "Most bytes" in found["table"]
    assert page.run("return document.documentElement.lang") == "en"


def test_page_refresh_starts_and_stops(page: OperatorsPage):
    """The page refreshes itself when the user chooses that, and stops when the user chooses so."""
    from selenium.webdriver.common.by import By

    page.open()
    page.driver.find_element(By.LINK_TEXT, "Refresh every 30 s").click()
    assert page.run("return document.querySelector('meta[http-equiv]').content") == "30"
    page.driver.find_element(By.LINK_TEXT, "Stop refreshing").click()
    assert page.run("return document.querySelector('meta[http-equiv]')") is None
