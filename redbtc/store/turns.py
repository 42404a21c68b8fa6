"""Turns to write, for as long as two processes have the ledger open: while one gateway takes over
from another, both write what their requests have used. SQLite before 3.51.3 can lose committed rows
when two connections write or copy the WAL at the same instant (sqlite.org/wal.html, "The WAL-reset
bug"), and waits for a lock by polling. So each transaction waits for its turn before it begins.

A turn is a POSIX lock on a byte of a file that has no name, and of which the processes inherit a
descriptor. These locks belong to a process, and end with it, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from typing import Literal

DEADLOCK_SECONDS = 0.001
Database = Literal[0, 1]  # the byte of the file
LEDGER: Database = 0
REQUEST_LOG_DATABASE: Database = 1


class TurnsFile:
    """An open file for turns. It is closed when nothing refers to it any more: a thread that has a
    turn does, and would lose the turn with any descriptor of the file that this process closes."""

    def __init__(self, file: int) -> None:
        self._file = file

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file

    def __del__(self) -> None:
        os.close(self._file)


def new_turns(folder: str) -> TurnsFile:
    """Return a file for turns, without a name. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return TurnsFile(os.dup(file.fileno()))


class WriteTurns:
    """The turns of one database of this process. One thread uses them."""

    def __init__(self, file: TurnsFile, database: Database) -> None:
        self._file = file
        self._database = database

    def take(self) -> None:
        """Wait for a turn. Raises OSError.

        The system looks for deadlocks by process, and finds one where a thread of each process
        waits for the other process, though for different turns. It is none: no thread that has a
        turn waits for another one."""
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._database)
                return
            except OSError as error:
                if error.errno != errno.EDEADLK:
                    raise
            time.sleep(DEADLOCK_SECONDS)

    def give_back(self) -> None:
        """End the turn. Raises OSError."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._database)
