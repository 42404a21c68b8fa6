"""Serves the requests of a session: each is admitted, sent to an upstream, and settled."""

from __future__ import annotations

import asyncio
import functools
import time

from websockets.exceptions import ConnectionClosed

from redbtc.deadlines import Deadline
from redbtc.gateway.body_recorder import BodyRecorder
from redbtc.gateway.failover import CERTAIN, FAILURES, Failover, judge_end
from redbtc.gateway.forwarded_request import REJECTED_KEY
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.references import candidates_for
from redbtc.gateway.websocket.choosing import (
    CredentialRejected,
    ErrorEvent,
    HandshakeRefused,
    SocketFailover,
    connect_to_one,
    failure_status,
    is_unreadable,
)
from redbtc.gateway.websocket.client_sender import ClientSender
from redbtc.gateway.websocket.lanes import Lane, Lanes, MessageMemory, QueuedRequest
from redbtc.gateway.websocket.tasks import Tasks
from redbtc.gateway.websocket.turn_response import SessionObjects, TurnResponse
from redbtc.gateway.websocket.turns import Turn
from redbtc.gateway.websocket.upstream_events import UpstreamEvents
from redbtc.gateway.websocket.upstream_socket import UpstreamSocket
from redbtc.limits.admission import Admission
from redbtc.meter.answers import Answer
from redbtc.meter.error_codes import CREDENTIAL_STATUSES, REJECTED_STATUSES
from redbtc.refusals import ClientLeft, Refusal, refusal_of
from redbtc.request_body.body import ClientEvent
from redbtc.server.asgi import ClientRequest
from redbtc.server.websocket_protocol import INTERNAL_ERROR, POLICY_VIOLATION
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.failures import cause_of
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import FAILED, Outcome


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
            lane.task = self._tasks.start(self._serve_lane(lane))

    def expire(self) -> None:
        """Begin no more requests. Close the connection when those in flight have ended."""
        self._is_expired = True
        if self._lanes.idle and self._sender.opened.is_set():
            self._tasks.start(self._sender.send_error(expired(), None, POLICY_VIOLATION))

    async def _serve_lane(self, lane: Lane) -> None:
        """Serve the requests of a lane until there are no more."""
        telemetry = self._gateway.telemetry
        while lane.waiting:
            queued, request = lane.waiting.popleft(), self._handshake.new_request()
            try:
                with queued.admission, lane.having_turn():
                    await self._serve_next(lane, queued, request)
            except Refusal as refusal:
                await self._sender.refuse(request, refusal, lane.stream_id)
            except ClientLeft:
                telemetry.left(request.id, request.route)
            except asyncio.CancelledError:
                if not lane.goes_on():
                    raise
                await self._sender.refuse(request, expired(), lane.stream_id)
            except Exception as error:
                telemetry.failed(request.id, request.route, error, request.counted)
                await self._sender.send_error(refusal_of(error), lane.stream_id, INTERNAL_ERROR)
            finally:
                queued.release()
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
        request.credential = self._handshake.credential
        deadline, objects = Deadline(gateway.deadlines), self._objects
        response = TurnResponse(gateway, request, deadline, admission, key, event, objects)
        turn = lane.turn = Turn(lane.stream_id, response, deadline)
        if event.facts.background:
            message = "A background response can't be created over a WebSocket."
            raise Refusal("invalid_request", message, param="background")
        # Nothing was awaited since the key was found to be in force: once it is reported as
        # compromised, this turn is aborted.
        with gateway.serving(None, deadline, key):
            candidates = await candidates_for(
                gateway,
                key,
                request,
                event,
                objects.locations,
                connection_id=self._handshake.id,
            )
            candidates.prefer(self._upstream_events.connected())
            async with response.admit(candidates, queued), turn.exit_stack:
                if key.log_days is not None:
                    response.recorder = BodyRecorder.begin(gateway, key, request.id)
                    if response.recorder:
                        await response.recorder.take_client_event(event)
                await self._forward(turn, event, candidates)

    async def _forward(
        self, turn: Turn, event: ClientEvent, candidates: Candidates[Upstream]
    ) -> None:
        """Send a request to the member at which it has a place, or to the next one after a failure
        of that one, and wait until its turn is over. Raises ClientLeft if the client leaves before
        anything is sent."""
        assert candidates.member is not None, "the request is admitted"
        settings, total = self._gateway.settings, candidates.member.settings.total_timeout_seconds
        failover: SocketFailover = Failover(
            settings.failover, time.monotonic(), certain_only=candidates.is_pinned
        )
        turn.candidates = candidates
        turn.on_error = functools.partial(take_error, turn, candidates, failover)
        try:
            with turn.deadline.running(total, turn.response.grace()):
                socket = await self._answer_from(turn, event, candidates, failover)
            if turn.failure:
                self._note_lost(turn, socket)
                await self._fail(turn, turn.failure, Refusal("upstream_unreachable"))
                await socket.connection.wait_closed()  # until then its place is taken
            elif turn.response.id or turn.response.status not in FAILURES:
                judge_end(candidates, turn.response)  # else take_error has judged it
        except TimeoutError:
            await self._time_out(turn)
        except ConnectionClosed as closed:
            turn.response.note_failure(cause_of(closed))
            turn.lose("upstream_failed")
            await self._fail(
                turn, turn.failure or "upstream_failed", Refusal("upstream_unreachable")
            )
        except Refusal as refusal:
            is_clients = isinstance(refusal, CredentialRejected)
            await self._pass_failure(turn, (None if is_clients else failover.best()) or refusal)
        finally:
            event.sent = b""
            turn.end()

    async def _answer_from(
        self,
        turn: Turn,
        event: ClientEvent,
        candidates: Candidates[Upstream],
        failover: SocketFailover,
    ) -> UpstreamSocket:
        """Send a request, and wait until its turn is over. Return the connection that it was sent
        over last. Raises ConnectionClosed, TimeoutError, and Refusal if all members have failed."""

        def note(member: Upstream) -> None:
            turn.response.note_attempt(member)
            # Connecting has this timeout itself, and a second more is enough to report it.
            turn.deadline.allow(member.settings.connect_timeout_seconds + 1)

        while True:
            connect = self._upstream_events.socket_to
            socket = await connect_to_one(candidates, failover, connect, note)
            if turn.deadline.client_left:
                raise TimeoutError
            turn.use(socket)
            await self._send(turn, socket, event)
            if turn.socket:
                return socket
            if candidates.member not in (None, socket.upstream):
                continue
            seconds = self._gateway.settings.limits.queue_seconds
            turn.deadline.allow(seconds + 1)
            if not (turn.waits and await failover.go_on_in_turn(candidates, None, seconds)):
                raise Refusal(REJECTED_KEY)  # unless a member has answered something better

    async def _pass_failure(self, turn: Turn, best: ErrorEvent | Refusal) -> None:
        """End a turn that all members have failed: tell the client the best of their answers, but
        nothing of one that rejects the operator's key."""
        response = turn.response
        if isinstance(best, ErrorEvent):
            response.note_member(best.member)
            response.note_answer(best.upstream_status, best.request_id)
            if best.upstream_status not in REJECTED_STATUSES:
                await response.take(best.event, "error")
                await response.settle(response.outcome())
                if await self._sender.send(best.shown) and response.recorder:
                    await response.recorder.take_event(best.shown)
                return
            response.note_failure(best.code)
            best = Refusal(REJECTED_KEY)
        elif isinstance(best, HandshakeRefused):
            if best.member:
                response.note_member(best.member)
            response.upstream_status = best.upstream_status
            response.note_failure(best.cause)
            if best.upstream_status not in CERTAIN:
                best = Refusal("upstream_unreachable")
        answered = best.code != "upstream_unreachable"
        await self._fail(turn, "upstream_error" if answered else "upstream_failed", best)

    def _note_lost(self, turn: Turn, socket: UpstreamSocket) -> None:
        """Note in the member's health that its connection was lost with the response."""
        turn.response.note_failure(socket.cause)
        if socket.cause and turn.candidates and not turn.deadline.client_left:
            turn.candidates.fail(socket.cause, torn=turn.response.first_byte_ms is not None)

    async def _send(self, turn: Turn, socket: UpstreamSocket, event: ClientEvent) -> None:
        """Send a request, and wait until its turn is over. Give the connection up if the upstream
        has answered the message and does not read the rest of it: nothing can follow that. Raises
        ConnectionClosed."""
        turn.deadline.allow(socket.upstream.settings.first_byte_timeout_seconds)
        try:
            was_sent = await socket.send(event.sent, turn.over)
        except ConnectionClosed:
            if turn.socket:
                raise
            return  # the upstream has answered with an error, and closed the connection
        if was_sent:
            await turn.over
        elif not turn.failure:
            self._lanes.lose(socket, "given_up", "upstream_failed")
            self._tasks.start(socket.close())

    async def _time_out(self, turn: Turn) -> None:
        """End a turn whose time is up: that of the upstream, or of a client that is gone or does
        not read. With it goes its connection (Rule 4 of the session). Raises ClientLeft."""
        if turn.response.settled:
            return
        socket, has_left, failure = turn.socket, turn.deadline.client_left, "upstream_timeout"
        head_came = turn.response.first_byte_ms is not None
        if socket is None:
            if has_left:
                await turn.response.forget()
            turn.response.note_failure("connect_timeout")
            await self._fail(turn, "upstream_failed", Refusal(failure))
            return
        outcome: Outcome = turn.failure or "upstream_failed"
        turn.response.note_failure(cause_of(TimeoutError(), head_came))
        if has_left or socket.state == "blocked":
            outcome = "client_disconnected"
        elif turn.candidates and not turn.deadline.total_is_over:
            turn.candidates.fail(cause_of(TimeoutError(), head_came), torn=head_came)
        self._lanes.lose(socket, "lost", outcome)
        await self._fail(turn, outcome, Refusal(failure))
        await socket.close()

    async def _fail(self, turn: Turn, outcome: Outcome, refusal: Refusal) -> None:
        """Settle a response that has not ended, and tell a client that is there of the failure."""
        response = turn.response
        if response.settled:
            return
        if outcome != "client_disconnected" and response.first_byte_ms is None:
            response.status = refusal.status  # all that the client gets is the error
        await response.settle(outcome)
        if outcome in FAILED:
            await self._sender.send_error(refusal, turn.stream_id)


