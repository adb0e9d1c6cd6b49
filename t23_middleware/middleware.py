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

#: In the environ of a request that passed through us: a second middleware round the same app leaves it alone.
SEEN = "t23.seen"
#: The operator's pages, as they follow ``T23_STATUS_PATH``; what else is under it is the app's.
PAGES = frozenset(("", "/", ".json", "/status.json", "/metrics"))


class T23Middleware:
    """Reports what *app* streams.

    *settings*, or keyword arguments named as the fields of :class:`~t23_middleware.settings.Settings`, beat the
    environment. Never raises: with settings that are wrong the app runs on bare, and one ERROR says why.
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
            return bool(environ.get(CALLING))  # else the app is called again with the same environ
        if not self._warned_twice_wrapped:
            self._warned_twice_wrapped = True
            log.warning(
                "T23Middleware is wrapped round the app twice; the outer one counts, take the inner one away",
                extra={"t23_event": "wrapped_twice"},
            )
        return True


class _WithPages:
    """The app with the operator's pages beside it; they are loaded by the first request for one.

    The app never sees the operator's token: whoever sends it with a request to the app has sent it too far.
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
            # By name: the pages read the relay's database, and an app whose pages nobody opens never loads that.
            self._pages = importlib.import_module("t23_middleware.ops.page").Pages(self._settings)
        return self._pages


def _read_settings(settings: Settings | None, arguments: dict[str, Any]) -> Settings | None:
    """The settings, or ``None`` where nothing is counted."""
    try:
        if settings is None:
            settings = Settings(**arguments)
        elif arguments:
            raise ConfigurationError(
                ["T23Middleware takes either settings or arguments; put the arguments into Settings"]
            )
    except ConfigurationError as error:
        if settings is None and _is_off(arguments):
            return None
        log.error(
            "t23_middleware counts nothing, the app runs on bare: %s",
            "; ".join(error.problems),
            extra={"t23_event": "runs_bare", "t23_count": len(error.problems)},
        )
        return None
    for warning in settings.warnings:
        log.warning("%s", warning, extra={"t23_event": "setting_unknown"})
    return settings if settings.enabled else None


def _is_off(arguments: dict[str, Any]) -> bool:
    """Whether it is switched off; what else is wrong is then nobody's business."""
    said = arguments.get("enabled")
    return not Settings.is_enabled(None if said is None else {"T23_ENABLED": as_text(said)})
