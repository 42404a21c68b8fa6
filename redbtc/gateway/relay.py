"""Send a request to an upstream, and its answer to the client as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import httpx2

from redbtc.gateway.exchange import ForwardedRequest
from redbtc.headers import Headers, header
from redbtc.meter.decoding import START, codings_in, codings_of
from redbtc.meter.events import BLANK, is_stream
from redbtc.meter.meters import Meter
from redbtc.meter.streams import StreamMeter
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Message, Send
from redbtc.server.framing import NO_BODY
from redbtc.slices import answers_of, in_slices
from redbtc.upstream.connection import ResponseBody
from redbtc.upstream.headers import headers_for_client, headers_for_upstream
from redbtc.upstream.response import ResponseHead
from redbtc.upstream.upstreams import UploadBody, Upstream

# First bytes that don't tell the coding yet: a part of a magic number, or blanks. Brotli has no
# magic number, and its first byte can be a blank.
TOO_SHORT = re.compile(
    rb"(?:[%b]{,%d}+|\x1f\x8b?|\x28(?:\xb5\x2f?)?|\x78)\Z" % (re.escape(BLANK), START - 1)
)
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
        exchange: ForwardedRequest,
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
        self._body = UploadBody(body)
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
        secret, by = exchange.gateway.store.secret, exchange.repeatable_by
        headers = headers_for_upstream(self._scope["headers"], secret, by)
        if self._bytes or self._method == "POST":
            headers.append((b"content-length", b"%d" % len(self._bytes)))
        else:
            headers = [line for line in headers if line[0] != b"content-encoding"]
        self._body = UploadBody(self._bytes)
        answer = await upstream.open(self._method, self._path, self._query, headers, self._body)
        try:
            if not 200 <= answer.status <= 599:
                raise httpx2.RemoteProtocolError("not a final status")
            self._head = self._head_of(answer)
            await self._relay(answer.body, upstream.settings.idle_timeout_seconds)
        finally:
            await answer.body.aclose()

    def _head_of(self, answer: ResponseHead) -> Message:
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
            passed: bool = meter.can_skip_parsing(chunk) and send_now(chunk)
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
        if self._body.begun:
            await asyncio.sleep(CLOSING_SECONDS)
        if self._clock.client_left and not self._body.begun:
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
