"""Texts of notices about prices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redbtc.billing.price_list import ModelPrices, is_pattern, matcher
from redbtc.billing.prices import DEFAULT_TIER, Price, Rates
from redbtc.money import decimal
from redbtc.slices import with_turns
from redbtc.store.records import Record
from redbtc.times import iso_time

FREE = ModelPrices([Price("*")])


def shown_missing(price: Price, old: Price, missing: Mapping[str, int]) -> Record:
    """What a price did not give and the one before it did, as JSON shows it."""
    rates = {name: decimal(value) for name, value in missing.items() if name in Rates._fields}
    return {
        "model": price.model,
        "tier": price.tier,
        "above_input_tokens": price.above_input_tokens,
        "from": {
            "model": old.model,
            "tier": old.tier,
            "above_input_tokens": old.above_input_tokens,
        },
        "rates": {**missing, **rates},
    }


def shown_following(price: Price) -> Record:
    """Return a price that supersedes an added one later, as JSON shows it."""
    rates = {name: decimal(value) for name, value in price.given.items() if name in Rates._fields}
    return {
        "model": price.model,
        "tier": price.tier,
        "above_input_tokens": price.above_input_tokens,
        "effective_at": iso_time(price.effective_at),
        "rates": {**price.given, **rates},
    }


SHOWN_MODELS = 8  # of many, in a message


def few(names: Sequence[str]) -> str:
    """Return the names, or the first of many."""
    more = len(names) - SHOWN_MODELS
    return ", ".join(names[:SHOWN_MODELS]) + (f" and {more} more" if more > 0 else "")


def slot_name(slot: Mapping[str, Any]) -> str:
    """Return what people call a price, such as "gpt-5.5 (flex, above 272000 input tokens)"."""
    tier, above = slot["tier"], slot["above_input_tokens"]
    parts = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
    return str(slot["model"]) + (f" ({', '.join(parts)})" if parts else "")


def told_of_prices(added: Record) -> list[str]:
    """Return what people should know of prices that were added, given what `add_prices` said."""
    lines = []
    for each in added.get("taken_over", ()):
        rates = ", ".join(f"{name} {rate}" for name, rate in each["rates"].items())
        lines.append(f"{slot_name(each)}: rates copied from {slot_name(each['from'])}: {rates}.")
    for each in added.get("left_out", ()):
        rates = ", ".join(f"{name} {rate}" for name, rate in each["rates"].items())
        lines.append(f"{slot_name(each)}: no longer has these rates: {rates}.")
    for each in added["followed_by"]:
        rates = ", ".join(f"{name} {rate}" for name, rate in each["rates"].items())
        lines.append(
            f"{slot_name(each)}: a later price takes effect at {each['effective_at']}: {rates}."
        )
    if added["added"]:
        applies = added["applies_to"]
        lines.append(f"Applies to: {few(applies)}." if applies else "Applies to no known model.")
    reasons: dict[str, list[str]] = {}
    for each in added["does_not_apply_to"]:
        reasons.setdefault(each["because"], []).append(each["model"])
    for because, models in reasons.items():
        lines.append(f"Does not apply to {few(models)}: {because}.")
    for each in added["notices"]:
        lines.append(f"Published notice, effective {each['effective_at']}: {each['text']}")
    return lines


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
