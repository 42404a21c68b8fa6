"""Reports of usage and cost, for single requests and as sums over ranges of time.

Sums come from usage_by_day, which the transaction that settles a request updates, as far as the
range has whole days. Only its two ends, and the requests in flight, are read from the requests
themselves: a month of five million requests is a few hundred rows.

The rows of old requests may have been erased (retention.usage_days). Then only whole days are
known, and a range that begins or ends within such a day includes all of that day.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType, defstruct
from msgspec.structs import fields

from redbtc.errors import NotFound
from redbtc.money import decimal
from redbtc.slices import with_turns
from redbtc.store.database import Store
from redbtc.store.json_values import (
    Moment,
    Money,
    Sum,
    by_name,
    json_amount,
    nanos_of,
    with_members,
)
from redbtc.store.readers import Reader
from redbtc.times import DAY, day_of, iso_time
from redbtc.usage import FAILED, KINDS, Credentials, Outcome, UsageSource

COUNTS = ("requests", "estimated", "unreported", *KINDS)
SUMS = ", ".join(f"sum({name}) AS {name}" for name in (*COUNTS, "cost_units", "cost_nanos"))
GROUPS = {  # the column, and what it is selected as
    "day": ("day", "day"),
    "model": ("model", "model"),
    "key": ("key_id", "key_id"),
    "account": ("account", "(SELECT name FROM accounts WHERE id = account_id) AS account"),
}
OF_KEY_AND_MODEL = """
       AND (:key IS NULL OR key_id = :key) AND (:model IS NULL OR {model} GLOB :model)"""
IN_RANGE = "started_at >= {since} AND started_at < {until}" + OF_KEY_AND_MODEL.format(
    model="ifnull(model, requested_model)"
)


def corrected(name: str) -> str:
    """Return SQL for a column of a request's correction, or of its row if it was not corrected."""
    return f"iif(corrections.request_id IS NULL, requests.{name}, corrections.{name})"


WITH_CORRECTIONS = "LEFT JOIN corrections ON corrections.request_id = requests.request_id"
# The statement of a closed month never changes: a request that is corrected later stays estimated
# in it.
STILL_ESTIMATED = """
    usage_source = 'estimated' AND ifnull(corrections.month, '') <> requests.month"""
OF_REQUESTS = f"""
    SELECT requests.account_id, key_id, ifnull(model, requested_model) AS model,
           started_at / 86400000 AS day, 1 AS requests, {STILL_ESTIMATED} AS estimated,
           usage_source = 'none' AND outcome <> 'pending' AS unreported,
           {", ".join(f"{corrected(name)} AS {name}" for name in KINDS)},
           ifnull({corrected("cost")} / 1000000000, 0) AS cost_units,
           ifnull({corrected("cost")} % 1000000000, 0) AS cost_nanos
      FROM requests"""
# Two indexes have only the requests that failed at an upstream, which are few.
FAILED_OUTCOME = f"""
    outcome IN ('{"', '".join(FAILED)}') AND (:failure IS NULL OR upstream_error_code = :failure
        OR ifnull(upstream_status, requests.status) = :failure_status)"""
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
FAILED_FIGURES = f"""
    {OF_REQUESTS} {{index}} {WITH_CORRECTIONS}
     WHERE {{of_request}} {FAILED_OUTCOME} AND {IN_RANGE.format(since=":since", until=":until")}"""
TOP_FIGURES = f"""
    (SELECT account_id, key_id, day, {", ".join(COUNTS)}, cost_units, cost_nanos,
            iif(model IN (SELECT model FROM figures GROUP BY model
                           ORDER BY sum(cost_units) + sum(cost_nanos) / 1e9 DESC,
                                    sum(requests) DESC, model LIMIT :top), model, NULL) AS model
       FROM figures)"""
