"""One request as limits, money and ledger see it, whether it came over HTTP or over a WebSocket.

    admitted: places ─► hold ─► row begun ─► (it is forwarded, the meter watches) ─► settle

A row is begun before anything leaves for an upstream, and settled once: by the end of the request,
or, where its response goes on in the background, by whatever first sees that it has ended.
"""

from __future__ import annotations

import contextlib
import math
import time
from itertools import islice
from typing import Any, Protocol

import msgspec

from redbtc.billing.price_list import ModelPrices
from redbtc.billing.spending import Hold, SpendingLimitReached
from redbtc.deadlines import Deadline
from redbtc.errors import StorageUnavailable
from redbtc.gateway.background import BackgroundResponse
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.exchange import ForwardedRequest
from redbtc.gateway.maximum import Maximum
from redbtc.gateway.progress import PROGRESS_GROWTH, PROGRESS_SECONDS
from redbtc.gateway.settlement import (
    account_for,
    bill,
    charge,
    count_containers,
    counted,
    is_partly_known,
    locations_of,
    weight,
)
from redbtc.gateway.state import Gateway
from redbtc.headers import header
from redbtc.limits.admission import Admission
from redbtc.locations import ObjectLocation
from redbtc.meter.estimates import Estimate, MaximumUsage, SeenOutput, estimate, is_complete
from redbtc.meter.report import Report
from redbtc.refusals import ClientLeft, Refusal, insufficient_quota
from redbtc.request_body.body import RequestBody
from redbtc.server.asgi import ID_SECONDS, Scope
from redbtc.store.background import UnfinishedRow
from redbtc.store.keys import Key
from redbtc.store.requests import Admitted, begin, drop_unsettled, forget, keep_unsettled, settle
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome, RequestRow, Usage, UsagePart


class Releasable(Protocol):
    """Something that is taken, and can be given back early."""

    def release(self) -> None:
        """Give it back."""


