"""Reports and statements as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from redbtc.billing.reports import COUNTS
from redbtc.store.records import Record

FORMULA = re.compile(r"\s*[=+@＝＋－＠]|\s+-|-(?![0-9.]+$)|[\t\r\n]")


def csv_line(values: Iterable[Any]) -> str:
    """RFC 4180. What a spreadsheet would take for a formula, and is no number, is text."""
    texts = ("" if value is None else str(value) for value in values)
    out = io.StringIO()
    csv.writer(out).writerow(f"'{text}" if FORMULA.match(text) else text for text in texts)
    return out.getvalue()


def csv_lines(rows: Iterable[Record]) -> Iterator[str]:
    """Where there is a row, with a line of column names."""
    for place, row in enumerate(rows):
        if not place:
            yield csv_line(row)
        yield csv_line(row.values())


def statement_lines(found: Record) -> Iterator[Record]:
    """A statement as lines of one form: the opening balance and all payments, less all costs, are
    the closing balance. The costs include the differences of the corrections, whose own lines have
    no cost."""
    columns = ["line", "date", "description", *COUNTS, "cost", "amount"]
    empty = dict.fromkeys([*columns, "before", "after", "difference"])
    yield {**empty, "line": "opening balance", "amount": found["opening_balance"]}
    for used in found["usage"]:
        figures = {name: used[name] for name in (*COUNTS, "cost")}
        line = {"line": "usage", "date": used["day"], "description": used["model"], **figures}
        yield {**empty, **line}
    for each in found["corrections"]:
        line = {"line": "correction", "date": each["day"], "description": each["request_id"]}
        yield {**empty, **line, **{name: each[name] for name in ("before", "after", "difference")}}
    for paid in found["payments"]:
        line = {"line": "payment", "date": paid["created_at"][:10], "amount": paid["amount"]}
        yield {**empty, **line, "description": paid["reason"] or paid["reference"]}
    yield {**empty, "line": "closing balance", "amount": found["closing_balance"]}
