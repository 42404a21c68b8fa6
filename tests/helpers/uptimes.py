"""A history of uptime, and models that were refused, in a database of a stopped gateway."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from redbtc.times import DAY, MINUTE, day_of, now_ms

# How many days ago, from which minute of the day, how many minutes, and what they were. What is not
# listed was up; `stopped` has no row.
PAST = [
    (70, 61, 3, "upstreams"),
    (52, 300, 41, "stopped"),
    (41, 1200, 60, "maintenance"),  # announced
    (40, 0, 25, "unknown"),
    (23, 1439, 2, "stopped"),
    (9, 130, 1, "ledger"),
    (2, 777, 14, "draining"),
]
SINCE_DAYS = 83
ADD_MAINTENANCE = """
    INSERT INTO notices (id, kind, text, effective_at, until, created_at, refuses_requests)
    VALUES ('ntc_00000000000000aa', 'maintenance', 'A larger disk.', ?1, ?2, ?1 - 1000, 1)"""


def fill_uptime(path: Path) -> str:
    """Write the past, until an hour ago. Return a day with an outage."""
    today, rows = now_ms() // DAY, []
    at = (today - SINCE_DAYS) * DAY + 400 * MINUTE
    with closing(sqlite3.connect(path)) as database, database:
        for days, minute, count, state in PAST:
            began = (today - days) * DAY + minute * MINUTE
            rows.append((at, began, "up"))
            at = began + count * MINUTE
            if state != "stopped":
                rows.append((began, at, state))
            if state == "maintenance":
                database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (began - DAY,))
                database.execute(ADD_MAINTENANCE, (began, at))
                database.execute("DELETE FROM acting")
        rows.append((at, now_ms() // MINUTE * MINUTE - 60 * MINUTE, "up"))
        database.executemany("INSERT INTO uptime VALUES (?, ?, ?)", rows)
    return day_of(today - 9)


def fill_unpriced(path: Path, models: int) -> None:
    """Let all accounts have asked for so many models."""
    now = now_ms()
    with closing(sqlite3.connect(path)) as database, database:
        for number in range(models):
            row = (f"gpt-{number + 6}-preview", 3 * number + 1, now - DAY, now - number * MINUTE)
            database.execute(
                "INSERT INTO unpriced_models (model, requests, first_at, last_at)"
                " VALUES (?, ?, ?, ?)",
                row,
            )
            database.execute(
                "INSERT INTO unpriced_model_accounts SELECT ?, id, ?, ? FROM accounts",
                (row[0], row[1], row[3]),
            )
