"""The record of backups: a file beside the database, redbtc.db.backups.

`db backup` asks the gateway for nothing, and may fail because the ledger is damaged. So what became
of it is not in the ledger, but in a file, which the command replaces as a whole. A gateway reads it
to show the age of the last good backup, and to tell the webhook when one has failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from redbtc.store.backup import Backup, BackupFile, own_like, suffixed, temporary
from redbtc.times import END_OF_TIME, now_ms

RECORD_SUFFIX = ".backups"
MAX_BACKUP_DAYS = 7  # after which a backup is overdue
FIRST_START = "SELECT min(started_at) AS at FROM runs"  # of a gateway with the database
MAX_RECORD_BYTES = 65536
MAX_FAILURE = 500  # characters
BROKEN_OFF = "the command ended before the backup was complete, such as by a signal"


RecordedTime = Annotated[int, Meta(ge=0, lt=END_OF_TIME)]  # milliseconds


class BackupRecord(Struct, frozen=True):
    """The results of the last backups. Times are in milliseconds of the system's clock, None if
    there was none. `path` and `bytes` are of the last good one, `reason` is of the last failure.
    `begun_at` is of one that has not ended, which writes to `partial` and holds a lock on it."""

    succeeded_at: RecordedTime | None = None
    path: str = ""
    bytes: int = 0
    failed_at: RecordedTime | None = None
    reason: str = ""
    begun_at: RecordedTime | None = None
    partial: str = ""

    @property
    def has_failed(self) -> bool:
        """Return whether the last backup failed."""
        return self.failed_at is not None and self.failed_at > (self.succeeded_at or 0)

    def as_found(self) -> BackupRecord:
        """Return the record with the last backup as a failure if its process has ended without a
        result, such as by a signal."""
        if self.begun_at is None or is_locked(Path(self.partial)):
            return self
        return replace(self, failed_at=self.begun_at, reason=BROKEN_OFF)


NO_BACKUPS = BackupRecord()


def record_file(database: Path) -> Path:
    """Return the path of the record of a database's backups."""
    return suffixed(database, RECORD_SUFFIX)


def read_backup_record(database: Path) -> BackupRecord:
    """Return the record of a database's backups; an empty one if there is none that can be read."""
    try:
        with record_file(database).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_RECORD_BYTES), type=BackupRecord)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return NO_BACKUPS


def is_locked(file: Path) -> bool:
    """Return whether a process holds a lock on a file, or that can't be found out."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return False


def note_begun_backup(database: Path, given: str) -> None:
    """Record that a backup to `given` begins. Raises UserError if its folder does not exist."""
    partial = str(BackupFile.of(database, given).partial)
    with contextlib.suppress(OSError):  # it is said once the backup has ended
        before = read_backup_record(database)
        if database.exists() and not is_locked(Path(partial)):
            _write_record(database, replace(before, begun_at=now_ms(), partial=partial))


def note_backup(database: Path, made: Backup) -> None:
    """Record a good backup. Raises OSError, UserError."""
    before = read_backup_record(database)
    ended = replace(before, begun_at=None, succeeded_at=now_ms(), path=made.path, bytes=made.bytes)
    _write_record(database, ended)


def note_failed_backup(database: Path, reason: str) -> None:
    """Record a backup that failed, if there is a database. Raises OSError, UserError."""
    if database.exists():
        before = read_backup_record(database)
        ended = replace(before, begun_at=None, failed_at=now_ms(), reason=reason[:MAX_FAILURE])
        _write_record(database, ended)


def _write_record(database: Path, record: BackupRecord) -> None:
    path = record_file(database)
    new = suffixed(path, ".new")
    with temporary(new) as file:
        os.write(file, msgspec.json.encode(record) + b"\n")
        own_like(file, database)
        os.fsync(file)
        os.replace(new, path)


class WatchedBackups:
    """The record of a database's backups, which is read again when the file has changed."""

    def __init__(self, database: Path) -> None:
        self.record = self._read = NO_BACKUPS
        self._database = database
        self._seen: tuple[int, int] | None = None

    def look(self) -> BackupRecord:
        """Return the record as it is now, and whether the backup that it names still runs."""
        state = None
        with contextlib.suppress(OSError):
            found = os.stat(record_file(self._database))
            state = found.st_ino, found.st_mtime_ns
        if state != self._seen:
            self._seen, self._read = state, read_backup_record(self._database)
        self.record = self._read.as_found()
        return self.record
