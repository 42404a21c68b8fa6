"""Limit requests and tokens per minute, and report the limits in headers."""

from __future__ import annotations

import math
import time

from redbtc.headers import Headers
from redbtc.refusals import Refusal


class Bucket:
    """A token bucket that holds one minute's `limit` (0: no limit) and fills evenly. Its level can
    become negative, when a response is longer than estimated; later requests then wait longer."""

    def __init__(self) -> None:
        self.limit = 0
        self.drawn = 0.0  # what was charged so far, less what was put back
        self._level = 0.0
        self._at = 0.0

    def fill(self, limit: int, now: float) -> None:
        """Set the limit, and add what has come in until `now` (monotonic seconds)."""
        if limit != self.limit:
            self._level = limit if not self.limit else min(self._level, limit)
            self.limit = limit
        self._level = min(limit, self._level + (now - self._at) * limit / 60)
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """Return in how many seconds the bucket will hold `amount`; 0 if it does already. An amount
        above the limit counts as the limit."""
        missing = min(amount, self.limit) - self._level
        return max(0.0, missing * 60 / self.limit) if self.limit else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount` out, or put it back if it is negative."""
        self.drawn += amount
        self._level = min(self.limit, self._level - amount)

    def level(self, now: float) -> float:
        """Return what the bucket holds at `now` (monotonic seconds)."""
        self.fill(self.limit, now)
        return self._level

    def restore(self, limit: int, level: float, now: float) -> None:
        """Go on from what another process's bucket of this limit held at `now`."""
        self.limit, self._level, self._at = limit, level, now

    @property
    def remaining(self) -> int:
        return max(0, int(self._level))

    @property
    def reset_seconds(self) -> float:
        return (self.limit - self._level) * 60 / self.limit if self.limit else 0.0


def go_duration(seconds: float) -> str:
    """Format a duration as Go's time.Duration does, in which OpenAI writes resets: "12ms", "1.5s",
    "6m0s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def rate_limit_headers(kind: str, limit: int, remaining: int, reset: float) -> Headers:
    """Return the headers x-ratelimit-limit-…, -remaining-… and -reset-… of a kind of limit."""
    of = kind.encode()
    return [
        (b"x-ratelimit-limit-" + of, b"%d" % limit),
        (b"x-ratelimit-remaining-" + of, b"%d" % remaining),
        (b"x-ratelimit-reset-" + of, go_duration(reset).encode()),
    ]


def check_rate(kind: str, bucket: Bucket, limit: int, amount: float) -> None:
    """Raise Refusal if the bucket, of `limit` per minute, does not hold `amount` now."""
    bucket.fill(limit, time.monotonic())
    wait = bucket.seconds_until(amount)
    if wait > 0:
        headers = rate_limit_headers(kind, limit, bucket.remaining, wait)
        message = f"Rate limit reached: {limit} {kind} per minute."
        raise Refusal("rate_limit_exceeded", message, retry_after=wait, headers=headers)
