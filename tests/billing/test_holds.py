"""Nobody spends more than is there: what is held before a request is never less than its cost."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx2
import pytest
from websockets.sync.client import ClientConnection, connect

from redbtc.refusals import Refusal
from redbtc.request_body.body import RequestBody
from redbtc.request_body.facts import DEFAULT_IMAGE_MODEL
from redbtc.request_body.forms import Form
from redbtc.steps import result_of
from tests.helpers.gateway import PATIENCE_SECONDS, MakeGateway, wait_until
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    chat_chunk,
    chat_json,
    event,
    json_answer,
    response_object,
    stream,
    wants_stream,
)

pytestmark = pytest.mark.promise_8

MODEL, PICTURE_TOKENS, ANSWER_TOKENS = "gpt-up", 2000, 10_000
USUAL_CALLS = 32  # billing.hold_tool_calls
USUAL_PICTURES = 4  # of a response that doesn't say how many
PARALLEL = 8


class Honest:
    """An upstream like OpenAI's that uses as much as a request's members allow. It takes heed of
    the members that its API has at each endpoint and of no other."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.stored: dict[str, int] = {}  # tokens of what can be built on, by id
        self.running: dict[str, dict[str, Any]] = {}  # background responses
        self.made = 0
        self.bytes_a_token = 4
        self.begun_usage: dict[str, int] | None = None  # in the first event of a stream
        self.author: str | None = None  # of SVGs

    async def __call__(self, request: Received, reply: Reply) -> None:
        await asyncio.sleep(self.seconds)
        path = request.path.removeprefix("/v1")
        if request.method == "GET":
            response = self.running[path.rpartition("/")[2]]
            await json_answer(response | {"status": "completed"})(request, reply)
        elif path == "/chat/completions":
            await self._chat(request, reply)
        elif path.startswith("/images"):
            await self._draw(request, reply)
        else:
            await self._respond(request, reply)

    # Chat

    async def _chat(self, request: Received, reply: Reply) -> None:
        body = request.json()
        limits = [body.get("max_tokens"), body.get("max_completion_tokens")]
        output = most_of(limits) * (body.get("n") or 1)
        usage = {"prompt_tokens": tokens_of(body), "completion_tokens": output}
        usage["total_tokens"] = sum(usage.values())
        if not body.get("stream"):
            await chat_json(usage)(request, reply)
            return
        pieces = [event(chat_chunk(MODEL, {"content": "Hello"}))]
        if (body.get("stream_options") or {}).get("include_usage"):
            pieces.append(event(chat_chunk(MODEL, {}, usage=usage) | {"choices": []}))
        await stream([*pieces, b"data: [DONE]\n\n"])(request, reply)

    # Images

    async def _draw(self, request: Received, reply: Reply) -> None:
        number, read = form_number(request), 100
        if number is None:
            number, read = request.json().get("n") or 1, tokens_of(request.json())
        usage = {"input_tokens": read, "output_tokens": PICTURE_TOKENS * number}
        usage["total_tokens"] = sum(usage.values())
        written: dict[str, Any] = {}
        if self.author and b'"svg"' in request.body.replace(b"\r\n", b'"'):
            written["svg_usage"] = self._written(number)
        await json_answer({"created": 1, "data": [], "usage": usage, **written})(request, reply)

    def _written(self, number: int) -> dict[str, Any]:
        """Return the usage of the author of this number of SVGs."""
        return {"input_tokens": 10, "output_tokens": ANSWER_TOKENS * number, "model": self.author}

    # Responses

    async def _respond(self, request: Received, reply: Reply) -> None:
        body = request.json()
        response = self.response(body, compact=request.path.endswith("compact"))
        if body.get("background"):
            self.running[response["id"]] = response
            response = response | {"status": "queued", "usage": None, "output": []}
        if not wants_stream(request):
            await json_answer(response)(request, reply)
            return
        begun, *more = map(event, self.events(response))
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(begun)
        await asyncio.sleep(self.seconds)
        if "torn" in (body.get("metadata") or ()):
            self.running[response["id"]] = response
            reply.tear()
        await reply.send(b"".join(more))
        await reply.end()

    def events(self, response: dict[str, Any]) -> list[dict[str, Any]]:
        """What is streamed of a response."""
        begun = response | {"status": "in_progress", "usage": self.begun_usage, "output": []}
        items = [{"type": "response.output_item.added", "item": i} for i in response["output"]]
        last = {"type": "response.completed", "response": response}
        return [{"type": "response.created", "response": begun}, *items, last]

    def response(self, body: dict[str, Any], compact: bool = False) -> dict[str, Any]:
        self.made = number = self.made + 1
        items = body["input"] if isinstance(body["input"], list) else []
        into = tokens_of(body["input"], self.bytes_a_token)
        own = into
        into += self.stored.get(body.get("previous_response_id") or "", 0)
        conversation = body.get("conversation") or body.get("metadata", {}).get("begins")
        into += self.stored.get(conversation or "", 0)
        into += sum(self.stored.get(item.get("id", ""), 0) for item in items)
        output = ANSWER_TOKENS if compact else most_of([body.get("max_output_tokens")])
        calls = pictures = max(0, body.get("max_tool_calls") or 0)
        if compact or not calls:  # compaction has no such member
            calls, pictures = USUAL_CALLS, USUAL_PICTURES
        offered = list(body.get("tools") or ())
        for item in items:
            offered += item.get("tools") or ()
        kinds = {tool["type"] for tool in offered}
        tools: dict[str, Any] = {}
        message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
        made: list[dict[str, Any]] = [message]
        if kinds & {"web_search", "web_search_preview_2025_03_11"}:
            tools["web_search"] = {"num_requests": calls}
        elif any(kind.startswith("image_generation") for kind in kinds):
            drawn = {"input_tokens": 10 * pictures, "output_tokens": PICTURE_TOKENS * pictures}
            tools["image_gen"] = drawn
            if self.author and '"svg"' in json.dumps(offered):
                svg = {"type": "image_generation_call", "id": f"ig_{number}"}
                made.append(svg | {"svg_usage": self._written(pictures)})
        usage = {"input_tokens": into, "output_tokens": output, "total_tokens": into + output}
        if body.get("store") is not False:
            self.stored[f"resp_{number}"] = into + output
            self.stored[f"msg_{number}"] = output
        more: dict[str, Any] = {}
        if conversation:
            self.stored[conversation] = self.stored.get(conversation, 0) + own + output
            more["conversation"] = {"id": conversation}
        if body.get("service_tier"):
            more["service_tier"] = body["service_tier"]
        return response_object(
            MODEL, usage, id=f"resp_{number}", output=made, tool_usage=tools, **more
        )

    async def talk(self, sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            await asyncio.sleep(self.seconds)
            response = self.response(frame)
            self.stored[response["id"]] = response["usage"]["total_tokens"]
            await sock.send(*self.events(response))


def tokens_of(given: Any, bytes_a_token: int = 4) -> int:
    """Return the tokens of an input: its text and its pictures."""
    text = json.dumps(given)
    return len(text) // bytes_a_token + 16_000 * text.count('"image_url": "')


def most_of(limits: list[int | None]) -> int:
    """The output that these limits allow."""
    largest = max((limit for limit in limits if limit and limit > 0), default=ANSWER_TOKENS)
    return min(largest, ANSWER_TOKENS)


def form_number(request: Received) -> int | None:
    """`n` as a lenient reader takes it from a form; None if the body is no form."""
    if not (request.header("content-type") or "").startswith("multipart/"):
        return None
    _, _, rest = request.body.partition(b'name="n"\r\n\r\n')
    return int(rest.partition(b"\r\n")[0]) if rest else 1


@pytest.fixture
def honest(upstream: Upstream) -> Honest:
    upstream.script = honest = Honest()
    upstream.talk = honest.talk
    return honest


class Account:
    """A prepaid account and what it does."""

    def __init__(self, make_gateway: MakeGateway, settings: str = "") -> None:
        limits = "[limits.account]\nconcurrency = 0\nbackground = 0\n"
        self.gateway = make_gateway(f"[billing]\n{settings}{limits}").start()
        prices = [
            price(MODEL, input="5", output="30", web_search="0.01", max_output=ANSWER_TOKENS),
            price("gpt-image-*", input="5", output="30", max_output=PICTURE_TOKENS),
        ]
        self.gateway.api("POST", "/prices", {"prices": prices})
        self.gateway.api("POST", "/accounts", {"name": "prepaid", "credit_limit": "0"})
        self.key = self.gateway.new_key("prepaid")
        self.client = self.gateway.client(self.key)

    def show(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.gateway.api("GET", "/accounts/prepaid")
        return shown

    def fill(self, amount: str = "1") -> None:
        """Make the balance so much."""
        missing = Decimal(amount) - Decimal(self.show()["balance"])
        payment = {"amount": str(missing), "reason": "test"}
        self.gateway.api("POST", "/accounts/prepaid/payments", payment)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        if isinstance(body, dict):
            return self.client.post(path, json={"model": MODEL, **body}, **options)
        return self.client.post(path, content=body, **options)

    def eight(self, path: str, body: dict[str, Any]) -> set[int]:
        """Send so many requests at once, and return the statuses of their answers."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            asks = [pool.submit(self.post, path, body) for _ in range(PARALLEL)]
            return {ask.result().status_code for ask in asks}

    def balance(self) -> Decimal:
        """What is left when nothing is in flight any more."""
        wait_until(lambda: self.show()["held"] == "0")
        return Decimal(self.show()["balance"])


@pytest.fixture
def account(make_gateway: MakeGateway, honest: Honest) -> Iterator[Account]:
    account = Account(make_gateway)
    with account.client:
        yield account


def price(model: str, *, max_output: int, **rates: str) -> dict[str, Any]:
    return {"model": model, "max_output_tokens": max_output, **rates}


def form(fields: dict[str, str], boundary: str = "xyz") -> tuple[bytes, dict[str, str]]:
    """A form's body and headers."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    body = "".join([*parts, f"--{boundary}--\r\n"]).encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


# ── Attacks ──────────────────────────────────────────────────────────────────────────────────────

SEARCH, DRAW = {"type": "web_search"}, {"type": "image_generation"}
SHORT = {"input": "x", "max_output_tokens": 100}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "a limit of chat": ("/responses", {"input": "x", "max_tokens": 1, "max_completion_tokens": 1}),
    "a limit of responses": ("/chat/completions", {"messages": [], "max_output_tokens": 1}),
    "a limit of compaction": ("/responses/compact", {"input": "x", "max_output_tokens": 1}),
    "the smaller limit": ("/chat/completions", {"max_tokens": 1, "max_completion_tokens": 9999}),
    "no limit": ("/responses", {"input": "x", "max_output_tokens": 0}),
    "calls of tools": ("/responses", {**SHORT, "tools": [SEARCH]}),
    "a limit of calls": ("/responses", {**SHORT, "tools": [SEARCH], "max_tool_calls": 30}),
    "no calls": ("/responses", {**SHORT, "tools": [SEARCH], "max_tool_calls": -1}),
    "a dated tool": ("/responses", {**SHORT, "tools": [{"type": "web_search_preview_2025_03_11"}]}),
    "tools in the input": (
        "/responses",
        {**SHORT, "input": [{"type": "additional_tools", "tools": [SEARCH]}]},
    ),
    "pictures": ("/responses", {**SHORT, "tools": [DRAW], "max_tool_calls": 5}),
    "a dated image tool": (
        "/responses",
        {**SHORT, "tools": [{"type": "image_generation_2026_01_01"}], "max_tool_calls": 5},
    ),
    "images": ("/images/generations", {"model": DEFAULT_IMAGE_MODEL, "n": 9, "max_tokens": 1}),
    "images of the usual model": ("/images/edits", {"model": None, "n": 9}),
}


def test_eight_at_once_do_not_spend_more_than_there_is(account: Account, honest: Honest) -> None:
    honest.seconds = 0.1
    for attack, (path, body) in ATTACKS.items():
        account.fill()
        assert account.eight(path, body) == {200, 429}, attack
        assert account.balance() >= 0, attack


LONG_INPUT: dict[str, Any] = {**SHORT, "input": "x" * 80_000}
LONG_OUTPUT = {**SHORT, "max_output_tokens": ANSWER_TOKENS}
HISTORIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LONG_INPUT, {"previous_response_id": "resp_%d"}),
    ({**LONG_INPUT, "stream": True}, {"previous_response_id": "resp_%d"}),
    (LONG_OUTPUT, {"input": [{"type": "item_reference", "id": "msg_%d"}] * 3}),
    ({**LONG_OUTPUT, "stream": True}, {"input": [{"id": "msg_%d"}] * 3}),
]


