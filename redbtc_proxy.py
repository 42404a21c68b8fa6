#!/usr/bin/env python3
"""RedBTC AI: an OpenAI-compatible API gateway that is small enough to read.

    authenticate ─► read ─► admit ─► choose ─► open ─► relay ─► settle ─► last byte

Clients point their base URL here. Each request is checked, held to its account's limits, forwarded
byte for byte to an upstream, and written down: what the upstream says was used, committed before
the client sees the end of the answer. This file is read in the order in which a request meets it;
what is kept is in redbtc_ledger.py, what it costs in redbtc_billing.py, what people use in
redbtc_admin.py.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import fnmatch
import hmac
import ipaddress
import itertools
import logging
import math
import os
import random
import re
import signal
import socket
import sqlite3
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import httpx2
import msgspec
import orjson
import prometheus_client
import uvicorn
import uvloop
from msgspec import Struct
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from starlette.routing import Match, Route, Router
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import redbtc_admin as admin
import redbtc_ledger as ledger
import redbtc_webhook
from redbtc_billing import Books, Hold, Price, Spent, Tariff
from redbtc_ledger import Key, Row, Store, Usage
from redbtc_meter import MAX_NAME, JSONMeter, Meter, StreamMeter, name_in
from redbtc_settings import (
    NANOS,
    LedgerError,
    LedgerUnavailable,
    Loaded,
    Settings,
    SettingsError,
    UpstreamSettings,
    iso_time,
    load_settings,
    now_ms,
)
from redbtc_settings import Limits as LimitSettings
from redbtc_transport import Answer, Request, ResponseBody, Transport

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────
# Everything that the gateway itself answers with an error: OpenAI's form, so that every SDK raises
# its proper exception. The table is CONTRACT.md section 4.

INVALID, RATE, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
REFUSALS: dict[str, tuple[int, str, str]] = {
    "invalid_http": (400, INVALID, "The HTTP request is malformed."),
    "invalid_json": (400, INVALID, "The request body is not valid JSON."),
    "invalid_request": (400, INVALID, "The request is not valid."),
    "invalid_api_key": (401, INVALID, "Incorrect API key provided."),
    "account_suspended": (403, INVALID, "This account is suspended."),
    "metrics_forbidden": (403, INVALID, "Metrics are not for this address."),
    "unknown_url": (404, INVALID, "Unknown request URL. See the documentation for what is served."),
    "model_not_found": (404, INVALID, "The model does not exist, or it is not served here."),
    "request_timeout": (408, INVALID, "The request body took too long to arrive."),
    "request_too_large": (413, INVALID, "The request body is too large."),
    "unsupported_media_type": (415, INVALID, "The request's content type is not supported here."),
    "upgrade_required": (426, INVALID, "WebSocket is not offered here; use POST."),
    "rate_limit_exceeded": (429, RATE, "Rate limit reached."),
    "insufficient_quota": (429, "insufficient_quota", "Balance and credit are spent."),
    "concurrency_limit_exceeded": (429, RATE, "Too many requests in flight."),
    "headers_too_large": (431, INVALID, "The request's headers are too large."),
    "internal_error": (500, SERVER, "The gateway failed on this request."),
    "upstream_unreachable": (502, SERVER, "The upstream could not be reached."),
    "upstream_protocol_error": (502, SERVER, "The upstream's answer could not be understood."),
    "no_upstream": (503, SERVER, "No upstream can take this request now."),
    "ledger_unavailable": (503, SERVER, "Usage can't be recorded now, so nothing is served."),
    "draining": (503, SERVER, "The gateway is shutting down."),
    "upstream_timeout": (504, SERVER, "The upstream took too long to answer."),
}


class Refusal(Exception):
    """Refuse the client with a status, a code and a message from REFUSALS. Every 429 and 503 says
    when to come back: whole seconds from 1 to 60, since Codex CLI gives up without them and
    openai-node ignores more."""

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        param: str | None = None,
        retry_after: float = 1.0,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, self.type, usual = REFUSALS[code]
        self.message = message or usual
        self.param = param
        self.headers: Headers = list(headers)
        if self.status in (429, 503):
            seconds = min(60, max(1, math.ceil(retry_after)))
            milliseconds = min(60_000, max(1, math.ceil(retry_after * 1000)))
            self.headers += [
                (b"retry-after", b"%d" % seconds),
                (b"retry-after-ms", b"%d" % milliseconds),
            ]

    def body(self) -> bytes:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def new_request_id() -> str:
    """req_, 12 hexadecimal digits of milliseconds, 20 of chance: ids sort by time. They are no
    secrets; random is seeded from the system's entropy at the start."""
    return f"req_{now_ms():012x}{random.getrandbits(80):020x}"


async def respond(
    scope: Scope,
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    content_type: bytes = b"application/json",
) -> None:
    """One whole answer of the gateway's own."""
    request_id = scope["request_id"].encode()
    head: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id),
        (b"x-redbtc-request-id", request_id),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


# ── Guard ────────────────────────────────────────────────────────────────────────────────────────
# What uvicorn lets through and no proxy may: request smuggling, forged hosts, endless heads.
# Checked before anything else looks at the request. The path is scope["path"], never rebuilt from
# Host.

MAX_HEAD_BYTES = 64 << 10  # OpenAI asks for less than 64 KiB of headers
MAX_HEADERS = 200
HEAD_SECONDS = 30
LINGER_SECONDS = 1
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.6.2
BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 §5.5
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


class Joining:
    """A transport that sends an answer's head with what follows in the same turn of the loop: each
    write is a system call, and those cost more than most of what is done for a request."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """What only looks like a head waits for the turn's end as well, and loses nothing by it."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines([head, data])
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Once all is sent."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a bound on a head's size and time before the app can see it, with
    OpenAI's error form where the parser gives up, and with scope["leaving"]: functions that are
    called when the client leaves. (ASGI's own way, a task that waits in receive(), costs a task for
    each request, and misses the leaving of a client that pipelines.)"""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _refusal = "invalid_http"
    _lingers = False  # refused: what still comes is read and thrown away

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, Joining(transport, self.loop))
        self._leaving: set[Callable[[], None]] = set()
        self._await_head()

    def _await_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_too_late)

    def _head_too_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._lingers:
            return
        super().data_received(data)
        if self._in_head:
            if self._head_timer is None:  # most heads come whole and need none
                self._await_head()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refusal = "headers_too_large"
                self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        scope = cast(Scope, self.scope)
        scope["leaving"], scope["send_now"] = self._leaving, self._send_now
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # else its timer keeps a reset connection in memory
        for leave in list(self._leaving):
            leave()
        # They refer back to here: nothing is to wait for the garbage collector, which comes late.
        self.scope = self.cycle = None  # type: ignore[assignment]

    def _send_now(self, scope: Scope, data: bytes) -> bool:
        """A part of an answer in chunks that is under way, where no task has to wait for it; False
        where one has to: the client reads slowly, or is gone."""
        cycle = self.cycle
        if not cycle or self.flow.write_paused or not cycle.chunked_encoding:
            return False
        if cast(Scope, cycle.scope) is not scope:  # another request, pipelined
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        refusal = Refusal(self._refusal)
        reason = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}[refusal.status]
        body = refusal.body()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nx-redbtc-request-id: %s\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%s"
            % (refusal.status, reason, new_request_id().encode(), len(body), body)
        )
        self._lingers = True  # closing on unread bytes would reset the connection under the answer
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first header of that name (lower case)."""
    for key, value in headers:
        if key == name:
            return value
    return None


