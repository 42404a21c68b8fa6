#!/usr/bin/env python3
"""RedBTC AI: an OpenAI-compatible API gateway that is small enough to read.

    authenticate ─► read ─► admit ─► choose ─► open ─► relay ─► settle ─► last byte

Clients point their base URL here. Each request is checked, held to its account's limits, forwarded
byte for byte to an upstream, and written down: what the upstream says was used, committed before
the client sees the end of the answer. This file is read in the order in which a request meets it;
what is the same for a request over a WebSocket is in redbtc_exchange.py, the rest of that one's way
in redbtc_websocket.py; what is kept is in redbtc_ledger.py, what it costs in redbtc_billing.py,
what people use in redbtc_admin.py.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take 0.2 s
    import redbtc_start

    redbtc_start.prepare()

import asyncio
import contextlib
import gc
import heapq
import hmac
import ipaddress
import logging
import os
import re
import signal
import socket
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, NamedTuple

import click
import httpx2
import msgspec
import orjson
import prometheus_client
import uvloop
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from starlette.requests import Request
from starlette.routing import Match, Route, Router

import redbtc_admin as admin
import redbtc_commands as commands
import redbtc_ledger as ledger
import redbtc_start
import redbtc_visitors as visitors
import redbtc_webhook
from redbtc_billing import DEFAULT_TIER, NEEDED, Books, Price, Spent
from redbtc_body import (
    Content,
    Form,
    Query,
    decompressed,
    media_of,
    most_decoded,
)
from redbtc_clock import watch_clock
from redbtc_commits import RETRY_SECONDS, Health
from redbtc_corrections import Corrections
from redbtc_cors import CORS, cors_headers, preflight_headers
from redbtc_decoding import TOO_SHORT, codings_in, codings_of
from redbtc_estimates import Speeds, is_final
from redbtc_exchange import (
    NO_RETRY,
    PRESERVE_GROWTH,
    PRESERVE_SECONDS,
    Endpoint,
    Exchange,
    Metered,
    Unended,
    insufficient_quota,
    new_request_id,
)
from redbtc_files import DatabaseInUse, state_of
from redbtc_http import NO_BODY
from redbtc_ledger import Home, Key, Objects
from redbtc_limits import FREE_BYTES, Admission, Clock, Clocks, Limits, Reservation
from redbtc_meter import MAX_NAME, Meter, StreamMeter, is_stream
from redbtc_pieces import Buffer, Steps
from redbtc_refusals import ClientLeft, Headers, Refusal, header, not_found, refusal_of
from redbtc_rows import Outcome
from redbtc_server import (
    Connections,
    Server,
    address_of,
    configured,
    listen,
    raise_descriptor_limit,
    server_for,
)
from redbtc_settings import (
    NANOS,
    Billing,
    LedgerError,
    LedgerUnavailable,
    Loaded,
    Settings,
    SettingsError,
    UpstreamSettings,
    parse_amount,
    reload_settings,
    url_of,
)
from redbtc_slices import answers_of, in_slices, with_turns
from redbtc_socket import AdminServer, socket_path
from redbtc_store import LedgerDamaged, Serving, Store, opening_error
from redbtc_transport import Answer, ResponseBody
from redbtc_upstreams import (
    NO_LIST,
    PING_SECONDS,
    Body,
    Upstream,
    choose,
    headers_for_client,
    headers_for_upstream,
)
from redbtc_vitals import Vitals, watch_size
from redbtc_watch import LOG, App, Message, Receive, Scope, Send, Watch, say, shown_error
from redbtc_websocket import RESPONSES, UPGRADE, Session, WebSocketProtocol


def ids_of(scope: Scope) -> Headers:
    """Return the headers that name the request in the ledger and the log."""
    request_id = scope["request_id"].encode()
    return [(b"x-request-id", request_id), (b"x-redbtc-request-id", request_id)]


async def respond(
    scope: Scope,
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    content_type: bytes = b"application/json",
) -> None:
    """One whole answer of the gateway's own."""
    head: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        *ids_of(scope),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


# ── Guard ────────────────────────────────────────────────────────────────────────────────────────
# redbtc_server.py parses requests, and checks each head before the request gets here. The path is
# scope["path"], never rebuilt from Host.


class Guard:
    """The outermost ASGI app: gives the request its id, refuses bad heads, and turns every Refusal
    into an answer. What nobody expected is logged by type and place, never with content."""

    def __init__(
        self, metered: Mapping[str, App], others: App, websocket: App, watch: Watch
    ) -> None:
        """`metered`: by path, for POST. They don't go through a router, which would look at one
        route after the other, and be gone through again for each event."""
        self._watch = watch
        self.lead_to(metered, others, websocket)

    def lead_to(self, metered: Mapping[str, App], others: App, websocket: App) -> None:
        """Serve these apps from now on."""
        self._metered = metered
        self._others = others
        self._websocket = websocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["request_id"] = new_request_id()
        scope["started"] = time.monotonic()
        scope["where"] = "other"
        try:
            if "refusal" in scope:
                raise scope.pop("refusal")
            if scope["type"] == "websocket":
                await self._websocket(scope, receive, send)
                return
            app = self._metered.get(scope["path"]) if scope["method"] == "POST" else None
            await (app or self._others)(scope, receive, send)
        except Refusal as refusal:
            self._watch.refused(scope, refusal)
            await self._refuse(scope, send, refusal)
        except ClientLeft:
            self._watch.left(scope)
        except Exception as error:
            self._watch.failed(scope, error)
            with contextlib.suppress(RuntimeError):  # the answer had begun: it ends torn
                await self._refuse(scope, send, refusal_of(error))

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        answer = denial(send) if scope["type"] == "websocket" else send
        headers = self._headers(refusal)
        if "forwarded" in scope:  # a retry would be paid again
            headers = [*headers, NO_RETRY]
        await respond(scope, answer, refusal.status, refusal.body(), headers)

    @staticmethod
    def _headers(refusal: Refusal) -> Headers:
        """Return the headers of a refusal's response. They close the connection if the rest of the
        request can't be read: its body is late, or its framing is invalid. Otherwise the rest is
        read and thrown away, so that the client sees the response and can reuse the connection."""
        if refusal.code in ("invalid_http", "headers_too_large", "request_timeout"):
            return [*refusal.headers, (b"connection", b"close")]
        return refusal.headers


def denial(send: Send) -> Send:
    """An HTTP answer to who asked for a WebSocket (an extension of ASGI's)."""

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return send_denial


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
# The whole body is read into memory, once, bounded in size and time, after the memory for it has
# been reserved (Reservation). What must be known of it is read in redbtc_body.py.


async def read_body(
    scope: Scope,
    receive: Receive,
    clock: Clock,
    settings: Settings,
    reserved: Reservation,
    form: Form | None = None,
) -> Buffer:
    """Return the request's body. If `form` is given, it parses the body as it arrives. Memory is
    reserved first; for a body of unknown length the reservation doubles as the body grows. Raises
    Refusal if the body is too large or too slow, or no memory comes free; ClientLeft."""
    most, seconds = settings.server.max_body_bytes, settings.server.body_timeout_seconds
    length = header(scope["headers"], b"content-length")
    more = int(length) if length else min(FREE_BYTES, most)
    _check_size(more, most)
    body: Buffer = b""
    room = 0
    while True:
        await reserved.take(more, clock)
        room += more
        begun = bool(body)
        try:
            with clock.running(seconds):
                body, whole = await _read_up_to(room, body, receive, most, form is not None)
        except TimeoutError:
            if clock.client_left:
                raise ClientLeft from None
            raise Refusal("request_timeout") from None
        seconds = clock.deadline - clock.now()
        if form:  # its turn to be parsed is waited for while the clock stands: no client is slow
            await in_slices(form.grow(body), reserved.account_id, begun)
        if whole:
            return body
        more = min(room, most - room) if len(body) > room else 0


async def _read_up_to(
    room: int, body: Buffer, receive: Receive, most: int, one: bool
) -> tuple[Buffer, bool]:
    """Read until the body is whole or fills the reserved `room` in bytes; if `one`, only what comes
    first. Return what has been read so far, and whether it is whole. Raises Refusal, ClientLeft."""
    while len(body) <= room:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        if isinstance(body, bytearray):
            body += message["body"]
        else:
            body = bytearray(body + message["body"]) if body else message["body"]
        _check_size(len(body), most)
        if one or not message["more_body"]:
            return body, not message["more_body"]
    return body, False


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise Refusal("request_too_large", f"The request body is over {most} bytes.")


