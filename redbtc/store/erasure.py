"""Erase what identifies a terminated account, and keep what accounting needs.

Each step is a query for rows and statements that erase a batch of them, in a transaction of its
own, so that requests wait for a few milliseconds at most. Steps can be repeated. Whatever ends the
process, the account stays due (`erase_at` has come, and it has no `erased_at`), and the next
erasure does what is left. `erased_at` is set only once no file has the erased text any more.

docs/privacy.md lists each column with what is done with it, and tests/admin/test_erasing.py knows
that list.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import orjson
from msgspec import Struct

from redbtc.errors import StorageUnavailable
from redbtc.store.database import Store
from redbtc.store.json_values import JSON_IDS
from redbtc.store.request_log import RequestLog

PAGE_OF_ROWS = 1000  # that are read at once
ERASED_ROWS = 100  # in a transaction
SCRUB_SECONDS = 10  # for another program that reads the database
# A pause is so many times as long as the transaction before it: about one request in ten meets one.
PAUSE_FACTOR_OF_ERASURE = 10

PERMIT = "INSERT INTO erasing (id, what, account_id) VALUES (1, 'account', ?)"
END_PERMIT = "DELETE FROM erasing"
IN_BATCH = f"id IN {JSON_IDS}"
SETTLED_IN_BATCH = f"""
    request_id IN (SELECT request_id FROM requests WHERE request_id IN {JSON_IDS}
                    AND outcome <> 'pending')"""
# Members sign as "email of account"; operators, commands and keys have other names.
BY_A_MEMBER = """
    (SELECT substr({name}, -length(name) - 4) = ' of ' || name FROM accounts
      WHERE accounts.id = {table}.account_id)"""


class ErasureStep(NamedTuple):
    """A table, the query for a page of its rows, and the statements that erase a batch of them. The
    query's values are the account, the position of the last row (`at` and `id`) and the number of
    rows; it says of each row whether it `is_due`."""

    name: str
    page: str
    erase: tuple[str, ...]


def page_of(table: str) -> str:
    """Return the query for the rows of an account in a table."""
    return f"""
        SELECT 0 AS at, id, 1 AS is_due FROM {table}
         WHERE account_id = :account AND id > :id ORDER BY id LIMIT :rows"""


ERASURE_STEPS = (
    ErasureStep(
        "keys",
        page_of("keys"),
        (f"UPDATE keys SET label = '', models = NULL, hash = randomblob(32) WHERE {IN_BATCH}",),
    ),
    ErasureStep("logins", page_of("users"), (f"DELETE FROM users WHERE {IN_BATCH}",)),
    ErasureStep(
        "requests",
        """SELECT started_at AS at, request_id AS id, outcome <> 'pending' AS is_due FROM requests
            WHERE account_id = :account AND (started_at, request_id) > (:at, :id)
            ORDER BY started_at, request_id LIMIT :rows""",
        (
            f"""UPDATE requests SET response_id = NULL, upstream_request_id = NULL
                 WHERE request_id IN {JSON_IDS}
                   AND (response_id IS NOT NULL OR upstream_request_id IS NOT NULL)""",
            f"DELETE FROM estimates WHERE request_id IN {JSON_IDS}",
            f"DELETE FROM unsettled WHERE {SETTLED_IN_BATCH}",
            f"DELETE FROM background WHERE {SETTLED_IN_BATCH}",
        ),
    ),
    ErasureStep(
        "stored objects",  # all accounts': there is no index of those of an account
        """SELECT 0 AS at, id, account_id = :account AS is_due FROM stored_objects
            WHERE id > :id ORDER BY id LIMIT :rows""",
        (
            f"DELETE FROM billed_containers WHERE {IN_BATCH}",
            f"DELETE FROM stored_objects WHERE {IN_BATCH}",
        ),
    ),
    ErasureStep(
        "notices",
        page_of("notices"),
        (
            f"DELETE FROM webhook_messages WHERE {IN_BATCH}",
            f"DELETE FROM notices WHERE {IN_BATCH}",
        ),
    ),
    ErasureStep(
        "models without a price",
        """SELECT 0 AS at, model AS id, 1 AS is_due FROM unpriced_model_accounts
            WHERE account_id = :account AND model > :id ORDER BY model LIMIT :rows""",
        (
            f"""DELETE FROM unpriced_model_accounts WHERE model IN {JSON_IDS}
                   AND account_id = (SELECT account_id FROM erasing)""",
        ),
    ),
    ErasureStep(
        "webhook messages",
        """SELECT number AS at, id, 1 AS is_due FROM webhook_messages
            WHERE number > :at AND data ->> 'account' IN (
                   SELECT name FROM accounts WHERE id = :account UNION ALL SELECT :account)
            ORDER BY number LIMIT :rows""",
        (f"DELETE FROM webhook_messages WHERE {IN_BATCH}",),
    ),
    ErasureStep(
        "payments",
        page_of("payments"),
        (
            f"""UPDATE payments SET reference = NULL, reason = iif(reason IS NULL, NULL, 'erased'),
                   added_by = iif({BY_A_MEMBER.format(table="payments", name="added_by")},
                                  'erased', added_by)
                 WHERE {IN_BATCH}""",
        ),
    ),
    ErasureStep(
        "log of changes",
        """SELECT id AS at, id, 1 AS is_due FROM changes
            WHERE account_id = :account AND id > :at ORDER BY id LIMIT :rows""",
        (
            f"""UPDATE changes SET before = iif(before IS NULL, NULL, '{{}}'),
                   after = iif(after IS NULL, NULL, '{{}}'),
                   changed_by = iif({BY_A_MEMBER.format(table="changes", name="changed_by")},
                                    'erased', changed_by)
                 WHERE {IN_BATCH}""",
        ),
    ),
    # The last one: until then, the name tells which signatures are those of members.
    ErasureStep(
        "account",
        """SELECT 0 AS at, id, 1 AS is_due FROM accounts
            WHERE id = :account AND id > :id LIMIT :rows""",
        (f"UPDATE accounts SET name = id, email = NULL, status_reason = NULL WHERE {IN_BATCH}",),
    ),
)
PENDING = "SELECT count(*) AS rows FROM requests WHERE outcome = 'pending' AND account_id = ?"
MARK_ERASED = "UPDATE accounts SET erased_at = ? WHERE id = ? AND erased_at IS NULL"
DUE = """
    SELECT id FROM accounts WHERE status = 'terminated' AND erase_at <= ? AND erased_at IS NULL
     ORDER BY erase_at"""

# Aborts all that runs for an account, waits for a while until it has ended, and returns whether it
# has.
EndAccount = Callable[[str], Awaitable[bool]]


class ErasureProgress(Struct):
    """The step of an erasure that goes on, and how many rows of it were erased so far."""

    step: str
    rows: int


class ErasureEnd(Struct):
    """The end of an erasure. `missing` says what is left to be done, "" if nothing is; then the
    same erasure is due again."""

    account_id: str
    missing: str


async def erase_account(
    store: Store, request_log: RequestLog, account_id: str, end: EndAccount, by: str
) -> AsyncIterator[ErasureProgress | ErasureEnd]:
    """Erase what identifies a terminated account, and yield the progress and, at last, the result.
    `by` is who is named in the log of changes. Raises StorageUnavailable."""
    has_ended = await end(account_id)
    await store.settle_time()  # what its requests have recorded is written now
    pending = await store.one(PENDING, (account_id,))
    for step in ERASURE_STEPS:
        async for progress in erase_rows(store, account_id, step):
            yield progress
    purged = await request_log.erase(account_id)
    yield ErasureProgress("logged requests", purged.requests)
    if not has_ended or (pending and pending["rows"]):
        yield ErasureEnd(account_id, "some of its requests have not ended")
        return
    yield ErasureProgress("files", 0)
    if not await store.scrub(SCRUB_SECONDS, PAUSE_FACTOR_OF_ERASURE):
        reader = "another program still reads an earlier state of the database"
        yield ErasureEnd(account_id, reader if store.healthy else store.failure)
        return
    await store.transact((MARK_ERASED, (store.time(), account_id)), by=by)
    yield ErasureEnd(account_id, "")


async def erase_rows(
    store: Store, account_id: str, step: ErasureStep
) -> AsyncIterator[ErasureProgress]:
    """Erase the rows of a step, in batches. After each query there is a pause that is as long as
    that took, and after each transaction a longer one, unless the ledger is idle. Yield the
    progress, at least once."""
    position, rows = {"at": -1, "id": ""}, 0
    yield ErasureProgress(step.name, rows)
    while True:
        values = {"account": account_id, "rows": PAGE_OF_ROWS, **position}
        began = time.monotonic()
        page = [row async for row in store.rows(step.page, values)]
        await asyncio.sleep(time.monotonic() - began)
        ids = [row["id"] for row in page if row["is_due"]]
        for first in range(0, len(ids), ERASED_ROWS):
            began = time.monotonic()
            batch = ids[first : first + ERASED_ROWS]
            names = orjson.dumps(batch).decode()
            erase = [(sql, (names,)) for sql in step.erase]
            await store.transact((PERMIT, (account_id,)), *erase, (END_PERMIT, ()))
            rows += len(batch)
            yield ErasureProgress(step.name, rows)
            factor = 1 if store.commits.idle else PAUSE_FACTOR_OF_ERASURE
            await asyncio.sleep(factor * (time.monotonic() - began))
        if len(page) < PAGE_OF_ROWS:
            return
        position = {"at": page[-1]["at"], "id": page[-1]["id"]}


async def due_accounts(store: Store) -> list[str]:
    """Return the ids of the terminated accounts whose time to be erased has come."""
    return [row["id"] async for row in store.rows(DUE, (store.time(),))]


async def erase_due(
    store: Store, request_log: RequestLog, end: EndAccount, by: str = "gateway"
) -> list[ErasureEnd]:
    """Erase all accounts whose time has come, and return the results. What fails is due again."""
    results = []
    for account_id in await due_accounts(store):
        try:
            async for each in erase_account(store, request_log, account_id, end, by):
                if isinstance(each, ErasureEnd):
                    results.append(each)
        except StorageUnavailable as error:
            results.append(ErasureEnd(account_id, str(error)))
    return results
