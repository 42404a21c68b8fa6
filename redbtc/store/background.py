"""Keep the rows of background responses that have not ended yet."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from redbtc.store.database import Store
from redbtc.store.keys import FULL_KEY, Key
from redbtc.store.request_rows import REQUEST_ROWS
from redbtc.store.request_sql import COLUMNS, RECORD, row_of, values_of
from redbtc.store.requests import CorrectionFacts, settle_row
from redbtc.usage import RequestRow

KEEP_PENDING = """
    INSERT OR IGNORE INTO background
           (request_id, admitted_at, held, input_estimate, image_model, text_bytes, seen, most)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
NOTE_PROGRESS = "UPDATE background SET seen = ? WHERE request_id = ?"
DROP_BACKGROUND = "DELETE FROM background WHERE request_id = ?"
BACKGROUND = f"""
    SELECT {", ".join(f"requests.{name}" for name in COLUMNS)},
           admitted_at, held, input_estimate, image_model, text_bytes, seen, most
      FROM background JOIN requests USING (request_id)
     WHERE requests.outcome = 'pending' AND requests.response_id IS NOT NULL"""
KEY_OF = FULL_KEY + " WHERE keys.id = ?1"
MUST_STOP = """
    SELECT 1 FROM keys JOIN accounts ON accounts.id = account_id
     WHERE keys.id = ? AND (compromised OR accounts.status = 'terminated')"""


def must_stop(store: Store, key_id: str) -> bool:
    """Return whether nothing may go on for a key: it was reported as compromised, or its account is
    terminated. Raises StorageUnavailable."""
    return store.look_up(MUST_STOP, (key_id,)) is not None


class UnfinishedRow(NamedTuple):
    """Facts about a background response beside its row. schema.sql explains each field."""

    admitted_at: int
    held: int
    input_estimate: int
    image_model: str
    text_bytes: int = 0
    seen: str | None = None
    most: str | None = None


def keep_pending(store: Store, row: RequestRow, unfinished: UnfinishedRow) -> asyncio.Future[None]:
    """Keep the row pending, since its response goes on at the upstream. Return a future that is
    done when this is on disk."""
    store.record(RECORD, values_of(row), kind=REQUEST_ROWS, retry_until_written=True)
    return store.record(KEEP_PENDING, (row.request_id, *unfinished), retry_until_written=True)


def note_progress(store: Store, row: RequestRow, seen: str) -> asyncio.Future[None]:
    """Save the progress of a background response, as JSON. Return a future that is done when this
    and all changes before it are on disk."""
    return store.record(NOTE_PROGRESS, (seen, row.request_id), retry_until_written=True)


async def end_background(store: Store, row: RequestRow, correction_facts: CorrectionFacts) -> None:
    """Commit the row as its background response ended."""
    ended = store.record(DROP_BACKGROUND, (row.request_id,), retry_until_written=True)
    await settle_row(store, row, correction_facts)
    await ended


async def unfinished_rows(store: Store) -> list[tuple[RequestRow, Key, UnfinishedRow]]:
    """Return the rows of background responses that an earlier process did not see end."""
    found = []
    async for each in store.rows(BACKGROUND):
        row = row_of(each)
        unfinished = UnfinishedRow(**{name: each[name] for name in UnfinishedRow._fields})
        found.append((row, key_of(store, row.key_id), unfinished))
    return found


def key_of(store: Store, key_id: str) -> Key:
    """Return the key with an id, whether in force or not. Raises StorageUnavailable."""
    return Key(*(store.look_up(KEY_OF, (key_id, store.time())) or ()))
