"""What the kernel tells of connections: real sockets of this process, and answers that make no sense."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t23_middleware.relay import kernel as draining_module
from t23_middleware.relay import sock_diag
from t23_middleware.relay.drains import Drains, WatchedConnection
from t23_middleware.relay.kernel import Kernel
from t23_middleware.relay.sock_diag import Listener, Row, dump
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder
from t23_middleware.transfer import Acknowledged

from ..conftest import Journals
from ..harness import until


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual = family == socket.AF_INET6
    with closing(socket.create_server((host, 0), family=family, dualstack_ipv6=dual)) as server:
        yield server, server.getsockname()[1]


def pair(server: socket.socket, stack: ExitStack) -> tuple[socket.socket, socket.socket, int]:
    """Both ends of a new connection, the server's first, and its cookie."""
    client = stack.enter_context(closing(socket.create_connection(("127.0.0.1", server.getsockname()[1]))))
    end, _ = server.accept()
    stack.enter_context(closing(end))
    (cookie,) = struct.unpack("=q", end.getsockopt(socket.SOL_SOCKET, 57, 8))
    return end, client, cookie


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_dump_holds_the_ports_alone(host):
    with listening(host) as (server, port), listening() as (other, _), ExitStack() as stack:
        end, _, cookie = pair(server, stack)
        pair(other, stack)
        end.sendall(bytes(5000))
        assert until(lambda: dump([port])[cookie].info.acked == 5000)
        rows = dump([port])
        assert list(rows) == [cookie]
        assert rows[cookie].info.position == 5000
        assert dump([]) == {}
        assert len(dump([port, other.getsockname()[1]])) == 2


def test_closed_socket_without_account_is_done():
    """The server closed first and all was acknowledged: only the last of the handshake is left."""
    with listening() as (server, port), ExitStack() as stack:
        end, client, cookie = pair(server, stack)
        end.sendall(bytes(5000))
        end.close()
        while client.recv(5000):
            pass
        client.close()
        assert until(lambda: dump([port]).get(cookie) == Row(cookie, None, True))


def test_many_connections_in_one_dump():
    """More than one part of the kernel's answer holds."""
    with listening() as (server, port), ExitStack() as stack:
        cookies = {pair(server, stack)[2] for _ in range(300)}
        assert dump([port]).keys() == cookies


@contextmanager
def heard() -> Iterator[tuple[Listener, list[Row], list[str]]]:
    rows: list[Row] = []
    missed: list[str] = []
    listener = Listener(rows.append, lambda: missed.append("missed"))
    try:
        yield listener, rows, missed
    finally:
        listener.stop()


@pytest.mark.parametrize("ports", [1, 2, 200])
def test_filter_lets_the_ports_through(ports):
    """The wanted one stands first, in the middle or last among them."""
    with listening() as (server, port), listening() as (other, _), heard() as (listener, rows, _):
        lower = list(range(1, ports))
        listener.filter_ports([port, *lower] if ports < 200 else [*lower, port])
        cookies = []
        for each in (other, server, other, server):
            with ExitStack() as stack:
                cookies.append(pair(each, stack)[2])
        assert until(lambda: cookies[3] in [row.cookie for row in rows])
        ours = [row.cookie for row in rows if row.cookie in cookies]
        assert ours == [cookies[1], cookies[3]]


def test_more_ports_than_a_filter_holds():
    with listening() as (server, _), heard() as (listener, rows, _):
        listener.filter_ports([1])
        listener.filter_ports(range(1, 300))
        with ExitStack() as stack:
            cookie = pair(server, stack)[2]
        assert until(lambda: cookie in {row.cookie for row in rows})


def test_each_end_is_heard_until_the_stop():
    with listening() as (server, port):
        with heard() as (listener, rows, _):
            listener.filter_ports([port])
            with ExitStack() as stack:
                cookies = {pair(server, stack)[2] for _ in range(50)}
            assert until(lambda: cookies <= {row.cookie for row in rows})
        assert not any(thread.name == "t23-listener" for thread in threading.enumerate())


def test_dropped_notifications_are_noted(monkeypatch):
    """A real overrun: the smallest buffer, and nobody reads while many sockets are destroyed."""
    monkeypatch.setattr(sock_diag, "_RECEIVE_BUFFER", 1)
    busy = threading.Event()
    missed: list[bool] = []
    listener = Listener(lambda row: None if busy.wait(20) else None, lambda: missed.append(True))
    try:
        with listening() as (server, port):
            listener.filter_ports([port])
            for _ in range(100):
                with ExitStack() as stack:
                    pair(server, stack)
            busy.set()
            assert until(lambda: missed)
    finally:
        busy.set()
        listener.stop()