def check_head(scope: Scope) -> None:
    """Raise Refusal for a head that no client of good will sends, or that a proxy before or behind
    this one could read in another way (RFC 9112 §3.2, §6.1, §6.3; RFC 9110 §5.5)."""
    version = scope["http_version"]
    if version not in ("1.1", "1.0"):
        raise Refusal("invalid_http", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    headers: Headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise Refusal("headers_too_large", f"More than {MAX_HEADERS} headers.")
    names, values = [name for name, _ in headers], b"".join([value for _, value in headers])
    size = len(b"".join(names)) + len(values) + len(scope["raw_path"]) + len(scope["query_string"])
    if size > MAX_HEAD_BYTES:
        raise Refusal("headers_too_large", f"Headers of more than {MAX_HEAD_BYTES} bytes.")
    if (headers and not TOKEN.fullmatch(b"".join(names))) or BAD_IN_VALUE.search(values):
        raise Refusal("invalid_http", "A header contains characters that it must not.")
    for name in (b"host", b"content-length", b"transfer-encoding"):
        if names.count(name) > 1:
            raise Refusal("invalid_http", f"There is more than one {name.decode()} header.")
    host = header(headers, b"host")
    if not (version == "1.0" if host is None else HOST.fullmatch(host)):
        raise Refusal("invalid_http", "There must be one Host header of proper form.")
    length, encoding = header(headers, b"content-length"), header(headers, b"transfer-encoding")
    _check_framing(version, length, encoding)


def _check_framing(version: str, length: bytes | None, encoding: bytes | None) -> None:
    if length is not None and not (length.isdigit() and len(length) < 19):
        raise Refusal("invalid_http", "Content-Length must be a number.")
    if encoding is None:
        return
    if length is not None or version != "1.1" or encoding.lower() != b"chunked":
        raise Refusal("invalid_http", "Transfer-Encoding must be chunked, on HTTP/1.1, alone.")


class Guard:
    """The outermost ASGI app: gives the request its id, refuses bad heads, and turns every Refusal
    into an answer. What nobody expected is logged by type and place, never with content."""

    def __init__(self, metered: Mapping[str, App], others: App, watch: Watch) -> None:
        """`metered`: by path, for POST. They don't go through a router, which would look at one
        route after the other, and be gone through again for each event."""
        self._metered = metered
        self._others = others
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"unexpected scope {scope['type']!r}")
        scope["request_id"] = new_request_id()
        scope["started"] = time.monotonic()
        scope["where"] = "other"
        try:
            check_head(scope)
            app = self._metered.get(scope["path"]) if scope["method"] == "POST" else None
            await (app or self._others)(scope, receive, send)
        except Refusal as refusal:
            self._watch.refused(scope, refusal)
            await respond(
                scope, send, refusal.status, refusal.body(), self._headers(scope, refusal)
            )
        except ClientLeft:
            self._watch.left(scope)
        except Exception as error:
            self._watch.failed(scope, error)
            unexpected = Refusal("internal_error")
            with contextlib.suppress(RuntimeError):  # the answer had begun: it ends torn
                await respond(scope, send, unexpected.status, unexpected.body())

    @staticmethod
    def _headers(scope: Scope, refusal: Refusal) -> Headers:
        """Close what can't be read on: a client that still waits to be told to send its body, one
        whose body is too late, or whose framing is in doubt. Of others the rest is read and thrown
        away, so that they see the answer, and may use the connection again."""
        waits = any(name == b"expect" for name, _ in scope["headers"])
        if waits or refusal.code in ("invalid_http", "headers_too_large", "request_timeout"):
            return [*refusal.headers, (b"connection", b"close")]
        return refusal.headers


class ClientLeft(Exception):
    """The client is gone; there is nobody to answer."""


# ── Authenticate ─────────────────────────────────────────────────────────────────────────────────

BAD_KEY = "Incorrect API key provided. Send it as 'Authorization: Bearer sk-redbtc-…'."


def authenticate(scope: Scope, store: Store) -> Key:
    """The key in force that the request shows. Every flaw of a key has the same answer. Reads the
    database each time: revoking and suspending hold from the next request on."""
    scheme, _, token = (header(scope["headers"], b"authorization") or b"").partition(b" ")
    try:
        shown = token.strip().decode("ascii") if scheme.lower() == b"bearer" else ""
    except UnicodeDecodeError:
        shown = ""
    try:
        key = ledger.key_in_force(store, shown)
    except LedgerUnavailable:
        raise Refusal("ledger_unavailable") from None
    if key is None:
        raise Refusal("invalid_api_key", BAD_KEY, headers=[(b"www-authenticate", b"Bearer")])
    if key.account_status != "active":
        raise Refusal("account_suspended")
    return key


# ── Read ─────────────────────────────────────────────────────────────────────────────────────────
# The whole body comes into memory, bounded in size and time; then the few facts that the gateway
# needs are read out of it and nothing else is built. The body itself is never re-encoded.

