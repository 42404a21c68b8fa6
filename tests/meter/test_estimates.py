"""Where bytes of an answer passed and nobody said what was used, the row is estimated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import httpx2
import msgspec
import pytest
from websockets.sync.client import connect

from redbtc.billing.price_table import PriceTable
from redbtc.billing.prices import Price
from redbtc.billing.spending import Hold, Quote, Spending
from redbtc.config import Settings
from redbtc.gateway.endpoints import Endpoint
from redbtc.gateway.maximum import Maximum
from redbtc.gateway.settlement import of_models
from redbtc.meter.estimates import MaximumUsage, Progress, SeenOutput, estimate
from redbtc.meter.report import Report
from redbtc.request_body.body import RequestBody
from redbtc.store.speeds import speed_for, speed_of_accounts, speed_of_rows
from redbtc.usage import MAX_TOKENS, Usage
from tests.helpers.gateway import Gateway, MakeGateway, free_port, wait_until
from tests.helpers.upstream import (
    DONE,
    IMAGE_USAGE,
    RESPONSE_USAGE,
    Received,
    Reply,
    Socket,
    Upstream,
    chat_chunk,
    chat_json,
    chat_pieces,
    event,
    images_pieces,
    json_answer,
    openai_like,
    response_object,
    response_pieces,
    stream,
)

pytestmark = pytest.mark.promise_2

CHAT: dict[str, Any] = {"model": "gpt-up", "messages": [{"role": "user", "content": "Hi"}]}
BODY: dict[str, Any] = {"model": "gpt-up", "input": "Hi"}
CANCEL = '[metering]\non_disconnect = "cancel"\n'
TEXT = "word " * 13_600  # 68 KB: 17,000 tokens by its size
SSE = [("content-type", "text/event-stream")]


@pytest.fixture
def ask(make_gateway: MakeGateway) -> Callable[..., Gateway]:
    """A gateway at 5 and 30 a million."""

    def started(settings: str = CANCEL, upstream_settings: str = "") -> Gateway:
        gateway = make_gateway(settings + "[billing]\n", upstream_settings).start()
        prices = [{"model": "*", "input": "5", "output": "30"}]
        gateway.api("POST", "/prices", {"prices": prices})
        return gateway

    return started


def created(response_id: str = "resp_1", status: str = "in_progress") -> bytes:
    response = response_object(id=response_id, status=status, usage=None, output=[])
    return event({"type": "response.created", "response": response}, "response.created")


def delta(text: str) -> bytes:
    return event({"type": "response.output_text.delta", "delta": text}, "x")


def settled(gateway: Gateway) -> dict[str, Any]:
    wait_until(lambda: [row["outcome"] for row in gateway.rows()] not in ([], ["pending"]))
    return gateway.row()


def estimated(gateway: Gateway, outcome: str) -> dict[str, Any]:
    row = settled(gateway)
    assert (row["outcome"], row["usage_source"]) == (outcome, "estimated"), row
    return row


def read_until(gateway: Gateway, body: dict[str, Any], marker: bytes, path: str) -> None:
    """Ask, and leave when the marker has come."""
    with (
        gateway.client(gateway.new_key()) as client,
        client.stream("POST", path, json={**body, "stream": True}) as answer,
    ):
        seen = b""
        for part in answer.iter_raw():
            seen += part
            if marker in seen:
                break


# The table


def test_an_own_server_that_hangs(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    """Upstream's bill: 0.51."""
    gateway = ask(upstream_settings="idle_timeout_seconds = 0.5")

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(created() + delta(TEXT))
        await reply.wait(request.closed)

    upstream.script = script
    with contextlib.suppress(httpx2.HTTPError):
        read_until(gateway, BODY, b"nothing like this", "/responses")
    assert Decimal("0.5") < Decimal(estimated(gateway, "upstream_failed")["cost"]) < 1


@pytest.mark.parametrize("metering", [CANCEL, "[metering]\ndrain_seconds = 1\n"])
def test_who_leaves_while_filler_runs(
    ask: Callable[..., Gateway], upstream: Upstream, metering: str
) -> None:
    gateway = ask(metering)

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(b"".join(chat_pieces([TEXT])[:-2]))
        while not request.closed.is_set():
            await reply.send(b": filler\n\n")
            await reply.wait(request.closed, 0.05)

    upstream.script = script
    read_until(gateway, CHAT, b"filler", "/chat/completions")
    row = estimated(gateway, "client_disconnected")
    assert Decimal("0.5") < Decimal(row["cost"]) < 1
    assert row["output_tokens"] == 17_000