async def read_content(
    scope: Scope,
    receive: Receive,
    clock: Clock,
    settings: Settings,
    reserved: Reservation,
    endpoint: Endpoint,
) -> Content:
    """Read the request's body and what must be known of it. Raises Refusal, ClientLeft."""
    media = media_of(scope["headers"], endpoint.forms)
    form = Form(media.boundary) if media.boundary else None
    along = None if media.encoding else form
    body = await read_body(scope, receive, clock, settings, reserved, along)
    if clock.client_left:
        raise ClientLeft
    steps = Content.steps(body, body, form, endpoint.model_needed)
    if media.encoding:
        most = most_decoded(len(body), settings.server.max_body_bytes)
        await reserved.take(most, clock)
        steps = _decoded(body, media.encoding, most, reserved, form, endpoint.model_needed)
    content = await in_slices(steps, reserved.account_id)
    if content.excess:
        await reserved.take(content.excess, None)
    return content


def _decoded(
    body: Buffer, encoding: str, most: int, reserved: Reservation, form: Form | None, named: bool
) -> Steps[Content]:
    """Decode a body and read it, in one: else all copies would wait for their turns. Raises
    Refusal."""
    text = yield from decompressed(body, encoding, most)
    reserved.give_back(most - len(text))
    if form:
        yield from form.grow(text)
    return (yield from Content.steps(body, text, form, named))


# ── Relay ────────────────────────────────────────────────────────────────────────────────────────

CLOSING_SECONDS = 0.1  # until the upstream has noticed a closed connection: its place is taken
MAX_BLANK = 4 << 10  # bytes before the response's beginning that are kept for its head
MAX_UNNAMED = 256 << 10  # bytes that wait for the id of a background response to be written
AFTER_END_SECONDS = 0.7  # for bytes that follow the event that ends a stream
INERT_TYPE = re.compile(rb"(?i)(?:application/json|text/event-stream)\s*(?:;[^,]*)?")
# With these a browser neither runs a response of any other type nor takes it for HTML.
INERT: Headers = [(b"content-security-policy", b"sandbox"), (b"x-content-type-options", b"nosniff")]


class Relay:
    """One HTTP request on its way to the upstream, and the answer on its way back."""

    def __init__(
        self,
        exchange: Exchange,
        send: Send,
        method: str,
        path: str,
        body: Buffer,
        query: bytes = b"",
    ) -> None:
        """`query` is what is forwarded of the client's query."""
        self._exchange = exchange
        self._clock = exchange.clock
        self._scope = exchange.scope
        self._send = send
        self._method = method
        self._path = path
        self._query = query
        self._bytes = body
        self._body = Body(body)
        self._waits_for_client = False
        self._head: Message  # the response's start, for the client
        self._started = False  # whether the head was sent
        self._labelled = False  # the response as a stream
        self._codings: list[bytes] = []  # that the response is labelled with
        self._begun = b""  # first bytes, sent on, that were too few to tell the coding
        # The end of the response, as far as it was not sent; None until the row is written.
        self._rest: bytes | None = None

    async def forward(self, upstreams: list[Upstream]) -> None:
        """Raises Refusal where the client has got nothing yet, ClientLeft."""
        grace = self._exchange.grace()
        failure = ""
        for upstream in upstreams:
            self._exchange.to(upstream)
            upstream.in_flight += 1
            try:
                with self._clock.running(upstream.settings.total_timeout_seconds, grace):
                    await self._ask(upstream)
                failure = ""
                break
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
        if self._rest is None:
            await self._fail(failure)
        else:
            if failure:
                await asyncio.sleep(CLOSING_SECONDS)
            await self._end(self._rest)

    async def _ask(self, upstream: Upstream) -> None:
        self._clock.allow(upstream.settings.first_byte_timeout_seconds)
        exchange = self._exchange
        store, by = exchange.gateway.store, exchange.repeatable_by
        headers = headers_for_upstream(self._scope["headers"], store, by)
        if self._bytes or self._method == "POST":
            headers.append((b"content-length", b"%d" % len(self._bytes)))
        else:
            headers = [line for line in headers if line[0] != b"content-encoding"]
        self._body = Body(self._bytes)
        answer = await upstream.open(self._method, self._path, self._query, headers, self._body)
        try:
            if not 200 <= answer.status <= 599:
                raise httpx2.RemoteProtocolError("not a final status")
            self._head = self._head_of(answer)
            await self._relay(answer.body, upstream.settings.idle_timeout_seconds)
        finally:
            await answer.body.aclose()

    def _head_of(self, answer: Answer) -> Message:
        """The answer's head for the client."""
        exchange = self._exchange
        headers = headers_for_client(answer.headers)
        content_type = b", ".join([value for name, value in headers if name == b"content-type"])
        self._labelled = content_type.lower().startswith(b"text/event-stream")
        self._labelled &= answer.status not in NO_BODY
        if header(headers, b"content-encoding") is not None:
            self._codings = codings_of(headers)
        # A stream may end earlier than the upstream's Content-Length says. Status 204 must not have
        # one (RFC 9110 §8.6), but some upstreams send it.
        if self._labelled or answer.status == 204:
            headers = without_length(headers)
        if not INERT_TYPE.fullmatch(content_type):
            # A browser looks only at the first of several X-Content-Type-Options.
            headers = [line for line in headers if line[0] != b"x-content-type-options"] + INERT
        request_id = self._scope["request_id"].encode()
        if header(headers, b"x-request-id") is None:
            headers.append((b"x-request-id", request_id))
        headers.append((b"x-redbtc-request-id", request_id))
        headers += exchange.admission.headers()
        exchange.status = answer.status
        return {"type": "http.response.start", "status": answer.status, "headers": headers}

    async def _relay(self, body: httpx2.AsyncByteStream, idle_seconds: float) -> None:
        clock, exchange = self._clock, self._exchange
        clock.allow(idle_seconds)
        kept = b""
        # If it is all here already, it goes out at once when it is written down.
        whole = isinstance(body, ResponseBody) and body.whole and not self._labelled
        # The head tells the length only of what is not a stream.
        if not whole and header(self._head["headers"], b"content-length") is None:
            await self._send_head()
        meter: Meter | None = None
        chunks = body.__aiter__()
        async for chunk in chunks:
            if exchange.first_byte_ms is None:
                exchange.first_byte_ms = exchange.elapsed_ms()
            if meter is None:
                meter = self._meter_of(chunk)
                if isinstance(meter, StreamMeter):
                    whole = False
                    if isinstance(body, ResponseBody):
                        self._pass_on(meter, body, idle_seconds)
            passed = await self._feed(meter, chunk) if meter else chunk
            # The head waits until it is known what it is.
            unknown = meter is None and not self._started and len(kept) < MAX_BLANK
            unnamed = exchange.awaits_id and len(kept) < MAX_UNNAMED
            if whole or unknown or unnamed or not passed:
                kept += passed
            else:
                passed, kept = kept + passed, b""
                await self._send_on(passed, idle_seconds)
            if meter and (meter.ended or meter.ending):
                while passed := await self._await_usage(meter, chunks):
                    passed, kept = kept + passed, b""
                    await self._send_on(passed, idle_seconds)
                if meter.ended or meter.ending:
                    break
            clock.allow(idle_seconds)
        if meter is None:  # nothing has come
            meter = exchange.meter = exchange.choose_meter(self._labelled)
        clock.pause()
        ended_by_event = meter.ended
        if meter.at_once:
            meter.finish()
        else:
            await in_slices(meter.finishing(), answers_of(exchange.key.account_id), begun=True)
        await exchange.settle(exchange.outcome())
        self._rest = kept + meter.rest()
        if ended_by_event:
            await self._follow(self._rest, chunks)

    def _meter_of(self, chunk: bytes) -> Meter | None:
        """Return the meter for an answer that begins with this chunk, or None while too few bytes
        have come to choose one, or only blanks. Such bytes are sent on without a meter."""
        exchange, begun = self._exchange, self._begun
        if chunk[:1] == b"{" and not (self._labelled or begun):
            return exchange.meter  # which is that of JSON
        if TOO_SHORT.match(begun + chunk):
            self._begun += chunk
            return None
        if codings := codings_in(begun + chunk, self._codings):
            exchange.meter_decoded(codings, self._labelled, begun)
            return exchange.meter
        stream = is_stream(chunk, self._labelled)
        if stream is None:
            return None
        exchange.meter = exchange.choose_meter(stream)
        if stream:
            self._head["headers"] = without_length(self._head["headers"])
        return exchange.meter

    async def _feed(self, meter: Meter, chunk: bytes) -> bytes:
        """Meter a part of the answer; return what may be sent on."""
        exchange = self._exchange
        if len(chunk) <= meter.at_once:
            passed = meter.feed(chunk)
        else:
            self._clock.pause()
            passed = await in_slices(
                meter.steps(chunk), answers_of(exchange.key.account_id), begun=True
            )
        exchange.note()
        if exchange.unwritten:  # a background response must be on disk before its id is seen
            self._clock.pause()
            await exchange.unwritten
            exchange.unwritten = None
        return passed

    async def _await_usage(self, meter: Meter, chunks: AsyncIterator[bytes]) -> bytes:
        """Read on for at most AFTER_END_SECONDS, since more usage may follow the event that ends
        the stream. If the stream goes on instead, return what may be sent on, else b"". It must be
        sent before more is read: `_pass_on` could send that first."""
        self._clock.pause()
        passed = b""
        until = asyncio.get_running_loop().time() + AFTER_END_SECONDS
        with contextlib.suppress(StopAsyncIteration, TimeoutError, httpx2.HTTPError):
            while meter.ending and not (meter.ended or passed):
                async with asyncio.timeout_at(until):
                    chunk = await anext(chunks)
                passed = await self._feed(meter, chunk)
        return passed

    async def _follow(self, rest: bytes, chunks: AsyncIterator[bytes]) -> None:
        """Send the event that ended the stream and what follows it, for AFTER_END_SECONDS. Bytes
        that a slow client has not taken by then stay in `_rest`."""
        self._clock.allow(AFTER_END_SECONDS)
        if not self._started:
            await self._send_head()
        await self._give(rest)
        async for chunk in chunks:
            self._rest = chunk
            await self._give(chunk)

    def _pass_on(self, meter: StreamMeter, body: ResponseBody, idle_seconds: float) -> None:
        """Send events in which nothing can matter on as they come, past this request's task."""
        clock, send_now, exchange = self._clock, self._scope["send_now"], self._exchange

        def pass_on(chunk: bytes) -> bool:
            if not self._started or exchange.awaits_id:
                return False
            passed: bool = meter.is_dull(chunk) and send_now(chunk)
            if passed:
                clock.allow(idle_seconds)
                meter.count_text(chunk)
            return passed

        body.pass_on(pass_on)

    async def _send_on(self, passed: bytes, idle_seconds: float) -> None:
        """Send a part of the answer. While the client reads slowly, so do we the upstream."""
        self._waits_for_client = True
        self._clock.allow(idle_seconds)  # metering may have paused it
        if not self._started:
            await self._send_head()
        await self._send({"type": "http.response.body", "body": passed, "more_body": True})
        self._waits_for_client = False

    async def _send_head(self) -> None:
        self._started = True
        await self._send(self._head)

    async def _give(self, rest: bytes) -> None:
        """Send bytes that waited for the row to be written, or came after the stream's end."""
        await self._send({"type": "http.response.body", "body": rest, "more_body": True})
        self._rest = b""

    async def _end(self, rest: bytes) -> None:
        """Complete the client's response. The upstream is done or closed, so give the places back
        first: a slow client then keeps nothing but its connection."""
        self._exchange.admission.give_back_places()
        if not self._started:
            await self._send_head()
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _fail(self, failure: str) -> None:
        """The exchange broke: write down how. A client that has nothing yet is told; for one in the
        middle of the answer the connection ends without the answer's end."""
        exchange = self._exchange
        if exchange.meter.at_once:
            exchange.meter.tear()
        else:
            await in_slices(
                exchange.meter.tearing(), answers_of(exchange.key.account_id), begun=True
            )
        if self._body.left:
            await asyncio.sleep(CLOSING_SECONDS)
        if self._clock.client_left and not self._body.left:
            await exchange.forget()
        if self._clock.client_left or self._waits_for_client:
            await exchange.settle("client_disconnected")
            return
        if self._started:
            await exchange.settle("upstream_failed")
            return
        exchange.status = Refusal(failure).status
        await exchange.settle("upstream_failed")
        raise Refusal(failure)  # kept in no variable: that would keep all of this in memory


