"""Which price applies to a request, and why."""

from __future__ import annotations

from redbtc.billing.billing import Billing
from redbtc.billing.prices import TIER_NAMES, Price
from redbtc.billing.records import WhichPrice
from redbtc.store.json_values import json_time


def which_price(billing: Billing, model: str, at: int, tier: str, input_tokens: int) -> WhichPrice:
    """Return the price of a request at a time (milliseconds), and why the others do not apply."""
    tier = TIER_NAMES.get(tier, tier)
    applied, others = billing.prices.which(model, at, tier, input_tokens)
    return WhichPrice(
        model=model,
        at=json_time(at),
        tier=tier,
        input_tokens=input_tokens,
        why=_why(applied, tier, billing.settings.unpriced_models == "free"),
        applies=billing.prices.shown(applied, at) if applied else None,
        others=others,
    )


def _why(applied: Price | None, tier: str, unpriced_are_free: bool) -> str:
    if applied is None:
        then = "are free" if unpriced_are_free else "are refused"
        return (
            f"No current price matches the model: requests for it {then} (billing.unpriced_models)."
        )
    why = "It is the most specific of the current names and patterns that match the model."
    if applied.tier != tier:
        why += f" It has no price for the tier {tier!r}, so the price of {applied.tier!r} applies."
    return why
