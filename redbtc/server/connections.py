"""All connections of clients: their states, their deadlines and how many there may be."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from redbtc.telemetry import log

if TYPE_CHECKING:
    from redbtc.server.protocol import HTTPProtocol


SWEEP_SECONDS = 1  # between two looks at all deadlines
CALM_SECONDS = 60  # below the maximum of connections until the log says so
RESERVED_DESCRIPTORS = 64  # for the ledger, listening sockets, files


class State(enum.Enum):
    """The states of a connection."""

    IDLE = "no request: not a byte of the next one has arrived"
    HEAD = "a request's head is arriving"
    SERVING = "the app runs; the request's body may still be arriving"
    DISCARDING = "the response is complete; the rest of the request's body is thrown away"
    CLOSING = "the last response is complete; whatever still arrives is thrown away"


class Connections:
    """All connections of a server: checks their deadlines and limits their number."""

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
        self.open: set[HTTPProtocol] = set()
        # Connections for which no app runs, or, for a request without a valid key, one that waits
        # for the client: to send the body or to read the response. The one that has been here the
        # longest comes first.
        self.waiting: dict[HTTPProtocol, None] = {}
        # Those that wait for the client of a request with a valid key. They make room after the
        # others, so that no account can take all connections with bodies that never end or
        # responses that are not read.
        self.keyed_waiting: dict[HTTPProtocol, None] = {}
        self._loop = loop
        self._max = max_connections or max_client_connections()
        self._sweeping = False
        self._number = 0  # of connections, WebSockets included
        self._full_at = -math.inf  # when there were too many last; -inf: not since the log said so

    @property
    def unsent(self) -> bool:
        """Whether a client with a valid key has not read all of a response that is complete."""
        return any(each.keyed and each.transport.get_write_buffer_size() for each in self.open)

    def add(self, connection: HTTPProtocol, number: int) -> None:
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
            oldest.abort()

    def discard(self, connection: HTTPProtocol, number: int) -> None:
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
