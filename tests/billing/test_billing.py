"""Promise 8: cost is exact. Money by property, against models written independently here: with
fractions and plain lists, knowing nothing of nanos, rollups or caches."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import random
import re
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec.structs import replace

from redbtc import rates as rates_module
from redbtc.admin.set_time import set_time
from redbtc.billing import prices as prices_module
from redbtc.billing import records, statements
from redbtc.billing import reports as reports_module
from redbtc.billing.billing import Billing
from redbtc.billing.price_changes import add_prices
from redbtc.billing.price_table import PriceTable
from redbtc.billing.prices import Price
from redbtc.billing.records import Payment, PricesAdded
from redbtc.billing.reports import Group, Range, RequestShown
from redbtc.billing.spending import Hold, SpendingLimitReached
from redbtc.billing.statements import Statement
from redbtc.config import BillingSettings
from redbtc.errors import Conflict, UserError
from redbtc.money import NANOS, decimal, parse_amount
from redbtc.store import clock as clock_module
from redbtc.store import consistency
from redbtc.store import keys as keys_module
from redbtc.store import requests as requests_module
from redbtc.store.accounts import Account, Accounts
from redbtc.store.database import Store
from redbtc.store.keys import Key
from redbtc.store.readers import MAX_SNAPSHOTS
from redbtc.store.schema import (
    APPLICATION_ID,
    TRIGGERS,
    migrations,
    newest_version,
    schema,
    written_out,
)
from redbtc.times import month_of, month_start, months_after
from redbtc.usage import KINDS, RequestRow, Usage, UsageSource

pytestmark = pytest.mark.promise_8

HOUR = 3_600_000
DAY = 24 * HOUR
START = int(datetime(2026, 11, 23, tzinfo=UTC).timestamp() * 1000)

# ── Amounts ──────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(-(10**27) + 1, 10**27 - 1))
def test_an_amount_is_its_decimal_string_exactly(nanos: int) -> None:
    assert parse_amount(decimal(nanos)) == nanos
    assert Fraction(decimal(nanos)) == Fraction(nanos, 10**9)
    assert parse_amount(decimal(nanos, 2)) == nanos


@pytest.mark.parametrize(
    "text",
    ["", "-", ".5", "5.", "1e3", "1,000", "0.0000000001", "NaN", "١", "1 0", "0x1", "9" * 19],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UserError, match="is not an amount"):
        parse_amount(text)


@given(st.integers(0, 4000), st.integers(-40, 40))
def test_months(number: int, distance: int) -> None:
    month = f"{1970 + number // 12}-{number % 12 + 1:02}"
    assume(number + distance >= 0)
    assert months_after(months_after(month, distance), -distance) == month
    assert month_of(month_start(month)) == month
    assert month_of(month_start(months_after(month, 1)) - 1) == month


# ── Costs ────────────────────────────────────────────────────────────────────────────────────────

rates = st.none() | st.integers(0, prices_module.MAX_RATE) | st.sampled_from([0, NANOS, 37_500_000])
tokens = st.none() | st.integers(0, 10**8) | st.integers(0, 100)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """As the meter lets them through: parts are not more than their whole."""
    into, out = draw(tokens), draw(tokens)
    cached = draw(st.none() | st.integers(0, into)) if into else None
    heard = draw(st.none() | st.integers(0, into)) if into else None
    spoken = draw(st.none() | st.integers(0, out)) if out else None
    written = draw(st.none() | st.integers(0, into - (cached or 0))) if into else None
    return Usage(
        input_tokens=into,
        cached_input_tokens=cached,
        cache_write_tokens=written,
        output_tokens=out,
        image_input_tokens=draw(tokens),
        image_output_tokens=draw(tokens),
        web_searches=draw(st.none() | st.integers(0, 100_000)),
        audio_input_tokens=heard,
        audio_output_tokens=spoken,
        audio_ms=draw(st.none() | st.integers(0, 10**9)),
        characters=draw(st.none() | st.integers(0, 10**8)),
    )


@st.composite
def prices(draw: st.DrawFn, /, **fixed: Any) -> Price:
    calls = st.none() | st.integers(0, prices_module.MAX_CALL_RATE)
    given_rates = {
        name: draw(calls if name in rates_module.UNITS else rates) for name in rates_module.RATES
    }
    return Price(**{"model": "m", **given_rates, **fixed})


def first(*values: int | None) -> int:
    return next((value for value in values if value is not None), 0)


def cost_by_hand(price: Price, usage: Usage, images: bool) -> int:
    """PROTOCOL.md section 7, with fractions of a currency unit; rounded once, half up."""
    million = Fraction(1, 10**6)
    cached, written = first(usage.cached_input_tokens), first(usage.cache_write_tokens)
    text, said = first(usage.input_tokens), first(usage.output_tokens)
    seen, drawn = first(usage.image_input_tokens), first(usage.image_output_tokens)
    if images:
        text, said = text - seen, said - drawn
    # Cached audio is billed as cached.
    heard = min(first(usage.audio_input_tokens), max(0, text - cached - written))
    spoken = first(usage.audio_output_tokens)
    audio_in, audio_out = (
        first(price.audio_input, price.input),
        first(price.audio_output, price.output),
    )
    minute = first(price.audio_minute, audio_in // 1000)
    character = first(price.characters, max(first(price.input), audio_out))
    said -= spoken
    parts: list[tuple[int | Fraction, int]] = [
        (heard, audio_in),
        (spoken, audio_out),
        (Fraction(first(usage.audio_ms) * 10**6, 60_000), minute),
        (first(usage.characters), character),
        (max(0, text - cached - written - heard), first(price.input)),
        (cached, first(price.cached_input, price.input)),
        (written, first(price.cache_write, price.input)),
        (max(0, said), first(price.output)),
        (seen, first(price.image_input, price.input)),
        (drawn, first(price.image_output, price.output)),
    ]
    exact = sum((count * rate * million for count, rate in parts), Fraction(0))
    rounded = (exact + Fraction(1, 2)).__floor__()
    return rounded + first(usage.web_searches) * first(price.web_search)


@given(prices(), usages(), st.booleans())
def test_a_cost_is_what_a_model_with_fractions_says(
    price: Price, usage: Usage, images: bool
) -> None:
    cost = price.cost(usage, images)
    assert cost == cost_by_hand(price, usage, images)
    assert 0 <= cost < 2**63  # it fits into a column


@given(st.data(), prices(), st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_no_usage_within_the_bounds_costs_more_than_is_held(
    data: st.DataObject, price: Price, into: int, out: int, images: bool
) -> None:
    used = data.draw(st.integers(0, into))
    cached = data.draw(st.integers(0, used))
    seen = data.draw(st.integers(0, used - cached)) if images else None
    said = data.draw(st.integers(0, out))
    usage = Usage(
        input_tokens=used,
        cached_input_tokens=cached,
        cache_write_tokens=data.draw(st.integers(0, used - cached - (seen or 0))),
        output_tokens=said,
        image_input_tokens=seen,
        image_output_tokens=data.draw(st.integers(0, said)) if images else None,
    )
    assert price.cost(usage, images) <= price.max_cost(into, out, images)


# ── Prices ───────────────────────────────────────────────────────────────────────────────────────

MODELS = ["gpt-5.5", "gpt-5.5-mini", "gpt-5.5-2026-04-01", "gpt-6", "o"]
PATTERNS = ["*", "gpt-*", "gpt-5.5*", "gpt-5.5-20??-*", "gpt-5.5", "gpt-[67]", "o"]
rows_of_prices = st.lists(
    st.builds(
        Price,
        model=st.sampled_from(PATTERNS),
        tier=st.sampled_from(["default", "default", "flex", "priority"]),
        above_input_tokens=st.sampled_from([0, 0, 1000, 5000]),
        effective_at=st.integers(0, 6),
        input=st.integers(0, 9),
    ),
    max_size=12,
).map(lambda rows: [_numbered(row, number + 1) for number, row in enumerate(rows)])


def _numbered(price: Price, number: int) -> Price:
    values = {name: getattr(price, name) for name in price.__struct_fields__}
    return Price(**{**values, "id": number})


def price_by_hand(
    rows: list[Price], model: str, at: int, tier: str, input_tokens: int
) -> Price | None:
    """By elimination, one rule after the other."""
    in_force = [
        row
        for row in rows
        if row.effective_at <= at
        and not any(
            (other.model, other.tier, other.above_input_tokens)
            == (row.model, row.tier, row.above_input_tokens)
            and row.effective_at <= other.effective_at <= at
            and (other.effective_at, other.id) > (row.effective_at, row.id)
            for other in rows
        )
    ]
    patterns = {
        row.model
        for row in in_force
        if fnmatch.fnmatchcase(model, row.model)
        and row.tier == "default"
        and row.above_input_tokens == 0
    }
    if not patterns:
        return None
    lengths = {"*": 0, "gpt-*": 4, "gpt-5.5*": 7, "gpt-5.5-20??-*": 11, "gpt-[67]": 4.5}
    best = max(patterns, key=lambda pattern: lengths.get(pattern, 100.0))
    for wanted in (tier, "default"):
        bands = [
            row
            for row in in_force
            if row.model == best
            and row.tier == wanted
            and (row.above_input_tokens == 0 or input_tokens > row.above_input_tokens)
        ]
        if bands:
            return max(bands, key=lambda row: row.above_input_tokens)
    return None


@settings(max_examples=400)
@given(
    rows_of_prices,
    st.sampled_from(MODELS),
    st.integers(0, 7),
    st.sampled_from(["default", "flex", "priority", "scale", "auto"]),
    st.sampled_from([0, 1, 1000, 1001, 5000, 5001]),
)
def test_the_price_of_a_request_is_what_a_model_by_elimination_says(
    rows: list[Price], model: str, at: int, tier: str, input_tokens: int
) -> None:
    tariff = PriceTable(rows).model_prices(model, at)
    expected = price_by_hand(rows, model, at, tier, input_tokens)
    assert (tariff.price(tier, input_tokens) if tariff else None) == expected


def test_exactly_the_threshold_is_the_short_rate() -> None:
    table = PriceTable([Price("m", input=1), Price("m", above_input_tokens=272_000, input=2, id=1)])
    tariff = table.model_prices("m", 0)
    assert tariff is not None
    assert tariff.price("default", 272_000).input == 1
    assert tariff.price("default", 272_001).input == 2
    assert tariff.price(None, 272_001).input == 2


def test_what_is_held_depends_on_the_tier_asked_for() -> None:
    tiers = {"default": 2, "flex": 1, "priority": 4}
    table = PriceTable(
        Price("m", tier=tier, input=rate * NANOS, id=rate) for tier, rate in tiers.items()
    )
    tariff = table.model_prices("m", 0)
    assert tariff is not None
    million = 1_000_000
    most = {
        tier: tariff.max_cost(million, 0, tier, images=False) // NANOS
        for tier in (None, "auto", "default", "flex", "priority", "fast", "scale", "Priority")
    }
    assert most == {
        None: 4,
        "auto": 4,
        "default": 2,
        "flex": 2,
        "priority": 4,
        "fast": 4,
        "scale": 2,
        "Priority": 4,  # nobody knows what the upstream makes of it
    }


# ── Books ────────────────────────────────────────────────────────────────────────────────────────

Result = TypeVar("Result")


class Clock:
    """The machine's clocks, in place of the module `time` where the ledger reads them. To set `now`
    forward lets time pass; to set it back is what an operator may do."""

    def __init__(self) -> None:
        self._now, self._elapsed = START, 0

    @property
    def now(self) -> int:
        return self._now

    @now.setter
    def now(self, now: int) -> None:
        self._elapsed += max(0, now - self._now)
        self._now = now

    def time_ns(self) -> int:
        return self._now * 1_000_000

    def clock_gettime_ns(self, _: int) -> int:
        return self._elapsed * 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(clock_module, "time", clock)
    return clock


class Bench:
    """Books on a file, opened and closed like a gateway's, driven from synchronous code."""

    def __init__(self, folder: Path, table: BillingSettings) -> None:
        self.path = folder / "redbtc.db"
        self.table = table
        self._runner = asyncio.Runner()
        self.start()

    def run(self, work: Awaitable[Result]) -> Result:
        async def wait() -> Result:
            return await work

        return self._runner.run(wait())

    def start(self) -> None:
        async def open_all() -> None:
            self._stack = contextlib.AsyncExitStack()
            self.store = await self._stack.enter_async_context(Store.open(self.path, "normal"))
            self.billing = await Billing.open(self.store, self.table)
            self.accounts = Accounts(self.store)

        self.run(open_all())

    def stop(self, crash: bool = False) -> None:
        """With `crash` what waits to be written is lost."""
        if crash:
            self.store.commits.state.health = "failing"
        self.run(self._stack.aclose())

    def close(self) -> None:
        self.stop()
        self._runner.close()

    def key(self, account: str, **limits: int) -> Key:
        """A new key of an account; the account is made where there is none."""
        try:
            self.run(self.accounts.get(account))
        except UserError:
            self.run(self.accounts.add(account, None, {}, "test"))
        account_id = self.account(account).id
        added = self.run(self.accounts.add_key(account_id, "", None, limits, "test"))
        return self.key_now(added.key)

    def key_now(self, secret: str) -> Key:
        key = keys_module.key_in_force(self.store, secret)
        assert key is not None
        return key

    def account(self, name: str) -> Account:
        return self.run(self.accounts.get(name))

    def price(self, *prices: Price, without_notice: str | None = None) -> PricesAdded:
        work = add_prices(self.billing, prices, without_notice=without_notice, by="test")
        return self.run(work)

    def pay(self, account: str, amount: int, reference: str | None = None) -> Payment:
        reason = "a refund" if amount < 0 else None
        work = self.billing.pay(
            self.account(account), amount, reference=reference, reason=reason, by="test"
        )
        return self.run(work)

    def statement(self, account: str, month: str) -> Statement:
        return self.run(statements.statement(self.billing, self.account(account), month))

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """As JSON shows them."""

        async def read() -> list[RequestShown]:
            async with self.store.snapshot() as snapshot:
                return await reports_module.requests_in(snapshot, Range(**wanted), "USD")

        return [msgspec.to_builtins(row) for row in self.run(read())]

    def usage_by(self, names: list[str], **wanted: Any) -> list[dict[str, Any]]:
        """As JSON shows them."""

        async def read() -> list[Group]:
            async with self.store.snapshot() as snapshot:
                return await reports_module.usage_by(snapshot, Range(**wanted), names, "USD")

        return [msgspec.to_builtins(group) for group in self.run(read())]

    def begin(self, key: Key, model: str, most: int, at: int) -> tuple[RequestRow, Hold]:
        """Take price and hold and begin a row, as the gateway does. Raises SpendingLimitReached."""
        spending = self.run(self.billing.spending_of(key))
        hold = self.billing.hold(self.billing.quote(key, model, spending), most)
        row = RequestRow(
            request_id=f"req_{random.getrandbits(128):032x}",
            account_id=key.account_id,
            key_id=key.id,
            endpoint="/v1/responses",
            requested_model=model,
            upstream="test",
            started_at=at,
        )
        self.run(requests_module.begin_row(self.store, row))
        return row, hold

    def settle(
        self,
        row: RequestRow,
        hold: Hold,
        usage: Usage | None,
        tier: str,
        source: UsageSource = "upstream",
    ) -> None:
        row.outcome, row.service_tier = "completed", tier
        if usage is not None:
            row.usage, row.usage_source, row.cost = usage, source, 0
            if hold.model_prices:
                price = hold.model_prices.price(tier, usage.input_tokens or 0)
                row.price_id, row.cost = price.id, price.cost(usage, False)
        row.month = self.billing.replace_hold(hold, row.cost or 0)
        self.run(requests_module.settle_row(self.store, row))


