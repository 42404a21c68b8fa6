"""Backups of a database file, and how a backup takes the place of a database.

A copy is made with SQLite's backup API from one read transaction, so it is the database at one
instant, whatever other processes commit meanwhile. It is written to a temporary file, verified
there, brought to the disk and then renamed: a file under its final name is always whole.

The bodies of requests (redbtc/store/request_log) are in a database of their own. A backup contains
them only if that is wanted: a copy made in the same way has the name of the backup and
`.request_log.db`, and goes with it.

A restore prepares and verifies its copy as `….restoring` and renames it to `….restored`. That
rename decides: before it, nothing has changed; after it, `complete_restore` finishes the work, at
the latest when the database is opened the next time. Each of its steps can be repeated, so a
process that is killed at any instant leaves either the old database or the restored one.

Nothing here opens a database for writing, except copies that no other process knows of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from redbtc.errors import UserError
from redbtc.store.schema import APPLICATION_ID, REQUEST_LOG, REQUEST_LOG_ID, newest_version

PAGES_A_STEP = 1024  # 4 MiB, written to the disk before the next step begins
SPACE_FACTOR = 1.1  # free space that a copy needs, as a multiple of its source
BODIES_TRIES = 3  # to copy the request log, which is replaced when bodies are erased meanwhile
CACHE_KIB = 65536  # memory for checking a copy
HEADER_BYTES = 100
SQLITE_MAGIC = b"SQLite format 3\0"
ROLLBACK_JOURNAL = (
    b"\1\1"  # write and read version of a file without a -wal (SQLite's file format, 1.3)
)
VERSIONS_AT = 18
APPLICATION_ID_AT = 68
DIGEST = re.compile(r"([0-9a-f]{64}) [ *](.+)\n?")
# Suffixes of the files that belong to a database. No backup may take such a name.
FILE_SUFFIXES = (
    "",
    "-wal",
    "-shm",
    "-journal",
    ".lock",
    ".sock",
    ".owed",
    ".backups",
    ".restoring",
    ".restored",
)
# What else such a name may begin with.
FILE_PREFIXES = (".rescue", ".replaced", ".owed-", ".trial")

TRIAL_SUFFIXES = (".trial", ".trial-wal", ".trial-shm", ".trial-journal")
FILE_CHECKS = {
    "integrity": "PRAGMA integrity_check(20)",
    "foreign keys": "PRAGMA foreign_key_check",
}
LATEST_REQUEST = "SELECT count(*), max(started_at) FROM requests"


class Damaged(UserError):
    """A file is not a whole database of this program."""


class NoSpace(UserError):
    """There is too little free space for a copy."""


class Contents(NamedTuple):
    """The content of a verified copy. `latest_request_at` is the time at which the newest request
    started, in milliseconds; None if there is no request."""

    schema: int
    requests: int
    latest_request_at: int | None


class Backup(NamedTuple):
    """The result of a backup. `request_log` is the path of the copied request log; None if there is
    none, or it is not wanted."""

    path: str
    bytes: int
    sha256: str
    schema: int
    requests: int
    request_log: str | None
    seconds: float


class Restored(NamedTuple):
    """The result of a restore. `replaced` is the file that holds the database as it was before;
    None if there was none."""

    bytes: int
    contents: Contents
    replaced: Path | None


def suffixed(path: Path, suffix: str) -> Path:
    """Return the path with a suffix added to its name."""
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn an error of SQLite or of the system into a UserError that says what failed."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        file = getattr(error, "filename", None)
        said = f"{file}: {error.strerror}" if isinstance(error, OSError) and file else error
        raise UserError(f"{what}: {said}") from None


@contextlib.contextmanager
def named_damage(name: Path) -> Iterator[None]:
    """Turn an error of SQLite about the content of a file into Damaged. An OperationalError is
    about this process or the disk, and is raised unchanged."""
    try:
        yield
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise Damaged(f"{name} is damaged or not a database: {error}") from None


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[int]:
    """Yield the descriptor of an empty file at `path`, of mode 0600, which no other process writes
    meanwhile. What a killed process left there is discarded. The file is removed if the block
    raises. Raises UserError if another process is writing the file."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, file)
        if not _lock(file, path):
            raise UserError(
                f"{path} is being written by another command; wait until it has finished"
            )
        try:
            os.ftruncate(file, 0)
            os.fchmod(file, 0o600)
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _lock(file: int, path: Path) -> bool:
    """Try to lock a file. Return whether this process holds it and it still has this name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def check_space(source: Path, folder: Path, *, migrating: bool = False) -> None:
    """Raise NoSpace if the folder has too little free space for a copy of the database. A copy
    that fills the disk would stop the gateway that writes to it. With `migrating`, the database is
    migrated next, which may write as much again."""
    files = [source, suffixed(source, "-wal")]
    needed = int(SPACE_FACTOR * sum(file.stat().st_size for file in files if file.exists()))
    free = shutil.disk_usage(folder).free
    if migrating:
        what, needed = f"a copy of {source} and its migration need", 2 * needed
    else:
        what = f"a copy of {source} needs"
    if free < needed:
        raise NoSpace(f"{folder} has {free} bytes free, but {what} {needed}")


def copy(source: Path, file: int, path: Path, *, immutable: bool = False) -> None:
    """Copy the database `source` at this instant to the empty file `path`, whose descriptor is
    `file`. Each step reaches the disk before the next begins, so that other processes that write
    there never wait for all of it. With `immutable`, no process writes to the source, and it has no
    -wal of its own. Raises Damaged, sqlite3.OperationalError, OSError."""
    how = "immutable=1" if immutable else "mode=ro"
    with (
        named_damage(source),
        contextlib.closing(_connect(f"{source.as_uri()}?{how}")) as reading,
        contextlib.closing(_connect(f"{path.as_uri()}?nolock=1")) as writing,
    ):
        writing.execute("PRAGMA journal_mode = OFF")
        writing.execute("PRAGMA synchronous = OFF")
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # the instant of the copy
        reading.backup(writing, pages=PAGES_A_STEP, progress=lambda *_: os.fsync(file))
    os.pwrite(file, ROLLBACK_JOURNAL, VERSIONS_AT)  # the copy is one file
    os.fsync(file)


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None)


def verify(path: Path, name: Path, checks: Mapping[str, str]) -> Contents:
    """Check a file to which no process writes, and return its content. `name` is the file's name in
    messages. Checks beyond those of the file itself are made only if it has the newest schema.
    Raises Damaged if it is not a whole database of this program, UserError if its schema is too
    new."""
    with (
        named_damage(name),
        contextlib.closing(_connect(f"{path.as_uri()}?immutable=1")) as database,
    ):
        database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        version = _version(database, name)
        if version < newest_version():
            checks = FILE_CHECKS
        if wrong := problems(database, checks):
            raise Damaged(f"{name} is damaged: {'; '.join(wrong)}")
        return Contents(version, *database.execute(LATEST_REQUEST).fetchone())


def _version(database: sqlite3.Connection, name: Path) -> int:
    (marked,) = database.execute("PRAGMA application_id").fetchone()
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if marked != APPLICATION_ID or version == 0:
        raise Damaged(f"{name} is not a RedBTC database")
    if version > newest_version():
        raise UserError(
            f"{name} was written by a newer version of this program (schema {version}; this one"
            f" knows {newest_version()}). Use that version"
        )
    return version


def problems(database: sqlite3.Connection, checks: Mapping[str, str]) -> list[str]:
    """Return the problems that the checks find, a line each."""
    return [
        f"{name}: {' '.join(str(part) for part in row)}"
        for name, query in checks.items()
        for row in database.execute(query)
        if row != ("ok",)
    ]


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def digest_file(path: Path) -> Path:
    """Return the name of the file with the SHA-256 of `path`, in the format of sha256sum."""
    return suffixed(path, ".sha256")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_digest(path: Path) -> str | None:
    """Return the SHA-256 that was saved beside a file, None if there is none. Raises Damaged if the
    file with the SHA-256 has another format."""
    try:
        text = digest_file(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    if not (match := DIGEST.fullmatch(text)):
        raise Damaged(
            f"{digest_file(path)} is not in the format of sha256sum; remove it to skip the check"
        )
    return match[1]


def publish(file: Path, path: Path, digest: str | None, scratch: Path) -> None:
    """Give a file its final name, and save its digest beside it. If the process is killed
    meanwhile, the file may have no digest, but never that of another file."""
    with contextlib.ExitStack() as stack:
        if digest is not None:
            written = stack.enter_context(temporary(scratch))
            os.write(written, f"{digest}  {path.name}\n".encode())
            os.fsync(written)
        for old in (digest_file(path), digest_file(file)):
            old.unlink(missing_ok=True)
        sync_folder(path.parent)
        os.replace(file, path)
        if digest is not None:
            os.replace(scratch, digest_file(path))
    sync_folder(path.parent)


def bodies_of(path: Path) -> Path:
    """Return the name of the copy of the request log that belongs to a backup."""
    return suffixed(path, f".{REQUEST_LOG}")


def digest_to_keep(path: Path) -> str | None:
    """Return the SHA-256 that was saved beside a file, None if there is none, or none that can be
    read."""
    with contextlib.suppress(Damaged):
        return kept_digest(path)
    return None


def remove_backup(path: Path) -> None:
    """Remove a file and its digest, if there are any."""
    digest_file(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class BackupFile(NamedTuple):
    """The path of a backup. `stem` is the beginning of the names in a folder of backups; None if
    the backup has a name of its own."""

    path: Path
    stem: str | None

    @classmethod
    def of(cls, database: Path, given: str) -> BackupFile:
        """Return the path of the backup to make: the given file, or one in the given folder that is
        named by the time. Raises UserError if the folder does not exist."""
        path = Path(given).resolve()
        if path.is_dir():
            name = f"{database.stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.db"
            return cls(path / name, database.stem)
        folder = path if given.endswith("/") else path.parent
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist; create it first")
        return cls(path, None)

    @property
    def partial(self) -> Path:
        """Return the path of the unfinished backup. It is always the same, so that the next backup
        removes it."""
        return self.path.with_name(f"{self.stem or self.path.name}.partial")

    def make_free(self, keep: int, scratch: Path) -> None:
        """Rename a file that has the name of the backup to `….1`, that one to `….2`, and so on,
        each with its request log. A request log that would belong to no backup is removed."""
        numbers = range(1, keep if self.stem is None else 1)
        names = [self.path, *(suffixed(self.path, f".{number}") for number in numbers)]
        taken = list(itertools.takewhile(Path.exists, names))
        for old, new in reversed(list(zip(taken, names[1:], strict=False))):
            remove_backup(bodies_of(new))
            if bodies_of(old).exists():
                publish(bodies_of(old), bodies_of(new), digest_to_keep(bodies_of(old)), scratch)
            publish(old, new, digest_to_keep(old), scratch)
        remove_backup(bodies_of(self.path))

    def remove_old(self, keep: int) -> None:
        """Remove all but the newest `keep` backups, of which this is one."""
        for old in self._numbered(keep) if self.stem is None else self._named_by_time(keep):
            remove_backup(bodies_of(old))
            remove_backup(old)

    def _numbered(self, keep: int) -> Iterator[Path]:
        names = (suffixed(self.path, f".{number}") for number in itertools.count(keep))
        return itertools.takewhile(Path.exists, names)

    def _named_by_time(self, keep: int) -> list[Path]:
        pattern = re.compile(rf"{re.escape(self.stem or '')}-\d{{8}}T\d{{6}}Z\.db")
        others = [
            file
            for file in self.path.parent.iterdir()
            if pattern.fullmatch(file.name) and file != self.path
        ]
        return sorted(others, reverse=True)[keep - 1 :]


def back_up(
    database: Path, given: str, keep: int | None = None, *, with_request_log: bool = False
) -> Backup:
    """Copy the database to the file `given`, or to a file named by the time if that is a folder.
    `keep` is the number of backups that are kept, this one included; with None, only a backup of
    the same name is replaced. With `with_request_log`, copy the bodies of requests as well. Raises
    UserError; earlier backups are then as they were, or have another number."""
    started = time.monotonic()
    with plain_errors(f"No backup of {database} was made"), contextlib.ExitStack() as stack:
        target = BackupFile.of(database, given)
        before = _check_source(database)
        _check_target(database, target.path)
        check_space(database, target.path.parent)
        scratch = suffixed(target.partial, "-sha256")
        file = stack.enter_context(temporary(target.partial))
        copy(database, file, target.partial)
        if not _is_still(before, database):
            raise UserError(
                f"{database} was replaced while it was being copied; run the backup again"
            )
        contents = verify(target.partial, database, FILE_CHECKS)
        digest, size = sha256_of(target.partial), os.fstat(file).st_size
        bodies_of(target.partial).unlink(missing_ok=True)  # of a killed backup
        has_bodies = with_request_log and _copy_bodies(database, target, stack)
        target.make_free(keep or 1, scratch)
        publish(target.partial, target.path, digest, scratch)
        if has_bodies:
            copied = bodies_of(target.partial)
            publish(copied, bodies_of(target.path), sha256_of(copied), scratch)
        if keep is not None:
            target.remove_old(keep)
    request_log = str(bodies_of(target.path)) if has_bodies else None
    seconds = round(time.monotonic() - started, 3)
    return Backup(
        str(target.path), size, digest, contents.schema, contents.requests, request_log, seconds
    )


def _copy_bodies(database: Path, target: BackupFile, stack: contextlib.ExitStack) -> bool:
    """Copy the request log and verify the copy, which is removed if `stack` ends with an error.
    Return False if there is no request log."""
    source, partial = database.with_name(REQUEST_LOG), bodies_of(target.partial)
    if not source.exists():
        return False
    check_space(source, target.path.parent)
    file = stack.enter_context(temporary(partial))
    for _ in range(BODIES_TRIES):
        before = source.stat()
        try:
            os.ftruncate(file, 0)
            copy(source, file, partial)
        except (Damaged, sqlite3.Error):
            if _is_still(before, source):
                raise
        if _is_still(before, source):
            _verify_bodies(partial, source)
            return True
    raise UserError(
        f"{source} was replaced while it was being copied, because bodies were erased; run the"
        " backup again"
    )


def _verify_bodies(path: Path, name: Path) -> None:
    with (
        named_damage(name),
        contextlib.closing(_connect(f"{path.as_uri()}?immutable=1")) as database,
    ):
        if database.execute("PRAGMA application_id").fetchone() != (REQUEST_LOG_ID,):
            raise Damaged(f"{name} is not a request log")
        if wrong := problems(database, FILE_CHECKS):
            raise Damaged(f"{name} is damaged: {'; '.join(wrong)}")


def _is_still(before: os.stat_result, path: Path) -> bool:
    """Return whether a file was not replaced or removed."""
    try:
        return os.path.samestat(before, path.stat())
    except FileNotFoundError:
        return False


def _check_source(database: Path) -> os.stat_result:
    """Raise UserError if the database can't be copied. It must not be opened here but by SQLite:
    this process may use it, and closing a file ends all locks that SQLite holds on it."""
    if not database.is_file():
        raise UserError(f"Database {database} does not exist")
    if suffixed(database, ".restored").exists():
        raise UserError(
            f"A restore of {database} was interrupted. Run db check to finish it, then run the"
            " backup again"
        )
    return database.stat()


def _check_target(database: Path, path: Path) -> None:
    """Raise UserError if the backup would replace anything but an earlier backup."""
    kept = path.name.startswith(tuple(f"{database.name}{each}" for each in FILE_PREFIXES))
    is_log = path.name.startswith(REQUEST_LOG) and path.parent == database.parent
    if path in [suffixed(database, suffix) for suffix in FILE_SUFFIXES] or kept or is_log:
        raise UserError(f"{path} belongs to the database itself; choose another file")
    if suffixed(path, ".lock").exists():
        raise UserError(f"{path} is the database of a gateway ({path}.lock); choose another file")
    for file, mark in ((path, APPLICATION_ID), (bodies_of(path), REQUEST_LOG_ID)):
        if file.exists() and not has_mark(file, mark):
            raise UserError(f"{file} exists and is not a backup; choose another file")


def has_mark(path: Path, mark: int) -> bool:
    """Return whether a file is empty or has the header of a database of this program, with this
    application id."""
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    found = header[APPLICATION_ID_AT : APPLICATION_ID_AT + 4]
    return not header or (header.startswith(SQLITE_MAGIC) and int.from_bytes(found, "big") == mark)


def _remove_killed(database: Path) -> None:
    """Remove unfinished copies of killed migrations, which take the room of the next one. The
    caller holds the database's lock, so no process is writing them."""
    for file in database.parent.iterdir():
        if file.name.startswith(f"{database.name}.before-schema-") and ".partial" in file.name:
            file.unlink()


