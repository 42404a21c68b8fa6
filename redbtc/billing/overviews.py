"""Sums over accounts, months and days, for operators' pages."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from msgspec import Struct

from redbtc.billing.billing import Billing
from redbtc.billing.statements import paid_by_month_of
from redbtc.money import decimal
from redbtc.store.accounts import ACCOUNT, Account, account_columns
from redbtc.store.database import Store
from redbtc.store.json_values import Money, cost_of, nanos_of
from redbtc.times import DAY, day_of
from redbtc.usage import Outcome

MONTHS_OF = """
    SELECT month, requests, input_tokens, output_tokens, cost_units, cost_nanos
      FROM usage_by_month WHERE account_id = ? ORDER BY month"""
MONEY_OF_EACH = f"""
    SELECT accounts.*, ifnull(spent.requests, 0) AS requests_this_month,
           ifnull(spent.cost_units, 0) AS month_units, ifnull(spent.cost_nanos, 0) AS month_nanos,
           (SELECT ifnull(sum(cost_units), 0) FROM usage_by_month
             WHERE account_id = accounts.id) AS cost_units,
           (SELECT ifnull(sum(cost_nanos), 0) FROM usage_by_month
             WHERE account_id = accounts.id) AS cost_nanos,
           (SELECT ifnull(sum(units), 0) FROM payments
             WHERE account_id = accounts.id) AS paid_units,
           (SELECT ifnull(sum(nanos), 0) FROM payments
             WHERE account_id = accounts.id) AS paid_nanos
      FROM ({ACCOUNT}) AS accounts
      LEFT JOIN usage_by_month AS spent
        ON spent.account_id = accounts.id AND spent.month = ?2
     WHERE (?3 = '' OR instr(lower(name), lower(?3)) OR instr(lower(email), lower(?3)) OR id = ?3)
       AND name > ?4 ORDER BY name LIMIT ?5"""
HIGHEST_COSTS = """
    SELECT accounts.name AS account, account_id, requests, input_tokens, output_tokens, cost_units,
           cost_nanos
      FROM usage_by_month JOIN accounts ON accounts.id = account_id
     WHERE month = ? ORDER BY cost_units DESC, cost_nanos DESC, requests DESC LIMIT ?"""
SPENT_IN_MONTH = """
    SELECT count(*) AS accounts, ifnull(sum(requests), 0) AS requests,
           ifnull(sum(input_tokens), 0) AS input_tokens,
           ifnull(sum(output_tokens), 0) AS output_tokens,
           ifnull(sum(cost_units), 0) AS cost_units, ifnull(sum(cost_nanos), 0) AS cost_nanos
      FROM usage_by_month WHERE month = ?"""
TRAFFIC = """
    SELECT day, upstream, outcome, requests, cost_units, cost_nanos FROM traffic_by_day
     WHERE day > ? ORDER BY day, upstream, outcome"""
TRAFFIC_BESIDE = "SELECT 1 FROM traffic_by_day WHERE upstream <> ? LIMIT 1"
LATELY = """
    SELECT upstream, outcome, first_byte_ms, duration_ms FROM requests
     WHERE outcome <> 'pending' ORDER BY started_at DESC LIMIT ?"""
MAX_LATELY = 500  # requests


async def has_traffic_beside(store: Store, upstream: str) -> bool:
    """Return whether another upstream has ever been sent a request."""
    return await store.one(TRAFFIC_BESIDE, (upstream,)) is not None


async def list_accounts(
    billing: Billing, search: str = "", after: str = "", limit: int = -1
) -> list[AccountInList]:
    """Return accounts, sorted by name, with their committed money: those with `search` in name or
    address whose names come after `after`. A `limit` of -1 is none."""
    values = (billing.store.time(), billing.month(), search, after, limit)
    rows = billing.store.rows(MONEY_OF_EACH, values)
    return [AccountInList.with_sums(row, billing.currency) async for row in rows]


async def months(billing: Billing, account: Account) -> list[Month]:
    """Return the account's months with usage or payments and the current one, newest first."""
    used = {row["month"]: row async for row in billing.store.rows(MONTHS_OF, (account.id,))}
    paid = await paid_by_month_of(billing.store, account.id)
    now = billing.month()
    return [
        Month.of(month, used.get(month), paid.get(month, 0), now, billing.currency)
        for month in sorted({*used, *paid, now}, reverse=True)
    ]


