"""The database of a gateway: one file, one writer, groups of changes in one commit, readers that
can't write. What is in its tables is known to redbtc/usage.py, redbtc/store and
redbtc/billing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiosqlite

from redbtc.errors import StorageUnavailable, UserError
from redbtc.locations import joined_models
from redbtc.slices import with_turns
from redbtc.store.backup import Damaged, back_up_before_migration, complete_restore
from redbtc.store.checks import Check, LogFunction, is_corrupt
from redbtc.store.clock import LedgerClock
from redbtc.store.commits import (
    BEAT,
    Commits,
    DatabaseConnection,
    Health,
    Writer,
    is_about_a_value,
    reason_of,
)
from redbtc.store.files import FileChanged, Identity, OpenFiles, hold, hold_lock, identity_of
from redbtc.store.rows import RECORD, SETTLED
from redbtc.store.schema import APPLICATION_ID, migrations, schema
from redbtc.store.spill import OwedChange, Spill, line_of
from redbtc.times import month_of

TAKEN_OVER = [
    f"{name} = json_extract(settled, '$.{name}')"
    for name in ("upstream", *SETTLED)
    if name not in ("outcome", "month")
]
TAKE_OVER = f"""
    UPDATE requests SET {", ".join(TAKEN_OVER)} FROM unsettled
     WHERE requests.request_id = unsettled.request_id AND outcome = 'pending'"""
KEEP_ESTIMATES = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    SELECT response_id, request_id, admitted_at, image_model, held
      FROM unsettled JOIN requests USING (request_id)
     WHERE outcome = 'pending' AND usage_source = 'estimated'
       AND response_id IS NOT NULL AND admitted_at IS NOT NULL"""
INTERRUPT = """
    UPDATE requests SET outcome = 'interrupted', month = ?
     WHERE outcome = 'pending' AND request_id NOT IN (SELECT request_id FROM background)"""
CLEAR_UNSETTLED = "DELETE FROM unsettled"

# One file, one writer. All writes of the process go through one connection, rows of the ledger in
# groups: whatever has come while a commit was under way is the next commit. Reads have connections
# of their own that can't write. A lock file beside the database keeps every other gateway and
# command out; where somebody has removed it, the lock on the database itself does.
BUSY_TIMEOUT_MS = 1000
MAX_SNAPSHOTS = 8
MAX_SNAPSHOT_SECONDS = 30  # as long as one is open, the WAL file grows with each commit
MAX_CHECK_SECONDS = 3600  # of one table
KEPT_WAL_BYTES = 16 << 20  # usual are 4 MB; a larger file is emptied once the ledger is idle
MAX_WAL_BYTES = 64 << 20  # of a file for which snapshots needn't wait until it is emptied
LATEST = """
    SELECT max(ifnull((SELECT max(started_at) FROM requests), 0),
               ifnull((SELECT max(created_at) FROM payments), 0),
               ifnull((SELECT beat_at FROM heartbeat), 0))"""
MAKE_SECRET = "INSERT OR IGNORE INTO secrets (name, secret) VALUES ('idempotency', ?)"
SECRET = "SELECT secret FROM secrets WHERE name = 'idempotency'"
SIGN = "INSERT INTO acting (id, name, at) VALUES (1, ?, ?)"
UNSIGN = "DELETE FROM acting"
ADD_RUN = "INSERT INTO runs (started_at) VALUES (?)"
LATEST_RUN = "SELECT max(id) FROM runs"

Values = Sequence[Any] | dict[str, Any]


class Migrated(NamedTuple):
    """How a database was brought to a newer schema. `backup`: the copy made before, or empty where
    there is none; then `no_backup` says why."""

    before: int
    after: int
    seconds: float
    backup: str
    no_backup: str


ROWS_AT_ONCE = 500


class Reader:
    """A connection that can't write. Rows are by position or by column name."""

    def __init__(
        self, connection: aiosqlite.Connection, notice: Callable[[Exception], None]
    ) -> None:
        """`notice` is called with what SQLite raises."""
        connection.row_factory = sqlite3.Row
        self._connection = connection
        self._notice = notice

    async def all(self, sql: str, values: Values = ()) -> list[sqlite3.Row]:
        """All rows of a query, in one call to its thread."""
        try:
            return list(await self._connection.execute_fetchall(sql, values))
        except sqlite3.Error as error:
            self._notice(error)
            raise

    async def one(self, sql: str, values: Values = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(await self.all(sql, values)), None)

    async def rows(self, sql: str, values: Values = ()) -> AsyncIterator[sqlite3.Row]:
        """The rows of a query, as they are read."""
        async with self._connection.execute(sql, values) as cursor:
            while batch := await cursor.fetchmany(ROWS_AT_ONCE):
                async for row in with_turns(batch):
                    yield row

    async def copy(self, sql: str, values: Values = ()) -> None:
        """Copy the rows of a query to the table `temp.copied`, which can be read when the snapshot
        has ended, too. SQLite writes it at its own speed to a file without a name, which vanishes
        with the connection."""
        await self.all(f"CREATE TEMP TABLE copied AS {sql}", values)


