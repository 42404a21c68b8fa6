"""The money of the gateway: balances, budgets, holds and payments."""

from __future__ import annotations

import asyncio
import sqlite3

from redbtc.billing.acceptances import Acceptances
from redbtc.billing.documents import Documents
from redbtc.billing.model_prices import ModelPrices
from redbtc.billing.notices import Notices
from redbtc.billing.price_table import PriceTable
from redbtc.billing.prices import MAX_COST, Price
from redbtc.billing.records import Balance, Payment
from redbtc.billing.spending import Hold, Quote, Spending, SpendingLimitReached, SpendingOf
from redbtc.billing.totals import RunningTotals
from redbtc.billing.unpriced_models import UnpricedModels
from redbtc.billing.webhook_messages import WebhookMessages
from redbtc.config import BillingSettings
from redbtc.errors import Conflict, UserError
from redbtc.money import NANOS, UNLIMITED, decimal, parse_limit
from redbtc.store.accounts import Account
from redbtc.store.consistency import CURRENCIES
from redbtc.store.database import Store
from redbtc.store.json_values import json_amount, new_id
from redbtc.store.keys import Key
from redbtc.times import month_of

MAX_PAID = 10**17 * NANOS  # by one account, so that sums fit into an INTEGER of units

PRICES = f"SELECT {', '.join(Price.__struct_fields__)} FROM prices ORDER BY id"
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


