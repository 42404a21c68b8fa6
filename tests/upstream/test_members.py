"""Upstreams with several keys: their members, the headers that they send, and their settings."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from typing import Any

import httpx2
import pytest
from websockets.sync.client import connect

from redbtc.config import FailoverSettings, SettingsError, missing_keys, parse_settings
from redbtc.upstream.configured import Upstreams
from redbtc.upstream_settings import UpstreamSettings
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.response_store import BODY, ResponseStore, create
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    ws_like_openai,
)

pytestmark = [pytest.mark.promise_6, pytest.mark.promise_9]

RESERVED = [
    *("host", "connection", "upgrade", "te", "trailer", "keep-alive", "expect", "accept-encoding"),
    *("Transfer-Encoding", "Content-Length", "content-type", "content-encoding", "idempotency-key"),
    *("sec-websocket-protocol", "Sec-WebSocket-Key"),
]
KEYS = {"KEY_A": "sk-canary-a-0123456789", "KEY_B": "sk-canary-b-0123456789"}


def table(upstream: Upstream, **more: Any) -> dict[str, Any]:
    """Return the table of an upstream with two keys."""
    return {"name": "up", "base_url": upstream.url, "api_key_envs": list(KEYS), **more}


def settings_of(*tables: dict[str, Any]) -> dict[str, Any]:
    return {"server": {"log_level": "debug"}, "upstreams": list(tables)}


def sent(upstream: Upstream, name: str) -> list[str | None]:
    """Return the values of a header in the requests that an upstream has got."""
    return [request.header(name) for request in upstream.requests]


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"api_key_env": "A", "api_key_envs": ["B"]}, "upstreams[0].api_key_env: set beside"),
        ({"api_key_env": "", "api_key_envs": ["B"]}, "upstreams[0].api_key_env: set beside"),
        ({"api_key_envs": ["A", "B", "A"]}, "upstreams[0].api_key_envs: duplicate variable 'A'"),
        ({"api_key_envs": [""]}, "upstreams[0].api_key_envs[0]: found something else"),
        ({"api_key_envs": ["sk-secret"]}, "upstreams[0].api_key_envs[0]: found something else"),
        ({"api_key_envs": "sk-secret"}, "upstreams[0].api_key_envs: found something else"),
        ({"organization": "a b"}, "upstreams[0].organization: found 'a b'"),
        ({"auth_header": "a b"}, "upstreams[0].auth_header: found 'a b'"),
        ({"auth_header": ""}, "upstreams[0].auth_header: found ''"),
        ({"auth_header": "Host"}, "upstreams[0].auth_header: found 'Host'"),
        ({"headers": {"x a": "1"}}, "upstreams[0].headers: found 'x a'"),
        ({"headers": {"": "1"}}, "upstreams[0].headers: found ''"),
        ({"headers": {"x-a": "1", "X-A": "2"}}, "upstreams[0].headers.x-a: duplicate name"),
        (
            {"headers": {"Authorization": "sk-secret"}},
            "upstreams[0].headers.Authorization: this header",
        ),
        (
            {"auth_header": "api-key", "headers": {"api-key": "sk-secret"}},
            "upstreams[0].headers.api-key: this header",
        ),
        (
            {"headers": {"x-a": "sk-secret\r\nx: y"}},
            "upstreams[0].headers.x-a: the value has characters",
        ),
        (
            {"headers": {"x-a": "sk-secret\x7f"}},
            "upstreams[0].headers.x-a: the value has characters",
        ),
        ({"headers": {"x-a": "é"}}, "upstreams[0].headers.x-a: the value has characters"),
        (
            {"headers": {"x-a": "sk-secret {env:A"}},
            "upstreams[0].headers.x-a: the value has '{env:'",
        ),
        ({"headers": {"x-a": "{env:}"}}, "upstreams[0].headers.x-a: the value has '{env:'"),
        (
            {"headers": {"x-a": "{env:A} {env:B-}"}},
            "upstreams[0].headers.x-a: the value has '{env:'",
        ),
        ({"headers": {"x-a": 5}}, "upstreams[0].headers[...]: found something else"),
        ({"headers": "sk-secret"}, "upstreams[0].headers: found something else"),
        (
            {"headers": {"x-a": "{env:BROKEN}"}},
            "upstreams[0].headers: the value of the environment variable BROKEN has characters",
        ),
        (
            {"api_key_env": "BROKEN"},
            "upstreams[0].api_key_env: the value of the environment variable",
        ),
        (
            {"api_key_envs": ["A", "BROKEN"]},
            "upstreams[0].api_key_envs: the value of the environment variable BROKEN",
        ),
        *[({"headers": {name: "1"}}, f"upstreams[0].headers: found '{name}'") for name in RESERVED],
    ],
)
def test_wrong_keys_and_headers(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("BROKEN", "sk-secret\nx: y")
    with pytest.raises(SettingsError) as raised:
        parse_settings({"upstreams": [wrong]})
    assert str(raised.value).startswith(said)
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"attempts": 11}, {"budget_seconds": 0}, {"tries": 1}]
)
def test_failover(wrong: dict[str, int]) -> None:
    assert parse_settings({}).failover == FailoverSettings(attempts=3, budget_seconds=20)
    assert parse_settings({"failover": {"attempts": 1}}).failover.attempts == 1
    with pytest.raises(SettingsError, match=f"^failover.{next(iter(wrong))}: "):
        parse_settings({"failover": wrong})


def test_members_and_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A", "B", "C"):
        monkeypatch.delenv(name, raising=False)
    several = {"name": "s", "api_key_envs": ["A", "B"], "headers": {"x-c": "{env:C}-{env:C}"}}
    settings = parse_settings(
        {"upstreams": [several, {"name": "one", "api_key_env": "A", "organization": "s"}]}
    )
    assert missing_keys(settings) == [
        f'upstream "{member}": environment variable {variable} is not set'
        for member, variable in (
            ("s/A", "A"),
            ("s/A", "C"),
            ("s/B", "B"),
            ("s/B", "C"),
            ("one", "A"),
        )
    ]
    monkeypatch.setenv("A", "a")
    monkeypatch.setenv("C", "c")
    members = {each.name: each for each in Upstreams(settings.upstreams)}
    assert {name: each.usable for name, each in members.items()} == {
        "s/A": True,
        "s/B": False,
        "one": True,
    }
    assert [each.organization for each in members.values()] == ["s/A", "s/B", "s"]
    first, *_ = settings.upstreams[0].members
    assert first.added_headers() == {"x-c": "c-c", "authorization": "Bearer a"}
    monkeypatch.setenv("C", "")
    assert not any(each.usable for each in Upstreams(settings.upstreams[:1]))


def test_a_reload_keeps_unchanged_members() -> None:
    def tables(*keys: str, **more: Any) -> tuple[UpstreamSettings, ...]:
        several = {"name": "s", "api_key_envs": list(keys), "headers": {"x-a": "1"}, **more}
        return parse_settings({"upstreams": [several, {"name": "t", "api_key_env": ""}]}).upstreams

    async def main() -> None:
        upstreams = Upstreams(tables("A", "B"))
        before = {each.name: each for each in upstreams}
        upstreams.apply(tables("C", "B", "A"))
        after = {each.name: each for each in upstreams}
        assert list(after) == ["s/C", "s/B", "s/A", "t"]
        assert all(after[name] is before[name] for name in before)
        upstreams.apply(tables("A", headers={"x-a": "2"}))
        last = {each.name: each for each in upstreams}
        assert list(last) == ["s/A", "t"]
        assert last["s/A"] is not after["s/A"]
        assert last["t"] is before["t"]

    asyncio.run(main())


def test_the_member_that_has_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A", raising=False)
    monkeypatch.setenv("B", "b")
    several = {"name": "s", "api_key_envs": ["A", "B"]}
    upstreams = Upstreams(
        parse_settings({"upstreams": [several, {"name": "s.t", "api_key_env": ""}]}).upstreams
    )
    found = {name: upstreams.named(name) for name in ("s/A", "s/B", "s", "s/OLD", "s.t", "s.t/X")}
    assert {name: each.name if each else None for name, each in found.items()} == {
        "s/A": "s/A",
        "s/B": "s/B",
        "s": "s/B",
        "s/OLD": "s/B",
        "s.t": "s.t",
        "s.t/X": "s.t",
    }
    assert upstreams.named("gone") is None
    assert upstreams.named("gone/A") is None


# ── On the wire ──────────────────────────────────────────────────────────────────────────────────


def ask(gateway: Gateway, key: str, **headers: str) -> httpx2.Response:
    with gateway.client(key) as client:
        return client.post("/responses", json=BODY, headers=headers)


def test_each_member_has_a_name_and_sends_its_own_key(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(settings_of(table(upstream)), **KEYS).start()
    key = gateway.new_key()
    expected = {f"up/{name}": f"Bearer {value}" for name, value in KEYS.items()}
    while len(set(sent(upstream, "authorization"))) < len(expected):
        assert ask(gateway, key).status_code == 200
        assert len(upstream.requests) < 200
    rows = sorted(gateway.rows(), key=lambda row: str(row["started_at"]))
    assert [expected[row["upstream"]] for row in rows] == sent(upstream, "authorization")
    at_work = gateway.api("GET", "/overview")["upstreams"]
    assert [each["name"] for each in at_work] == list(expected)


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
def test_the_settings_headers_win(
    make_gateway: MakeGateway, upstream: Upstream, transport: str
) -> None:
    """Over those of a client, which can't set the header with the key either."""
    headers = {"OpenAI-Beta": "ours", "x-team": "{env:TEAM}/{env:TEAM}", "x-codex-a": "fixed"}
    more = {"auth_header": "Api-Key", "headers": headers, "transport": transport}
    gateway = make_gateway(settings_of(table(upstream, **more)), TEAM="blue ", **KEYS).start()
    with gateway.client(gateway.new_key()) as client:
        own = {"openai-beta": "theirs", "x-codex-a": "theirs", "x-codex-b": "theirs"}
        own |= {"api-key": "theirs", "x-team": "theirs"}
        assert client.post("/responses", json=BODY, headers=own).status_code == 200
        assert client.get("/models", headers=own).status_code == 200
    for request in upstream.requests:
        names = [name.lower() for name, _ in request.headers]
        assert len(set(names)) == len(names)
        assert request.header("api-key") in KEYS.values()
        assert request.header("authorization") is None
        assert request.header("openai-beta") == "ours"
        assert request.header("x-team") == "blue /blue"
        assert request.header("x-codex-a") == "fixed"
    assert sent(upstream, "x-codex-b") == ["theirs", None]


