"""Overwrite what is left of deleted rows inside the pages of a database file.

With secure_delete, SQLite overwrites a row that it deletes. But when it splits or merges pages, it
copies rows to other places and leaves their old bytes in the *gap*, the unused space between a
page's list of cells and its cells (SQLite's file format, 1.6). If such a row is deleted later, only
its copy is overwritten: of 32,000 deleted rows, two were still readable.

Nothing reads a gap, so it can be overwritten in the file itself, even while other connections read
the page, and even if power is lost meanwhile: no other byte changes. It is only necessary that
nobody writes the page at the same time, and that the writing connection has no copy of the page in
its memory, which it would write back (Writer.zero_gaps).
"""

from __future__ import annotations

import os
from typing import NamedTuple

MAX_PAGES = 1 << 25  # below that, the first byte of pages that are not of a b-tree is 0
HEADERS = {2: 12, 5: 12, 10: 8, 13: 8}  # bytes of a page's header, by the type of b-tree page
FILE_HEADER_BYTES = 100  # of the first page


class PageFormat(NamedTuple):
    """The size of a database's pages, and the bytes at the end of each that SQLite doesn't use."""

    size: int
    reserved: int

    @classmethod
    def of(cls, file: int) -> PageFormat:
        """Return the format of an open database file. Raises OSError."""
        header = os.pread(file, FILE_HEADER_BYTES, 0)
        size = int.from_bytes(header[16:18])
        return cls(65536 if size == 1 else size, header[20])


def zero_gaps(file: int, first: int, count: int) -> int:
    """Overwrite the gaps of `count` pages from the page `first` (1 is the first one) with zeros,
    and bring that to the disk. `file` is the database file, open for reading and writing, with
    nothing in its WAL. Return how many pages were read: 0 at the end of the file. Raises
    OSError."""
    size, reserved = PageFormat.of(file)
    if reserved or not size or first >= MAX_PAGES:  # an extension of SQLite signs whole pages
        return 0
    data = os.pread(file, count * size, (first - 1) * size)
    changed = False
    for number in range(len(data) // size):
        page = data[number * size : (number + 1) * size]
        start, end = gap_of(page, FILE_HEADER_BYTES if first + number == 1 else 0)
        if page.count(0, start, end) != end - start:
            os.pwrite(file, bytes(end - start), (first + number - 1) * size + start)
            changed = True
    if changed:
        os.fsync(file)
    return len(data) // size


def gap_of(page: bytes, header_at: int) -> tuple[int, int]:
    """Return where the gap of a page begins and ends, an empty range if it is no b-tree page."""
    header_bytes = HEADERS.get(page[header_at], 0)
    cells = int.from_bytes(page[header_at + 3 : header_at + 5])
    content = int.from_bytes(page[header_at + 5 : header_at + 7]) or 65536
    start = header_at + header_bytes + 2 * cells
    if not header_bytes or not start <= content <= len(page):
        return 0, 0
    lowest = min(
        (int.from_bytes(page[at : at + 2]) for at in range(start - 2 * cells, start, 2)),
        default=content,
    )
    return (start, content) if lowest >= content else (0, 0)
