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
    """An error, as in OpenAI's API."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refused(Struct):
    """The body of an error response."""

    error: Error


class Limits(Struct):
    """Limits. A limit of null falls back to the account's or the settings'; a budget of null means
    no budget."""

    concurrency: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    monthly_budget: Money | None


class Account(Limits):
    """An account, with its limits."""

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
    """An account with its money. If `available` is null, its credit is unlimited."""

    balance: Money
    held: Money
    available: Money | None
    month: str
    spent_this_month: Money
    currency: str


class AccountInList(Account):
    """An account with what it has spent."""

    balance: Money
    spent_this_month: Money
    requests_this_month: int
    currency: str


class AccountList(Struct):
    """Accounts, by name."""

    accounts: list[AccountInList]


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


class KeyShown(Limits):
    """A key, without the secret. Keys with the same `budget_id` (the id of the first of them)
    replaced one another and share a monthly budget."""

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
    """A key with the day (UTC) of its last use."""

    last_used_on: str | None


class KeyList(Struct):
    """Keys, oldest first."""

    keys: list[KeyInList]


class KeyAdded(KeyShown):
    """A new key. `key` is the secret, which is shown only once."""

    key: str
    replaces: str | UnsetType = UNSET


class KeyRevoked(KeyShown):
    """A revoked key. `cut` is the number of its requests in flight that were stopped."""

    cut: int


class PriceShown(Struct):
    """A price. A rate of null was not given. `shadowed_by` lists more specific names and patterns:
    their prices apply to the models that they match, not this one."""

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
    """Prices, by model, tier, threshold and time."""

    prices: list[PriceShown]


class PriceSlot(Struct):
    """The model, tier and threshold that a price applies to."""

    model: str
    tier: str
    above_input_tokens: int


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


class PricesAdded(PriceList):
    """The prices that were added. `unchanged` counts prices that were skipped because they already
    apply. `applies_to` and `does_not_apply_to` list known models: those with a price, in use, or
    listed by an upstream. `taken_over` (without `take_over`: `left_out`) lists rates that were not
    given but an earlier price has. `followed_by` lists existing prices that will replace the added
    ones later."""

    added: int
    unchanged: int
    applies_to: list[str]
    does_not_apply_to: list[NotApplied]
    followed_by: list[FollowingPrice]
    notices: list[PublishedNotice]
    taken_over: list[RatesOfEarlierPrice] | UnsetType = UNSET
    left_out: list[RatesOfEarlierPrice] | UnsetType = UNSET


class OtherPrice(PriceShown):
    """A price that does not apply, and why."""

    because: str


class WhichPrice(Struct):
    """The price that applies to a request (null if none does), and all others that match its
    model."""

    model: str
    at: Moment
    tier: str
    input_tokens: int
    applies: PriceShown | None
    why: str
    others: list[OtherPrice]


class Payment(Struct):
    """A payment. A refund has a negative amount."""

    id: str
    account: str
    amount: Money
    currency: str
    reference: str | None
    reason: str | None
    month: str
    created_at: Moment


class PaymentList(Struct):
    """Payments, oldest first."""

    payments: list[Payment]


class PaymentAdded(Payment):
    """A new payment and the balance after it."""

    balance: Money


class Notice(Struct):
    """A notice. If `account` is null, it is for all accounts."""

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
    """A notice and when it was withdrawn."""

    withdrawn_at: Moment


class NoticeList(Struct):
    """Notices, by the time they take effect."""

    notices: list[Notice]


class UserShown(Struct):
    """A login. If `account` is null, it is an operator's."""

    id: str
    email: str
    role: Literal["operator", "owner", "viewer"]
    account: str | None
    account_id: str | None
    password_set_at: Moment | None
    link_expires_at: Moment | None
    created_at: Moment


class UserList(Struct):
    """Logins, operators first."""

    users: list[UserShown]


class UserAdded(UserShown):
    """A login and its one-time link to set a password."""

    link: str


class SessionShown(Struct):
    """A session of a browser that is logged in."""

    id: str
    browser: str
    created_at: Moment
    seen_at: Moment
    this: bool


class SessionList(Struct):
    """Sessions, most recently used first."""

    sessions: list[SessionShown]


class Done(Struct):
    """Confirmation that the change was made."""

    ok: bool


class Sums(Struct):
    """Sums over requests. A sum is null if no request reported that number."""

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
    """Sums for one combination of the fields to group by."""

    day: str | UnsetType = UNSET
    model: str | UnsetType | None = UNSET
    key_id: str | UnsetType = UNSET
    account: str | UnsetType = UNSET


class UsageReport(Struct):
    """Sums by group, and in total."""

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
    """Requests, oldest first. Totals cover the whole range, whatever the limit."""

    requests: list[RequestShown]
    totals: Sums


class StatementTotals(Sums):
    """Sums of a statement, and what was paid."""

    paid: Money


class Correction(Struct):
    """The cost of an estimated request before and after its real usage became known. The difference
    is included in the usage of its day."""

    request_id: str
    day: str
    before: Money
    after: Money
    difference: Money


class Statement(Struct):
    """An account's statement for a month."""

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
    """Usage and payments of a month."""

    month: str
    closed: bool
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money
    paid: Money
    currency: str


class MonthList(Struct):
    """Months, newest first."""

    months: list[Month]


class Change(Struct):
    """An administrative change. If `before` is null, the object was added; if `after` is null, it
    was removed."""

    id: int
    changed_at: Moment
    changed_by: str
    kind: str
    object_id: str
    account: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ChangeList(Struct):
    """Changes, newest first."""

    changes: list[Change]


class Overview(Struct):
    """The state of the gateway, traffic and spending."""

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
    """The balance, limits and notices of the account that a key belongs to."""

    account: str
    account_id: str
    key_id: str
    balance: Balance
    limits: dict[str, Any]
    notices: list[Notice]


class TimeSet(Struct):
    """The time that was set, the ledger's time before, and how many rows were dated later, by
    table. If `done` is false, this was a preview."""

    time: Moment
    before: Moment
    done: bool
    moved: dict[str, int]


class Check(Struct):
    """The result of a database check: problems, one per line."""

    ok: bool
    problems: list[str]
