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
import struct
from collections.abc import Sequence
from typing import NamedTuple

MAX_PAGES = 1 << 25  # up to that, the first byte of pages that are not of a b-tree is 0 or 1
HEADERS = {2: 12, 5: 12, 10: 8, 13: 8}  # bytes of a page's header, by the type of b-tree page
FILE_HEADER_BYTES = 100  # of the first page


class PageFormat(NamedTuple):
    """The size of a database's pages, and whether all of them are of the kinds known here."""

    size: int
    is_known: bool

    @classmethod
    def of(cls, file: int) -> PageFormat:
        """Return the format of an open database file. Raises OSError."""
        header = os.pread(file, FILE_HEADER_BYTES, 0)
        size = int.from_bytes(header[16:18])
        if size == 1:
            size = 65536
        # An extension of SQLite can sign whole pages, in bytes that it reserves in each; and the
        # first byte of an auto-vacuum's page is like that of a b-tree page.
        is_plain = bool(size) and not header[20] and not any(header[52:56])
        return cls(size, is_plain and os.fstat(file).st_size <= MAX_PAGES * size)


def pages_with_remnants(file: int, first: int, count: int) -> list[int] | None:
    """Return which of `count` pages from the page `first` (1 is the first one) have something in
    their gaps. `file` is the open database file, which may be written to meanwhile: what stays in
    a gap is found all the same. Return None at the end of the file. Raises OSError."""
    layout = PageFormat.of(file)
    if not layout.is_known:
        return None
    data = os.pread(file, count * layout.size, (first - 1) * layout.size)
    pages = range(first, first + len(data) // layout.size)
    return (
        [
            number
            for at, number in zip(range(0, len(data), layout.size), pages, strict=False)
            if remnants_in(number, data[at : at + layout.size])
        ]
        if pages
        else None
    )


def zero_gaps(file: int, pages: Sequence[int]) -> None:
    """Overwrite the gaps of these pages with zeros. `file` is the database file, open for reading
    and writing, with nothing in its WAL. That the zeros reach the disk is left to the caller.
    Raises OSError."""
    size = PageFormat.of(file).size
    for number in pages:
        at = (number - 1) * size
        if gap := remnants_in(number, os.pread(file, size, at)):
            start, end = gap
            os.pwrite(file, bytes(end - start), at + start)


def remnants_in(number: int, page: bytes) -> tuple[int, int] | None:
    """Return where the gap of a page begins and ends, None if there is nothing in it."""
    start, end = gap_of(page, FILE_HEADER_BYTES if number == 1 else 0)
    return (start, end) if page.count(0, start, end) != end - start else None


def gap_of(page: bytes, header_at: int) -> tuple[int, int]:
    """Return where the gap of a page begins and ends, an empty range if it is no b-tree page."""
    header_bytes = HEADERS.get(page[header_at], 0)
    cells = int.from_bytes(page[header_at + 3 : header_at + 5])
    content = int.from_bytes(page[header_at + 5 : header_at + 7]) or 65536
    start = header_at + header_bytes + 2 * cells
    if not header_bytes or not start <= content <= len(page):
        return 0, 0
    pointers = struct.unpack_from(f">{cells}H", page, start - 2 * cells)
    return (start, content) if min(pointers, default=content) >= content else (0, 0)
