"""The endpoints besides chats, responses and images: search, memories, embeddings, moderations,
audio and completions. Bytes pass unchanged, and each request is metered, counted or estimated."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.upstream import (
    CHAT_USAGE,
    DONE,
    Received,
    Reply,
    Upstream,
    event,
    json_answer,
    silent,
    stream,
)
from tests.request_body.packers import PACKERS

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_2, pytest.mark.promise_8]

SEARCH = {
    "id": "01a20796-9198-7a21-97e9-cd6ef42bccc9",
    "model": "gpt-6.2-sol",
    "input": [{"type": "message", "role": "user", "content": "Who won?"}],
    "commands": {"search_query": [{"q": "who won"}]},
    "settings": {"allowed_callers": ["direct"], "external_web_access": True},
    "max_output_tokens": 10000,
}
FOUND = {"encrypted_output": "gAAAAB", "output": "Nobody."}
PRICED = "[billing]\n"
MP3 = b"ID3\x04" + bytes(range(256)) * 40
TEXT_OF_60_SECONDS = (
    b"1\n00:00:00,000 --> 00:00:58,500\nHi\n\n2\n00:00:58,500 --> 00:01:00,000\nBye\n"
)


@pytest.fixture
def priced(make_gateway: MakeGateway) -> Gateway:
    """A gateway that serves only models with a price."""
    gateway = make_gateway(PRICED).start()
    price(gateway, "gpt-6*", input="2", output="10", web_search="0.01")
    return gateway


def price(gateway: Gateway, model: str, **rates: str) -> None:
    options = [f"--{name.replace('_', '-')}={rate}" for name, rate in rates.items()]
    gateway.cli("price", "add", model, *options)


def key_for(gateway: Gateway, models: str) -> str:
    gateway.new_key()
    return str(gateway.cli("key", "add", "test", "--models", models)["key"])


def settled(gateway: Gateway) -> dict[str, Any]:
    """The gateway's only row, once it is settled."""
    wait_until(lambda: gateway.rows() and gateway.row()["outcome"] != "pending")
    return gateway.row()