CORRECTABLE = ("service_tier", "price_id", "cost", *KINDS)
SELECT_REQUESTS = f"""
    SELECT requests.request_id, accounts.name AS account, key_id, endpoint, model, requested_model,
           upstream, started_at, first_byte_ms, duration_ms, requests.status, outcome,
           iif(corrections.request_id IS NULL, usage_source, 'upstream') AS usage_source,
           {", ".join(f"{corrected(name)} AS {name}" for name in CORRECTABLE)},
           response_id, :currency AS currency, requests.month,
           iif(corrections.request_id IS NULL, NULL, requests.cost) AS estimated_cost,
           corrections.created_at AS corrected_at,
           attempts, upstream_status, upstream_error_code, upstream_request_id,
           credentials
      FROM requests {{index}} JOIN accounts ON accounts.id = requests.account_id
           {WITH_CORRECTIONS}"""
REQUESTS = f"""{SELECT_REQUESTS}
     WHERE {{of_request}} {{failed}} started_at >= :since
       AND (started_at, requests.request_id) < (:until, :before)
       {OF_KEY_AND_MODEL.format(model="ifnull(model, requested_model)")}
     ORDER BY started_at DESC, requests.request_id DESC LIMIT :limit"""
ONE_REQUEST = f"""{SELECT_REQUESTS.format(index="")}
     WHERE requests.request_id = :request
       AND requests.account_id = ifnull(:account, requests.account_id)"""
NEXT_REQUESTS = f"""{SELECT_REQUESTS.format(index="")}
     WHERE requests.account_id = :account AND started_at >= :since
       AND (started_at, requests.request_id) > (:since, :after) AND started_at < :until
     ORDER BY started_at, requests.request_id LIMIT :limit"""
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
ANY_ERASED = "SELECT 1 FROM rolled_up WHERE {account} requests > 0 LIMIT 1"
ERASED_BEFORE = "SELECT usage_before FROM retention"
PAGE_OF_REQUESTS = 1000
HTTP_STATUS = re.compile(r"[1-9][0-9]{2}")
# With an account, an index of its own; the queries are the same.
ONE, ALL = "{table}account_id = :account AND", ""


