"""Write changes into the database, in groups, and keep them when that fails.

Whatever was recorded while a commit was under way is the next commit. An error that is not about a
value means that the fate of the group is unknown. The group is written again until a commit
succeeds, and until then no request is admitted. Every statement has the same effect when it is
executed again.

If the file can't be trusted any more (another file is at its path, or a page is damaged), or the
process has to end before a commit succeeds, the changes go into the spill file instead, and their
callers continue. The next process commits them.

The parts: redbtc/store/entries.py holds the changes that wait, health.py the state of the ledger,
writer.py the connection, refused.py what is done with refused values, and rescue.py what is saved
when the file is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redbtc.errors import StorageUnavailable
from redbtc.histogram import Histogram
from redbtc.store.entries import ChangeQueue, Entry, EntryKind, statements_of
from redbtc.store.failures import (
    DAMAGED_IN_USE,
    FILE_CHANGED,
    LogFunction,
    is_about_a_value,
    is_corrupt,
    reason_of,
)
from redbtc.store.files import FileChanged
from redbtc.store.health import RETRY_SECONDS, LedgerState
from redbtc.store.refused import RefusedValues
from redbtc.store.rescue import Rescue
from redbtc.store.spill import Spill
from redbtc.store.writer import Writer

LATE_CHECK_SECONDS = 0.1
IDLE_SECONDS = 1
MAX_CLOSE_SECONDS = 10
COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BEAT = "INSERT OR REPLACE INTO heartbeat (id, beat_at) VALUES (1, ?)"


class Commits:
    """Writes the changes of the queue, group after group. `record` adds a change."""

    def __init__(
        self,
        database: Path,
        writer: Writer,
        spill: Spill,
        now: Callable[[], int],
        log: LogFunction,
    ) -> None:
        """`now` returns the ledger's time in milliseconds."""
        self.state = LedgerState(log)
        self.count = 0  # of commits
        self.committed_at = time.monotonic()
        self.commit_seconds = Histogram(COMMIT_SECONDS)
        self.begin_seconds = Histogram(COMMIT_SECONDS)  # from a request's begin to its commit
        self._committed: list[float] = []  # durations that are not in the histograms yet
        self._begun: list[float] = []
        self.repaired = 0  # rows that another process had closed
        self._queue = ChangeQueue(self.state)
        self.record = self._queue.record
        self._writer = writer
        self._refused = RefusedValues(writer, spill, log)
        self._rescue = Rescue(database, writer, spill, log)
        self._now = now
        self.log = log
        self._closing = False
        self.tasks = [
            asyncio.create_task(self._work(), name="ledger"),
            asyncio.create_task(self._refuse_late(), name="ledger watch"),
        ]

    @property
    def idle(self) -> bool:
        """Return whether nothing waits, and nothing was committed for IDLE_SECONDS."""
        waiting = self._queue.waiting or self._queue.writing
        return not waiting and time.monotonic() - self.committed_at > IDLE_SECONDS

    @property
    def waiting(self) -> int:
        """Return how many changes wait for a commit, or are being written."""
        return len(self._queue.waiting) + len(self._queue.writing)

    # Groups

    async def _work(self) -> None:
        queue, state = self._queue, self.state
        try:
            while not self._closing or queue.waiting:
                if state.healthy:
                    await queue.arrived.wait()
                    queue.arrived.clear()
                else:
                    await asyncio.sleep(RETRY_SECONDS)
                await asyncio.sleep(0)  # let what is ready in this turn of the loop join the group
                if state.health == "lost":
                    break
                if queue.take() or not state.healthy:
                    await self._write_group(queue.writing)
                queue.writing = []
        except asyncio.CancelledError:
            if state.health != "lost":
                raise
        if state.health == "lost":
            await self._spill_groups()

    async def _write_group(self, entries: list[Entry]) -> None:
        statements, counts = statements_of(entries)
        healthy = self.state.healthy
        if not healthy:
            statements.append((BEAT, (self._now(),)))
            counts.append(0)
        durable = not healthy
        for entry in entries:  # any() would cost three calls
            durable = durable or entry.durable
        began = self._queue.commit_began = time.monotonic()
        try:
            changed = await self._writer.write(statements, durable=durable)
            for count, done in zip(counts, changed, strict=True):
                if count > done:
                    await self._repair_rows(entries)
                    break
        except Exception as error:
            if entries and is_about_a_value(error):
                await self._isolate(entries, error)
            else:
                self._failed(entries, error)
        else:
            self._written(entries, began)

    def _written(self, entries: list[Entry], began: float) -> None:
        if not self.state.healthy:
            self.state.enter("well")
        self.count += 1
        self.committed_at = time.monotonic()
        self._committed.append(self.committed_at - began)
        for entry in entries:
            if not entry.retry_until_written:
                self._begun.append(self.committed_at - entry.at)
            if not entry.written.done():
                entry.written.set_result(None)
            else:  # it has waited too long: its request was refused
                self._queue.undo(entry)

    def _failed(self, entries: list[Entry], error: Exception) -> None:
        """Keep the entries that are retried until they are written, and fail and undo the others:
        after a failed fsync it is unknown what has reached the disk."""
        reason = reason_of(error)
        for entry in entries:
            if not entry.retry_until_written:
                entry.fail(StorageUnavailable(reason))
                self._queue.undo(entry)
        self._queue.put_back([entry for entry in entries if entry.retry_until_written])
        self.state.enter("failing", reason)
        self.check_error(error)

    async def _isolate(self, entries: list[Entry], error: Exception) -> None:
        """Write entries one by one: a value that is refused must not hold up the others."""
        if len(entries) > 1:
            for entry in entries:
                await self._write_group([entry])
            return
        (entry,) = entries
        if not entry.retry_until_written:
            entry.fail(error)
            return
        try:
            reduced = await self._refused.write_reduced(entry, error)
        except Exception as again:
            self._failed(entries, again)
            return
        try:
            if not reduced:
                self._refused.set_aside(entry, error)
        except OSError as again:
            self._failed(entries, again)
        else:
            entry.done()

    # Rows that another process has closed

    async def _repair_rows(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.kind:
                await self.repair(entry.kind, entry.values)

    async def repair(self, kind: EntryKind, values: Sequence[Any]) -> None:
        """Write a row that its statement has not changed. After a commit of unknown fate, the row
        is as it should be. A row that another process has closed is opened again and settled."""
        if found := await kind.repair(self._writer, values, self._now()):
            self.repaired += 1
            self.log(logging.ERROR, "row closed by another process", **found)

    # Entries that wait too long

    async def _refuse_late(self) -> None:
        while True:
            due = time.monotonic() + LATE_CHECK_SECONDS
            await asyncio.sleep(LATE_CHECK_SECONDS)
            if not self._writer.works:
                raise RuntimeError("the thread that writes the ledger has ended")
            self._count_durations()
            # While the event loop stood still, a commit may have succeeded without being noticed,
            # so the time at which this was due counts, not the present time.
            self._queue.refuse_late(due)

    def _count_durations(self) -> None:
        """Count how long commits took: here, where no request waits for it."""
        for histogram, durations in (
            (self.commit_seconds, self._committed),
            (self.begin_seconds, self._begun),
        ):
            histogram.observe_all(durations)
            durations.clear()

    # The end

    def check_error(self, error: Exception) -> None:
        """Write nothing more into the file if an error shows that it can't be trusted. If it is not
        at its path any more, write all that it holds into a new file."""
        gone = isinstance(error, FileChanged)
        if self.state.health == "lost" or not (gone or is_corrupt(error)):
            return
        self._lose(reason_of(error))
        way_out = FILE_CHANGED if gone else DAMAGED_IN_USE
        self.log(logging.CRITICAL, "ledger lost", reason=self.state.failure, what_to_do=way_out)
        if gone:
            self._rescue.begin_copy()

    def give_up(self) -> None:
        """Write changes into the spill file from now on: the process ends, and no commit
        succeeds."""
        if self.state.health != "lost":
            self.log(logging.WARNING, "ledger given up", reason=self.state.failure)
            self._lose(self.state.failure)

    def _lose(self, reason: str) -> None:
        self.state.enter("lost", reason)
        self._queue.arrived.set()
        self.tasks[0].cancel()

    async def _spill_groups(self) -> None:
        """Write changes into the spill file for as long as the process runs."""
        queue = self._queue
        queue.put_back(queue.writing)
        while not self._closing or queue.waiting:
            if not queue.waiting:
                await queue.arrived.wait()
                queue.arrived.clear()
            await asyncio.to_thread(self._rescue.spill, queue.take())
            for entry in queue.writing:
                if not entry.retry_until_written:
                    entry.fail(StorageUnavailable(self.state.failure))
                entry.done()
            queue.writing = []

    def spill_now(self) -> None:
        """Write changes into the spill file at once, before the process ends without waiting."""
        self._rescue.spill([*self._queue.writing, *self._queue.waiting])

    async def close(self) -> None:
        """Write what waits, or spill it if no commit succeeds. Return after MAX_CLOSE_SECONDS if
        the disk of the spill file does not answer, either."""
        self._closing = self._rescue.closing = True
        self._queue.arrived.set()
        work, refuse_late = self.tasks
        ends = time.monotonic() + MAX_CLOSE_SECONDS
        while not work.done() and time.monotonic() < ends:
            if self.state.health == "failing":
                self.give_up()
            await asyncio.wait([work], timeout=LATE_CHECK_SECONDS)
        await self._rescue.end()
        refuse_late.cancel()
