"""Define the answers of the operations on the request log."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from redbtc.billing.reports import RequestShown
from redbtc.store.json_values import Moment


class LoggedKey(Struct):
    """A key with a setting of its own. `set_at` and `set_by` are null if the log of changes does
    not tell."""

    id: str
    label: str
    log_days: int
    set_at: Moment | None
    set_by: str | None


class BodyReading(Struct):
    """A reading of a stored body (`request` or `response`): when, by whom, and of which request.
    `body` and `request_id` are null for an export of all that is stored."""

    at: Moment
    by: str
    request_id: str | None
    body: str | None


class RequestLogShown(Struct, kw_only=True):
    """The request log of an account. `log_days` is for how many days bodies of its requests are
    kept, null: they are not, except those of the keys in `keys`. `max_days` is the most that can be
    chosen; 0: nobody can log. If `has_owner`, only an owner can switch logging on. `requests` is
    the number of requests of which something is stored, since `oldest`; null if the log can't be
    read now. `readings` are the last ones, newest first. Members are not told the names of
    operators. `erased_requests` is there after a purge."""

    account: str
    account_id: str
    log_days: int | None
    set_at: Moment | None
    set_by: str | None
    keys: list[LoggedKey]
    max_days: int
    has_owner: bool
    requests: int | None
    oldest: Moment | None
    readings: list[BodyReading]
    erased_requests: int | UnsetType = UNSET


class StoredBody(Struct):
    """What is stored of a body. `bytes` is its whole length, `stored_bytes` how much of that is
    stored: less if it was too long or the log was too slow, 0 if it is `withheld` because a key or
    a credential is in it. `encoding` is its content encoding, such as zstd; empty if it has none.
    """

    bytes: int
    stored_bytes: int
    encoding: str
    withheld: bool


class StoredBodies(Struct):
    """The stored bodies of a request. A body is null if nothing was to be stored. If not
    `is_complete`, parts are missing."""

    logged_at: Moment
    expires_at: Moment
    is_complete: bool
    request: StoredBody | None
    response: StoredBody | None


class RequestDetails(Struct):
    """A request, and what is stored of its bodies: null if that is nothing, or if the actor may not
    read it."""

    request: RequestShown
    bodies: StoredBodies | None


class BodyContent(Struct):
    """A stored body, exactly as it was sent."""

    content: bytes
    encoding: str
