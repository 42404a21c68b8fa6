"""Read and show times, durations and months. A time is a number of milliseconds since 1970, UTC.

What is written into the ledger has the ledger's time (redbtc/store/clock.py). Log lines and the ids
of requests have the wall clock's. Limits and timeouts use the monotonic clock.
"""

from __future__ import annotations

import functools
import re
import time
from datetime import UTC, datetime, timedelta

from redbtc.errors import UserError

DAY = 86_400_000  # milliseconds
MINUTE = 60_000

RELATIVE_TIME = re.compile(r"(\d{1,9})(s|m|h|d|w)")
MONTH = re.compile(r"(19[7-9]|2[0-9]{2})[0-9]-(0[1-9]|1[0-2])")
SECONDS_IN = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
MAX_DURATION_MS = 100 * 365 * DAY
END_OF_TIME = 32_503_680_000_000  # 3000-01-01


def now_ms() -> int:
    """Return the time of the wall clock, in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def iso_time(milliseconds: int | None) -> str | None:
    """Return a time in ISO 8601, as reports and JSON show it: 2026-11-23T10:47:00.123Z."""
    if milliseconds is None:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_iso_second(seconds)}.{rest:03d}Z"


@functools.lru_cache(1000)
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def parse_duration(text: str) -> int:
    """Return the milliseconds of a duration such as '90s', '15m', '24h', '30d' or '2w', at most 100
    years. Raises UserError."""
    match = RELATIVE_TIME.fullmatch(text.strip())
    if not match:
        raise UserError(f"{text!r} is not a duration; write it like 90s, 15m, 24h, 30d or 2w")
    duration = int(match[1]) * SECONDS_IN[match[2]] * 1000
    if duration > MAX_DURATION_MS:
        raise UserError(f"{text!r} is too long; the maximum is 100 years")
    return duration


def parse_time(text: str, now: int, *, relative_to_past: bool) -> int:
    """Return the time that a text means: an ISO 8601 time, in UTC unless it names a zone, or a
    duration such as '24h', which counts back from `now` or forward. Raises UserError."""
    if RELATIVE_TIME.fullmatch(text.strip()):
        distance = parse_duration(text)
        return now - distance if relative_to_past else now + distance
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UserError(
            f"{text!r} is not a time; write ISO 8601 (2026-11-23T10:00:00Z) or a duration (24h)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    milliseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    if not 0 <= milliseconds < END_OF_TIME:
        raise UserError(f"{text!r} is out of range; times are from 1970 to 2999")
    return milliseconds


@functools.lru_cache(100)
def _month_of_hour(hours: int) -> str:
    return f"{datetime.fromtimestamp(hours * 3600, UTC):%Y-%m}"


def month_of(milliseconds: int) -> str:
    """Return the calendar month of a time, in UTC: 2026-11."""
    return _month_of_hour(milliseconds // 3_600_000)


def parse_month(text: str) -> str:
    """Return the text if it is a month, such as 2026-11. Raises UserError."""
    if not MONTH.fullmatch(text):
        raise UserError(f"{text!r} is not a month; write it like 2026-11")
    return text


def month_start(month: str) -> int:
    """Return the first instant of a month, in milliseconds since 1970, UTC."""
    return round(datetime(int(month[:4]), int(month[5:]), 1, tzinfo=UTC).timestamp()) * 1000


def months_after(month: str, months: int) -> str:
    """Return the month that is `months` after another one, or before it if `months` is negative."""
    year, number = divmod(int(month[:4]) * 12 + int(month[5:]) - 1 + months, 12)
    return f"{year:04}-{number + 1:02}"


def day_of(days: int) -> str:
    """Return the date of a number of days since 1970: 2026-11-23."""
    return f"{datetime.fromtimestamp(days * 86400, UTC):%Y-%m-%d}"