@pytest.fixture
def bench(tmp_path: Path, clock: Clock) -> Iterator[Bench]:
    bench = Bench(tmp_path, BillingSettings())
    yield bench
    bench.close()


def use(bench: Bench, key: Key, clock: Clock, model: str = "m", used: int = 1000) -> RequestRow:
    row, hold = bench.begin(key, model, 0, clock.now)
    bench.settle(row, hold, Usage(input_tokens=used, output_tokens=0), "default")
    return row


def test_a_rise_for_a_model_in_use_needs_notice(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    bench.price(Price("m", input=6 * NANOS))  # nobody uses it yet
    use(bench, key, clock)
    clock.now += 1000
    for model, at in (("m", 0), ("m", clock.now + 29 * DAY), ("*", 0), ("[m]", 0)):
        if model == "m":
            with pytest.raises(UserError, match=r"in use and would cost more .*input from 6 to 7"):
                bench.price(Price(model, input=7 * NANOS, effective_at=at))
        else:  # the price of the name itself has the say
            bench.price(Price(model, input=7 * NANOS, effective_at=at))
    bench.price(Price("m", input=7 * NANOS, effective_at=clock.now + 30 * DAY))
    bench.price(Price("m", input=4 * NANOS))  # a fall may be at once
    with pytest.raises(UserError, match="input from 4 to 5"):
        bench.price(Price("m", input=5 * NANOS, effective_at=clock.now + DAY))
    with pytest.raises(UserError, match=r"input from 4 to 8 \(priority\)"):
        bench.price(Price("m", tier="priority", input=8 * NANOS))
    with pytest.raises(UserError, match=r"input from 4 to 9 \(above 1000 input tokens\)"):
        bench.price(Price("m", above_input_tokens=1000, input=9 * NANOS))
    added = bench.price(Price("m", input=8 * NANOS), without_notice="our own cost")
    (row,) = added.prices
    assert (row.reason, row.added_by, row.status) == ("our own cost", "test", "current")
    texts = [notice.text for notice in bench.run(bench.billing.notices.all())]
    assert any("m: input from 6 to 7" in text for text in texts)
    assert any("m: input from 4 to 8" in text for text in texts)


def test_a_rise_is_told_once_whatever_else_is_to_come(bench: Bench, clock: Clock) -> None:
    bench.price(Price("m", input=5 * NANOS), Price("n", input=5 * NANOS))
    coming = [Price("n", input=days, effective_at=clock.now + days * DAY) for days in (40, 50)]
    bench.price(*coming, Price("[m]*", input=3, effective_at=clock.now + 45 * DAY))
    bench.price(Price("m", input=6 * NANOS, effective_at=clock.now + 35 * DAY))
    bench.price(Price("m", input=7 * NANOS, effective_at=clock.now + 47 * DAY))
    told = [(each.effective_at, each.text) for each in bench.run(bench.billing.notices.all())]
    assert [text.partition(". ")[2] for _, text in told] == [
        "m: input from 5 to 6.",
        "m: input from 6 to 7.",
    ]


def test_a_price_that_is_to_go_back_goes_back(bench: Bench, clock: Clock) -> None:
    bench.price(Price("m", input=1))
    days = {40: 2, 50: 1, 60: 1, 30: 1}  # the last two change nothing
    added = bench.price(
        *(Price("m", input=n, effective_at=clock.now + day * DAY) for day, n in days.items())
    )
    assert (added.added, added.unchanged) == (2, 2)
    for day, rate in ((39, 1), (45, 2), (55, 1), (65, 1)):
        tariff = bench.billing.prices.model_prices("m", clock.now + day * DAY)
        assert tariff is not None
        assert tariff.price("default", 0).input == rate


def test_each_of_many_rises_is_told(bench: Bench, clock: Clock) -> None:
    names = [f"model-{number:04}" for number in range(300)]
    bench.price(*(Price(name, input=NANOS) for name in names))
    at = clock.now + 40 * DAY
    bench.price(*(Price(name, input=2 * NANOS, effective_at=at) for name in names))
    told = [each.text for each in bench.run(bench.billing.notices.all())]
    assert len(told) > 1
    assert all(len(text) <= records.NOTICE_TEXT for text in told)
    found = re.findall(r"(model-\d+): input from 1 to 2\.", " ".join(told))
    assert sorted(found) == names


def test_a_class_that_begins_with_its_end_is_a_pattern(bench: Bench, clock: Clock) -> None:
    bench.price(Price("[]a]", input=1))
    assert bench.billing.prices.model_prices("a", clock.now) is not None


def test_a_model_not_used_for_long_is_not_in_use(bench: Bench, clock: Clock) -> None:
    """Its price may rise at once and without a reason. The rise is published, and requests from
    then on cost the new price."""
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    use(bench, key, clock, used=1_000_000)
    clock.now += 89 * DAY
    with pytest.raises(UserError, match=r"m is in use and would cost more .*input from 5 to 6"):
        bench.price(Price("m", input=6 * NANOS))
    clock.now += 2 * DAY
    added = bench.price(Price("m", input=6 * NANOS))
    (price,) = msgspec.to_builtins(added.prices)
    assert (price["input"], price["status"], price["reason"]) == ("6", "current", None)
    (notice,) = bench.run(bench.billing.notices.all())
    assert notice.text.endswith("m: input from 5 to 6.")
    use(bench, key, clock, used=1_000_000)
    assert [row["cost"] for row in bench.rows()] == ["5", "6"]


def test_a_more_specific_pattern_can_hide_no_rise(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    bench.price(Price("gpt-*", input=5 * NANOS))
    use(bench, key, clock, "gpt-5.5")
    for pattern in ("gpt-5*", "gpt-5.5", "gpt-?.?"):
        with pytest.raises(UserError, match=r"gpt-5\.5 is in use"):
            bench.price(Price(pattern, input=6 * NANOS))
    # Lower now, but it would be in the way of a fall that has been announced.
    bench.price(Price("gpt-*", input=1 * NANOS, effective_at=clock.now + DAY))
    with pytest.raises(UserError, match="input from 1 to 4"):
        bench.price(Price("gpt-5.5", input=4 * NANOS))


def test_free_models_in_use_rise_when_they_get_a_price(tmp_path: Path, clock: Clock) -> None:
    with contextlib.closing(Bench(tmp_path, BillingSettings(unpriced_models="free"))) as bench:
        use(bench, bench.key("a"), clock)
        with pytest.raises(UserError, match="input from 0 to 1"):
            bench.price(Price("m", input=1 * NANOS))
        bench.billing.apply(
            BillingSettings()
        )  # refused until now: whoever wants it has yet to agree
        bench.price(Price("m", input=1 * NANOS))


def test_a_price_that_was_used_can_not_be_changed_afterwards(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS, effective_at=clock.now - 90 * DAY))
    bench.price(Price("m", input=4 * NANOS, effective_at=clock.now - 30 * DAY))
    use(bench, key, clock)
    clock.now += 1000
    with pytest.raises(UserError, match="its price can't change from then on"):
        bench.price(Price("m", input=1 * NANOS, effective_at=clock.now - DAY))
    with (
        contextlib.closing(sqlite3.connect(bench.path)) as database,
        pytest.raises(sqlite3.IntegrityError, match="only superseded"),
    ):
        database.execute("UPDATE prices SET input = 1")


def test_what_is_in_flight_is_in_use(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    row, hold = bench.begin(key, "m", 0, clock.now)
    with pytest.raises(UserError, match="in use"):
        bench.price(Price("m", input=6 * NANOS))
    bench.settle(row, hold, None, "default")


def test_nothing_that_money_depends_on_can_be_deleted(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    bench.pay("a", NANOS)
    use(bench, key, clock)
    with contextlib.closing(sqlite3.connect(bench.path)) as database:
        for sql in (
            "DELETE FROM prices",
            "DELETE FROM payments",
            "UPDATE payments SET units = 2",
            "UPDATE requests SET cost = 0",
            "UPDATE requests SET month = '2020-01'",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="can't be"):
                database.execute(sql)


def test_a_payment_counts_once_for_its_reference(bench: Bench) -> None:
    bench.key("a")
    bench.key("b")

    async def pay_at_once() -> set[str]:
        account = await bench.accounts.get("a")
        payments = await asyncio.gather(
            *(
                bench.billing.pay(account, 5 * NANOS, reference="r", reason=None, by="test")
                for _ in range(50)
            )
        )
        return {payment.id for payment in payments}

    assert len(bench.run(pay_at_once())) == 1
    assert bench.run(bench.billing.spending(bench.account("a").id)).paid == 5 * NANOS
    with pytest.raises(Conflict, match="already exists, with the amount 5"):
        bench.pay("a", 6 * NANOS, "r")
    bench.pay("b", 6 * NANOS, "r")
    with pytest.raises(UserError, match="needs a reason"):
        bench.run(bench.billing.pay(bench.account("a"), -1, reference=None, reason=None, by="test"))
    with pytest.raises(UserError, match="must not be 0"):
        bench.pay("a", 0)


def test_what_was_made_in_one_instant_is_listed_as_it_was_made(bench: Bench) -> None:
    """As all is while the machine's clock is set back: the ledger's own stands still."""
    keys = [bench.key("a").id for _ in range(10)]
    payments = [bench.pay("a", NANOS).id for _ in keys]
    for number in range(len(keys)):
        bench.run(bench.billing.notices.add("incident", f"{number}", START, None, "test"))
    account = bench.account("a")
    assert [key.id for key in bench.run(bench.accounts.keys(account.id))] == keys
    for whose in (account, None):
        assert [each.id for each in bench.run(bench.billing.payments(whose))] == payments
    for told in (bench.billing.notices.all(), bench.billing.notices.current(account.id)):
        assert [each.text for each in bench.run(told)] == [str(n) for n in range(len(keys))]


def test_amounts_beyond_what_a_float_or_a_column_holds(bench: Bench, clock: Clock) -> None:
    key = bench.key("a")
    large = (2**53 + 1) * NANOS + 1
    for _ in range(3):
        bench.pay("a", large)
    bench.pay("a", -NANOS // 2)
    bench.price(Price("m", input=prices_module.MAX_RATE))
    costs = [use(bench, key, clock, used=99_999_999).cost or 0 for _ in range(30)]
    assert sum(costs) > 2**63
    balance = 3 * large - NANOS // 2 - sum(costs)
    statement = bench.statement("a", "2026-11")
    assert parse_amount(statement.closing_balance) == balance
    assert parse_amount(statement.totals.cost) == sum(costs)
    assert bench.run(consistency.check_database(bench.store)) == []
    bench.stop()
    bench.start()
    purse = bench.run(bench.billing.spending(key.account_id))
    assert (purse.paid - purse.cost, purse.spent) == (balance, sum(costs))


def test_another_currency_is_another_ledger(bench: Bench) -> None:
    bench.price(Price("m", input=1))
    with pytest.raises(UserError, match=r"billing\.currency is EUR, but the ledger is in USD"):
        bench.run(Billing.open(bench.store, BillingSettings(currency="EUR")))


# ── Usage ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """300 requests of three accounts over a week, some in flight, with usage or without."""
    clock, chance = Clock(), random.Random(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as exits:
        patch.setattr(clock_module, "time", clock)
        bench = exits.enter_context(
            contextlib.closing(Bench(tmp_path_factory.mktemp("crowded"), BillingSettings()))
        )
        keys = [bench.key(name) for name in ("a", "a", "b", "c")]
        bench.price(Price("*", input=3 * NANOS, output=7 * NANOS + 1), Price("o", input=10**12))
        for number in range(300):
            clock.now = START + number * 7 * DAY // 300
            row, hold = bench.begin(
                chance.choice(keys), chance.choice(MODELS), 0, clock.now - chance.randrange(HOUR)
            )
            if chance.random() < 0.9:
                row.model = chance.choice([None, row.requested_model, "renamed"])
                counts = {name: chance.choice([None, chance.randrange(999)]) for name in KINDS}
                usage = chance.choice([Usage(**counts), Usage(**counts), None])
                bench.settle(row, hold, usage, "default", chance.choice(["upstream", "estimated"]))
        yield bench


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.slow
@given(
    since=st.integers(-2 * DAY, 9 * DAY),
    until=st.integers(-2 * DAY, 9 * DAY),
    aligned=st.booleans(),
    account=st.sampled_from([None, "a", "b"]),
    model=st.sampled_from([None, "gpt-*", "renamed", "o"]),
    of_key=st.booleans(),
    names=st.lists(st.sampled_from(list(reports_module.GROUPS)), unique=True),
)
def test_sums_are_those_of_the_rows(
    crowded: Bench,
    since: int,
    until: int,
    aligned: bool,
    account: str | None,
    model: str | None,
    of_key: bool,
    names: list[str],
) -> None:
    if aligned:
        since, until = since // DAY * DAY, until // DAY * DAY
    rows = crowded.rows()
    key = rows[0]["key_id"] if of_key else None
    wanted = {
        "account": crowded.account(account).id if account else None,
        "key": key,
        "model": model,
        "since": START + since,
        "until": START + until,
    }
    found = crowded.usage_by(names, **wanted)
    labels = {"day": "day", "model": "model", "key": "key_id", "account": "account"}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {} if names else {(): []}
    for row in crowded.rows(**wanted):
        row["model"] = row["model"] or row["requested_model"]
        row["day"] = row["started_at"][:10]
        groups.setdefault(tuple(row[labels[name]] for name in names), []).append(row)
    assert len(found) == len(groups)
    for group in found:
        rows = groups[tuple(group[labels[name]] for name in names)]
        settled = [row for row in rows if row["outcome"] != "pending"]
        assert group["requests"] == len(rows)
        assert group["estimated"] == sum(row["usage_source"] == "estimated" for row in settled)
        assert group["unreported"] == sum(row["usage_source"] == "none" for row in settled)
        assert Fraction(group["cost"]) == sum(Fraction(row["cost"] or 0) for row in rows)
        for name in KINDS:
            counts = [row[name] for row in rows if row[name] is not None]
            assert group[name] == (sum(counts) if counts else None)
    for row in crowded.rows(**wanted):
        assert account is None or row["account"] == account


def test_the_check_finds_usage_that_is_not_the_sum_of_its_requests(
    bench: Bench, clock: Clock
) -> None:
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    use(bench, key, clock)
    assert bench.run(consistency.check_database(bench.store)) == []
    bench.run(bench.store.transact(("UPDATE usage_by_day SET cost_nanos = cost_nanos + 1", ())))
    found = [line.partition(":")[0] for line in bench.run(consistency.check_database(bench.store))]
    assert found == [
        "usage does not equal the sum of its requests",
        "usage by month does not equal the sum of its days",
        "traffic does not equal the usage of its day",
    ]


def test_snapshots_are_few_at_a_time(bench: Bench) -> None:
    """Each has a thread."""
    now, most = 0, 0

    async def read() -> None:
        nonlocal now, most
        async with bench.store.snapshot() as snapshot:
            now += 1
            most = max(most, now)
            assert await snapshot.one("SELECT 1")
            await asyncio.sleep(0.001)
            now -= 1

    async def read_all() -> None:
        await asyncio.gather(*(read() for _ in range(100)))

    bench.run(read_all())
    assert most == MAX_SNAPSHOTS


def test_a_ledger_from_before_money_is_brought_along(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "redbtc.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(migrations(schema())[1])
        database.executescript(
            f"""
            PRAGMA journal_mode = WAL;
            PRAGMA application_id = {APPLICATION_ID};
            PRAGMA user_version = 1;
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'old', 1);
            INSERT INTO keys (id, hash, account_id, created_at)
                VALUES ('key_1', zeroblob(32), 'acct_1', 1);
            INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model,
                                  upstream, started_at, outcome, usage_source, input_tokens)
            VALUES ('req_1', 'acct_1', 'key_1', '/v1/responses', 'm', 'u', {START}, 'completed',
                    'upstream', 5),
                   ('req_2', 'acct_1', 'key_1', '/v1/responses', 'm', 'u', {START}, 'pending',
                    'none', NULL);"""
        )
    with contextlib.closing(Bench(tmp_path, BillingSettings())) as bench:
        statement = bench.statement("old", "2026-11")
        assert statement.totals.requests == 2  # one of them interrupted
        assert msgspec.to_builtins(statement.totals)["input_tokens"] == 5
        assert statement.closing_balance == "0"
        assert [row["cost"] for row in bench.rows()] == [None, None]
        assert bench.run(consistency.check_database(bench.store)) == []


@pytest.mark.parametrize("version", range(1, newest_version()))
def test_a_ledger_of_each_earlier_version_is_brought_along(
    tmp_path: Path, clock: Clock, version: int
) -> None:
    sections = migrations(schema())
    with contextlib.closing(sqlite3.connect(tmp_path / "redbtc.db")) as database:
        for number in range(1, version + 1):
            database.executescript(sections[number])
        columns = {row[1] for row in database.execute("PRAGMA table_info(usage_by_day)")}
        if columns >= {*KINDS}:  # its triggers were those of today
            database.executescript(written_out(schema().partition(TRIGGERS)[2]))
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
        if "acting" in tables:
            database.execute("INSERT INTO acting VALUES (1, 'test', 0)")
        database.executescript(f"""
            PRAGMA journal_mode = WAL;
            PRAGMA application_id = {APPLICATION_ID};
            PRAGMA user_version = {version};
            INSERT INTO accounts (id, name, created_at) VALUES ('acct_1', 'old', 1);
            INSERT INTO keys (id, hash, account_id, created_at)
                VALUES ('key_1', zeroblob(32), 'acct_1', 1);
            INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model,
                                  upstream, started_at, outcome, usage_source)
            VALUES ('req_1', 'acct_1', 'key_1', '/v1/responses', 'm', 'u', {START}, 'pending',
                    'none');""")
        if "unsettled" in tables:
            saved = '{"upstream": "u", "usage_source": "upstream", "input_tokens": 5}'
            database.execute("INSERT INTO unsettled VALUES ('req_1', ?, 1, '', 0)", (saved,))
        database.commit()
    with contextlib.closing(Bench(tmp_path, BillingSettings())) as bench:
        (row,) = bench.rows()
        assert (row["outcome"], row["upstream"]) == ("interrupted", "u")
        assert row["input_tokens"] == (5 if "unsettled" in tables else None)
        met = ["attempts", "upstream_status", "upstream_error_code", "upstream_request_id"]
        assert [row[name] for name in met] == [None] * 4
        assert bench.run(consistency.check_database(bench.store)) == []


@pytest.mark.parametrize("whose", ["account", "key"])
def test_a_budget_starts_anew_with_the_month(bench: Bench, clock: Clock, whose: str) -> None:
    budget = {"monthly_budget": 5_000_000}
    bench.run(bench.accounts.add("a", None, budget if whose == "account" else {}, "test"))
    key = bench.key("a", **(budget if whose == "key" else {}))
    bench.price(Price("m", input=5 * NANOS))
    clock.now = month_start("2026-12") - 1
    row, hold = bench.begin(key, "m", 5_000_000, clock.now)
    with pytest.raises(SpendingLimitReached, match=rf"the {whose}'s monthly budget \(0 "):
        bench.begin(key, "m", 1, clock.now)
    bench.settle(row, hold, Usage(input_tokens=1000), "default")
    with pytest.raises(SpendingLimitReached):
        bench.begin(key, "m", 1, clock.now)
    clock.now += 1
    row, hold = bench.begin(key, "m", 5_000_000, clock.now)
    bench.settle(row, hold, None, "default")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_set_back_changes_no_price_and_no_month(
    bench: Bench, clock: Clock, restarted: bool
) -> None:
    """Not even over the end of a month and a change of prices."""
    key = bench.key("a", monthly_budget=10 * NANOS)
    end = month_start("2026-12")
    clock.now = end - HOUR
    bench.price(Price("m", input=5 * NANOS), Price("m", input=3 * NANOS, effective_at=end))
    assert use(bench, key, clock).cost == 5_000_000
    clock.now = end
    assert use(bench, key, clock).cost == 3_000_000
    closed = bench.statement("a", "2026-11")
    if restarted:
        bench.stop()
    clock.now -= HOUR
    if restarted:
        bench.start()
    row = use(bench, key, clock)
    assert (row.cost, row.month) == (3_000_000, "2026-12")
    assert bench.pay("a", NANOS).month == "2026-12"
    assert bench.run(bench.billing.spending(key.account_id, key.id)).spent == 6_000_000
    assert bench.statement("a", "2026-11") == closed
    assert closed.closed


def test_a_closed_month_has_what_was_settled_in_its_last_instant(
    bench: Bench, clock: Clock
) -> None:
    """The statement is asked for while all that is still waiting to be written."""
    key = bench.key("a")
    bench.price(Price("m", input=5 * NANOS))
    clock.now = month_start("2026-12") - 1
    flights = [bench.begin(key, "m", 10, clock.now) for _ in range(200)]

    async def ask() -> tuple[Statement, Statement]:
        account = await bench.accounts.get("a")
        written = []
        for row, hold in flights:
            row.outcome, row.usage_source, row.cost = "completed", "upstream", 5000
            row.usage = Usage(input_tokens=1000)
            row.month = bench.billing.replace_hold(hold, row.cost)
            written.append(asyncio.ensure_future(requests_module.settle_row(bench.store, row)))
        await asyncio.sleep(0)
        clock.now += 1
        first = await statements.statement(bench.billing, account, "2026-11")
        await asyncio.gather(*written)
        return first, await statements.statement(bench.billing, account, "2026-11")

    first, second = bench.run(ask())
    assert first.closed
    assert first.totals.requests == 200
    assert first.totals.cost == "0.001"
    assert first == second


# ── All of it together ───────────────────────────────────────────────────────────────────────────


@dataclass
class Flight:
    """A request in flight, as the model remembers it."""

    row: RequestRow
    hold: Hold
    key: int
    most: int
    price_of: Callable[[str, int], Price | None]


@dataclass
class Expected:
    """What ought to be in the billing, in lists."""

    payments: list[tuple[str, int]] = field(default_factory=list)  # month, amount
    costs: list[tuple[str, int, int]] = field(default_factory=list)  # month, key, cost
    rows: list[Price] = field(default_factory=list)
    references: dict[str, int] = field(default_factory=dict)
    requests: int = 0

    def balance(self) -> int:
        return sum(a for _, a in self.payments) - sum(cost for _, _, cost in self.costs)

    def spent(self, month: str, key: int | None = None) -> int:
        return sum(c for m, k, c in self.costs if m == month and key in (None, k))


BUDGET, KEY_BUDGET = 40, 15


class Money(RuleBasedStateMachine):
    """One prepaid account with a monthly budget and two keys, one of which has a budget, too."""

    @initialize()
    def open(self) -> None:
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(clock_module, "time", self.clock)
        self.folder = tempfile.TemporaryDirectory()
        self.bench = Bench(Path(self.folder.name), BillingSettings(default_credit_limit="0"))
        accounts = self.bench.accounts
        account = self.bench.run(accounts.add("a", None, {"monthly_budget": BUDGET}, "test"))
        self.secrets = [
            self.bench.run(accounts.add_key(account.id, "", None, limits, "test")).key
            for limits in ({}, {"monthly_budget": KEY_BUDGET})
        ]
        self.expected = Expected()
        self.flights: list[Flight] = []
        self.closed: dict[str, Statement] = {}
        self.last_use = 0

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            for flight in self.flights:
                flight.hold.release()
            self.bench.close()
            self.folder.cleanup()
            self.patch.undo()

    def time(self) -> int:
        """The ledger's own time: it goes on by itself after the clock was set back."""
        return self.bench.store.time()

    def month(self) -> str:
        return self.month_at(self.time())

    @staticmethod
    def month_at(time: int) -> str:
        return f"{datetime.fromtimestamp(time / 1000, UTC):%Y-%m}"

    # Time

    @rule(distance=st.sampled_from([1, HOUR, 10 * DAY, -HOUR, -HOUR]))
    def pass_time(self, distance: int) -> None:
        self.time()
        self.clock.now += distance

    @rule(before=st.sampled_from([0, 1, HOUR // 2]))
    def month_ends(self, before: int) -> None:
        """To the very instant, or just before it."""
        end = month_start(months_after(self.month(), 1))
        self.clock.now = max(self.clock.now, end - before)

    # Payments

    @rule(amount=st.integers(1, 30), reference=st.none() | st.sampled_from(["r1", "r2", "r3"]))
    def top_up(self, amount: int, reference: str | None) -> None:
        known = self.expected.references
        if reference in known:
            if known[reference] == amount:
                self.bench.pay("a", amount, reference)
            else:
                with pytest.raises(Conflict):
                    self.bench.pay("a", amount, reference)
            return
        month = self.month()
        assert self.bench.pay("a", amount, reference).month == month
        self.expected.payments.append((month, amount))
        if reference:
            known[reference] = amount

    @rule(amount=st.integers(1, 10))
    def refund(self, amount: int) -> None:
        month = self.month()
        self.bench.pay("a", -amount)
        self.expected.payments.append((month, -amount))

    # Prices: nanos a token, so that costs are small whole numbers

    @rule(
        rate=st.integers(0, 4),
        tier=st.sampled_from(["default", "default", "priority"]),
        above=st.sampled_from([0, 0, 3]),
        after=st.sampled_from([0, 0, HOUR, 31 * DAY]),
    )
    def add_price(self, rate: int, tier: str, above: int, after: int) -> None:
        now = self.time()
        new = Price(
            "m",
            tier=tier,
            above_input_tokens=above,
            effective_at=now + after,
            input=rate * 1_000_000,
            created_at=now,
            id=len(self.expected.rows) + 1,
        )
        rows = [*self.expected.rows, new]
        in_use = self.last_use or self.flights
        early = [at for at in self.changes(rows, new.effective_at) if at < now + 30 * DAY - 60_000]
        refused = in_use and any(self.rises_at(rows, at) for at in early)
        if refused and (not self.flights and now - self.last_use > 85 * DAY):
            return  # in use or not is a matter of days here
        if refused:
            with pytest.raises(UserError, match="in use"):
                self.bench.price(new)
            return
        slot = [
            row
            for row in self.expected.rows
            if (row.tier, row.above_input_tokens) == (tier, above)
            and row.effective_at <= new.effective_at
        ]
        superseded = max(slot, key=lambda row: (row.effective_at, row.id), default=None)
        same = superseded is not None and superseded.input == new.input
        assert self.bench.price(new).added == (0 if same else 1)
        if not same:
            self.expected.rows.append(new)

    @staticmethod
    def changes(rows: list[Price], since: int) -> set[int]:
        return {row.effective_at for row in rows if row.effective_at >= since}

    @staticmethod
    def price_at(rows: list[Price], at: int, tier: str, tokens: int) -> Price | None:
        return price_by_hand(rows, "m", at, tier, tokens)

    def rises_at(self, rows: list[Price], at: int) -> bool:
        pairs = [
            (self.price_at(self.expected.rows, at, *use), self.price_at(rows, at, *use))
            for use in ((tier, tokens) for tier in ("default", "priority") for tokens in (1, 4))
        ]
        return any(old and new and (new.input or 0) > (old.input or 0) for old, new in pairs)

    # Requests

    @rule(key=st.integers(0, 1), most=st.integers(0, 12))
    def ask(self, key: int, most: int) -> None:
        at, month = self.time(), self.month()
        if self.price_at(self.expected.rows, at, "default", 1) is None:
            most = 0  # it is free
        of_key = self.bench.key_now(self.secrets[key])
        held = sum(flight.most for flight in self.flights)
        held_by_key = sum(flight.most for flight in self.flights if flight.key == key)
        left = [
            self.expected.balance() - held,
            BUDGET - self.expected.spent(month) - held,
        ]
        if key == 1:
            left.append(KEY_BUDGET - self.expected.spent(month, 1) - held_by_key)
        if most and most > min(left):
            with pytest.raises(SpendingLimitReached):
                self.bench.begin(of_key, "m", most, self.clock.now)
            return
        rows = list(self.expected.rows)
        flight = Flight(
            *self.bench.begin(of_key, "m", most, self.clock.now),
            key,
            most,
            lambda tier, tokens: self.price_at(rows, at, tier, tokens),
        )
        self.flights.append(flight)

    @precondition(lambda self: self.flights)
    @rule(
        which=st.integers(0, 99),
        tier=st.sampled_from(["default", "priority", "flex"]),
        used=st.none() | st.integers(0, 6),
    )
    def answer(self, which: int, tier: str, used: int | None) -> None:
        """It ends, perhaps long after its price has changed, having used more than was thought."""
        flight = self.flights.pop(which % len(self.flights))
        month = self.month()
        usage = None if used is None else Usage(input_tokens=used)
        self.bench.settle(flight.row, flight.hold, usage, tier)
        price = None if used is None else flight.price_of(tier, used)
        cost = (used or 0) * (price.input or 0) // 1_000_000 if price else 0
        assert flight.row.cost == (None if used is None else cost)
        assert flight.row.month == month
        self.expected.costs.append((month, flight.key, cost))
        self.expected.requests += 1
        self.last_use = max(self.last_use, flight.row.started_at)

    @precondition(lambda self: self.flights)
    @rule(which=st.integers(0, 99))
    def give_up(self, which: int) -> None:
        """The client left before it was sent: it is taken back."""
        flight = self.flights.pop(which % len(self.flights))
        flight.hold.release()
        self.bench.run(requests_module.forget_row(self.bench.store, flight.row))

    # The process

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        """What was in flight is interrupted, its hold gone. The clock may be set back meanwhile,
        but not beyond what the ledger remembers."""
        month = self.month()
        self.last_use = max(self.last_use, *(flight.row.started_at for flight in self.flights), 0)
        self.bench.run(self.bench.store.settle_time())
        self.bench.stop(crash)
        self.expected.requests += len(self.flights)
        self.expected.costs += [(month, flight.key, 0) for flight in self.flights]
        self.flights = []
        self.bench.start()

    @rule(distance=st.sampled_from([0, HOUR, 10 * DAY, 40 * DAY]))
    def set_time(self, distance: int) -> None:
        """The ledger turns out to be ahead: what is dated later than the clock is moved."""
        at = self.clock.now = max(START, self.time() - distance)
        self.bench.run(set_time(self.bench.billing, at, at, "test"))
        month, expected = self.month_at(at), self.expected
        expected.payments = [(min(of, month), amount) for of, amount in expected.payments]
        expected.costs = [(min(of, month), *more) for of, *more in expected.costs]  # type: ignore[misc]
        expected.rows = [
            replace(row, effective_at=min(row.effective_at, at))
            if row.effective_at <= row.created_at
            else row
            for row in expected.rows
        ]
        expected.rows = [replace(row, created_at=min(row.created_at, at)) for row in expected.rows]
        for flight in self.flights:
            flight.row.started_at = min(flight.row.started_at, at)
        self.last_use = min(self.last_use, at)
        self.closed = {of: known for of, known in self.closed.items() if of < month}

    # What must hold

    @rule()
    def close_the_books(self) -> None:
        """Statements of all months add up; those of months that had ended are what they were."""
        month, opening = "2026-11", 0
        expected, now = self.expected, self.month()
        while month <= now:
            statement = self.bench.statement("a", month)
            assert parse_amount(statement.opening_balance) == opening
            paid = [amount for of, amount in expected.payments if of == month]
            assert parse_amount(statement.totals.paid) == sum(paid)
            lines = [parse_amount(line.cost) for line in statement.usage]
            assert sum(lines) == expected.spent(month)
            assert parse_amount(statement.totals.cost) == expected.spent(month)
            assert len(statement.payments) == len(paid)
            opening += sum(paid) - expected.spent(month)
            assert parse_amount(statement.closing_balance) == opening
            assert statement.closed == (month < now)
            assert self.closed.get(month, statement) == statement
            if statement.closed:
                self.closed[month] = statement
            month = months_after(month, 1)
        assert opening == expected.balance()
        rows = self.bench.rows()
        assert sum(parse_amount(row["cost"] or "0") for row in rows) == sum(
            cost for _, _, cost in expected.costs
        )
        assert len(rows) == expected.requests + len(self.flights)
        assert self.bench.run(consistency.check_database(self.bench.store)) == []

    @invariant()
    def the_balance_agrees(self) -> None:
        if not hasattr(self, "bench"):
            return
        key = self.bench.key_now(self.secrets[1])
        month = self.month()
        account, own = (
            self.bench.run(self.bench.billing.spending(key.account_id)),
            self.bench.run(self.bench.billing.spending(key.account_id, key.id)),
        )
        assert account.paid - account.cost == self.expected.balance()
        assert account.spent == self.expected.spent(month)
        assert own.spent == self.expected.spent(month, 1)
        assert account.held == sum(flight.most for flight in self.flights)
        assert own.held == sum(flight.most for flight in self.flights if flight.key == 1)


Money.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMoney = pytest.mark.slow(Money.TestCase)


def test_what_is_committed_is_seen_while_something_else_is_being_read(tmp_path: Path) -> None:
    async def read_write_read() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            accounts = Accounts(store)
            for number in range(700):
                await accounts.add(f"a{number}", None, {}, "test")
            rows = store.rows("SELECT id FROM accounts")
            await anext(rows)
            await accounts.add("b", None, {}, "test")
            assert (await accounts.get("b")).name == "b"
            assert sum([1 async for _ in rows]) == 699

    asyncio.run(read_write_read())
