"""Prices, payments and notices, as the admin API and the pages show them."""

from __future__ import annotations

import sqlite3
from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

from redbtc.money import decimal
from redbtc.rates import RATES
from redbtc.store.records import Moment, Money, by_name, nanos_of, shown_time, with_members
from redbtc.times import iso_time

NOTICE_TEXT = 4000  # characters


class Balance(Struct):
    """An account's money now."""

    balance: Money
    held: Money
    credit_limit: str
    available: Money | None
    month: str
    spent_this_month: Money
    monthly_budget: Money | None
    currency: str


class PriceSlot(Struct):
    """What a price is for."""

    model: str
    tier: str
    above_input_tokens: int


@with_members(dict.fromkeys(RATES, Money | None))
class RatesOfPrice(PriceSlot):
    """A rate of null was not given."""

    effective_at: Moment


class PriceShown(RatesOfPrice, kw_only=True):
    """A rate of null was not given. `shadowed_by`: more specific names and patterns whose prices
    apply instead of this one to models that it means. `added_by` and `reason` are for operators
    only."""

    max_output_tokens: int | None
    currency: str
    source: str | None
    created_at: Moment
    added_by: str | UnsetType | None = UNSET
    reason: str | UnsetType | None = UNSET
    id: int
    status: Literal["past", "current", "coming"]
    shadowed_by: list[str]

    def for_account(self) -> PriceShown:
        """Return the price without what only operators are shown."""
        return replace(self, added_by=UNSET, reason=UNSET)


class PriceList(Struct):
    """By model, tier, threshold and time."""

    prices: list[PriceShown]


class RatesOfEarlierPrice(PriceSlot):
    """Rates that a price left out and an earlier one, `from`, had."""

    from_: PriceSlot = field(name="from")
    rates: dict[str, Money | int]


class FollowingPrice(PriceSlot):
    """A price that was there before and will supersede an added one."""

    effective_at: Moment
    rates: dict[str, Money | int]


class NotApplied(Struct):
    """A model that a price means but does not apply to."""

    model: str
    because: str


class PublishedNotice(Struct):
    """A notice of a rise."""

    text: str
    effective_at: Moment


class PricesAdded(PriceList, kw_only=True):
    """`unchanged` counts the prices that were skipped. `applies_to` and `does_not_apply_to` are the
    known models: those with a price, in use, or listed by an upstream. `taken_over` (or `left_out`,
    without `take_over`) are rates that were not given and an earlier price had; `followed_by` are
    prices that were there before and will supersede the added ones."""

    added: int
    unchanged: int
    applies_to: list[str]
    does_not_apply_to: list[NotApplied]
    taken_over: list[RatesOfEarlierPrice] | UnsetType = UNSET
    left_out: list[RatesOfEarlierPrice] | UnsetType = UNSET
    followed_by: list[FollowingPrice]
    notices: list[PublishedNotice]


class OtherPrice(PriceShown, kw_only=True):
    """One that does not apply, and why."""

    because: str


class WhichPrice(Struct):
    """The price that applies to a request (null: none), and all others that mean its model."""

    model: str
    at: Moment
    tier: str
    input_tokens: int
    why: str
    applies: PriceShown | None
    others: list[OtherPrice]


class Payment(Struct, kw_only=True):
    """A refund is negative. `added_by` is for operators only."""

    id: str
    account: str
    currency: str
    reference: str | None
    reason: str | None
    month: str
    created_at: Moment
    added_by: str | UnsetType | None = UNSET
    amount: Money

    @classmethod
    def of(cls, row: sqlite3.Row) -> Payment:
        """Return the payment of a row."""
        columns = by_name(row)
        amount = nanos_of(columns.pop("units"), columns.pop("nanos"))
        columns["created_at"] = shown_time(row["created_at"])
        return cls(**columns, amount=decimal(amount))

    def for_account(self) -> Payment:
        """Return the payment without what only operators are shown."""
        return replace(self, added_by=UNSET)


class Notice(Struct, kw_only=True):
    """`account` of null: for all. `added_by`, `withdrawn_at` and `delivered_at` (by the webhook)
    are for operators only."""

    id: str
    kind: Literal["price", "terms", "maintenance", "incident", "budget"]
    account: str | None
    key_id: str | None
    month: str | None
    percent: int | None
    text: str
    effective_at: Moment
    until: Moment | None
    refuses_requests: bool
    created_at: Moment
    added_by: str | UnsetType | None = UNSET
    withdrawn_at: Moment | UnsetType | None = UNSET
    delivered_at: Moment | UnsetType | None = UNSET

    @classmethod
    def of(cls, row: sqlite3.Row) -> Notice:
        """Return the notice of a row."""
        columns = {
            **by_name(row),
            "effective_at": shown_time(row["effective_at"]),
            "until": iso_time(row["until"]),
            "refuses_requests": bool(row["refuses_requests"]),
            "created_at": shown_time(row["created_at"]),
            "withdrawn_at": iso_time(row["withdrawn_at"]),
            "delivered_at": iso_time(row["delivered_at"]),
        }
        return cls(**columns)

    def for_account(self) -> Notice:
        """Return the notice without what only operators are shown."""
        return replace(self, added_by=UNSET, withdrawn_at=UNSET, delivered_at=UNSET)
