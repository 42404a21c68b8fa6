"""Promise 7: a client's own credential reaches upstreams with `credentials = "client"` alone, and
what it made there, nobody reaches without it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import backports.zstd
import httpx2
import orjson
import pytest

from redbtc.config import SettingsError, missing_keys, parse_settings
from redbtc.gateway.asking import ask
from redbtc.meter.report import Report
from redbtc.upstream import upstreams as configured
from redbtc.upstream_settings import UpstreamSettings
from tests.gateway.errors import error as whole_error
from tests.helpers.credentials import (
    API_KEY,
    WORKSPACE,
    login,
    reload,
    settings_of,
    table,
    with_key,
)
from tests.helpers.gateway import UPSTREAM_KEY, USUAL, Gateway, MakeGateway, wait_until
from tests.helpers.response_store import BODY, ResponseStore
from tests.helpers.upstream import (
    Received,
    Reply,
    Upstream,
    json_answer,
    openai_like,
    response_object,
    response_pieces,
    stream,
)

pytestmark = pytest.mark.promise_7

OPERATOR_MODEL = "gpt-up"  # that of the client's upstream is "own-1"
OWN = {"model": "own-1", "input": "Hi"}
NOBODY = "Bearer sk-somebody-else"


@pytest.fixture
def own() -> Iterator[Upstream]:
    """The upstream to which clients send credentials of their own."""
    with Upstream() as running:
        running.script = ResponseStore(first=500)
        yield running


@pytest.fixture
def tables(upstream: Upstream, own: Upstream) -> list[dict[str, Any]]:
    stored = ResponseStore()

    async def script(request: Received, reply: Reply) -> None:
        is_list = request.path.startswith("/v1/models")
        await (openai_like if is_list else stored)(request, reply)

    upstream.script = script
    return [
        table(upstream, "operators", models=["gpt-*"]),
        table(own, "clients", models=["own-*", "own-1"], credentials="client"),
    ]


@pytest.fixture
def gateway(make_gateway: MakeGateway, tables: list[dict[str, Any]]) -> Gateway:
    return make_gateway(settings_of(*tables)).start()


def client(gateway: Gateway, headers: dict[str, str]) -> httpx2.Client:
    return httpx2.Client(base_url=gateway.base_url, headers=headers, **USUAL)


def post(
    gateway: Gateway, headers: dict[str, str], body: dict[str, Any] = OWN, path: str = "/responses"
) -> httpx2.Response:
    with client(gateway, headers) as session:
        return session.post(path, json=body)


def error(answer: httpx2.Response) -> tuple[int, str]:
    """Return an answer's status and its error's code."""
    status, code, _ = whole_error(answer)
    return status, code


def credential_of(request: Received) -> list[tuple[bytes, bytes]]:
    """Return what a request has of the headers that authorize."""
    names = (b"authorization", b"chatgpt-account-id", b"x-gateway-key", b"cookie")
    return [line for line in request.headers if line[0].lower() in names]


# ── Which key, and which upstream ────────────────────────────────────────────────────────────────


@pytest.mark.front_door
def test_a_credential_passes_unchanged_to_its_upstream_alone(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    headers = with_key(key, **login("user-1")) | {"cookie": "a=b"}
    assert post(gateway, headers).status_code == 200
    assert credential_of(own.requests[-1]) == [
        (b"authorization", headers["authorization"].encode()),
        (b"chatgpt-account-id", WORKSPACE.encode()),
    ]
    assert post(gateway, headers, BODY).status_code == 200, "a model of the operator's upstream"
    assert credential_of(upstream.requests[-1]) == [
        (b"authorization", f"Bearer {UPSTREAM_KEY}".encode())
    ]
    rows = gateway.rows()
    assert {(row["upstream"], row["credentials"]) for row in rows} == {
        ("clients", "client"),
        ("operators", "operator"),
    }
    assert all(row["input_tokens"] for row in rows)


@pytest.mark.parametrize(
    "shown",
    [
        {"x-gateway-key": "{key}"},
        {"X-GATEWAY-KEY": "Bearer {key}"},
        {"x-gateway-key": "bearer  {key}"},
        {"authorization": "Bearer {key}"},
    ],
)
def test_a_key_in_either_header_is_a_key(
    gateway: Gateway, upstream: Upstream, key: str, shown: dict[str, str]
) -> None:
    headers = {name: value.format(key=key) for name, value in shown.items()}
    assert post(gateway, headers, BODY).status_code == 200
    assert credential_of(upstream.requests[-1]) == [
        (b"authorization", f"Bearer {UPSTREAM_KEY}".encode())
    ]
    assert httpx2.get(f"{gateway.url}/admin/v1/me", headers=headers, **USUAL).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    ["", "Bearer", "Bearer ", "Basic {key}", "{key}x", "{key} x", "{key}, {key}", "sk-x", "\xe9"],
)
def test_a_wrong_key_in_its_header_is_not_replaced_by_authorization(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str, wrong: str
) -> None:
    for authorization in (f"Bearer {key}", API_KEY):
        head = (
            f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nx-gateway-key: {wrong.format(key=key)}\r\n"
            f"authorization: {authorization}\r\ncontent-length: 0\r\n\r\n"
        )
        answer = gateway.raw(head.encode("latin-1"))
        assert answer.startswith(b"HTTP/1.1 401 "), answer
        assert b"Incorrect API key provided" in answer
    assert not upstream.requests + own.requests


def test_two_headers_with_a_key_are_no_key(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway({"server": {"key_headers": ["X-Gateway-Key", "x-team"]}}).start()
    key = gateway.new_key()
    for name in ("x-gateway-key", "X-Team"):
        assert post(gateway, {name: key}, BODY).status_code == 200
    for second in (f"x-team: {key}", f"x-gateway-key: {key}", "x-team:"):
        head = (
            f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nx-gateway-key: {key}\r\n{second}\r\n"
            "content-length: 0\r\n\r\n"
        )
        assert gateway.raw(head.encode()).startswith(b"HTTP/1.1 401 "), second
    for request in upstream.requests:
        assert not {name.lower() for name, _ in request.headers} & {b"x-gateway-key", b"x-team"}


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("authorization: Bearer a\r\nauthorization: Bearer b", 400),
        ("authorization: Bearer a\r\nchatgpt-account-id: a\r\nChatGPT-Account-ID: b", 400),
        ("authorization: Bearer \xe9", 400),
        ("authorization: Bearer a\tb", 400),
        ("authorization: Bearer a\r\nchatgpt-account-id: \xff", 400),
        ("authorization:", 404),  # is none
        ("authorization_: Bearer a", 404),
        ("chatgpt-account-id: a", 404),
    ],
)
def test_an_ambiguous_credential_is_refused(
    gateway: Gateway, own: Upstream, key: str, more: str, status: int
) -> None:
    body = orjson.dumps(OWN)
    head = (
        f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nx-gateway-key: {key}\r\n{more}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    answer = gateway.raw(head.encode("latin-1") + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert not own.requests
    assert gateway.rows() == []


def test_a_key_of_the_gateway_is_never_forwarded(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    """An SDK sends its key in Authorization, whatever else it is told to send."""
    other = gateway.new_key("other")
    revoked = gateway.new_key("other")
    keys = gateway.api("GET", "/accounts/other/keys")["keys"]
    gateway.api("POST", f"/keys/{keys[-1]['id']}/revoke", {})
    for token in (key, other, revoked):
        answer = post(gateway, with_key(key, f"Bearer {token}"))
        assert error(answer) == (404, "model_not_found"), answer.text
        assert post(gateway, with_key(key, f"Bearer {token}"), BODY).status_code == 200
    assert not own.requests
    sent = b"".join(value for request in upstream.requests for _, value in request.headers)
    assert not any(each.encode() in sent for each in (key, other, revoked))


@pytest.mark.parametrize(
    "form", ['Bearer "{}"', "Bearer {} x", "x{}", "Basic {}", "Basic {} unpadded", "workspace"]
)
def test_a_key_of_the_gateway_within_a_credential_is_found(
    gateway: Gateway, own: Upstream, key: str, form: str
) -> None:
    shown = key
    if form.startswith("Basic"):
        shown = base64.b64encode(f"user:{key}".encode()).decode()
        if form.endswith("unpadded"):
            form, shown = "Basic {}", shown.rstrip("=")
            assert len(shown) % 4
    more = {"chatgpt-account-id": key} if form == "workspace" else {}
    authorization = API_KEY if form == "workspace" else form.format(shown)
    answer = post(gateway, with_key(key, authorization, **more))
    assert error(answer) == (404, "model_not_found")
    assert not own.requests


def test_without_a_credential_such_upstreams_do_not_exist(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, with_key(key, None)):
        answer = post(gateway, headers)
        assert error(answer) == (404, "model_not_found")
        assert "X-Gateway-Key" in answer.json()["error"]["message"]
        with client(gateway, headers) as session:
            listed = session.get("/models").json()["data"]
            assert [each["id"] for each in listed] == ["gpt-up", "gpt-other"]
            assert session.get("/models/own-1").status_code == 404
        assert error(post(gateway, headers, {**BODY, "model": "none"})) == (404, "model_not_found")
    assert not own.requests


def test_a_free_upstream_says_how_to_use_it(
    make_gateway: MakeGateway, tables: list[dict[str, Any]]
) -> None:
    """Its models have no price."""
    tables[1]["billing"] = "free"
    refuse = {"unpriced_models": "refuse"}
    gateway = make_gateway(settings_of(*tables, billing=refuse)).start()
    answer = post(gateway, {"authorization": f"Bearer {gateway.new_key()}"})
    assert error(answer) == (404, "model_not_found")
    assert "X-Gateway-Key" in answer.json()["error"]["message"]


def test_lists_of_models_ask_no_such_upstream(
    make_gateway: MakeGateway, tables: list[dict[str, Any]], own: Upstream
) -> None:
    gateway = make_gateway(settings_of(*tables)).start()
    with client(gateway, with_key(gateway.new_key())) as session:
        listed = session.get("/models").json()["data"]
        assert [each["id"] for each in listed] == ["gpt-up", "gpt-other", "own-1"]
        assert session.get("/models/own-1").json()["owned_by"] == "clients"
        assert session.get("/models/own-2").status_code == 404, "only a pattern matches it"
    checked = gateway.cli("check", "--upstreams")
    assert checked["upstreams"][1] == {
        "name": "clients",
        "ok": True,
        "models": None,
        "status": None,
        "code": "client_credentials",
    }
    assert not own.requests


def test_a_preflight_allows_the_header_of_the_key(gateway: Gateway) -> None:
    asked = "authorization,chatgpt-account-id,content-type,x-gateway-key"
    answer = httpx2.options(
        f"{gateway.base_url}/responses",
        headers={
            "origin": "https://app.example.com",
            "access-control-request-method": "POST",
            "access-control-request-headers": asked,
        },
        **USUAL,
    )
    assert answer.status_code < 300
    assert answer.headers["access-control-allow-headers"] == asked


def test_a_compressed_body_of_a_login(gateway: Gateway, own: Upstream, key: str) -> None:
    """Codex CLI sends zstd if its provider is named OpenAI and its user has logged in."""
    body = backports.zstd.compress(orjson.dumps(OWN))
    headers = with_key(key, **login("user-1"))
    headers |= {"content-encoding": "zstd", "content-type": "application/json"}
    seen: list[bytes] = []

    async def script(request: Received, reply: Reply) -> None:
        seen.append(request.body)
        request.body = backports.zstd.decompress(request.body)
        await ResponseStore()(request, reply)

    own.script = script
    with client(gateway, headers) as session:
        assert session.post("/responses", content=body).status_code == 200
    assert seen == [body]
    assert gateway.row()["requested_model"] == "own-1"


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"credentials": "both"}, "upstreams[0].credentials: found 'both'"),
        ({"api_key_env": "A"}, 'upstreams[0].api_key_env: with credentials = "client"'),
        ({"api_key_envs": ["A"]}, 'upstreams[0].api_key_envs: with credentials = "client"'),
        ({"auth_header": "api-key"}, 'upstreams[0].auth_header: with credentials = "client"'),
        ({"headers": {"Authorization": "x"}}, "upstreams[0].headers.Authorization: with cred"),
        ({"headers": {"ChatGPT-Account-ID": "x"}}, "upstreams[0].headers.ChatGPT-Account-ID: wi"),
        ({"billing": "never"}, "upstreams[0].billing: found 'never'"),
        (
            {"billing": "free", "credentials": "operator"},
            "upstreams[0].billing: found 'free', which needs credentials = \"client\"",
        ),
    ],
)
def test_settings_that_contradict_each_other(more: dict[str, Any], wrong: str) -> None:
    upstream = {"credentials": "client", **more}
    with pytest.raises(SettingsError) as error:
        parse_settings({"upstreams": [upstream]})
    assert str(error.value).startswith(wrong)
    ok = parse_settings({"upstreams": [{"credentials": "client", "api_key_env": ""}]})
    assert missing_keys(ok) == []


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "cookie",
        "HOST",
        "connection",
        "content-type",
        "content-length",
        "x-codex-key",
        "user-agent",
        "originator",
        "x-stainless-key",
        "openai-organization",
        "chatgpt-account-id",
        "x-forwarded-for",
        "sec-websocket-protocol",
        "x-request-id",
        "origin",
        "accept-language",
        "idempotency-key",
    ],
)
def test_a_header_with_another_meaning_has_no_key(name: str) -> None:
    with pytest.raises(SettingsError, match=r"^server\.key_headers: found "):
        parse_settings({"server": {"key_headers": ["x-ok", name]}})


def test_headers_for_the_key_have_valid_names() -> None:
    for name in ("", "x y", "x:", "ü"):
        with pytest.raises(SettingsError, match=r"^server\.key_headers: found "):
            parse_settings({"server": {"key_headers": [name]}})
    for names in ([], ["X-Gateway-Key", "x-litellm-api-key", "api-key"]):
        parse_settings({"server": {"key_headers": names}})
    clients = {"credentials": "client"}
    with pytest.raises(SettingsError, match=r"^upstreams\[0\]\.credentials: \"client\" needs"):
        parse_settings({"server": {"key_headers": []}, "upstreams": [clients]})


# ── Failover and health ──────────────────────────────────────────────────────────────────────────


def test_failover_stays_among_upstreams_of_one_kind(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """All serve the same model."""
    with Upstream() as second:
        gateway = make_gateway(
            settings_of(
                table(own, "clients", credentials="client"),
                table(second, "clients2", credentials="client", priority=2),
                table(upstream, "operators", priority=3),
            )
        ).start()
        key = gateway.new_key()
        own.script = second.script = json_answer({"error": {"code": "server_error"}}, 503)
        answer = post(gateway, with_key(key), BODY)
        assert answer.status_code == 503
        assert (len(own.requests), len(second.requests), len(upstream.requests)) == (1, 1, 0)
        assert second.requests[0].header("authorization") == API_KEY
        upstream.script = json_answer({"error": {"code": "server_error"}}, 503)
        assert post(gateway, {"authorization": f"Bearer {key}"}, BODY).status_code == 503
        assert (len(own.requests), len(second.requests), len(upstream.requests)) == (1, 1, 1)
        rows = [(row["upstream"], row["credentials"], row["attempts"]) for row in gateway.rows()]
        assert sorted(rows) == [("clients2", "client", 2), ("operators", "operator", 1)]


def test_a_full_upstream_is_waited_for(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """One of the other kind, which has places, does not take its requests."""
    clients = table(own, "clients", credentials="client", max_concurrency=1)
    gateway = make_gateway(
        settings_of(clients, table(upstream, "operators"), limits={"queue_seconds": 0.1})
    ).start()
    key = gateway.new_key()
    began, may_end = threading.Event(), threading.Event()

    async def slow(request: Received, reply: Reply) -> None:
        began.set()
        await reply.wait(may_end)
        await ResponseStore()(request, reply)

    own.script = slow
    thread = threading.Thread(target=post, args=(gateway, with_key(key), BODY))
    thread.start()
    assert began.wait(60)
    assert error(post(gateway, with_key(key), BODY)) == (503, "overloaded")
    assert not upstream.requests
    assert post(gateway, with_key(key, None), BODY).status_code == 200
    may_end.set()
    thread.join()
    assert len(own.requests) == len(upstream.requests) == 1


def test_an_outage_of_one_kind_is_none_of_the_other(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """The last upstream of its kind is never taken out, though one of the other kind is up."""
    gateway = make_gateway(
        settings_of(table(own, "clients", credentials="client"), table(upstream, "operators"))
    ).start()
    key = gateway.new_key()
    own.script = upstream.script = json_answer({"error": {"code": "server_error"}}, 500)
    for headers in ({"authorization": f"Bearer {key}"}, with_key(key)):
        for _ in range(8):
            assert post(gateway, headers, BODY).status_code == 500
    assert len(own.requests) == len(upstream.requests) == 8
    states = [each["state"] for each in gateway.cli("upstream", "list")["upstreams"]]
    assert states == ["up", "up"]
    assert gateway.api("GET", "/upstreams/changes")["changes"] == []
    own.script = ResponseStore()
    upstream.script = json_answer({"error": {"code": "rate_limit_exceeded"}}, 429)
    for _ in range(2):
        assert post(gateway, {"authorization": f"Bearer {key}"}, BODY).status_code == 429
    assert len(upstream.requests) == 10, "the last of its kind does not rest"


@pytest.mark.parametrize("status", [401, 403, 429])
def test_an_answer_about_the_credential_passes_and_hurts_nobody(
    make_gateway: MakeGateway, own: Upstream, status: int
) -> None:
    answers = {"Bearer bad": status}
    said = {"error": {"message": "Bad: sk-own-canary", "code": "sk-own-canary", "type": "x"}}

    async def script(request: Received, reply: Reply) -> None:
        if answers.get(request.header("authorization") or "") == status:
            headers = {"x-codex-primary-used-percent": "100", "retry-after": "7"}
            await json_answer(said, status, headers)(request, reply)
        else:
            await ResponseStore()(request, reply)

    with Upstream() as second:
        own.script = second.script = script
        gateway = make_gateway(
            settings_of(
                table(own, "clients", credentials="client"),
                table(second, "clients2", credentials="client", priority=2),
            )
        ).start()
        key = gateway.new_key()
        for _ in range(8):
            answer = post(gateway, with_key(key, "Bearer bad"), BODY)
            assert (answer.status_code, answer.json()) == (status, said)
            assert answer.headers["x-codex-primary-used-percent"] == "100"
            assert answer.headers["retry-after"] == "7"
        assert not second.requests
        assert post(gateway, with_key(key, "Bearer good"), BODY).status_code == 200
        assert not second.requests, "the first is up"
        states = [each["state"] for each in gateway.cli("upstream", "list")["upstreams"]]
        assert states == ["up", "up"]
        rows = gateway.rows()
        failed = [row for row in rows if row["status"] == status]
        assert [row["outcome"] for row in failed] == ["upstream_error"] * 8
        if status != 429:
            assert {row["upstream_error_code"] for row in failed} == {str(status)}
            assert "sk-own-canary" not in gateway.flushed_log()


def test_a_background_response_needs_the_operators_credential(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    answer = post(gateway, with_key(key), {**OWN, "background": True})
    assert error(answer) == (400, "invalid_request")
    assert answer.json()["error"]["param"] == "background"
    assert not own.requests
    assert post(gateway, with_key(key), {**BODY, "background": True}).status_code == 200


# ── Stored objects ───────────────────────────────────────────────────────────────────────────────


def test_a_stored_response_needs_its_credential(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    made = post(gateway, with_key(key)).json()
    name, item = made["id"], made["output"][0]["id"]
    before = len(own.requests)
    others = [
        with_key(key, NOBODY),
        with_key(key, None),
        {"authorization": f"Bearer {key}"},
        with_key(key, API_KEY, **{"chatgpt-account-id": WORKSPACE}),
        with_key(gateway.new_key("other")),
    ]
    for headers in others:
        with client(gateway, headers) as session:
            unknown = session.get("/responses/resp_unknown")
            for method, path in (
                ("GET", ""),
                ("GET", "/input_items"),
                ("POST", "/cancel"),
                ("DELETE", ""),
            ):
                answer = session.request(method, f"/responses/{name}{path}")
                assert error(answer) == (404, "response_not_found")
                text = answer.text.replace(name, "resp_unknown")
                assert text == unknown.text
            for more in (
                {"previous_response_id": name},
                {"input": [{"type": "item_reference", "id": item}]},
                {"input": [{"id": item}]},
            ):
                for model in ("own-1", OPERATOR_MODEL):
                    answer = session.post(
                        "/responses", json={"input": "Hi", "model": model, **more}
                    )
                    assert answer.status_code in (400, 404), (model, more)
    assert len(own.requests) == before
    assert not upstream.requests
    with client(gateway, with_key(gateway.new_key())) as session:  # another key of the account
        assert session.get(f"/responses/{name}").json()["id"] == name
        assert own.requests[-1].header("authorization") == API_KEY
        follow = session.post("/responses", json={**OWN, "previous_response_id": name})
        assert follow.status_code == 200
        assert session.get(f"/responses/{name}/input_items").status_code == 200
        assert session.post(f"/responses/{name}/cancel").status_code == 200
        assert session.delete(f"/responses/{name}").status_code == 200
        assert session.get(f"/responses/{name}").status_code == 404
    assert {request.header("authorization") for request in own.requests} == {API_KEY}


def test_a_stored_response_of_the_operators_upstream_stays_the_accounts(
    gateway: Gateway, upstream: Upstream, own: Upstream, key: str
) -> None:
    """Whether it was made with a credential of the client's beside the key or without one."""
    first = post(gateway, with_key(key), BODY).json()["id"]
    second = post(gateway, {"authorization": f"Bearer {key}"}, BODY).json()["id"]
    mine = post(gateway, with_key(key)).json()["id"]
    for name in (first, second):
        for headers in ({"authorization": f"Bearer {key}"}, with_key(key), with_key(key, NOBODY)):
            with client(gateway, headers) as session:
                assert session.get(f"/responses/{name}").status_code == 200
                follow = session.post("/responses", json={**BODY, "previous_response_id": name})
                assert follow.status_code == 200
    items = [{"type": "item_reference", "id": each} for each in (mine, first)]
    mixed = post(gateway, with_key(key), {**OWN, "input": items})
    assert error(mixed) == (400, "invalid_request")
    assert len(own.requests) == 1
    sent = {request.header("authorization") for request in upstream.requests}
    assert sent == {f"Bearer {UPSTREAM_KEY}"}


