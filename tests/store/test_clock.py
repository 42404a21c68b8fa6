"""The ledger's time when the machine's clock is wrong, and the repair of what a wrong one did."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redbtc.admin.set_time import LATER, MOVES, SET_TIME, TIME_IS_SET
from redbtc.errors import UserError
from redbtc.store.clock import BELIEVED_AFTER, MS, LedgerClock
from redbtc.store.schema import migrations, schema
from redbtc.times import DAY, month_of
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.response_store import ResponseStore, create
from tests.helpers.upstream import Upstream, json_answer, response_object

pytestmark = pytest.mark.promise_9

HOUR = 3_600_000
REQUEST = {"model": "m", "input": "Hi"}


# ── The clock ────────────────────────────────────────────────────────────────────────────────────


class Clocks:
    """The machine's clocks in milliseconds, in place of the module `time`."""

    def __init__(self) -> None:
        self.wall, self.elapsed = 1_800_000_000_000, 5_000

    def time_ns(self) -> int:
        return self.wall * MS

    def clock_gettime_ns(self, _: int) -> int:
        return self.elapsed * MS

    def run(self, milliseconds: int) -> None:
        self.wall += milliseconds
        self.elapsed += milliseconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr("redbtc.store.clock.time", clocks)
    return clocks


STEPS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 700_000), st.sampled_from([0, 1, 599_999, 600_000, 3 * HOUR])),
        st.one_of(
            st.integers(-2 * HOUR, 2 * HOUR),
            st.sampled_from([0, HOUR, HOUR + 1, -HOUR, -HOUR - 1, 400 * DAY, -400 * DAY]),
        ),
    ),
    max_size=20,
)


