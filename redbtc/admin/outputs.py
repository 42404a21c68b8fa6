"""What the admin API answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from redbtc.usage import Outcome, UsageSource

# Only described: operations answer with plain records.
Moment = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Money = Annotated[str, Meta(pattern=r"^-?[0-9]+(\.[0-9]{1,9})?$")]
Sum = int | None


class Error(Struct):
    """OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refused(Struct):
    """What an error's body is."""

    error: Error


class Limits(Struct):
    """A limit of null is the settings' or the account's, a budget of null is none."""

    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_budget: Money | None


class Account(Limits):
    """With its limits."""

    id: str
    name: str
    email: str | None
    status: Literal["active", "suspended"]
    credit_limit: str | None
    throttle_factor: Money | None
    throttled_until: Moment | None
    created_at: Moment
    keys_in_force: int


class AccountWithMoney(Account):
    """And what it may spend; `available` of null is without limit."""

    balance: Money
    held: Money
    available: Money | None
    month: str
    spent_this_month: Money
    currency: str


class AccountInList(Account):
    """And what it has spent."""

    balance: Money
    spent_this_month: Money
    requests_this_month: int
    currency: str


class AccountList(Struct):
    """By name."""

    accounts: list[AccountInList]


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


class KeyShown(Limits):
    """Without what would let one use it. Keys with the same `budget_id`, the id of the first of
    them, replaced one another and share what is spent of the monthly budget."""

    id: str
    account: str
    account_id: str
    label: str
    models: list[str] | None
    created_at: Moment
    expires_at: Moment | None
    revoked_at: Moment | None
    compromised: bool
    budget_id: str


class KeyInList(KeyShown):
    """`last_used_on` is a day, in UTC."""

    last_used_on: str | None


class KeyList(Struct):
    """Oldest first."""

    keys: list[KeyInList]


class KeyAdded(KeyShown):
    """`key` is the only copy there will ever be."""

    key: str
    replaces: str | UnsetType = UNSET


class KeyRevoked(KeyShown):
    """`cut`: how many of its requests were in flight and are not any more."""

    cut: int


class PriceShown(Struct):
    """A rate of null was not given. `shadowed_by`: more specific names and patterns whose prices
    apply instead of this one to models that it means."""

    id: int
    model: str
    tier: str
    above_input_tokens: int
    effective_at: Moment
    status: Literal["past", "current", "coming"]
    currency: str
    input: Money | None
    cached_input: Money | None
    cache_write: Money | None
    cache_write_12h: Money | None
    output: Money | None
    image_input: Money | None
    image_output: Money | None
    web_search: Money | None
    file_search: Money | None
    container: Money | None
    max_output_tokens: int | None
    shadowed_by: list[str]


class PriceList(Struct):
    """By model, tier, threshold and time."""

    prices: list[PriceShown]


class PriceSlot(Struct):
    """What a price is for."""

    model: str
    tier: str
    above_input_tokens: int


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


class PricesAdded(PriceList):
    """`unchanged` counts the prices that were skipped. `applies_to` and `does_not_apply_to` are the
    known models: those with a price, in use, or listed by an upstream. `taken_over` (or `left_out`,
    without `take_over`) are rates that were not given and an earlier price had; `followed_by` are
    prices that were there before and will supersede the added ones."""

    added: int
    unchanged: int
    applies_to: list[str]
    does_not_apply_to: list[NotApplied]
    followed_by: list[FollowingPrice]
    notices: list[PublishedNotice]
    taken_over: list[RatesOfEarlierPrice] | UnsetType = UNSET
    left_out: list[RatesOfEarlierPrice] | UnsetType = UNSET


class OtherPrice(PriceShown):
    """One that does not apply, and why."""

    because: str


class WhichPrice(Struct):
    """The price that applies to a request (null: none), and all others that mean its model."""

    model: str
    at: Moment
    tier: str
    input_tokens: int
    applies: PriceShown | None
    why: str
    others: list[OtherPrice]


class Payment(Struct):
    """A refund is negative."""

    id: str
    account: str
    amount: Money
    currency: str
    reference: str | None
    reason: str | None
    month: str
    created_at: Moment


class PaymentList(Struct):
    """Oldest first."""

    payments: list[Payment]


class PaymentAdded(Payment):
    """And the balance with it."""

    balance: Money


class Notice(Struct):
    """`account` of null: for all."""

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


class NoticeWithdrawn(Notice):
    """And since when."""

    withdrawn_at: Moment


class NoticeList(Struct):
    """By when they take effect."""

    notices: list[Notice]


