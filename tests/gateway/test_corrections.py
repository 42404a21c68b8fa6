"""An estimated request is corrected, once, when its response shows what was used."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from redbtc.store.schema import migrations, schema
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Received,
    Reply,
    Upstream,
    event,
    json_answer,
    response_object,
)

pytestmark = pytest.mark.promise_2

MONEY = '[metering]\non_disconnect = "cancel"\n[billing]\nprice_notice_days = 0\n'
BODY = {"model": "gpt-up", "input": "Hi"}
TRUE_COST = Decimal("0.039")  # of RESPONSE_USAGE at 1000 a million


class Stored:
    """An upstream whose streams stop in the middle; their responses can be fetched later."""

    def __init__(self) -> None:
        self.usage: Any = RESPONSE_USAGE
        self.status = "completed"
        self.output: list[Any] = []
        self.made = 0

    async def __call__(self, request: Received, reply: Reply) -> None:
        path, _, query = request.path.partition("?")
        if request.method == "POST":
            self.made += 1
            made = response_object(None, id=f"resp_{self.made}", status="in_progress", usage=None)
            await reply.head(200, [("content-type", "text/event-stream")])
            await reply.send(event({"type": "response.created", "response": made}, "x"))
            delta = {"type": "response.output_text.delta", "delta": "x" * 400}
            await reply.send(event(delta, "x"))
            reply.tear()
        response_id = path.rpartition("/")[2]
        response = response_object(id=response_id, status=self.status, usage=self.usage)
        response["output"] = self.output or response["output"]
        if "stream=true" in query:
            await reply.head(200, [("content-type", "text/event-stream")])
            kind = f"response.{self.status}"
            await reply.send(event({"type": kind, "response": response}, kind))
            await reply.end()
        else:
            await json_answer(response)(request, reply)


@pytest.fixture
def stored(upstream: Upstream) -> Stored:
    stored = Stored()
    upstream.script = stored
    return stored


@pytest.fixture
def gateway(make_gateway: MakeGateway) -> Gateway:
    gateway = make_gateway(MONEY).start()
    gateway.api("POST", "/prices", {"prices": [price("1000")]})
    return gateway


def price(amount: str) -> dict[str, Any]:
    return {"model": "gpt-up", "input": amount, "output": amount}


USED = {"input_tokens": 0, "output_tokens": 30_000, "total_tokens": 30_000}  # 0.90


def prepaid(make_gateway: MakeGateway, *config: str) -> Gateway:
    """Start a gateway whose account `test` has a balance of 1.00, with prices of 5 and 30."""
    gateway = make_gateway(MONEY, *config).start()
    gateway.api("POST", "/prices", {"prices": [{"model": "gpt-up", "input": "5", "output": "30"}]})
    gateway.api("POST", "/accounts", {"name": "test", "credit_limit": "0"})
    gateway.api("POST", "/accounts/test/payments", {"amount": "1"})
    return gateway


def tear(gateway: Gateway, key: str) -> dict[str, Any]:
    """The row of a stream that was torn."""
    with gateway.client(key) as client, contextlib.suppress(httpx2.RemoteProtocolError):
        client.post("/responses", json={**BODY, "stream": True})
    row = gateway.rows()[-1]
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert (row["estimated_cost"], row["corrected_at"]) == (None, None)
    assert Decimal(row["cost"]) >= Decimal("0.1")
    return row


@pytest.mark.parametrize("query", ["", "?stream=true"])
def test_the_first_look_corrects(gateway: Gateway, stored: Stored, query: str) -> None:
    key = gateway.new_key()
    row = tear(gateway, key)
    gateway.api("POST", "/prices", {"prices": [price("1")]})
    with gateway.client(key) as client:
        for stored.status, stored.usage in (("in_progress", None), ("completed", None)):
            assert client.get(f"/responses/resp_1{query}").status_code == 200
            assert gateway.row() == row, "nothing is known yet"
        stored.usage = RESPONSE_USAGE
        for _ in range(3):
            assert client.get(f"/responses/resp_1{query}").status_code == 200
            corrected = gateway.row()
            assert corrected["usage_source"] == "upstream"
            assert corrected["cost"] == str(TRUE_COST), "at the price of its admission"
            assert corrected["estimated_cost"] == row["cost"]
            assert corrected["output_tokens"] == RESPONSE_USAGE["output_tokens"]
            names = [*corrected]
            assert names[names.index("estimated_cost") :][:2] == ["estimated_cost", "corrected_at"]
            assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)
    gateway.restart()
    assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)
    assert gateway.cli("db", "check")["ok"]


def test_a_container_that_only_the_stored_response_shows_is_billed_once(
    gateway: Gateway, stored: Stored
) -> None:
    gateway.api("POST", "/prices", {"prices": [{**price("1000"), "container": "0.03"}]})
    key = gateway.new_key()
    call = {"id": "ci_1", "type": "code_interpreter_call", "container_id": "cntr_1"}
    stored.output = [call, {**call, "id": "ci_2"}]
    for _ in range(2):
        tear(gateway, key)
    with gateway.client(key) as client:
        for response_id in ("resp_1", "resp_1", "resp_2"):
            assert client.get(f"/responses/{response_id}").status_code == 200
    assert [row["containers"] for row in gateway.rows()] == [1, None]
    costs = [Decimal(row["cost"]) for row in gateway.rows()]
    assert costs == [TRUE_COST + Decimal("0.03"), TRUE_COST]


def test_all_figures_show_it(gateway: Gateway, stored: Stored) -> None:
    key = gateway.new_key()
    before = tear(gateway, key)
    other = tear(gateway, key)
    with gateway.client(key) as client:
        client.get("/responses/resp_1")
    total = TRUE_COST + Decimal(other["cost"])
    month, day = before["month"], before["started_at"][:10]
    now = before["started_at"]
    for values in ({}, {"since": now}, {"since": now, "until": "2100-01-01T00:00:00Z"}):
        found = gateway.api("GET", "/requests", **values)["totals"]
        assert Decimal(found["cost"]) == total, values
        assert (found["requests"], found["estimated"]) == (2, 1)
        assert found["output_tokens"] == RESPONSE_USAGE["output_tokens"] + other["output_tokens"]
    found = gateway.cli("statement", "test", month)
    assert found["corrections"] == [
        {
            "request_id": before["request_id"],
            "day": day,
            "before": before["cost"],
            "after": str(TRUE_COST),
            "difference": str(TRUE_COST - Decimal(before["cost"])),
        }
    ]
    assert Decimal(found["totals"]["cost"]) == total
    assert Decimal(found["closing_balance"]) == -total
    lines = list(
        csv.DictReader(io.StringIO(gateway.run("statement", "test", month, "--csv").stdout))
    )
    assert sum(Decimal(line["cost"] or 0) for line in lines) == total
    (line,) = [line for line in lines if line["line"] == "correction"]
    assert line["description"] == before["request_id"]
    assert Decimal(line["difference"]) == TRUE_COST - Decimal(before["cost"])
    assert before["request_id"] in gateway.run("statement", "test", month).stdout


def test_a_closed_month_never_changes(gateway: Gateway, stored: Stored) -> None:
    key = gateway.new_key()
    before = tear(gateway, key)
    gateway.kill()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.executescript(
            """DROP TRIGGER settled_is_settled;
            UPDATE requests SET month = '2026-01'; UPDATE usage_by_day SET month = '2026-01';
            UPDATE usage_by_month SET month = '2026-01';"""
        )
    gateway.start()
    closed = gateway.cli("statement", "test", "2026-01")
    with gateway.client(key) as client:
        client.get("/responses/resp_1")
    assert gateway.cli("statement", "test", "2026-01") == closed
    now = before["month"]
    found = gateway.cli("statement", "test", now)
    assert found["opening_balance"] == f"-{before['cost']}"
    assert Decimal(found["totals"]["cost"]) == TRUE_COST - Decimal(before["cost"]) < 0
    assert found["closing_balance"] == str(-TRUE_COST)
    assert [each["request_id"] for each in found["corrections"]] == [before["request_id"]]
    balance = gateway.api("GET", "/accounts/test")
    assert (balance["balance"], balance["spent_this_month"]) == (
        str(-TRUE_COST),
        found["totals"]["cost"],
    )
    assert gateway.cli("db", "check")["ok"]
    gateway.restart()
    assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)


def test_many_looks_at_once_correct_once(gateway: Gateway, stored: Stored) -> None:
    """And none of them is told of the end before the correction is on disk."""
    key = gateway.new_key()
    tear(gateway, key)
    shown: list[int] = []

    def fetch() -> None:
        with gateway.client(key) as client, contextlib.suppress(httpx2.HTTPError):
            shown.append(client.get("/responses/resp_1").status_code)

    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(fetch)
            time.sleep(0.5)
            assert not shown
            database.rollback()
    assert shown == [200] * 4
    assert gateway.row()["cost"] == str(TRUE_COST)
    assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)


def test_kill_before_the_correction_loses_nothing(gateway: Gateway, stored: Stored) -> None:
    key = gateway.new_key()
    row = tear(gateway, key)
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool, gateway.client(key) as client:
            looking = pool.submit(client.get, "/responses/resp_1")
            time.sleep(0.3)
            gateway.kill()
            assert isinstance(looking.exception(), httpx2.HTTPError)
        database.rollback()
    gateway.start()
    assert gateway.row() == row
    with gateway.client(key) as client:
        client.get("/responses/resp_1")
    assert gateway.row()["cost"] == str(TRUE_COST)


NAMES = "SELECT name FROM sqlite_schema WHERE type = ? AND name NOT LIKE 'sqlite_%'"
TRIGGER_TEXTS = "SELECT sql FROM sqlite_schema WHERE type = 'trigger'"


def columns_of(database: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in database.execute(f"PRAGMA table_info({table})")]


def rewind(database: sqlite3.Connection, version: int) -> None:
    """Take from a database what later versions than this one have added, and give it the triggers
    of this version."""
    with contextlib.closing(sqlite3.connect(":memory:")) as earlier:
        for number in range(1, version + 1):
            earlier.executescript(migrations(schema())[number])
        kinds = ("index", "table")
        had = {kind: {name for (name,) in earlier.execute(NAMES, (kind,))} for kind in kinds}
        columns = {name: columns_of(earlier, name) for name in had["table"]}
        triggers = [sql for (sql,) in earlier.execute(TRIGGER_TEXTS)]
    added = {
        kind: [name for (name,) in database.execute(NAMES, (kind,)) if name not in had[kind]]
        for kind in kinds
    }
    for (name,) in database.execute(NAMES, ("trigger",)).fetchall():
        database.execute(f"DROP TRIGGER {name}")
    for name in added["index"]:
        database.execute(f"DROP INDEX {name}")
    for table, known in columns.items():
        for column in columns_of(database, table):
            if column not in known:
                database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    for name in added["table"]:
        database.execute(f"DROP TABLE {name}")
    for sql in triggers:
        database.execute(sql)
    database.execute(f"PRAGMA user_version = {version}")


def test_an_estimate_of_schema_version_9_is_corrected(gateway: Gateway, stored: Stored) -> None:
    """Such a ledger does not say what was held for the request."""
    key = gateway.new_key()
    tear(gateway, key)
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        rewind(database, 9)
        assert database.execute("SELECT count(*) FROM estimates").fetchone() == (1,)
    gateway.start()
    with gateway.client(key) as client:
        assert client.get("/responses/resp_1").status_code == 200
    assert gateway.row()["cost"] == str(TRUE_COST)
    assert gateway.cli("db", "check")["ok"]


def test_an_answer_without_an_id_corrects_nothing(
    gateway: Gateway, stored: Stored, upstream: Upstream
) -> None:
    key = gateway.new_key()
    row = tear(gateway, key)
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    upstream.script = json_answer({"status": "completed", "usage": usage})
    with gateway.client(key) as client:
        client.get("/responses/resp_1")
    assert gateway.row() == row


def test_a_cancelled_background_response_is_corrected(
    gateway: Gateway, stored: Stored, upstream: Upstream
) -> None:
    key = gateway.new_key()
    status = "queued"

    async def script(request: Received, reply: Reply) -> None:
        usage = RESPONSE_USAGE if status == "cancelled late" else None
        content = response_object(id="resp_9", status=status.partition(" ")[0], usage=usage)
        await json_answer(content)(request, reply)

    upstream.script = script
    with gateway.client(key) as client:
        client.post("/responses", json={**BODY, "background": True})
        status = "cancelled"
        client.post("/responses/resp_9/cancel")
        row = gateway.row()
        assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "estimated")
        status = "cancelled late"
        client.get("/responses/resp_9")
    assert gateway.row()["cost"] == str(TRUE_COST)
    assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)


@pytest.mark.parametrize("killed", [False, True])
def test_a_response_is_not_shown_to_who_could_not_pay_for_it(
    make_gateway: MakeGateway, upstream: Upstream, killed: bool
) -> None:
    """Four streams are left at once, but the upstream finishes and stores what they ask for."""
    gateway = prepaid(make_gateway)
    key, made = gateway.new_key(), 0

    async def script(request: Received, reply: Reply) -> None:
        nonlocal made
        if request.method == "GET":
            named = request.path.rpartition("/")[2]
            await json_answer(response_object(id=named, usage=USED))(request, reply)
            return
        made += 1
        begun = response_object(None, id=f"resp_{made}", status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        await reply.wait(request.closed)

    def balance() -> Decimal:
        return Decimal(gateway.api("GET", "/accounts/test")["balance"])

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    with gateway.client(key) as client:
        for number in range(1, 5):
            with client.stream("POST", "/responses", json=body) as answer:
                next(answer.iter_raw())
            gateway.wait_for_rows(number)
            wait_until(lambda: gateway.rows()[-1]["outcome"] == "client_disconnected")
    assert balance() > Decimal("0.9")
    if killed:
        gateway.kill()
        gateway.start()
    with gateway.client(key) as client:
        answers = [client.get(f"/responses/resp_{number}") for number in range(1, 5)]
    assert [answer.status_code for answer in answers] == [200, 429, 429, 429]
    error = answers[1].json()["error"]
    assert error["code"] == "insufficient_quota"
    assert "charged to the key that created the response" in error["message"], (
        "which may be another one"
    )
    assert 0 <= balance() < Decimal("0.11")
    gateway.api("POST", "/accounts/test/payments", {"amount": "10"})
    with gateway.client(key) as client:
        for number in range(2, 5):
            assert client.get(f"/responses/resp_{number}").status_code == 200
            assert client.get(f"/responses/resp_{number}").status_code == 200
    assert balance() == 11 - 4 * Decimal("0.9")
    assert gateway.api("GET", "/accounts/test")["held"] == "0"


@pytest.mark.parametrize("leaves", [False, True])
def test_two_who_read_a_response_need_its_hold_once(
    make_gateway: MakeGateway, upstream: Upstream, leaves: bool
) -> None:
    """A client whose connection was lost reads on, while the gateway still reads for the first."""
    gateway = prepaid(make_gateway)
    key, ending = gateway.new_key(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        begun = response_object(None, status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        await reply.wait(ending if request.method == "GET" else request.closed)
        await reply.send(event({"type": "response.completed", "response": response_object()}, "x"))
        await reply.end()

    def held() -> Decimal:
        return Decimal(gateway.api("GET", "/accounts/test")["held"])

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    path = "/responses/resp_1?stream=true"
    with gateway.client(key) as client, gateway.client(key) as other:
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
        wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")
        with client.stream("GET", path) as first:
            next(first.iter_raw())
            once = held()
            assert once > Decimal("0.5")
            if leaves:
                first.close()
                wait_until(lambda: gateway.connections() == 0)
            with other.stream("GET", f"{path}&starting_after=0") as second:
                assert second.status_code == 200, second.read()
                assert held() == once
                ending.set()
                assert b"response.completed" in second.read()
    wait_until(lambda: gateway.row()["usage_source"] == "upstream")
    wait_until(lambda: held() == 0)
    assert gateway.cli("db", "check")["ok"]


@pytest.mark.parametrize("reads_all", [False, True])
def test_a_response_is_held_for_who_began_to_read_it_before_it_was_estimated(
    make_gateway: MakeGateway, upstream: Upstream, reads_all: bool
) -> None:
    """A client reads its response with a second request, and leaves the first one at once."""
    gateway = prepaid(make_gateway)
    key, going_on, ending = gateway.new_key(), threading.Event(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        begun = response_object(None, status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        await reply.wait(going_on if request.method == "GET" else request.closed)
        delta = {"type": "response.output_text.delta", "delta": "x" * 50_000}
        await reply.send(event(delta, "x"))
        await reply.wait(ending)
        ended = response_object(usage=USED)
        await reply.send(event({"type": "response.completed", "response": ended}, "x"))
        await reply.end()

    def held() -> Decimal:
        return Decimal(gateway.api("GET", "/accounts/test")["held"])

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    with gateway.client(key) as client, gateway.client(key) as other:
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
            shown = other.stream("GET", "/responses/resp_1?stream=true")
            reading = shown.__enter__()
            parts = reading.iter_raw()
            next(parts)
        wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")
        assert held() > Decimal("0.8"), "it can still turn out to have cost so much"
        assert client.post("/responses", json=body).status_code == 429
        going_on.set()
        while b"xxx" not in next(parts):
            pass
        if reads_all:
            ending.set()
            assert b"response.completed" in b"".join(parts)
        shown.__exit__(None, None, None)
        ending.set()
    wait_until(lambda: gateway.row()["usage_source"] == "upstream")
    assert gateway.row()["cost"] == "0.9"
    wait_until(lambda: held() == 0)
    assert gateway.api("GET", "/accounts/test")["balance"] == "0.1"


def test_a_background_response_is_held_for_who_began_to_read_it_before_it_was_estimated(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """It is cancelled meanwhile, and the upstream reports no usage of that."""
    gateway = prepaid(make_gateway)
    key, ending = gateway.new_key(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if "stream=true" in request.path:
            begun = response_object(None, status="in_progress", usage=None)
            await reply.head(200, [("content-type", "text/event-stream")])
            await reply.send(event({"type": "response.created", "response": begun}, "x"))
            await reply.wait(ending)
            ended = response_object(status="incomplete", usage=USED)
            await reply.send(event({"type": "response.incomplete", "response": ended}, "x"))
            await reply.end()
        else:
            status = "cancelled" if "cancel" in request.path else "queued"
            await json_answer(response_object(None, status=status, usage=None))(request, reply)

    upstream.script = script
    body = {**BODY, "background": True, "max_output_tokens": 30_000}
    with gateway.client(key) as client, gateway.client(key) as other:
        assert client.post("/responses", json=body).status_code == 200
        with other.stream("GET", "/responses/resp_1?stream=true") as shown:
            parts = shown.iter_raw()
            next(parts)
            assert client.post("/responses/resp_1/cancel").status_code == 200
            assert gateway.row()["usage_source"] == "estimated"
            assert client.post("/responses", json=body).status_code == 429
            ending.set()
            assert b"response.incomplete" in b"".join(parts)
    wait_until(lambda: gateway.row()["usage_source"] == "upstream")
    account = gateway.api("GET", "/accounts/test")
    assert (account["balance"], account["held"]) == ("0.1", "0")


@pytest.mark.parametrize("reads_all", [False, True])
def test_a_response_that_was_read_before_it_was_estimated_is_corrected(
    make_gateway: MakeGateway, upstream: Upstream, reads_all: bool
) -> None:
    """Its reader stops before the usage, or reads that too, and leaves the first request then."""
    gateway = prepaid(make_gateway)
    key = gateway.new_key()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET" and "stream" not in request.path:
            await json_answer(response_object(usage=USED))(request, reply)
            return
        begun = response_object(None, status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        if request.method == "GET":
            reply.tear()
        await reply.wait(request.closed)

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    query = "" if reads_all else "?stream=true"
    with gateway.client(key) as client, gateway.client(key) as other:
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
            with contextlib.suppress(httpx2.RemoteProtocolError):
                assert other.get(f"/responses/resp_1{query}").status_code == 200
        wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.row()["usage_source"] == "upstream"
    account = gateway.api("GET", "/accounts/test")
    assert (account["balance"], account["held"]) == ("0.1", "0")


@pytest.mark.parametrize("first", [None, {"input_tokens": 20, "output_tokens": 0}])
def test_who_stops_reading_before_the_usage_pays_for_the_response(
    make_gateway: MakeGateway, upstream: Upstream, first: dict[str, int] | None
) -> None:
    """`first`: the usage in the first event, before the model has written anything."""
    gateway = prepaid(make_gateway, "idle_timeout_seconds = 1")
    key = gateway.new_key()

    async def script(request: Received, reply: Reply) -> None:
        if request.path.endswith("/resp_1"):
            await json_answer(response_object(usage=USED))(request, reply)
            return
        begun = response_object(None, status="in_progress", usage=first)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        if request.method == "GET":
            delta = event({"type": "response.output_text.delta", "delta": "x" * 5000}, "x")
            for _ in range(4000):  # more than all buffers take
                await reply.send(delta)
        await reply.wait(request.closed)

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    with gateway.client(key) as client:
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
        wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")
        with client.stream("GET", "/responses/resp_1?stream=true") as shown:
            next(shown.iter_raw())
            wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.row()["usage_source"] == "upstream"
    account = gateway.api("GET", "/accounts/test")
    assert (account["balance"], account["held"]) == ("0.1", "0")


def test_what_has_turned_out_is_no_longer_held_for_others_who_read_it(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = prepaid(make_gateway)
    key = gateway.new_key()
    used = {"input_tokens": 0, "output_tokens": 20_000, "total_tokens": 20_000}

    async def script(request: Received, reply: Reply) -> None:
        if request.path.endswith("/resp_1"):
            await json_answer(response_object(usage=used))(request, reply)
            return
        begun = response_object(None, status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": begun}, "x"))
        await reply.wait(request.closed)

    upstream.script = script
    body = {**BODY, "stream": True, "max_output_tokens": 30_000}
    with gateway.client(key) as client, gateway.client(key) as other:
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
        wait_until(lambda: gateway.row()["outcome"] == "client_disconnected")
        with other.stream("GET", "/responses/resp_1?stream=true") as slow:
            next(slow.iter_raw())
            assert client.get("/responses/resp_1").status_code == 200
            account = gateway.api("GET", "/accounts/test")
            assert (account["balance"], account["held"]) == ("0.4", "0")
            assert client.get("/responses/resp_1").status_code == 200
    assert gateway.row()["cost"] == "0.6"
    gateway.api("POST", "/accounts/test/payments", {"amount": "1"})
    assert gateway.api("GET", "/accounts/test")["held"] == "0"


def test_what_a_kill_interrupted_is_corrected(gateway: Gateway, upstream: Upstream) -> None:
    """If its response is stored at the upstream, where it can have gone on."""

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(response_object(id="resp_9"))(request, reply)
            return
        made = response_object(None, id="resp_9", status="in_progress", usage=None)
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": made}, "x"))
        await reply.wait(request.closed)

    def preserved() -> bool:
        with contextlib.closing(sqlite3.connect(gateway.database)) as database:
            return bool(database.execute("SELECT 1 FROM unsettled").fetchall())

    upstream.script = script
    key = gateway.new_key()
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**BODY, "stream": True}),
    ):
        wait_until(preserved)
        gateway.kill()
    gateway.start()
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("interrupted", "estimated")
    assert row["response_id"] == "resp_9"
    with gateway.client(key) as client:
        client.get("/responses/resp_9")
    corrected = gateway.row()
    assert (corrected["outcome"], corrected["usage_source"]) == ("interrupted", "upstream")
    assert (corrected["cost"], corrected["estimated_cost"]) == (str(TRUE_COST), row["cost"])
    assert gateway.api("GET", "/accounts/test")["balance"] == str(-TRUE_COST)


def test_a_cancelled_response_without_output_corrects_nothing_that_was_seen(
    gateway: Gateway, stored: Stored
) -> None:
    key = gateway.new_key()
    row = tear(gateway, key)
    stored.status = "cancelled"
    stored.usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    with gateway.client(key) as client:
        client.get("/responses/resp_1")
        assert gateway.row() == row
        stored.usage = RESPONSE_USAGE
        client.get("/responses/resp_1")
    assert gateway.row()["cost"] == str(TRUE_COST)


def test_who_leaves_before_the_usage_is_shown_is_corrected(
    gateway: Gateway, stored: Stored, upstream: Upstream
) -> None:
    """The gateway closes an answer whose client has left, but for this one."""
    key = gateway.new_key()
    tear(gateway, key)
    left = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        shown = json.dumps(response_object(id="resp_1", usage=RESPONSE_USAGE)).encode()
        at = shown.index(b'"usage"')
        await reply.head(200, [("content-type", "application/json")], f"length:{len(shown)}")
        await reply.send(shown[:at])
        assert await reply.wait(left), "the beginning passes at once"
        await reply.send(shown[at:])

    upstream.script = script
    with gateway.client(key) as client, client.stream("GET", "/responses/resp_1") as answer:
        assert b"output" in next(answer.iter_raw())
    wait_until(lambda: gateway.connections() == 0)
    left.set()
    wait_until(lambda: gateway.row()["cost"] == str(TRUE_COST))
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)


def test_a_correction_reads_no_other_estimates(gateway: Gateway) -> None:
    """There can be a million of them."""
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        plan = "EXPLAIN QUERY PLAN DELETE FROM estimates WHERE request_id = 'req_1'"
        ((*_, how),) = database.execute(plan)
    assert how.startswith("SEARCH"), how


def test_budgets_follow(gateway: Gateway, stored: Stored) -> None:
    gateway.api("POST", "/accounts", {"name": "test", "monthly_budget": "200"})
    key = gateway.new_key()
    tear(gateway, key)
    used = {**RESPONSE_USAGE, "output_tokens": 180_000, "total_tokens": 180_030}
    stored.usage = used
    with gateway.client(key) as client:
        client.get("/responses/resp_1")

    def percents() -> list[int]:
        found = gateway.api("GET", "/accounts/test/notices")["notices"]
        return sorted(each["percent"] for each in found)

    wait_until(lambda: percents() == [50, 80], why=lambda: json.dumps(percents()))
