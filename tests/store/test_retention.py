"""What is old is erased, and nothing that money depends on changes: in steps that can end anywhere,
with another program reading, and with a clock that jumps."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.admin.set_time import MOVES, SET_TIME, TIME_IS_SET
from redbtc.billing.statements import CORRECTIONS_OF_MONTH
from redbtc.store.consistency import CHECKS
from redbtc.store.retention import ALLOW, BEGIN_USAGE, ERASE, FORBID, OLD_USAGE
from redbtc.store.schema import migrations, schema
from redbtc.times import DAY, iso_time, month_of
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.logins import new_user
from tests.helpers.request_logs import logged_ids, set_log
from tests.helpers.upstream import Upstream, json_answer, response_object

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_8]

OWN_MODULES = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
SOON = f"{OWN_MODULES}from redbtc.gateway import daily_work; daily_work.FIRST_SECONDS = 0\n"
OFTEN = f"{SOON}daily_work.TURN_SECONDS = 0.05\n"
KEPT_DAYS = 10
OLD = {"retention": {"usage_days": KEPT_DAYS, "stored_object_days": 10, "change_days": 10}}
MARK = re.compile(rb"MARK(\d{6})x")


# ── The statements ───────────────────────────────────────────────────────────────────────────────


class Settled(NamedTuple):
    """A settled request: the day of its start, how many days it took, and when it was corrected, to
    what; None: not."""

    day: int
    lasted: int
    account: str
    model: str | None
    cost: int | None
    tokens: int | None
    outcome: str
    corrected: int | None
    true_cost: int | None


AT = 1_796_000_000_000  # in 2026-11
SETTLED = st.lists(
    st.builds(
        Settled,
        day=st.integers(-70, 0),
        lasted=st.sampled_from([0, 0, 0, 1, 20]),
        account=st.sampled_from("ab"),
        model=st.sampled_from([None, "m", "n"]),
        cost=st.sampled_from([None, 0, 1, 10**9, 3 * 10**9 + 7]),
        tokens=st.none() | st.integers(0, 9),
        outcome=st.sampled_from(["completed", "interrupted", "upstream_failed", "pending"]),
        corrected=st.none() | st.integers(0, 40),
        true_cost=st.sampled_from([None, 0, 5, 2 * 10**9]),
    ),
    max_size=12,
)


@cache
def empty_ledger() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    for _, script in sorted(migrations(schema()).items()):
        database.executescript(script)
    return database


def add(database: sqlite3.Connection, number: int, each: Settled, now: int) -> None:
    """Add a request, `each.day` days from `now`, and what refers to it."""
    started, request = now + each.day * DAY, f"req_MARK{number:06}x"
    ended = started + each.lasted * DAY
    is_pending = each.outcome == "pending"
    database.execute(
        """INSERT INTO requests (request_id, account_id, key_id, endpoint, model, requested_model,
               upstream, started_at, outcome, usage_source, output_tokens, cost, month, response_id)
           VALUES (?, ?2, ?2, '/v1/responses', ?3, 'r', 'test', ?4, ?5, 'estimated', ?6, ?7, ?8,
                   ?9)""",
        (
            request,
            each.account,
            each.model,
            started,
            each.outcome,
            each.tokens,
            each.cost,
            None if is_pending else month_of(ended),
            f"resp_MARK{number:06}x",
        ),
    )
    if is_pending:
        values = (request, started, 0, 0, "")
        database.execute(
            """INSERT INTO background (request_id, admitted_at, held, input_estimate, image_model)
               VALUES (?, ?, ?, ?, ?)""",
            values,
        )
    elif each.corrected is None:
        database.execute(
            "INSERT INTO estimates VALUES (?, ?, ?, '', 0)",
            (f"resp_MARK{number:06}x", request, started),
        )
    else:
        corrected = ended + each.corrected * DAY
        database.execute(
            """INSERT INTO corrections (request_id, account_id, month, created_at, cost,
                   output_tokens) VALUES (?, ?, ?, ?, ?, 7)""",
            (request, each.account, month_of(corrected), corrected, each.true_cost),
        )


def fill(database: sqlite3.Connection, requests: Sequence[Settled], now: int) -> None:
    """Add accounts a and b, with a key each, and these requests."""
    database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (now,))
    for account in "ab":
        database.execute(
            "INSERT INTO accounts (id, name, created_at) VALUES (?1, ?1, 0)", (account,)
        )
        database.execute(
            "INSERT INTO keys (id, hash, account_id, created_at) VALUES (?1, ?2, ?1, 0)",
            (account, account.encode() * 32),
        )
    for number, each in enumerate(requests):
        add(database, number, each, now)
    database.execute("DELETE FROM acting")


def ledger_of(requests: Sequence[Settled]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    empty_ledger().backup(database)
    database.execute("PRAGMA foreign_keys = ON")
    fill(database, requests, AT)
    return database


def erase(database: sqlite3.Connection, limit: int, rows: int) -> int:
    """Erase requests as one step of retention does. Return how many."""
    ids = [each for (each,) in database.execute(OLD_USAGE, (limit, rows))]
    database.execute("BEGIN")
    database.execute(ALLOW, ("usage",))
    database.execute(BEGIN_USAGE, (limit,))
    for sql in ERASE["usage"]:
        database.execute(sql, (json.dumps(ids),))
    database.execute(FORBID)
    database.execute("COMMIT")
    return len(ids)


def shown(database: sqlite3.Connection) -> list[Any]:
    """What statements, balances and reports of whole days show."""
    tables = ("usage_by_day", "usage_by_month", "traffic_by_day")
    found: list[Any] = [database.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    months = [month for (month,) in database.execute("SELECT DISTINCT month FROM corrections")]
    for account in "ab":
        for month in sorted(months):
            values = (account, month, -1)
            found.append(database.execute(CORRECTIONS_OF_MONTH, values).fetchall())
    return found


def wrong(database: sqlite3.Connection) -> list[str]:
    """The checks that find something."""
    return [
        name
        for name, sql in CHECKS.items()
        if database.execute(sql).fetchall() not in ([], [("ok",)])
    ]


@given(requests=SETTLED, kept=st.integers(1, 60), rows=st.integers(1, 5))
def test_statements_and_sums_stay(requests: list[Settled], kept: int, rows: int) -> None:
    """After each step of an erasure, whatever was erased."""
    database = ledger_of(requests)
    before = shown(database)
    limit = (AT // DAY - kept) * DAY
    while erase(database, limit, rows):
        assert shown(database) == before
        assert wrong(database) == []
    left = {number for number, each in enumerate(requests) if each.outcome == "pending"}
    left |= {number for number, each in enumerate(requests) if each.day >= -kept}
    ids = {request_id for (request_id,) in database.execute("SELECT request_id FROM requests")}
    assert ids == {f"req_MARK{number:06}x" for number in left}
    assert database.execute("SELECT * FROM erasing").fetchall() == []


@given(requests=SETTLED, kept=st.integers(1, 60), back=st.integers(0, 80))
def test_the_time_can_be_set_after_an_erasure(
    requests: list[Settled], kept: int, back: int
) -> None:
    """The sums are those that a ledger without an erasure has then."""
    ledgers = [ledger_of(requests), ledger_of(requests)]
    while erase(ledgers[0], (AT // DAY - kept) * DAY, 3):
        pass
    at = AT - back * DAY
    for database in ledgers:
        database.execute("BEGIN")
        database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (AT,))
        database.execute(SET_TIME, (at, month_of(at), AT, AT))
        for sql in (*MOVES, TIME_IS_SET, "DELETE FROM acting"):
            database.execute(sql)
        database.execute("COMMIT")
        assert wrong(database) == []
    erased, whole = ledgers
    amounts = "SELECT account_id, month, requests, cost_units, cost_nanos FROM usage_by_month"
    assert erased.execute(amounts).fetchall() == whole.execute(amounts).fetchall()
    for values in ((account, month_of(at), -1) for account in "ab"):
        found = erased.execute(CORRECTIONS_OF_MONTH, values).fetchall()
        assert found == whole.execute(CORRECTIONS_OF_MONTH, values).fetchall()
    state = erased.execute("SELECT usage_before FROM retention").fetchone()
    assert state[0] <= (at // DAY + 1) * DAY


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DELETE FROM requests", "can't be deleted"),
        ("UPDATE corrections SET request_cost = 1", "can't be changed"),
        ("DELETE FROM corrections", "can't be deleted"),
        ("DELETE FROM changes", "only ever added to"),
    ],
)
@pytest.mark.parametrize("permit", [None, "usage", "changes"])
def test_only_what_is_permitted_is_erased(sql: str, message: str, permit: str | None) -> None:
    database = ledger_of([Settled(0, 0, "a", "m", 1, 1, "completed", 0, 2)])
    permitted = {"usage": ("UPDATE corrections",), "changes": ("DELETE FROM changes",)}
    if permit:
        database.execute("DELETE FROM estimates")
        database.execute(ALLOW, (permit,))
    if (permit and sql.startswith(permitted[permit])) or (permit == "usage" and "requests" in sql):
        database.execute(sql)
    else:
        with pytest.raises(sqlite3.IntegrityError, match=message):
            database.execute(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE rolled_up SET requests = requests + 1",
        "UPDATE rolled_up SET cost_nanos = cost_nanos + 1",
        "UPDATE usage_by_day SET cost_nanos = cost_nanos - 1",
        "DELETE FROM rolled_up",
    ],
)
def test_a_wrong_sum_is_still_found(sql: str) -> None:
    request = Settled(-20, 0, "a", "m", 10, 1, "completed", 3, 12)
    database = ledger_of([request, request._replace(corrected=None)])
    assert erase(database, AT, 9) == 2
    assert wrong(database) == []
    database.execute(sql)
    assert "usage does not equal the sum of its requests" in wrong(database)


def test_a_correction_without_its_request_is_found() -> None:
    database = ledger_of([Settled(-20, 0, "a", "m", 10, 1, "completed", 3, 12)])
    erase(database, AT, 9)
    database.execute(ALLOW, ("usage",))
    database.execute("UPDATE corrections SET request_started_at = NULL")
    assert "a correction has no request" in wrong(database)


# ── The gateway ──────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def opened(gateway: Gateway) -> Iterator[sqlite3.Connection]:
    """The database of a stopped gateway, to write to it."""
    with contextlib.closing(sqlite3.connect(gateway.database, isolation_level=None)) as database:
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("BEGIN")
        yield database
        database.execute("COMMIT")


def today() -> int:
    """The start of this day (UTC)."""
    return int(time.time() * 1000) // DAY * DAY


@pytest.fixture(autouse=True)
def not_at_midnight() -> None:
    """The tests name days relative to the present one."""
    left = DAY - int(time.time() * 1000) % DAY
    if left < 120_000:
        time.sleep(left / 1000)


def filled(gateway: Gateway, requests: Sequence[Settled]) -> Gateway:
    """Give a stopped gateway, which has no ledger yet, these requests."""
    gateway.cli("account", "list")
    with opened(gateway) as database:
        fill(database, requests, today())
    return gateway


def request_of(day: int, account: str = "a", **more: Any) -> Settled:
    usual = Settled(day, 0, account, "m", 10**9, 5, "completed", None, None)
    return usual._replace(**more)


RNG = random.Random(26)
HISTORY = [
    request_of(
        -RNG.randrange(80),
        RNG.choice("ab"),
        model=RNG.choice(["m", "n", None]),
        cost=RNG.choice([None, 1, 10**9, 7 * 10**9 + 3]),
        lasted=RNG.choice([0, 0, 1]),
        outcome=RNG.choice(["completed", "completed", "upstream_failed", "interrupted"]),
        corrected=RNG.choice([None, None, 0, 9]),
        true_cost=RNG.choice([None, 5]),
    )
    for _ in range(300)
]
# None ends, or is corrected, later than now.
HISTORY = [
    each
    if each.day + each.lasted + (each.corrected or 0) <= -1
    else each._replace(corrected=None, lasted=0)
    for each in HISTORY
]


def money_of(gateway: Gateway) -> dict[str, Any]:
    """All that a stopped gateway shows of money and sums: it must not change."""
    gateway.prelude = f"{SOON}daily_work.FIRST_SECONDS = 1e6\n"
    gateway.start()
    found: dict[str, Any] = {"accounts": gateway.api("GET", "/accounts")}
    for account in "ab":
        for back in range(4):
            month = month_of(today() - back * 28 * DAY)
            path = f"/accounts/{account}/statements/{month}"
            found[f"{account} {month}"] = gateway.api("GET", path)
        found[f"keys of {account}"] = gateway.api("GET", f"/accounts/{account}/keys")
    for names in ("day", "day,model,key,account", "account"):
        report = gateway.api("GET", "/usage", group_by=names)
        del report["erased_before"]
        found[names] = report
    found["check"] = gateway.api("POST", "/db/check")
    assert gateway.terminate() == 0
    return found


def numbers_in(folder: Path) -> set[int]:
    """The marked requests of which a byte is in a file, as far as it has their whole mark. Another
    process reads the files: closing one here would end this process's locks on it."""
    files = [str(path) for path in folder.iterdir() if path.is_file()]
    assert str(folder / "redbtc.db") in files
    found = subprocess.run(["cat", *files], stdout=subprocess.PIPE, check=False).stdout
    return {int(number) for number in MARK.findall(found)}


