"""Who plays what: the session, the photo and the player that a request names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_plus

from werkzeug.sansio.http import parse_cookie

from ..settings import Settings
from ..transfer import Play

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

LONGEST_SESSION = 256
LONGEST_PLAYER = 100
_PHOTO = re.compile(r"[0-9]{1,20}")

#: What a session is signed for; a signature made for another purpose with the same key does not fit.
_SALT = "t23_middleware.session"
#: The same of a session together with its photo.
_PHOTO_SALT = "t23_middleware.session-of-photo"
#: What Flask itself signs its session cookie with (flask/sessions.py, ``SecureCookieSessionInterface``).
_FLASK_SALT = "cookie-session"


class NotCounted(Exception):
    """The request names no play that can be reported; the argument is the name of the counter."""


class _Asked:
    """What a request asks with, parsed when it is looked at: most media URLs name all in the query."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.query = _first_values(environ.get("QUERY_STRING", ""))
        self._cookie = environ.get("HTTP_COOKIE", "")

    @cached_property
    def cookies(self) -> Mapping[str, str]:
        """WSGI decoded the header as Latin-1; a foreign cookie that is no UTF-8 spoils no other."""
        return parse_cookie(self._cookie.encode("latin-1", "replace").decode("utf-8", "replace"))


class Identifier:
    """Reads the play out of requests, as the settings say where to look."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pattern = settings.photo_regex()
        self._session_names = settings.session_param
        self._photo_names: tuple[str, ...] = () if settings.photo_param is None else (settings.photo_param,)
        self._cookie_names = settings.session_cookie
        self._unsign = _unsigner(settings.session_secret)
        self._flask_session = _flask_session_reader(settings)
        if self._flask_session is not None:
            self._cookie_names = (*settings.session_cookie, settings.flask_session_cookie)

    def missing(self, environ: WSGIEnvironment, path: str) -> str | None:
        """The counter of what the request surely does not name: a look that parses nothing and may find all in vain.

        *path* is the request's ``PATH_INFO`` as it came: apps that mount others cut theirs short.
        """
        query = environ.get("QUERY_STRING", "")
        if "%" in query:
            query = unquote_plus(query)  # TwentyThree's own pages write photo%5fid
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
            or (self._pattern is not None and self._pattern.search(path) is not None)
            or "t23.photo_id" in environ
        ):
            return "no_photo"
        return None

    def identify(self, environ: WSGIEnvironment, path: str) -> Play:
        """The play that the request for *path* names.

        Raises :class:`NotCounted` where it names none, or one that can't be believed.
        """
        asked = _Asked(environ)
        query = asked.query if self._settings.trust_url else {}
        return Play(
            session_id=self._session(environ, path, asked),
            photo_id=self._photo(environ, path, asked),
            host=self._host(environ),
            skip=_skip(environ, query),
            player_type=_player(query, "user_player_type") or self._settings.player_type,
            player_version=_player(query, "user_player_version"),
            player_resolution=_player(query, "user_player_resolution"),
        )

    def _session(self, environ: WSGIEnvironment, path: str, asked: _Asked) -> str:
        """The app's word, else the first session with a valid signature, else an unsigned one where those will do."""
        overruled = environ.get("t23.session_id")
        if overruled is not None:
            return _printable_session(str(overruled))
        if self._unsign is None and self._flask_session is None:
            return _printable_session(self._unsigned(asked))
        try:
            signed = self._signed(environ, path, asked)
        except NotCounted:
            if self._unsign is not None or not (unsigned := self._unsigned(asked)):
                raise
            return _printable_session(unsigned)
        return _printable_session(signed)

    def _unsigned(self, asked: _Asked) -> str:
        named = _first_of(asked.query, self._session_names)
        return named or _first_of(asked.cookies, self._settings.session_cookie) or ""

    def _signed(self, environ: WSGIEnvironment, path: str, asked: _Asked) -> str:
        """The first session whose signature is valid, for any photo or for the one that the request names."""
        named: list[str] = []
        if self._unsign is not None:
            given = [asked.query.get(name) for name in self._session_names]
            given += [asked.cookies.get(name) for name in self._settings.session_cookie]
            named = [session for session in given if session]
        for session in named:
            found = self._unsign(session)
            if found is None:
                found = self._unsign(session, self._photo(environ, path, asked))
            if found is not None:
                return str(found)
        try:
            if self._flask_session is not None:
                return str(self._flask_session(asked.cookies))
        except NotCounted:
            if not named:
                raise
        raise NotCounted("bad_signature" if named else "no_session")

    def _photo(self, environ: WSGIEnvironment, path: str, asked: _Asked) -> str:
        named = environ.get("t23.photo_id")
        if named is None:
            named = _first_of(asked.query, self._photo_names) or self._photo_in(path)
            named = named or _first_of(asked.cookies, self._photo_names)
        if not named:
            raise NotCounted("no_photo")
        if _PHOTO.fullmatch(str(named)) is None:
            raise NotCounted("bad_photo")
        return str(named)

    def _photo_in(self, path: str) -> str | None:
        found = None if self._pattern is None else self._pattern.search(path)
        return None if found is None else found["photo_id"]

    def _host(self, environ: WSGIEnvironment) -> str:
        if not self._settings.per_host:
            return ""
        host = _without_port(environ.get("HTTP_HOST") or environ.get("SERVER_NAME", "")).lower().rstrip(".")
        if host not in self._settings.hosts:
            raise NotCounted("foreign_host")
        return host


