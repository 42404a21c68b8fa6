"""Accounts and their keys."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from msgspec import UNSET, Struct, UnsetType

from redbtc.errors import Conflict, NotFound
from redbtc.money import json_limit
from redbtc.store.database import Store
from redbtc.store.json_values import (
    Moment,
    Money,
    by_name,
    json_factor,
    json_patterns,
    json_time,
    new_id,
)
from redbtc.store.keys import hash_of_key, new_key
from redbtc.times import day_of, iso_time

LIMITS = ("concurrency", "requests_per_minute", "tokens_per_minute")
KEY_LIMITS = (*LIMITS, "monthly_budget")
ACCOUNT_LIMITS = (*KEY_LIMITS, "credit_limit")
CHANGEABLE = ("email", *ACCOUNT_LIMITS)
CLOSING_TIMES = ("closing_asked_at", "terminated_at", "erase_at", "erased_at")
ACCOUNT = f"""
    SELECT id, name, email, status, status_reason, {", ".join(ACCOUNT_LIMITS)},
           iif(ifnull(throttled_until, ?1 + 1) > ?1, throttle_factor, NULL) AS throttle_factor,
           iif(throttled_until > ?1, throttled_until, NULL) AS throttled_until, created_at,
           log_days, closing_asked_at, terminated_at, erase_at, erased_at,
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
           keys.revoked_at, keys.compromised, keys.log_days,
           ifnull(keys.budget_id, keys.id) AS budget_id
      FROM keys JOIN accounts ON accounts.id = keys.account_id"""
KEY_BY_ID = KEY + " WHERE keys.id = ?"
KEYS_BY_NAME = KEY + " WHERE keys.id = ?1 OR keys.label = ?1 AND keys.revoked_at IS NULL"
KEYS_OF_ACCOUNT = KEY + " WHERE accounts.id = ? ORDER BY keys.created_at, keys.rowid"
LAST_USED = "SELECT key_id, max(day) AS day FROM usage_by_day WHERE account_id = ? GROUP BY key_id"
NEW_KEY = f"""
    INSERT INTO keys (id, hash, account_id, label, models, {", ".join(KEY_LIMITS)}, created_at,
                      expires_at, budget_id, log_days)"""
ADD_KEY = f"""{NEW_KEY}
    SELECT ?, ?, id, ?, ?, {"?, " * len(KEY_LIMITS)} ?, ?, NULL, NULL FROM accounts WHERE id = ?"""
COPY_KEY = f"""{NEW_KEY}
    SELECT ?, ?, account_id, label, models, {", ".join(KEY_LIMITS)}, ?, expires_at,
           ifnull(budget_id, id), log_days
      FROM keys WHERE id = ?"""
EXPIRE_KEY = "UPDATE keys SET expires_at = min(ifnull(expires_at, ?1), ?1) WHERE id = ?2"
REVOKE_KEY = """
    UPDATE keys SET revoked_at = ifnull(revoked_at, ?), compromised = max(compromised, ?)
     WHERE id = ?"""

IN_FORCE_KEY = "id = ?1 AND revoked_at IS NULL AND ifnull(expires_at, ?2 + 1) > ?2"
REPLACE_KEY = f"""{NEW_KEY}
    SELECT ?3, ?4, account_id, label, models, {", ".join(KEY_LIMITS)}, ?2, expires_at,
           ifnull(budget_id, id), log_days
      FROM keys WHERE {IN_FORCE_KEY}"""
MARK_COMPROMISED = f"""
    UPDATE keys SET revoked_at = ifnull(revoked_at, ?2), compromised = 1
     WHERE id = ?1 AND NOT ({IN_FORCE_KEY})"""
REVOKE_COMPROMISED = f"UPDATE keys SET revoked_at = ?2, compromised = 1 WHERE {IN_FORCE_KEY}"
SIBLINGS = """
    SELECT other.id FROM keys JOIN keys AS other USING (account_id)
     WHERE keys.id = ?1 AND other.id NOT IN (?1, ?3) AND other.revoked_at IS NULL
       AND ifnull(other.expires_at, ?2 + 1) > ?2
       AND (other.label = keys.label AND keys.label <> ''
            OR ifnull(other.budget_id, other.id) = ifnull(keys.budget_id, keys.id))
     ORDER BY other.created_at, other.rowid"""


class Accounts:
    """Read and change accounts and their keys. `by` is the author of a change."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, name: str) -> Account:
        """Return the account with a name or an id. Raises NotFound."""
        account = await self._store.one(ACCOUNT_BY_NAME, (self._store.time(), name))
        if account is None:
            raise no_account(name)
        return Account.of(account)

    async def exist(self) -> bool:
        """Return whether there is an account."""
        return await self._store.one("SELECT 1 FROM accounts LIMIT 1") is not None

    async def add(
        self, name: str, email: str | None, limits: Mapping[str, int | None], by: str
    ) -> Account:
        """Add an account and return it. Raises Conflict if the name is taken."""
        of_limits = (limits.get(limit) for limit in ACCOUNT_LIMITS)
        values = (new_id("acct"), name, email, *of_limits, self._store.time())
        try:
            await self._store.transact((ADD_ACCOUNT, values), by=by)
        except sqlite3.IntegrityError:
            raise Conflict(f"account {name!r} already exists") from None
        return await self.get(name)

    async def set(self, account_id: str, changes: Mapping[str, Any], by: str) -> Account:
        """Change the given ones of email and limits. A limit of None is the settings' again."""
        values = [part for name in CHANGEABLE for part in (name in changes, changes.get(name))]
        await self._store.transact((SET_ACCOUNT, (*values, account_id)), by=by)
        return await self.get(account_id)

    async def suspend(self, account_id: str, reason: str | None, by: str) -> Account:
        """Refuse the account's requests from the next one on, and log its members out."""
        suspension = (SET_STATUS, ("suspended", reason, account_id))
        await self._store.transact(suspension, (END_SESSIONS, (account_id,)), by=by)
        return await self.get(account_id)

    async def resume(self, account_id: str, by: str) -> Account:
        """Serve the account's requests again."""
        await self._store.transact((SET_STATUS, ("active", None, account_id)), by=by)
        return await self.get(account_id)

    async def throttle(
        self, account_id: str, factor: int | None, until: int | None, by: str
    ) -> Account:
        """Reduce the account's limits to `factor` thousandths, until the time `until` or without an
        end. A factor of None restores them."""
        await self._store.transact((THROTTLE, (factor, until, account_id)), by=by)
        return await self.get(account_id)

    async def keys(self, account_id: str) -> list[KeyInList]:
        """Return the account's keys, oldest first, without their secrets. `last_used_on` is a day
        (UTC)."""
        rows = self._store.rows(LAST_USED, (account_id,))
        days = {row["key_id"]: day_of(row["day"]) async for row in rows}
        return [
            KeyInList.of(row, last_used_on=days.get(row["id"]))
            async for row in self._store.rows(KEYS_OF_ACCOUNT, (account_id,))
        ]

    async def key(self, key_id: str) -> KeyShown:
        """Return the key with an id. Raises NotFound."""
        return KeyShown.of(await self._key(key_id))

    async def key_named(self, name: str) -> KeyShown:
        """Return the key with an id or a label. Raises NotFound, or Conflict if keys with the label
        may use different models."""
        found = [KeyShown.of(row) async for row in self._store.rows(KEYS_BY_NAME, (name,))]
        if not found:
            raise NotFound(f"no key has the id or label {name!r}")
        if any(each.models != found[0].models for each in found):
            ids = ", ".join(each.id for each in found)
            raise Conflict(f"several keys have the label {name!r}; give one of their ids: {ids}")
        return found[0]

    async def _key(self, key_id: str) -> sqlite3.Row:
        key = await self._store.one(KEY_BY_ID, (key_id,))
        if key is None:
            raise no_key(key_id)
        return key

    async def add_key(
        self,
        account_id: str,
        label: str,
        expires_at: int | None,
        limits: Mapping[str, int | None],
        by: str,
        models: str | None = None,
    ) -> KeyAdded:
        """Add a key and return it. `key` in the result is the only copy of the key."""
        secret, key_id = new_key(), new_id("key")
        of_limits = (limits.get(limit) for limit in KEY_LIMITS)
        now = self._store.time()
        values = (key_id, hash_of_key(secret), label, models, *of_limits, now, expires_at)
        await self._store.transact((ADD_KEY, (*values, account_id)), by=by)
        return KeyAdded.of(await self._key(key_id), key=secret)

    async def revoke_key(self, key_id: str, compromised: bool, by: str) -> KeyShown:
        """Refuse the key from the next request on. Revoking it again keeps the first time."""
        await self._store.transact((REVOKE_KEY, (self._store.time(), compromised, key_id)), by=by)
        return await self.key(key_id)

    async def rotate_key(self, key_id: str, overlap_ms: int, by: str) -> KeyAdded:
        """Add a key with the label, limits, expiry and spent budget of an old one, which stays in
        force for `overlap_ms`. Raises Conflict if the old key is not in force any more."""
        old, now = await self._key(key_id), self._store.time()
        if old["revoked_at"] is not None or (old["expires_at"] or now + 1) <= now:
            raise Conflict(f"key {key_id} is revoked or expired; create a new key instead")
        secret, added = new_key(), new_id("key")
        await self._store.transact(
            (COPY_KEY, (added, hash_of_key(secret), now, key_id)),
            (EXPIRE_KEY, (now + overlap_ms, key_id)),
            by=by,
        )
        return await self.added_key(added, secret, key_id)

    async def compromise_key(self, key_id: str, by: str, *, replace: bool) -> CompromisedKey:
        """Revoke a key as compromised and, in the same transaction, add one with its label, models,
        limits, expiry and budget, if `replace` is true and the key was in force. A key that was
        not in force is only marked, so that repeating this adds no second key."""
        now, secret, added = self._store.time(), new_key(), new_id("key")
        which = (key_id, now)
        adding = [(REPLACE_KEY, (*which, added, hash_of_key(secret)))] if replace else []
        revoked = await self._store.transact(
            *adding, (MARK_COMPROMISED, which), (REVOKE_COMPROMISED, which), by=by
        )
        was_in_force = revoked == 1
        return CompromisedKey(was_in_force, added if replace and was_in_force else None, secret)

    async def added_key(self, key_id: str, secret: str, replaces: str) -> KeyAdded:
        """Return a key that was added in the place of another one, with its secret."""
        return KeyAdded.of(await self._key(key_id), key=secret, replaces=replaces)

    async def siblings(self, key_id: str, other_than: str | None) -> list[str]:
        """Return the ids of the keys in force with the label or the budget of a key, without the
        key itself and `other_than`."""
        values = (key_id, self._store.time(), other_than or "")
        return [row["id"] async for row in self._store.rows(SIBLINGS, values)]


