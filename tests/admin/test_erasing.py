"""A terminated account is erased from every file, whatever interrupts that. Its statements stay."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from redbtc.config import Settings
from redbtc.store.accounts import Accounts
from redbtc.store.closing import terminate
from redbtc.store.database import Store
from redbtc.store.erasure import ErasureEnd, erase_due
from redbtc.store.request_log import RequestLog
from redbtc.store.schema import migrations, schema
from redbtc.times import DAY
from tests.helpers.gateway import (
    NO_TLS,
    PATIENCE_SECONDS,
    ROOT,
    Gateway,
    MakeGateway,
)
from tests.helpers.leaving import fill_account, marks_in, text_columns, texts_of

pytestmark = pytest.mark.promise_6

MARK = "canary"
STAYS = "remains"
OWN_MODULES = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
# Columns of an account that can identify it, and are filled by `fill_account`.
IDENTIFYING = {
    "accounts.email",
    "accounts.name",
    "accounts.status_reason",
    "background.most",
    "background.seen",
    "billed_containers.id",
    "changes.after",
    "changes.before",
    "changes.changed_by",
    "estimates.response_id",
    "keys.label",
    "keys.models",
    "notices.text",
    "payments.reason",
    "payments.reference",
    "requests.response_id",
    "requests.upstream_request_id",
    "sessions.browser",
    "stored_objects.id",
    "users.email",
    "webhook_messages.data",
}

# Tables whose rows are deleted, and erased columns that the tests leave out.
WHOLE_ROWS = {
    "background",
    "billed_containers",
    "estimates",
    "notices",
    "sessions",
    "stored_objects",
    "unpriced_model_accounts",
    "unsettled",
    "users",
    "webhook_messages",
}
UNFILLED = {"keys.hash", "payments.added_by"}  # random; only operators record payments


def filled(gateway: Gateway, rows: int) -> dict[str, Any]:
    """Make an account that is to leave and one that stays, with `rows` requests each, in the
    database of a stopped gateway, and return the first one."""
    for mark in (MARK, STAYS):
        account = gateway.cli("account", "add", f"The {mark.title()} Company")
        now = round(time.time() * 1000)
        fill_account(gateway.database, account["id"], mark, rows, now)
        if mark == MARK:
            leaves = account
    found: dict[str, Any] = leaves
    return found


def statement(gateway: Gateway, account_id: str) -> dict[str, Any]:
    """Return a statement without the texts that are erased."""
    found: dict[str, Any] = gateway.api("GET", f"/accounts/{account_id}/statements/2026-11")
    for each in found["payments"]:
        assert each.pop("account")
        del each["reference"], each["reason"]
    del found["account"]
    return found


def test_nothing_that_identifies_an_account_is_left(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    account = filled(gateway, 400)
    gateway.start()
    assert texts_of(gateway.database, MARK) == IDENTIFYING, "the test fills all of them"
    stays = texts_of(gateway.database, STAYS)
    before = statement(gateway, account["id"])
    assert before["totals"]["requests"] == 400
    done = gateway.run("account", "terminate", account["name"], "--now", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Erasing stored objects" in done.stderr
    assert "was erased" in done.stdout
    assert not marks_in(gateway.folder, MARK)
    assert statement(gateway, account["id"]) == before
    assert texts_of(gateway.database, STAYS) == stays
    changes = gateway.api("GET", "/changes", account=account["id"], limit=1000)["changes"]
    assert {each["kind"] for each in changes} == {"account", "key", "payment", "user"}
    assert gateway.cli("db", "check")["ok"]
    shown = gateway.api("GET", f"/accounts/{account['id']}")
    assert (shown["name"], shown["status"], shown["email"]) == (account["id"], "terminated", None)
    assert shown["erased_at"]
    assert gateway.terminate() == 0
    assert not marks_in(gateway.folder, MARK)


@contextlib.contextmanager
def erasing(gateway: Gateway, name: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Ask the running gateway to erase an account. Yields the lines of its answer."""
    transport = httpx2.HTTPTransport(verify=NO_TLS, uds=f"{gateway.database}.sock")
    path, body = f"/admin/v1/accounts/{name}/terminate", {"now": True}
    with (
        httpx2.Client(
            transport=transport, base_url="http://gateway", timeout=PATIENCE_SECONDS
        ) as client,
        client.stream("POST", path, json=body) as answer,
    ):
        assert answer.status_code == 200
        yield map(json.loads, answer.iter_lines())


