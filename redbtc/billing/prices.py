"""Rates and prices: what a number of tokens costs."""

from __future__ import annotations

import functools

import msgspec

from redbtc.money import NANOS
from redbtc.rates import DEFAULT_TIER, EXTRAS, NEEDED, RATES, UNITS, Rates, billed_usage
from redbtc.usage import Usage

# A price is for a pattern of models, a service tier, and requests above some number of input
# tokens. Of all patterns that match a model the most specific has the say, alone. The tier is the
# one that the response reports; one without a price of its own is billed as the default tier.
TIER_NAMES = {"fast": "priority"}  # as requests name them, and the responses to those
MILLION = 1_000_000
MAX_RATE = 10_000_000 * NANOS  # for a million tokens
MAX_CALL_RATE = 10_000 * NANOS
MAX_COST = (1 << 63) - 1  # nanos of one request, and of what is held for it: an INTEGER of SQLite


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
        """What it is the price of: of two for the same the later supersedes the earlier."""
        return self.model, self.tier, self.above_input_tokens

    @functools.cached_property
    def rates(self) -> dict[str, int]:
        """All rates by name, in the order of RATES. Tokens whose rate was not given cost as much
        as the others that they are counted with."""
        rates: dict[str, int] = {}
        for name, rate in RATES.items():
            given = getattr(self, name)
            rates[name] = rates.get(rate.part_of, 0) if given is None else given
        return rates

    @functools.cached_property
    def _millionths(self) -> list[int]:
        """What one token or call costs by each rate, in millionths of a nano."""
        return [rate * (MILLION if name in UNITS else 1) for name, rate in self.rates.items()]

    @functools.cached_property
    def _dearest(self) -> dict[tuple[bool, bool], tuple[int, int]]:
        """The dearest rates of the input and the output, by the key of ALTERNATIVES."""
        return {
            case: (max(map(self.rates.__getitem__, into)), max(map(self.rates.__getitem__, out)))
            for case, (into, out) in ALTERNATIVES.items()
        }

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
        values = {name: getattr(self, name) for name in (*RATES, "max_output_tokens")}
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, usage: Usage, images: bool) -> int:
        """Return the nanos of what was used, rounded half up: the only rounding there is. `images`
        as in `billed_usage`."""
        millionths = 0
        for amount, rate in zip(billed_usage(usage, images), self._millionths, strict=True):
            if amount and amount > 0:
                millionths += amount * rate
        return (millionths + MILLION // 2) // MILLION

    def most(
        self, input_tokens: int, output_tokens: int, images: bool, long_cache: bool = False
    ) -> int:
        """Return the nanos that so much can cost at most, whatever kind of tokens they turn out to
        be. `long_cache`: the request can write to the cache for 12 hours."""
        into, out = self._dearest[images, long_cache]
        return -(-(input_tokens * into + output_tokens * out) // MILLION)

    def dearest_call(self, extras: int) -> int:
        """Return the nanos of the dearest of these extras (bits of EXTRAS) that are billed by the
        call."""
        calls = (self.rates[name] for name in UNITS if EXTRAS[name] & extras)
        return max(calls, default=0)


def _alternatives(whole: str, images: bool, long_cache: bool) -> list[str]:
    names = [whole]
    only = {"", "images" if images else "", "long cache" if long_cache else ""}
    for name, rate in RATES.items():
        if rate.part_of in names and rate.only in only:
            names.append(name)
    return names


# By what a token of the input, or of the output, can be billed. The key says whether the request is
# an image endpoint's, and whether it can write to the cache for 12 hours.
ALTERNATIVES = {
    (images, long_cache): (
        _alternatives("input", images, long_cache),
        _alternatives("output", images, long_cache),
    )
    for images in (False, True)
    for long_cache in (False, True)
}