def test_a_login_keeps_its_objects_when_its_token_is_replaced(
    gateway: Gateway, own: Upstream, key: str
) -> None:
    name = post(gateway, with_key(key, **login("user-1", iat=1))).json()["id"]
    with client(gateway, with_key(key, **login("user-1", iat=2))) as session:
        assert session.get(f"/responses/{name}").status_code == 200
    for headers in (
        login("user-2", iat=1),
        login("user-1", "another-workspace", iat=1),
        login("user-1", iat=1) | {"authorization": "Bearer a.b.c"},
    ):
        with client(gateway, with_key(key, **headers)) as session:
            assert session.get(f"/responses/{name}").status_code == 404


def test_a_claim_of_another_credential_changes_nothing(
    gateway: Gateway, own: Upstream, key: str
) -> None:
    """The upstream gives an id to one client that it has given to another before."""
    for tokens, headers in ((1, with_key(key)), (500, with_key(key, NOBODY))):
        used = {"input_tokens": tokens, "output_tokens": tokens}
        own.script = json_answer(response_object("x", used, id="resp_same", output=[]))
        assert post(gateway, headers).status_code == 200
    with client(gateway, with_key(key)) as session:
        assert session.get("/responses/resp_same").status_code == 200
    with client(gateway, with_key(key, NOBODY)) as session:
        assert session.get("/responses/resp_same").status_code == 404
        assert session.delete("/responses/resp_same").status_code == 404
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        (row,) = database.execute("SELECT tokens FROM stored_objects WHERE id = 'resp_same'")
    assert row == (2,)


