"""One request as limits, money and ledger see it, whether it came over HTTP or over a WebSocket.

    admit ─► hold ─► begin ─► (it is forwarded, the meter watches) ─► settle

A row is begun before anything leaves for an upstream, and settled once: by the request's own end,
or, where its response goes on in the background, by whoever first sees that it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import msgspec

import redbtc_ledger as ledger
from redbtc_billing import DEFAULT_TIER, FREE, Hold, Spent, Tariff
from redbtc_body import UNNAMED, Content
from redbtc_decoding import DecodedMeter
from redbtc_estimates import (
    Estimate,
    Most,
    Progress,
    Seen,
    estimate,
    is_cancelled_without_output,
    is_complete,
)
from redbtc_ledger import Home, Key, Unfinished
from redbtc_limits import Admission, Clock, rate_limit_headers
from redbtc_meter import IMAGE_TOOL, UNFINISHED, JSONMeter, Meter, Report, StreamMeter
from redbtc_refusals import ClientLeft, Refusal, header
from redbtc_rows import Outcome, Part, Row, Usage
from redbtc_settings import MOST_TOKENS, LedgerUnavailable, Settings, now_ms
from redbtc_slices import in_slices, with_turns
from redbtc_upstreams import Upstream
from redbtc_watch import Scope, say, shown_error

if TYPE_CHECKING:
    from redbtc_proxy import Gateway


USUAL_PICTURES = 4  # held for the image tool where a request has no 'max_tool_calls'
# In case the process is killed, the ledger keeps what a request has used: first after
# PRESERVE_SECONDS of work, then after PRESERVE_GROWTH times as long as the last time, and so on.
PRESERVE_SECONDS, PRESERVE_GROWTH = 1.0, 4
ID_SECONDS = 15  # for the id of a background response whose client has left
NO_RETRY = (b"x-should-retry", b"false")


def new_request_id() -> str:
    """req_, 12 hexadecimal digits of milliseconds, 20 of chance: ids sort by time. They are no
    secrets; random is seeded from the system's entropy at the start."""
    return f"req_{now_ms():012x}{random.getrandbits(80):020x}"


class Endpoint(NamedTuple):
    """A route whose requests are metered, and what is particular to it."""

    path: str
    chat: bool = False
    images: bool = False
    forms: bool = False
    stores: bool = False  # what it answers may be kept at the upstream
    free: bool = False  # and costs nothing
    # The members that limit the output tokens of an answer, of which the largest counts. Others,
    # which the upstream ignores here, count for nothing.
    limits: tuple[str, ...] = ()
    runs_tools: bool = False  # the upstream does, at most `max_tool_calls` times

    @property
    def model_needed(self) -> bool:
        """Images have a usual one."""
        return not self.images

    @property
    def has_number(self) -> bool:
        """Whether `n` says how many answers or images are asked for."""
        return self.chat or self.images


def check_background(value: bool | str) -> None:
    """Raise Refusal if `background` is text, which an upstream might take for true. (In a request
    for images, which has no background responses, it is a colour.)"""
    if isinstance(value, str):
        message = "'background' must be true or false."
        raise Refusal("invalid_request", message, param="background")


def most_usual(settings: Settings, input_tokens: int) -> Most:
    """Return the most that a request can use of which nothing but its input is known."""
    usual, calls = settings.billing.hold_output_tokens, settings.billing.hold_tool_calls
    return Most(input_tokens, usual, usual, calls, min(USUAL_PICTURES, calls))


def insufficient_quota(message: str) -> Refusal:
    """Return the refusal of a request that can cost more than its balance or budget has left."""
    return Refusal("insufficient_quota", message, headers=[NO_RETRY])


def unmetered() -> Refusal:
    """Return the refusal of a streamed chat whose usage would not be reported, though it is billed
    by that."""
    message = (
        "This stream would not report its usage, by which it is billed. Send "
        '"stream_options": {"include_usage": true}. It can be left out of a body that is not '
        "compressed, unless the gateway is set to change no body."
    )
    return Refusal("invalid_request", message, param="stream_options")


