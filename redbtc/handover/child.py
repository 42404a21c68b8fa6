"""Start the process that is to take over from this one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from redbtc.errors import UserError
from redbtc.waiting_process import KILL, START, waiting_command

VARIABLE = "REDBTC_HANDOVER"  # the descriptors of the channel and of standard error
KEPT_BYTES = 8 << 10  # of what the process has written to standard error
OWN_END_SECONDS = 1  # for a process to end by itself: its status says why
CHILD_END_SECONDS = 10  # for a process that is told to end


class NotTakenOver(UserError):
    """No other process has taken over: this one goes on as before."""


def same_command() -> list[str]:
    """Return the command line that this process was started with.

    An installed command lies in its environment beside the Python that it is for, which its first
    line names by the path that the environment was made with. If the way to the command leads into
    another environment now (a symbolic link to a release), that one's Python is used: with this
    process's Python, the old program would start again. Raises OSError."""
    python, arguments = sys.executable, sys.orig_argv[1:]
    if sys.argv[0] in arguments:
        folder = Path(os.path.realpath(sys.argv[0])).parent
        if (folder.parent / "pyvenv.cfg").exists() and (folder / "python").exists():
            python = str(folder / "python")
    return [python, *arguments]


class Child:
    """The new process, which is started through another one (waiting_process.py). Until it serves,
    what it writes to standard error is read here, since it says why the process can't serve, and is
    passed on."""

    def __init__(self, channel: socket.socket) -> None:
        """Start the process, which gets `channel` as its end of the channel. Raises OSError."""
        stderr = os.dup(2)
        reading, writing = os.pipe()
        try:
            files = channel.fileno(), stderr
            given = ",".join(map(str, files))
            self._process = subprocess.Popen(
                waiting_command(START, given, *same_command()),
                env=os.environ | {VARIABLE: given},
                stdin=subprocess.DEVNULL,
                stderr=writing,
                pass_fds=files,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(stderr)
            os.close(writing)
        self._said = b""
        self._reader = threading.Thread(
            target=self._read, args=(reading,), name="successor", daemon=True
        )
        self._reader.start()

    def _read(self, reading: int) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(reading, 4096):
                self._said = (self._said + data)[-KEPT_BYTES:]
                os.write(2, data)
        os.close(reading)

    def end(self, *, at_once: bool) -> str:
        """End the process if it runs; with `at_once`, kill it. Return why it has ended: the last
        line that it has written, without those of the log. Blocks."""
        status = self._wait(OWN_END_SECONDS)
        if status is None and not at_once:
            self._process.terminate()
            status = self._wait(CHILD_END_SECONDS)
        if status is None:
            self._process.send_signal(KILL)
            status = self._wait(CHILD_END_SECONDS)
        if status is None:  # its disk does not answer; without the channel, it can't serve
            self._process.kill()
            status = self._process.wait()
        self._reader.join(CHILD_END_SECONDS)
        lines = [each.strip() for each in self._said.decode(errors="replace").splitlines()]
        said = [each for each in lines if each and not each.startswith("{")]
        if said:
            return said[-1].removeprefix("Error: ")
        return f"exit status {status}" if status < 128 else f"signal {status - 128}"

    def _wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def let_go(self) -> None:
        """Leave the process to itself: it serves. Blocks for an instant."""
        self._process.kill()
        self._process.wait()
