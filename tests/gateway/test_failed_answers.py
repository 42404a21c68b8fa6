"""What the client gets if all upstreams have failed, and what the body of an error answer can do:
nothing breaks failing over, and nothing of a rejected key's answer is shown."""

from __future__ import annotations

import asyncio
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from redbtc.upstream.past_requests import FAILURES_IN_ROW
from tests.gateway.errors import error
from tests.helpers.gateway import UPSTREAM_KEY
from tests.helpers.pair import CHAT, CHAT_COST, MODEL, Pair, nowhere
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    chat_chunk,
    event,
    json_answer,
    openai_like,
    response_object,
    stream,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_6, pytest.mark.promise_9]

CANARY = UPSTREAM_KEY[:12]
LATER: Any = {"retry-after": "30"}
SOON: Any = {"retry-after": "7"}


def failing(status: int, code: str = "some_code", headers: Any = (), size: int = 0) -> Script:
    """Answer with an error that contains a piece of the operator's key."""
    message = f"Incorrect API key provided: {CANARY}*****. {'x' * size}"
    content = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
    return json_answer(content, status, headers)


# ── All fail ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "second", "best", "seconds"),
    [
        ((429, LATER), (429, SOON), "good", 7),
        ((429, SOON), (429, LATER), "bad", 7),
        ((429, ()), (429, LATER), "bad", None),
        ((500, ()), (429, LATER), "good", 30),
        ((429, SOON), (500, ()), "good", None),
        ((503, ()), (500, ()), "good", None),
        ((401, ()), (500, ()), "good", None),
        ((500, ()), (401, ()), "bad", None),
        ((403, ()), (429, LATER), "good", 30),
    ],
)
def test_the_best_answer(
    pair: Pair, first: tuple[int, Any], second: tuple[int, Any], best: str, seconds: int | None
) -> None:
    for upstream, (status, headers), code in (
        (pair.bad, first, "of_bad"),
        (pair.good, second, "of_good"),
    ):
        upstream.script = failing(status, code, headers)
    answer = pair.ask()
    status = first[0] if best == "bad" else second[0]
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == f"of_{best}"
    said = answer.headers.get("retry-after")
    assert (said and int(said)) == seconds
    fields = ("upstream", "attempts", "upstream_status", "upstream_error_code", "outcome", "cost")
    found = pair.met(*fields)
    assert found[:-1] == (pair.name(best), 2, status, f"of_{best}", "upstream_error")
    assert len(pair.bad.requests) == len(pair.good.requests) == 1


@pytest.mark.parametrize("size", [0, 100_000])
def test_the_only_answer_of_several(pair: Pair, size: int) -> None:
    """The other one can't be reached. An answer that was not read whole is not kept for later."""
    pair.use({}, {"base_url": nowhere()})
    pair.bad.script = failing(500, size=size)
    answer = pair.ask()
    if size:
        assert error(answer)[:2] == (502, "upstream_unreachable")
        found = pair.met("upstream", "attempts", "upstream_status", "upstream_error_code")
        assert found == (pair.name("good"), 2, None, "refused")
    else:
        assert answer.json()["error"]["code"] == "some_code"
        found = pair.met("upstream", "attempts", "upstream_status", "upstream_error_code")
        assert found == (pair.name("bad"), 2, 500, "some_code")


def test_the_last_answer_is_a_long_one(pair: Pair) -> None:
    """It is passed on though an earlier one was kept."""
    pair.bad.script = failing(500, "of_bad")
    pair.good.script = failing(503, "of_good", size=1_000_000)
    answer = pair.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "of_good")
    assert len(answer.content) > 1_000_000
    assert pair.met("upstream", "attempts", "upstream_status") == (pair.name("good"), 2, 503)


def test_the_shortest_wait_is_not_that_of_a_long_answer(pair: Pair) -> None:
    """The connection of the answer that is not passed on is closed."""
    pair.bad.script = failing(429, "of_bad", SOON)
    pair.good.script = endless(429, LATER)
    answer = pair.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "of_bad")
    assert pair.good.requests[0].closed.wait(20)
    assert pair.met("upstream", "attempts", "upstream_status") == (pair.name("bad"), 2, 429)


