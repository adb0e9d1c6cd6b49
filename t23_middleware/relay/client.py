"""The client of the analytics API. Only this module uses HTTP.

:class:`AnalyticsClient` sends a report and distinguishes "not sent" from "sent without an answer"; :func:`judge` is
pure and decides what an answer means.
"""

from __future__ import annotations

import errno
import http.client
import io
import logging
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy
from urllib3.exceptions import HTTPError, LocationValueError

from ..errors import DeliveryError, NoAnswer, Refused, Unreachable
from ..settings import Settings, process_environment
from ..version import VERSION
from .answer import LONGEST_ANSWER, Accepted, clock_ahead, judge, shown
from .quoted import clip
from .report import Report, form

# urllib3 logs the text of headers that it can't read, and that may contain the session.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

#: Longest time to connect, in seconds, or ``T23_TIMEOUT`` if that is less.
CONNECT_SECONDS = 3.0

#: A connection that was idle for this many seconds is not used again. Servers close idle ones after 5 s or more, and a
#: report that is sent at that moment looks like one whose answer was lost.
IDLE_SECONDS = 4.0


#: The printable ASCII that RFC 6265 (cookie-octet) allows in a cookie's value. It includes ``%``, so that an encoded
#: value stays unchanged.
_COOKIE_OCTETS = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '",;\\')

#: OpenSSL's codes for a certificate of an unknown authority (``X509_V_ERR_…SELF_SIGNED…``, ``…ISSUER…``).
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})

_HEADERS = {
    "User-Agent": f"t23_middleware/{VERSION}",
    "Accept": "application/json, text/xml;q=0.5",
    # Some caches compress anyway; judge() decompresses that.
    "Accept-Encoding": "identity",
    "Content-Type": "application/x-www-form-urlencoded",
}


#: A certificate in PEM (RFC 7468).
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----")

#: The form fields of a request that records nothing.
_NO_REPORT = {"format": "json", "raw": "1"}


