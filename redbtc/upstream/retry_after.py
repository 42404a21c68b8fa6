"""For how long an upstream asks to be left alone."""

from __future__ import annotations

import email.utils
import re
import time
from datetime import UTC

from redbtc.headers import Headers

GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
GO_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(h|ms|us|µs|ns|m|s)")
DECIMAL_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
LIMIT_KINDS = ("requests", "tokens")
MAX_VALUE = 64  # characters of a header's value


def retry_after_seconds(headers: Headers) -> float | None:
    """Return in how many seconds the upstream wants to be asked again, by its headers
    `retry-after-ms` or `retry-after` (seconds or a date), else by `x-ratelimit-reset-*` of what is
    used up; None if it does not say, or says "at once"."""
    found = {
        name.lower(): value.decode("latin-1").strip()
        for name, value in reversed(headers)
        if len(value) <= MAX_VALUE
    }
    milliseconds = _number(found.get(b"retry-after-ms", ""))
    seconds = None if milliseconds is None else milliseconds / 1000
    if seconds is None:
        seconds = _retry_after(found.get(b"retry-after", ""))
    if seconds is None:
        seconds = _reset(found)
    return seconds if seconds and seconds > 0 else None


def _retry_after(value: str) -> float | None:
    seconds = _number(value)
    if seconds is not None or not value:
        return seconds
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:  # one of HTTP's forms has no zone
            date = date.replace(tzinfo=UTC)
        return date.timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None


def _reset(found: dict[bytes, str]) -> float | None:
    """Return when the limits that are used up are reset, the latest of them."""
    resets = []
    for kind in LIMIT_KINDS:
        remaining = found.get(f"x-ratelimit-remaining-{kind}".encode(), "0")
        reset = seconds_of_go(found.get(f"x-ratelimit-reset-{kind}".encode(), ""))
        if reset is not None and _number(remaining) == 0:
            resets.append(reset)
    return max(resets, default=None)


def _number(value: str) -> float | None:
    """Return a decimal number. float() alone would take "1_0", "1e3" and "nan"."""
    return float(value) if DECIMAL_NUMBER.fullmatch(value) else None


def seconds_of_go(text: str) -> float | None:
    """Return the seconds of a duration as Go writes it, in which OpenAI sends resets: "12ms",
    "1.5s", "6m0s". A plain number counts as seconds. None for anything else."""
    plain = _number(text)
    if plain is not None:
        return plain
    parts = GO_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * GO_UNITS[unit] for number, unit in parts)
