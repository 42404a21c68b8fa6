"""Show values of rows as JSON has them, and make ids of new rows."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct, defstruct

from redbtc.money import NANOS, decimal
from redbtc.times import iso_time

JSON_IDS = "(SELECT value FROM json_each(?))"  # SQL for the ids in a JSON array


def new_id(kind: str) -> str:
    """Return a new id: `kind`, such as acct, key or msg, and 16 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(8)}"


def by_name(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row's values by the names of its columns."""
    return dict(zip(row.keys(), row, strict=True))


Described = TypeVar("Described", bound=Struct)


def with_members(
    members: Mapping[str, Any], *default: Any
) -> Callable[[type[Described]], type[Described]]:
    """Return a decorator that appends members, given by name and type, to those of a type. So a
    type that lists all rates or all kinds of usage has them from the place where they are
    declared."""

    def decorate(base: type[Described]) -> type[Described]:
        return defstruct(  # type: ignore[return-value]  # it is a subclass
            base.__name__,
            [(name, kind, *default) for name, kind in members.items()],
            bases=(base,),
            kw_only=True,
            module=base.__module__,
            namespace={"__doc__": base.__doc__},
        )

    return decorate


# JSON and CSV have the members of these types, in their order. What is UNSET is left out.
Moment = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Money = Annotated[str, Meta(pattern=r"^-?[0-9]+(\.[0-9]{1,9})?$")]
Sum = int | None


def json_time(milliseconds: int) -> str:
    """Return a time as JSON shows it."""
    return str(iso_time(milliseconds))


def json_amount(nanos: int | None) -> str | None:
    """Return an amount as JSON shows it."""
    return None if nanos is None else decimal(nanos)


def json_factor(thousandths: int | None) -> str | None:
    """Return the part of its limits that an account is held to, as JSON shows it."""
    return None if thousandths is None else decimal(thousandths * (NANOS // 1000))


def json_patterns(models: str | None) -> list[str] | None:
    """Return the patterns of a key, as JSON shows them."""
    return models.split(",") if models else None


def nanos_of(units: int, nanos: int) -> int:
    """Return an amount that the database has in two columns."""
    return units * NANOS + nanos


def cost_of(row: sqlite3.Row) -> str:
    """Return the cost of a row of sums, as JSON shows it."""
    return decimal(nanos_of(row["cost_units"], row["cost_nanos"]))