# ── Changes of the settings ──────────────────────────────────────────────────────────────────────


def test_a_reload_that_changes_whose_credential_an_upstream_gets(
    make_gateway: MakeGateway, upstream: Upstream, own: Upstream
) -> None:
    """What was stored with one is not asked for with the other; a request that is in flight goes
    on as it began."""
    own.script = ResponseStore()
    clients = table(own, "clients", credentials="client")
    gateway = make_gateway(settings_of(clients)).start()
    key = gateway.new_key()
    name = post(gateway, with_key(key), BODY).json()["id"]
    began, may_end = threading.Event(), threading.Event()
    store = own.script

    async def slow(request: Received, reply: Reply) -> None:
        began.set()
        await reply.wait(may_end)
        await store(request, reply)

    own.script = slow
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(gateway, with_key(key), BODY)))
    thread.start()
    assert began.wait(60)
    reload(gateway, settings_of(table(own, "clients")))
    may_end.set()
    thread.join()
    own.script = store
    assert answers[0].status_code == 200
    with client(gateway, with_key(key)) as session:
        assert session.get(f"/responses/{name}").status_code == 503, "it is kept, but unreachable"
        follow = session.post("/responses", json={**BODY, "previous_response_id": name})
        assert follow.status_code == 503
        operators = session.post("/responses", json=BODY).json()["id"]
        assert session.get(f"/responses/{operators}").status_code == 200
    sent = [request.header("authorization") for request in own.requests]
    assert sent == [API_KEY] * 2 + [f"Bearer {UPSTREAM_KEY}"] * 2
    reload(gateway, settings_of(clients))
    with client(gateway, with_key(key)) as session:
        assert session.get(f"/responses/{operators}").status_code == 503
        assert session.get(f"/responses/{name}").status_code == 200
    assert own.requests[-1].header("authorization") == API_KEY
    assert sum(row["credentials"] == "client" for row in gateway.rows()) == 2
    gateway.cli("upstream", "rest", "clients")
    assert post(gateway, with_key(key), BODY).status_code == 503
    reload(gateway, settings_of(table(own, "clients") | {"api_key_env": ""}))
    assert post(gateway, with_key(key), BODY).status_code == 200, "its health was another key's"


