"""The messages between a gateway and the process that takes over from it. The two can be of
different versions of this program: unknown fields and messages are ignored, and new fields need a
default.

    old process                                new process
    Offer (locks, listeners) ────────────────►
                             ◄──────────────── Ready, or NeedsRestart
    GatewayState ────────────────────────────►
                             ◄──────────────── Serves
    Go ──────────────────────────────────────►
    Moved (connections), InFlightReport … ───►
                             ◄──────────────── AbortElsewhere, EndElsewhere, ForgetBodies
    Forgot ──────────────────────────────────►

After NeedsRestart, Restart takes the place of GatewayState, and only Moved follows. A new process
that can't serve ends: its standard error says why.
"""

from __future__ import annotations

import msgspec

from redbtc.gateway.handover.state import GatewayState, InFlightReport


class Offer(msgspec.Struct, tag=True):
    """The things that the new process needs to open the ledger beside the old one. Its files are
    the two locks of the database, the file whose locks are turns to write, the listeners, and the
    listener of the socket for commands if there is one."""

    database: str  # path
    listeners: int  # how many
    are_activated: bool  # the listeners are those of a supervisor, whatever the settings say
    admin_file: tuple[int, int] = (0, 0)  # device and inode of the socket for commands


class Ready(msgspec.Struct, tag=True):
    """The new process has checked everything, and waits for the state."""

    version: str
    pid: int


class NeedsRestart(msgspec.Struct, tag=True):
    """The new process has to migrate the ledger, which the old one could not write any more."""

    schema_before: int
    schema_after: int
    version: str
    pid: int


class Restart(msgspec.Struct, tag=True):
    """The old process ends before long. The new one is to open the ledger after that."""


class Serves(msgspec.Struct, tag=True):
    """The new process has the state, and can serve."""


class Go(msgspec.Struct, tag=True):
    """The new process serves from now on. Without it, the old one does: it may have stopped waiting
    for the new one."""


class Moved(msgspec.Struct, tag=True):
    """Connections that go on in the new process. Its files are their sockets."""

    received: list[bytes]  # by connection, what has arrived and was not served


class AbortElsewhere(msgspec.Struct, tag=True):
    """Abort what is in flight for keys, and the background responses of a key or an account."""

    keys: list[str]
    owner_id: str


class EndElsewhere(msgspec.Struct, tag=True):
    """Abort all that is in flight."""


class ForgetBodies(msgspec.Struct, tag=True):
    """Erase the stored bodies of an account, or of one of its keys, and store nothing more of its
    requests in flight; with `days`, let them expire so many days after they were logged, but for
    those of `except_keys`."""

    number: int
    account_id: str
    key_id: str | None
    days: int | None
    except_keys: list[str]


class Forgot(msgspec.Struct, tag=True):
    """The ForgetBodies with this number was carried out."""

    number: int


HandoverMessage = (
    Offer
    | Ready
    | NeedsRestart
    | GatewayState
    | Go
    | Restart
    | Serves
    | Moved
    | InFlightReport
    | AbortElsewhere
    | EndElsewhere
    | ForgetBodies
    | Forgot
)
