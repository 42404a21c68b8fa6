"""Check the pages of a database whose gateway did not end cleanly."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from pathlib import Path

from redbtc.store.failures import LogFunction, is_corrupt

SECONDS_BETWEEN_LINES = 5  # of the log
STEPS_A_CALL = 100_000  # of SQLite's virtual machine, after which the clock is read
MAX_PROBLEMS = 5
TABLES_BY_PAGE = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY rootpage"
# Pages of two databases in one can each be sound, so the numbers of rows are compared as well.
HAS_TABLE = "SELECT 1 FROM sqlite_schema WHERE name = ?"
ERASED_COUNT = "(SELECT ifnull(sum(requests), 0) FROM rolled_up)"
REQUEST_COUNTS = """
    SELECT (SELECT count(*) FROM requests NOT INDEXED WHERE outcome <> 'pending'),
           (SELECT count(*) FROM requests INDEXED BY requests_by_time)
           - (SELECT count(*) FROM requests INDEXED BY requests_in_flight
               WHERE outcome = 'pending'),
           (SELECT ifnull(sum(requests), 0) FROM traffic_by_day) - {erased}"""
QUICK_CHECK = "SELECT quick_check FROM pragma_quick_check(?) LIMIT ?"


class PageCheck:
    """A check of the pages of a database that nothing has opened yet."""

    def __init__(self, database: Path, seconds: float, log: LogFunction) -> None:
        """After about `seconds` the check ends before its end, and the log says so."""
        self._database = database
        self._deadline = time.monotonic() + seconds
        self._log = log
        self._logged_at = time.monotonic()
        self._stopped = False
        self._state: dict[str, str | int] = {}

    def find_damage(self) -> list[str]:
        """Return the problems, table by table. Nothing is written."""
        uri = f"{self._database.as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.set_progress_handler(self._must_end, STEPS_A_CALL)
            try:
                return self._check_tables(connection)
            except sqlite3.DatabaseError as error:
                if is_corrupt(error):
                    return [str(error)]
                raise

    def stop(self) -> None:
        """End the check, from another thread."""
        self._stopped = True

    def _check_tables(self, connection: sqlite3.Connection) -> list[str]:
        tables = [name for (name,) in connection.execute(TABLES_BY_PAGE)]
        wrong: list[str] = []
        try:
            for number, table in enumerate(tables):
                self._state = {"table": table, "tables_done": number, "tables": len(tables)}
                found = connection.execute(QUICK_CHECK, (table, MAX_PROBLEMS)).fetchall()
                wrong += [f"{table}: {first_line(text)}" for (text,) in found if text != "ok"]
            return wrong or self._compare(connection)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            self._log(logging.WARNING, "ledger not checked to its end", **self._state)
            return wrong

    def _compare(self, connection: sqlite3.Connection) -> list[str]:
        if not connection.execute(HAS_TABLE, ("traffic_by_day",)).fetchone():
            return []
        has_erased = connection.execute(HAS_TABLE, ("rolled_up",)).fetchone()
        counts = REQUEST_COUNTS.format(erased=ERASED_COUNT if has_erased else 0)
        in_table, in_index, in_sums = connection.execute(counts).fetchone()
        if in_table == in_index == in_sums:
            return []
        return [
            f"the table has {in_table} settled requests, its index {in_index}, the sums {in_sums}"
        ]

    def _must_end(self) -> bool:
        """Log the progress of the check, and return whether it must end."""
        now = time.monotonic()
        if now - self._logged_at > SECONDS_BETWEEN_LINES:
            self._logged_at = now
            self._log(logging.INFO, "checking the ledger", **self._state)
        return self._stopped or now > self._deadline


def first_line(text: str) -> str:
    """Return what a message of SQLite's check says about the first page: it lists all pages."""
    return text.removeprefix("*** in database main ***\n").partition("\n")[0]
