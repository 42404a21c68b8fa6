"""The steps of opening a database: refuse one that is not whole, check it after an unclean end, set
what durability depends on, and bring its tables up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from redbtc.errors import UserError
from redbtc.store.backup import Damaged, back_up_before_migration, complete_restore
from redbtc.store.checks import PageCheck
from redbtc.store.failures import (
    TRANSIENT_SQLITE,
    LedgerDamaged,
    LogFunction,
    is_corrupt,
    sqlite_code,
)
from redbtc.store.files import Identity, identity_of, lock_database, take_lock_file
from redbtc.store.schema import APPLICATION_ID, migrations, schema
from redbtc.store.spill import Spill, left_spills
from redbtc.store.turns import TurnsFile
from redbtc.store.versions import refuse_newer
from redbtc.store.wal import KEPT_WAL_BYTES, file_size, wal_of
from redbtc.store.writer import Writer

BUSY_TIMEOUT_MS = 1000


class Migrated(NamedTuple):
    """The result of bringing a database to a newer schema. `backup` is the path of the copy that
    was made before. It is empty if there is none; then `no_backup` says why."""

    before: int
    after: int
    seconds: float
    backup: str
    no_backup: str


class JoinedFiles(NamedTuple):
    """The open files of a process that another one takes over from: the locks of the database, and
    the file whose locks are turns to write."""

    lock_file: int
    database: int
    turns: TurnsFile


class SchemaChanges(UserError):
    """The ledger must be migrated, but another process still writes it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(f"the ledger has schema {before}; this version needs schema {after}")
        self.before, self.after = before, after


class Serving(Struct, eq=False):
    """The options of a store that a gateway opens, and a command does not need."""

    check_seconds: float  # that the check after an unclean end may take; 0: no check
    accept_clock: bool  # believe the machine's clock in any case
    log: LogFunction
    closing: Callable[[], None]  # called when nothing is left to do but to close the files
    joined: JoinedFiles | None = None  # the process takes over from another one
    # Remembered for the next try to open the same database: the file that was found sound, and the
    # file that was copied before its migration, with the path of the copy.
    checked: Identity | None = None
    copied: tuple[Identity | None, str] | None = None


class Claimed(NamedTuple):
    """The open files of the locks of a database, the spill files that earlier processes have left,
    and the database that a restore has replaced."""

    lock_file: int
    database: int
    spills: list[Spill]
    replaced: Path | None


async def claim(stack: contextlib.AsyncExitStack, path: Path, serving: Serving | None) -> Claimed:
    """Lock the database until the end of `stack`, finish a restore, and refuse a database that is
    not whole. Raises DatabaseInUse, UserError, OSError."""
    lock_file = stack.enter_context(take_lock_file(path))
    replaced = complete_restore(path)
    spill, left = Spill(path), left_spills(path)
    refuse_incomplete(path, [spill, *left])
    refuse_newer(path)
    file = stack.enter_context(lock_database(path))
    is_unclean = spill.exists() or left or has_wal(path)
    if serving and serving.check_seconds and is_unclean:
        await check_pages(path, serving)
    return Claimed(lock_file, file, left, replaced)


def claim_joined(stack: contextlib.AsyncExitStack, path: Path, joined: JoinedFiles) -> Claimed:
    """Use the locks of another process until the end of `stack`. Raises UserError for a database of
    a newer version."""
    refuse_newer(path)
    stack.callback(os.close, joined.lock_file)
    stack.callback(os.close, joined.database)
    return Claimed(joined.lock_file, joined.database, [], None)


def has_wal(database: Path) -> bool:
    """Return whether the database has a WAL file with content, left by a process that was killed.
    Raises OSError."""
    try:
        return os.stat(wal_of(database)).st_size > 0
    except FileNotFoundError:
        return False


def refuse_incomplete(database: Path, spills: Sequence[Spill]) -> None:
    """Raise UserError if the database is missing although files that belong to it exist, or if it
    is older than its rescued content: then it lacks what was in a removed WAL file. A restored
    database is newer."""
    written = database.stat().st_mtime_ns if database.exists() else 0
    rescued = sorted(database.parent.glob(f"{database.name}.rescue-*"))
    newer = [each for each in rescued if each.stat().st_mtime_ns > written]
    if newer:
        raise UserError(
            f"{database} is missing, or older than {newer[-1]}, a copy made when its files were "
            "removed. Restore that file (db restore FILE), or move it away to continue without it"
        )
    if file_size(database) == 0 and has_wal(database):
        raise UserError(
            f"{database} is {'empty' if written else 'missing'}, but {wal_of(database)} exists. "
            "Restore a backup (db restore FILE), or move the -wal file away to start with an empty "
            "ledger"
        )
    for spill in () if written else spills:
        if not spill.read()[0]:
            continue
        raise UserError(
            f"{database} is missing, but {spill.path} holds entries that belong to it. Restore a "
            "backup (db restore FILE), or move that file away to start with an empty ledger"
        )


