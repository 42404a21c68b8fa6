"""What happened to upstreams: the newest changes of their members' states."""

from __future__ import annotations

import sqlite3
from typing import Literal

from msgspec import Struct

from redbtc.store.database import Store
from redbtc.store.json_values import Moment, by_name, json_time, new_id
from redbtc.times import iso_time

UpstreamState = Literal["up", "resting", "out", "unusable"]

# With an id, since a statement is executed again after a commit of unknown fate.
RECORD_CHANGE = """
    INSERT OR IGNORE INTO upstream_changes
           (id, changed_at, upstream, was, state, reason, model, until, changed_by)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
NEWEST_CHANGES = """
    SELECT changed_at, upstream, was, state, reason, model, until, changed_by
      FROM upstream_changes ORDER BY number DESC LIMIT ?"""
MAX_REASON, MAX_MODEL = 100, 256  # characters (schema.sql)


def record_upstream_change(
    store: Store,
    upstream: str,
    states: tuple[str, str],
    reason: str,
    model: str,
    until: int | None,
    by: str,
) -> None:
    """Record that a member's state has changed, with the next commit. `states` are the one before
    and the present one; `model` is "" for all models and `by` "" for the gateway; `until` is in
    milliseconds of the ledger's time."""
    what = (upstream, *states, reason, model or None, until, by or None)
    values = (new_id("upc"), store.time(), *what)
    store.record(RECORD_CHANGE, values, retry_until_written=True, durable=False)


async def newest_upstream_changes(store: Store, limit: int) -> list[UpstreamChangeShown]:
    """Return the newest `limit` changes, newest first."""
    return [UpstreamChangeShown.of(row) async for row in store.rows(NEWEST_CHANGES, (limit,))]


class UpstreamChangeShown(Struct):
    """A change of an upstream's state. If `model` is null, it concerns all models; if `until` is
    null, its end is not known; if `changed_by` is null, the gateway itself made it."""

    changed_at: Moment
    upstream: str
    was: UpstreamState
    state: UpstreamState
    reason: str
    model: str | None
    until: Moment | None
    changed_by: str | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> UpstreamChangeShown:
        """Return the change of a row."""
        times = {"changed_at": json_time(row["changed_at"]), "until": iso_time(row["until"])}
        return cls(**{**by_name(row), **times})
