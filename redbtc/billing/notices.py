"""Texts of notices about prices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from redbtc.billing.price_list import ModelPrices, is_pattern, matcher
from redbtc.billing.prices import Price
from redbtc.billing.records import FollowingPrice, PricesAdded, PriceSlot, RatesOfEarlierPrice
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.slices import with_turns
from redbtc.store.records import shown_time

FREE = ModelPrices([Price("*")])


def shown_missing(price: Price, old: Price, missing: Mapping[str, int]) -> RatesOfEarlierPrice:
    """Return what a price did not give and the one before it did, as JSON shows it."""
    return RatesOfEarlierPrice(*price.slot, from_=PriceSlot(*old.slot), rates=shown_rates(missing))


def shown_following(price: Price) -> FollowingPrice:
    """Return a price that supersedes an added one later, as JSON shows it."""
    at = shown_time(price.effective_at)
    return FollowingPrice(*price.slot, effective_at=at, rates=shown_rates(price.given))


def shown_rates(given: Mapping[str, int]) -> dict[str, str | int]:
    """Return rates, and the maximum if it is among them, as JSON shows them."""
    return {name: decimal(value) if name in RATES else value for name, value in given.items()}


SHOWN_MODELS = 8  # of many, in a message


def few(names: Sequence[str]) -> str:
    """Return the names, or the first of many."""
    more = len(names) - SHOWN_MODELS
    return ", ".join(names[:SHOWN_MODELS]) + (f" and {more} more" if more > 0 else "")


def slot_name(slot: PriceSlot) -> str:
    """Return what people call a price, such as "gpt-5.5 (flex, above 272000 input tokens)"."""
    tier, above = slot.tier, slot.above_input_tokens
    parts = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
    return slot.model + (f" ({', '.join(parts)})" if parts else "")


def told_of_prices(added: PricesAdded) -> list[str]:
    """Return what people should know of prices that were added."""
    lines = []
    for each in added.taken_over or ():
        earlier = slot_name(each.from_)
        lines.append(f"{slot_name(each)}: rates copied from {earlier}: {rate_list(each.rates)}.")
    for each in added.left_out or ():
        lines.append(f"{slot_name(each)}: no longer has these rates: {rate_list(each.rates)}.")
    for following in added.followed_by:
        lines.append(
            f"{slot_name(following)}: a later price takes effect at {following.effective_at}: "
            f"{rate_list(following.rates)}."
        )
    if added.added:
        applies = added.applies_to
        lines.append(f"Applies to: {few(applies)}." if applies else "Applies to no known model.")
    reasons: dict[str, list[str]] = {}
    for other in added.does_not_apply_to:
        reasons.setdefault(other.because, []).append(other.model)
    for because, models in reasons.items():
        lines.append(f"Does not apply to {few(models)}: {because}.")
    for notice in added.notices:
        lines.append(f"Published notice, effective {notice.effective_at}: {notice.text}")
    return lines


def rate_list(rates: Mapping[str, str | int]) -> str:
    """Return rates as people read them, such as "input 5, output 30"."""
    return ", ".join(f"{name} {rate}" for name, rate in rates.items())


async def matching(models: Iterable[str], patterns: set[str]) -> set[str]:
    """Those of many models that one of many patterns means."""
    wild = [pattern for pattern in patterns if is_pattern(pattern)]
    return {
        model async for model in with_turns(models) if model in patterns or matches(model, wild)
    }


async def matched(patterns: Iterable[str], models: Iterable[str]) -> set[str]:
    """Those of many patterns that mean one of many models."""
    return {
        pattern
        async for pattern in with_turns(filter(is_pattern, patterns))
        if any(matches(model, {pattern}) for model in models)
    }


def matches(model: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the model's, or is the model itself."""
    return any(model == pattern or matcher(pattern)(model) for pattern in patterns)
