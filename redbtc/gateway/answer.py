"""The body of an upstream's answer on its way to the client.

Bytes are sent on as they come, except in five cases: a whole JSON answer goes out when its row is
written; so does a short one that may report an error about the operator's credentials; the first
bytes wait until they show what the answer is; an answer that creates a background response waits
for the response's id to be on disk; and what ends an answer for the client is held back by the
meter until the row is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import httpx2

from redbtc.deadlines import Deadline
from redbtc.gateway.client_response import ClientResponse
from redbtc.gateway.forwarded_request import ForwardedRequest
from redbtc.meter.decoding import START_SIZE, codings_in
from redbtc.meter.events import BLANK, is_stream
from redbtc.meter.meters import JSONMeter, Meter, PlainMeter
from redbtc.meter.shown_answers import ERROR, shown_events, shown_json
from redbtc.meter.streams import StreamMeter
from redbtc.slices import answer_queue, in_slices
from redbtc.upstream.begun_body import BegunBody
from redbtc.upstream.connection import ResponseBody

# First bytes that don't tell the coding yet: a part of a magic number, or blanks. Brotli has no
# magic number, and its first byte can be a blank.
TOO_SHORT = re.compile(
    rb"(?:[%b]{,%d}+|\x1f\x8b?|\x28(?:\xb5\x2f?)?|\x78)\Z" % (re.escape(BLANK), START_SIZE - 1)
)
# Is in a stored response that has not failed, and in a list of items, and comes before the output.
HAS_NOT_FAILED = re.compile(rb'"(?:error"\s*:\s*null|status"\s*:\s*"(?!failed")\w+")')
MAY_FAIL = re.compile(ERROR.pattern + rb'|"status"\s*:\s*"failed"')  # its error may follow
# The beginning of a JSON answer, cut before or within the name of what may be its error.
CUT_ERROR = re.compile(rb'\s*+\{\s*+(?:"(?:e(?:r(?:r(?:or?)?)?)?)?)?\Z')
MEDIA_TYPES = (b"audio/", b"video/", b"application/octet-stream")
BEGUN_EVENT = re.compile(rb"\s*(?:event|data): ?[\w{]")
MAX_BLANK = 4 << 10  # bytes before the response's beginning that are kept for its head
MAX_SHORT = 64 << 10  # bytes of a JSON answer that wait until it is known whether it is an error
MAX_UNNAMED = 256 << 10  # bytes that wait for the id of a background response to be written
AFTER_END_SECONDS = 0.7  # for bytes that follow the event that ends a stream


class Bypass:
    """Send events in which nothing can matter straight from the upstream's connection to the
    client's, past the request's task: for most events of a stream this is all that is done. It is
    called with each chunk, and returns whether it has sent it."""

    __slots__ = ("_deadline", "_idle_seconds", "_meter", "_request", "_response", "_send_now")

    def __init__(
        self,
        request: ForwardedRequest,
        meter: StreamMeter,
        response: ClientResponse,
        idle_seconds: float,
    ) -> None:
        self._request = request
        self._meter = meter
        self._response = response
        self._deadline: Deadline = request.deadline
        self._send_now = request.client_request.client.send_now
        self._idle_seconds = idle_seconds

    def __call__(self, chunk: bytes) -> bool:
        if self._response.sent == "nothing" or self._request.awaits_id:
            return False
        passed = self._meter.can_skip_parsing(chunk) and self._send_now(chunk)
        if passed:
            self._deadline.allow(self._idle_seconds)
            self._meter.count_text(chunk)
        return passed


def is_opaque(start: bytes, response: ClientResponse, request: ForwardedRequest) -> bool:
    """Return whether the answer to a request with or for audio is neither JSON nor a stream of
    events: audio, or the text of a transcription, whose first words can look like an event. Only
    speech can begin like JSON."""
    if request.endpoint.counts == "characters":
        is_media = response.content_type.startswith(MEDIA_TYPES)
        return is_media and not (request.asks_for_events and BEGUN_EVENT.match(start))
    is_packed = bool(codings_in(start, response.codings))
    is_events = response.is_labelled_stream or request.asks_for_events
    return not (is_packed or is_events or start.lstrip().startswith(b"{"))


class AnswerBody:
    """The body of one answer. `rest` is its end, as far as that was not sent; None until the row is
    written."""

    __slots__ = (
        *("_begun", "_deadline", "_has_sent", "_idle_seconds", "_own_body", "_request"),
        *("_response", "rest"),
    )

    def __init__(
        self,
        request: ForwardedRequest,
        response: ClientResponse,
        idle_seconds: float,
        own_body: bytes | None,
    ) -> None:
        """`own_body` is what the client gets in place of the body; None if it gets the body."""
        self._request = request
        self._response = response
        self._deadline = request.deadline
        self._idle_seconds = idle_seconds
        self._own_body = own_body
        # Some of the body has been sent. Blanks before a body of unknown length don't count.
        self._has_sent = False
        self._begun = b""  # first bytes, sent on, that were too few to tell the coding
        self.rest: bytes | None = None

    async def relay(self, body: httpx2.AsyncByteStream) -> None:
        """Send the body on as it comes, and settle the request at its end."""
        request, response = self._request, self._response
        self._deadline.allow(self._idle_seconds)
        # If it is all here already, it goes out at once when it is written down.
        is_whole = isinstance(body, (ResponseBody, BegunBody)) and body.whole
        is_whole = is_whole and not response.is_labelled_stream
        # The head tells the length only of what is not a stream.
        if not is_whole and not response.has_length:
            await response.send_head()
        chunks = body.__aiter__()
        meter, kept = await self._pass_chunks(body, chunks, is_whole)
        if meter is None:  # nothing has come
            meter = request.meter = request.choose_meter(response.is_labelled_stream)
        self._deadline.pause()
        ended_by_event = meter.state == "ended"
        if meter.at_once:
            meter.finish()
        else:
            await in_slices(
                meter.finish_steps(), answer_queue(request.key.account_id), started=True
            )
        await request.settle(request.outcome())
        self.rest = kept + meter.rest()
        if self._own_body is not None:
            self.rest = self._own_body
        elif not self._has_sent and (meter.report.failed or meter.is_cut_off):
            self.rest = self._shown(self.rest, meter)
        if ended_by_event:
            await self._follow(self.rest, meter, chunks)

    async def _pass_chunks(
        self, body: httpx2.AsyncByteStream, chunks: AsyncIterator[bytes], is_whole: bool
    ) -> tuple[Meter | None, bytes]:
        """Meter the chunks, and send on what may be sent, until the answer ends. Return the meter,
        None if nothing has come, and the bytes that are kept for the end."""
        request, response, deadline = self._request, self._response, self._deadline
        meter: Meter | None = None
        kept = b""
        async for chunk in chunks:
            if request.first_byte_ms is None:
                request.note_first_byte()
            if meter is None:
                meter = self._meter_of(chunk)
                if isinstance(meter, StreamMeter):
                    is_whole = False
                    if isinstance(body, ResponseBody):
                        body.bypass_with(Bypass(request, meter, response, self._idle_seconds))
            passed = await self._feed(meter, chunk) if meter else chunk
            # The head waits until it is known what the answer is.
            is_unknown = meter is None and response.sent == "nothing" and len(kept) < MAX_BLANK
            is_unnamed = request.awaits_id and len(kept) < MAX_UNNAMED
            if self._own_body is not None:
                continue
            kept += passed
            if not (is_whole or is_unknown or is_unnamed or not passed or self._waits(meter, kept)):
                passed, kept = self._shown(kept, meter), b""
                deadline.allow(self._idle_seconds)  # metering may have paused it
                await response.send(passed)
                self._has_sent = meter is not None or response.has_length
            if meter and meter.state != "open":
                kept = await self._send_until_usage(meter, chunks, kept)
            if meter and meter.state != "open":
                break
            deadline.allow(self._idle_seconds)
        return meter, kept

    def _waits(self, meter: Meter | None, begin: bytes) -> bool:
        """Return whether the beginning of an answer waits until it is known whether it reports an
        error about the operator's credentials: if it begins to report an error, or if it is a
        stored response of which is not known yet whether it has failed."""
        if self._has_sent or type(meter) is not JSONMeter or len(begin) >= MAX_SHORT:
            return False
        request = self._request
        if request.makes_answer:
            may_fail = CUT_ERROR.match(begin) is not None
        else:
            may_fail = not HAS_NOT_FAILED.search(begin)
        return (may_fail or MAY_FAIL.search(begin) is not None) and request.hides_errors

    def _shown(self, begin: bytes, meter: Meter | None) -> bytes:
        """Return an answer, or all of it that has come, as the client is shown it."""
        if self._has_sent or type(meter) is not JSONMeter or not self._request.hides_errors:
            return begin
        shown = shown_json(begin, is_cut_off=meter.is_cut_off)
        if shown is not begin:
            self._response.grow_length(len(shown) - len(begin))
        return shown

    def _meter_of(self, chunk: bytes) -> Meter | None:
        """Return the meter for an answer that begins with this chunk, or None while too few bytes
        have come to choose one, or only blanks. Such bytes are sent on without a meter."""
        request, response, begun = self._request, self._response, self._begun
        may_be_opaque = request.endpoint.audio and bool((begun + chunk).strip())
        if may_be_opaque and is_opaque(chunk, response, request):
            request.meter = PlainMeter()
            return request.meter
        if chunk[:1] == b"{" and not (response.is_labelled_stream or begun):
            return request.meter  # which is that of JSON
        if TOO_SHORT.match(begun + chunk):
            self._begun += chunk
            return None
        if codings := codings_in(begun + chunk, response.codings):
            request.meter_decoded(codings, response.is_labelled_stream, begun)
            return request.meter
        stream = is_stream(chunk, response.is_labelled_stream)
        if stream is None:
            return None
        request.meter = request.choose_meter(stream)
        if stream and self._own_body is None:
            response.drop_length()
        return request.meter

    async def _feed(self, meter: Meter, chunk: bytes) -> bytes:
        """Meter a part of the answer; return what may be sent on."""
        request = self._request
        if len(chunk) <= meter.at_once:
            passed = meter.feed(chunk)
        else:
            self._deadline.pause()
            account = answer_queue(request.key.account_id)
            passed = await in_slices(meter.steps(chunk), account, started=True)
        request.act_on_report()
        if request.unwritten:  # a background response must be on disk before its id is seen
            self._deadline.pause()
            await request.unwritten
            request.unwritten = None
        return passed

    async def _send_until_usage(
        self, meter: Meter, chunks: AsyncIterator[bytes], kept: bytes
    ) -> bytes:
        """Read on after the event that seems to end the stream, and send what follows if it goes on
        instead. Return the bytes that are kept."""
        while passed := await self._await_usage(meter, chunks):
            passed, kept = kept + passed, b""
            self._deadline.allow(self._idle_seconds)
            await self._response.send(passed)
        return kept

    async def _await_usage(self, meter: Meter, chunks: AsyncIterator[bytes]) -> bytes:
        """Read on for at most AFTER_END_SECONDS, since more usage may follow the event that ends
        the stream. If the stream goes on instead, return what may be sent on, else b"". It must be
        sent before more is read: the bypass could send that first."""
        self._deadline.pause()
        passed = b""
        until = asyncio.get_running_loop().time() + AFTER_END_SECONDS
        with contextlib.suppress(StopAsyncIteration, TimeoutError, httpx2.HTTPError):
            while meter.state == "ending" and not passed:
                async with asyncio.timeout_at(until):
                    chunk = await anext(chunks)
                passed = await self._feed(meter, chunk)
        return passed

    async def _follow(self, rest: bytes, meter: Meter, chunks: AsyncIterator[bytes]) -> None:
        """Send the event that ended the stream and what follows it, for AFTER_END_SECONDS. Bytes
        that a slow client has not taken by then stay in `rest`."""
        self._deadline.allow(AFTER_END_SECONDS)
        await self._give(rest)
        async for chunk in chunks:
            if isinstance(meter, StreamMeter) and self._request.hides_errors:
                chunk = shown_events(chunk)
            self.rest = chunk
            await self._give(chunk)

    async def _give(self, rest: bytes) -> None:
        await self._response.send_after_end(rest)
        self.rest = b""
