"""The log's database: open it, write to it, and leave nothing in it of what was deleted. All of
this is done in one thread."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redbtc.errors import UserError
from redbtc.release import RELEASE
from redbtc.store.backup import suffixed
from redbtc.store.files import FileChanged, OpenFiles, identity_of, take_lock_file
from redbtc.store.request_log.frames import PAGE_BYTES
from redbtc.store.request_log.replacing import (
    begin_copy,
    complete_replacement,
    make_empty,
    use_copy,
)
from redbtc.store.request_log.results import Purged
from redbtc.store.schema import REQUEST_LOG_ID
from redbtc.store.versions import newer_version
from redbtc.store.wal import file_size

LOG_VERSION = 1
TABLES = """
    CREATE TABLE logged (
        id                  INTEGER PRIMARY KEY,
        request_id          TEXT NOT NULL UNIQUE,
        account_id          TEXT NOT NULL,
        key_id              TEXT NOT NULL,
        logged_at           INTEGER NOT NULL,           -- ledger time in ms
        expires_at          INTEGER NOT NULL,           -- 0: is being erased
        request_bytes       INTEGER NOT NULL DEFAULT 0, -- of the whole body
        response_bytes      INTEGER NOT NULL DEFAULT 0,
        request_encoding    TEXT NOT NULL DEFAULT '',
        response_encoding   TEXT NOT NULL DEFAULT '',
        withheld            INTEGER NOT NULL DEFAULT 0  -- 1: the request, 2: the response, 3: both
                            CHECK (withheld BETWEEN 0 AND 3),
        is_complete         INTEGER NOT NULL DEFAULT 0 CHECK (is_complete IN (0, 1))
    ) STRICT;
    CREATE INDEX logged_of_account ON logged (account_id);
    CREATE INDEX logged_until ON logged (expires_at);
    CREATE INDEX logged_since ON logged (logged_at);
    CREATE TABLE parts (                                -- in the order in which they came
        id                  INTEGER PRIMARY KEY,
        logged_id           INTEGER NOT NULL,
        body                INTEGER NOT NULL CHECK (body IN (0, 1)),  -- request, response
        content             BLOB NOT NULL               -- see frames.py
    ) STRICT;
    CREATE INDEX parts_of ON parts (logged_id);
