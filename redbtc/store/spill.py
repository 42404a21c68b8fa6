"""The spill file: changes that the ledger could not commit, kept until a later process does.

It lies beside the database, as redbtc.db.owed, and has a part of its space reserved while a gateway
runs, so that a full disk leaves room for what is owed. Each line is a CRC-32, a space and a change
as JSON: the statement and its values. The space that is not used is filled with NUL bytes. Like the
ledger, it holds no byte of a prompt or an answer.
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
from typing import Any

from redbtc.store.files import identity_of

OwedChange = tuple[str, Sequence[Any]]  # a statement and its values

RESERVED_BYTES = 256 << 10  # room for about 500 requests
MAX_TRIES = 5  # to add changes
RETRY_SECONDS = 0.25


def line_of(change: OwedChange) -> bytes:
    """Return a change as a line of the file."""
    text = json.dumps([change[0], list(change[1])]).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def change_of(line: bytes) -> OwedChange | None:
    """Return the change in a line, None if the line is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    sql, values = json.loads(text)
    return sql, values


class Spill:
    """The spill file of a database. It is open from `reserve` to `close`."""

    def __init__(self, database: Path) -> None:
        self.path = Path(f"{database}.owed")
        self.refused = Path(f"{database}.owed.refused")
        self._file: int | None = None
        self._content = b""  # that is on the disk
        self._adding = threading.Lock()

    def exists(self) -> bool:
        """Return whether there is a file: its gateway runs, or did not end cleanly."""
        return self.path.exists()

    def read(self) -> tuple[list[OwedChange], list[bytes]]:
        """Return the changes in the file, in their order, and those of its lines that are damaged.
        Raises OSError."""
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
        """Empty the file and reserve its space, as far as there is any. Raises OSError; an open
        file is then still open."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        self.close()
        self._file = file
        with contextlib.suppress(OSError):  # the disk is full: what is owed may find room later
            os.write(file, bytes(RESERVED_BYTES))

    def add(self, changes: Sequence[OwedChange]) -> int:
        """Write changes and sync them to the disk. What fails is tried again, up to MAX_TRIES
        times. Return how many of the changes are in the file."""
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
                self._make_again_if_removed()
                for line in map(line_of, changes):
                    self._write(line, len(self._content) + len(added))
                    added += line
                    written += 1
            os.fsync(self._file)
        except OSError:
            return 0
        self._content += added
        return written

    def _make_again_if_removed(self) -> None:
        """Make the file again, with all that was in it, if somebody has removed it. Raises
        OSError."""
        if identity_of(self.path) == identity_of(self._file or 0):
            return
        self.reserve()
        try:
            self._write(self._content, 0)
        except OSError:
            self.path.unlink()  # so that this is done again
            raise

    def _write(self, data: bytes, at: int) -> None:
        """Write all of the data at an offset. Raises OSError."""
        assert self._file is not None
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def refuse(self, lines: Sequence[bytes]) -> None:
        """Put lines that can't be committed aside, in a file that nothing reads but people. Raises
        OSError."""
        if lines:
            with open(self.refused, "ab") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, if it is open: nothing is owed. If something is, close it only."""
        empty = self._file is not None and not self._content
        self.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
