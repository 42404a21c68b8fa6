"""Read what is stored of requests."""

from __future__ import annotations

from collections.abc import Sequence

from redbtc.store.request_log.file import LogFile
from redbtc.store.request_log.frames import unframed
from redbtc.store.request_log.jobs import Work
from redbtc.store.request_log.recording import REQUEST, RESPONSE
from redbtc.store.request_log.results import LoggedCount, LoggedRequest

FACTS_OF = """
    SELECT id, account_id, key_id, logged_at, expires_at, request_bytes, response_bytes,
           request_encoding, response_encoding, withheld, is_complete
      FROM logged WHERE request_id = ? AND expires_at > ? AND logged_at > ?"""
CONTENTS_OF = "SELECT body, content FROM parts WHERE logged_id = ? ORDER BY id"
COUNT_OF = """
    SELECT count(*), min(logged_at) FROM logged
     WHERE account_id = ? AND expires_at > ? AND logged_at > ?"""
IS_LOGGED = "SELECT 1 FROM logged WHERE request_id = ? AND expires_at > ? AND logged_at > ?"
IDS_OF = """
    SELECT request_id FROM logged
     WHERE account_id = ? AND expires_at > ? AND logged_at > ? ORDER BY id"""


def read_request(
    file: LogFile, request_id: str, now: int, since: int
) -> Work[LoggedRequest | None]:
    """Return what is stored of a request that is logged after `since` and not expired at `now`."""
    row = file.database.execute(FACTS_OF, (request_id, now, since)).fetchone()
    if row is None:
        return None
    (number, account_id, key_id, logged_at, expires_at, *sizes_and_codings, withheld, whole) = row
    request_bytes, response_bytes, request_encoding, response_encoding = sizes_and_codings
    bodies: tuple[list[bytes], list[bytes]] = [], []
    for body, content in file.database.execute(CONTENTS_OF, (number,)):
        bodies[body].append(unframed(content))
    request, response = (b"".join(parts) if parts else None for parts in bodies)
    return LoggedRequest(
        request_id=request_id,
        account_id=account_id,
        key_id=key_id,
        logged_at=logged_at,
        expires_at=expires_at,
        request=request,
        response=response,
        request_bytes=request_bytes,
        response_bytes=response_bytes,
        request_encoding=request_encoding,
        response_encoding=response_encoding,
        request_withheld=bool(withheld >> REQUEST & 1),
        response_withheld=bool(withheld >> RESPONSE & 1),
        is_complete=bool(whole),
    )
    yield 0.0


def ids_of_account(file: LogFile, account_id: str, now: int, since: int) -> Work[list[str]]:
    """Return the ids of the account's requests that are logged after `since` and not expired at
    `now`, oldest first."""
    return [each for (each,) in file.database.execute(IDS_OF, (account_id, now, since))]
    yield 0.0


def count_of_account(file: LogFile, account_id: str, now: int, since: int) -> Work[LoggedCount]:
    """Count the account's requests that are logged after `since` and not expired at `now`."""
    return LoggedCount(*file.database.execute(COUNT_OF, (account_id, now, since)).fetchone())
    yield 0.0


def logged_among(file: LogFile, request_ids: Sequence[str], now: int, since: int) -> Work[set[str]]:
    """Return those of the requests that are logged after `since` and not expired at `now`."""
    found = set()
    for request_id in request_ids:
        if file.database.execute(IS_LOGGED, (request_id, now, since)).fetchone():
            found.add(request_id)
    return found
    yield 0.0
