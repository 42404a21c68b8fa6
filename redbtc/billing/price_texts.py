"""Prices that were added, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redbtc.billing.prices import Price
from redbtc.billing.records import FollowingPrice, PricesAdded, PriceSlot, RatesOfEarlierPrice
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.store.json_values import json_time

SHOWN_MODELS = 8  # in one message


def rates_of_earlier(price: Price, old: Price, missing: Mapping[str, int]) -> RatesOfEarlierPrice:
    """Return the rates that a price lacks and the one before it has, as JSON shows them."""
    return RatesOfEarlierPrice(*price.slot, from_=PriceSlot(*old.slot), rates=json_rates(missing))


def following_price(price: Price) -> FollowingPrice:
    """Return a price that supersedes an added one later, as JSON shows it."""
    at = json_time(price.effective_at)
    return FollowingPrice(*price.slot, effective_at=at, rates=json_rates(price.given))


def json_rates(given: Mapping[str, int]) -> dict[str, str | int]:
    """Return rates, and the maximum if it is among them, as JSON shows them."""
    return {name: decimal(value) if name in RATES else value for name, value in given.items()}


def few(names: Sequence[str]) -> str:
    """Return the names as a list in words. Only the first SHOWN_MODELS are named."""
    more = len(names) - SHOWN_MODELS
    return ", ".join(names[:SHOWN_MODELS]) + (f" and {more} more" if more > 0 else "")


def slot_name(slot: PriceSlot) -> str:
    """Return the name of a price's slot, such as "gpt-5.5 (flex, above 272000 input tokens)"."""
    tier, above = slot.tier, slot.above_input_tokens
    parts = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
    return slot.model + (f" ({', '.join(parts)})" if parts else "")


def summary_of_added(added: PricesAdded) -> list[str]:
    """Return sentences about prices that were added: copied rates, models, notices."""
    lines = []
    for each in added.taken_over or ():
        earlier = slot_name(each.from_)
        lines.append(f"{slot_name(each)}: rates copied from {earlier}: {rates_text(each.rates)}.")
    for each in added.left_out or ():
        lines.append(f"{slot_name(each)}: no longer has these rates: {rates_text(each.rates)}.")
    for following in added.followed_by:
        lines.append(
            f"{slot_name(following)}: a later price takes effect at {following.effective_at}: "
            f"{rates_text(following.rates)}."
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


def rates_text(rates: Mapping[str, str | int]) -> str:
    """Return rates in words, such as "input 5, output 30"."""
    return ", ".join(f"{name} {rate}" for name, rate in rates.items())
