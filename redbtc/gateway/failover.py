"""When a request is sent to another member of the upstreams, and which answer its client gets if
all fail.

A request fails over only as long as its client has been sent nothing, and only after a failure that
another member may not have: no connection, or an answer with one of the statuses below. Never after
a time-out, since the upstream may have acted on the request, and never after a 4xx about the
request itself.

A request that replays encrypted content of one organization is tried at another one only if it
would fail otherwise. If that one can't read the content, the client gets the failure of the first.

A request that creates a background response, or needs what is stored at an upstream, fails over
after fewer of them: an upstream that has answered 500 may have acted on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from typing import Generic, NamedTuple, Protocol, TypeVar

from redbtc.config import FailoverSettings
from redbtc.gateway.forwarded_request import ForwardedRequest
from redbtc.meter.decoding import codings_of
from redbtc.meter.error_codes import (
    CREDENTIAL_STATUSES,
    OPERATORS_ID,
    REJECTED_STATUSES,
    STATUS_OF_CODE,
    error_code_in,
    kept_code,
)
from redbtc.meter.operator_errors import TOO_LARGE, decoded_body, names_operator, own_body
from redbtc.upstream.begun_body import BegunBody
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.headers import DROPPED_HEADERS
from redbtc.upstream.response import UpstreamResponse
from redbtc.upstream.retry_after import retry_after_seconds
from redbtc.upstream.upstreams import Upstream

LIMITED, REJECTED, FORBIDDEN = 429, 401, 403
BROKEN = frozenset((500, 502, 503, 504, 529))
FAILURES = BROKEN | {LIMITED, REJECTED, FORBIDDEN}
CERTAIN = CREDENTIAL_STATUSES  # the upstream has surely not acted on the request
MAX_BEGINNING = 16 << 10  # of an error answer that are read before another member is tried
ERROR_SECONDS = 2.0  # to read them
UNREADABLE = (400, "invalid_encrypted_content")
NO_MODEL = "model_not_found"  # the code of a 403 that is about one model only
# Other codes of a 401 or 403 for which the key is good, but not for this model or kind of request:
# that of another gateway, and that of a key with fewer rights. Some of OpenAI's have only a text.
NO_RIGHT = ("model_not_allowed", "missing_scope")
NO_RIGHT_TEXT = re.compile(rb"Missing scopes|must be verified to use")
NO_MODEL_SECONDS = 600.0
WAITS = (b"retry-after", b"retry-after-ms")


class Failed(Protocol):
    """What the choice among the answers of members that have failed must know of one."""

    @property
    def upstream_status(self) -> int | None:
        """The status of the answer; None if no answer came."""

    @property
    def retry_after(self) -> float | None:
        """Return in how many seconds the member wants to be asked again, None if not said."""


AnyFailed = TypeVar("AnyFailed", bound=Failed)


class ErrorAnswer(NamedTuple):
    """An answer with a status of FAILURES, or that of UNREADABLE, whose body has been read as far
    as `body` says."""

    member: Upstream
    response: UpstreamResponse
    body: BegunBody
    text: bytes  # what has been read of it, decoded
    code: str | None  # of the error in the body
    retry_after: float | None  # seconds until the upstream wants to be asked again

    @property
    def upstream_status(self) -> int:
        """The status of the answer."""
        return self.response.status

    @property
    def is_unreadable(self) -> bool:
        """Return whether the upstream can't read the request's encrypted content."""
        return (self.upstream_status, self.code) == UNREADABLE

    def for_client(self, seconds: float) -> tuple[UpstreamResponse, bytes | None]:
        """Return the answer as the client gets it, and the body that it gets in place of the
        answer's own, if that is about the operator's credentials. A 429 asks it to wait for at most
        `seconds`: then another member can be asked again."""
        response = self.response._replace(body=self.body)
        if response.status != LIMITED:
            return response, None
        wait = ""
        if self.retry_after and self.retry_after > seconds:
            wait = str(max(1, math.ceil(seconds)))
            headers = [line for line in response.headers if line[0].lower() not in WAITS]
            response = response._replace(headers=[*headers, (b"retry-after", wait.encode())])
        if not (self.member.hides_errors and self._may_name_operator()):
            return response, None
        self.body.stop()
        headers = [line for line in response.headers if not is_operators(line)]
        response = response._replace(headers=headers)
        return response, own_body(LIMITED, self.text, wait and f"{wait}s")

    def _may_name_operator(self) -> bool:
        """Return whether the answer names something of the operator's, as far as is known. A text
        with zero bytes is in another character set."""
        headers = self.response.headers
        is_encoded = self.text is self.body.begun and bool(codings_of(headers))
        is_readable = self.body.whole and not is_encoded and b"\0" not in self.text
        if not is_readable or any(map(is_operators, headers)):
            return True
        return names_operator(self.text.decode("utf-8", "replace"))

    def judge(self, candidates: Candidates[Upstream]) -> None:
        """Note in the member's health what the answer says of it."""
        status = self.upstream_status
        if status in FAILURES:
            judge(candidates, status, self.code, self.retry_after, self.text)
        else:
            candidates.answer(serves=False)


def is_operators(line: tuple[bytes, bytes]) -> bool:
    """Return whether a header that passes names something of the operator's."""
    name, value = line
    found = OPERATORS_ID.search(value.decode("latin-1"))
    return found is not None and name.lower() not in DROPPED_HEADERS


