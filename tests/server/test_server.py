"""The client's side of HTTP, without sockets: framing, limits and deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from redbtc.server import connections
from redbtc.server import protocol as protocol_module
from redbtc.server.asgi import Scope, request_of
from redbtc.server.connections import Connections, ConnectionState
from redbtc.server.framing import (
    HANDSHAKE_LISTS,
    MAX_CHUNKS_PER_TURN,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_TRAILER_BYTES,
    BadFraming,
    Chunked,
    is_handshake,
)
from redbtc.server.protocol import HTTPProtocol
from redbtc.server.stream import HIGH_WATER
from redbtc.store.keys import Key
from tests.helpers.speed import cost, cpu_seconds, unit
from tests.helpers.upgrades import HANDSHAKE, UPGRADES

pytestmark = pytest.mark.promise_9

KEY = cast(Key, "somebody's")
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n"


class Transport(asyncio.Transport):
    """A transport that records what the protocol writes, and whether it reads."""

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 9)}
        super().__init__(self.extra)
        self.out = b""
        self.unsent = 0
        self.reading = True
        self.eof = False
        self._end = ""

    def write(self, data: Any) -> None:
        self.out += data

    def writelines(self, list_of_data: Any) -> None:
        self.out += b"".join(list_of_data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write_eof(self) -> None:
        self.eof = True

    def is_closing(self) -> bool:
        return bool(self._end)

    def close(self) -> None:
        self._end = self._end or "closed"

    def abort(self) -> None:
        self._end = "aborted"

    def ended(self) -> str:
        """Return "", "closed" or "aborted"."""
        return self._end


Respond = Callable[[Scope, Any, Any], Awaitable[None]]


class Served:
    """A connection, and the requests that its app saw."""

    def __init__(
        self, app: Respond | None = None, maximum: int = 1000, offers: bool = False
    ) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.scopes: list[Scope] = []
        self.now = 0.0
        self._app = app or self._echo
        self.shared = Connections(lambda: offers, maximum, lambda: self.now)
        config = uvicorn.Config(self.app, lifespan="off", log_config=None, ws="none")
        config.load()
        config.loaded_app = self.app
        self._config = config
        self._state = ServerState()
        self.transport, self.protocol = self.connect()

    def connect(self) -> tuple[Transport, HTTPProtocol]:
        transport = Transport()
        protocol = HTTPProtocol(
            self.shared, config=self._config, server_state=self._state, app_state={}
        )
        protocol.connection_made(transport)
        return transport, protocol

    async def app(self, scope: Scope, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await self._app(scope, receive, send)

    async def _echo(self, scope: Scope, receive: Any, send: Any) -> None:
        refusal = request_of(scope).refusal
        body = b"" if refusal else await read(receive)
        self.requests.append((scope["method"], "" if refusal else scope["path"], body))
        status = refusal.status if refusal else 200
        await answer(send, b"ok", status)

    async def feed(self, *parts: bytes) -> None:
        for part in parts:
            self.protocol.data_received(part)
            await turn()

    def later(self, seconds: float) -> None:
        """Let time pass, and check the deadlines."""
        self.now += seconds
        self.shared._sweep()


async def read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        part: bytes = message["body"]
        body += part
        if not message["more_body"]:
            return body


async def answer(send: Any, body: bytes, status: int = 200, length: bool = True) -> None:
    headers = [(b"content-length", b"%d" % len(body))] if length else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def turn() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def post(headers: bytes, body: bytes, method: bytes = b"POST", path: bytes = b"/v1/x") -> bytes:
    length = b"\r\nContent-Length: %d" % len(body) if body else b""
    return b"%s %s HTTP/1.1\r\nHost: g\r\n%s%s\r\n\r\n%s" % (method, path, headers, length, body)


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_that_is_not_taken_is_ignored(upgrade: str) -> None:
    """Wherever it is cut, one request is served with its whole body, and then the next one."""
    after = post(b"X: y", b"next")

    async def test() -> None:
        for method in (b"POST", b"GET", b"PUT", b"DELETE", b"OPTIONS"):
            whole = post(UPGRADES[upgrade], SMUGGLED, method)
            expected = [(method.decode(), "/v1/x", SMUGGLED), ("POST", "/v1/x", b"next")]
            cuts = range(1, len(whole)) if method == b"POST" else range(1, len(whole), 7)
            for cut in cuts:
                served = Served()
                await served.feed(whole[:cut], whole[cut:], after)
                assert served.requests == expected, cut
                assert served.transport.out.count(b"HTTP/1.1 200 OK") == 2
                assert not served.transport.ended()

    run(test)


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_of_a_body_in_chunks_is_ignored(upgrade: str) -> None:
    async def test() -> None:
        head = post(UPGRADES[upgrade] + b"\r\nTransfer-Encoding: chunked", b"")
        whole = head + chunked(SMUGGLED, b"x", end=b"0\r\nX-Trailer: y\r\n\r\n")
        for cut in range(1, len(whole)):
            served = Served()
            await served.feed(whole[:cut], whole[cut:] + post(b"X: y", b"next"))
            assert [body for *_, body in served.requests] == [SMUGGLED + b"x", b"next"], cut
            assert b"x-trailer" not in dict(served.scopes[0]["headers"])

    run(test)


def test_connect_is_refused_and_closed() -> None:
    async def test() -> None:
        served = Served()
        await served.feed(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n" + SMUGGLED, SMUGGLED)
        assert served.transport.out.startswith(b"HTTP/1.1 400 ")
        assert served.transport.out.count(b"HTTP/1.1") == 1
        assert served.transport.eof
        served.later(connections.LINGER_SECONDS)
        assert served.transport.ended() == "aborted"

    run(test)


@pytest.mark.parametrize("body", [b"Content-Length: 25", b"Content-Length: 0"])
def test_a_handshake_with_a_body_is_refused_and_closed(body: bytes) -> None:
    async def test() -> None:
        served = Served(offers=True)
        await served.feed(
            b"GET /v1/responses HTTP/1.1\r\nHost: a\r\n%s\r\n" % HANDSHAKE + body + b"\r\n\r\n"
        )
        await served.feed(SMUGGLED)
        assert served.transport.out.startswith(b"HTTP/1.1 400 ")
        assert served.transport.out.count(b"HTTP/1.1") == 1
        assert b"connection: close" in served.transport.out

    run(test)


@pytest.mark.parametrize("name", HANDSHAKE_LISTS)
def test_long_lists_in_a_handshake_are_not_read(name: bytes) -> None:
    """In lines that the websockets package takes, they cost 40 ms."""
    headers = [tuple(line.lower().split(b": ")) for line in HANDSHAKE.split(b"\r\n")]
    scope = {"type": "http", "method": "GET", "http_version": "1.1", "headers": headers}
    assert is_handshake(scope)
    headers += [(name, b"a," * 3900 + b"a")] * 8
    assert not is_handshake(scope)
    assert cost(lambda: is_handshake(scope)) < 5


def test_chunks_are_read_strictly() -> None:
    """Wherever it is cut, each of these is an error, and none is taken for the end of a body."""
    bad = [
        b"x\r\n",
        b"0x1\r\na\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b" 1\r\na\r\n",
        b"1\na\n",
        b"1\r\nab",
        b"1\r\na\n0\r\n\r\n",
        b"1\r\na\r0\r\n\r\n",
        b"1;a\nb\r\na\r\n",
        b"1;\x00\r\na\r\n",
        b"1 1\r\na\r\n",
        b"\r\n",
        b"1_0\r\n",
        b"f" * 17 + b"\r\n",
        b"0\r\nno trailer\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
        b"0\r\nX: a\nY: b\r\n\r\n",
        b"1;" + b"x" * 2000,
        b"1" * 2000,
        b"0\r\n" + b"x:1\r\n" * MAX_TRAILER_BYTES,
        b"1;xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\na\r\n" * 3000,
    ]
    for text in bad:
        for cut in {1, 2, len(text) // 2, len(text) - 1, *range(min(20, len(text)))}:
            assert is_bad([text[:cut], text[cut:]]), text[:50]
    decoder = Chunked()
    assert decoder.feed(b"0\r\n\r\n" * 2) == (b"", b"0\r\n\r\n"), "the next request is not read"


def is_bad(parts: list[bytes]) -> bool:
    """Return whether the data is invalid or incomplete as a body in chunks."""
    decoder = Chunked()
    try:
        for part in parts:
            rest = part
            while rest and not decoder.whole:
                _, rest = decoder.feed(rest)
    except BadFraming:
        return True
    return not decoder.whole


def test_chunks_of_any_size_cut_anywhere() -> None:
    chance = random.Random(7)
    for _ in range(300):
        parts = [
            chance.randbytes(chance.choice((1, 2, 9, 300))) for _ in range(chance.randint(0, 9))
        ]
        text = b"".join(
            b"%x%s\r\n%s\r\n" % (len(part), chance.choice((b"", b";a=b", b' ;a="b"')), part)
            for part in parts
        )
        text += (
            chance.choice((b"0\r\n\r\n", b"000;x\r\n\r\n", b"0\r\nA: b\r\nC:\r\n\r\n")) + b"more"
        )
        decoder, found, at = Chunked(), b"", 0
        while not decoder.whole:
            step = chance.randint(1, 40)
            body, rest = decoder.feed(text[at : at + step])
            found += body
            at = min(at + step, len(text)) - len(rest)
        assert found == b"".join(parts)
        assert text[at:] == b"more"


def test_trailers_and_extensions_are_bounded() -> None:
    head = post(b"Transfer-Encoding: chunked", b"")

    async def flood(piece: bytes) -> int:
        served, sent = Served(), 0
        await served.feed(head)
        while not served.transport.ended() and sent < 10_000_000:
            if served.transport.eof:
                served.later(connections.LINGER_SECONDS)
            else:
                await served.feed(piece)
                sent += len(piece)
        assert served.transport.ended(), "it is over"
        assert all(name != b"x" for name, _ in served.scopes[0]["headers"])
        return sent

    async def test() -> None:
        assert await flood(b"0\r\n" + b"x:1\r\n" * 100) < 20_000
        assert await flood(b"1;" + b"y" * 900) < 20_000
        assert await flood(b"1;" + b"y" * 900 + b"\r\na\r\n") < 200_000

    run(test)


def test_what_follows_broken_framing_is_bounded_while_the_answer_goes_on() -> None:
    async def stream(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def test() -> None:
        served, sent = Served(stream), 0
        await served.feed(post(b"Transfer-Encoding: chunked", b""), b"broken\r\n")
        while not served.transport.ended() and sent < 50_000_000:
            await served.feed(b"x" * 65_536)
            sent += 65_536
        assert sent < 10_000_000

    run(test)


def test_a_flood_of_small_chunks_is_read_in_slices() -> None:
    """64 KB of chunks of one byte: the loop turns many times meanwhile."""

    async def test() -> None:
        served = Served()
        await served.feed(post(b"Transfer-Encoding: chunked", b""))
        turns, text = 0, chunked(*[b"a"] * 40_000)

        async def count() -> None:
            nonlocal turns
            while not served.requests:
                turns += 1
                await asyncio.sleep(0)

        served.protocol.data_received(text)
        assert not served.transport.reading, "no more is taken in meanwhile"
        await count()
        assert served.requests[0][2] == b"a" * 40_000
        assert turns >= 40_000 / MAX_CHUNKS_PER_TURN

    run(test)


def test_deadlines() -> None:
    """Each state in which no app runs has a deadline."""

    async def forever(scope: Scope, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def early(scope: Scope, receive: Any, send: Any) -> None:
        await answer(send, b"no", 401)

    async def test() -> None:
        head = post(b"X: y", b"body")
        cases: list[tuple[Respond | None, list[bytes], ConnectionState, float]] = [
            (None, [], "idle", 30),
            (None, [b"POST / HTTP/1.1\r\n"], "head", 30),
            (None, [b"\r\n\r\n"], "head", 30),
            (None, [head], "idle", 75),
            (None, [head, b"G"], "head", 30),
            (early, [head[:-4], b"b"], "discarding", 30),
            (
                early,
                [head.replace(b"X: y", b"Connection: close")[:-4], b"b"],
                "closing",
                2,
            ),
            (None, [b"garbage\r\n\r\n"], "closing", 2),
        ]
        for app, parts, state, seconds in cases:
            served = Served(app)
            await served.feed(*parts)
            assert served.protocol.connection.state is state, parts
            served.later(seconds - 1)
            assert served.transport.ended() in ("", "closed"), parts
            served.later(1)
            assert served.transport.ended() == "aborted", parts
        served = Served(forever)
        await served.feed(head)
        served.later(100_000)
        assert not served.transport.ended(), "the app has deadlines of its own"

    run(test)


def test_who_pipelines_and_does_not_read_is_ended() -> None:
    async def test() -> None:
        served = Served()
        served.transport.unsent = 100_000
        served.protocol.pause_writing()
        await served.feed(SMUGGLED * 3000)
        assert len(served.requests) <= 1
        assert not served.transport.reading
        served.later(75 + 60)
        served.later(61)
        assert served.transport.ended() == "aborted"
        served = Served()
        served.protocol.pause_writing()
        await served.feed(SMUGGLED * 3)
        for unsent in range(90_000, 10_000, -10_000):  # it reads, however slowly
            served.transport.unsent = unsent
            served.later(75)
        assert not served.transport.ended()
        served.protocol.resume_writing()
        for _ in range(5):
            await turn()
        assert len(served.requests) == 3

    run(test)


def test_a_stream_that_nobody_reads_is_ended() -> None:
    async def stream(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0)

    async def test() -> None:
        served = Served(stream)
        await served.feed(SMUGGLED)
        served.protocol.pause_writing()
        served.transport.unsent = 99_000
        served.later(protocol_module.WRITE_SECONDS)
        assert not served.transport.ended(), "it may have read some"
        served.later(connections.PROGRESS_SECONDS)
        assert served.transport.ended() == "aborted"
        served.protocol.connection_lost(None)
        await turn()

    run(test)


def test_pipelined_requests_take_turns_and_little_memory() -> None:
    async def test() -> None:
        served = Served()
        served.protocol.data_received(SMUGGLED * 1500)
        assert len(served.scopes) == 0
        assert not served.transport.reading or len(SMUGGLED) * 1500 <= HIGH_WATER
        while len(served.requests) < 1500:
            assert len(served._state.tasks) <= 2, "one after the other"
            await asyncio.sleep(0)
        assert served.transport.reading

    run(test)


def test_the_oldest_connection_without_a_request_makes_room() -> None:
    async def wait(scope: Scope, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.Event().wait()

    async def test() -> None:
        served = Served(wait, maximum=4)
        await served.feed(post(b"X: y", b"body"))  # in use
        slow, in_head = served.connect()
        in_head.data_received(b"GET / HTTP/1.1\r\nX")
        others = [served.connect() for _ in range(2)]
        assert not slow.ended()
        served.connect()
        assert slow.ended() == "aborted"
        in_head.connection_lost(None)
        served.connect()
        assert others[0][0].ended() == "aborted"
        assert not served.transport.ended()

    run(test)


def test_a_slow_body_without_a_key_makes_room() -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        if scope["path"] == "/key":
            request_of(scope).key = KEY
        await read(receive)
        await asyncio.Event().wait()

    async def test() -> None:
        served = Served(app, maximum=4)
        await served.feed(post(b"X: y", b"body", path=b"/key")[:-1])
        slow, whole, quick = [served.connect() for _ in range(3)]
        slow[1].data_received(post(b"X: y", b"body")[:-1])
        whole[1].data_received(post(b"X: y", b"body"))
        quick[1].data_received(post(b"X: y", b"body")[:-1])
        await turn()
        quick[1].data_received(b"y")
        await turn()
        served.connect()
        assert slow[0].ended() == "aborted"
        slow[1].connection_lost(None)
        served.connect()
        for other in (served.transport, whole[0], quick[0]):
            assert not other.ended()

    run(test)


def test_slow_bodies_with_a_key_make_room_last() -> None:
    """With bodies that never ended, one account shut everybody else out."""

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        request_of(scope).key = KEY
        await read(receive)
        await asyncio.Event().wait()

    async def test() -> None:
        served = Served(app, maximum=3)
        await served.feed(post(b"X: y", b"body"))
        slow, idle = served.connect(), served.connect()
        slow[1].data_received(post(b"X: y", b"body")[:-1])
        await turn()
        new = served.connect()
        assert idle[0].ended() == "aborted"
        idle[1].connection_lost(None)
        new[1].data_received(post(b"X: y", b"body"))
        await turn()
        assert not slow[0].ended()
        last = served.connect()
        assert slow[0].ended() == "aborted"
        slow[1].connection_lost(None)
        for other in (served.transport, new[0], last[0]):
            assert not other.ended()

    run(test)


def test_an_end_that_the_client_does_not_read_keeps_no_app_waiting() -> None:
    ended = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        served.protocol.pause_writing()
        await send({"type": "http.response.body", "body": b"two"})
        ended.append(True)

    served: Served

    async def test() -> None:
        nonlocal served
        served = Served(app)
        served.transport.unsent = 100_000
        await served.feed(post(b"X: y", b""))
        assert ended
        assert served.protocol.connection in served.shared.waiting
        served.later(protocol_module.KEEP_ALIVE_SECONDS)
        served.later(connections.PROGRESS_SECONDS)
        assert served.transport.ended() == "aborted"

    run(test)


def test_small_chunks_that_are_thrown_away_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_module, "MAX_DISCARDED", 200_000)

    async def early(scope: Scope, receive: Any, send: Any) -> None:
        await answer(send, b"ok")

    async def test() -> None:
        served = Served(early)
        await served.feed(post(b"Transfer-Encoding: chunked", b""), chunked(*[b"x" * 16] * 8000))
        while not served.transport.reading:
            await turn()
        await served.feed(SMUGGLED)
        assert served.transport.out.count(b"HTTP/1.1 200 ") == 2
        assert not served.transport.ended()

    run(test)


def test_clients_that_do_not_read_make_room() -> None:
    """Those with a key come last, as with bodies."""

    def get(path: bytes) -> bytes:
        return post(b"X: y", b"", b"GET", path)

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        if scope["path"] == "/keyed":
            request_of(scope).key = KEY
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.Event().wait()

    async def test() -> None:
        served = Served(app, maximum=4)
        await served.feed(get(b"/"))
        keyed, anybody, read = [served.connect() for _ in range(3)]
        for (_, protocol), path in ((keyed, b"/keyed"), (anybody, b"/"), (read, b"/")):
            protocol.data_received(get(path))
            protocol.pause_writing()
        await turn()
        read[1].resume_writing()
        await turn()
        for slow in (anybody, keyed):
            assert not slow[0].ended()
            new = served.connect()
            assert slow[0].ended() == "aborted"
            slow[1].connection_lost(None)
            new[1].data_received(get(b"/"))
            await turn()
        for other in (served.transport, read[0]):
            assert not other.ended()

    run(test)


def test_http_2_is_refused_at_once() -> None:
    async def test() -> None:
        served = Served()
        await served.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert served.transport.out.startswith(b"HTTP/1.1 400 ")
        assert served.transport.eof

    run(test)


def test_white_space_after_a_header_is_no_part_of_it() -> None:
    async def test() -> None:
        served = Served()
        await served.feed(b"POST / HTTP/1.1\r\nHost: g \t\r\nContent-Length: 2 \r\n\r\nok")
        assert served.requests == [("POST", "/", b"ok")]
        assert dict(served.scopes[0]["headers"]) == {b"host": b"g", b"content-length": b"2"}

    run(test)


def test_too_many_connections_are_said_once_among_websockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    log = "redbtc.server.connections.log"
    monkeypatch.setattr(log, lambda level, event, **fields: said.append(event))

    async def test() -> None:
        served = Served(maximum=20)
        sockets: list[Any] = [object() for _ in range(20)]
        for _ in range(3):
            served._state.connections.update(sockets)
            for _ in range(2):
                served.connect()[1].connection_lost(None)
            served._state.connections.difference_update(sockets)
            served.connect()[1].connection_lost(None)
            served.later(59)
        assert said == ["too many connections"]
        served.later(1)
        assert said == ["too many connections", "connections are accepted again"]

    run(test)


@pytest.mark.parametrize(
    ("sent", "ended", "eof"),
    [
        (b"", "closed", False),
        (b"GET / HTT", "closed", False),
        (post(b"X: y", b"")[:-2] + b"Content-Length: 9\r\n\r\n1", "", True),
        (b"GET / HTTP/1.1\r\n\r\n", "", True),  # refused: no Host
        (post(b"Connection: close", b"") + b"more", "", True),
    ],
)
def test_shutting_down_loses_no_response(sent: bytes, ended: str, eof: bool) -> None:
    """Closing a connection on which bytes still arrive would reset it, and the client may not have
    read the response."""

    async def test() -> None:
        async def app(scope: Scope, receive: Any, send: Any) -> None:
            await answer(send, b"ok")

        served = Served(app)
        await served.feed(sent)
        served.protocol.shutdown()
        assert (served.transport.ended(), served.transport.eof) == (ended, eof)
        served.later(3)
        assert served.transport.ended()

    run(test)


def test_only_responses_to_requests_with_a_key_are_waited_for() -> None:
    """Else anybody could keep a gateway from stopping, by not reading."""

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        if scope["path"] == "/key":
            request_of(scope).key = KEY
        await answer(send, b"ok")

    async def test() -> None:
        served = Served(app)
        served.transport.unsent = 9
        await served.feed(post(b"X: y", b""))
        assert not served.shared.unsent
        await served.feed(post(b"X: y", b"", path=b"/key"))
        assert served.shared.unsent
        served.transport.unsent = 0
        assert not served.shared.unsent

    run(test)


@pytest.mark.parametrize("how", ["read", "torn", "not read"])
def test_http_1_0_gets_no_chunks(how: str) -> None:
    torn = how == "torn"

    class Resettable:
        linger = b""

        def setsockopt(self, level: int, name: int, value: bytes) -> None:
            self.linger = value

    async def stream(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        assert request_of(scope).client.send_now(b"two")
        if not torn:
            await send({"type": "http.response.body", "body": b"three"})

    async def test() -> None:
        served = Served(stream)
        sock = served.transport.extra["socket"] = Resettable()
        await served.feed(
            b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n"
        )
        head, _, body = served.transport.out.partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"100 Continue" not in head
        assert b"connection: close" in head
        assert body == (b"onetwo" if torn else b"onetwothree")
        assert served.transport.ended() == ("aborted" if torn else "closed")
        assert sock.linger == b"\1\0\0\0\0\0\0\0", "reset if the process is killed"
        if how == "not read":
            served.transport.unsent = 10
            served.later(connections.LINGER_SECONDS)
            served.later(connections.PROGRESS_SECONDS)
            assert served.transport.ended() == "aborted"
        served.protocol.connection_lost(None)
        assert sock.linger[:1] == (b"\0" if how == "read" else b"\1")

    run(test)


def test_a_body_that_was_not_asked_for_ends_the_connection() -> None:
    """A client that waits for 100 Continue may omit its body, or send it anyway."""

    async def early(scope: Scope, receive: Any, send: Any) -> None:
        await answer(send, b"ok")

    async def test() -> None:
        for body in (b"", b"body"):
            served = Served(early)
            await served.feed(post(b"Expect: 100-continue", b"body")[:-4], body + SMUGGLED)
            assert served.transport.out.count(b"HTTP/1.1 ") == 1
            assert b"connection: close" in served.transport.out
        served = Served()  # reads the body
        await served.feed(post(b"Expect: 100-continue", b"body")[:-4], b"body" + SMUGGLED)
        assert served.transport.out.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert [body for *_, body in served.requests] == [b"body", b""]
        assert b"connection: close" not in served.transport.out

    run(test)


def test_a_body_is_bounded_while_nobody_reads_it() -> None:
    async def wait(scope: Scope, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        served = Served(wait)
        await served.feed(post(b"X: y", b"x" * 200_000)[:100_000])
        assert not served.transport.reading

    run(test)


def test_small_chunks_are_bounded_while_nobody_reads_them() -> None:
    async def wait(scope: Scope, receive: Any, send: Any) -> None:
        await let_go.wait()
        served.requests.append(("", "", await read(receive)))

    served: Served
    let_go: asyncio.Event

    async def test() -> None:
        nonlocal served, let_go
        served, let_go = Served(wait), asyncio.Event()
        flood = chunked(*[b"x" * 1000] * (MAX_CHUNKS_PER_TURN + 50), end=b"")
        await served.feed(post(b"Transfer-Encoding: chunked", b""), flood)
        assert not served.transport.reading
        let_go.set()
        await turn()
        assert served.transport.reading
        await served.feed(b"0\r\n\r\n")
        assert [len(body) for _, _, body in served.requests] == [(MAX_CHUNKS_PER_TURN + 50) * 1000]

    run(test)


def heads() -> Iterator[bytes]:
    """Yield mutated heads, each with a body that looks like a request."""
    chance = random.Random(20)
    pieces = [b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\xff", b"\x85", b"%", b"0", b"-"]
    pieces += [b"+", b",", b"\r\n ", b"chunked", b"Content-Length: 5", b"Content-Length: 0"]
    pieces += [b"Transfer-Encoding: chunked", b"Transfer-Encoding:\x0bchunked", b"Upgrade: h2c"]
    pieces += [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"Host: x", b"Content_Length: 9"]
    pieces += [b"Connection: Upgrade", b"Expect: 100-continue"]
    for _ in range(1500):
        text = bytearray(post(chance.choice(list(UPGRADES.values())), SMUGGLED))
        end = text.index(b"\r\n\r\n")
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(end)
            if chance.random() < 0.5:
                text[at:at] = chance.choice(pieces)
            else:
                del text[at : at + chance.randint(1, 3)]
            end = bytes(text).index(b"\r\n\r\n")
        yield bytes(text)


def test_mutated_heads_never_become_two_requests() -> None:
    """No body of a mutated head is taken for another request, unless the head says that there is no
    body: then the next request begins right after the first empty line."""

    async def test() -> None:
        for text in heads():
            head, _, body = text.partition(b"\r\n\r\n")
            served = Served()
            await served.feed(text)
            seen = [each for each in served.requests if each[1] == "/healthz"]
            fields = re.findall(rb"(?i)\r\n(content-length|transfer-encoding):", head)
            if seen:
                length = re.search(rb"(?im)^content-length:[ \t]*(\d+)[ \t]*\r?$", head)
                assert not fields or (length and body[int(length[1]) :].startswith(b"GET ")), text
            whole = await in_bytes(text)
            assert whole == served.requests, text

    async def in_bytes(text: bytes) -> list[tuple[str, str, bytes]]:
        served = Served()
        for at in range(0, len(text), 5):
            served.protocol.data_received(text[at : at + 5])
        await turn()
        return served.requests

    run(test)


def test_empty_lines_before_a_request_are_bounded() -> None:
    async def test() -> None:
        served = Served()
        await served.feed(b"\r\n\r\n\r\n" + post(b"X: y", b"body"))
        assert [body for *_, body in served.requests] == [b"body"]
        served = Served()
        for _ in range(MAX_HEAD_BYTES // 1000 + 1):
            with contextlib.suppress(RuntimeError):
                await served.feed(b"\r\n" * 500)
        assert served.transport.out.startswith(b"HTTP/1.1 431 ")

    run(test)


def test_headers_beyond_the_most_are_not_kept() -> None:
    """16,000 headers of 4 bytes each once took 40 times their size until the head's deadline."""

    async def test() -> None:
        served = Served()
        await served.feed(b"GET / HTTP/1.1\r\nHost: g\r\n" + b"a:\r\n" * 10_000)
        assert served.protocol.head is None, "it is not read further"
        assert len(served.scopes[0]["headers"]) <= MAX_HEADERS + 2
        await served.feed(b"\r\n")
        assert served.transport.out.startswith(b"HTTP/1.1 431 ")

    run(test)


def test_empty_lines_are_stepped_over_at_once() -> None:
    """Each empty line once cost a copy of all that followed: 250 KB held the loop for 70 ms."""

    async def test() -> None:
        def cost_of(data: bytes) -> float:
            served = Served()
            cost = cpu_seconds(lambda: served.protocol.data_received(data))
            served.protocol.connection_lost(None)
            return cost

        lines, head = b"\r\n" * 125_000, b"GET / HTTP/1.1\r\nX: " + b"x" * 250_000
        assert cost_of(lines) < 10 * (cost_of(head) + unit())
        await turn()

    run(test)
