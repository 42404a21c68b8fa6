"""The log of changes that people made."""

from __future__ import annotations

import orjson

from redbtc.money import NANOS, decimal, shown_limit
from redbtc.store.database import Store
from redbtc.store.records import Record, shown

# The log of administrative changes. Triggers write it (schema.sql), so that nothing can pass it by.
CHANGES = """
    SELECT changes.id, changed_at, changed_by, kind, object_id, accounts.name AS account, before,
           after
      FROM changes LEFT JOIN accounts ON accounts.id = account_id
     WHERE changes.id < :before AND (:account IS NULL OR account_id = :account)
     ORDER BY changes.id DESC LIMIT :limit"""
RATES = (
    "input",
    "cached_input",
    "cache_write",
    "output",
    "image_input",
    "image_output",
    "web_search",
    "cache_write_12h",
    "file_search",
    "container",
)


async def changes(
    store: Store, account_id: str | None, before: int | None, limit: int
) -> list[Record]:
    """The newest so many, of an account or of all, that are older than the one with the id
    `before`. Amounts in them are decimal strings, as everywhere."""
    values = {"account": account_id, "before": before or 1 << 62, "limit": limit}
    found = []
    async for row in store.rows(CHANGES, values):
        record = shown(row)
        for side in ("before", "after"):
            if record[side] is not None:
                record[side] = _columns(record["kind"], orjson.loads(record[side]))
        found.append(record)
    return found


def _columns(kind: str, columns: Record) -> Record:
    """What a trigger wrote, as JSON shows it."""
    if kind == "price":
        rates = (name for name in columns if name in RATES)
        columns |= {name: shown_limit(columns[name]) for name in rates}
    if kind == "payment":
        units, nanos = (columns.pop(name) for name in ("units", "nanos"))
        columns = {"amount": decimal(units * NANOS + nanos), **columns}
    return shown(columns)
