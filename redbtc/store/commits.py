"""Commits: how changes get into the database, in groups, and what happens when they don't.

Whatever has come while a commit was under way is the next commit. Any failure that is not about a
value means that the fate of the group is unknown: it is written again until a commit succeeds, and
until then nothing new is admitted. Every statement has the same effect when it is executed again.

If the file can't be trusted any more (another file is at its path, or a page is damaged), or the
process has to end before a commit succeeds, what is owed goes into the spill file instead, and what
waits for it goes on: the next process commits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import aiosqlite

from redbtc.errors import StorageUnavailable
from redbtc.histogram import Histogram
from redbtc.store.checks import LogFunction, is_corrupt
from redbtc.store.files import FileChanged, OpenFiles
from redbtc.store.rows import COLUMNS, FORGET, MAX_ROWS, RECORD, SETTLED, record_of
from redbtc.store.spill import OwedChange, Spill, line_of

RETRY_SECONDS = 0.25
WATCH_SECONDS = 0.1
IDLE_SECONDS = 1
MAX_BEGIN_SECONDS = 1.9  # and WATCH_SECONDS: nobody waits longer than 2 s to be admitted
MAX_CLOSE_SECONDS = 10
RESCUE_SECONDS = 10  # between two tries
GONE = (
    "Don't stop the gateway until it logs 'ledger rescued'. Then stop it and restore the file that "
    "the log names: db restore FILE."
)
RESCUED = "Stop the gateway and restore the file: db restore FILE. What it lacks is added then."
DAMAGED = (
    "Stop the gateway and restore a backup: db restore FILE. What it lacks is added then. Or save "
    "what can be read with the recover command of the sqlite3 program."
)
BEAT = "INSERT OR REPLACE INTO heartbeat (id, beat_at) VALUES (1, ?)"


class Health(enum.Enum):
    """Whether changes can be committed."""

    WELL = "commits succeed"
    FAILING = "the last commit failed, or takes too long; it is tried again"
    LOST = "this process writes nothing into the file any more"


class Entry(NamedTuple):
    """A statement that waits for the next commit. With `retry_until_written` it is retried until it
    is written; without, it fails with the commit that fails. With `durable` it must survive a loss
    of power. `at` is when it was recorded, by the monotonic clock, where it is not retried."""

    sql: str
    values: Sequence[Any]
    written: asyncio.Future[None]
    retry_until_written: bool
    durable: bool
    at: float

    @property
    def change(self) -> OwedChange:
        """Return the statement and its values."""
        return self.sql, self.values

    @property
    def undo(self) -> OwedChange | None:
        """Return what takes back a row that was begun; None for anything else."""
        return (
            (FORGET, self.values[:1])
            if self.sql == RECORD and not self.retry_until_written
            else None
        )

    def done(self) -> None:
        """Let whatever waits for the statement go on."""
        if not self.written.done():
            self.written.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raise the error where the statement is waited for: it is not written."""
        if not self.written.done():
            self.written.set_exception(error)


def is_about_a_value(error: Exception) -> bool:
    """Return whether SQLite or Python refused one of the values of a statement. Everything else
    means that the ledger can't commit."""
    refused = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, ValueError, TypeError)
    return isinstance(error, refused) or "binding parameter" in str(error)


def reason_of(error: Exception) -> str:
    """Return what failed, for the log. No statement's values are in it."""
    known = isinstance(error, sqlite3.Error | OSError | FileChanged)
    return str(error) if known and str(error) else type(error).__name__


