"""The documentation keeps its word: its links lead somewhere, and what it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import t23_middleware
from t23_middleware import Settings
from t23_middleware.ops.cli import main
from t23_middleware.relay.proxy_line import APACHE_LINES, NGINX_LINES
from t23_middleware.settings import setting_fields, variable

from .harness import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
#: Units and configuration files that people copy.
EXAMPLES = sorted(path for path in DOCS.rglob("*") if path.is_file() and path.suffix != ".md")

#: A fenced block, with what stands behind its opening fence.
_FENCE = re.compile(r"^[ ]*(`{3,}|~{3,})(?P<info>[^\n]*)\n.*?^[ ]*\1[ ]*$\n?", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
_VARIABLE = re.compile(r"(?<![A-Z_])T23_[A-Z][A-Z_]*[A-Z]")
_COMMAND = re.compile(r"t23-middleware ([a-z]+)((?: --[a-z-]+)*)")
_ASSIGNMENT = re.compile(r"(T23_[A-Z_]+)=\"?([^\",\s]+)\"?")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def without_wrong_examples(text: str) -> str:
    """*text* without the blocks that are marked ``wrong``: they show what happens to names that are none."""
    return _FENCE.sub(lambda block: "" if "wrong" in block["info"].split() else block[0], text)


def anchors(page: Path) -> set[str]:
    """The fragments of *page*, as GitHub makes them from its headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_fences(page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = (slug if number == 0 else f"{slug}-{number}" for number in range(len(found) + 1))
        found.add(next(name for name in same if name not in found))
    return found


def links(page: Path) -> Iterator[str]:
    """What *page* links to on this disk."""
    text = re.sub(r"(`+)[^`].*?\1", "", without_fences(page.read_text()))
    return (unquote(link) for link in _LINK.findall(text) if not _ELSEWHERE.match(link))


def broken(page: Path) -> Iterator[str]:
    for link in links(page):
        place, _, fragment = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            yield f"{link}: there is no {place}"
        elif fragment and fragment not in anchors(target):
            yield f"{link}: {target.name} has no such heading, only {sorted(anchors(target))}"


def commands(text: str) -> set[tuple[str, str]]:
    """Each command that *text* names, with each option that it gives it."""
    found = set()
    for command, options in _COMMAND.findall(text):
        found.update((command, option) for option in options.split() or [""])
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_headings(page: Path):
    """Every link of a page leads to a file that exists, and to a heading that exists in it."""
    assert list(broken(page)) == []


def test_the_pages_reach_each_other():
    reached = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    lonely = [
        named(path) for path in [*PAGES, *EXAMPLES] if path.is_relative_to(DOCS) and path not in reached
    ]
    assert lonely == [], "no page links to these"


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=named)
def test_named_variables_are_settings(path: Path):
    """Every variable that the pages and examples name is a setting."""
    text = without_wrong_examples(path.read_text())
    known = {variable(item) for item in setting_fields()}
    assert sorted(set(_VARIABLE.findall(text)) - known) == []


def test_the_settings_page_names_every_setting():
    text = (DOCS / "settings.md").read_text()
    named_there = set(_VARIABLE.findall(without_wrong_examples(text)))
    assert sorted({variable(item) for item in setting_fields()} - named_there) == []


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=named)
def test_every_command_that_is_named_exists(path: Path, capsys: pytest.CaptureFixture[str]):
    for command, option in sorted(commands(path.read_text())):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        said = capsys.readouterr()
        assert end.value.code == 0, f"{command}: {said.err}"
        assert option in said.out, f"{command} takes no {option}"


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_what_the_examples_set_is_accepted(path: Path):
    given = dict(_ASSIGNMENT.findall(path.read_text()))
    if not given:
        # What sets nothing takes it from the file that does.
        assert "EnvironmentFile=/etc/t23.env" in path.read_text()
        return
    assert Settings(environ=given).warnings == ()


def counters_of_the_page() -> set[str]:
    page = (DOCS / "counting.md").read_text().partition("\n## Not reported\n")[2]
    rows = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    return {name for row in rows for name in re.findall("`([a-z_]+)`", row)}


def test_counters_table_matches_code():
    """The table of counters lists all counters that the code counts, and no other."""
    source = "".join(path.read_text() for path in Path(t23_middleware.__file__).parent.rglob("*.py"))
    counted = set(re.findall(r'(?:counts\[|NotCounted\()"([a-z_]+)"', source))
    assert {"late", "bad_photo"} <= counted
    assert sorted(counted - counters_of_the_page()) == []
    assert sorted(name for name in counters_of_the_page() if f'"{name}"' not in source) == []


@pytest.mark.parametrize(
    ("lines", "log"),
    [(NGINX_LINES, "/var/log/nginx/t23.log"), (APACHE_LINES, "/var/log/apache2/t23.log")],
    ids=["nginx", "Apache"],
)
def test_proxy_lines_are_the_tested_ones(lines: str, log: str):
    """The configuration lines in the docs for proxies are the lines that the tests use."""
    blocks = [block[0] for block in _FENCE.finditer((DOCS / "nginx.md").read_text())]
    assert [block for block in blocks if lines.replace("{path}", log) in block]


def test_only_wrong_examples_left_out():
    """Examples marked as wrong are left out of the check, and other examples are not."""
    page = "T23_ONE\n```text wrong\nT23_TWO\n```\n```sh\nT23_THREE=1\n```\n"
    assert _VARIABLE.findall(without_wrong_examples(page)) == ["T23_ONE", "T23_THREE"]


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` page?\n[a](#a-b-page) [b](#none) [c](none.md) [d](https://e.x/) `[e](f.md)`\n"
        "```\n# no heading\n[g](h.md)\n```\n[i](#no-heading)\n"
    )
    assert [link.partition(":")[0] for link in broken(page)] == ["#none", "none.md", "#no-heading"]
