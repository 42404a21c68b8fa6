"""The list of prices: which price applies to a model, a service tier and a time.

The most specific name or pattern that matches a model and has a current price for the default tier
without a threshold applies to all of the model's requests; see `specificity`. Of two prices of the
same slot (model, tier, threshold), the later one supersedes the earlier one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from msgspec.structs import asdict

from redbtc.billing.model_patterns import (
    LAST_CHARACTER,
    LITERAL_START,
    is_pattern,
    matcher,
    specificity,
)
from redbtc.billing.model_prices import ModelPrices
from redbtc.billing.prices import Price
from redbtc.billing.records import OtherPrice, PriceShown
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.store.records import json_amount, json_time
from redbtc.times import iso_time

NEVER = 1 << 62  # milliseconds


class PriceTable:
    """The past, current and coming prices. A table does not change; adding prices makes a new
    one."""

    def __init__(self, prices: Iterable[Price] = ()) -> None:
        self.prices = sorted(prices, key=lambda price: (price.slot, price.effective_at, price.id))
        self._changes = sorted({price.effective_at for price in self.prices})
        self._slots: dict[tuple[str, str, int], list[Price]] = {}
        self._named: dict[str, list[Price]] = {}
        for price in self.prices:
            self._slots.setdefault(price.slot, []).append(price)
            self._named.setdefault(price.model, []).append(price)
        self._names = sorted(self._named)
        # By name or pattern, the time since which it has a price that applies to any request.
        self._since = {
            prices[0].model: prices[0].effective_at
            for slot, prices in self._slots.items()
            if slot[1:] == (DEFAULT_TIER, 0)
        }
        self._patterns = sorted(filter(is_pattern, self._named), key=specificity)
        self._known: dict[tuple[str, int], ModelPrices | None] = {}
        self._in_force: dict[int, list[ModelPrices]] = {}

    def model_prices(self, model: str, at: int) -> ModelPrices | None:
        """Return the prices in force for a model at a time, None if it has none."""
        known = model, bisect_right(self._changes, at)  # nothing changes between two times
        if known not in self._known:
            if len(self._known) >= 1000:  # clients choose the names
                self._known.clear()
            self._known[known] = self._find(model, at)
        return self._known[known]

    def _find(self, model: str, at: int) -> ModelPrices | None:
        found = (self._own_prices(each, at) for each in self.matching(model))
        return next(filter(None, found), None)

    def matching(self, model: str) -> Iterator[str]:
        """Yield the names and patterns of prices that match a model, the most specific first. For
        a pattern, these are itself and the patterns that match all of its models."""
        if model in self._named:
            yield model
        for pattern in self._patterns:
            if pattern != model and matcher(pattern)(model):
                yield pattern

    def _own_prices(self, pattern: str, at: int) -> ModelPrices | None:
        """Return the prices in force for exactly this name or pattern, None if there is none for
        the default tier: the others do not apply without it."""
        if at < self._since.get(pattern, NEVER):
            return None
        prices = self._named[pattern]
        return ModelPrices(latest(price for price in prices if price.effective_at <= at).values())

    def in_force(self, at: int) -> list[ModelPrices]:
        """Return the prices in force at a time, for each name or pattern."""
        now = bisect_right(self._changes, at)
        if now not in self._in_force:
            own = (self._own_prices(each, at) for each in self._names)
            self._in_force = {now: [each for each in own if each]}
        return self._in_force[now]

    def before(self, new: Price, others: Iterable[Price]) -> Price | None:
        """Return the price that a new one supersedes when it takes effect: that of its slot, or the
        one that applied to its name or pattern so far. `others` are added to the slot with it."""
        of_slot = (*self._slots.get(new.slot, []), *others)
        old = latest(p for p in of_slot if p.effective_at <= new.effective_at).get(new.slot)
        if old is None:
            prices = self.model_prices(new.model, new.effective_at)
            old = prices.price(new.tier, new.above_input_tokens + 1) if prices else None
        return old

    def shadowing(self, pattern: str, at: int) -> list[str]:
        """Return the more specific names and patterns whose prices apply at a time to models that
        this pattern matches."""
        if not is_pattern(pattern):
            return []
        prefix = LITERAL_START.match(pattern)
        assert prefix is not None, "it may be empty"
        first = bisect_left(self._names, prefix[0])
        last = bisect_left(self._names, prefix[0] + LAST_CHARACTER)
        return [
            name
            for name in self._names[first:last]
            if matcher(pattern)(name)
            and specificity(name) < specificity(pattern)
            and at >= self._since.get(name, NEVER)
        ]

    def has(self, new: Price, others: Iterable[Price]) -> bool:
        """Return whether the slot of a new price already has the same rates when it takes effect.
        `others` are added to the slot with it."""
        of_slot = (*self._slots.get(new.slot, []), *others)
        old = latest(p for p in of_slot if p.effective_at <= new.effective_at).get(new.slot)
        return old is not None and (old.rates, old.restrictions) == (new.rates, new.restrictions)

    def rows(self, now: int) -> Iterator[PriceShown]:
        """Yield all prices as JSON shows them, by model, tier, threshold and time."""
        shadowing: dict[tuple[str, int], list[str]] = {}
        for price in self.prices:
            about = price.model, max(now, price.effective_at)
            if about not in shadowing:
                shadowing[about] = self.shadowing(*about)
            yield self._shown(price, now, shadowing[about])

    def _shown(self, price: Price, now: int, shadowed_by: list[str]) -> PriceShown:
        superseded = self._superseded_at(price) <= now
        return PriceShown(
            model=price.model,
            tier=price.tier,
            above_input_tokens=price.above_input_tokens,
            effective_at=json_time(price.effective_at),
            **{name: json_amount(getattr(price, name)) for name in RATES},
            max_output_tokens=price.max_output_tokens,
            currency=price.currency,
            source=price.source,
            created_at=json_time(price.created_at),
            added_by=price.added_by,
            reason=price.reason,
            id=price.id,
            status="coming" if price.effective_at > now else "past" if superseded else "current",
            shadowed_by=[] if superseded else shadowed_by,
        )

    def _superseded_at(self, price: Price) -> int:
        """Return when the next price of the same slot takes effect, or NEVER."""
        following = self.following(price)
        return following.effective_at if following else NEVER

    def following(self, price: Price) -> Price | None:
        """Return the price that supersedes this one in its slot, or None."""
        of_slot = self._slots[price.slot]
        place = bisect_right(of_slot, order(price), key=order)
        return of_slot[place] if place < len(of_slot) else None

    def why_not(self, price: Price, model: str, at: int) -> str | None:
        """Return why a price does not apply to a model that its pattern matches, or None if it
        applies to those requests that have its tier and more input than its threshold."""
        if price.effective_at > at:
            return f"it takes effect at {iso_time(price.effective_at)}"
        if (superseded_at := self._superseded_at(price)) <= at:
            return f"a newer price replaced it at {iso_time(superseded_at)}"
        if at < self._since.get(price.model, NEVER):
            return (
                f"{price.model!r} has no price for the tier {DEFAULT_TIER!r} without a token "
                "threshold, so its other prices don't apply"
            )
        chosen = next(each for each in self.matching(model) if at >= self._since.get(each, NEVER))
        return None if chosen == price.model else f"the price of {chosen!r} is more specific"

    def which(
        self, model: str, at: int, tier: str, input_tokens: int
    ) -> tuple[Price | None, list[OtherPrice]]:
        """Return the price of a request at a time, and all others whose patterns match its model,
        each with the reason why it does not apply."""
        prices = self.model_prices(model, at)
        applied = prices.price(tier, input_tokens) if prices else None
        others = []
        for pattern in self.matching(model):
            shadowed_by = self.shadowing(pattern, at)
            for price in self._named[pattern]:
                if price is not applied:
                    because = self.why_not(price, model, at) or _mismatch(price, applied, tier)
                    shown = asdict(self._shown(price, at, shadowed_by))
                    others.append(OtherPrice(**shown, because=because))
        return applied, others

    def shown(self, price: Price, now: int) -> PriceShown:
        """Return a price as JSON shows it."""
        return self._shown(price, now, self.shadowing(price.model, now))


def _mismatch(price: Price, applied: Price | None, tier: str) -> str:
    """Return why the tier or threshold of a price of the right pattern does not match a request."""
    assert applied is not None, "the pattern has a price of the default tier"
    if price.tier != applied.tier:
        more = f", and {tier!r} has its own price" if price.tier == DEFAULT_TIER else ""
        return f"it is for the tier {price.tier!r}{more}"
    if price.above_input_tokens > applied.above_input_tokens:
        return f"it applies above {price.above_input_tokens} input tokens"
    return f"another price applies above {applied.above_input_tokens} input tokens"


def order(price: Price) -> tuple[int, int]:
    """Return a sort key of the prices of a slot: each supersedes the one before."""
    return price.effective_at, price.id


def latest(prices: Iterable[Price]) -> dict[tuple[str, str, int], Price]:
    """Return the price of each slot that supersedes the others of the slot."""
    ordered = sorted(prices, key=order)
    return {price.slot: price for price in ordered}
