"""A fixture: upstreams of these tests speak WebSocket as OpenAI does."""

from __future__ import annotations

import pytest

from tests.helpers.upstream import Upstream, ws_like_openai


@pytest.fixture(autouse=True)
def speaking(upstream: Upstream) -> None:
    upstream.talk = ws_like_openai
