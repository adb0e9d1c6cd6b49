"""The operator's page in a browser: light, dark and on a phone, by keyboard and for screen readers.

Screenshots go to the folder ``T23_ARTEFACTS``, or to the test's own.
"""

from __future__ import annotations

import base64
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import MEDIA, Server, running, until
from ..ops.pages import TOKEN, basic
from ..ops.past import MARKUP, SESSION, fill
from ..players.chromium import Chromium

#: Name -> width in CSS pixels and colour scheme.
LOOKS = {
    "light": (1200, "light"),
    "dark": (1200, "dark"),
    "phone": (400, "light"),
    "phone-dark": (400, "dark"),
}
_COMMAND = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT examples.flask_app:app"
#: What the API says to what is played here. No session is kept in its words, so it is none.
REFUSAL = "<svg onload=\"document.title='run'\"><b>no such video</b>"
_ARTEFACTS = os.environ.get("T23_ARTEFACTS")

#: Texts whose contrast with what is behind them is too low (WCAG 2.2, 1.4.3: 4.5 to 1).
_PALE = """
const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const light = rgb => .2126 * channel(rgb[0]) + .7152 * channel(rgb[1]) + .0722 * channel(rgb[2]);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const pale = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest("details:not([open]) > :not(summary)")) continue;
  const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(numbers(ink)), light(behind(element))].sort((x, y) => y - x);
  const contrast = (a + .05) / (b + .05);
  if (contrast < 4.5) pale.push([element.tagName, element.textContent.slice(0, 30), contrast]);
}
return pale;
"""
#: Lines, bars and keys that stand out too little from what is behind them (1.4.11: 3 to 1).
_FAINT = (
    _PALE.replace('querySelectorAll("body *")', 'querySelectorAll("path.line, path.bar, .key")')
    .replace('if (!own || element.closest("details:not([open]) > :not(summary)")) continue;', "")
    .replace(
        'ink = element.closest("svg") ? style.fill : style.color',
        'ink = element.matches(".line") ? style.stroke : element.matches(".bar") ? style.fill : style.backgroundColor',
    )
    .replace("light(behind(element))", 'light(behind(element.closest("figure")))')
    .replace("< 4.5", "< 3")
)


