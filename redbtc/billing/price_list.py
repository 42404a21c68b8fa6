"""The list of prices: which price applies to a model, a service tier and a time."""

from __future__ import annotations

import fnmatch
import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import asdict

from redbtc.billing.prices import TIER_NAMES, Price
from redbtc.billing.records import OtherPrice, PriceShown
from redbtc.money import decimal
from redbtc.rates import DEFAULT_TIER, NEEDED, RATES, UNITS
from redbtc.store.records import shown_amount, shown_time
from redbtc.times import iso_time

KNOWN_TIERS = ("default", "flex", "scale", "priority", "fast", "ultrafast")  # of OpenAI's API
NEVER = 1 << 62  # milliseconds
LITERAL = re.compile(r"[^*?\[]*+")  # what all names begin with that a pattern means
LAST_CHARACTER = "\U0010ffff"
ONE_CHARACTER = re.compile(r"\[[^\]]+\]|\?")  # what stands in a pattern for exactly one


class ModelPrices:
    """The prices in force for a model, of all tiers and thresholds."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self.tiers: dict[str, list[Price]] = {}  # the highest threshold first
        for price in sorted(prices, key=lambda price: -price.above_input_tokens):
            self.tiers.setdefault(price.tier, []).append(price)
        self.max_output_tokens = self.tiers[DEFAULT_TIER][-1].max_output_tokens

    def price(self, tier: str | None, input_tokens: int) -> Price:
        """Return the price of a response of this tier with this many input tokens. The tier may be
        reported by the name that requests use for it, such as "fast". A threshold applies to input
        above it, not equal to it, and then its rates apply to the whole request."""
        tier = tier or DEFAULT_TIER
        for name in (tier, TIER_NAMES.get(tier, DEFAULT_TIER), DEFAULT_TIER):
            for price in self.tiers.get(name, ()):
                if input_tokens > price.above_input_tokens or not price.above_input_tokens:
                    return price
        raise AssertionError("a tariff has a price of the default tier for any input")

    def possible(self, tier: str | None) -> list[Price]:
        """The prices that a request can get which asks for a tier: it gets that or the default one.
        Where it leaves the choice to the upstream, or nobody knows how that takes the name, it may
        get any."""
        wanted = {DEFAULT_TIER, str(tier), TIER_NAMES.get(str(tier), DEFAULT_TIER)}
        any_tier = tier not in KNOWN_TIERS and tier not in self.tiers
        return [
            price
            for name, prices in self.tiers.items()
            if any_tier or name in wanted
            for price in prices
        ]

    def exceeds_default(self, tier: str | None) -> bool:
        """Return whether a request for this tier can cost more than one for the default tier."""
        return self.most(1, 1, tier, False) > self.most(1, 1, DEFAULT_TIER, False)

    def most(
        self,
        input_tokens: int,
        output_tokens: int,
        tier: str | None,
        images: bool,
        long_cache: bool = False,
    ) -> int:
        """Nanos that a request can cost at most, without calls of tools. `tier` is the one it asks
        for."""
        return max(
            price.most(input_tokens, output_tokens, images, long_cache)
            for price in self.possible(tier)
            if input_tokens > price.above_input_tokens or not price.above_input_tokens
        )

    def dearest_call(self, extras: int, tier: str | None) -> int:
        """Return the nanos that one of these extras (bits of EXTRAS) can cost at most, of those
        that are billed by the call."""
        return max(price.dearest_call(extras) for price in self.possible(tier))

    def lacks(self, rate: str, tier: str | None) -> Price | None:
        """Return a price without this rate that a request which asks for a tier can get."""
        lacking = (price for price in self.possible(tier) if getattr(price, rate) is None)
        return next(lacking, None)


class PriceTable:
    """All prices, past, current and coming. It doesn't change: with more prices it is another."""

    def __init__(self, prices: Iterable[Price] = ()) -> None:
        self.prices = sorted(prices, key=lambda price: (price.slot, price.effective_at, price.id))
        self._changes = sorted({price.effective_at for price in self.prices})
        self._slots: dict[tuple[str, str, int], list[Price]] = {}
        self._named: dict[str, list[Price]] = {}
        for price in self.prices:
            self._slots.setdefault(price.slot, []).append(price)
            self._named.setdefault(price.model, []).append(price)
        self._names = sorted(self._named)
        # By name or pattern, since when it has a price that holds for all of its requests.
        self._since = {
            prices[0].model: prices[0].effective_at
            for slot, prices in self._slots.items()
            if slot[1:] == (DEFAULT_TIER, 0)
        }
        self._patterns = sorted(filter(is_pattern, self._named), key=specificity)
        self._known: dict[tuple[str, int], ModelPrices | None] = {}
        self._in_force: dict[int, list[ModelPrices]] = {}

    def tariff(self, model: str, at: int) -> ModelPrices | None:
        """The prices in force for a model at a time, or None: it has none."""
        known = model, bisect_right(self._changes, at)  # between two changes all stays as it is
        if known not in self._known:
            if len(self._known) >= 1000:  # clients choose the names
                self._known.clear()
            self._known[known] = self._find(model, at)
        return self._known[known]

    def _find(self, model: str, at: int) -> ModelPrices | None:
        return next(
            filter(None, (self.own_tariff(each, at) for each in self.matching(model))), None
        )

    def matching(self, model: str) -> Iterator[str]:
        """The names and patterns of prices that mean a model, the most specific first. A pattern
        means itself, too, and what all models that it means have in common."""
        if model in self._named:
            yield model
        for pattern in self._patterns:
            if pattern != model and matcher(pattern)(model):
                yield pattern

    def own_tariff(self, pattern: str, at: int) -> ModelPrices | None:
        """The prices in force for exactly this name or pattern, None without one of the default
        tier: without that, the others don't count."""
        if at < self._since.get(pattern, NEVER):
            return None
        prices = self._named[pattern]
        return ModelPrices(latest(price for price in prices if price.effective_at <= at).values())

    def tariffs(self, at: int) -> list[ModelPrices]:
        """Return the prices in force at a time, one tariff for each name or pattern."""
        now = bisect_right(self._changes, at)
        if now not in self._in_force:
            own = (self.own_tariff(each, at) for each in self._names)
            self._in_force = {now: [each for each in own if each]}
        return self._in_force[now]

    def before(self, new: Price, others: Iterable[Price]) -> Price | None:
        """The price that a new one supersedes when it takes effect, given others that are added
        with it: that of its slot, or the one that applies to its name or pattern without it."""
        of_slot = (*self._slots.get(new.slot, []), *others)
        old = latest(p for p in of_slot if p.effective_at <= new.effective_at).get(new.slot)
        if old is None:
            tariff = self.tariff(new.model, new.effective_at)
            old = tariff.price(new.tier, new.above_input_tokens + 1) if tariff else None
        return old

    def shadowing(self, pattern: str, at: int) -> list[str]:
        """The more specific names and patterns whose prices are in force instead of those of this
        pattern for models that it means."""
        if not is_pattern(pattern):
            return []
        prefix = LITERAL.match(pattern)
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
        """Whether that is what its slot costs then, anyway, with these others of it."""
        of_slot = (*self._slots.get(new.slot, []), *others)
        old = latest(p for p in of_slot if p.effective_at <= new.effective_at).get(new.slot)
        return old is not None and (old.rates, old.limits) == (new.rates, new.limits)

    def rows(self, now: int) -> Iterator[PriceShown]:
        """All of them as JSON shows them, by model, tier, threshold and time."""
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
            effective_at=shown_time(price.effective_at),
            **{name: shown_amount(getattr(price, name)) for name in RATES},
            max_output_tokens=price.max_output_tokens,
            currency=price.currency,
            source=price.source,
            created_at=shown_time(price.created_at),
            added_by=price.added_by,
            reason=price.reason,
            id=price.id,
            status="coming" if price.effective_at > now else "past" if superseded else "current",
            shadowed_by=[] if superseded else shadowed_by,
        )

    def _superseded_at(self, price: Price) -> int:
        """When the next price of its slot takes effect."""
        following = self.following(price)
        return following.effective_at if following else NEVER

    def following(self, price: Price) -> Price | None:
        """Return the price that supersedes this one in its slot, or None."""
        of_slot = self._slots[price.slot]
        place = bisect_right(of_slot, order(price), key=order)
        return of_slot[place] if place < len(of_slot) else None

    def applies(self, price: Price, model: str, at: int) -> str | None:
        """Return why a price does not apply to a model that its pattern means, or None if it does,
        to requests of its tier and so much input."""
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
        """Return the price of a request at a time, and all others whose patterns mean its model,
        each with the reason why it does not apply."""
        prices = self.tariff(model, at)
        applied = prices.price(tier, input_tokens) if prices else None
        others = []
        for pattern in self.matching(model):
            shadowed_by = self.shadowing(pattern, at)
            for price in self._named[pattern]:
                if price is not applied:
                    because = self.applies(price, model, at) or unlike(price, applied, tier)
                    shown = asdict(self._shown(price, at, shadowed_by))
                    others.append(OtherPrice(**shown, because=because))
        return applied, others

    def shown(self, price: Price, now: int) -> PriceShown:
        """Return a price as JSON shows it."""
        return self._shown(price, now, self.shadowing(price.model, now))