def kept_of(requests: Sequence[Settled], days: int = KEPT_DAYS) -> set[int]:
    return {number for number, each in enumerate(requests) if each.day >= -days}


def test_a_purge_changes_no_statement_and_leaves_no_byte(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(OLD), HISTORY)
    before = money_of(gateway)
    assert before["check"]["ok"]
    preview = gateway.cli("db", "purge", "--dry-run")
    assert (preview["done"], len(gateway.rows())) == (False, 300)
    purged = gateway.cli("db", "purge")
    kept = kept_of(HISTORY)
    assert purged == {**preview, "done": True}
    assert purged["still_to_do"] == []
    assert purged["erased"]["requests"] == len(HISTORY) - len(kept)
    assert money_of(gateway) == before
    listed = gateway.cli("usage")
    assert len(listed["requests"]) == len(kept)
    assert listed["totals"]["requests"] == len(HISTORY)
    assert listed["erased_before"] == iso_time(today() - KEPT_DAYS * DAY)
    assert gateway.cli("usage", "--since", f"{KEPT_DAYS}d")["erased_before"] is None
    corrected = {number for number, each in enumerate(HISTORY) if each.corrected is not None}
    assert numbers_in(gateway.folder) == kept | corrected, "a statement shows corrections for ever"
    again = gateway.cli("db", "purge")
    assert again["erased"]["requests"] == 0
    gateway.start()
    changes = gateway.api("GET", "/changes")["changes"]
    _, first = [each for each in changes if each["kind"] == "retention"]
    assert first["after"] == purged["erased"]
    assert first["changed_by"] not in ("", "gateway")


