"""What a row, its log line and the filters say of a request's upstream: attempts, status, error
code or cause, and the upstream's id of the request. Never a text of the upstream's."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import threading
from contextlib import closing
from typing import Any

import httpx2
import pytest

from tests.helpers.gateway import Gateway, MakeGateway, free_port, wait_until
from tests.helpers.response_store import BODY, ResponseStore, create
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Socket,
    Upstream,
    chat_pieces,
    event,
    json_answer,
    response_pieces,
    silent,
    stream,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import client as websocket_client

pytestmark = [pytest.mark.promise_3, pytest.mark.promise_6]

CHAT = {"model": "gpt-up", "messages": [{"role": "user", "content": "Hi"}]}
CANARY = "sk-proj-canary"
LIMITED = {"message": f"Slow down {CANARY}", "type": "requests", "code": "rate_limit_exceeded"}
FAILED_EVENT = {"type": "response.failed", "response": {"status": "failed", "error": LIMITED}}
FIELDS = ("outcome", "attempts", "upstream_status", "upstream_error_code", "upstream_request_id")


def post(gateway: Gateway, key: str, path: str = "/responses", **more: Any) -> int:
    """Return the status of the answer; 0 where it broke off."""
    body = CHAT if path == "/chat/completions" else BODY
    with gateway.client(key) as client:
        try:
            return client.post(path, json={**body, **more}).status_code
        except httpx2.RemoteProtocolError:
            return 0


def met(gateway: Gateway) -> list[tuple[Any, ...]]:
    """Return what each row says of its upstream, oldest first."""
    return [tuple(row[name] for name in FIELDS) for row in gateway.rows()]


def log_lines(gateway: Gateway) -> list[dict[str, Any]]:
    lines = gateway.flushed_log().splitlines()
    return [json.loads(line) for line in lines if '"attempts":' in line]


def upstreams(*urls: str, **more: Any) -> dict[str, Any]:
    """Return settings with an upstream at each URL, tried in this order."""
    tables = [
        {"name": f"up{n}", "base_url": url, "api_key_env": "", "priority": n, **more}
        for n, url in enumerate(urls)
    ]
    return {"server": {}, "upstreams": tables}


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}/v1"


def test_a_good_answer_has_its_status_and_id(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    upstream.script = stream(response_pieces(["Hi"]), headers=[("X-Request-Id", "req_up1")])
    assert post(gateway, key, stream=True) == 200
    assert met(gateway) == [("completed", 1, 200, None, "req_up1")]
    (line,) = log_lines(gateway)
    assert (line["attempts"], line["upstream_status"]) == (1, 200)
    assert line["upstream_request_id"] == "req_up1"
    assert "upstream_error_code" not in line


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (json_answer({"error": LIMITED}, 429), 429, "rate_limit_exceeded"),
        (json_answer({"error": {**LIMITED, "code": None}}, 429), 429, "requests"),
        (json_answer({"error": {"code": f"{CANARY} is bad"}}, 400), 400, None),
        (json_answer(b"<html>bad gateway</html>", 502, content_type="text/html"), 502, None),
        (stream([event({"error": LIMITED})]), 200, "rate_limit_exceeded"),
        (stream([*chat_pieces(["Hi"])[:2], event({"error": LIMITED})]), 200, "rate_limit_exceeded"),
    ],
)
def test_an_error_has_its_code_and_no_text(
    gateway: Gateway, upstream: Upstream, key: str, script: Script, status: int, code: str | None
) -> None:
    upstream.script = script
    assert post(gateway, key, "/chat/completions", stream=True) == status
    assert met(gateway) == [("upstream_error", 1, status, code, None)]
    (line,) = log_lines(gateway)
    assert line.get("upstream_error_code") == code
    assert (line["attempts"], line["upstream_status"]) == (1, status)
    assert gateway.terminate() == 0
    assert CANARY not in gateway.log()
    assert CANARY.encode() not in gateway.database.read_bytes()


@pytest.mark.parametrize(
    "events",
    [
        [event(FAILED_EVENT, "response.failed")],
        [event({"type": "error", "code": "rate_limit_exceeded", "message": CANARY}, "error")],
    ],
)
def test_a_failed_response_has_its_code(
    gateway: Gateway, upstream: Upstream, key: str, events: list[bytes]
) -> None:
    upstream.script = stream([*response_pieces(["Hi"])[:2], *events])
    assert post(gateway, key, stream=True) == 200
    assert met(gateway) == [("upstream_error", 1, 200, "rate_limit_exceeded", None)]


@pytest.mark.parametrize("value", ["two words", "x" * 129, "caf\u00e9", ""])
def test_an_odd_request_id_is_not_kept(
    gateway: Gateway, upstream: Upstream, key: str, value: str
) -> None:
    upstream.script = json_answer({}, headers=[("x-request-id", value)])
    assert post(gateway, key) == 200
    assert gateway.row()["upstream_request_id"] is None


async def torn(_: Received, reply: Reply) -> None:
    reply.tear()


async def no_http(_: Received, reply: Reply) -> None:
    await reply.raw(b"220 mail.example.com ESMTP\r\n\r\n")


async def stalls(request: Received, reply: Reply) -> None:
    await reply.head(200, [("content-type", "text/event-stream"), ("x-request-id", "r1")])
    await reply.send(response_pieces(["Hi"])[0])
    await silent(request, reply)


@pytest.mark.parametrize(
    ("script", "status", "row"),
    [
        (torn, 502, (None, "reset", None)),
        (no_http, 502, (None, "not_http", None)),
        (silent, 504, (None, "first_byte_timeout", None)),
        (stalls, 0, (200, "idle_timeout", "r1")),
        (stream(response_pieces(["Hi"])[:2]), 200, (200, "protocol", None)),
    ],
)
def test_a_failure_without_an_answer_has_a_cause(
    make_gateway: MakeGateway,
    upstream: Upstream,
    script: Script,
    status: int,
    row: tuple[Any, ...],
) -> None:
    short = {"first_byte_timeout_seconds": 0.5, "idle_timeout_seconds": 0.5}
    gateway = make_gateway(upstreams(upstream.url, **short)).start()
    key = gateway.new_key()
    upstream.script = script
    assert post(gateway, key, stream=True) == status
    assert met(gateway) == [("upstream_failed", 1, *row)]


def test_each_attempt_counts(make_gateway: MakeGateway, upstream: Upstream) -> None:
    gateway = make_gateway(upstreams(nowhere(), nowhere(), upstream.url)).start()
    assert post(gateway, gateway.new_key()) == 200
    assert met(gateway) == [("completed", 3, 200, None, None)]
    assert gateway.row()["upstream"] == "up2"
    (shown,) = [line for line in gateway.run("usage").stdout.splitlines() if "gpt-up" in line]
    assert "3 attempts" in shown


def test_an_upstream_that_is_not_there(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(upstreams(nowhere(), nowhere())).start()
    assert post(gateway, gateway.new_key()) == 502
    assert met(gateway) == [("upstream_failed", 2, None, "refused", None)]


def test_a_client_that_leaves_is_no_failure(gateway: Gateway, upstream: Upstream, key: str) -> None:
    upstream.script = silent
    with gateway.begin(key, BODY):
        upstream.wait_for(lambda: upstream.in_flight == 1)
    wait_until(lambda: [row for row in gateway.rows() if row["outcome"] != "pending"])
    assert met(gateway)[0][:4] == ("client_disconnected", 1, None, None)


# ── WebSocket ────────────────────────────────────────────────────────────────────────────────────


def test_turns_have_what_their_events_say(gateway: Gateway, upstream: Upstream, key: str) -> None:
    async def talk(sock: Socket) -> None:
        await sock.recv()
        await sock.send({"type": "error", "status": 429, "error": LIMITED})
        created, *_ = ws_events(1, await sock.recv())
        await sock.send(created, FAILED_EVENT)
        await ws_like_openai(sock)

    upstream.talk = talk
    upstream.handshake_headers = {"x-request-id": "req_ws"}
    with websocket_client(gateway, key) as ws:
        for kind in ("error", "response.failed", "response.completed"):
            ws.send()
            ws.until(kind)
    code = "rate_limit_exceeded"
    assert met(gateway) == [
        ("upstream_error", 1, 429, code, "req_ws"),
        ("upstream_error", 1, 200, code, "req_ws"),
        ("completed", 1, 200, None, "req_ws"),
    ]


@pytest.mark.parametrize(("events", "cause"), [(0, "reset"), (1, "reset")])
def test_a_turn_whose_connection_is_lost_has_a_cause(
    gateway: Gateway, upstream: Upstream, key: str, events: int, cause: str
) -> None:
    async def talk(sock: Socket) -> None:
        await sock.send(*ws_events(1, await sock.recv())[:events])
        sock.tear()

    upstream.talk = talk
    with websocket_client(gateway, key) as ws:
        ws.send()
        ws.closed()
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    assert met(gateway)[0][3] == cause


# ── Rows that are written in other ways ──────────────────────────────────────────────────────────


def test_a_background_response_keeps_what_created_it(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    store = ResponseStore()

    async def script(request: Received, reply: Reply) -> None:
        if request.method == "POST":
            made = store._create(request.json())
            await made(request, reply)
        else:
            await json_answer({"error": LIMITED}, 500, [("x-request-id", "other")])(request, reply)

    upstream.script = script
    made = create(gateway, key, background=True)["id"]
    (before,) = met(gateway)
    assert before == ("pending", 1, 200, None, None)
    with gateway.client(key) as client:
        assert client.get(f"/responses/{made}").status_code == 500
    assert met(gateway) == [before]
    gateway.restart()
    upstream.script = store
    wait_until(lambda: gateway.row()["outcome"] != "pending")
    assert met(gateway) == [("completed", 1, 200, None, None)]


def test_a_background_response_that_fails_has_its_code(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    upstream.script = store = ResponseStore(turns=1000)
    made = create(gateway, key, background=True)["id"]
    store.responses[made] |= {"status": "failed", "error": LIMITED}
    wait_until(lambda: gateway.row()["outcome"] != "pending")
    assert met(gateway) == [("upstream_error", 1, 200, "rate_limit_exceeded", None)]


def test_a_killed_gateway_leaves_what_was_known(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    release = threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream"), ("x-request-id", "r1")])
        await reply.send(b"".join(response_pieces(["Hel", "lo"])[:-1]))
        await reply.wait(release)

    upstream.script = script
    with gateway.begin(key, {**BODY, "stream": True}):
        with closing(sqlite3.connect(gateway.database)) as ledger:
            saved = "SELECT count(*) FROM unsettled"
            wait_until(lambda: ledger.execute(saved).fetchone()[0] == 1)
        gateway.kill()
        release.set()
    gateway.start()
    assert met(gateway) == [("interrupted", 1, 200, None, "r1")]


# ── Filters ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mixed(make_gateway: MakeGateway, upstream: Upstream) -> Gateway:
    """A gateway with good requests, and requests that failed in several ways, of two accounts."""
    gateway = make_gateway().start()

    async def script(request: Received, reply: Reply) -> None:
        status = int(request.json()["model"])
        content: Any = {"usage": {"input_tokens": 10, "output_tokens": 1}}
        if status == 500:
            content = {"error": {"code": "server_error"}}
        elif status > 200:
            content = {"error": LIMITED}
        elif status < 200:
            reply.tear()
        await json_answer(content, status)(request, reply)

    upstream.script = script
    for account in ("a", "b"):
        key = gateway.new_key(account)
        for model in ("200", "429", "500", "100", "200", "429"):
            post(gateway, key, model=model)
    return gateway


@pytest.mark.parametrize(
    ("filters", "models"),
    [
        ({"failed": "true"}, ["429", "500", "100", "429"] * 2),
        ({"failed": "false"}, ["200", "429", "500", "100", "200", "429"] * 2),
        ({"failure": "429"}, ["429", "429"] * 2),
        ({"failure": "rate_limit_exceeded"}, ["429", "429"] * 2),
        ({"failure": "500"}, ["500"] * 2),
        ({"failure": "reset"}, ["100"] * 2),
        ({"failure": "502"}, ["100"] * 2),
        ({"failure": "200"}, []),
        ({"failure": "0429"}, []),
        ({"failure": "%"}, []),
        ({"failed": "true", "account": "a"}, ["429", "500", "100", "429"]),
        ({"failed": "true", "account": "a", "limit": 2}, ["100", "429"]),
        ({"failed": "true", "model": "4*"}, ["429", "429"] * 2),
        ({"failed": "true", "until": "1h"}, []),
    ],
)
def test_requests_are_filtered_by_failure(
    mixed: Gateway, filters: dict[str, str | int], models: list[str]
) -> None:
    found = mixed.api("GET", "/requests", **filters)
    assert [row["requested_model"] for row in found["requests"]] == models
    if "limit" not in filters:
        assert found["totals"]["requests"] == len(models)
        sums = mixed.api("GET", "/usage", group_by="model", **filters)
        assert sums["totals"]["requests"] == len(models)
        assert {group["model"] for group in sums["groups"]} == {*models}


def test_a_page_of_failed_requests_goes_on_before_the_last(mixed: Gateway) -> None:
    every = mixed.api("GET", "/requests", failed="true", account="a")["requests"]
    before = every[-2]["request_id"]
    found = mixed.api("GET", "/requests", failed="true", account="a", before=before)["requests"]
    assert found == every[:-2]


def test_the_command_shows_and_filters_failures(mixed: Gateway) -> None:
    assert len(mixed.cli("usage", "--failed")["requests"]) == 8
    assert len(mixed.cli("usage", "--failure", "429", "--account", "b")["requests"]) == 2
    assert mixed.cli("usage", "--failed", "--group-by", "account")["totals"]["requests"] == 8
    table = mixed.run("usage", "--account", "a").stdout
    assert "failure" in table.splitlines()[0].split()
    assert table.count("429 rate_limit_exceeded") == 2
    assert "500 server_error" in table
    assert "upstream_failed  reset" in table
    assert "failure" not in mixed.run("usage", "--model", "200").stdout
    rows = list(csv.DictReader(io.StringIO(mixed.run("usage", "--csv").stdout)))
    assert [*rows[0]][-5:] == [*FIELDS[1:], "credentials"]
    assert [row["upstream_status"] for row in rows][:3] == ["200", "429", "500"]


def test_a_key_sees_its_own_failures(mixed: Gateway) -> None:
    key = mixed.new_key("a")
    with httpx2.Client(headers={"authorization": f"Bearer {key}"}) as client:
        found = client.get(f"{mixed.url}/admin/v1/me/requests", params={"failure": "429"}).json()
    assert [row["account"] for row in found["requests"]] == ["a", "a"]


def test_rows_of_an_earlier_version_are_found_by_their_status(mixed: Gateway) -> None:
    assert mixed.terminate() == 0
    with closing(sqlite3.connect(mixed.database)) as ledger:
        ledger.execute("UPDATE requests SET upstream_status = NULL, upstream_error_code = NULL")
        ledger.commit()
    assert len(mixed.cli("usage", "--failure", "429")["requests"]) == 4
