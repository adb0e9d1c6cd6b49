"""The settings: every reader, all problems at once, and what the relay is told."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t23_middleware import ConfigurationError, Settings
from t23_middleware.settings import as_text, setting_fields, variable

URL = "https://video.example.com"


def settings(**arguments: Any) -> Settings:
    return Settings(environ={}, **{"api_url": URL, **arguments})


def from_environment(**variables: str) -> Settings:
    return Settings(environ={"T23_API_URL": URL, **variables})


def problems(environ: dict[str, str] | None = None, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        Settings(environ=environ or {}, **arguments)
    return caught.value.problems


def test_only_address_is_required() -> None:
    """The API's address is the only setting that must be set."""
    assert from_environment().api_url == URL
    assert from_environment().session_param == ("session_id",)


def test_all_problems_reported_at_once() -> None:
    """All problems are reported at once, each with its variable and its remedy."""
    told = problems(
        {
            "T23_API_URL": "video.example.com",
            "T23_HOSTS": "https://a.example.com",
            "T23_REPORT_PATH": "report",
            "T23_REPORT_COOKIE": "two words",
            "T23_ENABLED": "perhaps",
            "T23_SESSION_PARAM": ",",
            "T23_SESSION_COOKIE": " , ",
            "T23_FLASK_SESSION_COOKIE": "a;b",
            "T23_PHOTO_PATTERN": "^/films/([0-9]+)",
            "T23_MEDIA_TYPES": "video",
            "T23_PLAYER_TYPE": "x" * 101,
            "T23_STATE_DIR": "state",
            "T23_RELAY": "sometimes",
            "T23_TIMEOUT": "0",
            "T23_EXIT_SECONDS": "soon",
            "T23_OUTBOX": "redis://cache",
        }
    )
    assert sorted(problem.split()[0] for problem in told) == [
        "T23_API_URL",
        "T23_ENABLED",
        "T23_EXIT_SECONDS",
        "T23_FLASK_SESSION_COOKIE",
        "T23_HOSTS",
        "T23_MEDIA_TYPES",
        "T23_OUTBOX",
        "T23_PHOTO_PATTERN",
        "T23_PLAYER_TYPE",
        "T23_RELAY",
        "T23_REPORT_COOKIE",
        "T23_REPORT_PATH",
        "T23_SESSION_COOKIE",
        "T23_SESSION_PARAM",
        "T23_STATE_DIR",
        "T23_TIMEOUT",
    ]
    for problem in told:
        assert "; write " in problem or "; remove " in problem, problem


def test_missing_address_reported_with_rest() -> None:
    """A missing address is reported together with the other problems."""
    told = problems({"T23_RELAY": "no"})
    assert [problem.split()[0] for problem in told] == ["T23_RELAY", "T23_API_URL"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://video.example.com", "https://video.example.com"),
        ("  https://video.example.com/ ", "https://video.example.com"),
        ("HTTPS://Video.Example.com", "HTTPS://Video.Example.com"),
        ("http://127.0.0.1:8023", "http://127.0.0.1:8023"),
        ("http://[::1]:8023", "http://[::1]:8023"),
        ("http://localhost/base", "http://localhost/base"),
    ],
)
def test_an_address_is_read(text: str, read: str) -> None:
    assert from_environment(T23_API_URL=text).api_url == read


@pytest.mark.parametrize(
    "text",
    [
        "video.example.com",
        "ftp://video.example.com",
        "https://",
        "https://video.example.com?a=b",
        "https://video.example.com#top",
        "https://video.example.com:port",
        "https://video.example.com:70000",
        "https://[::1",
        "https://video example.com",
        "https://video.example\n.com",
        "https://..",
        "https://{hosts}",
    ],
)
def test_invalid_address_refused_with_example(text: str) -> None:
    """An invalid address is refused, and the message gives an example of a valid one."""
    (problem,) = problems({"T23_API_URL": text})
    assert problem.startswith("T23_API_URL ")
    assert "write for example https://video.example.com" in problem