class Look:
    """The page in a browser of a given width and colour scheme."""

    def __init__(self, chromium: Chromium, address: str, artefacts: Path) -> None:
        self.driver = chromium.driver
        self._address = address
        self._artefacts = artefacts

    def open(
        self, path: str = "/_t23", *, look: str = "light", header: str | None = basic("ops", TOKEN)
    ) -> Look:
        width, scheme = LOOKS[look]
        scheme_now = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._command("Emulation.setEmulatedMedia", scheme_now)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", metrics)
        self._command("Network.enable", {})
        self._command("Network.setExtraHTTPHeaders", {"headers": {"Authorization": header} if header else {}})
        self.driver.get("about:blank")
        self.driver.get_log("browser")  # what was said before is another test's
        self.driver.get(self._address + path)
        return self

    def picture(self, name: str) -> Path:
        """All of the page, as the screen would show it."""
        path = self._artefacts / f"page-{name}.png"
        shot = self._command("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def fetched(self, authorization: str) -> list[Any]:
        """Status and body of the operator's page, asked for by a script of the page that is open."""
        script = (
            "const [authorization, done] = arguments;"
            "fetch('/_t23', {headers: {authorization}, credentials: 'omit'}).then(async a => done([a.status, await a.text()]))"
        )
        answer: list[Any] = self.driver.execute_async_script(script, authorization)
        return answer

    @property
    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def complaints(self) -> list[str]:
        """What the console says: errors of the policy, of the network, of anything."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def named(self) -> dict[str, list[str]]:
        """Role -> names, as a screen reader gets them."""
        self._command("Accessibility.enable", {})
        found: dict[str, list[str]] = {}
        for node in self._command("Accessibility.getFullAXTree", {})["nodes"]:
            if not node.get("ignored"):
                name = str(node.get("name", {}).get("value", ""))
                found.setdefault(str(node["role"]["value"]), []).append(name)
        return found

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def focused(self) -> str:
        return str(self.run("return document.activeElement.innerText || document.activeElement.tagName"))

    def _command(self, name: str, options: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(name, options)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, StandInServer]]:
    """The example app with its pages, and an hour behind it; the API is down."""
    state = tmp_path_factory.mktemp("site") / "state"
    fill(StateFolder(state), time.time_ns() // 1_000_000)
    with StandInServer() as api:
        api.fault("error", code="no_such_photo", message=REFUSAL)
        with running(_COMMAND, state, api.url, T23_STATUS_TOKEN=TOKEN) as server:
            yield server, api


@pytest.fixture
def page(chromium: Chromium, server: tuple[Server, StandInServer], tmp_path: Path) -> Look:
    artefacts = Path(_ARTEFACTS) if _ARTEFACTS else tmp_path
    artefacts.mkdir(parents=True, exist_ok=True)
    return Look(chromium, f"http://127.0.0.1:{server[0].port}", artefacts)


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_is_whole_and_legible_in_every_light_and_width(page: Look, look: str):
    page.open(look=look)
    assert "Streams open" in page.text
    assert page.complaints() == []
    assert page.run("return document.documentElement.scrollWidth") <= LOOKS[look][0]
    assert page.run(_PALE) == []
    assert page.run(_FAINT) == []
    assert page.picture(look).stat().st_size > 10_000


def test_a_small_phone_need_not_scroll_sideways(page: Look):
    page.open(look="phone")
    page._command(
        "Emulation.setDeviceMetricsOverride",
        {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": True},
    )
    assert page.run("return document.documentElement.scrollWidth") <= 320


def test_the_console_is_heard(page: Look):
    page.open()
    page.run("console.error('of the test')")
    assert any("of the test" in line for line in page.complaints())


def test_the_wrong_token_shows_nothing_and_the_right_one_everything(page: Look):
    for header in (None, f"Bearer {TOKEN[:-1]}x", basic(TOKEN, "")):
        assert "Captured" not in page.open(header=header).text
    page.open("/", header=None)
    assert page.fetched("Bearer wrong") == [
        401,
        "The token is needed: as the password of any user, or as Bearer.\n",
    ]
    status, body = page.fetched(f"Bearer {TOKEN}")
    assert status == 200
    assert "Captured" in body


def test_a_person_gets_in_with_any_name_and_the_token(page: Look):
    page.open("/", header=None)
    address = urllib.parse.urlsplit(page.driver.current_url)
    page.driver.get(f"http://somebody:{TOKEN}@{address.netloc}/_t23")
    assert "Captured" in page.text


def test_markup_from_session_photo_path_agent_and_api_is_text(
    page: Look, server: tuple[Server, StandInServer]
):
    site, _ = server
    quoted = urllib.parse.quote(MARKUP)
    for path in (
        f"{MEDIA}?session_id={quoted}",
        f"{MEDIA}?session_id={quoted}&photo_id={quoted}",
        f"{MEDIA}?session_id=somebody&photo_id=7{quoted}&user_player_type={quoted}",
        f"/{quoted}.mp4?session_id={quoted}&photo_id=1",
    ):
        site.get(path, User_Agent=MARKUP, Referer=MARKUP)
    assert until(lambda: REFUSAL in page.open().text), page.text
    assert MARKUP in page.text
    assert "t23_middleware" in page.driver.title
    assert page.run("return document.querySelectorAll('script, main img, main b:not(li b)').length") == 0
    assert page.complaints() == []
    assert SESSION not in page.run("return document.documentElement.outerHTML")
    page.picture("markup")


def test_all_can_be_reached_and_opened_by_keyboard(page: Look):
    from selenium.webdriver.common.keys import Keys

    page.open()
    reached = []
    for _ in range(12):
        page.press(Keys.TAB)
        reached.append(page.focused())
        if reached[-1].startswith("Counted aside"):
            break
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached
    assert reached[:4] == ["Load now", "Load anew each 30 s", "JSON", "Metrics"]
    assert reached[-1].startswith("Counted aside")
    page.press(Keys.ENTER)
    assert "bad signature" in page.text


def test_a_screen_reader_gets_a_name_for_everything(page: Look):
    found = page.open().named()
    images = found.get("image", []) + found.get("img", []) + found.get("SvgRoot", [])
    charts = [name for name in images if name.startswith("Chart: ")]
    assert len(charts) == len(set(charts)) == 14
    assert all(name for name in images), "each image has a name"
    assert len(found["heading"]) >= 11
    assert {"main", "navigation", "contentinfo", "status"} <= set(found)
    assert "Most bytes" in found["table"]
    assert page.run("return document.documentElement.lang") == "en"


def test_it_loads_itself_anew_where_that_is_wished_and_stops(page: Look):
    from selenium.webdriver.common.by import By

    page.open()
    page.driver.find_element(By.LINK_TEXT, "Load anew each 30 s").click()
    assert page.run("return document.querySelector('meta[http-equiv]').content") == "30"
    page.driver.find_element(By.LINK_TEXT, "Stop loading anew").click()
    assert page.run("return document.querySelector('meta[http-equiv]')") is None
