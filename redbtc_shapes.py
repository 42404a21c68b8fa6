"""The shapes of what the admin API takes and answers: strict types for the one, a description for
the other. openapi.json is made from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

import redbtc_billing as billing
from redbtc_rows import Outcome, UsageSource
from redbtc_settings import MOST_TOKENS

# ── What is sent ─────────────────────────────────────────────────────────────────────────────────
# Strict: an unknown member is an error that names it. The same types describe the API in
# openapi.json. Patterns end in $(?!\n), since Python's $ alone lets a line's end through.

CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # also those that turn text round
NAME_FORM = rf"^[^\s/{CONTROLS}]([^/{CONTROLS}]*[^\s/{CONTROLS}])?$(?!\n)"
Limit = Annotated[int, Meta(ge=0, le=1_000_000_000)]
MEANT: dict[str, str] = {}  # what people call the form that a pattern asks for


def form(pattern: str, meant: str, **more: Any) -> Meta:
    """Text of this form; who sends another is told what is meant."""
    MEANT[pattern] = meant
    return Meta(pattern=pattern, title=meant, **more)


LINE = form(rf"^[^{CONTROLS}]*$(?!\n)", "a line without control characters")
Filter = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, LINE, Meta(max_length=200)]
Source = Annotated[str, LINE, Meta(max_length=500)]
Reason = Annotated[str, LINE, Meta(min_length=1, max_length=500)]
AccountName = Annotated[
    str,
    form(
        NAME_FORM,
        "a name without slashes and control characters, and no space at its ends",
        min_length=1,
        max_length=100,
    ),
]
Amount = Annotated[
    str,
    form(
        r"^-?[0-9]{1,18}(\.[0-9]{1,9})?$(?!\n)",
        "an amount such as 12.50 (at most 9 digits after the point)",
    ),
]
LimitAmount = Annotated[
    str,
    form(
        r"^(unlimited|[0-9]{1,18}(\.[0-9]{1,9})?)$(?!\n)",
        "an amount such as 12.50 (at most 9 digits after the point), or unlimited",
    ),
]
Time = Annotated[
    str,
    form(
        r"^([0-9]{1,9}[smhdw]|[0-9]{4}-[0-9]{2}-[0-9]{2}"
        r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]{1,9})?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?)$(?!\n)",
        "a time: ISO 8601 (2026-12-31T00:00:00Z; UTC where it names no zone), or a duration (24h)",
    ),
]
Duration = Annotated[
    str, form(r"^(0|[0-9]{1,9}[smhdw])$(?!\n)", "a duration such as 90s, 15m, 24h, 30d or 2w")
]
Factor = Annotated[
    str,
    form(
        r"^(0?\.[0-9]{0,2}[1-9]|0?\.[1-9]0{0,2}|0?\.[0-9][1-9]0|1(\.0{1,3})?)$(?!\n)",
        "a part from 0.001 to 1, such as 0.25",
    ),
]
ModelName = Annotated[
    str,
    form(
        rf"^[^{CONTROLS}]+$(?!\n)",
        "a name or pattern without control characters",
        min_length=1,
        max_length=256,
    ),
]
# Where a list may be instead: msgspec 0.22 frees the pattern of a text beside a list twice.
Model = Annotated[str, Meta(min_length=1, max_length=256)]
Tier = Annotated[
    str,
    form(r"^[a-z0-9_-]{1,32}$(?!\n)", "a tier such as flex: lower-case letters, digits, _ and -"),
]
Patterns = Annotated[
    str, Meta(min_length=1, max_length=4000, description="shell patterns, commas between")
]
Email = Annotated[
    str,
    form(
        rf"^[^@\s{CONTROLS}]{{1,64}}@[^@\s{CONTROLS}]{{1,189}}$(?!\n)",
        "an address such as ada@example.com",
        max_length=254,
    ),
]
Cursor = Annotated[str, form(r"^[A-Za-z0-9_-]{1,64}$(?!\n)", "an id")]
Groups = Annotated[
    str,
    form(
        r"^((day|model|key|account)(,(day|model|key|account)){0,3})?$(?!\n)",
        "any of day, model, key, account, with commas between",
    ),
]


class Sent(Struct, forbid_unknown_fields=True):
    """What comes in."""


class Nothing(Sent):
    """No member is known."""


class NewLimits(Sent):
    """A limit left out is the settings' or the account's, a budget left out is none."""

    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    monthly_budget: LimitAmount | None = None


class NewAccount(NewLimits, kw_only=True):
    """With these limits."""

    name: AccountName
    email: Text | None = None
    credit_limit: LimitAmount | None = None


class AccountChange(Sent):
    """What is left out stays; null is the settings' again."""

    email: Text | UnsetType | None = UNSET
    concurrency: Limit | UnsetType | None = UNSET
    requests_per_minute: Limit | UnsetType | None = UNSET
    tokens_per_minute: Limit | UnsetType | None = UNSET
    credit_limit: LimitAmount | UnsetType | None = UNSET
    monthly_budget: LimitAmount | UnsetType | None = UNSET


class Suspension(Sent):
    """`reason` is for operators."""

    reason: Text | None = None


class Throttle(Sent):
    """The part of its limits that the account is held to, 0.001 to 1; 1 lifts it."""

    factor: Factor
    until: Time | None = None


