"""The prices of one model, and what becomes more expensive when they change."""

from __future__ import annotations

from collections.abc import Iterable

from redbtc.billing.prices import TIER_NAMES, Price
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, NEEDED, RATES, UNITS
from redbtc.usage import Usage

KNOWN_TIERS = ("default", "flex", "scale", "priority", "fast", "ultrafast")  # of OpenAI's API


class ModelPrices:
    """The prices in force for a model, of all tiers and thresholds."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self.tiers: dict[str, list[Price]] = {}  # the highest threshold first
        for price in sorted(prices, key=lambda price: -price.above_input_tokens):
            self.tiers.setdefault(price.tier, []).append(price)
        self.max_output_tokens = self.tiers[DEFAULT_TIER][-1].max_output_tokens

    def price(self, tier: str | None, input_tokens: int) -> Price:
        """Return the price of a response of this tier with this many input tokens. The tier may
        have the name that requests use for it, such as "fast". A threshold applies to input above
        it, not equal to it, and then its rates apply to the whole request."""
        tier = tier or DEFAULT_TIER
        for name in (tier, TIER_NAMES.get(tier, DEFAULT_TIER), DEFAULT_TIER):
            for price in self.tiers.get(name, ()):
                if input_tokens > price.above_input_tokens or not price.above_input_tokens:
                    return price
        raise AssertionError("each model with prices has one of the default tier for any input")

    def possible(self, tier: str | None) -> list[Price]:
        """Return the prices that a request for a tier can get: those of the tier and of the default
        one. If the request leaves the choice to the upstream, or the name is unknown, it can get
        the prices of any tier."""
        wanted = {DEFAULT_TIER, str(tier), TIER_NAMES.get(str(tier), DEFAULT_TIER)}
        any_tier = tier not in KNOWN_TIERS and tier not in self.tiers
        return [
            price
            for name, prices in self.tiers.items()
            if any_tier or name in wanted
            for price in prices
        ]

    def has(self, *rates: str) -> bool:
        """Return whether the default price has one of these rates."""
        usual = self.tiers[DEFAULT_TIER][-1]
        return any(getattr(usual, rate) is not None for rate in rates)

    def max_audio_cost(self, usage: Usage, tier: str | None) -> int:
        """Return the maximum cost in nanos of audio and spoken text of a request for a tier."""
        return max(price.cost(usage, images=False) for price in self.possible(tier))

    def exceeds_default(self, tier: str | None) -> bool:
        """Return whether a request for this tier can cost more than one for the default tier."""
        return self.max_cost(1, 1, tier, False) > self.max_cost(1, 1, DEFAULT_TIER, False)

    def max_cost(
        self,
        input_tokens: int,
        output_tokens: int,
        tier: str | None,
        images: bool,
        long_cache: bool = False,
    ) -> int:
        """Return the maximum cost of a request for a tier in nanos, without calls of tools."""
        return max(
            price.max_cost(input_tokens, output_tokens, images, long_cache)
            for price in self.possible(tier)
            if input_tokens > price.above_input_tokens or not price.above_input_tokens
        )

    def max_call_cost(self, extras: int, tier: str | None) -> int:
        """Return the maximum cost in nanos of one call, among these extras (bits of EXTRAS) that
        are billed by the call."""
        return max(price.max_call_cost(extras) for price in self.possible(tier))

    def lacks(self, rate: str, tier: str | None) -> Price | None:
        """Return a price without this rate that a request for a tier can get, or None."""
        lacking = (price for price in self.possible(tier) if getattr(price, rate) is None)
        return next(lacking, None)


FREE = ModelPrices([Price("*")])


def risen_rates(
    before: ModelPrices | None, after: ModelPrices | None, unpriced_are_free: bool
) -> list[str]:
    """Return which rates are higher after than before, such as "input from 5 to 6": one text for
    each tier and threshold. Usage without a rate was free if `unpriced_are_free`; otherwise it was
    refused, and its first rate is not a rise."""
    if before is None or after is None:
        return []
    prices = [price for each in (before, after) for tier in each.tiers.values() for price in tier]
    found = []
    tiers = {price.tier for price in prices} - {DEFAULT_TIER}
    for tier in (DEFAULT_TIER, *sorted(tiers)):
        for above in sorted({price.above_input_tokens for price in prices}):
            tokens = above + 1 if above else 0
            old, new = before.price(tier, tokens), after.price(tier, tokens)
            risen = [
                f"{name.replace('_', ' ')} from {decimal(a)} to {decimal(b)}{unit_of(name)}"
                for name, a, b in ((name, old.rates[name], new.rates[name]) for name in RATES)
                if b > a and not (getattr(old, name) is None and getattr(new, name) is None)
                if unpriced_are_free or name not in NEEDED or getattr(old, name) is not None
            ]
            where = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
            if risen:
                found.append(", ".join(risen) + f" ({', '.join(where)})" * bool(where))
    return found


def unit_of(rate: str) -> str:
    """Return the unit of a rate, such as " per call"; "" for a rate per million tokens."""
    return f" per {UNITS[rate]}" if rate in UNITS else ""