def test_what_a_request_builds_on_is_held(account: Account, honest: Honest) -> None:
    """It is read again by each request, and as often as it is named."""
    for first, more in HISTORIES:
        account.fill()
        honest.seconds = 0
        assert account.post("/responses", first).status_code == 200
        account.fill("0.5")
        honest.seconds = 0.1
        body = json.loads(json.dumps({**SHORT, **more}).replace("%d", str(honest.made)))
        assert account.eight("/responses", body) == {200, 429}, more
        assert account.balance() >= 0, more


@pytest.fixture
def frugal(make_gateway: MakeGateway, honest: Honest) -> Iterator[Account]:
    """Of a gateway that holds little for a history of which nothing is known."""
    account = Account(make_gateway, "hold_output_tokens = 100\n")
    with account.client:
        yield account


def test_what_has_not_ended_for_the_gateway_is_held_in_full(frugal: Account) -> None:
    """The upstream may have finished it already, so that it can be built on."""
    frugal.fill("0.6")
    first = frugal.post("/responses", {**LONG_INPUT, "background": True})
    frugal.eight("/responses", {**SHORT, "previous_response_id": first.json()["id"]})
    assert frugal.balance() >= 0


def test_input_that_was_listed_before_the_end_is_held_in_full(
    frugal: Account, honest: Honest, upstream: Upstream
) -> None:
    async def answer(request: Received, reply: Reply) -> None:
        if request.path.endswith("input_items"):
            item = {"type": "message", "id": "msg_in", "role": "user", "content": []}
            await json_answer({"object": "list", "data": [item]})(request, reply)
        else:
            await honest(request, reply)

    upstream.script = answer
    frugal.fill("0.6")
    first = frugal.post("/responses", {**LONG_INPUT, "background": True}).json()["id"]
    assert frugal.client.get(f"/responses/{first}/input_items").status_code == 200
    honest.stored["msg_in"] = len(LONG_INPUT["input"]) // 4
    assert frugal.client.get(f"/responses/{first}").json()["status"] == "completed"
    frugal.fill("0.2")
    frugal.eight("/responses", {**SHORT, "input": [{"type": "item_reference", "id": "msg_in"}]})
    assert frugal.balance() >= 0


