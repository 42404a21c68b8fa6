"""A request's body leaves the gateway's memory as soon as no attempt can need it any more: while
its answer streams, the gateway has not kept it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    event,
    images_pieces,
    response_pieces,
    ws_events,
)
from tests.helpers.websocket_client import client as websocket

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_9]

LARGE = 48 << 20  # bytes, more than glibc ever keeps in its heap: such a block is given back
FRAME = 250_000  # bytes of a message that is parsed as one frame
Ask = Callable[[Gateway, str, int], contextlib.AbstractContextManager[Any]]


class Holding:
    """Begins each answer, and ends it when `ends` is set. An upstream keeps no body for the tests:
    those would take more memory than the gateway."""

    def __init__(self, upstream: Upstream) -> None:
        self.ends = threading.Event()
        upstream.script, upstream.talk = self.answer, self.talk
        self._upstream = upstream

    async def answer(self, request: Received, reply: Reply) -> None:
        request.body = b""
        pieces = response_pieces(["Hello"])
        if "/images" in request.path:
            pieces = [event({"type": "image_edit.created"}), *images_pieces(1, kind="image_edit")]
        await reply.head(headers={"content-type": "text/event-stream"})
        await reply.send(pieces[0])
        while not self.ends.is_set():
            await asyncio.sleep(0.002)
        await reply.send(b"".join(pieces[1:]))
        await reply.end()

    async def talk(self, sock: Socket) -> None:
        frame = await sock.recv()
        sock.frames.clear()
        sock.texts.clear()
        first, *rest = ws_events(len(self._upstream.sockets), frame)
        await sock.send(first)
        while not self.ends.is_set():
            await asyncio.sleep(0.002)
        await sock.send(*rest)
        await sock.recv()


def begin_json(gateway: Gateway, key: str, size: int) -> contextlib.AbstractContextManager[Any]:
    """Send a request, and read the first event of its answer."""
    content = json.dumps({"model": "gpt-up", "input": "x" * size, "stream": True}).encode()
    return begin(gateway, key, "/responses", "application/json", content)


def begin_form(gateway: Gateway, key: str, size: int) -> contextlib.AbstractContextManager[Any]:
    """Send a form with a picture, and read the first event of its answer."""
    field = b'--x\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    content = field % (b"model", b"gpt-up") + field % (b"stream", b"true")
    picture = b"x" * size
    content += (
        field.replace(b'"\r\n', b'"; filename="a.png"\r\n') % (b"image", picture) + b"--x--\r\n"
    )
    return begin(gateway, key, "/images/edits", "multipart/form-data; boundary=x", content)


def begin(gateway: Gateway, key: str, path: str, kind: str, content: bytes) -> socket.socket:
    head = (
        f"POST /v1{path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
        f"content-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    sock = gateway.connect()
    sock.sendall(head.encode())
    sock.sendall(content)
    answer = b""
    while b"created" not in answer:
        part = sock.recv(65536)
        assert part, answer
        answer += part
    return sock


def begin_event(gateway: Gateway, key: str, size: int) -> contextlib.AbstractContextManager[Any]:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(websocket(gateway, key))
        client.send(input="x" * size)
        client.until("response.created")
        return stack.pop_all()


def rss_with_streams(
    gateway: Gateway, holding: Holding, key: str, ask: Ask, streams: int, size: int
) -> int:
    """Return the gateway's resident memory while it relays answers to bodies of this size."""
    holding.ends.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(streams):  # one by one: reading takes memory of its own
            stack.enter_context(ask(gateway, key, size))
        rss = gateway.rss()
        holding.ends.set()
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    return rss


@pytest.mark.parametrize(
    ("ask", "streams", "size"),
    [
        (begin_json, 2, LARGE),
        (begin_form, 2, LARGE),
        (begin_event, 2, LARGE),
        (begin_event, 60, FRAME),
    ],
)
def test_a_body_is_dropped_when_its_answer_begins(
    make_gateway: MakeGateway, upstream: Upstream, ask: Ask, streams: int, size: int
) -> None:
    holding = Holding(upstream)
    gateway = make_gateway("[limits]\nconcurrency = 1000\n").start()
    key = gateway.new_key(concurrency=0)
    small = rss_with_streams(gateway, holding, key, ask, streams, 100)
    large = rss_with_streams(gateway, holding, key, ask, streams, size)
    assert large - small < streams * size / 2
    assert {row["outcome"] for row in gateway.rows()} == {"completed"}
