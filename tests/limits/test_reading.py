"""Limits apply before work: an account over its rate is refused by the head alone, and the memory
for bodies of requests without a place is bounded and shared fairly."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import random
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redbtc.config import SettingsError, parse_settings
from redbtc.deadlines import Deadline, Deadlines
from redbtc.gateway.reading import read_body
from redbtc.limits import memory as memory_module
from redbtc.limits.admission import NoCapacity
from redbtc.limits.limiter import Limiter
from redbtc.limits.memory import Reservation
from redbtc.limits.places import Places
from redbtc.request_body.forms import Form
from redbtc.request_body.pieces import Buffer
from redbtc.server.asgi import Message
from redbtc.slices import in_slices
from redbtc.steps import Steps
from redbtc.store.keys import Key
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    response_object,
)

pytestmark = pytest.mark.promise_4

MB = 1_000_000
MAX_BODY = 8 * MB  # so that an account may have 16 MB without a place, and all accounts 32
SLOW = {"body_timeout_seconds": 1}
SMALL = {"model": "gpt-up", "input": "Hi"}
JSON = {"content-type": "application/json"}


def server(queue_seconds: float = 20, **more: float) -> str:
    table = {"max_body_bytes": MAX_BODY, **more}
    lines = "\n".join(f"{name} = {value}" for name, value in table.items())
    return f"[server]\n{lines}\n[limits]\nqueue_seconds = {queue_seconds}"


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])


def body(size: int) -> bytes:
    """Return a request of exactly `size` bytes."""
    empty = json.dumps({**SMALL, "input": ""}).encode()
    return empty.replace(b'""', b'"%s"' % (b"x" * (size - len(empty))))


def compressed() -> bytes:
    """Return a compressed request whose decoded copy is as long as allowed."""
    text = random.Random(7).randbytes(MAX_BODY // 2 - 100).hex()
    return gzip.compress(json.dumps({**SMALL, "input": text}).encode(), 1)


def head(key: str, *lines: str, method: str = "POST /v1/responses") -> bytes:
    usual = ["Host: a", f"Authorization: Bearer {key}", "Content-Type: application/json"]
    return "\r\n".join([f"{method} HTTP/1.1", *usual, *lines, "", ""]).encode()


def until_held(gateway: Gateway, count: int) -> None:
    """Wait until this many requests are in flight or waiting."""
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == count, 60)


@contextlib.contextmanager
def unfinished(gateway: Gateway, key: str, count: int, size: int) -> Iterator[list[socket.socket]]:
    """Start uploads that lack their last byte, without waiting for responses."""
    with contextlib.ExitStack() as stack:
        socks, before = [], gateway.metrics()["redbtc_in_flight"]
        for number in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 60))
            sock.sendall(head(key, f"Content-Length: {size}"))
            sock.setblocking(False)
            socks.append(sock)
            until_held(gateway, int(before) + number + 1)
        rest = dict.fromkeys(socks, memoryview(body(size)[:-1]))
        quiet = 0
        while rest and quiet < 20:  # what can't be sent any more is left to the kernel
            quiet += 1
            for sock, data in list(rest.items()):
                with contextlib.suppress(BlockingIOError):
                    sent = sock.send(data)
                    rest[sock], quiet = data[sent:], 0
                if not rest[sock]:
                    del rest[sock]
            time.sleep(0.005)
        yield socks


def test_who_is_over_the_rate_is_refused_at_the_head(gateway: Gateway, upstream: Upstream) -> None:
    """This holds on every route that costs anything. No byte of the body is awaited or
    requested."""
    key = gateway.new_key(requests_per_minute=1)
    with gateway.client(key) as client:
        assert client.post("/responses", json=SMALL).status_code == 200
    for method in (
        "POST /v1/responses",
        "POST /v1/responses?bad[query]=1",
        "POST /v1/chat/completions",
        "POST /v1/responses/compact",
        "POST /v1/responses/input_tokens",
        "POST /v1/images/generations",
        "POST /v1/images/edits",
        "POST /v1/responses/resp_1/cancel",
        "GET /v1/responses/resp_1",
        "DELETE /v1/responses/resp_1",
        "GET /v1/responses/resp_1/input_items",
        "GET /v1/models",
        "GET /v1/models/gpt-up",
        "GET /v1/models/unknown",
    ):
        lines = ["Content-Length: 1000000", "Expect: 100-continue", "Content-Encoding: zstd"]
        answer = gateway.raw(head(key, *lines, method=method), 60)
        assert answer.startswith(b"HTTP/1.1 429 "), (method, answer)
        assert b"rate_limit_exceeded" in answer
        assert b"x-ratelimit-remaining-requests: 0" in answer.lower()
    assert len(upstream.requests) == 1


def test_what_is_refused_for_its_own_fault_counts_as_a_request(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Otherwise parsing bad bodies would be free. Failures of the gateway cost nothing."""
    gateway = make_gateway("[limits]\nqueue_seconds = 0.2").start()
    for bad in ("{", '{"model":5}', "[]", json.dumps({**SMALL, "previous_response_id": "resp_x"})):
        key = gateway.new_key(f"account{len(bad)}", requests_per_minute=2)
        with gateway.client(key) as client:
            refused = client.post("/responses", content=bad, headers=JSON)
            assert refused.status_code in (400, 404)
            served = client.post("/responses", json=SMALL)
            assert served.headers["x-ratelimit-remaining-requests"] == "0"
            assert client.post("/responses", json=SMALL).status_code == 429
    key = gateway.new_key("busy", requests_per_minute=3, tokens_per_minute=100, concurrency=1)
    release = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await openai_like(request, reply)

    upstream.script = script
    with ThreadPoolExecutor(1) as pool, gateway.client(key) as client:
        first = pool.submit(client.post, "/responses", json=SMALL)
        wait_until(lambda: upstream.in_flight)
        with gateway.client(key) as other:
            for _ in range(3):
                refused = other.post("/responses", json=SMALL)
                assert code(refused) == "concurrency_limit_exceeded"
        release.set()
        assert first.result().headers["x-ratelimit-remaining-requests"] == "2"
        served = client.post("/responses", json=SMALL)
        assert served.headers["x-ratelimit-remaining-requests"] == "1"
        dear = client.post("/responses", json={**SMALL, "max_output_tokens": 499_999})
        assert (dear.status_code, code(dear)) == (429, "rate_limit_exceeded")
        assert dear.headers["x-ratelimit-limit-tokens"] == "100"
        assert client.post("/responses", json=SMALL).status_code == 429, "it was a request"