def unlike(price: Price, applied: Price | None, tier: str) -> str:
    """Why a price of the right pattern is not the one for a request: by its tier or threshold."""
    assert applied is not None, "this one has a price of the default tier beside it"
    if price.tier != applied.tier:
        more = f", and {tier!r} has its own price" if price.tier == DEFAULT_TIER else ""
        return f"it is for the tier {price.tier!r}{more}"
    if price.above_input_tokens > applied.above_input_tokens:
        return f"it applies above {price.above_input_tokens} input tokens"
    return f"another price applies above {applied.above_input_tokens} input tokens"


MAX_MATCHERS = 10_000


@functools.lru_cache(MAX_MATCHERS)
def matcher(pattern: str) -> Callable[[str], object]:
    """Return what tells whether a pattern means a model. (fnmatch itself remembers too few.)"""
    return re.compile(fnmatch.translate(pattern)).match


def specificity(pattern: str) -> tuple[bool, int, int, str]:
    """Sorts patterns, the most specific first: names, then those with most of a name in them."""
    literal, ones = ONE_CHARACTER.subn("", pattern.replace("*", ""))
    return literal != pattern, -len(literal), -ones, pattern


def is_pattern(model: str) -> bool:
    """Whether it may mean others than itself."""
    return not set(model).isdisjoint("*?[")


def order(price: Price) -> tuple[int, int]:
    """Sorts the prices of a slot: each supersedes the one before."""
    return price.effective_at, price.id


def latest(prices: Iterable[Price]) -> dict[tuple[str, str, int], Price]:
    """Of each slot the price that supersedes the others."""
    ordered = sorted(prices, key=order)
    return {price.slot: price for price in ordered}


def rises(before: ModelPrices | None, after: ModelPrices | None, free: bool) -> list[str]:
    """What costs more after than before, such as 'input 5 to 6', for each tier and threshold.
    `free`: what has no rate was free; else it was refused, and its first rate is no rise."""
    if before is None or after is None:
        return []
    prices = [price for tariff in (before, after) for of in tariff.tiers.values() for price in of]
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
                if free or name not in NEEDED or getattr(old, name) is not None
            ]
            where = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
            if risen:
                found.append(", ".join(risen) + f" ({', '.join(where)})" * bool(where))
    return found


def unit_of(rate: str) -> str:
    """Return the unit of a rate, such as " per call"; "" for a rate per million tokens."""
    return f" per {UNITS[rate]}" if rate in UNITS else ""
