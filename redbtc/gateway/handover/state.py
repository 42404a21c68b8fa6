"""The state that a process tells the one that takes over from it."""

from __future__ import annotations

import msgspec

from redbtc.gateway.uptime import UptimeCheck
from redbtc.telemetry import MetricNumbers
from redbtc.upstream.absences import Absence

Amounts = dict[str, int]
# An account's id, and a key's budget_id ("": the account itself).
Payer = tuple[str, str]


class BucketState(msgspec.Struct, array_like=True):
    """A token bucket."""

    limit: int
    level: float


class CounterState(msgspec.Struct, array_like=True):
    """The counters of a key, an account or the gateway, but for their places."""

    requests: BucketState
    tokens: BucketState
    small_frames: BucketState


class SpendingState(msgspec.Struct, array_like=True):
    """The amounts that an account or a key has paid and spent, in nanos, without what it holds."""

    paid: int
    cost: int
    spent: int
    month: str
    notified_percent: int


class InFlightState(msgspec.Struct):
    """The state of what is in flight in a process."""

    pid: int
    places: Amounts = {}  # by the name of the counters
    upstreams: Amounts = {}  # by the name of the member
    held: dict[Payer, int] = {}  # nanos
    growth: Amounts = {}  # tokens, by object
    keys: Amounts = {}  # what can be aborted, by key
    unfinished: Amounts = {}  # background responses, by account
    rows: set[str] = set()  # request ids
    billed: set[str] = set()  # those of `rows` whose cost is in the totals
    followed: set[str] = set()  # ids of background responses whose requests are in flight


class EarlierState(msgspec.Struct):
    """The state of what is in flight in a process that this one has taken over from."""

    state: InFlightState
    unread: bytes  # of its channel
    files: int  # that were received with them


class GatewayState(msgspec.Struct, tag=True):
    """The state that a process has in memory and not in the ledger. With it go the channels of
    `earlier`, each followed by the files that were received over it."""

    clock: tuple[int, ...]
    uptime: UptimeCheck | None  # the last check
    counters: dict[str, CounterState]  # by name, see Limiter.counters
    spendings: dict[Payer, SpendingState]
    in_flight: InFlightState
    moved_sessions: dict[bytes, str]
    outages: dict[str, Absence]  # by member; their times are by the monotonic clock
    metrics: MetricNumbers
    earlier: list[EarlierState]


class InFlightReport(msgspec.Struct, tag=True, omit_defaults=True):
    """The changes since the last report. Amounts are the present ones, except in `drawn` and
    `spent`, which are to be added."""

    places: Amounts = {}
    drawn: dict[str, tuple[float, float]] = {}  # requests and tokens, by counters
    upstreams: Amounts = {}
    held: dict[Payer, int] = {}
    spent: dict[Payer, int] = {}  # nanos
    growth: Amounts = {}
    keys: Amounts = {}
    unfinished: Amounts = {}
    begun: set[str] = set()  # rows
    ended: set[str] = set()  # rows
    billed: set[str] = set()  # rows
    followed: set[str] | None = None
    left: list[str] = []  # ids of background responses that the other process is to ask for
    metrics: MetricNumbers = {}  # to be added
    changed: bool = False  # prices, notices, payments or documents
