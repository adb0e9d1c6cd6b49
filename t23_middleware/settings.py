"""The settings; only this module reads the environment.

Each setting is one field of :class:`Settings` with its default, its help text and the reader of its variable. The
README's table, ``t23-middleware config`` and the relay's environment are generated from these fields.
"""

from __future__ import annotations

import os
import pwd
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigurationError

PREFIX = "T23_"
#: Set by a worker for the relay that it starts: such a relay exits when it has nothing to do.
STARTED_BY_WORKER = "_T23_STARTED_BY_WORKER"
#: Set by ``t23-middleware run``: the app in its command, which is then in ``T23_APP`` too.
NAMED_BY_RUN = "_T23_NAMED_BY_RUN"
#: Smallest ``T23_MAX_BYTES``: the size of an empty outbox.
MIN_MAX_BYTES = 65536
#: Set by tests: the point at which the relay kills itself, see ``relay/crash.py``.
CRASH_AT = "_T23_CRASH_AT"

#: TwentyThree's own media URLs: ``/<tree>/<photo_id>/<token>/<format>[/<slug>-video.<ext>]``, downloads with
#: ``/attachment`` before. A token of digits must be long, so that dated paths (``/2026/11/24/a.mp4``) don't match.
TWENTYTHREE_PATTERN = (
    r"^/(?:attachment/)?[0-9]+/(?P<photo_id>[0-9]+)/"
    r"(?:[0-9]{16,}|(?=[0-9]*[A-Za-z])[0-9A-Za-z]+)/[A-Za-z]\w*(?:/|$)"
)

#: Least characters of a token; a shorter one can be guessed.
SHORTEST_TOKEN = 16

#: Variables that the relay needs beside ours: to run Python, to find proxies and certificates. No other variable is
#: passed on, because it may be a secret of the app.
_PASSED_ON = re.compile(
    r"(?i:path|home|user|logname|lang|lc_\w+|tz|tmpdir|ld_library_path|virtual_env"
    r"|(?:https?|all|no)_proxy|ssl_cert_(?:file|dir)|requests_ca_bundle|curl_ca_bundle)"
)

# Readers: from a variable's text to its value. The ValueError describes the problem and its remedy.


def _text(text: str) -> str:
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def _names(text: str) -> tuple[str, ...]:
    names = _words(text)
    if not names:
        raise ValueError("has no name; write one or more names, separated by commas")
    return names


def _names_or_none(text: str) -> tuple[str, ...]:
    names = _names(text)
    if "none" not in map(str.lower, names):
        return names
    if len(names) > 1:
        raise ValueError("has none together with a name; write names, separated by commas, or only none")
    return ()


def _name_or_none(text: str) -> str | None:
    return None if text.strip().lower() == "none" else text


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is not a switch; write 1 or 0")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds above 0; write for example 10")
    return value


