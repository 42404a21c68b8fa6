"""Money through the front door: the gateway as a process, its commands, real requests."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion

from redbtc.gateway.admin_routes import MAX_ASKED
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    ROOT,
    Gateway,
    MakeGateway,
    free_port,
    wait_until,
)
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    chat_json,
    chat_stream,
    images_json,
    images_pieces,
    json_answer,
    openai_like,
    response_object,
    stream,
)
from tests.helpers.webhook import SECRET, Hook, receiving

pytestmark = pytest.mark.promise_8

REFUSE = '[billing]\nunpriced_models = "refuse"\n'
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def money_gateway(make_gateway: MakeGateway, *settings: str, **env: str) -> Gateway:
    return make_gateway(REFUSE + "\n".join(settings), **env).start()


def add_price(gateway: Gateway, model: str = "m", **given: Any) -> dict[str, Any]:
    """`given` as the API takes it; `without_notice` included."""
    around = {name: given.pop(name) for name in ("without_notice",) if name in given}
    body = {"prices": [{"model": model, **given}], **around}
    found: dict[str, Any] = gateway.api("POST", "/prices", body)
    return found


def pay(gateway: Gateway, account: str, amount: str, **given: Any) -> dict[str, Any]:
    body = {"amount": amount, **given}
    found: dict[str, Any] = gateway.api("POST", f"/accounts/{account}/payments", body)
    return found


def uses(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**tokens, "total_tokens": prompt + completion, **more}


def ask(gateway: Gateway, key: str, **more: Any) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.post("/chat/completions", json={**CHAT, **more})


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])


DEAREST = {"input": "10000000", "output": "10000000", "image_output": "10000000"}
MOST_THAT_FITS = "9223372036.854775807"  # 2^63 - 1 nanos


def test_a_cost_beyond_its_column_is_the_most_that_fits(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Ten pictures of 2 * 10^8 tokens each, at the highest rates: 2 * 10^19 nanos."""
    gateway = money_gateway(make_gateway)
    key = gateway.new_key("a")
    add_price(gateway, **DEAREST)
    tokens = {"input_tokens": 10**8, "output_tokens": 10**8}
    pictures = images_pieces(0, {**tokens, "total_tokens": 2 * 10**8}) * 10
    upstream.script = stream(pictures)
    body = {"model": "m", "prompt": "Hi", "stream": True, "n": 10}
    with gateway.client(key) as client:
        assert client.post("/images/generations", json=body).content == b"".join(pictures)
    row = gateway.row()
    assert (row["outcome"], row["cost"]) == ("completed", MOST_THAT_FITS)
    spent = gateway.api("GET", "/accounts/a")["spent_this_month"]
    assert spent == MOST_THAT_FITS
    assert gateway.cli("db", "check")["ok"]


