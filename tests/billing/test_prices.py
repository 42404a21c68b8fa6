"""What further things cost, which price applies, what a new one takes over, and a budget that keys
share."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from websockets.sync.client import connect

from redbtc import rates as rates_module
from redbtc.billing import model_patterns
from redbtc.billing.price_table import PriceTable
from redbtc.billing.prices import Price
from redbtc.usage import Usage
from tests.helpers.gateway import ROOT, Gateway, MakeGateway, wait_until
from tests.helpers.upstream import Received, Reply, Socket, Upstream, json_answer, response_object

pytestmark = pytest.mark.promise_8

REFUSE = '[billing]\nunpriced_models = "refuse"\n'
FREE = '[billing]\nunpriced_models = "free"\n'
ALL_RATES = {
    "input": "5",
    "output": "30",
    "cache_write": "6",
    "cache_write_12h": "12.5",
    "file_search": "0.0025",
    "container": "0.03",
}
TOOLS: list[dict[str, Any]] = [
    {"type": "file_search", "vector_store_ids": []},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "4g"}},
    {"type": "code_interpreter"},
    {"type": "shell", "environment": {"type": "container_auto"}},
    {"type": "shell", "environment": {"type": "something new"}},
]
HARMLESS: list[dict[str, Any]] = [
    {"type": "shell"},
    {"type": "shell", "environment": None},
    {"type": "shell", "environment": {"type": "local", "skills": []}},
    {"type": "web_search"},
    {"type": "local_shell"},
    {"type": "function", "name": "file_search", "parameters": {"type": "code_interpreter"}},
    {
        "type": "function",
        "name": "f",
        "parameters": {"default": {"prompt_cache_options": {"ttl": "12h"}}},
    },
]


def add_price(gateway: Gateway, model: str = "m", **given: Any) -> dict[str, Any]:
    around: dict[str, Any] = {
        name: given.pop(name) for name in ("without_notice", "take_over") if name in given
    }
    body: dict[str, Any] = {"prices": [{"model": model, **given}], **around}
    found: dict[str, Any] = gateway.api("POST", "/prices", body)
    return found


def which(gateway: Gateway, model: str, **query: Any) -> dict[str, Any]:
    found: dict[str, Any] = gateway.api("GET", "/prices/which", model=model, **query)
    return found


def answering(*items: dict[str, Any], name: str = "1", **usage: Any) -> dict[str, Any]:
    """A response with such items in its output; 30 tokens in, 9 out."""
    answer = response_object("m")
    answer |= {"id": f"resp_{name}", "output": list(items)}
    answer["usage"] = {"input_tokens": 30, "output_tokens": 9, "total_tokens": 39, **usage}
    return answer


def ran_in(*containers: str) -> list[dict[str, Any]]:
    return [
        {"type": "code_interpreter_call", "id": f"ci_{each}", "container_id": each, "code": ""}
        for each in containers
    ]


def respond(gateway: Gateway, key: str, **body: Any) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.post("/responses", json={"model": "m", "input": "x", **body})


def costs(gateway: Gateway) -> list[Decimal | None]:
    """Of each row, without what 30 tokens in and 9 out cost at 5 and 30."""
    tokens = Decimal(30 * 5 + 9 * 30) / 1_000_000
    return [row["cost"] and Decimal(row["cost"]) - tokens for row in gateway.rows()]


# ── What further things cost ─────────────────────────────────────────────────────────────────────


def test_file_searches_containers_and_long_cache_writes_are_billed(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    written = {"cache_write_tokens": 20, "cache_write_tokens_details": {"ttl_12h_tokens": 8}}
    searches = [{"type": "file_search_call", "id": f"fs_{each}", "queries": []} for each in "ab"]
    upstream.script = json_answer(
        answering(*searches, *ran_in("cntr_1", "cntr_2"), input_tokens_details=written)
    )
    assert respond(gateway, key, tools=TOOLS[:2]).status_code == 200
    row = gateway.row()
    names = ("cache_write_tokens", "cache_write_12h_tokens", "file_searches", "containers")
    assert [row[name] for name in names] == [20, 8, 2, 2]
    tokens = 10 * 5 + 12 * 6 + 8 * Decimal("12.5") + 9 * 30
    assert Decimal(row["cost"]) == tokens / 1_000_000 + Decimal("0.005") + Decimal("0.06")
    total = gateway.api("GET", "/usage")["totals"]
    assert [total[name] for name in names] == [20, 8, 2, 2]


RATE = st.none() | st.integers(0, 10**9)


@given(
    st.fixed_dictionaries(dict.fromkeys(rates_module.RATES, RATE)),
    st.tuples(*[st.integers(0, 1000)] * 4),
)
def test_what_was_not_given_costs_nothing_extra(rates: Any, used: tuple[int, ...]) -> None:
    """By a formula of its own: 12-hour writes are a part of all writes, calls are not tokens."""
    plain, kept, searches, containers = used
    usage = Usage(
        input_tokens=plain + kept,
        cache_write_tokens=plain + kept,
        cache_write_12h_tokens=kept,
        file_searches=searches,
        containers=containers,
    )
    write = next(rates[n] for n in ("cache_write", "input") if rates[n] is not None or n == "input")
    write = write or 0
    long = write if rates["cache_write_12h"] is None else rates["cache_write_12h"]
    expected = (plain * write + kept * long + 500_000) // 1_000_000
    expected += searches * (rates["file_search"] or 0) + containers * (rates["container"] or 0)
    price = Price("m", **rates)
    assert price.cost(usage, images=False) == expected
    calls = searches * (rates["file_search"] or 0) + containers * (rates["container"] or 0)
    assert price.max_cost(plain + kept, 0, images=False, long_cache=True) >= expected - calls


def test_a_container_is_billed_once(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """In parallel, seen again, by another account, and after a restart."""
    gateway = make_gateway(REFUSE).start()
    key, other = gateway.new_key(), gateway.new_key("other")
    add_price(gateway, **ALL_RATES)
    go = threading.Event()

    async def together(request: Received, reply: Reply) -> None:
        await reply.wait(go)
        name = str(len(upstream.requests))
        await json_answer(answering(*ran_in("cntr_1"), name=name))(request, reply)

    upstream.script = together
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(respond, gateway, key) for _ in range(4)]
        upstream.wait_for(lambda: upstream.in_flight == 4)
        go.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert sorted(costs(gateway)) == [0, 0, 0, Decimal("0.03")]  # type: ignore[type-var]
    respond(gateway, other)
    gateway.restart()
    upstream.script = json_answer(answering(*ran_in("cntr_1", "cntr_2"), name="again"))
    respond(gateway, key)
    assert [row["containers"] for row in gateway.rows()[4:]] == [None, 1]


def test_who_is_interrupted_or_fails_pays_for_no_container(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """The next request in whose answer it is pays for it."""
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    shown = {"type": "response.output_item.done", "item": ran_in("cntr_1")[0]}
    created = {"type": "response.created", "response": answering() | {"usage": None}}
    sent = threading.Event()

    async def hang(_: Received, reply: Reply) -> None:
        await reply.head(headers={"content-type": "text/event-stream"})
        for event in (created, shown):
            await reply.send(b"data: %b\n\n" % json.dumps(event).encode())
        sent.set()
        await reply.wait(threading.Event())

    upstream.script = hang
    with gateway.begin(key, {"model": "m", "input": "x", "stream": True}) as sock:
        while b"cntr_1" not in sock.recv(65536):
            pass
        gateway.kill()
    gateway.start()
    upstream.script = json_answer(answering(*ran_in("cntr_1"), name="2"))
    respond(gateway, key)
    respond(gateway, key)
    assert [row["outcome"] for row in gateway.rows()] == ["interrupted", "completed", "completed"]
    assert costs(gateway) == [None, Decimal("0.03"), 0]


def test_a_background_response_pays_after_a_kill(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """Also for a container that the earlier process had seen."""
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    queued = answering(*ran_in("cntr_1")) | {"status": "in_progress", "usage": None}
    upstream.script = json_answer({**queued, "background": True})
    answer = respond(gateway, key, background=True)
    assert answer.status_code == 200
    gateway.kill()
    upstream.script = json_answer(answering(*ran_in("cntr_1", "cntr_2")) | {"status": "completed"})
    gateway.start()
    wait_until(lambda: gateway.row()["outcome"] == "completed")
    assert costs(gateway) == [Decimal("0.06")]
    assert gateway.row()["containers"] == 2


def test_over_a_websocket_as_well(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Of a turn, and of a response that is no turn's."""
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)

    async def talk(socket: Socket) -> None:
        await socket.recv()
        for name, container in (("1", "cntr_1"), ("stray", "cntr_2"), ("stray2", "cntr_2")):
            whole = answering(*ran_in(container), name=name)
            if name == "1":
                await socket.send({"type": "response.created", "response": whole | {"usage": None}})
            await socket.send({"type": "response.completed", "response": whole})
        await socket.recv()

    upstream.talk = talk
    headers = {"authorization": f"Bearer {key}"}
    url = gateway.base_url.replace("http", "ws") + "/responses"
    with connect(url, additional_headers=headers) as socket:
        refused = {"type": "response.create", "model": "m", "input": "x", "tools": TOOLS[:1]}
        add_price(gateway, "n", input="1")
        socket.send(json.dumps({**refused, "model": "n"}))
        error = json.loads(socket.recv())["error"]
        assert (error["code"], error["param"]) == ("invalid_request", "tools")
        socket.send(json.dumps({"type": "response.create", "model": "m", "input": "x"}))
        wait_until(lambda: len(gateway.rows()) == 3)
    wait_until(lambda: costs(gateway).count(None) == 0)
    assert [row["containers"] for row in gateway.rows()] == [1, 1, None]
    assert costs(gateway) == [Decimal("0.03"), Decimal("0.03"), 0]


