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
    """RFC 4180. What a spreadsheet would take for a formula, and is no number, is text."""
    texts = ("" if value is None else str(value) for value in values)
    out = io.StringIO()
    csv.writer(out).writerow(f"'{text}" if FORMULA.match(text) else text for text in texts)
    return out.getvalue()


def csv_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Where there is a row, with a line of column names."""
    for place, row in enumerate(rows):
        if not place:
            yield csv_line(row)
        yield csv_line(row.values())


def statement_lines(found: Statement) -> Iterator[dict[str, Any]]:
    """A statement as lines of one form: the opening balance and all payments, less all costs, are
    the closing balance. The costs include the differences of the corrections, whose own lines have
    no cost."""
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
