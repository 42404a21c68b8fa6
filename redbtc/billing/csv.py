"""Reports and statements as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from redbtc.billing.reports import COUNTS
from redbtc.billing.statements import Statement

FORMULA = re.compile(r"\s*[=+@＝＋－＠]|\s+-|-(?![0-9.]+$)|[\t\r\n]")


def csv_line(values: Iterable[Any]) -> str:
    """Return a line of CSV (RFC 4180). Text that a spreadsheet would take for a formula gets an
    apostrophe in front, except for numbers."""
    texts = ("" if value is None else str(value) for value in values)
    out = io.StringIO()
    csv.writer(out).writerow(f"'{text}" if FORMULA.match(text) else text for text in texts)
    return out.getvalue()


def csv_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of rows, after a line of column names. Without rows there is no line."""
    for place, row in enumerate(rows):
        if not place:
            yield csv_line(row)
        yield csv_line(row.values())


def statement_lines(found: Statement) -> Iterator[dict[str, Any]]:
    """Yield a statement as rows with the same columns. The closing balance is the opening balance
    plus all payments minus all costs. The costs of the usage include the differences of the
    corrections, whose own rows have no cost."""
    columns = ["line", "date", "description", *COUNTS, "cost", "amount"]
    empty = dict.fromkeys([*columns, "before", "after", "difference"])
    yield {**empty, "line": "opening balance", "amount": found.opening_balance}
    for used in found.usage:
        figures = {name: getattr(used, name) for name in (*COUNTS, "cost")}
        yield {**empty, "line": "usage", "date": used.day, "description": used.model, **figures}
    for each in found.corrections:
        line = {"line": "correction", "date": each.day, "description": each.request_id}
        amounts = {"before": each.before, "after": each.after, "difference": each.difference}
        yield {**empty, **line, **amounts}
    for paid in found.payments:
        line = {"line": "payment", "date": paid.created_at[:10], "amount": paid.amount}
        yield {**empty, **line, "description": paid.reason or paid.reference}
    yield {**empty, "line": "closing balance", "amount": found.closing_balance}
