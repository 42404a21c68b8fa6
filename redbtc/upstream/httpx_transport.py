"""httpx2's own transport, for upstreams that need HTTP/2 or a proxy."""

from __future__ import annotations

import ssl
from typing import Any, cast

import httpx2

from redbtc.headers import BAD_IN_VALUE, Headers
from redbtc.upstream.certificates import system_context
from redbtc.upstream.request import UpstreamRequest
from redbtc.upstream.response import UpstreamResponse


class HTTPXTransport:
    """Sends requests through httpx2's transport, which takes no proxy from the environment."""

    def __init__(
        self, proxy: str | None, keepalive_seconds: float, context: ssl.SSLContext | None
    ) -> None:
        """`context` is the TLS context if the system's certificates are not to be trusted."""
        self._transport = httpx2.AsyncHTTPTransport(
            verify=context or system_context(),
            http2=True,
            proxy=proxy,
            limits=httpx2.Limits(keepalive_expiry=keepalive_seconds, max_connections=None),
        )

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request; return the head of its response. Raises TransportError."""
        response = await self._transport.handle_async_request(
            httpx2.Request(
                request.method,
                request.url.copy_with(raw_path=request.target),
                headers=request.headers,
                stream=request.body,
                extensions={"timeout": request.timeouts, "trace": ask_to_close},
            )
        )
        body = cast(httpx2.AsyncByteStream, response.stream)
        try:
            check_response(response.headers.raw)
        except httpx2.RemoteProtocolError:
            await body.aclose()
            raise
        return UpstreamResponse(response.status_code, response.headers.raw, body)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()


def check_response(headers: Headers) -> None:
    """Raise httpx2.RemoteProtocolError for a head that httpx2 accepts, but that clients could read
    in two ways."""
    names = {name.lower() for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise httpx2.RemoteProtocolError("a response with Content-Length and Transfer-Encoding")
    if BAD_IN_VALUE.search(b"".join([value for _, value in headers])):
        raise httpx2.RemoteProtocolError("a control character in a header")


async def ask_to_close(event: str, info: dict[str, Any]) -> None:
    """Tell the upstream of a request over HTTP/1.1 to close the connection after its response.
    httpx2 calls this at each event of a request (its "trace" extension). Otherwise httpx2 would
    take what an upstream sends after a response for the response to the next request, which may be
    another account's. HTTP/2 numbers its responses."""
    if event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
        info["request"].headers.append((b"connection", b"close"))
