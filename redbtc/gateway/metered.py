"""One request as limits, money and ledger see it, whether it came over HTTP or over a WebSocket.

    admit ─► hold ─► begin ─► (it is forwarded, the meter watches) ─► settle

A row is begun before anything leaves for an upstream, and settled once: by the request's own end,
or, where its response goes on in the background, by whoever first sees that it has ended.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice

import msgspec

from redbtc.billing.notices import FREE
from redbtc.billing.price_list import ModelPrices
from redbtc.billing.spending import Hold, SpendingLimitReached
from redbtc.errors import StorageUnavailable
from redbtc.gateway.background import BackgroundResponse
from redbtc.gateway.exchange import (
    PRESERVE_GROWTH,
    PRESERVE_SECONDS,
    USUAL_PICTURES,
    ForwardedRequest,
    check_background,
    insufficient_quota,
    unmetered,
)
from redbtc.gateway.settlement import (
    account_for,
    bill,
    charge,
    count_containers,
    counted,
    homes_of,
    weight,
)
from redbtc.headers import header
from redbtc.locations import ObjectLocation
from redbtc.meter.estimates import Estimate, MaximumUsage, SeenOutput, estimate, is_complete
from redbtc.meter.report import Report
from redbtc.rates import DEFAULT_TIER
from redbtc.refusals import ClientLeft, Refusal
from redbtc.request_body.content import RequestBody
from redbtc.request_body.facts import UNNAMED
from redbtc.server.asgi import ID_SECONDS
from redbtc.store.background import UnfinishedRow
from redbtc.store.keys import Key
from redbtc.store.requests import Admitted, begin, drop_unsettled, forget, keep_unsettled, settle
from redbtc.upstream.upstreams import Upstream
from redbtc.usage import Outcome, RequestRow, Usage, UsagePart


class MeteredRequest(ForwardedRequest):
    """A request that has a row in the ledger. If it asks for a background response, `admit` counts
    that among the account's unfinished ones; leaving `with` uncounts it if none was created."""

    _content: RequestBody
    _money: Hold
    _row: RequestRow
    _left_at = math.inf  # when it left for the upstream, by the monotonic clock
    _preserved_after = PRESERVE_SECONDS / PRESERVE_GROWTH  # seconds of work
    _preserved = False  # whether the ledger has a row in `unsettled` for it
    _further_input = 0  # tokens that it may read beside its body and what that builds on
    _background: BackgroundResponse | None = None  # what its response goes on as
    _named = 0  # objects that it is known to have made
    _answers = 1  # that it asks for
    _repeats = False  # what another request has made
    _in_room = False  # whether it is counted as an unfinished background response
    _read_meanwhile = False  # whether its response was shown to another request

    async def admit(self, key: Key, content: RequestBody, upstreams: list[Upstream]) -> None:
        """Charge the request's tokens and take its places. Raises Refusal, ClientLeft."""
        self.key, self._content, self._facts = key, content, content.facts
        self._input_estimate = content.input_estimate
        self._answers = self._facts.number() if self.endpoint.has_number else 1
        self.answers = self._answers if self.endpoint.images else 1
        self._unweighed: dict[str, bool] = {}  # what it has made without known tokens
        if self._unmetered:
            self._check_unmetered()
        self._row = self.new_row(content.facts.model or "", upstreams[0].name)
        most_output = content.facts.largest(self.endpoint.limits)
        estimate = 0 if self.endpoint.free else self._input_estimate + most_output
        if self.endpoint.stores and self._facts.background:
            self._enter_room(self._facts.background)
        await self.gateway.limits.admit(self.admission, estimate, self.clock)

    def expects_usage(self) -> bool:
        return self.takes_out_usage or bool(self._facts.asks_for_usage)

    def grace(self) -> float:
        """A background response goes on whether it is read or not. Until its id is known nobody
        could ask what it used, or cancel it."""
        return max(super().grace(), ID_SECONDS) if self.awaits_id else super().grace()

    def _enter_room(self, background: bool | str) -> None:
        """Count one more unfinished background response. Raises Refusal."""
        check_background(background)
        most = self.settings.limits.account.background
        self.gateway.unended.enter(self.key.account_id, most)
        self._in_room = self.awaits_id = True

    def __enter__(self) -> MeteredRequest:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting a background response that was not created."""
        if self._in_room and not self._background:
            self.gateway.unended.leave_room(self.key.account_id)

    async def run(self, forward: Callable[[], Awaitable[None]]) -> None:
        """Hold what the request can cost, and forward it. Raises Refusal while the client has not
        been sent anything; ClientLeft."""
        try:
            self._money = await self.hold(self._content)
        except Refusal as refusal:
            self.admission.refused(refusal)
            raise
        with self._money:
            if conversations := self._content.conversations:
                added = self._most().all_tokens - self._content.conversation_tokens
                self._money.grow(self.gateway.objects, conversations, added)
            await self._begin()
            running = self.gateway.running
            running.add(self)
            try:
                await forward()
            except (Refusal, ClientLeft):
                raise
            except Exception:
                await self._interrupt()
                raise
            finally:
                running.discard(self)

    async def _interrupt(self) -> None:
        """End a request on which the gateway failed, with what it has used so far."""
        self.scope["forwarded"] = True
        if not self.settled:
            await self.settle("interrupted")

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

    @property
    def _unmetered(self) -> bool:
        """Whether it is a stream whose usage is not reported."""
        streams = self.endpoint.chat and bool(self._facts.stream)
        return streams and not self.takes_out_usage and not self._facts.asks_for_usage

    def _check_unmetered(self) -> None:
        """Raise Refusal for a stream of a model with a price whose usage is not reported, unless
        the settings leave that to the client."""
        if self.settings.metering.unmetered == "allow":
            return
        left_out = not self._facts.turns_usage_off
        if left_out and self.settings.metering.include_usage == "client":
            return
        if self.gateway.books.tariff(self._content.model) is not None:
            raise unmetered()

    async def hold(self, content: RequestBody, further_input: int = 0) -> Hold:
        """Hold what a request can cost, at the prices of this instant; `further_input` is in
        tokens. Raises Refusal."""

        def most(tariff: ModelPrices | None) -> int:
            self._weigh_conversations(content)
            return self._most_cost(tariff, content, further_input)

        try:
            return await self.gateway.books.hold(self.key, content.model, most)
        except SpendingLimitReached as error:
            raise insufficient_quota(f"{error}{self._advice(content)}") from None
        except StorageUnavailable:
            raise Refusal("ledger_unavailable") from None

    def _advice(self, content: RequestBody) -> str:
        """Say how to lower the most that a request can cost: sentences, each after a space."""
        ways = list(self._cheaper_ways(content))
        first = [f" {way[0].upper()}{way[1:]} makes that less." for way in ways[:1]]
        return "".join(first + [f" So does {way}." for way in ways[1:]])

    def _cheaper_ways(self, content: RequestBody) -> Iterator[str]:
        """Yield what would lower the most that a request can cost."""
        limits, tier = self.endpoint.limits, content.facts.service_tier
        if limits:
            yield f"a lower {' or '.join(map(repr, limits))}"
        uses_tools = self.endpoint.runs_tools and (content.extras or content.further_models())
        if uses_tools and self._most_calls() > 1:
            yield "a lower 'max_tool_calls'"
        if self._answers > 1:
            yield "a lower 'n'"
        if content.could_name_author:
            yield "naming a cheaper model in 'svg.model'"
        tariff = self.gateway.books.tariff(content.model)
        if limits and tariff and tariff.exceeds_default(tier):
            yield f"the 'service_tier' '{DEFAULT_TIER}'"

    def _weigh_conversations(self, content: RequestBody) -> None:
        """Count the tokens of the conversations that the request names anew: requests that were
        served while it waited can have added to them. Raises StorageUnavailable."""
        objects = self.gateway.objects
        for each in content.conversations:
            home = objects.home_of(each, self.key.account_id)
            tokens = (home.tokens if home else None) or 0
            content.weigh_again(each, tokens + objects.growing(each))

    def _most_cost(
        self, tariff: ModelPrices | None, content: RequestBody, further_input: int
    ) -> int:
        """Return the most that a request can cost, in nanos. Called only where spending is limited,
        which requires that usage is reported: raises Refusal if it is not. A model without a price
        is free, but the models of its tools can have prices."""
        if self.endpoint.free or not (tariff or content.further_models()):
            return 0
        if self._unmetered:
            raise unmetered()
        tariff = tariff or FREE
        tier = content.facts.service_tier
        into = self._most_input(content, further_input)
        output = self._most_output(tariff) * self._answers
        most = tariff.most(into, output, tier, self.endpoint.images, content.long_cache)
        further = self._most_further(tariff, content, into)
        if self.endpoint.images:
            return most + self._answers * further
        call = tariff.dearest_call(content.extras, tier)
        pictures = self._most_pictures() * max(0, further - call)
        return most + self._most_calls() * call + pictures

    def _most_input(self, content: RequestBody, further_input: int) -> int:
        """Return how many tokens it can read at most."""
        into = content.most_input_tokens + content.inherited_tokens + further_input
        unknown = self.settings.billing.hold_output_tokens if content.inherits_unknown else 0
        return into + unknown

    def _most_output(self, tariff: ModelPrices | None) -> int:
        """Return how many tokens one answer can have at most."""
        limits = (
            self._facts.largest(self.endpoint.limits),
            tariff.max_output_tokens if tariff else None,
        )
        usual = self.settings.billing.hold_output_tokens
        return min((limit for limit in limits if limit), default=usual)

    def _most_calls(self) -> int:
        """Return how many calls of the upstream's tools there can be at most."""
        return self._call_limit or self.settings.billing.hold_tool_calls

    def _most_pictures(self) -> int:
        """Return how many of these can be the image tool's. Unless the request says how many, it
        is taken to draw only a few: each costs as much as many other calls."""
        return self._call_limit or min(USUAL_PICTURES, self.settings.billing.hold_tool_calls)

    @property
    def _call_limit(self) -> int:
        """That of the request; 0 where it has none."""
        if self.endpoint.chat:
            return 1
        limit = self._facts.max_tool_calls if self.endpoint.runs_tools else None
        return max(0, limit or 0)

    def _most_further(self, tariff: ModelPrices, content: RequestBody, into: int) -> int:
        """Return the most that one use of each further model can cost, in nanos: one call of the
        image tool, or one SVG. A model without a price is billed by `tariff`, that of the
        requested model. An SVG's author that is not named can be any model."""
        books, usual = self.gateway.books, self.settings.billing.hold_output_tokens

        def most(of_model: ModelPrices, tier: str | None, images: bool) -> int:
            return of_model.most(into, of_model.max_output_tokens or usual, tier, images)

        asked = tariff, content.facts.service_tier
        further = 0
        for model, images in content.further_models().items():
            if model == UNNAMED:
                all_models = [(each, DEFAULT_TIER) for each in books.tariffs()]
                further += max(most(*each, False) for each in (asked, *all_models))
            else:
                own = books.tariff(model)
                further += most(*((own, DEFAULT_TIER) if own else asked), images)
        return further

    def _most(self) -> MaximumUsage:
        """Return the most that it was held to use, or would have been if anything limited it."""
        into = self._most_input(self._content, self._further_input)
        output = self._most_output(self._money.tariff) * self._answers
        calls, pictures = self._most_calls(), self._most_pictures()
        return MaximumUsage(into, output, self._most_drawn(), calls, pictures)

    def _most_drawn(self) -> int:
        """Return the most output tokens of the image tool's model in one call. One without a price
        is held for as the model that was asked for."""
        content, money = self._content, self._money
        drawing = [model for model, images in content.further_models().items() if images]
        if not drawing:
            return 0
        tariff = self.gateway.books.prices.tariff(drawing[0], money.at) or money.tariff
        of_model = tariff.max_output_tokens if tariff else None
        return of_model or self.settings.billing.hold_output_tokens

    def date_row(self) -> None:
        """Let the row say when the request's head had arrived, by the ledger's time."""
        self._row.started_at = self.gateway.store.time() - self.elapsed_ms()

    async def _begin(self) -> None:
        self.date_row()
        try:
            await begin(self.gateway.store, self._row)
        except StorageUnavailable:
            self.admission.put_back()
            raise Refusal("ledger_unavailable") from None
        if self.clock.client_left:
            await self.forget()

    async def forget(self) -> None:
        self.admission.put_back()
        await forget(self.gateway.store, self._row)
        raise ClientLeft

    def to(self, upstream: Upstream) -> None:
        self._row.upstream = upstream.name
        self._left_at = time.monotonic()

    def note(self) -> None:
        """Make an object that the upstream made the account's at the first event that names it. An
        id that the client chose and the upstream only repeats is not learned."""
        report = self.meter.report
        if len(report.made) == self._named or not self.endpoint.stores:
            return
        if (self.status or 200) >= 300:  # an error makes nothing
            return
        chosen = self._content.chosen_ids
        fresh = list(islice(report.made.items(), self._named, None))
        self._named = len(report.made)
        background = self._facts.background is True
        if background and report.response_id and not (self._background or self._repeats):
            self._keep(report, report.response_id)
        made = {each: always for each, always in fresh if each not in chosen}
        known = self.meter.ended and report.has_output  # not what its beginning reports
        self._learn(made, report.usage if known else None)
        if not known:
            self._unweighed |= made
            money = self._background.money if self._background else self._money
            if money.held:
                money.grow(self.gateway.objects, made, self._most().all_tokens)

    def _learn(
        self, made: dict[str, bool], usage: Usage | None, likely: Usage | None = None
    ) -> dict[str, ObjectLocation]:
        """Make these objects the account's, and return where they are. What was made without being
        stored is not, unless that is said to be always so."""
        homes = homes_of(made, self.meter.report, self.home, usage, likely)
        stored = homes
        if self._facts.background is not True and self._facts.store is False:
            stored = {each: homes[each] for each, always in made.items() if always}
        self.gateway.objects.own_each(stored, self._row.account_id)
        return homes

    @property
    def home(self) -> ObjectLocation:
        """Where the objects that it makes are stored. With an idempotency key, `minted_input` is
        false: the upstream may answer with a response that another body made."""
        first = header(self.scope["headers"], b"idempotency-key") is None
        minted = first and self._content.mints_input
        content = self._content
        return ObjectLocation(
            self._row.upstream, content.lasting_models, minted, content.lasting_extras
        )

    @property
    def repeatable_by(self) -> str:
        """The name of those who share idempotency keys: the account's background requests have one
        of their own. Otherwise an upstream could repeat to one of them the response of an ordinary
        request, whose row can have ended before all of the response was read and billed."""
        account_id = super().repeatable_by
        return f"{account_id} background" if self._facts.background is True else account_id

    def _keep(self, report: Report, response_id: str) -> None:
        """Keep track of a background response, which goes on when the request is over. If the
        request has an idempotency key and the response is known already, the upstream has returned
        it again, and an earlier row is billed for it."""
        if header(self.scope["headers"], b"idempotency-key") is not None:
            with contextlib.suppress(StorageUnavailable):
                self._repeats = not self.gateway.objects.is_free(response_id)
        self._drop_preserved()
        self.awaits_id = False
        if not self._repeats:
            self._fill(report)
            at, held, model = self._money.at, self._money.held, self._content.image_model()
            most = msgspec.json.encode(self._most()).decode()
            unfinished = UnfinishedRow(at, held, self._input_estimate, model, most=most)
            self._background, self.unwritten = self.gateway.unended.keep(
                self._row, self._money, unfinished, self._content.chosen_ids
            )
            self._background.read(report)
        self.clock.shorten(self.grace())

    def _fill(self, report: Report) -> None:
        row = self._row
        row.status, row.first_byte_ms, row.duration_ms = (
            self.status,
            self.first_byte_ms,
            self.elapsed_ms(),
        )
        row.model, row.service_tier = report.model, report.service_tier
        row.response_id = report.response_id

    async def settle(self, outcome: Outcome) -> None:
        """Commit the row as the request ended; that of a background response which goes on
        stays pending."""
        self.clock.pause()
        self.note()
        self.settled = True
        row, report = self._row, self.meter.report
        if self._background:
            if self.unwritten:  # what may be sent after this names the response
                await self.unwritten
            if not await self.gateway.unended.leave(self._background, report):
                self.gateway.watch.answered(self.scope, row.status or 0, "pending")
        else:
            self._fill(report)
            if self._repeats:
                report.usage, report.parts = None, []
            if outcome == "client_disconnected" and self.gateway.stopping:
                outcome = "interrupted"
            guess = await self._estimate(outcome)
            parts = self._account_for(row, outcome, guess)
            if report.containers:
                parts = await count_containers(self.gateway, row, report, parts)
            admitted = self._admitted if guess else None
            bill(row, parts, self._money, self._content.image_model())
            if self._unweighed and not self._repeats:
                self._learn(self._unweighed, weight(row, self._most()), row.usage)
                self._unweighed = {}
            self._drop_preserved()
            # Nothing else is awaited between `bill` and this: the money stays held throughout.
            with self.gateway.corrections.keep_held(row, self._money, admitted):
                await settle(self.gateway.store, row, admitted)
                self.gateway.watch.settled(self.scope, row)
                if admitted and self._read_meanwhile and row.response_id:
                    await self.ask_for_usage(row.response_id, row.upstream)
        if row.usage_source != "none" or row.outcome == "upstream_error":
            self.admission.correct((row.usage.input_tokens or 0) + (row.usage.output_tokens or 0))

    def shown(self, response_id: str) -> None:
        """Another request was shown a response. If it is this one's, it can have been shown in full
        before this request is estimated, which nobody else would correct then."""
        if self.meter.report.response_id == response_id:
            self._read_meanwhile = True

    def _account_for(
        self, row: RequestRow, outcome: Outcome, guess: Estimate | None
    ) -> list[UsagePart]:
        """Fill in the row's outcome and usage, except containers. Return the parts to bill."""
        parts = account_for(row, self.meter.report, outcome, guess)
        if self.endpoint.chat and self._content.searches and row.usage.web_searches is None:
            parts = counted(row, parts, web_searches=1)
        return parts

    @property
    def _admitted(self) -> Admitted | None:
        """What a later correction needs, or None if the response can't be fetched later."""
        if not self.endpoint.stores:
            return None
        return Admitted(self._money.at, self._content.image_model(), self._money.held)

    def growth_since_preserved(self, now: float) -> float:
        """Return how long the request has worked, divided by how long it had worked when `preserve`
        was last called; 0 if no bytes of an answer have passed, or it is over. `now` is by the
        monotonic clock."""
        if self.first_byte_ms is None or self._is_over:
            return 0.0
        return (now - self._left_at) / self._preserved_after

    async def preserve(self) -> None:
        """Keep in the ledger what the request has used so far, in case the process is killed, but
        not its containers: they are billed with the next answer that shows them."""
        now = time.monotonic()
        if self.growth_since_preserved(now) < PRESERVE_GROWTH:  # a steered turn began anew
            return
        self._preserved_after, current = now - self._left_at, self._row
        guess = await self._estimate("interrupted")
        if self._is_over or self._row is not current:
            return
        self._fill(self.meter.report)
        row = msgspec.structs.replace(current)
        parts = counted(row, self._account_for(row, "interrupted", guess), containers=None)
        if row.usage_source != "none":
            charge(row, parts, self._money, self._content.image_model())
            self._preserved = True
            keep_unsettled(self.gateway.store, row, self._admitted)

    @property
    def _is_over(self) -> bool:
        """Whether its row is settled, or will be settled by another request or as a background
        response."""
        return self.settled or self._repeats or self._background is not None

    def _drop_preserved(self) -> None:
        """Remove what `preserve` has kept, in the commit of what is recorded next."""
        if self._preserved:
            self._preserved = False
            drop_unsettled(self.gateway.store, self._row)

    async def _estimate(self, outcome: Outcome) -> Estimate | None:
        """Return an estimate, None where the usage is known or nothing was used."""
        report, images = self.meter.report, self.endpoint.images
        ended = self.meter.ended and not report.failed
        outdated, begun = report.is_outdated, report.is_of_beginning
        passing = report.is_provisional or (report.is_of_choices and self._answers > 1)
        partly = outdated and begun if ended else outdated or begun or passing
        partly = partly or (report.is_of_one_choice and self._answers > 1)
        if images:
            partly = report.usage is not None and not self.meter.ended
        if (is_complete(report) and not partly) or not self._was_used(outcome):
            return None
        worked = max(0.0, time.monotonic() - self._left_at)  # before the speed is read
        speed = await self.gateway.speeds.of(
            self._row.model or self._row.requested_model,
            self._row.account_id,
            limited=self._money.held > 0,
        )
        return estimate(
            report,
            SeenOutput.of(report),
            written=math.ceil(worked * speed * self._answers),
            read=self._input_estimate,
            most=self._most(),
            images=images,
            partly=partly,
        )

    def _was_used(self, outcome: Outcome) -> bool:
        """Return whether a model has worked for it, as far as can be told: bytes of an answer
        passed, or its client left while it was asked. An error before any output is no use, nor is
        an answer that another request has made."""
        if self.endpoint.free or self._repeats:
            return False
        if outcome == "upstream_error" or (self.status or 0) >= 400:
            return bool(SeenOutput.of(self.meter.report))
        if outcome == "completed" and self._unmetered and not self._money.tariff:
            return self.settings.metering.include_usage == "add"
        return self.first_byte_ms is not None or outcome in ("client_disconnected", "interrupted")
