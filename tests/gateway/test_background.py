"""Background responses go on after their requests, and are billed once, however they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.gateway.errors import error
from tests.helpers.gateway import PATIENCE_SECONDS, ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.response_store import BODY, ResponseStore, create
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Received,
    Reply,
    Script,
    Upstream,
    event,
    json_answer,
    response_object,
    stream,
)

pytestmark = pytest.mark.promise_7


def pending(gateway: Gateway) -> list[dict[str, Any]]:
    return [row for row in gateway.rows() if row["outcome"] == "pending"]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_gateway_asks_until_a_background_response_is_done(
    gateway: Gateway, stored: ResponseStore, key: str, streamed: bool
) -> None:
    with gateway.client(key) as client:
        body = {**BODY, "background": True, "stream": streamed}
        assert client.post("/responses", json=body).status_code == 200
    (row,) = pending(gateway)
    assert (row["usage_source"], row["response_id"]) == ("none", "resp_00000001")
    wait_until(lambda: not pending(gateway))
    (row,) = gateway.rows()
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")
    assert row["input_tokens"] == RESPONSE_USAGE["input_tokens"]
    assert gateway.metrics()["redbtc_in_flight"] == 0


def test_a_client_that_fetches_it_is_first(
    make_gateway: MakeGateway, stored: ResponseStore
) -> None:
    """What it sees complete is in the ledger, once, however often it looks."""
    gateway = make_gateway('[billing]\ndefault_credit_limit = "0"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    gateway.cli("payment", "add", "test", "200")
    made = create(gateway, key, background=True, max_output_tokens=50)["id"]
    money = gateway.api("GET", "/accounts/test")
    assert float(money["held"]) > 0.05, "held until it is done"
    with gateway.client(key) as client:
        answer = client.delete(f"/responses/{made}")
        assert error(answer)[:2] == (400, "invalid_request"), "it would take its usage along"
        while client.get(f"/responses/{made}").json()["status"] != "completed":
            pass
        assert [row["outcome"] for row in gateway.rows()] == ["completed"]
        for _ in range(5):
            client.get(f"/responses/{made}")
            replayed = client.get(f"/responses/{made}?stream=true&starting_after=0")
            assert "response.completed" in replayed.text
    (row,) = gateway.rows()
    assert row["cost"] == "0.039"
    money = gateway.api("GET", "/accounts/test")
    assert (money["balance"], money["held"]) == ("199.961", "0")
    time.sleep(2)
    assert gateway.api("GET", "/accounts/test")["balance"] == "199.961"
    assert gateway.cli("db", "check")["ok"]


def test_a_background_response_outlives_the_gateway(
    make_gateway: MakeGateway, stored: ResponseStore
) -> None:
    gateway = make_gateway('[billing]\ndefault_credit_limit = "5"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    stored.turns = 1_000_000
    made = create(gateway, key, background=True, max_output_tokens=50)["id"]
    gateway.cli("price", "add", "gpt-up", "--input", "1", "--output", "1")
    held = gateway.api("GET", "/accounts/test")["held"]
    assert float(held) > 0
    for _ in range(2):
        gateway.kill()
        gateway.start()
        (row,) = pending(gateway)
        assert gateway.api("GET", "/accounts/test")["held"] == held, "held again"
    stored.turns = 1
    wait_until(lambda: not pending(gateway))
    (row,) = gateway.rows()
    assert (row["outcome"], row["response_id"]) == ("completed", made)
    assert row["cost"] == "0.039", "at the price of its admission"
    assert gateway.cli("db", "check")["ok"]


def test_a_cancelled_one_and_one_that_is_gone(
    gateway: Gateway, stored: ResponseStore, key: str
) -> None:
    stored.turns = 1_000_000
    cancelled = create(gateway, key, background=True)["id"]
    lost = create(gateway, key, background=True)["id"]
    with gateway.client(key) as client:
        client.post(f"/responses/{cancelled}/cancel")
        row = next(row for row in gateway.rows() if row["response_id"] == cancelled)
        assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "estimated")
    del stored.responses[lost]
    wait_until(lambda: not pending(gateway))
    row = next(row for row in gateway.rows() if row["response_id"] == lost)
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")


def test_those_of_a_compromised_key_are_cancelled(
    gateway: Gateway, stored: ResponseStore, upstream: Upstream, key: str
) -> None:
    stored.turns = 1_000_000
    refused: set[str] = set()

    async def script(request: Received, reply: Reply) -> None:
        if request.path.endswith("/cancel") and request.path not in refused:
            refused.add(request.path)  # at first it is too busy
            await json_answer({"error": {"message": "x"}}, 429)(request, reply)
            return
        await stored(request, reply)

    upstream.script = script
    taken = [create(gateway, key, background=True)["id"] for _ in range(2)]
    kept = create(gateway, gateway.new_key(), background=True)["id"]
    ended = create(gateway, key)["id"]
    key_id = gateway.rows(limit=1)[0]["key_id"]
    assert gateway.cli("key", "revoke", "--compromised", key_id)["cut"] == 2
    wait_until(lambda: len(pending(gateway)) == 1)
    states = [stored.responses[each]["status"] for each in (*taken, kept, ended)]
    assert states == ["cancelled", "cancelled", "queued", "completed"]
    outcomes = {row["response_id"]: row["outcome"] for row in gateway.rows()}
    assert [outcomes[each] for each in (*taken, kept, ended)] == [
        "client_disconnected",
        "client_disconnected",
        "pending",
        "completed",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_was_asked_for_when_its_key_was_revoked_is_cancelled(
    gateway: Gateway, stored: ResponseStore, upstream: Upstream, key: str, stream: bool
) -> None:
    """It has no id yet, by which it could be cancelled."""
    stored.turns = 1_000_000
    answers = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.path == "/v1/responses":
            await reply.wait(answers)
        await stored(request, reply)

    upstream.script = script
    body = {**BODY, "background": True, "stream": stream}
    with gateway.begin(key, body) as sock:
        wait_until(lambda: upstream.requests)
        key_id = gateway.api("GET", "/accounts/test/keys")["keys"][0]["id"]
        gateway.api("POST", f"/keys/{key_id}/compromised")
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""  # the client is cut at once
        answers.set()
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        wait_until(lambda: not pending(gateway))
    (response,) = stored.responses.values()
    assert response["status"] == "cancelled"


def test_those_of_a_key_that_was_revoked_on_a_stopped_gateway_are_cancelled(
    gateway: Gateway, stored: ResponseStore, key: str
) -> None:
    stored.turns = 1_000_000
    taken = create(gateway, key, background=True)["id"]
    key_id = gateway.rows()[0]["key_id"]
    gateway.terminate()
    gateway.cli("key", "revoke", "--compromised", key_id)
    gateway.start()
    wait_until(lambda: not pending(gateway))
    assert stored.responses[taken]["status"] == "cancelled"


def test_a_client_that_leaves_a_background_stream_leaves_it_running(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    stored = ResponseStore(turns=1)
    begun = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await stored(request, reply)
            return
        stored.responses["resp_9"] = response_object(usage=None, status="queued", id="resp_9")
        created = {"type": "response.created", "response": stored.responses["resp_9"]}
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event(created, "response.created"))
        await reply.wait(begun)
        reply.tear()

    upstream.script = script
    with gateway.client(key) as client:
        body = {**BODY, "background": True, "stream": True}
        with client.stream("POST", "/responses", json=body) as answer:
            parts = answer.iter_raw()
            assert b"resp_9" in next(parts)
    begun.set()
    wait_until(lambda: [row["outcome"] for row in gateway.rows()] == ["completed"])


def begun(stored: ResponseStore, response_id: str, status: str = "queued") -> bytes:
    """The first event of a background response's stream."""
    stored.responses[response_id] = response_object(usage=None, status=status, id=response_id)
    created = {"type": "response.created", "response": dict(stored.responses[response_id])}
    return event(created, "response.created")


