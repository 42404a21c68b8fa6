"""Functions as routes, and the answers to what is not served."""

from __future__ import annotations

from starlette.routing import Match, Route

from redbtc.headers import header
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Receive, Scope, Send
from redbtc.server.websocket_protocol import UPGRADE


class AsApp:
    """A function as an ASGI app. (Starlette's Route takes a function for a handler of requests.)"""

    def __init__(self, function: App) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


class ExactRoute(Route):
    """A route to which another method is another URL, so that it is answered 404 and not 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})


async def upgrade_required(scope: Scope, _: Receive, send: Send) -> None:
    """Refuse a WebSocket that no upstream offers: Codex asks for one by GET /v1/responses, and 426
    makes it use POST at once."""
    if (header(scope["headers"], b"upgrade") or b"").lower() != b"websocket":
        raise Refusal("unknown_url")
    raise Refusal("upgrade_required", headers=UPGRADE)


async def unknown_url(scope: Scope, _: Receive, send: Send) -> None:
    """Refuse a request for anything that is not served."""
    raise Refusal("unknown_url")
