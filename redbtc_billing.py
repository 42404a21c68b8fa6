"""Billing: what requests cost, who may spend how much, and the account given of it.

Rule 1. What has been billed is never worked out again. A settled row holds its cost and the price
it came from; prices, payments and settled rows are only ever added (schema.sql has triggers against
anything else), and their sums by day are kept in the transaction that adds them.

Rule 2. Nobody overspends by being quick. Before a request leaves, the most that it can cost is held
on its account and its key; check and hold are one step on the event loop, with nothing in between.
Holds live in memory alone, so none outlives its request or the process.

Rule 3. What an account has paid and spent is read from the database once, before its first request
is settled by this process, and kept along from then on: what waits for the next commit is spent
already. Payments are read again after each change, so that none counts twice.
"""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import re
import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

import redbtc_ledger as ledger
from redbtc_ledger import Key, Objects, Record
from redbtc_rows import Part, Usage
from redbtc_settings import (
    NANOS,
    UNLIMITED,
    Billing,
    Conflict,
    LedgerError,
    LedgerUnavailable,
    NotFound,
    decimal,
    iso_time,
    money,
    month_of,
    parse_limit,
)
from redbtc_slices import with_turns
from redbtc_spill import Change
from redbtc_store import Store

DAY = 86_400_000  # milliseconds
MINUTE = 60_000

# ── Prices ───────────────────────────────────────────────────────────────────────────────────────
# A price is for a pattern of models, a service tier, and requests above some number of input
# tokens. Of all patterns that match a model the most specific has the say, alone. The tier is the
# one that the response reports; one without a price of its own is billed as the default tier.

DEFAULT_TIER = "default"
TIER_NAMES = {"fast": "priority"}  # as requests name them, and the responses to those
KNOWN_TIERS = ("default", "flex", "scale", "priority", "fast", "ultrafast")  # of OpenAI's API
MILLION = 1_000_000
MOST_PAID = 10**17 * NANOS  # by an account: sums of it fit into an INTEGER of units
MOST_RATE = 10_000_000 * NANOS  # for a million tokens
MOST_CALL_RATE = 10_000 * NANOS
MAX_COST = (1 << 63) - 1  # nanos of one request, and of what is held for it: an INTEGER of SQLite
IN_USE = 90 * DAY  # a model that somebody asked for within this time is in use
NEVER = 1 << 62  # milliseconds
LITERAL = re.compile(r"[^*?\[]*+")  # what all names begin with that a pattern means
LAST_CHARACTER = "\U0010ffff"
ONE_CHARACTER = re.compile(r"\[[^\]]+\]|\?")  # what stands in a pattern for exactly one


