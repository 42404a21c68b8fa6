"""The operations of the admin API."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import asdict, replace

from redbtc.admin.actors import RANKS, Actor, Forbidden, Invalid, RunningGateway
from redbtc.admin.inputs import (
    AccountChange,
    AccountsQuery,
    ChangesQuery,
    NewAccount,
    NewKey,
    NewNotice,
    NewPassword,
    NewPayment,
    NewPrice,
    NewPrices,
    NewThrottle,
    NewTime,
    NewUser,
    OverviewQuery,
    RequestsQuery,
    Revocation,
    Rotation,
    StatementQuery,
    SumsQuery,
    Suspension,
    UsageQuery,
    UsersQuery,
    WhichPriceQuery,
    WhichUser,
)
from redbtc.admin.operations import (
    Operation,
    converted,
    decoded,
    limits_in,
    models_in,
    operation,
    time_in,
)
from redbtc.admin.outputs import (
    AccountList,
    AccountWithMoney,
    ChangeList,
    Check,
    DatabaseSize,
    Done,
    KeyList,
    KeyRevoked,
    MeShown,
    MonthList,
    NoticeList,
    NoticeWithdrawn,
    Overview,
    PaymentAdded,
    PaymentList,
    RequestReport,
    SessionList,
    UsageReport,
    UserList,
)
from redbtc.admin.set_time import TimeSet, preview, set_time, time_to_set
from redbtc.admin.users import LoginSession, UserAdded, Users, UserShown
from redbtc.billing.billing import Billing
from redbtc.billing.model_patterns import matches
from redbtc.billing.overviews import lately, list_accounts, months, spending_overview, traffic
from redbtc.billing.price_changes import add_prices
from redbtc.billing.prices import MAX_CALL_RATE, MAX_RATE, Price
from redbtc.billing.records import Balance, Notice, PriceList, PricesAdded, WhichPrice
from redbtc.billing.reports import Range, copy_requests, older_than, requests_in, usage_by
from redbtc.billing.statements import Statement, statement
from redbtc.billing.which_price import which_price
from redbtc.errors import Conflict, NotFound, UserError
from redbtc.money import NANOS, parse_amount
from redbtc.rates import RATES, UNITS
from redbtc.slices import with_turns
from redbtc.store import changes as changes_module
from redbtc.store.accounts import Account, Accounts, KeyAdded, KeyShown, no_account, no_key
from redbtc.store.consistency import check_database
from redbtc.store.keys import Key
from redbtc.store.wal import file_size
from redbtc.times import parse_duration, parse_month, parse_time

MAX_ROWS = 1000  # requests that a browser or a key gets at once

ACCOUNT_ID = re.compile(r"acct_[0-9a-f]{16}")


class API:
    """What can be done, and who may. `public_url` is where browsers find the gateway."""

    def __init__(self, books: Billing, running: RunningGateway, public_url: str) -> None:
        self.books = books
        self.users = Users(books.store)
        self._running = running
        self.dashboard_url = f"{public_url.rstrip('/')}/dashboard/"
        self._accounts = Accounts(books.store)

    async def example_model(self, patterns: Sequence[str] | None) -> str:
        """A model to try a key with that is limited to these patterns: one that it may use, that an
        upstream is there for and that has a price, as far as there is one."""
        priced = {price.model for price in self.books.prices.prices if price.output}
        stems = *sorted(priced, key=lambda name: ("*" in name, name)), *(patterns or ())
        names = self._running.example_model, *(name.rstrip("*") for name in stems)

        def fits(name: str) -> tuple[bool, bool, bool]:
            allowed = not patterns or matches(name, patterns)
            return allowed, self._running.serves(name), self.books.served(name)

        found = [(fits(name), name) async for name in with_turns(names) if not {*"*?["} & {*name}]
        return max(found, key=lambda each: each[0])[1]

    async def perform(
        self,
        operation: Operation,
        actor: Actor,
        path: Mapping[str, str] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        body: bytes | Mapping[str, Any] = b"",
    ) -> Any:
        """What the operation answers: a record, or bytes of JSON as they come. A body of text
        values, as a form has them, is read as such. Raises UserError."""
        path = path or {}
        if RANKS[actor.rank] < RANKS[operation.least]:
            raise Forbidden("your role doesn't allow this")
        arguments: dict[str, Any] = {}
        sent_query = converted(query or {}, operation.query)
        read = decoded(body, operation.body) if isinstance(body, bytes) else None
        sent_body = read or converted(body, operation.body)  # type: ignore[arg-type]
        for name in operation.parameters:
            if name == "actor":
                arguments[name] = actor
            elif name == "query":
                arguments[name] = sent_query
            elif name == "body":
                arguments[name] = sent_body
            elif name == "account":
                arguments[name] = await self._account(actor, path.get("account"))
            elif name == "key":
                arguments[name] = await self._key(actor, path["key"])
            else:
                arguments[name] = path[name]
        return await operation.perform(self, **arguments)

    async def _account(self, actor: Actor, name: str | None) -> Account:
        """The one that is meant, where it is the actor's to know of."""
        if name is None:
            if actor.account_id is None:
                raise NotFound("this needs an API key in the Authorization header")
            name = actor.account_id
        account = await self._accounts.show(name)
        if actor.account_id not in (None, account.id):
            raise no_account(name)
        return account

    async def _key(self, actor: Actor, key_id: str) -> KeyShown:
        key = await self._accounts.key(key_id)
        if actor.account_id not in (None, key.account_id):
            raise no_key(key_id)
        return key

    async def _user(self, actor: Actor, name: str, query: WhichUser) -> UserShown:
        """Of several logins of one address a member only ever means, and learns of, his account's.
        Raises NotFound, Conflict."""
        no_user = NotFound(f"user {name!r} does not exist")
        account, operator = query.account, query.operator
        if actor.account_id is not None:
            own = await self._accounts.show(actor.account_id)
            if operator or account not in (None, own.name):
                raise no_user
            account = own.name
        user = await self.users.named(name, account, operator)
        if actor.account_id not in (None, user.account_id):
            raise no_user
        return user

    # Accounts

    async def _with_money(self, account: Account, actor: Actor) -> AccountWithMoney:
        money = await self.books.balance(account)
        if actor.rank != "operator":
            account = replace(account, status_reason=UNSET)
        return AccountWithMoney(
            **asdict(account),
            balance=money.balance,
            held=money.held,
            available=money.available,
            month=money.month,
            spent_this_month=money.spent_this_month,
            currency=money.currency,
        )

    @operation("GET", "/accounts", least="operator", answer=AccountList)
    async def list_accounts(self, query: AccountsQuery) -> AccountList:
        """List accounts, or search them."""
        return AccountList(
            await list_accounts(self.books, query.search, query.after, query.limit or -1)
        )

    @operation("POST", "/accounts", least="operator", answer=AccountWithMoney)
    async def add_account(self, actor: Actor, body: NewAccount) -> AccountWithMoney:
        """Create an account."""
        if ACCOUNT_ID.fullmatch(body.name):  # where either will do, it would be taken for another's
            raise UserError(f"name {body.name!r} looks like an account id; choose another one")
        limits = limits_in(body)
        account = await self._accounts.add(body.name, body.email, limits, actor.name)
        return await self._with_money(account, actor)

    @operation("GET", "/accounts/{account}", least="viewer", answer=AccountWithMoney)
    async def show_account(self, actor: Actor, account: Account) -> AccountWithMoney:
        """Show an account, by name or id."""
        return await self._with_money(account, actor)

    @operation("PATCH", "/accounts/{account}", least="operator", answer=AccountWithMoney)
    async def set_account(
        self, actor: Actor, account: Account, body: AccountChange
    ) -> AccountWithMoney:
        """Change an account. Takes effect on its next request."""
        changed = await self._accounts.set(account.id, limits_in(body), actor.name)
        return await self._with_money(changed, actor)

    @operation("POST", "/accounts/{account}/suspend", least="operator", answer=Account)
    async def suspend_account(self, actor: Actor, account: Account, body: Suspension) -> Account:
        """Suspend an account: refuse its requests and log its members out."""
        return await self._accounts.suspend(account.id, body.reason, actor.name)

    @operation("POST", "/accounts/{account}/resume", least="operator", answer=Account)
    async def resume_account(self, actor: Actor, account: Account) -> Account:
        """Resume a suspended account."""
        return await self._accounts.resume(account.id, actor.name)

    @operation("POST", "/accounts/{account}/throttle", least="operator", answer=Account)
    async def throttle_account(self, actor: Actor, account: Account, body: NewThrottle) -> Account:
        """Temporarily reduce an account's limits."""
        factor = parse_amount(body.factor if body.factor[0] != "." else f"0{body.factor}")
        now = self.books.store.time()
        until = time_in(body.until, now)
        if until is not None and until <= now:
            raise UserError("until must be later than now")
        thousandths = factor // (NANOS // 1000)
        if thousandths == 1000:
            return await self._accounts.throttle(account.id, None, None, actor.name)
        return await self._accounts.throttle(account.id, thousandths, until, actor.name)

    @operation("GET", "/accounts/{account}/limits", least="viewer", answer=dict[str, Any])
    async def account_limits(self, account: Account) -> dict[str, Any]:
        """Show an account's current limits and what is left of them, while the gateway runs."""
        return self._running.limits_of_account(account)

    # Keys

    @operation("GET", "/accounts/{account}/keys", least="viewer", answer=KeyList)
    async def list_keys(self, account: Account) -> KeyList:
        """List an account's keys."""
        return KeyList(await self._accounts.keys(account.id))

    @operation("POST", "/accounts/{account}/keys", least="owner", answer=KeyAdded)
    async def add_key(self, actor: Actor, account: Account, body: NewKey) -> KeyAdded:
        """Create a key. It is shown only once."""
        limits, models = limits_in(body), models_in(body.models)
        expires = time_in(body.expires, self.books.store.time())
        return await self._accounts.add_key(
            account.id, body.label, expires, limits, actor.name, models
        )

    @operation("POST", "/keys/{key}/revoke", least="owner", answer=KeyRevoked)
    async def revoke_key(self, actor: Actor, key: KeyShown, body: Revocation) -> KeyRevoked:
        """Revoke a key. Takes effect on its next request."""
        revoked = await self._accounts.revoke_key(key.id, body.compromised, actor.name)
        cut = self._running.cut(key.id) if body.compromised else 0
        return KeyRevoked(**asdict(revoked), cut=cut)

    @operation("POST", "/keys/{key}/rotate", least="owner", answer=KeyAdded)
    async def rotate_key(self, actor: Actor, key: KeyShown, body: Rotation) -> KeyAdded:
        """Replace a key with a new one. The old one stops working after the overlap; both share one
        budget."""
        overlap = 0 if body.overlap == "0" else parse_duration(body.overlap)
        return await self._accounts.rotate_key(key.id, overlap, actor.name)

    # Prices

    @operation("GET", "/prices", least="operator", answer=PriceList)
    async def list_prices(self) -> PriceList:
        """List past, current and coming prices."""
        rows = self.books.prices.rows(self.books.store.time())
        return PriceList([row async for row in with_turns(rows)])

    @operation("GET", "/accounts/{account}/prices", "/me/prices", least="key", answer=PriceList)
    async def account_prices(self, account: Account) -> PriceList:
        """List current and coming prices."""
        rows = with_turns(self.books.prices.rows(self.books.store.time()))
        return PriceList([row.for_account() async for row in rows if row.status != "past"])

    @operation("GET", "/prices/which", least="operator", answer=WhichPrice)
    async def which_price(self, query: WhichPriceQuery) -> WhichPrice:
        """Show which price applies to a request, and why other matching prices don't."""
        now = self.books.store.time()
        at = time_in(query.at, now) or now
        return which_price(self.books, query.model, at, query.tier, query.input_tokens)

    @operation("POST", "/prices", least="operator", answer=PricesAdded)
    async def add_prices(self, actor: Actor, body: NewPrices) -> PricesAdded:
        """Add prices, all or none. The answer says which models they apply to."""
        if body.currency not in (None, self.books.currency):
            raise UserError(
                f"prices are in {body.currency}, but billing.currency is {self.books.currency}"
            )
        return await add_prices(
            self.books,
            prices_of(body, self.books.store.time()),
            without_notice=body.without_notice,
            by=actor.name,
            take_over=body.take_over,
            listed=self._running.listed_models(),
        )

    # Payments and statements

    @operation("GET", "/payments", least="operator", answer=PaymentList)
    async def list_payments(self) -> PaymentList:
        """List all payments."""
        return PaymentList(await self.books.payments(None))

    @operation(
        "GET", "/accounts/{account}/payments", "/me/payments", least="key", answer=PaymentList
    )
    async def account_payments(self, actor: Actor, account: Account) -> PaymentList:
        """List an account's payments."""
        payments = await self.books.payments(account)
        if actor.rank != "operator":
            payments = [each.for_account() async for each in with_turns(payments)]
        return PaymentList(payments)

    @operation("POST", "/accounts/{account}/payments", least="operator", answer=PaymentAdded)
    async def add_payment(self, actor: Actor, account: Account, body: NewPayment) -> PaymentAdded:
        """Record a payment or, with a negative amount, a refund."""
        payment = await self.books.pay(
            account,
            parse_amount(body.amount),
            reference=body.reference,
            reason=body.reason,
            by=actor.name,
        )
        money = await self.books.balance(account)
        return PaymentAdded(**asdict(payment), balance=money.balance)

    @operation("GET", "/accounts/{account}/statements", least="viewer", answer=MonthList)
    async def list_months(self, account: Account) -> MonthList:
        """List the months for which an account has a statement."""
        return MonthList(await months(self.books, account))

    @operation(
        "GET",
        "/accounts/{account}/statements/{month}",
        "/me/statements/{month}",
        least="key",
        answer=Statement,
    )
    async def statement(self, account: Account, month: str, query: StatementQuery) -> Statement:
        """Show an account's statement for a month."""
        try:
            wanted = parse_month(month)
        except UserError as error:
            raise Invalid(str(error)) from None
        return await statement(self.books, account, wanted, query.limit)

    @operation("GET", "/me/balance", least="key", answer=Balance)
    async def balance(self, account: Account) -> Balance:
        """Show an account's current balance and budget."""
        return await self.books.balance(account)

    # Notices

    @operation("GET", "/notices", least="operator", answer=NoticeList)
    async def list_notices(self) -> NoticeList:
        """List all notices, past and withdrawn ones included."""
        return NoticeList(await self.books.notices.all())

    @operation("GET", "/accounts/{account}/notices", "/me/notices", least="key", answer=NoticeList)
    async def account_notices(self, account: Account) -> NoticeList:
        """List current and coming notices for an account."""
        return NoticeList(await self.books.notices.current(account.id))

    @operation("POST", "/notices", least="operator", answer=Notice)
    async def add_notice(self, actor: Actor, body: NewNotice) -> Notice:
        """Publish a notice."""
        now = self.books.store.time()
        effective = time_in(body.effective, now)
        return await self.books.notices.add(
            body.kind,
            body.text,
            now if effective is None else effective,
            time_in(body.until, now),
            actor.name,
            body.refuses_requests,
        )

    @operation("POST", "/notices/{notice}/withdraw", least="operator", answer=NoticeWithdrawn)
    async def withdraw_notice(self, actor: Actor, notice: str) -> NoticeWithdrawn:
        """Withdraw a notice."""
        withdrawn = await self.books.notices.withdraw(notice, actor.name)
        return NoticeWithdrawn(**asdict(withdrawn))

    # Users

    @operation("GET", "/users", least="owner", answer=UserList)
    async def list_users(self, actor: Actor, query: UsersQuery) -> UserList:
        """List logins. An owner sees the members of the own account."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self._account(actor, query.account)).id
        return UserList(await self.users.all(account_id, query.role))

    @operation("POST", "/users", least="owner", answer=UserAdded)
    async def add_user(self, actor: Actor, body: NewUser) -> UserAdded:
        """Add a login and return a one-time link to set its password."""
        if actor.account_id and body.role == "operator":
            raise Forbidden("only an operator can add an operator")
        if (body.role == "operator") == bool(body.account or actor.account_id):
            raise UserError("an operator has no account; an owner or viewer needs one")
        account_id = None
        if body.role != "operator":
            account_id = (await self._account(actor, body.account)).id
        return self._with_link(await self.users.add(body.email, body.role, account_id, actor.name))

    def _with_link(self, user: UserAdded) -> UserAdded:
        return replace(user, link=f"{self.dashboard_url}link/{user.link}")

    @operation("DELETE", "/users/{user}", least="owner", answer=UserShown)
    async def remove_user(self, actor: Actor, user: str, query: WhichUser) -> UserShown:
        """Remove a login, by id or email address, and end its sessions."""
        found = await self._another(actor, user, query)
        return await self.users.remove(found.id, actor.name)

    @operation("POST", "/users/{user}/reset", least="owner", answer=UserAdded)
    async def reset_user(self, actor: Actor, user: str, query: WhichUser) -> UserAdded:
        """Invalidate a login's password and sessions and return a new one-time link."""
        found = await self._another(actor, user, query)
        return self._with_link(await self.users.reset(found.id, actor.name))

    async def _another(self, actor: Actor, user: str, query: WhichUser) -> UserShown:
        """Not oneself, or nobody would have to know the old password for a new one."""
        found = await self._user(actor, user, query)
        if actor.session and actor.session.user_id == found.id:
            raise Conflict("you can't remove or reset your own login; ask somebody else to")
        return found

    @staticmethod
    def _session(actor: Actor) -> LoginSession:
        if actor.session is None:
            raise NotFound("this needs a dashboard session; log in at /dashboard/login")
        return actor.session

    @operation("POST", "/login/password", least="viewer", answer=Done)
    async def change_password(self, actor: Actor, body: NewPassword) -> Done:
        """Change your password. All your sessions end."""
        session = self._session(actor)
        old, new = body.old_password, body.new_password
        await self.users.change_password(session, old, new, actor.network)
        return Done(ok=True)

    @operation("GET", "/login/sessions", least="viewer", answer=SessionList)
    async def list_sessions(self, actor: Actor) -> SessionList:
        """List your active sessions."""
        session = self._session(actor)
        return SessionList(await self.users.sessions(session.user_id, session.id))

    @operation("DELETE", "/login/sessions/{session}", least="viewer", answer=Done)
    async def end_session(self, actor: Actor, session: str) -> Done:
        """End one of your sessions."""
        if not await self.users.end_session(session, self._session(actor).user_id):
            raise NotFound("this session does not exist or has ended")
        return Done(ok=True)

    # Usage

    async def _range(self, actor: Actor, query: UsageQuery) -> Range:
        """Raises NotFound for what is another's as for what never was."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self._account(actor, query.account)).id
        if query.key is not None and actor.account_id is not None:
            await self._key(actor, query.key)
        wanted = Range(account=account_id, key=query.key, model=query.model)
        given: dict[str, Any] = {}
        now = self.books.store.time()
        if query.since:
            given["since"] = parse_time(query.since, now, relative_to_past=True)
        if query.until:
            given["until"] = parse_time(query.until, now, relative_to_past=True)
        return msgspec.structs.replace(wanted, **given)

    @operation("GET", "/usage", "/me/usage", least="key", answer=UsageReport)
    async def usage(self, actor: Actor, query: SumsQuery) -> UsageReport:
        """Sum usage by group, and in total."""
        wanted, books = await self._range(actor, query), self.books
        names = list(dict.fromkeys(query.group_by.split(","))) if query.group_by else []
        async with books.store.snapshot() as snapshot:
            groups = await usage_by(snapshot, wanted, names, books.currency, query.top)
            totals = groups
            if names:
                totals = await usage_by(snapshot, wanted, [], books.currency)
        return UsageReport(groups=groups if names else [], totals=totals[0])

    @operation("GET", "/requests", "/me/requests", least="key", answer=RequestReport)
    async def requests(
        self, actor: Actor, query: RequestsQuery
    ) -> AsyncIterator[bytes] | RequestReport:
        """List requests, and their totals."""
        wanted, limit = await self._range(actor, query), query.limit or -1
        if query.before:
            wanted = await older_than(self.books.store, wanted, query.before)
        if actor.key is None and actor.session is None:
            return self._report(msgspec.structs.replace(wanted, limit=limit))
        wanted = msgspec.structs.replace(wanted, limit=min(query.limit or 100, MAX_ROWS))
        currency = self.books.currency
        async with self.books.store.snapshot() as snapshot:
            rows = await requests_in(snapshot, wanted, currency)
            (totals,) = await usage_by(snapshot, wanted, [], currency)
        return RequestReport(requests=rows, totals=totals)

    async def _report(self, wanted: Range) -> AsyncIterator[bytes]:
        """Rows, then their totals, all of one instant. They are copied first, so that a client that
        reads slowly keeps no snapshot open."""
        currency = self.books.currency
        async with contextlib.AsyncExitStack() as stack:
            async with self.books.store.snapshot(outlived_by=stack) as snapshot:
                rows = await copy_requests(snapshot, wanted, currency)
                (totals,) = await usage_by(snapshot, wanted, [], currency)
            yield b'{"requests":['
            comma = b""
            async for row in rows:
                yield comma + msgspec.json.encode(row)
                comma = b",\n"
            yield b'],"totals":' + msgspec.json.encode(totals) + b"}"

    # An account's own figures

    async def _limits_and_budgets(self, key: Key) -> dict[str, Any]:
        budgets = await self.books.budgets(key)
        found = self._running.limits_of_key(key)
        return {
            whose: {**limits, "monthly_budget": budgets[whose]} for whose, limits in found.items()
        }

    @staticmethod
    def _shown_key(actor: Actor) -> Key:
        if actor.key is None:
            raise NotFound("this needs an API key in the Authorization header")
        return actor.key

    @operation("GET", "/me", least="key", answer=MeShown)
    async def me(self, actor: Actor, account: Account) -> MeShown:
        """Show your balance, limits and notices. Needs an API key."""
        key = self._shown_key(actor)
        return MeShown(
            account=account.name,
            account_id=account.id,
            key_id=key.id,
            balance=await self.books.balance(account),
            limits=await self._limits_and_budgets(key),
            notices=await self.books.notices.current(account.id),
        )

    @operation("GET", "/me/limits", least="key", answer=dict[str, Any])
    async def limits(self, actor: Actor) -> dict[str, Any]:
        """Show your current limits and budgets and what is left of them. Needs an API key."""
        return await self._limits_and_budgets(self._shown_key(actor))

    # The whole

    @operation("GET", "/overview", least="operator", answer=Overview)
    async def overview(self, query: OverviewQuery) -> Overview:
        """Show traffic, spending, upstreams and free disk space."""
        books = self.books
        return Overview(
            **asdict(self._running.at_work()),
            traffic=await traffic(books, query.days),
            spending=await spending_overview(books, query.limit),
            lately=await lately(books),
            database=database_size(books),
        )

    @operation("GET", "/changes", least="operator", answer=ChangeList)
    async def list_changes(self, actor: Actor, query: ChangesQuery) -> ChangeList:
        """List administrative changes: who, when, what, before and after."""
        account_id = None
        if query.account is not None:
            account_id = (await self._account(actor, query.account)).id
        changes = changes_module.changes(self.books.store, account_id, query.before, query.limit)
        return ChangeList(await changes)

    @operation("POST", "/db/check", least="operator", answer=Check)
    async def check_database(self) -> Check:
        """Check the whole database for damage."""
        problems = await check_database(self.books.store)
        return Check(ok=not problems, problems=problems)

    @operation("POST", "/db/set-time", least="operator", answer=TimeSet)
    async def set_time(self, actor: Actor, body: NewTime) -> TimeSet:
        """Move ledger entries dated after a time to that time."""
        at, now = time_to_set(self.books.store, body.time)
        if body.preview:
            return await preview(self.books.store, at, now)
        done = await set_time(self.books, at, now, actor.name)
        self._running.set_back(at)
        return done


def database_size(books: Billing) -> DatabaseSize:
    """Return the size of the database and the room on its disk, in bytes."""
    store = books.store
    size = file_size(store.path) + store.wal_bytes
    disk = shutil.disk_usage(store.path.parent)
    return DatabaseSize(bytes=size, free_bytes=disk.free, disk_bytes=disk.total)


def prices_of(body: NewPrices, now: int) -> list[Price]:
    """Return the prices; durations count from `now`, the ledger's time. Raises UserError for a
    rate that is none."""
    return [
        price_of(each, model, body.source, now)
        for each in body.prices
        for model in ([each.model] if isinstance(each.model, str) else each.model)
    ]


def price_of(given: NewPrice, model: str, source: str | None, now: int) -> Price:
    """Return one price, as `prices_of` does. Raises UserError for a rate that is none."""
    if not model.isprintable():
        raise UserError(f"{model!r} is not a model name or pattern")
    rates: dict[str, Any] = {}
    for name in RATES:
        rate = getattr(given, name)
        if rate is not None:
            rates[name] = parse_amount(rate)
            most = MAX_CALL_RATE if name in UNITS else MAX_RATE
            if not 0 <= rates[name] <= most:
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


OPERATIONS = [each for each in vars(API).values() if isinstance(each, Operation)]
