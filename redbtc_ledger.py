"""The ledger: keys and accounts, requests, stored objects. Their rows are in redbtc_rows.py, the
database that holds them is redbtc_store.py, and what requests cost is in redbtc_billing.py.

Nothing here knows HTTP: the gateway (redbtc_proxy.py) and the admin API (redbtc_admin.py) import
this and are not imported by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
import hashlib
import os
import secrets
import sqlite3
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson

from redbtc_backup import FILE_CHECKS, suffixed
from redbtc_commits import RETRY_SECONDS
from redbtc_rows import (
    COLUMNS,
    DROP_UNSETTLED,
    FORGET,
    KEEP_ESTIMATE,
    KEEP_UNSETTLED,
    MAX_ROWS,
    RECORD,
    Row,
    Usage,
    joined,
    values_of,
)
from redbtc_schema import APPLICATION_ID, newest_version
from redbtc_settings import (
    NANOS,
    Conflict,
    LedgerError,
    LedgerUnavailable,
    NotFound,
    day_of,
    decimal,
    iso_time,
    shown_limit,
)
from redbtc_spill import Spill
from redbtc_store import Store, refuse_without

# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────
# sk-redbtc-, 256 bits of chance as 43 base62 characters, and the CRC32 of all before it as 6 more:
# a slip of the finger, or a string that only looks like a key, is told apart without a look-up.

KEY_PREFIX = "sk-redbtc-"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def base62(number: int, width: int) -> str:
    """`number` in base 62, most significant digit first, filled up with zeros to `width`."""
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def new_key() -> str:
    """A fresh API key, 59 characters. It is shown once; only its hash is kept."""
    body = KEY_PREFIX + base62(secrets.randbits(256), 43)
    return body + base62(zlib.crc32(body.encode()), 6)


def hash_of_key(key: str) -> bytes | None:
    """The SHA-256 under which a key is stored; None for what can't be a key."""
    shown = key.encode()
    if len(shown) != 59 or key[-6:] != base62(zlib.crc32(shown[:-6]), 6):
        return None
    return hashlib.sha256(shown).digest()


class Key(NamedTuple):
    """A key that is in force, with what its account allows: limits of None are the settings',
    budgets of None are none."""

    id: str
    account_id: str
    account_status: str
    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    account_concurrency: int | None
    account_requests_per_minute: int | None
    account_tokens_per_minute: int | None
    monthly_budget: int | None
    account_monthly_budget: int | None
    credit_limit: int | None
    models: str | None
    throttle_factor: int | None  # thousandths of its account's limits that it is held to
    budget_id: str  # the first of the keys that replaced one another, which share a budget

    def allows(self, model: str) -> bool:
        """Whether one of its patterns, where it has any, is the model's."""
        if self.models is None:
            return True
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models.split(","))


FULL_KEY = """
    SELECT keys.id, accounts.id, accounts.status,
           keys.concurrency, keys.requests_per_minute, keys.tokens_per_minute,
           accounts.concurrency, accounts.requests_per_minute, accounts.tokens_per_minute,
           keys.monthly_budget, accounts.monthly_budget, accounts.credit_limit, keys.models,
           iif(ifnull(accounts.throttled_until, ?2 + 1) > ?2, accounts.throttle_factor, NULL),
           ifnull(keys.budget_id, keys.id)
      FROM keys JOIN accounts ON accounts.id = keys.account_id"""
KEY_IN_FORCE = f"""{FULL_KEY}
     WHERE keys.hash = ?1 AND keys.revoked_at IS NULL AND ifnull(keys.expires_at, ?2 + 1) > ?2"""


def key_in_force(store: Store, key: str) -> Key | None:
    """The key and its account, or None where it is malformed, unknown, revoked or expired. Reads
    the database, so that what was committed a moment ago holds. Raises LedgerUnavailable."""
    hashed = hash_of_key(key)
    found = store.look_up(KEY_IN_FORCE, (hashed, store.time())) if hashed else None
    return Key(*found) if found else None


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────

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

Record = dict[str, Any]  # one row, as JSON shows it


