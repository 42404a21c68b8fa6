"""Fixtures: an upstream, and gateways in front of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.fork_server import ForkServer
from tests.helpers.gateway import ROOT, Gateway, MakeGateway
from tests.helpers.tools import needs
from tests.helpers.upstream import Upstream

# On a slow machine neither an example nor its generation may fail for its duration.
settings.register_profile(
    "any speed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any speed")
STARTING = {"make_gateway", "running", "shared", "house", "browser", "machine"}  # fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a process: `make test-fast` leaves most of them out. Slow tests
    begin first, so that none of them is left to one worker at the end; those with a browser come
    last, since Playwright leaves an event loop running in its worker."""

    def place(item: pytest.Item) -> int:
        fixtures = {*item.fixturenames} if isinstance(item, pytest.Function) else set()
        if STARTING & fixtures:
            item.add_marker("process")
        return 2 if "browser" in fixtures else int(item.get_closest_marker("slow") is None)

    items.sort(key=place)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer(ROOT) as running:
        yield running


@pytest.fixture
def make_gateway(
    tmp_path: Path, upstream: Upstream, fork_server: ForkServer | None
) -> Iterator[MakeGateway]:
    """Makes gateways; each is not yet started. All are closed at the end, and each fails the test
    that died by itself or wrote a traceback."""
    made = 0
    with ExitStack() as closing:

        def make(
            settings: str | Mapping[str, Any] = "", upstream_settings: str = "", **env: Any
        ) -> Gateway:
            nonlocal made
            folder = tmp_path / f"gateway{made}"
            made += 1
            gateway = Gateway(folder, upstream.url, settings, upstream_settings, **env)
            gateway.fork_server = fork_server
            closing.callback(gateway.close)
            return gateway

        yield make


@pytest.fixture
def gateway(make_gateway: MakeGateway) -> Gateway:
    """A running gateway with the usual settings."""
    return make_gateway().start()


@pytest.fixture
def key(gateway: Gateway) -> str:
    return gateway.new_key()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    if os.getuid():
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [needs("mount"), "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)
