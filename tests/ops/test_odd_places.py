"""Commands in odd places: another user's folder, a damaged one, an output that nobody reads. None ends in a traceback."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from t23_middleware.ops import streams
from t23_middleware.relay.outbox import SQLiteOutbox
from t23_middleware.state import StateFolder

from ..harness import PATIENCE, ROOT, let_others_in, need_root
from .commands import Site

COMMANDS = ["check", "status", "status --json", "dead list", "relay --once", "config", "ingest LOG"]


def made(folder: StateFolder) -> Path:
    """The outbox of a folder as a relay leaves it."""
    folder.create()
    SQLiteOutbox(folder.outbox).close()
    return folder.outbox


def is_file(folder: StateFolder) -> None:
    folder.path.write_text("no folder")


def is_loop(folder: StateFolder) -> None:
    folder.path.symlink_to(folder.path)


def has_fifo(folder: StateFolder) -> None:
    made(folder).unlink()
    os.mkfifo(folder.outbox)


def has_folders(folder: StateFolder) -> None:
    made(folder)
    for path in (folder.relay_lock, folder.unfinished, folder.foreign, folder.reserve):
        path.mkdir()
    (folder.journals / "1-0123456789abcdef.000000.journal").symlink_to("1-0123456789abcdef.000000.journal")


def has_wrong_kinds(folder: StateFolder) -> None:
    """SQLite keeps anything in any column, so one flipped bit may make a figure a text."""
    with sqlite3.connect(made(folder)) as db:
        db.execute("INSERT INTO counters VALUES ('captured', 'many')")
        db.execute("INSERT INTO losses VALUES ('2026-11-29', 'too_old', 'some', x'ff')")
        db.execute(
            "INSERT INTO dead VALUES (1, 'then', 'b', x'ff', 5, 'x', 'y', NULL, NULL, NULL, 'c', x'fe', 'z', 5)"
        )
    db.close()


def has_no_tables(folder: StateFolder) -> None:
    with sqlite3.connect(made(folder)) as db:
        for table in ("proxy", "losses", "dead"):
            db.execute(f"DROP TABLE {table}")
    db.close()


def is_cut(folder: StateFolder) -> None:
    path = made(folder)
    os.truncate(path, path.stat().st_size // 3)


def ended(site: Site, command: str, *before: str, **options: object) -> subprocess.CompletedProcess[str]:
    """*command*, started by *before*; it has ended in good order, whatever it had to say."""
    log = site.folder.path.parent / "t23.log.1"
    log.touch()
    words = command.replace("LOG", str(log)).split()
    done = subprocess.run(
        [*before, sys.executable, "-m", "t23_middleware", *words],
        env={**site.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        text=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=2 * PATIENCE,
        **{"stdout": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )
    said = done.stderr + (done.stdout or "")
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert "bug in t23_middleware" not in said, said
    assert done.returncode in (0, 1, 2), said
    return done  # type: ignore[no-any-return]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "damage", [is_file, is_loop, has_fifo, has_folders, has_wrong_kinds, has_no_tables, is_cut]
)
def test_damaged_folder_is_told(site: Site, damage: Callable[[StateFolder], None], command: str):
    """In a sentence, without waiting for anybody, and never as figures that are none."""
    damage(site.folder)
    done = ended(site, command)
    if damage in (has_fifo, has_wrong_kinds, is_cut) and command in ("status", "status --json", "dead list"):
        assert done.returncode == 1
        assert "outbox" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("above", [0o700, 0o755])
def test_another_user_is_told(site: Site, command: str, above: int):
    """Root's folder, asked for by nobody, who may not enter it, or not even the one above."""
    if os.geteuid() != 0:
        need_root()
    made(site.folder)
    let_others_in(site.folder.path.parent)
    site.folder.path.parent.chmod(above)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if subprocess.run([*user, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this Python can't be run by other users")
    done = ended(site, command, *user)
    if command != "config":
        assert done.returncode != 0, done.stdout


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&-", ">/dev/full", "| true"])
@pytest.mark.parametrize("command", ["check", "status", "dead list", "relay --once", "config", "--help"])
def test_output_that_nobody_reads(site: Site, command: str, redirection: str):
    made(site.folder)
    shell = f'"$@" {redirection}' + ("; exit ${PIPESTATUS[0]}" if "|" in redirection else "")
    done = ended(site, command, "bash", "-c", shell, "command")
    assert done.returncode == (1 if redirection == ">/dev/full" else 0), done.stderr
    if redirection == ">/dev/full":
        assert "No space left on device" in done.stderr


def test_closed_output_is_no_databases_number(site: Site):
    """Else what is printed would go into the file that was opened next."""
    made(site.folder)
    before = site.folder.outbox.read_bytes()[:100]
    ended(site, "status --json", "bash", "-c", '"$@" >&- <&-', "command")
    assert site.folder.outbox.read_bytes()[:100] == before
    assert json.loads(ended(site, "status --json").stdout)["captured"] == 0


def test_fault_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With the place that it comes from, and without its words, in which a session may be."""
    from t23_middleware.ops import cli, config

    def broken(settings: object) -> list[str]:
        raise KeyError("the-session-of-somebody")

    monkeypatch.setenv("T23_API_URL", "http://video.example.com")
    monkeypatch.setattr(config, "lines", broken)
    assert cli.main(["config"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "KeyError at test_odd_places.py:" in said or "KeyError at cli.py:" in said, said
    assert "the-session-of-somebody" not in said


def test_place_of_an_error_is_ours():
    try:
        json.loads("{")
    except ValueError as error:
        assert streams.error_location(error).startswith("JSONDecodeError at ")