"""
SETTINGS: dict[str, tuple[str | int, str | int]] = {  # to set, and to be read back
    "secure_delete": ("ON", 1),
    "journal_mode": ("WAL", "wal"),
    "synchronous": ("NORMAL", 1),
    "temp_store": ("MEMORY", 2),
}
LOCK_WAIT_MS = 1000  # for another program that writes
# For which another program's reader is waited for before the file is replaced: when an owner wants
# bodies erased, and when they have expired, which must leave a backup the time to copy the file.
READER_SECONDS = 2.0
LONG_READER_SECONDS = 20.0
READER_PAUSE = 0.05
MAX_WAL_SHARE = 4  # the WAL may take this part of max_bytes,
MAX_LOG_WAL_BYTES = 8 << 20  # but no more than this
ERASED_AT_ONCE = 4 << 20  # bytes of parts in a transaction
PARTS_AT_ONCE = 16
REQUESTS_AT_ONCE = 64

OLDEST = "SELECT id FROM logged ORDER BY id LIMIT 1"
PARTS_OF = f"SELECT id, length(content) FROM parts WHERE logged_id = ? LIMIT {PARTS_AT_ONCE}"
ERASE_PART = "DELETE FROM parts WHERE id = ?"
ERASE_REQUEST = "DELETE FROM logged WHERE id = ?"


class LogStatement(NamedTuple):
    """A statement of SQL with its values."""

    sql: str
    values: tuple[Any, ...]
    erases: bool = False  # it deletes content


class LogFile:
    """The open database. Everything raises sqlite3.Error or OSError where it fails."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open the database at `path`, which exists or becomes an empty one. Raises DatabaseInUse
        if another process has it open, UserError if it is not ours or too new."""
        self.path = path
        self.wal = suffixed(path, "-wal")
        self.must_scrub = file_size(self.wal) > 0  # erased content may be in the file or its WAL
        self._stuck_since: float | None = None  # when the WAL could not be emptied
        with contextlib.ExitStack() as stack:
            stack.enter_context(take_lock_file(path))
            complete_replacement(path)
            self._refuse_newer()
            if not path.exists():
                make_empty(path)
            self.database = self._connected()
            stack.callback(lambda: self.database.close())
            self._prepare()
            self.limit(max_bytes)
            self._closing = stack.pop_all()

    @classmethod
    def open(cls, path: Path, max_bytes: int, *, create: bool) -> LogFile | None:
        """Open the database at `path`. Return None if there is none, and it is not to be made."""
        files = (path, *(suffixed(path, each) for each in (".copying", ".ready", "-wal")))
        if not create and not any(each.exists() for each in files):
            return None
        return cls(path, max_bytes)

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None)

    def _prepare(self) -> None:
        self.database.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
        if self._value("SELECT count(*) FROM sqlite_schema"):
            if self._value("PRAGMA application_id") != REQUEST_LOG_ID:
                raise UserError(f"{self.path} is the database of another program")
            self._configure()
        else:
            self.database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self.database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._configure()
            marks = f"application_id = {REQUEST_LOG_ID}", f"user_version = {LOG_VERSION}"
            script = "".join(f"PRAGMA {mark};" for mark in marks) + TABLES
            self.database.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
        self._files, self._identity = OpenFiles(self.path), identity_of(self.path)

    def _refuse_newer(self) -> None:
        version = newer_version(self.path, REQUEST_LOG_ID, LOG_VERSION)
        if version is not None:
            raise UserError(
                f"{self.path} has version {version}, written by a newer version of this program; "
                f"this is version {RELEASE}, which knows version {LOG_VERSION}. Nothing was "
                "changed. Use the newer version again, or stop the gateway and move the file and "
                "its -wal away to begin an empty request log"
            )

    def _configure(self) -> None:
        """Set what erasing and durability depend on, and read it back."""
        for pragma, (value, expected) in SETTINGS.items():
            self.database.execute(f"PRAGMA {pragma} = {value}").fetchall()
            if (found := self._value(f"PRAGMA {pragma}")) != expected:
                raise UserError(f"{self.path}: {pragma} is {found}, not {expected}")
        if (found := self._value("PRAGMA page_size")) != PAGE_BYTES:
            raise UserError(f"{self.path}: page_size is {found}, not {PAGE_BYTES}")

    def limit(self, max_bytes: int) -> None:
        """Use another limit for the size of all files together."""
        self.max_bytes = max_bytes
        self._max_wal = min(max_bytes // MAX_WAL_SHARE, MAX_LOG_WAL_BYTES)
        self._max_used = max_bytes - self._max_wal
        pages = self._max_wal // PAGE_BYTES // 2
        self.database.execute(f"PRAGMA wal_autocheckpoint = {pages}").fetchall()
        self.database.execute(f"PRAGMA journal_size_limit = {self._max_wal // 2}").fetchall()

    def _value(self, sql: str) -> Any:
        row = self.database.execute(sql).fetchone()
        return row[0] if row else None

    def check_files(self) -> None:
        """Raise FileChanged if the database was removed or replaced. If only its WAL was, as by a
        program that had a replaced file open, go on with a copy: what the WAL held is in it."""
        try:
            self._files.check()
        except FileChanged:
            if identity_of(self.path) != self._identity:
                raise
            self._replace()

    @property
    def size(self) -> int:
        """Return the bytes that the database and its WAL take on the disk."""
        return file_size(self.path) + file_size(self.wal)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the pages that are in use."""
        pages = self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")
        return int(pages) * PAGE_BYTES

    @property
    def is_too_large(self) -> bool:
        """Return whether the oldest requests must leave."""
        return self.used_bytes > self._max_used

    def write(self, statements: Sequence[LogStatement], size: int) -> None:
        """Execute statements in one transaction, after making room for so many bytes."""
        while self.used_bytes + size > self._max_used:
            if not (oldest := self.database.execute(OLDEST).fetchall()):
                break
            self.erase([each[0] for each in oldest])
        with self.transaction():
            for each in statements:
                self.database.execute(each.sql, each.values)
        self.must_scrub |= any(each.erases for each in statements)
        self._keep_wal_small()

    @contextlib.contextmanager
    def transaction(self) -> Generator[None, None, None]:
        """Make one transaction of what is executed in `with`."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.database.execute("ROLLBACK")
            raise

    def erase(self, ids: Iterable[int]) -> Purged:
        """Delete some of these requests, or parts of the first of them: as much as one transaction
        should. `scrub` must follow."""
        self.must_scrub = True
        purged = Purged(0, 0)
        with self.transaction():
            for number in ids:
                parts = self.database.execute(PARTS_OF, (number,)).fetchall()
                self.database.executemany(ERASE_PART, [(part,) for part, _ in parts])
                purged.bytes += sum(size for _, size in parts)
                if len(parts) == PARTS_AT_ONCE:  # there may be more
                    break
                self.database.execute(ERASE_REQUEST, (number,))
                purged.requests += 1
                if purged.bytes >= ERASED_AT_ONCE:
                    break
        self._keep_wal_small()
        return purged

    def shrink(self) -> bool:
        """Give some free pages back to the system. Return False if there are not too many."""
        free = self._value("PRAGMA freelist_count")
        kept = self.used_bytes // PAGE_BYTES // 4 + self._max_wal // PAGE_BYTES // 2
        if free <= kept:
            return False
        pages = min(free - kept, self._max_wal // PAGE_BYTES // 2)
        self.database.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        return True

    def scrub(self, reader_seconds: float) -> Generator[float, None, None]:
        """Leave nothing of what was deleted in the file or its WAL. If another program's reader
        keeps it there for so many seconds, replace the file."""
        deadline = time.monotonic() + reader_seconds
        while not self._empty_wal():
            if time.monotonic() > deadline:
                self._replace()
                break
            yield READER_PAUSE
        self.must_scrub = False

    def _empty_wal(self) -> bool:
        """Copy the WAL into the database and empty it. Return False if a reader needs it."""
        self.database.execute("PRAGMA busy_timeout = 0")
        try:
            ((is_busy, _, _),) = self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self.database.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
        return not is_busy

    def _keep_wal_small(self) -> None:
        if file_size(self.wal) <= self._max_wal or self._empty_wal():
            self._stuck_since = None
            return
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since > LONG_READER_SECONDS:
            self._replace()
            self._stuck_since = None

    def _replace(self) -> None:
        """Put a copy without deleted content in the place of the file."""
        copy = begin_copy(self.path)
        try:
            self.database.execute("VACUUM INTO ?", (str(copy),))
        except BaseException:
            copy.unlink()
            raise
        self.database.close()
        use_copy(self.path)
        self.database = self._connected()
        self._prepare()
        self.limit(self.max_bytes)

    def close(self) -> None:
        """Close the database. Its WAL is removed unless another program reads it."""
        self._closing.close()
