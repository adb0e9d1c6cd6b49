"""A viewer in front of Chromium: plays, scrubs, pauses, reloads, downloads; the reports say what was done."""

from __future__ import annotations

from ..harness import until

#: Bytes a second: five times what the film needs, so that most of it is not there when it is sought.
LINK = 600_000
#: Seconds that a viewer stays: what is left at once is no play and no scrub.
STAY = 1.7
#: Where it scrubs to, in seconds: places that the player does not have yet.
FORWARD_AND_BACK = (105, 60)


def skips(reports: list[tuple[int, int]]) -> list[int]:
    return [skip for skip, _ in reports]


def test_viewing_with_two_scrubs(page, site, film):
    """A viewing is one play, and each scrub is one report."""
    page.open(rate=LINK)
    session = page.session
    page.click_play()
    page.watch_for(STAY)
    for place in FORWARD_AND_BACK:
        assert not page.has(place)
        page.scrub_to(place)
        page.watch_for(STAY)
    page.leave()
    reports = site.reports(session)
    # A click lands up to a second beside the place.
    needed = [film.bytes_between(start, start + STAY) for start in (0, *(at + 1 for at in FORWARD_AND_BACK))]
    assert sum(sent for _, sent in reports) >= sum(needed)
    assert skips(reports).count(0) == 1
    if site.is_per_stream:
        assert skips(reports) == [0, 1, 1]
        assert all(sent >= least for (_, sent), least in zip(reports, needed, strict=True))


def test_pause_and_buffered_scrub_unreported(page, site, film):
    """A pause, and a scrub to a place that the player has already, make no report."""
    page.open()
    session = page.session
    page.click_play()
    page.watch_for(1)
    page.click_play()
    paused_at = page.time
    page.wait_until_it_has(20)
    assert page.time - paused_at < 0.2, "the picture stands still, but for the frame that was due"
    page.click_play()
    page.scrub_to(15)
    page.watch_for(STAY)
    page.leave()
    ((skip, sent),) = site.reports(session)
    assert skip == 0
    assert film.bytes_between(0, 20) <= sent <= film.size


def test_reload_with_new_session(page, site, film):
    """A reload with its own session is a play of its own."""
    page.open(rate=LINK)
    sessions = []
    for _ in range(2):
        sessions.append(page.session)
        page.click_play()
        page.watch_for(STAY)
        page.reload()
    assert len(set(sessions)) == 2
    for session in sessions:
        ((skip, sent),) = site.reports(session)
        assert skip == 0
        assert sent >= film.bytes_between(0, STAY)


def test_reload_in_same_session(page, site, film):
    """A reload in the same session is a second play."""
    page.open("/cookie", rate=LINK)
    session = page.session
    for _ in range(2):
        assert page.session == session
        page.click_play()
        page.watch_for(STAY)
        page.reload()
    reports = site.reports(session)
    assert skips(reports).count(0) == 2
    assert sum(sent for _, sent in reports) >= 2 * film.bytes_between(0, STAY)
    if site.is_per_stream:
        assert skips(reports) == [0, 0]


def test_page_download_is_one_report(page, site, film, chromium):
    """A download from the page is one report with exactly its bytes."""
    page.open()
    session = page.session
    page.click_download()
    assert site.reports(session) == [(0, film.size)]
    saved = chromium.downloads / "a-clip-to-play.mp4"
    assert until(lambda: saved.exists() and saved.stat().st_size == film.size)
    assert saved.read_bytes() == film.content
    saved.unlink()
