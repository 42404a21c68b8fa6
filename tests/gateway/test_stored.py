"""Promise 7: what the upstream stores is its account's, and for all others it does not exist."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
import sqlite3
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.gateway.errors import error
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.response_store import BODY, ResponseStore, create
from tests.helpers.speed import process_seconds
from tests.helpers.upstream import (
    RESPONSE_USAGE,
    Received,
    Reply,
    Upstream,
    event,
    json_answer,
    response_object,
    stream,
)

pytestmark = pytest.mark.promise_7

UNKNOWN = "resp_0123456789abcdef"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.front_door
def test_its_owner_reaches_a_response_with_any_key(
    gateway: Gateway, upstream: Upstream, stored: ResponseStore, key: str, streamed: bool
) -> None:
    with gateway.client(key) as client:
        answer = client.post("/responses", json={**BODY, "stream": streamed})
    assert "resp_00000001" in answer.text
    with gateway.client(gateway.new_key()) as client:
        shown = client.get("/responses/resp_00000001?include[]=x&include[]=y")
        assert shown.json() == stored.responses["resp_00000001"]
        assert upstream.requests[-1].path == "/v1/responses/resp_00000001?include[]=x&include[]=y"
        items = client.get("/responses/resp_00000001/input_items", params={"limit": 2})
        assert items.json()["data"] == [{"id": "msg_in"}]
        assert upstream.requests[-1].path.endswith("/input_items?limit=2")
        for more in (
            {"previous_response_id": "resp_00000001"},
            {"prompt_cache_options": {"comparison_response_id": "resp_00000001"}},
            {"input": [{"type": "item_reference", "id": "msg_00000001"}]},
            {"input": [{"id": "msg_00000001"}]},
        ):
            assert client.post("/responses", json={**BODY, **more}).status_code == 200, more
        assert client.post("/responses/resp_00000001/cancel").status_code == 200
        assert client.delete("/responses/resp_00000001").json()["deleted"]
        assert error(client.get("/responses/resp_00000001"))[:2] == (404, "response_not_found")
    assert len(gateway.rows()) == 5, "looking is no request of the ledger"


METHODS = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]


def test_every_route_for_everyone(
    gateway: Gateway, upstream: Upstream, stored: ResponseStore
) -> None:
    own, other = gateway.new_key(), gateway.new_key("other")
    revoked = gateway.cli("key", "add", "test")
    gateway.cli("key", "revoke", revoked["id"])
    made = create(gateway, own)["id"]
    posts = [
        ("/chat/completions", {"model": "m", "messages": []}),
        ("/responses", BODY),
        ("/responses/compact", BODY),
        ("/responses/input_tokens", BODY),
        ("/images/generations", {"prompt": "x"}),
        ("/images/edits", {"prompt": "x"}),
    ]
    upstream.script = json_answer({"id": made, "object": "response", "data": []})
    routes: list[tuple[str, str, Any]] = [("POST", *post) for post in posts]
    routes += [("GET", "/models", None), ("GET", "/models/m", None)]
    routes += [(method, f"/responses/{made}{suffix}", None) for method, suffix in METHODS]
    for method, path, body in routes:
        seen = len(upstream.requests)
        for key in (None, "sk-redbtc-wrong", revoked["key"]):
            headers = {"authorization": f"Bearer {key}"} if key else {"authorization": ""}
            with gateway.client(own) as client:
                answer = client.request(method, path, json=body, headers=headers)
            assert error(answer)[:2] == (401, "invalid_api_key"), (method, path, key)
        assert len(upstream.requests) == seen
        with gateway.client(other) as client:
            answer = client.request(method, path, json=body)
        if made in path:
            assert error(answer)[:2] == (404, "response_not_found")
            assert len(upstream.requests) == seen
        else:
            assert answer.status_code == 200, (path, answer.text)
    for method, suffix in sorted(METHODS, reverse=True):  # DELETE comes last but for GET
        with gateway.client(own) as client:
            answer = client.request(method, f"/responses/{made}{suffix}")
        assert answer.status_code in (200, 404)


BODIES = {
    "of another account": b'{"previous_response_id": "resp_00000002"}',
    "another request": b"GET /v1/files HTTP/1.1\r\nhost: a\r\n\r\n",
    "no JSON": b"\x00\xff",
    "large": b"x" * 100_000,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_means_nothing_reaches_nobody(
    gateway: Gateway, upstream: Upstream, stored: ResponseStore, name: str, chunked: bool
) -> None:
    """RFC 9110 §9.3.1, §9.3.5: the body is read and thrown away, and the connection stays open."""
    own, body = gateway.new_key(), BODIES[name]
    made = create(gateway, own)["id"]
    create(gateway, gateway.new_key("other"))
    seen = len(upstream.requests)
    with gateway.client(own, limits=httpx2.Limits(max_connections=1)) as client:
        for method, suffix in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
            content = iter([body[:5], body[5:]]) if chunked else body
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            path = f"/responses/{made}{suffix}"
            answer = client.request(method, path, content=content, headers=headers)
            assert answer.status_code == 200, answer.text
    sent = upstream.requests[seen:]
    assert [request.method for request in sent] == ["GET", "GET", "DELETE"]
    for request in sent:
        assert request.body == b""
        assert request.header("content-length") is None
        assert request.header("transfer-encoding") is None
        assert request.header("content-encoding") is None


def test_a_body_that_means_nothing_has_its_bounds(
    make_gateway: MakeGateway, upstream: Upstream, stored: ResponseStore
) -> None:
    gateway = make_gateway("max_body_bytes = 2048\n").start()
    key = gateway.new_key()
    made = create(gateway, key)["id"]
    with gateway.client(key) as client:
        answer = client.request("DELETE", f"/responses/{made}", content=b"x" * 3000)
        assert error(answer)[:2] == (413, "request_too_large")
        assert client.get(f"/responses/{made}").status_code == 200, "it is still there"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 200),
        (b"{}", {"content-type": "application/json"}, 200),
        (b' {"x": 1}\n', {}, 200),
        (b'{"previous_response_id": "resp_00000002"}', {}, 404),
        (b"{", {}, 400),
        (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"--b\r\n", {"content-type": "multipart/form-data; boundary=b"}, 415),
        (gzip.compress(b"{}", mtime=0), {"content-encoding": "gzip"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
    ],
)
def test_of_a_body_to_cancel_only_what_was_checked_goes_on(
    gateway: Gateway,
    upstream: Upstream,
    stored: ResponseStore,
    body: bytes,
    headers: dict[str, str],
    status: int,
) -> None:
    own = gateway.new_key()
    made = create(gateway, own)["id"]
    create(gateway, gateway.new_key("other"))
    seen = len(upstream.requests)
    with gateway.client(own) as client:
        answer = client.post(f"/responses/{made}/cancel", content=body, headers=headers)
    assert answer.status_code == status
    assert [request.body for request in upstream.requests[seen:]] == [body] * (status == 200)


def test_anothers_response_is_answered_like_one_that_never_was(
    gateway: Gateway, stored: ResponseStore
) -> None:
    made = create(gateway, gateway.new_key())["id"]
    with gateway.client(gateway.new_key("other")) as client:
        for method, suffix in METHODS:
            answers = [
                client.request(method, f"/responses/{name}{suffix}") for name in (made, UNKNOWN)
            ]
            theirs, never = (
                a.text.replace(n, "ID") for a, n in zip(answers, (made, UNKNOWN), strict=True)
            )
            assert theirs == never
            names = [[name for name, _ in answer.headers.raw] for answer in answers]
            assert names[0] == names[1]
        bodies = [{**BODY, "previous_response_id": name} for name in (made, UNKNOWN)]
        refused = [client.post("/responses", json=body) for body in bodies]
        assert {error(each) for each in refused} == {
            (404, "response_not_found", "previous_response_id")
        }
        times: dict[str, list[float]] = {made: [], UNKNOWN: []}
        for _ in range(150):
            for name, spent in times.items():
                began = process_seconds(gateway.pid)
                client.get(f"/responses/{name}")
                spent.append(process_seconds(gateway.pid) - began)
    slower = statistics.median(times[made]) / statistics.median(times[UNKNOWN])
    assert 0.8 < slower < 1.25


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../models",
        "..%2fmodels",
        "%2e%2e%2ffiles",
        "resp_1%00",
        "resp_1%0d%0aX",
        "a" * 300,
        "resp_1?x",
        "resp_1/cancel/x",
        "resp_1%2fcancel",
        "sqlite';--",
    ],
)
def test_no_path_climbs(gateway: Gateway, upstream: Upstream, key: str, path: str) -> None:
    head = f"GET /v1/responses/{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n"
    assert gateway.raw(head.encode()).startswith(b"HTTP/1.1 404 ")
    assert not upstream.requests


FIELDS = (
    "previous_response_id",
    "comparison_response_id",
    "conversation",
    "file_id",
    "file_ids",
    "vector_store_id",
    "vector_store_ids",
    "container",
    "container_id",
    "skill_id",
    "tunnel_id",
)
OBJECTS = ("conversation", "container", "prompt", "audio", "voice")


def planted(chance: random.Random, foreign: str) -> bytes:
    """A body that names the object somewhere, in one of the ways there are."""
    way = chance.randrange(5)
    if way == 0:
        name = chance.choice(FIELDS)
        value: Any = [foreign] if name.endswith("s") else foreign
        reference: Any = {name: value}
    elif way == 1:
        reference = {chance.choice(OBJECTS): {"version": "1", "id": foreign}}
    elif way == 2:
        reference = {"type": "item_reference", "id": foreign}
    elif way == 3:  # within another one, and beside it
        inner = {"file_ids": [foreign]}
        reference = {chance.choice(OBJECTS): chance.choice([{"x": inner}, {"id": 1, **inner}])}
    else:
        kind = chance.choice(["reasoning", "image_generation_call", None, "compaction", "x_call"])
        item: dict[str, Any] = {"id": foreign, "type": kind}
        item |= {"summary": [], "encrypted_content": None}
        if kind == "x_call":
            del item["summary"], item["encrypted_content"]
        text = json.dumps({**BODY, "input": [{"role": "user", "content": "x"}, item]})
        return text.encode()
    for _ in range(chance.randrange(6)):
        wrapped = [{"a": 'x"file_id', **reference}, [reference], {"b": reference}]
        reference = chance.choice(wrapped)
        reference = {"deeper": reference}
    body = {**BODY, "z": "é", **reference}
    if chance.random() < 0.3:
        body = {**reference, **BODY}
    text = json.dumps(body, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.2:
        text = text.replace("_id", "\\u005fid").replace("_reference", "\\u005Freference")
    if chance.random() < 0.2:
        text = text.replace('":', '" \n\t:')
    if chance.random() < 0.1:
        text = text.replace("file_id", "File_ID").replace("previous_", "PREVIOUS_")
    if chance.random() < 0.1:
        text = text.replace("previous_res", "previous_reſ").replace("skill", "s\u212aill")
    return text.encode()


def test_no_planted_id_reaches_the_upstream(
    gateway: Gateway, upstream: Upstream, stored: ResponseStore
) -> None:
    theirs = create(gateway, gateway.new_key())
    ids = [theirs["id"], theirs["output"][0]["id"], "file-123", "conv_1", UNKNOWN]
    seen, chance = len(upstream.requests), random.Random(7)
    paths = ["/responses", "/responses/compact", "/responses/input_tokens", "/images/generations"]
    paths += ["/chat/completions", "/images/edits"]
    with gateway.client(gateway.new_key("other")) as client:
        for _ in range(600):
            body = planted(chance, chance.choice(ids))
            path = chance.choice(paths if b'"input"' not in body else paths[:3])
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 404), (path, body)
            assert answer.json()["error"].get("param"), (path, body)
    assert len(upstream.requests) == seen


CONTENTS: list[Any] = [
    *([], [{}], [{"text": ""}], [{"text": None}], ["x"]),
    *("", "x", {}, {"text": "x"}),
]
ITEMS: list[Any] = [
    {"id": "X", "role": "user"},
    {"id": "X", "role": "user", "content": None},
    {"id": "X", "role": "nobody", "content": "x"},
    {"id": "X", "type": "web_search_call", "status": "completed"},
    {"id": "X", "type": "web_search_call", "status": "completed", "x": 0},
    {"id": "X", "type": "code_interpreter_call", "code": "1"},
    {"id": "X", "type": "reasoning", "summary": [], "encrypted_content": None},
    *(
        {"id": "X", "type": kind, "content": content}
        for kind in ("reasoning", "compaction")
        for content in CONTENTS
    ),
    {"id": "X", "type": "image_generation_call", "result": "x"},
    {"id": "X", "type": "image_generation_call", "status": "failed", "result": None},
    {"id": "X", "type": "mcp_call", "status": "completed", "output": "x", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "X", "approve": True},
    {"type": "tool_search_output", "tools": [{"type": "file_search", "vector_store_ids": ["X"]}]},
    {"ID": "X"},
]


@pytest.mark.parametrize("item", ITEMS)
def test_no_item_is_anothers(
    gateway: Gateway, upstream: Upstream, item: Any, stored: ResponseStore
) -> None:
    """This holds whatever members the item has, if the upstream could look it up. The answer is the
    same as for an id that does not exist."""
    own, other = gateway.new_key(), gateway.new_key("other")
    made = create(gateway, own)["output"][0]["id"]
    body = json.dumps({**BODY, "input": [item]}).replace('"X"', f'"{made}"')
    headers = {"content-type": "application/json"}
    seen = len(upstream.requests)
    with gateway.client(other) as client:
        theirs = client.post("/responses", content=body, headers=headers)
        never = client.post("/responses", content=body.replace(made, "id_0123"), headers=headers)
        assert theirs.status_code == never.status_code == 400
        assert theirs.content == never.content
        assert len(upstream.requests) == seen
    if "ID" not in item:
        with gateway.client(own) as client:
            assert client.post("/responses", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","input":[{"type":"message","id":"msg_1","type":"reasoning","summary":[]}]}',
        '{"model":"m","input":[{"type":"item_reference","id":"msg_1", "id":"msg_2"}]}',
        '{"model":"m","input":{"id":"msg_1"}}',
        '{"model":"m","input":"x","prompt":"p","previous_re\\u017fponse_id":"resp_1"}',
        b'{"model":"m","input":"x","a":{"previous_\xffresponse_id":"resp_1"}}',
        '{"model":"m","input":[' + '{"file_id":"x%d"},' * 1001 % tuple(range(1001)) + "{}]}",
        '{"model":"m","input":"x","voice":[{"id":"voice_1"}]}',
        '{"model":"m","input":"x","audio":[{"file_ids":["file_1"]}]}',
        '{"model":"m","ſtream":true,"input":"x"}',
        '{"model":"m","input":[{"type":"item_reference","id":"msg_1","ID":"msg_2"}]}',
        '{"model":"m","input":[{"type":"message","role":"user","content":"x","id":"a","Type":"b"}]}',
        '{"model":"m","input":[{"role":"user","content":[{"file_id":"f"}],"content":"x"}]}',
        '{"model":"m","input":[{"type":"message","role":"assistant","id":"msg_1"}]}',
        '{"model":"m","input":"x","text":[{"file_id":"f"}]}',
        '{"model":"m","input":"x","text":{"format":{"schema":{},"file_id":"f"}}}',
        '{"model":"m","input":"x","text":{"format":{"file_id":"f"},"format":{}}}',
        '{"model":"m","input":"x","tools":[{"type":"function","function":{"file_id":"f"}}]}',
        '{"model":"m","input":"x","tools":[{"type":"mcp","tunnel_id":"f"}]}',
        '{"model":"m","input":"x","tools":{"0":{"vector_store_ids":["vs_1"]}}}',
        '{"model":"m","input":[{"type":"additional_tools","tools":{"file_id":"f"}}]}',
        '{"model":"m","input":[{"type":"additional_tools","id":"at_1","role":"developer"}]}',
        '{"model":"m","input":[{"type":"additional_tools","id":"at_1","tools":null}]}',
        '{"model":"m","input":[{"type":"configuration_update","id":"cu_1"}]}',
        '{"model":"m","input":[{"type":"agent_message","id":"am_1","author":"/root"}]}',
        '{"model":"m","input":"x","tools":' + '[{"tools":' * 9 + "[]" + "}]" * 9 + "}",
    ],
)
def test_no_other_way_to_write_a_reference(
    gateway: Gateway, upstream: Upstream, key: str, body: str | bytes
) -> None:
    content = body.encode() if isinstance(body, str) else body
    with gateway.client(key) as client:
        headers = {"content-type": "application/json"}
        assert client.post("/responses", content=content, headers=headers).status_code == 400
    assert not upstream.requests


@pytest.mark.parametrize("name", ["previous_response_id", "file_id", "conversation"])
def test_notes_hide_no_reference(gateway: Gateway, upstream: Upstream, key: str, name: str) -> None:
    """Not even by being its name, or equal to where it stands."""
    inner = {name: "x_1"}
    with gateway.client(key) as client:
        for metadata in (name, inner, [inner]):
            for body in ({**inner, "metadata": metadata}, {"a": inner, "metadata": metadata}):
                answer = client.post("/responses", json={**BODY, **body})
                assert answer.status_code in (400, 404)
                assert error(answer)[2] == name
    assert not upstream.requests


def test_a_query_has_few_fields(gateway: Gateway, upstream: Upstream) -> None:
    """Each `after` is looked up: 1,400 of them, all its own, held the loop for 30 ms."""
    key = gateway.new_key()
    made = response_object()
    upstream.script = json_answer(made)
    create(gateway, key)
    after = f"after={made['id']}"
    with gateway.client(key) as client:
        for field, count, status in ((after, 100, 200), (after, 101, 400), ("a", 30_000, 400)):
            query = "&".join([field] * count)
            answer = client.get(f"/responses/{made['id']}/input_items?{query}")
            assert answer.status_code == status, answer.text
            assert status == 200 or "100 fields" in answer.json()["error"]["message"]


def test_own_objects_may_have_any_name(gateway: Gateway, upstream: Upstream) -> None:
    """Upstreams that are gateways themselves have names of their own."""
    item = {"id": "rs:1.a", "type": "reasoning", "summary": []}
    made = response_object(id="resp_bGl0ZWxsbQ==", output=[item])
    upstream.script = json_answer(made)
    create(gateway, gateway.new_key())
    with gateway.client(gateway.new_key()) as client:
        assert client.get(f"/responses/{made['id']}").json() == made
        body = {**BODY, "previous_response_id": made["id"], "input": [item]}
        assert client.post("/responses", json=body).status_code == 200
    with gateway.client(gateway.new_key("other")) as client:
        assert client.get(f"/responses/{made['id']}").status_code == 404
        for more in ({"input": [item]}, {"previous_response_id": made["id"]}):
            assert client.post("/responses", json={**BODY, **more}).status_code in (400, 404)


def test_listed_input_items_can_be_referred_to(gateway: Gateway, stored: ResponseStore) -> None:
    made = create(gateway, gateway.new_key())["id"]
    body = {**BODY, "input": [{"type": "item_reference", "id": "msg_in"}]}
    with gateway.client(gateway.new_key()) as client:
        assert client.post("/responses", json=body).status_code == 400
        client.get(f"/responses/{made}/input_items")
        assert client.post("/responses", json=body).status_code == 200
    with gateway.client(gateway.new_key("other")) as client:
        assert client.post("/responses", json=body).status_code == 400


@pytest.mark.parametrize(
    "more",
    [
        {"metadata": {"conversation": "c-42", "file_id": "f", "container": "docker"}},
        {"tools": [{"type": "function", "parameters": {"examples": [{"container": "web"}]}}]},
        {
            "tools": [
                {"type": "function", "function": {"parameters": {"default": {"file_id": "f"}}}}
            ]
        },
        {"tools": [{"type": "mcp", "headers": {"conversation": "c1"}, "server_url": "http://x"}]},
        {
            "text": {
                "format": {"type": "json_schema", "schema": {"examples": [{"voice": {"id": "x"}}]}}
            }
        },
        {"response_format": {"json_schema": {"schema": {"default": {"file_id": "f"}}}}},
        {"input": [{"type": "tool_search_call", "id": "ts_1", "arguments": {"container": "web"}}]},
        {
            "input": [
                {
                    "type": "tool_search_output",
                    "tools": [{"parameters": {"default": {"file_id": "f"}}}],
                }
            ]
        },
        {"input": [{"type": "local_shell_call", "action": {"env": {"container": "docker"}}}]},
        {"input": [{"type": "reasoning", "id": "rs_1", "content": [{"text": "gpt-oss"}]}]},
        {"input": [{"type": "reasoning", "id": "rs_1", "content": [{"text": "y" * 90_000}]}]},
        {
            "input": [
                {"type": "reasoning", "id": f"rs_{n}", "encrypted_content": "x"}
                for n in range(1200)
            ]
        },
        {"input": "half a character: \ud83d"},
        {"text": {"format": {"schema": {"enum": ["item_reference", "file_id"]}}}},
        {"input": "item_reference"},
        {"input": [{"type": "web_search_call", "status": "x", "action": {}}]},
        {"input": 'I say "previous_response_id": "resp_1" and \\"file_id\\": "x"'},
        {"metadata": {"note": "conversation"}, "prompt": "a picture", "user": "file_id"},
        {"tools": [{"parameters": {"properties": {"file_id": {"type": "string"}}}}]},
        {"tools": [{"parameters": {"properties": {"conversation": {"type": "object"}}}}]},
        {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        {"file_ids": [], "previous_response_id": None, "conversation": None},
        {"input": [{"type": "reasoning", "id": "rs_1", "encrypted_content": "x", "summary": []}]},
        {"input": [{"type": "function_call", "id": "fc_1", "arguments": '{"file_id": "x"}'}]},
        {"input": [{"type": "message", "id": "msg_1", "role": "user", "content": "x"}]},
        {"input": [{"type": "additional_tools", "id": "at_1", "tools": []}]},
        {"input": [{"type": "configuration_update", "id": "cu_1", "reasoning": {}}]},
        {"input": [{"type": "agent_message", "id": "am_1", "author": "/root", "content": []}]},
        {"input": "\u00e9 \\u005f"},
    ],
)
def test_what_only_looks_like_a_reference_passes(
    gateway: Gateway, upstream: Upstream, key: str, more: dict[str, Any]
) -> None:
    body = json.dumps({**BODY, **more}).encode()
    with gateway.client(key) as client:
        answer = client.post(
            "/responses", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200, answer.text
    assert upstream.requests[-1].body == body


def test_a_form_names_no_stored_file(gateway: Gateway, upstream: Upstream, key: str) -> None:
    with gateway.client(key) as client:
        for name in ("file_id", "image[0][file_id]", "mask[file_id]"):
            answer = client.post(
                "/images/edits", files={"image": ("a.png", b"x"), name: (None, "file-1")}
            )
            assert error(answer) == (400, "invalid_request", "file_id")
    assert not upstream.requests


def test_a_response_is_reached_at_its_own_upstream(make_gateway: MakeGateway) -> None:
    with Upstream() as one, Upstream() as two:
        stores = [ResponseStore(), ResponseStore()]
        stores[1]._numbers = itertools.count(1000)
        one.script, two.script = stores
        upstreams = [
            {"name": name, "base_url": up.url, "api_key_env": "", "models": [f"{name}-*"]}
            for name, up in (("one", one), ("two", two))
        ]
        gateway = make_gateway({"server": {}, "upstreams": upstreams}).start()
        key = gateway.new_key()
        first = create(gateway, key, model="one-m")["id"]
        second = create(gateway, key, model="two-m")["id"]
        with gateway.client(key) as client:
            assert client.get(f"/responses/{second}").json()["model"] == "two-m"
            both = {"previous_response_id": first, "file": {"comparison_response_id": second}}
            answer = client.post("/responses", json={**BODY, "model": "one-m", **both})
            assert error(answer)[:2] == (400, "invalid_request")
            onto = {**BODY, "previous_response_id": second}
            answer = client.post("/responses", json={**onto, "model": "one-m"})
            assert error(answer)[:2] == (404, "model_not_found")
            assert client.post("/responses", json={**onto, "model": "two-m"}).status_code == 200


def test_tools_of_an_earlier_input_are_checked_held_and_billed(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """However long the chain, by whichever key, after a restart as well."""
    gateway = make_gateway('[billing]\nunpriced_models = "refuse"').start()
    for model, price in (("gpt-up", "1"), ("gpt-image-dear", "1000")):
        gateway.cli("price", "add", model, "--input", price, "--output", price)
    key, numbers = gateway.new_key(), itertools.count(1)
    limited = gateway.cli("key", "add", "test", "--models", "gpt-up")["key"]
    poor = gateway.new_key("poor")
    drawn = {"image_gen": {"input_tokens": 0, "output_tokens": 1000}}

    async def script(request: Received, reply: Reply) -> None:
        more: dict[str, Any] = {"id": f"resp_{next(numbers)}", "output": [], "tool_usage": drawn}
        await json_answer(response_object(conversation={"id": "conv_1"}, **more))(request, reply)

    upstream.script = script
    tool = {"type": "image_generation", "model": "gpt-image-dear"}
    made = create(gateway, key, conversation=None)
    offered = [{"type": "additional_tools", "tools": [tool]}, {"role": "user", "content": "x"}]
    create(gateway, key, input=offered, previous_response_id=made["id"])
    gateway.kill()
    gateway.start()
    for onto in ({"previous_response_id": "resp_2"}, {"conversation": "conv_1"}):
        made = create(gateway, key, **onto)
        assert float(gateway.rows()[-1]["cost"]) > 1, "of the tool's model"
        for again in (onto, {"previous_response_id": made["id"]}):
            with gateway.client(limited) as client:
                answer = client.post("/responses", json={**BODY, **again})
                assert error(answer)[:2] == (403, "model_not_allowed")
    with gateway.client(limited) as client:
        answer = client.post("/responses", json={**BODY, "previous_response_id": "resp_1"})
        assert answer.status_code == 200, "it was made before the tool was offered"
    gateway.api("PATCH", "/accounts/poor", {"credit_limit": "0"})
    gateway.cli("payment", "add", "poor", "1")
    with gateway.client(poor) as client:
        assert client.post("/responses", json=BODY).status_code == 200
        assert error(client.post("/responses", json={**BODY, "input": offered}))[0] == 429


PAINTERS = {"gpt-up": "1", "gpt-image-cheap": "1", "gpt-image-dear": "1000"}  # and their prices


@pytest.mark.parametrize("by_name", ["previous_response_id", "conversation"])
def test_a_later_request_takes_no_model_from_what_is_built_on(
    make_gateway: MakeGateway, upstream: Upstream, by_name: str
) -> None:
    """It can name the same response (idempotency-key) or conversation."""
    gateway = make_gateway('[billing]\nunpriced_models = "refuse"').start()
    for model, price in PAINTERS.items():
        gateway.cli("price", "add", model, "--input", price, "--output", price)
    key = gateway.new_key()
    narrow = gateway.cli("key", "add", "test", "--models", "gpt-up,gpt-image-cheap")["key"]
    upstream.script = json_answer(response_object(output=[], conversation={"id": "conv_1"}))
    again = {by_name: "conv_1" if by_name == "conversation" else "resp_1"}
    for model in ("gpt-image-dear", "gpt-image-cheap"):
        tools = [{"type": "image_generation", "model": model}]
        create(gateway, key, input=[{"type": "additional_tools", "tools": tools}])
    for _ in range(2):
        with gateway.client(narrow) as client:
            answer = client.post("/responses", json={**BODY, **again})
            assert error(answer)[:2] == (400, "invalid_request"), "the tools' models differ"
        gateway.kill()
        gateway.start()


def test_an_svgs_author_hides_no_image_model(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway('[billing]\nunpriced_models = "refuse"').start()
    for model, price in PAINTERS.items():
        gateway.cli("price", "add", model, "--input", price, "--output", price)
    dear = {"type": "image_generation", "model": "gpt-image-dear"}
    cheap = {"model": "gpt-image-cheap", "svg": {"model": "gpt-image-dear"}}
    with gateway.client(gateway.new_key()) as client:
        for tools in ([dear, {**dear, **cheap}], [{**dear, **cheap}, dear]):
            for more in (
                {"tools": tools},
                {"input": [{"type": "additional_tools", "tools": tools}]},
                {"tools": tools[1:], "input": [{"type": "additional_tools", "tools": tools[:1]}]},
            ):
                answer = client.post("/responses", json={**BODY, **more})
                assert error(answer)[:2] == (400, "invalid_request")
    assert not upstream.requests


def offer(*tools: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "type": "additional_tools",
            "tools": [{"type": "image_generation", **each} for each in tools],
        }
    ]


def test_a_model_that_makes_pictures_in_a_conversation_still_does(
    make_gateway: MakeGateway, upstream: Upstream
) -> None:
    """It does even if it was named as an SVG's author there as well, at the same time."""
    gateway = make_gateway().start()
    go = threading.Event()

    async def script(request: Received, reply: Reply) -> None:
        if request.json()["input"] != "Hi":
            await reply.wait(go)
        answer = response_object(output=[], conversation={"id": "conv_1"})
        await json_answer(answer)(request, reply)

    upstream.script = script
    cheap, dear = (
        {"model": "gpt-image-cheap", "svg": {"model": "gpt-image-dear"}},
        {"model": "gpt-image-dear"},
    )
    with gateway.client(gateway.new_key()) as client, ThreadPoolExecutor(2) as pool:
        assert client.post("/responses", json=BODY).status_code == 200
        body = {**BODY, "conversation": "conv_1"}
        asked = []
        for tool in (cheap, dear):
            offered = {**body, "input": offer(tool)}
            asked.append(pool.submit(client.post, "/responses", json=offered))
            wait_until(lambda: len(upstream.requests) == 1 + len(asked))
        go.set()
        assert [each.result().status_code for each in asked] == [200, 200]
        answer = client.post("/responses", json=body)
        assert error(answer)[:2] == (400, "invalid_request"), "the tools' models differ"