@pytest.mark.parametrize("streamed", [False, True])
def test_input_of_what_failed_is_held(
    frugal: Account, honest: Honest, upstream: Upstream, streamed: bool
) -> None:
    """It failed before any output and reports no usage, but its input is stored."""
    error = {"code": "server_error", "message": "failed"}
    failed = response_object(MODEL, None, id="resp_f", status="failed", output=[], error=error)
    begun = {"type": "response.created", "response": {**failed, "status": "in_progress"}}

    async def answer(request: Received, reply: Reply) -> None:
        if request.path.endswith("input_items"):
            item = {"type": "message", "id": "msg_in", "role": "user", "content": []}
            await json_answer({"object": "list", "data": [item]})(request, reply)
        elif len(request.body) < 1000:
            await honest(request, reply)
        elif streamed:
            last = {"type": "response.failed", "response": failed}
            await stream([event(begun), event(last)])(request, reply)
        else:
            await json_answer(failed)(request, reply)

    upstream.script = answer
    frugal.fill("0.6")
    assert frugal.post("/responses", {**LONG_INPUT, "stream": streamed}).status_code == 200
    assert frugal.client.get("/responses/resp_f/input_items").status_code == 200
    honest.stored["msg_in"], honest.seconds = len(LONG_INPUT["input"]) // 4, 0.1
    frugal.fill("0.2")
    frugal.eight("/responses", {**SHORT, "input": [{"type": "item_reference", "id": "msg_in"}]})
    assert frugal.balance() >= 0


def test_usage_of_the_beginning_is_not_what_is_built_on(frugal: Account, honest: Honest) -> None:
    """Some upstreams report usage of 0 in the first event."""
    honest.begun_usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
    honest.seconds = 0.1
    frugal.fill("0.6")
    assert frugal.post("/responses", {**LONG_INPUT, "stream": True}).status_code == 200
    frugal.fill("0.2")
    frugal.eight("/responses", {**SHORT, "previous_response_id": "resp_1"})
    assert frugal.balance() >= 0


def test_what_was_estimated_is_held_in_full(
    frugal: Account, honest: Honest, upstream: Upstream
) -> None:
    """The text can have more tokens than it was estimated to have."""

    async def tear(request: Received, reply: Reply) -> None:
        events = honest.events(honest.response(request.json()))
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(event(events[0]))
        await asyncio.sleep(0.1)
        reply.tear()

    upstream.script = tear
    frugal.fill()
    with contextlib.suppress(httpx2.HTTPError):
        frugal.post("/responses", {**LONG_INPUT, "stream": True})
    frugal.balance()
    assert frugal.gateway.rows()[0]["usage_source"] == "estimated"
    upstream.script = honest
    honest.stored["resp_1"] = len(LONG_INPUT["input"])  # a token is a byte
    frugal.fill("0.5")
    frugal.eight("/responses", {**SHORT, "previous_response_id": "resp_1"})
    assert frugal.balance() >= 0


def test_requests_in_one_conversation_are_held_for_each_other(
    frugal: Account, honest: Honest
) -> None:
    """Each reads what those before it have added, some of which have not ended yet."""
    frugal.fill()
    begun = frugal.post("/responses", {**SHORT, "metadata": {"begins": "conv_1"}})
    assert begun.status_code == 200
    honest.seconds = 0.1
    frugal.fill("3.3")
    assert 200 in frugal.eight("/responses", {**LONG_INPUT, "conversation": "conv_1"})
    assert frugal.balance() >= 0
    dense = {**SHORT, "conversation": "conv_1", "background": True, "input": "x" * 200_000}
    honest.seconds = 0
    frugal.fill("1.6")
    assert frugal.post("/responses", dense).status_code == 200
    frugal.eight("/responses", {**SHORT, "conversation": "conv_1"})
    assert frugal.balance() >= 0


