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
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from redbtc_files import identity_of

Change = tuple[str, Sequence[Any]]  # a statement and its values

RESERVED_BYTES = 256 << 10  # room for about 500 requests


def line_of(change: Change) -> bytes:
    """Return a change as a line of the file."""
    text = json.dumps([change[0], list(change[1])]).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def change_of(line: bytes) -> Change | None:
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
        self._end = 0  # of what is written

    def exists(self) -> bool:
        """Return whether there is a file: its gateway runs, or did not end cleanly."""
        return self.path.exists()

    def read(self) -> tuple[list[Change], list[bytes]]:
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
        """Empty the file and reserve its space, as far as there is any. Raises OSError."""
        self.close()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o600)
        self._end = 0
        with contextlib.suppress(OSError):  # the disk is full: what is owed may find room later
            os.write(self._file, bytes(RESERVED_BYTES))

    def add(self, changes: Sequence[Change]) -> int:
        """Write changes and sync them to the disk. Return how many of them found room."""
        with contextlib.suppress(OSError):
            self._reopen_if_removed()
        written = sum(1 for _ in self._add_each(changes))
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
        return written

    def _reopen_if_removed(self) -> None:
        """Make the file again, with all that is in it, if somebody has removed it."""
        if self._file is None or identity_of(self.path) == identity_of(self._file):
            return
        content = os.pread(self._file, self._end, 0)
        self.reserve()
        self._end = os.pwrite(self._file, content, 0)

    def _add_each(self, changes: Sequence[Change]) -> Iterator[None]:
        for change in changes:
            line = line_of(change)
            try:
                if self._file is None or os.pwrite(self._file, line, self._end) < len(line):
                    return
            except OSError:
                return
            self._end += len(line)
            yield

    def refuse(self, lines: Sequence[bytes]) -> None:
        """Put lines that can't be committed aside, in a file that nothing reads but people. Raises
        OSError."""
        if lines:
            with open(self.refused, "ab") as file:
                file.writelines(lines)

    def remove(self) -> None:
        """Remove the file, if it is open: nothing is owed. If something is, close it only."""
        empty = self._file is not None and self._end == 0
        self.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and leave it where it is."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
