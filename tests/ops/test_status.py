"""``t23-middleware status``: the truth at a glance, whatever else goes on in the folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from t23_middleware.ops import text
from t23_middleware.ops.status import read_status
from t23_middleware.relay.outbox import SQLiteOutbox
from t23_middleware.settings import Settings
from t23_middleware.state import lock_is_held

from ..harness import PATIENCE, lacking, let_others_in, until
from ..relay.test_outbox import as_if_of_version
from ..relay.writers import end, journal, living, start, transfer
from .commands import Site, fits

FIGURES = ("captured", "waiting", "sent", "dead", "lost")


def test_status_zero_before_first_play(site: Site):
    """Before the first play all figures are zero, and the command makes no state folder."""
    status = site.status()
    assert [status[name] for name in FIGURES] == [0, 0, 0, 0, 0]
    assert status["state"] == "idle"
    assert "no state folder yet" in site.run("status").stdout
    assert not site.folder.path.exists()


def test_every_play_is_counted_where_it_is(site: Site):
    site.play(5)
    site.play(2, photo="404")
    site.deliver()
    site.api.fault("deny")
    site.play(3)
    site.deliver()
    status = site.status()
    assert [status[name] for name in FIGURES] == [10, 3, 5, 2, 0]
    assert all(type(status[name]) is int for name in FIGURES)
    screen = site.run("status").stdout
    for name, number in zip(FIGURES, (10, 3, 5, 2, 0), strict=True):
        assert any(line.split()[:2] == [name, str(number)] for line in screen.splitlines()), screen


def test_status_pause_first_with_remedy(site: Site):
    """While the API denies the server, the screen shows the pause first, with its remedy."""
    site.api.fault("deny")
    site.play()
    with site.relay() as relay:
        assert until(lambda: site.status()["state"] == "paused")
        screen = site.run("status").stdout
        assert screen.startswith("Paused since 20")
        assert "whitelist" in screen
        assert f"process {relay.pid}, version" in screen
        assert fits(screen), screen
        since = site.status()["apis"][""]["since"]
    with site.relay():
        assert site.status()["apis"][""]["since"] == since, "another relay, the same pause"
    site.api.heal()
    with site.relay():  # which asks at once
        assert until(lambda: site.status()["state"] == "idle")
    assert site.status()["apis"][""]["state"] == "well"


def test_status_outage_with_reason(site: Site):
    """During an outage, the screen shows when it began and its reason."""
    site.api.fault("status", status=503)
    site.play(6)
    with site.relay():
        assert until(lambda: site.status()["state"] == "failing")
        screen = site.run("status").stdout
        assert "The API is down since 20" in screen
        assert "HTTP 503" in screen
        site.api.heal()
        assert until(lambda: site.status()["state"] == "idle")


def test_status_without_relay(site: Site):
    """Without a relay, the screen shows how one is started: by which command, and by whom."""
    site.play(2)
    assert site.status()["state"] == "no_relay"
    assert "'t23-middleware relay --once' delivers now" in " ".join(site.run("status").stdout.split())
    external = " ".join(site.run("status", T23_RELAY="external").stdout.split())
    assert "with T23_RELAY=external you have to run 't23-middleware relay'" in external


def test_status_unread_journal_bytes(site: Site):
    """Journal lines that no relay has read yet are shown in bytes."""
    site.play(3)
    size = sum(path.stat().st_size for path in site.folder.journals.glob("*.journal"))
    status = site.status()
    assert (status["journal_bytes"], status["captured"]) == (size, 0)
    assert f"{text.size(size)} not read yet" in site.run("status").stdout
    site.deliver()
    assert site.status()["journal_bytes"] == 0


def test_status_open_responses_and_counters(site: Site):
    """Open responses are shown, and the counters of what is not reported."""
    with living(site.folder, digest=site.digest()) as writer, site.relay():
        now = transfer(7, 0).opening._replace(started_ns=0)
        writer.write(now)
        assert until(lambda: site.status()["open_responses"] == 1)
    journal(site.folder, "torn", b"rubbish\n")
    site.deliver()
    assert site.status()["counters"]["journal_torn"] == 1
    assert "journal_torn" in site.run("status").stdout


def test_status_adds_up_during_delivery(site: Site):
    """The figures add up at each read while a relay ingests and delivers."""
    settings = Settings(environ=site.environ)
    with site.relay():
        for _ in range(10):
            site.play(40)
            for _ in range(20):
                stats = read_status(settings).stats
                assert stats.captured == stats.waiting + stats.sent + stats.dead + stats.lost
        assert until(lambda: read_status(settings).stats.sent == 400)


LOOKING_WRITER = """
import sys
from pathlib import Path
from t23_middleware.journal import JournalWriter
from t23_middleware.ops.status import read_status
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder
state = sys.argv[1]
writer = JournalWriter(StateFolder(Path(state)), "0.1.0", "digest")
assert writer.write(b"rubbish\\n")
found = read_status(Settings(environ={"T23_API_URL": "http://127.0.0.1:9", "T23_STATE_DIR": state}))
assert found.journal_bytes > 0
print(writer.name, flush=True)
sys.stdin.read()
"""


def test_status_keeps_writer_lock(site: Site):
    """A writer that has read the status still has its journal's lock, and so counts as alive."""
    site.folder.create()
    process = start(LOOKING_WRITER, str(site.folder.path))
    try:
        name = process.stdout.readline().strip()
        assert lock_is_held(site.folder.journals / f"{name}.lock")
    finally:
        end(process)


