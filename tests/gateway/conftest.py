"""Fixtures: an upstream that stores responses, and a gateway in front of two upstreams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.pair import Pair, running_pair
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import Upstream


@pytest.fixture
def stored(upstream: Upstream) -> ResponseStore:
    stored = ResponseStore()
    upstream.script = stored
    return stored


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair"), fork_server) as pair:
        yield pair


@pytest.fixture
def pair(running: Pair) -> Pair:
    """A gateway in front of two upstreams; see `Pair.use`."""
    running.use()
    return running