class _Posted(NamedTuple):
    """An answer that is not judged yet."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Probe(NamedTuple):
    """The result of a request that records nothing."""

    url: str
    outcome: Accepted | DeliveryError
    #: Seconds that this machine's clock is ahead of the API's; ``None`` if its answer has no ``Date``.
    ahead: float | None


class AnalyticsClient:
    """Sends reports, one POST each. Each thread keeps its own connection.

    Proxies and certificates are those of the environment at the first report to a site (``https_proxy``, ``no_proxy``,
    ``REQUESTS_CA_BUNDLE``, ``SSL_CERT_FILE`` …). Can be used from many threads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timeout = urllib3.Timeout(
            connect=min(CONNECT_SECONDS, settings.timeout), read=settings.timeout, total=settings.timeout
        )
        self._local = threading.local()
        self._routes: dict[str, dict[str, Any]] = {}
        self._sessions: weakref.WeakSet[_Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._read_authorities(settings.report_url("localhost"))

    def _read_authorities(self, url: str) -> None:
        """Read the certificate authorities while they exist. Errors are raised by the first report instead."""
        with suppress(OSError, requests.RequestException, ValueError):
            if urlsplit(url).scheme == "https":
                _authorities(self._route(url)["verify"])

    def send(self, report: Report, path: str | None = None) -> Accepted:
        """Send *report* once, within ``T23_TIMEOUT`` plus the time for DNS and for a proxy's tunnel.

        *path* replaces ``T23_REPORT_PATH``. Raises :class:`~t23_middleware.errors.Unreachable` if it was not sent,
        :class:`~t23_middleware.errors.NoAnswer` if it was sent and no answer came, and the errors of :func:`judge`.
        """
        started = time.monotonic()
        url = self._settings.report_url(report.host, path)
        posted = self._posted(url, form(report), self._cookie(report))
        answer = self._judged(posted, url, report.session_id)
        return answer._replace(seconds=time.monotonic() - started)

    def probe(self, host: str = "", path: str | None = None) -> Probe:
        """Send a report without video and session, which records nothing, and return the API's answer.

        *path* replaces ``T23_REPORT_PATH``. Never raises the errors of :meth:`send`: they are in the result.
        """
        url = self._settings.report_url(host, path)
        asked_s = time.time()
        try:
            posted = self._posted(url, _NO_REPORT | {"time": str(int(asked_s * 1000))}, {})
        except DeliveryError as error:
            return Probe(url, error, None)
        ahead = clock_ahead(posted.headers, (asked_s + time.time()) / 2)
        try:
            return Probe(url, self._judged(posted, url, ""), ahead)
        except DeliveryError as error:
            return Probe(url, error, ahead)

    def _posted(self, url: str, fields: Mapping[str, str], headers: Mapping[str, str]) -> _Posted:
        body = _Body(fields, time.monotonic() + self._settings.timeout)
        try:
            return self._exchange(url, body, headers)
        # ValueError: the standard library raises it for invalid names and numbers.
        except (
            requests.RequestException,
            HTTPError,
            http.client.HTTPException,
            OSError,
            ValueError,
            MemoryError,
            RuntimeError,  # a library could not start a thread
        ) as error:
            # "from None": the texts of these errors may contain a proxy's password.
            raise _not_answered(error, url, body.begun) from None

    def _judged(self, posted: _Posted, url: str, session_id: str) -> Accepted:
        try:
            return judge(*posted, url, session_id)
        except Refused:
            raise
        except DeliveryError:
            # Something else than the API may have answered, and the next bytes on this connection may be the API's.
            self._session().close()
            raise

    def close(self) -> None:
        """Close the connections of all threads; a later report opens new ones."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def _exchange(self, url: str, body: _Body, headers: Mapping[str, str]) -> _Posted:
        session = self._session()
        with session.post(
            url,
            data=body,
            headers=headers,
            stream=True,
            allow_redirects=False,
            timeout=self._timeout,  # type: ignore[arg-type]  # requests accepts urllib3's class, its stubs do not
            **self._route(url),
        ) as response:
            content = _content(response.raw)
            session.used = time.monotonic()
            return _Posted(response.status_code, response.headers, content)

    def _session(self) -> _Session:
        session: _Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = _Session()
            with self._lock:
                self._sessions.add(session)
        elif time.monotonic() - session.used > IDLE_SECONDS:
            session.close()
        return session

    def _cookie(self, report: Report) -> dict[str, str]:
        name = self._settings.report_cookie
        if name is None:
            return {}
        return {"Cookie": f"{name}={quote(report.session_id, _COOKIE_OCTETS, errors='replace')}"}

    def _route(self, url: str) -> dict[str, Any]:
        """Proxies and certificates for *url*, read once: reading the environment takes a third of a report's time."""
        route = self._routes.get(url)
        if route is None:
            route = self._routes[url] = _environments_route(url)
        return route


def _environments_route(url: str) -> dict[str, Any]:
    """Proxies for *url*, and the file or folder of the certificate authorities to trust."""
    found = requests.Session().merge_environment_settings(url, {}, None, None, None)
    verify = found["verify"]
    if verify is True:
        environ = process_environment()
        verify = environ.get("SSL_CERT_FILE") or environ.get("SSL_CERT_DIR") or True
    if verify is True:
        verify = DEFAULT_CA_BUNDLE_PATH
    proxy = select_proxy(url, found["proxies"])
    if proxy and not urllib3.util.parse_url(proxy).host:
        raise requests.exceptions.InvalidProxyURL  # requests does not always check this
    return {"proxies": found["proxies"], "verify": verify}


#: File or folder of certificate authorities -> its stat values, and its certificates.
_authorities_read: dict[str, tuple[tuple[int, ...], str]] = {}


def _authorities(path: str) -> str:
    """The certificates at *path*. If they can't be read any more, those of the latest successful read.

    Raises :class:`OSError` if there were none.
    """
    try:
        found = Path(path).stat()
        stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        if path not in _authorities_read or _authorities_read[path][0] != stamp:
            _authorities_read[path] = stamp, _certificates_at(Path(path))
    except OSError as error:
        if path not in _authorities_read:
            raise OSError(error.errno, f"no authorities at {path}: {error.strerror}") from None
    return _authorities_read[path][1]


def _certificates_at(place: Path) -> str:
    files = [file for file in sorted(place.iterdir()) if file.is_file()] if place.is_dir() else [place]
    texts = [file.read_bytes().decode("latin-1") for file in files]
    found = dict.fromkeys(block for text in texts for block in _CERTIFICATE.findall(text))
    if not found:
        raise OSError(errno.EINVAL, "it contains no certificate")
    return "\n".join(found)


def _content(raw: Any) -> bytes:
    """The body, up to one byte over the limit; urllib3 detects a cut-off body only when the rest is read."""
    content = b""
    while part := raw.read(LONGEST_ANSWER + 1 - len(content)):
        content += part
    return content


class _Session(requests.Session):
    """One thread's connection: no retries, no redirects, no cookies from one report to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.used = 0.0
        self.headers.clear()
        self.headers.update(_HEADERS)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(pool_maxsize=1, max_retries=0))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No target: requests would read the whole body of a redirect even if it must not follow it."""


class _Body:
    """The form of a report. It knows whether sending has begun; before that, nothing can be recorded."""

    def __init__(self, fields: Mapping[str, str], deadline: float) -> None:
        self._bytes = urlencode(fields, errors="replace").encode()
        self._deadline = deadline
        #: Whether sending has begun.
        self.begun = False

    def __len__(self) -> int:
        return len(self._bytes)

    def __iter__(self) -> Iterator[bytes]:
        if time.monotonic() >= self._deadline:
            raise TimeoutError("timed out")
        self.begun = True
        yield self._bytes


# An answer that comes byte by byte stays within the timeout of each single read. The following classes limit all reads
# of one answer (or of a proxy's answer to CONNECT) together to the socket's timeout at their begin.


class _Until(io.RawIOBase):
    """A socket's stream that can be read until a deadline."""

    def __init__(self, sock: socket.socket, stream: io.RawIOBase) -> None:
        self._sock = sock
        self._stream = stream
        timeout = sock.gettimeout()
        self._deadline = None if timeout is None else time.monotonic() + timeout
        #: Whether its end was reached.
        self.ended = False
        self._over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._over:
            return None
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)
        read: int | None = self._stream.readinto(buffer)
        self.ended = read == 0
        return read

    def end(self) -> None:
        """Stop reading from the socket."""
        self._over = True

    def shut_down(self) -> None:
        """Close the connection, which urllib3 detects before it uses it again."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Buffer(io.BufferedReader):
    """The stream of one answer. If more bytes came than the answer has, the connection is closed."""

    def close(self) -> None:
        until: Any = self.raw
        if not self.closed:
            until.end()
            if self.peek():  # reads only the buffer
                until.shut_down()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._until = _Until(sock, self.fp.detach())
        self.fp: Any = _Buffer(self._until)

    def begin(self) -> None:
        """Read status and headers.

        In contrast to the standard library, headers that are cut off are an error, and every 1xx but 101 is followed by
        another answer (RFC 9110 section 15.2).
        """
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers: Any = None
            super().begin()
        if self._until.ended:
            raise http.client.IncompleteRead(b"")


@cache
def _bounded(pool: type[Any]) -> type[Any]:
    """A subclass of a connection pool (direct, TLS, SOCKS) whose answers are read by `_Response`."""
    connection = type("Connection", (pool.ConnectionCls,), {"response_class": _Response})
    return type("Pool", (pool,), {"ConnectionCls": connection})


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self._limit(self.poolmanager)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Pass the authorities by their content: a deploy may have removed the file."""
        if url.lower().startswith("https"):
            conn.cert_reqs, conn.ca_certs, conn.ca_cert_dir = "CERT_REQUIRED", None, None
            conn.conn_kw["ca_cert_data"] = _authorities(verify)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if not known:
            self._limit(manager)
        return manager

    @staticmethod
    def _limit(manager: Any) -> None:
        manager.pool_classes_by_scheme = {
            scheme: _bounded(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
        }


# Errors without an answer.


def _not_answered(error: Exception, url: str, begun: bool) -> DeliveryError:
    causes = list(_causes(error))
    if begun:
        return NoAnswer(clip(f"{shown(url)} gave no answer, though it may have the report: {_why(causes)}"))
    return Unreachable(clip(f"{shown(url)} can't be reached: {_why(causes)}"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """*error* and the errors in it, the outermost first; requests and urllib3 store them in four places."""
    inner = [error.__cause__, getattr(error, "reason", None), getattr(error, "original_error", None)]
    yield error
    for cause in [*inner, *error.args]:
        if isinstance(cause, BaseException):
            yield from _causes(cause)


def _why(causes: list[BaseException]) -> str:
    """The reason in a few words, with a remedy if there is one; never a library's text, which may have a URL."""
    proxy = any(isinstance(cause, requests.exceptions.ProxyError) for cause in causes)
    reason = next(filter(None, map(_named, reversed(causes))), type(causes[-1]).__name__)
    return f"the proxy of the environment failed ({reason})" if proxy else reason


def _named(cause: BaseException) -> str | None:
    match cause:
        case ssl.SSLCertVerificationError():
            return _distrusted(cause)
        case ssl.SSLError():
            return f"no TLS ({cause.reason or 'failed'}); is T23_API_URL an https site?"
        case TimeoutError() | urllib3.exceptions.TimeoutError():
            return "timed out"
        case http.client.RemoteDisconnected():
            return "the connection was closed"
        case http.client.IncompleteRead() | urllib3.exceptions.IncompleteRead():
            return "the answer was cut off"
        case requests.exceptions.InvalidURL() | requests.exceptions.InvalidSchema() | LocationValueError():
            return "its address, or the environment's proxy, can't be used"
        case http.client.HTTPException():
            return "the answer is not HTTP"
        case requests.RequestException():
            return None
        case OSError():
            return cause.strerror or str(cause) or None
    return None


def _distrusted(error: ssl.SSLCertVerificationError) -> str:
    unknown = getattr(error, "verify_code", 0) in _UNKNOWN_ISSUER
    remedy = "; name its authority's file in REQUESTS_CA_BUNDLE" if unknown else ""
    return f"its certificate is not trusted ({getattr(error, 'verify_message', error)}){remedy}"
