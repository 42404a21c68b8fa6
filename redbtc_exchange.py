"""One request as limits, money and ledger see it, whether it came over HTTP or over a WebSocket.

    admit ─► hold ─► begin ─► (it is forwarded, the meter watches) ─► settle

A row is begun before anything leaves for an upstream, and settled once: by the request's own end,
or, where its response goes on in the background, by whoever first sees that it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
from msgspec import structs

import redbtc_ledger as ledger
from redbtc_billing import Hold, Spent, Tariff
from redbtc_body import Content
from redbtc_ledger import Home, Key, Outcome, Part, Row, Unfinished, Usage
from redbtc_limits import Admission, Clock, rate_limit_headers
from redbtc_meter import IMAGE_TOOL, JSONMeter, Meter, Report, StreamMeter
from redbtc_refusals import ClientLeft, Refusal, header
from redbtc_settings import LedgerUnavailable, now_ms
from redbtc_upstreams import Upstream
from redbtc_watch import Scope

if TYPE_CHECKING:
    from redbtc_proxy import Gateway


NO_RETRY = (b"x-should-retry", b"false")
BYTES_A_TOKEN = 4  # of English text, OpenAI's rule of thumb; only for estimates
UNFINISHED = ("queued", "in_progress")


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

    @property
    def model_needed(self) -> bool:
        """Images have a usual one."""
        return not self.images


def check_background(value: bool | str) -> None:
    """Raise Refusal if `background` is text, which an upstream might take for true. (In a request
    for images, which has no background responses, it is a colour.)"""
    if isinstance(value, str):
        message = "'background' must be true or false."
        raise Refusal("invalid_request", message, param="background")


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
        self.key: Key

    @property
    def repeatable_by(self) -> str:
        """The name of those who share idempotency keys: the account."""
        return self.key.account_id

    def meter_stream(self) -> None:
        """The answer is server-sent events."""
        endpoint = self.endpoint
        self.meter = StreamMeter(
            images=endpoint.images,
            chat=endpoint.chat,
            take_out_usage=self.takes_out_usage,
            ends=self.answers,
        )

    def to(self, upstream: Upstream) -> None:
        """It is about to leave for that one."""

    def note(self) -> None:
        """The meter was fed."""

    async def settle(self, outcome: Outcome) -> None:
        """It is over; what still waits for that may be sent then."""
        raise NotImplementedError

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
    _background: Background | None = None  # what its response goes on as
    _named = 0  # objects that it is known to have made
    _repeats = False  # what another request has made
    _in_room = False  # whether it is counted as an unfinished background response

    async def admit(self, key: Key, content: Content, upstreams: list[Upstream]) -> None:
        """Charge the request's tokens and take its places. Raises Refusal, ClientLeft."""
        self.key, self._content, self._facts = key, content, content.facts
        self._input_estimate = math.ceil(content.size / BYTES_A_TOKEN)
        self.answers = max(1, self._facts.n or 1) if self.endpoint.images else 1
        started_at = now_ms() - self.elapsed_ms()
        self._row = self.new_row(content.facts.model or "", upstreams[0].name, started_at)
        most_output = content.facts.most_output_tokens()
        estimate = 0 if self.endpoint.free else self._input_estimate + most_output
        if self.endpoint.stores and self._facts.background:
            self._enter_room(self._facts.background)
        await self.gateway.limits.admit(self.admission, estimate, self.clock)

    def _enter_room(self, background: bool | str) -> None:
        """Count one more unfinished background response. Raises Refusal."""
        check_background(background)
        most = self.settings.limits.account.background
        self.gateway.unended.enter(self.key.account_id, most)
        self._in_room = True

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
            await self._begin()
            await forward()

    def new_row(self, model: str, upstream: str, started_at: int) -> Row:
        """Pending."""
        return Row(
            request_id=self.scope["request_id"],
            account_id=self.key.account_id,
            key_id=self.key.id,
            endpoint=self.endpoint.path,
            requested_model=model,
            upstream=upstream,
            started_at=started_at,
        )

    @property
    def _unmetered(self) -> bool:
        """Whether it is a stream whose usage is not reported."""
        streams = self.endpoint.chat and bool(self._facts.stream)
        return streams and not self.takes_out_usage and not self._facts.asks_for_usage

    async def hold(self, content: Content, further_input: int = 0) -> Hold:
        """Hold what a request can cost, at the prices of this instant; `further_input` is in
        tokens. Raises Refusal."""

        def most(tariff: Tariff) -> int:
            return self._most_cost(tariff, content, further_input)

        try:
            return await self.gateway.books.hold(self.key, content.facts.model or "", most)
        except Spent as error:
            raise Refusal("insufficient_quota", str(error), headers=[NO_RETRY]) from None
        except LedgerUnavailable:
            raise Refusal("ledger_unavailable") from None

    def _most_cost(self, tariff: Tariff, content: Content, further_input: int) -> int:
        """Nanos. Asked for only where spending is limited: there usage has to be reported."""
        if self.endpoint.free:
            return 0
        if self._unmetered:
            message = "This account's spending is limited, so 'include_usage' can't be left out."
            raise Refusal("invalid_request", message, param="stream_options")
        facts = content.facts
        limits = (facts.most_output_tokens(), tariff.max_output_tokens)
        usual = self.settings.billing.hold_output_tokens
        output = min((limit for limit in limits if limit), default=usual) * max(1, facts.n or 1)
        into = content.most_input_tokens + further_input
        tier, images, long_cache = facts.service_tier, self.endpoint.images, content.long_cache
        most = tariff.most(into, output, tier, images, long_cache)
        for model, images in content.further_models().items():
            if further := self.gateway.books.tariff(model):
                most += further.most(into, further.max_output_tokens or usual, None, images)
        return most

    async def _begin(self) -> None:
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

    def note(self) -> None:
        """Make an object that the upstream made the account's at the first event that names it. An
        id that the client chose and the upstream only repeats is not learned."""
        report = self.meter.report
        if len(report.made) == self._named or not self.endpoint.stores:
            return
        if (self.status or 200) >= 300:  # an error makes nothing
            return
        fresh = list(report.made.items())[self._named :]
        self._named = len(report.made)
        background = self._facts.background is True
        if background and report.response_id and not (self._background or self._repeats):
            self._keep(report, report.response_id)
        stored = background or self._facts.store is not False
        chosen = self._content.chosen_ids
        made = [each for each, always in fresh if (always or stored) and each not in chosen]
        self.gateway.objects.own(made, self._row.account_id, self.home)

    @property
    def home(self) -> Home:
        """Where the objects that it makes are stored. With an idempotency key, `minted_input` is
        false: the upstream may answer with a response that another body made."""
        first = header(self.scope["headers"], b"idempotency-key") is None
        minted = first and self._content.mints_input
        return Home(self._row.upstream, self._content.lasting_models, minted)

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
        if not self._repeats:
            self._fill(report)
            at, held, model = self._money.at, self._money.held, self._content.image_model()
            unfinished = Unfinished(at, held, self._input_estimate, model, 0)
            self._background, self.unwritten = self.gateway.unended.keep(
                self._row, self._money, unfinished, self._content.chosen_ids
            )
            self._background.read(report)

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
            if not await self.gateway.unended.leave(self._background, report):
                self.gateway.watch.answered(self.scope, row.status or 0, "pending")
        else:
            self._fill(report)
            estimate = self._estimate(outcome)
            if self._repeats:
                report.usage = estimate = None
            account_for(row, report, outcome, estimate)
            if report.containers or report.file_searches:
                await count_tools(self.gateway, row, report)
            bill(row, report, self._money, self._content.image_model())
            await ledger.settle(self.gateway.store, row)
            self.gateway.watch.settled(self.scope, row)
        if row.usage_source != "none" or row.outcome == "upstream_error":
            self.admission.correct((row.usage.input_tokens or 0) + (row.usage.output_tokens or 0))

    def _estimate(self, outcome: Outcome) -> Usage | None:
        """Of what nobody will report."""
        estimates = self._unmetered and self.settings.metering.include_usage == "add"
        if outcome == "client_disconnected" or (outcome == "completed" and estimates):
            return estimated(self._input_estimate, self.meter.report.text_bytes)
        return None


