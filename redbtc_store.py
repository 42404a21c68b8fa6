"""The database of a gateway: one file, one writer, groups of changes in one commit, readers that
can't write. What is in its tables is known to redbtc_rows.py, redbtc_ledger.py and
redbtc_billing.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import os
import re
import secrets
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import aiosqlite

from redbtc_clock import LedgerClock
from redbtc_rows import (
    CLEAR_UNSETTLED,
    FORGET,
    INTERRUPT,
    KEEP_ESTIMATES,
    MOST_ROWS,
    RECORD,
    TAKE_OVER,
    joined,
    record_of,
)
from redbtc_settings import LedgerError, LedgerUnavailable, month_of, shipped
from redbtc_slices import with_turns

# One file, one writer. All writes of the process go through one connection, rows of the ledger in
# groups: whatever has come while a commit was under way is the next commit. Reads have connections
# of their own that can't write. A lock file beside the database keeps every other process out.

APPLICATION_ID = 0x52424343  # marks the file as ours
BUSY_TIMEOUT_MS = 1000
RETRY_SECONDS = 0.25
MOST_SNAPSHOTS = 8
SECTION = re.compile(r"^-- version (\d+)$", re.MULTILINE)
BEAT = "INSERT OR REPLACE INTO heartbeat (id, beat_at) VALUES (1, ?)"
LATEST = """
    SELECT max(ifnull((SELECT max(started_at) FROM requests), 0),
               ifnull((SELECT max(created_at) FROM payments), 0),
               ifnull((SELECT beat_at FROM heartbeat), 0))"""
MAKE_SECRET = "INSERT OR IGNORE INTO secrets (name, secret) VALUES ('idempotency', ?)"
SECRET = "SELECT secret FROM secrets WHERE name = 'idempotency'"
SIGN = "INSERT INTO acting (id, name, at) VALUES (1, ?, ?)"
UNSIGN = "DELETE FROM acting"


Values = Sequence[Any] | dict[str, Any]
Change = tuple[str, Sequence[Any]]  # a statement and its values


class DatabaseInUse(LedgerError):
    """Another process holds the database."""


class Entry(NamedTuple):
    """A statement that waits for the next commit. `insist`: it is tried again until it is written;
    otherwise it fails with the commit that fails. `lasting`: it has to outlive a loss of power."""

    sql: str
    values: Sequence[Any]
    written: asyncio.Future[None]
    insist: bool
    lasting: bool


def schema() -> str:
    """The text of schema.sql."""
    return shipped("schema.sql").read_text(encoding="utf-8")


def migrations(text: str) -> dict[int, str]:
    """The sections of schema.sql by the version that each brings the database to."""
    parts = SECTION.split(text)
    return {int(number): script for number, script in zip(parts[1::2], parts[2::2], strict=True)}


class Writer(aiosqlite.Connection):
    """The connection that writes. A transaction is one call to its thread; one with a single
    statement is one call to SQLite, too, and lets go of Python's lock but once."""

    _synchronous = ""

    async def write(self, changes: Sequence[Change], synchronous: str) -> list[int]:
        """Commit these changes together; returns how many rows each one changed."""
        changed: list[int] = await self._execute(self._write, changes, synchronous)  # type: ignore[no-untyped-call]
        return changed

    def _write(self, changes: Sequence[Change], synchronous: str) -> list[int]:
        database = self._conn
        if synchronous != self._synchronous:
            database.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        try:
            if len(changes) > 1:
                database.execute("BEGIN IMMEDIATE")
            changed = [database.execute(sql, values).rowcount for sql, values in changes]
            database.commit()
        except Exception:
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            raise
        return changed


ROWS_AT_ONCE = 500


