"""How responses are counted here, in words: what the kernel tells of clients, as the relay noted it last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..relay.health import ACKED, BY_PROXY, ELSEWHERE, OFF
from ..settings import Settings
from .item import OK, WARN, Finding

_HANDED_OVER = "what the server handed over; what a client left unread in between counts too"


def counting_description(notes: Mapping[str, str]) -> str:
    """What is counted; ``""`` where no relay told yet."""
    problem = notes.get(ACKED)
    if problem is None:
        return ""
    if problem == BY_PROXY:
        return "what the proxy's log says (T23_PROXY_LOG)"
    if problem:
        return f"{_HANDED_OVER} ({problem})"
    return "what clients' kernels acknowledged, where the server's socket can be reached"


def counting_findings(settings: Settings, notes: Mapping[str, str]) -> Iterator[Finding]:
    """The same for ``check``, with the remedy where the kernel can't be asked."""
    problem, elsewhere = notes.get(ACKED), notes.get(ELSEWHERE, "0")
    if settings.proxy_log:
        return  # check_proxy tells of that
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
            f"{_HANDED_OVER}: {elsewhere} {'worker is' if elsewhere == '1' else 'workers are'} in another network namespace than the relay, which can't ask"
            " about their connections. Run the relay in the workers' network (Compose: network_mode: service:app;"
            " Kubernetes: one pod), or set T23_ACKED=0"
        )
        yield Finding(WARN, "counting", message)
    elif problem == "":
        yield Finding(OK, "counting", counting_description(notes))
