"""The client's side of a WebSocket: frames of any size, read within the limits."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ProtocolError
from websockets.frames import DATA_OPCODES
from websockets.frames import Frame as WireFrame
from websockets.http11 import Request
from websockets.streams import StreamReader

from redbtc.deadlines import TICK, Deadline
from redbtc.limits.memory import Reservation
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Scope
from redbtc.slices import in_slices
from redbtc.store.keys import Key

if TYPE_CHECKING:
    from redbtc.gateway.state import Gateway


CLOSING_SECONDS = 11  # uvicorn's 10 for the client's part of closing, and one
POLICY_VIOLATION, INTERNAL_ERROR, UNSUPPORTED_DATA = 1008, 1011, 1003  # RFC 6455 §7.4.1
INVALID_DATA, TOO_BIG, TRY_AGAIN_LATER = 1007, 1009, 1013
REFUSED = "redbtc.refused"  # an event from the protocol: it refused a message and dropped it
UPGRADE = [(b"upgrade", b"websocket")]

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
        self.clock = Deadline(gateway.clocks)
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
            self._seconds = clock.expires_at - clock.now()
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
