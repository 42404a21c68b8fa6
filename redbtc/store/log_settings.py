"""Whose requests are logged: the setting of accounts and keys, who has changed it, and who has read
a stored body."""

from __future__ import annotations

from typing import Literal, NamedTuple

from redbtc.store.database import Store
from redbtc.store.json_values import json_time

BodyName = Literal["request", "response"]

SET_OF_ACCOUNT = "UPDATE accounts SET log_days = ? WHERE id = ?"
SET_OF_KEY = "UPDATE keys SET log_days = ? WHERE id = ?"
CLEAR_KEYS = "UPDATE keys SET log_days = NULL WHERE account_id = ? AND log_days IS NOT NULL"
SETTING_CHANGES = """
    SELECT kind, object_id, changed_at, changed_by FROM changes
     WHERE account_id = ? AND kind IN ('account', 'key')
       AND json_extract(before, '$.log_days') IS NOT json_extract(after, '$.log_days')
     ORDER BY id"""
ADD_CHANGE = """
    INSERT INTO changes VALUES (NULL, (SELECT at FROM acting), (SELECT name FROM acting),
                                'request_log', ?, ?, NULL, json_object(?, ?))"""
READINGS = """
    SELECT changed_at, changed_by, json_extract(after, '$.read') AS body,
           iif(json_extract(after, '$.read') IS NULL, NULL, object_id) AS request_id
      FROM changes
     WHERE account_id = ? AND kind = 'request_log'
       AND coalesce(body, json_extract(after, '$.exported_as_of')) IS NOT NULL
     ORDER BY id DESC LIMIT ?"""
HAS_OWNER = "SELECT 1 FROM users WHERE account_id = ? AND role = 'owner' LIMIT 1"


class Changed(NamedTuple):
    """When a setting was last changed, and by whom."""

    at: str
    by: str


class Reading(NamedTuple):
    """One reading of a stored body, or, without `request_id` and `body`, an export of all."""

    at: str
    by: str
    request_id: str | None
    body: str | None


class LogSettings:
    """Read and change whose requests are logged. `by` is the author of a change."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def set(self, account_id: str, key_id: str | None, days: int, by: str) -> None:
        """Keep bodies of the requests of an account, or of one of its keys, for so many days, from
        the next request on."""
        setting = (SET_OF_KEY, (days, key_id)) if key_id else (SET_OF_ACCOUNT, (days, account_id))
        await self._store.transact(setting, by=by)

    async def clear(self, account_id: str, key_id: str | None, by: str) -> None:
        """Keep no bodies of further requests of an account and of all its keys, or of one key."""
        if key_id:
            await self._store.transact((SET_OF_KEY, (None, key_id)), by=by)
        else:
            await self._store.transact(
                (SET_OF_ACCOUNT, (None, account_id)), (CLEAR_KEYS, (account_id,)), by=by
            )

    async def changed(self, account_id: str) -> dict[str, Changed]:
        """Return the last changes of the setting by the id of the account or key, as far as the log
        of changes has them."""
        rows = self._store.rows(SETTING_CHANGES, (account_id,))
        return {
            row["object_id"]: Changed(json_time(row["changed_at"]), row["changed_by"])
            async for row in rows
        }

    async def has_owner(self, account_id: str) -> bool:
        """Return whether somebody can log in as the account's owner."""
        return await self._store.one(HAS_OWNER, (account_id,)) is not None

    async def note_reading(self, account_id: str, request_id: str, body: BodyName, by: str) -> None:
        """Write to the log of changes that a stored body is read. Raises StorageUnavailable; the
        body must not be shown then."""
        await self._store.transact((ADD_CHANGE, (request_id, account_id, "read", body)), by=by)

    async def note_erasure(self, account_id: str, key_id: str | None, number: int, by: str) -> None:
        """Write to the log of changes that the stored bodies of so many requests were erased."""
        values = (key_id or account_id, account_id, "erased_requests", number)
        await self._store.transact((ADD_CHANGE, values), by=by)

    async def readings(self, account_id: str, limit: int) -> list[Reading]:
        """Return the last readings of the account's bodies, newest first."""
        return [
            Reading(json_time(row["changed_at"]), row["changed_by"], row["request_id"], row["body"])
            async for row in self._store.rows(READINGS, (account_id, limit))
        ]
