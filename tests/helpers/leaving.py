"""An account with something in every column that can identify it, and what is found of it later."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DAY_MS = 86_400_000


def fill_account(database: Path, account_id: str, mark: str, rows: int, now: int) -> None:
    """Write `rows` requests, three times as many stored objects and a few other rows of an account
    into the database of a stopped gateway. `mark` is in each text that can identify the account.
    `now` is a time in milliseconds."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN")
        (name,) = db.execute("SELECT name FROM accounts WHERE id = ?", (account_id,)).fetchone()
        db.execute("INSERT INTO acting VALUES (1, ?, ?)", (f"{mark}@example.com of {name}", now))
        _fill(db, account_id, name, mark, rows, now)
        db.execute("DELETE FROM acting")
        db.execute("COMMIT")


def _fill(
    db: sqlite3.Connection, account_id: str, name: str, mark: str, rows: int, now: int
) -> None:
    def add(table: str, **columns: Any) -> None:
        places = ", ".join("?" * len(columns))
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"
        db.execute(sql, tuple(columns.values()))

    chance, of = random.Random(mark), account_id[-8:]
    set_texts = "UPDATE accounts SET email = ?, status_reason = ? WHERE id = ?"
    db.execute(set_texts, (f"{mark}@example.com", f"{mark} pays late", account_id))
    base = {"account_id": account_id, "created_at": now}
    key, user, month = f"key_{of}", f"usr_{of}", "2026-11"
    add("keys", id=key, hash=chance.randbytes(32), label=f"{mark}'s", models=f"{mark}*", **base)
    user_columns = {"salt": chance.randbytes(16), "password": chance.randbytes(32)}
    add("users", id=user, email=f"{mark}@example.com", role="owner", **user_columns, **base)
    browser = {"browser": f"{mark} browser", "created_at": now, "seen_at": now}
    add("sessions", id=f"ses_{of}", hash=chance.randbytes(32), user_id=user, **browser)
    for number in range(rows):
        request_id = f"req_{number:06d}{of}"
        add(
            "requests",
            request_id=request_id,
            account_id=account_id,
            key_id=key,
            endpoint="/v1/responses",
            requested_model="gpt-up",
            upstream="test",
            started_at=now - number,
            outcome="completed",
            usage_source="estimated",
            input_tokens=number,
            output_tokens=1,
            cost=number,
            month=month,
            response_id=f"resp_{number}_{mark}",
            upstream_request_id=f"{mark}-{number}",
        )
        for kind in ("resp", "msg", "cntr"):
            random_id = f"{kind}_{chance.randbytes(12).hex()}{mark}{'x' * chance.randrange(90)}"
            add("stored_objects", id=random_id, upstream="test", **base)
            if kind == "cntr":
                add("billed_containers", id=random_id)
        known = {"request_id": request_id, "admitted_at": now, "image_model": ""}
        if number % 3 == 0:
            add("estimates", response_id=f"resp_{number}_{mark}", **known)
        if number % 50 == 0:
            add("unsettled", request_id=request_id, settled=json.dumps({"id": mark}))
            add("background", **known, held=0, input_estimate=1, seen=f'"{mark}"', most=f'"{mark}"')
    budget = {"kind": "budget", "month": month, "text": f"{mark}: 50 %", "effective_at": now}
    add("notices", id=f"ntc_{of}", percent=50, **budget, **base)
    # The trigger that adds its message names the account, as does a message about closing it.
    told = json.dumps({"account": name, "text": f"{mark} asks to be closed"})
    message = {"id": f"msg_{of}", "type": "account.closing", "data": told, "created_at": now}
    add("webhook_messages", **message)
    amount = {"units": 5, "nanos": 0, "currency": "USD", "month": month}
    texts = {"reference": f"{mark} 1", "reason": f"for {mark}", "added_by": f"{mark} bank"}
    add("payments", id=f"pay_{of}", **amount, **texts | {"added_by": "operator"}, **base)


def marks_in(folder: Path, mark: str) -> dict[str, int]:
    """Return how often a text is in each file of a folder, in any case of letters, where it is."""
    files = [each for each in folder.rglob("*") if each.is_file()]
    counts = {str(each): each.read_bytes().lower().count(mark.encode()) for each in files}
    return {name: count for name, count in counts.items() if count}


def texts_of(database: Path, mark: str) -> set[str]:
    """Return the columns of all tables, as `table.column`, in which a text is."""
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
        return {
            f"{table}.{column}"
            for table, column in text_columns(db)
            if any(has(row, mark) for row in db.execute(f"SELECT {column} FROM {table}"))
        }


def has(row: Sequence[Any], mark: str) -> bool:
    (value,) = row
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return mark in text.lower()


def text_columns(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return each column that holds text or bytes, with its table."""
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return [
        (table, column)
        for table in tables
        for _, column, kind, *_ in db.execute(f"PRAGMA table_info({table})")
        if kind in ("TEXT", "BLOB")
    ]
