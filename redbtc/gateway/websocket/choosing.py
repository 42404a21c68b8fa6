"""The choice of an upstream connection for a session and for each of its turns, and what members
answer that fail them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson
from websockets.exceptions import InvalidHandshake, InvalidStatus

from redbtc.gateway.failover import (
    FAILURES,
    LIMITED,
    MAX_BEGINNING,
    UNREADABLE,
    Failover,
    judge,
)
from redbtc.gateway.forwarded_request import REJECTED_KEY
from redbtc.gateway.websocket.upstream_socket import UpstreamSocket
from redbtc.headers import Headers
from redbtc.meter.answers import Answer
from redbtc.meter.error_codes import (
    CREDENTIAL_STATUSES,
    REJECTED_STATUSES,
    STATUS_OF_CODE,
    error_code_in,
    error_code_of,
    kept_code,
)
from redbtc.meter.shown_answers import shown_message
from redbtc.refusals import Refusal
from redbtc.server.websocket_protocol import UPGRADE
from redbtc.upstream.candidates import Candidates
from redbtc.upstream.failures import cause_of
from redbtc.upstream.headers import headers_for_client
from redbtc.upstream.retry_after import retry_after_seconds
from redbtc.upstream.upstreams import Upstream

# Headers of a refused handshake's answer that its body, or the gateway, has itself.
NOT_PASSED = (b"content-", b"date", b"connection", b"x-request-id")
NO_WEBSOCKET = (400, 404, 405, 426, 501)  # what an upstream without it answers


class HandshakeRefused(Refusal):
    """The refusal that follows from a connection that was not opened. `cause` says why,
    `upstream_status` is the status of the upstream's answer if there is one, `retry_after` in how
    many seconds it wants to be asked again, and `member` the one that was tried."""

    member: Upstream | None = None

    def __init__(
        self,
        code: str,
        cause: str | None,
        status: int | None = None,
        retry_after: float | None = None,
        body: bytes = b"",
    ) -> None:
        headers = UPGRADE if code == "upgrade_required" else ()
        super().__init__(code, headers=headers, retry_after=retry_after or 1.0)
        self.cause = cause
        self.upstream_status = status
        self.retry_after = retry_after
        self._body = body  # of the upstream's answer

    def judge(self, candidates: Candidates[Upstream]) -> None:
        """Note in the member's health what the answer says of it."""
        if self.upstream_status is None:
            candidates.fail(self.cause or "protocol")
        elif self.upstream_status in FAILURES:
            judge(candidates, self.upstream_status, self.cause, self.retry_after, self._body)

    def for_client(self, seconds: float) -> Refusal:
        """Return the refusal as the client of a handshake gets it. A 429 asks it to wait for at
        most `seconds`: then another member can be asked again."""
        is_limit = self.upstream_status == LIMITED
        if not (is_limit and self.retry_after and self.retry_after > seconds):
            return self
        return Refusal(self.code, retry_after=seconds)


class CredentialRejected(HandshakeRefused):
    """The refusal of a handshake by an upstream that has not accepted the client's own credential,
    or whose limit for that is reached. Its answer is passed on to the client."""

    def __init__(self, status: int, cause: str | None, headers: Headers, body: bytes) -> None:
        super().__init__("client_credential_rejected", cause, status, body=body)
        self.status = status
        self.headers = [
            line for line in headers_for_client(headers) if not line[0].startswith(NOT_PASSED)
        ]

    def judge(self, candidates: Candidates[Upstream]) -> None:
        candidates.answer(serves=False)

    def body(self) -> bytes:
        try:
            orjson.loads(self._body)
            return self._body
        except ValueError:  # such as the page of a firewall
            return super().body()

    def error(self) -> dict[str, Any]:
        try:
            error = orjson.loads(self._body)["error"]
        except (ValueError, KeyError, TypeError):
            error = None
        return error if isinstance(error, dict) else super().error()


