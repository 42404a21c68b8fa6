"""The files of an export: everything that is stored of one account, as of an instant.

An export consists of parts, each of which can be fetched by itself: `account`, `statements`, a
`usage-2026-11` for each month with requests, and as many `content` as there is stored content. What
was added at the instant or later is left out. What can change later (a request in flight, an
estimate that is corrected, the name of a key) is as it is when its part is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import orjson
from msgspec import Struct
from msgspec.structs import replace

from redbtc.admin.access import Access
from redbtc.admin.outputs import AccountWithMoney, UsageReport
from redbtc.admin.users import UserShown, is_members_name
from redbtc.admin.zip_stream import ExportedFile
from redbtc.billing.csv import csv_line, csv_lines, statement_lines
from redbtc.billing.overviews import months
from redbtc.billing.records import Notice, Payment
from redbtc.billing.reports import (
    Range,
    RequestShown,
    erased_in,
    every_request,
    group_type,
    usage_by,
)
from redbtc.billing.statements import Statement, statement
from redbtc.slices import with_turns
from redbtc.store.accounts import KeyInList
from redbtc.store.changes import Change
from redbtc.store.changes import changes as changes_of
from redbtc.store.json_values import Moment, by_name, json_time
from redbtc.times import iso_time, month_of, month_start, months_after

CHANGES_AT_ONCE = 1000
FIRST_REQUEST_SINCE = """
    SELECT min(started_at) AS at FROM requests
     WHERE account_id = ? AND started_at >= ? AND started_at < ?"""
ACCEPTANCES_OF_ACCOUNT = """
    SELECT document, version, user_id, accepted_at FROM acceptances
     WHERE account_id = ? AND accepted_at < ? ORDER BY accepted_at, document"""
REFUSED_MODELS_OF_ACCOUNT = """
    SELECT model, requests, last_at FROM unpriced_model_accounts
     WHERE account_id = ? AND last_at < ? ORDER BY model"""
INCOMPLETE = (
    b"Parts of these bodies were not stored: they were too long, came too fast, or had an API key "
    b"or a credential in them.\n"
)


class ExportedAcceptance(Struct):
    """A version of the terms or of the privacy page that an owner has accepted."""

    document: str
    version: str
    user_id: str
    accepted_at: Moment


class ExportedRefusal(Struct):
    """A model that the account asked for and that was refused since it has no price."""

    model: str
    requests: int
    last_at: Moment


class AccountExport:
    """What is stored of an account, as the account's owner may see it."""

    def __init__(self, access: Access, account: AccountWithMoney, as_of: int) -> None:
        """`as_of` is in milliseconds."""
        self._access = access
        self._billing = access.billing
        self._store = access.billing.store
        self._account = account
        self._as_of = as_of
        self._until = str(iso_time(as_of))

    # The parts

    async def usage_months(self) -> list[str]:
        """Return the months in which requests started that have a row."""
        found: list[str] = []
        since = 0
        while True:
            values = (self._account.id, since, self._as_of)
            row = await self._store.one(FIRST_REQUEST_SINCE, values)
            if row is None or row["at"] is None:
                return found
            found.append(month_of(row["at"]))
            since = month_start(months_after(found[-1], 1))

    async def statement_months(self) -> list[str]:
        """Return the months that have a statement, oldest first."""
        last = month_of(self._as_of)
        known = await months(self._billing, self._account)
        return [each.month for each in reversed(known) if each.month <= last]

    async def account_files(self) -> AsyncIterator[ExportedFile]:
        """Yield the account, its logins and keys, its payments, notices, changes and acceptances,
        the models that it was refused, and its usage by day and model."""
        yield ExportedFile("account.json", at_once(msgspec.json.encode(self._account)))
        for name, kind, rows in (
            ("logins", UserShown, await self._access.users.all(self._account.id, None)),
            ("keys", KeyInList, await self._access.accounts.keys(self._account.id)),
            ("payments", Payment, await self._payments()),
            ("notices", Notice, await self._billing.notices.to_account(self._account.id)),
        ):
            for file in table_files(name, columns_of(kind), created_before(self._until, rows)):
                yield file
        for file in (
            *table_files("acceptances", columns_of(ExportedAcceptance), await self._accepted()),
            *table_files("refused-models", columns_of(ExportedRefusal), await self._refused()),
        ):
            yield file
        yield ExportedFile("changes.json", json_list("changes", self._changes()))
        columns = columns_of(Change)
        yield ExportedFile("changes.csv", csv_of(columns, self._changes()))
        for file in await self._usage_by_day():
            yield file

    async def statement_files(self) -> AsyncIterator[ExportedFile]:
        """Yield the statement of each month, as `statement` prints it."""
        for month in await self.statement_months():
            found = await statement(self._billing, self._account, month)
            yield ExportedFile(f"statements/{month}.json", at_once(msgspec.json.encode(found)))
            yield ExportedFile(f"statements/{month}.csv", statement_csv_parts(found))

    async def usage_files(self, month: str) -> AsyncIterator[ExportedFile]:
        """Yield the rows of the requests that started in a month, with all their fields."""
        yield ExportedFile(f"usage/{month}.json", json_list("requests", self._requests(month)))
        columns = RequestShown.__struct_fields__
        yield ExportedFile(f"usage/{month}.csv", csv_of(columns, self._requests(month)))

    async def content_files(self, request_ids: Iterable[str]) -> AsyncIterator[ExportedFile]:
        """Yield the stored bodies of these requests, as far as they are the account's."""
        for request_id in request_ids:
            logged = await self._access.request_log.read(request_id)
            if logged is None or logged.account_id != self._account.id:
                continue
            if logged.request is not None:
                yield ExportedFile(f"content/{request_id}.request", at_once(logged.request))
            if logged.response is not None:
                yield ExportedFile(f"content/{request_id}.response", at_once(logged.response))
            if not logged.is_complete:
                yield ExportedFile(f"content/{request_id}.incomplete.txt", at_once(INCOMPLETE))

    # Their rows

    async def _payments(self) -> list[Payment]:
        found = await self._billing.payments(self._account)
        return [each.for_account() for each in found]

    async def _accepted(self) -> list[ExportedAcceptance]:
        rows = self._store.rows(ACCEPTANCES_OF_ACCOUNT, (self._account.id, self._as_of))
        return [
            ExportedAcceptance(**{**by_name(row), "accepted_at": json_time(row["accepted_at"])})
            async for row in rows
        ]

    async def _refused(self) -> list[ExportedRefusal]:
        rows = self._store.rows(REFUSED_MODELS_OF_ACCOUNT, (self._account.id, self._as_of))
        return [
            ExportedRefusal(row["model"], row["requests"], json_time(row["last_at"]))
            async for row in rows
        ]

    async def _changes(self) -> AsyncIterator[Change]:
        """Yield the changes of the account, newest first, as its owner may see them."""
        before = None
        while True:
            found = await changes_of(self._store, self._account.id, before, CHANGES_AT_ONCE)
            async for change in with_turns(found):
                if change.changed_at < self._until:
                    yield for_owner(change, self._account.name)
            if len(found) < CHANGES_AT_ONCE:
                return
            before = found[-1].id

    async def _requests(self, month: str) -> AsyncIterator[RequestShown]:
        until = min(month_start(months_after(month, 1)), self._as_of)
        account_id, currency = self._account.id, self._billing.currency
        async for row in every_request(
            self._store, account_id, month_start(month), until, currency
        ):
            yield row

    async def _usage_by_day(self) -> list[ExportedFile]:
        wanted = Range(account=self._account.id, until=self._as_of)
        currency = self._billing.currency
        async with self._store.snapshot() as snapshot:
            groups = await usage_by(snapshot, wanted, ["day", "model"], currency)
            (totals,) = await usage_by(snapshot, wanted, [], currency)
            erased = iso_time(await erased_in(snapshot, wanted))
        report = UsageReport(groups=groups, totals=totals, erased_before=erased)
        content = msgspec.json.encode(report)
        columns = columns_of(group_type(("day", "model")))
        return [
            ExportedFile("usage-by-day.json", at_once(content)),
            ExportedFile("usage-by-day.csv", csv_of(columns, with_turns(groups))),
        ]