@given(st.binary(max_size=400), st.integers(0, 80))
def test_senseless_answers_raise_nothing(noise, kept):
    """Structures that are longer, shorter or of another version; a length of 0 would go on for ever."""
    for data in (noise, bytes(kept) + noise, struct.pack("=IHHII", len(noise) + 16, 20, 0, 1, 0) + noise):
        for _, _, body in sock_diag._messages(data):
            row = sock_diag._row(body)
            assert row is None or -(1 << 63) <= row.cookie < 1 << 63


@pytest.mark.parametrize("size", [120, 215, 216, 232, 400])
def test_account_of_another_kernel(size):
    """The structure grows with kernels; before 4.19 it is too short to tell."""
    info = struct.pack("=B119xQ16xI52xQQ", 1, 700, 50, 900, 100) + bytes(200)
    body = bytes(72) + struct.pack("=HHI", 8, 99, 7) + struct.pack("=HH", 4 + size, 2) + info[:size]
    row = sock_diag._row(body)
    assert row is not None
    assert (row.info is None) == (size < 216)
    assert row.info is None or (row.info.acked, row.info.position) == (700, 850)


# What is made of it.


def kernel(folder: StateFolder) -> Kernel:
    return Kernel(Settings(environ={"T23_API_URL": "http://127.0.0.1:9"}), folder)


def acknowledged(journals: Journals) -> list[Acknowledged]:
    return [line for line in journals.lines() if isinstance(line, Acknowledged)]


def watching(cookie: int, port: int, position: int | None = None, started_ns: int | None = None) -> Drains:
    drains = Drains(600)
    started_ns = time.monotonic_ns() if started_ns is None else started_ns
    drains.watch(("w", 1), WatchedConnection(cookie, port, started_ns, position))
    drains.wait(("w", 1), 0)
    return drains


def test_refused_socket_is_told_once(folder, journals, monkeypatch, caplog):
    """As systemd's RestrictAddressFamilies= and gVisor refuse it; the relay goes on without."""
    monkeypatch.setattr(sock_diag, "_SOCK_DIAG", 31)  # a family that no kernel has
    ours = kernel(folder)
    for _ in range(3):
        ours.begin(watching(1, 1))
        ours.poll(now=True)
    assert ours.network is None
    assert ours.problem == "Protocol not supported"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert acknowledged(journals) == []
    ours.stop()


def test_thread_that_can_not_start(folder, monkeypatch, caplog):
    """At the limit of processes or threads the relay goes on without."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ours = kernel(folder)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ours.begin(watching(1, 1))
    assert (ours.network, ours.problem) == (None, "can't start new thread")
    assert len(caplog.records) == 1
    ours.begin(watching(1, 1))
    assert ours.problem == "", "it tries again when it begins anew"
    ours.stop()


@pytest.mark.parametrize(
    ("setting", "problem"),
    [({"T23_ACKED": "0"}, "T23_ACKED=0"), ({"T23_PROXY_LOG": "/var/log/nginx/t23.log"}, "T23_PROXY_LOG")],
)
def test_settings_that_ask_nothing(setting, problem, folder, caplog):
    ours = Kernel(Settings(environ={"T23_API_URL": "http://127.0.0.1:9", **setting}), folder)
    ours.begin(watching(1, 1))
    assert (ours.network, ours.problem, ours.writer_name) == (None, problem, "")
    assert not any(thread.name == "t23-listener" for thread in threading.enumerate())
    assert caplog.records == []


def test_dump_that_fails_later_is_tolerated(folder, journals, monkeypatch, caplog):
    ours = kernel(folder)
    ours.begin(watching(1, 1, 5, 0))
    with monkeypatch.context() as patch:
        patch.setattr(draining_module, "dump", lambda ports: (_ for _ in ()).throw(OSError(105, "No buffer")))
        for _ in range(5):
            ours.poll(now=True)
    assert acknowledged(journals) == []
    assert len([record for record in caplog.records if "can't be asked" in record.message]) == 1
    for _ in range(2):
        ours.poll(now=True)
    ours.stop()
    assert [(line.acked, line.gone) for line in acknowledged(journals)] == [(None, 1)]


def received(client: socket.socket) -> int:
    """Bytes that the client's kernel took (``tcpi_bytes_received``)."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int(struct.unpack_from("=Q", info, 128)[0])


@pytest.mark.parametrize("holds", ["server", "forked process"])
def test_held_socket_reports_latest_count(holds, folder, journals, monkeypatch):
    """A socket that stays open after its client has left has no end event: the count of the latest dump is final."""
    monkeypatch.setattr(draining_module, "LONGEST_HELD", 0.2)
    with listening() as (server, port), ExitStack() as stack:
        ours = kernel(folder)
        ours.begin(Drains(600))
        stack.callback(ours.stop)
        end, client, cookie = pair(server, stack)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        end.sendall(bytes(200_000))
        ours.begin(watching(cookie, port, 200_000))
        client.recv(50_000)
        assert until(lambda: dump([port])[cookie].info.acked == received(client) > 0)
        took = received(client)
        ours.poll(now=True)
        if holds == "forked process":  # a descriptor of its own
            stack.enter_context(closing(end.dup()))
            end.close()
        client.close()
        assert until(lambda: ours.poll(now=True) or acknowledged(journals))
        assert [(line.acked, line.gone) for line in acknowledged(journals)] == [(took, 1)]
        assert took < 200_000


