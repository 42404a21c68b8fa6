"""OpenAI's SDKs and LangChain at the endpoints besides chats, responses and images. What a client
is told of its usage is what the ledger has."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.helpers.gateway import Gateway
from tests.helpers.upstream import (
    CHAT_USAGE,
    DONE,
    Received,
    Reply,
    Upstream,
    event,
    json_answer,
    stream,
)
from tests.product.test_sdks import node

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_2]

VECTOR = [0.5, -0.25, 1.0]
SPOKEN = b"ID3" + bytes(range(256)) * 100
TRANSCRIPT_USAGE = {
    "type": "tokens",
    "input_tokens": 14,
    "input_token_details": {"text_tokens": 4, "audio_tokens": 10},
    "output_tokens": 3,
    "total_tokens": 17,
}


async def openai_like(request: Received, reply: Reply) -> None:
    path = request.path.removeprefix("/v1")
    script = json_answer({"error": {"message": path}}, 404)
    if path == "/embeddings":
        body = request.json()
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        packed: Any = VECTOR
        if body.get("encoding_format") == "base64":
            packed = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
        data = [
            {"object": "embedding", "index": number, "embedding": packed}
            for number in range(len(texts))
        ]
        usage = {"prompt_tokens": 4 * len(texts), "total_tokens": 4 * len(texts)}
        script = json_answer({"object": "list", "data": data, "model": "e", "usage": usage})
    elif path == "/moderations":
        flags: dict[str, Any] = {
            "categories": {},
            "category_scores": {},
            "category_applied_input_types": {},
        }
        answer = {"id": "modr-1", "model": "omni", "results": [{"flagged": True, **flags}]}
        script = json_answer(answer)
    elif path == "/completions":
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "c"}
        choice = {"text": "Hi", "index": 0, "logprobs": None, "finish_reason": "stop"}
        if request.json().get("stream"):
            last = {**head, "choices": [], "usage": CHAT_USAGE}
            pieces = [event({**head, "choices": [choice], "usage": None}), event(last), DONE]
            script = stream(pieces)
        else:
            script = json_answer({**head, "choices": [choice], "usage": CHAT_USAGE})
    elif path == "/audio/speech":
        usage = {"input_tokens": 5, "output_tokens": 50, "total_tokens": 55}
        audio = base64.b64encode(SPOKEN).decode()
        script = json_answer(SPOKEN, content_type="audio/mpeg")
        if request.json().get("stream_format") == "sse":
            said = {"type": "speech.audio.delta", "audio": audio}
            script = stream([event(said), event({"type": "speech.audio.done", "usage": usage})])
    elif path.startswith("/audio/"):
        assert b"RIFF" in request.body
        script = json_answer({"text": "Hi", "usage": TRANSCRIPT_USAGE})
        if b'name="stream"' in request.body:
            done = {"type": "transcript.text.done", "text": "Hi", "usage": TRANSCRIPT_USAGE}
            pieces = [event({"type": "transcript.text.delta", "delta": "Hi"}), event(done)]
            script = stream(pieces)
        elif b"verbose_json" in request.body:
            length = {"type": "duration", "seconds": 9}
            verbose: dict[str, Any] = {
                "text": "Hi",
                "language": "english",
                "duration": 8.47,
                "usage": length,
            }
            script = json_answer(verbose)
        elif b"\r\nsrt\r\n" in request.body:
            script = json_answer(
                b"1\n00:00:00,000 --> 00:00:02,000\nHi\n", content_type="text/plain"
            )
    await script(request, reply)


@pytest.fixture(autouse=True)
def model(upstream: Upstream) -> None:
    upstream.script = openai_like


@pytest.fixture
def sdk(gateway: Gateway, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=key) as client:
        yield client


RECORDING = ("a.wav", b"RIFF" + bytes(4000), "audio/wav")


def test_python_embeddings_and_moderations(sdk: openai.OpenAI, gateway: Gateway) -> None:
    found = sdk.embeddings.create(model="e", input=["a", "b"])
    assert [each.embedding for each in found.data] == [VECTOR, VECTOR]
    floats = sdk.embeddings.create(model="e", input="a", encoding_format="float")
    assert floats.data[0].embedding == VECTOR
    assert sdk.moderations.create(input="Hi").results[0].flagged
    rows = {(row["endpoint"], row["input_tokens"]) for row in gateway.rows()}
    assert rows == {("/v1/embeddings", 8), ("/v1/embeddings", 4), ("/v1/moderations", None)}


def test_python_completions(sdk: openai.OpenAI, gateway: Gateway) -> None:
    whole = sdk.completions.create(model="c", prompt="a")
    assert (whole.choices[0].text, whole.usage and whole.usage.completion_tokens) == ("Hi", 7)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(sdk.completions.create(model="c", prompt="a", stream=True, **options))  # type: ignore[call-overload]
        assert len(chunks) == 1 + bool(options)
    assert [row["output_tokens"] for row in gateway.rows()] == [7, 7, 7]


def test_python_audio(sdk: openai.OpenAI, gateway: Gateway) -> None:
    audio = sdk.audio
    said = audio.transcriptions.create(model="t", file=RECORDING)
    assert (said.text, said.usage and said.usage.type) == ("Hi", "tokens")
    events = list(audio.transcriptions.create(model="t", file=RECORDING, stream=True))
    assert [each.type for each in events] == ["transcript.text.delta", "transcript.text.done"]
    verbose = audio.transcriptions.create(model="t", file=RECORDING, response_format="verbose_json")
    assert verbose.duration == 8.47
    assert "00:02" in audio.transcriptions.create(model="t", file=RECORDING, response_format="srt")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert audio.translations.create(model="t", file=RECORDING).text == "Hi"
    spoken = audio.speech.create(model="s", voice="alloy", input="Grüße")
    assert spoken.content == SPOKEN
    with audio.speech.with_streaming_response.create(
        model="s", voice="alloy", input="Grüße"
    ) as response:
        assert b"".join(response.iter_bytes()) == SPOKEN
    rows = [(row["usage_source"], row["audio_ms"], row["characters"]) for row in gateway.rows()]
    assert sorted(rows, key=str) == sorted(
        [
            *[("upstream", None, None)] * 3,
            ("upstream", 9000, None),
            ("estimated", None, None),  # of the text; the model has no price
            *[("counted", None, 5)] * 2,
        ],
        key=str,
    )
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 7


NODE = """
import OpenAI, { toFile } from 'openai';
const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey });
const said = {};
const found = await client.embeddings.create({ model: 'e', input: ['a', 'b'] });
said.embeddings = found.data.map((each) => each.embedding);
said.moderations = (await client.moderations.create({ input: 'Hi' })).results[0].flagged;
const recording = () => toFile(Buffer.concat([Buffer.from('RIFF'), Buffer.alloc(4000)]), 'a.wav');
said.transcription = await client.audio.transcriptions.create(
  { model: 't', file: await recording() });
