"""Codex CLI itself, the newest version and an earlier one: its catalogue, compaction and tools."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redbtc.codex.catalog import CatalogError, parse_catalog
from redbtc.codex.config_toml import BUILT_IN_MODELS
from redbtc.codex.model_info import KNOWN_VALUES, AutoReview, ModelInfo, Permissions
from tests.helpers.codex import (
    CALL,
    MESSAGE,
    NEWEST,
    PINNED,
    catalog_entry,
    catalog_text,
    chatgpt_tokens,
    codex,
    codex_program,
    run_codex,
    turn_events,
)
from tests.helpers.gateway import Gateway, MakeGateway
from tests.helpers.upstream import (
    IMAGE_USAGE,
    Received,
    Reply,
    Socket,
    Upstream,
    event,
    images_json,
    json_answer,
    openai_like,
    stream,
    ws_like_openai,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_2]
both_versions = pytest.mark.parametrize("version", [NEWEST, PINNED])
PRICES = '[codex]\ncatalog = "codex-models.json"\n[billing]\nunpriced_models = "refuse"\n'
NO_WEBSOCKET = "websocket = false"


async def answer(request: Received, reply: Reply, item: dict[str, Any], total: int = 0) -> None:
    """Answer with a response that has this item, and `total` tokens in all."""
    events = turn_events(total, item)
    used = events[-1]["response"]["usage"]
    used["total_tokens"] = used["input_tokens"] + used["output_tokens"]
    await stream([event(each, each["type"]) for each in events])(request, reply)


def says(item: dict[str, Any] = MESSAGE) -> Any:
    async def script(request: Received, reply: Reply) -> None:
        if request.method == "POST":
            await answer(request, reply, item)
        else:
            await openai_like(request, reply)

    return script


def tools_of(request: Received) -> set[str]:
    return {tool.get("name", tool["type"]) for tool in request.json()["tools"]}


def requests_for_models(gateway: Gateway) -> float:
    """Return how often the gateway was asked for models or the catalogue."""
    return sum(
        number
        for name, number in gateway.metrics().items()
        if name.startswith("redbtc_requests_total") and 'route="/v1/models"' in name
    )


def used_by(said: list[dict[str, Any]]) -> dict[str, int]:
    (used,) = [line["usage"] for line in said if line["type"] == "turn.completed"]
    return dict(used)


def assert_metered(gateway: Gateway, said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check that Codex reports what the ledger has, and return the rows."""
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * len(rows)
    for name in ("input_tokens", "output_tokens"):
        assert used_by(said)[name] == sum(
            row[name] for row in rows if row["endpoint"] == "/v1/responses"
        )
    return rows


# The catalogue


@pytest.fixture
def catalogued(make_gateway: MakeGateway, upstream: Upstream) -> Gateway:
    """A gateway with the catalogue of the installed Codex, and prices of some of its models."""
    gateway = make_gateway(PRICES, upstream_settings=NO_WEBSOCKET)
    made = gateway.cli("codex", "catalog", "--codex", codex_program())
    assert made["file"] == str(gateway.folder / "codex-models.json")
    gateway.cli("price", "add", "gpt-5.5", "--input", "1", "--output", "1")
    gateway.cli("price", "add", "gpt-6*", "--input", "1", "--output", "1")
    checked = gateway.cli("check")
    assert checked["ok"]
    (note,) = [note for note in checked["notes"] if note.startswith("codex.catalog: ")]
    assert "codex-auto-review" in note
    assert "gpt-5.5" not in note.partition(":")[2]
    upstream.script = says()
    return gateway.start()