@contextlib.asynccontextmanager
async def _interrupting(connection: aiosqlite.Connection) -> AsyncIterator[None]:
    """On an exception, interrupt the query that runs: nobody waits for its result any more."""
    try:
        yield
    except BaseException:
        await connection.interrupt()
        raise


class LedgerDamaged(StorageUnavailable):
    """Pages of the database are damaged, so that nothing is written into it."""


@dataclasses.dataclass
class Serving:
    """What a gateway needs of its store, and a command does not: how many seconds the check after
    an unclean end may take (0: no check), whether the machine's clock is believed in any case, the
    log, what is called when nothing is left but to close the files, the database that was found
    sound, and the one that was copied before its migration, with the copy: the next try to open it
    does not check or copy it again."""

    check_seconds: float
    accept_clock: bool
    log: LogFunction
    closing: Callable[[], None]
    checked: Identity | None = None
    copied: tuple[Identity | None, str] | None = None


def silent(level: int, event: str, **fields: Any) -> None:
    """Say nothing: the log of a command."""


TRANSIENT_SQLITE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CANTOPEN,
)
TRANSIENT_OS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
)
TRANSACT_SECONDS = 10


def opening_error(path: Path, error: sqlite3.Error | OSError) -> UserError:
    """Return what an error on opening the database means: StorageUnavailable if it can pass by
    itself, LedgerDamaged, or a UserError."""
    if isinstance(error, OSError):
        said = f"{error.filename or path}: {error.strerror or type(error).__name__}"
    else:
        said = f"{path}: {error}"
    if is_corrupt(error):
        return LedgerDamaged(said)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in TRANSIENT_SQLITE or getattr(error, "errno", None) in TRANSIENT_OS:
        return StorageUnavailable(said)
    return UserError(said)


class ChangeRecorder(Protocol):
    """The type of Commits.record."""

    def __call__(
        self,
        sql: str,
        values: Sequence[Any],
        *,
        retry_until_written: bool,
        durable: bool | None = None,
    ) -> asyncio.Future[None]: ...


