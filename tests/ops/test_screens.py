"""What the commands put on a terminal of 80 columns: nothing cut off, and what is to be typed stands as it is typed."""

from __future__ import annotations

import os

import pytest

from t23_middleware.ops import text

from .commands import Site, fits

COMMANDS = ("run", "config", "check", "relay", "status", "dead", "standin", "demo")
HELPS = ([], *([name] for name in COMMANDS), *(["dead", action] for action in ("list", "retry", "purge")))


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_each_help_fits_and_shows_an_example(site: Site, words: list[str]):
    shown = site.run(*words, "--help").stdout
    assert fits(shown), shown
    typed = shown.partition("\nexample")[2].partition(":\n")[2]
    assert " ".join(["t23-middleware", *words]) in typed
    assert all(len(line) <= 80 for line in shown.splitlines()), shown


def on_screen(site: Site, *words: str) -> str:
    """All that the command puts on a terminal of 80 columns, to its end."""
    seen = b""
    with site.on_terminal(*words) as (process, terminal):
        while True:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the terminal's other side is closed
                break
        process.wait()
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["stats"], "did you mean 'status'? See"),
        (["dead", "lost"], "did you mean 'list'? See"),
        (["dead", "retry", "x"], "see 't23-middleware dead retry --help'"),
        (["dead", "retry"], "(t23-middleware dead retry 17 18)"),
        (["status", "--what"], "see 't23-middleware --help'"),
        (["run"], "\n  t23-middleware run gunicorn -w 4 video:app\n"),
        (["run", "bjoern", "shop:app"], "\n  T23_APP=shop:app bjoern t23_middleware.wsgi:application\n"),
        (["run", "gunicorn"], "\n  t23-middleware run gunicorn video:app\n"),
    ],
)
def test_error_shows_remedy_and_fits(site: Site, words: list[str], last: str):
    """An error shows its remedy and breaks no word at the terminal's edge. Elsewhere it is one line."""
    seen = on_screen(site, *words)
    assert last in seen
    assert fits(seen), seen
    piped = site.run(*words)
    assert piped.returncode == 2
    assert piped.stderr.count("\n") == 1, "elsewhere it is one line, for logs and greps"


@pytest.mark.parametrize("words", [[], ["dead"]], ids=["none", "dead"])
def test_missing_command_shows_all(site: Site, words: list[str]):
    """Without a command, all commands are shown, with examples."""
    done = site.run(*words)
    assert done.returncode == 2
    assert "examples:" in done.stderr


def test_wrapping_keeps_quoted_command():
    """A command in quotes is not split over two lines."""
    told = text.wrapped("Nothing is sent, so " + "wait " * 8 + "or 't23-middleware relay --once' now.", 80)
    assert "'t23-middleware relay --once'" in told
    assert max(map(len, told.splitlines())) <= 80


def test_wrapping_keeps_long_path():
    """A path that is longer than the line is not split."""
    path = "/srv/" + "a-long-name/" * 8 + "t23.log"
    told = text.wrapped(f"{path} can be read; no play is in it yet", 80, " " * 17, "ok     proxy     ")
    assert told.splitlines() == [f"ok     proxy     {path}", " " * 17 + "can be read; no play is in it yet"]


def test_dead_list_shows_actions(site: Site):
    """The list of dead reports shows what can be done with them."""
    site.play(1)
    site.deliver()  # a site that has accepted none yet pauses instead
    site.play(2, photo="404")
    site.deliver()
    shown = site.run("dead", "list").stdout
    assert "'t23-middleware dead retry ID' sends a report again" in shown
    assert fits(shown), shown