def test_hidden_reasoning_costs_its_time(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    """Nothing of it is seen, with two choices at once."""
    gateway = ask()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(b": wait\n\n")
        await reply.wait(request.closed)

    upstream.script = script
    begun = time.monotonic()
    with (
        gateway.client(gateway.new_key()) as client,
        client.stream("POST", "/chat/completions", json={**CHAT, "stream": True, "n": 2}) as answer,
    ):
        parts = answer.iter_raw()
        next(parts)
        time.sleep(1)
    row = estimated(gateway, "client_disconnected")
    assert 2 * 60 <= row["output_tokens"] <= 2 * 60 * (time.monotonic() - begun) + 2


def test_it_is_never_more_than_the_request_allows(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    gateway = ask()
    upstream.script = stream([created(), delta(TEXT)], end="tear")
    with contextlib.suppress(httpx2.HTTPError):
        read_until(gateway, {**BODY, "max_output_tokens": 50}, b"nothing", "/responses")
    assert estimated(gateway, "upstream_failed")["output_tokens"] == 50


def test_encrypted_reasoning_and_pictures_count() -> None:
    report, most = Report(images=False), MaximumUsage(1000, 10_000, 5000, 3, 3)
    seen = SeenOutput(text_bytes=40, sealed_bytes=4000, image_tokens=4160, web_searches=2)
    usage, parts, _ = estimate(
        report, seen, written=5, read=7, maximum=most, images=False, partly=False
    )
    assert (usage.input_tokens, usage.output_tokens) == (7, 10 + 750)
    assert (usage.image_output_tokens, usage.web_searches) == (4160, 2)
    assert [(part.model, part.usage.output_tokens) for part in parts] == [
        (None, 760),
        ("image_generation", 4160),
    ]


def test_a_picture_of_the_request_is_no_text() -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 400_000}
    message = {"role": "user", "content": [picture, {"type": "input_text", "text": "x" * 400}]}
    content = content_of({"model": "m", "input": [message]})
    assert 1600 < content.input_estimate < 1700
    content.inherited.likely_tokens = 100_000
    assert content.input_estimate > 101_600


# What is not estimated, or only in part


def test_an_upstream_that_never_reports(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    gateway = ask()
    upstream.script = chat_json(usage=None)
    with gateway.client(gateway.new_key()) as client:
        client.post("/chat/completions", json={**CHAT, "messages": ["x" * 4000]})
    row = estimated(gateway, "completed")
    assert 1000 <= row["input_tokens"] <= 1050
    assert row["output_tokens"] >= 1


@pytest.mark.parametrize("status", [400, 500])
def test_an_error_is_no_use(ask: Callable[..., Gateway], upstream: Upstream, status: int) -> None:
    gateway = ask()
    upstream.script = json_answer({"error": {"message": "no"}}, status)
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json=BODY)
    assert settled(gateway)["usage_source"] == "none"


@pytest.mark.parametrize("output", [True, False])
def test_an_error_event_counts_what_was_written_before(
    ask: Callable[..., Gateway], upstream: Upstream, output: bool
) -> None:
    gateway = ask()
    failed = response_object(id="resp_1", status="failed", usage=None, output=[])
    pieces = [created(), *([delta("x" * 4000)] * output)]
    pieces.append(event({"type": "response.failed", "response": failed}, "response.failed"))
    upstream.script = stream(pieces)
    read_until(gateway, BODY, b"nothing like this", "/responses")
    row = settled(gateway)
    assert row["outcome"] == "upstream_error"
    assert row["output_tokens"] == (1000 if output else None)


def test_what_is_reported_in_part_counts(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    gateway = ask()
    upstream.script = stream([*chat_pieces(["x" * 4000], usage={"prompt_tokens": 777})])
    read_until(gateway, CHAT, b"nothing like this", "/chat/completions")
    row = estimated(gateway, "completed")
    assert (row["input_tokens"], row["output_tokens"]) == (777, 1000)


def test_one_of_three_pictures_is_known(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    gateway = ask()
    upstream.script = stream(images_pieces(1), end="tear")
    body = {"model": "gpt-up", "prompt": "x", "n": 3}
    with contextlib.suppress(httpx2.HTTPError):
        read_until(gateway, body, b"nothing", "/images/generations")
    row = estimated(gateway, "upstream_failed")
    assert row["input_tokens"] == IMAGE_USAGE["input_tokens"]
    assert row["output_tokens"] >= IMAGE_USAGE["output_tokens"]
    assert row["image_output_tokens"] == row["output_tokens"]


def test_usage_that_is_known_wins(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    """Whatever passes after it."""
    gateway = ask("[metering]\ndrain_seconds = 1\n")

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(b"".join(chat_pieces(["x" * 4000])[:-1]))
        await reply.send(b": filler\n\n")
        await reply.wait(request.closed)

    upstream.script = script
    read_until(gateway, CHAT, b"filler", "/chat/completions")
    row = settled(gateway)
    assert (row["usage_source"], row["output_tokens"]) == ("upstream", 7)


def test_time_in_the_queue_is_no_work(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    gateway = ask()
    key = gateway.new_key(concurrency=1)

    async def script(request: Received, reply: Reply) -> None:
        if len(upstream.requests) == 1:
            await asyncio.sleep(1.5)
            await openai_like(request, reply)
        else:
            await stream([created()], end="tear")(request, reply)

    upstream.script = script

    def post() -> None:
        with gateway.client(key) as client, contextlib.suppress(httpx2.HTTPError):
            client.post("/responses", json={**BODY, "stream": True})

    first = threading.Thread(target=post)
    first.start()
    wait_until(lambda: upstream.in_flight)
    post()
    first.join()
    row = gateway.rows()[-1]
    assert row["usage_source"] == "estimated"
    assert row["duration_ms"] > 1000
    assert row["output_tokens"] < 60


def test_what_is_cut_off_by_the_end_of_the_process(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway("drain_seconds = 0.3\n").start()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(created() + delta("x" * 4000))
        await reply.wait(request.closed)

    upstream.script = script
    with (
        gateway.client(gateway.new_key()) as client,
        client.stream("POST", "/responses", json={**BODY, "stream": True}) as answer,
        contextlib.suppress(httpx2.HTTPError),
    ):
        for _ in answer.iter_raw():
            if not gateway.expected_dead:
                gateway.terminate(wait=False)
    assert gateway.wait() == 0
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("interrupted", "estimated")
    assert row["output_tokens"] >= 1000


def preserved(gateway: Gateway) -> list[str]:
    """What is kept of requests in flight, should the process be killed."""
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        sql = """SELECT settled FROM unsettled UNION ALL
            SELECT seen FROM background WHERE json_extract(seen, '$.seen.text_bytes') > 0"""
        return [found for (found,) in database.execute(sql)]


@pytest.mark.parametrize("how", ["chat", "responses", "images", "json", "websocket", "background"])
def test_what_passed_before_a_kill_is_paid(
    ask: Callable[..., Gateway], upstream: Upstream, how: str
) -> None:
    gateway, seen = ask(), 17_000
    pieces = {
        "chat": chat_pieces([TEXT])[:-2],
        "images": images_pieces()[:1],
        "json": [b'{"id":"resp_1","object":"response","model":"gpt-up","output":[', b" " * 70_000],
    }.get(how, [created(), delta(TEXT)])

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(response_object(status="cancelled", usage=None))(request, reply)
            return
        headers = [("content-type", "application/json")] if how == "json" else SSE
        await reply.head(200, headers)
        await reply.send(b"".join(pieces))
        await reply.wait(request.closed)

    async def talk(sock: Socket) -> None:
        response = response_object(status="in_progress", usage=None, output=[])
        await sock.recv()
        await sock.send({"type": "response.created", "response": response})
        await sock.send({"type": "response.output_text.delta", "delta": TEXT})
        await sock.recv()

    upstream.script, upstream.talk = script, talk
    key = gateway.new_key()
    with contextlib.ExitStack() as stack:
        if how == "websocket":
            url = f"ws://127.0.0.1:{gateway.port}/v1/responses"
            given = {"authorization": f"Bearer {key}"}
            sock = stack.enter_context(connect(url, additional_headers=given, proxy=None))
            sock.send(json.dumps({"type": "response.create", **BODY}))
        else:
            path = {"chat": "chat/completions", "images": "images/generations"}
            body = CHAT if how == "chat" else {"model": "gpt-up", "prompt": "A fox"}
            body = body if how in path else {**BODY, "background": how == "background"}
            sent = {**body, "stream": how != "json"}
            client = stack.enter_context(gateway.client(key))
            at = f"/{path.get(how, 'responses')}"
            stack.enter_context(client.stream("POST", at, json=sent))
        wait_until(lambda: preserved(gateway))
        (row,) = gateway.rows()
        assert (row["outcome"], row["usage_source"]) == ("pending", "none")
        assert (row["output_tokens"], row["cost"]) == (None, None)
        gateway.kill()
    if how == "background":
        gateway.start()
        row = estimated(gateway, "client_disconnected")
    else:  # also for a command while no gateway runs
        row = estimated(gateway, "interrupted")
        assert not preserved(gateway)
        gateway.start()
    assert row["output_tokens"] >= (60 if how in ("json", "images") else seen)
    assert Decimal(row["cost"]) >= row["output_tokens"] * Decimal("0.00003")
    account = gateway.api("GET", "/accounts/test")
    assert (account["balance"], account["held"]) == (f"-{row['cost']}", "0")
    assert gateway.cli("db", "check")["ok"]


def test_what_passed_before_a_kill_is_counted_for_the_upstream_that_sent_it(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The first one could not be reached."""
    ports = {"first": free_port(), "second": upstream.port}
    settings = CANCEL + "".join(
        f'[[upstreams]]\nname = "{name}"\nbase_url = "http://127.0.0.1:{port}/v1"\n'
        f'api_key_env = "TEST_UPSTREAM_KEY"\npriority = {priority}\n'
        for priority, (name, port) in enumerate(ports.items())
    )
    gateway = make_gateway(settings).start()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(created())
        await reply.wait(request.closed)

    upstream.script = script
    body = {**BODY, "stream": True}
    with (
        gateway.client(gateway.new_key()) as client,
        client.stream("POST", "/responses", json=body),
    ):
        wait_until(lambda: preserved(gateway))
        gateway.kill()
    gateway.start()
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("interrupted", "estimated")
    assert row["upstream"] == "second"


def test_a_request_that_ends_leaves_nothing_for_a_kill(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    """Nor does one whose response goes on in the background."""
    gateway, goes_on = ask(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(b": ping\n\n")
        await reply.wait(goes_on)
        await reply.send(created() + b"".join(response_pieces(["x"])))
        await reply.end()

    upstream.script = script
    with gateway.client(gateway.new_key()) as client:
        for background in (False, True):
            goes_on.clear()
            body = {**BODY, "stream": True, "background": background}
            with client.stream("POST", "/responses", json=body) as answer:
                wait_until(lambda: preserved(gateway))
                goes_on.set()
                answer.read()
            assert not preserved(gateway)
    before = gateway.rows()
    assert [row["usage_source"] for row in before] == ["upstream", "upstream"]
    gateway.kill()
    assert gateway.rows() == before


# Background


def test_background_output_that_was_fetched_counts(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    """Upstream's bill: 0.51. It is known after a restart, too."""
    gateway = ask()
    status = "queued"

    async def script(request: Received, reply: Reply) -> None:
        if "stream=true" in request.path:
            await reply.head(200, SSE)
            await reply.send(created("resp_1", "queued") + delta(TEXT))
            await reply.wait(request.closed)
        await json_answer(response_object(status=status, usage=None, output=[]))(request, reply)

    upstream.script = script
    key = gateway.new_key()
    with gateway.client(key) as client:
        client.post("/responses", json={**BODY, "background": True})
        with client.stream("GET", "/responses/resp_1?stream=true") as answer:
            seen = 0
            for part in answer.iter_raw():
                seen += len(part)
                if seen > len(TEXT):
                    break
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        gateway.restart()
        status = "cancelled"
        client.post("/responses/resp_1/cancel")
    row = estimated(gateway, "client_disconnected")
    assert Decimal("0.5") < Decimal(row["cost"]) < 1


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_background_time_counts_since_it_was_not_queued(
    ask: Callable[..., Gateway], upstream: Upstream, status: str
) -> None:
    gateway = ask()

    async def script(request: Received, reply: Reply) -> None:
        now = "cancelled" if request.path.endswith("/cancel") else status
        await json_answer(response_object(status=now, usage=None, output=[]))(request, reply)

    upstream.script = script
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json={**BODY, "background": True})
        time.sleep(1)
        client.post("/responses/resp_1/cancel")
    row = estimated(gateway, "client_disconnected")
    assert (row["output_tokens"] >= 60) == (status == "in_progress")
    assert (row["output_tokens"] == 0) == (status == "queued")


@pytest.mark.parametrize("text", [TEXT, ""])
def test_a_cancelled_response_with_the_usage_of_its_beginning(
    ask: Callable[..., Gateway], upstream: Upstream, text: str
) -> None:
    """Its usage of 0 is believed where nothing was seen of it but that it was queued."""
    gateway, status = ask(), "queued"

    async def script(request: Received, reply: Reply) -> None:
        if status == "queued":
            await reply.head(200, SSE)
            await reply.send(created("resp_1", "queued") + (delta(text) if text else b""))
            await reply.wait(request.closed)
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        await json_answer(response_object(status=status, usage=usage, output=[]))(request, reply)

    upstream.script = script
    key = gateway.new_key()
    body = {**BODY, "background": True, "stream": True}
    with (
        gateway.client(key) as client,
        client.stream("POST", "/responses", json=body) as answer,
    ):
        seen = 0
        for part in answer.iter_raw():
            seen += len(part)
            if seen > len(text):
                break
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    status = "cancelled"
    with gateway.client(key) as client:
        client.post("/responses/resp_1/cancel")
    row = settled(gateway)
    assert row["usage_source"] == ("estimated" if text else "upstream")
    assert (Decimal("0.5") < Decimal(row["cost"]) < 1) == bool(text)
    assert (row["cost"] == "0") == (not text)


@pytest.mark.parametrize("status", [200, 503, 0])
def test_a_background_response_that_never_ends_is_given_up(
    ask: Callable[..., Gateway], upstream: Upstream, status: int
) -> None:
    """After a restart it is asked for once more first."""
    gateway = ask()
    ended = False
    upstream.script = json_answer(response_object(status="in_progress", usage=None, output=[]))
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json={**BODY, "background": True})
    gateway.kill()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute("UPDATE requests SET started_at = started_at - 48 * 3600000")
        database.commit()
    upstream.requests.clear()
    if ended := not status:
        upstream.script = json_answer(response_object(usage=RESPONSE_USAGE))
    else:
        upstream.script = json_answer({}, status)
    gateway.start()
    row = settled(gateway)
    assert row["usage_source"] == ("upstream" if ended else "estimated")
    assert row["outcome"] == ("completed" if ended else "upstream_failed")
    assert upstream.requests, "it was asked for"
    assert gateway.api("GET", "/accounts/test")["held"] == "0"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_id_pays_for_the_background_response(
    ask: Callable[..., Gateway], upstream: Upstream, stream: bool
) -> None:
    """It goes on at the upstream, where its tools can give its output to the client."""
    gateway, left = ask(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await json_answer(response_object())(request, reply)
            return
        await reply.wait(left)
        if not stream:
            await json_answer(response_object(status="queued", usage=None))(request, reply)
        await reply.head(200, SSE)
        await reply.send(created())
        await reply.wait(request.closed)

    upstream.script = script
    body = {**BODY, "background": True, "stream": stream}
    with gateway.begin(gateway.new_key(), body):
        wait_until(lambda: upstream.requests)
    wait_until(lambda: gateway.connections() == 0)
    left.set()
    row = settled(gateway)
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")
    assert gateway.metrics()["redbtc_in_flight"] == 0


def test_another_response_says_nothing(ask: Callable[..., Gateway], upstream: Upstream) -> None:
    """An upstream that mixes up its answers bills nobody for the response of somebody else."""
    gateway, asked = ask(), 0

    async def script(request: Received, reply: Reply) -> None:
        nonlocal asked
        asked += request.method == "GET"
        response = response_object(status="queued", usage=None, output=[])
        if asked == 1:
            usage = {**RESPONSE_USAGE, "output_tokens": 90_000}
            response = response_object(id="resp_2", usage=usage)
        if asked == 2:
            response = response_object()
        await json_answer(response)(request, reply)

    upstream.script = script
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json={**BODY, "background": True})
    row = settled(gateway)
    assert (row["usage_source"], row["output_tokens"]) == ("upstream", 9)


def test_output_of_another_response_is_not_seen(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    gateway, status = ask(), "queued"
    message = {"type": "message", "content": [{"type": "output_text", "text": TEXT}]}

    async def script(request: Received, reply: Reply) -> None:
        response = response_object(status=status, usage=None, output=[])
        if request.header("x-client-request-id"):
            response |= {"id": "resp_2", "status": "in_progress", "output": [message]}
        await json_answer(response)(request, reply)

    upstream.script = script
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json={**BODY, "background": True})
        other = client.get("/responses/resp_1", headers={"x-client-request-id": "1"})
        assert other.json()["id"] == "resp_2"
        status = "cancelled"
        client.post("/responses/resp_1/cancel")
    assert estimated(gateway, "client_disconnected")["output_tokens"] == 0


def test_progress() -> None:
    progress = Progress(SeenOutput(), 1000, 1000)
    progress.note("queued", 5000)
    assert progress.worked_seconds == 0
    progress.note("in_progress", 8000)
    progress.note("queued", 9000)  # of an odd upstream
    assert progress.worked_seconds == 4


# Speeds


def test_a_speed_is_hardly_moved_by_one_account() -> None:
    honest = speed_of_rows([(100.0, 1000), (90.0, 500), (3.0, 5)])
    assert honest == 100
    slow, fast = speed_of_rows([(1.0, 10)] * 100), speed_of_rows([(9000.0, 10_000)] * 100)
    assert speed_of_accounts([honest]) == 100
    assert speed_of_accounts([honest, slow]) == 100
    assert speed_of_accounts([honest, slow, honest]) == 100
    assert speed_of_accounts([honest, fast, honest]) == 100


def test_nobody_is_slow_alone() -> None:
    assert speed_for("a", {}) == 60
    assert speed_for("a", {"a": 0.1}) == 60
    assert speed_for("a", {"a": 500}) == 500
    assert speed_for("a", {"a": 0.1, "b": 30}) == 30
    assert speed_for("b", {"a": 0.1, "b": 30}) == 30
    assert speed_for("b", {"a": 25, "b": 0.1, "c": 30}) == 30


@pytest.mark.parametrize(
    ("tokens", "others", "speed"), [(20_000, 1, 10_000), (1, 1, 60), (40, 0, 20)]
)
def test_the_speed_is_that_of_the_ledger(
    ask: Callable[..., Gateway], upstream: Upstream, tokens: int, others: int, speed: int
) -> None:
    """Of an account that has no others beside it, its own rows decide alone."""
    gateway = ask()
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json=BODY)
    for number in range(others):
        with gateway.client(gateway.new_key(f"other {number}")) as client:
            client.post("/responses", json={**BODY, "model": "other"})
    gateway.kill()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        database.execute(
            """INSERT INTO requests (request_id, account_id, key_id, endpoint, model,
                   requested_model, upstream, started_at, duration_ms, status, outcome,
                   usage_source, output_tokens, month, cost)
               SELECT 'req_a', account_id, key_id, endpoint, model, requested_model, upstream,
                   started_at, 2000, 200, 'completed', 'upstream', ?, month, 0 FROM requests
             WHERE requested_model <> 'other'""",
            (tokens,),
        )
        database.commit()
    gateway.start()
    upstream.script = stream([created(), delta("x")], 0.2, end="tear")
    with contextlib.suppress(httpx2.HTTPError):
        read_until(gateway, BODY, b"nothing", "/responses")
    row = gateway.rows()[-1]
    seconds = row["duration_ms"] / 1000
    assert 0.2 * speed <= row["output_tokens"] <= seconds * speed + 1


def test_what_builds_on_torn_answers_is_estimated_by_what_they_likely_had(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    """It is held for the most that they can have had, but not billed."""
    gateway, turns = ask(), 3
    body: dict[str, Any] = {**BODY, "stream": True}
    with gateway.client(gateway.new_key()) as client:
        for turn in range(turns):
            upstream.script = stream([created(f"resp_{turn}"), delta("Hello")], end="tear")
            with contextlib.suppress(httpx2.HTTPError):
                client.post("/responses", json=body)
            body["previous_response_id"] = f"resp_{turn}"
    wait_until(lambda: len([row for row in gateway.rows() if row["outcome"] != "pending"]) == turns)
    rows = gateway.rows()
    assert {row["usage_source"] for row in rows} == {"estimated"}
    assert rows[0]["input_tokens"] < rows[1]["input_tokens"] < rows[2]["input_tokens"] < 1000


# Never more than the hold


def content_of(body: dict[str, Any]) -> RequestBody:
    text = msgspec.json.encode(body)
    steps = RequestBody.read_body(text, text)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            content: RequestBody = done.value
            return content


ENDPOINTS = [
    Endpoint("/v1/chat/completions", chat=True),
    Endpoint("/v1/responses", stores=True),
    Endpoint("/v1/images/generations", images=True),
]
TIERS = [None, "default", "flex", "priority"]


def random_prices(chance: random.Random) -> PriceTable:
    def rate() -> int | None:
        return chance.choice([None, chance.randrange(10**12)])

    def one(model: str, tier: str, above: int) -> Price:
        most = chance.choice([None, chance.randrange(1, 10_000)])
        return Price(
            model,
            tier,
            above,
            input=rate(),
            cached_input=rate(),
            output=rate(),
            image_input=rate(),
            image_output=rate(),
            max_output_tokens=most,
        )

    models = chance.sample(["m", "gpt-image-2.6-sunburst"], chance.randrange(1, 3))
    slots = [(m, t, a) for m in models for t in ("default", "flex") for a in (0, 300)]
    chosen = [slot for slot in slots if slot[1:] == ("default", 0) or chance.random() < 0.5]
    return PriceTable(one(*slot) for slot in chosen)


def random_request(chance: random.Random, endpoint: Endpoint) -> dict[str, Any]:
    picture = {"type": "input_image", "image_url": "data:," + "A" * chance.randrange(9000)}
    words = {"type": "input_text", "text": "x" * chance.randrange(5000)}
    content = chance.sample([picture, words], chance.randrange(3))
    body: dict[str, Any] = {"model": "m", "service_tier": chance.choice(TIERS)}
    named = "messages" if endpoint.chat else "input"
    body[named] = [{"role": "user", "content": content}]
    if not endpoint.stores and chance.random() < 0.5:
        body["n"] = chance.randrange(1, 5)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if chance.random() < 0.3:
            body[name] = chance.randrange(1, 5000)
    if endpoint.stores and chance.random() < 0.5:
        body["tools"] = [{"type": "image_generation"}]
    return body


def maximum_and_hold(
    chance: random.Random, body: RequestBody, endpoint: Endpoint
) -> tuple[Maximum, Hold]:
    """Return the maximum of a request with these bodies, and a hold at random prices."""
    prices = random_prices(chance)
    billing: Any = SimpleNamespace(
        settings=Settings().billing,
        model_prices=lambda model: prices.model_prices(model, 1),
        prices_in_force=list,
    )
    key: Any = None
    spending = Spending("2026-11", 0, 0), Spending("2026-11", 0, 0)
    quote = Quote(key, 1, prices, prices.model_prices("m", 1), spending, [])
    return Maximum(endpoint, body, billing), Hold(quote, 0)


@pytest.mark.parametrize("seed", range(300))
def test_an_estimate_is_never_more_than_the_hold(seed: int) -> None:
    chance = random.Random(seed)
    endpoint = chance.choice(ENDPOINTS)
    body = content_of(random_request(chance, endpoint))
    maximum, money = maximum_and_hold(chance, body, endpoint)
    further_input = chance.choice([0, chance.randrange(1000)])
    seen = SeenOutput(*(chance.choice([0, chance.randrange(100_000)]) for _ in range(3)))
    report = Report(endpoint.images)
    used = estimate(
        report,
        seen,
        written=chance.randrange(200_000),
        read=body.input_estimate + chance.choice([0, MAX_TOKENS // 2]),
        maximum=maximum.usage(money, further_input),
        images=endpoint.images,
        partly=False,
    )
    asked = body.facts.service_tier
    tier = chance.choice([None, "default", asked])
    parts = of_models(used.parts, body.image_model())
    _, cost = money.cost(parts, tier)
    if money.model_prices:
        assert cost <= maximum.cost(money.model_prices, further_input)
    assert isinstance(used.usage, Usage)
    if seen or money.model_prices is None:
        assert used.usage.output_tokens


def chat_with_usage(words: list[str], usages: list[dict[str, int] | None]) -> list[bytes]:
    """A streamed chat that reports these usages with its words."""
    pairs = zip(words, usages, strict=True)
    return [event(chat_chunk("gpt-up", {"content": word}, usage=usage)) for word, usage in pairs]


@pytest.mark.parametrize("end", ["clean", "tear"])
def test_usage_that_was_reported_before_the_text_is_not_all(
    ask: Callable[..., Gateway], upstream: Upstream, end: str
) -> None:
    gateway = ask()
    first: dict[str, int] | None = {"prompt_tokens": 20, "completion_tokens": 0}
    pieces = chat_with_usage(["", TEXT], [first, None])
    upstream.script = stream([*pieces, *([DONE] if end == "clean" else [])], end=end)
    body = {**CHAT, "stream": True, "max_tokens": 50_000}
    with gateway.client(gateway.new_key()) as client, contextlib.suppress(httpx2.HTTPError):
        client.post("/chat/completions", json=body)
    row = estimated(gateway, "completed" if end == "clean" else "upstream_failed")
    assert row["input_tokens"] == 20
    assert row["output_tokens"] >= 17_000


def test_usage_that_grows_with_the_text_is_believed(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    gateway = ask()
    usages = [{"prompt_tokens": 20, "completion_tokens": tokens} for tokens in (1, 2, 3)]
    upstream.script = stream([*chat_with_usage(["a", "b", "c"], [*usages]), DONE])
    with gateway.client(gateway.new_key()) as client:
        client.post("/chat/completions", json={**CHAT, "stream": True})
    row = settled(gateway)
    assert (row["usage_source"], row["output_tokens"]) == ("upstream", 3)


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("path", ["/chat/completions", "/responses"])
def test_usage_of_zero_that_is_not_the_last_is_not_believed(
    ask: Callable[..., Gateway], upstream: Upstream, path: str, leaves: bool
) -> None:
    gateway = ask()
    zero = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    written = b"".join(chat_with_usage([TEXT, ""], [zero, zero]))
    if path == "/responses":
        written = delta(TEXT) + begun_with_usage(path)

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(written + b": filler\n\n")
        if leaves:
            await reply.wait(request.closed)
        reply.tear()

    upstream.script = script
    with contextlib.suppress(httpx2.HTTPError):
        body = CHAT if path == "/chat/completions" else BODY
        read_until(gateway, body, b"filler" if leaves else b"nothing like this", path)
    row = estimated(gateway, "client_disconnected" if leaves else "upstream_failed")
    assert Decimal("0.5") < Decimal(row["cost"]) < 1


def test_usage_of_one_of_several_answers_is_not_that_of_all(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    """vLLM (continuous_usage_stats) reports that of the chunk's choice, at the end that of all."""
    gateway = ask()
    text = "x" * 400
    choices = [{"index": index, "delta": {"content": text}} for index in range(4)]
    used = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}
    chunk = {"id": "chatcmpl-1", "model": "gpt-up", "usage": used}
    of_choices = b"".join(event({**chunk, "choices": [choice]}) for choice in choices)
    of_all = event({**chunk, "choices": [], "usage": {**used, "completion_tokens": 400}})
    for written in (of_choices, of_choices + of_all):
        upstream.script = stream([written], end="tear")
        with contextlib.suppress(httpx2.HTTPError):
            body = {**CHAT, "n": 4, "stream_options": {"include_usage": True}}
            read_until(gateway, body, b"nothing like this", "/chat/completions")
    torn, told = gateway.rows()
    assert (torn["usage_source"], torn["input_tokens"]) == ("estimated", 20)
    assert torn["output_tokens"] >= 400
    assert (told["usage_source"], told["output_tokens"]) == ("upstream", 400)


@pytest.mark.parametrize("last", [{}, {"choices": [], "usage": {"prompt_tokens": 20}}])
def test_usage_within_one_of_several_choices_is_not_that_of_all(
    ask: Callable[..., Gateway], upstream: Upstream, last: dict[str, Any]
) -> None:
    """Nor does a last usage without output say how much that was."""
    gateway = ask()
    used = {"prompt_tokens": 20, "completion_tokens": 100}
    choices = [
        {"index": index, "delta": {"content": "x" * 400}, "usage": used} for index in range(4)
    ]
    chunk = {"id": "chatcmpl-1", "model": "gpt-up"}
    written = b"".join(event({**chunk, "choices": [choice]}) for choice in choices)
    written += event({**chunk, **last})
    upstream.script = stream([written, DONE])
    read_until(gateway, {**CHAT, "n": 4}, b"nothing like this", "/chat/completions")
    (row,) = gateway.rows()
    assert (row["usage_source"], row["input_tokens"]) == ("estimated", 20)
    assert row["output_tokens"] >= 400


def begun_with_usage(endpoint: str, output: int = 0) -> bytes:
    """The first event of a stream, which reports usage before any output."""
    if endpoint == "/responses":
        usage = {"input_tokens": 0, "output_tokens": output, "total_tokens": output}
        begun = response_object(status="in_progress", output=[], usage=usage)
        return event({"type": "response.created", "response": begun}, "response.created")
    usage = {"prompt_tokens": 20, "completion_tokens": output}
    return event(chat_chunk("gpt-up", {"role": "assistant", "content": ""}, usage=usage))


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("endpoint", ["/responses", "/chat/completions"])
def test_usage_of_the_beginning_is_not_that_of_hidden_reasoning(
    ask: Callable[..., Gateway], upstream: Upstream, endpoint: str, output: int
) -> None:
    """Who leaves while the model reasons pays for the seconds. Anthropic's message_start reports an
    output of 1 or so."""
    gateway = ask()

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(begun_with_usage(endpoint, output))
        await reply.wait(request.closed)

    upstream.script = script
    body = {**(BODY if endpoint == "/responses" else CHAT), "stream": True}
    with (
        gateway.client(gateway.new_key()) as client,
        client.stream("POST", endpoint, json=body) as answer,
    ):
        pieces = answer.iter_bytes()
        next(pieces)
        time.sleep(0.3)
    row = estimated(gateway, "client_disconnected")
    assert row["input_tokens"] > 0
    assert row["output_tokens"] >= 12


@pytest.mark.parametrize("last", [{}, {"choices": []}, None])
def test_usage_of_the_beginning_is_not_that_of_the_text_that_follows(
    ask: Callable[..., Gateway], upstream: Upstream, last: dict[str, Any] | None
) -> None:
    """It is the only one, or zeros follow."""
    gateway = ask()
    zeros = {"prompt_tokens": 0, "completion_tokens": 0}
    written = begun_with_usage("/chat/completions", 1)
    written += event(chat_chunk("gpt-up", {"content": "x" * 4000}))
    if last is not None:
        written += event(chat_chunk("gpt-up", {}, usage=zeros) | last)
    upstream.script = stream([written, DONE])
    read_until(gateway, CHAT, b"nothing like this", "/chat/completions")
    (row,) = gateway.rows()
    assert (row["usage_source"], row["input_tokens"]) == ("estimated", 20)
    assert row["output_tokens"] >= 1000


def test_the_author_of_an_svg_is_paid_though_the_answer_is_cut_off(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    gateway = ask()
    svg = {"model": "gpt-author", "input_tokens": 1000, "output_tokens": 50_000}
    picture: dict[str, Any] = {"id": "ig_1", "type": "image_generation_call", "status": "completed"}
    picture |= {"result": "PHN2Zz4=", "svg_usage": svg}
    drawn = {"type": "response.output_item.done", "output_index": 0, "item": picture}

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(200, SSE)
        await reply.send(created() + event(drawn, "x"))
        await reply.wait(request.closed)

    upstream.script = script
    tool = {"type": "image_generation", "output_format": "svg", "svg": {"model": "gpt-author"}}
    read_until(gateway, {**BODY, "tools": [tool]}, b"PHN2Zz4=", "/responses")
    row = estimated(gateway, "client_disconnected")
    assert row["output_tokens"] >= 50_000
    assert Decimal(row["cost"]) > Decimal("1.505")


def test_a_picture_after_usage_of_the_beginning_is_paid(
    ask: Callable[..., Gateway], upstream: Upstream
) -> None:
    gateway = ask()
    picture: dict[str, Any] = {"id": "ig_1", "type": "image_generation_call", "status": "completed"}
    picture |= {"result": "aGVsbG8=", "size": "1024x1024", "quality": "high"}
    done = event({"type": "response.output_item.done", "output_index": 0, "item": picture})
    upstream.script = stream([begun_with_usage("/responses"), done], end="tear")
    body = {**BODY, "stream": True, "tools": [{"type": "image_generation"}]}
    with gateway.client(gateway.new_key()) as client, contextlib.suppress(httpx2.HTTPError):
        client.post("/responses", json=body)
    assert estimated(gateway, "upstream_failed")["image_output_tokens"] > 0


WITHOUT_THREADS = """
import os, threading
start = threading.Thread.start
def start_if_allowed(self):
    if os.path.exists("no-threads"):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = start_if_allowed
"""


def test_a_request_is_estimated_when_no_thread_can_be_started(
    upstream: Upstream, make_gateway: MakeGateway
) -> None:
    """The speeds of models are read over a connection with a thread of its own."""
    pieces = chat_pieces(["Hello"] * 20)[:15]
    upstream.script = stream(pieces, end="tear")
    gateway = make_gateway()
    gateway.prelude = WITHOUT_THREADS
    gateway.start()
    key = gateway.new_key()
    (gateway.folder / "no-threads").touch()
    with gateway.client(key) as client, pytest.raises(httpx2.RemoteProtocolError):
        client.post("/chat/completions", json={**CHAT, "stream": True})
    (gateway.folder / "no-threads").unlink()
    row = gateway.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert row["output_tokens"] >= 15