def sign_session(session_id: str, secret: str | None = None, *, photo_id: str | int | None = None) -> str:
    """The session with a signature, for the app that issues media URLs.

    *secret* is one of the keys in ``T23_SESSION_SECRET``; ``None`` takes the newest of them from the environment.
    *photo_id*: the signature is valid for this photo only, as the media URL names it (1 to 20 digits); ``None``: for
    any photo. Raises :class:`~t23_middleware.errors.ConfigurationError` where there is no key, and
    :class:`ValueError` where *photo_id* can't be a photo.
    """
    key = secret or Settings.newest_session_secret()
    if photo_id is None:
        return str(_signer((key,)).sign(session_id), "utf-8")
    photo = str(photo_id)
    if _PHOTO.fullmatch(photo) is None:
        raise ValueError(f"photo_id can't be {photo!r}; write 1 to 20 digits")
    signed = _signer((key,), _PHOTO_SALT).sign(f"{photo}.{session_id}")
    return str(signed, "utf-8").removeprefix(f"{photo}.")


def _signer(secrets: tuple[str, ...], salt: str = _SALT) -> Any:
    import hashlib

    from itsdangerous import Signer  # only where sessions are signed

    # itsdangerous signs with the last key and accepts any; our operators write the newest first.
    keys = [_key(secret) for secret in reversed(secrets)]
    return Signer(keys, salt=salt, digest_method=hashlib.sha256)


def _key(secret: str) -> bytes:
    """The bytes of *secret*; what is no UTF-8 in the environment reaches Python as surrogates (PEP 383)."""
    return secret.encode("utf-8", "surrogateescape")


def _unsigner(secrets: tuple[str, ...]) -> Any:
    """What gives the session without its signature, ``None`` where that is not valid (for *photo*)."""
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

    # How long a session lives is the app's affair and not known here; the signature is what makes it believable.
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


def _first_values(query: str) -> dict[str, str]:
    """Each parameter's first value; the first is what an app's own framework reads too."""
    values: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        values.setdefault(name, value)
    return values


def _first_of(values: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    for name in names:
        if values.get(name):
            return values[name]
    return None


def _any_in(names: tuple[str, ...], text: str) -> bool:
    for name in names:  # noqa: SIM110 - any() makes a generator, which costs each request three times this
        if name in text:
            return True
    return False


def _skip(environ: WSGIEnvironment, query: Mapping[str, str]) -> int | None:
    """The app's word, else the media URL's own ``skip`` (TwentyThree's Flash player wrote it there)."""
    said = environ.get("t23.skip")
    text = query.get("skip") if said is None else str(int(said) if isinstance(said, bool) else said)
    return int(text) if text in ("0", "1") else None


def _player(query: Mapping[str, str], name: str) -> str | None:
    said = query.get(name)
    if not said or len(said) > LONGEST_PLAYER or not said.isprintable():
        return None
    return said


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
