"""The client's side of HTTP/1.1: what happens on one connection, from request to request.

`HTTPProtocol` joins the parts: a ClientStream (bytes and flow control), a Connection (state and
deadline), a HeadReader while a head arrives, and a RequestCycle while the app runs. Where a body
ends is decided by the one Content-Length or Transfer-Encoding that `check_head` lets through.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Scope
from redbtc.server.connections import Connection, Connections
from redbtc.server.cycle import RequestCycle
from redbtc.server.framing import (
    BadFraming,
    Endless,
    Framing,
    check_handshake,
    check_head,
    framing_of,
    is_handshake,
)
from redbtc.server.head import Address, HeadReader
from redbtc.server.stream import ClientStream
from redbtc.telemetry import UNEXPECTED, log, shown_error

HEAD_SECONDS = 30  # for a whole head; on a new connection, also for its first byte to arrive
KEEP_ALIVE_SECONDS = 75  # longer than nginx's 60, so that nginx never sends on a closed connection
DISCARD_SECONDS = 30  # for the rest of a body whose request was answered
MAX_DISCARDED = 256 << 20  # bytes of such a rest
MAX_LINGER = 4 << 20  # bytes that are thrown away after the last response
WRITE_SECONDS = 300  # for the client to read from a full write buffer while the app runs


class HTTPProtocol(asyncio.Protocol):
    """One client's connection. Each scope holds a ClientRequest, to which the app adds the key when
    it has found the key to be valid."""

    def __init__(
        self,
        connections: Connections,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        received: bytes | None = None,
    ) -> None:
        """`received` are the bytes that another process has received and not served, if any."""
        self._connections = connections
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._app = cast(App, config.loaded_app)
        self._loop = asyncio.get_running_loop()
        self.head: HeadReader | None = None  # while a head arrives
        self.cycle: RequestCycle | None = None  # while the app runs or a body is read
        self._continuing = False  # the bytes that were kept are parsed in the next turn of the loop
        self.on_leave: set[Callable[[], None]] = set()  # called when the client disconnects
        self._received = received

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._stream = ClientStream(self._transport)
        self.connection = Connection(self._connections, self._stream)
        self._server = _address(transport.get_extra_info("sockname"))
        self._client = _address(transport.get_extra_info("peername"))
        self._server_state.connections.add(cast(Any, self))
        received, self._received = self._received, None
        self.connection.enter("idle", HEAD_SECONDS if received is None else KEEP_ALIVE_SECONDS)
        self._connections.add(self.connection, len(self._server_state.connections))
        if received:
            self._stream.kept = received
            self.continue_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.connection.closed = True
        if self.cycle and self.cycle.ends_by_closing and self.cycle.complete:
            self._stream.reset_when_closed(self._stream.lost or exc is not None)
        self._stream.forget()
        if self.cycle:
            self.cycle.wake()
        for leave in list(self.on_leave):
            leave()
        # Break reference cycles, so that memory is freed without waiting for the garbage collector.
        if self.head:
            self.head.close()
        self.head = self.cycle = None

    def _forget(self) -> None:
        self._server_state.connections.discard(cast(Any, self))
        self._connections.discard(self.connection, len(self._server_state.connections))

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream.kept or (stream.writing_paused and self.cycle is None):
            self._keep(stream.kept + data)  # the client must read its responses first
        else:
            self._take(data)

    def pause_writing(self) -> None:
        self._stream.writing_paused = True
        self.connection.limit_serving(WRITE_SECONDS)

    def resume_writing(self) -> None:
        self.connection.limit_serving(math.inf)
        self._stream.resume_writing()
        if self._stream.kept:
            self.continue_soon()

    def shutdown(self) -> None:
        """Close the connection, after the response that is under way if there is one."""
        if self.connection.state == "serving" and self.cycle:
            self.cycle.keep_alive = False
        elif self.connection.state == "discarding":
            self.connection.close(whole=False)
        elif self.connection.state != "closing":
            self._stream.close()

    # Reading

    def _keep(self, data: bytes) -> None:
        """Keep bytes until the current response is complete, or until the next turn of the loop."""
        self._stream.keep(data, pause=self.connection.state != "serving")

    def continue_soon(self) -> None:
        """Parse the bytes that were kept, in the next turn of the loop."""
        if not self._continuing:
            self._continuing = True
            self._loop.call_soon(self._take_kept)

    def _take_kept(self) -> None:
        self._continuing = False
        if self.connection.closed or self._stream.writing_paused:
            return
        if data := self._stream.take_kept():
            self._take(data)
        if not (self.cycle and self.cycle.is_full):
            self._stream.resume_reading()

    def _take(self, data: bytes) -> None:
        """Parse bytes that have arrived. Those of a following request are kept for later."""
        connection = self.connection
        if connection.state == "idle":
            if self._connections.on_idle:
                self._keep(data)
                self._connections.on_idle(self)
                return
            self.head = HeadReader()
            connection.enter("head", HEAD_SECONDS)
        if connection.state == "head" and self.head:
            data = self._take_head(self.head, data)
        cycle = self.cycle
        is_endless = cycle and type(cycle.framing) is Endless
        if connection.state == "closing" or is_endless:
            connection.discard(len(data), MAX_LINGER)
        elif data and cycle:
            self._take_body(cycle, data)

    def _take_head(self, head: HeadReader, data: bytes) -> bytes:
        """Parse a part of a head, and begin with its request once it is whole. Return the bytes
        that come after the head."""
        try:
            rest = head.feed(data)
            if head.complete:
                return self._begin(head, rest)
            head.received += data
            return rest
        except Refusal as refusal:
            self._refuse(head, refusal)
            return b""

    def _take_body(self, cycle: RequestCycle, data: bytes) -> None:
        if cycle.framing.whole:  # the bytes are the next request's: keep them until it is served
            self._keep(data)
            return
        discarding = self.connection.state == "discarding"
        try:
            rest = cycle.feed(data)
        except BadFraming:
            message = "The chunked encoding of the request body is invalid."
            cycle.fail(Refusal("invalid_http", message))
            if discarding:
                self.connection.close(whole=False)
            return
        except MemoryError:
            cycle.fail(Refusal("overloaded"))
            return
        if discarding and cycle.framing.whole:
            self._stream.keep(rest, pause=False)
            self._next()
        elif discarding and not self.connection.discard(len(data) - len(rest), MAX_DISCARDED):
            return
        elif rest:
            self._keep(rest)
            if not cycle.framing.whole:
                self.continue_soon()

    # From head to response

    def _begin(self, head: HeadReader, rest: bytes) -> bytes:
        """Serve the request of a whole head, or hand the connection over to a WebSocket. Return the
        bytes of `rest`, which came after the head, that are not handed over. Raises Refusal."""
        scope = head.scope(self._server, self._client)
        check_head(scope)
        if is_handshake(scope) and self._connections.offers_websocket():
            check_handshake(scope)
            self._hand_over(scope, rest)
            return b""
        keep_alive = head.keep_alive and self._connections.stay and scope["http_version"] == "1.1"
        self._serve(scope, framing_of(scope["headers"]), keep_alive)
        return rest

    def _refuse(self, head: HeadReader, refusal: Refusal) -> None:
        """Let the app answer a head that can't be read or is not allowed with `refusal`. The
        connection is closed afterwards: it is unknown where the next request would begin."""
        head.close()
        scope = head.refused_scope(self._server, self._client)
        self._serve(scope, Endless(), keep_alive=False, refusal=refusal)

    def _serve(
        self, scope: Scope, framing: Framing, keep_alive: bool, refusal: Refusal | None = None
    ) -> None:
        cycle = RequestCycle(
            self.connection, scope, framing, keep_alive, self._answered, refusal, self.on_leave
        )
        self.head, self.cycle = None, cycle
        self.connection.enter("serving")
        task = cycle.task = self._loop.create_task(self._run(cycle))
        tasks = self._server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _run(self, cycle: RequestCycle) -> None:
        """Run the app. If it does not complete its response, tear the connection."""
        try:
            await self._app(cycle.scope, cycle.receive, cycle.send)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                log(logging.ERROR, UNEXPECTED, **shown_error(error))
        finally:
            if not cycle.complete and not self.connection.closed:
                self.connection.tear(cycle.ends_by_closing)

    def _answered(self, cycle: RequestCycle) -> None:
        """Enter the state that follows a complete response."""
        self._server_state.total_requests += 1
        self.connection.keyed = cycle.request.key is not None
        if not cycle.keep_alive:
            self.connection.close(whole=cycle.framing.whole and not self._stream.kept)
        elif cycle.framing.whole:
            self._next()
        else:
            self.connection.enter("discarding", DISCARD_SECONDS)
            self._stream.resume_reading()

    def _next(self) -> None:
        """Wait for the next request, or begin with one whose first bytes have arrived already."""
        self.cycle = None
        self.connection.enter("idle", KEEP_ALIVE_SECONDS)
        if self._connections.on_idle:
            self._connections.on_idle(self)
        elif self._stream.kept:
            self.continue_soon()
        else:
            self._stream.resume_reading()

    def _hand_over(self, scope: Scope, rest: bytes) -> None:
        """Hand the connection over to uvicorn's WebSocket protocol."""
        self._forget()
        head = [b"GET %b?%b HTTP/1.1\r\n" % (scope["raw_path"], scope["query_string"])]
        head += [b"%b: %b\r\n" % line for line in scope["headers"]]
        protocol = cast(Any, self._config.ws_protocol_class)(
            config=self._config, server_state=self._server_state, app_state=self._app_state
        )
        self._stream.resume_reading()  # before the WebSocket takes over, which pauses it itself
        protocol.connection_made(self._transport)
        protocol.client, protocol.server = self._client, self._server
        self._transport.set_protocol(protocol)
        protocol.data_received(b"".join([*head, b"\r\n"]))
        if rest:
            protocol.data_received(rest)


def _address(name: Any) -> Address:
    """Return a socket's address in ASGI's form: host and port, None for a Unix socket."""
    return (name[0], name[1]) if isinstance(name, tuple) else None
