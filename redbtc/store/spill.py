"""The spill file keeps changes that the ledger could not commit until a later process commits them.

It lies beside the database, as redbtc.db.owed. Part of its space is reserved while a gateway runs,
so that a full disk leaves room for these changes. Each line is a CRC-32, a space and a change as a
JSON array: an SQL statement, its values and, where it has one, the name of its kind. Unused space
is filled with NUL bytes. Like the ledger, the file holds no byte of a prompt or an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redbtc.store.files import identity_of
from redbtc.store.health import RETRY_SECONDS

RESERVED_BYTES = 256 << 10  # room for about 500 requests
MAX_TRIES = 5  # to add changes


class OwedChange(NamedTuple):
    """A change that the ledger lacks: an SQL statement, its values, and the name of its kind (see
    `EntryKind`; "" if it has none)."""

    sql: str
    values: Sequence[Any]
    kind: str = ""


def line_of(change: OwedChange) -> bytes:
    """Return a change as a line of the file."""
    kind = [change.kind] if change.kind else []
    text = json.dumps([change.sql, list(change.values), *kind]).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def change_of(line: bytes) -> OwedChange | None:
    """Return the change in a line, None if the line is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    return OwedChange(*json.loads(text))


class Spill:
    """The spill file of a database. It is open from `reserve` to `close`."""

    def __init__(self, database: Path, process: str = "") -> None:
        """`process` is the id of a process that another one has taken over from: it has a file of
        its own."""
        self.path = Path(f"{database}.owed-{process}" if process else f"{database}.owed")
        self.refused = Path(f"{database}.owed.refused")
        self._file: int | None = None
        self._content = b""  # as it is on the disk
        self._adding = threading.Lock()

    def exists(self) -> bool:
        """Return whether the file exists: its gateway is running, or did not end cleanly."""
        return self.path.exists()

    def read(self) -> tuple[list[OwedChange], list[bytes]]:
        """Return the changes in the file, in their order, and its damaged lines. Raises OSError."""
        try:
            content = self.path.read_bytes().replace(b"\0", b"")
        except FileNotFoundError:
            return [], []
        changes, damaged = [], []
        for line in filter(None, content.split(b"\n")):
            if change := change_of(line):
                changes.append(change)
            else:
                damaged.append(line + b"\n")
        return changes, damaged

    def reserve(self) -> None:
        """Empty the file and reserve its space, as far as the disk has room. Raises OSError; a file
        that was open then stays open."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        self.close()
        self._file = file
        with contextlib.suppress(OSError):  # the disk is full, but may have room later
            os.write(file, bytes(RESERVED_BYTES))

    def add(self, changes: Sequence[OwedChange]) -> int:
        """Write changes and bring them to the disk, in up to MAX_TRIES tries. Return how many of
        them are in the file."""
        written = 0
        with self._adding:
            for tried in range(MAX_TRIES):
                if tried:
                    time.sleep(RETRY_SECONDS)
                written += self._add(changes[written:])
                if written == len(changes):
                    break
        return written

    def _add(self, changes: Sequence[OwedChange]) -> int:
        if self._file is None:
            return 0
        added, written = b"", 0
        try:
            with contextlib.suppress(OSError):
                self._recreate_if_removed()
                for line in map(line_of, changes):
                    self._write(line, len(self._content) + len(added))
                    added += line
                    written += 1
            os.fsync(self._file)
        except OSError:
            return 0
        self._content += added
        return written

    def _recreate_if_removed(self) -> None:
        """Recreate the file with its content if it was removed. Raises OSError."""
        if identity_of(self.path) == identity_of(self._file or 0):
            return
        self.reserve()
        try:
            self._write(self._content, 0)
        except OSError:
            self.path.unlink()  # so that the next try recreates it
            raise

    def _write(self, data: bytes, at: int) -> None:
        """Write all of the data at an offset. Raises OSError."""
        assert self._file is not None
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def refuse(self, lines: Sequence[bytes]) -> None:
        """Append lines that can't be committed to the file `refused`, which only people read.
        Raises OSError."""
        if lines:
            with open(self.refused, "ab") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

    def use(self, other: Spill) -> None:
        """Use the path of another one from now on. This one must hold no change; its file is kept.
        Raises OSError."""
        self.close()
        self.path = other.path
        self.reserve()

    def remove(self) -> None:
        """Close the file, and remove it if it was open and holds no change."""
        empty = self._file is not None and not self._content
        self.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and keep it."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def left_spills(database: Path) -> list[Spill]:
    """Return the spill files of processes that another one had taken over from, and that did not
    end cleanly."""
    found = sorted(database.parent.glob(f"{database.name}.owed-*"))
    return [Spill(database, each.name.rpartition("-")[2]) for each in found]