class Billing:
    """The money of one gateway, shared by all that serves its requests and administers it."""

    def __init__(self, store: Store, settings: BillingSettings) -> None:
        """Use `Billing.open` instead: it reads what the ledger has."""
        self.store = store
        self.settings = settings
        self.currency = settings.currency
        self.prices = PriceTable()
        self.changing_prices = asyncio.Lock()
        self.messages = WebhookMessages(store, settings)
        self.notices = Notices(store, settings, self.messages)
        self.documents = Documents(store)
        self.acceptances = Acceptances(store, self.documents)
        self.totals = RunningTotals(store)
        self.unpriced = UnpricedModels(store, self.messages, self.may_serve)

    @classmethod
    async def open(cls, store: Store, settings: BillingSettings) -> Billing:
        """Return the billing of a ledger. Raises UserError if the ledger's amounts are in another
        currency than the settings."""
        billing = cls(store, settings)
        async for (currency,) in store.rows(CURRENCIES):
            if currency != billing.currency:
                raise UserError(
                    f"billing.currency is {billing.currency}, but the ledger is in {currency}; "
                    "change it back"
                )
        await billing.read()
        return billing

    async def read(self) -> None:
        """Read the prices, the maintenances and the documents from the ledger. Raises
        sqlite3.Error."""
        self.prices = PriceTable([Price(**dict(row)) async for row in self.store.rows(PRICES)])
        await self.notices.read_maintenances()
        await self.documents.read()

    def apply(self, settings: BillingSettings) -> None:
        """Use other settings, of the same currency, from the next request on."""
        self.settings = self.notices.settings = self.messages.settings = settings
        self.messages.wakeup.set()  # there may be a webhook now

    def month(self) -> str:
        """Return the current month by the ledger's time, such as 2026-11."""
        return month_of(self.store.time())

    # What a request can cost, and did

    def model_prices(self, model: str) -> ModelPrices | None:
        """Return the prices in force for a model, None if it has none."""
        return self.prices.model_prices(model, self.store.time())

    def prices_in_force(self) -> list[ModelPrices]:
        """Return the prices in force for each name or pattern."""
        return self.prices.in_force(self.store.time())

    def may_serve(self, model: str) -> bool:
        """Return whether a model may be served: it has a price, or models without one are free."""
        return self.settings.unpriced_models == "free" or self.model_prices(model) is not None

    def lacks(self, model: str, rate: str, tier: str | None) -> Price | None:
        """Return a price that a request for a model and tier can get and that lacks a rate of
        NEEDED. Return None if there is none, or if models without a price are free."""
        if self.settings.unpriced_models == "free":
            return None
        prices = self.model_prices(model)
        return None if prices is None else prices.lacks(rate, tier)

    async def spending(self, account_id: str, budget_id: str | None = None) -> Spending:
        """Return what an account, or one of its keys, has paid and spent. Raises
        StorageUnavailable."""
        spending = await self.totals.of(account_id, budget_id)
        spending.begin_month(self.month())
        return spending

    def set_back(self, at: int) -> None:
        """Go back to the time `at`: costs that are dated later count as spent in its month, and
        prices that took effect later take effect at it. All that was settled in the months between
        must be committed, and `changing_prices` must be held. Raises StorageUnavailable."""
        self.totals.set_back(at)
        self.prices = PriceTable([price.set_back(at) for price in self.prices.prices])
        self.store.clock.set_back(at)

    def credit_limit(self, own: int | None) -> int:
        """Return an account's credit limit in nanos, or UNLIMITED: its own, or else the default of
        the settings."""
        return parse_limit(self.settings.default_credit_limit) if own is None else own

    async def spending_of(self, key: Key) -> SpendingOf:
        """Return what the account of a key and the key itself have spent. Raises
        StorageUnavailable."""
        account = await self.totals.of(key.account_id, None)
        return account, await self.totals.of(key.account_id, key.budget_id)

    def quote(self, key: Key, model: str, spending: SpendingOf) -> Quote:
        """Return the prices that are in force now for a request, and what limits its spending."""
        now, (account, own) = self.store.time(), spending
        month = month_of(now)
        account.begin_month(month)
        own.begin_month(month)
        prices = self.prices.model_prices(model, now)
        remaining = self._remaining(key, account, own)
        return Quote(key, now, self.prices, prices, spending, remaining)

    def hold(self, quote: Quote, amount: int) -> Hold:
        """Hold the maximum cost of a request, in nanos. There must be no `await` between `quote`
        and this. Raises SpendingLimitReached."""
        for what, remaining in quote.remaining:
            amount = min(amount, MAX_COST)
            if 0 < amount > remaining:
                raise SpendingLimitReached(
                    f"This request can cost up to {decimal(amount)} {self.currency}, more than is "
                    f"left of {what} ({decimal(remaining)} {self.currency})."
                )
        return Hold(quote, amount)

    async def hold_at(self, key: Key, model: str, at: int, amount: int) -> Hold:
        """Hold an amount for a request that was admitted before, at the prices of the time `at`,
        whatever is left of the balance. Raises StorageUnavailable."""
        spending = await self.spending_of(key)
        quote = Quote(key, at, self.prices, self.prices.model_prices(model, at), spending, [])
        return Hold(quote, amount)

    def replace_hold(self, hold: Hold, cost: int) -> str:
        """Replace a hold by the cost of the request, in nanos. Return the month whose statement
        will list it."""
        hold.release()
        month, key = self.month(), hold.key
        for spending in hold.spending:
            spending.begin_month(month)
            spending.cost += cost
            spending.spent += cost
        account, own = hold.spending
        if key.account_monthly_budget:
            self.notices.notify_of_budget(key, account, key.account_monthly_budget, None)
        if key.monthly_budget:
            self.notices.notify_of_budget(key, own, key.monthly_budget, key.budget_id)
        return month

    def _remaining(self, key: Key, account: Spending, own: Spending) -> list[tuple[str, int]]:
        """Return the name of each balance and budget that limits a key's spending, and how much is
        left of it."""
        remaining = []
        credit = self.credit_limit(key.credit_limit)
        if credit != UNLIMITED:
            balance = account.paid - account.cost + credit - account.held
            remaining.append(("the account's balance and credit", balance))
        if key.account_monthly_budget is not None:
            budget = account.remaining(key.account_monthly_budget)
            remaining.append(("the account's monthly budget", budget))
        if key.monthly_budget is not None:
            remaining.append(("the key's monthly budget", own.remaining(key.monthly_budget)))
        return remaining

    # Payments

    async def pay(
        self,
        account: Account,
        amount: int,
        *,
        reference: str | None,
        reason: str | None,
        by: str,
    ) -> Payment:
        """Record a payment of an account. A refund is negative and needs a reason. If the account
        has a payment with this reference already, that one is returned. Raises Conflict if its
        amount differs."""
        if amount == 0:
            raise UserError("the amount must not be 0")
        if amount < 0 and not reason:
            raise UserError("a negative amount (a refund or correction) needs a reason")
        spending, payment = await self.spending(account.id), new_id("pay")
        if abs(spending.paid + amount) > MAX_PAID or abs(amount) > MAX_PAID:
            raise UserError(
                f"the amount is too large: an account's payments can total {decimal(MAX_PAID)}"
            )
        now = self.store.time()
        values = (payment, account.id, *divmod(amount, NANOS), self.currency, reference, reason)
        try:
            await self.store.transact((ADD_PAYMENT, (*values, month_of(now), now, by)), by=by)
        except sqlite3.IntegrityError:
            same = await self.store.one(PAYMENT_BY_REFERENCE, (account.id, reference))
            if same is None:
                raise
            known = Payment.of(same)
            if known.amount != decimal(amount):
                raise Conflict(
                    f"payment {reference!r} already exists, with the amount {known.amount}"
                ) from None
            return known
        finally:
            spending.paid = self.totals.paid(account.id)
        added = await self.store.one(PAYMENT_BY_ID, (payment,))
        assert added is not None, "payments are never deleted"
        return Payment.of(added)

    async def payments(self, account: Account | None) -> list[Payment]:
        """Return the payments of an account, or of all accounts, oldest first."""
        sql, values = (PAYMENTS_OF, (account.id,)) if account else (PAYMENTS, ())
        return [Payment.of(row) async for row in self.store.rows(sql, values)]

    async def balance(self, account: Account) -> Balance:
        """Return an account's current balance and budget, as JSON shows them."""
        spending, own = await self.spending(account.id), account.credit_limit
        limit = self.credit_limit(None if own is None else parse_limit(own))
        balance = spending.paid - spending.cost
        available = None if limit == UNLIMITED else balance + limit - spending.held
        return Balance(
            balance=decimal(balance),
            held=decimal(spending.held),
            credit_limit="unlimited" if limit == UNLIMITED else decimal(limit),
            available=json_amount(available),
            month=spending.month,
            spent_this_month=decimal(spending.spent),
            monthly_budget=account.monthly_budget,
            currency=self.currency,
        )

    async def budgets(self, key: Key) -> dict[str, dict[str, str | None]]:
        """Return the monthly budgets of a key and of its account, as JSON shows them."""
        account = await self.spending(key.account_id)
        own = await self.spending(key.account_id, key.budget_id)
        pairs = {"key": (own, key.monthly_budget), "account": (account, key.account_monthly_budget)}
        return {
            whose: {
                "limit": None if budget is None else decimal(budget),
                "spent": decimal(spending.spent),
                "remaining": None if budget is None else decimal(spending.remaining(budget)),
            }
            for whose, (spending, budget) in pairs.items()
        }