def test_nothing_is_erased_unless_that_is_set(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(), HISTORY[:20])
    with opened(gateway) as database:
        database.execute(
            """INSERT INTO stored_objects (id, account_id, upstream, created_at)
               VALUES ('r', 'a', 'test', 1)"""
        )
    purged = gateway.run("db", "purge")
    assert (purged.returncode, purged.stdout) == (0, "Nothing is old enough to be erased.\n")
    assert len(gateway.rows()) == 20
    with opened(gateway) as database:
        assert database.execute("SELECT count(*) FROM stored_objects").fetchone() == (1,)


def test_a_range_within_an_erased_day_counts_the_whole_day(make_gateway: MakeGateway) -> None:
    """It never counts less than there was."""
    requests = [request_of(-20), request_of(-20), request_of(-19), request_of(-1)]
    gateway = filled(make_gateway(OLD), requests).start()

    def counted(since: float, until: float, **more: Any) -> int:
        at = today() - 20 * DAY
        times = {
            "since": str(iso_time(at + round(since * DAY))),
            "until": str(iso_time(at + round(until * DAY))),
        }
        found = gateway.api("GET", "/usage", **times, **more)
        assert gateway.api("GET", "/requests", **times, **more)["totals"] == found["totals"]
        assert (found["erased_before"] is None) == (since >= 10 or (since == 0 and not erased))
        return int(found["totals"]["requests"])

    erased = False
    assert gateway.api("GET", "/usage")["erased_before"] is None
    gateway.api("POST", "/db/purge", {})
    erased = True
    for since, until, number in (
        (0, 1, 2),
        (0.5, 0.75, 2),
        (0.5, 1, 2),
        (0.5, 1.5, 3),
        (0.5, 19.5, 4),
        (-0.5, 0.5, 2),
        (-0.5, 0, 0),
        (1.5, 18.5, 1),
        (2, 19.5, 1),
        (18.5, 19.5, 1),
        (19.5, 19.75, 0),
        (0.5, 0.5, 0),
        (1, 0.5, 0),
    ):
        assert counted(since, until) == number, (since, until)
    assert counted(0.5, 19.5, failed="true") == 0