class Exchange:
    """What is the same for all that is forwarded. `meter` has been fed what has passed."""

    def __init__(
        self,
        gateway: Gateway,
        scope: Scope,
        endpoint: Endpoint,
        clock: Clock,
        admission: Admission,
    ) -> None:
        self.gateway = gateway
        self.settings = gateway.settings
        self.scope = scope
        self.endpoint = endpoint
        self.clock = clock
        self.admission = admission
        self.meter: Meter = JSONMeter(endpoint.images)
        self.takes_out_usage = False
        self.answers = 1  # images that were asked for, each of which ends with an event of its own
        self.settled = False
        self.status: int | None = None
        self.first_byte_ms: int | None = None
        self.unwritten: asyncio.Future[None] | None = None  # await it before sending more
        self.awaits_id = False  # the answer can create a background response; its id is not known
        self.key: Key

    @property
    def repeatable_by(self) -> str:
        """The name of those who share idempotency keys: the account."""
        return self.key.account_id

    def choose_meter(self, stream: bool) -> Meter:
        """Return the meter for an answer that is server-sent events, or not."""
        endpoint = self.endpoint
        if not stream:
            return JSONMeter(endpoint.images)
        return StreamMeter(
            images=endpoint.images,
            chat=endpoint.chat,
            take_out_usage=self.takes_out_usage,
            ends=self.answers,
            expects_usage=self.expects_usage(),
        )

    def expects_usage(self) -> bool:
        """Whether a streamed chat was asked to report its usage."""
        return self.takes_out_usage

    def meter_decoded(self, codings: list[bytes], labelled: bool, start: bytes) -> None:
        """Use a meter for a compressed answer. `labelled`: its content type is that of a stream.
        `start`: its first bytes, if they have been sent on already."""
        report = self.meter.report
        self.meter = DecodedMeter(report, codings, labelled, self.choose_meter, start)

    def grace(self) -> float:
        """Return for how many seconds the upstream is read on when the client has left."""
        metering = self.settings.metering
        return metering.drain_seconds if metering.on_disconnect == "drain" else 0.0

    def to(self, upstream: Upstream) -> None:
        """It is about to leave for that one."""

    def note(self) -> None:
        """The meter was fed."""

    async def settle(self, outcome: Outcome) -> None:
        """It is over; what still waits for that may be sent then."""
        raise NotImplementedError

    async def ask_for_usage(self, response_id: str, upstream_name: str) -> None:
        """Ask the upstream for a response of which only an estimate is known, and correct that if
        the answer shows what was used."""
        upstream = self.gateway.upstream_named(upstream_name)
        if upstream is None:
            return
        account_id = self.key.account_id
        status, report = await ask(upstream, f"/responses/{response_id}", account_id)
        if status == 200 and report.response_id == response_id:
            await self.gateway.corrections.look(response_id, account_id, report)

    async def forget(self) -> None:
        """The client left before anything was sent: nothing was used. Raises ClientLeft."""
        self.admission.put_back()
        raise ClientLeft

    def outcome(self) -> Outcome:
        """Of an answer that has come to its end, one way or the other."""
        if self.meter.report.failed or (self.status or 0) >= 400:
            return "upstream_error"
        if self.clock.client_left:
            return "client_disconnected"
        return "completed" if self.meter.ended else "upstream_failed"

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - float(self.scope["started"])) * 1000)