def test_a_conversation_can_grow_while_requests_wait_for_their_turn(
    frugal: Account, honest: Honest
) -> None:
    frugal.gateway.api("PATCH", "/accounts/prepaid", {"concurrency": 1})
    frugal.fill()
    begun = frugal.post("/responses", {**SHORT, "metadata": {"begins": "conv_1"}})
    assert begun.status_code == 200
    honest.seconds, honest.bytes_a_token = 0.1, 1
    frugal.fill("2.3")
    assert 200 in frugal.eight("/responses", {**LONG_INPUT, "conversation": "conv_1"})
    assert frugal.balance() >= 0


def test_what_is_built_on_counts_for_the_rate(account: Account, honest: Honest) -> None:
    """So many tokens are charged before the request leaves."""
    account.gateway.api("PATCH", "/accounts/prepaid", {"tokens_per_minute": 100_000})
    account.fill("5")
    assert account.post("/responses", LONG_INPUT).status_code == 200
    honest.seconds = 0.1
    named = {"input": [{"type": "item_reference", "id": "resp_1"}] * 3}
    assert account.eight("/responses", {**SHORT, **named}) == {200, 429}


def test_a_history_of_tool_calls_is_not_held_as_whole_responses(
    account: Account, upstream: Upstream
) -> None:
    """An agent sends its calls again with each request."""
    calls = [
        {"type": "web_search_call", "id": f"ws_{number}", "status": "completed", "action": {}}
        for number in range(20)
    ]
    usage = {"input_tokens": 100_000, "output_tokens": 10, "total_tokens": 100_010}
    upstream.script = json_answer(response_object(MODEL, usage, output=calls))
    account.fill("2")
    assert account.post("/responses", {**SHORT, "input": "x"}).status_code == 200
    account.fill("2")
    assert account.post("/responses", {**SHORT, "input": calls}).status_code == 200


DRAWN: list[dict[str, Any]] = [
    {"type": "image_generation_call", "result": "A" * 2_000_000},
    {"type": "code_interpreter_call", "outputs": [{"type": "image", "url": "A" * 2_000_000}]},
]


@pytest.mark.parametrize("item", DRAWN)
def test_a_drawn_picture_that_is_sent_again_is_held_as_a_picture(
    account: Account, upstream: Upstream, item: dict[str, Any]
) -> None:
    """The SDKs' `input += response.output` sends all of its bytes."""
    drawn = {"id": "ig_1", "status": "completed", **item}
    usage = {"input_tokens": 1000, "output_tokens": 10, "total_tokens": 1010}
    upstream.script = json_answer(response_object(MODEL, usage, output=[drawn]))
    account.gateway.api("PATCH", "/accounts/prepaid", {"tokens_per_minute": 100_000})
    account.fill("2")
    assert account.post("/responses", {**SHORT, "input": "Draw"}).status_code == 200
    again = account.post("/responses", {**SHORT, "input": [drawn]})
    assert again.status_code == 200, again.text
    account.fill("0.08")
    again = account.post("/responses", {**SHORT, "input": [drawn]})
    assert again.json()["error"]["code"] == "insufficient_quota", "16,000 tokens are 0.08"


@pytest.mark.parametrize("options", [{}, {"search_context_size": "low"}, None])
def test_a_chat_that_searches_the_web_pays_for_that(
    account: Account, options: dict[str, Any] | None
) -> None:
    account.fill()
    body = {"messages": [], "max_tokens": 10, "web_search_options": options}
    assert account.post("/chat/completions", body).status_code == 200
    row = account.gateway.row()
    tokens = row["input_tokens"] * 5 + row["output_tokens"] * 30
    searched = options is not None
    assert row["web_searches"] == (1 if searched else None)
    assert Decimal(row["cost"]) == Decimal(tokens) / 1_000_000 + Decimal("0.01") * searched
    account.fill("0.005")
    assert account.post("/chat/completions", body).status_code == (429 if searched else 200)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/responses", {"input": "x", "tools": [SEARCH]}, True),
        ("/responses", {"input": "x", "tools": [SEARCH], "max_tool_calls": 1}, False),
        ("/responses", {"input": "x"}, False),
        ("/responses/compact", {"input": "x", "tools": [SEARCH]}, False),
        ("/chat/completions", {"messages": [], "web_search_options": {}}, False),
    ],
)
def test_a_refusal_names_max_tool_calls_only_where_that_helps(
    account: Account, path: str, body: dict[str, Any], told: bool
) -> None:
    refused = account.post(path, body)
    assert refused.status_code == 429
    assert ("'max_tool_calls'" in refused.json()["error"]["message"]) is told


def test_an_unknown_history_counts_once_as_much_as_an_answer(
    account: Account, honest: Honest
) -> None:
    """Of objects from before their tokens were noted."""
    account.fill("1")
    assert account.post("/responses", SHORT).status_code == 200
    account.gateway.terminate()
    with contextlib.closing(sqlite3.connect(account.gateway.database)) as database, database:
        database.execute("UPDATE stored_objects SET tokens = NULL")
    account.gateway.start()
    two = {"input": [{"type": "item_reference", "id": each} for each in ("resp_1", "msg_1")]}
    account.fill("0.66")  # 128,000 tokens are 0.64
    assert account.post("/responses", {**SHORT, **two}).status_code == 200
    account.fill("0.64")
    assert account.post("/responses", {**SHORT, **two}).status_code == 429


def test_an_image_tool_without_a_price_is_held_for_as_it_is_billed(
    make_gateway: MakeGateway, honest: Honest
) -> None:
    """By the price of the model that was asked for."""
    account = Account(make_gateway, 'unpriced_models = "free"\n')
    account.fill("5")
    honest.seconds = 0.1
    tool = {**DRAW, "model": "without-a-price"}
    body = {**SHORT, "tools": [tool], "max_tool_calls": 5}
    with account.client:
        assert account.eight("/responses", body) == {200, 429}
    assert account.balance() >= 0


