"""The rates of a price, in one table from which all other lists of rates are derived.

A rate is for one kind of usage, which is a field of Usage. docs/architecture.md says how to add a
kind: its columns in schema.sql, its field in Usage, its rate below, and the line in redbtc/meter
that reads it from an upstream's response.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Struct

from redbtc.usage import Usage

DEFAULT_TIER = "default"


class Rate(Struct, frozen=True):
    """The billing of one kind of usage."""

    usage: str  # the field of Usage
    help: str  # the help text of `price add`
    # The rate of the tokens that include these; it applies if this one is not given. "": without
    # this rate, these tokens cost nothing.
    part_of: str = ""
    # The requests that can use this kind; "": all. For "images", see `billed_usage`.
    only: Literal["", "images", "long cache"] = ""
    unit: str = ""  # the name of one billed unit; "": a million tokens
    extra: int = 0  # the bit in stored_objects.extras; 0: not inherited from objects
    needed: str = ""  # what a request does that needs the rate and is refused without it


class Rates(Struct, frozen=True, kw_only=True):
    """The rates of a price, in nanos per million tokens or per unit; None is not given. A rate
    comes after the one that it is a part of."""

    input: Annotated[
        int | None, Rate("input_tokens", "Per million input tokens.  [default: 0]")
    ] = None
    cached_input: Annotated[
        int | None,
        Rate(
            "cached_input_tokens",
            "Per million cached input tokens.  [default: the input rate]",
            part_of="input",
        ),
    ] = None
    cache_write: Annotated[
        int | None,
        Rate(
            "cache_write_tokens",
            "Per million tokens written to the cache.  [default: the input rate]",
            part_of="input",
        ),
    ] = None
    cache_write_12h: Annotated[
        int | None,
        Rate(
            "cache_write_12h_tokens",
            "Per million tokens cached for 12 hours.  [default: such requests are refused]",
            part_of="cache_write",
            only="long cache",
            extra=8,
            needed="keeps its prompt in the cache for longer than 30 minutes",
        ),
    ] = None
    output: Annotated[
        int | None, Rate("output_tokens", "Per million output tokens.  [default: 0]")
    ] = None
    image_input: Annotated[
        int | None,
        Rate(
            "image_input_tokens",
            "Per million image input tokens.  [default: the input rate]",
            part_of="input",
            only="images",
        ),
    ] = None
    image_output: Annotated[
        int | None,
        Rate(
            "image_output_tokens",
            "Per million image output tokens.  [default: the output rate]",
            part_of="output",
            only="images",
        ),
    ] = None
    web_search: Annotated[
        int | None, Rate("web_searches", "Per web search call.  [default: 0]", unit="call", extra=1)
    ] = None
    file_search: Annotated[
        int | None,
        Rate(
            "file_searches",
            "Per file search call.  [default: requests with this tool are refused]",
            unit="call",
            extra=2,
            needed="uses the file search tool",
        ),
    ] = None
    container: Annotated[
        int | None,
        Rate(
            "containers",
            "Per new container in which code runs.  [default: requests with such a tool are "
            "refused]",
            unit="container",
            extra=4,
            needed="uses a tool that creates a container",
        ),
    ] = None


def _rate_of(hint: Any) -> Rate:
    (rate,) = hint.__metadata__
    assert isinstance(rate, Rate), "each field of Rates has one"
    return rate


RATES = {name: _rate_of(hint) for name, hint in get_type_hints(Rates, include_extras=True).items()}
UNITS = {name: rate.unit for name, rate in RATES.items() if rate.unit}
NEEDED = {name: rate.needed for name, rate in RATES.items() if rate.needed}
_BITS = sorted((rate.extra, name) for name, rate in RATES.items() if rate.extra)
EXTRAS = {name: bit for bit, name in _BITS}


def _parts(images: bool) -> list[tuple[int, int]]:
    """Return the places in RATES of each rate that is a part of another one, after the place of
    that other one."""
    places = {name: place for place, name in enumerate(RATES)}
    return [
        (places[rate.part_of], places[name])
        for name, rate in RATES.items()
        if rate.part_of and (images or rate.only != "images")
    ]


PARTS = {images: _parts(images) for images in (False, True)}
USAGE_BY_RATE: Callable[[Usage], tuple[int | None, ...]] = operator.attrgetter(
    *[rate.usage for rate in RATES.values()]
)


def billed_usage(usage: Usage, images: bool) -> list[int | None]:
    """Return the amount to bill by each rate, in the order of RATES, so that no token is billed
    twice. None or an amount below 0 is 0. `images`: the usage is that of an image endpoint, whose
    image tokens are parts of its input and output. Elsewhere they are those of a tool and are added
    to the others."""
    amounts = list(USAGE_BY_RATE(usage))
    for whole, part in PARTS[images]:
        if among := amounts[part]:
            amounts[whole] = (amounts[whole] or 0) - among
    return amounts
