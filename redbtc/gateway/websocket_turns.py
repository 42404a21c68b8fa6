"""One response.create of a WebSocket session and its response."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

from redbtc.billing.spending import Hold
from redbtc.deadlines import Deadline
from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.metered import MeteredRequest
from redbtc.gateway.progress import PROGRESS_GROWTH, PROGRESS_SECONDS
from redbtc.gateway.websocket_upstream import UpstreamSocket
from redbtc.limits.admission import Admission
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import Answer, name_in, result_of
from redbtc.meter.events import LAST
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.refusals import Refusal, not_found
from redbtc.request_body.body import ClientEvent
from redbtc.request_body.reading import MAX_INPUT_ITEMS
from redbtc.server.asgi import Scope, new_request_id
from redbtc.slices import in_slices
from redbtc.store.keys import Key
from redbtc.store.requests import settle
from redbtc.usage import Outcome, Usage

if TYPE_CHECKING:
    from redbtc.gateway.websocket_session import WebSocketSession


MAX_STEERS = 4  # 'response.steer' events of a turn that the upstream has not answered
STEER_SECONDS = 30  # for the response that follows one which was steered
UNRESOLVED = ("response.steer.failed", "response.steer.pending")


class EventMeter(Meter):
    """Meters the events of one response."""

    def __init__(self) -> None:
        self.report = Report(images=False)
        self.ended = False
        self.steered = False  # it ended for another to follow

    async def take(self, event: Answer, account_id: str) -> None:
        """Meter one of its events."""
        if event.is_long:
            await in_slices(self._take(event), account_id, started=True)
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


class Turn(MeteredRequest):
    """One response.create, and the responses that follow by themselves where it is steered."""

    meter: EventMeter

    def __init__(
        self,
        session: WebSocketSession,
        lane: Lane,
        scope: Scope,
        admission: Admission,
        key: Key,
        event: ClientEvent,
    ) -> None:
        gateway = session.gateway
        deadline = Deadline(gateway.clocks)
        super().__init__(gateway, scope, RESPONSES, deadline, admission, key, event)
        self.meter = EventMeter()
        self.lane = lane
        self.line: UpstreamSocket | None = None
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
        return self.settled and self.row.usage_source != "none"

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

    async def steer(self, response_id: str, frame: ClientEvent, admission: Admission) -> None:
        """Hold what the response that follows can cost, before the steering goes on: it reads what
        this one has read and said, and the frame. Raises Refusal."""
        content = self.body
        other = frame.extras & ~content.extras
        if other or frame.inheritable_models not in (None, content.inheritable_models):
            message = (
                "Steering can't name an item of a response whose input has other tools, or ask for "
                "another lifetime in the prompt cache."
            )
            raise Refusal("invalid_request", message, param="input")
        if len(self._steers) >= MAX_STEERS:
            message = f"This response has {MAX_STEERS} unanswered 'response.steer' events already."
            raise Refusal("concurrency_limit_exceeded", message)
        if len(content.chosen_ids) + len(frame.chosen_ids) > MAX_INPUT_ITEMS:
            message = f"The input of this response has more than {MAX_INPUT_ITEMS} items with ids."
            raise Refusal("invalid_request", message, param="input")
        admission.charge("tokens", 0)
        tokens = frame.max_input_tokens + frame.inherited.tokens
        waiting = sum(steer.tokens for steer in self._steers)
        money = await self.hold(self._read_next(tokens + waiting))
        if self.settled or self.response_id != response_id:  # it has ended meanwhile
            money.release()
            raise not_found("previous_response_id", response_id)
        self.holds.enter_context(money)
        content.chosen_ids |= frame.chosen_ids
        self._steers.append(Steer(response_id, tokens, frame.input_estimate, money))

    def _read_next(self, steered: int) -> int:
        """Return how many tokens a response that follows reads besides the request at most: what
        this one has read and said, and what it was steered by."""
        return self.further_input + self.maximum.output_tokens(self.money.model_prices) + steered

    async def take(self, event: Answer, idle_seconds: float) -> None:
        """One of its events has come; it may be sent on when this returns."""
        kind = kind_of(event)
        self.clock.allow(idle_seconds)
        if self._steers and (kind in UNRESOLVED or (kind == "error" and self.settled)):
            self._steers.pop(0).money.release()  # no response will follow
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
        self.metered()
        if self.meter.ended and not self.settled:
            self.status = status_of(event) if kind_of(event) == "error" else 200
            await self.settle(self.outcome())

    def _learn(
        self, made: dict[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, ObjectLocation]:
        """Learn the ids that the upstream made. This connection can name them even if they are not
        stored."""
        homes = super()._learn(made, usage, likely)
        self._session.remember(homes)
        return homes

    @property
    def location(self) -> ObjectLocation:
        """Where the objects that it makes are stored. `minted_input` is false, since a steer event
        can still add input with ids of the client's own."""
        return super().location._replace(minted_input=False)

    async def _follow(self) -> None:
        """A response that follows by itself has a row of its own. It takes in all that was sent to
        the one before."""
        before = self.response_id
        of_it = [each for each in self._steers if each.response_id == before]
        self.further_input = self._read_next(sum(each.tokens for each in of_it))
        self._steers = [each for each in self._steers if each.response_id != before]
        for steer in of_it[:-1]:  # the last one's hold includes what they have
            steer.money.release()
        money = of_it[-1].money if of_it else await self._session.no_hold(self.row)
        read, written = self.row.usage.input_tokens or 0, self.row.usage.output_tokens or 0
        self.input_estimate = read + written + sum(steer.input_estimate for steer in of_it)
        if self.over.done():
            return  # it was given up meanwhile
        self.money = money
        self.scope = {**self.scope, "request_id": new_request_id(), "started": time.monotonic()}
        self.row = self.new_row(self.row.requested_model, self.row.upstream)
        self.date_row()
        self._left_at = time.monotonic()
        self._saved_after = PROGRESS_SECONDS / PROGRESS_GROWTH
        self.meter, self.settled, self.first_byte_ms, self._named = EventMeter(), False, None, 0
        await settle(self.gateway.store, self.row)  # pending, however long that takes


class Lane:
    """Requests of one stream_id, one after the other."""

    def __init__(self, stream_id: str | None) -> None:
        self.stream_id = stream_id
        self.waiting: deque[ClientEvent] = deque()
        self.turn: Turn | None = None


class Stray:
    """A response that no request asked for, while its events pass."""

    def __init__(self) -> None:
        self.meter = EventMeter()
        self.begun = time.monotonic()

    @property
    def worked_seconds(self) -> float:
        return time.monotonic() - self.begun
