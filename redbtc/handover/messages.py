"""The messages between a gateway and its successor. Both can be of different versions of this
program: fields that one of them does not know are ignored, and new fields need a default.

    old                                        new
    Offer (locks, listeners) ─────────────────►
    ◄───────────────────────────────── Ready, NeedsRestart or Failed
    State, in parts (Taken) ──────────────────►
    ◄──────────────────────────────────────── Serving
    Moved (connections), Report, Gone ────────►
    ◄──────────────────────────────── Abort, End
"""

from __future__ import annotations

import msgspec

Amounts = dict[str, int]
# An account's id, and a key's budget_id ("": the account itself).
Payer = tuple[str, str]


class Offer(msgspec.Struct, tag=True):
    """What the new process needs to open the ledger beside the old one. Files: the two locks of the
    database, the file whose locks are turns to write, the listeners, and the listener of the Unix
    socket, if there is one."""

    pid: int
    database: str
    schema: int
    port: int
    listeners: int
    has_admin: bool


class Ready(msgspec.Struct, tag=True):
    """The new process has checked everything and can serve."""

    version: str


class NeedsRestart(msgspec.Struct, tag=True):
    """The new process needs a schema that the old process can't write."""

    schema_before: int
    schema_after: int


class Failed(msgspec.Struct, tag=True):
    """The new process can't serve, and ends."""

    reason: str


class BucketLevel(msgspec.Struct, array_like=True):
    """The state of a token bucket."""

    limit: int
    level: float


class CounterState(msgspec.Struct, array_like=True):
    """The counters of a key, an account or the gateway."""

    taken: int
    requests: BucketLevel
    tokens: BucketLevel
    small_frames: BucketLevel


class SpendingState(msgspec.Struct, array_like=True):
    """What an account or a key has paid, spent and holds, in nanos."""

    paid: int
    cost: int
    spent: int
    held: int
    month: str
    notified_percent: int


class InFlightState(msgspec.Struct):
    """What is in flight in a process that another one has taken over from."""

    pid: int
    places: Amounts = {}  # by the name of the counters, as in State
    upstreams: Amounts = {}  # by the name of the member
    held: dict[Payer, int] = {}  # nanos
    growth: Amounts = {}  # tokens, by object
    keys: Amounts = {}  # requests, by key
    unfinished: Amounts = {}  # background responses, by account
    rows: set[str] = set()  # request ids
    followed: set[str] = set()  # ids of background responses whose requests are in flight


class Earlier(msgspec.Struct):
    """A process before the old one that still finishes its requests. Its channel is a file of the
    message."""

    state: InFlightState
    unread: bytes


class State(msgspec.Struct, tag=True):
    """What the old process knows and the ledger does not. Files: the channels of `earlier`."""

    counters: dict[str, CounterState]  # "" is the gateway, else "account ID" or "key ID"
    spendings: dict[Payer, SpendingState]
    in_flight: InFlightState
    moved_sessions: dict[bytes, str]
    earlier: list[Earlier]


class Serving(msgspec.Struct, tag=True):
    """The new process has the state, and is about to accept connections."""


class Moved(msgspec.Struct, tag=True):
    """Connections that go on in the new process, with the bytes that have arrived on them. Files:
    the connections."""

    received: list[bytes]


class Report(msgspec.Struct, tag=True, omit_defaults=True):
    """What has changed in the old process since the last report. Amounts are the present ones, but
    for `drawn` and `spent`."""

    places: Amounts = {}
    drawn: dict[str, tuple[float, float]] = {}  # requests and tokens, by counters
    upstreams: Amounts = {}
    held: dict[Payer, int] = {}
    spent: dict[Payer, int] = {}  # nanos
    growth: Amounts = {}
    keys: Amounts = {}
    unfinished: Amounts = {}
    begun: list[str] = []  # rows
    ended: list[str] = []  # rows
    left: list[str] = []  # ids of background responses that the new process is to ask for
    changed: bool = False  # prices, notices, payments or documents


class Gone(msgspec.Struct, tag=True):
    """The old process has finished, and nothing of it is in flight."""


class Abort(msgspec.Struct, tag=True):
    """Abort what runs for keys and accounts."""

    keys: list[str]
    owners: list[str]  # keys or accounts whose background responses are to be cancelled


class End(msgspec.Struct, tag=True):
    """Abort all that is in flight."""


Message = (
    Offer | Ready | NeedsRestart | Failed | State | Serving | Moved | Report | Gone | Abort | End
)
