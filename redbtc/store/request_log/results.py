"""What the log returns."""

from __future__ import annotations

from msgspec import Struct


class LoggedRequest(Struct):
    """The stored bodies of a request. A body is None if nothing of it is stored. If it is shorter
    than it was, the rest is missing since it was too long, the log was too slow, or the process was
    killed."""

    request_id: str
    account_id: str
    key_id: str
    logged_at: int  # milliseconds
    expires_at: int  # milliseconds
    request: bytes | None
    response: bytes | None
    request_bytes: int  # length of the whole body, as far as it is known
    response_bytes: int
    request_encoding: str  # the content encodings in which the body is stored; "": none
    response_encoding: str
    request_withheld: bool  # not stored, since a key or an upstream's credential is in it
    response_withheld: bool
    is_complete: bool  # False: a part of a body is missing, or the request has not ended


class LoggedCount(Struct):
    """The number of requests of which something is stored, and when the oldest of them was logged
    (milliseconds; None if there are none)."""

    requests: int
    oldest: int | None


class Purged(Struct):
    """What was erased: the number of requests, and the bytes that their bodies took."""

    requests: int
    bytes: int
