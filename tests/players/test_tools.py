"""Players and downloaders of the command line, and the reports of what they were handed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ..harness import PATIENCE, need, until
from .film import SECONDS
from .test_chromium import skips

#: How each saves the film as film.mp4, whatever its user's own configuration says.
DOWNLOADERS = {
    "curl": "curl -q -sS -o film.mp4 URL",
    "wget": "wget --no-config -q -O film.mp4 URL",
}
#: And how it goes on with what it has.
RESUMING = {"curl": "-C -", "wget": "-c"}

#: Bytes a second of a link on which a download takes its time.
LINK = 2_000_000


def started(command: str, url: str, folder: Path) -> subprocess.Popen[bytes]:
    program, *words = command.replace("URL", url).split()
    return subprocess.Popen([need(program), *words], cwd=folder)


def run(command: str, url: str, folder: Path) -> None:
    process = started(command, url, folder)
    try:
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def interrupt(command: str, url: str, folder: Path, at: int) -> int:
    """Run it until it has saved *at* bytes, and end it; what it then has."""
    saved = folder / "film.mp4"
    process = started(command, url, folder)
    try:
        assert until(lambda: saved.exists() and saved.stat().st_size >= at)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()
    return saved.stat().st_size


@pytest.mark.parametrize("tool", DOWNLOADERS)
def test_whole_download_is_one_report(tool, site, film, folder):
    """A whole download is one report with exactly its bytes."""
    run(DOWNLOADERS[tool], site.url(f"whole-{tool}"), folder)
    assert (folder / "film.mp4").read_bytes() == film.content
    assert site.reports(f"whole-{tool}") == [(0, film.size)]


@pytest.mark.parametrize("tool", DOWNLOADERS)
def test_resumed_download_joins_interrupted_one(tool, site, film, folder):
    """A resumed download belongs to the interrupted one: together they are one play."""
    session = f"resumed-{tool}"
    kept = interrupt(DOWNLOADERS[tool], site.url(session, LINK), folder, at=2 * LINK)
    run(f"{DOWNLOADERS[tool]} {RESUMING[tool]}", site.url(session), folder)
    assert (folder / "film.mp4").read_bytes() == film.content
    reports, rest = site.reports(session), film.size - kept
    handed = site.handed_over(session)
    assert len(handed) == 2 and rest in handed
    cut = sum(handed) - rest
    assert cut >= kept
    assert sorted(reports) == ([(0, cut + rest)] if site.is_per_stream else [(0, cut), (1, rest)])


def test_ffmpeg_decodes_whole_film(site, film, folder):
    """ffmpeg that decodes the whole film is one play with exactly its bytes."""
    run("ffmpeg -nostdin -v error -i URL -f null -", site.url("decoded"), folder)
    assert site.reports("decoded") == [(0, film.size)]


def test_ffmpeg_starts_in_the_middle(site, film, folder):
    """ffmpeg that starts in the middle of the film is one play."""
    run("ffmpeg -nostdin -v error -ss 60 -i URL -f null -", site.url("middle"), folder)
    reports = site.reports("middle")
    assert skips(reports).count(0) == 1
    assert sum(sent for _, sent in reports) >= film.bytes_between(60, SECONDS)
    if site.is_per_stream:
        assert skips(reports) == [0]


def test_parallel_download_is_one_play(site, film, folder):
    """A download over four connections is one play."""
    aria2 = "aria2c --no-conf -q -x4 -s4 -k1M -o film.mp4 URL"
    run(aria2, site.url("parallel", LINK), folder)
    assert (folder / "film.mp4").read_bytes() == film.content
    reports = site.reports("parallel")
    assert skips(reports).count(0) == 1
    assert sum(sent for _, sent in reports) >= film.size
    if site.is_per_stream:
        assert skips(reports) == [0]
