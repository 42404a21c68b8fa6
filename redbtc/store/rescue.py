"""Save what would be lost once this process writes nothing more into the database file: the entries
that the file lacks go into the spill file, and the content of a removed file into a new one."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from redbtc.store.entries import Entry, owed_by
from redbtc.store.failures import RESCUED, LogFunction, reason_of
from redbtc.store.spill import Spill
from redbtc.store.writer import Writer

RESCUE_SECONDS = 10  # between two tries


class Rescue:
    """Saves entries and the content of the database outside of its file."""

    def __init__(self, database: Path, writer: Writer, spill: Spill, log: LogFunction) -> None:
        self._database = database
        self._writer = writer
        self._spill = spill
        self._log = log
        self.closing = False  # a try that fails is the last one
        self._copying: asyncio.Task[None] | None = None

    def spill(self, entries: list[Entry]) -> None:
        """Write into the spill file what the ledger lacks of these entries. Blocks."""
        written = self._spill.add(owed_by(entries))
        owed = [entry for entry in entries if entry.retry_until_written]
        for entry in owed[written:]:
            if entry.kind:  # there is no other place left for a row than the log
                columns = entry.kind.columns(entry.values)
                row = {name: value for name, value in columns.items() if value is not None}
                self._log(logging.CRITICAL, "row not kept", **row)

    def begin_copy(self) -> None:
        """Write all that the removed file holds into a new one beside it, as soon as that succeeds:
        this process has the only copy."""
        self._copying = asyncio.create_task(self._copy(), name="ledger rescue")

    async def end(self) -> None:
        """Wait until the copy that was begun is made, or has failed once more."""
        if self._copying:
            await asyncio.wait([self._copying])

    async def _copy(self) -> None:
        while True:
            path = Path(f"{self._database}.rescue-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
            try:
                await self._copy_to(path)
            except Exception as error:
                self._log(logging.CRITICAL, "ledger not rescued", reason=reason_of(error))
            else:
                self._log(logging.CRITICAL, "ledger rescued", file=str(path), what_to_do=RESCUED)
                return
            if self.closing:
                return
            await asyncio.sleep(RESCUE_SECONDS)

    async def _copy_to(self, path: Path) -> None:
        """Copy the open database to a file, which gets its name when it is whole and on the disk.
        Raises sqlite3.Error, OSError."""
        partial = Path(f"{self._database}.rescuing")
        try:
            partial.unlink(missing_ok=True)
            await self._writer.execute_fetchall("VACUUM INTO ?", (str(partial),))
            await asyncio.to_thread(sync_file, partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Bring a file to the disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