class ErrorEvent(NamedTuple):
    """An error event with which a member has answered a request before any other event, and whose
    `upstream_status` is one of FAILURES."""

    member: Upstream
    event: Answer
    message: str | bytes  # the event as it came
    upstream_status: int
    request_id: str | None  # the upstream's, of the handshake

    @property
    def code(self) -> str | None:
        """The code of the error."""
        code = error_code_of(self.event)
        return kept_code(self.upstream_status, code, self.member.is_client)

    @property
    def retry_after(self) -> float | None:
        """The seconds until the upstream wants to be asked again; None if it does not say."""
        return retry_after_in(self.message)

    @property
    def shown(self) -> str | bytes:
        """The event as the client is shown it."""
        return shown_message(self.message) if self.member.hides_errors else self.message

    @property
    def is_short(self) -> bool:
        """Return whether it may be kept while other members are tried."""
        return len(self.message) <= MAX_BEGINNING

    def judge(self, candidates: Candidates[Upstream]) -> None:
        """Note in the member's health what the event says of it."""
        text = self.message.encode() if isinstance(self.message, str) else self.message
        judge(candidates, self.upstream_status, self.code, self.retry_after, text)


SocketFailover = Failover[ErrorEvent | HandshakeRefused]


def refused_handshake(error: InvalidHandshake, member: Upstream) -> HandshakeRefused:
    """Return the refusal that follows from a handshake with a member that has failed."""
    if not isinstance(error, InvalidStatus):
        return HandshakeRefused("upstream_protocol_error", cause_of(error))
    response = error.response
    status, body = response.status_code, bytes(response.body or b"")
    code = kept_code(status, error_code_in(body), member.is_client)
    if status in NO_WEBSOCKET:
        return HandshakeRefused("upgrade_required", code, status)
    headers = [
        (name.encode(), value.encode("utf-8", "replace"))
        for name, value in response.headers.raw_items()
    ]
    if member.is_client and status in CREDENTIAL_STATUSES:
        return CredentialRejected(status, code, headers, body)
    retry_after = retry_after_seconds(headers)
    if status == LIMITED:
        return HandshakeRefused("rate_limit_exceeded", code, status, retry_after, body)
    refusal = REJECTED_KEY if status in REJECTED_STATUSES else "upstream_unreachable"
    return HandshakeRefused(refusal, code, status, body=body)


async def connect_to_one(
    candidates: Candidates[Upstream],
    failover: SocketFailover,
    socket_to: Callable[[Upstream], Awaitable[UpstreamSocket]],
    note: Callable[[Upstream], None] = lambda _: None,
) -> UpstreamSocket:
    """Return a connection to the member at which there is a place, or to the next one that can be
    reached. `note` is called with each member before it is tried. Raises HandshakeRefused if none
    can be reached; `failover` has kept the answers that failed."""
    while True:
        member = candidates.member
        assert member is not None, "go_on has returned True"
        if cause := member.health.known_failure:
            refusal = HandshakeRefused("upstream_unreachable", cause)
        else:
            note(member)
            member.health.past.attempts += 1
            try:
                return await socket_to(member)
            except HandshakeRefused as refused:
                refusal = refused
            except OSError as error:
                refusal = HandshakeRefused("upstream_unreachable", cause_of(error))
            refusal.judge(candidates)
        refusal.member = member
        if isinstance(refusal, CredentialRejected):  # another member is not tried with it
            raise refusal
        if refusal.upstream_status in FAILURES:
            failover.keep(refusal)
        if not failover.go_on(candidates, None):
            raise refusal


def failure_status(event: Answer) -> int | None:
    """Return the status of an error event that can come from the member alone: one of FAILURES, by
    its status or, where it has none, by its code. None for any other error."""
    if type(event.status) is int:
        return event.status if event.status in FAILURES else None
    return STATUS_OF_CODE.get(error_code_of(event) or "")


def is_unreadable(event: Answer) -> bool:
    """Return whether an error event says that the upstream can't read the request's encrypted
    content."""
    return (event.status, error_code_of(event)) == UNREADABLE


def retry_after_in(message: str | bytes) -> float | None:
    """Return in how many seconds the upstream wants to be asked again, by the headers that an error
    event has in itself or in its error; None if it does not say."""
    try:
        event = orjson.loads(message) if len(message) <= MAX_BEGINNING else {}
        of_error = event["error"].get("headers") if isinstance(event.get("error"), dict) else None
        headers: dict[str, object] = event.get("headers") or of_error or {}
        found = [(str(name).encode(), str(value).encode()) for name, value in headers.items()]
    except (ValueError, AttributeError):
        return None
    return retry_after_seconds(found)