def test_an_image_tool_with_a_price_is_held_for_beside_a_model_without_one(
    make_gateway: MakeGateway, honest: Honest
) -> None:
    account = Account(make_gateway, 'unpriced_models = "free"\n')
    account.fill()
    honest.seconds = 0.1
    body = {**SHORT, "model": "without-a-price", "max_tool_calls": 5}
    with account.client:
        assert account.eight("/responses", {**body, "tools": [DRAW]}) == {200, 429}
        assert account.balance() >= 0
        assert account.eight("/responses", body) == {200}


@pytest.mark.parametrize("priced", ["priority", "fast"])
def test_a_tier_that_is_reported_by_the_name_of_the_request_is_held_and_billed(
    account: Account, upstream: Upstream, priced: str
) -> None:
    prices = [price(MODEL, input="50", output="300", max_output=ANSWER_TOKENS) | {"tier": priced}]
    account.gateway.api("POST", "/prices", {"prices": prices, "without_notice": "test"})
    usage = {"input_tokens": 0, "output_tokens": 1000, "total_tokens": 1000}
    answer = json_answer(response_object(MODEL, usage, service_tier="fast"))
    upstream.script = answer
    body = {"input": "x", "max_output_tokens": 1000, "service_tier": "fast"}
    account.fill("0.2")
    refused = account.post("/responses", body)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"].endswith(", or the 'service_tier' 'default'.")
    account.fill("0.5")
    assert account.post("/responses", body).status_code == 200
    assert account.balance() == Decimal("0.2")


SVG = {"output_format": "svg"}


@pytest.mark.parametrize(
    ("path", "body", "advice", "followed"),
    [
        ("/chat/completions", {"messages": [], "n": 2}, "'n'", {"n": 1}),
        ("/images/generations", {"prompt": "x", "n": 2}, "'n'", {"n": 1}),
        ("/images/generations", {"prompt": "x", **SVG}, "'svg.model'", {"svg": {"model": MODEL}}),
        (
            "/responses",
            {"input": "x", "tools": [{**DRAW, **SVG}]},
            "'svg.model'",
            {"tools": [{**DRAW, **SVG, "svg": {"model": MODEL}}]},
        ),
    ],
)
def test_what_a_refusal_advises_makes_the_request_cheaper(
    account: Account, path: str, body: dict[str, Any], advice: str, followed: dict[str, Any]
) -> None:
    dear = price("gpt-author", input="50", output="300", max_output=ANSWER_TOKENS)
    account.gateway.api("POST", "/prices", {"prices": [dear]})

    def refusal(asked: dict[str, Any]) -> tuple[Decimal, str]:
        model = "gpt-image-2" if "/images" in path else MODEL
        message = account.post(path, {"model": model, **asked}).json()["error"]["message"]
        most, _, rest = message.partition(" can cost up to ")[2].partition(" ")
        return Decimal(most), rest

    most, message = refusal(body)
    assert advice in message
    less, message = refusal({**body, **followed})
    assert less < most
    assert advice not in message


@pytest.mark.parametrize("how", ["a form", "a body", "a tool", "a tool's settings"])
def test_the_author_of_an_svg_is_held_for_where_none_is_named(
    account: Account, honest: Honest, upstream: Upstream, how: str
) -> None:
    """Which is usual: the upstream chooses one."""
    prices = [price("gpt-author", input="5", output="90", max_output=ANSWER_TOKENS)]
    account.gateway.api("POST", "/prices", {"prices": prices})
    counts = {"input_tokens": 10, "output_tokens": ANSWER_TOKENS, "reasoning_tokens": 0}
    svg = {**counts, "model": "gpt-author"}
    item = {"type": "image_generation_call", "id": "ig_1", "svg_usage": svg}
    tool = {**DRAW, **SVG, "svg": {"reasoning": None} if "settings" in how else None}
    content, headers = form({"model": "gpt-image-2", "prompt": "x", **SVG})

    async def answer(request: Received, reply: Reply) -> None:
        await asyncio.sleep(0.1)
        usage = {"input_tokens": 10, "output_tokens": 10, "total_tokens": 20}
        pictured = {"created": 1, "data": [], "usage": usage, "svg_usage": svg}
        made = response_object(MODEL, usage, output=[item])
        await json_answer(made if "tool" in how else pictured)(request, reply)

    def ask() -> int:
        if how == "a form":
            return account.post("/images/edits", content, headers=headers).status_code
        if how == "a body":
            return account.post("/images/generations", {"model": "gpt-image-2", **SVG}).status_code
        body = {**SHORT, "tools": [tool], "max_tool_calls": 1}
        return account.post("/responses", body).status_code

    upstream.script = answer
    account.fill("2.5")
    with ThreadPoolExecutor(PARALLEL) as pool:
        assert {each.result() for each in [pool.submit(ask) for _ in range(PARALLEL)]} == {200, 429}
    assert account.balance() >= 0


def test_the_author_of_an_svg_is_held_for_where_its_tool_is_in_what_is_built_on(
    account: Account, upstream: Upstream
) -> None:
    prices = [price("gpt-author", input="5", output="90", max_output=ANSWER_TOKENS)]
    account.gateway.api("POST", "/prices", {"prices": prices})
    svg = {"input_tokens": 10, "output_tokens": ANSWER_TOKENS, "model": "gpt-author"}
    item = {"type": "image_generation_call", "id": "ig_1", "svg_usage": svg}
    usage = {"input_tokens": 10, "output_tokens": 10, "total_tokens": 20}

    async def answer(request: Received, reply: Reply) -> None:
        await asyncio.sleep(0.1)
        output = [item] if b"previous_response_id" in request.body else []
        await json_answer(response_object(MODEL, usage, id="resp_1", output=output))(request, reply)

    upstream.script = answer
    tools = {"type": "additional_tools", "tools": [{**DRAW, **SVG}]}
    account.fill("5")
    first = account.post("/responses", {**SHORT, "max_tool_calls": 1, "input": [tools]})
    assert first.status_code == 200
    account.fill("1.2")
    again = {**SHORT, "max_tool_calls": 1, "previous_response_id": "resp_1"}
    assert account.eight("/responses", again) == {200, 429}
    assert account.balance() >= 0


