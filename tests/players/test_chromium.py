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


def test_a_viewing_is_one_play_and_each_scrub_one_report(page, site, film):
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


def test_a_pause_and_a_scrub_to_what_the_player_has_are_no_reports(page, site, film):
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


def test_a_reload_with_a_session_of_its_own_is_a_play_of_its_own(page, site, film):
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


def test_a_reload_in_the_same_session_is_a_second_play(page, site, film):
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


def test_a_download_from_the_page_is_one_report_with_its_very_bytes(page, site, film, chromium):
    page.open()
    session = page.session
    page.click_download()
    assert site.reports(session) == [(0, film.size)]
    saved = chromium.downloads / "a-clip-to-play.mp4"
    assert until(lambda: saved.exists() and saved.stat().st_size == film.size)
    assert saved.read_bytes() == film.content
    saved.unlink()