class Metered(Exchange):
    """A request that has a row in the ledger. If it asks for a background response, `admit` counts
    that among the account's unfinished ones; leaving `with` uncounts it if none was created."""

    _content: Content
    _money: Hold
    _row: Row
    _left_at = math.inf  # when it left for the upstream, by the monotonic clock
    _preserved_after = PRESERVE_SECONDS / PRESERVE_GROWTH  # seconds of work
    _preserved = False  # whether the ledger has a row in `unsettled` for it
    _further_input = 0  # tokens that it may read beside its body and what that builds on
    _background: Background | None = None  # what its response goes on as
    _named = 0  # objects that it is known to have made
    _answers = 1  # that it asks for
    _repeats = False  # what another request has made
    _in_room = False  # whether it is counted as an unfinished background response
    _read_meanwhile = False  # whether its response was shown to another request

    async def admit(self, key: Key, content: Content, upstreams: list[Upstream]) -> None:
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

    def __enter__(self) -> Metered:
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

    def new_row(self, model: str, upstream: str) -> Row:
        """Return a pending row. It gets its time when it is written."""
        return Row(
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

    async def hold(self, content: Content, further_input: int = 0) -> Hold:
        """Hold what a request can cost, at the prices of this instant; `further_input` is in
        tokens. Raises Refusal."""

        def most(tariff: Tariff | None) -> int:
            self._weigh_conversations(content)
            return self._most_cost(tariff, content, further_input)

        try:
            return await self.gateway.books.hold(self.key, content.model, most)
        except Spent as error:
            raise insufficient_quota(f"{error}{self._advice(content)}") from None
        except LedgerUnavailable:
            raise Refusal("ledger_unavailable") from None

    def _advice(self, content: Content) -> str:
        """Say how to lower the most that a request can cost: sentences, each after a space."""
        ways = list(self._cheaper_ways(content))
        first = [f" {way[0].upper()}{way[1:]} makes that less." for way in ways[:1]]
        return "".join(first + [f" So does {way}." for way in ways[1:]])

    def _cheaper_ways(self, content: Content) -> Iterator[str]:
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

    def _weigh_conversations(self, content: Content) -> None:
        """Count the tokens of the conversations that the request names anew: requests that were
        served while it waited can have added to them. Raises LedgerUnavailable."""
        objects = self.gateway.objects
        for each in content.conversations:
            home = objects.home_of(each, self.key.account_id)
            tokens = (home.tokens if home else None) or 0
            content.weigh_again(each, tokens + objects.growing(each))

    def _most_cost(self, tariff: Tariff | None, content: Content, further_input: int) -> int:
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

    def _most_input(self, content: Content, further_input: int) -> int:
        """Return how many tokens it can read at most."""
        into = content.most_input_tokens + content.inherited_tokens + further_input
        unknown = self.settings.billing.hold_output_tokens if content.inherits_unknown else 0
        return into + unknown

    def _most_output(self, tariff: Tariff | None) -> int:
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

    def _most_further(self, tariff: Tariff, content: Content, into: int) -> int:
        """Return the most that one use of each further model can cost, in nanos: one call of the
        image tool, or one SVG. A model without a price is billed by `tariff`, that of the
        requested model. An SVG's author that is not named can be any model."""
        books, usual = self.gateway.books, self.settings.billing.hold_output_tokens

        def most(of_model: Tariff, tier: str | None, images: bool) -> int:
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

    def _most(self) -> Most:
        """Return the most that it was held to use, or would have been if anything limited it."""
        into = self._most_input(self._content, self._further_input)
        output = self._most_output(self._money.tariff) * self._answers
        calls, pictures = self._most_calls(), self._most_pictures()
        return Most(into, output, self._most_drawn(), calls, pictures)

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
            await ledger.begin(self.gateway.store, self._row)
        except LedgerUnavailable:
            self.admission.put_back()
            raise Refusal("ledger_unavailable") from None
        if self.clock.client_left:
            await self.forget()

    async def forget(self) -> None:
        self.admission.put_back()
        await ledger.forget(self.gateway.store, self._row)
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
    ) -> dict[str, Home]:
        """Make these objects the account's, and return where they are. What was made without being
        stored is not, unless that is said to be always so."""
        homes = homes_of(made, self.meter.report, self.home, usage, likely)
        stored = homes
        if self._facts.background is not True and self._facts.store is False:
            stored = {each: homes[each] for each, always in made.items() if always}
        self.gateway.objects.own_each(stored, self._row.account_id)
        return homes

    @property
    def home(self) -> Home:
        """Where the objects that it makes are stored. With an idempotency key, `minted_input` is
        false: the upstream may answer with a response that another body made."""
        first = header(self.scope["headers"], b"idempotency-key") is None
        minted = first and self._content.mints_input
        content = self._content
        return Home(self._row.upstream, content.lasting_models, minted, content.lasting_extras)

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
            with contextlib.suppress(LedgerUnavailable):
                self._repeats = not self.gateway.objects.is_free(response_id)
        self._drop_preserved()
        self.awaits_id = False
        if not self._repeats:
            self._fill(report)
            at, held, model = self._money.at, self._money.held, self._content.image_model()
            most = msgspec.json.encode(self._most()).decode()
            unfinished = Unfinished(at, held, self._input_estimate, model, most=most)
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
                await ledger.settle(self.gateway.store, row, admitted)
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

    def _account_for(self, row: Row, outcome: Outcome, guess: Estimate | None) -> list[Part]:
        """Fill in the row's outcome and usage, except containers. Return the parts to bill."""
        parts = account_for(row, self.meter.report, outcome, guess)
        if self.endpoint.chat and self._content.searches and row.usage.web_searches is None:
            parts = counted(row, parts, web_searches=1)
        return parts

    @property
    def _admitted(self) -> ledger.Admitted | None:
        """What a later correction needs, or None if the response can't be fetched later."""
        if not self.endpoint.stores:
            return None
        return ledger.Admitted(self._money.at, self._content.image_model(), self._money.held)

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
            ledger.keep_unsettled(self.gateway.store, row, self._admitted)

    @property
    def _is_over(self) -> bool:
        """Whether its row is settled, or will be settled by another request or as a background
        response."""
        return self.settled or self._repeats or self._background is not None

    def _drop_preserved(self) -> None:
        """Remove what `preserve` has kept, in the commit of what is recorded next."""
        if self._preserved:
            self._preserved = False
            ledger.drop_unsettled(self.gateway.store, self._row)

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
            Seen.of(report),
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
            return bool(Seen.of(self.meter.report))
        if outcome == "completed" and self._unmetered and not self._money.tariff:
            return self.settings.metering.include_usage == "add"
        return self.first_byte_ms is not None or outcome in ("client_disconnected", "interrupted")