class Rates(NamedTuple):
    """Nanos for a million tokens, or for one of what UNITS names."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_12h: int = 0
    output: int = 0
    image_input: int = 0
    image_output: int = 0
    web_search: int = 0
    file_search: int = 0
    container: int = 0


# What a rate is for, where it is not for a million tokens.
UNITS = {"web_search": "call", "file_search": "call", "container": "container"}
# What a request can ask for only where its model's price has the rate, unless it is free.
NEEDED = {
    "file_search": "uses the file search tool",
    "container": "uses a tool that creates a container",
    "cache_write_12h": "keeps its prompt in the cache for longer than 30 minutes",
}


class Price(Struct, frozen=True, dict=True):
    """A row of the table of prices; schema.sql explains each field. A rate of None was not
    given."""

    model: str
    tier: str = DEFAULT_TIER
    above_input_tokens: int = 0
    effective_at: int = 0
    input: int | None = None
    cached_input: int | None = None
    cache_write: int | None = None
    cache_write_12h: int | None = None
    output: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    web_search: int | None = None
    file_search: int | None = None
    container: int | None = None
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
    def rates(self) -> Rates:
        """All rates. What was not given: text in all its kinds and pictures cost as much as other
        input, pictures as much as other output, cache writes for 12 hours as much as others."""
        into, out = self.input or 0, self.output or 0
        write = into if self.cache_write is None else self.cache_write
        return Rates(
            input=into,
            cached_input=into if self.cached_input is None else self.cached_input,
            cache_write=write,
            cache_write_12h=write if self.cache_write_12h is None else self.cache_write_12h,
            output=out,
            image_input=into if self.image_input is None else self.image_input,
            image_output=out if self.image_output is None else self.image_output,
            web_search=self.web_search or 0,
            file_search=self.file_search or 0,
            container=self.container or 0,
        )

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
        values = {name: getattr(self, name) for name in (*Rates._fields, "max_output_tokens")}
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, usage: Usage, images: bool) -> int:
        """Nanos of what was used, rounded half up: the only rounding there is. `images`: of an
        image endpoint, whose image tokens are parts of its input and output; elsewhere they are
        those of a tool and come on top."""
        rates = self.rates
        cached, written = usage.cached_input_tokens or 0, usage.cache_write_tokens or 0
        kept = min(written, usage.cache_write_12h_tokens or 0)
        image_in, image_out = usage.image_input_tokens or 0, usage.image_output_tokens or 0
        text_in = (usage.input_tokens or 0) - cached - written - (image_in if images else 0)
        text_out = (usage.output_tokens or 0) - (image_out if images else 0)
        millionths = (
            max(0, text_in) * rates.input
            + cached * rates.cached_input
            + (written - kept) * rates.cache_write
            + kept * rates.cache_write_12h
            + max(0, text_out) * rates.output
            + image_in * rates.image_input
            + image_out * rates.image_output
        )
        calls = (
            (usage.web_searches or 0) * rates.web_search
            + (usage.file_searches or 0) * rates.file_search
            + (usage.containers or 0) * rates.container
        )
        return (millionths + MILLION // 2) // MILLION + calls

    def most(
        self, input_tokens: int, output_tokens: int, images: bool, long_cache: bool = False
    ) -> int:
        """Nanos that so much can cost at most, whatever kind of tokens they turn out to be.
        `long_cache`: the request can write to the cache for 12 hours."""
        rates = self.rates
        into, out = max(rates.input, rates.cached_input, rates.cache_write), rates.output
        if long_cache:
            into = max(into, rates.cache_write_12h)
        if images:
            into, out = max(into, rates.image_input), max(out, rates.image_output)
        return -(-(input_tokens * into + output_tokens * out) // MILLION)

    def dearest_call(self, extras: int) -> int:
        """Return the nanos of the dearest of these extras (bits of EXTRAS) that are billed by the
        call."""
        calls = (name for name in UNITS if ledger.EXTRAS[name] & extras)
        return max((getattr(self.rates, name) for name in calls), default=0)


class Tariff:
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


class PriceList:
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
        self._known: dict[tuple[str, int], Tariff | None] = {}
        self._in_force: dict[int, list[Tariff]] = {}

    def tariff(self, model: str, at: int) -> Tariff | None:
        """The prices in force for a model at a time, or None: it has none."""
        known = model, bisect_right(self._changes, at)  # between two changes all stays as it is
        if known not in self._known:
            if len(self._known) >= 1000:  # clients choose the names
                self._known.clear()
            self._known[known] = self._find(model, at)
        return self._known[known]

    def _find(self, model: str, at: int) -> Tariff | None:
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

    def own_tariff(self, pattern: str, at: int) -> Tariff | None:
        """The prices in force for exactly this name or pattern, None without one of the default
        tier: without that, the others don't count."""
        if at < self._since.get(pattern, NEVER):
            return None
        prices = self._named[pattern]
        return Tariff(latest(price for price in prices if price.effective_at <= at).values())

    def tariffs(self, at: int) -> list[Tariff]:
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

    def rows(self, now: int) -> Iterator[Record]:
        """All of them as JSON shows them, by model, tier, threshold and time."""
        shadowing: dict[tuple[str, int], list[str]] = {}
        for price in self.prices:
            about = price.model, max(now, price.effective_at)
            if about not in shadowing:
                shadowing[about] = self.shadowing(*about)
            yield self._shown(price, now, shadowing[about])

    def _shown(self, price: Price, now: int, shadowed_by: list[str]) -> Record:
        row = msgspec.structs.asdict(price)
        for rate in Rates._fields:
            row[rate] = None if row[rate] is None else decimal(row[rate])
        for name in ("effective_at", "created_at"):
            row[name] = iso_time(row[name])
        superseded = self._superseded_at(price) <= now
        status = "coming" if price.effective_at > now else "past" if superseded else "current"
        return {**row, "status": status, "shadowed_by": [] if superseded else shadowed_by}

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
            return f"a later price superseded it at {iso_time(superseded_at)}"
        if at < self._since.get(price.model, NEVER):
            return (
                f"{price.model!r} has no price for the tier {DEFAULT_TIER!r} and any number of "
                "input tokens, without which its other prices don't count"
            )
        chosen = next(each for each in self.matching(model) if at >= self._since.get(each, NEVER))
        return None if chosen == price.model else f"the price of {chosen!r} is more specific"

    def which(self, model: str, at: int, tier: str, input_tokens: int) -> Record:
        """Return the price of a request at a time, as JSON shows it, and all others whose patterns
        mean its model, each with the reason why it does not apply."""
        tariff = self.tariff(model, at)
        applied = tariff.price(tier, input_tokens) if tariff else None
        others = []
        for pattern in self.matching(model):
            shadowed_by = self.shadowing(pattern, at)
            for price in self._named[pattern]:
                if price is not applied:
                    because = self.applies(price, model, at) or unlike(price, applied, tier)
                    others.append({**self._shown(price, at, shadowed_by), "because": because})
        return {
            "applies": applied and self._shown(applied, at, self.shadowing(applied.model, at)),
            "billed_as": applied.tier if applied else None,
            "others": others,
        }


def unlike(price: Price, applied: Price | None, tier: str) -> str:
    """Why a price of the right pattern is not the one for a request: by its tier or threshold."""
    assert applied is not None, "this one has a price of the default tier beside it"
    if price.tier != applied.tier:
        more = f", and {tier!r} has its own" if price.tier == DEFAULT_TIER else ""
        return f"it is for the tier {price.tier!r}{more}"
    if price.above_input_tokens > applied.above_input_tokens:
        return f"it is for more than {price.above_input_tokens} input tokens"
    return f"there is another price for more than {applied.above_input_tokens} input tokens"


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


def rises(before: Tariff | None, after: Tariff | None, free: bool) -> list[str]:
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
                f"{name.replace('_', ' ')} {decimal(a)} to {decimal(b)}{unit_of(name)}"
                for name, a, b in zip(Rates._fields, old.rates, new.rates, strict=True)
                if b > a and not (getattr(old, name) is None and getattr(new, name) is None)
                if free or name not in NEEDED or getattr(old, name) is not None
            ]
            where = [tier] * (tier != DEFAULT_TIER) + [f"above {above} input tokens"] * bool(above)
            if risen:
                found.append(", ".join(risen) + f" ({', '.join(where)})" * bool(where))
    return found


