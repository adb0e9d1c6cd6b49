"""A page in a browser: its width and its light, what it shows, and what is wrong with it.

Screenshots go to the folder ``T23_ARTEFACTS``, or to the test's own.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..players.chromium import Chromium

#: Name -> width in CSS pixels and colour scheme.
LOOKS = {
    "light": (1200, "light"),
    "dark": (1200, "dark"),
    "phone": (400, "light"),
    "phone-dark": (400, "dark"),
}

#: Texts whose contrast with what is behind them is too low (WCAG 2.2, 1.4.3: 4.5 to 1).
PALE = """
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
FAINT = (
    PALE.replace('querySelectorAll("body *")', 'querySelectorAll("path.line, path.bar, .key:not(.open)")')
    .replace('if (!own || element.closest("details:not([open]) > :not(summary)")) continue;', "")
    .replace(
        'ink = element.closest("svg") ? style.fill : style.color',
        'ink = element.matches(".line") ? style.stroke : element.matches(".bar") ? style.fill : style.backgroundColor',
    )
    .replace("light(behind(element))", 'light(behind(element.closest("figure, .card")))')
    .replace("< 4.5", "< 3")
)


class Look:
    """The pages at *address* in a browser of a given width and colour scheme; its pictures are named after it."""

    name = "page"

    def __init__(self, chromium: Chromium, address: str, artefacts: Path) -> None:
        self.driver = chromium.driver
        self.address = address
        self._artefacts = artefacts

    def show(self, path: str, look: str = "light", headers: dict[str, str] | None = None) -> None:
        """Load *path* in that look, with *headers* on each request."""
        self.put_on(look)
        self.command("Network.enable", {})
        self.command("Network.setExtraHTTPHeaders", {"headers": headers or {}})
        self.driver.get("about:blank")
        self.driver.get_log("browser")  # what was said before is another test's
        self.driver.get(self.address + path)

    def put_on(self, look: str, height: int = 900) -> None:
        """Another width and light, for what is shown."""
        width, scheme = LOOKS[look]
        self.command(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        self.command("Emulation.setScrollbarsHidden", {"hidden": True})  # a picture has none
        self.resize(width, height)

    def resize(self, width: int, height: int = 900) -> None:
        """Another size, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", metrics)

    def picture(self, name: str) -> Path:
        """All of the page, as the screen would show it."""
        path = self._artefacts / f"{self.name}-{name}.png"
        shot = self.command("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    @property
    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def complaints(self) -> list[str]:
        """What the console says: errors of the policy, of the network, of anything."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def named(self) -> dict[str, list[str]]:
        """Role -> names, as a screen reader gets them."""
        self.command("Accessibility.enable", {})
        found: dict[str, list[str]] = {}
        for node in self.command("Accessibility.getFullAXTree", {})["nodes"]:
            if not node.get("ignored"):
                name = str(node.get("name", {}).get("value", ""))
                found.setdefault(str(node["role"]["value"]), []).append(name)
        return found

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def focused(self) -> str:
        return str(self.run("return document.activeElement.innerText || document.activeElement.tagName"))

    def command(self, name: str, options: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(name, options)
