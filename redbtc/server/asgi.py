"""The types of ASGI, what the gateway knows of a request besides ASGI's scope, and the responses of
the gateway's own.

The server puts one `ClientRequest` into each scope, and everything that handles the request finds
it there: its id, its route, its key, and the client that waits for the response.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

from msgspec import Struct, field

from redbtc.headers import Headers
from redbtc.refusals import Refusal
from redbtc.store.credentials import ClientCredential
from redbtc.store.keys import Key
from redbtc.times import now_ms

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IN_SCOPE = "redbtc"  # the scope's key for the ClientRequest
ID_SECONDS = 15  # for the id of a background response whose client has left


def new_request_id() -> str:
    """Return "req_", 12 hexadecimal digits of the time in milliseconds and 20 random ones, so that
    ids sort by time. Ids are not secret; `random` is seeded from the system's entropy at the
    start."""
    return f"req_{now_ms():012x}{random.getrandbits(80):020x}"


def cannot_send_now(data: bytes) -> bool:
    """Return False: `send` must be awaited."""
    return False


class Client(Struct, eq=False):
    """The things that can be done to a client's connection and for which ASGI has no message."""

    abort: Callable[[], None]  # end the connection at once, without sending what is buffered
    # Send a part of the response's body past the app's task, or return False if `send` must be
    # awaited instead.
    send_now: Callable[[bytes], bool] = cannot_send_now
    # Called when the client disconnects: a task that waits in `receive` would cost each request a
    # task.
    on_leave: set[Callable[[], None]] = field(default_factory=set)


class Received(Protocol):
    """The body of a request, as far as it has arrived."""

    def as_client_sent(self) -> Sequence[bytes | bytearray | memoryview]:
        """Return it in parts."""


class ClientRequest(Struct, eq=False):
    """A request as the whole gateway knows it: one over HTTP, the handshake of a WebSocket, or one
    that arrived over a WebSocket."""

    headers: Headers
    client: Client
    route: str = "other"  # as the metrics and the log name it
    refusal: Refusal | None = None  # why the head can't be served; its path is not reliable then
    key: Key | None = None  # once it is found to be valid
    credential: ClientCredential | None = None  # the client's own; known with the key
    key_headers: frozenset[bytes] | None = None  # in which the key was looked for
    # The gateway failed on it after it may have reached an upstream: a retry would be paid again.
    interrupted: bool = False
    counted: bool = False  # it is in the metrics and the log, with its row in the ledger
    # Its body, while it can be served anew by another process: it is not admitted yet.
    received: Received | None = None
    id: str = field(default_factory=new_request_id)
    started: float = field(default_factory=time.monotonic)  # when the head had arrived

    @property
    def digest(self) -> str | None:
        """The digest of the client's own credential; None if it has sent none."""
        return self.credential.digest if self.credential else None

    @property
    def credential_headers(self) -> Headers:
        """The headers with the client's own credential, for an upstream that needs them. The other
        upstreams must not get them."""
        assert self.credential is not None, "such an upstream is no candidate without a credential"
        return self.credential.headers

    def new_request(self) -> ClientRequest:
        """Return a request that arrives now over the same WebSocket."""
        return ClientRequest(self.headers, self.client, self.route, credential=self.credential)

    def take_refusal(self) -> Refusal:
        """Return the refusal and forget it: once raised, it refers to everything on the stack."""
        refusal, self.refusal = self.refusal, None
        assert refusal is not None
        return refusal


def request_of(scope: Scope) -> ClientRequest:
    """Return the request that a scope belongs to."""
    request: ClientRequest = scope[IN_SCOPE]
    return request


def ids_of(request: ClientRequest) -> Headers:
    """Return the headers that name the request in the ledger and the log."""
    request_id = request.id.encode()
    return [(b"x-request-id", request_id), (b"x-redbtc-request-id", request_id)]


async def respond(
    request: ClientRequest,
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    content_type: bytes = b"application/json",
) -> None:
    """Send a whole response of the gateway's own."""
    head: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        *ids_of(request),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
