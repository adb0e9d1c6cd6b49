"""The package's errors; each branch of the tree is a decision.

T23Error
├── ConfigurationError      told at start, all problems at once
├── UsageError              a command was used wrongly, or can't place what it was given
├── StateError              the state folder can't be used
└── DeliveryError           a report did not get through
    ├── RetryLater          the API is not answering: try again, nobody's attempts are used up
    │   ├── Unreachable     the report was not sent
    │   ├── NoAnswer        the report was sent and its answer lost: it may have been recorded
    │   └── Busy            the API, or what stands before it, said "not now"
    ├── NotAccepted         every report would meet the same: pause until the site is mended
    └── Refused             this report will never be taken: give it up
        └── Unexplained     an answer that nobody documents: a few tries, then give it up
"""

from __future__ import annotations

from collections.abc import Sequence


class T23Error(Exception):
    """Base of all errors that this package raises."""


class ConfigurationError(T23Error):
    """Settings are missing or wrong; says all of it at once, each problem with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        #: One sentence per problem, each naming its variable.
        self.problems = tuple(problems)


class UsageError(T23Error):
    """A command was used wrongly, or was given something that it can't place."""


class StateError(T23Error):
    """The state folder can't be created, read or written."""


class DeliveryError(T23Error):
    """A report did not get through."""


class RetryLater(DeliveryError):
    """The API is not answering; the same report is worth sending again."""

    #: Seconds that the API asked us to wait (``Retry-After``, RFC 9110 section 10.2.3), if it did.
    retry_after: float | None = None


class Unreachable(RetryLater):
    """The report was not sent: no address, no connection, no TLS."""


class NoAnswer(RetryLater):
    """The report was sent but its answer was lost, so it may have been recorded."""

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        #: Whether something answered, but not as the API does: that seldom passes by itself.
        self.answered = answered


class Busy(RetryLater):
    """The API, or a server before it, answered that it can't take the report now."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotAccepted(DeliveryError):
    """The API takes no report from this server: not whitelisted yet, or the path is wrong."""


class Refused(DeliveryError):
    """The API will never take this report."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        #: The API's own error code, or ``http_<status>`` where it gave none.
        self.code = code


class Unexplained(Refused):
    """The API refused with a code that its documentation does not list."""
