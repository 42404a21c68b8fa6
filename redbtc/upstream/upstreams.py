"""The upstreams. Where requests may go is decided by the settings alone: nothing in a body or a
header names a place, no redirects are followed, no cookies kept, no proxy taken from the
environment."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import httpx2
import orjson
from websockets.asyncio.client import ClientConnection, connect

from redbtc.config import UpstreamSettings
from redbtc.headers import BAD_IN_VALUE, Headers
from redbtc.meter.answers import name_in
from redbtc.meter.decoding import Decoding, NotDecoded, codings_of
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.slices import with_turns
from redbtc.upstream.http1 import ResponseHead, Transport, UpstreamRequest

KEEPALIVE_SECONDS = 15
MAX_FETCHED = 4 << 20  # bytes of a list of models, or of what describes one
ASK_SECONDS = 30  # for what the gateway itself asks of an upstream
SLICE = 2 << 20  # bytes of a body that are given to the kernel at a time
MAX_FRAME = 128 << 20  # bytes of a WebSocket message from an upstream
PING_SECONDS = 20


class UploadBody(httpx2.ByteStream):
    """A request's body, in slices of what it is held in, that knows whether it has begun to leave:
    then the head has left before."""

    def __init__(self, body: Buffer) -> None:
        self._body = body
        self._at = 0
        self.left = False

    def __aiter__(self) -> UploadBody:
        self._at = 0
        return self

    async def __anext__(self) -> bytes:
        start, size = self._at, len(self._body)
        if start >= max(size, 1):
            raise StopAsyncIteration
        self.left = True
        self._at = max(start + SLICE, 1)
        if size <= SLICE:
            return cast(bytes, self._body)
        return cast(bytes, memoryview(self._body)[start : start + SLICE])


def check_answer(headers: Headers) -> None:
    """Raise httpx2.RemoteProtocolError for a head that httpx2 accepts, but that clients could read
    in two ways."""
    names = {name.lower() for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise httpx2.RemoteProtocolError("a response with Content-Length and Transfer-Encoding")
    if BAD_IN_VALUE.search(b"".join([value for _, value in headers])):
        raise httpx2.RemoteProtocolError("a control character in a header")


async def ask_to_close(event: str, info: dict[str, Any]) -> None:
    """Add `Connection: close` to a request over HTTP/1.1. httpx2 calls this at each event of a
    request (its "trace" extension). Otherwise it would take what an upstream sends after an answer
    for the answer to the next request, which may be another account's. HTTP/2 numbers its answers.
    """
    if event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
        info["request"].headers.append((b"connection", b"close"))


NOT_OF_WEBSOCKET = ("accept", "accept-encoding", "content-type", "content-encoding")
NO_LIST = (
    httpx2.HTTPError,
    TimeoutError,
    orjson.JSONDecodeError,
    KeyError,
    TypeError,
    AttributeError,
)


class Connect(connect):
    """Follows no redirects."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class Upstream:
    """One place that requests are forwarded to, with its connections."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self.settings = settings
        self.name = settings.name
        key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        self.usable = bool(key) or not settings.api_key_env
        self.speaks_websocket = settings.websocket and settings.transport == "asyncio"
        self.in_flight = 0
        self._models: tuple[list[dict[str, Any]], float] | None = None  # and when they were listed
        self._base = httpx2.URL(settings.base_url.rstrip("/"))
        self._own: Headers = [(b"host", self._base.netloc), (b"accept-encoding", b"identity")]
        if key:
            self._own.append((b"authorization", f"Bearer {key}".encode()))
        self._path = self._base.raw_path.rstrip(b"/")
        self._timeouts: dict[str, float | None] = {
            "connect": settings.connect_timeout_seconds,
            "write": settings.idle_timeout_seconds,
        }
        if settings.transport == "httpx":
            self._transport: httpx2.AsyncBaseTransport = httpx2.AsyncHTTPTransport(
                verify=httpx2.create_ssl_context(trust_env=False),
                http2=True,
                proxy=settings.proxy or None,
                limits=httpx2.Limits(keepalive_expiry=KEEPALIVE_SECONDS, max_connections=None),
            )
            self._send = self._send_by_httpx
        else:
            transport = Transport(keepalive_seconds=KEEPALIVE_SECONDS)
            self._transport, self._send = transport, transport.send

    def serves(self, model: str) -> bool:
        """Whether one of its patterns matches."""
        patterns = self.settings.models
        return "*" in patterns or any(fnmatch.fnmatchcase(model, each) for each in patterns)

    async def open(
        self, method: str, path: str, query: bytes, headers: Headers, body: UploadBody
    ) -> ResponseHead:
        """Send a request; the answer's head. Raises httpx2.HTTPError."""
        target = self._path + path.encode() + (b"?" + query if query else b"")
        headers = [*headers, *self._own]
        return await self._send(
            UpstreamRequest(method, self._base, target, headers, body, self._timeouts)
        )

    async def _send_by_httpx(self, request: UpstreamRequest) -> ResponseHead:
        assert isinstance(self._transport, httpx2.AsyncHTTPTransport)
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
            check_answer(response.headers.raw)
        except httpx2.RemoteProtocolError:
            await body.aclose()
            raise
        return ResponseHead(response.status_code, response.headers.raw, body)

    async def fetch(
        self, path: str, take: Callable[[bytes], Iterable[object]], method: str = "GET"
    ) -> int:
        """Send a request of the gateway's own, without a body, and return the status of its answer.
        `take` is called with each part of the answer's decoded body, and what it returns is
        iterated, with turns for other work. Raises httpx2.HTTPError, TimeoutError."""
        async with asyncio.timeout(min(ASK_SECONDS, self.settings.first_byte_timeout_seconds)):
            accept = [(b"accept", b"application/json")]
            answer = await self.open(method, path, b"", accept, UploadBody(b""))
            decoding = Decoding(codings_of(answer.headers))
            try:
                async for chunk in answer.body:
                    async for part in with_turns(decoding.decoded(chunk)):
                        async for _ in with_turns(take(part)):
                            pass
                async for _ in with_turns(take(decoding.rest())):
                    pass
                return answer.status
            except NotDecoded:
                raise httpx2.DecodingError("the response can't be decoded") from None
            finally:
                await answer.body.aclose()

    async def fetch_whole(self, path: str) -> tuple[int, bytes]:
        """As `fetch`; return the status and the whole body. Raises httpx2.HTTPError, also for a
        body of more than MAX_FETCHED bytes; TimeoutError."""
        body = bytearray()

        def take(chunk: bytes) -> tuple[()]:
            body.extend(chunk)
            if len(body) > MAX_FETCHED:
                raise httpx2.RemoteProtocolError("the response is too long")
            return ()

        status = await self.fetch(path, take)
        return status, bytes(body)

    async def models(self) -> tuple[list[dict[str, Any]], float]:
        """The models that it lists and its patterns allow, and how many seconds ago they were: the
        last good list where there is no new one. Raises Refusal where there never was one."""
        with contextlib.suppress(*NO_LIST):
            status, listed = await self.fetch_whole("/models")
            if status == 200:
                named = [each for each in orjson.loads(listed)["data"] if name_in(each.get("id"))]
                allowed = [each for each in named if self.serves(each["id"])]
                self._models = allowed, time.monotonic()
        if self._models is None:
            raise Refusal("upstream_unreachable", "The upstream did not return a list of models.")
        models, listed_at = self._models
        return models, time.monotonic() - listed_at

    @property
    def listed(self) -> list[str]:
        """The models in the last list that it gave."""
        return [model["id"] for model in self._models[0]] if self._models else []

    async def connect(self, headers: Headers) -> ClientConnection:
        """A WebSocket to its /responses. Raises OSError, TimeoutError, InvalidHandshake."""
        assert isinstance(self._transport, Transport), "speaks_websocket says so"
        url = f"{str(self._base).rstrip('/')}/responses".replace("http", "ws", 1)
        more = [(name.decode(), value.decode("latin-1")) for name, value in headers]
        more += [(name.decode(), value.decode()) for name, value in self._own if name != b"host"]
        return await Connect(
            url,
            additional_headers=[line for line in more if line[0] not in NOT_OF_WEBSOCKET],
            user_agent_header=None,
            compression=None,
            proxy=None,
            max_size=MAX_FRAME,
            open_timeout=self.settings.connect_timeout_seconds,
            ping_interval=PING_SECONDS,
            ping_timeout=self.settings.idle_timeout_seconds,
            close_timeout=1,
            ssl=await self._transport.tls_context() if url.startswith("wss") else None,
        )

    async def close(self) -> None:
        """Close its connections, once those in flight are done."""
        while self.in_flight:
            await asyncio.sleep(1)
        await self._transport.aclose()


def choose(upstreams: Iterable[Upstream], model: str, only: str | None = None) -> list[Upstream]:
    """The upstreams that may take the request, the one to try first in front: by priority, among
    equals by chance and weight. `only`: the name of the one where what it builds on is stored.
    Raises Refusal."""
    if only is not None:
        upstreams = [upstream for upstream in upstreams if upstream.name == only]
        if not upstreams:
            raise Refusal("no_upstream", retry_after=60)
    serving = [upstream for upstream in upstreams if upstream.serves(model)]
    if not serving:
        raise Refusal("model_not_found", f"The model '{model}' does not exist here.", param="model")
    usable = [upstream for upstream in serving if upstream.usable]
    if not usable:
        raise Refusal("no_upstream", retry_after=5)
    return by_turn(usable)


def by_turn(upstreams: list[Upstream]) -> list[Upstream]:
    """By priority, among equals by chance and weight."""
    if len(upstreams) == 1:
        return upstreams

    def turn(upstream: Upstream) -> tuple[int, float]:  # Efraimidis and Spirakis, 2006
        chance = -math.log(1 - random.random()) / upstream.settings.weight
        return upstream.settings.priority, chance

    return sorted(upstreams, key=turn)