async def spending_overview(billing: Billing, limit: int) -> SpendingOverview:
    """Return the usage of all accounts in this month, and of the `limit` with the highest costs."""
    month = billing.month()
    total = await billing.store.one(SPENT_IN_MONTH, (month,))
    assert total is not None, "a sum always has one row"
    rows = billing.store.rows(HIGHEST_COSTS, (month, limit))
    return SpendingOverview(
        month=month,
        accounts=total["accounts"],
        requests=total["requests"],
        input_tokens=total["input_tokens"],
        output_tokens=total["output_tokens"],
        cost=cost_of(total),
        most=[MostSpent.of(row) async for row in rows],
        currency=billing.currency,
    )


async def traffic(billing: Billing, days: int) -> list[TrafficOfDay]:
    """Return the requests and costs of all accounts in the last `days` (UTC), by day, upstream and
    outcome."""
    since = billing.store.time() // DAY - days
    return [TrafficOfDay.of(row) async for row in billing.store.rows(TRAFFIC, (since,))]


async def lately(billing: Billing) -> Lately:
    """Return failures by upstream and durations of the newest requests, at most MAX_LATELY."""
    rows = [row async for row in billing.store.rows(LATELY, (MAX_LATELY,))]
    upstreams: dict[str, UpstreamLately] = {}
    for row in rows:
        of = upstreams.setdefault(row["upstream"], UpstreamLately(requests=0, failed=0))
        of.requests += 1
        of.failed += row["outcome"] in ("upstream_error", "upstream_failed")
    return Lately(
        requests=len(rows),
        first_byte_ms=quantiles(row["first_byte_ms"] for row in rows),
        duration_ms=quantiles(row["duration_ms"] for row in rows),
        upstreams=upstreams,
    )


def quantiles(times: Iterable[int | None]) -> Quantiles:
    """Return the median and the 95th percentile of the times that are known."""
    known = sorted(each for each in times if each is not None)
    return Quantiles(median=quantile(known, 50), p95=quantile(known, 95))


def quantile(ordered: Sequence[int], percent: int) -> int | None:
    """Return the smallest number that at least `percent` of the numbers do not exceed, None if
    there are none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None


class AccountInList(Account, kw_only=True):
    """An account with what it has spent."""

    balance: Money
    spent_this_month: Money
    requests_this_month: int
    currency: str

    @classmethod
    def with_sums(cls, row: sqlite3.Row, currency: str) -> AccountInList:
        """Return the account of a row with its sums."""
        paid = nanos_of(row["paid_units"], row["paid_nanos"])
        cost = nanos_of(row["cost_units"], row["cost_nanos"])
        return cls(
            **account_columns(row),
            balance=decimal(paid - cost),
            spent_this_month=decimal(nanos_of(row["month_units"], row["month_nanos"])),
            requests_this_month=row["requests_this_month"],
            currency=currency,
        )


class Month(Struct):
    """Usage and payments of a month."""

    month: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money
    paid: Money
    closed: bool
    currency: str

    @classmethod
    def of(cls, month: str, row: sqlite3.Row | None, paid: int, now: str, currency: str) -> Month:
        """Return the month of a row, or one without usage; `now` is the current month."""
        return cls(
            month=month,
            requests=row["requests"] if row else 0,
            input_tokens=row["input_tokens"] if row else 0,
            output_tokens=row["output_tokens"] if row else 0,
            cost=cost_of(row) if row else "0",
            paid=decimal(paid),
            closed=month < now,
            currency=currency,
        )


class TrafficOfDay(Struct):
    """Requests of a day (UTC) with one upstream and outcome."""

    day: str
    upstream: str
    outcome: Outcome
    requests: int
    cost: Money

    @classmethod
    def of(cls, row: sqlite3.Row) -> TrafficOfDay:
        """Return the traffic of a row."""
        return cls(
            day=day_of(row["day"]),
            upstream=row["upstream"],
            outcome=row["outcome"],
            requests=row["requests"],
            cost=cost_of(row),
        )


class MostSpent(Struct):
    """Usage and cost of an account in a month."""

    account: str
    account_id: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money

    @classmethod
    def of(cls, row: sqlite3.Row) -> MostSpent:
        """Return the usage of the account of a row."""
        return cls(
            account=row["account"],
            account_id=row["account_id"],
            requests=row["requests"],
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            cost=cost_of(row),
        )


class SpendingOverview(Struct):
    """Usage and cost of all accounts in a month, and the accounts with the highest costs."""

    month: str
    accounts: int
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money
    most: list[MostSpent]
    currency: str


class Quantiles(Struct):
    """Median and 95th percentile in milliseconds, null without requests."""

    median: int | None
    p95: int | None


class UpstreamLately(Struct):
    """The number of an upstream's requests, and of those that failed."""

    requests: int
    failed: int


class Lately(Struct):
    """Failures and durations of the newest requests."""

    requests: int
    first_byte_ms: Quantiles
    duration_ms: Quantiles
    upstreams: dict[str, UpstreamLately]
