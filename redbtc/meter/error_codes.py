"""The code in an upstream's error object. A code is kept in the ledger and the log; the message
beside it is not, since it can quote the request or the operator's key."""

from __future__ import annotations

import re
from typing import Any

from redbtc.meter.answers import Answer, decode_answer

MAX_ERROR_BYTES = 64 << 10  # of a body in which a code is looked for
MAX_NUMBER = 999_999  # of a code that is a number
CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
# The id of an organization, a project, a user or a key, which is no code.
OPERATORS_ID = re.compile(r"\b(?:org|proj|user|acct|sess|sk)[-_][A-Za-z0-9_-]*[0-9A-Z]")
# The status that the code of an error, or its type, stands for where the error has no status of its
# own. OpenAI has the types "requests" and "tokens" for limits; others send the number as the code.
STATUS_OF_CODE = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "requests": 429,
    "tokens": 429,
    "429": 429,
    "insufficient_quota": 429,
    "credit_balance_exhausted": 429,
    "billing_hard_limit_reached": 429,
    "usage_limit_reached": 429,
    "billing_not_active": 429,
    "too_many_requests": 429,
    "rate_limit": 429,
    "slow_down": 503,
    "server_is_overloaded": 503,
    "server_error": 500,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "account_deactivated": 401,
    "401": 401,
    "permission_error": 403,
    "403": 403,
}
# The codes of a rejection that are kept. Others could be the key itself.
REJECTION_CODE = re.compile(r"[A-Za-z_]+|[0-9]{3}")
REJECTED_STATUSES = (401, 403)
CREDENTIAL_STATUSES = (*REJECTED_STATUSES, 429)  # errors about the credential that was sent


def error_code_of(answer: Answer) -> str | None:
    """Return the code of the error in an answer or an event, or in its Response object: `code`, or
    else `type`. An error event of the Responses API can have the code itself. None if there is no
    code, or if it does not have the form of one."""
    inner = answer.inner if answer.response else None
    error = (inner.error if inner else None) or answer.error
    if isinstance(error, dict):
        return code_in(error.get("code")) or code_in(error.get("type"))
    return code_in(answer.code) if answer.type == "error" else None


def error_code_in(body: bytes) -> str | None:
    """Return the code of the error in the body of an upstream's answer, as `error_code_of` does;
    None for a body that is not a JSON object, or has more than MAX_ERROR_BYTES."""
    answer = decode_answer(body) if len(body) <= MAX_ERROR_BYTES else None
    return error_code_of(answer) if answer else None


def kept_code(status: int, code: str | None, by_client: bool = False) -> str | None:
    """Return the code of an error as it may be kept: that of a rejection could quote the key, any
    could be an id of the operator's, and nothing may be kept of a client's own credential
    (`by_client`)."""
    if not code:
        return code
    may_quote = by_client or status in REJECTED_STATUSES
    is_kept = not may_quote or REJECTION_CODE.fullmatch(code)
    return code if is_kept and not OPERATORS_ID.search(code) else str(status)


def code_in(value: Any) -> str | None:
    """Return a decoded code; None if it does not have the form of one. Some upstreams send a
    number."""
    text = str(value) if type(value) is int and 0 <= value <= MAX_NUMBER else value
    return text if isinstance(text, str) and CODE.fullmatch(text) else None
