"""Small ASGI apps and wrappers for the routes."""

from __future__ import annotations

import asyncio
import time

from starlette.routing import Match, Route

from redbtc.headers import Headers, header
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Message, Receive, Scope, Send
from redbtc.server.websocket_protocol import UPGRADE


def received_until(until: float, receive: Receive) -> Receive:
    """Return a `receive` that says the client has disconnected if its body is not whole at `until`,
    a time of the monotonic clock."""
    whole = False

    async def receive_until() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return receive_until


def age_header(seconds: float) -> Headers:
    """RFC 9111 §5.1, for what is older than a second."""
    return [(b"age", b"%d" % seconds)] if seconds >= 1 else []


async def upgrade_required(scope: Scope, _: Receive, send: Send) -> None:
    """GET /v1/responses is Codex asking for a WebSocket: 426 makes it fall back to POST at once."""
    if (header(scope["headers"], b"upgrade") or b"").lower() != b"websocket":
        raise Refusal("unknown_url")
    raise Refusal("upgrade_required", headers=UPGRADE)


async def unknown_url(scope: Scope, _: Receive, send: Send) -> None:
    """Anything that is not served."""
    raise Refusal("unknown_url")


class AsApp:
    """A function as an ASGI app, which Starlette's Route takes for what it is."""

    def __init__(self, function: App) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


class ExactRoute(Route):
    """A route to which another method is another URL, so that it is 404 and not 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})