def estimated(input_tokens: int, text_bytes: int) -> Usage:
    """Usage by what has passed."""
    return Usage(input_tokens=input_tokens, output_tokens=math.ceil(text_bytes / BYTES_A_TOKEN))


def account_for(row: Row, report: Report, outcome: Outcome, estimate: Usage | None) -> None:
    """How the request ended and what it used: what the upstream says, else the estimate."""
    row.outcome = outcome
    if report.usage:
        row.usage, row.usage_source = report.usage, "upstream"
    elif estimate:
        row.usage, row.usage_source = estimate, "estimated"


async def count_tools(gateway: Gateway, row: Row, report: Report) -> None:
    """Add to a row's usage, if that is known, what no upstream reports in it: file searches, and
    containers that nobody was billed for. The row must be settled before anything else is waited
    for, so that parallel requests are not billed for the same container."""
    if row.usage_source == "none":
        return
    new = await gateway.containers.unbilled(report.containers)
    gateway.containers.bill(new)
    row.usage = with_tool_calls(row.usage, report.file_searches or None, len(new) or None)


def with_tool_calls(usage: Usage, file_searches: int | None, containers: int | None) -> Usage:
    """Return the usage with these calls of tools."""
    return structs.replace(usage, file_searches=file_searches, containers=containers)


