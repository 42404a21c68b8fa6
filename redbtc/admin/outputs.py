"""Define the answers of the admin API. Docstrings of the types are descriptions in openapi.json."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from redbtc.admin.users import SessionShown, UserShown
from redbtc.billing.overviews import AccountInList, Lately, Month, SpendingOverview, TrafficOfDay
from redbtc.billing.records import Balance, Notice, Payment
from redbtc.billing.reports import Group, RequestShown, Sums
from redbtc.store.accounts import Account, KeyInList, KeyShown
from redbtc.store.changes import Change
from redbtc.store.json_values import Moment, Money


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
    """Sums by group, and in total."""

    groups: list[Group]
    totals: Sums


class RequestReport(Struct):
    """Requests, oldest first. Totals cover the whole range, whatever the limit."""

    requests: list[RequestShown]
    totals: Sums


class MonthList(Struct):
    """Months, newest first."""

    months: list[Month]


class ChangeList(Struct):
    """Changes, newest first."""

    changes: list[Change]


class DatabaseSize(Struct):
    """The size of the database, and the room on its disk."""

    bytes: int
    free_bytes: int
    disk_bytes: int


class UpstreamAtWork(Struct):
    """An upstream of the running gateway."""

    name: str
    usable: bool
    in_flight: int


class AtWork(Struct):
    """Requests in flight and queued, what was refused since the start, and the upstreams."""

    running: bool
    uptime_seconds: int
    in_flight: int
    queued: int
    refusals: dict[str, int]
    upstreams: list[UpstreamAtWork]


class Overview(AtWork):
    """The state of the gateway, traffic and spending."""

    traffic: list[TrafficOfDay]
    spending: SpendingOverview
    lately: Lately
    database: DatabaseSize


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
