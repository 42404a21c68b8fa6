"""The books: prices, payments, balances and notices, as the ledger holds them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from redbtc.billing.notices import (
    FREE,
    matched,
    matches,
    matching,
    shown_following,
    shown_missing,
    slot_name,
)
from redbtc.billing.price_list import ModelPrices, PriceTable, is_pattern, rises, specificity
from redbtc.billing.prices import MAX_COST, TIER_NAMES, Price
from redbtc.billing.records import (
    NOTICE_TEXT,
    Balance,
    NotApplied,
    Notice,
    Payment,
    PricesAdded,
    PriceSlot,
    PublishedNotice,
    RatesOfEarlierPrice,
    WhichPrice,
)
from redbtc.billing.spending import (
    Hold,
    Quote,
    Spending,
    SpendingLimitReached,
    SpendingOf,
)
from redbtc.config import BillingSettings
from redbtc.errors import Conflict, NotFound, StorageUnavailable, UserError
from redbtc.money import NANOS, UNLIMITED, decimal, money, parse_limit
from redbtc.slices import with_turns
from redbtc.store.accounts import Account
from redbtc.store.consistency import CURRENCIES
from redbtc.store.database import Store
from redbtc.store.keys import Key
from redbtc.store.records import by_name, nanos_of, new_id, shown_amount, shown_time
from redbtc.store.spill import OwedChange
from redbtc.times import DAY, MINUTE, iso_time, month_of

MAX_PAID = 10**17 * NANOS  # by an account: sums of it fit into an INTEGER of units
IN_USE = 90 * DAY  # a model that somebody asked for within this time is in use

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
    SELECT effective_at AS since, ifnull(until, {1 << 62}) AS until, text FROM notices
     WHERE refuses_requests AND withdrawn_at IS NULL AND ifnull(notices.until, ?1 + 1) > ?1"""
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


class Maintenance(NamedTuple):
    """While it lasts (milliseconds), new requests are refused."""

    since: int
    until: int
    text: str