@pytest.mark.parametrize(
    "fields",
    [
        [("output_format", "svg"), ("output_format", "png")],
        [("Output_Format", "svg")],
        [("output_format[]", "svg")],
        [("output_format.", "svg")],
        [('output_format"; filename="a', "svg")],
    ],
)
def test_a_form_says_once_whether_it_asks_for_an_svg(
    account: Account, upstream: Upstream, fields: list[tuple[str, str]]
) -> None:
    account.fill()
    parts = [("model", "gpt-image-2"), ("prompt", "x"), *fields]
    content = b"".join(form({name: value})[0].removesuffix(b"--xyz--\r\n") for name, value in parts)
    headers = {"content-type": "multipart/form-data; boundary=xyz"}
    answer = account.post("/images/edits", content + b"--xyz--\r\n", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].lower().startswith("output_format")
    assert not upstream.requests


PICTURES: dict[str, dict[str, Any]] = {
    "a screenshot": {"input": [{"output": "%"}]},
    "a tool's list": {"input": [{"output": ["%"]}]},
    "a message": {"input": [{"content": ["%"]}]},
    "a chat": {"messages": [{"content": ["%"]}]},
    "images to edit": {"images": ["%"]},
    "a mask": {"mask": "%"},
    "marks": {"markup": "%"},
    "a tool's mask": {"tools": [{"type": "image_generation", "input_image_mask": "%"}]},
}


@pytest.mark.parametrize("where", PICTURES)
@pytest.mark.parametrize("size", [10, 200_000])
def test_a_picture_is_held_as_such_wherever_it_stands(where: str, size: int) -> None:
    """Its link can be short, and its bytes are no tokens."""
    part = {"type": "input_image", "image_url": "x" * size}
    body = json.dumps({"model": MODEL, **PICTURES[where]}).replace('"%"', json.dumps(part))
    content = result_of(RequestBody.read_body(body.encode(), body.encode()))
    assert 16_000 < content.max_input_tokens < 16_500


@pytest.mark.parametrize("more", [{"mask": [1]}, {"images": ["x"]}, {"input": [{"content": [""]}]}])
@pytest.mark.parametrize("name", ["image_url", "imag\\u0065_url"])
def test_an_odd_list_hides_no_pictures(
    account: Account, upstream: Upstream, more: dict[str, Any], name: str
) -> None:
    """Some upstreams step over members that they don't know."""

    async def answer(request: Received, reply: Reply) -> None:
        await asyncio.sleep(0.1)
        await chat_json({"prompt_tokens": 30_000, "completion_tokens": 1})(request, reply)

    upstream.script = answer
    account.fill("2")
    picture = {"type": "picture", "image_url": {"url": "https://example.com/"}}
    body = {"messages": [{"role": "user", "content": [picture] * 20}], "max_tokens": 1, **more}
    text = json.dumps({"model": MODEL, **body}).replace("image_url", name).encode()
    headers = {"content-type": "application/json"}
    with ThreadPoolExecutor(PARALLEL) as pool:
        asks = [
            pool.submit(account.post, "/chat/completions", text, headers=headers)
            for _ in range(PARALLEL)
        ]
        assert {ask.result().status_code for ask in asks} == {200, 429}
    assert account.balance() >= 0


@pytest.mark.parametrize(
    "message",
    ['{"role":"user","content":%s,"content":"x"}', '{"role":"user","Content":%s}'],
)
def test_a_message_that_can_be_read_in_two_ways_hides_no_pictures(message: str) -> None:
    pictures = json.dumps([{"type": "image_url", "image_url": {"url": "x"}}] * 20)
    body = f'{{"model":"{MODEL}","messages":[{message % pictures}]}}'.encode()
    assert result_of(RequestBody.read_body(body, body)).max_input_tokens > 320_000
    body = body.replace(b"messages", b"input")
    with pytest.raises(Refusal):
        result_of(RequestBody.read_body(body, body))


@pytest.mark.parametrize(
    "body",
    [
        {"Images": []},
        {"MARKUP": {}},
        {"Output_format": "svg"},
        {"tools": [{"Output_Format": "svg"}]},
    ],
)
def test_what_matters_to_a_hold_is_in_lower_case(body: dict[str, Any]) -> None:
    text = json.dumps({"model": MODEL, **body}).encode()
    with pytest.raises(Refusal):
        result_of(RequestBody.read_body(text, text))


def test_a_long_prompt_in_a_form_is_held_in_full() -> None:
    """Only files are pictures, which have few tokens."""
    text, headers = form({"model": "gpt-image", "prompt": "x" * 100_000})
    read = Form(headers["content-type"].partition("=")[2].encode())
    result_of(read.grow(text))
    content = result_of(RequestBody.read_body(text, text, read))
    assert 100_000 < content.max_input_tokens < 100_500


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────

NO_NUMBERS = ["0", "-1", "1.0", "10.0", "1e1", '"2"', "true", "1000", "[1]"]
NO_FORM_NUMBERS = ["0", "0010", "+10", "1_0", " 2", "\u0662", "２", "1000", "", "2.0", "1e1"]


