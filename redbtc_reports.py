"""Reports: what was used and what it cost, of a request, a range, a month, of all accounts. Every
one of them reads sums that are kept in the transaction that settles a request, and requests only
where a range cuts a day in two.
"""

from __future__ import annotations

import csv
import io
import re
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from redbtc_billing import DAY, PAYMENTS_OF, Books, for_account, nanos_of, shown_payment
from redbtc_ledger import ACCOUNT, Record, shown
from redbtc_rows import Usage
from redbtc_settings import (
    LedgerError,
    NotFound,
    day_of,
    decimal,
    month_start,
    months_after,
)
from redbtc_slices import with_turns
from redbtc_store import Reader, Store

# ── Usage ────────────────────────────────────────────────────────────────────────────────────────
# Sums come from usage_by_day as far as whole days go, from the requests themselves at a range's two
# ends and for what is in flight: a month of five million requests is a few hundred rows.

TOKENS = Usage.__struct_fields__
FIRST_TOKENS = TOKENS[: TOKENS.index("tool_input_tokens")]  # what rows had before version 3
LATER_TOKENS = TOKENS[len(FIRST_TOKENS) :]  # at their end, so that no column of a CSV moves
COUNTS = ("requests", "estimated", "unreported", *TOKENS)
SUMS = ", ".join(f"sum({name}) AS {name}" for name in (*COUNTS, "cost_units", "cost_nanos"))
GROUPS = {
    "day": "day",
    "model": "model",
    "key": "key_id",
    "account": "(SELECT name FROM accounts WHERE id = account_id) AS account",
}
OF_KEY_AND_MODEL = """
       AND (:key IS NULL OR key_id = :key) AND (:model IS NULL OR {model} GLOB :model)"""
IN_RANGE = "started_at >= {since} AND started_at < {until}" + OF_KEY_AND_MODEL.format(
    model="ifnull(model, requested_model)"
)


def corrected(name: str) -> str:
    """SQL of what a request's correction says in a column, else its row."""
    return f"iif(corrections.request_id IS NULL, requests.{name}, corrections.{name})"


WITH_CORRECTIONS = "LEFT JOIN corrections ON corrections.request_id = requests.request_id"
# A closed month's statement never changes: there a request that is corrected later stays estimated.
STILL_ESTIMATED = """
    usage_source = 'estimated' AND ifnull(corrections.month, '') <> requests.month"""
OF_REQUESTS = f"""
    SELECT requests.account_id, key_id, ifnull(model, requested_model) AS model,
           started_at / 86400000 AS day, 1 AS requests, {STILL_ESTIMATED} AS estimated,
           usage_source = 'none' AND outcome <> 'pending' AS unreported,
           {", ".join(f"{corrected(name)} AS {name}" for name in TOKENS)},
           ifnull({corrected("cost")} / 1000000000, 0) AS cost_units,
           ifnull({corrected("cost")} % 1000000000, 0) AS cost_nanos
      FROM requests"""
OF_SETTLED = f"{OF_REQUESTS} {WITH_CORRECTIONS}"
OF_PENDING = f"{OF_REQUESTS} INDEXED BY requests_in_flight {WITH_CORRECTIONS}"
FIGURES = f"""
    {OF_SETTLED} WHERE {{of_request}} outcome <> 'pending'
       AND {IN_RANGE.format(since=":since", until=":days_since")}
    UNION ALL
    {OF_SETTLED} WHERE {{of_request}} outcome <> 'pending'
       AND {IN_RANGE.format(since=":days_until", until=":until")}
    UNION ALL
    {OF_PENDING} WHERE {{of_request}} outcome = 'pending'
       AND {IN_RANGE.format(since=":since", until=":until")}
    UNION ALL
    SELECT account_id, key_id, model, day, {", ".join(COUNTS)}, cost_units, cost_nanos
      FROM usage_by_day
     WHERE {{account}} day >= :days_since / 86400000 AND day < :days_until / 86400000
       {OF_KEY_AND_MODEL.format(model="model")}"""
TOP_FIGURES = f"""
    (SELECT account_id, key_id, day, {", ".join(COUNTS)}, cost_units, cost_nanos,
            iif(model IN (SELECT model FROM figures GROUP BY model
                           ORDER BY sum(cost_units) + sum(cost_nanos) / 1e9 DESC,
                                    sum(requests) DESC, model LIMIT :top), model, NULL) AS model
       FROM figures)"""
