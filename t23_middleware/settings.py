"""What an operator can set; the one place that reads the environment.

Every setting is one field of :class:`Settings`: its variable, default, meaning and how its text is read stand in
one line, and the README's table, ``t23-middleware config`` and the relay's environment are made from that.
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
#: Set by a worker for the relay that it starts: such a relay leaves when there is nothing to do.
STARTED_BY_WORKER = "_T23_STARTED_BY_WORKER"
#: Set by ``t23-middleware run``: the app that its command named, which then is in ``T23_APP`` too.
NAMED_BY_RUN = "_T23_NAMED_BY_RUN"
#: Smallest ``T23_MAX_BYTES``: what the outbox takes with nothing in it.
MIN_MAX_BYTES = 65536
#: Set by tests: the point at which the relay dies, see ``relay/crash.py``.
CRASH_AT = "_T23_CRASH_AT"

#: TwentyThree's own media URLs: ``/<tree>/<photo_id>/<token>/<format>[/<slug>-video.<ext>]``, downloads with
#: ``/attachment`` before. A token of digits alone is long, which keeps dated paths (``/2026/11/24/a.mp4``) out.
TWENTYTHREE_PATTERN = (
    r"^/(?:attachment/)?[0-9]+/(?P<photo_id>[0-9]+)/"
    r"(?:[0-9]{16,}|(?=[0-9]*[A-Za-z])[0-9A-Za-z]+)/[A-Za-z]\w*(?:/|$)"
)

#: Characters that a token has at least: what is shorter can be guessed.
SHORTEST_TOKEN = 16

#: Variables of the process that the relay needs beside ours: to run Python, to find proxies and certificates.
#: Everything else (the app's own secrets) stays behind.
_PASSED_ON = re.compile(
    r"(?i:path|home|user|logname|lang|lc_\w+|tz|tmpdir|ld_library_path|virtual_env"
    r"|(?:https?|all|no)_proxy|ssl_cert_(?:file|dir)|requests_ca_bundle|curl_ca_bundle)"
)

# Readers: the text of a variable in, its value out; ValueError says what is wrong and what to write.


def _text(text: str) -> str:
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def _names(text: str) -> tuple[str, ...]:
    names = _words(text)
    if not names:
        raise ValueError("names nothing; write one or more names, separated by commas")
    return names


def _names_or_none(text: str) -> tuple[str, ...]:
    names = _names(text)
    if "none" not in map(str.lower, names):
        return names
    if len(names) > 1:
        raise ValueError("holds none beside a name; write names, separated by commas, or none alone")
    return ()


def _name_or_none(text: str) -> str | None:
    return None if text.strip().lower() == "none" else text


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither yes nor no; write 1 or 0")


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
        raise ValueError(f"{text!r} is less than an empty outbox takes; write for example 268435456")
    return _bytes(text)


def _choice(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ValueError(f"{text!r} is not known; write {' or '.join(words)}")
        return word

    return read


def _api_url(text: str) -> str:
    if "@" in text:
        raise ValueError(
            "holds a user or password, which the API does not take; write the address without them"
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
        parts.port  # noqa: B018 - raises ValueError for a port that is none
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
            " others than ASCII in their xn-- form"
        )
    return hosts


def _path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable() or any(char in text for char in "?# "):
        raise ValueError(f"{text!r} is not a path; write for example /api/analytics/report/play")
    return text


def _status_path(text: str) -> str:
    path = text.strip().rstrip("/")
    if not re.fullmatch(r"(?:/[\w.~-]+)+", path, re.ASCII):
        raise ValueError(f"{text!r} is not a path below the app's own /; write for example /_t23")
    return path


def _token(text: str) -> str:
    if len(text) < SHORTEST_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"is shorter than {SHORTEST_TOKEN} characters, or holds others than printable ASCII; let Python make one:"
            " python3 -c 'import secrets; print(secrets.token_urlsafe(24))'"
        )
    return text


def _cookie_name(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", text):
        raise ValueError(f"{text!r} can't name a cookie (RFC 6265); write for example ad_session_id")
    return text


def _pattern(text: str) -> str:
    try:
        groups = re.compile(TWENTYTHREE_PATTERN if text == "twentythree" else text).groupindex
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error}); write 'twentythree' or mend it") from None
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
        raise ValueError("is not printable or longer than 100 characters; write for example html5")
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
    """One setting; ``secret`` values are never shown, ``relay`` ones decide what the relay does."""
    return field(
        default=default,
        repr=not secret,
        metadata={"read": read, "help": help, "secret": secret, "relay": relay},
    )


@dataclass(frozen=True, init=False)
class Settings:
    """All settings, read from the environment and overruled by keyword arguments of the same names.

    Arguments may be values or the text that the variable would hold. Raises
    :class:`~t23_middleware.errors.ConfigurationError` with every problem at once.
    """

    api_url: str = _setting(
        None,
        _api_url,
        "site that reports go to, `https://video.example.com`; may hold `{host}` (the request's host without port), then `T23_HOSTS` is required",
        relay=True,
    )
    hosts: tuple[str, ...] = _setting(
        (),
        _hosts,
        "domains that `{host}` may become, comma-separated; others are not counted (`foreign_host`)",
        relay=True,
    )
    report_path: str = _setting(
        "/api/analytics/report/play",
        _path,
        "path of the method; `/api/analytics/report/download` is the other that the documentation names",
        relay=True,
    )
    report_cookie: str | None = _setting(
        None, _cookie_name, "also send the session as a cookie of this name with the report", relay=True
    )
    enabled: bool = _setting(True, _switch, "`0`: everything passes through, and nothing is counted")
    app: str | None = _setting(
        None,
        _text,
        "the app for `t23_middleware.wsgi` (`t23-middleware run` sets it from the command): `module:attr`, `module:factory()`, `file.py:attr`",
    )
    session_param: tuple[str, ...] = _setting(
        ("session_id",),
        _names_or_none,
        "query parameters that hold the session, in order; the query wins over the cookie. `none`: no parameter does",
    )
    session_cookie: tuple[str, ...] = _setting(
        ("session_id",),
        _names_or_none,
        "cookies that hold the session, in order (a site may need `ad_session_id` or `uuid`). `none`: no cookie does",
    )
    session_secret: tuple[str, ...] = _setting(
        (),
        _words,
        "secret keys, newest first, comma-separated: a session must then carry a valid signature (`sign_session()`)",
        secret=True,
    )
    flask_secret_key: str | None = _setting(
        None,
        _text,
        "Flask's `SECRET_KEY`: read the session from inside Flask's own signed session cookie, which wins over an unsigned one",
        secret=True,
    )
    flask_session_cookie: str = _setting("session", _cookie_name, "name of Flask's session cookie")
    flask_session_key: str = _setting("session_id", _text, "key of the session inside Flask's session")
    photo_param: str | None = _setting(
        "photo_id",
        _name_or_none,
        "query parameter that holds the photo, also tried as a cookie. `none`: neither does",
    )
    photo_pattern: str | None = _setting(
        None,
        _pattern,
        "regular expression on the path with a group `photo_id`; `twentythree` names TwentyThree's own media URLs",
    )
    media_types: tuple[str, ...] = _setting(
        ("video/*", "audio/*"),
        _media_types,
        "content types that are counted, `*/*` for all; segments and playlists of HLS and DASH are left out for now",
        relay=True,
    )
    player_type: str | None = _setting(
        None,
        _player_type,
        "`user_player_type` where the URL does not say. Default: `html5` for what a browser's `<video>` or `<audio>` asks",
    )
    trust_url: bool = _setting(
        True,
        _switch,
        "take `skip` and `user_player_*` from the media URL, which a viewer can write; `0`: ignore them",
    )
    report_per: str = _setting(
        "response",
        _choice("response", "stream"),
        "`response`: each counted response is a report as it closes; `stream`: one report per viewing and one per"
        " scrub, with the bytes of all their responses",
        relay=True,
    )
    stream_idle: float = _setting(
        30.0,
        _seconds,
        "`stream`: seconds with no request and no open response after which a stream counts as concluded",
        relay=True,
    )
    min_bytes: int | None = _setting(
        None,
        _bytes,
        "`stream`: a viewing that never handed over so much makes no report (`below_minimum`). Default: the smaller"
        " of 512 KiB and an eighth of the file",
        relay=True,
    )
    count: str = _setting(
        "exact",
        _choice("exact", "declared"),
        "`exact`, or `declared`: where exactness would cost sendfile, report Content-Length instead and say so",
    )
    acked: bool = _setting(
        True,
        _switch,
        "`1`: count what the client's kernel acknowledged, where the kernel can be asked; `0`: what the server handed"
        " over",
        relay=True,
    )
    drain_wait: float = _setting(
        600.0,
        _seconds,
        "seconds that a response waits until the client's kernel has acknowledged all of it or is gone; then the last"
        " known count is reported",
        relay=True,
    )
    fast_files: bool = _setting(
        True,
        _switch,
        "let a counted file answer leave by the fastest way the server has; `0`: just as the app sends it",
    )
    state_dir: str | None = _setting(
        None,
        _absolute,
        "folder of journals, outbox and locks; local disk, one per site. Default: `~/.local/state/t23-middleware/<API host>` of the user that the worker runs as",
    )
    relay: str = _setting(
        "auto",
        _choice("auto", "external", "off"),
        "`auto`: started when needed; `external`: a service runs it; `off`: capture only",
    )
    timeout: float = _setting(10.0, _seconds, "seconds for one report", relay=True)
    ephemeral: bool = _setting(
        False,
        _switch,
        "`1`: the state folder dies with the container, so a worker that ends waits up to `T23_EXIT_SECONDS` for its"
        " reports to leave",
        relay=True,
    )
    retry_ambiguous: bool = _setting(
        True,
        _switch,
        "resend a report whose answer was lost: `1` at least once, `0` at most once",
        relay=True,
    )
    max_age: float = _setting(
        604800.0,
        _seconds,
        "seconds that a report may wait; an older one is given up and counted (`too_old`)",
        relay=True,
    )
    max_bytes: int = _setting(
        268435456,
        _bound,
        "bytes that the outbox may take; beyond it the oldest reports are given up and counted (`outbox_full`)",
        relay=True,
    )
    exit_seconds: float = _setting(
        2.0, _seconds, "seconds in which a relay that is told to stop finishes what is in flight", relay=True
    )
    proxy_log: tuple[str, ...] = _setting(
        (),
        _logs,
        "behind nginx: the log file(s) in which it says what it sent, comma-separated; then the app names the play, nginx"
        " counts, and the relay joins them (`check` prints nginx's lines)",
        relay=True,
    )
    proxy_wait: float = _setting(
        21600.0, _seconds, "seconds that a play waits for its line in that log", relay=True
    )
    status_token: str | None = _setting(
        None,
        _token,
        "password of the operator's pages, at least 16 characters (any user, or as Bearer); without it they do not exist",
        secret=True,
    )
    status_path: str = _setting(
        "/_t23",
        _status_path,
        "where the operator's pages are: the page at this path with `/` behind it, and under it `status.json` and `metrics`",
    )

    #: Name of each setting -> ``argument``, ``environment`` or ``default``.
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    #: What is no problem but worth a line in the log.
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
        """``T23_APP`` alone, for the entrance that must find the app whatever else is wrong."""
        return (os.environ if environ is None else environ).get("T23_APP", "").strip() or None

    @staticmethod
    def named_by_run() -> str | None:
        """The app that ``t23-middleware run`` was given, where it started this server."""
        return os.environ.get(NAMED_BY_RUN)

    @staticmethod
    def is_enabled(environ: Mapping[str, str] | None = None) -> bool:
        """``T23_ENABLED`` alone; a text that is neither yes nor no counts as yes, and is told with the rest."""
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
        """Where a test wants this process to die; ``""`` for nowhere."""
        return os.environ.get(CRASH_AT, "")

    @staticmethod
    def newest_session_secret() -> str:
        """The key that :func:`~t23_middleware.sign_session` signs with, from the environment alone."""
        secrets = _words(os.environ.get("T23_SESSION_SECRET", ""))
        if not secrets:
            raise ConfigurationError(
                ["T23_SESSION_SECRET is not set; write the key that sessions are signed with"]
            )
        return secrets[0]

    @property
    def per_host(self) -> bool:
        """Whether reports go to the host that each request named."""
        return "{host}" in (self.api_url or "")

    def refuse_without_site(self) -> None:
        """Raise :class:`~t23_middleware.errors.ConfigurationError` where no site is named.

        That is so with ``T23_ENABLED=0`` alone, where nothing is counted.
        """
        if self.api_url is None:
            raise ConfigurationError([_NO_SITE])

    def report_url(self, host: str, path: str | None = None) -> str:
        """The address that reports of *host* go to; *host* matters only where the URL holds ``{host}``.

        *path* stands for ``T23_REPORT_PATH`` where it is given.
        """
        return self.api_url.replace("{host}", host) + (path or self.report_path)

    def photo_regex(self) -> re.Pattern[str] | None:
        """The compiled ``photo_pattern``."""
        if self.photo_pattern is None:
            return None
        return re.compile(TWENTYTHREE_PATTERN if self.photo_pattern == "twentythree" else self.photo_pattern)

    def state_path(self) -> Path:
        """The state folder for the user that this process runs as *now*: servers change user after import."""
        if self.state_dir is not None:
            return Path(self.state_dir)
        site = "sites" if self.per_host else str(urlsplit(self.api_url).hostname)
        return _users_state_folder() / "t23-middleware" / site

    def relay_digest(self) -> str:
        """Short name of the release that this is, and of the settings that decide what the relay does.

        Changes when any of them does, so that a new release does not rely on files of one that may be removed.
        """
        release = os.path.realpath(Path(__file__).parent)
        told = release + repr(
            [(item.name, getattr(self, item.name)) for item in setting_fields() if item.metadata["relay"]]
        )
        return f"{zlib.crc32(told.encode()):08x}"

    def relay_environment(self, state: Path) -> dict[str, str]:
        """The environment for a relay with these settings on the folder *state*; capture's secrets stay out."""
        ours = {
            variable(item): as_text(getattr(self, item.name))
            for item in setting_fields()
            if item.metadata["relay"]
        }
        inherited = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        told = {name: text for name, text in ours.items() if text != ""}
        return {**inherited, **told, "T23_STATE_DIR": str(state), STARTED_BY_WORKER: "1"}