# ── What has no rate is refused ──────────────────────────────────────────────────────────────────

LONG = {"mode": "explicit", "ttl": "12h"}
PART = {"type": "input_text", "text": "x", "prompt_cache_breakpoint": LONG}
LIFETIMES: list[dict[str, Any]] = [
    {"prompt_cache_options": {"ttl": "12h"}},
    {"prompt_cache_options": {"x": {"ttl": "30m"}, "ttl": "13h"}},
    {"prompt_cache_options": {"ttl": 43200}},
    {"prompt_cache_options": {"x": "y" * 100_000, "ttl": "12h"}},
    {"input": [{"role": "user", "content": [PART]}]},
    {"input": [{"type": "function_call_output", "call_id": "c", "output": [PART]}]},
    {"input": [{"role": "user", "content": [{**PART, "text": "x" * 200_000}] * 3}]},
]


def missing(answer: httpx2.Response) -> tuple[int, str, str, bool]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"], "has no rate" in error["message"]


def test_what_the_price_has_no_rate_for_is_refused(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, input="5", output="30")
    upstream.script = json_answer(answering())
    nested = {"type": "namespace", "name": "n", "description": "", "tools": [TOOLS[0]]}
    later = {"type": "additional_tools", "role": "developer", "tools": [TOOLS[1]]}
    for tool in (*TOOLS, nested):
        found = missing(respond(gateway, key, tools=[tool]))
        assert found == (400, "invalid_request", "tools", True), tool
    found = missing(respond(gateway, key, input=[later]))
    assert found == (400, "invalid_request", "tools", True)
    for body in LIFETIMES:
        found = missing(respond(gateway, key, **body))
        assert found == (400, "invalid_request", "prompt_cache_options", True), body
    with gateway.client(key) as client:
        part = {"type": "text", "text": "x", "prompt_cache_breakpoint": LONG}
        messages = [{"role": "user", "content": [part]}]
        chat = client.post("/chat/completions", json={"model": "m", "messages": messages})
        assert missing(chat) == (400, "invalid_request", "prompt_cache_options", True)
    assert not upstream.requests
    message = respond(gateway, key, tools=[TOOLS[0]]).json()["error"]["message"]
    assert message == (
        "This request uses the file search tool, but the price of the model 'm' has no rate "
        "'file_search'. Ask your administrator to add it."
    )
    assert respond(gateway, key, tools=HARMLESS).status_code == 200
    usual = {"prompt_cache_options": {"ttl": "30m"}, "metadata": {"ttl": "12h"}}
    assert respond(gateway, key, **usual).status_code == 200
    assert respond(gateway, key, prompt_cache_options={"ttl": None}).status_code == 200
    add_price(gateway, file_search="0", container="0", cache_write_12h="12.5")
    for tool in (*TOOLS, nested):
        assert respond(gateway, key, tools=[tool]).status_code == 200, tool
    for body in LIFETIMES:
        assert respond(gateway, key, **body).status_code == 200, body


