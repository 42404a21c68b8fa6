"""The places at each upstream: max_concurrency, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.gateway.errors import error
from tests.helpers.gateway import wait_until
from tests.helpers.pair import CHAT, Pair
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import Received, Reply, Script, Upstream, json_answer, openai_like

pytestmark = [pytest.mark.promise_4, pytest.mark.promise_9]

MANY = {"account": {"concurrency": 0}}


class Gate:
    """Lets the requests to an upstream wait until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open = self._open.set

    def script(self, then: Script = openai_like) -> Script:
        async def script(request: Received, reply: Reply) -> None:
            await reply.wait(self._open)
            await then(request, reply)

        return script


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def pool(gate: Gate) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool
        gate.open()


def queued(pair: Pair, number: int) -> None:
    """Wait until so many requests wait for a place."""
    wait_until(lambda: pair.gateway.metrics()["redbtc_queued"] == number)


def begin(pair: Pair, pool: ThreadPoolExecutor, upstream: Upstream) -> Future[httpx2.Response]:
    """Begin a request, and wait until the upstream has it."""
    before = len(upstream.requests)
    asked = pool.submit(pair.ask)
    upstream.wait_for(lambda: len(upstream.requests) == before + 1)
    return asked


@pytest.mark.parametrize("places", [1, 2])
def test_a_full_upstream_is_passed_over(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor, places: int
) -> None:
    pair.use({"max_concurrency": places})
    pair.bad.script = gate.script()
    held = [begin(pair, pool, pair.bad) for _ in range(places)]
    assert pair.ask().status_code == 200
    assert (len(pair.bad.requests), len(pair.good.requests)) == (places, 1)
    gate.open()
    assert {each.result().status_code for each in held} == {200}
    pair.wait_until_idle()
    assert pair.ask().status_code == 200
    assert len(pair.bad.requests) == places + 1, "its places are free again"
    rows = pair.gateway.rows(account=pair.account)
    assert {row["attempts"] for row in rows} == {1}
    assert sorted(row["upstream"][:3] for row in rows) == ["bad"] * (places + 1) + ["goo"]


def test_places_are_each_members(pair: Pair, gate: Gate, pool: ThreadPoolExecutor) -> None:
    keys = ["TEST_UPSTREAM_KEY", "SECOND_KEY"]
    pair.use({"api_key_envs": keys, "max_concurrency": 1, "priority": 0})
    pair.bad.script = gate.script()
    held = [begin(pair, pool, pair.bad) for _ in range(2)]
    assert pair.ask().status_code == 200
    gate.open()
    assert {each.result().status_code for each in held} == {200}
    found = {row["upstream"] for row in pair.gateway.rows(account=pair.account)}
    bad = pair.name("bad")
    assert found == {f"{bad}/TEST_UPSTREAM_KEY", f"{bad}/SECOND_KEY", pair.name("good")}


def test_requests_wait_in_turn(pair: Pair, gate: Gate, pool: ThreadPoolExecutor) -> None:
    pair.use(*[{"max_concurrency": 1}] * 2)
    pair.bad.script = pair.good.script = gate.script()
    held = [begin(pair, pool, pair.bad), begin(pair, pool, pair.good)]
    waiting: list[Future[httpx2.Response]] = []
    for number in range(5):
        waiting.append(pool.submit(pair.ask, user=str(number)))
        queued(pair, number + 1)
    assert len(pair.gateway.rows(account=pair.account)) == 2, "those that wait have no row"
    gate.open()
    assert {each.result().status_code for each in held + waiting} == {200}
    both = sorted(
        (request.json()["user"], row["started_at"])
        for row, request in zip(
            pair.gateway.rows(account=pair.account),
            pair.bad.requests + pair.good.requests,
            strict=True,
        )
        if "user" in request.json()
    )
    assert len(both) == 5
    for upstream in (pair.bad, pair.good):
        users = [each.json()["user"] for each in upstream.requests[1:]]
        assert users == sorted(users)
        assert upstream.max_in_flight >= 1
    pair.wait_until_idle()


