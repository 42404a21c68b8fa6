"""Make, hash and find API keys."""

from __future__ import annotations

import fnmatch
import hashlib
import secrets
import zlib
from typing import NamedTuple

from redbtc.store.database import Store

# sk-redbtc-, 256 random bits as 43 base62 characters, and the CRC32 of all before it as 6 more: a
# key with a typing error, or a string that only looks like a key, is refused without a look-up.
KEY_PREFIX = "sk-redbtc-"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def base62(number: int, width: int) -> str:
    """Return a number in base 62, most significant digit first, padded with zeros to `width`."""
    digits = ""
    for _ in range(width):
        digits = BASE62[number % 62] + digits
        number //= 62
    return digits


def new_key() -> str:
    """Return a new API key of 59 characters. It is shown once; only its hash is kept."""
    body = KEY_PREFIX + base62(secrets.randbits(256), 43)
    return body + base62(zlib.crc32(body.encode()), 6)


def hash_of_key(key: str) -> bytes | None:
    """Return the SHA-256 under which a key is stored, None if the text can't be a key."""
    shown = key.encode()
    if len(shown) != 59 or key[-6:] != base62(zlib.crc32(shown[:-6]), 6):
        return None
    return hashlib.sha256(shown).digest()


class Key(NamedTuple):
    """A key, with the limits and budgets of its account. A limit of None falls back to the
    settings'; a budget of None means no budget."""

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
    log_days: int | None  # for which bodies of its requests are kept; None: they are not

    def allows(self, model: str) -> bool:
        """Return whether the key has no patterns of models, or one that matches the model."""
        if self.models is None:
            return True
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models.split(","))


# Where the fields of Key come from that are not columns of the key itself.
FROM_ACCOUNT = {
    "account_id": "accounts.id",
    "account_status": "accounts.status",
    "account_concurrency": "accounts.concurrency",
    "account_requests_per_minute": "accounts.requests_per_minute",
    "account_tokens_per_minute": "accounts.tokens_per_minute",
    "account_monthly_budget": "accounts.monthly_budget",
    "credit_limit": "accounts.credit_limit",
    "throttle_factor": (
        "iif(ifnull(accounts.throttled_until, ?2 + 1) > ?2, accounts.throttle_factor, NULL)"
    ),
    "budget_id": "ifnull(keys.budget_id, keys.id)",
    "log_days": "ifnull(keys.log_days, accounts.log_days)",
}
FULL_KEY = f"""
    SELECT {", ".join(FROM_ACCOUNT.get(name, f"keys.{name}") for name in Key._fields)}
      FROM keys JOIN accounts ON accounts.id = keys.account_id"""
KEY_IN_FORCE = f"""{FULL_KEY}
     WHERE keys.hash = ?1 AND keys.revoked_at IS NULL AND ifnull(keys.expires_at, ?2 + 1) > ?2"""

LOG_DAYS = f"""
    SELECT {FROM_ACCOUNT["log_days"]} FROM keys JOIN accounts ON accounts.id = keys.account_id
     WHERE keys.id = ?"""
IS_KEY = "SELECT 1 FROM keys WHERE hash = ?"


def is_key(store: Store, text: str) -> bool:
    """Return whether a text is a key that was made here, in force or not. Raises
    StorageUnavailable."""
    hashed = hash_of_key(text)
    return hashed is not None and store.look_up(IS_KEY, (hashed,)) is not None


def log_days_of(store: Store, key_id: str) -> int | None:
    """Return for how many days bodies of a key's requests are kept now; None: they are not. Raises
    StorageUnavailable."""
    found = store.look_up(LOG_DAYS, (key_id,))
    days: int | None = found[0] if found else None
    return days


def key_in_force(store: Store, key: str) -> Key | None:
    """Return a key, or None if it is malformed, unknown, revoked or expired. It is read from the
    database, so that a change takes effect at once. Raises StorageUnavailable."""
    hashed = hash_of_key(key)
    found = store.look_up(KEY_IN_FORCE, (hashed, store.time())) if hashed else None
    return Key(*found) if found else None