def test_what_a_leaked_key_did_says_that_rows_were_erased(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(OLD), [request_of(-20), request_of(-1)])
    gateway.cli("db", "purge")
    report = gateway.run("key", "compromised", "a", "--since", "30d").stdout
    erased_before = iso_time(today() - KEPT_DAYS * DAY)
    assert f"Requests that started before {erased_before} were erased" in report
    gateway.start()
    operator = new_user(gateway, "op@example.com")
    with contextlib.closing(operator.client):
        account = gateway.api("GET", "/accounts")["accounts"][0]["id"]
        page = operator.get(f"/dashboard/accounts/{account}/usage").text
    assert "were erased: they are only in the sums." in page
    for since, erased, requests in (("30d", erased_before, 2), ("5d", None, 1)):
        found = gateway.cli("key", "compromised", "a", "--since", since)["activity"]
        assert (found["erased_before"], found["totals"]["requests"]) == (erased, requests)
        assert found["outcomes"] == {"completed": 1}


def test_a_late_correction_of_an_erased_request_counts_nothing(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = filled(make_gateway({"retention": {"usage_days": 1}}), [request_of(-5, model=None)])
    with opened(gateway) as database:
        database.execute(
            """INSERT INTO stored_objects (id, account_id, upstream, created_at)
               VALUES ('resp_MARK000000x', 'a', 'test', ?)""",
            (today(),),
        )
    gateway.start()
    key = gateway.new_key("a")
    before = gateway.api("GET", "/accounts/a")
    assert gateway.api("POST", "/db/purge", {})["erased"]["requests"] == 1
    upstream.script = json_answer(response_object(id="resp_MARK000000x"))
    with gateway.client(key) as client:
        assert client.get("/responses/resp_MARK000000x").status_code == 200
    after = gateway.api("GET", "/accounts/a")
    assert after["balance"] == before["balance"] == "-1"
    assert gateway.api("POST", "/db/check")["ok"]


def test_old_objects_and_changes_are_erased(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(OLD), [])
    ages = [RNG.randrange(20) for _ in range(3000)]
    with opened(gateway) as database:
        for number, age in enumerate(ages):
            database.execute(
                """INSERT INTO stored_objects (id, account_id, upstream, created_at)
                   VALUES (?, 'a', 'test', ?)""",
                (f"resp_{RNG.random()}_{number}", today() - age * DAY),
            )
        for age in (30, 11, 10, 9):
            database.execute(
                """INSERT INTO changes (changed_at, changed_by, kind, object_id)
                   VALUES (?, 'test', 'key', ?)""",
                (today() - age * DAY, f"before {age}"),
            )
    gateway.start()
    key = gateway.new_key("a")
    purged = gateway.api("POST", "/db/purge", {})
    old = sum(age > 10 for age in ages)
    assert purged["erased"]["stored_objects"] == old > 1000
    assert purged["erased"]["changes"] == 2
    objects = [each["object_id"] for each in gateway.api("GET", "/changes")["changes"]]
    assert [each for each in objects if each.startswith("before")] == ["before 9", "before 10"]
    with gateway.client(key) as client:
        assert client.post("/responses", json={"model": "m", "input": "Hi"}).status_code == 200
    gateway.terminate()
    with opened(gateway) as database:
        left = database.execute("SELECT id FROM stored_objects WHERE id LIKE 'resp_0.%'").fetchall()
    assert {int(each.rpartition("_")[2]) for (each,) in left} == {
        number for number, age in enumerate(ages) if age <= 10
    }


# ── The daily work ───────────────────────────────────────────────────────────────────────────────


def test_the_gateway_erases_by_itself(make_gateway: MakeGateway) -> None:
    """Soon after the start, and at once when the settings have changed; it says so once."""
    gateway = filled(make_gateway(), HISTORY)
    gateway.prelude = SOON
    gateway.start()
    with gateway.client(gateway.new_key("a")) as client:
        assert client.post("/responses", json={"model": "m", "input": "Hi"}).status_code == 200
    assert "old data erased" not in gateway.flushed_log()
    gateway.configure(OLD)
    gateway.signal(1)
    gateway.wait_for_log("old data erased")
    assert len(gateway.rows(limit=1000)) == len(kept_of(HISTORY)) + 1
    change = gateway.api("GET", "/changes")["changes"][0]
    assert (change["kind"], change["changed_by"]) == ("retention", "gateway")
    assert change["after"]["requests"] == len(HISTORY) - len(kept_of(HISTORY))
    looked = "SELECT clock_seen_at FROM retention"
    before = read(gateway, looked)
    gateway.restart()
    wait_until(lambda: read(gateway, looked) > before)
    assert gateway.terminate() == 0
    assert gateway.log().count("old data erased") == 1
    assert gateway.cli("db", "check")["ok"]


def read(gateway: Gateway, sql: str) -> Any:
    """The value of a query. No lock of the running gateway's is taken."""
    path = f"{gateway.database.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as database:
        return database.execute(sql).fetchone()[0]


@contextlib.contextmanager
def reader(gateway: Gateway) -> Iterator[None]:
    """Another program's snapshot of the ledger."""
    path = f"{gateway.database.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as database:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM requests").fetchall()
        yield


