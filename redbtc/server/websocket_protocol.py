"""The client's side of a WebSocket: messages of any size, read within the limits.

uvicorn parses and queues everything that has arrived at once. Here one coroutine parses a
connection's frames one by one, in slices, and at most one message waits for the app. It stops
reading from the socket while there is no memory for a message, and while the account's clients send
more small frames than SMALL_FRAMES_PER_MINUTE. The rest of a refused message is read and thrown
away. If the refusal ends the connection, so is what still arrives for a moment: closing on unread
bytes would reset the connection before the client has read the close frame.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol, cast

from websockets.frames import DATA_OPCODES
from websockets.frames import Frame as WireFrame
from websockets.http11 import Request

from redbtc.deadlines import Deadline
from redbtc.limits.buckets import Bucket
from redbtc.limits.memory import Reservation
from redbtc.refusals import Refusal
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import IN_SCOPE, Client, ClientRequest, Scope
from redbtc.server.frame_reader import FrameReader
from redbtc.server.pausing_websocket import PausingWebSocket
from redbtc.slices import in_slices

POLICY_VIOLATION, INTERNAL_ERROR, UNSUPPORTED_DATA = 1008, 1011, 1003  # RFC 6455 §7.4.1
INVALID_DATA, TOO_BIG, TRY_AGAIN_LATER = 1007, 1009, 1013
REFUSED = "redbtc.refused"  # an event from the protocol: it refused a message and dropped it
UPGRADE = [(b"upgrade", b"websocket")]

MAX_FRAGMENTS = 10_000  # of a message
SMALL_BYTES = 1024  # a frame with fewer is small: it costs more for parsing than for its bytes
SMALL_FRAMES_PER_MINUTE = 6000  # of an account
REFUSED_FRAMES = 10  # how many small frames a refused event counts as


class Intake(Protocol):
    """The limits within which a connection is read: those of its account, and of each message."""

    reservation: Reservation  # memory for messages
    deadline: Deadline
    small_frames: Bucket
    max_bytes: int  # of a message
    message_seconds: float  # for a message to arrive

    def renew(self) -> None:
        """Bring the limits of the next message up to date with the settings."""


class IncomingMessage:
    """The message that is being read, and the memory that is reserved for it."""

    def __init__(self, intake: Intake, reader: FrameReader) -> None:
        self.fragments = 0
        self.seconds = 0.0  # that the client has left to send the rest
        self.whole: Buffer | None = None  # the message, once it has arrived
        self._intake = intake
        self._reader = reader
        self._reserved = 0  # bytes

    async def make_room(self, frame_bytes: int) -> None:
        """Reserve memory for a frame. For the further frames of a message, reserve at least as much
        again as it has. Raises Refusal as `reserve` does."""
        known = self._reserved
        size = max(frame_bytes - self._reader.room, min(known, self._intake.max_bytes - known))
        await self.reserve(size)
        self._reader.room += size

    async def reserve(self, size: int) -> None:
        """Reserve `size` bytes more. Raises Refusal, and gives all of the message's memory back, if
        there is no memory for them."""
        try:
            await self._intake.reservation.take(max(0, size), self._intake.deadline)
        except Refusal:
            self.give_back(0)
            raise
        self._reserved += max(0, size)

    def give_back(self, size: int) -> None:
        """Give the memory back, except for `size` bytes."""
        self._intake.reservation.give_back(self._reserved - size)
        self._reserved, self._reader.room = size, 0

    async def hand_over(self, size: int) -> None:
        """Reserve exactly `size` bytes, for the receiver of the message to give back. Raises
        Refusal."""
        await self.reserve(size - self._reserved)
        self.give_back(size)
        self._reserved = 0


class WebSocketClient(Client, eq=False, kw_only=True):
    """The client of a WebSocket. It is aborted if it does not read: it would never see a close
    frame."""

    # Read the client's frames until the connection ends; to be called once it is accepted.
    read_frames: Callable[[Intake], Awaitable[None]]


class WebSocketProtocol(PausingWebSocket):
    """Reads messages within the limits. The scope has a ClientRequest, whose client is a
    WebSocketClient."""

    _intake: Intake
    _message: IncomingMessage
    _reading: asyncio.Task[Any] | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            scope = cast(Scope, self.scope)
            client = WebSocketClient(self.transport.abort, read_frames=self.read_frames)
            scope[IN_SCOPE] = ClientRequest(scope["headers"], client)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._reading:
            self._reading.cancel()

    async def receive(self) -> Any:
        """Return the next message of the ASGI scope."""
        message = await self.queue.get()
        self.queue.task_done()
        return message

    async def read_frames(self, intake: Intake) -> None:
        """Read the client's frames until the connection ends."""
        if self.disconnected:
            return
        self._intake, self._message = intake, IncomingMessage(intake, self.reader)
        self._reading = asyncio.current_task()
        with intake.reservation:
            try:
                while not self.ended:
                    await in_slices(self._handle_frames(), intake.reservation.account_id)
                    await self._wait()
            except MemoryError:
                self._end(Refusal("overloaded"), TRY_AGAIN_LATER)
        self.reader.buffer.clear()
        self.frames.clear()
        await self.linger()

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
        return self.reader.between_frames and not self._message.fragments

    def _handle_frames(self) -> Generator[None, None, None]:
        """Handle the frames that have arrived, until there is something to wait for (`_wait`)."""
        if self._between_messages:
            self._intake.renew()
            self.reader.max_bytes = self._intake.max_bytes
            self._message.seconds = self._intake.message_seconds
        small_frames = self._intake.small_frames
        small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        while not self.ended and self._message.whole is None and self.queue.empty():
            if not small_frames.remaining:
                return
            self.conn.receive_data(b"")  # parses one frame
            self.ended = self.conn.eof_sent  # after an error, or the client's close frame
            if self.conn.parser_exc:
                self.handle_parser_exception()
            if not self.conn.events:
                return
            frame = cast(WireFrame, self.conn.events[0])
            self._count(frame)
            self.handle_events()
            frame.data = b""  # the parser keeps the frame until the next one comes
            yield

    def _count(self, frame: WireFrame) -> None:
        """Charge a small frame, and refuse a message that has too many fragments."""
        if self.reader.continues:
            return
        if len(frame.data) < SMALL_BYTES:
            self._intake.small_frames.charge(1)
        self._message.fragments += frame.opcode in DATA_OPCODES
        if self._message.fragments > MAX_FRAGMENTS:
            self._refuse_size()

    def _refuse_size(self) -> None:
        """Refuse a message that is too large, and end the connection."""
        allowed = f"at most {self._intake.max_bytes} bytes in at most {MAX_FRAGMENTS} fragments"
        self._end(Refusal("request_too_large", f"A message can have {allowed}."), TOO_BIG)

    def handle_cont(self, event: WireFrame) -> None:
        """Append a fragment to the message: joining all of them at the end could take long."""
        if not (self.frames and isinstance(self.frames[0], bytearray)):
            cast(list[Buffer], self.frames)[:] = [bytearray().join(self.frames)]
        self.frames[0] += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """Keep the message, which is whole, for `_wait` to deliver."""
        whole = self.frames[0] if self.frames else b""
        self.frames, self._message.fragments, self.reader.message_bytes = [], 0, 0
        self._message.seconds = self._intake.message_seconds
        if self.reader.drops or self.close_sent:
            self.reader.drops = False
            self._message.give_back(0)
        else:
            self._message.whole = whole

    async def _wait(self) -> None:
        """Wait for what is needed before further frames can be handled."""
        small_frames = self._intake.small_frames
        if self.ended:
            return
        if self.reader.too_large:
            self._refuse_size()
        elif self.reader.wanted:
            await self._make_room(self.reader.wanted)
        elif self._message.whole is not None:
            await self._deliver(self._message.whole)
        elif not self.queue.empty():
            await self.queue.join()
        elif not small_frames.remaining:
            await asyncio.sleep(small_frames.seconds_until(REFUSED_FRAMES))
        else:
            await self._wait_for_bytes()

    async def _make_room(self, wanted: int) -> None:
        """Reserve memory for a frame of `wanted` bytes. If none comes free, refuse the message."""
        self.reader.wanted = 0
        if self.close_sent or not await self._has_memory(self._message.make_room(wanted)):
            self.reader.drops = True
            self.frames.clear()

    async def _deliver(self, whole: Buffer) -> None:
        """Hand a message on, with the memory that it takes."""
        size = max(len(whole), SMALL_BYTES)
        self._message.whole = None
        if await self._has_memory(self._message.hand_over(size)):
            kind = self.curr_msg_data_type
            self._hand_over({"type": "websocket.receive", kind: whole, "reserved": size})

    async def _has_memory(self, reserving: Awaitable[None]) -> bool:
        """Return whether memory could be reserved. If not, refuse the message."""
        try:
            await reserving
        except Refusal as refusal:
            self._hand_over({"type": REFUSED, "refusal": refusal, "close": None})
            return False
        return True

    async def _wait_for_bytes(self) -> None:
        """Wait until bytes arrive. Stop reading if a message takes too long to arrive."""
        if self._between_messages:
            await self.arrival()
            return
        deadline = self._intake.deadline
        try:
            with deadline.running(self._message.seconds):
                await self.arrival()
            self._message.seconds = deadline.expires_at - deadline.now()
        except TimeoutError:
            message = f"A message took longer than {self._intake.message_seconds:g} s to arrive."
            self._end(Refusal("request_timeout", message), POLICY_VIOLATION)

    def _end(self, refusal: Refusal, close: int) -> None:
        """Stop reading frames, and let the app close the connection with the code `close`."""
        self.ended = True
        self._hand_over({"type": REFUSED, "refusal": refusal, "close": close})

    def _hand_over(self, message: Any) -> None:
        self.queue.put_nowait(message)
