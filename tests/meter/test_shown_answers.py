"""Errors about the operator's credentials within answers: the client gets the gateway's text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from redbtc.meter.operator_errors import (
    LIMIT_TEXT,
    QUOTA_TEXT,
    REJECTED_TEXT,
    TOO_LARGE_TEXT,
    decoded_body,
    own_body,
)
from redbtc.meter.shown_answers import shown_event, shown_json, shown_message
from redbtc.meter.streams import MAX_HELD, StreamMeter

pytestmark = [pytest.mark.promise_1, pytest.mark.promise_7]

SECRETS = "org-AbC123 proj_xyz sk-proj-*****6789"
LIMIT = (
    f"Rate limit reached in {SECRETS} on TPM: Limit 3. Please try again in 1.5s. Visit https://x"
)
SECRET = re.compile(rb"AbC123|proj_xyz|6789|https://x")
WAITING = f"{LIMIT_TEXT} Please try again in 1.5s."


def error(code: Any, kind: Any = "tokens", **more: Any) -> dict[str, Any]:
    return {"message": LIMIT, "type": kind, "param": None, "code": code, **more}


def failed(problem: Any, **more: Any) -> dict[str, Any]:
    response = {"id": "resp_1", "status": "failed", "error": problem, "output": [{"a": [1, "}"]}]}
    return {
        "type": "response.failed",
        "sequence_number": 7,
        "response": {**response, "usage": {"input_tokens": 3}},
        **more,
    }


EVENTS = {
    "a failed response": failed(error("rate_limit_exceeded")),
    "a chat's error": {"error": error("rate_limit_exceeded")},
    "a type alone": {"error": error(None, "rate_limit_error")},
    "a number": {"error": error(429, None)},
    "a number as text": {"error": error("429", None)},
    "a WebSocket's error": {"type": "error", "status": 429, "error": error("own_code")},
    "an error event": {
        "type": "error",
        "code": "rate_limit_exceeded",
        "message": LIMIT,
        "param": None,
    },
    "an error that is text": {"type": "error", "status": 429, "error": LIMIT},
    "text beside its code": {"error": LIMIT, "code": "rate_limit_exceeded"},
    "at its end": {"id": "x", "choices": [], "error": error("rate_limit_exceeded")},
}


@pytest.mark.parametrize("content", EVENTS.values(), ids=list(EVENTS))
def test_only_the_message_is_exchanged(content: dict[str, Any]) -> None:
    text = json.dumps(content, separators=(",", ":")).encode()
    assert SECRET.search(text)
    expected = text.replace(json.dumps(LIMIT).encode(), json.dumps(WAITING).encode())
    assert shown_json(text) == expected
    assert shown_message(text) == expected
    assert shown_message(text.decode()) == expected.decode()
    assert shown_event(b"event: x\ndata: " + text + b"\n\n") == (
        b"event: x\ndata: " + expected + b"\n\n"
    )


OTHERS = {
    "another code": failed(error("server_error", "server_error")),
    "another status": {"type": "error", "status": 400, "error": error("rate_limit_exceeded")},
    "no error": {"type": "response.completed", "response": {"error": None, "output": [LIMIT]}},
    "text of the model": {"choices": [{"delta": {"content": f'"error": {LIMIT}'}}]},
    "an item's error": {"item": {"error": error("rate_limit_exceeded")}, "type": "x"},
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=list(OTHERS))
def test_everything_else_passes_unchanged(content: dict[str, Any]) -> None:
    text = json.dumps(content).encode()
    assert shown_json(text) is text
    assert shown_event(b"data: " + text + b"\n\n") == b"data: " + text + b"\n\n"


@pytest.mark.parametrize(
    "text", [b"", b"[DONE]", b'"error"', b'["error"]', b'{"error"', b'{"error":']
)
def test_what_is_no_object_passes_unchanged(text: bytes) -> None:
    assert shown_json(text) == text
    assert shown_event(b"data: " + text + b"\n\n") == b"data: " + text + b"\n\n"


def test_nothing_else_of_the_error_names_the_operator() -> None:
    odd = error(SECRETS, "invalid_api_key", param=SECRETS, metadata={"raw": SECRETS}, debug=SECRETS)
    headers = {"Retry-After": "3", "openai-organization": "org-AbC123"}
    content = {"type": "error", "status": 401, "error": {**odd, "headers": headers}}
    shown = shown_json(json.dumps({**content, "headers": headers, "code": SECRETS}).encode())
    assert not SECRET.search(shown)
    assert json.loads(shown) == {
        "type": "error",
        "status": 401,
        "error": {
            "message": REJECTED_TEXT,
            "type": "invalid_api_key",
            "param": None,
            "code": None,
            "headers": {"Retry-After": "3"},
        },
        "headers": {"Retry-After": "3"},
        "code": "401",
    }


@pytest.mark.parametrize(
    ("original", "code", "text"),
    [
        (
            "org-a1: Please try again in 20ms.",
            "rate_limit_exceeded",
            f"{LIMIT_TEXT} Please try again in 20ms.",
        ),
        (
            "For project x, try again in 1m26.4s.",
            "rate_limit_exceeded",
            f"{LIMIT_TEXT} Please try again in 1m26.4s.",
        ),
        (
            "user-Ab: Try again in 35 seconds",
            "429",
            f"{LIMIT_TEXT} Please try again in 35 seconds.",
        ),
        ("try again in 5sk-proj-6789", "429", f"{LIMIT_TEXT} Please try again later."),
        ("Organisation a exceeded its quota", "insufficient_quota", QUOTA_TEXT),
        ("Request too large for gpt in organization", "rate_limit_exceeded", TOO_LARGE_TEXT),
        ("Incorrect API key provided: sk-proj-6789", "invalid_api_key", REJECTED_TEXT),
    ],
)
def test_the_gateways_text(original: str, code: str, text: str) -> None:
    shown = json.loads(
        shown_json(json.dumps({"error": {"code": code, "message": original}}).encode())
    )
    assert shown == {"error": {"code": code, "message": text}}
    assert "\n" not in text
    assert not re.search(r"in \d", text) or re.search(r"(?i)try again in\s*\d", text)


@pytest.mark.parametrize(
    "text",
    [
        "You exceeded your current quota, please check your plan and billing details.",
        "Rate limit reached for gpt-5.5 on tokens per min (TPM): Limit 3, Used 2, Requested 2.",
        "Slow down. Please try again in 1.5s.",
    ],
)
def test_a_limit_that_names_nothing_passes_unchanged(text: str) -> None:
    plain = json.dumps({"error": {"message": text, "code": "rate_limit_exceeded"}}).encode()
    assert shown_json(plain) == plain


@pytest.mark.parametrize(
    "more", [{"code": "org-AbC123"}, {"type": "org-AbC123"}, {"param": "proj_Ab12"}]
)
def test_an_id_is_no_code(more: dict[str, str]) -> None:
    text = json.dumps({"status": "429", "error": {"message": "No.", "code": "x", **more}})
    assert not re.search(b"org-|proj_", shown_json(text.encode()))


def test_an_escaped_name_is_found() -> None:
    text = rb'{"error":{"code":"rate_limit_exceeded","message":"\u006frg-AbC \u006frganization"}}'
    assert b"006f" not in shown_json(text)


@pytest.mark.parametrize("odd", [rb"\ud83d", b"\t", b"\n", b"\x01"])
def test_an_error_that_only_lenient_readers_read_is_found(odd: bytes) -> None:
    text = json.dumps({"error": {**error("rate_limit_exceeded"), "n": 1}}).encode()
    for lenient in (text.replace(b"on TPM", odd), text.replace(b'"n": 1', b'"n": NaN')):
        assert lenient != text
        assert not SECRET.search(shown_json(lenient))
        assert json.loads(shown_json(lenient))["error"]["message"] == WAITING
    headers = b'"headers": {"retry-after": "\\ud83d", "x-request-id": "a"}, "code"'
    shown = json.loads(shown_json(text.replace(b'"code"', headers)))["error"]
    assert shown["headers"] == {"x-request-id": "a"}


@pytest.mark.parametrize("text", ["Bad bearer gsk_ab6789ZZ", "No.", "Invalid token: eyJhb"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_rejection_says_nothing_of_its_own(text: str, status: int) -> None:
    """A key can have any form."""
    event = {"type": "error", "status": status, "error": {"code": "unauthorized", "message": text}}
    shown = json.loads(shown_json(json.dumps(event).encode()))
    assert shown["error"] == {"code": "unauthorized", "message": REJECTED_TEXT}


@pytest.mark.parametrize(
    "code",
    ["billing_not_active", "account_deactivated", "too_many_requests", "rate_limit"],
)
def test_codes_that_stand_for_a_status(code: str) -> None:
    assert not SECRET.search(shown_json(json.dumps({"error": error(code, None)}).encode()))


def test_an_event_of_several_lines_becomes_one_line() -> None:
    lines = json.dumps({"error": error("rate_limit_exceeded")}, indent=1).encode().split(b"\n")
    for end in (b"\n", b"\r", b"\r\n"):
        text = end.join(
            [b"\xef\xbb\xbfdata: " + lines[0], b"id: 5", *(b"data:" + x for x in lines[1:])]
        )
        shown = shown_event(text + end + end)
        assert shown.count(b"data:") == 1
        assert shown.endswith(end + b"id: 5" + end + end)
        assert json.loads(shown.split(end)[0].removeprefix(b"\xef\xbb\xbfdata: "))["error"] == (
            error("rate_limit_exceeded") | {"message": WAITING}
        )


# ── In a stream ──────────────────────────────────────────────────────────────────────────────────


def fed(meter: StreamMeter, parts: list[bytes]) -> bytes:
    passed = b""
    for part in parts:
        passed += meter.feed(part) if meter.state == "open" else meter.rest() + meter.feed(part)
    meter.finish()
    return passed + meter.rest()


DELTA = b'data: {"type":"response.output_text.delta","delta":"Hi"}\n\n'


@pytest.mark.parametrize("name", list(EVENTS))
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_wherever_a_stream_is_cut(name: str, end: bytes) -> None:
    text = json.dumps(EVENTS[name]).encode()
    event = b"event: x" + end + b"data: " + text + end + end
    after = b"" if name == "a failed response" else DELTA  # which ends the stream
    whole = DELTA + event + after
    expected = DELTA + shown_event(event) + after
    assert not SECRET.search(expected)
    cuts = [[whole[:at], whole[at:]] for at in range(len(whole))]
    chat = "response" not in EVENTS[name] and EVENTS[name].get("type") is None
    for parts in [*cuts, [whole[at : at + 1] for at in range(len(whole))]]:
        meter = StreamMeter(images=False, chat=chat, take_out_usage=False, hides_errors=True)
        assert fed(meter, parts) == expected, parts
        assert meter.report.failed
        plain = StreamMeter(images=False, chat=chat, take_out_usage=False)
        assert fed(plain, parts) == whole
        assert plain.report.error_code == meter.report.error_code


def test_a_failed_response_that_is_too_large_to_be_held() -> None:
    """Its error comes before what is long."""
    content = failed(error("rate_limit_exceeded"))
    content["response"]["instructions"] = "x" * (3 * MAX_HELD)
    content["response"]["output"] = [{"type": "message", "id": "m", "content": "y" * MAX_HELD}]
    event = b"event: response.failed\ndata: " + json.dumps(content).encode() + b"\n\n"
    for size in (1000, 16 << 10):
        meter = StreamMeter(images=False, chat=False, take_out_usage=False, hides_errors=True)
        parts = [event[at : at + size] for at in range(0, len(event), size)]
        assert fed(meter, parts) == shown_event(event)
        assert meter.report.error_code == "rate_limit_exceeded"
    assert not SECRET.search(shown_event(event))


def test_what_arrived_of_an_event_that_is_cut_off() -> None:
    for content in ({"error": error("rate_limit_exceeded")}, failed(error("rate_limit_exceeded"))):
        event = b"data: " + json.dumps(content).encode()
        for at in range(len(event)):
            meter = StreamMeter(images=False, chat=False, take_out_usage=False, hides_errors=True)
            assert not SECRET.search(fed(meter, [event[:at]])), event[:at]


def test_an_error_in_a_long_chat_stream() -> None:
    """The events of OpenRouter have the members of a chunk before the error."""
    content = {"id": "x", "object": "chat.completion.chunk", "choices": [], "error": error(429)}
    event = b"data: " + json.dumps(content).encode() + b"\n\n"
    chunk = b'data: {"id":"x","choices":[{"delta":{"content":"a"}}]}\n\n'
    meter = StreamMeter(images=False, chat=True, take_out_usage=False, hides_errors=True)
    parts = [chunk, chunk + event[:200], event[200:] + chunk, b"data: [DONE]\n\n"]
    assert fed(meter, parts) == chunk * 2 + shown_event(event) + chunk + parts[-1]


# ── As the body of an answer ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"error": error("rate_limit_exceeded", x=1)}, error("rate_limit_exceeded")),
        ({"error": error(429, None)}, error(429, None)),
        ({"error": LIMIT}, error("rate_limit_exceeded", "rate_limit_error")),
        (
            {"type": "error", "error": {"type": "rate_limit_error", "message": LIMIT}},
            error(None, "rate_limit_error"),
        ),
        ({"message": LIMIT, "code": "1302"}, error("1302", None)),
        ([LIMIT], error("rate_limit_exceeded", "rate_limit_error")),
        (LIMIT, error("rate_limit_exceeded", "rate_limit_error")),
    ],
)
def test_the_body_of_a_429(body: Any, shown: dict[str, Any]) -> None:
    text = json.dumps(body).encode()
    assert json.loads(own_body(429, text)) == {"error": {**shown, "message": WAITING}}
    sooner = f"{LIMIT_TEXT} Please try again in 7s."
    assert json.loads(own_body(429, text, "7s"))["error"]["message"] == sooner


def test_a_body_that_cannot_be_decoded_is_taken_as_it_is() -> None:
    assert decoded_body(b"x" * 100, [b"unheard-of"]) == b"x" * 100
    assert decoded_body(b"", [b"gzip"]) == b""
