"""The changes that wait for a commit, and how a group of them becomes one transaction.

A change is recorded with all that the engine must know of it: whether it is retried until it is
written, whether it must survive a power loss, what takes it back if its commit fails, and its kind
if there is more to do than to execute its statement. The engine never looks into the SQL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

from redbtc.errors import StorageUnavailable
from redbtc.store.health import LedgerState
from redbtc.store.spill import OwedChange
from redbtc.store.writer import SQLStatement, Writer

MAX_BEGIN_SECONDS = 1.9  # with LATE_CHECK_SECONDS: no request waits longer than 2 s to be admitted


class EntryKind(Protocol):
    """A kind of entries that are rows of one table. Rows that follow one another are written by one
    statement, and each must change its row."""

    name: str  # in the spill file
    max_rows: int  # of one statement

    def statement(self, rows: Sequence[Sequence[Any]]) -> SQLStatement:
        """Return the statement that writes the rows, given their values."""

    def reduced(self, values: Sequence[Any]) -> Iterator[tuple[list[str], list[Any]]]:
        """Return values that may be written if one of `values` is refused, each with the names of
        the columns that are left out. The first that SQLite accepts is written."""

    def columns(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the values by column."""

    def completed(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        """Return the values of a row as this version writes it. `sql` is the statement of an
        earlier version, which may have had fewer columns; those that it lacks are None."""

    async def repair(
        self, writer: Writer, values: Sequence[Any], now: int
    ) -> dict[str, Any] | None:
        """Write a row that the statement did not change although it should have. Return fields for
        the log; None if the row is as it should be."""


class Entry(NamedTuple):
    """A change that waits for a commit. `ChangeQueue.record` explains the fields; `at` is when the
    entry was recorded, by the monotonic clock, or 0 if it is retried until it is written."""

    sql: str
    values: Sequence[Any]
    written: asyncio.Future[None]
    retry_until_written: bool
    durable: bool
    at: float
    kind: EntryKind | None
    undo: SQLStatement | None

    @property
    def owed(self) -> OwedChange:
        """Return the change as the spill file keeps it."""
        return OwedChange(self.sql, self.values, self.kind.name if self.kind else "")

    def done(self) -> None:
        """Let the caller that waits for the entry continue."""
        if not self.written.done():
            self.written.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raise the error where the entry is waited for: it is not written."""
        if not self.written.done():
            self.written.set_exception(error)


class ChangeQueue:
    """The entries that wait for a commit, and those whose commit is under way."""

    def __init__(self, state: LedgerState) -> None:
        self.waiting: list[Entry] = []
        self.writing: list[Entry] = []
        self.arrived = asyncio.Event()  # something waits, or the ledger closes
        self.commit_began = 0.0  # by the monotonic clock
        self._state = state
        self._loop = asyncio.get_running_loop()

    def record(
        self,
        sql: str,
        values: Sequence[Any],
        *,
        retry_until_written: bool,
        durable: bool | None = None,
        kind: EntryKind | None = None,
        undo: SQLStatement | None = None,
    ) -> asyncio.Future[None]:
        """Write a change with the next commit. Return a future that is done when it is on disk.

        With `retry_until_written`, the change is retried until it is written. Without, the future
        raises StorageUnavailable if the commit fails or takes too long, and `undo` is written then:
        the fate of a commit that failed is unknown. With `durable`, by default the same as
        `retry_until_written`, the change survives a power loss, not only the end of this process.
        `kind` says how rows of the same kind are written together, and what is done if one is
        refused or changes nothing.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        if self._state.healthy or retry_until_written:
            durable = retry_until_written if durable is None else durable
            at = 0.0 if retry_until_written else time.monotonic()
            self.waiting.append(
                Entry(sql, values, written, retry_until_written, durable, at, kind, undo)
            )
            self.arrived.set()
        else:
            written.set_exception(StorageUnavailable(self._state.failure))
        return written

    def take(self) -> list[Entry]:
        """Begin to write the entries that wait, and return them."""
        self.writing, self.waiting = self.waiting, []
        return self.writing

    def put_back(self, entries: list[Entry]) -> None:
        """Let entries wait again, before all others."""
        self.waiting[:0] = entries

    def undo(self, entry: Entry) -> None:
        """Take back an entry that may be on disk, since its caller was told that it is not."""
        if entry.undo:
            self.record(*entry.undo, retry_until_written=True)

    def refuse_late(self, due: float) -> None:
        """Fail entries that have waited for longer than MAX_BEGIN_SECONDS at the time `due`, by the
        monotonic clock: the disk may not answer for a long time."""
        since = due - MAX_BEGIN_SECONDS
        if self.writing and self.commit_began < since:
            reason = f"a commit takes longer than {MAX_BEGIN_SECONDS} s"
            self._state.enter("failing", reason)
        for entry in chain(self.writing, self.waiting):
            if entry.at < since and not entry.retry_until_written:
                entry.fail(StorageUnavailable(self._state.failure or "the ledger is too slow"))
        self.waiting = [
            entry for entry in self.waiting if entry.retry_until_written or not entry.written.done()
        ]


def statements_of(entries: list[Entry]) -> tuple[list[SQLStatement], list[int]]:
    """Return entries as the statements of one transaction, and for each statement the number of
    rows that it must change, 0 if that is not known."""
    if len(entries) == 1:
        (entry,) = entries
        return [(entry.sql, entry.values)], [1 if entry.kind else 0]
    statements: list[SQLStatement] = []
    counts: list[int] = []
    for kind, same in groupby(entries, key=lambda entry: entry.kind):
        if kind is None:
            statements += [(entry.sql, entry.values) for entry in same]
            counts += [0] * (len(statements) - len(counts))
            continue
        values = [entry.values for entry in same]
        for at in range(0, len(values), kind.max_rows):
            rows = values[at : at + kind.max_rows]
            statements.append(kind.statement(rows))
            counts.append(len(rows))
    return statements, counts


def owed_by(entries: list[Entry]) -> list[OwedChange]:
    """Return what the ledger lacks if these entries are not committed: the changes that must be
    written, and what takes back those of which the caller was told that they are not."""
    owed = [entry.owed for entry in entries if entry.retry_until_written]
    return owed + [OwedChange(*entry.undo) for entry in entries if entry.undo]