@both_versions
def test_codex_uses_the_catalogue_that_its_key_gets(
    catalogued: Gateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    gateway, key, home = catalogued, catalogued.new_key(), tmp_path / "codex"
    gateway.api("POST", "/accounts/test/keys", {"label": "some", "models": ["gpt-5.5"]})
    some = gateway.api("POST", "/accounts/test/keys", {"models": ["gpt-5.5"]})["key"]
    config = gateway.cli("codex", "config", "--key", "some")["config"]
    assert tomllib.loads(config)["model"] == "gpt-5.5"
    for each in (key, key, some):
        before = requests_for_models(gateway)
        said = codex(gateway, each, home, "hello", config, version=version)
        assert {"apply_patch", "tool_search"} <= tools_of(upstream.requests[-1])
        assert requests_for_models(gateway) == before + 1, "not again after the response"
        cached = json.loads((home / "models_cache.json").read_text())
        with gateway.client(each) as client:
            mine = client.get(f"/models?client_version={version}", headers={})
        assert cached["etag"] == mine.headers["etag"]
        listed = [model["slug"] for model in cached["models"]]
        assert listed == [model["slug"] for model in mine.json()["models"]]
        assert listed == ["gpt-5.5"] if each == some else "gpt-6.1-sol" in listed
        assert not {"codex-auto-review", "gpt-5.6-sol"} & {*listed}, "they have no price"
        assert not any("error" in line["type"] for line in said)
    assert {request.path for request in upstream.requests} == {"/v1/responses"}
    assert_paid(gateway)


def assert_paid(gateway: Gateway) -> None:
    assert all(float(row["cost"]) > 0 for row in gateway.rows())


def test_codex_asks_again_when_the_catalogue_changes(
    catalogued: Gateway, upstream: Upstream, tmp_path: Path
) -> None:
    """A price that is added during a turn is in the catalogue after it."""
    gateway, home = catalogued, tmp_path / "codex"

    async def script(request: Received, reply: Reply) -> None:
        new = {"model": "gpt-5.6*", "input": "1", "output": "1"}
        gateway.api("POST", "/prices", {"prices": [new]})
        await answer(request, reply, MESSAGE)

    upstream.script = script
    config = gateway.cli("codex", "config")["config"]
    codex(gateway, gateway.new_key(), home, "hello", config)
    assert requests_for_models(gateway) == 2
    cached = json.loads((home / "models_cache.json").read_text())
    assert "gpt-5.6-sol" in [model["slug"] for model in cached["models"]]


@both_versions
def test_codex_uses_its_own_catalogue_unless_it_is_told_of_one(
    gateway: Gateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    """With a model_catalog_url that has none, it knows nothing of its model, and offers fewer
    tools. So `codex config` names the URL only if the gateway has a catalogue."""
    upstream.script = says()
    key, config = gateway.new_key(), gateway.cli("codex", "config")["config"]
    assert "model_catalog_url" not in tomllib.loads(config)["model_providers"]["redbtc"]
    config = config.replace("gpt-6.1-sol", "gpt-5.5").replace(
        "websockets = true", "websockets = false"
    )
    codex(gateway, key, tmp_path / "codex", "hello", config, version=version)
    assert requests_for_models(gateway) == 0
    assert {"apply_patch", "tool_search"} <= tools_of(upstream.requests[-1])
    config += f'model_catalog_url = "{gateway.base_url}/models"\n'
    codex(gateway, key, tmp_path / "codex", "hello", config, version=version)
    assert requests_for_models(gateway) > 0
    assert not {"apply_patch", "tool_search"} & tools_of(upstream.requests[-1])
    own = run_codex(tmp_path / "codex", "debug", "models", "--bundled", version=version).stdout
    listed = {each["slug"] for each in json.loads(own)["models"] if each["visibility"] == "list"}
    assert {*BUILT_IN_MODELS} <= listed


def variants() -> Iterator[dict[str, Any]]:
    """Yield entries of a catalogue with one field left out, or with another type or value."""
    whole = catalog_entry(
        "m",
        service_tiers=[{"id": "priority", "name": "Fast", "description": "Faster"}],
        upgrade={"model": "n", "migration_markdown": "Use it."},
        availability_nux={"message": "New."},
        context_window=1,
        effective_context_window_percent=95,
    )
    yield whole
    for name in ModelInfo.__struct_fields__:
        values: list[Any] = [None, 5, True, "text", [], [5]]
        if type(whole.get(name)) is int:
            values += [1.5, *INT_LIMITS]
        if name in ("availability_nux", "upgrade", "available_access_programs"):
            values = values[:4]  # Codex takes arrays for objects, which nobody writes
        yield {key: value for key, value in whole.items() if key != name}
        yield from ({**whole, name: value} for value in values)
    for name in ("supported_reasoning_levels", "service_tiers", "truncation_policy", "upgrade"):
        inner = whole[name][0] if isinstance(whole[name], list) else whole[name]
        for field in inner:
            less = {key: value for key, value in inner.items() if key != field}
            for changed in (less, {**less, field: None}, {**less, field: 5}):
                yield {**whole, name: [changed] if isinstance(whole[name], list) else changed}
    for level in ("", "x"):
        yield {**whole, "default_reasoning_level": level}
        yield {**whole, "supported_reasoning_levels": [{"effort": level, "description": ""}]}
    template = {"instructions_template": "Be long."}
    yield {**whole, "base_instructions": None, "model_messages": template}
    for messages in varied(MESSAGES):
        yield {**whole, "model_messages": {**template, **messages}}
    for path, known in KNOWN_VALUES.items():
        name, _, field = path.partition(".")
        for value in known:
            if field:
                yield {**whole, name: {**whole[name], field: value}}
            else:
                yield {**whole, name: [value] if name == "input_modalities" else value}


MESSAGES: dict[str, Any] = {
    **dict.fromkeys(("persistent_instructions", "content_filter_guidance"), "a"),
    "approvals": dict.fromkeys(
        ("on_request", "on_request_auto_review", "never", "unless_trusted", "auto_review_suffix"),
        "a",
    ),
    "collaboration_modes": {"default": "a", "plan": "b"},
    "auto_review": dict.fromkeys(AutoReview.__struct_fields__, "a"),
    "permissions": dict.fromkeys(Permissions.__struct_fields__, "a"),
    "multi_agent": {"role": {"root": "a", "subagent": "b"}, "mode": {}},
    "token_budget": {
        "enabled": True,
        "use_history_notes_extension": False,
        "reminder_threshold_tokens": 5,
        "reminder_message_template": "a",
        "guidance_message": "b",
        "auto_compact_fallback_prompt": "c",
        "auto_compact_fallback_buffer_tokens": 6,
    },
    "guardian_v2": {"classifier_instructions": "a", "max_tool_call_lag": 5, "transcript": {}},
    "confirmation_policies": {"browser_use": "a", "computer_use": "b"},
    "tools": {"history": {}, "mcp_resources": {}, "send_user_message_async": {}},
}


def varied(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an object with one field, at any depth, left out or with another type."""
    yield whole
    for name, value in whole.items():
        yield {key: each for key, each in whole.items() if key != name}
        yield from ({**whole, name: other} for other in (None, 5, -5, True, "text"))
        if isinstance(value, dict):
            yield from ({**whole, name: inner} for inner in varied(value))


INT_LIMITS = [sign * (1 << bits) - less for sign in (1, -1) for bits in (31, 63) for less in (0, 1)]


def read_by_gateway(entry: dict[str, Any]) -> bool:
    """Return whether the gateway takes an entry, and knows no reason why Codex would not."""
    try:
        (model,) = parse_catalog(catalog_text(entry).encode())
    except CatalogError:
        return False
    return not model.unknown


@pytest.mark.slow
@both_versions
def test_a_catalogue_is_valid_if_codex_can_read_it(tmp_path: Path, version: str) -> None:
    file = tmp_path / "models.json"
    setting = f'model_catalog_json="{file}"'

    def read_by_codex(*entries: dict[str, Any]) -> bool:
        file.write_text(catalog_text(*entries))
        done = run_codex(tmp_path, "-c", setting, "debug", "models", version=version)
        return done.returncode == 0

    entries = list(variants())
    taken = [each for each in entries if read_by_gateway(each)]
    assert len(taken) > 100
    assert read_by_codex(*taken)
    refused = [each for each in entries if not read_by_gateway(each)]
    assert len(refused) > 100
    refused = refused if version == NEWEST else refused[:20]  # each takes a process
    assert not [each for each in refused if read_by_codex(each)]


def form(deep: int = 0, more: bytes = b"") -> bytes:
    """A catalogue with a field that nests lists so deep, and with more text."""
    nested = b'"future": %b%b' % (b"[" * deep, b"]" * deep)
    return (
        catalog_text(catalog_entry("m"))
        .encode()
        .replace(b'"slug"', b"%b%b" % (b"%b, " % nested if deep else b"", more) + b'"slug"', 1)
    )


@both_versions
@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        (form(), True),
        (form(124), True),
        (form(125), False),
        (form(more=b'"slug": "n", '), False),
        (form().replace(b'"mode"', b'"mode": "bytes", "mode"', 1), False),
        (form(more=b'"future": "\xff", '), False),
        (form(more=b'"future": "[\\"[%b", ' % (b"[{" * 200)), True),
    ],
)
def test_a_catalogue_has_the_form_that_codex_reads(
    tmp_path: Path, version: str, text: bytes, is_read: bool
) -> None:
    file = tmp_path / "models.json"
    file.write_bytes(text)
    setting = f'model_catalog_json="{file}"'
    done = run_codex(tmp_path, "-c", setting, "debug", "models", version=version)
    assert (done.returncode == 0) == is_read, done.stderr
    try:
        assert parse_catalog(text)
        assert is_read
    except CatalogError:
        assert not is_read


# What the name "OpenAI" switches on


@both_versions
def test_codex_compacts_at_the_upstream(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    gateway = make_gateway(upstream_settings=NO_WEBSOCKET).start()
    sealed = {"id": "cmp_1", "type": "compaction", "encrypted_content": "sealed"}

    async def script(request: Received, reply: Reply) -> None:
        kinds = [item["type"] for item in request.json()["input"]]
        if kinds[-1] == "compaction_trigger":
            await answer(request, reply, sealed, 7)
        elif "compaction" in kinds:
            await answer(request, reply, MESSAGE)
        else:
            await answer(request, reply, CALL, 50_000)

    upstream.script = script
    config = gateway.cli("codex", "config")["config"]
    config = f"model_auto_compact_token_limit = 20000\n{config}".replace("gpt-6.1-sol", "gpt-5.5")
    said = codex(gateway, gateway.new_key(), tmp_path / "codex", "go", config, version=version)
    ends = [request.json()["input"][-1]["type"] for request in upstream.requests]
    assert ends == ["message", "compaction_trigger", "compaction"]
    assert said[-1]["type"] == "turn.completed"
    rows = gateway.rows()
    assert [row["outcome"] for row in rows] == ["completed"] * 3
    assert [row["input_tokens"] for row in rows] == [51_000, 1007, 1000]


@both_versions
def test_codex_doctor_reaches_the_gateway(
    gateway: Gateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    """It asks for HEAD /v1/responses and GET /v1/models without the key, and takes any answer. With
    the key it opens a WebSocket."""
    upstream.talk = ws_like_openai
    (tmp_path / "config.toml").write_text(gateway.cli("codex", "config")["config"])
    key = gateway.new_key()
    done = run_codex(tmp_path, "doctor", "--json", version=version, REDBTC_API_KEY=key)
    checks = {name: each["status"] for name, each in json.loads(done.stdout)["checks"].items()}
    assert checks["network.provider_reachability"] == "ok", done.stdout
    assert checks["network.websocket_reachability"] == "ok", done.stdout
    assert checks["auth.credentials"] == checks["config.load"] == "ok", done.stdout
    assert [request.path for request in upstream.requests] == ["/v1/responses"]
    assert not gateway.rows()


def exec_call(code: str) -> dict[str, Any]:
    """Return the call with which a model in code mode runs JavaScript."""
    call = {"id": "ctc_1", "type": "custom_tool_call", "status": "completed", "call_id": "call_1"}
    return {**call, "name": "exec", "namespace": "functions", "input": code}


def has_output(items: list[dict[str, Any]]) -> bool:
    return any(item["type"] == "custom_tool_call_output" for item in items)


LOGIN = {"auth_mode": "chatgpt", "OPENAI_API_KEY": None, "last_refresh": "2099-01-01T00:00:00Z"}
DRAW = 'text((await tools.image_gen__imagegen({prompt: "a red square"})).image_url);'


@both_versions
def test_codex_makes_images_with_the_gateway_s_key(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    """It offers its image tool only to users who are also logged in to ChatGPT. Their token does
    not come here."""
    gateway = make_gateway(upstream_settings=NO_WEBSOCKET).start()

    async def script(request: Received, reply: Reply) -> None:
        if request.path.startswith("/v1/images"):
            await images_json()(request, reply)
        else:
            drawn = has_output(request.json()["input"])
            await answer(request, reply, MESSAGE if drawn else exec_call(DRAW))

    upstream.script = script
    config = gateway.cli("codex", "config")["config"] + "requires_openai_auth = true\n"
    home = tmp_path / "codex"
    home.mkdir()
    (home / "auth.json").write_text(json.dumps({**LOGIN, "tokens": chatgpt_tokens()}))
    said = codex(gateway, gateway.new_key(), home, "draw", config, version=version)
    rows = assert_metered(gateway, said)
    assert [row["endpoint"] for row in rows] == [
        "/v1/responses",
        "/v1/images/generations",
        "/v1/responses",
    ]
    assert rows[1]["requested_model"] == "gpt-image-2"
    assert rows[1]["output_tokens"] == IMAGE_USAGE["output_tokens"]


@both_versions
def test_codex_lets_agents_work_for_it(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    """Its tools, and the messages of agents to each other, have ids that Codex has chosen."""
    gateway = make_gateway(upstream_settings=NO_WEBSOCKET).start()
    threads: dict[str | None, int] = {}  # by thread, how many requests it has sent
    calls = [
        agent_call("spawn_agent", task_name="sub", message="Do it.", agent_type="default"),
        agent_call("wait_agent", timeout_ms=10_000),
    ]

    async def script(request: Received, reply: Reply) -> None:
        thread = request.header("thread-id")
        threads[thread] = threads.get(thread, 0) + 1
        is_first = thread == next(iter(threads))
        own = [*calls, MESSAGE] if is_first else [MESSAGE]
        await answer(request, reply, own[threads[thread] - 1])

    upstream.script = script
    config = gateway.cli("codex", "config")["config"]
    codex(gateway, gateway.new_key(), tmp_path / "codex", "go", config, version=version)
    kinds = [item["type"] for item in upstream.requests[-1].json()["input"] if "id" in item]
    assert {"additional_tools", "agent_message", "function_call_output"} <= {*kinds}
    assert len(threads) == 2
    assert [row["outcome"] for row in gateway.rows()] == ["completed"] * 4


def agent_call(name: str, **arguments: str | int) -> dict[str, Any]:
    call = {"id": f"fc_{name}", "type": "function_call", "status": "completed"}
    more = {"name": name, "namespace": "collaboration", "arguments": json.dumps(arguments)}
    return {**call, "call_id": f"call_{name}", **more}


SEARCH = 'text(await tools.web__run({search_query: [{q: "weather in Oslo"}]}));'


@both_versions
@pytest.mark.parametrize("websocket", [False, True], ids=["post", "websocket"])
def test_codex_searches_the_web_in_code_mode(
    make_gateway: MakeGateway, upstream: Upstream, tmp_path: Path, version: str, websocket: bool
) -> None:
    """The search is a request of its own, with the key, to /v1/alpha/search."""
    gateway = make_gateway(upstream_settings=f"websocket = {str(websocket).lower()}").start()
    found = {"encrypted_output": None, "output": "It rains in Oslo."}

    def item(given: list[dict[str, Any]]) -> dict[str, Any]:
        return MESSAGE if has_output(given) else exec_call(SEARCH)

    async def script(request: Received, reply: Reply) -> None:
        if request.path == "/v1/alpha/search":
            await json_answer(found)(request, reply)
        else:
            await answer(request, reply, item(request.json()["input"]))

    async def talk(sock: Socket) -> None:
        while True:
            frame = await sock.recv()
            prewarm = frame.get("generate") is False
            events = turn_events(len(sock.frames), None if prewarm else item(frame["input"]))
            if prewarm:  # Codex does not count what that has used
                events[-1]["response"]["usage"] |= {"input_tokens": 0}
            await sock.send(*events)

    upstream.script, upstream.talk = script, talk if websocket else None
    config = gateway.cli("codex", "config")["config"]
    said = codex(gateway, gateway.new_key(), tmp_path / "codex", "search", config, version=version)
    (search,) = [each for each in upstream.requests if each.path == "/v1/alpha/search"]
    assert search.json()["commands"] == {"search_query": [{"q": "weather in Oslo"}]}
    frames = [frame for sock in upstream.sockets for frame in sock.frames]
    last = frames[-1] if websocket else upstream.requests[-1].json()
    assert "It rains in Oslo." in json.dumps(last["input"])
    (row,) = [row for row in assert_metered(gateway, said) if row["endpoint"] == "/v1/alpha/search"]
    assert (row["usage_source"], row["web_searches"], row["input_tokens"]) == ("counted", 1, None)