@pytest.mark.parametrize("end", ["restart", "kill", "go on"])
def test_what_another_program_keeps_is_gone_as_soon_as_it_ends(
    make_gateway: MakeGateway, end: str
) -> None:
    requests = [request_of(day) for day in [-20] * 40 + [-1] * 5]
    gateway = filled(make_gateway(OLD), requests)
    gateway.prelude = (
        f"{OFTEN}from redbtc.admin import api_retention\napi_retention.PURGE_SCRUB_SECONDS = 0.1\n"
    )
    gateway.configure()
    gateway.start()
    gateway.configure(OLD)
    with reader(gateway):
        gateway.signal(1)
        gateway.wait_for_log("erased data not scrubbed")
        purged = gateway.cli("db", "purge", check=False)
        assert purged.returncode == 1
        (line,) = json.loads(purged.stdout)["still_to_do"]
        assert "Another program reads the database" in line
        assert numbers_in(gateway.folder) == set(range(45))
        if end == "kill":
            gateway.kill()
        elif end == "restart":
            gateway.terminate()
        if end != "go on":
            gateway.start()
            gateway.wait_for_log("erased data not scrubbed", 2)
    wait_until(lambda: numbers_in(gateway.folder) == set(range(40, 45)))
    assert gateway.cli("db", "purge")["still_to_do"] == []
    assert gateway.log().count("erased data not scrubbed") == (1 if end == "go on" else 2)


