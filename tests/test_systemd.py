"""What the gateway and systemd say to each other, with the real protocol but without systemd."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from redbtc.systemd import (
    inherited_sockets,
    notify,
    reloading,
    report_status,
    watchdog_seconds,
)
from tests.helpers.gateway import ROOT

pytestmark = pytest.mark.promise_9


class Manager:
    """The receiving end of notifications."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(20)

    def receive(self) -> list[str]:
        return self._sock.recv(4096).decode().split("\n")

    def received(self) -> list[list[str]]:
        """Return all messages that have come."""
        messages = []
        self._sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                messages.append(self.receive())
        return messages


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    name = f"@redbtc-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield Manager(sock)


def test_lines_are_one_message(manager: Manager) -> None:
    assert notify("READY=1", "STATUS=Serving at 127.0.0.1:8080, München")
    assert manager.receive() == ["READY=1", "STATUS=Serving at 127.0.0.1:8080, München"]


def test_no_descriptor_to_notify_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setattr(socket, "socket", no_socket)
    assert not notify("READY=1")


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/nowhere/at/all", "@nobody-listens"])
def test_nobody_to_notify(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_a_manager_that_does_not_read_holds_nobody_up(manager: Manager) -> None:
    for _ in range(10_000):
        began = time.monotonic()
        if not notify("WATCHDOG=1"):
            break
    assert 0.5 < time.monotonic() - began < 10


def test_a_reload_begins_with_its_time() -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= after


# Socket activation

TAKE = """
import os, subprocess, sys
from redbtc.errors import UserError
from redbtc.systemd import inherited_sockets
try:
    found = inherited_sockets()
except UserError as error:
    sys.exit(str(error))
for each in found:
    print(each.family.name, each.getsockname())
left = [name for name in os.environ if name.startswith("LISTEN_")]
inherited = [each.fileno() for each in found if each.get_inheritable()]
print("left", left, inherited, inherited_sockets())
"""


def take(
    sockets: list[socket.socket], pid: str = "own", names: str = "http:http6:unix"
) -> subprocess.CompletedProcess[str]:
    """Run a process that has the sockets as its descriptors from 3 on, as systemd starts it."""
    numbers = [each.fileno() for each in sockets]
    high = 50  # first out of the way: a socket may be a descriptor that another one is to become
    moves = [f"exec {high + n}<&{each}" for n, each in enumerate(numbers)]
    moves += [f"exec {3 + n}<&{high + n} {high + n}<&-" for n in range(len(numbers))]
    pid = "$$" if pid == "own" else pid
    variables = f"LISTEN_PID={pid} LISTEN_FDS={len(numbers)} LISTEN_FDNAMES={names}"
    script = "; ".join([*moves, f'{variables} exec {sys.executable} -c "$TAKE"'])
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "TAKE": TAKE, "PYTHONPATH": str(ROOT)},
        pass_fds=numbers,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        yield [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))),
            stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)),
            unix,
        ]


def test_sockets_are_taken_once(listening: list[socket.socket], tmp_path: Path) -> None:
    done = take(listening)
    assert done.returncode == 0, done.stderr
    v4, v6, unix, left = done.stdout.splitlines()
    assert v4 == f"AF_INET {listening[0].getsockname()}"
    assert v6 == f"AF_INET6 {listening[1].getsockname()}"
    assert unix == f"AF_UNIX {tmp_path / 'socket'}"
    assert left == "left [] [] []"


def test_the_sockets_of_another_process_are_left_alone(listening: list[socket.socket]) -> None:
    assert take(listening, pid="1").stdout == "left [] [] []\n"


def test_what_does_not_listen_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        done = take([datagrams], names="wrong")
    assert done.returncode == 1
    assert done.stderr == (
        "descriptor 3 from systemd (wrong) is not a listening stream socket: AF_INET SOCK_DGRAM,"
        " which does not listen. Use only ListenStream= with Accept=no in the .socket"
        " unit.\n"
    )
    with (tmp_path / "file").open("w") as file:
        done = take([file], names="")  # type: ignore[list-item]
    assert "descriptor 3 from systemd (unnamed)" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_systemd_there_are_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert inherited_sockets() == []


# The watchdog


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("30000000", "own", 30.0),
        ("30000000", "", 30.0),  # passed on by the process before this one
        ("30000000", "1", None),
        ("0", "own", None),
        ("", "own", None),
        ("soon", "own", None),
    ],
)
def test_the_time_of_the_watchdog(
    microseconds: str, pid: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert watchdog_seconds() == seconds
    assert "WATCHDOG_PID" not in os.environ
    assert watchdog_seconds() == seconds, "a successor with this environment has the same"


async def report_for(seconds: float, statuses: list[str]) -> None:
    """Report these statuses, the last one for ever. `hang` is one that never comes."""

    async def status() -> str:
        now = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if now == "hang":
            await asyncio.Future()
        return now

    with suppress(TimeoutError):
        await asyncio.wait_for(report_status(status), seconds)


def test_the_watchdog_hears_from_a_ledger_that_fails(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "90000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    asyncio.run(report_for(1, ["well", "well", "full disk"]))
    messages = manager.received()
    assert messages[:3] == [
        ["WATCHDOG=1", "STATUS=well"],
        ["WATCHDOG=1"],
        ["WATCHDOG=1", "STATUS=full disk"],
    ]
    assert messages[3:] == [["WATCHDOG=1"]] * len(messages[3:])
    assert 5 < len(messages) <= 35


def test_a_status_can_say_nothing_else(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason can be a text of another program."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    asyncio.run(report_for(0.3, ["full\nMAINPID=1\rdisk"]))
    assert manager.received() == [["STATUS=full MAINPID=1 disk"]]


def test_the_watchdog_hears_nothing_where_no_status_comes(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    asyncio.run(report_for(0.5, ["well", "hang"]))
    assert manager.received() == [["WATCHDOG=1", "STATUS=well"]]


def test_without_a_watchdog_only_the_status_is_told(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    asyncio.run(report_for(0.3, ["well"]))
    assert manager.received() == [["STATUS=well"]]


def test_without_systemd_no_status_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    statuses = ["well", "second"]
    asyncio.run(report_for(0.1, statuses))
    assert statuses == ["well", "second"]