def without_length(headers: Headers) -> Headers:
    return [line for line in headers if line[0] != b"content-length"]


# ── Stored responses ─────────────────────────────────────────────────────────────────────────────


# For how long a response of which only an estimate is known is read on after its reader has left.
USAGE_SECONDS = 15


class Visit(Exchange):
    """A request that reads or changes a stored response. It uses no tokens and has no row. If it
    shows that a background response has ended, the row of that response is settled first."""

    def __init__(
        self,
        gateway: Gateway,
        scope: Scope,
        endpoint: Endpoint,
        clock: Clock,
        admission: Admission,
        key: Key,
        response_id: str,
        home: Home,
    ) -> None:
        super().__init__(gateway, scope, endpoint, clock, admission)
        self.key = key
        self._response_id = response_id
        self._home = home

    def grace(self) -> float:
        """Return for how many seconds the upstream is read on when the client has left. If the
        usage of the response is not known, that is long enough to find it: it follows the output,
        so a client could otherwise take the output and leave before the correction."""
        gateway, response_id = self.gateway, self._response_id
        unknown = self._home.tokens is None and response_id not in gateway.unended
        unknown = unknown or gateway.corrections.is_unsure(response_id)
        return max(super().grace(), USAGE_SECONDS if unknown else 0.0)

    @property
    def _is_requested(self) -> bool:
        """Whether the upstream has answered with the requested response, as far as is known."""
        return self.meter.report.response_id in (None, self._response_id)

    def note(self) -> None:
        if self._is_requested:
            self.gateway.unended.read(self._response_id, self.meter.report)

    async def settle(self, outcome: Outcome) -> None:
        self.clock.pause()
        self.settled = True
        gateway, status, report = self.gateway, self.status or 0, self.meter.report
        if self._is_requested:
            await gateway.unended.look(self._response_id, report, status == 200)
        else:
            gateway.unended.ignore(self._response_id, report)
        if status == 200:
            await self._correct(outcome)
            self._learn_listed()
        if self.scope["method"] == "DELETE" and status < 300:
            await gateway.objects.disown(self._response_id, self.key.account_id)
        gateway.watch.answered(self.scope, status, outcome)

    async def _correct(self, outcome: Outcome) -> None:
        """Correct the estimate of the response, if there is one and its usage is known now. If its
        request goes on, that sees to it."""
        gateway, response_id, report = self.gateway, self._response_id, self.meter.report
        if self._is_requested and self._home.tokens is None:
            for request in gateway.running:
                request.shown(response_id)
        if self._is_torn(outcome):
            await self.ask_for_usage(response_id, self._home.upstream)
        elif report.response_id == response_id:
            await gateway.corrections.look(response_id, self.key.account_id, report)

    def _is_torn(self, outcome: Outcome) -> bool:
        """Whether only an estimate of the response is known and this answer broke off before its
        usage: the client may have all of the output, and have stopped reading just before that."""
        if outcome not in ("client_disconnected", "upstream_failed"):
            return False
        unsure = self.gateway.corrections.is_unsure(self._response_id)
        return unsure and not is_final(self.meter.report)

    def _learn_listed(self) -> None:
        """Make listed input items the account's if the upstream chose their ids. If the client may
        have chosen one, which could be another account's, only allow paging from these items."""
        listed, account_id, objects = (
            self.meter.report.listed,
            self.key.account_id,
            self.gateway.objects,
        )
        objects.show(listed, self._response_id, account_id)
        if self._home.minted_input:
            minted = [each for each, made in listed.items() if made]
            objects.own(minted, account_id, self._home_of_listed())

    def _home_of_listed(self) -> Home:
        """Return the home of an input item: it has at most the tokens of the response, which can
        have become known since this visit began, or are not known yet."""
        objects, home = self.gateway.objects, self._home
        with contextlib.suppress(LedgerUnavailable):
            home = objects.home_of(self._response_id, self.key.account_id) or home
        if growth := objects.growing(self._response_id):
            home = home.with_tokens((home.tokens or 0) + growth)
        return home._replace(minted_input=False)


