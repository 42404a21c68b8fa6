"""Statements of an account's months.

A request is on the statement of the month in which it ended, a payment on that of the month in
which it was recorded, by the ledger's time. That time does not go back, so nothing is added to a
month once it has ended.
"""

from __future__ import annotations

import sqlite3

from msgspec import Struct

from redbtc.billing.billing import PAYMENT, Billing
from redbtc.billing.records import Payment
from redbtc.billing.reports import SUMS, Group, Sums, group_type, sum_columns
from redbtc.errors import UserError
from redbtc.money import decimal
from redbtc.slices import with_turns
from redbtc.store.accounts import Account
from redbtc.store.database import Store
from redbtc.store.json_values import Money, nanos_of
from redbtc.store.readers import Reader
from redbtc.times import day_of, month_start, months_after

PAYMENTS_OF_MONTH = (
    PAYMENT + " WHERE account_id = ? AND month = ? ORDER BY payments.created_at, payments.rowid"
)

MONTHS_PAID = 3
CORRECTIONS_OF_MONTH = """
    SELECT request_id, ifnull(started_at, request_started_at) / 86400000 AS day,
           coalesce(requests.cost, request_cost, 0) AS before, ifnull(corrections.cost, 0) AS after
      FROM corrections LEFT JOIN requests USING (request_id)
     WHERE corrections.account_id = ? AND corrections.month = ?
     ORDER BY corrections.created_at, request_id LIMIT ?"""
USAGE_OF_MONTH = f"""
    SELECT day, model, {SUMS} FROM usage_by_day WHERE account_id = ? AND month = ?
     GROUP BY day, model ORDER BY day, model LIMIT ?"""
TOTALS_OF_MONTH = f"SELECT {SUMS} FROM usage_by_day WHERE account_id = ? AND month = ?"
SPENT_BEFORE = """
    SELECT ifnull(sum(cost_units), 0) AS units, ifnull(sum(cost_nanos), 0) AS nanos
      FROM usage_by_month WHERE account_id = ? AND month < ?"""
PAID_BY_MONTH = """
    SELECT month, sum(units) AS units, sum(nanos) AS nanos FROM payments WHERE account_id = ?
     GROUP BY month"""


async def statement(
    billing: Billing, account: Account, month: str, limit: int | None = None
) -> Statement:
    """Return an account's statement for a month, with the first `limit` lines of usage and of
    corrections, or all. Raises UserError for a month that has not begun."""
    store, currency = billing.store, billing.currency
    end = month_start(months_after(month, 1))
    now = await store.settle_time()
    if month_start(month) > now:
        raise UserError(f"the month {month} has not begun")
    of_month, lines = (account.id, month), -1 if limit is None else limit
    async with store.snapshot() as snapshot:
        usage = await snapshot.all(USAGE_OF_MONTH, (*of_month, lines))
        corrections = await snapshot.all(CORRECTIONS_OF_MONTH, (*of_month, lines))
        used = await snapshot.one(TOTALS_OF_MONTH, of_month)
        before = await snapshot.one(SPENT_BEFORE, of_month)
        payments = await snapshot.all(PAYMENTS_OF_MONTH, of_month)
        paid = await paid_by_month_of(snapshot, account.id)
    assert used is not None, "a sum always has one row"
    assert before is not None, "a sum always has one row"
    opening = sum(amount for of, amount in paid.items() if of < month)
    opening -= nanos_of(before["units"], before["nanos"])
    lately = {of: paid.get(of, 0) for of in _last_months(month)}
    totals = StatementTotals.of(used, currency, paid=decimal(paid.get(month, 0)))
    cost = nanos_of(used["cost_units"] or 0, used["cost_nanos"] or 0)
    group = group_type(("day", "model"))
    return Statement(
        account=account.name,
        account_id=account.id,
        month=month,
        closed=end <= now,
        currency=currency,
        opening_balance=decimal(opening),
        usage=[group(**sum_columns(row, currency)) async for row in with_turns(usage)],
        corrections=[Correction.of(row) async for row in with_turns(corrections)],
        payments=[Payment.of(row).for_account() async for row in with_turns(payments)],
        totals=totals,
        closing_balance=decimal(opening + paid.get(month, 0) - cost),
        paid_last_three_months=decimal(sum(lately.values())),
        paid_by_month={of: decimal(amount) for of, amount in lately.items()},
    )


def _last_months(month: str) -> list[str]:
    return [months_after(month, -back) for back in reversed(range(MONTHS_PAID))]


async def paid_by_month_of(store: Store | Reader, account_id: str) -> dict[str, int]:
    """Return the sum of an account's payments in nanos, by month."""
    rows = store.rows(PAID_BY_MONTH, (account_id,))
    return {row["month"]: nanos_of(row["units"], row["nanos"]) async for row in rows}


class StatementTotals(Sums, kw_only=True):
    """Sums of a statement, and the payments of its month."""

    paid: Money


class Correction(Struct):
    """The cost of an estimated request before and after its real usage became known. The difference
    is included in the usage of its day."""

    request_id: str
    day: str
    before: Money
    after: Money
    difference: Money

    @classmethod
    def of(cls, row: sqlite3.Row) -> Correction:
        """Return the correction of a row."""
        before, after = row["before"], row["after"]
        return cls(
            request_id=row["request_id"],
            day=day_of(row["day"]),
            before=decimal(before),
            after=decimal(after),
            difference=decimal(after - before),
        )


class Statement(Struct):
    """An account's statement for a month."""

    account: str
    account_id: str
    month: str
    closed: bool
    currency: str
    opening_balance: Money
    usage: list[Group]
    corrections: list[Correction]
    payments: list[Payment]
    totals: StatementTotals
    closing_balance: Money
    paid_last_three_months: Money
    paid_by_month: dict[str, Money]
