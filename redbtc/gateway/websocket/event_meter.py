"""The events of an upstream's WebSocket: what they name, and the meter of a response's events."""

from __future__ import annotations

from typing import Any, TypeGuard

from redbtc.meter.answers import Answer, name_in
from redbtc.meter.events import LAST
from redbtc.meter.meters import Meter
from redbtc.meter.report import Report
from redbtc.slices import in_slices
from redbtc.steps import Steps, result_of

STREAM_ID_TYPES = (str, type(None))


class EventMeter(Meter):
    """Meters the events of one response. `was_steered` says that it ended for another response to
    follow by itself."""

    def __init__(self) -> None:
        self.report = Report(images=False)
        self.was_steered = False

    async def take(self, event: Answer, kind: str, account_id: str) -> None:
        """Meter an event, whose type is `kind`."""
        if event.is_long:
            await in_slices(self._take(event, kind), account_id, started=True)
        else:
            result_of(self._take(event, kind))

    def _take(self, event: Answer, kind: str) -> Steps[None]:
        if event.delta:
            self.report.passed.see_delta(event, chat=False)
        if event.response or event.item or kind == "error" or kind.endswith("partial_image"):
            yield from self.report.note(event)
        if kind == "error" or LAST.fullmatch(kind.encode()):
            self.state = "ended"
        if kind == "response.incomplete" and event.inner:
            details = event.inner.incomplete_details
            self.was_steered = isinstance(details, dict) and details.get("reason") == "steered"


def kind_of(event: Answer) -> str:
    """Return the type of an event; "" if it has none."""
    return event.type if isinstance(event.type, str) else ""


def response_named(event: Answer) -> str | None:
    """Return the id of the Response object in an event, None if there is none."""
    return name_in(event.inner.id) if event.inner else None


def is_stream_id(stream_id: Any) -> TypeGuard[str | None]:
    """Return whether a lane can have this `stream_id`; None is the lane of events without one."""
    return isinstance(stream_id, STREAM_ID_TYPES)


def event_status(event: Answer) -> int:
    """Return the status of an error event, 500 if it has no valid one."""
    return event.status if type(event.status) is int and 400 <= event.status <= 599 else 500