@pytest.mark.parametrize(
    "text",
    [
        b'"prompt_cache_options":{"t\\u0074l":"12h"}',
        b'"prompt_cache_options":{"ttl":"\\u0031\\u0032h"}',
        b'"prompt_cache_options":{"ttl":"30m","ttl":"12h"}',
        b'"prompt_cache_options":{"TTL":"12h"}',
        b'"\\u0070rompt_cache_options":{"ttl":"12h"}',
        b'"Prompt_Cache_Options":{"ttl":"12h"}',
        b'"tools":[{"type":"file\\u005fsearch"}]',
        b'"tools":[{"Type":"file_search"}]',
        b'"tools":[{"type":"shell","Environment":{"type":"container_auto"}}]',
        b'"tools":[{"type":"shell","environment":{"Type":"container_auto","type":"local"}}]',
        b'"tools":[{"type":"code_interpreter","container":"","Container":{"type":"auto"}}]',
        b'"tools":[{"type":"code_interpreter","container":""}]',
    ],
)
def test_no_disguise_passes(make_gateway: MakeGateway, upstream: Upstream, text: bytes) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, input="5", output="30")
    with gateway.client(key) as client:
        body = b'{"model":"m","input":"x",%b}' % text
        answer = client.post(
            "/responses", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    assert not upstream.requests


def test_what_is_built_on_brings_its_tools_along(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """A response's input stays for those that follow, also after a restart, at another price."""
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    add_price(gateway, "n", input="5", output="30")
    later = {"type": "additional_tools", "role": "developer", "tools": [TOOLS[0]]}
    for name, items in (("tools", [later]), ("cache", [{"role": "user", "content": [PART]}])):
        upstream.script = json_answer(answering(name=name))
        assert respond(gateway, key, input=items).status_code == 200
        upstream.script = json_answer(answering(name=f"{name}2"))
        assert respond(gateway, key, previous_response_id=f"resp_{name}").status_code == 200
    gateway.restart()
    before = len(upstream.requests)
    for name, member in (("tools", "tools"), ("cache", "prompt_cache_options")):
        for each in (name, f"{name}2"):
            answer = respond(gateway, key, model="n", previous_response_id=f"resp_{each}")
            assert missing(answer) == (400, "invalid_request", member, True)
    assert len(upstream.requests) == before


def test_where_unpriced_models_are_free_they_cost_nothing(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(FREE).start()
    key = gateway.new_key()
    add_price(gateway, input="5", output="30")
    search = {"type": "file_search_call", "id": "fs_1", "queries": []}
    upstream.script = json_answer(answering(search, *ran_in("cntr_1")))
    assert respond(gateway, key, tools=TOOLS, **LIFETIMES[0]).status_code == 200
    assert costs(gateway) == [0]
    assert gateway.row()["file_searches"] == gateway.row()["containers"] == 1


def test_another_tiers_price_needs_the_rates_as_well(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    add_price(gateway, tier="flex", input="2", output="10", take_over=False)
    upstream.script = json_answer(answering())
    for tier, status in (("default", 200), ("flex", 400), ("auto", 400), (None, 400)):
        answer = respond(gateway, key, tools=TOOLS[:1], service_tier=tier)
        assert answer.status_code == status, (tier, answer.text)


# ── Which price applies ──────────────────────────────────────────────────────────────────────────


def test_a_pattern_says_which_models_it_does_not_apply_to(make_gateway: MakeGateway) -> None:
    """CASES 24."""
    gateway = make_gateway(REFUSE)
    gateway.cli("price", "import", str(ROOT / "prices.toml"))
    done = gateway.run("price", "add", "gpt-5.5*", "--input", "6", "--output", "36")
    assert done.returncode == 0
    assert "Applies to no known model." in done.stdout
    assert "Does not apply to gpt-5.5: the price of 'gpt-5.5' is more specific." in done.stdout
    assert "Does not apply to gpt-5.5-20*: the price of 'gpt-5.5-20*' is more" in done.stdout
    (row,) = (row for row in gateway.cli("price", "list")["prices"] if row["model"] == "gpt-5.5*")
    assert row["shadowed_by"] == ["gpt-5.5", "gpt-5.5-20*"]
    (line,) = (
        line for line in gateway.run("price", "list").stdout.splitlines() if "gpt-5.5* " in line
    )
    assert line.endswith("gpt-5.5, gpt-5.5-20*")
    found = gateway.cli("price", "which", "gpt-5.5")
    assert found["applies"]["model"] == "gpt-5.5"
    reasons = {(each["model"], each["tier"]): each["because"] for each in found["others"]}
    assert reasons["gpt-5.5*", "default"] == "the price of 'gpt-5.5' is more specific"
    assert reasons["gpt-5.5", "flex"] == "it is for the tier 'flex'"
    added = gateway.cli("price", "add", "gpt-5.5", "--input", "4")
    assert added["applies_to"] == ["gpt-5.5"]
    assert added["does_not_apply_to"] == []
    added = gateway.cli("price", "add", "gpt-5.5*", "--input", "5")
    assert added["does_not_apply_to"][0] == {
        "model": "gpt-5.5",
        "because": "the price of 'gpt-5.5' is more specific",
    }


def test_the_documented_example_applies(make_gateway: MakeGateway) -> None:
    """Each price that docs/billing.md adds applies in the end."""
    gateway = make_gateway(REFUSE)
    page = (ROOT / "docs" / "billing.md").read_text()
    lines = [line.partition("#")[0].strip() for line in page.splitlines()]
    commands = [line.split() for line in lines if line.startswith("redbtc-proxy price add")]
    assert commands
    gateway.cli("price", "import", str(ROOT / "prices.toml"))
    for command in commands:
        words = [word.strip('"') for word in command[1:]]
        added = gateway.cli(*words)
        assert added["added"] == 1
        assert added["does_not_apply_to"] == []
        effective = added["prices"][0]["effective_at"]
        found = gateway.cli("price", "which", words[2], "--at", effective)
        assert found["applies"]["id"] == added["prices"][0]["id"]


def test_models_in_use_and_listed_are_known(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, "ft:*", input="1", output="1")
    upstream.script = json_answer(answering())
    respond(gateway, key, model="ft:mine")
    added = add_price(gateway, "ft:m*", input="1", output="0.5")
    assert added["applies_to"] == ["ft:mine"]
    assert add_price(gateway, "gpt-*", input="1")["applies_to"] == []
    upstream.script = json_answer({"object": "list", "data": [{"id": "gpt-up"}, {"id": "x"}]})
    with gateway.client(key) as client:
        assert client.get("/models").status_code == 200
    assert add_price(gateway, "gpt-*", input="2")["applies_to"] == ["gpt-up"]
    accounts = gateway.api("GET", "/accounts/test/prices")["prices"]
    assert all("ft:mine" not in row["shadowed_by"] for row in accounts)


def test_a_tier_alone_applies_to_nothing(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE).start()
    added = add_price(gateway, "m", tier="flex", input="1")
    (refused,) = added["does_not_apply_to"]
    assert "has no price for the tier 'default'" in refused["because"]
    found = which(gateway, "m", tier="flex")
    assert found["applies"] is None
    assert "are refused" in found["why"]
    assert [each["because"] for each in found["others"]] == [refused["because"]]
    add_price(gateway, "*", input="3")
    assert which(gateway, "m", tier="flex")["applies"]["model"] == "*"
    assert which(gateway, "m")["others"][0]["because"] == refused["because"]
    add_price(gateway, "m", input="2")
    assert which(gateway, "m", tier="flex")["applies"]["tier"] == "flex"
    assert which(gateway, "m", tier="fast")["why"].endswith(
        "It has no price for the tier 'priority', so the price of 'default' applies."
    )


def test_which_looks_at_time_tier_and_threshold(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE).start()
    add_price(gateway, "m*", input="9")
    add_price(gateway, "m*", input="8")
    add_price(gateway, "m", input="1", effective="10d")
    add_price(gateway, "m*", above_input_tokens=100, input="16")
    found = which(gateway, "m")
    assert (found["applies"]["model"], found["applies"]["input"]) == ("m*", "8")
    because = [each["because"] for each in found["others"]]
    assert because[0].startswith("it takes effect at ")
    assert because[1].startswith("a newer price replaced it at ")
    assert because[2] == "it applies above 100 input tokens"
    assert which(gateway, "m", input_tokens=100)["applies"]["input"] == "8"
    found = which(gateway, "m", input_tokens=101)
    assert found["applies"]["input"] == "16"
    assert found["others"][2]["because"] == "another price applies above 100 input tokens"
    assert which(gateway, "m", at="11d")["applies"]["model"] == "m"
    assert which(gateway, "mm", at="11d")["applies"]["model"] == "m*"
    assert which(gateway, "other")["others"] == []
    text = gateway.run("price", "which", "m", "--at", "11d").stdout
    assert "Does not apply: m*, current since" in text


NAMES = st.text("ab*?", min_size=1, max_size=3)
PRICES = st.lists(
    st.builds(
        Price,
        model=NAMES,
        tier=st.sampled_from(["default", "flex"]),
        above_input_tokens=st.sampled_from([0, 100]),
        effective_at=st.integers(0, 3),
        input=st.integers(0, 9),
    ),
    max_size=8,
)


@given(PRICES, st.text("ab", min_size=1, max_size=3), st.integers(0, 3))
def test_which_says_what_is_billed(prices: list[Price], model: str, at: int) -> None:
    """Exactly one of all that match applies, the one by which a request is billed."""
    numbered = [structs.replace(price, id=number) for number, price in enumerate(prices, 1)]
    of_all = PriceTable(numbered)
    for tier in ("default", "flex"):
        for tokens in (0, 101):
            applied, others = of_all.which(model, at, tier, tokens)
            tariff = of_all.model_prices(model, at)
            billed = tariff and tariff.price(tier, tokens)
            assert applied is billed
            ids = [each.id for each in others] + ([applied.id] if applied else [])
            meant = [price.id for price in numbered if model_patterns.matches(model, [price.model])]
            assert sorted(ids) == meant
            assert all(each.because for each in others)


# ── What is not given ────────────────────────────────────────────────────────────────────────────


def test_what_is_not_given_is_taken_over(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE)
    options = ["--cached-input", "0.5", "--web-search", "0.01", "--max-output-tokens", "1000"]
    gateway.cli("price", "add", "m", "--input", "5", "--output", "30", *options)
    done = gateway.run("price", "add", "m", "--input", "9")
    taken = (
        "m: rates copied from m: cached_input 0.5, output 30, web_search 0.01, max_output_tokens"
    )
    taken += " 1000."
    assert taken in done.stdout
    row = gateway.cli("price", "which", "m")["applies"]
    names = ("input", "cached_input", "output", "web_search", "max_output_tokens", "cache_write")
    assert [row[name] for name in names] == ["9", "0.5", "30", "0.01", 1000, None]


def test_two_prices_of_the_same_slot_are_refused(make_gateway: MakeGateway) -> None:
    """Also where one of them is in force already."""
    gateway = make_gateway(REFUSE)
    file = gateway.folder / "two.toml"
    gateway.cli("price", "add", "m", "--input", "5")
    for rates, refused in ((("5", "6"), True), (("6", "6"), False)):
        file.write_text("".join(f'[[prices]]\nmodel = "m"\ninput = {each}\n' for each in rates))
        done = gateway.run("price", "import", str(file))
        assert ("two different prices of m take effect at 20" in done.stderr) is refused
        assert done.returncode == int(refused)


def test_a_later_price_that_is_there_already_is_told_of(make_gateway: MakeGateway) -> None:
    """It does not take over what is added now, and would undo it silently."""
    gateway = make_gateway(REFUSE)
    gateway.cli("price", "add", "m", "--input", "5", "--output", "30")
    later = gateway.run(
        "price", "add", "m", "--output", "31", "--effective", "2999-01-01T00:00:00Z"
    )
    assert "later price" not in later.stdout
    done = gateway.run("price", "add", "m", "--input", "6")
    told = "m: a later price takes effect at 2999-01-01T00:00:00.000Z: input 5, output 31."
    assert told in done.stdout
    done = gateway.run("price", "add", "m", "--tier", "flex", "--input", "6")
    assert "later price" not in done.stdout


def test_a_name_takes_over_from_the_pattern_that_applied(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(REFUSE).start()
    add_price(gateway, "m*", input="5", output="30", web_search="0.01")
    added = add_price(gateway, "mm", input="6")
    assert added["taken_over"] == [
        {
            "model": "mm",
            "tier": "default",
            "above_input_tokens": 0,
            "from": {"model": "m*", "tier": "default", "above_input_tokens": 0},
            "rates": {"output": "30", "web_search": "0.01"},
        }
    ]
    assert added["prices"][0]["web_search"] == "0.01"
    narrower = add_price(gateway, "mmm*", input="6")
    assert narrower["taken_over"][0]["rates"] == {"output": "30", "web_search": "0.01"}
    flex = add_price(gateway, "mm", tier="flex", input="3", output="15")
    assert flex["taken_over"][0]["rates"] == {"web_search": "0.01"}
    coming = add_price(gateway, "mm", input="7", effective="40d")
    add_price(gateway, "mm", output="31", effective="50d")
    assert coming["prices"][0]["output"] == "30"
    found = which(gateway, "mm", at="51d")["applies"]
    assert (found["input"], found["output"]) == ("7", "31")
    assert which(gateway, "mm")["applies"]["input"] == "6"


def test_an_import_gives_all_that_it_gives(make_gateway: MakeGateway, tmp_path: Path) -> None:
    gateway = make_gateway(REFUSE).start()
    add_price(gateway, input="5", output="30", web_search="0.01", file_search="0.0025")
    file = tmp_path / "own.toml"
    file.write_text('prices = [{model = "m", input = 5, output = 30}]')
    done = gateway.run("price", "import", str(file))
    assert "m: no longer has these rates: web_search 0.01, file_search 0.0025." in done.stdout
    row = which(gateway, "m")["applies"]
    assert (row["web_search"], row["file_search"]) == (None, None)
    again = gateway.cli("price", "import", str(file))
    assert (again["added"], again["unchanged"], again["left_out"]) == (0, 1, [])


def test_a_rise_is_said_to_be_published(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(REFUSE).start()
    key = gateway.new_key()
    add_price(gateway, **ALL_RATES)
    upstream.script = json_answer(answering())
    assert respond(gateway, key).status_code == 200
    rise = ["price", "add", "m", "--file-search", "0.003", "--container", "0.04"]
    refused = gateway.run(*rise)
    assert "would cost more" in refused.stderr
    assert (
        "file search from 0.0025 to 0.003 per call, container from 0.03 to 0.04 per container"
        in refused.stderr
    )
    text = (
        "Price increase (USD per million tokens). m: file search from 0.0025 to 0.003 per call, "
        "container from 0.03 to 0.04 per container."
    )
    done = gateway.run(*rise, "--effective", "31d")
    assert f": {text}" in done.stdout
    assert "Published notice, effective " in done.stdout
    (notice,) = add_price(gateway, input="6", effective="32d")["notices"]
    assert "m: input from 5 to 6." in notice["text"]
    assert [each["text"] for each in gateway.api("GET", "/notices")["notices"]] == [
        text,
        notice["text"],
    ]


@pytest.mark.parametrize(("settings", "rises"), [(REFUSE, False), (FREE, True)])
def test_a_first_rate_is_a_rise_only_of_what_was_free(
    make_gateway: MakeGateway, upstream: Upstream, settings: str, rises: bool
) -> None:
    gateway = make_gateway(settings).start()
    key = gateway.new_key()
    add_price(gateway, input="5", output="30")
    upstream.script = json_answer(answering())
    respond(gateway, key)
    done = gateway.run("price", "add", "m", "--file-search", "0.0025", "--cache-write-12h", "9")
    assert (done.returncode != 0) is rises, done.stderr


WITHOUT_TOOLS = re.compile("image|embedding|transcribe|whisper|tts|audio|instruct|-002")


def test_the_example_has_every_rate(make_gateway: MakeGateway) -> None:
    """For each model that has tools, so that nothing of theirs is refused with it."""
    gateway = make_gateway(REFUSE)
    for row in gateway.cli("price", "import", str(ROOT / "prices.toml"))["prices"]:
        if not WITHOUT_TOOLS.search(row["model"]):
            assert (row["file_search"], row["container"]) == ("0.0025", "0.03"), row
        assert (row["cache_write"] is None) is (row["cache_write_12h"] is None)
        if row["cache_write"]:
            assert Decimal(row["cache_write_12h"]) == 2 * Decimal(row["cache_write"])


# ── A budget outlives its key ────────────────────────────────────────────────────────────────────

SIZE = len('{"model":"m","input":"x","max_output_tokens":1}')  # tokens that are held for it


def test_a_rotated_key_goes_on_with_its_budget(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(REFUSE).start()
    add_price(gateway, input="1000000", output="0", max_output_tokens=1)
    used: dict[str, Any] = {"input_tokens": 1, "output_tokens": 0, "total_tokens": 1}
    upstream.script = json_answer(answering(**used))
    gateway.api("POST", "/accounts", {"name": "a"})
    keys = [gateway.api("POST", "/accounts/a/keys", {"monthly_budget": "1000"})]

    def rotate() -> None:
        path = f"/keys/{keys[-1]['id']}/rotate"
        keys.append(gateway.api("POST", path, {"overlap": "24h"}))

    def spent() -> set[str]:
        found = set()
        for each in keys:
            me = httpx2.get(
                f"{gateway.url}/admin/v1/me",
                headers={"authorization": f"Bearer {each['key']}"},
                trust_env=False,
            ).json()
            found.add(me["limits"]["key"]["monthly_budget"]["spent"])
        return found

    def use(number: int) -> int:
        return respond(gateway, keys[number]["key"], max_output_tokens=1).status_code

    assert use(0) == 200
    rotate()
    assert use(1) == use(0) == 200
    rotate()
    gateway.restart()
    assert use(2) == use(1) == use(0) == 200  # whichever reads the sum first
    assert spent() == {"6"}
    first = {each["budget_id"] for each in gateway.api("GET", "/accounts/a/keys")["keys"]}
    assert first == {keys[0]["id"]}
    upstream.script = json_answer(answering(**{**used, "input_tokens": 995 - SIZE}))
    assert use(1) == 200
    rotate()
    assert [use(number) for number in range(4)] == [429] * 4
    notices = gateway.api("GET", "/notices")["notices"]
    assert [(each["percent"], each["key_id"]) for each in notices] == [
        (50, keys[0]["id"]),
        (80, keys[0]["id"]),
    ]
    assert (
        f"of key {keys[1]['id']} (shared with the keys it replaced) has been spent"
        in notices[0]["text"]
    )
    other = gateway.api("POST", "/accounts/a/keys", {"monthly_budget": "1000"})
    assert respond(gateway, other["key"], max_output_tokens=1).status_code == 200


def test_both_keys_of_an_overlap_hold_together(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(REFUSE).start()
    add_price(gateway, input="1000000", output="0", max_output_tokens=1)
    gateway.api("POST", "/accounts", {"name": "a"})
    old = gateway.api("POST", "/accounts/a/keys", {"monthly_budget": str(2 * SIZE - 1)})
    new = gateway.api("POST", f"/keys/{old['id']}/rotate", {"overlap": "24h"})
    go = threading.Event()

    async def later(request: Received, reply: Reply) -> None:
        await reply.wait(go)
        await json_answer(answering())(request, reply)

    upstream.script = later
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(respond, gateway, old["key"], max_output_tokens=1)
        upstream.wait_for(lambda: upstream.in_flight == 1)
        assert respond(gateway, new["key"], max_output_tokens=1).status_code == 429
        go.set()
        assert first.result().status_code == 200