@pytest.mark.parametrize("text", ["https://me:pa55word@video.example.com", "me:pa55word@video.example.com?x"])
def test_password_in_address_refused(text: str) -> None:
    """A password in the address is refused, and the message does not repeat it."""
    (problem,) = problems({"T23_API_URL": text})
    assert "user or password" in problem
    assert "pa55word" not in problem


def test_host_in_the_address_needs_the_hosts() -> None:
    (problem,) = problems({"T23_API_URL": "https://{host}"})
    assert problem.startswith("T23_HOSTS is not set, but T23_API_URL contains {host}; write")


def test_hosts_become_report_address() -> None:
    """Hosts are read in lower case, and a report's address is made from its host."""
    read = from_environment(
        T23_API_URL="https://{host}:8443", T23_HOSTS="Video.Example.com., tv.example.org,"
    )
    assert read.hosts == ("video.example.com", "tv.example.org")
    assert read.per_host
    assert read.report_url("tv.example.org") == "https://tv.example.org:8443/api/analytics/report/play"


@pytest.mark.parametrize(
    "text", ["a.example.com:80", "http://a.example.com", "a b", "vidéo.example.com", "a..b"]
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    (problem,) = problems({"T23_API_URL": URL, "T23_HOSTS": text})
    assert problem.startswith("T23_HOSTS ")
    assert "write names such as" in problem


@pytest.mark.parametrize("text", ["1", "true", "YES", " on ", "True"])
def test_words_that_mean_yes(text: str) -> None:
    assert from_environment(T23_ENABLED=text).enabled is True


@pytest.mark.parametrize("text", ["0", "false", "NO", " off "])
def test_words_that_mean_no(text: str) -> None:
    assert from_environment(T23_ENABLED=text).enabled is False


@pytest.mark.parametrize("text", ["2", "ja", "y", "1.0"])
def test_words_that_mean_neither_are_refused(text: str) -> None:
    (problem,) = problems({"T23_API_URL": URL, "T23_ENABLED": text})
    assert problem == f"T23_ENABLED {text!r} is not a switch; write 1 or 0"


@pytest.mark.parametrize(("text", "read"), [("10", 10.0), ("0.5", 0.5), (" 3 ", 3.0), ("86400", 86400.0)])
def test_seconds_are_read(text: str, read: float) -> None:
    assert from_environment(T23_TIMEOUT=text).timeout == read


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "ten", "10s", "1e9"])
def test_invalid_seconds_refused(text: str) -> None:
    """A value that is not a number of seconds in the allowed range is refused."""
    (problem,) = problems({"T23_API_URL": URL, "T23_TIMEOUT": text})
    assert problem.startswith("T23_TIMEOUT ")


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("report_path", "/api/analytics/report/download", "/api/analytics/report/download"),
        ("report_cookie", "ad_session_id", "ad_session_id"),
        ("session_param", "sid, session_id", ("sid", "session_id")),
        ("session_cookie", "uuid", ("uuid",)),
        ("session_secret", "new,old", ("new", "old")),
        ("media_types", "Video/*,audio/mpeg", ("video/*", "audio/mpeg")),
        ("media_types", "*/*", ("*/*",)),
        ("media_types", "*", ("*/*",)),
        ("media_types", "video/mp4, *", ("video/mp4", "*/*")),
        ("photo_pattern", r"^/films/(?P<photo_id>\d+)", r"^/films/(?P<photo_id>\d+)"),
        ("player_type", "html5", "html5"),
        ("state_dir", "/var/lib/t23", "/var/lib/t23"),
        ("relay", " External ", "external"),
    ],
)
def test_texts_are_read(name: str, text: str, read: object) -> None:
    assert getattr(from_environment(**{f"T23_{name.upper()}": text}), name) == read