def _bytes(text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit():
        raise ValueError(f"{text!r} is not a number of bytes; write for example 524288")
    return int(text)


def _bound(text: str) -> int:
    if _bytes(text) < MIN_MAX_BYTES:
        raise ValueError(f"{text!r} is less than the size of an empty outbox; write for example 268435456")
    return _bytes(text)


def _choice(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ValueError(f"{text!r} is not allowed; write {' or '.join(words)}")
        return word

    return read


def _api_url(text: str) -> str:
    if "@" in text:
        raise ValueError(
            "contains a user or password, which the API does not accept; write the address without them"
        )
    url = text.strip().rstrip("/")
    if not _is_site(url.replace("{host}", "host.invalid")):
        raise ValueError(
            f"{text!r} is not the address of a site; write for example https://video.example.com"
        )
    return url


def _is_site(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - raises ValueError for an invalid port
    except ValueError:
        return False
    clean = url.isprintable() and not any(char in url for char in " ?#{}")
    return clean and parts.scheme in ("http", "https") and (_is_host(host) or parts.netloc.startswith("["))


def _is_host(text: str) -> bool:
    return re.fullmatch(r"[\w-]+(?:\.[\w-]+)*", text) is not None


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(word.lower().rstrip(".") for word in _words(text))
    wrong = [host for host in hosts if not (host.isascii() and _is_host(host))]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is not a domain; write names such as video.example.com, without scheme or port,"
            " and international ones in their xn-- form"
        )
    return hosts


def _path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable() or any(char in text for char in "?# "):
        raise ValueError(f"{text!r} is not a path; write for example /api/analytics/report/play")
    return text


def _status_path(text: str) -> str:
    path = text.strip().rstrip("/")
    if not re.fullmatch(r"(?:/[\w.~-]+)+", path, re.ASCII):
        raise ValueError(f"{text!r} is not a path below /; write for example /_t23")
    return path


def _token(text: str) -> str:
    if len(text) < SHORTEST_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"is shorter than {SHORTEST_TOKEN} characters, or has characters that are not printable ASCII; generate one:"
            " python3 -c 'import secrets; print(secrets.token_urlsafe(24))'"
        )
    return text


def _cookie_name(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", text):
        raise ValueError(f"{text!r} is not a cookie name (RFC 6265); write for example ad_session_id")
    return text


def _pattern(text: str) -> str:
    try:
        groups = re.compile(TWENTYTHREE_PATTERN if text == "twentythree" else text).groupindex
    except re.error as error:
        raise ValueError(
            f"is not a regular expression ({error}); correct it or write 'twentythree'"
        ) from None
    if "photo_id" not in groups:
        raise ValueError(
            "has no group photo_id; write for example ^/films/(?P<photo_id>[0-9]+)/, or 'twentythree'"
        )
    return text


def _media_types(text: str) -> tuple[str, ...]:
    types = tuple("*/*" if word == "*" else word.lower() for word in _names(text))
    wrong = [word for word in types if not re.fullmatch(r"\*/\*|[\w.+-]+/(\*|[\w.+-]+)", word)]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is not a content type; write for example video/*,audio/mpeg, or */* for all"
        )
    return types


def _player_type(text: str) -> str:
    if not text.isprintable() or len(text) > 100:
        raise ValueError("is not printable, or is longer than 100 characters; write for example html5")
    return text


def _absolute(text: str) -> str:
    if not Path(text).is_absolute():
        raise ValueError(f"{text!r} is not an absolute path; write for example /var/lib/t23")
    return text


def _logs(text: str) -> tuple[str, ...]:
    paths = tuple(dict.fromkeys(_words(text)))
    wrong = [path for path in paths if not Path(path).is_absolute() or path.endswith("/") or "\0" in path]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is not the absolute path of a file; write for example /var/log/nginx/t23.log"
        )
    return paths


def _setting(
    default: Any, read: Callable[[str], Any], help: str, *, secret: bool = False, relay: bool = False
) -> Any:
    """One setting; *secret*: its value is never shown; *relay*: the relay uses it."""
    return field(
        default=default,
        repr=not secret,
        metadata={"read": read, "help": help, "secret": secret, "relay": relay},
    )


