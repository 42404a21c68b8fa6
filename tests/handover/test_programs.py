"""A reload finds the program that is on the disk now, and goes on under a supervisor that watches
one process: as the first process of a container."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from redbtc.release import RELEASE
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, free_port, wait_until
from tests.helpers.programs import NEXT_RELEASE, copy_of_program
from tests.helpers.reloading import reload
from tests.helpers.tools import needs
from tests.helpers.upstream import Received, Reply, Upstream

pytestmark = pytest.mark.promise_9

COMMAND = """#!{python}
import sys
from redbtc.__main__ import main
sys.exit(main())
"""


def environment(folder: Path, release: str = RELEASE) -> Path:
    """Make an environment in which this program is installed, as pip does it."""
    venv.create(folder, symlinks=True)
    program = copy_of_program(folder / "program")
    about = program / "redbtc" / "release.py"
    about.write_text(about.read_text().replace(f'"{RELEASE}"', f'"{release}"'))
    packages = next(folder.glob("lib/*/site-packages"))
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "program.pth").write_text(f"{program}\n{libraries}\n")
    command = folder / "bin" / "redbtc-proxy"
    command.write_text(COMMAND.format(python=folder / "bin" / "python3"))
    command.chmod(0o755)
    return folder


def test_a_release_with_a_python_of_its_own_takes_over(
    tmp_path: Path, upstream: Upstream, fork_server: None
) -> None:
    """The first line of an installed command names the Python of its environment. A reload through
    a link that was moved on must not start the old one again."""
    first, second = environment(tmp_path / "1"), environment(tmp_path / "2", NEXT_RELEASE)
    current = tmp_path / "current"
    current.symlink_to(first)
    gateway = Gateway(tmp_path / "gateway", upstream.url)
    command = [str(current / "bin" / "redbtc-proxy"), "--config", str(gateway.config)]
    process = subprocess.Popen([*command, "serve", "--json"], stdout=subprocess.PIPE)
    pid = process.pid
    try:
        assert process.stdout
        process.stdout.readline()
        for release, folder in ((RELEASE, first), (NEXT_RELEASE, second), (NEXT_RELEASE, second)):
            current.unlink()
            current.symlink_to(folder)
            done = subprocess.run([*command, "reload", "--json"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            pid, version = json.loads(done.stdout)["pid"], json.loads(done.stdout)["version"]
            assert version == release
    finally:
        for each in {pid, process.pid}:
            os.kill(each, signal.SIGKILL)
        process.communicate()


FIRST = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from redbtc.waiting_process import wait_as_first

def child(seconds, status):
    if pid := os.fork():
        return pid
    time.sleep(seconds)
    os._exit(status)

first = child(0.6, 0)
child(0.2, 70)
sys.exit(wait_as_first(first))
"""


def test_a_container_fails_if_the_process_fails_that_has_taken_over() -> None:
    """Else nobody would start it again."""
    assert subprocess.run([sys.executable, "-c", FIRST]).returncode == 70


def first_process(make_gateway: MakeGateway) -> tuple[Gateway, int]:
    """Start a gateway as the first process of a container. Return it and that process's id."""
    if os.getuid():
        pytest.skip("only root can make a namespace of processes")
    gateway = make_gateway()
    gateway.wrapper = [needs("unshare"), "--pid", "--mount-proc", "--fork", "--kill-child"]
    gateway.start().wrapper = []
    (first,) = psutil.Process(gateway.pid).children()
    return gateway, first.pid


def answers(gateway: Gateway) -> bool:
    try:
        return gateway.get("/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


@contextmanager
def beside(first: int) -> Iterator[None]:
    """Run something else in the container, which no signal to the first process may end."""
    command = [needs("nsenter"), "-t", str(first), "-p", "-m", "--", "sleep", "300"]
    with subprocess.Popen(command) as process:
        try:
            yield
            assert process.poll() is None
        finally:
            for each in children(process.pid):  # its parent has to read its status
                os.kill(each, signal.SIGKILL)


def children(pid: int) -> set[int]:
    return {each.pid for each in psutil.Process(pid).children()}


def held_until(release: threading.Event) -> Any:
    """A script that sends the head of a stream, and the rest once it is released."""

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(headers={"content-type": "text/event-stream"})
        await reply.send(b'data: {"choices":[]}\n\n')
        await reply.wait(release)
        await reply.send(b"data: [DONE]\n\n")
        await reply.end()

    return script


def test_the_first_process_of_a_container_passes_signals_on(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """`docker stop` while the old process still finishes a stream ends the new one as well."""
    release = threading.Event()
    upstream.script = held_until(release)
    gateway, first = first_process(make_gateway)
    key = gateway.new_key()
    chat = {"model": "m", "messages": [], "stream": True}
    with (
        gateway.client(key) as client,
        client.stream("POST", "/chat/completions", json=chat) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        with beside(first):
            assert gateway.run("reload").returncode == 0
            before = children(first)
            os.kill(first, signal.SIGUSR2)  # is for the process that serves
            gateway.wait_for_log('"handed over"', 2)
            assert children(first) - before
            os.kill(first, signal.SIGTERM)
            wait_until(lambda: not answers(gateway))
        release.set()
        assert "data: [DONE]" in [*lines]
    assert gateway.wait() == 0


def test_the_waiting_program_passes_signals_on(make_gateway: MakeGateway) -> None:
    """Once the old process has ended, the small program in its place does so."""
    gateway, first = first_process(make_gateway)
    with beside(first):
        assert gateway.run("reload").returncode == 0
        wait_until(lambda: "waiting_process.py" in " ".join(psutil.Process(first).cmdline()))
        os.kill(first, signal.SIGHUP)
        gateway.wait_for_log('"reloaded"')
        os.kill(first, signal.SIGUSR2)
        gateway.wait_for_log('"handed over"', 2)
        wait_until(lambda: answers(gateway))
        assert gateway.run("account", "list").returncode == 0
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: not answers(gateway))
    assert gateway.wait() == 0


def test_a_port_that_is_left_is_closed(gateway: Gateway) -> None:
    """A copy of its socket that is still open would take connections that nobody serves."""
    left, gateway.port = gateway.port, free_port()
    gateway.url = f"http://127.0.0.1:{gateway.port}"
    gateway.configure()
    before = reload(gateway)
    wait_until(lambda: answers(gateway))
    assert before.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", left), 5)
