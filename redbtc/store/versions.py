"""Find out that a newer version of this program wrote a database, without opening it with SQLite.

SQLite would change files of a database that must be left alone: opening one beside a WAL file makes
an index, and closing it copies the WAL into the database. So the version is read from the first
page: from the database file, or from the last committed copy of the page in the WAL file (SQLite's
file format, 1.3 and 4).
"""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from redbtc.errors import UserError
from redbtc.release import RELEASE
from redbtc.store.schema import APPLICATION_ID, newest_version

USER_VERSION_AT = 60
MARK_AT = 68
WAL_MAGIC = 0x377F0682  # the lowest bit says that checksums are of big-endian words
WAL_HEADER = struct.Struct(">8I")  # magic, format, page size, number, 2 salts, 2 checksums
FRAME = struct.Struct(">6I")  # page, pages of the database after a commit or 0, salts, checksums


class WalHeader(NamedTuple):
    """What the header of a WAL file says of its frames."""

    is_big_endian: bool
    page_bytes: int
    salts: tuple[int, int]
    checksum: tuple[int, int]


def refuse_newer(database: Path) -> None:
    """Raise UserError if a newer version of this program wrote the ledger. Nothing is changed.
    Raises OSError."""
    known = newest_version()
    if (version := newer_version(database, APPLICATION_ID, known)) is None:
        return
    raise UserError(
        f"{database} has schema {version}, written by a newer version of this program; this is "
        f"version {RELEASE}, which knows schemas up to {known}. Nothing was changed. Use the "
        f"newer version again, or {way_back(database, known)}"
    )


def way_back(database: Path, known: int) -> str:
    """Return how to get a ledger that this version can use, as the end of a sentence."""
    if copy := copy_to_go_back_to(database, known):
        path, version = copy
        at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return (
            f"restore the copy from before the upgrade (schema {version}, made "
            f"{at:%Y-%m-%dT%H:%M:%SZ}; what was recorded since then is not in it): "
            f"redbtc-proxy db restore {shlex.quote(str(path))}"
        )
    return (
        f"restore a backup of schema {known} or earlier (redbtc-proxy db restore FILE); there is "
        f"no copy from before the upgrade ({database}.before-schema-…)"
    )


def copy_to_go_back_to(database: Path, known: int) -> tuple[Path, int] | None:
    """Return the newest of the copies made before migrations that has a known schema, with the
    version of that. None if there is none."""
    form = re.compile(re.escape(database.name) + r"\.before-schema-\d+(\.\d+)?")
    copies = []
    for file in database.parent.iterdir():
        if form.fullmatch(file.name) and file.is_file():
            version = version_in_file(file, APPLICATION_ID)
            if version and version <= known:
                copies.append((version, file.stat().st_mtime_ns, file))
    if not copies:
        return None
    version, _, file = max(copies)
    return file, version


def newer_version(database: Path, mark: int, known: int) -> int | None:
    """Return the version of a database with this application id if it is newer than `known`, else
    None, also if there is no such database. Raises OSError."""
    version = version_in_file(database, mark)
    wal = database.with_name(f"{database.name}-wal")
    if version is not None and wal.exists():
        with wal.open("rb") as file:
            if version > known or any(each > known for each in versions_in_wal(file)):
                committed = committed_version(file)
                version = version if committed is None else committed
    return version if version is not None and version > known else None


def version_in_file(path: Path, mark: int) -> int | None:
    """Return the version in the first page of a database file, None if it does not have this
    application id. Raises OSError."""
    try:
        with path.open("rb") as file:
            header = file.read(MARK_AT + 4)
    except (FileNotFoundError, IsADirectoryError):
        return None
    if len(header) < MARK_AT + 4 or int.from_bytes(header[MARK_AT:]) != mark:
        return None
    return version_of_page(header)


def version_of_page(page: bytes) -> int:
    """Return the version (`PRAGMA user_version`) in the first page of a database."""
    return int.from_bytes(page[USER_VERSION_AT : USER_VERSION_AT + 4])


def read_wal_header(file: BinaryIO) -> WalHeader | None:
    """Return the header at the beginning of a WAL file, None if there is none."""
    file.seek(0)
    data = file.read(WAL_HEADER.size)
    if len(data) < WAL_HEADER.size:
        return None
    magic, _, page_bytes, _, *rest = WAL_HEADER.unpack(data)
    if magic & ~1 != WAL_MAGIC or not 512 <= page_bytes <= 65536:
        return None
    checksum = checksum_of(data[:24], bool(magic & 1), (0, 0))
    if checksum != tuple(rest[2:]):
        return None
    return WalHeader(bool(magic & 1), page_bytes, (rest[0], rest[1]), checksum)


def versions_in_wal(file: BinaryIO) -> Iterator[int]:
    """Yield the version in each copy of the first page that may be in force. This reads only the
    heads of the frames, and whether these are valid is not checked."""
    if not (wal := read_wal_header(file)):
        return
    while len(head := file.read(FRAME.size)) == FRAME.size:
        page, _, *salts, _, _ = FRAME.unpack(head)
        if (*salts,) != wal.salts:
            return
        at = file.tell()
        if page == 1:
            yield version_of_page(file.read(USER_VERSION_AT + 4))
        file.seek(at + wal.page_bytes)


def committed_version(file: BinaryIO) -> int | None:
    """Return the version in the last committed copy of the first page in a WAL file, None if none
    was committed. This reads the file to its end."""
    if not (wal := read_wal_header(file)):
        return None
    checksum, committed, latest = wal.checksum, None, None
    while len(data := file.read(FRAME.size + wal.page_bytes)) == FRAME.size + wal.page_bytes:
        page, commits, *salts, first, second = FRAME.unpack(data[: FRAME.size])
        content = data[FRAME.size :]
        checksum = checksum_of(data[:8] + content, wal.is_big_endian, checksum)
        if (*salts,) != wal.salts or checksum != (first, second):
            break
        if page == 1:
            latest = version_of_page(content)
        if commits:
            committed = latest
    return committed


def checksum_of(data: bytes, is_big_endian: bool, before: tuple[int, int]) -> tuple[int, int]:
    """Return the checksum of a WAL file after more of its data (SQLite's file format, 4.2)."""
    first, second = before
    words = struct.iter_unpack(">II" if is_big_endian else "<II", data)
    for one, two in words:
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