@dataclass(frozen=True, init=False)
class Settings:
    """All settings, from keyword arguments or from the environment; arguments win.

    An argument is a value, or the text that its variable would have. Raises
    :class:`~t23_middleware.errors.ConfigurationError` with all problems at once.
    """

    api_url: str = _setting(
        None,
        _api_url,
        "site that reports go to, `https://video.example.com`; may contain `{host}` (the request's host without port), then `T23_HOSTS` is required",
        relay=True,
    )
    hosts: tuple[str, ...] = _setting(
        (),
        _hosts,
        "domains allowed as `{host}`, comma-separated; requests to others are not counted (`foreign_host`)",
        relay=True,
    )
    report_path: str = _setting(
        "/api/analytics/report/play",
        _path,
        "path of the API method; the documentation also has `/api/analytics/report/download`",
        relay=True,
    )
    report_cookie: str | None = _setting(
        None, _cookie_name, "also send the session with the report, as a cookie of this name", relay=True
    )
    enabled: bool = _setting(
        True, _switch, "`0`: nothing is counted, and the app runs without the middleware"
    )
    app: str | None = _setting(
        None,
        _text,
        "the app for `t23_middleware.wsgi` (`t23-middleware run` sets it from the command): `module:attr`, `module:factory()`, `file.py:attr`",
    )
    session_param: tuple[str, ...] = _setting(
        ("session_id",),
        _names_or_none,
        "query parameters with the session, in order; the query wins over the cookie. `none`: no parameter",
    )
    session_cookie: tuple[str, ...] = _setting(
        ("session_id",),
        _names_or_none,
        "cookies with the session, in order (a site may need `ad_session_id` or `uuid`). `none`: no cookie",
    )
    session_secret: tuple[str, ...] = _setting(
        (),
        _words,
        "secret keys, newest first, comma-separated: a session then needs a valid signature (`sign_session()`)",
        secret=True,
    )
    flask_secret_key: str | None = _setting(
        None,
        _text,
        "Flask's `SECRET_KEY`: read the session from Flask's own signed session cookie, which wins over an unsigned session",
        secret=True,
    )
    flask_session_cookie: str = _setting("session", _cookie_name, "name of Flask's session cookie")
    flask_session_key: str = _setting("session_id", _text, "key of the session inside Flask's session")
    photo_param: str | None = _setting(
        "photo_id",
        _name_or_none,
        "query parameter or cookie with the photo. `none`: neither",
    )
    photo_pattern: str | None = _setting(
        None,
        _pattern,
        "regular expression for the path, with a group `photo_id`; `twentythree`: TwentyThree's own media URLs",
    )
    media_types: tuple[str, ...] = _setting(
        ("video/*", "audio/*"),
        _media_types,
        "content types that are counted, `*/*` for all; segments and playlists of HLS and DASH are not counted yet",
        relay=True,
    )
    player_type: str | None = _setting(
        None,
        _player_type,
        "`user_player_type` if the URL has none. Default: `html5` for requests of a browser's `<video>` or `<audio>`",
    )
    trust_url: bool = _setting(
        True,
        _switch,
        "`1`: read `skip` and `user_player_*` from the media URL, which a viewer can change; `0`: ignore them",
    )
    report_per: str = _setting(
        "response",
        _choice("response", "stream"),
        "`response`: one report per counted response, when it closes; `stream`: one report per viewing and one per"
        " scrub, with the bytes of all their responses",
        relay=True,
    )
    stream_idle: float = _setting(
        30.0,
        _seconds,
        "`stream`: seconds without a request and without an open response after which a stream has ended",
        relay=True,
    )
    min_bytes: int | None = _setting(
        None,
        _bytes,
        "`stream`: a viewing with fewer bytes handed over makes no report (`below_minimum`). Default: 512 KiB or an"
        " eighth of the file, whichever is smaller",
        relay=True,
    )
    count: str = _setting(
        "exact",
        _choice("exact", "declared"),
        "`exact`; or `declared`: if an exact count would prevent sendfile, report Content-Length and mark it as declared",
    )
    acked: bool = _setting(
        True,
        _switch,
        "`1`: count what the client's kernel acknowledged, if the server's kernel gives that; `0`: what the server"
        " handed over",
        relay=True,
    )
    drain_wait: float = _setting(
        600.0,
        _seconds,
        "most seconds that a response waits for the client's kernel to acknowledge all of it; then the last known count"
        " is reported",
        relay=True,
    )
    fast_files: bool = _setting(
        True,
        _switch,
        "`1`: send a counted file in the server's fastest way; `0`: as the app sends it",
    )
    state_dir: str | None = _setting(
        None,
        _absolute,
        "folder of journals, outbox and locks; on a local disk, one per site. Default: `~/.local/state/t23-middleware/<API host>` of the worker's user",
    )
    relay: str = _setting(
        "auto",
        _choice("auto", "external", "off"),
        "`auto`: workers start the relay when needed; `external`: a service runs it; `off`: capture only",
    )
    timeout: float = _setting(10.0, _seconds, "most seconds for sending one report", relay=True)
    ephemeral: bool = _setting(
        False,
        _switch,
        "`1`: the state folder is lost with the container, so a worker that ends waits up to `T23_EXIT_SECONDS` until"
        " its reports are sent",
        relay=True,
    )
    retry_ambiguous: bool = _setting(
        True,
        _switch,
        "a report whose answer was lost: `1` is sent again (at least once), `0` is not (at most once)",
        relay=True,
    )
    max_age: float = _setting(
        604800.0,
        _seconds,
        "seconds that a report may wait; an older one is dropped and counted (`too_old`)",
        relay=True,
    )
    max_bytes: int = _setting(
        268435456,
        _bound,
        "most bytes of the outbox; beyond that the oldest reports are dropped and counted (`outbox_full`)",
        relay=True,
    )
    exit_seconds: float = _setting(
        2.0, _seconds, "seconds in which a stopping relay finishes the sends in flight", relay=True
    )
    proxy_log: tuple[str, ...] = _setting(
        (),
        _logs,
        "behind nginx: its log file(s) with the bytes sent, comma-separated; the app then adds the play's id, nginx counts,"
        " and the relay joins both (`check` prints the lines for nginx)",
        relay=True,
    )
    proxy_wait: float = _setting(
        21600.0, _seconds, "seconds that a play waits for its line in that log", relay=True
    )
    status_token: str | None = _setting(
        None,
        _token,
        "password of the operator's pages, at least 16 characters (with any user, or as Bearer); without it there are no pages",
        secret=True,
    )
    status_path: str = _setting(
        "/_t23",
        _status_path,
        "path of the operator's pages: the page is at this path plus `/`, and `status.json` and `metrics` are below it",
    )

    #: Name of each setting -> ``argument``, ``environment`` or ``default``.
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    #: Problems that are only logged, such as an unknown variable.
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __init__(self, *, environ: Mapping[str, str] | None = None, **arguments: Any) -> None:
        environ = os.environ if environ is None else environ
        reader = _Reader(environ, arguments)
        values = {item.name: reader.value_of(item) for item in setting_fields()}
        problems = reader.problems + _contradictions(values, reader.problems) + _unsupported(environ)
        if problems:
            raise ConfigurationError([*problems, *_unknown_variables(environ)])
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "sources", reader.sources)
        object.__setattr__(self, "warnings", _unknown_variables(environ))

    @staticmethod
    def app_target(environ: Mapping[str, str] | None = None) -> str | None:
        """``T23_APP`` alone, for ``t23_middleware.wsgi``, which needs the app also if other settings are wrong."""
        return (os.environ if environ is None else environ).get("T23_APP", "").strip() or None

    @staticmethod
    def named_by_run() -> str | None:
        """The app in the command of ``t23-middleware run``, if that started this server."""
        return os.environ.get(NAMED_BY_RUN)

    @staticmethod
    def is_enabled(environ: Mapping[str, str] | None = None) -> bool:
        """``T23_ENABLED`` alone; an invalid text counts as on, and is reported with the other problems."""
        try:
            return _switch((os.environ if environ is None else environ).get("T23_ENABLED", "1"))
        except ValueError:
            return True

    @staticmethod
    def started_by_worker() -> bool:
        """Whether this process is a relay that a worker started."""
        return STARTED_BY_WORKER in os.environ

    @staticmethod
    def crash_at() -> str:
        """The point at which a test kills this process; ``""`` for none."""
        return os.environ.get(CRASH_AT, "")

    @staticmethod
    def newest_session_secret() -> str:
        """The key that :func:`~t23_middleware.sign_session` signs with, from the environment alone."""
        secrets = _words(os.environ.get("T23_SESSION_SECRET", ""))
        if not secrets:
            raise ConfigurationError(["T23_SESSION_SECRET is not set; write the key for signing sessions"])
        return secrets[0]

    @property
    def per_host(self) -> bool:
        """Whether each report goes to the host of its request."""
        return "{host}" in (self.api_url or "")

    def refuse_without_site(self) -> None:
        """Raise :class:`~t23_middleware.errors.ConfigurationError` if ``T23_API_URL`` is not set.

        That is allowed only with ``T23_ENABLED=0``.
        """
        if self.api_url is None:
            raise ConfigurationError([_NO_SITE])

    def report_url(self, host: str, path: str | None = None) -> str:
        """The URL for reports of *host*; *host* matters only if ``T23_API_URL`` contains ``{host}``.

        *path* replaces ``T23_REPORT_PATH`` unless it is ``None``.
        """
        return self.api_url.replace("{host}", host) + (path or self.report_path)

    def photo_regex(self) -> re.Pattern[str] | None:
        """The compiled ``photo_pattern``, ``None`` if it is not set."""
        if self.photo_pattern is None:
            return None
        return re.compile(TWENTYTHREE_PATTERN if self.photo_pattern == "twentythree" else self.photo_pattern)

    def state_path(self) -> Path:
        """The state folder for the process's *current* user: servers change their user after the import."""
        if self.state_dir is not None:
            return Path(self.state_dir)
        site = "sites" if self.per_host else str(urlsplit(self.api_url).hostname)
        return _users_state_folder() / "t23-middleware" / site

    def relay_digest(self) -> str:
        """Checksum of this release's folder and of the relay's settings.

        It changes with each of them, so that a new release starts its own relay and does not depend on files of an old
        release, which may be removed.
        """
        release = os.path.realpath(Path(__file__).parent)
        text = release + repr(
            [(item.name, getattr(self, item.name)) for item in setting_fields() if item.metadata["relay"]]
        )
        return f"{zlib.crc32(text.encode()):08x}"

    def relay_environment(self, state: Path) -> dict[str, str]:
        """The environment of a relay with these settings for the folder *state*, without secrets of the app."""
        ours = {
            variable(item): as_text(getattr(self, item.name))
            for item in setting_fields()
            if item.metadata["relay"]
        }
        inherited = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        non_empty = {name: text for name, text in ours.items() if text != ""}
        return {**inherited, **non_empty, "T23_STATE_DIR": str(state), STARTED_BY_WORKER: "1"}


