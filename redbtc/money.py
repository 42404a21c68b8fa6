"""Read, show and round amounts of money.

An amount is an integer number of nanos: billionths of the currency's unit. Python's integers have
no bound, so no sum is ever rounded or overflows. Outside the program an amount is a decimal string,
never a float. In the database, the cost of one request is one INTEGER of nanos. A sum, and a
payment, is two INTEGERs, whole units and the nanos beyond them, since 2^63 nanos are only 9.2
billion units, which is not much in some currencies. A price is an amount for a million tokens. Only
one thing is ever rounded: the cost of a request, to nanos, half up (Price.cost).
"""

from __future__ import annotations

import functools
import re

from redbtc.errors import UserError

NANOS = 1_000_000_000
UNLIMITED = -1  # as a credit limit
AMOUNT = re.compile(r"([+-]?)([0-9]{1,18})(?:\.([0-9]{1,9}))?")
MAX_LIMIT = 9_000_000_000 * NANOS  # of a credit limit or a budget: it fits into an INTEGER


def parse_amount(text: str) -> int:
    """Return the nanos of a decimal string of up to 18 digits, and 9 after the point. Raises
    UserError."""
    match = AMOUNT.fullmatch(text.strip())
    if not match:
        raise UserError(
            f"{text!r} is not an amount; write it like 12.50 (at most 9 digits after the point)"
        )
    sign, units, fraction = match.groups()
    nanos = int(units) * NANOS + int((fraction or "0").ljust(9, "0"))
    return -nanos if sign == "-" else nanos


def decimal(nanos: int, digits: int = 0) -> str:
    """Return an amount as an exact decimal string with at least `digits` digits after the
    point."""
    units, rest = divmod(abs(nanos), NANOS)
    fraction = f"{rest:09}".rstrip("0").ljust(digits, "0")
    return f"{'-' * (nanos < 0)}{units}{'.' * bool(fraction)}{fraction}"


@functools.lru_cache(1000)
def parse_limit(text: str) -> int:
    """Return the nanos of a credit limit or budget, or UNLIMITED for 'unlimited'. Raises
    UserError."""
    if text == "unlimited":
        return UNLIMITED
    limit = parse_amount(text)
    if not 0 <= limit <= MAX_LIMIT:
        raise UserError(
            f"{text!r} is out of range; a limit is 'unlimited' or from 0 to {decimal(MAX_LIMIT)}"
        )
    return limit


def json_limit(limit: int | None) -> str | None:
    """Return a limit as parse_limit reads it."""
    return "unlimited" if limit == UNLIMITED else None if limit is None else decimal(limit)


NO_DIGITS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
THREE_DIGITS = "BHD IQD JOD KWD LYD OMR TND"
FOUR_DIGITS = "CLF UYW"


def digits_of(currency: str) -> int:
    """Return how many digits a currency has after the point (ISO 4217)."""
    by_digits = {0: NO_DIGITS, 3: THREE_DIGITS, 4: FOUR_DIGITS}
    return next((digits for digits, codes in by_digits.items() if currency in codes), 2)


def money(amount: str, currency: str) -> str:
    """Return an amount for people: rounded half up to the currency's digits, with separators of
    thousands. An amount that would round to 0 is shown as less than the smallest one: < 0.01."""
    nanos, digits = parse_amount(amount), digits_of(currency)
    step: int = NANOS // 10**digits
    units = (abs(nanos) + step // 2) // step
    if nanos and not units:
        return f"{'>' if nanos < 0 else '<'} {'-' * (nanos < 0)}{_fixed(1, digits)}"
    return f"{'-' * (nanos < 0)}{_fixed(units, digits)}"


def _fixed(units: int, digits: int) -> str:
    whole, rest = divmod(units, 10**digits)
    return f"{whole:,}.{rest:0{digits}}" if digits else f"{whole:,}"
