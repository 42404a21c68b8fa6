"""The connection that writes to the database."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from redbtc.store.files import OpenFiles
from redbtc.store.remnants import zero_gaps
from redbtc.store.turns import WriteTurns

SQLStatement = tuple[str, Sequence[Any]]  # SQL and its values

THREAD_END_SECONDS = 1  # for the thread of a connection that was not opened


class DatabaseConnection(aiosqlite.Connection):
    """A connection whose thread has ended when opening it fails or is cancelled. The thread of
    aiosqlite's own class goes on, finds the event loop closed, and prints a traceback."""

    async def _connect(self) -> aiosqlite.Connection:
        try:
            return await super()._connect()
        except BaseException:
            await asyncio.to_thread(self._thread.join, THREAD_END_SECONDS)
            raise


class Writer(DatabaseConnection):
    """The connection that writes. Each transaction is one call to its thread. A transaction of a
    single statement is one call to SQLite, too, and releases Python's lock only once."""

    def __init__(self, database: Path, synchronous: str) -> None:
        """`synchronous` is the setting for transactions that must survive a power loss."""
        super().__init__(lambda: sqlite3.connect(database, isolation_level=None), 64)
        self.files: OpenFiles | None = None  # checked before each transaction
        self.turns: WriteTurns | None = None  # while another process writes as well
        self._durable = synchronous
        self._synchronous = ""  # the present setting

    async def write(self, statements: Sequence[SQLStatement], *, durable: bool = True) -> list[int]:
        """Commit these statements in one transaction and return how many rows each one changed.
        With `durable`, the transaction survives a power loss, unless the settings say otherwise;
        without, it survives the end of the process."""
        synchronous = self._durable if durable else "normal"
        changed: list[int] = await self._execute(self._write, statements, synchronous)  # type: ignore[no-untyped-call]
        return changed

    def _write(self, statements: Sequence[SQLStatement], synchronous: str) -> list[int]:
        if self.files:
            self.files.check()
        database = self._conn
        if synchronous != self._synchronous:
            database.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        if turns := self.turns:
            turns.take()
        try:
            if len(statements) > 1:
                database.execute("BEGIN IMMEDIATE")
            changed = [database.execute(sql, values).rowcount for sql, values in statements]
            database.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            raise
        finally:
            if turns:
                turns.give_back()
        return changed

    async def write_step(self, statements: Sequence[SQLStatement]) -> float:
        """Commit these statements as `write` does, not durably. Return how many seconds that took,
        without the wait for earlier ones."""
        seconds: float = await self._execute(self._write_step, statements)  # type: ignore[no-untyped-call]
        return seconds

    def _write_step(self, statements: Sequence[SQLStatement]) -> float:
        began = time.perf_counter()
        self._write(statements, "normal")
        return time.perf_counter() - began

    async def until_idle(self) -> None:
        """Return once the writes have ended that were begun before."""
        await self._execute(bool)  # type: ignore[no-untyped-call]

    async def value(self, sql: str) -> Any:
        """Return the first value of the first row of a query, None if there is no row."""
        async with self.execute(sql) as cursor:
            row = await cursor.fetchone()
            return row[0] if row else None

    async def empty_wal(self) -> bool:
        """Copy the WAL into the database and empty the WAL file. If a reader still needs it, only
        copy, and return False. Raises sqlite3.Error, FileChanged, OSError."""
        emptied: bool = await self._execute(self._empty_wal)  # type: ignore[no-untyped-call]
        return emptied

    def _empty_wal(self) -> bool:
        if self.files:
            self.files.check()
        database = self._conn
        (timeout_ms,) = database.execute("PRAGMA busy_timeout").fetchone()
        database.execute("PRAGMA busy_timeout = 0")  # commits must not wait for a reader
        turns = self.turns
        try:
            if turns:
                turns.take()
            ((is_busy, _, _),) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            if turns:
                turns.give_back()
            database.execute(f"PRAGMA busy_timeout = {timeout_ms}")
        return not is_busy

    async def zero_gaps(self, file: int, pages: Sequence[int]) -> bool:
        """Empty the WAL, then overwrite the gaps of these pages as remnants.zero_gaps does. Return
        False, and do nothing, if a reader still needs the WAL, or while another process writes as
        well. Raises sqlite3.Error, FileChanged, OSError."""
        done: bool = await self._execute(self._zero_gaps, file, pages)  # type: ignore[no-untyped-call]
        return done

    def _zero_gaps(self, file: int, pages: Sequence[int]) -> bool:
        if self.turns:  # that process has the same pages in memory, and could write them again
            return False
        if not self._empty_wal():
            return False
        database = self._conn
        database.execute("BEGIN IMMEDIATE")  # now nobody writes, and there is nothing to copy
        try:
            zero_gaps(file, pages)
        finally:
            database.rollback()
            database.execute("PRAGMA shrink_memory")  # drops the pages that it has in memory
        return True

    @property
    def works(self) -> bool:
        """Return whether the connection's thread is running."""
        return self._thread.is_alive()
