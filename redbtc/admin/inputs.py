"""What the admin API takes: strict types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from redbtc.billing.records import NOTICE_TEXT
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.store.records import with_members
from redbtc.usage import MAX_TOKENS

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


class NewThrottle(Sent):
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


@with_members(dict.fromkeys(RATES, Amount | None), None)
class NewPrice(Sent):
    """A price of one or more names or patterns of models, in currency per million tokens;
    `web_search` and `file_search` per call, `container` for each new one. `effective` is a time or
    a duration from now; left out: now."""

    model: Model | Annotated[tuple[ModelName, ...], Meta(min_length=1)]
    tier: Tier = DEFAULT_TIER
    above_input_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    effective: Time | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
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
            max_length=NOTICE_TEXT,
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
    tier: Tier = DEFAULT_TIER
    input_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
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
