"""What is in the gateway's memory reaches no core dump."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway
from tests.helpers.tools import needs
from tests.helpers.upstream import Received, Reply, Upstream

pytestmark = [
    pytest.mark.promise_6,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

NOBODY = 65534
CANARY = "core-canary-" + os.urandom(16).hex()
HIGHEST_LIMIT = """
import resource
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
"""


@pytest.fixture
def fork_server() -> None:
    """Let make_gateway start Python anew: a prelude sets the limit."""


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_crash_leaves_no_core(
    make_gateway: MakeGateway, upstream: Upstream, number: signal.Signals
) -> None:
    """Also if the limit was the highest at the start. A plain Python process shows whether this
    machine writes cores into files."""
    arrived, never = threading.Event(), threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        arrived.set()
        await reply.wait(never)

    upstream.script = script
    gateway = make_gateway()
    gateway.prelude = HIGHEST_LIMIT
    gateway.start()
    with gateway.begin(gateway.new_key(), {"model": "gpt-up", "input": CANARY}):
        assert arrived.wait(PATIENCE_SECONDS)
        limits = Path(f"/proc/{gateway.pid}/limits").read_text()
        (limit,) = [line.split()[4:6] for line in limits.splitlines() if line[:8] == "Max core"]
        gateway.signal(number)
        assert gateway.wait() == -number
    assert limit == ["0", "0"]
    assert not list(gateway.folder.glob("*core*"))
    assert not [each for each in files_in(gateway.folder) if CANARY.encode() in each.read_bytes()]


def files_in(folder: Path) -> list[Path]:
    return [each for each in folder.rglob("*") if each.is_file()]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a program as another user")
@pytest.mark.process
def test_only_root_may_read_its_memory(upstream: Upstream) -> None:
    """No core reaches a program that collects them either. The gateway itself still reads what it
    needs of /proc: its metrics, and its own socket in a folder with a long path."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        gateway = Gateway(folder / ("long" * 30) / "data", upstream.url)
        gateway.wrapper = as_nobody = (needs("setpriv"), f"--reuid={NOBODY}", "--clear-groups")
        for each in (folder, *folder.rglob("*")):
            os.chown(each, NOBODY, NOBODY)
        try:
            gateway.start().cli("account", "add", "test")
            key = gateway.cli("key", "add", "test")["key"]
            with gateway.client(key) as client:
                assert client.post("/responses", json={"model": "a", "input": "b"}).is_success
            assert gateway.metrics()["process_open_fds"] > 3
            for name in ("environ", "maps", "mem"):
                path = Path(f"/proc/{gateway.pid}/{name}")
                assert path.stat().st_uid == 0
                reading = [*as_nobody, "head", "-c1", str(path)]
                assert subprocess.run(reading, capture_output=True).returncode == 1
        finally:
            gateway.close()