def usage_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The kinds of usage that a row has a number for."""
    kinds = ("tokens", "searches", "audio_ms", "characters", "containers")
    return {name: n for name, n in row.items() if name.endswith(kinds) and n is not None}


# ── Search ───────────────────────────────────────────────────────────────────────────────────────


def test_a_search_is_one_counted_call(priced: Gateway, upstream: Upstream) -> None:
    body = json.dumps(SEARCH, indent=1).encode()
    upstream.script = json_answer(FOUND)
    headers = {"content-type": "application/json", "accept-encoding": "zstd,gzip"}
    with priced.client(priced.new_key()) as client:
        answer = client.post("/alpha/search", content=body, headers=headers)
    assert answer.json() == FOUND
    (received,) = upstream.requests
    assert (received.path, received.body) == ("/v1/alpha/search", body)
    assert received.header("accept-encoding") == "identity"
    row = priced.row()
    assert (row["endpoint"], row["usage_source"]) == ("/v1/alpha/search", "counted")
    assert (row["outcome"], row["cost"]) == ("completed", "0.01")
    assert usage_of(row) == {"web_searches": 1}
    sums = priced.cli("usage", "--group-by", "model")["groups"]
    assert [(each["web_searches"], each["cost"]) for each in sums] == [(1, "0.01")]


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_compressed_search_passes_as_it_is(
    priced: Gateway, upstream: Upstream, coding: str
) -> None:
    packed = PACKERS[coding](json.dumps(FOUND).encode())
    upstream.script = json_answer(packed, headers={"content-encoding": coding})
    with (
        priced.client(priced.new_key()) as client,
        client.stream("POST", "/alpha/search", json=SEARCH) as answer,
    ):
        assert b"".join(answer.iter_raw()) == packed
        assert answer.headers["content-encoding"] == coding
    assert (priced.row()["usage_source"], priced.row()["cost"]) == ("counted", "0.01")


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_failed_search_costs_nothing(priced: Gateway, upstream: Upstream, status: int) -> None:
    error = {"error": {"message": "No.", "type": "x", "code": "no", "param": None}}
    upstream.script = json_answer(error, status)
    with priced.client(priced.new_key()) as client:
        answer = client.post("/alpha/search", json=SEARCH)
    assert (answer.status_code, answer.json()) == (status, error)
    row = priced.row()
    assert (row["outcome"], row["usage_source"], row["cost"]) == ("upstream_error", "none", None)
    assert usage_of(row) == {}


def test_a_torn_search_costs_nothing(priced: Gateway, upstream: Upstream) -> None:
    async def torn(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "application/json"}, "length:1000")
        await reply.send(b'{"output": "')
        reply.tear()

    upstream.script = torn
    with priced.client(priced.new_key()) as client, pytest.raises(httpx2.HTTPError):
        client.post("/alpha/search", json=SEARCH)
    row = priced.row()
    assert (row["outcome"], row["usage_source"], usage_of(row)) == ("upstream_failed", "none", {})


def test_who_leaves_a_search_pays_for_it(priced: Gateway, upstream: Upstream) -> None:
    async def late(_: Received, reply: Reply) -> None:
        await asyncio.sleep(0.3)
        await json_answer(FOUND)(_, reply)

    upstream.script = late
    connection = priced.begin(priced.new_key(), SEARCH, "/alpha/search")
    upstream.wait_for(lambda: upstream.requests)
    connection.close()
    row = settled(priced)
    assert row["outcome"] in ("completed", "client_disconnected")
    assert (row["usage_source"], row["cost"]) == ("counted", "0.01")


def test_an_unanswered_search_is_estimated(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(PRICED + '[metering]\non_disconnect = "cancel"\n').start()
    price(gateway, "gpt-6*", web_search="0.01")
    upstream.script = silent
    connection = gateway.begin(gateway.new_key(), SEARCH, "/alpha/search")
    upstream.wait_for(lambda: upstream.requests)
    connection.close()
    row = settled(gateway)
    assert (row["outcome"], row["usage_source"]) == ("client_disconnected", "estimated")
    assert (usage_of(row), row["cost"]) == ({"web_searches": 1}, "0.01")


def test_a_search_is_held_for(priced: Gateway, upstream: Upstream) -> None:
    priced.cli("account", "add", "poor", "--credit-limit", "0")
    priced.cli("payment", "add", "poor", "0.025")
    upstream.script = json_answer(FOUND)
    with priced.client(priced.new_key("poor")) as client:
        statuses = [client.post("/alpha/search", json=SEARCH).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_a_search_knows_its_walls(priced: Gateway, upstream: Upstream) -> None:
    with priced.client(key_for(priced, "gpt-5*")) as client:
        assert client.post("/alpha/search", json=SEARCH).status_code == 403
        unpriced = {**SEARCH, "model": "gpt-5.5"}
        assert client.post("/alpha/search", json=unpriced).status_code == 404
    with priced.client(priced.new_key()) as client:
        foreign = [{"type": "item_reference", "id": "msg_of_another"}]
        for body in ({**SEARCH, "input": foreign}, {**SEARCH, "file_id": "file-1"}):
            answer = client.post("/alpha/search", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    with priced.client("sk-redbtc-no") as client:
        assert client.post("/alpha/search", json=SEARCH).status_code == 401
    assert not upstream.requests


def test_memories_are_metered_or_estimated(priced: Gateway, upstream: Upstream) -> None:
    traces = [{"id": "t", "metadata": {"source_path": "/a"}, "items": []}]
    body = {"model": "gpt-6-luna", "traces": traces, "reasoning": {"effort": "low"}}
    output = [{"trace_summary": "Nothing.", "memory_summary": "Nothing."}]
    usage = {"input_tokens": 100, "output_tokens": 50, "total_tokens": 150}
    with priced.client(priced.new_key()) as client:
        for answer in ({"output": output, "usage": usage}, {"output": output}):
            upstream.script = json_answer(answer)
            assert client.post("/memories/trace_summarize", json=body).json() == answer
    metered, estimated = sorted(priced.rows(), key=lambda row: row["usage_source"], reverse=True)
    assert metered["usage_source"] == "upstream"
    assert usage_of(metered) == {"input_tokens": 100, "output_tokens": 50}
    assert estimated["usage_source"] == "estimated"
    assert estimated["input_tokens"] > 0
    assert {each.path for each in upstream.requests} == {"/v1/memories/trace_summarize"}


# ── Embeddings and moderations ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given",
    ["Hi", ["Hi", "there"], [1, 2, 3], [[1, 2], [3]], ["x" * 200_000, '{"file_id": "file-1"}']],
)
def test_embeddings_are_metered(priced: Gateway, upstream: Upstream, given: Any) -> None:
    price(priced, "text-embedding-3-*", input="0.02")
    body = {"model": "text-embedding-3-small", "input": given}
    vectors = [{"object": "embedding", "index": 0, "embedding": [0.25] * 3000}] * 20
    answered = {
        "object": "list",
        "data": vectors,
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }
    upstream.script = json_answer(answered)
    with priced.client(priced.new_key()) as client:
        assert client.post("/embeddings", json=body).json() == answered
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("upstream", {"input_tokens": 8})
    assert (row["cost"], row["outcome"]) == ("0.00000016", "completed")


def test_embeddings_without_usage_are_estimated_without_output(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "text-embedding-3-*", input="0.02", output="50")
    upstream.script = json_answer({"object": "list", "data": []})
    with priced.client(priced.new_key()) as client:
        client.post("/embeddings", json={"model": "text-embedding-3-small", "input": "a" * 400})
    row = priced.row()
    assert (row["usage_source"], row["output_tokens"]) == ("estimated", 0)
    assert 100 <= row["input_tokens"] <= 120


def test_embeddings_hold_nothing_for_output(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "text-embedding-3-*", input="0.02", output="50")
    priced.cli("account", "add", "poor", "--credit-limit", "0")
    priced.cli("payment", "add", "poor", "0.0001")
    upstream.script = json_answer({"data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}})
    with priced.client(priced.new_key("poor")) as client:
        small = {"model": "text-embedding-3-small", "input": "Hi"}
        assert client.post("/embeddings", json=small).status_code == 200
        assert client.post("/embeddings", json={**small, "input": "a" * 9000}).status_code == 429


@pytest.mark.parametrize("path", ["/moderations", "/responses/input_tokens"])
def test_what_is_free_costs_nothing_if_usage_is_reported(
    priced: Gateway, upstream: Upstream, path: str
) -> None:
    usage = {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}
    upstream.script = json_answer({"id": "modr-1", "results": [], "usage": usage})
    with priced.client(priced.new_key()) as client:
        client.post(path, json={"model": "gpt-6-luna", "input": "Hi"})
    row = priced.row()
    assert (row["usage_source"], row["input_tokens"], row["cost"]) == ("upstream", 8, "0")


def test_embeddings_name_no_stored_objects(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "text-embedding-3-*", input="0.02")
    given = [{"type": "input_file", "file_id": "file-of-another"}]
    with priced.client(priced.new_key()) as client:
        body = {"model": "text-embedding-3-small", "input": given}
        assert client.post("/embeddings", json=body).status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize("model", [None, "omni-moderation-latest"])
def test_moderations_are_free(priced: Gateway, upstream: Upstream, model: str | None) -> None:
    """Their model needs no price, and an account without money may use them."""
    priced.cli("account", "add", "poor", "--credit-limit", "0")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {"input": [{"type": "text", "text": "Hi"}, picture]} | (
        {"model": model} if model else {}
    )
    upstream.script = json_answer(
        {"id": "modr-1", "model": "omni-moderation-latest", "results": []}
    )
    with priced.client(priced.new_key("poor")) as client:
        assert client.post("/moderations", json=body).status_code == 200
    row = priced.row()
    assert (row["endpoint"], row["outcome"]) == ("/v1/moderations", "completed")
    assert (row["usage_source"], row["cost"], usage_of(row)) == ("none", None, {})
    with priced.client(key_for(priced, "gpt-5*")) as client:
        assert client.post("/moderations", json=body).status_code == 403


# ── Completions ──────────────────────────────────────────────────────────────────────────────────


def completion(text: str, **more: Any) -> dict[str, Any]:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": None}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "gpt-6",
        "choices": [choice],
    } | more


def test_a_completion_is_metered(priced: Gateway, upstream: Upstream) -> None:
    answered = completion("Hi", usage=CHAT_USAGE)
    upstream.script = json_answer(answered)
    with priced.client(priced.new_key()) as client:
        body = {"model": "gpt-6", "prompt": ["a", "b"], "max_tokens": 5}
        assert client.post("/completions", json=body).json() == answered
    row = priced.row()
    assert (row["usage_source"], row["input_tokens"], row["output_tokens"]) == ("upstream", 20, 7)


def test_a_streamed_completion_reports_its_usage(priced: Gateway, upstream: Upstream) -> None:
    """The option is added, and the chunk taken out, as in a chat."""
    begun = [event(completion("Hel")), event(completion("lo"))]
    usage = event({**completion(""), "choices": [], "usage": CHAT_USAGE})
    upstream.script = stream([*begun, usage, DONE])
    with priced.client(priced.new_key()) as client:
        body = {"model": "gpt-6", "prompt": "a", "stream": True}
        assert client.post("/completions", json=body).content == b"".join([*begun, DONE])
    assert upstream.requests[0].json()["stream_options"] == {"include_usage": True}
    assert (priced.row()["usage_source"], priced.row()["output_tokens"]) == ("upstream", 7)


@pytest.mark.parametrize(
    ("more", "answers"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": 2, "best_of": 5}, 5),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": ["a", "b", "c"], "best_of": 2}, 6),
    ],
)
def test_each_answer_to_a_completion_is_held_for(
    priced: Gateway, upstream: Upstream, more: dict[str, Any], answers: int
) -> None:
    """The output costs 10 a million: 100,000 tokens of each answer cost 1."""
    upstream.script = json_answer(completion("Hi", usage=CHAT_USAGE))
    statuses = {}
    for name, money in (("poor", answers - 0.01), ("rich", answers + 0.01)):
        priced.cli("account", "add", name, "--credit-limit", "0")
        priced.cli("payment", "add", name, str(round(money, 2)))
        body = {"model": "gpt-6", "prompt": "a", "max_tokens": 100_000, **more}
        with priced.client(priced.new_key(name)) as client:
            statuses[name] = client.post("/completions", json=body).status_code
    assert statuses == {"poor": 429, "rich": 200}


# ── Transcriptions ───────────────────────────────────────────────────────────────────────────────

TRANSCRIPT_USAGE = {
    "type": "tokens",
    "input_tokens": 140,
    "input_token_details": {"text_tokens": 40, "audio_tokens": 100},
    "output_tokens": 25,
    "total_tokens": 165,
}
BY_TOKENS = {
    "input_tokens": 140,
    "audio_input_tokens": 100,
    "output_tokens": 25,
}


def transcribe(
    gateway: Gateway, fields: Mapping[str, str] | None = None, size: int = 16_000
) -> httpx2.Response:
    with gateway.client(gateway.new_key()) as client:
        return client.post(
            "/audio/transcriptions",
            data={"model": "transcriber", **(fields or {})},
            files={"file": ("a.mp3", bytes(size), "audio/mpeg")},
        )


@pytest.mark.parametrize("path", ["transcriptions", "translations"])
def test_a_transcription_is_billed_by_tokens(
    priced: Gateway, upstream: Upstream, path: str
) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    answered = {"text": "Hi", "usage": TRANSCRIPT_USAGE}
    upstream.script = json_answer(answered)
    files = {"file": ("a.mp3", MP3, "audio/mpeg")}
    form = httpx2.Request("POST", "http://a", data={"model": "transcriber"}, files=files)
    kind = {"content-type": form.headers["content-type"]}
    with priced.client(priced.new_key()) as client:
        answer = client.post(f"/audio/{path}", content=form.read(), headers=kind)
    assert answer.json() == answered
    (received,) = upstream.requests
    assert received.path == f"/v1/audio/{path}"
    assert received.header("content-type") == kind["content-type"]
    assert received.body == form.read()
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("upstream", BY_TOKENS)
    assert row["cost"] == "0.00095"  # 40 * 2.5 + 100 * 6 + 25 * 10


def test_a_transcription_is_billed_by_the_minute(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer({"text": "Hi", "usage": {"type": "duration", "seconds": 90}})
    transcribe(priced)
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("upstream", {"audio_ms": 90_000})
    assert row["cost"] == "0.009"


@pytest.mark.parametrize("content_type", ["application/octet-stream", "audio/mpeg", "text/plain"])
def test_a_transcription_with_a_wrong_type_is_metered(
    priced: Gateway, upstream: Upstream, content_type: str
) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    text = json.dumps({"text": "Hi", "usage": {"type": "duration", "seconds": 90}}, indent=1)
    body = f"\n {text}".encode()
    upstream.script = json_answer(body, content_type=content_type)
    assert transcribe(priced).content == body
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("upstream", {"audio_ms": 90_000})


def test_a_minute_costs_as_much_as_its_tokens_without_a_rate(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    upstream.script = json_answer({"text": "Hi", "usage": {"type": "duration", "seconds": 90}})
    transcribe(priced)
    assert priced.row()["cost"] == "0.009"


def test_a_streamed_transcription_is_metered(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    pieces = [
        event({"type": "transcript.text.delta", "delta": "H"}),
        event({"type": "transcript.text.delta", "delta": "i"}),
        event({"type": "transcript.text.done", "text": "Hi", "usage": TRANSCRIPT_USAGE}),
    ]
    upstream.script = stream(pieces)
    assert transcribe(priced, {"stream": "true"}).content == b"".join(pieces)
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")
    assert usage_of(row) == BY_TOKENS


def test_a_torn_transcription_is_estimated(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    piece = event({"type": "transcript.text.delta", "delta": "H" * 45})
    upstream.script = stream([piece], end="tear")
    with pytest.raises(httpx2.HTTPError):
        transcribe(priced, {"stream": "true"})
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert row["output_tokens"] >= 10
    assert row["input_tokens"] == 50  # three seconds, at 1,000 tokens a minute
    assert row["audio_input_tokens"] == 50


SECOND = 16_000  # bytes, at 128 kbit/s


@pytest.mark.parametrize(
    ("text", "kind", "length_ms"),
    [
        (TEXT_OF_60_SECONDS, "text/plain; charset=utf-8", 60_000),
        (b"WEBVTT\n\n00:01.000 --> 00:07.250\nHi\n", "text/vtt", 7_250),
        (b"data protection is a right, and so on.\n" + b"a" * 6, "text/plain", 3_000),
        (b"{curly} words", "text/plain", 866),
        (b"Hi", "text/plain", 272),  # 48 kB in 44.1 kHz, 16 bit, two channels
    ],
)
def test_a_plain_text_has_an_estimated_length(
    priced: Gateway, upstream: Upstream, text: bytes, kind: str, length_ms: int
) -> None:
    """Until the last of the subtitles, else by the text."""
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer(text, content_type=kind)
    answer = transcribe(priced, {"response_format": "srt"}, 3 * SECOND)
    assert answer.content == text
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "estimated")
    assert abs(row["audio_ms"] - length_ms) <= 40  # the form's other parts


def test_a_plain_text_is_estimated_in_tokens_where_these_are_billed(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "transcriber", input="2.5", output="10")
    upstream.script = json_answer(b"words " * 150, content_type="text/plain")
    transcribe(priced, {"response_format": "text"}, 60 * SECOND)
    assert usage_of(priced.row()) == {
        "input_tokens": 1000,
        "audio_input_tokens": 1000,
        "output_tokens": 225,
    }


def test_json_without_usage_is_estimated_by_its_text(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer({"text": "words " * 150})
    transcribe(priced, size=10 * SECOND)
    row = priced.row()
    assert row["usage_source"] == "estimated"
    assert 60_000 <= row["audio_ms"] <= 61_000


def test_a_streamed_transcription_is_metered_whatever_its_type_says(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "transcriber", input="2.5")
    done = event({"type": "transcript.text.done", "text": "Hi", "usage": TRANSCRIPT_USAGE})
    upstream.script = json_answer(done, content_type="application/octet-stream")
    assert transcribe(priced, {"stream": "true"}).content == done
    assert usage_of(priced.row()) == BY_TOKENS


@pytest.mark.parametrize("duration", [8.47, "8.470"])
def test_the_length_in_a_verbose_answer_counts(
    priced: Gateway, upstream: Upstream, duration: Any
) -> None:
    price(priced, "transcriber", audio_minute="0.006")
    upstream.script = json_answer({"task": "transcribe", "duration": duration, "text": "Hi"})
    transcribe(priced, {"response_format": "verbose_json"})
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("upstream", {"audio_ms": 8470})


@pytest.mark.parametrize(
    "parts",
    [
        {"file": (None, "https://example.com/a.mp3")},
        {"url": (None, "https://example.com/a.mp3")},
        {"url": (None, "https://example.com/a.mp3"), "file": ("a.mp3", MP3)},
        [("file", ("a.mp3", MP3)), ("File", (None, "https://example.com/a.mp3"))],
        None,
    ],
)
def test_a_recording_at_a_url_is_refused(priced: Gateway, upstream: Upstream, parts: Any) -> None:
    """Its length, and what it may cost, would be unknown."""
    price(priced, "transcriber", audio_minute="0.006")
    named = {"model": "transcriber", "url": "https://example.com/a.mp3"}
    body = {"data": {"model": "transcriber"}, "files": parts} if parts else {"json": named}
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/transcriptions", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert not upstream.requests


def test_a_long_recording_is_held_for(priced: Gateway, upstream: Upstream) -> None:
    """A minute has at least 30,000 bytes."""
    price(priced, "transcriber", audio_minute="0.5")
    priced.cli("account", "add", "poor", "--credit-limit", "0")
    priced.cli("payment", "add", "poor", "1")
    upstream.script = json_answer({"text": "Hi", "usage": {"type": "duration", "seconds": 1}})
    with priced.client(priced.new_key("poor")) as client:
        for size, status in ((50_000, 200), (70_000, 429)):
            files = {"file": ("a.mp3", bytes(size), "audio/mpeg")}
            answer = client.post(
                "/audio/transcriptions", data={"model": "transcriber"}, files=files
            )
            assert answer.status_code == status


def test_a_recording_of_a_speaker_may_be_long(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "transcriber", input="2.5")
    upstream.script = json_answer({"text": "Hi", "usage": TRANSCRIPT_USAGE})
    recording = "data:audio/wav;base64," + "A" * 50_000
    answer = transcribe(priced, {"known_speaker_references[]": recording})
    assert answer.status_code == 200


# ── Speech ───────────────────────────────────────────────────────────────────────────────────────

SPEECH = {"model": "speaker", "input": "Grüße, 世界 😀!", "voice": "alloy"}
CHARACTERS = 12


@pytest.mark.parametrize(
    "audio",
    [
        MP3,
        b"\x1f\x8b" + MP3,  # looks like gzip
        b"\x28\xb5\x2f\xfd" + MP3,  # looks like zstd
        b" \r\n" + MP3,
        b": comment\n\n" + MP3,
        b'{"a": ' + MP3,
        b"d",
    ],
)
def test_speech_is_counted_by_characters(priced: Gateway, upstream: Upstream, audio: bytes) -> None:
    price(priced, "speaker", characters="15")
    upstream.script = json_answer(audio, content_type="audio/mpeg")
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/speech", json=SPEECH)
    assert (answer.content, answer.headers["content-type"]) == (audio, "audio/mpeg")
    assert len(SPEECH["input"]) == CHARACTERS
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "counted")
    assert usage_of(row) == {"characters": CHARACTERS}
    assert row["cost"] == "0.00018"


def test_speech_streams(priced: Gateway, upstream: Upstream) -> None:
    """In lock step: each chunk of audio but its last byte passes at once."""
    price(priced, "speaker", characters="15")
    seen = threading.Event()

    async def audio(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "audio/mpeg"})
        await reply.send(MP3)
        assert await reply.wait(seen)
        await reply.send(MP3)
        await reply.end()

    upstream.script = audio
    read = b""
    with (
        priced.client(priced.new_key()) as client,
        client.stream("POST", "/audio/speech", json=SPEECH) as answer,
    ):
        for part in answer.iter_raw():
            read += part
            if len(read) >= len(MP3) - 1:
                seen.set()
    assert read == MP3 * 2
    assert usage_of(priced.row()) == {"characters": CHARACTERS}


def test_speech_in_events_is_metered(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "speaker", input="0.6", audio_output="12", output="12", characters="15")
    usage = {"input_tokens": 14, "output_tokens": 101, "total_tokens": 115}
    pieces = [
        event({"type": "speech.audio.delta", "audio": "QUFB" * 5000}),
        event({"type": "speech.audio.done", "usage": usage}),
    ]
    upstream.script = stream(pieces)
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/speech", json={**SPEECH, "stream_format": "sse"})
    assert answer.content == b"".join(pieces)
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "upstream")
    assert usage_of(row) == {"input_tokens": 14, "output_tokens": 101, "audio_output_tokens": 101}


def test_the_output_of_speech_is_audio(priced: Gateway, upstream: Upstream) -> None:
    """OpenAI's price list has no text output for these models, and the answers have no details."""
    price(priced, "speaker", input="0.6", audio_output="12")
    usage = {"input_tokens": 14, "output_tokens": 101, "total_tokens": 115}
    upstream.script = stream([event({"type": "speech.audio.done", "usage": usage})])
    with priced.client(priced.new_key()) as client:
        client.post("/audio/speech", json={**SPEECH, "stream_format": "sse"})
    assert priced.row()["cost"] == "0.0012204"  # 14 * 0.6 + 101 * 12


