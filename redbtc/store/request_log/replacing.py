"""Replace the log's file by a copy, where another program reads from the old one.

A reader keeps erased content in the file and in its WAL: SQLite can neither empty the WAL nor
overwrite pages that a transaction still reads. So a copy without the erased content takes the
file's place, and the old files are emptied. The reader then gets errors.

The copy is written as `….copying` and renamed to `….ready` when it is whole and on the disk. That
rename decides: before it, nothing has changed; after it, `complete_replacement` finishes the work,
at the latest when the log is opened the next time. Each of its steps can be repeated.
"""

from __future__ import annotations

import os
from pathlib import Path

from redbtc.store.backup import VERSIONS_AT, suffixed, sync_folder
from redbtc.store.rescue import sync_file

WAL_VERSIONS = b"\2\2"  # for reading and writing (SQLite's file format, 1.3)


def make_empty(path: Path) -> None:
    """Make an empty file that only its owner may read. Raises OSError, also if there is one."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def wipe(path: Path) -> None:
    """Empty a file, also for those who have it open, if there is one. Raises OSError."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.ftruncate(file, 0)
        os.fsync(file)
    finally:
        os.close(file)


def begin_copy(path: Path) -> Path:
    """Return the path for a copy of the database, where there is an empty file now. Raises
    OSError."""
    copy = suffixed(path, ".copying")
    copy.unlink(missing_ok=True)
    make_empty(copy)
    return copy


def use_copy(path: Path) -> None:
    """Put the copy, which is whole, in the place of the database. This process must have no
    connection to either: closing a file would end SQLite's locks. Raises OSError."""
    copy = suffixed(path, ".copying")
    # SQLite can't change to WAL later, if another program begins to read at once.
    with copy.open("r+b") as file:
        file.seek(VERSIONS_AT)
        file.write(WAL_VERSIONS)
    sync_file(copy)
    os.replace(copy, suffixed(path, ".ready"))
    sync_folder(path.parent)
    complete_replacement(path)


def complete_replacement(path: Path) -> None:
    """Finish a replacement whose copy is ready, and remove a copy that is not. Nothing is left of a
    database that was moved away, either: SQLite would apply its WAL to the next one. This process
    has no connection to the database. Raises OSError."""
    copy, ready = suffixed(path, ".copying"), suffixed(path, ".ready")
    wipe(copy)
    copy.unlink(missing_ok=True)
    is_ready = ready.exists()
    if not is_ready and path.exists():
        return
    wal, index = suffixed(path, "-wal"), suffixed(path, "-shm")
    wipe(path)
    wipe(wal)
    wal.unlink(missing_ok=True)
    index.unlink(missing_ok=True)
    sync_folder(path.parent)
    if is_ready:
        os.replace(ready, path)
        sync_folder(path.parent)
