"""Puts every WSGI app that a framework's own tests call behind the middleware.

``foreign_suites.py`` loads it into each Python process of a test run, before the tests and also in the servers that
they start. It patches the places where that framework, or the standard library, calls an app. Each request gets a
session and a photo, so that its response is counted whatever its type.

Where both a framework and its test client are patched, the outermost counts; the middleware ensures that itself.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from t23_middleware import Settings, T23Middleware

App = Callable[..., Iterable[bytes]]

#: Names the folder of the journals; without it nothing is patched.
STATE = "WRAP_EVERY_APP_STATE"
#: All types that the suites answer with.
MEDIA_TYPES = "text/*,application/*,image/*,video/*,audio/*,font/*,multipart/*,message/*,x-foo/*"
PLAY = {"t23.session_id": "foreign-suite", "t23.photo_id": "4711"}
SEEN = "t23.seen"


class WrappedApp:
    """An app behind the middleware; a call that is not a WSGI call goes to the bare app."""

    def __init__(self, app: App, middleware: T23Middleware) -> None:
        self._app = app
        # One middleware's journal for all apps: a run makes thousands, and each would open its own.
        self._middleware = copy.copy(middleware)
        self._middleware.app = app

    def __call__(self, *arguments: Any, **named: Any) -> Iterable[bytes]:
        if named or len(arguments) != 2 or type(arguments[0]) is not dict:
            return self._app(*arguments, **named)
        environ, start_response = arguments
        if SEEN in environ:
            return self._app(environ, start_response)
        for name, value in PLAY.items():
            environ.setdefault(name, value)
        try:
            return self._middleware(environ, start_response)
        finally:
            # Tests call again with the same environ, which no server does.
            environ.pop(SEEN, None)


class Patches:
    """Replaces what calls apps; *state* is the folder of the journals."""

    def __init__(self, state: str) -> None:
        self._middleware = T23Middleware(
            _no_app,
            Settings(
                environ={},
                api_url="http://127.0.0.1:9",
                state_dir=state,
                relay="off",
                media_types=MEDIA_TYPES,
            ),
        )

    def wrapped(self, app: Any) -> Any:
        """*app* behind the middleware, once."""
        return app if isinstance(app, WrappedApp) else WrappedApp(app, self._middleware)

    def argument(self, owner: Any, name: str, place: int = 0) -> None:
        """Wrap the app that is positional argument *place* (or ``app``, ``application``) of ``owner.name``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def patched(*arguments: Any, **named: Any) -> Any:
            for key in ("app", "application"):
                if named.get(key) is not None:
                    named[key] = self.wrapped(named[key])
            if len(arguments) > place:
                before, app, after = arguments[:place], arguments[place], arguments[place + 1 :]
                arguments = (*before, self.wrapped(app), *after)
            return original(*arguments, **named)

        setattr(owner, name, patched)

    def call(self, owner: type) -> None:
        """Wrap the instances of *owner*, which are apps themselves."""
        original = owner.__call__

        @functools.wraps(original)
        def patched(this: Any, *arguments: Any, **named: Any) -> Any:
            return WrappedApp(functools.partial(original, this), self._middleware)(*arguments, **named)

        owner.__call__ = patched  # type: ignore[method-assign]


def _no_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    raise AssertionError("the middleware was called without an app")


def _standard_library(patches: Patches) -> None:
    import wsgiref.handlers
    import wsgiref.validate

    # The validator stays outside: it checks what the middleware passes on.
    patches.argument(wsgiref.validate, "validator")
    patches.argument(wsgiref.handlers.BaseHandler, "run", 1)


def _waitress(patches: Patches, waitress: Any) -> None:
    patches.argument(importlib.import_module("waitress.server").TcpWSGIServer, "__init__", 1)


def _werkzeug(patches: Patches, werkzeug: Any) -> None:
    patches.argument(importlib.import_module("werkzeug.test"), "run_wsgi_app")
    patches.argument(importlib.import_module("werkzeug.serving").BaseWSGIServer, "__init__", 3)
    patches.call(importlib.import_module("werkzeug.wrappers").Response)


def _flask(patches: Patches, flask: Any) -> None:
    patches.call(flask.Flask)


def _bottle(patches: Patches, bottle: Any) -> None:
    patches.call(bottle.Bottle)


def _falcon(patches: Patches, falcon: Any) -> None:
    patches.call(falcon.App)


def _webob(patches: Patches, webob: Any) -> None:
    patches.argument(importlib.import_module("webob.request").BaseRequest, "call_application", 1)
    patches.call(webob.Response)


def _webtest(patches: Patches, webtest: Any) -> None:
    """Inside WebTest's lint, which then checks the middleware; if lint is off, WebOb's request wraps."""
    lint: Any = importlib.import_module("webtest.lint")
    patches.argument(lint, "middleware")
    linted = lint.middleware

    def already_wrapped(*arguments: Any, **named: Any) -> Any:
        return _Linted(linted(*arguments, **named), patches)

    lint.middleware = already_wrapped


class _Linted(WrappedApp):
    """An app behind WebTest's lint, with the middleware inside: not to be wrapped again."""

    def __init__(self, app: App, patches: Patches) -> None:
        super().__init__(app, patches._middleware)

    def __call__(self, *arguments: Any, **named: Any) -> Iterable[bytes]:
        return self._app(*arguments, **named)


FRAMEWORKS = {
    "waitress": _waitress,
    "werkzeug": _werkzeug,
    "flask": _flask,
    "bottle": _bottle,
    "falcon": _falcon,
    "webob": _webob,
    "webtest": _webtest,
}


def install() -> None:
    """Patch what is installed here, if the run asks for it."""
    state = os.environ.get(STATE)
    if state is None:
        return
    patches = Patches(state)
    _standard_library(patches)
    for name, patch in FRAMEWORKS.items():
        try:
            framework = importlib.import_module(name)
        except ImportError:
            continue
        patch(patches, framework)


install()
