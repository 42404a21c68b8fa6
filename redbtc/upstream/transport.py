"""A transport for httpx2 that speaks HTTP/1.1 and keeps connections.

`httpx2.AsyncClient(transport=Transport())` works, and so does calling it directly, as the gateway
does. It exists because it costs a fraction of httpx2's own transport, which speaks HTTP/2 and goes
through proxies; tests hold the two against each other.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections import deque
from typing import cast

import httpx2

from redbtc.upstream.addresses import HostNames
from redbtc.upstream.connecting import Connector
from redbtc.upstream.connection import NotSent, UpstreamHTTPConnection
from redbtc.upstream.request import UpstreamRequest
from redbtc.upstream.response import UpstreamResponse


class Transport(httpx2.AsyncBaseTransport):
    """Sends requests over HTTP/1.1, on connections that it keeps for `keepalive_seconds` after use.

    Timeouts are httpx2's (`extensions={"timeout": {"connect", "read", "write"}}`, seconds or None).
    The number of connections is not limited, so that no request waits for one. Raises httpx2's
    exceptions.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        keepalive_seconds: float = 15,
        names: HostNames | None = None,
    ) -> None:
        """`context` is the TLS context if the system's certificates are not to be trusted. `names`
        are those that have been looked up already."""
        self.connections: set[UpstreamHTTPConnection] = set()  # those that are open
        self.connector = Connector(names or HostNames(), context)
        self._keepalive_seconds = keepalive_seconds
        # By origin, the connection that was used last at the end.
        self._pools: dict[tuple[str, bytes, int | None], deque[UpstreamHTTPConnection]] = {}
        self._last_url: httpx2.URL | None = None  # of the last request, and the pool of its origin
        self._last_pool: deque[UpstreamHTTPConnection] = deque()
        self._sweeper: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request of httpx2's. Raises TransportError."""
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        head = await self.send(
            UpstreamRequest(
                request.method,
                request.url,
                request.url.raw_path,
                request.headers.raw,
                request.stream,
                request.extensions.get("timeout", {}),
            )
        )
        version = b"HTTP/" + head.http_version.encode()
        return httpx2.Response(
            head.status,
            headers=head.headers,
            stream=head.body,
            extensions={"http_version": version, "reason_phrase": head.reason},
        )

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request without httpx2's objects, which cost as much as all of this. Raises
        TransportError."""
        url, pool = request.url, self._last_pool
        if url is not self._last_url:
            pool = self._pools.setdefault((url.scheme, url.raw_host, url.port), deque())
            self._last_url, self._last_pool = url, pool
        if connection := self._take_idle(pool):
            try:
                return await connection.exchange(request)
            except NotSent:
                if not isinstance(request.body, httpx2.ByteStream):  # it can't be read again
                    raise
        connection = await self._connect(url, pool, request.timeouts.get("connect"))
        return await connection.exchange(request)

    def _take_idle(self, pool: deque[UpstreamHTTPConnection]) -> UpstreamHTTPConnection | None:
        """Return the usable connection that was used last, so that the others can grow old."""
        while pool:
            connection = pool.pop()
            if connection.idle_seconds() < self._keepalive_seconds and connection.reuse():
                return connection
            connection.close()
        return None

    async def _connect(
        self, url: httpx2.URL, pool: deque[UpstreamHTTPConnection], timeout: float | None
    ) -> UpstreamHTTPConnection:
        if url.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol(f"Unsupported URL protocol {url.scheme!r}")
        loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._keepalive_seconds, self._sweep)
        open_on = functools.partial(
            loop.create_connection, lambda: UpstreamHTTPConnection(self.connections, pool)
        )
        try:
            made = await self.connector.connect(url, timeout, open_on)
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error
        return cast(UpstreamHTTPConnection, made[1])

    async def can_connect(self, url: httpx2.URL, timeout: float) -> bool:
        """Return whether the host of a URL can be connected to within `timeout` seconds, with TLS
        where the URL says so."""
        open_on = functools.partial(asyncio.get_running_loop().create_connection, asyncio.Protocol)
        try:
            transport, _ = await self.connector.connect(url, timeout, open_on)
        except OSError:
            return False
        transport.abort()
        return True

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long. In each pool they come first."""
        for pool in self._pools.values():
            while pool and pool[0].idle_seconds() >= self._keepalive_seconds:
                pool.popleft().close()
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
