"""Monthly statements."""

from __future__ import annotations

import sqlite3

from redbtc.billing.books import PAYMENTS_OF, Billing, for_account, shown_payment
from redbtc.billing.reports import SUMS, shown_sums
from redbtc.billing.spending import nanos_of
from redbtc.errors import UserError
from redbtc.money import decimal
from redbtc.store.records import Record
from redbtc.times import day_of, month_start, months_after

# An account's month. A request is on the statement of the month in which it ended, a payment on
# that in which it was written down, by the ledger's time, which doesn't go back: once a month has
# ended nothing is added to it.
MONTHS_PAID = 3
CORRECTIONS_OF_MONTH = """
    SELECT request_id, started_at / 86400000 AS day, ifnull(requests.cost, 0) AS before,
           ifnull(corrections.cost, 0) AS after
      FROM corrections JOIN requests USING (request_id)
     WHERE corrections.account_id = ? AND corrections.month = ?
     ORDER BY corrections.created_at, request_id LIMIT ?"""
USAGE_OF_MONTH = f"""
    SELECT day, model, {SUMS} FROM usage_by_day WHERE account_id = ? AND month = ?
     GROUP BY day, model ORDER BY day, model LIMIT ?"""
TOTALS_OF_MONTH = f"SELECT {SUMS} FROM usage_by_day WHERE account_id = ? AND month = ?"
SPENT_BEFORE = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_month WHERE account_id = ? AND month < ?"""


async def statement(
    books: Billing, account: Record, month: str, limit: int | None = None
) -> Record:
    """With the first `limit` lines of its usage, or all. Raises UserError for a month that has
    not begun."""
    store = books.store
    end = month_start(months_after(month, 1))
    now = await store.settle_time()
    if month_start(month) > now:
        raise UserError(f"the month {month} has not begun")
    async with store.snapshot() as snapshot:
        lines = -1 if limit is None else limit
        rows = snapshot.rows(USAGE_OF_MONTH, (account["id"], month, lines))
        usage = [shown_sums(row, books.currency) async for row in rows]
        rows = snapshot.rows(CORRECTIONS_OF_MONTH, (account["id"], month, lines))
        corrections = [shown_correction(row) async for row in rows]
        used = await snapshot.one(TOTALS_OF_MONTH, (account["id"], month))
        before = await snapshot.one(SPENT_BEFORE, (account["id"], month))
        payments: list[Record] = []
        paid: dict[str, int] = {}
        async for row in snapshot.rows(PAYMENTS_OF, (account["id"],)):
            paid[row["month"]] = paid.get(row["month"], 0) + nanos_of(row["units"], row["nanos"])
            if row["month"] == month:
                payments.append(for_account(shown_payment(row)))
    assert used, "a sum always has one row"
    assert before, "and this one, too"
    cost = nanos_of(used["cost_units"] or 0, used["cost_nanos"] or 0)
    opening = sum(amount for of, amount in paid.items() if of < month) - nanos_of(*before)
    lately = [months_after(month, -back) for back in reversed(range(MONTHS_PAID))]
    return {
        "account": account["name"],
        "account_id": account["id"],
        "month": month,
        "closed": end <= now,
        "currency": books.currency,
        "opening_balance": decimal(opening),
        "usage": usage,
        "corrections": corrections,
        "payments": payments,
        "totals": {**shown_sums(used, books.currency), "paid": decimal(paid.get(month, 0))},
        "closing_balance": decimal(opening + paid.get(month, 0) - cost),
        "paid_last_three_months": decimal(sum(paid.get(of, 0) for of in lately)),
        "paid_by_month": {of: decimal(paid.get(of, 0)) for of in lately},
    }


def shown_correction(row: sqlite3.Row) -> Record:
    """A correction as JSON shows it. The difference is part of the usage of its day."""
    before, after = row["before"], row["after"]
    amounts = {"before": before, "after": after, "difference": after - before}
    shown = {name: decimal(amount) for name, amount in amounts.items()}
    return {"request_id": row["request_id"], "day": day_of(row["day"]), **shown}
