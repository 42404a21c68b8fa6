"""The routes of the gateway."""

from __future__ import annotations

from starlette.routing import Router

from redbtc.deadlines import Deadline
from redbtc.gateway.exchange import RESPONSES, Endpoint
from redbtc.gateway.handlers import unknown_url
from redbtc.gateway.metered import MeteredRequest
from redbtc.gateway.reading import read_content
from redbtc.gateway.relay import Relay
from redbtc.gateway.state import Gateway
from redbtc.gateway.websocket_session import WebSocketSession
from redbtc.headers import header
from redbtc.limits import Reservation
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Receive, Scope, Send, respond

METERED = (
    Endpoint("/v1/chat/completions", chat=True, limits=("max_completion_tokens", "max_tokens")),
    RESPONSES,
    Endpoint("/v1/responses/compact"),
    Endpoint("/v1/responses/input_tokens", free=True),
    Endpoint("/v1/images/generations", images=True),
    Endpoint("/v1/images/edits", images=True, forms=True),
)


class MeteredRoute:
    """The ASGI app of an endpoint."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, endpoint = self._gateway, self._endpoint
        scope["where"] = endpoint.path
        key, settings = gateway.enter(scope), gateway.settings
        clock = Deadline(gateway.clocks)
        charged = gateway.limits.charge(key, settings.limits)
        with (
            charged as admission,
            gateway.serving(scope, clock, key),
            MeteredRequest(gateway, scope, endpoint, clock, admission) as exchange,
        ):
            with Reservation(gateway.limits, key, settings) as reserved:
                content = await read_content(scope, receive, clock, settings, reserved, endpoint)
                upstreams = await gateway.upstreams_for(key, content)
                asks = settings.metering.include_usage == "add" and content.plain
                if endpoint.chat and content.facts.stream and asks:
                    exchange.takes_out_usage = content.add_include_usage()
                await exchange.admit(key, content, upstreams)
            path = endpoint.path.removeprefix("/v1")
            relay = Relay(exchange, send, "POST", path, content.sent)
            await exchange.run(lambda: relay.forward(upstreams))


def apps_of(gateway: Gateway) -> tuple[dict[str, App], App, App]:
    """Return the ASGI apps for metered requests by path, for others, and for WebSockets."""
    metered: dict[str, App] = {
        endpoint.path: MeteredRoute(gateway, endpoint) for endpoint in METERED
    }
    others = Router(gateway.routes(), redirect_slashes=False, default=unknown_url)

    async def session(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != RESPONSES.path:
            raise Refusal("unknown_url")
        scope["where"] = RESPONSES.path
        origin = header(scope["headers"], b"origin")
        if origin is not None and not gateway.allows_origin(origin):  # RFC 6455 §10.2
            raise Refusal("origin_not_allowed")
        await WebSocketSession(gateway, scope, receive, send).run()

    return metered, others, session


async def not_open(scope: Scope, _: Receive, send: Send) -> None:
    """Serve requests while the ledger is not open yet."""
    if scope["path"] != "/healthz":
        raise Refusal("ledger_unavailable", headers=[(b"connection", b"close")])
    scope["where"] = "/healthz"
    await respond(scope, send, 200, b'{"status":"ok"}')
