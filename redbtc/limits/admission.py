"""The admission of one request: its charges on the rates, and its places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from redbtc.headers import Headers
from redbtc.limits.buckets import Bucket, check_rate, rate_limit_headers
from redbtc.limits.places import Places
from redbtc.refusals import ClientLeft, Refusal


class NoCapacity(Refusal):
    """The refusal of a request for which no place or no memory came free in time. It is not the
    client's fault, so the request does not count."""

    def __init__(self, message: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__("concurrency_limit_exceeded", message, headers=headers)


class LimitCounters:
    """The counters of a key, an account or the gateway, to which its limits apply. `name` is for
    error messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting = 0  # requests that wait for places or memory
        self.free = 0  # requests whose first FREE_BYTES are not counted
        self.shared = 0  # bytes being read that count for the whole gateway
        self.shared_waits = 0  # bytes that will count in `shared` and are waited for
        self.places = Places()
        self.reading = Places()  # bytes of memory for bodies
        self.small_frames = Bucket()  # frames of WebSockets
        self.requests = Bucket()
        self.tokens = Bucket()


class AppliedLimits(NamedTuple):
    """The limits that a key, an account or the gateway sets for one request; 0 is no limit."""

    counters: LimitCounters
    concurrency: int
    requests_per_minute: int
    tokens_per_minute: int

    def report(self, now: float) -> dict[str, Any]:
        """Return the limits, and what is left of them, as JSON shows them."""
        taken, maximum = self.counters.places.taken, self.concurrency
        found: dict[str, Any] = {"concurrency": {"limit": maximum or None, "in_flight": taken}}
        for name, bucket in (
            ("requests", self.counters.requests),
            ("tokens", self.counters.tokens),
        ):
            limit: int = getattr(self, f"{name}_per_minute")
            bucket.fill(limit, now)
            found[f"{name}_per_minute"] = {
                "limit": limit or None,
                "remaining": bucket.remaining if limit else None,
                "reset_seconds": round(bucket.reset_seconds, 3),
            }
        return found


class Admission:
    """The charges of one request on the rates of its key, its account and the gateway, and its
    places. Leaving `with` gives the places back and, if the request was not admitted, also undoes
    its charges (see `undo`)."""

    def __init__(self, applied_limits: tuple[AppliedLimits, ...], queue_seconds: float) -> None:
        """Charge all request rates, or raise Refusal and charge none."""
        self.applied_limits = applied_limits
        self.queue_seconds = queue_seconds
        self.places: list[Places] = []
        self.is_body_read = False  # all of the body has been read
        self.took_places = False
        self._charges: list[tuple[str, Bucket, float]] = []
        self.charge("requests", 1)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.places:
            self.give_back_places()
        if error and not self.took_places:
            self.undo(error)

    def give_back_places(self) -> None:
        """Give back the places, once the upstream is done with the request."""
        while self.places:
            self.places.pop().give_back()

    def charge(self, kind: str, amount: float) -> None:
        """Charge all rates of a kind ("requests" or "tokens"), or raise Refusal and charge none."""
        charges: list[tuple[str, Bucket, float]] = []
        requests = kind == "requests"
        for applied in self.applied_limits:
            limit = applied.requests_per_minute if requests else applied.tokens_per_minute
            if limit:
                bucket = applied.counters.requests if requests else applied.counters.tokens
                check_rate(kind, bucket, limit, amount)
                charges.append((kind, bucket, min(amount, limit)))
        for _, bucket, charged in charges:
            bucket.charge(charged)
        self._charges += charges

    def undo(self, error: BaseException) -> None:
        """Undo the charges of a request that was not forwarded. Its tokens are always put back. The
        request itself is not if the client is at fault, or disconnected while the body was read,
        since reading was work."""
        at_fault = isinstance(error, ClientLeft) and not self.is_body_read
        if isinstance(error, Refusal):
            at_fault = error.status < 500 and not isinstance(error, NoCapacity)
        if at_fault:
            self.correct_tokens(0)
        else:
            self.refund()

    def refund(self) -> None:
        """Put all charges back: the request was not served."""
        for _, bucket, amount in self._charges:
            bucket.charge(-amount)
        self._charges.clear()

    def correct_tokens(self, tokens: int) -> None:
        """Replace the charged estimate by the number of tokens that were used so far. Further calls
        add to that."""
        for number, (kind, bucket, amount) in enumerate(self._charges):
            if kind == "tokens":
                bucket.charge(tokens - amount)
                self._charges[number] = kind, bucket, 0

    def headers(self) -> Headers:
        """Return OpenAI's x-ratelimit-* headers for the limit of each kind with the least left."""
        tightest: dict[str, Bucket] = {}
        for kind, bucket, _ in self._charges:
            if kind not in tightest or bucket.remaining < tightest[kind].remaining:
                tightest[kind] = bucket
        return [
            line
            for kind, bucket in tightest.items()
            for line in rate_limit_headers(
                kind, bucket.limit, bucket.remaining, bucket.reset_seconds
            )
        ]