class MeteredRequest(ForwardedRequest):
    """A request that has a row in the ledger from `admitted` on."""

    money: Hold  # from `async with` on
    _is_held = False
    row: RequestRow
    _memory: Releasable
    _left_at = math.inf  # when it left for the upstream, by the monotonic clock
    _saved_after = PROGRESS_SECONDS / PROGRESS_GROWTH  # seconds of work, when it was last saved
    _is_saved = False  # whether the ledger has a row in `unsettled` for it
    further_input = 0  # tokens that it may read beside its body and what that builds on
    _background: BackgroundResponse | None = None  # what its response goes on as
    _named = 0  # objects that it is known to have made
    _is_unfinished = False  # whether it is counted as an unfinished background response
    _repeats = False  # what another request has made
    _shown_elsewhere = False  # whether its response was shown to another request

    def __init__(
        self,
        gateway: Gateway,
        scope: Scope,
        endpoint: Endpoint,
        clock: Deadline,
        admission: Admission,
        key: Key,
        body: RequestBody,
    ) -> None:
        super().__init__(gateway, scope, endpoint, clock, admission, key)
        self.body = body
        self.facts = body.facts
        self.maximum = Maximum(endpoint, body, gateway.books)
        self.images = self.maximum.answers if endpoint.images else 1
        self.input_estimate = body.input_estimate
        self._unweighed: dict[str, bool] = {}  # what it has made without known tokens

    def admitted(self, upstream: Upstream, memory: Releasable) -> MeteredRequest:
        """Take the request's places, hold what it can cost and begin its row, until the end of
        `async with`. `upstream` is the first to be tried. `memory` is what was reserved for the
        body, given back as soon as the request has its places: from then on they limit it. `async
        with` raises Refusal, ClientLeft."""
        self._memory = memory
        self.row = self.new_row(self.facts.model or "", upstream.name)
        return self

    async def __aenter__(self) -> MeteredRequest:
        if self._is_unmetered:
            self._check_unmetered()
        if self.endpoint.stores and self.facts.background:
            self._count_unfinished(self.facts.background)
        try:
            tokens = self.input_estimate + self.facts.largest(self.endpoint.limits)
            tokens = 0 if self.endpoint.free else tokens
            await self.gateway.limits.admit(self.admission, tokens, self.clock)
            self._memory.release()
            self.money = await self._hold_or_refund()
            self._is_held = True
            await self._begin()
        except BaseException:
            self._give_back()
            raise
        self.gateway.in_flight.with_row.add(self)
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, (Refusal, ClientLeft)):
                await self._interrupt()
        finally:
            self.gateway.in_flight.with_row.discard(self)
            self._give_back()

    def _give_back(self) -> None:
        """Give back the hold, and the count of a background response that was not created."""
        if self._is_held:
            self.money.release()
        if self._is_unfinished and not self._background:
            self.gateway.unended.leave_room(self.key.account_id)

    def _count_unfinished(self, background: bool | str) -> None:
        """Count a request for a background response as one of the account's unfinished ones. Raises
        Refusal."""
        check_background(background)
        most = self.settings.limits.account.background
        self.gateway.unended.enter(self.key.account_id, most)
        self._is_unfinished = self.awaits_id = True

    async def _hold_or_refund(self) -> Hold:
        """Hold what the request can cost. Raises Refusal, and puts back what was charged."""
        try:
            money = await self.hold()
        except Refusal as refusal:
            self.admission.undo(refusal)
            raise
        if conversations := self.body.inherited.conversations:
            added = self.maximum.usage(money).all_tokens - self.body.inherited.conversation_tokens
            money.grow(self.gateway.objects, conversations, added)
        return money

    async def hold(self, further_input: int = 0) -> Hold:
        """Hold the most that the request can cost, at the prices of this instant. `further_input`
        is in tokens. Raises Refusal."""
        billing = self.gateway.books
        try:
            spending = await billing.spending_of(self.key)
            # Nothing is awaited from here on: no other request can hold the same money.
            quote = billing.quote(self.key, self.body.model, spending)
            cost = self._most_cost(quote.model_prices, further_input) if quote.left else 0
            return billing.hold(quote, cost)
        except SpendingLimitReached as error:
            raise insufficient_quota(f"{error}{self.maximum.advice()}") from None
        except StorageUnavailable:
            raise Refusal("ledger_unavailable") from None

    def _most_cost(self, prices: ModelPrices | None, further_input: int) -> int:
        """Return the most that the request can cost, in nanos. Raises Refusal if its usage would
        not be reported, StorageUnavailable."""
        self._weigh_conversations()
        cost = self.maximum.cost(prices, further_input)
        if cost and self._is_unmetered:
            raise unmetered()
        return cost

    def _weigh_conversations(self) -> None:
        """Count the tokens of the conversations that the request names anew: requests that were
        served while it waited can have added to them. Raises StorageUnavailable."""
        objects, body = self.gateway.objects, self.body
        for each in body.inherited.conversations:
            location = objects.home_of(each, self.key.account_id)
            tokens = (location.tokens if location else None) or 0
            body.inherited.update_conversation(each, tokens + objects.growing(each))

    @property
    def _is_unmetered(self) -> bool:
        """Whether this is a streamed chat whose usage is not reported."""
        return bool(self.endpoint.chat and self.facts.stream and not self.expects_usage())

    def _check_unmetered(self) -> None:
        """Raise Refusal for a stream of a model with a price whose usage is not reported, unless
        the settings leave that to the client."""
        metering = self.settings.metering
        if metering.unmetered == "allow":
            return
        if not self.facts.turns_usage_off and metering.include_usage == "client":
            return
        if self.gateway.books.tariff(self.body.model) is not None:
            raise unmetered()

    @property
    def may_add_usage(self) -> bool:
        """Whether the option that makes a streamed chat report its usage may be added to the body,
        where the client left it out."""
        adds = self.settings.metering.include_usage == "add" and self.body.is_plain
        return bool(self.endpoint.chat and self.facts.stream and adds)

    def expects_usage(self) -> bool:
        return self.takes_out_usage or bool(self.facts.asks_for_usage)

    def grace(self) -> float:
        """Return for how many seconds the upstream is read on when the client has left. Until the
        id of a background response is known, nobody could ask what it used, or cancel it."""
        return max(super().grace(), ID_SECONDS) if self.awaits_id else super().grace()

    def new_row(self, model: str, upstream: str) -> RequestRow:
        """Return a pending row. It gets its time when it is written."""
        return RequestRow(
            request_id=self.scope["request_id"],
            account_id=self.key.account_id,
            key_id=self.key.id,
            endpoint=self.endpoint.path,
            requested_model=model,
            upstream=upstream,
            started_at=0,
        )

    def date_row(self) -> None:
        """Let the row say when the request's head had arrived, by the ledger's time."""
        self.row.started_at = self.gateway.store.time() - self.elapsed_ms()

    async def _begin(self) -> None:
        """Commit the pending row. Raises Refusal, ClientLeft."""
        self.date_row()
        try:
            await begin(self.gateway.store, self.row)
        except StorageUnavailable:
            self.admission.refund()
            raise Refusal("ledger_unavailable") from None
        if self.clock.client_left:
            await self.forget()

    async def forget(self) -> None:
        self.admission.refund()
        await forget(self.gateway.store, self.row)
        raise ClientLeft

    async def _interrupt(self) -> None:
        """End a request on which the gateway failed, with what it has used so far."""
        self.scope["forwarded"] = True
        if not self.settled:
            await self.settle("interrupted")

    def leaves_for(self, upstream: Upstream) -> None:
        self.row.upstream = upstream.name
        self._left_at = time.monotonic()

    def metered(self) -> None:
        """Make an object that the upstream made the account's at the first event that names it. An
        id that the client chose and the upstream only repeats is not learned."""
        report = self.meter.report
        if len(report.made) == self._named or not self.endpoint.stores:
            return
        if (self.status or 200) >= 300:  # an error makes nothing
            return
        chosen = self.body.chosen_ids
        fresh = list(islice(report.made.items(), self._named, None))
        self._named = len(report.made)
        background = self.facts.background is True
        if background and report.response_id and not (self._background or self._repeats):
            self._go_on_in_background(report, report.response_id)
        made = {each: always for each, always in fresh if each not in chosen}
        known = self.meter.ended and report.has_output  # not what its beginning reports
        self._learn(made, report.usage if known else None)
        if not known:
            self._unweighed |= made
            money = self._background.money if self._background else self.money
            if money.held:
                money.grow(self.gateway.objects, made, self._most_usage().all_tokens)

    def _most_usage(self) -> MaximumUsage:
        """Return the most that the request can use."""
        return self.maximum.usage(self.money, self.further_input)

    def _learn(
        self, made: dict[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, ObjectLocation]:
        """Make these objects the account's, and return where they are. What was made without being
        stored is not, unless that is said to be always so."""
        locations = locations_of(made, self.meter.report, self.location, usage, likely)
        stored = locations
        if self.facts.background is not True and self.facts.store is False:
            stored = {each: locations[each] for each, always in made.items() if always}
        self.gateway.objects.own_each(stored, self.row.account_id)
        return locations

    @property
    def location(self) -> ObjectLocation:
        """Where the objects that it makes are stored. With an idempotency key, `minted_input` is
        false: the upstream may answer with a response that another body made."""
        first = header(self.scope["headers"], b"idempotency-key") is None
        minted = first and self.body.mints_input
        return ObjectLocation(
            self.row.upstream, self.body.inheritable_models, minted, self.body.inheritable_extras
        )

    @property
    def repeatable_by(self) -> str:
        """The name of those who share idempotency keys: the account's background requests have one
        of their own. Otherwise an upstream could repeat to one of them the response of an ordinary
        request, whose row can have ended before all of the response was read and billed."""
        account_id = super().repeatable_by
        return f"{account_id} background" if self.facts.background is True else account_id

    def _go_on_in_background(self, report: Report, response_id: str) -> None:
        """Keep track of a background response, which goes on when the request is over. If the
        request has an idempotency key and the response is known already, the upstream has returned
        it again, and an earlier row is billed for it."""
        if header(self.scope["headers"], b"idempotency-key") is not None:
            with contextlib.suppress(StorageUnavailable):
                self._repeats = not self.gateway.objects.is_free(response_id)
        self._drop_saved()
        self.awaits_id = False
        if not self._repeats:
            self._fill(report)
            at, held, model = self.money.at, self.money.held, self.body.image_model()
            most = msgspec.json.encode(self._most_usage()).decode()
            unfinished = UnfinishedRow(at, held, self.input_estimate, model, most=most)
            self._background, self.unwritten = self.gateway.unended.keep(
                self.row, self.money, unfinished, self.body.chosen_ids
            )
            self._background.read(report)
        self.clock.shorten(self.grace())

    def _fill(self, report: Report) -> None:
        """Fill in the row what is known of the answer, but for its usage."""
        row = self.row
        row.status, row.first_byte_ms = self.status, self.first_byte_ms
        row.duration_ms = self.elapsed_ms()
        row.model, row.service_tier = report.model, report.service_tier
        row.response_id = report.response_id

    async def settle(self, outcome: Outcome) -> None:
        """Commit the row as the request ended; that of a background response which goes on
        stays pending."""
        self.clock.pause()
        self.metered()
        self.settled = True
        if self._background:
            await self._leave_background(self._background)
            return
        row, report, gateway = self.row, self.meter.report, self.gateway
        self._fill(report)
        if self._repeats:
            report.usage, report.parts = None, []
        if outcome == "client_disconnected" and gateway.stopping:
            outcome = "interrupted"
        guess = await self._estimate(outcome)
        parts = self._account_for(row, outcome, guess)
        if report.containers:
            parts = await count_containers(gateway.containers, row, report, parts)
        admitted = self._admitted if guess else None
        bill(row, parts, gateway.books, self.money, self.body.image_model())
        if self._unweighed and not self._repeats:
            self._learn(self._unweighed, weight(row, self._most_usage()), row.usage)
            self._unweighed = {}
        self._drop_saved()
        # Nothing else is awaited between `bill` and this: the money stays held throughout.
        with gateway.corrections.keep_held(row, self.money, admitted):
            await settle(gateway.store, row, admitted)
            gateway.watch.settled(self.scope, row)
            if admitted and self._shown_elsewhere and row.response_id:
                await self.ask_for_usage(row.response_id, row.upstream)
        self._correct_charge()

    async def _leave_background(self, background: BackgroundResponse) -> None:
        """Settle a background response that has ended; leave the row of another pending."""
        if self.unwritten:  # what may be sent after this names the response
            await self.unwritten
        if not await self.gateway.unended.leave(background, self.meter.report):
            self.gateway.watch.answered(self.scope, self.row.status or 0, "pending")
        self._correct_charge()

    def _correct_charge(self) -> None:
        """Charge the tokens that were used on the rates, in place of the estimate."""
        usage = self.row.usage
        if self.row.usage_source != "none" or self.row.outcome == "upstream_error":
            self.admission.correct_tokens((usage.input_tokens or 0) + (usage.output_tokens or 0))

    def shown(self, response_id: str) -> None:
        """Note that another request was shown a response. If it is this one's, it can have been
        shown in full before this request is estimated, and no other reader would correct that."""
        if self.meter.report.response_id == response_id:
            self._shown_elsewhere = True

    def _account_for(
        self, row: RequestRow, outcome: Outcome, guess: Estimate | None
    ) -> list[UsagePart]:
        """Fill in the row's outcome and usage, except containers. Return the parts to bill."""
        parts = account_for(row, self.meter.report, outcome, guess)
        if self.endpoint.chat and self.body.searches_web and row.usage.web_searches is None:
            parts = counted(row, parts, web_searches=1)
        return parts

    @property
    def _admitted(self) -> Admitted | None:
        """What a later correction needs, or None if the response can't be fetched later."""
        if not self.endpoint.stores:
            return None
        return Admitted(self.money.at, self.body.image_model(), self.money.held)

    def growth_since_saved(self, now: float) -> float:
        """Return how long the request has worked, divided by how long it had worked when
        `save_progress` was last called; 0 if no bytes of an answer have passed, or it is over.
        `now` is by the monotonic clock."""
        if self.first_byte_ms is None or self._is_over:
            return 0.0
        return (now - self._left_at) / self._saved_after

    async def save_progress(self) -> None:
        """Save in the ledger what the request has used so far, in case the process is killed, but
        not its containers: they are billed with the next answer that shows them."""
        now = time.monotonic()
        if self.growth_since_saved(now) < PROGRESS_GROWTH:  # a steered turn began anew
            return
        self._saved_after, current = now - self._left_at, self.row
        guess = await self._estimate("interrupted")
        if self._is_over or self.row is not current:
            return
        self._fill(self.meter.report)
        row = msgspec.structs.replace(current)
        parts = counted(row, self._account_for(row, "interrupted", guess), containers=None)
        if row.usage_source != "none":
            charge(row, parts, self.money, self.body.image_model())
            self._is_saved = True
            keep_unsettled(self.gateway.store, row, self._admitted)

    @property
    def _is_over(self) -> bool:
        """Whether its row is settled, or will be settled by another request or as a background
        response."""
        return self.settled or self._repeats or self._background is not None

    def _drop_saved(self) -> None:
        """Remove what `save_progress` has saved, in the commit of what is recorded next."""
        if self._is_saved:
            self._is_saved = False
            drop_unsettled(self.gateway.store, self.row)

    async def _estimate(self, outcome: Outcome) -> Estimate | None:
        """Return an estimate, None where the usage is known or nothing was used."""
        report, answers = self.meter.report, self.maximum.answers
        partly = is_partly_known(self.meter, answers, images=self.endpoint.images)
        if (is_complete(report) and not partly) or not self._was_used(outcome):
            return None
        worked = max(0.0, time.monotonic() - self._left_at)  # before the speed is read
        speed = await self.gateway.speeds.of(
            self.row.model or self.row.requested_model,
            self.row.account_id,
            limited=self.money.held > 0,
        )
        return estimate(
            report,
            SeenOutput.of(report),
            written=math.ceil(worked * speed * answers),
            read=self.input_estimate,
            maximum=self._most_usage(),
            images=self.endpoint.images,
            partly=partly,
        )

    def _was_used(self, outcome: Outcome) -> bool:
        """Return whether a model has worked for the request, as far as can be told: bytes of an
        answer passed, or the client left while the upstream was asked. An error before any output
        is no use, nor is an answer that another request has made."""
        if self.endpoint.free or self._repeats:
            return False
        if outcome == "upstream_error" or (self.status or 0) >= 400:
            return bool(SeenOutput.of(self.meter.report))
        if outcome == "completed" and self._is_unmetered and not self.money.model_prices:
            return self.settings.metering.include_usage == "add"
        return self.first_byte_ms is not None or outcome in ("client_disconnected", "interrupted")


def check_background(value: bool | str) -> None:
    """Raise Refusal if `background` is text, which an upstream might take for true. (In a request
    for images, which has no background responses, it is a colour.)"""
    if isinstance(value, str):
        message = "'background' must be true or false."
        raise Refusal("invalid_request", message, param="background")


def unmetered() -> Refusal:
    """Return the refusal of a streamed chat whose usage would not be reported, though it is billed
    by that."""
    message = (
        "This stream would not report its usage, by which it is billed. Send "
        '"stream_options": {"include_usage": true}. It can be left out of a body that is not '
        "compressed, unless the gateway is set to change no body."
    )
    return Refusal("invalid_request", message, param="stream_options")