def judge(
    candidates: Candidates[Upstream],
    status: int,
    code: str | None,
    retry_after: float | None,
    text: bytes = b"",
) -> None:
    """Note in the member's health what an answer says of it whose status is one of FAILURES. `code`
    is that of its error, `retry_after` in how many seconds the upstream wants to be asked again,
    and `text` what is known of the answer."""
    shown = code or str(status)
    if status == LIMITED:
        if TOO_LARGE.encode() not in text:  # else it does not matter to other requests
            candidates.limit(shown, retry_after)
    elif status in REJECTED_STATUSES and lacks_right(status, code, text):
        candidates.limit(shown, NO_MODEL_SECONDS)
    elif status == REJECTED or (status == FORBIDDEN and code):
        candidates.reject(shown)
    else:  # a 403 without an error object comes from a firewall before the upstream
        candidates.fail(shown)


def judge_end(candidates: Candidates[Upstream], request: ForwardedRequest) -> None:
    """Note in the member's health how an answer has ended that began well, such as a stream with
    status 200. It can still tell of an error of the upstream, which then counts as a failure. (A
    limit that it tells of does not rest the member: it may concern one request only.)"""
    code = request.meter.report.error_code
    is_own = request.makes_answer and (request.status or 200) // 100 != 4
    status = STATUS_OF_CODE.get(code) if code and is_own else None
    if code and status in BROKEN:
        candidates.fail(code, torn=True)
    elif status is None:
        candidates.succeed(request.first_byte_after_leaving())


def lacks_right(status: int, code: str | None, text: bytes) -> bool:
    """Return whether a 401 or 403 is about the model or the kind of request: others may be sent
    with the same key, so one client's request must not take the member from all."""
    if code in NO_RIGHT or (status == FORBIDDEN and code == NO_MODEL):
        return True
    return NO_RIGHT_TEXT.search(text) is not None


class Failover(Generic[AnyFailed]):
    """The failures of one request so far."""

    def __init__(self, settings: FailoverSettings, began: float, *, certain_only: bool) -> None:
        """`began`: when the first attempt began, by the monotonic clock; infinity if the request
        has not been sent. `certain_only`: fail over only where the upstream has surely not acted
        on the request."""
        self._settings = settings
        self._certain_only = certain_only
        self._until = min(began, time.monotonic()) + settings.budget_seconds
        self._attempts = 1
        self._answers: list[AnyFailed] = []

    def go_on(self, candidates: Candidates[Upstream], status: int | None) -> bool:
        """Take a place at the next member, if the request may be sent to another one after an
        answer with this status, or None for a failed connection. Return whether it may, and there
        is one that is not full."""
        if self._may_go_on(status) and candidates.go_on():
            self._attempts += 1
            return True
        return False

    async def go_on_in_turn(
        self, candidates: Candidates[Upstream], status: int | None, seconds: float
    ) -> bool:
        """Do as `go_on` does, but if all members that are left are full, give the place back and
        wait for another one for at most `seconds` seconds."""
        if self.go_on(candidates, status):
            return True
        if not (seconds and self.may_wait(candidates, status)):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, self._until - time.monotonic())):
                await candidates.go_on_in_turn()
                self._attempts += 1
                return True
        return False

    def may_wait(self, candidates: Candidates[Upstream], status: int | None) -> bool:
        """Return whether the request may be sent to another member, but all that are left are
        full."""
        return self._may_go_on(status) and candidates.are_full

    def _may_go_on(self, status: int | None) -> bool:
        if status is not None and self._certain_only and status not in CERTAIN:
            return False
        return self._attempts < self._settings.attempts and time.monotonic() < self._until

    def keep(self, answer: AnyFailed) -> None:
        """Keep an answer, in case no other member gives a better one."""
        self._answers.append(answer)

    def best(self, last: AnyFailed | None = None) -> AnyFailed | None:
        """Return the answer for the client, after all members have failed: if all of them have
        reached their limits, the one that can be asked again first; else the last one, but not the
        rejection of a key if there is another one. `last` is that of the member that was asked
        last. None if none of them has given one that can be passed on."""
        kept = [*self._answers, last] if last else self._answers
        answers = [each for each in kept if each.upstream_status not in REJECTED_STATUSES] or kept
        if answers and all(each.upstream_status == LIMITED for each in answers):
            return min(answers, key=lambda each: each.retry_after or 1.0)
        return answers[-1] if answers else None


def is_failure(status: int, candidates: Candidates[Upstream]) -> bool:
    """Return whether an answer with this status is a failure of the member. A 401, 403 or 429 to a
    client's own credential is not: it concerns that client alone, and is passed on to it."""
    member = candidates.member
    by_client = member is not None and member.is_client
    return status in FAILURES and not (by_client and status in CREDENTIAL_STATUSES)


def must_be_read(status: int, candidates: Candidates[Upstream]) -> bool:
    """Return whether an answer with this status can be one that the client is not sent."""
    if status == UNREADABLE[0]:
        return candidates.may_be_unreadable
    return is_failure(status, candidates)


async def read_error(member: Upstream, response: UpstreamResponse) -> ErrorAnswer:
    """Read the beginning of an answer's body, within ERROR_SECONDS."""
    body = BegunBody(response.body)
    await body.read(MAX_BEGINNING, ERROR_SECONDS)
    text = decoded_body(body.begun, codings_of(response.headers))
    code = error_code_in(text) if body.whole else None
    code = kept_code(response.status, code, member.is_client)
    return ErrorAnswer(member, response, body, text, code, retry_after_seconds(response.headers))