TICK = 0.05  # seconds: how exact timeouts are
MAX_PART_HEAD = 8192
MAX_FIELD = 4096
JSON_TYPE = re.compile(rb"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)
FORM_TYPE = re.compile(
    rb"multipart/form-data\s*;(?:.*;)?\s*boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70})).*",
    re.IGNORECASE | re.DOTALL,
)
FIELD_NAME = re.compile(rb";\s*name=(?:\"([^\"]*)\"|([^\s;]+))", re.IGNORECASE)
FILE_NAME = re.compile(rb";\s*filename\*?=", re.IGNORECASE)


class StreamOptions(Struct):
    """`stream_options` of a chat request."""

    include_usage: bool | msgspec.UnsetType | None = msgspec.UNSET


class Facts(Struct):
    """What the gateway must know of a request's body. Other members are skipped, not built."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    background: bool | None = None
    previous_response_id: msgspec.Raw = msgspec.Raw(b"null")
    conversation: msgspec.Raw = msgspec.Raw(b"null")
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    service_tier: str | None = None

    def most_output_tokens(self) -> int:
        """What the client allows an answer to have; 0 where it says nothing."""
        limits = (self.max_tokens, self.max_completion_tokens, self.max_output_tokens)
        return max(0, *(limit or 0 for limit in limits))

    @property
    def asks_for_usage(self) -> bool:
        """Whether a streamed chat will report it."""
        return self.stream_options == StreamOptions(include_usage=True)


FACTS = msgspec.json.Decoder(Facts)
MOST_PICTURE_TOKENS = 16_000  # more than any model makes of a picture


class Part(Struct):
    """A part of a message, or of a tool's output: `image_url` where it is a picture."""

    image_url: msgspec.Raw = msgspec.Raw()


class Item(Struct):
    """A message, or another item of the input; its text is not copied."""

    content: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()


class Input(Struct):
    """Where a request's pictures are."""

    messages: list[Item] = []
    input: msgspec.Raw = msgspec.Raw()

    def pictures(self) -> Iterator[msgspec.Raw]:
        for item in (*self.messages, *listed(self.input, ITEMS)):
            for parts in (item.content, item.output):
                yield from (part.image_url for part in listed(parts, PARTS) if part.image_url)


def listed(text: msgspec.Raw, decoder: msgspec.json.Decoder[list[Any]]) -> list[Any]:
    return decoder.decode(text) if bytes(memoryview(text)[:1]) == b"[" else []


ITEMS, PARTS = msgspec.json.Decoder(list[Item]), msgspec.json.Decoder(list[Part])
INPUT = msgspec.json.Decoder(Input)


def most_input_tokens(body: bytes, boundary: bytes | None) -> int:
    """What a body's content can come to: no token is shorter than a byte, but a picture's have
    nothing to do with its bytes. What is not in the body (files by their address, what a search
    finds) is not known here."""
    if boundary is not None:
        return sum(min(size, MOST_PICTURE_TOKENS) for size in _part_sizes(body, boundary))
    pictures: list[int] = []
    with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pictures = [len(picture) for picture in INPUT.decode(body).pictures()]
    return len(body) - sum(pictures) + MOST_PICTURE_TOKENS * len(pictures)


class Clock:
    """How long a request may go on: the timeouts of its steps and of the whole, and what is left
    once the client is gone, are one deadline that moves. Within `with clock.running(...)`, in one
    task, its passing raises TimeoutError."""

    def __init__(self, clocks: Clocks) -> None:
        self.client_left = False
        self.deadline = math.inf
        self._clocks = clocks
        self._last = math.inf
        self._grace = math.inf
        self._task: asyncio.Task[Any] | None = None
        self._passed = False

    def running(self, total: float, grace: float = math.inf) -> Clock:
        """At most `total` seconds, and `grace` from when the client leaves."""
        self._grace = grace
        self.deadline = self._last = self._clocks.now() + total
        return self

    def __enter__(self) -> None:
        self._task = asyncio.current_task(self._clocks.loop)
        self._clocks.add(self)
        if self.client_left:
            self.leave()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        self._clocks.discard(self)
        if self._passed and task:
            self._passed = False
            if task.uncancel() == 0 and error is asyncio.CancelledError:
                raise TimeoutError

    def allow(self, seconds: float) -> None:
        """The next step may take this long."""
        self.deadline = min(self._last, self._clocks.now() + seconds)

    def pause(self) -> None:
        """What comes now takes as long as it takes, until the next `allow`."""
        self.deadline = math.inf

    def leave(self) -> None:
        """The client is gone."""
        self.client_left = True
        self._last = min(self._last, self._clocks.now() + self._grace)
        if self.deadline < math.inf:
            self.deadline = min(self.deadline, self._last)
            if self._grace == 0:
                self.ring()

    def ring(self) -> None:
        """The deadline has passed."""
        self.deadline = math.inf
        if self._task:
            self._passed = True
            self._task.cancel()


class Clocks:
    """All clocks that run. They are looked at together every TICK seconds: a timer for each, moved
    with each byte, would cost more than all limits."""

    def __init__(self) -> None:
        self._running: set[Clock] = set()
        self._ticking = False
        self.loop = asyncio.get_running_loop()  # to ask for it costs a system call each time
        self.now = self.loop.time
        self.discard = self._running.discard

    def add(self, clock: Clock) -> None:
        """From now on it may ring."""
        self._running.add(clock)
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self.now()
        for clock in [clock for clock in self._running if clock.deadline <= now]:
            clock.ring()
        self._ticking = bool(self._running)
        if self._ticking:
            self.loop.call_later(TICK, self._tick)


async def read_body(scope: Scope, receive: Receive, clock: Clock, settings: Settings) -> bytes:
    """The request's body. Raises Refusal where it is too large or too slow, ClientLeft."""
    most = settings.server.max_body_bytes
    if int(header(scope["headers"], b"content-length") or 0) > most:
        raise Refusal("request_too_large", f"The request body is over {most} bytes.")
    chunks: list[bytes] = []
    size = 0
    try:
        with clock.running(settings.server.body_timeout_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunks.append(message["body"])
                size += len(message["body"])
                if size > most:
                    raise Refusal("request_too_large", f"The request body is over {most} bytes.")
                if not message["more_body"]:
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        raise Refusal("request_timeout") from None


def check_media_type(scope: Scope, forms: bool) -> bytes | None:
    """The boundary where the body is a form, None where it is JSON. Raises Refusal for the rest,
    before the body is read."""
    if (header(scope["headers"], b"content-encoding") or b"identity").lower() != b"identity":
        raise Refusal("unsupported_media_type", "Compressed request bodies are not taken here.")
    content_type = header(scope["headers"], b"content-type")
    if content_type is None or JSON_TYPE.fullmatch(content_type):
        return None
    form = FORM_TYPE.fullmatch(content_type) if forms else None
    if form is None:
        allowed = "application/json or multipart/form-data" if forms else "application/json"
        raise Refusal("unsupported_media_type", f"Content-Type must be {allowed}.")
    return form[1] or form[2]


def read_facts(body: bytes, boundary: bytes | None, model_needed: bool) -> Facts:
    """Raises Refusal for a body that can't be read or that names another's stored object."""
    facts = _facts_of_json(body) if boundary is None else _facts_of_form(body, boundary)
    if facts.model is None and model_needed:
        raise Refusal("invalid_request", "You must provide a model parameter.", param="model")
    if len(facts.model or "") > MAX_NAME:
        raise Refusal("invalid_request", "The name of the model is too long.", param="model")
    return facts


def _facts_of_json(body: bytes) -> Facts:
    try:
        return FACTS.decode(body)
    except msgspec.ValidationError as error:
        place = str(error).partition("`$.")[2].rstrip("`")
        message = str(error).partition(" - at")[0]
        raise Refusal("invalid_request", message, param=place or None) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Refusal("invalid_json") from None


def _facts_of_form(body: bytes, boundary: bytes) -> Facts:
    """`model` and `stream` wherever they stand in the form: openai-node sends files before them."""
    fields = dict(_form_fields(body, boundary))
    stream = fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
    model, number = fields.get(b"model"), fields.get(b"n", b"").strip()
    return Facts(
        model=model.decode("utf-8", "replace") if model else None,
        stream=stream,
        n=int(number) if re.fullmatch(rb"[0-9]{1,3}", number) else None,
    )


def _part_sizes(body: bytes, boundary: bytes) -> Iterator[int]:
    """The sizes of a form's parts, heads included."""
    delimiter = b"\r\n--" + boundary
    start = 0
    while (end := body.find(delimiter, start)) >= 0:
        yield end - start
        start = end + len(delimiter)
    yield len(body) - start


def _form_fields(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The form's short fields that are no files (RFC 7578, RFC 2046 §5.1.1), each with its value.
    Files are stepped over, never copied."""
    dashes = b"--" + boundary
    delimiter = b"\r\n" + dashes
    start = 0 if body.startswith(dashes) else body.find(delimiter) + 2
    while start != 1:  # find() gave -1
        head_start = start + len(dashes)
        end = body.find(delimiter, head_start)
        if end < 0:
            return
        head_end = body.find(b"\r\n\r\n", head_start, min(end, head_start + MAX_PART_HEAD))
        if head_end >= 0 and end - head_end - 4 <= MAX_FIELD:
            head = body[head_start:head_end]
            name = FIELD_NAME.search(head)
            if name and not FILE_NAME.search(head):
                yield name[1] or name[2], body[head_end + 4 : end]
        start = end + 2


def refuse_foreign_objects(facts: Facts) -> None:
    """All accounts share the upstream's key, and whose a stored object is isn't known here: refuse
    what would reach another's."""
    for name in ("previous_response_id", "conversation"):
        if bytes(getattr(facts, name)).strip() != b"null":
            message = f"'{name}' is not supported here: send the whole input instead."
            raise Refusal("invalid_request", message, param=name)
    if facts.background:
        message = "'background' is not supported here: stream the answer or wait for it."
        raise Refusal("invalid_request", message, param="background")


STREAM_OPTIONS = re.compile(rb'"stream_options"\s*:\s*\{(\s*\})?')
MOST_CANDIDATES = 16


def add_include_usage(body: bytes, facts: Facts) -> bytes:
    """The body of a streamed chat with `stream_options.include_usage` put in where it was left out,
    and every other byte as it was. A client that says null or false has not left it out."""
    options = facts.stream_options
    if options is msgspec.UNSET:
        start = body.index(b"{") + 1
        return body[:start] + b'"stream_options":{"include_usage":true},' + body[start:]
    if not isinstance(options, StreamOptions) or options.include_usage is not msgspec.UNSET:
        return body
    for match, _ in zip(STREAM_OPTIONS.finditer(body), range(MOST_CANDIDATES), strict=False):
        start = body.index(b"{", match.start()) + 1
        added = b'"include_usage":true' + (b"" if match[1] else b",")
        changed = body[:start] + added + body[start:]
        with contextlib.suppress(msgspec.DecodeError):
            if FACTS.decode(changed).stream_options == StreamOptions(include_usage=True):
                return changed  # the right place, not one inside a text or another object
    raise Refusal("invalid_request", "'stream_options' can't be found.", param="stream_options")


# ── Admit ────────────────────────────────────────────────────────────────────────────────────────
# A request needs a place in its key, its account and the gateway as a whole, and room in their
# rates. Rates are charged first (refusing costs nobody a wait), then places are waited for, in
# turn. Always in the same order, so that nobody waits for someone who waits for him; whoever waits
# for the gateway holds a place of his account, so that no account can fill the queue. All on the
# monotonic clock.


class Places:
    """Room for `limit` at once (0: no limit), given in the order of asking."""

    def __init__(self) -> None:
        self.limit = 0
        self.taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    def take_now(self, limit: int) -> bool:
        """Take a place if one is free and nobody stands in line. `limit` holds from now on."""
        self.limit = limit
        if self._queue:
            self._let_in()
        if self._queue or self._full():
            return False
        self.taken += 1
        return True

    async def take_in_turn(self) -> None:
        """Wait for a place. Whoever stops waiting leaves no trace."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it came in the same instant
            with contextlib.suppress(ValueError):
                self._queue.remove(turn)
            raise

    def give_back(self) -> None:
        """Free one place for the next in line."""
        self.taken -= 1
        self._let_in()

    def _full(self) -> bool:
        return 0 < self.limit <= self.taken

    def _let_in(self) -> None:
        while self._queue and not self._full():
            turn = self._queue.popleft()
            if not turn.done():  # else given up a moment ago
                self.taken += 1
                turn.set_result(None)


class Bucket:
    """A token bucket that holds one minute's `limit` (0: no limit) and fills evenly. What is
    charged beyond it (an answer longer than estimated) is owed by those who come after."""

    def __init__(self) -> None:
        self.limit = 0
        self._level = 0.0
        self._at = 0.0

    def fill(self, limit: int, now: float) -> None:
        """Bring it up to `now` (monotonic seconds)."""
        if limit != self.limit:
            self._level = limit if not self.limit else min(self._level, limit)
            self.limit = limit
        self._level = min(limit, self._level + (now - self._at) * limit / 60)
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """How long until it has `amount`; 0 if it has. More than it can hold counts as all of
        it."""
        missing = min(amount, self.limit) - self._level
        return max(0.0, missing * 60 / self.limit) if self.limit else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount` out, or with a negative one put back."""
        self._level = min(self.limit, self._level - amount)

    @property
    def remaining(self) -> int:
        return max(0, int(self._level))

    @property
    def reset_seconds(self) -> float:
        return (self.limit - self._level) * 60 / self.limit if self.limit else 0.0


class Limited:
    """A key, an account, or the gateway: what is in use of its three limits."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.places = Places()
        self.requests = Bucket()
        self.tokens = Bucket()


class Bound(NamedTuple):
    """What one request is held to by one of the three: limits of 0 are none."""

    limited: Limited
    concurrency: int
    requests_per_minute: int
    tokens_per_minute: int

    def report(self, now: float) -> dict[str, Any]:
        """As JSON shows it."""
        taken, most = self.limited.places.taken, self.concurrency
        found: dict[str, Any] = {"concurrency": {"limit": most or None, "in_flight": taken}}
        for name, bucket in (("requests", self.limited.requests), ("tokens", self.limited.tokens)):
            limit: int = getattr(self, f"{name}_per_minute")
            bucket.fill(limit, now)
            found[f"{name}_per_minute"] = {
                "limit": limit or None,
                "remaining": bucket.remaining if limit else None,
                "reset_seconds": round(bucket.reset_seconds, 3),
            }
        return found


def go_duration(seconds: float) -> str:
    """12ms, 1.5s, 6m0s, as OpenAI writes resets (Go's time.Duration)."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def rate_limit_headers(kind: str, limit: int, remaining: int, reset: float) -> Headers:
    """x-ratelimit-limit-…, -remaining-… and -reset-…"""
    of = kind.encode()
    return [
        (b"x-ratelimit-limit-" + of, b"%d" % limit),
        (b"x-ratelimit-remaining-" + of, b"%d" % remaining),
        (b"x-ratelimit-reset-" + of, go_duration(reset).encode()),
    ]


class Admission:
    """One request's charges on the rates of its key, its account and the gateway, and its places,
    which `with` gives back."""

    def __init__(self, bounds: tuple[Bound, ...], estimate: int) -> None:
        """Charge all rates, or raise Refusal and charge none. `estimate` is in tokens."""
        self.places: list[Places] = []
        self._charges: list[tuple[str, Bucket, float]] = []
        now = time.monotonic()
        for bound in bounds:
            if bound.requests_per_minute:
                self._consider(
                    "requests", bound.limited.requests, bound.requests_per_minute, 1, now
                )
            if bound.tokens_per_minute:
                self._consider(
                    "tokens", bound.limited.tokens, bound.tokens_per_minute, estimate, now
                )
        for _, bucket, amount in self._charges:
            bucket.charge(amount)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_: object) -> None:
        for places in reversed(self.places):
            places.give_back()

    def _consider(self, kind: str, bucket: Bucket, limit: int, amount: float, now: float) -> None:
        bucket.fill(limit, now)
        wait = bucket.seconds_until(amount)
        if wait > 0:
            headers = rate_limit_headers(kind, limit, bucket.remaining, wait)
            message = f"Rate limit reached: {limit} {kind} per minute."
            raise Refusal("rate_limit_exceeded", message, retry_after=wait, headers=headers)
        self._charges.append((kind, bucket, min(amount, limit)))

    def put_back(self) -> None:
        """The request was not served: it costs nothing."""
        for _, bucket, amount in self._charges:
            bucket.charge(-amount)

    def correct(self, tokens: int) -> None:
        """Put the estimate right: this many were used."""
        for kind, bucket, amount in self._charges:
            if kind == "tokens":
                bucket.charge(tokens - amount)

    def headers(self) -> Headers:
        """OpenAI's x-ratelimit-* headers; of several limits the one with the least left."""
        tightest: dict[str, Bucket] = {}
        for kind, bucket, _ in self._charges:
            if kind not in tightest or bucket.remaining < tightest[kind].remaining:
                tightest[kind] = bucket
        return [
            line
            for kind, bucket in tightest.items()
            for line in rate_limit_headers(
                kind, bucket.limit, bucket.remaining, bucket.reset_seconds
            )
        ]


class Limits:
    """All that is in flight, by key, by account and over all."""

    def __init__(self) -> None:
        self._keys: dict[str, Limited] = {}
        self._accounts: dict[str, Limited] = {}
        self._all = Limited("this gateway")
        self.queued = 0

    async def admit(
        self, key: Key, estimate: int, limits: LimitSettings, clock: Clock
    ) -> Admission:
        """Places for as long as `with` holds the admission. Raises Refusal where a rate is used up,
        or no place comes free within `limits.queue_seconds`; ClientLeft."""
        bounds = self._bounds(key, limits)
        admission = Admission(bounds, estimate)
        patience = time.monotonic() + limits.queue_seconds
        try:
            for bound in bounds:
                if not bound.limited.places.take_now(bound.concurrency):
                    await self._wait(bound, patience, clock)
                admission.places.append(bound.limited.places)
        except BaseException:
            admission.put_back()
            admission.__exit__()
            raise
        return admission

    def _bounds(self, key: Key, limits: LimitSettings) -> tuple[Bound, Bound, Bound]:
        of_key = self._keys.get(key.id)
        if of_key is None:
            of_key = self._keys[key.id] = Limited("this key")
        of_account = self._accounts.get(key.account_id)
        if of_account is None:
            of_account = self._accounts[key.account_id] = Limited("this account")
        usual = limits.account
        return (
            Bound(
                of_key,
                key.concurrency or 0,
                key.requests_per_minute or 0,
                key.tokens_per_minute or 0,
            ),
            Bound(
                of_account,
                _own_or(key.account_concurrency, usual.concurrency),
                _own_or(key.account_requests_per_minute, usual.requests_per_minute),
                _own_or(key.account_tokens_per_minute, usual.tokens_per_minute),
            ),
            Bound(
                self._all, limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute
            ),
        )

    def report(self, key: Key, limits: LimitSettings) -> dict[str, Any]:
        """The limits in force for a key and its account, and what is left of them; a limit of null
        is none."""
        now = time.monotonic()
        of_key, of_account, _ = self._bounds(key, limits)
        return {"key": of_key.report(now), "account": of_account.report(now)}

    async def _wait(self, bound: Bound, patience: float, clock: Clock) -> None:
        self.queued += 1
        try:
            with clock.running(patience - time.monotonic(), grace=0):
                await bound.limited.places.take_in_turn()
        except TimeoutError:
            if clock.client_left:
                raise ClientLeft from None
            headers = rate_limit_headers("concurrency", bound.concurrency, 0, 1)
            what = f"{bound.limited.what} may have {bound.concurrency} requests in flight"
            message = f"Too many requests at once: {what}."
            raise Refusal("concurrency_limit_exceeded", message, headers=headers) from None
        finally:
            self.queued -= 1


def _own_or(own: int | None, usual: int) -> int:
    return usual if own is None else own


# ── Watch ────────────────────────────────────────────────────────────────────────────────────────
# What an operator sees of the gateway at work: one JSON line a request on standard error, and
# metrics. Neither ever holds a byte of a prompt, a completion or a key.

LEVEL_NAMES = {level: logging.getLevelName(level).lower() for level in (10, 20, 30, 40)}
LOG_LINES_A_SECOND = 2000
LOG_BACKLOG = 10_000
LOG_SECONDS = 0.02  # what comes within is one write
SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Log:
    """JSON lines on standard error, written by a thread of their own: a reader that stops reading
    must not stop the gateway. Beyond a rate, and where the reader lags, lines are dropped and
    counted."""

    def __init__(self) -> None:
        self.level = logging.INFO
        self._lines: deque[bytes] = deque()
        self._pending = threading.Event()
        self._written = threading.Event()
        self._written.set()
        self._second, self._in_second, self._dropped = 0, 0, 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        """One line, at one of logging's levels."""
        now = now_ms()
        if now // 1000 != self._second:
            self._second, self._in_second = now // 1000, 0
        self._in_second += 1
        if self._in_second > LOG_LINES_A_SECOND or len(self._lines) >= LOG_BACKLOG:
            self._dropped += 1
            return
        name = LEVEL_NAMES[level]
        line = {"time": iso_time(now), "level": name, "event": event} | fields
        if self._dropped:
            line["lines_dropped_before"], self._dropped = self._dropped, 0
        self._lines.append(orjson.dumps(line, None, orjson.OPT_APPEND_NEWLINE))
        if not self._pending.is_set():
            self._written.clear()
            self._pending.set()

    def _write(self) -> None:
        while self._pending.wait():
            time.sleep(LOG_SECONDS)
            self._pending.clear()
            while self._lines:
                lines = [self._lines.popleft() for _ in range(min(100, len(self._lines)))]
                with contextlib.suppress(OSError):
                    os.write(2, b"".join(lines))
            if not self._pending.is_set():
                self._written.set()

    def flush(self) -> None:
        """Wait up to a second for what is not yet written."""
        self._written.wait(1)


LOG = Log()


def say(level: int, event: str, **fields: Any) -> None:
    """One line of the log, where its level is wanted."""
    if level >= LOG.level:
        LOG.write(level, event, fields)


class Histogram:
    """How often a duration was within each of SECONDS."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def add_to(self, family: HistogramMetricFamily, route: str) -> None:
        """As Prometheus has it: each bucket counts what is in those below it, too."""
        limits = [*map(str, map(float, SECONDS)), "+Inf"]
        counts = itertools.accumulate(self._counts)
        family.add_metric([route], list(zip(limits, counts, strict=True)), self._sum)


class Watch:
    """Counts and logs. The metrics' names are something that users rely on. Counting is a matter of
    plain numbers; prometheus-client is asked only when somebody reads them."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[tuple[str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first_byte: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._duration: defaultdict[str, Histogram] = defaultdict(Histogram)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each reading."""
        for name, what, labels, counts in (
            (
                "redbtc_requests",
                "Requests by route, status and outcome (refused: by the gateway itself)",
                ["route", "status", "outcome"],
                self._requests,
            ),
            ("redbtc_refusals", "Requests refused by the gateway", ["code"], self._refusals),
            ("redbtc_tokens", "Tokens, parts included", ["kind", "source"], self._tokens),
        ):
            counter = CounterMetricFamily(name, what, labels=labels)
            for values, count in cast(Counter[Any], counts).items():
                counter.add_metric(values, count)
            yield counter
        for name, what, histograms in (
            (
                "redbtc_first_byte_seconds",
                "From the request's head to the first byte of the upstream's body",
                self._first_byte,
            ),
            (
                "redbtc_request_seconds",
                "From the request's head to the answer's end",
                self._duration,
            ),
        ):
            family = HistogramMetricFamily(name, what, labels=["route"])
            for route, histogram in histograms.items():
                histogram.add_to(family, route)
            yield family

    def settled(self, scope: Scope, row: Row) -> None:
        """A request that left for an upstream is over."""
        scope["settled"] = True
        self._requests[row.endpoint, str(row.status or 0), row.outcome] += 1
        self._duration[row.endpoint].observe((row.duration_ms or 0) / 1000)
        if row.first_byte_ms is not None:
            self._first_byte[row.endpoint].observe(row.first_byte_ms / 1000)
        if row.usage_source != "none":
            for kind, tokens in msgspec.structs.asdict(row.usage).items():
                if tokens:
                    self._tokens[kind.removesuffix("_tokens"), row.usage_source] += tokens
        self._line(
            logging.INFO,
            scope,
            row.status,
            {
                "account_id": row.account_id,
                "key_id": row.key_id,
                "upstream": row.upstream,
                "outcome": row.outcome,
                "first_byte_ms": row.first_byte_ms,
                "duration_ms": row.duration_ms,
                "usage_source": row.usage_source,
                "input_tokens": row.usage.input_tokens,
                "output_tokens": row.usage.output_tokens,
            },
        )

    def answered(self, scope: Scope, status: int) -> None:
        """A request that is not metered was answered."""
        self._requests[scope["where"], str(status), "completed"] += 1
        self._line(logging.INFO, scope, status, {"outcome": "completed"})

    def refused(self, scope: Scope, refusal: Refusal) -> None:
        """The gateway itself said no."""
        self._refusals[(refusal.code,)] += 1
        if "settled" in scope:  # counted and logged with its row
            return
        self._requests[scope["where"], str(refusal.status), "refused"] += 1
        fields = {"outcome": "refused", "code": refusal.code}
        self._line(logging.INFO, scope, refusal.status, fields)

    def left(self, scope: Scope) -> None:
        """The client went before its request had left for an upstream."""
        self._requests[scope["where"], "0", "client_disconnected"] += 1
        self._line(logging.INFO, scope, None, {"outcome": "client_disconnected"})

    def failed(self, scope: Scope, error: Exception) -> None:
        """Something that should not happen. Its message could hold content, so it is not logged."""
        self._requests[scope["where"], "500", "refused"] += 1
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        self._line(logging.ERROR, scope, 500, {"error": type(error).__name__, "places": places})

    @staticmethod
    def _line(level: int, scope: Scope, status: int | None, fields: dict[str, Any]) -> None:
        if level >= LOG.level:
            request = {"request_id": scope["request_id"], "route": scope["where"], "status": status}
            LOG.write(level, "request", request | fields)


# ── Choose, open ─────────────────────────────────────────────────────────────────────────────────
# Where a request may go is decided by the settings alone: nothing in a body or header names a
# place. No redirects are followed, no cookies kept, no proxy taken from the environment.

ALLOWED_HEADERS = frozenset(
    b"accept content-type content-encoding user-agent idempotency-key openai-beta originator "
    b"version session-id session_id thread-id x-client-request-id".split()
)
ALLOWED_PREFIXES = (b"x-codex-", b"x-stainless-", b"x-openai-")
# RFC 9110 §7.6.1, and what belongs to the upstream's account or could steer a proxy in front of us.
DROPPED_HEADERS = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te "
    b"trailer transfer-encoding upgrade set-cookie server alt-svc openai-organization "
    b"openai-project".split()
)
DROPPED_PREFIXES = (b"x-accel-", b"x-ratelimit-")
KEEPALIVE_SECONDS = 15
MOST_FETCHED = 4 << 20  # bytes of a list of models


class Body(httpx2.ByteStream):
    """A request's body that knows whether it has begun to leave: then the head has left before."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._given = False
        self.left = False

    def __aiter__(self) -> Body:
        self._given = False
        return self

    async def __anext__(self) -> bytes:
        if self._given:
            raise StopAsyncIteration
        self._given = self.left = True
        return self._body


class Upstream:
    """One place that requests are forwarded to, with its connections."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self.settings = settings
        self.name = settings.name
        key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        self.usable = bool(key) or not settings.api_key_env
        self.in_flight = 0
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
        self, method: str, path: str, query: bytes, headers: Headers, body: Body
    ) -> Answer:
        """Send a request; the answer's head. Raises httpx2.HTTPError."""
        target = self._path + path.encode() + (b"?" + query if query else b"")
        headers = [*headers, *self._own]
        return await self._send(Request(method, self._base, target, headers, body, self._timeouts))

    async def _send_by_httpx(self, request: Request) -> Answer:
        assert isinstance(self._transport, httpx2.AsyncHTTPTransport)
        response = await self._transport.handle_async_request(
            httpx2.Request(
                request.method,
                request.url.copy_with(raw_path=request.target),
                headers=request.headers,
                stream=request.body,
                extensions={"timeout": request.timeouts},
            )
        )
        body = cast(httpx2.AsyncByteStream, response.stream)
        return Answer(response.status_code, response.headers.raw, body)

    async def fetch(self, path: str) -> tuple[int, bytes]:
        """Status and body of a small GET, bounded. Raises httpx2.HTTPError, TimeoutError."""
        async with asyncio.timeout(min(30, self.settings.first_byte_timeout_seconds)):
            accept = [(b"accept", b"application/json")]
            answer = await self.open("GET", path, b"", accept, Body(b""))
            try:
                body = bytearray()
                async for chunk in answer.body:
                    body += chunk
                    if len(body) > MOST_FETCHED:
                        raise httpx2.RemoteProtocolError("the answer is too long")
                return answer.status, bytes(body)
            finally:
                await answer.body.aclose()

    async def close(self) -> None:
        """Close its connections, once those in flight are done."""
        while self.in_flight:
            await asyncio.sleep(1)
        await self._transport.aclose()


def choose(upstreams: Iterable[Upstream], model: str) -> list[Upstream]:
    """The upstreams that may take the request, the one to try first in front: by priority, among
    equals by chance and weight. Raises Refusal."""
    serving = [upstream for upstream in upstreams if upstream.serves(model)]
    if not serving:
        raise Refusal("model_not_found", f"The model '{model}' does not exist here.", param="model")
    usable = [upstream for upstream in serving if upstream.usable]
    if not usable:
        raise Refusal("no_upstream", retry_after=5)
    if len(usable) == 1:
        return usable

    def turn(upstream: Upstream) -> tuple[int, float]:  # Efraimidis and Spirakis, 2006
        chance = -math.log(1 - random.random()) / upstream.settings.weight
        return upstream.settings.priority, chance

    return sorted(usable, key=turn)


def headers_for_upstream(scope: Scope) -> Headers:
    """What of the client's headers goes on: an allow-list."""
    return [
        (name, value)
        for name, value in scope["headers"]
        if name in ALLOWED_HEADERS or name.startswith(ALLOWED_PREFIXES)
    ]


def headers_for_client(upstreams: Headers) -> Headers:
    """What of the upstream's headers goes on: all but a deny-list and what Connection names."""
    headers = [
        (lower, value)
        for name, value in upstreams
        if (lower := name.lower()) == b"connection"
        or (lower not in DROPPED_HEADERS and not lower.startswith(DROPPED_PREFIXES))
    ]
    connection = [value for name, value in headers if name == b"connection"]
    if connection:
        named = {token.strip().lower() for token in b",".join(connection).split(b",")}
        named.add(b"connection")
        headers = [line for line in headers if line[0] not in named]
    return headers


# ── Relay, settle ────────────────────────────────────────────────────────────────────────────────

NO_RETRY = (b"x-should-retry", b"false")
CLOSING_SECONDS = 0.1  # until the upstream has noticed a closed connection: its place is taken
BYTES_A_TOKEN = 4  # of English text, OpenAI's rule of thumb; only for estimates


class Exchange:
    """One metered request from its admission to its last byte."""

    def __init__(
        self, gateway: Gateway, scope: Scope, send: Send, route: MeteredRoute, clock: Clock
    ) -> None:
        self._gateway = gateway
        self._settings = gateway.settings
        self._scope = scope
        self._send = send
        self._route = route
        self._clock = clock
        self._meter: Meter = JSONMeter(route.images)
        self._waits_for_client = False
        self._started = False  # the client has the answer's head
        self._settled = False
        self._unmetered = False  # a stream whose usage is not reported

    async def run(
        self,
        key: Key,
        facts: Facts,
        body: bytes,
        boundary: bytes | None,
        upstreams: list[Upstream],
    ) -> None:
        """Raises Refusal where the client has got nothing yet, ClientLeft."""
        changed = body
        if self._route.chat and facts.stream and self._settings.metering.include_usage == "add":
            changed = add_include_usage(body, facts)
        self._takes_out_usage = changed is not body
        streams = self._route.chat and facts.stream
        self._unmetered = bool(streams and changed is body and not facts.asks_for_usage)
        self._estimates = self._unmetered and self._settings.metering.include_usage == "add"
        self._input_estimate = math.ceil(len(body) / BYTES_A_TOKEN)
        self._row = Row(
            request_id=self._scope["request_id"],
            account_id=key.account_id,
            key_id=key.id,
            endpoint=self._route.path,
            requested_model=facts.model or "",
            upstream=upstreams[0].name,
            started_at=now_ms() - self._elapsed_ms(),
        )
        estimate = self._input_estimate + facts.most_output_tokens()
        limits = self._settings.limits
        with await self._gateway.limits.admit(key, estimate, limits, self._clock) as admission:
            self._admission = admission
            with await self._hold(key, facts, body, boundary) as self._money:
                await self._begin()
                await self._forward(changed, upstreams)

    async def _hold(self, key: Key, facts: Facts, body: bytes, boundary: bytes | None) -> Hold:
        """Hold what the request can cost, at the prices of this instant."""

        def most(tariff: Tariff) -> int:
            return self._most_cost(tariff, facts, body, boundary)

        try:
            return await self._gateway.books.hold(key, facts.model or "", most)
        except Spent as error:
            self._admission.put_back()
            raise Refusal("insufficient_quota", str(error), headers=[NO_RETRY]) from None
        except LedgerUnavailable:
            self._admission.put_back()
            raise Refusal("ledger_unavailable") from None

    def _most_cost(self, tariff: Tariff, facts: Facts, body: bytes, boundary: bytes | None) -> int:
        """Nanos. Asked for only where spending is limited: there usage has to be reported."""
        if self._unmetered:
            self._admission.put_back()
            message = "This account's spending is limited, so 'include_usage' can't be left out."
            raise Refusal("invalid_request", message, param="stream_options")
        limits = (facts.most_output_tokens(), tariff.max_output_tokens)
        usual = self._settings.billing.hold_output_tokens
        output = min((limit for limit in limits if limit), default=usual) * max(1, facts.n or 1)
        into = most_input_tokens(body, boundary)
        return tariff.most(into, output, facts.service_tier, self._route.images)

    async def _begin(self) -> None:
        try:
            await ledger.begin(self._gateway.store, self._row)
        except LedgerUnavailable:
            self._admission.put_back()
            raise Refusal("ledger_unavailable") from None
        if self._clock.client_left:
            await self._forget()

    async def _forget(self) -> None:
        """The client left before anything was sent: nothing was used. Raises ClientLeft."""
        self._admission.put_back()
        await ledger.forget(self._gateway.store, self._row)
        raise ClientLeft

    async def _forward(self, body: bytes, upstreams: list[Upstream]) -> None:
        metering = self._settings.metering
        grace = metering.drain_seconds if metering.on_disconnect == "drain" else 0.0
        failure = ""
        for upstream in upstreams:
            self._row.upstream = upstream.name
            upstream.in_flight += 1
            try:
                with self._clock.running(upstream.settings.total_timeout_seconds, grace):
                    await self._exchange(upstream, body)
                    return
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                failure = "upstream_unreachable"  # it can't have acted on it: try the next
            except (TimeoutError, httpx2.TimeoutException):
                failure = "upstream_timeout"
                break
            except (httpx2.RemoteProtocolError, httpx2.LocalProtocolError):
                failure = "upstream_protocol_error"
                break
            except httpx2.HTTPError:
                failure = "upstream_unreachable"
                break
            finally:
                upstream.in_flight -= 1
        await self._fail(failure)

    async def _exchange(self, upstream: Upstream, body: bytes) -> None:
        self._clock.allow(upstream.settings.first_byte_timeout_seconds)
        path, query = self._route.path.removeprefix("/v1"), self._scope["query_string"]
        headers = headers_for_upstream(self._scope)
        headers.append((b"content-length", b"%d" % len(body)))
        self._body = Body(body)
        answer = await upstream.open("POST", path, query, headers, self._body)
        try:
            if not 200 <= answer.status <= 599:
                raise httpx2.RemoteProtocolError("not a final status")
            head = self._head_of(answer)
            await self._relay(head, answer.body, upstream.settings.idle_timeout_seconds)
        finally:
            await answer.body.aclose()

    def _head_of(self, answer: Answer) -> Message:
        """The answer's head for the client. Chooses the meter."""
        headers = headers_for_client(answer.headers)
        content_type = header(headers, b"content-type") or b""
        encoding = header(headers, b"content-encoding") or b"identity"
        if content_type.lower().startswith(b"text/event-stream") and encoding == b"identity":
            self._meter = StreamMeter(
                images=self._route.images,
                chat=self._route.chat,
                take_out_usage=self._takes_out_usage,
            )
            if self._takes_out_usage:
                headers = [line for line in headers if line[0] != b"content-length"]
        request_id = self._row.request_id.encode()
        if header(headers, b"x-request-id") is None:
            headers.append((b"x-request-id", request_id))
        headers.append((b"x-redbtc-request-id", request_id))
        headers += self._admission.headers()
        self._row.status = answer.status
        return {"type": "http.response.start", "status": answer.status, "headers": headers}

    async def _relay(
        self, head: Message, body: httpx2.AsyncByteStream, idle_seconds: float
    ) -> None:
        clock, meter = self._clock, self._meter
        clock.allow(idle_seconds)
        whole, kept = False, b""
        if isinstance(body, ResponseBody):
            if isinstance(meter, StreamMeter):
                self._pass_on(meter, body, idle_seconds)
            else:  # if it is all here already, it goes out at once when it is written down
                whole = body.whole
        if not whole:
            await self._send_head(head)
        async for chunk in body:
            if self._row.first_byte_ms is None:
                self._row.first_byte_ms = self._elapsed_ms()
            passed = meter.feed(chunk)
            if whole:
                kept += passed
            elif passed:
                self._waits_for_client = True  # while it reads slowly, and with us the upstream
                await self._send({"type": "http.response.body", "body": passed, "more_body": True})
                self._waits_for_client = False
            if meter.ended and not self._settled:
                await self._settle(self._outcome())
                await self._give_rest(meter.rest(), more=True)
            clock.allow(idle_seconds)
        clock.pause()
        meter.finish()
        if not self._settled:
            await self._settle(self._outcome())
        if whole:
            await self._send_head(head)
        await self._give_rest(kept + meter.rest(), more=False)

    def _pass_on(self, meter: StreamMeter, body: ResponseBody, idle_seconds: float) -> None:
        """Send events in which nothing can matter on as they come, past this request's task."""
        clock, scope, send_now = self._clock, self._scope, self._scope["send_now"]

        def pass_on(chunk: bytes) -> bool:
            clock.allow(idle_seconds)
            passed: bool = meter.is_dull(chunk) and send_now(scope, chunk)
            if passed:
                meter.count_text(chunk)
            return passed

        body.pass_on(pass_on)

    async def _send_head(self, head: Message) -> None:
        self._started = True
        await self._send(head)

    async def _give_rest(self, rest: bytes, more: bool) -> None:
        """What waited for the row."""
        await self._send({"type": "http.response.body", "body": rest, "more_body": more})

    def _outcome(self) -> ledger.Outcome:
        """Of an answer that has come to its end, one way or the other."""
        if self._meter.report.failed or (self._row.status or 0) >= 400:
            return "upstream_error"
        if self._clock.client_left:
            return "client_disconnected"
        return "completed" if self._meter.ended else "upstream_failed"

    async def _fail(self, failure: str) -> None:
        """The exchange broke: write down how. A client that has nothing yet is told; for one in the
        middle of the answer the connection ends without the answer's end."""
        if self._body.left:
            await asyncio.sleep(CLOSING_SECONDS)
        if self._settled:
            return
        if self._clock.client_left and not self._body.left:
            await self._forget()
        if self._clock.client_left or self._waits_for_client:
            await self._settle("client_disconnected")
            return
        if self._started:
            await self._settle("upstream_failed")
            return
        self._row.status = Refusal(failure).status
        await self._settle("upstream_failed")
        raise Refusal(failure)  # kept in no variable: that would keep all of this in memory

    async def _settle(self, outcome: ledger.Outcome) -> None:
        """Commit the row as the request ended."""
        self._clock.pause()
        row, report = self._row, self._meter.report
        row.outcome = outcome
        row.duration_ms = self._elapsed_ms()
        row.model, row.service_tier = report.model, report.service_tier
        row.response_id = report.response_id
        if report.usage:
            row.usage, row.usage_source = report.usage, "upstream"
        elif outcome == "client_disconnected" or (outcome == "completed" and self._estimates):
            output = math.ceil(report.text_bytes / BYTES_A_TOKEN)
            row.usage = Usage(input_tokens=self._input_estimate, output_tokens=output)
            row.usage_source = "estimated"
        if row.usage_source != "none" or outcome == "upstream_error":
            self._admission.correct((row.usage.input_tokens or 0) + (row.usage.output_tokens or 0))
        self._bill()
        self._settled = True
        await ledger.settle(self._gateway.store, row)
        self._gateway.watch.settled(self._scope, row)

    def _bill(self) -> None:
        """What it cost, by the prices of its admission and the tier that the response reports; not
        known where no usage is."""
        row = self._row
        if row.usage_source != "none":
            row.cost = 0
            if tariff := self._money.tariff:
                price = tariff.price(row.service_tier, row.usage.input_tokens or 0)
                row.price_id, row.cost = price.id, price.cost(row.usage, self._route.images)
        row.month = self._money.settle(row.cost or 0)

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - float(self._scope["started"])) * 1000)


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────