_NO_SITE = "T23_API_URL is not set; write the site that reports go to, for example https://video.example.com"


class _Reader:
    """Reads one setting after the other and gathers what is wrong with them."""

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
        # Compose files and units set a variable to nothing where they mean not to set it.
        return ("environment", text) if text.strip() else ("default", None)


def _contradictions(values: Mapping[str, Any], found: list[str]) -> list[str]:
    """Problems that no single setting shows, and what is missing."""
    problems = []
    told = any(problem.startswith("T23_API_URL") for problem in found)
    if values["api_url"] is None and values["enabled"] and not told:
        problems.append(_NO_SITE)
    if (
        "{host}" in (values["api_url"] or "")
        and not values["hosts"]
        and not any(p.startswith("T23_HOSTS") for p in found)
    ):
        problems.append(
            "T23_HOSTS is not set, but T23_API_URL holds {host}; write the domains that it may become"
        )
    return problems


def setting_fields() -> list[Field[Any]]:
    """The settings in the order of the README's table."""
    return [item for item in fields(Settings) if "read" in item.metadata]


def variable(item: Field[Any]) -> str:
    """The environment variable of a setting."""
    return PREFIX + item.name.upper()


def as_text(value: object) -> str:
    """A value in the form that its variable takes; ``""`` for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    if isinstance(value, bytes):
        # Flask's own SECRET_KEY may be bytes; this is how the environment would hold them (PEP 383).
        return value.decode("utf-8", "surrogateescape")
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for a command that replaces the process."""
    return dict(os.environ)


def _unsupported(environ: Mapping[str, str]) -> list[str]:
    """Who asks for a shared outbox would lose reports with one per host, so that is no mere warning."""
    if not environ.get("T23_OUTBOX", "").strip():
        return []
    return ["T23_OUTBOX is for later: the outbox is a file on this host today; take the variable away"]


def _unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    known = [variable(item) for item in setting_fields()]
    unknown = sorted(
        name for name in environ if name.startswith(PREFIX) and name not in (*known, "T23_OUTBOX")
    )
    return tuple(_about_unknown(name, known) for name in unknown)


def _about_unknown(name: str, known: list[str]) -> str:
    import difflib  # only here: a typing error is rare, and an app need not carry the import

    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{name} is not a setting" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _users_state_folder() -> Path:
    """``~/.local/state`` of the effective user, else a folder of the user's own in ``/var/tmp``.

    The home comes from the password database: after a change of user ``$HOME`` is still the one of root.
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
    """Whether this user can make *folder*, or write in it."""
    # Not Path.exists(), which raises where a folder above may not be entered.
    while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
