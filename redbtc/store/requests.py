"""Begin and settle the rows of requests."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from redbtc.store.database import Store
from redbtc.store.request_rows import REQUEST_ROWS
from redbtc.store.rows import COLUMNS, FORGET, RECORD, values_of
from redbtc.usage import RequestRow


# The ledger proper: a row is begun when its request leaves for an upstream and settled at its end.
async def begin(store: Store, row: RequestRow) -> None:
    """Commit the row as pending. Raises StorageUnavailable; then it will not be in the ledger."""
    row.run = store.run
    values, undo = values_of(row), (FORGET, (row.request_id,))
    await store.record(RECORD, values, kind=REQUEST_ROWS, undo=undo, retry_until_written=False)


class Admitted(NamedTuple):
    """What the correction of an estimated request needs: when the request was admitted, by the
    ledger's time, which chooses its prices; the model of its image tool; and the nanos that were
    held for it."""

    at: int
    image_model: str
    held: int


async def settle(store: Store, row: RequestRow, admitted: Admitted | None = None) -> None:
    """Commit the row as it ended, however long that takes. With `admitted`, an estimated row can be
    corrected when its response is fetched later."""
    values = values_of(row)
    written = store.record(RECORD, values, kind=REQUEST_ROWS, retry_until_written=True)
    if admitted and row.usage_source == "estimated" and row.response_id:
        estimate = (row.response_id, row.request_id, *admitted)
        written = store.record(KEEP_ESTIMATE, estimate, retry_until_written=True)
    await written


def keep_unsettled(store: Store, row: RequestRow, admitted: Admitted | None) -> None:
    """Keep what a request in flight has used so far, in case the process is killed. `row` is the
    request's row as if it had just ended; `admitted` as in `settle`."""
    settled = orjson.dumps(dict(zip(COLUMNS, values_of(row), strict=True))).decode()
    values = (row.request_id, settled, *(admitted or (None, None, None)))
    store.record(KEEP_UNSETTLED, values, retry_until_written=True, durable=False)


def drop_unsettled(store: Store, row: RequestRow) -> None:
    """Remove what `keep_unsettled` wrote for a request, in the commit of what is recorded next."""
    store.record(DROP_UNSETTLED, (row.request_id,), retry_until_written=True, durable=False)


async def forget(store: Store, row: RequestRow) -> None:
    """Take back a pending row whose request did not leave for the upstream after all."""
    await store.record(FORGET, (row.request_id,), retry_until_written=True)


KEEP_ESTIMATE = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
KEEP_UNSETTLED = """
    INSERT OR REPLACE INTO unsettled (request_id, settled, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
DROP_UNSETTLED = "DELETE FROM unsettled WHERE request_id = ?"
