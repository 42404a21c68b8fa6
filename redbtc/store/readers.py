"""The connections that read the database. None of them can write."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from redbtc.errors import StorageUnavailable
from redbtc.slices import with_turns
from redbtc.store.writer import DatabaseConnection

MAX_SNAPSHOTS = 8
MAX_SNAPSHOT_SECONDS = 30  # as long as one is open, the WAL file grows with each commit
MAX_CHECK_SECONDS = 3600  # of one table
ROWS_AT_ONCE = 500

Values = Sequence[Any] | dict[str, Any]
ErrorListener = Callable[[Exception], None]  # told of each error of SQLite


class Reader:
    """A connection that reads. The columns of its rows have positions and names."""

    def __init__(self, connection: aiosqlite.Connection, notice: ErrorListener) -> None:
        connection.row_factory = sqlite3.Row
        self._connection = connection
        self._notice = notice

    async def all(self, sql: str, values: Values = ()) -> list[sqlite3.Row]:
        """Return all rows of a query, with one call to the connection's thread."""
        try:
            return list(await self._connection.execute_fetchall(sql, values))
        except sqlite3.Error as error:
            self._notice(error)
            raise

    async def one(self, sql: str, values: Values = ()) -> sqlite3.Row | None:
        """Return the first row of a query."""
        return next(iter(await self.all(sql, values)), None)

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """Yield the rows of a query as they are read."""
        async with self._connection.execute(sql, values) as cursor:
            while batch := await cursor.fetchmany(ROWS_AT_ONCE):
                async for row in with_turns(batch):
                    yield row

    async def copy(self, sql: str, values: Values = ()) -> None:
        """Copy the rows of a query to the table `temp.copied`, which can still be read when the
        snapshot has ended. SQLite writes it at its own speed to a file without a name, which
        vanishes with the connection."""
        await self.all(f"CREATE TEMP TABLE copied AS {sql}", values)


class Readers:
    """One connection for queries, one for look-ups on the event loop, and one for each snapshot."""

    def __init__(
        self, uri: str, reader: Reader, lookup: sqlite3.Connection, notice: ErrorListener
    ) -> None:
        self._uri = uri
        self._reader = reader
        self._lookup = lookup
        self._notice = notice
        self._snapshots = asyncio.Semaphore(MAX_SNAPSHOTS)
        self._checks = asyncio.Semaphore(1)

    @classmethod
    async def open(
        cls, stack: contextlib.AsyncExitStack, database: Path, notice: ErrorListener
    ) -> Readers:
        """Open the connections that are not for snapshots. Raises sqlite3.Error."""
        uri = f"{database.as_uri()}?mode=ro"
        connection = await stack.enter_async_context(reading_connection(uri))
        lookup = sqlite3.connect(uri, uri=True, timeout=0)
        stack.callback(lookup.close)
        return cls(uri, Reader(connection, notice), lookup, notice)

    def look_up_all(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return all rows of a short query that uses an index. It runs on the event loop and takes
        about 2 µs for each row. Raises StorageUnavailable."""
        try:
            return self._lookup.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            self._notice(error)
            raise StorageUnavailable(f"the ledger can't be read: {error}") from None

    def look_up(self, sql: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """Return one row, found by an index. It is read on the event loop, which takes about 5 µs.
        Raises StorageUnavailable."""
        rows = self.look_up_all(sql, values)
        return rows[0] if rows else None

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """Yield the rows of a query. All are read before the first is yielded: an open query would
        hide what is committed meanwhile from other queries of its connection."""
        async for row in with_turns(await self._reader.all(sql, values)):
            yield row

    async def one(self, sql: str, values: Values = ()) -> sqlite3.Row | None:
        """Return the first row of a query."""
        return await self._reader.one(sql, values)

    def snapshot(
        self, outlived_by: contextlib.AsyncExitStack | None = None
    ) -> contextlib.AbstractAsyncContextManager[Reader]:
        """Open a reader to which the database stands still, with a connection and a thread of its
        own, for at most MAX_SNAPSHOT_SECONDS. At most MAX_SNAPSHOTS are open at a time. With
        `outlived_by`, the connection stays open until that stack is closed, so that a copy can be
        read after the snapshot has ended. Raises StorageUnavailable if the database can't be read,
        or not in that time."""
        return self._snapshot(self._snapshots, MAX_SNAPSHOT_SECONDS, outlived_by)

    def snapshot_to_check(self) -> contextlib.AbstractAsyncContextManager[Reader]:
        """Open a snapshot for a check of the database, which may take MAX_CHECK_SECONDS. One is
        open at a time. Raises StorageUnavailable."""
        return self._snapshot(self._checks, MAX_CHECK_SECONDS)

    @contextlib.asynccontextmanager
    async def no_snapshots(self) -> AsyncIterator[None]:
        """Wait until the open snapshots have ended, and let none begin. Checks are not waited
        for."""
        async with contextlib.AsyncExitStack() as places:
            for _ in range(MAX_SNAPSHOTS):
                await places.enter_async_context(self._snapshots)
            yield

    @contextlib.asynccontextmanager
    async def _snapshot(
        self,
        places: asyncio.Semaphore,
        seconds: float,
        outlived_by: contextlib.AsyncExitStack | None = None,
    ) -> AsyncIterator[Reader]:
        try:
            async with places, contextlib.AsyncExitStack() as own:
                connection = await open_snapshot(outlived_by or own, self._uri)
                async with asyncio.timeout(seconds), _interrupting(connection):
                    await connection.execute("BEGIN")
                    yield Reader(connection, self._notice)
                    await connection.commit()
        except TimeoutError:
            raise StorageUnavailable(
                f"reading the ledger took longer than {seconds} seconds; request a smaller range"
            ) from None
        except sqlite3.Error as error:
            raise StorageUnavailable(f"the ledger can't be read: {error}") from None


async def open_snapshot(stack: contextlib.AsyncExitStack, uri: str) -> aiosqlite.Connection:
    """Return a connection of its own for a snapshot, which `stack` closes. Raises
    StorageUnavailable if no thread can be started for it, sqlite3.Error."""
    try:
        return await stack.enter_async_context(reading_connection(uri))
    except RuntimeError as error:
        raise StorageUnavailable(f"the ledger can't be read: {error}") from None


def reading_connection(uri: str) -> DatabaseConnection:
    """Return a connection that is not open yet."""
    return DatabaseConnection(lambda: sqlite3.connect(uri, uri=True), 64)


@contextlib.asynccontextmanager
async def _interrupting(connection: aiosqlite.Connection) -> AsyncIterator[None]:
    """Interrupt the running query if the block raises, since its result is not needed any more."""
    try:
        yield
    except BaseException:
        await connection.interrupt()
        raise