def test_an_object_keeps_few_models(gateway: Gateway, upstream: Upstream, key: str) -> None:
    """Even if many requests name it (idempotency-key), each with other ones: to add one more would
    take as long as it has models."""
    upstream.script = json_answer(response_object(output=[]))
    for number in range(6):
        authors = [{"model": "gpt-up", "svg": {"model": f"gpt-{number}-{at}"}} for at in range(15)]
        create(gateway, key, input=offer(*authors))
    with contextlib.closing(sqlite3.connect(gateway.database)) as database:
        query = "SELECT models FROM stored_objects WHERE id = 'resp_1'"
        wait_until(lambda: database.execute(query).fetchone())
        assert len(json.loads(database.execute(query).fetchone()[0])) <= 2 * 16
    with gateway.client(key) as client:
        answer = client.post("/responses", json={**BODY, "previous_response_id": "resp_1"})
    assert error(answer)[:2] == (400, "invalid_request")


def test_compact_and_input_tokens(gateway: Gateway, upstream: Upstream, key: str) -> None:
    with gateway.client(key) as client:
        upstream.script = json_answer({"object": "response.input_tokens", "input_tokens": 11})
        assert client.post("/responses/input_tokens", json=BODY).json()["input_tokens"] == 11
        compacted = {"id": "resp_c", "object": "response.compaction", "output": []}
        upstream.script = json_answer({**compacted, "usage": RESPONSE_USAGE})
        assert client.post("/responses/compact", json=BODY).status_code == 200
    counted, compact = gateway.rows()
    assert counted["endpoint"] == "/v1/responses/input_tokens"
    assert (counted["outcome"], counted["usage_source"]) == ("completed", "none")
    assert counted["input_tokens"] is None
    assert compact["endpoint"] == "/v1/responses/compact"
    assert compact["input_tokens"] == RESPONSE_USAGE["input_tokens"]


