"""Finds the session, the photo and the player in a request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote_plus

from werkzeug.sansio.http import parse_cookie

from ..settings import Settings
from ..transfer import Play

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

LONGEST_SESSION = 256
LONGEST_PLAYER = 100
_PHOTO = re.compile(r"[0-9]{1,20}")

#: Salt of a session's signature, so that one made for another purpose with the same key is invalid.
_SALT = "t23_middleware.session"
#: The same for a session together with its photo.
_PHOTO_SALT = "t23_middleware.session-of-photo"
#: Flask's own salt for its session cookie (flask/sessions.py, ``SecureCookieSessionInterface``).
_FLASK_SALT = "cookie-session"


class NotCounted(Exception):
    """The request has no play that can be reported; the argument is the counter's name."""


class _Request:
    """The parts of a request that identify its play.

    *session*, *photo* and *skip* are the values that the app set in the environ, ``None`` if it set none.
    """

    def __init__(
        self,
        query: str,
        cookie: str,
        path: str,
        host: str,
        destination: str | None,
        session: str | None,
        photo: str | None,
        skip: str | None,
    ) -> None:
        self._query = parse_qs(_decoded_query(query), keep_blank_values=True)
        self._cookie = cookie
        self.path = path
        self.host = host
        self.destination = destination
        self.session = session
        self.photo = photo
        self.skip = skip

    def first(self, name: str) -> str | None:
        """The first value of the query parameter *name*, ``None`` if it is absent."""
        values = self._query.get(name)
        return None if values is None else values[0]

    def only(self, name: str, counter: str) -> str | None:
        """The value of the query parameter *name*; two different values raise :class:`NotCounted` with *counter*.

        Frameworks differ in which value they use: Flask the first, Django the last.
        """
        values = self._query.get(name)
        if values is None:
            return None
        if len(values) > 1 and any(value != values[0] for value in values):
            raise NotCounted(counter)
        return values[0]

    @cached_property
    def cookies(self) -> Mapping[str, str]:
        """The cookies by name; one that is not UTF-8 does not affect the others."""
        return parse_cookie(_as_utf8(self._cookie))


