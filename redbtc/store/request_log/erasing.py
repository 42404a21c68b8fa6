"""Erase what has expired, what an owner wants erased, and the oldest requests where the log is too
large. A request whose expiry is 0 is not shown any more, and whoever purges next goes on with what
a killed process has begun."""

from __future__ import annotations

from redbtc.store.request_log.file import (
    LONG_READER_SECONDS,
    OLDEST,
    READER_SECONDS,
    REQUESTS_AT_ONCE,
    LogFile,
)
from redbtc.store.request_log.jobs import Work
from redbtc.store.request_log.results import Purged
from redbtc.times import DAY

# Entries from the future, after the ledger's clock was set back, count from now on.
BRING_BACK = """
    UPDATE logged SET expires_at = expires_at - logged_at + ?1, logged_at = ?1
     WHERE logged_at > ?1 AND expires_at > 0"""
EXPIRE_OLD = "UPDATE logged SET expires_at = 0 WHERE logged_at <= ? AND expires_at > 0"
EXPIRE_ALL_OF = """
    UPDATE logged SET expires_at = 0
     WHERE account_id = ?1 AND key_id = ifnull(?2, key_id) AND expires_at > 0"""
SHORTEN_LIFE = """
    UPDATE logged SET expires_at = logged_at + ?3
     WHERE account_id = ?1 AND key_id = ifnull(?2, key_id) AND expires_at > logged_at + ?3
       AND key_id NOT IN (SELECT value FROM json_each(?4))"""
EXPIRED = f"SELECT id FROM logged WHERE expires_at <= ? LIMIT {REQUESTS_AT_ONCE}"


def purge_log(file: LogFile, now: int, max_days: int) -> Work[Purged]:
    """Erase what has expired at the time `now` (ms) or is older than `max_days`, and the oldest
    requests if the log is too large."""
    with file.transaction():
        file.database.execute(BRING_BACK, (now,))
        file.database.execute(EXPIRE_OLD, (now - max_days * DAY,))
    purged = yield from _erase_expired(file, now)
    while file.is_too_large and (oldest := file.database.execute(OLDEST).fetchall()):
        _add(purged, file.erase(number for (number,) in oldest))
        yield 0.0
    yield from _clean(file, LONG_READER_SECONDS)
    return purged


def erase_all_of(file: LogFile, account_id: str, key_id: str | None) -> Work[Purged]:
    """Erase all requests of an account, or of one of its keys."""
    file.database.execute(EXPIRE_ALL_OF, (account_id, key_id))
    purged = yield from _erase_expired(file, 0)
    yield from _clean(file, READER_SECONDS)
    return purged


def shorten_life(
    file: LogFile, account_id: str, key_id: str | None, days: int, except_keys: str
) -> Work[None]:
    """Let the requests of an account, or of one of its keys, expire so many days after they were
    logged, where that is earlier. `except_keys` is a list in JSON."""
    file.database.execute(SHORTEN_LIFE, (account_id, key_id, days * DAY, except_keys))
    return
    yield 0.0


def _erase_expired(file: LogFile, now: int) -> Work[Purged]:
    purged = Purged(0, 0)
    while expired := file.database.execute(EXPIRED, (now,)).fetchall():
        _add(purged, file.erase(number for (number,) in expired))
        yield 0.0
    return purged


def _add(purged: Purged, more: Purged) -> None:
    purged.requests += more.requests
    purged.bytes += more.bytes


def _clean(file: LogFile, reader_seconds: float) -> Work[None]:
    while file.shrink():
        yield 0.0
    if file.must_scrub:
        yield from file.scrub(reader_seconds)
