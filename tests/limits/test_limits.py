"""Promise 4: limits are exact, and no place is ever leaked. Promise 5: keys."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc.deadlines import MAX_EXPIRED, Deadline, Deadlines
from redbtc.gateway.relay import UPSTREAM_CLOSE_SECONDS
from redbtc.limits.places import Places
from tests.helpers.gateway import PATIENCE_SECONDS, USUAL, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    response_object,
    stream,
)

pytestmark = [pytest.mark.promise_4, pytest.mark.promise_5]

RESPONSE = {"model": "gpt-up", "input": "Hi"}


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])


def in_parallel(
    gateway: Gateway, key: str, count: int, **body: object
) -> list[httpx2.Response | Exception]:
    def one(_: int) -> httpx2.Response | Exception:
        try:
            with gateway.client(key) as client:
                return client.post("/responses", json={**RESPONSE, **body})
        except httpx2.HTTPError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


async def slowly(request: Received, reply: Reply) -> None:
    await asyncio.sleep(0.05)
    await openai_like(request, reply)


@pytest.mark.front_door
def test_never_more_than_n_in_flight_and_everyone_gets_a_turn(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key(concurrency=3)
    upstream.script = slowly
    answers = in_parallel(gateway, key, 30)
    assert [answer.status_code for answer in answers if isinstance(answer, httpx2.Response)] == (
        [200] * 30
    )
    assert upstream.max_in_flight == 3
    assert gateway.metrics()["redbtc_in_flight"] == 0
    assert gateway.metrics()["redbtc_queued"] == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30))
def test_places_are_given_in_turn_and_given_back(
    limit: int, visits: list[tuple[bool, int]]
) -> None:
    """Visitors stay some turns of the loop; some give up after as many."""
    order: list[int] = []

    async def visit(places: Places, number: int, patient: bool, turns: int) -> None:
        if not places.take_now(limit):
            async with asyncio.timeout(None if patient else turns / 10_000):
                await places.take_in_turn()
        try:
            order.append(number)
            assert not limit or places.taken <= limit
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            places.give_back()

    async def all_visits() -> Places:
        places = Places()
        tasks = [visit(places, number, *each) for number, each in enumerate(visits)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, TimeoutError), result
        return places

    assert asyncio.run(all_visits()).taken == 0
    assert order == sorted(order), "in the order of asking"
    assert {n for n, (patient, _) in enumerate(visits) if patient} <= set(order)


def test_clocks_whose_time_is_up_at_once_ring_in_turn() -> None:
    """What rings has something to do, and others want the loop meanwhile."""

    async def test() -> None:
        clocks, rung, turns = Deadlines(), 0, 0

        async def wait() -> None:
            nonlocal rung
            clock = Deadline(clocks)
            try:
                with clock.running(0):
                    await asyncio.Event().wait()
            except TimeoutError:
                rung += 1

        tasks = [asyncio.create_task(wait()) for _ in range(MAX_EXPIRED * 10)]
        while rung < len(tasks):
            before = rung
            await asyncio.sleep(0)
            assert rung - before <= MAX_EXPIRED
            turns += rung > before
        assert turns >= 10

    asyncio.run(test())


def test_the_limit_over_all_holds_for_many_accounts(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("[limits]\nconcurrency = 4").start()
    keys = [gateway.new_key(f"account{number}") for number in range(4)]
    upstream.script = slowly
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda key: in_parallel(gateway, key, 8), keys))
    statuses = [a.status_code for each in results for a in each if isinstance(a, httpx2.Response)]
    assert statuses == [200] * 32
    assert upstream.max_in_flight == 4


def test_a_queue_that_is_too_long_is_a_429(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway("[limits]\nqueue_seconds = 0.2").start()
    key = gateway.new_key(concurrency=1)
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    with ThreadPoolExecutor(1) as pool, gateway.client(key) as client:
        first = pool.submit(client.post, "/responses", json=RESPONSE)
        wait_until(lambda: upstream.in_flight)
        with gateway.client(key) as other:
            refused = other.post("/responses", json=RESPONSE)
        assert (refused.status_code, code(refused)) == (429, "concurrency_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        assert int(refused.headers["retry-after-ms"]) >= 1
        assert refused.headers["x-ratelimit-limit-concurrency"] == "1"
        release.set()
        assert first.result().status_code == 200
    assert len(gateway.rows()) == 1


def test_a_keys_own_limits_hold_beside_its_accounts(gateway: Gateway, upstream: Upstream) -> None:
    other = gateway.new_key(concurrency=5)
    narrow = gateway.cli("key", "add", "test", "--concurrency", "2")["key"]
    slow = gateway.cli("key", "add", "test", "--requests-per-minute", "1")["key"]
    upstream.script = slowly
    assert len(in_parallel(gateway, narrow, 10)) == 10
    assert upstream.max_in_flight == 2
    assert len(in_parallel(gateway, other, 20)) == 20
    assert upstream.max_in_flight == 5
    with gateway.client(slow) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200
        assert code(client.post("/responses", json=RESPONSE)) == "rate_limit_exceeded"
    with gateway.client(other) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200


def test_leaving_the_queue_costs_nothing(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(concurrency=1, requests_per_minute=3)
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    with ThreadPoolExecutor(1) as pool, gateway.client(key) as client:
        first = pool.submit(client.post, "/responses", json=RESPONSE)
        wait_until(lambda: upstream.in_flight)
        for _ in range(10):
            with gateway.begin(key, RESPONSE):
                wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
            wait_until(lambda: gateway.metrics()["redbtc_queued"] == 0)
        release.set()
        assert first.result().headers["x-ratelimit-remaining-requests"] == "2"
        assert client.post("/responses", json=RESPONSE).status_code == 200
    assert len(upstream.requests) == 2


def test_requests_a_minute(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(requests_per_minute=2)
    with gateway.client(key) as client:
        first = client.post("/responses", json=RESPONSE)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert client.post("/responses", json=RESPONSE).status_code == 200
        refused = client.post("/responses", json=RESPONSE)
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert len(upstream.requests) == 2


def test_tokens_a_minute_are_estimated_and_then_put_right(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key(tokens_per_minute=1000)
    usage = {"input_tokens": 300, "output_tokens": 600, "total_tokens": 900}
    upstream.script = json_answer(response_object(usage=usage))
    with gateway.client(key) as client:
        first = client.post("/responses", json=RESPONSE)
        estimated = int(first.headers["x-ratelimit-remaining-tokens"])
        assert 980 <= estimated < 1000
        second = client.post("/responses", json=RESPONSE)
        assert int(second.headers["x-ratelimit-remaining-tokens"]) < 500
        refused = client.post("/responses", json=RESPONSE)
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(refused.headers["retry-after"]) >= 20


def test_changed_limits_hold_from_the_next_request(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key(requests_per_minute=1)
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 200
        assert client.post("/responses", json=RESPONSE).status_code == 429
        gateway.cli("account", "set", "test", "--requests-per-minute", "0")
        assert client.post("/responses", json=RESPONSE).status_code == 200
        gateway.cli("account", "suspend", "test", "--reason", "late")
        refused = client.post("/responses", json=RESPONSE)
        assert (refused.status_code, code(refused)) == (403, "account_suspended")
        gateway.cli("account", "resume", "test")
        assert client.post("/responses", json=RESPONSE).status_code == 200


def test_a_revoked_key_is_refused_on_the_next_request_with_100_in_flight(
    gateway: Gateway, upstream: Upstream
) -> None:
    key = gateway.new_key(concurrency=0)
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(in_parallel, gateway, key, 100)
        wait_until(lambda: upstream.in_flight == 100)
        (key_id,) = [each["id"] for each in gateway.cli("key", "list", "test")["keys"]]
        gateway.cli("key", "revoke", key_id)
        with gateway.client(key) as client:
            refused = client.post("/responses", json=RESPONSE)
        assert (refused.status_code, code(refused)) == (401, "invalid_api_key")
        release.set()
        answers = running.result()
    assert all(isinstance(a, httpx2.Response) and a.status_code == 200 for a in answers)
    with gateway.client(key) as client:
        assert client.post("/responses", json=RESPONSE).status_code == 401
    assert len(upstream.requests) == 100


@pytest.mark.front_door
def test_every_flaw_of_a_key_has_one_answer(gateway: Gateway, upstream: Upstream) -> None:
    key = gateway.new_key()
    expired = gateway.cli("key", "add", "test", "--expires", "2020-01-01")["key"]
    wrong_sum = key[:-1] + ("a" if key[-1] != "a" else "b")
    values = [
        None,
        "",
        "Bearer",
        f"Bearer {wrong_sum}",
        f"Bearer {expired}",
        f"Basic {key}",
        "Bearer sk-other",
        "Bearer " + "x" * 5000,
        "Bearer ' OR 1=1 --",
        f"Bearer {key}x",
    ]
    bodies = set()
    for value in values:
        headers = {} if value is None else {"authorization": value}
        answer = httpx2.post(
            f"{gateway.base_url}/responses", json=RESPONSE, headers=headers, **USUAL
        )
        assert answer.status_code == 401, value
        bodies.add(answer.content)
    assert len(bodies) == 1
    assert json.loads(bodies.pop())["error"]["code"] == "invalid_api_key"
    assert not upstream.requests


def test_rotating_a_key_overlaps(gateway: Gateway) -> None:
    old = gateway.cli("account", "add", "x") and gateway.cli("key", "add", "x", "--label", "a")
    kept = gateway.cli("key", "rotate", old["id"], "--overlap", "1h")
    ended = gateway.cli("key", "rotate", kept["id"], "--overlap", "0")
    statuses = []
    for key in (old, kept, ended):
        with gateway.client(key["key"]) as client:
            statuses.append(client.get("/models").status_code)
    assert statuses == [200, 401, 200]
    assert ended["label"] == "a"


@pytest.mark.slow
def test_ten_thousand_disconnects_leave_no_trace(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Clients leave at random moments: in the queue, before the head, in mid-stream."""
    settings = '[limits.account]\nconcurrency = 40\n[metering]\non_disconnect = "cancel"'
    gateway = make_gateway(settings).start()
    key = gateway.new_key()
    pieces = [b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'] * 20

    async def script(request: Received, reply: Reply) -> None:
        await asyncio.sleep(random.random() * 0.02)
        await stream([*pieces, b"data: [DONE]\n\n"], 0.002)(request, reply)

    upstream.script = script
    body = json.dumps({"model": "m", "stream": True, "messages": []}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()

    async def leave(places: asyncio.Semaphore) -> None:
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write((head + body)[: random.choice([len(head) // 2, None, None, None, None])])
            try:
                async with asyncio.timeout(random.random() * 0.3):
                    await reader.read()
            except (TimeoutError, ConnectionError):
                pass
            writer.transport.abort()

    async def storm(count: int) -> None:
        places = asyncio.Semaphore(80)
        await asyncio.gather(*(leave(places) for _ in range(count)))

    def settled() -> bool:
        metrics = gateway.metrics()
        return metrics["redbtc_in_flight"] == 0 == metrics["redbtc_queued"]

    asyncio.run(storm(1000))  # what is allocated once is allocated now
    wait_until(settled)
    wait_until(lambda: upstream.in_flight == 0)
    files, memory = gateway.open_files(), gateway.rss()
    asyncio.run(storm(9000))
    wait_until(settled)
    wait_until(lambda: upstream.in_flight == 0)
    assert upstream.max_in_flight <= 40
    # kept-alive connections to the upstream close after 15 s without use, all others are gone
    wait_until(lambda: gateway.open_files() <= files + 45)
    assert gateway.rss() - memory < 8 << 20
    rows = gateway.rows()
    left, arrived = len(rows), len(upstream.requests)
    assert arrived <= left <= arrived + 100, "those cut off on their way are few"
    outcomes = {row["outcome"] for row in rows}
    assert outcomes == {"completed", "client_disconnected"}
    full = threading.Event()  # all 40 places are there, and no more

    async def hold(request: Received, reply: Reply) -> None:
        if upstream.in_flight == 40:
            full.set()
        await reply.wait(full)
        await slowly(request, reply)

    upstream.script = hold
    assert len(in_parallel(gateway, key, 60)) == 60
    assert full.is_set()
    assert upstream.max_in_flight == 40


def leave_in_mid_stream(gateway: Gateway, key: str, seen: bytes) -> None:
    """Returns when the gateway has noticed it."""
    with gateway.client(key) as client:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi" * 50}]}
        with client.stream("POST", "/chat/completions", json=body) as answer:
            got = b""
            for part in answer.iter_raw():
                got += part
                if seen in got:
                    break
    wait_until(lambda: gateway.connections() == 0)


def row_of_one_that_left(gateway: Gateway) -> dict[str, Any]:
    wait_until(lambda: gateway.row()["outcome"] != "pending")
    return gateway.row()


def chat_event(text: str) -> bytes:
    return (
        b'data: {"id":"c","model":"up","choices":[{"delta":{"content":"%s"}}]}\n\n' % text.encode()
    )


USED = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5}}\n\n'


def test_drain_reads_on_until_the_usage_is_known(gateway: Gateway, upstream: Upstream) -> None:
    left = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        for piece in (*(chat_event("word ") for _ in range(5)), USED, b"data: [DONE]\n\n"):
            await reply.send(piece)
            await reply.wait(left)
        await reply.end()

    upstream.script = script
    leave_in_mid_stream(gateway, gateway.new_key(), b"word")
    left.set()
    row = row_of_one_that_left(gateway)
    assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "upstream")
    assert (row["input_tokens"], row["output_tokens"]) == (11, 5)
    assert not upstream.requests[0].closed.is_set()


def test_a_client_that_leaves_before_the_head_is_drained_too(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    left = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(left)
        await openai_like(request, reply)

    upstream.script = script
    with gateway.begin(key, RESPONSE):
        wait_until(lambda: upstream.in_flight)
    wait_until(lambda: gateway.connections() == 0)
    left.set()
    row = row_of_one_that_left(gateway)
    assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "upstream")
    assert row["input_tokens"] == 30


@pytest.mark.parametrize(
    "metering", ['on_disconnect = "cancel"', "drain_seconds = 0.3"], ids=["cancel", "drained out"]
)
def test_what_is_cut_off_is_estimated(
    make_gateway: MakeGateway, upstream: Upstream, metering: str
) -> None:
    gateway = make_gateway(f"[metering]\n{metering}").start()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(chat_event("x" * 40))
        while not request.closed.is_set():
            await reply.send(b": wait\n\n")
            await asyncio.sleep(0.05)

    upstream.script = script
    leave_in_mid_stream(gateway, gateway.new_key(), b"xxxx")
    row = row_of_one_that_left(gateway)
    assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "estimated")
    assert row["output_tokens"] >= 10, "what passed, or what is written in that time"
    assert 25 <= row["input_tokens"] <= 60
    assert row["model"] == "up"
    assert upstream.requests[0].closed.wait(PATIENCE_SECONDS)
    upstream.wait_for(lambda: upstream.in_flight == 0)


def test_a_place_is_kept_until_an_upstream_can_have_noticed_that_it_was_left(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """It may look for that only now and then."""
    gateway = make_gateway('[metering]\non_disconnect = "cancel"').start()
    key = gateway.new_key(concurrency=1)
    times: list[float] = []

    async def script(request: Received, reply: Reply) -> None:
        times.append(time.monotonic())
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b": wait\n\n")
        if len(times) == 1:
            await reply.wait(request.closed)
        await reply.end()

    upstream.script = script
    with (
        ThreadPoolExecutor(1) as pool,
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        parts = answer.iter_raw()  # the answer is closed with it
        next(parts)
        second = pool.submit(in_parallel, gateway, key, 1, stream=True)
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
        times.append(time.monotonic())
        answer.close()
        second.result()
    _, left, arrived = times
    assert arrived - left >= UPSTREAM_CLOSE_SECONDS, "however slow this machine is"


def test_a_client_that_leaves_after_the_last_event_has_completed(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Codex CLI closes 2 ms after response.completed."""

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b'data: {"type":"response.completed","response":{"id":"resp_1"}}\n\n')
        await asyncio.sleep(0.3)
        await reply.end()

    upstream.script = script
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json={**RESPONSE, "stream": True}) as answer,
    ):
        next(answer.iter_raw())
    assert gateway.row()["outcome"] == "completed"


@pytest.mark.parametrize("path", ["/models", "/models/gpt-up"])
def test_who_leaves_the_queue_for_a_list_of_models_waits_no_more(
    make_gateway: MakeGateway, upstream: Upstream, path: str
) -> None:
    gateway = make_gateway("[limits]\nqueue_seconds = 300").start()
    key, release = gateway.new_key(concurrency=1), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    with gateway.begin(key, {"model": "gpt-up", "input": "Hi"}) as first:
        wait_until(lambda: upstream.in_flight)
        with gateway.connect() as waiting:
            line = f"GET /v1{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n"
            waiting.sendall(line.encode())
            wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1)
            assert gateway.metrics()["redbtc_in_flight"] == 2
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 0)
        release.set()
        assert first.recv(20).startswith(b"HTTP/1.1 200 ")
