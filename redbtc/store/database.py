"""Open the database of a gateway, with one connection that writes and others that read.

All writes of the process go through one connection, those of requests in groups
(redbtc/store/commits.py). Reads have connections that can't write (readers.py). A lock file beside
the database keeps every other gateway and command out; if somebody has removed it, the lock on the
database file itself does (files.py).

What the tables hold is known to the other modules of this package and to redbtc/billing and
redbtc/admin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from redbtc.errors import Conflict, StorageUnavailable
from redbtc.locations import joined_models
from redbtc.store.clock import LedgerClock
from redbtc.store.commits import BEAT, Commits
from redbtc.store.failures import LedgerDamaged, is_corrupt, no_log, opening_error, reason_of
from redbtc.store.files import FileChanged, OpenFiles
from redbtc.store.opening import Migrated, Serving, claim, claim_joined, configure, migrate
from redbtc.store.readers import Readers
from redbtc.store.spill import Spill
from redbtc.store.takeover import interruption, interruption_of, latest_time, write_owed
from redbtc.store.turns import LEDGER, TurnsFile, WriteTurns
from redbtc.store.wal import WalFile
from redbtc.store.writer import SQLStatement, Writer

T = TypeVar("T")

TRANSACT_SECONDS = 10
PROVEN_SECONDS = 1  # for which a commit is proof that commits succeed
MAKE_SECRET = "INSERT OR IGNORE INTO secrets (name, secret) VALUES ('idempotency', ?)"
SECRET = "SELECT secret FROM secrets WHERE name = 'idempotency'"
SIGN = "INSERT INTO acting (id, name, at) VALUES (1, ?, ?)"
UNSIGN = "DELETE FROM acting"
ADD_RUN = "INSERT INTO runs (started_at) VALUES (?)"
LATEST_RUN = "SELECT max(id) FROM runs"
TERMINATED = "the account is terminated"  # says a trigger

# None and bytes are written as they are. Without these adapters, sqlite3 searches for one in three
# places, which takes longer than writing the value; half of a row is None.
sqlite3.register_adapter(type(None), lambda none: none)
sqlite3.register_adapter(bytes, bytes)


class Store:
    """The database of one gateway, opened by `async with Store.open(...)`.

    `record` puts a row of the ledger on disk, `transact` makes an administrative change, and `rows`
    and `look_up` read.
    """

    def __init__(
        self,
        path: Path,
        writer: Writer,
        commits: Commits,
        readers: Readers,
        clock: LedgerClock,
        wal: WalFile,
    ) -> None:
        self.path = path
        self.interrupted = 0  # rows of requests that the process before this one left in flight
        self.migrated: Migrated | None = None  # as this process opened it
        self.replaced: Path | None = None  # by a restore that this process finished
        self.run: int | None = None  # the number of this run of a gateway
        self.clock = clock
        # The ledger's own time in milliseconds. It follows the wall clock, but never goes back, so
        # that a clock that is set back reopens no month and revives no old price.
        self.time: Callable[[], int] = clock.now
        self.commits = commits
        self.record = commits.record
        self.look_up, self.look_up_all = readers.look_up, readers.look_up_all
        self.rows, self.one = readers.rows, readers.one
        self.snapshot, self.snapshot_to_check = readers.snapshot, readers.snapshot_to_check
        self.changes = 0  # administrative ones, that were written or have failed
        self.locks: tuple[int, int]  # the open files of the lock and the database
        self._spill: Spill
        self._writer = writer
        self._wal = wal
        self.secret = b""  # for the idempotency keys that are sent upstream
        self._trying = asyncio.Lock()  # whether a commit succeeds

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, path: Path, synchronous: str, serving: Serving | None = None
    ) -> AsyncIterator[Store]:
        """Open the store in the file `path`, which is created or brought up to date where needed.
        `serving` is None for a command. Raises DatabaseInUse; StorageUnavailable if it can't be
        opened now; LedgerDamaged; or UserError if the file is not ours, too new, or can't be
        opened."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                store = await cls._open(stack, path, synchronous, serving)
            except (sqlite3.Error, OSError) as error:
                raise opening_error(path, error) from None
            yield store

    @classmethod
    async def _open(
        cls,
        stack: contextlib.AsyncExitStack,
        path: Path,
        synchronous: str,
        serving: Serving | None,
    ) -> Store:
        joined = serving.joined if serving else None
        claimed = claim_joined(stack, path, joined) if joined else await claim(stack, path, serving)
        spill, file = Spill(path), claimed.database
        writer = Writer(path, synchronous)
        await stack.enter_async_context(writer)
        if serving:
            stack.callback(serving.closing)
        await writer.create_function("joined", 2, joined_models)
        await configure(writer, path, synchronous)
        migrated = await migrate(writer, path, serving)
        clock = LedgerClock()
        clock.go_on_from(await latest_time(writer))
        if serving:
            clock.start(accept=serving.accept_clock)
        commits = Commits(path, writer, spill, clock.now, serving.log if serving else no_log)
        stack.push_async_callback(end, commits, spill)
        if joined:
            writer.turns = WriteTurns(joined.turns, LEDGER)
        readers = await Readers.open(stack, path, commits.check_error)
        wal = WalFile(path, file, writer, commits, readers)
        store = cls(path, writer, commits, readers, clock, wal)
        store.migrated, store.replaced = migrated, claimed.replaced
        store.locks, store._spill = (claimed.lock_file, file), spill
        if joined:
            store.secret = await writer.value(SECRET)
        else:
            await store._prepare([*claimed.spills, spill], serving)
        writer.files = OpenFiles(path)
        return store

    async def _prepare(self, spills: Sequence[Spill], serving: Serving | None) -> None:
        """Write what earlier processes left behind, and begin a run."""
        await self.transact((MAKE_SECRET, (secrets.token_bytes(32),)))
        self.secret = await self._writer.value(SECRET)
        for each in spills:
            await self._write_owed(each)
        self.interrupted = await self.transact(*interruption(self.time()))
        if serving:
            await self.begin_run()

    async def _write_owed(self, spill: Spill) -> None:
        await write_owed(spill, self._writer, self.commits, self.commits.log)
        if spill is not self._spill:
            spill.path.unlink(missing_ok=True)

    # Taking over from another process

    async def begin_run(self) -> None:
        """Begin a run of a gateway. Raises StorageUnavailable, OSError."""
        await self.transact((ADD_RUN, (self.time(),)))
        self.run = await self._writer.value(LATEST_RUN)
        self._spill.reserve()

    async def share(self, turns: TurnsFile) -> None:
        """From now on, wait for a turn before each write: another process begins to write as well,
        and gets the spill file. Return once no write without a turn is under way. Raises
        OSError."""
        self._writer.turns = WriteTurns(turns, LEDGER)
        await self._writer.until_idle()
        self._spill.use(Spill(self.path, str(os.getpid())))

    def write_alone(self) -> None:
        """From now on, no other process writes."""
        self._writer.turns = None

    def take_back(self) -> None:
        """Undo what `share` does with the spill file: no other process has taken over. Raises
        OSError."""
        aside, own = self._spill.path, Spill(self.path)
        if aside != own.path:
            self._spill.use(own)
            aside.unlink(missing_ok=True)

    async def finish_for(self, process: int, request_ids: Collection[str]) -> None:
        """Write what a process could not that has ended: what its spill file has, and that these of
        its requests were interrupted. Raises StorageUnavailable, OSError, sqlite3.Error."""
        await self._write_owed(Spill(self.path, str(process)))
        await self.transact(*interruption_of(request_ids, self.time()))

    # State

    @property
    def healthy(self) -> bool:
        """Return whether commits succeed."""
        return self.commits.state.healthy

    @property
    def failure(self) -> str:
        """Return why no commit succeeds, "" if they do."""
        return self.commits.state.failure

    @property
    def is_lost(self) -> bool:
        """Return whether this process writes nothing more into the database."""
        return self.commits.state.health == "lost"

    def give_up_if_failing(self) -> None:
        """Write changes into the spill file from now on if no commit succeeds: the process is to
        end."""
        if self.commits.state.health == "failing":
            self.commits.give_up()

    async def can_commit(self) -> bool:
        """Return whether a commit succeeds now, in the way that requests take. A commit within the
        last PROVEN_SECONDS is proof, and callers that ask at the same time share one try."""
        async with self._trying:
            if self.healthy and time.monotonic() - self.commits.committed_at > PROVEN_SECONDS:
                with contextlib.suppress(StorageUnavailable):
                    await self.settle_time()
        return self.healthy

    # Files

    @property
    def wal_bytes(self) -> int:
        """Return the size of the WAL file."""
        return self._wal.size

    async def shrink(self) -> bool:
        """Empty the WAL file if it is large, as WalFile.shrink does."""
        return await self._wal.shrink()

    async def scrub(self, seconds: float, pause_factor: float) -> bool:
        """Bring what was erased out of the database's files, as WalFile.scrub does."""
        return await self._wal.scrub(seconds, pause_factor)

    def check_files(self) -> None:
        """Notice removed or replaced files even while nothing is committed: what only they hold is
        lost with the process."""
        if self._writer.files:
            try:
                self._writer.files.check()
            except (FileChanged, OSError) as error:
                self.commits.check_error(error)

    # Writing

    async def transact(
        self, *statements: SQLStatement, by: str | None = None, seconds: float | None = None
    ) -> int:
        """Execute all of the statements or none, at once. Return how many rows the last one
        changed. `by` is the author of an administrative change; the log of these changes requires
        it. Raises sqlite3.IntegrityError; Conflict if the account was terminated; or
        StorageUnavailable if the commit fails or takes longer than `seconds` (None:
        TRANSACT_SECONDS); then it may still succeed later."""
        if by is not None:
            statements = ((SIGN, (by, self.time())), *statements, (UNSIGN, ()))
        writing = self._writer.write(statements)
        writing = writing if by is None else with_count(writing, self._count_change)
        changed = await self._committed(writing, seconds or TRANSACT_SECONDS)
        return changed[-1 if by is None else -2]

    def _count_change(self) -> None:
        self.changes += 1

    async def transact_step(self, *statements: SQLStatement) -> float:
        """Execute statements as `transact` does, but without waiting for the disk: a power loss may
        undo them. Return for how many seconds they kept other commits waiting."""
        return await self._committed(self._writer.write_step(statements), TRANSACT_SECONDS)

    async def _committed(self, writing: Coroutine[Any, Any, T], seconds: float) -> T:
        if self.is_lost:
            writing.close()
            raise StorageUnavailable(f"the database can't be written: {self.failure}")
        try:
            async with asyncio.timeout(seconds):
                return await writing
        except sqlite3.IntegrityError as error:
            if str(error) == TERMINATED:
                raise Conflict(f"{TERMINATED}; only payments can be added to it") from None
            raise
        except TimeoutError:
            raise StorageUnavailable(
                f"the disk has not answered for {seconds} s; the change may still be made later"
            ) from None
        except Exception as error:
            self.commits.check_error(error)
            what = LedgerDamaged if is_corrupt(error) else StorageUnavailable
            raise what(f"the database can't be written: {reason_of(error)}") from None

    async def settle_time(self) -> int:
        """Return the ledger's time once it is on disk, so that it holds after a restart, with all
        changes that were recorded before. Raises StorageUnavailable."""
        now = self.time()
        await self.record(BEAT, (now,), retry_until_written=False)
        return now


async def with_count(writing: Coroutine[Any, Any, T], count: Callable[[], None]) -> T:
    """Write, and call `count` once that is done, even if it is later than anybody waits for it."""

    def note(done: asyncio.Task[T]) -> None:
        count()
        if not done.cancelled():
            done.exception()  # it is seen, though nobody may wait for it any more

    task = asyncio.create_task(writing)
    task.add_done_callback(note)
    return await asyncio.shield(task)


async def end(commits: Commits, spill: Spill) -> None:
    """Write what waits, and remove the spill file of a ledger that closes cleanly. The file of a
    lost ledger stays, so that the next start checks the database."""
    try:
        await commits.close()
    finally:
        if commits.state.health == "lost":
            spill.close()
        else:
            spill.remove()
