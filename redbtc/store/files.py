"""The database's files: one process holds them, and they are still the ones that it opened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from redbtc.errors import UserError

CHECK_SECONDS = 0.25


class DatabaseInUse(UserError):
    """Another process holds the database."""


class FileChanged(UserError):
    """The database's file was removed, or replaced by another one, while it was open."""


@contextlib.contextmanager
def hold_lock(database: Path) -> Iterator[None]:
    """Hold the lock file beside a database, which ends with the process, however that ends. Raises
    DatabaseInUse, OSError."""
    with _held(Path(f"{database}.lock"), database):
        yield


@contextlib.contextmanager
def hold(database: Path) -> Iterator[None]:
    """Hold the database's own file, which is made if there is none: it keeps a second gateway out
    if somebody removes the lock file. SQLite's locks are of another kind. Raises DatabaseInUse,
    OSError.

    This must end after the last connection of SQLite is closed: to close the file earlier would end
    the locks that SQLite holds for this process."""
    with _held(database, database):
        yield


@contextlib.contextmanager
def _held(path: Path, database: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        in_use = DatabaseInUse(f"{database} is in use by another gateway or command; stop it first")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        if identity_of(path) != identity_of(file):  # removed by who held it before
            raise in_use
        yield
    finally:
        os.close(file)


Identity = tuple[int, int]  # device and inode


def identity_of(file: Path | int) -> Identity | None:
    """Return which file is at a path or open, None if there is none. Raises OSError."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class OpenFiles:
    """Which files an open database, its write-ahead log and the index of that are."""

    def __init__(self, database: Path) -> None:
        """All must exist. Raises OSError."""
        paths = (database, Path(f"{database}-wal"), Path(f"{database}-shm"))
        self._opened = {path: identity_of(path) for path in paths}
        self._checked_at = time.monotonic()

    def check(self) -> None:
        """Raise FileChanged if one of the files is not at its path any more. Looks at most every
        CHECK_SECONDS. Raises OSError."""
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        for path, opened in self._opened.items():
            found = identity_of(path)
            if found != opened:
                what = "removed" if found is None else "replaced by another file"
                raise FileChanged(f"{path} was {what} while the gateway had it open")


def state_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to; () if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