def test_unfinished_bodies_take_bounded_memory_and_stop_nobody_else(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway(server(queue_seconds=1)).start()
    hog, other = gateway.new_key("hog", concurrency=4), gateway.new_key("other")
    before = gateway.rss()
    with unfinished(gateway, hog, 12, MAX_BODY) as socks:
        with gateway.client(other) as client:
            assert client.post("/responses", content=body(MAX_BODY), headers=JSON).is_success
        with gateway.client(hog) as client:
            assert client.post("/responses", json=SMALL).is_success, "a small body needs no memory"
        assert gateway.rss() - before < 40 * MB
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 0, 60)
        refused = [sock for sock in socks if answered(sock, 0.1)]
        assert len(refused) == 10
        for sock in refused:
            answer = sock.recv(65536).lower()
            assert answer.startswith(b"http/1.1 429 ")
            assert b'"concurrency_limit_exceeded"' in answer
            assert b"\r\nretry-after: 1\r\n" in answer
    passes(gateway, hog)


def answered(sock: socket.socket, seconds: float) -> bool:
    """Return whether something can be read within this time."""
    sock.settimeout(seconds)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False


def passes(gateway: Gateway, key: str) -> None:
    """Assert that all of the account's memory is free: two of the largest bodies, which need all of
    it, are served side by side."""
    until_held(gateway, 0)
    with unfinished(gateway, key, 2, MAX_BODY) as socks:
        for sock in socks:
            sock.setblocking(True)
            sock.sendall(b"}")
        for sock in socks:
            assert sock.recv(20).startswith(b"HTTP/1.1 200 ")
    until_held(gateway, 0)


