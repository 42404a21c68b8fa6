"""One response over a WebSocket, with its row in the ledger."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from redbtc.billing.spending import Hold
from redbtc.deadlines import Deadline
from redbtc.gateway.body_recorder import BodyRecorder
from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.metered_request import MeteredRequest
from redbtc.gateway.websocket.event_meter import EventMeter
from redbtc.limits.admission import Admission
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import Answer
from redbtc.request_body.body import ClientEvent
from redbtc.server.asgi import ClientRequest
from redbtc.store.keys import Key
from redbtc.store.requests import settle_row
from redbtc.usage import Outcome, Usage


class SessionObjects(Struct, eq=False):
    """The objects that were made over one client's connection."""

    # Where they are, stored or not: requests over the same connection can build on them.
    locations: dict[str, ObjectLocation] = field(default_factory=dict)
    billed: set[str] = field(default_factory=set)  # responses whose usage is in the ledger


class TurnResponse(MeteredRequest):
    """The response to a response.create, or one that follows by itself because the one before was
    steered."""

    meter: EventMeter

    def __init__(
        self,
        gateway: Gateway,
        client_request: ClientRequest,
        deadline: Deadline,
        admission: Admission,
        key: Key,
        event: ClientEvent,
        objects: SessionObjects,
    ) -> None:
        super().__init__(gateway, client_request, RESPONSES, deadline, admission, key, event)
        self.meter = EventMeter()
        self._event = event
        self._objects = objects

    @property
    def id(self) -> str | None:
        """The response's id; None as long as no event has named it."""
        return self.meter.report.response_id

    async def take(self, event: Answer, kind: str) -> None:
        """Meter an event, whose type is `kind`."""
        if self.first_byte_ms is None:
            self.note_first_byte()
            self.body.sent = b""  # from now on the request is sent to no other member
        await self.meter.take(event, kind, self.key.account_id)
        self.act_on_report()

    async def settle(self, outcome: Outcome) -> None:
        """Commit the row as the response ended."""
        await super().settle(outcome)
        if self.id and self.row.usage_source != "none":
            self._objects.billed.add(self.id)

    def _own(
        self, made: Mapping[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, ObjectLocation]:
        """Record the objects that the upstream made. Requests over this connection can name them
        even if they are not stored."""
        locations = super()._own(made, usage, likely)
        self._objects.locations.update(locations)
        return locations

    @property
    def location(self) -> ObjectLocation:
        """The place where the response and its items are stored. `minted_input` is false, since a
        steer event can still add input with ids that the client chose."""
        return super().location._replace(minted_input=False)

    def next_input(self, steered_tokens: int) -> int:
        """Return how many tokens a response that follows reads at most besides the request: what
        this one has read and said, and the input that it was steered by."""
        output_tokens = self.maximum.output_tokens(self.hold.model_prices)
        return self.further_input + output_tokens + steered_tokens

    def following(self, hold: Hold, further_input: int, steered_estimate: int) -> TurnResponse:
        """Return the response that follows this one, in its places and with a row of its own.
        `hold` is the hold for it. It reads at most `further_input` tokens besides the request, and
        was steered by about `steered_estimate` tokens."""
        usage = self.row.usage
        response = TurnResponse(
            self.gateway,
            self.client_request.new_request(),
            self.deadline,
            self.admission,
            self.key,
            self._event,
            self._objects,
        )
        response.further_input = further_input
        response.is_free = self.is_free
        said = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        response.input_estimate = said + steered_estimate
        response.take_over(self.row, hold)
        if self.recorder:
            request_id = response.client_request.id
            response.recorder = BodyRecorder.begin(self.gateway, self.key, request_id)
        return response

    async def write_pending(self) -> None:
        """Commit the pending row of a response that follows, however long that takes."""
        await settle_row(self.gateway.store, self.row)