def back_up_before_migration(database: Path, version: int) -> tuple[str, str]:
    """Copy the database before it is migrated to a version. Return the path of the copy; if it
    could not be made, an empty path and the reason. Raises Damaged: such a database is not
    migrated."""
    try:
        with plain_errors(f"No backup of {database} was made"):
            _remove_killed(database)
            check_space(database, database.parent, migrating=True)
        made = back_up(database, f"{database}.before-schema-{version}", keep=2)
    except Damaged:
        raise
    except UserError as error:
        return "", str(error)
    return made.path, ""


def restore(database: Path, given: str, checks: Mapping[str, str]) -> Restored:
    """Replace the database by a verified copy of the file `given`. The caller holds the database's
    lock, so no process has it open. The replaced database is kept. Raises UserError; then nothing
    has changed."""
    source = Path(given).resolve()
    with plain_errors(f"{source} was not restored"):
        complete_restore(database)
        if not source.is_file():
            raise UserError(f"File {source} does not exist")
        if database.exists() and source.samefile(database):
            raise UserError(f"{source} is the database itself; choose a backup")
        check_space(source, database.parent)
        restoring = suffixed(database, ".restoring")
        with temporary(restoring) as file:
            copy(source, file, restoring, immutable=_is_one_file(source))
            contents = verify(restoring, source, checks)
            own_like(file, database)
            size = os.fstat(file).st_size
            os.fsync(file)
            os.replace(restoring, suffixed(database, ".restored"))
        sync_folder(database.parent)
        return Restored(size, contents, complete_restore(database))


