"""The package's errors; each branch of the tree asks for a different reaction.

T23Error
├── ConfigurationError      a setting is missing or wrong: reported at start, all problems at once
├── UsageError              a command got wrong arguments or input
├── StateError              the state folder can't be used
└── DeliveryError           a report was not delivered
    ├── RetryLater          the API does not answer: retry; does not count against the report's attempts
    │   ├── Unreachable     the report was not sent
    │   ├── NoAnswer        the report was sent but its answer was lost: it may have been recorded
    │   └── Busy            the API, or a proxy in front of it, asked to try later
    ├── NotAccepted         every report would get this answer: pause until the site is fixed
    └── Refused             the API will never accept this report: drop it
        └── Unexplained     an undocumented answer: retry a few times, then drop the report
"""

from __future__ import annotations

from collections.abc import Sequence


class T23Error(Exception):
    """Base of all errors that this package raises."""


class ConfigurationError(T23Error):
    """Settings are missing or wrong; lists all problems at once, each with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        #: One sentence per problem, each naming its variable.
        self.problems = tuple(problems)


class UsageError(T23Error):
    """A command got wrong arguments, or input that it can't use."""


class StateError(T23Error):
    """The state folder can't be created, read or written."""


class DeliveryError(T23Error):
    """A report was not delivered."""


class RetryLater(DeliveryError):
    """The API does not answer; the same report can be sent again."""

    #: Seconds to wait from the API's ``Retry-After`` (RFC 9110, section 10.2.3); ``None`` without one.
    retry_after: float | None = None


class Unreachable(RetryLater):
    """The report was not sent: no address, no connection, no TLS."""


class NoAnswer(RetryLater):
    """The report was sent but its answer was lost, so it may have been recorded."""

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        #: Whether something answered that is not the API; this rarely ends without a change by the operator.
        self.answered = answered


class Busy(RetryLater):
    """The API, or a server in front of it, answered that it can't accept the report now."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotAccepted(DeliveryError):
    """The API accepts no report from this server: it is not whitelisted, or the path is wrong."""


class Refused(DeliveryError):
    """The API will never accept this report."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        #: The API's own error code, or ``http_<status>`` if it gave none.
        self.code = code


class Unexplained(Refused):
    """The API refused with a code that its documentation does not list."""
