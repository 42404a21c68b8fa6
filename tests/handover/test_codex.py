"""A task of Codex CLI, during which the gateway is reloaded."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.codex import BUILT_IN, CALL, MESSAGE, codex, turn_events
from tests.helpers.gateway import Gateway
from tests.helpers.reloading import reload
from tests.helpers.upstream import Socket, Upstream

pytestmark = [pytest.mark.promise_9, pytest.mark.slow]


def test_codex_connects_anew_and_goes_on(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    """The gateway is reloaded while a turn over its WebSocket is under way: that turn ends, Codex
    is told to move, and its next request is served by the new process."""
    begun, reloaded = threading.Event(), threading.Event()

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            answered = "from-the-tool" in json.dumps(frame["input"])
            number = len(upstream.sockets) * 100 + len(sock.frames)
            prewarm = frame.get("generate") is False
            item = None if prewarm else MESSAGE if answered else CALL
            events = turn_events(number, item)
            await sock.send(events[0])
            if item is CALL:
                begun.set()
                while not reloaded.is_set():
                    await asyncio.sleep(0.01)
            await sock.send(*events[1:])

    upstream.talk = talk
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(codex, gateway, key, tmp_path / "codex", "use a tool", BUILT_IN)
        assert begun.wait(100)
        before = reload(gateway)
        reloaded.set()
        said = task.result()
    assert said[-1]["type"] == "turn.completed"
    assert before.wait() == 0
    assert len(upstream.sockets) >= 2
    assert not [request for request in upstream.requests if request.method == "POST"]
    rows = gateway.rows()
    assert {row["outcome"] for row in rows} == {"completed"}
    assert len(rows) == sum(len(sock.frames) for sock in upstream.sockets)
    turns = [row for row in rows if row["output_tokens"]]
    (used,) = [line["usage"] for line in said if line["type"] == "turn.completed"]
    assert used["output_tokens"] == sum(row["output_tokens"] for row in turns)
