"""The admin API: /admin/v1/…, JSON in and out. All that people do goes through it.

The commands reach it over the Unix socket beside the database (mode 0600: who may open it could
open the database itself), on a stopped gateway within their own process; the dashboard's pages call
the same operations directly; a browser that is logged in reaches it on the public port, and with an
API key /admin/v1/me. So there is one place that says who may do what, and what is well formed.

An operation is a method of API with a decorator. What it takes is told by its parameters' names:
`account` and `key` are those of the path, looked up, and only ever the actor's own unless he is an
operator; `body` and `query` are read strictly into their types; others are parts of the path.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import shutil
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_type_hints

import msgspec
import orjson
from msgspec import UNSET, Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import redbtc_billing as billing
import redbtc_ledger as ledger
import redbtc_reports as reports
from redbtc_billing import Books, Price
from redbtc_ledger import Accounts, Key, Record
from redbtc_reports import Range
from redbtc_set_time import preview, set_time, time_to_set
from redbtc_settings import (
    MONTH,
    NANOS,
    UNLIMITED,
    Conflict,
    LedgerError,
    LedgerUnavailable,
    NotFound,
    parse_amount,
    parse_duration,
    parse_limit,
    parse_month,
    parse_time,
)
from redbtc_shapes import (
    MEANT,
    Account,
    AccountChange,
    AccountList,
    AccountsQuery,
    AccountWithMoney,
    Balance,
    ChangeList,
    ChangesQuery,
    Check,
    Done,
    KeyAdded,
    KeyList,
    KeyRevoked,
    MeShown,
    MonthList,
    NewAccount,
    NewKey,
    NewNotice,
    NewPassword,
    NewPayment,
    NewPrice,
    NewPrices,
    NewTime,
    NewUser,
    Nothing,
    Notice,
    NoticeList,
    NoticeWithdrawn,
    Overview,
    OverviewQuery,
    PaymentAdded,
    PaymentList,
    PriceList,
    PricesAdded,
    Refused,
    RequestReport,
    RequestsQuery,
    Revocation,
    Rotation,
    SessionList,
    Statement,
    StatementQuery,
    SumsQuery,
    Suspension,
    Throttle,
    TimeSet,
    UsageQuery,
    UsageReport,
    UserAdded,
    UserList,
    UserShown,
    UsersQuery,
    WhichPrice,
    WhichPriceQuery,
    WhichUser,
)
from redbtc_slices import with_turns
from redbtc_store import size_of
from redbtc_users import Busy, Later, Session, TooMany, Users

# ── Who ──────────────────────────────────────────────────────────────────────────────────────────

Rank = Literal["key", "viewer", "owner", "operator"]
RANKS = {"key": 0, "viewer": 1, "owner": 2, "operator": 3}
WHO = b"redbtc-user"  # the header with which a command says who gives it


class Actor(NamedTuple):
    """Who wants something: a holder of a key, a member of an account, an operator."""

    name: str
    rank: Rank
    account_id: str | None = None  # None: all
    key: Key | None = None
    session: Session | None = None
    network: str = ""


class Invalid(LedgerError):
    """What was sent is not of the form that is asked for; the message names the place, `field` the
    member, where it is about one."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(f"{what} - at `{place}`" if place else what)
        self.what = what
        self.field = place.rpartition(".")[2]


class TooLarge(LedgerError):
    """A body of more bytes than are wanted."""


class Forbidden(LedgerError):
    """Not for this actor, who may know that it is there."""


class Unauthorized(LedgerError):
    """Nobody is logged in, or shows a key."""


class Running(Protocol):
    """What is shown of the gateway at work, which it gives at assembly."""

    @property
    def example_model(self) -> str:
        """The one that examples name."""

    def serves(self, model: str) -> bool:
        """Whether an upstream is there for it."""

    def listed_models(self) -> set[str]:
        """Return the models that upstreams have listed so far."""

    def limits_of_key(self, key: Key) -> Record:
        """The limits in force for a key and its account, and what is left of them."""

    def limits_of_account(self, account: Record) -> Record:
        """Those of an account."""

    def cut(self, key_id: str) -> int:
        """End all that runs for a key; how many requests that were."""

    def set_back(self, at: int) -> None:
        """Let nothing that runs have begun later than `at`: the ledger's time is set back."""

    def at_work(self) -> Record:
        """Requests in flight and queued, what was refused, each upstream."""


class Stopped:
    """A gateway that does not run: the operations are those of a command's own process."""

    example_model = ""

    def serves(self, _: str) -> bool:
        """Nothing is."""
        return False

    def listed_models(self) -> set[str]:
        """Return no models, since no upstream was asked."""
        return set()

    def limits_of_key(self, _: Key) -> Record:
        """Unknown: they are those of its settings."""
        return {}

    def limits_of_account(self, _: Record) -> Record:
        """Unknown, too."""
        return {}

    def cut(self, _: str) -> int:
        """Nothing runs."""
        return 0

    def set_back(self, _: int) -> None:
        """Nothing runs."""

    def at_work(self) -> Record:
        """Nothing."""
        return {"running": False, "in_flight": 0, "queued": 0, "uptime_seconds": 0} | {
            "refusals": {},
            "upstreams": [],
        }


