"""The spending of accounts and keys, and the holds for requests in flight.

A hold sets aside the maximum cost of a request before it is sent upstream, so that requests in
parallel can't spend the same money. It is released when the request is settled or fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from redbtc.billing.model_prices import ModelPrices
from redbtc.billing.price_list import PriceTable
from redbtc.billing.prices import MAX_COST
from redbtc.errors import UserError
from redbtc.store.keys import Key
from redbtc.store.objects import Objects
from redbtc.usage import UsagePart


class SpendingLimitReached(UserError):
    """A balance or a budget does not allow what a request can cost."""


class Spending:
    """The amounts that an account or a key has paid, spent and holds, in nanos. `cost` is the sum
    of all months, `spent` that of `month`. A key shares them with the keys that it replaced
    (`budget_id`)."""

    __slots__ = ("cost", "held", "month", "notified_percent", "paid", "spent")

    def __init__(self, month: str, cost: int, spent: int) -> None:
        self.paid = 0
        self.cost = cost
        self.held = 0
        self.month = month
        self.spent = spent
        self.notified_percent = 0  # the highest percentage of the month's budget with a notice

    def begin_month(self, month: str) -> None:
        """Begin a month unless it has begun already."""
        if month != self.month:
            self.month, self.spent, self.notified_percent = month, 0, 0

    def set_back(self, month: str, spent: int) -> None:
        """Go back to an earlier month, since the current one began too early. `spent` is the sum
        from that month until the current one."""
        self.month, self.notified_percent = month, 0
        self.spent += spent

    def remaining(self, budget: int) -> int:
        """Return how much of a monthly budget remains after holds, in nanos."""
        return budget - self.spent - self.held


SpendingOf = tuple[Spending, Spending]  # of the account and the key of a request


class Quote(NamedTuple):
    """The prices of a request, and the limits of its spending, at one instant."""

    key: Key
    at: int  # milliseconds, by the ledger's time
    prices: PriceTable
    model_prices: ModelPrices | None  # None for a model without a price
    spending: SpendingOf
    remaining: list[tuple[str, int]]  # each limit of spending, and the nanos that remain of it


class Hold:
    """The maximum cost of one request, held on its account and its key until `release`, the end of
    `with`, or `Billing.replace_hold`; and the prices that apply to the request. Until then, the
    holds of requests that build on its objects include the tokens that it can add to them
    (`grow`)."""

    __slots__ = ("_growth", "_objects", "_quote", "at", "held", "key", "model_prices", "spending")

    def __init__(self, quote: Quote, amount: int) -> None:
        self.key = quote.key
        self.spending = quote.spending
        self.at = quote.at
        self.model_prices = quote.model_prices
        self.held = amount  # nanos
        self._quote = quote
        self._objects: Objects | None = None
        self._growth: dict[str, int] = {}
        if amount:
            for spending in quote.spending:
                spending.held += amount

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        if self.held or self._objects:
            self.release()

    def release(self) -> None:
        """End the hold, once; another call has no effect."""
        if self.held:
            for spending in self.spending:
                spending.held -= self.held
            self.held = 0
        if self._objects:
            self._objects.stop_growing(self._growth)
            self._objects, self._growth = None, {}

    def grow(self, objects: Objects, ids: Iterable[str], tokens: int) -> None:
        """Note that the request can add a number of tokens to each of these objects. Has no effect
        if nothing is held: then nothing limits spending."""
        if self.held:
            growth = {each: tokens for each in ids if each not in self._growth}
            objects.grow(growth)
            self._objects = objects
            self._growth.update(growth)

    def transfer(self) -> Hold:
        """Return a new hold that takes the place of this one, and release this one."""
        kept = Hold(self._quote, self.held)
        kept._objects, kept._growth = self._objects, self._growth
        self._objects, self._growth = None, {}
        self.release()
        return kept

    def again(self, amount: int) -> Hold:
        """Return a further hold of `amount` nanos on the same account and key."""
        return Hold(self._quote, amount)

    def prices_of(self, model: str) -> ModelPrices | None:
        """Return the prices of another model that apply to the request, None if it has none."""
        return self._quote.prices.model_prices(model, self.at)

    def cost(self, parts: Iterable[UsagePart], tier: str | None) -> tuple[int | None, int]:
        """Return the id of the price that applies to the first part, and the cost of all parts in
        nanos, at most MAX_COST. A part of another model has the price of that model, if there is
        one."""
        price_id, cost = None, 0
        for number, (model, usage, images) in enumerate(parts):
            prices = self.prices_of(model) if model else None
            of_tier = tier if prices is None else None
            if prices := prices or self.model_prices:
                price = prices.price(of_tier, usage.input_tokens or 0)
                price_id = price_id if number else price.id
                cost += price.cost(usage, images)
        return price_id, min(cost, MAX_COST)
