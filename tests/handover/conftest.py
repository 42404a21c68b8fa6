"""Fixtures: gateways that are reloaded are started by a Python of their own."""

from __future__ import annotations

import pytest

from tests.helpers.reloading import adopt_orphans


@pytest.fixture
def fork_server() -> None:
    """Let make_gateway start Python anew: a reload starts the same command line."""
    adopt_orphans()