def synced(path: Path) -> None:
    """Bring a file to the disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


ENDING_SECONDS = 1  # for the thread of a connection that is not opened


class DatabaseConnection(aiosqlite.Connection):
    """A connection whose thread has ended when opening it fails or is cancelled. aiosqlite's own
    goes on, finds the event loop closed, and prints a traceback."""

    async def _connect(self) -> aiosqlite.Connection:
        try:
            return await super()._connect()
        except BaseException:
            await asyncio.to_thread(self._thread.join, ENDING_SECONDS)
            raise


class Writer(DatabaseConnection):
    """The connection that writes. A transaction is one call to its thread; one with a single
    statement is one call to SQLite, too, and lets go of Python's lock but once."""

    _synchronous = ""
    files: OpenFiles | None = None  # checked before each transaction

    async def write(self, changes: Sequence[OwedChange], synchronous: str) -> list[int]:
        """Commit these changes together; returns how many rows each one changed."""
        changed: list[int] = await self._execute(self._write, changes, synchronous)  # type: ignore[no-untyped-call]
        return changed

    def _write(self, changes: Sequence[OwedChange], synchronous: str) -> list[int]:
        if self.files:
            self.files.check()
        database = self._conn
        if synchronous != self._synchronous:
            database.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        try:
            if len(changes) > 1:
                database.execute("BEGIN IMMEDIATE")
            changed = [database.execute(sql, values).rowcount for sql, values in changes]
            database.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            raise
        return changed

    async def empty_wal(self) -> None:
        """Copy the WAL into the database and empty the WAL file. While a reader still needs it,
        only copy. Raises sqlite3.Error, FileChanged, OSError."""
        await self._execute(self._empty_wal)  # type: ignore[no-untyped-call]

    def _empty_wal(self) -> None:
        if self.files:
            self.files.check()
        database = self._conn
        (timeout_ms,) = database.execute("PRAGMA busy_timeout").fetchone()
        database.execute("PRAGMA busy_timeout = 0")  # commits must not wait for a reader
        try:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            database.execute(f"PRAGMA busy_timeout = {timeout_ms}")

    @property
    def works(self) -> bool:
        """Return whether its thread runs."""
        return self._thread.is_alive()


def changes_of(entries: list[Entry]) -> tuple[list[OwedChange], list[int]]:
    """Return entries as the statements of one transaction, in which rows of requests that follow
    one another are one statement. The second list has the number of rows that each statement must
    change, 0 if that is not known."""
    if len(entries) == 1:
        (entry,) = entries
        return [(entry.sql, entry.values)], [1 if entry.sql == RECORD else 0]
    changes: list[OwedChange] = []
    counts: list[int] = []
    for sql, same in groupby(entries, key=lambda entry: entry.sql):
        values = [entry.values for entry in same]
        most = MAX_ROWS if sql == RECORD else 1
        for at in range(0, len(values), most):
            rows = values[at : at + most]
            changes.append((record_of(len(rows)), list(chain(*rows))) if most > 1 else (sql, *rows))
            counts.append(len(rows) if most > 1 else 0)
    return changes, counts


def owed_by(entries: list[Entry]) -> list[OwedChange]:
    """Return what is owed to the ledger if these entries are not committed: the changes that must
    be made, and what takes back rows that may have been begun."""
    owed = [entry.change for entry in entries if entry.retry_until_written]
    return owed + [undo for entry in entries if (undo := entry.undo)]