def test_an_estimate_is_not_asked_for_with_the_operators_credential(
    make_gateway: MakeGateway, own: Upstream
) -> None:
    """A reader of the response breaks off when the upstream gets the operator's by now."""
    begun = response_pieces(["Hello"])[:3]
    began, may_end = threading.Event(), threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "GET":
            await reply.head(200, {"content-type": "text/event-stream"})
            await reply.send(begun[0])
            began.set()
            await reply.wait(may_end)
            reply.tear()
        else:
            await stream(begun, end="tear")(request, reply)

    own.script = script
    gateway = make_gateway(settings_of(table(own, "x", credentials="client"))).start()
    gateway.cli("price", "add", BODY["model"], "--input", "1", "--output", "1")
    headers = with_key(gateway.new_key())

    def read(path: str) -> None:
        with client(gateway, headers) as session, contextlib.suppress(httpx2.HTTPError):
            session.get(path)

    with contextlib.suppress(httpx2.HTTPError):
        post(gateway, headers, {**BODY, "stream": True, "store": True})
    path = f"/responses/{gateway.row()['response_id']}?stream=true"
    thread = threading.Thread(target=read, args=(path,))
    thread.start()
    assert began.wait(60)
    reload(gateway, settings_of(table(own, "x")))
    may_end.set()
    thread.join()
    gateway.terminate()
    assert {request.header("authorization") for request in own.requests} == {API_KEY}
    assert [request.method for request in own.requests] == ["POST", "GET"]