class CompromisedKey(NamedTuple):
    """The result of reporting a key as compromised: whether it was in force until then, and the
    id and the secret of the key that was added in its place (None: none was added)."""

    was_in_force: bool
    added_id: str | None
    secret: str


def no_account(name: str) -> NotFound:
    """Return the error for an account that does not exist, or that the caller may not see."""
    return NotFound(f"account {name!r} does not exist")


def no_key(key_id: str) -> NotFound:
    """Return the error for a key that does not exist, or that the caller may not see."""
    return NotFound(f"key {key_id!r} does not exist")


class Account(Struct, kw_only=True):
    """An account, with its limits. A limit of null falls back to the settings'; a budget of null
    means no budget. Only operators see `status_reason`. `log_days` is for how many days bodies of
    its requests are kept; null: they are not."""

    id: str
    name: str
    email: str | None
    status: Literal["active", "suspended", "terminated"]
    status_reason: str | UnsetType | None = UNSET
    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_budget: Money | None
    credit_limit: str | None
    throttle_factor: Money | None
    throttled_until: Moment | None
    created_at: Moment
    keys_in_force: int
    log_days: int | None
    closing_asked_at: Moment | None
    terminated_at: Moment | None
    erase_at: Moment | None
    erased_at: Moment | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> Account:
        """Return the account of a row."""
        return cls(**account_columns(row))


