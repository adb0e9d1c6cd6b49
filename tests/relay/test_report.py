from urllib.parse import parse_qs, urlencode

from t23_middleware.relay.report import Report, form

REPORT = Report(1_764_000_000_123, "", "sess/1 +ü", "7190971", 3_221_225_472, 0)


def test_the_form_holds_what_the_documentation_names_and_nothing_else() -> None:
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


def test_the_player_is_told_as_far_as_it_is_known() -> None:
    told = form(REPORT._replace(player_type="html5", player_resolution="1920x1080", skip=1))
    assert told["user_player_type"] == "html5"
    assert told["user_player_resolution"] == "1920x1080"
    assert "user_player_version" not in told
    assert told["skip"] == "1"


def test_an_empty_player_field_is_not_sent() -> None:
    assert "user_player_version" not in form(REPORT._replace(player_version=""))


def test_a_retry_has_the_same_form_and_so_meets_the_apis_cache() -> None:
    assert urlencode(form(REPORT)) == urlencode(form(Report(*REPORT)))


def test_values_that_look_like_parameters_stay_values() -> None:
    sent = parse_qs(urlencode(form(REPORT._replace(session_id="a&bytes_total=1\r\nX: y"))))
    assert sent["session_id"] == ["a&bytes_total=1\r\nX: y"]
    assert sent["bytes_total"] == ["3221225472"]


def test_the_host_is_the_address_and_no_parameter() -> None:
    assert form(REPORT._replace(host="video.example.com")) == form(REPORT)