def test_a_key_can_be_in_a_header_that_clients_send(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    gateway = make_gateway(settings_of(table(upstream, auth_header="x-codex-key")), **KEYS).start()
    assert ask(gateway, gateway.new_key(), **{"x-codex-key": "theirs"}).status_code == 200
    (request,) = upstream.requests
    values = [value.decode() for name, value in request.headers if name.lower() == b"x-codex-key"]
    assert len(values) == 1
    assert values[0] in KEYS.values()


def test_the_settings_headers_win_over_a_websocket(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    upstream.talk = ws_like_openai
    headers = {"user-agent": "gateway/{env:TEAM}", "x-team": "{env:TEAM}"}
    more = {"auth_header": "api-key", "headers": headers}
    gateway = make_gateway(settings_of(table(upstream, **more)), TEAM="blue", **KEYS).start()
    own = {"authorization": f"Bearer {gateway.new_key()}", "api-key": "theirs"}
    url = f"{gateway.base_url}/responses".replace("http", "ws", 1)
    with connect(url, additional_headers=own, user_agent_header="theirs", proxy=None) as client:
        client.send(json.dumps({"type": "response.create", **BODY}))
        while json.loads(client.recv())["type"] != "response.completed":
            pass
    (socket,) = upstream.sockets
    assert socket.received.header("api-key") in KEYS.values()
    assert socket.received.header("authorization") is None
    assert socket.received.header("user-agent") == "gateway/blue"
    assert socket.received.header("x-team") == "blue"
    names = [name.lower() for name, _ in socket.received.headers]
    assert len(set(names)) == len(names)


def test_a_missing_variable_makes_a_member_unusable(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    lacking = table(upstream, name="lacking", headers={"x-a": "{env:NOT_THERE}"})
    keys = {"KEY_A": KEYS["KEY_A"]}
    gateway = make_gateway(settings_of(lacking, table(upstream)), **keys).start()
    said = 'upstream "lacking/KEY_A": environment variable NOT_THERE is not set'
    assert json.dumps(said) in gateway.flushed_log()
    checked = gateway.run("check", "--json")
    assert checked.returncode == 2
    assert said in json.loads(checked.stdout)["problems"]
    key = gateway.new_key()
    for _ in range(10):
        assert ask(gateway, key).status_code == 200
    assert {row["upstream"] for row in gateway.rows()} == {"up/KEY_A"}


def test_no_secret_is_said(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """Not by the log at the level "debug", the commands, the routes, or the error of an upstream
    that repeats what it was sent where the gateway writes of it."""
    secrets = {**KEYS, "SECRET": "canary-header-0123456789"}
    upstream.talk = ws_like_openai

    async def script(request: Received, reply: Reply) -> None:
        if request.path.endswith("/models"):
            text = str(request.headers)
            error = {"message": text, "code": text, "type": text}
            await json_answer({"error": error}, 401)(request, reply)
        elif len(upstream.requests) % 2:
            await openai_like(request, reply)
        else:
            reply.tear()

    upstream.script = script
    more = {"auth_header": "api-key", "headers": {"x-secret": "{env:SECRET}"}}
    gateway = make_gateway(settings_of(table(upstream, **more)), **secrets).start()
    key = gateway.new_key()
    said = [ask(gateway, key).text for _ in range(6)]
    url = f"{gateway.base_url}/responses".replace("http", "ws", 1)
    own = {"authorization": f"Bearer {key}"}
    with connect(url, additional_headers=own, proxy=None) as client:
        client.send(json.dumps({"type": "response.create", **BODY}))
        said.append(str(client.recv()))
    with gateway.client(key) as http:
        said += [http.get(path).text for path in ("/models", "/models/gpt-up")]
    said += [gateway.get(path).text for path in ("/readyz", "/status", "/metrics")]
    gateway.signal(signal.SIGHUP)
    gateway.wait_for_log("reloaded")
    for words in (
        ["check", "--upstreams"],
        ["check", "--upstreams", "--json"],
        ["usage", "--json"],
    ):
        done = gateway.run(*words)
        said += [done.stdout, done.stderr]
    said += [
        json.dumps(gateway.api("GET", path)) for path in ("/overview", "/requests", "/changes")
    ]
    upstream.script = openai_like
    gateway.restart()
    said.append(gateway.flushed_log())
    texts = "\n".join(said)
    assert "upstream up/KEY_A: status 401" in texts
    assert not [secret for secret in secrets.values() if secret in texts]
    assert not re.search("canary", repr(parse_settings(settings_of(table(upstream, **more)))))


# ── Models and stored responses ──────────────────────────────────────────────────────────────────


def test_one_members_list_is_the_upstreams(make_gateway: MakeGateway, upstream: Upstream) -> None:
    """The members are asked in turn until one answers; none is asked without need."""
    refused = {f"Bearer {KEYS['KEY_A']}"}

    async def script(request: Received, reply: Reply) -> None:
        if request.header("authorization") in refused:
            error = {"message": "Incorrect API key: sk-canary", "code": "invalid_api_key"}
            await json_answer({"error": error}, 401)(request, reply)
        else:
            await openai_like(request, reply)

    upstream.script = script
    gateway = make_gateway(settings_of(table(upstream)), **KEYS).start()
    with gateway.client(gateway.new_key()) as client:
        listed = client.get("/models")
        assert [each["id"] for each in listed.json()["data"]] == ["gpt-up", "gpt-other"]
        assert len(upstream.requests) == 2
        for _ in range(10):
            assert client.get("/models/gpt-up").json()["id"] == "gpt-up"
        refused.clear()
        upstream.requests.clear()
        assert client.get("/models").status_code == 200
        assert len(upstream.requests) == 1
        time.sleep(1.1)  # the list is not new any more
        refused.add(f"Bearer {KEYS['KEY_A']}")
        assert "age" not in client.get("/models").headers, "the list of the other member"
        refused.update(f"Bearer {each}" for each in KEYS.values())
        for path in ("/models", "/models/gpt-up"):
            answer = client.get(path)
            assert answer.status_code == 200, "what was listed last"
            assert "canary" not in answer.text
        answer = client.get("/models/gpt-unknown")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")


def test_stored_responses_survive_a_change_of_keys(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """From one key to several, and the removal of the key that made them."""
    upstream.script = ResponseStore()
    one = {**table(upstream), "api_key_env": "KEY_A"}
    del one["api_key_envs"]
    gateway = make_gateway(settings_of(one), **KEYS).start()
    key = gateway.new_key()
    made = create(gateway, key)["id"]

    def reload(keys: list[str]) -> None:
        times = gateway.log().count('"reloaded"')
        gateway.configure(settings_of(table(upstream, api_key_envs=keys)))
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: gateway.log().count('"reloaded"') > times)

    for keys in (["KEY_A", "KEY_B"], ["KEY_B"]):
        reload(keys)
        with gateway.client(key) as client:
            assert client.get(f"/responses/{made}").status_code == 200
            assert upstream.requests[-1].header("authorization") == f"Bearer {KEYS[keys[0]]}"
            answer = client.post("/responses", json={**BODY, "previous_response_id": made})
            assert answer.status_code == 200
            assert gateway.rows()[-1]["upstream"] == f"up/{keys[0]}"
            # What was made under the old name and under the new one is at the same member.
            both = {"previous_response_id": made, "comparison_response_id": answer.json()["id"]}
            assert client.post("/responses", json={**BODY, **both}).status_code == 200