async def check_pages(database: Path, serving: Serving) -> None:
    """Check the pages of the database, since its last gateway did not end cleanly. Raises
    LedgerDamaged."""
    file = identity_of(database)
    if file == serving.checked:
        return
    began = time.monotonic()
    check = PageCheck(database, serving.check_seconds, serving.log)
    try:
        wrong = await asyncio.to_thread(check.find_damage)
    finally:
        check.stop()
    if wrong:
        raise LedgerDamaged(f"{database} is damaged: {'; '.join(wrong)}")
    serving.checked = file
    took = round((time.monotonic() - began) * 1000)
    serving.log(logging.INFO, "ledger checked after an unclean end", duration_ms=took)


async def configure(writer: Writer, database: Path, synchronous: str) -> None:
    """Set what durability depends on, and read each setting back: SQLite does not report that it
    can't set one. Raises UserError, also if the database is not ours."""
    tables = await writer.value("SELECT count(*) FROM sqlite_schema")
    marked = await writer.value("PRAGMA application_id")
    if tables and marked != APPLICATION_ID:
        raise UserError(
            f"{database} is the database of another program; set database.path to another file"
        )
    wanted: dict[str, tuple[str | int, str | int]] = {
        "application_id": (APPLICATION_ID, APPLICATION_ID),
        "busy_timeout": (BUSY_TIMEOUT_MS, BUSY_TIMEOUT_MS),
        "journal_mode": ("WAL", "wal"),
        "synchronous": (synchronous, {"full": 2, "normal": 1}[synchronous]),
        "foreign_keys": ("ON", 1),
        "secure_delete": ("ON", 1),
        "journal_size_limit": (KEPT_WAL_BYTES, KEPT_WAL_BYTES),
    }
    for pragma, (value, expected) in wanted.items():
        if await writer.value(f"PRAGMA {pragma}") != expected:
            await writer.value(f"PRAGMA {pragma} = {value}")
        if (found := await writer.value(f"PRAGMA {pragma}")) != expected:
            raise UserError(f"{database}: {pragma} is {found}, not {expected}")


async def migrate(writer: Writer, database: Path, serving: Serving | None) -> Migrated | None:
    """Bring the tables to the newest schema, after a backup, in one transaction: a killed or failed
    migration leaves the database as it was, so that the earlier version can use it. Return None if
    nothing was migrated. Raises UserError, sqlite3.Error."""
    version = await writer.value("PRAGMA user_version")
    sections = migrations(schema())
    newest = max(sections)
    due = [script for number, script in sorted(sections.items()) if number > version]
    if not due:
        return None
    if serving and serving.joined:
        raise SchemaChanges(version, newest)
    started, backup, no_backup = time.monotonic(), "", ""
    if version:
        backup, no_backup = await back_up_once(database, newest, serving)
    try:
        await run_migrations(writer, due, newest)
    except sqlite3.Error as error:
        if is_corrupt(error) or sqlite_code(error) in TRANSIENT_SQLITE:
            raise
        copy = f" A copy is kept, too: {backup}." if backup else ""
        raise UserError(
            f"{database} could not be migrated from schema {version} to {newest}: {error}. It was "
            f"not changed: the version that you used before can use it.{copy} Report this error"
        ) from None
    if not version:
        return None
    seconds = round(time.monotonic() - started, 3)
    return Migrated(version, newest, seconds, backup, no_backup)


async def run_migrations(writer: Writer, due: Sequence[str], newest: int) -> None:
    """Execute the scripts that bring the tables to the newest schema, in one transaction. Raises
    sqlite3.Error."""
    await writer.executescript(
        f"BEGIN IMMEDIATE; {''.join(due)}\nPRAGMA user_version = {newest}; COMMIT;"
    )


async def back_up_once(database: Path, version: int, serving: Serving | None) -> tuple[str, str]:
    """Copy the database before its migration, unless an earlier try did. Return the path of the
    copy; if there is none, an empty path and the reason. Raises LedgerDamaged."""
    file = identity_of(database)
    if serving and serving.copied and serving.copied[0] == file:
        return serving.copied[1], ""
    try:
        made, why_not = await asyncio.to_thread(back_up_before_migration, database, version)
    except Damaged as error:
        raise LedgerDamaged(f"{error}. It was not migrated") from None
    if serving and made:
        serving.copied = file, made
    return made, why_not