@given(steps=STEPS)
def test_time_never_goes_back_and_believes_only_what_lasts(steps: list[tuple[int, int]]) -> None:
    """At each instant the time is no further than an hour from what some offset gives that the wall
    clock has kept, within an hour, for ten minutes; or the time stands still."""
    with pytest.MonkeyPatch.context() as patch:
        clocks = Clocks()
        patch.setattr("redbtc.store.clock.time", clocks)
        clock = LedgerClock()
        kept, seen = (
            [clocks.wall - clocks.elapsed],
            [(clocks.elapsed, clocks.wall - clocks.elapsed)],
        )
        before = clock.now()
        for passed, jump in steps:
            clocks.run(passed)
            clocks.wall += jump
            now, offset = clock.now(), clocks.wall - clocks.elapsed
            seen.append((clocks.elapsed, offset))
            for number, (since, first) in enumerate(seen):
                lasted = clocks.elapsed - since >= BELIEVED_AFTER // MS
                if lasted and all(abs(each - first) <= HOUR for _, each in seen[number:]):
                    kept.append(first)
            assert now >= before
            near = any(abs(now - clocks.elapsed - each) <= HOUR for each in kept)
            assert near or now == before
            before = now
        for _ in range(3):
            clocks.run(BELIEVED_AFTER // MS)
            clock.now()
        assert clock.now() == max(before, clocks.wall), "in the end any clock is believed"


@given(steps=st.lists(st.tuples(st.integers(0, 60_000), st.integers(-HOUR, HOUR)), max_size=9))
def test_many_small_jumps_are_a_large_one(steps: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clocks = Clocks()
        patch.setattr("redbtc.store.clock.time", clocks)
        clock = LedgerClock()
        true = clocks.wall
        for passed, jump in steps:
            clocks.run(passed)
            clocks.wall += jump
            true += passed
            assert clock.now() - true <= HOUR


def test_a_jump_is_believed_after_ten_minutes(clocks: Clocks) -> None:
    clock = LedgerClock()
    start = clock.now()
    clocks.wall += 400 * DAY
    assert clock.now() == start
    assert clock.jump == clock.offset == 400 * DAY
    clocks.run(599_999)
    assert clock.now() == start + 599_999
    clocks.wall += 2 * HOUR  # another jump starts anew
    clocks.run(599_999)
    assert clock.now() == start + 2 * 599_999
    clocks.run(600_000)
    assert clock.now() == clocks.wall
    assert clock.jump == clock.offset == 0


def test_a_clock_that_is_set_right_is_followed_at_once(clocks: Clocks) -> None:
    clock = LedgerClock()
    for jump in (400 * DAY, -400 * DAY):
        clocks.wall += jump
        clocks.run(1000)
        assert clock.now() == clocks.wall - jump
        clocks.wall -= jump
        assert clock.now() == clocks.wall
        assert clock.jump == 0


def test_an_accepted_clock_is_followed_wherever_it_jumps(clocks: Clocks) -> None:
    clock = LedgerClock()
    clocks.wall += 400 * DAY
    clock.now()
    clock.start(accept=True)
    assert clock.now() == clocks.wall
    clocks.wall += DAY
    assert clock.now() == clocks.wall
    clocks.wall -= 2 * DAY
    assert clock.now() == clocks.wall + 2 * DAY, "time stands still"


def test_setting_the_time_back_believes_a_clock_that_is_behind(clocks: Clocks) -> None:
    clock = LedgerClock()
    clock.go_on_from(clocks.wall + 400 * DAY)
    with pytest.raises(UserError, match="more than a day later"):
        clock.start(accept=False)
    clock.set_back(clocks.wall)
    clock.start(accept=False)
    clocks.run(10)
    assert clock.now() == clocks.wall
    clocks.wall -= 400 * DAY
    clock.now()
    clock.set_back(clocks.wall)
    clocks.run(10)
    assert clock.now() == clocks.wall


def test_setting_the_time_back_does_not_believe_a_clock_that_is_ahead(clocks: Clocks) -> None:
    clock = LedgerClock()
    start = clock.now()
    clocks.wall += 400 * DAY
    clocks.run(1000)
    clock.now()
    clock.set_back(start + 500)
    assert clock.now() == start + 1000


# ── The process ──────────────────────────────────────────────────────────────────────────────────

# The machine's clock is as many seconds ahead as the file says.
JUMPING = """
import sys, time
true_ns = time.time_ns
def time_ns():
    with open({path!r}) as file:
        return true_ns() + int(file.read()) * 10**9
time.time_ns = time_ns
sys.path.insert(0, {root!r})
from redbtc.store import clock
clock.BELIEVED_AFTER = int({seconds!r} * 10**9)
"""


def jump(gateway: Gateway, days: float) -> None:
    """Put the machine's clock so many days ahead of the true time."""
    path = gateway.folder / "ahead"
    path.with_suffix(".new").write_text(str(round(days * 86_400)))
    os.replace(path.with_suffix(".new"), path)


def jumping(gateway: Gateway, believed_after: float = 600, days: float = 0) -> Gateway:
    path = str(gateway.folder / "ahead")
    gateway.prelude = JUMPING.format(path=path, root=str(ROOT), seconds=believed_after)
    jump(gateway, days)
    return gateway


def ask(gateway: Gateway, key: str) -> int:
    with gateway.client(key) as client:
        return client.post("/responses", json=REQUEST).status_code


def milliseconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp() * 1000


def true_month() -> str:
    return month_of(int(time.time() * 1000))


def month_ahead(days: int) -> str:
    return month_of(int(time.time() * 1000) + days * DAY)


@pytest.fixture
def paid(make_gateway: MakeGateway, upstream: Upstream) -> Gateway:
    """A gateway whose requests cost 10 each."""
    usage = {"input_tokens": 1_000_000, "output_tokens": 0}
    upstream.script = json_answer(response_object(usage=usage, model="m"))
    return make_gateway('[billing]\nunpriced_models = "refuse"\n')


def test_what_is_written_while_the_clock_is_ahead_is_dated_right(paid: Gateway) -> None:
    gateway = jumping(paid).start()
    gateway.api("POST", "/accounts", {"name": "a", "monthly_budget": "1000"})
    key = gateway.api("POST", "/accounts/a/keys", {"expires": "30d"})["key"]
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    jump(gateway, 400)
    assert ask(gateway, key) == 200, "the key has not expired"
    wait_until(lambda: '"the clock has jumped"' in gateway.log())
    assert ask(gateway, key) == 200
    gateway.api("POST", "/accounts/a/payments", {"amount": "5"})
    new = gateway.api("POST", "/accounts/a/keys", {"expires": "1h"})
    notice = gateway.api("POST", "/notices", {"kind": "incident", "text": "slow"})
    assert gateway.get("/readyz").status_code == 200
    assert gateway.metrics()["redbtc_clock_offset_seconds"] == pytest.approx(400 * 86_400, abs=600)
    latest = time.time() * 1000 + 1000
    assert milliseconds(new["created_at"]) <= latest
    assert milliseconds(new["expires_at"]) <= latest + HOUR
    assert milliseconds(notice["effective_at"]) <= latest
    account = gateway.api("GET", "/accounts/a")
    assert (account["month"], account["spent_this_month"]) == (true_month(), "20")
    assert len(gateway.rows(since="1h")) == 2
    jump(gateway, 0)
    wait_until(lambda: '"the clock is trusted again"' in gateway.log())
    assert ask(gateway, key) == 200
    assert abs(gateway.metrics()["redbtc_clock_offset_seconds"]) < 60
    assert gateway.log().count("the clock has jumped") == 1
    assert gateway.terminate() == 0
    assert later_than(gateway, latest) == []
    assert {row["month"] for row in gateway.rows()} == {true_month()}


def test_a_clock_that_stays_ahead_is_believed_after_a_while(paid: Gateway) -> None:
    gateway = jumping(paid, believed_after=1).start()
    key = gateway.new_key("a")
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    jump(gateway, 400)
    wait_until(lambda: '"the clock has jumped"' in gateway.log())
    wait_until(lambda: '"the clock is trusted again"' in gateway.log())
    assert ask(gateway, key) == 200
    assert gateway.row()["month"] == month_ahead(400)


def test_an_accepted_clock_is_believed_at_once(paid: Gateway) -> None:
    gateway = jumping(paid).start("--accept-clock")
    key = gateway.new_key("a")
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    jump(gateway, 400)
    assert ask(gateway, key) == 200
    assert gateway.row()["month"] == month_ahead(400)
    assert "the clock has jumped" not in gateway.flushed_log()


def test_a_duration_is_never_negative(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Also that of a background response while the clock goes back."""
    upstream.script = ResponseStore(turns=1)
    gateway = jumping(make_gateway()).start()
    key = gateway.new_key()
    create(gateway, key, background=True)
    jump(gateway, -0.01)
    wait_until(lambda: [row["outcome"] for row in gateway.rows()] == ["completed"])
    assert 0 <= gateway.row()["duration_ms"] < 600_000


# ── Repair ───────────────────────────────────────────────────────────────────────────────────────

# Dates that are rightly in the future.
ANNOUNCED = {
    ("documents", "effective_at"),
    ("keys", "expires_at"),
    ("notices", "effective_at"),
    ("prices", "effective_at"),
    ("users", "link_expires_at"),
}


def dates(database: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield tables and columns with dates."""
    tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    for (table,) in tables:
        for _, column, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
            if column.endswith("_at") or column in ("at", "day", "month"):
                yield table, column


def later_than(gateway: Gateway, at: float) -> list[tuple[str, str]]:
    """Return tables and columns of the ledger with dates that are later."""
    limits = {"day": int(at) // DAY, "month": month_of(int(at))}
    with sqlite3.connect(f"{gateway.database.as_uri()}?mode=ro", uri=True) as database:
        return [
            (table, column)
            for table, column in dates(database)
            if (table, column) not in ANNOUNCED
            and database.execute(
                f"SELECT 1 FROM {table} WHERE {column} > ?", (limits.get(column, at),)
            ).fetchall()
        ]


def test_every_date_of_the_ledger_is_moved() -> None:
    """A table that gets a date has to be added to those that `db set-time` moves."""
    database = empty_ledger()
    derived = {"usage_by_day", "usage_by_month", "traffic_by_day", "rolled_up", "retention"}
    moved = {*LATER, *derived, "heartbeat", "acting", "setting_time"}
    assert {table for table, _ in dates(database)} == moved
    for table in LATER:
        text = " ".join(sql for sql in MOVES if f"UPDATE {table} " in sql)
        of_table = {column for name, column in dates(database) if name == table}
        stays = {column for name, column in ANNOUNCED if name == table} | {"expires_at"}
        assert {column for column in of_table if column not in text} <= stays, table


def is_believed(gateway: Gateway, jumps: int) -> bool:
    return gateway.log().count('"the clock is trusted again"') == jumps


def in_the_future(gateway: Gateway) -> str:
    """Use a gateway whose clock is 400 days ahead, then 435, in all the ways that leave a date; its
    key."""
    gateway.start()
    gateway.api("POST", "/accounts", {"name": "a", "monthly_budget": "100"})
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    key: str = gateway.api("POST", "/accounts/a/keys", {"monthly_budget": "100"})["key"]
    assert ask(gateway, key) == 200
    for number, days in enumerate((400, 435), 1):
        jump(gateway, days)
        wait_until(partial(is_believed, gateway, number))
        assert ask(gateway, key) == 200
        gateway.api("POST", "/accounts/a/payments", {"amount": "5"})
    for name in ("n", "o"):
        gateway.api("POST", "/prices", {"prices": [{"model": name, "input": "10"}]})
    coming = {"model": "p", "input": "10", "effective": "90d"}
    gateway.api("POST", "/prices", {"prices": [coming]})
    added = gateway.api("POST", "/accounts/a/keys")
    gateway.api("POST", f"/keys/{added['id']}/revoke")
    notice = gateway.api("POST", "/notices", {"kind": "incident", "text": "slow"})
    gateway.api("POST", f"/notices/{notice['id']}/withdraw")
    gateway.api("POST", "/notices", {"kind": "incident", "text": "slower"})
    gateway.api("POST", "/users", {"email": "op@example.com", "role": "operator"})
    assert gateway.api("GET", "/accounts/a")["spent_this_month"] == "10"
    return key


def assert_repaired(gateway: Gateway, key: str) -> None:
    """Nothing is dated in the future, and the true month has it all."""
    account = gateway.cli("account", "show", "a")
    assert (account["month"], account["spent_this_month"]) == (true_month(), "30")
    assert account["balance"] == "-20"
    statement = gateway.cli("statement", "a", true_month())
    assert statement["totals"]["requests"] == 3
    assert (statement["totals"]["cost"], statement["totals"]["paid"]) == ("30", "10")
    for days in (400, 435):
        later = gateway.run("statement", "a", month_ahead(days))
        assert "has not begun" in later.stderr
    assert gateway.cli("usage", "--since", "1d")["totals"]["requests"] == 3
    prices = {price["model"]: price["status"] for price in gateway.cli("price", "list")["prices"]}
    assert prices == {"m": "current", "n": "current", "o": "current", "p": "coming"}
    assert gateway.cli("db", "check")["ok"]
    assert later_than(gateway, time.time() * 1000 + 1000) == []


def test_set_time_repairs_a_running_gateway(paid: Gateway) -> None:
    gateway = jumping(paid, believed_after=0.2)
    key = in_the_future(gateway)
    jump(gateway, 0)
    before = gateway.api("GET", "/changes")["changes"]
    asked = gateway.run("db", "set-time")
    assert asked.returncode == 1
    assert "requests: 2" in asked.stderr, "it says what, and asks"
    assert gateway.api("GET", "/accounts/a")["spent_this_month"] == "10"
    done = gateway.cli("db", "set-time", "--yes")
    assert done["done"]
    assert milliseconds(done["before"]) > time.time() * 1000 + 430 * DAY
    moved = {"requests": 2, "payments": 2, "prices": 3, "notices": 2, "keys": 1, "users": 1}
    assert moved.items() <= done["moved"].items()
    assert_repaired(gateway, key)
    changes = gateway.api("GET", "/changes")["changes"]
    assert {each["id"] for each in before} < {each["id"] for each in changes}, "none is lost"
    recorded = [each for each in changes if each["kind"] == "time"]
    assert [each["before"] for each in recorded] == [{"ledger_at": done["before"]}]
    assert recorded[0]["after"].items() >= {"ledger_at": done["time"], **moved}.items()
    with gateway.client(key) as client:
        me = client.get(f"{gateway.url}/admin/v1/me/limits").json()
    assert [me[whose]["monthly_budget"]["spent"] for whose in ("key", "account")] == ["30", "30"]
    assert ask(gateway, key) == 200
    assert gateway.api("GET", "/accounts/a")["spent_this_month"] == "40"
    gateway.restart()
    assert gateway.api("GET", "/accounts/a")["spent_this_month"] == "40"
    assert ask(gateway, key) == 200
    again = gateway.run("db", "set-time")
    assert again.returncode == 0
    assert "Nothing in the ledger is dated after" in again.stdout


def test_set_time_loses_nothing_of_requests_that_are_served_meanwhile(paid: Gateway) -> None:
    """Some have begun in the future and end after the time is set, or wait for a place, or for
    their commit."""
    gateway = jumping(paid, believed_after=0.2, days=435).start()
    gateway.api("POST", "/accounts", {"name": "a", "concurrency": 2, "monthly_budget": "100000"})
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    key = gateway.api("POST", "/accounts/a/keys")["key"]
    served: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            served.append(ask(gateway, key))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(served) > 20)
        jump(gateway, 0)
        assert gateway.api("POST", "/db/set-time", {})["done"]
        latest, enough = time.time() * 1000 + 1000, len(served) + 20
        wait_until(lambda: len(served) > enough)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(served) == {200}
    account = gateway.api("GET", "/accounts/a")
    assert account["spent_this_month"] == str(10 * len(served))
    assert account["month"] == true_month()
    assert gateway.terminate() == 0
    assert gateway.cli("db", "check")["ok"]
    assert gateway.cli("account", "show", "a")["spent_this_month"] == str(10 * len(served))
    assert later_than(gateway, max(latest, time.time() * 1000)) == []


def test_set_time_repairs_a_stopped_gateway_which_does_not_start_before(paid: Gateway) -> None:
    gateway = jumping(paid, believed_after=0.2)
    key = in_the_future(gateway)
    assert gateway.terminate() == 0
    jump(gateway, 0)
    refused = gateway.run("serve")
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("Error")]
    assert "more than a day later" in line
    assert "db set-time" in line
    assert gateway.cli("db", "set-time", "--yes")["moved"]["requests"] == 2
    assert_repaired(gateway, key)
    gateway.start()
    assert ask(gateway, key) == 200
    assert gateway.api("GET", "/accounts/a")["spent_this_month"] == "40"


def test_a_ledger_that_is_ahead_is_served_if_the_clock_is_accepted(paid: Gateway) -> None:
    gateway = jumping(paid, believed_after=0.2)
    key = in_the_future(gateway)
    assert gateway.terminate() == 0
    jump(gateway, 0)
    gateway.start("--accept-clock")
    wait_until(lambda: "the clock is behind the ledger" in gateway.log())
    assert ask(gateway, key) == 200
    assert gateway.rows()[-1]["month"] == month_ahead(435), "time stands still"


def test_the_time_is_not_set_to_the_future(gateway: Gateway) -> None:
    refused = gateway.cli("db", "set-time", "2999-01-01", check=False)
    assert refused.returncode == 1
    assert "more than a day from now" in refused.stderr


def test_a_clock_that_is_not_believed_sets_nothing(paid: Gateway) -> None:
    gateway = jumping(paid).start()
    jump(gateway, 400)
    assert gateway.api("POST", "/db/set-time", {})["moved"] == {}
    key = gateway.new_key("a")
    gateway.api("POST", "/prices", {"prices": [{"model": "m", "input": "10"}]})
    assert ask(gateway, key) == 200
    assert gateway.row()["month"] == true_month()


# ── The sums ─────────────────────────────────────────────────────────────────────────────────────


class Past(NamedTuple):
    """A settled request: when it started and ended, what it cost, and when and to what that was
    corrected."""

    started: int
    ended: int
    account: str
    model: str
    cost: int
    tokens: int | None
    corrected: int | None


AT = 1_796_000_000_000  # in 2026-11
PASTS = st.lists(
    st.builds(
        Past,
        started=st.integers(-40, 70),
        ended=st.integers(0, 40),
        account=st.sampled_from("ab"),
        model=st.sampled_from("mn"),
        cost=st.sampled_from([0, 1, 10**9, 3 * 10**9 + 7]),
        tokens=st.none() | st.integers(0, 9),
        corrected=st.none() | st.integers(0, 40),
    ),
    max_size=12,
)


@cache
def empty_ledger() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    for _, script in sorted(migrations(schema()).items()):
        database.executescript(script)
    return database


def ledger_of(pasts: list[Past]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    empty_ledger().backup(database)
    database.execute("INSERT INTO acting VALUES (1, 'test', 0)")
    for account in "ab":
        database.execute(
            "INSERT INTO accounts (id, name, created_at) VALUES (?1, ?1, ?2)", (account, AT)
        )
        database.execute(
            "INSERT INTO keys (id, hash, account_id, created_at) VALUES (?1, ?2, ?1, ?3)",
            (account, account.encode() * 32, AT + DAY),
        )
    for number, past in enumerate(pasts):
        started = AT + past.started * DAY
        ended = started + past.ended * DAY
        source = "upstream" if past.corrected is None else "estimated"
        database.execute(
            """INSERT INTO requests (request_id, account_id, key_id, endpoint, requested_model,
                   upstream, started_at, outcome, usage_source, output_tokens, cost, month)
               VALUES (?1, ?2, ?2, '/', ?3, 'u', ?4, 'completed', ?5, ?6, ?7, ?8)""",
            (
                str(number),
                past.account,
                past.model,
                started,
                source,
                past.tokens,
                past.cost,
                month_of(ended),
            ),
        )
        if past.corrected is not None:
            corrected = ended + past.corrected * DAY
            database.execute(
                """INSERT INTO corrections (request_id, account_id, month, created_at, cost,
                       output_tokens) VALUES (?, ?, ?, ?, ?, ?)""",
                (str(number), past.account, month_of(corrected), corrected, past.cost + 5, 7),
            )
    database.execute("DELETE FROM acting")
    return database


SUMS = {
    "usage_by_day": "account_id, month, day, model, requested_model, key_id",
    "usage_by_month": "account_id, month",
    "traffic_by_day": "day, upstream, outcome",
}


def sums(database: sqlite3.Connection) -> dict[str, list[Any]]:
    """All sums: amounts in one number, and without rows that count nothing."""
    found = {}
    for table, key in SUMS.items():
        tokens = "" if table == "traffic_by_day" else ", ifnull(output_tokens, 0)"
        estimated = ", estimated" if table == "usage_by_day" else ""
        rows = database.execute(
            f"""SELECT {key}, requests, cost_units * 1000000000 + cost_nanos {tokens} {estimated}
                  FROM {table} ORDER BY {key}"""
        ).fetchall()
        found[table] = [row for row in rows if any(row[len(key.split(",")) :])]
    return found


@given(pasts=PASTS)
def test_sums_are_those_of_requests_that_were_dated_right_at_once(pasts: list[Past]) -> None:
    database = ledger_of(pasts)
    month = month_of(AT)
    database.execute("BEGIN")
    database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (AT,))
    database.execute(SET_TIME, (AT, month, AT, AT + 99 * DAY))
    for sql in (*MOVES, TIME_IS_SET):
        database.execute(sql)
    database.execute("DELETE FROM acting")
    database.execute("COMMIT")

    def right(past: Past) -> Past:
        """The same request, had the time stood still at AT."""
        started = min(past.started, 0)
        ended = min(past.started + past.ended, 0) - started
        if past.corrected is None:
            return past._replace(started=started, ended=ended)
        corrected = min(past.started + past.ended + past.corrected, 0) - started - ended
        return past._replace(started=started, ended=ended, corrected=corrected)

    expected = ledger_of([right(past) for past in pasts])
    assert sums(database) == sums(expected)
    for table in ("requests", "corrections"):
        sql = f"SELECT * FROM {table} ORDER BY request_id"
        assert database.execute(sql).fetchall() == expected.execute(sql).fetchall()
    assert database.execute("SELECT max(created_at) FROM keys").fetchone() == (AT,)


def test_rests_and_changes_stay_as_long_and_messages_of_a_later_budget_are_dropped() -> None:
    database = ledger_of([])
    later, minute = AT + 40 * DAY, 60_000
    for name, began in (("a", AT - 1), ("b", later)):
        rest = (name, "", began, began + minute, "busy")
        database.execute("INSERT INTO upstream_rests VALUES (?, ?, ?, ?, ?)", rest)
        database.execute(
            """INSERT INTO upstream_changes (id, changed_at, upstream, was, state, reason, until)
               VALUES (?1, ?2, ?1, 'up', 'resting', 'busy', ?3)""",
            (name, began, began + minute),
        )
        database.execute(
            """INSERT INTO notices (id, kind, account_id, month, percent, text, effective_at,
                   created_at) VALUES (?1, 'budget', 'a', ?2, 50, 'half', ?3, ?3)""",
            (name, month_of(began), began),
        )
    database.execute(
        """INSERT INTO webhook_messages (id, type, data, created_at, tried_at, delivered_at)
           VALUES ('c', 'upstream.out', '{}', ?1, ?1, ?1)""",
        (later,),
    )
    database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (AT,))
    database.execute(SET_TIME, (AT, month_of(AT), AT, AT + 99 * DAY))
    for sql in MOVES:
        database.execute(sql)
    moved = [("a", AT - 1, AT - 1 + minute), ("b", AT, AT + minute)]
    for sql in (
        "SELECT upstream, began_at, until FROM upstream_rests ORDER BY 1",
        "SELECT upstream, changed_at, until FROM upstream_changes ORDER BY 1",
    ):
        assert database.execute(sql).fetchall() == moved
    messages = database.execute(
        "SELECT id, created_at, tried_at, delivered_at FROM webhook_messages ORDER BY 1"
    )
    assert messages.fetchall() == [("a", AT - 1, None, None), ("c", AT, AT, AT)]


def test_documents_keep_the_dates_that_are_written_in_them() -> None:
    database = ledger_of([])
    later = AT + 40 * DAY
    document = ("terms", "1", later + DAY, "Be kind.", later)
    database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (AT,))
    database.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, NULL)", document)
    database.execute("INSERT INTO acceptances VALUES ('terms', '1', 'u', 'a', ?)", (later,))
    for table, column in (("documents", "published_at"), ("acceptances", "accepted_at")):
        for change in (f"UPDATE {table} SET {column} = {AT}", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match="can't be"):
                database.execute(change)
    database.execute(SET_TIME, (AT, month_of(AT), AT, AT + 99 * DAY))
    with pytest.raises(sqlite3.IntegrityError, match="can't be changed"):
        database.execute("UPDATE documents SET published_at = ?, text = 'x'", (AT,))
    for sql in MOVES:
        database.execute(sql)
    dates_of = "SELECT effective_at, published_at FROM documents"
    assert database.execute(dates_of).fetchall() == [(later + DAY, AT)]
    assert database.execute("SELECT accepted_at FROM acceptances").fetchall() == [(AT,)]


