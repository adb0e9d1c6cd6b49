"""Chromium, and a viewer in front of it: who clicks on the player's own controls and sees what it shows."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness import lacking, need, until

_FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required --disable-dev-shm-usage
    --window-size=1280,900
"""
#: Where the controls are, in pixels from the left and from the bottom of the picture.
_PLAY_BUTTON = (24, 48)
_SEEK_BAR = (16, 22)

_LOOK = """
    const video = document.querySelector("video"), ranges = [];
    for (let at = 0; at < video.buffered.length; at++)
        ranges.push([video.buffered.start(at), video.buffered.end(at)]);
    return {time: video.currentTime, length: video.duration, paused: video.paused, has: ranges,
            address: video.src, error: video.error && video.error.message};
"""


class Chromium:
    """Debian's Chromium without a screen, driven by its own driver; profile and downloads are in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self._profile = folder / "profile"
        self.driver = _driver(self._profile, self.downloads)

    def blank_page(self, address: str) -> Page:
        """A page without cookies or cached files, which will visit the site at *address*."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        return Page(self.driver, address)

    def quit(self) -> None:
        """End the browser, and what it would leave behind."""
        self.driver.quit()
        if not until(lambda: not self._processes(), 10):
            for process in self._processes():
                os.kill(process, signal.SIGKILL)

    def _processes(self) -> list[int]:
        """Those that work in this profile."""
        listing = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
        lines = [line.split(None, 1) for line in listing.stdout.splitlines()]
        return [int(line[0]) for line in lines if str(self._profile) in line[-1]]


def _driver(profile: Path, downloads: Path) -> Any:
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        lacking("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = need("chromium")
    for flag in (*_FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    return webdriver.Chrome(options=options, service=Service(need("chromedriver")))


class Page:
    """The example site's page, as its viewer sees it."""

    def __init__(self, driver: Any, address: str) -> None:
        self._driver = driver
        self._address = address

    def open(self, path: str = "/", rate: int | None = None) -> Page:
        """Load it, and slow the link down to *rate* bytes a second."""
        self._driver.get(self._address + path)
        if rate is not None:
            self._driver.add_cookie({"name": "rate", "value": str(rate)})
        return self

    def reload(self) -> None:
        self._driver.refresh()

    def leave(self) -> None:
        """Go elsewhere: the player is gone, and so are its connections."""
        self._driver.get("about:blank")

    @property
    def session(self) -> str:
        """The session that the page gave to the player: in the media's URL, else in the cookie."""
        _, named, rest = str(self._look()["address"]).partition("session_id=")
        return rest.partition("&")[0] if named else str(self._driver.get_cookie("session_id")["value"])

    def click_play(self) -> None:
        """Click on the button that plays and pauses, and see that it does."""
        before = self._look()["paused"]
        self._click(*_PLAY_BUTTON)
        self._see(lambda: self._look()["paused"] is not before)

    def scrub_to(self, seconds: float) -> None:
        """Click on the seek bar, and see the player go there."""
        length = self._look()["length"]
        left, bottom = _SEEK_BAR
        along = (self._video.rect["width"] - 2 * left) * seconds / length
        self._click(left + round(along), bottom)
        self._see(lambda: abs(self.time - seconds) < 1)

    def click_download(self) -> None:
        from selenium.webdriver.common.by import By

        self._driver.find_element(By.CSS_SELECTOR, "a[download]").click()

    def watch_for(self, seconds: float) -> None:
        """Let it play so much from where it is."""
        end = self.time + seconds
        self._see(lambda: self.time >= end)

    def wait_until_it_has(self, seconds: float) -> None:
        """Let it load, playing or not, up to there."""
        self._see(lambda: self.has(seconds))

    def has(self, seconds: float) -> bool:
        """Whether the player has what is to be seen there, so that it need not ask for it."""
        return any(start <= seconds <= end for start, end in self._look()["has"])

    @property
    def time(self) -> float:
        """Where it plays, in seconds."""
        return float(self._look()["time"])

    @property
    def _video(self) -> Any:
        from selenium.webdriver.common.by import By

        return self._driver.find_element(By.TAG_NAME, "video")

    def _click(self, left: int, bottom: int) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        size = self._video.rect
        across, down = left - size["width"] / 2, size["height"] / 2 - bottom
        hand = ActionChains(self._driver, duration=0)
        hand.move_to_element_with_offset(self._video, int(across), int(down)).click().perform()

    def _look(self) -> dict[str, Any]:
        look: dict[str, Any] = self._driver.execute_script(_LOOK)
        assert look["error"] is None, look
        return look

    def _see(self, true: Callable[[], object]) -> None:
        assert until(true), self._look()
