"""What the relay tells of each API: when it changed and why, and not more often than is worth a write."""

from __future__ import annotations

import pytest

from t23_middleware.relay.health import FAILING, PAUSED, WELL, Health, as_notes, healths, next_health


def test_state_keeps_start_updates_reason():
    """A state keeps the time at which it began and has the latest reason."""
    first = next_health(None, FAILING, "HTTP 503", 0, 1000)
    later = next_health(first, FAILING, "timed out", 0, 9000)
    assert (later.since_ms, later.reason) == (1000, "timed out")
    paused = next_health(later, PAUSED, "not whitelisted", 0, 10_000)
    assert (paused.state, paused.since_ms) == (PAUSED, 10_000)


def test_last_answer_survives_failure():
    """The time of the last answer survives a failure, and a healthy API has no reason."""
    well = next_health(None, WELL, "an old failure", 500, 600)
    assert well == Health(WELL, "", 600, 500)
    failing = next_health(well, FAILING, "timed out", 500, 5000)
    assert failing.answered_ms == 500
    assert next_health(failing, WELL, "timed out", 7000, 7100) == Health(WELL, "", 7100, 7000)


def test_answers_within_second_not_stored():
    """A further answer within a second is not stored."""
    well = next_health(None, WELL, "", 1000, 1000)
    assert next_health(well, WELL, "", 1999, 1999) == well
    assert next_health(well, WELL, "", 2000, 2000).answered_ms == 2000


def test_only_changes_are_stored():
    """Only what changed is stored, and it is read back."""
    one, other = Health(WELL, "", 1, 2), Health(PAUSED, "why", 3, 0)
    notes = as_notes({"": one, "a.example": other}, {"": one})
    assert list(notes) == ["api:a.example"]
    assert healths({**notes, "open_responses": "3"}) == {"a.example": other}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "7", '["well", "", 1]', '["strange", "", 1, 2]', '["well", 1, 1, 1]']
)
def test_unreadable_notes_are_skipped(text: str):
    """Notes that can't be read are skipped."""
    assert healths({"api:": text}) == {}
