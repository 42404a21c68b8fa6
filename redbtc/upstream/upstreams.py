"""The members of the upstreams, and how requests reach them.

The settings alone decide where requests may go: nothing in a body or a header names a place, no
redirects are followed, no cookies are kept and no proxy is taken from the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import httpx2
import orjson
from websockets.asyncio.client import ClientConnection, connect

from redbtc.headers import Headers, may_come_from_client
from redbtc.meter.answers import name_in
from redbtc.meter.decoding import Decoding, NotDecoded, codings_of
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.slices import with_turns
from redbtc.upstream.addresses import HostNames
from redbtc.upstream.certificates import context_trusting, read_certificates
from redbtc.upstream.change import UpstreamChange
from redbtc.upstream.headers import without
from redbtc.upstream.health import MemberHealth
from redbtc.upstream.httpx_transport import HTTPXTransport
from redbtc.upstream.request import UpstreamRequest
from redbtc.upstream.response import UpstreamResponse
from redbtc.upstream.transport import Transport
from redbtc.upstream_settings import UpstreamSettings

KEEPALIVE_SECONDS = 15
MAX_FETCHED = 4 << 20  # bytes of a response that `fetch_whole` reads
FETCH_SECONDS = 30  # at most, for a request of the gateway's own
UPLOAD_PART_BYTES = 2 << 20  # bytes of a body that are given to the kernel at a time
MAX_FRAME = 128 << 20  # bytes of a WebSocket message from an upstream
PING_SECONDS = 20
REACH_SECONDS = 1.0  # between two attempts to reach a host that no request may wait for


class UploadBody(httpx2.ByteStream):
    """A request's body, sent in slices. It can be sent again from its beginning, until `body` is
    emptied."""

    def __init__(self, body: Buffer) -> None:
        self.body = body
        self._at = 0
        self.begun = False  # some of the request has been sent, since the head goes first

    def __aiter__(self) -> UploadBody:
        self._at = 0
        return self

    async def __anext__(self) -> bytes:
        start, size = self._at, len(self.body)
        if start >= max(size, 1):
            raise StopAsyncIteration
        self.begun = True
        self._at = max(start + UPLOAD_PART_BYTES, 1)
        if size <= UPLOAD_PART_BYTES:
            return cast(bytes, self.body)
        return cast(bytes, memoryview(self.body)[start : start + UPLOAD_PART_BYTES])


NOT_IN_HANDSHAKE = ("accept", "accept-encoding", "content-type", "content-encoding")
NO_LIST = (  # what is raised where an upstream gives no list of models
    httpx2.HTTPError,
    TimeoutError,
    orjson.JSONDecodeError,
    KeyError,
    TypeError,
    AttributeError,
)


PATTERN = re.compile(r"[*?\[]")  # what makes a name in `models` a pattern


def model_named(name: str, owner: str) -> dict[str, Any]:
    """Return a model of a list that no upstream has given."""
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


class Connect(connect):
    """A WebSocket handshake that follows no redirects."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class Upstream:
    """A member: an upstream of the settings with one of its keys, and its connections. `settings`
    are one of `UpstreamSettings.members`; `settings.name` is the name of the table."""

    def __init__(
        self,
        settings: UpstreamSettings,
        names: HostNames | None = None,
        on_change: Callable[[UpstreamChange], None] = lambda _: None,
    ) -> None:
        """`names` are the hosts' names that have been looked up already. `on_change` is told of
        each change of its state. Raises SettingsError if the settings' ca_file can't be read."""
        self.settings = settings
        self.serves = settings.serves
        self.name = settings.member_name
        self.usable = not settings.missing_variables()
        self.is_client = settings.credentials == "client"  # it gets each client's own credential
        self.is_free = settings.billing == "free"  # its requests cost nothing
        self.speaks_websocket = settings.speaks_websocket
        # Its errors 401, 403 and 429 are about the operator's key: no client sees what they name.
        self.hides_errors = not self.is_client
        self._watching: asyncio.Task[None] | None = None
        self.go_on_with(MemberHealth(self.name, self.usable, on_change=on_change))
        self.in_flight = 0
        self.max_concurrency = settings.max_concurrency
        self._models: tuple[list[dict[str, Any]], float] | None = None  # and when they were listed
        self._base = httpx2.URL(settings.base_url.rstrip("/"))
        self._own: Headers = [(b"host", self._base.netloc), (b"accept-encoding", b"identity")]
        added = settings.added_headers()
        self._own += [(name.encode(), value.encode()) for name, value in added.items()]
        replaced = [name.encode() for name in (*added, settings.auth_header.lower())]
        # The client's headers that these replace: usually none, since most don't pass anyway.
        self._replaced = frozenset(filter(may_come_from_client, replaced))
        self._path = self._base.raw_path.rstrip(b"/")
        self._timeouts: dict[str, float | None] = {
            "connect": settings.connect_timeout_seconds,
            "write": settings.idle_timeout_seconds,
        }
        self._certificates = read_certificates(settings.ca_file) if settings.ca_file else ""
        context = context_trusting(self._certificates) if self._certificates else None
        self._transport = (
            HTTPXTransport(settings.proxy or None, KEEPALIVE_SECONDS, context)
            if settings.transport == "httpx"
            else Transport(context, KEEPALIVE_SECONDS, names)
        )

    def follow(self, settings: UpstreamSettings) -> None:
        """Use these settings from now on. They connect as those before (`connects_like`)."""
        self.settings, self.serves = settings, settings.serves
        self.max_concurrency = settings.max_concurrency
        self.is_free = settings.billing == "free"

    @property
    def priority(self) -> int:
        """The members with the lowest are tried first."""
        return self.settings.priority

    @property
    def weight(self) -> int:
        """The share among members of equal priority."""
        return self.settings.weight

    @property
    def organization(self) -> str:
        """The name of the organization that the key belongs to. What one member has encrypted or
        cached, another one of the same organization can read. Without the setting, each member is
        an organization of its own."""
        return self.settings.organization or self.name

    def has_new_certificates(self) -> bool:
        """Return whether its ca_file has other contents than when it was read. Raises
        SettingsError if it can't be read."""
        ca_file = self.settings.ca_file
        return bool(ca_file) and read_certificates(ca_file) != self._certificates

    async def open(
        self, method: str, path: str, query: bytes, headers: Headers, body: UploadBody
    ) -> UpstreamResponse:
        """Send a request; return the head of its response. If the member `is_client`, `headers`
        have the client's credential. Raises httpx2.HTTPError."""
        target = self._path + path.encode() + (b"?" + query if query else b"")
        if self._replaced:
            headers = without(headers, self._replaced)
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
        gave. An upstream that is known not to be reachable is not asked, nor is one that needs a
        client's credential: its list is what its patterns name in full. Raises Refusal if there is
        no list."""
        if self.is_client:
            return [model_named(each, self.settings.name) for each in self.listed], 0.0
        if not self.health.slow_failure:
            with contextlib.suppress(*NO_LIST):
                status, listed = await self.fetch_whole("/models")
                if status == 200:
                    self._models = self.models_in(listed), time.monotonic()
        if self._models is None:
            raise Refusal("upstream_unreachable", "The upstream did not return a list of models.")
        models, listed_at = self._models
        return models, time.monotonic() - listed_at

    def models_in(self, listed: bytes) -> list[dict[str, Any]]:
        """Return the models that its patterns allow of a list that the upstream gave. Raises one of
        NO_LIST if that is not a list of models."""
        named = [each for each in orjson.loads(listed)["data"] if name_in(each.get("id"))]
        return [each for each in named if self.serves(each["id"])]

    @property
    def listed(self) -> list[str]:
        """The names of the models in the last list that the upstream gave."""
        if self.is_client:
            return [each for each in self.settings.models if not PATTERN.search(each)]
        return [model["id"] for model in self._models[0]] if self._models else []

    async def connect(self, headers: Headers) -> ClientConnection:
        """Open a WebSocket to the upstream's /responses. Raises OSError (ConnectTimedOut if
        there is none in time), InvalidHandshake."""
        assert isinstance(self._transport, Transport), "speaks_websocket must be true"
        url = f"{str(self._base).rstrip('/')}/responses".replace("http", "ws", 1)
        headers = without(headers, self._replaced)
        sent = [(name.decode(), value.decode("latin-1")) for name, value in headers]
        sent += [(name.decode(), value.decode()) for name, value in self._own if name != b"host"]
        open_on = functools.partial(
            Connect,
            url,
            additional_headers=[line for line in sent if line[0] not in NOT_IN_HANDSHAKE],
            user_agent_header=None,
            compression=None,
            proxy=None,
            max_size=MAX_FRAME,
            open_timeout=None,
            ping_interval=PING_SECONDS,
            ping_timeout=self.settings.idle_timeout_seconds,
            close_timeout=1,
        )
        timeout = self.settings.connect_timeout_seconds
        return await self._transport.connector.connect(self._base, timeout, open_on)

    def go_on_with(self, health: MemberHealth) -> None:
        """Use this health, which may be that of the member before a reload of the settings."""
        self.health = health
        health.on_unreachable = self._watch
        if health.slow_failure:  # the member before stops watching
            self._watch()

    def _watch(self) -> None:
        """Find out when the host can be reached again, so that no request has to."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch_until_reachable())
            self._watching.add_done_callback(self._end_watch)

    async def _watch_until_reachable(self) -> None:
        timeout, transport = self.settings.connect_timeout_seconds, self._transport
        while self.health.slow_failure:
            await asyncio.sleep(REACH_SECONDS)
            # Only a request can find it out through a proxy.
            if not isinstance(transport, Transport) or await transport.can_connect(
                self._base, timeout
            ):
                return

    def _end_watch(self, task: asyncio.Task[None]) -> None:
        self._watching = None
        if not task.cancelled():  # even if watching has failed: a request will find it out
            self.health.note_reachable()

    async def close(self) -> None:
        """Close the connections once no request is in flight."""
        while self.in_flight:
            await asyncio.sleep(1)
        if self._watching:
            self._watching.cancel()
        await self._transport.aclose()
