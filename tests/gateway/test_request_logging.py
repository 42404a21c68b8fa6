"""Promise 6: bodies are stored only where an owner has asked for it, and then exactly."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import backports.zstd
import httpx2
import pytest

from redbtc.deadlines import Deadline, Deadlines
from redbtc.gateway.body_recorder import BodyRecorder
from redbtc.server.asgi import Client, Message
from redbtc.store.request_log import Recording
from redbtc.store.request_log.frames import Body
from redbtc.store.request_log.recording import PartQueue
from tests.gateway.test_failover import black_hole
from tests.helpers.gateway import Gateway, MakeGateway, wait_until
from tests.helpers.request_logs import logged_ids, read_body, set_log, stored
from tests.helpers.turns import steer, steered
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    Socket,
    Upstream,
    chat_stream,
    event,
    images_json,
    json_answer,
    response_pieces,
    stream,
    ws_events,
    ws_like_openai,
)
from tests.helpers.websocket_client import CREATE, client

pytestmark = pytest.mark.promise_6

JSON = {"content-type": "application/json"}
ASKED = {"model": "gpt-up", "input": "Hi"}
STREAMED = {**ASKED, "stream": True}


@pytest.fixture
def logged(gateway: Gateway, key: str) -> str:
    """A key of an account whose requests are logged."""
    set_log(gateway, "test", 7)
    return key


def request_id(answer: httpx2.Response) -> str:
    return answer.headers["x-redbtc-request-id"]


def test_of_three_accounts_only_the_logged_one_leaves_content_in_a_file(
    gateway: Gateway, upstream: Upstream
) -> None:
    keys = {name: gateway.new_key(name) for name in ("ada", "bob", "eve")}
    set_log(gateway, "bob", 7)
    ids: dict[str, list[str]] = {}
    for name, key in keys.items():
        with gateway.client(key) as http:
            for body in (ASKED, STREAMED):
                content = json.dumps({**body, "input": f"canary of {name}"}).encode()
                answers = response_pieces([f"canary to {name}"])
                upstream.script = json_answer({"id": "resp_1", "output": f"canary to {name}"})
                if "stream" in body:
                    upstream.script = stream(answers)
                answer = http.post("/responses", content=content, headers=JSON)
                assert f"canary to {name}" in answer.text
                ids.setdefault(name, []).append(request_id(answer))
                if name == "bob":
                    assert stored(gateway, request_id(answer)) == (content, answer.content)
    assert logged_ids(gateway) == set(ids["bob"])
    gateway.restart()
    assert logged_ids(gateway) == set(ids["bob"])
    for file in gateway.folder.iterdir():
        if file.is_file():
            content = file.read_bytes()
            for text in (b"canary of ada", b"canary to ada", b"canary of eve", b"canary to eve"):
                assert text not in content, file


def chat(gateway: Gateway, upstream: Upstream, key: str, text: str) -> None:
    """Ask for a streamed chat; the option that is added and the chunk that is taken out are no part
    of what is stored."""
    upstream.script = chat_stream()
    content = json.dumps({"model": "gpt-up", "stream": True, "messages": [text]}).encode()
    with gateway.client(key) as http:
        answer = http.post("/chat/completions", content=content, headers=JSON)
    assert b"include_usage" in upstream.requests[-1].body
    assert b'"usage":{' not in answer.content
    assert stored(gateway, request_id(answer)) == (content, answer.content)


def test_a_chat_is_stored_as_its_client_knows_it(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    chat(gateway, upstream, logged, "Hi")
    chat(gateway, upstream, logged, "long " * 100_000)  # which arrives in many parts


def bypassed() -> Script:
    """Many small events, each its own write, most of which pass the request's task by."""
    text = {"type": "response.output_text.delta", "delta": "x"}
    pieces = response_pieces(["Hel", "lo"])
    return stream([*pieces[:-1], *[event({**text, "n": n}) for n in range(50)], pieces[-1]], 0.001)