REQUESTS = f"""
    SELECT requests.request_id, accounts.name AS account, key_id, endpoint, model, requested_model,
           upstream, started_at, first_byte_ms, duration_ms, requests.status, outcome,
           iif(corrections.request_id IS NULL, usage_source, 'upstream') AS usage_source,
           {", ".join(f"{corrected(name)} AS {name}" for name in FIRST_TOKENS)},
           {corrected("service_tier")} AS service_tier, response_id,
           {corrected("cost")} AS cost, :currency AS currency,
           {corrected("price_id")} AS price_id, requests.month,
           {", ".join(f"{corrected(name)} AS {name}" for name in LATER_TOKENS)},
           iif(corrections.request_id IS NULL, NULL, requests.cost) AS estimated_cost,
           corrections.created_at AS corrected_at
      FROM requests JOIN accounts ON accounts.id = requests.account_id {WITH_CORRECTIONS}
     WHERE {{of_request}} started_at >= :since
       AND (started_at, requests.request_id) < (:until, :before)
       {OF_KEY_AND_MODEL.format(model="ifnull(model, requested_model)")}
     ORDER BY started_at DESC, requests.request_id DESC LIMIT :limit"""
COPIED = "SELECT * FROM temp.copied ORDER BY rowid DESC"
DAYS_WITH_SOME = f"""
    SELECT day, sum(requests) FROM (
    SELECT day, requests FROM usage_by_day INDEXED BY usage_of_an_account
     WHERE account_id = :account AND day >= :since / 86400000 AND day <= :until / 86400000
       {OF_KEY_AND_MODEL.format(model="model")}
    UNION ALL
    SELECT started_at / 86400000, 1 FROM requests INDEXED BY requests_in_flight
     WHERE outcome = 'pending' AND account_id = :account
       AND {IN_RANGE.format(since=":since", until=":until")})
     GROUP BY day ORDER BY day DESC"""
START_OF = (
    "SELECT started_at FROM requests WHERE request_id = ? AND account_id = ifnull(?, account_id)"
)
# With an account, an index of its own; the queries are the same.
ONE, ALL = "{table}account_id = :account AND", ""


