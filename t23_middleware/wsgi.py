"""Wraps an app without a code change: ``t23_middleware.wsgi:application`` is the app that ``T23_APP`` names, wrapped.

``gunicorn t23_middleware.wsgi``, ``waitress-serve t23_middleware.wsgi:application``, ``uwsgi --module
t23_middleware.wsgi:application`` and ``flask --app t23_middleware.wsgi:application run`` all accept it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import apps
from .errors import ConfigurationError
from .middleware import T23Middleware
from .settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    application: WSGIApplication


def load(app: str | WSGIApplication | None = None) -> WSGIApplication:
    """Return the app wrapped in :class:`~t23_middleware.T23Middleware`.

    *app* is a WSGI app, or a string in one of the forms of ``T23_APP``; ``None`` means the app that ``T23_APP`` names.
    A Flask app is returned as the same object with its ``wsgi_app`` wrapped. An app that is already wrapped is returned
    unchanged. With ``T23_ENABLED=0`` the app is returned without the wrapper. Raises
    :class:`~t23_middleware.errors.ConfigurationError` if the app can't be found.
    """
    target = Settings.app_target() if app is None else app
    if target is None:
        raise ConfigurationError([f"T23_APP is not set; {apps.FORMS}"])
    found = apps.find(target) if isinstance(target, str) else target
    return _wrapped(found) if Settings.is_enabled() else found


def filter_app_factory(
    app: WSGIApplication, global_conf: Mapping[str, str], **local_conf: str
) -> WSGIApplication:
    """PasteDeploy's ``paste.filter_app_factory``: the options are the settings, in lower case and without ``T23_``."""
    return _wrapped(app, **local_conf)


def _wrapped(app: Any, **options: Any) -> WSGIApplication:
    if _is_flask(app):
        # Flask's command and its test client need the Flask object itself.
        if not isinstance(app.wsgi_app, T23Middleware):
            app.wsgi_app = T23Middleware(app.wsgi_app, **options)
        return app  # type: ignore[no-any-return]
    return app if isinstance(app, T23Middleware) else T23Middleware(app, **options)


def _is_flask(app: object) -> bool:
    flask = sys.modules.get("flask")
    return flask is not None and isinstance(app, getattr(flask, "Flask", ()))


if Settings.app_target() is not None:
    # Not by __getattr__: uWSGI reads the module's __dict__ (plugins/python/pyloader.c, uwsgi_uwsgi_loader).
    application = load()


def __getattr__(name: str) -> Any:
    if name == "application":
        # T23_APP was not set at import: this raises unless it was set later.
        globals()[name] = load()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
