"""The way to the upstreams: HTTP/1.1 for httpx2, on asyncio's Protocol and httptools.

`Transport` is a transport as httpx2 knows them: `httpx2.AsyncClient(transport=Transport())` works,
and so does calling it directly, as the gateway does. It exists because it costs a fraction of
httpx2's own, which speaks HTTP/2 and goes through proxies; tests hold the two against each other.

Rule 1. A connection carries one request at a time and goes back to its pool only when both sides
are through with it: the request sent whole, the answer read whole, nothing behind it. In every
other case, cancellation included, it is closed. There is no third way.

Rule 2. A request is sent again only if nobody can have acted on it. An upstream may close an idle
connection in the instant in which it is used. When a connection ends that has been used before, and
not a byte of an answer has come, our kernel is asked whether the other side's has acknowledged a
byte of the request. Only if none was is it sent again, once, on a new connection (RFC 9110 §9.2.2).
Where the kernel can't tell, it is not.

Rule 3. Bytes that came before a request are not its answer. A connection on which more than the
answer comes is not used again. Before each use our kernel is asked whether unread bytes have
arrived; when an answer begins, whether the other side's kernel had seen any of the request. (What
an upstream sends unasked after that can't be told from the answer.)

Rule 4. Memory is bounded: heads and all else that is no body by MAX_OVERHEAD, what waits for a slow
reader by HIGH_WATER and one read of the socket. Then nothing more is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import re
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Callable, Coroutine
from typing import NamedTuple, cast

import httptools
import httpx2

MAX_OVERHEAD = 100 << 10  # bytes without any body between: heads, 1xx, chunk extensions, trailers
HIGH_WATER = 64 << 10
NO_BYTES = bytes(4)  # 0 as a C int
REQUEST_HEAD = re.compile(  # RFC 9112 §3, RFC 9110 §5.5
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+\r\n"
)
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 5}  # as OpenAI's SDKs set them


class NotSent(httpx2.RemoteProtocolError):
    """The upstream closed the connection before it had seen a byte of the request."""


class UpstreamRequest(NamedTuple):
    """What is sent: to the origin of `url`, with `target` after the method. `timeouts` are httpx2's
    ("connect", "read", "write") in seconds; none where there is none."""

    method: str
    url: httpx2.URL
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: httpx2.AsyncByteStream
    timeouts: dict[str, float | None]


class ResponseHead(NamedTuple):
    """An answer's head, and the body to come, which its reader closes."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: httpx2.AsyncByteStream
    http_version: str = "1.1"
    reason: bytes = b""


def acknowledged(transport: asyncio.BaseTransport) -> int | None:
    """How many bytes have reached the other side's kernel: tcpi_bytes_acked, at 120 in tcp(7)'s
    struct tcp_info. None on systems other than Linux, and where the kernel does not count them."""
    try:
        sock = transport.get_extra_info("socket")
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        count = int(struct.unpack_from("=Q", info, 120)[0])
        return count if count > 1 else None  # the SYN counts as one: more were acknowledged before
    except (AttributeError, OSError, struct.error):
        return None


def has_unread(transport: asyncio.BaseTransport) -> bool:
    """Return whether bytes have arrived that were not read yet."""
    number = transport.get_extra_info("socket").fileno()
    return fcntl.ioctl(number, termios.FIONREAD, NO_BYTES) != NO_BYTES