def test_what_is_no_plain_number_is_refused(account: Account, upstream: Upstream) -> None:
    account.fill()
    headers = {"content-type": "application/json"}
    for path in ("/chat/completions", "/images/generations", "/images/edits"):
        for number in NO_NUMBERS:
            body = b'{"model":"%b","n":%b}' % (MODEL.encode(), number.encode())
            answer = account.post(path, body, headers=headers)
            assert answer.status_code == 400, number
            assert answer.json()["error"]["param"] == "n"
    for number in NO_FORM_NUMBERS:
        content, form_headers = form({"model": MODEL, "n": number})
        answer = account.post("/images/edits", content, headers=form_headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n"), number
    assert not upstream.requests
    assert account.post("/chat/completions", {"messages": [], "n": None}).status_code == 200
    assert account.post("/responses", {**SHORT, "n": 0}).status_code == 200, "no member there"


def test_an_image_of_the_usual_model_is_not_free(
    make_gateway: MakeGateway, upstream: Upstream, honest: Honest
) -> None:
    """Where a body names no model, that one counts: for price, hold and the key's models."""
    gateway = make_gateway('[billing]\nunpriced_models = "free"\n').start()
    prices = [price(DEFAULT_IMAGE_MODEL, output="30", max_output=PICTURE_TOKENS)]
    gateway.api("POST", "/prices", {"prices": prices})
    content, headers = form({"prompt": "x", "n": "2"})
    key = gateway.new_key("open")
    limited = gateway.api("POST", "/accounts/open/keys", {"models": ["gpt-up"]})["key"]
    with gateway.client(key) as client, gateway.client(limited) as other:
        assert client.post("/images/edits", content=content, headers=headers).status_code == 200
        assert client.post("/images/generations", json={"prompt": "x"}).status_code == 200
        answer = other.post("/images/generations", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")
    rows = gateway.rows()
    assert sorted((row["cost"], row["requested_model"]) for row in rows) == [
        ("0.06", ""),
        ("0.12", ""),
    ]


# ── Asking for usage ─────────────────────────────────────────────────────────────────────────────

OFF: dict[str, Any] = {"messages": [], "stream": True, "stream_options": {"include_usage": False}}
LEFT_OUT = {"messages": [], "stream": True, "stream_options": None}
ASKS = {"messages": [], "stream": True, "stream_options": {"include_usage": True}}


def zipped(body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    content = gzip.compress(json.dumps({"model": MODEL, **body}).encode())
    return content, {"content-type": "application/json", "content-encoding": "gzip"}


@pytest.mark.parametrize(
    ("metering", "passing"),
    [
        ("", []),
        ('unmetered = "allow"\n', ["off", "zipped off", "zipped"]),
        ('include_usage = "client"\n', ["zipped"]),
        ('include_usage = "client"\nunmetered = "allow"\n', ["off", "zipped off", "zipped"]),
    ],
)
def test_a_stream_without_usage_is_refused_where_there_is_a_price(
    make_gateway: MakeGateway, upstream: Upstream, metering: str, passing: list[str]
) -> None:
    settings = f'[billing]\nunpriced_models = "free"\n[metering]\n{metering}'
    gateway = make_gateway(settings).start()
    prices = [price(MODEL, input="5", output="30", max_output=ANSWER_TOKENS)]
    gateway.api("POST", "/prices", {"prices": prices})
    asks = {"off": OFF, "zipped off": OFF, "zipped": LEFT_OUT, "asks": ASKS, "zipped asks": ASKS}

    async def answer(_: Received, reply: Reply) -> None:
        await stream([b"data: [DONE]\n\n"])(_, reply)

    upstream.script = answer
    with gateway.client(gateway.new_key()) as client:
        for how, body in asks.items():
            for model in (MODEL, "free"):
                content, headers = zipped({**body, "model": model})
                if "zipped" not in how:
                    content = gzip.decompress(content)
                    del headers["content-encoding"]
                answer_ = client.post("/chat/completions", content=content, headers=headers)
                passes = model == "free" or "asks" in how or how in passing
                assert answer_.status_code == (200 if passes else 400), (how, model)
                if not passes:
                    error = answer_.json()["error"]
                    assert (error["code"], error["param"]) == ("invalid_request", "stream_options")
                    assert '{"include_usage": true}' in error["message"]


def test_where_spending_is_limited_a_stream_reports_its_usage_even_at_a_price_of_0(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    settings = '[billing]\ndefault_credit_limit = "1"\n[metering]\nunmetered = "allow"\n'
    gateway = make_gateway(settings).start()
    prices = [price(MODEL, input="0", output="0", max_output=ANSWER_TOKENS)]
    gateway.api("POST", "/prices", {"prices": prices})
    upstream.script = stream([b"data: [DONE]\n\n"])
    with gateway.client(gateway.new_key()) as client:
        for body, status in ((OFF, 400), (ASKS, 200)):
            answer = client.post("/chat/completions", json={"model": MODEL, **body})
            assert answer.status_code == status, body


@pytest.mark.parametrize("value", ["1", '"true"', "[]", '{"a":1}'])
def test_stream_is_true_or_false(account: Account, upstream: Upstream, value: str) -> None:
    """Otherwise an upstream could stream where the gateway thinks that it does not."""
    for name in ("stream", "stream_options"):
        if name == "stream_options" and value == '{"a":1}':
            continue
        body = b'{"model":"%b","messages":[],"%b":%b}'
        body %= MODEL.encode(), name.encode(), value.encode()
        headers = {"content-type": "application/json"}
        assert account.post("/chat/completions", body, headers=headers).status_code == 400
    assert not upstream.requests


LONG = b'"x":"%b", "y":[%b1],' % (b"x" * 300_000, b"[1, 2], " * 20_000)
SPACE = b" " * 50_000


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (b"null", b'{"include_usage":true}'),
        (b"{ }", b'{"include_usage":true }'),
        (b'{"include_usage": null}', b'{"include_usage": true}'),
        (b'{"a":{"include_usage":null},"include_usage":null}', None),
        (b'{"include_\\u0075sage":null}', b'{"include_\\u0075sage":true}'),
        (SPACE + b"null" + SPACE, SPACE + b'{"include_usage":true}' + SPACE),
    ],
)
@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("around", [(b"", b""), (LONG, b""), (b"", b"," + LONG[:-1])])
def test_no_other_byte_is_changed(
    options: bytes, changed: bytes | None, kind: type[bytes], around: tuple[bytes, bytes]
) -> None:
    if changed is None:
        changed = b'{"a":{"include_usage":null},"include_usage":true}'
    text = b' {%b"model":"m","z":{"stream_options":null},"stream":true, "stream_options" :%b%b}\n'
    body = kind(text % (around[0], options, around[1]))
    content = result_of(RequestBody.read_body(body, body))
    assert content.add_include_usage()
    assert content.sent == text % (around[0], changed, around[1])


def test_options_that_are_too_long_are_refused() -> None:
    for options in (b'{"a":"%b","include_usage":null}', b'{%b"include_usage":null}'):
        filled = options.replace(b"%b", b" " * 5000)
        body = b'{"model":"m","stream":true,"stream_options":%b}' % filled
        with pytest.raises(Refusal) as refused:
            result_of(RequestBody.read_body(body, body))
        assert refused.value.param == "stream_options"


# ── A property ───────────────────────────────────────────────────────────────────────────────────

SEED = int(os.environ.get("REDBTC_SEED", "0"))
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
PROPERTY_SECONDS = 8
PICTURE = {"type": "input_image", "image_url": "https://example.com/"}


class Visitor:
    """A client that asks for anything, and waits for each answer."""

    def __init__(self, account: Account, websocket: ClientConnection, seed: int) -> None:
        self.account = account
        self.websocket = websocket
        self.chance = random.Random(seed)
        self.made: list[str] = []  # responses and messages
        self.torn: list[str] = []  # responses that were not read to their end
        self.served = 0

    def ask(self) -> None:
        chance = self.chance
        paths = ["/chat/completions", "/responses/compact", "/images/generations", "/images/edits"]
        path = chance.choice([*paths, *["/responses"] * 4, "websocket", "websocket", "look"])
        body: dict[str, Any] = {"model": MODEL}
        body["service_tier"] = chance.choice(["default", "default", "flex", "priority"])
        for name in chance.sample(LIMITS, chance.randint(0, 3)):
            body[name] = chance.choice([None, 0, -1, 1, 50, 500, 5000, 10**9])
        if chance.random() < 0.3:
            body["max_tool_calls"] = chance.choice([None, 0, 1, 3, 20])
        if path == "look":
            self._look()
        elif path == "/images/edits":
            self._edit()
        elif path.startswith("/images"):
            images: dict[str, Any] = {"model": chance.choice([None, DEFAULT_IMAGE_MODEL])}
            images |= {"prompt": "x", "output_format": chance.choice(["png", "svg"])}
            images |= chance.choice([{}, {"images": [PICTURE]}, {"markup": PICTURE}])
            self._post(path, {**body, **images, "n": chance.choice([None, 1, 2, 9])})
        elif path == "/chat/completions":
            content = chance.choice(["x", "x" * 4000, [PICTURE], [PICTURE] * 3])
            body |= {"messages": [{"role": "user", "content": content}]}
            body |= chance.choice([{}, {"web_search_options": {}}])
            body |= {"stream": chance.random() < 0.5, "n": chance.choice([None, 1, 3])}
            self._post(path, body)
        else:
            self._respond(path, body)

    def _edit(self) -> None:
        number = self.chance.choice(["1", "3", "9", "0010", "+10", "1_0", " 2"])
        fields = {"prompt": "x", "n": number, "max_tokens": "1"}
        fields["output_format"] = self.chance.choice(["png", "svg"])
        content, headers = form(fields)
        self.account.post("/images/edits", content, headers=headers)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = self.account.post(path, body)
        assert answer.status_code in (200, 429), answer.text
        if answer.status_code == 200:
            self.served += 1
            if path == "/responses":
                self.made += set(re.findall(r'"id": "((?:resp|msg)_\d+)"', answer.text))
            if body.get("background"):
                fetched = self.account.client.get(f"/responses/{answer.json()['id']}")
                assert fetched.json()["status"] == "completed"

    def _tear(self, body: dict[str, Any]) -> None:
        """Ask for an answer that breaks off, but is stored."""
        torn = {**body, "stream": True, "metadata": {"torn": ""}}
        ask = self.account.client.stream("POST", "/responses", json=torn)
        with contextlib.suppress(httpx2.HTTPError), ask as answer:
            for line in answer.iter_lines():
                self.torn += re.findall(r'"id": "(resp_\d+)"', line)
        self.made += self.torn[-1:]

    def _look(self) -> None:
        """Look at an answer that broke off, which shows what it used."""
        if self.torn:
            answer = self.account.client.get(f"/responses/{self.chance.choice(self.torn)}")
            assert answer.status_code in (200, 429), answer.text

    def _respond(self, path: str, body: dict[str, Any]) -> None:
        chance = self.chance
        content = chance.choice(["x", "x" * 9000, [PICTURE]])
        items: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.made and chance.random() < 0.5:
            named = chance.choice(self.made)
            if named.startswith("resp"):
                body["previous_response_id"] = named
            else:
                items += [{"type": "item_reference", "id": named}] * chance.choice([1, 2, 30])
        tools = [chance.choice([SEARCH, DRAW, {**DRAW, **SVG}])] if chance.random() < 0.4 else []
        if tools and chance.random() < 0.3:
            items.append({"type": "additional_tools", "tools": tools})
            tools = []
        body |= {"input": items, "tools": tools}
        if path == "websocket":
            self._create(body)
        elif path == "/responses/compact":
            self._post(path, {**body, "tools": []})
        else:
            kind = chance.choice(["stream", "background", "n", "torn"])
            if kind == "torn":
                self._tear(body)
            else:
                self._post(path, {**body, kind: True if kind != "n" else 1})

    def _create(self, body: dict[str, Any]) -> None:
        self.websocket.send(json.dumps({"type": "response.create", **body}))
        while True:
            answer = json.loads(self.websocket.recv(timeout=PATIENCE_SECONDS))
            if answer["type"] in ("response.completed", "error"):
                break
        if answer["type"] == "response.completed":
            self.served += 1
            self.made.append(answer["response"]["id"])


def test_no_requests_spend_more_than_there_is(account: Account, honest: Honest) -> None:
    """Eight at a time, with any members, at any endpoint, however they come."""
    honest.seconds, honest.author = 0.02, "gpt-author"
    prices = [
        price("gpt-author", input="5", output="40", max_output=ANSWER_TOKENS),
        {"model": MODEL, "tier": "priority", "input": "10", "output": "60", "web_search": "0.01"},
    ]
    account.gateway.api("POST", "/prices", {"prices": prices, "without_notice": "test"})
    url = f"ws://127.0.0.1:{account.gateway.port}/v1/responses"
    headers = {"authorization": f"Bearer {account.key}"}
    ends = time.monotonic() + PROPERTY_SECONDS
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(PARALLEL) as pool:
        visitors = [
            Visitor(
                account,
                stack.enter_context(connect(url, additional_headers=headers, proxy=None)),
                seed,
            )
            for seed in range(SEED, SEED + PARALLEL)
        ]
        while time.monotonic() < ends:
            account.fill()
            list(pool.map(Visitor.ask, visitors))
            assert account.balance() >= 0, account.gateway.rows(limit=PARALLEL)
    assert all(visitor.served for visitor in visitors)
