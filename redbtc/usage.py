"""The usage of a request, and the request's row in the ledger, as plain data."""

from __future__ import annotations

from typing import Literal, NamedTuple

from msgspec import Struct

UsageSource = Literal[  # of the numbers in a row
    "upstream",
    "estimated",
    "none",
    "counted",  # by the gateway: what is billed by the call or the character
]
Outcome = Literal[
    "pending",
    "completed",
    "upstream_error",
    "upstream_failed",
    "client_disconnected",
    "interrupted",
]

Credentials = Literal["operator", "client"]  # whose credential the upstream got

FAILED: tuple[Outcome, ...] = ("upstream_error", "upstream_failed")  # by the upstream


class Usage(Struct, frozen=True):
    """The usage of one request, as OpenAI counts it: cached_input and cache_write are parts of
    input, cache_write_12h of cache_write, reasoning of output, audio of input and output. A number
    that was not reported is None."""

    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    web_searches: int | None = None
    tool_input_tokens: int | None = None
    cache_write_12h_tokens: int | None = None
    file_searches: int | None = None
    containers: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    audio_ms: int | None = None  # the length of audio that was read
    characters: int | None = None  # of text that was spoken


KINDS = Usage.__struct_fields__


class UsagePart(NamedTuple):
    """The usage of one model within a request. `model` is None for the requested model. With
    `images`, pictures are parts of input and output, as an image endpoint counts."""

    model: str | None
    usage: Usage
    images: bool


class RequestRow(Struct):
    """One request in the ledger. schema.sql explains each field. Times are in milliseconds."""

    request_id: str
    account_id: str
    key_id: str
    endpoint: str
    requested_model: str
    upstream: str
    started_at: int
    run: int | None = None  # the run of the gateway that began the request
    first_byte_ms: int | None = None
    duration_ms: int | None = None
    status: int | None = None
    outcome: Outcome = "pending"
    usage_source: UsageSource = "none"
    model: str | None = None
    service_tier: str | None = None
    response_id: str | None = None
    price_id: int | None = None
    cost: int | None = None  # nanos
    month: str | None = None
    attempts: int | None = None
    upstream_status: int | None = None
    upstream_error_code: str | None = None
    upstream_request_id: str | None = None
    credentials: Credentials | None = None
    usage: Usage = Usage()


MAX_TOKENS = 100_000_000  # of one request; a higher number is not a count of tokens


def failure_text(
    outcome: str, attempts: int | None, upstream_status: int | None, error_code: str | None
) -> str:
    """Return in short how a request failed at its upstream, and after how many attempts, such as
    "429 rate_limit_exceeded, 3 attempts". The text is empty for an answer at the first attempt."""
    failed = outcome in FAILED
    status = str(upstream_status) if failed and (upstream_status or 0) >= 400 else ""
    failure = " ".join(filter(None, (status, error_code if failed else "")))
    tries = f"{attempts} attempts" if attempts and attempts > 1 else ""
    return ", ".join(filter(None, (failure, tries)))
