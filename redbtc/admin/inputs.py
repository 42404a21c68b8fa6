"""Define the inputs of the admin API as strict types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from redbtc.billing.records import NOTICE_TEXT
from redbtc.rates import DEFAULT_TIER, RATES
from redbtc.store.json_values import with_members
from redbtc.usage import MAX_TOKENS

# Strict: an unknown field is an error that names it. The docstrings of the types are descriptions
# in openapi.json. Patterns end in $(?!\n), since Python's $ alone also matches before a final
# newline.
CONTROLS = (
    r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # also those that change the direction of text
)
NAME_FORM = rf"^[^\s/{CONTROLS}]([^/{CONTROLS}]*[^\s/{CONTROLS}])?$(?!\n)"
Limit = Annotated[int, Meta(ge=0, le=1_000_000_000)]
FORM_NAMES: dict[str, str] = {}  # what error messages call the form that a pattern asks for


def matching(pattern: str, meant: str, **more: Any) -> Meta:
    """Return the constraint that a text has this form. Error messages call the form `meant`."""
    FORM_NAMES[pattern] = meant
    return Meta(pattern=pattern, title=meant, **more)


LINE = matching(rf"^[^{CONTROLS}]*$(?!\n)", "a line without control characters")
Filter = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, LINE, Meta(max_length=200)]
Source = Annotated[str, LINE, Meta(max_length=500)]
Reason = Annotated[str, LINE, Meta(min_length=1, max_length=500)]
AccountName = Annotated[
    str,
    matching(
        NAME_FORM,
        "a name without slashes, control characters, or spaces at either end",
        min_length=1,
        max_length=100,
    ),
]
Amount = Annotated[
    str,
    matching(
        r"^-?[0-9]{1,18}(\.[0-9]{1,9})?$(?!\n)",
        "an amount such as 12.50 (at most 9 digits after the point)",
    ),
]
LimitAmount = Annotated[
    str,
    matching(
        r"^(unlimited|[0-9]{1,18}(\.[0-9]{1,9})?)$(?!\n)",
        "an amount such as 12.50 (at most 9 digits after the point), or unlimited",
    ),
]
Time = Annotated[
    str,
    matching(
        r"^([0-9]{1,9}[smhdw]|[0-9]{4}-[0-9]{2}-[0-9]{2}"
        r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]{1,9})?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?)$(?!\n)",
        "a time (ISO 8601, UTC by default, such as 2026-12-31T00:00:00Z) or a duration (24h)",
    ),
]
Duration = Annotated[
    str, matching(r"^(0|[0-9]{1,9}[smhdw])$(?!\n)", "a duration such as 90s, 15m, 24h, 30d or 2w")
]
Factor = Annotated[
    str,
    matching(
        r"^(0?\.[0-9]{0,2}[1-9]|0?\.[1-9]0{0,2}|0?\.[0-9][1-9]0|1(\.0{1,3})?)$(?!\n)",
        "a fraction from 0.001 to 1, such as 0.25",
    ),
]
ModelName = Annotated[
    str,
    matching(
        rf"^[^{CONTROLS}]+$(?!\n)",
        "a model name or pattern without control characters",
        min_length=1,
        max_length=256,
    ),
]
# For a field that may also be a list: msgspec 0.22 frees the pattern of such a text twice.
Model = Annotated[str, Meta(min_length=1, max_length=256)]
Tier = Annotated[
    str,
    matching(
        r"^[a-z0-9_-]{1,32}$(?!\n)", "a tier such as flex (lower-case letters, digits, _ and -)"
    ),
]
Patterns = Annotated[
    str, Meta(min_length=1, max_length=4000, description="shell patterns, separated by commas")
]
Email = Annotated[
    str,
    matching(
        rf"^[^@\s{CONTROLS}]{{1,64}}@[^@\s{CONTROLS}]{{1,189}}$(?!\n)",
        "an email address such as ada@example.com",
        max_length=254,
    ),
]
Cursor = Annotated[str, matching(r"^[A-Za-z0-9_-]{1,64}$(?!\n)", "an id")]
Groups = Annotated[
    str,
    matching(
        r"^((day|model|key|account)(,(day|model|key|account)){0,3})?$(?!\n)",
        "any of day, model, key and account, separated by commas",
    ),
]


class Input(Struct, forbid_unknown_fields=True):
    """The base of all inputs: unknown fields are refused."""


class Nothing(Input):
    """An empty object."""


class NewLimits(Input):
    """Limits. A limit that is left out falls back to the account's or the settings'; a budget that
    is left out means no budget."""

    concurrency: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    monthly_budget: LimitAmount | None = None


class NewAccount(NewLimits, kw_only=True):
    """An account to create, with its limits."""

    name: AccountName
    email: Text | None = None
    credit_limit: LimitAmount | None = None


class AccountChange(Input):
    """Changes to an account. Fields that are left out stay as they are; null goes back to the
    settings' value."""

    email: Text | UnsetType | None = UNSET
    concurrency: Limit | UnsetType | None = UNSET
    requests_per_minute: Limit | UnsetType | None = UNSET
    tokens_per_minute: Limit | UnsetType | None = UNSET
    credit_limit: LimitAmount | UnsetType | None = UNSET
    monthly_budget: LimitAmount | UnsetType | None = UNSET


class Suspension(Input):
    """Why an account is suspended. Only operators see `reason`."""

    reason: Text | None = None


class Throttle(Input):
    """A temporary reduction of an account's limits. `factor` is the fraction that is left, from
    0.001 to 1; 1 removes the throttle. Without `until`, it lasts until it is removed."""

    factor: Factor
    until: Time | None = None