# ── Operations ───────────────────────────────────────────────────────────────────────────────────

Wanted = TypeVar("Wanted", bound=Struct)
Perform = Callable[..., Awaitable[Any]]
PREFIX = "/admin/v1"
MOST_ROWS = 1000  # requests that a browser or a key gets at once
PART_BYTES = 64 << 10
MOST_BODY_BYTES = 4 << 20  # of an operator: a list of thousands of prices
MAX_MEMBERS_BODY = 64 << 10  # of others; 4 MB of JSON take 100 ms to read
MAX_FIELDS = 100  # of a query or a form


class Operation:
    """One thing that can be done, as its method is decorated."""

    def __init__(
        self, method: str, paths: tuple[str, ...], least: Rank, answer: Any, perform: Perform
    ) -> None:
        self.method = method
        self.paths = paths
        self.least = least
        self.answer = answer
        self.status = 201 if method == "POST" and answer in ADDED else 200
        self.perform = perform
        self.name = perform.__name__
        self.summary = " ".join((perform.__doc__ or "").split())
        hints = get_type_hints(perform)
        self.parameters = [name for name in inspect.signature(perform).parameters if name != "self"]
        self.body: type[Struct] = hints.get("body", Nothing)
        self.query: type[Struct] = hints.get("query", Nothing)


ADDED = (KeyAdded, PricesAdded, PaymentAdded, UserAdded, Notice, AccountWithMoney)


def operation(method: str, *paths: str, least: Rank, answer: Any) -> Callable[[Perform], Operation]:
    """Makes a method of API an operation at `paths` for whoever has this rank or a higher one."""

    def decorate(perform: Perform) -> Operation:
        return Operation(method, paths, least, answer, perform)

    return decorate


ACCOUNT_ID = re.compile(r"acct_[0-9a-f]{16}")
# What msgspec says, and what people would.
PLAIN = (
    (r"^Expected `int( \| null)?`", "Expected a whole number"),
    (r"^Expected `(\w+)( \| null)?` of length <= (\d+)", r"Expected at most \3 characters"),
    (r"^Expected `array( \| null)?` of length >= (\d+)", r"Expected a list of \2 or more"),
    (r"^Expected `(\w+)( \| null)?` of length >= (\d+)", r"Expected \3 or more characters"),
    (r"^Expected `str( \| null)?`", "Expected text"),
    (r"^(Expected a whole number) >= (-?\d+)", r"\1 from \2"),
    (r"^(Expected a whole number) <= (\d+)", r"\1 up to \2"),
)
FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


def invalid(error: Exception) -> Invalid:
    """msgspec's message; of a member that is unknown or missing it has the whole path, and for a
    pattern or a type what people call that."""
    what, at, place = str(error).partition(" - at `")
    place = place[:-1] if at else "$"
    for pattern, meant in MEANT.items():
        what = what.replace(f"`str` matching regex {pattern!r}", meant)
    if field := FIELD.fullmatch(what):
        place = f"{place}.{field[1]}"
    for said, plain in PLAIN:
        what = re.sub(said, plain, what)
    return Invalid(what, place if place != "$" else "")


def whole(number: str) -> int | float:
    """456.0 is an integer where JSON Schema is asked (2020-12, Core §4.2.3)."""
    found = float(number)
    return int(found) if found.is_integer() else found


JSON = msgspec.json.Decoder(float_hook=whole)


def decoded(body: bytes, wanted: type[Wanted]) -> Wanted:
    """A JSON body. Raises Invalid."""
    try:
        return msgspec.convert(JSON.decode(body or b"{}"), wanted)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(error) from None


