"""What accounts and keys have spent, and what is held for requests in flight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from redbtc.billing.price_list import ModelPrices
from redbtc.billing.prices import MAX_COST
from redbtc.errors import UserError
from redbtc.store.keys import Key
from redbtc.store.objects import Objects
from redbtc.usage import UsagePart

if TYPE_CHECKING:
    from redbtc.billing.books import Billing


class SpendingLimitReached(UserError):
    """Balance or budget don't allow what the request can cost."""


class Spending:
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
        books: Billing,
        key: Key,
        at: int,
        tariff: ModelPrices | None,
        purses: tuple[Spending, Spending],
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

    def cost(self, parts: Iterable[UsagePart], tier: str | None) -> tuple[int | None, int]:
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