def test_no_memory_is_lost_whatever_happens_to_a_body(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(server(body_timeout_seconds=30, queue_seconds=30)).start()
    key, draw = gateway.new_key(concurrency=2), random.Random(5)
    whole = body(MAX_BODY)
    packed = compressed()
    for round_ in range(36):
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
            kind = round_ % 6
            if kind == 0:
                sock.sendall(head(key, f"Content-Length: {MAX_BODY}"))
                sock.sendall(whole[: draw.randrange(MAX_BODY)])
            elif kind == 1:
                sock.sendall(head(key, "Transfer-Encoding: chunked"))
                size = draw.randrange(1, MAX_BODY)
                sock.sendall(b"%x\r\n" % size + whole[: draw.randrange(size)])
            elif kind == 2:
                lines = [f"Content-Length: {len(packed)}", "Content-Encoding: gzip"]
                sock.sendall(head(key, *lines) + packed[: draw.randrange(len(packed))])
            elif kind == 3:
                lines = [f"Content-Length: {len(packed)}", "Content-Encoding: gzip"]
                sock.sendall(head(key, *lines) + packed[:-9] + b"123456789")
                assert sock.recv(20).startswith(b"HTTP/1.1 400 ")
            elif kind == 4:
                sock.sendall(head(key, f"Content-Length: {MAX_BODY}") + b"{" * MAX_BODY)
                assert sock.recv(20).startswith(b"HTTP/1.1 400 ")
            else:
                method = "POST /v1/responses/resp_x/cancel"
                sock.sendall(head(key, f"Content-Length: {MAX_BODY}", method=method))
                assert sock.recv(20).startswith(b"HTTP/1.1 404 ")
    passes(gateway, key)


def test_what_waits_for_all_gives_back_what_its_account_gave(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(server(queue_seconds=0.2)).start()
    third = gateway.new_key("third")
    with contextlib.ExitStack() as stack:
        for name in ("one", "two"):
            stack.enter_context(unfinished(gateway, gateway.new_key(name), 2, MAX_BODY))
        stack.enter_context(unfinished(gateway, third, 1, MAX_BODY))
        with gateway.client(gateway.new_key("fourth")) as client:  # an account has some of its own
            served = client.post("/responses", content=body(4 * MB), headers=JSON)
            assert served.status_code == 200
        with gateway.client(third) as client:
            for _ in range(3):
                refused = client.post("/responses", content=body(MAX_BODY), headers=JSON)
                assert refused.status_code == 429
                assert "bodies at once for this gateway" in refused.json()["error"]["message"]
    passes(gateway, third)


def test_few_small_bodies_of_an_account_are_not_counted(make_gateway: MakeGateway) -> None:
    """With 256 requests an account has used up what is not counted: the next ones need memory, of
    which two large bodies leave 128 KB. When one ends, a small body is free again."""
    gateway = make_gateway(server(queue_seconds=0.2)).start()
    key, small = gateway.new_key(), 64 << 10
    with (
        unfinished(gateway, key, 2, MAX_BODY),
        unfinished(gateway, key, 253, small),
        gateway.client(key) as client,
    ):
        with unfinished(gateway, key, 2, small):
            assert client.post("/responses", json=SMALL).is_success
            with unfinished(gateway, key, 1, small):
                assert client.post("/responses", json=SMALL).status_code == 429
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 255)
        assert client.post("/responses", content=body(small), headers=JSON).is_success
    passes(gateway, key)


def test_bodies_that_grow_in_each_others_way_do_not_lock(make_gateway: MakeGateway) -> None:
    """Five bodies of 8 MB without a length share 16 MB: those that wait too long are refused."""
    gateway = make_gateway(server(queue_seconds=1)).start()
    key, gate = gateway.new_key(), threading.Barrier(5)

    def pieces() -> Iterator[bytes]:
        whole = body(MAX_BODY)
        yield whole[: 4 * MB]
        gate.wait(60)
        yield whole[4 * MB :]

    def post(_: int) -> str | int:
        with gateway.client(key, timeout=60) as client:
            answer = client.post("/responses", content=pieces(), headers=JSON)
            return code(answer) if answer.status_code == 429 else answer.status_code

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(post, range(5)))
    assert set(answers) <= {200, "concurrency_limit_exceeded"}
    assert 200 in answers
    passes(gateway, key)


def test_waiting_for_memory_is_not_the_clients_slowness(make_gateway: MakeGateway) -> None:
    """The client is told to continue when there is memory, and its time counts from then."""
    gateway = make_gateway(server(body_timeout_seconds=2)).start()
    key = gateway.new_key()
    whole = body(MAX_BODY)
    with (
        unfinished(gateway, key, 2, MAX_BODY) as (first, second),
        socket.create_connection(("127.0.0.1", gateway.port), 60) as waiting,
    ):
        waiting.sendall(head(key, f"Content-Length: {MAX_BODY}", "Expect: 100-continue"))
        for sock in (first, second):
            assert answered(sock, 60)
            assert sock.recv(20).startswith(b"HTTP/1.1 408 ")
        assert waiting.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        time.sleep(0.8)
        waiting.sendall(whole)
        assert waiting.recv(20).startswith(b"HTTP/1.1 200 ")


