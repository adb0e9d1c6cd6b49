"""How responses are counted, and what drains, as commands and page tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from t23_middleware.relay.outbox import SQLiteOutbox

from .commands import Site
from .pages import TOKEN, basic, serving
from .test_check import items


def noted(site: Site, **notes: str) -> None:
    """What a relay noted."""
    site.folder.create()
    outbox = SQLiteOutbox(site.folder.outbox)
    outbox.note(notes)
    outbox.close()


def counting(site: Site, **environ: str) -> tuple[str, str]:
    return items(site.run("check", **environ).stdout)["counting"]


def test_no_relay_yet_nothing_said(site: Site):
    site.folder.create()
    assert "counting" not in items(site.run("check").stdout)
    assert "counted" not in site.run("status").stdout


def test_kernel_that_can_be_asked(site: Site):
    noted(site, kernel_problem="", writers_elsewhere="0")
    assert counting(site) == (
        "ok",
        "bytes that clients' kernels acknowledged, where the server's socket can be found",
    )
    assert "bytes that clients' kernels acknowledged" in " ".join(site.run("status").stdout.split())


def test_refused_kernel_told_with_remedy(site: Site):
    noted(site, kernel_problem="Address family not supported by protocol", writers_elsewhere="0")
    level, words = counting(site)
    assert level == "warn"
    assert "Address family not supported by protocol" in words
    assert "AF_NETLINK" in words
    assert "Address family not supported" in " ".join(site.run("status").stdout.split())


def test_other_network_told_with_remedy(site: Site):
    noted(site, kernel_problem="", writers_elsewhere="3")
    level, words = counting(site)
    assert level == "warn"
    assert "3 workers are in another network namespace" in words
    assert "network_mode: service:app" in words
    noted(site, writers_elsewhere="1")
    assert "1 worker is in another" in counting(site)[1]


@pytest.mark.parametrize("problem", ["", "T23_ACKED=0", "Operation not permitted"])
def test_switched_off_is_no_warning(site: Site, problem: str):
    noted(site, kernel_problem=problem, writers_elsewhere="1")
    level, words = counting(site, T23_ACKED="0")
    assert (level, words.endswith("(T23_ACKED=0)")) == ("ok", True)


def test_proxy_counts_by_its_log(site: Site, tmp_path: Path):
    noted(site, kernel_problem="T23_PROXY_LOG", writers_elsewhere="0")
    assert "counting" not in items(site.run("check", T23_PROXY_LOG=str(tmp_path / "t23.log")).stdout)
    assert "bytes in the proxy's log" in " ".join(site.run("status").stdout.split())


def test_what_drains_is_shown(site: Site, state: Path):
    noted(site, kernel_problem="", writers_elsewhere="0")
    assert "draining" not in site.run("status").stdout
    assert site.status()["draining"] == 0
    noted(site, draining="1234")
    said = " ".join(site.run("status").stdout.split())
    assert "1,234 are sent but not yet acknowledged by their clients" in said
    assert "responses are draining" in said
    assert site.status()["draining"] == 1234
    with serving(state) as pages:
        page = pages.ask("/_t23/", Authorization=basic("", TOKEN)).body
        metrics = pages.ask("/_t23/metrics", Authorization=basic("", TOKEN)).body
    assert "Draining" in page
    assert "t23_responses_draining 1234.0" in metrics
