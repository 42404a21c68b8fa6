"""Serves the requests of a session: each is admitted, sent to an upstream, and settled."""

from __future__ import annotations

import contextlib

from websockets.exceptions import ConnectionClosed

from redbtc.deadlines import Deadline
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.references import upstreams_for
from redbtc.gateway.websocket.client_sender import ClientSender
from redbtc.gateway.websocket.lanes import Lane, Lanes, MessageMemory, QueuedRequest
from redbtc.gateway.websocket.tasks import Tasks
from redbtc.gateway.websocket.turn_response import SessionObjects, TurnResponse
from redbtc.gateway.websocket.turns import Turn
from redbtc.gateway.websocket.upstream_events import UpstreamEvents
from redbtc.gateway.websocket.upstream_socket import SocketState, UpstreamSocket
from redbtc.limits.admission import Admission
from redbtc.refusals import ClientLeft, Refusal, refusal_of
from redbtc.request_body.body import ClientEvent
from redbtc.server.asgi import ClientRequest
from redbtc.server.websocket_protocol import INTERNAL_ERROR, POLICY_VIOLATION
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome


class NoUpstream(Exception):
    """No upstream could be reached."""


class TurnRunner:
    """Serves the requests of a session, those of one lane one after the other."""

    def __init__(
        self,
        gateway: Gateway,
        handshake: ClientRequest,
        sender: ClientSender,
        lanes: Lanes,
        upstream_events: UpstreamEvents,
        objects: SessionObjects,
        tasks: Tasks,
    ) -> None:
        self._gateway = gateway
        self._handshake = handshake
        self._sender = sender
        self._lanes = lanes
        self._upstream_events = upstream_events
        self._objects = objects
        self._tasks = tasks
        self._is_expired = False

    def serve(self, event: ClientEvent, admission: Admission, memory: MessageMemory) -> None:
        """Serve a request after those of its lane. Its memory is kept until it has its places.
        Raises Refusal."""
        if lane := self._lanes.queue(event, admission, memory):
            self._tasks.start(self._serve_lane(lane))

    def expire(self) -> None:
        """Begin no more requests. Close the connection when those in flight have ended."""
        self._is_expired = True
        if self._lanes.idle:
            self._tasks.start(self._sender.send_error(expired(), None, POLICY_VIOLATION))

    async def _serve_lane(self, lane: Lane) -> None:
        """Serve the requests of a lane until there are no more."""
        telemetry = self._gateway.telemetry
        while lane.waiting:
            queued, request = lane.waiting.popleft(), self._handshake.further()
            try:
                with queued.admission:
                    await self._serve_next(lane, queued, request)
            except Refusal as refusal:
                await self._sender.refuse(request, refusal, lane.stream_id)
            except ClientLeft:
                telemetry.left(request.id, request.route)
            except Exception as error:
                telemetry.failed(request.id, request.route, error, request.counted)
                await self._sender.send_error(refusal_of(error), lane.stream_id, INTERNAL_ERROR)
            finally:
                queued.release()
                lane.turn = None
        self._lanes.remove(lane)
        if self._is_expired and self._lanes.idle:
            self.expire()

    async def _serve_next(self, lane: Lane, queued: QueuedRequest, request: ClientRequest) -> None:
        """Serve a request of a lane. Raises Refusal, ClientLeft."""
        gateway, event, admission = self._gateway, queued.event, queued.admission
        if self._is_expired:
            admission.refund()
            raise expired()
        if self._sender.closed:
            raise ClientLeft
        key = gateway.authenticate(self._handshake)
        deadline, objects = Deadline(gateway.deadlines), self._objects
        response = TurnResponse(gateway, request, deadline, admission, key, event, objects)
        turn = lane.turn = Turn(lane.stream_id, response, deadline)
        if event.facts.background:
            message = "A background response can't be created over a WebSocket."
            raise Refusal("invalid_request", message, param="background")
        upstreams = await upstreams_for(gateway, key, event, objects.locations)
        upstreams = self._upstream_events.connected_first(upstreams)
        if not upstreams:
            message = "No upstream serves this model over a WebSocket; use POST."
            raise Refusal("no_upstream", message)
        with gateway.serving(None, deadline, key):
            async with response.admit(upstreams[0], queued), turn.further:
                await self._forward(turn, event, upstreams)

    async def _forward(self, turn: Turn, event: ClientEvent, upstreams: list[Upstream]) -> None:
        """Send a request to the first upstream that can be reached, and wait until its turn is
        over. Raises ClientLeft if the client leaves before anything is sent."""
        total = upstreams[0].settings.total_timeout_seconds
        try:
            with turn.deadline.running(total, turn.response.grace()):
                socket = await self._connect(turn, upstreams)
                if turn.deadline.client_left:
                    raise TimeoutError
                turn.socket = socket
                await self._send(turn, socket, event)
            if turn.failure:
                await self._fail(turn, turn.failure, "upstream_unreachable")
                await socket.connection.wait_closed()  # until then its place is taken
        except TimeoutError:
            await self._time_out(turn)
        except ConnectionClosed:
            turn.lose("upstream_failed")
            await self._fail(turn, turn.failure or "upstream_failed", "upstream_unreachable")
        except NoUpstream:
            await self._fail(turn, "upstream_failed", "upstream_unreachable")
        finally:
            turn.end()

    async def _connect(self, turn: Turn, upstreams: list[Upstream]) -> UpstreamSocket:
        """Return a connection to the first upstream that can be reached. Raises NoUpstream."""
        for upstream in upstreams:
            turn.response.note_upstream(upstream)
            # Connecting has this timeout itself, and a second more is enough to report it.
            turn.deadline.allow(upstream.settings.connect_timeout_seconds + 1)
            with contextlib.suppress(OSError, Refusal):
                return await self._upstream_events.socket_to(upstream)
        raise NoUpstream

    async def _send(self, turn: Turn, socket: UpstreamSocket, event: ClientEvent) -> None:
        """Send a request, and wait until its turn is over. Give the connection up if the upstream
        has answered the message and does not read the rest of it: nothing can follow that. Raises
        ConnectionClosed."""
        turn.deadline.allow(socket.upstream.settings.first_byte_timeout_seconds)
        socket.upstream.in_flight += 1
        try:
            if await socket.send(event.sent, turn.over):
                await turn.over
            elif not turn.failure:
                self._lanes.lose(socket, SocketState.GIVEN_UP, "upstream_failed")
                self._tasks.start(socket.close())
        finally:
            socket.upstream.in_flight -= 1

    async def _time_out(self, turn: Turn) -> None:
        """End a turn whose time is up: that of the upstream, or of a client that is gone or does
        not read. With it goes its connection (Rule 4 of the session). Raises ClientLeft."""
        if turn.response.settled:
            return
        socket, has_left = turn.socket, turn.deadline.client_left
        if socket is None:
            if has_left:
                await turn.response.forget()
            await self._fail(turn, "upstream_failed", "upstream_timeout")
            return
        outcome: Outcome = turn.failure or "upstream_failed"
        if has_left or socket.state is SocketState.BLOCKED:
            outcome = "client_disconnected"
        self._lanes.lose(socket, SocketState.LOST, outcome)
        await self._fail(turn, outcome, "upstream_timeout")
        await socket.close()

    async def _fail(self, turn: Turn, outcome: Outcome, failure: str) -> None:
        """Settle a response that has not ended, and tell a client that is there of the failure."""
        response = turn.response
        if response.settled:
            return
        refusal = Refusal(failure)
        if outcome == "upstream_failed" and response.first_byte_ms is None:
            response.note_status(refusal.status)  # all that the client gets is the error
        await response.settle(outcome)
        if outcome == "upstream_failed":
            await self._sender.send_error(refusal, turn.stream_id)


def expired() -> Refusal:
    """Return the refusal of a session that has lasted for `total_timeout_seconds`."""
    return Refusal("websocket_connection_limit_reached")