def converted(values: Mapping[str, Any], wanted: type[Wanted]) -> Wanted:
    """What a query or a form says: all of it text. Raises Invalid."""
    try:
        return msgspec.convert(dict(values), wanted, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from None


def limits_in(body: Struct) -> dict[str, Any]:
    """What was said of an account or a key, its money as the ledger has it. No budget is none."""
    said = msgspec.structs.asdict(body)
    limits = {name: value for name, value in said.items() if value is not UNSET}
    for name in ("credit_limit", "monthly_budget"):
        if isinstance(limits.get(name), str):
            limits[name] = parse_limit(limits[name])
    if limits.get("monthly_budget") == UNLIMITED:
        limits["monthly_budget"] = None
    return limits


MOST_PATTERNS = 100
# Each request of a key may compile all its patterns: fnmatch remembers only 256. A '[' without an
# end is looked for its end up to the pattern's.
MAX_PATTERNS_LENGTH = 4000  # characters of all patterns of a key, with commas
MAX_WILDCARDS = 10  # characters *, ? and [ of a pattern


def models_in(given: str | tuple[str, ...] | None) -> str | None:
    """The patterns that a key is limited to, as the ledger has them; None: to none. Raises
    LedgerError."""
    if given is None:
        return None
    # Each request of the key is held against all of them.
    patterns = [each.strip() for each in (given.split(",") if isinstance(given, str) else given)]
    for pattern in patterns:
        if not pattern or "," in pattern or not pattern.isprintable():
            raise LedgerError(
                f"{pattern!r} is not a pattern of models; write it like gpt-5*,codex*"
            )
    if len(patterns) > MOST_PATTERNS:
        raise LedgerError(f"a key has at most {MOST_PATTERNS} patterns of models")
    joined = ",".join(patterns)
    if len(joined) > MAX_PATTERNS_LENGTH:
        raise LedgerError(
            f"a key's patterns of models have at most {MAX_PATTERNS_LENGTH} characters"
        )
    if any(sum(map(each.count, "*?[")) > MAX_WILDCARDS for each in patterns):
        raise LedgerError(
            f"a pattern of models has at most {MAX_WILDCARDS} of the characters * ? ["
        )
    return joined


def time_in(text: str | None, now: int) -> int | None:
    """A time, or a duration from `now` (milliseconds). Raises LedgerError."""
    return parse_time(text, now, relative_to_past=False) if text else None


class API:
    """What can be done, and who may. `public_url` is where browsers find the gateway."""

    def __init__(self, books: Books, running: Running, public_url: str) -> None:
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
            allowed = not patterns or billing.matches(name, patterns)
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
        values, as a form has them, is read as such. Raises LedgerError."""
        path = path or {}
        if RANKS[actor.rank] < RANKS[operation.least]:
            raise Forbidden("this is not for your role")
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

    async def _account(self, actor: Actor, name: str | None) -> Record:
        """The one that is meant, where it is the actor's to know of."""
        if name is None:
            if actor.account_id is None:
                raise NotFound("this is for the holder of an API key")
            name = actor.account_id
        account = await self._accounts.show(name)
        if actor.account_id not in (None, account["id"]):
            raise ledger.no_account(name)
        return account

    async def _key(self, actor: Actor, key_id: str) -> Record:
        key = await self._accounts.key(key_id)
        if actor.account_id not in (None, key["account_id"]):
            raise ledger.no_key(key_id)
        return key

    async def _user(self, actor: Actor, name: str, query: WhichUser) -> Record:
        """Of several logins of one address a member only ever means, and learns of, his account's.
        Raises NotFound, Conflict."""
        no_user = NotFound(f"there is no user {name!r}")
        account, operator = query.account, query.operator
        if actor.account_id is not None:
            own = await self._accounts.show(actor.account_id)
            if operator or account not in (None, own["name"]):
                raise no_user
            account = own["name"]
        user = await self.users.named(name, account, operator)
        if actor.account_id not in (None, user["account_id"]):
            raise no_user
        return user

    # Accounts

    async def _with_money(self, account: Record, actor: Actor) -> Record:
        limits = account["credit_limit"], account["monthly_budget"]
        money = await self.books.balance(account["id"], *limits)
        hidden = () if actor.rank == "operator" else ("status_reason",)
        shown = {name: value for name, value in account.items() if name not in hidden}
        return {**shown, **{name: money[name] for name in MONEY_SHOWN}}

    @operation("GET", "/accounts", least="operator", answer=AccountList)
    async def list_accounts(self, query: AccountsQuery) -> Record:
        """All accounts, or those that are searched for."""
        found = await reports.list_accounts(
            self.books, query.search, query.after, query.limit or -1
        )
        return {"accounts": found}

    @operation("POST", "/accounts", least="operator", answer=AccountWithMoney)
    async def add_account(self, actor: Actor, body: NewAccount) -> Record:
        """Add an account."""
        if ACCOUNT_ID.fullmatch(body.name):  # where either will do, it would be taken for another's
            raise LedgerError(f"{body.name!r} has the form of an account's id; take another name")
        limits = limits_in(body)
        account = await self._accounts.add(body.name, body.email, limits, actor.name)
        return await self._with_money(account, actor)

    @operation("GET", "/accounts/{account}", least="viewer", answer=AccountWithMoney)
    async def show_account(self, actor: Actor, account: Record) -> Record:
        """One account, by its name or id."""
        return await self._with_money(account, actor)

    @operation("PATCH", "/accounts/{account}", least="operator", answer=AccountWithMoney)
    async def set_account(self, actor: Actor, account: Record, body: AccountChange) -> Record:
        """Change an account, from its next request on."""
        changed = await self._accounts.set(account["id"], limits_in(body), actor.name)
        return await self._with_money(changed, actor)

    @operation("POST", "/accounts/{account}/suspend", least="operator", answer=Account)
    async def suspend_account(self, actor: Actor, account: Record, body: Suspension) -> Record:
        """Refuse its requests from the next one on, and log its members out."""
        return await self._accounts.suspend(account["id"], body.reason, actor.name)

    @operation("POST", "/accounts/{account}/resume", least="operator", answer=Account)
    async def resume_account(self, actor: Actor, account: Record) -> Record:
        """Serve a suspended account again."""
        return await self._accounts.resume(account["id"], actor.name)

    @operation("POST", "/accounts/{account}/throttle", least="operator", answer=Account)
    async def throttle_account(self, actor: Actor, account: Record, body: Throttle) -> Record:
        """Hold an account to a part of its limits, for a time or until that is lifted."""
        factor = parse_amount(body.factor if body.factor[0] != "." else f"0{body.factor}")
        now = self.books.store.time()
        until = time_in(body.until, now)
        if until is not None and until <= now:
            raise LedgerError("a throttle must end later than now")
        thousandths = factor // (NANOS // 1000)
        if thousandths == 1000:
            return await self._accounts.throttle(account["id"], None, None, actor.name)
        return await self._accounts.throttle(account["id"], thousandths, until, actor.name)

    @operation("GET", "/accounts/{account}/limits", least="viewer", answer=dict[str, Any])
    async def account_limits(self, account: Record) -> Record:
        """The limits in force and what is left of them, while the gateway runs."""
        return self._running.limits_of_account(account)

    # Keys

    @operation("GET", "/accounts/{account}/keys", least="viewer", answer=KeyList)
    async def list_keys(self, account: Record) -> Record:
        """An account's keys."""
        return {"keys": await self._accounts.keys(account["id"])}

    @operation("POST", "/accounts/{account}/keys", least="owner", answer=KeyAdded)
    async def add_key(self, actor: Actor, account: Record, body: NewKey) -> Record:
        """Add a key; it is shown this once."""
        limits, models = limits_in(body), models_in(body.models)
        expires = time_in(body.expires, self.books.store.time())
        return await self._accounts.add_key(
            account["id"], body.label, expires, limits, actor.name, models
        )

    @operation("POST", "/keys/{key}/revoke", least="owner", answer=KeyRevoked)
    async def revoke_key(self, actor: Actor, key: Record, body: Revocation) -> Record:
        """Refuse a key from the next request on."""
        revoked = await self._accounts.revoke_key(key["id"], body.compromised, actor.name)
        return {**revoked, "cut": self._running.cut(key["id"]) if body.compromised else 0}

    @operation("POST", "/keys/{key}/rotate", least="owner", answer=KeyAdded)
    async def rotate_key(self, actor: Actor, key: Record, body: Rotation) -> Record:
        """Add a key like the old one, which ends after the overlap. They share one budget."""
        overlap = 0 if body.overlap == "0" else parse_duration(body.overlap)
        return await self._accounts.rotate_key(key["id"], overlap, actor.name)

    # Prices

    @operation("GET", "/prices", least="operator", answer=PriceList)
    async def list_prices(self) -> Record:
        """Past, current and coming prices."""
        rows = self.books.prices.rows(self.books.store.time())
        return {"prices": [row async for row in with_turns(rows)]}

    @operation("GET", "/accounts/{account}/prices", "/me/prices", least="key", answer=PriceList)
    async def account_prices(self, account: Record) -> Record:
        """The prices in force and coming."""
        rows = with_turns(self.books.prices.rows(self.books.store.time()))
        shown = [
            billing.for_account(row, "reason") async for row in rows if row["status"] != "past"
        ]
        return {"prices": shown}

    @operation("GET", "/prices/which", least="operator", answer=WhichPrice)
    async def which_price(self, query: WhichPriceQuery) -> Record:
        """Which price applies to a request, which others match its model and why they don't."""
        now = self.books.store.time()
        at = time_in(query.at, now) or now
        return self.books.which(query.model, at, query.tier, query.input_tokens)

    @operation("POST", "/prices", least="operator", answer=PricesAdded)
    async def add_prices(self, actor: Actor, body: NewPrices) -> Record:
        """Add prices, all or none; say which models they apply to and what they leave out."""
        if body.currency not in (None, self.books.currency):
            raise LedgerError(f"these prices are in {body.currency}, not in {self.books.currency}")
        return await self.books.add_prices(
            prices_of(body, self.books.store.time()),
            without_notice=body.without_notice,
            by=actor.name,
            take_over=body.take_over,
            listed=self._running.listed_models(),
        )

    # Payments and statements

    @operation("GET", "/payments", least="operator", answer=PaymentList)
    async def list_payments(self) -> Record:
        """All payments."""
        return {"payments": await self.books.payments(None)}

    @operation(
        "GET", "/accounts/{account}/payments", "/me/payments", least="key", answer=PaymentList
    )
    async def account_payments(self, actor: Actor, account: Record) -> Record:
        """An account's payments."""
        payments = await self.books.payments(account)
        if actor.rank != "operator":
            payments = [billing.for_account(each) async for each in with_turns(payments)]
        return {"payments": payments}

    @operation("POST", "/accounts/{account}/payments", least="operator", answer=PaymentAdded)
    async def add_payment(self, actor: Actor, account: Record, body: NewPayment) -> Record:
        """Write down a payment of an account, or with a negative amount a refund."""
        payment = await self.books.pay(
            account,
            parse_amount(body.amount),
            reference=body.reference,
            reason=body.reason,
            by=actor.name,
        )
        money = await self.books.balance(account["id"], account["credit_limit"], None)
        return {**payment, "balance": money["balance"]}

    @operation("GET", "/accounts/{account}/statements", least="viewer", answer=MonthList)
    async def list_months(self, account: Record) -> Record:
        """The months that an account has statements of."""
        return {"months": await reports.months(self.books, account)}

    @operation(
        "GET",
        "/accounts/{account}/statements/{month}",
        "/me/statements/{month}",
        least="key",
        answer=Statement,
    )
    async def statement(self, account: Record, month: str, query: StatementQuery) -> Record:
        """An account's month."""
        try:
            wanted = parse_month(month)
        except LedgerError as error:
            raise Invalid(str(error)) from None
        return await reports.statement(self.books, account, wanted, query.limit)

    @operation("GET", "/me/balance", least="key", answer=Balance)
    async def balance(self, account: Record) -> Record:
        """An account's money now."""
        return await self.books.balance(
            account["id"], account["credit_limit"], account["monthly_budget"]
        )

    # Notices

    @operation("GET", "/notices", least="operator", answer=NoticeList)
    async def list_notices(self) -> Record:
        """All notices there ever were."""
        return {"notices": await self.books.notices()}

    @operation("GET", "/accounts/{account}/notices", "/me/notices", least="key", answer=NoticeList)
    async def account_notices(self, account: Record) -> Record:
        """The notices in force and coming that an account is told."""
        return {"notices": await self.books.notices_now(account["id"])}

    @operation("POST", "/notices", least="operator", answer=Notice)
    async def add_notice(self, actor: Actor, body: NewNotice) -> Record:
        """Add a notice."""
        now = self.books.store.time()
        effective = time_in(body.effective, now)
        return await self.books.add_notice(
            body.kind,
            body.text,
            now if effective is None else effective,
            time_in(body.until, now),
            actor.name,
            body.refuses_requests,
        )

    @operation("POST", "/notices/{notice}/withdraw", least="operator", answer=NoticeWithdrawn)
    async def withdraw_notice(self, actor: Actor, notice: str) -> Record:
        """Show a notice to nobody any more."""
        return await self.books.withdraw_notice(notice, actor.name)

    # Users

    @operation("GET", "/users", least="owner", answer=UserList)
    async def list_users(self, actor: Actor, query: UsersQuery) -> Record:
        """All who may log in; of an account's owner the account's members."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self._account(actor, query.account))["id"]
        return {"users": await self.users.all(account_id, query.role)}

    @operation("POST", "/users", least="owner", answer=UserAdded)
    async def add_user(self, actor: Actor, body: NewUser) -> Record:
        """Add a user, and answer the link with which they set a password."""
        if actor.account_id and body.role == "operator":
            raise Forbidden("only operators make operators")
        if (body.role == "operator") == bool(body.account or actor.account_id):
            raise LedgerError("a user is an operator, or belongs to an account")
        account_id = None
        if body.role != "operator":
            account_id = (await self._account(actor, body.account))["id"]
        return self._with_link(await self.users.add(body.email, body.role, account_id, actor.name))

    def _with_link(self, user: Record) -> Record:
        return {**user, "link": f"{self.dashboard_url}link/{user['link']}"}

    @operation("DELETE", "/users/{user}", least="owner", answer=UserShown)
    async def remove_user(self, actor: Actor, user: str, query: WhichUser) -> Record:
        """Remove a user, by id or address, and log them out."""
        found = await self._another(actor, user, query)
        return await self.users.remove(found["id"], actor.name)

    @operation("POST", "/users/{user}/reset", least="owner", answer=UserAdded)
    async def reset_user(self, actor: Actor, user: str, query: WhichUser) -> Record:
        """End a user's password and sessions, and answer a new link."""
        found = await self._another(actor, user, query)
        return self._with_link(await self.users.reset(found["id"], actor.name))

    async def _another(self, actor: Actor, user: str, query: WhichUser) -> Record:
        """Not oneself, or nobody would have to know the old password for a new one."""
        found = await self._user(actor, user, query)
        if actor.session and actor.session.user_id == found["id"]:
            raise Conflict("this is your own login; only somebody else can end it")
        return found

    @staticmethod
    def _session(actor: Actor) -> Session:
        if actor.session is None:
            raise NotFound("this is for whoever is logged in")
        return actor.session

    @operation("POST", "/login/password", least="viewer", answer=Done)
    async def change_password(self, actor: Actor, body: NewPassword) -> Record:
        """Change one's password; all one's sessions end."""
        session = self._session(actor)
        old, new = body.old_password, body.new_password
        await self.users.change_password(session, old, new, actor.network)
        return {"ok": True}

    @operation("GET", "/login/sessions", least="viewer", answer=SessionList)
    async def list_sessions(self, actor: Actor) -> Record:
        """Where one is logged in."""
        session = self._session(actor)
        found = await self.users.sessions(session.user_id)
        return {"sessions": [{**each, "this": each["id"] == session.id} for each in found]}

    @operation("DELETE", "/login/sessions/{session}", least="viewer", answer=Done)
    async def end_session(self, actor: Actor, session: str) -> Record:
        """Log out there."""
        if not await self.users.end_session(session, self._session(actor).user_id):
            raise NotFound("there is no such session")
        return {"ok": True}

    # Usage

    async def _range(self, actor: Actor, query: UsageQuery) -> Range:
        """Raises NotFound for what is another's as for what never was."""
        account_id = actor.account_id
        if query.account is not None:
            account_id = (await self._account(actor, query.account))["id"]
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
    async def usage(self, actor: Actor, query: SumsQuery) -> Record:
        """Sums by groups, and of all."""
        wanted, books = await self._range(actor, query), self.books
        names = list(dict.fromkeys(query.group_by.split(","))) if query.group_by else []
        async with books.store.snapshot() as snapshot:
            groups = await reports.usage_by(snapshot, wanted, names, books.currency, query.top)
            totals = groups
            if names:
                totals = await reports.usage_by(snapshot, wanted, [], books.currency)
        return {"groups": groups if names else [], "totals": totals[0]}

    @operation("GET", "/requests", "/me/requests", least="key", answer=RequestReport)
    async def requests(self, actor: Actor, query: RequestsQuery) -> AsyncIterator[bytes] | Record:
        """Rows of the ledger, and their totals."""
        wanted, limit = await self._range(actor, query), query.limit or -1
        if query.before:
            wanted = await reports.older_than(self.books.store, wanted, query.before)
        if actor.key is None and actor.session is None:
            return self._report(msgspec.structs.replace(wanted, limit=limit))
        wanted = msgspec.structs.replace(wanted, limit=min(query.limit or 100, MOST_ROWS))
        currency = self.books.currency
        async with self.books.store.snapshot() as snapshot:
            rows = await reports.requests_in(snapshot, wanted, currency)
            (totals,) = await reports.usage_by(snapshot, wanted, [], currency)
        return {"requests": rows, "totals": totals}

    async def _report(self, wanted: Range) -> AsyncIterator[bytes]:
        """Rows, then their totals, all of one instant. They are copied first, so that a client that
        reads slowly keeps no snapshot open."""
        currency = self.books.currency
        async with contextlib.AsyncExitStack() as stack:
            async with self.books.store.snapshot(outlived_by=stack) as snapshot:
                rows = await reports.copy_requests(snapshot, wanted, currency)
                (totals,) = await reports.usage_by(snapshot, wanted, [], currency)
            yield b'{"requests":['
            comma = b""
            async for row in rows:
                yield comma + orjson.dumps(row)
                comma = b",\n"
            yield b'],"totals":' + orjson.dumps(totals) + b"}"

    # An account's own figures

    async def _limits_and_budgets(self, key: Key) -> Record:
        budgets = await self.books.budgets(key)
        found = self._running.limits_of_key(key)
        return {
            whose: {**limits, "monthly_budget": budgets[whose]} for whose, limits in found.items()
        }

    @staticmethod
    def _shown_key(actor: Actor) -> Key:
        if actor.key is None:
            raise NotFound("this is for the holder of an API key")
        return actor.key

    @operation("GET", "/me", least="key", answer=MeShown)
    async def me(self, actor: Actor, account: Record) -> Record:
        """Balance, limits and notices, with an API key."""
        key = self._shown_key(actor)
        money = account["credit_limit"], account["monthly_budget"]
        return {
            "account": account["name"],
            "account_id": account["id"],
            "key_id": key.id,
            "balance": await self.books.balance(account["id"], *money),
            "limits": await self._limits_and_budgets(key),
            "notices": await self.books.notices_now(account["id"]),
        }

    @operation("GET", "/me/limits", least="key", answer=dict[str, Any])
    async def limits(self, actor: Actor) -> Record:
        """The limits in force and what is left of them, budgets included, with an API key."""
        return await self._limits_and_budgets(self._shown_key(actor))

    # The whole

    @operation("GET", "/overview", least="operator", answer=Overview)
    async def overview(self, query: OverviewQuery) -> Record:
        """Traffic, spending, upstreams, and the room that is left."""
        books = self.books
        return {
            **self._running.at_work(),
            "traffic": await reports.traffic(books, query.days),
            "spending": await reports.spending(books, query.limit),
            "lately": await reports.lately(books),
            "database": database_size(books),
        }

    @operation("GET", "/changes", least="operator", answer=ChangeList)
    async def list_changes(self, actor: Actor, query: ChangesQuery) -> Record:
        """Every administrative change: who, when, what, before and after."""
        account_id = None
        if query.account is not None:
            account_id = (await self._account(actor, query.account))["id"]
        found = await ledger.changes(self.books.store, account_id, query.before, query.limit)
        return {"changes": found}

    @operation("POST", "/db/check", least="operator", answer=Check)
    async def check_database(self) -> Record:
        """Check the whole file for damage."""
        problems = await ledger.check_database(self.books.store)
        return {"ok": not problems, "problems": problems}

    @operation("POST", "/db/set-time", least="operator", answer=TimeSet)
    async def set_time(self, actor: Actor, body: NewTime) -> Record:
        """Move whatever in the ledger is dated after a time to that time, and go on from there."""
        at, now = time_to_set(self.books.store, body.time)
        if body.preview:
            return await preview(self.books.store, at, now)
        done = await set_time(self.books, at, now, actor.name)
        self._running.set_back(at)
        return done


MONEY_SHOWN = ("balance", "held", "available", "month", "spent_this_month", "currency")


def database_size(books: Books) -> Record:
    """Return the size of the database and the room on its disk, in bytes."""
    store = books.store
    size = size_of(store.path) + store.wal_bytes
    disk = shutil.disk_usage(store.path.parent)
    return {"bytes": size, "free_bytes": disk.free, "disk_bytes": disk.total}


def prices_of(body: NewPrices, now: int) -> list[Price]:
    """Return the prices; durations count from `now`, the ledger's time. Raises LedgerError for a
    rate that is none."""
    return [
        price_of(each, model, body.source, now)
        for each in body.prices
        for model in ([each.model] if isinstance(each.model, str) else each.model)
    ]


def price_of(given: NewPrice, model: str, source: str | None, now: int) -> Price:
    """Return one price, as `prices_of` does. Raises LedgerError for a rate that is none."""
    if not model.isprintable():
        raise LedgerError(f"{model!r} is not a name or pattern of models")
    rates: dict[str, Any] = {}
    for name in billing.Rates._fields:
        rate = getattr(given, name)
        if rate is not None:
            rates[name] = parse_amount(rate)
            most = billing.MOST_CALL_RATE if name in billing.UNITS else billing.MOST_RATE
            if not 0 <= rates[name] <= most:
                raise LedgerError(f"a rate of {rate} for {name} of {model} is out of range")
    if not rates:
        raise LedgerError(f"a price of {model} needs at least one rate; 0 where it is free")
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

# ── Over HTTP ────────────────────────────────────────────────────────────────────────────────────

STATUS: dict[type[LedgerError], int] = {
    Invalid: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    TooMany: 429,
    LedgerUnavailable: 503,
    Busy: 503,
}
OTHERWISE = 409  # well formed, but it can't be done
Authenticate = Callable[[Request], Actor]


def local(request: Request) -> Actor:
    """Whoever may open the database: an operator."""
    return Actor(request.headers.get(WHO.decode(), "local"), "operator")


SECURITY = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def encoded(record: Record) -> Iterator[bytes]:
    """As JSON, bit by bit."""
    yield b"{"
    for number, (name, value) in enumerate(record.items()):
        yield (b"," if number else b"") + orjson.dumps(name) + b":"
        if not isinstance(value, list):
            yield orjson.dumps(value)
            continue
        yield b"["
        for place, each in enumerate(value):
            yield (b"," if place else b"") + orjson.dumps(each)
        yield b"]"
    yield b"}"


async def in_parts(
    bits: Iterable[bytes], status: int, headers: Mapping[str, str], media_type: str
) -> Response:
    """An answer of what may be long."""
    parts: list[bytes] = []
    part = bytearray()
    async for bit in with_turns(bits):
        part += bit
        if len(part) >= PART_BYTES:
            parts.append(bytes(part))
            part.clear()
    parts.append(bytes(part))
    if len(parts) == 1:
        return Response(parts[0], status, headers, media_type)
    length = {"content-length": str(sum(map(len, parts)))}
    return StreamingResponse(with_turns(parts), status, {**headers, **length}, media_type)


async def streamed(parts: AsyncIterator[bytes]) -> Response:
    """Return an answer of JSON that is sent as it is made. Its status is sent with the first part:
    what fails before that is answered with an error."""
    first = await anext(parts)

    async def all_parts() -> AsyncIterator[bytes]:
        yield first
        async for part in parts:
            yield part

    return StreamingResponse(all_parts(), headers=SECURITY, media_type="application/json")


async def answer(record: Record, status: int = 200) -> Response:
    """JSON."""
    return await in_parts(encoded(record), status, SECURITY, "application/json")


async def error_answer(status: int, message: str, headers: Mapping[str, str]) -> Response:
    """OpenAI's error form."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    response = await answer({"error": error}, status)
    response.headers.update(headers)
    return response


async def refused(_: Request, error: Exception) -> Response:
    """A LedgerError."""
    status = STATUS.get(type(error), OTHERWISE)  # type: ignore[arg-type]
    return await error_answer(status, str(error), retry_after(error))


def retry_after(error: Exception) -> dict[str, str]:
    """A header, where it makes sense to try again."""
    seconds = error.seconds if isinstance(error, Later) else 5
    again = isinstance(error, (Later, LedgerUnavailable))
    return {"retry-after": str(seconds)} if again else {}


UNKNOWN = {404: "Unknown request URL.", 500: "The gateway failed on this request."}


async def unknown(_: Request, error: Exception) -> Response:
    """What Starlette itself refuses, an unknown path or method; or what should not happen."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = UNKNOWN.get(status, "This method is not known here.")
    headers = error.headers if isinstance(error, HTTPException) else None
    return await error_answer(status, message, headers or {})


def served(api: API, authenticate: Authenticate) -> Starlette:
    """The operations as an app, for whoever `authenticate` says it is."""
    by_path: dict[str, dict[str, Operation]] = {}
    for each in OPERATIONS:
        for path in each.paths:
            by_path.setdefault(PREFIX + path, {})[each.method] = each
    routes = [Route(f"{PREFIX}/openapi.json", _describe, methods=["GET"])]
    for path, operations in by_path.items():
        endpoint = _endpoint(api, operations, authenticate)
        routes.append(Route(path, endpoint, methods=list(operations)))
    handlers: dict[Any, Any] = {LedgerError: refused, HTTPException: unknown, Exception: unknown}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _describe(request: Request) -> Response:
    body = _description(secure=request.url.scheme == "https")
    return Response(body, headers=SECURITY, media_type="application/json")


@functools.cache
def _description(*, secure: bool) -> bytes:
    """Return `openapi` as JSON. It is made once: that takes about 10 ms, and anybody may ask."""
    return orjson.dumps(openapi(secure=secure))


def check_fields(encoded: bytes) -> None:
    """Raise Invalid if a query or a form has more than MAX_FIELDS fields: 30,000 take 25 ms."""
    if encoded.count(b"&") >= MAX_FIELDS:
        raise Invalid(f"a query or a form has at most {MAX_FIELDS} fields here")


async def whole_body(request: Request, most: int) -> bytes:
    """Raises TooLarge before more than `most` bytes are held, and Invalid where it ends too
    early."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise TooLarge(f"a body has at most {most} bytes here")
    except ClientDisconnect:
        raise Invalid("the body is not whole") from None
    return bytes(body)


def _endpoint(
    api: API, operations: dict[str, Operation], authenticate: Authenticate
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        operation = operations["GET" if request.method == "HEAD" else request.method]
        actor = authenticate(request)
        check_fields(request.scope["query_string"])
        pairs = request.query_params.multi_items()
        query = dict(pairs)
        if len(query) < len(pairs):
            raise Invalid("a query parameter stands twice")
        has_body = operation.method in ("POST", "PATCH")
        most = MOST_BODY_BYTES if actor.rank == "operator" else MAX_MEMBERS_BODY
        body = await whole_body(request, most) if has_body else b""
        actor = authenticate(request)  # again: what let him in may have ended meanwhile
        found = await api.perform(operation, actor, request.path_params, query=query, body=body)
        if isinstance(found, AsyncIterator):
            return await streamed(found)
        return await answer(found, operation.status)

    return endpoint


# ── Description ──────────────────────────────────────────────────────────────────────────────────

ERRORS = {
    "400": "It is not of the form that is asked for; the message names the place.",
    "401": "Nobody is logged in, or the key is not in force.",
    "403": "It is not for this role, or comes from another site.",
    "404": "There is none, or it is another account's.",
    "409": "It is well formed, but can't be done; the message says why.",
    "413": "The body is too large.",
    "429": "Too many passwords were tried.",
    "503": "The database can't be written now, or too many passwords are being checked.",
}


ID = {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}
IN_PATH = {"month": {"type": "string", "pattern": f"^({MONTH.pattern})$"}}


def openapi(*, secure: bool) -> Record:
    """/admin/v1/openapi.json, made from the operations and their types (OpenAPI 3.1). `secure`: as
    it is reached with TLS, where the session's cookie has another name."""
    answers = {each.answer for each in OPERATIONS if isinstance(each.answer, type)}
    types = [*answers, *{each.body for each in OPERATIONS}, *{each.query for each in OPERATIONS}]
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components([*types, Refused], ref_template=template)
    paths: dict[str, Record] = {}
    for each in OPERATIONS:
        for number, path in enumerate(each.paths):
            described = _described(each, path, number, schemas)
            paths.setdefault(PREFIX + path, {})[each.method.lower()] = described
    cookie = "__Host-redbtc" if secure else "redbtc"
    return {
        "openapi": "3.1.0",
        "info": {"title": "RedBTC AI admin API", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "session": {"type": "apiKey", "in": "cookie", "name": cookie},
                "key": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _described(operation: Operation, path: str, number: int, schemas: Record) -> Record:
    in_path = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": IN_PATH.get(name, ID)}
        for name in in_path
    ]
    query = schemas[operation.query.__name__]
    needed = query.get("required", ())
    parameters += [
        {"name": name, "in": "query", "required": name in needed, "schema": schema}
        for name, schema in query.get("properties", {}).items()
    ]
    described: Record = {
        "operationId": operation.name + ("_of_key" if path.startswith("/me/") and number else ""),
        "summary": operation.summary,
        "security": [{"key": []}] if path.startswith("/me") else [{"session": []}],
        "parameters": parameters,
        "responses": {
            str(operation.status): _content("Done.", operation.answer),
            **{status: _content(text, Refused) for status, text in ERRORS.items()},
        },
    }
    if operation.method in ("POST", "PATCH"):
        reference = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {
            "required": bool(schemas[operation.body.__name__].get("required")),
            "content": {"application/json": {"schema": reference}},
        }
    return described


def _content(text: str, of: Any) -> Record:
    named = isinstance(of, type) and issubclass(of, Struct)
    schema = {"$ref": f"#/components/schemas/{of.__name__}"} if named else {"type": "object"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}