def homes_of(
    ids: Iterable[str], report: Report, home: Home, usage: Usage | None, likely: Usage | None = None
) -> dict[str, Home]:
    """Return the homes of objects that a response made, with the tokens that a request which builds
    on them reads at most: of a response and its conversation all input and output, and so of an
    item, unless it holds nothing but output. `usage` is None if it is not known yet; `likely` is
    given where it is only the most that can have been used."""
    if usage is None:
        return dict.fromkeys(ids, home)
    whole = home.with_tokens(all_of(usage), all_of(likely) if likely else None)
    words = home.with_tokens(usage.output_tokens or 0, likely.output_tokens if likely else None)
    return {each: words if each in report.words else whole for each in ids}


def all_of(usage: Usage) -> int:
    """Return the tokens of an answer and of all that it was made from."""
    pictures = usage.image_output_tokens or 0
    return (usage.input_tokens or 0) + (usage.output_tokens or 0) + pictures


def weight(row: Row, most: Most) -> Usage:
    """Return the usage of a request that has ended, for those that build on what it made. An
    estimate can be too low, and an answer that failed reports no input: they read all that is
    there, and would spend what is not held."""
    if row.usage_source != "estimated":
        into = row.usage.input_tokens or most.input_tokens
        return msgspec.structs.replace(row.usage, input_tokens=into)
    drawn = most.drawn_tokens * most.pictures
    return Usage(most.input_tokens, output_tokens=most.output_tokens, image_output_tokens=drawn)


def account_for(
    row: Row, report: Report, outcome: Outcome, guess: Estimate | None = None
) -> list[Part]:
    """Fill in how the request ended and what it used: what the upstream says, else the estimate.
    Return the parts to bill."""
    row.outcome = outcome
    if guess:
        row.usage, row.usage_source = guess.usage, "estimated"
        return guess.parts
    if report.usage:
        row.usage, row.usage_source = report.usage, "upstream"
    return report.parts


async def count_containers(
    gateway: Gateway, row: Row, report: Report, parts: list[Part]
) -> list[Part]:
    """Count the containers in an answer that nobody was billed for, which no usage reports. An
    estimate bounds their number. Return the parts to bill. The row must be settled before anything
    else is waited for, so that parallel requests are not billed for the same container."""
    if row.usage_source == "none":
        return parts
    new = await gateway.containers.unbilled(report.containers)
    if row.usage_source == "estimated":
        new = new[: row.usage.containers or 0]
    gateway.containers.bill(new)
    return counted(row, parts, containers=len(new) or None)


