"""Responses that no request asked for. What an upstream reports for them gets rows of its own:
nothing that was used passes unwritten."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from redbtc.billing.billing import Billing
from redbtc.billing.spending import Hold
from redbtc.deadlines import TICK
from redbtc.errors import StorageUnavailable
from redbtc.gateway.endpoints import RESPONSES
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.maximum import maximum_of_unknown
from redbtc.gateway.settlement import account_for, bill, count_containers, locations_of
from redbtc.gateway.websocket.event_meter import EventMeter, is_stream_id, kind_of
from redbtc.gateway.websocket.turn_response import SessionObjects
from redbtc.locations import ObjectLocation
from redbtc.meter.answers import Answer
from redbtc.meter.error_codes import kept_code
from redbtc.meter.estimates import Estimate, SeenOutput, estimate, is_complete
from redbtc.request_body.facts import DEFAULT_IMAGE_MODEL
from redbtc.server.asgi import new_request_id
from redbtc.store.keys import Key
from redbtc.store.requests import CorrectionFacts, settle_row
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome, RequestRow

MAX_STRAYS = 16  # responses of a connection whose events are metered at the same time


async def hold_nothing(billing: Billing, key: Key, model: str) -> Hold:
    """Return a hold of nothing at the current prices, for a response that nobody asked for. Wait
    until the ledger can be read."""
    while True:
        with contextlib.suppress(StorageUnavailable):
            return await billing.hold_at(key, model, billing.store.time(), 0)
        await asyncio.sleep(TICK)


class Stray:
    """A response that no request asked for, while its events pass."""

    def __init__(self) -> None:
        self.meter = EventMeter()
        self.started = time.monotonic()


class Strays:
    """The responses of one upstream connection that no request asked for."""

    def __init__(
        self,
        gateway: Gateway,
        key: Key,
        upstream: Upstream,
        digest: str | None,
        objects: SessionObjects,
    ) -> None:
        """`digest` is that of the client's own credential, if the connection was made with it."""
        self._gateway = gateway
        self._key = key
        self._upstream = upstream
        self._digest = digest
        self._objects = objects
        self._strays: dict[str | None, Stray] = {}  # by lane

    async def take(self, event: Answer) -> None:
        """Meter an event that is no turn's, if it belongs to a response."""
        lane = event.stream_id if is_stream_id(event.stream_id) else None
        if event.response and lane not in self._strays and len(self._strays) < MAX_STRAYS:
            self._strays[lane] = Stray()
        if stray := self._strays.get(lane):
            await stray.meter.take(event, kind_of(event), self._key.account_id)
            if stray.meter.state == "ended":
                del self._strays[lane]
                failed = stray.meter.report.failed
                await self._write(stray, "upstream_error" if failed else "completed")

    async def end(self, outcome: Outcome) -> None:
        """Write what the responses have used that go on: their connection is lost."""
        for stray in self._strays.values():
            await self._write(stray, outcome)

    async def _write(self, stray: Stray, outcome: Outcome) -> None:
        """Write what a response has used. If a request was billed for it already, by an estimate
        possibly, correct that."""
        report, gateway = stray.meter.report, self._gateway
        named = [report.response_id] if report.response_id else []
        used = is_complete(report) or outcome != "upstream_error" or SeenOutput.of(report)
        if not self._objects.billed.isdisjoint(named):
            await gateway.corrections.correct_if_final(
                named[0], self._key.account_id, report, self._digest
            )
            return
        if not used:
            return
        self._objects.billed.update(named)
        guess = None if is_complete(report) else await self._estimate(stray)
        row = self._new_row(stray)
        parts = account_for(row, report, outcome, guess)
        hold = await hold_nothing(gateway.billing, self._key, row.requested_model)
        parts = await count_containers(gateway.containers, row, report, parts)
        is_free = self._upstream.is_free
        bill(row, [] if is_free else parts, gateway.billing, hold, DEFAULT_IMAGE_MODEL)
        location = ObjectLocation(row.upstream, credential=self._digest)
        usage = None if guess else row.usage
        locations = locations_of(named, report, location, usage)
        gateway.objects.own_each(locations, row.account_id)
        facts = None if is_free else CorrectionFacts(hold.at, DEFAULT_IMAGE_MODEL, 0)
        await settle_row(gateway.store, row, facts)
        gateway.telemetry.settled(row)

    def _new_row(self, stray: Stray) -> RequestRow:
        """Return a row with what is known of a response, except its usage."""
        report = stray.meter.report
        return RequestRow(
            request_id=new_request_id(),
            account_id=self._key.account_id,
            key_id=self._key.id,
            endpoint=RESPONSES.path,
            requested_model=report.model or "",
            upstream=self._upstream.name,
            started_at=self._gateway.store.time(),
            duration_ms=0,
            status=200,
            model=report.model,
            service_tier=report.service_tier,
            response_id=report.response_id,
            upstream_status=200,
            upstream_error_code=kept_code(200, report.error_code, self._upstream.is_client),
            credentials="client" if self._upstream.is_client else "operator",
        )

    async def _estimate(self, stray: Stray) -> Estimate:
        """Return an estimate of what a response has used. What it read is not known."""
        report, worked = stray.meter.report, time.monotonic() - stray.started
        speed = await self._gateway.speeds.of(report.model or "", self._key.account_id, False)
        return estimate(
            report,
            SeenOutput.of(report),
            written=math.ceil(worked * speed),
            read=0,
            maximum=maximum_of_unknown(self._gateway.settings.billing, 0),
            images=False,
            partly=False,
        )