@pytest.mark.parametrize("details", [{}, {"input_token_details": {"text_tokens": 0}}])
def test_the_input_of_a_transcription_is_audio(
    priced: Gateway, upstream: Upstream, details: dict[str, Any]
) -> None:
    price(priced, "transcriber", input="2.5", audio_input="6", output="10")
    usage = {"type": "tokens", "input_tokens": 100, "output_tokens": 25, **details}
    upstream.script = json_answer({"text": "Hi", "usage": usage})
    transcribe(priced)
    assert priced.row()["cost"] == "0.00085"  # 100 * 6 + 25 * 10
    assert priced.row()["audio_input_tokens"] == 100


def test_speech_in_events_without_usage_is_counted(priced: Gateway, upstream: Upstream) -> None:
    """The stream is complete all the same, though it is not closed."""
    price(priced, "speaker", characters="15")
    pieces = [
        event({"type": "speech.audio.delta", "audio": "QUFB"}),
        event({"type": "speech.audio.done"}),
    ]
    upstream.script = stream(pieces, end="tear")
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/speech", json={**SPEECH, "stream_format": "sse"})
    assert answer.content == b"".join(pieces)
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("completed", "counted")
    assert usage_of(row) == {"characters": CHARACTERS}


@pytest.mark.parametrize("size", [4, 20_000, 2_000_000])
def test_speech_in_events_that_fails_after_audio_is_estimated(
    priced: Gateway, upstream: Upstream, size: int
) -> None:
    price(priced, "speaker", characters="15")
    audio = event({"type": "speech.audio.delta", "audio": "QUFB" * (size // 4)})
    upstream.script = stream([audio, event({"type": "error", "error": {"message": "Broken."}})])
    with priced.client(priced.new_key()) as client:
        client.post("/audio/speech", json={**SPEECH, "stream_format": "sse"})
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_error", "estimated")
    assert usage_of(row) == {"characters": CHARACTERS}


@pytest.mark.parametrize("usage", [{"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 14}])
def test_speech_of_which_no_output_is_reported_is_counted(
    priced: Gateway, upstream: Upstream, usage: dict[str, int]
) -> None:
    price(priced, "speaker", characters="15")
    upstream.script = stream([event({"type": "speech.audio.done", "usage": usage})])
    with priced.client(priced.new_key()) as client:
        client.post("/audio/speech", json={**SPEECH, "stream_format": "sse"})
    row = priced.row()
    assert (row["usage_source"], usage_of(row)) == ("counted", {"characters": CHARACTERS})


def test_torn_speech_is_estimated(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "speaker", characters="15")

    async def torn(_: Received, reply: Reply) -> None:
        await reply.head(200, {"content-type": "audio/mpeg"})
        await reply.send(MP3)
        reply.tear()

    upstream.script = torn
    with priced.client(priced.new_key()) as client, pytest.raises(httpx2.HTTPError):
        client.post("/audio/speech", json=SPEECH)
    row = priced.row()
    assert (row["outcome"], row["usage_source"]) == ("upstream_failed", "estimated")
    assert usage_of(row) == {"characters": CHARACTERS}


def test_without_a_rate_characters_cost_as_much_as_tokens(
    priced: Gateway, upstream: Upstream
) -> None:
    price(priced, "speaker", input="0.6", output="12")
    upstream.script = json_answer(MP3, content_type="audio/mpeg")
    with priced.client(priced.new_key()) as client:
        client.post("/audio/speech", json=SPEECH)
    assert priced.row()["cost"] == "0.000144"


def test_speech_is_held_for(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "speaker", characters="1000")
    priced.cli("account", "add", "poor", "--credit-limit", "0")
    priced.cli("payment", "add", "poor", "1")
    upstream.script = json_answer(MP3, content_type="audio/mpeg")
    with priced.client(priced.new_key("poor")) as client:
        long = client.post("/audio/speech", json={**SPEECH, "input": "é" * 1001})
        assert (long.status_code, long.json()["error"]["code"]) == (429, "insufficient_quota")
        assert client.post("/audio/speech", json={**SPEECH, "input": "é" * 999}).status_code == 200
        huge = client.post("/audio/speech", json={**SPEECH, "input": "é" * 2_000_000})
        assert (huge.status_code, huge.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("given", [["Hi"], {"text": "Hi"}, 5, True, None])
def test_speech_of_no_string_is_refused(priced: Gateway, upstream: Upstream, given: Any) -> None:
    price(priced, "speaker", characters="15")
    with priced.client(priced.new_key()) as client:
        answer = client.post("/audio/speech", json={**SPEECH, "input": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert not upstream.requests


def test_another_accounts_voice_is_refused(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "speaker", characters="15")
    with priced.client(priced.new_key()) as client:
        body = {**SPEECH, "voice": {"id": "voice_of_another"}}
        assert client.post("/audio/speech", json=body).status_code == 400
    assert not upstream.requests


# ── Audio in chats ───────────────────────────────────────────────────────────────────────────────


def test_audio_tokens_of_a_chat_have_their_own_rates(priced: Gateway, upstream: Upstream) -> None:
    price(priced, "gpt-audio", input="2.5", audio_input="32", output="10", audio_output="64")
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 500,
        "total_tokens": 1500,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 600},
        "completion_tokens_details": {"audio_tokens": 400},
    }
    upstream.script = json_answer({"model": "gpt-audio", "choices": [], "usage": usage})
    with priced.client(priced.new_key()) as client:
        client.post("/chat/completions", json={"model": "gpt-audio", "messages": []})
    row = priced.row()
    assert (row["audio_input_tokens"], row["audio_output_tokens"]) == (600, 400)
    assert row["cost"] == "0.0468"  # 400 * 2.5 + 600 * 32 + 100 * 10 + 400 * 64