class Billing:
    """The money of one gateway: shared by what serves requests and what people use."""

    def __init__(self, store: Store, settings: BillingSettings) -> None:
        """`settings` may be replaced by others of the same currency."""
        self.store = store
        self.settings = settings
        self.currency = settings.currency
        self.prices = PriceTable()
        self.noticed = asyncio.Event()  # there is something for the webhook
        self._maintenances: list[Maintenance] = []
        self._purses: dict[tuple[str, str | None], Spending] = {}  # by account and budget
        self.changing_prices = asyncio.Lock()

    @classmethod
    async def open(cls, store: Store, settings: BillingSettings) -> Billing:
        """Raises UserError where the ledger's amounts are in another currency."""
        books = cls(store, settings)
        async for (currency,) in store.rows(CURRENCIES):
            if currency != books.currency:
                raise UserError(
                    f"billing.currency is {books.currency}, but the ledger is in {currency}; "
                    "change it back"
                )
        books.prices = PriceTable([Price(**dict(row)) async for row in store.rows(PRICES)])
        await books.read_maintenances()
        return books

    def month(self) -> str:
        """The one that it is for the ledger."""
        return month_of(self.store.time())

    # What a request can cost, and did

    def tariff(self, model: str) -> ModelPrices | None:
        """Its prices now."""
        return self.prices.tariff(model, self.store.time())

    def tariffs(self) -> list[ModelPrices]:
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

    async def purse(self, account_id: str, budget_id: str | None = None) -> Spending:
        """Return the purse of an account, or of one of its keys. Raises StorageUnavailable."""
        purse = await self._purse(account_id, budget_id)
        purse.turn(self.month())
        return purse

    async def _purse(self, account_id: str, budget_id: str | None) -> Spending:
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
                raise StorageUnavailable(f"the ledger can't be read: {error}") from None
            # Nothing was settled meanwhile: that needs the purse.
            purse = Spending(month, nanos_of(*found[:2]), nanos_of(*found[2:]))
            purse.paid = 0 if budget_id else self._paid(account_id)
            if month <= self.month():  # else the time was set back meanwhile
                self._purses.setdefault(name, purse)
        return self._purses[name]

    def set_back(self, at: int) -> None:
        """Go on from an earlier time: count as spent in its month what is dated later, and let
        prices that took effect later have done so then. All that was settled in the months between
        must be committed, and `changing_prices` be held. Raises StorageUnavailable."""
        month = month_of(at)
        later = [each for each in self._purses.items() if each[1].month > month]
        between = [self._spent_between(*name, month, purse.month) for name, purse in later]
        for (_, purse), spent in zip(later, between, strict=True):
            purse.set_back(month, spent)
        self.prices = PriceTable([price.set_back(at) for price in self.prices.prices])
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

    async def spending_of(self, key: Key) -> SpendingOf:
        """Return what the account of a key and the key itself have spent. Raises
        StorageUnavailable."""
        account = await self._purse(key.account_id, None)
        return account, await self._purse(key.account_id, key.budget_id)

    def quote(self, key: Key, model: str, spending: SpendingOf) -> Quote:
        """Return the prices that are in force now for a request, and what limits its spending."""
        now, (account, own) = self.store.time(), spending
        month = month_of(now)
        account.turn(month)
        own.turn(month)
        left = self._left(key, account, own)
        return Quote(key, now, self.prices, self.prices.tariff(model, now), spending, left)

    def hold(self, quote: Quote, amount: int) -> Hold:
        """Hold the most that a request can cost, in nanos. There must be no `await` since `quote`.
        Raises SpendingLimitReached."""
        for what, left in quote.left:
            amount = min(amount, MAX_COST)
            if 0 < amount > left:
                raise SpendingLimitReached(
                    f"This request can cost up to {decimal(amount)} {self.currency}, more than is "
                    f"left of {what} ({decimal(left)} {self.currency})."
                )
        return Hold(quote, amount)

    async def hold_again(self, key: Key, model: str, at: int, held: int) -> Hold:
        """Hold what an earlier process held, at the prices of that time. Raises
        StorageUnavailable."""
        spending = await self.spending_of(key)
        quote = Quote(key, at, self.prices, self.prices.tariff(model, at), spending, [])
        return Hold(quote, held)

    def settle(self, money: Hold, cost: int) -> str:
        """Replace a hold by what the request has cost, in nanos. Return the month on whose
        statement that is."""
        money.release()
        month, key = self.month(), money.key
        for spending in money.spending:
            spending.turn(month)
            spending.cost += cost
            spending.spent += cost
        account, own = money.spending
        if key.account_monthly_budget:
            self.tell_of_budget(key, account, key.account_monthly_budget, None)
        if key.monthly_budget:
            self.tell_of_budget(key, own, key.monthly_budget, key.budget_id)
        return month

    def _left(self, key: Key, account: Spending, own: Spending) -> list[tuple[str, int]]:
        """Of what limits spending, how much is left; empty where nothing does."""
        left = []
        credit = self.credit_limit(key.credit_limit)
        if credit != UNLIMITED:
            balance = account.paid - account.cost + credit - account.held
            left.append(("the account's balance and credit", balance))
        if key.account_monthly_budget is not None:
            budget = account.left(key.account_monthly_budget)
            left.append(("the account's monthly budget", budget))
        if key.monthly_budget is not None:
            left.append(("the key's monthly budget", own.left(key.monthly_budget)))
        return left

    def _money(self, nanos: int) -> str:
        return money(decimal(nanos), self.currency)

    def tell_of_budget(self, key: Key, purse: Spending, budget: int, budget_id: str | None) -> None:
        """Write a notice for each percentage of a budget that is reached and was not before.
        `budget_id` is None for the account's; the notice names it, so that keys which replaced one
        another are told once."""
        for percent in BUDGET_PERCENTS:
            if percent > purse.notified_percent and purse.spent * 100 >= budget * percent:
                purse.notified_percent = percent
                whose = "monthly budget"
                if budget_id:
                    whose += f" of key {key.id}"
                if budget_id not in (None, key.id):
                    whose += " (shared with the keys it replaced)"
                text = (
                    f"{percent} % of the {whose} has been spent: {self._money(purse.spent)} of "
                    f"{self._money(budget)} {self.currency} in {purse.month}."
                )
                now = self.store.time()
                values = (key.account_id, budget_id, purse.month, percent, text, now, now)
                written = self.store.record(
                    BUDGET_NOTICE, (new_id("ntc"), *values), retry_until_written=True
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
    ) -> PricesAdded:
        """Add them all or none; what is so anyway is left out. `effective_at` of 0 is now. With
        `take_over`, rates that were not given are those of the price that was in force before.
        `listed` are models that the answer should say something about beside those that have prices
        or are in use. Raises UserError for a price that would change what has been used, and for
        a rise without the notice that is due, unless `without_notice` says why."""
        async with self.changing_prices:
            now = self.store.time()
            given = list(self._as_rows(prices, now, by, without_notice))
            _refuse_twice(given)
            new, left_out = self._new(given, take_over)
            after = PriceTable([*self.prices.prices, *new])
            notices = await self._notices_of_rises(new, after, now, without_notice)
            changes: list[OwedChange] = [
                (ADD_PRICE, msgspec.structs.astuple(price)) for price in new
            ]
            changes += [(ADD_NOTICE, (new_id("ntc"), *each, now, by, 0)) for each in notices]
            if changes:
                await self.store.transact(*changes, by=by)
            self.prices = after
        added = {price.id for price in new}
        applies_to, others = await self._reach(new, after, now, listed)
        return PricesAdded(
            prices=[row async for row in with_turns(after.rows(now)) if row.id in added],
            added=len(new),
            unchanged=len(prices) - len(new),
            applies_to=applies_to,
            does_not_apply_to=others,
            taken_over=left_out if take_over else UNSET,
            left_out=UNSET if take_over else left_out,
            followed_by=[
                shown_following(following)
                for following in map(after.following, new)
                if following and following.id not in added and following.effective_at > now
            ],
            notices=[PublishedNotice(text, shown_time(at)) for _, text, at, _ in notices],
        )

    def _as_rows(
        self, prices: Iterable[Price], now: int, by: str, reason: str | None
    ) -> Iterator[Price]:
        """Yield the prices as the ledger would have them."""
        first = max((price.id for price in self.prices.prices), default=0) + 1
        for number, price in enumerate(prices, first):
            yield msgspec.structs.replace(
                price,
                id=number,
                effective_at=price.effective_at or now,
                currency=self.currency,
                created_at=now,
                added_by=by,
                reason=reason,
            )

    def _new(
        self, given: Sequence[Price], take_over: bool
    ) -> tuple[list[Price], list[RatesOfEarlierPrice]]:
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
        self, new: Sequence[Price], after: PriceTable, now: int, listed: Collection[str]
    ) -> tuple[list[str], list[NotApplied]]:
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
                others.append(NotApplied(model, str(reasons[0])))
        return applies, others

    async def _notices_of_rises(
        self,
        new: Sequence[Price],
        after: PriceTable,
        now: int,
        without_notice: str | None,
    ) -> list[tuple[str, str, int, int]]:
        """The notices to write: kind, text, from when on, and until when. Raises UserError as
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
                    raise UserError(
                        f"{model} is in use and would cost more from {iso_time(at)}: "
                        f"{'; '.join(risen)}. A price increase needs "
                        f"{settings.price_notice_days} days of notice (billing.price_notice_days), "
                        "or a reason to skip the notice period"
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
                    texts.append(f"Price increase ({self.currency} per million tokens). {line}.")
            until = max(at, now) + settings.price_notice_days * DAY
            notices += [("price", text[:NOTICE_TEXT], at, until) for text in texts]
        return notices

    def which(self, model: str, at: int, tier: str, input_tokens: int) -> WhichPrice:
        """Return which price applies to a request, and why, as JSON shows it."""
        tier = TIER_NAMES.get(tier, tier)
        applied, others = self.prices.which(model, at, tier, input_tokens)
        return WhichPrice(
            model=model,
            at=shown_time(at),
            tier=tier,
            input_tokens=input_tokens,
            why=self._why(tier, applied),
            applies=self.prices.shown(applied, at) if applied else None,
            others=others,
        )

    def _why(self, tier: str, applied: Price | None) -> str:
        if applied is None:
            free = self.settings.unpriced_models == "free"
            then = "are free" if free else "are refused"
            return (
                f"No current price matches the model: requests for it {then} "
                "(billing.unpriced_models)."
            )
        why = "It is the most specific of the current names and patterns that match the model."
        if applied.tier != tier:
            why += (
                f" It has no price for the tier {tier!r}, so the price of {applied.tier!r} applies."
            )
        return why

    async def _models_used(self, since: int) -> set[str]:
        return {row[0] async for row in self.store.rows(MODELS_USED, (since // DAY,))}

    async def _refuse_the_past(self, prices: Iterable[Price]) -> None:
        """What was used has been billed: no price may say later that it cost something else."""
        for price in prices:
            for model in await self._models_used(price.effective_at):
                if matches(model, {price.model}):
                    raise UserError(
                        f"{model} has been used since {iso_time(price.effective_at)}, so its price "
                        "can't change from then on; choose a time from now on"
                    )

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
        """Write down a payment, once for each reference of an account; a refund is negative and
        needs a reason. Raises Conflict where the reference was another amount's."""
        if amount == 0:
            raise UserError("the amount must not be 0")
        if amount < 0 and not reason:
            raise UserError("a negative amount (a refund or correction) needs a reason")
        purse, payment = await self.purse(account.id), new_id("pay")
        if abs(purse.paid + amount) > MAX_PAID or abs(amount) > MAX_PAID:
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
            purse.paid = self._paid(account.id)
        added = await self.store.one(PAYMENT_BY_ID, (payment,))
        assert added is not None, "payments stay"
        return Payment.of(added)

    async def payments(self, account: Account | None) -> list[Payment]:
        """All, or an account's, oldest first."""
        sql, values = (PAYMENTS_OF, (account.id,)) if account else (PAYMENTS, ())
        return [Payment.of(row) async for row in self.store.rows(sql, values)]

    async def balance(self, account: Account) -> Balance:
        """Return an account's money now, as JSON shows it."""
        purse, own = await self.purse(account.id), account.credit_limit
        limit = self.credit_limit(None if own is None else parse_limit(own))
        balance = purse.paid - purse.cost
        left = None if limit == UNLIMITED else balance + limit - purse.held
        return Balance(
            balance=decimal(balance),
            held=decimal(purse.held),
            credit_limit="unlimited" if limit == UNLIMITED else decimal(limit),
            available=shown_amount(left),
            month=purse.month,
            spent_this_month=decimal(purse.spent),
            monthly_budget=account.monthly_budget,
            currency=self.currency,
        )

    async def budgets(self, key: Key) -> dict[str, dict[str, str | None]]:
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
    ) -> Notice:
        """`refuses_requests`: of a maintenance, while which the gateway takes no new ones. Raises
        UserError where new terms would hold before the notice that is due."""
        now, days = self.store.time(), self.settings.terms_notice_days
        if kind == "terms" and effective_at < now + days * DAY - MINUTE:
            raise UserError(
                f"new terms need {days} days of notice (billing.terms_notice_days); "
                f"{iso_time(effective_at)} is too early"
            )
        if until is not None and until <= effective_at:
            raise UserError("until must be later than effective")
        if refuses_requests and kind != "maintenance":
            raise UserError("only a notice of the kind maintenance can refuse requests")
        notice = new_id("ntc")
        values = (notice, kind, text, effective_at, until, now, by, refuses_requests)
        await self.store.transact((ADD_NOTICE, values), by=by)
        await self.read_maintenances()
        return await self.notice(notice)

    async def read_maintenances(self) -> None:
        rows = self.store.rows(MAINTENANCES, (self.store.time(),))
        self._maintenances = [Maintenance(**by_name(row)) async for row in rows]

    def maintenance(self) -> Maintenance | None:
        """That for which requests are refused now."""
        if not self._maintenances:
            return None
        now = self.store.time()
        in_force = (each for each in self._maintenances if each.since <= now < each.until)
        return next(in_force, None)

    async def notice(self, notice_id: str) -> Notice:
        """Raises NotFound."""
        row = await self.store.one(NOTICE_BY_ID, (notice_id,))
        if row is None:
            raise NotFound(f"notice {notice_id!r} does not exist")
        return Notice.of(row)

    async def withdraw_notice(self, notice_id: str, by: str) -> Notice:
        """Nobody is told it any more."""
        await self.notice(notice_id)
        await self.store.transact((WITHDRAW, (self.store.time(), notice_id)), by=by)
        await self.read_maintenances()
        return await self.notice(notice_id)

    async def notices(self) -> list[Notice]:
        """All there ever were, by when they take effect."""
        return [Notice.of(row) async for row in self.store.rows(NOTICES)]

    async def notices_now(self, account_id: str | None = None) -> list[Notice]:
        """Those in force and coming: for all, and for one account."""
        rows = self.store.rows(NOTICES_NOW, (account_id, self.store.time()))
        return [Notice.of(row).for_account() async for row in rows]

    async def undelivered(self, since: int) -> list[Notice]:
        """Notices of budgets that the webhook has not taken, oldest first."""
        return [Notice.of(row) async for row in self.store.rows(UNDELIVERED, (since,))]

    async def delivered(self, notice_id: str) -> None:
        """The webhook took it."""
        await self.store.transact((DELIVERED, (self.store.time(), notice_id)))


def _refuse_twice(prices: Iterable[Price]) -> None:
    """Raise UserError if two prices of the same slot take effect at the same time and differ."""
    known: dict[tuple[object, int], dict[str, int]] = {}
    for price in prices:
        if known.setdefault((price.slot, price.effective_at), price.given) != price.given:
            raise UserError(
                f"two different prices of {slot_name(PriceSlot(*price.slot))} "
                f"take effect at {iso_time(price.effective_at)}; remove one"
            )
