"""What the admin API answers."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from redbtc.admin.users import SessionShown, UserShown
from redbtc.billing.overviews import AccountInList, Lately, Month, Spending, TrafficOfDay
from redbtc.billing.records import Balance, Notice, Payment
from redbtc.billing.reports import Group, RequestShown, Sums
from redbtc.store.accounts import Account, KeyInList, KeyShown
from redbtc.store.changes import Change
from redbtc.store.records import Moment, Money


class Error(Struct):
    """OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refused(Struct):
    """What an error's body is."""

    error: Error


class AccountWithMoney(Account, kw_only=True):
    """And what it may spend; `available` of null is without limit."""

    balance: Money
    held: Money
    available: Money | None
    month: str
    spent_this_month: Money
    currency: str


class AccountList(Struct):
    """By name."""

    accounts: list[AccountInList]


class KeyList(Struct):
    """Oldest first."""

    keys: list[KeyInList]


class KeyRevoked(KeyShown):
    """`cut`: how many of its requests were in flight and are not any more."""

    cut: int


class PaymentList(Struct):
    """Oldest first."""

    payments: list[Payment]


class PaymentAdded(Payment, kw_only=True):
    """And the balance with it."""

    balance: Money


class NoticeWithdrawn(Notice, kw_only=True):
    """And since when."""

    withdrawn_at: Moment


class NoticeList(Struct):
    """By when they take effect."""

    notices: list[Notice]


class UserList(Struct):
    """Operators first."""

    users: list[UserShown]


class SessionList(Struct):
    """The last used first."""

    sessions: list[SessionShown]


class Done(Struct):
    """There is nothing to tell."""

    ok: bool


class UsageReport(Struct):
    """Sums by groups, and of all."""

    groups: list[Group]
    totals: Sums


class RequestReport(Struct):
    """Oldest first; the totals are of the whole range, whatever the limit."""

    requests: list[RequestShown]
    totals: Sums


class MonthList(Struct):
    """The newest first."""

    months: list[Month]


class ChangeList(Struct):
    """The newest first."""

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
    """What an operator looks at first."""

    traffic: list[TrafficOfDay]
    spending: Spending
    lately: Lately
    database: DatabaseSize


class MeShown(Struct):
    """An account's own figures, for one of its keys."""

    account: str
    account_id: str
    key_id: str
    balance: Balance
    limits: dict[str, Any]
    notices: list[Notice]


class Check(Struct):
    """What is wrong with the file, line by line."""

    ok: bool
    problems: list[str]
