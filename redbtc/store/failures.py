"""Classify errors of SQLite and of the system, and say what an operator can do about them."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path

from redbtc.errors import StorageUnavailable, UserError
from redbtc.store.files import FileChanged

LogFunction = Callable[..., None]  # the gateway's log: level, event, fields

# What an operator must do, as the log says it.
FILE_CHANGED = (
    "Don't stop the gateway until it logs 'ledger rescued'. Then stop it and restore the file that "
    "the log names: db restore FILE."
)
RESCUED = "Stop the gateway and restore the file: db restore FILE. What it lacks is added then."
DAMAGED_IN_USE = (
    "Stop the gateway and restore a backup: db restore FILE. What it lacks is added then. Or save "
    "what can be read with the recover command of the sqlite3 program."
)
DAMAGED_AT_START = (
    "The file was not changed. Restore a backup: db restore FILE. If a database was copied here "
    "by hand, a -wal file of another database may lie beside it."
)

TRANSIENT_SQLITE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CANTOPEN,
)
TRANSIENT_OS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
)


class LedgerDamaged(StorageUnavailable):
    """Pages of the database are damaged, so nothing is written into it."""


def no_log(level: int, event: str, **fields: object) -> None:
    """Drop a line of the log: commands have no log."""


def is_corrupt(error: Exception) -> bool:
    """Return whether SQLite found a damaged page, or a file that is not a database."""
    return sqlite_code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_about_a_value(error: Exception) -> bool:
    """Return whether SQLite or Python refused one of the values of a statement. Any other error
    means that the ledger can't commit."""
    refused = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, ValueError, TypeError)
    return isinstance(error, refused) or "binding parameter" in str(error)


def reason_of(error: Exception) -> str:
    """Return a description of an error for the log, which contains no value of a statement."""
    known = isinstance(error, sqlite3.Error | OSError | FileChanged)
    return str(error) if known and str(error) else type(error).__name__


def opening_error(path: Path, error: sqlite3.Error | OSError) -> UserError:
    """Return the error to raise when opening the database failed: StorageUnavailable if another try
    can succeed, LedgerDamaged, or a UserError."""
    if isinstance(error, OSError):
        message = f"{error.filename or path}: {error.strerror or type(error).__name__}"
    else:
        message = f"{path}: {error}"
    if is_corrupt(error):
        return LedgerDamaged(message)
    if sqlite_code(error) in TRANSIENT_SQLITE or getattr(error, "errno", None) in TRANSIENT_OS:
        return StorageUnavailable(message)
    return UserError(message)


def sqlite_code(error: Exception) -> int:
    """Return SQLite's primary result code, 0 if the error is not from SQLite."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF
