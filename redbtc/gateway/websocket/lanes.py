"""The lanes of a session: requests of one `stream_id` take turns, lanes run side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection, Iterator

from redbtc.deadlines import MAX_EXPIRED, TICK
from redbtc.gateway.websocket.event_meter import is_stream_id, kind_of, response_named
from redbtc.gateway.websocket.turns import FINISHED, WAITS_FOR_RESPONSE, Turn
from redbtc.gateway.websocket.upstream_socket import SocketState, UpstreamSocket
from redbtc.limits.admission import Admission
from redbtc.limits.memory import Reservation
from redbtc.meter.answers import Answer
from redbtc.refusals import Refusal
from redbtc.request_body.body import ClientEvent
from redbtc.usage import Outcome

MAX_WAITING = 1000  # requests of a session that have not left for an upstream


class MessageMemory:
    """The memory that is reserved for one message of the client, until the end of `with`."""

    def __init__(self, reservation: Reservation, size: int) -> None:
        self._reservation = reservation
        self._size = size

    def __enter__(self) -> MessageMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def grow(self, size: int) -> None:
        """Reserve `size` bytes more, which are in use already. Raises Refusal."""
        await self._reservation.take(size, None)
        self._size += size

    def transfer(self) -> MessageMemory:
        """Return what keeps the memory when this ends."""
        size, self._size = self._size, 0
        return MessageMemory(self._reservation, size)

    def release(self) -> None:
        """Give the memory back. It has no effect the second time."""
        if self._size:
            self._reservation.give_back(self._size)
            self._size = 0


class QueuedRequest:
    """A response.create that has not left for an upstream, with what was charged for it and the
    memory that it takes. `queued` are all of the session, as long as they are not released."""

    def __init__(
        self,
        event: ClientEvent,
        admission: Admission,
        memory: MessageMemory,
        queued: set[QueuedRequest],
    ) -> None:
        self.event = event
        self.admission = admission
        self._memory = memory
        self._queued = queued
        queued.add(self)

    def release(self) -> None:
        """Give the memory back, and count it no longer. It has no effect the second time."""
        self._queued.discard(self)
        self._memory.release()


class Lane:
    """The requests of one `stream_id`, one after the other."""

    def __init__(self, stream_id: str | None) -> None:
        self.stream_id = stream_id
        self.waiting: deque[QueuedRequest] = deque()
        self.turn: Turn | None = None
        self.task: asyncio.Task[None] | None = None  # that serves them
        self._is_moving = False

    @property
    def has_waiting(self) -> bool:
        """Return whether its turn is not admitted yet. Those that wait for the turn are not counted
        in: once no more are begun, they are refused after it."""
        return bool(self.turn and not self.turn.response.is_held)

    @contextlib.contextmanager
    def having_turn(self) -> Iterator[None]:
        """Have no turn at the end of `with`."""
        try:
            yield
        finally:
            self.turn = None

    def move(self) -> None:
        """Cancel the task that serves the lane where its request is not admitted yet. The task goes
        on with the next request if it asks `goes_on`."""
        if self.task and self.turn and not self.turn.response.is_held:
            self._is_moving = True
            self.task.cancel()

    def goes_on(self) -> bool:
        """Return whether `move` has cancelled the task, which then is not cancelled any more."""
        is_moving, self._is_moving = self._is_moving, False
        if is_moving and self.task:
            self.task.uncancel()
        return is_moving


class Lanes:
    """The lanes that have requests, and which of their turns an upstream's event belongs to."""

    def __init__(self, known: Collection[str]) -> None:
        """`known` are the ids of what was made over this connection."""
        self._known = known
        self._lanes: dict[str | None, Lane] = {}
        self._queued: set[QueuedRequest] = set()

    @property
    def idle(self) -> bool:
        """Return whether no lane has a request."""
        return not self._lanes

    def queue(self, event: ClientEvent, admission: Admission, memory: MessageMemory) -> Lane | None:
        """Put a request in its lane. Return the lane if that is new, and its requests must be
        served. Raises Refusal."""
        if len(self._queued) >= MAX_WAITING:
            message = f"{MAX_WAITING} requests are waiting on this connection, the maximum."
            raise Refusal("concurrency_limit_exceeded", message)
        request = QueuedRequest(event, admission, memory.transfer(), self._queued)
        stream_id = event.facts.stream_id
        lane = self._lanes.get(stream_id)
        if lane:
            lane.waiting.append(request)
            return None
        lane = self._lanes[stream_id] = Lane(stream_id)
        lane.waiting.append(request)
        return lane

    @property
    def have_waiting(self) -> bool:
        """Return whether the turn of any lane is not admitted yet."""
        return any(lane.has_waiting for lane in self._lanes.values())

    def move(self) -> None:
        """Cancel the requests that are not admitted yet, as Lane.move does."""
        for lane in self._lanes.values():
            lane.move()

    @property
    def are_connecting(self) -> bool:
        """Return whether a turn is between two connections, or before its first one."""
        return any(turn.is_connecting for turn in self.turns())

    def remove(self, lane: Lane) -> None:
        """Forget a lane that has no more requests."""
        del self._lanes[lane.stream_id]

    def turns(self) -> list[Turn]:
        """Return the turns, in the order of their lanes."""
        return [lane.turn for lane in self._lanes.values() if lane.turn]

    def turns_on(self, socket: UpstreamSocket) -> list[Turn]:
        """Return the turns on a connection that have not finished, in the order of their lanes."""
        return [
            turn for turn in self.turns() if turn.socket is socket and turn.state not in FINISHED
        ]

    def end_settled(self, socket: UpstreamSocket) -> None:
        """End the turns on a connection that are settled and wait for their last event to be passed
        on, since that has failed."""
        for turn in self.turns():
            if turn.socket is socket and turn.state == "settled":
                turn.end()

    def has_turn_on(self, socket: UpstreamSocket) -> bool:
        """Return whether a turn on a connection has not ended."""
        return any(turn.socket is socket for turn in self.turns())

    def turn_of_response(self, response_id: str) -> Turn | None:
        """Return the turn of a response that is in flight."""
        for turn in self.turns():
            if turn.socket and turn.response.id == response_id and not turn.response.settled:
                return turn
        return None

    def lose(self, socket: UpstreamSocket, state: SocketState, outcome: Outcome) -> None:
        """Send nothing more that comes from a connection. The turns on it end with `outcome`."""
        socket.enter(state)
        for turn in self.turns_on(socket):
            turn.lose(outcome)

    async def leave(self) -> None:
        """End all requests when the client is gone. Responses may be read on for their usage."""
        turns = self.turns()
        for turn in turns:
            turn.deadline.client_left = True  # it begins nothing more
        for lane in self._lanes.values():
            while lane.waiting:
                request = lane.waiting.popleft()
                request.admission.refund()
                request.release()
        for number, turn in enumerate(turns, 1):
            turn.deadline.on_client_disconnect()
            if number % MAX_EXPIRED == 0:
                await asyncio.sleep(0)  # its tasks have something to do now
        while self._lanes:
            await asyncio.sleep(TICK)

    def turn_of(self, event: Answer, socket: UpstreamSocket) -> Turn | None:
        """Return the turn that an event from an upstream belongs to (Rule 2 of the session), None
        if it is no turn's."""
        if not event.response and (turn := self._turn_of_lane(event, socket)):
            return None if turn.state in FINISHED else turn
        turns = self.turns_on(socket)
        if named := response_named(event):
            is_known = named in self._known and kind_of(event) != "response.created"
            return turn_of_named(turns, event, named, is_known)
        return turn_of_unnamed(turns, event, socket.idle_seconds)

    def _turn_of_lane(self, event: Answer, socket: UpstreamSocket) -> Turn | None:
        """Return the turn of an event that holds no response: that of its lane, if it is served
        over this connection."""
        lane = self._lanes.get(event.stream_id) if is_stream_id(event.stream_id) else None
        return lane.turn if lane and lane.turn and lane.turn.socket is socket else None