def test_an_erasure_that_is_killed_is_continued(make_gateway: MakeGateway) -> None:
    """Killed at any point, it goes on when it is asked for again, of a gateway that runs or not."""
    gateway = make_gateway()
    account = filled(gateway, 1200)
    gateway.start()
    stays, before = texts_of(gateway.database, STAYS), statement(gateway, account["id"])
    seed = random.randrange(1 << 32)
    chance, ended = random.Random(seed), False
    for _ in range(6):
        with contextlib.suppress(httpx2.HTTPError), erasing(gateway, account["id"]) as lines:
            for line in itertools.islice(lines, chance.randrange(1, 70)):
                ended = "step" not in line
            if not ended:
                gateway.kill()
        if ended:
            break
        gateway.start()
        shown = gateway.api("GET", f"/accounts/{account['id']}")
        assert shown["status"] == "terminated"
        if shown["erased_at"]:  # killed between the last commit and its answer
            assert not marks_in(gateway.folder, MARK), f"seed {seed}"
            ended = True
            break
    assert gateway.terminate() == 0
    if not ended:
        done = gateway.cli("account", "terminate", account["id"], "--now", "--yes")
        assert (bool(done["erased_at"]), done["missing"]) == (True, "")
    assert not marks_in(gateway.folder, MARK), f"seed {seed}"
    gateway.start()
    assert statement(gateway, account["id"]) == before
    assert texts_of(gateway.database, STAYS) == stays
    assert gateway.cli("db", "check")["ok"]
    again = gateway.cli("account", "terminate", account["id"], "--now", "--yes", check=False)
    assert again.returncode == 1
    assert "was erased at" in again.stderr


def test_copies_are_named_and_a_reader_is_waited_for(make_gateway: MakeGateway) -> None:
    """While another program can still read what was erased, nobody says that it is gone."""
    gateway = make_gateway()
    gateway.prelude = (
        OWN_MODULES + "from redbtc.store import erasure; erasure.SCRUB_SECONDS = 0.2\n"
    )
    account = filled(gateway, 10)
    gateway.start()
    backup = gateway.folder / "copy.db"
    gateway.cli("db", "backup", str(backup))
    with contextlib.closing(sqlite3.connect(gateway.database)) as reader:
        reader.execute("BEGIN")
        assert has_name(reader, account["name"])
        done = gateway.cli("account", "terminate", account["id"], "--now", "--yes", check=False)
        assert done.returncode == 1
        result = json.loads(done.stdout)
        assert (result["erased_at"], "another program" in result["missing"]) == (None, True)
        assert has_name(reader, account["name"])
        assert gateway.api("GET", f"/accounts/{account['id']}")["erased_at"] is None
    done = gateway.cli("account", "terminate", account["id"], "--now", "--yes")
    assert done["erased_at"]
    assert done["copies"] == [str(backup)]
    assert set(marks_in(gateway.folder, MARK)) == {str(backup)}


def test_looking_for_copies_leaves_the_locks_of_the_database(make_gateway: MakeGateway) -> None:
    """If they were gone, another program's reader would take itself for the last one when it ends,
    and remove the WAL file that the gateway writes to."""
    gateway = make_gateway()
    account = gateway.cli("account", "add", "leaves")
    linked = gateway.folder / "linked.db"
    linked.hardlink_to(gateway.database)
    gateway.start()
    done = gateway.cli("account", "terminate", account["id"], "--now", "--yes")
    assert done["copies"] == []
    wal = gateway.database.with_name("redbtc.db-wal")
    for _ in range(2):
        with contextlib.closing(sqlite3.connect(gateway.database)) as reader:
            assert has_name(reader, account["id"])
        assert wal.exists()
    gateway.new_key("other")
    assert gateway.get("/readyz").status_code == 200