class UpstreamHTTPConnection(asyncio.Protocol):
    """One connection, and the request that is on it. What arrives is parsed at once and kept until
    it is read; whoever waits, waits for `_waiter`, and looks then at what has changed."""

    def __init__(self, transport: Transport, idle: deque[UpstreamHTTPConnection]) -> None:
        self._idle_since = 0.0
        self._owner = transport
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._writable = True
        self._written = 0  # bytes, of all requests
        self._acknowledged: int | None = None  # before the request, where it was used before
        self._reset()

    def _reset(self) -> None:
        """No request, no answer."""
        self._method = ""
        self._sent = False
        self._error: httpx2.TransportError | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._status = 0
        self._http_version = ""
        self._overhead = 0
        self._chunks: list[bytes] = []
        self.waiting_bytes = 0
        self._paused = False
        self._until_close = True  # the body has no end but the connection's
        self.complete = False
        self._keep_alive = False
        self.pass_on: Callable[[bytes], bool] | None = None

    # What asyncio and httptools call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._parser = httptools.HttpResponseParser(self)
        self._tls = transport.get_extra_info("ssl_object") is not None
        self._owner.connections.add(self)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            with contextlib.suppress(AttributeError):  # not on every system
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        if self.complete or not self._method:  # nobody has asked for this
            self.close()
            return
        if self._error:
            return
        if self._acknowledged is not None and self._came_before():
            self._fail(httpx2.RemoteProtocolError("an answer came before the request"))
            self._wake()
            return
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx2.RemoteProtocolError(f"the answer is no HTTP/1.1: {error}"))
        if self._overhead > MAX_OVERHEAD:
            self._fail(httpx2.RemoteProtocolError("the answer's head is too large"))
        reader_waits = self._waiter and not self._waiter.done() and self._chunks
        if self.pass_on and reader_waits and self.pass_on(b"".join(self._chunks)):
            self._taken()
            if not self.complete and not self._error:
                return
        self._wake()

    def _came_before(self) -> bool:
        """Return whether the first bytes of an answer were sent before the other side's kernel had
        seen any of the request: they would have acknowledged it."""
        before, self._acknowledged = self._acknowledged, None
        now = acknowledged(self._transport)
        return before is not None and now is not None and now <= before

    def eof_received(self) -> None:
        nothing_came = self._method and not self._status and not self._overhead
        before = self._acknowledged
        if nothing_came and before is not None and before == acknowledged(self._transport):
            self._fail(NotSent("the connection had been closed"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connections.discard(self)
        if self._status and self._until_close and not exc and not self._error:
            self.complete = True
        elif exc:
            self._fail(httpx2.ReadError(str(exc)))
        elif self._status:
            self._fail(httpx2.RemoteProtocolError("the connection was closed in mid-answer"))
        else:
            self._fail(httpx2.RemoteProtocolError("the connection was closed without an answer"))
        self._wake()
        del self._parser  # refers back to here: nothing is to wait for the garbage collector

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    def on_message_begin(self) -> None:
        if self.complete:  # more than one answer
            self._keep_alive = False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason  # it comes in pieces

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._status:  # a trailer
            return
        value = value.rstrip(b" \t")
        self._headers.append((name, value))
        if name.lower() == b"content-length":
            self._until_close = False
        elif name.lower() == b"transfer-encoding":
            self._until_close = False
            if value.lower() != b"chunked":
                self._fail(httpx2.RemoteProtocolError("an unknown Transfer-Encoding"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.complete or self._error:
            return
        if status < 200:  # RFC 9110 §15.2: one that is not final
            self._headers, self._reason, self._until_close = [], b"", True
            return
        self._status = status
        self._http_version = self._parser.get_http_version()
        self._overhead = 0
        self.complete = self._method == "HEAD"

    def on_body(self, body: bytes) -> None:
        if self.complete:  # these bytes came after the answer
            return
        self._overhead = 0
        self._chunks.append(body)
        self.waiting_bytes += len(body)
        if self.waiting_bytes > HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._status and not self.complete and not self._error:
            self.complete = True
            self._keep_alive = self._parser.should_keep_alive()

    def _fail(self, error: httpx2.TransportError) -> None:
        """The first error counts, and none after the answer's end."""
        self._keep_alive = False
        if not self._error and not self.complete:
            self._error = error

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # What the transport calls

    async def exchange(self, request: UpstreamRequest) -> ResponseHead:
        """Send a request; its answer's head, with the body to come. Raises TransportError."""
        self._method = request.method
        read = request.timeouts.get("read")
        try:
            await self._send(request)
            while not self._status:
                await self._change(read, httpx2.ReadTimeout)
        except BaseException:
            self.close()
            raise
        body = ResponseBody(self, read)
        return ResponseHead(self._status, self._headers, body, self._http_version, self._reason)

    async def _send(self, request: UpstreamRequest) -> None:
        """Send all of it, unless the answer comes before: that is then an early refusal."""
        length, chunked, timeout = 0, False, request.timeouts.get("write")
        head = [b"%s %s HTTP/1.1\r\n" % (request.method.encode(), request.target)]
        for name, value in request.headers:
            head.append(b"%s: %s\r\n" % (name, value))
            if name.lower() == b"content-length":
                length = int(value)
            elif name.lower() == b"transfer-encoding":
                chunked = True
        text = b"".join([*head, b"\r\n"])
        if not REQUEST_HEAD.fullmatch(text) or text.count(b"\n") != len(head) + 1:
            raise httpx2.LocalProtocolError("Illegal request head")
        async for part in request.body:
            length -= len(part)
            if length < 0 and not chunked:
                raise httpx2.LocalProtocolError("Too much data for declared Content-Length")
            if part:
                part = b"%x\r\n%s\r\n" % (len(part), part) if chunked else part
                self._write([text, part])  # as one packet, where it fits
                text = b""
            while not self._writable:
                await self._change(timeout, httpx2.WriteTimeout)
                if self._status:
                    return
        if length > 0 and not chunked:
            raise httpx2.LocalProtocolError("Too little data for declared Content-Length")
        if end := text + (b"0\r\n\r\n" if chunked else b""):
            self._write([end])
        self._sent = True

    def _write(self, parts: list[bytes]) -> None:
        self._written += sum(map(len, parts))
        self._transport.writelines(parts)

    def _change(
        self, timeout: float | None, late: type[httpx2.TimeoutException]
    ) -> asyncio.Future[None]:
        """Done when something has happened, or with an error: what has gone wrong, or `late`."""
        if self._error:
            raise self._error
        self._waiter = self._loop.create_future()
        if timeout is not None:
            timer = self._loop.call_later(timeout, self._late, late)
            self._waiter.add_done_callback(lambda _: timer.cancel())
        return self._waiter

    def _late(self, late: type[httpx2.TimeoutException]) -> None:
        self._fail(late("nothing came in time"))
        self._wake()

    async def read(self, timeout: float | None) -> bytes:
        """What has come of the body since the last time. Raises StopAsyncIteration at its end."""
        while not self._chunks:
            if self.complete:
                raise StopAsyncIteration
            await self._change(timeout, httpx2.ReadTimeout)
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._taken()
        return body

    def _taken(self) -> None:
        self._chunks, self.waiting_bytes = [], 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def idle_seconds(self) -> float:
        """Since it was given back."""
        return self._loop.time() - self._idle_since

    def reuse(self) -> bool:
        """Whether it is as open as when it was given back, as far as it has been noticed, and
        nothing has come meanwhile."""
        if self._tls:
            self._acknowledged = acknowledged(self._transport)
        else:  # of what was answered, all has arrived; the kernel counts its SYN as one byte more
            self._acknowledged = self._written + 1
        return not (self._transport.is_closing() or has_unread(self._transport))

    def release(self) -> None:
        """The answer is no longer read: keep the connection for the next request, or close it."""
        whole = self.complete and self._sent and self._keep_alive
        if whole and not self._paused and not self._transport.is_closing():
            self._reset()
            self._idle_since = self._loop.time()
            self._idle.append(self)
        else:
            self.close()

    def close(self) -> None:
        """At once; what is not yet sent isn't any more."""
        self._keep_alive = False
        self._error = None  # once raised, it refers back to here, too
        self._transport.abort()


class ResponseBody(httpx2.AsyncByteStream):
    """An answer's body, in parts as they come. Closing it gives the connection back."""

    def __init__(self, connection: UpstreamHTTPConnection, timeout: float | None) -> None:
        self._connection: UpstreamHTTPConnection | None = connection
        self._timeout = timeout

    def pass_on(self, function: Callable[[bytes], bool]) -> None:
        """Offer what comes to this function first, while the reader waits for it. What it takes is
        not read any more, and a read timeout goes on. To wake a task for each event costs as much
        as to send the event."""
        if self._connection:
            self._connection.pass_on = function

    @property
    def whole(self) -> bool:
        """Whether all of it is here already."""
        return self._connection is not None and self._connection.complete

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


class Transport(httpx2.AsyncBaseTransport):
    """Sends requests over HTTP/1.1, on connections that it keeps for `keepalive_seconds` after use.

    Timeouts are httpx2's (`extensions={"timeout": {"connect", "read", "write"}}`, seconds or None);
    there is no bound on connections, so that nobody waits for one. Raises httpx2's exceptions.
    """

    def __init__(
        self, context: ssl.SSLContext | None = None, keepalive_seconds: float = 15
    ) -> None:
        self.connections: set[UpstreamHTTPConnection] = set()
        self._context = context
        self._making_context = asyncio.Lock()
        self._keepalive_seconds = keepalive_seconds
        self._idle: dict[tuple[str, bytes, int | None], deque[UpstreamHTTPConnection]] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises TransportError."""
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        answer = await self.send(
            UpstreamRequest(
                request.method,
                request.url,
                request.url.raw_path,
                request.headers.raw,
                request.stream,
                request.extensions.get("timeout", {}),
            )
        )
        version = b"HTTP/" + answer.http_version.encode()
        return httpx2.Response(
            answer.status,
            headers=answer.headers,
            stream=answer.body,
            extensions={"http_version": version, "reason_phrase": answer.reason},
        )

    async def send(self, request: UpstreamRequest) -> ResponseHead:
        """The same without httpx2's objects, which cost as much as all of this. Raises
        TransportError."""
        url = request.url
        idle = self._idle.setdefault((url.scheme, url.raw_host, url.port), deque())
        if connection := self._reusable(idle):
            try:
                return await connection.exchange(request)
            except NotSent:
                if not isinstance(request.body, httpx2.ByteStream):  # it can't be read again
                    raise
        connection = await self._connect(url, idle, request.timeouts.get("connect"))
        return await connection.exchange(request)

    def _reusable(self, idle: deque[UpstreamHTTPConnection]) -> UpstreamHTTPConnection | None:
        """The one used last, so that the others can grow old."""
        while idle:
            connection = idle.pop()
            if connection.idle_seconds() < self._keepalive_seconds and connection.reuse():
                return connection
            connection.close()
        return None

    async def _connect(
        self, url: httpx2.URL, idle: deque[UpstreamHTTPConnection], timeout: float | None
    ) -> UpstreamHTTPConnection:
        if url.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol(f"Unsupported URL protocol {url.scheme!r}")
        loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._keepalive_seconds, self._sweep)
        host, tls = url.raw_host.decode("ascii"), url.scheme == "https"
        try:
            async with asyncio.timeout(timeout):
                _, connection = await loop.create_connection(
                    lambda: UpstreamHTTPConnection(self, idle),
                    host,
                    url.port or (443 if tls else 80),
                    ssl=await self.tls_context() if tls else None,
                )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error
        return connection

    async def tls_context(self) -> ssl.SSLContext:
        """Return whose certificates are trusted. Reading them takes 30 ms, so it is done when they
        are needed, in a thread."""
        async with self._making_context:
            if self._context is None:
                make = functools.partial(httpx2.create_ssl_context, trust_env=False)
                self._context = await asyncio.to_thread(make)
        return self._context

    def _sweep(self) -> None:
        """Close what nobody has used for long: in each pool that stands in front."""
        for idle in self._idle.values():
            while idle and idle[0].idle_seconds() >= self._keepalive_seconds:
                idle.popleft().close()
        self._sweeper = None
        if self.connections:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(self._keepalive_seconds, self._sweep)

    async def aclose(self) -> None:
        """Close all connections, those in use as well."""
        for connection in list(self.connections):
            connection.close()
        if self._sweeper:
            self._sweeper.cancel()
            self._sweeper = None
