"""/v1/responses as OpenAI's WebSocket mode: messages pass both ways as they are.

Theory of operation. A *session* is one client's connection. It has a *socket*, which is a
connection to an upstream, for each upstream that it needs, and *lanes*: requests of one `stream_id`
take turns, lanes run side by side. A *turn* is one response.create: a request like any other, with
its key, its places, its hold and its row.

    ClientEvents ─► TurnRunner ─► UpstreamSocket ─► the upstream
    (reads)         (admits, sends, settles)            │
    ClientSender ◄─ UpstreamEvents ◄────────────────────┘
    (sends)         (meters each event for its turn)

Rule 1. What the client may send is an allow-list: response.create, and response.steer for a
response of this connection. A refusal is an error event, and the connection stays.

Rule 2. An event belongs to the turn whose response it names. If it names none, it belongs to the
turn in its lane; a new response belongs to the turn that waits for one. What an upstream reports
for no turn (a response that nobody asked for, or one that comes after its turn was given up) gets a
row of its own: nothing that was used passes unwritten.

Rule 3. A steered response may be followed by another one, which the upstream begins by itself. What
that can cost is held before the steering goes on; it has its own row, in the places of its turn.

Rule 4. All turns on a socket end with it. There is no way to stop a single response, so when a
turn's time is up its socket is closed, and the other turns on it fail as they do when the upstream
is gone. When the last socket has ended, so does the session, unless a turn is about to use another
one, or the gateway gave the socket up for a message that the upstream has answered but does not
read: then the next request opens another one.

Rule 5. A turn fails over before its first event only: if that is an error of the upstream itself,
the request is sent again over a socket to another member. What the first member sends after that in
the turn's lane is metered, but not sent to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from websockets.asyncio.client import ClientConnection

from redbtc.gateway.gateway import Gateway
from redbtc.gateway.model_catalog import MODELS_ETAG
from redbtc.gateway.websocket.client_events import ClientEvents
from redbtc.gateway.websocket.client_sender import ClientSender
from redbtc.gateway.websocket.lanes import Lanes
from redbtc.gateway.websocket.message_intake import MessageIntake
from redbtc.gateway.websocket.tasks import Tasks
from redbtc.gateway.websocket.turn_response import SessionObjects
from redbtc.gateway.websocket.turn_runner import TurnRunner
from redbtc.gateway.websocket.upstream_events import UpstreamEvents
from redbtc.headers import Headers, header
from redbtc.limits.buckets import Bucket
from redbtc.refusals import ClientLeft, Refusal
from redbtc.server.asgi import ClientRequest, Receive, Send
from redbtc.server.pausing_websocket import CLOSING_SECONDS
from redbtc.server.websocket_protocol import (
    REFUSED_FRAMES,
    SMALL_FRAMES_PER_MINUTE,
    WebSocketClient,
)
from redbtc.store.keys import Key
from redbtc.upstream.headers import headers_for_client, without

MAX_SESSIONS = 100  # of an account
HANDSHAKE_HEADERS = (b"sec-websocket-", b"content-", b"date", b"connection", b"upgrade")


async def serve_websocket(
    gateway: Gateway, handshake: ClientRequest, receive: Receive, send: Send
) -> None:
    """Serve a WebSocket from its handshake to its end. Raises Refusal before the connection is
    accepted, ClientLeft."""
    await receive()  # websocket.connect
    key = gateway.authenticate(handshake)
    charge_handshake(gateway.limiter.small_frames(key))
    with counted_session(gateway, key.account_id):
        session = WebSocketSession(gateway, handshake, key, receive, send)
        gateway.websockets.add(session)
        try:
            if not gateway.admits:
                session.expire()
            with gateway.in_flight.abortable(key, handshake.client.abort):
                await session.run()
        except OSError:
            raise ClientLeft from None
        finally:
            await session.end()
            gateway.websockets.discard(session)


def charge_handshake(small_frames: Bucket) -> None:
    """Count a handshake as REFUSED_FRAMES small frames: each one connects to an upstream. Raises
    Refusal if the account's rate is used up."""
    small_frames.fill(SMALL_FRAMES_PER_MINUTE, time.monotonic())
    wait = small_frames.seconds_until(REFUSED_FRAMES)
    if wait:
        message = "This account sends too many WebSocket handshakes and small frames."
        raise Refusal("rate_limit_exceeded", message, retry_after=wait)
    small_frames.charge(REFUSED_FRAMES)


