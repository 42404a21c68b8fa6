"""A price, and the cost of usage by its rates.

A price applies to a pattern of models, a service tier, and requests with more input tokens than its
threshold. Of all patterns that match a model, only the prices of the most specific one apply
(price_table.py). The tier is the one that the response reports; a tier without a price of its own
is billed as the default tier.
"""

from __future__ import annotations

import functools

import msgspec

from redbtc.money import NANOS
from redbtc.rates import (
    CALLS,
    DEFAULT_TIER,
    MILLION,
    NEEDED,
    RATES,
    SCALE,
    WEIGHTS,
    Rates,
    billed_usage,
)
from redbtc.usage import Usage

TIER_NAMES = {"fast": "priority"}  # the name of a tier in requests, and the one in responses
MAX_RATE = 10_000_000 * NANOS  # for a million tokens
MAX_CALL_RATE = 10_000 * NANOS
MAX_COST = (1 << 63) - 1  # nanos of one request and its hold: an INTEGER of SQLite


class Price(Rates, frozen=True, dict=True):
    """A row of the table of prices; schema.sql explains each field."""

    model: str
    tier: str = DEFAULT_TIER
    above_input_tokens: int = 0
    effective_at: int = 0
    max_output_tokens: int | None = None
    currency: str = "USD"
    source: str | None = None
    created_at: int = 0
    added_by: str | None = None
    reason: str | None = None
    id: int = 0

    @property
    def slot(self) -> tuple[str, str, int]:
        """Model, tier and threshold. A later price of the same slot supersedes an earlier one."""
        return self.model, self.tier, self.above_input_tokens

    @functools.cached_property
    def rates(self) -> dict[str, int]:
        """The value of every rate by name, in the order of RATES. A rate that was not given is that
        of the tokens which include its own, or what its `instead` says."""
        rates: dict[str, int] = {}
        for name, rate in RATES.items():
            if (given := getattr(self, name)) is None:
                given = rates.get(rate.part_of, 0)
                if rate.instead:
                    highest = max(rates[each] for each in rate.instead)
                    given = highest * rate.stands_for // MILLION
            rates[name] = given
        return rates

    @functools.cached_property
    def _weighted(self) -> list[int]:
        """The cost of one token, call, millisecond or character by each rate, as a number of SCALE
        to the nano."""
        return [rate * weight for rate, weight in zip(self.rates.values(), WEIGHTS, strict=True)]

    @functools.cached_property
    def _max_rates(self) -> dict[tuple[bool, bool], tuple[int, int]]:
        """The highest rates of the input and the output, by the key of ALTERNATIVES."""
        return {
            case: (max(map(self.rates.__getitem__, into)), max(map(self.rates.__getitem__, out)))
            for case, (into, out) in ALTERNATIVES.items()
        }

    def set_back(self, at: int) -> Price:
        """Return the same price, created no later than `at`. The time at which it takes effect
        stays if that was announced."""
        at_once = self.effective_at <= self.created_at
        return msgspec.structs.replace(
            self,
            effective_at=min(self.effective_at, at) if at_once else self.effective_at,
            created_at=min(self.created_at, at),
        )

    @property
    def restrictions(self) -> tuple[int | None, ...]:
        """The maximum of output tokens, and which rates of NEEDED were given."""
        return self.max_output_tokens, *(getattr(self, name) is not None for name in NEEDED)

    @property
    def given(self) -> dict[str, int]:
        """The rates and the maximum of output tokens that were given, by name."""
        values = {name: getattr(self, name) for name in (*RATES, "max_output_tokens")}
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, usage: Usage, images: bool) -> int:
        """Return the cost of usage in nanos, rounded half up. Nothing else is ever rounded.
        `images`: see `billed_usage`."""
        scaled = 0
        for amount, rate in zip(billed_usage(usage, images), self._weighted, strict=True):
            if amount and amount > 0:
                scaled += amount * rate
        return (scaled + SCALE // 2) // SCALE

    def max_cost(
        self, input_tokens: int, output_tokens: int, images: bool, long_cache: bool = False
    ) -> int:
        """Return the maximum cost of these tokens in nanos, whatever kinds of tokens they are.
        `long_cache`: the request can write to the cache for 12 hours."""
        into, out = self._max_rates[images, long_cache]
        return -(-(input_tokens * into + output_tokens * out) // MILLION)

    def max_call_cost(self, extras: int) -> int:
        """Return the highest cost in nanos of one call, among these extras (bits of EXTRAS) that
        are billed by the call."""
        calls = (self.rates[name] for name, bit in CALLS.items() if bit & extras)
        return max(calls, default=0)


def _alternatives(whole: str, images: bool, long_cache: bool) -> list[str]:
    """Return a rate and those of all tokens that it includes, for some requests."""
    names = [whole]
    only = {"", "images" if images else "", "long cache" if long_cache else ""}
    for name, rate in RATES.items():
        if rate.part_of in names and rate.only in only:
            names.append(name)
    return names


# The rates by which a token of the input, or of the output, can be billed. The key: whether the
# request is for an image endpoint, and whether it can write to the cache for 12 hours.
ALTERNATIVES = {
    (images, long_cache): (
        _alternatives("input", images, long_cache),
        _alternatives("output", images, long_cache),
    )
    for images in (False, True)
    for long_cache in (False, True)
}
