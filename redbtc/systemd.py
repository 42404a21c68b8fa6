"""What systemd and the gateway say to each other: sd_notify(3), socket activation
(sd_listen_fds(3)) and the watchdog (sd_watchdog_enabled(3)).

Without systemd nothing here does anything. After a process has used the functions, its environment
can be passed on to the process that takes its place: NOTIFY_SOCKET and WATCHDOG_USEC stay, since
they are the unit's; what is meant for one process alone (LISTEN_*, WATCHDOG_PID) is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable

from redbtc.errors import UserError

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
SEND_SECONDS = 1.0  # for a message; systemd reads at once unless the machine is overloaded
STATUS_SECONDS = 10.0  # between two looks at the status, where there is no watchdog


def notify(*lines: str) -> bool:
    """Send lines such as "READY=1" to systemd in one message. Return whether they were sent: not if
    systemd did not start this process, or does not read."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):  # a socket without a file
        address = f"\0{address[1:]}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(SEND_SECONDS)
        sock.sendto("\n".join(lines).encode(), address)
        return True
    return False


def reloading() -> tuple[str, str]:
    """Return the lines that tell systemd that a reload begins (Type=notify-reload). Once READY=1 is
    sent, it counts as finished."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return "RELOADING=1", f"MONOTONIC_USEC={microseconds}"


def ends_service() -> bool:
    """Return whether systemd stops the service when this process ends, even if another one has
    taken over: the service is of Type=simple or Type=exec, so systemd listens to no messages.
    (SYSTEMD_EXEC_PID is set by systemd 248 and newer.)"""
    is_main = os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
    return is_main and "NOTIFY_SOCKET" not in os.environ


def inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd has opened for this process (socket activation), in
    the order of the unit; none if it has opened none. Processes that this one starts don't get
    them. Raises UserError where one is no listening stream socket."""
    variables = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if variables["PID"] != str(os.getpid()) or not variables["FDS"].isdecimal():
        return []
    names = variables["FDNAMES"].split(":")
    return [
        _listening_socket(FIRST_DESCRIPTOR + place, "".join(names[place : place + 1]))
        for place in range(int(variables["FDS"]))
    ]


def _listening_socket(descriptor: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        known = sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        if known and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return sock
        found = f"{sock.family.name} {sock.type.name}, which does not listen"
    except OSError as error:
        found = error.strerror or "unusable"
    raise UserError(
        f"descriptor {descriptor} from systemd ({name or 'unnamed'}) is not a listening stream"
        f" socket: {found}. Use only ListenStream= with Accept=no in the .socket unit."
    )


def watchdog_seconds() -> float | None:
    """Return the time after which systemd kills this process if it says nothing (WatchdogSec=), or
    None if there is no watchdog."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.pop("WATCHDOG_PID", "")
    if watched not in ("", str(os.getpid())):
        os.environ.pop("WATCHDOG_USEC", None)  # it is another process that is watched
        return None
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


async def report_status(status: Callable[[], Awaitable[str]]) -> None:
    """Tell systemd for ever that this process works, three times in each period of the watchdog,
    and its status (for `systemctl status`) when that changes.

    systemd kills a process that says nothing. So it is killed if the event loop stands still, or if
    `status` does not return: that is what a new process can mend. It is not killed if `status`
    returns that the ledger can't commit: on a full disk, a damaged page or a disk that does not
    answer, a new process would find the same, and requests in flight would have been cut."""
    if "NOTIFY_SOCKET" not in os.environ:
        await asyncio.Future()
    watchdog = watchdog_seconds()
    seconds = min(watchdog / 3, STATUS_SECONDS) if watchdog else STATUS_SECONDS
    said = ""
    while True:
        now = await status()
        lines = ["WATCHDOG=1"] if watchdog else []
        if now != said:
            one_line = " ".join(now.splitlines())  # a second line would not be of the status
            lines.append(f"STATUS={one_line}")
        if lines and notify(*lines):
            said = now
        await asyncio.sleep(seconds)