@pytest.mark.parametrize("text", ["play", "/a b", "/a?b", "/a#b", "/a\r\nHost: b", "/a\tb"])
def test_what_is_no_path_is_refused(text: str) -> None:
    (problem,) = problems({"T23_API_URL": URL, "T23_REPORT_PATH": text})
    assert problem.startswith("T23_REPORT_PATH ")


@pytest.mark.parametrize("text", ["*/mp4", "video", "video*", "**", "*/", "/*", "video/*mp4", "*/*;q=1"])
def test_what_is_no_type_is_refused(text: str) -> None:
    """What no content type can match is told with what to write."""
    (problem,) = problems({"T23_API_URL": URL, "T23_MEDIA_TYPES": f"video/*,{text}"})
    assert problem.startswith(f"T23_MEDIA_TYPES {text!r} is not a content type")
    assert "*/* for all" in problem


@pytest.mark.parametrize("text", ["(", "(?P<photo>.)", "^/[0-9]+/"])
def test_a_pattern_without_its_group_is_refused(text: str) -> None:
    (problem,) = problems({"T23_API_URL": URL, "T23_PHOTO_PATTERN": text})
    assert problem.startswith("T23_PHOTO_PATTERN ")
    assert "twentythree" in problem


def test_argument_environment_default_precedence() -> None:
    """Arguments win over the environment, and both win over the default."""
    read = Settings(environ={"T23_API_URL": "https://other.example.com", "T23_TIMEOUT": "3"}, api_url=URL)
    assert (read.api_url, read.timeout, read.exit_seconds) == (URL, 3.0, 2.0)
    assert {name: read.sources[name] for name in ("api_url", "timeout", "exit_seconds")} == {
        "api_url": "argument",
        "timeout": "environment",
        "exit_seconds": "default",
    }


def test_empty_argument_wins_over_environment() -> None:
    """An empty argument wins over the environment too."""
    read = Settings(environ={"T23_API_URL": URL, "T23_HOSTS": "a.example.com"}, hosts=())
    assert read.hosts == ()


def test_empty_variable_is_not_set() -> None:
    """A variable that is set to nothing, or to blanks, counts as not set."""
    assert from_environment(T23_TIMEOUT="", T23_STATE_DIR="  ").timeout == 10.0


def test_arguments_may_be_values_or_texts() -> None:
    as_values = settings(hosts=["a.example.com", "b.example.com"], enabled=False, timeout=3)
    as_texts = settings(hosts="a.example.com,b.example.com", enabled="no", timeout="3")
    assert as_values == as_texts


def test_unknown_argument_reported_with_rest() -> None:
    """An argument that is not a setting is reported together with the other problems."""
    told = problems(api_urls=URL)
    assert told[0].startswith("api_urls is not a setting")
    assert told[1].startswith("T23_API_URL is not set")


def test_unknown_variable_warns_with_nearest_name() -> None:
    """An unknown variable gives a warning, with the nearest name of a setting if one is similar."""
    read = from_environment(T23_SESION_PARAM="sid", T23_QQQQ="1", OTHER="1")
    assert read.warnings == (
        "T23_QQQQ is not a setting",
        "T23_SESION_PARAM is not a setting; did you mean T23_SESSION_PARAM?",
    )


def test_shared_outbox_is_refused() -> None:
    (problem,) = problems({"T23_API_URL": URL, "T23_OUTBOX": "redis://cache"})
    assert "not supported yet" in problem
    assert from_environment(T23_OUTBOX="").warnings == ()


def test_secrets_are_not_in_the_representation() -> None:
    read = settings(
        session_secret="key-a,key-b", flask_secret_key="key-c", status_token="key-d-of-the-operator"
    )
    assert "key-" not in repr(read)
    assert [item.name for item in setting_fields() if item.metadata["secret"]] == [
        "session_secret",
        "flask_secret_key",
        "status_token",
    ]


