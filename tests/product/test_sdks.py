"""Clients that people really use, on paths beyond a plain question: streams, tools, structured
output, pictures, errors and retries. What a client counts is what the ledger has."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway, MakeGateway
from tests.helpers.tools import NODE_MODULES, needs
from tests.helpers.upstream import (
    CHAT_USAGE,
    DONE,
    IMAGE_USAGE,
    RESPONSE_USAGE,
    Received,
    Reply,
    Script,
    Upstream,
    event,
    images_json,
    images_stream,
    json_answer,
    response_object,
    stream,
    wants_stream,
)

pytestmark = pytest.mark.promise_1

PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
    "rkJggg=="
)
WEATHER = {"city": "Paris"}


class Model:
    """An upstream that calls the first tool it is offered, once, and then answers; in JSON where a
    schema is asked for. It knows the items that it has stored."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.items: dict[str, dict[str, Any]] = {}

    async def __call__(self, request: Received, reply: Reply) -> None:
        path = request.path.partition("?")[0]
        if path == "/v1/chat/completions":
            script = self._chat(request.json())
        elif path == "/v1/responses":
            script = self._response(request.json())
        else:
            script = images_stream() if wants_stream(request) else images_json()
            if not wants_stream(request):
                data = {"created": 1, "data": [{"b64_json": PICTURE}], "usage": IMAGE_USAGE}
                script = json_answer(data)
        await script(request, reply)

    @staticmethod
    def _text(schema: Any) -> str:
        return json.dumps({"city": "Paris", "degrees": 21}) if schema else "It is 21 degrees."

    def _chat(self, body: dict[str, Any]) -> Script:
        tools = body.get("tools")
        answered = any(message["role"] == "tool" for message in body["messages"])
        asked = (body.get("stream_options") or {}).get("include_usage")
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"], "usage": CHAT_USAGE}
        message: dict[str, Any] = {"role": "assistant", "content": None}
        finish = "stop"
        if tools and not answered:
            name = tools[0]["function"]["name"]
            function = {"name": name, "arguments": json.dumps(WEATHER)}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
            finish = "tool_calls"
        else:
            message["content"] = self._text(body.get("response_format"))
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        if not body.get("stream"):
            return json_answer({**head, "object": "chat.completion", "choices": [choice]})
        chunk = {**head, "object": "chat.completion.chunk", "usage": None}
        calls = [{**call, "index": 0} for call in message.pop("tool_calls", [])]
        deltas = [{**message, "tool_calls": calls} if calls else message, {}]
        chunks = [
            {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
            for delta, end in zip(deltas, (None, finish), strict=True)
        ]
        last = [{**chunk, "choices": [], "usage": CHAT_USAGE}] if asked else []
        return stream([*map(event, [*chunks, *last]), DONE])

    def _response(self, body: dict[str, Any]) -> Script:
        given = body["input"] if isinstance(body["input"], list) else []
        for item in given:
            if item.get("type") == "item_reference":
                assert item["id"] in self.items, "only what was stored here is referred to"
        number = next(self._numbers)
        answered = any(item.get("type") == "function_call_output" for item in given)
        functions = [tool for tool in body.get("tools") or [] if tool["type"] == "function"]
        if functions and not answered:
            item = {"id": f"fc_{number}", "type": "function_call", "status": "completed"}
            item |= {"call_id": f"call_{number}", "name": functions[0]["name"]}
            item |= {"arguments": json.dumps(WEATHER)}
        else:
            text = self._text((body.get("text") or {}).get("format", {}).get("schema"))
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            item = {"id": f"msg_{number}", "type": "message", "role": "assistant"}
            item |= {"status": "completed", "content": [part]}
        if body.get("store") is not False:
            self.items[str(item["id"])] = item
        done = response_object(body["model"], id=f"resp_{number}", output=[item])
        done |= {"instructions": None, "metadata": {}, "incomplete_details": None}
        if not body.get("stream"):
            return json_answer(done)
        return stream([event(each, each["type"]) for each in self._events(done, item)])

    @staticmethod
    def _events(done: dict[str, Any], item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = {**done, "status": "in_progress", "output": [], "usage": None}
        place = {"item_id": item["id"], "output_index": 0}
        events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
        empty = {**item, "status": "in_progress"}
        if "arguments" in item:
            empty["arguments"] = ""
        else:
            empty["content"] = []
        events.append({"type": "response.output_item.added", "output_index": 0, "item": empty})
        if "arguments" in item:
            kind = "response.function_call_arguments"
            events.append({"type": f"{kind}.delta", **place, "delta": item["arguments"]})
            events.append(
                {"type": f"{kind}.done", **place, "arguments": item["arguments"], "name": "x"}
            )
        else:
            (part,) = item["content"]
            place |= {"content_index": 0}
            bare = {**part, "text": ""}
            events.append({"type": "response.content_part.added", **place, "part": bare})
            text = {**place, "logprobs": []}
            events.append({"type": "response.output_text.delta", **text, "delta": part["text"]})
            events.append({"type": "response.output_text.done", **text, "text": part["text"]})
            events.append({"type": "response.content_part.done", **place, "part": part})
        events.append({"type": "response.output_item.done", "output_index": 0, "item": item})
        events.append({"type": "response.completed", "response": done})
        for number, each in enumerate(events):
            yield {**each, "sequence_number": number}


@pytest.fixture(autouse=True)
def model(upstream: Upstream) -> Model:
    model = Model()
    upstream.script = model
    return model


@pytest.fixture
def sdk(gateway: Gateway, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=key) as client:
        yield client


class Weather(BaseModel):
    city: str
    degrees: int


MESSAGES: Any = [{"role": "user", "content": "How warm is it in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "x", "parameters": PARAMETERS}


def test_python_tools_and_structured_output(sdk: openai.OpenAI, gateway: Gateway) -> None:
    chat_tools: Any = [{"type": "function", "function": TOOL}]
    with sdk.chat.completions.stream(model="m", messages=MESSAGES, tools=chat_tools) as chat:
        choice = chat.get_final_completion().choices[0]
    assert choice.message.tool_calls
    assert json.loads(choice.message.tool_calls[0].function.arguments) == WEATHER
    parsed = sdk.chat.completions.parse(model="m", messages=MESSAGES, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    tools: Any = [{"type": "function", **TOOL, "strict": False}]
    with sdk.responses.stream(model="m", input="How warm?", tools=tools) as events:
        kinds = [each.type for each in events]
        first = events.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    call: Any = first.output[0]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    second = sdk.responses.create(
        model="m", input=[output], tools=tools, previous_response_id=first.id
    )
    assert second.output_text == "It is 21 degrees."
    typed = sdk.responses.parse(model="m", input="How warm?", text_format=Weather)
    assert typed.output_parsed == Weather(city="Paris", degrees=21)
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 5
    assert {row["input_tokens"] for row in rows} == {20, RESPONSE_USAGE["input_tokens"]}


def test_python_images(sdk: openai.OpenAI, gateway: Gateway) -> None:
    stream = sdk.images.generate(model="gpt-image-2", prompt="x", stream=True, partial_images=1)
    kinds = [each.type for each in stream]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    picture = [("a.png", b"\x89PNG" * 1000)]
    edited = [
        each.type
        for each in sdk.images.edit(model="gpt-image-2", prompt="x", image=picture, stream=True)
    ]
    assert edited[-1] == "image_edit.completed"
    assert [row["image_output_tokens"] for row in gateway.rows()] == [272, 272]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_python_sees_the_upstreams_errors(
    sdk: openai.OpenAI, upstream: Upstream, status: int, kind: type[openai.APIStatusError]
) -> None:
    error = {"message": "no", "type": "some_error", "param": "x", "code": "y"}
    headers = {"x-request-id": "req_upstream", "retry-after-ms": "1"}
    upstream.script = json_answer({"error": error}, status, headers)
    for client, tries in ((sdk, 3), (sdk.with_options(max_retries=0), 1)):
        upstream.requests.clear()
        with pytest.raises(kind) as raised:
            client.responses.create(model="m", input="x")
        assert (raised.value.body, raised.value.status_code) == (error, status)
        assert (raised.value.code, raised.value.param) == ("y", "x")
        assert raised.value.request_id == "req_upstream"
        assert len(upstream.requests) == (tries if status in (409, 429, 500, 503) else 1)


@pytest.mark.parametrize("status", [401, 403])
def test_python_is_not_told_that_its_own_key_is_wrong(
    sdk: openai.OpenAI, upstream: Upstream, status: int
) -> None:
    """It is the operator's key that the upstream rejects."""
    error = {"message": "Incorrect API key: sk-up", "type": "some_error", "code": "invalid_api_key"}
    upstream.script = json_answer({"error": error}, status)
    with pytest.raises(openai.InternalServerError) as raised:
        sdk.with_options(max_retries=0).responses.create(model="m", input="x")
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_credentials_rejected")
    assert "sk-up" not in str(raised.value)


def test_python_retries_as_it_is_told(
    sdk: openai.OpenAI, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Script] = []

    async def script(request: Received, reply: Reply) -> None:
        await answers.pop(0)(request, reply)

    upstream.script = script
    error = {"error": {"message": "no", "type": "t", "param": None, "code": None}}
    fine = json_answer(response_object())
    answers[:] = [json_answer(error, 429, {"retry-after-ms": "300", "retry-after": "9"}), fine]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert sdk.responses.create(model="m", input="x").id == "resp_1"
    assert slept == [0.3]
    answers[:] = [json_answer(error, 400, {"x-should-retry": "true"}), fine]
    assert sdk.responses.create(model="m", input="x").id == "resp_1"
    answers[:] = [json_answer(error, 500, {"x-should-retry": "false"}), fine]
    with pytest.raises(openai.InternalServerError):
        sdk.responses.create(model="m", input="x")
    assert len(answers) == 1


def test_python_sees_a_stream_that_breaks(
    sdk: openai.OpenAI, upstream: Upstream, gateway: Gateway
) -> None:
    created = event({"type": "response.created", "response": response_object(usage=None)})
    error = {"type": "error", "code": "x", "message": "it broke", "param": None}
    upstream.script = stream([created, event({**error, "error": error}, "error")])
    with pytest.raises(openai.APIError, match="it broke"):
        list(sdk.responses.create(model="m", input="x", stream=True))
    upstream.script = stream([created], end="tear")
    with pytest.raises(openai.APIConnectionError):
        list(sdk.responses.create(model="m", input="x", stream=True))
    outcomes = [row["outcome"] for row in gateway.rows()]
    assert outcomes == ["upstream_error", "upstream_failed"]


def node(script: str, *arguments: str) -> Any:
    """What a script prints as JSON."""
    for package in ("openai", "ai", "@ai-sdk/openai"):
        if not (NODE_MODULES / package).exists():
            needs(f"{package} from npm")
    file = NODE_MODULES / f"script{abs(hash(script))}.mjs"
    file.write_text(script)
    try:
        done = subprocess.run(
            [needs("node"), file, *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
    finally:
        file.unlink()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NODE_ERRORS = """
import OpenAI from 'openai';
const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey });
const said = [];
for (let turn = 0; turn < 4; turn++) {
  try {
    const answer = await client.responses.create({ model: 'm', input: 'x' });
    said.push(answer.id);
  } catch (error) {
    said.push([error.constructor.name, error.status, error.code, error.param, error.requestID]);
  }
}
try {
  for await (const each of await client.responses.create(
    { model: 'm', input: 'x', stream: true })) said.push(each.type);
} catch (error) { said.push(error.message); }
const tools = [{ type: 'function', name: 'weather', parameters: { type: 'object',
  properties: { city: { type: 'string' } }, required: ['city'] }, strict: false }];
const events = client.responses.stream({ model: 'm', input: 'How warm?', tools });
const final = await events.finalResponse();
said.push(final.output[0].arguments, final.usage.input_tokens);
console.log(JSON.stringify(said));
"""


def test_node_errors_retries_and_tools(
    gateway: Gateway, upstream: Upstream, key: str, model: Model
) -> None:
    error = {"error": {"message": "no", "type": "t", "param": "p", "code": "c"}}
    broken = {"type": "error", "code": "x", "message": "it broke", "param": None}
    answers = [
        json_answer(error, 429, {"retry-after-ms": "5"}),
        json_answer(response_object()),
        json_answer(error, 500, {"x-should-retry": "false", "x-request-id": "r"}),
        json_answer(error, 400, {"x-should-retry": "true", "retry-after-ms": "5"}),
        json_answer(response_object()),
        json_answer(error, 404),
        stream([event({**broken, "error": broken}, "error")]),
    ]

    async def script(request: Received, reply: Reply) -> None:
        await (answers.pop(0) if answers else model)(request, reply)

    upstream.script = script
    said = node(NODE_ERRORS, gateway.base_url, key)
    assert said[0] == "resp_1"
    assert said[1] == ["InternalServerError", 500, "c", "p", "r"]
    assert said[2] == "resp_1"
    assert said[3][:2] == ["NotFoundError", 404]
    assert "it broke" in said[4]
    assert said[5:] == [json.dumps(WEATHER), RESPONSE_USAGE["input_tokens"]]
    assert len(gateway.rows()) == 8


AI_SDK = """
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, streamText, generateImage, Output, tool, stepCountIs } from 'ai';
import { z } from 'zod';
const [baseURL, apiKey] = process.argv.slice(2);
const provider = createOpenAI({ baseURL, apiKey });
const tools = { weather: tool({ description: 'x', inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => ({ degrees: 21, city }) }) };
const schema = z.object({ city: z.string(), degrees: z.number() });
const said = {};
for (const [name, model] of
    [['chat', provider.chat('gpt-4.1')], ['responses', provider.responses('gpt-4.1')]]) {
  const ask = { model, prompt: 'How warm is it in Paris?', maxRetries: 0 };
  const stream = streamText(ask);
  let text = '';
  for await (const part of stream.textStream) text += part;
  const steps = await generateText({ ...ask, tools, stopWhen: stepCountIs(3) });
  const object = await generateText({ ...ask, output: Output.object({ schema }) });
  const more = await generateText({ model, maxRetries: 0, messages: [
    { role: 'user', content: 'How warm?' }, ...(await stream.response).messages,
    { role: 'user', content: 'And now?' }] });
  said[name] = { text, steps: steps.steps.length, answer: steps.text, object: object.output,
    used: [(await stream.totalUsage), steps.totalUsage, object.totalUsage, more.totalUsage]
      .map((usage) => [usage.inputTokens, usage.outputTokens]) };
}
const { image } = await generateImage({ model: provider.image('gpt-image-2'), prompt: 'x' });
said.image = image.base64;
console.log(JSON.stringify(said));
"""


def test_vercel_ai_sdk(gateway: Gateway, upstream: Upstream, key: str) -> None:
    """What the model has said before it names by the ids of the items."""
    said = node(AI_SDK, gateway.base_url, key)
    for name in ("chat", "responses"):
        assert said[name]["text"] == said[name]["answer"] == "It is 21 degrees."
        assert said[name]["steps"] == 2
        assert said[name]["object"] == {"city": "Paris", "degrees": 21}
    assert said["image"] == PICTURE
    bodies = [request.json() for request in upstream.requests if b'"input"' in request.body]
    assert any(
        item.get("type") == "item_reference"
        for body in bodies
        for item in body["input"]
        if isinstance(item, dict)
    )
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 11
    for path, name in (("/v1/chat/completions", "chat"), ("/v1/responses", "responses")):
        own = [row for row in rows if row["endpoint"] == path]
        used = said[name]["used"]
        assert sum(row["input_tokens"] for row in own) == sum(each[0] for each in used)
        assert sum(row["output_tokens"] for row in own) == sum(each[1] for each in used)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(gateway: Gateway, key: str, responses: bool) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="m", base_url=gateway.base_url, api_key=key, use_responses_api=responses
    )
    whole = chat.invoke("How warm is it in Paris?")
    assert whole.text == "It is 21 degrees."
    streamed = None
    usage = {} if responses else {"stream_usage": True}
    for chunk in chat.stream("How warm is it in Paris?", **usage):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.text == whole.text
    typed = chat.with_structured_output(Weather, method="json_schema").invoke("How warm?")
    assert typed == Weather(city="Paris", degrees=21)
    tool = {"type": "function", "function": TOOL}
    bound = chat.bind_tools([tool])
    called = bound.invoke(MESSAGES)
    assert called.tool_calls[0]["args"] == WEATHER
    output = {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "21"}
    answered = bound.invoke([*MESSAGES, called, output])
    assert answered.text == whole.text
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 5
    for said, row in zip((whole, streamed), rows, strict=False):
        used = said.usage_metadata
        assert (row["input_tokens"], row["output_tokens"]) == (
            used["input_tokens"],
            used["output_tokens"],
        )


# ── An upstream that fails beside one that does not ──────────────────────────────────────────────

NODE_FAILOVER = """
import OpenAI from 'openai';
const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey });
const said = [];
said.push((await client.responses.create({ model: 'gpt-up', input: 'x' })).status);
for await (const each of await client.responses.create(
  { model: 'gpt-up', input: 'x', stream: true })) said.push(each.type);
const messages = [{ role: 'user', content: 'x' }];
said.push((await client.chat.completions.create({ model: 'gpt-up', messages })).object);
console.log(JSON.stringify(said.filter((each) => !each.startsWith('response.'))));
"""


@pytest.mark.parametrize("status", [429, 401, 503])
@pytest.mark.parametrize("sdk", ["python", "node"])
def test_sdks_do_not_notice_that_an_upstream_fails(
    make_gateway: MakeGateway, upstream: Upstream, sdk: str, status: int
) -> None:
    error = {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}
    with Upstream() as bad:
        bad.script = json_answer(error, status)
        tables = [
            {"name": name, "base_url": each.url, "api_key_env": "", "priority": priority}
            for priority, (name, each) in enumerate((("bad", bad), ("good", upstream)))
        ]
        gateway = make_gateway({"server": {}, "upstreams": tables}).start()
        key = gateway.new_key()
        if sdk == "node":
            said = node(NODE_FAILOVER, gateway.base_url, key)
        else:
            with openai.OpenAI(base_url=gateway.base_url, api_key=key) as client:
                said = [client.responses.create(model="gpt-up", input="x").status]
                list(client.responses.create(model="gpt-up", input="x", stream=True))
                answer = client.chat.completions.create(
                    model="gpt-up", messages=[{"role": "user", "content": "x"}]
                )
                said.append(answer.object)
        assert said == ["completed", "chat.completion"]
        assert len(upstream.requests) == 3
        rows = gateway.rows()
        assert [(row["upstream"], row["outcome"]) for row in rows] == [("good", "completed")] * 3
        assert sum(row["attempts"] for row in rows) == 3 + len(bad.requests)
