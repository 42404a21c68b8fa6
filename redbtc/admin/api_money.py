"""Operations on prices, payments, statements and notices."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from redbtc.admin.access import Access
from redbtc.admin.actors import Actor, Invalid
from redbtc.admin.inputs import (
    NewNotice,
    NewPayment,
    NewPrice,
    NewPrices,
    StatementQuery,
    WhichPriceQuery,
)
from redbtc.admin.outputs import (
    MonthList,
    NoticeList,
    NoticeWithdrawn,
    PaymentAdded,
    PaymentList,
    UnpricedModelList,
)
from redbtc.admin.validation import time_in
from redbtc.billing.overviews import months
from redbtc.billing.price_changes import add_prices, models_in_use
from redbtc.billing.prices import MAX_CALL_RATE, MAX_RATE, Price
from redbtc.billing.records import Balance, ModelsInUse, Notice, PriceList, PricesAdded, WhichPrice
from redbtc.billing.statements import Statement, statement
from redbtc.billing.which_price import which_price
from redbtc.errors import UserError
from redbtc.money import parse_amount
from redbtc.rates import RATES, UNITS
from redbtc.slices import with_turns
from redbtc.times import parse_month


class MoneyOperations(Access):
    """Operations on prices, payments, statements and notices."""

    async def list_prices(self, actor: Actor) -> PriceList:
        """List past, current and coming prices."""
        rows = self.billing.prices.rows(self.billing.store.time())
        return PriceList([row async for row in with_turns(rows)])

    async def account_prices(self, actor: Actor, account: str | None = None) -> PriceList:
        """List current and coming prices."""
        await self.find_account(actor, account)
        rows = with_turns(self.billing.prices.rows(self.billing.store.time()))
        return PriceList([row.for_account() async for row in rows if row.status != "past"])

    async def which_price(self, actor: Actor, query: WhichPriceQuery) -> WhichPrice:
        """Show which price applies to a request, and why other matching prices don't."""
        now = self.billing.store.time()
        at = time_in(query.at, now) or now
        return which_price(self.billing, query.model, at, query.tier, query.input_tokens)

    async def list_missing_prices(self, actor: Actor) -> UnpricedModelList:
        """List the models that were asked for and refused since they have no price."""
        return UnpricedModelList(await self.billing.unpriced.listed())

    async def models_in_use(self, actor: Actor) -> ModelsInUse:
        """List the models that were requested in the last 90 days, whose prices can't rise without
        notice."""
        return await models_in_use(self.billing)

    async def add_prices(self, actor: Actor, body: NewPrices) -> PricesAdded:
        """Add prices, all or none. The answer says which models they apply to."""
        if body.currency not in (None, self.billing.currency):
            raise UserError(
                f"prices are in {body.currency}, but billing.currency is {self.billing.currency}"
            )
        return await add_prices(
            self.billing,
            prices_of(body, self.billing.store.time()),
            without_notice=body.without_notice,
            by=actor.name,
            take_over=body.take_over,
            listed=self.gateway.listed_models(),
        )

    async def list_payments(self, actor: Actor) -> PaymentList:
        """List all payments."""
        return PaymentList(await self.billing.payments(None))

    async def account_payments(self, actor: Actor, account: str | None = None) -> PaymentList:
        """List an account's payments."""
        found = await self.find_account(actor, account)
        payments = await self.billing.payments(found)
        if actor.rank != "operator":
            payments = [each.for_account() async for each in with_turns(payments)]
        return PaymentList(payments)

    async def add_payment(self, actor: Actor, body: NewPayment, account: str) -> PaymentAdded:
        """Record a payment or, with a negative amount, a refund."""
        found = await self.find_account(actor, account)
        payment = await self.billing.pay(
            found,
            parse_amount(body.amount),
            reference=body.reference,
            reason=body.reason,
            by=actor.name,
        )
        money = await self.billing.balance(found)
        return PaymentAdded(**asdict(payment), balance=money.balance)

    async def list_months(self, actor: Actor, account: str) -> MonthList:
        """List the months for which an account has a statement."""
        found = await self.find_account(actor, account)
        return MonthList(await months(self.billing, found))

    async def statement(
        self, actor: Actor, query: StatementQuery, month: str, account: str | None = None
    ) -> Statement:
        """Show an account's statement for a month."""
        found = await self.find_account(actor, account)
        try:
            wanted = parse_month(month)
        except UserError as error:
            raise Invalid(str(error)) from None
        return await statement(self.billing, found, wanted, query.limit)

    async def balance(self, actor: Actor) -> Balance:
        """Show an account's current balance and budget."""
        found = await self.find_account(actor)
        return await self.billing.balance(found)

    async def list_notices(self, actor: Actor) -> NoticeList:
        """List all notices, past and withdrawn ones included."""
        return NoticeList(await self.billing.notices.all())

    async def account_notices(self, actor: Actor, account: str | None = None) -> NoticeList:
        """List current and coming notices for an account."""
        found = await self.find_account(actor, account)
        return NoticeList(await self.billing.notices.current(found.id))

    async def add_notice(self, actor: Actor, body: NewNotice) -> Notice:
        """Publish a notice."""
        now = self.billing.store.time()
        effective = time_in(body.effective, now)
        return await self.billing.notices.add(
            body.kind,
            body.text,
            now if effective is None else effective,
            time_in(body.until, now),
            actor.name,
            body.refuses_requests,
        )

    async def withdraw_notice(self, actor: Actor, notice: str) -> NoticeWithdrawn:
        """Withdraw a notice."""
        withdrawn = await self.billing.notices.withdraw(notice, actor.name)
        return NoticeWithdrawn(**asdict(withdrawn))


def prices_of(body: NewPrices, now: int) -> list[Price]:
    """Return the prices to add, one for each model. Times without a date count from `now`, the
    ledger's time in milliseconds. Raises UserError for a rate that is no amount or out of range."""
    return [
        price_of(each, model, body.source, now)
        for each in body.prices
        for model in ([each.model] if isinstance(each.model, str) else each.model)
    ]


def price_of(given: NewPrice, model: str, source: str | None, now: int) -> Price:
    """Return one of the prices of `prices_of`. Raises UserError as it does."""
    if not model.isprintable():
        raise UserError(f"{model!r} is not a model name or pattern")
    rates: dict[str, Any] = {}
    for name in RATES:
        rate = getattr(given, name)
        if rate is not None:
            rates[name] = parse_amount(rate)
            maximum = MAX_CALL_RATE if name in UNITS else MAX_RATE
            if not 0 <= rates[name] <= maximum:
                raise UserError(f"{model}: the rate {name} is out of range: {rate}")
    if not rates:
        raise UserError(f"the price of {model} has no rate; give at least one (0 if it is free)")
    return Price(
        model=model,
        tier=given.tier,
        above_input_tokens=given.above_input_tokens,
        effective_at=time_in(given.effective, now) or 0,
        max_output_tokens=given.max_output_tokens,
        source=given.source or source,
        **rates,
    )