@pytest.mark.parametrize("setting", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE requests SET started_at = started_at - 1",
        "UPDATE requests SET month = '2026-01'",
        "UPDATE requests SET month = NULL",
        "UPDATE requests SET cost = 0",
        f"UPDATE corrections SET created_at = {AT - 1}",
        f"UPDATE corrections SET created_at = {AT}, cost = 0",
        "UPDATE corrections SET month = '2027-12'",
        f"UPDATE changes SET changed_at = {AT}, changed_by = 'nobody'",
        "UPDATE changes SET before = '{}'",
    ],
)
def test_no_date_that_money_depends_on_changes_otherwise(change: str, setting: bool) -> None:
    """Neither without the table's row, nor to another time."""
    database = ledger_of([Past(1, 0, "a", "m", 10, 1, 0)])
    if setting:
        database.execute("INSERT INTO acting VALUES (1, 'test', ?)", (AT,))
        database.execute(SET_TIME, (AT, month_of(AT), AT, AT + 99 * DAY))
    with pytest.raises(sqlite3.IntegrityError, match=r"can't be changed|only ever added to"):
        database.execute(change)


def test_the_time_is_not_set_without_a_record() -> None:
    database = ledger_of([])
    with pytest.raises(sqlite3.IntegrityError, match="NOT NULL"):
        database.execute(SET_TIME, (AT, month_of(AT), AT, AT + 99 * DAY))
