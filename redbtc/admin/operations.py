"""How an operation is declared, and how its input is read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import UNSET, Struct

from redbtc.admin.actors import Invalid, Rank
from redbtc.admin.inputs import MEANT, Nothing
from redbtc.admin.outputs import AccountWithMoney, PaymentAdded
from redbtc.admin.users import UserAdded
from redbtc.billing.records import Notice, PricesAdded
from redbtc.errors import UserError
from redbtc.money import UNLIMITED, parse_limit
from redbtc.store.accounts import KeyAdded
from redbtc.times import parse_time

Wanted = TypeVar("Wanted", bound=Struct)
Perform = Callable[..., Awaitable[Any]]
PREFIX = "/admin/v1"


class Operation:
    """One thing that can be done, as its method is decorated."""

    def __init__(
        self, method: str, paths: tuple[str, ...], least: Rank, answer: Any, perform: Perform
    ) -> None:
        self.method = method
        self.paths = paths
        self.least = least
        self.answer = answer
        self.status = 201 if method == "POST" and answer in ADDED else 200
        self.perform = perform
        self.name = perform.__name__
        self.summary = " ".join((perform.__doc__ or "").split())
        hints = get_type_hints(perform)
        self.parameters = [name for name in inspect.signature(perform).parameters if name != "self"]
        self.body: type[Struct] = hints.get("body", Nothing)
        self.query: type[Struct] = hints.get("query", Nothing)


ADDED = (KeyAdded, PricesAdded, PaymentAdded, UserAdded, Notice, AccountWithMoney)


def operation(method: str, *paths: str, least: Rank, answer: Any) -> Callable[[Perform], Operation]:
    """Makes a method of API an operation at `paths` for whoever has this rank or a higher one."""

    def decorate(perform: Perform) -> Operation:
        return Operation(method, paths, least, answer, perform)

    return decorate


# What msgspec says, and what people would.
PLAIN = (
    (r"^Expected `int( \| null)?`", "Expected a whole number"),
    (r"^Expected `(\w+)( \| null)?` of length <= (\d+)", r"Expected at most \3 characters"),
    (r"^Expected `array( \| null)?` of length >= (\d+)", r"Expected a list of \2 or more"),
    (r"^Expected `(\w+)( \| null)?` of length >= (\d+)", r"Expected \3 or more characters"),
    (r"^Expected `str( \| null)?`", "Expected text"),
    (r"^(Expected a whole number) >= (-?\d+)", r"\1 from \2"),
    (r"^(Expected a whole number) <= (\d+)", r"\1 up to \2"),
)
FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


def invalid(error: Exception) -> Invalid:
    """msgspec's message; of a member that is unknown or missing it has the whole path, and for a
    pattern or a type what people call that."""
    what, at, place = str(error).partition(" - at `")
    place = place[:-1] if at else "$"
    for pattern, meant in MEANT.items():
        what = what.replace(f"`str` matching regex {pattern!r}", meant)
    if field := FIELD.fullmatch(what):
        place = f"{place}.{field[1]}"
    for said, plain in PLAIN:
        what = re.sub(said, plain, what)
    return Invalid(what, place if place != "$" else "")


def whole(number: str) -> int | float:
    """456.0 is an integer where JSON Schema is asked (2020-12, Core §4.2.3)."""
    found = float(number)
    return int(found) if found.is_integer() else found


JSON = msgspec.json.Decoder(float_hook=whole)


def decoded(body: bytes, wanted: type[Wanted]) -> Wanted:
    """A JSON body. Raises Invalid."""
    try:
        return msgspec.convert(JSON.decode(body or b"{}"), wanted)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(error) from None


def converted(values: Mapping[str, Any], wanted: type[Wanted]) -> Wanted:
    """What a query or a form says: all of it text. Raises Invalid."""
    try:
        return msgspec.convert(dict(values), wanted, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from None


def limits_in(body: Struct) -> dict[str, Any]:
    """What was said of an account or a key, its money as the ledger has it. No budget is none."""
    said = msgspec.structs.asdict(body)
    limits = {name: value for name, value in said.items() if value is not UNSET}
    for name in ("credit_limit", "monthly_budget"):
        if isinstance(limits.get(name), str):
            limits[name] = parse_limit(limits[name])
    if limits.get("monthly_budget") == UNLIMITED:
        limits["monthly_budget"] = None
    return limits


MAX_PATTERNS = 100
# Each request of a key may compile all its patterns: fnmatch remembers only 256. A '[' without an
# end is looked for its end up to the pattern's.
MAX_PATTERNS_LENGTH = 4000  # characters of all patterns of a key, with commas
MAX_WILDCARDS = 10  # characters *, ? and [ of a pattern


def models_in(given: str | tuple[str, ...] | None) -> str | None:
    """The patterns that a key is limited to, as the ledger has them; None: to none. Raises
    UserError."""
    if given is None:
        return None
    # Each request of the key is held against all of them.
    patterns = [each.strip() for each in (given.split(",") if isinstance(given, str) else given)]
    for pattern in patterns:
        if not pattern or "," in pattern or not pattern.isprintable():
            raise UserError(
                f"{pattern!r} is not a model pattern; write patterns like gpt-5*,codex*"
            )
    if len(patterns) > MAX_PATTERNS:
        raise UserError(
            f"found {len(patterns)} model patterns; a key can have at most {MAX_PATTERNS}"
        )
    joined = ",".join(patterns)
    if len(joined) > MAX_PATTERNS_LENGTH:
        raise UserError(
            f"the key's model patterns have {len(joined)} characters; allowed are "
            f"{MAX_PATTERNS_LENGTH}"
        )
    if any(sum(map(each.count, "*?[")) > MAX_WILDCARDS for each in patterns):
        raise UserError(f"a model pattern can have at most {MAX_WILDCARDS} of the characters * ? [")
    return joined


def time_in(text: str | None, now: int) -> int | None:
    """A time, or a duration from `now` (milliseconds). Raises UserError."""
    return parse_time(text, now, relative_to_past=False) if text else None
