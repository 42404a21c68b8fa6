"""Ledgers of every version of the schema that ever landed, with rows in every table.

The sections of schema.sql are never edited once they have landed, so the tables of a version are
made by the sections up to it. The triggers at the end of the file change with each version: those
of earlier versions are recorded in tests/store/landed. LANDED is what the last commit of each
version made, so a section that is edited later is noticed.

To record the newest version: .venv/bin/python -m tests.helpers.ledgers
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

from redbtc.store.schema import (
    APPLICATION_ID,
    SECTION,
    TRIGGERS,
    newest_version,
    schema,
    written_out,
)
from tests.helpers.gateway import ROOT

RECORDED = ROOT / "tests" / "store" / "landed"
LANDED = {
    1: "48325c9b69801a0a",
    2: "892657e7221214f3",
    3: "150925ca45e8841d",
    4: "4767bc044dcd7358",
    5: "d8d98296faf1c946",
    6: "3efde3107596b430",
    7: "138673c2e6f922b9",
    8: "776db27085b36c76",
    9: "828391954b499a24",
    10: "3a51f68ba3301937",
    11: "b4e13e4f03863680",
    12: "96b2ea5a25c5f7d1",
    13: "1e4c71e179b2f896",
    14: "4d02cdf924366e93",
    15: "82935fe05272ab7a",
    16: "3e3543b1bd2a6a77",
    17: "e4f2c5e400437435",
}
AT = (
    4_102_444_800_000  # 2100-01-01: the ledger's time stands still there, so all dates are the same
)
MONTH = "2100-01"
IN_TRANSACTIONS = {"acting", "erasing", "setting_time"}  # these tables are empty at other times

# The values of columns that can't have just any value of their type, by table and column. A column
# that is in no row below, and not here, gets a text or number of its own.
SPECIAL: dict[str, Any] = {
    "account_id": "acct_1",
    "budget_id": "key_1",
    "compromised": 1,
    "cost": 1_500_000_007,
    "credentials": "client",
    "credential": "c" * 32,
    "currency": "USD",
    "hash": b"h" * 32,
    "key_id": "key_1",
    "link": b"l" * 32,
    "month": MONTH,
    "models": "gpt-*",
    "most": '{"input_tokens":9,"output_tokens":9,"drawn_tokens":9,"tool_calls":9,"pictures":9}',
    "outcome": "completed",
    "password": b"p" * 32,
    "price_id": 1,
    "refuses_requests": 0,
    "notice_id": "ntc_1",
    "run": 1,
    "salt": b"s" * 16,
    "secret": b"s" * 32,
    "seen": '{"seen":{"text_bytes":1},"since":5,"until":5,"works":false}',
    "settled": '{"upstream":"u","usage_source":"upstream","input_tokens":5}',
    "started_at": AT - 5000,
    "status": 200,
    "upstream_status": 200,
    "usage_source": "upstream",
    "minted_input": 1,
    "extras": 3,
    "user_id": "usr_1",
    "accounts.status": "suspended",
    "accounts.terminated_at": None,
    "accounts.erase_at": None,
    "accounts.erased_at": None,
    "heartbeat.beat_at": AT,
}
# The rows, in an order that foreign keys allow: a table, and the columns that matter.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("accounts", {"id": "acct_1"}),
    ("keys", {"id": "key_1"}),
    ("prices", {"id": 1}),
    ("requests", {"request_id": "req_done"}),
    ("requests", {"request_id": "req_old", "cost": 5}),
    ("requests", {"request_id": "req_guessed", "usage_source": "estimated"}),
    ("requests", {"request_id": "req_corrected", "usage_source": "estimated"}),
    ("requests", {"request_id": "req_reopened"}),
    ("requests", {"request_id": "req_background", "outcome": "pending", "cost": None}),
    ("requests", {"request_id": "req_flying", "outcome": "pending", "cost": None, "month": None}),
    ("payments", {"id": "pay_1", "units": 25, "nanos": 7}),
    ("notices", {"id": "ntc_1", "kind": "price", "percent": None}),
    ("notices", {"id": "ntc_2", "kind": "budget", "percent": 50, "delivered_at": None}),
    ("stored_objects", {"id": "resp_1"}),
    ("stored_objects", {"id": "cntr_1"}),
    ("background", {"request_id": "req_background"}),
    ("heartbeat", {"id": 1}),
    ("users", {"id": "usr_1", "email": "a@example.com", "role": "owner"}),
    ("sessions", {"id": "ses_1"}),
    ("known_browsers", {}),
    ("secrets", {"name": "idempotency"}),
    ("billed_containers", {"id": "cntr_1"}),
    ("estimates", {"response_id": "resp_2", "request_id": "req_guessed"}),
    ("corrections", {"request_id": "req_corrected", "cost": 1_400_000_007}),
    ("unsettled", {"request_id": "req_flying"}),
    ("runs", {"id": 1}),
    ("reopened", {"id": 1, "request_id": "req_reopened"}),
    ("upstream_changes", {"number": 1, "was": "up", "state": "out"}),
    ("upstream_rests", {"began_at": 5, "until": AT + 1}),
    ("webhook_messages", {"number": 9, "type": "budget.reached", "data": "{}"}),
    ("documents", {"name": "terms", "version": "1"}),
    ("acceptances", {"document": "terms", "version": "1"}),
    ("uptime", {"began_at": 0, "ended_at": AT, "state": "up"}),
    ("unpriced_models", {"model": "m", "requests": 2}),
    ("unpriced_model_accounts", {"model": "m", "requests": 2}),
    ("told", {"subject": "disk", "type": "disk.low"}),
]


def sections() -> dict[int, str]:
    """Return the sections of schema.sql by version, without the triggers at its end."""
    parts = SECTION.split(schema().partition(TRIGGERS)[0])
    return {int(number): sql for number, sql in zip(parts[1::2], parts[2::2], strict=True)}


def recorded_triggers(version: int) -> str:
    """Return the triggers that a version made from the end of its file; "" if it made none."""
    files = {int(file.stem.rpartition("-")[2]): file for file in RECORDED.glob("triggers-*.sql")}
    known = [number for number in files if number <= version]
    return files[max(known)].read_text() if known else ""


def make_tables(database: sqlite3.Connection, version: int) -> None:
    """Make the tables and triggers of a version."""
    for number in range(1, version + 1):
        database.executescript(sections()[number])
    database.executescript(recorded_triggers(version))


def digest_of_tables(database: sqlite3.Connection) -> str:
    """Return what differs where tables, indexes or triggers do, but not their comments."""
    made = sorted(
        (kind, name, re.sub(r"\s+", " ", re.sub(r"--[^\n]*", "", sql)).strip())
        for kind, name, sql in database.execute(
            "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
        )
    )
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def columns_of(database: sqlite3.Connection) -> dict[str, dict[str, str]]:
    """Return the type of each column of each table."""
    tables = [name for (name,) in database.execute("SELECT name FROM pragma_table_list")]
    return {
        table: {row[1]: row[2] for row in database.execute(f"PRAGMA table_info({table})")}
        for table in tables
        if not table.startswith("sqlite_")
    }


def make_ledger(path: Path, version: int) -> None:
    """Make a ledger of a version, with rows in every table, as a process leaves it that ends."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        make_tables(database, version)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {version}")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("BEGIN")
        fill(database)
        database.execute("COMMIT")
    path.chmod(0o600)