class Range(Struct, frozen=True):
    """A selection of requests: by the ids of account and key, by model (a shell pattern), and by
    start, from `since` until before `until` (milliseconds) and, of those that started at `until`,
    the ones before the request `before`. With `failed`, only those that failed at an upstream are
    selected; with `failure` as well, only those that failed with this error code, cause or HTTP
    status. Only the newest `limit` are selected; -1 is all."""

    account: str | None = None
    key: str | None = None
    model: str | None = None
    since: int = 0
    until: int = 1 << 62
    before: str = ""
    limit: int = -1
    failed: bool = False
    failure: str | None = None

    def values(self, erased_before: int = 0) -> dict[str, Any]:
        """Return the values of the queries above. The whole days of the range are those from
        `days_since` until before `days_until`. Days before `erased_before` can only be whole."""
        days_since = min(-(-self.since // DAY) * DAY, self.until)
        if self.since < min(self.until, erased_before):
            days_since = self.since // DAY * DAY
        days_until = max(self.until // DAY * DAY, days_since)
        if self.since < self.until <= erased_before:
            days_until = -(-self.until // DAY) * DAY
        status = int(self.failure) if self.failure and HTTP_STATUS.fullmatch(self.failure) else None
        further = {"days_since": days_since, "days_until": days_until, "failure_status": status}
        return msgspec.structs.asdict(self) | further

    def applied_to(self, sql: str) -> str:
        """Return a query for the account of the range, or for all accounts; and for the requests
        that failed, if only these are selected."""
        one = ONE if self.account else ALL
        failed = f"failed_requests{'_of_an_account' if self.account else ''}"
        return sql.format(
            account=one.format(table=""),
            of_request=one.format(table="requests."),
            index=f"INDEXED BY {failed}" if self.failed else "",
            failed=f"{FAILED_OUTCOME} AND" if self.failed else "",
        )


async def requests_in(store: Reader, wanted: Range, currency: str) -> list[RequestShown]:
    """Return rows of the ledger, oldest first, with the fields of docs/contract.md section 5."""
    if wanted.limit > 0 and wanted.account and not wanted.failed:
        wanted = msgspec.structs.replace(wanted, since=await _since_enough(store, wanted))
    newest_first = await store.all(*_query(wanted, currency))
    return [RequestShown.of(row) async for row in with_turns(reversed(newest_first))]


async def one_request(
    store: Store, request_id: str, account_id: str | None, currency: str
) -> RequestShown:
    """Return a request, if it is the account's; `account_id` None: of any account. Raises
    NotFound."""
    values = {"request": request_id, "account": account_id, "currency": currency}
    row = await store.one(ONE_REQUEST, values)
    if row is None:
        raise NotFound(f"request {request_id!r} does not exist")
    return RequestShown.of(row)


async def copy_requests(store: Reader, wanted: Range, currency: str) -> AsyncIterator[RequestShown]:
    """Return the same rows from a temporary copy. They take no memory, and can still be read, as
    slowly as a client does, after the snapshot `store` has ended."""
    await store.copy(*_query(wanted, currency))
    return (RequestShown.of(row) async for row in store.rows(COPIED))


async def every_request(
    store: Store, account_id: str, since: int, until: int, currency: str
) -> AsyncIterator[RequestShown]:
    """Yield the same rows of an account that started from `since` until before `until`, oldest
    first. They are read PAGE_OF_REQUESTS at a time, each time as the ledger is then, so that a
    reader of millions of rows keeps no snapshot open."""
    values = {"account": account_id, "until": until, "currency": currency}
    values |= {"since": since, "after": "", "limit": PAGE_OF_REQUESTS}
    while True:
        rows = [row async for row in store.rows(NEXT_REQUESTS, values)]
        async for row in with_turns(rows):
            yield RequestShown.of(row)
        if len(rows) < PAGE_OF_REQUESTS:
            return
        values |= {"since": rows[-1]["started_at"], "after": rows[-1]["request_id"]}


def _query(wanted: Range, currency: str) -> tuple[str, dict[str, Any]]:
    return wanted.applied_to(REQUESTS), {**wanted.values(), "currency": currency}


async def _since_enough(store: Reader, wanted: Range) -> int:
    """Return a time since which the range has `limit` requests. It comes from the sums by day, so
    that a query for rare requests does not read all others."""
    found, since = 0, wanted.until
    async for day, requests in store.rows(DAYS_WITH_SOME, wanted.values()):
        since = max(wanted.since, int(day) * DAY)
        if (day + 1) * DAY <= wanted.until:  # else the sum includes requests after the range
            found += requests
        if found >= wanted.limit:
            break
    return since


async def older_than(store: Store, wanted: Range, request_id: str) -> Range:
    """Return the part of a range that comes before a request. Raises NotFound."""
    found = await store.one(START_OF, (request_id, wanted.account))
    if found is None:
        raise NotFound(f"request {request_id!r} does not exist")
    until = min(wanted.until, found[0])
    return msgspec.structs.replace(wanted, until=until, before=request_id)


async def usage_by(
    store: Reader, wanted: Range, names: Sequence[str], currency: str, top: int | None = None
) -> list[Group]:
    """Return the sums of the requests in a range for each combination of `names` (keys of GROUPS),
    or a single sum without names. A sum is null if no request has that number. With `top`, only
    that many models, those with the highest costs, keep their names; the others' is null."""
    group = group_type(tuple(GROUPS[name][0] for name in names))
    labels = "".join(f"{GROUPS[name][1]}, " for name in names)
    places = ", ".join(str(place + 1) for place in range(len(names)))
    grouped = f"GROUP BY {places} ORDER BY {places}" if names else ""
    figures = TOP_FIGURES if top and "model" in names else "figures"
    rows = wanted.applied_to(FAILED_FIGURES if wanted.failed else FIGURES)
    sql = f"WITH figures AS ({rows}) SELECT {labels}{SUMS} FROM {figures}"
    values = {**wanted.values(await erased_before(store)), "top": top}
    return [
        group(**sum_columns(row, currency)) async for row in store.rows(f"{sql} {grouped}", values)
    ]


async def erased_before(store: Reader) -> int:
    """Return the time (milliseconds) before which the rows of requests were erased, 0 if none
    were."""
    found = await store.one(ERASED_BEFORE)
    return found["usage_before"] if found else 0


async def erased_in(store: Reader, wanted: Range) -> int | None:
    """Return the same time, None if the range begins later, or no request of its account was
    erased."""
    before = await erased_before(store)
    if wanted.since >= before:
        return None
    return before if await store.one(wanted.applied_to(ANY_ERASED), wanted.values()) else None


@with_members(dict.fromkeys(KINDS, Sum))
class SumsOfKinds(Struct):
    """Counts of requests, and the sum of each kind of usage."""

    requests: int
    estimated: int
    unreported: int


class Sums(SumsOfKinds, kw_only=True):
    """The sums over a set of requests. A sum is null if no request reported that number."""

    cost: Money
    currency: str

    @classmethod
    def of(cls, row: sqlite3.Row, currency: str, **more: Any) -> Self:
        """Return the sums of a row; `more` are members that a subclass adds."""
        return cls(**sum_columns(row, currency), **more)


def sum_columns(row: sqlite3.Row, currency: str) -> dict[str, Any]:
    """Return the columns of a row of sums, and of its day if it has one, as JSON shows them."""
    columns = by_name(row)
    cost = nanos_of(columns.pop("cost_units") or 0, columns.pop("cost_nanos") or 0)
    for name in ("requests", "estimated", "unreported"):  # sums of no rows are null
        columns[name] = columns[name] or 0
    if "day" in columns:
        columns["day"] = day_of(columns["day"])
    return {**columns, "cost": decimal(cost), "currency": currency}


class Group(Sums, kw_only=True):
    """Sums for one combination of the fields to group by."""

    day: str | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    key_id: str | UnsetType = UNSET
    account: str | UnsetType = UNSET


@functools.cache
def group_type(labels: tuple[str, ...]) -> type[Group]:
    """Return a Group that has only these labels, in this order and before the sums."""
    members = [(label, str | None) for label in labels]
    members += [(each.name, each.type) for each in fields(Sums)]
    return defstruct("Group", members)  # type: ignore[return-value]  # it has the same members


# Kinds that were added later stand after the month, so that no column of a CSV moves.
FIRST_KINDS = KINDS[: KINDS.index("tool_input_tokens")]
LATER_KINDS = KINDS[len(FIRST_KINDS) :]


@with_members(dict.fromkeys(FIRST_KINDS, Sum))
class RequestWithFirstKinds(Struct):
    """The first members of RequestShown."""

    request_id: str
    account: str
    key_id: str
    endpoint: str
    model: str | None
    requested_model: str
    upstream: str
    started_at: Moment
    first_byte_ms: int | None
    duration_ms: int | None
    status: int | None
    outcome: Outcome
    usage_source: UsageSource


@with_members(dict.fromkeys(LATER_KINDS, Sum))
class RequestWithKinds(RequestWithFirstKinds, kw_only=True):
    """The next members of RequestShown."""

    service_tier: str | None
    response_id: str | None
    cost: Money | None
    currency: str
    price_id: int | None
    month: str | None


class RequestShown(RequestWithKinds, kw_only=True):
    """A row of the ledger, docs/contract.md section 5."""

    estimated_cost: Money | None
    corrected_at: Moment | None
    attempts: int | None
    upstream_status: int | None
    upstream_error_code: str | None
    upstream_request_id: str | None
    credentials: Credentials | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> RequestShown:
        """Return the request of a row."""
        columns = by_name(row)
        columns["started_at"] = iso_time(columns["started_at"])
        columns["corrected_at"] = iso_time(columns["corrected_at"])
        columns["cost"] = json_amount(columns["cost"])
        columns["estimated_cost"] = json_amount(columns["estimated_cost"])
        return cls(**columns)
