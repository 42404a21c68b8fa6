"""/v1/responses as OpenAI's WebSocket mode: messages pass both ways as they are.

Theory of operation. A *session* is one client's connection. It has a *line* to each upstream that
it needs, and *lanes*: requests of one `stream_id` take turns, lanes run side by side. A *turn* is
one response.create: a request like any other, with its key, its place, its hold and its row.

Rule 1. What the client may send is an allow-list: response.create, and response.steer for a
response of this connection. A refusal is an error event, and the connection stays.

Rule 2. An event belongs to the turn whose response it names. Where it names none it is its lane's;
a response that is new is that of the turn which waits for one. What an upstream reports for no turn
(a response nobody asked for, or one that comes after it was given up) gets a row of its own:
nothing that was used passes unwritten.

Rule 3. A steered response may be followed by another, by itself. What that can cost is held before
the steering goes on; it has its own row, in its turn's place.

Rule 4. A line has one fate. There is no way to stop a single response, so when a turn's time is up
its line is closed, and the other turns on it fail as they do when the upstream is gone. When the
last line has ended, so does the session, unless the gateway gave it up for a message that the
upstream has answered but does not read: then the next request opens another line.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
import orjson
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    ProtocolError,
)
from websockets.frames import DATA_OPCODES
from websockets.frames import Frame as WireFrame
from websockets.http11 import Request
from websockets.streams import StreamReader

import redbtc_ledger as ledger
from redbtc_billing import Hold
from redbtc_body import DEFAULT_IMAGE_MODEL, MAX_ITEMS, Frame
from redbtc_estimates import Estimate, Seen, estimate, is_complete
from redbtc_exchange import (
    PRESERVE_GROWTH,
    PRESERVE_SECONDS,
    Endpoint,
    Metered,
    account_for,
    bill,
    count_containers,
    homes_of,
    most_usual,
    new_request_id,
)
from redbtc_ledger import Home, Key
from redbtc_limits import FREE_BYTES, MAX_RINGS, TICK, Admission, Bucket, Clock, Reservation
from redbtc_meter import (
    LAST,
    MAX_AT_ONCE,
    Answer,
    Meter,
    Report,
    answer_steps,
    decode_answer,
    name_in,
    result_of,
)
from redbtc_pieces import Buffer, check_utf8
from redbtc_refusals import ClientLeft, Headers, Refusal, header, not_found, refusal_of
from redbtc_rows import Outcome, Row, Usage
from redbtc_settings import LedgerUnavailable
from redbtc_slices import TURNS, answers_of, in_slices
from redbtc_upstreams import Upstream, by_turn, headers_for_client, headers_for_upstream
from redbtc_watch import Receive, Scope, Send

if TYPE_CHECKING:
    from redbtc_proxy import Gateway

RESPONSES = Endpoint("/v1/responses", stores=True, limits=("max_output_tokens",), runs_tools=True)
MOST_SESSIONS = 100  # of an account
MOST_WAITING = 1000  # requests of a connection that have not left for an upstream
LINE_SECONDS = 2  # for closing a line, and for the end of a message that is answered already
WRITE_LIMIT = 32 << 10  # bytes that websockets buffers before it waits for the upstream to read
MAX_STRAYS = 16  # responses of a line that no request asked for, whose events are metered
MAX_STEERS = 4  # 'response.steer' events of a turn that the upstream has not answered
STEER_SECONDS = 30  # for the response that follows one which was steered
CLOSING_SECONDS = 11  # uvicorn's 10 for the client's part of closing, and one
POLICY_VIOLATION, INTERNAL_ERROR, UNSUPPORTED_DATA = 1008, 1011, 1003  # RFC 6455 §7.4.1
INVALID_DATA, TOO_BIG, TRY_AGAIN_LATER = 1007, 1009, 1013
REFUSED = "redbtc.refused"  # an event from the protocol: it refused a message and dropped it
NO_CODES = (1005, 1006, 1015)  # RFC 6455 §7.4.1: these must not be sent
NO_WEBSOCKET = (400, 404, 405, 426, 501)  # what an upstream without it answers
HANDSHAKE_HEADERS = (b"sec-websocket-", b"content-", b"date", b"connection", b"upgrade")
UPGRADE = [(b"upgrade", b"websocket")]
UNRESOLVED = ("response.steer.failed", "response.steer.pending")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────
# uvicorn parses and queues everything that has arrived at once. Here one coroutine parses a
# connection's frames one by one, in slices, and at most one message waits for the app. It stops
# reading from the socket while there is no memory for a message, and while the account's clients
# send more small frames than SMALL_FRAMES_PER_MINUTE. The rest of a refused message is read and
# thrown away. If the refusal ends the connection, so is what still arrives for a moment: closing on
# unread bytes would reset the connection before the client has read the close frame.

MAX_FRAGMENTS = 10_000  # of a message
MAX_CONTROL_BYTES = 125  # RFC 6455 §5.5
SMALL_BYTES = 1024  # a frame with fewer is small: it costs more for parsing than for its bytes
SMALL_FRAMES_PER_MINUTE = 6000  # of an account
REFUSED_FRAMES = 10  # how many small frames a refused event counts as
MAX_PAUSE = 30  # seconds that refused events can pause reading; a ping waits 60 for its answer
LINGER_SECONDS = 2  # for the client to read the close frame and to close its side
QUIET_SECONDS = 0.25  # without bytes: the client has probably sent all that it was sending
MAX_LINGER = 256 << 20  # bytes that are thrown away in that time; reading a message costs more
MAX_PART = 256 << 10  # bytes that are masked or unmasked in one step; a multiple of the mask's four
FIN, CONTROL, MASKED = 0x80, 0x08, 0x80  # RFC 6455 §5.2: bits of a head's first and second byte
LENGTHS = {126: 2, 127: 8}  # by the second byte of a head: the bytes in which the length follows
LONG_HEAD = 14  # bytes of a head with a length of eight bytes


class FrameReader(StreamReader):
    """The buffer of a connection's parser. It makes the parser parse one frame at each step, and
    wait while there is no room for a payload. The parser unmasks a payload in one call, so a long
    frame is presented to it as several fragments."""

    def __init__(self) -> None:
        super().__init__()
        self.max_bytes = 0  # of a message, which the frames announce
        self.message_bytes = 0  # that the frames of the current message have announced
        self.between_frames = True
        self.continues = False  # what is read is a part of a long frame, and not its first
        self.room = 0  # bytes of payload that may be read
        self.wanted = 0  # bytes of a payload that waits for room
        self.drops = False  # whether payloads are thrown away
        self._first = 0  # of a long frame: the first byte, the mask, and what is to be shown of it
        self._mask = b""
        self._left = 0

    @property
    def too_large(self) -> bool:
        """Whether the message has more bytes than it may have. No more of it is read."""
        return self.message_bytes > self.max_bytes

    def at_eof(self) -> Generator[None, None, bool]:
        """Return whether the stream has ended. The parser calls this before each frame. Raises
        ProtocolError for a control frame that is too long."""
        self.between_frames = not self._left
        yield
        ended = yield from super().at_eof()
        self.between_frames = False
        self.continues = self._left > 0
        if not self.continues:
            yield from self._look_at_head()
        if self._left:
            self._begin_part()
        return ended

    def _look_at_head(self) -> Generator[None, None, None]:
        """Add a frame's length to its message's. Take the head of a long frame out, once there is
        room for it. Does not end for a message that is too large."""
        while len(self.buffer) < 2:
            yield
        first, second = self.buffer[:2]
        size = second & ~MASKED
        if first & CONTROL:
            if size > MAX_CONTROL_BYTES:
                raise ProtocolError("control frame too long")
            return
        if size in LENGTHS:
            end = 2 + LENGTHS[size]
            while len(self.buffer) < end:
                yield
            size = int.from_bytes(self.buffer[2:end], "big")
        self.message_bytes += size
        while self.too_large:
            yield
        if size > MAX_PART and second & MASKED:  # else the parser refuses it
            while len(self.buffer) < LONG_HEAD:
                yield
            yield from self._wait_for_room(size)
            self._first, self._mask, self._left = first, bytes(self.buffer[10:LONG_HEAD]), size
            del self.buffer[:LONG_HEAD]

    def _begin_part(self) -> None:
        """Put the head of a fragment before the next part of a long frame."""
        size = min(self._left, MAX_PART)
        self._left -= size
        first = 0 if self.continues else self._first & ~FIN
        first |= 0 if self._left else self._first & FIN
        self.buffer[:0] = struct.pack("!BBQ", first, MASKED | 127, size) + self._mask

    def _wait_for_room(self, n: int) -> Generator[None, None, None]:
        while n > self.room and not self.drops:
            self.wanted = n
            yield

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """Return the next `n` bytes: a part of a frame's head, or all of its payload."""
        if n > MAX_CONTROL_BYTES:
            yield from self._wait_for_room(n)
            if self.drops:
                yield from self._drop(n)
                return bytearray()
            self.room -= n
        return (yield from super().read_exact(n))

    def _drop(self, n: int) -> Generator[None, None, None]:
        while n > len(self.buffer):
            n -= len(self.buffer)
            self.buffer.clear()
            yield
        del self.buffer[:n]


