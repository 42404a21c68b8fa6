"""A metered request from the first byte of its answer to its settled row.

A row is settled once: by the end of the request, or, where its response goes on in the background,
by whatever first sees that it has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from itertools import islice

import msgspec

from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_response import BackgroundResponse
from redbtc.gateway.estimated_request import EstimatedRequest
from redbtc.gateway.progress import SAVE_GROWTH, SAVE_SECONDS
from redbtc.gateway.settlement import (
    account_for,
    add_audio,
    add_usage,
    bill,
    count_containers,
    fill_in_cost,
    inheritable_usage,
    locations_of,
)
from redbtc.headers import header
from redbtc.locations import ObjectLocation
from redbtc.meter.error_codes import kept_code
from redbtc.meter.estimates import Estimate
from redbtc.meter.report import Report
from redbtc.store.background import UnfinishedRow, must_stop
from redbtc.store.requests import CorrectionFacts, drop_progress, record_progress, settle_row
from redbtc.usage import FAILED, Outcome, RequestRow, Usage, UsagePart


class MeteredRequest(EstimatedRequest):
    """A request whose answer is metered and billed."""

    makes_answer = True
    _saved_after = SAVE_SECONDS / SAVE_GROWTH  # seconds of work, when it was last saved
    _is_saved = False  # whether the ledger has a row in `unsettled` for it
    _recorded = 0  # how many of the objects in the report were recorded as the account's
    _shown_elsewhere = False  # whether its response was shown to another request
    _without_tokens: Mapping[str, bool] = {}  # objects recorded before their tokens were known

    def act_on_report(self) -> None:
        """Record the objects that the answer names as this account's, before the client sees their
        ids. Ids that the client chose are not recorded."""
        report = self.meter.report
        if len(report.made) == self._recorded or not self.endpoint.stores:
            return
        if (self.status or 200) >= 300:  # an error makes nothing
            return
        chosen = self.body.chosen_ids
        fresh = list(islice(report.made.items(), self._recorded, None))
        self._recorded = len(report.made)
        background = self.facts.background is True
        if background and report.response_id and not (self.background or self.repeats):
            self._go_on_in_background(report, report.response_id)
        made = {each: always for each, always in fresh if each not in chosen}
        is_whole = self.meter.state == "ended"
        known = is_whole and report.has_output  # not what its beginning reports
        self._own(made, report.usage if known else None)
        if not known:
            self._without_tokens = {**self._without_tokens, **made}
            hold = self.background.hold if self.background else self.hold
            if hold.held:
                hold.grow(self.gateway.objects, made, self.max_usage().all_tokens)

    def _own(
        self, made: Mapping[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, ObjectLocation]:
        """Record these objects as the account's, and return where they are. If the request has
        `store` false, record only those that belong to the account in any case, which their values
        in `made` say."""
        locations = locations_of(made, self.meter.report, self.location, usage, likely)
        stored = locations
        if self.facts.background is not True and self.facts.store is False:
            stored = {each: locations[each] for each, always in made.items() if always}
        self.gateway.objects.own_each(stored, self.row.account_id)
        return locations

    @property
    def location(self) -> ObjectLocation:
        """The location of the objects that the request makes. With an idempotency key,
        `minted_input` is false: the upstream may answer with a response that another body made."""
        first = header(self.client_request.headers, b"idempotency-key") is None
        minted = first and self.body.mints_input
        return ObjectLocation(
            self.row.upstream,
            self.body.inheritable_models,
            minted,
            self.body.inheritable_extras,
            credential=self.client_request.digest if self.row.credentials == "client" else None,
        )

    def _go_on_in_background(self, report: Report, response_id: str) -> None:
        """Keep track of a background response, which goes on when the request is over. If the
        request has an idempotency key and the response is known already, the upstream has returned
        it again, and an earlier row is billed for it."""
        if header(self.client_request.headers, b"idempotency-key") is not None:
            with contextlib.suppress(StorageUnavailable):
                self.repeats = not self.gateway.objects.is_free(response_id)
        self._drop_saved()
        self.awaits_id = False
        if not self.repeats:
            self._fill(report)
            at, held, model = self.hold.at, self.hold.held, self.body.image_model()
            max_usage = msgspec.json.encode(self.max_usage()).decode()
            unfinished = UnfinishedRow(at, held, self.input_estimate, model, most=max_usage)
            self.background, self.unwritten = self.gateway.background.keep(
                self.row, self.hold, unfinished, self.body.chosen_ids
            )
            self.background.add_reader(report)
            with contextlib.suppress(StorageUnavailable):
                if must_stop(self.gateway.store, self.key.id):  # since it was admitted
                    self.gateway.background.cancel(self.key.id)
                    self.deadline.abort()
        self.deadline.shorten(self.grace())

    def _fill(self, report: Report) -> None:
        """Fill in what is known of the answer, except its usage."""
        row = self.row
        row.status, row.first_byte_ms = self.status, self.first_byte_ms
        row.duration_ms = self.elapsed_ms()
        row.model, row.service_tier = report.model, report.service_tier
        row.response_id = report.response_id
        row.upstream_status = self.upstream_status
        row.upstream_request_id = self.upstream_request_id
        if report.error_code:
            by_client = row.credentials == "client"
            row.upstream_error_code = kept_code(self.status or 0, report.error_code, by_client)

    async def settle(self, outcome: Outcome) -> None:
        """Commit the row as the request ended; that of a background response which goes on
        stays pending."""
        self.deadline.pause()
        self.act_on_report()
        self.settled = True
        if self.background:
            await self._leave_background(self.background)
            return
        row, report, gateway = self.row, self.meter.report, self.gateway
        self._fill(report)
        if outcome == "client_disconnected" and gateway.stopping:
            outcome = "interrupted"
        if outcome in FAILED:
            row.upstream_error_code = row.upstream_error_code or self.cause_of(outcome)
        guess = await self.estimate(outcome)
        parts = self._account_for(row, outcome, guess)
        if report.containers:
            parts = await count_containers(gateway.containers, row, report, parts)
        correction_facts = self._correction_facts if guess else None
        billed = [] if self.is_free else parts
        bill(row, billed, gateway.billing, self.hold, self.body.image_model())
        if self._without_tokens and not self.repeats:
            self._own(self._without_tokens, inheritable_usage(row, self.max_usage()), row.usage)
            self._without_tokens = {}
        self._drop_saved()
        # Nothing else is awaited between `bill` and this: the money stays held throughout.
        with gateway.corrections.keep_held(row, self.hold, correction_facts):
            await settle_row(gateway.store, row, correction_facts)
            gateway.telemetry.settled(row)
            self.client_request.counted = True
            if correction_facts and self._shown_elsewhere and row.response_id:
                await self.ask_for_usage(row.response_id, row.upstream)
        self._correct_charge()

    async def _leave_background(self, background: BackgroundResponse) -> None:
        """Settle a background response that has ended; leave the row of another pending."""
        if self.unwritten:  # what may be sent after this names the response
            await self.unwritten
        if not await self.gateway.background.leave(background, self.meter.report):
            request, status = self.client_request, self.row.status or 0
            self.gateway.telemetry.answered(request.id, request.route, status, "pending")
        self._correct_charge()

    def _correct_charge(self) -> None:
        """Charge the tokens that were used on the rates, in place of the estimate."""
        usage = self.row.usage
        if self.row.usage_source != "none" or self.row.outcome == "upstream_error":
            self.admission.correct_tokens((usage.input_tokens or 0) + (usage.output_tokens or 0))

    def note_shown(self, response_id: str) -> None:
        """Note that another request was shown a response. If it is this one's, it can have been
        shown in full before this request is estimated, and no other reader would correct that."""
        if self.meter.report.response_id == response_id:
            self._shown_elsewhere = True

    def _account_for(
        self, row: RequestRow, outcome: Outcome, guess: Estimate | None
    ) -> list[UsagePart]:
        """Fill in the row's outcome and usage, except containers. Return the parts to bill: none
        of an answer for which another row is billed."""
        if self.repeats:
            row.outcome = outcome
            return []
        parts = account_for(row, self.meter.report, outcome, guess)
        searches = self.endpoint.chat and self.body.searches_web
        if self.endpoint.counts == "searches" and outcome not in FAILED:
            searches = True
        if searches and row.usage.web_searches is None:
            parts = add_usage(row, parts, web_searches=1)
        if self.endpoint.audio:
            parts = add_audio(row, parts, spoken=self.endpoint.counts == "characters")
        return parts

    @property
    def _correction_facts(self) -> CorrectionFacts | None:
        """The facts that a later correction needs; None if the response can't be fetched later, or
        if a correction could not change what it costs."""
        if not self.endpoint.stores or self.is_free:
            return None
        return CorrectionFacts(self.hold.at, self.body.image_model(), self.hold.held)

    def growth_since_saved(self, now: float) -> float:
        """Return how long the request has worked, divided by how long it had worked when
        `save_progress` was last called; 0 if no bytes of an answer have passed, or it is over.
        `now` is by the monotonic clock."""
        if self.first_byte_ms is None or self._is_over:
            return 0.0
        return (now - self.left_at) / self._saved_after

    async def save_progress(self) -> None:
        """Save in the ledger what the request has used so far, in case the process is killed, but
        not its containers: they are billed with the next answer that shows them."""
        now = time.monotonic()
        if self._is_over:
            return
        self._saved_after = now - self.left_at
        guess = await self.estimate("interrupted")
        if self._is_over:
            return
        self._fill(self.meter.report)
        row = msgspec.structs.replace(self.row)
        parts = add_usage(row, self._account_for(row, "interrupted", guess), containers=None)
        if row.usage_source != "none":
            fill_in_cost(row, [] if self.is_free else parts, self.hold, self.body.image_model())
            self._is_saved = True
            record_progress(self.gateway.store, row, self._correction_facts)

    @property
    def _is_over(self) -> bool:
        """Return whether its row is settled, or will be settled by another request or as a
        background response."""
        return self.settled or self.repeats or self.background is not None

    def _drop_saved(self) -> None:
        """Remove what `save_progress` has saved, in the commit of what is recorded next."""
        if self._is_saved:
            self._is_saved = False
            drop_progress(self.gateway.store, self.row)