class Store:
    """The database of one gateway, opened by `async with Store.open(...)`.

    `record` puts a row of the ledger on disk, `transact` makes an administrative change, `rows` and
    `look_up` read. `healthy` is False from a commit that failed to the next that didn't.
    """

    def __init__(self, path: Path, synchronous: str) -> None:
        self.path = path
        self.interrupted = 0  # rows that the process before this one left behind
        self.migrated: Migrated | None = None  # as this process opened it
        self.replaced: Path | None = None  # by a restore that this process finished
        self.run: int | None = None  # the number of this run of a gateway
        self.commits: Commits
        self.record: ChangeRecorder
        self._read_only = f"{path.as_uri()}?mode=ro"
        self._synchronous = synchronous
        self._snapshots = asyncio.Semaphore(MAX_SNAPSHOTS)
        self._checks = asyncio.Semaphore(1)
        self._wal_bytes_left = 0  # when it was to be emptied, because of another program's reader
        self._trying = asyncio.Lock()  # whether a commit succeeds
        self.clock = LedgerClock()
        # The ledger's own time in milliseconds. It follows the wall clock, but never goes back, so
        # that a clock set back reopens no month and brings no old price back.
        self.time: Callable[[], int] = self.clock.now

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, path: Path, synchronous: str, serving: Serving | None = None
    ) -> AsyncIterator[Store]:
        """The store in the file `path`, made or brought up to date where needed. `serving` is None
        for a command. Raises DatabaseInUse; StorageUnavailable if it can't be opened now;
        LedgerDamaged; or UserError if the file is not ours, too new, or can't be opened."""
        store = cls(path, synchronous)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await store._open(stack, serving)
            except (sqlite3.Error, OSError) as error:
                raise opening_error(path, error) from None
            yield store

    async def _open(self, stack: contextlib.AsyncExitStack, serving: Serving | None) -> None:
        stack.enter_context(hold_lock(self.path))
        self.replaced = complete_restore(self.path)
        spill = Spill(self.path)
        refuse_without(self.path, spill)
        stack.enter_context(hold(self.path))
        if serving and serving.check_seconds and (spill.exists() or has_log(self.path)):
            await self._check(serving)
        writer = Writer(lambda: sqlite3.connect(self.path, isolation_level=None), 64)
        await stack.enter_async_context(writer)
        self._writer = writer
        if serving:
            stack.callback(serving.closing)
        await writer.create_function("joined", 2, joined_models)
        await self._configure()
        await self._migrate(serving)
        self.clock.go_on_from(await self._value(LATEST))
        if serving:
            self.clock.start(accept=serving.accept_clock)
        log = serving.log if serving else silent
        self.commits = Commits(self.path, writer, spill, self._synchronous, self.time, log)
        self.record = self.commits.record
        stack.callback(self._end_spill, spill)
        stack.push_async_callback(self.commits.close)
        await self.transact((MAKE_SECRET, (secrets.token_bytes(32),)))
        await self._take_up(spill, log)
        self.interrupted = await self.transact(
            (TAKE_OVER, ()),
            (KEEP_ESTIMATES, ()),
            (CLEAR_UNSETTLED, ()),
            (INTERRUPT, (month_of(self.time()),)),
        )
        # For the idempotency keys that are sent upstream.
        self.secret: bytes = await self._value(SECRET)
        reader = await stack.enter_async_context(self._connection())
        self._reader = Reader(reader, self.commits.notice)
        self._lookup = sqlite3.connect(self._read_only, uri=True, timeout=0)
        stack.callback(self._lookup.close)
        if serving:
            await self.transact((ADD_RUN, (self.time(),)))
            self.run = await self._value(LATEST_RUN)
            spill.reserve()
        writer.files = OpenFiles(self.path)

    def _end_spill(self, spill: Spill) -> None:
        """Remove the spill file of a ledger that closes cleanly. If the ledger was lost, the file
        stays, so that the next start checks the database."""
        if self.commits.health is Health.LOST:
            spill.close()
        else:
            spill.remove()

    async def _check(self, serving: Serving) -> None:
        """Check the pages of the database, since its last gateway did not end cleanly. Raises
        LedgerDamaged."""
        file = identity_of(self.path)
        if file == serving.checked:
            return
        began = time.monotonic()
        check = Check(self.path, serving.check_seconds, serving.log)
        try:
            wrong = await asyncio.to_thread(check.find_damage)
        finally:
            check.stop()
        if wrong:
            raise LedgerDamaged(f"{self.path} is damaged: {'; '.join(wrong)}")
        serving.checked = file
        took = round((time.monotonic() - began) * 1000)
        serving.log(logging.INFO, "ledger checked after an unclean end", duration_ms=took)

    async def _take_up(self, spill: Spill, log: LogFunction) -> None:
        """Commit what an earlier process owed. What is refused is put aside."""
        changes, damaged = spill.read()
        if not changes and not damaged:
            return
        refused = []
        for change in changes:
            try:
                (changed,) = await self._writer.write([change], self._synchronous)
                if change[0] == RECORD and not changed:
                    await self.commits.repair(change[1])
            except Exception as error:
                if not is_about_a_value(error):
                    raise
                refused.append(change)
        spill.refuse([*map(line_of, refused), *damaged])
        spill.reserve()
        spill.close()
        facts = {"changes": len(changes), "refused": len(refused), "damaged": len(damaged)}
        log(logging.WARNING, "took up what was owed", **facts)

    def _connection(self) -> DatabaseConnection:
        """A connection that can't write, not yet open."""
        return DatabaseConnection(lambda: sqlite3.connect(self._read_only, uri=True), 64)

    async def _configure(self) -> None:
        """Set what durability depends on, then read each back: SQLite is silent when it can't."""
        tables = await self._value("SELECT count(*) FROM sqlite_schema")
        marked = await self._value("PRAGMA application_id")
        if tables and marked != APPLICATION_ID:
            raise UserError(
                f"{self.path} is the database of another program; set database.path to another file"
            )
        wanted: dict[str, tuple[str | int, str | int]] = {
            "application_id": (APPLICATION_ID, APPLICATION_ID),
            "busy_timeout": (BUSY_TIMEOUT_MS, BUSY_TIMEOUT_MS),
            "journal_mode": ("WAL", "wal"),
            "synchronous": (self._synchronous, {"full": 2, "normal": 1}[self._synchronous]),
            "foreign_keys": ("ON", 1),
            "secure_delete": ("ON", 1),
            "journal_size_limit": (KEPT_WAL_BYTES, KEPT_WAL_BYTES),
        }
        for pragma, (value, expected) in wanted.items():
            if await self._value(f"PRAGMA {pragma}") != expected:
                await self._value(f"PRAGMA {pragma} = {value}")
            if (found := await self._value(f"PRAGMA {pragma}")) != expected:
                raise UserError(f"{self.path}: {pragma} is {found}, not {expected}")

    async def _migrate(self, serving: Serving | None) -> None:
        version = await self._value("PRAGMA user_version")
        sections = migrations(schema())
        if version > max(sections):
            raise UserError(
                f"{self.path} was written by a newer version of this program (schema {version}; "
                f"this one knows {max(sections)})"
            )
        due = {number: script for number, script in sorted(sections.items()) if number > version}
        if not due:
            return
        started, backup, no_backup = time.monotonic(), "", ""
        if version:
            backup, no_backup = await self._back_up(max(due), serving)
        for number, script in due.items():
            await self._writer.executescript(
                f"BEGIN IMMEDIATE; {script}\nPRAGMA user_version = {number}; COMMIT;"
            )
        if version:
            seconds = round(time.monotonic() - started, 3)
            self.migrated = Migrated(version, max(due), seconds, backup, no_backup)

    async def _back_up(self, version: int, serving: Serving | None) -> tuple[str, str]:
        file = identity_of(self.path)
        if serving and serving.copied and serving.copied[0] == file:
            return serving.copied[1], ""
        try:
            made, why_not = await asyncio.to_thread(back_up_before_migration, self.path, version)
        except Damaged as error:
            raise LedgerDamaged(f"{error}. It was not migrated") from None
        if serving and made:
            serving.copied = file, made
        return made, why_not

    async def _value(self, sql: str) -> Any:
        async with self._writer.execute(sql) as cursor:
            row = await cursor.fetchone()
            return row[0] if row else None

    # Reading

    def look_up_all(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return all rows of a short query that uses an index. Runs on the event loop: about 2 µs
        for each row. Raises StorageUnavailable."""
        try:
            return self._lookup.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            self.commits.notice(error)
            raise StorageUnavailable(f"the ledger can't be read: {error}") from None

    def look_up(self, sql: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """Return one row, found by an index, on the event loop: it takes about 5 µs. Raises
        StorageUnavailable."""
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

    def snapshot(
        self, outlived_by: contextlib.AsyncExitStack | None = None
    ) -> contextlib.AbstractAsyncContextManager[Reader]:
        """Return a reader to which the database stands still, with a connection and a thread of its
        own, for at most MAX_SNAPSHOT_SECONDS. At most MAX_SNAPSHOTS are open at a time.
        `outlived_by`: the connection stays open until that stack is closed, so that a copy can be
        read after the snapshot has ended. Raises StorageUnavailable if the database can't be read,
        or not in that time."""
        return self._snapshot(self._snapshots, MAX_SNAPSHOT_SECONDS, outlived_by)

    def snapshot_to_check(self) -> contextlib.AbstractAsyncContextManager[Reader]:
        """Return a snapshot for a check of the database, which may take MAX_CHECK_SECONDS. One is
        open at a time. Raises StorageUnavailable."""
        return self._snapshot(self._checks, MAX_CHECK_SECONDS)

    @contextlib.asynccontextmanager
    async def _snapshot(
        self,
        places: asyncio.Semaphore,
        seconds: float,
        outlived_by: contextlib.AsyncExitStack | None = None,
    ) -> AsyncIterator[Reader]:
        try:
            async with places, contextlib.AsyncExitStack() as own:
                connection = await (outlived_by or own).enter_async_context(self._connection())
                async with asyncio.timeout(seconds), _interrupting(connection):
                    await connection.execute("BEGIN")
                    yield Reader(connection, self.commits.notice)
                    await connection.commit()
        except TimeoutError:
            raise StorageUnavailable(
                f"reading the ledger took longer than {seconds} seconds; request a smaller range"
            ) from None
        except sqlite3.Error as error:
            raise StorageUnavailable(f"the ledger can't be read: {error}") from None

    # Size

    @property
    def wal_bytes(self) -> int:
        """The size of the WAL file."""
        return size_of(f"{self.path}-wal")

    def check_files(self) -> None:
        """Notice removed or replaced files while nothing is committed, too: what only they hold is
        lost with the process."""
        if self._writer.files:
            try:
                self._writer.files.check()
            except (FileChanged, OSError) as error:
                self.commits.notice(error)

    async def shrink(self) -> bool:
        """Empty the WAL file if it is large and the ledger is idle, or if it is too large: SQLite
        reuses the file only at an instant without a reader, and snapshots can overlap for ever.
        Return False if it is large and not the time for that. Emptying 40 MB takes about 80 ms; the
        commit that reuses them takes 50. Raises StorageUnavailable."""
        size = self.wal_bytes
        if size <= KEPT_WAL_BYTES:
            self._wal_bytes_left = 0
        elif not self.healthy:
            return False
        elif size > max(MAX_WAL_BYTES, 2 * self._wal_bytes_left):
            async with contextlib.AsyncExitStack() as places:
                for _ in range(MAX_SNAPSHOTS):  # those that are open end, and none begins
                    await places.enter_async_context(self._snapshots)
                await self._empty_wal()
            self._wal_bytes_left = self.wal_bytes
        elif self.commits.idle:
            await self._empty_wal()
        else:
            return False
        return True

    async def _empty_wal(self) -> None:
        try:
            await self._writer.empty_wal()
        except Exception as error:
            self.commits.notice(error)
            raise StorageUnavailable(f"the WAL file can't be emptied: {reason_of(error)}") from None

    # Writing

    @property
    def healthy(self) -> bool:
        """Return whether commits succeed."""
        return self.commits.healthy

    @property
    def failure(self) -> str:
        """Return why no commit succeeds, "" if they do."""
        return self.commits.failure

    def give_up_if_failing(self) -> None:
        """Put what is owed into the spill file if no commit succeeds: the process is to end."""
        if self.commits.health is Health.FAILING:
            self.commits.give_up()

    async def transact(
        self, *changes: OwedChange, by: str | None = None, seconds: float | None = None
    ) -> int:
        """Make changes, all of them or none; returns how many rows the last one changed. `by`: who
        makes them, which the log of administrative changes tells and those can't do without.
        Raises sqlite3.IntegrityError, or StorageUnavailable where it can't be committed, or takes
        longer than `seconds` (None: TRANSACT_SECONDS); then it may be made later."""
        seconds = seconds or TRANSACT_SECONDS
        if by is not None:
            changes = ((SIGN, (by, self.time())), *changes, (UNSIGN, ()))
        if self.commits.health is Health.LOST:
            raise StorageUnavailable(f"the database can't be written: {self.failure}")
        try:
            async with asyncio.timeout(seconds):
                changed = await self._writer.write(changes, self._synchronous)
        except sqlite3.IntegrityError:
            raise
        except TimeoutError:
            raise StorageUnavailable(
                f"the disk has not answered for {seconds} s; the change may still be made later"
            ) from None
        except Exception as error:
            self.commits.notice(error)
            what = LedgerDamaged if is_corrupt(error) else StorageUnavailable
            raise what(f"the database can't be written: {reason_of(error)}") from None
        return changed[-1 if by is None else -2]

    async def settle_time(self) -> int:
        """The ledger's time, kept so that it holds after a restart, and after all that was to be
        written before."""
        now = self.time()
        await self.record(BEAT, (now,), retry_until_written=False)
        return now

    async def can_commit(self) -> bool:
        """Return whether a commit succeeds now, in the way that requests take: one within the last
        second is proof enough, and one try for all who ask meanwhile."""
        async with self._trying:
            if self.healthy and time.monotonic() - self.commits.committed_at > 1:
                with contextlib.suppress(StorageUnavailable):
                    await self.settle_time()
        return self.healthy


def size_of(file: str | Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


def has_log(database: Path) -> bool:
    """Return whether a write-ahead log lies beside a database, left by a process that was
    killed."""
    try:
        return os.stat(f"{database}-wal").st_size > 0
    except FileNotFoundError:
        return False


def refuse_without(database: Path, spill: Spill) -> None:
    """Raise UserError if the database is gone, but not what was saved of it, or if it is older
    than that: it then lacks what was in a removed -wal. A restored one is newer."""
    written = database.stat().st_mtime_ns if database.exists() else 0
    rescued = sorted(database.parent.glob(f"{database.name}.rescue-*"))
    saved = [each for each in rescued if each.stat().st_mtime_ns > written]
    if saved:
        raise UserError(
            f"{database} is missing, or older than {saved[-1]}, a copy made when its files were "
            "removed. Restore that file (db restore FILE), or move it away to continue without it"
        )
    if size_of(database) == 0 and has_log(database):
        raise UserError(
            f"{database} is {'empty' if written else 'missing'}, but {database}-wal exists. "
            "Restore a backup (db restore FILE), or move it away to start with an empty ledger"
        )
    if written:
        return
    if spill.read()[0]:
        raise UserError(
            f"{database} is missing, but {spill.path} holds entries that belong to it. Restore a "
            "backup (db restore FILE), or move that file away to start with an empty ledger"
        )
