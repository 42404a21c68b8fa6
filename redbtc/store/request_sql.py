"""SQL that writes the rows of requests. No connection is used here."""

from __future__ import annotations

import functools
import sqlite3
from typing import Any

import msgspec

from redbtc.usage import KINDS, RequestRow, Usage

COLUMNS = (*RequestRow.__struct_fields__[:-1], *KINDS)
SETTLED = COLUMNS[COLUMNS.index("first_byte_ms") :]
PLACES = f"({', '.join('?' * len(COLUMNS))})"
RECORD = f"""
    INSERT INTO requests ({", ".join(COLUMNS)}) VALUES {PLACES}
        ON CONFLICT (request_id) DO UPDATE SET upstream = excluded.upstream,
           {", ".join(f"{name} = excluded.{name}" for name in SETTLED)}
        WHERE outcome = 'pending'"""
FORGET = "DELETE FROM requests WHERE request_id = ? AND outcome = 'pending'"
MAX_ROWS = 32  # of one statement


@functools.lru_cache(MAX_ROWS)
def record_of(rows: int) -> str:
    """Return RECORD for a number of rows at once."""
    return RECORD.replace(PLACES, ", ".join([PLACES] * rows))


def values_of(row: RequestRow) -> list[Any]:
    """Return the row's values in the order of COLUMNS."""
    *values, usage = msgspec.structs.astuple(row)
    return [*values, *msgspec.structs.astuple(usage)]


def row_of(columns: sqlite3.Row) -> RequestRow:
    """Return the row whose COLUMNS are among these; the opposite of `values_of`."""
    usage = Usage(**{name: columns[name] for name in KINDS})
    return RequestRow(**{name: columns[name] for name in COLUMNS if name not in KINDS}, usage=usage)