@pytest.mark.parametrize("size", [0, 100_000])
@pytest.mark.parametrize("other", [None, 401, 403, "refused"])
@pytest.mark.parametrize("status", [401, 403])
def test_nothing_of_a_rejected_key(
    pair: Pair, status: int, other: int | str | None, size: int
) -> None:
    if other is None:
        pair.alone()
    elif other == "refused":
        pair.use({}, {"base_url": nowhere()})
    elif isinstance(other, int):
        pair.good.script = failing(other, "invalid_api_key", size=size)
    pair.bad.script = failing(status, "invalid_api_key", {"x-request-id": "req_1"}, size)
    answer = pair.ask()
    unreachable = other == "refused" and size
    if not unreachable:
        assert error(answer) == (502, "upstream_credentials_rejected", None)
    found = pair.met("status", "outcome", "attempts")
    failed = "upstream_failed" if unreachable else "upstream_error"
    assert found == (502, failed, 2 if other else 1)
    shown = [answer.text, str(answer.headers), pair.gateway.flushed_log()]
    for path in ("/overview", "/requests", "/upstreams/changes", "/webhook"):
        shown.append(json.dumps(pair.gateway.api("GET", path)))
    for path in ("/status", "/readyz", "/metrics"):
        shown.append(pair.gateway.get(path).text)
    shown.append(pair.gateway.run("usage", "--json").stdout)
    assert not [each for each in shown if CANARY in each]
    assert CANARY.encode() not in pair.gateway.database.read_bytes()