def bill(row: Row, report: Report, money: Hold, image_model: str) -> None:
    """What it cost, by the prices of its admission and the tier that the response reports; not
    known where no usage is."""
    if row.usage_source != "none":
        parts = [
            part._replace(model=image_model) if part.model == IMAGE_TOOL else part
            for part in report.parts or [Part(None, row.usage, False)]
        ]
        files, containers = row.usage.file_searches, row.usage.containers
        if files or containers:  # the tools are those of the request's own model
            first = with_tool_calls(parts[0].usage, files, containers)
            parts[0] = parts[0]._replace(usage=first)
        row.price_id, row.cost = money.cost(parts, row.service_tier)
    row.month = money.settle(row.cost or 0)


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
MOST_FAILURES = 10  # in a row, once the response is older than any can be
MOST_AGE_SECONDS = 48 * 3600  # OpenAI's longest completion window is 8 hours


class Background:
    """One background response that has not been seen to end."""

    def __init__(
        self, row: Row, money: Hold, unfinished: Unfinished, chosen: set[str] | None
    ) -> None:
        """`chosen` are the ids that the client gave to items of its input; None if only an earlier
        process knew them. Their hashes are kept: thousands of ids would take much memory for as
        long as the response runs."""
        self.row = row
        self.unfinished = unfinished
        self.chosen = None if chosen is None else {hash(each) for each in chosen}
        self.settling: asyncio.Task[None] | None = None
        self.alone = False  # the request that made it is over
        self.cancelled = False  # its key turned out to be somebody else's
        self._money = money
        self._passed = unfinished.text_bytes
        self._read: set[Report] = set()

    @property
    def text_bytes(self) -> int:
        """Of its output, the most that anybody has been sent."""
        return max(self._passed, *(report.text_bytes for report in self._read), 0)

    def read(self, report: Report) -> None:
        """Somebody is being sent what this meters."""
        self._read.add(report)

    def left(self, report: Report) -> None:
        """He has all that he gets."""
        self._read.discard(report)
        self._passed = max(self._passed, report.text_bytes)

    def finish(self, report: Report, outcome: Outcome) -> None:
        """Fill in the row: it has ended."""
        row = self.row
        row.duration_ms = now_ms() - row.started_at
        row.model, row.service_tier = report.model or row.model, report.service_tier
        estimate = estimated(self.unfinished.input_estimate, self.text_bytes)
        cancelled = report.status == "cancelled"
        account_for(row, report, outcome, estimate if cancelled else None)

    def bill(self, report: Report) -> None:
        """Work out what it cost."""
        bill(self.row, report, self._money, self.unfinished.image_model)

    @property
    def outdated(self) -> bool:
        return now_ms() - self.row.started_at > MOST_AGE_SECONDS * 1000


