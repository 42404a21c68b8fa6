"""The messages between a gateway and the process that takes over from it. The two can be of
different versions of this program: unknown fields are ignored, and new ones need a default.

    old process                                new process
    Offer (locks, listeners) ────────────────►
                             ◄──────────────── Ready, or NeedsRestart
    State ───────────────────────────────────►
                             ◄──────────────── Serving
    Moved (connections), Report … ───────────►
                             ◄──────────────── Abort, End

After NeedsRestart, Restart takes the place of State, and only Moved follows. A new process that
can't serve ends: what it has written to standard error says why.
"""

from __future__ import annotations

import msgspec

from redbtc.gateway.handover.state import Report, State


class Offer(msgspec.Struct, tag=True):
    """What the new process needs to open the ledger beside the old one. Its files are the two locks
    of the database, the file whose locks are turns to write, the listeners, and the listener of the
    socket for commands if `has_admin`."""

    database: str  # path
    listeners: int
    has_admin: bool


class Ready(msgspec.Struct, tag=True):
    """The new process has checked everything, and waits for the state."""

    version: str


class NeedsRestart(msgspec.Struct, tag=True):
    """The new process has to migrate the ledger, which the old one could not write any more."""

    schema_before: int
    schema_after: int


class Restart(msgspec.Struct, tag=True):
    """The old process ends before long. The new one is to open the ledger after that."""


class Serving(msgspec.Struct, tag=True):
    """The new process has the state, and serves from now on."""


class Moved(msgspec.Struct, tag=True):
    """Connections that go on in the new process. Its files are their sockets."""

    received: list[bytes]  # by connection, what has arrived and was not served


class Abort(msgspec.Struct, tag=True):
    """Abort what is in flight for keys, and the background responses of a key or an account."""

    keys: list[str]
    owner_id: str


class End(msgspec.Struct, tag=True):
    """Abort all that is in flight."""


Message = Offer | Ready | NeedsRestart | State | Restart | Serving | Moved | Report | Abort | End
