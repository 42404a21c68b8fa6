"""The bodies of requests whose owners want them kept, in a database beside the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from msgspec import Struct

from redbtc.config import Settings
from redbtc.store.keys import Key


class LoggedRequest(Struct):
    """The stored bodies of a request. A body is None if none was stored."""

    request_id: str
    account_id: str
    key_id: str
    logged_at: int  # milliseconds
    expires_at: int  # milliseconds
    request: bytes | None
    response: bytes | None
    request_bytes: int
    response_bytes: int
    request_encoding: str
    response_encoding: str
    request_withheld: bool
    response_withheld: bool
    is_complete: bool  # False: parts are missing, since a body was too long or the log was too slow


class Purged(Struct):
    """What was erased: the number of requests, and the bytes that their bodies took."""

    requests: int
    bytes: int


class Recording:
    """The bodies of one request on their way into the log."""

    def request(self, body: bytes) -> None:
        """Store a part of the request's body."""

    def response(self, body: bytes) -> None:
        """Store a part of the response's body."""

    def end(self) -> None:
        """Note that no more parts follow."""


class RequestLog:
    """The database of bodies, opened by `async with RequestLog.open(...)`. Its file is made when
    the first body is stored."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, database: Path, settings: Settings) -> AsyncIterator[RequestLog]:
        """Open the log beside the ledger `database`."""
        yield cls()

    def apply(self, settings: Settings) -> None:
        """Use other settings."""

    def recording(self, key: Key, request_id: str) -> Recording | None:
        """Return a recording for a request, None if its bodies are not kept."""
        return None

    async def read(self, request_id: str) -> LoggedRequest | None:
        """Return what is stored of a request, None if nothing is."""
        return None

    async def ids_of(self, account_id: str) -> list[str]:
        """Return the ids of the account's requests of which something is stored, oldest first."""
        return []

    async def erase(self, account_id: str, key_id: str | None = None) -> Purged:
        """Erase all bodies of an account, or of one of its keys. When this returns, none of their
        bytes is in any file, also if another program has the file open."""
        return Purged(0, 0)

    async def shorten(self, account_id: str, key_id: str | None, days: int) -> None:
        """Keep what is stored of an account, or of one of its keys, for so many days at most."""

    async def purge(self, now: int) -> Purged:
        """Erase the bodies that have expired at the time `now` (milliseconds), and the oldest ones
        of more than max_bytes, in the same way as `erase`."""
        return Purged(0, 0)