def account_columns(row: sqlite3.Row) -> dict[str, Any]:
    """Return what JSON shows of an account, from a row that may have more columns."""
    columns = by_name(row)
    return {name: columns[name] for name in Account.__struct_fields__} | {
        "monthly_budget": json_limit(row["monthly_budget"]),
        "credit_limit": json_limit(row["credit_limit"]),
        "throttle_factor": json_factor(row["throttle_factor"]),
        "throttled_until": iso_time(row["throttled_until"]),
        "created_at": json_time(row["created_at"]),
        **{name: iso_time(row[name]) for name in CLOSING_TIMES},
    }


def key_columns(row: sqlite3.Row) -> dict[str, Any]:
    """Return the columns of a key's row, as JSON shows them."""
    return {
        **by_name(row),
        "models": json_patterns(row["models"]),
        "monthly_budget": json_limit(row["monthly_budget"]),
        "created_at": json_time(row["created_at"]),
        "expires_at": iso_time(row["expires_at"]),
        "revoked_at": iso_time(row["revoked_at"]),
        "compromised": bool(row["compromised"]),
    }


class KeyShown(Struct):
    """A key, without the secret. A limit of null falls back to the account's; a budget of null
    means no budget. Keys with the same `budget_id` (the id of the first of them) replaced one
    another and share a monthly budget."""

    id: str
    account: str
    account_id: str
    label: str
    models: list[str] | None
    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_budget: Money | None
    created_at: Moment
    expires_at: Moment | None
    revoked_at: Moment | None
    compromised: bool
    budget_id: str
    log_days: int | None

    @classmethod
    def of(cls, row: sqlite3.Row, **more: Any) -> Self:
        """Return the key of a row; `more` are members that a subclass adds."""
        return cls(**key_columns(row), **more)


class KeyInList(KeyShown):
    """A key with the day (UTC) of its last use."""

    last_used_on: str | None


class KeyAdded(Struct):
    """A new key of an account. `key` is the secret, which is shown only once; the rest is as in
    KeyShown."""

    id: str
    key: str
    account: str
    account_id: str
    label: str
    models: list[str] | None
    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_budget: Money | None
    created_at: Moment
    expires_at: Moment | None
    revoked_at: Moment | None
    compromised: bool
    budget_id: str
    log_days: int | None
    replaces: str | UnsetType = UNSET

    @classmethod
    def of(cls, row: sqlite3.Row, **more: Any) -> KeyAdded:
        """Return the key of a row; `more` is the key itself, and what it replaces."""
        return cls(**key_columns(row), **more)
