"""Compare the prices in force with a list of prices.

A list has names of models; the ledger's prices also have patterns. A pattern is compared with the
listed models that it prices. If these have the same prices, the pattern gets them, otherwise each
of the models that differs gets a price of its own, with all tiers and thresholds: of the names and
patterns that match a model, only the prices of the most specific one apply.

What a list does not have stays as it is: rates that it does not know, such as file searches, and
models that it does not list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from redbtc.billing.model_patterns import is_pattern, matches
from redbtc.billing.model_prices import FREE, ModelPrices, risen_rates
from redbtc.billing.price_lists import ListedModel, PriceListing, Slot
from redbtc.billing.price_table import PriceTable
from redbtc.billing.prices import Price
from redbtc.billing.records import PriceSlot
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, NEEDED, RATES, UNITS
from redbtc.store.json_values import Moment, Money, json_time
from redbtc.times import DAY

SNAPSHOTS = "-20*"  # ends the pattern of a model's dated snapshots, as in prices.toml
DEFAULT_SLOT: Slot = DEFAULT_TIER, 0


class RateChange(Struct):
    """A rate now and in the list, or the maximum of output tokens. `change_percent` is null if one
    of them is not given, or if it is 0 now."""

    rate: str
    now: Money | None
    then: Money | None
    change_percent: str | None


class PriceDifference(PriceSlot, kw_only=True):
    """A price that differs. `is_new`: no price applies to the model now. `rises` says what becomes
    more expensive. If the model is in use, that needs a notice, and the price can be in force from
    `in_force_from` on."""

    is_new: bool
    rates: list[RateChange]
    rises: list[str]
    needs_notice: bool
    in_force_from: Moment | None


class ListProblem(Struct):
    """A model of the list that is left out, and why; or one of its tiers and thresholds."""

    model: str
    problem: str
    tier: str | None = None  # None: the whole model
    above_input_tokens: int | None = None


class PriceDiff(Struct):
    """The result of a comparison. `announced` are prices of the list that are to take effect.
    `not_in_list` are names and patterns of prices in force, `unchanged` counts prices."""

    source: str
    kind: str
    currency: str
    changes: list[PriceDifference]
    announced: list[PriceSlot]
    not_in_list: list[str]
    problems: list[ListProblem]
    unchanged: int


class ToCompare(NamedTuple):
    """The prices of a gateway, and what decides about notices. `in_force` has only prices that are
    in force, `used` are the models that were used in the last 90 days."""

    in_force: PriceTable
    coming: list[Price]
    used: frozenset[str]
    unpriced_are_free: bool
    now: int  # ms
    notice_days: int


class ChangedPrice(NamedTuple):
    """A price to add, and how it differs from what applies now."""

    price: Price
    difference: PriceDifference


class Comparison:
    """A comparison of the prices of a gateway with those of a list."""

    def __init__(self, known: ToCompare, listing: PriceListing, every_model: bool) -> None:
        """With `every_model`, all models of the list are compared, otherwise only those that have a
        price or were used."""
        self._known = known
        self._listing = listing
        self._every_model = every_model
        self.changed: list[ChangedPrice] = []
        self.announced: list[PriceSlot] = []
        self.not_in_list: list[str] = []
        self.problems: list[ListProblem] = []
        self.unchanged = 0
        for name, slots in sorted(self._targets()):
            self._compare(name, slots)

    def result(self, source: str, currency: str) -> PriceDiff:
        """Return the result, for JSON."""
        return PriceDiff(
            source,
            self._listing.kind,
            currency,
            [each.difference for each in self.changed],
            self.announced,
            self.not_in_list,
            self.problems,
            self.unchanged,
        )

    def _targets(self) -> Iterator[tuple[str, ListedModel]]:
        """Yield the names and patterns to compare, each with the prices of the list."""
        listed, table = self._listing.models, self._known.in_force
        owners = self._owners()
        own = [prices.tiers[DEFAULT_TIER][-1].model for prices in table.in_force(self._known.now)]
        for name in own:
            if name in listed:
                yield name, listed[name]
            elif self._listing.is_complete:
                self.not_in_list.append(name)
            elif is_pattern(name) and owners.get(name):
                yield from self._of_pattern(name, owners[name])
            elif is_pattern(name) and any(matches(model, {name}) for model in listed):
                pass  # each of them has a price of its own
            elif name.endswith(SNAPSHOTS) and name.removesuffix(SNAPSHOTS) in listed:
                yield name, listed[name.removesuffix(SNAPSHOTS)]
            elif name not in self._listing.problems:
                self.not_in_list.append(name)
        every = self._every_model or self._listing.is_complete
        wanted = {*listed} if every else self._known.used & {*listed}
        for name in wanted - {*own}:
            unpriced = table.model_prices(name, self._known.now) is None
            if unpriced or self._listing.is_complete:
                yield name, listed[name]
        self.problems = [
            each
            for each in list_problems(self._listing)
            if self._every_model or each.model in own or each.model in self._known.used
        ]

    def _owners(self) -> dict[str, list[str]]:
        """Return by pattern the models of the list to which its prices apply."""
        owners: dict[str, list[str]] = {}
        for name in self._listing.models:
            prices = self._known.in_force.model_prices(name, self._known.now)
            if prices and (owner := prices.tiers[DEFAULT_TIER][-1].model) != name:
                owners.setdefault(owner, []).append(name)
        return owners

    def _of_pattern(self, pattern: str, models: list[str]) -> Iterator[tuple[str, ListedModel]]:
        listed = [self._listing.models[name] for name in models]
        if all(each == listed[0] for each in listed):
            yield pattern, listed[0]
        else:
            yield from zip(models, listed, strict=True)

    def _compare(self, name: str, listed: ListedModel) -> None:
        """Compare the prices of one name or pattern, slot by slot."""
        applied = self._known.in_force.model_prices(name, self._known.now)
        own = {slot_of(price): price for price in prices_in(applied)}
        is_own = any(price.model == name for price in own.values())
        slots = (
            listed
            if is_own or self._listing.is_complete
            else {**{slot: {} for slot in own}, **listed}
        )
        found = []
        for (tier, above), rates in sorted(slots.items()):
            old = applied.price(tier, above + 1 if above else 0) if applied else None
            new = self._listed_price(name, (tier, above), rates, old, own)
            found.append(self._changed(new, old))
        differing = [each for each in found if each.difference.rates]
        if differing and not is_own:  # only the prices of the new name apply then
            differing = found
        elif differing:
            add_what_would_change(found, differing, own)
        self._set_times(name, differing, own, is_own)
        self.unchanged += len(found) - len(differing)
        self.changed += self._not_announced(differing)

    def _set_times(
        self, name: str, differing: list[ChangedPrice], own: Mapping[Slot, Price], is_own: bool
    ) -> None:
        """Let prices of a name that need a notice take effect when that is over, and the others at
        once. Let all of them wait if the name has no prices yet, or if something would cost more
        between the two times: a tier can get its price by way of another."""
        if not self._in_use(name) or not differing:
            return
        at_once = [each for each in differing if not each.difference.rises]
        between = (dict(own) if is_own else {}) | {
            slot_of(each.price): each.price for each in at_once
        }
        waits = len(at_once) < len(differing) and not is_own
        if at_once and not waits and DEFAULT_SLOT in between:
            before = ModelPrices(own.values()) if own else self._free
            free = self._known.unpriced_are_free
            waits = bool(risen_rates(before, ModelPrices(between.values()), free))
        due = json_time(self._known.now + self._known.notice_days * DAY)
        for each in differing:
            if waits or each.difference.rises:
                each.difference.needs_notice, each.difference.in_force_from = True, due

    @property
    def _free(self) -> ModelPrices | None:
        """Return the prices of a model in use that has none."""
        return FREE if self._known.unpriced_are_free else None

    def _in_use(self, name: str) -> bool:
        return any(matches(model, {name}) for model in self._known.used)

    def _listed_price(
        self,
        name: str,
        slot: Slot,
        rates: Mapping[str, int],
        old: Price | None,
        own: Mapping[Slot, Price],
    ) -> Price:
        """Return a price with the rates of the list, and those that the list does not know."""
        same = own.get(slot)
        kept = {} if self._listing.is_complete else rates_of(same) if same else calls_of(old)
        if same and not self._listing.is_complete:
            maximum = same.max_output_tokens
        else:
            maximum = self._listing.max_output_tokens.get(name) if slot == DEFAULT_SLOT else None
        tier, above = slot
        price = Price(name, tier, above, max_output_tokens=maximum)
        return replace(price, **{**kept, **rates})

    def _changed(self, new: Price, old: Price | None) -> ChangedPrice:
        before = ModelPrices([of_any_request(old)]) if old else None
        if before is None and self._in_use(new.model):
            before = self._free
        after, free = ModelPrices([of_any_request(new)]), self._known.unpriced_are_free
        return ChangedPrice(
            new,
            PriceDifference(
                *new.slot,
                is_new=old is None,
                rates=list(rate_changes(old, new)),
                rises=risen_rates(before, after, free),
                needs_notice=False,
                in_force_from=None,
            ),
        )

    def _not_announced(self, found: Iterable[ChangedPrice]) -> Iterator[ChangedPrice]:
        """Yield what no price that is to take effect will change in the same way."""
        for each in found:
            price = each.price
            if any(
                (coming.slot, coming.rates, coming.restrictions)
                == (price.slot, price.rates, price.restrictions)
                for coming in self._known.coming
            ):
                self.announced.append(PriceSlot(*price.slot))
            else:
                yield each


def list_problems(listing: PriceListing) -> list[ListProblem]:
    """Return what is left out of a list, by model."""
    whole = [ListProblem(name, problem) for name, problem in listing.problems.items()]
    partial = [
        ListProblem(name, "the list has only some of its prices", *slot)
        for name, slots in listing.partial.items()
        for slot in slots
    ]
    return sorted(whole + partial, key=lambda each: each.model)


def prices_in(prices: ModelPrices | None) -> Iterator[Price]:
    """Yield the prices of all tiers and thresholds of a model."""
    for of_tier in prices.tiers.values() if prices else ():
        yield from of_tier


def rates_of(price: Price) -> dict[str, int]:
    """Return the rates of a price that were given."""
    return {name: value for name, value in price.given.items() if name in RATES}


def calls_of(price: Price | None) -> dict[str, int]:
    """Return the given rates that are not for tokens: they are the same in each tier."""
    given = rates_of(price) if price else {}
    return {name: value for name, value in given.items() if name in UNITS}


def of_any_request(price: Price) -> Price:
    """Return a price as one for the default tier and input of any length."""
    return replace(price, tier=DEFAULT_TIER, above_input_tokens=0)


def rate_changes(old: Price | None, new: Price) -> Iterator[RateChange]:
    """Yield the rates of a new price that differ from those which apply now."""
    for name in RATES:
        before, after = (getattr(price, name) if price else None for price in (old, new))
        if before is None and after is None:
            continue
        is_same = old is not None and old.rates[name] == new.rates[name]
        if is_same and (name not in NEEDED or (before is None) == (after is None)):
            continue
        yield RateChange(name, shown(before), shown(after), change_in_percent(before, after))
    limits = old.max_output_tokens if old else None, new.max_output_tokens
    if limits[0] != limits[1] and slot_of(new) == DEFAULT_SLOT:
        now, then = (None if limit is None else str(limit) for limit in limits)
        yield RateChange("max_output_tokens", now, then, change_in_percent(*limits))


def shown(nanos: int | None) -> str | None:
    """Return a rate as JSON shows it."""
    return None if nanos is None else decimal(nanos)


def change_in_percent(before: int | None, after: int | None) -> str | None:
    """Return a change in percent, with a sign and one digit after the point."""
    if not before or after is None:
        return None
    change = Decimal(after - before) * 100 / Decimal(before)
    return f"{change:+.1f}"


def add_what_would_change(
    found: Iterable[ChangedPrice], differing: list[ChangedPrice], own: Mapping[Slot, Price]
) -> None:
    """Add to the differing prices of a name those of other slots that apply now by way of the
    default tier or of a lower threshold, and would not once the differing ones are in force."""
    slots = dict(own)
    while True:
        slots |= {slot_of(each.price): each.price for each in differing}
        after = ModelPrices(slots.values())
        missing = [
            each
            for each in found
            if each not in differing and applied_price(after, each.price).rates != each.price.rates
        ]
        if not missing:
            return
        differing += missing


def applied_price(prices: ModelPrices, price: Price) -> Price:
    """Return the price that applies to the requests that another price is for."""
    above = price.above_input_tokens
    return prices.price(price.tier, above + 1 if above else 0)


def slot_of(price: Price) -> Slot:
    """Return the tier and the threshold of a price."""
    return price.tier, price.above_input_tokens