said.events = [];
for await (const each of await client.audio.transcriptions.create(
  { model: 't', file: await recording(), stream: true })) said.events.push(each.type);
said.translation = (await client.audio.translations.create(
  { model: 't', file: await recording() })).text;
const spoken = await client.audio.speech.create({ model: 's', voice: 'alloy', input: 'Grüße' });
said.speech = Buffer.from(await spoken.arrayBuffer()).toString('base64');
const sse = await client.audio.speech.create(
  { model: 's', voice: 'alloy', input: 'Grüße', stream_format: 'sse' });
said.sse = (await sse.text()).includes('speech.audio.done');
said.completion = (await client.completions.create({ model: 'c', prompt: 'a' })).usage.total_tokens;
said.chunks = 0;
for await (const each of await client.completions.create(
  { model: 'c', prompt: 'a', stream: true })) said.chunks += each.choices.length;
console.log(JSON.stringify(said));
"""


def test_node(gateway: Gateway, key: str) -> None:
    said = node(NODE, gateway.base_url, key)
    assert said.pop("transcription")["usage"] == TRANSCRIPT_USAGE
    assert base64.b64decode(said.pop("speech")) == SPOKEN
    assert said == {
        "embeddings": [VECTOR, VECTOR],
        "moderations": True,
        "events": ["transcript.text.delta", "transcript.text.done"],
        "translation": "Hi",
        "sse": True,
        "completion": CHAT_USAGE["total_tokens"],
        "chunks": 1,
    }
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 9
    by_source = json.dumps(sorted(row["usage_source"] for row in rows))
    assert by_source == json.dumps(["counted", "none", *["upstream"] * 7])


def test_langchain_embeddings(gateway: Gateway, key: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="e", base_url=gateway.base_url, api_key=key, check_embedding_ctx_length=False
    )
    assert embeddings.embed_documents(["a", "b", "c"]) == [VECTOR] * 3
    assert embeddings.embed_query("a") == VECTOR
    assert sorted(row["input_tokens"] for row in gateway.rows()) == [4, 12]
