"""Who plays what: the session, the photo and the player that a request names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote_plus

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


class _Query(NamedTuple):
    """What a query names. Frameworks differ in which of two values they read: Flask the first, Django the last."""

    #: In the order of ``T23_SESSION_PARAM``; ``None`` for a parameter that has two values that differ.
    sessions: tuple[str | None, ...]
    #: ``""`` where it names none, ``None`` where it names two.
    photo: str | None
    #: What it says for ``skip`` and of the player; not read with ``T23_TRUST_URL=0``.
    skip: str | None = None
    player_type: str | None = None
    player_version: str | None = None
    player_resolution: str | None = None


class _Cookies:
    """The request's cookies, parsed when they are looked at: most media URLs name all in the query."""

    def __init__(self, header: str) -> None:
        self._header = header

    @cached_property
    def values(self) -> Mapping[str, str]:
        """A foreign cookie that is no UTF-8 spoils no other."""
        return parse_cookie(_as_utf8(self._header))


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
        self._is_signed = self._unsign is not None or self._flask_session is not None
        # Remembered, since a player asks for one URL again and again.
        self._read = lru_cache(maxsize=256)(self._read_query)
        if self._flask_session is not None:
            self._cookie_names = (*settings.session_cookie, settings.flask_session_cookie)

    def missing(self, environ: WSGIEnvironment, path: str) -> str | None:
        """The counter of what the request surely does not name: a look that parses nothing and may find all in vain.

        *path* is the request's ``PATH_INFO`` as it came: apps that mount others cut theirs short.
        """
        query = _as_frameworks_read(environ.get("QUERY_STRING", ""))
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
            or (self._pattern is not None and self._pattern.search(_as_utf8(path)) is not None)
            or "t23.photo_id" in environ
        ):
            return "no_photo"
        return None

    def identify(self, environ: WSGIEnvironment, path: str) -> Play:
        """The play that the request for *path* names.

        Raises :class:`NotCounted` where it names none, or one that can't be believed.
        """
        query = self._read(environ.get("QUERY_STRING", ""))
        cookies = _Cookies(environ.get("HTTP_COOKIE", ""))
        photo = self._photo(environ, path, query, cookies)
        return Play(
            self._session(environ, query, cookies, photo),
            photo,
            self._host(environ) if self._settings.per_host else "",
            _skip(environ.get("t23.skip"), query.skip),
            query.player_type or self._settings.player_type or _element(environ),
            query.player_version,
            query.player_resolution,
        )

    def _read_query(self, text: str) -> _Query:
        values = parse_qs(_as_frameworks_read(text), keep_blank_values=True)
        sessions = tuple(only for name in self._session_names if (only := _only(values, name)) != "")
        photo = "" if self._settings.photo_param is None else _only(values, self._settings.photo_param)
        named = _Query(sessions, photo)
        if not self._settings.trust_url:
            return named
        first = {name: given[0] for name, given in values.items()}
        return named._replace(
            skip=first.get("skip"),
            player_type=_player(first.get("user_player_type")),
            player_version=_player(first.get("user_player_version")),
            player_resolution=_player(first.get("user_player_resolution")),
        )

    def _session(self, environ: WSGIEnvironment, query: _Query, cookies: _Cookies, photo: str) -> str:
        """The app's word, else the first session with a valid signature, else an unsigned one where those will do."""
        overruled = environ.get("t23.session_id")
        if overruled is not None:
            return _printable_session(str(overruled))
        named = self._named(query, cookies)
        session = named[0] if named else ""
        if self._is_signed:
            try:
                session = self._signed(named, cookies, photo)
            except NotCounted:
                if self._unsign is not None or not named:
                    raise
        return _printable_session(session)

    def _named(self, query: _Query, cookies: _Cookies) -> Sequence[str]:
        """What the query and the cookies name, in order."""
        # The first one decides where none has to be signed.
        named = query.sessions if self._is_signed else query.sessions[:1]
        in_query = [session for session in named if session is not None]
        if len(in_query) < len(named):
            raise NotCounted("bad_session")
        if in_query and not self._is_signed:
            return in_query
        return [*in_query, *filter(None, map(cookies.values.get, self._settings.session_cookie))]

    def _signed(self, named: Sequence[str], cookies: _Cookies, photo: str) -> str:
        """The first session whose signature is valid, for any photo or for *photo*."""
        if self._unsign is not None:
            for session in named:
                found = self._unsign(session)
                if found is None:
                    found = self._unsign(session, photo)
                if found is not None:
                    return str(found)
        try:
            if self._flask_session is not None:
                return str(self._flask_session(cookies.values))
        except NotCounted:
            if self._unsign is None or not named:
                raise
        raise NotCounted("bad_signature" if named else "no_session")

    def _photo(self, environ: WSGIEnvironment, path: str, query: _Query, cookies: _Cookies) -> str:
        named = environ.get("t23.photo_id")
        if named is None:
            named = query.photo
            if named is None:
                raise NotCounted("bad_photo")
            named = named or self._photo_in(path)
            if not named and self._settings.photo_param is not None:
                named = cookies.values.get(self._settings.photo_param)
        if not named:
            raise NotCounted("no_photo")
        if _PHOTO.fullmatch(str(named)) is None:
            raise NotCounted("bad_photo")
        return str(named)

    def _photo_in(self, path: str) -> str | None:
        found = None if self._pattern is None else self._pattern.search(_as_utf8(path))
        return None if found is None else found["photo_id"]

    def _host(self, environ: WSGIEnvironment) -> str:
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


def _only(values: Mapping[str, list[str]], name: str) -> str | None:
    """The value of the parameter *name*: ``""`` where it has none, ``None`` where it has two that differ."""
    given = values.get(name, [""])
    return given[0] if all(value == given[0] for value in given) else None


def _as_frameworks_read(query: str) -> str:
    """Django takes bytes that are no UTF-8 for Latin-1; Flask refuses them."""
    if query.isascii():
        return query
    try:
        return query.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return query


def _as_utf8(text: str) -> str:
    """What WSGI decoded as Latin-1, as frameworks read a header or a path: what is no UTF-8 is replaced."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "replace")


def _any_in(names: tuple[str, ...], text: str) -> bool:
    for name in names:  # noqa: SIM110 - any() makes a generator, which costs each request three times this
        if name in text:
            return True
    return False


def _skip(said: Any, in_url: str | None) -> int | None:
    """The app's word, else the media URL's own ``skip`` (TwentyThree's Flash player wrote it there)."""
    if said is None and in_url is None:
        return None
    text = in_url if said is None else str(int(said) if isinstance(said, bool) else said)
    return int(text) if text in ("0", "1") else None


def _element(environ: WSGIEnvironment) -> str | None:
    """What browsers say of a media element's request (Fetch Metadata): it is of an HTML5 player."""
    return "html5" if environ.get("HTTP_SEC_FETCH_DEST") in ("video", "audio") else None


def _player(said: str | None) -> str | None:
    if not said or len(said) > LONGEST_PLAYER or not said.isprintable():
        return None
    return said


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