def test_the_gateway_asks_such_an_upstream_for_nothing(own: Upstream) -> None:
    async def ask_it() -> tuple[int, Report]:
        settings = UpstreamSettings(name="clients", base_url=own.url, credentials="client")
        upstream = configured.Upstream(settings)
        try:
            return await ask(upstream, "/responses/resp_1", "acct_1")
        finally:
            await upstream.close()

    status, report = asyncio.run(ask_it())
    assert (status, report.response_id) == (0, None)
    assert not own.requests


# ── What it costs ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("billing", ["price", "free"])
def test_a_seat_can_cost_nothing(make_gateway: MakeGateway, own: Upstream, billing: str) -> None:
    gateway = make_gateway(
        settings_of(
            table(own, "clients", models=["gpt-up"], credentials="client", billing=billing),
            billing={"unpriced_models": "refuse", "default_credit_limit": "0"},
        )
    ).start()
    key = gateway.new_key()
    answer = post(gateway, with_key(key), BODY)
    with client(gateway, with_key(key)) as session:
        listed = [each["id"] for each in session.get("/models").json()["data"]]
        assert listed == ([] if billing == "price" else ["gpt-up"])
        assert session.get("/models/gpt-up").status_code == (404 if billing == "price" else 200)
    if billing == "price":
        assert error(answer) == (404, "model_not_found"), "it has no price"
        return
    assert answer.status_code == 200
    row = gateway.row()
    assert (float(row["cost"]), row["price_id"]) == (0, None)
    assert row["input_tokens"] == 30
    gateway.cli("price", "add", "gpt-up", "--input=1000", "--output=1000")
    assert post(gateway, with_key(key), BODY).status_code == 200, "nothing is held"
    assert [float(row["cost"]) for row in gateway.rows()] == [0, 0]


