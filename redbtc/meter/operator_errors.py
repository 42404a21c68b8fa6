"""The errors of an upstream that are about the operator's credentials, and the gateway's own text
for them.

The text of a 401, 403 or 429 can name pieces of the operator's key, the organization and the
project. The client is then shown the gateway's own text in its place, with the code, type and
parameter of the error. An error without a status, as in a stream, is judged by its code or type.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from redbtc.meter.decoding import Decoding, NotDecoded
from redbtc.meter.error_codes import (
    CREDENTIAL_STATUSES,
    OPERATORS_ID,
    REJECTED_STATUSES,
    STATUS_OF_CODE,
    code_in,
    kept_code,
)

QUOTA_CODES = ("insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached")
TOO_LARGE = "Request too large"  # how OpenAI's 429 begins that is about one request only
# How OpenAI says when to try again. Codex CLI looks for this text in events, which have no headers.
WAIT = re.compile(
    r"try again in ((?:\d{1,7}(?:\.\d{1,7})?(?:ms|[smhd])){1,4}(?!\w)|"
    r"\d{1,7}(?:\.\d{1,7})? seconds?\b)",
    re.IGNORECASE,
)
# What names, or may name, something of the operator's.
OPERATORS = re.compile(
    r"organi[sz]ation|project|\bkeys?\b|api_?key|credential|"
    r"\b(?:org|proj|user|acct|team|tenant|key|sk|pk|sess)[-_][a-z0-9]|\*{3}",
    re.IGNORECASE,
)
ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
ERROR_STATUS = re.compile("[45][0-9][0-9]")
PLAIN = re.compile("[ -~]*")
PARAM = re.compile(r"[A-Za-z_][\w.\[\]-]{0,99}", re.ASCII)
KEPT_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "x-request-id")
MAX_DECODED_BODY = 256 << 10

QUOTA_TEXT = (
    "The gateway's own quota at the upstream is used up. Your balance is not affected. "
    "Tell your administrator."
)
REJECTED_TEXT = "The upstream rejected the gateway's own credentials. Tell your administrator."
TOO_LARGE_TEXT = (
    "Request too large: it needs more tokens than the upstream allows at once. "
    "Reduce its input or its maximum output."
)
LIMIT_TEXT = "The upstream has reached a rate limit."


def names_operator(text: str) -> bool:
    """Return whether the text of an error may name something of the operator's. It may be JSON."""
    plain = ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    return OPERATORS.search(plain) is not None


def own_message(status: int, codes: tuple[Any, ...], text: str, wait: str = "") -> str:
    """Return the gateway's text for an error with this status, code and type. It says how long to
    wait: `wait` or, if that is "", what the upstream's `text` says."""
    if status in REJECTED_STATUSES:
        return REJECTED_TEXT
    if any(code in QUOTA_CODES for code in codes):
        return QUOTA_TEXT
    if text.startswith(TOO_LARGE):
        return TOO_LARGE_TEXT
    found = WAIT.search(text)
    wait = wait or (found[1] if found else "")
    return f"{LIMIT_TEXT} Please try again {f'in {wait}' if wait else 'later'}."


def own_error(error: dict[str, Any], status: int, wait: str = "") -> dict[str, Any]:
    """Return an error object with the gateway's own message, and those members of the original that
    can name nothing of the operator's."""
    code, kind = code_in(error.get("code")), code_in(error.get("type"))
    shown: dict[str, Any] = {}
    for name, value in error.items():
        if name == "message":
            shown[name] = own_message(status, (code, kind), str(value), wait)
        elif name == "code":
            shown[name] = value if type(value) is int and code else kept_code(status, code)
        elif name == "type":
            shown[name] = kept_code(status, kind)
        elif name == "param":
            is_param = isinstance(value, str) and PARAM.fullmatch(value)
            shown[name] = value if is_param and not OPERATORS_ID.search(value) else None
        elif name == "headers":
            shown[name] = own_headers(value)
    return shown


def own_headers(headers: Any) -> dict[str, Any]:
    """Return the headers within an error event that the client is shown."""
    named = headers if isinstance(headers, dict) else {}
    return {
        name: value
        for name, value in named.items()
        if name.lower() in KEPT_HEADERS and PLAIN.fullmatch(str(value))
    }


def own_body(status: int, body: bytes, wait: str = "") -> bytes:
    """Return the body that the client gets in place of the decoded `body` of an answer with this
    status: an error in OpenAI's form, with the code, type and parameter of the original. If that
    has none, they are those of the gateway's own rate limit."""
    answer = loaded(body)
    error = answer.get("error") or answer if isinstance(answer, dict) else answer
    text = error if isinstance(error, str) else body.decode("utf-8", "replace")
    usual = {"message": text, "type": None, "param": None, "code": None}
    members = error if isinstance(error, dict) else {}
    shown = own_error({name: members.get(name, usual[name]) for name in usual}, status, wait)
    if not (shown["type"] or shown["code"]):
        shown |= {"type": "rate_limit_error", "code": "rate_limit_exceeded"}
    return orjson.dumps({"error": shown})


def decoded_body(body: bytes, codings: list[bytes]) -> bytes:
    """Return the beginning of an error answer's body without the codings that its header names, or
    that its first bytes show; as it is if it can't be decoded."""
    decoding = Decoding(codings)
    decoded = b""
    try:
        for part in decoding.decoded(body):
            decoded += part
            if len(decoded) > MAX_DECODED_BODY:
                break
    except NotDecoded:
        return body
    return decoded + decoding.rest()


def loaded(text: bytes) -> Any:
    """Return the value of a JSON text, or of one that only lenient readers take for JSON; None if
    it is neither."""
    decoded = text.decode("utf-8", "replace")
    try:
        return orjson.loads(decoded)
    except ValueError:
        pass
    try:
        return json.loads(decoded, strict=False)
    except (ValueError, RecursionError):
        return None


def status_of_error(members: dict[bytes, Any]) -> int:
    """Return the status of the error in these members of an answer or an event: the one that it
    has itself, or else one of CREDENTIAL_STATUSES that its code or type stands for; 0 if none."""
    error, status = members.get(b"error"), str(members.get(b"status"))
    if ERROR_STATUS.fullmatch(status):
        return int(status)
    has_code = members.get(b"type") == "error" or isinstance(error, str)
    codes = [members.get(b"code")] if has_code else []
    if isinstance(error, dict):
        codes += [error.get("code"), error.get("type")]
    known = [STATUS_OF_CODE.get(code_in(each) or "", 0) for each in codes]
    return next((each for each in known if each in CREDENTIAL_STATUSES), 0)