def test_a_hold_beyond_its_column_is_the_most_that_fits(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """What is held for a background response is kept beside its row."""
    gateway = money_gateway(make_gateway, 'default_credit_limit = "0"')
    key = gateway.new_key("a")
    pay(gateway, "a", "90000000000")
    add_price(gateway, web_search="10000", **DEAREST)
    upstream.script = json_answer({**response_object("resp_large"), "status": "queued"})
    body = {
        "model": "m",
        "input": "Hi",
        "background": True,
        "max_tool_calls": 100_000,
        "tools": [{"type": "web_search"}, {"type": "image_generation", "model": "m"}],
    }
    with gateway.client(key) as client:
        assert client.post("/responses", json=body).status_code == 200
    gateway.kill()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        ((held,),) = database.execute("SELECT held FROM background").fetchall()
    assert held == 2**63 - 1


# ── Prices ───────────────────────────────────────────────────────────────────────────────────────


def test_a_model_without_a_price_is_refused_and_not_listed(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    answer = ask(gateway, key, model="gpt-up")
    assert (answer.status_code, code(answer)) == (404, "model_not_found")
    with gateway.client(key) as client:
        assert client.get("/models").json()["data"] == []
        assert client.get("/models/gpt-up").status_code == 404
        before = len(upstream.requests)
        images = client.post("/images/generations", json={"prompt": "x"})
        assert (images.status_code, code(images)) == (404, "model_not_found")
        assert len(upstream.requests) == before
        add_price(gateway, "gpt-up", input="1", output="2")
        assert [model["id"] for model in client.get("/models").json()["data"]] == ["gpt-up"]
        assert client.get("/models/gpt-up").status_code == 200
    assert ask(gateway, key, model="gpt-up").status_code == 200
    assert gateway.rows()[0]["cost"] == "0.000034"  # 20 in, 7 out


@pytest.mark.front_door
def test_a_request_is_billed_by_what_the_response_reports(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    add_price(gateway, input="4", cached_input="0.4", cache_write="5", output="20")
    add_price(gateway, above_input_tokens=1000, input="8", cached_input="0.8", output="30")
    add_price(gateway, tier="flex", input="2", output="10")
    details = {"prompt_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 100}}
    expected = [
        (None, uses(1000, 50, **details), (500 * 4 + 400 * Decimal("0.4") + 100 * 5 + 50 * 20)),
        ("default", uses(1001, 50), 1001 * 8 + 50 * 30),
        ("flex", uses(5000, 50), 5000 * 2 + 50 * 10),
        ("scale", uses(10, 5), 10 * 4 + 5 * 20),
    ]
    for tier, usage, _ in expected:
        answer = {"id": "c", "object": "chat.completion", "model": "m", "usage": usage}
        upstream.script = json_answer({**answer, "service_tier": tier} if tier else answer)
        assert ask(gateway, key, service_tier="auto").status_code == 200
    assert [Decimal(row["cost"]) * 1_000_000 for row in gateway.rows()] == [
        cost for _, _, cost in expected
    ]


def test_pictures_and_searches_are_billed(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    rates = {"input": "5", "output": "10", "image_input": "8", "image_output": "30"}
    add_price(gateway, **rates, web_search="0.01")
    upstream.script = images_json()  # 10 of text and 40 of pictures in, 272 of pictures out
    with gateway.client(key) as client:
        client.post("/images/generations", json={"model": "m", "prompt": "x"})
        tools = {
            "web_search": {"num_requests": 3},
            "image_gen": {
                "input_tokens": 2,
                "input_tokens_details": {"image_tokens": 2, "text_tokens": 0},
                "output_tokens": 100,
                "output_tokens_details": {"image_tokens": 100, "text_tokens": 0},
            },
        }
        upstream.script = json_answer({**response_object("m"), "tool_usage": tools})
        client.post("/responses", json={"model": "m", "input": "x"})
    drawn, answered = (Decimal(row["cost"]) for row in gateway.rows())
    assert drawn * 1_000_000 == 10 * 5 + 40 * 8 + 272 * 30
    assert answered * 1_000_000 == 30 * 5 + 9 * 10 + 2 * 8 + 100 * 30 + 30_000


def test_the_price_at_admission_holds(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    add_price(gateway, input="1000000", output="0")
    go = threading.Event()

    async def later(request: Received, reply: Reply) -> None:
        await reply.wait(go)
        await chat_json(uses(3, 0))(request, reply)

    upstream.script = later
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, gateway, key)
        wait_until(lambda: upstream.in_flight == 1)
        add_price(gateway, input="0", output="0")
        go.set()
        assert answer.result().status_code == 200
    assert ask(gateway, key).status_code == 200
    assert [row["cost"] for row in gateway.rows()] == ["3", "0"]


def test_prices_change_at_their_instant(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    add_price(gateway, input="2000000", output="0")
    add_price(gateway, input="1000000", output="0", effective="2s")
    upstream.script = chat_json(uses(1, 0))
    costs: list[str] = []
    while "1" not in costs:
        ask(gateway, key)
        costs = [row["cost"] for row in gateway.rows()]
    (coming,) = (p for p in gateway.cli("price", "list")["prices"] if p["input"] == "1000000")
    assert coming["status"] == "current"
    for row in gateway.rows():
        expected = "1" if row["started_at"] >= coming["effective_at"] else "2"
        assert row["cost"] == expected or row["started_at"][:22] == coming["effective_at"][:22]


def test_price_commands(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    key = gateway.new_key()
    day = ["--effective", "2026-01-01T00:00:00Z"]
    gateway.cli("price", "add", "m", "--input", "1.5", "--output", "6", *day)
    gateway.cli("price", "add", "m", "--input", "2", "--output", "6")
    gateway.cli("price", "add", "m", "--input", "1", "--output", "6", "--effective", "40d")
    listed = gateway.cli("price", "list")["prices"]
    assert [(price["input"], price["status"]) for price in listed] == [
        ("1.5", "past"),
        ("2", "current"),
        ("1", "coming"),
    ]
    assert listed[0]["effective_at"] == "2026-01-01T00:00:00.000Z"
    assert ask(gateway, key).status_code == 200
    refused = gateway.run("price", "add", "m", "--input", "3", "--output", "6")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Error: m is in use and would cost more from ")
    assert gateway.run("price", "add", "m", "--input", "3", "--without-notice").returncode == 2
    assert gateway.run("price", "add", "m", "--input", "3", "--reason", "x").returncode == 2
    early = ["price", "add", "m", "--input", "3", "--output", "6", "--without-notice"]
    (added,) = gateway.cli(*early, "--reason", "the upstream's rose")["prices"]
    assert (added["reason"], bool(added["added_by"])) == ("the upstream's rose", True)
    for wrong in (["--input", "1e3"], ["--input", "-1"], ["--input", "99999999"], []):
        done = gateway.run("price", "add", "x", *wrong)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
    assert "current" in gateway.run("price", "list").stdout


@pytest.mark.parametrize("unpriced", ["free", "refuse"])
def test_a_notice_of_a_rise_names_prices_and_not_what_was_asked_for(
    make_gateway: MakeGateway, unpriced: str
) -> None:
    gateway = make_gateway(f'[server]\n[billing]\nunpriced_models = "{unpriced}"')
    if unpriced == "refuse":
        gateway.cli("price", "add", "ft:*", "--input", "1", "--output", "1")
    gateway.start()
    key = gateway.new_key()
    with gateway.client(key) as client:
        for model in ("ft:m:acme:merger:1", "ft:m:acme:merger:2"):
            assert client.post("/responses", json={"model": model, "input": "x"}).status_code == 200
    rise = ["--input", "2", "--output", "2", "--effective", "40d"]
    gateway.cli("price", "add", "ft:*", *rise)
    (notice,) = gateway.get("/status").json()["notices"]
    assert notice["text"].count("ft:*: input ") == 1
    assert "merger" not in notice["text"]


def test_price_files(make_gateway: MakeGateway, tmp_path: Path) -> None:
    gateway = make_gateway(REFUSE)
    example = str(ROOT / "prices.toml")
    first, again = (gateway.cli("price", "import", example) for _ in range(2))
    assert first["added"] == len(gateway.cli("price", "list")["prices"]) > 100
    assert (again["added"], again["unchanged"]) == (0, first["added"])
    prices = {
        (price["model"], price["tier"], price["above_input_tokens"]): price
        for price in first["prices"]
    }
    short, long = prices["gpt-6-astra", "default", 0], prices["gpt-6-astra", "default", 272_000]
    assert (short["input"], short["cached_input"], short["cache_write"]) == ("10", "1", "12.5")
    assert (long["input"], long["cached_input"], long["output"]) == ("20", "2", "75")
    assert prices["gpt-5.4-mini", "flex", 0]["cached_input"] == "0.0375"  # exactly
    assert prices["gpt-5.5", "priority", 0]["output"] == "75"
    file = tmp_path / "mine.toml"
    for text, said in (
        ("prices = 1", "no prices found"),
        ('[[prices]]\nmodel = "a"\nimput = 1', "imput"),
        ('[[prices]]\nmodel = "a"\ninput = true', "$.prices[0].input"),
        ('[[prices]]\nmodel = "a"\ninput = 0.0000000001', "an amount"),
        ('[[prices]]\nmodel = "a"\ninput = 1\n[[prices]]\nmodel = "b"', "give at least one"),
        (
            '[[prices]]\nmodel = "a"\ninput = 1\n[[prices]]\nmodel = "a"\ninput = 2',
            "two different prices",
        ),
        ('currency = "EUR"\nprices = []', "in EUR, but billing.currency is USD"),
        ("prices = [", "not valid TOML"),
    ):
        file.write_text(text)
        done = gateway.run("price", "import", str(file))
        assert (done.returncode, done.stdout) == (1, ""), text
        assert said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert len(gateway.cli("price", "list")["prices"]) == first["added"]
    file.write_text('[[prices]]\nmodel = ["a", "b*"]\ninput = 1_000\neffective = 2030-01-01\n')
    assert gateway.cli("price", "import", str(file))["added"] == 2
    coming = gateway.cli("price", "list")["prices"][0]
    assert (coming["input"], coming["effective_at"]) == ("1000", "2030-01-01T00:00:00.000Z")


# ── Balance and budgets ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", ["balance", "account's budget", "key's budget", "credit"])
def test_200_in_parallel_on_a_balance_for_5(
    make_gateway: MakeGateway, upstream: Upstream, limit: str
) -> None:
    gateway = money_gateway(make_gateway, "[limits.account]\nconcurrency = 0\n")
    account = {"name": "a"} | {
        "balance": {"credit_limit": "0"},
        "credit": {"credit_limit": "15.999"},
        "account's budget": {"monthly_budget": "15.999"},
        "key's budget": {},
    }[limit]
    gateway.api("POST", "/accounts", account)
    budget = {"monthly_budget": "15.999"} if limit == "key's budget" else {}
    key = gateway.api("POST", "/accounts/a/keys", budget)["key"]
    if limit == "balance":
        pay(gateway, "a", "15.999")
    add_price(gateway, input="0", output="1000000")

    async def slowly(request: Received, reply: Reply) -> None:
        await asyncio.sleep(0.05)
        await chat_json(uses(10, 3))(request, reply)

    upstream.script = slowly
    with gateway.client(key) as client, ThreadPoolExecutor(200) as pool:
        body = {**CHAT, "max_tokens": 3}
        asks = [pool.submit(client.post, "/chat/completions", json=body) for _ in range(200)]
        answers = [each.result() for each in asks]
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) == 5
    assert len(upstream.requests) == 5
    assert {code(answer) for answer in answers if answer not in served} == {"insufficient_quota"}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    message = refused.json()["error"]["message"]
    assert "can cost up to 3 USD" in message
    assert message.endswith("use a lower 'max_completion_tokens' or 'max_tokens'.")
    assert ask(gateway, key, max_tokens=1).status_code == 429  # 0.999 is left
    shown = gateway.cli("account", "show", "a")
    assert (shown["held"], shown["spent_this_month"]) == ("0", "15")


def test_a_refusal_for_money_costs_no_tokens(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """It counts as a request, though: its body was read."""
    gateway = money_gateway(make_gateway)
    limits = {"requests_per_minute": 60, "tokens_per_minute": 3000, "credit_limit": "0"}
    gateway.api("POST", "/accounts", {"name": "a", **limits})
    key = gateway.new_key("a")
    add_price(gateway, input="1", output="1")
    for _ in range(5):
        assert code(ask(gateway, key, max_tokens=900)) == "insufficient_quota"
        unmetered = {"stream": True, "stream_options": {"include_usage": False}}
        assert code(ask(gateway, key, max_tokens=900, **unmetered)) == "invalid_request"
    pay(gateway, "a", "1")
    answer = ask(gateway, key, max_tokens=900)
    assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-requests"]) < 59


def test_a_hold_becomes_the_cost(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """What is not used is there again at once: one after the other, all are served."""
    gateway = money_gateway(make_gateway)
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "0"})
    key = gateway.new_key("a")
    pay(gateway, "a", "100")
    add_price(gateway, input="0", output="1000000")
    upstream.script = chat_json(uses(1, 1))
    for left in range(99, 89, -1):
        assert ask(gateway, key, max_tokens=90).status_code == 200
        assert gateway.cli("account", "show", "a")["balance"] == str(left)
    assert ask(gateway, key, max_tokens=91).status_code == 429
    assert ask(gateway, key, max_tokens=30, n=4).status_code == 429  # each of them can have 30
    assert ask(gateway, key, max_tokens=30, n=3).status_code == 200
    with gateway.client(key) as client:
        body = {"model": "m", "input": "x", "max_output_tokens": 91}
        assert client.post("/responses", json=body).status_code == 429
        assert client.post("/chat/completions", json=CHAT).status_code == 429  # no limit: 128,000


def test_what_is_held_for_input_goes_by_size(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "0.05"})
    key = gateway.new_key("a")
    add_price(gateway, input="1", output="0")
    upstream.script = chat_json(uses(1, 0))
    long = [{"role": "user", "content": "x" * 50_000}]
    assert ask(gateway, key, messages=long).status_code == 429
    assert ask(gateway, key, messages=[{"role": "user", "content": "x" * 40_000}]).is_success
    # A picture is not as many tokens as it has bytes, and not as few as its address.
    for url, served in (("data:image/png;base64," + "A" * 900_000, 2), ("https://a.b/c", 2)):
        picture = {"type": "image_url", "image_url": {"url": url}}
        for count, status in ((served, 200), (served + 2, 429)):
            content = [{"type": "text", "text": "What is this?"}, *[picture] * count]
            messages = [{"role": "user", "content": content}]
            assert ask(gateway, key, messages=messages).status_code == status, (url[:9], count)
    text = [
        {"role": "user", "content": [{"type": "text", "text": "data:image/png," + "A" * 10**5}]}
    ]
    assert ask(gateway, key, messages=text).status_code == 429
    hidden = rb'{"model":"m","messages":[{"role":"user","content":[%s]}]}'
    picture_part = rb'{"type":"i\u006dage_url","i\u006dage_url":{"url":"https://a.b/c"}}'
    hidden %= b",".join([picture_part] * 4)
    form = {"model": (None, "m"), "prompt": (None, "x")}
    with gateway.client(key) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/chat/completions", content=hidden, headers=headers)
        assert answer.status_code == 429
        for size, count, status in ((900_000, 2, 200), (900_000, 4, 429)):
            files = [("image[]", (f"{n}.png", b"x" * size)) for n in range(count)]
            upstream.script = images_json()
            assert client.post("/images/edits", files=[*form.items(), *files]).status_code == status


def test_a_model_s_own_most_limits_what_is_held(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = money_gateway(make_gateway, "hold_output_tokens = 50\n")
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "60"})
    key = gateway.new_key("a")
    add_price(gateway, "small", output="1000000", max_output_tokens=60)
    add_price(gateway, "large", output="1000000", max_output_tokens=61)
    add_price(gateway, "usual", output="1000000")
    upstream.script = chat_json(uses(1, 0))
    assert ask(gateway, key, model="small").status_code == 200
    assert ask(gateway, key, model="small", max_tokens=10**9).status_code == 200
    assert ask(gateway, key, model="large").status_code == 429
    assert ask(gateway, key, model="large", max_tokens=60).status_code == 200
    assert ask(gateway, key, model="usual").status_code == 200
    assert ask(gateway, key, model="usual", max_tokens=61).status_code == 429


def test_holds_end_with_the_gateway(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "0"})
    key = gateway.new_key("a")
    pay(gateway, "a", "5")
    add_price(gateway, output="1000000")

    async def never(request: Received, reply: Reply) -> None:
        await reply.wait(request.closed)

    upstream.script = never

    def try_it() -> None:
        with pytest.raises(httpx2.HTTPError):
            ask(gateway, key, max_tokens=5)

    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(try_it)
        wait_until(lambda: upstream.in_flight == 1)
        assert gateway.cli("account", "show", "a")["available"] == "0"
        assert ask(gateway, key, max_tokens=1).status_code == 429
        gateway.kill()
        lost.result()
    gateway.start()
    upstream.script = chat_json(uses(1, 5))
    assert gateway.row()["outcome"] == "interrupted"
    assert gateway.row()["cost"] is None
    assert ask(gateway, key, max_tokens=5).status_code == 200
    assert gateway.cli("account", "show", "a")["balance"] == "0"
    gateway.restart()
    assert gateway.cli("account", "show", "a")["balance"] == "0"
    assert ask(gateway, key, max_tokens=1).status_code == 429


@pytest.mark.parametrize("how", ["error", "torn", "unreachable", "left"])
def test_a_hold_never_outlives_its_request(
    make_gateway: MakeGateway, upstream: Upstream, how: str
) -> None:
    nowhere = f'[[upstreams]]\nbase_url = "http://127.0.0.1:{free_port()}/v1"\napi_key_env = ""\n'
    gateway = money_gateway(
        make_gateway,
        '[metering]\non_disconnect = "cancel"\n',
        nowhere if how == "unreachable" else "",
    )
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "40"})
    key = gateway.new_key("a")
    add_price(gateway, output="1000000")

    async def fail(request: Received, reply: Reply) -> None:
        if how == "error":
            await json_answer({"error": {"message": "no"}}, status=500)(request, reply)
        elif how == "left":
            await reply.wait(request.closed)
        else:
            await reply.head(framing="length:100")
            await reply.send(b"{")
            reply.tear()

    upstream.script = fail
    for _ in range(3):
        with gateway.client(
            key, timeout=httpx2.Timeout(PATIENCE_SECONDS, read=0.3 if how == "left" else None)
        ) as client:
            try:
                status = client.post(
                    "/chat/completions", json={**CHAT, "max_tokens": 10}
                ).status_code
                assert status in (500, 502)
            except httpx2.HTTPError:
                assert how in ("torn", "left")
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        shown = gateway.cli("account", "show", "a")
        assert shown["held"] == "0"
        if how in ("error", "unreachable"):  # else an estimate is billed
            assert shown["available"] == "40"


def test_usage_can_not_be_kept_from_a_balance(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Where the settings allow a stream that doesn't report its usage, it is billed by an estimate,
    and refused if spending is limited."""
    gateway = money_gateway(make_gateway, '[metering]\nunmetered = "allow"\n')
    gateway.api("POST", "/accounts", {"name": "prepaid", "credit_limit": "10"})
    add_price(gateway, input="1", output="1")
    body = {"stream": True, "stream_options": {"include_usage": False}}
    refused = ask(gateway, gateway.new_key("prepaid"), **body)
    assert (refused.status_code, code(refused)) == (400, "invalid_request")
    assert refused.json()["error"]["param"] == "stream_options"
    upstream.requests.clear()
    assert ask(gateway, gateway.new_key("open"), **body).status_code == 200
    assert upstream.requests[0].json()["stream_options"] == {"include_usage": False}
    rows = gateway.rows(account="open")
    assert {row["usage_source"] for row in rows} == {"estimated"}
    assert all(Decimal(row["cost"]) > 0 for row in rows)
    assert gateway.cli("account", "show", "prepaid")["held"] == "0"


def test_the_sdk_raises_and_does_not_come_again(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = money_gateway(make_gateway)
    gateway.api("POST", "/accounts", {"name": "a", "credit_limit": "0"})
    key = gateway.new_key("a")
    add_price(gateway, input="1", output="1")
    with openai.OpenAI(base_url=gateway.base_url, api_key=key) as client:
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=5
            )
        assert raised.value.code == "insufficient_quota"
        assert gateway.metrics()['redbtc_refusals_total{code="insufficient_quota"}'] == 1
        pay(gateway, "a", "1")
        answer: ChatCompletion = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=5
        )
        assert answer.usage is not None


def test_limits_in_money_can_be_changed(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(f'{REFUSE}default_credit_limit = "0"\n').start()
    added = gateway.cli("account", "add", "a", "--monthly-budget", "2.50")
    assert (added["credit_limit"], added["monthly_budget"]) == (None, "2.5")
    key = gateway.new_key("a")
    add_price(gateway, output="1000000")
    upstream.script = chat_json(uses(1, 1))
    assert ask(gateway, key, max_tokens=1).status_code == 429
    assert gateway.cli("account", "set", "a", "--credit-limit", "unlimited")["available"] is None
    assert ask(gateway, key, max_tokens=2).status_code == 200
    assert ask(gateway, key, max_tokens=2).status_code == 429
    assert gateway.cli("account", "set", "a", "--monthly-budget", "unlimited")[
        "monthly_budget"
    ] is (None)
    assert ask(gateway, key, max_tokens=2).status_code == 200
    gateway.cli("account", "set", "a", "--credit-limit", "default")
    assert ask(gateway, key, max_tokens=2).status_code == 429
    own = gateway.cli("key", "add", "a", "--monthly-budget", "1")
    assert own["monthly_budget"] == "1"
    rotated = gateway.cli("key", "rotate", own["id"])
    assert rotated["monthly_budget"] == "1"
    for wrong in ("-1", "1e3", "lots", "99999999999"):
        assert gateway.run("account", "set", "a", f"--credit-limit={wrong}").returncode == 2


# ── Notices ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hook() -> Iterator[Hook]:
    with receiving() as hook:
        hook.answer = hook.fails_first
        yield hook


def test_budgets_are_told_of_once_and_signed(
    make_gateway: MakeGateway, upstream: Upstream, hook: Hook
) -> None:
    gateway = money_gateway(make_gateway, hook.settings(), HOOK_SECRET=SECRET)
    gateway.api("POST", "/accounts", {"name": "a", "monthly_budget": "10"})
    key_id = gateway.api("POST", "/accounts/a/keys", {"monthly_budget": "8"})
    add_price(gateway, output="1000000")
    upstream.script = chat_json(uses(1, 1))
    for _ in range(8):
        assert ask(gateway, key_id["key"], max_tokens=1).status_code == 200
    assert ask(gateway, key_id["key"], max_tokens=1).status_code == 429
    notices = gateway.cli("notice", "list")["notices"]
    told = sorted((notice["key_id"] or "", notice["percent"]) for notice in notices)
    assert told == [("", 50), ("", 80), *((key_id["id"], percent) for percent in (50, 80, 100))]
    assert all(notice["account"] == "a" and notice["kind"] == "budget" for notice in notices)
    half = "50 % of the monthly budget has been spent: 5.00"
    assert any(notice["text"].startswith(half) for notice in notices)
    wait_until(lambda: len(hook.posts) >= 10)  # each twice
    checker = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    ids = set()
    for headers, body, _ in hook.posts:
        checker.webhooks.verify_signature(body, headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            checker.webhooks.verify_signature(body + b" ", headers)
        content = json.loads(body)
        assert content["type"] == "budget.reached"
        assert content["data"]["account"] == "a"
        ids.add(headers["webhook-id"])
    assert ids == {notice["id"] for notice in notices}
    wait_until(lambda: all(n["delivered_at"] for n in gateway.cli("notice", "list")["notices"]))
    gateway.restart()
    assert ask(gateway, gateway.new_key("a"), max_tokens=1).status_code == 200
    assert len(gateway.cli("notice", "list")["notices"]) == 5
    time.sleep(0.3)  # nothing is sent again
    assert len(hook.posts) == 10
    sent = gateway.api("GET", "/webhook")["messages"]
    assert {each["id"] for each in sent} == ids
    assert f"a: {half}" in gateway.run("webhook", "list").stdout
    assert all((each["state"], each["tries"]) == ("delivered", 2) for each in sent)
    status = gateway.get("/status").json()
    assert status["notices"] == status["incidents"] == [], "an account's own are not for everybody"


def test_notices_and_status(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    assert gateway.get("/status").json()["status"] == "ok"
    early = gateway.run("notice", "add", "--kind", "terms", "New terms.", "--effective", "13d")
    assert (early.returncode, early.stdout) == (1, "")
    assert "14 days of notice" in early.stderr
    terms = gateway.cli("notice", "add", "--kind", "terms", "New terms.", "--effective", "14d")
    text = "<script>alert(1)</script> & more"
    gateway.cli("notice", "add", "--kind", "incident", text, "--until", "1h")
    gateway.cli("notice", "add", "--kind", "maintenance", "Short.", "--effective", "1d")
    past = ["--effective", "2026-01-01", "--until", "2026-01-02"]
    gateway.cli("notice", "add", "--kind", "maintenance", "Over.", *past)
    add_price(gateway, input="1")
    add_price(gateway, input="2", effective="31d")
    answer = gateway.get("/status")
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found["status"] == "incident"
    assert found["uptime_seconds"] >= 0
    assert [notice["text"] for notice in found["incidents"]] == [text]
    assert [(n["kind"], n["text"]) for n in found["notices"]] == [
        ("maintenance", "Short."),
        ("terms", "New terms."),
        ("price", "Price increase (USD per million tokens). m: input from 1 to 2."),
    ]
    page = gateway.get("/status", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page.text
    assert "<script>" not in page.text
    json_first = {"accept": "application/json, text/html;q=0.5"}
    again = gateway.get("/status", headers=json_first).json()
    assert again | {"uptime_seconds": found["uptime_seconds"]} == found
    gateway.cli("notice", "withdraw", terms["id"])
    assert "New terms." not in gateway.get("/status").text
    assert gateway.run("notice", "withdraw", "ntc_0").returncode == 1
    assert len(gateway.cli("notice", "list")["notices"]) == 5


# ── Payments, statements, usage ──────────────────────────────────────────────────────────────────


def test_payment_commands(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE)
    gateway.cli("account", "add", "a")
    paid = gateway.cli("payment", "add", "a", "9007199254740993.01", "--reference", "bank 1")
    again = gateway.cli("payment", "add", "a", "9007199254740993.01", "--reference", "bank 1")
    assert again["id"] == paid["id"]
    assert again["balance"] == "9007199254740993.01"
    other = gateway.run("payment", "add", "a", "5", "--reference", "bank 1")
    assert (other.returncode, other.stdout) == (1, "")
    assert (
        other.stderr
        == "Error: payment 'bank 1' already exists, with the amount 9007199254740993.01\n"
    )
    assert gateway.run("payment", "add", "a", "-5").returncode == 1
    refund = gateway.cli("payment", "add", "a", "-5.5", "--reason", "too much")
    assert (refund["amount"], refund["balance"]) == ("-5.5", "9007199254740987.51")
    assert gateway.run("payment", "add", "nobody", "5").returncode == 1
    listed = gateway.cli("payment", "list", "a")["payments"]
    assert [payment["amount"] for payment in listed] == ["9007199254740993.01", "-5.5"]
    assert listed == gateway.cli("payment", "list")["payments"]
    month = paid["month"]
    lines = list(csv.DictReader(io.StringIO(gateway.run("statement", "a", month, "--csv").stdout)))
    assert [line["amount"] for line in lines] == [
        "0",
        "9007199254740993.01",
        "-5.5",
        "9007199254740987.51",
    ]


@pytest.mark.front_door
def test_a_statement_adds_up(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway, '[metering]\non_disconnect = "cancel"\n')
    key = gateway.new_key("a")
    pay(gateway, "a", "10", reference="r")
    for model, rate in (("m", "1.1"), ("o", "2.3")):
        add_price(gateway, model, input=rate, output="7.7")
    for number in range(7):
        upstream.script = chat_json(uses(number * 11, number))
        assert ask(gateway, key, model="mo"[number % 2]).status_code == 200
    upstream.script = chat_json(usage=None)
    assert ask(gateway, key).status_code == 200
    upstream.script = stream([b'data: {"choices":[{"delta":{"content":"Hello"}}]}\n\n'], pause=5)
    with (
        gateway.client(key) as client,
        client.stream("POST", "/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        next(iter(answer.iter_raw()))
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    rows = gateway.rows()
    month = rows[0]["month"]
    found = gateway.cli("statement", "a", month)
    cost = sum(Decimal(row["cost"] or 0) for row in rows)
    assert Decimal(found["totals"]["cost"]) == cost > 0
    assert sum(Decimal(line["cost"]) for line in found["usage"]) == cost
    assert Decimal(found["closing_balance"]) == 10 - cost
    assert Decimal(gateway.cli("account", "show", "a")["balance"]) == 10 - cost
    assert {line["model"] for line in found["usage"]} == {row["model"] or "m" for row in rows}
    for limit in (0, 1):
        some = gateway.api("GET", f"/accounts/a/statements/{month}", limit=limit)
        assert some == {**found, "usage": found["usage"][:limit]}
    totals = found["totals"]
    assert (totals["requests"], totals["estimated"], totals["unreported"]) == (9, 2, 0)
    assert (found["opening_balance"], found["closed"]) == ("0", False)
    assert (totals["paid"], found["paid_last_three_months"]) == ("10", "10")
    assert len(found["paid_by_month"]) == 3
    (payment,) = found["payments"]
    assert "added_by" not in payment
    text = gateway.run("statement", "a", month).stdout
    assert "closing balance" in text
    lines = list(csv.DictReader(io.StringIO(gateway.run("statement", "a", month, "--csv").stdout)))
    costs = sum(Decimal(line["cost"] or 0) for line in lines)
    paid = sum(Decimal(line["amount"] or 0) for line in lines[:-1])
    assert paid - costs == Decimal(lines[-1]["amount"]) == 10 - cost
    for wrong in ("2026-13", "2026", "9999-12", "20261"):
        done = gateway.run("statement", "a", wrong)
        assert (done.returncode, done.stdout) == (1, "")


def test_usage_in_groups(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    add_price(gateway, "*", input="1", output="1")
    for account, model, count in (("a", "m", 2), ("a", "o", 1), ("b", "m", 3)):
        for _ in range(count):
            assert ask(gateway, gateway.new_key(account), model=model).status_code == 200
    found = gateway.cli("usage", "--group-by", "account,model")
    assert [(g["account"], g["model"], g["requests"], g["cost"]) for g in found["groups"]] == [
        ("a", "m", 2, "0.000054"),
        ("a", "o", 1, "0.000027"),
        ("b", "m", 3, "0.000081"),
    ]
    assert (found["totals"]["requests"], found["totals"]["cost"]) == (6, "0.000162")
    (day,) = gateway.cli("usage", "--group-by", "day", "--account", "b")["groups"]
    assert (len(day["day"]), day["requests"]) == (10, 3)
    assert len(gateway.cli("usage", "--group-by", "key")["groups"]) == 6
    assert gateway.cli("usage", "--group-by", "day", "--until", "1h")["groups"] == []
    assert gateway.run("usage", "--group-by", "colour").returncode == 1
    assert gateway.run("usage", "--group-by", "day", "--limit", "1").returncode == 2
    text = gateway.run("usage", "--group-by", "model", "--csv").stdout
    assert [line["model"] for line in csv.DictReader(io.StringIO(text))] == ["m", "o"]
    assert "0.000162" in gateway.run("usage", "--group-by", "model").stdout


# ── An account's own figures ─────────────────────────────────────────────────────────────────────


def test_a_script_can_ask_for_its_account_s_figures(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = money_gateway(make_gateway)
    limits = {"concurrency": 4, "requests_per_minute": 60, "credit_limit": "5"}
    limits["monthly_budget"] = "10"
    gateway.api("POST", "/accounts", {"name": "a", **limits})
    key, other = gateway.new_key("a"), gateway.new_key("b")
    add_price(gateway, input="1", output="1", without_notice="operator's own")
    pay(gateway, "a", "3")
    for owner in (key, other, other):
        assert ask(gateway, owner, max_tokens=10).status_code == 200

    def me(path: str = "", key: str = key, **query: str) -> Any:
        headers = {"authorization": f"Bearer {key}"}
        answer = gateway.get(f"/admin/v1/me{path}", headers=headers, params=query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == answer.headers["x-redbtc-request-id"]
        shown = answer.text.replace('"credentials":"operator"', "")
        assert "operator" not in shown
        return answer.json()

    mine = me()
    assert (mine["account"], mine["balance"]["balance"]) == ("a", "2.999973")
    assert mine["balance"] == me("/balance")
    assert mine["balance"]["available"] == "7.999973"
    assert mine["balance"]["spent_this_month"] == "0.000027"
    in_force = me("/limits")["account"]
    assert in_force["concurrency"] == {"limit": 4, "in_flight": 0}
    assert in_force["requests_per_minute"]["limit"] == 60
    assert in_force["requests_per_minute"]["remaining"] == 59
    assert in_force["tokens_per_minute"]["limit"] is None
    budget = {"limit": "10", "spent": "0.000027", "remaining": "9.999973"}
    assert in_force["monthly_budget"] == budget
    unlimited = {"limit": None, "spent": "0.000027", "remaining": None}
    assert me()["limits"]["key"]["monthly_budget"] == unlimited
    assert [price["input"] for price in me("/prices")["prices"]] == ["1"]
    assert me("/usage")["totals"]["requests"] == 1
    assert me("/usage", key=other, group_by="model")["groups"][0]["requests"] == 2
    (row,) = me("/requests")["requests"]
    assert row["account"] == "a"
    assert [payment["amount"] for payment in me("/payments")["payments"]] == ["3"]
    assert me(f"/statements/{row['month']}")["closing_balance"] == "2.999973"
    assert me("/notices") == {"notices": []}

    headers = {"authorization": f"Bearer {key}"}
    foreign = {row["key_id"] for row in gateway.rows(account="b")}.pop()
    unknown = gateway.get("/admin/v1/me/usage?key=key_0", headers=headers)
    hidden = gateway.get(f"/admin/v1/me/usage?key={foreign}", headers=headers)
    assert (hidden.status_code, unknown.status_code) == (404, 404)
    assert hidden.text.replace(foreign, "key_0") == unknown.text
    assert gateway.get("/admin/v1/me/usage?account=b", headers=headers).status_code == 404
    assert gateway.get("/admin/v1/me/usage?colour=red", headers=headers).status_code == 400
    assert gateway.get("/admin/v1/me/nothing", headers=headers).status_code == 404
    for path in ("/accounts", "/prices", "/me", "/me/balance"):
        answer = gateway.get(f"/admin/v1{path}")
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] in ("invalid_api_key", None)
    assert gateway.get("/admin/v1/accounts", headers=headers).status_code == 401


def test_who_asks_much_waits(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """300 reports at once are all made, and hold up no request."""
    gateway = make_gateway().start()
    keys = [gateway.new_key(f"account {number}") for number in range(40)]
    assert ask(gateway, keys[0]).status_code == 200

    def report(number: int) -> int:
        headers = {"authorization": f"Bearer {keys[number % len(keys)]}"}
        return gateway.get("/admin/v1/me/requests?limit=9", headers=headers).status_code

    with ThreadPoolExecutor(300) as pool:
        asked = [pool.submit(report, number) for number in range(300)]
        assert ask(gateway, keys[0]).status_code == 200
    assert {each.result() for each in asked} == {200}


def test_nobody_takes_all_connections_by_asking(gateway: Gateway, key: str) -> None:
    """Requests for an account's own figures that wait for their turn can't make room for others."""
    head = f"GET /admin/v1/me HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(gateway.connect()) for _ in range(200)]
        gateway.signal(signal.SIGSTOP)  # so that all arrive at once
        for sock in socks:
            sock.sendall(head)
        gateway.signal(signal.SIGCONT)
        answers = Counter(sock.recv(65536)[9:12] for sock in socks)
    assert set(answers) == {b"200", b"429"}
    assert answers[b"200"] >= MAX_ASKED
    headers = {"authorization": f"Bearer {key}"}
    assert gateway.get("/admin/v1/me", headers=headers).status_code == 200


def test_first_run_has_prices(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(REFUSE).start("--first-run", "--demo")
    key = gateway.new_key()
    for model in ("redbtc-demo", "gpt-5.5"):
        assert ask(gateway, key, model=model).status_code == 200
    assert all(Decimal(row["cost"]) > 0 for row in gateway.rows())
    assert ask(gateway, key, model="unheard-of").status_code == 404
    with gateway.client(key) as client:
        assert client.get("/models").json()["data"]


def test_prices_in_dollars_are_no_example_in_yen(make_gateway: MakeGateway) -> None:
    gateway = make_gateway('[billing]\ncurrency = "JPY"').start("--first-run", "--demo")
    found = gateway.api("GET", "/prices")["prices"]
    assert {price["model"] for price in found} == {"redbtc-demo*"}
    assert "no prices" not in gateway.log()


def test_a_statement_has_the_currency_s_digits(make_gateway: MakeGateway) -> None:
    gateway = make_gateway('[billing]\ncurrency = "KWD"').start()
    gateway.api("POST", "/accounts", {"name": "a"})
    month = gateway.api("POST", "/accounts/a/payments", {"amount": "100"})["month"]
    assert "payments                100.000\n" in gateway.run("statement", "a", month).stdout


def test_streams_are_billed_too(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = money_gateway(make_gateway)
    add_price(gateway, input="1", cached_input="1", output="1")
    upstream.script = chat_stream()
    assert ask(gateway, gateway.new_key(), stream=True).status_code == 200
    upstream.script = openai_like
    with gateway.client(gateway.new_key()) as client:
        client.post("/responses", json={"model": "m", "input": "x", "stream": True})
    assert [row["cost"] for row in gateway.rows()] == ["0.000027", "0.000039"]
