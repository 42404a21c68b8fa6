"""A small program that waits for other processes. It needs 10 MB, and imports nothing of ours.

It is used in two ways. A gateway starts another one through it, so that the new process is not its
child: once the waiting process is killed, the new one is a child of the first process, as systemd
expects of a service. And the first process of a container becomes it when another process has taken
over from it: if it ended, everything else in the container would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
KILL = signal.SIGQUIT  # of a waiting process: kill the other one. SIGKILL would leave it running
START, STAY = "start", "stay"


def waiting_command(*arguments: str) -> list[str]:
    """Return the command line of this program."""
    return [sys.executable, "-I", "-S", __file__, *arguments]


def stay(pid: int) -> None:
    """If this is the first process, replace its program by this one, which waits for the process
    `pid` and for those that take over from it."""
    if os.getpid() == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the other program handles them
        os.execv(sys.executable, waiting_command(STAY, str(pid)))


def start_and_wait(files: Sequence[int], command: Sequence[str]) -> int:
    """Start a process, which inherits these files. Pass signals on to it, kill it at KILL, and
    return its exit status."""
    process = subprocess.Popen(command, pass_fds=files, env={**os.environ})
    for file in files:
        os.close(file)
    signal.signal(KILL, lambda *_: process.kill())
    pass_on(process.send_signal)
    return shell_status(process.wait())


def wait_as_first(pid: int) -> int:
    """Wait until a process has ended, with those that it leaves behind, and pass signals on to
    them. Return the exit status: 0, or that of the first of them that fails. If one fails that has
    taken over from it, wait until it has ended."""
    pass_on(tell_children)
    waiting, failed = {pid}, 0
    while waiting:
        ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if ended not in waiting:
            failed = failed or code
            continue
        waiting.discard(ended)
        if code:
            return shell_status(code)
        waiting |= set(children())
    return shell_status(failed)


def pass_on(send: Callable[[int], None]) -> None:
    """Call `send` with each signal that this process gets."""

    def handle(number: int, _: FrameType | None) -> None:
        send(number)

    for number in PASSED_ON:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def tell_children(number: int) -> None:
    """Send a signal to the processes whose parent is this one: in a container, to the gateway, and
    not to commands that somebody has started beside it, which the signal would end."""
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def shell_status(code: int) -> int:
    """Return an exit status as shells do: 128 and its number for a signal."""
    return 128 - code if code < 0 else code


def children() -> Iterator[int]:
    """Return the processes that run and whose parent is this one."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="latin-1") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if parent == str(os.getpid()) and state != "Z":
            yield int(name)


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say: `start FILES COMMAND…` or `stay PID`."""
    if arguments[0] == START:
        return start_and_wait([*map(int, arguments[1].split(","))], arguments[2:])
    return wait_as_first(int(arguments[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