def test_an_error_in_its_stream_does_not_end_it(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    stored = ResponseStore(turns=1)
    error = event({"type": "error", "code": "server_error", "message": "lost"}, "error")

    async def script(request: Received, reply: Reply) -> None:
        answer = stream([begun(stored, "resp_9"), error])
        await (stored if request.method == "GET" else answer)(request, reply)

    upstream.script = script
    create_text(gateway, key, background=True, stream=True)
    wait_until(lambda: not pending(gateway))
    row = gateway.row()
    assert (row["outcome"], row["output_tokens"]) == ("completed", 9)


def create_text(gateway: Gateway, key: str, **more: Any) -> str:
    with gateway.client(key) as client:
        return client.post("/responses", json={**BODY, **more}).text


def test_while_its_stream_is_open_it_can_be_fetched_and_deleted(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Whoever sees its end first settles it; then, and not before, it may be deleted."""
    stored, seen = ResponseStore(turns=2), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "POST":
            await reply.head(200, [("content-type", "text/event-stream")])
            await reply.send(begun(stored, "resp_9"))
            await reply.wait(seen)
            await reply.end()
        else:
            await stored(request, reply)

    upstream.script = script
    with gateway.client(key) as client, gateway.client(key) as other:
        body = {**BODY, "background": True, "stream": True}
        with client.stream("POST", "/responses", json=body) as answer:
            next(answer.iter_raw())
            assert other.get("/responses/resp_9").json()["status"] == "queued"
            assert error(other.delete("/responses/resp_9"))[0] == 400
            assert other.get("/responses/resp_9").json()["status"] == "completed"
            assert gateway.row()["outcome"] == "completed"
            assert other.delete("/responses/resp_9").status_code == 200
            seen.set()
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert gateway.row()["output_tokens"] == 9


def test_who_reads_it_and_then_cancels_pays_for_what_was_read(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    stored = ResponseStore()
    delta = {"type": "response.output_text.delta", "delta": "word " * 80}

    async def script(request: Received, reply: Reply) -> None:
        if request.path.endswith("/cancel"):
            await stored(request, reply)
            return
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(begun(stored, "resp_9", "in_progress"))
        for _ in range(100):
            await reply.send(event(delta, str(delta["type"])))
        while stored.responses["resp_9"]["status"] != "cancelled":
            await asyncio.sleep(0.01)
        await reply.end()

    upstream.script = script
    with gateway.client(key) as client, gateway.client(key) as other:
        body = {**BODY, "background": True, "stream": True}
        with client.stream("POST", "/responses", json=body) as answer:
            words = 0
            for part in answer.iter_raw():
                words += part.count(b"word ")
                if words == 8000:
                    break
            other.post("/responses/resp_9/cancel")
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "estimated")
    assert row["output_tokens"] == 10_000


def test_what_was_read_is_known_after_a_restart(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    stored = ResponseStore()
    delta = {"type": "response.output_text.delta", "delta": "word " * 8000}
    events = [begun(stored, "resp_9", "in_progress"), event(delta, str(delta["type"]))]

    async def script(request: Received, reply: Reply) -> None:
        answer = stream(events, end="tear") if request.path == "/v1/responses" else stored
        await answer(request, reply)

    upstream.script = script
    with gateway.client(key) as client, pytest.raises(httpx2.RemoteProtocolError):
        client.post("/responses", json={**BODY, "background": True, "stream": True})
    gateway.kill()
    gateway.start()
    with gateway.client(key) as client:
        client.post("/responses/resp_9/cancel")
    assert gateway.row()["output_tokens"] == 10_000


def test_its_end_is_shown_to_nobody_before_it_is_written_down(
    gateway: Gateway, stored: ResponseStore, key: str
) -> None:
    stored.turns = 1_000_000
    made = create(gateway, key, background=True)["id"]
    stored.responses[made] |= {"status": "completed", "usage": RESPONSE_USAGE}
    shown: list[str] = []

    def fetch() -> None:
        with gateway.client(key) as client, contextlib.suppress(httpx2.HTTPError):
            shown.append(client.get(f"/responses/{made}").json()["status"])

    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                pool.submit(fetch)
            time.sleep(0.5)
            assert not shown
            with gateway.client(key) as client:
                assert client.delete(f"/responses/{made}").status_code in (400, 503)
            assert made in stored.responses
            gateway.kill()
    assert not shown
    gateway.start()
    wait_until(lambda: not pending(gateway))
    assert gateway.row()["output_tokens"] == 9


def test_who_see_its_end_at_once_pay_once(make_gateway: MakeGateway, stored: ResponseStore) -> None:
    gateway = make_gateway('[billing]\ndefault_credit_limit = "5"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key = gateway.new_key()
    stored.turns = 1_000_000
    made = create(gateway, key, background=True, max_output_tokens=50)["id"]
    stored.responses[made] |= {"status": "completed", "usage": RESPONSE_USAGE}

    def fetch(_: int) -> str:
        with gateway.client(key) as client:
            return str(client.get(f"/responses/{made}").json()["status"])

    with (
        contextlib.closing(sqlite3.connect(gateway.database)) as database,
        ThreadPoolExecutor(4) as pool,
    ):
        database.execute("BEGIN IMMEDIATE")
        seen = stored.looks.get(made, 0)
        shown = pool.map(fetch, range(4))
        wait_until(lambda: stored.looks.get(made, 0) >= seen + 4)
        database.rollback()
        assert list(shown) == ["completed"] * 4
    assert gateway.row()["cost"] == "0.039"
    money = gateway.api("GET", "/accounts/test")
    assert (money["balance"], money["held"]) == ("-0.039", "0")


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
def test_one_that_is_answered_again_is_billed_once(
    make_gateway: MakeGateway, upstream: Upstream, streamed: bool, keyed: bool
) -> None:
    """By an upstream that honours `idempotency-key`: meanwhile, and after its end. Without a key,
    an upstream that uses an id again has worked again."""
    gateway = make_gateway('[billing]\ndefault_credit_limit = "5"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key, stored = gateway.new_key(), ResponseStore(turns=1_000_000)
    first = begun(stored, "resp_1")

    async def script(request: Received, reply: Reply) -> None:
        answer: Script = stored
        response = stored.responses["resp_1"]
        if request.method == "POST" and streamed:
            ended = event({"type": "response.completed", "response": response}, "x")
            answer = stream([first, ended] if response["usage"] else [first])
        elif request.method == "POST":
            answer = json_answer(response)
        await answer(request, reply)

    upstream.script = script
    body = {"background": True, "max_output_tokens": 50, "stream": streamed}
    headers = {"idempotency-key": "order-17"} if keyed else {}

    def create_again() -> str:
        with gateway.client(key) as client:
            return client.post("/responses", json={**BODY, **body}, headers=headers).text

    for _ in range(2):
        assert "resp_1" in create_again()
    assert len(pending(gateway)) == (1 if keyed else 2)
    stored.turns = 1
    wait_until(lambda: not pending(gateway))
    assert "completed" in create_again()
    gateway.restart()
    costs = ["0.039", "None", "None"] if keyed else ["0.039"] * 3
    assert sorted(str(row["cost"]) for row in gateway.rows()) == costs
    money = gateway.api("GET", "/accounts/test")
    assert (money["balance"], money["held"]) == ("-0.039" if keyed else "-0.117", "0")


def test_a_background_request_repeats_no_response_that_was_cut(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """The row of the cut one bills what was read. A background request with the same
    `idempotency-key` that got its rest would not be billed for it."""
    kept: dict[str | None, dict[str, Any]] = {}

    async def script(request: Received, reply: Reply) -> None:
        sent = request.header("idempotency-key")
        response = kept.setdefault(sent, response_object(id=f"resp_{len(kept)}"))
        if not request.json().get("stream"):
            await json_answer(response)(request, reply)
            return
        await reply.head(headers={"content-type": "text/event-stream"})
        created = {**response, "status": "in_progress", "usage": None}
        await reply.send(event({"type": "response.created", "response": created}, "x"))
        await reply.wait(request.closed)

    upstream.script = script
    with gateway.client(key) as client:
        client.headers["idempotency-key"] = "order-17"
        with client.stream("POST", "/responses", json={**BODY, "stream": True}) as cut:
            next(cut.iter_bytes())
        wait_until(lambda: [row["outcome"] for row in gateway.rows()] == ["client_disconnected"])
        for _ in range(2):
            body = {**BODY, "background": True}
            assert client.post("/responses", json=body).json()["id"] == "resp_1"
    sources = Counter(row["usage_source"] for row in gateway.rows())
    assert sources == {"estimated": 1, "upstream": 1, "none": 1}


def test_those_that_the_upstream_knows_no_more_hold_nothing(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway('[billing]\ndefault_credit_limit = "5"').start()
    gateway.cli("price", "add", "gpt-up", "--input", "1000", "--output", "1000")
    key, stored, asked = gateway.new_key(), ResponseStore(), Counter[str]()
    statuses = {"resp_00000001": 400, "resp_00000002": 404, "resp_00000003": 410}

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "POST":
            await stored(request, reply)
            return
        response_id = request.path.rpartition("/")[2]
        asked[response_id] += 1
        down = asked[response_id] == 3  # so that it isn't yet three in a row
        status = 503 if down else statuses[response_id]
        await json_answer({"error": {"message": "x"}}, status)(request, reply)

    upstream.script = script
    for response_id in statuses:
        assert create(gateway, key, background=True, max_output_tokens=50)["id"] == response_id
    wait_until(lambda: all(asked[each] >= 4 for each in statuses))
    assert len(pending(gateway)) == 3
    assert float(gateway.api("GET", "/accounts/test")["held"]) > 0
    wait_until(lambda: not pending(gateway))
    assert {row["outcome"] for row in gateway.rows()} == {"upstream_failed"}
    assert gateway.api("GET", "/accounts/test")["held"] == "0"


def test_it_is_its_accounts_though_it_is_not_to_be_stored(
    gateway: Gateway, stored: ResponseStore, key: str
) -> None:
    """An upstream keeps it until it is fetched."""
    made = create(gateway, key, background=True, store=False)["id"]
    with gateway.client(key) as client:
        assert client.get(f"/responses/{made}").status_code == 200


def test_a_background_response_outlives_a_kill_once_its_client_has_heard_of_it(
    gateway: Gateway, upstream: Upstream
) -> None:
    """From its first event on it belongs to its owner, and will be billed."""
    key = gateway.new_key()
    made = response_object(status="in_progress", usage=None)
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(made)(request, reply)
            return
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event({"type": "response.created", "response": made}, "response.created"))
        await reply.wait(release)

    upstream.script = script
    body = {"model": "gpt-up", "input": "Hi", "background": True, "stream": True}
    with (
        gateway.client(key) as client,
        contextlib.suppress(httpx2.RemoteProtocolError, httpx2.ReadError),
        client.stream("POST", "/responses", json=body) as answer,
    ):
        assert b"created" in next(answer.iter_raw())
        gateway.kill()
        release.set()
    gateway.start()
    assert gateway.row()["outcome"] == "pending"
    with gateway.client(key) as client:
        assert client.get(f"/responses/{made['id']}").status_code == 200


HANGING = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from redbtc.store.writer import Writer
write = Writer._write
def hang(self, changes, synchronous):
    while os.path.exists("hang"):
        open("hanging", "w").close()
        time.sleep(0.005)
    return write(self, changes, synchronous)
Writer._write = hang
"""


def created(**more: Any) -> bytes:
    made = response_object(usage=None, status="in_progress", **more)
    return event({"type": "response.created", "response": made}, "response.created")


def queued(**more: Any) -> bytes:
    return json.dumps(response_object(usage=None, status="queued", **more)).encode()


LARGE = "x" * 100_000  # which the beginning of a response repeats
FIRST_BYTES: dict[str, tuple[bool, list[bytes]]] = {
    "event": (True, [created()]),
    "event in two parts": (True, [created()[:150], created()[150:]]),
    "large event": (True, [created(instructions=LARGE)[:70_000]]),
    "comment and event": (True, [b": ping\n\n", created()[:150], created()[150:]]),
    "JSON": (False, [queued()]),
    "JSON in two parts": (False, [queued()[:150], queued()[150:]]),
    "large JSON": (False, [queued(instructions=LARGE)[:70_000]]),
}


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_the_id_of_a_background_response_waits_for_its_row(
    make_gateway: MakeGateway, upstream: Upstream, name: str
) -> None:
    """No byte that shows it is sent before the commit: who has seen it finds it after a kill."""
    gateway = make_gateway()
    gateway.prelude = HANGING
    gateway.start()
    key = gateway.new_key()
    hang, hanging = gateway.folder / "hang", gateway.folder / "hanging"
    streamed, parts = FIRST_BYTES[name]
    whole = parts[-1].endswith((b"\n\n", b"}"))

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(response_object())(request, reply)
            return
        hang.touch()
        content_type = "text/event-stream" if streamed else "application/json"
        await reply.head(200, [("content-type", content_type)])
        for part in parts:
            await reply.send(part)
            await asyncio.sleep(0.01)
        if whole and not streamed:
            await reply.end()
        await reply.wait(request.closed)

    upstream.script = script
    with gateway.begin(key, {**BODY, "background": True, "stream": streamed}) as client:
        if whole:
            wait_until(hanging.exists)
        else:
            wait_until(lambda: upstream.requests)
        time.sleep(0.3)
        client.setblocking(False)
        got = b""
        with contextlib.suppress(BlockingIOError):
            got = client.recv(1 << 20)
        assert b"resp_1" not in got
        if not whole:
            return
        hang.unlink()
        client.settimeout(PATIENCE_SECONDS)
        while b"resp_1" not in got:
            got += client.recv(1 << 20)
        gateway.kill()
    gateway.start()
    with gateway.client(key) as again:
        assert again.get("/responses/resp_1").status_code == 200
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")


def test_what_comes_before_the_id_of_a_background_response_stays_in_order(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    delta = event({"type": "response.output_text.delta", "delta": "Hi"})
    sent = [b": one\n\n", delta, delta, created()[:100], created()[100:], delta, b": two\n\n"]
    sent.append(event({"type": "response.completed", "response": response_object()}))
    upstream.script = stream(sent, 0.01)
    assert create_text(gateway, key, background=True, stream=True).encode() == b"".join(sent)
    assert gateway.row()["outcome"] == "completed"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_without_an_id_waits_for_no_id(
    gateway: Gateway, upstream: Upstream, key: str, streamed: bool
) -> None:
    """A background request whose answer names no response gets all of it in the end; beyond
    MAX_UNNAMED bytes, as it comes."""
    large = [event({"type": "response.output_text.delta", "delta": LARGE}) for _ in range(30)]
    upstream.script = stream(large) if streamed else json_answer({"output": [{"text": LARGE}]})
    text = create_text(gateway, key, background=True, stream=streamed)
    assert LARGE in text
    assert not streamed or text.encode() == b"".join(large)