def unit_of(rate: str) -> str:
    """ " a call", or what else a rate is for; "" for a million tokens."""
    return f" a {UNITS[rate]}" if rate in UNITS else ""


# ── Holds ────────────────────────────────────────────────────────────────────────────────────────

# Later months than the current one are there only while the ledger's time is set back: then they
# are about to be moved into the current one.
SPENT_IN_ALL = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0),
           ifnull(sum(cost_units) FILTER (WHERE month >= ?2), 0),
           ifnull(sum(cost_nanos) FILTER (WHERE month >= ?2), 0)
      FROM usage_by_month WHERE account_id = ?1"""
SPENT_BY_KEY = """
    SELECT 0, 0, ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_day WHERE account_id = ?1 AND month >= ?2
       AND key_id IN (SELECT id FROM keys WHERE id = ?3 OR budget_id = ?3)"""
SPENT_BETWEEN = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_month WHERE account_id = ?1 AND month >= ?2 AND month < ?3"""
SPENT_BETWEEN_BY_KEY = """
    SELECT ifnull(sum(cost_units), 0), ifnull(sum(cost_nanos), 0)
      FROM usage_by_day WHERE account_id = ?1 AND month >= ?2 AND month < ?3
       AND key_id IN (SELECT id FROM keys WHERE id = ?4 OR budget_id = ?4)"""
PAID = """
    SELECT ifnull(sum(units), 0), ifnull(sum(nanos), 0) FROM payments WHERE account_id = ?"""
BUDGET_NOTICE = """
    INSERT OR IGNORE INTO notices (id, kind, account_id, key_id, month, percent, text, effective_at,
                                   created_at)
    VALUES (?, 'budget', ?, ?, ?, ?, ?, ?, ?)"""
BUDGET_PERCENTS = (50, 80, 100)


def nanos_of(units: int, nanos: int) -> int:
    """A sum of the database's two columns."""
    return units * NANOS + nanos


class Spent(LedgerError):
    """Balance or budget don't allow what the request can cost."""


class Purse:
    """What an account or a key has paid, spent and holds, in nanos. `spent` is of `month`. A key
    shares its purse with those that it replaced (`budget_id`)."""

    __slots__ = ("cost", "held", "month", "paid", "spent", "told")

    def __init__(self, month: str, cost: int, spent: int) -> None:
        self.paid = 0
        self.cost = cost
        self.held = 0
        self.month = month
        self.spent = spent
        self.told = 0  # the highest percentage of the month's budget that there is a notice of

    def turn(self, month: str) -> None:
        """It is that month now."""
        if month != self.month:
            self.month, self.spent, self.told = month, 0, 0

    def set_back(self, month: str, spent: int) -> None:
        """Go back to an earlier month, which is what this one was taken for. `spent` is what was
        spent from that month on until this one began."""
        self.month, self.told = month, 0
        self.spent += spent

    def left(self, budget: int) -> int:
        """Of the month's."""
        return budget - self.spent - self.held


class Hold:
    """What one request can cost, held on its account and its key from `with` to `settle`, or to the
    end of `with`; and the time whose prices are its. As long, other requests that build on what it
    makes are held for the tokens that it can have (`grow`)."""

    __slots__ = ("_books", "_growth", "_key", "_most", "_objects", "_purses", "at", "tariff")

    def __init__(
        self,
        books: Books,
        key: Key,
        at: int,
        tariff: Tariff | None,
        purses: tuple[Purse, Purse],
        most: int,
    ) -> None:
        self.at = at
        self.tariff = tariff
        self._books = books
        self._key = key
        self._purses = purses
        self._most = most
        self._objects: Objects | None = None
        self._growth: dict[str, int] = {}
        for purse in purses:
            purse.held += most

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        if self._most:
            for purse in self._purses:
                purse.held -= self._most
            self._most = 0
        if self._objects:
            self._objects.stop_growing(self._growth)
            self._objects, self._growth = None, {}

    def grow(self, objects: Objects, ids: Iterable[str], tokens: int) -> None:
        """Note that each of these objects can get so many tokens from the request. Where nothing is
        held, because nothing limits spending, nobody needs to know."""
        if self._most:
            growth = {each: tokens for each in ids if each not in self._growth}
            objects.grow(growth)
            self._objects = objects
            self._growth.update(growth)

    def keep(self) -> Hold:
        """The same, beyond the end of `with`."""
        kept = self.again(self._most)
        kept._objects, kept._growth = self._objects, self._growth
        self._objects, self._growth = None, {}
        self.__exit__()
        return kept

    def again(self, most: int) -> Hold:
        """Hold so much on the same account and key."""
        return Hold(self._books, self._key, self.at, self.tariff, self._purses, most)

    @property
    def held(self) -> int:
        """Nanos."""
        return self._most

    def cost(self, parts: Iterable[Part], tier: str | None) -> tuple[int | None, int]:
        """What these have cost together: the price's id of the first, and nanos, at most MAX_COST.
        A part of another model has that one's price, if it has any."""
        price_id, cost = None, 0
        for number, (model, usage, images) in enumerate(parts):
            tariff = self._books.prices.tariff(model, self.at) if model else None
            of_tier = tier if tariff is None else None
            if tariff := tariff or self.tariff:
                price = tariff.price(of_tier, usage.input_tokens or 0)
                price_id = price_id if number else price.id
                cost += price.cost(usage, images)
        return price_id, min(cost, MAX_COST)

    def settle(self, cost: int) -> str:
        """It has cost so much. Returns the month on whose statement that is."""
        self.__exit__()
        month, key = self._books.month(), self._key
        for purse in self._purses:
            purse.turn(month)
            purse.cost += cost
            purse.spent += cost
        account, own = self._purses
        if key.account_monthly_budget:
            self._books.tell_of_budget(key, account, key.account_monthly_budget, None)
        if key.monthly_budget:
            self._books.tell_of_budget(key, own, key.monthly_budget, key.budget_id)
        return month