def take_error(
    turn: Turn,
    candidates: Candidates[Upstream],
    failover: SocketFailover,
    event: Answer,
    message: str | bytes,
) -> bool:
    """Note what an error event says of its member, if it comes before a response. Return
    whether the client is not sent it: the request is sent to another member, or there is a
    better answer, or the event rejects the operator's key, which is not the client's
    business."""
    status, socket = failure_status(event), turn.socket
    if socket and socket.upstream.is_client and status in CREDENTIAL_STATUSES:
        status = None  # it concerns the client's own credential
    if status is None:
        candidates.answer(serves=False)
        if is_unreadable(event) and candidates.may_be_unreadable and failover.best():
            turn.leave_member()
            return True
    if status is None or turn.deadline.client_left or socket is None:
        return False
    error = ErrorEvent(socket.upstream, event, message, status, socket.request_id)
    error.judge(candidates)
    if error.is_short:
        failover.keep(error)
    if failover.go_on(candidates, status):
        turn.leave_member()
        return True
    waits, best = error.is_short and failover.may_wait(candidates, status), failover.best()
    if (best is None or best is error) and not (waits or status in REJECTED_STATUSES):
        return False
    turn.leave_member(waits)
    return True


def expired() -> Refusal:
    """Return the refusal of a session that has lasted for `total_timeout_seconds`, or that this
    process does not serve any more."""
    return Refusal("websocket_connection_limit_reached")
