"""Operations that report usage and the state of the gateway, and those on its database."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor
from redbtc.admin.inputs import (
    ChangesQuery,
    NewTime,
    OverviewQuery,
    RequestsQuery,
    SumsQuery,
    UsageQuery,
)
from redbtc.admin.outputs import (
    ChangeList,
    Check,
    DatabaseSize,
    MeShown,
    Overview,
    RequestReport,
    UsageReport,
)
from redbtc.admin.set_time import TimeSet, preview, set_time, time_to_set
from redbtc.admin.uptime_report import read_minutes
from redbtc.billing.billing import Billing
from redbtc.billing.overviews import lately, spending_overview, traffic
from redbtc.billing.reports import (
    Range,
    copy_requests,
    erased_in,
    older_than,
    requests_in,
    usage_by,
)
from redbtc.errors import StorageUnavailable
from redbtc.store import changes as changes_module
from redbtc.store.closing import asked_to_close
from redbtc.store.consistency import check_database
from redbtc.store.keys import Key
from redbtc.store.wal import file_size
from redbtc.times import iso_time, parse_time

MAX_LISTED_REQUESTS = 1000  # requests in one answer to a browser or to the holder of a key


class UsageOperations(Access):
    """Operations that report usage and the state of the gateway, and those on its database."""

    async def _range(self, actor: Actor, query: UsageQuery) -> Range:
        """Return the range of requests that a query asks for. Raises NotFound for an account or key
        that does not exist or that belongs to another account."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self.find_account(actor, query.account)).id
        if query.key is not None and actor.account_id is not None:
            await self.find_key(actor, query.key)
        failed = query.failed or query.failure is not None
        wanted = Range(
            account=account_id,
            key=query.key,
            model=query.model,
            failed=failed,
            failure=query.failure,
        )
        given: dict[str, Any] = {}
        now = self.billing.store.time()
        if query.since:
            given["since"] = parse_time(query.since, now, relative_to_past=True)
        if query.until:
            given["until"] = parse_time(query.until, now, relative_to_past=True)
        return replace(wanted, **given)

    async def usage(self, actor: Actor, query: SumsQuery) -> UsageReport:
        """Sum usage by group, and in total."""
        wanted, billing = await self._range(actor, query), self.billing
        names = list(dict.fromkeys(query.group_by.split(","))) if query.group_by else []
        async with billing.store.snapshot() as snapshot:
            groups = await usage_by(snapshot, wanted, names, billing.currency, query.top)
            totals = groups
            if names:
                totals = await usage_by(snapshot, wanted, [], billing.currency)
            erased = await erased_in(snapshot, wanted)
        return UsageReport(
            groups=groups if names else [], totals=totals[0], erased_before=iso_time(erased)
        )

    async def requests(self, actor: Actor, query: RequestsQuery) -> RequestReport:
        """List requests, and their totals."""
        wanted = await self._newest(actor, query, min(query.limit or 100, MAX_LISTED_REQUESTS))
        currency = self.billing.currency
        async with self.billing.store.snapshot() as snapshot:
            rows = await requests_in(snapshot, wanted, currency)
            (totals,) = await usage_by(snapshot, wanted, [], currency)
            erased = await erased_in(snapshot, wanted)
        report = RequestReport(requests=rows, totals=totals, erased_before=iso_time(erased))
        if actor.rank in ("owner", "operator"):
            with contextlib.suppress(StorageUnavailable):
                ids = [row.request_id for row in rows]
                report.logged = sorted(await self.request_log.logged_among(ids))
        return report

    async def stream_requests(self, actor: Actor, query: RequestsQuery) -> AsyncIterator[bytes]:
        """Yield the answer to a command, which may ask for any number of requests, as JSON. It is
        copied from one snapshot first, so that a client that reads slowly keeps no snapshot open.
        """
        wanted = await self._newest(actor, query, query.limit or -1)
        currency = self.billing.currency
        async with contextlib.AsyncExitStack() as stack:
            async with self.billing.store.snapshot(outlived_by=stack) as snapshot:
                rows = await copy_requests(snapshot, wanted, currency)
                (totals,) = await usage_by(snapshot, wanted, [], currency)
                erased = await erased_in(snapshot, wanted)
            yield b'{"requests":['
            comma = b""
            async for row in rows:
                yield comma + msgspec.json.encode(row)
                comma = b",\n"
            yield b'],"totals":' + msgspec.json.encode(totals)
            yield b',"erased_before":' + msgspec.json.encode(iso_time(erased)) + b"}"

    async def _newest(self, actor: Actor, query: RequestsQuery, limit: int) -> Range:
        """Return the range of the newest requests that a query asks for (limit -1: all of them).
        Raises NotFound."""
        wanted = await self._range(actor, query)
        if query.before:
            wanted = await older_than(self.billing.store, wanted, query.before)
        return replace(wanted, limit=limit)

    async def _limits_and_budgets(self, key: Key) -> dict[str, Any]:
        """Return the limits of a key and its account, each with what is left of its budget."""
        budgets = await self.billing.budgets(key)
        found = self.gateway.limits_of_key(key)
        return {
            owner: {**limits, "monthly_budget": budgets[owner]} for owner, limits in found.items()
        }

    async def me(self, actor: Actor) -> MeShown:
        """Show your balance, limits and notices. Needs an API key."""
        found = await self.find_account(actor)
        key = actor.required_key()
        return MeShown(
            account=found.name,
            account_id=found.id,
            key_id=key.id,
            balance=await self.billing.balance(found),
            limits=await self._limits_and_budgets(key),
            notices=await self.billing.notices.current(found.id),
        )

    async def limits(self, actor: Actor) -> dict[str, Any]:
        """Show your current limits and budgets and what is left of them. Needs an API key."""
        return await self._limits_and_budgets(actor.required_key())

    async def overview(self, actor: Actor, query: OverviewQuery) -> Overview:
        """Show traffic, spending, upstreams and free disk space."""
        billing = self.billing
        return Overview(
            **asdict(self.gateway.at_work()),
            traffic=await traffic(billing, query.days),
            spending=await spending_overview(billing, query.limit),
            lately=await lately(billing),
            database=database_size(billing),
            closing=await asked_to_close(billing.store),
            uptime=(await read_minutes(billing)).totals(),
            unpriced=await billing.unpriced.listed(),
        )

    async def list_changes(self, actor: Actor, query: ChangesQuery) -> ChangeList:
        """List administrative changes: who, when, what, before and after."""
        account_id = None
        if query.account is not None:
            account_id = (await self.find_account(actor, query.account)).id
        changes = changes_module.changes(self.billing.store, account_id, query.before, query.limit)
        return ChangeList(await changes)

    async def check_database(self, actor: Actor) -> Check:
        """Check the whole database for damage. SIGTERM does not wait for it."""
        with self.gateway.checking():
            problems = await check_database(self.billing.store)
        return Check(ok=not problems, problems=problems)

    async def set_time(self, actor: Actor, body: NewTime) -> TimeSet:
        """Move ledger entries dated after a time to that time."""
        at, now = time_to_set(self.billing.store, body.time)
        if body.preview:
            return await preview(self.billing.store, at, now)
        done = await set_time(self.billing, at, now, actor.name)
        self.gateway.set_back(at)
        return done


def database_size(billing: Billing) -> DatabaseSize:
    """Return the size of the database and the room on its disk, in bytes."""
    store = billing.store
    size = file_size(store.path) + store.wal_bytes
    disk = shutil.disk_usage(store.path.parent)
    return DatabaseSize(bytes=size, free_bytes=disk.free, disk_bytes=disk.total)
