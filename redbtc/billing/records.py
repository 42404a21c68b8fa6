"""Prices, payments and notices, as the admin API and the pages show them."""

from __future__ import annotations

import sqlite3
from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

from redbtc.money import decimal
from redbtc.rates import RATES
from redbtc.store.json_values import Moment, Money, by_name, json_time, nanos_of, with_members
from redbtc.times import iso_time

NOTICE_TEXT = 4000  # characters


class Balance(Struct):
    """An account's current balance and budget. If `available` is null, its credit is unlimited."""

    balance: Money
    held: Money
    credit_limit: str
    available: Money | None
    month: str
    spent_this_month: Money
    monthly_budget: Money | None
    currency: str


class PriceSlot(Struct):
    """The model, tier and threshold that a price applies to."""

    model: str
    tier: str
    above_input_tokens: int


@with_members(dict.fromkeys(RATES, Money | None))
class RatesOfPrice(PriceSlot):
    """A rate of null was not given."""

    effective_at: Moment


class PriceShown(RatesOfPrice, kw_only=True):
    """A price for a pattern of models. A rate of null was not given. `shadowed_by` lists more
    specific names and patterns: their prices apply to the models that they match, not this one.
    Only operators see `added_by` and `reason`."""

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
    """Prices, by model, tier, threshold and time."""

    prices: list[PriceShown]


class ModelsInUse(Struct):
    """The models that were requested in the last 90 days. An increase of their prices needs
    `notice_days` of notice. Without a price, models are refused or free: `unpriced_models`."""

    at: Moment
    models: list[str]
    notice_days: int
    unpriced_models: Literal["refuse", "free"]
    currency: str


class RatesOfEarlierPrice(PriceSlot):
    """Rates that a price left out but the earlier price `from` has."""

    from_: PriceSlot = field(name="from")
    rates: dict[str, Money | int]


class FollowingPrice(PriceSlot):
    """An existing price that will replace an added one later."""

    effective_at: Moment
    rates: dict[str, Money | int]


class NotApplied(Struct):
    """A model that a price matches but does not apply to, and why."""

    model: str
    because: str


class PublishedNotice(Struct):
    """A published notice of a price increase."""

    text: str
    effective_at: Moment


class PricesAdded(PriceList, kw_only=True):
    """The prices that were added. `unchanged` counts prices that were skipped because they already
    apply. `applies_to` and `does_not_apply_to` list known models: those with a price, in use, or
    listed by an upstream. `taken_over` (without `take_over`: `left_out`) lists rates that were not
    given but an earlier price has. `followed_by` lists existing prices that will replace the added
    ones later."""

    added: int
    unchanged: int
    applies_to: list[str]
    does_not_apply_to: list[NotApplied]
    taken_over: list[RatesOfEarlierPrice] | UnsetType = UNSET
    left_out: list[RatesOfEarlierPrice] | UnsetType = UNSET
    followed_by: list[FollowingPrice]
    notices: list[PublishedNotice]


class OtherPrice(PriceShown, kw_only=True):
    """A price that does not apply, and why."""

    because: str


class WhichPrice(Struct):
    """The price that applies to a request (null if none does), and all others that match its
    model."""

    model: str
    at: Moment
    tier: str
    input_tokens: int
    why: str
    applies: PriceShown | None
    others: list[OtherPrice]


class Payment(Struct, kw_only=True):
    """A payment of an account. A refund has a negative amount. Only operators see `added_by`."""

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
        columns["created_at"] = json_time(row["created_at"])
        return cls(**columns, amount=decimal(amount))

    def for_account(self) -> Payment:
        """Return the payment without what only operators are shown."""
        return replace(self, added_by=UNSET)


class Notice(Struct, kw_only=True):
    """A notice to accounts. If `account` is null, it is for all accounts. Only operators see
    `added_by`, `withdrawn_at` and `delivered_at`, the time at which the webhook accepted it."""

    id: str
    kind: Literal["price", "terms", "maintenance", "incident", "budget", "key"]
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
            "effective_at": json_time(row["effective_at"]),
            "until": iso_time(row["until"]),
            "refuses_requests": bool(row["refuses_requests"]),
            "created_at": json_time(row["created_at"]),
            "withdrawn_at": iso_time(row["withdrawn_at"]),
            "delivered_at": iso_time(row["delivered_at"]),
        }
        return cls(**columns)

    def for_account(self) -> Notice:
        """Return the notice without what only operators are shown."""
        return replace(self, added_by=UNSET, withdrawn_at=UNSET, delivered_at=UNSET)