def turn_of_named(turns: list[Turn], event: Answer, named: str, is_known: bool) -> Turn | None:
    """Return the turn of the response that an event names. A response that is not `is_known` is
    that of the first turn that waits for one, in the event's lane if it names one."""
    for turn in turns:
        if turn.response.id == named:
            return turn
    if is_known:
        return None
    waiting = [turn for turn in turns if turn.state in WAITS_FOR_RESPONSE]
    in_lane = [turn for turn in waiting if turn.stream_id == event.stream_id]
    if not isinstance(event.stream_id, str):
        in_lane = in_lane or waiting
    return in_lane[0] if in_lane else None


def turn_of_unnamed(turns: list[Turn], event: Answer, idle_seconds: float) -> Turn | None:
    """Return the turn of an event that names no response: that of its lane or, if it names none,
    the only one that it can belong to. An error can also belong to the only one of many turns that
    waits for its response. If it can belong to several, allow all of them `idle_seconds` more."""
    in_lane = [turn for turn in turns if turn.stream_id == event.stream_id]
    if in_lane or isinstance(event.stream_id, str):
        return in_lane[0] if in_lane else None
    if kind_of(event) == "error" and len(turns) > 1:
        turns = [turn for turn in turns if turn.state in WAITS_FOR_RESPONSE]
    if len(turns) == 1:
        return turns[0]
    for turn in turns:
        turn.deadline.allow(idle_seconds)
    return None
