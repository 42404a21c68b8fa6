"""A fixture: an upstream that stores responses."""

from __future__ import annotations

import pytest

from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import Upstream


@pytest.fixture
def stored(upstream: Upstream) -> ResponseStore:
    stored = ResponseStore()
    upstream.script = stored
    return stored
