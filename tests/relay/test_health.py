"""What the relay tells of each API: when it changed and why, and not more often than is worth a write."""

from __future__ import annotations

import pytest

from t23_middleware.relay.health import FAILING, PAUSED, WELL, Health, as_notes, healths, next_health


def test_a_state_lasts_since_it_began_and_its_reason_is_the_latest():
    first = next_health(None, FAILING, "HTTP 503", 0, 1000)
    later = next_health(first, FAILING, "timed out", 0, 9000)
    assert (later.since_ms, later.reason) == (1000, "timed out")
    paused = next_health(later, PAUSED, "not whitelisted", 0, 10_000)
    assert (paused.state, paused.since_ms) == (PAUSED, 10_000)


def test_the_last_answer_outlives_a_failure_and_a_well_api_has_no_reason():
    well = next_health(None, WELL, "an old failure", 500, 600)
    assert well == Health(WELL, "", 600, 500)
    failing = next_health(well, FAILING, "timed out", 500, 5000)
    assert failing.answered_ms == 500
    assert next_health(failing, WELL, "timed out", 7000, 7100) == Health(WELL, "", 7100, 7000)


def test_answers_within_a_second_are_not_worth_a_note():
    well = next_health(None, WELL, "", 1000, 1000)
    assert next_health(well, WELL, "", 1999, 1999) == well
    assert next_health(well, WELL, "", 2000, 2000).answered_ms == 2000


def test_only_what_changed_is_noted_and_it_is_read_back():
    one, other = Health(WELL, "", 1, 2), Health(PAUSED, "why", 3, 0)
    notes = as_notes({"": one, "a.example": other}, {"": one})
    assert list(notes) == ["api:a.example"]
    assert healths({**notes, "open_responses": "3"}) == {"a.example": other}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "7", '["well", "", 1]', '["strange", "", 1, 2]', '["well", 1, 1, 1]']
)
def test_notes_that_can_not_be_read_are_left_out(text: str):
    assert healths({"api:": text}) == {}