def test_never_more_than_its_places(pair: Pair, pool: ThreadPoolExecutor) -> None:
    pair.use(*[{"max_concurrency": 3}] * 2, limits=MANY)

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(request.closed, 0.01)
        await (json_answer({}, 500) if len(request.body) % 2 else openai_like)(request, reply)

    for upstream in (pair.bad, pair.good):
        upstream.script, upstream.max_in_flight = script, 0
    asked = [pool.submit(pair.ask, user="x" * (n % 2)) for n in range(120)]
    assert {each.result().status_code for each in asked} == {200, 500}
    assert pair.bad.max_in_flight == pair.good.max_in_flight == 3
    pair.wait_until_idle()


def test_failing_over_waits_for_a_place(pair: Pair, gate: Gate, pool: ThreadPoolExecutor) -> None:
    """The client gets the error if there is none in time."""
    pair.use({}, {"max_concurrency": 1}, limits={**MANY, "queue_seconds": 0.3})
    pair.good.script = gate.script()
    pair.bad.script = json_answer({"error": {"code": "first"}}, 503)
    held = begin(pair, pool, pair.good)
    assert error_code(pair.ask()) == "first"
    pair.settings["limits"]["queue_seconds"] = 3600
    pair.settings["failover"] = {"budget_seconds": 3600}
    pair.configure(pair.settings)
    waiting = pool.submit(pair.ask)
    pair.bad.wait_for(lambda: len(pair.bad.requests) == 3)
    gate.open()
    assert {held.result().status_code, waiting.result().status_code} == {200}
    pair.wait_until_idle()
    attempts = [row["attempts"] for row in pair.gateway.rows(account=pair.account)]
    assert attempts == [2, 1, 2]


def error_code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])


# ── Waiting ──────────────────────────────────────────────────────────────────────────────────────


def full(pair: Pair, gate: Gate, pool: ThreadPoolExecutor, **limits: Any) -> Future[Any]:
    """Let the only upstream be full."""
    more = {"models": ["other"], "max_concurrency": 1}
    pair.use({"max_concurrency": 1}, more, limits={**MANY, **limits})
    pair.bad.script = gate.script()
    return begin(pair, pool, pair.bad)


def left_of_rates(pair: Pair) -> tuple[int, int]:
    """Return how many requests and tokens the account may use now."""
    limits = pair.gateway.api("GET", f"/accounts/{pair.account}/limits")
    names = ("requests_per_minute", "tokens_per_minute")
    requests, tokens = (limits[name]["remaining"] for name in names)
    return requests, tokens


RATES = {"account": {"concurrency": 0, "requests_per_minute": 10, "tokens_per_minute": 1_000_000}}


def test_waiting_too_long(pair: Pair, gate: Gate, pool: ThreadPoolExecutor) -> None:
    held = full(pair, gate, pool, queue_seconds=0.3, **RATES)
    before = left_of_rates(pair)
    began = time.monotonic()
    answer = pair.ask()
    assert time.monotonic() - began >= 0.3
    assert error(answer) == (503, "overloaded", None)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert len(pair.gateway.rows(account=pair.account)) == 1
    assert all(now >= then for now, then in zip(left_of_rates(pair), before, strict=True))
    gate.open()
    assert held.result().status_code == 200
    pair.met()


