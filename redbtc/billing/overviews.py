"""Sums over accounts, months and days, for operators' pages."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from redbtc.billing.books import PAYMENTS_OF, Billing
from redbtc.billing.spending import nanos_of
from redbtc.money import decimal
from redbtc.store.accounts import ACCOUNT
from redbtc.store.records import Record, shown
from redbtc.times import DAY, day_of

# Of an account by month; of all accounts, for operators.
MONTHS_OF = """
    SELECT month, requests, input_tokens, output_tokens, cost_units, cost_nanos
      FROM usage_by_month WHERE account_id = ? ORDER BY month"""
MONEY_OF_EACH = f"""
    SELECT accounts.*, spent.requests AS requests_this_month,
           ifnull(spent.cost_units, 0), ifnull(spent.cost_nanos, 0),
           (SELECT ifnull(sum(cost_units), 0) FROM usage_by_month WHERE account_id = accounts.id),
           (SELECT ifnull(sum(cost_nanos), 0) FROM usage_by_month WHERE account_id = accounts.id),
           (SELECT ifnull(sum(units), 0) FROM payments WHERE account_id = accounts.id),
           (SELECT ifnull(sum(nanos), 0) FROM payments WHERE account_id = accounts.id)
      FROM ({ACCOUNT}) AS accounts
      LEFT JOIN usage_by_month AS spent
        ON spent.account_id = accounts.id AND spent.month = ?2
     WHERE (?3 = '' OR instr(lower(name), lower(?3)) OR instr(lower(email), lower(?3)) OR id = ?3)
       AND name > ?4 ORDER BY name LIMIT ?5"""
MAX_SPENT = """
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
LATELY = """
    SELECT upstream, outcome, first_byte_ms, duration_ms FROM requests
     WHERE outcome <> 'pending' ORDER BY started_at DESC LIMIT ?"""
MAX_LATELY = 500  # requests


def with_cost(row: Mapping[str, Any] | sqlite3.Row) -> Record:
    """Its cost as JSON shows it."""
    record = dict(row)
    units, nanos = record.pop("cost_units"), record.pop("cost_nanos")
    return {**record, "cost": decimal(nanos_of(units, nanos))}


async def list_accounts(
    books: Billing, search: str = "", after: str = "", limit: int = -1
) -> list[Record]:
    """Accounts by name with their money as far as it is committed: those with `search` in name or
    address, that come after the name `after`."""
    values = (books.store.time(), books.month(), search, after, limit)
    found = []
    async for row in books.store.rows(MONEY_OF_EACH, values):
        *_, month, month_nanos, cost, cost_nanos, paid, paid_nanos = row
        record = {name: row[name] for name in row.keys()[:-6]}
        balance = nanos_of(paid, paid_nanos) - nanos_of(cost, cost_nanos)
        money = {
            "balance": decimal(balance),
            "spent_this_month": decimal(nanos_of(month, month_nanos)),
            "requests_this_month": record.pop("requests_this_month") or 0,
            "currency": books.currency,
        }
        found.append({**shown(record), **money})
    return found


async def months(books: Billing, account: Record) -> list[Record]:
    """The account's months in which something was used or paid, the newest first."""
    empty = {"requests": 0, "input_tokens": 0, "output_tokens": 0, "cost": "0", "paid": "0"}
    found: dict[str, Record] = {}
    async for row in books.store.rows(MONTHS_OF, (account["id"],)):
        found[row["month"]] = {**empty, **with_cost(row)}
    paid: dict[str, int] = {}
    async for row in books.store.rows(PAYMENTS_OF, (account["id"],)):
        paid[row["month"]] = paid.get(row["month"], 0) + nanos_of(row["units"], row["nanos"])
    for month, amount in paid.items():
        found[month] = {"month": month, **found.get(month, empty), "paid": decimal(amount)}
    now = books.month()
    found.setdefault(now, {"month": now, **empty})
    return [
        {**found[month], "closed": month < now, "currency": books.currency}
        for month in sorted(found, reverse=True)
    ]


async def spending(books: Billing, limit: int) -> Record:
    """Of all accounts in this month, and of those that spent most."""
    month = books.month()
    total = await books.store.one(SPENT_IN_MONTH, (month,))
    assert total is not None, "a sum always has one row"
    most = [with_cost(row) async for row in books.store.rows(MAX_SPENT, (month, limit))]
    return {"month": month, **with_cost(total), "most": most, "currency": books.currency}


async def traffic(books: Billing, days: int) -> list[Record]:
    """Requests and cost of all accounts in the last so many days (UTC), by day, upstream and
    outcome."""
    since = books.store.time() // DAY - days
    rows = books.store.rows(TRAFFIC, (since,))
    return [{**with_cost(row), "day": day_of(row["day"])} async for row in rows]


async def lately(books: Billing) -> Record:
    """How the newest requests went, MAX_LATELY at most: by upstream, and how long they took."""
    rows = [row async for row in books.store.rows(LATELY, (MAX_LATELY,))]
    first = sorted(row["first_byte_ms"] for row in rows if row["first_byte_ms"] is not None)
    whole = sorted(row["duration_ms"] for row in rows if row["duration_ms"] is not None)
    upstreams: dict[str, Record] = {}
    for row in rows:
        of = upstreams.setdefault(row["upstream"], {"requests": 0, "failed": 0})
        of["requests"] += 1
        of["failed"] += row["outcome"] in ("upstream_error", "upstream_failed")
    return {
        "requests": len(rows),
        "first_byte_ms": {"median": quantile(first, 50), "p95": quantile(first, 95)},
        "duration_ms": {"median": quantile(whole, 50), "p95": quantile(whole, 95)},
        "upstreams": upstreams,
    }


def quantile(ordered: Sequence[int], percent: int) -> int | None:
    """The smallest that so many percent of them are not above; None of none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None