def counted(row: Row, parts: list[Part], **calls: int | None) -> list[Part]:
    """Add calls that no usage reports to a row's usage, if that is known. Return the parts to
    bill."""
    if row.usage_source == "none":
        return parts
    row.usage = msgspec.structs.replace(row.usage, **calls)
    first = parts[0]._replace(usage=msgspec.structs.replace(parts[0].usage, **calls))
    return [first, *parts[1:]]


def charge(row: Row, parts: list[Part], money: Hold, image_model: str) -> None:
    """Fill in the row's cost, by the prices of the request's admission and the tier that the
    response reports. Leave it unknown where no usage is known."""
    if row.usage_source != "none":
        row.price_id, row.cost = money.cost(of_models(parts, image_model), row.service_tier)


def bill(row: Row, parts: list[Part], money: Hold, image_model: str) -> None:
    """Fill in the row's cost and month, and turn the hold into the cost."""
    charge(row, parts, money, image_model)
    row.month = money.settle(row.cost or 0)


def of_models(parts: list[Part], image_model: str) -> list[Part]:
    """Return the parts with the name of the image tool's model, which no answer tells."""
    return [
        part._replace(model=image_model) if part.model == IMAGE_TOOL else part for part in parts
    ]


# ── Background ───────────────────────────────────────────────────────────────────────────────────
# A background response goes on when its request is over. Its row stays pending and what it can cost
# stays held, until somebody sees that it has ended: its client, who fetches it, or the gateway,
# which asks the upstream with growing pauses, after a restart as well. Whoever is first settles it;
# whoever comes while that is being written waits until it is.

FIRST_PAUSE, MOST_PAUSE, PAUSE_GROWTH = 1.0, 60.0, 1.5  # seconds; the pause grows by half
MOST_ASKING = 16
ROOM_SECONDS = 5  # retry-after for a client that has too many unfinished responses
UNKNOWN = (400, 404, 410)  # how an upstream says that there is no such response
MOST_UNKNOWN = 3  # in a row: it may not know at once what it has just made
MOST_AGE_SECONDS = 48 * 3600  # then it is given up; OpenAI's longest completion window is 8 hours


async def ask(
    upstream: Upstream, path: str, account_id: str, method: str = "GET"
) -> tuple[int, Report]:
    """Send a request of the gateway's own about a response of the account. Return the status of the
    upstream's answer, 0 where there is none, and what the answer reports."""
    meter = JSONMeter(images=False)
    try:
        status = await upstream.fetch(path, meter.steps, method)
    except (httpx2.HTTPError, TimeoutError):
        return 0, meter.report
    await in_slices(meter.finishing(), account_id)
    return status, meter.report