_NO_SITE = "T23_API_URL is not set; write the address of your site, for example https://video.example.com"


class _Reader:
    """Reads one setting after the other and collects their problems."""

    def __init__(self, environ: Mapping[str, str], arguments: Mapping[str, object]) -> None:
        self.environ = environ
        self.arguments = dict(arguments)
        self.sources: dict[str, str] = {}
        known = {item.name for item in setting_fields()}
        self.problems = [
            f"{name} is not a setting; see 't23-middleware config'" for name in arguments if name not in known
        ]

    def value_of(self, item: Field[Any]) -> Any:
        source, given = self._given(item)
        self.sources[item.name] = source
        if source == "default":
            return item.default
        try:
            return item.metadata["read"](as_text(given))
        except ValueError as error:
            self.problems.append(f"{variable(item)} {error}")
            return item.default

    def _given(self, item: Field[Any]) -> tuple[str, object]:
        argument = self.arguments.get(item.name)
        if argument is not None:
            return "argument", argument
        text = self.environ.get(variable(item), "")
        # Compose files and units set a variable to an empty text when they mean "not set".
        return ("environment", text) if text.strip() else ("default", None)


def _contradictions(values: Mapping[str, Any], found: list[str]) -> list[str]:
    """Problems that involve several settings, and missing settings."""
    problems = []
    is_reported = any(problem.startswith("T23_API_URL") for problem in found)
    if values["api_url"] is None and values["enabled"] and not is_reported:
        problems.append(_NO_SITE)
    if (
        "{host}" in (values["api_url"] or "")
        and not values["hosts"]
        and not any(p.startswith("T23_HOSTS") for p in found)
    ):
        problems.append(
            "T23_HOSTS is not set, but T23_API_URL contains {host}; write the domains that it may stand for"
        )
    return problems