def fill(database: sqlite3.Connection) -> None:
    """Write a row with a value in each column into each table, and more where states differ."""
    tables = columns_of(database)
    if "acting" in tables:
        database.execute("INSERT INTO acting VALUES (1, 'somebody', 7)")
    for number, (table, given) in enumerate(ROWS):
        if columns := tables.get(table):
            values = {
                name: given.get(name, value_of(table, name, kind, number))
                for name, kind in columns.items()
            }
            places = ", ".join("?" * len(values))
            sql = f"INSERT OR REPLACE INTO {table} ({', '.join(values)}) VALUES ({places})"
            database.execute(sql, tuple(values.values()))
    if "reopened" in tables:  # a trigger has made the request pending again
        database.execute(
            "UPDATE requests SET outcome = 'completed' WHERE request_id = 'req_reopened'"
        )
    if "erasing" in tables:
        database.execute("INSERT INTO erasing VALUES (1, 'usage', NULL)")
        database.execute("DELETE FROM requests WHERE request_id = 'req_old'")
        database.execute("DELETE FROM erasing")
    if "acting" in tables:
        database.execute("DELETE FROM acting")


def value_of(table: str, column: str, kind: str, number: int) -> Any:
    """Return a value for a column, of which nothing is said in ROWS."""
    for name in (f"{table}.{column}", column):
        if name in SPECIAL:
            return SPECIAL[name]
    return f"{column} {number}" if kind == "TEXT" else 100 + number


Rows = dict[str, list[dict[str, Any]]]


def rows_in(path: Path) -> Rows:
    """Return all rows of a database by table. Its files are copied by nobody meanwhile."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return {
            table: sorted(
                (dict(row) for row in database.execute(f"SELECT * FROM {table}")), key=repr
            )
            for table in columns_of(database)
        }


def record() -> None:
    """Record the triggers of the newest version, and print its line of LANDED."""
    version = newest_version()
    lines = written_out(schema().partition(TRIGGERS)[2]).split("\n")
    triggers = "\n".join(line for line in lines if not line.startswith("--")).strip() + "\n"
    if triggers != recorded_triggers(version):
        (RECORDED / f"triggers-{version}.sql").write_text(triggers)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        make_tables(database, version)
        print(f'    {version}: "{digest_of_tables(database)}",')


if __name__ == "__main__":
    record()