def test_a_seat_costs_by_price(make_gateway: MakeGateway, own: Upstream) -> None:
    gateway = make_gateway(
        settings_of(
            table(own, "clients", credentials="client"), billing={"unpriced_models": "refuse"}
        )
    ).start()
    gateway.cli("price", "add", "gpt-up", "--input=1", "--output=1")
    assert post(gateway, with_key(gateway.new_key()), BODY).status_code == 200
    assert float(gateway.row()["cost"]) > 0


def test_an_estimate_is_corrected_when_its_client_fetches_the_response(
    make_gateway: MakeGateway, own: Upstream
) -> None:
    """The gateway can't ask for it by itself."""
    gateway = make_gateway(settings_of(table(own, "clients", credentials="client"))).start()
    gateway.cli("price", "add", "gpt-up", "--input=1", "--output=1")
    key = gateway.new_key()
    own.script = stream(response_pieces(["Hello"])[:3], end="tear")
    with pytest.raises(httpx2.RemoteProtocolError):
        post(gateway, with_key(key), {**BODY, "stream": True})
    own.script = json_answer(response_object())
    with client(gateway, with_key(key, NOBODY)) as session:
        assert session.get("/responses/resp_1").status_code == 404
    assert gateway.row()["usage_source"] == "estimated"
    with client(gateway, with_key(key)) as session:
        assert session.get("/responses/resp_1").status_code == 200
    row = gateway.row()
    assert (row["usage_source"], row["input_tokens"]) == ("upstream", 30)
    assert row["corrected_at"]
    gateway.terminate()
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        (stored,) = database.execute(
            "SELECT likely_tokens, length(credential) FROM stored_objects WHERE id = 'resp_1'"
        )
    assert stored == (39, 32)


