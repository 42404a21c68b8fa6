"""The size of the write-ahead log (WAL), the file to which SQLite appends each commit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from redbtc.errors import StorageUnavailable
from redbtc.store.commits import Commits
from redbtc.store.failures import reason_of
from redbtc.store.readers import Readers
from redbtc.store.remnants import pages_with_remnants
from redbtc.store.writer import Writer

KEPT_WAL_BYTES = 16 << 20  # 4 MB is usual; a larger file is emptied once the ledger is idle
SCRUB_PAGES = 256  # at a time, which takes about 1 ms
SCRUB_PASSES = 2  # over the whole file
MAX_SCRUB_PAUSE = 0.25  # seconds, while others read
MAX_STEP_PAUSE = 1  # seconds, after a step
MAX_WAL_BYTES = 64 << 20  # above, snapshots have to wait until the file is emptied


class WalFile:
    """The WAL file, which is kept small: SQLite reuses it only at an instant without a reader, and
    snapshots can overlap for ever."""

    def __init__(
        self, database: Path, file: int, writer: Writer, commits: Commits, readers: Readers
    ) -> None:
        """`file` is the open database file."""
        self._path = wal_of(database)
        self._file = file
        self._writer = writer
        self._commits = commits
        self._readers = readers
        self._size_kept = 0  # after it was emptied, because of another program's reader

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return file_size(self._path)

    async def shrink(self) -> bool:
        """Empty the file if it is large and the ledger is idle, or if it is too large. Return False
        if it is large, but this is not the time to empty it. Emptying 40 MB takes about 80 ms; the
        commit that reuses them takes 50 ms. Raises StorageUnavailable."""
        size = self.size
        if size <= KEPT_WAL_BYTES:
            self._size_kept = 0
        elif not self._commits.state.healthy:
            return False
        elif size > max(MAX_WAL_BYTES, 2 * self._size_kept):
            async with self._readers.no_snapshots():
                await self._empty()
            self._size_kept = self.size
        elif self._commits.idle:
            await self._empty()
        else:
            return False
        return True

    async def scrub(self, seconds: float, pause_factor: float) -> bool:
        """Bring what was erased out of the files: copy the WAL into the database, empty the WAL
        file, and overwrite what SQLite has left of rows in the database's pages (remnants.py).

        Only the steps that overwrite keep commits waiting, mostly for the disk. Each is followed by
        a pause that is `pause_factor` times as long, unless the ledger is idle. The file is read
        twice, since SQLite can give a page another number meanwhile. Snapshots are waited for, and
        other programs' readers for `seconds` at each step. Return False if one of them still reads,
        or the ledger fails. Raises StorageUnavailable."""
        if not await self._zero([], seconds, pause_factor):  # what was erased is in the database
            return False
        for _ in range(SCRUB_PASSES):
            first, found = 1, list[int]()
            while (pages := await self._remnants_from(first, pause_factor)) is not None:
                first += SCRUB_PAGES
                found += pages
                if len(found) >= SCRUB_PAGES:
                    if not await self._zero(found, seconds, pause_factor):
                        return False
                    found = []
            if found and not await self._zero(found, seconds, pause_factor):
                return False
        with self._noticing():
            await asyncio.to_thread(os.fsync, self._file)
        return True

    async def _remnants_from(self, first: int, pause_factor: float) -> list[int] | None:
        """Return what remnants.pages_with_remnants does of SCRUB_PAGES pages."""
        began = time.monotonic()
        with self._noticing():
            pages = await asyncio.to_thread(pages_with_remnants, self._file, first, SCRUB_PAGES)
        await self._pause_since(began, pause_factor)
        return pages

    async def _zero(self, pages: Sequence[int], seconds: float, pause_factor: float) -> bool:
        """Empty the WAL, and overwrite the gaps of these pages. Return whether that was
        possible."""
        began, pause = time.monotonic(), 0.005
        while self._commits.state.healthy:
            async with self._readers.no_snapshots():
                step_began = time.monotonic()
                with self._noticing():
                    done = await self._writer.zero_gaps(self._file, pages)
            if done:
                await self._pause_since(step_began, pause_factor)
                return True
            if time.monotonic() - began > seconds:
                break
            await asyncio.sleep(pause)
            pause = min(MAX_SCRUB_PAUSE, 2 * pause)
        return False

    async def _pause_since(self, began: float, pause_factor: float) -> None:
        factor = 0 if self._commits.idle else pause_factor
        await asyncio.sleep(min((time.monotonic() - began) * factor, MAX_STEP_PAUSE))

    async def _empty(self) -> bool:
        with self._noticing():
            return await self._writer.empty_wal()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """Raise StorageUnavailable for an error, which may show that the file is lost."""
        try:
            yield
        except Exception as error:
            self._commits.check_error(error)
            raise StorageUnavailable(f"the WAL file can't be emptied: {reason_of(error)}") from None


def wal_of(database: Path) -> Path:
    """Return the path of a database's WAL file."""
    return Path(f"{database}-wal")


def file_size(file: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    try:
        return os.stat(file).st_size
    except OSError:
        return 0
