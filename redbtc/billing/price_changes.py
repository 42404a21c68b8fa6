"""Prices that are added: which of them change something, what they apply to, and the notices due.

Prices are only ever added: a new one supersedes the one of its slot (model, tier, threshold) when
it takes effect. What has been billed stays billed, so no price can take effect before a request
that it would apply to, and no model in use becomes more expensive without notice, unless an
operator gives a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
from msgspec import UNSET

from redbtc.billing.billing import Billing
from redbtc.billing.model_patterns import (
    is_pattern,
    matches,
    models_matched,
    patterns_matching,
    specificity,
)
from redbtc.billing.notices import price_notice
from redbtc.billing.price_increases import Compared, refuse_early, rising_models, texts_of
from redbtc.billing.price_table import PriceTable
from redbtc.billing.price_texts import following_price, rates_of_earlier, slot_name
from redbtc.billing.prices import Price
from redbtc.billing.records import (
    ModelsInUse,
    NotApplied,
    PricesAdded,
    PriceSlot,
    PublishedNotice,
    RatesOfEarlierPrice,
)
from redbtc.errors import UserError
from redbtc.slices import with_turns
from redbtc.store.database import Store
from redbtc.store.json_values import json_time
from redbtc.times import DAY, MINUTE, iso_time

IN_USE = 90 * DAY  # a model that was requested within this time is in use

ADD_PRICE = f"""
    INSERT INTO prices ({", ".join(Price.__struct_fields__)})
    VALUES ({", ".join("?" * len(Price.__struct_fields__))})"""
MODELS_USED = """
    SELECT DISTINCT requested_model FROM usage_by_day WHERE day >= ?
    UNION SELECT requested_model FROM requests WHERE outcome = 'pending'"""


async def add_prices(
    billing: Billing,
    prices: Sequence[Price],
    *,
    without_notice: str | None,
    by: str,
    take_over: bool = False,
    listed: Collection[str] = (),
) -> PricesAdded:
    """Add all of the prices or none; those that change nothing are skipped. An `effective_at` of 0
    is now. With `take_over`, rates that are not given are copied from the price that a new one
    supersedes. `listed` are models that the result reports on besides those that have prices or are
    in use. Raises UserError for a price that would change what has been billed, and for a price
    increase without notice, unless `without_notice` gives a reason."""
    async with billing.changing_prices:
        now, before = billing.store.time(), billing.prices
        given = list(_rows_of(billing, prices, now, by, without_notice))
        _refuse_twice(given)
        new, missing = _changing(before, given, take_over)
        after = PriceTable([*before.prices, *new])
        await _refuse_the_past(billing.store, new, now)
        notices = await _notices_due(billing, new, after, now, without_notice is not None)
        changes = list(_statements(billing, new, notices, now, by))
        if changes:
            await billing.store.transact(*changes, by=by)
        billing.prices = after
    added = {price.id for price in new}
    applies_to, others = await _reach(billing.store, new, after, now, listed)
    return PricesAdded(
        prices=[row async for row in with_turns(after.rows(now)) if row.id in added],
        added=len(new),
        unchanged=len(prices) - len(new),
        applies_to=applies_to,
        does_not_apply_to=others,
        taken_over=missing if take_over else UNSET,
        left_out=UNSET if take_over else missing,
        followed_by=[
            following_price(following)
            for following in map(after.following, new)
            if following and following.id not in added and following.effective_at > now
        ],
        notices=[PublishedNotice(text, json_time(at)) for at, text in notices],
    )


def _rows_of(
    billing: Billing, prices: Iterable[Price], now: int, by: str, reason: str | None
) -> Iterator[Price]:
    """Yield the prices with all columns of their rows."""
    first_id = max((price.id for price in billing.prices.prices), default=0) + 1
    for number, price in enumerate(prices, first_id):
        yield msgspec.structs.replace(
            price,
            id=number,
            effective_at=price.effective_at or now,
            currency=billing.currency,
            created_at=now,
            added_by=by,
            reason=reason,
        )


def _refuse_twice(prices: Iterable[Price]) -> None:
    """Raise UserError if two prices of the same slot take effect at the same time and differ."""
    known: dict[tuple[object, int], dict[str, int]] = {}
    for price in prices:
        if known.setdefault((price.slot, price.effective_at), price.given) != price.given:
            raise UserError(
                f"two different prices of {slot_name(PriceSlot(*price.slot))} "
                f"take effect at {iso_time(price.effective_at)}; remove one"
            )


def _changing(
    before: PriceTable, given: Sequence[Price], take_over: bool
) -> tuple[list[Price], list[RatesOfEarlierPrice]]:
    """Return the prices that change something, and the rates that they lack and the prices which
    they supersede have. With `take_over`, the prices get these rates."""
    kept: dict[tuple[str, str, int], list[Price]] = {}
    lacking = []
    for price in sorted(given, key=lambda price: price.effective_at):
        of_slot = kept.setdefault(price.slot, [])
        old = before.before(price, of_slot)
        rest = {} if old is None else {**old.given}
        missing = {name: value for name, value in rest.items() if name not in price.given}
        if take_over:
            price = msgspec.structs.replace(price, **missing)
        if before.has(price, of_slot):
            continue
        of_slot.append(price)
        if old and missing and (take_over or old.slot == price.slot):
            lacking.append(rates_of_earlier(price, old, missing))
    return sorted(chain(*kept.values()), key=lambda price: price.id), lacking


async def _refuse_the_past(store: Store, prices: Iterable[Price], now: int) -> None:
    """Raise UserError if a price would take effect before a request that it applies to: the cost of
    that request does not change any more."""
    for price in prices:
        if price.effective_at >= now:
            continue
        for model in await _models_used(store, price.effective_at):
            if matches(model, {price.model}):
                raise UserError(
                    f"{model} has been used since {iso_time(price.effective_at)}, so its price "
                    "can't change from then on; choose a time from now on"
                )


async def _notices_due(
    billing: Billing, new: Sequence[Price], after: PriceTable, now: int, without_notice: bool
) -> list[tuple[int, str]]:
    """Return the texts of the notices to publish, each after the time at which the prices in it
    take effect. Raises UserError if that is too early, unless `without_notice`."""
    settings = billing.settings
    compared = await _compared(billing.store, new, after, now)
    free = settings.unpriced_models == "free"
    rises = await rising_models(billing.prices, after, compared, free)
    if not without_notice:
        due = now + settings.price_notice_days * DAY - MINUTE
        refuse_early(rises, due, settings.price_notice_days)
    return texts_of(rises, compared.times, billing.currency)


async def _compared(store: Store, new: Sequence[Price], after: PriceTable, now: int) -> Compared:
    """Return the models that the new prices can make more expensive, and the times from which on
    they can."""
    added = {price.model for price in new}
    earliest = min((price.effective_at for price in new), default=now)
    known = {price.model for price in after.prices}
    used = await models_matched(await _models_used(store, now - IN_USE), added)
    named = await models_matched(known, added)
    models = sorted(added | used | named, key=specificity)
    about = {*models, *await patterns_matching(known, models)}
    times = {price.effective_at for price in after.prices if price.model in about}
    return Compared(models, sorted(time for time in times if time >= earliest), used, named, added)


def _statements(
    billing: Billing, new: Iterable[Price], notices: Iterable[tuple[int, str]], now: int, by: str
) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the statements that add prices and notices, each with its values."""
    for price in new:
        yield ADD_PRICE, msgspec.structs.astuple(price)
    for at, text in notices:
        until = max(at, now) + billing.settings.price_notice_days * DAY
        yield price_notice(text, at, until, now, by)