SLOW = f"""{SOON}
import asyncio
from redbtc.store import retention
retention.MAX_STEP_ROWS = 8
rest = retention.Pace.rest
async def slow(pace, began):
    await rest(pace, began)
    await asyncio.sleep(0.005)
retention.Pace.rest = slow
"""


def test_an_erasure_that_is_killed_ends_complete(make_gateway: MakeGateway) -> None:
    requests = [
        request_of(-11 - number % 40, corrected=number % 3 or None) for number in range(400)
    ]
    gateway = filled(make_gateway(OLD), requests)
    before = money_of(gateway)
    gateway.prelude = SLOW
    count = "SELECT count(*) FROM requests"
    left = 400
    for _ in range(4):
        gateway.start(wait=False)
        goal = max(0, left - RNG.randrange(1, 130))
        wait_until(lambda goal=goal: read(gateway, count) <= goal)  # type: ignore[misc]
        gateway.kill()
        assert "damaged" not in gateway.log()
        left = read(gateway, count)
    gateway.prelude = ""
    assert gateway.cli("db", "purge")["still_to_do"] == []
    assert read(gateway, count) == 0
    assert money_of(gateway) == before
    corrected = {number for number, each in enumerate(requests) if each.corrected is not None}
    assert numbers_in(gateway.folder) == corrected


