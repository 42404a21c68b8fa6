"""The code in an upstream's error: read where it stands, accepted only in the form of a code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from redbtc.meter.error_codes import MAX_ERROR_BYTES, error_code_in
from redbtc.meter.meters import JSONMeter
from redbtc.meter.streams import StreamMeter
from redbtc.upstream.headers import request_id_in

pytestmark = pytest.mark.promise_6

LIMITED = {"message": "Slow down, sk-secret", "type": "requests", "code": "rate_limit_exceeded"}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"error": LIMITED}, "rate_limit_exceeded"),
        ({"error": {**LIMITED, "code": None}}, "requests"),
        ({"error": {**LIMITED, "code": ""}}, "requests"),
        ({"error": {"message": "m", "code": 429}}, "429"),
        ({"error": {"message": "m", "code": True}}, None),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
            "overloaded_error",
        ),
        ({"type": "error", "code": "server_error", "message": "m"}, "server_error"),
        (
            {"type": "response.failed", "response": {"status": "failed", "error": LIMITED}},
            "rate_limit_exceeded",
        ),
        ({"code": "not_an_error"}, None),
        ({"error": "the model is overloaded"}, None),
        ({"error": {"message": "rate_limit_exceeded"}}, None),
        ({"error": [LIMITED]}, None),
        ({"error": {"code": "two words", "type": "fine"}}, "fine"),
        ({"error": {"code": "x" * 64}}, "x" * 64),
        ({"error": {"code": "x" * 65}}, None),
        ({"error": {"code": "-dash"}}, None),
        ({"error": {"code": "x\n"}}, None),
        ({"error": {"code": "sk-é"}}, None),
        ({"error": None}, None),
        ([{"error": LIMITED}], None),
        ("text", None),
    ],
)
def test_the_code_of_an_error_is_found(body: Any, code: str | None) -> None:
    assert error_code_in(json.dumps(body).encode()) == code


@pytest.mark.parametrize("body", [b"", b"<html>502</html>", b'{"error": {"code": "x"', b"\xff\x00"])
def test_a_body_that_is_not_json_has_no_code(body: bytes) -> None:
    assert error_code_in(body) is None


def test_a_body_that_is_too_long_is_not_read() -> None:
    def body(size: int) -> bytes:
        start, end = b'{"error": {"code": "x", "message": "', b'"}}'
        return start + b"m" * (size - len(start) - len(end)) + end

    assert error_code_in(body(MAX_ERROR_BYTES)) == "x"
    assert error_code_in(body(MAX_ERROR_BYTES + 1)) is None


@pytest.mark.parametrize("padding", [0, 300 << 10])
def test_the_meter_of_json_finds_the_code(padding: int) -> None:
    meter = JSONMeter(images=False)
    body = json.dumps({"x": "y" * padding, "error": LIMITED}).encode()
    meter.feed(body)
    meter.finish()
    assert meter.report.failed
    assert meter.report.error_code == "rate_limit_exceeded"


def test_half_a_code_is_none() -> None:
    meter = JSONMeter(images=False)
    meter.feed(b'{"error": {"code": "rate_li')
    meter.cut_off()
    assert meter.report.error_code is None


@pytest.mark.parametrize(
    ("chat", "event", "code"),
    [
        (True, {"error": LIMITED}, "rate_limit_exceeded"),
        (True, {"choices": [], "error": {"code": 502, "message": "m"}}, "502"),
        (False, {"type": "error", "code": "server_error", "message": "m"}, "server_error"),
        (False, {"type": "error", "error": LIMITED}, "rate_limit_exceeded"),
        (
            False,
            {"type": "response.failed", "response": {"status": "failed", "error": LIMITED}},
            "rate_limit_exceeded",
        ),
        (False, {"type": "response.failed", "response": {"status": "failed"}}, None),
        (False, {"type": "response.completed", "response": {"error": None}}, None),
    ],
)
def test_the_meter_of_events_finds_the_code(chat: bool, event: Any, code: str | None) -> None:
    meter = StreamMeter(images=False, chat=chat, take_out_usage=False)
    meter.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    meter.feed(b'data: {"type": "response.output_text.delta", "delta": "\\"error\\""}\n\n')
    meter.finish()
    assert meter.report.error_code == code


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"req_1f", "req_1f"),
        (b"9f3c-00/a+b=~", "9f3c-00/a+b=~"),
        (b"x" * 128, "x" * 128),
        (b"x" * 129, None),
        (b"two words", None),
        (b"tab\there", None),
        (b"caf\xc3\xa9", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("name", [b"x-request-id", b"X-Request-ID"])
def test_a_request_id_is_printable(name: bytes, value: bytes, found: str | None) -> None:
    assert request_id_in([(b"content-type", b"x"), (b"x-other", b"y"), (name, value)]) == found


def test_an_answer_without_a_request_id_has_none() -> None:
    assert request_id_in([(b"x-request-idx", b"a"), (b"request-id", b"b")]) is None
