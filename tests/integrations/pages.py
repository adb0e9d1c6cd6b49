"""What ``docs/frameworks.md`` tells people to write and to run, taken from the page as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..harness import ROOT

PAGE = ROOT / "docs" / "frameworks.md"

_FENCED = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
#: The first line of a file's block: ``# video.py``, ``; site.ini``, ``# mysite/wsgi.py, at the end``.
_NAME = re.compile(r"[#;] (?P<path>[\w./]+)(?P<more>, at the end)?\n")


class Told(NamedTuple):
    """A command of the page with the files that stand before it in its section."""

    section: str
    number: int
    #: Path -> text, and paths whose text goes behind what is there.
    files: dict[str, str]
    added: dict[str, str]
    command: str

    def __str__(self) -> str:
        return f"{self.section} {self.number}"

    def write_into(self, folder: Path) -> None:
        for path, text in self.files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        for path, text in self.added.items():
            with (folder / path).open("a") as file:
                file.write(f"\n\n{text}")


def told(page: str) -> Iterator[Told]:
    """Every command of *page*, in order."""
    for section in page.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        files: dict[str, str] = {}
        added: dict[str, str] = {}
        number = 0
        for block in _FENCED.finditer(section):
            if block["language"] == "sh":
                number += 1
                yield Told(title, number, dict(files), dict(added), block["text"])
                continue
            name = _NAME.match(block["text"])
            assert name is not None, f"{title}: a block that names no file:\n{block['text']}"
            (added if name["more"] else files)[name["path"]] = block["text"]
