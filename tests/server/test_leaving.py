"""A request that has arrived in part, rebuilt for another process."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.handover.moving import LeavingConnections
from redbtc.server.connections import Connections
from redbtc.server.framing import MAX_CHUNKS_PER_TURN, BadFraming, Chunked, Framing, Length
from redbtc.server.leaving import LeftConnection, leave
from redbtc.server.listening import server_for
from redbtc.server.protocol import HTTPProtocol

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_9]


def read(framing: Framing, data: bytes) -> tuple[bytes, bytes]:
    """Feed all data as a connection does; return the body, and what was not parsed."""
    body, rest = framing.feed(data)
    while rest and not framing.whole:
        more, rest = framing.feed(rest)
        body += more
    return body, rest


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body, and its chunked encoding, with extensions and trailers."""
    parts = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=8))
    extension = draw(st.sampled_from([b"", b";a=b", b" ; x"]))
    trailer = draw(st.sampled_from([b"", b"x: 1\r\n", b"x: 1\r\ny: 2\r\n"]))
    text = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return b"".join(parts), text + b"0\r\n" + trailer + b"\r\n"


@given(chunked(), st.data(), st.binary(max_size=10))
def test_a_chunked_body_goes_on_where_it_was(
    message: tuple[bytes, bytes], data: st.DataObject, following: bytes
) -> None:
    """Cut at any byte, moved, and cut again."""
    body, text = message
    text += following
    at = data.draw(st.integers(0, len(text)))
    framing = Chunked()
    begun, unparsed = read(framing, text[:at])
    again = framing.rebuilt(begun) + unparsed + text[at:]
    later = data.draw(st.integers(0, len(again)))
    second = Chunked()
    more, unparsed = read(second, again[:later])
    third = Chunked()
    assert read(third, second.rebuilt(more) + unparsed + again[later:]) == (body, following)
    assert third.whole


def test_many_small_chunks_are_moved_in_mid_turn() -> None:
    """What the turn of the loop has left unparsed is moved as it is."""
    text = b"1\r\nx\r\n" * (2 * MAX_CHUNKS_PER_TURN) + b"0\r\n\r\n"
    framing = Chunked()
    begun, unparsed = framing.feed(text)
    assert unparsed
    body, rest = read(Chunked(), framing.rebuilt(begun) + unparsed)
    assert (len(body), rest) == (2 * MAX_CHUNKS_PER_TURN, b"")


@given(st.binary(max_size=30), st.data())
def test_a_body_of_known_length_is_as_it_was(body: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body)))
    framing = Length(len(body))
    begun, _ = framing.feed(body[:at])
    assert framing.rebuilt(begun) == body[:at]


def test_what_was_wrong_stays_wrong() -> None:
    framing = Chunked()
    begun, _ = framing.feed(b"2\r\nab")
    with pytest.raises(BadFraming):
        read(Chunked(), framing.rebuilt(begun) + b"cd\r\n")


REQUESTS = {
    "a body": b"POST /v1/responses HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nab",
    "none": b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_whose_app_has_not_begun_is_left(kind: str) -> None:
    """Its head came in the turn of the loop in which the process stops to admit: it would be
    admitted here after the other process was told what is in flight."""
    served = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])
        await asyncio.sleep(60)

    async def run() -> None:
        server = server_for(app, Connections())
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        own, clients = socket.socketpair()
        with own, clients:
            loop = asyncio.get_running_loop()
            _, made = await loop.connect_accepted_socket(server.protocol, own.dup())
            protocol = cast(HTTPProtocol, made)
            protocol.data_received(REQUESTS[kind])
            left = leave(protocol)
            assert left is not None
            assert left.received == REQUESTS[kind]
            assert left.task
            await asyncio.wait([left.task])
            os.close(left.file)

            _, made = await loop.connect_accepted_socket(server.protocol, own.dup())
            protocol = cast(HTTPProtocol, made)
            protocol.data_received(REQUESTS[kind])
            await asyncio.sleep(0)
            assert served
            assert leave(protocol) is None  # it is served
            assert protocol.cycle
            assert protocol.cycle.task
            protocol.cycle.task.cancel()
            await asyncio.wait([protocol.cycle.task])

    asyncio.run(run())


def test_the_last_report_waits_for_connections_that_are_being_sent() -> None:
    """A body of 50 MB takes the other process a while to read; when `send` returns for the last
    time, this process ends."""
    sent = []

    class Slow:
        async def send(self, message: Any, files: list[int]) -> None:
            await asyncio.sleep(0.05)
            sent.append(message)

    class Leaving(LeavingConnections):
        def add(self, connection: LeftConnection) -> None:
            self._left.append(connection)

    async def run() -> None:
        leaving = Leaving(cast(Any, None), Connections())
        leaving.add(LeftConnection(os.open(os.devnull, os.O_RDONLY), b"x", None))
        first = asyncio.create_task(leaving.send(cast(Any, Slow())))
        await asyncio.sleep(0)
        await leaving.send(cast(Any, Slow()))
        assert len(sent) == 1
        await first

    asyncio.run(run())
