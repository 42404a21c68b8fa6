"""Define the answers of the admin API. Docstrings of the types are descriptions in openapi.json."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from redbtc.admin.uptime_report import UptimeTotals
from redbtc.admin.users import SessionShown, UserShown
from redbtc.billing.overviews import AccountInList, Lately, Month, SpendingOverview, TrafficOfDay
from redbtc.billing.records import Balance, Notice, Payment
from redbtc.billing.reports import Group, RequestShown, Sums
from redbtc.billing.unpriced_models import UnpricedModel
from redbtc.billing.webhook_messages import WebhookMessage
from redbtc.store.accounts import Account, KeyInList, KeyShown
from redbtc.store.changes import Change
from redbtc.store.closing import AskedToClose
from redbtc.store.json_values import Moment, Money
from redbtc.store.upstream_changes import UpstreamChangeShown, UpstreamState


class Error(Struct):
    """An error, as in OpenAI's API."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refused(Struct):
    """The body of an error response."""

    error: Error


class AccountWithMoney(Account, kw_only=True):
    """An account with its money. If `available` is null, its credit is unlimited."""

    balance: Money
    held: Money
    available: Money | None
    month: str
    spent_this_month: Money
    currency: str


class AccountList(Struct):
    """Accounts, by name."""

    accounts: list[AccountInList]


class KeyList(Struct):
    """Keys, oldest first."""

    keys: list[KeyInList]


class KeyRevoked(KeyShown):
    """A revoked key. `cut` is the number of its requests in flight that were stopped."""

    cut: int


class PaymentList(Struct):
    """Payments, oldest first."""

    payments: list[Payment]


class PaymentAdded(Payment, kw_only=True):
    """A new payment and the balance after it."""

    balance: Money


class NoticeWithdrawn(Notice, kw_only=True):
    """A notice and when it was withdrawn."""

    withdrawn_at: Moment


class NoticeList(Struct):
    """Notices, by the time they take effect."""

    notices: list[Notice]


class UserList(Struct):
    """Logins, operators first."""

    users: list[UserShown]


class SessionList(Struct):
    """Sessions, most recently used first."""

    sessions: list[SessionShown]


class Done(Struct):
    """Confirmation that the change was made."""

    ok: bool


class UsageReport(Struct):
    """Sums by group, and in total. If requests of the range were erased since they were old
    (retention.usage_days), `erased_before` is the time before which: there only whole days can be
    counted, and no failures."""

    groups: list[Group]
    totals: Sums
    erased_before: Moment | None


class RequestReport(Struct):
    """Requests, oldest first. Totals cover the whole range, whatever the limit. `erased_before` is
    as in UsageReport; the requests before it are not listed. `logged` are the ids of those of which
    bodies are stored; only owners and operators see it."""

    requests: list[RequestShown]
    totals: Sums
    erased_before: Moment | None
    logged: list[str] | UnsetType = UNSET


class MonthList(Struct):
    """Months, newest first."""

    months: list[Month]


class ChangeList(Struct):
    """Changes, newest first."""

    changes: list[Change]


class UpstreamChangeList(Struct):
    """Changes of upstreams, newest first."""

    changes: list[UpstreamChangeShown]


class WebhookMessageList(Struct):
    """Messages to the webhook, newest first. If `configured` is false, there is no webhook in the
    settings, or the environment variable of its secret is not set: nothing is sent."""

    configured: bool
    messages: list[WebhookMessage]


class DatabaseSize(Struct):
    """The size of the database, and the room on its disk."""

    bytes: int
    free_bytes: int
    disk_bytes: int


class RestAtWork(Struct):
    """A rest of an upstream. If `model` is null, it rests for all models; if `until` is null, it
    rests until a request succeeds."""

    model: str | None
    reason: str
    until: Moment | None


class LastError(Struct):
    """The last failure of an upstream: its code or cause, and its time."""

    code: str
    at: Moment


class UpstreamAtWork(Struct):
    """An upstream of the running gateway, with one of its keys. `reason` says why it is not up or,
    if it is up, why it would be out if there were another one. `until` is null if it is up, or if
    its state lasts until a request succeeds. `organization` is null if the settings name none. If
    `max_concurrency` is 0, there is no limit. `requests`, `success_rate` (from 0 to 1) and
    `median_first_byte_ms` are of the last 5 minutes."""

    name: str
    usable: bool
    state: UpstreamState
    since: Moment
    reason: str | None
    until: Moment | None
    rests: list[RestAtWork]
    in_flight: int
    max_concurrency: int
    priority: int
    weight: int
    models: list[str]
    organization: str | None
    requests: int
    success_rate: float | None
    median_first_byte_ms: int | None
    last_error: LastError | None


class UpstreamList(Struct):
    """The upstreams in the order of the settings. If `running` is false, no gateway runs, and the
    list is empty."""

    running: bool
    upstreams: list[UpstreamAtWork]


class CodexConfig(Struct):
    """What to put into Codex CLI's config.toml, and what it was made from."""

    config: str
    model: str
    base_url: str
    websocket: bool
    catalog: bool


class UpstreamRested(UpstreamAtWork, kw_only=True):
    """An upstream that rests now. `unserved_models` are those of its model patterns that no other
    upstream serves meanwhile."""

    unserved_models: list[str]


class Reloaded(Struct):
    """A process that takes over from the one that has answered. If it `restarts` the gateway, since
    it has to migrate the ledger, it serves once the other process has ended, for which requests in
    flight have `seconds`."""

    pid: int
    version: str
    restarts: bool = False
    seconds: float | None = None


class AtWork(Struct):
    """Requests in flight and queued, what was refused since the start, and the upstreams."""

    running: bool
    uptime_seconds: int
    in_flight: int
    queued: int
    refusals: dict[str, int]
    upstreams: list[UpstreamAtWork]


class UnpricedModelList(Struct):
    """Models that were refused since they have no price, the latest first."""

    models: list[UnpricedModel]


class Overview(AtWork):
    """The state of the gateway, traffic and spending. `unpriced` are models that were refused since
    they have no price."""

    traffic: list[TrafficOfDay]
    spending: SpendingOverview
    lately: Lately
    database: DatabaseSize
    closing: list[AskedToClose]
    uptime: UptimeTotals
    unpriced: list[UnpricedModel]


class MeShown(Struct):
    """The balance, limits and notices of the account that a key belongs to."""

    account: str
    account_id: str
    key_id: str
    balance: Balance
    limits: dict[str, Any]
    notices: list[Notice]


class Check(Struct):
    """The result of a database check: problems, one per line."""

    ok: bool
    problems: list[str]
