"""The demonstration upstream: what the SDKs need of it, and usage that is true."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from redbtc import demo
from tests.helpers.gateway import PATIENCE_SECONDS, USUAL

pytestmark = pytest.mark.promise_2

TOKEN = re.compile(r"\w+|[^\w\s]")
HELLO: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Grüße, gateway! (it's 2026)"}]},
    {"role": "assistant", "content": "Hm?"},
]
SENT = "Be brief. Grüße, gateway! (it's 2026) Hm?"
CODEX_INPUT: Any = [
    {"type": "additional_tools", "tools": [{"type": "function", "name": "not counted"}]},
    {"role": "developer", "content": [{"type": "input_text", "text": "one two"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "three"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
    {"type": "function_call", "call_id": "c", "name": "x", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "c", "output": "four five"},
]


def tokens(text: str) -> int:
    return len(TOKEN.findall(text))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PAUSE_SECONDS", 0)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(demo.app()) as running:
        yield running


@pytest.fixture
def base_url() -> Iterator[str]:
    """A real server on a loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(demo.app(), ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "no stream keeps the server from stopping"


@pytest.fixture
def sdk(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="ignored", max_retries=0) as client:
        yield client


def events(text: str) -> list[tuple[str, Any]]:
    """The name and content of each event."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        match = re.fullmatch(r"(?:event: (.+)\n)?data: (.+)", block)
        assert match, block
        content = match[2] if match[2] == "[DONE]" else json.loads(match[2])
        found.append((match[1] or "", content))
    return found


def decode_png(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels, by the PNG specification; every checksum must hold."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == height * (1 + 3 * width)
    assert set(rows[:: 1 + 3 * width]) == {0}
    return width, height, rows


def test_sdk_chat_streamed_is_the_plain_answer(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="any-name", messages=HELLO)
    *chunks, last = sdk.chat.completions.create(
        model="any-name", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    text = whole.choices[0].message.content
    assert text
    assert "a canned answer" in text
    assert '"Grüße, gateway! (it\'s 2026)"' in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert {chunk.model for chunk in chunks} == {whole.model} == {"any-name"}
    assert not last.choices
    assert last.usage == whole.usage
    assert whole.usage
    assert whole.usage.prompt_tokens == tokens(SENT)
    assert whole.usage.completion_tokens == tokens(text)
    assert whole.usage.total_tokens == tokens(SENT) + tokens(text)


def test_sdk_responses_streamed_is_the_plain_answer(sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(model="m", input="Hello", instructions="Be kind.")
    with sdk.responses.stream(model="m", input="Hello", instructions="Be kind.") as stream:
        seen = list(stream)
        final = stream.get_final_response()
    deltas = [each.delta for each in seen if each.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert '"Hello"' in whole.output_text
    assert final.usage == whole.usage
    assert whole.usage
    assert whole.usage.input_tokens == tokens("Hello Be kind.")
    assert whole.usage.output_tokens == tokens(whole.output_text)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens


def test_sdk_images_are_pictures(sdk: openai.OpenAI) -> None:
    made = sdk.images.generate(model="redbtc-demo-image", prompt="a small square")
    edited = sdk.images.edit(
        model="redbtc-demo-image",
        image=("a.png", b'\r\n\r\nname="prompt"\r\n\r\n\xff' * 1000),
        prompt="ein größeres Quadrat",
    )
    *partial, last = sdk.images.generate(
        model="redbtc-demo-image", prompt="a small square", stream=True, partial_images=2
    )
    assert made.data
    assert edited.data
    pictures = [base64.b64decode(each.b64_json or "") for each in (made.data[0], edited.data[0])]
    assert [decode_png(each)[:2] for each in pictures] == [(64, 64)] * 2
    assert pictures[0] != pictures[1]
    assert pictures[0] == demo.picture("a small square")
    assert pictures[1] == demo.picture("ein größeres Quadrat")
    assert [each.type for each in partial] == ["image_generation.partial_image"] * 2
    assert [each.to_dict()["partial_image_index"] for each in partial] == [0, 1]
    assert last.type == "image_generation.completed"
    assert last.b64_json == made.data[0].b64_json
    assert made.usage
    assert last.usage.to_dict() == made.usage.to_dict()
    assert (made.usage.input_tokens, made.usage.output_tokens) == (3, 64)
    assert made.usage.total_tokens == 67


def test_sdk_models_and_errors(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["redbtc-demo", "redbtc-demo-image"]
    assert sdk.models.retrieve("redbtc-demo").owned_by == "redbtc"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other/model")
    with pytest.raises(openai.BadRequestError, match="output token limit"):
        sdk.responses.create(model="m", input="x", max_output_tokens=0)


def test_the_events_of_a_response_come_in_order(client: TestClient) -> None:
    body = {"model": "m", "input": CODEX_INPUT, "tools": [{"odd": 1}], "stream": True}
    got = client.post("/v1/responses", json=body)
    assert got.headers["content-type"].startswith("text/event-stream")
    found = events(got.text)
    names = [name.removeprefix("response.") for name, _ in found]
    words = names.count("output_text.delta")
    assert names == [
        *["created", "in_progress", "output_item.added", "content_part.added"],
        *["output_text.delta"] * words,
        *["output_text.done", "content_part.done", "output_item.done", "completed"],
    ]
    assert words > 10
    assert [name for name, _ in found] == [content["type"] for _, content in found]
    assert [content["sequence_number"] for _, content in found] == list(range(len(found)))
    final = found[-1][1]["response"]
    text = final["output"][0]["content"][0]["text"]
    assert '"three"' in text
    sent, said = tokens('one two three {"a": 1} four five'), tokens(text)
    assert final["usage"] == {
        "input_tokens": sent,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sent + said,
    }


def test_a_chat_stream_carries_usage_only_where_asked(client: TestClient) -> None:
    body: dict[str, Any] = {"model": "m", "messages": HELLO, "stream": True}
    plain = events(client.post("/v1/chat/completions", json=body).text)
    body["stream_options"] = {"include_usage": True}
    asked = events(client.post("/v1/chat/completions", json=body).text)
    assert [content for _, content in plain[-1:]] == ["[DONE]"]
    assert all("usage" not in content and content["choices"] for _, content in plain[:-1])
    assert {name for name, _ in plain} == {""}
    assert len(asked) == len(plain) + 1
    assert asked[-1][1] == "[DONE]"
    assert asked[-2][1]["choices"] == []
    assert all("usage" in content and content["usage"] is None for _, content in asked[:-2])


@pytest.mark.parametrize("most", [1, 7, 20])
def test_a_limit_cuts_the_answer_to_the_token(client: TestClient, most: int) -> None:
    chats = [
        client.post("/v1/chat/completions", json={"model": "m", "messages": HELLO, limit: most})
        for limit in ("max_tokens", "max_completion_tokens")
    ]
    for chat in map(httpx2.Response.json, chats):
        assert chat["choices"][0]["finish_reason"] == "length"
        assert tokens(chat["choices"][0]["message"]["content"]) == most
        assert chat["usage"]["completion_tokens"] == most
    body = {"model": "m", "input": "x", "max_output_tokens": most, "stream": True}
    found = events(client.post("/v1/responses", json=body).text)
    final = found[-1][1]["response"]
    assert found[-1][0] == "response.incomplete"
    assert final["status"] == final["output"][0]["status"] == "incomplete"
    assert final["incomplete_details"] == {"reason": "max_output_tokens"}
    assert final["usage"]["output_tokens"] == most
    deltas = [content["delta"] for name, content in found if name.endswith("text.delta")]
    assert "".join(deltas) == final["output"][0]["content"][0]["text"]


def test_a_limit_that_just_fits_cuts_nothing(client: TestClient) -> None:
    body: dict[str, Any] = {"model": "m", "input": "x"}
    whole = client.post("/v1/responses", json=body).json()
    body["max_output_tokens"] = whole["usage"]["output_tokens"]
    fits = client.post("/v1/responses", json=body).json()
    assert fits["status"] == "completed"
    assert fits["usage"] == whole["usage"]
    body["max_output_tokens"] -= 1
    assert client.post("/v1/responses", json=body).json()["status"] == "incomplete"


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"{}", b'{"model": 1}', b"\xff"])
@pytest.mark.parametrize(
    "path", ["chat/completions", "responses", "images/generations", "images/edits"]
)
def test_a_body_without_a_model_is_refused(client: TestClient, path: str, body: bytes) -> None:
    got = client.post(f"/v1/{path}", content=body)
    assert got.status_code == 400
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_every_response_has_its_own_request_id(client: TestClient) -> None:
    body = {"model": "m", "input": "x"}
    got = [
        client.get("/v1/models"),
        client.get("/v1/models/none"),
        client.get("/v1/responses"),
        client.get("/elsewhere"),
        client.post("/v1/responses", content=b"{"),
        client.post("/v1/responses", json=body),
        client.post("/v1/responses", json={**body, "stream": True}),
        client.post("/v1/images/generations", json={"model": "m", "prompt": "x"}),
    ]
    assert [each.status_code for each in got] == [200, 404, 405, 404, 400, 200, 200, 200]
    assert len({each.headers["x-request-id"] for each in got}) == len(got)
    assert all("error" in each.json() for each in got[1:5])


def test_edits_take_json_and_forms(client: TestClient) -> None:
    fields = {"model": "m", "prompt": "täst", "stream": "true", "partial_images": "1"}
    form = client.post("/v1/images/edits", data=fields, files={"image[]": ("a.png", b"\x89PNG")})
    sent = {**fields, "stream": True, "partial_images": 1, "images": [{"image_url": "data:,"}]}
    as_json = client.post("/v1/images/edits", json=sent)
    for got in (form, as_json):
        (first, partial), (second, completed) = events(got.text)
        assert (first, second) == ("image_edit.partial_image", "image_edit.completed")
        assert partial["b64_json"] == completed["b64_json"]
        assert base64.b64decode(completed["b64_json"]) == demo.picture("täst")
        assert completed["usage"]["input_tokens"] == 1


def test_megabytes_are_counted_and_quoted_briefly(client: TestClient) -> None:
    for words, one in ((500_000, "word "), (1, "w" * 3_000_000)):
        got = client.post("/v1/responses", json={"model": "m", "input": one * words}).json()
        assert got["usage"]["input_tokens"] == words
        assert len(got["output"][0]["content"][0]["text"]) < 300


def test_words_pass_one_by_one_and_a_client_may_leave(
    base_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a pause that never ends the first event still arrives, and leaving ends the stream."""
    monkeypatch.setattr(demo, "PAUSE_SECONDS", 3600)
    body = {"model": "m", "input": "x", "stream": True}
    with httpx2.stream("POST", f"{base_url}/responses", json=body, **USUAL) as got:
        assert b"response.created" in next(got.iter_raw())
    assert httpx2.get(f"{base_url}/models", **USUAL).status_code == 200
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == []


@pytest.mark.parametrize("path", ["chat/completions", "responses", "images/generations"])
@pytest.mark.parametrize("kind", [b"application/json", b"multipart/form-data; boundary=b"])
def test_a_torn_upload_is_refused(path: str, kind: bytes) -> None:
    """A client that disconnects before its body is complete gets the answer to a body that is not
    valid, even if what has arrived is valid JSON, and no error is raised that a server would
    log."""
    arrived = b'{"model": "redbtc-demo", "prompt": "x"}'
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": arrived, "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/v1/{path}", "query_string": b""}
    asyncio.run(demo.app()({**scope, "headers": [(b"content-type", kind)]}, receive, send))
    assert not messages
    start, body = sent
    assert (start["type"], start["status"]) == ("http.response.start", 400)
    error = json.loads(body["body"])["error"]
    assert error["message"] == "The request body is not valid JSON."
    assert not body.get("more_body")


def test_a_compressed_body_is_read(client: TestClient) -> None:
    body = gzip.compress(json.dumps({"model": "redbtc-demo", "input": "one two"}).encode())
    answer = client.post("/v1/responses", content=body, headers={"content-encoding": "gzip"})
    assert answer.json()["usage"]["input_tokens"] == 2
    broken = client.post("/v1/responses", content=b"x", headers={"content-encoding": "gzip"})
    assert broken.status_code == 400