class Commits:
    """The queue of changes, and the state of the ledger. `record` is the way in."""

    def __init__(
        self,
        database: Path,
        writer: Writer,
        spill: Spill,
        synchronous: str,
        now: Callable[[], int],
        log: LogFunction,
    ) -> None:
        """`now` returns the ledger's time in milliseconds."""
        self.health = Health.WELL
        self.healthy = True  # whether that is so
        self.failure = ""  # why not
        self.count = 0  # of commits
        self.committed_at = time.monotonic()
        self.commit_seconds = Histogram(COMMIT_SECONDS)
        self.begin_seconds = Histogram(COMMIT_SECONDS)  # from a request's begin to its commit
        self._committed: list[float] = []  # durations that are not in the histograms yet
        self._begun: list[float] = []
        self.repaired = 0  # rows that somebody else had closed
        self._database = database
        self._writer = writer
        self._spill = spill
        self._synchronous = synchronous
        self._now = now
        self._say = log
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._group: list[Entry] = []  # those that are being written
        self._began = 0.0  # when that began
        self._wake = asyncio.Event()
        self._closing = False
        self._rescuing: asyncio.Task[None] | None = None
        self.tasks = [
            asyncio.create_task(self._work(), name="ledger"),
            asyncio.create_task(self._watch(), name="ledger watch"),
        ]

    @property
    def idle(self) -> bool:
        """Return whether nothing waits, and nothing was committed for IDLE_SECONDS."""
        waiting = self._waiting or self._group
        return not waiting and time.monotonic() - self.committed_at > IDLE_SECONDS

    def record(
        self,
        sql: str,
        values: Sequence[Any],
        *,
        retry_until_written: bool,
        durable: bool | None = None,
    ) -> asyncio.Future[None]:
        """Write a statement in the next group; the future is done when it is on disk. With
        `retry_until_written` it is tried until it succeeds; without, the future raises
        StorageUnavailable if this try fails or takes too long. With `durable`, by default the same
        as `retry_until_written`, it survives a loss of power, not only the end of this process."""
        written: asyncio.Future[None] = self._loop.create_future()
        if self.healthy or retry_until_written:
            durable = retry_until_written if durable is None else durable
            at = 0.0 if retry_until_written else time.monotonic()
            self._waiting.append(Entry(sql, values, written, retry_until_written, durable, at))
            self._wake.set()
        else:
            written.set_exception(StorageUnavailable(self.failure))
        return written

    def _turn(self, health: Health, reason: str = "") -> None:
        """Change the state, and say so. What is lost stays lost."""
        before = self.health
        if before is health or before is Health.LOST:
            return
        self.health, self.healthy, self.failure = health, health is Health.WELL, reason
        if health is Health.WELL:
            self._say(logging.INFO, "ledger recovered")
        elif health is Health.FAILING:
            self._say(logging.ERROR, "ledger unavailable", reason=reason)

    # Writing

    async def _work(self) -> None:
        try:
            while not self._closing or self._waiting:
                if self.healthy:
                    await self._wake.wait()
                    self._wake.clear()
                else:
                    await asyncio.sleep(RETRY_SECONDS)
                await asyncio.sleep(0)  # whoever is ready in this turn of the loop comes along
                if self.health is Health.LOST:
                    break
                self._group, self._waiting = self._waiting, []
                if self._group or not self.healthy:
                    await self._write_group(self._group)
                self._group = []
        except asyncio.CancelledError:
            if self.health is not Health.LOST:
                raise
        if self.health is Health.LOST:
            await self._spill_groups()

    async def _write_group(self, entries: list[Entry]) -> None:
        changes, counts = changes_of(entries)
        durable = not self.healthy or any(entry.durable for entry in entries)
        if not self.healthy:
            changes.append((BEAT, (self._now(),)))
            counts.append(0)
        began = self._began = time.monotonic()
        try:
            changed = await self._writer.write(changes, self._synchronous if durable else "normal")
            for count, done in zip(counts, changed, strict=True):
                if count > done:
                    await self._repair([entry for entry in entries if entry.sql == RECORD])
                    break
        except Exception as error:
            if entries and is_about_a_value(error):
                await self._isolate(entries, error)
            else:
                self._failed(entries, error)
        else:
            self._written(entries, began)

    def _written(self, entries: list[Entry], began: float) -> None:
        if not self.healthy:
            self._turn(Health.WELL)
        self.count += 1
        self.committed_at = time.monotonic()
        self._committed.append(self.committed_at - began)
        for entry in entries:
            if not entry.retry_until_written:
                self._begun.append(self.committed_at - entry.at)
            if not entry.written.done():
                entry.written.set_result(None)
            else:  # it has waited too long: its request was refused
                self._undo(entry)

    def _undo(self, entry: Entry) -> None:
        """Take back a row that was begun, or may have been, for a request that was refused."""
        if undo := entry.undo:
            nobody: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(Entry(*undo, nobody, True, True, 0.0))
            self._wake.set()

    def _failed(self, entries: list[Entry], error: Exception) -> None:
        """Keep what must be written; for the rest take back whatever may have reached the disk
        (after a failed fsync a row's fate is unknown)."""
        reason = reason_of(error)
        for entry in entries:
            if not entry.retry_until_written:
                entry.fail(StorageUnavailable(reason))
                self._undo(entry)
        self._waiting[:0] = [entry for entry in entries if entry.retry_until_written]
        self._turn(Health.FAILING, reason)
        self.notice(error)

    # Values that are refused

    async def _isolate(self, entries: list[Entry], error: Exception) -> None:
        """Write entries one by one: a value that is refused must not hold up the others."""
        if len(entries) > 1:
            for entry in entries:
                await self._write_group([entry])
            return
        (entry,) = entries
        if not entry.retry_until_written:
            entry.fail(error)
        elif entry.sql == RECORD:
            await self._write_without_bad_value(entry, error)
        else:
            self._set_aside(entry, error)

    async def _write_without_bad_value(self, entry: Entry, error: Exception) -> None:
        """Write a settled row without the field that is refused, or else without all that can be
        left out."""
        tries = [[name] for name in OPTIONAL] + [OPTIONAL]
        for left_out in tries:
            values = [
                None if name in left_out else value
                for name, value in zip(COLUMNS, entry.values, strict=True)
            ]
            if values == list(entry.values):
                continue
            try:
                await self._writer.write([(RECORD, values)], self._synchronous)
            except Exception as again:
                if not is_about_a_value(again):
                    self._failed([entry], again)
                    return
            else:
                self._say_refused(entry, error, fields=left_out)
                entry.done()
                return
        self._set_aside(entry, error)

    def _set_aside(self, entry: Entry, error: Exception) -> None:
        """Put a change that can't be committed into a file of its own: nothing is thrown away."""
        self._say_refused(entry, error, file=str(self._spill.refused))
        try:
            self._spill.refuse([line_of(entry.change)])
        except OSError as failed:
            self._failed([entry], failed)
        else:
            entry.done()

    def _say_refused(self, entry: Entry, error: Exception, **more: Any) -> None:
        first = entry.values[0] if entry.values else None
        reason = reason_of(error)
        self._say(logging.ERROR, "value refused", of=str(first)[:64], reason=reason, **more)

    # Rows that somebody else has closed

    async def _repair(self, entries: list[Entry]) -> None:
        """Look at rows that were not pending when they were to be settled. After a commit of
        unknown fate they are as they should be. A row that another process has marked as
        interrupted is opened again and settled."""
        for entry in entries:
            await self.repair(entry.values)

    async def repair(self, values: Sequence[Any]) -> None:
        """Look at one such row: `values` are those that it was to be settled with."""
        wanted = dict(zip(COLUMNS, values, strict=True))
        found = await self._stored(wanted["request_id"])
        if found is None or all(found[name] == wanted[name] for name in SETTLED):
            return
        changes: list[OwedChange] = [
            (REOPEN, (self._now(), wanted["request_id"], wanted["run"])),
            (RECORD, values),
        ]
        reopened, *_ = await self._writer.write(changes, self._synchronous)
        self.repaired += 1
        self._say(
            logging.ERROR,
            "row closed by another process",
            request_id=wanted["request_id"],
            found=found["outcome"],
            wanted=wanted["outcome"],
            repaired=bool(reopened),
        )

    async def _stored(self, request_id: str) -> dict[str, Any] | None:
        rows = await self._writer.execute_fetchall(STORED, (request_id,))
        return next((dict(zip(COLUMNS, row, strict=True)) for row in rows), None)

    # What waits too long

    async def _watch(self) -> None:
        """Refuse what waits too long to be admitted: a disk may not answer for a long time."""
        while True:
            due = time.monotonic() + WATCH_SECONDS
            await asyncio.sleep(WATCH_SECONDS)
            if not self._writer.works:
                raise RuntimeError("the thread that writes the ledger has ended")
            self._count_durations()
            # While the event loop stood still, a commit may have succeeded without being noticed.
            self._refuse_late(due - MAX_BEGIN_SECONDS)

    def _count_durations(self) -> None:
        """Count how long commits took: here, where no request waits for it."""
        for histogram, durations in (
            (self.commit_seconds, self._committed),
            (self.begin_seconds, self._begun),
        ):
            histogram.observe_all(durations)
            durations.clear()

    def _refuse_late(self, since: float) -> None:
        if self._group and self._began < since:
            self._turn(Health.FAILING, f"a commit takes longer than {MAX_BEGIN_SECONDS} s")
        for entry in chain(self._group, self._waiting):
            if entry.at < since and not entry.retry_until_written:
                entry.fail(StorageUnavailable(self.failure or "the ledger is too slow"))
        self._waiting = [
            entry
            for entry in self._waiting
            if entry.retry_until_written or not entry.written.done()
        ]

    # The end

    def notice(self, error: Exception) -> None:
        """Write nothing into the file any more if an error shows that it can't be trusted. If it is
        not at its path any more, write all that it holds into a new file."""
        gone = isinstance(error, FileChanged)
        if self.health is Health.LOST or not (gone or is_corrupt(error)):
            return
        self._give_up(reason_of(error))
        way_out = GONE if gone else DAMAGED
        self._say(logging.CRITICAL, "ledger lost", reason=self.failure, what_to_do=way_out)
        if gone:
            self._rescuing = asyncio.create_task(self._rescue(), name="ledger rescue")

    def give_up(self) -> None:
        """Write what is owed into the spill file from now on, since the process ends and no commit
        succeeds."""
        if self.health is not Health.LOST:
            self._say(logging.WARNING, "ledger given up", reason=self.failure)
            self._give_up(self.failure)

    def _give_up(self, reason: str) -> None:
        self._turn(Health.LOST, reason)
        self._wake.set()
        self.tasks[0].cancel()

    async def _spill_groups(self) -> None:
        """Write what is owed into the spill file, for as long as the process runs."""
        self._waiting[:0] = self._group
        while not self._closing or self._waiting:
            if not self._waiting:
                await self._wake.wait()
                self._wake.clear()
            self._group, self._waiting = self._waiting, []
            owed = owed_by(self._group)
            written = await asyncio.to_thread(self._spill.add, owed)
            self._say_unwritten(owed[written:])
            for entry in self._group:
                if not entry.retry_until_written:
                    entry.fail(StorageUnavailable(self.failure))
                entry.done()
            self._group = []

    def spill_now(self) -> None:
        """Write what is owed into the spill file at once: the process ends with the next line."""
        owed = owed_by([*self._group, *self._waiting])
        self._say_unwritten(owed[self._spill.add(owed) :])

    def _say_unwritten(self, changes: list[OwedChange]) -> None:
        """There is no other place left for a row than the log."""
        for sql, values in changes:
            if sql == RECORD:
                row = {
                    name: value
                    for name, value in zip(COLUMNS, values, strict=True)
                    if value is not None
                }
                self._say(logging.CRITICAL, "row not kept", **row)

    async def _rescue(self) -> None:
        """Write all that the removed file holds into a new one beside it, as soon as that succeeds:
        this process has the only copy."""
        while True:
            path = Path(f"{self._database}.rescue-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
            try:
                await self._copy_to(path)
            except Exception as error:
                self._say(logging.CRITICAL, "ledger not rescued", reason=reason_of(error))
            else:
                self._say(logging.CRITICAL, "ledger rescued", file=str(path), what_to_do=RESCUED)
                return
            if self._closing:
                return
            await asyncio.sleep(RESCUE_SECONDS)

    async def _copy_to(self, path: Path) -> None:
        """Copy the open database to a file, which has its name only when it is whole and on the
        disk. Raises sqlite3.Error, OSError."""
        partial = Path(f"{self._database}.rescuing")
        try:
            partial.unlink(missing_ok=True)
            await self._writer.execute_fetchall("VACUUM INTO ?", (str(partial),))
            await asyncio.to_thread(synced, partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    async def close(self) -> None:
        """Write what waits, or spill it if no commit succeeds. Gives up if the disk of the spill
        file does not answer, either."""
        self._closing = True
        self._wake.set()
        work, watch = self.tasks
        ends = time.monotonic() + MAX_CLOSE_SECONDS
        while not work.done() and time.monotonic() < ends:
            if self.health is Health.FAILING:
                self.give_up()
            await asyncio.wait([work], timeout=WATCH_SECONDS)
        if self._rescuing:
            await asyncio.wait([self._rescuing])
        watch.cancel()


COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# What a settled row can do without, if a value is refused.
OPTIONAL = [name for name in SETTLED if name not in ("outcome", "usage_source", "month")]
REOPEN = """
    INSERT INTO reopened (request_id, reopened_at)
    SELECT request_id, ? FROM requests WHERE request_id = ? AND run = ? AND outcome = 'interrupted'
       AND NOT EXISTS (SELECT 1 FROM corrections WHERE request_id = requests.request_id)"""
STORED = f"SELECT {', '.join(COLUMNS)} FROM requests WHERE request_id = ?"