class Range(Struct, frozen=True):
    """Which requests: of an account and a key (by id), a model (a shell pattern), from `since` up
    to but without `until` (milliseconds), or from there up to but without the request `before`.
    `limit` keeps the newest of them; -1: all."""

    account: str | None = None
    key: str | None = None
    model: str | None = None
    since: int = 0
    until: int = 1 << 62
    before: str = ""
    limit: int = -1

    def values(self) -> dict[str, Any]:
        """Bound to the queries above; the days that lie in it whole are those from `days_since` to
        `days_until`."""
        days_since = min(-(-self.since // DAY) * DAY, self.until)
        days_until = max(self.until // DAY * DAY, days_since)
        days = {"days_since": days_since, "days_until": days_until}
        return msgspec.structs.asdict(self) | days

    def of_account(self, sql: str) -> str:
        """The query for one account or for all."""
        one = ONE if self.account else ALL
        return sql.format(account=one.format(table=""), of_request=one.format(table="requests."))


async def requests_in(store: Reader, wanted: Range, currency: str) -> list[Record]:
    """Rows of the ledger, oldest first, with the fields of CONTRACT.md section 5."""
    if wanted.limit > 0 and wanted.account:
        wanted = msgspec.structs.replace(wanted, since=await _since_enough(store, wanted))
    newest_first = await store.all(*_query(wanted, currency))
    return [shown_request(row) async for row in with_turns(reversed(newest_first))]


async def copy_requests(store: Reader, wanted: Range, currency: str) -> AsyncIterator[Record]:
    """Return the same, copied first: it can be read as slowly as a client reads, after the snapshot
    `store` has ended, and it takes no memory."""
    await store.copy(*_query(wanted, currency))
    return (shown_request(row) async for row in store.rows(COPIED))


def _query(wanted: Range, currency: str) -> tuple[str, dict[str, Any]]:
    return wanted.of_account(REQUESTS), {**wanted.values(), "currency": currency}


def shown_request(row: sqlite3.Row) -> Record:
    """Return a row of REQUESTS as JSON shows it."""
    record = shown(row)
    for name in ("cost", "estimated_cost"):
        record[name] = None if record[name] is None else decimal(record[name])
    return record


async def _since_enough(store: Reader, wanted: Range) -> int:
    """From when on there are as many as are wanted: the days tell, so that who looks for what is
    rare doesn't have all looked through."""
    found, since = 0, wanted.until
    async for day, requests in store.rows(DAYS_WITH_SOME, wanted.values()):
        since = max(wanted.since, int(day) * DAY)
        if (day + 1) * DAY <= wanted.until:  # else it counts what may come after
            found += requests
        if found >= wanted.limit:
            break
    return since


async def older_than(store: Store, wanted: Range, request_id: str) -> Range:
    """Those of a range that come before a request. Raises NotFound."""
    found = await store.one(START_OF, (request_id, wanted.account))
    if found is None:
        raise NotFound(f"there is no request {request_id!r}")
    until = min(wanted.until, found[0])
    return msgspec.structs.replace(wanted, until=until, before=request_id)


async def usage_by(
    store: Reader, wanted: Range, names: Sequence[str], currency: str, top: int | None = None
) -> list[Record]:
    """Sums of the requests in a range for each combination of `names`, keys of GROUPS; for none of
    them the one sum of all. A sum is null where no request has a number. `top`: as many models have
    a name, those that cost most; that of the others is null."""
    labels = "".join(f"{GROUPS[name]}, " for name in names)
    places = ", ".join(str(place + 1) for place in range(len(names)))
    group = f"GROUP BY {places} ORDER BY {places}" if names else ""
    figures = TOP_FIGURES if top and "model" in names else "figures"
    sql = f"WITH figures AS ({wanted.of_account(FIGURES)}) SELECT {labels}{SUMS} FROM {figures}"
    values = {**wanted.values(), "top": top}
    return [shown_sums(row, currency) async for row in store.rows(f"{sql} {group}", values)]


def shown_sums(row: Mapping[str, Any] | sqlite3.Row, currency: str) -> Record:
    """Sums as JSON shows them."""
    record = dict(row)
    cost = nanos_of(record.pop("cost_units") or 0, record.pop("cost_nanos") or 0)
    for name in ("requests", "estimated", "unreported"):
        record[name] = record[name] or 0
    if "day" in record:
        record["day"] = day_of(record["day"])
    return {**record, "cost": decimal(cost), "currency": currency}


# ── Statements ───────────────────────────────────────────────────────────────────────────────────
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


async def statement(books: Books, account: Record, month: str, limit: int | None = None) -> Record:
    """With the first `limit` lines of its usage, or all. Raises LedgerError for a month that has
    not begun."""
    store = books.store
    end = month_start(months_after(month, 1))
    now = await store.settle_time()
    if month_start(month) > now:
        raise LedgerError(f"{month} has not begun")
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


# ── Overviews ────────────────────────────────────────────────────────────────────────────────────
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
MOST_SPENT = """
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
MOST_LATELY = 500  # requests


def with_cost(row: Mapping[str, Any] | sqlite3.Row) -> Record:
    """Its cost as JSON shows it."""
    record = dict(row)
    units, nanos = record.pop("cost_units"), record.pop("cost_nanos")
    return {**record, "cost": decimal(nanos_of(units, nanos))}


async def list_accounts(
    books: Books, search: str = "", after: str = "", limit: int = -1
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


async def months(books: Books, account: Record) -> list[Record]:
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


async def spending(books: Books, limit: int) -> Record:
    """Of all accounts in this month, and of those that spent most."""
    month = books.month()
    total = await books.store.one(SPENT_IN_MONTH, (month,))
    assert total is not None, "a sum always has one row"
    most = [with_cost(row) async for row in books.store.rows(MOST_SPENT, (month, limit))]
    return {"month": month, **with_cost(total), "most": most, "currency": books.currency}


async def traffic(books: Books, days: int) -> list[Record]:
    """Requests and cost of all accounts in the last so many days (UTC), by day, upstream and
    outcome."""
    since = books.store.time() // DAY - days
    rows = books.store.rows(TRAFFIC, (since,))
    return [{**with_cost(row), "day": day_of(row["day"])} async for row in rows]


async def lately(books: Books) -> Record:
    """How the newest requests went, MOST_LATELY at most: by upstream, and how long they took."""
    rows = [row async for row in books.store.rows(LATELY, (MOST_LATELY,))]
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


# ── CSV ──────────────────────────────────────────────────────────────────────────────────────────

FORMULA = re.compile(r"\s*[=+@＝＋－＠]|\s+-|-(?![0-9.]+$)|[\t\r\n]")


def csv_line(values: Iterable[Any]) -> str:
    """RFC 4180. What a spreadsheet would take for a formula, and is no number, is text."""
    texts = ("" if value is None else str(value) for value in values)
    out = io.StringIO()
    csv.writer(out).writerow(f"'{text}" if FORMULA.match(text) else text for text in texts)
    return out.getvalue()


def csv_lines(rows: Iterable[Record]) -> Iterator[str]:
    """Where there is a row, with a line of column names."""
    for place, row in enumerate(rows):
        if not place:
            yield csv_line(row)
        yield csv_line(row.values())


def statement_lines(found: Record) -> Iterator[Record]:
    """A statement as lines of one form: the opening balance and all payments, less all costs, are
    the closing balance. The costs include the differences of the corrections, whose own lines have
    no cost."""
    columns = ["line", "date", "description", *COUNTS, "cost", "amount"]
    empty = dict.fromkeys([*columns, "before", "after", "difference"])
    yield {**empty, "line": "opening balance", "amount": found["opening_balance"]}
    for used in found["usage"]:
        figures = {name: used[name] for name in (*COUNTS, "cost")}
        line = {"line": "usage", "date": used["day"], "description": used["model"], **figures}
        yield {**empty, **line}
    for each in found["corrections"]:
        line = {"line": "correction", "date": each["day"], "description": each["request_id"]}
        yield {**empty, **line, **{name: each[name] for name in ("before", "after", "difference")}}
    for paid in found["payments"]:
        line = {"line": "payment", "date": paid["created_at"][:10], "amount": paid["amount"]}
        yield {**empty, **line, "description": paid["reason"] or paid["reference"]}
    yield {**empty, "line": "closing balance", "amount": found["closing_balance"]}
