"""Read the input of an operation: JSON, or the text values of a query or a form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct

from redbtc.admin.actors import Invalid
from redbtc.admin.inputs import FORM_NAMES
from redbtc.errors import UserError
from redbtc.money import UNLIMITED, parse_limit
from redbtc.times import parse_time

AnyInput = TypeVar("AnyInput", bound=Struct)

# Messages of msgspec, and what error messages say instead.
PLAIN_MESSAGES = (
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
    """Return an error of msgspec in plain words. Patterns and types are described, and the path of
    an unknown or missing field is whole."""
    what, at, place = str(error).partition(" - at `")
    place = place[:-1] if at else "$"
    for pattern, meant in FORM_NAMES.items():
        what = what.replace(f"`str` matching regex {pattern!r}", meant)
    if field := FIELD.fullmatch(what):
        place = f"{place}.{field[1]}"
    for technical, plain in PLAIN_MESSAGES:
        what = re.sub(technical, plain, what)
    return Invalid(what, place if place != "$" else "")


def read_number(number: str) -> int | float:
    """Return a number of a JSON body. In JSON Schema 456.0 is an integer (2020-12, Core §4.2.3)."""
    found = float(number)
    return int(found) if found.is_integer() else found


JSON = msgspec.json.Decoder(float_hook=read_number)


def read_json_body(body: bytes, wanted: type[AnyInput]) -> AnyInput:
    """Return a JSON body as the input `wanted`. Raises Invalid."""
    try:
        return msgspec.convert(JSON.decode(body or b"{}"), wanted)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(error) from None


def read_values(values: Mapping[str, Any], wanted: type[AnyInput]) -> AnyInput:
    """Return the values of a query or a form as the input `wanted`; they may all be text. Raises
    Invalid."""
    try:
        return msgspec.convert(dict(values), wanted, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from None


def limits_in(body: Struct) -> dict[str, Any]:
    """Return the limits that an input sets for an account or a key, money in the ledger's unit.
    A budget of "unlimited" becomes None."""
    given = msgspec.structs.asdict(body)
    limits = {name: value for name, value in given.items() if value is not UNSET}
    for name in ("credit_limit", "monthly_budget"):
        if isinstance(limits.get(name), str):
            limits[name] = parse_limit(limits[name])
    if limits.get("monthly_budget") == UNLIMITED:
        limits["monthly_budget"] = None
    return limits


MAX_PATTERNS = 100
# A request may have to compile all patterns of its key, since fnmatch remembers only 256. For an
# unclosed '[', fnmatch reads to the end of the pattern.
MAX_PATTERNS_LENGTH = 4000  # characters of all patterns of a key, with commas
MAX_WILDCARDS = 10  # characters *, ? and [ of a pattern


def models_in(given: str | tuple[str, ...] | None) -> str | None:
    """Return the model patterns of a key as the ledger has them, separated by commas (None: all
    models). Raises UserError."""
    if given is None:
        return None
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
    """Return a time, or `now` plus a duration, in milliseconds. Raises UserError."""
    return parse_time(text, now, relative_to_past=False) if text else None
