"""Begin and settle the rows of requests.

A row is begun when its request leaves for an upstream, and settled at its end. One statement does
both, so that writing it again after a commit of unknown fate changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import orjson

from redbtc.store.database import Store
from redbtc.store.request_rows import REQUEST_ROWS
from redbtc.store.request_sql import COLUMNS, FORGET, RECORD, values_of
from redbtc.usage import RequestRow

KEEP_ESTIMATE = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
RECORD_PROGRESS = """
    INSERT OR REPLACE INTO unsettled (request_id, settled, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
DROP_PROGRESS = "DELETE FROM unsettled WHERE request_id = ?"


COSTS_OF = """
    SELECT requests.account_id, ifnull(keys.budget_id, keys.id), cost
      FROM requests JOIN keys ON keys.id = key_id
     WHERE request_id IN (SELECT value FROM json_each(?)) AND outcome <> 'pending' AND cost > 0"""


async def begin_row(store: Store, row: RequestRow) -> None:
    """Commit the row as pending. Raises StorageUnavailable; then it will not be in the ledger."""
    row.run = store.run
    values, undo = values_of(row), (FORGET, (row.request_id,))
    await store.record(RECORD, values, kind=REQUEST_ROWS, undo=undo, retry_until_written=False)


class CorrectionFacts(NamedTuple):
    """Facts about the admission of a request that the correction of its estimate needs."""

    at: int  # the ledger's time, which chooses the prices
    image_model: str  # of its image tool
    held: int  # nanos


async def settle_row(
    store: Store, row: RequestRow, correction_facts: CorrectionFacts | None = None
) -> None:
    """Commit the row as it ended, however long that takes. With `correction_facts`, an estimated
    row can be corrected when its response is fetched later."""
    values = values_of(row)
    written = store.record(RECORD, values, kind=REQUEST_ROWS, retry_until_written=True)
    if correction_facts and row.usage_source == "estimated" and row.response_id:
        estimate = (row.response_id, row.request_id, *correction_facts)
        written = store.record(KEEP_ESTIMATE, estimate, retry_until_written=True)
    await written


def record_progress(
    store: Store, row: RequestRow, correction_facts: CorrectionFacts | None
) -> None:
    """Save what a request in flight has used so far, in case the process is killed. `row` is the
    request's row as if it had just ended; `correction_facts` is as in `settle_row`."""
    settled = orjson.dumps(dict(zip(COLUMNS, values_of(row), strict=True))).decode()
    values = (row.request_id, settled, *(correction_facts or (None, None, None)))
    store.record(RECORD_PROGRESS, values, retry_until_written=True, durable=False)


def drop_progress(store: Store, row: RequestRow) -> None:
    """Remove what `record_progress` wrote for a request, in the commit of what is recorded next."""
    store.record(DROP_PROGRESS, (row.request_id,), retry_until_written=True, durable=False)


async def forget_row(store: Store, row: RequestRow) -> None:
    """Remove a pending row whose request did not leave for the upstream after all."""
    await store.record(FORGET, (row.request_id,), retry_until_written=True)


async def costs_of(store: Store, request_ids: Iterable[str]) -> list[tuple[tuple[str, str], int]]:
    """Return what each of these requests that are settled has cost, in nanos, once for its account
    and once for its key's budget. Raises StorageUnavailable, sqlite3.Error."""
    ids = orjson.dumps(sorted(request_ids)).decode()
    found = []
    async for account_id, budget_id, cost in store.rows(COSTS_OF, (ids,)):
        found += [((account_id, ""), cost), ((account_id, budget_id), cost)]
    return found
