"""The connections of clients: the state and the deadline of each, and how many there may be.

A connection is in one `ConnectionState`, which `Connection.enter` alone changes, and each state in
which the app does not run has a deadline. One timer a second looks at the deadlines of all
connections.

    idle ─► head ─► serving ─┬─────────────► idle         the request was read whole
                             ├─► discarding ─► idle       the response came before the body's end
                             └─► closing ─► closed        no further request can follow

"closing" can also follow "discarding", where the rest of the body can't be read. A WebSocket
handshake leaves these states: the connection gets uvicorn's WebSocket protocol instead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from redbtc.server.stream import ClientStream
from redbtc.telemetry import log

SWEEP_SECONDS = 1  # between two looks at all deadlines
LINGER_SECONDS = 2  # for the client to read the end: closing on unread bytes resets the connection
PROGRESS_SECONDS = 60  # more for a client that has not read all, as long as it reads some in each
CALM_SECONDS = 60  # below the maximum of connections until the log says so
RESERVED_DESCRIPTORS = 64  # for the ledger, listening sockets, files


ConnectionState = Literal[
    "idle",  # no request: not a byte of the next one has arrived
    "head",  # a request's head is arriving
    "serving",  # the app runs; the request's body may still be arriving
    "discarding",  # the response is complete; the rest of the request's body is thrown away
    "closing",  # the last response is complete; whatever still arrives is thrown away
]


class Connection:
    """One client's connection: its stream, its state and its deadline."""

    def __init__(self, connections: Connections, stream: ClientStream) -> None:
        self.stream = stream
        self.state: ConnectionState = "idle"
        self.deadline = math.inf
        self.closed = False
        self.is_new = True  # it has had no request
        self.keyed = False  # the last response was that of a request with a valid key
        self._connections = connections
        self._unsent = 0  # bytes in the write buffer when the deadline last passed
        self._discarded = 0  # bytes since the state changed

    def enter(self, state: ConnectionState, seconds: float = math.inf) -> None:
        """Change the state. Its deadline is in `seconds`; by default it has none."""
        connections = self._connections
        self.state = state
        self.deadline = connections.now() + seconds if seconds < math.inf else math.inf
        self._unsent = self._discarded = 0
        if self in connections.keyed_waiting:
            del connections.keyed_waiting[self]
        if state == "serving":
            self.is_new = False
            connections.waiting.pop(self, None)
        else:
            connections.waiting[self] = None  # keeps its position if it is there already

    def limit_serving(self, seconds: float) -> None:
        """Set a deadline in `seconds` while the app runs; infinity means none."""
        if self.state == "serving":
            self.deadline = self._connections.now() + seconds

    async def make_room_until(self, event: Awaitable[Any], keyed: bool) -> None:
        """Wait for the client. Meanwhile the connection may be closed to make room for others.
        `keyed`: the request has a valid key."""
        connections = self._connections
        waiting = connections.keyed_waiting if keyed else connections.waiting
        waiting[self] = None
        try:
            await event
        finally:
            if self.state == "serving":
                waiting.pop(self, None)

    def close(self, whole: bool) -> None:
        """Close after the last response. `whole`: all that the client sent has been read, so that
        closing at once can't reset the connection before the client has read the response."""
        self.stream.flush_head()
        if whole:
            self.stream.close()
        else:
            self.stream.close_writing()
        self.enter("closing", LINGER_SECONDS)

    def tear(self, ends_by_closing: bool) -> None:
        """Close in the middle of a response, in a way that the client can't take for the end of the
        response. `ends_by_closing`: only the connection's end marks the end of the response."""
        self.stream.flush_head()
        if ends_by_closing:
            self.stream.abort()
            return
        self.stream.close()
        self.enter("closing", LINGER_SECONDS)

    def expire(self) -> None:
        """Abort the connection, whose deadline has passed. While the write buffer is not empty,
        extend the deadline once, and again each time that the client has read some since."""
        unsent = self.stream.unsent_bytes
        if unsent and unsent != self._unsent:
            self._unsent = unsent
            self.deadline = self._connections.now() + PROGRESS_SECONDS
        else:
            self.stream.abort()

    def discard(self, size: int, maximum: int) -> bool:
        """Count bytes that are thrown away. Abort the connection and return False if there have
        been more than `maximum` in this state."""
        self._discarded += size
        if self._discarded > maximum:
            self.stream.abort()
            return False
        return True


class Connections:
    """The connections of a server. Checks their deadlines and limits their number."""

    def __init__(
        self,
        offers_websocket: Callable[[], bool] = lambda: False,
        max_connections: int | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        """`max_connections` is by default half of the descriptor limit; `now` is a monotonic clock
        in seconds."""
        loop = asyncio.get_running_loop()
        self.offers_websocket = offers_websocket
        self.now = now or loop.time
        self.open: set[Connection] = set()
        # Connections for which no app runs, or, for a request without a valid key, one that waits
        # for the client: to send the body or to read the response. The one that has been here the
        # longest comes first.
        self.waiting: dict[Connection, None] = {}
        # Those that wait for the client of a request with a valid key. They make room after the
        # others, so that no account can take all connections with bodies that never end or
        # responses that are not read.
        self.keyed_waiting: dict[Connection, None] = {}
        # Called with the protocol of each connection that has no request, before one begins: the
        # connections are to go on in another process.
        self.on_idle: Callable[[Any], None] | None = None
        self.stay = True  # False: each is closed after its next response
        self._loop = loop
        self._max = max_connections or max_client_connections()
        self._sweeping = False
        self._number = 0  # of connections, WebSockets included
        self._full_at = -math.inf  # when there were too many last; -inf: not since the log said so

    @property
    def unsent(self) -> bool:
        """Return whether there are clients with a valid key that have not read all of a response
        that is complete."""
        return any(each.keyed and each.stream.unsent_bytes for each in self.open)

    def add(self, connection: Connection, number: int) -> None:
        """Add a new connection. `number` is how many are open with it, WebSockets included. Above
        the maximum, abort the connection that has been in `waiting` for the longest time; if only
        the new one is there, the one that has been in `keyed_waiting` for the longest time."""
        self.open.add(connection)
        self._number = number
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_SECONDS, self._sweep)
        if number > self._max:
            if self._full_at == -math.inf:
                log(logging.WARNING, "too many connections", open=number, maximum=self._max)
            self._full_at = self.now()
            oldest = next(iter(self.waiting))
            if oldest is connection:
                oldest = next(iter(self.keyed_waiting), connection)
            oldest.stream.abort()

    def discard(self, connection: Connection, number: int) -> None:
        """Remove a connection that has ended. `number` are left, WebSockets included."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.keyed_waiting.pop(connection, None)
        self._number = number

    def _sweep(self) -> None:
        now = self.now()
        for connection in [each for each in self.open if each.deadline <= now]:
            connection.expire()
        if self._number < self._max and -math.inf < self._full_at <= now - CALM_SECONDS:
            self._full_at = -math.inf
            log(logging.INFO, "connections are accepted again", open=self._number)
        self._sweeping = bool(self.open) or self._full_at > -math.inf
        if self._sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)


def max_client_connections() -> int:
    """Return how many client connections may be open: half of the files that may be open, since a
    request may need a connection to an upstream as well."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, (limit - RESERVED_DESCRIPTORS) // 2) if limit > 0 else sys.maxsize