def test_a_conversation_that_a_response_made_is_its_accounts(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    upstream.script = json_answer(response_object(conversation={"id": "conv_7"}))
    create(gateway, key)
    for conversation in ("conv_7", {"id": "conv_7"}):
        create(gateway, gateway.new_key(), conversation=conversation)
        with gateway.client(gateway.new_key("other")) as client:
            answer = client.post("/responses", json={**BODY, "conversation": conversation})
        assert error(answer) == (400, "invalid_request", "conversation")
    assert len(upstream.requests) == 3


RAN = {"type": "code_interpreter_call", "container_id": "cntr_1", "code": "1", "outputs": None}
CITED = {"type": "container_file_citation", "container_id": "cntr_1", "file_id": "cfile_1"}
PATH = {"type": "file_path", "file_id": "cfile_2", "index": 0}
WROTE = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "see a.csv", "annotations": [CITED, PATH]}],
}
LISTED = {"type": "mcp_list_tools", "tools": [{"input_schema": {"container_id": "cntr_9"}}]}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("store", [None, False])
def test_what_code_ran_in_can_be_sent_back(
    gateway: Gateway, upstream: Upstream, key: str, store: bool | None, streamed: bool
) -> None:
    """A container is there for its account even where the response isn't stored, and for no other.
    What a tool's server says of one makes it nobody's."""
    response = response_object(output=[RAN, WROTE, LISTED])
    done = ("response.completed", {"type": "response.completed", "response": response})
    upstream.script = stream([event(done[1], done[0])]) if streamed else json_answer(response)
    with gateway.client(key) as client, gateway.client(gateway.new_key("other")) as other:
        more = {} if store is None else {"store": store}
        first = client.post("/responses", json={**BODY, **more, "stream": streamed})
        assert first.status_code == 200
        again = {**BODY, "input": [RAN, WROTE, {"role": "user", "content": "go on"}]}
        for body in (again, {**BODY, "tools": [{"type": "shell", "container": "cntr_1"}]}):
            assert client.post("/responses", json=body).status_code == 200
            seen = len(upstream.requests)
            assert other.post("/responses", json=body).status_code == 400
        theirs = {"type": "code_interpreter_call", "container_id": "cntr_9"}
        answer = client.post("/responses", json={**BODY, "input": [LISTED, theirs]})
        assert error(answer) == (400, "invalid_request", "container_id")
        assert len(upstream.requests) == seen
