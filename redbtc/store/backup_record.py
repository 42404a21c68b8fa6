"""The record of backups: a file beside the database, redbtc.db.backups.

`db backup` asks the gateway for nothing, and may fail because the ledger is damaged. So what became
of it is not in the ledger, but in a file, which the command replaces as a whole. A gateway reads it
to show the age of the last good backup, and to tell the webhook when one has failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from redbtc.errors import UserError
from redbtc.store.backup import Backup, own_like, suffixed, temporary
from redbtc.times import DAY, END_OF_TIME, now_ms

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
    `begun_at` is of one that has not ended, whose process holds a lock on the record."""

    succeeded_at: RecordedTime | None = None
    path: str = ""
    bytes: int = 0
    failed_at: RecordedTime | None = None
    reason: str = ""
    has_failed: bool = False  # the last one; the times can't tell, since the clock may be set
    begun_at: RecordedTime | None = None

    def good_at(self, now: int) -> int | None:
        """Return when the last good backup was made. None if there is none, or if it is dated more
        than a day after `now`: the clock was wrong, and its age is not known."""
        at = self.succeeded_at
        return None if at is None or at > now + DAY else at


NO_BACKUPS = BackupRecord()


def record_file(database: Path) -> Path:
    """Return the path of the record of a database's backups."""
    return suffixed(database, RECORD_SUFFIX)


def read_backup_record(database: Path) -> BackupRecord:
    """Return the record of a database's backups; an empty one if there is none that can be read. A
    backup whose process has ended without a result, such as by a signal, has failed."""
    try:
        opened = os.open(record_file(database), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(opened, "rb") as file:
            record = msgspec.json.decode(file.read(MAX_RECORD_BYTES), type=BackupRecord)
            if record.begun_at is None or _is_locked(file.fileno()):
                return record
    except (OSError, TypeError, msgspec.MsgspecError, UnicodeDecodeError):
        return NO_BACKUPS
    return replace(
        record, begun_at=None, failed_at=record.begun_at, reason=BROKEN_OFF, has_failed=True
    )


def _is_locked(file: int) -> bool:
    """Return whether a process holds a lock on a file, or that can't be found out."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def noting_backup(database: Path) -> Iterator[None]:
    """Record that a backup begins, and hold a lock on the record until it has ended. The lock is on
    a file of the database's disk: a gateway looks at it every second, and the disk of the backup
    may not answer, or be closed to the gateway's user."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UserError):  # it is said once the backup has ended
            before = read_backup_record(database)
            if database.exists() and before.begun_at is None:  # else another one runs
                stack.enter_context(_locked_record(database, replace(before, begun_at=now_ms())))
        yield


def note_backup(database: Path, made: Backup) -> None:
    """Record a good backup. Raises OSError, UserError."""
    before = read_backup_record(database)
    made_now = replace(before, succeeded_at=now_ms(), path=made.path, bytes=made.bytes)
    _write_record(database, replace(made_now, begun_at=None, has_failed=False))


def note_failed_backup(database: Path, reason: str) -> None:
    """Record a backup that failed, if there is a database. Raises OSError, UserError."""
    if database.exists():
        before = read_backup_record(database)
        failed_now = replace(before, failed_at=now_ms(), reason=reason[:MAX_FAILURE])
        _write_record(database, replace(failed_now, begun_at=None, has_failed=True))


def _write_record(database: Path, record: BackupRecord) -> None:
    with _locked_record(database, record):
        pass


@contextlib.contextmanager
def _locked_record(database: Path, record: BackupRecord) -> Iterator[None]:
    """Write the record, and hold a lock on it. Raises OSError, UserError."""
    path = record_file(database)
    new = suffixed(path, ".new")
    with contextlib.ExitStack() as stack:
        with temporary(new) as file:  # is locked
            os.write(file, msgspec.json.encode(record) + b"\n")
            own_like(file, database)
            os.fsync(file)
            os.replace(new, path)
            stack.callback(os.close, os.dup(file))  # which keeps the lock
        yield


class WatchedBackups:
    """The record of a database's backups, which is read again when the file has changed, and while
    a backup runs."""

    def __init__(self, database: Path) -> None:
        self.record = NO_BACKUPS
        self._database = database
        self._seen: tuple[int, int] | None = None

    def look(self) -> BackupRecord:
        """Return the record as it is now."""
        state = None
        with contextlib.suppress(OSError):
            found = os.stat(record_file(self._database))
            state = found.st_ino, found.st_mtime_ns
        if state != self._seen or self.record.begun_at is not None:
            self._seen, self.record = state, read_backup_record(self._database)
        return self.record
