"""The first app that a request meets: it names the request, and turns refusals into answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

from redbtc.headers import Headers
from redbtc.refusals import NO_RETRY, ClientLeft, Refusal, refusal_of
from redbtc.server.asgi import App, Message, Receive, Scope, Send, new_request_id, respond
from redbtc.telemetry import Telemetry


# protocol.py parses requests, and checks each head before the request gets here. The path is
# scope["path"], never rebuilt from Host.
class Guard:
    """The outermost ASGI app: gives the request its id, refuses bad heads, and turns every Refusal
    into an answer. What nobody expected is logged by type and place, never with content."""

    def __init__(
        self, metered: Mapping[str, App], others: App, websocket: App, watch: Telemetry
    ) -> None:
        """`metered`: by path, for POST. They don't go through a router, which would look at one
        route after the other, and be gone through again for each event."""
        self._watch = watch
        self.lead_to(metered, others, websocket)

    def lead_to(self, metered: Mapping[str, App], others: App, websocket: App) -> None:
        """Serve these apps from now on."""
        self._metered = metered
        self._others = others
        self._websocket = websocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["request_id"] = new_request_id()
        scope["started"] = time.monotonic()
        scope["where"] = "other"
        try:
            if "refusal" in scope:
                raise scope.pop("refusal")
            if scope["type"] == "websocket":
                await self._websocket(scope, receive, send)
                return
            app = self._metered.get(scope["path"]) if scope["method"] == "POST" else None
            await (app or self._others)(scope, receive, send)
        except Refusal as refusal:
            self._watch.refused(scope, refusal)
            await self._refuse(scope, send, refusal)
        except ClientLeft:
            self._watch.left(scope)
        except Exception as error:
            self._watch.failed(scope, error)
            with contextlib.suppress(RuntimeError):  # the answer had begun: it ends torn
                await self._refuse(scope, send, refusal_of(error))

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        answer = denial(send) if scope["type"] == "websocket" else send
        headers = self._headers(refusal)
        if "forwarded" in scope:  # a retry would be paid again
            headers = [*headers, NO_RETRY]
        await respond(scope, answer, refusal.status, refusal.body(), headers)

    @staticmethod
    def _headers(refusal: Refusal) -> Headers:
        """Return the headers of a refusal's response. They close the connection if the rest of the
        request can't be read: its body is late, or its framing is invalid. Otherwise the rest is
        read and thrown away, so that the client sees the response and can reuse the connection."""
        if refusal.code in ("invalid_http", "headers_too_large", "request_timeout"):
            return [*refusal.headers, (b"connection", b"close")]
        return refusal.headers


def denial(send: Send) -> Send:
    """An HTTP answer to who asked for a WebSocket (an extension of ASGI's)."""

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return send_denial