@pytest.mark.parametrize("port", [-1, 0, 65536, 1 << 61])
def test_port_that_can_not_be(port, folder, journals):
    ours = kernel(folder)
    ours.begin(watching(7, port))
    ours.poll(now=True)
    assert ours._drains.draining() == []
    ours.stop()
    assert journals.files() == []


def test_full_disk_is_waited_out(folder, journals, monkeypatch):
    """What is heard meanwhile is written when it can be, without another end to take it along."""
    ours = kernel(folder)
    with listening() as (server, port):
        with ExitStack() as stack:
            end, _, cookie = pair(server, stack)
            end.sendall(bytes(700))
            ours.begin(watching(cookie, port))
            ours.poll()
            folder.journals.rename(folder.path / "away")
            folder.journals.touch()
        assert until(lambda: cookie in ours._ends)
        time.sleep(0.1)
        folder.journals.unlink()
        (folder.path / "away").rename(folder.journals)
    assert until(lambda: ours.poll() or acknowledged(journals))
    ours.stop()
    assert [(line.cookie, line.gone) for line in acknowledged(journals)] == [(cookie, 1)]


def test_end_heard_before_its_open_line(folder, journals):
    """The notification comes at once, the open line is read a quarter of a second later."""
    ours = kernel(folder)
    ours.begin(Drains(600))
    with listening() as (server, port):
        with ExitStack() as stack:
            end, _, cookie = pair(server, stack)
            end.sendall(bytes(700))
        assert until(lambda: cookie in ours._ends)
        assert acknowledged(journals) == []
        drains = watching(cookie, port)
        ours.begin(drains)
        ours.poll()
    ours.stop()
    assert [(line.cookie, line.gone) for line in acknowledged(journals)] == [(cookie, 1)]


def test_ends_that_are_kept_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(draining_module, "MOST_ENDS", 10)
    ours = kernel(folder)
    for cookie in range(50):
        ours._on_destroyed(Row(cookie, None, False))
    assert list(ours._ends) == list(range(40, 50))
    monkeypatch.setattr(draining_module, "KEEP_ENDS", 0.0)
    ours._on_destroyed(Row(99, None, False))
    assert len(ours._ends) <= 1


def test_dumps_rest_in_between(folder, monkeypatch):
    """A dump that takes long is asked for the more rarely; one that takes nothing, five times a second at most."""
    asked: list[float] = []
    monkeypatch.setattr(draining_module, "dump", lambda ports: asked.append(time.monotonic()) or {})
    ours = kernel(folder)
    ours.begin(watching(1, 1))
    asked.clear()
    until(lambda: ours.poll() or len(asked) == 3)
    assert min(later - earlier for earlier, later in zip(asked, asked[1:], strict=False)) >= 0.19
    monkeypatch.setattr(draining_module, "dump", lambda ports: time.sleep(0.05) or {})
    ours.poll(now=True)
    assert ours._next_dump - time.monotonic() >= 0.95
    ours.stop()


def test_after_an_overrun_all_is_asked_anew(folder, journals):
    """What was seen before and is gone now may have ended among what was dropped."""
    ours = kernel(folder)
    with listening() as (server, port):
        with ExitStack() as stack:
            end, _, cookie = pair(server, stack)
            ours.begin(watching(cookie, port, 10**6))
            ours.poll(now=True)
            end.sendall(b"1")
            ours._listener.filter_ports([1])  # type: ignore[union-attr]
        for _ in range(4):
            ours.poll(now=True)
        assert acknowledged(journals) == [], "its end is waited for"
        ours._on_missed()
        for _ in range(4):
            ours.poll(now=True)
    ours.stop()
    assert [(line.cookie, line.acked, line.gone) for line in acknowledged(journals)] == [(cookie, None, 1)]


def test_kernel_that_is_asked_anew(folder, journals):
    """A relay that gave up its lock and takes it again listens again, into a journal of another name."""
    ours, names = kernel(folder), []
    with listening() as (server, port):
        for _ in range(2):
            with ExitStack() as stack:
                _, _, cookie = pair(server, stack)
                ours.begin(watching(cookie, port))
                ours.poll()
                names.append(ours.writer_name)
            assert until(lambda: cookie in [line.cookie for line in acknowledged(journals)])  # noqa: B023
            ours.stop()
            assert ours.writer_name == ""
    assert len(set(names)) == 2
    assert len(journals.files()) == 2