@pytest.mark.parametrize("token", ["fifteen-letters", "sixteen letters and blanks", "sixteen-with-ö-in-it"])
def test_unsafe_status_token_refused(token: str) -> None:
    """A token that can be guessed, or that a header can't carry, is refused with a remedy."""
    (problem,) = problems(api_url=URL, status_token=token)
    assert problem.startswith("T23_STATUS_TOKEN")
    assert "token_urlsafe" in problem
    assert token not in problem


def test_status_path_is_own_path() -> None:
    """The operator's path (T23_STATUS_PATH) must be its own: the root, relative and invalid paths are refused."""
    assert settings(status_path="/ops/t23/").status_path == "/ops/t23"
    for path in ("/", "t23", "/a b", "/a?b", "//", "/ä"):
        (problem,) = problems(api_url=URL, status_path=path)
        assert problem.startswith("T23_STATUS_PATH"), path


def test_secret_key_may_be_bytes() -> None:
    """Flask's key may be given as bytes, as Flask itself allows it."""
    assert settings(flask_secret_key=b"key").flask_secret_key == "key"
    odd = settings(flask_secret_key=b"\xff\x00key").flask_secret_key
    assert odd is not None
    assert odd.encode("utf-8", "surrogateescape") == b"\xff\x00key"


def test_enabled_known_despite_problems() -> None:
    """Whether the middleware is enabled is known even if other settings are wrong."""
    assert Settings.is_enabled({"T23_API_URL": "nonsense"})
    assert Settings.is_enabled({"T23_ENABLED": "nonsense"})
    assert not Settings.is_enabled({"T23_ENABLED": "off"})


def test_app_target_known_despite_problems() -> None:
    """The app's target (T23_APP) is known even if other settings are wrong."""
    assert Settings.app_target({"T23_APP": " video:app "}) == "video:app"
    assert Settings.app_target({"T23_APP": " "}) is None


# The state folder.


def test_state_folder_in_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The state folder is one per site, in the home of the process's user."""
    monkeypatch.setenv("HOME", "/nowhere")  # a server that changed its user leaves root's here
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path)))
    place = tmp_path / ".local" / "state" / "t23-middleware"
    assert settings(api_url="http://Video.example.com:81").state_path() == place / "video.example.com"
    assert settings(api_url="https://{host}", hosts="a.example.com").state_path() == place / "sites"
    assert settings(state_dir="/srv/t23").state_path() == Path("/srv/t23")


def test_state_folder_without_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a usable home gets a state folder in /var/tmp."""
    (tmp_path / "file").touch()
    place = Path(f"/var/tmp/t23-{os.geteuid()}/t23-middleware/video.example.com")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path / "file" / "home")))
    assert settings().state_path() == place

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    assert settings().state_path() == place


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_state_folder_with_closed_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home inside a folder that the user may not enter counts as no home."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path / "app")))
    os.seteuid(65534)
    try:
        assert str(settings().state_path()).startswith("/var/tmp/t23-65534/")
    finally:
        os.seteuid(0)


# What the relay is told.


def test_relay_environment_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay gets the settings that it needs, and no secret."""
    for name in ("DATABASE_PASSWORD", "SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHON_API_TOKEN", "T23_OTHER"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("T23_SESSION_SECRET", "hidden")
    monkeypatch.setenv("T23_FLASK_SECRET_KEY", "hidden")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("PYTHONPATH", "/srv/app")
    told = Settings(api_url=URL, report_cookie="uuid").relay_environment(Path("/srv/t23"))
    assert "hidden" not in told.values()
    assert told["T23_API_URL"] == URL
    assert told["T23_REPORT_COOKIE"] == "uuid"
    assert told["T23_STATE_DIR"] == "/srv/t23"
    assert told["https_proxy"] == "http://proxy:3128"
    assert told["PATH"] == os.environ["PATH"]
    assert not any(name.startswith("PYTHON") for name in told)


relevant = st.fixed_dictionaries(
    {"api_url": st.sampled_from([URL, "https://{host}/", "http://127.0.0.1:80"])},
    optional={
        "hosts": st.just(("a.example.com", "b.example.com")),
        "report_path": st.just("/api/analytics/report/download"),
        "report_cookie": st.just("uuid"),
        "timeout": st.floats(0.001, 999_999_999),
        "exit_seconds": st.floats(0.001, 999_999_999) | st.integers(1, 10**8),
    },
)


@given(relevant)
def test_relay_and_worker_digests_agree(given_: dict[str, Any]) -> None:
    """The relay reads the same settings as the worker, so their digests agree."""
    if "{host}" in given_["api_url"]:
        given_.setdefault("hosts", ("a.example.com",))
    worker = Settings(environ={}, **given_)
    relay = Settings(environ=worker.relay_environment(Path("/srv/t23")))
    assert relay.relay_digest() == worker.relay_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"api_url": "https://other.example.com"},
        {"report_path": "/other"},
        {"report_cookie": "uuid"},
        {"timeout": 11},
        {"exit_seconds": 3},
    ],
    ids=str,
)
def test_digest_changes_with_relay_settings(change: dict[str, Any]) -> None:
    """The digest changes if a setting that affects the relay changes."""
    assert settings(**change).relay_digest() != settings().relay_digest()