@pytest.mark.parametrize(
    "script",
    [
        bypassed(),
        json_answer({"error": {"message": "no", "code": "bad"}}, 400),
        # The organization is hidden from the client, and so from the log.
        json_answer({"error": {"message": "in organization org-AbC123", "code": "x"}}, 429),
    ],
)
def test_an_answer_is_stored_as_its_client_was_sent_it(
    gateway: Gateway, upstream: Upstream, logged: str, script: Script
) -> None:
    upstream.script = script
    content = json.dumps(STREAMED).encode() + b"\n "
    with gateway.client(logged) as http:
        answer = http.post("/responses", content=content, headers=JSON)
    assert b"AbC123" not in answer.content
    assert stored(gateway, request_id(answer)) == (content, answer.content)


def test_forms_audio_and_compressed_bodies_are_stored_as_they_are(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    upstream.script = images_json()
    image = bytes(range(256)) * 400
    form = {"model": "gpt-up", "prompt": "a cat"}
    with gateway.client(logged) as http:
        answer = http.post("/images/edits", data=form, files={"image": ("a.png", image)})
        sent = upstream.requests[-1].body
        assert image in sent
        assert stored(gateway, request_id(answer)) == (sent, answer.content)
        upstream.script = json_answer(image, content_type="audio/mpeg")
        speech = {"model": "gpt-up", "input": "Hi", "voice": "x"}
        answer = http.post("/audio/speech", json=speech)
        assert stored(gateway, request_id(answer)) == (upstream.requests[-1].body, image)
        upstream.script = json_answer({"id": "resp_1"})
        packed = backports.zstd.compress(json.dumps(ASKED).encode())
        headers = {**JSON, "content-encoding": "zstd"}
        answer = http.post("/responses", content=packed, headers=headers)
        assert stored(gateway, request_id(answer)) == (packed, answer.content)
        answer_body = gzip.compress(json.dumps({"id": "resp_2"}).encode())
        upstream.script = json_answer(answer_body, headers={"content-encoding": "gzip"})
        plain = http.post("/responses", json=ASKED)
    assert stored(gateway, request_id(plain)) == (upstream.requests[-1].body, answer_body)
    bodies = gateway.api("GET", f"/requests/{request_id(plain)}")["bodies"]
    assert (bodies["request"]["encoding"], bodies["response"]["encoding"]) == ("", "gzip")
    bodies = gateway.api("GET", f"/requests/{request_id(answer)}")["bodies"]
    assert (bodies["request"]["encoding"], bodies["response"]["encoding"]) == ("zstd", "")
    assert bodies["request"]["bytes"] == bodies["request"]["stored_bytes"] == len(packed)
    assert bodies["is_complete"]


def test_a_key_in_a_compressed_body_withholds_it(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    upstream.script = json_answer({"id": "resp_1"})
    packed = backports.zstd.compress(json.dumps({**ASKED, "input": f"my key {logged}"}).encode())
    with gateway.client(logged) as http:
        headers = {**JSON, "content-encoding": "zstd"}
        answer = http.post("/responses", content=packed, headers=headers)
    assert stored(gateway, request_id(answer)) == (None, answer.content)
    refused = read_body(gateway, request_id(answer), "request")
    assert refused.status_code == 404
    assert "since a key or a credential is in it" in refused.text


def test_of_a_torn_stream_what_was_sent_is_stored(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    upstream.script = stream(response_pieces(["Hel", "lo"])[:-1], 0.01, end="tear")
    got = b""
    with (
        gateway.client(logged) as http,
        http.stream("POST", "/responses", json=STREAMED) as answer,
        contextlib.suppress(httpx2.RemoteProtocolError),
    ):
        for part in answer.iter_raw():
            got += part
    assert gateway.row()["outcome"] == "upstream_failed"
    assert got
    assert stored(gateway, request_id(answer)) == (upstream.requests[-1].body, got)


def test_of_an_answer_whose_client_leaves_what_it_was_sent_is_stored(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    pieces, gone = response_pieces(["Hel", "lo"]), threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(pieces[0])
        await reply.wait(gone)
        for piece in pieces[1:]:
            await reply.send(piece)
        await reply.end()

    upstream.script = script
    with (
        gateway.client(logged) as http,
        http.stream("POST", "/responses", json=STREAMED) as answer,
    ):
        assert next(answer.iter_raw()) == pieces[0]
    wait_until(lambda: gateway.connections() == 0)
    gone.set()
    assert stored(gateway, request_id(answer)) == (upstream.requests[-1].body, pieces[0])
    assert gateway.row()["output_tokens"] == 9  # it was read to its end


def test_of_a_request_that_all_upstreams_failed_the_clients_body_is_stored(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    async def script(_: Received, reply: Reply) -> None:
        reply.tear()

    upstream.script = script
    with gateway.client(logged) as http:
        answer = http.post("/responses", json=ASKED)
        assert answer.status_code == 502
        refused = http.post("/responses", json={"input": "Hi"})
        assert refused.status_code == 400
    assert stored(gateway, request_id(answer)) == (upstream.requests[-1].body, None)
    assert read_body(gateway, request_id(refused), "request").status_code == 404


def test_nothing_is_stored_of_a_request_that_was_never_sent(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    """Its client leaves while the gateway connects, so its row is removed."""
    with black_hole(tmp_path) as hole:
        upstream = {"name": "test", **hole, "api_key_env": "TEST_UPSTREAM_KEY"}
        settings = {"upstreams": [upstream], "metering": {"on_disconnect": "cancel"}}
        gateway = make_gateway(settings).start()
        key = gateway.new_key()
        set_log(gateway, "test", 7)
        long = {**ASKED, "input": "so long that it is stored at once " * 10_000}
        with gateway.begin(key, long):
            gateway.wait_for_rows(1)
            (row,) = gateway.rows()
            wait_until(lambda: logged_ids(gateway) == {row["request_id"]})
        gateway.wait_for_rows(0)
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
        shown = gateway.api("GET", "/accounts/test/request-log")
        assert shown["requests"] == 0


def lines(events: list[str]) -> bytes:
    return "".join(f"{each}\n" for each in events).encode()


def test_the_events_of_a_turn_are_stored_with_its_row(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    odd = '{ "type":"response.create",\n"model" : "gpt-up", "input":"\\u00e9 é" }'
    upstream.talk = ws_like_openai
    with client(gateway, logged) as session:
        session.raw(odd)
        first = [session.recv_text() for _ in range(3)]
        set_log(gateway, "test", None)
        session.send(input="not to be stored")
        assert session.completed()
        set_log(gateway, "test", 1)
        session.send()
        last = [session.recv_text() for _ in range(3)]
    ids = [row["request_id"] for row in gateway.rows()]
    assert stored(gateway, ids[0]) == (lines([odd]), lines(first))
    assert stored(gateway, ids[1]) == (None, None)
    assert stored(gateway, ids[2]) == (lines([json.dumps(CREATE)]), lines(last))


def test_a_steered_turn_is_stored_with_each_of_its_rows(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    async def talk(sock: Socket) -> None:
        events = ws_events(1, await sock.recv())
        await sock.send(*events[:2])
        await sock.recv()
        await sock.send(steered(1))
        await sock.send(*ws_events(2, {"model": "gpt-up"}))

    upstream.talk = talk
    with client(gateway, logged) as session:
        session.send()
        before = [session.recv_text() for _ in range(2)]
        session.raw(steer(1))
        before.append(session.recv_text())
        after = [session.recv_text() for _ in range(3)]
    first, second = (row["request_id"] for row in gateway.rows())
    assert stored(gateway, first) == (lines([json.dumps(CREATE), steer(1)]), lines(before))
    assert stored(gateway, second) == (None, lines(after))


def test_the_setting_holds_from_the_next_request_and_for_single_keys(
    gateway: Gateway, upstream: Upstream, key: str
) -> None:
    other = gateway.new_key()
    ids = [each["id"] for each in gateway.api("GET", "/accounts/test/keys")["keys"]]

    def is_logged(secret: str) -> bool:
        with gateway.client(secret) as http:
            answer = http.post("/responses", json=ASKED)
        assert answer.status_code == 200
        return stored(gateway, request_id(answer)) == (
            upstream.requests[-1].body,
            answer.content,
        )

    assert (is_logged(key), is_logged(other)) == (False, False)
    shown = set_log(gateway, "test", 3, key=ids[1])
    assert [each["id"] for each in shown["keys"]] == [ids[1]]
    assert (is_logged(key), is_logged(other)) == (False, True)
    set_log(gateway, "test", None, key=ids[1])
    assert (is_logged(key), is_logged(other)) == (False, False)
    set_log(gateway, "test", 3, key=ids[1])
    shown = set_log(gateway, "test", 2)
    assert (shown["log_days"], shown["keys"][0]["log_days"]) == (2, 3)
    assert (is_logged(key), is_logged(other)) == (True, True)
    shown = set_log(gateway, "test", None)
    assert (shown["log_days"], shown["keys"], shown["requests"]) == (None, [], 3)
    assert (is_logged(key), is_logged(other)) == (False, False)


def test_what_is_purged_does_not_come_back(
    gateway: Gateway, upstream: Upstream, logged: str
) -> None:
    """Neither of a request in flight, nor of one whose body is still on its way."""
    pieces, purged = response_pieces(["Hel", "lo"]), threading.Event()

    async def script(_: Received, reply: Reply) -> None:
        await reply.head(200, [("content-type", "text/event-stream")])
        await reply.send(pieces[0])
        await reply.wait(purged)
        for piece in pieces[1:]:
            await reply.send(piece)
        await reply.end()

    upstream.script = script
    asked = {**STREAMED, "input": "long enough to be stored before its end " * 10}
    content = json.dumps(asked).encode()
    head = (
        f"POST /v1/responses HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {logged}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
        "connection: close\r\n\r\n"
    ).encode()
    with (
        gateway.connect() as late,
        gateway.client(logged) as http,
        http.stream("POST", "/responses", json=asked) as answer,
    ):
        late.sendall(head + content[:5])
        wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 2)
        parts = answer.iter_raw()
        assert next(parts) == pieces[0]
        wait_until(lambda: read_body(gateway, request_id(answer), "request").status_code == 200)
        shown = set_log(gateway, "test", None, purge=True)
        assert (shown["erased_requests"], shown["requests"]) == (1, 0)
        late.sendall(content[5:])
        purged.set()
        assert late.recv(1 << 16).startswith(b"HTTP/1.1 200")
        while late.recv(1 << 16):
            pass
        assert b"".join(parts) == b"".join(pieces[1:])
    gateway.wait_for_rows(2)
    assert [stored(gateway, row["request_id"]) for row in gateway.rows()] == [(None, None)] * 2
    assert gateway.api("GET", "/accounts/test/request-log")["requests"] == 0


def test_a_log_that_can_t_be_written_fails_no_request(make_gateway: MakeGateway) -> None:
    gateway = make_gateway().start()
    key = gateway.new_key()
    set_log(gateway, "test", 7)
    (gateway.folder / "request_log.db").mkdir()
    with gateway.client(key) as http:
        assert http.post("/responses", json=ASKED).status_code == 200
    gateway.wait_for_log("request log unavailable")
    shown = gateway.api("GET", "/accounts/test/request-log")
    assert (shown["log_days"], shown["requests"]) == (7, None)  # it can still be switched off


class Broken(Recording):
    """A recording whose every method fails."""

    def request(self, _: Body) -> None:
        raise RuntimeError("canary of an error")

    def response(self, _: Body) -> None:
        raise MemoryError

    def end(self) -> None:
        raise RuntimeError("canary of an error")


def test_a_recording_that_raises_ends_and_nothing_else() -> None:
    sent: list[Any] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        broken = Broken(PartQueue(0), "req_1", "acct_1", "key_1", 1, lambda _: None)

        def send_now(data: bytes) -> bool:
            sent.append(data)
            return True

        http = Client(lambda: None, send_now)
        for act in ("send", "send_now", "end"):
            recorder = BodyRecorder(broken, "acct_1", "req_1")
            recorded = recorder.recorded(send, http, Deadline(Deadlines()))
            if act == "send":
                await recorded({"type": "http.response.body", "body": b"1"})
                await recorded({"type": "http.response.body", "body": b"2"})
            elif act == "send_now":
                assert http.send_now(b"3")
            await recorder.take_event("4")
            recorder.end(has_row=True)

    asyncio.run(run())
    assert sent == [
        {"type": "http.response.body", "body": b"1"},
        {"type": "http.response.body", "body": b"2"},
        b"3",
    ]
