"""Lock the database's files, and notice when they are removed or replaced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from redbtc.errors import UserError

FILE_CHECK_SECONDS = 0.25


class DatabaseInUse(UserError):
    """Another process holds the database."""


class FileChanged(UserError):
    """The database's file was removed, or replaced by another one, while it was open."""


@contextlib.contextmanager
def take_lock_file(database: Path) -> Iterator[int]:
    """Hold the lock file beside a database, and return it. The lock ends with the process, however
    that ends. Raises DatabaseInUse, OSError."""
    with _held(Path(f"{database}.lock"), database) as file:
        yield file


@contextlib.contextmanager
def lock_database(database: Path) -> Iterator[int]:
    """Lock the database's own file, which is created if there is none, and return it. This keeps a
    second gateway out if the lock file was removed. SQLite's locks are of another kind. Raises
    DatabaseInUse, OSError.

    This must end after the last connection of SQLite is closed: closing the file earlier would end
    the locks that SQLite holds for this process."""
    with _held(database, database) as file:
        yield file


@contextlib.contextmanager
def _held(path: Path, database: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        in_use = DatabaseInUse(f"{database} is in use by another gateway or command; stop it first")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        if identity_of(path) != identity_of(file):  # its last holder removed it
            raise in_use
        yield file
    finally:
        os.close(file)


Identity = tuple[int, int]  # device and inode


def identity_of(file: Path | int) -> Identity | None:
    """Return the identity of the file at a path or of an open file, None if there is none. Raises
    OSError."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class OpenFiles:
    """The identities of an open database, its write-ahead log and the index of that."""

    def __init__(self, database: Path) -> None:
        """Remember the files, all of which must exist. Raises OSError."""
        paths = (database, Path(f"{database}-wal"), Path(f"{database}-shm"))
        self._opened = {path: identity_of(path) for path in paths}
        self._checked_at = time.monotonic()

    def check(self) -> None:
        """Raise FileChanged if one of the files is not at its path any more. The files are checked
        at most every FILE_CHECK_SECONDS. Raises OSError."""
        now = time.monotonic()
        if now - self._checked_at < FILE_CHECK_SECONDS:
            return
        self._checked_at = now
        for path, opened in self._opened.items():
            found = identity_of(path)
            if found != opened:
                what = "removed" if found is None else "replaced by another file"
                raise FileChanged(f"{path} was {what} while the gateway had it open")


def state_of(path: Path) -> tuple[int, ...]:
    """Return values that change when a file is replaced or written to; () if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