class Identifier:
    """Finds the play of a request, in the places that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pattern = settings.photo_regex()
        self._session_names = settings.session_param
        self._photo_names: tuple[str, ...] = () if settings.photo_param is None else (settings.photo_param,)
        self._cookie_names = settings.session_cookie
        self._unsign = _unsigner(settings.session_secret)
        self._flask_session = _flask_session_reader(settings)
        # Cached, because a player requests the same URL many times.
        self._identified = lru_cache(maxsize=256)(self._identify)
        if self._flask_session is not None:
            self._cookie_names = (*settings.session_cookie, settings.flask_session_cookie)

    def missing(self, environ: WSGIEnvironment, path: str) -> str | None:
        """Cheap check without parsing: the counter's name if session or photo is certainly absent, else ``None``.

        ``None`` does not mean that both are valid. *path* is the ``PATH_INFO`` that the server set: apps that mount
        others shorten it.
        """
        query = environ.get("QUERY_STRING", "")
        if not query.isascii():
            query = _decoded_query(query)
        if "%" in query:
            query = unquote_plus(query)  # TwentyThree's own pages have photo%5fid
        cookie = environ.get("HTTP_COOKIE", "")
        if not (
            _any_in(self._session_names, query)
            or (cookie and _any_in(self._cookie_names, cookie))
            or "t23.session_id" in environ
        ):
            return "no_session"
        if not (
            _any_in(self._photo_names, query)
            or (cookie and _any_in(self._photo_names, cookie))
            or (self._pattern is not None and self._pattern.search(_as_utf8(path)) is not None)
            or "t23.photo_id" in environ
        ):
            return "no_photo"
        return None

    def identify(self, environ: WSGIEnvironment, path: str) -> Play:
        """The play of the request for *path*.

        Raises :class:`NotCounted` if it has none, or an invalid one.
        """
        get = environ.get
        session, photo, skip = get("t23.session_id"), get("t23.photo_id"), get("t23.skip")
        return self._identified(
            get("QUERY_STRING", ""),
            get("HTTP_COOKIE", ""),
            path if self._pattern is not None else "",
            (get("HTTP_HOST") or get("SERVER_NAME", "")) if self._settings.per_host else "",
            get("HTTP_SEC_FETCH_DEST"),
            None if session is None else str(session),
            None if photo is None else str(photo),
            None if skip is None else str(int(skip) if isinstance(skip, bool) else skip),
        )

    def _identify(self, *words: Any) -> Play:
        asked = _Request(*words)
        first = asked.first if self._settings.trust_url else _ignored
        return Play(
            session_id=self._session(asked),
            photo_id=self._photo(asked),
            host=self._host(asked.host),
            skip=_skip(first("skip") if asked.skip is None else asked.skip),
            player_type=_player(first("user_player_type"))
            or self._settings.player_type
            or _browser_player(asked.destination),
            player_version=_player(first("user_player_version")),
            player_resolution=_player(first("user_player_resolution")),
        )

    def _session(self, asked: _Request) -> str:
        """The app's own session, else the first with a valid signature, else an unsigned one if that is allowed."""
        if asked.session is not None:
            return _printable_session(asked.session)
        if self._unsign is None and self._flask_session is None:
            return _printable_session(self._unsigned(asked))
        try:
            signed = self._signed(asked)
        except NotCounted:
            if self._unsign is not None or not (unsigned := self._unsigned(asked)):
                raise
            return _printable_session(unsigned)
        return _printable_session(signed)

    def _unsigned(self, asked: _Request) -> str:
        return next(filter(None, self._candidates(asked)), "")

    def _candidates(self, asked: _Request) -> Iterator[str | None]:
        """The sessions in the query and the cookies, in order."""
        for name in self._session_names:
            yield asked.only(name, "bad_session")
        for name in self._settings.session_cookie:
            yield asked.cookies.get(name)

    def _signed(self, asked: _Request) -> str:
        """The first session with a valid signature, for any photo or for the request's photo."""
        named: list[str] = []
        if self._unsign is not None:
            named = [session for session in self._candidates(asked) if session]
        for session in named:
            found = self._unsign(session)
            if found is None:
                found = self._unsign(session, self._photo(asked))
            if found is not None:
                return str(found)
        try:
            if self._flask_session is not None:
                return str(self._flask_session(asked.cookies))
        except NotCounted:
            if not named:
                raise
        raise NotCounted("bad_signature" if named else "no_session")

    def _photo(self, asked: _Request) -> str:
        named = asked.photo
        if named is None:
            in_query = (asked.only(name, "bad_photo") for name in self._photo_names)
            named = next(filter(None, in_query), None) or self._photo_in(asked.path)
            named = named or next(filter(None, map(asked.cookies.get, self._photo_names)), None)
        if not named:
            raise NotCounted("no_photo")
        if _PHOTO.fullmatch(named) is None:
            raise NotCounted("bad_photo")
        return named

    def _photo_in(self, path: str) -> str | None:
        found = None if self._pattern is None else self._pattern.search(_as_utf8(path))
        return None if found is None else found["photo_id"]

    def _host(self, requested: str) -> str:
        if not self._settings.per_host:
            return ""
        host = _without_port(requested).lower().rstrip(".")
        if host not in self._settings.hosts:
            raise NotCounted("foreign_host")
        return host


def sign_session(session_id: str, secret: str | None = None, *, photo_id: str | int | None = None) -> str:
    """Return the session with a signature, for an app that issues media URLs.

    *secret* is one of the keys in ``T23_SESSION_SECRET``; ``None`` means the newest of them, from the environment.
    *photo_id*: the signature is valid only for this photo of the media URL (1 to 20 digits); ``None``: for any photo.
    Raises :class:`~t23_middleware.errors.ConfigurationError` if there is no key, and :class:`ValueError` if *photo_id*
    is not a photo.
    """
    key = secret or Settings.newest_session_secret()
    if photo_id is None:
        return str(_signer((key,)).sign(session_id), "utf-8")
    photo = str(photo_id)
    if _PHOTO.fullmatch(photo) is None:
        raise ValueError(f"photo_id {photo!r} is not a photo; write 1 to 20 digits")
    signed = _signer((key,), _PHOTO_SALT).sign(f"{photo}.{session_id}")
    return str(signed, "utf-8").removeprefix(f"{photo}.")


