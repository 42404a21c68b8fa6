"""Write rows of requests into the ledger: many with one statement, without a value that is refused,
and again if another process has closed one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from redbtc.store.entries import EntryKind
from redbtc.store.request_sql import COLUMNS, MAX_ROWS, RECORD, SETTLED, record_of
from redbtc.store.writer import SQLStatement, Writer

# What a settled row can do without if a value is refused.
OPTIONAL = [name for name in SETTLED if name not in ("outcome", "usage_source", "month")]
REOPEN = """
    INSERT INTO reopened (request_id, reopened_at)
    SELECT request_id, ? FROM requests WHERE request_id = ? AND run = ? AND outcome = 'interrupted'
       AND NOT EXISTS (SELECT 1 FROM corrections WHERE request_id = requests.request_id)"""
INSERTED = re.compile(r"\s*INSERT INTO requests \(([\w, ]+)\) VALUES \(")
STORED = f"SELECT {', '.join(COLUMNS)} FROM requests WHERE request_id = ?"


class RequestRows(EntryKind):
    """Rows of requests, written by RECORD."""

    name = "request"
    max_rows = MAX_ROWS

    def statement(self, rows: Sequence[Sequence[Any]]) -> SQLStatement:
        return record_of(len(rows)), list(chain(*rows))

    def reduced(self, values: Sequence[Any]) -> Iterator[tuple[list[str], list[Any]]]:
        for left_out in [*([name] for name in OPTIONAL), OPTIONAL]:
            kept = [
                None if name in left_out else value
                for name, value in zip(COLUMNS, values, strict=True)
            ]
            if kept != list(values):
                yield left_out, kept

    def writes(self, sql: str) -> bool:
        """Return whether a statement of this or an earlier version writes such a row."""
        return INSERTED.match(sql) is not None

    def completed(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        inserted = INSERTED.match(sql)
        names = inserted[1].split(", ") if inserted else COLUMNS
        row = dict(zip(names, values, strict=True))
        return [row.get(name) for name in COLUMNS]

    def columns(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(COLUMNS, values, strict=True))

    async def repair(
        self, writer: Writer, values: Sequence[Any], now: int
    ) -> dict[str, Any] | None:
        wanted = self.columns(values)
        rows = [*await writer.execute_fetchall(STORED, (wanted["request_id"],))]
        if not rows:
            return None
        found = self.columns(tuple(rows[0]))
        if all(found[name] == wanted[name] for name in SETTLED):
            return None
        reopen = (REOPEN, (now, wanted["request_id"], wanted["run"]))
        reopened, _ = await writer.write([reopen, (RECORD, values)])
        return {
            "request_id": wanted["request_id"],
            "found": found["outcome"],
            "wanted": wanted["outcome"],
            "repaired": bool(reopened),
        }


REQUEST_ROWS = RequestRows()
