"""The first process of a container, after another one has taken over from it.

If it ended, everything else in the container would. So it becomes a small program that waits for
the process that serves, and for the one that takes over from that, and passes signals on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def stay(pid: int) -> None:
    """If this is the first process, replace its program by one that waits for the process `pid`. It
    needs 10 MB."""
    if os.getpid() == 1:
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, str(pid)])


def wait_for(pid: int) -> int:
    """Wait until a process has ended, with those that it leaves behind. Return the exit status: 0,
    or that of the first of them that fails."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(-1, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    waiting = {pid}
    while waiting:
        ended, status = os.wait()
        if ended not in waiting:
            continue
        waiting.discard(ended)
        if code := os.waitstatus_to_exitcode(status):
            return 128 - code if code < 0 else code
        waiting |= set(children())
    return 0


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


if __name__ == "__main__":
    sys.exit(wait_for(int(sys.argv[1])))