def test_a_clock_that_went_ahead_erases_nothing_for_a_day(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(OLD), HISTORY)
    with opened(gateway) as database:
        database.execute("UPDATE retention SET clock_seen_at = ?", (today() - 3 * DAY,))
    gateway.prelude = OFTEN
    gateway.start()
    gateway.wait_for_log("daily work waits")
    refused = gateway.cli("db", "purge", check=False)
    assert refused.returncode == 1
    assert "the clock is right, use --accept-clock" in refused.stdout.replace("\n", " ")
    gateway.restart()
    gateway.wait_for_log("daily work waits", 2)
    assert len(gateway.rows(limit=1000)) == len(HISTORY)
    assert gateway.terminate() == 0
    with opened(gateway) as database:
        database.execute("UPDATE retention SET leapt_at = leapt_at - ?", (DAY,))
    gateway.start()
    gateway.wait_for_log("old data erased")


def test_an_operator_can_accept_the_clock(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(OLD), HISTORY[:30])
    with opened(gateway) as database:
        database.execute("UPDATE retention SET clock_seen_at = ?", (today() - 3 * DAY,))
    assert gateway.cli("db", "purge", "--accept-clock")["erased"]["requests"] > 0


def test_a_ledger_that_fails_is_left_alone(make_gateway: MakeGateway) -> None:
    """The work goes on when the ledger can commit again, and ends nothing meanwhile."""
    gateway = filled(make_gateway(OLD), [request_of(-20)] * 3)
    gateway.prelude = OFTEN
    gateway.configure()
    gateway.start()
    with contextlib.closing(sqlite3.connect(gateway.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        gateway.configure(OLD)
        gateway.signal(1)
        gateway.wait_for_log("daily work failed")
        other.execute("ROLLBACK")
    gateway.wait_for_log("old data erased")
    assert gateway.log().count("daily work failed") == 1


def test_expired_bodies_do_not_wait_for_old_rows(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = filled(make_gateway(), [request_of(-20)] * 2000)
    gateway.prelude = SLOW
    gateway.start()
    upstream.script = json_answer(response_object())
    with gateway.client(gateway.new_key("a")) as client:
        set_log(gateway, "a", 1)
        assert client.post("/responses", json={"model": "m", "input": "Hi"}).status_code == 200
    assert len(logged_ids(gateway)) == 1
    gateway.configure(OLD)
    gateway.signal(1)
    wait_until(lambda: read(gateway, "SELECT count(*) FROM requests") < 2000)  # it has begun
    gateway.configure({"retention": {"usage_days": KEPT_DAYS, "request_log_days_max": 0}})
    gateway.signal(1)
    path = f"{(gateway.folder / 'request_log.db').as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as bodies:
        logged = "SELECT count(*) FROM logged"
        wait_until(lambda: bodies.execute(logged).fetchone()[0] == 0)
    assert "old data erased" not in gateway.flushed_log()
    gateway.wait_for_log("old data erased")


def test_old_rows_do_not_wait_for_a_damaged_request_log(make_gateway: MakeGateway) -> None:
    gateway = filled(make_gateway(), [request_of(-20)] * 3)
    (gateway.folder / "request_log.db").write_bytes(b"not a database" * 1000)
    gateway.configure(OLD)
    purged = gateway.cli("db", "purge", check=False)
    assert purged.returncode == 1
    (line,) = json.loads(purged.stdout)["still_to_do"]
    assert "Expired bodies of requests were not erased: the request log is unavailable" in line
    assert json.loads(purged.stdout)["erased"]["requests"] == 3
    gateway.prelude = OFTEN
    gateway.start()
    gateway.wait_for_log("expired bodies not erased")
    assert "daily work failed" not in gateway.flushed_log()