METERED = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/images/generations",
    "/v1/images/edits",
)
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.:-]*(?:/[A-Za-z0-9][\w.:-]*)*", re.ASCII)


class MeteredRoute:
    """The ASGI app of a route whose requests are metered."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self.path = path
        self.chat = path == "/v1/chat/completions"
        self.images = path.startswith("/v1/images/")
        self._forms = path == "/v1/images/edits"
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        scope["where"] = self.path
        key = gateway.enter(scope)
        boundary = check_media_type(scope, self._forms)
        clock = Clock(gateway.clocks)
        body = await read_body(scope, receive, clock, gateway.settings)
        facts = read_facts(body, boundary, model_needed=not self.images)
        refuse_foreign_objects(facts)
        if not gateway.books.served(facts.model or ""):
            raise Refusal("model_not_found", param="model")
        upstreams = choose(gateway.upstreams, facts.model or "")
        gateway.in_flight += 1
        scope["leaving"].add(clock.leave)
        try:
            exchange = Exchange(gateway, scope, send, self, clock)
            await exchange.run(key, facts, body, boundary, upstreams)
        finally:
            scope["leaving"].discard(clock.leave)
            gateway.in_flight -= 1


class Gateway:
    """The running gateway: what its routes share, and the routes themselves."""

    def __init__(self, books: Books, settings: Settings) -> None:
        self.store = books.store
        self.books = books
        self.limits = Limits()
        self.clocks = Clocks()
        self.watch = Watch()
        self.watch.registry.register(self)
        self.settings = settings
        self.upstreams = [Upstream(upstream) for upstream in settings.upstreams]
        self.draining = False
        self.in_flight = 0
        self._me = admin.me(books, lambda key: self.limits.report(key, self.settings.limits))
        self._asking: defaultdict[str, asyncio.Semaphore] = defaultdict(asyncio.Semaphore)
        self._started = time.monotonic()
        self._closing: set[asyncio.Task[None]] = set()

    def apply(self, settings: Settings) -> None:
        """New settings, from the next request on. Upstreams that are unchanged keep their
        connections; the others' end with their requests."""
        kept = {upstream.settings: upstream for upstream in self.upstreams}
        before = self.upstreams
        self.settings = settings
        self.books.settings = settings.billing
        self.books.noticed.set()  # there may be a webhook now
        self.upstreams = [
            kept.get(upstream) or Upstream(upstream) for upstream in settings.upstreams
        ]
        for upstream in before:
            if upstream not in self.upstreams:
                task = asyncio.create_task(upstream.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def enter(self, scope: Scope) -> Key:
        """The key of a request that may come in. Raises Refusal."""
        if self.draining:
            raise Refusal("draining", headers=[(b"connection", b"close")])
        return authenticate(scope, self.store)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each reading."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("redbtc_in_flight", "Metered requests being served", self.in_flight)
        yield gauge("redbtc_queued", "Requests that wait for a place", self.limits.queued)
        yield counter("redbtc_ledger_commits", "Commits of the ledger", self.store.commits)
        yield gauge("redbtc_ledger_healthy", "1 while the ledger can commit", self.store.healthy)

    def routes(self) -> list[Route]:
        """All that is served beside METERED. What is not here is 404 before its body is read."""
        return [
            ExactRoute("/v1/responses", AsApp(upgrade_required), methods=["GET"]),
            ExactRoute("/v1/models", AsApp(self.models), methods=["GET"]),
            ExactRoute("/v1/models/{model:path}", AsApp(self.model), methods=["GET"]),
            ExactRoute("/healthz", AsApp(self.healthz), methods=["GET"]),
            ExactRoute("/readyz", AsApp(self.readyz), methods=["GET"]),
            ExactRoute("/metrics", AsApp(self.metrics), methods=["GET"]),
            ExactRoute("/status", AsApp(self.status), methods=["GET"]),
            ExactRoute("/admin/v1/me{rest:path}", AsApp(self.me), methods=["GET"]),
        ]

    async def models(self, scope: Scope, _: Receive, send: Send) -> None:
        """The upstreams' lists joined, in their order, each less what its patterns exclude and what
        has no price where that is refused."""
        scope["where"] = "/v1/models"
        key = self.enter(scope)
        with await self.limits.admit(key, 0, self.settings.limits, Clock(self.clocks)):
            usable = [upstream for upstream in self.upstreams if upstream.usable]
            if not usable:
                raise Refusal("no_upstream", retry_after=5)
            lists = await asyncio.gather(*(models_of(upstream) for upstream in usable))
        if all(models is None for models in lists):
            raise Refusal("upstream_unreachable", "No upstream gave its list of models.")
        joined: dict[str, Any] = {}
        for models in lists:
            for model in models or []:
                if self.books.served(model["id"]):
                    joined.setdefault(model["id"], model)
        body = orjson.dumps({"object": "list", "data": list(joined.values())})
        await self._answer(scope, send, 200, body)

    async def model(self, scope: Scope, _: Receive, send: Send) -> None:
        """One model, as the upstream that would serve it describes it."""
        scope["where"] = "/v1/models/{id}"
        key = self.enter(scope)
        name = scope["path_params"]["model"]
        # '../files' must not reach the upstream
        if not (MODEL_NAME.fullmatch(name) and self.books.served(name)):
            raise Refusal("model_not_found", param="model")
        upstream = choose(self.upstreams, name)[0]
        with await self.limits.admit(key, 0, self.settings.limits, Clock(self.clocks)):
            try:
                status, body = await upstream.fetch(f"/models/{name}")
            except TimeoutError:
                raise Refusal("upstream_timeout") from None
            except httpx2.HTTPError:
                raise Refusal("upstream_unreachable") from None
        await self._answer(scope, send, status, body)

    async def healthz(self, scope: Scope, _: Receive, send: Send) -> None:
        """The process lives: no key, no database."""
        scope["where"] = "/healthz"
        await respond(scope, send, 200, b'{"status":"ok"}')

    async def readyz(self, scope: Scope, _: Receive, send: Send) -> None:
        """Whether a request would be served."""
        scope["where"] = "/readyz"
        if self.draining:
            raise Refusal("draining")
        if not any(upstream.usable for upstream in self.upstreams):
            raise Refusal("no_upstream", retry_after=5)
        if not await self.store.can_commit():
            raise Refusal("ledger_unavailable")
        await respond(scope, send, 200, b'{"status":"ready"}')

    async def me(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What an account asks of itself costs none of its limits; its answers are made in turn."""
        scope["where"] = "/admin/v1/me"
        scope["key"] = self.enter(scope)
        request_id = scope["request_id"].encode()

        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = [(b"x-request-id", request_id), (b"x-redbtc-request-id", request_id)]
                message["headers"] = [*message["headers"], *ids]
                self.watch.answered(scope, message["status"])
            await send(message)

        async with self._asking[scope["key"].account_id]:
            await self._me(scope, receive, send_with_ids)

    async def status(self, scope: Scope, _: Receive, send: Send) -> None:
        """For everybody: whether it works, and the notices for all that are in force or coming."""
        scope["where"] = "/status"
        uptime = round(time.monotonic() - self._started)
        try:
            status = await admin.status(self.books, uptime)
        except sqlite3.Error:
            raise Refusal("ledger_unavailable") from None
        accept = header(scope["headers"], b"accept") or b""
        if admin.prefers_html(accept.decode("latin-1")):
            page = admin.status_page(status)
            await respond(scope, send, 200, page, content_type=b"text/html; charset=utf-8")
        else:
            await respond(scope, send, 200, orjson.dumps(status))

    async def metrics(self, scope: Scope, _: Receive, send: Send) -> None:
        """Prometheus text, for loopback or for who has the token of the settings."""
        scope["where"] = "/metrics"
        if not self._may_read_metrics(scope):
            raise Refusal("metrics_forbidden")
        body = prometheus_client.generate_latest(self.watch.registry)
        content_type = prometheus_client.CONTENT_TYPE_LATEST.encode()
        await respond(scope, send, 200, body, content_type=content_type)

    def _may_read_metrics(self, scope: Scope) -> bool:
        variable = self.settings.metrics.token_env
        if variable:
            expected = f"Bearer {os.environ.get(variable, '')}".encode()
            shown = header(scope["headers"], b"authorization") or b""
            return len(expected) > 7 and hmac.compare_digest(expected, shown)
        try:
            return ipaddress.ip_address(scope["client"][0]).is_loopback
        except (TypeError, ValueError):
            return False

    async def _answer(self, scope: Scope, send: Send, status: int, body: bytes) -> None:
        self.watch.answered(scope, status)
        await respond(scope, send, status, body)


async def models_of(upstream: Upstream) -> list[dict[str, Any]] | None:
    """The models that an upstream lists and its patterns allow; None where it gives no list."""
    try:
        status, body = await upstream.fetch("/models")
        listed = orjson.loads(body)["data"] if status == 200 else None
    except (httpx2.HTTPError, TimeoutError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if not isinstance(listed, list):
        return None
    named = [model for model in listed if isinstance(model, dict) and name_in(model.get("id"))]
    return [model for model in named if upstream.serves(model["id"])]


async def upgrade_required(scope: Scope, _: Receive, send: Send) -> None:
    """GET /v1/responses is Codex asking for a WebSocket: 426 makes it fall back to POST at once."""
    if (header(scope["headers"], b"upgrade") or b"").lower() != b"websocket":
        raise Refusal("unknown_url")
    raise Refusal("upgrade_required", headers=[(b"upgrade", b"websocket")])


async def unknown_url(scope: Scope, _: Receive, send: Send) -> None:
    """Anything that is not served."""
    raise Refusal("unknown_url")


class AsApp:
    """A function as an ASGI app, which Starlette's Route takes for what it is."""

    def __init__(self, function: App) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


class ExactRoute(Route):
    """A route to which another method is another URL, so that it is 404 and not 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})


def build(gateway: Gateway) -> Guard:
    """The ASGI app."""
    metered = {path: MeteredRoute(gateway, path) for path in METERED}
    others = Router(gateway.routes(), redirect_slashes=False, default=unknown_url)
    return Guard(metered, others, gateway.watch)


# ── Serve ────────────────────────────────────────────────────────────────────────────────────────


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the gateway."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_for(app: Any, **options: Any) -> Server:
    """A quiet server: no log, no headers, no WebSocket of its own."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    usual: dict[str, Any] = {
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "ws": "none",
        "timeout_keep_alive": 75,  # longer than nginx's 60: never closed as it sends a request
        "timeout_graceful_shutdown": 1,
    }
    return Server(uvicorn.Config(app, **usual | options))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises LedgerError where the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise LedgerError(f"can't listen on {host}:{port}: {error.strerror}") from None


class Running:
    """The gateway as a process: its servers, its signals, its end."""

    def __init__(self, gateway: Gateway, loaded: Loaded, demo: str | None) -> None:
        self._gateway = gateway
        self._loaded = loaded
        self._demo = demo  # the URL of the demonstration upstream, where that is served
        self._servers: list[Server] = []
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Until a signal ends it."""
        settings = self._gateway.settings.server
        public = server_for(
            build(self._gateway),
            http=HTTPProtocol,
            proxy_headers=True,
            forwarded_allow_ips=list(settings.trusted_proxies),
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with admin.socket_path(self._gateway.store.path, make=True) as path:
            local = server_for(admin.app(self._gateway.books), uds=path, proxy_headers=False)
            self._servers = [public, local]
            async with asyncio.TaskGroup() as servers:
                servers.create_task(public.serve([listener]))
                servers.create_task(local.serve())

    def _terminate(self) -> None:
        if self._draining:
            say(logging.WARNING, "terminated", in_flight=self._gateway.in_flight)
            LOG.flush()
            os._exit(128 + signal.SIGTERM)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """No new requests; those in flight may finish."""
        gateway = self._gateway
        gateway.draining = True
        say(logging.INFO, "draining", in_flight=gateway.in_flight)
        patience = time.monotonic() + gateway.settings.server.drain_seconds
        while gateway.in_flight and time.monotonic() < patience:
            await asyncio.sleep(0.05)
        say(logging.INFO, "stopping", in_flight=gateway.in_flight)
        for server in self._servers:
            server.should_exit = True

    def _reload(self) -> None:
        """Read the settings again; a bad file changes nothing."""
        old = self._gateway.settings
        try:
            new = load_settings(str(self._loaded.file or "") or None).settings
        except SettingsError as error:
            say(logging.ERROR, "reload refused", reason=str(error))
            return
        if self._demo:
            new = with_demo(new, self._demo)
        self._gateway.apply(new)
        LOG.level = getattr(logging, new.server.log_level.upper())
        fixed = [
            name
            for name, before, after in (
                ("server.host", old.server.host, new.server.host),
                ("server.port", old.server.port, new.server.port),
                ("server.trusted_proxies", old.server.trusted_proxies, new.server.trusted_proxies),
                ("database", old.database, new.database),
                ("billing.currency", old.billing.currency, new.billing.currency),
            )
            if before != after
        ]
        say(logging.INFO, "reloaded", needs_restart=fixed)
        for line in missing_keys(new):
            say(logging.WARNING, "unusable", reason=line)


DEMO_PRICE = Price(
    "redbtc-demo*", input=NANOS, output=4 * NANOS, max_output_tokens=1000, source="an invention"
)


def with_demo(settings: Settings, url: str) -> Settings:
    """The settings with the demonstration upstream in place of all others."""
    demo = UpstreamSettings(name="demo", base_url=url, api_key_env="")
    return msgspec.structs.replace(settings, upstreams=(demo,))


def missing_keys(settings: Settings) -> list[str]:
    """What can't be used, since the environment has no key for it."""
    wanted = {f"upstream {upstream.name}": upstream.api_key_env for upstream in settings.upstreams}
    wanted["billing.webhook_url"] = settings.billing.webhook_secret_env
    return [
        f"{what}: the environment has no {variable}"
        for what, variable in wanted.items()
        if variable and not os.environ.get(variable)
    ]


async def watch_ledger(store: Store) -> None:
    """Say once when the ledger can't commit, and once when it can again."""
    healthy = True
    while True:
        await asyncio.sleep(0.25)
        if store.healthy != healthy:
            healthy = store.healthy
            level = logging.INFO if healthy else logging.ERROR
            event = "ledger recovered" if healthy else "ledger unavailable"
            say(level, event, reason=store.failure)


async def run(
    loaded: Loaded, settings: Settings, demo: bool, first_run: bool, as_json: bool
) -> None:
    """The gateway from start to end. Raises LedgerError where it can't start."""
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            Store.open(loaded.database_path, settings.database.synchronous)
        )
        demo_url = await start_demo(stack) if demo else None
        if demo_url:
            settings = with_demo(settings, demo_url)
        books = await Books.open(store, settings.billing)
        if first_run and not books.prices.prices:
            await admin.import_example(books)
        if demo and books.tariff(DEMO_PRICE.model) is None:
            await books.add_prices([DEMO_PRICE], without_notice=None, added_by="demo")
        listener = listen(settings.server.host, settings.server.port)
        url = local_url(settings, listener)
        for work in (watch_ledger(store), redbtc_webhook.post_for_ever(books, say)):
            stack.callback(asyncio.create_task(work).cancel)
        say(logging.INFO, "serving", url=url, interrupted_before=store.interrupted)
        ahead = (store.time() - now_ms()) // 1000
        if ahead > 60:
            say(logging.WARNING, "the clock is behind the ledger", seconds=ahead)
        for line in missing_keys(settings):
            say(logging.WARNING, "unusable", reason=line)
        if as_json:
            click.echo(orjson.dumps({"base_url": url, "pid": os.getpid()}))
        if first_run and not as_json:
            click.echo(await admin.welcome(store, url, demo))
        if not books.prices.prices and settings.billing.unpriced_models == "refuse":
            say(logging.WARNING, "no prices", reason="all models are refused: price import")
        await Running(Gateway(books, settings), loaded, demo_url).serve(listener)


