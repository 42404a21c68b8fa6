"""The configured upstreams, and the choice among them.

The settings alone decide where requests may go: nothing in a body or a header names a place, no
redirects are followed, no cookies are kept and no proxy is taken from the environment.
"""

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
from redbtc.headers import Headers
from redbtc.meter.answers import name_in
from redbtc.meter.decoding import Decoding, NotDecoded, codings_of
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.slices import with_turns
from redbtc.upstream.httpx_transport import HTTPXTransport
from redbtc.upstream.request import UpstreamRequest
from redbtc.upstream.response import UpstreamResponse
from redbtc.upstream.transport import Transport

KEEPALIVE_SECONDS = 15
MAX_FETCHED = 4 << 20  # bytes of a response that `fetch_whole` reads
FETCH_SECONDS = 30  # at most, for a request of the gateway's own
UPLOAD_PART_BYTES = 2 << 20  # bytes of a body that are given to the kernel at a time
MAX_FRAME = 128 << 20  # bytes of a WebSocket message from an upstream
PING_SECONDS = 20


class UploadBody(httpx2.ByteStream):
    """A request's body, sent in slices. It can be sent again from its beginning."""

    def __init__(self, body: Buffer) -> None:
        self._body = body
        self._at = 0
        self.begun = False  # some of the request has been sent, since the head goes first

    def __aiter__(self) -> UploadBody:
        self._at = 0
        return self

    async def __anext__(self) -> bytes:
        start, size = self._at, len(self._body)
        if start >= max(size, 1):
            raise StopAsyncIteration
        self.begun = True
        self._at = max(start + UPLOAD_PART_BYTES, 1)
        if size <= UPLOAD_PART_BYTES:
            return cast(bytes, self._body)
        return cast(bytes, memoryview(self._body)[start : start + UPLOAD_PART_BYTES])


NOT_IN_HANDSHAKE = ("accept", "accept-encoding", "content-type", "content-encoding")
NO_LIST = (  # what is raised where an upstream gives no list of models
    httpx2.HTTPError,
    TimeoutError,
    orjson.JSONDecodeError,
    KeyError,
    TypeError,
    AttributeError,
)


class Connect(connect):
    """A WebSocket handshake that follows no redirects."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class Upstream:
    """A configured upstream, with its connections."""

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
        self._transport = (
            HTTPXTransport(settings.proxy or None, KEEPALIVE_SECONDS)
            if settings.transport == "httpx"
            else Transport(keepalive_seconds=KEEPALIVE_SECONDS)
        )

    def serves(self, model: str) -> bool:
        """Return whether one of the patterns in its settings matches the model's name."""
        patterns = self.settings.models
        return "*" in patterns or any(fnmatch.fnmatchcase(model, each) for each in patterns)

    async def open(
        self, method: str, path: str, query: bytes, headers: Headers, body: UploadBody
    ) -> UpstreamResponse:
        """Send a request; return the head of its response. Raises httpx2.HTTPError."""
        target = self._path + path.encode() + (b"?" + query if query else b"")
        headers = [*headers, *self._own]
        return await self._transport.send(
            UpstreamRequest(method, self._base, target, headers, body, self._timeouts)
        )

    async def fetch(
        self, path: str, take: Callable[[bytes], Iterable[object]], method: str = "GET"
    ) -> int:
        """Send a request of the gateway's own, without a body; return the status of its response.
        Call `take` with each part of the decoded response body, and iterate over what it returns,
        with turns for other work. Raises httpx2.HTTPError, TimeoutError."""
        async with asyncio.timeout(min(FETCH_SECONDS, self.settings.first_byte_timeout_seconds)):
            accept = [(b"accept", b"application/json")]
            response = await self.open(method, path, b"", accept, UploadBody(b""))
            decoding = Decoding(codings_of(response.headers))
            try:
                async for chunk in response.body:
                    async for part in with_turns(decoding.decoded(chunk)):
                        async for _ in with_turns(take(part)):
                            pass
                async for _ in with_turns(take(decoding.rest())):
                    pass
                return response.status
            except NotDecoded:
                raise httpx2.DecodingError("the response can't be decoded") from None
            finally:
                await response.body.aclose()

    async def fetch_whole(self, path: str) -> tuple[int, bytes]:
        """Fetch a response; return its status and its whole body. Raises TimeoutError, and
        httpx2.HTTPError, also for a body of more than MAX_FETCHED bytes."""
        body = bytearray()

        def take(chunk: bytes) -> tuple[()]:
            body.extend(chunk)
            if len(body) > MAX_FETCHED:
                raise httpx2.RemoteProtocolError("the response is too long")
            return ()

        status = await self.fetch(path, take)
        return status, bytes(body)

    async def models(self) -> tuple[list[dict[str, Any]], float]:
        """Fetch the upstream's list of models. Return the models that its patterns allow, and how
        old the list is in seconds: if the upstream gives no list now, it is the last one that it
        gave. Raises Refusal if there is none."""
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
        """The names of the models in the last list that the upstream gave."""
        return [model["id"] for model in self._models[0]] if self._models else []

    async def connect(self, headers: Headers) -> ClientConnection:
        """Open a WebSocket to the upstream's /responses. Raises OSError, TimeoutError,
        InvalidHandshake."""
        assert isinstance(self._transport, Transport), "speaks_websocket must be true"
        url = f"{str(self._base).rstrip('/')}/responses".replace("http", "ws", 1)
        sent = [(name.decode(), value.decode("latin-1")) for name, value in headers]
        sent += [(name.decode(), value.decode()) for name, value in self._own if name != b"host"]
        return await Connect(
            url,
            additional_headers=[line for line in sent if line[0] not in NOT_IN_HANDSHAKE],
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
        """Close the connections once no request is in flight."""
        while self.in_flight:
            await asyncio.sleep(1)
        await self._transport.aclose()


def choose(upstreams: Iterable[Upstream], model: str, only: str | None = None) -> list[Upstream]:
    """Return the upstreams to try for a request, in that order: by priority, and at random by
    weight within a priority. `only` is the name of the upstream where the objects are stored that
    the request refers to. Raises Refusal if there is none."""
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
    return in_order(usable)


def in_order(upstreams: list[Upstream]) -> list[Upstream]:
    """Sort by priority, and at random by weight within a priority."""
    if len(upstreams) == 1:
        return upstreams

    def place(upstream: Upstream) -> tuple[int, float]:  # Efraimidis and Spirakis, 2006
        chance = -math.log(1 - random.random()) / upstream.settings.weight
        return upstream.settings.priority, chance

    return sorted(upstreams, key=place)