@pytest.mark.parametrize(
    "change", [{"session_param": "sid"}, {"session_secret": "key"}, {"relay": "external"}]
)
def test_digest_ignores_capture_settings(change: dict[str, Any]) -> None:
    """The digest stays the same if a setting that affects only capture changes."""
    assert settings(**change).relay_digest() == settings().relay_digest()


def test_every_default_reads_as_itself() -> None:
    for item in setting_fields():
        if item.default is not None:
            assert item.metadata["read"](as_text(item.default)) == item.default or item.default == ()
        assert variable(item) == "T23_" + item.name.upper()


# The proxy's log.


def test_proxy_logs_are_absolute_paths():
    """Proxy logs are absolute paths; each is taken once, and none needs to exist."""
    given = Settings(environ={"T23_API_URL": URL, "T23_PROXY_LOG": "/none/a.log, /none/b.log,/none/a.log"})
    assert given.proxy_log == ("/none/a.log", "/none/b.log")
    assert Settings(environ={"T23_API_URL": URL}).proxy_log == ()


@pytest.mark.parametrize("text", ["t23.log", "/var/log/nginx/", "/var/log/t23.log,other.log"])
def test_invalid_proxy_log_refused(text):
    """A proxy log that is not the absolute path of a file is refused with an example of one that is."""
    with pytest.raises(ConfigurationError, match="T23_PROXY_LOG .* write for example /var/log/nginx/t23.log"):
        Settings(environ={"T23_API_URL": URL, "T23_PROXY_LOG": text})


@pytest.mark.parametrize("name", ["T23_PROXY_LOG", "T23_PROXY_WAIT", "T23_MEDIA_TYPES"])
def test_relay_gets_proxy_settings(name, tmp_path):
    """The settings about the proxy are passed to the relay, and they change its digest."""
    value = {"T23_PROXY_LOG": "/var/log/t23.log", "T23_PROXY_WAIT": "60", "T23_MEDIA_TYPES": "video/mp4"}[
        name
    ]
    given = Settings(environ={"T23_API_URL": URL, name: value})
    assert given.relay_environment(tmp_path)[name] == value
    assert given.relay_digest() != Settings(environ={"T23_API_URL": URL}).relay_digest()


@pytest.mark.parametrize("name", ["session_param", "session_cookie"])
def test_none_stands_alone(name: str):
    assert getattr(settings(**{name: "none"}), name) == ()
    (problem,) = problems(api_url=URL, **{name: "uuid,none"})
    assert problem.startswith(f"T23_{name.upper()} has none together with a name; write")
    assert settings(photo_param=" NONE ").photo_param is None
