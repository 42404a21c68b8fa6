"""The turns of a session. A turn is a response.create with its response, and with the responses
that follow by themselves.

A response can be steered: the client sends more input for it while it is in flight. The upstream
then ends it early and begins another one that takes the new input in, without being asked again
(Rule 3 of the session). Each of them is a `TurnResponse` with a row of its own, and the turn goes
from one to the next:

    waiting ─► open ─┬─► settled ─► done
       ▲             │      ▲
       │             ▼      │ all steering has failed
       └─ awaiting_follow_up

An error can settle a response that has not begun. From every state the turn is "done" when its
upstream connection is lost or its time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from redbtc.billing.spending import Hold
from redbtc.deadlines import Deadline
from redbtc.gateway.websocket.event_meter import event_status, kind_of, response_named
from redbtc.gateway.websocket.strays import hold_nothing
from redbtc.gateway.websocket.turn_response import TurnResponse
from redbtc.gateway.websocket.upstream_socket import UpstreamSocket
from redbtc.limits.admission import Admission
from redbtc.meter.answers import Answer
from redbtc.refusals import Refusal, not_found
from redbtc.request_body.body import ClientEvent
from redbtc.request_body.reading import MAX_INPUT_ITEMS
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome

MAX_STEERS = 4  # 'response.steer' events of a turn that the upstream has not answered
STEER_SECONDS = 30  # for the response that follows one which was steered
UNRESOLVED = ("response.steer.failed", "response.steer.pending")


TurnState = Literal[
    "waiting",  # its response has not begun
    "open",  # its response has begun
    "awaiting_follow_up",  # its response is settled, and another one is expected to follow
    "settled",  # its last response is settled; the event that ended it may not be sent yet
    "done",  # nothing more comes, or nothing more is waited for
]
FINISHED: tuple[TurnState, ...] = ("settled", "done")
WAITS_FOR_RESPONSE: tuple[TurnState, ...] = ("waiting", "awaiting_follow_up")


class Steer(NamedTuple):
    """Input for the response in flight, of which the upstream has not said yet what became of it:
    the most tokens that it has, and about how many; and what is held for the response that
    follows."""

    tokens: int
    input_estimate: int
    hold: Hold


class Turn:
    """One response.create and its responses, one after the other. `response` is the last of them,
    and `socket` is the connection over which it is asked for, once there is one."""

    def __init__(self, stream_id: str | None, response: TurnResponse, deadline: Deadline) -> None:
        self.stream_id = stream_id
        self.response = response
        self.deadline = deadline
        self.state: TurnState = "waiting"
        self.socket: UpstreamSocket | None = None
        self.failure: Outcome | None = None  # how a response ends whose connection was lost
        # Done when the turn is over.
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steers: list[Steer] = []
        # Offered an error event that comes before the response; see `takes_error`.
        self.on_error: Callable[[Answer, str | bytes], bool] | None = None
        self.waits = False  # for a place at another member
        self.candidates: Candidates[Upstream] | None = None  # the member that serves it
        # Ends the response that followed the one before, and releases what is held for the next.
        # It is entered before the request is sent, so that both end with the turn.
        self.exit_stack = contextlib.AsyncExitStack()

    def end(self) -> None:
        """Wait for nothing more."""
        self._enter("done")

    def lose(self, outcome: Outcome) -> None:
        """Note that the upstream connection is lost. A response that is not settled ends with
        `outcome`, or as `client_disconnected` if the client has left."""
        if self.state != "done":
            self.failure = "client_disconnected" if self.deadline.client_left else outcome
            self.end()

    def takes_error(self, event: Answer, message: str | bytes) -> bool:
        """Return whether an event is an error that the client is not sent, since the request is
        sent to another member, or the client is told something else."""
        begun = self.state != "waiting" or self.response.first_byte_ms is not None
        if begun or self.on_error is None or kind_of(event) != "error":
            return False
        return self.on_error(event, message)

    @property
    def is_connecting(self) -> bool:
        """Return whether a connection is looked for over which the request can be sent."""
        return self.candidates is not None and self.socket is None and self.state not in FINISHED

    def use(self, socket: UpstreamSocket) -> None:
        """Send the request over this connection: the turn is over when that has answered it."""
        self.socket = socket
        socket.left_lanes.discard(self.stream_id)
        if self.over.done():
            self.over = asyncio.get_running_loop().create_future()

    def leave_member(self, waits: bool = False) -> None:
        """Wait for nothing more from the upstream that the request was sent to. `waits`: for
        another one, all others are full at the moment."""
        self.waits = waits
        if self.socket:
            self.socket.left_lanes.add(self.stream_id)
            self.socket = None
        if not self.over.done():
            self.over.set_result(None)

    def _enter(self, state: TurnState) -> None:
        """Change the state. "done" is final: a long event can still be metered then."""
        if self.state == "done":
            return
        self.state = state
        if state == "done" and not self.over.done():
            self.over.set_result(None)

    async def steer(self, response_id: str, event: ClientEvent, admission: Admission) -> None:
        """Hold what the response that follows can cost, before the steering goes on: it reads what
        this one has read and said, and the event. Raises Refusal."""
        self._check_steering(event)
        admission.charge("tokens", 0)
        tokens = event.max_input_tokens + event.inherited.tokens
        waiting = sum(steer.tokens for steer in self._steers)
        hold = await self.response.take_hold(self.response.next_input(tokens + waiting))
        if self.response.settled or self.response.id != response_id:  # it has ended meanwhile
            hold.release()
            raise not_found("previous_response_id", response_id)
        self.exit_stack.enter_context(hold)
        self.response.body.chosen_ids |= event.chosen_ids
        self._steers.append(Steer(tokens, event.input_estimate, hold))

    def _check_steering(self, event: ClientEvent) -> None:
        """Raise Refusal for steering that the response can't be given."""
        body = self.response.body
        further = event.extras & ~body.extras
        if further or event.inheritable_models not in (None, body.inheritable_models):
            message = (
                "'response.steer' can't refer to an item of a response that has other tools, or "
                "ask for another prompt cache lifetime."
            )
            raise Refusal("invalid_request", message, param="input")
        if len(self._steers) >= MAX_STEERS:
            message = f"This response has {MAX_STEERS} unanswered steering events, the maximum."
            raise Refusal("concurrency_limit_exceeded", message)
        if len(body.chosen_ids) + len(event.chosen_ids) > MAX_INPUT_ITEMS:
            message = f"The input of this response has more than {MAX_INPUT_ITEMS} items with ids."
            raise Refusal("invalid_request", message, param="input")

    async def take(self, event: Answer, idle_seconds: float) -> None:
        """Meter an event of the turn; it may be sent to the client when this returns."""
        kind = kind_of(event)
        self.deadline.allow(idle_seconds)
        settled = self.response.settled
        if self._steers and (kind in UNRESOLVED or (kind == "error" and settled)):
            self._steers.pop(0).hold.release()  # no response will follow
            if settled:
                self._enter(self._settled_state())
        elif kind not in UNRESOLVED:
            if settled and response_named(event) not in (None, self.response.id):
                await self._follow()
            if not self.response.settled:
                await self._meter(event, kind)
        if self.response.settled:
            self.deadline.allow(STEER_SECONDS)

    async def _meter(self, event: Answer, kind: str) -> None:
        """Meter an event of the response, and settle the response if it is the last one."""
        response = self.response
        await response.take(event, kind)
        if self.state == "waiting" and response.id and kind != "error":
            self._enter("open")
            if self.candidates:
                self.candidates.answer()
        if response.meter.state == "ended" and not response.settled:
            status = event_status(event) if kind == "error" else 200
            response.note_answer(status, self.socket.request_id if self.socket else None)
            self._enter(self._settled_state())
            await response.settle(response.outcome())

    def _settled_state(self) -> TurnState:
        """Return the state that follows when the response is settled."""
        if self._steers or self.response.meter.was_steered:
            return "awaiting_follow_up"
        return "settled"

    async def _follow(self) -> None:
        """Go on to the response that the upstream has begun by itself. It takes in all steering
        that the one before was sent."""
        before, steers = self.response, self._steers
        self._steers = []
        for steer in steers[:-1]:  # the last one's hold includes what they have
            steer.hold.release()
        if steers:
            hold = steers[-1].hold.transfer()
        else:
            billing, model = before.gateway.billing, before.row.requested_model
            hold = await hold_nothing(billing, before.key, model)
        if self.over.done():  # it was given up meanwhile
            hold.release()
            return
        try:
            tokens = before.next_input(sum(steer.tokens for steer in steers))
            estimate = sum(steer.input_estimate for steer in steers)
            self.response = before.following(hold, tokens, estimate)
        except BaseException:
            hold.release()
            raise
        await self.exit_stack.aclose()  # what was before has ended
        self.exit_stack.push_async_exit(self.response)
        self._enter("waiting")
        await self.response.write_pending()