def test_watch_shows_it_again_until_ctrl_c(site: Site):
    process = site.start("status", "--watch", "--json")
    try:
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert looks[0]["time"] < looks[1]["time"]
    finally:
        process.kill()
        process.communicate()


def test_status_outbox_not_a_database(site: Site):
    """An outbox that is not a database is an error with a remedy, and its file is not changed."""
    site.folder.create()
    site.folder.outbox.write_bytes(b"this is no database, and long enough to be one" * 100)
    done = site.run("status")
    assert done.returncode == 1
    assert "outbox is corrupt" in done.stderr
    assert site.folder.outbox.read_bytes().startswith(b"this is no database")


def test_status_outbox_of_another_version(site: Site):
    """An outbox of another version is an error. The command does not guess at its content."""
    site.folder.create()
    SQLiteOutbox(site.folder.outbox).close()
    as_if_of_version(99, site.folder.outbox)
    done = site.run("status")
    assert done.returncode == 1
    assert "another version" in done.stderr


def test_status_wrong_settings(site: Site):
    """Wrong settings are named, and the exit code is 2."""
    done = site.run("status", T23_API_URL="nowhere")
    assert done.returncode == 2
    assert "T23_API_URL" in done.stderr


def test_status_uncounted_corrupt_outbox(site: Site):
    """The screen and the JSON show that not all reports of a corrupt outbox could be counted."""
    site.folder.create()
    site.folder.outbox.write_bytes(b"this is no database, and long enough to be one" * 100)
    SQLiteOutbox(site.folder.outbox).close()
    assert "Not all reports of a corrupt outbox could be counted" in site.run("status").stdout
    found = json.loads(site.run("status", "--json").stdout)
    assert "could be counted" in found["text"]
    assert found["counters"] == {"outbox_corrupt": 1, "outbox_uncounted": 1}


def test_commands_disabled_without_api_url(site: Site):
    """Disabled and without a site, ``config`` shows the settings, and each other command names what it lacks."""
    off = {"T23_ENABLED": "0", "T23_API_URL": ""}
    shown = site.run("config", **off)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "T23_ENABLED=0: nothing is counted." in shown.stdout
    unplaced = site.run("config", **off, T23_STATE_DIR="")
    assert "named after the site in T23_API_URL, which is not set" in unplaced.stdout
    for words in (["status"], ["dead", "list"], ["relay", "--once"], ["check"]):
        done = site.run(*words, **off)
        assert done.returncode == 2, words
        assert "T23_API_URL is not set; write the address" in done.stdout + done.stderr


def need_root() -> None:
    if os.geteuid() != 0:
        lacking("only root can be two users")


NOBODY = 65534


def test_status_root_acts_as_owner(site: Site, tmp_path: Path):
    """Root acts as the owner of the folder: no file in it gets another owner."""
    need_root()
    site.play(2)
    site.deliver()
    give_to_nobody(site, tmp_path)
    assert site.status()["captured"] == 2
    assert {path.stat().st_uid for path in site.folder.path.rglob("*")} == {NOBODY}


def give_to_nobody(site: Site, tmp_path: Path) -> None:
    let_others_in(tmp_path)
    for path in (site.folder.path, *site.folder.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def test_status_without_folder_permission(site: Site):
    """A user who may not read the folder gets an error that names the users who may."""
    need_root()
    site.folder.create()
    done = site.python(
        "import contextlib, io, os, sys\n"
        "from t23_middleware.ops import cli, owner, status\n"
        # All is imported that will be needed: nobody may not be able to read where Python lies.
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    cli.main(['status'])\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "sys.exit(cli.main(['status']))"
    )
    assert done.returncode == 2, done.stderr
    assert "belongs to another user; run this as that user, or as root" in done.stderr


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")],
)
def test_sizes_are_told_in_binary_units(number: int, shown: str):
    assert text.size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0 s"), (59, "59 s"), (600, "10 min"), (7200, "2 h"), (864_000, "10 days")]
)
def test_durations_are_told_in_one_unit(seconds: float, shown: str):
    assert text.duration(seconds) == shown


def test_status_watch_does_not_scroll(site: Site):
    """On a terminal, ``--watch`` writes each screen over the former one, without scrolling."""
    with site.on_terminal("status", "--watch") as (process, terminal):
        seen = ""
        while seen.count("Ctrl-C ends") < 2:
            seen += os.read(terminal, 4096).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    # Each screen begins at the top left, and erases what the one before left.
    assert seen.count("\x1b[H") == 2
    assert seen.count("\x1b[J") >= 1
    assert "\x1b[K" in seen