def setting_fields() -> list[Field[Any]]:
    """The settings in the order of the README's table."""
    return [item for item in fields(Settings) if "read" in item.metadata]


def variable(item: Field[Any]) -> str:
    """The environment variable of a setting."""
    return PREFIX + item.name.upper()


def as_text(value: object) -> str:
    """A value as the text of its variable; ``""`` for ``None``."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    if isinstance(value, bytes):
        # Flask's own SECRET_KEY may be bytes; the environment would have them in this form (PEP 383).
        return value.decode("utf-8", "surrogateescape")
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for a command that replaces the process."""
    return dict(os.environ)


def _unsupported(environ: Mapping[str, str]) -> list[str]:
    """An error, not a warning: with one outbox per host, a deployment that expects a shared one would lose reports."""
    if not environ.get("T23_OUTBOX", "").strip():
        return []
    return ["T23_OUTBOX is not supported yet: the outbox is always a file on this host; remove the variable"]


def _unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    known = [variable(item) for item in setting_fields()]
    unknown = sorted(
        name for name in environ if name.startswith(PREFIX) and name not in (*known, "T23_OUTBOX")
    )
    return tuple(_about_unknown(name, known) for name in unknown)


def _about_unknown(name: str, known: list[str]) -> str:
    import difflib  # imported late: typing errors are rare

    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{name} is not a setting" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _users_state_folder() -> Path:
    """``~/.local/state`` of the effective user, else a folder of the user's own in ``/var/tmp``.

    The home comes from the password database: after a change of user ``$HOME`` is still that of root.
    """
    uid = os.geteuid()
    try:
        home = Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        home = Path("/nonexistent")
    folder = home / ".local" / "state"
    if _can_hold(folder):
        return folder
    return Path(f"/var/tmp/t23-{uid}")


def _can_hold(folder: Path) -> bool:
    """Whether this user can create *folder*, or write in it."""
    # Not Path.exists(), which raises if a parent folder is not accessible.
    while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
