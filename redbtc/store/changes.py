"""Read the log of administrative changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import orjson
from msgspec import Struct

from redbtc.money import decimal, json_limit
from redbtc.rates import RATES
from redbtc.store.accounts import CLOSING_TIMES
from redbtc.store.database import Store
from redbtc.store.json_values import (
    Moment,
    by_name,
    json_amount,
    json_factor,
    json_patterns,
    json_time,
    nanos_of,
)
from redbtc.times import iso_time

# The log of administrative changes. Triggers write it (schema.sql), so that nothing can pass it by.
CHANGES = """
    SELECT changes.id, changed_at, changed_by, kind, object_id, accounts.name AS account, before,
           after
      FROM changes LEFT JOIN accounts ON accounts.id = account_id
     WHERE changes.id < :before AND (:account IS NULL OR account_id = :account)
     ORDER BY changes.id DESC LIMIT :limit"""


async def changes(
    store: Store, account_id: str | None, before: int | None, limit: int
) -> list[Change]:
    """Return the newest `limit` changes, of an account or of all, that are older than the change
    with the id `before`."""
    values = {"account": account_id, "before": before or 1 << 62, "limit": limit}
    return [Change.of(row) async for row in store.rows(CHANGES, values)]


# How JSON shows the columns that a trigger wrote to the log of changes, by kind of change. Other
# columns are shown as they are.
CHANGED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "account": {
        "credit_limit": json_limit,
        "monthly_budget": json_limit,
        "throttle_factor": json_factor,
        "throttled_until": iso_time,
        **dict.fromkeys(CLOSING_TIMES, iso_time),
    },
    "key": {
        "models": json_patterns,
        "monthly_budget": json_limit,
        "expires_at": iso_time,
        "revoked_at": iso_time,
        "compromised": bool,
    },
    "price": {"effective_at": iso_time, **dict.fromkeys(RATES, json_amount)},
    "payment": {},
    "notice": {
        "effective_at": iso_time,
        "until": iso_time,
        "refuses_requests": bool,
        "withdrawn_at": iso_time,
    },
    "user": {"password_set_at": iso_time, "link_expires_at": iso_time},
    "time": {"ledger_at": iso_time},
    "request_log": {},
    "retention": {},
    "terms": {"effective_at": iso_time},
}


def json_columns(kind: str, columns: str | None) -> dict[str, Any] | None:
    """Return what a trigger wrote to the log of changes, as JSON shows it."""
    if columns is None:
        return None
    written = orjson.loads(columns)
    if kind == "payment" and "units" in written:  # else its account was erased
        amount = nanos_of(written.pop("units"), written.pop("nanos"))
        written = {"amount": decimal(amount), **written}
    as_shown = {
        name: show(written[name]) for name, show in CHANGED[kind].items() if name in written
    }
    return {**written, **as_shown}


class Change(Struct):
    """A change that an administrator made. If `before` is null, the object was added; if `after` is
    null, it was removed."""

    id: int
    changed_at: Moment
    changed_by: str
    kind: str
    object_id: str
    account: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> Change:
        """Return the change of a row."""
        columns = {
            **by_name(row),
            "changed_at": json_time(row["changed_at"]),
            "before": json_columns(row["kind"], row["before"]),
            "after": json_columns(row["kind"], row["after"]),
        }
        return cls(**columns)
