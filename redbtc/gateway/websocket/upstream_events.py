"""The connections of a session to upstreams, and the events that come over them."""

from __future__ import annotations

import asyncio
import time

from websockets.exceptions import ConnectionClosed, InvalidHandshake

from redbtc.deadlines import TICK
from redbtc.gateway.failover import Failover
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.references import affinity_of
from redbtc.gateway.websocket.choosing import (
    CredentialRejected,
    HandshakeRefused,
    SocketFailover,
    connect_to_one,
    refused_handshake,
)
from redbtc.gateway.websocket.client_sender import ClientSender
from redbtc.gateway.websocket.lanes import Lanes
from redbtc.gateway.websocket.strays import Strays
from redbtc.gateway.websocket.tasks import Tasks
from redbtc.gateway.websocket.turn_response import SessionObjects
from redbtc.gateway.websocket.turns import FINISHED
from redbtc.gateway.websocket.upstream_socket import UpstreamSocket
from redbtc.meter.answers import MAX_AT_ONCE, Answer, answer_steps, decode_answer
from redbtc.meter.shown_answers import shown_message
from redbtc.server.asgi import ClientRequest
from redbtc.server.websocket_protocol import INTERNAL_ERROR
from redbtc.slices import answer_queue, in_slices
from redbtc.store.keys import Key
from redbtc.upstream.failures import cause_of
from redbtc.upstream.headers import headers_for_upstream
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome

NO_CODES = (1005, 1006, 1015)  # RFC 6455 §7.4.1: these must not be sent


class UpstreamEvents:
    """Connects a session to upstreams, and sends their events on to the client."""

    def __init__(
        self,
        gateway: Gateway,
        handshake: ClientRequest,
        key: Key,
        sender: ClientSender,
        lanes: Lanes,
        objects: SessionObjects,
        tasks: Tasks,
    ) -> None:
        self._gateway = gateway
        self._handshake = handshake
        self._key = key
        self._sender = sender
        self._lanes = lanes
        self._objects = objects
        self._tasks = tasks
        # The connections that are open, each with the task that passes its events on.
        self._passing: dict[UpstreamSocket, asyncio.Task[None]] = {}
        self._opening: dict[Upstream, asyncio.Task[UpstreamSocket]] = {}

    async def first_socket(self) -> UpstreamSocket:
        """Return a connection to an upstream, before the client's handshake is answered: that can
        be refused then as it would be by the upstream. Raises Refusal."""
        gateway, handshake = self._gateway, self._handshake
        session = affinity_of(self._key, handshake.headers, connection_id=handshake.id)
        candidates = gateway.upstreams.for_handshake(session, handshake.credential is not None)
        failover: SocketFailover = Failover(
            gateway.settings.failover, time.monotonic(), certain_only=False
        )
        with candidates:
            candidates.take_now()
            try:
                return await connect_to_one(candidates, failover, self.socket_to)
            except CredentialRejected:
                raise
            except HandshakeRefused as last:
                best = failover.best()
                refused = best if isinstance(best, HandshakeRefused) else last
                raise refused.for_client(candidates.seconds_of_limit()) from None

    def connected(self) -> set[Upstream]:
        """Return the members that the session has a connection to."""
        return {socket.upstream for socket in self._passing if not socket.is_lost}

    async def socket_to(self, upstream: Upstream) -> UpstreamSocket:
        """Return the connection to an upstream, a new one if there is none. Raises OSError,
        Refusal."""
        for socket in self._passing:
            if socket.upstream is upstream and socket.is_open:
                return socket
        if upstream not in self._opening:
            self._opening[upstream] = task = self._tasks.start(self._open(upstream))
            task.add_done_callback(lambda _: self._opening.pop(upstream))
        socket = await asyncio.shield(self._opening[upstream])
        if not socket.is_open:  # the upstream has closed it at once
            raise ConnectionResetError
        return socket

    async def _open(self, upstream: Upstream) -> UpstreamSocket:
        """Connect to an upstream, and begin to send its events on. Raises OSError, Refusal."""
        account_id, secret = self._key.account_id, self._gateway.store.secret
        headers = headers_for_upstream(self._handshake.headers, secret, account_id)
        if upstream.is_client:
            headers += self._handshake.credential_headers
        try:
            connection = await upstream.connect(headers)
        except InvalidHandshake as error:
            raise refused_handshake(error, upstream) from None
        socket = UpstreamSocket(upstream, connection, account_id, self._tasks)
        self._passing[socket] = self._tasks.start(self._pass_all(socket))
        return socket

    async def _pass_all(self, socket: UpstreamSocket) -> None:
        """Send events to the client until the connection ends. When the session's last one has
        ended, close the client's connection with its code, unless the last one was given up."""
        code = INTERNAL_ERROR
        digest = self._handshake.digest if socket.upstream.is_client else None
        strays = Strays(self._gateway, self._key, socket.upstream, digest, self._objects)
        await self._sender.opened.wait()  # an event can come with the upstream's handshake
        try:
            while True:
                await self._pass(await socket.connection.recv(), socket, strays)
        except ConnectionClosed as closed:
            if not socket.is_lost:
                socket.cause = cause_of(closed)
                if closed.rcvd and closed.rcvd.code not in NO_CODES:
                    code = closed.rcvd.code  # the reason can quote the operator's key
        except Exception as error:
            request = self._handshake
            self._gateway.telemetry.failed(request.id, request.route, error, request.counted)
            await socket.close()
            self._lanes.end_settled(socket)
        self._lanes.lose(socket, "lost", "upstream_failed")
        outcome: Outcome = "client_disconnected" if self._sender.closed else "upstream_failed"
        await strays.end(outcome)
        while self._lanes.has_turn_on(socket):
            await asyncio.sleep(TICK)  # until it has settled its response and sent its error
        del self._passing[socket]
        is_last = not (self._passing or self._opening or self._lanes.are_connecting)
        if is_last and socket.state != "given_up":
            await self._sender.close(code, "The connection to the upstream was lost.")

    async def _pass(self, message: str | bytes, socket: UpstreamSocket, strays: Strays) -> None:
        """Meter an event, and send it to the client. The event that ends a response is sent when
        the response's row is committed."""
        if len(message) <= MAX_AT_ONCE:
            event = decode_answer(message)
        else:
            account = answer_queue(self._key.account_id)
            event = await in_slices(answer_steps(message), account, started=True)
        if socket.is_lost:
            return
        turn = None
        if event:
            turn = self._lanes.turn_of(event, socket)
            if turn and turn.takes_error(event, message):
                return  # the request is sent to another member
            await (turn.take(event, socket.idle_seconds) if turn else strays.take(event))
            if turn is None and socket.may_be_of_left(event):
                return
            if event.error or event.response or event.type == "error":
                message = shown_to_client(event, message, socket)
        socket.enter("blocked")
        was_sent = await self._sender.send(message)
        socket.enter("passing")
        if was_sent and turn and turn.response.recorder:
            await turn.response.recorder.take_event(message)
        if turn and turn.state in FINISHED:
            turn.end()

    async def close(self) -> None:
        """Close all connections. What the upstreams have reported for no turn is written first."""
        for opening in self._opening.values():
            opening.cancel()
        for socket, passing in list(self._passing.items()):
            await socket.close()
            await asyncio.wait({passing})


def shown_to_client(event: Answer, message: str | bytes, socket: UpstreamSocket) -> str | bytes:
    """Return an event that can report an error, as the client is shown it."""
    inner = event.inner if event.response else None
    failed = event.error or event.type == "error" or (inner and inner.error)
    return shown_message(message) if failed and socket.upstream.hides_errors else message