def _signer(secrets: tuple[str, ...], salt: str = _SALT) -> Any:
    import hashlib

    from itsdangerous import Signer  # only where sessions are signed

    # itsdangerous signs with the last key and accepts each; our setting has the newest first.
    keys = [_key(secret) for secret in reversed(secrets)]
    return Signer(keys, salt=salt, digest_method=hashlib.sha256)


def _key(secret: str) -> bytes:
    """The bytes of *secret*; bytes of the environment that are not UTF-8 are surrogates in Python (PEP 383)."""
    return secret.encode("utf-8", "surrogateescape")


def _unsigner(secrets: tuple[str, ...]) -> Any:
    """A function that returns a session without its signature, ``None`` if that is invalid (for *photo*)."""
    if not secrets:
        return None
    any_photo, one_photo = _signer(secrets), _signer(secrets, _PHOTO_SALT)
    from itsdangerous import BadSignature

    def unsign(session: str, photo: str | None = None) -> str | None:
        try:
            if photo is None:
                return str(any_photo.unsign(session), "utf-8")
            return str(one_photo.unsign(f"{photo}.{session}"), "utf-8").removeprefix(f"{photo}.")
        except (BadSignature, UnicodeError):
            return None

    return unsign


def _flask_session_reader(settings: Settings) -> Any:
    if settings.flask_secret_key is None:
        return None
    import hashlib

    from itsdangerous import BadData, URLSafeTimedSerializer

    # The app's lifetime of a session is unknown here, so only the signature is checked.
    serializer = URLSafeTimedSerializer(
        _key(settings.flask_secret_key),
        salt=_FLASK_SALT,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha1},
    )

    def read(cookies: Mapping[str, str]) -> str:
        cookie = cookies.get(settings.flask_session_cookie)
        if not cookie:
            raise NotCounted("no_session")
        try:
            inside = serializer.loads(cookie)
        except (BadData, ValueError):
            raise NotCounted("bad_signature") from None
        session = inside.get(settings.flask_session_key) if isinstance(inside, dict) else None
        if not isinstance(session, (str, int)):
            raise NotCounted("no_session")
        return str(session)

    return read


def _printable_session(session: str) -> str:
    if not session:
        raise NotCounted("no_session")
    if len(session) > LONGEST_SESSION or not session.isprintable() or "\N{REPLACEMENT CHARACTER}" in session:
        raise NotCounted("bad_session")
    return session


def _decoded_query(query: str) -> str:
    """The query as UTF-8, else as Latin-1: as in Django; Flask rejects bytes that are not UTF-8."""
    if query.isascii():
        return query
    try:
        return query.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return query


def _as_utf8(text: str) -> str:
    """A header or path, which WSGI decodes as Latin-1, as UTF-8; bytes that are not UTF-8 are replaced."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "replace")


def _any_in(names: tuple[str, ...], text: str) -> bool:
    for name in names:  # noqa: SIM110 - any() creates a generator, which takes three times as long per request
        if name in text:
            return True
    return False


def _ignored(name: str) -> None:
    """In place of a URL's parameter if the URL is not trusted."""


def _skip(text: str | None) -> int | None:
    """The ``skip`` that the app set or that the media URL has (TwentyThree's Flash player added it)."""
    return int(text) if text in ("0", "1") else None


def _browser_player(destination: str | None) -> str | None:
    """``html5`` for the request of a browser's media element (Fetch Metadata)."""
    return "html5" if destination in ("video", "audio") else None


def _player(text: str | None) -> str | None:
    if not text or len(text) > LONGEST_PLAYER or not text.isprintable():
        return None
    return text


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