@pytest.mark.parametrize("path", ["/responses/resp_1", "/responses/resp_1/input_items"])
def test_nothing_of_a_rejected_key_for_what_is_stored(pair: Pair, path: str) -> None:
    pair.bad.script = ResponseStore(first=1000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = failing(401, "invalid_api_key")
    with pair.gateway.client(pair.key) as client:
        answer = client.get(path.replace("resp_1", made))
    assert error(answer) == (502, "upstream_credentials_rejected", None)
    assert CANARY not in pair.gateway.flushed_log()
    pair.wait_until_idle()


# ── What one client's request says of the key ────────────────────────────────────────────────────

LACKING = {
    "unverified organization": (403, None, "Your organization must be verified to use the model."),
    "key without a scope": (401, None, "You have insufficient permissions. Missing scopes: api.x."),
    "named scope": (401, "missing_scope", "You have insufficient permissions for this operation."),
    "another gateway's": (403, "model_not_allowed", "This API key is not allowed to use it."),
    "no access": (403, "model_not_found", "The project does not have access to the model."),
}


@pytest.mark.parametrize("why", LACKING)
def test_a_key_without_a_right_is_left_out_for_the_model_alone(pair: Pair, why: str) -> None:
    status, code, message = LACKING[why]
    content = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    pair.bad.script = json_answer({"error": content}, status)
    assert pair.ask().status_code == 200
    shown = {each["name"]: each for each in pair.gateway.api("GET", "/upstreams")["upstreams"]}
    bad = shown[pair.name("bad")]
    assert bad["state"] == "resting"
    assert [each["model"] for each in bad["rests"]] == [MODEL]
    assert pair.ask().status_code == 200
    assert len(pair.bad.requests) == 1


@pytest.mark.parametrize("why", LACKING)
def test_a_key_without_a_right_is_no_outage_of_the_only_upstream(pair: Pair, why: str) -> None:
    pair.use({}, {"api_key_env": "NOT_SET"})
    status, code, message = LACKING[why]
    content = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    pair.bad.script = json_answer({"error": content}, status)
    assert error(pair.ask()) == (502, "upstream_credentials_rejected", None)
    assert pair.gateway.get("/readyz").status_code == 200


def test_a_limit_of_what_is_stored_rests_no_model(pair: Pair) -> None:
    pair.bad.script = ResponseStore(first=1000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = failing(429, "rate_limit_exceeded", LATER)
    with pair.gateway.client(pair.key) as client:
        assert client.get(f"/responses/{made}").status_code == 429
    pair.bad.script = openai_like
    before = len(pair.bad.requests)
    assert pair.ask().status_code == 200
    assert len(pair.bad.requests) == before + 1


@pytest.mark.parametrize("field", ["code", "type"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_code_that_quotes_the_key_is_not_kept(pair: Pair, status: int, field: str) -> None:
    pair.alone()
    pair.bad.script = json_answer({"error": {"message": "no", field: UPSTREAM_KEY}}, status)
    assert error(pair.ask()) == (502, "upstream_credentials_rejected", None)
    assert pair.met("upstream_status", "upstream_error_code") == (status, str(status))
    shown = [pair.gateway.flushed_log(), pair.gateway.get("/metrics").text]
    for path in ("/overview", "/requests", "/upstreams", "/upstreams/changes"):
        shown.append(json.dumps(pair.gateway.api("GET", path)))
    assert not [each for each in shown if CANARY in each]


# ── Bodies of error answers ──────────────────────────────────────────────────────────────────────


def body(
    content: bytes, headers: Any = (), framing: str = "length", kind: str = "application/json"
) -> Script:
    async def script(_: Received, reply: Reply) -> None:
        framed = f"length:{len(content)}" if framing == "length" else framing
        await reply.head(503, [("content-type", kind), *dict(headers).items()], framed)
        for start in range(0, len(content), 100_000):
            await reply.send(content[start : start + 100_000])
        await reply.end()

    return script


def endless(status: int = 503, headers: Any = ()) -> Script:
    async def script(request: Received, reply: Reply) -> None:
        await reply.head(status, [("content-type", "text/plain"), *dict(headers).items()])
        while not request.closed.is_set():
            await reply.send(b"x" * 100_000)
            await asyncio.sleep(0)

    return script


def dribbling() -> Script:
    """Send an answer slowly, for a second longer than it is waited for."""

    async def script(request: Received, reply: Reply) -> None:
        await reply.head(503, [("content-type", "text/plain")])
        for _ in range(12):
            await reply.send(b"x")
            if await reply.wait(request.closed, 0.25):
                return
        await reply.end()

    return script


def torn(sent: bytes) -> Script:
    async def script(_: Received, reply: Reply) -> None:
        await reply.head(503, [("content-type", "application/json")], "length:1000")
        await reply.send(sent)
        await asyncio.sleep(0.05)  # a reset can take what was sent before it with it
        reply.tear()

    return script


BODIES = {
    "empty": body(b""),
    "empty and chunked": body(b"", framing="chunked"),
    "HTML": body(b"<html><h1>503 Service Unavailable</h1></html>", kind="text/html"),
    "until the connection ends": body(b'{"error": {}}', framing="close"),
    "1 MB": body(b'{"error":"' + b"x" * 1_000_000 + b'"}'),
    "1 MB in chunks": body(b"x" * 1_000_000, framing="chunked", kind="text/plain"),
    "gzip": body(gzip.compress(b'{"error": {"code": "zipped"}}'), {"content-encoding": "gzip"}),
    "not gzip": body(b'{"error": {}}', {"content-encoding": "gzip"}),
    "a bomb": body(gzip.compress(b"0" * 10_000_000), {"content-encoding": "gzip"}),
    "no JSON": body(b'{"error": {"code": "some'),
    "deep JSON": body(b'{"error":' + b"[" * 15_000 + b"]" * 15_000 + b"}"),
    "no object": body(b'"error"'),
    "events": body(b'data: {"error": {"code": "a"}}\n\n', kind="text/event-stream"),
}
BROKEN = {
    "torn": torn(b'{"error":'),
    "torn at its beginning": torn(b""),
    "endless": endless(),
    "dribbling": dribbling(),
}


@pytest.mark.parametrize("transport", ["asyncio", "httpx"])
@pytest.mark.parametrize("kind", [*BODIES, *BROKEN])
def test_a_body_does_not_keep_a_request_from_failing_over(
    pair: Pair, kind: str, transport: str
) -> None:
    pair.use({"transport": transport})
    pair.bad.script = {**BODIES, **BROKEN}[kind]
    assert pair.ask().status_code == 200
    pair.assert_served_by_good(cost=CHAT_COST)
    assert pair.bad.requests[0].finished.wait(20), "its connection is free or closed"


def answer_of(url: str, key: str) -> tuple[int, dict[str, str], bytes, bool]:
    """Return an answer as it comes: status, the headers of its body, the body without decoding, and
    whether it was whole."""
    received, whole = b"", True
    with httpx2.Client(trust_env=False, timeout=60) as client:
        headers = {"authorization": f"Bearer {key}", "accept-encoding": "identity"}
        with client.stream("POST", f"{url}/chat/completions", json=CHAT, headers=headers) as answer:
            try:
                for part in answer.iter_raw():
                    received += part
            except httpx2.TransportError:
                whole = False
            named = ("content-length", "transfer-encoding", "content-type", "content-encoding")
            found = {name: answer.headers[name] for name in named if name in answer.headers}
            return answer.status_code, found, received, whole


@pytest.mark.parametrize("kind", [*BODIES, "dribbling"])
def test_the_answer_of_the_only_upstream_passes_unchanged(pair: Pair, kind: str) -> None:
    pair.alone()
    pair.bad.script = {**BODIES, **BROKEN}[kind]
    direct = answer_of(pair.bad.url, "none")
    status, headers, received, whole = answer_of(pair.gateway.base_url, pair.key)
    if kind in ("events", "until the connection ends"):  # these have no length
        headers.pop("transfer-encoding")
        direct[1].pop("content-length", None)
    assert (status, headers, received, whole) == direct
    fields = ("upstream", "attempts", "status", "upstream_status", "outcome")
    assert pair.met(*fields) == (pair.name("bad"), 1, 503, 503, "upstream_error")
    assert float(pair.row["cost"] or 0) == 0


def test_the_torn_answer_of_the_only_upstream(pair: Pair) -> None:
    """It stays torn. If nothing of its body came, the client is told so."""
    pair.alone()
    pair.bad.script = BROKEN["torn"]
    status, headers, received, whole = answer_of(pair.gateway.base_url, pair.key)
    assert (status, headers["content-length"], whole) == (503, "1000", False)
    assert b'{"error":'.startswith(received)
    found = pair.met("attempts", "status", "upstream_status", "outcome", "upstream_error_code")
    assert found == (1, 503, 503, "upstream_failed", "reset")
    pair.alone()
    pair.bad.script = BROKEN["torn at its beginning"]
    assert error(pair.ask())[:2] == (502, "upstream_unreachable")
    found = pair.met("attempts", "status", "upstream_status", "outcome", "upstream_error_code")
    assert found == (1, 502, 503, "upstream_failed", "reset")


def test_an_endless_answer_ends_with_its_client(pair: Pair) -> None:
    pair.use({}, {"models": ["other"]}, metering={"on_disconnect": "cancel"})
    pair.bad.script = endless()
    with pair.gateway.begin(pair.key, CHAT, "/chat/completions") as client:
        assert client.recv(10).startswith(b"HTTP/1.1 5")
    assert pair.bad.requests[0].closed.wait(60)
    assert pair.met("upstream", "attempts", "status")[1:] == (1, 503)


def test_endless_answers_take_no_memory(pair: Pair) -> None:
    pair.use({}, limits={"account": {"concurrency": 0}})
    pair.bad.script = endless()

    async def fails_less(request: Received, reply: Reply) -> None:
        await asyncio.sleep(0.05)
        await openai_like(request, reply)

    pair.good.script = fails_less
    pair.ask()
    before = pair.gateway.rss()
    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(lambda _: pair.ask().status_code, range(20)))
    assert {*statuses} == {200}
    assert pair.gateway.rss() - before < 20 << 20
    pair.wait_until_idle()


# ── Answers with status 200 that end with an error ───────────────────────────────────────────────


def begun_well(way: str, code: str) -> Script:
    """Answer with status 200, and with an error."""
    problem = {"code": code, "type": code, "message": "Sorry"}
    failed = response_object(status="failed", error=problem, output=[])
    if way == "JSON":
        return json_answer(failed)
    if way == "chat":
        return stream([event(chat_chunk(MODEL, {"content": "a"})), event({"error": problem})])
    ends: dict[str, dict[str, Any]] = {
        "response.failed": {"type": "response.failed", "response": failed},
        "error": {**problem, "type": "error"},
    }
    begun = {"type": "response.created", "response": response_object(status="in_progress")}
    return stream([event(begun, "response.created"), event(ends[way], ends[way]["type"])])


def states(pair: Pair) -> list[tuple[str, str | None]]:
    """Return the state of the upstream that is tried first, and why it is not up."""
    found = pair.gateway.api("GET", "/overview")["upstreams"]
    return [(each["state"], each["reason"]) for each in found if each["name"] == pair.name("bad")]


def counted(pair: Pair) -> tuple[int, dict[str, Any] | None]:
    """Return how many requests to the upstream that is tried first count, and its last error."""
    found = pair.gateway.api("GET", "/upstreams")["upstreams"]
    (bad,) = [each for each in found if each["name"] == pair.name("bad")]
    return bad["requests"], bad["last_error"]


WAYS = ["JSON", "chat", "response.failed", "error"]


@pytest.mark.parametrize("way", WAYS)
def test_answers_that_end_with_an_error_of_the_upstream_take_it_out(pair: Pair, way: str) -> None:
    pair.bad.script = begun_well(way, "server_error")
    path = "/chat/completions" if way == "chat" else "/responses"
    for number in range(1, FAILURES_IN_ROW + 2):
        answer = pair.ask(path, stream=way != "JSON")
        assert answer.status_code == 200
        is_out = number >= FAILURES_IN_ROW
        assert states(pair) == [("out", "server_error") if is_out else ("up", None)]
        assert len(pair.bad.requests) == min(number, FAILURES_IN_ROW)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("code", "expected"),
    [("invalid_prompt", 6), ("rate_limit_exceeded", 0), ("invalid_api_key", 0)],
)
def test_other_errors_within_an_answer_are_no_failures(
    pair: Pair, way: str, code: str, expected: int
) -> None:
    """A limit can concern one request only, such as one that is too large."""
    pair.bad.script = begun_well(way, code)
    path = "/chat/completions" if way == "chat" else "/responses"
    for _ in range(6):
        assert code in pair.ask(path, stream=way != "JSON").text
    assert states(pair) == [("up", None)]
    assert counted(pair) == (expected, None)


def test_a_failed_response_that_is_looked_at_is_no_failure(pair: Pair) -> None:
    """It is the end of another request, however often it is fetched."""
    response_id = f"resp_looked_at_{pair.number}"
    pair.bad.script = json_answer(response_object(id=response_id))
    assert pair.ask("/responses", store=True).status_code == 200
    pair.bad.script = begun_well("JSON", "server_error")
    with pair.gateway.client(pair.key) as client:
        for _ in range(FAILURES_IN_ROW + 1):
            assert client.get(f"/responses/{response_id}").json()["status"] == "failed"
    assert counted(pair) == (FAILURES_IN_ROW + 2, None)


def test_a_4xx_is_about_the_request_whatever_its_code(pair: Pair) -> None:
    pair.bad.script = failing(400, "server_error")
    for _ in range(FAILURES_IN_ROW + 1):
        assert pair.ask().status_code == 400
    assert counted(pair) == (FAILURES_IN_ROW + 1, None)
