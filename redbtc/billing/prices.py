"""Rates and prices: what a number of tokens costs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import msgspec
from msgspec import Struct

from redbtc.locations import EXTRAS
from redbtc.money import NANOS
from redbtc.usage import Usage

# A price is for a pattern of models, a service tier, and requests above some number of input
# tokens. Of all patterns that match a model the most specific has the say, alone. The tier is the
# one that the response reports; one without a price of its own is billed as the default tier.
DEFAULT_TIER = "default"
TIER_NAMES = {"fast": "priority"}  # as requests name them, and the responses to those
MILLION = 1_000_000
MAX_RATE = 10_000_000 * NANOS  # for a million tokens
MAX_CALL_RATE = 10_000 * NANOS
MAX_COST = (1 << 63) - 1  # nanos of one request, and of what is held for it: an INTEGER of SQLite


class Rates(NamedTuple):
    """Nanos for a million tokens, or for one of what UNITS names."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_12h: int = 0
    output: int = 0
    image_input: int = 0
    image_output: int = 0
    web_search: int = 0
    file_search: int = 0
    container: int = 0


# What a rate is for, where it is not for a million tokens.
UNITS = {"web_search": "call", "file_search": "call", "container": "container"}
# What a request can ask for only where its model's price has the rate, unless it is free.
NEEDED = {
    "file_search": "uses the file search tool",
    "container": "uses a tool that creates a container",
    "cache_write_12h": "keeps its prompt in the cache for longer than 30 minutes",
}


class Price(Struct, frozen=True, dict=True):
    """A row of the table of prices; schema.sql explains each field. A rate of None was not
    given."""

    model: str
    tier: str = DEFAULT_TIER
    above_input_tokens: int = 0
    effective_at: int = 0
    input: int | None = None
    cached_input: int | None = None
    cache_write: int | None = None
    cache_write_12h: int | None = None
    output: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    web_search: int | None = None
    file_search: int | None = None
    container: int | None = None
    max_output_tokens: int | None = None
    currency: str = "USD"
    source: str | None = None
    created_at: int = 0
    added_by: str | None = None
    reason: str | None = None
    id: int = 0

    @property
    def slot(self) -> tuple[str, str, int]:
        """What it is the price of: of two for the same the later supersedes the earlier."""
        return self.model, self.tier, self.above_input_tokens

    @functools.cached_property
    def rates(self) -> Rates:
        """All rates. What was not given: text in all its kinds and pictures cost as much as other
        input, pictures as much as other output, cache writes for 12 hours as much as others."""
        into, out = self.input or 0, self.output or 0
        write = into if self.cache_write is None else self.cache_write
        return Rates(
            input=into,
            cached_input=into if self.cached_input is None else self.cached_input,
            cache_write=write,
            cache_write_12h=write if self.cache_write_12h is None else self.cache_write_12h,
            output=out,
            image_input=into if self.image_input is None else self.image_input,
            image_output=out if self.image_output is None else self.image_output,
            web_search=self.web_search or 0,
            file_search=self.file_search or 0,
            container=self.container or 0,
        )

    def set_back(self, at: int) -> Price:
        """Return the same price, dated no later than `at`. When it takes effect stays if that was
        announced."""
        at_once = self.effective_at <= self.created_at
        return msgspec.structs.replace(
            self,
            effective_at=min(self.effective_at, at) if at_once else self.effective_at,
            created_at=min(self.created_at, at),
        )

    @property
    def limits(self) -> tuple[int | None, ...]:
        """What a price says beside its rates: the maximum, and which of NEEDED it has."""
        return self.max_output_tokens, *(getattr(self, name) is not None for name in NEEDED)

    @property
    def given(self) -> dict[str, int]:
        """The rates and the maximum that were given, by name."""
        values = {name: getattr(self, name) for name in (*Rates._fields, "max_output_tokens")}
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, usage: Usage, images: bool) -> int:
        """Nanos of what was used, rounded half up: the only rounding there is. `images`: of an
        image endpoint, whose image tokens are parts of its input and output; elsewhere they are
        those of a tool and come on top."""
        rates = self.rates
        cached, written = usage.cached_input_tokens or 0, usage.cache_write_tokens or 0
        kept = min(written, usage.cache_write_12h_tokens or 0)
        image_in, image_out = usage.image_input_tokens or 0, usage.image_output_tokens or 0
        text_in = (usage.input_tokens or 0) - cached - written - (image_in if images else 0)
        text_out = (usage.output_tokens or 0) - (image_out if images else 0)
        millionths = (
            max(0, text_in) * rates.input
            + cached * rates.cached_input
            + (written - kept) * rates.cache_write
            + kept * rates.cache_write_12h
            + max(0, text_out) * rates.output
            + image_in * rates.image_input
            + image_out * rates.image_output
        )
        calls = (
            (usage.web_searches or 0) * rates.web_search
            + (usage.file_searches or 0) * rates.file_search
            + (usage.containers or 0) * rates.container
        )
        return (millionths + MILLION // 2) // MILLION + calls

    def most(
        self, input_tokens: int, output_tokens: int, images: bool, long_cache: bool = False
    ) -> int:
        """Nanos that so much can cost at most, whatever kind of tokens they turn out to be.
        `long_cache`: the request can write to the cache for 12 hours."""
        rates = self.rates
        into, out = max(rates.input, rates.cached_input, rates.cache_write), rates.output
        if long_cache:
            into = max(into, rates.cache_write_12h)
        if images:
            into, out = max(into, rates.image_input), max(out, rates.image_output)
        return -(-(input_tokens * into + output_tokens * out) // MILLION)

    def dearest_call(self, extras: int) -> int:
        """Return the nanos of the dearest of these extras (bits of EXTRAS) that are billed by the
        call."""
        calls = (name for name in UNITS if EXTRAS[name] & extras)
        return max((getattr(self.rates, name) for name in calls), default=0)