def shown(row: Mapping[str, Any] | sqlite3.Row) -> Record:
    """A row as JSON shows it: times in ISO 8601, money as decimal strings."""
    record = dict(row)
    for name, value in record.items():
        if name.endswith("_at") or name in ("until", "throttled_until"):
            record[name] = iso_time(value)
        elif name in ("credit_limit", "monthly_budget"):
            record[name] = shown_limit(value)
        elif name == "models":
            record[name] = value.split(",") if value else None
        elif name == "throttle_factor":
            record[name] = None if value is None else decimal(value * (NANOS // 1000))
        elif name in ("compromised", "refuses_requests"):
            record[name] = bool(value)
    return record


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
            raise Conflict(f"there is an account {name!r} already") from None
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
            raise Conflict(f"key {key_id} is revoked or expired; add a new one instead")
        secret, added = new_key(), new_id("key")
        await self._store.transact(
            (COPY_KEY, (added, hash_of_key(secret), now, key_id)),
            (EXPIRE_KEY, (now + overlap_ms, key_id)),
            by=by,
        )
        return {"id": added, "key": secret, **await self.key(added), "replaces": key_id}


def no_account(name: str) -> NotFound:
    """What is another's is not found, like what never was."""
    return NotFound(f"there is no account {name!r}")


def no_key(key_id: str) -> NotFound:
    """The same for a key."""
    return NotFound(f"there is no key {key_id!r}")


def new_id(kind: str) -> str:
    """acct_, key_, pay_, ntc_, usr_ or ses_ and 16 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(8)}"


# ── Changes ──────────────────────────────────────────────────────────────────────────────────────
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


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────
# The ledger proper: a row is begun when its request leaves for an upstream and settled at its end.


async def begin(store: Store, row: Row) -> None:
    """Commit the row as pending. Raises LedgerUnavailable; then it will not be in the ledger."""
    row.run = store.run
    await store.record(RECORD, values_of(row), insist=False)


class Admitted(NamedTuple):
    """What the correction of an estimated request needs: when the request was admitted, by the
    ledger's time, which chooses its prices; the model of its image tool; and the nanos that were
    held for it."""

    at: int
    image_model: str
    held: int


async def settle(store: Store, row: Row, admitted: Admitted | None = None) -> None:
    """Commit the row as it ended, however long that takes. With `admitted`, an estimated row can be
    corrected when its response is fetched later."""
    written = store.record(RECORD, values_of(row), insist=True)
    if admitted and row.usage_source == "estimated" and row.response_id:
        values = (row.response_id, row.request_id, *admitted)
        written = store.record(KEEP_ESTIMATE, values, insist=True)
    await written


def keep_unsettled(store: Store, row: Row, admitted: Admitted | None) -> None:
    """Keep what a request in flight has used so far, in case the process is killed. `row` is the
    request's row as if it had just ended; `admitted` as in `settle`."""
    settled = orjson.dumps(dict(zip(COLUMNS, values_of(row), strict=True))).decode()
    values = (row.request_id, settled, *(admitted or (None, None, None)))
    store.record(KEEP_UNSETTLED, values, insist=True, lasting=False)


def drop_unsettled(store: Store, row: Row) -> None:
    """Remove what `keep_unsettled` wrote for a request, in the commit of what is recorded next."""
    store.record(DROP_UNSETTLED, (row.request_id,), insist=True, lasting=False)


async def forget(store: Store, row: Row) -> None:
    """Take back a pending row whose request did not leave for the upstream after all."""
    await store.record(FORGET, (row.request_id,), insist=True)


# ── Stored objects ───────────────────────────────────────────────────────────────────────────────
# All accounts share the upstream's key, and with it all that the upstream stores. An account may
# name only objects that the upstream made for it. They are known from the first event that names
# them. An id that the client itself chose, and the upstream only repeats, is never learned.
#
# The first account for which an object is recorded owns it. The row decides; a claim that waits for
# its commit decides only where there is no row. Claims are written in the order in which they are
# made, and only the first one for an id counts, so the answer is at every instant the one that the
# store will give after a restart.

OWN = """
    INSERT INTO stored_objects
           (id, account_id, upstream, models, minted_input, extras, tokens, likely_tokens,
            created_at)
    VALUES {rows}
        ON CONFLICT (id) DO UPDATE SET models = joined(models, excluded.models),
           extras = extras | excluded.extras,
           tokens = coalesce(max(tokens, excluded.tokens), tokens, excluded.tokens),
           likely_tokens = coalesce(excluded.likely_tokens, likely_tokens)
        WHERE account_id = excluded.account_id
          AND (excluded.models IS NOT NULL OR excluded.extras OR excluded.tokens IS NOT NULL)"""
DISOWN = "DELETE FROM stored_objects WHERE id = ? AND account_id = ?"
HOME = "upstream, models, minted_input, extras, tokens, likely_tokens"
OWNED = f"SELECT account_id, {HOME} FROM stored_objects WHERE id = ?"
OWNERS = f"""
    SELECT id, account_id, {HOME} FROM stored_objects
     WHERE id IN (SELECT value FROM json_each(?))"""
MAX_LOOK_UPS = 250  # ids in one query, which takes about 1 ms
MAX_SHOWN = 1000  # ids of an account that are remembered as shown in listings
# What has a rate of its own in a price, by the name of that: bits of a set.
EXTRAS = {"web_search": 1, "file_search": 2, "container": 4, "cache_write_12h": 8}


class Home(NamedTuple):
    """Where an object is stored; the further models that a request which builds on it uses (JSON;
    None: none); for a response, whether the upstream chose all the ids in the listing of its input;
    and the extras (bits of EXTRAS) and tokens that a request which builds on it gets with it: at
    most (None: nobody knows how many) and likely (None: as many)."""

    upstream: str
    models: str | None = None
    minted_input: bool = False
    extras: int = 0
    tokens: int | None = None
    likely_tokens: int | None = None

    def with_tokens(self, tokens: int | None, likely: int | None = None) -> Home:
        """Return the same home for an object of so many tokens."""
        return Home(self.upstream, self.models, self.minted_input, self.extras, tokens, likely)

    @property
    def likely(self) -> int:
        """Return how many tokens the object likely has, for an estimate."""
        return (self.tokens if self.likely_tokens is None else self.likely_tokens) or 0

    def joined(self, later: Home) -> Home:
        """Return the same home with the models, extras and tokens of a later one added."""
        return Home(
            self.upstream,
            joined(self.models, later.models),
            self.minted_input,
            self.extras | later.extras,
            max(self.tokens or 0, later.tokens) if later.tokens is not None else self.tokens,
            self.likely_tokens if later.likely_tokens is None else later.likely_tokens,
        )


class Claim(NamedTuple):
    """An object's owner, and where the object is stored."""

    account_id: str
    home: Home

    def joined(self, later: Claim) -> Claim:
        """Return the same claim, or one that adds to it what a later claim of the same account
        says."""
        home = self.home.joined(later.home)
        if later.account_id != self.account_id or home == self.home:
            return self
        return Claim(self.account_id, home)


@functools.lru_cache(MAX_ROWS)
def own_of(rows: int) -> str:
    """Return OWN for so many objects at once."""
    return OWN.format(rows=", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * rows))


def decided(row: Sequence[Any] | None, claim: Claim | None) -> Claim | None:
    """Return the owner of an object, given its row of OWNED and the claim that waits for its
    commit; None if it has neither."""
    if row is None:
        return claim
    account_id, upstream, models, minted_input, *rest = row
    owner = Claim(account_id, Home(upstream, models, bool(minted_input), *rest))
    return owner.joined(claim) if claim else owner


class Objects:
    """Who owns what is stored at the upstreams."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._claims: dict[str, Claim] = {}  # by object, those not known to be committed
        # By account, pairs of a response and an item that its listing showed, latest last.
        self._shown: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self._growing: Counter[str] = Counter()  # by object, the tokens of `grow`

    def own(self, ids: Iterable[str], account_id: str, home: Home) -> None:
        """Make the objects the account's, except for those that are another account's already."""
        self.own_each(dict.fromkeys(ids, home), account_id)

    def own_each(self, homes: Mapping[str, Home], account_id: str) -> None:
        """Make each of these objects the account's, as `own` does."""
        now, claims, values = self._store.time(), {}, []
        for each, home in homes.items():
            before, claim = self._claims.get(each), Claim(account_id, home)
            if before is None or before.account_id == account_id:
                self._claims[each] = claims[each] = claim = (
                    before.joined(claim) if before else claim
                )
            if claim is not before:  # nothing in it is new
                values.append((each, account_id, *claim.home, now))
        for at in range(0, len(values), MAX_ROWS):
            rows = values[at : at + MAX_ROWS]
            row = list(chain(*rows))
            written = self._store.record(own_of(len(rows)), row, insist=True, lasting=False)
        if values:
            written.add_done_callback(functools.partial(self._written, claims))

    def _written(self, claims: dict[str, Claim], _: asyncio.Future[None]) -> None:
        for each, claim in claims.items():
            if self._claims.get(each) is claim:
                del self._claims[each]

    def _owned(self, object_id: str) -> Claim | None:
        row = self._store.look_up(OWNED, (object_id,))
        return decided(row, self._claims.get(object_id))

    def home_of(self, object_id: str, account_id: str) -> Home | None:
        """Return where the object is, None unless it is the account's. Costs one read by an index,
        which takes as long for another account's object as for one that does not exist. Raises
        LedgerUnavailable."""
        owned = self._owned(object_id)
        return owned.home if owned and owned.account_id == account_id else None

    def look_up(self, ids: Collection[str], account_id: str) -> dict[str, Home | None]:
        """Return, by id, where an object of the account is stored, and None for another account's
        object. Ids of unknown objects are left out. Takes one query; at most MAX_LOOK_UPS ids.
        Raises LedgerUnavailable."""
        names = orjson.dumps(list(ids)).decode()
        rows = {row[0]: row[1:] for row in self._store.look_up_all(OWNERS, (names,))}
        found: dict[str, Home | None] = {}
        homes: dict[Home, Home] = {}  # equal ones are one, so that few are kept
        for each in ids:
            if owned := decided(rows.get(each), self._claims.get(each)):
                home = homes.setdefault(owned.home, owned.home)
                found[each] = home if owned.account_id == account_id else None
        return found

    def is_free(self, object_id: str) -> bool:
        """Return whether no account owns the object. Raises LedgerUnavailable."""
        return self._owned(object_id) is None

    async def disown(self, object_id: str, account_id: str) -> None:
        """Forget an object that the account deleted. Also drops a claim that another account made
        in vain, which would take effect now."""
        self._claims.pop(object_id, None)
        await self._store.record(DISOWN, (object_id, account_id), insist=True)

    def grow(self, growth: Mapping[str, int]) -> None:
        """Note that a request which has not ended can add so many tokens to each of these objects:
        nobody knows yet how many, but the upstream may have added them already."""
        self._growing.update(growth)

    def stop_growing(self, growth: Mapping[str, int]) -> None:
        """Take back what `grow` noted: the request has ended."""
        for each, tokens in growth.items():
            self._growing[each] -= tokens
            if not self._growing[each]:
                del self._growing[each]

    def growing(self, object_id: str) -> int:
        """Return how many tokens requests that have not ended can add to an object."""
        return self._growing[object_id]

    def show(self, ids: Iterable[str], response_id: str, account_id: str) -> None:
        """Remember that the account saw these ids in the listing of its response's input: it may
        page from them even if it does not own them."""
        shown = self._shown[account_id]
        for each in ids:
            shown.pop((response_id, each), None)
            shown[response_id, each] = None
        while len(shown) > MAX_SHOWN:
            del shown[next(iter(shown))]

    def was_shown(self, object_id: str, response_id: str, account_id: str) -> bool:
        """Return whether the account recently saw the id in the listing of the response's input."""
        return (response_id, object_id) in self._shown.get(account_id, ())


BILLED_CONTAINER = "SELECT 1 FROM billed_containers WHERE id = ?"
BILL_CONTAINER = "INSERT OR IGNORE INTO billed_containers (id) VALUES (?)"


class Containers:
    """The containers that were billed. A container is billed to the first request that ends with
    it in its answer, or that is corrected when its response shows it: one that was interrupted, or
    whose usage is not known, pays for nothing until then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: set[str] = set()  # those whose commit is not known yet

    async def unbilled(self, ids: Collection[str]) -> list[str]:
        """Return those of the containers that nobody was billed for, however long that takes. They
        are to be billed before anything else is waited for."""
        while True:
            try:
                return [each for each in ids if not self._is_billed(each)]
            except LedgerUnavailable:
                await asyncio.sleep(RETRY_SECONDS)

    def _is_billed(self, container_id: str) -> bool:
        if container_id in self._waiting:
            return True
        return self._store.look_up(BILLED_CONTAINER, (container_id,)) is not None

    def bill(self, ids: Iterable[str]) -> None:
        """Note that the containers are billed, in the same commit as the row that is settled next,
        before anything is waited for."""
        for each in ids:
            self._waiting.add(each)
            written = self._store.record(BILL_CONTAINER, (each,), insist=True)
            written.add_done_callback(functools.partial(self._written, each))

    def _written(self, container_id: str, _: asyncio.Future[None]) -> None:
        self._waiting.discard(container_id)


KEEP_PENDING = """
    INSERT OR IGNORE INTO background
           (request_id, admitted_at, held, input_estimate, image_model, text_bytes, seen, most)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
NOTE_PROGRESS = "UPDATE background SET seen = ? WHERE request_id = ?"
ENDED = "DELETE FROM background WHERE request_id = ?"
BACKGROUND = f"""
    SELECT {", ".join(f"requests.{name}" for name in COLUMNS)},
           admitted_at, held, input_estimate, image_model, text_bytes, seen, most
      FROM background JOIN requests USING (request_id)
     WHERE requests.outcome = 'pending' AND requests.response_id IS NOT NULL"""
KEY_OF = FULL_KEY + " WHERE keys.id = ?1"
ESTIMATED = """
    SELECT request_id, key_id, requested_model, ifnull(cost, 0), ifnull(output_tokens, 0),
           file_searches, containers, admitted_at, image_model, ifnull(held, 0)
      FROM estimates JOIN requests USING (request_id)
     WHERE estimates.response_id = ? AND account_id = ?"""
CORRECTED = (
    "request_id",
    "account_id",
    "month",
    "created_at",
    "service_tier",
    "price_id",
    "cost",
    *Usage.__struct_fields__,
)
CORRECT = f"""
    INSERT INTO corrections ({", ".join(CORRECTED)})
    SELECT {", ".join(f"?{place}" for place in range(1, len(CORRECTED) + 1))}
     WHERE EXISTS (SELECT 1 FROM estimates WHERE request_id = ?1)"""
IS_COMPROMISED = "SELECT 1 FROM keys WHERE id = ? AND compromised"


def is_compromised(store: Store, key_id: str) -> bool:
    """Whether somebody else had the key. Raises LedgerUnavailable."""
    return store.look_up(IS_COMPROMISED, (key_id,)) is not None


class Unfinished(NamedTuple):
    """What is kept of a background response beside its row; schema.sql explains each field."""

    admitted_at: int
    held: int
    input_estimate: int
    image_model: str
    text_bytes: int = 0
    seen: str | None = None
    most: str | None = None


def keep_pending(store: Store, row: Row, unfinished: Unfinished) -> asyncio.Future[None]:
    """Keep the row pending, since its response goes on at the upstream. Return a future that is
    done when this is on disk."""
    store.record(RECORD, values_of(row), insist=True)
    return store.record(KEEP_PENDING, (row.request_id, *unfinished), insist=True)


def note_progress(store: Store, row: Row, seen: str) -> asyncio.Future[None]:
    """Keep what was seen of a background response, as JSON. Return a future that is done when this
    is on disk, with all that came before."""
    return store.record(NOTE_PROGRESS, (seen, row.request_id), insist=True)


async def end_background(store: Store, row: Row, admitted: Admitted) -> None:
    """Commit the row as its background response ended."""
    ended = store.record(ENDED, (row.request_id,), insist=True)
    await settle(store, row, admitted)
    await ended


async def unfinished_rows(store: Store) -> list[tuple[Row, Key, Unfinished]]:
    """What an earlier process left to be asked for."""
    found = []
    async for each in store.rows(BACKGROUND):
        usage = len(COLUMNS) - len(Usage.__struct_fields__)
        row = Row(*each[:usage])
        row.usage = Usage(*each[usage : len(COLUMNS)])
        found.append((row, key_of(store, row.key_id), Unfinished(*each[len(COLUMNS) :])))
    return found


def key_of(store: Store, key_id: str) -> Key:
    """The key with that id, in force or not. Raises LedgerUnavailable."""
    return Key(*(store.look_up(KEY_OF, (key_id, store.time())) or ()))


class Estimated(NamedTuple):
    """An estimated request whose response may be fetched later. `cost` and `held` are in nanos;
    `held` is 0 if it is not known."""

    request_id: str
    key_id: str
    requested_model: str
    cost: int
    output_tokens: int
    file_searches: int | None
    containers: int | None
    admitted_at: int
    image_model: str
    held: int


def estimated_of(store: Store, response_id: str, account_id: str) -> Estimated | None:
    """The account's estimated request that a response is of, if it was not corrected yet. Raises
    LedgerUnavailable."""
    found = store.look_up(ESTIMATED, (response_id, account_id))
    return Estimated(*found) if found else None


async def correct(store: Store, values: Sequence[Any], usage: Usage) -> None:
    """Commit a correction, once: `values` are those of CORRECTED before the usage."""
    await store.record(CORRECT, (*values, *msgspec.structs.astuple(usage)), insist=True)


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────

CHECKS = FILE_CHECKS | {
    "usage that is not the sum of its requests": """
        SELECT account_id, month FROM (
            SELECT account_id, month, requests, cost_units AS units, cost_nanos AS nanos
              FROM usage_by_day
            UNION ALL
            SELECT account_id, ifnull(month, strftime('%Y-%m', started_at / 1000, 'unixepoch')), -1,
                   ifnull(-(cost / 1000000000), 0), ifnull(-(cost % 1000000000), 0)
              FROM requests WHERE outcome <> 'pending'
            UNION ALL
            SELECT corrections.account_id, corrections.month, 0,
                   (ifnull(requests.cost, 0) - ifnull(corrections.cost, 0)) / 1000000000,
                   (ifnull(requests.cost, 0) - ifnull(corrections.cost, 0)) % 1000000000
              FROM corrections JOIN requests USING (request_id))
         GROUP BY 1, 2 HAVING sum(requests) <> 0 OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
    "usage by month that is not the sum of its days": """
        SELECT account_id, month FROM (
            SELECT account_id, month, requests, ifnull(input_tokens, 0) AS input,
                   ifnull(output_tokens, 0) AS output, cost_units AS units, cost_nanos AS nanos
              FROM usage_by_day
            UNION ALL
            SELECT account_id, month, -requests, -input_tokens, -output_tokens, -cost_units,
                   -cost_nanos
              FROM usage_by_month)
         GROUP BY 1, 2 HAVING sum(requests) <> 0 OR sum(input) <> 0 OR sum(output) <> 0
                           OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
    "traffic that is not the usage of its day": """
        SELECT date(day * 86400, 'unixepoch') FROM (
            SELECT day, requests, cost_units AS units, cost_nanos AS nanos FROM usage_by_day
            UNION ALL
            SELECT day, -requests, -cost_units, -cost_nanos FROM traffic_by_day)
         GROUP BY day HAVING sum(requests) <> 0 OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
}


CHECK_TABLE = "PRAGMA integrity_check('{}')"  # of sqlite_schema: the list of free pages, too
TABLES = "SELECT name FROM sqlite_schema WHERE type = 'table'"


async def check_database(store: Store) -> list[str]:
    """Return what is wrong with the file, line by line. Each table, in place of the integrity of
    the whole, and each other check is read through a snapshot of its own, so that none lasts long.
    """
    async with store.snapshot() as snapshot:
        tables = ["sqlite_schema", *[name for (name,) in await snapshot.all(TABLES)]]
    checks = {f"integrity of {table}": CHECK_TABLE.format(table) for table in tables}
    checks |= {name: sql for name, sql in CHECKS.items() if name != "integrity"}
    return [line for name, sql in checks.items() for line in await check(store, name, sql)]


async def check(store: Store, name: str, sql: str) -> list[str]:
    """Return what one check finds wrong. What can't be read is a finding, too."""
    try:
        async with store.snapshot_to_check() as snapshot:
            rows = [tuple(row) for row in await snapshot.all(sql)]
    except LedgerUnavailable as error:
        rows = [(error,)]
    return [f"{name}: {' '.join(map(str, row))}" for row in rows if row != ("ok",)]


CURRENCIES = "SELECT currency FROM prices UNION SELECT currency FROM payments"


def check_file(path: Path, currency: str) -> list[str]:
    """What is wrong with the database before anything opens it for writing; it may be in use."""
    try:
        if not suffixed(path, ".restored").exists():  # else a start finishes that restore first
            refuse_without(path, Spill(path))
        path.stat()
    except LedgerError as error:
        return [str(error)]
    except FileNotFoundError:
        writable = os.access(path.parent, os.W_OK)
        return [] if writable else [f"{path}: can't be made: the folder is missing or not writable"]
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            (marked,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            rows = database.execute("PRAGMA quick_check(20)").fetchall()
            others = database.execute(CURRENCIES).fetchall() if version > 1 else []
    except sqlite3.Error as error:
        return [f"{path}: {error}"]
    wrong = [f"{path}: {line}" for (line,) in rows if line != "ok"]
    if marked != APPLICATION_ID:
        wrong.append(f"{path}: a database of another program")
    elif version > newest_version():
        wrong.append(f"{path}: written by a newer version of this program (schema {version})")
    if any(other != currency for (other,) in others):
        wrong.append(f"billing.currency is {currency}, but the ledger is in {others[0][0]}")
    return wrong