class StoredRoute:
    """The ASGI app for a stored response: its owner reaches it, with any key, where it is. For all
    others it does not exist, and what never existed is answered no differently."""

    def __init__(self, gateway: Gateway, method: str, suffix: str = "") -> None:
        self._gateway = gateway
        self._method = method
        self._suffix = suffix
        self._endpoint = Endpoint(f"/v1/responses/{{id}}{suffix}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        scope["where"] = self._endpoint.path
        key, settings = gateway.enter(scope), gateway.settings
        response_id = scope["path_params"]["id"]
        clock = Clock(gateway.clocks)
        charged = gateway.limits.charge(key, settings.limits)
        with charged as admission, gateway.serving(scope, clock, key):
            home, upstream = choose_stored(gateway, key, response_id)
            query = self._query(key, response_id, scope["query_string"])
            with Reservation(gateway.limits, key, settings) as reserved:
                body = await read_body(scope, receive, clock, settings, reserved)
                if self._method != "POST":
                    body = b""  # of GET and DELETE it has no meaning (RFC 9110 §9.3.1, §9.3.5)
                elif body.strip():
                    check_plain_json(scope["headers"])
                    steps = Content.steps(body, body)
                    await gateway.homes(key, await in_slices(steps, key.account_id))
                if self._method == "DELETE" and response_id in gateway.unended:
                    message = "The response is still in progress; cancel it first."
                    raise Refusal("invalid_request", message)
                await gateway.limits.admit(admission, 0, clock)
            with await self._hold(key, response_id, admission):
                visit = Visit(
                    gateway,
                    scope,
                    self._endpoint,
                    clock,
                    admission,
                    key,
                    response_id,
                    home,
                )
                path = f"/responses/{response_id}{self._suffix}"
                await Relay(visit, send, self._method, path, body, query).forward([upstream])

    async def _hold(
        self, key: Key, response_id: str, admission: Admission
    ) -> contextlib.AbstractContextManager[None]:
        """Hold what a correction can add to the cost of a response, while it is shown in the
        returned context. Raises Refusal."""
        if (self._method, self._suffix) not in SHOWING:
            return contextlib.nullcontext()
        try:
            return await self._gateway.corrections.hold(response_id, key.account_id)
        except Spent as error:
            unknown = (
                "The usage of this response is not known yet; "
                "it is charged to the key that created the response."
            )
            refusal = insufficient_quota(f"{error} {unknown}")
        except LedgerUnavailable:
            refusal = Refusal("ledger_unavailable")
        admission.refused(refusal)
        raise refusal

    def _query(self, key: Key, response_id: str, given: bytes) -> bytes:
        """Return the part of the query that is forwarded. `after` and `before` must name an item
        that the account owns, or that this response's listing showed it. Raises Refusal."""
        query = Query(given, QUERIES.get((self._method, self._suffix), ()))
        for name in ("after", "before"):
            for object_id in query.values(name):
                objects, account_id = self._gateway.objects, key.account_id
                shown = objects.was_shown(object_id, response_id, account_id)
                if not shown and self._gateway.home_of(key, object_id) is None:
                    raise not_own(name)
        return query.encoded()


def not_own(name: str) -> Refusal:
    """Return the refusal of a reference to an object that is not the account's. It is the same for
    another account's object as for one that does not exist."""
    message = f"'{name}' names an object that isn't known to be this account's."
    return Refusal("invalid_request", message, param=name)


def check_plain_json(headers: Headers) -> None:
    """Raise Refusal if the headers announce a body that is not JSON, or compressed."""
    if media_of(headers, forms=False).encoding:
        message = "The body of this request must not be compressed."
        raise Refusal("unsupported_media_type", message)


def choose_stored(gateway: Gateway, key: Key, response_id: str) -> tuple[Home, Upstream]:
    """Where the account's response is. Raises Refusal."""
    home = gateway.home_of(key, response_id) if OBJECT_ID.fullmatch(response_id) else None
    if home is None:
        raise Refusal("response_not_found", f"Response with id '{response_id}' not found.")
    upstream = gateway.upstream_named(home.upstream)
    if upstream is None or not upstream.usable:
        raise Refusal("no_upstream", retry_after=60)
    return home, upstream


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────

METERED = (
    Endpoint("/v1/chat/completions", chat=True, limits=("max_completion_tokens", "max_tokens")),
    RESPONSES,
    Endpoint("/v1/responses/compact"),
    Endpoint("/v1/responses/input_tokens", free=True),
    Endpoint("/v1/images/generations", images=True),
    Endpoint("/v1/images/edits", images=True, forms=True),
)
MODEL_NAME = re.compile(r"[A-Za-z0-9@~][\w.:@+~-]*(?:/[A-Za-z0-9@~][\w.:@+~-]*)*", re.ASCII)
OBJECT_ID = re.compile(r"[A-Za-z0-9][\w.:=+~-]{0,255}", re.ASCII)  # no path in it
LISTING = ("include", "include[]", "limit", "order", "after", "before")
STREAMING = ("include", "include[]", "stream", "starting_after", "include_obfuscation")
# By method and path after the id, the query fields that are forwarded.
QUERIES = {("GET", ""): STREAMING, ("GET", "/input_items"): LISTING}
SHOWING = (("GET", ""), ("POST", "/cancel"))  # these show the response
NOT_FOUND = ("previous_response_id", "comparison_response_id")
NOTHING: Mapping[str, Home] = {}
MAX_ASKED = 50  # requests for figures and pages, of an account or of a user, at once


class MeteredRoute:
    """The ASGI app of an endpoint."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, endpoint = self._gateway, self._endpoint
        scope["where"] = endpoint.path
        key, settings = gateway.enter(scope), gateway.settings
        clock = Clock(gateway.clocks)
        charged = gateway.limits.charge(key, settings.limits)
        with (
            charged as admission,
            gateway.serving(scope, clock, key),
            Metered(gateway, scope, endpoint, clock, admission) as exchange,
        ):
            with Reservation(gateway.limits, key, settings) as reserved:
                content = await read_content(scope, receive, clock, settings, reserved, endpoint)
                upstreams = await gateway.upstreams_for(key, content)
                asks = settings.metering.include_usage == "add" and content.plain
                if endpoint.chat and content.facts.stream and asks:
                    exchange.takes_out_usage = content.add_include_usage()
                await exchange.admit(key, content, upstreams)
            path = endpoint.path.removeprefix("/v1")
            relay = Relay(exchange, send, "POST", path, content.sent)
            await exchange.run(lambda: relay.forward(upstreams))


class Gateway:
    """The running gateway: what its routes share, and the routes themselves."""

    def __init__(self, books: Books, settings: Settings, watch: Watch) -> None:
        self.store = books.store
        self.books = books
        self.limits = Limits()
        self.clocks = Clocks()
        self.watch = watch
        self.watch.registry.register(self)
        self.vitals = Vitals(books.store)
        self.watch.registry.register(self.vitals)
        self.settings = settings
        self.upstreams = [Upstream(upstream) for upstream in settings.upstreams]
        self.objects = Objects(books.store)
        self.containers = ledger.Containers(books.store)
        self.unended = Unended(self)
        self.speeds = Speeds(books.store)
        self.corrections = Corrections(books, self.objects, self.containers)
        self.sessions: Counter[str] = Counter()  # by account
        self.draining = self.stopping = False
        self.in_flight = 0
        self.running: set[Metered] = set()  # requests that have a row
        self.api = admin.API(books, self, settings.dashboard_url)
        self._admin = self.in_time(admin.served(self.api, visitors.actor_of(self.api)))
        self._pages = visitors.Pages(self.api)
        self._dashboard = self.in_time(self._pages)
        self._asking: defaultdict[str, asyncio.Semaphore] = defaultdict(asyncio.Semaphore)
        self._asked: Counter[str] = Counter()  # by account or user, requests without a place
        self._cutting: defaultdict[str, set[Callable[[], None]]] = defaultdict(set)  # by key
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
        key = scope["key"] = authenticate(scope, self.store)
        if maintenance := self.books.maintenance():
            wait = (maintenance.until - self.store.time()) / 1000
            raise Refusal("maintenance", maintenance.text, retry_after=wait)
        return key

    @property
    def example_model(self) -> str:
        """The one that examples name."""
        return "redbtc-demo" if self.upstream_named(DEMO) else "gpt-5.4-mini"

    def serves(self, model: str) -> bool:
        """Whether an upstream is there for it."""
        return any(upstream.serves(model) for upstream in self.upstreams)

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""
        return {name for upstream in self.upstreams for name in upstream.listed}

    def offers_websocket(self) -> bool:
        """Whether any upstream does; else an upgrade is answered 426, by the route of its path."""
        return any(upstream.speaks_websocket for upstream in self.upstreams)

    def upstream_named(self, name: str) -> Upstream | None:
        """That of the settings."""
        return next((upstream for upstream in self.upstreams if upstream.name == name), None)

    def home_of(self, key: Key, object_id: str) -> Home | None:
        """Where what the key's account made is stored; None for all else."""
        try:
            return self.objects.home_of(object_id, key.account_id)
        except LedgerUnavailable:
            raise Refusal("ledger_unavailable") from None

    async def homes(
        self, key: Key, content: Content, made: Mapping[str, Home] = NOTHING
    ) -> set[str]:
        """The upstream that has what the request builds on, if it builds on anything; the content
        inherits the models and tools that work in that and its tokens, and drops its references, so
        that they take no memory while it waits for a place. `made`: what is the client's own
        without being stored. Raises Refusal."""
        if not content.references:
            return set()
        homes = await in_slices(self._find(key, content, made), key.account_id, begun=True)
        content.references = {}
        return homes

    def _find(self, key: Key, content: Content, made: Mapping[str, Home]) -> Steps[set[str]]:
        # "" is nobody's. Long ids were never learned, and many of them would make a long query.
        asked = list({each.id for each in content.references if 0 < len(each.id) <= MAX_NAME})
        found: dict[str, Home | None] = {}
        for at in range(0, len(asked), ledger.MAX_LOOK_UPS):
            found |= self._look_up(key, asked[at : at + ledger.MAX_LOOK_UPS])
            yield
        homes: set[str] = set()
        for number, (each, mentions) in enumerate(content.references.items()):
            home = found[each.id] if each.id in found else made.get(each.id)
            if home is None and each.name in NOT_FOUND and len(each.id) <= MAX_NAME:
                raise not_found(each.name, each.id)
            if home is None:
                raise not_own(each.name)
            homes.add(home.upstream)
            content.inherit(each, mentions, home, self.objects.growing(each.id))
            if number % 1000 == 0:
                yield
        if len(homes) > 1:
            message = "The referenced objects are stored at different upstreams."
            raise Refusal("invalid_request", message)
        return homes

    def _look_up(self, key: Key, ids: list[str]) -> dict[str, Home | None]:
        try:
            return self.objects.look_up(ids, key.account_id)
        except LedgerUnavailable:
            raise Refusal("ledger_unavailable") from None

    async def upstreams_for(
        self, key: Key, content: Content, made: Mapping[str, Home] = NOTHING
    ) -> list[Upstream]:
        """Those that may take the request, the first to try in front. `made`: as for `homes`.
        Raises Refusal."""
        homes = await self.homes(key, content, made)
        model = content.model
        for each in (model, *filter(None, content.further_models())):
            if not key.allows(each):
                message = f"This key may not use the model '{each}'."
                raise Refusal("model_not_allowed", message, param="model")
            if not self.books.served(each):
                message = f"The model '{each}' does not exist, or it is not served here."
                raise Refusal("model_not_found", message, param="model")
        if content.extras:
            self._check_rates(content)
        return choose(self.upstreams, model, *homes)

    def _check_rates(self, content: Content) -> None:
        """Raise Refusal for a request that could use what its model's price has no rate for."""
        model, tier = content.facts.model or "", content.facts.service_tier
        for rate, member in content.needed_rates():
            if lacking := self.books.lacks(model, rate, tier):
                of_tier = "" if lacking.tier == DEFAULT_TIER else f" for the tier '{lacking.tier}'"
                message = (
                    f"The price of the model '{model}'{of_tier} has no rate '{rate}', so a request "
                    f"that {NEEDED[rate]} is refused."
                )
                raise Refusal("invalid_request", message, param=member)

    @contextlib.contextmanager
    def serving(self, scope: Scope | None, clock: Clock, key: Key) -> Iterator[None]:
        """A request is in flight; its clock hears when its client leaves, or its key is cut."""
        leaving: set[Callable[[], None]] = scope["leaving"] if scope else set()

        def cut() -> None:
            clock.cut()
            if scope:
                scope["abort"]()

        self.in_flight += 1
        leaving.add(clock.leave)
        try:
            with self.cutting(key, cut):
                yield
        finally:
            leaving.discard(clock.leave)
            self.in_flight -= 1

    @contextlib.contextmanager
    def cutting(self, key: Key, cut: Callable[[], None]) -> Iterator[None]:
        """Meanwhile `cut` is called if the key is found to be somebody else's."""
        of_key = self._cutting[key.id]
        of_key.add(cut)
        try:
            yield
        finally:
            of_key.discard(cut)
            if not of_key:
                self._cutting.pop(key.id, None)

    # What the admin API is shown

    def cut(self, key_id: str) -> int:
        """End all that runs for a key, also at the upstreams; how much that was."""
        running = list(self._cutting.get(key_id, ()))
        in_background = self.unended.cancel(key_id)
        for cut in running:
            cut()
        return len(running) + in_background

    def set_back(self, at: int) -> None:
        """Let no background response have begun later than `at`: the ledger's time is set back."""
        self.unended.set_back(at)

    def stop(self) -> None:
        """End all that is in flight: the process is about to. What it used is estimated."""
        self.stopping = True
        for cut in [cut for running in self._cutting.values() for cut in running]:
            cut()

    def limits_of_key(self, key: Key) -> dict[str, Any]:
        """The limits in force for a key and its account, and what is left of them."""
        return self.limits.report(key, self.settings.limits)

    def limits_of_account(self, account: ledger.Record) -> dict[str, Any]:
        """Those of an account."""
        concurrency, requests, tokens = (account[name] for name in ledger.LIMITS)
        factor = account["throttle_factor"]
        thousandths = None if factor is None else parse_amount(factor) // (NANOS // 1000)
        own = concurrency, requests, tokens
        return self.limits.report_account(account["id"], own, thousandths, self.settings.limits)

    def at_work(self) -> dict[str, Any]:
        """What is in flight, what was refused since the start, and the upstreams."""
        return {
            "running": True,
            "uptime_seconds": round(time.monotonic() - self._started),
            "in_flight": self.in_flight,
            "queued": self.limits.queued,
            "refusals": self.watch.refusals(),
            "upstreams": [
                {"name": each.name, "usable": each.usable, "in_flight": each.in_flight}
                for each in self.upstreams
            ],
        }

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each reading."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("redbtc_in_flight", "Requests under /v1 being served", self.in_flight)
        yield gauge("redbtc_queued", "Requests that wait for a place", self.limits.queued)
        yield counter("redbtc_ledger_commits", "Commits of the ledger", self.store.commits.count)
        yield counter(
            "redbtc_ledger_repairs",
            "Rows that another process had closed",
            self.store.commits.repaired,
        )
        yield gauge(
            "redbtc_clock_offset_seconds",
            "The machine's clock minus the ledger's time",
            self.store.clock.offset / 1000,
        )
        yield gauge("redbtc_ledger_healthy", "1 while the ledger can commit", self.store.healthy)

    def routes(self) -> list[Route]:
        """All that is served beside METERED. What is not here is 404 before its body is read."""
        return [
            ExactRoute("/v1/responses", AsApp(upgrade_required), methods=["GET"]),
            ExactRoute("/v1/responses/{id}", StoredRoute(self, "GET"), methods=["GET"]),
            ExactRoute("/v1/responses/{id}", StoredRoute(self, "DELETE"), methods=["DELETE"]),
            ExactRoute(
                "/v1/responses/{id}/cancel", StoredRoute(self, "POST", "/cancel"), methods=["POST"]
            ),
            ExactRoute(
                "/v1/responses/{id}/input_items",
                StoredRoute(self, "GET", "/input_items"),
                methods=["GET"],
            ),
            ExactRoute("/v1/models", AsApp(self.models), methods=["GET"]),
            ExactRoute("/v1/models/{model:path}", AsApp(self.model), methods=["GET"]),
            ExactRoute("/v1/{rest:path}", AsApp(self.preflight), methods=["OPTIONS"]),
            ExactRoute("/healthz", AsApp(self.healthz), methods=["GET"]),
            ExactRoute("/readyz", AsApp(self.readyz), methods=["GET"]),
            ExactRoute("/metrics", AsApp(self.metrics), methods=["GET"]),
            ExactRoute("/status", AsApp(self.status), methods=["GET"]),
            ExactRoute("/admin/v1/me{rest:path}", AsApp(self.me), methods=["GET"]),
            Route("/admin/v1/{rest:path}", AsApp(self.admin)),
            Route("/dashboard{rest:path}", AsApp(self.dashboard)),
        ]

    async def models(self, scope: Scope, _: Receive, send: Send) -> None:
        """The upstreams' lists joined, in their order, less what the key may not use and what has
        no price where that is refused. `age` is that of the oldest of the lists, where an upstream
        gave no new one."""
        scope["where"] = "/v1/models"
        key = self.enter(scope)
        clock, charged = Clock(self.clocks), self.limits.charge(key, self.settings.limits)
        with charged as admission, self.serving(scope, clock, key):
            await self.limits.admit(admission, 0, clock)
            joined, age = await self._listed(key, self.upstreams)
        body = orjson.dumps({"object": "list", "data": list(joined.values())})
        await self._answer(scope, send, 200, body, age_header(age))

    async def _listed(
        self, key: Key, upstreams: Iterable[Upstream]
    ) -> tuple[dict[str, dict[str, Any]], float]:
        """The models that the key may use, and the oldest list's age in seconds. Raises Refusal
        where no upstream ever gave a list."""
        usable = [upstream for upstream in upstreams if upstream.usable]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        asked = (upstream.models() for upstream in usable)
        lists = await asyncio.gather(*asked, return_exceptions=True)
        joined: dict[str, dict[str, Any]] = {}
        oldest, failures = 0.0, []
        for found in lists:
            if isinstance(found, BaseException):
                failures.append(found)
                continue
            oldest = max(oldest, found[1])
            async for model in with_turns(found[0]):
                if self.books.served(model["id"]) and key.allows(model["id"]):
                    joined.setdefault(model["id"], model)
        if len(failures) == len(lists):
            raise failures[0]
        return joined, oldest

    async def model(self, scope: Scope, _: Receive, send: Send) -> None:
        """One model, as the upstream that would serve it describes it; as it was listed last, where
        that one does not answer."""
        scope["where"] = "/v1/models/{id}"
        key = self.enter(scope)
        clock, charged = Clock(self.clocks), self.limits.charge(key, self.settings.limits)
        with charged as admission, self.serving(scope, clock, key):
            name = scope["path_params"]["model"]
            status, body, headers = await self._shown(key, name, admission, clock)
        await self._answer(scope, send, status, body, headers)

    async def _shown(
        self, key: Key, name: str, admission: Admission, clock: Clock
    ) -> tuple[int, bytes, Headers]:
        # '../files' must not reach the upstream. To match a long name takes long.
        is_name = len(name) <= MAX_NAME and MODEL_NAME.fullmatch(name)
        if not (is_name and self.books.served(name) and key.allows(name)):
            raise Refusal("model_not_found", param="model")
        upstream = choose(self.upstreams, name)[0]
        await self.limits.admit(admission, 0, clock)
        shown, status = b"", 0
        with contextlib.suppress(*NO_LIST):
            status, shown = await upstream.fetch_whole(f"/models/{name}")
        if 200 <= status < 500:
            return status, shown, []
        listed, age = await self._listed(key, [upstream])
        if name not in listed:
            raise Refusal("upstream_unreachable")
        return 200, orjson.dumps(listed[name]), age_header(age)

    def allows_origin(self, origin: bytes) -> bool:
        """Return whether pages of that origin may use /v1."""
        return bool(cors_headers(origin, self.settings.server.cors_origins))

    async def preflight(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer a CORS preflight, which browsers send without a key."""
        origin = header(scope["headers"], b"origin")
        if origin is None or not self.allows_origin(origin):
            raise Refusal("unknown_url")
        headers = [*preflight_headers(scope["headers"]), *ids_of(scope)]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

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
        key = scope["key"] = authenticate(scope, self.store)
        with self._asked_by(key.account_id):
            async with self._asking[key.account_id]:
                await self._admin(scope, receive, self._with_ids(scope, send))

    @contextlib.contextmanager
    def _asked_by(self, who: str) -> Iterator[None]:
        """Count a request of an account or a user that has no place: what waits for a client that
        reads its answer slowly holds a connection and memory. Raises Refusal."""
        if self._asked[who] >= MAX_ASKED:
            message = f"At most {MAX_ASKED} of these requests can be in flight at once."
            raise Refusal("concurrency_limit_exceeded", message)
        self._asked[who] += 1
        try:
            yield
        finally:
            self._asked[who] -= 1
            if not self._asked[who]:
                del self._asked[who]

    def _asked_in_session(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Count a request of whoever is logged in. Raises Refusal."""
        with contextlib.suppress(LedgerUnavailable):
            if session := visitors.session_of(self.api, Request(scope)):
                return self._asked_by(session.user_id)
        return contextlib.nullcontext()

    def in_time(self, app: App) -> App:
        """Return the app with a time limit for each request's body: to the app, a client that is
        slower has disconnected."""

        async def app_in_time(scope: Scope, receive: Receive, send: Send) -> None:
            until = time.monotonic() + self.settings.server.body_timeout_seconds
            await app(scope, received_until(until, receive), send)

        return app_in_time

    def _with_ids(self, scope: Scope, send: Send) -> Send:
        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ids_of(scope)]
                if message["status"] != 500:  # it is counted as what failed
                    self.watch.answered(scope, message["status"])
            await send(message)

        return send_with_ids

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The admin API, for whoever is logged in to the dashboard."""
        scope["where"] = "/admin/v1"
        with self._asked_in_session(scope):
            await self._admin(scope, receive, self._with_ids(scope, send))

    async def dashboard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Its pages."""
        scope["where"] = "/dashboard"
        with self._asked_in_session(scope):
            await self._dashboard(scope, receive, self._with_ids(scope, send))

    async def status(self, scope: Scope, _: Receive, send: Send) -> None:
        """For everybody: whether it works, and the notices for all that are in force or coming."""
        scope["where"] = "/status"
        uptime = round(time.monotonic() - self._started)
        try:
            status = await visitors.status(self.books, uptime)
        except sqlite3.Error:
            raise Refusal("ledger_unavailable") from None
        accept = header(scope["headers"], b"accept") or b""
        if visitors.prefers_html(accept.decode("latin-1")):
            page = await self._pages.page("status.html", status)
            headers = [(name.encode(), value.encode()) for name, value in visitors.SECURITY.items()]
            content_type = page.headers["content-type"].encode()
            await respond(scope, send, page.status_code, bytes(page.body), headers, content_type)
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

    async def _answer(
        self, scope: Scope, send: Send, status: int, body: bytes, headers: Headers
    ) -> None:
        self.watch.answered(scope, status)
        await respond(scope, send, status, body, headers)


def received_until(until: float, receive: Receive) -> Receive:
    """Return a `receive` that says the client has disconnected if its body is not whole at `until`,
    a time of the monotonic clock."""
    whole = False

    async def receive_until() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return receive_until


def age_header(seconds: float) -> Headers:
    """RFC 9111 §5.1, for what is older than a second."""
    return [(b"age", b"%d" % seconds)] if seconds >= 1 else []


async def upgrade_required(scope: Scope, _: Receive, send: Send) -> None:
    """GET /v1/responses is Codex asking for a WebSocket: 426 makes it fall back to POST at once."""
    if (header(scope["headers"], b"upgrade") or b"").lower() != b"websocket":
        raise Refusal("unknown_url")
    raise Refusal("upgrade_required", headers=UPGRADE)


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


def apps_of(gateway: Gateway) -> tuple[dict[str, App], App, App]:
    """Return the ASGI apps for metered requests by path, for others, and for WebSockets."""
    metered: dict[str, App] = {
        endpoint.path: MeteredRoute(gateway, endpoint) for endpoint in METERED
    }
    others = Router(gateway.routes(), redirect_slashes=False, default=unknown_url)

    async def session(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != RESPONSES.path:
            raise Refusal("unknown_url")
        scope["where"] = RESPONSES.path
        origin = header(scope["headers"], b"origin")
        if origin is not None and not gateway.allows_origin(origin):  # RFC 6455 §10.2
            raise Refusal("origin_not_allowed")
        await Session(gateway, scope, receive, send).run()

    return metered, others, session


async def not_open(scope: Scope, _: Receive, send: Send) -> None:
    """Serve requests while the ledger is not open yet."""
    if scope["path"] != "/healthz":
        raise Refusal("ledger_unavailable", headers=[(b"connection", b"close")])
    scope["where"] = "/healthz"
    await respond(scope, send, 200, b'{"status":"ok"}')


# ── Serve ────────────────────────────────────────────────────────────────────────────────────────


OPENING_SECONDS = 2.0  # if the ledger is not open after them, requests are answered without it
STOPPING_SECONDS = 10  # for the rows of what is cut off when the process ends
WATCH_SECONDS = 0.25
EXIT_SOFTWARE = 70  # a task of the process has ended (EX_SOFTWARE of sysexits.h)


class Running:
    """The gateway as a process: its servers, its signals, its end."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self._loaded = loaded
        self._settings = settings
        self.watch = Watch()
        self.status = 0  # that the process exits with
        self._gateway: Gateway | None = None  # None until its ledger is open
        self.demo: str | None = None  # the URL of the demonstration upstream, where that is served
        self._opening: asyncio.Task[Gateway] | None = None
        self._reload_wanted = False
        self._guard = Guard({}, not_open, not_open, self.watch)
        self._servers: list[Server] = []
        self._connections = Connections(self._offers_websocket)
        self._draining: asyncio.Task[None] | None = None
        self._over = False  # the tasks may end
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        redbtc_start.finish()

    def _offers_websocket(self) -> bool:
        return self._gateway is not None and self._gateway.offers_websocket()

    async def serve(self, listeners: list[socket.socket], opening: asyncio.Task[Gateway]) -> None:
        """Serve until a signal ends it, or one of its tasks. Before `opening` is done, requests are
        refused. Raises LedgerError where the ledger can't be opened."""
        self._opening = opening
        await asyncio.wait([opening], timeout=OPENING_SECONDS)
        if self._draining:
            self._over = True
            return
        if opening.done():
            opening.result()
        else:
            say(logging.WARNING, "ledger not open yet", reason="requests are refused until it is")
        try:
            async with asyncio.TaskGroup() as servers:
                servers.create_task(self._serve_gateway(opening))  # first, so that commands work
                servers.create_task(self._public().serve(listeners))
        except* LedgerError as group:
            raise group.exceptions[0] from None
        finally:
            self._over = True

    def closing(self) -> None:
        """Expect the end of the process if the files are closed because it has served. They are
        also closed when an attempt to open them has failed, which is repeated."""
        if self._over:
            redbtc_start.end_soon(EXIT_SOFTWARE)

    def _public(self) -> Server:
        app = CORS(self._guard, lambda: self._settings.server.cors_origins)
        server = server_for(
            app,
            self._connections,
            proxy_headers=True,
            forwarded_allow_ips=list(self._settings.server.trusted_proxies),
            ws=WebSocketProtocol,
            ws_per_message_deflate=False,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=60,
        )
        self._servers.append(server)
        return server

    async def _serve_gateway(self, opening: asyncio.Task[Gateway]) -> None:
        """Serve the gateway as soon as it is there, and its admin API on the Unix socket."""
        gateway = self._gateway = await opening
        if self._reload_wanted:
            self._reload()
        tasks = [
            *gateway.store.commits.tasks,
            asyncio.create_task(redbtc_webhook.post_for_ever(gateway.books, say), name="webhook"),
            asyncio.create_task(preserve(gateway), name="preserve"),
            asyncio.create_task(watch_clock(gateway.store.clock, say), name="clock"),
            asyncio.create_task(watch_size(gateway.store), name="size"),
            asyncio.create_task(gateway.vitals.watch_loop(), name="loop lag"),
            asyncio.create_task(watch_log(), name="log"),
        ]
        for task in tasks:
            task.add_done_callback(self._ended)
        gateway.unended.ended = self._failed
        self._guard.lead_to(*apps_of(gateway))
        gc.freeze()  # what is there now stays, as in redbtc_start.finish
        with socket_path(gateway.store.path) as path:
            api = gateway.in_time(admin.served(gateway.api, admin.local))
            guarded = Guard({}, api, unknown_url, self.watch)
            local = AdminServer(configured(guarded, uds=path, proxy_headers=False))
            self._servers.append(local)
            with local.listening():
                await local.serve()
        self._over = True
        for task in tasks[2:]:
            task.cancel()

    def _failed(self, task: asyncio.Task[Any]) -> None:
        """End the process if a task has failed."""
        if not task.cancelled() and task.exception():
            self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """A task that must not end has ended: say why, and end the process, so that a supervisor
        starts it again."""
        if self._over:
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        say(logging.CRITICAL, "task ended", task=task.get_name(), **shown_error(error))
        self.status = EXIT_SOFTWARE
        if self._gateway and task in self._gateway.store.commits.tasks:
            self._end_now()
        if not self._draining:
            self._draining = asyncio.create_task(self._drain(0))

    def _end_now(self) -> None:
        """End the process without waiting for anything. What is owed to the ledger is kept."""
        redbtc_start.end_soon(EXIT_SOFTWARE)
        if self._gateway:
            self._gateway.store.commits.spill_now()
        LOG.flush()
        os._exit(self.status)

    def _terminate(self) -> None:
        if self._draining:
            in_flight = self._gateway.in_flight if self._gateway else 0
            say(logging.WARNING, "terminated", in_flight=in_flight)
            self.status = 128 + signal.SIGTERM
            self._end_now()
        self._draining = asyncio.create_task(self._drain(self._settings.server.drain_seconds))

    async def _drain(self, seconds: float) -> None:
        """Admit no new requests; those in flight may finish, and clients may read what was
        answered, for so many seconds."""
        if self._gateway:
            await self._drain_gateway(self._gateway, seconds)
        elif self._opening:
            redbtc_start.end_soon(EXIT_SOFTWARE)  # the disk may not answer
            self._opening.cancel()
        for server in self._servers:
            server.should_exit = True

    async def _drain_gateway(self, gateway: Gateway, seconds: float) -> None:
        gateway.draining = True
        say(logging.INFO, "draining", in_flight=gateway.in_flight)
        await self._wait_while(self._is_busy, gateway, seconds)
        say(logging.INFO, "stopping", in_flight=gateway.in_flight)
        if gateway.in_flight:
            gateway.stop()
        await self._wait_while(lambda gateway: gateway.in_flight > 0, gateway, STOPPING_SECONDS)

    async def _wait_while(
        self, holds: Callable[[Gateway], bool], gateway: Gateway, seconds: float
    ) -> None:
        deadline = time.monotonic() + seconds
        while holds(gateway) and time.monotonic() < deadline:
            gateway.store.give_up_if_failing()
            await asyncio.sleep(0.05)

    def _is_busy(self, gateway: Gateway) -> bool:
        return gateway.in_flight > 0 or self._connections.unsent

    def _reload(self) -> None:
        """Read the settings again; a bad file changes nothing."""
        if self._gateway is None:
            self._reload_wanted = True
            return
        old = self._gateway.settings
        try:
            new = reload_settings(self._loaded)
        except SettingsError as error:
            say(logging.ERROR, "reload refused", reason=str(error))
            return
        if self.demo:
            new = with_demo(new, self.demo)
        self._settings = new
        self._gateway.apply(new)
        LOG.level = getattr(logging, new.server.log_level.upper())
        fixed = [
            name
            for name, before, after in (
                ("server.host", old.server.hosts, new.server.hosts),
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


DEMO = "demo"  # the name of its upstream
DEMO_PRICE = Price(
    "redbtc-demo*", input=NANOS, output=4 * NANOS, max_output_tokens=1000, source="an invention"
)


def with_demo(settings: Settings, url: str) -> Settings:
    """The settings with the demonstration upstream in place of all others."""
    demo = UpstreamSettings(name=DEMO, base_url=url, api_key_env="")
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


async def watch_log() -> None:
    """Raise what has ended the log's thread, which must not happen."""
    while LOG.works:
        await asyncio.sleep(WATCH_SECONDS)
    if LOG.failure:
        raise LOG.failure


# At most this number or this share of the running requests is preserved in a second, whichever is
# more: each takes 0.1 ms.
MAX_PRESERVED, MAX_PRESERVED_SHARE = 20, 0.05


async def preserve(gateway: Gateway) -> None:
    """Keep what requests in flight have used so far, for as long as the gateway runs."""
    while True:
        await asyncio.sleep(PRESERVE_SECONDS)
        try:
            if gateway.store.healthy:
                await preserve_some(gateway, time.monotonic())
        except Exception as error:  # that should not happen, and must not end this
            say(logging.ERROR, "not preserved", error=type(error).__name__)


async def preserve_some(gateway: Gateway, now: float) -> None:
    """Keep what requests in flight have used so far, of those first of which the smallest part is
    kept. `now` is by the monotonic clock."""
    await gateway.unended.preserve(now)
    most = max(MAX_PRESERVED, round(MAX_PRESERVED_SHARE * len(gateway.running)))
    growth = {each: each.growth_since_preserved(now) for each in gateway.running}
    due = [each for each, times in growth.items() if times >= PRESERVE_GROWTH]
    async for each in with_turns(heapq.nlargest(most, due, key=lambda each: growth[each])):
        await each.preserve()


class Start(NamedTuple):
    """What `serve` was asked for."""

    loaded: Loaded
    settings: Settings
    demo: bool
    first_run: bool
    accept_clock: bool
    as_json: bool


async def run(start: Start) -> int:
    """Run the gateway from start to end, and return the exit status. Raises LedgerError where it
    can't start."""
    settings = start.settings
    running = Running(start.loaded, settings)
    async with contextlib.AsyncExitStack() as stack:
        listeners = listen(settings.server.hosts, settings.server.port)
        opening = asyncio.create_task(open_gateway(stack, start, running, listeners))
        await running.serve(listeners, opening)
    return running.status


async def open_gateway(
    stack: contextlib.AsyncExitStack, start: Start, running: Running, listeners: list[socket.socket]
) -> Gateway:
    """Open the ledger, however long that takes, and say that the gateway serves. Raises
    LedgerError."""
    settings = start.settings
    books = await open_ledger(stack, start, running)
    store = books.store
    demo_url = await start_demo(stack) if start.demo else None
    if demo_url:
        settings = with_demo(settings, demo_url)
        running.demo = demo_url
    if start.first_run and not books.prices.prices:
        await commands.import_example(books)
    if start.demo and books.tariff(DEMO_PRICE.model) is None:
        await books.add_prices([DEMO_PRICE], without_notice=None, by="demo")
    host, port = listeners[0].getsockname()[:2]
    url = f"{url_of(host, port)}/v1"
    say(
        logging.INFO,
        "serving",
        url=url,
        listening=[address_of(each) for each in listeners],
        interrupted_before=store.interrupted,
    )
    ahead = -store.clock.offset // 1000
    if ahead > 60:
        say(logging.WARNING, "the clock is behind the ledger", seconds=ahead)
    if store.migrated:
        say(logging.INFO, "migrated", **store.migrated._asdict())
    if store.replaced:
        say(logging.INFO, "restore finished", replaced=str(store.replaced))
    for line in missing_keys(settings):
        say(logging.WARNING, "unusable", reason=line)
    if start.as_json:
        click.echo(orjson.dumps({"base_url": url, "pid": os.getpid()}))
    if not books.prices.prices and settings.billing.unpriced_models == "refuse":
        say(logging.WARNING, "no prices", reason="all models are refused: price import")
    server = msgspec.structs.replace(settings.server, port=port)
    settings = msgspec.structs.replace(settings, server=server)
    gateway = Gateway(books, settings, running.watch)
    if not start.as_json:
        try:
            if start.first_run:
                click.echo(await commands.welcome(gateway.api, url, start.demo))
            click.echo(await commands.dashboard(gateway.api))
        except (sqlite3.Error, LedgerUnavailable) as error:
            say(logging.ERROR, "no welcome", reason=str(error))
    try:
        await gateway.unended.resume()
    except (sqlite3.Error, LedgerUnavailable) as error:
        if store.commits.health is not Health.LOST:  # which serves nothing anyway
            raise LedgerError(f"{store.path} can't be read: {error}") from None
    return gateway


DAMAGED = (
    "Nothing was written into it. Restore a backup: db restore FILE. If a database was copied to "
    "this place by hand, a -wal file of another one may lie beside it."
)


async def open_ledger(stack: contextlib.AsyncExitStack, start: Start, running: Running) -> Books:
    """Open the ledger, which is tried again for as long as its disk is full or does not answer, and
    when a damaged one was replaced. Raises LedgerError where that can't help."""
    database, path = start.settings.database, start.loaded.database_path
    serving = Serving(database.check_seconds, start.accept_clock, say, running.closing)
    said = ""
    while True:
        tried = state_of(path)
        try:
            opening = Store.open(path, database.synchronous, serving)
            async with contextlib.AsyncExitStack() as opened:
                store = await opened.enter_async_context(opening)
                books = await open_books(store, start.settings.billing)
                stack.push_async_exit(opened.pop_all())
                return books
        except LedgerDamaged as error:
            if str(error) != said:
                said = str(error)
                say(logging.CRITICAL, "ledger damaged", reason=said, what_to_do=DAMAGED)
            await asyncio.sleep(WATCH_SECONDS)
            while state_of(path) == tried:
                await asyncio.sleep(WATCH_SECONDS)
        except (LedgerUnavailable, DatabaseInUse) as error:
            if not said and isinstance(error, DatabaseInUse):
                raise
            if str(error) != said:
                said = str(error)
                say(logging.ERROR, "ledger unavailable", reason=said)
            await asyncio.sleep(RETRY_SECONDS)


async def open_books(store: Store, settings: Billing) -> Books:
    """Read the prices. Raises LedgerError."""
    try:
        return await Books.open(store, settings)
    except sqlite3.Error as error:
        raise opening_error(store.path, error) from None


async def start_demo(stack: contextlib.AsyncExitStack) -> str:
    """Serve the demonstration upstream on a free port of loopback; its base URL."""
    import redbtc_demo  # only who asks for it pays for it

    listeners = listen(["127.0.0.1"], 0)
    server = server_for(redbtc_demo.app())
    serving = asyncio.create_task(server.serve(listeners))

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    return f"http://{address_of(listeners[0])}/v1"


@commands.commands.command()
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="ADDRESS",
    help="Listen on this address instead of the settings'; can be repeated.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this port instead.")
@click.option("--demo", is_flag=True, help="Forward to a demonstration upstream: no model.")
@click.option("--first-run", is_flag=True, help="Make a first account and key if there is none.")
@click.option(
    "--accept-clock",
    is_flag=True,
    help="Believe the machine's clock, even if it is a day behind the ledger or jumps.",
)
@commands.json_option
@click.pass_obj
def serve(
    context: commands.Context,
    hosts: tuple[str, ...],
    port: int | None,
    demo: bool,
    first_run: bool,
    accept_clock: bool,
    as_json: bool,
) -> None:
    """Run the gateway; also what a call without a command does."""
    loaded = context.loaded
    listening = {"host": hosts or None, "port": port}
    given = {name: value for name, value in listening.items() if value is not None}
    server = msgspec.structs.replace(loaded.settings.server, **given)
    settings = msgspec.structs.replace(loaded.settings, server=server)
    raise_descriptor_limit()
    os.umask(0o077)  # what the gateway writes is its user's alone
    LOG.level = getattr(logging, server.log_level.upper())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            start = Start(loaded, settings, demo, first_run, accept_clock, as_json)
            status = runner.run(run(start))
    finally:
        LOG.flush()
    raise SystemExit(status)


@commands.commands.command()
@commands.json_option
@click.pass_obj
def check(context: commands.Context, as_json: bool) -> None:
    """Say what is wrong with the settings and the database, line by line."""
    try:
        loaded = context.loaded
    except SettingsError as error:
        commands.show_check(None, [str(error)], as_json)
    else:
        currency = loaded.settings.billing.currency
        problems = missing_keys(loaded.settings)
        problems += ledger.check_file(loaded.database_path, currency)
        commands.show_check(loaded, problems, as_json)


def main() -> None:
    """The command line: redbtc-proxy, or python redbtc_proxy.py."""
    commands.main()


if __name__ == "__main__":
    main()