def test_a_seat_that_costs_nothing_is_not_corrected_to_cost_something(
    make_gateway: MakeGateway, own: Upstream
) -> None:
    free = table(own, "clients", credentials="client", billing="free")
    gateway = make_gateway(settings_of(free)).start()
    gateway.cli("price", "add", "gpt-up", "--input=1000", "--output=1000")
    key = gateway.new_key()
    own.script = stream(response_pieces(["Hello"])[:3], end="tear")
    with pytest.raises(httpx2.RemoteProtocolError):
        post(gateway, with_key(key), {**BODY, "stream": True})
    own.script = json_answer(response_object())
    with client(gateway, with_key(key)) as session:
        assert session.get("/responses/resp_1").status_code == 200
    row = gateway.row()
    assert (row["usage_source"], float(row["cost"])) == ("estimated", 0)


def test_an_idempotency_key_is_the_credentials(gateway: Gateway, own: Upstream, key: str) -> None:
    """Otherwise an upstream could send two clients the same response."""
    more = {"idempotency-key": "1"}
    for authorization in (API_KEY, NOBODY, API_KEY):
        assert post(gateway, with_key(key, authorization, **more)).status_code == 200
    first, second, third = (request.header("idempotency-key") for request in own.requests)
    assert first == third != second


def test_limits_hold_for_a_seat(gateway: Gateway, own: Upstream) -> None:
    key = gateway.new_key("limited", requests_per_minute=1)
    assert post(gateway, with_key(key)).status_code == 200
    assert post(gateway, with_key(key)).status_code == 429
    assert len(own.requests) == 1


def test_rows_of_earlier_versions_name_no_credentials(gateway: Gateway, key: str) -> None:
    assert post(gateway, with_key(key), BODY).status_code == 200
    wait_until(lambda: gateway.row()["outcome"] == "completed")
    gateway.terminate()
    with sqlite3.connect(gateway.database) as database:
        (kinds,) = database.execute("SELECT count(*) FROM requests WHERE credentials = 'operator'")
    assert kinds == (1,)
    csv = gateway.run("usage", "--csv").stdout.splitlines()
    assert csv[0].endswith(",credentials")
    assert csv[1].endswith(",operator")
