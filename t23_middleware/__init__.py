"""Reports the video that a WSGI app streams to TwentyThree's analytics.

::

    from t23_middleware import T23Middleware

    app.wsgi_app = T23Middleware(app.wsgi_app)
"""

import sys

if sys.platform == "win32":
    raise ImportError("t23_middleware runs on Linux and macOS; Windows has no record locks (fcntl)")

from .capture.identity import sign_session
from .errors import ConfigurationError, StateError, T23Error, UsageError
from .middleware import T23Middleware
from .settings import Settings
from .version import VERSION as __version__

__all__ = [
    "ConfigurationError",
    "Settings",
    "StateError",
    "T23Error",
    "T23Middleware",
    "UsageError",
    "__version__",
    "sign_session",
]
