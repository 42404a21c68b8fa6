"""The app inside CORS: it leads each request to its app, and turns refusals and errors into
responses."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from redbtc.headers import Headers
from redbtc.refusals import NO_RETRY, ClientLeft, Refusal, refusal_of
from redbtc.server.asgi import App, Message, Receive, Scope, Send, request_of, respond
from redbtc.telemetry import Telemetry


# protocol.py parses requests, and checks each head before the request gets here. The path is
# scope["path"], never rebuilt from Host.
class Guard:
    """The app that leads each request to its app, and turns each Refusal into a response. An
    unexpected error is logged by type and place, never with content."""

    def __init__(
        self, metered: Mapping[str, App], others: App, websocket: App, telemetry: Telemetry
    ) -> None:
        """`metered`: by path, for POST. They don't go through a router, which would look at one
        route after the other, and be gone through again for each event."""
        self._telemetry = telemetry
        self.lead_to(metered, others, websocket)

    def lead_to(self, metered: Mapping[str, App], others: App, websocket: App) -> None:
        """Serve these apps from now on."""
        self._metered = metered
        self._others = others
        self._websocket = websocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = request_of(scope)
        try:
            if request.refusal:
                raise request.take_refusal()
            if scope["type"] == "websocket":
                await self._websocket(scope, receive, send)
                return
            app = self._metered.get(scope["path"]) if scope["method"] == "POST" else None
            await (app or self._others)(scope, receive, send)
        except Refusal as refusal:
            self._telemetry.refused(request.id, request.route, refusal, request.counted)
            await self._refuse(scope, send, refusal)
        except ClientLeft:
            self._telemetry.left(request.id, request.route)
        except Exception as error:
            self._telemetry.failed(request.id, request.route, error, request.counted)
            with contextlib.suppress(RuntimeError):  # the answer had begun: it ends torn
                await self._refuse(scope, send, refusal_of(error))

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        answer = denial(send) if scope["type"] == "websocket" else send
        headers, request = self._headers(refusal), request_of(scope)
        if request.interrupted:
            headers = [*headers, NO_RETRY]
        await respond(request, answer, refusal.status, refusal.body(), headers)

    @staticmethod
    def _headers(refusal: Refusal) -> Headers:
        """Return the headers of a refusal's response. They close the connection if the rest of the
        request can't be read: its body is late, or its framing is invalid. Otherwise the rest is
        read and thrown away, so that the client sees the response and can reuse the connection."""
        if refusal.code in ("invalid_http", "headers_too_large", "request_timeout"):
            return [*refusal.headers, (b"connection", b"close")]
        return refusal.headers


def denial(send: Send) -> Send:
    """Return a `send` for the HTTP response that refuses a WebSocket (an extension of ASGI)."""

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return send_denial
