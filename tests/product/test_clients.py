"""Real clients: the OpenAI SDKs for Python and Node, Codex CLI, curl, nginx in front."""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from websockets.sync.client import connect

from tests.helpers.codex import BUILT_IN, CALL, MESSAGE, PROVIDER, codex, turn_events
from tests.helpers.gateway import (
    PATIENCE_SECONDS,
    ROOT,
    USUAL,
    Gateway,
    MakeGateway,
    free_port,
    wait_until,
)
from tests.helpers.tools import NODE_MODULES, needs
from tests.helpers.upgrades import UPGRADES
from tests.helpers.upstream import (
    Received,
    Reply,
    Socket,
    Upstream,
    event,
    json_answer,
    response_object,
    stream,
    ws_like_openai,
)

pytestmark = pytest.mark.promise_1


@pytest.fixture
def demo(make_gateway: MakeGateway) -> Gateway:
    return make_gateway().start("--demo")


@pytest.fixture
def sdk(demo: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo.base_url, api_key=demo.new_key(), max_retries=0) as client:
        yield client


HELLO: Any = [{"role": "user", "content": "Hello there, gateway!"}]


def test_python_sdk_chat(sdk: openai.OpenAI, demo: Gateway) -> None:
    whole = sdk.chat.completions.create(model="redbtc-demo", messages=HELLO)
    chunks = list(sdk.chat.completions.create(model="redbtc-demo", messages=HELLO, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert "Hello there, gateway!" in text
    assert all(chunk.choices for chunk in chunks), "no chunk that was not asked for"
    plain, streamed = demo.rows()
    assert whole.usage is not None
    for row in (plain, streamed):
        assert row["outcome"] == "completed"
        assert row["usage_source"] == "upstream"
        assert row["input_tokens"] == whole.usage.prompt_tokens == 5
        assert row["output_tokens"] == whole.usage.completion_tokens
        assert row["model"] == "redbtc-demo"


def test_python_sdk_responses(sdk: openai.OpenAI, demo: Gateway) -> None:
    whole = sdk.responses.create(model="redbtc-demo", input="Hello")
    with sdk.responses.stream(model="redbtc-demo", input="Hello") as events:
        names = [each.type for each in events]
        final = events.get_final_response()
    assert final.output_text == whole.output_text
    assert names[0] == "response.created"
    assert names[-1] == "response.completed"
    assert whole.usage is not None
    assert final.usage is not None
    used = (whole.usage.input_tokens, whole.usage.output_tokens)
    assert used == (final.usage.input_tokens, final.usage.output_tokens)
    assert [(row["input_tokens"], row["output_tokens"]) for row in demo.rows()] == [used, used]
    assert [row["response_id"] for row in demo.rows()] == [whole.id, final.id]


def test_python_sdk_images(sdk: openai.OpenAI, demo: Gateway) -> None:
    image = sdk.images.generate(model="redbtc-demo-image", prompt="a small square")
    edited = sdk.images.edit(
        model="redbtc-demo-image", image=[("a.png", b"\x89PNG")], prompt="a red square"
    )
    assert image.data
    assert edited.data
    assert image.usage is not None
    assert [row["endpoint"] for row in demo.rows()] == [
        "/v1/images/generations",
        "/v1/images/edits",
    ]
    assert demo.rows()[0]["output_tokens"] == image.usage.output_tokens
    assert {row["requested_model"] for row in demo.rows()} == {"redbtc-demo-image"}


def test_python_sdk_models_and_errors(sdk: openai.OpenAI, demo: Gateway) -> None:
    assert [model.id for model in sdk.models.list()] == ["redbtc-demo", "redbtc-demo-image"]
    assert sdk.models.retrieve("redbtc-demo").owned_by == "redbtc"
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="sk-no").models.list()
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.responses.create(model="redbtc-demo", input="x", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        sdk.files.list()
    demo.api("PATCH", "/accounts/test", {"requests_per_minute": 1})
    sdk.responses.create(model="redbtc-demo", input="x")
    with pytest.raises(openai.RateLimitError):
        sdk.responses.create(model="redbtc-demo", input="x")


NODE_SCRIPT = """
import OpenAI, { toFile } from 'openai';
const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3], maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hello there, gateway!' }];
const whole = await client.chat.completions.create({ model: 'redbtc-demo', messages });
let text = '';
for await (const chunk of await client.chat.completions.create(
  { model: 'redbtc-demo', messages, stream: true })) text += chunk.choices[0].delta.content ?? '';
const streamed = client.responses.stream({ model: 'redbtc-demo', input: 'Hello' });
const final = await streamed.finalResponse();
const image = await client.images.edit({ model: 'redbtc-demo-image', prompt: 'a square',
  image: await toFile(Buffer.alloc(100000, 'model'), 'a.png', { type: 'image/png' }) });
let status = 0;
try { await client.files.list(); } catch (error) { status = error.status; }
console.log(JSON.stringify({ same: text === whole.choices[0].message.content,
  chat: whole.usage, response: final.usage, image: image.usage, status }));
"""


def test_node_sdk(demo: Gateway, tmp_path: Path) -> None:
    node = needs("node")
    if not (NODE_MODULES / "openai").exists():
        needs("the openai package from npm")
    script = NODE_MODULES / "turn.mjs"
    script.write_text(NODE_SCRIPT)
    done = subprocess.run(
        [node, script, demo.base_url, demo.new_key()],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["same"]
    assert said["status"] == 404
    rows = demo.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 4
    assert rows[0]["input_tokens"] == rows[1]["input_tokens"] == said["chat"]["prompt_tokens"]
    assert rows[2]["output_tokens"] == said["response"]["output_tokens"]
    assert rows[3]["output_tokens"] == said["image"]["output_tokens"]
    assert rows[3]["requested_model"] == "redbtc-demo-image", "found after the file"


def snippets(gateway: Gateway, models: str) -> dict[str, str]:
    """What the dashboard shows with a new key that is limited to these models."""
    if not gateway.api("GET", "/accounts")["accounts"]:
        gateway.api("POST", "/accounts", {"name": "a"})
        gateway.api("POST", "/users", {"email": "ada@example.com", "account": "a"})
    user = gateway.api("POST", "/users/ada@example.com/reset")
    password = {"password": (words := "seven purple teapots whisper"), "again": words}
    with httpx2.Client(headers={"origin": gateway.url}, **USUAL) as client:
        assert client.post(user["link"], data=password).status_code == 303
        page = f"{gateway.url}/dashboard/accounts/{user['account_id']}/keys"
        made = client.post(page, data={"do": "add", "models": models}).text
    return {name: html.unescape(text) for name, text in SNIPPET.findall(made)}


SNIPPET = re.compile(r'<code id="(curl|python|node|codex|secret)">(.*?)</code>', re.DOTALL)


HOSTILE = """x';touch pwned;'"$(touch pwned)\\"""


def test_snippets_name_a_model_that_is_served(make_gateway: MakeGateway) -> None:
    billing = '[billing]\nunpriced_models = "refuse"\n'
    gateway = make_gateway(
        billing, upstream_settings='models = ["llama*", "qwen-x", "gpt*"]'
    ).start()
    gateway.cli("price", "add", "llama-3*", "--input", "1", "--output", "1")
    for models, model in (
        ("", "llama-3"),
        ("gpt-5.4*", "gpt-5.4-mini"),  # not served, but allowed
        ("qwen-*", "qwen-"),
        ("qwen-x,a*b,[a]", "qwen-x"),
        ("l*3*,a", "llama-3"),
        ("a*b", "llama-3"),  # no name can be told from that
    ):
        assert f'"model":"{model}"' in snippets(gateway, models)["curl"], models


@pytest.mark.parametrize("models", ["", "gpt-5.4*,codex*", "codex-x", HOSTILE])
def test_the_dashboard_s_snippets_run_as_they_stand(
    make_gateway: MakeGateway, tmp_path: Path, models: str
) -> None:
    node, shell = needs("node"), needs("bash")
    needs("curl")
    gateway = make_gateway().start("--demo")
    gateway.cli("price", "add", "*", "--input", "1", "--output", "1")
    gateway.cli("price", "add", "gpt-5.4-nano", "--input", "1", "--output", "1")
    shown = snippets(gateway, models)
    model = {"": "redbtc-demo", "gpt-5.4*,codex*": "gpt-5.4-nano"}.get(models, models)
    script = NODE_MODULES / f"snippet-{os.getpid()}.mjs"
    script.write_text(shown["node"])
    try:
        for command in (
            [shell, "-c", f"{shown['curl']} --fail"],
            [sys.executable, "-c", shown["python"]],
            [node, str(script)],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
            assert "a canned answer" in done.stdout
    finally:
        script.unlink()
    assert [row["requested_model"] for row in gateway.rows()] == [model] * 3
    assert not (tmp_path / "pwned").exists()
    assert tomllib.loads(shown["codex"])["model"] == model
    if not models:
        said = codex(gateway, shown["secret"], tmp_path / "codex", "hello", shown["codex"])
        assert said[-1]["type"] == "turn.completed"
        assert gateway.rows()[-1]["requested_model"] == model


def test_codex_cli_turn_over_a_websocket(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    """Its built-in provider, with nothing set but its address: a prewarm, a tool, an answer."""

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            answered = "from-the-tool" in json.dumps(frame["input"])
            item = MESSAGE if answered else CALL
            number = len(upstream.sockets) * 100 + len(sock.frames)
            prewarm = frame.get("generate") is False
            await sock.send(*turn_events(number, None if prewarm else item))

    upstream.talk = talk
    said = codex(gateway, key, tmp_path / "codex", "use a tool", BUILT_IN)
    (used,) = [line["usage"] for line in said if line["type"] == "turn.completed"]
    frames = [frame for sock in upstream.sockets for frame in sock.frames]
    assert {frame["type"] for frame in frames} == {"response.create"}
    assert not [request for request in upstream.requests if request.method == "POST"]
    rows = gateway.rows()
    assert len(rows) == len(frames) >= 2
    assert [row["outcome"] for row in rows] == ["completed"] * len(rows)
    turns = [
        row for row, frame in zip(rows, frames, strict=True) if frame.get("generate") is not False
    ]
    assert used["input_tokens"] == sum(row["input_tokens"] for row in turns)
    assert used["output_tokens"] == sum(row["output_tokens"] for row in turns)
    assert any("previous_response_id" in frame for frame in frames)


class Organization:
    """An upstream that has a task of several tool calls done. What it has encrypted, it alone can
    read. It answers its requests of the numbers `limited` with 429."""

    def __init__(self, name: str, upstream: Upstream, limited: tuple[int, ...] = ()) -> None:
        self.name = name
        self.limited = limited
        self.served: list[bool] = []  # for each request, whether it was served
        self.unread = 0  # requests with content that another organization has encrypted
        upstream.script, upstream.talk = self.script, self.talk

    def answer(self, items: list[dict[str, Any]], calls: int) -> list[dict[str, Any]] | int:
        """Return the events of the answer, or the status of an error."""
        self.served.append(False)
        number = len(self.served)
        if number in self.limited:
            return 429
        sealed = [item["encrypted_content"] for item in items if item["type"] == "reasoning"]
        if any(not each.startswith(self.name) for each in sealed):
            self.unread += 1
            return 400
        self.served[-1] = True
        suffix = f"{self.name}_{number}"
        thought = {"id": f"rs_{suffix}", "type": "reasoning", "summary": []}
        thought["encrypted_content"] = f"{self.name} {number}"
        call = {**CALL, "id": f"fc_{suffix}", "call_id": f"call_{suffix}"}
        message = {**MESSAGE, "id": f"msg_{suffix}"}
        return task_events(suffix, [thought, call if calls < TASK_CALLS else message])

    async def script(self, request: Received, reply: Reply) -> None:
        if request.header("upgrade"):
            await json_answer({"error": {"code": "no_websocket"}}, 426)(request, reply)
            return
        items = request.json()["input"]
        found = self.answer(items, calls_in(items))
        if isinstance(found, int):
            await json_answer({"error": ERRORS[found]}, found, RETRY_SOON)(request, reply)
        else:
            await stream([event(each, str(each["type"])) for each in found])(request, reply)

    async def talk(self, sock: Socket) -> None:
        known: dict[str | None, int] = {None: 0}  # tool calls before the end of each response
        while True:
            frame = await sock.recv()
            before = frame.get("previous_response_id")
            if before not in known:
                error = {"code": "previous_response_not_found", "message": "Not found."}
                await sock.send({"type": "error", "status": 400, "error": error})
            elif frame.get("generate") is False:
                events = task_events(f"warm_{self.name}_{len(sock.frames)}", [])
                known[events[-1]["response"]["id"]] = 0
                await sock.send(*events)
            else:
                calls = known[before] + calls_in(frame["input"])
                found = self.answer(frame["input"], calls)
                if isinstance(found, int):
                    failed = {"type": "error", "status": found, "error": ERRORS[found]}
                    await sock.send({**failed, "headers": RETRY_SOON})
                else:
                    known[found[-1]["response"]["id"]] = calls
                    await sock.send(*found)


TASK_CALLS = 4
UNREADABLE = "invalid_encrypted_content"
RETRY_SOON = {"retry-after": "1"}
ERRORS = {
    429: {"code": "rate_limit_exceeded", "type": "tokens", "message": "Try again in 1s."},
    400: {"code": UNREADABLE, "type": "invalid_request_error", "message": "It can't be read."},
}


def calls_in(items: list[dict[str, Any]]) -> int:
    return sum(item["type"] == "function_call_output" for item in items)


def task_events(suffix: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of a response with these output items."""
    used = {
        "input_tokens": 1000 if items else 0,
        "input_tokens_details": {"cached_tokens": 10 if items else 0},
        "output_tokens": 20 if items else 0,
        "output_tokens_details": {"reasoning_tokens": 8 if items else 0},
        "total_tokens": 0,
    }
    last = response_object("gpt-5.5", used, id=f"resp_{suffix}", output=items)
    begun = response_object("gpt-5.5", None, "in_progress", id=last["id"], output=[])
    middle = [
        {"type": f"response.output_item.{step}", "output_index": index, "item": item}
        for index, item in enumerate(items)
        for step in ("added", "done")
    ]
    return [
        {"type": "response.created", "response": begun},
        *middle,
        {"type": "response.completed", "response": last},
    ]


@pytest.mark.parametrize("organization", ["", "ours"], ids=["two organizations", "one"])
@pytest.mark.parametrize("limited", [(1,), (3,), (1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("websocket", [True, False], ids=["websocket", "http"])
def test_codex_cli_survives_its_upstreams_429(
    make_gateway: MakeGateway,
    upstream: Upstream,
    tmp_path: Path,
    websocket: bool,
    limited: tuple[int, ...],
    organization: str,
) -> None:
    """Whichever request of the task is limited, the task goes on, and Codex CLI is never told that
    an organization can't read what another one has encrypted."""
    with Upstream() as other:
        tables = [
            {
                "name": name,
                "base_url": url,
                "api_key_env": "TEST_UPSTREAM_KEY",
                "priority": number,
                "websocket": websocket,
                "organization": organization,
            }
            for number, (name, url) in enumerate([("one", upstream.url), ("two", other.url)])
        ]
        gateway = make_gateway({"server": {}, "upstreams": tables}).start()
        name = organization or "one"
        one = Organization(name, upstream, limited)
        two = Organization(organization or "two", other)
        settings = BUILT_IN if websocket else PROVIDER
        said = codex(gateway, gateway.new_key(), tmp_path / "codex", "use a tool", settings)
    assert said[-1]["type"] == "turn.completed", said
    answers = [line["item"]["text"] for line in said if line.get("item", {}).get("text")]
    assert answers == ["All done."]
    rows = [row for row in gateway.rows() if row["outcome"] == "completed"]
    assert sum(row["output_tokens"] > 0 for row in rows) == TASK_CALLS + 1
    assert not all(one.served)
    assert one.unread == 0
    assert two.unread == 0 or not organization
    assert UNREADABLE not in {row["upstream_error_code"] for row in gateway.rows()}
    used = said[-1]["usage"]
    assert used["input_tokens"] == sum(row["input_tokens"] for row in rows)
    assert used["output_tokens"] == sum(row["output_tokens"] for row in rows)


def test_codex_cli_falls_back_at_once(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path
) -> None:
    gateway = make_gateway("", "websocket = false").start()

    async def script(request: Received, reply: Reply) -> None:
        events = turn_events(1, MESSAGE)
        await stream([event(each, str(each["type"])) for each in events])(request, reply)

    upstream.script = script
    said = codex(gateway, gateway.new_key(), tmp_path / "codex", "hello", BUILT_IN)
    assert gateway.metrics()['redbtc_refusals_total{code="upgrade_required"}'] == 1
    assert said[-1]["type"] == "turn.completed"
    assert [row["outcome"] for row in gateway.rows()] == ["completed"]


def test_codex_cli_turn_with_a_tool_call(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path
) -> None:
    """Its own sum of what the turn used is the ledger's."""

    async def script(request: Received, reply: Reply) -> None:
        items = request.json()["input"]
        answered = any(item.get("type") == "function_call_output" for item in items)
        item = MESSAGE if answered else CALL
        used = {
            "input_tokens": 1200 if answered else 1000,
            "input_tokens_details": {"cached_tokens": 1024 if answered else 0},
            "output_tokens": 30 if answered else 20,
            "output_tokens_details": {"reasoning_tokens": 8},
            "total_tokens": 0,
        }
        last = response_object("gpt-5.5", used, id=f"resp_{len(items)}", output=[item])
        begun = response_object("gpt-5.5", None, "in_progress", id=last["id"], output=[])
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": last},
        ]
        await stream([event(each, each["type"]) for each in events], 0.01)(request, reply)

    upstream.script = script
    said = codex(gateway, key, tmp_path / "codex", "use a tool")
    (used,) = [line["usage"] for line in said if line["type"] == "turn.completed"]
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * len(rows)
    assert len(rows) == 2
    for theirs, ours in {
        "input_tokens": "input_tokens",
        "cached_input_tokens": "cached_input_tokens",
        "output_tokens": "output_tokens",
        "reasoning_output_tokens": "reasoning_tokens",
    }.items():
        assert used[theirs] == sum(row[ours] for row in rows), theirs
    assert b"from-the-tool" in upstream.requests[-1].body
    received = upstream.requests[0]
    assert received.header("originator") == "codex_exec"
    assert received.header("x-codex-turn-metadata")


def test_codex_cli_waits_for_a_rate_limit(gateway: Gateway, tmp_path: Path) -> None:
    """It gives up on a 429 without whole seconds of retry-after."""
    key = gateway.new_key(requests_per_minute=60)
    refusals = 'redbtc_refusals_total{code="rate_limit_exceeded"}'

    def refused() -> int:
        """Use up the rate. Return how many requests of this test have been refused."""
        with gateway.client(key) as client:
            while client.post("/responses", json={"model": "m", "input": "x"}).status_code != 429:
                pass
        return 1

    def leave_nothing(own: int) -> None:
        """Wait until Codex CLI has been refused as well."""
        while gateway.metrics()[refusals] == own:
            own += refused()

    with ThreadPoolExecutor(1) as pool:
        leaving_nothing = pool.submit(leave_nothing, refused())
        said = codex(gateway, key, tmp_path / "codex", "hello")
        leaving_nothing.result()
    assert said[-1]["type"] == "turn.completed"


NGINX = """
daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off; client_max_body_size 100m;
  client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4;
  scgi_temp_path t5;
  {maps}
  upstream gateway {{ server 127.0.0.1:{gateway}; keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    location = /metrics {{ return 404; }}
    location / {{
      proxy_pass http://gateway;
      proxy_http_version 1.1;
      proxy_set_header Upgrade {upgrade};
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_buffering off;
      proxy_request_buffering {buffering};
      proxy_read_timeout 3600s;
      proxy_send_timeout 3600s;
    }}
  }}
}}
"""


MAPS = """
map $http_upgrade $websocket { default ""; "~*^websocket$" websocket; }
map $websocket $connection_upgrade { default ""; websocket upgrade; }
"""
EVERY_UPGRADE = 'map $http_upgrade $connection_upgrade { default upgrade; "" ""; }'


@contextlib.contextmanager
def nginx(
    gateway: Gateway, folder: Path, buffering: str = "off", every_upgrade: bool = False
) -> Iterator[int]:
    """Run nginx with what deploy/nginx.conf says of upgrades and buffers, or with the common
    configuration that forwards every Upgrade header. Yield its port."""
    port = free_port()
    folder.mkdir()
    maps, upgrade = (EVERY_UPGRADE, "$http_upgrade") if every_upgrade else (MAPS, "$websocket")
    (folder / "nginx.conf").write_text(
        NGINX.format(
            gateway=gateway.port, port=port, buffering=buffering, maps=maps, upgrade=upgrade
        )
    )
    process = subprocess.Popen(
        [needs("nginx"), "-p", folder, "-c", "nginx.conf"], stderr=subprocess.DEVNULL
    )

    def up() -> bool:
        try:
            url = f"http://127.0.0.1:{port}/healthz"
            return httpx2.get(url, **USUAL).status_code == 200
        except httpx2.HTTPError:
            return False

    try:
        wait_until(up)
        yield port
    finally:
        process.terminate()
        process.wait()


def exchange(port: int, parts: list[bytes], gateway: Gateway) -> bytes:
    """Send parts, with time for the gateway to handle each before the next. Return what has arrived
    once a response is whole."""
    with socket.create_connection(("127.0.0.1", port), timeout=100) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            sock.sendall(part)
            gateway.get("/healthz")
        answer = b""
        while not (match := re.search(rb"(?is)content-length: *(\d+).*?\r\n\r\n(.*)", answer)) or (
            len(match[2]) < int(match[1])
        ):
            part = sock.recv(65536)
            if not part:
                break
            answer += part
    return answer


@pytest.mark.parametrize("way", ["direct", "off", "on", "on, every upgrade", "off, every upgrade"])
def test_nobody_gets_the_answer_to_a_smuggled_request(
    gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path, way: str
) -> None:
    """Send an Upgrade that is not taken, with its body in a later packet, then another client's
    request over nginx's pooled connections. Each gets its own response."""
    smuggled = b"GET /v1/models/of-the-attacker HTTP/1.1\r\nHost: g\r\n\r\n"
    upstream.script = json_answer(response_object())
    mine = (
        b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\n"
        b"Content-Type: application/json\r\n" % key.encode()
    )
    good = b'{"model":"m","input":"x"}'
    with contextlib.ExitStack() as stack:
        port = gateway.port
        if way != "direct":
            buffering = way.partition(",")[0]
            every = way.endswith("every upgrade")
            port = stack.enter_context(nginx(gateway, tmp_path / "nginx", buffering, every))
        for number, upgrade in enumerate(UPGRADES.values()):
            if upgrade.startswith(b"Sec-WebSocket") and b"13" in upgrade:
                continue  # is taken
            head = b"POST /v1/responses HTTP/1.1\r\nHost: a\r\n%s\r\n" % upgrade
            head += b"Content-Length: %d\r\n\r\n" % len(smuggled)
            cut = (0, 1, 5, 30)[number % 4]
            first = exchange(port, [head, smuggled[:cut], smuggled[cut:]], gateway)
            assert first.count(b"HTTP/1.1 ") == 1
            assert b" 401 " in first or b" 400 " in first
            for _ in range(3):
                honest = mine + b"Content-Length: %d\r\n\r\n" % len(good)
                answer = exchange(port, [honest, good], gateway)
                assert answer.startswith(b"HTTP/1.1 200 "), answer
                assert b"attacker" not in answer
            served = mine + upgrade + b"\r\nContent-Length: %d\r\n\r\n" % len(good)
            answer = exchange(port, [served, good[:3], good[3:]], gateway)
            two = upgrade.count(b"Upgrade: ") > 1  # nginx refuses that
            assert answer.startswith(b"HTTP/1.1 200 ") or two, (upgrade, answer)


METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "PROPFIND")
PATHS = (
    "/healthz",
    "/metrics",
    "/status",
    "/v1/models",
    "/v1/models/m",
    "/v1/responses",
    "/nothing",
    "/v1/chat/completions",
    "/v1/responses/resp_x",
    "/v1/images/edits",
    "/v1/responses/r/cancel",
    "/admin/v1/me",
    "/admin/v1/accounts",
    "/dashboard/",
    "/dashboard/login",
    "/v1/alpha/search",
)


def test_no_route_takes_the_body_of_an_upgrade_for_a_request(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    """Whatever a request is for, its body is not the next request; the next one is answered, or
    the connection has been closed."""
    upstream.script = json_answer(response_object())
    body = b"GET /v1/models/of-the-attacker HTTP/1.1\r\nHost: g\r\n\r\n"
    forms = [form for form in UPGRADES.values() if b"13" not in form]
    for number, (method, path) in enumerate(itertools.product(METHODS, PATHS)):
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n".encode()
        head += forms[number % len(forms)] + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
        last = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        answer = b""
        with gateway.connect() as sock, contextlib.suppress(ConnectionError):
            for part in (head, body[: number % len(body)], body[number % len(body) :] + last):
                sock.sendall(part)
                gateway.get("/healthz")
            while part := sock.recv(65536):
                answer += part
        assert answer.count(b"HTTP/1.1 ") in (1, 2), (method, path)
        assert answer.count(b"x-redbtc-request-id") in (1, 2), (method, path)
        assert b"attacker" not in answer, (method, path)
    assert not any("attacker" in request.path for request in upstream.requests)


def test_nginx_in_front(gateway: Gateway, upstream: Upstream, key: str, tmp_path: Path) -> None:
    arrived = threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(b'data: {"type":"response.created"}\n\n')
        await reply.wait(arrived)
        await reply.send(b'data: {"type":"response.completed"}\n\n')
        await reply.end()

    with nginx(gateway, tmp_path / "nginx") as port:
        url = f"http://127.0.0.1:{port}"
        upstream.script = script
        headers = {"authorization": f"Bearer {key}"}
        body = {"model": "m", "input": "x", "stream": True}
        with httpx2.stream(
            "POST", f"{url}/v1/responses", json=body, headers=headers, **USUAL
        ) as answer:
            parts = answer.iter_raw()
            assert b"created" in next(parts), "the first event passes at once"
            arrived.set()
            assert b"completed" in b"".join(parts)
        assert gateway.row()["outcome"] == "completed"
        upstream.script = json_answer(response_object())
        for _ in range(100):
            answer = httpx2.post(
                f"{url}/v1/responses",
                json={"model": "m", "input": "x"},
                headers=headers,
                **USUAL,
            )
            assert answer.status_code == 200
        assert httpx2.get(f"{url}/metrics", **USUAL).status_code == 404
        upstream.talk = ws_like_openai
        socket_url = f"ws://127.0.0.1:{port}/v1/responses"
        with connect(socket_url, additional_headers=headers, proxy=None) as client:
            client.send(json.dumps({"type": "response.create", "model": "m", "input": "x"}))
            events = [json.loads(client.recv()) for _ in range(3)]
        assert events[-1]["type"] == "response.completed"
        assert gateway.rows()[-1]["response_id"] == "resp_ws_1"


def test_the_first_run_prints_curl_commands_that_answer(make_gateway: MakeGateway) -> None:
    """What `make run` starts: the printed commands, plain and streamed, pasted into a shell."""
    needs("curl")
    gateway = make_gateway().start("--demo", "--first-run")
    wait_until(lambda: gateway.log().count("curl ") == 2)
    assert f"Base URL   {gateway.base_url}" in gateway.log()
    plain, streamed = re.findall(r"^curl .*$", gateway.log(), re.MULTILINE)
    for command, mark in ((plain, '"usage"'), (streamed, "data: [DONE]")):
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, done.stderr
        assert mark in done.stdout
        assert "Say" in done.stdout
    assert [row["account"] for row in gateway.rows()] == ["first", "first"]
    assert gateway.terminate() == 0
    before = len(gateway.log())
    gateway.start("--demo", "--first-run")
    wait_until(lambda: "Base URL" in gateway.log()[before:])
    assert "sk-redbtc-" not in gateway.log()[before:], "a key is shown once"


def test_each_start_prints_a_link_until_an_operator_has_a_password(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    words = "seven purple teapots whisper"

    def start() -> str:
        """Where the dashboard is, as this start says."""
        before = len(gateway.log())
        gateway.start()
        wait_until(lambda: "Dashboard  " in gateway.log()[before:])
        said = re.search(r"^Dashboard  (\S+)", gateway.log()[before:], re.MULTILINE)
        assert said, gateway.log()
        return said[1]

    first = start()
    gateway.terminate()
    second = start()
    statuses = [gateway.get(urlsplit(link).path).status_code for link in (first, second)]
    assert statuses == [404, 200]
    gateway.terminate()
    gateway.cli("user", "add", "ada@example.com", "--operator")
    third = start()
    headers, password = {"origin": gateway.url}, {"password": words, "again": words}
    with httpx2.Client(headers=headers, **USUAL) as client:
        assert client.post(f"{gateway.url}{urlsplit(third).path}", data=password).is_redirect
    gateway.terminate()
    assert start() == f"{gateway.url}/dashboard/"
    gateway.terminate()
    gateway.configure('[server]\npublic_url = "https://ai.example.com/"')
    assert start() == "https://ai.example.com/dashboard/"
    gateway.configure()
    gateway.cli("user", "remove", "operator@localhost")
    gateway.terminate()
    assert start() == f"{gateway.url}/dashboard/"  # ada has a link of her own


def test_make_lists_its_targets() -> None:
    done = subprocess.run([needs("make")], cwd=ROOT, capture_output=True, text=True)
    for target in ("run", "test", "lint", "bench", "clean"):
        assert f"make {target}" in done.stdout
