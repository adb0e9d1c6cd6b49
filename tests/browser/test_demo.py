"""The demo's page in a browser: play and scrub by real input, unplug the API, and see the page tell the story."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..harness import MEDIA, until
from ..ops.demos import Demo, demo, fault
from ..ops.past import MARKUP
from ..players.chromium import Chromium, Page
from .look import FAINT, LOOKS, PALE, Look

#: What the API says; no session is kept in its words, so it is none.
REFUSAL = "<svg onload=\"document.title='run'\"> no such video"
SHOWN_REFUSAL = "… no such video"


class DemoPage(Look):
    """The page, and what it says of itself."""

    name = "demo"

    def __init__(self, chromium: Chromium, demo: Demo, artefacts: Path) -> None:
        super().__init__(chromium, demo.address, artefacts)
        self.demo = demo
        #: The player, for who clicks on its controls.
        self.player = Page(self.driver, demo.address)

    def open(self, look: str = "light") -> DemoPage:
        self.show("/", look)
        self.see(lambda: "press play" in self.words("#state") or self.count("#viewings > li"))
        return self

    def words(self, selector: str) -> str:
        """The text of what *selector* finds, one line each."""
        return str(
            self.run(
                f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText).join('\\n')"
            )
        )

    def count(self, selector: str) -> int:
        return int(self.run(f"return document.querySelectorAll({json.dumps(selector)}).length"))

    def reports(self) -> list[tuple[str, str]]:
        """Skip and state of each report on the page, the latest first."""
        rows = self.run(
            "return [...document.querySelectorAll('#reports > li')]"
            ".map(row => [row.querySelector('.tag').innerText, row.querySelector('.is').innerText])"
        )
        return [tuple(row) for row in rows]

    def bars(self) -> list[Any]:
        """Of this page's viewing each bar: its classes, where it begins and how wide it is, in per cent."""
        bars: list[Any] = self.run(
            "const strip = [...document.querySelectorAll('#viewings > li')]"
            "  .find(item => item.dataset.key.startsWith(document.body.dataset.mine));"
            "return strip ? [...strip.querySelectorAll('.lane i')]"
            "  .map(bar => [bar.className, parseFloat(bar.style.left), parseFloat(bar.style.width)]) : []"
        )
        return bars

    def choose(self, condition: str) -> None:
        """Click on a switch of the API."""
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, f"#api input[value={condition}]").click()
        self.see(lambda: self.demo.state()["api"]["is"] == condition)

    def see(self, true: Any) -> None:
        assert until(true), self.story

    @property
    def story(self) -> str:
        """What the page, its demo and the relay say, for who looks into a failure."""
        return "\n\n".join((self.text, json.dumps(self.demo.state()), self.demo.output, self.demo.relay_log))

    def play_unseen(self, session: str, **query: str) -> None:
        """Somebody else plays the example's clip."""
        asked = urllib.parse.urlencode({"session_id": session, "photo_id": "7", **query})
        self.demo.ask(f"{MEDIA}?{asked}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demo(tmp_path_factory.mktemp("demo") / "demo") as running:
        yield running


@pytest.fixture
def page(chromium: Chromium, site: Demo, artefacts: Path) -> Iterator[DemoPage]:
    """The page in a window without leftovers, its API well; earlier tests' viewings are on it."""
    site.turn("well")
    yield from _in_a_blank_window(chromium, site, artefacts)


@pytest.fixture
def first_page(chromium: Chromium, artefacts: Path, tmp_path: Path) -> Iterator[DemoPage]:
    """The page of a demo of its own, so that every figure on it is the test's."""
    with demo(tmp_path / "demo") as running:
        yield from _in_a_blank_window(chromium, running, artefacts)


def _in_a_blank_window(chromium: Chromium, demo: Demo, artefacts: Path) -> Iterator[DemoPage]:
    chromium.blank_page(demo.address)
    page = DemoPage(chromium, demo, artefacts)
    yield page
    page.player.leave()


def test_play_and_scrubs_are_drawn(first_page: DemoPage):
    """Playing and scrubbing is drawn and reported, with skip 0, then with skip 1."""
    page = first_page.open()
    page.picture("before")
    page.player.click_play()
    page.see(lambda: page.count("#open > li") == 1)
    page.player.watch_for(2)
    [(kind, start, width)] = page.bars()
    assert (kind, start) == ("skip0 open", 0)
    assert 0 < width < 30
    assert not page.player.has(100)
    page.player.scrub_to(100)
    page.see(lambda: ("skip 0", "recorded") in page.reports())
    page.player.watch_for(2)
    page.see(lambda: [bar for bar in page.bars() if bar[0] == "skip1 open" and 60 < bar[1] < 70])
    jumps = page.run(
        "return [...document.querySelectorAll('.jump[data-of]')].map(mark => parseFloat(mark.style.left))"
    )
    assert jumps and all(60 < at < 70 for at in jumps)
    assert page.count("#viewings .head") == 1
    page.picture("scrubbed")
    page.player.scrub_to(60)
    page.see(lambda: ("skip 1", "recorded") in page.reports())
    assert [skip for skip, _ in page.reports()].count("skip 0") == 1
    assert page.complaints() == []


def test_scrub_beyond_loaded_sends_range(page: DemoPage):
    """A scrub beyond the loaded part asks the site by Range. A scrub within it asks for nothing."""
    page.open()
    page.player.click_play()
    page.player.wait_until_it_has(15)
    page.player.scrub_to(12)
    page.player.watch_for(1)
    assert len(page.bars()) == 1
    page.player.scrub_to(110)
    page.see(lambda: len(page.bars()) >= 2)
    started = [bar["first"] for bar in page.demo.state()["viewings"][0]["bars"]]
    assert started[0] == 0
    assert min(started[1:]) > 1_500_000
    assert page.complaints() == []


def test_a_reload_is_a_new_viewing(page: DemoPage):
    page.open()
    page.player.click_play()
    page.player.watch_for(1)
    first = page.player.session
    page.see(lambda: "This page’s viewing" in page.words("#viewings > li:first-child"))
    page.player.reload()
    page.see(lambda: page.count("#viewings > li") >= 1)
    assert page.player.session != first
    assert "This page’s viewing" not in page.words("#viewings")
    page.player.click_play()
    page.player.watch_for(1)
    page.see(lambda: "This page’s viewing" in page.words("#viewings > li:first-child"))
    assert page.bars()[0][0] == "skip0 open"
    assert first[:4] in page.words("#viewings > li:nth-child(2)")
    assert page.complaints() == []


@pytest.mark.parametrize(
    ("condition", "words"), [("deny", "not whitelisted"), ("down", "API is down"), ("hang", "API is down")]
)
def test_queue_fills_and_drains(first_page: DemoPage, condition: str, words: str):
    """With the API off the queue fills, and once the API is back the queue drains."""
    page = first_page.open()
    page.choose(condition)
    for number in range(6):
        page.play_unseen(f"queue-{condition}-{number}")
    page.see(lambda: page.words("#f-waiting") == "6")
    page.see(lambda: words in page.words("#state"))
    assert page.count("#queue > i") == 6, page.story
    assert {state for _, state in page.reports()} <= {"waits", "on its way"}
    page.picture(f"api-{condition}")
    page.choose("well")
    page.see(lambda: page.words("#f-waiting") == "0" and page.words("#queue") == "Empty.")
    page.see(lambda: page.reports() == [("skip 0", "recorded")] * 6)
    assert page.words("#f-sent") == "6"
    assert "relay --once" in page.words("#api-words")
    assert page.complaints() == []


def test_markup_is_shown_as_text(page: DemoPage):
    """Markup in the session, the photo, the user agent or the API's answer is shown as text."""
    page.open()
    page.play_unseen("first")
    page.see(lambda: page.words("#f-sent") != "0")
    fault(page.demo, kind="error", code="no_such_photo", message=REFUSAL)
    page.play_unseen(MARKUP, user_player_type=MARKUP)
    page.demo.ask(
        f"{MEDIA}?session_id={urllib.parse.quote(MARKUP)}&photo_id=8", User_Agent=MARKUP, Referer=MARKUP
    )
    page.see(lambda: ("skip 0", "refused") in page.reports())
    page.see(lambda: SHOWN_REFUSAL in page.words("#reports") and MARKUP[:4] in page.words("#reports"))
    page.see(lambda: MARKUP in page.words("#viewings"))
    page.see(lambda: page.words("#f-dead") != "0")
    assert page.count("main script, main img, #reports svg") == 0
    assert page.driver.title == "Demo · t23_middleware"
    assert page.complaints() == []
    page.picture("markup")
    fault(page.demo)


def test_page_fits_and_is_legible(page: DemoPage):
    """The page is whole and legible in each color scheme and width."""
    page.open("light")
    page.player.click_play()
    page.player.watch_for(1)
    for at in (40, 120, 70, 100):
        page.player.scrub_to(at)
        page.player.watch_for(0.7)
        if at == 120:
            page.choose("down")
    page.see(lambda: page.count("#queue > i") and page.count(".lane i.open"))
    for look, (width, _) in LOOKS.items():
        page.put_on(look)
        assert page.run("return document.documentElement.scrollWidth") <= width, look
        assert page.run(PALE) == [], look
        assert page.run(FAINT) == [], look
        assert page.picture(look).stat().st_size > 10_000
        page.resize(320, 700)
        assert page.run("return document.documentElement.scrollWidth") <= 320, look
    assert page.complaints() == []


def test_keyboard_switches_the_api(page: DemoPage):
    """The keyboard switches the API and reaches every part of the page."""
    from selenium.webdriver.common.keys import Keys

    page.open()
    page.play_unseen("somebody")
    page.see(page.reports)
    reached = []
    for _ in range(20):
        page.press(Keys.TAB)
        reached.append(page.run("return document.activeElement.id || document.activeElement.name"))
        if reached[-1] == "api":
            break
    assert reached[0] == "film"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.see(lambda: page.demo.state()["api"]["is"] == "down")
    assert "unplugged" in page.words("#api-words")
    assert (
        page.run("return getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") != "none"
    )
    page.press(Keys.ARROW_RIGHT)
    page.see(lambda: page.demo.state()["api"]["is"] == "well")
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.id") == "reports"
    assert page.complaints() == []


def test_queue_block_per_waiting_report(first_page: DemoPage):
    """Each report that waits is one block of the queue, also those that ended in the same ms.

    The page does not get the details of the oldest of many.
    """
    page = first_page.open()
    page.run(
        "window.looks = 0; const fetched = window.fetch;"
        "window.fetch = async (path, options) => {"
        "  const state = await (await fetched(path, options)).json();"
        "  for (const report of state.reports) report.at = 1;"
        "  window.looks += 1;"
        "  return new Response(JSON.stringify(state));"
        "};"
    )
    page.choose("down")
    for number in range(33):
        page.play_unseen(f"same-{number}")
    page.see(lambda: page.words("#f-waiting") == "33")
    looks = page.run("return window.looks")
    page.see(lambda: page.run("return window.looks") > looks + 3)
    assert page.count("#queue > i") == 33
    assert page.count("#queue > .skip0") == 30
    assert page.count("#queue > .skip1") == 0
    page.picture("full-queue")


def test_stale_answer_keeps_the_switch(page: DemoPage):
    """An answer that was sent before the switch was changed does not change it back."""
    page.open()
    page.run(
        "window.held = 0; window.stood = []; const fetched = window.fetch;"
        "window.fetch = async (path, options) => {"
        "  const answer = await fetched(path, options);"
        "  if (!path.endsWith('state.json')) return answer;"
        "  window.held += 1; await new Promise(done => setTimeout(done, 1500)); window.held += 1;"
        "  return answer;"
        "};"
        "setInterval(() => window.stood.push(document.querySelector('#api input:checked').value), 10);"
    )
    page.see(lambda: page.run("return window.held % 2"))
    page.choose("down")
    then = page.run("return [window.held, window.stood.length]")
    page.see(lambda: page.run("return window.held") > then[0] + 2)
    assert set(page.run("return window.stood")[then[1] :]) == {"down"}


def test_screen_reader_names_and_news(first_page: DemoPage):
    """A screen reader gets a name for everything, and reports are announced."""
    page = first_page.open()
    page.play_unseen("heard-of")
    page.see(lambda: "Report of 1,188,701 bytes, skip 0, recorded." in page.words("#news"))
    found = page.named()
    for name in ("answers", "refuses", "hangs", "is down"):
        assert name in found["radio"]
    assert "The API" in found["group"]
    assert any(name.startswith("A film to scrub in") for name in found["Video"])
    images = found.get("image", []) + found.get("img", [])
    assert any(name.startswith("Streamed: 0 to 100 % of the file, skip 0") for name in images)
    assert all(images), images
    assert {"main", "contentinfo", "status"} <= set(found)
    assert len(found["heading"]) >= 6
    assert page.run("return document.documentElement.lang") == "en"


def test_reduced_motion_stops_animation(page: DemoPage):
    """Nothing moves for a user who prefers reduced motion."""
    page.open()
    page.player.click_play()
    page.see(lambda: page.count(".lane i.open"))
    moving = "return getComputedStyle(document.querySelector('.lane i.open')).animationName"
    assert page.run(moving) == "flow"
    page.command(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    assert page.run(moving) == "none"


def test_page_shows_ended_demo(chromium: Chromium, artefacts: Path, tmp_path: Path):
    """The page shows that its demo has ended, and later that it was started again."""
    with demo(tmp_path / "demo") as running:
        page = DemoPage(chromium, running, artefacts).open()
        assert page.words("#gone") == ""
    assert until(lambda: "was ended" in page.words("#gone"))
    page.picture("ended")
    with demo(tmp_path / "again", "--port", page.address.rpartition(":")[2]):
        assert until(lambda: "started again" in page.words("#gone"))
        page.player.reload()
        page.see(lambda: page.words("#gone") == "" and "press play" in page.words("#state"))
    page.player.leave()