class Reader:
    """A connection that can't write. Rows are by position or by column name."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        connection.row_factory = sqlite3.Row
        self._connection = connection

    async def all(self, sql: str, values: Values = ()) -> list[sqlite3.Row]:
        """All rows of a query, in one call to its thread."""
        return list(await self._connection.execute_fetchall(sql, values))

    async def one(self, sql: str, values: Values = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(await self.all(sql, values)), None)

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """The rows of a query, as they are read."""
        async with self._connection.execute(sql, values) as cursor:
            while batch := await cursor.fetchmany(ROWS_AT_ONCE):
                async for row in with_turns(batch):
                    yield row


class Store:
    """The database of one gateway, opened by `async with Store.open(...)`.

    `record` puts a row of the ledger on disk, `transact` makes an administrative change, `rows` and
    `look_up` read. `healthy` is False from a commit that failed to the next that didn't.
    """

    def __init__(self, path: Path, synchronous: str) -> None:
        self.path = path
        self.healthy = True
        self.failure = ""  # what the last failed commit failed with
        self.commits = 0
        self.committed_at = time.monotonic()
        self.interrupted = 0  # rows that the process before this one left behind
        self._read_only = f"{path.as_uri()}?mode=ro"
        self._synchronous = synchronous
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._wake = asyncio.Event()
        self._snapshots = asyncio.Semaphore(MOST_SNAPSHOTS)
        self._trying = asyncio.Lock()  # whether a commit succeeds
        self._closing = False
        self.clock = LedgerClock()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, synchronous: str) -> AsyncIterator[Store]:
        """The store in the file `path`, made or brought up to date where needed. Raises
        DatabaseInUse, or LedgerError where the file is not ours, too new, or can't be opened."""
        store = cls(path, synchronous)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await store._open(stack)
            except (sqlite3.Error, OSError) as error:
                raise LedgerError(f"{path}: {error}") from None
            yield store

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        stack.callback(os.close, _lock(self.path))
        writer = Writer(lambda: sqlite3.connect(self.path, isolation_level=None), 64)
        await stack.enter_async_context(writer)
        self._writer = writer
        await writer.create_function("joined", 2, joined)
        await self._configure()
        await self._migrate()
        self.clock.go_on_from(await self._value(LATEST))
        self.interrupted = await self.transact(
            (MAKE_SECRET, (secrets.token_bytes(32),)),
            (TAKE_OVER, ()),
            (KEEP_ESTIMATES, ()),
            (CLEAR_UNSETTLED, ()),
            (INTERRUPT, (month_of(self.time()),)),
        )
        self._secret: bytes = await self._value(SECRET)
        reader = aiosqlite.connect(self._read_only, uri=True)
        self._reader = Reader(await stack.enter_async_context(reader))
        self._lookup = sqlite3.connect(self._read_only, uri=True, timeout=0)
        stack.callback(self._lookup.close)
        loop = asyncio.create_task(self._write_groups(), name="ledger")
        stack.push_async_callback(self._finish, loop)

    async def _configure(self) -> None:
        """Set what durability depends on, then read each back: SQLite is silent when it can't."""
        tables = await self._value("SELECT count(*) FROM sqlite_schema")
        marked = await self._value("PRAGMA application_id")
        if tables and marked != APPLICATION_ID:
            raise LedgerError(f"{self.path} is a database of another program; it is left alone")
        wanted: dict[str, tuple[str | int, str | int]] = {
            "application_id": (APPLICATION_ID, APPLICATION_ID),
            "busy_timeout": (BUSY_TIMEOUT_MS, BUSY_TIMEOUT_MS),
            "journal_mode": ("WAL", "wal"),
            "synchronous": (self._synchronous, {"full": 2, "normal": 1}[self._synchronous]),
            "foreign_keys": ("ON", 1),
            "secure_delete": ("ON", 1),
        }
        for pragma, (value, expected) in wanted.items():
            if await self._value(f"PRAGMA {pragma}") != expected:
                await self._value(f"PRAGMA {pragma} = {value}")
            if (found := await self._value(f"PRAGMA {pragma}")) != expected:
                raise LedgerError(f"{self.path}: {pragma} is {found}, not {expected}")

    async def _migrate(self) -> None:
        version = await self._value("PRAGMA user_version")
        sections = migrations(schema())
        if version > max(sections):
            raise LedgerError(
                f"{self.path} was written by a newer version of this program (schema {version}; "
                f"this one knows {max(sections)})"
            )
        for number, script in sorted(sections.items()):
            if number > version:
                await self._writer.executescript(
                    f"BEGIN IMMEDIATE; {script}\nPRAGMA user_version = {number}; COMMIT;"
                )

    async def _value(self, sql: str) -> Any:
        async with self._writer.execute(sql) as cursor:
            row = await cursor.fetchone()
            return row[0] if row else None

    def time(self) -> int:
        """Return the ledger's own time in milliseconds. It follows the wall clock, but never goes
        back, so that a clock set back reopens no month and brings no old price back."""
        return self.clock.now()

    def own_key(self, by: str, key: bytes) -> bytes:
        """Return the idempotency key to send upstream in place of a client's `key`: always the same
        one for the same `by` (see Exchange.repeatable_by), and a different one for any other. It
        has the form of a random UUID."""
        digest = hmac.digest(self._secret, b"%b\0%b" % (by.encode(), key), "sha256")
        return str(uuid.UUID(bytes=digest[:16], version=4)).encode()

    # Reading

    def look_up_all(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return all rows of a short query that uses an index. Runs on the event loop: about 2 µs
        for each row. Raises LedgerUnavailable."""
        try:
            return self._lookup.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"can't be read: {error}") from None

    def look_up(self, sql: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """One row by an index, at once, on the event loop: about 5 µs. Raises LedgerUnavailable."""
        rows = self.look_up_all(sql, values)
        return rows[0] if rows else None

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """The rows of a query, all of which are there before the first is given: as long as one is
        read from, other reads of its connection don't see what is committed meanwhile."""
        async for row in with_turns(await self._reader.all(sql, values)):
            yield row

    async def one(self, sql: str, values: Values = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        return await self._reader.one(sql, values)

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Reader]:
        """Whatever is read through it is of one instant. Each has a thread of its own: there are no
        more than MOST_SNAPSHOTS at a time."""
        async with self._snapshots, aiosqlite.connect(self._read_only, uri=True) as connection:
            await connection.execute("BEGIN")
            yield Reader(connection)

    # Writing

    async def transact(self, *changes: Change, by: str | None = None) -> int:
        """Make changes, all of them or none; returns how many rows the last one changed. `by`: who
        makes them, which the log of administrative changes tells and those can't do without.
        Raises sqlite3.IntegrityError, or LedgerUnavailable where it can't be committed."""
        if by is not None:
            changes = ((SIGN, (by, self.time())), *changes, (UNSIGN, ()))
        try:
            changed = await self._writer.write(changes, self._synchronous)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"the database can't be written: {error}") from None
        return changed[-1 if by is None else -2]

    def record(
        self, sql: str, values: Sequence[Any], *, insist: bool, lasting: bool | None = None
    ) -> asyncio.Future[None]:
        """Write in the next group; the future is done when it is on disk. With `insist` it is tried
        until it succeeds, otherwise the future raises LedgerUnavailable if this try fails.
        `lasting`, usually as `insist`: it outlives a loss of power, not just this process."""
        written: asyncio.Future[None] = self._loop.create_future()
        if self.healthy or insist:
            lasting = insist if lasting is None else lasting
            self._waiting.append(Entry(sql, values, written, insist, lasting))
            self._wake.set()
        else:
            written.set_exception(LedgerUnavailable(self.failure))
        return written

    async def settle_time(self) -> int:
        """The ledger's time, kept so that it holds after a restart, and after all that was to be
        written before."""
        now = self.time()
        await self.record(BEAT, (now,), insist=False)
        return now

    async def can_commit(self) -> bool:
        """Whether a commit succeeds now: one within the last second is proof enough, and one try
        for all who ask meanwhile."""
        async with self._trying:
            if self.healthy and time.monotonic() - self.committed_at > 1:
                try:
                    await self.transact((BEAT, (self.time(),)))
                    self.committed_at = time.monotonic()
                except LedgerUnavailable as error:
                    self.healthy, self.failure = False, str(error)
                    self._wake.set()  # the retries that bring it back
        return self.healthy

    async def _write_groups(self) -> None:
        while not self._closing or self._waiting:
            if self.healthy:
                await self._wake.wait()
                self._wake.clear()
            else:
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(0)  # whoever is ready in this turn of the loop comes along
            group, self._waiting = self._waiting, []
            if group or not self.healthy:
                await self._write_group(group)

    async def _write_group(self, group: list[Entry]) -> None:
        changes: list[Change] = []
        for sql, entries in groupby(group, key=lambda entry: entry.sql):
            values = [entry.values for entry in entries]
            if sql == RECORD:
                groups = [values[at : at + MOST_ROWS] for at in range(0, len(values), MOST_ROWS)]
                changes += [(record_of(len(rows)), list(chain(*rows))) for rows in groups]
            else:
                changes += [(sql, each) for each in values]
        if not self.healthy:
            changes.append((BEAT, (self.time(),)))
        lasting = not self.healthy or any(entry.lasting for entry in group)
        try:
            await self._writer.write(changes, self._synchronous if lasting else "normal")
        except sqlite3.OperationalError as error:
            self._failed(group, str(error))
        except (sqlite3.Error, ValueError, OverflowError) as error:
            await self._isolate(group, error)
        else:
            self.healthy, self.failure = True, ""
            self.commits += 1
            self.committed_at = time.monotonic()
            for entry in group:
                if not entry.written.done():
                    entry.written.set_result(None)

    def _failed(self, group: list[Entry], reason: str) -> None:
        """Keep what must be written; for the rest take back whatever may have reached the disk
        (after a failed fsync a row's fate is unknown)."""
        self.healthy, self.failure = False, reason
        kept = [entry for entry in group if entry.insist]
        for entry in group:
            if not entry.insist:
                if not entry.written.done():
                    entry.written.set_exception(LedgerUnavailable(reason))
                nobody: asyncio.Future[None] = self._loop.create_future()
                kept.append(Entry(FORGET, entry.values[:1], nobody, True, True))
        self._waiting[:0] = kept

    async def _isolate(self, group: list[Entry], error: Exception) -> None:
        """A value that SQLite won't take must not hold up the others: write one by one."""
        if len(group) > 1:
            for entry in group:
                await self._write_group([entry])
        elif group and not group[0].written.done():
            group[0].written.set_exception(error)

    async def _finish(self, loop: asyncio.Task[None]) -> None:
        self._closing = True
        self._wake.set()
        if not self.healthy:  # nothing more can be done: those rows stay pending, then interrupted
            loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


def _lock(database: Path) -> int:
    """A lock that ends with the process, however it ends. Raises DatabaseInUse."""
    file = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise DatabaseInUse(f"{database} is in use by another gateway or command") from None
    return file