# ── Books ────────────────────────────────────────────────────────────────────────────────────────

PRICES = f"SELECT {', '.join(Price.__struct_fields__)} FROM prices ORDER BY id"
ADD_PRICE = f"""
    INSERT INTO prices ({", ".join(Price.__struct_fields__)})
    VALUES ({", ".join("?" * len(Price.__struct_fields__))})"""
MODELS_USED = """
    SELECT DISTINCT requested_model FROM usage_by_day WHERE day >= ?
    UNION SELECT requested_model FROM requests WHERE outcome = 'pending'"""
ADD_NOTICE = """
    INSERT INTO notices (id, kind, text, effective_at, until, created_at, added_by,
                         refuses_requests)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
NOTICE = """
    SELECT notices.id, kind, accounts.name AS account, key_id, month, percent, text, effective_at,
           until, refuses_requests, notices.created_at, added_by, withdrawn_at, delivered_at
      FROM notices LEFT JOIN accounts ON accounts.id = account_id"""
NOTICES = NOTICE + " ORDER BY effective_at, notices.created_at, notices.rowid"
NOTICE_BY_ID = NOTICE + " WHERE notices.id = ?"
NOTICES_NOW = f"""{NOTICE}
     WHERE (account_id IS NULL OR account_id = ?1) AND withdrawn_at IS NULL
       AND ifnull(until, ?2 + 1) > ?2 ORDER BY effective_at, notices.created_at, notices.rowid"""
UNDELIVERED = f"""{NOTICE}
     WHERE kind = 'budget' AND delivered_at IS NULL AND notices.created_at > ?
     ORDER BY notices.created_at, notices.rowid"""
DELIVERED = "UPDATE notices SET delivered_at = ? WHERE id = ?"
MAINTENANCES = f"""
    SELECT effective_at, ifnull(until, {1 << 62}), text FROM notices
     WHERE refuses_requests AND withdrawn_at IS NULL AND ifnull(until, ?1 + 1) > ?1"""
WITHDRAW = "UPDATE notices SET withdrawn_at = ifnull(withdrawn_at, ?) WHERE id = ?"
PAYMENT = """
    SELECT payments.id, accounts.name AS account, units, nanos, currency, reference, reason, month,
           payments.created_at, added_by
      FROM payments JOIN accounts ON accounts.id = account_id"""
PAYMENTS = PAYMENT + " ORDER BY payments.created_at, payments.rowid"
PAYMENTS_OF = PAYMENT + " WHERE account_id = ? ORDER BY payments.created_at, payments.rowid"
PAYMENT_BY_ID = PAYMENT + " WHERE payments.id = ?"
PAYMENT_BY_REFERENCE = PAYMENT + " WHERE account_id = ? AND reference = ?"
ADD_PAYMENT = """
    INSERT INTO payments (id, account_id, units, nanos, currency, reference, reason, month,
                          created_at, added_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
NOTICE_TEXT = 4000  # characters


def shown_payment(row: sqlite3.Row) -> Record:
    """A payment as JSON shows it."""
    record = ledger.shown(row)
    record["amount"] = decimal(nanos_of(record.pop("units"), record.pop("nanos")))
    return record


def for_account(record: Record, *more: str) -> Record:
    """Without what only operators are shown, and without `more`."""
    hidden = ("added_by", "delivered_at", "withdrawn_at", *more)
    return {name: value for name, value in record.items() if name not in hidden}


class Maintenance(NamedTuple):
    """While it lasts (milliseconds), new requests are refused."""

    since: int
    until: int
    text: str


class Books:
    """The money of one gateway: shared by what serves requests and what people use."""

    def __init__(self, store: Store, settings: Billing) -> None:
        """`settings` may be replaced by others of the same currency."""
        self.store = store
        self.settings = settings
        self.currency = settings.currency
        self.prices = PriceList()
        self.noticed = asyncio.Event()  # there is something for the webhook
        self._maintenances: list[Maintenance] = []
        self._purses: dict[tuple[str, str | None], Purse] = {}  # by account and budget
        self.changing_prices = asyncio.Lock()

    @classmethod
    async def open(cls, store: Store, settings: Billing) -> Books:
        """Raises LedgerError where the ledger's amounts are in another currency."""
        books = cls(store, settings)
        async for (currency,) in store.rows(ledger.CURRENCIES):
            if currency != books.currency:
                raise LedgerError(
                    f"billing.currency is {books.currency}, but the ledger is in {currency}"
                )
        books.prices = PriceList([Price(**dict(row)) async for row in store.rows(PRICES)])
        await books.read_maintenances()
        return books

    def month(self) -> str:
        """The one that it is for the ledger."""
        return month_of(self.store.time())

    # What a request can cost, and did

    def tariff(self, model: str) -> Tariff | None:
        """Its prices now."""
        return self.prices.tariff(model, self.store.time())

    def tariffs(self) -> list[Tariff]:
        """Return the prices in force now, one tariff for each name or pattern."""
        return self.prices.tariffs(self.store.time())

    def served(self, model: str) -> bool:
        """Whether it may be served: without a price only where that is free."""
        return self.settings.unpriced_models == "free" or self.tariff(model) is not None

    def lacks(self, model: str, rate: str, tier: str | None) -> Price | None:
        """Return a price without a rate of NEEDED that a request can get; None where all have it,
        or what has no price is free."""
        tariff = self.tariff(model)
        free = self.settings.unpriced_models == "free"
        return None if free or tariff is None else tariff.lacks(rate, tier)

    async def purse(self, account_id: str, budget_id: str | None = None) -> Purse:
        """Return the purse of an account, or of one of its keys. Raises LedgerUnavailable."""
        purse = await self._purse(account_id, budget_id)
        purse.turn(self.month())
        return purse

    async def _purse(self, account_id: str, budget_id: str | None) -> Purse:
        name = account_id, budget_id
        while name not in self._purses:
            month = self.month()
            sql, values = (
                (SPENT_BY_KEY, (account_id, month, budget_id))
                if budget_id
                else (SPENT_IN_ALL, (account_id, month))
            )
            try:
                found = await self.store.one(sql, values) or (0, 0, 0, 0)
            except sqlite3.Error as error:
                raise LedgerUnavailable(f"can't be read: {error}") from None
            # Nothing was settled meanwhile: that needs the purse.
            purse = Purse(month, nanos_of(*found[:2]), nanos_of(*found[2:]))
            purse.paid = 0 if budget_id else self._paid(account_id)
            if month <= self.month():  # else the time was set back meanwhile
                self._purses.setdefault(name, purse)
        return self._purses[name]

    def set_back(self, at: int) -> None:
        """Go on from an earlier time: count as spent in its month what is dated later, and let
        prices that took effect later have done so then. All that was settled in the months between
        must be committed, and `changing_prices` be held. Raises LedgerUnavailable."""
        month = month_of(at)
        later = [each for each in self._purses.items() if each[1].month > month]
        between = [self._spent_between(*name, month, purse.month) for name, purse in later]
        for (_, purse), spent in zip(later, between, strict=True):
            purse.set_back(month, spent)
        self.prices = PriceList([price.set_back(at) for price in self.prices.prices])
        self.store.clock.set_back(at)

    def _spent_between(self, account_id: str, budget_id: str | None, since: str, until: str) -> int:
        values = (account_id, since, until)
        found = (
            self.store.look_up(SPENT_BETWEEN_BY_KEY, (*values, budget_id))
            if budget_id
            else self.store.look_up(SPENT_BETWEEN, values)
        )
        return nanos_of(*(found or (0, 0)))

    def _paid(self, account_id: str) -> int:
        return nanos_of(*(self.store.look_up(PAID, (account_id,)) or (0, 0)))

    def credit_limit(self, own: int | None) -> int:
        """An account's own, else the settings'; in nanos, or UNLIMITED."""
        return parse_limit(self.settings.default_credit_limit) if own is None else own

    async def hold(self, key: Key, model: str, most: Callable[[Tariff | None], int]) -> Hold:
        """Hold the most that a request can cost, if a balance or budget limits spending. `most`
        returns that in nanos, given the prices in force, or None for a model without a price.
        Raises Spent, LedgerUnavailable."""
        account, own = await self._purses_of(key)
        now = self.store.time()  # from here on nothing is waited for
        month, tariff = month_of(now), self.prices.tariff(model, now)
        account.turn(month)
        own.turn(month)
        held = 0
        left = self._left(key, account, own)
        if left:
            held = min(most(tariff), MAX_COST)
            for what, amount in left:
                if 0 < held > amount:
                    raise Spent(
                        f"This request can cost up to {decimal(held)} {self.currency}, "
                        f"and of {what} {decimal(amount)} is left."
                    )
        return Hold(self, key, now, tariff, (account, own), held)

    async def hold_again(self, key: Key, model: str, at: int, held: int) -> Hold:
        """What an earlier process held at that time. Raises LedgerUnavailable."""
        purses = await self._purses_of(key)
        return Hold(self, key, at, self.prices.tariff(model, at), purses, held)

    async def _purses_of(self, key: Key) -> tuple[Purse, Purse]:
        account = await self._purse(key.account_id, None)
        return account, await self._purse(key.account_id, key.budget_id)

    def _left(self, key: Key, account: Purse, own: Purse) -> list[tuple[str, int]]:
        """Of what limits spending, how much is left; empty where nothing does."""
        left = []
        credit = self.credit_limit(key.credit_limit)
        if credit != UNLIMITED:
            balance = account.paid - account.cost + credit - account.held
            left.append(("the account's balance", balance))
        if key.account_monthly_budget is not None:
            budget = account.left(key.account_monthly_budget)
            left.append(("the account's monthly budget", budget))
        if key.monthly_budget is not None:
            left.append(("the key's monthly budget", own.left(key.monthly_budget)))
        return left

    def _money(self, nanos: int) -> str:
        return money(decimal(nanos), self.currency)

    def tell_of_budget(self, key: Key, purse: Purse, budget: int, budget_id: str | None) -> None:
        """Write a notice for each percentage of a budget that is reached and was not before.
        `budget_id` is None for the account's; the notice names it, so that keys which replaced one
        another are told once."""
        for percent in BUDGET_PERCENTS:
            if percent > purse.told and purse.spent * 100 >= budget * percent:
                purse.told = percent
                whose = "monthly budget"
                if budget_id:
                    whose += f" of key {key.id}"
                if budget_id not in (None, key.id):
                    whose += " and the keys that it replaced"
                text = (
                    f"{percent} % of the {whose} is spent: {self._money(purse.spent)} of "
                    f"{self._money(budget)} {self.currency} in {purse.month}."
                )
                now = self.store.time()
                values = (key.account_id, budget_id, purse.month, percent, text, now, now)
                written = self.store.record(
                    BUDGET_NOTICE, (ledger.new_id("ntc"), *values), insist=True
                )
                written.add_done_callback(lambda _: self.noticed.set())

    # Prices

    async def add_prices(
        self,
        prices: Sequence[Price],
        *,
        without_notice: str | None,
        by: str,
        take_over: bool = False,
        listed: Collection[str] = (),
    ) -> Record:
        """Add them all or none; what is so anyway is left out. `effective_at` of 0 is now. With
        `take_over`, rates that were not given are those of the price that was in force before.
        `listed` are models that the answer should say something about beside those that have prices
        or are in use. Raises LedgerError for a price that would change what has been used, and for
        a rise without the notice that is due, unless `without_notice` says why."""
        async with self.changing_prices:
            now = self.store.time()
            numbers = count(max((price.id for price in self.prices.prices), default=0) + 1)
            given = [
                msgspec.structs.replace(
                    price,
                    id=next(numbers),
                    effective_at=price.effective_at or now,
                    currency=self.currency,
                    created_at=now,
                    added_by=by,
                    reason=without_notice,
                )
                for price in prices
            ]
            _refuse_twice(given)
            new, left_out = self._new(given, take_over)
            after = PriceList([*self.prices.prices, *new])
            notices = await self._notices_of_rises(new, after, now, without_notice)
            changes: list[Change] = [(ADD_PRICE, msgspec.structs.astuple(price)) for price in new]
            changes += [(ADD_NOTICE, (ledger.new_id("ntc"), *each, now, by, 0)) for each in notices]
            if changes:
                await self.store.transact(*changes, by=by)
            self.prices = after
        added = {price.id for price in new}
        rows = [row async for row in with_turns(after.rows(now)) if row["id"] in added]
        return {
            "prices": rows,
            "added": len(new),
            "unchanged": len(prices) - len(new),
            **await self._reach(new, after, now, listed),
            "taken_over" if take_over else "left_out": left_out,
            "followed_by": [
                shown_following(following)
                for following in map(after.following, new)
                if following and following.id not in added and following.effective_at > now
            ],
            "notices": [{"text": text, "effective_at": iso_time(at)} for _, text, at, _ in notices],
        }

    def _new(self, given: Sequence[Price], take_over: bool) -> tuple[list[Price], list[Record]]:
        """Return the prices that change something, and what the ones before them gave and they
        don't."""
        kept: dict[tuple[str, str, int], list[Price]] = {}
        left_out = []
        for price in sorted(given, key=lambda price: price.effective_at):
            of_slot = kept.setdefault(price.slot, [])
            old = self.prices.before(price, of_slot)
            rest = {} if old is None else {**old.given}
            missing = {name: value for name, value in rest.items() if name not in price.given}
            if take_over:
                price = msgspec.structs.replace(price, **missing)
            if self.prices.has(price, of_slot):
                continue
            of_slot.append(price)
            if old and missing and (take_over or old.slot == price.slot):
                left_out.append(shown_missing(price, old, missing))
        return sorted(chain(*kept.values()), key=lambda price: price.id), left_out

    async def _reach(
        self, new: Sequence[Price], after: PriceList, now: int, listed: Collection[str]
    ) -> Record:
        """Return the known models that new prices apply to once they take effect, and those that
        they mean and do not apply to, with the reason. Other prices' patterns stand for models."""
        by_pattern: dict[str, list[Price]] = {}
        for price in new:
            by_pattern.setdefault(price.model, []).append(price)
        known = {price.model for price in after.prices}
        known |= {*listed, *await self._models_used(now - IN_USE)}
        models = sorted(await matching(known, {*by_pattern}))
        applies, others = [], []
        async for model in with_turns(models):
            reasons = [
                after.applies(price, model, max(now, price.effective_at))
                for pattern, prices in by_pattern.items()
                if matches(model, (pattern,))
                for price in prices
            ]
            if None in reasons:
                applies += [model] * (not is_pattern(model) or model not in by_pattern)
            else:
                others.append({"model": model, "because": reasons[0]})
        return {"applies_to": applies, "does_not_apply_to": others}

    async def _notices_of_rises(
        self,
        new: Sequence[Price],
        after: PriceList,
        now: int,
        without_notice: str | None,
    ) -> list[tuple[str, str, int, int]]:
        """The notices to write: kind, text, from when on, and until when. Raises LedgerError as
        `add_prices` does."""
        patterns = {price.model for price in new}
        earliest = min((price.effective_at for price in new), default=now)
        if earliest < now:
            await self._refuse_the_past([price for price in new if price.effective_at < now])
        known = {price.model for price in after.prices}
        used = await matching(await self._models_used(now - IN_USE), patterns)
        priced = await matching(known, patterns)
        models = sorted(patterns | used | priced, key=specificity)
        about = {*models, *await matched(known, models)}
        times = {price.effective_at for price in after.prices if price.model in about}
        settings = self.settings
        due = now + settings.price_notice_days * DAY - MINUTE
        free = settings.unpriced_models == "free"
        notices: list[tuple[str, str, int, int]] = []
        told: dict[str, str] = {}  # that a rise goes on is not told again
        for at in sorted(time for time in times if time >= earliest):
            lines: dict[str, str] = {}
            async for model in with_turns(models):
                before = self.prices.tariff(model, at)
                if before is None and model in used and free:
                    before = FREE
                risen = rises(before, after.tariff(model, at), free)
                if risen and model in used and at < due and without_notice is None:
                    raise LedgerError(
                        f"{model} is in use and would cost more from {iso_time(at)}: "
                        f"{'; '.join(risen)}. A rise needs {settings.price_notice_days} days of "
                        "notice (billing.price_notice_days), or a reason to come without"
                    )
                if risen:  # what somebody has asked for is nobody else's to read
                    named = [model] if model in priced | patterns else patterns
                    name = min((each for each in named if matches(model, {each})), key=specificity)
                    lines.setdefault(name, f"{name}: {'; '.join(risen)}")
            news = [line for name, line in lines.items() if told.get(name) != line]
            told = lines
            texts: list[str] = []
            for line in news:
                if texts and len(texts[-1]) + len(line) + 3 <= NOTICE_TEXT:
                    texts[-1] += f" {line}."
                else:
                    texts.append(f"Prices rise ({self.currency} per million tokens). {line}.")
            until = max(at, now) + settings.price_notice_days * DAY
            notices += [("price", text[:NOTICE_TEXT], at, until) for text in texts]
        return notices

    def which(self, model: str, at: int, tier: str, input_tokens: int) -> Record:
        """Return which price applies to a request, and why, as JSON shows it."""
        tier = TIER_NAMES.get(tier, tier)
        found = self.prices.which(model, at, tier, input_tokens)
        billed_as = found.pop("billed_as")
        why = "Of the names and patterns in force that mean the model, it is the most specific."
        if billed_as is None:
            free = self.settings.unpriced_models == "free"
            then = "are free" if free else "are refused"
            why = f"No price in force means the model: requests for it {then} "
            why += "(billing.unpriced_models)."
        elif billed_as != tier:
            why += f" It has no price for the tier {tier!r}, so {billed_as!r} counts."
        asked = {"model": model, "at": iso_time(at), "tier": tier, "input_tokens": input_tokens}
        return {**asked, "why": why, **found}

    async def _models_used(self, since: int) -> set[str]:
        return {row[0] async for row in self.store.rows(MODELS_USED, (since // DAY,))}

    async def _refuse_the_past(self, prices: Iterable[Price]) -> None:
        """What was used has been billed: no price may say later that it cost something else."""
        for price in prices:
            for model in await self._models_used(price.effective_at):
                if matches(model, {price.model}):
                    raise LedgerError(
                        f"{model} has been used since {iso_time(price.effective_at)}: its price "
                        "then can't be changed any more; let it take effect now or later"
                    )

    # Payments

    async def pay(
        self,
        account: Record,
        amount: int,
        *,
        reference: str | None,
        reason: str | None,
        by: str,
    ) -> Record:
        """Write down a payment, once for each reference of an account; a refund is negative and
        needs a reason. Raises Conflict where the reference was another amount's."""
        if amount == 0:
            raise LedgerError("a payment of 0 is none")
        if amount < 0 and not reason:
            raise LedgerError("a refund or correction (a negative amount) needs a reason")
        purse, payment = await self.purse(account["id"]), ledger.new_id("pay")
        if abs(purse.paid + amount) > MOST_PAID or abs(amount) > MOST_PAID:
            raise LedgerError(f"an account's payments come to {decimal(MOST_PAID)} at most")
        now = self.store.time()
        values = (payment, account["id"], *divmod(amount, NANOS), self.currency, reference, reason)
        try:
            await self.store.transact((ADD_PAYMENT, (*values, month_of(now), now, by)), by=by)
        except sqlite3.IntegrityError:
            same = await self.store.one(PAYMENT_BY_REFERENCE, (account["id"], reference))
            if same is None:
                raise
            known = shown_payment(same)
            if known["amount"] != decimal(amount):
                raise Conflict(
                    f"there is a payment {reference!r} of {known['amount']} already"
                ) from None
            return known
        finally:
            purse.paid = self._paid(account["id"])
        added = await self.store.one(PAYMENT_BY_ID, (payment,))
        assert added is not None, "payments stay"
        return shown_payment(added)

    async def payments(self, account: Record | None) -> list[Record]:
        """All, or an account's, oldest first."""
        sql, values = (PAYMENTS_OF, (account["id"],)) if account else (PAYMENTS, ())
        return [shown_payment(row) async for row in self.store.rows(sql, values)]

    async def balance(
        self, account_id: str, credit_limit: str | None, budget: str | None
    ) -> Record:
        """An account's money now, as JSON shows it; its limits as `ledger.shown` gives them."""
        purse = await self.purse(account_id)
        limit = self.credit_limit(None if credit_limit is None else parse_limit(credit_limit))
        balance = purse.paid - purse.cost
        left = None if limit == UNLIMITED else balance + limit - purse.held
        return {
            "balance": decimal(balance),
            "held": decimal(purse.held),
            "credit_limit": "unlimited" if limit == UNLIMITED else decimal(limit),
            "available": None if left is None else decimal(left),
            "month": purse.month,
            "spent_this_month": decimal(purse.spent),
            "monthly_budget": budget,
            "currency": self.currency,
        }

    async def budgets(self, key: Key) -> dict[str, Record]:
        """The monthly budgets of a key and of its account, as JSON shows them."""
        account = await self.purse(key.account_id)
        own = await self.purse(key.account_id, key.budget_id)
        pairs = {"key": (own, key.monthly_budget), "account": (account, key.account_monthly_budget)}
        return {
            whose: {
                "limit": None if budget is None else decimal(budget),
                "spent": decimal(purse.spent),
                "remaining": None if budget is None else decimal(purse.left(budget)),
            }
            for whose, (purse, budget) in pairs.items()
        }

    # Notices

    async def add_notice(
        self,
        kind: str,
        text: str,
        effective_at: int,
        until: int | None,
        by: str,
        refuses_requests: bool = False,
    ) -> Record:
        """`refuses_requests`: of a maintenance, while which the gateway takes no new ones. Raises
        LedgerError where new terms would hold before the notice that is due."""
        now, days = self.store.time(), self.settings.terms_notice_days
        if kind == "terms" and effective_at < now + days * DAY - MINUTE:
            raise LedgerError(
                f"new terms need {days} days of notice (billing.terms_notice_days): "
                f"{iso_time(effective_at)} is too early"
            )
        if until is not None and until <= effective_at:
            raise LedgerError("a notice must take effect before it ends")
        if refuses_requests and kind != "maintenance":
            raise LedgerError("only a maintenance can refuse requests")
        notice = ledger.new_id("ntc")
        values = (notice, kind, text, effective_at, until, now, by, refuses_requests)
        await self.store.transact((ADD_NOTICE, values), by=by)
        await self.read_maintenances()
        return await self.notice(notice)

    async def read_maintenances(self) -> None:
        rows = self.store.rows(MAINTENANCES, (self.store.time(),))
        self._maintenances = [Maintenance(*row) async for row in rows]

    def maintenance(self) -> Maintenance | None:
        """That for which requests are refused now."""
        if not self._maintenances:
            return None
        now = self.store.time()
        in_force = (each for each in self._maintenances if each.since <= now < each.until)
        return next(in_force, None)

    async def notice(self, notice_id: str) -> Record:
        """Raises NotFound."""
        row = await self.store.one(NOTICE_BY_ID, (notice_id,))
        if row is None:
            raise NotFound(f"there is no notice {notice_id!r}")
        return ledger.shown(row)

    async def withdraw_notice(self, notice_id: str, by: str) -> Record:
        """Nobody is told it any more."""
        await self.notice(notice_id)
        await self.store.transact((WITHDRAW, (self.store.time(), notice_id)), by=by)
        await self.read_maintenances()
        return await self.notice(notice_id)

    async def notices(self) -> list[Record]:
        """All there ever were, by when they take effect."""
        return [ledger.shown(row) async for row in self.store.rows(NOTICES)]

    async def notices_now(self, account_id: str | None = None) -> list[Record]:
        """Those in force and coming: for all, and for one account."""
        rows = self.store.rows(NOTICES_NOW, (account_id, self.store.time()))
        return [for_account(ledger.shown(row)) async for row in rows]

    async def undelivered(self, since: int) -> list[Record]:
        """Notices of budgets that the webhook has not taken, oldest first."""
        return [ledger.shown(row) async for row in self.store.rows(UNDELIVERED, (since,))]

    async def delivered(self, notice_id: str) -> None:
        """The webhook took it."""
        await self.store.transact((DELIVERED, (self.store.time(), notice_id)))


FREE = Tariff([Price("*")])


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
        lines.append(f"{slot_name(each)} takes over from {slot_name(each['from'])}: {rates}.")
    for each in added.get("left_out", ()):
        rates = ", ".join(f"{name} {rate}" for name, rate in each["rates"].items())
        lines.append(f"{slot_name(each)} no longer gives: {rates}.")
    for each in added["followed_by"]:
        rates = ", ".join(f"{name} {rate}" for name, rate in each["rates"].items())
        lines.append(
            f"{slot_name(each)} has a later price already, from {each['effective_at']} on: {rates}."
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
        lines.append(f"Published as a notice, effective {each['effective_at']}: {each['text']}")
    return lines


def _refuse_twice(prices: Iterable[Price]) -> None:
    """Raise LedgerError if two prices of the same slot take effect at the same time and differ."""
    known: dict[tuple[object, int], dict[str, int]] = {}
    for price in prices:
        if known.setdefault((price.slot, price.effective_at), price.given) != price.given:
            raise LedgerError(
                f"there are two prices of {slot_name(shown_following(price))} "
                f"from {iso_time(price.effective_at)} on; leave one out"
            )


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
