"""``t23-middleware dead``: what the API refused is seen, sent again or thrown away, and the figures add up."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

import pytest

from t23_middleware.ops.text import masked

from ..harness import ROOT, until
from .commands import Site, fits


@pytest.fixture
def refused(site: Site) -> Site:
    """A site with three dead reports and one that was sent."""
    site.play(3, photo="404", session="alice-secret")
    site.play(1)
    assert site.deliver().returncode == 0
    return site


def ids(site: Site) -> list[int]:
    return [each["id"] for each in json.loads(site.run("dead", "list", "--json").stdout)]


def test_dead_list_masks_sessions(refused: Site):
    """The table shows each dead report with the API's answer, and no whole session."""
    shown = refused.run("dead", "list").stdout
    assert shown.splitlines()[0].split() == [
        "ID",
        "SINCE",
        "VIDEO",
        "SESSION",
        "BYTES",
        "SKIP",
        "THE",
        "API'S",
        "ANSWER",
    ]
    assert [line.split()[0] for line in shown.splitlines() if "404" in line] == [
        str(id) for id in ids(refused)
    ]
    assert "no_such_photo: There is no video with this photo_id" in " ".join(shown.split())
    assert fits(shown), shown
    assert "alic…" in shown
    assert "alice-secret" not in shown + refused.run("dead", "list", "--json").stdout


def test_without_dead_reports_it_says_so(site: Site):
    for words in (["list"], ["retry", "--all"], ["purge", "--all"]):
        done = site.run("dead", *words)
        assert (done.returncode, done.stderr) == (0, "")
    assert "No report is dead" in site.run("dead", "list").stdout
    assert json.loads(site.run("dead", "list", "--json").stdout) == []
    assert not site.folder.path.exists()


def test_dead_retry_with_running_relay(refused: Site):
    """A running relay sends a retried report again, with the report's own time."""
    first, *rest = ids(refused)
    (before,) = [
        each for each in json.loads(refused.run("dead", "list", "--json").stdout) if each["id"] == first
    ]
    refused.api.app._unknown_photos = frozenset()
    with refused.relay():
        done = refused.run("dead", "retry", str(first))
        assert done.stdout == "1 report waits to be sent again.\n"
        assert until(lambda: len(refused.api.recorded()) == 2)
        assert until(lambda: refused.status()["sent"] == 2)
    assert ids(refused) == rest
    assert refused.api.recorded()[-1]["time"] == str(round(before["time"] * 1000))
    status = refused.status()
    assert (status["captured"], status["dead"], status["lost"]) == (4, 2, 0)


def test_dead_retry_all_without_relay(refused: Site):
    """``--all`` retries all dead reports. Where no relay runs they wait for one, which the app's next start starts."""
    done = refused.run("dead", "retry", "--all")
    assert done.stdout.startswith("3 reports wait to be sent again; no relay runs")
    assert (refused.status()["waiting"], refused.status()["dead"]) == (3, 0)
    assert refused.folder.has_work(), "or the app's next start would not bring a relay"
    refused.deliver()
    assert refused.status()["dead"] == 3


def test_dead_purge_counts_as_lost(refused: Site):
    """Purged reports count as lost, with their bytes and the reason "purged"."""
    first, *rest = ids(refused)
    with refused.relay():
        done = refused.run("dead", "purge", str(first))
        assert done.stdout == "1 report is deleted and counts as lost (purged).\n"
        done = refused.run("dead", "purge", "--all")
        assert done.stdout == "2 reports are deleted and count as lost (purged).\n"
    status = refused.status()
    assert (status["captured"], status["dead"], status["lost"]) == (4, 0, 3)
    assert status["lost_by_reason"] == {"purged": 3}
    (loss,) = status["losses"]
    assert (loss["reports"], loss["bytes"]) == (3, 300_000)
    assert "purged 3" in refused.run("status").stdout


@pytest.mark.parametrize("action", ["retry", "purge"])
def test_dead_unknown_ids_are_named(refused: Site, action: str):
    """Ids that no dead report has are named, with exit code 1. The other ids are retried or purged."""
    first = ids(refused)[0]
    done = refused.run("dead", action, str(first), "999", "998")
    assert done.returncode == 1
    assert "no dead report has the id 998, 999" in done.stderr
    assert first not in ids(refused)


@pytest.mark.parametrize("words", [["retry"], ["purge"], ["purge", "--all", "7"], ["purge", "x"], []])
def test_what_is_meant_must_be_said(refused: Site, words: list[str]):
    done = refused.run("dead", *words)
    assert done.returncode == 2
    assert len(ids(refused)) == 3


@pytest.mark.parametrize(
    ("session", "shown"), [("alice-0001", "alic…"), ("abcd", "ab…"), ("a", "…"), ("\x1b]0;x", "…")]
)
def test_masked_session_is_at_most_half(session: str, shown: str):
    """A session is shown by its first characters, at most half of it, and without control characters."""
    assert masked(session) == shown


def test_privacy_erasure_keeps_figures_consistent(site: Site):
    """After the statements in docs/privacy.md have erased a viewer, the figures still add up."""
    page = (ROOT / "docs" / "privacy.md").read_text()
    (statements,) = re.findall(r'sqlite3 /var/lib/t23/outbox.db "\n(.+?)"\n', page, re.DOTALL)
    site.prove()
    site.play(2, photo="404", session="alice")
    site.deliver()
    site.api.fault("deny")
    site.play(2, session="alice")
    site.deliver()
    for session in ("alice-0", "alice-2"):
        with closing(sqlite3.connect(site.folder.outbox, isolation_level=None)) as outbox:
            outbox.executescript(statements.replace("alice-0001", session))
    status = site.status()  # which looks whether the figures add up
    assert (status["waiting"], status["dead"], status["lost_by_reason"]) == (1, 1, {"erased": 2})
    assert b"alice-0" not in site.folder.outbox.read_bytes()