@pytest.mark.parametrize("path", ["/responses/{}", "/responses/{}/input_items"])
def test_requests_for_what_is_stored_take_places(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor, path: str
) -> None:
    pair.use({"max_concurrency": 1}, limits={**RATES, "queue_seconds": 0.3})
    pair.bad.script = store = ResponseStore(first=1000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = gate.script(store)
    held = begin(pair, pool, pair.bad)
    before = left_of_rates(pair)
    with pair.gateway.client(pair.key) as client:
        answer = client.get(path.format(made))
        assert error(answer) == (503, "overloaded", None)
        assert "retry-after" in answer.headers
        assert all(now >= then for now, then in zip(left_of_rates(pair), before, strict=True))
        gate.open()
        held.result()
        pair.wait_until_idle()
        pair.bad.script = store
        assert client.get(path.format(made)).status_code == 200
    pair.wait_until_idle()


@pytest.mark.parametrize("stored", [False, True])
def test_leaving_the_queue_costs_nothing(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor, stored: bool
) -> None:
    pair.use({"max_concurrency": 1}, {"models": ["other"]}, limits=RATES)
    pair.bad.script = store = ResponseStore(first=1000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = gate.script(store)
    held = pool.submit(pair.ask, "/responses")
    pair.bad.wait_for(lambda: len(pair.bad.requests) == 2)
    before = left_of_rates(pair)
    if stored:
        head = f"GET /v1/responses/{made} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {pair.key}"
        waiting = pair.gateway.connect()
        waiting.sendall(f"{head}\r\n\r\n".encode())
    else:
        waiting = pair.gateway.begin(pair.key, CHAT, "/chat/completions")
    with waiting:
        queued(pair, 1)
        waiting.settimeout(0.1)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    wait_until(lambda: pair.gateway.metrics()["redbtc_in_flight"] == 1)
    assert all(now >= then for now, then in zip(left_of_rates(pair), before, strict=True))
    assert len(pair.bad.requests) == 2
    gate.open()
    assert held.result().status_code == 200
    pair.wait_until_idle()
    assert len(pair.gateway.rows(account=pair.account)) == 2
    assert pair.ask("/responses").status_code == 200, "the place of the one that left is free"


@pytest.mark.parametrize(
    "change", [{"max_concurrency": 3}, {"max_concurrency": 0}, {"max_concurrency": 3, "weight": 2}]
)
def test_a_reload_that_raises_the_limit_lets_requests_in(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor, change: dict[str, int]
) -> None:
    held = full(pair, gate, pool, queue_seconds=3600)
    waiting = [pool.submit(pair.ask) for _ in range(2)]
    queued(pair, 2)
    pair.settings["upstreams"][0] |= change
    pair.configure(pair.settings)
    pair.bad.wait_for(lambda: pair.bad.in_flight == 3)
    gate.open()
    assert {each.result().status_code for each in [held, *waiting]} == {200}
    pair.wait_until_idle()


def test_a_reload_forgets_no_request_in_flight(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    held = full(pair, gate, pool, queue_seconds=0.3)
    pair.settings["upstreams"][0] |= {"max_concurrency": 2, "total_timeout_seconds": 100}
    pair.configure(pair.settings)
    second = begin(pair, pool, pair.bad)
    assert error(pair.ask())[:2] == (503, "overloaded")
    pair.settings["upstreams"][0] |= {"max_concurrency": 1}
    pair.configure(pair.settings)
    assert error(pair.ask())[:2] == (503, "overloaded")
    gate.open()
    assert {each.result().status_code for each in (held, second)} == {200}
    pair.wait_until_idle()
    assert pair.ask().status_code == 200


def test_an_upstream_that_comes_back_lets_requests_in(
    pair: Pair, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """They wait for a place at the other one meanwhile."""
    pair.use({}, {"max_concurrency": 1})
    pair.bad.script = json_answer({"error": {}}, 429, {"retry-after": "2"})
    pair.good.script = gate.script()
    held = pool.submit(pair.ask)
    pair.good.wait_for(lambda: pair.good.in_flight == 1)
    pair.bad.script = openai_like
    began = time.monotonic()
    assert pair.ask().status_code == 200
    assert time.monotonic() - began > 0.5, "it has rested"
    assert len(pair.bad.requests) == 2
    gate.open()
    assert held.result().status_code == 200
    pair.wait_until_idle()


def test_a_place_alone_is_no_attempt(pair: Pair) -> None:
    """A request can be refused after it has got its place, before anything is sent."""
    pair.alone()
    pair.key = pair.gateway.new_key(f"poor{pair.number}", credit_limit="0")
    assert error(pair.ask())[:2] == (429, "insufficient_quota")
    pair.wait_until_idle()
    attempts = f'redbtc_upstream_attempts_total{{upstream="{pair.name("bad")}"}}'
    assert (len(pair.bad.requests), pair.gateway.metrics()[attempts]) == (0, 0)