def _is_one_file(source: Path) -> bool:
    """Return whether a backup is whole without a -wal beside it, which then belongs to another
    file: its digest is right, or nothing is beside it. Raises Damaged if the digest is wrong."""
    if (digest := kept_digest(source)) is not None:
        if digest != sha256_of(source):
            raise Damaged(f"{source} is damaged: its SHA-256 differs from {digest_file(source)}")
        return True
    return not any(suffixed(source, part).exists() for part in ("-wal", "-journal"))


def own_like(file: int, database: Path) -> None:
    """Give the file to the owner of the database, or of the folder if there is no database, if root
    gives the command: the gateway often runs as another user."""
    if os.geteuid() == 0:
        like = (database if database.exists() else database.parent).stat()
        os.fchown(file, like.st_uid, like.st_gid)


def complete_restore(database: Path) -> Path | None:
    """Finish a restore whose copy is ready, and remove what killed processes have left: a copy that
    is not ready, and one on which a migration was tried. Return the file that holds the replaced
    database, or None. The caller holds the database's lock, so no process has it open. Raises
    OSError.

    Every step can be repeated. The names come from the copy's own time, so that a repetition uses
    the same ones. A -wal is renamed before its database, and both before the copy takes their
    place: SQLite would apply a -wal to whatever database is beside it."""
    for unfinished in (".restoring", *TRIAL_SUFFIXES):
        suffixed(database, unfinished).unlink(missing_ok=True)
    restored = suffixed(database, ".restored")
    if not restored.exists():
        return None
    seconds = restored.stat().st_mtime_ns // 1_000_000 / 1000
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
    replaced = suffixed(database, f".replaced-{stamp}Z")
    for part in ("-wal", "-journal", ""):
        if (file := suffixed(database, part)).exists():
            if (kept := suffixed(replaced, part)).exists():
                raise FileExistsError(
                    errno.EEXIST, "This file would be overwritten; move it away", str(kept)
                )
            os.replace(file, kept)
    suffixed(database, "-shm").unlink(missing_ok=True)
    sync_folder(database.parent)
    os.replace(restored, database)
    sync_folder(database.parent)
    return replaced if replaced.exists() else None