class Intake:
    """The limits within which a connection is read."""

    def __init__(self, gateway: Gateway, key: Key) -> None:
        self._gateway = gateway
        self.reserved = Reservation(gateway.limits, key, gateway.settings)
        self.clock = Clock(gateway.clocks)
        self.small_frames = gateway.limits.small_frames(key)
        self.max_bytes = 0  # of a message
        self.message_seconds = 0.0
        self.renew()

    def renew(self) -> None:
        """Read the limits of the next message from the settings, which can have changed."""
        settings = self.reserved.settings = self._gateway.settings
        self.max_bytes = settings.server.max_body_bytes
        self.message_seconds = settings.server.body_timeout_seconds


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol with two keys more in its scope: "read_frames", which reads the
    client's messages once the connection is accepted, and "abort", which ends the connection of a
    client that does not read, and so would never see a close frame."""

    _intake: Intake
    _reading: asyncio.Task[Any] | None = None
    _arrival: asyncio.Future[None] | None = None  # done when bytes have arrived
    _paused = False
    _heard = False  # bytes have arrived since the last ping
    _ended = False  # no more frames are read
    _discarded = 0  # bytes that arrived after that
    # For the message that is being read:
    _reserved = 0  # bytes of memory
    _fragments = 0
    _seconds = 0.0  # that the client has left to send the rest
    _whole: Buffer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn.max_message_size = None  # the reader bounds it
        self.conn.reader = self._reader = FrameReader()
        self.conn.parser = self.conn.parse()
        next(self.conn.parser)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            scope = cast(Scope, self.scope)
            scope["abort"], scope["read_frames"] = self.transport.abort, self.read_frames

    def send_keepalive_ping(self) -> None:
        self._heard = False
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """Close the connection of a client that has not answered a ping. While it sends a long
        frame it can't answer, and while it is not read its answer can't be seen: then go on
        waiting."""
        if self._heard or self._paused:
            assert self.ping_timeout is not None, "it has passed"
            self._heard = False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self._ended = self._ended or self.conn.eof_sent
        self.loop.call_later(CLOSING_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        """Close the connection, unless that has begun: a second close frame can't be sent."""
        if not self.transport.is_closing():
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._reading:
            self._reading.cancel()

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:  # this is the whole head
            super().data_received(data)
            if not self.handshake_initiated:  # which can't be read: nothing will answer it
                self.transport.abort()
            return
        if self._ended:
            self._discard(len(data))
            return
        self._heard = True
        self._reader.feed_data(data)
        if self._arrival and not self._arrival.done():
            self._arrival.set_result(None)
        elif not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def receive(self) -> Any:
        message = await self.queue.get()
        self.queue.task_done()
        return message

    async def read_frames(self, intake: Intake) -> None:
        """Read the client's frames until the connection ends."""
        if self.disconnected:
            return
        self._intake, self._reading = intake, asyncio.current_task()
        with intake.reserved:
            try:
                while not self._ended:
                    await in_slices(self._handle_frames(), intake.reserved.account_id)
                    await self._wait()
            except MemoryError:
                self._end(Refusal("overloaded"), TRY_AGAIN_LATER)
        self._reader.buffer.clear()
        self.frames.clear()
        await self._linger()

    async def _linger(self) -> None:
        """Throw away what still arrives. Once the close frame is sent, give the client
        LINGER_SECONDS to end its side, and end the sending side when nothing has arrived for
        QUIET_SECONDS: a reverse proxy can reset the connection of a client that still sends."""
        self._resume()
        while not (self.close_sent or self.transport.is_closing()):
            await asyncio.sleep(TICK)
        if self.transport.is_closing():
            return
        if self.close_timer:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        discarded = -1
        while discarded != self._discarded:
            discarded = self._discarded
            await asyncio.sleep(QUIET_SECONDS)
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self.transport.write_eof()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_LINGER:
            self.transport.abort()

    def handle_parser_exception(self) -> None:
        """Send the close frame for a frame that can't be parsed."""
        close = self.conn.close_sent
        assert close is not None, "the parser has failed the connection"
        self._hand_over(
            {"type": "websocket.disconnect", "code": close.code, "reason": close.reason}
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True

    @property
    def _between_messages(self) -> bool:
        return self._reader.between_frames and not self._fragments

    def _handle_frames(self) -> Generator[None, None, None]:
        """Handle the frames that have arrived, until there is something to wait for (`_wait`)."""
        if self._between_messages:
            self._intake.renew()
            self._reader.max_bytes = self._intake.max_bytes
            self._seconds = self._intake.message_seconds
        small_frames = self._intake.small_frames
        small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        while not self._ended and self._whole is None and self.queue.empty():
            if not small_frames.remaining:
                return
            self.conn.receive_data(b"")  # parses one frame
            self._ended = self.conn.eof_sent  # after an error, or the client's close frame
            if self.conn.parser_exc:
                self.handle_parser_exception()
            if not self.conn.events:
                return
            self._count(cast(WireFrame, self.conn.events[0]))
            self.handle_events()
            yield

    def _count(self, frame: WireFrame) -> None:
        """Charge a small frame, and refuse a message that has too many fragments."""
        if self._reader.continues:
            return
        if len(frame.data) < SMALL_BYTES:
            self._intake.small_frames.charge(1)
        self._fragments += frame.opcode in DATA_OPCODES
        if self._fragments > MAX_FRAGMENTS:
            self._refuse_size()

    def _refuse_size(self) -> None:
        allowed = f"at most {self._intake.max_bytes} bytes in {MAX_FRAGMENTS} fragments"
        self._end(Refusal("request_too_large", f"A message may have {allowed}."), TOO_BIG)

    def handle_cont(self, event: WireFrame) -> None:
        """Append a fragment to the message: joining all of them at the end could take long."""
        if not (self.frames and isinstance(self.frames[0], bytearray)):
            cast(list[Buffer], self.frames)[:] = [bytearray().join(self.frames)]
        self.frames[0] += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """The message is whole."""
        whole = self.frames[0] if self.frames else b""
        self.frames, self._fragments, self._reader.message_bytes = [], 0, 0
        self._seconds = self._intake.message_seconds
        if self._reader.drops or self.close_sent:
            self._reader.drops = False
            self._give_back(0)
        else:
            self._whole = whole

    async def _wait(self) -> None:
        small_frames = self._intake.small_frames
        if self._ended:
            return
        if self._reader.too_large:
            self._refuse_size()
        elif self._reader.wanted:
            await self._make_room(self._reader.wanted)
        elif self._whole is not None:
            await self._deliver(self._whole)
        elif not self.queue.empty():
            await self.queue.join()
        elif not small_frames.remaining:
            await asyncio.sleep(small_frames.seconds_until(REFUSED_FRAMES))
        else:
            await self._wait_for_bytes()

    async def _make_room(self, wanted: int) -> None:
        """Reserve memory for a frame of `wanted` bytes, and for the further frames of a message at
        least as much again as it has. If none comes free, refuse the message."""
        reader, known = self._reader, self._reserved
        size = max(wanted - reader.room, min(known, self._intake.max_bytes - known))
        reader.wanted = 0
        if not self.close_sent and await self._reserve(size):
            reader.room += size
        else:
            reader.drops = True
            self.frames.clear()

    async def _deliver(self, whole: Buffer) -> None:
        """Hand a message on, with the memory that it takes."""
        size = max(len(whole), SMALL_BYTES)
        self._whole = None
        if await self._reserve(size - self._reserved):
            self._give_back(size)
            self._reserved = 0
            kind = self.curr_msg_data_type
            self._hand_over({"type": "websocket.receive", kind: whole, "reserved": size})

    async def _reserve(self, size: int) -> bool:
        """Reserve `size` bytes more and return True. If there is no memory for them, refuse the
        message and return False."""
        try:
            await self._intake.reserved.take(max(0, size), self._intake.clock)
        except Refusal as refusal:
            self._give_back(0)
            self._hand_over({"type": REFUSED, "refusal": refusal, "close": None})
            return False
        self._reserved += max(0, size)
        return True

    def _give_back(self, size: int) -> None:
        """Give back the message's memory except for `size` bytes."""
        self._intake.reserved.give_back(self._reserved - size)
        self._reserved, self._reader.room = size, 0

    async def _wait_for_bytes(self) -> None:
        """Wait until bytes arrive. Stop reading if a message takes too long to arrive."""
        self._arrival = self.loop.create_future()
        self._resume()
        if self._between_messages:
            await self._arrival
            return
        clock = self._intake.clock
        try:
            with clock.running(self._seconds):
                await self._arrival
            self._seconds = clock.deadline - clock.now()
        except TimeoutError:
            message = f"A message took longer than {self._intake.message_seconds:g} s to arrive."
            self._end(Refusal("request_timeout", message), POLICY_VIOLATION)

    def _resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def _end(self, refusal: Refusal, close: int) -> None:
        """Stop reading frames, and let the app close the connection with the code `close`."""
        self._ended = True
        self._hand_over({"type": REFUSED, "refusal": refusal, "close": close})

    def _hand_over(self, message: Any) -> None:
        self.queue.put_nowait(message)


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────


class EventMeter(Meter):
    """Meters the events of one response."""

    def __init__(self) -> None:
        self.report = Report(images=False)
        self.ended = False
        self.steered = False  # it ended for another to follow

    async def take(self, event: Answer, account_id: str) -> None:
        """Meter one of its events."""
        if event.is_long:
            await in_slices(self._take(event), account_id, begun=True)
        else:
            result_of(self._take(event))

    def _take(self, event: Answer) -> Generator[None, None, None]:
        kind = kind_of(event)
        if event.delta:
            self.report.passed.see_delta(event, chat=False)
        if event.response or event.item or kind == "error" or kind.endswith("partial_image"):
            yield from self.report.note(event)
        self.ended = self.ended or kind == "error" or is_last(event)
        if kind == "response.incomplete" and event.inner:
            details = event.inner.incomplete_details
            self.steered = isinstance(details, dict) and details.get("reason") == "steered"


def kind_of(event: Answer) -> str:
    return event.type if isinstance(event.type, str) else ""


def response_named(event: Answer) -> str | None:
    """The id of the response that an event tells of."""
    return name_in(event.inner.id) if event.inner else None


def is_last(event: Answer) -> bool:
    """Whether it is the end of a response."""
    return bool(LAST.fullmatch(kind_of(event).encode()))


def is_lane(stream_id: Any) -> bool:
    return stream_id is None or isinstance(stream_id, str)


def status_of(event: Answer) -> int:
    """That of an error event, if it has a proper one."""
    return event.status if type(event.status) is int and 400 <= event.status <= 599 else 500


class Steer(NamedTuple):
    """Input for a response in flight, of which nobody has said yet what became of it: the most
    tokens that it has, and about how many; and what the response that follows can cost."""

    response_id: str
    tokens: int
    input_estimate: int
    money: Hold


class Turn(Metered):
    """One response.create, and the responses that follow by themselves where it is steered."""

    meter: EventMeter

    def __init__(self, session: Session, lane: Lane, scope: Scope, admission: Admission) -> None:
        gateway = session.gateway
        super().__init__(gateway, scope, RESPONSES, Clock(gateway.clocks), admission)
        self.meter = EventMeter()
        self.lane = lane
        self.line: Line | None = None
        self.failure: Outcome | None = None  # where its line was lost
        self.over: asyncio.Future[None] = gateway.clocks.loop.create_future()
        self._session = session
        self._steers: list[Steer] = []
        self.holds = contextlib.ExitStack()  # of responses that follow

    @property
    def response_id(self) -> str | None:
        return self.meter.report.response_id

    @property
    def waits_for_response(self) -> bool:
        """Whether one that is new can be its."""
        return self.response_id is None if not self.settled else not self.done

    @property
    def billed(self) -> bool:
        """Whether its usage, reported or estimated, is in the ledger."""
        return self.settled and self._row.usage_source != "none"

    @property
    def done(self) -> bool:
        """Nothing more is to come."""
        return self.settled and not self.meter.steered and not self._steers

    def end(self) -> None:
        """Wait for nothing more."""
        if not self.over.done():
            self.over.set_result(None)

    def lose(self, outcome: Outcome) -> None:
        """Its line is gone."""
        self.failure = "client_disconnected" if self.clock.client_left else outcome
        self.end()

    async def steer(self, response_id: str, frame: Frame, admission: Admission) -> None:
        """Hold what the response that follows can cost, before the steering goes on: it reads what
        this one has read and said, and the frame. Raises Refusal."""
        content = self._content
        other = frame.extras & ~content.extras
        if other or frame.lasting_models not in (None, content.lasting_models):
            message = (
                "Steering can't name an item of a response whose input has other tools, or ask for "
                "another lifetime in the prompt cache."
            )
            raise Refusal("invalid_request", message, param="input")
        if len(self._steers) >= MAX_STEERS:
            message = f"This response has {MAX_STEERS} unanswered 'response.steer' events already."
            raise Refusal("concurrency_limit_exceeded", message)
        if len(content.chosen_ids) + len(frame.chosen_ids) > MAX_ITEMS:
            message = f"The input of this response has more than {MAX_ITEMS} items with ids."
            raise Refusal("invalid_request", message, param="input")
        admission.charge("tokens", 0)
        tokens = frame.most_input_tokens + frame.inherited_tokens
        waiting = sum(steer.tokens for steer in self._steers)
        money = await self.hold(content, self._read_next(tokens + waiting))
        if self.settled or self.response_id != response_id:  # it has ended meanwhile
            money.__exit__()
            raise not_found("previous_response_id", response_id)
        self.holds.enter_context(money)
        content.chosen_ids |= frame.chosen_ids
        self._steers.append(Steer(response_id, tokens, frame.input_estimate, money))

    def _read_next(self, steered: int) -> int:
        """Return how many tokens a response that follows reads besides the request at most: what
        this one has read and said, and what it was steered by."""
        return self._further_input + self._most_output(self._money.tariff) + steered

    async def take(self, event: Answer, idle_seconds: float) -> None:
        """One of its events has come; it may be sent on when this returns."""
        kind = kind_of(event)
        self.clock.allow(idle_seconds)
        if self._steers and (kind in UNRESOLVED or (kind == "error" and self.settled)):
            self._steers.pop(0).money.__exit__()  # no response will follow
        elif kind not in UNRESOLVED:
            if self.settled and response_named(event) not in (None, self.response_id):
                await self._follow()
            if not self.settled:
                await self._meter(event)
        if self.settled:
            self.clock.allow(STEER_SECONDS)

    async def _meter(self, event: Answer) -> None:
        if self.first_byte_ms is None:
            self.first_byte_ms = self.elapsed_ms()
        await self.meter.take(event, self.key.account_id)
        self.note()
        if self.meter.ended and not self.settled:
            self.status = status_of(event) if kind_of(event) == "error" else 200
            await self.settle(self.outcome())

    def _learn(
        self, made: dict[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, Home]:
        """Learn the ids that the upstream made. This connection can name them even if they are not
        stored."""
        homes = super()._learn(made, usage, likely)
        self._session.remember(homes)
        return homes

    @property
    def home(self) -> Home:
        """Where the objects that it makes are stored. `minted_input` is false, since a steer event
        can still add input with ids of the client's own."""
        return super().home._replace(minted_input=False)

    async def _follow(self) -> None:
        """A response that follows by itself has a row of its own. It takes in all that was sent to
        the one before."""
        before = self.response_id
        of_it = [each for each in self._steers if each.response_id == before]
        self._further_input = self._read_next(sum(each.tokens for each in of_it))
        self._steers = [each for each in self._steers if each.response_id != before]
        for steer in of_it[:-1]:  # the last one's hold includes what they have
            steer.money.__exit__()
        money = of_it[-1].money if of_it else await self._session.no_hold(self._row)
        read, written = self._row.usage.input_tokens or 0, self._row.usage.output_tokens or 0
        self._input_estimate = read + written + sum(steer.input_estimate for steer in of_it)
        if self.over.done():
            return  # it was given up meanwhile
        self._money = money
        self.scope = {**self.scope, "request_id": new_request_id(), "started": time.monotonic()}
        self._row = self.new_row(self._row.requested_model, self._row.upstream)
        self.date_row()
        self._left_at = time.monotonic()
        self._preserved_after = PRESERVE_SECONDS / PRESERVE_GROWTH
        self.meter, self.settled, self.first_byte_ms, self._named = EventMeter(), False, None, 0
        await ledger.settle(self.gateway.store, self._row)  # pending, however long that takes


class Lane:
    """Requests of one stream_id, one after the other."""

    def __init__(self, stream_id: str | None) -> None:
        self.stream_id = stream_id
        self.waiting: deque[Frame] = deque()
        self.turn: Turn | None = None


class Stray:
    """A response that no request asked for, while its events pass."""

    def __init__(self) -> None:
        self.meter = EventMeter()
        self.begun = time.monotonic()

    @property
    def worked_seconds(self) -> float:
        return time.monotonic() - self.begun


class Line:
    """A session's connection to one upstream."""

    def __init__(self, session: Session, upstream: Upstream, connection: ClientConnection) -> None:
        self._start, self._account_id = session.start, session.account_id
        self.upstream = upstream
        self.connection = connection
        self.lost = False
        self.given_up = False
        self.waits_for_client = False  # that reads slowly
        self.strays: dict[str | None, Stray] = {}  # by lane
        self.passing: asyncio.Task[None]  # its events to the client, until it is closed

    async def send(self, text: Buffer, over: asyncio.Future[None] | None = None) -> bool:
        """Send a message and return True. Return False if the upstream has not read it LINE_SECONDS
        after `over` is done. Raises ConnectionClosed. If the caller stops waiting, a long text is
        sent on: nothing could follow a half of it."""
        if len(text) + self.connection.transport.get_write_buffer_size() <= WRITE_LIMIT:
            await self.connection.send(text, text=True)
            return True
        parts = text if len(text) <= MAX_PART else in_parts(text, self._account_id)
        sending = self._start(self.connection.send(parts, text=True))
        if over:
            await asyncio.wait({sending, over}, return_when=asyncio.FIRST_COMPLETED)
            if not (await asyncio.wait({sending}, timeout=LINE_SECONDS))[0]:
                return False
        await asyncio.shield(sending)
        return True

    async def send_within(self, text: Buffer, seconds: float) -> None:
        """Raises ConnectionClosed, also where the upstream doesn't read for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.send(text)
                return
        self.connection.transport.abort()
        await self.connection.wait_closed()

    async def close(self) -> None:
        """Also where the upstream has stopped reading: websockets would wait for that for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINE_SECONDS):
                await self.connection.close()
        self.connection.transport.abort()


async def in_parts(text: Buffer, account_id: str) -> AsyncIterator[memoryview]:
    """Iterate over the parts of a long text, in turns with other long work."""
    for at in range(0, len(text), MAX_PART):
        yield memoryview(text)[at : at + MAX_PART]
        await TURNS.wait(account_id, begun=True)


class LineLost(Exception):
    """No upstream could be reached."""


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────


class Session:
    """One client's WebSocket."""

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self.gateway = gateway
        self._scope = scope
        self._receive = receive
        self._send = send
        self._key: Key
        self._lanes: dict[str | None, Lane] = {}
        self._lines: set[Line] = set()
        self._opening: dict[Upstream, asyncio.Task[Line]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._made: dict[str, Home] = {}  # on this connection, stored or not
        self._written: set[str] = set()  # responses whose usage is in the ledger
        self._waiting: dict[Frame, Admission] = {}  # requests that have no place yet
        self._reserved: Reservation  # memory for those, and for the message that is being read
        self._small_frames: Bucket
        self._patience = 0.0  # seconds for the client to read
        self._sends, self._given = 0, 0  # messages that wait for that, and that need not
        self._watching: asyncio.TimerHandle
        self._accepted = asyncio.Event()  # the client may be sent events
        self._closed = False  # to the client
        self._expired = False

    @property
    def account_id(self) -> str:
        """The id of the account that the session belongs to."""
        return self._key.account_id

    async def run(self) -> None:
        """From the handshake to the end. Raises Refusal before the connection is accepted,
        ClientLeft."""
        await self._receive()  # that it wants to connect
        self._key = self.gateway.enter(self._scope)
        self._charge_handshake()
        sessions, account_id = self.gateway.sessions, self._key.account_id
        if sessions[account_id] >= MOST_SESSIONS:
            message = f"This account has {MOST_SESSIONS} WebSockets open, which is the most."
            raise Refusal("concurrency_limit_exceeded", message)
        sessions[account_id] += 1
        try:
            with self.gateway.cutting(self._key, self._scope["abort"]):
                await self._run()
        except OSError:
            raise ClientLeft from None
        finally:
            await self._end()
            sessions[account_id] -= 1

    def _charge_handshake(self) -> None:
        """Count the handshake as REFUSED_FRAMES small frames: each one connects to an upstream.
        Raises Refusal where the account's rate is used up."""
        frames = self.gateway.limits.small_frames(self._key)
        frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        wait = frames.seconds_until(REFUSED_FRAMES)
        if wait:
            message = "Too many WebSocket handshakes and small frames of this account."
            raise Refusal("rate_limit_exceeded", message, retry_after=wait)
        frames.charge(REFUSED_FRAMES)

    async def _run(self) -> None:
        line = await self._first_line()
        self._patience = line.upstream.settings.idle_timeout_seconds
        await self._send({"type": "websocket.accept", "headers": self._headers(line.connection)})
        self._accepted.set()
        self.gateway.watch.answered(self._scope, 101)
        most, loop = line.upstream.settings.total_timeout_seconds, self.gateway.clocks.loop
        expiry = loop.call_later(most, self._expire)
        self._watch_reading(-1)
        self._reader = asyncio.create_task(self._read_frames())
        try:
            await self._read()
        finally:
            expiry.cancel()
            self._watching.cancel()
            loop.call_later(CLOSING_SECONDS, self._scope["abort"])

    async def _read_frames(self) -> None:
        """Read frames until the client's connection ends, which can be after the session's end."""
        intake = Intake(self.gateway, self._key)
        self._reserved, self._small_frames = intake.reserved, intake.small_frames
        try:
            await self._scope["read_frames"](intake)
        except Exception as error:
            self.gateway.watch.failed(self._scope, error)
            self._scope["abort"]()

    def _headers(self, connection: ClientConnection) -> Headers:
        """Those of the handshake, for the client."""
        assert connection.response is not None, "the handshake is over"
        request_id, given = self._scope["request_id"].encode(), connection.response.headers
        headers = headers_for_client(
            [(name.encode(), value.encode("latin-1")) for name, value in given.raw_items()]
        )
        headers = [each for each in headers if not each[0].startswith(HANDSHAKE_HEADERS)]
        if header(headers, b"x-request-id") is None:
            headers.append((b"x-request-id", request_id))
        return [*headers, (b"x-redbtc-request-id", request_id)]

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it; there may be nobody

    def _expire(self) -> None:
        """No new requests; when those in flight are done, it ends."""
        self._expired = True
        if not self._lanes:
            self.start(self._refuse(expired(), None, close=POLICY_VIOLATION))

    def _watch_reading(self, given: int) -> None:
        """Let go of a client that has read nothing since so many messages were given to it."""
        if self._sends and self._given == given:
            self._scope["abort"]()
        again, loop = self._watch_reading, self.gateway.clocks.loop
        self._watching = loop.call_later(self._patience, again, self._given)

    async def _end(self) -> None:
        """The client is gone: what is in flight may be read on for its usage, then all ends."""
        self._closed = True
        self._accepted.set()  # there is nobody to be waited for
        turns = [lane.turn for lane in self._lanes.values() if lane.turn]
        for turn in turns:
            turn.clock.client_left = True  # it begins nothing more
        for lane in self._lanes.values():
            while lane.waiting:
                frame = lane.waiting.popleft()
                self._waiting[frame].put_back()
                self._leave(frame)
        for number, turn in enumerate(turns, 1):
            turn.clock.leave()
            if number % MAX_RINGS == 0:
                await asyncio.sleep(0)  # its tasks have something to do now
        while self._lanes:
            await asyncio.sleep(TICK)
        for opening in self._opening.values():
            opening.cancel()
        for line in list(self._lines):
            await line.close()
            await asyncio.wait({line.passing})  # it writes down what was nobody's
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Lines

    async def _first_line(self) -> Line:
        """Connect to an upstream before the client is answered, so that a refusal of a WebSocket is
        ours, too."""
        speaking = [each for each in self.gateway.upstreams if each.speaks_websocket]
        usable = [upstream for upstream in speaking if upstream.usable]
        if not usable:
            raise Refusal("no_upstream", retry_after=5)
        refused = "upstream_unreachable"
        for upstream in by_turn(usable):
            try:
                return await self._line_to(upstream)
            except OSError:
                continue
            except Refusal as refusal:
                refused = refusal.code
        raise Refusal(refused, headers=UPGRADE if refused == "upgrade_required" else ())

    async def _line_to(self, upstream: Upstream) -> Line:
        """The line to an upstream, a new one where there is none. Raises OSError, Refusal."""
        for line in self._lines:
            if line.upstream is upstream and not line.lost:
                return line
        if upstream not in self._opening:
            self._opening[upstream] = task = self.start(self._open(upstream))
            task.add_done_callback(lambda _: self._opening.pop(upstream))
        return await asyncio.shield(self._opening[upstream])

    async def _open(self, upstream: Upstream) -> Line:
        account_id, store = self._key.account_id, self.gateway.store
        headers = headers_for_upstream(self._scope["headers"], store, account_id)
        try:
            connection = await upstream.connect(headers)
        except InvalidStatus as error:
            if error.response.status_code in NO_WEBSOCKET:
                raise Refusal("upgrade_required") from None
            raise Refusal("upstream_unreachable") from None
        except InvalidHandshake:
            raise Refusal("upstream_protocol_error") from None
        line = Line(self, upstream, connection)
        self._lines.add(line)
        line.passing = self.start(self._pass_events(line))
        return line

    def _turns_on(self, line: Line) -> list[Turn]:
        """Those that are not done, in the order of their lanes."""
        turns = [lane.turn for lane in self._lanes.values() if lane.turn]
        return [turn for turn in turns if turn.line is line and not turn.done]

    def _lose(self, line: Line, outcome: Outcome = "upstream_failed") -> None:
        """Nothing that comes from it is passed on any more."""
        line.lost = True
        for turn in self._turns_on(line):
            turn.lose(outcome)

    def _give_up(self, line: Line) -> None:
        """Close a line whose upstream has answered a message that it does not read to its end. No
        other message can follow on it."""
        line.given_up = True
        self._lose(line)
        self.start(line.close())

    # From the client

    async def _read(self) -> None:
        while (message := await self._receive())["type"] != "websocket.disconnect":
            if message["type"] == REFUSED:
                self._count(self._new_scope(), message["refusal"])
                await self._refuse(message["refusal"], None, message["close"])
            elif "text" in message:
                await self._take(message["text"], message["reserved"])
            else:
                self._reserved.give_back(message["reserved"])
                await self._close(UNSUPPORTED_DATA, "Only text is understood here.")

    async def _take(self, text: Buffer, reserved: int) -> None:
        """One message. Its memory is given back unless it waits for a place."""
        frame: Frame | None = None
        try:
            key = self.gateway.enter(self._scope)
            with self.gateway.limits.charge(key, self.gateway.settings.limits) as admission:
                frame = await in_slices(Frame.read(text), key.account_id)
                if frame.excess:
                    await self._reserved.take(frame.excess, None)
                    reserved += frame.excess
                await self._act(frame, admission)
        except (Refusal, MemoryError) as error:
            refusal = refusal_of(error)
            self._count(self._new_scope(), refusal)
            close = closing_code(refusal)
            if refusal.code == "invalid_json" and not await is_utf8(text, self.account_id):
                close = INVALID_DATA
            stream_id = frame.facts.stream_id if frame else stream_id_in(text)
            await self._refuse(refusal, stream_id, close)
        except ConnectionClosed:
            pass  # the turn's end is on its way
        if frame not in self._waiting:
            self._reserved.give_back(reserved)

    def _count(self, scope: Scope, refusal: Refusal) -> None:
        """Charge an event that is refused: so many small frames would be as much work. At most
        MAX_PAUSE is owed, since many requests that wait can be refused at once."""
        self._small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        if self._small_frames.seconds_until(REFUSED_FRAMES) < MAX_PAUSE:
            self._small_frames.charge(REFUSED_FRAMES)
        self.gateway.watch.refused(scope, refusal)

    async def _act(self, frame: Frame, admission: Admission) -> None:
        facts = frame.facts
        if facts.type == "response.steer":
            await self._steer(frame, admission)
            return
        if facts.type != "response.create":
            message = "'type' is missing."
            if facts.type is not None:
                message = f"'{facts.type}' is not an event that is understood here."
            raise Refusal("invalid_request", message, param="type")
        frame.check_model(needed=True)
        if len(self._waiting) >= MOST_WAITING:
            raise Refusal("concurrency_limit_exceeded", "Too many requests wait for their turn.")
        self._waiting[frame] = admission
        lane = self._lanes.get(facts.stream_id)
        if lane is None:
            lane = self._lanes[facts.stream_id] = Lane(facts.stream_id)
            self.start(self._work(lane))
        lane.waiting.append(frame)

    async def _steer(self, frame: Frame, admission: Admission) -> None:
        """More input for a response that is in flight on this connection."""
        frame.check_steering()
        response_id = frame.facts.previous_response_id or ""
        if frame.offers_tools:
            raise Refusal("invalid_request", "Steering offers no tools.", param="input")
        turns = [lane.turn for lane in self._lanes.values() if lane.turn and lane.turn.line]
        for turn in turns:
            if response_id and turn.response_id == response_id and not turn.settled:
                await self.gateway.homes(self.gateway.enter(self._scope), frame, self._made)
                await turn.steer(response_id, frame, admission)
                if (line := turn.line) and not line.lost:
                    await line.send_within(frame.sent, line.upstream.settings.idle_timeout_seconds)
                return
        raise not_found("previous_response_id", response_id)

    def _new_scope(self) -> Scope:
        return {
            "request_id": new_request_id(),
            "started": time.monotonic(),
            "where": RESPONSES.path,
            "headers": self._scope["headers"],
        }

    async def _work(self, lane: Lane) -> None:
        while lane.waiting:
            frame, scope = lane.waiting.popleft(), self._new_scope()
            turn = lane.turn = Turn(self, lane, scope, self._waiting[frame])
            try:
                with turn.admission:
                    await self._create(turn, frame)
            except Refusal as refusal:
                self._count(scope, refusal)
                await self._refuse(refusal, lane.stream_id, closing_code(refusal))
            except ClientLeft:
                self.gateway.watch.left(scope)
            except Exception as error:
                self.gateway.watch.failed(scope, error)
                await self._refuse(refusal_of(error), lane.stream_id, INTERNAL_ERROR)
            finally:
                self._leave(frame)
                lane.turn = None
        del self._lanes[lane.stream_id]
        if self._expired and not self._lanes:
            self._expire()

    async def _create(self, turn: Turn, frame: Frame) -> None:
        """Raises Refusal, ClientLeft."""
        gateway, facts = self.gateway, frame.facts
        if self._expired:
            turn.admission.put_back()
            raise expired()
        if self._closed:
            raise ClientLeft
        key = gateway.enter(self._scope)
        if facts.background:
            message = "A background response can't be created over a WebSocket."
            raise Refusal("invalid_request", message, param="background")
        upstreams = await gateway.upstreams_for(key, frame, self._made)
        speaking = [upstream for upstream in upstreams if upstream.speaks_websocket]
        if not speaking:
            raise Refusal("no_upstream", "No upstream takes this model over a WebSocket.")
        here = {line.upstream for line in self._lines}
        speaking.sort(key=lambda upstream: upstream not in here)
        with gateway.serving(None, turn.clock, key), turn.holds:
            await turn.admit(key, frame, speaking)
            self._leave(frame)
            await turn.run(lambda: self._forward(turn, frame, speaking))

    def _leave(self, frame: Frame) -> None:
        """Give back the memory of a request that no longer waits for a place."""
        if self._waiting.pop(frame, None):
            self._reserved.give_back(max(len(frame.sent), SMALL_BYTES) + frame.excess)

    async def _forward(self, turn: Turn, frame: Frame, upstreams: list[Upstream]) -> None:
        total = upstreams[0].settings.total_timeout_seconds
        try:
            with turn.clock.running(total, turn.grace()):
                line = await self._connect(turn, upstreams)
                if turn.clock.client_left:
                    raise TimeoutError
                turn.line = line
                turn.clock.allow(line.upstream.settings.first_byte_timeout_seconds)
                line.upstream.in_flight += 1
                try:
                    if await line.send(frame.sent, turn.over):
                        await turn.over
                    elif not turn.failure:
                        self._give_up(line)
                finally:
                    line.upstream.in_flight -= 1
            if turn.failure:
                await self._fail(turn, turn.failure, "upstream_unreachable")
                await line.connection.wait_closed()  # until then its place is taken
        except TimeoutError:
            await self._time_out(turn)
        except ConnectionClosed:
            turn.lose("upstream_failed")
            await self._fail(turn, turn.failure or "upstream_failed", "upstream_unreachable")
        except LineLost:
            await self._fail(turn, "upstream_failed", "upstream_unreachable")

    async def _connect(self, turn: Turn, upstreams: list[Upstream]) -> Line:
        for upstream in upstreams:
            turn.to(upstream)
            turn.clock.allow(upstream.settings.connect_timeout_seconds + 1)  # it keeps it itself
            with contextlib.suppress(OSError, Refusal):
                return await self._line_to(upstream)
        raise LineLost

    async def _time_out(self, turn: Turn) -> None:
        """Its time is up: that of the upstream, or of a client that is gone or doesn't read."""
        if turn.settled:
            return
        line, left = turn.line, turn.clock.client_left
        if left and not line:
            await turn.forget()
        outcome: Outcome = "upstream_failed"
        if left or (line and line.waits_for_client):
            outcome = "client_disconnected"
        if line:
            self._lose(line, outcome)
        await self._fail(turn, outcome, "upstream_timeout")
        if line:
            await line.close()

    async def _fail(self, turn: Turn, outcome: Outcome, failure: str) -> None:
        """It ended before its response did: write down how, and say so."""
        if turn.settled:
            return
        refusal = Refusal(failure)
        if outcome == "upstream_failed" and turn.first_byte_ms is None:
            turn.status = refusal.status  # all that the client gets is the error
        await turn.settle(outcome)
        if outcome == "upstream_failed":
            await self._refuse(refusal, turn.lane.stream_id)

    # From an upstream

    async def _pass_events(self, line: Line) -> None:
        """Until the upstream closes. With the last line the client's connection is closed, too, in
        the same way."""
        code, reason = INTERNAL_ERROR, "The upstream's connection was lost."
        await self._accepted.wait()  # an event can come with the upstream's handshake
        try:
            while True:
                await self._pass_event(line, await line.connection.recv())
        except ConnectionClosed as closed:
            if closed.rcvd and closed.rcvd.code not in NO_CODES and not line.lost:
                code, reason = closed.rcvd.code, closed.rcvd.reason
        except Exception as error:
            self.gateway.watch.failed(self._scope, error)
            await line.close()
        self._lose(line)
        outcome: Outcome = "client_disconnected" if self._closed else "upstream_failed"
        for stray in line.strays.values():
            await self._write_stray(stray, line, outcome)
        while any(lane.turn and lane.turn.line is line for lane in self._lanes.values()):
            await asyncio.sleep(TICK)  # they have something to say
        self._lines.remove(line)
        if not self._lines and not self._opening and not line.given_up:
            await self._close(code, reason)

    async def _pass_event(self, line: Line, message: str | bytes) -> None:
        if len(message) <= MAX_AT_ONCE:
            event = decode_answer(message)
        else:
            event = await in_slices(answer_steps(message), answers_of(self.account_id), begun=True)
        if line.lost:
            return
        turn = None
        if event:
            turn = self._turn_of(event, line)
            if turn:
                await turn.take(event, line.upstream.settings.idle_timeout_seconds)
                if turn.billed and turn.response_id:
                    self._written.add(turn.response_id)
            else:
                await self._take_stray(event, line)
        line.waits_for_client = True
        await self._to_client(message)
        line.waits_for_client = False
        if turn and turn.done:
            turn.end()

    def _turn_of(self, event: Answer, line: Line) -> Turn | None:
        """Rule 2."""
        lane = self._lanes.get(event.stream_id) if is_lane(event.stream_id) else None
        if lane and lane.turn and lane.turn.line is line and not event.response:
            return None if lane.turn.done else lane.turn
        turns = self._turns_on(line)
        named = response_named(event)
        if named:
            for turn in turns:
                if turn.response_id == named:
                    return turn
            known = named in self._made and kind_of(event) != "response.created"
            turns = [turn for turn in turns if turn.waits_for_response and not known]
        in_lane = [turn for turn in turns if turn.lane.stream_id == event.stream_id]
        if in_lane or isinstance(event.stream_id, str):
            return in_lane[0] if in_lane else None
        if kind_of(event) == "error" and len(turns) > 1:
            turns = [turn for turn in turns if turn.waits_for_response]
        if named or len(turns) == 1:
            return turns[0] if turns else None
        for turn in turns:  # it is one of theirs
            turn.clock.allow(line.upstream.settings.idle_timeout_seconds)
        return None

    def remember(self, made: Mapping[str, Home]) -> None:
        """What was made on this connection can be built on here, even if it isn't stored."""
        self._made.update(made)

    async def _take_stray(self, event: Answer, line: Line) -> None:
        """Meter an event that is no turn's, if it belongs to a response."""
        lane = event.stream_id if is_lane(event.stream_id) else None
        if event.response and lane not in line.strays and len(line.strays) < MAX_STRAYS:
            line.strays[lane] = Stray()
        if stray := line.strays.get(lane):
            await stray.meter.take(event, self.account_id)
            if stray.meter.ended:
                del line.strays[lane]
                report = stray.meter.report
                outcome: Outcome = "upstream_error" if report.failed else "completed"
                await self._write_stray(stray, line, outcome)

    async def _write_stray(self, stray: Stray, line: Line, outcome: Outcome) -> None:
        """Write what a response used that is no turn's."""
        report = stray.meter.report
        named = [report.response_id] if report.response_id else []
        used = is_complete(report) or outcome != "upstream_error" or Seen.of(report)
        if not self._written.isdisjoint(named):  # it may have been an estimate
            await self.gateway.corrections.look(named[0], self._key.account_id, report)
            return
        if not used:
            return
        self._written.update(named)
        guess = None if is_complete(report) else await self._estimate(stray)
        scope = self._new_scope()
        row = Row(
            request_id=scope["request_id"],
            account_id=self._key.account_id,
            key_id=self._key.id,
            endpoint=RESPONSES.path,
            requested_model=report.model or "",
            upstream=line.upstream.name,
            started_at=self.gateway.store.time(),
            duration_ms=0,
            status=200,
            model=report.model,
            service_tier=report.service_tier,
            response_id=report.response_id,
        )
        parts, money = account_for(row, report, outcome, guess), await self.no_hold(row)
        parts = await count_containers(self.gateway, row, report, parts)
        bill(row, parts, money, DEFAULT_IMAGE_MODEL)
        homes = homes_of(named, report, Home(row.upstream), None if guess else row.usage)
        self.gateway.objects.own_each(homes, row.account_id)
        admitted = ledger.Admitted(money.at, DEFAULT_IMAGE_MODEL, 0)
        await ledger.settle(self.gateway.store, row, admitted)
        self.gateway.watch.settled(scope, row)

    async def _estimate(self, stray: Stray) -> Estimate:
        """Return an estimate of what it used. What it read is not known."""
        report, worked = stray.meter.report, stray.worked_seconds
        speed = await self.gateway.speeds.of(report.model or "", self.account_id, False)
        return estimate(
            report,
            Seen.of(report),
            written=math.ceil(worked * speed),
            read=0,
            most=most_usual(self.gateway.settings, 0),
            images=False,
            partly=False,
        )

    async def no_hold(self, row: Row) -> Hold:
        """For what nobody was asked whether it may be: at the prices of now."""
        books = self.gateway.books
        while True:
            with contextlib.suppress(LedgerUnavailable):
                return await books.hold_again(self._key, row.requested_model, books.store.time(), 0)
            await asyncio.sleep(TICK)

    # To the client

    async def _to_client(self, message: str | bytes) -> None:
        kind = "text" if isinstance(message, str) else "bytes"
        if not self._closed:
            await self._give({"type": "websocket.send", kind: message})

    async def _refuse(
        self, refusal: Refusal, stream_id: str | None, close: int | None = None
    ) -> None:
        headers = {name.decode(): value.decode() for name, value in refusal.headers}
        event: dict[str, Any] = {"type": "error", "status": refusal.status}
        event |= {"error": {**refusal.error(), "headers": headers}, "headers": headers}
        event |= {"stream_id": stream_id} if stream_id is not None else {}
        await self._to_client(orjson.dumps(event).decode())
        if close:
            await self._close(close, refusal.code)

    async def _close(self, code: int, reason: str) -> None:
        if not self._closed:
            self._closed = True
            await self._give({"type": "websocket.close", "code": code, "reason": reason[:100]})

    async def _give(self, message: dict[str, Any]) -> None:
        self._sends += 1
        try:
            await self._send(message)
            self._given += 1
        except (OSError, RuntimeError):
            self._closed = True  # by the client, or by another task a moment ago
        finally:
            self._sends -= 1


def closing_code(refusal: Refusal) -> int | None:
    """With which the connection ends, too: its key or account is in force no more."""
    lasting = refusal.status in (401, 403) and refusal.code != "model_not_allowed"
    return POLICY_VIOLATION if lasting else None


class Addressed(msgspec.Struct):
    """The one member of a frame that is needed to refuse it."""

    stream_id: str | None = None


ADDRESSED = msgspec.json.Decoder(Addressed)


def stream_id_in(text: Buffer) -> str | None:
    """The lane of a frame, whose refusal names it. Of a long frame it isn't looked for."""
    if len(text) <= FREE_BYTES:
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return ADDRESSED.decode(text).stream_id
    return None


async def is_utf8(text: Buffer, account_id: str) -> bool:
    try:
        await in_slices(check_utf8(text), account_id)
    except Refusal:
        return False
    return True


def expired() -> Refusal:
    """After an hour."""
    return Refusal("websocket_connection_limit_reached")