class Background:
    """One background response that has not been seen to end."""

    def __init__(
        self, row: Row, money: Hold, unfinished: Unfinished, chosen: set[str] | None, now: int
    ) -> None:
        """`chosen` are the ids that the client gave to items of its input; None if only an earlier
        process knew them. Their hashes are kept: thousands of ids would take much memory for as
        long as the response runs. `now` is the ledger's time."""
        created = row.started_at + (row.duration_ms or 0)
        self._progress = (
            msgspec.json.decode(unfinished.seen, type=Progress)
            if unfinished.seen
            else Progress(Seen(unfinished.text_bytes), created, created)
        )
        self._kept = self._progress.seen, self._progress.works  # what the ledger has
        self.row = row
        self.unfinished = unfinished
        self.chosen = None if chosen is None else {hash(each) for each in chosen}
        self.settling: asyncio.Task[None] | None = None
        self.alone = False  # the request that made it is over
        self.cancelled = False  # its key turned out to be somebody else's
        self.money = money
        self._read: set[Report] = set()
        self._followed_at = time.monotonic()  # when this object was made
        self._age_before = max(0, now - row.started_at)  # milliseconds
        self._watched_after = 0.0  # seconds from then to the last `watch` that was due

    def read(self, report: Report) -> None:
        """Somebody is being sent what this meters."""
        self._read.add(report)

    def left(self, report: Report) -> None:
        """A reader has all that it gets."""
        self._read.discard(report)
        self._progress.seen = self._progress.seen.or_more(Seen.of(report))

    def watch(self, now: float) -> bool:
        """Note what its readers have been sent so far, if that is due. Return whether it was. `now`
        is by the monotonic clock."""
        seconds = now - self._followed_at
        if seconds < PRESERVE_GROWTH * self._watched_after or not self._read:
            return False
        self._watched_after = seconds
        for report in self._read:
            self._progress.seen = self._progress.seen.or_more(Seen.of(report))
            if report.status == "in_progress":
                self.note(report.status)
        return True

    def ignore(self, report: Report) -> None:
        """Ignore what a reader was sent: it was another response."""
        self._read.discard(report)

    @property
    def _age(self) -> int:
        """How long ago its request began, in milliseconds; of this process by the monotonic
        clock."""
        return self._age_before + round((time.monotonic() - self._followed_at) * 1000)

    @property
    def _now(self) -> int:
        return self.row.started_at + self._age

    def set_back(self, at: int) -> None:
        """Let it not have begun later than `at`, and move what is known of its progress with it."""
        distance = max(0, self.row.started_at - at)
        self.row.started_at -= distance
        self._progress.since -= distance
        self._progress.until -= distance

    def note(self, status: str | None) -> None:
        """Note that it was looked at and has not ended. A status of None could not be read."""
        self._progress.note(status, self._now)

    def news(self) -> str | None:
        """Return what is known of it as JSON, None if the ledger has as much."""
        known = self._progress.seen, self._progress.works
        if known == self._kept:
            return None
        self._kept = known
        return msgspec.json.encode(self._progress).decode()

    def finish(self, report: Report, outcome: Outcome, speed: float, most: Most) -> list[Part]:
        """Fill in the row but for its cost: it has ended. Return the parts to bill. `speed` is in
        output tokens a second."""
        row, progress = self.row, self._progress
        row.duration_ms = self._age
        row.model, row.service_tier = report.model or row.model, report.service_tier
        for each in (report, *self._read):
            progress.seen = progress.seen.or_more(Seen.of(each))
        guess = None
        partly = is_cancelled_without_output(report) and (progress.works or bool(progress.seen))
        unknown = partly or not is_complete(report)
        if unknown and (outcome != "upstream_error" or progress.seen):
            if report.status is not None:  # it worked until it ended
                progress.until = self._now
            guess = estimate(
                report,
                progress.seen,
                written=math.ceil(progress.worked_seconds * speed),
                read=self.unfinished.input_estimate,
                most=most,
                images=False,
                partly=partly,
            )
        return account_for(row, report, outcome, guess)

    def bill(self, parts: list[Part]) -> None:
        """Work out what it cost."""
        bill(self.row, parts, self.money, self.unfinished.image_model)

    @property
    def most(self) -> Most | None:
        """The most that it was held to use; None where an earlier version did not keep it."""
        most = self.unfinished.most
        return msgspec.json.decode(most, type=Most) if most else None

    @property
    def admitted(self) -> ledger.Admitted:
        """What a later correction needs."""
        unfinished = self.unfinished
        return ledger.Admitted(unfinished.admitted_at, unfinished.image_model, unfinished.held)

    @property
    def seconds_left(self) -> float:
        """For how long it may still go on, if it does not end."""
        return MOST_AGE_SECONDS - self._age / 1000