def has_name(db: sqlite3.Connection, name: str) -> bool:
    return bool(db.execute("SELECT 1 FROM accounts WHERE name = ?", (name,)).fetchall())


def test_an_account_whose_time_has_come_is_due(tmp_path: Path) -> None:
    """`erase_due` erases it, but none that is not terminated, has more time, or was erased."""

    async def ended(_: str) -> bool:
        return True

    async def run() -> None:
        async with Store.open(tmp_path / "redbtc.db", "normal") as store:
            accounts, due = Accounts(store), store.time()
            ids = [(await accounts.add(f"{MARK} {n}", None, {}, "test")).id for n in range(3)]
            await terminate(store, ids[0], due, "test")
            await terminate(store, ids[1], due + DAY, "test")
            async with RequestLog.open(store.path, Settings()) as log:
                assert await erase_due(store, log, ended) == [ErasureEnd(ids[0], "")]
                assert await erase_due(store, log, ended) == []
            names = [(await accounts.get(each)).name for each in ids]
            assert names == [ids[0], f"{MARK} 1", f"{MARK} 2"]

    asyncio.run(run())


@pytest.mark.parametrize("is_running", [True, False])
def test_an_account_is_erased_without_being_asked_again(
    make_gateway: MakeGateway, is_running: bool
) -> None:
    """A running gateway erases the accounts whose time has come by itself, and so does db purge."""
    gateway = make_gateway()
    account = filled(gateway, 3)
    assert gateway.cli("account", "terminate", account["id"], "--yes")["erased_at"] is None
    assert gateway.cli("db", "purge")["erased"]["accounts"] == 0
    with contextlib.closing(sqlite3.connect(gateway.database, isolation_level=None)) as db:
        db.execute("INSERT INTO erasing VALUES (1, 'account', ?)", (account["id"],))
        db.execute("UPDATE accounts SET erase_at = 1 WHERE id = ?", (account["id"],))
        db.execute("DELETE FROM erasing")
    if is_running:
        gateway.prelude = f"{OWN_MODULES}from redbtc.gateway import daily_work\n"
        gateway.prelude += "daily_work.FIRST_SECONDS = 0; daily_work.TURN_SECONDS = 0.05\n"
        gateway.start()
        gateway.wait_for_log("account erased")
    else:
        assert gateway.cli("db", "purge", "--dry-run")["erased"]["accounts"] == 1
        found = gateway.cli("db", "purge")
        assert (found["erased"]["accounts"], found["still_to_do"]) == (1, [])
        assert gateway.cli("db", "purge")["erased"]["accounts"] == 0
    assert gateway.cli("account", "show", account["id"])["erased_at"]
    assert not list(marks_in(gateway.folder, MARK))


def test_each_column_is_classified(tmp_path: Path) -> None:
    """docs/privacy.md says of each column with text what becomes of it when an account is erased,
    so that nobody forgets one that is added."""
    page = (ROOT / "docs" / "privacy.md").read_text()
    listed: dict[str, tuple[set[str], set[str]]] = {}
    for line in page.partition("### An account's data")[2].partition("\n## ")[0].splitlines():
        cells = [re.findall(r"`([a-z_]+)`", cell) for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            ((table,), erased, kept) = cells
            listed[table] = set(erased), set(kept)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for _, script in sorted(migrations(schema()).items()):
            db.executescript(script)
        columns = text_columns(db)
    assert {each for table, (a, b) in listed.items() for each in ((table, c) for c in a | b)} == {
        *columns
    }
    assert not [table for table, (erased, kept) in listed.items() if erased & kept]
    gone = {f"{table}.{column}" for table, (names, _) in listed.items() for column in names}
    tested = IDENTIFYING | {each for each in gone if each.partition(".")[0] in WHOLE_ROWS}
    assert gone - tested == UNFILLED
    assert gone >= IDENTIFYING
