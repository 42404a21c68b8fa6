"""Accounts and their keys."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from redbtc.errors import Conflict, NotFound
from redbtc.store.database import Store
from redbtc.store.keys import hash_of_key, new_key
from redbtc.store.records import Record, new_id, shown
from redbtc.times import day_of, iso_time

LIMITS = ("concurrency", "requests_per_minute", "tokens_per_minute")
KEY_LIMITS = (*LIMITS, "monthly_budget")
ACCOUNT_LIMITS = (*KEY_LIMITS, "credit_limit")
CHANGEABLE = ("email", *ACCOUNT_LIMITS)
ACCOUNT = f"""
    SELECT id, name, email, status, status_reason, {", ".join(ACCOUNT_LIMITS)},
           iif(ifnull(throttled_until, ?1 + 1) > ?1, throttle_factor, NULL) AS throttle_factor,
           iif(throttled_until > ?1, throttled_until, NULL) AS throttled_until, created_at,
           (SELECT count(*) FROM keys WHERE account_id = accounts.id AND revoked_at IS NULL
               AND ifnull(expires_at, ?1 + 1) > ?1) AS keys_in_force
      FROM accounts"""
ACCOUNT_BY_NAME = ACCOUNT + " WHERE name = ?2 OR id = ?2"
ADD_ACCOUNT = f"""
    INSERT INTO accounts (id, name, email, {", ".join(ACCOUNT_LIMITS)}, created_at)
    VALUES (?, ?, ?, {"?, " * len(ACCOUNT_LIMITS)} ?)"""
SET_ACCOUNT = f"""
    UPDATE accounts SET {", ".join(f"{name} = iif(?, ?, {name})" for name in CHANGEABLE)}
     WHERE id = ?"""
SET_STATUS = "UPDATE accounts SET status = ?, status_reason = ? WHERE id = ?"
THROTTLE = "UPDATE accounts SET throttle_factor = ?, throttled_until = ? WHERE id = ?"
END_SESSIONS = """
    DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE account_id = ?)"""
KEY = f"""
    SELECT keys.id, accounts.name AS account, account_id, keys.label, keys.models,
           {", ".join(f"keys.{limit}" for limit in KEY_LIMITS)}, keys.created_at, keys.expires_at,
           keys.revoked_at, keys.compromised, ifnull(keys.budget_id, keys.id) AS budget_id
      FROM keys JOIN accounts ON accounts.id = keys.account_id"""
KEY_BY_ID = KEY + " WHERE keys.id = ?"
KEYS_OF_ACCOUNT = KEY + " WHERE accounts.id = ? ORDER BY keys.created_at, keys.rowid"
LAST_USED = "SELECT key_id, max(day) FROM usage_by_day WHERE account_id = ? GROUP BY key_id"
NEW_KEY = f"""
    INSERT INTO keys (id, hash, account_id, label, models, {", ".join(KEY_LIMITS)}, created_at,
                      expires_at, budget_id)"""
ADD_KEY = f"""{NEW_KEY}
    SELECT ?, ?, id, ?, ?, {"?, " * len(KEY_LIMITS)} ?, ?, NULL FROM accounts WHERE id = ?"""
COPY_KEY = f"""{NEW_KEY}
    SELECT ?, ?, account_id, label, models, {", ".join(KEY_LIMITS)}, ?, expires_at,
           ifnull(budget_id, id)
      FROM keys WHERE id = ?"""
EXPIRE_KEY = "UPDATE keys SET expires_at = min(ifnull(expires_at, ?1), ?1) WHERE id = ?2"
REVOKE_KEY = """
    UPDATE keys SET revoked_at = ifnull(revoked_at, ?), compromised = max(compromised, ?)
     WHERE id = ?"""


class Accounts:
    """Accounts and their keys. An account is named by its name or its id. `by`: who makes the
    change."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def show(self, name: str) -> Record:
        """Raises NotFound."""
        account = await self._store.one(ACCOUNT_BY_NAME, (self._store.time(), name))
        if account is None:
            raise no_account(name)
        return shown(account)

    async def any(self) -> bool:
        """Whether there is one."""
        return await self._store.one("SELECT 1 FROM accounts LIMIT 1") is not None

    async def add(
        self, name: str, email: str | None, limits: Mapping[str, int | None], by: str
    ) -> Record:
        """Raises Conflict where the name is taken."""
        of_limits = (limits.get(limit) for limit in ACCOUNT_LIMITS)
        values = (new_id("acct"), name, email, *of_limits, self._store.time())
        try:
            await self._store.transact((ADD_ACCOUNT, values), by=by)
        except sqlite3.IntegrityError:
            raise Conflict(f"account {name!r} already exists") from None
        return await self.show(name)

    async def set(self, account_id: str, changes: Mapping[str, Any], by: str) -> Record:
        """Change the given ones of email and limits; a limit of None is the settings' again."""
        values = [part for name in CHANGEABLE for part in (name in changes, changes.get(name))]
        await self._store.transact((SET_ACCOUNT, (*values, account_id)), by=by)
        return await self.show(account_id)

    async def suspend(self, account_id: str, reason: str | None, by: str) -> Record:
        """Refuse its requests from the next one on, and log its members out."""
        suspension = (SET_STATUS, ("suspended", reason, account_id))
        await self._store.transact(suspension, (END_SESSIONS, (account_id,)), by=by)
        return await self.show(account_id)

    async def resume(self, account_id: str, by: str) -> Record:
        """Serve its requests again."""
        await self._store.transact((SET_STATUS, ("active", None, account_id)), by=by)
        return await self.show(account_id)

    async def throttle(
        self, account_id: str, factor: int | None, until: int | None, by: str
    ) -> Record:
        """Hold it to so many thousandths of its limits, up to `until` or until that is lifted;
        None lifts it."""
        await self._store.transact((THROTTLE, (factor, until, account_id)), by=by)
        return await self.show(account_id)

    async def keys(self, account_id: str) -> list[Record]:
        """The account's keys, oldest first, without what would let one use them. `last_used_on` is
        a day (UTC)."""
        days = {row[0]: row[1] async for row in self._store.rows(LAST_USED, (account_id,))}
        return [
            {**shown(row), "last_used_on": day_of(days[row["id"]]) if row["id"] in days else None}
            async for row in self._store.rows(KEYS_OF_ACCOUNT, (account_id,))
        ]

    async def key(self, key_id: str) -> Record:
        """Raises NotFound."""
        key = await self._store.one(KEY_BY_ID, (key_id,))
        if key is None:
            raise no_key(key_id)
        return shown(key)

    async def add_key(
        self,
        account_id: str,
        label: str,
        expires_at: int | None,
        limits: Mapping[str, int | None],
        by: str,
        models: str | None = None,
    ) -> Record:
        """A new key; `key` in the answer is the only copy of it there will ever be."""
        secret, key_id = new_key(), new_id("key")
        of_limits = (limits.get(limit) for limit in KEY_LIMITS)
        now = self._store.time()
        values = (key_id, hash_of_key(secret), label, models, *of_limits, now, expires_at)
        await self._store.transact((ADD_KEY, (*values, account_id)), by=by)
        return {"id": key_id, "key": secret, **await self.key(key_id)}

    async def revoke_key(self, key_id: str, compromised: bool, by: str) -> Record:
        """Refuse it from the next request on. Revoking twice keeps the first time."""
        await self._store.transact((REVOKE_KEY, (self._store.time(), compromised, key_id)), by=by)
        return await self.key(key_id)

    async def rotate_key(self, key_id: str, overlap_ms: int, by: str) -> Record:
        """A new key with the old one's label, limits, expiry and spent budget; the old one goes on
        for `overlap_ms`. Raises Conflict where the old one is no longer in force."""
        old, now = await self.key(key_id), self._store.time()
        if old["revoked_at"] or (old["expires_at"] and old["expires_at"] <= str(iso_time(now))):
            raise Conflict(f"key {key_id} is revoked or expired; create a new key instead")
        secret, added = new_key(), new_id("key")
        await self._store.transact(
            (COPY_KEY, (added, hash_of_key(secret), now, key_id)),
            (EXPIRE_KEY, (now + overlap_ms, key_id)),
            by=by,
        )
        return {"id": added, "key": secret, **await self.key(added), "replaces": key_id}


def no_account(name: str) -> NotFound:
    """What is another's is not found, like what never was."""
    return NotFound(f"account {name!r} does not exist")


def no_key(key_id: str) -> NotFound:
    """The same for a key."""
    return NotFound(f"key {key_id!r} does not exist")