class Unended:
    """All background responses that have not been seen to end."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._responses: dict[str, Background] = {}
        # By account, how many are unfinished; requests that may create one are counted as well.
        self._counts: Counter[str] = Counter()
        self._asking = asyncio.Semaphore(MOST_ASKING)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def resume(self) -> None:
        """Take up what an earlier process left."""
        for row, key, unfinished in await ledger.unfinished_rows(self._gateway.store):
            money = await self._gateway.books.hold_again(
                key, row.requested_model, unfinished.admitted_at, unfinished.held
            )
            response = Background(row, money, unfinished, None)
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
        response = Background(row, money.keep(), unfinished, chosen)
        self._add(response)
        return response, ledger.keep_pending(self._gateway.store, row, unfinished)

    async def leave(self, response: Background, report: Report) -> bool:
        """The request that made it is over. Whether the response is, too; else it is asked for."""
        response.left(report)
        response.alone = True
        await self._see(response, report)
        if response.settling:
            return True
        await ledger.note_output(self._gateway.store, response.row, response.text_bytes)
        self._start(self._ask_until_ended(response))
        return False

    def read(self, response_id: str, report: Report) -> None:
        """Somebody is being sent its output."""
        if response := self._responses.get(response_id):
            response.read(report)

    async def look(self, response_id: str, report: Report, shown: bool) -> None:
        """He has all that he gets. If he has been shown that it has ended, this is done when that
        is written down."""
        if response := self._responses.get(response_id):
            response.left(report)
            if shown:
                await self._see(response, report)

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
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _write(self, response: Background, report: Report, outcome: Outcome) -> None:
        gateway, row = self._gateway, response.row
        response.finish(report, outcome)
        await count_tools(gateway, row, report)
        response.bill(report)
        self._learn(response, report)
        await ledger.end_background(gateway.store, row)
        self._remove(response)
        gateway.watch.settled({"request_id": row.request_id, "where": row.endpoint}, row)

    def _learn(self, response: Background, report: Report) -> None:
        """Make the objects that the finished response names the account's, except for ids that the
        client may have chosen."""
        row, objects, chosen = response.row, self._gateway.objects, response.chosen
        if chosen is None:
            with contextlib.suppress(LedgerUnavailable):
                home = objects.home_of(row.response_id or "", row.account_id)
                chosen = set() if home and home.minted_input else None
        if chosen is not None:
            made = [each for each in report.made if hash(each) not in chosen]
            objects.own(made, row.account_id, Home(row.upstream))

    async def _ask_until_ended(self, response: Background) -> None:
        pause, unknown, failures = FIRST_PAUSE, 0, 0
        while not response.settling:
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(MOST_PAUSE, pause * PAUSE_GROWTH)
            status = await self._look_after(response)
            unknown = unknown + 1 if status in UNKNOWN else 0
            failures = failures + 1 if status != 200 else 0
            if unknown >= MOST_UNKNOWN or (failures >= MOST_FAILURES and response.outdated):
                self._settle(response, Report(False), "upstream_failed")

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
        meter = JSONMeter(images=False)
        try:
            path = f"/responses/{row.response_id}{suffix}"
            status = await upstream.fetch(path, meter.feed, method)
        except (httpx2.HTTPError, TimeoutError):
            return 0
        meter.finish()
        if status == 200:
            await self._see(response, meter.report)
        return status
