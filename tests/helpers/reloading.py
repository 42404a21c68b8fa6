"""A gateway that is reloaded: its process changes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import time

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, Process

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of processes whose parent has ended, so that their status can be read."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Adopted:
    """A process that another one has started, with the methods of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # its parent has not ended
                return None if os.path.exists(f"/proc/{self.pid}") else 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or PATIENCE_SECONDS)
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} has not ended"
            time.sleep(0.01)
        return status

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def reload(gateway: Gateway) -> Process:
    """Reload the gateway, and return its process before that."""
    done = gateway.run("reload", "--json")
    assert done.returncode == 0, done.stderr + gateway.log()
    assert gateway.process is not None
    gateway.past.append(gateway.process)
    gateway.process = Adopted(json.loads(done.stdout)["pid"])
    return gateway.past[-1]