async def _reach(
    store: Store, new: Sequence[Price], after: PriceTable, now: int, listed: Collection[str]
) -> tuple[list[str], list[NotApplied]]:
    """Return the known models that new prices apply to once they take effect, and those that they
    match and do not apply to, with the reason. Patterns of other prices count as models."""
    by_pattern: dict[str, list[Price]] = {}
    for price in new:
        by_pattern.setdefault(price.model, []).append(price)
    known = {price.model for price in after.prices}
    known |= {*listed, *await _models_used(store, now - IN_USE)}
    models = sorted(await models_matched(known, {*by_pattern}))
    applies, others = [], []
    async for model in with_turns(models):
        reasons = [
            after.why_not(price, model, max(now, price.effective_at))
            for pattern, prices in by_pattern.items()
            if matches(model, (pattern,))
            for price in prices
        ]
        if None in reasons:
            applies += [model] * (not is_pattern(model) or model not in by_pattern)
        else:
            others.append(NotApplied(model, str(reasons[0])))
    return applies, others


async def models_in_use(billing: Billing) -> ModelsInUse:
    """Return the models that are in use, and what decides about notices of price increases."""
    now, settings = billing.store.time(), billing.settings
    models = sorted(await _models_used(billing.store, now - IN_USE))
    return ModelsInUse(
        json_time(now),
        models,
        settings.price_notice_days,
        settings.unpriced_models,
        billing.currency,
    )


async def _models_used(store: Store, since: int) -> set[str]:
    """Return the models that were requested since a time (milliseconds)."""
    return {row[0] async for row in store.rows(MODELS_USED, (since // DAY,))}