def test_the_decoded_copy_takes_memory_while_it_waits_for_a_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(server(queue_seconds=300)).start()
    key, release = gateway.new_key(concurrency=1), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await json_answer(response_object())(request, reply)

    upstream.script = script
    packed = compressed()
    assert 4 * MB < len(packed) < 6 * MB  # with the copy more than 12 MB of 16

    def post(_: int) -> httpx2.Response:
        with gateway.client(key, timeout=60) as client:
            headers = {**JSON, "content-encoding": "gzip"}
            return client.post("/responses", content=packed, headers=headers)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, 1)
        wait_until(lambda: upstream.in_flight, 60)
        second = pool.submit(post, 2)
        wait_until(lambda: gateway.metrics()["redbtc_queued"] == 1, 60)
        gateway.configure(server(queue_seconds=0.1))
        gateway.signal(1)
        wait_until(lambda: '"reloaded"' in gateway.log())
        third = pool.submit(post, 3)
        assert "large request bodies" in third.result().json()["error"]["message"]
        release.set()
        assert first.result().is_success
        assert second.result().is_success
    passes(gateway, key)


def has_queued(gateway: Gateway, number: int) -> bool:
    return gateway.metrics()["redbtc_queued"] == number


def test_the_ids_in_a_body_take_memory_while_it_waits_for_a_place(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(server(queue_seconds=300)).start()
    key, release = gateway.new_key(concurrency=1), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.wait(release)
        await json_answer(response_object())(request, reply)

    upstream.script = script
    items = [{"id": f"{number}", "role": "user", "content": ""} for number in range(20_000)]

    def post(given: list[dict[str, str]]) -> httpx2.Response:
        with gateway.client(key, timeout=60) as client:
            return client.post("/responses", json={**SMALL, "input": given})

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, [])]
        wait_until(lambda: upstream.in_flight, 60)
        for number in range(1, 4):
            waiting.append(pool.submit(post, items))
            wait_until(functools.partial(has_queued, gateway, number), 60)
        gateway.configure(server(queue_seconds=0.1))
        gateway.signal(1)
        wait_until(lambda: '"reloaded"' in gateway.log())
        refused = post(items).json()["error"]["message"]
        assert "large request bodies" in refused, "16 MB hold three bodies of 1 MB with ids of 4 MB"
        release.set()
        assert all(each.result().is_success for each in waiting)
    passes(gateway, key)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_amounts_are_given_in_turn(data: st.DataObject) -> None:
    async def run() -> None:
        places, limit = Places(), 10
        waiting: list[tuple[int, asyncio.Task[None]]] = []
        held: list[int] = []
        for _ in range(data.draw(st.integers(1, 30))):
            what = data.draw(st.sampled_from(["take", "give", "leave"]))
            if what == "take":
                amount = data.draw(st.integers(1, limit))
                if places.take_now(limit, amount):
                    assert not waiting, "nobody passes those who wait"
                    held.append(amount)
                else:
                    task = asyncio.create_task(places.take_in_turn(amount))
                    waiting.append((amount, task))
            elif what == "give" and held:
                places.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
            elif what == "leave" and waiting:
                _, task = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            while waiting and waiting[0][1].done():
                amount, task = waiting.pop(0)
                held.append(amount)
            assert not [task for _, task in waiting if task.done()], "in turn"
            assert places.taken == sum(held) <= limit
            assert not waiting or places.taken + waiting[0][0] > limit, "nobody waits for nothing"
        for _, task in waiting:
            task.cancel()

    asyncio.run(run())