class NewKey(NewLimits):
    """An API key to create. `expires` is a time or a duration from now. `models` are shell
    patterns, as a list or separated by commas: at most 100, together at most 4,000 characters, each
    with at most 10 of the characters * ? [."""

    label: Text = ""
    models: Patterns | Annotated[tuple[ModelName, ...], Meta(min_length=1)] | None = None
    expires: Time | None = None


class Revocation(Input):
    """How to revoke a key. `compromised` means that the key was leaked: its requests in flight are
    stopped, too."""

    compromised: bool = False


class Rotation(Input):
    """How to rotate a key. The old key keeps working for `overlap`."""

    overlap: Duration = "24h"


@with_members(dict.fromkeys(RATES, Amount | None), None)
class NewPrice(Input):
    """A price for one or more model names or patterns, per million tokens; `web_search` and
    `file_search` are per call, `container` is per new container. `effective` is a time or a
    duration from now; the default is now."""

    model: Model | Annotated[tuple[ModelName, ...], Meta(min_length=1)]
    tier: Tier = DEFAULT_TIER
    above_input_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    effective: Time | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    source: Source | None = None


class NewPrices(Input):
    """Prices to add. With `take_over`, rates that a price leaves out are copied from the price that
    it replaces, or from the one that applied to its model before; otherwise the price has no such
    rates. `without_notice` is the reason to skip the notice period for increases. Prices are
    refused if `currency` is given and is not the ledger's."""

    prices: tuple[NewPrice, ...]
    take_over: bool = True
    without_notice: Reason | None = None
    currency: Text | None = None
    source: Source | None = None


class NewPayment(Input):
    """A payment to record. One with the same `reference` and amount is recorded once. A negative
    amount needs a `reason`."""

    amount: Amount
    reference: Annotated[str, LINE, Meta(min_length=1, max_length=200)] | None = None
    reason: Reason | None = None


class NewNotice(Input):
    """A notice to publish. `effective` defaults to now, `until` to no end. With `refuses_requests`
    (maintenance only), new requests are rejected with 503 during the window."""

    kind: Literal["price", "terms", "maintenance", "incident"]
    text: Annotated[
        str,
        matching(
            r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$",
            "text without control characters",
            min_length=1,
            max_length=NOTICE_TEXT,
        ),
    ]
    effective: Time | None = None
    until: Time | None = None
    refuses_requests: bool = False


class NewUser(Input):
    """A login to add. An operator has no account. If an owner adds a login, it belongs to the
    owner's account."""

    email: Email
    role: Literal["operator", "owner", "viewer"] = "owner"
    account: AccountName | None = None


class UsersQuery(Input):
    """Filters for users. All are optional."""

    account: Filter | None = None
    role: Literal["operator", "owner", "viewer"] | None = None


class NewPassword(Input):
    """A change of one's own password."""

    old_password: Annotated[str, Meta(max_length=4000)]
    new_password: Annotated[str, Meta(max_length=4000)]


class WhichPriceQuery(Input):
    """A request to find the price of: its `model`, the service `tier` that the response reports,
    its number of input tokens, and its time (a time or a duration from now; the default is now)."""

    model: ModelName
    tier: Tier = DEFAULT_TIER
    input_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    at: Time | None = None


class CodexConfigQuery(Input):
    """The `key`, by id or label, for which to configure Codex CLI; with `own_login` for users with
    a login or key of their own."""

    key: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    own_login: Literal["true", "false"] | None = None


class WhichUser(Input):
    """Which login is meant, if an email address has several."""

    account: Filter | None = None
    operator: bool = False


class UsageQuery(Input):
    """Filters for usage. All are optional. `key` is a key's id, `model` a shell pattern. `failed`
    selects requests whose upstream failed or answered with an error; `failure`, those of them with
    this `upstream_error_code` or HTTP status."""

    account: Filter | None = None
    key: Filter | None = None
    model: Filter | None = None
    since: Time | None = None
    until: Time | None = None
    failed: bool = False
    failure: Filter | None = None


class RequestsQuery(UsageQuery):
    """Filters for requests. `limit` keeps the newest ones. `before` keeps those older than the
    request with that id."""

    limit: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    before: Cursor | None = None


class SumsQuery(UsageQuery):
    """Filters and groups for sums. `group_by` is any of day, model, key and account, separated by
    commas. With `top`, only that many models, the most expensive ones, are named; all others form
    one group whose model is null."""

    group_by: Groups = ""
    top: Annotated[int, Meta(ge=1, le=1000)] | None = None


class StatementQuery(Input):
    """`limit` keeps the first lines of usage. Totals cover all of them."""

    limit: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None


class AccountsQuery(Input):
    """Filters for accounts. `search` looks in names and email addresses. `after` keeps names that
    sort after this one."""

    search: Filter = ""
    after: Filter = ""
    limit: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None


class NewTime(Input):
    """The time to move later entries to. The default is now; a duration counts back from now. With
    `preview`, nothing is changed."""

    time: Time | None = None
    preview: bool = False


class ChangesQuery(Input):
    """Filters for changes: the newest `limit`, or those before the change with the id `before`."""

    account: Filter | None = None
    before: Annotated[int, Meta(ge=1, le=1 << 62)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class NewRest(Input, rename={"duration": "for"}):
    """For how long an upstream is to rest: at most 30 days."""

    duration: Duration = "10m"


class NewestQuery(Input):
    """How many to list: the newest `limit`."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class OverviewQuery(Input):
    """What the overview covers: traffic of the last `days`, and the `limit` top accounts by
    spending this month."""

    days: Annotated[int, Meta(ge=1, le=366)] = 30
    limit: Annotated[int, Meta(ge=1, le=100)] = 10