async def start_demo(stack: contextlib.AsyncExitStack) -> str:
    """Serve the demonstration upstream on a free port of loopback; its base URL."""
    import redbtc_demo  # only who asks for it pays for it

    listener = listen("127.0.0.1", 0)
    server = server_for(redbtc_demo.app())
    serving = asyncio.create_task(server.serve([listener]))

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def local_url(settings: Settings, listener: socket.socket) -> str:
    """Where clients on this machine reach the gateway."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@admin.commands.command()
@click.option("--host", help="Listen on this address instead of the settings'.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port instead.")
@click.option("--demo", is_flag=True, help="Forward to a demonstration upstream: no model.")
@click.option("--first-run", is_flag=True, help="Make a first account and key if there is none.")
@admin.json_option
@click.pass_obj
def serve(
    context: admin.Context,
    host: str | None,
    port: int | None,
    demo: bool,
    first_run: bool,
    as_json: bool,
) -> None:
    """Run the gateway; also what a call without a command does."""
    loaded = context.loaded
    listening = {"host": host, "port": port}
    given = {name: value for name, value in listening.items() if value is not None}
    server = msgspec.structs.replace(loaded.settings.server, **given)
    settings = msgspec.structs.replace(loaded.settings, server=server)
    os.umask(0o077)  # what the gateway writes is its user's alone
    LOG.level = getattr(logging, server.log_level.upper())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(loaded, settings, demo, first_run, as_json))
    finally:
        LOG.flush()


@admin.commands.command()
@admin.json_option
@click.pass_obj
def check(context: admin.Context, as_json: bool) -> None:
    """Say what is wrong with the settings and the database, line by line."""
    try:
        loaded = context.loaded
    except SettingsError as error:
        admin.show_check(None, [str(error)], as_json)
    else:
        currency = loaded.settings.billing.currency
        problems = missing_keys(loaded.settings)
        problems += ledger.check_file(loaded.database_path, currency)
        admin.show_check(loaded, problems, as_json)


def main() -> None:
    """The command line: redbtc-proxy, or python redbtc_proxy.py."""
    admin.main()


if __name__ == "__main__":
    main()