class Unended:
    """All background responses that have not been seen to end."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._responses: dict[str, Background] = {}
        # By account, how many are unfinished; requests that may create one are counted as well.
        self._counts: Counter[str] = Counter()
        self._asking = asyncio.Semaphore(MOST_ASKING)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ended: Callable[[asyncio.Task[Any]], None] = lambda _: None  # called with each task

    async def resume(self) -> None:
        """Take up what an earlier process left."""
        for row, key, unfinished in await ledger.unfinished_rows(self._gateway.store):
            money = await self._gateway.books.hold_again(
                key, row.requested_model, unfinished.admitted_at, unfinished.held
            )
            response = Background(row, money, unfinished, None, self._gateway.store.time())
            if most := response.most:
                money.grow(self._gateway.objects, [row.response_id or ""], most.all_tokens)
            self._counts[row.account_id] += 1
            self._add(response)
            response.alone = True
            response.cancelled = ledger.is_compromised(self._gateway.store, key.id)
            self._start(self._ask_until_ended(response))

    def keep(
        self, row: Row, money: Hold, unfinished: Unfinished, chosen: set[str]
    ) -> tuple[Background, asyncio.Future[None]]:
        """Keep track of a response that goes on after its request has ended, with its hold. Return
        it, and a future that is done when it is on disk."""
        now = self._gateway.store.time()
        response = Background(row, money.keep(), unfinished, chosen, now)
        self._add(response)
        return response, ledger.keep_pending(self._gateway.store, row, unfinished)

    async def leave(self, response: Background, report: Report) -> bool:
        """The request that made it is over. Whether the response is, too; else it is asked for."""
        response.left(report)
        response.alone = True
        await self._see(response, report)
        if response.settling:
            return True
        response.note(report.status)
        if written := self._keep_news(response):
            await written
        self._start(self._ask_until_ended(response))
        return False

    def read(self, response_id: str, report: Report) -> None:
        """Somebody is being sent its output."""
        if response := self._responses.get(response_id):
            response.read(report)

    def ignore(self, response_id: str, report: Report) -> None:
        """Ignore what a reader was sent: it was another response."""
        if response := self._responses.get(response_id):
            response.ignore(report)

    async def look(self, response_id: str, report: Report, shown: bool) -> None:
        """A reader has all that it gets. If it has been shown that the response has ended, this is
        done when that is written down. What events say of its status may be old: they are shown
        from the response's beginning."""
        if response := self._responses.get(response_id):
            response.left(report)
            if shown:
                await self._see(response, report)
            if report.status == "in_progress" or (
                report.status == "queued" and not report.in_events
            ):
                response.note(report.status)
            if written := self._keep_news(response):
                await written

    async def preserve(self, now: float) -> None:
        """Keep what readers of unfinished responses have been sent so far, in case the process is
        killed. `now` is by the monotonic clock."""
        async for response in with_turns(list(self._responses.values())):
            if response.watch(now):
                self._keep_news(response)

    def _keep_news(self, response: Background) -> asyncio.Future[None] | None:
        """Write what was seen of it, if that is more than the ledger has. Return a future that is
        done when it is on disk."""
        if response.settling or not (news := response.news()):
            return None
        return ledger.note_progress(self._gateway.store, response.row, news)

    def enter(self, account_id: str, most: int) -> None:
        """Count one more unfinished background response of the account, before the upstream is
        asked for it. `most` is the maximum (0: none). Raises Refusal."""
        if 0 < most <= self._counts[account_id]:
            headers = rate_limit_headers("background", most, 0, ROOM_SECONDS)
            message = (
                f"This account has {most} unfinished background responses, which is the maximum."
            )
            raise Refusal(
                "concurrency_limit_exceeded", message, retry_after=ROOM_SECONDS, headers=headers
            )
        self._counts[account_id] += 1

    def leave_room(self, account_id: str) -> None:
        """Stop counting a background response that has ended or was not created."""
        self._counts[account_id] -= 1
        if not self._counts[account_id]:
            del self._counts[account_id]

    def _add(self, response: Background) -> None:
        """Let visits see the response, unless an odd upstream gave its id to an earlier one too."""
        self._responses.setdefault(response.row.response_id or "", response)

    def _remove(self, response: Background) -> None:
        response_id = response.row.response_id or ""
        if self._responses.get(response_id) is response:
            del self._responses[response_id]
        self.leave_room(response.row.account_id)

    def set_back(self, at: int) -> None:
        """Let none have begun later than `at`: the ledger's time is set back."""
        for response in self._responses.values():
            response.set_back(at)

    def __contains__(self, response_id: str) -> bool:
        """Until its end is committed."""
        return response_id in self._responses

    def cancel(self, key_id: str) -> int:
        """Have the upstreams stop what the key has made; how much of that goes on by itself."""
        running = [
            each
            for each in self._responses.values()
            if each.row.key_id == key_id and each.settling is None
        ]
        for each in running:
            each.cancelled = True
            self._start(self._look_after(each))
        return sum(each.alone for each in running)

    async def _see(self, response: Background, report: Report) -> None:
        if report.status and report.status not in UNFINISHED:
            outcome: Outcome = "completed"
            if report.status == "cancelled":
                outcome = "client_disconnected"
            elif report.failed:
                outcome = "upstream_error"
            self._settle(response, report, outcome)
        if response.settling:
            await asyncio.shield(response.settling)

    def _settle(self, response: Background, report: Report, outcome: Outcome) -> None:
        """Only the first time."""
        if response.settling is None:
            response.settling = self._start(self._write(response, report, outcome))

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name="background responses")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self.ended(task)

    async def _write(self, response: Background, report: Report, outcome: Outcome) -> None:
        gateway, row = self._gateway, response.row
        speed = await gateway.speeds.of(
            report.model or row.model or row.requested_model,
            row.account_id,
            limited=response.money.held > 0,
        )
        most = response.most or most_usual(gateway.settings, MOST_TOKENS)
        parts = response.finish(report, outcome, speed, most)
        response.bill(await count_containers(gateway, row, report, parts))
        self._learn(response, report, most)
        admitted = response.admitted
        with gateway.corrections.keep_held(row, response.money, admitted):  # as in Metered.settle
            await ledger.end_background(gateway.store, row, admitted)
        self._remove(response)
        gateway.watch.settled({"request_id": row.request_id, "where": row.endpoint}, row)

    def _learn(self, response: Background, report: Report, most: Most) -> None:
        """Make the objects that the finished response names the account's, except for ids that the
        client may have chosen, and note their tokens."""
        row, objects, chosen = response.row, self._gateway.objects, response.chosen
        response_id = row.response_id or ""
        made = list(dict.fromkeys((response_id, *report.made)))
        if chosen is None:
            home = None
            with contextlib.suppress(LedgerUnavailable):
                home = objects.home_of(response_id, row.account_id)
            if not (home and home.minted_input):
                made = [response_id] if home else []
        made = [each for each in made if hash(each) not in (chosen or ())]
        homes = homes_of(made, report, Home(row.upstream), weight(row, most), row.usage)
        objects.own_each(homes, row.account_id)

    async def _ask_until_ended(self, response: Background) -> None:
        pause, unknown = FIRST_PAUSE, 0
        while not response.settling:
            wait = min(pause * random.uniform(0.8, 1.2), max(0.0, response.seconds_left))
            await asyncio.sleep(wait)
            pause = min(MOST_PAUSE, pause * PAUSE_GROWTH)
            status = await self._try_to_look(response)
            unknown = unknown + 1 if status in UNKNOWN else 0
            if unknown >= MOST_UNKNOWN or response.seconds_left <= 0:
                self._settle(response, Report(False), "upstream_failed")

    async def _try_to_look(self, response: Background) -> int:
        """Ask how it is. What fails unexpectedly, for this response, is tried again later."""
        try:
            return await self._look_after(response)
        except Exception as error:
            fields = {"request_id": response.row.request_id, **shown_error(error)}
            say(logging.ERROR, "background response not asked for", **fields)
            return 0

    async def _look_after(self, response: Background) -> int:
        """Ask how it is, after cancelling it where that is to be done; the status of the upstream's
        answer."""
        async with self._asking:
            if response.cancelled and not response.settling:
                await self._ask(response, "/cancel", "POST")
            return 200 if response.settling else await self._ask(response)

    async def _ask(self, response: Background, suffix: str = "", method: str = "GET") -> int:
        """The status of the upstream's answer, 0 where there is none."""
        row = response.row
        upstream = self._gateway.upstream_named(row.upstream)
        if upstream is None:
            return 0
        path = f"/responses/{row.response_id}{suffix}"
        status, report = await ask(upstream, path, row.account_id, method)
        if not status or report.response_id not in (None, row.response_id):
            return 0  # no answer, or the upstream has answered with another response
        response.left(report)
        if status == 200:
            await self._see(response, report)
            response.note(report.status)
            if written := self._keep_news(response):
                await written
        return status
