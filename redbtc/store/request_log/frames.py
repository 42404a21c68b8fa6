"""How parts of bodies are stored: compressed, and in pages of their own.

A row that is changed or deleted makes SQLite move its neighbours between pages of the table, and
copies of them stay in unused space there, which even secure_delete does not overwrite. It does
overwrite the overflow pages of a row, which are never copied. So the content of a row begins with
so many zeros that all that is on the table's own pages is zeros (see "B-tree Pages" in SQLite's
file format).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from redbtc.errors import StorageUnavailable

Body = bytes | bytearray

PAGE_BYTES = 4096
OVERFLOW_BYTES = PAGE_BYTES - 4  # of a row on each of its overflow pages
# Bytes of a row on the table's own page, if as few are there as possible.
LOCAL_BYTES = (PAGE_BYTES - 12) * 32 // 255 - 23
# As few are there if the rest fills its last overflow page nearly. The row's other columns and the
# record's header take less than the rest of the page.
LAST_BYTES = OVERFLOW_BYTES - 200
FRAME_BYTES = 128 << 10  # of a body, that are compressed at once


def pieces_of(parts: Iterable[Body]) -> Iterator[bytes]:
    """Join small parts and cut large ones, into pieces of FRAME_BYTES to twice that; the last one
    may be smaller."""
    gathered: list[Body] = []
    size = 0
    for part in parts:
        for at in range(0, len(part), FRAME_BYTES):
            gathered.append(part[at : at + FRAME_BYTES])
            size += len(gathered[-1])
            if size >= FRAME_BYTES:
                yield b"".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def framed(piece: bytes) -> bytes:
    """Return a piece of a body as it is stored."""
    frame = bytes(LOCAL_BYTES) + zstd.compress(piece)
    return frame + bytes((LOCAL_BYTES + LAST_BYTES - len(frame)) % OVERFLOW_BYTES)


def unframed(content: bytes) -> bytes:
    """Return the piece of a body that is stored so. Raises StorageUnavailable if it is damaged."""
    decoder = zstd.ZstdDecompressor()
    with contextlib.suppress(zstd.ZstdError):
        piece = decoder.decompress(content[LOCAL_BYTES:])
        if decoder.eof:
            return piece
    raise StorageUnavailable("a part of the body is damaged in the request log")