def for_owner(change: Change, account: str) -> Change:
    """Return a change as the account's owner may see it: without the names of operators, and
    without the reason of a suspension."""
    is_own = is_members_name(change.changed_by, account)
    before, after = (without_reason(each) for each in (change.before, change.after))
    by = change.changed_by if is_own else "operator"
    return replace(change, changed_by=by, before=before, after=after)


def without_reason(columns: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the columns of a change without why an account was suspended."""
    if columns is None:
        return None
    return {name: value for name, value in columns.items() if name != "status_reason"}


# Files


OPERATORS_COLUMNS = ("added_by", "withdrawn_at", "delivered_at")


class Created(Protocol):
    """Something that has the time of its creation."""

    created_at: str


def created_before(until: str, rows: Iterable[Created]) -> list[Any]:
    """Return the rows that were created before a time, in ISO 8601."""
    return [each for each in rows if each.created_at < until]


def columns_of(kind: type[Struct]) -> list[str]:
    """Return the members of a type that an account's owner may see."""
    return [name for name in kind.__struct_encode_fields__ if name not in OPERATORS_COLUMNS]


async def at_once(content: bytes) -> AsyncIterator[bytes]:
    """Yield the content of a file at once."""
    yield content


async def json_list(name: str, rows: AsyncIterator[Struct]) -> AsyncIterator[bytes]:
    """Yield an object of JSON whose member `name` is a list, with a line for each row."""
    yield b'{"' + name.encode() + b'":['
    comma = b"\n"
    async for row in rows:
        yield comma + msgspec.json.encode(row)
        comma = b",\n"
    yield b"\n]}\n"


async def csv_of(columns: Sequence[str], rows: AsyncIterator[Struct]) -> AsyncIterator[bytes]:
    """Yield rows as CSV, after a line with the names of the columns."""
    yield csv_line(columns).encode()
    async for row in rows:
        yield csv_line(csv_value(getattr(row, name)) for name in columns).encode()


def csv_value(value: Any) -> Any:
    """Return a value as a cell shows it: lists with commas, objects as JSON."""
    if isinstance(value, list):
        return ",".join(value)
    return orjson.dumps(value).decode() if isinstance(value, dict) else value


def table_files(
    name: str, columns: Sequence[str], rows: Sequence[Struct]
) -> Iterator[ExportedFile]:
    """Yield the two files of a table, JSON and CSV."""
    yield ExportedFile(f"{name}.json", json_list(name, with_turns(rows)))
    yield ExportedFile(f"{name}.csv", csv_of(columns, with_turns(rows)))


async def statement_csv_parts(found: Statement) -> AsyncIterator[bytes]:
    """Yield a statement as CSV."""
    lines: Iterator[Mapping[str, Any]] = statement_lines(found)
    async for line in with_turns(csv_lines(lines)):
        yield line.encode()
