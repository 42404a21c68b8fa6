"""A request that is admitted: it has places in the limits, a hold for what it can cost, and a row.

    places ─► hold ─► row begun ─► (it is forwarded and settled) ─► all given back

A row is begun before anything leaves for an upstream.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol, Self

from redbtc.billing.model_prices import ModelPrices
from redbtc.billing.spending import Hold, SpendingLimitReached
from redbtc.deadlines import Deadline
from redbtc.errors import StorageUnavailable
from redbtc.gateway.background_response import BackgroundResponse
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.forwarded_request import ForwardedRequest
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.maximum import Maximum
from redbtc.gateway.progress import Running
from redbtc.limits.admission import Admission
from redbtc.refusals import ClientLeft, Refusal, insufficient_quota
from redbtc.request_body.body import RequestBody
from redbtc.server.asgi import ID_SECONDS, ClientRequest
from redbtc.store.keys import Key
from redbtc.store.requests import begin_row, forget_row
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Credentials, RequestRow


class Releasable(Protocol):
    """Something that is taken, and can be given back early."""

    def release(self) -> None:
        """Give it back."""


class AdmittedRequest(ForwardedRequest, Running):
    """A request that has places, a hold and a row in the ledger, in `async with` of `admit`."""

    hold: Hold  # from `async with` on
    row: RequestRow
    further_input = 0  # tokens that it may read besides its body and what that builds on
    background: BackgroundResponse | None = None  # its response, if that outlives the request
    _memory: Releasable
    _candidates: Candidates[Upstream] | None = None  # it has a place at one of them, perhaps
    is_held = is_free = False  # free: nothing is billed, whatever the answer reports
    _is_unfinished = False  # whether it is counted as an unfinished background response

    def __init__(
        self,
        gateway: Gateway,
        client_request: ClientRequest,
        endpoint: Endpoint,
        deadline: Deadline,
        admission: Admission,
        key: Key,
        body: RequestBody,
    ) -> None:
        super().__init__(gateway, client_request, endpoint, deadline, admission, key)
        self.body = body
        self.facts = body.facts
        self.maximum = Maximum(endpoint, body, gateway.billing)
        self.images = self.maximum.answers if endpoint.images else 1
        self.input_estimate = body.input_estimate

    def admit(self, candidates: Candidates[Upstream], memory: Releasable) -> Self:
        """Take the request's places, that at one of the candidates as well, hold what it can cost
        and begin its row, until the end of `async with`. `memory` is what was reserved for the
        body, given back as soon as the request has its places: from then on they limit it. `async
        with` raises Refusal, ClientLeft."""
        self._memory = memory
        self._candidates = candidates
        return self

    def take_over(self, before: RequestRow, hold: Hold) -> None:
        """Begin a row in the places of a request that has ended, whose row is `before`: the
        upstream has begun another response to it by itself. This takes the place of `async with`'s
        beginning; its end must follow. `hold` is the hold for it."""
        self.hold, self.is_held = hold, True
        self.row = self.new_row(before.requested_model, before.upstream, before.credentials)
        self.date_row()
        self.left_at = time.monotonic()
        self.gateway.in_flight.with_row.add(self)

    async def __aenter__(self) -> Self:
        candidates = self._candidates
        assert candidates is not None, "admit was called"
        first = candidates.members[0]
        self.is_free = first.is_free and all(each.is_free for each in candidates.members)
        if self.is_unmetered and not self.is_free:
            self._check_unmetered()
        if self.endpoint.stores and self.facts.background:
            check_background(self.facts.background, first)
            self._count_unfinished()
        try:
            tokens = self.input_estimate + self.facts.largest(self.endpoint.output_limits)
            tokens = 0 if self.endpoint.free else tokens
            await self.gateway.limiter.take_places(self.admission, tokens, self.deadline)
            await self.gateway.limiter.take_place_at_upstream(
                self.admission, candidates, self.deadline
            )
            assert candidates.member is not None, "it has waited for one"
            self._memory.release()
            credentials: Credentials = "client" if first.is_client else "operator"
            model = self.facts.model or ""
            self.row = self.new_row(model, candidates.member.name, credentials)
            self.hold = await self._hold_or_undo()
            self.is_held = True
            self.maximum.note_growth(self.hold, self.gateway.objects)
            self.client_request.received = None
            self.gateway.in_flight.with_row.add(self)
            await self._begin()
            self.row.attempts = 0
        except BaseException:
            self._give_back()
            raise
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, (Refusal, ClientLeft)):
                await self._interrupt()
        finally:
            if self.recorder:
                self.recorder.end(has_row=not isinstance(error, ClientLeft))
            self._give_back()

    def _give_back(self) -> None:
        """Give back the hold, the place at the upstream, and the count of a background response
        that was not created. The request is not in flight any more."""
        self.gateway.in_flight.with_row.discard(self)
        if self.is_held:
            self.hold.release()
        if self._candidates and self._candidates.member:
            self._candidates.give_back()
        if self._is_unfinished and not self.background:
            self.gateway.background.unfinished.remove(self.key.account_id)

    def _count_unfinished(self) -> None:
        """Count the request as an unfinished background response. Raises Refusal."""
        limit = self.settings.limits.account.background
        self.gateway.background.unfinished.add(self.key.account_id, limit)
        self._is_unfinished = self.awaits_id = True
        self.deadline.abort_grace = ID_SECONDS  # it can be cancelled only once its id is known

    async def _hold_or_undo(self) -> Hold:
        """Hold what the request can cost. Raises Refusal, and undoes what was charged."""
        try:
            while True:
                hold = await self.take_hold()
                if self.gateway.admits:
                    return hold
                hold.release()
                await self.gateway.until_it_admits()
        except (Refusal, asyncio.CancelledError) as error:
            self.admission.undo(error)
            raise

    async def take_hold(self, further_input: int = 0) -> Hold:
        """Hold the most that the request can cost, at the prices of this instant. `further_input`
        is in tokens. Raises Refusal."""
        billing = self.gateway.billing
        try:
            spending = await billing.spending_of(self.key)
            # Nothing is awaited from here on: no other request can hold the same money.
            quote = billing.quote(self.key, self.body.model, spending)
            is_limited = quote.remaining and not self.is_free
            cost = self._max_cost(quote.model_prices, further_input) if is_limited else 0
            return billing.hold(quote, cost)
        except SpendingLimitReached as error:
            raise insufficient_quota(f"{error}{self.maximum.advice()}") from None
        except StorageUnavailable:
            raise Refusal("ledger_unavailable") from None

    def _max_cost(self, prices: ModelPrices | None, further_input: int) -> int:
        """Return the most that the request can cost, in nanos. Raises Refusal if its usage would
        not be reported, StorageUnavailable."""
        self._update_conversations()
        if self.is_unmetered and (prices or self.body.further_models()):
            raise unmetered()
        return self.maximum.cost(prices, further_input)

    def _update_conversations(self) -> None:
        """Count the tokens of the conversations that the request names anew: requests that were
        served while it waited can have added to them. Raises StorageUnavailable."""
        objects, body = self.gateway.objects, self.body
        for each in body.inherited.conversations:
            location = objects.location_of(each, self.key.account_id, self.client_request.digest)
            tokens = (location.tokens if location else None) or 0
            body.inherited.update_conversation(each, tokens + objects.growth_of(each))

    @property
    def is_unmetered(self) -> bool:
        """Return whether this is a streamed chat whose usage is not reported."""
        return bool(self.endpoint.chat and self.facts.stream and not self.expects_usage())

    def _check_unmetered(self) -> None:
        """Raise Refusal for a stream of a model with a price whose usage is not reported, unless
        the settings leave that to the client."""
        metering = self.settings.metering
        if metering.unmetered == "allow":
            return
        if not self.facts.turns_usage_off and metering.include_usage == "client":
            return
        if self.gateway.billing.model_prices(self.body.model) is not None:
            raise unmetered()

    @property
    def may_add_usage(self) -> bool:
        """Return whether the option that makes a streamed chat report its usage may be added to the
        body, where the client left it out."""
        adds = self.settings.metering.include_usage == "add" and self.body.is_plain
        return bool(self.endpoint.chat and self.facts.stream and adds)

    def expects_usage(self) -> bool:
        return self.takes_out_usage or bool(self.facts.asks_for_usage)

    def grace(self) -> float:
        """Return how many seconds the upstream is read on after the client has left. Until the id
        of a background response is known, nobody could ask what it used, or cancel it."""
        return max(super().grace(), ID_SECONDS) if self.awaits_id else super().grace()

    def new_row(self, model: str, upstream: str, credentials: Credentials | None) -> RequestRow:
        """Return a pending row. It gets its time when it is written."""
        return RequestRow(
            request_id=self.client_request.id,
            account_id=self.key.account_id,
            key_id=self.key.id,
            endpoint=self.endpoint.path,
            requested_model=model,
            upstream=upstream,
            started_at=0,
            credentials=credentials,
        )

    def date_row(self) -> None:
        """Set the row's time to when the request's head arrived, by the ledger's time."""
        self.row.started_at = self.gateway.store.time() - self.elapsed_ms()

    async def _begin(self) -> None:
        """Commit the pending row. Raises Refusal, ClientLeft."""
        self.date_row()
        try:
            await begin_row(self.gateway.store, self.row)
        except StorageUnavailable:
            self.admission.refund()
            raise Refusal("ledger_unavailable") from None
        if self.deadline.client_left:
            await self.forget()

    async def forget(self) -> None:
        self.admission.refund()
        await forget_row(self.gateway.store, self.row)
        raise ClientLeft

    async def _interrupt(self) -> None:
        """End a request on which the gateway failed, with what it has used so far."""
        self.client_request.interrupted = True
        if not self.settled:
            await self.settle("interrupted")

    @property
    def creates_background(self) -> bool:
        return self.facts.background is True

    def note_member(self, upstream: Upstream) -> None:
        self.member = upstream
        self.row.upstream = upstream.name

    def note_attempt(self, upstream: Upstream) -> None:
        self.member = upstream
        self.row.upstream = upstream.name
        self.is_free = upstream.is_free or self.endpoint.free
        self.row.attempts = (self.row.attempts or 0) + 1
        self.left_at = time.monotonic()

    @property
    def idempotency_scope(self) -> str:
        """The name of the set of requests that share idempotency keys: an account's background
        requests are a set of their own. Otherwise an upstream could repeat to one of them the
        response of an ordinary request, whose row can have ended before all of the response was
        read and billed."""
        account_id = super().idempotency_scope
        return f"{account_id} background" if self.facts.background is True else account_id


def check_background(value: bool | str, member: Upstream) -> None:
    """Raise Refusal if `background` is text, which an upstream might take for true. (In a request
    for images, which has no background responses, it is a colour.) Refuse it as well at a member
    that needs the client's credential: the gateway could not ask for the response later."""
    if isinstance(value, str):
        message = "'background' must be true or false."
        raise Refusal("invalid_request", message, param="background")
    if member.is_client:
        message = (
            "A background response can't be created with your own credential, which the gateway "
            "does not keep. Leave 'background' out."
        )
        raise Refusal("invalid_request", message, param="background")


def unmetered() -> Refusal:
    """Return the refusal of a streamed chat whose usage would not be reported, though it is billed
    by that."""
    message = (
        "This stream would not report its usage, which is needed for billing. Send "
        '"stream_options": {"include_usage": true}. The gateway adds it for you only if the body '
        'is not compressed and metering.include_usage is "add".'
    )
    return Refusal("invalid_request", message, param="stream_options")
