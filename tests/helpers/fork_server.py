"""A process that has loaded the gateway's code and forks gateways and commands. A forked one starts
in a tenth of the time that Python takes to load the code, and most tests start one.

The process runs this file. It is sent JSON messages: what to run, with the descriptors 0 to 2 of
the new process, answered with its process id; or a process id, answered with the exit status of
that process, null while it runs."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

MAX_MESSAGE = 1 << 18


class Forked:
    """A forked process, with the part of subprocess.Popen that the tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self._status: int | None = None
        self._asking = threading.Lock()
        self.pid = pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        with self._asking:
            if self._status is None:
                self._status = self._server.ask({"status_of": self.pid})
            return self._status

    def wait(self, timeout: float = 1e9) -> int:
        """Return the exit status once there is one. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["a forked process"], timeout)
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process, as the tests see it: open it by `with`. Any thread may use it."""

    def __init__(self, root: Path) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(root), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, descriptors: list[int]
    ) -> Forked:
        """Run the gateway's script, whose path is the first of the arguments. `descriptors` are
        those of standard input, output and error."""
        what = {"arguments": arguments, "env": env, "cwd": str(cwd)}
        return Forked(self, int(self.ask(what, descriptors)))

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Do what subprocess.run does. Raises subprocess.TimeoutExpired."""
        with (
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as errors,
            open(os.devnull) as nothing,
        ):
            files = [each.fileno() for each in (nothing, output, errors)]
            process = self.start(arguments, env, cwd, files)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(arguments, status, output.read(), errors.read())

    def ask(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> Any:
        """Send the process a message and return the answer."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
            return json.loads(self._socket.recv(100))

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait()


def serve(sock: socket.socket) -> None:
    """Answer messages. Return in each forked process, which has become what was asked for, and exit
    when the other end is closed."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(sock, MAX_MESSAGE, 3)
        if not text:
            raise SystemExit
        message = json.loads(text)
        if "status_of" in message:
            answer = status_of(message["status_of"])
        else:
            answer = os.fork()
            if not answer:
                sock.detach()
                become(**message, descriptors=descriptors)
                return
            for descriptor in descriptors:
                os.close(descriptor)
        sock.send(json.dumps(answer).encode())


def status_of(pid: int) -> int | None:
    """Return the exit status of a child, or None while it runs. Once it is returned, the system may
    give the process id to another process."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become(arguments: list[str], env: dict[str, str], cwd: str, descriptors: Sequence[int]) -> None:
    """Make this process look like one that was executed with these arguments."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Load the gateway's code, serve, and run the gateway in each forked process."""
    root, descriptor = sys.argv[1:]
    sys.path[0] = root
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import redbtc_proxy  # noqa: F401 - the command loads it late
    from redbtc.__main__ import main as redbtc_main

    assert threading.active_count() == 1, "only the forking thread survives a fork"
    gc.freeze()
    with socket.socket(fileno=int(descriptor)) as sock:
        serve(sock)
    redbtc_main()


if __name__ == "__main__":
    main()
