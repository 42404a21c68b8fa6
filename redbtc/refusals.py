"""The errors that the gateway itself returns to clients, in OpenAI's form, so that every SDK raises
the matching exception. docs/contract.md section 4 has the same table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import orjson

from redbtc.headers import Headers

NO_RETRY = (b"x-should-retry", b"false")
INVALID, RATE, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
REFUSALS: dict[str, tuple[int, str, str]] = {
    "invalid_http": (400, INVALID, "The HTTP request is malformed."),
    "invalid_json": (400, INVALID, "The request body is not valid JSON."),
    "invalid_request": (400, INVALID, "The request is not valid."),
    "websocket_connection_limit_reached": (
        400,
        INVALID,
        "This WebSocket has reached its maximum age of 60 minutes. Open a new connection.",
    ),
    "invalid_api_key": (401, INVALID, "Incorrect API key provided."),
    "client_credential_rejected": (401, INVALID, "The upstream rejected your credential."),
    "account_suspended": (403, INVALID, "This account is suspended."),
    "origin_not_allowed": (403, INVALID, "WebSocket handshakes from this Origin are not allowed."),
    "metrics_forbidden": (
        403,
        INVALID,
        "Metrics need the token of metrics.token_env or, if that is not set, a loopback address.",
    ),
    "unknown_url": (404, INVALID, "Unknown request URL. The documentation lists what is served."),
    "method_not_allowed": (405, INVALID, "The method is not allowed for this URL."),
    "model_not_allowed": (403, INVALID, "This API key is not allowed to use the model."),
    "model_not_found": (404, INVALID, "The model does not exist or is not available here."),
    "response_not_found": (404, INVALID, "The response does not exist."),
    "request_timeout": (408, INVALID, "The request body took too long to arrive."),
    "request_too_large": (413, INVALID, "The request body is too large."),
    "unsupported_media_type": (415, INVALID, "The request's Content-Type is not supported here."),
    "upgrade_required": (426, INVALID, "WebSocket is not available here; use POST."),
    "rate_limit_exceeded": (429, RATE, "Rate limit reached."),
    "insufficient_quota": (429, "insufficient_quota", "The balance and credit are used up."),
    "concurrency_limit_exceeded": (429, RATE, "Too many requests in flight."),
    "headers_too_large": (431, INVALID, "The request headers are too large."),
    "internal_error": (500, SERVER, "The gateway could not process this request."),
    "upstream_unreachable": (502, SERVER, "The upstream could not be reached."),
    "upstream_protocol_error": (502, SERVER, "The upstream sent an invalid response."),
    "upstream_credentials_rejected": (
        502,
        SERVER,
        "The upstream rejected the gateway's own credentials. Tell your administrator.",
    ),
    "no_upstream": (503, SERVER, "No upstream is available for this request. Try again later."),
    "ledger_unavailable": (503, SERVER, "Usage can't be recorded right now. Try again later."),
    "overloaded": (503, SERVER, "The gateway is out of memory. Try again later."),
    "maintenance": (503, SERVER, "The gateway is under maintenance. Try again later."),
    "draining": (503, SERVER, "The gateway is restarting or shutting down. Try again."),
    "upstream_timeout": (504, SERVER, "The upstream took too long to answer."),
}


class Refusal(Exception):
    """An error for the client, with its status, type and default message from REFUSALS. Every 429
    and 503 has a Retry-After header of 1 to 60 whole seconds: Codex CLI gives up without one, and
    openai-node ignores more than 60."""

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        param: str | None = None,
        retry_after: float = 1.0,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, self.type, default = REFUSALS[code]
        self.message = message or default
        self.param = param
        self.headers: Headers = list(headers)
        if self.status in (429, 503):
            seconds = min(60, max(1, math.ceil(retry_after)))
            milliseconds = min(60_000, max(1, math.ceil(retry_after * 1000)))
            self.headers += [
                (b"retry-after", b"%d" % seconds),
                (b"retry-after-ms", b"%d" % milliseconds),
            ]

    def error(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """Return the body of the error response."""
        return orjson.dumps({"error": self.error()})


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal of a request that ended with this error."""
    if isinstance(error, Refusal):
        return error
    return Refusal("overloaded" if isinstance(error, MemoryError) else "internal_error")


def not_found(name: str, object_id: str) -> Refusal:
    """Return the refusal of an object that does not exist or belongs to another account: a client
    can't tell the two apart."""
    return Refusal("response_not_found", f"Response with id '{object_id}' not found.", param=name)


class ClientLeft(Exception):
    """The client has disconnected, so that no answer can be sent."""


def insufficient_quota(message: str) -> Refusal:
    """Return the refusal of a request that can cost more than its balance or budget has left."""
    return Refusal("insufficient_quota", message, headers=[NO_RETRY])
