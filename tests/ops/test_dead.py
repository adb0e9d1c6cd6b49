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


def test_the_table_shows_each_with_the_apis_answer_and_no_session(refused: Site):
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


def test_a_retried_report_is_sent_again_with_its_own_time_by_a_relay_that_runs(refused: Site):
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


def test_all_of_them_can_be_retried_and_wait_for_a_relay_where_none_runs(refused: Site):
    done = refused.run("dead", "retry", "--all")
    assert done.stdout.startswith("3 reports wait to be sent again; no relay runs")
    assert (refused.status()["waiting"], refused.status()["dead"]) == (3, 0)
    assert refused.folder.has_work(), "or the app's next start would not bring a relay"
    refused.deliver()
    assert refused.status()["dead"] == 3


def test_purged_reports_count_as_lost_with_their_bytes(refused: Site):
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
def test_an_id_that_is_none_is_named_and_the_others_are_done(refused: Site, action: str):
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
def test_a_session_is_shown_by_its_first_characters_at_most_half_of_it(session: str, shown: str):
    assert masked(session) == shown


def test_erasing_a_viewer_as_the_privacy_page_says_leaves_figures_that_add_up(site: Site):
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
