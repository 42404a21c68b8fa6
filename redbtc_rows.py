"""A request's row in the ledger, and the statements that write it. No connection is used here."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import msgspec
import orjson
from msgspec import Struct

# The ledger proper: a row is begun when its request leaves for an upstream and settled at its end.
# One statement does both, so that writing it again after a commit of unknown fate changes nothing.

UsageSource = Literal["upstream", "estimated", "none"]
Outcome = Literal[
    "pending",
    "completed",
    "upstream_error",
    "upstream_failed",
    "client_disconnected",
    "interrupted",
]


class Usage(Struct, frozen=True):
    """What one request used, in OpenAI's way of counting: cached_input and cache_write are parts of
    input, cache_write_12h of cache_write, reasoning of output. None: nobody reported it."""

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


class Part(NamedTuple):
    """Of what a request used, what one model did: None is the one that was asked for. `images`: as
    an image endpoint counts, with pictures as parts of input and output."""

    model: str | None
    usage: Usage
    images: bool


class Row(Struct):
    """One request in the ledger; schema.sql explains each field. Times in milliseconds."""

    request_id: str
    account_id: str
    key_id: str
    endpoint: str
    requested_model: str
    upstream: str
    started_at: int
    run: int | None = None  # that began it
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
    usage: Usage = Usage()


COLUMNS = (*Row.__struct_fields__[:-1], *Usage.__struct_fields__)
SETTLED = COLUMNS[COLUMNS.index("first_byte_ms") :]
# What a settled row can do without, if a value is refused.
OPTIONAL = [name for name in SETTLED if name not in ("outcome", "usage_source", "month")]
PLACES = f"({', '.join('?' * len(COLUMNS))})"
RECORD = f"""
    INSERT INTO requests ({", ".join(COLUMNS)}) VALUES {PLACES}
        ON CONFLICT (request_id) DO UPDATE SET upstream = excluded.upstream,
           {", ".join(f"{name} = excluded.{name}" for name in SETTLED)}
        WHERE outcome = 'pending'"""
KEEP_ESTIMATE = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
KEEP_UNSETTLED = """
    INSERT OR REPLACE INTO unsettled (request_id, settled, admitted_at, image_model, held)
    VALUES (?, ?, ?, ?, ?)"""
DROP_UNSETTLED = "DELETE FROM unsettled WHERE request_id = ?"
TAKEN_OVER = [
    f"{name} = json_extract(settled, '$.{name}')"
    for name in ("upstream", *SETTLED)
    if name not in ("outcome", "month")
]
TAKE_OVER = f"""
    UPDATE requests SET {", ".join(TAKEN_OVER)} FROM unsettled
     WHERE requests.request_id = unsettled.request_id AND outcome = 'pending'"""
KEEP_ESTIMATES = """
    INSERT OR IGNORE INTO estimates (response_id, request_id, admitted_at, image_model, held)
    SELECT response_id, request_id, admitted_at, image_model, held
      FROM unsettled JOIN requests USING (request_id)
     WHERE outcome = 'pending' AND usage_source = 'estimated'
       AND response_id IS NOT NULL AND admitted_at IS NOT NULL"""
INTERRUPT = """
    UPDATE requests SET outcome = 'interrupted', month = ?
     WHERE outcome = 'pending' AND request_id NOT IN (SELECT request_id FROM background)"""
CLEAR_UNSETTLED = "DELETE FROM unsettled"
FORGET = "DELETE FROM requests WHERE request_id = ? AND outcome = 'pending'"
REOPEN = """
    INSERT INTO reopened (request_id, reopened_at)
    SELECT request_id, ? FROM requests WHERE request_id = ? AND run = ? AND outcome = 'interrupted'
       AND NOT EXISTS (SELECT 1 FROM corrections WHERE request_id = requests.request_id)"""
STORED = f"SELECT {', '.join(COLUMNS)} FROM requests WHERE request_id = ?"
MAX_ROWS = 32  # of one statement


@functools.lru_cache(MAX_ROWS)
def record_of(rows: int) -> str:
    """RECORD for so many rows at once."""
    return RECORD.replace(PLACES, ", ".join([PLACES] * rows))


def values_of(row: Row) -> list[Any]:
    """Return the row's values in the order of COLUMNS."""
    *values, usage = msgspec.structs.astuple(row)
    return [*values, *msgspec.structs.astuple(usage)]


MAX_MODELS = 16  # that a request uses besides its own


def joined(models: str | None, more: str | None) -> str | None:
    """Return the models of both: a later request may name the same object, but what works in it
    stays, and what makes pictures for one of them does. Both are JSON, or None where there are
    none. With more than MAX_MODELS nothing can be built on the object, so none are added to them.
    """
    if models is None or more is None:
        return models or more
    first, later = orjson.loads(models), orjson.loads(more)
    if len(first) > MAX_MODELS:
        return models
    return orjson.dumps(
        {each: True in (first.get(each), later.get(each)) for each in first | later}
    ).decode()
