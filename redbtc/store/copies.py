"""Find copies of a database that lie beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from redbtc.store.backup import has_mark, suffixed
from redbtc.store.schema import APPLICATION_ID, REQUEST_LOG, REQUEST_LOG_ID


def copies_beside(database: Path) -> list[str]:
    """Return the files in a database's folder that may have data which was erased in the database:
    other ledgers and request logs, such as backups and the copies that are made before a migration
    or by a restore, and changes that the database has refused."""
    refused, found = suffixed(database, ".owed.refused"), []
    for each in database.parent.iterdir():
        with contextlib.suppress(OSError):
            if each == refused or (not _is_in_use(each, database) and _is_copy(each)):
                found.append(str(each))
    return sorted(found)


def _is_in_use(file: Path, database: Path) -> bool:
    """Return whether a file, under whatever name, belongs to the database or to the request log
    beside it. Such a file must not be opened: closing it would end all locks that SQLite holds on
    it for this process, and the next program to read the database would remove its WAL file."""
    ends = ("", "-wal", "-shm")
    used = [
        suffixed(each, end) for each in (database, database.with_name(REQUEST_LOG)) for end in ends
    ]
    return any(each.exists() and file.samefile(each) for each in used)


def _is_copy(file: Path) -> bool:
    """Return whether a file has the header of a ledger or of a request log."""
    is_ours = any(has_mark(file, mark) for mark in (APPLICATION_ID, REQUEST_LOG_ID))
    return is_ours and file.stat().st_size > 0
