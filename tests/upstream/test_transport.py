"""The transport, held against httpx2's own: same requests, same answers, same exceptions; and what
only it promises: retries, bounds, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import random
import shutil
import socket
import ssl
import subprocess
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h11
import httpx2
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc.config import parse_settings
from redbtc.upstream import upstreams
from redbtc.upstream.connection import ResponseBody, UpstreamHTTPConnection
from redbtc.upstream.response import ResponseReader
from redbtc.upstream.transport import Transport
from tests.helpers.gateway import PATIENCE_SECONDS, MakeGateway
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Upstream,
    chat_json,
    chat_pieces,
    chat_stream,
    images_json,
    images_stream,
    json_answer,
    openai_like,
    responses_stream,
    silent,
    stream,
)

pytestmark = pytest.mark.promise_1

Transports = Callable[[], httpx2.AsyncBaseTransport]
BODY = b'{"model":"gpt-up","stream":true,"messages":[],"input":"Hi"}'
TIMEOUTS: dict[str, float | None] = dict.fromkeys(
    ("connect", "read", "write", "pool"), PATIENCE_SECONDS
)
SHORT: dict[str, float | None] = {**TIMEOUTS, "read": 1.5}


def theirs() -> httpx2.AsyncBaseTransport:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)


def run(main: Callable[[], Awaitable[Any]], loops: str = "uvloop") -> Any:
    factory = uvloop.new_event_loop if loops == "uvloop" else asyncio.new_event_loop

    async def bounded() -> Any:
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            return await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(bounded())


def answered(make: Callable[[], httpx2.AsyncBaseTransport], request: httpx2.Request) -> Any:
    """Return what a transport of its own answers a request with."""

    async def main() -> Any:
        return await answer_to(make(), request)

    return run(main)


def post(
    url: str,
    content: bytes | AsyncIterator[bytes] = BODY,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    timeouts: dict[str, float | None] = TIMEOUTS,
    method: str = "POST",
) -> httpx2.Request:
    return httpx2.Request(
        method,
        url.removesuffix("/v1") + path,
        content=content,
        headers={"content-type": "application/json", **(headers or {})},
        extensions={"timeout": timeouts},
    )


async def answer_to(transport: httpx2.AsyncBaseTransport, request: httpx2.Request) -> Any:
    """All that can be seen of one exchange."""
    seen: dict[str, Any] = {"body": b""}
    try:
        response = await transport.handle_async_request(request)
        seen["status"], seen["headers"] = response.status_code, response.headers.raw
        for name in ("http_version", "reason_phrase"):
            seen[name] = response.extensions[name]
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        try:
            async for part in response.stream:
                assert part
                seen["body"] += part
        finally:
            await response.aclose()
    except httpx2.TransportError as error:
        seen["exception"] = httpx2.RemoteProtocolError if is_torn(error) else type(error)
    except h11.LocalProtocolError:  # theirs forgets to map this one
        seen["exception"] = httpx2.LocalProtocolError
    return seen


def is_torn(error: httpx2.TransportError) -> bool:
    """Both: the connection ended too early. Which of them is a matter of the instant."""
    return isinstance(error, httpx2.ReadError | httpx2.WriteError | httpx2.RemoteProtocolError)


def raw(answer: bytes, end: str = "keep", cut: int = 0) -> Script:
    """These bytes, in pieces of `cut` if given; then `keep`, `close` or `tear` the connection."""

    async def script(_: Received, reply: Reply) -> None:
        for start in range(0, len(answer), cut or len(answer) or 1):
            await reply.raw(answer[start : start + (cut or len(answer))])
            if cut:
                await asyncio.sleep(0.0005)
        if end == "close":
            reply.close()
        if end == "tear":
            await asyncio.sleep(0.05)
            reply.tear()

    return script


async def first_then_nothing(request: Received, reply: Reply) -> None:
    await reply.head()
    await reply.send(b"data: 1\n\n")
    await reply.wait(request.closed)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = OK + b"Content-Length: 5\r\n\r\n"
REPERTOIRE: dict[str, Script] = {
    "openai": openai_like,
    "chat": chat_json(),
    "chat stream": chat_stream(pause=0.001),
    "chat stream torn": chat_stream(end="tear"),
    "chat stream closed": chat_stream(end="close"),
    "responses stream": responses_stream(),
    "responses stream torn": responses_stream(end="tear"),
    "images": images_json(),
    "images stream": images_stream(partial=3),
    "error 429": json_answer({"error": {}}, 429, [("retry-after", "1"), ("X-Two", "a, b")]),
    "error 500": json_answer(b"", 500),
    "megabytes": json_answer(random.Random(1).randbytes(3_000_000)),
    "megabytes, streamed": stream([b"data: " + b"x" * 100_000 + b"\n\n"] * 20),
    "too slow a head": silent,
    "too slow a body": first_then_nothing,
    "sized": raw(SIZED + b"hello"),
    "sized, byte by byte": raw(SIZED + b"hello", cut=1),
    "chunked": raw(CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"),
    "chunked, byte by byte": raw(CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", cut=1),
    "trailers": raw(CHUNKED + b"3\r\nabc\r\n0\r\nX-Trailer: 1\r\nX-Two: 2\r\n\r\n"),
    "until the end": raw(OK + b"Connection: close\r\n\r\nhello", "close"),
    "until the end, HTTP/1.0": raw(b"HTTP/1.0 200 OK\r\n\r\nhello", "close"),
    "until the end, torn": raw(OK + b"\r\nhello", "tear"),
    "HTTP/1.0, sized": raw(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "close"),
    "close after": raw(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", "close"),
    "no content": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "not modified": raw(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    "empty": raw(OK + b"Content-Length: 0\r\n\r\n"),
    "no reason": raw(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"),
    "status 999": raw(b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n"),
    "informational": raw(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100 + SIZED + b"hello"),
    "informational, then none": raw(b"HTTP/1.1 100 Continue\r\n\r\n", "close"),
    "redirect": raw(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"),
    "same header twice": raw(OK + b"X-A: 1\r\nx-a: 2\r\nContent-Length: 0\r\n\r\n"),
    "odd values": raw(OK + b"X-A:\r\nX-B:  b \t\r\nX-C: \xff\r\nContent-Length: 0\r\n\r\n"),
    "nothing": raw(b"", "close"),
    "nothing, torn": raw(b"", "tear"),
    "half a head": raw(OK + b"Content-", "close"),
    "torn in the head": raw(OK + b"Content-", "tear"),
    "too short": raw(SIZED + b"hell", "close"),
    "chunk cut off": raw(CHUNKED + b"5\r\nhel", "close"),
    "no last chunk": raw(CHUNKED + b"5\r\nhello\r\n", "close"),
    "garbage": raw(b"garbage\r\n\r\n", "close"),
    "bad chunk size": raw(CHUNKED + b"3\r\nabc\r\nxyz\r\n", "close"),
    "bad content-length": raw(OK + b"Content-Length: five\r\n\r\nhello", "close"),
    "negative content-length": raw(OK + b"Content-Length: -5\r\n\r\nhello", "close"),
    "two content-lengths": raw(
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "close"
    ),
    "header without a name": raw(OK + b": x\r\nContent-Length: 0\r\n\r\n", "close"),
    "endless head": raw(OK + b"X: " + b"x" * 10_000_000, "close"),
    "many headers": raw(OK + b"X: y\r\n" * 200_000 + b"\r\n", "close"),
    "endless 1xx": raw(b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n" * 100_000, "close"),
}
# Where httpx2 takes what two readers could take in two ways, this transport refuses it.
STRICTER: dict[str, Script] = {
    "length and chunks": raw(
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "close",
    ),
    "gzip, chunked": raw(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "close"),
    "same length twice": raw(OK + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", "close"),
    "lines without CR": raw(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "close"),
    "folded header": raw(OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n", "close"),
    "NUL in a value": raw(OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", "close"),
    "switching protocols": raw(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "close"
    ),
    "length in a trailer": raw(CHUNKED + b"0\r\nContent-Length: 9\r\n\r\n", "close"),
    "endless trailers": raw(CHUNKED + b"0\r\n" + b"X: y\r\n" * 100_000, "close"),
    "endless chunk extension": raw(CHUNKED + b"1;" + b"x" * 1_000_000, "close"),
}


async def exchanges(
    upstream: Upstream,
    transport: httpx2.AsyncBaseTransport,
    timeouts: dict[str, float | None] = TIMEOUTS,
) -> Any:
    """Two requests, and how many connections neither end has closed after them."""
    request = functools.partial(post, upstream.url, timeouts=timeouts)
    seen = [await answer_to(transport, request()) for _ in range(2)]
    pool: Any = transport if isinstance(transport, Transport) else vars(transport)["_pool"]
    open_here = pool.connections
    while not all(each.finished.is_set() for each in upstream.requests):
        await asyncio.sleep(0.001)
    while upstream.connections > len(open_here):  # until it has noticed what was closed here
        await asyncio.sleep(0.001)
    kept = upstream.connections
    await transport.aclose()
    return seen, kept


@pytest.mark.slow
@pytest.mark.parametrize("name", REPERTOIRE)
def test_same_answers_same_exceptions(upstream: Upstream, name: str) -> None:
    upstream.script = REPERTOIRE[name]
    timeouts = SHORT if name.startswith("too slow") else TIMEOUTS
    expected = run(lambda: exchanges(upstream, theirs(), timeouts))
    upstream.wait_for(lambda: upstream.connections == 0)
    sent = [(each.method, each.path, each.headers, each.body) for each in upstream.requests]
    upstream.requests.clear()
    found = run(lambda: exchanges(upstream, Transport(), timeouts))
    assert found == expected
    assert [(each.method, each.path, each.headers, each.body) for each in upstream.requests] == sent


@pytest.mark.parametrize("name", STRICTER)
def test_bad_framing_is_refused(upstream: Upstream, name: str) -> None:
    upstream.script = STRICTER[name]
    seen, kept = run(lambda: exchanges(upstream, Transport()))
    assert [each.get("exception") for each in seen] == [httpx2.RemoteProtocolError] * 2
    assert kept == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_answer_may_be_cut_anywhere(shared_upstream: Upstream, data: st.DataObject) -> None:
    """Any whole answer of the repertoire, in any pieces, is the same answer."""
    answer = data.draw(
        st.sampled_from(
            [
                SIZED + b"hello",
                CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX-T: 1\r\n\r\n",
                b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + SIZED + b"hello",
            ]
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]

    async def script(_: Received, reply: Reply) -> None:
        for piece in pieces:
            await reply.raw(piece)
            await asyncio.sleep(0)

    shared_upstream.script = script
    seen, kept = run(lambda: exchanges(shared_upstream, Transport()))
    for each in seen:
        assert (each["status"], each["body"]) == (200, b"hello" if b"hello" in answer else b"abcde")
    assert kept == 1


@pytest.fixture(scope="module")
def shared_upstream() -> Any:
    with Upstream() as upstream:
        yield upstream


async def generated() -> AsyncIterator[bytes]:
    for part in (b"one", b"", b"two" * 50_000):
        yield part


@pytest.mark.parametrize(
    ("method", "content", "headers"),
    [
        ("POST", generated, {}),
        ("POST", generated, {"content-length": "150003"}),
        ("POST", generated, {"content-length": "150004"}),
        ("POST", generated, {"content-length": "2"}),
        ("POST", lambda: b"", {}),
        ("POST", lambda: b"x" * 5_000_000, {}),
        ("GET", lambda: b"", {}),
        ("DELETE", lambda: b"", {}),
        ("HEAD", lambda: b"", {}),
        ("POST", lambda: b"x", {"x-bad": "a\r\nb: c"}),
        ("POST", lambda: b"x", {"x bad": "a"}),
        ("PO ST", lambda: b"x", {}),
        ("POST", lambda: b"x", {"expect": "100-continue"}),
    ],
)
def test_same_requests(
    upstream: Upstream,
    method: str,
    content: Callable[[], bytes | AsyncIterator[bytes]],
    headers: dict[str, str],
) -> None:
    head_only = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    upstream.script = raw(head_only if method == "HEAD" else SIZED + b"hello", "close")

    async def main(transport: httpx2.AsyncBaseTransport) -> Any:
        request = post(upstream.url, content(), headers=headers, method=method)
        seen = await answer_to(transport, request)
        await transport.aclose()
        await asyncio.sleep(0.05)
        sent = [(each.method, each.path, each.headers, each.body) for each in upstream.requests]
        upstream.requests.clear()
        return seen, sent

    assert run(lambda: main(Transport())) == run(lambda: main(theirs()))


@pytest.mark.slow
def test_an_upstream_that_reads_nothing(upstream: Upstream) -> None:
    """The write timeout."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        for make in (Transport, theirs):
            request = post(url, b"x" * 50_000_000, timeouts={**TIMEOUTS, "write": 0.5})
            seen = answered(make, request)
            assert seen == {"body": b"", "exception": httpx2.WriteTimeout}


