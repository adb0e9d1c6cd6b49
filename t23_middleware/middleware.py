"""The middleware: the main path of every request."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .access import is_allowed
from .capture.response import CALLING, Capture, Response
from .errors import ConfigurationError
from .settings import Settings, as_text
from .version import VERSION

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

#: Environ key of a request that passed through a middleware: a second one around the same app does not count it.
SEEN = "t23.seen"
#: Paths of the operator's pages, relative to ``T23_STATUS_PATH``; all other paths below it belong to the app.
PAGES = frozenset(("", "/", ".json", "/status.json", "/metrics"))


class T23Middleware:
    """Counts the media that *app* streams and reports it.

    *settings*, or keyword arguments with the names of the fields of :class:`~t23_middleware.settings.Settings`,
    override the environment. Never raises: if the settings are invalid, the app runs without the middleware, and one
    ERROR explains why.
    """

    def __init__(self, app: WSGIApplication, settings: Settings | None = None, **arguments: Any) -> None:
        found = _read_settings(settings, arguments)
        self._capture = Capture(found, VERSION) if found else None
        self.app = _WithPages(app, found) if found and found.status_token else app
        self._warned_twice_wrapped = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        capture = self._capture
        if capture is None or self._is_inner(environ):
            return self.app(environ, start_response)
        capture.wake()
        environ[CALLING] = True
        try:
            if environ.get("REQUEST_METHOD") != "GET":
                return self.app(environ, start_response)
            response = Response(environ, start_response, capture)
            try:
                body = self.app(environ, response.start)
            except BaseException:
                response.abandon()
                raise
        finally:
            environ.pop(CALLING, None)
        return response.body(body)  # type: ignore[no-any-return]

    def _is_inner(self, environ: WSGIEnvironment) -> bool:
        outer = environ.setdefault(SEEN, self)
        if outer is self:
            return bool(environ.get(CALLING))  # if false, the app is called again with the same environ
        if not self._warned_twice_wrapped:
            self._warned_twice_wrapped = True
            log.warning(
                "T23Middleware wraps the app twice; only the outer one counts. Remove the inner one",
                extra={"t23_event": "wrapped_twice"},
            )
        return True


class _WithPages:
    """The app plus the operator's pages, which are imported at the first request for one of them.

    The operator's token is removed from requests that go to the app.
    """

    def __init__(self, app: WSGIApplication, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._prefix = settings.status_path
        self._token = (settings.status_token or "").encode()
        self._pages: WSGIApplication | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path: str = environ.get("PATH_INFO", "")
        if path.startswith(self._prefix) and path[len(self._prefix) :] in PAGES:
            return self._loaded()(environ, start_response)
        authorization = environ.get("HTTP_AUTHORIZATION")
        if authorization and is_allowed(authorization, self._token):
            del environ["HTTP_AUTHORIZATION"]
        return self._app(environ, start_response)

    def _loaded(self) -> WSGIApplication:
        if self._pages is None:
            # Imported late: the pages import sqlite3, which an app without page views does not need.
            self._pages = importlib.import_module("t23_middleware.ops.page").Pages(self._settings)
        return self._pages


def _read_settings(settings: Settings | None, arguments: dict[str, Any]) -> Settings | None:
    """The settings, or ``None`` if the middleware is off."""
    try:
        if settings is None:
            settings = Settings(**arguments)
        elif arguments:
            raise ConfigurationError(
                [
                    "T23Middleware accepts settings or keyword arguments, not both; pass the arguments to Settings"
                ]
            )
    except ConfigurationError as error:
        if settings is None and _is_off(arguments):
            return None
        log.error(
            "t23_middleware is off because its settings are invalid (the app runs without it): %s",
            "; ".join(error.problems),
            extra={"t23_event": "runs_bare", "t23_count": len(error.problems)},
        )
        return None
    for warning in settings.warnings:
        log.warning("%s", warning, extra={"t23_event": "setting_unknown"})
    return settings if settings.enabled else None


def _is_off(arguments: dict[str, Any]) -> bool:
    """Whether ``T23_ENABLED`` is off; other invalid settings then don't matter."""
    enabled = arguments.get("enabled")
    return not Settings.is_enabled(None if enabled is None else {"T23_ENABLED": as_text(enabled)})
