"""The formats of numbers, amounts, times and browsers' names on pages."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal

import orjson

from redbtc.billing.reports import RequestShown
from redbtc.money import digits_of
from redbtc.usage import failure_text


def exact(amount: str | None, currency: str) -> str:
    """Return an amount with all its digits, at least those of its currency; a dash for None."""
    if amount is None:
        return "–"
    whole, _, fraction = amount.partition(".")
    fraction = fraction.ljust(digits_of(currency), "0")
    sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    return f"{sign}{int(whole):,}{'.' * bool(fraction)}{fraction}"


def aligned(amount: str | None, currency: str) -> str:
    """Return an amount with all its digits, padded with spaces as wide as a digit, so that the
    decimal points of a column are aligned."""
    digits = exact(amount, currency)
    _, point, fraction = digits.partition(".")
    return digits + "\u2007" * (9 - len(fraction) + (not point)) if amount else digits


def count(number: int | None) -> str:
    """Return a number with thousands separators, or a dash for None."""
    return "–" if number is None else f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: 1 account, 2 accounts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def failure(row: RequestShown) -> str:
    """Return in short how a request failed at its upstream, and after how many attempts."""
    return failure_text(row.outcome, row.attempts, row.upstream_status, row.upstream_error_code)


def percent(fraction: str) -> str:
    """Return a fraction as a percentage: 25 % for 0.25."""
    return f"{(Decimal(fraction) * 100).normalize():f} %"


def month_name(month: str) -> str:
    """Return the name of a month: November 2026 for 2026-11."""
    return f"{date.fromisoformat(f'{month}-01'):%B %Y}"


def date_name(day: str) -> str:
    """Return a day with the name of its month: 29 November 2026 for 2026-11-29."""
    found = date.fromisoformat(day)
    return f"{found.day} {found:%B %Y}"


def size(number: int) -> str:
    """Return a number of bytes in its largest unit: 1.5 MB."""
    amount, unit = float(number), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def duration(seconds: int) -> str:
    """Return a duration in its two largest units: 2 days 3 hours."""
    minutes, hours, days = seconds // 60 % 60, seconds // 3600 % 24, seconds // 86400
    units = (days, "day"), (hours, "hour"), (minutes, "minute")
    parts = [counted(number, unit) for number, unit in units if number]
    return " ".join(parts[:2]) or "less than a minute"


def utc(moment: str, digits: int = 16) -> str:
    """Return an ISO 8601 time to the minute, or with 19 digits to the second. A script on the page
    replaces it by the time in the reader's time zone."""
    return f"{moment[:10]} {moment[11:digits]} UTC"


MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def is_moment(value: object) -> bool:
    """Return whether a value is a time as the admin API writes it."""
    return isinstance(value, str) and bool(MOMENT.fullmatch(value))


# Marks in a User-Agent header, with the name if it differs from the mark.
BROWSERS = {"Edg/": "Edge", "OPR/": "Opera", "Firefox": "", "Chrome": "", "Safari": ""}
SYSTEMS = {"Android": "", "iPhone": "", "iPad": "", "Windows": "", "Mac OS": "macOS", "Linux": ""}


def browser(agent: str) -> str:
    """Return the browser and system that a User-Agent header names, such as Firefox on Linux; if it
    names none that are known, its first word."""
    name, system = (
        next((name or mark for mark, name in known.items() if mark in agent), "")
        for known in (BROWSERS, SYSTEMS)  # Edge names Chrome and Safari, too: the first one counts
    )
    return f"{name} on {system}" if name and system else agent.partition(" ")[0] or "unknown"


def literal(text: str) -> str:
    """Return a string literal that JSON, Python, JavaScript and TOML read as the same text."""
    return orjson.dumps(text).decode()
