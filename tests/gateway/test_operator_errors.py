"""What an upstream's 401, 403 and 429 say of the operator's key, organization and project reaches
no client, whoever reads them; everything else passes unchanged."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import httpx2
import pytest

from redbtc.meter.operator_errors import LIMIT_TEXT, QUOTA_TEXT, REJECTED_TEXT
from tests.gateway.errors import error
from tests.helpers.gateway import wait_until
from tests.helpers.pair import MODEL, Pair
from tests.helpers.response_store import ResponseStore
from tests.helpers.upstream import (
    Received,
    Reply,
    Script,
    chat_chunk,
    event,
    json_answer,
    response_object,
    response_pieces,
    stream,
)

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_7]

SECRETS = ("org-AbC123", "proj_xyz", "sk-proj-*****6789")
LIMIT = (
    f"Rate limit reached for gpt-up in organization {SECRETS[0]} project {SECRETS[1]} on tokens "
    f"per min (TPM): Limit 30000, key {SECRETS[2]}. Please try again in 1.5s. Visit https://platform."
)
WAITING = f"{LIMIT_TEXT} Please try again in 1.5s."
PROBLEM = {"message": LIMIT, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}
JSON_BODY = json.dumps({"error": PROBLEM}).encode()
GZIP: Any = {"content-encoding": "gzip"}


def names_nothing(answer: httpx2.Response, pair: Pair) -> bool:
    shown = [answer.text, str(answer.headers), pair.gateway.flushed_log()]
    return not [each for each in shown for secret in SECRETS if secret in each]


def answer_with(
    body: bytes, status: int, headers: Any = (), kind: str = "application/json"
) -> Script:
    usual = {"retry-after": "7", "x-request-id": "req_1", "openai-organization": SECRETS[0]}
    return json_answer(body, status, {**usual, **dict(headers)}, kind)


def endless(status: int) -> Script:
    async def script(request: Received, reply: Reply) -> None:
        await reply.head(status, [("content-type", "text/plain")])
        while not request.closed.is_set():
            await reply.send(LIMIT.encode() * 100)
            await asyncio.sleep(0)

    return script


def torn(status: int) -> Script:
    async def script(_: Received, reply: Reply) -> None:
        await reply.head(status, [("content-type", "application/json")], "length:1000")
        await reply.send(JSON_BODY)
        await asyncio.sleep(0.05)
        reply.tear()

    return script


BODIES: dict[str, Script] = {
    "JSON": answer_with(JSON_BODY, 429),
    "gzip": answer_with(gzip.compress(JSON_BODY), 429, GZIP),
    "gzip without a header": answer_with(gzip.compress(JSON_BODY), 429),
    "text": answer_with(LIMIT.encode(), 429, kind="text/plain"),
    "HTML": answer_with(f"<html>{LIMIT}</html>".encode(), 429, kind="text/html; charset=utf-8"),
    "events": answer_with(b"data: " + JSON_BODY + b"\n\n", 429, kind="text/event-stream"),
    "endless": endless(429),
    "torn": torn(429),
}


# ── Bodies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/chat/completions", "/responses"])
@pytest.mark.parametrize("kind", list(BODIES))
def test_the_body_of_a_429(pair: Pair, kind: str, path: str) -> None:
    pair.alone()
    pair.bad.script = BODIES[kind]
    answer = pair.ask(path)
    assert names_nothing(answer, pair)
    assert answer.status_code == 429
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "content-encoding" not in answer.headers
    shown = answer.json()["error"]
    known = kind in ("JSON", "gzip", "gzip without a header", "torn")
    assert shown["message"] == WAITING
    assert (shown["code"], shown["param"]) == ("rate_limit_exceeded", None)
    assert shown["type"] == ("tokens" if known else "rate_limit_error")
    if kind not in ("endless", "torn"):
        assert (answer.headers["retry-after"], answer.headers["x-request-id"]) == ("7", "req_1")
    found = pair.met("outcome", "status", "upstream_status", "upstream_error_code", "usage_source")
    code = None if kind in ("text", "HTML", "endless") else "rate_limit_exceeded"
    assert found == ("upstream_error", 429, 429, code, "none")


@pytest.mark.parametrize(
    ("body", "headers", "kind"),
    [
        (b'{"error": {"message": "Slow down.", "code": "x"} }', {}, "application/json"),
        (b"", {}, "application/json"),
        (b"Slow down.", {}, "text/plain"),
        (gzip.compress(b'{"error": {"message": "Slow down."}}'), GZIP, "application/json"),
    ],
    ids=["JSON", "empty", "text", "gzip"],
)
def test_a_429_that_names_nothing_passes_unchanged(
    pair: Pair, body: bytes, headers: Any, kind: str
) -> None:
    pair.alone()
    pair.bad.script = answer_with(body, 429, headers, kind)
    with (
        pair.gateway.client(pair.key) as client,
        client.stream("POST", "/responses", json={"model": "gpt-up", "input": "x"}) as answer,
    ):
        assert b"".join(answer.iter_raw()) == body
    assert (answer.status_code, answer.headers["content-type"]) == (429, kind)
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b"no gzip", GZIP), (LIMIT.encode("utf-16"), {}), (b"{}", {"x-why": f"of {SECRETS[0]}"})],
    ids=["no gzip", "UTF-16", "a header"],
)
def test_a_429_that_can_not_be_read_is_replaced(pair: Pair, body: bytes, headers: Any) -> None:
    pair.alone()
    pair.bad.script = answer_with(body, 429, headers)
    answer = pair.ask("/responses")
    assert names_nothing(answer, pair)
    assert answer.json()["error"]["message"].startswith(LIMIT_TEXT)


def test_a_quota_of_the_operators(pair: Pair) -> None:
    """The code is kept: Codex CLI does not try again after it."""
    pair.alone()
    text = f"You exceeded your current quota, please check your plan and billing details. {LIMIT}"
    problem = {
        **PROBLEM,
        "message": text,
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
    pair.bad.script = json_answer({"error": problem}, 429, {"x-should-retry": "false"})
    answer = pair.ask()
    assert answer.json()["error"] == {**problem, "message": QUOTA_TEXT}
    assert answer.headers["x-should-retry"] == "false"
    assert names_nothing(answer, pair)
    assert pair.met("upstream_error_code") == ("insufficient_quota",)


def test_the_wait_is_the_headers_if_another_one_can_be_asked_sooner(pair: Pair) -> None:
    pair.bad.script = json_answer({"error": {}}, 500)
    pair.good.script = json_answer({"error": PROBLEM}, 429, {"retry-after": "9"})
    assert pair.ask().headers["retry-after"] == "9"
    pair.bad.script = json_answer({"error": PROBLEM}, 429, {"retry-after": "50"})
    answer = pair.ask()
    seconds = int(answer.headers["retry-after"])
    assert 1 <= seconds <= 9
    message = f"{LIMIT_TEXT} Please try again in {seconds}s."
    assert answer.json()["error"] == {**PROBLEM, "message": message}


@pytest.mark.parametrize("kind", ["JSON", "gzip", "text"])
@pytest.mark.parametrize("status", [400, 404, 409, 422, 500, 503, 529])
def test_other_errors_pass_unchanged(pair: Pair, status: int, kind: str) -> None:
    pair.alone()
    body = {"JSON": JSON_BODY, "gzip": gzip.compress(JSON_BODY), "text": LIMIT.encode()}[kind]
    pair.bad.script = json_answer(body, status, GZIP if kind == "gzip" else ())
    with pair.gateway.client(pair.key) as client:
        content = {"model": MODEL, "messages": []}
        with client.stream("POST", "/chat/completions", json=content) as answer:
            assert (answer.status_code, b"".join(answer.iter_raw())) == (status, body)
    pair.wait_until_idle()


# ── Stored responses, models ─────────────────────────────────────────────────────────────────────

READERS = [
    ("GET", ""),
    ("GET", "?stream=true"),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("GET", "/input_items"),
]


@pytest.mark.parametrize(("method", "suffix"), READERS)
@pytest.mark.parametrize("status", [401, 403, 429])
def test_requests_for_stored_responses(pair: Pair, method: str, suffix: str, status: int) -> None:
    pair.alone()
    pair.bad.script = ResponseStore(first=10_000 * pair.number)
    made = pair.ask("/responses").json()["id"]
    pair.bad.script = answer_with(JSON_BODY, status)
    with pair.gateway.client(pair.key) as client:
        answer = client.request(method, f"/responses/{made}{suffix}")
    if status == 429:
        assert (answer.status_code, answer.json()["error"]) == (
            429,
            {**PROBLEM, "message": WAITING},
        )
        assert answer.headers["retry-after"] == "7"
    else:
        assert error(answer)[:2] == (502, "upstream_credentials_rejected")
    assert names_nothing(answer, pair)
    pair.wait_until_idle()


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_model(pair: Pair, status: int) -> None:
    pair.alone()
    pair.bad.script = answer_with(JSON_BODY, status)
    with pair.gateway.client(pair.key) as client:
        for path in (f"/models/{MODEL}", "/models"):
            answer = client.get(path)
            assert error(answer)[:2] == (502, "upstream_unreachable")
            assert names_nothing(answer, pair)


def failed_response(**more: Any) -> dict[str, Any]:
    problem = {"code": "rate_limit_exceeded", "message": LIMIT}
    return response_object(status="failed", usage=None, **{"error": problem, "output": [], **more})


@pytest.mark.parametrize("framing", ["length", "chunked", "in parts", "long"])
def test_a_stored_response_that_has_failed(pair: Pair, framing: str) -> None:
    """Only the bytes of its error are exchanged, and its length is right."""
    pair.alone()
    response_id = f"resp_failed_{pair.number}_{framing.replace(' ', '_')}"
    pair.bad.script = json_answer(response_object(id=response_id))
    assert pair.ask("/responses", store=True).status_code == 200
    more = {"instructions": "x" * 200_000} if framing == "long" else {}
    body = json.dumps(failed_response(id=response_id, **more), indent=1).encode()

    async def script(_: Received, reply: Reply) -> None:
        length = "chunked" if framing == "chunked" else f"length:{len(body)}"
        await reply.head(200, [("content-type", "application/json")], length)
        size = {"in parts": 7, "long": 30_000}.get(framing, len(body))
        for at in range(0, len(body), size):
            await reply.send(body[at : at + size])
            await asyncio.sleep(0)
        await reply.end()

    pair.bad.script = script
    with pair.gateway.client(pair.key) as client:
        answer = client.get(f"/responses/{response_id}")
    problem = json.dumps({"code": "rate_limit_exceeded", "message": WAITING}, separators=(",", ":"))
    original = json.dumps(failed_response()["error"], indent=1).replace("\n", "\n ")
    assert answer.content == body.replace(original.encode(), problem.encode())
    assert answer.content != body
    assert names_nothing(answer, pair)
    pair.wait_until_idle()


@pytest.mark.parametrize("status", ["completed", "in_progress", "failed"])
def test_other_stored_responses_pass_unchanged(pair: Pair, status: str) -> None:
    pair.alone()
    response_id = f"resp_other_{pair.number}"
    problem = {"code": "server_error", "message": LIMIT} if status == "failed" else None
    content = response_object(status=status, error=problem, id=response_id, instructions=LIMIT)
    body = json.dumps(content, indent=2).encode()
    pair.bad.script = json_answer(body)
    assert pair.ask("/responses", store=True).content == body
    with pair.gateway.client(pair.key) as client:
        assert client.get(f"/responses/{response_id}").content == body
    pair.wait_until_idle()


def test_an_answer_with_status_200_that_is_an_error(pair: Pair) -> None:
    """OpenRouter answers so."""
    pair.alone()
    pair.bad.script = json_answer({"error": {**PROBLEM, "code": 429, "metadata": {"raw": LIMIT}}})
    answer = pair.ask()
    assert answer.json() == {"error": {**PROBLEM, "code": 429, "message": WAITING}}
    assert names_nothing(answer, pair)
    assert pair.met("outcome", "upstream_error_code") == ("upstream_error", "429")


FIRST_ERROR = json.dumps({"error": PROBLEM}).encode()
LATER_ERROR = json.dumps(failed_response(id="resp_later")).encode()


@pytest.mark.parametrize("length", ["chunked", "length"])
@pytest.mark.parametrize(
    ("before", "body", "cuts"),
    [
        *((b"", FIRST_ERROR, [at]) for at in range(1, 12)),
        (b"", FIRST_ERROR, list(range(len(FIRST_ERROR)))),
        (b"", LATER_ERROR, [LATER_ERROR.index(b'"error"')]),
        (b"", LATER_ERROR, [LATER_ERROR.index(b'"error"') + 4]),
        (b"\n", FIRST_ERROR, [0, 5]),
        (b"\n" * 5000, FIRST_ERROR, [0]),
    ],
)
def test_wherever_an_answer_that_is_an_error_is_cut(
    pair: Pair, before: bytes, body: bytes, cuts: list[int], length: str
) -> None:
    """Blanks before it are sent at once, so that the client does not give up."""
    pair.alone()
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]

    async def script(_: Received, reply: Reply) -> None:
        size = len(before) + len(body)
        told = f"length:{size}" if length == "length" and len(before) < 4096 else "chunked"
        await reply.head(200, [("content-type", "application/json")], told)
        for piece in filter(None, [before, *pieces]):
            await reply.send(piece)
            await asyncio.sleep(0.01)
        await reply.end()

    pair.bad.script = script
    answer = pair.ask("/responses")
    assert names_nothing(answer, pair)
    assert answer.json()["error"]["message"] == WAITING
    assert answer.content.startswith(before)


def test_an_answer_that_ends_within_its_error(pair: Pair) -> None:
    pair.alone()
    pair.bad.script = json_answer(FIRST_ERROR[:-20])
    answer = pair.ask()
    assert names_nothing(answer, pair)
    assert answer.content.startswith(b"{")


def test_an_escaped_limit(pair: Pair) -> None:
    text = rb"Limit of \u006frg\u002dAbC123. Please try again in 1.5s."
    pair.alone()
    pair.bad.script = answer_with(b'{"error":{"code":"a","message":"%b"}}' % text, 429)
    answer = pair.ask()
    assert answer.json()["error"]["message"] == WAITING
    assert names_nothing(answer, pair)


@pytest.mark.parametrize("together", [True, False])
def test_an_error_after_the_end_of_a_stream(pair: Pair, together: bool) -> None:
    created = response_pieces(["Hel", "lo"])
    late = event({**PROBLEM, "type": "error"}, "error")
    pair.alone()
    pieces = [*created[:-1], created[-1] + late] if together else [*created, late]
    pair.bad.script = stream(pieces, pause=0.05)
    answer = pair.ask("/responses", stream=True)
    assert b"".join(created) in answer.content
    assert names_nothing(answer, pair)


def test_no_row_of_a_background_response_has_an_id_for_a_code(pair: Pair) -> None:
    code = "sk-proj-abcdEF6789"
    made = response_object(id=f"resp_bg_{pair.number}", status="queued", output=[], usage=None)
    failed = {**made, "status": "failed", "error": {"code": code, "message": "No."}}

    async def script(request: Received, reply: Reply) -> None:
        await json_answer(failed if request.method == "GET" else made)(request, reply)

    pair.alone()
    pair.bad.script = script
    assert pair.ask("/responses", background=True, store=True).status_code == 200
    wait_until(lambda: pair.row["outcome"] == "upstream_error")
    assert pair.row["upstream_error_code"] == "200"


@pytest.mark.parametrize("code", ["sk-proj-abcdEF6789", "limit:org-AbC123", "proj_xyz987"])
def test_no_row_has_an_id_for_a_code(pair: Pair, code: str) -> None:
    pair.alone()
    problem = {"type": "error", "status": 401, "error": {"code": code, "message": "No."}}
    for script in (stream([event(problem)]), json_answer({"error": problem["error"]}, 429)):
        pair.bad.script = script
        assert code not in pair.ask("/responses", stream=True).text
    pair.wait_until_idle()
    shown = pair.gateway.rows(account=pair.account)
    assert len(shown) == 2
    assert code not in json.dumps(shown) + pair.gateway.flushed_log()


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────


def ends(code: str) -> dict[str, tuple[str, list[bytes]]]:
    """Return the events of streams that end with an error, by its way, with the path."""
    problem = {**PROBLEM, "code": code, "type": code}
    created = response_pieces(["Hel", "lo"])[:-1]
    chunk = event(chat_chunk(MODEL, {"content": "a"}))
    response = failed_response(error={"code": code, "message": LIMIT})
    failed = {"type": "response.failed", "sequence_number": 9, "response": response}
    return {
        "chat": ("/chat/completions", [chunk, event({"error": problem}), b"data: [DONE]\n\n"]),
        "failed": ("/responses", [*created, event(failed, "response.failed")]),
        "error": ("/responses", [*created, event({**problem, "type": "error"}, "error")]),
        "images": ("/images/generations", [event({"type": "error", "error": problem}, "error")]),
    }


TEXTS = {
    "rate_limit_exceeded": WAITING,
    "insufficient_quota": QUOTA_TEXT,
    "invalid_api_key": REJECTED_TEXT,
    "permission_error": REJECTED_TEXT,
}
WAYS = list(ends(""))


@pytest.mark.parametrize("code", list(TEXTS))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [40, 1_000_000])
def test_events_within_a_stream(pair: Pair, way: str, code: str, size: int) -> None:
    """Exactly the bytes of the message are exchanged. The row has the original's code."""
    pair.alone()
    path, pieces = ends(code)[way]
    whole = b"".join(pieces)
    if way in ("chat", "images"):
        separators = (",", ":")
        problem = {**PROBLEM, "code": code, "type": code}
        shown = json.dumps({**problem, "message": TEXTS[code]}, separators=separators).encode()
        expected = whole.replace(json.dumps(problem).encode(), shown)
    elif way == "failed":
        problem = {"code": code, "message": LIMIT}
        shown = json.dumps({**problem, "message": TEXTS[code]}, separators=(",", ":")).encode()
        expected = whole.replace(json.dumps(problem).encode(), shown)
    else:
        expected = whole.replace(json.dumps(LIMIT).encode(), json.dumps(TEXTS[code]).encode())
    pair.bad.script = stream([whole[at : at + size] for at in range(0, len(whole), size)])
    usage = {"stream_options": {"include_usage": True}} if way == "chat" else {}
    fields = {"prompt": "a", "messages": None, "input": None} if way == "images" else usage
    answer = pair.ask(path, stream=True, **fields)
    assert answer.content == expected
    assert names_nothing(answer, pair)
    assert pair.met("outcome", "upstream_error_code") == ("upstream_error", code)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", ["server_error", "context_length_exceeded", "slow_down"])
def test_other_events_pass_unchanged(pair: Pair, way: str, code: str) -> None:
    pair.alone()
    path, pieces = ends(code)[way]
    pair.bad.script = stream(pieces)
    usage = {"stream_options": {"include_usage": True}} if way == "chat" else {}
    fields = {"prompt": "a", "messages": None, "input": None} if way == "images" else usage
    assert pair.ask(path, stream=True, **fields).content == b"".join(pieces)
    pair.wait_until_idle()


def test_a_stream_with_an_error_status_passes_unchanged(pair: Pair) -> None:
    pair.alone()
    body = b"data: " + JSON_BODY + b"\n\n"
    pair.bad.script = json_answer(body, 400, content_type="text/event-stream")
    assert pair.ask(stream=True).content == body
    pair.wait_until_idle()
