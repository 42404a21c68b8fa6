"""Rows as dictionaries, as the admin API shows them."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from typing import Any

from redbtc.money import NANOS, decimal, shown_limit
from redbtc.times import iso_time

Record = dict[str, Any]  # one row, as JSON shows it


def shown(row: Mapping[str, Any] | sqlite3.Row) -> Record:
    """A row as JSON shows it: times in ISO 8601, money as decimal strings."""
    record = dict(row)
    for name, value in record.items():
        if name.endswith("_at") or name in ("until", "throttled_until"):
            record[name] = iso_time(value)
        elif name in ("credit_limit", "monthly_budget"):
            record[name] = shown_limit(value)
        elif name == "models":
            record[name] = value.split(",") if value else None
        elif name == "throttle_factor":
            record[name] = None if value is None else decimal(value * (NANOS // 1000))
        elif name in ("compromised", "refuses_requests"):
            record[name] = bool(value)
    return record


def new_id(kind: str) -> str:
    """acct_, key_, pay_, ntc_, usr_ or ses_ and 16 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(8)}"
