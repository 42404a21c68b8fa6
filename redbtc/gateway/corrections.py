"""Corrections of estimated requests. A response that the upstream stores can show its usage after
its request was settled by an estimate: the first time that its owner is shown it, the request is
corrected, at the prices of its admission. The difference is on the statement of the month in which
that happens, so that a closed month never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from msgspec import structs

from redbtc.billing.billing import Billing
from redbtc.billing.spending import Hold
from redbtc.errors import StorageUnavailable
from redbtc.gateway.settlement import locations_of, of_models
from redbtc.meter.estimates import is_cancelled_without_output, is_final
from redbtc.meter.report import Report
from redbtc.store.background import key_of
from redbtc.store.containers import Containers
from redbtc.store.estimated import EstimatedRow, correct, estimated_of
from redbtc.store.objects import Objects
from redbtc.store.requests import CorrectionFacts
from redbtc.usage import RequestRow, Usage, UsagePart


class ShownResponse:
    """A response that is being sent to readers, or whose request is just being estimated."""

    def __init__(self) -> None:
        self.hold: Hold | None = None  # for what a correction can add, if it is estimated
        self.readers = 0


class Corrections:
    """Writes corrections, each once."""

    def __init__(self, billing: Billing, objects: Objects, containers: Containers) -> None:
        self._billing = billing
        self._objects = objects
        self._containers = containers
        self._writing: dict[str, asyncio.Task[None]] = {}  # by response
        self._shown: dict[str, ShownResponse] = {}  # by response

    async def correct_if_final(
        self, response_id: str, account_id: str, report: Report, credential: str | None = None
    ) -> None:
        """Correct the estimated row of this response if the report has its final usage. Return when
        the correction is on disk. `credential` is what the response was stored with."""
        if not is_final(report):
            return
        writing = self._writing.get(response_id)
        if writing is None:
            found = self._estimated(response_id, account_id)
            if found is None or (is_cancelled_without_output(report) and found.output_tokens):
                return
            writing = asyncio.create_task(
                self._write(found, response_id, account_id, report, credential)
            )
            self._writing[response_id] = writing
            writing.add_done_callback(lambda _: self._writing.pop(response_id))
        await asyncio.shield(writing)

    async def hold(
        self, response_id: str, account_id: str
    ) -> contextlib.AbstractContextManager[None]:
        """Hold what a correction of the account's response can add to its cost. The returned
        context lasts while the response is sent to a reader; concurrent readers share one hold.
        Nothing is held unless the response's request was estimated, or is meanwhile. Raises
        SpendingLimitReached, StorageUnavailable."""
        found, hold = estimated_of(self._billing.store, response_id, account_id), None
        if found:
            key = key_of(self._billing.store, found.key_id)
            spending = await self._billing.spending_of(key)
            # Nothing is awaited from here on: other readers share the hold of the first one.
            quote = self._billing.quote(key, found.requested_model, spending)
            is_held = not quote.remaining or self.shows_estimated(response_id)
            hold = self._billing.hold(quote, 0 if is_held else max(0, found.held - found.cost))
        return self._showing(response_id, hold)

    def keep_held(
        self, row: RequestRow, hold: Hold, correction_facts: CorrectionFacts | None
    ) -> contextlib.AbstractContextManager[None]:
        """Hold what a correction can still add to the cost of an estimated row, if the row can be
        corrected. The hold lasts for the returned context, and until all readers have finished that
        began before the ledger says that the row is estimated. `hold` is the request's;
        `correction_facts` is as in `settle_row`."""
        if not (correction_facts and row.usage_source == "estimated" and row.response_id):
            return contextlib.nullcontext()
        further = max(0, correction_facts.held - (row.cost or 0))
        return self._showing(row.response_id, hold.again(further))

    def shows_estimated(self, response_id: str) -> bool:
        """Return whether a response whose usage is only estimated is being shown to a reader."""
        shown = self._shown.get(response_id)
        return shown is not None and shown.hold is not None

    def _showing(
        self, response_id: str, hold: Hold | None
    ) -> contextlib.AbstractContextManager[None]:
        shown = self._shown.setdefault(response_id, ShownResponse())
        shown.readers += 1
        if shown.hold is None:
            shown.hold = hold
        elif hold:
            hold.release()
        return self._until_left(response_id, shown)

    @contextlib.contextmanager
    def _until_left(self, response_id: str, shown: ShownResponse) -> Iterator[None]:
        """Count a reader; release the hold when the last one has finished."""
        try:
            yield
        finally:
            shown.readers -= 1
            if not shown.readers:
                del self._shown[response_id]
                if shown.hold:
                    shown.hold.release()

    def _estimated(self, response_id: str, account_id: str) -> EstimatedRow | None:
        with contextlib.suppress(StorageUnavailable):  # the next reader causes the correction
            return estimated_of(self._billing.store, response_id, account_id)
        return None

    async def _write(
        self,
        found: EstimatedRow,
        response_id: str,
        account_id: str,
        report: Report,
        credential: str | None,
    ) -> None:
        billing, model = self._billing, found.requested_model
        try:
            key = key_of(billing.store, found.key_id)
            location = self._objects.location_of(response_id, account_id, credential)
            hold = await billing.hold_at(key, model, found.admitted_at, 0)
        except StorageUnavailable:
            return  # it is for the next who looks
        new = await self._containers.unbilled(report.containers)
        self._containers.mark_billed(new)
        parts, usage = self._used(found, report, len(new))
        parts = of_models(parts, found.image_model)
        price_id, cost = hold.cost(parts, report.service_tier)
        if (shown := self._shown.get(response_id)) and shown.hold:
            shown.hold.release()
        month = billing.replace_hold(hold, cost - found.cost)
        of_request = (found.request_id, account_id, month, billing.store.time())
        values = (*of_request, report.service_tier, price_id, cost)
        if location:
            locations = locations_of([response_id], report, location, usage, usage)
            self._objects.own_each(locations, account_id)
        await correct(billing.store, values, usage)

    @staticmethod
    def _used(
        found: EstimatedRow, report: Report, containers: int
    ) -> tuple[list[UsagePart], Usage]:
        """Return the reported usage by model and in all, with what no upstream reports: what was
        counted stays. `containers` is how many are shown that nobody was billed for."""
        assert report.usage is not None, "it is complete"
        searches = max(found.file_searches or 0, report.file_searches) or None
        containers += found.containers or 0
        counted = {"file_searches": searches, "containers": containers or None}
        first = structs.replace(report.parts[0].usage, **counted)
        parts = [report.parts[0]._replace(usage=first), *report.parts[1:]]
        return parts, structs.replace(report.usage, **counted)
