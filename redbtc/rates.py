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
MILLION = 1_000_000
MINUTE_MS = 60_000
AUDIO_TOKENS_A_MINUTE = 1000  # about what OpenAI's models count


class Rate(Struct, frozen=True):
    """The billing of one kind of usage."""

    usage: str  # the field of Usage
    help: str  # the help text of `price add`
    # The rate of the tokens that include these; it applies if this one is not given. "": without
    # this rate, these tokens cost nothing.
    part_of: str = ""
    overlaps: bool = False  # some of these tokens can be an earlier part as well: cached audio
    # The requests that can use this kind; "": all. For "images", see `billed_usage`.
    only: Literal["", "images", "long cache"] = ""
    unit: str = ""  # the name of what the rate is for; "": a million tokens
    per: int = MILLION  # the usage that the rate is for
    # If this rate is not given, the usage that it is for costs as much as `stands_for` tokens by
    # the highest of these other rates.
    instead: tuple[str, ...] = ()
    stands_for: int = 0
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
        int | None,
        Rate("web_searches", "Per web search call.  [default: 0]", unit="call", per=1, extra=1),
    ] = None
    file_search: Annotated[
        int | None,
        Rate(
            "file_searches",
            "Per file search call.  [default: requests with this tool are refused]",
            unit="call",
            per=1,
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
            per=1,
            extra=4,
            needed="uses a tool that creates a container",
        ),
    ] = None
    audio_input: Annotated[
        int | None,
        Rate(
            "audio_input_tokens",
            "Per million audio input tokens.  [default: the input rate]",
            part_of="input",
            overlaps=True,
        ),
    ] = None
    audio_output: Annotated[
        int | None,
        Rate(
            "audio_output_tokens",
            "Per million audio output tokens.  [default: the output rate]",
            part_of="output",
        ),
    ] = None
    audio_minute: Annotated[
        int | None,
        Rate(
            "audio_ms",
            "Per minute of audio, where its length is billed.  [default: 1,000 audio input tokens]",
            unit="minute",
            per=MINUTE_MS,
            instead=("audio_input",),
            stands_for=AUDIO_TOKENS_A_MINUTE,
        ),
    ] = None
    characters: Annotated[
        int | None,
        Rate(
            "characters",
            "Per million characters of text that is spoken, where no tokens are reported.  "
            "[default: the input or audio output rate, whichever is higher]",
            unit="million characters",
            instead=("input", "audio_output"),
            stands_for=MILLION,
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
CALLS = {name: bit for name, bit in EXTRAS.items() if RATES[name].per == 1}  # paid by the call


def _parts(images: bool) -> list[tuple[int, int, bool]]:
    """Return the places in RATES of each rate that is a part of another one, after the place of
    that other one, and whether it overlaps."""
    places = {name: place for place, name in enumerate(RATES)}
    return [
        (places[rate.part_of], places[name], rate.overlaps)
        for name, rate in RATES.items()
        if rate.part_of and (images or rate.only != "images")
    ]


# What one token, call, millisecond or character costs by each rate, as a multiple of the rate in
# nanos: SCALE is a multiple of each `per`.
SCALE = 3 * MILLION
WEIGHTS = [SCALE // rate.per for rate in RATES.values()]
PARTS = {images: _parts(images) for images in (False, True)}
USAGE_BY_RATE: Callable[[Usage], tuple[int | None, ...]] = operator.attrgetter(
    *[rate.usage for rate in RATES.values()]
)


def billed_usage(usage: Usage, images: bool) -> list[int | None]:
    """Return the amount to bill by each rate, in the order of RATES, so that no token is billed
    twice. None or an amount below 0 is 0. `images`: the usage is that of an image endpoint, whose
    image tokens are parts of its input and output. Elsewhere they are those of a tool and are added
    to the others. Of tokens that are parts in two ways, such as cached audio, the first one
    counts."""
    amounts = list(USAGE_BY_RATE(usage))
    for whole, part, overlaps in PARTS[images]:
        if among := amounts[part]:
            left = amounts[whole] or 0
            if overlaps and among > left:
                amounts[part] = among = left
            amounts[whole] = left - among
    return amounts