def test_two_waits_of_an_account_are_each_for_its_own_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second would otherwise stand in everybody's line for the bytes of both."""
    monkeypatch.setattr(memory_module, "OWN_BYTES", 0)
    server = SimpleNamespace(reading_bytes=100)
    settings_: Any = SimpleNamespace(server=server, limits=SimpleNamespace(queue_seconds=60))

    async def run() -> None:
        limits, clocks = Limiter(), Deadlines()

        async def take(account: str, size: int) -> Reservation:
            key: Any = SimpleNamespace(account_id=account)
            reserved = Reservation(limits, key, settings_)  # without `with`: all bytes count
            await reserved.take(size, Deadline(clocks))
            return reserved

        await take("b", 45)
        c = await take("c", 50)
        waiting = [asyncio.create_task(take("a", 10)) for _ in range(2)]
        await asyncio.sleep(0)
        c.give_back(15)
        for task in waiting:
            await asyncio.wait_for(task, 5)
        for task in waiting:
            task.result().give_back(10)
        everybody = limits.memory(cast(Any, SimpleNamespace(account_id="a")))[1]
        assert everybody.reading.taken == 80

    asyncio.run(run())


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_memory_is_counted_right_however_waits_and_returns_interleave(seed: int) -> None:
    """Whoever has memory has it counted, for the account and for the gateway, and all of it comes
    back."""
    draw = random.Random(seed)
    server = SimpleNamespace(reading_bytes=100)
    seconds = SimpleNamespace(queue_seconds=draw.choice([0.001, 0.02]))
    settings_: Any = SimpleNamespace(server=server, limits=seconds)
    real = dict.fromkeys("abc", 0)

    async def run() -> None:
        limits, clocks = Limiter(), Deadlines()

        def check() -> None:
            beyond = 0
            for account, size in real.items():
                limited, everybody = limits.memory(cast(Any, SimpleNamespace(account_id=account)))
                assert size <= limited.reading.taken <= 50
                assert max(0, size - 10) <= limited.shared
                beyond += limited.shared
            assert beyond <= everybody.reading.taken <= 100  # a wait may just have been granted

        async def use() -> None:
            account = draw.choice("abc")
            key: Any = SimpleNamespace(account_id=account)
            reserved, held = Reservation(limits, key, settings_), 0
            with reserved:
                reserved._free = 0
                try:
                    for _ in range(draw.randint(1, 3)):
                        more = draw.randint(1, 16)
                        await reserved.take(more, Deadline(clocks))
                        held += more
                        real[account] += more
                        check()
                        await asyncio.sleep(draw.choice([0, 0, 0.001]))
                        less = draw.randint(0, held)
                        held -= less
                        real[account] -= less
                        reserved.give_back(less)
                        check()
                except NoCapacity:
                    pass
                finally:
                    real[account] -= held
            check()

        tasks = [asyncio.create_task(use()) for _ in range(30)]
        for task in tasks:
            await asyncio.sleep(0)
            if draw.random() < 0.1:
                task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            assert task.cancelled() or task.exception() is None, task.exception()
        assert not any(real.values())
        for account in "abc":
            limited, everybody = limits.memory(cast(Any, SimpleNamespace(account_id=account)))
            counts = limited.waiting, limited.shared, limited.shared_waits, limited.reading.taken
            assert counts == (0, 0, 0, 0)
            assert everybody.reading.taken == limits.queued == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "OWN_BYTES", 10)
        asyncio.run(run())


def test_one_body_must_always_fit() -> None:
    table = {"max_body_bytes": 1_000_000}
    assert parse_settings({"server": table}).server.reading_bytes == 4_000_000
    table["max_reading_bytes"] = 4_000_000
    assert parse_settings({"server": table}).server.reading_bytes == 4_000_000
    table["max_reading_bytes"] = 3_999_999
    with pytest.raises(SettingsError, match=r"server\.max_reading_bytes: found 3999999; .*4000000"):
        parse_settings({"server": table})


def test_leaving_while_a_body_is_read_counts_as_a_request(gateway: Gateway) -> None:
    """Reading was work; only leaving the queue costs nothing."""
    key = gateway.new_key("a", requests_per_minute=2)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
            sock.sendall(head(key, "Content-Length: 1000") + b"{")
            wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 1)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    with gateway.client(key) as client:
        assert code(client.post("/responses", json=SMALL)) == "rate_limit_exceeded"


def test_waiting_for_a_turn_is_not_the_clients_slowness() -> None:
    """A form is parsed as it arrives, and takes turns with the account's other bodies: one that had
    arrived whole was answered 408. Only its first part waits for others to be done."""

    works: list[asyncio.Task[None]] = []
    begun = 0

    def busy() -> Generator[None, None, None]:
        nonlocal begun
        begun += 1
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            yield

    async def run() -> None:
        clocks, limits, settings = Deadlines(), Limiter(), parse_settings({"server": SLOW})
        key = Key._make(["key", "account", "active", *[None] * 11, "key", None])
        parts = iter([b"--b\r\n" + bytes(100)] + [bytes(100)] * 20 + [b"\r\n--b--"])

        async def receive() -> Message:
            works.append(asyncio.create_task(in_slices(busy(), "account")))
            await asyncio.sleep(0)
            part = next(parts)
            return {"type": "http.request", "body": part, "more_body": not part.endswith(b"--")}

        with Reservation(limits, key, settings) as reserved:
            works.extend(asyncio.create_task(in_slices(busy(), "account")) for _ in range(5))
            clock, form = Deadline(clocks), SteppedForm(b"b")
            await read_body([], receive, clock, settings, reserved, form)
            assert begun < 15, "the later parts had to wait for later bodies"
        for work in works:
            work.cancel()

    class SteppedForm(Form):
        def grow(self, _: Buffer) -> Steps[None]:
            yield

    asyncio.run(run())
