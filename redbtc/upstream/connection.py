"""Connections to upstreams, over HTTP/1.1, on asyncio's Protocol and httptools.

Rule 1. A connection carries one request at a time. It goes back to its pool only when both sides
have finished: the request was sent whole, the response was read whole, and nothing came after it.
In every other case, cancellation included, it is closed.

Rule 2. A request is sent again only if nobody can have acted on it. An upstream may close an idle
connection in the instant in which it is used again. When a connection that has been used before
ends without a byte of a response, our kernel is asked whether the other side's kernel has
acknowledged a byte of the request. Only if it has acknowledged none, the request is sent again,
once, on a new connection (RFC 9110 §9.2.2). Where the kernel can't tell, it is not sent again.

Rule 3. Bytes that came before a request are not its response. A connection on which more than the
response arrives is not used again. Before each use our kernel is asked whether unread bytes have
arrived; when a response begins, whether the other side's kernel had seen any of the request. (What
an upstream sends unasked after that can't be told from the response.)

Rule 4. Memory is bounded. Heads and all other bytes that are not part of a body are limited by
response.MAX_OVERHEAD. Of a body, at most MAX_UNREAD_BYTES and one read of the socket wait for a
slow reader; then nothing more is read from the socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import cast

import httpx2

from redbtc.upstream.failures import NoResponse
from redbtc.upstream.kernel import acknowledged_bytes, has_unread, probe_when_idle
from redbtc.upstream.request import UpstreamRequest, serialize_head
from redbtc.upstream.response import ExchangeState, ResponseReader, UpstreamResponse

MAX_UNREAD_BYTES = 64 << 10
# States in which bytes arrive that nobody has asked for.
NOT_AWAITED: tuple[ExchangeState, ...] = ("idle", "complete", "closed")


class NotSent(NoResponse):
    """The upstream closed the connection before it had seen a byte of the request."""


class UpstreamHTTPConnection(asyncio.Protocol):
    """One connection, with the request that is on it. Whatever arrives is parsed at once by a
    ResponseReader, which has the connection's state, and kept there until it is read. Whoever waits
    for a change waits for `_waiter`, and then looks at what has changed."""

    def __init__(
        self, open_connections: set[UpstreamHTTPConnection], pool: deque[UpstreamHTTPConnection]
    ) -> None:
        """`open_connections` has the connection while it is open, and `pool` while it is idle."""
        self.response = ResponseReader()
        self.bypass: Callable[[bytes], bool] | None = None  # see ResponseBody.bypass_with
        self._open_connections = open_connections
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._writable = True
        self._reading_paused = False
        self._written = 0  # bytes, of all requests
        # How many bytes the other side's kernel had acknowledged before the request. None on a new
        # connection, where the kernel can't tell, and once a response has begun.
        self._acknowledged: int | None = None
        self._idle_since = 0.0

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._tls = transport.get_extra_info("ssl_object") is not None
        self._open_connections.add(self)
        probe_when_idle(transport)

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response.state == "failed":
            return
        if response.state in NOT_AWAITED:
            self.close()
            return
        if self._acknowledged is not None and self._came_before():
            self._fail(httpx2.RemoteProtocolError("the response came before the request"))
            return
        response.feed(data)
        reader_waits = self._waiter and response.parts and not self._waiter.done()
        if self.bypass and reader_waits and self.bypass(b"".join(response.parts)):
            response.take()
            if response.state == "reading_body":
                return
        if response.waiting_bytes > MAX_UNREAD_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake()

    def _came_before(self) -> bool:
        """Return whether the first bytes of a response were sent before the other side's kernel had
        seen any of the request: they would have acknowledged it."""
        before, self._acknowledged = self._acknowledged, None
        now = acknowledged_bytes(self._transport)
        return before is not None and now is not None and now <= before

    def eof_received(self) -> None:
        before = self._acknowledged
        unanswered = self.response.nothing_came and before is not None
        if unanswered and before == acknowledged_bytes(self._transport):
            self._fail(NotSent("the connection had been closed"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_connections.discard(self)
        self.response.end(exc)
        self._wake()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    # Waiting

    def _change(
        self, timeout: float | None, late: type[httpx2.TimeoutException]
    ) -> asyncio.Future[None]:
        """Return a future that is done when something has happened, after `timeout` seconds at the
        latest: the exchange fails then with `late`. Raises the error that it has failed with."""
        if self.response.error:
            raise self.response.error
        if self.response.state == "closed":
            raise httpx2.RemoteProtocolError("the connection was closed")
        self._waiter = self._loop.create_future()
        if timeout is not None:
            timer = self._loop.call_later(timeout, self._time_out, late)
            self._waiter.add_done_callback(lambda _: timer.cancel())
        return self._waiter

    def _time_out(self, late: type[httpx2.TimeoutException]) -> None:
        self._fail(late("nothing came in time"))

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: httpx2.TransportError) -> None:
        self.response.fail(error)
        self._wake()

    # What the pool calls

    def idle_seconds(self) -> float:
        """Return how many seconds the connection has been in its pool."""
        return self._loop.time() - self._idle_since

    def reuse(self) -> bool:
        """Prepare for another request. Return whether the connection is still open, as far as has
        been noticed, and nothing has arrived since the last response."""
        if self._tls:
            self._acknowledged = acknowledged_bytes(self._transport)
        else:
            # Every request was answered, so all bytes have been acknowledged; the kernel counts its
            # SYN as one byte more.
            self._acknowledged = self._written + 1
        return not (self._transport.is_closing() or has_unread(self._transport))

    async def exchange(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request; return the head of its response, whose body is still to be read. Raises
        TransportError; the connection is closed then."""
        response = self.response
        read = request.timeouts.get("read")
        try:
            response.begin(request.method)
            await self._send(request)
            while not response.status:
                await self._change(read, httpx2.ReadTimeout)
        except BaseException:
            self.close()
            raise
        body = ResponseBody(self, read)
        return UpstreamResponse(
            response.status, response.headers, body, response.http_version, response.reason
        )

    async def _send(self, request: UpstreamRequest) -> None:
        """Send a request. Stop when its response begins early: that is probably a refusal."""
        head, left = serialize_head(request)
        timeout = request.timeouts.get("write")
        async for part in request.body:
            if left is not None:
                left -= len(part)
                if left < 0:
                    raise httpx2.LocalProtocolError("Too much data for declared Content-Length")
            elif part:
                part = b"%x\r\n%s\r\n" % (len(part), part)
            if part:
                self._write([head, part])  # as one packet, where it fits
                head = b""
            while not self._writable and self.response.state == "sending":
                await self._change(timeout, httpx2.WriteTimeout)
            if self.response.state != "sending":
                return
        if left:
            raise httpx2.LocalProtocolError("Too little data for declared Content-Length")
        if end := head + (b"0\r\n\r\n" if left is None else b""):
            self._write([end])
        self.response.enter("awaiting_head")

    def _write(self, parts: list[bytes]) -> None:
        self._written += sum(map(len, parts))
        self._transport.writelines(parts)

    # What the reader of the response calls

    async def read(self, timeout: float | None) -> bytes:
        """Return the bytes of the body that have arrived since the last time; wait for at most
        `timeout` seconds. Raises StopAsyncIteration at the end of the body, TransportError."""
        response = self.response
        while not response.parts:
            if response.state == "complete":
                raise StopAsyncIteration
            await self._change(timeout, httpx2.ReadTimeout)
        parts = response.take()
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """End the exchange: keep the connection for the next request if it may have one, or close
        it."""
        response = self.response
        whole = response.state == "complete" and response.reusable
        if whole and not self._reading_paused and not self._transport.is_closing():
            response.close()
            self.response, self.bypass = ResponseReader(), None
            self._idle_since = self._loop.time()
            self._pool.append(self)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection at once, without sending what is buffered."""
        self.response.close()
        self._transport.abort()


class ResponseBody(httpx2.AsyncByteStream):
    """A response's body, in parts as they arrive. Closing it gives the connection back."""

    def __init__(self, connection: UpstreamHTTPConnection, timeout: float | None) -> None:
        self._connection: UpstreamHTTPConnection | None = connection
        self._timeout = timeout

    def bypass_with(self, function: Callable[[bytes], bool]) -> None:
        """Offer the parts that arrive while the reader waits to this function first. The reader
        does not get a part for which it returns True, and goes on waiting, with the same timeout.
        (Waking a task for an event costs as much as sending the event.)"""
        if self._connection:
            self._connection.bypass = function

    @property
    def whole(self) -> bool:
        """Return whether all of the body has arrived."""
        connection = self._connection
        return connection is not None and connection.response.state == "complete"

    def __aiter__(self) -> ResponseBody:
        return self

    def __anext__(self) -> Coroutine[None, None, bytes]:
        if self._connection is None:
            raise httpx2.StreamClosed
        return self._connection.read(self._timeout)

    async def aclose(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None
