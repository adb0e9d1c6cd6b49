from urllib.parse import parse_qs, urlencode

from t23_middleware.relay.report import Report, form

REPORT = Report(1_764_000_000_123, "", "sess/1 +ü", "7190971", 3_221_225_472, 0)


def test_form_has_documented_fields() -> None:
    """The form contains the fields of the API's documentation and nothing else."""
    assert form(REPORT) == {
        "photo_id": "7190971",
        "session_id": "sess/1 +ü",
        "seesion_id": "sess/1 +ü",
        "bytes_total": "3221225472",
        "skip": "0",
        "format": "json",
        "raw": "1",
        "time": "1764000000123",
    }


def test_form_has_known_player_fields() -> None:
    """The form contains those player fields that are known."""
    told = form(REPORT._replace(player_type="html5", player_resolution="1920x1080", skip=1))
    assert told["user_player_type"] == "html5"
    assert told["user_player_resolution"] == "1920x1080"
    assert "user_player_version" not in told
    assert told["skip"] == "1"


def test_an_empty_player_field_is_not_sent() -> None:
    assert "user_player_version" not in form(REPORT._replace(player_version=""))


def test_retry_has_same_form() -> None:
    """A retry has the same form, so the API's cache recognises it."""
    assert urlencode(form(REPORT)) == urlencode(form(Report(*REPORT)))


def test_values_that_look_like_parameters_stay_values() -> None:
    sent = parse_qs(urlencode(form(REPORT._replace(session_id="a&bytes_total=1\r\nX: y"))))
    assert sent["session_id"] == ["a&bytes_total=1\r\nX: y"]
    assert sent["bytes_total"] == ["3221225472"]


def test_host_is_no_form_field() -> None:
    """The host is the address of the request and not a field of the form."""
    assert form(REPORT._replace(host="video.example.com")) == form(REPORT)
