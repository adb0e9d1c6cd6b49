"""How bytes are counted here, in words: whether the kernel reports acknowledged bytes, as the relay last noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..relay.health import ACKED, BY_PROXY, ELSEWHERE, OFF
from ..settings import Settings
from .item import OK, WARN, Finding

_HANDED_OVER = "bytes that the server handed over, also those that a client never read"


def counting_description(notes: Mapping[str, str]) -> str:
    """Which bytes are counted; ``""`` if no relay has noted it yet."""
    problem = notes.get(ACKED)
    if problem is None:
        return ""
    if problem == BY_PROXY:
        return "bytes in the proxy's log (T23_PROXY_LOG)"
    if problem:
        return f"{_HANDED_OVER} ({problem})"
    return "bytes that clients' kernels acknowledged, where the server's socket can be found"


def counting_findings(settings: Settings, notes: Mapping[str, str]) -> Iterator[Finding]:
    """The same for ``check``, with the remedy if the relay can't ask the kernel."""
    problem, elsewhere = notes.get(ACKED), notes.get(ELSEWHERE, "0")
    if settings.proxy_log:
        return  # check_proxy has findings about the log
    if not settings.acked:
        yield Finding(OK, "counting", f"{_HANDED_OVER} (T23_ACKED=0)")
    elif problem and problem not in (OFF, BY_PROXY):
        message = (
            f"{_HANDED_OVER}: the relay can't ask the kernel ({problem}). Allow it AF_NETLINK (systemd:"
            " RestrictAddressFamilies=, containers: the seccomp profile), or set T23_ACKED=0"
        )
        yield Finding(WARN, "counting", message)
    elif elsewhere.isdigit() and int(elsewhere):
        message = (
            f"{_HANDED_OVER}: {elsewhere} {'worker is' if elsewhere == '1' else 'workers are'} in another network namespace"
            " than the relay, so the relay can't ask the kernel about their connections. Run the relay in the workers'"
            " network (Compose: network_mode: service:app;"
            " Kubernetes: one pod), or set T23_ACKED=0"
        )
        yield Finding(WARN, "counting", message)
    elif problem == "":
        yield Finding(OK, "counting", counting_description(notes))