class UserShown(Struct):
    """`account` of null: an operator."""

    id: str
    email: str
    role: Literal["operator", "owner", "viewer"]
    account: str | None
    account_id: str | None
    password_set_at: Moment | None
    link_expires_at: Moment | None
    created_at: Moment


class UserList(Struct):
    """Operators first."""

    users: list[UserShown]


class UserAdded(UserShown):
    """`link` is where the user sets a password, once."""

    link: str


class SessionShown(Struct):
    """Of a browser that is logged in."""

    id: str
    browser: str
    created_at: Moment
    seen_at: Moment
    this: bool


class SessionList(Struct):
    """The last used first."""

    sessions: list[SessionShown]


class Done(Struct):
    """There is nothing to tell."""

    ok: bool


class Sums(Struct):
    """A sum of null: no request has a number."""

    requests: int
    estimated: int
    unreported: int
    input_tokens: Sum
    cached_input_tokens: Sum
    cache_write_tokens: Sum
    output_tokens: Sum
    reasoning_tokens: Sum
    image_input_tokens: Sum
    image_output_tokens: Sum
    web_searches: Sum
    tool_input_tokens: Sum
    cache_write_12h_tokens: Sum
    file_searches: Sum
    containers: Sum
    cost: Money
    currency: str


class Group(Sums):
    """Those of one combination of what it was grouped by."""

    day: str | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    key_id: str | UnsetType = UNSET
    account: str | UnsetType = UNSET


class UsageReport(Struct):
    """Sums by groups, and of all."""

    groups: list[Group]
    totals: Sums


class RequestShown(Struct):
    """A row of the ledger, docs/contract.md section 5."""

    request_id: str
    account: str
    key_id: str
    endpoint: str
    model: str | None
    requested_model: str
    upstream: str
    started_at: Moment
    first_byte_ms: int | None
    duration_ms: int | None
    status: int | None
    outcome: Outcome
    usage_source: UsageSource
    input_tokens: Sum
    cached_input_tokens: Sum
    cache_write_tokens: Sum
    output_tokens: Sum
    reasoning_tokens: Sum
    image_input_tokens: Sum
    image_output_tokens: Sum
    web_searches: Sum
    service_tier: str | None
    response_id: str | None
    cost: Money | None
    currency: str
    price_id: int | None
    month: str | None
    tool_input_tokens: Sum
    cache_write_12h_tokens: Sum
    file_searches: Sum
    containers: Sum
    estimated_cost: Money | None
    corrected_at: Moment | None


class RequestReport(Struct):
    """Oldest first; the totals are of the whole range, whatever the limit."""

    requests: list[RequestShown]
    totals: Sums


class StatementTotals(Sums):
    """And what was paid."""

    paid: Money


class Correction(Struct):
    """What an estimated request cost before and after its usage was seen. The difference is part of
    the usage of its day."""

    request_id: str
    day: str
    before: Money
    after: Money
    difference: Money


class Statement(Struct):
    """An account's month."""

    account: str
    account_id: str
    month: str
    closed: bool
    currency: str
    opening_balance: Money
    usage: list[Group]
    corrections: list[Correction]
    payments: list[Payment]
    totals: StatementTotals
    closing_balance: Money
    paid_last_three_months: Money
    paid_by_month: dict[str, Money]


class Month(Struct):
    """What was used and paid in it."""

    month: str
    closed: bool
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money
    paid: Money
    currency: str


class MonthList(Struct):
    """The newest first."""

    months: list[Month]


class Change(Struct):
    """`before` of null: it was added; `after` of null: it was removed."""

    id: int
    changed_at: Moment
    changed_by: str
    kind: str
    object_id: str
    account: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ChangeList(Struct):
    """The newest first."""

    changes: list[Change]


class Overview(Struct):
    """What an operator looks at first."""

    running: bool
    uptime_seconds: int
    in_flight: int
    queued: int
    refusals: dict[str, int]
    upstreams: list[dict[str, Any]]
    traffic: list[dict[str, Any]]
    spending: dict[str, Any]
    lately: dict[str, Any]
    database: dict[str, Any]


class MeShown(Struct):
    """An account's own figures, for one of its keys."""

    account: str
    account_id: str
    key_id: str
    balance: Balance
    limits: dict[str, Any]
    notices: list[Notice]


class TimeSet(Struct):
    """The time that is set, the ledger's time before, and how many rows were dated later, by table.
    `done` of false: it was only a preview."""

    time: Moment
    before: Moment
    done: bool
    moved: dict[str, int]


class Check(Struct):
    """What is wrong with the file, line by line."""

    ok: bool
    problems: list[str]