class NewKey(NewLimits):
    """`expires` is a time or a duration from now; `models` are shell patterns, with commas or as a
    list: at most 100, together of 4,000 characters, each with at most 10 of the signs * ? [."""

    label: Text = ""
    models: Patterns | Annotated[tuple[ModelName, ...], Meta(min_length=1)] | None = None
    expires: Time | None = None


class Revocation(Sent):
    """`compromised`: somebody else has it; what runs is cut as well."""

    compromised: bool = False


class Rotation(Sent):
    """The old key goes on for `overlap`."""

    overlap: Duration = "24h"


class NewPrice(Sent):
    """A price of one or more names or patterns of models, in currency per million tokens;
    `web_search` and `file_search` per call, `container` for each new one. `effective` is a time or
    a duration from now; left out: now."""

    model: Model | Annotated[tuple[ModelName, ...], Meta(min_length=1)]
    tier: Tier = billing.DEFAULT_TIER
    above_input_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] = 0
    effective: Time | None = None
    input: Amount | None = None
    cached_input: Amount | None = None
    cache_write: Amount | None = None
    cache_write_12h: Amount | None = None
    output: Amount | None = None
    image_input: Amount | None = None
    image_output: Amount | None = None
    web_search: Amount | None = None
    file_search: Amount | None = None
    container: Amount | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MOST_TOKENS)] | None = None
    source: Source | None = None


class NewPrices(Sent):
    """`take_over`: rates that a price leaves out are those of the price that it supersedes, or of
    the one that applied to its model before; without it they are not given. `without_notice` is the
    reason for a rise without notice. With `currency` they are refused where that is not the
    ledger's."""

    prices: tuple[NewPrice, ...]
    take_over: bool = True
    without_notice: Reason | None = None
    currency: Text | None = None
    source: Source | None = None


class NewPayment(Sent):
    """Sent again with the same reference it is added once; a negative one needs a reason."""

    amount: Amount
    reference: Annotated[str, LINE, Meta(min_length=1, max_length=200)] | None = None
    reason: Reason | None = None


class NewNotice(Sent):
    """`effective`: now where it is left out; `until`: no end. `refuses_requests`: of a
    maintenance, while which new requests are answered 503."""

    kind: Literal["price", "terms", "maintenance", "incident"]
    text: Annotated[
        str,
        form(
            r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$",
            "text without control characters",
            min_length=1,
            max_length=billing.NOTICE_TEXT,
        ),
    ]
    effective: Time | None = None
    until: Time | None = None
    refuses_requests: bool = False


class NewUser(Sent):
    """An operator has no account; an owner's members are of theirs."""

    email: Email
    role: Literal["operator", "owner", "viewer"] = "owner"
    account: AccountName | None = None


class UsersQuery(Sent):
    """Filters, each left out where not wanted."""

    account: Filter | None = None
    role: Literal["operator", "owner", "viewer"] | None = None


class NewPassword(Sent):
    """Of whoever is logged in."""

    old_password: Annotated[str, Meta(max_length=4000)]
    new_password: Annotated[str, Meta(max_length=4000)]


class WhichPriceQuery(Sent):
    """A request of `model` with so many input tokens, whose response reports the service tier
    `tier`, at a time or after a duration; left out: now."""

    model: ModelName
    tier: Tier = billing.DEFAULT_TIER
    input_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] = 0
    at: Time | None = None


class WhichUser(Sent):
    """Where an address has several logins."""

    account: Filter | None = None
    operator: bool = False


class UsageQuery(Sent):
    """Filters, each left out where not wanted: `key` by id, `model` a shell pattern."""

    account: Filter | None = None
    key: Filter | None = None
    model: Filter | None = None
    since: Time | None = None
    until: Time | None = None


class RequestsQuery(UsageQuery):
    """`limit` keeps the newest; `before`: those older than the request of that id."""

    limit: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    before: Cursor | None = None


class SumsQuery(UsageQuery):
    """`group_by`: day, model, key, account, with commas between. `top`: as many models have a
    name, those that cost most; the others are one group with the model null."""

    group_by: Groups = ""
    top: Annotated[int, Meta(ge=1, le=1000)] | None = None


class StatementQuery(Sent):
    """`limit`: as many lines of usage, the first ones; the totals are of all."""

    limit: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None


class AccountsQuery(Sent):
    """`search` in names and addresses; `after`: whose names come after that one."""

    search: Filter = ""
    after: Filter = ""
    limit: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None


class NewTime(Sent):
    """`time` left out: now. A duration counts back from now. `preview`: change nothing."""

    time: Time | None = None
    preview: bool = False


class ChangesQuery(Sent):
    """The newest `limit`, or those before the change of that id."""

    account: Filter | None = None
    before: Annotated[int, Meta(ge=1, le=1 << 62)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class OverviewQuery(Sent):
    """Traffic of the last `days`, the `limit` accounts that spent most in this month."""

    days: Annotated[int, Meta(ge=1, le=366)] = 30
    limit: Annotated[int, Meta(ge=1, le=100)] = 10


# ── What is answered ─────────────────────────────────────────────────────────────────────────────
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
    """A row of the ledger, CONTRACT.md section 5."""

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
