"""The events that a session sends to its client: those of upstreams as they are, and its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import orjson

from redbtc.headers import Headers
from redbtc.limits.buckets import Bucket
from redbtc.refusals import Refusal
from redbtc.server.asgi import ClientRequest, Send
from redbtc.server.websocket_protocol import (
    POLICY_VIOLATION,
    REFUSED_FRAMES,
    SMALL_FRAMES_PER_MINUTE,
)
from redbtc.telemetry import Telemetry

MAX_REFUSAL_PAUSE = 30  # seconds that refused events can pause reading; a ping waits 60


class ClientSender:
    """Sends events to the client of a session. `opened` is set once it may be sent events, or is
    gone. `closed` says that it is sent nothing more."""

    def __init__(
        self, handshake: ClientRequest, send: Send, telemetry: Telemetry, small_frames: Bucket
    ) -> None:
        self.opened = asyncio.Event()
        self.closed = False
        self._handshake = handshake
        self._send = send
        self._telemetry = telemetry
        self._small_frames = small_frames
        self._sending = 0  # messages that the client has not read yet
        self._sent = 0  # messages that it has

    async def accept(self, headers: Headers) -> None:
        """Accept the connection. Raises OSError."""
        await self._send({"type": "websocket.accept", "headers": headers})
        self.opened.set()
        self._telemetry.answered(self._handshake.id, self._handshake.route, 101)

    @contextlib.contextmanager
    def aborting_unread(self, seconds: float) -> Iterator[None]:
        """Until the end of `with`, abort the connection of a client that has read nothing of what
        it was sent for that long."""
        watching = asyncio.create_task(self._watch(seconds))
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self, seconds: float) -> None:
        sent = -1
        while not (self._sending and self._sent == sent):
            sent = self._sent
            await asyncio.sleep(seconds)
        self._handshake.client.abort()

    async def send(self, message: str | bytes) -> bool:
        """Send a message. Return when it is with the client's operating system, or nearly so:
        False if the client is gone."""
        kind = "text" if isinstance(message, str) else "bytes"
        return not self.closed and await self._give({"type": "websocket.send", kind: message})

    async def refuse(
        self,
        request: ClientRequest,
        refusal: Refusal,
        stream_id: str | None,
        close: int | None = None,
    ) -> None:
        """Count and charge a refused event, and send the refusal as `send_error` does. It costs as
        much as so many small frames, since it is as much work. At most MAX_REFUSAL_PAUSE is owed,
        since many requests that wait can be refused at once."""
        self._small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
        if self._small_frames.seconds_until(REFUSED_FRAMES) < MAX_REFUSAL_PAUSE:
            self._small_frames.charge(REFUSED_FRAMES)
        self._telemetry.refused(request.id, request.route, refusal, request.counted)
        await self.send_error(refusal, stream_id, close or closing_code(refusal))

    async def send_error(
        self, refusal: Refusal, stream_id: str | None, close: int | None = None
    ) -> None:
        """Send an error event to a lane. Then close the connection with the code `close`, if there
        is one."""
        headers = {name.decode(): value.decode() for name, value in refusal.headers}
        event: dict[str, Any] = {"type": "error", "status": refusal.status}
        event |= {"error": {**refusal.error(), "headers": headers}, "headers": headers}
        event |= {"stream_id": stream_id} if stream_id is not None else {}
        await self.send(orjson.dumps(event).decode())
        if close:
            await self.close(close, refusal.code)

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, unless that has been done."""
        if not self.closed:
            self.closed = True
            await self._give({"type": "websocket.close", "code": code, "reason": reason[:100]})

    def leave(self) -> None:
        """Note that the client is gone."""
        self.closed = True
        self.opened.set()  # so that nothing waits for it

    async def _give(self, message: dict[str, Any]) -> bool:
        self._sending += 1
        try:
            await self._send(message)
            self._sent += 1
            return True
        except (OSError, RuntimeError):
            self.closed = True  # by the client, or by another task a moment ago
            return False
        finally:
            self._sending -= 1


def closing_code(refusal: Refusal) -> int | None:
    """Return the code that a refusal closes the connection with, None if the connection stays. It
    is closed if its key or account is no longer in force."""
    durable = refusal.status in (401, 403) and refusal.code != "model_not_allowed"
    return POLICY_VIOLATION if durable else None
