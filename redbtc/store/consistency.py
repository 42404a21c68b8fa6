"""Check that a database is sound and its rows agree with each other, for db check and check."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from redbtc.errors import StorageUnavailable, UserError
from redbtc.store.backup import FILE_CHECKS, suffixed
from redbtc.store.database import Store
from redbtc.store.opening import refuse_incomplete
from redbtc.store.schema import APPLICATION_ID
from redbtc.store.spill import Spill, left_spills
from redbtc.store.versions import refuse_newer

CHECKS = FILE_CHECKS | {
    "usage does not equal the sum of its requests": """
        SELECT account_id, month FROM (
            SELECT account_id, month, requests, cost_units AS units, cost_nanos AS nanos
              FROM usage_by_day
            UNION ALL
            SELECT account_id, ifnull(month, strftime('%Y-%m', started_at / 1000, 'unixepoch')), -1,
                   ifnull(-(cost / 1000000000), 0), ifnull(-(cost % 1000000000), 0)
              FROM requests WHERE outcome <> 'pending'
            UNION ALL
            SELECT account_id, month, -requests, -cost_units, -cost_nanos FROM rolled_up
            UNION ALL
            SELECT account_id, month, 0, (ifnull(before, 0) - ifnull(cost, 0)) / 1000000000,
                   (ifnull(before, 0) - ifnull(cost, 0)) % 1000000000
              FROM (SELECT corrections.*, iif(requests.request_id IS NULL, request_cost,
                                              requests.cost) AS before
                      FROM corrections LEFT JOIN requests USING (request_id)))
         GROUP BY 1, 2 HAVING sum(requests) <> 0 OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
    "a correction has no request": """
        SELECT request_id FROM corrections
         WHERE request_started_at IS NULL AND request_id NOT IN (SELECT request_id FROM requests)
         LIMIT 20""",
    "usage by month does not equal the sum of its days": """
        SELECT account_id, month FROM (
            SELECT account_id, month, requests, ifnull(input_tokens, 0) AS input,
                   ifnull(output_tokens, 0) AS output, cost_units AS units, cost_nanos AS nanos
              FROM usage_by_day
            UNION ALL
            SELECT account_id, month, -requests, -input_tokens, -output_tokens, -cost_units,
                   -cost_nanos
              FROM usage_by_month)
         GROUP BY 1, 2 HAVING sum(requests) <> 0 OR sum(input) <> 0 OR sum(output) <> 0
                           OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
    "traffic does not equal the usage of its day": """
        SELECT date(day * 86400, 'unixepoch') FROM (
            SELECT day, requests, cost_units AS units, cost_nanos AS nanos FROM usage_by_day
            UNION ALL
            SELECT day, -requests, -cost_units, -cost_nanos FROM traffic_by_day)
         GROUP BY day HAVING sum(requests) <> 0 OR sum(units) <> 0 OR sum(nanos) <> 0 LIMIT 20""",
}

CHECK_TABLE = "PRAGMA integrity_check('{}')"  # of sqlite_schema: the list of free pages, too
TABLE_NAMES = "SELECT name FROM sqlite_schema WHERE type = 'table'"


async def check_database(store: Store) -> list[str]:
    """Return the problems of the database, line by line. The integrity of each table, and each
    other check, is read through a snapshot of its own, so that no snapshot lasts long."""
    async with store.snapshot() as snapshot:
        tables = ["sqlite_schema", *[name for (name,) in await snapshot.all(TABLE_NAMES)]]
    checks = {f"integrity of {table}": CHECK_TABLE.format(table) for table in tables}
    checks |= {name: sql for name, sql in CHECKS.items() if name != "integrity"}
    return [line for name, sql in checks.items() for line in await run_check(store, name, sql)]


async def run_check(store: Store, name: str, sql: str) -> list[str]:
    """Return the problems that one check finds. A part that can't be read is one, too."""
    try:
        async with store.snapshot_to_check() as snapshot:
            rows = [tuple(row) for row in await snapshot.all(sql)]
    except StorageUnavailable as error:
        rows = [(error,)]
    return [f"{name}: {' '.join(map(str, row))}" for row in rows if row != ("ok",)]


CURRENCIES = "SELECT currency FROM prices UNION SELECT currency FROM payments"


def check_file(path: Path, currency: str) -> list[str]:
    """Return the problems of a database that may be in use. Nothing is written."""
    try:
        if not suffixed(path, ".restored").exists():  # else a start finishes that restore first
            refuse_incomplete(path, [Spill(path), *left_spills(path)])
            refuse_newer(path)
        path.stat()
    except UserError as error:
        return [str(error)]
    except FileNotFoundError:
        writable = os.access(path.parent, os.W_OK)
        return (
            [] if writable else [f"{path}: can't be created: its folder is missing or not writable"]
        )
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            (marked,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            rows = database.execute("PRAGMA quick_check(20)").fetchall()
            others = database.execute(CURRENCIES).fetchall() if version > 1 else []
    except sqlite3.Error as error:
        return [f"{path}: {error}"]
    wrong = [f"{path}: {line}" for (line,) in rows if line != "ok"]
    if marked != APPLICATION_ID:
        wrong.append(f"{path}: this is the database of another program")
    if any(other != currency for (other,) in others):
        wrong.append(
            f"billing.currency is {currency}, but the ledger is in {others[0][0]}; change it back"
        )
    return wrong


def rows_of(path: Path, sql: str, *values: str | int) -> list[Any]:
    """Return the rows of a query; none if the database can't be read or is of a newer version,
    which `check_file` reports, or is of an earlier version that has no such table."""
    try:
        refuse_newer(path)
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(sql, values).fetchall()
    except (sqlite3.Error, UserError, OSError):
        return []