def test_upstreams_that_are_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    clogs = [socket.socket() for _ in range(3)]
    for clog in clogs:
        clog.setblocking(False)
        clog.connect_ex(full.getsockname())
    cases = {
        url: (httpx2.ConnectError, PATIENCE_SECONDS),
        "http://no-such-host.invalid": (httpx2.ConnectError, PATIENCE_SECONDS),
        f"http://127.0.0.1:{full.getsockname()[1]}": (httpx2.ConnectTimeout, 0.3),
        "ftp://127.0.0.1": (httpx2.UnsupportedProtocol, PATIENCE_SECONDS),
    }
    for each, (expected, seconds) in cases.items():
        for make in (Transport, theirs):
            request = post(each, timeouts={**TIMEOUTS, "connect": seconds})
            seen = answered(make, request)
            assert seen == {"body": b"", "exception": expected}, (each, make)
    for sock in (*clogs, full):
        sock.close()


class Server:
    """A server of blocking sockets, for what depends on the instant. It answers each request on a
    connection with `hello` until told otherwise."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.requests = 0
        self._accepted: list[socket.socket] = []

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self._accepted):
            sock.close()

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(PATIENCE_SECONDS)
        self._accepted.append(sock)
        return sock

    def read(self, sock: socket.socket) -> None:
        """One request of post()'s."""
        received = b""
        while not received.endswith(BODY):
            part = sock.recv(65536)
            assert part, "the client left"
            received += part
        self.requests += 1

    def serve(self, sock: socket.socket) -> None:
        self.read(sock)
        sock.sendall(SIZED + b"hello")


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
@pytest.mark.parametrize("noticed", [True, False])
def test_a_connection_that_was_closed_meanwhile_is_not_used(loops: str, noticed: bool) -> None:
    with Server() as server:

        async def main() -> None:
            async with Transport() as transport:
                for _ in range(3):
                    first = asyncio.create_task(answer_to(transport, post(server.url)))
                    sock = await in_thread(server.accept)
                    await in_thread(server.serve, sock)
                    assert (await first)["body"] == b"hello"
                    sock.close()
                    if noticed:
                        await asyncio.sleep(0.05)

        run(main, loops)
        assert server.requests == 3


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
@pytest.mark.parametrize("replayable", [True, False])
def test_a_request_that_nobody_has_seen_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, loops: str, replayable: bool
) -> None:
    """The upstream closes just after the connection was found open."""
    reuse = UpstreamHTTPConnection.reuse

    async def parts() -> AsyncIterator[bytes]:
        yield BODY

    with Server() as server:

        async def main() -> Any:
            async with Transport() as transport:
                first = asyncio.create_task(answer_to(transport, post(server.url)))
                sock = await in_thread(server.accept)
                await in_thread(lambda: server.serve(sock))
                await first

                def found_open_then_closed(connection: UpstreamHTTPConnection) -> bool:
                    found = reuse(connection)
                    sock.close()
                    return found

                monkeypatch.setattr(UpstreamHTTPConnection, "reuse", found_open_then_closed)
                body = BODY if replayable else parts()
                headers = {"content-length": str(len(BODY))}
                second = asyncio.create_task(
                    answer_to(transport, post(server.url, body, headers=headers))
                )
                if replayable:
                    await in_thread(lambda: server.serve(server.accept()))
                return await second

        seen = run(main, loops)
        assert server.requests == 1 + replayable
        assert seen.get("body") == (b"hello" if replayable else b"")
        assert seen.get("exception") == (None if replayable else httpx2.RemoteProtocolError)


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
@pytest.mark.parametrize("when", ["unread", "unsent"])
def test_what_came_before_a_request_is_not_its_answer(loops: str, when: str) -> None:
    """The upstream sends a second answer, which arrives before the connection is used again, or
    after that, but before any of the request was sent."""
    with Server() as server:

        async def main() -> Any:
            async with Transport() as transport:
                first = asyncio.create_task(answer_to(transport, post(server.url)))
                sock = await in_thread(server.accept)
                await in_thread(lambda: server.serve(sock))
                assert (await first)["body"] == b"hello"

                async def parts() -> AsyncIterator[bytes]:
                    if when == "unsent":
                        sock.sendall(SIZED + b"stale")
                        await asyncio.sleep(0.05)
                    yield BODY

                if when == "unread":
                    sock.sendall(SIZED + b"stale")  # the loop does not turn before the next request
                headers = {"content-length": str(len(BODY))}
                second = asyncio.create_task(
                    answer_to(transport, post(server.url, parts(), headers=headers))
                )
                await asyncio.wait([second], timeout=0.1)
                if not second.done():
                    await in_thread(lambda: server.serve(server.accept()))
                return await second

        seen = run(main, loops)
        assert seen["body"] == (b"hello" if when == "unread" else b"")
        assert seen.get("exception") == (None if when == "unread" else httpx2.RemoteProtocolError)


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
@pytest.mark.parametrize("read", ["all", "some", "none"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_request_that_may_have_been_acted_on_is_not_sent_again(
    loops: str, read: str, reset: bool
) -> None:
    """The upstream's kernel has it, and perhaps the upstream; then the connection ends."""
    with Server() as server:

        async def main() -> Any:
            async with Transport() as transport:
                first = asyncio.create_task(answer_to(transport, post(server.url)))
                sock = await in_thread(server.accept)
                await in_thread(lambda: server.serve(sock))
                await first
                second = asyncio.create_task(answer_to(transport, post(server.url)))
                await asyncio.sleep(0.05)
                if read != "none":
                    await in_thread(lambda: sock.recv(10 if read == "some" else 65536))
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
                server.listener.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    await in_thread(server.accept)
                return await second

        assert run(main, loops) == {"body": b"", "exception": httpx2.RemoteProtocolError}


@pytest.mark.slow
def test_cancelled_anywhere_a_connection_is_kept_whole_or_closed(upstream: Upstream) -> None:
    upstream.script = chat_stream(pause=0.0005)

    async def main() -> None:
        async with Transport() as transport:
            for steps in range(120):
                body = BODY + b" " * (steps % 2 * 500_000)
                task = asyncio.create_task(answer_to(transport, post(upstream.url, body)))
                for _ in range(steps // 4):
                    await asyncio.sleep(0)
                await asyncio.sleep(steps / 4e4)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                whole = await answer_to(transport, post(upstream.url))
                assert whole["body"].endswith(b"[DONE]\n\n"), whole
        await asyncio.sleep(0.05)
        assert not transport.connections

    run(main)
    upstream.wait_for(lambda: upstream.connections == 0)


@pytest.mark.slow
@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
def test_a_closed_connection_waits_for_no_garbage_collector(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, loops: str
) -> None:
    made: list[weakref.ref[UpstreamHTTPConnection]] = []
    connection_made = UpstreamHTTPConnection.connection_made

    def note(connection: UpstreamHTTPConnection, transport: asyncio.BaseTransport) -> None:
        made.append(weakref.ref(connection))
        connection_made(connection, transport)

    monkeypatch.setattr(UpstreamHTTPConnection, "connection_made", note)

    async def main() -> None:
        async with Transport() as transport:
            for script in (chat_json(), stream([b"x"], end="tear"), silent):
                upstream.script = script
                await answer_to(transport, post(upstream.url, timeouts=SHORT))
            upstream.script = chat_stream(pause=0.1)
            request = post(upstream.url, timeouts={})
            body = (await transport.handle_async_request(request)).stream
            assert isinstance(body, ResponseBody)
            await anext(body)
            body.bypass_with(lambda part: body is not None)
            await body.aclose()
        await asyncio.sleep(0.1)

    gc.disable()
    try:
        run(main, loops)
        assert len(made) > 2
        assert not any(connection() for connection in made)
    finally:
        gc.enable()


@pytest.mark.slow
def test_what_nobody_reads_stays_at_the_upstream(upstream: Upstream) -> None:
    sent = [0]

    async def endless(request: Received, reply: Reply) -> None:
        await reply.head(200)
        for _ in range(5000):
            await reply.send(b"x" * 100_000)
            sent[0] += 100_000

    upstream.script = endless

    async def main() -> None:
        async with Transport() as transport:
            response = await transport.handle_async_request(post(upstream.url))
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            await asyncio.sleep(1)
            (connection,) = transport.connections
            assert connection.response.waiting_bytes < 1 << 20
            assert sent[0] < 50_000_000
            read = 0
            async for part in response.stream:
                read += len(part)
                if read > 100_000_000:
                    break
            await response.aclose()

    run(main)


def test_an_answer_that_nobody_reads_to_its_end_holds_up_no_other(upstream: Upstream) -> None:
    async def main() -> None:
        async with Transport() as transport:
            for size in (10, 70_000, 300_000):
                upstream.script = json_answer(b"x" * size)
                response = await transport.handle_async_request(post(upstream.url))
                await asyncio.sleep(0.05)  # all of it has come
                await response.aclose()
                assert len((await answer_to(transport, post(upstream.url)))["body"]) == size

    run(main)


def test_what_comes_is_offered_only_while_its_reader_waits(upstream: Upstream) -> None:
    """Whoever is at work on an earlier part must not be overtaken."""
    steps = [threading.Event() for _ in range(4)]

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200)
        for number, step in enumerate(steps):
            await reply.wait(step)
            await reply.send(b"%d" % number)
        await reply.end()

    upstream.script = script

    async def main() -> None:
        async with Transport() as transport:
            request = post(upstream.url, timeouts={})
            body = (await transport.handle_async_request(request)).stream
            assert isinstance(body, ResponseBody)
            passed: list[bytes] = []
            taken = True

            def pass_on(part: bytes) -> bool:
                passed.append(part)
                return taken

            body.bypass_with(pass_on)
            steps[0].set()
            await asyncio.sleep(0.1)
            assert passed == []
            assert await anext(body) == b"0"
            reading = asyncio.create_task(anext(body))
            for number, step in enumerate(steps[1:3], 1):
                await asyncio.sleep(0)  # the reader waits
                step.set()
                while len(passed) < number:
                    await asyncio.sleep(0.001)
            assert passed == [b"1", b"2"]
            assert not reading.done()
            taken = False
            steps[3].set()
            assert await reading == b"3"
            assert passed == [b"1", b"2", b"3"]
            assert [part async for part in body] == []
            await body.aclose()

    run(main)


def test_an_end_that_comes_with_a_part_that_is_passed_on(upstream: Upstream) -> None:
    """The reader learns of the end, and the next request on the connection passes nothing on."""
    step = threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.raw(CHUNKED + b"1\r\na\r\n")
        await reply.wait(step)
        await reply.raw(b"1\r\nb\r\n0\r\n\r\n")

    upstream.script = script

    async def main() -> None:
        async with Transport() as transport:
            passed: list[bytes] = []

            def pass_on(part: bytes) -> bool:
                passed.append(part)
                return True

            async def rest(body: ResponseBody) -> list[bytes]:
                return [part async for part in body]

            for offered in (True, False):
                step.clear()
                request = post(upstream.url, timeouts={})
                body = (await transport.handle_async_request(request)).stream
                assert isinstance(body, ResponseBody)
                assert await anext(body) == b"a"
                if offered:
                    body.bypass_with(pass_on)
                reading = asyncio.create_task(rest(body))
                await asyncio.sleep(0)  # the reader waits
                step.set()
                assert await reading == ([] if offered else [b"b"])
                await body.aclose()
            assert passed == [b"b"]
            assert len(transport.connections) == 1

    run(main)


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
def test_a_body_that_we_cut_off_is_not_complete(upstream: Upstream, loops: str) -> None:
    """Its end is the connection's end, but only if the upstream ends the connection."""

    async def script(request: Received, reply: Reply) -> None:
        await reply.raw(OK + b"\r\nhello")
        await reply.wait(request.closed)

    upstream.script = script

    async def main() -> None:
        async with Transport() as transport:
            body = (await transport.handle_async_request(post(upstream.url))).stream
            assert isinstance(body, ResponseBody)
            assert await anext(body) == b"hello"
            reading = asyncio.create_task(body.__anext__())
            await asyncio.sleep(0)  # the reader waits
            await transport.aclose()
            with pytest.raises(httpx2.RemoteProtocolError):
                await reading
            await body.aclose()

    run(main, loops)


@pytest.mark.parametrize("loops", ["uvloop", "asyncio"])
@pytest.mark.parametrize("late", [b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""])
def test_what_follows_a_complete_body_leaves_it_complete(
    upstream: Upstream, loops: str, late: bytes
) -> None:
    """Though its connection is closed before it is read."""
    more = threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.raw(SIZED + b"hello")
        await reply.wait(more)
        await reply.raw(late)

    upstream.script = script

    async def main() -> None:
        async with Transport() as transport:
            body = (await transport.handle_async_request(post(upstream.url))).stream
            assert isinstance(body, ResponseBody)
            while not body.whole:
                await asyncio.sleep(0.001)
            more.set()
            await asyncio.sleep(0.05)  # what follows arrives
            if not late:
                await transport.aclose()
            assert body.whole
            assert await anext(body) == b"hello"
            with pytest.raises(StopAsyncIteration):
                await anext(body)
            await body.aclose()

    run(main, loops)


def test_the_states_of_an_exchange() -> None:
    reader = ResponseReader()
    states = [reader.state]
    reader.begin("POST")
    states.append(reader.state)
    assert reader.nothing_came
    reader.enter("awaiting_head")
    reader.feed(b"HTTP/1.1 103 Early Hints\r\n\r\n" + SIZED[:-1])
    states.append(reader.state)
    assert not reader.nothing_came
    reader.feed(SIZED[-1:] + b"hel")
    states.append(reader.state)
    assert (reader.status, reader.reason) == (200, b"OK")
    reader.feed(b"lo")
    states.append(reader.state)
    assert (reader.take(), reader.reusable) == ([b"hel", b"lo"], True)
    reader.fail(httpx2.ReadTimeout("too late"))
    reader.feed(b"HTTP/1.1 404 Not Found\r\n\r\nmore")
    states.append(reader.state)
    assert (reader.error, reader.reusable) == (None, False)
    assert (reader.status, reader.reason, reader.take()) == (200, b"OK", [])
    reader.close()
    assert [*states, reader.state] == [
        "idle",
        "sending",
        "awaiting_head",
        "reading_body",
        "complete",
        "complete",
        "complete",
    ]


def test_an_exchange_that_does_not_go_as_planned() -> None:
    early = ResponseReader()
    early.begin("POST")
    early.feed(SIZED + b"hello")
    early.enter("awaiting_head")
    assert (early.state, early.reusable) == ("complete", False), "the request was not sent whole"
    failed = ResponseReader()
    failed.begin("GET")
    failed.feed(b"garbage")
    error = failed.error
    failed.end(None)
    assert (failed.state, failed.error) == ("failed", error), "the first error counts"


@pytest.mark.slow
def test_connections_are_kept_for_a_while_and_no_longer(upstream: Upstream) -> None:
    upstream.script = chat_json()

    async def main() -> None:
        async with Transport(keepalive_seconds=1.5) as transport:
            await asyncio.gather(*(answer_to(transport, post(upstream.url)) for _ in range(20)))
            assert 0 < upstream.connections <= 20
            while upstream.connections > 1:
                await answer_to(transport, post(upstream.url))
                await asyncio.sleep(0.05)
            assert upstream.connections == 1, "the one used last is used again, the others grow old"
            while upstream.connections:
                await asyncio.sleep(0.01)
            assert not transport.connections

    run(main)


def test_an_early_refusal_is_seen_in_mid_upload() -> None:
    """By an upstream that reads no further."""
    seen_it = threading.Event()
    with Server() as server:

        def refuse() -> None:
            sock = server.accept()
            sock.recv(1000)
            sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            assert seen_it.wait(PATIENCE_SECONDS)
            sock.close()

        async def main() -> Any:
            refusing = asyncio.create_task(in_thread(refuse))
            async with Transport() as transport:
                request = post(server.url, b"x" * 100_000_000)
                seen = await answer_to(transport, request)
                seen_it.set()
            await refusing
            return seen

        seen = run(main)
        assert (seen["status"], seen["body"]) == (413, b"no")


def test_as_a_client_of_httpx2(upstream: Upstream) -> None:
    async def main() -> None:
        async with httpx2.AsyncClient(transport=Transport(), base_url=upstream.url) as client:
            answer = await client.post("/chat/completions", json={"model": "m", "messages": []})
            assert answer.json()["model"] == "m"
            async with client.stream("GET", "/models") as streamed:
                assert b"gpt-up" in await streamed.aread()

    run(main)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate for localhost, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {file} -out {file}.crt -days 2 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


def test_tls_is_verified(certificate: Path) -> None:
    """Against the system's trust store, unless told otherwise; by name."""

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (await reader.readuntil(BODY)) and not writer.is_closing():
                writer.write(SIZED + b"hello")
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ours.load_cert_chain(certificate)
        server = await asyncio.start_server(hello, "127.0.0.1", 0, ssl=ours)
        port = server.sockets[0].getsockname()[1]
        try:
            context = ssl.create_default_context(cafile=str(certificate))
            async with Transport(context) as trusting, Transport() as usual:
                for _ in range(2):
                    seen = await answer_to(trusting, post(f"https://localhost:{port}"))
                    assert seen["body"] == b"hello"
                assert len(trusting.connections) == 1
                for transport, host in ((usual, "localhost"), (trusting, "127.0.0.1")):
                    seen = await answer_to(transport, post(f"https://{host}:{port}"))
                    assert seen.get("exception") is httpx2.ConnectError, host
                plain = await answer_to(usual, post(f"http://localhost:{port}"))
                assert plain["exception"] is httpx2.RemoteProtocolError
        finally:
            server.close()
            await asyncio.sleep(0.1)

    run(main)


def test_httpx2s_own_stays_reachable_by_a_setting(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    settings = 'transport = "httpx"\nfirst_byte_timeout_seconds = 2'
    gateway = make_gateway(upstream_settings=settings).start()
    key = gateway.new_key()
    chat = {"model": "m", "messages": [], "stream": True}
    with gateway.client(key) as client:
        for _ in range(2):
            streamed = client.post("/chat/completions", json=chat)
            assert streamed.text.endswith("data: [DONE]\n\n")
        upstream.script = chat_stream(end="tear")  # after its end
        assert client.post("/chat/completions", json=chat).text.endswith("data: [DONE]\n\n")
        upstream.script = stream(chat_pieces(["Hi"])[:-1], end="tear")
        with pytest.raises(httpx2.RemoteProtocolError):
            client.post("/chat/completions", json=chat)
        upstream.script = silent
        assert client.post("/chat/completions", json=chat).status_code == 504
    outcomes = [(row["outcome"], row["usage_source"]) for row in gateway.rows()]
    assert outcomes[:3] == [("completed", "upstream")] * 3
    assert outcomes[4] == ("upstream_failed", "none")


def test_httpx2s_own_fails_no_request_at_once_over_tls(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests may wait for one connection, which could speak HTTP/2. This one does not."""

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(SIZED + b"hello")
        writer.close()

    async def main() -> None:
        ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ours.load_cert_chain(certificate)
        server = await asyncio.start_server(hello, "127.0.0.1", 0, ssl=ours)
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        table = {"name": "tls", "base_url": url, "transport": "httpx"}
        upstream = upstreams.Upstream(parse_settings({"upstreams": [table]}).upstreams[0])
        try:
            asked = await asyncio.gather(*[upstream.fetch_whole("/models") for _ in range(25)])
            assert asked == [(200, b"hello")] * 25
        finally:
            await upstream.close()
            server.close()
            await asyncio.sleep(0.1)

    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(httpx2, "create_ssl_context", lambda **_: trusting)
    run(main)


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
@pytest.mark.parametrize("first", ["sized", "chunked", "204"])
def test_what_comes_after_an_answer_is_nobodys(
    make_gateway: MakeGateway, upstream: Upstream, transport: str, first: str
) -> None:
    """The upstream sends two answers at once: the second is not the next account's answer, nor
    part of the first."""

    async def script(request: Received, reply: Reply) -> None:
        own = f'{{"id":"resp_{request.json()["input"]}"}}'.encode()
        own = b"" if first == "204" else own
        head = {
            "sized": OK + b"Content-Length: %d\r\n\r\n%b" % (len(own), own),
            "chunked": CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(own), own),
            "204": b"HTTP/1.1 204 No Content\r\n\r\n",
        }[first]
        await reply.raw(head + OK + b'Content-Length: 15\r\n\r\n{"id":"resp_x"} ')

    upstream.script = script
    gateway = make_gateway(upstream_settings=f'transport = "{transport}"').start()
    for account in ("one", "two", "one"):
        with gateway.client(gateway.new_key(account)) as client:
            answer = client.post("/responses", json={"model": "m", "input": account})
        assert answer.status_code == (204 if first == "204" else 200)
        assert answer.text == ("" if first == "204" else f'{{"id":"resp_{account}"}}')


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
@pytest.mark.parametrize("name", ["length and chunks", "control character"])
def test_a_head_that_clients_could_misread_is_refused(
    make_gateway: MakeGateway, upstream: Upstream, transport: str, name: str
) -> None:
    control = raw(OK + b"X: a\x01b\r\nContent-Length: 2\r\n\r\n{}", "close")
    upstream.script = {**STRICTER, "control character": control}[name]
    gateway = make_gateway(upstream_settings=f'transport = "{transport}"').start()
    with gateway.client(gateway.new_key()) as client:
        answer = client.post("/responses", json={"model": "m", "input": "Hi"})
    assert answer.status_code == 502
    assert gateway.row()["outcome"] == "upstream_failed"


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
def test_no_proxy_but_the_settings(
    make_gateway: MakeGateway, upstream: Upstream, transport: str
) -> None:
    upstream.script = json_answer({"id": "resp_1"})
    with Upstream() as proxy:
        proxy.script = json_answer({"id": "resp_by_proxy"})
        address = proxy.url.removesuffix("/v1")
        env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), address)
        through = f'proxy = "{address}"' if transport == "httpx" else ""
        for more, expected in (("", "resp_1"), (through, "resp_by_proxy")):
            settings = f'transport = "{transport}"\n{more}'
            gateway = make_gateway(upstream_settings=settings, **env).start()
            with gateway.client(gateway.new_key()) as client:
                answer = client.post("/responses", json={"model": "m", "input": "Hi"})
            assert answer.json()["id"] == (expected if more else "resp_1")
        assert [each.path for each in proxy.requests] == (
            [f"{upstream.url}/responses"] if through else []
        )


def test_without_a_thread_for_the_certificates_no_connection_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request finds its upstream unreachable, and so does a WebSocket (OSError)."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with Transport() as transport:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                with pytest.raises(httpx2.ConnectError, match="thread"):
                    await transport.handle_async_request(post("https://localhost:9"))
                with pytest.raises(OSError, match="thread"):
                    await transport.connector.tls_context()
            assert await transport.connector.tls_context()

    run(main)