@contextlib.contextmanager
def counted_session(gateway: Gateway, account_id: str) -> Iterator[None]:
    """Count a session of the account until the end of `with`. Raises Refusal if it has too many."""
    if gateway.sessions[account_id] >= MAX_SESSIONS:
        message = f"This account has {MAX_SESSIONS} WebSockets open, the maximum."
        raise Refusal("concurrency_limit_exceeded", message)
    gateway.sessions[account_id] += 1
    try:
        yield
    finally:
        gateway.sessions[account_id] -= 1


class WebSocketSession:
    """One client's WebSocket: what reads, serves and answers its requests."""

    def __init__(
        self, gateway: Gateway, handshake: ClientRequest, key: Key, receive: Receive, send: Send
    ) -> None:
        assert isinstance(handshake.client, WebSocketClient)
        self._gateway = gateway
        self._handshake = handshake
        self._key = key
        self._client = handshake.client
        self._intake = MessageIntake(gateway, key)
        self._tasks = Tasks()
        objects = SessionObjects()
        self._lanes = Lanes(objects.locations.keys())
        sender = self._sender = ClientSender(
            handshake, send, gateway.telemetry, self._intake.small_frames
        )
        self._upstream_events = UpstreamEvents(
            gateway, handshake, key, sender, self._lanes, objects, self._tasks
        )
        self._runner = TurnRunner(
            gateway, handshake, sender, self._lanes, self._upstream_events, objects, self._tasks
        )
        self._client_events = ClientEvents(
            gateway,
            handshake,
            receive,
            self._intake.reservation,
            sender,
            self._lanes,
            self._runner,
            objects,
        )

    async def run(self) -> None:
        """Accept the connection, and serve its requests until the client is gone. Raises Refusal
        before the connection is accepted, OSError."""
        socket = await self._upstream_events.first_socket()
        await self._sender.accept(self._headers(socket.connection))
        if self._gateway.ends_sessions:
            self.expire()
        settings, loop = socket.upstream.settings, self._gateway.deadlines.loop
        expiry = loop.call_later(settings.total_timeout_seconds, self._runner.expire)
        self._reader = asyncio.create_task(self._read_frames())
        try:
            with self._sender.aborting_unread(settings.idle_timeout_seconds):
                await self._client_events.read()
        finally:
            expiry.cancel()
            loop.call_later(CLOSING_SECONDS, self._client.abort)

    async def _read_frames(self) -> None:
        """Read frames until the client's connection ends, which can be after the session's end."""
        try:
            await self._client.read_frames(self._intake)
        except Exception as error:
            request = self._handshake
            self._gateway.telemetry.failed(request.id, request.route, error, request.counted)
            self._client.abort()

    def _headers(self, connection: ClientConnection) -> Headers:
        """Return the headers of the upstream's handshake that the client is sent."""
        assert connection.response is not None, "the handshake is over"
        request_id, given = self._handshake.id.encode(), connection.response.headers
        headers = headers_for_client(
            [(name.encode(), value.encode("latin-1")) for name, value in given.raw_items()]
        )
        headers = [each for each in headers if not each[0].startswith(HANDSHAKE_HEADERS)]
        if self._gateway.catalog.is_set:
            headers = without(headers, frozenset([MODELS_ETAG]))
            with_credential = self._handshake.credential is not None
            if etag := self._gateway.catalog.etag(self._key, with_credential):
                headers.append((MODELS_ETAG, etag))
        if header(headers, b"x-request-id") is None:
            headers.append((b"x-request-id", request_id))
        return [*headers, (b"x-redbtc-request-id", request_id)]

    def expire(self) -> None:
        """Begin no more requests. Close the connection when those in flight have ended."""
        self._runner.expire()

    def move(self) -> None:
        """Do what `expire` does, and refuse requests that are not admitted yet: the client is to
        connect to another process."""
        self._lanes.move()
        self.expire()

    @property
    def has_waiting(self) -> bool:
        """Return whether a request is not admitted yet."""
        return self._lanes.have_waiting

    async def end(self) -> None:
        """End what is left of the session: the client is gone, or it was refused."""
        self._sender.leave()
        await self._lanes.leave()
        await self._upstream_events.close()
        await self._tasks.cancel()
