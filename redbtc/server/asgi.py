"""Types of ASGI, and the answers that the gateway gives itself."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from redbtc.headers import Headers
from redbtc.times import now_ms

ID_SECONDS = 15  # for the id of a background response whose client has left


def new_request_id() -> str:
    """req_, 12 hexadecimal digits of milliseconds, 20 of chance: ids sort by time. They are no
    secrets; random is seeded from the system's entropy at the start."""
    return f"req_{now_ms():012x}{random.getrandbits(80):020x}"


def ids_of(scope: Scope) -> Headers:
    """Return the headers that name the request in the ledger and the log."""
    request_id = scope["request_id"].encode()
    return [(b"x-request-id", request_id), (b"x-redbtc-request-id", request_id)]


async def respond(
    scope: Scope,
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    content_type: bytes = b"application/json",
) -> None:
    """One whole answer of the gateway's own."""
    head: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        *ids_of(scope),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


# The types of ASGI.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
